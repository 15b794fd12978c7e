"""From the rounds of the suite `architectures` and a mesh's traffic to what each placement would take of it.

Processor time   a call takes what a request took in the run; one that needs no L7, or stays on its node, so much less
                 as it did there. It is linear in calls and in both shares.
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
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from benchmarks.harness.results import LEAST_ROUNDS, Results, Round
from benchmarks.harness.statistics import Interval, for_any_run, interval
from benchmarks.plan.topology import Instance, PlanError, Workload
from benchmarks.plan.traffic import Traffic
from benchmarks.suites.placements.application import INSTANCES, SERVICES

SUITE: Final = "architectures"
L4: Final = "remote-l4"
"""The subject of uProxies without a waypoint."""
_NO_L7: Final = "l7-cpu/0"
_NEAR_PERCENT: Final = 90
CORE_GB: Final = 8.0
"""GB of memory that cost as much as a core. Providers who charge for both ask 7 to 9 times as much for a core as
for a GB: AWS Fargate 0.0405 and 0.0044 $ an hour, Google's E2 machines 0.0218 and 0.0029 $ (list prices)."""
_BUSY: Final = 0.5
"""Of its core, how much of a remote waypoint's process is planned to be used."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What the mesh asks of a placement."""

    per_second: float
    l7_share: float
    """Of all calls: to services whose policy or routes are about requests."""
    near_share: float
    """Of all calls: expected to stay on their node, if every caller's go to all instances alike."""
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
        _near_share(traffic, instances),
        dict(Counter(one.node for one in instances)),
        _accounts(instances),
        dict(Counter(one.node for one in called)),
        _accounts(called),
        dict(by_namespace),
    )


