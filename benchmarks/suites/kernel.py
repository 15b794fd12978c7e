"""What the kernel's half costs: the hook in connect(), the maps as they grow and change, and the same-host direct path.

Pairs of routed namespaces on one host of a lab, some captured as the node agent captures; the maps, the grants too,
are written here. No uProxy takes part: what is captured meets a plain listener at the uProxy's port.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks import load
from benchmarks.harness.bench import Bench, BenchError, Probe, Sample
from benchmarks.harness.results import Better, Check, Measure, Results, Subject
from benchmarks.harness.usage import Meter
from benchmarks.lab import cores, node
from benchmarks.lab.node import Node
from benchmarks.lab.programs import clocked
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Host, Lab, entered
from benchmarks.load import Load, LoadError, Outcome
from benchmarks.peers.pairs import APP_PORT
from benchmarks.peers.place import Address
from benchmarks.peers.standing import TOGETHER, Standing
from benchmarks.suites import maps
from benchmarks.suites.maps import LARGE, SMALL, Size
from bpf.bpffs import PinError
from bpf.libbpf import BpfError
from bpf.loader import LoadError as BpfLoadError
from bpf.maps import Counters
from control.api.address import IpAddress
from uproxy.node.workloads import RegistrationError
from uproxy.sandbox import Sandbox, write_sysctls

NAME: Final = "kernel"
"""Parts of the suite are suites of their own where subjects are compared: each has its own baseline."""
CONNECT: Final = "kernel/connect"
PROGRAMS: Final = "kernel/programs"
DIRECT: Final = "kernel/direct"

_UPROXY_PORT: Final = 15001
_LOOPBACK: Final = IpAddress("127.0.0.1")
_NETWORK: Final = "10.98.1"
"""Of the pairs' addresses: outside of the mesh, until one is said to be in it."""
_NEAR_VIP: Final = node.further(node.VIPS, 60_000)
"""Of the service that leads to a neighbour."""
_OUTSIDE, _SERVICE, _WORKLOAD = "outside", "service", "workload"

