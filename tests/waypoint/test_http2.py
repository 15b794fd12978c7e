"""HTTP/2 through a real waypoint, on either side and on both, with peers that speak it by the h2 library."""

from __future__ import annotations

import asyncio
import contextlib
import re
from functools import partial
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from control.api.policy import Action, AuthorizationPolicy, Operation, Rule, Target
from control.server.ca import Authority
from tests.support.http2_peer import Headers, Http2Peer, Message, served_by, speaking
from tests.support.through_waypoint import Through, run_through
from tests.support.waiting import until

GET = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"db"), (b":path", b"/items")]
POST = [(b":method", b"POST"), *GET[1:]]
OK = [(b":status", b"200")]


run = partial(run_through, protocol="kubernetes.io/h2c")


async def echo(peer: Http2Peer, stream: int, message: Message) -> None:
    """Answers with the head that came, then with the body."""
    await peer.until(lambda: message.over)
    head = b"".join(b"%b: %b\n" % field for field in message.headers)
    peer.respond(stream, [*OK, (b"served", b"%d" % stream)])
    await peer.send(stream, head + b"\n" + message.body, ends=True)


def test_requests_cross_with_their_heads_and_bodies(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            streams = [peer.request(GET), peer.request(POST, b"hello" * 1000), peer.request(GET)]
            answers = [await peer.answer(stream) for stream in streams]
        assert [answer.status for answer in answers] == [200] * 3
        head, _, body = bytes(answers[1].body).partition(b"\n\n")
        assert body == b"hello" * 1000
        assert head.splitlines()[:4] == [b":method: POST", b":scheme: http", b":authority: db", b":path: /items"]
        assert b"x-forwarded-client-cert: URI=spiffe://cluster.local/ns/shop/sa/web" in head
        assert sorted(dict(answer.headers)[b"served"] for answer in answers) == [b"1", b"3", b"5"], "one connection"

    run(identities, authority, served_by(echo), client)


def test_a_small_body_is_one_frame_that_ends_the_stream(identities: Path, authority: Authority) -> None:
    frames: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        connection.initiate_connection()
        writer.write(connection.data_to_send())
        while data := await reader.read(1 << 16):
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    frames.append(event.data)
                elif isinstance(event, h2.events.StreamEnded):
                    connection.send_headers(event.stream_id, [(":status", "200")], end_stream=True)
            writer.write(connection.data_to_send())
        writer.close()

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            assert (await peer.answer(peer.request(POST, b"hello"))).status == 200
        assert frames == [b"hello"]

    run(identities, authority, serve, client)


async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An HTTP/1.1 server that answers with what it has read."""
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            body = b""
            if b"chunked" in head:
                while size := int(await reader.readline(), 16):
                    body += await reader.readexactly(size)
                    await reader.readexactly(2)
                await reader.readline()
            elif found := re.search(rb"content-length: (\d+)", head):
                body = await reader.readexactly(int(found[1]))
            told = head + body
            writer.write(
                b"HTTP/1.1 200 OK\r\nconnection: keep-alive, x-a\r\nx-a: 1\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            writer.write(b"%x\r\n%b\r\n0\r\nx-sum: 7\r\nx-uproxy-reason: forged\r\n\r\n" % (len(told), told))
    writer.close()


def test_http2_becomes_http1_for_a_backend_that_speaks_that(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            crumbs = [(b"cookie", b"a=1"), (b"cookie", b"b=2"), (b"te", b"trailers")]
            bare = await peer.answer(peer.request([*GET, *crumbs]))
            assert bare.status == 200
            assert bytes(bare.body).startswith(b"GET /items HTTP/1.1\r\nhost: db\r\ncookie: a=1; b=2\r\n")
            assert b"te:" not in bare.body
            assert not {b"connection", b"x-a", b"transfer-encoding"} & dict(bare.headers).keys()
            assert bare.trailers == [(b"x-sum", b"7")]
            sized = await peer.answer(peer.request([*POST, (b"content-length", b"5")], b"hello"))
            assert b"content-length: 5\r\n" in sized.body
            assert sized.body.endswith(b"\r\n\r\nhello")
            chunked = await peer.answer(peer.request(POST, b"hello"))
            assert b"transfer-encoding: chunked\r\n" in chunked.body
            assert chunked.body.endswith(b"\r\n\r\nhello")
            empty = await peer.answer(peer.request(POST))
            assert b"content-length: 0\r\n" in empty.body

    run(identities, authority, tell, client, protocol="http")


def test_http1_becomes_http2_for_a_backend_that_speaks_that(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(
            b"POST /items HTTP/1.1\r\nHost: db\r\nConnection: x-a\r\nX-A: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        writer.write(b"5\r\nhello\r\n0\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"transfer-encoding: chunked\r\n" in head
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readline()
        assert body.startswith(b":method: POST\n:scheme: http\n:authority: db\n:path: /items\n")
        assert body.endswith(b"\n\nhello")
        assert b"x-a" not in body
        assert b"transfer-encoding" not in body
        writer.write(b"GET /none HTTP/1.1\r\nHost: db\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 0\r\n" in head, "or it would wait for the end of the connection"
        writer.close()

    async def server(peer: Http2Peer, stream: int, message: Message) -> None:
        if dict(message.headers)[b":path"] == b"/none":
            peer.respond(stream, OK, ends=True)
        else:
            await echo(peer, stream, message)

    run(identities, authority, served_by(server), client)


async def hold_gets(peer: Http2Peer, stream: int, message: Message) -> None:
    """Answers no GET, so that whoever resets one was never answered, however slow it is."""
    if dict(message.headers)[b":method"] != b"GET":
        await converse(peer, stream, message)


async def converse(peer: Http2Peer, stream: int, message: Message) -> None:
    """Answers each piece as it comes, then with the caller's trailers as its own."""
    peer.respond(stream, [(b":status", b"103"), (b"link", b"</a>")])
    peer.respond(stream, OK)
    while message.body or not message.over:
        said = bytes(message.body)
        message.body.clear()
        if said:
            await peer.send(stream, said.upper())
        await peer.until(lambda: bool(message.body) or message.over)
    peer.end(stream, [(b"grpc-status", b"0"), *message.trailers])


def test_both_sides_stream_at_once_and_trailers_follow(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            stream = peer.request(POST, ends=False)
            answer = peer.messages[stream]
            for number in range(1, 4):
                await peer.send(stream, b"ping")
                await peer.until(lambda number=number: answer.body == b"PING" * number)
            assert not answer.over
            peer.end(stream, [(b"x-sum", b"7"), (b"x-forwarded-for", b"forged")])
            await peer.answer(stream)
            assert answer.trailers == [(b"grpc-status", b"0"), (b"x-sum", b"7")]
            assert [dict(head)[b":status"] for head in answer.interim] == [b"103"]

    run(identities, authority, served_by(converse), client)


def test_a_caller_s_reset_reaches_the_backend_and_other_streams_go_on(identities: Path, authority: Authority) -> None:
    seen: list[Message] = []

    async def server(peer: Http2Peer, stream: int, message: Message) -> None:
        seen.append(message)
        await converse(peer, stream, message)

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            first, second = peer.request(POST, ends=False), peer.request(POST, ends=False)
            for stream in (first, second):
                await peer.send(stream, b"ping")
                await peer.until(lambda stream=stream: peer.messages[stream].body == b"PING")
            peer.reset(first, 8)
            await until(lambda: [message.reset for message in seen] == [8, None])
            await peer.send(second, b"ping", ends=True)
            assert (await peer.answer(second)).body == b"PINGPING"
        await until(lambda: len(through.telemetry.exchanges) == 2)
        assert [(e.status, e.flag, e.protocol) for e in through.telemetry.exchanges] == [
            (200, "DC", "HTTP/2"),
            (200, "-", "HTTP/2"),
        ]

    run(identities, authority, served_by(server), client)


def test_a_request_that_is_reset_as_it_comes_is_not_sent_on(identities: Path, authority: Authority) -> None:
    """Or it would wait for the backend's answer, and hold one of its streams, with nobody to tell it to."""
    seen: list[Message] = []

    async def server(peer: Http2Peer, stream: int, message: Message) -> None:
        seen.append(message)
        await hold_gets(peer, stream, message)

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            for _ in range(10):
                peer.reset(peer.request(GET), 8)  # both leave together
            assert (await peer.answer(peer.request(POST, b"x"))).body == b"X"
            await until(lambda: len(through.telemetry.exchanges) == 11)
        assert sorted(e.flag for e in through.telemetry.exchanges) == ["-", *["DC"] * 10]
        assert len(seen) == 1

    run(identities, authority, served_by(server), client)


@pytest.mark.parametrize(("code", "told"), [(8, 8), (11, 11), (7, 2), (0, 2), (1, 2)])
def test_a_backend_s_reset_within_a_response_is_a_reset(
    identities: Path, authority: Authority, code: int, told: int
) -> None:
    async def server(peer: Http2Peer, stream: int, _: Message) -> None:
        peer.respond(stream, OK)
        await peer.send(stream, b"half of it")
        await asyncio.sleep(0.05)
        peer.reset(stream, code)

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            answer = await peer.answer(peer.request(GET))
            assert (answer.status, bytes(answer.body), answer.ended, answer.reset) == (200, b"half of it", False, told)
            assert (await peer.answer(peer.request(GET))).reset == told, "the connection goes on"

    run(identities, authority, served_by(server), client)


def test_a_reset_before_the_response_is_a_503(identities: Path, authority: Authority) -> None:
    async def server(peer: Http2Peer, stream: int, _: Message) -> None:
        peer.reset(stream, 2)

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            answer = await peer.answer(peer.request(GET))
            assert answer.status == 503
            assert dict(answer.headers)[b"x-uproxy-reason"] == b"upstream"

    run(identities, authority, served_by(server), client)


@pytest.mark.parametrize("way", ["refused", "goaway"])
def test_a_request_that_was_not_taken_is_sent_again(identities: Path, authority: Authority, way: str) -> None:
    connections: set[Http2Peer] = set()

    async def server(peer: Http2Peer, stream: int, message: Message) -> None:
        first = not connections or connections == {peer}
        connections.add(peer)
        if not first:
            await echo(peer, stream, message)
        elif way == "refused":
            peer.reset(stream, 7)
        else:
            peer.goaway(0)

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            answer = await peer.answer(peer.request([(b":method", b"POST"), *GET[1:]]))
            assert answer.status == 200
        await until(lambda: len(through.telemetry.exchanges) == 1)
        assert through.telemetry.exchanges[0].attempts == 2

    run(identities, authority, served_by(server), client)


def test_a_draining_backend_gets_no_new_requests_and_keeps_the_old(identities: Path, authority: Authority) -> None:
    served: list[tuple[Http2Peer, int]] = []

    async def server(peer: Http2Peer, stream: int, message: Message) -> None:
        served.append((peer, stream))
        await converse(peer, stream, message)

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            old = peer.request(POST, ends=False)
            await peer.send(old, b"ping")
            await peer.until(lambda: peer.messages[old].body == b"PING")
            served[0][0].goaway(1)
            await asyncio.sleep(0.1)
            assert (await peer.answer(peer.request(POST, b"new"))).body == b"NEW"
            await peer.send(old, b"ping", ends=True)
            assert (await peer.answer(old)).body == b"PINGPING"
        assert served[0][0] is not served[1][0]

    run(identities, authority, served_by(server), client)


def test_who_reads_nothing_stops_that_stream_and_no_other(identities: Path, authority: Authority) -> None:
    sent = 0

    async def server(peer: Http2Peer, stream: int, message: Message) -> None:
        nonlocal sent
        peer.respond(stream, OK)
        if dict(message.headers)[b":path"] == b"/items":
            for _ in range(1000):
                await peer.send(stream, bytes(10_000))
                sent += 10_000
        peer.end(stream)

    async def client(through: Through) -> None:
        async with speaking(*await through.open(), reads=False) as peer:
            stream = peer.request(GET)
            await until(lambda: sent > 0)
            before = -1
            while before != sent:
                before = sent
                await asyncio.sleep(0.3)
            assert sent < 4_000_000, "windows, and no more"
            small = await peer.answer(peer.request([*GET[:3], (b":path", b"/small")]))
            assert small.ended
            read = 0
            message = peer.messages[stream]
            while not message.ended:
                taken = len(message.body)
                message.body.clear()
                read += taken
                if taken:
                    peer.credit(stream, taken)
                await peer.until(lambda: bool(message.body) or message.ended)
            assert read + len(message.body) == 10_000_000

    run(identities, authority, served_by(server), client)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b":method", b"CONNECT"), (b":authority", b"db:1")], 501),
        ([(b":method", b"get"), *GET[1:]], 400),
        ([*GET[:3], (b":path", b"items")], 400),
        ([*GET[:3], (b":path", b"*")], 400),
        ([*GET[:3], (b":path", b"/a b")], 400),
        ([*GET[:3], (b":path", b"/%2f")], 400),
        ([*GET[:2], (b":path", b"/")], 400),
        ([*GET[:1], (b":scheme", b"ftp"), *GET[2:]], 400),
        ([*GET, (b"host", b"other")], 400),
        ([*GET, (b"x_forwarded_for", b"1.2.3.4")], 400),
        ([*GET, (b"content-length", b"5")], 400),
        ([*GET, (b"content-length", b"+0")], 400),
        ([*GET[:2], (b":authority", b"a@b"), GET[3]], 400),
        ([*GET[:3], (b":path", b"/" + b"a" * 17_000)], 414),
        ([*POST, (b"expect", b"200-ok")], 417),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused_and_the_connection_goes_on(
    identities: Path, authority: Authority, headers: Headers, status: int
) -> None:
    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            assert (await peer.answer(peer.request(headers))).status == status
            assert (await peer.answer(peer.request(GET))).status == 200

    run(identities, authority, served_by(echo), client)


