"""Requests that parsers read in different ways, through a running waypoint to whole servers of other people.

Each is refused and its connection closed, or what the backend gets is one request, which nginx, HAProxy, Envoy, Node
and h11 take for the same as the waypoint, with the next one behind it.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import h11
import pytest
from hpack import Decoder
from hypothesis import given, settings

from control.server.ca import Authority
from tests.support import http1_vectors, http2_vectors
from tests.support.examples import examples
from tests.support.hbone import CLIENT_HELLO, DATA, END_STREAM, GOAWAY, HEADERS, RST_STREAM
from tests.support.http1_judges import NEXT, NEXT_REQUEST, Request, by_h11
from tests.support.http2_vectors import Sent
from tests.support.judges import PATIENCE_S, SERVERS, Judge, Refused, judges
from tests.support.pair import DB_ADDRESS
from tests.support.through_waypoint import Through, running_waypoint
from uproxy import plane
from waypoint.http1_reader import RequestReader
from waypoint.messages import RequestHead
from waypoint.telemetry import Exchange

H2_NEXT = Sent(((b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"next"), (b":path", b"/next")))


@dataclass
class Site:
    """A waypoint before an application that keeps the bytes of each whole request; both in a thread of their own."""

    door: int
    through: Through
    forwarded: list[bytes]
    broken: list[Exception] = field(default_factory=list)
    """What the application could not read."""

    def clear(self) -> None:
        self.forwarded.clear()
        self.broken.clear()
        self.through.telemetry.exchanges.clear()

    @property
    def exchanges(self) -> list[Exchange]:
        """What the waypoint has taken for requests."""
        return self.through.telemetry.exchanges

    def sent(self, data: bytes, until: Callable[[bytes], bool] = lambda _: False) -> bytes:
        """What comes back until the connection is closed, or it is enough."""
        self.clear()
        answered = b""
        with closing(socket.create_connection(("127.0.0.1", self.door), PATIENCE_S)) as end:
            end.sendall(data)
            while not until(answered) and (part := end.recv(1 << 16)):
                answered += part
        return answered


async def _kept(forwarded: list[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers requests, one after the other. Raises h11's errors."""
    server, raw = h11.Connection(h11.SERVER), b""
    while data := await reader.read(1 << 16):
        raw += data
        server.receive_data(data)
        while (event := server.next_event()) is not h11.NEED_DATA:
            if server.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                writer.write(server.send(go_on) or b"")
            if isinstance(event, h11.EndOfMessage):
                rest, _ = server.trailing_data
                forwarded.append(raw[: len(raw) - len(rest)])
                raw = rest
                writer.write(server.send(h11.Response(status_code=200, headers=[("content-length", "0")])) or b"")
                writer.write(server.send(h11.EndOfMessage()) or b"")
                server.start_next_cycle()


async def _serve(directory: Path, ready: Future[Site], over: Future[asyncio.Event]) -> None:
    stop = asyncio.Event()
    over.set_result(stop)
    forwarded: list[bytes] = []
    broken: list[Exception] = []

    async def application(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await _kept(forwarded, reader, writer)
        except ConnectionError:
            pass  # a request that was given up within its body
        except Exception as error:
            broken.append(error)
        writer.close()

    app = await asyncio.start_server(application, DB_ADDRESS, 0)
    port = app.sockets[0].getsockname()[1]
    try:
        authority = Authority.create(directory / "ca", "cluster.local")
        async with running_waypoint(directory, authority, port, "http") as through, through.door() as door:
            ready.set_result(Site(door, through, forwarded, broken))
            await stop.wait()
    finally:
        app.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    ready: Future[Site] = Future()
    over: Future[asyncio.Event] = Future()
    loop: Future[asyncio.AbstractEventLoop] = Future()

    async def main() -> None:
        loop.set_result(asyncio.get_running_loop())
        try:
            await _serve(tmp_path_factory.mktemp("site"), ready, over)
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise

    thread = threading.Thread(target=lambda: plane.run(main()))
    thread.start()
    try:
        yield ready.result(PATIENCE_S)
    finally:
        loop.result().call_soon_threadsafe(over.result().set)
        thread.join()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Judge]]:
    with judges(tmp_path_factory.mktemp("judges")) as running:
        yield running


