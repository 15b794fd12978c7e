"""`uproxy node`: keeps the kernel maps of a host equal to the mesh's state, and puts workloads under capture.

Start: pin directory → programs and maps → ranges → workloads of an earlier agent → configuration → maps whole → socket.
The socket's existence thus says that everything before it has succeeded. End: nothing is detached.
Configuration comes from files, or from the control plane that this node has joined: all the mesh's addresses, and
nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import signal
import sys
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from bpf import bpffs, layout
from bpf.bpffs import PinError
from bpf.libbpf import BpfError
from bpf.loader import Loader, LoadError
from bpf.maps import Level, Maps
from control.api.address import AddressError, IpAddress, parse_address
from control.api.identity import SpiffeId, make_id, parse_trust_domain
from control.api.policy import DEFAULT_ROOT_NAMESPACE
from control.api.records import RecordError
from control.api.status import Kind
from control.client.files import ConfigError, FileSource
from control.client.membership import Membership
from control.client.state import State
from uproxy import admin, cgroup, joining
from uproxy.capture.ranges import MeshRanges
from uproxy.cgroup import SandboxError
from uproxy.credentials import CurrentCredentials
from uproxy.joining import JoinError
from uproxy.node import datagrams, metrics, peers, server, waypoints
from uproxy.node.channel import SOCKET_NAME
from uproxy.node.client import DEFAULT_SOCKET
from uproxy.node.destroy import Found
from uproxy.node.grants import Grants
from uproxy.node.metrics import METRICS_PORT
from uproxy.node.places import Cgroup, NetworkNamespace, PlaceError
from uproxy.node.probers import Probers
from uproxy.node.server import ListenError, RequestError
from uproxy.node.sync import Sync, SyncError
from uproxy.node.waypoints import Waypoints
from uproxy.node.workloads import Captured, Registration, RegistrationError, Workloads, check_removable
from uproxy.tls import CredentialsError

_log: Final = logging.getLogger("uproxy.node")

ALLOW_ANY: Final = "allow-any"
REGISTRY_ONLY: Final = "registry-only"

_SWEEP_INTERVAL_S: Final = 10.0
_LOOKS: Final = 3  # for connected sockets to be ended: at once, then in two sweeps, the last a whole interval later
_STATE_DIR: Final = Path("/var/lib/uproxy-node")
_NODE_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MAX_LISTED: Final = 500  # workloads in a status, which must fit one message
# <linux/capability.h>. The last three are for a workload's place: entering its namespace, opening its cgroup by id, and
# finding its namespace by a process of another user.
_CAPABILITIES: Final = {
    "CAP_NET_ADMIN": 12,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
    "CAP_SYS_ADMIN": 21,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_SYS_PTRACE": 19,
}
# Likewise, with `--waypoints`: a uid and a directory of its own for each process, and being told to end.
_STARTING: Final = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
}
_REGISTER_FIELDS: Final[Mapping[str, type]] = {
    "workload": str,
    "namespace": str,
    "service_account": str,
    "address": list,
    "dns": bool,
}


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    name: str
    config: tuple[Path, ...]
    """Empty when the control plane configures this node."""
    identity_dir: Path
    join: Path | None
    """The token file to join with, should the identity directory hold no usable identity."""
    trust_domain: str
    ranges: MeshRanges
    egress: str
    run_dir: Path
    probe_cgroups: tuple[Path, ...]
    metrics: tuple[str, int] | None
    """Address and port; None: no metrics."""
    remove: bool
    waypoints: Path | None = None
    """Where the directories of waypoint processes are; None: it starts none."""
    waypoint_options: Path | None = None
    cgroup_root: Path | None = None
    """Where their cgroups are; None: in a directory of the hierarchy."""


class Agent:
    """Answers requests and takes configuration, on maps and links that are open already."""

    def __init__(
        self,
        options: Options,
        loader: Loader,
        sync: Sync,
        workloads: Workloads,
        probers: Probers,
        waypoints: Waypoints | None = None,
    ) -> None:
        """`waypoints`: None when it starts none."""
        self._options = options
        self.waypoints = waypoints
        self._maps: Maps = loader.maps
        self._sync = sync
        self._workloads = workloads
        self._probers = probers
        self._state = State(options.trust_domain)
        self.grants = Grants(loader.maps, workloads.captured, self._identity_at)
        self.configured = asyncio.Event()
        """Set once configuration is in the kernel."""
        self._config_error = ""
        self._levels: Mapping[str, Level] = {}
        self._unended: dict[str, str] = {}
        """Workload → why its UDP sockets could not be looked at."""
        self._looks = 0
        """How often these are still to be looked at."""
        self._lagging = True
        """Whether the maps may differ from the state: at first, as an earlier agent left them, and after a failure."""

    def apply(self, batch: Sequence[tuple[str, bytes]]) -> None:
        """Takes configuration: into the state, then into the kernel. Raises RecordError, SyncError or BpfError."""
        changes = self._state.apply(batch)
        if self._lagging or changes.addresses:
            changed = None if self._lagging else changes.addresses
            self._lagging = True  # a failure may leave it half done
            written = self._sync.apply(self._state, changed)
            self._lagging = False
            if self.waypoints is not None:
                self.waypoints.take(self._state, changed)
            if self._sync.narrowed:
                self._end_datagrams()
            _log.info("configuration in force: %d map entries changed, %s", written, self._sync.sizes())
        self._config_error = ""
        self.configured.set()
        self.grants.changed()

    def take_over(self) -> None:
        """Once configured: the workloads of an agent of another schema."""
        self._workloads.take_over()

    def on_batch(self, batch: Sequence[tuple[str, bytes]]) -> None:
        """As `apply`, while running: what cannot be applied is reported, and what was in force stays."""
        try:
            self.apply(batch)
        except (RecordError, SyncError, BpfError) as error:
            self.on_error(error)

    def on_error(self, error: Exception) -> None:
        self._config_error = str(error)
        _log.error("configuration refused, the last good one stays in force: %s", error)

    def handle(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> dict[str, Any]:
        """Answers a request of `client`. Raises RequestError."""
        try:
            match request.get("op"):
                case "register":
                    self._register(request, descriptors)
                    self._sync.apply_answering(self._state)
                    self.grants.changed()
                    return {}
                case "unregister":
                    self._workloads.unregister(_field(request, "workload", str))
                    self._sync.apply_answering(self._state)
                    self.grants.changed()
                    return {}
                case "status":
                    self.measure()
                    return self._status()
                case other:
                    raise RequestError(f"unknown op {other!r}; there are register, unregister and status")
        except (PlaceError, RegistrationError, AddressError) as error:
            raise RequestError(str(error)) from None

    def problems(self) -> list[str]:
        """What somebody should look at."""
        config = [self._config_error] if self._config_error else []
        full = metrics.alarms(self._levels).values()
        unended = [f"workload {name}: its UDP sockets: {why}" for name, why in sorted(self._unended.items())]
        waypoints = self.waypoints.problems() if self.waypoints is not None else ()
        return [*config, *full, *unended, *self._workloads.problems(), *self._probers.problems(), *waypoints]

    def measure(self) -> None:
        """Looks how full the maps are. The log names each map once when it is nearly full."""
        before = metrics.alarms(self._levels)
        self._levels = self._maps.levels(self._sync.sizes())
        for name, alarm in metrics.alarms(self._levels).items():
            if name not in before:
                _log.error("%s", alarm)

    def metrics(self) -> bytes:
        self.measure()
        settings = self._maps.settings.read()
        return metrics.render(
            metrics.Values(
                workloads=len(self._workloads.captured()),
                whole=settings.whole,
                generation=settings.generation,
                problems=len(self.problems()),
                verdicts=self._maps.counters.read(),
                levels=self._levels,
            )
        )

    def pending(self) -> list[str]:
        """What it is not ready for yet."""
        return [] if self.configured.is_set() else ["config"]

    async def sweep(self) -> None:
        """Looks now and then for workloads that ended without saying so, and for probers, until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_INTERVAL_S)
            try:
                self.measure()
                self._workloads.sweep()
                if self.configured.is_set():
                    self._workloads.take_over()
                    self._sync.apply_answering(self._state)
                    self._end_datagrams()
                self.grants.changed()
            except OSError as error:
                _log.warning("dead workloads cannot be swept: %s", error)
            try:
                self._probers.look()
            except (OSError, PlaceError) as error:
                _log.warning("the cgroups of probers cannot be looked at: %s", error)

    def _register(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        name, namespace, service_account, texts, dns = (
            _field(request, field, kind) for field, kind in _REGISTER_FIELDS.items()
        )
        probe_ports = _field(request, "probe_port", list) if "probe_port" in request else []
        unknown = request.keys() - _REGISTER_FIELDS.keys() - {"op", "probe_port"}
        if unknown:
            raise RequestError(f"register: unknown field {min(unknown)!r}")
        if len(descriptors) != 3:
            raise RequestError(
                "register: needs three descriptors: app cgroup, proxy cgroup, network namespace; "
                f"{len(descriptors)} came"
            )
        addresses = tuple(parse_address(text) for text in texts if isinstance(text, str))
        if len(addresses) != len(texts):
            raise RequestError("register: address must be a list of text")
        if not all(type(port) is int for port in probe_ports):
            raise RequestError("register: probe_port must be a list of numbers")
        for address in addresses:
            self._check_address(address, namespace, service_account)
        app, proxy, netns = descriptors
        app_cgroup, proxy_cgroup = Cgroup.of(app, "app cgroup"), Cgroup.of(proxy, "proxy cgroup")
        self._probers.check(app_cgroup)
        self._probers.check(proxy_cgroup)
        self._workloads.register(
            Registration(
                name,
                addresses,
                app_cgroup,
                proxy_cgroup,
                NetworkNamespace.of(netns),
                dns,
                tuple(probe_ports),
            )
        )

    def _end_datagrams(self) -> None:
        """Ends connected UDP sockets that may not be connected so any more, if there may be such.

        A connect() that was asked before the maps changed may be done only after a look, so the sweeps look again.
        Raises nothing: what cannot be ended is a problem, and is tried again.
        """
        if self._sync.narrowed:
            self._sync.narrowed = False
            self._looks = _LOOKS
        if not self._looks:
            return
        self._unended = {}
        for workload in self._workloads.captured():
            try:
                ended = datagrams.end(workload, self._may_not_send)
            except OSError as error:
                self._unended[workload.name] = f"{error}; restart it: they may send where they no longer may"
                continue
            if ended:
                _log.info("workload %s: %d UDP sockets ended, whose datagrams may not pass", workload.name, ended)
        self._looks -= not self._unended

    def _may_not_send(self, workload: Captured, found: Found) -> bool:
        """As `datagram_verdict` in bpf/sock.h, of an address in the mesh."""
        address, port = found.remote
        return (
            address not in workload.addresses
            and not self._sync.passes(address, port)
            and not self._sync.answers(workload.netns_cookie, found.local[1])
        )

    def _identity_at(self, address: IpAddress) -> SpiffeId | None:
        workload = self._state.workload_at(address)
        return workload.identity if workload is not None else None

    def captured(self) -> Sequence[Captured]:
        """The workloads of the moment."""
        return self._workloads.captured()

    def _check_address(self, address: IpAddress, namespace: str, service_account: str) -> None:
        if not self._options.ranges.captures(address):
            raise RequestError(
                f"address {address} is outside the mesh's ranges ({', '.join(self._options.ranges.mesh)}): others "
                "would reach it in plaintext; choose one inside, or start the agent with a --mesh-cidr that has it"
            )
        known = self._state.workload_at(address)
        if known is not None and (known.namespace, known.service_account) != (namespace, service_account):
            raise RequestError(
                f"address {address} is that of workload {known.key} (service account {known.service_account}) in the "
                f"configuration, not of namespace {namespace}, service account {service_account}"
            )

    def _status(self) -> dict[str, Any]:
        settings = self._maps.settings.read()
        captured = self._workloads.captured()
        sizes = self._sync.sizes()
        return {
            "node": self._options.name,
            "schema": layout.SCHEMA,
            "whole": settings.whole,
            "generation": settings.generation,
            "services": sizes["services"],
            "addresses": sizes["workloads"],
            "ranges": {"mesh": list(self._options.ranges.mesh), "excluded": list(self._options.ranges.excluded)},
            "egress": self._options.egress,
            "counters": self._maps.counters.read(),
            "pending": len(self._maps.orig),
            "workload_count": len(captured),
            "workloads": [
                {
                    "workload": one.name,
                    "address": list(one.addresses),
                    "app_cgroup": one.app_cgroup,
                    "netns": one.netns_ino,
                    "dns": one.dns,
                }
                for one in captured[:_MAX_LISTED]
            ],
            **self.grants.status(),
            "error": "; ".join(self.problems()),
        }


def _field(request: Mapping[str, Any], name: str, kind: type) -> Any:
    value = request.get(name)
    if not isinstance(value, kind):
        raise RequestError(f"{request.get('op')}: field {name!r} must be a {kind.__name__}")
    return value


def _parse(argv: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        "uproxy node",
        description="Runs until SIGTERM. What it put into the kernel stays in force without it; --remove ends that.",
    )
    parser.add_argument("--name", required=True, help="of this node; also names its pins, so that agents can be many")
    parser.add_argument(
        "--join",
        type=Path,
        metavar="FILE",
        help="join a mesh with this token, unless this node has; FILE need not exist any more then",
    )
    parser.add_argument(
        "--identity-dir",
        type=Path,
        metavar="DIR",
        help=f"of a node that has joined: its certificate and the last good configuration (default: {_STATE_DIR}/NAME)",
    )
    parser.add_argument(
        "--config",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="without a control plane: the mesh's resources (YAML)",
    )
    parser.add_argument("--trust-domain", metavar="NAME", help="with --config; default: cluster.local")
    parser.add_argument(
        "--mesh-cidr", nargs="+", action="extend", default=[], metavar="CIDR", help="ranges of VIPs and workloads"
    )
    parser.add_argument(
        "--exclude-cidr", nargs="+", action="extend", default=[], metavar="CIDR", help="ranges that are left alone"
    )
    parser.add_argument(
        "--egress",
        choices=(ALLOW_ANY, REGISTRY_ONLY),
        default=ALLOW_ANY,
        help="what becomes of connections that leave the mesh: left alone, or, with registry-only, refused unless an "
        "--exclude-cidr has the address (default: %(default)s)",
    )
    parser.add_argument(
        "--run-dir", type=Path, default=DEFAULT_SOCKET.parent, help="where the socket node.sock is made"
    )
    parser.add_argument(
        "--probe-cgroup",
        action="append",
        type=Path,
        default=[],
        metavar="PATH",
        help="a cgroup2 directory (below the hierarchy's root, or absolute) whose connections are let in to the ports "
        "that workloads declare for health probes, such as the kubelet's; it may come and go",
    )
    parser.add_argument(
        "--metrics",
        default=f"127.0.0.1:{METRICS_PORT}",
        metavar="ADDRESS:PORT",
        help="where metrics and readiness are served; `off`: nowhere (default: %(default)s)",
    )
    parser.add_argument(
        "--waypoints",
        nargs="?",
        type=Path,
        const=waypoints.DEFAULT_DIRECTORY,
        metavar="DIR",
        help="start the waypoint processes that are declared for this node, and keep their identities in directories "
        f"of DIR (default: {waypoints.DEFAULT_DIRECTORY})",
    )
    parser.add_argument(
        "--waypoint-options", type=Path, metavar="FILE", help="more options of `waypoint run`, for all of them"
    )
    parser.add_argument(
        "--cgroup-root",
        type=Path,
        metavar="DIR",
        help=f"of the waypoint processes (default: {waypoints.CGROUP_ROOT}/ in the cgroup2 hierarchy)",
    )
    parser.add_argument(
        "--remove",
        action="store_true",
        help="detach and unpin everything of this node, once no workload runs, and exit",
    )
    given = parser.parse_args(argv)
    if not _NODE_NAME.fullmatch(given.name):
        parser.error(f"--name {given.name!r}: use 1-63 of a-z, 0-9 and '-', with a letter or digit at both ends")
    if not given.remove and not given.mesh_cidr:
        parser.error("--mesh-cidr is needed: without a range of its own nothing belongs to the mesh")
    if given.config and (given.join or given.identity_dir):
        parser.error("--join and --identity-dir belong to a control plane, which configures instead of --config")
    if given.config and given.waypoints:
        parser.error("--waypoints belongs to a control plane, which gives each process its identity")
    if (given.waypoint_options or given.cgroup_root) and not given.waypoints:
        parser.error("--waypoint-options and --cgroup-root belong to --waypoints")
    if given.trust_domain and not given.config:
        parser.error("--trust-domain belongs to --config: a node that has joined knows it")
    try:
        trust_domain = parse_trust_domain(given.trust_domain or "cluster.local")
        ranges = MeshRanges.parse(given.mesh_cidr, given.exclude_cidr)
        operators = _metrics_address(given.metrics)
    except ValueError as error:
        parser.error(str(error))
    return Options(
        name=given.name,
        config=tuple(given.config),
        identity_dir=given.identity_dir or _STATE_DIR / given.name,
        join=given.join,
        trust_domain=trust_domain,
        ranges=ranges,
        egress=given.egress,
        run_dir=given.run_dir,
        probe_cgroups=tuple(given.probe_cgroup),
        metrics=operators,
        remove=given.remove,
        waypoints=given.waypoints.absolute() if given.waypoints else None,
        waypoint_options=given.waypoint_options.absolute() if given.waypoint_options else None,
        cgroup_root=given.cgroup_root,
    )


def _metrics_address(text: str) -> tuple[str, int] | None:
    """Raises ValueError."""
    if text == "off":
        return None
    address, _, port = text.rpartition(":")
    if not address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"--metrics {text!r}: use ADDRESS:PORT, as in 127.0.0.1:{METRICS_PORT}, or off")
    return parse_address(address.removeprefix("[").removesuffix("]")), int(port)


