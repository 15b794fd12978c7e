"""Which endpoint of a service port the next request goes to. No I/O and no clock: `now` is monotonic seconds.

Endpoints stand in levels, the nearest first; a level gives of its requests to the next ones when fewer than 5/7 of its
endpoints are left (Envoy's priorities). Within a level the algorithm chooses among those that are not ejected. What can
be worked out beforehand is, when the configuration changes, and when an endpoint is ejected or comes back.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import accumulate
from typing import Final

from control.api.balancing import Algorithm, ConsistentHash, LoadBalancing, OutlierDetection, Warmup
from control.api.locality import BEYOND, distance
from uproxy.resolve import Hop
from waypoint.hash_ring import HashRing
from waypoint.outliers import Outliers, Record

OVERPROVISIONED: Final = 1.4
"""So much of a level may be ejected before it gives requests to others: Envoy's factor."""
_DRAWS: Final = 8
"""Until one is usable; then the next one is taken that is."""
AT_RANDOM: Final = LoadBalancing(Algorithm.RANDOM)
"""Where nothing is said."""


@dataclass(slots=True, eq=False)
class Host:
    """An endpoint, and what this process knows of it."""

    hop: Hop
    weight: int
    under_way: int = 0
    """Requests."""
    new_since: float | None = None
    """Since when it gets requests; None: for long."""
    record: Record = field(default_factory=Record)


class _Level:
    """Endpoints that are equally near."""

    __slots__ = ("_cumulative", "_eligible", "_queue", "_ring", "hosts")

    def __init__(self) -> None:
        self.hosts: list[Host] = []
        self._eligible: list[Host] = []
        self._cumulative: list[int] = []
        self._queue: list[tuple[float, int]] = []
        """Of each eligible one, by its index, when its turn comes (earliest deadline first)."""
        self._ring: HashRing[Host] | None = None

    @property
    def share(self) -> float:
        """Of its requests, how many it can take: 1 is all."""
        return min(1.0, OVERPROVISIONED * len(self._eligible) / len(self.hosts))

    def place(self, *, hashed: bool) -> None:
        """Its endpoints have changed. Before `prepare`."""
        if not hashed:
            self._ring = None
            return
        if self._ring is None:
            self._ring = HashRing()
        self._ring.set({host.hop.authority: (host, host.weight) for host in self.hosts})

    def prepare(self, said: LoadBalancing, chance: random.Random, *, ejecting: bool) -> None:
        """Its endpoints have changed, or which of them are ejected, if that counts."""
        self._eligible = [host for host in self.hosts if not (ejecting and host.record.ejected)]
        self._cumulative = list(accumulate(host.weight for host in self._eligible))
        if said.algorithm is Algorithm.ROUND_ROBIN:
            # Each begins anywhere in its first round, so that the processes of a waypoint do not go in step.
            self._queue = [(chance.random() / host.weight, index) for index, host in enumerate(self._eligible)]
            heapify(self._queue)

    def by_hash(self, where: int, usable: Callable[[Host], bool]) -> Host | None:
        assert self._ring is not None
        return self._ring.find(where, usable)

    def in_turn(self, usable: Callable[[Host], bool], share: Callable[[Host], float]) -> Host | None:
        """The one whose turn it is; those that are not usable miss theirs."""
        passed: list[tuple[float, int]] = []
        found: Host | None = None
        while self._queue and found is None:
            due, index = heappop(self._queue)
            host = self._eligible[index]
            passed.append((due + 1 / (host.weight * share(host)), index))
            if usable(host):
                found = host
        for one in passed:
            heappush(self._queue, one)
        return found

    def at_random(
        self, usable: Callable[[Host], bool], share: Callable[[Host], float], chance: random.Random
    ) -> Host | None:
        """By weight."""
        eligible, cumulative = self._eligible, self._cumulative
        if not eligible:
            return None
        index = 0
        for _ in range(_DRAWS):
            index = bisect_right(cumulative, chance.random() * cumulative[-1])
            host = eligible[index]
            if usable(host) and (host.new_since is None or chance.random() < share(host)):
                return host
        for step in range(len(eligible)):
            host = eligible[(index + step) % len(eligible)]
            if usable(host):
                return host
        return None

    def least_busy(
        self, usable: Callable[[Host], bool], share: Callable[[Host], float], chance: random.Random
    ) -> Host | None:
        """Of two that are drawn, the first, unless the other one has fewer requests under way, even with this one."""
        one = self.at_random(usable, share, chance)
        if one is None or not one.under_way:
            return one
        other = self.at_random(lambda host: host is not one and usable(host), share, chance)
        if other is None:
            return one
        here, there = one.weight * share(one), other.weight * share(other)
        return other if (other.under_way + 1) * here <= one.under_way * there else one


