"""How long a change takes to be enforced, and what a large mesh costs its control plane and its proxies.

All of it runs in one lab: `meshctl up` with its broker on a machine of its own, real uProxies and node agents on two
hosts, and, where it says so, simulated proxies (`benchmarks.simulated`: the client code without a data plane). All
share this machine's cores, so that every time has everybody's work in it.

Enforced means enforced: a connection that a new policy forbids has been reset. The clock starts before the request to
the control plane's API is sent.
"""

from __future__ import annotations

import re
import select
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, Final

from benchmarks import fleet
from benchmarks.fleet import Simulation
from benchmarks.harness.bench import Bench, BenchError, Probe, Sample
from benchmarks.harness.histogram import histogram_of
from benchmarks.harness.results import Measure, Round, Series, Subject
from benchmarks.lab.apps import commands
from benchmarks.lab.control import ControlPlane
from benchmarks.lab.scrape import scrape
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Lab, Workload
from benchmarks.lab.waypoints import Waypoint
from control.cli import client as api
from control.cli.output import CommandError
from uproxy.cgroup import SandboxError
from uproxy.process import METRICS_PORT

NAME: Final = "control"
SUBJECT: Final = Subject(
    "mesh",
    "the mesh",
    "`meshctl up` with its nats-server in a namespace of its own, four uProxies and two node agents on two hosts, and "
    "where a measure says so simulated proxies: the client code without a data plane, in two processes.",
    f"uProxy {version('uproxy-mesh')}",
)
_PORT: Final = 9000
_RING: Final = "ring"
_DENY: Final = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: bench, namespace: {namespace}}}
spec: {{{selector}action: DENY, rules: [{rule}]}}
"""
_QUARANTINED: Final = 'selector: {matchLabels: {quarantined: "yes"}}, '
_GATEWAY: Final = "bench"
_BINDING: Final = {"istio.io/use-waypoint": _GATEWAY, "istio.io/use-waypoint-namespace": "default"}
_BOUND: Final = f"""\
apiVersion: v1
kind: Service
metadata: {{name: bound, namespace: {_RING}}}
spec: {{selector: {{app: {_RING}}}, ports: [{{name: tcp, port: {_PORT}}}]}}
"""
_ENFORCED_S: Final = 20.0
_START_S: Final = 240.0
_PUBLISHED_S: Final = 900.0
_POLL_S: Final = 1.0
_REST_S: Final = 0.25
"""Between two flips, for which proxies report more often than they do in the long run: nobody flips all the time."""
_DIALLED: Final = 10

_CHANGES: Final = "A change, until it is enforced"
_MANY: Final = "A change, with very many proxies"
_LARGE: Final = "A large mesh"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    rounds: int
    changes: int
    """In each round; two before the first, which do not count."""
    simulated: int
    """Proxies."""
    simulated_changes: int
    """In each round."""
    namespaces: int
    """Of 100 services and 1,000 endpoints each."""


FULL: Final = Plan(rounds=5, changes=20, simulated=1000, simulated_changes=5, namespaces=100)
QUICK: Final = Plan(rounds=3, changes=4, simulated=50, simulated_changes=3, namespaces=2)


@dataclass(frozen=True, slots=True)
class Mesh:
    """The lab, as what is measured."""

    control: ControlPlane
    workloads: Sequence[Workload]
    simulations: Sequence[Simulation] = ()
    subject: Subject = SUBJECT

    def processes(self) -> Mapping[str, Sequence[int]]:
        running = self.control.processes()
        found = {
            "control plane": [pid for name, pid in running.items() if name == "meshctl up"],
            "broker": [pid for name, pid in running.items() if name == "nats-server"],
            "uProxies": [one.proxy_pid() for one in self.workloads],
        }
        return found | ({"simulated proxies": [one.pid for one in self.simulations]} if self.simulations else {})


class Control:
    """The suite. `plan` replaces what is measured, for tests."""

    name = NAME
    title = "The control plane"

    def __init__(self, plan: Plan | None = None) -> None:
        self._plan = plan

    def run(self, bench: Bench) -> None:
        """Raises BenchError when something does not work."""
        plan = self._plan or (QUICK if bench.quick else FULL)
        bench.condition(
            NAME,
            "Everything on this machine's cores, pinned to none. The clock starts before the request to the control "
            "plane's API; a policy is enforced when the connection that it forbids has been reset",
        )
        try:
            with Lab(control=True) as lab:
                assert lab.control is not None
                _Run(bench, plan, lab, lab.control).measure()
        except (LabError, CommandError, SandboxError, OSError) as error:
            raise BenchError(f"{NAME}: {error}") from error


SUITE: Final = Control()


class _Run:
    """What is measured in one lab, in an order that goes from small to large."""

    def __init__(self, bench: Bench, plan: Plan, lab: Lab, control: ControlPlane) -> None:
        self._bench = bench
        self._plan = plan
        self._lab = lab
        self._control = control
        self._plane = api.ControlPlane(control.socket)
        a, b = lab.host("a"), lab.host("b")
        self._waypoint_host = b
        self._ring = [
            host.workload(f"p{number}", commands.idle(), namespace=_RING, labels={"app": _RING})
            for number, host in enumerate((a, b, a, b))
        ]
        self._bundle = self._ring[0].identity_dir / "bundle.pem"
        self._mesh = Mesh(control, self._ring)

    def measure(self) -> None:
        """Raises LabError."""
        self._lab.start(self._bench.progress)
        with ExitStack() as stack:
            ring = Ring(self._ring, stack)
            self._spread("policy", _CHANGES, "a policy, at the last of 4 uProxies", lambda: self._policy_change(ring))
            reference = {"kind": "WorkloadEntry", "namespace": _RING, "name": self._ring[0].name}
            self._apply(_DENY.format(namespace=_RING, selector=_QUARANTINED, rule="{}"))
            self._spread(
                "label", _CHANGES, "a label, at the uProxy concerned", lambda: self._relabelled(ring, reference)
            )
            self._delete_policy(_RING)
            self._flips(stack)
            self._simulated(stack)
        self._large_mesh()

    # -- four real uProxies

    def _policy_change(self, ring: Ring) -> float:
        """A DENY of the whole namespace, until the last of the four uProxies has cut its connection: seconds."""
        with ring.connections() as held:
            began = time.monotonic()
            self._apply(_DENY.format(namespace=_RING, selector="", rule="{}"))
            taken = _resets(held, began)[-1]
        self._delete_policy(_RING)
        return taken

    def _relabelled(self, ring: Ring, reference: dict[str, str]) -> float:
        """A label that brings one workload under a DENY, until its uProxy has cut the connection."""
        with ring.connections() as held:
            began = time.monotonic()
            self._relabel(reference, {"quarantined": "yes"})
            (taken,) = _resets(held[:1], began)
        self._relabel(reference, {"quarantined": None})
        return taken

    def _flips(self, stack: ExitStack) -> None:
        """A service put behind a waypoint and taken from there, until every proxy concerned says that it does so."""
        waypoint = Waypoint(self._control, self._waypoint_host, _GATEWAY)
        waypoint.apply("--admit", "All")
        waypoint.start()
        stack.callback(waypoint.kill)
        self._apply(_BOUND)

        def bind() -> float:
            taken = self._flip(_BINDING)
            self._flip(dict.fromkeys(_BINDING))
            return taken

        def unbind() -> float:
            self._flip(_BINDING)
            return self._flip(dict.fromkeys(_BINDING))

        self._spread("bind", _CHANGES, "a service put behind a waypoint, at 4 uProxies", bind)
        self._spread("unbind", _CHANGES, "... taken from there, until all go directly", unbind)

    def _flip(self, labels: Mapping[str, str | None]) -> float:
        began = time.monotonic()
        self._relabel({"kind": "Service", "namespace": _RING, "name": "bound"}, labels)
        self._settled(f"{_RING}/bound")
        taken = time.monotonic() - began
        time.sleep(_REST_S)
        return taken

    def _settled(self, key: str) -> None:
        """Until every proxy concerned with a binding does what was asked for last. Raises LabError."""
        deadline = time.monotonic() + _ENFORCED_S
        while True:
            (binding,) = (one for one in self._plane.get("bindings")["bindings"] if one["key"] == key)
            if binding["settled"]:
                return
            if time.monotonic() > deadline:
                raise LabError(f"the binding of {key} waits for {binding['waits_for']}:\n{self._control.logs()}")
            time.sleep(0.002)

    # -- a thousand simulated proxies

    def _simulated(self, stack: ExitStack) -> None:
        """A policy of a namespace with very many proxies, until each of them has applied it."""
        proxies = self._plan.simulated
        self._apply(fleet.member_entries(proxies))
        members = fleet.members(self._lab, proxies)
        half = proxies // 2
        parts = [Simulation(self._lab, self._control, self._bundle, part) for part in (members[:half], members[half:])]
        for part in parts:
            stack.callback(part.end)
        whole = max(part.whole(_START_S) for part in parts)
        self._once("whole", _MANY, f"{proxies:,} proxies connect and are whole", "s", whole, proxies)
        changes = count()

        def change() -> list[float]:
            version, began = self._applied(next(changes))
            return [at - began for part in parts for at in part.applied(version, _START_S)]

        self._spread(
            "many",
            _MANY,
            f"a policy, at the last of {proxies:,} proxies",
            lambda: max(change()),
            simulations=parts,
            changes=self._plan.simulated_changes,
            proxies=proxies,
        )

    def _applied(self, number: int) -> tuple[list[int], float]:
        """Another address each time: the same text would be no change."""
        rule = f"from: [{{source: {{ipBlocks: [192.0.2.{number % 256}]}}}}]"
        began = time.monotonic()
        return self._apply(_DENY.format(namespace=fleet.NAMESPACE, selector="", rule=f"{{{rule}}}")), began

    # -- 10,000 services and 100,000 endpoints

    def _large_mesh(self) -> None:
        namespaces = self._plan.namespaces
        services = namespaces * fleet.SERVICES_EACH
        endpoints = services * fleet.ENDPOINTS_EACH
        named = f"{services:,} services, {endpoints:,} endpoints"
        began = time.monotonic()
        samples = []
        for number in range(namespaces):
            if number % 10 == 0:
                self._bench.progress(f"{NAME}: namespace {number} of {namespaces}")
            started = time.monotonic()
            self._apply(fleet.large_namespace(number))
            samples.append(time.monotonic() - started)
        each = self._measure("apply", _LARGE, "apply of a namespace: 100 services, 1,000 endpoints", "ms", endpoints)
        self._add(each, [_round(1, samples)])
        self._published()
        self._large("published", f"{named}: applied and published", time.monotonic() - began, endpoints)
        self._hosts_agree(services)
        self._large("maps", "... and in both hosts' kernel maps", time.monotonic() - began, endpoints)

        self._control.kill()
        shutil.rmtree(self._control.broker_data())
        began = time.monotonic()
        self._control.start()
        self._published()
        self._large("restart", "start with an empty broker, until published", time.monotonic() - began, endpoints)

        (member,) = fleet.members(self._lab, 1)
        dialled = [f"n{number % namespaces}/s{number}" for number in range(_DIALLED)]
        every = [f"n{number}/s{index}" for number in range(namespaces) for index in range(fleet.SERVICES_EACH)]
        self._new_subscriber("new", "a new uProxy that dials ten services: whole", {**member, "services": dialled})
        self._new_subscriber("new-all", "a new proxy that wants every service: whole", {**member, "services": every})
        self._flaps({**member, "services": dialled})
        self._growth()

    def _new_subscriber(self, name: str, label: str, member: dict[str, Any]) -> None:
        simulation = Simulation(self._lab, self._control, self._bundle, [member])
        try:
            self._large(name, label, simulation.whole(_PUBLISHED_S), self._plan.namespaces * fleet.SERVICES_EACH)
        finally:
            simulation.end()

    def _flaps(self, member: dict[str, Any]) -> None:
        """One endpoint of a service leaves and returns: until a proxy that dials the service knows."""
        reference = {"kind": "WorkloadEntry", "namespace": "n0", "name": "s0-0"}
        simulation = Simulation(self._lab, self._control, self._bundle, [member])
        changes = count()

        def flap() -> float:
            began = time.monotonic()
            self._relabel(reference, {"app": "elsewhere" if next(changes) % 2 == 0 else "s0"})

            def told(event: dict[str, Any]) -> bool:
                # Not of what it heard of when it began.
                return str(event.get("topic", "")).endswith("/s0/s0-0") and event["at"] > began

            return float(simulation.wait(told, _ENFORCED_S)["at"]) - began

        try:
            simulation.whole(_START_S)
            self._spread("flap", _LARGE, "one endpoint's flap, at who dials it", flap, simulations=[simulation])
        finally:
            simulation.end()

    def _growth(self) -> None:
        """Memory of real uProxies before and after each has dialled ten services of the large mesh."""
        self._add(
            self._measure("growth", _LARGE, "growth of a uProxy that dials ten services", "MB", _DIALLED),
            [Round(number, self._grown(workload)) for number, workload in enumerate(self._ring, 1)],
        )

    def _grown(self, workload: Workload) -> float:
        pid = workload.proxy_pid()
        before, demanded = _private_mb(pid), _metric(workload, "uproxy_demanded_services")
        step = self._plan.namespaces * fleet.SERVICES_EACH // _DIALLED
        with ExitStack() as stack:
            for number in range(_DIALLED):
                (made,) = workload.sockets()
                stack.callback(made.close)
                made.settimeout(_ENFORCED_S)
                # Captured, so that it succeeds at once; nobody is behind the endpoints.
                made.connect((fleet.service_address(number * step), 80))

            def knows_all() -> bool:
                known = _metric(workload, "uproxy_demanded_services") == demanded + _DIALLED
                return known and _metric(workload, "uproxy_config_whole") == 1

            self._lab.wait([knows_all], _ENFORCED_S, "what was dialled")
        if workload.proxy_pid() != pid:
            raise LabError(f"the uProxy of {workload.name} has died:\n{workload.logs()}")
        return _private_mb(pid) - before

    # -- what becomes of what was found

    def _spread(
        self,
        name: str,
        group: str,
        label: str,
        change: Callable[[], float],
        *,
        simulations: Sequence[Simulation] = (),
        changes: int = 0,
        proxies: int = 0,
    ) -> None:
        """Rounds of a change that takes so many seconds: the median of each as one measure, the worst as another."""
        many = changes or self._plan.changes

        def take(mesh: Mesh, seconds: float, number: int) -> Sample:
            del mesh, seconds  # it takes as long as it takes
            found = _round(number, [change() for _ in range(many if number else min(2, many))])
            return Sample(found.value, many if number else min(2, many), found.details, found.histogram)

        measure = self._measure(name, group, f"{label}: median", "ms", proxies or None)
        mesh = Mesh(self._control, self._ring, simulations)
        self._bench.interleave([Probe(measure, take)], [mesh], rounds=self._plan.rounds, seconds=0.0)
        series = self._bench.results.find(measure.name, SUBJECT.name)
        if series is None or series.refused:
            raise LabError(series.refused if series is not None else f"{measure.name} was not taken")
        worst = self._measure(f"{name}/worst", group, f"{label}: the slowest of {many}", "ms", proxies or None)
        self._add(worst, [Round(one.number, one.details["max_us"] / 1000) for one in series.rounds])

    def _large(self, name: str, label: str, seconds: float, size: int) -> None:
        self._once(name, _LARGE, label, "s", seconds, size)

    def _once(self, name: str, group: str, label: str, unit: str, value: float, size: int) -> None:
        """What is measured once."""
        self._add(self._measure(name, group, label, unit, size), [Round(1, value)])

    def _add(self, measure: Measure, rounds: Sequence[Round]) -> None:
        results = self._bench.results
        if SUBJECT not in results.subjects:
            results.subjects.append(SUBJECT)
        results.measures.append(measure)
        results.series.append(Series(measure.name, SUBJECT.name, list(rounds)))
        middle = statistics.median(one.value for one in rounds)
        self._bench.progress(f"{measure.name}: {middle:.3g} {measure.unit}")

    def _measure(self, name: str, group: str, label: str, unit: str, size: int | None) -> Measure:
        return Measure(f"{NAME}/{name}", NAME, group, label, unit, parameters={"size": size} if size else {})

    # -- what the control plane is asked

    def _apply(self, document: str) -> list[int]:
        """The version of the change."""
        answer = self._plane.post("apply", {"documents": [{"file": "bench", "text": document}]})
        version: list[int] = answer["version"]
        return version

    def _delete_policy(self, namespace: str) -> None:
        reference = {"kind": "AuthorizationPolicy", "namespace": namespace, "name": "bench"}
        self._plane.post("delete", {"references": [reference]})

    def _relabel(self, reference: dict[str, str], labels: Mapping[str, str | None]) -> None:
        self._plane.post("relabel", {"reference": reference, "labels": dict(labels), "overwrite": True})

    def _published(self) -> None:
        """Until the broker has everything. Asked seldom: the answer has a row for each of 100,000 workloads."""
        deadline = time.monotonic() + _PUBLISHED_S
        while not self._plane.get("status")["broker"]["published"]:
            if time.monotonic() > deadline:
                raise LabError(f"not published within {_PUBLISHED_S:g} s:\n{self._control.logs()}")
            time.sleep(_POLL_S)

    def _hosts_agree(self, services: int) -> None:
        """Until the kernel maps of both hosts have all addresses."""

        def have_all() -> bool:
            return all(int(host.node().status()["services"]) >= services for host in self._lab.hosts)

        self._lab.wait([have_all], _PUBLISHED_S, "the kernel maps")


def _round(number: int, samples_s: Sequence[float]) -> Round:
    """Changes that took so many seconds: their median in ms, and how they are spread."""
    details = {"p50_us": statistics.median(samples_s) * 1e6, "max_us": max(samples_s) * 1e6}
    return Round(number, details["p50_us"] / 1000, details, histogram_of(round(one * 1e9) for one in samples_s))


class Ring:
    """Workloads of which each has a connection from the one before; the called one's uProxy enforces a DENY."""

    def __init__(self, workloads: Sequence[Workload], stack: ExitStack) -> None:
        self._workloads = workloads
        self._listeners: list[socket.socket] = []
        for workload in workloads:
            (listener,) = workload.sockets()
            stack.callback(listener.close)
            listener.bind((workload.address, _PORT))
            listener.listen()
            self._listeners.append(listener)

    @contextmanager
    def connections(self) -> Iterator[list[socket.socket]]:
        """The callers' ends, in the order of the workloads that they lead to."""
        with ExitStack() as stack:
            yield [self._into(number, stack) for number in range(len(self._workloads))]

    def _into(self, number: int, stack: ExitStack) -> socket.socket:
        """Retried, since a policy that was deleted may still be in force for a moment."""
        called, caller = self._workloads[number], self._workloads[number - 1]
        deadline = time.monotonic() + _ENFORCED_S
        while time.monotonic() < deadline:
            (made,) = caller.sockets()
            made.settimeout(_ENFORCED_S)
            with suppress(OSError):
                made.connect((called.address, _PORT))
            # Either the application is reached, or the uProxy refuses, which is readable as a reset.
            ready, _, _ = select.select([made, self._listeners[number]], [], [], _ENFORCED_S)
            if ready == [self._listeners[number]]:
                taken, _ = self._listeners[number].accept()
                stack.callback(taken.close)
                stack.callback(made.close)
                return made
            made.close()
        raise LabError(f"{caller.name} does not reach {called.name}:\n{called.logs()}")


def _resets(ends: Sequence[socket.socket], began: float) -> list[float]:
    """Seconds from `began` until each of these connections has ended, in the order in which they did."""
    poller = select.poll()
    for end in ends:
        poller.register(end, select.POLLIN)
    times: list[float] = []
    while len(times) < len(ends):
        ready = poller.poll(_ENFORCED_S * 1000)
        now = time.monotonic()
        if not ready:
            raise LabError(f"{len(ends) - len(times)} forbidden connections are open after {_ENFORCED_S:g} s")
        for fd, _ in ready:
            poller.unregister(fd)
            times.append(now - began)
    return times


def _private_mb(pid: int) -> float:
    """What a process has for itself alone, in 10^6 bytes: unique and dirty or not, as smaps_rollup says."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.MULTILINE)) * 1024 / 1e6


def _metric(workload: Workload, name: str) -> float:
    """A metric of its uProxy. Raises LabError."""
    found = scrape(workload.entered(), METRICS_PORT)
    if name not in found:
        raise LabError(f"the uProxy of {workload.name} has no metric {name}")
    return found[name]
