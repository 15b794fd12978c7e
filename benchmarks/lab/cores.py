"""Which core a process works on: set for all its threads and children, and looked at again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_OURS: Final = sorted(os.sched_getaffinity(0))
FIRST, LAST = _OURS[0], _OURS[-1]
"""The same one where this process may use one only."""


def pin(pids: Iterable[int], core: int) -> None:
    """Everything that these processes are now, and what they start later, on that core."""
    for thread in _threads(pids):
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(thread, {core})


def strays(pids: Iterable[int], core: int) -> list[int]:
    """The threads of these processes and their children that may run elsewhere."""
    found = []
    for thread in _threads(pids):
        with suppress(ProcessLookupError):
            if os.sched_getaffinity(thread) != {core}:
                found.append(thread)
    return found


def _threads(pids: Iterable[int]) -> Iterator[int]:
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                yield int(thread.name)
                yield from _threads(map(int, (thread / "children").read_text().split()))


@contextmanager
def awake(*cores: int) -> Iterator[None]:
    """These cores never sleep meanwhile: something that gives way to everything else (SCHED_IDLE) keeps them busy."""
    dying = ["setpriv", "--pdeathsig", "KILL"]  # with this process, however it ends
    spinning = [
        subprocess.Popen([*dying, "taskset", "-c", str(core), "chrt", "--idle", "0", "sh", "-c", "while :; do :; done"])
        for core in sorted(set(cores))
    ]
    try:
        yield
    finally:
        for one in spinning:
            one.kill()
            one.wait()
