"""How much memory processes take as if nothing else ran: what they share with strangers counts in full.

PSS would divide the pages of Envoy's program by all placements' Envoys, which stand here side by side and would not
anywhere else.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness.usage import descendants
from benchmarks.lab.programs import memory_bytes
from bpf.libbpf import open_pinned_map

_PAGE = os.sysconf("SC_PAGE_SIZE")
# An entry of /proc/PID/pagemap (kernel: admin-guide/mm/pagemap): bit 63 is "present", the low 55 are the frame.
_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1
_ENTRY_BYTES = 8
# Of one read: a mapping may reserve far more than it uses.
_CHUNK = 1 << 20


def resident_mb(pids: Iterable[int]) -> float:
    """MB (1,000,000 bytes) of distinct physical pages of these processes, each counted once. Needs CAP_SYS_ADMIN.

    Raises ProcessLookupError when one is gone.
    """
    return size_mb(map(frames, pids))


def with_children(pid: int) -> list[int]:
    """A process, and what it has started, of any generation."""
    return [pid, *descendants(pid)]


def maps_mb(pins: Path) -> float:
    """MB of the kernel's memory that the maps that are pinned in a directory take. Raises BpfError."""
    fds = [open_pinned_map(pin) for pin in pins.iterdir()]
    try:
        return memory_bytes(fds) / 1e6
    finally:
        for fd in fds:
            os.close(fd)


def size_mb(each: Iterable[set[int]]) -> float:
    """MB of the pages of some processes, each counted once."""
    return len(set[int]().union(*each)) * _PAGE / 1e6


def frames(pid: int) -> set[int]:
    """The physical pages of one process, by their numbers. As `resident_mb`."""
    found: set[int] = set()
    try:
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
            for line in maps:
                if line.endswith("[vsyscall]"):  # beyond the user's half, and no page of anybody's
                    continue
                first, end = (int(part, 16) // _PAGE for part in line.split()[0].split("-"))
                pagemap.seek(first * _ENTRY_BYTES)
                left = (end - first) * _ENTRY_BYTES
                while left:
                    data = pagemap.read(min(left, _CHUNK))
                    if not data:
                        break
                    left -= len(data)
                    if data.count(0) < len(data):
                        found.update(entry & _FRAME for entry in array("Q", data) if entry & _PRESENT)
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    return found
