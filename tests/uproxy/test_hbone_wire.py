"""A running uProxy against a hand-made client: the statuses of docs/hbone.md 2.4, TLS and frames that must fail.

Every test also shows that the proxy goes on serving: one peer's mistake is that peer's only.
"""

from __future__ import annotations

import socket
import ssl
import time

import pytest

from benchmarks import pairs
from benchmarks.pairs import APP, MESH
from control.api.identity import SpiffeId
from control.server.ca import Authority
from tests.support import hbone as raw
from tests.support.certificates import identity_dir
from tests.support.envoy import assert_no_bug_was_logged, descriptors, ended_how, read_exactly, resident_mb
from tests.support.hbone import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    HEADERS,
    PING,
    RST_STREAM,
    frame,
    literal_block,
    u32,
)
from tests.support.raw_peer import PATIENCE_S, Answer, Peer, Server, context
from uproxy.hbone import ErrorCode

pytestmark = pytest.mark.root

POLICY = """\
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web-only, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-8099, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
  action: DENY
  rules:
  - to: [{operation: {ports: ["8099"]}}]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    with (
        pairs.wire(tmp_path_factory.mktemp("wire"), extra=("mallory",)) as wire,
        pairs.uproxy_server(wire, mesh=MESH + POLICY) as process,
        wire.db.listen(APP, PATIENCE_S) as listener,
    ):
        yield Server(wire, process.pid, listener)
        assert_no_bug_was_logged(wire)


@pytest.fixture(autouse=True)
def still_serving(server: Server):
    """After each test, another peer gets its answer."""
    yield
    with server.peer() as peer:
        assert peer.ask(request()).status == b"200"
        accepted, _ = server.listener.accept()
        accepted.close()


def request(authority: bytes = b"10.77.0.2:8080", method: bytes = b"CONNECT") -> list[tuple[bytes, bytes]]:
    return [(b":method", method), (b":authority", authority)]


# -- statuses


BAD_REQUESTS = {
    "GET": [*request(method=b"GET"), (b":scheme", b"https"), (b":path", b"/")],
    "POST with an authority": request(method=b"POST"),
    "an extended CONNECT": [*request(), (b":protocol", b"websocket"), (b":scheme", b"https"), (b":path", b"/")],
    "no authority": [(b":method", b"CONNECT")],
    "a Host that is another authority": [*request(), (b"host", b"10.77.0.9:8080")],
    "an empty authority": request(b""),
    "no port": request(b"10.77.0.2"),
    "an empty port": request(b"10.77.0.2:"),
    "port 0": request(b"10.77.0.2:0"),
    "port 65536": request(b"10.77.0.2:65536"),
    "a port of letters": request(b"10.77.0.2:http"),
    "a signed port": request(b"10.77.0.2:+80"),
    "a port in other digits": request("10.77.0.2:٨٠".encode()),
    "user information": request(b"root@10.77.0.2:8080"),
    "a URL": request(b"http://10.77.0.2:8080/"),
    "IPv6 without brackets": request(b"fd00::2:8080"),
    "half a bracket": request(b"[fd00::2:8080"),
    "an octal address": request(b"10.077.0.2:8080"),
    "an address that is not ours": request(b"10.77.0.1:8080"),
    "loopback": request(b"127.0.0.1:8080"),
    "any address": request(b"0.0.0.0:8080"),
    "a service that is not ours": request(b"web.shop.svc.cluster.local:8080"),
    "a port that our service lacks": request(b"db.shop.svc.cluster.local:81"),
    "bytes that are no text": request(b"\xff\xfe:80"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_malformed_connect_gets_400_and_the_reason(server: Server, name: str):
    with server.peer() as peer:
        answer = peer.ask(BAD_REQUESTS[name])
        assert answer.status == b"400", answer
        assert answer.ended
        assert answer.headers[b"x-uproxy-reason"] in (b"bad-request", b"wrong-destination")
        assert len(answer.headers[b"x-request-id"]) == 32
        assert peer.ask(request(), 3).status == b"200"
        server.listener.accept()[0].close()


@pytest.mark.parametrize("port", [15000, 15001, 15006, 15008])
def test_the_proxys_own_ports_are_not_served(server: Server, port: int):
    with server.peer() as peer:
        answer = peer.ask(request(f"10.77.0.2:{port}".encode()))
        assert (answer.status, answer.headers[b"x-uproxy-reason"]) == (b"503", b"port-forbidden")
        assert answer.ended


def test_an_application_that_does_not_listen_gets_503(server: Server):
    with server.peer() as peer:
        answer = peer.ask(request(b"10.77.0.2:8098"))
        assert (answer.status, answer.headers[b"x-uproxy-reason"]) == (b"503", b"app-unreachable")
        assert answer.ended


def test_a_caller_that_no_policy_allows_gets_401(server: Server):
    with server.peer("mallory") as peer:
        answer = peer.ask(request())
        assert (answer.status, answer.headers[b"x-uproxy-reason"]) == (b"401", b"policy")
        assert answer.ended
    server.listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.listener.accept()
    server.listener.settimeout(PATIENCE_S)


def test_a_denied_port_gets_401_and_the_rules_name(server: Server):
    with server.peer() as peer:
        answer = peer.ask(request(b"10.77.0.2:8099"))
        assert (answer.status, answer.headers[b"x-uproxy-reason"]) == (b"401", b"policy")
        assert answer.headers[b"x-uproxy-policy"].startswith(b"shop/no-8099")


def test_policy_is_asked_before_the_application(server: Server):
    """Whether a port listens is not for strangers to learn."""
    with server.peer("mallory") as peer:
        assert peer.ask(request(b"10.77.0.2:8098")).status == b"401"


@pytest.mark.parametrize("authority", [b"db.shop.svc.cluster.local:8080", b"db.shop:8080", b"10.77.0.2:8080"])
def test_a_service_name_or_an_address_is_served(server: Server, authority: bytes):
    with server.peer() as peer:
        assert peer.ask(request(authority)).status == b"200"
        application, _ = server.listener.accept()
        with application:
            peer.send(frame(DATA, 0, 1, b"ping"))
            assert read_exactly(application, 4) == b"ping"
            application.sendall(b"pong")
            peer.until(lambda: peer.answers[1].data == b"pong")


def test_extra_headers_of_ztunnel_and_istio_are_tolerated(server: Server):
    extra = [
        (b"baggage", b"k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=web," + b"x=y," * 90),
        (b"forwarded", b'for="10.77.0.1:40000";host=db.shop.svc.cluster.local'),
        (b"traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-00"),
        (b"x-istio-source", b"waypoint"),
        (b"x-forwarded-network", b"network-2"),
    ]
    from hpack import Encoder

    encoder = Encoder()
    encoder.header_table_size = 0
    with server.peer() as peer:
        peer.send(frame(HEADERS, END_HEADERS, 1, encoder.encode([*request(), *extra])))
        peer.until(lambda: peer.answers.get(1, Answer()).status)
        assert peer.answers[1].status == b"200"
        server.listener.accept()[0].close()


def test_nonsense_in_optional_headers_refuses_nobody(server: Server):
    nonsense = [(b"traceparent", b"00-zz"), (b"forwarded", b'for="";host=;;,='), (b"baggage", b"=,=,%%%")]
    with server.peer() as peer:
        assert peer.ask([*request(), *nonsense]).status == b"200"
        server.listener.accept()[0].close()


def test_a_refused_request_leaves_no_stream_behind(server: Server):
    """The sender may forget to end its side: 3,000 refusals on one tunnel with 1,024 streams at most."""
    with server.peer("mallory") as peer:
        for number in range(30):
            first = number * 200 + 1
            ids = range(first, first + 200, 2)
            for stream_id in ids:
                peer.send(frame(HEADERS, END_HEADERS, stream_id, literal_block(request())))
            peer.until(lambda ids=ids: all(peer.answers.get(i, Answer()).reset is not None for i in ids))
            assert {(peer.answers[i].status, peer.answers[i].reset) for i in ids} == {(b"401", ErrorCode.NO_ERROR)}


def test_many_requests_in_one_write_are_all_answered_also_when_their_sender_closes_behind_them(server: Server):
    before = descriptors(server.pid)
    block = literal_block(request())
    ids = range(1, 1001, 2)
    crowd = b"".join(frame(HEADERS, END_HEADERS, i, block) for i in ids)
    with server.peer("mallory") as peer:
        peer.send(crowd)
        peer.until(lambda: all(peer.answers.get(i, Answer()).status for i in ids))
        assert {peer.answers[i].status for i in ids} == {b"401"}
    with server.peer("mallory") as peer:
        peer.send(crowd)
        peer.end.shutdown(socket.SHUT_WR)
        peer.until(lambda: False)
    deadline = time.monotonic() + PATIENCE_S
    while descriptors(server.pid) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert descriptors(server.pid) <= before


def test_a_request_that_is_reset_while_the_application_is_dialled_leaves_nothing(server: Server):
    before = descriptors(server.pid)
    with server.peer() as peer:
        for stream_id in range(1, 101, 2):
            peer.send(raw.request(stream_id) + frame(RST_STREAM, 0, stream_id, u32(8)))
        peer.send(frame(PING, 0, 0, b"12345678"))
        peer.until(lambda: peer.pongs)
    for _ in range(50):  # those that got as far as the application are reset there
        server.listener.settimeout(0.3)
        try:
            application, _ = server.listener.accept()
        except TimeoutError:
            break
        with application:
            assert ended_how(application) in ("reset", "fin")
    server.listener.settimeout(PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while descriptors(server.pid) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert descriptors(server.pid) <= before


def test_pings_are_answered_while_streams_are_busy(server: Server):
    with server.peer() as peer:
        peer.ask(request())
        application, _ = server.listener.accept()
        with application:
            peer.send(frame(PING, 0, 0, b"12345678"))
            peer.until(lambda: peer.pongs)
            assert peer.pongs == [b"12345678"]


# -- frames


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (frame(DATA, 0, 1, length=(1 << 20) + 1), ErrorCode.FRAME_SIZE_ERROR),
        (frame(HEADERS, 0, 1, b"", length=(1 << 24) - 1), ErrorCode.FRAME_SIZE_ERROR),
        (
            raw.request(flags=0) + frame(CONTINUATION, 0, 1, b"\0" * 16000) * 5,
            ErrorCode.ENHANCE_YOUR_CALM,
        ),
        (frame(HEADERS, END_HEADERS, 1, length=(64 << 10) + 1), ErrorCode.ENHANCE_YOUR_CALM),
        (frame(PING, 0, 0, b"short"), ErrorCode.FRAME_SIZE_ERROR),
        (frame(DATA, 0, 7, b"nobody opened it"), ErrorCode.PROTOCOL_ERROR),
        (frame(HEADERS, END_HEADERS, 1, b"\x80"), ErrorCode.COMPRESSION_ERROR),
    ],
    ids=["large DATA", "large HEADERS", "CONTINUATIONs", "a long header block", "PING", "idle stream", "HPACK"],
)
def test_a_broken_frame_gets_a_goaway_with_its_code_and_the_end(server: Server, frames: bytes, code: ErrorCode):
    with server.peer() as peer:
        peer.send(frames)
        peer.until(lambda: False)
        assert peer.closed
        assert [g[1] for g in peer.goaways] == [code]
        assert peer.goaways[0][2], "the GOAWAY says why"


def test_http_1_on_the_tunnel_is_ended(server: Server):
    with context(server.wire, "web").wrap_socket(server.tcp()) as end:
        end.sendall(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        end.settimeout(PATIENCE_S)
        try:
            while end.recv(4096):
                pass
        except ConnectionError:
            pass


def test_a_flood_of_pings_ends_that_connection_only(server: Server):
    with server.peer() as bystander, server.peer() as peer:
        assert bystander.ask(request()).status == b"200"
        application, _ = server.listener.accept()
        with application:
            before = resident_mb(server.pid)
            try:
                for _ in range(40):
                    peer.send(frame(PING, 0, 0, bytes(8)) * 1000)
            except (ConnectionError, ssl.SSLError, TimeoutError):
                pass
            application.sendall(b"unmoved")
            bystander.until(lambda: bystander.answers[1].data == b"unmoved")
            assert resident_mb(server.pid) - before < 10


def ask_without_end(peer: Peer, block: bytes) -> None:
    for first in range(1, 2_000_000, 2000):
        peer.send(b"".join(frame(HEADERS, END_HEADERS, i, block) for i in range(first, first + 2000, 2)))


def test_a_peer_that_asks_and_asks_and_reads_nothing_is_ended(server: Server):
    """Each refusal is an answer of a hundred bytes: they must not pile up for a peer that does not take them."""
    before = resident_mb(server.pid)
    block = literal_block(request())
    with server.peer("mallory") as peer:
        peer.end.settimeout(2)
        with pytest.raises((ConnectionError, ssl.SSLError, TimeoutError)):
            ask_without_end(peer, block)
    assert resident_mb(server.pid) - before < 12


# -- TLS


def handshake_fails(server: Server, tls: ssl.SSLContext) -> bool:
    """Whether this client is turned away: with TLS 1.3 it may learn that only from its first read."""
    tcp = server.tcp()
    try:
        with tls.wrap_socket(tcp) as end:
            end.sendall(raw.CLIENT_HELLO + frame(HEADERS, END_HEADERS, 1, raw.literal_block(request())))
            while part := end.recv(4096):
                if any(f[0] == HEADERS for f in raw.frames_of(part)):
                    return False
    except (ssl.SSLError, ConnectionError):
        pass
    finally:
        tcp.close()
    return True


def test_a_client_without_a_certificate_is_turned_away(server: Server):
    assert handshake_fails(server, context(server.wire, None))


@pytest.mark.parametrize("protocols", [["http/1.1"], ["h3", "spdy/3"], []])
def test_a_client_that_does_not_speak_h2_is_turned_away(server: Server, protocols: list[str]):
    tls = context(server.wire, "web", protocols)
    assert handshake_fails(server, tls)


def test_a_client_of_another_ca_is_turned_away(server: Server, tmp_path):
    """The same name, signed by somebody else."""
    stranger = Authority.create(tmp_path / "ca", pairs.TRUST_DOMAIN)
    theirs = identity_dir(stranger, tmp_path / "web", SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/web"))
    tls = context(server.wire, None)
    tls.load_cert_chain(theirs / "chain.pem", theirs / "key.pem")
    assert handshake_fails(server, tls)


def test_tls_1_2_is_turned_away(server: Server):
    tls = context(server.wire, "web")
    tls.maximum_version = ssl.TLSVersion.TLSv1_2
    assert handshake_fails(server, tls)


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(100), bytes(2000), b""])
def test_noise_instead_of_tls_is_ended(server: Server, noise: bytes):
    with server.tcp() as end:
        end.sendall(noise)
        end.shutdown(socket.SHUT_WR)
        assert ended_how(end) in ("fin", "reset")
