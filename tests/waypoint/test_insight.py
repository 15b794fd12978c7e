"""What a waypoint tells of a request: its spans, its part of the time, its caller, its line in the log."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from control.api.gateway import Gateway
from control.api.policy import Action, AuthorizationPolicy, Operation, Rule, Target
from control.api.route import Retry
from control.server.ca import Authority
from tests.support.certificates import DB, WEB
from tests.support.http2_peer import served_by, speaking
from tests.support.through_waypoint import Through, run_through
from tests.waypoint.test_gateway import Reader, Writer, answer, request_head, route, rule, settled_exchanges, tell
from tests.waypoint.test_http2 import GET, echo
from uproxy.access_log import json_line
from uproxy.telemetry import Span
from waypoint.telemetry import _fields

TRACED = b"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n"


@dataclass
class Spans:
    kept: list[Span] = field(default_factory=list)

    def draws(self) -> bool:
        return False

    def add(self, span: Span) -> None:
        self.kept.append(span)

    def of_kind(self, kind: str) -> list[Span]:
        return [span for span in self.kept if span.kind == kind]


def test_each_attempt_is_a_span_below_the_requests(identities: Path, authority: Authority) -> None:
    seen: list[bytes] = []

    async def failing_once(reader: Reader, writer: Writer) -> None:
        while not reader.at_eof():
            try:
                seen.append(await request_head(reader))
            except asyncio.IncompleteReadError:
                break
            writer.write(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\n\r\n" % (503 if len(seen) == 1 else 200))
        writer.close()

    async def client(through: Through) -> None:
        through.telemetry.spans = spans = Spans()
        through.pair.apply(route(rule("/", retry=Retry((503,), 2, 1))))
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n" + TRACED + b"\r\n")
        assert (await answer(reader))[0] == 200
        writer.close()
        await settled_exchanges(through, 1)
        (server,), (first, second) = spans.of_kind("server"), spans.of_kind("client")
        assert server.parent == "00f067aa0ba902b7"
        assert first.parent == second.parent == server.id
        assert len({server.id, first.id, second.id}) == 3
        assert (first.error, second.error, server.error) == ("503", None, None)
        assert server.started <= first.started <= first.ended <= second.started <= second.ended == server.ended
        told = [re.findall(rb"traceparent: 00-[0-9a-f]{32}-([0-9a-f]{16})-01", head) for head in seen]
        assert told == [[first.id.encode()], [second.id.encode()]], "each goes on from its own"

    run_through(identities, authority, failing_once, client)


def test_who_does_not_record_has_no_spans(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        through.telemetry.spans = spans = Spans()
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        assert (await answer(reader))[0] == 200
        writer.close()
        await settled_exchanges(through, 1)
        assert not spans.kept
        assert through.telemetry.exchanges[0].tries == ()

    run_through(identities, authority, tell, client)


async def slow(reader: Reader, writer: Writer) -> None:
    head = await request_head(reader)
    await asyncio.sleep(0.1)
    writer.write(b"HTTP/1.1 200 OK\r\nserver-timing: db;dur=7\r\ncontent-length: %d\r\n\r\n%b" % (len(head), head))
    writer.close()


def timings(head: bytes) -> list[dict[str, float]]:
    lines = re.findall(rb"^server-timing: (.*?)\r$", head, re.MULTILINE | re.IGNORECASE)
    return [{name: float(ms) for name, ms in re.findall(r"(\w+);dur=([0-9.]+)", line.decode())} for line in lines]


def test_the_waypoint_says_its_part_of_the_time_to_who_asks(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async def ask(fields: bytes, path: bytes = b"/") -> tuple[int, bytes, bytes]:
            reader, writer = await through.open()
            writer.write(b"GET %b HTTP/1.1\r\nHost: db\r\n%b\r\n" % (path, fields))
            found = await answer(reader)
            writer.close()
            return found

        _, head, body = await ask(b"x-uproxy-server-timing: 1\r\n")
        applications, ours = timings(head)
        assert applications == {"db": 7.0}
        assert ours.keys() == {"waypoint", "upstream"}
        assert ours["upstream"] >= 95
        assert ours["waypoint"] >= 0
        await settled_exchanges(through, 1)
        assert int(through.telemetry.exchanges[0].upstream_s * 1000) >= 95
        assert b"x-uproxy-server-timing" not in body
        assert timings((await ask(b""))[1]) == [{"db": 7.0}], "nobody has asked"
        through.pair.apply(route(rule("/only")))
        status, head, _ = await ask(b"X-Uproxy-Server-Timing: x\r\n")
        assert status == 404
        (ours,) = timings(head)
        assert ours["upstream"] == 0.0

    run_through(identities, authority, slow, client)


def test_no_caller_by_http2_writes_who_it_is(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            forged = [
                (b"x-forwarded-client-cert", b"URI=spiffe://cluster.local/ns/shop/sa/boss"),
                (b"x-forwarded-client-cert", f"URI={DB}".encode()),
                (b"x-forwarded-for", b"6.6.6.6"),
                (b"x-uproxy-caller", b"boss"),
            ]
            found = await peer.answer(peer.request([*GET, *forged]))
            assert found.status == 200
            lines = bytes(found.body).split(b"\n")
            own = [line for line in lines if line.startswith((b"x-forwarded", b"x-uproxy"))]
            assert own == [b"x-forwarded-for: 127.0.77.1", f"x-forwarded-client-cert: URI={WEB}".encode()]

    run_through(identities, authority, served_by(echo), client, protocol="kubernetes.io/h2c")


@pytest.mark.parametrize("name", ["X-FORWARDED-CLIENT-CERT", "x-Forwarded-Client-cert"])
def test_no_caller_by_http1_writes_who_it_is(identities: Path, authority: Authority, name: str) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(f"GET / HTTP/1.1\r\nHost: db\r\n{name}: By=x;URI={DB}\r\n{name}: URI={DB},URI=a\r\n\r\n".encode())
        _, _, body = await answer(reader)
        own = [line for line in body.split(b"\r\n") if b"client-cert" in line.lower()]
        assert own == [f"x-forwarded-client-cert: URI={WEB}".encode()]
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\nx_forwarded_client_cert: URI=a\r\n\r\n")
        assert (await answer(reader))[0] == 400, "some applications read it as the other"
        writer.close()

    run_through(identities, authority, tell, client)


def test_what_an_audit_policy_matches_is_told(identities: Path, authority: Authority) -> None:
    puts = Rule(operations=(Operation(methods=("PUT",)),))
    audit = AuthorizationPolicy("shop", "puts", Action.AUDIT, None, (puts,), (Target("Service", "shop/db"),))

    async def client(through: Through) -> None:
        through.pair.apply(audit)
        reader, writer = await through.open()
        for method in (b"GET", b"PUT"):
            writer.write(b"%b / HTTP/1.1\r\nHost: db\r\ncontent-length: 0\r\n\r\n" % method)
            assert (await answer(reader))[0] == 200
        writer.close()
        await settled_exchanges(through, 2)
        assert [exchange.audit for exchange in through.telemetry.exchanges] == ["", "shop/puts[0]"]
        assert b"\nuproxy_audited_total 1\n" in through.telemetry.render()

    run_through(identities, authority, tell, client)


def test_the_log_says_where_a_request_came_from_behind_trusted_proxies(identities: Path, authority: Authority) -> None:
    async def client(through: Through) -> None:
        gateway = through.pair.state.gateway("shop/wp")
        assert isinstance(gateway, Gateway)
        through.pair.apply(replace(gateway, trusted_proxies=1))
        reader, writer = await through.open()
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\nX-Forwarded-For: 9.9.9.9, 6.6.6.6\r\n\r\n")
        _, _, body = await answer(reader)
        assert b"x-forwarded-for: 6.6.6.6, 127.0.77.1\r\n" in body
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\nX-Forwarded-For: _hidden\xe9\r\n\r\n")
        _, _, body = await answer(reader)
        assert b"x-forwarded-for: _hidden\xe9, 127.0.77.1\r\n" in body, "as it was written"
        writer.close()
        await settled_exchanges(through, 2)
        exchange, _ = through.telemetry.exchanges
        line = json.loads(json_line("m", "info", lambda wanted: _fields(exchange, 5.0, wanted), 0.0))
        assert line["x_forwarded_for"] == "6.6.6.6, 127.0.77.1"
        assert line["downstream_local_address"] == "240.240.9.9:6379"
        assert line["downstream_remote_address"].startswith("127.0.77.1:")
        assert "upstream_service_time" not in line, "nobody wants to know"

    run_through(identities, authority, tell, client)
