"""Where should an L7 proxy live: beside every workload, once per node, once per service account, or far away?

The same application, routes, policy and identities stand behind every placement (placements/), all at once: with Envoy
as the proxy, and in full runs with our waypoint, which a Gateway's annotation places. All callers together ask at a
fixed rate that every placement sustains; the answers are processor time and memory of all proxies, latency, and how
many private keys one process holds. Full runs also vary what share of the calls needs L7, what share stays on its host,
and how far hosts are apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from benchmarks import load
from benchmarks.harness.bench import Bench, BenchError, Probe, Sample
from benchmarks.harness.results import LEAST_ROUNDS, Check, Measure, Results, Round, Series
from benchmarks.harness.rounds import judge
from benchmarks.lab import cores, link
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Lab
from benchmarks.load import LoadError
from benchmarks.suites.placements import configuration, density, isolation, mix, replacing
from benchmarks.suites.placements.application import BUSY_MS, CALLERS, INSTANCES, LIMIT_PER_S, SERVICES, identity
from benchmarks.suites.placements.memory import maps_mb, resident_mb, with_children
from benchmarks.suites.placements.mesh import BESIDE
from benchmarks.suites.placements.mix import CONNECTIONS, Mix
from benchmarks.suites.placements.placement import (
    DRAIN_S,
    LOAD_CORE,
    ONE_PASS,
    PLAIN,
    PROXY_CORE,
    NodeAgent,
    Placement,
    Process,
)
from benchmarks.suites.placements.proof import prove
from benchmarks.suites.placements.standing import Site, stand

NAME: Final = "architectures"
WORKLOADS = len(SERVICES) * (2 * INSTANCES + 1)
CPU_RATE = 500
"""Requests a second of all callers, at which processor time is taken."""
L4_ONLY: Final = "remote-l4"
_ROUND_TRIP_S: Final = 0.3
_TOLERATED_SHARE, _TOLERATED_US = 0.1, 60.0
"""By how much delayed links may be off, of what a round trip takes longer."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    rates: Sequence[int]
    """CPU_RATE first."""
    rounds: int
    """Of that rate, each of more than 1,000 requests in full runs: else its p99 has no ratio."""
    seconds: float
    l7_percent: Sequence[int] = ()
    """Shares of calls that need L7, besides all of them."""
    near_percent: Sequence[int] = ()
    """Shares of calls that stay on their host, besides none."""
    rtts_ms: Sequence[float] = ()
    """Round-trip times of links between hosts, besides that of veth."""
    axis_rounds: int = LEAST_ROUNDS
    """Of the other rates, and of each point along these."""
    axis_seconds: float = 1.0
    isolation: bool = False
    """What a neighbour's misbehaviour costs."""
    services: Sequence[int] = ()
    """Of a mesh, whose configuration is looked at."""
    workloads: Sequence[int] = ()
    """Of a host, for which memory is looked at."""
    upgrades: int = 0
    """Rounds in which a process is replaced under load."""
    further: bool = True
    """Our waypoints, too, and sidecars with one pass."""


QUICK = Plan(rates=(CPU_RATE,), rounds=4, seconds=1.0, axis_seconds=0.8, l7_percent=(0,), further=False)
FULL = Plan(
    rates=(CPU_RATE, 250, 1000),
    rounds=5,
    seconds=2.3,
    axis_seconds=1.25,
    l7_percent=(0, 10, 50),
    near_percent=(50, 90),
    rtts_ms=(0.25, 1.0),
    isolation=True,
    services=configuration.SIZES,
    workloads=density.SIZES,
    upgrades=1,
)


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
                site = stand(lab, bench.progress, further=plan.further)
                _prove(bench, site)
                _say_conditions(bench)
                _measure(bench, site, program, plan)
                for rtt_ms in plan.rtts_ms:
                    try:
                        _measure_apart(bench, site, lab, program, plan, rtt_ms)
                    except BenchError as error:  # what comes after it has links of its own
                        bench.check(Check(f"{NAME}: hosts {rtt_ms:g} ms apart", False, str(error)))
                if plan.upgrades:
                    # The last, since other processes stand afterwards.
                    bench.interleave(
                        replacing.probes(NAME, program),
                        list(map(replacing.Replaceable, _with_l7(site))),
                        rounds=plan.upgrades,
                        seconds=replacing.SECONDS,
                    )
            if plan.services:
                configuration.measure(bench, NAME, plan.services)
            if plan.workloads:
                add_control(bench.results, density.measure(bench, NAME, plan.workloads))
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
    deployed = _deployed(site)
    placements = [one for one in deployed if one.mesh]
    probes = [_latency(program, rate) for rate in plan.rates]
    bench.interleave(probes[:1], list(site.placements.values()), rounds=plan.rounds, seconds=plan.seconds)
    bench.interleave(probes[1:], deployed, rounds=plan.axis_rounds, seconds=plan.axis_seconds)
    for probe in probes:
        add_difference(bench.results, probe.measure.name)
    add_cpu(bench.results, f"{NAME}/latency/{CPU_RATE}", CPU)
    with_l7 = _with_l7(site)
    _measure_axes(bench, with_l7, program, plan)
    if plan.isolation:
        *others, bad_filter = isolation.probes(NAME, program)
        bench.interleave(others, with_l7, rounds=plan.axis_rounds, seconds=isolation.SECONDS)
        able = [one for one in with_l7 if one.subject.name != BESIDE]
        bench.interleave([bad_filter], able, rounds=plan.axis_rounds, seconds=isolation.SECONDS)
    _check_core(bench, placements)
    bench.interleave([_memory()], placements, rounds=LEAST_ROUNDS, seconds=0.0)
    bench.interleave([_identities()], placements, rounds=1, seconds=0.0)


