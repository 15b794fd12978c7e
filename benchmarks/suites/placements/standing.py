"""Builds all placements in one lab, side by side: callers on host a, called services on host b, the waypoint on host c.

The Envoys' workloads are twins of the uProxies' ones: the same namespaces, links and applications, without capture. The
three placements of Envoys share them, since only one placement has load at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from benchmarks.harness.results import Subject
from benchmarks.lab import cores
from benchmarks.lab.apps import commands
from benchmarks.lab.sources import TRUST_DOMAIN, LabError
from benchmarks.lab.topology import Host, Lab, Workload
from benchmarks.peers import envoy
from benchmarks.peers.place import Place
from benchmarks.suites.placements import envoys
from benchmarks.suites.placements.application import (
    CALLERS,
    HTTP_PORT,
    INSTANCES,
    L4_PORT,
    NEAR,
    NUMBER,
    SERVICE_PORT,
    SERVICES,
    Member,
    application,
    identity,
    member_name,
)
from benchmarks.suites.placements.envoys import (
    INBOUND_PORT,
    L4_OUTBOUND_PORT,
    LOOPBACK,
    OUTBOUND_PORT,
    THROUGH_PORT,
    Endpoint,
    Json,
)
from benchmarks.suites.placements.mesh import (
    BESIDE,
    GATEWAY,
    GATEWAYS,
    OURS,
    RESOURCES,
    WAYPOINT_ADDRESS,
    Ours,
    address_behind,
    called_by,
    install_filter,
    l4_address_beside,
)
from benchmarks.suites.placements.placement import (
    DRAIN_S,
    LOAD_CORE,
    ONE_PASS,
    PLAIN,
    PROXY_CORE,
    Caller,
    Envoy,
    NodeAgent,
    Placement,
    Process,
    UProxy,
    ended,
    until,
)
from bpf import bpffs
from control.api.address import HBONE_PORT
from uproxy.sandbox import NETNS_DIR, Sandbox

_START_S = 30.0
_DRAIN = ("--drain-time-s", str(DRAIN_S), "--drain-strategy", "immediate")
"""Of Envoys."""
_FILTERS = "filters"
"""Directory of the lab's own."""
_LABELS = {
    "sidecar": "Envoy per workload",
    ONE_PASS: "Envoy per workload, one L7 pass",
    "node": "Envoy per node",
    "service-account": "Envoy per service account and node",
    "remote": "uProxy per workload, remote Envoy",
    "remote-l4": "uProxy per workload, no L7",
    "ours": "uProxy per workload, our waypoint remote",
    "ours-node": "uProxy per workload, our waypoint per node",
    "ours-service-account": "uProxy per workload, our waypoint per service account and node",
    BESIDE: "uProxy per workload, our waypoint beside it",
    PLAIN: "no proxy",
}
_DESCRIPTIONS = {
    "sidecar": "An Envoy in each workload's namespace holds that workload's key; its caller reaches it on loopback. "
    "Two L7 passes: routes at the caller, policy at the callee, HTTP/1.1 in mTLS between them.",
    ONE_PASS: "The same Envoys, whose callers' ends carry connections in mTLS unread. One L7 pass, at the callee: "
    "policy and who calls. It has no routes by path, which a waypoint has. Nobody deploys it; it reads HTTP as often "
    "as a waypoint.",
    "node": "One Envoy per host serves all workloads there, holds a key for each of their service accounts, and proves "
    "to be whom it serves; callers reach it at the host's address. Two L7 passes, as with sidecars.",
    "service-account": "One Envoy per service account and host, in a namespace of its own, holds that account's key; "
    "callers reach it at its address. Two L7 passes, as with sidecars.",
    "remote": "A uProxy in each workload's namespace, captured by eBPF, holds that workload's key. The waypoint, an "
    "Envoy on a third host, holds its own, and sees all requests in the clear. One L7 pass; HBONE before and behind "
    "it. The two hosts' node agents are counted; the launchers (`uproxy exec`), in a pod the runtime's work, are not.",
    "remote-l4": "The same uProxies, for services that no label sends through the waypoint: L4 policy, no L7 pass.",
    "ours": "As remote, with `waypoint run` in the Envoy's place.",
    "ours-node": "The same uProxies. The Gateway has placement `node`, and one `waypoint run` on the called host, "
    "which holds the Gateway's key. One L7 pass.",
    "ours-service-account": "As ours-node, with placement `service-account`: a `waypoint run` for each service account "
    "that is called, which holds that account's key.",
    BESIDE: "The same callers' uProxies, and called workloads of their own. The Gateway has placement `sidecar`: each "
    "of their uProxies starts a process beside its workload, which holds no key. One L7 pass, at the callee; its "
    "routes lead to that workload alone. No bad filter is measured: none can be given to what a uProxy starts here.",
    PLAIN: "No proxy: each caller dials one instance.",
}


