"""How long a change takes to be enforced, and what a large mesh costs: `python -m benchmarks.control`.

All of it runs in one lab: `meshctl up` with its broker on a machine of its own, real uProxies and node agents on two
hosts, and, where it says so, simulated proxies (`benchmarks.simulated`: the client code without a data plane). All
share this machine's cores, so that every time has everybody's work in it.

Enforced means enforced: a connection that a new policy forbids has been reset. The clock starts before the request to
the control plane's API is sent.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import re
import select
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks import fleet
from benchmarks.fleet import Simulation
from benchmarks.lab.apps import commands
from benchmarks.lab.control import ControlPlane
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Lab, Workload
from benchmarks.lab.waypoints import Waypoint
from control.cli import client as api
from control.cli.output import CommandError
from uproxy.cgroup import SandboxError
from uproxy.process import METRICS_PORT

_PORT = 9000
_RING = "ring"
_DENY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: bench, namespace: {namespace}}}
spec: {{{selector}action: DENY, rules: [{rule}]}}
"""
_QUARANTINED = 'selector: {matchLabels: {quarantined: "yes"}}, '
_GATEWAY = "bench"
_BINDING = {"istio.io/use-waypoint": _GATEWAY, "istio.io/use-waypoint-namespace": "default"}
_BOUND = f"""\
apiVersion: v1
kind: Service
metadata: {{name: bound, namespace: {_RING}}}
spec: {{selector: {{app: {_RING}}}, ports: [{{name: tcp, port: {_PORT}}}]}}
"""
_ENFORCED_S = 20.0
_START_S = 240.0
_PUBLISHED_S = 900.0
_POLL_S = 1.0
_REST_S = 0.25
"""Between two flips, for which proxies report more often than they do in the long run: nobody flips all the time."""
_DIALLED = 10


@dataclass(frozen=True, slots=True)
class Result:
    """One measure. `p50`, `p99` and `worst` are over `count` samples; what is measured once has only a p50."""

    name: str
    unit: str
    p50: float
    p99: float | None = None
    worst: float | None = None
    count: int = 1


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    changes: int
    simulated: int
    namespaces: int


FULL = Size(changes=100, simulated=1000, namespaces=100)
QUICK = Size(changes=10, simulated=50, namespaces=2)