def statuses(answered: bytes) -> list[int]:
    """Of final responses; the application's and the waypoint's bodies have no status line in them."""
    found = [int(answer[:3]) for answer in answered.split(b"HTTP/1.1 ")[1:]]
    return [status for status in found if status >= 200]


def check(site: Site, servers: dict[str, Judge], raw: bytes, exchange: Exchange) -> None:
    """What was forwarded is to everybody what it is in the waypoint's own records."""
    (request, following) = by_h11(raw)
    assert following == NEXT_REQUEST
    taken_for = (exchange.method, exchange.path, exchange.authority, exchange.received)
    assert (request["method"], request["target"], request["host"].lower(), len(request["body"])) == taken_for
    for name in SERVERS:
        assert servers[name](raw) == [request, NEXT_REQUEST], name
    assert not site.broken


# -- HTTP/1.1


@pytest.mark.parametrize("name", http1_vectors.REFUSED)
def test_what_can_be_read_in_two_ways_is_refused_and_the_connection_closed(site: Site, name: str) -> None:
    answered = site.sent(http1_vectors.REFUSED[name] + NEXT)
    assert statuses(answered) == [400], answered
    assert b"\r\nconnection: close\r\n" in answered
    assert not site.forwarded


@pytest.mark.parametrize("name", http1_vectors.OTHERWISE_REFUSED)
def test_what_is_refused_with_a_status_of_its_own_closes_the_connection_too(site: Site, name: str) -> None:
    status, data = http1_vectors.OTHERWISE_REFUSED[name]
    assert statuses(site.sent(data + NEXT)) == [status]
    assert not site.forwarded


@pytest.mark.parametrize("name", http1_vectors.TAKEN)
def test_servers_read_what_the_waypoint_reads(site: Site, servers: dict[str, Judge], name: str) -> None:
    data = http1_vectors.TAKEN[name]
    (head, *_) = RequestReader(b"").feed(data)
    assert isinstance(head, RequestHead)
    answered = statuses(site.sent(data + NEXT))
    assert answered == ([200, 200] if head.keep_alive else [200])
    assert len(site.forwarded) == len(answered)
    check(site, servers, site.forwarded[0], site.exchanges[0])


@pytest.mark.soak
def test_whatever_the_waypoint_forwards_servers_read_as_it_does(site: Site, servers: dict[str, Judge]) -> None:
    """A judge may refuse a request (Node knows a list of methods only), but never read another one."""
    messages = [*http1_vectors.REFUSED.values(), *(10 * [*http1_vectors.TAKEN.values()])]
    forwarded = 0

    @given(http1_vectors.mutated(messages))
    @settings(max_examples=examples(2000))
    def altered(data: bytes) -> None:
        nonlocal forwarded
        answered = statuses(site.sent(data + NEXT))
        assert answered.count(200) == len(site.forwarded)
        assert all(status in (400, 404, 414, 417, 431, 501) for status in answered if status != 200)
        for raw in site.forwarded:
            forwarded += 1
            one, _ = by_h11(raw)
            for name in SERVERS:
                assert _read(servers[name], raw) in ([], [one, NEXT_REQUEST]), name
        assert not site.broken

    altered()
    assert forwarded > examples(2000) / 10, "most were refused: the test says little"


def _read(judge: Judge, raw: bytes) -> list[Request]:
    try:
        return judge(raw)
    except Refused:
        return []


# -- HTTP/2, which becomes HTTP/1.1