@dataclass(frozen=True, slots=True)
class Site:
    """What stands."""

    placements: Mapping[str, Placement]
    """By name; PLAIN has no proxy."""
    workloads: Mapping[str, Workload]
    """The uProxies' ones by name: their access logs say who called."""


@dataclass(frozen=True, slots=True)
class _Twin:
    """A workload of the Envoys' placements."""

    member: Member
    host: Host
    box: Sandbox


@dataclass(frozen=True, slots=True)
class _Seat:
    """Where an Envoy runs, and for whom. Callers reach it at `entry`, other proxies at `address`."""

    name: str
    host: Host
    netns: Path
    entry: str
    address: str
    members: tuple[Member, ...]

    @property
    def role(self) -> str:
        return _role([one.account for one in self.members])


def stand(lab: Lab, progress: Callable[[str], None], *, further: bool = True) -> Site:
    """Start everything in a new lab, and return when all of it is ready. Raises LabError.

    `further`: our waypoints too, and sidecars with one pass.
    """
    a, b, c = lab.host("a"), lab.host("b"), lab.host("c")
    accounts = [(a, one.caller) for one in SERVICES] + [(b, one.name) for one in SERVICES]
    everybody = [(host, account, number + 1) for host, account in accounts for number in range(INSTANCES)]
    near = [(b, one.caller, NEAR) for one in SERVICES]
    everybody += near
    workloads = [_workload(*one) for one in everybody]
    called = [(b, one.name, number + 1) for one in SERVICES for number in range(INSTANCES)]
    beside = [_workload(*one, BESIDE) for one in called] if further else []
    twins = [_twin(*one) for one in everybody]
    seats = {
        "sidecar": [
            _Seat(t.member.name, t.host, t.box.netns_path, LOOPBACK, t.member.address, (t.member,)) for t in twins
        ],
        "node": [_node_seat(host, twins) for host in (a, b)],
        "service-account": [
            _account_seat(host, account, twins) for host, account in (*accounts, *((h, name) for h, name, _ in near))
        ],
    }
    install_filter(lab.directory / _FILTERS)
    waypoint_box = c.place(GATEWAY, WAYPOINT_ADDRESS)
    lab.configure(RESOURCES)
    lab.start(progress)
    applications = [_serve(lab, twin) for twin in twins if not twin.member.calls]
    running = {name: _beside(lab, name, group) for name, group in seats.items()}
    key = issue_key(lab, GATEWAY, GATEWAY)
    config = envoys.waypoint(WAYPOINT_ADDRESS, _tunnels(workloads), key, admin_socket(lab, GATEWAY))
    waypoint = start_envoy(lab, config, GATEWAY, "waypoint", "c", waypoint_box.netns_path, len(SERVICES) * INSTANCES)
    waypoints = [_start_ours(lab, one, {"b": b, "c": c}[one.host]) for one in OURS] if further else []
    every = [waypoint, *(one for group in running.values() for one in group)]
    lab.wait([one.ready for one in every], _START_S, "the Envoys")
    progress(f"running: {len(every)} Envoys")
    callers = [one for one in workloads if _member(one).calls]
    uproxies = _uproxies(workloads, (a, b))
    with_beside = _uproxies([*callers, *beside], (a, b)) if further else []
    cores.pin((one.pid for one in (*uproxies, *waypoints, *with_beside)), PROXY_CORE)
    captured = [_pid(one.data) for one in workloads if not _member(one).calls]
    captured_beside = [_pid(one.data) for one in beside]
    cores.pin([*captured, *captured_beside], LOAD_CORE)
    versions = f"Envoy {waypoint.version()}", f"uProxy {version('uproxy-mesh')}"
    made = [
        _of_envoys(lab, group, twins, running[name], applications, _subject(name, versions[0]))
        for name, group in seats.items()
    ]
    if further:
        made.append(_one_pass(next(one for one in made if one.subject.name == "sidecar")))
    for name, members, services in (
        ("remote", [*uproxies, waypoint], {one.name: (one.address, SERVICE_PORT) for one in SERVICES}),
        ("remote-l4", uproxies, {one.name: (one.l4_address, SERVICE_PORT) for one in SERVICES}),
    ):
        subject = _subject(name, " and ".join(reversed(versions)) if name == "remote" else versions[1])
        l4 = {one.name: one.l4_address for one in SERVICES}
        made.append(Placement(subject, _uproxy_callers(lab, workloads, services, l4), members, captured))
    if further:
        made += [
            _of_ours(lab, gateway, uproxies, waypoints, workloads, captured, versions[1])
            for gateway in GATEWAYS
            if gateway != BESIDE
        ]
        made.append(_of_ours(lab, BESIDE, with_beside, [], workloads, captured_beside, versions[1]))
    made.append(_plain(lab, twins, applications))
    return Site({one.subject.name: one for one in made}, {one.name: one for one in (*workloads, *beside)})