class Bench:
    """The lab, and what is measured in it, in an order that goes from small to large."""

    def __init__(self, lab: Lab, control: ControlPlane, size: Size, show: Callable[[Result], None]) -> None:
        self._lab = lab
        self._control = control
        self._plane = api.ControlPlane(control.socket)
        self._size = size
        self._show = show
        a, b = lab.host("a"), lab.host("b")
        self._waypoint_host = b
        self._ring = [
            host.workload(f"p{number}", commands.idle(), namespace=_RING, labels={"app": _RING})
            for number, host in enumerate((a, b, a, b))
        ]
        self._bundle = self._ring[0].identity_dir / "bundle.pem"

    def run(self) -> None:
        """Measure everything. Raises LabError."""
        self._lab.start()
        with ExitStack() as stack:
            ring = Ring(self._ring, stack)
            self._policy_changes(ring)
            self._label_changes(ring)
            self._flips(stack)
            self._simulated(stack)
        self._large_mesh()

    # -- four real uProxies

    def _policy_changes(self, ring: Ring) -> None:
        """A DENY of the whole namespace, until the last of the four uProxies has cut its connection."""
        samples = []
        for _ in range(self._size.changes):
            with ring.connections() as held:
                began = time.monotonic()
                self._apply(_DENY.format(namespace=_RING, selector="", rule="{}"))
                samples.append(_resets(held, began)[-1])
            self._delete_policy(_RING)
        self._spread("a policy, until enforced by the last of 4 uProxies", samples)

    def _label_changes(self, ring: Ring) -> None:
        """A label that brings one workload under a DENY, until its uProxy has cut the connection."""
        reference = {"kind": "WorkloadEntry", "namespace": _RING, "name": self._ring[0].name}
        self._apply(_DENY.format(namespace=_RING, selector=_QUARANTINED, rule="{}"))
        samples = []
        for _ in range(self._size.changes):
            with ring.connections() as held:
                began = time.monotonic()
                self._relabel(reference, {"quarantined": "yes"})
                samples += _resets(held[:1], began)
            self._relabel(reference, {"quarantined": None})
        self._delete_policy(_RING)
        self._spread("a label, until enforced by the uProxy concerned", samples)

    def _flips(self, stack: ExitStack) -> None:
        """A service put behind a waypoint and taken from there, until every proxy concerned says that it does so."""
        waypoint = Waypoint(self._control, self._waypoint_host, _GATEWAY)
        waypoint.apply("--admit", "All")
        waypoint.start()
        stack.callback(waypoint.kill)
        self._apply(_BOUND)
        reference = {"kind": "Service", "namespace": _RING, "name": "bound"}
        on: list[float] = []
        off: list[float] = []
        for number in range(2 * self._size.changes):
            bind = number % 2 == 0
            began = time.monotonic()
            self._relabel(reference, _BINDING if bind else dict.fromkeys(_BINDING))
            self._settled(f"{_RING}/bound")
            (on if bind else off).append(time.monotonic() - began)
            time.sleep(_REST_S)
        self._spread("istio.io/use-waypoint set, until enforced by 4 uProxies", on)
        self._spread("istio.io/use-waypoint removed, until all go directly", off)

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
        count = self._size.simulated
        self._apply(fleet.member_entries(count))
        members = fleet.members(self._lab, count)
        half = count // 2
        parts = [Simulation(self._lab, self._control, self._bundle, part) for part in (members[:half], members[half:])]
        for part in parts:
            stack.callback(part.end)
        self._show(Result(f"{count} proxies connect and are whole", "s", max(part.whole(_START_S) for part in parts)))
        each: list[float] = []
        last: list[float] = []
        used = sum(part.cpu_s() for part in parts)
        for number in range(max(5, self._size.changes // 4)):
            began = time.monotonic()
            # Another address each time: the same text would be no change.
            rule = f"from: [{{source: {{ipBlocks: [192.0.2.{number}]}}}}]"
            version = self._apply(_DENY.format(namespace=fleet.NAMESPACE, selector="", rule=f"{{{rule}}}"))
            times = [at - began for part in parts for at in part.applied(version, _START_S)]
            each += times
            last.append(max(times))
        used = sum(part.cpu_s() for part in parts) - used
        self._spread(f"a policy, until applied by each of {count} proxies", each)
        self._spread(f"a policy, until applied by the last of {count} proxies", last)
        self._show(Result("processor time of one proxy for one such change", "ms", 1000 * used / len(each)))

    # -- 10,000 services and 100,000 endpoints

    def _large_mesh(self) -> None:
        namespaces = self._size.namespaces
        services = namespaces * fleet.SERVICES_EACH
        named = f"{services:,} services, {services * fleet.ENDPOINTS_EACH:,} endpoints"
        began = time.monotonic()
        samples = []
        for number in range(namespaces):
            started = time.monotonic()
            self._apply(fleet.large_namespace(number))
            samples.append(time.monotonic() - started)
        self._spread("apply of a namespace: 100 services, 1,000 endpoints", samples)
        self._published()
        self._show(Result(f"{named}: applied and published", "s", time.monotonic() - began))
        self._hosts_agree(services)
        self._show(Result(f"{named}: and in both hosts' kernel maps", "s", time.monotonic() - began))

        self._control.kill()
        shutil.rmtree(self._control.broker_data())
        began = time.monotonic()
        self._control.start()
        self._published()
        self._show(Result("start with an empty broker, until all is published", "s", time.monotonic() - began))

        (member,) = fleet.members(self._lab, 1)
        dialled = [f"n{number % namespaces}/s{number}" for number in range(_DIALLED)]
        every = [f"n{number}/s{index}" for number in range(namespaces) for index in range(fleet.SERVICES_EACH)]
        self._new_subscriber("a new uProxy that dials ten services: whole", {**member, "services": dialled})
        self._new_subscriber("a new proxy that wants every service: whole", {**member, "services": every})
        self._flaps({**member, "services": dialled})
        self._growth()

    def _new_subscriber(self, name: str, member: dict[str, Any]) -> None:
        simulation = Simulation(self._lab, self._control, self._bundle, [member])
        try:
            self._show(Result(name, "s", simulation.whole(_PUBLISHED_S)))
        finally:
            simulation.end()

    def _flaps(self, member: dict[str, Any]) -> None:
        """One endpoint of a service leaves and returns: until a proxy that dials the service knows."""
        reference = {"kind": "WorkloadEntry", "namespace": "n0", "name": "s0-0"}
        simulation = Simulation(self._lab, self._control, self._bundle, [member])
        samples = []
        try:
            simulation.whole(_START_S)
            for number in range(self._size.changes):
                began = time.monotonic()
                self._relabel(reference, {"app": "elsewhere" if number % 2 == 0 else "s0"})
                told = simulation.wait(lambda event: str(event.get("topic", "")).endswith("/s0/s0-0"), _ENFORCED_S)
                samples.append(told["at"] - began)
        finally:
            simulation.end()
        self._spread("one endpoint's flap, until known to who dials it", samples)

    def _growth(self) -> None:
        """Memory of one real uProxy before and after it has dialled ten services of the large mesh."""
        workload = self._ring[0]
        pid = workload.proxy_pid()
        before, demanded = _private_mb(pid), _metric(workload, "uproxy_demanded_services")
        step = self._size.namespaces * fleet.SERVICES_EACH // _DIALLED
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
        self._show(Result("growth of a uProxy that dials ten services", "MB", _private_mb(pid) - before))

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

    def _spread(self, name: str, samples_s: Sequence[float]) -> None:
        ordered = sorted(1000 * sample for sample in samples_s)
        p99 = ordered[len(ordered) * 99 // 100]
        self._show(Result(name, "ms", statistics.median(ordered), p99, ordered[-1], len(ordered)))


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


def _metric(workload: Workload, name: str) -> int:
    """A metric of its uProxy."""
    with workload.entered():
        connection = http.client.HTTPConnection("127.0.0.1", METRICS_PORT, timeout=_ENFORCED_S)
        connection.connect()
    with closing(connection):
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    found = re.search(rf"^{name} (\d+)$", text, re.MULTILINE)
    if found is None:
        raise LabError(f"the uProxy of {workload.name} has no metric {name}")
    return int(found[1])


def _row(result: Result) -> str:
    text = f"{result.name:62} {result.p50:9.1f} {result.unit:3}"
    if result.p99 is not None and result.worst is not None:
        text += f"  p99 {result.p99:8.1f}  worst {result.worst:8.1f}  of {result.count:,}"
    return text


def measure(size: Size, table: TextIO) -> list[Result]:
    """Build the lab, measure, and remove it. Raises LabError."""
    found: list[Result] = []

    def show(result: Result) -> None:
        found.append(result)
        print(_row(result), file=table, flush=True)

    with Lab(control=True) as lab:
        assert lab.control is not None
        Bench(lab, lab.control, size, show).run()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; exit status 1 when something does not work."""
    parser = argparse.ArgumentParser("python -m benchmarks.control", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small mesh and few changes, for a first look")
    parser.add_argument("--output", choices=("table", "json"), default="table")
    options = parser.parse_args(argv)
    try:
        # Programs get JSON on standard output, and whoever waits for it the rows as they come.
        found = measure(QUICK if options.quick else FULL, sys.stderr if options.output == "json" else sys.stdout)
    except (LabError, CommandError, SandboxError, OSError) as error:
        print(f"benchmarks.control: {error}", file=sys.stderr)
        return 1
    if options.output == "json":
        conditions = {"kernel": platform.release(), "python": platform.python_version(), "cores": os.cpu_count()}
        json.dump({"conditions": conditions, "measures": [asdict(one) for one in found]}, sys.stdout, indent=1)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
