"""A mesh of real `uproxy run` processes that have joined a real control plane, over a real broker, on loopback.

As `site`, but for where the configuration comes from.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
import time
from collections.abc import Collection, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509

from control.api.identity import SpiffeId, proxy_hash
from control.api.status import ProxyStatus
from control.api.topics import StatusTopic, format_topic
from control.server.ca import DEFAULT_TTL_S, Authority, write_revocations
from control.server.enrolment import Enrolment, Member
from control.server.https import CertificateServer, Doors, server_context
from control.server.members import Members
from control.server.revocations import RevocationLists
from tests.support import brokers
from tests.support.brokers import HOST, Broker
from tests.support.certificates import DB, WEB
from tests.support.control_plane import ControlPlane
from tests.support.site import FORWARD_PORT, Site


class Control:
    """The control plane at work, in a thread: publisher and certificate server."""

    def __init__(self, directory: Path, ca_dir: Path, broker: Broker, ttl_s: int) -> None:
        self.plane = ControlPlane(directory, ca_dir, broker.url)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._listener = socket.create_server((HOST, 0))
        self._listener.setblocking(False)
        self.url = f"https://{HOST}:{self._listener.getsockname()[1]}"
        self.members = Members(self.plane.core, self.plane.authority.trust_domain)
        self._ca_dir = ca_dir
        self._revocations = RevocationLists(ca_dir, self.plane.authority, self.plane.core)
        self._enrolment = Enrolment(
            self.plane.store,
            self.plane.authority,
            self.members.declared,
            time.time,
            ttl_s,
            self._revocations.revoked,
            self.members.placed,
        )
        self._server = CertificateServer(
            self._enrolment, Doors(self.url, (broker.url,)), server_context(directory / "own")
        )
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        if not self._thread.is_alive():
            self._thread.start()
        self._call(self._start())

    def stop(self) -> None:
        """As if it were not there, until `start`."""
        self._call(self._stop())

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()
        self._listener.close()
        self.plane.close()

    async def _start(self) -> None:
        self._running = asyncio.get_running_loop().create_task(self._run())

    async def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.plane.publisher.run())
            group.create_task(self._server.run(self._listener))

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def apply(self, text: str) -> None:
        """Make it the desired state, beside what there is; the broker has it afterwards."""
        self.plane.core.apply([("mesh.yaml", text)])
        self._call(self.plane.settled())

    def annotate(self, kind: str, namespace: str, name: str, annotations: dict[str, str | None]) -> None:
        """Likewise with annotations of one resource; None takes one away."""
        self.plane.core.relabel((kind, namespace, name), annotations=annotations)
        self._call(self.plane.settled())

    def delete(self, kind: str, namespace: str, name: str) -> None:
        self.plane.core.delete([(kind, namespace, name)], release=True)
        self._call(self.plane.settled())

    def revoke(self, identity_dir: Path) -> None:
        """As `meshctl ca revoke` does it; the broker has it afterwards."""
        leaf = x509.load_pem_x509_certificate((identity_dir / "chain.pem").read_bytes())
        write_revocations(self._ca_dir, self.plane.authority, [leaf.serial_number])
        self._revocations.look()
        self._call(self.plane.settled())

    def token(self, member: Member | None) -> str:
        """A join token for one of `members`."""
        assert member is not None
        return self._enrolment.create_token(self.url, member).encode()

    def status(self, identity: SpiffeId, name: str) -> ProxyStatus | None:
        """What a proxy reported last."""
        topic = format_topic(identity.trust_domain, StatusTopic(proxy_hash(identity), name))
        report = self.plane.core.proxies().get(topic)
        return report.status if report is not None else None


@contextmanager
def controlled(
    path: Path, admitted: Collection[SpiffeId], ttl_s: int = DEFAULT_TTL_S
) -> Iterator[tuple[Broker, Control]]:
    """A CA, a broker that admits these identities, and a control plane, running."""
    with ExitStack() as stack:
        authority = Authority.create(path / "ca", "cluster.local")
        broker = stack.enter_context(brokers.nats(path / "broker", authority, admitted))
        control = Control(path / "control", path / "ca", broker, ttl_s)
        stack.callback(control.close)
        control.start()
        yield broker, control


@dataclass
class MemberSite(Site):
    """As a `Site`, whose proxies have no files to read."""

    broker: Broker
    control: Control

    @classmethod
    @contextmanager
    def running_in(cls, path: Path, network: str, ttl_s: int = DEFAULT_TTL_S) -> Iterator[MemberSite]:
        with controlled(path, [WEB, DB], ttl_s) as (broker, control):
            site = cls(path, control.plane.authority, network, broker, control)
            control.apply(site.resources)
            yield site

    def address(self, name: str) -> str:
        return f"{self.network}.{('web', 'db').index(name) + 1}"

    def token_file(self, name: str) -> Path:
        file = self.path / f"{name}.token"
        file.write_text(self.control.token(self.control.members.declared("shop", name)))
        return file

    def command(self, name: str, *more: str) -> list[str]:
        forward = [f"--forward={self.network}.1:{FORWARD_PORT}=db.shop:6379"] if name == "web" else []
        return [
            *(sys.executable, "-m", "uproxy", "run", "--identity-dir", str(self.path / name)),
            *("--join", str(self.path / f"{name}.token"), "--capture", "none", *forward, *more),
        ]
