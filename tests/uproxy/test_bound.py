"""What is bound to a waypoint: how callers reach it, and whom the destination believes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from control.api.gateway import Binding, Bound, Via
from control.api.policy import Action, AuthorizationPolicy, Rule, Source
from control.api.workload import Service, Workload
from control.server.ca import Authority
from tests.support.certificates import DB, WEB
from tests.support.pair import DB_ADDRESS, SERVICE_PORT, VIP, WEB_ADDRESS, Pair, running_pair, workload
from tests.support.passing_waypoint import GATEWAY, WAYPOINT, PassingWaypoint, exchange, running_waypoint
from uproxy import outbound, plane
from uproxy.errors import Flag, RefusedError
from uproxy.redirect import Route
from uproxy.resolve import Hop

THROUGH = Binding("shop/wp", Via.WAYPOINT)
Scenario = Callable[[Pair, PassingWaypoint], Awaitable[None]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ca") / "ca", "cluster.local")


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("identities")


@pytest.fixture
def run(authority: Authority, identities: Path) -> Callable[[Scenario], None]:
    """Runs a scenario with an application that echoes, and a waypoint that passes on."""

    def runs(scenario: Scenario) -> None:
        async def main() -> None:
            app = await asyncio.start_server(echo, DB_ADDRESS, 0)
            port = app.sockets[0].getsockname()[1]
            try:
                async with running_pair(identities, authority, port) as pair, asyncio.timeout(90):
                    with running_waypoint(pair, identities, authority) as waypoint:
                        await scenario(pair, waypoint)
                        await eventually(lambda: not pair.plane.tasks, "a connection's coroutine is left")
            finally:
                app.close()

        plane.run(main())

    return runs


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def eventually(holds: Callable[[], object], otherwise: str) -> None:
    for _ in range(400):
        if holds():
            return
        await asyncio.sleep(0.01)
    pytest.fail(otherwise)


def service(pair: Pair, binding: Binding | None) -> Service:
    known = pair.state.service("shop/db")
    assert known is not None
    return dataclasses.replace(known, binding=binding)


def bounded(pair: Pair, *, enforced: bool, guarded: bool = False) -> Workload:
    db: Workload = workload("db", DB_ADDRESS, DB)
    return dataclasses.replace(db, bounds=(Bound(pair.app_port, ("shop/wp",), (), enforced, guarded),))


def bind(pair: Pair, *, enforced: bool = True, via: Via = Via.WAYPOINT) -> None:
    pair.apply(GATEWAY, service(pair, Binding("shop/wp", via)), bounded(pair, enforced=enforced))


def allow(*identities: object) -> AuthorizationPolicy:
    principals = tuple(identity.principal for identity in identities)  # type: ignore[attr-defined]
    return AuthorizationPolicy("shop", "a", Action.ALLOW, None, (Rule((Source(principals=principals),)),))


def test_a_bound_service_is_reached_through_its_waypoint_and_judged_by_its_caller(run) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        bind(pair)
        pair.apply(allow(WEB))
        assert await exchange(pair.dial()) == b"hello"
        assert waypoint.asked == [(WEB, f"{VIP}:{SERVICE_PORT}")]
        await eventually(lambda: pair.db.telemetry.ended and pair.web.telemetry.ended, "no record")
        (sent,), (got,) = pair.web.telemetry.ended, pair.db.telemetry.ended
        assert (sent.destination.identity, sent.destination_service) == (str(WAYPOINT), "shop/db")
        assert (got.source.identity, got.caller, got.flag) == (str(WAYPOINT), str(WEB), Flag.NONE)
        pair.apply(allow(WAYPOINT))
        assert await exchange(pair.dial()) == b"", "an ALLOW is judged on the caller"

    run(scenario)


def test_a_workload_address_keeps_its_own_authority(run) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        bind(pair)
        pair.bind_address(DB_ADDRESS, (pair.app_port, THROUGH))
        assert await exchange(pair.dial(DB_ADDRESS, pair.app_port)) == b"hello"
        assert waypoint.asked == [(WEB, f"{DB_ADDRESS}:{pair.app_port}")]

    run(scenario)


def test_a_straggler_is_told_and_goes_through_the_waypoint_before_any_byte_was_sent(run) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        pair.apply(bounded(pair, enforced=True))
        app = pair.dial()
        answer = asyncio.get_running_loop().create_task(exchange(app))
        await eventually(lambda: pair.db.telemetry.ended, "db refused nobody")
        (refused,) = pair.db.telemetry.ended
        assert (refused.flag, refused.policy) == (Flag.WAYPOINT, "")
        assert refused.error.startswith("waypoint-required: ")
        bind(pair)
        assert await answer == b"hello"
        assert len(waypoint.asked) == 1
        await eventually(lambda: pair.web.telemetry.ended, "no record")
        (sent,) = pair.web.telemetry.ended
        assert (sent.flag, sent.error) == (Flag.NONE, "")

    run(scenario)


def test_a_straggler_that_is_never_told_more_is_refused_by_that_name(run, monkeypatch) -> None:
    monkeypatch.setattr(outbound, "BINDING_PATIENCE_S", 0.2)

    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        pair.apply(bounded(pair, enforced=True))
        assert await exchange(pair.dial()) == b""
        await eventually(lambda: pair.web.telemetry.ended, "no record")
        (sent,) = pair.web.telemetry.ended
        assert (sent.flag, sent.policy) == (Flag.WAYPOINT, "")
        assert sent.error.startswith("waypoint-required: ")
        assert not waypoint.asked
        assert len(pair.db.telemetry.ended) == 1, "it asked again"

    run(scenario)


def test_an_endpoint_that_another_service_binds_is_reached_by_its_own_address(run) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        pair.apply(GATEWAY, bounded(pair, enforced=True))
        pair.bind_address(DB_ADDRESS, (0, THROUGH))
        assert await exchange(pair.dial()) == b"hello"
        assert waypoint.asked == [(WEB, f"{DB_ADDRESS}:{pair.app_port}")]

    run(scenario)


def test_the_kernel_says_waypoint_first(run) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        app = pair.dial(route=Route.WAYPOINT)
        answer = asyncio.get_running_loop().create_task(exchange(app))
        await asyncio.sleep(0.1)
        assert not pair.db.inbound.server.tunnels(), "it went directly"
        bind(pair, enforced=False)
        assert await answer == b"hello"
        assert len(waypoint.asked) == 1

    run(scenario)


def test_the_kernel_says_waypoint_and_the_configuration_never_does(run, monkeypatch) -> None:
    monkeypatch.setattr(outbound, "BINDING_PATIENCE_S", 0.2)

    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        assert await exchange(pair.dial(route=Route.WAYPOINT)) == b""
        (sent,) = pair.web.telemetry.ended
        assert (sent.flag, sent.error.partition(":")[0]) == (Flag.NO_CONFIG, "no-config")
        assert not pair.db.inbound.server.tunnels(), "it went directly"

    run(scenario)


def test_the_kernel_still_says_waypoint_when_the_binding_was_seen_to_go(run) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        bind(pair, enforced=False)
        pair.apply(service(pair, None))
        assert await exchange(pair.dial(route=Route.WAYPOINT)) == b"hello"
        assert not waypoint.asked

    run(scenario)


def test_the_configuration_says_waypoint_before_the_kernel_does(run) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        bind(pair, enforced=False)
        assert await exchange(pair.dial(route=Route.TUNNEL)) == b"hello"
        assert len(waypoint.asked) == 1

    run(scenario)


@pytest.mark.parametrize(
    ("via", "gateway", "reason"),
    [
        (Via.REFUSE, GATEWAY, "waypoint-not-ready"),
        (Via.WAYPOINT, dataclasses.replace(GATEWAY, instances=()), "no-waypoint"),
        (Via.WAYPOINT, dataclasses.replace(GATEWAY, name="other"), "no-waypoint"),
    ],
)
def test_a_waypoint_that_cannot_be_used_is_a_refusal(run, via, gateway, reason) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        pair.apply(gateway, service(pair, Binding("shop/wp", via)))
        assert await exchange(pair.dial()) == b""
        (sent,) = pair.web.telemetry.ended
        assert (sent.flag, sent.error.partition(":")[0]) == (Flag.CONNECT, reason)
        assert not pair.db.inbound.server.tunnels(), "it went directly"

    run(scenario)


@pytest.mark.parametrize(("via", "wanted"), [(Via.WAYPOINT, b""), (Via.PREFERRED, b"hello")])
def test_a_waypoint_that_is_gone_is_missed_unless_it_was_only_preferred(run, via, wanted) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        nowhere = dataclasses.replace(GATEWAY.instances[0], address=WEB_ADDRESS)
        pair.apply(dataclasses.replace(GATEWAY, instances=(nowhere,)), service(pair, Binding("shop/wp", via)))
        assert await exchange(pair.dial()) == wanted
        assert not waypoint.asked

    run(scenario)


def test_a_preferred_waypoint_is_used_while_it_answers(run) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        bind(pair, enforced=False, via=Via.PREFERRED)
        assert await exchange(pair.dial()) == b"hello"
        assert len(waypoint.asked) == 1

    run(scenario)


def test_somebody_else_at_the_waypoints_address_gets_nothing(run) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        elsewhere = dataclasses.replace(GATEWAY.instances[0], address=DB_ADDRESS)
        pair.apply(dataclasses.replace(GATEWAY, instances=(elsewhere,)), service(pair, THROUGH))
        assert await exchange(pair.dial()) == b""
        (sent,) = pair.web.telemetry.ended
        assert sent.flag is Flag.IDENTITY

    run(scenario)


def test_a_waypoint_names_one_caller_or_none(run) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        bind(pair)
        pair.apply(allow(WEB))
        named = f"{WEB};{WEB_ADDRESS}:1".encode()
        outcomes: dict[str, int] = {}

        async def ask(what: str, *callers: bytes) -> None:
            try:
                (await waypoint.ask(*callers)).abandon()
                outcomes[what] = 200
            except RefusedError as error:
                outcomes[what] = error.status

        for what, callers in (
            ("named", (named,)),
            ("nobody", ()),
            ("twice", (named, named)),
            ("malformed", (b"web",)),
            ("another", (f"{DB};{WEB_ADDRESS}:1".encode(),)),
        ):
            pair.plane.spawn(ask(what, *callers))
        await eventually(lambda: len(outcomes) == 5, "no answer")
        assert outcomes == {"named": 200, "nobody": 401, "twice": 400, "malformed": 400, "another": 401}

    run(scenario)


def test_a_port_that_is_not_bound_hears_nobody_speak_for_another(run) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        pair.apply(allow(WEB))
        refused: list[RefusedError] = []

        async def ask() -> None:
            try:
                await waypoint.ask(f"{WEB};{WEB_ADDRESS}:1".encode())
            except RefusedError as error:
                refused.append(error)

        pair.plane.spawn(ask())
        await eventually(lambda: refused, "it was believed")
        assert (refused[0].reason, refused[0].status) == ("policy", 401)
        await eventually(lambda: pair.db.telemetry.ended, "no record")
        assert pair.db.telemetry.ended[0].caller == ""

    run(scenario)


def test_what_was_open_before_the_flip_stays_until_policy_says_otherwise(run) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        loop = asyncio.get_running_loop()
        app = pair.dial()
        await loop.sock_sendall(app, b"before")
        assert await loop.sock_recv(app, 6) == b"before"
        bind(pair)
        await loop.sock_sendall(app, b"after")
        assert await loop.sock_recv(app, 5) == b"after"
        through = pair.dial()
        await loop.sock_sendall(through, b"through")
        assert await loop.sock_recv(through, 7) == b"through"
        pair.apply(service(pair, None), workload("db", DB_ADDRESS, DB))
        await loop.sock_sendall(through, b"still")
        assert await loop.sock_recv(through, 5) == b"still", "the binding went, what came through it stays"
        pair.apply(allow(DB))
        for sock in (app, through):
            assert await exchange(sock) == b"", "a policy cuts at once"

    run(scenario)


def test_what_was_open_before_the_flip_ends_in_a_quiet_moment_when_a_policy_is_missed_on_it(run) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        loop = asyncio.get_running_loop()
        quiet, busy = pair.dial(), pair.dial()
        bound = GATEWAY, service(pair, THROUGH)
        for app in (quiet, busy):
            await loop.sock_sendall(app, b"before")
            assert await loop.sock_recv(app, 6) == b"before"
        pair.apply(*bound, bounded(pair, enforced=True))
        through = pair.dial()
        await loop.sock_sendall(through, b"through")
        assert await loop.sock_recv(through, 7) == b"through"
        pair.apply(bounded(pair, enforced=True, guarded=True))
        for _ in range(40):
            await loop.sock_sendall(busy, b"more")
            assert await loop.sock_recv(busy, 4) == b"more", "it was never quiet"
            await asyncio.sleep(0.05)
        assert await exchange(quiet) == b""
        assert await exchange(through) == b"hello", "it came through the waypoint"
        ended = [record for record in pair.db.telemetry.ended if record.flag is not Flag.NONE]
        assert [(record.flag, record.error.partition(":")[0]) for record in ended] == [
            (Flag.WAYPOINT, "waypoint-required")
        ]
        busy.close()

    run(scenario)


def test_the_kernel_speaks_of_all_ports_of_a_workload(run) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        pair.bind_address(DB_ADDRESS, (1, THROUGH))
        assert await exchange(pair.dial(DB_ADDRESS, pair.app_port, Route.WAYPOINT)) == b"hello"
        assert not waypoint.asked, "another port is bound"

    run(scenario)


def test_streams_of_different_owners_never_share_a_tunnel(run) -> None:
    async def scenario(pair: Pair, waypoint: PassingWaypoint) -> None:
        opened = []

        async def ask(owner: object) -> None:
            authority = f"{DB_ADDRESS}:{pair.app_port}".encode()
            request = ((b":method", b"CONNECT"), (b":authority", authority))
            opened.append(await waypoint.pool.connect(Hop(DB_ADDRESS, DB, authority, None), request, owner))

        for owner in (WEB, DB, WEB, None, DB):
            pair.plane.spawn(ask(owner))
        await eventually(lambda: len(opened) == 5, "no answer")
        assert len(waypoint.pool.tunnels()) == len(pair.db.inbound.server.tunnels()) == 3
        for relay in opened:
            relay.abandon()

    run(scenario)
