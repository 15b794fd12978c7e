"""What a connection speaks where its port does not say: told by its first bytes, soon, and closed where it counts."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.jwt import JwtRule, RequestAuthentication, canonical_jwks
from control.api.policy import Action, AuthorizationPolicy, Operation, Rule, Source, Target
from control.api.records import Record
from control.api.route import HTTPRoute, Parent
from control.api.traffic import RateLimit, TrafficPolicy
from control.api.workload import ServicePort
from control.server.ca import Authority
from tests.support.certificates import WEB
from tests.support.http2_peer import speaking
from tests.support.through_waypoint import Through
from tests.support.through_waypoint import run_through as run
from tests.waypoint.test_gateway import Reader, Writer, answer, rule, tell
from tests.waypoint.test_http2 import GET
from uproxy.errors import Flag
from uproxy.hbone import PREFACE
from waypoint.detection import Begun, begun

HTTP1_LINES = (
    b"GET / HTTP/1.1\r\n", b"\r\nM-SEARCH /a?b HTTP/1.0\r\n", b"POST http://a/ HTTP/1.1\r\n",
    b"A" * 32 + b" / HTTP/1.1\r\n",
)  # fmt: skip
OPAQUE = (
    b"*1\r\n$4\r\nPING\r\n", b"PING\r\n", b"EHLO a\r\n", b"GET key\r\n", b"\x16\x03\x01", b"\0", b"SSH-2.0-a\r\n",
    b'CONNECT {"verbose":false}\r\n', b"PUB a 5\r\nhello\r\n", b"\n", b"\r\r", b"\r\n\r\n", b"get / HTTP/1.1\r\n",
    b"GET / HTTP/1.1\n", b"GET / HTTP/1.2\r\n", b"GET / HTTP/2.0\r\n", b"GET  / HTTP/1.1\r\n", b"GET / http/1.1\r\n",
    b"GET /\r\n", b"PRI * HTTP/2.0\r\n\r\nXX", b"A" * 40, b"A" * 33 + b" / HTTP/1.1\r\n", b"GET /" + b"a" * 20_000,
)  # fmt: skip


def test_ports_say_what_they_speak_or_nothing() -> None:
    def said(name: str, protocol: str = "", port: int = 80) -> str:
        found = ServicePort(name, port, port, protocol)
        return "HTTP" if found.is_http else "opaque" if found.is_opaque else "undeclared"

    assert [said(name) for name in ("http", "grpc-web", "http2-a")] == ["HTTP"] * 3
    assert [said(name) for name in ("", "web", "https-", "tcpx")] == [
        "undeclared",
        "undeclared",
        "opaque",
        "undeclared",
    ]
    assert [said(name) for name in ("tcp", "tls-a", "https", "mysql", "redis-1", "mongo")] == ["opaque"] * 6
    assert [said("http", "tcp"), said("", "postgresql"), said("tcp", "http")] == ["opaque", "opaque", "HTTP"]
    assert [said("web", port=port) for port in (25, 53, 3306, 27017)] == ["opaque"] * 4


@pytest.mark.parametrize("line", HTTP1_LINES)
def test_a_request_is_known_by_its_line(line: bytes) -> None:
    for end in range(1, len(line)):
        assert begun(line[:end]) is None, line[:end]
    assert begun(line) is begun(line + b"\0\xff") is Begun.HTTP1


def test_http2_is_known_by_its_preface() -> None:
    assert {begun(PREFACE[:end]) for end in range(1, len(PREFACE))} == {None}
    assert begun(PREFACE) is begun(PREFACE + b"\0") is Begun.HTTP2


@pytest.mark.parametrize("data", OPAQUE, ids=lambda data: repr(data[:30]))
def test_everything_else_is_opaque(data: bytes) -> None:
    assert begun(data) is Begun.OPAQUE


_PIECES = (
    b"GET",
    b"A" * 31,
    b" ",
    b"/",
    b"HTTP/1.1",
    b"\r\n",
    b"\r",
    b"\n",
    b"PRI * HTTP/2.0\r\n\r\n",
    b"SM\r\n\r\n",
    b"a",
    b"-",
    b"\0",
)


@given(st.lists(st.sampled_from(_PIECES)).map(b"".join), st.binary(max_size=8))
def test_what_is_decided_stays_decided(data: bytes, more: bytes) -> None:
    decided: Begun | None = None
    for end in range(1, len(data + more) + 1):
        found = begun((data + more)[:end])
        assert decided in (None, found)
        decided = found


# -- through a waypoint, on a port of which nothing is said


async def either(reader: Reader, writer: Writer) -> None:
    """An application that tells requests from other bytes, which it answers in upper case."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        first = await reader.readexactly(4)
        if first == b"GET ":
            reader._buffer[:0] = first  # type: ignore[attr-defined]
            await tell(reader, writer)
            return
        writer.write(first.upper())
        while data := await reader.read(1 << 16):
            writer.write(data.upper())
    writer.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waypoint.gateway.TIMEOUT_S", 0.05)


