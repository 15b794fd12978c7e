"""What the kernel says of eBPF programs and maps: how long programs ran (bpf_enable_stats), what memory maps take."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, cast

from cffi import FFI

from bpf import libbpf
from bpf.libbpf import BpfError

_RUN_TIME: Final = 0  # BPF_STATS_RUN_TIME, <linux/bpf.h>

_ffi: Final = FFI()
_ffi.cdef("int bpf_enable_stats(int type); int bpf_prog_get_fd_by_id(uint32_t id); int bpf_obj_get(const char *path);")
_lib: Final = cast("Any", _ffi.dlopen(libbpf.LIBRARY))


class Programs:
    """The programs behind pinned links."""

    def __init__(self, fds: Mapping[str, int]) -> None:
        self._fds = fds
        """Name of the hook -> a descriptor of its program."""

    def run_ns(self) -> dict[str, int]:
        """How long each has run since it was loaded, while the clock was on."""
        return {hook: _said(fd)["run_time_ns"] for hook, fd in self._fds.items()}


@contextmanager
def clocked(directories: Iterable[Path]) -> Iterator[Programs]:
    """The programs of the links that are pinned in some directories, with the kernel's clock on meanwhile.

    It is on for all programs of the machine, costs each some 50 ns a run, and goes off with this process. A program
    that is in several of the directories is counted once. Raises BpfError.
    """
    with ExitStack() as stack:
        seen: dict[int, tuple[str, int]] = {}
        for pin in (pin for directory in directories for pin in sorted(directory.iterdir())):
            program = _program_of(pin)
            if program not in seen:
                name = pin.name if all(pin.name != hook for hook, _ in seen.values()) else f"{pin.name}_there"
                seen[program] = name, _opened(stack, _lib.bpf_prog_get_fd_by_id(program), f"program {program}")
        _opened(stack, _lib.bpf_enable_stats(_RUN_TIME), "the clock of eBPF programs")
        yield Programs(dict(seen.values()))


def memory_bytes(fds: Iterable[int]) -> int:
    """What maps take of the kernel's memory now, entries included."""
    return sum(_said(fd)["memlock"] for fd in fds)


def _program_of(pin: Path) -> int:
    with ExitStack() as stack:
        return _said(_opened(stack, _lib.bpf_obj_get(os.fsencode(pin)), str(pin)))["prog_id"]


def _opened(stack: ExitStack, fd: int, what: str) -> int:
    if fd < 0:
        raise BpfError(-fd, f"{what}: {os.strerror(-fd)}")
    stack.callback(os.close, fd)
    return fd


def _said(fd: int) -> dict[str, int]:
    """The numbers that the kernel shows of a descriptor (bpf_prog_show_fdinfo, bpf_map_show_fdinfo)."""
    lines = (line.split(":") for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines())
    return {name: int(value) for name, value in lines if value.strip().isdigit()}
