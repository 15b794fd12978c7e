"""Requests through a real waypoint, from one uProxy's application to another's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm

from control.api.address import IpAddress, parse_address
from control.api.gateway import Binding, Gateway, Instance, Traffic, Via
from control.api.jwt import JwtRule, RequestAuthentication, canonical_jwks
from control.api.policy import Action, AuthorizationPolicy, Operation, Rule, Source, Target
from control.api.route import (
    NO_MODIFIER,
    Backend,
    HeaderModifier,
    HTTPRoute,
    Match,
    Parent,
    PathKind,
    PathMatch,
    RouteRule,
)
from control.api.traffic import Fault, RateLimit, TrafficPolicy
from control.api.workload import Endpoint, Service, ServicePort
from control.client.state import Changes
from control.server.ca import Authority
from tests.support.certificates import DB, WEB
from tests.support.pair import DB_ADDRESS, SERVICE_PORT
from tests.support.through_waypoint import WP_ADDRESS, Through, settled
from tests.support.through_waypoint import run_through as run
from tests.support.waiting import until
from uproxy import plane
from uproxy.errors import Flag, RefusedError
from uproxy.resolve import Hop
from waypoint.byte_stream import ByteStream
from waypoint.caller import Caller
from waypoint.gateway import TOLD_GRACE_S
from waypoint.sides import Outgoing

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
DRAIN_S = 2.5


async def request_head(reader: Reader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


async def tell(reader: Reader, writer: Writer) -> None:
    """An application that answers each request with its head, as it arrived."""
    served = 0
    while not reader.at_eof():
        try:
            head = await request_head(reader)
        except asyncio.IncompleteReadError:
            break
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        body = await reader.readexactly(length)
        served += 1
        answer = head + body
        extra = b"x-uproxy-reason: forged\r\nserved: %d\r\n" % served
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n%b\r\n%b" % (len(answer), extra, answer))
    writer.close()


async def answer(reader: Reader) -> tuple[int, bytes, bytes]:
    """Status, head and body of a response that says its length or is chunked."""
    head = await request_head(reader)
    status = int(head.split(b" ", 2)[1])
    lowered = head.lower()
    if b"transfer-encoding: chunked" in lowered:
        body = b""
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readline()
        return status, head, body
    length = next((int(line[15:]) for line in lowered.split(b"\r\n") if line.startswith(b"content-length:")), 0)
    return status, head, await reader.readexactly(length)


def rule(path: str, **given: object) -> RouteRule:
    fields: dict[str, object] = {
        "name": "",
        "matches": (Match(PathMatch(PathKind.PREFIX, path), (), (), ""),),
        "request": NO_MODIFIER,
        "response": NO_MODIFIER,
        "backends": (Backend("shop/db", SERVICE_PORT, 1, NO_MODIFIER, NO_MODIFIER),),
        "timeout_ms": 0,
        "backend_timeout_ms": 0,
    }
    return RouteRule(**(fields | given))  # type: ignore[arg-type]


def route(*rules: RouteRule) -> HTTPRoute:
    return HTTPRoute("shop", "db", (Parent("shop/db", 0),), (), rules)


def test_requests_arrive_with_their_caller_over_one_connection(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        for number in range(3):
            writer.write(
                b"GET /a%%62?q=%d HTTP/1.1\r\nHost: db.shop\r\nX-Forwarded-For: 6.6.6.6\r\n"
                b"x-forwarded-client-cert: URI=spiffe://cluster.local/ns/shop/sa/boss\r\nx-uproxy-caller: boss\r\n\r\n"
                % number
            )
            status, head, body = await answer(reader)
            assert status == 200
            lines = body.decode().split("\r\n")
            assert lines[0] == f"GET /ab?q={number} HTTP/1.1", "what is judged is what is forwarded"
            assert "x-forwarded-for: 127.0.77.1" in lines
            assert f"x-forwarded-client-cert: URI={WEB}" in lines
            assert "boss" not in body.decode()
            assert "6.6.6.6" not in body.decode()
            assert b"served: %d\r\n" % (number + 1) in head, "the backend's connection is kept alive"
            assert b"x-uproxy-reason" not in head
        writer.close()
        await settled_exchanges(through, 3)
        first = through.telemetry.exchanges[0]
        assert (first.method, first.path, first.status, first.attempts) == ("GET", "/ab?q=0", 200, 1)
        assert first.source.identity == str(WEB)
        assert first.destination.workload is not None
        metrics = through.telemetry.render().decode()
        (line,) = [line for line in metrics.splitlines() if line.startswith("istio_requests_total{")]
        assert line.endswith("} 3")
        assert 'reporter="waypoint"' in line
        assert 'response_code="200"' in line
        assert 'destination_service_name="db"' in line

    run(identities, authority, tell, client)


async def settled_exchanges(through: Through, count: int) -> None:
    for _ in range(100):
        if len(through.telemetry.exchanges) >= count:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{len(through.telemetry.exchanges)} exchanges, not {count}")


def test_a_body_crosses_both_ways_and_the_connection_goes_on(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        body = bytes(range(256)) * 8192  # 2 MiB: more than every window
        writer.write(b"POST /up HTTP/1.1\r\nHost: db\r\nContent-Length: %d\r\n\r\n" % len(body))
        writer.write(body)
        status, _, told = await answer(reader)
        assert status == 200
        assert told.endswith(body)
        writer.write(b"GET /next HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 200
        writer.close()
        await settled_exchanges(through, 2)
        assert through.telemetry.exchanges[0].received == len(body)

    run(identities, authority, tell, client)


def test_a_small_body_leaves_with_its_head(identities: Path, authority: Authority) -> None:
    pieces: list[bytes] = []

    async def keep(reader: Reader, writer: Writer) -> None:
        while piece := await reader.read(1 << 16):
            pieces.append(piece)
            if b"last" in piece:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def client(through: Through) -> None:
        reader, writer = await through.open()
        head = b"POST / HTTP/1.1\r\nHost: db\r\nContent-Length: %d\r\n\r\n"
        writer.write(head % 4 + b"last")
        assert (await answer(reader))[0] == 200
        (whole,) = pieces
        assert whole.endswith(b"content-length: 4\r\n\r\nlast")
        # One that has not come yet is not waited for.
        writer.write(head % 9 + b"first")
        await until(lambda: len(pieces) > 1)
        writer.write(b"last")
        assert (await answer(reader))[0] == 200
        assert b"".join(pieces[1:]).endswith(b"content-length: 9\r\n\r\nfirstlast")
        writer.close()
        await settled_exchanges(through, 2)
        assert [one.received for one in through.telemetry.exchanges] == [4, 9]

    run(identities, authority, keep, client)


def test_a_request_s_id_is_that_of_the_backend_s_connection(identities: Path, authority: Authority) -> None:
    known = "01234567-89AB-cdef-0123-456789abcdef"

    async def client(through: Through) -> None:
        for name, logged in ((known, "0123456789abcdef0123456789abcdef"), ("mine", None)):
            through.pair.plane.run(through.upstream.close)
            reader, writer = await through.open()
            writer.write(b"GET / HTTP/1.1\r\nHost: db\r\nX-Request-Id: %b\r\n\r\n" % name.encode())
            status, _, body = await answer(reader)
            assert status == 200
            assert f"x-request-id: {name}\r\n".encode() in body
            found = {one.request_id for one in through.pair.db.connections.records() if one.direction == "inbound"}
            assert (logged in found) if logged is not None else all(len(one) == 32 for one in found)
            writer.close()

    run(identities, authority, tell, client)


def test_pipelined_requests_are_answered_in_order(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"GET /1 HTTP/1.1\r\nHost: db\r\n\r\nGET /2 HTTP/1.1\r\nHost: db\r\n\r\n")
        for number in (1, 2):
            assert (await answer(reader))[2].startswith(b"GET /%d " % number)
        writer.close()

    run(identities, authority, tell, client)


FRAMINGS = {
    "no body": (b"GET", b"", b""),
    "length 0": (b"POST", b"Content-Length: 0\r\n", b""),
    "length": (b"POST", b"Content-Length: 4\r\n", b"abcd"),
    "empty chunked": (b"POST", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    "empty chunked with a trailer": (b"GET", b"Transfer-Encoding: chunked\r\n", b"0\r\nx-a: b\r\n\r\n"),
    "chunked": (b"POST", b"Transfer-Encoding: chunked\r\n", b"1\r\na\r\n3\r\nbcd\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("early", [False, True], ids=["late answer", "early answer"])
@pytest.mark.parametrize("framing", FRAMINGS)
def test_no_request_is_read_as_part_of_the_one_before(
    identities: Path, authority: Authority, framing: str, early: bool
) -> None:
    method, field, body = FRAMINGS[framing]
    requests: list[str] = []
    bodies: list[bytes] = []
    wrong: list[bytes] = []

    async def strict(reader: Reader, writer: Writer) -> None:
        """Answers once it has the head, or the body; what is no request where one must begin is noted."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await request_head(reader)
                requests.append(head.split(b" ", 2)[1].decode())
                if early:
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                got = b""
                if b"transfer-encoding: chunked" in head.lower():
                    while (line := await reader.readline()) and line != b"0\r\n":
                        if len(line) != 3:
                            wrong.append(line)
                            break
                        got += await reader.readexactly(int(line, 16))
                        await reader.readexactly(2)
                    await reader.readline()
                else:
                    lines = head.lower().split(b"\r\n")
                    got = await reader.readexactly(
                        next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
                    )
                bodies.append(got)
                if not early:
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async def client(through: Through) -> None:
        reader, writer = await through.open()
        sent = 0
        async with asyncio.timeout(30):
            for cuts in ((), (-len(body),), (-len(body), -2), range(1, len(body))):
                message = b"%b /%d HTTP/1.1\r\nHost: db\r\n%b\r\n%b" % (method, sent, field, body)
                places = sorted({cut % len(message) for cut in cuts})
                for begin, end in zip([0, *places], [*places, len(message)], strict=True):
                    writer.write(message[begin:end])
                    await asyncio.sleep(0.002)
                assert (await answer(reader))[0] == 200
                writer.write(b"GET /next%d HTTP/1.1\r\nHost: db\r\n\r\n" % sent)
                assert (await answer(reader))[0] == 200
                sent += 1
        writer.close()
        assert not wrong
        assert requests == [path for number in range(sent) for path in (f"/{number}", f"/next{number}")]
        if not early:
            assert bodies == [b"abcd" if b"a" in body.split(b"x-a")[0] else b"", b""] * sent

    run(identities, authority, strict, client)


