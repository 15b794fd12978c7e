"""Requests over several endpoints through a real waypoint, as TrafficPolicies say it; with real uProxies and sockets.

The endpoints are applications at ports of db's workload. Each answers with its number.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from control.api.balancing import Algorithm, ConsistentHash, HashOf, LoadBalancing, OutlierDetection
from control.api.policy import Target
from control.api.route import NO_MODIFIER, Backend, HTTPRoute, Match, Parent, PathKind, PathMatch, Retry, RouteRule
from control.api.traffic import TrafficPolicy
from control.api.workload import Endpoint
from control.server.ca import Authority
from tests.support.certificates import DB
from tests.support.http2_peer import Http2Peer, Message, served_by, speaking
from tests.support.pair import DB_ADDRESS, SERVICE_PORT, workload
from tests.support.through_waypoint import WP, WP_ADDRESS, Server, Through, run_through, settled

TARGET = (Target("Service", "shop/db"),)
ANY = LoadBalancing(Algorithm.RANDOM)
STRICT = OutlierDetection(2, max_ejection_percent=100)


@dataclass
class App:
    """What the endpoints do."""

    through: Through
    ports: list[int] = field(default_factory=list)
    status: dict[int, int] = field(default_factory=dict)
    """By number; else 200."""
    held: dict[int, asyncio.Event] = field(default_factory=dict)
    """Those that wait for it with their answers."""
    seen: Counter[int] = field(default_factory=Counter)

    async def serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n"):
                self.seen[number] += 1
                if number in self.held:
                    await self.held[number].wait()
                if self.status.get(number) == 0:
                    writer.transport.abort()
                    return
                status = self.status.get(number, 200)
                writer.write(b"HTTP/1.1 %d Said\r\ncontent-length: 1\r\n\r\n%d" % (status, number))
        writer.close()

    def apply(self, said: LoadBalancing | None, detection: OutlierDetection | None = None) -> None:
        policy = TrafficPolicy("shop", "t", TARGET, load_balancing=said, outlier_detection=detection)
        self.through.pair.apply(policy)

    async def get(self, head: str = "", path: str = "/") -> tuple[int, str, str]:
        """Status, head and body, over a connection of its own."""
        reader, writer = await self.through.open()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: db\r\n{head}\r\n".encode())
        answered = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(re.search("content-length: ([0-9]+)", answered)[1])  # type: ignore[index]
        body = (await reader.readexactly(length)).decode()
        writer.close()
        return int(answered.split(" ", 2)[1]), answered, body

    async def shares(self, count: int = 12, head: str = "", path: str = "/") -> Counter[str]:
        """Who has answered, or the status of what was no answer of theirs."""
        found = Counter[str]()
        for _ in range(count):
            status, _, body = await self.get(head, path)
            found[body if len(body) == 1 else str(status)] += 1
        return found


def endpoint(number: int, port: int, locality: str = "") -> Endpoint:
    return Endpoint("shop/db", f"shop/db-{number}", DB_ADDRESS, DB, {SERVICE_PORT: port}, 1, True, {}, locality)


def retried(codes: tuple[int, ...], attempts: int) -> HTTPRoute:
    backend = Backend("shop/db", SERVICE_PORT, 1, NO_MODIFIER, NO_MODIFIER)
    match = Match(PathMatch(PathKind.PREFIX, "/"), (), (), "")
    rule = RouteRule("", (match,), NO_MODIFIER, NO_MODIFIER, (backend,), 0, 0, retry=Retry(codes, attempts, 1))
    return HTTPRoute("shop", "db", (Parent("shop/db", 0),), (), (rule,))


def run(
    directory: Path,
    authority: Authority,
    client: Callable[[App], Awaitable[None]],
    localities: tuple[str, ...] = ("", "", ""),
    protocol: str = "http",
) -> None:
    """With as many endpoints as there are localities."""

    async def nobody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    @contextlib.asynccontextmanager
    async def apps(app: App) -> AsyncIterator[None]:
        servers = []
        for number, _ in enumerate(localities):

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int = number) -> None:
                await app.serve(number, reader, writer)

            servers.append(await asyncio.start_server(serve, DB_ADDRESS, 0))
        app.ports = [server.sockets[0].getsockname()[1] for server in servers]
        try:
            yield
        finally:
            for server in servers:
                server.close()

    async def main(through: Through) -> None:
        app = App(through)
        async with apps(app):
            pair = through.pair
            pair.withdraw(Endpoint("shop/db", "shop/db", DB_ADDRESS, DB, {SERVICE_PORT: pair.app_port}, 1, True, {}))
            wp = replace(workload("wp-1", WP_ADDRESS, WP), service_account="wp", locality="eu/1")
            pair.apply(wp, *(endpoint(n, app.ports[n], place) for n, place in enumerate(localities)))
            await client(app)

    run_through(directory, authority, nobody, main, protocol)


def test_round_robin_is_in_turn(identities: Path, authority: Authority) -> None:
    async def client(app: App) -> None:
        assert len(await app.shares(40)) == 3, "at random"
        app.apply(LoadBalancing(Algorithm.ROUND_ROBIN))
        assert set((await app.shares(12)).values()) == {4}

    run(identities, authority, client)


def test_least_request_spares_the_one_that_is_slow(identities: Path, authority: Authority) -> None:
    async def client(app: App) -> None:
        app.apply(LoadBalancing(Algorithm.LEAST_REQUEST))
        app.held[1] = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            while not app.seen[1]:  # until one is there
                tasks.create_task(app.get())
                await asyncio.sleep(0.02)
            app.seen.clear()
            async with asyncio.timeout(30):
                found = await app.shares(20)
            assert set(found) == {"0", "2"}, "of two that are drawn, never the one that has one"
            app.held[1].set()
        del app.held[1]
        assert "1" in await app.shares(60), "it is free again"

    run(identities, authority, client)


def test_alike_requests_go_to_one_endpoint(identities: Path, authority: Authority) -> None:
    async def client(app: App) -> None:
        def by(of: HashOf, name: str = "", ttl_ms: int | None = None, path: str = "") -> LoadBalancing:
            return LoadBalancing(hash=ConsistentHash(of, name, ttl_ms, path))

        app.apply(by(HashOf.HEADER, "x-user"))
        for user in range(4):
            assert len(await app.shares(5, f"X-User: {user}\r\n")) == 1
        assert len({next(iter(await app.shares(1, f"x-user: u{user}\r\n"))) for user in range(30)}) == 3
        assert len(await app.shares(30)) == 3, "without the header"
        app.apply(by(HashOf.PARAMETER, "user"))
        for user in range(4):
            assert len(await app.shares(5, path=f"/a?x=1&user={user}")) == 1
        assert len(await app.shares(30, path="/a?x=1")) == 3
        for of in (HashOf.ADDRESS, HashOf.IDENTITY):
            app.apply(by(of))
            assert len(await app.shares(12)) == 1, "all are of one caller"

    run(identities, authority, client)


def test_a_cookie_is_set_once_and_leads_back(identities: Path, authority: Authority) -> None:
    async def client(app: App) -> None:
        app.apply(LoadBalancing(hash=ConsistentHash(HashOf.COOKIE, "Id", 90_000, "/a")))
        went = set()
        for _ in range(12):
            _, head, first = await app.get()
            (value,) = re.findall("set-cookie: Id=([0-9a-f]{32}); Max-Age=90; Path=/a; HttpOnly\r\n", head)
            _, again, second = await app.get(f"cookie: other=1; Id={value}\r\n")
            assert "set-cookie" not in again
            assert second == first
            went.add(first)
        assert len(went) > 1
        app.apply(LoadBalancing(hash=ConsistentHash(HashOf.COOKIE, "Id", 0)))
        assert re.search("set-cookie: Id=[0-9a-f]{32}; HttpOnly\r\n", (await app.get())[1])
        app.apply(LoadBalancing(hash=ConsistentHash(HashOf.COOKIE, "Id")))
        assert "set-cookie" not in (await app.get())[1]

    run(identities, authority, client)


def test_those_of_the_waypoint_s_zone_come_first(identities: Path, authority: Authority) -> None:
    async def client(app: App) -> None:
        assert set(await app.shares(60)) == {"0", "1", "2", "3"}
        app.apply(replace(ANY, local=True), STRICT)
        assert set(await app.shares(20)) == {"1"}
        app.status[1] = 500
        assert await app.shares(4) == {"1": 2, "2": 2}, "one of the region, once that of the zone is ejected"
        app.through.pair.withdraw(endpoint(2, app.ports[2], "eu/2"))
        assert set(await app.shares(30)) == {"0", "3"}

    run(identities, authority, client, ("us/1", "eu/1/rack", "eu/2", ""))


def test_a_service_may_say_so_itself(identities: Path, authority: Authority) -> None:
    async def client(app: App) -> None:
        (service,) = app.through.pair.state.services()
        app.through.pair.apply(replace(service, prefers_zone=True))
        assert set(await app.shares(20)) == {"1"}
        app.apply(LoadBalancing(Algorithm.LEAST_REQUEST), STRICT)
        assert set(await app.shares(20)) == {"1"}
        app.status[1] = 500
        await app.shares(2)
        assert set(await app.shares(10)) == {"2"}

    run(identities, authority, client, ("us/1", "eu/1/rack", "eu/2", ""))


def test_who_fails_is_left_alone_and_comes_back(identities: Path, authority: Authority) -> None:
    async def client(app: App) -> None:
        balancers = app.through.gateway.balancers
        app.apply(None, replace(STRICT, base_ejection_ms=400))
        app.status[2] = 503
        found = await app.shares(40)
        assert app.seen[2] == 2, found
        assert (len(balancers.ejected()), balancers.ejections) == (1, 1)
        (ejected,) = balancers.ejected()
        assert ejected == {
            "service": "shop/db",
            "port": SERVICE_PORT,
            "endpoint": f"{DB_ADDRESS}:{app.ports[2]}",
            "for_s": ejected["for_s"],
        }
        del app.status[2]
        await asyncio.sleep(0.5)
        assert not balancers.ejected()
        assert "2" in await app.shares(40)
        app.status[2] = 404
        await app.shares(20)
        assert not balancers.ejected(), "an answer like any other"

    run(identities, authority, client)


def test_connections_that_break_and_late_answers_count_too(identities: Path, authority: Authority) -> None:
    async def client(app: App) -> None:
        balancers = app.through.gateway.balancers
        app.apply(ANY, replace(STRICT, split_local_origin=True, consecutive_local_origin=2, consecutive_5xx=0))
        app.status |= {0: 0, 1: 503}
        found = await app.shares(40)
        assert app.seen[0] == 2, found
        assert (len(balancers.ejected()), app.seen[1] > 5) == (1, True), "an answer of 503 is one"
        app.status.clear()
        backend = Backend("shop/db", SERVICE_PORT, 1, NO_MODIFIER, NO_MODIFIER)
        match = Match(PathMatch(PathKind.PREFIX, "/"), (), (), "")
        rule = RouteRule("", (match,), NO_MODIFIER, NO_MODIFIER, (backend,), 100, 0)
        app.through.pair.apply(HTTPRoute("shop", "db", (Parent("shop/db", 0),), (), (rule,)))
        app.held[1] = asyncio.Event()
        found = await app.shares(30)
        assert (found["504"], len(balancers.ejected())) == (2, 2)
        app.held[1].set()

    run(identities, authority, client)


def test_who_is_not_there_is_ejected_and_the_request_served(identities: Path, authority: Authority) -> None:
    async def client(app: App) -> None:
        app.apply(LoadBalancing(Algorithm.ROUND_ROBIN), STRICT)
        app.through.pair.apply(endpoint(9, 9))  # nobody listens there
        assert "503" not in await app.shares(12)
        assert len(app.through.gateway.balancers.ejected()) + len(app.through.upstream.health) >= 1

    run(identities, authority, client)


def test_when_all_are_ejected_requests_are_refused_unless_too_few_are_left(
    identities: Path, authority: Authority
) -> None:
    async def client(app: App) -> None:
        app.apply(ANY, STRICT)
        app.status = dict.fromkeys(range(3), 500)
        await app.shares(30)
        app.status.clear()
        status, head, body = await app.get()
        assert (status, "x-uproxy-reason: no-endpoint" in head) == (503, True)
        assert body == "every endpoint has failed too often, and is left alone for a while\n"
        app.apply(ANY, replace(STRICT, min_health_percent=50))
        app.status = dict.fromkeys(range(3), 500)
        await app.shares(30)
        app.status.clear()
        assert set(await app.shares(30)) == {"0", "1", "2"}

    run(identities, authority, client)


def test_another_attempt_goes_to_another_endpoint(identities: Path, authority: Authority) -> None:
    async def client(app: App) -> None:
        app.through.pair.apply(retried((500,), attempts=1))
        for said in (ANY, LoadBalancing(Algorithm.ROUND_ROBIN), LoadBalancing(hash=ConsistentHash(HashOf.ADDRESS))):
            app.apply(said)
            app.status.clear()
            _, _, body = await app.get()  # to where all go, if they go to one
            app.status[int(body)] = 500
            assert {status for status, _, _ in [await app.get() for _ in range(15)]} == {200}
        app.through.pair.withdraw(TrafficPolicy("shop", "t", TARGET))
        statuses = Counter(status for status, _, _ in [await app.get() for _ in range(20)])
        assert statuses == {200: 20}, "nor without a policy"

    run(identities, authority, client)


def test_a_status_of_grpc_says_that_an_endpoint_fails(identities: Path, authority: Authority) -> None:
    calls = Counter[str]()

    def saying(status: str) -> Server:
        async def say(peer: Http2Peer, stream: int, message: Message) -> None:
            calls[status] += 1
            await peer.until(lambda: message.over)
            peer.respond(stream, [(b":status", b"200"), (b"content-type", b"application/grpc")])
            await peer.send(stream, b"\0\0\0\0\0")
            peer.end(stream, [(b"grpc-status", status.encode())])

        return served_by(say)

    async def client(through: Through) -> None:
        other = await asyncio.start_server(saying("14"), DB_ADDRESS, 0)
        through.pair.apply(
            endpoint(1, other.sockets[0].getsockname()[1]),
            TrafficPolicy("shop", "t", TARGET, outlier_detection=STRICT),
        )
        call = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"db"), (b":path", b"/a.B/C")]
        async with speaking(*await through.open()) as peer:
            for _ in range(30):
                answer = await peer.answer(peer.request([*call, (b"content-type", b"application/grpc")], b""))
                assert answer.status == 200
        assert (calls["14"], calls["0"]) == (2, 28)
        other.close()

    run_through(identities, authority, saying("0"), client, "grpc")


def test_opaque_connections_are_balanced_too(identities: Path, authority: Authority) -> None:
    async def client(app: App) -> None:
        app.apply(LoadBalancing(Algorithm.ROUND_ROBIN))
        assert set((await app.shares(9)).values()) == {3}
        app.apply(LoadBalancing(hash=ConsistentHash(HashOf.IDENTITY)))
        assert len(await app.shares(9)) == 1
        app.apply(LoadBalancing(Algorithm.LEAST_REQUEST))
        await settled(app.through)  # those of before
        held = [await app.through.open() for _ in range(2)]
        for _, writer in held:
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
        answers = [(await reader.readuntil(b"\r\n\r\n"), await reader.read(1)) for reader, _ in held]
        assert len({body for _, body in answers}) == 2
        for _, writer in held:
            writer.close()

    run(identities, authority, client, protocol="tcp")