def _places(options: Options) -> waypoints.Settings | None:
    """Where its waypoint processes are; None: it has none. Raises SandboxError."""
    if options.waypoints is None:
        return None
    mount = cgroup.mount_point()
    root = options.cgroup_root or mount / waypoints.CGROUP_ROOT
    if not root.is_relative_to(mount) or root == mount:
        raise SandboxError(f"--cgroup-root {root} is not below the cgroup2 hierarchy at {mount}")
    return waypoints.Settings(options.waypoints, root, options.identity_dir, options.waypoint_options)


def _missing_privileges(options: Options) -> str:
    """The capabilities that are needed and this process has not; empty when all is there."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    effective = int(found[1], 16) if found else 0
    needed = _CAPABILITIES | (_STARTING if options.waypoints is not None else {})
    return ", ".join(name for name, bit in needed.items() if not effective >> bit & 1)


async def _run(agent: Agent, options: Options, feed: Coroutine[Any, Any, None]) -> None:
    """Serve until SIGTERM, from when the agent is configured; `feed` keeps it so. Raises ListenError."""
    path = options.run_dir / DEFAULT_SOCKET.name
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    failed: Exception | None = None
    with ExitStack() as stack:
        try:
            async with asyncio.TaskGroup() as group:
                stopped = group.create_task(stop.wait())
                configured = group.create_task(agent.configured.wait())
                tasks = [configured, group.create_task(feed), group.create_task(agent.sweep())]
                if options.metrics:
                    tasks.append(group.create_task(_listen_to_operators(agent, *options.metrics)))
                await asyncio.wait((stopped, configured), return_when=asyncio.FIRST_COMPLETED)
                if not stop.is_set():
                    agent.take_over()
                    listener = stack.enter_context(server.listen(path))
                    stack.callback(path.unlink, missing_ok=True)
                    tasks.append(group.create_task(server.serve(listener, agent.handle)))
                    channels = options.run_dir / SOCKET_NAME
                    for_uproxies = stack.enter_context(server.listen(channels, for_all=True))
                    stack.callback(channels.unlink, missing_ok=True)
                    tasks.append(group.create_task(peers.serve(for_uproxies, agent.captured, agent.grants)))
                    tasks.append(group.create_task(agent.grants.run()))
                    if agent.waypoints is not None:
                        tasks.append(group.create_task(agent.waypoints.run()))
                    _log.info("node %s: ready at %s", options.name, path)
                    await stopped
                for task in tasks:
                    task.cancel()
        except* ListenError as refused:
            failed = refused.exceptions[0]
    if failed is not None:
        raise failed


async def _listen_to_operators(agent: Agent, address: str, port: int) -> None:
    """Serves metrics and readiness until cancelled. Capture goes on without, should the port be taken."""
    routes = {**admin.metrics_routes(agent.metrics), **admin.ready_routes(agent.pending)}
    try:
        listening = await admin.serve(address, port, routes)
    except OSError as error:
        _log.error("no metrics: cannot listen on %s:%d: %s; see --metrics", address, port, error.strerror or error)
        return
    async with listening:
        await asyncio.Event().wait()


async def _follow(agent: Agent, membership: Membership, credentials: CurrentCredentials, directory: Path) -> None:
    """Keep the agent as the control plane says, from disk while nobody says anything."""
    # Imported here: what talks to a broker takes megabytes, and configuration from files needs none of it.
    from uproxy.member import Member

    member = Member(Kind.NODE, membership, directory, credentials, agent.on_batch, problems=agent.problems)
    member.replica.want_all_addresses()
    member.restore()
    async with asyncio.TaskGroup() as group:
        group.create_task(credentials.watch(member.renewed))
        group.create_task(member.run())


def _membership(options: Options) -> Membership:
    """Who this node is in the mesh; joins it first if need be. Raises JoinError."""
    found = joining.member(options.identity_dir, options.join)
    expected = make_id(found.identity.trust_domain, DEFAULT_ROOT_NAMESPACE, f"node-{options.name}")
    if found.identity != expected:
        raise JoinError(f"{options.identity_dir} is {found.identity}'s; node {options.name} must be {expected}")
    return found


def main(argv: Sequence[str]) -> int:
    """The exit status: 0 after SIGTERM or --remove, 1 when it cannot run here, 2 for a wrong command line."""
    options = _parse(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    missing = _missing_privileges(options)
    if missing:
        print(f"uproxy node: needs root, or {missing}", file=sys.stderr)
        return 1
    try:
        with ExitStack() as stack:
            places = _places(options)
            bpffs.mount()
            pins = bpffs.node_directory(options.name)
            stack.enter_context(bpffs.sole_owner(pins))
            if options.remove:
                everything = (*bpffs.other_schemas(options.name).values(), pins)
                for directory in everything:
                    check_removable(directory / "links")
                if places is not None:
                    waypoints.remove_all(places)
                for directory in everything:
                    bpffs.remove(directory)
                _log.info("node %s: everything detached and unpinned", options.name)
                return 0
            earlier = bpffs.earlier_schemas(options.name)
            for directory in earlier:
                stack.enter_context(bpffs.sole_owner(directory))
            loader = stack.enter_context(Loader(pins / "maps", earlier=[one / "maps" for one in earlier]))
            sync = Sync(loader.maps, options.ranges, registry_only=options.egress == REGISTRY_ONLY)
            workloads = Workloads(loader, pins / "links", [one / "links" for one in earlier])
            workloads.adopt()
            mount = cgroup.mount_point()
            probe_cgroups = [mount / path for path in options.probe_cgroups]
            probers = Probers(loader, pins / "probers", probe_cgroups, workloads.captured)
            if options.config:
                agent = Agent(options, loader, sync, workloads, probers)
                source = FileSource(options.config, options.trust_domain)
                agent.apply(source.load())
                if source.warnings:
                    _log.warning("configuration: %s", source.warnings)
                feed = source.watch(agent.on_batch, agent.on_error)
            else:
                membership = _membership(options)
                credentials = CurrentCredentials(options.identity_dir, membership.identity)
                options = replace(options, trust_domain=membership.identity.trust_domain)
                starting = Waypoints(places, options.name) if places is not None else None
                agent = Agent(options, loader, sync, workloads, probers, starting)
                feed = _follow(agent, membership, credentials, options.identity_dir)
            asyncio.run(_run(agent, options, feed))
    except (
        PinError,
        PlaceError,
        SandboxError,
        LoadError,
        ListenError,
        ConfigError,
        CredentialsError,
        JoinError,
        RecordError,
        RegistrationError,
        SyncError,
        OSError,
    ) as error:
        print(f"uproxy node: {error}", file=sys.stderr)
        return 1
    _log.info("node %s: stopped; what is attached stays in force", options.name)
    return 0