def _workload(host: Host, account: str, number: int, gateway: str = GATEWAY) -> Workload:
    """One that uProxies serve; `gateway`: behind which it is called."""
    app = commands.idle() if account in CALLERS else application(account, number)
    service = called_by(gateway, account)
    return host.workload(
        member_name(service, number),
        app,
        service_account=account,
        labels={"service": service, NUMBER: str(number)},
        launch=("--upgrade-drain-timeout-s", str(DRAIN_S)),
    )


def _member(workload: Workload) -> Member:
    return Member(workload.identity.service_account, int(workload.name.rpartition("-")[2]), workload.address)


def _twin(host: Host, account: str, number: int) -> _Twin:
    box = host.twin(f"{member_name(account, number)}-twin")
    return _Twin(Member(account, number, box.addresses[0]), host, box)


def _serve(lab: Lab, twin: _Twin) -> int:
    """Start a twin's application; its process id."""
    data = lab.directory / "data" / twin.box.workload
    data.mkdir(parents=True)
    argv = application(twin.member.account, twin.member.number).argv(twin.member.address, data)
    # In a session of its own, as a workload's: the kernel may share processors out by session (sched_autogroup).
    lab.spawn(["setsid", "taskset", "-c", str(LOAD_CORE), *argv], twin.box.netns_path, stdin=subprocess.DEVNULL)
    lab.wait([lambda: bool(_pid(data))], _START_S, f"{twin.member.name}'s nginx")
    return _pid(data)


def _pid(data: Path) -> int:
    """Of the nginx whose data is there, once it listens; 0 before."""
    try:
        return int((data / "nginx.pid").read_text() or 0)
    except FileNotFoundError:
        return 0


def _node_seat(host: Host, twins: Sequence[_Twin]) -> _Seat:
    members = tuple(one.member for one in twins if one.host is host)
    address = host.underlay_address
    return _Seat(f"node-{host.name}", host, NETNS_DIR / host.netns, address, address, members)


def _account_seat(host: Host, account: str, twins: Sequence[_Twin]) -> _Seat:
    box = host.twin(f"{account}-proxy")
    members = tuple(one.member for one in twins if one.host is host and one.member.account == account)
    return _Seat(f"{account}-{host.name}", host, box.netns_path, box.addresses[0], box.addresses[0], members)


