"""Consistent hashing: things on a ring, each at many places; whatever is looked for goes to the next one. No I/O.

Ketama's, as Envoy's ring hash. Where a thing stands depends on its name alone, so that all processes agree. When one of
n comes or goes, about 1/n of what is looked for moves.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Generic, TypeVar

PLACES: Final = 100
"""Of a thing of average weight: the shares of equal things then differ by a tenth of them (one standard deviation)."""
MAX_PLACES: Final = 10_000
"""Of the heaviest."""

_PER_DIGEST: Final = 8
_DIGEST: Final = struct.Struct(f"<{_PER_DIGEST}Q")
_INDEX_BITS: Final = 20
_INDEX: Final = (1 << _INDEX_BITS) - 1

_T = TypeVar("_T")


class HashRing(Generic[_T]):
    """A place is a number: where it is, and behind that which thing stands there. Sorted once, then kept in order."""

    __slots__ = ("_counts", "_free", "_indices", "_places", "_things")

    def __init__(self) -> None:
        self._places: list[int] = []
        self._things: list[_T | None] = []
        self._indices: dict[bytes, int] = {}
        self._counts: dict[bytes, int] = {}
        self._free: list[int] = []

    def set(self, things: Mapping[bytes, tuple[_T, int]]) -> None:
        """What stands on it from now on, by name, each with its weight. What stays is not moved."""
        total = sum(weight for _, weight in things.values())
        gone: set[int] = set()
        come: list[int] = []
        for name in self._indices.keys() - things.keys():
            index = self._indices.pop(name)
            gone.update(_places(name, index, 0, self._counts.pop(name)))
            self._things[index] = None
            self._free.append(index)
        for name, (thing, weight) in things.items():
            index = self._indices.get(name, -1)
            if index < 0:
                index = self._indices[name] = self._free.pop() if self._free else len(self._things)
            self._things[index : index + 1] = [thing]
            count = min(MAX_PLACES, max(1, round(PLACES * len(things) * weight / total)))
            before, self._counts[name] = self._counts.get(name, 0), count
            if count == before:
                continue
            gone.update(_places(name, index, count, before))
            come += _places(name, index, before, count)
        if gone:
            self._places = [place for place in self._places if place not in gone]
        self._places += come
        self._places.sort()  # little to do, since most of it is in order

    def find(self, where: int, usable: Callable[[_T], bool]) -> _T | None:
        """The next thing from `where` (64 bits) on that is usable; None when none is."""
        places = self._places
        begin = bisect_left(places, where << _INDEX_BITS)
        seen: set[int] = set()
        for step in range(len(places)):
            index = places[(begin + step) % len(places)] & _INDEX
            if index in seen:
                continue
            thing = self._things[index]
            assert thing is not None  # what has gone has no places
            if usable(thing):
                return thing
            seen.add(index)
            if len(seen) == len(self._indices):
                break
        return None


def position(text: bytes) -> int:
    """Where what is looked for is: 64 bits."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _places(name: bytes, index: int, first: int, end: int) -> Iterator[int]:
    """The places of a thing with these numbers, if there are any."""
    for block in range(first // _PER_DIGEST, -(-end // _PER_DIGEST)):
        digest = hashlib.blake2b(b"%d %b" % (block, name)).digest()
        for number, at in enumerate(_DIGEST.unpack(digest), block * _PER_DIGEST):
            if first <= number < end:
                yield (at << _INDEX_BITS) | index
