"""What a subject uses: processor time in nanoseconds, softirq time of the cores, and memory.

Processor time is the kernel's own clock of each process (clock_getcpuclockid(3)), which counts nanoseconds and
includes threads that have ended; utime and stime of /proc/PID/stat are the same time in steps of 10 ms. Children count
to the process that started them; those that have ended and been waited for are known in steps of 10 ms only.

Softirq time is what /proc/stat says for all cores, in steps of 10 ms. Kernels without CONFIG_IRQ_TIME_ACCOUNTING
sample it at each tick, and let it count to the interrupted process too: it is then a part of the processor time, not
beside it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_EVERY_S = 0.05
_CPUCLOCK_SCHED = 2  # linux/posix-timers_types.h

ASIDE = ("application", "generator")
"""Roles that are accounted and shown, and are not the subject's own."""


class GoneError(Exception):
    """A process that was to be accounted has ended."""


def processor_ns(pid: int) -> int:
    """Processor time of one process so far, all its threads together. Raises GoneError."""
    try:
        return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError as error:
        raise GoneError(f"process {pid} is gone") from error


def softirq_ns() -> int:
    """Time of all cores in hard and soft interrupts so far."""
    fields = Path("/proc/stat").read_text().partition("\n")[0].split()
    return (int(fields[6]) + int(fields[7])) * _TICK_NS  # irq and softirq, proc(5)


def pss_mb(pids: Iterable[int]) -> float:
    """Memory of processes and their children in MB (1,000,000 bytes): shared pages by their share. Raises GoneError."""
    total = 0
    for pid in pids:
        for one in (pid, *descendants(pid)):
            try:
                rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
            except OSError as error:
                if one == pid:
                    raise GoneError(f"process {pid} is gone") from error
                continue
            total += next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return total * 1024 / 1e6


def descendants(pid: int) -> list[int]:
    """All that live, of any generation."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = thread.read_text()
        except OSError:  # the thread has ended
            continue
        for child in map(int, children.split()):
            found += [child, *descendants(child)]
    return found


def _waited_ns(pid: int) -> int:
    """Processor time of the children of `pid` that have ended and been waited for, with all of theirs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return (int(fields[13]) + int(fields[14])) * _TICK_NS  # cutime and cstime, proc(5)


class _Tree:
    """A process and its children: which of them live, and what the ended ones used, is as of the last look."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._children: dict[int, int] = {}
        self._waited = 0
        self.look()

    def look(self) -> None:
        children = descendants(self._pid)
        self._waited = _waited_ns(self._pid) + sum(map(_waited_ns, children))
        self._children = dict.fromkeys(children, 0)

    def read_ns(self) -> int:
        for child in self._children:
            try:
                self._children[child] = processor_ns(child)
            except GoneError:  # in `_waited` after the next look
                continue
        return processor_ns(self._pid) + self._waited + sum(self._children.values())


@dataclass(frozen=True, slots=True)
class Used:
    """What was used between two instants."""

    processor_ns: Mapping[str, int]
    """By role."""
    softirq_ns: int
    """By the whole machine."""


class Meter:
    """Reads the clocks of processes in the background while a round is taken.

    The load generator says only afterwards which part of its time counted; the readings around that part's begin and
    end are joined by a straight line. A reading costs some 3 us per process, so that 20 a second of ten processes take
    0.2 % of a core; children are looked for at the beginning and the end.
    """

    def __init__(self, processes: Mapping[str, Sequence[int]]) -> None:
        self._trees = {role: [_Tree(pid) for pid in pids] for role, pids in processes.items()}
        self._at: list[int] = []
        self._read: dict[str, list[int]] = {role: [] for role in processes}
        self._softirq = 0
        self._end = threading.Event()
        self._gone: GoneError | None = None
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)

    def __enter__(self) -> Meter:
        self._softirq = softirq_ns()
        self._reading()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end.set()
        self._thread.join()

    def used(self, counted: tuple[int, int] | None = None) -> Used:
        """What was used until now, or in the part that counted (CLOCK_MONOTONIC, ns). Raises GoneError."""
        self._end.set()
        self._thread.join()
        if self._gone is not None:
            raise self._gone
        for tree in self._all():
            tree.look()
        self._reading()
        softirq = softirq_ns() - self._softirq
        begin, end = counted or (self._at[0], self._at[-1])
        share = (end - begin) / (self._at[-1] - self._at[0])
        processor = {
            role: round(_between(self._at, read, end) - _between(self._at, read, begin))
            for role, read in self._read.items()
        }
        return Used(processor, round(softirq * share))

    def _all(self) -> list[_Tree]:
        return [tree for trees in self._trees.values() for tree in trees]

    def _run(self) -> None:
        while not self._end.wait(_EVERY_S):
            try:
                self._reading()
            except GoneError as error:
                self._gone = error
                return

    def _reading(self) -> None:
        read = {role: sum(tree.read_ns() for tree in trees) for role, trees in self._trees.items()}
        self._at.append(time.monotonic_ns())
        for role, one in read.items():
            self._read[role].append(one)


def _between(at: Sequence[int], read: Sequence[int], instant: int) -> float:
    """The reading at an instant, by a straight line between its neighbours; the first or last one outside of them."""
    if instant <= at[0]:
        return read[0]
    for (before, low), (after, high) in zip(
        zip(at, read, strict=True), zip(at[1:], read[1:], strict=True), strict=False
    ):
        if instant <= after:
            return low + (high - low) * (instant - before) / (after - before)
    return read[-1]
