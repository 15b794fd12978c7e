"""The map `backends`: one array that all services share, each with a range of its own, which is an alias table.

A service's value names its range, so that one write changes it as a whole. A range that nobody names any more is not
written for a second, in which every program that still reads it has long ended.
"""

from __future__ import annotations

import mmap
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bpf import layout

QUARANTINE_S: Final = 1.0
_ALWAYS: Final = 2**32 - 1


class ArenaFullError(Exception):
    """There is no free range of that length."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One of a service's backends."""

    address: bytes
    """16 packed bytes."""
    port: int
    weight: int
    netns_cookie: int
    """Of its namespace, when it is on this host; else 0."""
    id: int


def alias_table(backends: Sequence[Backend]) -> list[bytes]:
    """Slots from which one draw of a slot and one of 32 bits choose a backend by its weight (Vose 1991).

    One slot for each backend with a weight; the error of a share is below 2^-32. Raises ValueError when none has one.
    """
    drawn = [backend for backend in backends if backend.weight > 0]
    total = sum(backend.weight for backend in drawn)
    if not drawn:
        raise ValueError("no backend has a weight")
    # Each slot has room for `total`; what a backend lacks there is filled up by one that has too much.
    rooms = [backend.weight * len(drawn) for backend in drawn]
    keeps, aliases = [total] * len(drawn), list(range(len(drawn)))
    poor = [at for at, room in enumerate(rooms) if room < total]
    rich = [at for at, room in enumerate(rooms) if room >= total]
    while poor:
        at, donor = poor.pop(), rich[-1]
        keeps[at], aliases[at] = rooms[at], donor
        rooms[donor] -= total - rooms[at]
        if rooms[donor] < total:
            poor.append(rich.pop())
    return [
        layout.pack(
            "mesh_backend",
            addr=backend.address,
            port=backend.port,
            netns_cookie=backend.netns_cookie,
            id=backend.id,
            # A slot without an alias keeps every number: its alias is itself.
            keep=min(keep * 2**32 // total, _ALWAYS),
            alias=alias,
        )
        for backend, keep, alias in zip(drawn, keeps, aliases, strict=True)
    ]


class Arena:
    """Ranges of an array map, through its memory."""

    def __init__(self, fd: int, capacity: int, slot_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`slot_size`: bytes of a value, a multiple of 8 as the kernel lays them out."""
        self.capacity = capacity
        self._slot_size = slot_size
        self._clock = clock
        self._memory = mmap.mmap(fd, -(-capacity * slot_size // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._free = [(0, capacity)]
        """(base, count), sorted, with none beside another."""
        self._quarantine: deque[tuple[float, int, int]] = deque()
        """(when it may be used again, base, count), sorted."""

    @property
    def used(self) -> int:
        """Slots that cannot be written now."""
        return self.capacity - sum(count for _, count in self._free)

    def claim(self, base: int, count: int) -> None:
        """Takes a range that is in use already, as an earlier agent left it."""
        for at, (free_base, free_count) in enumerate(self._free):
            if free_base <= base and base + count <= free_base + free_count:
                rest = [(free_base, base - free_base), (base + count, free_base + free_count - base - count)]
                self._free[at : at + 1] = [one for one in rest if one[1]]
                return
        raise ValueError(f"slots {base}..{base + count - 1} are in use twice")

    def store(self, slots: Sequence[bytes]) -> int:
        """Writes slots into a free range and returns its base. Raises ArenaFullError."""
        self._release_due()
        fitting = [one for one in self._free if one[1] >= len(slots)]
        if not fitting:
            raise ArenaFullError(f"the map `backends` has no room for {len(slots)} more")
        base, _ = min(fitting, key=lambda one: one[1])
        self.claim(base, len(slots))
        start = base * self._slot_size
        self._memory[start : start + len(slots) * self._slot_size] = b"".join(slots)
        return base

    def release(self, base: int, count: int) -> None:
        """A range that no service names any more."""
        if count:
            self._quarantine.append((self._clock() + QUARANTINE_S, base, count))

    def close(self) -> None:
        self._memory.close()

    def _release_due(self) -> None:
        now = self._clock()
        due = []
        while self._quarantine and self._quarantine[0][0] <= now:
            due.append(self._quarantine.popleft()[1:])
        if not due:
            return
        merged: list[tuple[int, int]] = []
        for base, count in sorted((*self._free, *due)):
            if merged and sum(merged[-1]) == base:
                merged[-1] = merged[-1][0], merged[-1][1] + count
            else:
                merged.append((base, count))
        self._free = merged