def test_http_and_other_bytes_cross_one_port(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        for number in range(2):
            writer.write(b"GET /%d HTTP/1.1\r\nHost: db\r\n\r\n" % number)
            status, _, body = await answer(reader)
            assert status == 200
            assert b"x-forwarded-client-cert" in body
        writer.close()
        reader, writer = await through.open()
        writer.write(b"PING")
        await asyncio.sleep(0.01)  # which could be a method
        writer.write(b"\r\nmore")
        assert await reader.readexactly(10) == b"PING\r\nMORE"
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        reader, writer = await through.open()
        writer.write(b"GET /two HTT")
        await asyncio.sleep(0.01)
        writer.write(b"P/1.1\r\nHost: db\r\nConnection: close\r\n\r\n")
        assert (await answer(reader))[0] == 200
        writer.close()
        assert [exchange.path for exchange in through.telemetry.exchanges] == ["/0", "/1", "/two"]
        assert [record.flag for record in through.telemetry.ended] == [Flag.NONE]

    run(identities, authority, either, client, protocol="")


def test_backends_are_spoken_to_as_callers_speak(identities: Path, authority: Authority) -> None:
    seen: list[bytes] = []

    async def note(reader: Reader, writer: Writer) -> None:
        seen.append(await reader.readexactly(14))
        writer.close()

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            await peer.answer(peer.request(GET))
        reader, writer = await through.open()
        writer.write(b"GET /items HTTP/1.1\r\nHost: db\r\n\r\n")
        await answer(reader)
        writer.close()
        assert set(seen) == {PREFACE[:14], b"GET /items HTT"}

    run(identities, authority, note, client, protocol="")


@pytest.mark.parametrize("said", [b"", b"GET /"])
def test_a_server_that_speaks_first_is_waited_for_no_longer_than_a_moment(
    identities: Path, authority: Authority, impatient: None, said: bytes
) -> None:
    async def greet(reader: Reader, writer: Writer) -> None:
        writer.write(b"220 welcome\r\n")
        writer.write(await reader.read())
        writer.close()

    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(said)
        assert await reader.readexactly(13) == b"220 welcome\r\n"
        writer.write(b"bye")
        writer.write_eof()
        assert await reader.read() == said + b"bye"
        writer.close()

    run(identities, authority, greet, client, protocol="")


def test_who_ends_before_it_is_known_is_opaque(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"PING")
        writer.write_eof()
        assert await reader.read() == b"PING"
        writer.close()

    run(identities, authority, either, client, protocol="")


_TARGET = (Target("Service", "shop/db"),)
ASKING: dict[str, Record] = {
    "a policy": AuthorizationPolicy(
        "shop",
        "p",
        Action.ALLOW,
        None,
        (Rule((Source(principals=("*",)),)), Rule(operations=(Operation(methods=("GET",)),))),
        _TARGET,
    ),
    "a route": HTTPRoute("shop", "db", (Parent("shop/db", 0),), (), (rule("/"),)),
    "a rate limit": TrafficPolicy("shop", "t", _TARGET, (RateLimit(100, 1000, 100),)),
    "an authentication": RequestAuthentication("shop", "a", _TARGET, (JwtRule("i", canonical_jwks('{"keys": []}')),)),
}


@pytest.mark.parametrize("what", ASKING)
def test_where_something_asks_for_what_http_says_nothing_else_passes(
    identities: Path, authority: Authority, impatient: None, what: str
) -> None:
    reached = 0

    async def count(reader: Reader, writer: Writer) -> None:
        nonlocal reached
        reached += 1
        await either(reader, writer)

    async def client(through: Through) -> None:
        through.pair.apply(ASKING[what])
        reader, writer = await through.open()
        writer.write(b"PING\r\n\r\n")
        assert (await answer(reader))[0] == 400
        assert await reader.read() == b""
        writer.close()
        reader, writer = await through.open()  # and silence opens nothing
        await asyncio.sleep(0.2)
        assert reached == 0
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 200
        writer.close()

    run(identities, authority, count, client, protocol="")


def test_what_is_open_is_cut_when_something_asks_for_http(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"bytes")
        assert await reader.readexactly(5) == b"BYTES"
        through.pair.plane.run(through.connections.reauthorise)
        writer.write(b"more")
        assert await reader.readexactly(4) == b"MORE"
        through.pair.apply(ASKING["a route"])
        through.pair.plane.run(through.connections.reauthorise)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()

    run(identities, authority, either, client, protocol="")


def test_l4_policy_holds_for_both(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        nobody = AuthorizationPolicy(
            "shop", "no", Action.DENY, None, (Rule((Source(principals=(WEB.principal,)),)),), _TARGET
        )
        through.pair.apply(nobody)
        reader, writer = await through.open()
        writer.write(b"bytes")
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        (record,) = through.telemetry.ended
        assert (record.flag, record.policy) == (Flag.DENY, "shop/no[0]")
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 403
        writer.close()

    run(identities, authority, either, client, protocol="")
