"""What a waypoint costs: ours against Envoy in the same place, between the same uProxies, for the same requests.

Eight callers and one called workload (between/). Requests with bodies of 1 KB over HTTP/1.1, HTTP/2 and gRPC, to
services with 1, 10 and 1,000 routes: as fast as they go, and then at shares of what the slowest was seen to carry.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks import load
from benchmarks.harness.bench import Bench, BenchError, EndedError, Probe, Sample
from benchmarks.harness.results import LEAST_ROUNDS, Check, Measure, Results, Round, Series
from benchmarks.harness.rounds import judge
from benchmarks.harness.usage import Meter
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Lab
from benchmarks.load import Load, LoadError, Protocol
from benchmarks.load.together import end_all, run_together, start_together
from benchmarks.suites.between import mesh
from benchmarks.suites.between.standing import LOAD_CORE, PROXY_CORE, Between, stand
from benchmarks.suites.placements.memory import resident_mb

NAME: Final = "waypoint"
BODY: Final = 1024
SHARES: Final = (10, 50, 80)
"""Percent of the knee."""
_USUAL_ROUTES: Final = 10
_NAMES: Final[dict[Protocol, str]] = {"http1": "HTTP/1.1", "http2": "HTTP/2", "grpc": "gRPC"}
_POLL_S: Final = 0.05
_PROOF_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    callers: Sequence[int]
    """Connections of each, and so streams of each one's tunnel."""
    protocols: Sequence[Protocol]
    routes: Sequence[int]
    shares: Sequence[int]
    rounds: int
    corner_rounds: int
    """With other counts of routes than the usual one."""
    seconds: float
    idle: int
    """Connections of all callers together; 0: memory is not measured."""


_CALLERS: Final = (1, 2, 3, 4, 1, 2, 3, 4)
QUICK: Final = Plan(
    _CALLERS, protocols=("http1",), routes=(10,), shares=(50,), rounds=3, corner_rounds=3, seconds=0.8, idle=0
)
FULL: Final = Plan(
    _CALLERS, tuple(_NAMES), mesh.ROUTES, SHARES, rounds=5, corner_rounds=LEAST_ROUNDS, seconds=0.8, idle=10_000
)


class Waypoint:
    """The suite. `plan` replaces what is measured, for tests."""

    name = NAME
    title = "The waypoint, against Envoy as one"

    def __init__(self, plan: Plan | None = None) -> None:
        self._plan = plan

    def run(self, bench: Bench) -> None:
        """Raises BenchError when nothing can be measured."""
        plan = self._plan or (QUICK if bench.quick else FULL)
        try:
            program = load.build(bench.directory)
            with Lab() as lab:
                _measure(bench, plan, stand(lab, len(plan.callers), program, bench.progress), program)
        except (LabError, LoadError, OSError, subprocess.SubprocessError) as error:
            raise BenchError(f"{NAME}: {error}") from error


SUITE: Final = Waypoint()


def _measure(bench: Bench, plan: Plan, everybody: Sequence[Between], program: Path) -> None:
    _say_conditions(bench, plan)
    _prove(bench, everybody, program)
    if plan.idle:
        fresh = {one.subject.name: _resident(one) for one in everybody}
        probes = [_memory(), _idle(plan.idle, program, fresh)]
        bench.interleave(probes, everybody, rounds=LEAST_ROUNDS, seconds=plan.seconds)
    for protocol in plan.protocols:
        for routes in plan.routes:
            saturated = _saturated(plan, program, protocol, routes)
            rounds = plan.rounds if routes == _USUAL_ROUTES else plan.corner_rounds
            bench.interleave([saturated], everybody, rounds=rounds, seconds=plan.seconds)
            knee = _knee(bench.results, saturated.measure.name)
            shares = plan.shares if knee else ()  # who carries nothing was said to
            probes = [_offered(plan, program, protocol, routes, share, knee) for share in shares]
            bench.interleave(probes, everybody, rounds=rounds, seconds=plan.seconds)
            for probe in (saturated, *probes):
                add_own(bench.results, probe.measure)


def _prove(bench: Bench, everybody: Sequence[Between], program: Path) -> None:
    """Each lets requests through, and refuses what policy denies."""
    for one in everybody:
        for path, told in ((mesh.path(1), ""), (mesh.DENIED, "status 403")):
            asked = load.http_closed(1, path, mesh.host("http1", 1), "http1", BODY)
            caller = one.callers[0]
            spawn = partial(one.start, caller)
            try:
                load.run(spawn, program, asked, *one.entry("http1", 1), _PROOF_S)
                found = ""
            except LoadError as error:
                found = str(error)
            if not found.endswith(told) or bool(found) != bool(told):
                raise BenchError(f"{one.subject.name}: {path}: {found or 'answered with 200'}")
    text = "each answers a request that has a route, and one for a denied path with 403"
    bench.check(Check(f"{NAME}: routes and policy", True, text))


def _saturated(plan: Plan, program: Path, protocol: Protocol, routes: int) -> Probe[Between]:
    measure = Measure(
        f"{NAME}/{protocol}/{routes}/saturated",
        NAME,
        f"{_NAMES[protocol]}: requests as fast as they go",
        _routes(routes),
        "1/s",
        "more",
        {"routes": routes},
    )
    asked = [
        load.http_closed(connections, mesh.path(routes), mesh.host(protocol, routes), protocol, BODY)
        for connections in plan.callers
    ]
    return Probe(measure, partial(_take, program, protocol, routes, asked, "per_second"))