def _near_share(traffic: Traffic, instances: Sequence[Instance]) -> float:
    on: dict[Workload, Counter[str]] = defaultdict(Counter)
    for one in instances:
        on[one.workload][one.node] += 1
    near = sum(
        call.per_second
        * sum(count * on[call.destination][node] for node, count in on[call.source].items())
        / (on[call.source].total() * on[call.destination].total())
        for call in traffic.calls
    )
    return near / traffic.per_second


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
        "ours-sidecar",
        "uProxies, waypoint beside each workload",
        None,
        lambda one: sum(one.called.values()),
        len(SERVICES) * INSTANCES,
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
    """Between which shares of calls that need L7 `around` (uProxies) costs less than every placement of Envoys beside
    workloads, accounts or nodes. By the medians of the rounds; `low` and `high` None: at no share."""

    around: str
    low: float | None
    high: float | None
    rounds: int
    """In how many of the rounds there is such a share."""
    of: int


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
        self._memory = {
            one.subject: _by_host(one.rounds)
            for one in results.series
            if one.measure == f"{SUITE}/memory" and one.rounds
        }
        self._rates = self._by_rate()
        reference = next((one for one in results.measures if one.name == f"{SUITE}/cpu"), None)
        self._reference = int(reference.parameters["rate"]) if reference else 0
        self.kinds = [one for one in KINDS if self._measured(one)]
        if len(self.kinds) < 2 or not self._memory.get(L4):
            raise PlanError(
                "the run has not measured at least two placements, uProxies without a waypoint, and calls that need no "
                f"L7: run meshctl bench run --suite {SUITE}"
            )
        # Beside the uProxies of a host stands its node agent.
        self._uproxies = fit([(count - 1, mb) for count, mb in self._memory[L4]])
        beside = [point for one in self.kinds if one.beside for point in self._memory[one.subject]]
        self._envoys = fit(beside) if beside else None

    def _measured(self, kind: Kind) -> bool:
        return (
            kind.subject in self._rates.get(self._reference, {})
            and bool(self._memory.get(kind.subject))
            and len(self._values(_NO_L7, kind)) >= LEAST_ROUNDS
        )

    def _by_rate(self) -> dict[int, dict[str, dict[int, float]]]:
        """Rate -> subject -> round -> processor time of a call, us."""
        found: dict[int, dict[str, dict[int, float]]] = {}
        for measure in self._results.measures:
            if measure.name.startswith(f"{SUITE}/latency/"):
                found[int(measure.parameters["rate"])] = {
                    one.subject: {each.number: each.details["cpu_us"] for each in one.rounds}
                    for one in self._results.series
                    if one.measure == measure.name and all("cpu_us" in each.details for each in one.rounds)
                    if len(one.rounds) >= LEAST_ROUNDS
                }
        return found

    def _values(self, measure: str, kind: Kind) -> list[float]:
        series = self._results.find(f"{SUITE}/{measure}", kind.subject)
        return [] if series is None else [one.value for one in series.rounds]

    def estimates(self, asked: Demand, core_gb: float = CORE_GB) -> list[Estimate]:
        """Every placement of the run, the cheapest first."""
        each = {one.subject: self._used(one, asked) for one in self.kinds}
        costs = {one.subject: self._costs(one, asked, core_gb) for one in self.kinds}
        middle = {subject: median(by_rate[self._reference].values()) for subject, by_rate in costs.items()}
        least = min(middle, key=lambda subject: middle[subject])
        found = []
        for kind in self.kinds:
            processes, memory_mb = each[kind.subject]
            memory_gb, cost = memory_mb / 1000, middle[kind.subject]
            off = self._error(kind, asked, memory_gb / core_gb / cost)
            found.append(
                Estimate(
                    kind.subject,
                    kind.label,
                    processes,
                    cost - memory_gb / core_gb,
                    memory_gb,
                    cost,
                    _hull(costs[kind.subject], costs[least], self._reference, off)
                    if kind.subject != least
                    else Interval(1, 1, 1),
                )
            )
        return sorted(found, key=lambda one: one.cost)

    def break_even(self, asked: Demand, core_gb: float = CORE_GB) -> BreakEven | None:
        """Of the cheapest placement with uProxies; None where the run has only one sort."""
        beside = [one for one in self.kinds if one.beside]
        around = [one for one in self.kinds if not one.beside]
        if not beside or not around:
            return None
        few, all_ = _with_share(asked, _FEW), _with_share(asked, 1.0)

        def ends(kind: Kind) -> tuple[Mapping[int, float], Mapping[int, float]]:
            first, last = (self._costs(kind, share, core_gb)[self._reference] for share in (few, all_))
            return first, last

        costs = {one.subject: ends(one) for one in self.kinds}
        ours = min(around, key=lambda one: median(costs[one.subject][1].values())).subject
        others = [costs[one.subject] for one in beside]
        numbers = set.intersection(*(set(one[0]) for one in (costs[ours], *others)))
        rounds = [
            _cheaper(*[(costs[ours][0][one] - a[one], costs[ours][1][one] - b[one]) for a, b in others])
            for one in numbers
        ]
        at_ends = [median(one.values()) for one in costs[ours]]
        found = _cheaper(
            *[(at_ends[0] - median(a.values()), at_ends[1] - median(b.values())) for a, b in others],
        )
        low, high = found or (None, None)
        return BreakEven(ours, low, high, sum(one is not None for one in rounds), len(rounds))

    def proofs(self) -> list[Proof]:
        """The model's word on what the run has measured itself."""
        found = []
        for kind in self.kinds:
            if kind.beside and self._envoys is not None:
                points = self._memory[kind.subject]
                predicted = sum(self._envoys.of(count) for count, _ in points)
                found.append(Proof(f"memory, {kind.subject}", predicted, sum(mb for _, mb in points), "MB"))
        for measure in self._results.measures:
            l7, near = (measure.parameters.get(name) for name in ("l7_percent", "near_percent"))
            name = measure.name.removeprefix(f"{SUITE}/")
            if name in (_NO_L7, f"near-cpu/{_NEAR_PERCENT}") or not name.startswith(("l7-cpu/", "near-cpu/")):
                continue  # what the model is made of
            for kind in self.kinds:
                values = self._values(name, kind)
                if values:
                    shares = (1.0 if l7 is None else l7 / 100, (near or 0.0) / 100)
                    what = f"{l7:g} % need L7" if l7 is not None else f"{near:g} % stay on their host"
                    predicted = median(self._call_us(kind, *shares, self._reference).values())
                    what = f"processor time, {kind.subject}, {what}"
                    found.append(Proof(what, predicted, median(values), "ms per 1,000 calls"))
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
        whole, without = (sum(mb for _, mb in self._memory[subject]) for subject in (kind.subject, L4))
        uproxies = sum(map(self._uproxies.of, asked.instances.values()))
        return (
            sum(asked.instances.values()) + waypoints,
            uproxies + waypoints * max(0.0, whole - without) / kind.in_run,
        )

    def _needed(self, kind: Kind, per_second: float) -> int:
        """Remote waypoints for so many calls."""
        series = self._results.find(f"{SUITE}/cpu", kind.subject)
        assert series is not None
        each_us = median(one.details["cpu_us/waypoint"] for one in series.rounds)
        return max(1, math.ceil(per_second * each_us / 1e6 / _BUSY))

    def _costs(self, kind: Kind, asked: Demand, core_gb: float) -> Mapping[int, Mapping[int, float]]:
        """Rate -> round -> cost in cores."""
        memory = self._used(kind, asked)[1] / 1000 / core_gb
        return {
            rate: {
                number: asked.per_second * us / 1e6 + memory
                for number, us in self._call_us(kind, asked.l7_share, asked.near_share, rate).items()
            }
            for rate, by_subject in self._rates.items()
            if kind.subject in by_subject
        }

    def _call_us(self, kind: Kind, l7_share: float, near_share: float, rate: int) -> Mapping[int, float]:
        """By round: a call on average, when so many need L7 and so many stay on their node."""
        whole = median(self._rates[self._reference][kind.subject].values())
        without = median(self._values(_NO_L7, kind)) / whole
        near = self._values(f"near-cpu/{_NEAR_PERCENT}", kind)
        saved = (1 - median(near) / whole) / (_NEAR_PERCENT / 100) if near else 0.0
        share = (l7_share + (1 - l7_share) * without) * (1 - near_share * saved)
        return {number: us * share for number, us in self._rates[rate][kind.subject].items()}

    def _error(self, kind: Kind, asked: Demand, memory_share: float) -> float:
        """What the fit of memory, and the time of a call that needs no L7, may move the cost by."""
        line = self._envoys if kind.beside is not None else self._uproxies
        assert line is not None
        without = for_any_run(interval(self._values(_NO_L7, kind)))
        reach = math.log(without.high / without.median)
        return math.hypot(line.error * memory_share, reach * (1 - asked.l7_share) * (1 - memory_share))


