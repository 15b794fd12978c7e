"""CUSTOM policies: a service of the mesh is asked whether requests may pass a real waypoint."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from control.api.extension import ExternalAuthorization
from control.api.policy import Action, AuthorizationPolicy, Condition, ConditionKey, Operation, Rule, Target
from control.api.workload import Endpoint, Service, ServicePort
from control.server.ca import Authority
from tests.support.certificates import DB, WEB
from tests.support.http2_peer import served_by, speaking
from tests.support.pair import DB_ADDRESS
from tests.support.through_waypoint import WP, Through, run_through
from tests.waypoint.test_gateway import UPGRADE, Reader, Writer, answer, request_head, settled_exchanges, shout, tell
from tests.waypoint.test_http2 import POST as HTTP2_POST
from tests.waypoint.test_http2 import echo
from waypoint import external_authorization

TARGETS = (Target("Service", "shop/db"),)
ASKED = ExternalAuthorization("shop/authz", 80, 2000)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n"


@dataclass
class Judge:
    """The service that is asked: says `verdict`, and keeps what it was asked."""

    verdict: bytes = OK + b"\r\n"
    asked: list[bytes] = field(default_factory=list)
    connections: int = 0
    open: set[asyncio.Task[None] | None] = field(default_factory=set)
    came: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    closes: bool = False
    drops: bool = False
    """Whether it closes instead of answering a second time on a connection."""

    async def serve(self, reader: Reader, writer: Writer) -> None:
        self.connections += 1
        answered = 0
        self.open.add(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await request_head(reader)
                (length,) = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                self.asked.append(head + await reader.readexactly(int(length)))
                self.came.set()
                await self.answers.wait()
                if self.drops and answered:
                    break
                writer.write(self.verdict)
                answered += 1
                if self.closes:
                    break
        self.gone.set()
        writer.close()
        self.open.discard(asyncio.current_task())


def custom(*rules: Rule, name: str = "ask", authorizer: ExternalAuthorization | None = ASKED) -> AuthorizationPolicy:
    return AuthorizationPolicy("shop", name, Action.CUSTOM, None, rules or (Rule(),), TARGETS, authorizer=authorizer)


@contextlib.asynccontextmanager
async def judging(through: Through, *policies: AuthorizationPolicy, waits: bool = False) -> AsyncIterator[Judge]:
    """Service `shop/authz`, whose workload is db."""
    judge = Judge()
    if not waits:
        judge.answers.set()
    server = await asyncio.start_server(judge.serve, DB_ADDRESS, 0)
    port = server.sockets[0].getsockname()[1]
    through.pair.apply(
        Service("shop", "authz", (), (ServicePort("http", 80, port, "http"),), {}, (DB,)),
        Endpoint("shop/authz", "shop/db", DB_ADDRESS, DB, {80: port}, 1, True, {}),
        *policies,
    )
    try:
        yield judge
    finally:
        judge.answers.set()
        server.close()
        through.pair.plane.run(through.upstream.close)
        await asyncio.gather(*(one for one in judge.open if one is not None))


def run(directory: Path, authority: Authority, client: Callable[[Through], Awaitable[None]]) -> None:
    run_through(directory, authority, tell, client)


async def ask(through: Through, text: bytes) -> tuple[int, bytes, bytes]:
    """One request on a connection of its own."""
    reader, writer = await through.open()
    writer.write(text.replace(b"\n", b"\r\n"))
    found = await answer(reader)
    writer.close()
    return found


GET = b"GET /a?b=1 HTTP/1.1\nhost: db.shop\nx-user: forged\ncookie: c=1\nx-other: o\n\n"


def test_what_is_allowed_goes_on_with_what_the_service_says(identities: Path, authority: Authority) -> None:
    authorizer = replace(
        ASKED,
        path_prefix="/check",
        checked=("cookie", "x-req*"),
        added=(("x-mesh", "here"),),
        upstream_on_allow=("content-length", "x-forwarded-*", "x-user"),
        downstream_on_allow=("set-*",),
    )

    async def client(through: Through) -> None:
        policy = custom(Rule(operations=(Operation(paths=("/a*",)),)), authorizer=authorizer)
        async with judging(through, policy) as judge:
            judge.verdict = (
                OK + b"x-user: ann\r\nx-user: too\r\nx-forwarded-for: 6.6.6.6\r\nset-cookie: s=1\r\nx-z: z\r\n\r\n"
            )
            for number in range(3):
                status, head, body = await ask(through, GET)
                assert status == 200
                seen = body.split(b"\r\n")
                assert [line for line in seen if line.startswith(b"x-user")] == [b"x-user: ann", b"x-user: too"]
                assert b"x-forwarded-for: 127.0.77.1" in seen
                assert b"x-z" not in body
                assert b"set-cookie: s=1\r\n" in head
                assert len(judge.asked) == number + 1
            assert judge.connections == 1, "kept"
            check = judge.asked[0]
            lines = check.split(b"\r\n")
            assert lines[0] == b"GET /check/a?b=1 HTTP/1.1"
            expected = (
                b"host: db.shop",
                b"cookie: c=1",
                b"x-mesh: here",
                b"content-length: 0",
                b"x-forwarded-for: 127.0.77.1",
            )
            assert set(expected) <= set(lines)
            assert f"x-forwarded-client-cert: URI={WEB}".encode() in lines
            assert any(line.startswith(b"x-request-id: ") for line in lines)
            assert any(line.startswith(b"traceparent: 00-") for line in lines)
            assert b"x-other" not in check
            assert b"forged" not in check
            assert (await ask(through, b"GET /b HTTP/1.1\nhost: a\n\n"))[0] == 200
            assert len(judge.asked) == 3, "no rule matches"
            metrics = through.telemetry.render().decode()
            assert "uproxy_external_authorization_allowed_total 3" in metrics
        # The waypoint has asked as itself.
        through.pair.plane.run(through.upstream.close)
        await asyncio.sleep(0.05)
        callers = [one.caller for one in through.pair.db.telemetry.ended]
        assert callers.count(str(WP)) == 1
        assert callers.count(str(WEB)) == len(callers) - 1

    run(identities, authority, client)


@pytest.mark.parametrize(
    ("verdict", "authorizer", "status", "there", "missing", "text"),
    [
        (
            b"HTTP/1.1 401 No\r\ncontent-length: 5\r\ncontent-type: a/b\r\nx-why: w\r\nx-uproxy-policy: forged\r\n"
            b"www-authenticate: Basic\r\n\r\nno no",
            ASKED,
            401,
            (b"x-why: w", b"www-authenticate: basic", b"content-type: a/b", b"x-uproxy-policy: shop/ask[0]"),
            b"forged",
            b"no no",
        ),
        (
            b"HTTP/1.1 302 No\r\ncontent-length: 0\r\nlocation: /sign-in\r\nset-cookie: a\r\nset-cookie: b\r\n"
            b"x-why: w\r\n\r\n",
            replace(ASKED, downstream_on_deny=("set-cookie",)),
            302,
            (b"location: /sign-in", b"set-cookie: a", b"set-cookie: b"),
            b"x-why",
            b"",
        ),
        (b"HTTP/1.1 204 No\r\n\r\n", ASKED, 204, (b"x-uproxy-reason: external-authorization",), b"content-length", b""),
        (
            b"HTTP/1.1 403 No\r\ntransfer-encoding: chunked\r\n\r\n3\r\nno!\r\n0\r\n\r\n",
            ASKED,
            403,
            (b"content-length: 3",),
            b"chunked",
            b"no!",
        ),
        (
            b"HTTP/1.1 100 Go\r\n\r\nHTTP/1.1 429 No\r\ncontent-length: 0\r\nretry-after: 7\r\n\r\n",
            ASKED,
            429,
            (b"retry-after: 7",),
            b"chunked",
            b"",
        ),
    ],
)
def test_what_is_denied_is_answered_as_the_service_says(
    identities: Path,
    authority: Authority,
    verdict: bytes,
    authorizer: ExternalAuthorization,
    status: int,
    there: tuple[bytes, ...],
    missing: bytes,
    text: bytes,
) -> None:
    async def client(through: Through) -> None:
        async with judging(through, custom(authorizer=replace(authorizer, fail_open=True))) as judge:
            judge.verdict = verdict
            found, head, body = await ask(through, GET)
            assert (found, body) == (status, text)
            lines = head.lower().split(b"\r\n")
            assert set(there) <= set(lines)
            assert missing not in head.lower()
            assert not through.telemetry.exchanges[-1].attempts, "no backend was asked"
            (exchange,) = through.telemetry.exchanges
            assert (exchange.status, exchange.flag, exchange.policy) == (status, "UAEX", "shop/ask[0]")
            assert exchange.details == f"Service shop/authz answers {status}"
            assert "uproxy_external_authorization_denied_total 1" in through.telemetry.render().decode()

    run(identities, authority, client)


def test_a_grpc_caller_is_denied_in_its_own_words(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async with judging(through, custom()) as judge:
            judge.verdict = b"HTTP/1.1 401 No\r\ncontent-length: 2\r\ncontent-type: text/html\r\nx-why: w\r\n\r\nno"
            call = b"POST /a.B/C HTTP/1.1\nhost: db\ncontent-type: application/grpc\ncontent-length: 0\n\n"
            status, head, body = await ask(through, call)
            assert (status, body) == (200, b"")
            lines = head.lower().split(b"\r\n")
            assert {b"content-type: application/grpc", b"grpc-status: 16", b"x-why: w"} <= set(lines)
            assert b"text/html" not in head

    run(identities, authority, client)


NO_ANSWERS = [
    b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhal",  # and it closes
    b"nonsense\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\ncontent-length: 70000\r\n\r\n" + bytes(70000),
    b"",
]


@pytest.mark.parametrize("verdict", NO_ANSWERS)
def test_what_is_no_answer_refuses_unless_it_is_said_otherwise(
    identities: Path, authority: Authority, verdict: bytes
) -> None:
    async def client(through: Through) -> None:
        async with judging(through, custom()) as judge:
            judge.verdict, judge.closes = verdict, True
            status, head, body = await ask(through, GET)
            assert status == 403
            assert b"x-uproxy-reason: external-authorization\r\n" in head
            assert body.startswith(b"Service shop/authz: ")
            (exchange,) = through.telemetry.exchanges
            assert (exchange.flag, exchange.attempts) == ("UAEX", 0)
            through.pair.apply(custom(authorizer=replace(ASKED, status_on_error=503)))
            assert (await ask(through, GET))[0] == 503
            through.pair.apply(custom(authorizer=replace(ASKED, fail_open=True)))
            assert (await ask(through, GET))[0] == 200
            assert "uproxy_external_authorization_failed_total 3" in through.telemetry.render().decode()

    run(identities, authority, client)


def test_an_answer_that_does_not_come_in_time_is_none(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async with judging(through, custom(authorizer=replace(ASKED, timeout_ms=50)), waits=True) as judge:
            status, _, body = await ask(through, GET)
            assert (status, body) == (403, b"Service shop/authz: no answer within 50 ms\n")
            judge.answers.set()
            await asyncio.wait_for(judge.gone.wait(), 30)
            assert (await ask(through, GET))[0] == 200

    run(identities, authority, client)


def test_nobody_to_be_asked_refuses(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async with judging(through, custom(authorizer=None)) as judge:
            status, head, _ = await ask(through, GET)
            assert status == 403
            assert b"x-uproxy-policy: shop/ask[0]\r\n" in head
            through.pair.apply(custom(authorizer=replace(ASKED, service="shop/nowhere")))
            assert (await ask(through, GET))[0] == 403
            through.pair.apply(custom(authorizer=replace(ASKED, port=81)))
            assert (await ask(through, GET))[0] == 403
            assert not judge.asked
            through.pair.apply(custom())
            assert (await ask(through, GET))[0] == 200

    run(identities, authority, client)


POST = b"POST /a HTTP/1.1\nhost: db\ncontent-length: 10\n\n0123456789"
CHUNKED = b"POST /a HTTP/1.1\nhost: db\ntransfer-encoding: chunked\n\n4\n0123\n6\n456789\n0\n\n"


@pytest.mark.parametrize(
    ("request_", "limit", "partial", "status", "seen"),
    [
        (POST, 0, False, 200, b""),
        (POST, 10, False, 200, b"0123456789"),
        (POST, 9, False, 413, None),
        (POST, 9, True, 200, b"012345678"),
        (POST.replace(b"content", b"expect: 100-continue\ncontent"), 20, False, 200, b"0123456789"),
    ],
)
def test_the_body_goes_along_when_it_is_asked_for(
    identities: Path,
    authority: Authority,
    request_: bytes,
    limit: int,
    partial: bool,
    status: int,
    seen: bytes | None,
) -> None:
    async def client(through: Through) -> None:
        policy = custom(authorizer=replace(ASKED, body_bytes=limit, partial_body=partial))
        async with judging(through, policy) as judge:
            reader, writer = await through.open()
            writer.write(request_.replace(b"\n", b"\r\n"))
            found, _, body = await answer(reader)
            while found == 100:
                found, _, body = await answer(reader)
            assert found == status
            assert [check.partition(b"\r\n\r\n")[2] for check in judge.asked] == ([] if seen is None else [seen])
            if status == 200:
                assert body.endswith(b"\r\n\r\n0123456789"), "all of it reaches the application"
            # The connection goes on.
            writer.write(GET.replace(b"\n", b"\r\n"))
            assert (await answer(reader))[0] == 200
            writer.close()
            if limit:
                word = b"true" if partial else b"false"
                assert all(b"x-envoy-auth-partial-body: false\r\n" in one for one in judge.asked[1:])
                assert all(
                    b"x-envoy-auth-partial-body: %b\r\n" % word in one for one in judge.asked[: seen is not None]
                )

    run(identities, authority, client)


def test_a_body_in_chunks_is_read_ahead_and_whole_behind_it(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async with judging(through, custom(authorizer=replace(ASKED, body_bytes=6, partial_body=True))) as judge:
            reader, writer = await through.open()
            writer.write(CHUNKED.replace(b"\n", b"\r\n"))
            status, _, _ = await answer(reader)
            assert status == 200
            assert judge.asked[0].endswith(b"\r\n\r\n012345")
            writer.close()

    async def count(reader: Reader, writer: Writer) -> None:
        await request_head(reader)
        got = b""
        while not got.endswith(b"\r\n0\r\n\r\n"):
            got += await reader.read(100)
        assert b"".join(got.split(b"\r\n")[1::2]) == b"0123456789"
        writer.write(OK + b"\r\n")
        writer.close()

    run_through(identities, authority, count, client)


def test_the_service_is_asked_before_other_policies_which_see_what_it_adds(
    identities: Path, authority: Authority
) -> None:
    deny = AuthorizationPolicy("shop", "deny", Action.DENY, None, (Rule(),), TARGETS)
    only_ann = Condition(ConditionKey.REQUEST_HEADERS, ("ann",), (), "x-user")
    allow = AuthorizationPolicy("shop", "allow", Action.ALLOW, None, (Rule(conditions=(only_ann,)),), TARGETS)

    async def client(through: Through) -> None:
        policy = custom(authorizer=replace(ASKED, upstream_on_allow=("x-user",)))
        async with judging(through, policy, deny) as judge:
            judge.verdict = b"HTTP/1.1 418 No\r\ncontent-length: 0\r\n\r\n"
            assert (await ask(through, GET))[0] == 418, "before the DENY"
            judge.verdict = OK + b"x-user: ann\r\n\r\n"
            status, head, _ = await ask(through, GET)
            assert status == 403
            assert b"x-uproxy-policy: shop/deny[0]\r\n" in head
            through.pair.withdraw(deny)
            through.pair.apply(allow)
            assert (await ask(through, GET))[0] == 200
            judge.verdict = OK + b"x-user: ben\r\n\r\n"
            assert (await ask(through, GET.replace(b"forged", b"ann")))[0] == 403

    run(identities, authority, client)


def test_each_service_must_allow_and_is_asked_once(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        second = replace(ASKED, path_prefix="/second", checked=("x-user",))
        first = replace(ASKED, upstream_on_allow=("x-user",))
        policies = (
            custom(name="a", authorizer=first),
            custom(name="b", authorizer=second),
            custom(name="c", authorizer=first),
        )
        async with judging(through, *policies) as judge:
            judge.verdict = OK + b"x-user: ann\r\n\r\n"
            assert (await ask(through, GET))[0] == 200
            assert [one.split(b" ")[1] for one in judge.asked] == [b"/a?b=1", b"/second/a?b=1"]
            assert b"x-user: ann\r\n" in judge.asked[1], "what the first one said"
            judge.verdict = b"HTTP/1.1 403 No\r\ncontent-length: 0\r\n\r\n"
            assert (await ask(through, GET))[0] == 403
            assert len(judge.asked) == 3

    run(identities, authority, client)


def test_what_holds_when_the_answer_has_come_counts(identities: Path, authority: Authority) -> None:
    deny = AuthorizationPolicy("shop", "deny", Action.DENY, None, (Rule(),), TARGETS)

    async def client(through: Through) -> None:
        async with judging(through, custom(), waits=True) as judge, asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(ask(through, GET))
            await judge.came.wait()
            through.pair.apply(deny)
            judge.answers.set()
            assert (await asking)[0] == 403
            assert len(judge.asked) == 1

    run(identities, authority, client)


def test_a_caller_that_leaves_ends_the_check(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async with judging(through, custom(authorizer=replace(ASKED, timeout_ms=60_000)), waits=True) as judge:
            _, writer = await through.open()
            writer.write(GET.replace(b"\n", b"\r\n"))
            await judge.came.wait()
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            writer.transport.abort()
            await settled_exchanges(through, 1)
            assert through.telemetry.exchanges[0].flag == "DC"
            judge.answers.set()
            await asyncio.wait_for(judge.gone.wait(), 30)

    run(identities, authority, client)


def test_a_connection_that_has_gone_stale_fails_no_check(identities: Path, authority: Authority) -> None:
    """Not even of a request that must not be sent twice: the question does no harm."""

    async def client(through: Through) -> None:
        async with judging(through, custom()) as judge:
            judge.drops = True
            for _ in range(5):
                assert (await ask(through, POST))[0] == 200
            assert judge.connections == 5
            assert len(judge.asked) == 9, "each but the first was asked twice"

    run(identities, authority, client)


def test_a_websocket_goes_on_under_what_it_was_asked_for_and_no_longer(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async with judging(through, custom()) as judge:
            reader, writer = await through.open()
            writer.write(b"GET /chat HTTP/1.1\r\nHost: db\r\n" + UPGRADE + b"\r\n")
            assert (await request_head(reader)).startswith(b"HTTP/1.1 101")
            assert await reader.readexactly(8) == b"welcome "
            assert b"upgrade" not in judge.asked[0].lower()
            through.pair.plane.run(lambda: through.connections.reauthorise())
            writer.write(b"still there")
            assert await reader.readexactly(11) == b"STILL THERE"
            through.pair.apply(custom(name="second", authorizer=replace(ASKED, path_prefix="/second")))
            through.pair.plane.run(lambda: through.connections.reauthorise())
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
            writer.close()
            assert len(judge.asked) == 1

    run_through(identities, authority, shout, client)


def test_requests_by_http2_are_asked_about_beside_each_other(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async with judging(through, custom(authorizer=replace(ASKED, body_bytes=4, partial_body=True))) as judge:
            judge.verdict = b"HTTP/1.1 403 No\r\ncontent-length: 2\r\nx-why: w\r\n\r\nno"
            async with speaking(*await through.open()) as peer:
                streams = [peer.request(HTTP2_POST, b"hello") for _ in range(3)]
                for stream in streams:
                    found = await peer.answer(stream)
                    assert (found.status, bytes(found.body), dict(found.headers)[b"x-why"]) == (403, b"no", b"w")
                judge.verdict = OK + b"\r\n"
                found = await peer.answer(peer.request(HTTP2_POST, b"hello"))
                assert found.status == 200
                assert bytes(found.body).endswith(b"\n\nhello")
            assert [check.partition(b"\r\n\r\n")[2] for check in judge.asked] == [b"hell"] * 4

    run_through(identities, authority, served_by(echo), client, protocol="kubernetes.io/h2c")


def test_an_answer_is_bounded() -> None:
    assert max(map(len, NO_ANSWERS)) > external_authorization.MAX_ANSWER
