"""The `waypoint run` process whose engine is Envoy, between two real `uproxy run` processes, configured by files."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from control.api.address import HBONE_PORT
from control.api.balancing import Algorithm, ConsistentHash, Failover, HashOf, LoadBalancing
from control.api.gateway import Gateway, Instance, Traffic
from control.api.policy import Action, AuthorizationPolicy, Operation, Rule, Source, Target
from control.api.records import Record
from control.api.traffic import ConnectionLimits, TrafficPolicy
from control.api.workload import Endpoint
from control.client.state import Changes
from control.server.ca import Authority
from tests.support.certificates import DB, WEB
from tests.support.envoy_waypoint import envoy_serving, running_envoy
from tests.support.hand_tunnel import HandTunnel
from tests.support.http_app import telling
from tests.support.pair import DB_ADDRESS, SERVICE_PORT, VIP, WEB_ADDRESS, issued
from tests.support.site import Site, eventually, get
from tests.support.through_waypoint import WP, WP_ADDRESS, Between, Recorder, bound_pair, settled
from tests.support.waypoint_site import asked, bound_site, waypoint
from tests.waypoint.test_connection_limits import by_turns
from uproxy import linux, plane
from waypoint.engine_envoy.child import ADMIN, Child
from waypoint.engine_envoy.serving import EnvoyServing

GETS = Operation(methods=("GET",))
PING = b"*1\r\n$4\r\nPING\r\n"
NETWORK = "127.0.94"
OPERATORS = f"{NETWORK}.3"
TARGET = "targetRefs: [{group: '', kind: Service, name: db}]"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = bound_site(tmp_path, NETWORK)
    text = made.mesh.read_text()
    named = "metadata: {name: wp, namespace: shop, labels: {istio.io/waypoint-for: service}}"
    assert named in text
    made.mesh.write_text(text.replace(named, named[:-1] + ", annotations: {mesh.uproxy.dev/engine: envoy}}"))
    return made


@pytest.fixture
def running(site: Site) -> Iterator[Site]:
    with ExitStack() as stack:
        stack.enter_context(telling(site.application))
        stack.enter_context(site.running("db"))
        stack.enter_context(site.running("web"))
        process = stack.enter_context(waypoint(site, "--config", str(site.mesh), "--workload", "shop/wp-1"))
        yield site
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, site.log("wp")
        assert "Traceback" not in site.log("wp")
        assert not list((site.path / "wp").glob("envoy-*"))


def engine(site: Site) -> int:
    pid = json.loads(get(OPERATORS, 15000, "/config_dump")[1])["pid"]
    assert isinstance(pid, int), site.log("wp")
    return pid


def test_requests_metrics_logs_and_a_drain(running: Site) -> None:
    site = running
    response = asked("GET", site)
    assert response.status == 200
    told = json.loads(response.body)
    assert told["x-forwarded-client-cert"] == "URI=spiffe://cluster.local/ns/shop/sa/web"
    assert told["x-forwarded-for"] == f"{NETWORK}.1"
    denied = asked("DELETE", site)
    assert (denied.status, denied.body.strip()) == (403, b"RBAC: access denied")
    assert denied.headers["x-uproxy-reason"] == "policy"

    assert get(OPERATORS, 15021, "/healthz/ready") == (200, "ready\n")
    eventually(lambda: site.log("wp").count("request complete") == 2)
    metrics = get(OPERATORS, 15020, "/metrics")[1]
    counted = [line for line in metrics.splitlines() if line.startswith("istio_requests_total{")]
    assert sorted(line.rpartition(" ")[2] for line in counted) == ["1", "1"]
    assert all('reporter="waypoint"' in line and 'source_workload="web"' in line for line in counted)
    lines = [json.loads(line) for line in site.log("wp").splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["message"] == "request complete"]
    assert [(r["method"], r["path"], r["response_code"]) for r in requests] == [
        ("GET", "/path?query", 200),
        ("DELETE", "/path?query", 403),
    ]
    assert (requests[1]["policy"], requests[0]["upstream_host"]) == ("shop/no-delete[0]", f"{NETWORK}.2:7379")


def test_an_envoy_that_dies_is_replaced_and_nobody_passes_meanwhile(running: Site) -> None:
    site = running
    assert asked("GET", site).status == 200
    first = engine(site)
    os.kill(first, signal.SIGKILL)

    def refused_or_served_by_another() -> bool:
        try:
            status = asked("DELETE", site).status
        except (OSError, http.client.HTTPException):
            return False
        assert status in (403, 503), "what policy refuses is never answered by the application"
        return status == 403

    eventually(refused_or_served_by_another)
    assert engine(site) != first
    assert asked("GET", site).status == 200
    assert "uproxy_waypoint_engine_restarts_total 1" in get(OPERATORS, 15020, "/metrics")[1]


AWAY = f"""---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: db-away, namespace: shop}}
spec: {{address: {NETWORK}.9, serviceAccount: db, labels: {{app: db}}}}
---
apiVersion: mesh.uproxy.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: db, namespace: shop}}
spec:
  {TARGET}
  loadBalancing: {{simple: ROUND_ROBIN, warmup: {{duration: 1ms, aggression: 1.5}}}}
  outlierDetection: {{consecutive5xxErrors: 0, consecutiveGatewayErrors: 2, baseEjectionTime: 1h, minHealthPercent: 10}}
