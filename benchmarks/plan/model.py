"""From the rounds of the suite `architectures` and a mesh's traffic to what each placement would take of it.

Processor time   a call takes what a request took in the run; where uProxies are, a call that needs no L7 takes what it
                 took without a waypoint. It is linear in calls: no more is known of how load changes the time of one.
Memory           the first process of a kind on a node brings its program's pages, further ones share them: two numbers
                 for each kind, fitted to all hosts of the run that have processes of it.
Cost             cores, and memory at so many GB for a core's price. Two placements are compared round by round, as
                 everywhere in the harness; the interval also covers the other rates of the run, and how far the fit of
                 memory is off in the run itself.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from benchmarks.harness.results import Results, Round
from benchmarks.harness.statistics import LEAST_ROUNDS, Interval, for_any_run, interval
from benchmarks.plan.topology import Instance, PlanError, Workload
from benchmarks.plan.traffic import Traffic
from benchmarks.suites.placements.application import INSTANCES, SERVICES

SUITE: Final = "architectures"
L4: Final = "remote-l4"
"""The subject without a waypoint: what a call takes of two uProxies that needs no L7."""
CORE_GB: Final = 8.0
"""GB of memory that cost as much as a core. Providers who charge for both ask 7 to 9 times as much for a core as
for a GB: AWS Fargate 0.0405 and 0.0044 $ an hour, Google's E2 machines 0.0218 and 0.0029 $ (list prices)."""
_BUSY: Final = 0.5
"""Of its core, how much of a remote waypoint's process is planned to be used."""
_PER_HOST: Final = INSTANCES * len(SERVICES)
"""Workloads on each host of the run; callers on one, called ones on the other."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What the mesh asks of a placement."""

    per_second: float
    l7_share: float
    """Of all calls: to services whose policy or routes are about requests."""
    instances: Mapping[str, int]
    """By node."""
    accounts: Mapping[str, int]
    """Different service accounts, by node."""
    called: Mapping[str, int]
    """Instances of workloads behind services that need L7, by node."""
    called_accounts: Mapping[str, int]
    l7_per_second: Mapping[str, float]
    """Calls that need L7, by the service's namespace: each has a waypoint of its own, as Istio's have."""


def demand(traffic: Traffic, instances: Sequence[Instance], l7: Collection[str] | None) -> Demand:
    """`l7`: the services that need L7, as NAMESPACE/NAME; None: all. Raises PlanError."""
    services = {one.service for one in traffic.calls}
    unknown = sorted(set(l7 or ()) - services)
    if unknown:
        raise PlanError(f"nobody calls {unknown[0]}: services that are called are {', '.join(sorted(services)[:9])}")
    needing = [one for one in traffic.calls if l7 is None or one.service in l7]
    behind = {one.destination for one in needing}
    by_namespace: dict[str, float] = defaultdict(float)
    for one in needing:
        by_namespace[one.service.partition("/")[0]] += one.per_second
    called = [one for one in instances if one.workload in behind]
    return Demand(
        traffic.per_second,
        sum(one.per_second for one in needing) / traffic.per_second,
        dict(Counter(one.node for one in instances)),
        _accounts(instances),
        dict(Counter(one.node for one in called)),
        _accounts(called),
        dict(by_namespace),
    )


def _accounts(instances: Sequence[Instance]) -> Mapping[str, int]:
    # Accounts of two namespaces that are called alike are two.
    return dict(Counter(node for node, *_ in {(one.node, one.workload.namespace, one.account) for one in instances}))


def workloads(traffic: Traffic) -> list[Workload]:
    return sorted({end for one in traffic.calls for end in (one.source, one.destination)})


@dataclass(frozen=True, slots=True)
class Line:
    """Memory of the processes of one kind on a node: `first` for one, `further` for each more, in MB."""

    first: float
    further: float
    error: float
    """How far it is off at the worst where it was measured, as a share of what was."""

    def of(self, count: int) -> float:
        return self.first + (count - 1) * self.further if count else 0.0