def _deployed(site: Site) -> list[Placement]:
    """All but what is there to compare equal work, at one rate."""
    return [one for one in site.placements.values() if one.subject.name != ONE_PASS]


def _with_l7(site: Site) -> list[Placement]:
    return [one for one in _deployed(site) if one.mesh and one.subject.name != L4_ONLY]


def _check_core(bench: Bench, placements: Sequence[Placement]) -> None:
    """That all processes of a placement share one CPU, and no more: filters and what uProxies start too."""
    strays = {one.subject.name: cores.strays([each.pid for each in one.mesh], PROXY_CORE) for one in placements}
    elsewhere = ", ".join(f"{name} ({len(found)})" for name, found in strays.items() if found)
    text = f"not on core {PROXY_CORE} are threads of {elsewhere}" if elsewhere else f"all threads on core {PROXY_CORE}"
    bench.check(Check(f"{NAME}: one CPU for all processes of a placement", not elsewhere, text))


def _latency(program: Path, rate: int) -> Probe[Placement]:
    measure = Measure(
        f"{NAME}/latency/{rate}",
        NAME,
        "Latency of a request at a fixed rate",
        f"p99 at {rate:,} requests/s",
        "us",
        parameters={"rate": rate, "connections": CONNECTIONS * len(SERVICES) * INSTANCES},
    )
    return _at(measure, program, Mix(rate))


def _at(measure: Measure, program: Path, asked: Mix) -> Probe[Placement]:
    return Probe(measure, lambda placement, seconds, number: mix.take(program, placement, asked, seconds, number))


def _measure_axes(bench: Bench, with_l7: Sequence[Placement], program: Path, plan: Plan) -> None:
    """What share of the calls needs L7, and what share stays on its host: latency, and processor time of the same."""
    axes = [
        (_l7_share(percent), Mix(CPU_RATE, l7=percent / 100), f"{NAME}/l7-cpu/{percent}") for percent in plan.l7_percent
    ]
    axes += [
        (_near_share(percent), Mix(CPU_RATE, near=percent / 100), f"{NAME}/near-cpu/{percent}")
        for percent in plan.near_percent
    ]
    probes = [_at(measure, program, asked) for measure, asked, _ in axes]
    bench.interleave(probes, with_l7, rounds=plan.axis_rounds, seconds=plan.axis_seconds)
    for measure, _, name in axes:
        group = f"Processor time by {measure.group[0].lower()}{measure.group[1:]}"
        cpu = replace(measure, name=name, group=group, unit=CPU.unit, label=measure.label.removeprefix("p99, "))
        add_cpu(bench.results, measure.name, cpu)


def _l7_share(percent: int) -> Measure:
    return Measure(
        f"{NAME}/l7/{percent}",
        NAME,
        "Share of calls that need L7",
        f"p99, {percent} % of {CPU_RATE} requests/s",
        "us",
        parameters={"l7_percent": percent},
    )


def _near_share(percent: int) -> Measure:
    return Measure(
        f"{NAME}/near/{percent}",
        NAME,
        "Share of calls that stay on their host",
        f"p99, {percent} % of {CPU_RATE} requests/s",
        "us",
        parameters={"near_percent": percent},
    )


