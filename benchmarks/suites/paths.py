"""What a way between two workloads costs: plain TCP, uProxies, and other proxies that also speak mTLS.

Two hosts of a lab, a load generator on one and an application on the other, and the same for every subject but what is
between (benchmarks/peers). All subjects stand at once; the links are what veth makes of them, or delayed.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks import load
from benchmarks.harness.bench import Absent, Bench, BenchError, Probe, Sample
from benchmarks.harness.results import Better, Check, Measure, Subject
from benchmarks.harness.usage import ASIDE, GoneError, pss_mb
from benchmarks.lab import cores, link
from benchmarks.lab.capture import Capture, streams
from benchmarks.lab.congestion import ALGORITHM
from benchmarks.lab.handshakes import agreed
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Host, Lab
from benchmarks.load import Load, LoadError, Outcome
from benchmarks.peers import calibration, near, waypoints, wireguard
from benchmarks.peers.pairs import PEERS_OF_FULL_RUNS, peers
from benchmarks.peers.standing import (
    APART,
    TOGETHER,
    Pinning,
    Standing,
    resources,
    stand_peer,
    stand_uproxy,
    workloads,
)

NAME: Final = "paths"
HTTP: Final = "paths/http"
"""What is measured through waypoints: a suite of its own where subjects are compared, since it has others."""
NEAR: Final = "paths/near"
"""Between two workloads of one host, likewise."""
_SMALL: Final = 64
"""Bytes of a small request."""
_BESIDE: Final = (32, 500)
"""Connections and requests a second of the small requests beside something else."""
_STREAM_GBIT_PER_S: Final = 1.0
"""The bulk stream beside them: half of what the slowest subject was seen to carry there."""
_DELAYS_MS: Final = (0.25, 1.0)
_STALLED_US: Final = 10e6
"""What is shown for requests of which none is answered: as long as the load generator waits."""
_SAMPLED_EVERY_S: Final = 0.05
_PROOF_S: Final = 0.5
_TOLERATED_SHARE, _TOLERATED_US = 0.1, 50.0
"""By how much a delayed link may be off: this share of the delay, or this much."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    sizes: Mapping[int, Sequence[int]]
    """Connections -> bytes of a round trip."""
    streams: Sequence[int]
    rates: Sequence[int]
    delays_ms: Sequence[float]
    delayed: int
    """How many of the three measures are also taken on delayed links."""
    idle: int
    """Connections that are held and not used; 0: not measured."""
    slow: int
    """Connections to a source that nobody reads from; 0: not measured."""
    http: Sequence[int]
    """Connections of HTTP through a waypoint."""
    more: bool
    """Also what needs subjects of its own: applications with TLS, WireGuard, two workloads of one host, calibration."""
    rounds: int
    seconds: float
    tail_seconds: float
    """Of rounds at a fixed rate, whose p99 needs requests."""


QUICK: Final = Plan(
    sizes={1: (_SMALL, 16384), 64: (_SMALL,), 500: (_SMALL,)},
    streams=(1,),
    rates=(2000,),
    delays_ms=(),
    delayed=0,
    idle=0,
    slow=0,
    http=(16,),
    more=False,
    rounds=5,
    seconds=0.3,
    tail_seconds=0.4,
)
FULL: Final = Plan(
    sizes={1: (_SMALL, 1024, 16384), 64: (_SMALL, 16384), 500: (_SMALL,)},
    streams=(1, 8),
    rates=(2000, 6000),
    delays_ms=_DELAYS_MS,
    delayed=3,
    idle=1000,
    slow=8,
    http=(1, 16, 64),
    more=True,
    rounds=5,
    seconds=0.5,
    tail_seconds=1.0,
)


