"""The control plane as a running process: core, publisher, broker, certificates and the operators' socket together.

A directory holds all that it must not lose: `ca/` (unless it is elsewhere) and `mesh.db`. `broker/` has the broker's
configuration and what it retains, which can be published again, and `control-plane/` our own certificate, which is
made anew at every start.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from control.api.identity import SpiffeId, TrustDomain
from control.client.mqtt import BrokerAccess
from control.server.api import Api, BrokerState, SocketError, listen
from control.server.bindings import Phase
from control.server.brokers import BrokerError, Listen, NatsServer
from control.server.ca import Authority, CaError
from control.server.core import Core
from control.server.enrolment import Enrolment
from control.server.foreign import ForeignBroker
from control.server.https import CertificateServer, Doors, server_context
from control.server.issuers import Issuers
from control.server.members import Members
from control.server.metrics import MetricsServer, Values, counted
from control.server.proxies import State as ProxyState
from control.server.publisher import Publisher
from control.server.revocations import RevocationLists
from control.server.rights import control_plane_id
from control.server.signing import ConfigKey
from control.server.store import Store, StoreError
from control.server.svid import due, issue_own

STORE_FILE: Final = "mesh.db"

_OWN_DIR: Final = "control-plane"
_BROKER_DIR: Final = "broker"
_BACKLOG: Final = 1024
_ADMISSION_TIMEOUT_S: Final = 15.0
_REVIEW_S: Final = 30.0
"""How often the broker's users are compared with those who are known: tokens and certificates end by themselves."""
_RESTS: Final = 4
"""How many times as long as it needed to take new users the broker is then left to its work."""
_RETRY_S: Final = 60.0

_log = logging.getLogger(__name__)


class ServeError(Exception):
    """The control plane cannot be run as asked; the text says why and what to do."""


REFUSALS: Final = (ServeError, CaError, StoreError, BrokerError, SocketError)
"""All that `serve` raises for what an operator can mend."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a control plane is to be run."""

    directory: Path
    ca: Path
    passphrase_file: Path | None
    """None: the one in the CA's directory."""
    socket: Path
    host: str
    """Name or address under which workloads reach this machine."""
    listen: str
    """Address to listen at."""
    port: int
    """Of certificates."""
    broker_port: int
    brokers: tuple[str, ...]
    """URLs of brokers that somebody else runs; empty: run nats-server here."""
    broker_pid_file: Path | None
    """Whom to tell (SIGHUP) that the files of such a broker have changed."""
    certificate_ttl_s: int
    metrics_port: int
    """0: none."""


@dataclass(frozen=True, slots=True)
class Running:
    """Where a control plane that is ready can be reached."""

    trust_domain: TrustDomain
    root_sha256: str
    doors: Doors


class _Stopped(Exception):
    """A signal asked the process to end."""


async def serve(settings: Settings, on_ready: Callable[[Running], None]) -> None:
    """Run until SIGTERM or SIGINT. Raises one of REFUSALS."""
    _allow_many_descriptors()
    authority = Authority.open(settings.ca, settings.passphrase_file)
    try:
        settings.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ServeError(f"cannot make {settings.directory}: {error.strerror}; name another with --dir") from None
    with (
        Store(settings.directory / STORE_FILE) as store,
        _listening(settings.listen, settings.port, "--port") as certificates,
        _listening(settings.listen, settings.metrics_port, "--metrics-port")
        if settings.metrics_port
        else nullcontext() as metrics,
    ):
        try:
            await _Plane(settings, authority, store).run(certificates, metrics, on_ready)
        except BaseExceptionGroup as ended:
            refused, other = ended.split(REFUSALS)
            if refused is not None:
                raise _first(refused) from None
            if other is not None and other.split(_Stopped)[1] is not None:
                raise
            _log.info("the control plane ends; the mesh goes on")