BARE: Final = Subject(
    "bare",
    "plain TCP",
    "Two namespaces of one host, each behind a veth that the host routes; no eBPF program is attached to either.",
    reference=True,
)
AGAIN: Final = Subject(
    "bare-again",
    "plain TCP, once more",
    "A second pair of the same kind: how far two equals are apart in this run.",
    reference=True,
)
CAPTURED: Final = Subject(
    "captured",
    "captured, a small mesh",
    "The caller is captured as by the node agent, in a mesh of 10 services and 100 endpoints. What it dials in the "
    "mesh comes to a plain listener at its uProxy's port.",
)
FULL: Final = Subject(
    "captured-full",
    "captured, a large mesh",
    "The same in a mesh of 10,000 services and 100,000 endpoints, each connection to another one of them.",
)
NEAR: Final = Subject(
    "direct",
    "direct path",
    "Caller and destination are captured, and the service's one backend, on this host, is granted to the caller: the "
    "kernel connects them without a proxy.",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    dialled: Sequence[str]
    """Where to: outside of the mesh, a service, a workload."""
    sizes: Mapping[int, int]
    """Connections -> bytes of a round trip on the direct path."""
    streams: Sequence[int]
    rounds: int
    near_rounds: int
    """On the direct path, whose target is 3 %."""
    fillings: int
    seconds: float
    large: Size = LARGE


QUICK: Final = Plan(
    dialled=(_OUTSIDE, _SERVICE),
    sizes={1: 64},
    streams=(1,),
    rounds=5,
    near_rounds=7,
    fillings=3,
    seconds=0.3,
)
WHOLE: Final = Plan(
    dialled=(_OUTSIDE, _SERVICE, _WORKLOAD),
    sizes={1: 64, 64: 64},
    streams=(1, 8),
    rounds=9,
    near_rounds=13,
    fillings=5,
    seconds=0.5,
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A caller and a destination that stand, and where the caller dials."""

    standing: Standing
    places: Mapping[str, tuple[Address, int]]
    """What is asked for -> the first address, and how many there are."""
    destination: str = _OUTSIDE
    """Which of these is the destination itself; at others a listener stands for the caller's uProxy."""
    pins: Sequence[Path] = ()
    """Directories of its programs' links."""

    @property
    def subject(self) -> Subject:
        return self.standing.subject

    def processes(self) -> Mapping[str, Sequence[int]]:
        return self.standing.processes()

    def run(self, place: str, asked: Callable[[int], Load], seconds: float, number: int) -> Outcome:
        """A load on one place, all on one core. `asked` is told how many addresses the place has. Raises BenchError."""
        address, spread = self.places[place]
        return replace(self.standing, entry=address).run(asked(spread).seeded(number), seconds, TOGETHER)

    def sample(self, place: str, asked: Callable[[int], Load], seconds: float, number: int) -> Sample:
        """The same, with the processor time of both ends. Raises BenchError."""
        with Meter({"application": self.standing.application}) as meter:
            outcome = self.run(place, asked, seconds, number)
            counted = (outcome.start_ns, outcome.end_ns)
            used_ns = meter.used(counted).processor_ns["application"]
        used_ns += round(outcome.generator.cpu_share * outcome.seconds * 1e9)
        details = outcome.details() | {"cpu_us": used_ns / 1000 / outcome.operations}
        return Sample(outcome.value, outcome.operations, details, outcome.histogram, outcome.bottleneck, counted)


class Kernel:
    """The suite. `plan` replaces what is measured, for tests."""

    name = NAME
    title = "The kernel's half: the hook in connect(), the maps, the direct path"

    def __init__(self, plan: Plan | None = None) -> None:
        self._plan = plan

    def run(self, bench: Bench) -> None:
        """Raises BenchError when nothing can be measured."""
        plan = self._plan or (QUICK if bench.quick else WHOLE)
        try:
            program = load.build(bench.directory)
            with Lab() as lab, ExitStack() as stack:
                small, large, empty = (stack.enter_context(node.node(lab, name)) for name in ("few", "full", "empty"))
                self._measure(bench, plan, _Yard(lab, program, stack), small, large, empty)
        except (LabError, LoadError, BpfLoadError, BpfError, PinError, RegistrationError) as error:
            raise BenchError(f"{NAME}: {error}") from error

    def _measure(self, bench: Bench, plan: Plan, yard: _Yard, small: Node, large: Node, empty: Node) -> None:
        _say_conditions(bench)
        for one, size in ((small, SMALL), (large, plan.large)):
            one.hold(node.services(size.services), node.endpoints(size.endpoints))
            maps.declare(one.maps, size)
        bench.progress(f"maps of {plan.large.services:,} services and {plan.large.endpoints:,} endpoints are written")
        bare, again = yard.bare(BARE), yard.bare(AGAIN)
        captured, full = yard.captured(CAPTURED, small, SMALL), yard.captured(FULL, large, plan.large)
        near = yard.near(NEAR, small)
        bench.progress("standing: the pairs of namespaces")
        with _counted(bench, "what is dialled in the mesh is captured", small.maps.counters, _some_captured):
            probes, dialling = [_dials(to) for to in plan.dialled], [bare, again, captured, full]
            bench.interleave(probes, dialling, rounds=plan.rounds, seconds=plan.seconds)
        for probe in probes:
            _add_difference(bench.results, probe.measure.name)
        with small.drained():
            with _counted(bench, "what is granted goes directly, and nothing else", small.maps.counters, _all_direct):
                bench.interleave(near_probes(plan), [bare, again, near], rounds=plan.near_rounds, seconds=plan.seconds)
            bench.interleave([_run_time()], [captured, full, near], rounds=plan.fillings, seconds=plan.seconds)
        held = [maps.Held(CAPTURED, small.maps, SMALL), maps.Held(FULL, large.maps, plan.large)]
        bench.interleave([maps.memory()], held, rounds=1, seconds=0.0)
        bench.interleave([maps.address_changes(), maps.backend_changes()], held, rounds=plan.rounds, seconds=0.0)
        bench.interleave(
            [maps.filling(plan.large)], maps.fillers(empty.maps, plan.large), rounds=plan.fillings, seconds=0.0
        )


SUITE: Final = Kernel()


class _Yard:
    """Makes the pairs, on one host, and starts their servers."""

    def __init__(self, lab: Lab, program: Path, stack: ExitStack) -> None:
        self._lab = lab
        self._host: Host = lab.host("a")
        self._program = program
        self._stack = stack
        self._addresses = iter(range(10, 250))

    def bare(self, subject: Subject) -> Pair:
        client, server = self._places(subject)
        return self._stood(subject, client, server, {})

    def captured(self, subject: Subject, on: Node, size: Size) -> Pair:
        """The caller is; the destination, which is outside of the mesh, is not."""
        client, server = self._places(subject)
        pins = on.pins(on.capture(client))
        places = {
            _SERVICE: ((node.VIPS, node.PORT), size.services),
            _WORKLOAD: ((node.ENDPOINTS, node.PORT), size.endpoints),
        }
        return replace(self._stood(subject, client, server, places), pins=[pins])

    def near(self, subject: Subject, on: Node) -> Pair:
        client, server = self._places(subject)
        caller, target = on.capture(client), on.capture(server)
        on.lead_directly(caller, _NEAR_VIP, target, range(APP_PORT, APP_PORT + load.PORTS))
        pair = self._stood(subject, client, server, {_SERVICE: ((_NEAR_VIP, APP_PORT), 1)})
        return replace(pair, destination=_SERVICE, pins=[on.pins(caller), on.pins(target)])

    def _places(self, subject: Subject) -> tuple[Sandbox, Sandbox]:
        made = [
            self._host.place(f"{subject.name}-{side}", f"{_NETWORK}.{next(self._addresses)}")
            for side in ("client", "server")
        ]
        for box in made:
            with entered(box.netns_path):
                # Addresses may be used again at once: thousands of short connections a second come from one.
                write_sysctls({"net/ipv4/tcp_tw_reuse": "1", "net/ipv4/ip_local_port_range": "20000 65000"})
        return made[0], made[1]

    def _stood(
        self, subject: Subject, client: Sandbox, server: Sandbox, places: Mapping[str, tuple[Address, int]]
    ) -> Pair:
        """With a server at the destination, and one where the caller's uProxy would listen."""
        address = (IpAddress(server.addresses[0]), APP_PORT)
        far = self._serve(server, server.app_cgroup, address)
        local = self._serve(client, client.proxy_cgroup, (_LOOPBACK, _UPROXY_PORT))
        everywhere = dict.fromkeys((_SERVICE, _WORKLOAD), ((_LOOPBACK, _UPROXY_PORT), 1))
        standing = Standing(subject, self._lab, client, server, address, {}, [far, local], self._program, address[0])
        return Pair(standing, {_OUTSIDE: (address, 1)} | everywhere | dict(places))

    def _serve(self, box: Sandbox, cgroup: Path, address: Address) -> int:
        spawn = partial(
            self._lab.spawn,
            netns=box.netns_path,
            cgroup=str(cgroup.relative_to(self._lab.names.cgroup)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        return self._stack.enter_context(load.serving(spawn, self._program, *address)).pid


def near_probes(plan: Plan) -> list[Probe[Pair]]:
    """What is measured of the direct path and of plain TCP."""
    probes = [
        _near(
            f"rr/{connections}/{size}",
            "time per round trip",
            f"{connections} connection{'' if connections == 1 else 's together'}, {size} B",
            "us",
            load.closed(connections, size),
            connections=connections,
        )
        for connections, size in plan.sizes.items()
    ]
    probes += [
        _near(
            f"bulk/{streams}",
            "throughput",
            f"{streams} stream{'' if streams == 1 else 's'}",
            "Gbit/s",
            load.bulk(streams),
            "more",
            streams=streams,
        )
        for streams in plan.streams
    ]
    return [
        *probes,
        _near("connect", "new connections", "16 in flight", "1/s", load.connects(16), "more", connections=16),
    ]


def _near(
    name: str, group: str, label: str, unit: str, asked: Load, better: Better = "less", **parameters: float
) -> Probe[Pair]:
    measure = Measure(f"{DIRECT}/{name}", DIRECT, group, label, unit, better, parameters)
    return Probe(measure, lambda pair, seconds, number: pair.sample(pair.destination, lambda _: asked, seconds, number))


_CONNECTING: Final = "time in connect(2)"
_RUNNING: Final = "time in eBPF programs"


def _dials(to: str) -> Probe[Pair]:
    label = {
        _OUTSIDE: "to an address outside of the mesh",
        _SERVICE: "to a service",
        _WORKLOAD: "to a workload's own address",
    }[to]
    measure = Measure(f"{CONNECT}/{to}", CONNECT, _CONNECTING, f"{label}, lower quartile", "us")

    def take(pair: Pair, seconds: float, number: int) -> Sample:
        sample = pair.sample(to, load.dials, seconds, number)
        return replace(sample, details={**sample.details, "connection_us": 1e6 / sample.details["per_second"]})

    return Probe(measure, take)


def _run_time() -> Probe[Pair]:
    """By the kernel's clock of each program, which costs some 50 ns a run itself; no other measure has it on."""
    measure = Measure(f"{PROGRAMS}/connection", PROGRAMS, _RUNNING, "for one connection, both ends", "us")

    def take(pair: Pair, seconds: float, number: int) -> Sample:
        with clocked(pair.pins) as programs:
            before = programs.run_ns()
            outcome = pair.run(_SERVICE, load.dials, seconds, number)
            after = programs.run_ns()
        # All that were made: the clock ran from the first one on.
        made = outcome.scheduled
        each = {f"{hook}_us": (ns - before[hook]) / 1000 / made for hook, ns in after.items() if ns > before[hook]}
        return Sample(sum(each.values()), made, each)

    return Probe(measure, take)


@contextmanager
def _counted(
    bench: Bench, name: str, counters: Counters, proves: Callable[[Mapping[str, int]], bool]
) -> Iterator[None]:
    """A check of what the programs have counted meanwhile."""
    before = counters.read()
    yield
    risen = {name: count - before[name] for name, count in counters.read().items() if count != before[name]}
    text = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in risen.items()) or "nothing was counted"
    bench.check(Check(f"{NAME}: {name}", proves(risen), text))


def _some_captured(risen: Mapping[str, int]) -> bool:
    return risen.keys() == {"captured"}


def _all_direct(risen: Mapping[str, int]) -> bool:
    """Nothing was tunnelled, failed, or found its grant gone."""
    return risen.keys() == {"direct", "admitted_syn"}


def _add_difference(results: Results, measure: str) -> None:
    """To each round's details, how much longer it took than without the hook in the same round."""
    plain = results.find(measure, BARE.name)
    without = {one.number: one.value for one in plain.rounds} if plain is not None else {}
    for series in results.series:
        if series.measure == measure and series.subject != BARE.name:
            series.rounds = [
                replace(one, details={**one.details, "added_us": one.value - without[one.number]})
                if one.number in without
                else one
                for one in series.rounds
            ]


def _say_conditions(bench: Bench) -> None:
    bench.condition(
        f"{NAME}: pinning",
        f"caller, destination and the listener at the uProxy's port on core {cores.FIRST}; maps are written by the "
        "harness, on any core",
    )
    bench.condition(
        CONNECT,
        "connect(2) alone, by a caller that makes one connection after the other, has a byte echoed on it, and closes "
        "it; both ends are on one core, so that the handshake is in it. The lower quartile, since about half of the "
        "calls take some 10 us more, whatever is dialled. For what is in the mesh, plain TCP is to a listener on "
        "loopback, which is where a captured connection comes to.",
    )
    bench.condition(
        PROGRAMS,
        "By the kernel's clock of each program (bpf_stats), which itself costs some 50 ns a run: from socket() to "
        "close(), both ends.",
    )
    bench.condition(
        DIRECT,
        "The service's address is dialled, and the kernel draws the backend, asks for its grant and admits the "
        "connection; records of closed connections are drained every 100 ms. Everything on one core.",
    )
    bench.condition(
        maps.NAME,
        f"By the node agent's own code for maps, from Python. A caller may dial {SMALL.declared:,} and "
        f"{LARGE.declared:,} services directly, with {maps.BACKENDS} backends each.",
    )
