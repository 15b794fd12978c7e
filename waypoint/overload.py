"""When a process has more to do than it can: which requests it refuses, so that those it takes are not late. No I/O.

What tells is how long work waits for its turn (`Plane.queue`), in two ways. Of all callers: how long whatever brings
work now will wait. Of one way, a caller's tunnel or its HTTP/2 connection, of which each turn takes but a piece: how
long what came by it has waited; who sends more than its part waits there, when nobody else does. Where either is long
for a while, work comes faster than it is done: then a share of the new requests is refused, of all or of those that
come by that way, which grows until the waits are short again. A single long wait is a hiccup of the machine, and
changes nothing (CoDel, RFC 8289).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from typing import Final

from uproxy.plane import Plane

TARGET_S: Final = 0.05
"""A wait above which there is too much to do. A turn in which nothing waits takes a few milliseconds."""
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
_MAX_SHARES: Final = 1024  # of ways, until those that were not looked at lately are forgotten, once in that time


class _Share:
    """Of requests that are refused, for how long they wait."""

    __slots__ = ("_late", "look_at", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.look_at = 0.0
        self._late = 0

    def look(self, now: float, waits_s: float) -> None:
        """A look that is due."""
        before, self.look_at = self.look_at, now + LOOK_S
        if waits_s <= TARGET_S:
            self._late = 0
            # A look for which no request came would not have been late, either.
            looks = 1 + (now - before) / LOOK_S
            self.value = self.value * _BACK**looks if self.value > _LEAST else 0.0
            return
        self._late += 1
        if self._late >= LATE:
            self.value = min(MOST, self.value + (1 - self.value) * _STEP)

    @property
    def calm(self) -> bool:
        """Whether a new one would do."""
        return not (self.value or self._late)


class Overload:
    """Asked once for each request."""

    __slots__ = (
        "_all",
        "_asked",
        "_chance",
        "_clock",
        "_each",
        "_forget_at",
        "_plane",
        "_told_at",
        "_waited_s",
        "refused",
    )

    def __init__(self, data_plane: Plane, clock: Callable[[], float], chance: random.Random) -> None:
        """`clock`: monotonic seconds."""
        self.refused = 0
        self._plane = data_plane
        self._clock = clock
        self._chance = chance
        self._all = _Share()
        self._each: dict[Hashable, _Share] = {}
        """Of the ways that were late."""
        self._forget_at = 0.0
        self._asked = 0.0  # when what tells began to wait; 0: nothing does
        self._waited_s = 0.0  # by the last one
        self._told_at = 0.0  # when that one had its turn

    def sheds(self, now: float, under_way: int, *ways: tuple[Hashable, float | None]) -> bool:
        """Whether a request that comes now is refused.

        `under_way`: how many there are, with this one. `ways`: by which it comes, and how long it has waited there;
        None: it came long ago and waited for something else, so that nothing can be told of now.
        """
        if now >= self._all.look_at:
            self._all.look(now, self._wait_of_all(now))
        share = self.share
        for way, waited_s in ways:
            if waited_s is None:
                share = max(share, self._share_now(way, now))
            elif waited_s > TARGET_S or self._each:
                share = max(share, self._share(way, now, waited_s))
        if (share and self._chance.random() < share) or under_way > MAX_UNDER_WAY:
            self.refused += 1
            return True
        return False

    @property
    def share(self) -> float:
        """Of all new requests that are refused, by whatever way they come."""
        return self._all.value

    def forget(self, way: Hashable) -> None:
        """Nothing comes by it any more."""
        self._each.pop(way, None)

    def _share_now(self, way: Hashable, now: float) -> float:
        """As of its last look, if that tells anything."""
        own = self._each.get(way)
        return own.value if own is not None and now - own.look_at < _TELLS_S else 0.0

    def _share(self, way: Hashable, now: float, waited_s: float) -> float:
        own = self._each.get(way)
        if own is None:
            if waited_s <= TARGET_S:
                return 0.0
            if len(self._each) >= _MAX_SHARES and now >= self._forget_at:
                self._forget_at = now + _TELLS_S
                self._each = {its: one for its, one in self._each.items() if now - one.look_at < _TELLS_S}
            own = self._each[way] = _Share()
        if now >= own.look_at:
            own.look(now, waited_s)
            if own.calm:
                del self._each[way]
        return own.value

    def _wait_of_all(self, now: float) -> float:
        told_s = self._waited_s if now - self._told_at <= _TELLS_S else 0.0
        waits_s = max(told_s, now - self._asked if self._asked else 0.0)
        if not self._asked and self._plane.busy:
            self._asked, self._waited_s = now, 0.0
            self._plane.queue(self._has_its_turn)
        return waits_s

    def _has_its_turn(self) -> None:
        """What was queued is called in the order of its coming: this one has waited as long as any does."""
        self._told_at = self._clock()
        self._waited_s, self._asked = self._told_at - self._asked, 0.0
