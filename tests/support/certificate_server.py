"""The control plane's certificate server for tests: the real one, and one that answers whatever a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from control.api.address import IpAddress
from control.api.identity import SpiffeId, make_id
from control.api.token import JoinToken
from control.server.ca import DEFAULT_TTL_S, Authority
from control.server.enrolment import Enrolment, Member
from control.server.https import CertificateServer, Doors, server_context
from control.server.store import Store
from tests.support.certificates import identity_dir

BROKERS = ("mqtts://broker.example:8883",)


def control_plane(authority: Authority) -> SpiffeId:
    return make_id(authority.trust_domain, "mesh-system", "control-plane")


@dataclass
class Control:
    """A running certificate server."""

    url: str
    enrolment: Enrolment
    store: Store
    declared: dict[tuple[str, str], Member]
    placed: dict[tuple[str, str, str], Member]
    """Node, namespace and name of waypoints' processes."""

    def token(self, identity: SpiffeId, workload: str = "web-1", *addresses: str) -> JoinToken:
        """A token for a workload that is declared now."""
        member = Member(identity, workload, tuple(IpAddress(address) for address in addresses))
        self.declared[identity.namespace, workload] = member
        return self.enrolment.create_token(self.url, member)


@contextlib.contextmanager
def certificate_server(authority: Authority, directory: Path, ttl_s: int = DEFAULT_TTL_S) -> Iterator[Control]:
    """The real one, on a port of loopback, with a store in `directory`."""
    own = identity_dir(authority, directory / "control-plane", control_plane(authority))
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    url = f"https://127.0.0.1:{listening.getsockname()[1]}"
    with Store(directory / "store.db") as store, listening:
        declared: dict[tuple[str, str], Member] = {}
        placed: dict[tuple[str, str, str], Member] = {}
        enrolment = Enrolment(
            store,
            authority,
            lambda *place: declared.get(place),
            time.time,
            ttl_s,
            placed=lambda *place: placed.get(place),
        )
        server = CertificateServer(enrolment, Doors(url, BROKERS), server_context(own))
        stop: list[Callable[[], object]] = []

        async def serve() -> None:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            stop.append(lambda: loop.call_soon_threadsafe(task.cancel))
            with contextlib.suppress(asyncio.CancelledError):
                await server.run(listening)

        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        try:
            yield Control(url, enrolment, store, declared, placed)
        finally:
            stop[0]()
            thread.join(30)
            assert not thread.is_alive()


Answer = Callable[[str, bytes], tuple[int, bytes]]
"""(path, body) of a request to (status, body) of the answer."""


@dataclass
class Scripted:
    """A running server that says what it is told to."""

    url: str
    answer: Answer
    heard: list[str] = field(default_factory=list)
    """Paths that were asked for, in order."""


@contextlib.contextmanager
def scripted_server(own: Path, answer: Answer) -> Iterator[Scripted]:
    """A TLS server with the identity in a directory, which answers what `answer` returns."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            scripted.heard.append(self.path)
            status, content = scripted.answer(self.path, self.rfile.read(int(self.headers.get("Content-Length", 0))))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.HTTPServer):
        def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
            raw, address = super().get_request()
            raw.settimeout(30)
            try:
                return context.wrap_socket(raw, server_side=True), address
            except OSError:
                raw.close()
                raise

        def handle_error(self, *_: object) -> None:
            pass  # a client that does not like us hangs up

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own / "chain.pem", own / "key.pem")
    with Server(("127.0.0.1", 0), Handler) as server:
        scripted = Scripted(f"https://127.0.0.1:{server.server_port}", answer)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield scripted
        finally:
            server.shutdown()
            thread.join(30)
            assert not thread.is_alive()