class Balancer:
    """The endpoints of one service port."""

    def __init__(self, chance: random.Random, on_ejected: Callable[[Hop, str], None]) -> None:
        """`on_ejected` is told why."""
        self._random = chance
        self._on_ejected = on_ejected
        self._said = AT_RANDOM
        self._detection: OutlierDetection | None = None
        self._own = ""
        self._hosts: dict[bytes, Host] = {}
        self._by_rank: dict[int, _Level] = {}
        self._levels: list[_Level] = []
        self._loads: list[float] = []
        """Shares of the requests, of the levels in order, added up."""
        self._outliers: Outliers | None = None
        self._ejecting = False
        """Whether ejections count."""

    @property
    def hash(self) -> ConsistentHash | None:
        return self._said.hash

    def ejected(self, now: float) -> list[Host]:
        """Those that are left alone."""
        return [host for host in self._hosts.values() if host.record.ejected and host.record.until > now]

    def configure(
        self,
        said: LoadBalancing | None,
        detection: OutlierDetection | None,
        own: str,
        endpoints: Iterable[tuple[Hop, int]],
        now: float,
    ) -> None:
        """What holds from now on: endpoints with their weights, and `own`, the waypoint's locality if it is known.

        What is known of those that stay is kept.
        """
        first = not self._hosts
        before, self._hosts = self._hosts, {}
        self._said = said if said is not None else AT_RANDOM
        self._own = own
        for hop, weight in endpoints:
            host = before.get(hop.authority)
            if host is None or host.hop.expected != hop.expected:
                host = Host(hop, weight, new_since=None if first else now)
            else:
                del before[hop.authority]
            host.hop, host.weight = hop, weight
            self._hosts[hop.authority] = host
        if detection != self._detection:
            self._detection = detection
            self._outliers = Outliers(detection) if detection is not None else None
            for host in self._hosts.values():
                host.record = Record()
        if self._outliers is not None:
            self._outliers.total = len(self._hosts)
            self._outliers.drop(host.record for host in before.values())
        self._rank()
        self._prepare()

    def _rank(self) -> None:
        """Put the endpoints into levels."""
        for level in self._by_rank.values():
            level.hosts = []
        for host in self._hosts.values():
            locality = host.hop.workload.locality if host.hop.workload is not None else ""
            self._by_rank.setdefault(rank_of(self._said, self._own, locality), _Level()).hosts.append(host)
        self._by_rank = {rank: self._by_rank[rank] for rank in sorted(self._by_rank) if self._by_rank[rank].hosts}
        self._levels = list(self._by_rank.values())
        for level in self._levels:
            level.place(hashed=self._said.hash is not None)

    def _prepare(self) -> None:
        """The endpoints have changed, or which of them are ejected."""
        self._ejecting = self._outliers is not None and not self._outliers.suspended
        for level in self._levels:
            level.prepare(self._said, self._random, ejecting=self._ejecting)
        whole = min(1.0, sum(level.share for level in self._levels)) or 1.0
        self._loads = list(accumulate(level.share / whole for level in self._levels))

    # -- for requests

    def choose(
        self, where: int | None, tried: Collection[Host], is_bad: Callable[[Hop], bool] | None, now: float
    ) -> Host | None:
        """Where a request goes; None when every endpoint is ejected.

        `where`: 64 bits, for a consistent hash; None: it has none. Those that it has `tried`, and those that are bad,
        come last; `is_bad` is None as long as none is.
        """
        if self._outliers is not None and now >= self._outliers.next_return:
            self._outliers.take_back(now)
            self._prepare()

        def untried_and_good(host: Host) -> bool:
            return host not in tried and (is_bad is None or not is_bad(host.hop))

        found = self._find(where, untried_and_good, now)
        if found is None and is_bad is not None:
            found = self._find(where, lambda host: host not in tried, now)
        return found if found is not None or not tried else self._find(where, lambda host: True, now)

    def _find(self, where: int | None, usable: Callable[[Host], bool], now: float) -> Host | None:
        levels = self._levels
        if len(levels) > 1:
            # By other bits than those that say where on the ring.
            drawn = self._random.random() if where is None else (where & 0xFFFF) / 0x10000
            first = min(bisect_right(self._loads, drawn), len(levels) - 1)
            levels = [levels[first], *levels[:first], *levels[first + 1 :]]
        for level in levels:
            host = self._find_in(level, where, usable, now)
            if host is not None:
                return host
        return None

    def _find_in(self, level: _Level, where: int | None, usable: Callable[[Host], bool], now: float) -> Host | None:
        if where is not None:
            return level.by_hash(where, lambda host: usable(host) and not (self._ejecting and host.record.ejected))
        warmup = self._said.warmup
        share = _whole if warmup is None else lambda host: _share(warmup, host, now)
        match self._said.algorithm:
            case Algorithm.ROUND_ROBIN:
                return level.in_turn(usable, share)
            case Algorithm.LEAST_REQUEST:
                return level.least_busy(usable, share, self._random)
        return level.at_random(usable, share, self._random)

    def answered(self, host: Host, status: int, now: float) -> None:
        """An endpoint has answered."""
        if self._outliers is not None:
            self._judged(host, self._outliers.answered(host.record, status, now))

    def unanswered(self, host: Host, *, late: bool, now: float) -> None:
        """It was not reached, has broken off, or (`late`) took too long."""
        if self._outliers is not None:
            self._judged(host, self._outliers.unanswered(host.record, late=late, now=now))

    def _judged(self, host: Host, why: str) -> None:
        if why:
            self._prepare()
            self._on_ejected(host.hop, why)


def rank_of(said: LoadBalancing, own: str, locality: str) -> int:
    """Of endpoints at a locality, for a waypoint at `own`: those of the lowest come first."""
    if not (said.local and own):
        return 0
    found = distance(own, locality)
    if found == BEYOND:
        to = next((one.to for one in said.failover if one.origin == _region(own)), "")
        if to and _region(locality) != to:
            return BEYOND + 1
    return found


def _region(locality: str) -> str:
    return locality.partition("/")[0]


def _whole(host: Host) -> float:
    return 1.0


def _share(warmup: Warmup, host: Host, now: float) -> float:
    """How much of its share a new endpoint gets: Envoy's slow start."""
    if host.new_since is None:
        return 1.0
    passed = (now - host.new_since) * 1000 / warmup.duration_ms
    if passed >= 1:
        host.new_since = None
        return 1.0
    return max(warmup.minimum_percent / 100, float(passed ** (100 / warmup.aggression)))
