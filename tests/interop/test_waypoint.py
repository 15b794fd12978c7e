"""An Envoy as Istio's waypoint between two uProxies (docs/hbone.md 3), and our waypoint between two Envoys."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks import pairs
from benchmarks.lab.connect import connect
from benchmarks.netns import Namespace
from benchmarks.pairs import APP_PORT, DB_ADDRESS, ENTRY, HBONE_PORT, MESH, TRUST_DOMAIN
from benchmarks.peers import envoy
from tests.support.envoy import assert_no_bug_was_logged

pytestmark = pytest.mark.root
WAYPOINT_ADDRESS, VIP = "10.77.0.3", "240.240.9.9"
# db is reached through the waypoint and not otherwise.
BOUND = f"""\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: wp, namespace: shop, labels: {{istio.io/waypoint-for: service}}}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: wp, namespace: shop, labels: {{gateway.networking.k8s.io/gateway-name: wp}}}}
spec: {{address: {WAYPOINT_ADDRESS}, serviceAccount: wp}}
---
""" + MESH.replace(
    "{name: db, namespace: shop}\nspec:\n",
    f"{{name: db, namespace: shop, labels: {{istio.io/use-waypoint: wp}}}}\nspec:\n  clusterIP: {VIP}\n",
    1,
).replace("name: tcp,", "name: http,")
PROTECTED = (
    BOUND
    + """\
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-deletion, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: db}]
  action: DENY
  rules: [{to: [{operation: {paths: [/deny*]}}]}]
"""
)
WEB = f"spiffe://{TRUST_DOMAIN}/ns/shop/sa/web"


class Application(BaseHTTPRequestHandler):
    """Answers with what it was asked, and echoes bodies."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes

    def do_GET(self) -> None:
        told = {name: self.headers[name] for name in ("host", "x-forwarded-client-cert")}
        self._answer(json.dumps({"path": self.path, **told}).encode())

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


@contextmanager
def serving(wire: pairs.Wire) -> Iterator[None]:
    """db's application."""
    server = Server(wire.db)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def three(directory: Path) -> Iterator[pairs.Wire]:
    """web and db, and the waypoint's address on db's machine."""
    with pairs.wire(directory, extra=("wp",)) as wire, serving(wire):
        wire.db.ip("address", "add", f"{WAYPOINT_ADDRESS}/24", "dev", "wire")
        yield wire
        assert_no_bug_was_logged(wire)


@pytest.fixture(scope="module")
def envoy_between(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pairs.Wire]:
    """uProxy, Envoy, uProxy."""
    with three(tmp_path_factory.mktemp("envoy")) as wire:
        listen, upstream = (WAYPOINT_ADDRESS, HBONE_PORT), (DB_ADDRESS, HBONE_PORT)
        config = envoy.waypoint_config(wire.identity("wp"), TRUST_DOMAIN, listen, upstream, f"{DB_ADDRESS}:{APP_PORT}")
        with (
            envoy.running(config, wire.db, wire.directory / "wp"),
            pairs.uproxy_server(wire, mesh=BOUND),
            pairs.uproxy_client(wire, mesh=BOUND),
        ):
            yield wire


@pytest.fixture(scope="module")
def ours_between(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pairs.Wire]:
    """Envoy, our waypoint, Envoy."""
    with three(tmp_path_factory.mktemp("ours")) as wire:
        entries = {ENTRY: f"{VIP}:{APP_PORT}"}
        config = envoy.client_config(wire.identity("web"), TRUST_DOMAIN, (WAYPOINT_ADDRESS, HBONE_PORT), entries)
        with (
            pairs.envoy_server(wire),
            pairs.waypoint(wire, "wp", PROTECTED),
            envoy.running(config, wire.web, wire.directory / "web"),
        ):
            yield wire


@pytest.fixture(params=["envoy_between", "ours_between"])
def wire(request: pytest.FixtureRequest) -> pairs.Wire:
    made: pairs.Wire = request.getfixturevalue(request.param)
    return made


def ask(wire: pairs.Wire, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("db.shop")
    connection.sock = wire.web.connect(ENTRY)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_a_request_passes(wire: pairs.Wire) -> None:
    status, body = ask(wire, "GET", "/hello")
    told = json.loads(body)
    assert (status, told["path"], told["host"]) == (200, "/hello", "db.shop")


def test_a_denial_by_the_waypoint_is_an_ordinary_answer_in_the_tunnel(wire: pairs.Wire) -> None:
    status, body = ask(wire, "GET", "/deny/me")
    assert (status, body.strip()) == (403, b"RBAC: access denied")


@pytest.mark.parametrize("size", [1, 100_000, 8 << 20])
def test_bodies_of_any_size_come_back(wire: pairs.Wire, size: int) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    assert ask(wire, "POST", "/echo", body[:size]) == (200, body[:size])


def test_many_requests_one_after_the_other(wire: pairs.Wire) -> None:
    for number in range(60):
        assert ask(wire, "GET", f"/{number}")[0] == 200


def test_our_waypoint_names_an_envoy_that_calls(ours_between: pairs.Wire) -> None:
    told = json.loads(ask(ours_between, "GET", "/")[1])
    assert told["x-forwarded-client-cert"] == f"URI={WEB}"


def test_nobody_passes_an_envoy_by_that_is_the_waypoint(envoy_between: pairs.Wire) -> None:
    """The destination's uProxy knows the way; web's own certificate does not open the direct one."""
    wire = envoy_between
    with wire.web.connect((DB_ADDRESS, HBONE_PORT)) as made:
        answer = connect(made, wire.identity("web"), f"{DB_ADDRESS}:{APP_PORT}")
    assert (answer.status, answer.reason) == (401, "waypoint-required")