class Paths:
    """The suite. `plan` replaces what is measured, for tests."""

    name = NAME
    title = "The tunnel, against plain TCP and other proxies"

    def __init__(self, plan: Plan | None = None) -> None:
        self._plan = plan

    def run(self, bench: Bench) -> None:
        """Raises BenchError when nothing can be measured."""
        plan = self._plan or (QUICK if bench.quick else FULL)
        try:
            program, line = load.build(bench.directory), link.build(bench.directory)
            with Lab() as lab:
                self._measure(bench, plan, lab, program, line)
        except (LabError, LoadError) as error:
            raise BenchError(str(error)) from error

    def _measure(self, bench: Bench, plan: Plan, lab: Lab, program: Path, line: Path) -> None:
        a, b, c = lab.host("a"), lab.host("b"), lab.host("c")
        client, server = workloads(a, b, program)
        beside = near.declare(a, program) if plan.more else {}
        asked = [one for one in peers(bench.peers) if plan.more or one.subject.name not in PEERS_OF_FULL_RUNS]
        lab.configure(resources() + waypoints.resources(server) + (near.RESOURCES if plan.more else ""))
        lab.start(bench.progress)
        with Capture(a, bench.directory / "handshakes.pcap") as capture:
            lives = [_stood(bench, peer.subject, partial(stand_peer, peer, a, b, program)) for peer in asked]
            # Plain TCP first, uProxy second.
            ours = stand_uproxy(client, server, program)
            lives.insert(1, ours)
            routed = [
                _stood(bench, waypoints.OURS, partial(waypoints.stand_ours, lab, c, ours)),
                _stood(bench, waypoints.ENVOYS, partial(waypoints.stand_envoy, c, ours, server)),
            ]
            pairs, through = _standing(lives), _standing(routed)
            bench.progress(f"standing: {', '.join(one.subject.name for one in pairs + through)}")
            fresh = _first_look(bench, pairs)
            for live in through:
                live.run(load.http_closed(1, f"/bytes/{_SMALL}", "application"), _PROOF_S, TOGETHER)
        _say_handshakes(bench, capture, pairs + through)
        _say_conditions(bench)
        bench.interleave(probes(plan, fresh), lives, rounds=plan.rounds, seconds=plan.seconds)
        bench.interleave(at_fixed_rates(plan), lives, rounds=plan.rounds, seconds=plan.tail_seconds)
        bench.interleave(through_waypoints(plan), routed, rounds=plan.rounds, seconds=plan.seconds)
        if plan.more:
            _measure_inside(bench, plan, near.starts(a, program, beside), beside)
            _calibrate(bench, plan, _stood(bench, *calibration.starts(b, a, program)))
            if reason := wireguard.why_not():
                bench.condition("WireGuard", f"not measured: {reason}")
        for delay_ms in plan.delays_ms:
            self._delayed(bench, plan, lab, b, line, lives, delay_ms)
        if plan.slow:
            # The last: what nobody reads stays in a proxy for a while.
            bench.interleave([_slow_readers(plan.slow)], lives, rounds=plan.rounds, seconds=plan.tail_seconds)

    def _delayed(
        self,
        bench: Bench,
        plan: Plan,
        lab: Lab,
        host: Host,
        line: Path,
        lives: Sequence[Standing | Absent],
        delay_ms: float,
    ) -> None:
        plain = next((live for live in lives if isinstance(live, Standing) and live.subject.reference), None)
        if plain is None:
            raise BenchError("plain TCP does not stand, by which the delay of a link is found")
        before = _round_trip_us(plain)
        with link.delayed(lab, host, line, delay_ms, core=cores.LAST) as carried:
            added = _round_trip_us(plain) - before
            near = (_round_trip(1, _SMALL), _round_trip(64, 1024), _bulk(1))
            far = [Probe(_at(probe.measure, delay_ms), probe.take) for probe in near[: plan.delayed]]
            bench.interleave(far, lives, rounds=plan.rounds, seconds=plan.seconds)
        wanted = 2 * delay_ms * 1000
        bench.check(
            Check(
                f"a link delayed by {delay_ms:g} ms",
                abs(added - wanted) <= max(_TOLERATED_SHARE * wanted, _TOLERATED_US) and not carried.lost,
                f"a round trip takes {added:.0f} us longer, where {wanted:.0f} us were asked for; {carried.lost} of "
                f"{carried.frames} frames were lost",
                {"added_us": added, "frames": carried.frames, "lost": carried.lost},
            )
        )


SUITE: Final = Paths()

_RR: Final = "time per round trip"
_OPEN: Final = "round trips at a fixed rate"
_BULK: Final = "throughput"
_CONNECT: Final = "new connections"
_BESIDE_OTHERS: Final = "small requests beside something else"
_MEMORY: Final = "memory"
_HTTP: Final = "HTTP requests through a waypoint"


def probes(plan: Plan, fresh: Mapping[str, float]) -> list[Probe[Standing]]:
    """What is measured as fast as it goes, in order. `fresh`: the proxies' memory before any load, by subject."""
    return [
        *([_idle(plan.idle, fresh)] if plan.idle else []),
        *(_round_trip(connections, size) for connections, sizes in plan.sizes.items() for size in sizes),
        *map(_bulk, plan.streams),
        _connects(),
    ]