def _beside(lab: Lab, name: str, seats: Sequence[_Seat]) -> list[Envoy]:
    """Start the Envoys of one placement."""
    endpoints = {
        service.name: [
            Endpoint(member, seat.address, INBOUND_PORT + number)
            for seat in seats
            for number, member in enumerate(seat.members)
            if member.account == service.name
        ]
        for service in SERVICES
    }
    started = []
    for seat in seats:
        label = f"{name}.{seat.name}"
        keys = {one.account: issue_key(lab, label, one.account) for one in seat.members}
        config = envoys.beside(seat.entry, seat.address, seat.members, endpoints, keys, admin_socket(lab, label))
        called = sum(1 for one in seat.members if not one.calls)
        started.append(start_envoy(lab, config, label, seat.role, seat.host.name, seat.netns, called))
    return started


def _tunnels(workloads: Sequence[Workload]) -> dict[str, list[Endpoint]]:
    """Where the waypoint reaches each service: its uProxies."""
    members = [_member(one) for one in workloads]
    return {
        service.name: [Endpoint(one, one.address, HBONE_PORT) for one in members if one.account == service.name]
        for service in SERVICES
    }


def map_pins(host: Host) -> Path:
    """The directory of the pinned maps of a host's node agent."""
    return bpffs.node_directory(host.lab.names.node(host.name)) / "maps"


def issue_key(lab: Lab, label: str, account: str) -> Path:
    """A key of one Envoy's own, for a service account that it speaks for."""
    directory = lab.directory / "keys" / label / account
    if not directory.exists():
        lab.issue(identity(account), directory)
    return directory


def admin_socket(lab: Lab, label: str) -> Path:
    return lab.directory / "envoy" / f"{label}.sock"