class _Plane:
    """The parts, wired together. Lives as long as the store is open."""

    def __init__(self, settings: Settings, authority: Authority, store: Store) -> None:
        self._settings = settings
        self._authority = authority
        self._store = store
        self._identity = control_plane_id(authority.trust_domain)
        self._own = settings.directory / _OWN_DIR
        issue_own(authority, self._own, self._identity)
        key = ConfigKey.open(settings.ca, authority, time.time(), settings.passphrase_file)
        self._core = Core(store, authority, key)
        self._issuers = Issuers(self._core)
        self._members = Members(self._core, authority.trust_domain)
        self._revocations = RevocationLists(settings.ca, authority, self._core)
        self._enrolment = Enrolment(
            store,
            authority,
            self._members.declared,
            time.time,
            settings.certificate_ttl_s,
            self._revocations.revoked,
            self._members.placed,
        )
        self._doors = Doors(
            _url("https", settings.host, settings.port),
            settings.brokers or (_url("mqtts", settings.host, settings.broker_port),),
        )
        self._https = CertificateServer(self._enrolment, self._doors, server_context(self._own))
        # A broker of our own is dialled here, whichever way workloads come to it.
        local = _url("mqtts", _reachable(settings.listen), settings.broker_port)
        access = BrokerAccess(settings.brokers or (local,), self._identity, lambda: _client_context(self._own))
        self._publisher = Publisher(self._core, access)

    async def run(
        self, certificates: socket.socket, metrics: socket.socket | None, on_ready: Callable[[Running], None]
    ) -> None:
        """Run until a signal, which raises _Stopped."""
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        broker = self._broker()
        users = _Users(
            broker.admit, lambda: self._core.identities() | self._enrolment.identities(), self._core.waypoints
        )
        async with asyncio.TaskGroup() as group:
            await asyncio.to_thread(users.review)
            group.create_task(_refused_as(broker.run()))
            await broker.ready.wait()
            group.create_task(users.run())
            group.create_task(self._publisher.run())
            await asyncio.to_thread(self._revocations.look)  # before anybody renews
            group.create_task(self._revocations.run())
            group.create_task(self._https.run(certificates))
            group.create_task(self._renew())
            group.create_task(self._issuers.run())
            api = self._api(users)
            if metrics is not None:
                group.create_task(MetricsServer(lambda: self._values(api)).run(metrics))
            # Last, so that whoever finds the socket finds everything.
            group.create_task(api.run(listen(self._settings.socket)))
            on_ready(Running(self._identity.trust_domain, self._authority.root_fingerprint, self._doors))
            await stopping.wait()
            self._settings.socket.unlink(missing_ok=True)
            raise _Stopped

    def _broker(self) -> NatsServer | ForeignBroker:
        settings = self._settings
        directory, listening = settings.directory / _BROKER_DIR, Listen(settings.listen, settings.broker_port)
        if settings.brokers:
            return ForeignBroker(directory, listening, self._authority, settings.broker_pid_file)
        return NatsServer(directory, listening, self._authority)

    def _api(self, users: _Users) -> Api:
        return Api(
            self._core,
            self._store,
            self._enrolment,
            self._members,
            self._identity.trust_domain,
            self._doors.control,
            broker=lambda: BrokerState(self._publisher.connected, self._publisher.problem, self._publisher.published),
            on_identities=users.changed,
            admit=users.admit,
            issuers=self._issuers.problems,
            clock=time.time,
        )

    def _values(self, api: Api) -> Values:
        epoch, version = self._store.stamp()
        live, deleted = self._store.sizes()
        return Values(
            requests=dict(api.answered),
            changes=api.changes,
            published=self._publisher.messages,
            issued=self._https.issued,
            refused=dict(self._https.refused),
            connected=self._publisher.connected,
            settled=self._publisher.published,
            epoch=epoch,
            version=version,
            live=live,
            deleted=deleted,
            proxies=counted((state.value for state in ProxyState), (row.state.value for row in api.proxies())),
            bindings=counted((phase.value for phase in Phase), (phase.value for phase in self._core.phases())),
            problems=len(api.problems()),
        )

    async def _renew(self) -> None:
        """Keep our own certificate fresh. Connections take the new one when they are made."""
        while True:
            await due(self._own)
            try:
                issue_own(self._authority, self._own, self._identity)
                self._https.context = server_context(self._own)
            except (CaError, OSError) as error:
                _log.warning("the control plane's own certificate cannot be renewed: %s", error)
                await asyncio.sleep(_RETRY_S)