def test_denied_unrouted_and_malformed_requests_never_reach_the_backend(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        deny = Rule(operations=(Operation(methods=("DELETE",)),))
        target = (Target("Service", "shop/db"),)
        through.pair.apply(
            AuthorizationPolicy("shop", "no-delete", Action.DENY, None, (deny,), target), route(rule("/v1"))
        )
        reader, writer = await through.open()
        writer.write(b"DELETE /v1/x HTTP/1.1\r\nHost: db\r\nContent-Length: 3\r\n\r\nabc")
        status, head, body = await answer(reader)
        assert (status, body) == (403, b"RBAC: access denied\n")
        assert b"x-uproxy-reason: policy\r\n" in head
        assert b"x-uproxy-policy: shop/no-delete[0]\r\n" in head
        writer.write(b"GET /v2 HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 404
        writer.write(b"GET /v1%2fx HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 400
        writer.write(b"GET /v1 HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 200
        writer.write(b"GET /v1 HTTP/1.1\r\nHost: db\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert (await answer(reader))[0] == 400
        assert await reader.read() == b"", "after a request that could be read in two ways, nothing more is read"
        writer.close()
        await settled_exchanges(through, 5)
        assert [e.flag for e in through.telemetry.exchanges] == ["-", "NR", "DPE", "-", "DPE"]
        assert through.telemetry.exchanges[0].policy == "shop/no-delete[0]"

    run(identities, authority, tell, client)


NO_DELETE = Rule(operations=(Operation(methods=("DELETE",)),))


def test_a_policy_in_dry_run_is_told_and_counted_and_not_done(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        deny = AuthorizationPolicy("shop", "no", Action.DENY, None, (NO_DELETE,), (Target("Service", "shop/db"),))
        dry = replace(deny, dry_run=True)
        reader, writer = await through.open()
        for policy, statuses in ((dry, [200, 200]), (deny, [200, 403])):
            through.pair.apply(policy)
            for method, status in zip((b"GET", b"DELETE"), statuses, strict=True):
                writer.write(b"%b / HTTP/1.1\r\nHost: db\r\n\r\n" % method)
                assert (await answer(reader))[0] == status
        writer.close()
        await settled_exchanges(through, 4)
        assert [e.dry_run for e in through.telemetry.exchanges] == ["", "denied: denied by shop/no[0]", "", ""]
        assert [e.policy for e in through.telemetry.exchanges] == ["", "", "", "shop/no[0]"]
        metrics = through.telemetry.render().decode()
        assert "uproxy_dry_run_allowed_total 1\n" in metrics
        assert "uproxy_dry_run_denied_total 1\n" in metrics

    run(identities, authority, tell, client)


def test_a_policy_in_dry_run_is_told_of_opaque_tcp_too(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        target = (Target("Gateway", "shop/wp"),)
        through.pair.apply(AuthorizationPolicy("shop", "no", Action.DENY, None, (Rule(),), target, dry_run=True))
        reader, writer = await through.open()
        writer.write(b"hello")
        assert await reader.read(5) == b"hello"
        writer.close()
        await settled(through)
        (record,) = through.telemetry.ended
        assert record.dry_run == "denied: denied by shop/no[0]"
        assert "uproxy_dry_run_denied_total 1\n" in through.telemetry.render().decode()

    run(identities, authority, echo, client, protocol="tcp")


def test_a_token_is_asked_for_checked_and_kept_from_the_backend(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        target = (Target("Service", "shop/db"),)
        key = Ed25519PrivateKey.generate()
        jwks = json.dumps({"keys": [OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)]})
        of_accounts = JwtRule("accounts", canonical_jwks(jwks), claim_headers=(("x-user", "sub"),))
        admins = Rule((Source(request_principals=("accounts/ann",)),))
        through.pair.apply(
            RequestAuthentication("shop", "tokens", target, (of_accounts,)),
            AuthorizationPolicy("shop", "ann", Action.ALLOW, None, (admins,), target),
        )

        async def ask(target: bytes, *lines: bytes) -> tuple[int, bytes, bytes]:
            writer.write(b"".join(line + b"\r\n" for line in (b"GET %b HTTP/1.1" % target, b"Host: db", *lines, b"")))
            return await answer(reader)

        def bearer(user: str) -> bytes:
            return jwt.encode({"iss": "accounts", "sub": user}, key, "EdDSA").encode()

        reader, writer = await through.open()
        assert (await ask(b"/"))[0] == 403
        status, head, body = await ask(b"/", b"Authorization: Bearer a.b.c")
        assert (status, body) == (401, b"Jwt payload is not JSON\n")
        assert b'\r\nwww-authenticate: Bearer error="invalid_token"\r\n' in head
        assert b"\r\nx-uproxy-reason: token\r\n" in head
        assert (await ask(b"/", b"Authorization: Bearer " + bearer("ben")))[0] == 403
        status, _, seen = await ask(b"/", b"X-User: root", b"Authorization: Bearer " + bearer("ann"))
        assert status == 200
        assert b"\r\nx-user: ann\r\n" in seen
        assert b"root" not in seen
        assert b"authorization" not in seen.lower()
        status, _, seen = await ask(b"/a?b=c&access_token=" + bearer("ann"))
        assert (status, seen.split(b" ")[1]) == (200, b"/a?b=c")
        writer.close()
        await settled_exchanges(through, 5)
        assert through.telemetry.exchanges[-1].path == "/a?b=c", "no token stands in the access log"

    run(identities, authority, tell, client)


def test_no_more_is_let_through_than_a_traffic_policy_says(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        target = (Target("Service", "shop/db"),)
        through.pair.apply(TrafficPolicy("shop", "slow", target, (RateLimit(1, 3_600_000, 2),)))
        reader, writer = await through.open()
        for expected in (200, 200, 429):
            writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
            status, head, body = await answer(reader)
            assert status == expected
        assert body == b"local_rate_limited\n"
        assert b"\r\nretry-after: 3600\r\n" in head
        assert b"\r\nx-uproxy-policy: shop/slow\r\n" in head
        through.pair.apply(TrafficPolicy("shop", "slow", target, max_requests=1))
        idle, other = await through.open()
        other.write(b"POST / HTTP/1.1\r\nHost: db\r\nContent-Length: 1\r\n\r\n")
        status, sent = 200, 6
        while status == 200:  # until the other one is on its way
            writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
            status, sent = (await answer(reader))[0], sent + 1
        assert status == 503
        other.write(b"x")
        assert (await answer(idle))[0] == 200
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 200
        for one in (writer, other):
            one.close()
        await settled_exchanges(through, sent - 1)
        assert [e.flag for e in through.telemetry.exchanges][:3] == ["-", "-", "RL"]
        assert [e.flag for e in through.telemetry.exchanges][-3:] == ["UO", "-", "-"]

    run(identities, authority, tell, client)


def test_what_is_broken_on_purpose(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        target = (Target("Service", "shop/db"),)
        late = TrafficPolicy("shop", "late", target, faults=(Fault(100, delay_ms=300),))
        broken = TrafficPolicy("shop", "broken", target, faults=(Fault(100, status=418),))
        through.pair.apply(late)
        reader, writer = await through.open()
        began = time.monotonic()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 200
        assert time.monotonic() - began >= 0.3
        through.pair.apply(broken)
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        status, head, _ = await answer(reader)
        assert status == 418
        assert b"\r\nx-uproxy-reason: fault\r\n" in head
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        await asyncio.sleep(0.05)
        writer.close()
        await settled_exchanges(through, 3)
        assert [e.flag for e in through.telemetry.exchanges][:2] == ["DI", "FI"]

    run(identities, authority, tell, client)


def test_a_route_changes_headers_both_ways(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        added = HeaderModifier(set=(("color", "blue"),), remove=("secret",))
        through.pair.apply(route(rule("/", request=added, response=HeaderModifier(add=(("via", "wp"),)))))
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\nColor: red\r\nSecret: 1\r\n\r\n")
        _, head, body = await answer(reader)
        assert b"\r\ncolor: blue\r\n" in body
        assert b"red" not in body
        assert b"secret" not in body.lower()
        assert b"\r\nvia: wp\r\n" in head
        writer.close()

    run(identities, authority, tell, client)


async def slow(reader: Reader, writer: Writer) -> None:
    await request_head(reader)
    await asyncio.sleep(1.5)
    writer.close()


def test_a_route_s_timeout_is_a_504(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        through.pair.apply(route(rule("/", timeout_ms=200)))
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 504
        writer.close()
        await settled_exchanges(through, 1)
        assert through.telemetry.exchanges[0].flag == "UT"

    run(identities, authority, slow, client)


async def cut_off(reader: Reader, writer: Writer) -> None:
    """Half of what was promised, then the end."""
    await request_head(reader)
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
    await writer.drain()
    writer.close()


def test_a_response_that_is_cut_off_is_a_reset(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1000)
        writer.close()
        await settled_exchanges(through, 1)
        assert through.telemetry.exchanges[0].flag == "UC"

    run(identities, authority, cut_off, client)


def test_a_backend_that_is_gone_is_a_503_and_the_caller_may_go_on(identities: Path, authority: Authority) -> None:
    async def once(reader: Reader, writer: Writer) -> None:
        await request_head(reader)
        writer.transport.abort()

    async def client(through: Through) -> None:
        reader, writer = await through.open()
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
            assert (await answer(reader))[0] == 503
        writer.close()

    run(identities, authority, once, client)


def test_a_kept_connection_that_its_server_closed_costs_no_request(identities: Path, authority: Authority) -> None:
    served = 0

    async def one_each(reader: Reader, writer: Writer) -> None:
        """Says nothing of closing, answers one request, and closes when the next one comes."""
        nonlocal served
        await request_head(reader)
        served += 1
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await writer.drain()
        await request_head(reader)
        writer.transport.abort()

    async def client(through: Through) -> None:
        reader, writer = await through.open()
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
            assert await answer(reader) == (200, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", b"ok")
        writer.write(b"POST / HTTP/1.1\r\nHost: db\r\nContent-Length: 0\r\n\r\n")
        assert (await answer(reader))[0] == 503, "what is not idempotent is not sent twice"
        writer.close()
        await settled_exchanges(through, 3)
        assert [e.attempts for e in through.telemetry.exchanges] == [1, 2, 1]
        assert served == 2

    run(identities, authority, one_each, client)


async def early(reader: Reader, writer: Writer) -> None:
    """Answers before the body has come."""
    await request_head(reader)
    writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nno\n")
    await writer.drain()
    await reader.read()
    writer.close()


def test_an_early_answer_reaches_a_caller_that_still_sends(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"POST / HTTP/1.1\r\nHost: db\r\nContent-Length: 100000\r\n\r\n" + bytes(1000))
        assert (await answer(reader))[0] == 413
        writer.write(bytes(99_000))
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 413, "the rest of the body was read, and the connection goes on"
        writer.close()

    run(identities, authority, early, client)


def test_a_caller_that_goes_away_takes_its_request_along(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        await asyncio.sleep(0.2)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()
        await settled_exchanges(through, 1)
        assert (through.telemetry.exchanges[0].flag, through.telemetry.exchanges[0].status) == ("DC", 0)
        assert reader is not None

    run(identities, authority, slow, client)


def test_a_caller_that_ends_its_side_gets_its_answer(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        writer.write_eof()
        assert (await answer(reader))[0] == 200
        assert await reader.read() == b""
        writer.close()

    run(identities, authority, tell, client)


def test_two_callers_never_share_a_connection_to_a_backend(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        connections = [(WEB, await through.open()), (DB, await through.open(through.pair.db))]
        for number in range(1, 4):
            for caller, (reader, writer) in connections:
                writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
                _, head, body = await answer(reader)
                assert f"x-forwarded-client-cert: URI={caller}\r\n".encode() in body
                assert b"served: %d\r\n" % number in head, "each has one of its own, and keeps it"
        for _, (_, writer) in connections:
            writer.close()
        await settled_exchanges(through, 6)
        assert through.upstream.idle == 2
        served = [one.caller for one in through.pair.db.connections.records() if one.direction == "inbound"]
        assert sorted(served) == sorted((str(WEB), str(DB))), "the backend's uProxy knows who calls"

    run(identities, authority, tell, client)


def test_a_slow_reader_stops_the_backend(identities: Path, authority: Authority) -> None:
    taken = 0

    async def endless(reader: Reader, writer: Writer) -> None:
        nonlocal taken
        await request_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                writer.write(bytes(100_000))
                await writer.drain()
                taken += 100_000
        writer.close()

    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        before = -1
        while before != taken:
            before = taken
            await asyncio.sleep(0.4)
        assert 0 < taken < 40_000_000, "windows and socket buffers, and no more"
        head = await request_head(reader)
        assert head.startswith(b"HTTP/1.1 200")
        left = 100_000_000
        while left:
            left -= len(await reader.read(1 << 20))
        writer.close()

    run(identities, authority, endless, client)


def test_another_endpoint_is_tried_and_none_is_a_503(identities: Path, authority: Authority) -> None:
    nobody = Endpoint("shop/db", "shop/db2", parse_address("127.0.77.9"), DB, {SERVICE_PORT: 1}, 65535, True, {})

    async def client(through: Through) -> None:
        through.pair.apply(nobody)
        reader, writer = await through.open()
        writer.write(b"POST / HTTP/1.1\r\nHost: db\r\nContent-Length: 2\r\n\r\nab")
        assert (await answer(reader))[0] == 200, "nothing was sent to the one that does not answer"
        through.pair.apply(*(replace(found, ready=False) for found in through.pair.state.endpoints("shop/db")))
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 503
        through.pair.apply(nobody)
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        status, head, _ = await answer(reader)
        assert status == 503
        assert b"x-uproxy-reason: connect-failed\r\n" in head
        writer.close()
        await settled_exchanges(through, 3)
        assert [e.flag for e in through.telemetry.exchanges] == ["-", "UH", "UF"]

    run(identities, authority, tell, client)


class Late:
    """A directory that is asked for what routes lead to, and answers when a test does."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers: list[plane.Waiter[None]] = []
        self.plane: plane.Plane | None = None

    async def destination(self, address: IpAddress) -> None: ...

    async def introduce(self, caller: IpAddress, service_key: str) -> None: ...

    async def followed(self, service_key: str) -> None:
        assert self.plane is not None
        self.asked.append(service_key)
        self.answers.append(plane.Waiter(self.plane))
        await self.answers[-1]

    async def is_asked(self) -> plane.Waiter[None]:
        for _ in range(200):
            if self.answers:
                return self.answers.pop()
            await asyncio.sleep(0.01)
        raise AssertionError("nobody asks")


def to_late(**given: object) -> HTTPRoute:
    return route(rule("/", backends=(Backend("shop/late", 80, 1, NO_MODIFIER, NO_MODIFIER),), **given))


def late_backend(app_port: int) -> tuple[Service, Endpoint]:
    """What that route leads to, once it comes."""
    port = ServicePort("", 80, app_port, "")
    service = Service("shop", "late", (parse_address("240.240.9.8"),), (port,), {}, (DB,))
    return service, Endpoint("shop/late", "shop/db", DB_ADDRESS, DB, {80: app_port}, 1, True, {})


def test_a_request_waits_for_the_backend_that_its_route_names_and_that_has_not_come_yet(
    identities: Path, authority: Authority
) -> None:
    late = Late()

    async def client(through: Through) -> None:
        late.plane = through.pair.plane
        through.pair.apply(to_late())
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        answered = await late.is_asked()
        through.pair.apply(*late_backend(through.pair.app_port))
        through.pair.plane.run(lambda: answered.set(None))
        assert (await answer(reader))[0] == 200
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 200
        assert late.asked == ["shop/late"], "what is there is not asked for"
        writer.close()

    run(identities, authority, tell, client, known=late)


def test_a_backend_that_does_not_come_is_a_503_and_no_caller_waits_longer_than_it_may(
    identities: Path, authority: Authority
) -> None:
    late = Late()

    async def client(through: Through) -> None:
        late.plane = through.pair.plane
        through.pair.apply(to_late())
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        answered = await late.is_asked()
        through.pair.plane.run(lambda: answered.fail(RefusedError("no-config", "it did not come")))
        status, head, _ = await answer(reader)
        assert status == 503
        assert b"x-uproxy-reason: no-config\r\n" in head
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        answered = await late.is_asked()
        through.pair.plane.run(lambda: answered.set(None))  # which says that there is none
        status, head, _ = await answer(reader)
        assert status == 500
        assert b"x-uproxy-reason: no-backend\r\n" in head
        through.pair.apply(to_late(timeout_ms=100))
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 504
        unanswered = [await late.is_asked()]
        through.pair.apply(to_late())
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        unanswered.append(await late.is_asked())
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()
        await settled_exchanges(through, 4)
        assert [e.flag for e in through.telemetry.exchanges] == ["UH", "NR", "UT", "DC"]
        through.pair.plane.run(lambda: [one.set(None) for one in unanswered])

    run(identities, authority, tell, client, known=late)


def test_no_request_hangs_when_a_backend_cannot_be_asked_for(
    identities: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    late = Late()

    async def client(through: Through) -> None:
        late.plane = through.pair.plane
        through.pair.apply(to_late())
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        answered = await late.is_asked()
        through.pair.plane.run(lambda: answered.fail(ValueError("a bug")))
        status, head, _ = await asyncio.wait_for(answer(reader), 30)
        assert status == 503
        assert b"x-uproxy-reason: no-config\r\n" in head
        writer.close()

    run(identities, authority, tell, client, known=late)
    assert "a bug" in caplog.text


@pytest.mark.parametrize("waits_for", ["configuration", "connection"])
def test_a_caller_that_goes_away_just_when_the_backend_is_there_takes_its_request_along(
    identities: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch, waits_for: str
) -> None:
    late = Late()
    heads: list[bytes] = []

    async def server(reader: Reader, writer: Writer) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            heads.append(await request_head(reader))
        writer.close()

    async def client(through: Through) -> None:
        late.plane = through.pair.plane
        connect = through.upstream.outgoing

        async def go_away() -> None:
            (tunnel,) = through.server.tunnels()
            (stream,) = tunnel.connection.streams.values()
            stream.owner.on_gone()

        async def connected(
            caller: Caller,
            hops: Sequence[Hop],
            request_id: str,
            claim: plane.Waiter[Outgoing],
            *,
            http2: bool,
            fresh: bool,
            limiter: object,
        ) -> None:
            await connect(caller, hops, request_id, claim, http2=http2, fresh=fresh)
            await go_away()

        if waits_for == "configuration":
            through.pair.apply(to_late())
        else:
            monkeypatch.setattr(through.upstream, "outgoing", connected)
        _, writer = await through.open()
        writer.write(b"POST / HTTP/1.1\r\nHost: db\r\nContent-Length: 0\r\n\r\n")
        if waits_for == "configuration":
            answered = await late.is_asked()
            through.pair.apply(*late_backend(through.pair.app_port))

            def both() -> None:
                answered.set(None)
                through.pair.plane.spawn(go_away())

            through.pair.plane.run(both)
        await settled_exchanges(through, 1)
        assert [e.flag for e in through.telemetry.exchanges] == ["DC"]
        assert through.upstream.idle == (1 if waits_for == "connection" else 0), "for the next request"
        through.pair.plane.run(through.upstream.close)
        await settled(through)
        assert not heads
        writer.close()

    run(identities, authority, server, client, known=late)


NO_SERVICE = Gateway("shop", "wp", Traffic.SERVICE, (Instance("shop/wp-1", WP_ADDRESS),), (), ())
GET = Rule(operations=(Operation(methods=("GET",)),))
MEANWHILE = {
    "nothing": (to_late(), 200, ""),
    "another route": (route(rule("/", request=HeaderModifier(set=(("color", "blue"),)))), 200, "color: blue"),
    "no route": (route(rule("/elsewhere")), 404, ""),
    "deny": (
        AuthorizationPolicy("shop", "no", Action.DENY, None, (GET,), (Target("Gateway", "shop/wp"),)),
        403,
        "",
    ),
    "not served": (NO_SERVICE, 503, ""),
}


@pytest.mark.parametrize("change", MEANWHILE)
def test_what_changes_while_a_request_waits_for_its_backend_holds_for_it(
    identities: Path, authority: Authority, change: str
) -> None:
    changed, told, sent = MEANWHILE[change]
    late = Late()

    async def client(through: Through) -> None:
        late.plane = through.pair.plane
        through.pair.apply(to_late())
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        answered = await late.is_asked()
        through.pair.apply(changed, *late_backend(through.pair.app_port))
        through.pair.plane.run(lambda: answered.set(None))
        status, _, body = await answer(reader)
        assert status == told
        assert sent in body.decode()
        writer.close()

    run(identities, authority, tell, client, known=late)


@pytest.mark.parametrize("before_ms", [2000, 9000])
def test_a_route_that_takes_another_s_place_meanwhile_sets_the_time_limit(
    identities: Path, authority: Authority, before_ms: int
) -> None:
    late = Late()

    async def never(reader: Reader, writer: Writer) -> None:
        await reader.read()
        writer.close()

    async def client(through: Through) -> None:
        late.plane = through.pair.plane
        through.pair.apply(to_late(timeout_ms=before_ms))
        reader, writer = await through.open()
        started = time.monotonic()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        answered = await late.is_asked()
        await asyncio.sleep(1)  # which counts, too
        through.pair.apply(route(rule("/", timeout_ms=2500)), *late_backend(through.pair.app_port))
        through.pair.plane.run(lambda: answered.set(None))
        status, _, body = await answer(reader)
        assert (status, body) == (504, b"no whole response within 2500 ms\n")
        assert 2.45 < time.monotonic() - started < 3.45
        writer.close()

    run(identities, authority, never, client, known=late)


def test_what_the_backend_s_own_policy_refuses_is_a_403_too(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        web = Rule(sources=(Source(principals=(WEB.principal,)),))
        through.pair.apply(AuthorizationPolicy("shop", "no-web", Action.DENY, None, (web,)))
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        status, head, _ = await answer(reader)
        assert status == 403
        assert b"x-uproxy-policy: shop/no-web[0]\r\n" in head
        writer.close()

    run(identities, authority, tell, client)


def test_a_request_may_wait_for_100_continue(identities: Path, authority: Authority) -> None:
    async def hesitant(reader: Reader, writer: Writer) -> None:
        head = await request_head(reader)
        assert b"expect: 100-continue" in head.lower()
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(3)
        writer.write(b"HTTP/1.1 201 Created\r\ncontent-length: 3\r\n\r\n" + body)
        await reader.read()
        writer.close()

    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"PUT / HTTP/1.1\r\nHost: db\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert (await request_head(reader)).startswith(b"HTTP/1.1 100 ")
        writer.write(b"abc")
        assert (await answer(reader))[::2] == (201, b"abc")
        writer.close()

    run(identities, authority, hesitant, client)


def test_a_drain_closes_connections_after_their_answer(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        through.pair.plane.run(lambda: through.gateway.drain(DRAIN_S))
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        status, head, _ = await answer(reader)
        assert status == 200
        assert b"connection: close\r\n" in head
        assert await reader.read() == b""
        writer.close()

    run(identities, authority, tell, client)


def test_a_drain_closes_what_stays_quiet_and_lets_the_others_finish(identities: Path, authority: Authority) -> None:
    begun = asyncio.Event()

    async def slow_end(reader: Reader, writer: Writer) -> None:
        while not reader.at_eof():
            try:
                head = await request_head(reader)
            except asyncio.IncompleteReadError:
                break
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n")
            if b"/slow" in head:
                begun.set()
                await asyncio.sleep(0.5)
            writer.write(b"done")
        writer.close()

    async def client(through: Through) -> None:
        idle, busy, half = [await through.open() for _ in range(3)]
        for reader, writer in (idle, busy, half):
            writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
            assert (await answer(reader))[0] == 200
        unused = await through.open()
        busy[1].write(b"GET /slow HTTP/1.1\r\nHost: db\r\n\r\n")
        half[1].write(b"GET / HTTP/1.1\r\n")
        await asyncio.wait_for(begun.wait(), 30)
        await asyncio.sleep(0.1)
        started = time.monotonic()
        through.pair.plane.run(lambda: through.gateway.drain(DRAIN_S))
        half[1].write(b"Host: db\r\n\r\n")
        status, head, _ = await answer(half[0])
        assert (status, b"connection: close\r\n" in head) == (200, True)
        assert await half[0].read() == b""
        assert time.monotonic() - started < DRAIN_S, "nobody waits for another request there"
        # Its head went before the drain, and could not say it.
        assert (await answer(busy[0]))[::2] == (200, b"done")
        answered = time.monotonic()
        for reader, since in ((idle[0], started), (unused[0], started), (busy[0], answered)):
            assert await reader.read() == b"", "nothing but the end"
            assert time.monotonic() - since > DRAIN_S - 0.1
        for _, writer in (idle, busy, half, unused):
            writer.close()

    run(identities, authority, slow_end, client)


def test_a_request_that_is_on_its_way_when_a_drain_begins_is_answered(identities: Path, authority: Authority) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def held(reader: Reader, writer: Writer) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await request_head(reader)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n")
                if b"/held" in head:
                    begun.set()
                    await go_on.wait()
                writer.write(b"done")
        writer.close()

    async def client(through: Through) -> None:
        kept, busy = [await through.open() for _ in range(2)]
        kept[1].write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(kept[0]))[0] == 200
        busy[1].write(b"GET /held HTTP/1.1\r\nHost: db\r\n\r\n")
        await asyncio.wait_for(begun.wait(), 30)
        assert b"connection: close" not in await request_head(busy[0])
        through.pair.plane.run(lambda: through.gateway.drain(DRAIN_S))
        await asyncio.sleep(0.1)  # as long as a request may be on its way
        go_on.set()
        assert await busy[0].readexactly(4) == b"done"
        await asyncio.sleep(0.1)
        for reader, writer in (kept, busy):
            writer.write(b"POST / HTTP/1.1\r\nHost: db\r\nContent-Length: 0\r\n\r\n")
            status, head, _ = await answer(reader)
            assert (status, b"connection: close\r\n" in head) == (200, True)
            assert await reader.read() == b""
            writer.close()

    run(identities, authority, held, client)


def test_a_drain_waits_no_longer_than_it_may(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 200
        started = time.monotonic()
        through.pair.plane.run(lambda: through.gateway.drain(DRAIN_S))
        assert await reader.read() == b""
        assert DRAIN_S - 0.1 < time.monotonic() - started < TOLD_GRACE_S
        writer.close()

    run(identities, authority, tell, client)


def test_callers_that_go_another_way_now_are_told_to(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        service = through.pair.state.service("shop/db")
        assert service is not None
        elsewhere = Binding("shop/wp2", Via.WAYPOINT)
        idle = await through.open()
        for binding, told in ((service.binding, False), (elsewhere, True), (None, True)):
            through.pair.apply(replace(service, binding=binding))
            writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
            status, head, _ = await answer(reader)
            assert (status, b"connection: close\r\n" in head) == (200, told)
            if told:
                writer.close()
                reader, writer = idle  # opened while the service was bound here
        writer.close()

    run(identities, authority, tell, client)


def test_a_service_that_left_is_refused_and_the_connection_closed(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 200
        through.pair.apply(NO_SERVICE)
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        status, head, _ = await answer(reader)
        assert (status, b"connection: close\r\n" in head) == (503, True)
        assert await reader.read() == b""
        writer.close()

    run(identities, authority, tell, client)


def test_idle_connections_of_a_service_that_left_are_closed(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 200
        service = through.pair.state.service("shop/db")
        assert service is not None
        for change, closed in ((replace(service, binding=None), False), (NO_SERVICE, True)):
            through.pair.apply(change)
            through.pair.plane.run(lambda: through.gateway.config_changed(Changes(gateways=frozenset({"shop/wp"}))))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.2)
            assert reader.at_eof() == closed, "while callers may still come, what they send is answered"
        writer.close()

    run(identities, authority, tell, client)


async def echo(reader: Reader, writer: Writer) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
    writer.close()


def test_opaque_tcp_crosses_with_both_ends(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        data = bytes(range(256)) * 8192
        writer.write(data)
        writer.write_eof()
        assert await reader.read(-1) == data
        writer.close()
        await settled(through)
        (record,) = through.telemetry.ended
        assert (record.bytes_received, record.bytes_sent) == (len(data), len(data))
        assert record.source.identity == str(WEB)
        assert not record.error

    run(identities, authority, echo, client, protocol="tcp")


def test_a_reset_of_opaque_tcp_is_a_reset(identities: Path, authority: Authority) -> None:
    async def reset(reader: Reader, writer: Writer) -> None:
        await reader.read(10)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()

    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"hello")
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()

    run(identities, authority, reset, client, protocol="tcp")


def test_an_l7_deny_refuses_opaque_tcp_and_cuts_what_is_open(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"hello")
        assert await reader.read(5) == b"hello"
        deny = Rule(operations=(Operation(methods=("DELETE",)),))
        through.pair.apply(
            AuthorizationPolicy("shop", "no", Action.DENY, None, (deny,), (Target("Gateway", "shop/wp"),))
        )
        through.pair.plane.run(lambda: through.connections.reauthorise())
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        reader, writer = await through.open()
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        assert "shop/no" in through.telemetry.ended[-1].policy

    run(identities, authority, echo, client, protocol="tcp")


def test_a_deny_that_comes_while_a_backend_is_dialled_holds(
    identities: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def client(through: Through) -> None:
        dial = through.upstream.stream
        deny = Rule(operations=(Operation(methods=("DELETE",)),))
        policy = AuthorizationPolicy("shop", "no", Action.DENY, None, (deny,), (Target("Gateway", "shop/wp"),))

        async def meanwhile(caller: Caller, hop: Hop, request_id: str) -> ByteStream:
            stream = await dial(caller, hop, request_id)
            through.pair.apply(policy)
            through.gateway.config_changed(Changes(policies=frozenset({policy.key})))
            return stream

        monkeypatch.setattr(through.upstream, "stream", meanwhile)
        reader, writer = await through.open()
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        await settled(through)
        (record,) = through.telemetry.ended
        assert (record.flag, record.policy) == (Flag.DENY, "shop/no[0]")

    run(identities, authority, echo, client, protocol="tcp")


def test_what_is_not_served_is_refused(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        sock = through.pair.dial()
        sock.close()
        await settled(through)
        through.pair.apply(NO_SERVICE)
        reader, writer = await through.open()
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        assert "wrong-destination" in through.telemetry.ended[-1].error

    run(identities, authority, tell, client)


UPGRADE = b"Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Key: eA==\r\n"
AGREED = (
    b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: x\r\n\r\n"
)


async def shout(reader: Reader, writer: Writer) -> None:
    """A server of WebSockets, as far as the upgrade goes; then it answers bytes in upper case."""
    with contextlib.suppress(ConnectionResetError, asyncio.IncompleteReadError):
        while (head := await request_head(reader)).startswith(b"GET /no "):
            writer.write(b"HTTP/1.1 426 Upgrade Required\r\ncontent-length: 0\r\n\r\n")
        if head.startswith(b"GET /other "):
            writer.write(AGREED.replace(b"websocket\r", b"irc\r"))
            return
        assert b"\r\nconnection: upgrade\r\nupgrade: websocket\r\n" in head, head
        assert b"\r\nsec-websocket-key: eA==\r\n" in head, head
        writer.write(AGREED + b"welcome ")
        while data := await reader.read(1 << 16):
            writer.write(data.upper())
    writer.close()


def test_a_websocket_crosses_with_both_ends(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"GET /no HTTP/1.1\r\nHost: db\r\n" + UPGRADE + b"\r\n")
        assert (await answer(reader))[0] == 426
        writer.write(b"GET /chat HTTP/1.1\r\nHost: db\r\n" + UPGRADE + b"\r\nhello")  # which may not wait
        head = await request_head(reader)
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert b"\r\nconnection: upgrade\r\nupgrade: websocket\r\n" in head
        assert await reader.readexactly(13) == b"welcome HELLO"
        assert len(through.connections) == 1
        large = b"abcdefgh" * 100_000
        writer.write(large)
        assert await reader.readexactly(len(large)) == large.upper()
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        await settled_exchanges(through, 2)
        (one,) = [e for e in through.telemetry.exchanges if e.status == 101]
        assert (one.flag, one.received, one.sent) == ("-", 5 + len(large), 13 + len(large))

    run(identities, authority, shout, client)


def test_a_policy_that_comes_later_ends_a_websocket(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(b"GET /chat HTTP/1.1\r\nHost: db\r\n" + UPGRADE + b"\r\n")
        assert (await request_head(reader)).startswith(b"HTTP/1.1 101")
        await reader.readexactly(8)
        through.pair.plane.run(lambda: through.connections.reauthorise())
        writer.write(b"still there")
        assert await reader.readexactly(11) == b"STILL THERE"
        through.pair.apply(
            AuthorizationPolicy("shop", "no", Action.DENY, None, (GET,), (Target("Gateway", "shop/wp"),))
        )
        through.pair.plane.run(lambda: through.connections.reauthorise())
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()

    run(identities, authority, shout, client)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /chat HTTP/1.1\r\nHost: db\r\n" + UPGRADE + b"Content-Length: 0\r\n\r\n", 501),
        (b"GET /chat HTTP/1.1\r\nHost: db\r\nUpgrade: websocket\r\n\r\n", 501),
        (b"GET /chat HTTP/1.1\r\nHost: db\r\nConnection: upgrade\r\nUpgrade: irc\r\n\r\n", 501),
        (b"GET /chat HTTP/1.1\r\nHost: db\r\nConnection: upgrade\r\nUpgrade: websocket, h2c\r\n\r\n", 501),
        (b"GET /chat HTTP/1.1\r\nHost: db\r\n" + UPGRADE + b"Content-Length: 1\r\n\r\nx", 501),
        (b"GET /other HTTP/1.1\r\nHost: db\r\n" + UPGRADE + b"\r\n", 502),
    ],
)
def test_other_upgrades_are_refused(identities: Path, authority: Authority, request_: bytes, status: int) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(request_)
        assert (await answer(reader))[0] == status
        writer.close()

    run(identities, authority, shout, client)


async def spdy(reader: Reader, writer: Writer) -> None:
    """As `shout`, of another protocol."""
    head = await request_head(reader)
    assert b"\r\nconnection: upgrade\r\nupgrade: spdy/3.1\r\n" in head, head
    if head.startswith(b"POST /other "):
        writer.write(AGREED.replace(b"websocket\r", b"tcp\r"))
    else:
        writer.write(AGREED.replace(b"websocket\r", b"SPDY/3.1\r"))
        while data := await reader.read(1 << 16):
            writer.write(data.upper())
    writer.close()


@pytest.mark.parametrize(
    ("line", "fields", "status"),
    [
        (b"POST /exec", b"Upgrade: SPDY/3.1\r\nContent-Length: 0\r\n", 101),
        (b"GET /exec", b"Upgrade: SPDY/3.1\r\n", 101),
        (b"POST /other", b"Upgrade: SPDY/3.1\r\n", 502),
        (b"POST /exec", b"Upgrade: SPDY/3.1\r\nContent-Length: 1\r\n", 501),
        (b"POST /exec", b"Upgrade: SPDY/3.1, tcp\r\n", 501),
        (b"POST /exec", b"Upgrade: SPDY/3.2\r\n", 501),
        (b"POST /exec", b"Upgrade: websocket\r\n", 501),
        (b"DELETE /exec", b"Upgrade: SPDY/3.1\r\n", 403),
    ],
)
def test_requests_upgrade_to_what_a_traffic_policy_names(
    identities: Path, authority: Authority, line: bytes, fields: bytes, status: int
) -> None:
    async def client(through: Through) -> None:
        target = (Target("Service", "shop/db"),)
        delete = Rule(operations=(Operation(methods=("DELETE",)),))
        through.pair.apply(
            TrafficPolicy("shop", "exec", target, upgrades=("spdy/3.1",)),
            AuthorizationPolicy("shop", "no", Action.DENY, None, (delete,), target),
        )
        reader, writer = await through.open()
        writer.write(b"%b HTTP/1.1\r\nHost: db\r\nConnection: Upgrade\r\n%b\r\nhello" % (line, fields))
        head = await request_head(reader)
        assert head.startswith(b"HTTP/1.1 %d " % status), head
        if status == 101:
            assert b"\r\nconnection: upgrade\r\nupgrade: spdy/3.1\r\n" in head
            assert await reader.readexactly(5) == b"HELLO"
        writer.close()

    run(identities, authority, spdy, client)
