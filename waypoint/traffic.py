"""How much is let through, and what is broken on purpose: TrafficPolicies (`control.api.traffic`). No I/O.

What was counted belongs to the policies and not to a configuration: it outlives changes of everything else.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from control.api.traffic import RateLimit, Redis, Share, TrafficPolicy
from waypoint.caller import Caller
from waypoint.request import Request

MAX_SHARES: Final = 10_000
"""Allowances of one rate limit that are counted apart. Whoever comes while all are in use has one together."""
SWEEP_S: Final = 1.0
"""How often those that are full again are looked for, at most."""

_LONGEST_NAME: Final = 64
_ROUNDING_S: Final = 1e-6
"""Less than this is no time, but what is lost in sums of times."""
_OTHERS: Final = None
"""Whose allowance those have together who have none of their own."""


class _Bucket:
    """One rate limit's token buckets, by who shares them: of each, when it is full again (the generic cell rate
    algorithm, ITU-T I.371 annex A)."""

    __slots__ = ("_burst_s", "_each_s", "_full_at", "_swept_at")

    def __init__(self, limit: RateLimit) -> None:
        self._each_s = limit.per_ms / 1000 / limit.requests
        self._burst_s = self._each_s * limit.burst
        self._full_at: dict[str | None, float] = {}
        self._swept_at = 0.0

    def wait_s(self, share: str | None, now: float) -> float:
        """How long until this share has a token; 0: it has one."""
        wait_s = max(self._full_at.get(self._place(share, now), 0.0) - now, 0.0) + self._each_s - self._burst_s
        return wait_s if wait_s > _ROUNDING_S else 0.0

    def take(self, share: str | None, now: float) -> None:
        place = self._place(share, now)
        self._full_at[place] = max(self._full_at.get(place, 0.0), now) + self._each_s

    def _place(self, share: str | None, now: float) -> str | None:
        if share in self._full_at or len(self._full_at) < MAX_SHARES:
            return share
        if now - self._swept_at >= SWEEP_S:
            self._swept_at = now
            self._full_at = {one: at for one, at in self._full_at.items() if at > now}
        return share if len(self._full_at) < MAX_SHARES else _OTHERS


@dataclass(slots=True, eq=False)
class _Count:
    """Requests of one policy that are under way."""

    now: int = 0


@dataclass(slots=True, eq=False)
class Ledger:
    """What was counted, of all policies of one process."""

    _buckets: dict[tuple[str, int, RateLimit], _Bucket] = field(default_factory=dict)
    _counts: dict[str, _Count] = field(default_factory=dict)

    def bucket(self, policy: TrafficPolicy, index: int) -> _Bucket:
        """Of a rate limit, as long as it stays what it is."""
        limit = policy.rate_limits[index]
        return self._buckets.setdefault((policy.key, index, limit), _Bucket(limit))

    def count(self, policy: TrafficPolicy) -> _Count:
        return self._counts.setdefault(policy.key, _Count())

    def forget(self, policies: Iterable[TrafficPolicy]) -> None:
        """Keep only what is of these policies."""
        kept = {(policy.key, index, limit) for policy in policies for index, limit in enumerate(policy.rate_limits)}
        keys = {policy.key for policy in policies}
        self._buckets = {its: bucket for its, bucket in self._buckets.items() if its in kept}
        self._counts = {its: count for its, count in self._counts.items() if its in keys or count.now}


@dataclass(frozen=True, slots=True)
class Excess:
    """A request that is one too many."""

    policy: str
    """Key."""
    wait_s: float
    """Until another would be let through; 0: when one of those under way ends."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What one policy's Redis is asked about one request (`global_limits`)."""

    policy: str
    """Key."""
    redis: Redis
    keys: list[bytes]
    arguments: list[bytes]


@dataclass(slots=True, eq=False)
class Place:
    """What a request that was let through takes up, until it leaves."""

    delay_ms: int
    """It is to wait for so long."""
    status: int
    """It is to be answered with it; 0: it is not."""
    _counts: tuple[_Count, ...]

    def leave(self) -> None:
        """Once."""
        for count in self._counts:
            count.now -= 1


