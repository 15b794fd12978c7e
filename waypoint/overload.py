"""When a process has more to do than it can: which requests it refuses, so that those it takes are not late. No I/O.

What tells is how long a coroutine that can go on waits for its turn, as every step of a request does. Where all these
waits are long for a while, work comes faster than it is done: then a share of the new requests is refused, which grows
until the waits are short again. A single long wait is a hiccup of the machine, and changes nothing (CoDel, RFC 8289).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from uproxy.plane import Plane

TARGET_S: Final = 0.05
"""A coroutine's wait for its turn, above which there is too much to do: of a request that has some ten of them, half a
second. A turn in which nothing waits takes a few milliseconds."""
LOOK_S: Final = 0.05
"""Between two looks, while requests come."""
LATE: Final = 6
"""Looks in a row that must be late."""
MOST: Final = 0.95
"""Of the requests that are refused at worst: some must pass, or nobody would learn that it is over."""
MAX_UNDER_WAY: Final = 20_000
"""Requests of one process at a time, whatever they wait for."""

_TELLS_S: Final = 1.0  # a wait that was over so long ago tells nothing of now
_STEP: Final = 0.15  # of those that still pass, more are refused at each look that is late
_BACK: Final = 0.9  # so many are left of the share at each look that is not
_LEAST: Final = 0.01


class Overload:
    """Asked once for each request."""

    __slots__ = (
        "_asked",
        "_chance",
        "_clock",
        "_late",
        "_look_at",
        "_plane",
        "_told_at",
        "_waited_s",
        "refused",
        "share",
    )

    def __init__(self, data_plane: Plane, clock: Callable[[], float], chance: random.Random) -> None:
        """`clock`: monotonic seconds."""
        self.share = 0.0
        """Of the new requests that are refused."""
        self.refused = 0
        self._plane = data_plane
        self._clock = clock
        self._chance = chance
        self._look_at = 0.0
        self._asked = 0.0  # when the coroutine began to wait that tells; 0: none does
        self._waited_s = 0.0  # by the last one
        self._told_at = 0.0  # when that one had its turn
        self._late = 0

    def sheds(self, now: float, under_way: int) -> bool:
        """Whether a request that comes now is refused. `under_way`: how many there are, with this one."""
        if now >= self._look_at:
            self._look(now)
            self._look_at = now + LOOK_S
        if (self.share and self._chance.random() < self.share) or under_way > MAX_UNDER_WAY:
            self.refused += 1
            return True
        return False

    def _look(self, now: float) -> None:
        told_s = self._waited_s if now - self._told_at <= _TELLS_S else 0.0
        waits_s = max(told_s, now - self._asked if self._asked else 0.0)
        if not self._asked:
            self._asked, self._waited_s = now, 0.0
            self._plane.spawn(self._wait())
        if waits_s <= TARGET_S:
            self._late = 0
            # A look for which no request came would not have been late, either.
            looks = 1 + (now - self._look_at) / LOOK_S
            self.share = self.share * _BACK**looks if self.share > _LEAST else 0.0
            return
        self._late += 1
        if self._late >= LATE:
            self.share = min(MOST, self.share + (1 - self.share) * _STEP)

    async def _wait(self) -> None:
        """Coroutines are stepped in the order of their asking: this one waits as long as any does."""
        self._told_at = self._clock()
        self._waited_s, self._asked = self._told_at - self._asked, 0.0
