"""Where should an L7 proxy live: beside every workload, once per node, once per service account, or far away?

The same application, routes, policy and identities stand behind every placement (placements/), all at once: with Envoy
as the proxy, and in full runs with our waypoint, which a Gateway's annotation places. All callers together ask at a
fixed rate that every placement sustains; the answers are processor time and memory of all proxies, latency, and how
many private keys one process holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks import load
from benchmarks.harness.bench import Bench, BenchError, Probe, Sample
from benchmarks.harness.results import Check, Measure, Results, Round, Series
from benchmarks.harness.rounds import judge
from benchmarks.harness.statistics import LEAST_ROUNDS
from benchmarks.harness.usage import Meter
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Lab
from benchmarks.load import LoadError
from benchmarks.load.together import Started, run_together
from benchmarks.suites.placements.application import INSTANCES, SERVICES
from benchmarks.suites.placements.memory import resident_mb
from benchmarks.suites.placements.placement import LOAD_CORE, PLAIN, PROXY_CORE, Placement
from benchmarks.suites.placements.proof import prove
from benchmarks.suites.placements.standing import Site, stand

NAME: Final = "architectures"
CONNECTIONS = 4
"""Of each caller."""
WORKLOADS = 2 * len(SERVICES) * INSTANCES
CPU_RATE = 500
"""Requests a second of all callers, at which processor time is taken."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    rates: Sequence[int]
    rounds: int
    seconds: float
    ours: bool = True
    """Our waypoints, too."""


QUICK = Plan(rates=(CPU_RATE,), rounds=5, seconds=1.3, ours=False)
FULL = Plan(rates=(250, CPU_RATE, 1000), rounds=9, seconds=2.5)


class Architectures:
    """The suite."""

    name = NAME
    title = "Where the L7 proxy lives"

    def run(self, bench: Bench) -> None:
        """Raises BenchError when nothing can be measured."""
        plan = QUICK if bench.quick else FULL
        try:
            program = load.build(bench.directory)
            with Lab() as lab:
                site = stand(lab, bench.progress, ours=plan.ours)
                _prove(bench, site)
                _say_conditions(bench)
                _measure(bench, site, program, plan)
        except (LabError, LoadError) as error:
            raise BenchError(f"{NAME}: {error}") from error


def _prove(bench: Bench, site: Site) -> None:
    for name in site.placements:
        try:
            prove(site, name)
        except LabError as error:
            bench.check(Check(f"{NAME}: placements", False, str(error)))
            raise
    text = (
        "with L7 each caller is routed by path, gets 403 for a denied path and from the service that is not its, and "
        "is known by its certificate; with L4 it is known, and refused by the other service"
    )
    bench.check(Check(f"{NAME}: placements", True, text))


def _measure(bench: Bench, site: Site, program: Path, plan: Plan) -> None:
    everything = list(site.placements.values())
    placements = [one for one in everything if one.mesh]
    probes = [_latency(program, rate) for rate in plan.rates]
    bench.interleave(probes, everything, rounds=plan.rounds, seconds=plan.seconds)
    for probe in probes:
        add_difference(bench.results, probe.measure.name)
    add_cpu(bench.results, [one.subject.name for one in placements])
    bench.interleave([_memory()], placements, rounds=LEAST_ROUNDS, seconds=0.0)
    bench.interleave([_identities()], placements, rounds=1, seconds=0.0)


def _latency(program: Path, rate: int) -> Probe[Placement]:
    measure = Measure(
        f"{NAME}/latency/{rate}",
        NAME,
        "Latency of a request at a fixed rate",
        f"p99 at {rate:,} requests/s",
        "us",
        parameters={"rate": rate, "connections": CONNECTIONS * len(SERVICES) * INSTANCES},
    )
    return Probe(measure, lambda placement, seconds, number: take(program, placement, rate, seconds, number))


def take(program: Path, placement: Placement, rate: int, seconds: float, number: int) -> Sample:
    """All callers at once, each with its share of the rate; in each round with other arrivals."""
    callers: dict[str, Started] = {}
    for place, caller in enumerate(placement.callers):
        service = next(one.name for one in SERVICES if one.caller == caller.member.account)
        share = rate / len(placement.callers)
        # The same schedule for every placement, and another for each caller and round.
        seed = number * len(placement.callers) + place
        asked = load.http_open(CONNECTIONS, "/", service, share, seed=seed)
        argv = load.argv(program, asked, *caller.entries[service], seconds)
        callers[caller.member.name] = partial(caller.start, argv)
    with Meter({"application": placement.applications}) as meter:
        found = run_together(placement.subject.name, callers, seconds)
        busy_ns = meter.used(found.counted).processor_ns["application"]
    return found.sample("p99_us", busy_ns)