def h2(site: Site, frames: bytes) -> tuple[dict[int, int], set[int]]:
    """Statuses by stream, and the streams that were reset (0: the connection), once stream 3 has its answer."""
    decoder = Decoder()
    seen: dict[int, int] = {}
    resets: set[int] = set()
    ended: set[int] = set()

    def enough(answered: bytes) -> bool:
        seen.clear()
        nonlocal decoder
        decoder = Decoder()
        while len(answered) >= 9:
            length, kind, flags = int.from_bytes(answered[:3]), answered[3], answered[4]
            stream = int.from_bytes(answered[5:9])
            payload, answered = answered[9 : 9 + length], answered[9 + length :]
            if len(payload) < length:
                break
            if kind == HEADERS:
                status = int(dict(decoder.decode(payload, raw=True)).get(b":status", b"0"))
                if status >= 200:
                    seen[stream] = status
            if kind == RST_STREAM:
                resets.add(stream)
            if kind == GOAWAY:
                resets.add(0)
            if kind in (HEADERS, DATA) and flags & END_STREAM:
                ended.add(stream)
        return {1, 3} <= ended | resets

    site.sent(CLIENT_HELLO + frames + H2_NEXT.frames(3), enough)
    return seen, resets


def only_the_next(site: Site) -> None:
    """Nothing but the request behind it was forwarded, if that was."""
    for raw in site.forwarded:
        assert by_h11(raw) == [NEXT_REQUEST, NEXT_REQUEST], raw
    assert len(site.forwarded) <= 1


@pytest.mark.parametrize("name", [*http2_vectors.REFUSED, *http2_vectors.REFUSED_IN_OTHER_FRAMES])
def test_what_would_be_another_request_in_http1_is_refused(site: Site, name: str) -> None:
    sent = http2_vectors.REFUSED.get(name)
    seen, resets = h2(site, sent.frames(1) if sent is not None else http2_vectors.REFUSED_IN_OTHER_FRAMES[name])
    assert seen.get(1, 400) == 400
    assert 1 in seen or resets & {0, 1}
    assert seen.get(3, 200) == 200
    assert 3 in seen or 0 in resets
    only_the_next(site)


@pytest.mark.soak
def test_whatever_the_waypoint_writes_of_http2_servers_read_as_it_does(site: Site, servers: dict[str, Judge]) -> None:
    # What follows a WebSocket's opening is no request (test_websocket).
    refused = [one for one in http2_vectors.REFUSED.values() if http2_vectors.WEBSOCKET[1] not in one.fields]
    forwarded = 0

    @given(http2_vectors.mutated([*refused, *(10 * [*http2_vectors.TAKEN.values()])]))
    @settings(max_examples=examples(2000))
    def altered(sent: Sent) -> None:
        nonlocal forwarded
        seen, _ = h2(site, sent.frames(1))
        assert list(seen.values()).count(200) == len(site.forwarded)
        for raw in site.forwarded:
            forwarded += 1
            one, _ = by_h11(raw)
            for name in SERVERS:
                assert _read(servers[name], raw) in ([], [one, NEXT_REQUEST]), name
        assert not site.broken

    altered()
    assert forwarded > examples(2000), "of few streams anything but the next request went on: the test says little"


@pytest.mark.parametrize("name", http2_vectors.OTHERWISE_REFUSED)
def test_what_is_refused_of_http2_with_a_status_of_its_own(site: Site, name: str) -> None:
    status, sent = http2_vectors.OTHERWISE_REFUSED[name]
    seen, _ = h2(site, sent.frames(1))
    assert seen == {1: status, 3: 200}
    only_the_next(site)


@pytest.mark.parametrize("name", [*http2_vectors.TAKEN, *http2_vectors.IN_OTHER_FRAMES])
def test_servers_read_what_the_waypoint_writes_of_http2(site: Site, servers: dict[str, Judge], name: str) -> None:
    sent = http2_vectors.TAKEN.get(name)
    seen, _ = h2(site, sent.frames(1) if sent is not None else http2_vectors.IN_OTHER_FRAMES[name])
    assert seen == {1: 200, 3: 200}
    (raw,) = (raw for raw in site.forwarded if b" /next " not in raw)
    (exchange,) = (one for one in site.exchanges if one.path != "/next")
    check(site, servers, raw, exchange)