class Traffic:
    """The policies at one destination. Never changes; what it counts is in the ledger."""

    __slots__ = ("_counted", "_everywhere", "_faults", "_limits", "_random")

    def __init__(self, policies: Sequence[TrafficPolicy], ledger: Ledger, chance: random.Random) -> None:
        """`policies`: in the order of their keys."""
        self._limits = [
            (policy.key, limit, ledger.bucket(policy, index))
            for policy in policies
            for index, limit in enumerate(policy.rate_limits)
            if not limit.everywhere
        ]
        self._everywhere = [
            (policy.key, policy.redis, [one for one in enumerate(policy.rate_limits) if one[1].everywhere])
            for policy in policies
            if policy.redis is not None
        ]
        self._counted = [
            (policy.key, policy.max_requests, ledger.count(policy)) for policy in policies if policy.max_requests
        ]
        self._faults = [fault for policy in policies for fault in policy.faults]
        self._random = chance

    def enter(self, caller: Caller, request: Request, rule: str, now: float) -> Place | Excess | None:
        """Let a request through that falls under a rule of this name, or not. None: nobody counts it.

        It takes up nothing unless all let it through. `now`: monotonic seconds.
        """
        if not (self._limits or self._counted or self._faults):
            return None
        for policy, most, count in self._counted:
            if count.now >= most:
                return Excess(policy, 0.0)
        asked = [
            (policy, bucket, _share(limit, caller, request))
            for policy, limit, bucket in self._limits
            if not limit.rules or rule in limit.rules
        ]
        for policy, bucket, share in asked:
            if wait_s := bucket.wait_s(share, now):
                return Excess(policy, wait_s)
        for _, bucket, share in asked:
            bucket.take(share, now)
        counts = tuple(count for _, _, count in self._counted)
        for count in counts:
            count.now += 1
        drawn = [fault for fault in self._faults if self._random.random() * 100 < fault.percentage]
        return Place(
            max((fault.delay_ms for fault in drawn), default=0),
            next((fault.status for fault in drawn if fault.status), 0),
            counts,
        )

    @property
    def asks(self) -> bool:
        """Whether others count, too."""
        return bool(self._everywhere)

    def questions(self, caller: Caller, request: Request, rule: str) -> list[Asked]:
        """Whom to ask about a request that `enter` has let through."""
        found = [
            _asked(
                policy,
                redis,
                [
                    (index, limit, _share(limit, caller, request))
                    for index, limit in limits
                    if not limit.rules or rule in limit.rules
                ],
            )
            for policy, redis, limits in self._everywhere
        ]
        return [one for one in found if one.keys]


def _share(limit: RateLimit, caller: Caller, request: Request) -> str | None:
    match limit.share:
        case Share.IDENTITY:
            return str(caller.identity)
        case Share.HEADER:
            value = request.header(limit.header)
            if value is not None and len(value) > _LONGEST_NAME:  # so that a caller cannot have much remembered
                return hashlib.sha256(value.encode("latin-1")).hexdigest()
            return value
    return ""


def _asked(policy: str, redis: Redis, limits: Iterable[tuple[int, RateLimit, str | None]]) -> Asked:
    """`limits`: each with its place in the policy, and whose allowance is asked for."""
    keys: list[bytes] = []
    arguments: list[bytes] = []
    for index, limit, share in limits:
        each_us = limit.per_ms * 1000 / limit.requests
        of_whom = "" if share is None else f"={share}"
        # Braces keep all of a policy in one place of a Redis Cluster. A limit that changes counts anew.
        name = f"uproxy:{{{policy}}}:{index}:{limit.requests}/{limit.per_ms}/{limit.burst}:{limit.share.value}{of_whom}"
        keys.append(name.encode("latin-1"))
        arguments += (b"%.3f" % each_us, b"%.3f" % (each_us * limit.burst))
    return Asked(policy, redis, keys, arguments)
