"""`uproxy.beside`: what a stream gets that must go through a process which is not there."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from control.api.gateway import Gateway, Sidecar, Traffic
from tests.support.certificates import DB
from tests.support.pair import published, workload
from tests.support.waiting import until
from uproxy import beside, plane, workers
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
        async with asyncio.timeout(30):
            await over.wait()
        one.close()
        data_plane.close()

    plane.run(main())
    assert found == [False, "waypoint-unavailable", "waypoint-unavailable"]


def test_one_that_hangs_and_owes_nothing_is_killed_and_replaced(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "BEAT_S", 0.1)
    settings = {
        "workload": "shop/db",
        "identity": str(DB),
        "addresses": ["127.0.0.1"],
        "closed": str(tmp_path),
        "access_log": "off",
        "log_json": False,
        "otlp": (),
    }

    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        one = Beside(data_plane, Telemetry("1"), settings, lambda: None, None)
        gateway = Gateway("shop", "wp", Traffic.SERVICE, (), (), ())
        one.take([published(record, 1) for record in (gateway, workload("db", "127.0.0.1", DB))])

        def pid() -> int | None:
            told = one.dump()
            return None if told is None else told["workers"][0]["pid"]

        async with asyncio.TaskGroup() as group:
            one.begin(group)
            one.follow(Sidecar("shop/wp", (80,)))
            await until(lambda: not one.missing())
            hung = pid()
            assert hung is not None
            await asyncio.sleep(3 * workers._WATCH_S)  # it is asked, and answers
            assert pid() == hung
            monkeypatch.setattr(workers, "APPLY_TIMEOUT_S", 1.0)
            os.kill(hung, signal.SIGSTOP)
            await until(lambda: not Path(f"/proc/{hung}").exists())
            monkeypatch.undo()
            await until(lambda: not one.missing() and pid() not in (None, hung))
            one.close()
        data_plane.close()

    plane.run(main())
