"""What an Envoy does not take: what was before stays in force, and the waypoint says so."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from control.api.address import HBONE_PORT
from control.api.policy import Rule
from control.client.state import Changes
from control.server.ca import Authority
from tests.support.envoy_waypoint import running_envoy
from tests.support.pair import DB_ADDRESS, SERVICE_PORT, VIP, issued
from tests.support.through_waypoint import WP, WP_ADDRESS, Between
from tests.waypoint.test_engine_envoy import GETS, applied, denying, got
from tests.waypoint.test_engine_envoy_ends import ANN, hello, revoke
from uproxy import plane
from uproxy.config import Who
from waypoint.engine_envoy.files import Files
from waypoint.engine_envoy.parts import Json, extension, message
from waypoint.engine_envoy.rendering import Layout, Renderer, Rendering
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


@pytest.mark.parametrize("kind", ["revoked", "own"])
def test_of_secrets_that_are_not_taken_a_certificate_stays_and_who_is_revoked_is_waited_for(
    identities: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Nobody is served who may be revoked."""
    wrong = {
        "revoked": extension("revoked", "extensions.filters.http.router.v3.Router"),
        "own": {
            **message("extensions.transport_sockets.tls.v3.Secret", name="own"),
            "tls_certificate": {half: {"inline_string": "none"} for half in ("certificate_chain", "private_key")},
        },
    }[kind]
    if kind == "revoked":
        wrong = message("config.core.v3.TypedExtensionConfig", **wrong)
    replaced = Files._replace

    async def main() -> None:
        async with serving(identities, authority) as (between, envoy):
            assert await status(between) == 200
            with monkeypatch.context() as mistake:
                mistake.setattr(
                    Files,
                    "_replace",
                    lambda its, of, name, right: replaced(its, of, name, [wrong] if of == kind else right),
                )
                envoy.renewed()
                while not envoy.problems():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                named = {"revoked": "whose certificates are revoked", "own": "its certificate"}[kind]
                assert envoy.problems()[0].startswith(f"Envoy does not take {named}: ")
                between.pair.apply(NO_GETS)
                envoy.take((), Changes())
                if kind == "own":
                    await applied(between, envoy)
                    assert (await status(between), bool(envoy.problems())) == (403, True)
                else:
                    while envoy._child.lives < 2:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                    with pytest.raises(ConnectionRefusedError):
                        socket.create_connection((WP_ADDRESS, HBONE_PORT)).close()
                    assert envoy.waiting()
            envoy.renewed()
            while envoy.problems():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await applied(between, envoy)
            assert await status(between) == 403

    plane.run(main())


def test_a_revocation_that_comes_while_a_change_is_brought_comes_with_it(
    identities: Path, authority: Authority
) -> None:
    """And the Envoy that is a little late is not killed."""

    async def main() -> None:
        issued(authority, identities / "ann", ANN)
        async with serving(identities, authority) as (between, envoy):
            assert await status(between) == 200
            pid, before = envoy._child.pid, envoy._renderings
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            try:
                between.pair.apply(NO_GETS)
                envoy.take((), Changes())
                while envoy._renderings == before:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                revoke(authority, identities, "ann")
                while not envoy._revocation:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            finally:
                os.kill(pid, signal.SIGCONT)
            await applied(between, envoy)
            assert await status(between) == 403
            assert envoy._child.lives == 1

    plane.run(main())


def test_what_was_rendered_before_a_revocation_believes_the_same_as_what_comes_after(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "envoy-1", Who("wp-1", WP, (WP_ADDRESS,)), WP.trust_domain)
    files = Files(layout)
    files.clear()
    for revocation, roots in enumerate((b"one", b"two")):
        files.write_secrets(b"", roots, b"", (), revocation)
    read = [Path(layout.file("roots", str(one))).read_text() for one in range(2)]
    assert read[0] == read[1]
    assert "two" in read[0]
