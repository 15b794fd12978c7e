"""What an Envoy does not take: what was before stays in force, and the waypoint says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from control.api.policy import Rule
from control.client.state import Changes
from control.server.ca import Authority
from tests.support.envoy_waypoint import running_envoy
from tests.support.pair import DB_ADDRESS, SERVICE_PORT, VIP
from tests.support.through_waypoint import Between
from tests.waypoint.test_engine_envoy import GETS, applied, denying, got
from tests.waypoint.test_engine_envoy_ends import hello
from uproxy import plane
from waypoint.engine_envoy.parts import Json, extension
from waypoint.engine_envoy.rendering import Renderer, Rendering
from waypoint.engine_envoy.serving import EnvoyServing

NO_GETS = denying(Rule(operations=(GETS,)))
PLACE = f"{VIP}:{SERVICE_PORT}"
_TCP = extension("tcp", "extensions.filters.network.tcp_proxy.v3.TcpProxy", stat_prefix="to nobody")
WRONG: dict[str, Json] = {
    "listeners": {"name": "wrong", "internal_listener": {}, "filter_chains": [{"filters": [_TCP]}]},
    "clusters": {"name": "wrong", "type": "STATIC", "lb_policy": "CLUSTER_PROVIDED"},
}


@pytest.fixture
def mistaken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Rendering], Rendering]], None]:
    """Takes a mistake that renderings are to have from now on."""
    rendered = Renderer.render
    mistake: list[Callable[[Rendering], Rendering]] = [lambda right: right]
    monkeypatch.setattr(Renderer, "render", lambda *its: mistake[-1](rendered(*its)))
    return mistake.append


@contextlib.asynccontextmanager
async def serving(identities: Path, authority: Authority) -> AsyncIterator[tuple[Between, EnvoyServing]]:
    server = await asyncio.start_server(hello, DB_ADDRESS, 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with running_envoy(identities, authority, port, "http") as both, asyncio.timeout(60):
            yield both
    finally:
        server.close()


async def status(between: Between) -> int:
    return int((await got(between))[0].split(b" ")[1])


@pytest.mark.parametrize("kind", ["listeners", "clusters"])
def test_what_is_not_taken_leaves_what_was_before(
    identities: Path, authority: Authority, mistaken: Callable[[Callable[[Rendering], Rendering]], None], kind: str
) -> None:
    def wrong(right: Rendering) -> Rendering:
        its = {"listeners": right.listeners, "clusters": right.clusters}[kind]
        more = {**its, "wrong": WRONG[kind]}
        return replace(right, listeners=more) if kind == "listeners" else replace(right, clusters=more)

    async def main() -> None:
        async with serving(identities, authority) as (between, envoy):
            assert await status(between) == 200
            mistaken(wrong)
            between.pair.apply(NO_GETS)
            envoy.take((), Changes())
            while not envoy.problems():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            named = "wrong: " if kind == "listeners" else ""
            assert envoy.problems()[0].startswith(f"Envoy does not take its {kind}: {named}")
            assert envoy.dump()["problem"] == envoy.problems()[0]
            assert await status(between) == 200, "of a change all holds or nothing"
            assert not envoy.waiting(), "it serves"
            mistaken(lambda right: right)
            await applied(between, envoy)
            assert not envoy.problems()
            assert await status(between) == 403

    plane.run(main())


def test_a_place_whose_routes_are_not_taken_refuses_everybody(
    identities: Path, authority: Authority, mistaken: Callable[[Callable[[Rendering], Rendering]], None]
) -> None:
    def wrong(right: Rendering) -> Rendering:
        hosts = [{"name": "no domains"}]
        return replace(right, routes={**right.routes, PLACE: {**right.routes[PLACE], "virtual_hosts": hosts}})

    async def main() -> None:
        mistaken(wrong)
        async with serving(identities, authority) as (between, envoy):
            assert await status(between) == 503, "from the start"
            assert envoy.dump()["rejected"] == [PLACE]
            mistaken(lambda right: right)
            await applied(between, envoy, denying())
            assert await status(between) == 200
            mistaken(wrong)
            await applied(between, envoy, NO_GETS)
            assert await status(between) == 503

    plane.run(main())