def add_difference(results: Results, measure: str) -> None:
    """To each round's details, what it took longer than without a proxy in the same round."""
    plain = results.find(measure, PLAIN)
    without = {one.number: one.details for one in plain.rounds} if plain is not None else {}
    for series in results.series:
        if series.measure == measure and series.subject != PLAIN:
            series.rounds = [
                replace(one, details={**one.details, **_added(one.details, without[one.number])})
                if one.number in without
                else one
                for one in series.rounds
            ]


def _added(details: Mapping[str, float], without: Mapping[str, float]) -> dict[str, float]:
    return {f"added_{key}": details[key] - without[key] for key in ("p50_us", "p99_us")}


def add_cpu(results: Results, subjects: Sequence[str]) -> None:
    """The processor time of the rounds at one rate, as a measure of its own."""
    measure = Measure(
        f"{NAME}/cpu",
        NAME,
        "Processor time of all proxies",
        f"at {CPU_RATE:,} requests/s",
        "ms/1000 requests",
        parameters={"rate": CPU_RATE},
    )
    results.measures.append(measure)
    for subject in subjects:
        series = results.find(f"{NAME}/latency/{CPU_RATE}", subject)
        if series is not None:
            found = Series(
                measure.name, subject, list(map(_cpu, series.rounds)), "" if series.rounds else series.refused
            )
            judge(found, reference=False)
            results.series.append(found)


def _cpu(one: Round) -> Round:
    """A request that was sent late costs the proxies what any other does, unless all were late for want of answers."""
    bottleneck = one.bottleneck if one.details["behind_share"] >= load.BEHIND_SHARE else ""
    by_role = {key: value for key, value in one.details.items() if key.startswith("cpu_us/")}
    # Microseconds per request are milliseconds per thousand.
    return replace(one, value=one.details["cpu_us"], details=by_role, histogram={}, bottleneck=bottleneck)


def _memory() -> Probe[Placement]:
    measure = Measure(
        f"{NAME}/memory", NAME, "Memory of all proxies", f"for {WORKLOADS} workloads on two hosts, after the load", "MB"
    )
    return Probe(measure, _remember)


def _remember(placement: Placement, seconds: float, number: int) -> Sample:
    del seconds, number  # it takes as long as it takes
    by_host: dict[str, list[int]] = {}
    for one in placement.mesh:
        by_host.setdefault(one.host, []).append(one.pid)
    try:
        found = {host: resident_mb(pids) for host, pids in by_host.items()}
    except ProcessLookupError as error:
        raise BenchError(f"{placement.subject.name}: process {error} is gone") from error
    total = sum(found.values())
    details = {f"host_{host}_mb": mb for host, mb in found.items()}
    return Sample(total, 0, {"per_workload_mb": total / WORKLOADS, **details})


def _identities() -> Probe[Placement]:
    measure = Measure(
        f"{NAME}/identities", NAME, "Private keys in one process", "the most that any process holds", "keys"
    )
    return Probe(measure, _count_keys)


def _count_keys(placement: Placement, seconds: float, number: int) -> Sample:
    del seconds, number
    keys = [one.private_keys() for one in placement.mesh]
    details = {
        "processes": len(keys),
        "keys": len(set().union(*keys)),
        "most_identities": max(len(set(one.values())) for one in keys),
    }
    return Sample(max(map(len, keys)), 0, details)


def _say_conditions(bench: Bench) -> None:
    for name, text in (
        (
            "placement",
            f"{WORKLOADS // 2} callers on host a, {WORKLOADS // 2} called workloads on host b, {INSTANCES} of each "
            "service account; all placements stand at once, one has load at a time",
        ),
        (
            "pinning",
            f"every proxy and node agent on core {PROXY_CORE}, nginx and the {WORKLOADS // 2} load generators on core "
            f"{LOAD_CORE}, where the generators go first (SCHED_FIFO). They are awake for up to 0.1 ms before each "
            "request, which nginx waits for: it was seen to add some 20 us to p90, alike for all",
        ),
        (
            "load",
            f"open loop with Poisson arrivals, {CONNECTIONS} connections of each caller, GET / with an answer of about "
            "100 bytes; latency counts from the intended time",
        ),
        (
            "sameness",
            "the same nginx, routes by path, a DENY of a path and an ALLOW of a caller, counters, access logs (a "
            "line per connection at every proxy, none per request), SPIFFE identities on P-256, mutual TLS 1.3, "
            "configuration of its own callers and callees only, Envoy's default windows, one worker (--concurrency 1)",
        ),
        (
            "capture",
            "callers of Envoys dial their proxy's listener: no capture, and none is charged. uProxies capture by eBPF, "
            "which runs in the caller's connect(), so that no request pays for it",
        ),
        (
            "memory",
            "distinct physical pages of each host's processes, so that the program that the Envoys of all placements "
            "share counts in full for each placement; pss_mb divides it by all of them",
        ),
    ):
        bench.condition(f"{NAME}: {name}", text)


SUITE: Final = Architectures()