def at_fixed_rates(plan: Plan) -> list[Probe[Standing]]:
    """What is measured at a fixed rate, alone and beside a bulk stream."""
    connections, rate = _BESIDE
    beside = load.beside_bulk(connections, _SMALL, rate, 1, _STREAM_GBIT_PER_S)
    stream = f"beside 1 bulk stream of {_STREAM_GBIT_PER_S:g} Gbit/s, p99"
    return [
        *(_opened(rate) for rate in plan.rates),
        _of_load("beside-bulk", _BESIDE_OTHERS, stream, "us", beside, APART, rate=rate),
    ]


def through_waypoints(plan: Plan) -> list[Probe[Standing]]:
    """What is measured on the two waypoints."""
    return [_http(connections) for connections in plan.http]


def _measure_inside(bench: Bench, plan: Plan, starts: Sequence[near.Start], beside: near.Pairs) -> None:
    """Two workloads of one host; those that may go direct all do."""
    lives = [_stood(bench, *one) for one in starts]
    for live in _standing(lives):
        if live.subject == near.DIRECT:
            near.await_direct(live, beside)
    _, tunnelled = near.carried(beside)
    bench.interleave(_inside(), lives, rounds=plan.rounds, seconds=plan.seconds)
    direct, more = near.carried(beside)
    text = f"{direct:,} connections inside of a host went direct, and {more - tunnelled:,} through a tunnel"
    bench.check(Check("the direct path", direct > 0 and more == tunnelled, text))


def _calibrate(bench: Bench, plan: Plan, live: Standing | Absent) -> None:
    bench.interleave([calibration.probe()], [live], rounds=plan.rounds, seconds=plan.seconds)
    calibration.conclude(bench.results)


def _inside() -> list[Probe[Standing]]:
    """What is measured between two workloads of one host."""
    near_and_far = (_round_trip(1, _SMALL), _round_trip(64, _SMALL), _bulk(1), _connects())
    return [Probe(_in_one_host(probe.measure), probe.take) for probe in near_and_far]


def _in_one_host(measure: Measure) -> Measure:
    name = f"{NEAR}/{measure.name.removeprefix(f'{NAME}/')}"
    return replace(measure, name=name, suite=NEAR, group=f"{measure.group}, inside one host")


def _connects() -> Probe[Standing]:
    return _of_load("connect", _CONNECT, "16 in flight", "1/s", load.connects(16), better="more", connections=16)


def _round_trip(connections: int, size: int) -> Probe[Standing]:
    label = f"{_together(connections)}, {_bytes(size)}"
    asked = load.closed(connections, size)
    return _of_load(f"rr/{connections}/{size}", _RR, label, "us", asked, connections=connections, bytes=size)


def _opened(rate: int) -> Probe[Standing]:
    return _of_load(f"open/{rate}", _OPEN, f"{rate:,}/s, p99", "us", load.opened(64, _SMALL, rate), APART, rate=rate)


def _bulk(streams: int) -> Probe[Standing]:
    label = _count(streams, "stream")
    return _of_load(f"bulk/{streams}", _BULK, label, "Gbit/s", load.bulk(streams), better="more", streams=streams)


def _http(connections: int) -> Probe[Standing]:
    asked = load.http_closed(connections, f"/bytes/{_SMALL}", "application")
    label = f"time per request, {_together(connections)}"
    probe = _of_load(f"http/{connections}", _HTTP, label, "us", asked, connections=connections)
    return Probe(replace(probe.measure, suite=HTTP), probe.take)


def _of_load(
    name: str,
    group: str,
    label: str,
    unit: str,
    asked: Load,
    pinning: Pinning = TOGETHER,
    better: Better = "less",
    **parameters: float,
) -> Probe[Standing]:
    measure = Measure(f"{NAME}/{name}", NAME, group, label, unit, better, parameters)
    return Probe(measure, lambda live, seconds, number: _sample(live.run(asked.seeded(number), seconds, pinning)))


def _at(measure: Measure, delay_ms: float) -> Measure:
    """The same on a link that is so much longer, each way."""
    return Measure(
        f"{NAME}/delay/{delay_ms:g}/{measure.name.removeprefix(f'{NAME}/')}",
        NAME,
        f"{measure.group}, links of {delay_ms:g} ms",
        measure.label,
        measure.unit,
        measure.better,
        {**measure.parameters, "delay_ms": delay_ms},
    )


