"""`uproxy node`: keeps the kernel maps of a host equal to the mesh's state, and puts workloads under capture.

Start: pin directory → programs and maps → ranges → workloads of an earlier agent → configuration → maps whole → socket.
The socket's existence thus says that everything before it has succeeded. End: nothing is detached.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bpf import bpffs, layout
from bpf.bpffs import PinError
from bpf.libbpf import BpfError
from bpf.loader import Loader, LoadError
from bpf.maps import Maps
from control.api.address import AddressError, IpAddress, parse_address
from control.api.identity import parse_trust_domain
from control.api.records import RecordError
from control.client.files import ConfigError, FileSource
from control.client.state import State
from uproxy.node import server
from uproxy.node.client import DEFAULT_SOCKET
from uproxy.node.places import Cgroup, NetworkNamespace, PlaceError
from uproxy.node.server import ListenError, RequestError
from uproxy.node.sync import MeshRanges, Sync, SyncError
from uproxy.node.workloads import Registration, RegistrationError, Workloads, check_removable

_log: Final = logging.getLogger("uproxy.node")

_SWEEP_INTERVAL_S: Final = 10.0
_NODE_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_MAX_LISTED: Final = 500  # workloads in a status, which must fit one message
# <linux/capability.h>. The last two are for a workload's place: entering its namespace, opening its cgroup by id.
_CAPABILITIES: Final = {
    "CAP_NET_ADMIN": 12,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
    "CAP_SYS_ADMIN": 21,
    "CAP_DAC_READ_SEARCH": 2,
}
_REGISTER_FIELDS: Final[Mapping[str, type]] = {
    "workload": str,
    "namespace": str,
    "service_account": str,
    "address": list,
}


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    name: str
    config: tuple[Path, ...]
    trust_domain: str
    ranges: MeshRanges
    run_dir: Path
    remove: bool


class Agent:
    """Answers requests and takes configuration, on maps and links that are open already."""

    def __init__(self, options: Options, loader: Loader, sync: Sync, workloads: Workloads) -> None:
        self._options = options
        self._maps: Maps = loader.maps
        self._sync = sync
        self._workloads = workloads
        self._state = State(options.trust_domain)
        self._config_error = ""
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
            _log.info("configuration in force: %d map entries changed, %s", written, self._sync.sizes())
        self._config_error = ""

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
                    return {}
                case "unregister":
                    self._workloads.unregister(_field(request, "workload", str))
                    return {}
                case "status":
                    return self._status()
                case other:
                    raise RequestError(f"unknown op {other!r}; there are register, unregister and status")
        except (PlaceError, RegistrationError, AddressError) as error:
            raise RequestError(str(error)) from None

    async def sweep(self) -> None:
        """Looks now and then for workloads that ended without saying so, until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_INTERVAL_S)
            try:
                self._workloads.sweep()
            except OSError as error:
                _log.warning("dead workloads cannot be swept: %s", error)

    def _register(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        name, namespace, service_account, texts = (
            _field(request, field, kind) for field, kind in _REGISTER_FIELDS.items()
        )
        unknown = request.keys() - _REGISTER_FIELDS.keys() - {"op"}
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
        for address in addresses:
            self._check_address(address, namespace, service_account)
        app, proxy, netns = descriptors
        self._workloads.register(
            Registration(
                name,
                addresses,
                Cgroup.of(app, "app cgroup"),
                Cgroup.of(proxy, "proxy cgroup"),
                NetworkNamespace.of(netns),
            )
        )

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
        return {
            "node": self._options.name,
            "schema": layout.SCHEMA,
            "whole": settings.whole,
            "generation": settings.generation,
            **self._sync.sizes(),
            "ranges": {"mesh": list(self._options.ranges.mesh), "excluded": list(self._options.ranges.excluded)},
            "counters": self._maps.counters.read(),
            "pending": len(self._maps.orig),
            "workload_count": len(captured),
            "workloads": [
                {"workload": one.name, "address": list(one.addresses), "app_cgroup": one.app_cgroup}
                for one in captured[:_MAX_LISTED]
            ],
            "error": "; ".join([*([self._config_error] if self._config_error else []), *self._workloads.problems()]),
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
        "--config", nargs="+", type=Path, default=[], metavar="FILE", help="the mesh's resources (YAML)"
    )
    parser.add_argument("--trust-domain", default="cluster.local")
    parser.add_argument(
        "--mesh-cidr", nargs="+", action="extend", default=[], metavar="CIDR", help="ranges of VIPs and workloads"
    )
    parser.add_argument(
        "--exclude-cidr", nargs="+", action="extend", default=[], metavar="CIDR", help="ranges that are left alone"
    )
    parser.add_argument(
        "--run-dir", type=Path, default=DEFAULT_SOCKET.parent, help="where the socket node.sock is made"
    )
    parser.add_argument(
        "--remove",
        action="store_true",
        help="detach and unpin everything of this node, once no workload runs, and exit",
    )
    given = parser.parse_args(argv)
    if not _NODE_NAME.fullmatch(given.name):
        parser.error(f"--name {given.name!r}: use 1-63 of a-z, 0-9 and '-', with a letter or digit at both ends")
    if not given.remove and not (given.config and given.mesh_cidr):
        parser.error("--config and --mesh-cidr are needed: without a range of its own nothing belongs to the mesh")
    try:
        parse_trust_domain(given.trust_domain)
        ranges = MeshRanges.parse(given.mesh_cidr, given.exclude_cidr)
    except ValueError as error:
        parser.error(str(error))
    return Options(given.name, tuple(given.config), given.trust_domain, ranges, given.run_dir, given.remove)


def _missing_privileges() -> str:
    """The capabilities that eBPF needs and this process has not; empty when all is there."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    effective = int(found[1], 16) if found else 0
    return ", ".join(name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1)


async def _run(agent: Agent, source: FileSource, options: Options) -> None:
    path = options.run_dir / DEFAULT_SOCKET.name
    listener = server.listen(path)
    try:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(server.serve(listener, agent.handle)),
                group.create_task(source.watch(agent.on_batch, agent.on_error)),
                group.create_task(agent.sweep()),
            ]
            _log.info("node %s: ready at %s", options.name, path)
            await stop.wait()
            for task in tasks:
                task.cancel()
    finally:
        path.unlink(missing_ok=True)
        listener.close()


def main(argv: Sequence[str]) -> int:
    """The exit status: 0 after SIGTERM or --remove, 1 when it cannot run here, 2 for a wrong command line."""
    options = _parse(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    missing = _missing_privileges()
    if missing:
        print(f"uproxy node: needs root, or {missing}", file=sys.stderr)
        return 1
    try:
        with ExitStack() as stack:
            bpffs.mount()
            pins = bpffs.node_directory(options.name)
            stack.enter_context(bpffs.sole_owner(pins))
            if options.remove:
                check_removable(pins / "links")
                bpffs.remove(pins)
                _log.info("node %s: everything detached and unpinned", options.name)
                return 0
            loader = stack.enter_context(Loader(pins / "maps"))
            sync = Sync(loader.maps, options.ranges)
            workloads = Workloads(loader, pins / "links")
            workloads.adopt()
            agent = Agent(options, loader, sync, workloads)
            source = FileSource(options.config, options.trust_domain)
            agent.apply(source.load())
            if source.warnings:
                _log.warning("configuration: %s", source.warnings)
            asyncio.run(_run(agent, source, options))
    except (
        PinError,
        LoadError,
        ListenError,
        ConfigError,
        RecordError,
        RegistrationError,
        SyncError,
        OSError,
    ) as error:
        print(f"uproxy node: {error}", file=sys.stderr)
        return 1
    _log.info("node %s: stopped; what is attached stays in force", options.name)
    return 0