class _Users:
    """Keeps whom the broker lets in equal to who is known.

    It costs the broker about a millisecond for each user, so that changes are gathered; but nobody is given a token
    before the broker lets them in.
    """

    def __init__(
        self,
        admit: Callable[[frozenset[SpiffeId], frozenset[SpiffeId]], Coroutine[None, None, None]],
        known: Callable[[], frozenset[SpiffeId]],
        waypoints: Callable[[], frozenset[SpiffeId]],
    ) -> None:
        """`waypoints`: who of them has the rights of a waypoint's process."""
        self._admit = admit
        self._known = known
        self._waypoints = waypoints
        self._loop = asyncio.get_running_loop()
        self._turn = threading.Lock()
        self._changed = asyncio.Event()
        self._admitted: tuple[frozenset[SpiffeId], frozenset[SpiffeId]] | None = None

    def changed(self) -> None:
        """Somebody may have come or gone; call it from any thread."""
        self._loop.call_soon_threadsafe(self._changed.set)

    def admit(self, identity: SpiffeId) -> None:
        """Returns when the broker lets this one in, or cannot be told; call it in a thread."""
        if self._admitted is None or identity not in self._admitted[0]:
            self.review()

    def review(self) -> None:
        """Tell the broker when somebody came or went; call it in a thread. Returns when the broker has it."""
        with self._turn:
            try:
                known = self._known(), self._waypoints()
                if known != self._admitted:
                    asyncio.run_coroutine_threadsafe(self._admit(*known), self._loop).result(_ADMISSION_TIMEOUT_S)
                    self._admitted = known
            except (OSError, BrokerError, StoreError) as error:  # TimeoutError is an OSError
                _log.warning("the broker cannot be told whom to let in, and will be told again: %r", error)

    async def run(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_REVIEW_S):
                    await self._changed.wait()
            self._changed.clear()
            began = self._loop.time()
            await asyncio.to_thread(self.review)
            await asyncio.sleep(_RESTS * (self._loop.time() - began))


def _first(failed: BaseException) -> BaseException:
    """One of those that ended a group, which may be of groups."""
    while isinstance(failed, BaseExceptionGroup):
        failed = failed.exceptions[0]
    return failed


@contextmanager
def _listening(address: str, port: int, option: str) -> Iterator[socket.socket]:
    """A listening, non-blocking TCP socket. Raises ServeError, which names the option that chooses the port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        found = socket.create_server((address, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ServeError(
            f"cannot listen at {address} port {port}: {os.strerror(error.errno or 0)}; "
            f"choose with --listen and {option}"
        ) from None
    with found:
        found.setblocking(False)
        yield found


async def _refused_as(running: Coroutine[None, None, None]) -> None:
    """What a broker's directory and files refuse is an operator's to mend."""
    try:
        await running
    except OSError as error:
        raise ServeError(f"the broker cannot be run: {error}") from None


def _client_context(identity_dir: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # whom we dial says its SPIFFE ID
    context.load_verify_locations(identity_dir / "bundle.pem")
    context.load_cert_chain(identity_dir / "chain.pem", identity_dir / "key.pem")
    return context


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _reachable(listening: str) -> str:
    """An address of this machine at which something that listens there can be dialled."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listening, listening)


def _allow_many_descriptors() -> None:
    """Each workload is a connection of the broker, our child, and the usual soft limit is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