def _sample(outcome: Outcome, more: Mapping[str, float] | None = None) -> Sample:
    return Sample(
        outcome.value,
        outcome.operations,
        outcome.details() | dict(more or {}),
        outcome.histogram,
        outcome.bottleneck,
        (outcome.start_ns, outcome.end_ns),
    )


def _idle(count: int, fresh: Mapping[str, float]) -> Probe[Standing]:
    """What a thousand connections cost that do nothing: memory of both proxies, above that before any load."""

    def take(live: Standing, seconds: float, number: int) -> Sample:
        del number  # nothing arrives
        outcome, held = _watched(live, load.idle(count), seconds)
        before = fresh[live.subject.name]
        during = statistics.median(held)
        # Nothing was done by which processor time could be divided.
        return Sample(
            (during - before) * 1000 / count,
            0,
            outcome.details() | {"before_mb": before, "pss_mb": during},
            bottleneck=outcome.bottleneck,
            counted=(outcome.start_ns, outcome.end_ns),
        )

    label = "both proxies, per 1,000 idle connections"
    return Probe(Measure(f"{NAME}/idle", NAME, _MEMORY, label, "MB", "less", {"connections": count}), take)


def _slow_readers(count: int) -> Probe[Standing]:
    """Whether connections that nobody reads from slow others down, and what they make a proxy hold."""
    connections, rate = _BESIDE
    asked = load.slow_readers(count, connections, _SMALL, rate)

    def take(live: Standing, seconds: float, number: int) -> Sample:
        before = _held_mb(live)
        try:
            outcome, held = _watched(live, asked.seeded(number), seconds)
        except BenchError as error:
            if not isinstance(error.__cause__, LoadError):
                raise
            # Nothing came through: those whom nobody reads hold up the others. No number is large enough for that.
            return Sample(_STALLED_US, 0, {"stalled": 1.0, "grown_mb": _held_mb(live) - before})
        return _sample(outcome, {"grown_mb": max(held) - before})

    label = f"beside {_count(count, 'reader')} that do not read, p99"
    return Probe(
        Measure(f"{NAME}/slow-readers", NAME, _BESIDE_OTHERS, label, "us", "less", {"readers": count}),
        take,
    )


def _watched(live: Standing, asked: Load, seconds: float) -> tuple[Outcome, list[float]]:
    """A load, and how much memory the proxies held while its counted part ran. Raises BenchError."""
    read: list[tuple[int, float]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLED_EVERY_S):
            with suppress(BenchError):  # whoever is gone is missed by the load, too
                read.append((time.monotonic_ns(), _held_mb(live)))

    watching = threading.Thread(target=watch, name="memory", daemon=True)
    watching.start()
    try:
        outcome = live.run(asked, seconds, TOGETHER if asked.kind == "idle" else APART)
    finally:
        over.set()
        watching.join()
    held = [mb for at, mb in read if outcome.start_ns <= at <= outcome.end_ns]
    if not held:
        raise BenchError(f"{live.subject.name}: {seconds:g} s are too few to read the memory in")
    return outcome, held


def _held_mb(live: Standing) -> float:
    """Memory of the proxies now. Raises BenchError."""
    try:
        return sum(pss_mb(pids) for role, pids in live.processes().items() if role not in ASIDE)
    except GoneError as error:
        raise BenchError(f"{live.subject.name}: {error}") from error


def _round_trip_us(plain: Standing) -> float:
    """The median, on a machine that does not sleep while it waits: waking up is no delay of the link."""
    with cores.awake(cores.FIRST, cores.LAST):
        return plain.run(load.closed(1, _SMALL), _PROOF_S, TOGETHER).percentile_us(0.5)


def _stood(bench: Bench, subject: Subject, stand: Callable[[], Standing]) -> Standing | Absent:
    """Started, or else lost to the run, with the reason."""
    try:
        return stand()
    except (LabError, BenchError, OSError, subprocess.SubprocessError) as error:
        return bench.lose(subject, str(error))


def _standing(lives: Sequence[Standing | Absent]) -> list[Standing]:
    return [one for one in lives if isinstance(one, Standing)]


