"""An Envoy as Istio's waypoint between two uProxies (docs/hbone.md 3): it is dialled by one and dials the other."""

from __future__ import annotations

import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks import envoy, pairs
from benchmarks.netns import Namespace
from benchmarks.pairs import APP_PORT, DB_ADDRESS, ENTRY, HBONE_PORT, MESH, TRUST_DOMAIN
from tests.support.envoy import assert_no_bug_was_logged

pytestmark = pytest.mark.root
WAYPOINT_ADDRESS = "10.77.0.3"
# web's forward leads to `db`, whose only endpoint, as web knows it, is the waypoint.
WEB_VIEW = MESH.replace(
    f"address: {DB_ADDRESS}, serviceAccount: db", f"address: {WAYPOINT_ADDRESS}, serviceAccount: wp"
)
# db's policy: only through the waypoint.
DB_VIEW = (
    MESH
    + """\
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: waypoint-only, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/wp]}}]}]
"""
)


class Application(BaseHTTPRequestHandler):
    """Answers with what it was asked, and echoes bodies."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes

    def do_GET(self) -> None:
        self._answer(json.dumps({"path": self.path, "host": self.headers["host"]}).encode())

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["content-length"])))

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """An HTTP server whose listener was made in a namespace. Envoy keeps connections open: nobody waits for them."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, namespace: Namespace) -> None:
        super().__init__((DB_ADDRESS, APP_PORT), Application, bind_and_activate=False)
        self.socket.close()
        self.socket = namespace.listen((DB_ADDRESS, APP_PORT))

    def handle_error(self, *_: object) -> None:
        """A connection that is reset when the proxies stop is none."""


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory):
    with pairs.wire(tmp_path_factory.mktemp("waypoint"), extra=("wp",)) as wire:
        wire.db.ip("address", "add", f"{WAYPOINT_ADDRESS}/24", "dev", "wire")
        listen, upstream = (WAYPOINT_ADDRESS, HBONE_PORT), (DB_ADDRESS, HBONE_PORT)
        config = envoy.waypoint_config(wire.identity("wp"), TRUST_DOMAIN, listen, upstream, f"{DB_ADDRESS}:{APP_PORT}")
        server = Server(wire.db)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        with (
            envoy.running(config, wire.db, wire.directory / "wp"),
            pairs.uproxy_server(wire, mesh=DB_VIEW),
            pairs.uproxy_client(wire, mesh=WEB_VIEW),
        ):
            thread.start()
            try:
                yield wire
                assert_no_bug_was_logged(wire)
            finally:
                server.shutdown()
                server.server_close()
                thread.join()


def ask(wire: pairs.Wire, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("db.shop")
    connection.sock = wire.web.connect(ENTRY)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_a_request_passes_uproxy_envoy_uproxy(wire: pairs.Wire):
    status, body = ask(wire, "GET", "/hello")
    assert (status, json.loads(body)) == (200, {"path": "/hello", "host": "db.shop"})


def test_a_denial_by_the_waypoint_is_an_ordinary_answer_in_the_tunnel(wire: pairs.Wire):
    assert ask(wire, "GET", "/deny/me") == (403, b"RBAC: access denied")


@pytest.mark.parametrize("size", [1, 100_000, 8 << 20])
def test_bodies_of_any_size_come_back(wire: pairs.Wire, size: int):
    body = bytes(range(256)) * (size // 256 + 1)
    assert ask(wire, "POST", "/echo", body[:size]) == (200, body[:size])


def test_many_requests_one_after_the_other(wire: pairs.Wire):
    for number in range(60):
        assert ask(wire, "GET", f"/{number}")[0] == 200