"""


def test_endpoints_in_turn_but_who_fails(running: Site) -> None:
    site = running
    assert asked("GET", site).status == 200
    site.mesh.write_text(site.mesh.read_text() + AWAY)
    failed: list[int] = []

    def ejected() -> bool:
        found = [asked("POST", site).status for _ in range(6)]  # a GET would be sent again
        failed.extend(status for status in found if status != 501)
        return bool(failed) and set(found) == {501}  # the application's answer

    eventually(ejected)
    assert set(failed) == {503}


def test_what_envoy_cannot_express_is_refused_and_said(running: Site) -> None:
    site = running
    assert asked("GET", site).status == 200
    site.mesh.write_text(
        site.mesh.read_text()
        + "---\napiVersion: mesh.uproxy.dev/v1alpha1\nkind: TrafficPolicy\n"
        + f"metadata: {{name: few, namespace: shop}}\nspec: {{{TARGET}, connectionLimits: {{maxConnections: 1}}}}\n"
    )
    eventually(lambda: asked("GET", site).status == 503)
    refused = asked("GET", site)
    assert refused.headers["x-uproxy-reason"] == "not-expressible"
    assert "TrafficPolicy shop/few: connectionLimits.maxConnections" in refused.body.decode()
    assert "TrafficPolicy shop/few: connectionLimits" in site.log("wp")


def test_a_waypoint_whose_gateway_wants_another_engine_says_so(running: Site) -> None:
    site = running
    site.mesh.write_text(site.mesh.read_text().replace("mesh.uproxy.dev/engine: envoy", "team: shop"))
    eventually(lambda: "built-in is wanted now" in get(OPERATORS, 15021, "/healthz/ready")[1])
    assert asked("GET", site).status == 200


@contextlib.asynccontextmanager
async def backwards() -> AsyncIterator[int]:
    """An application that answers a request with its certificate header, and what is none with its bytes backwards."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            said = await reader.read(4096)
            if said.startswith(b"GET "):
                fields = dict(line.partition(b": ")[::2] for line in said.split(b"\r\n"))
                said = fields[b"x-forwarded-client-cert"]
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(said), said))
                await reader.read()
            else:
                if said != PING:
                    said += await reader.read()  # to its end
                writer.write(said[::-1])
            writer.close()

    server = await asyncio.start_server(serve, DB_ADDRESS, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def exchanged(between: Between, said: bytes) -> bytes:
    """What comes back, mostly of one that has ended its side; empty when the connection is refused."""
    reader, writer = await between.open()
    try:
        writer.write(said)
        if said != PING:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(), 30)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def got(between: Between, fields: str = "", path: str = "/") -> tuple[bytes, bytes]:
    """Head and body."""
    reader, writer = await between.open()
    writer.write(f"GET {path} HTTP/1.1\r\nhost: db\r\n{fields}\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
    body = await reader.readexactly(length)
    writer.close()
    return head, body


async def asked_for_http(between: Between) -> bytes:
    head, body = await got(between)
    return head[9:12] + b" " + body.strip()


async def applied(between: Between, serving: EnvoyServing, *records: Record) -> None:
    between.pair.apply(*records)
    serving.take((), Changes())
    await serving.applied()


def denying(*rules: Rule) -> AuthorizationPolicy:
    return AuthorizationPolicy("shop", "deny", Action.DENY, None, rules, (Target("Service", "shop/db"),))


def test_opaque_tcp_crosses_under_policy_about_who_calls(identities: Path, authority: Authority) -> None:
    async def main() -> None:
        async with backwards() as port, running_envoy(identities, authority, port, "tcp") as (between, serving):
            assert await exchanged(between, b"hello" * 10_000) == b"olleh" * 10_000
            # Of HTTP nothing is known here: a DENY matches as if it did not ask for it.
            for rule in (Rule(sources=(Source(principals=(WEB.principal,)),)), Rule(operations=(GETS,))):
                await applied(between, serving, denying(rule))
                assert await exchanged(between, b"hello") == b""
            await applied(between, serving, denying(Rule(sources=(Source(principals=(DB.principal,)),))))
            assert await exchanged(between, b"hello") == b"olleh"
            nothing = Gateway("shop", "wp", Traffic.SERVICE, (Instance("shop/wp-1", WP_ADDRESS),), (), ())
            await applied(between, serving, nothing)
            assert await exchanged(between, b"hello") == b"", "what is not served here is refused"
        assert {one.caller for one in between.pair.db.telemetry.ended} == {str(WEB)}

    plane.run(main())


def test_who_calls_is_not_what_a_caller_says_of_itself(identities: Path, authority: Authority) -> None:
    def asked_by_hand(*more: tuple[str, str]) -> int:
        made = socket.create_connection((WP_ADDRESS, HBONE_PORT), source_address=(WEB_ADDRESS, 0))
        tunnel = HandTunnel(made, identities / "web", f"{VIP}:{SERVICE_PORT}", *more)
        try:
            tunnel.send("/")
            return tunnel.receive()[0]
        finally:
            tunnel.close()

    async def main() -> None:
        async with backwards() as port, running_envoy(identities, authority, port, "http") as (between, serving):
            await applied(between, serving, denying(Rule(sources=(Source(ip_blocks=(f"{WEB_ADDRESS}/32",)),))))
            for more in ((), (("x-forwarded-for", "127.0.77.9"),)):
                assert await asyncio.to_thread(asked_by_hand, *more) == 403, more

    plane.run(main())


def test_an_answer_that_breaks_off_is_none(tmp_path: Path) -> None:
    async def breaking_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel")
        writer.close()

    async def main() -> None:
        with linux.short_path(tmp_path, ADMIN) as path:
            server = await asyncio.start_unix_server(breaking_off, path)
        child = Child(tmp_path, 1, lambda _: None, lambda: None)
        with pytest.raises(ConnectionResetError):  # and nothing that ends the waypoint
            await child.ask("/stats")
        server.close()

    asyncio.run(main())


def test_a_port_that_does_not_say_what_it_speaks(identities: Path, authority: Authority) -> None:
    async def main() -> None:
        async with backwards() as port, running_envoy(identities, authority, port, "") as (between, serving):
            assert await asked_for_http(between) == b"200 URI=" + str(WEB).encode()
            assert await exchanged(between, PING) == PING[::-1]
            await applied(between, serving, denying(Rule(operations=(GETS,))))
            assert (await asked_for_http(between))[:3] == b"403"
            assert await exchanged(between, PING) == b"", "what policy asks of HTTP is not known of it"

    plane.run(main())


def test_a_connection_carries_so_many_requests_and_no_more(identities: Path, authority: Authority) -> None:
    """As test_connection_limits.py has it of the built-in engine."""
    gate, seen = asyncio.Event(), list[int]()
    gate.set()

    async def main() -> None:
        server = await asyncio.start_server(partial(by_turns, gate, seen), DB_ADDRESS, 0)
        port = server.sockets[0].getsockname()[1]
        async with running_envoy(identities, authority, port, "http") as (between, envoy):
            limits = ConnectionLimits(requests_each=2)
            few = TrafficPolicy("shop", "few", (Target("Service", "shop/db"),), connection_limits=limits)
            await applied(between, envoy, few)
            reader, writer = await between.open()
            for opened in (1, 1, 2, 2, 3):
                writer.write(b"GET / HTTP/1.1\r\nhost: db\r\n\r\n")
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                assert len(seen) == opened
            writer.close()
        server.close()

    plane.run(main())


@contextlib.asynccontextmanager
async def numbered(count: int, broken: set[int]) -> AsyncIterator[tuple[Endpoint, ...]]:
    """Applications of `shop/db`, each of which answers with its number; those in `broken` close instead."""

    async def serve(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while await reader.readuntil(b"\r\n\r\n"):
                if number in broken:
                    break
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n%d" % number)
        writer.close()

    servers = [await asyncio.start_server(partial(serve, number), DB_ADDRESS, 0) for number in range(count)]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    try:
        yield tuple(
            Endpoint("shop/db", f"shop/db-{number}", DB_ADDRESS, DB, {SERVICE_PORT: port}, 1, True, {})
            for number, port in enumerate(ports)
        )
    finally:
        for server in servers:
            server.close()


def hashed(of: HashOf, name: str = "", ttl_ms: int | None = None, path: str = "") -> TrafficPolicy:
    said = LoadBalancing(hash=ConsistentHash(of, name, ttl_ms, path))
    return TrafficPolicy("shop", "t", (Target("Service", "shop/db"),), load_balancing=said)


def test_alike_requests_go_to_one_endpoint_and_elsewhere_when_it_fails(identities: Path, authority: Authority) -> None:
    """As test_balanced.py has it of the built-in engine."""

    async def main() -> None:
        broken: set[int] = set()
        async with (
            numbered(3, broken) as endpoints,
            running_envoy(identities, authority, 1, "http") as (between, envoy),
        ):
            (given,) = between.pair.state.endpoints("shop/db")
            between.pair.withdraw(given)

            async def went(count: int, fields: str = "", path: str = "/") -> set[bytes]:
                return {(await got(between, fields, path))[1] for _ in range(count)}

            await applied(between, envoy, hashed(HashOf.HEADER, "x-user"), *endpoints)
            for user in range(4):
                assert len(await went(5, f"X-User: {user}\r\n")) == 1
            assert {next(iter(await went(1, f"x-user: u{user}\r\n"))) for user in range(30)} == {b"0", b"1", b"2"}
            assert len(await went(30)) == 3, "without the header"
            (first,) = await went(1, "x-user: ann\r\n")
            broken.add(int(first))
            (second,) = await went(5, "x-user: ann\r\n")
            assert second != first, "sent again to another one"
            broken.clear()
            assert await went(5, "x-user: ann\r\n") == {first}

            await applied(between, envoy, hashed(HashOf.PARAMETER, "user"))
            for user in range(4):
                assert len(await went(5, path=f"/a?x=1&user={user}")) == 1
            assert len(await went(30, path="/a?x=1")) == 3
            for of in (HashOf.ADDRESS, HashOf.IDENTITY):
                await applied(between, envoy, hashed(of))
                assert len(await went(12)) == 1, "all are of one caller"

            await applied(between, envoy, hashed(HashOf.COOKIE, "Id", 90_000, "/a"))
            head, first = await got(between)
            (cookie,) = re.findall('set-cookie: (Id="?[0-9a-f]+"?); Max-Age=90; Path=/a; HttpOnly\r\n', head.decode())
            head, second = await got(between, f"cookie: other=1; {cookie}\r\n")
            assert (second, b"set-cookie" in head) == (first, False)
            await applied(between, envoy, hashed(HashOf.COOKIE, "Id"))
            assert b"set-cookie" not in (await got(between))[0]
            users = [await went(3, f"cookie: Id={user}\r\n") for user in range(20)]
            assert {len(one) for one in users} == {1}
            assert len(set.union(*users)) == 3

    plane.run(main())


def test_those_of_the_waypoint_s_zone_come_first(identities: Path, authority: Authority) -> None:
    async def main() -> None:
        async with numbered(4, set()) as endpoints, running_envoy(identities, authority, 1, "http") as (between, envoy):
            (given,) = between.pair.state.endpoints("shop/db")
            own = between.pair.state.workload("shop/wp-1")
            assert own is not None
            between.pair.withdraw(given)
            places = ("us/1", "eu/1/rack", "eu/2", "asia/1")
            placed = [replace(one, locality=place) for one, place in zip(endpoints, places, strict=True)]
            local = LoadBalancing(Algorithm.RANDOM, local=True, failover=(Failover("eu", "us"),))
            said = TrafficPolicy("shop", "t", (Target("Service", "shop/db"),), load_balancing=local)

            async def went() -> set[bytes]:
                return {(await got(between))[1] for _ in range(20)}

            await applied(between, envoy, said, replace(own, locality="eu/1"), *placed)
            for number in (1, 2, 0, 3):
                assert await went() == {b"%d" % number}
                between.pair.withdraw(placed[number])
                await applied(between, envoy)

    plane.run(main())


def test_a_service_may_say_so_itself(identities: Path, authority: Authority) -> None:
    """As test_balanced.py has it of the built-in engine."""

    async def main() -> None:
        async with numbered(3, set()) as endpoints, running_envoy(identities, authority, 1, "http") as (between, envoy):
            (given,) = between.pair.state.endpoints("shop/db")
            (service,) = between.pair.state.services()
            own = between.pair.state.workload("shop/wp-1")
            assert own is not None
            between.pair.withdraw(given)
            placed = [replace(one, locality=at) for one, at in zip(endpoints, ("", "eu/1/b", "eu/1"), strict=True)]
            prefers = replace(service, prefers_zone=True)

            async def went() -> set[bytes]:
                return {(await got(between))[1] for _ in range(20)}

            await applied(between, envoy, prefers, replace(own, locality="eu/1/a"), *placed)
            assert await went() == {b"1", b"2"}, "all of a zone are alike"
            said = LoadBalancing(Algorithm.LEAST_REQUEST)
            await applied(
                between,
                envoy,
                TrafficPolicy("shop", "t", (Target("Service", "shop/db"),), load_balancing=said),
                replace(own, locality="eu/1/b"),
            )
            assert await went() == {b"1"}
            await applied(between, envoy, replace(own, locality=""))
            assert await went() == {b"0", b"1", b"2"}

    plane.run(main())


def test_policies_in_dry_run_are_told_and_counted_and_not_done(identities: Path, authority: Authority) -> None:
    """As test_gateway.py has it of the built-in engine."""
    telemetry = Recorder()
    no_gets = replace(denying(Rule(operations=(GETS,))), dry_run=True)
    only_gets = AuthorizationPolicy("shop", "allow", Action.ALLOW, None, (Rule(operations=(GETS,)),), no_gets.targets)

    async def main() -> None:
        async with numbered(1, set()) as endpoints, bound_pair(identities, authority, 1, "http") as pair:
            (given,) = pair.state.endpoints("shop/db")
            pair.withdraw(given)
            pair.apply(*endpoints)
            between = Between(pair)
            async with envoy_serving(pair, issued(authority, identities / "wp", WP), telemetry) as envoy:
                for policies, method, status in (
                    ((), b"GET", b"200"),
                    ((no_gets,), b"GET", b"200"),
                    ((no_gets,), b"PUT", b"200"),
                    ((replace(no_gets, dry_run=False), replace(only_gets, dry_run=True)), b"GET", b"403"),
                    ((replace(no_gets, rules=()),), b"PUT", b"200"),
                ):
                    await applied(between, envoy, *policies)
                    reader, writer = await between.open()
                    writer.write(method + b" / HTTP/1.1\r\nhost: db\r\n\r\n")
                    assert (await reader.readuntil(b"\r\n\r\n"))[9:12] == status
                    writer.close()
                while len(telemetry.exchanges) < 5:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await settled(between)

    plane.run(main())
    told = ["", "denied: denied by shop/deny[0]", "", "", "denied: no ALLOW policy matched"]
    assert [one.dry_run for one in telemetry.exchanges] == told
    metrics = telemetry.render().decode()
    assert "uproxy_dry_run_allowed_total 1\n" in metrics
    assert "uproxy_dry_run_denied_total 3\n" in metrics


def test_connections_of_one_caller_go_to_one_endpoint(identities: Path, authority: Authority) -> None:
    async def main() -> None:
        async with numbered(3, set()) as endpoints, running_envoy(identities, authority, 1, "tcp") as (between, envoy):
            (given,) = between.pair.state.endpoints("shop/db")
            between.pair.withdraw(given)

            async def went() -> set[bytes]:
                return {(await exchanged(between, b"hello\r\n\r\n"))[-1:] for _ in range(40)}

            for of, name, count in ((HashOf.ADDRESS, "", 1), (HashOf.IDENTITY, "", 1), (HashOf.HEADER, "x-user", 3)):
                await applied(between, envoy, hashed(of, name), *endpoints)
                assert len(await went()) == count, of

    plane.run(main())