def _first_look(bench: Bench, lives: Sequence[Standing]) -> dict[str, float]:
    """The proxies' memory before any load, by subject; everybody's congestion control. Who fails at it is lost."""
    fresh: dict[str, float] = {}
    used: dict[str, set[str]] = {}
    for live in lives:
        name = live.subject.name
        try:
            fresh[name] = _held_mb(live)
            used[name] = _congestion(live)
        except BenchError as error:
            bench.lose(live.subject, str(error))
    text = "; ".join(f"{name}: {', '.join(sorted(one)) or 'none'}" for name, one in used.items())
    bench.check(Check(f"TCP {ALGORITHM}", all(one == {ALGORITHM} for one in used.values()), text))
    bench.condition("congestion control", f"{ALGORITHM}, named by every route; seen by ss at both ends of each subject")
    return fresh


def _congestion(live: Standing) -> set[str]:
    """What the sockets at both ends use while they hold connections. Raises BenchError."""
    holding = live.spawn(TOGETHER, load.argv(live.program, live.carried(load.idle(4)), *live.entry, _PROOF_S))
    time.sleep(_PROOF_S / 2)
    seen = "".join(
        subprocess.run(
            ["ip", "netns", "exec", box.netns, "ss", "-tniH", "state", "established"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout
        for box in (live.client, live.server)
    )
    _, told = holding.communicate(timeout=30)
    if holding.returncode:
        live.processes()  # whoever has ended says so
        raise BenchError(f"{live.subject.name}: {told.decode().strip()}")
    known = set(Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split())
    return set(seen.split()) & known


def _say_handshakes(bench: Bench, capture: Capture, lives: Sequence[Standing]) -> None:
    """What each client's proxy agreed upon with the other end, as the wire shows it."""
    seen = streams(capture.segments())
    found = {live.subject.name: agreed(seen, socket.inet_pton(socket.AF_INET, live.tls_address)) for live in lives}
    text = "; ".join(f"{name}: {' and '.join(map(str, sorted(one))) or 'no TLS'}" for name, one in found.items())
    wrong = [
        live.subject.name
        for live in lives
        if {one.version for one in found[live.subject.name]} != ({"TLS 1.3"} if live.proxies or live.tls else set())
    ]
    bench.check(Check("TLS 1.3 between proxies", not wrong, text))
    bench.condition(
        "encryption",
        f"as seen in the handshakes on the wire: {text}. Programs choose as they do by themselves; certificates of all "
        "have keys on P-256",
    )


def _say_conditions(bench: Bench) -> None:
    both = cores.FIRST != cores.LAST
    bench.condition(
        "pinning of the paths",
        f"closed loops, throughput and new connections: load generator, proxies and application on core {cores.FIRST}; "
        f"at a fixed rate: proxies on core {cores.FIRST}, application and load generator, which goes first, on core "
        f"{cores.LAST}" + ("" if both else ", the same one: there is no other, and requests may be sent late"),
    )
    bench.condition(
        "links",
        "a veth pair and a bridge between two network namespaces; a delay is that of one way, so that a round trip "
        f"takes twice as long, made by a program on core {cores.LAST} that is not accounted",
    )
    bench.condition(
        _HTTP,
        "GET of 64 B over kept-alive connections, in a closed loop, everything on one core: two uProxies, captured by "
        "eBPF, and the waypoint between them, which refuses a path and keeps no access log. The values, the time "
        "divided by all requests, and the processor time include both uProxies",
    )
    bench.condition(
        _RR,
        "A closed loop: the time divided by all round trips of all connections, which for more than one connection is "
        "no latency; that stands beside, as percentiles",
    )
    bench.condition(
        _BESIDE_OTHERS,
        f"{_BESIDE[0]} connections, {_BESIDE[1]} requests of {_SMALL} B a second. The bulk stream is to carry "
        f"{_STREAM_GBIT_PER_S:g} Gbit/s for everybody, in pieces of 64 KB; what it carried stands beside (Gbit/s), and "
        f"a round with less than {load.CARRIED_SHARE:.0%} of it does not count. {_STALLED_US / 1e6:.0f} s stand for "
        "none that was answered",
    )
    bench.condition(
        "capture",
        "uProxies by eBPF, ztunnels and linkerd2-proxies by redirects; Envoys and HAProxies are dialled on loopback",
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _together(connections: int) -> str:
    return _count(connections, "connection") + (" together" if connections > 1 else "")


def _bytes(size: int) -> str:
    return f"{size} B" if size < 1024 else f"{size // 1024} KB"
