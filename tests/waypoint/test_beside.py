"""A waypoint's process beside db (placement `sidecar`): real uProxies, their child, and what the application gets."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest

from control.server.bindings import Phase
from tests.support.certificates import DB as DB_ID
from tests.support.certificates import WEB
from tests.support.http_app import telling
from tests.support.member_site import MemberSite, controlled
from tests.support.site import Site, echo_server, eventually, get
from tests.support.waypoint_site import asked, labelled
from uproxy.beside import BACKLOG
from uproxy.beside_feed import STATE_FILE
from uproxy.process import METRICS_PORT

NETWORK, OTHER = "127.0.95", "127.0.96"
DB = f"{NETWORK}.2"
PATIENCE_S = 40.0
CALLER = "URI=spiffe://cluster.local/ns/shop/sa/web"
_SIDECAR = """
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  name: wp
  namespace: shop
  labels: {istio.io/waypoint-for: service}
  annotations: {mesh.uproxy.dev/placement: sidecar}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
"""
_GATEWAY = (
    _SIDECAR
    + """
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-delete, namespace: shop}
spec:
  action: DENY
  targetRefs: [{group: "", kind: Service, name: db}]
  rules: [{to: [{operation: {methods: [DELETE]}}]}]
"""
)

_ANOTHER = (
    _SIDECAR.replace("name: wp", "name: zz")
    + """
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-put, namespace: shop}
spec:
  action: DENY
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: zz}]
  rules: [{to: [{operation: {methods: [PUT]}}]}]
"""
)


def _site(directory: Path, network: str = NETWORK) -> Site:
    site = Site.create(directory, network)
    site.mesh.write_text(labelled(site.resources) + _GATEWAY)
    return site


@contextmanager
def _running(site: Site) -> Iterator[Site]:
    with telling(site.application), site.running("db", "--log-format", "json"), site.running("web"):
        yield site


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Of all tests that leave it as it was, which come first."""
    with _running(_site(tmp_path_factory.mktemp("site"))) as site:
        yield site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return _site(tmp_path, OTHER)


def beside(address: str = DB) -> dict[str, object]:
    """What db's uProxy says of its child."""
    found = json.loads(get(address, 15000, "/config_dump")[1])["beside"]
    assert isinstance(found, dict)
    return found


def child(address: str = DB) -> int:
    """Its process."""
    workers = beside(address)["workers"]
    assert isinstance(workers, list)
    pid: int = workers[0]["pid"]
    return pid


def passes_it(site: Site) -> bool | None:
    """Whether a request is told who calls, as it is by the process; None: it got no answer, since that only starts."""
    with suppress(OSError, http.client.HTTPException):
        answer = asked("GET", site)
        return answer.status == 200 and b"x-forwarded-client-cert" in answer.body
    return None


def test_requests_are_judged_beside_the_workload_and_told_who_calls(running: Site) -> None:
    answer = asked("GET", running)
    assert answer.status == 200
    assert json.loads(answer.body)["x-forwarded-client-cert"] == CALLER
    assert asked("DELETE", running).status == 403
    metrics = get(DB, METRICS_PORT, "/metrics")[1]
    assert 'response_code="403"' in metrics, "the uProxy tells what its child counts"
    assert 'destination_service="db.shop.svc.cluster.local"' in metrics

    def statuses() -> set[int]:
        lines = [line for line in running.log("db").splitlines() if line.startswith("{")]
        return {line["response_code"] for line in map(json.loads, lines) if "response_code" in line}

    eventually(lambda: statuses() == {200, 403}, PATIENCE_S)


def test_its_process_has_no_key_and_no_way_for_others_in(running: Site) -> None:
    pid = child()
    opened = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    assert not [one for one in opened if one.startswith(f"{running.path}/db/")]
    listening = Path(f"/proc/{pid}/net/tcp").read_text()
    inodes = {found for one in opened for found in re.findall(r"socket:\[(\d+)\]", one)}
    states = {line.split()[9]: line.split()[3] for line in listening.splitlines()[1:]}
    assert "0A" not in {states.get(inode) for inode in inodes}, "it listens nowhere"


def test_a_stranger_at_the_uproxys_loopback_port_reaches_nobody(running: Site) -> None:
    table = Path("/proc/net/tcp").read_text().splitlines()[1:]
    listening = [line.split()[1] for line in table if line.split()[3] == "0A"]
    ports = [int(one[9:], 16) for one in listening if one.startswith("0100007F:")]
    assert ports
    for port in ports:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
            stranger.sendall(b"DELETE / HTTP/1.1\r\nhost: db\r\n\r\n")
    for _ in range(5):
        assert asked("GET", running).status == 200, "and nobody's place is taken by it"