@pytest.mark.parametrize("protocol", ["http", "kubernetes.io/h2c"])
@pytest.mark.parametrize("length", [0, 3, 7])
@pytest.mark.parametrize("body", [b"hello", b"h"])
def test_a_body_of_another_length_than_said_is_refused(
    identities: Path, authority: Authority, protocol: str, length: int, body: bytes
) -> None:
    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            answer = await peer.answer(peer.request([*POST, (b"content-length", b"%d" % length)], body))
            assert answer.status == 400

    run(identities, authority, tell if protocol == "http" else served_by(echo), client, protocol=protocol)


BAD_FIELDS = ((b"connection", b"close"), (b"transfer-encoding", b"chunked"), (b"a", b"b\r\nc: d"), (b"A", b""))


def test_what_is_no_field_is_a_reset_of_its_stream(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            for bad in BAD_FIELDS:
                assert (await peer.answer(peer.request([*GET, bad]))).reset == 1, bad
            assert (await peer.answer(peer.request(GET))).status == 200
        assert len(through.telemetry.exchanges) <= 1

    run(identities, authority, served_by(echo), client)


def test_two_callers_never_share_a_connection_to_a_backend(identities: Path, authority: Authority) -> None:
    connections: dict[Http2Peer, set[bytes]] = {}

    async def server(peer: Http2Peer, stream: int, message: Message) -> None:
        connections.setdefault(peer, set()).add(dict(message.headers)[b"x-forwarded-client-cert"])
        await echo(peer, stream, message)

    async def client(through: Through) -> None:
        async with (
            speaking(*await through.open()) as web,
            speaking(*await through.open(through.pair.db)) as db,
            speaking(*await through.open()) as web_again,
        ):
            for _ in range(3):
                streams = [(peer, peer.request(GET)) for peer in (web, db, web_again) for _ in range(5)]
                assert all([(await peer.answer(stream)).status == 200 for peer, stream in streams])
        assert sorted(map(len, connections.values())) == [1, 1], "each caller has one of its own"

    run(identities, authority, served_by(server), client)


def deny(through: Through) -> None:
    rule = Rule(operations=(Operation(methods=("DELETE",)),))
    policy = AuthorizationPolicy("shop", "no", Action.DENY, None, (rule,), (Target("Gateway", "shop/wp"),))
    through.pair.apply(policy)


def test_policy_is_asked_for_each_request(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        deny(through)
        async with speaking(*await through.open()) as peer:
            streams = [peer.request([(b":method", method), *GET[1:]]) for method in (b"GET", b"DELETE", b"GET")]
            assert [(await peer.answer(stream)).status for stream in streams] == [200, 403, 200]
            refused = peer.messages[streams[1]]
            assert dict(refused.headers)[b"x-uproxy-policy"] == b"shop/no[0]"
            body = peer.request([(b":method", b"DELETE"), *GET[1:]], b"half", ends=False)
            answer = await peer.answer(body)
            assert answer.status == 403
            assert answer.ended
            assert (await peer.answer(peer.request(GET))).status == 200, "what is left of the body is not waited for"

    run(identities, authority, served_by(echo), client)


def test_a_drain_lets_streams_end_and_takes_no_more(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as busy, speaking(*await through.open()) as idle:
            stream = busy.request(POST, ends=False)
            await busy.send(stream, b"ping")
            await busy.until(lambda: busy.messages[stream].body == b"PING")
            assert (await idle.answer(idle.request(POST, b""))).status == 200
            through.pair.plane.run(lambda: through.gateway.drain(1.0))
            await idle.until(lambda: idle.closed)
            assert idle.goaways[-1] == (1, 0)
            await busy.until(lambda: len(busy.goaways) == 2)
            assert [last for last, _ in busy.goaways] == [(1 << 31) - 1, 1]
            await busy.send(stream, b"ping", ends=True)
            assert (await busy.answer(stream)).body == b"PINGPING"
            await busy.until(lambda: busy.closed)

    run(identities, authority, served_by(converse), client)


@pytest.mark.parametrize("junk", [b"\0" * 9, b"\0\0\4\3\0\0\0\0\0\0\0\0\0", b"GET / HTTP/1.1\r\n\r\n"])
def test_who_breaks_the_protocol_is_told_and_closed(identities: Path, authority: Authority, junk: bytes) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        async with speaking(reader, writer) as peer:
            stream = peer.request(POST, ends=False)
            await peer.send(stream, b"ping")
            await peer.until(lambda: peer.messages[stream].body == b"PING")
            writer.write(junk)
            await peer.until(lambda: peer.closed)
            assert peer.goaways
            assert peer.goaways[0][1] != 0
        async with speaking(*await through.open()) as peer:
            assert (await peer.answer(peer.request(POST, b"x"))).body == b"X"

    run(identities, authority, served_by(converse), client)


def test_a_backend_that_speaks_something_else_is_a_503(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            answer = await peer.answer(peer.request(GET))
            assert answer.status == 503

    run(identities, authority, tell, client)


def test_a_caller_that_closes_takes_its_requests_along(identities: Path, authority: Authority) -> None:
    seen: list[Message] = []

    async def server(peer: Http2Peer, stream: int, message: Message) -> None:
        seen.append(message)
        await converse(peer, stream, message)

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            for _ in range(3):
                stream = peer.request(POST, ends=False)
                await peer.send(stream, b"ping")
            await peer.until(lambda: all(message.body == b"PING" for message in peer.messages.values()))
        await until(lambda: [message.reset for message in seen] == [8] * 3)
        await until(lambda: [e.flag for e in through.telemetry.exchanges] == ["DC"] * 3)

    run(identities, authority, served_by(server), client)


def test_large_heads_cross_in_several_frames(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            large = [(b"x-%d" % number, b"y" * 2000) for number in range(20)]
            answer = await peer.answer(peer.request([*GET, *large]))
            assert answer.status == 200
            assert b"x-19: " + b"y" * 2000 in answer.body

    run(identities, authority, served_by(echo), client)


def test_a_backend_that_takes_one_request_at_a_time_gets_more_connections(
    identities: Path, authority: Authority
) -> None:
    connections: set[Http2Peer] = set()

    async def server(peer: Http2Peer, stream: int, message: Message) -> None:
        connections.add(peer)
        peer.h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 1})
        await converse(peer, stream, message)

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            streams = []
            for _ in range(3):
                streams.append(stream := peer.request(POST, ends=False))
                await peer.send(stream, b"ping")
                await peer.until(lambda stream=stream: peer.messages[stream].body == b"PING")
            assert len(connections) == 3
            for stream in streams:
                peer.end(stream)
            for stream in streams:
                await peer.answer(stream)
            assert (await peer.answer(peer.request(POST, b"x"))).body == b"X"
            assert len(connections) == 3

    run(identities, authority, served_by(server), client)


@pytest.mark.parametrize(("said", "method"), [(3, b"GET"), (7, b"GET"), (5, b"HEAD")])
def test_a_response_of_another_length_than_said_is_never_whole(
    identities: Path, authority: Authority, said: int, method: bytes
) -> None:
    async def server(peer: Http2Peer, stream: int, _: Message) -> None:
        peer.respond(stream, [*OK, (b"content-length", b"%d" % said)])
        await peer.send(stream, b"hello", ends=True)

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            answer = await peer.answer(peer.request([(b":method", method), *GET[1:]]))
            assert not answer.ended or answer.status == 502

    run(identities, authority, served_by(server), client)


def test_a_request_may_wait_for_100_continue(identities: Path, authority: Authority) -> None:
    async def server(peer: Http2Peer, stream: int, message: Message) -> None:
        assert dict(message.headers)[b"expect"] == b"100-continue"
        assert not message.body
        peer.respond(stream, [(b":status", b"100")])
        await echo(peer, stream, message)

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            stream = peer.request([*POST, (b"expect", b"100-continue")], ends=False)
            await peer.until(lambda: bool(peer.messages[stream].interim))
            await peer.send(stream, b"hello", ends=True)
            assert (await peer.answer(stream)).body.endswith(b"\n\nhello")

    run(identities, authority, served_by(server), client)


@pytest.mark.parametrize("flood", ["resets", "pings", "settings", "empty data"])
def test_a_flood_ends_the_connection_that_it_comes_on_and_no_other(
    identities: Path, authority: Authority, flood: str
) -> None:
    frames = {
        "pings": b"\0\0\x08\6\0\0\0\0\0" + bytes(8),
        "settings": b"\0\0\0\4\0\0\0\0\0",
        "empty data": b"\0\0\0\0\0\0\0\0\1",
    }

    async def client(through: Through) -> None:
        reader, writer = await through.open()
        async with speaking(*await through.open()) as other, speaking(reader, writer) as peer:
            kept = peer.request(POST, ends=False)
            with contextlib.suppress(ConnectionError):
                if flood == "resets":
                    for _ in range(3000):
                        if peer.goaways or peer.closed:
                            break  # h2 opens no stream after that
                        peer.reset(peer.request(GET), 8)
                        await writer.drain()
                else:
                    for _ in range(400):
                        writer.write(frames[flood] * 100)
                        await writer.drain()
            await peer.until(lambda: peer.closed)
            assert [code for _, code in peer.goaways] == [ErrorCodes.ENHANCE_YOUR_CALM]
            assert not peer.messages[kept].ended
            assert (await other.answer(other.request(POST, b"x"))).body == b"X"
            assert through.server.tunnels(), "the caller's tunnel stays"

    run(identities, authority, served_by(hold_gets), client)