_FEW: Final = 1e-6
"""A share of calls that needs a waypoint and hardly any processor time of it."""


def _cheaper(*differences: tuple[float, float]) -> tuple[float, float] | None:
    """From and to which share all differences, linear in it and given at none and at all, are below 0."""
    low, high = 0.0, 1.0
    for at_none, at_all in differences:
        if at_none >= 0 and at_all >= 0:
            return None
        if at_none >= 0:
            low = max(low, at_none / (at_none - at_all))
        elif at_all >= 0:
            high = min(high, at_none / (at_none - at_all))
    return (low, high) if low < high else None


def _by_host(rounds: Sequence[Round]) -> list[tuple[int, float]]:
    """Of each host's processes: how many, and their memory in MB. Runs of older versions do not say how many."""
    hosts = [key.removesuffix("_processes") for key in rounds[0].details if key.endswith("_processes")]
    return [
        (int(rounds[0].details[f"{host}_processes"]), median(one.details[f"{host}_mb"] for one in rounds))
        for host in hosts
    ]


def _with_share(asked: Demand, share: float) -> Demand:
    scale = share / asked.l7_share
    by_namespace = {name: per_second * scale for name, per_second in asked.l7_per_second.items()}
    return replace(asked, l7_share=share, l7_per_second=by_namespace)


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