def _offered(plan: Plan, program: Path, protocol: Protocol, routes: int, share: int, knee: float) -> Probe[Between]:
    rate = knee * share / 100
    measure = Measure(
        f"{NAME}/{protocol}/{routes}/{share}",
        NAME,
        f"{_NAMES[protocol]}, {_routes(routes)}: requests at a fixed rate",
        f"p99 at {share} % of the knee",
        "us",
        parameters={"rate": round(rate)},
    )
    asked = [
        load.http_open(
            connections,
            mesh.path(routes),
            mesh.host(protocol, routes),
            rate * connections / sum(plan.callers),
            protocol,
            BODY,
            seed=caller,
        )
        for caller, connections in enumerate(plan.callers)
    ]
    return Probe(measure, partial(_take, program, protocol, routes, asked, "p99_us"))


def _take(
    program: Path,
    protocol: Protocol,
    routes: int,
    asked: Sequence[Load],
    key: str,
    between: Between,
    seconds: float,
    number: int,
) -> Sample:
    """All callers at once, with other arrivals in each round."""
    entry = between.entry(protocol, routes)
    callers = {
        caller.name: partial(
            between.start,
            caller,
            load.argv(program, one.seeded(number * len(asked) + place), *entry, seconds, waits=True),
        )
        for place, (caller, one) in enumerate(zip(between.callers, asked, strict=True))
    }
    with Meter({"application": between.application}) as meter:
        found = run_together(between.subject.name, callers, seconds)
        busy_ns = meter.used(found.counted).processor_ns["application"]
    return found.sample(key, busy_ns)


def _knee(results: Results, measure: str) -> float:
    """Requests a second of the slowest; 0 where nobody carried anything."""
    carried = [
        median(one.value for one in series.rounds)
        for series in results.series
        if series.measure == measure and series.rounds
    ]
    return min(carried, default=0.0)


def add_own(results: Results, of: Measure) -> None:
    """The waypoint's own processor time in the rounds of a measure, as a measure of its own."""
    measure = replace(
        of,
        name=of.name.replace(f"{NAME}/", f"{NAME}/cpu/", 1),
        group=f"{of.group}: the waypoint's processor time",
        label=of.label.removeprefix("p99 "),
        unit="us",
        better="less",
    )
    results.measures.append(measure)
    for series in [one for one in results.series if one.measure == of.name]:
        own = Series(measure.name, series.subject, [_own(one) for one in series.rounds], series.refused, series.failed)
        results.series.append(own)
        if series.rounds:
            judge(own, reference=False)


def _own(one: Round) -> Round:
    return Round(
        one.number, one.details["cpu_us/waypoint"], {"operations": one.details["operations"]}, {}, one.bottleneck
    )


# -- memory


def _memory() -> Probe[Between]:
    routes = len(mesh.PORTS) * sum(mesh.ROUTES)
    measure = Measure(
        f"{NAME}/memory", NAME, "Memory of the waypoint", f"with {routes:,} routes, after its start", "MB"
    )

    def take(between: Between, seconds: float, number: int) -> Sample:
        del seconds, number  # it takes as long as it takes
        return Sample(_resident(between), 0)

    return Probe(measure, take)


def _idle(count: int, program: Path, fresh: Mapping[str, float]) -> Probe[Between]:
    """`fresh`: before any load, by subject: what earlier rounds leave behind is counted too."""
    measure = Measure(
        f"{NAME}/idle",
        NAME,
        "Memory of the waypoint while connections are idle",
        f"with {count:,} of them",
        "MB",
        parameters={"connections": count},
    )
    routes = max(mesh.ROUTES)

    def take(between: Between, seconds: float, number: int) -> Sample:
        del number  # nothing arrives
        asked = load.http_idle(count // len(between.callers), mesh.path(routes), mesh.host("http1", routes), BODY)
        argv = load.argv(program, asked, *between.entry("http1", routes), seconds, waits=True)
        holding = [between.start(caller, argv) for caller in between.callers]
        read: list[tuple[int, float]] = []
        outcomes = []
        try:
            start_together(between.subject.name, holding)
            while any(one.poll() is None for one in holding):
                read.append((time.monotonic_ns(), _resident(between)))
                time.sleep(_POLL_S)
            for one in holding:
                told, failed = one.communicate()
                if one.returncode:
                    between.processes()  # whoever has ended says so
                    raise BenchError(f"{between.subject.name}: {failed.decode().strip()}")
                outcomes.append(load.parse(told.decode()))
        finally:
            end_all(holding)
        begin, end = max(one.start_ns for one in outcomes), min(one.end_ns for one in outcomes)
        held = [mb for at, mb in read if begin <= at <= end]
        if not held:
            raise BenchError(f"{between.subject.name}: its callers were never idle together within {seconds:g} s")
        before, during = fresh[between.subject.name], median(held)
        return Sample(during, 0, {"before_mb": before, "each_kb": (during - before) * 1000 / count})

    return Probe(measure, take)


def _resident(between: Between) -> float:
    try:
        return resident_mb([between.waypoint])
    except ProcessLookupError as error:
        raise EndedError(f"{between.subject.name}: process {error} is gone") from error


def _routes(count: int) -> str:
    return f"{count:,} route{'' if count == 1 else 's'}"


def _say_conditions(bench: Bench, plan: Plan) -> None:
    callers = ", ".join(map(str, plan.callers))
    bench.condition(
        NAME,
        f"{len(plan.callers)} callers with {callers} connections, a stream each, one request at a time on each; POSTs "
        f"or unary calls of {BODY} B, answered with as many. Every proxy, waypoint or uProxy, on core {PROXY_CORE}; "
        f"the generators and the application on core {LOAD_CORE}. The waypoints refuse a path by policy, and write no "
        "access log. Fixed rates are shares of what the slowest of the three carried, with Poisson arrivals; latency "
        "counts from the intended time. Processor time (CPU) is of all proxies on the way, the waypoint's own beside",
    )