def fit(points: Sequence[tuple[int, float]]) -> Line:
    """A line through (processes, MB), by least squares; of one count alone, every process takes the same."""
    counts = {count for count, _ in points}
    if len(counts) == 1:
        each = median(mb / count for count, mb in points)
        return Line(each, each, max(abs(mb / count / each - 1) for count, mb in points))
    middle_x, middle_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    squares = sum((x - middle_x) ** 2 for x, _ in points)
    slope = sum((x - middle_x) * (y - middle_y) for x, y in points) / squares
    first = middle_y + (1 - middle_x) * slope
    return Line(first, slope, max(abs((first + (x - 1) * slope) / y - 1) for x, y in points))


@dataclass(frozen=True, slots=True)
class Kind:
    """A placement that a run may have measured."""

    subject: str
    label: str
    beside: Callable[[Demand], Mapping[str, int]] | None
    """Envoys that read all traffic: how many on each node. None: a uProxy for each instance, and waypoints."""
    waypoints: Callable[[Demand], int] = lambda demand: 0
    """How many, beyond what the load of remote ones asks for."""
    in_run: int = 0
    """How many the run had."""


KINDS: Final = (
    Kind("sidecar", "Envoy for each workload", lambda one: one.instances),
    Kind("node", "Envoy for each node", lambda one: dict.fromkeys(one.instances, 1)),
    Kind("service-account", "Envoy for each service account and node", lambda one: one.accounts),
    Kind("remote", "uProxies, remote Envoy", None, lambda one: len(one.l7_per_second), 1),
    Kind("ours", "uProxies, remote waypoint", None, lambda one: len(one.l7_per_second), 1),
    Kind("ours-node", "uProxies, waypoint for each node", None, lambda one: len(one.called), 1),
    Kind(
        "ours-service-account",
        "uProxies, waypoint for each service account and node",
        None,
        lambda one: sum(one.called_accounts.values()),
        len(SERVICES),
    ),
    Kind(
        "ours-sidecar", "uProxies, waypoint beside each workload", None, lambda one: sum(one.called.values()), _PER_HOST
    ),
)
_REMOTE: Final = ("remote", "ours")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one placement would take. `to_least`: its cost as a multiple of the cheapest one's, which has 1."""

    subject: str
    label: str
    processes: int
    cores: float
    memory_gb: float
    cost: float
    to_least: Interval


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Up to which share of calls that need L7 `around` (uProxies) costs less than `beside` (Envoys that read all)."""

    around: str
    beside: str
    share: float
    """Median of the rounds; `least` and `most` of them beside."""
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Proof:
    """What the model says of the run that it was made from, beside what the run measured."""

    what: str
    predicted: float
    measured: float
    unit: str


class Model:
    """The coefficients of a run. Raises PlanError when it lacks what is needed."""

    def __init__(self, results: Results) -> None:
        self._results = results
        reference = results.find(f"{SUITE}/cpu", L4)
        if reference is None or len(reference.rounds) < LEAST_ROUNDS:
            raise PlanError(f"the run has not measured {L4}: run meshctl bench run --suite {SUITE}")
        self._rates = self._by_rate()
        self._reference = int(next(one for one in results.measures if one.name == f"{SUITE}/cpu").parameters["rate"])
        self._memory = {
            one.subject: _by_host(one.rounds)
            for one in results.series
            if one.measure == f"{SUITE}/memory" and one.rounds
        }
        self.kinds = [one for one in KINDS if one.subject in self._at(self._reference) and one.subject in self._memory]
        if len(self.kinds) < 2:
            raise PlanError(f"the run has measured fewer than two placements: run meshctl bench run --suite {SUITE}")
        beside = [(count, mb) for one in self.kinds for count, mb in self._points(one)]
        self._envoys = fit(beside) if beside else None
        self._uproxies = fit([(_PER_HOST, mb) for mb in self._memory[L4].values()])

    def _by_rate(self) -> dict[int, dict[str, dict[int, float]]]:
        """Rate -> subject -> round -> processor time of a call, us."""
        found: dict[int, dict[str, dict[int, float]]] = {}
        for measure in self._results.measures:
            if measure.name.startswith(f"{SUITE}/latency/") and set(measure.parameters) == {"rate", "connections"}:
                found[int(measure.parameters["rate"])] = {
                    one.subject: {each.number: each.details["cpu_us"] for each in one.rounds}
                    for one in self._results.series
                    if one.measure == measure.name and all("cpu_us" in each.details for each in one.rounds)
                    if len(one.rounds) >= LEAST_ROUNDS
                }
        return found

    def _at(self, rate: int) -> Mapping[str, Mapping[int, float]]:
        return self._rates.get(rate, {})

    def _points(self, kind: Kind) -> list[tuple[int, float]]:
        """Processes and MB of each host of a placement of Envoys."""
        if kind.beside is None:
            return []
        (count,) = kind.beside(_HOST).values()
        return [(count, mb) for mb in self._memory[kind.subject].values()]

    def estimates(self, asked: Demand, core_gb: float = CORE_GB) -> list[Estimate]:
        """Every placement of the run, the cheapest first."""
        each = {one.subject: self._used(one, asked) for one in self.kinds}
        costs = {one.subject: self._costs(one, asked, each[one.subject][1], core_gb) for one in self.kinds}
        middle = {subject: median(by_rate[self._reference].values()) for subject, by_rate in costs.items()}
        least = min(middle, key=lambda subject: middle[subject])
        found = []
        for kind in self.kinds:
            processes, memory_mb = each[kind.subject]
            memory_gb = memory_mb / 1000
            own = costs[kind.subject]
            cost = middle[kind.subject]
            off = self._error(kind, memory_gb / core_gb / cost)
            found.append(
                Estimate(
                    kind.subject,
                    kind.label,
                    processes,
                    cost - memory_gb / core_gb,
                    memory_gb,
                    cost,
                    _hull(own, costs[least], self._reference, off) if kind.subject != least else Interval(1, 1, 1),
                )
            )
        return sorted(found, key=lambda one: one.cost)

    def break_even(self, asked: Demand, core_gb: float = CORE_GB) -> BreakEven | None:
        """Of the cheapest placement of each sort; None where the run has only one sort."""
        beside = [one for one in self.kinds if one.beside]
        around = [one for one in self.kinds if not one.beside]
        if not beside or not around:
            return None

        def cost(kind: Kind, share: float) -> Mapping[int, float]:
            at = _with_share(asked, share)
            return self._costs(kind, at, self._used(kind, at)[1], core_gb)[self._reference]

        other = min(beside, key=lambda one: median(cost(one, 1.0).values()))
        ours = min(around, key=lambda one: median(cost(one, 1.0).values()))
        without, whole, against = cost(ours, 0.0), cost(ours, 1.0), cost(other, 1.0)
        shares = [
            min(1.0, max(0.0, (against[number] - without[number]) / (whole[number] - without[number])))
            if whole[number] > without[number]
            else float(against[number] >= without[number])
            for number in without.keys() & whole.keys() & against.keys()
        ]
        return BreakEven(ours.subject, other.subject, median(shares), min(shares), max(shares))

    def proofs(self) -> list[Proof]:
        """The model's word on what the run has measured itself."""
        found = []
        for kind in self.kinds:
            points = self._points(kind)
            if points and self._envoys is not None:
                predicted, measured = sum(self._envoys.of(count) for count, _ in points), sum(mb for _, mb in points)
                found.append(Proof(f"memory, {kind.subject}", predicted, measured, "MB"))
        for measure in self._results.measures:
            share = measure.parameters.get("l7_share")
            if measure.suite == SUITE and share is not None and measure.unit == "ms/1000 requests":
                for kind in self.kinds:
                    series = self._results.find(measure.name, kind.subject)
                    if series is not None and series.counted:
                        found.append(
                            Proof(
                                f"processor time, {kind.subject}, {share:.0%} of the calls need L7",
                                median(self._call_us(kind, share, self._reference).values()),
                                median(one.value for one in series.counted),
                                "ms per 1,000 requests",
                            )
                        )
        return found

    def _used(self, kind: Kind, asked: Demand) -> tuple[int, float]:
        """Processes that read or carry calls, and the memory of all that is beside and between, MB."""
        if kind.beside is not None:
            assert self._envoys is not None
            counts = kind.beside(asked)
            return sum(counts.values()), sum(map(self._envoys.of, counts.values()))
        waypoints = kind.waypoints(asked) if asked.l7_share else 0
        if kind.subject in _REMOTE and waypoints:
            waypoints = sum(self._needed(kind, per_second) for per_second in asked.l7_per_second.values())
        of_one = max(0.0, sum(self._memory[kind.subject].values()) - sum(self._memory[L4].values())) / kind.in_run
        uproxies = sum(map(self._uproxies.of, asked.instances.values()))
        return sum(asked.instances.values()) + waypoints, uproxies + waypoints * of_one

    def _needed(self, kind: Kind, per_second: float) -> int:
        """Remote waypoints for so many calls."""
        series = self._results.find(f"{SUITE}/cpu", kind.subject)
        assert series is not None
        each_us = median(one.details["cpu_us/waypoint"] for one in series.rounds)
        return max(1, math.ceil(per_second * each_us / 1e6 / _BUSY))

    def _costs(self, kind: Kind, asked: Demand, memory_mb: float, core_gb: float) -> Mapping[int, Mapping[int, float]]:
        """Rate -> round -> cost in cores."""
        memory = memory_mb / 1000 / core_gb
        return {
            rate: {
                number: asked.per_second * us / 1e6 + memory
                for number, us in self._call_us(kind, asked.l7_share, rate).items()
            }
            for rate in self._rates
            if kind.subject in self._at(rate) and L4 in self._at(rate)
        }

    def _call_us(self, kind: Kind, l7_share: float, rate: int) -> Mapping[int, float]:
        """By round: a call on average, when so many need L7."""
        whole, without = self._at(rate)[kind.subject], self._at(rate)[L4]
        if kind.beside is not None:
            return whole
        return {
            number: l7_share * whole[number] + (1 - l7_share) * without[number]
            for number in sorted(whole.keys() & without.keys())
        }

    def _error(self, kind: Kind, memory_share: float) -> float:
        """What the fit of memory may move the cost by."""
        line = self._envoys if kind.beside is not None else self._uproxies
        return line.error * memory_share if line is not None else 0.0