def test_strangers_who_fill_that_port_turn_nobody_away(running: Site) -> None:
    table = Path("/proc/net/tcp").read_text().splitlines()[1:]
    listening = [line.split()[1] for line in table if line.split()[3] == "0A"]
    ports = [int(one[9:], 16) for one in listening if one.startswith("0100007F:")]
    with ExitStack() as stack:
        for port in ports:
            for _ in range(2 * BACKLOG):
                stranger = stack.enter_context(socket.socket())
                stranger.setblocking(False)
                stranger.connect_ex(("127.0.0.1", port))
        for _ in range(3):
            assert asked("GET", running).status == 200


def test_streams_of_http2_are_requests_each(running: Site) -> None:
    client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    client.initiate_connection()
    statuses, ended = Counter[str](), 0
    with socket.create_connection(running.forward, timeout=30) as sock:
        for number in range(50):
            method = "DELETE" if number % 5 == 0 else "GET"
            head = [(":method", method), (":path", "/"), (":scheme", "http"), (":authority", "db.shop")]
            client.send_headers(client.get_next_available_stream_id(), head, end_stream=True)
        while ended < 50:
            sock.sendall(client.data_to_send())
            for event in client.receive_data(sock.recv(65536)):
                if isinstance(event, h2.events.ResponseReceived):
                    statuses[dict(event.headers)[":status"]] += 1
                elif isinstance(event, h2.events.StreamEnded):
                    ended += 1
    assert statuses == {"403": 10, "200": 40}


