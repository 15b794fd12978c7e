"""`uproxy.beside`: what a stream gets that must go through a process which is not there."""

from __future__ import annotations

import asyncio

import pytest

from control.api.gateway import Sidecar
from uproxy import beside, plane
from uproxy.beside import Beside
from uproxy.errors import RefusedError
from uproxy.plane import Plane
from uproxy.telemetry import Telemetry


def _cannot(gateway, on_batch, on_progress):
    raise ValueError(f"{gateway} is not of this namespace")


@pytest.mark.parametrize("follows", [False, True], ids=["none is wanted", "none can be started"])
def test_what_must_go_through_it_is_refused_and_never_passed_on(monkeypatch, follows):
    monkeypatch.setattr(beside, "PATIENCE_S", 0.05)
    found = []

    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        one = Beside(data_plane, Telemetry("1"), {}, lambda: None, _cannot)
        if follows:
            one.follow(Sidecar("far/wp", (80,)))
        over = asyncio.Event()

        async def stream() -> None:
            found.append(await one.ready(wait=False))
            try:
                found.append(await one.ready(wait=True))
            except RefusedError as error:
                found.append(error.reason)
            try:
                found.append(one.connect(b"header"))
            except RefusedError as error:
                found.append(error.reason)
            over.set()

        data_plane.spawn(stream())
        async with asyncio.timeout(10):
            await over.wait()
        one.close()
        data_plane.close()

    plane.run(main())
    assert found == [False, "waypoint-unavailable", "waypoint-unavailable"]