_HOST: Final = Demand(0.0, 1.0, {"host": _PER_HOST}, {"host": len(SERVICES)}, {}, {}, {})
"""A host of the run."""


def _by_host(rounds: Sequence[Round]) -> dict[str, float]:
    """Memory of each host's processes, MB."""
    hosts = [key for key in rounds[0].details if key.startswith("host_")]
    return {host: median(one.details[host] for one in rounds) for host in hosts}


def _with_share(asked: Demand, share: float) -> Demand:
    scale = share / asked.l7_share
    by_namespace = {name: per_second * scale for name, per_second in asked.l7_per_second.items()}
    return Demand(
        asked.per_second, share, asked.instances, asked.accounts, asked.called, asked.called_accounts, by_namespace
    )


def _hull(
    own: Mapping[int, Mapping[int, float]], least: Mapping[int, Mapping[int, float]], reference: int, off: float
) -> Interval:
    """The ratio at the reference rate, with an interval that has those at every other rate in it."""
    found = {}
    for rate in own.keys() & least.keys():
        numbers = sorted(own[rate].keys() & least[rate].keys())
        if len(numbers) >= LEAST_ROUNDS:
            found[rate] = for_any_run(interval([own[rate][number] / least[rate][number] for number in numbers]))
    middle = found[reference].median
    low = math.log(middle / min(one.low for one in found.values()))
    high = math.log(max(one.high for one in found.values()) / middle)
    return Interval(middle, middle * math.exp(-math.hypot(low, off)), middle * math.exp(math.hypot(high, off)))