def start_envoy(lab: Lab, config: Json, label: str, role: str, host: str, netns: Path, believed_by: int) -> Envoy:
    first = admin_socket(lab, label)
    first.parent.mkdir(exist_ok=True)
    log = first.with_suffix(".log")

    def start(admin: Path) -> subprocess.Popen[bytes]:
        written = admin.with_suffix(".json")
        written.write_text(json.dumps(config | {"admin": {"address": {"pipe": {"path": str(admin)}}}}, indent=1))
        # In a session of its own, as a uProxy.
        argv = ["setsid", "taskset", "-c", str(PROXY_CORE), *envoy.argv(written), *_DRAIN]
        with log.open("ab") as output:
            return lab.spawn(argv, netns, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    return Envoy(label, role, host, first, log, start, believed_by)


def _uproxies(workloads: Sequence[Workload], hosts: Sequence[Host]) -> list[Process]:
    """The uProxies and the node agents."""
    found: list[Process] = [
        UProxy(
            one.name,
            _role([_member(one).account]),
            one.host.name,
            one.proxy_pid(),
            one.box.netns_path,
            partial(_upgrade, one),
            0 if _member(one).calls else 1,
        )
        for one in workloads
    ]
    for host in hosts:
        assert host.agent is not None
        found.append(NodeAgent(f"node-{host.name}", "node agent", host.name, host.agent.pid, map_pins(host)))
    return found


def _upgrade(workload: Workload) -> int:
    """As an operator does it."""
    state = workload.host.lab.directory / "state"
    former = workload.proxy_pid()
    command = [sys.executable, "-I", "-m", "uproxy", "upgrade", workload.name, "--state-dir", str(state)]
    told = subprocess.run(command, check=False, capture_output=True, text=True)
    if told.returncode:
        raise LabError(f"{told.stderr.strip()}\n{workload.logs()}")
    until(lambda: not Path("/proc", str(former)).exists(), f"the end of {workload.name}'s former uProxy")
    pid = workload.proxy_pid()
    cores.pin([pid], PROXY_CORE)
    return pid


def _start_ours(lab: Lab, one: Ours, host: Host) -> UProxy:
    """Start a process of one of our waypoints, and return when it listens."""
    identity_dir = lab.directory / "identities" / one.name
    lab.issue(identity(one.identity), identity_dir)
    place = Place(lab, host.place(one.name, one.address), identity(one.identity), identity_dir)
    argv = [
        *(sys.executable, "-P", "-m", "waypoint", "run", "--workload", f"default/{one.name}", "--gateway", one.gateway),
        *("--trust-domain", TRUST_DOMAIN, "--config", str(lab.directory / "mesh.yaml")),
        *("--identity-dir", str(identity_dir), "--access-log", "off", "--take-over"),
        *("--upgrade-drain-timeout-s", str(DRAIN_S)),
    ]
    running: list[subprocess.Popen[bytes]] = []

    def start() -> int:
        command = argv if not running else ["taskset", "-c", str(PROXY_CORE), *argv]
        process = place.start(command, [(one.address, HBONE_PORT)], {"PYTHONPATH": str(lab.directory / _FILTERS)})
        for former in running:
            ended(former, f"the former process of {one.name}")
        running[:] = [process]
        return process.pid

    believing = [service for service in SERVICES if one.account in ("", service.name)]
    return UProxy(
        one.name, "waypoint", one.host, start(), place.box.netns_path, start, believed_by=len(believing) * INSTANCES
    )


def _of_ours(
    lab: Lab,
    gateway: str,
    uproxies: Sequence[Process],
    waypoints: Sequence[UProxy],
    workloads: Sequence[Workload],
    applications: Sequence[int],
    program: str,
) -> Placement:
    """One of our waypoints between the uProxies."""
    names = {one.name for one in OURS if one.gateway == gateway}
    entries, busy_entries = (
        {one.name: (address_behind(gateway, one, busy=busy), SERVICE_PORT) for one in SERVICES}
        for busy in (False, gateway != BESIDE)
    )
    l4 = {one.name: l4_address_beside(one) if gateway == BESIDE else one.l4_address for one in SERVICES}
    members = [*uproxies, *(one for one in waypoints if one.name in names)]
    return Placement(
        _subject(gateway, program), _uproxy_callers(lab, workloads, entries, l4, busy_entries), members, applications
    )


def _uproxy_callers(
    lab: Lab,
    workloads: Sequence[Workload],
    entries: Mapping[str, tuple[str, int]],
    l4: Mapping[str, str],
    busy_entries: Mapping[str, tuple[str, int]] | None = None,
) -> list[Caller]:
    l4_entries = {name: (address, SERVICE_PORT) for name, address in l4.items()}
    found = [(_member(one), one.box) for one in workloads]
    return [Caller(lab, member, box, entries, l4_entries, busy_entries or {}) for member, box in found if member.calls]


def _role(accounts: Iterable[str]) -> str:
    return "client proxy" if set(accounts) <= CALLERS else "server proxy"


def _subject(name: str, program: str = "") -> Subject:
    return Subject(name, _LABELS[name], _DESCRIPTIONS[name], program, reference=name == PLAIN)


def _plain(lab: Lab, twins: Sequence[_Twin], applications: Sequence[int]) -> Placement:
    """Each caller and an instance of each service, without a proxy."""
    callees = {(one.member.account, one.member.number): one.member.address for one in twins}
    callers = []
    for twin in twins:
        if twin.member.calls:
            called = {one.name: callees[one.name, (twin.member.number - 1) % INSTANCES + 1] for one in SERVICES}
            entries = {name: (address, HTTP_PORT) for name, address in called.items()}
            l4_entries = {name: (address, L4_PORT) for name, address in called.items()}
            callers.append(Caller(lab, twin.member, twin.box, entries, l4_entries))
    return Placement(_subject(PLAIN), callers, [], applications)


def _one_pass(sidecars: Placement) -> Placement:
    through = {one.name: (LOOPBACK, THROUGH_PORT + number) for number, one in enumerate(SERVICES)}
    callers = [replace(one, entries=through) for one in sidecars.callers]
    return replace(sidecars, subject=_subject(ONE_PASS, sidecars.subject.version), callers=callers)


def _of_envoys(
    lab: Lab,
    seats: Sequence[_Seat],
    twins: Sequence[_Twin],
    running: Sequence[Process],
    applications: Sequence[int],
    subject: Subject,
) -> Placement:
    boxes = {one.member: one.box for one in twins}
    callers = [
        Caller(
            lab,
            member,
            boxes[member],
            {one.name: (seat.entry, OUTBOUND_PORT) for one in SERVICES},
            {one.name: (seat.entry, L4_OUTBOUND_PORT + number) for number, one in enumerate(SERVICES)},
        )
        for seat in seats
        for member in seat.members
        if member.calls
    ]
    return Placement(subject, callers, running, applications)
