"""A waypoint whose engine is a real Envoy, before the uProxies of `pair`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from control.server.ca import Authority
from tests.support.pair import Pair, issued
from tests.support.through_waypoint import WP, WP_ADDRESS, Between, Recorder, bound_pair, settled
from uproxy.config import Who
from uproxy.credentials import CurrentCredentials
from uproxy.listener import Inherited
from waypoint.engine_envoy.serving import EnvoyServing
from waypoint.telemetry import WaypointTelemetry


class _EndedError(Exception):
    """Ends the task group."""


@contextlib.asynccontextmanager
async def running_envoy(
    directory: Path, authority: Authority, app_port: int, protocol: str
) -> AsyncIterator[tuple[Between, EnvoyServing]]:
    """As `running_waypoint`."""
    async with bound_pair(directory, authority, app_port, protocol) as pair:
        async with envoy_serving(pair, issued(authority, directory / "wp", WP), Recorder()) as serving:
            yield Between(pair), serving
        await settled(Between(pair))


@contextlib.asynccontextmanager
async def envoy_serving(pair: Pair, identity: Path, telemetry: WaypointTelemetry) -> AsyncIterator[EnvoyServing]:
    """From ready to its end, by what the state of the pair says, and the files of its identity."""
    credentials = CurrentCredentials(identity, WP)
    serving = EnvoyServing(
        pair.plane,
        Who("wp-1", WP, (WP_ADDRESS,)),
        "shop/wp",
        pair.state,
        credentials,
        telemetry,
        access_log=None,
        directory=None,
        on_change=lambda: None,
        identity_dir=identity,
        threads=1,
    )
    try:
        async with asyncio.TaskGroup() as group:
            await serving.start(group, Inherited())
            group.create_task(credentials.watch(serving.renewed))
            yield serving
            await serving.drain(1.0, 0.1)
            raise _EndedError
    except* _EndedError:
        pass
    finally:
        serving.close()