def _measure_apart(bench: Bench, site: Site, lab: Lab, program: Path, plan: Plan, rtt_ms: float) -> None:
    """The same with hosts that are further apart: each host's link takes half of it, so that any two are as far."""
    line = link.build(bench.directory)
    before = _round_trip_us(site, program)
    with ExitStack() as stack:
        carried = [stack.enter_context(link.delayed(lab, host, line, rtt_ms / 4, core=LOAD_CORE)) for host in lab.hosts]
        added = _round_trip_us(site, program) - before
        measure = Measure(
            f"{NAME}/rtt/{rtt_ms:g}",
            NAME,
            "Round-trip time between hosts",
            f"p99, {rtt_ms:g} ms, {CPU_RATE} requests/s",
            "us",
            parameters={"rtt_ms": rtt_ms},
        )
        bench.interleave(
            [_at(measure, program, Mix(CPU_RATE))], _deployed(site), rounds=plan.axis_rounds, seconds=plan.axis_seconds
        )
    add_difference(bench.results, measure.name)
    lost = sum(one.lost for one in carried)
    wanted = rtt_ms * 1000
    bench.check(
        Check(
            f"{NAME}: hosts {rtt_ms:g} ms apart",
            abs(added - wanted) <= max(_TOLERATED_SHARE * wanted, _TOLERATED_US) and not lost,
            f"a request takes {added:.0f} us longer, where {wanted:.0f} us were asked for; {lost} frames were lost",
            {"added_us": added, "lost": lost},
        )
    )


def _round_trip_us(site: Site, program: Path) -> float:
    """The median of a request without a proxy."""
    return mix.take(program, site.placements[PLAIN], Mix(CPU_RATE), _ROUND_TRIP_S, 1).details["p50_us"]


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
    return {f"added_{key}": details[key] - without[key] for key in ("p50_us", "p99_us", "p999_us")}


CPU: Final = Measure(
    f"{NAME}/cpu",
    NAME,
    "Processor time of all proxies",
    f"at {CPU_RATE:,} requests/s",
    "ms/1000 requests",
    parameters={"rate": CPU_RATE},
)


def add_cpu(results: Results, of: str, measure: Measure) -> None:
    """The processor time of the rounds of a measure, as a measure of its own."""
    results.measures.append(measure)
    for series in [one for one in results.series if one.measure == of and one.subject != PLAIN]:
        found = Series(
            measure.name,
            series.subject,
            list(map(_cpu, series.rounds)),
            "" if series.rounds else series.refused,
            series.failed and not series.rounds,
        )
        judge(found, reference=False)
        results.series.append(found)


def _cpu(one: Round) -> Round:
    """A request that was sent late costs the proxies what any other does, unless all were late for want of answers."""
    bottleneck = one.bottleneck if one.details["behind_share"] >= load.BEHIND_SHARE else ""
    by_role = {key: value for key, value in one.details.items() if key.startswith("cpu_us/")}
    # Microseconds per request are milliseconds per thousand.
    return replace(one, value=one.details["cpu_us"], details=by_role, histogram={}, bottleneck=bottleneck)


def add_control(results: Results, resting_us: float) -> None:
    """To each round of processor time, what broker and control plane take of it, so many us a second, and the sum."""
    each_ms = resting_us / CPU_RATE  # us a second / requests a second are us for one, and ms for a thousand
    for series in results.series:
        if series.measure == CPU.name:
            series.rounds = [
                replace(one, details={**one.details, "control_ms": each_ms, "together_ms": one.value + each_ms})
                for one in series.rounds
            ]


def _memory() -> Probe[Placement]:
    measure = Measure(
        f"{NAME}/memory", NAME, "Memory of all proxies", f"for {WORKLOADS} workloads on two hosts, after the load", "MB"
    )
    return Probe(measure, _remember)


def _processes(one: Process) -> list[int]:
    """What a placement has of it: with what it starts, but for what the benchmark's bad filter starts at a waypoint."""
    return [one.pid] if one.role == "waypoint" else with_children(one.pid)


def _remember(placement: Placement, seconds: float, number: int) -> Sample:
    del seconds, number  # it takes as long as it takes
    by_host: dict[str, list[int]] = {}
    for one in placement.mesh:
        by_host.setdefault(one.host, []).extend(_processes(one))
    try:
        found = {host: resident_mb(pids) for host, pids in by_host.items()}
    except ProcessLookupError as error:
        raise BenchError(f"{placement.subject.name}: process {error} is gone") from error
    maps = {one.host: maps_mb(one.pins) for one in placement.mesh if isinstance(one, NodeAgent)}
    found = {host: mb + maps.get(host, 0.0) for host, mb in found.items()}
    total = sum(found.values())
    details = {f"host_{host}_mb": mb for host, mb in found.items()}
    details |= {f"host_{host}_processes": float(len(pids)) for host, pids in by_host.items()}
    return Sample(total, 0, {"per_workload_mb": total / WORKLOADS, "maps_mb": sum(maps.values()), **details})


def _identities() -> Probe[Placement]:
    measure = Measure(
        f"{NAME}/identities", NAME, "Private keys in one process", "the most that any process holds", "keys"
    )
    return Probe(measure, _count_keys)


