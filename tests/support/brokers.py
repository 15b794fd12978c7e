"""Real brokers for tests: nats-server and Mosquitto over TLS, configured as the control plane does it.

with nats(directory, authority, [WEB, DB]) as broker:
    async with client(broker, identity_dir(authority, directory / "web", WEB)) as web: ...
"""

from __future__ import annotations

import logging
import random
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiomqtt

from control.api.identity import SpiffeId
from control.server import brokers
from control.server.brokers import Listen
from control.server.ca import Authority
from control.server.rights import Rights, broker_id, control_plane_id
from control.server.svid import issue_own

PATIENCE_S = 60.0
HOST = "127.0.0.1"

_QUIET = logging.getLogger("tests.mqtt")
_QUIET.setLevel(logging.CRITICAL)  # aiomqtt warns of 10 publishes in flight


class Broker:
    """One broker process, which can be stopped, killed and started again on its port and its store."""

    def __init__(
        self,
        directory: Path,
        authority: Authority,
        render: Callable[[Path, Listen, Iterable[Rights]], Mapping[str, bytes]],
        argv: list[str],
    ) -> None:
        self.directory = directory
        self.authority = authority
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.waypoints: Collection[SpiffeId] = ()
        """Of the identities that are let in, those of waypoints' processes, from the next `configure` on."""
        self._render, self._argv = render, argv

    @property
    def url(self) -> str:
        """As a membership names it."""
        return f"mqtts://{HOST}:{self.port}"

    def configure(self, identities: Collection[SpiffeId]) -> None:
        rights = brokers.all_rights(self.authority, identities, self.waypoints)
        brokers.write_files(self.directory, self._render(self.directory, Listen(HOST, self.port), rights))

    def admit(self, identities: Collection[SpiffeId]) -> None:
        """Let exactly these (and the control plane) in; returns shortly before that is in force."""
        self.configure(identities)
        self.reload()

    def reload(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    def start(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                preexec_fn=brokers.end_with_parent,
            )
        deadline = time.monotonic() + PATIENCE_S
        while not accepts(self.port):
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def stop(self) -> None:
        """End it in order: the store is written."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(PATIENCE_S)
            self.process = None

    def wipe(self) -> None:
        """Throw the store of a stopped broker away."""
        assert self.process is None
        for name in (brokers.JETSTREAM_DIR, brokers.PERSISTENCE_DIR):
            shutil.rmtree(self.directory / name)
        brokers.prepare(self.directory)

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")


@contextmanager
def nats(directory: Path, authority: Authority, identities: Collection[SpiffeId] = ()) -> Iterator[Broker]:
    """A running nats-server in a new directory that lets these identities and the control plane in."""
    argv = [str(brokers.find_nats_server()), "--config", brokers.NATS_CONFIG]
    with _running(Broker(directory, authority, brokers.nats_files, argv), identities) as broker:
        yield broker


@contextmanager
def mosquitto(directory: Path, authority: Authority, identities: Collection[SpiffeId] = ()) -> Iterator[Broker]:
    """A running Mosquitto, as `nats`."""
    binary = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    assert binary, "Mosquitto is not installed: scripts/install-packages does it"
    argv = [binary, "-c", brokers.MOSQUITTO_CONFIG]
    with _running(Broker(directory, authority, brokers.mosquitto_files, argv), identities) as broker:
        yield broker


BROKERS = {"nats": nats, "mosquitto": mosquitto}


@contextmanager
def _running(broker: Broker, identities: Collection[SpiffeId]) -> Iterator[Broker]:
    brokers.prepare(broker.directory)
    issue_own(broker.authority, broker.directory / brokers.IDENTITY_DIR, broker_id(broker.authority.trust_domain))
    broker.configure(identities)
    broker.start()
    try:
        yield broker
    finally:
        broker.kill()


def control_plane_dir(authority: Authority, directory: Path) -> Path:
    """The control plane's own identity directory."""
    issue_own(authority, directory, control_plane_id(authority.trust_domain))
    return directory


def tls(identity_dir: Path) -> ssl.SSLContext:
    """A client's side of the connection to a broker, with an identity."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(identity_dir / "bundle.pem")
    context.load_cert_chain(identity_dir / "chain.pem", identity_dir / "key.pem")
    return context


class _Client(aiomqtt.Client):
    """One whose connection may end without anybody asking why."""

    async def __aexit__(self, *error: Any) -> None:
        try:
            await super().__aexit__(*error)
        finally:
            if self._disconnected.done() and not self._disconnected.cancelled():
                # Or asyncio logs that nobody did, in whichever test comes next.
                self._disconnected.exception()


def client(broker: Broker, identity_dir: Path, **options: Any) -> aiomqtt.Client:
    """A plain MQTT client, for what a test does as somebody else."""
    return _Client(
        HOST,
        options.pop("port", broker.port),
        tls_context=tls(identity_dir),
        logger=_QUIET,
        timeout=PATIENCE_S,
        socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        **options,
    )


def free_port() -> int:
    """A port outside of the ephemeral range, so that no connection takes it while a broker restarts."""
    while True:
        port = random.randint(16_000, 31_999)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port


def accepts(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), 1.0).close()
    except OSError:
        return False
    return True