def test_a_websocket_stays_open_and_large_messages_cross(site: Site) -> None:
    def serve(listener: socket.socket) -> None:
        app, _ = listener.accept()
        with app:
            while b"\r\n\r\n" not in app.recv(65536):
                pass
            app.sendall(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n")
            app.sendall(b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")
            while data := app.recv(65536):
                app.sendall(data)

    ask = (
        b"GET / HTTP/1.1\r\nhost: db\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    payload = os.urandom(1 << 20)
    with socket.create_server(site.application) as listener, site.running("db"), site.running("web"):
        serving = threading.Thread(target=serve, args=(listener,))
        serving.start()
        with socket.create_connection(site.forward, timeout=30) as caller, caller.makefile("rwb") as stream:
            stream.write(ask)
            stream.flush()
            assert b" 101 " in stream.readline()
            while stream.readline() != b"\r\n":
                pass
            sending = threading.Thread(target=caller.sendall, args=(payload,))
            sending.start()
            assert stream.read(len(payload)) == payload
            sending.join()
            caller.shutdown(socket.SHUT_WR)
            assert stream.read() == b""
        serving.join()


def test_while_it_is_gone_nothing_reaches_the_application(running: Site) -> None:
    for _ in range(3):
        os.kill(child(), signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with suppress(OSError, http.client.HTTPException):
                answer = asked("GET", running)
                if answer.status == 200:
                    assert json.loads(answer.body)["x-forwarded-client-cert"] == CALLER, "through it, or not at all"
                    break
                assert answer.status == 503
            assert time.monotonic() < deadline, running.log("db")
    assert float(re.findall(r"^uproxy_waypoint_worker_restarts_total (\S+)$", _metrics(), re.MULTILINE)[0]) >= 3


def _metrics(address: str = DB) -> str:
    return get(address, METRICS_PORT, "/metrics")[1]


def test_what_is_bound_and_let_go_while_it_runs(site: Site) -> None:
    bound, free = site.mesh.read_text(), site.mesh.read_text().replace(", labels: {istio.io/use-waypoint: wp}", "")
    assert bound != free
    site.mesh.write_text(free)
    with telling(site.application), site.running("db"), site.running("web"):
        assert passes_it(site) is False
        site.mesh.write_text(bound)
        eventually(lambda: passes_it(site), PATIENCE_S)
        pid = child(f"{OTHER}.2")
        site.mesh.write_text(free)
        eventually(lambda: passes_it(site) is False, PATIENCE_S)
        eventually(lambda: not Path(f"/proc/{pid}").exists(), PATIENCE_S)
        site.mesh.write_text(bound)
        eventually(lambda: passes_it(site), PATIENCE_S)


def test_a_route_to_another_port_leads_past_no_policy_of_the_workload(site: Site) -> None:
    port = site.application[1]
    ports = f"{{name: a, port: 6379, targetPort: 1, appProtocol: http}}, {{name: b, port: 80, targetPort: {port}}}"
    known = re.sub(r"{port: 6379[^}]*}", ports, site.mesh.read_text())
    route = """
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: across, namespace: shop}
spec:
  parentRefs: [{kind: Service, group: "", name: db, port: 6379}]
  rules: [{backendRefs: [{name: db, port: 80}]}]
"""
    denied = """
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: not-that-port, namespace: shop}
spec: {action: DENY, selector: {matchLabels: {app: db}}, rules: [{to: [{operation: {ports: ['%d']}}]}]}
"""
    site.mesh.write_text(known + route)
    with telling(site.application), site.running("db"), site.running("web"):
        eventually(lambda: passes_it(site), PATIENCE_S)
        connection = http.client.HTTPConnection(*site.forward, timeout=30)

        def status() -> int:
            connection.request("GET", "/")
            with connection.getresponse() as answer:
                answer.read()
                return answer.status

        assert status() == 200
        site.mesh.write_text(known + route + denied % port)
        eventually(lambda: status() == 403, PATIENCE_S)
        connection.close()


def test_opaque_connections_go_through_it_and_are_cut_by_policy(site: Site) -> None:
    opaque = site.mesh.read_text().replace("appProtocol: http,", "appProtocol: tcp,")
    site.mesh.write_text(opaque.replace("{methods: [DELETE]}", "{ports: ['1']}"))
    with echo_server(site.application), site.running("db"), site.running("web"):
        with socket.create_connection(site.forward, timeout=30) as app:
            app.sendall(b"hello")
            assert app.recv(5) == b"hello"
            assert "istio_tcp_connections_opened_total" in _metrics(f"{OTHER}.2")
            site.mesh.write_text(opaque.replace("{methods: [DELETE]}", "{ports: ['6379']}"))
            with suppress(ConnectionResetError):
                assert app.recv(5) == b"", "its time is over"
        with suppress(ConnectionResetError), socket.create_connection(site.forward, timeout=30) as app:
            app.sendall(b"hello")
            assert app.recv(5) == b""


def test_an_upgrade_loses_no_request(running: Site) -> None:
    connection = http.client.HTTPConnection(*running.forward, timeout=30)

    def ask() -> None:
        connection.request("GET", "/")
        response = connection.getresponse()
        assert response.status == 200
        assert CALLER.encode() in response.read()

    ask()
    first = child()
    with running.running("db", "--take-over"):
        for _ in range(20):
            ask()
        assert child() != first
        eventually(lambda: not Path(f"/proc/{first}").exists(), PATIENCE_S)
        ask()
    connection.close()


def test_a_label_brings_it_into_force_step_by_step_and_it_outlives_broker_and_control_plane(tmp_path: Path) -> None:
    with ExitStack() as stack:
        broker, control = stack.enter_context(controlled(tmp_path, [WEB, DB_ID]))
        site = MemberSite(tmp_path, control.plane.authority, OTHER, broker, control)
        control.apply(site.resources.replace("{port: 6379,", "{port: 6379, appProtocol: http,"))
        stack.enter_context(telling(site.application))
        for name in ("db", "web"):
            site.token_file(name)
            stack.enter_context(site.running(name))
        assert passes_it(site) is False
        control.apply(_GATEWAY)
        control.plane.core.relabel(("Service", "shop", "db"), labels={"istio.io/use-waypoint": "wp"})
        broker.waypoints = set(control.plane.core.waypoints())
        assert DB_ID in broker.waypoints, "what its process reads, its uProxy reads"
        broker.admit([WEB, DB_ID])

        def is_enforced() -> bool:
            (progress,) = control.plane.core.progress()
            assert passes_it(site) is not None, "no request fails on the way"
            return progress.state.phase is Phase.ENFORCED and progress.settled

        eventually(is_enforced, PATIENCE_S)
        assert passes_it(site)
        control.apply(_ANOTHER)
        control.plane.core.relabel(("Service", "shop", "db"), labels={"istio.io/use-waypoint": "zz"})

        def has_moved() -> bool:
            assert passes_it(site), "no request fails on the way, or goes past both"
            return asked("PUT", site).status == 403

        eventually(has_moved, PATIENCE_S)
        assert beside(f"{OTHER}.2")["gateway"] == "shop/zz"
        eventually(lambda: (tmp_path / "db" / STATE_FILE).exists(), PATIENCE_S)
        control.stop()
        broker.stop()
        with site.running("db", "--take-over"):
            eventually(lambda: passes_it(site), PATIENCE_S)
            assert asked("DELETE", site).status == 403