def _workloads(spiffe_id: str) -> int:
    """How many there are with this identity: whoever has its key can say to be any of them."""
    near = 1 if spiffe_id in {str(identity(account)) for account in CALLERS} else 0
    accounts = {str(identity(one)) for service in SERVICES for one in (service.name, service.caller)}
    return INSTANCES + near if spiffe_id in accounts else 0


def _count_keys(placement: Placement, seconds: float, number: int) -> Sample:
    del seconds, number
    keys = [one.private_keys() for one in placement.mesh]
    details = {
        "processes": sum(len(_processes(one)) for one in placement.mesh),
        "keys": len(set().union(*keys)),
        "most_identities": max(len(set(one.values())) for one in keys),
        "could_pass_for": max(sum(map(_workloads, set(one.values()))) for one in keys),
        "believed_by": max(one.believed_by for one in placement.mesh),
    }
    return Sample(max(map(len, keys)), 0, details)


def _say_conditions(bench: Bench) -> None:
    for name, text in (
        (
            "placement",
            f"{INSTANCES} callers of each of {len(SERVICES)} service accounts on host a; on host b {INSTANCES} called "
            "workloads of each of as many, and another caller of each, which asks where calls are to stay on their "
            "host; all placements stand at once, one has load at a time. The application has two tiers: callers are "
            "load generators, called services are nginx. The Envoys of all placements are configured by the "
            "benchmark itself, not by the annotation `engine: envoy`",
        ),
        (
            "pinning",
            f"every proxy, node agent and filter on core {PROXY_CORE}, so that all processes of a placement share one "
            "CPU between them and no placement has more, as by a quota of one CPU, without its throttling. The "
            "harness, which reads clocks meanwhile, is pinned to no core, and the other placements rest on the same "
            "one; nginx and the load generators on core "
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
            "isolation",
            f"{isolation.RATE} requests/s by the callers of one service, beside: nothing; those of the other as fast "
            f"as 64 connections go; the same against a limit of {LIMIT_PER_S} requests/s, which each process that "
            "reads its requests counts by itself, so that several let several times as much through, and an Envoy of "
            "a node or service account counts for each called workload; "
            f"10 requests/s of them to a filter that takes {BUSY_MS} ms of processor time, in Lua in an Envoy "
            "and in Python at our waypoint, where a filter is a process of its own",
        ),
        (
            "configuration",
            "by how much a process's memory is larger with so many services (two endpoints each, no routes) than "
            "without: one of each kind, added up for two hosts with ten workloads of five service accounts each. Each "
            f"workload calls {configuration.CALLED} services: of those alone knows a sidecar, as with Istio's Sidecar "
            "resource, or the proxy of a service account; one of a node, of those of its five accounts; a waypoint and "
            "a node agent, of all; a uProxy, of all names and of what it dials. Kernel maps of hosts with uProxies are "
            "in it, by how much they grow; the control plane is not. ours-sidecar is not measured: in that lab nobody "
            "is called, and no process stands beside a workload",
        ),
        (
            "upgrade",
            f"{replacing.RATE} requests/s, half of which need L7; one process is replaced, of the called host where "
            f"there are several: the next one serves beside it, then it drains for {DRAIN_S} s and ends. Envoys do so "
            "without hot restart, as Istio runs them. A sidecar in "
            "a pod is replaced with its pod instead. An idle connection that its proxy ends in order counts as cut "
            "only if it did not say so before",
        ),
        (
            "capture",
            "callers of Envoys dial their proxy's listener: no capture, and none is charged. uProxies capture by eBPF, "
            "which runs in the caller's connect(), so that no request pays for it",
        ),
        (
            "charge",
            "processor time is that of all proxies with what they start, and of node agents. Broker and control plane "
            "have nothing to do while nothing changes: what they took at rest in another lab, where 60 uProxies, two "
            "node agents and our waypoints report to them, is charged to every placement alike (control_ms, "
            "together_ms), as is their memory where everything is counted: Envoys, which have files here, would have "
            "a control plane too. Kernel maps count to the memory of the hosts of uProxies",
        ),
        (
            "density",
            "a host's workloads after their start, without load: every other one is called, and up to two of a kind "
            "share a service account. Looked at are the first of 30 that stand, so that fewer of them know as much: of "
            "a host its proxies, node agent and kernel maps, and once a remote waypoint, broker and control plane",
        ),
        (
            "memory",
            "distinct physical pages of each host's processes, so that the program that the Envoys of all placements "
            "share counts in full for each placement; pss_mb divides it by all of them. Of our waypoints it is without "
            "the processes of the bad filter",
        ),
    ):
        bench.condition(f"{NAME}: {name}", text)


SUITE: Final = Architectures()
