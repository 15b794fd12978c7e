"""`uproxy.beside`: what a stream gets that must go through a process which is not there."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from control.api.gateway import Gateway, Sidecar, Traffic
from control.api.status import Knowledge
from tests.support.certificates import DB
from tests.support.pair import published, workload
from tests.support.waiting import until
from uproxy import beside, plane, workers
from uproxy.beside import Beside
from uproxy.errors import RefusedError
from uproxy.plane import Plane
from uproxy.telemetry import Telemetry


def settings(directory: Path) -> dict[str, object]:
    return {
        "workload": "db",
        "identity": str(DB),
        "addresses": ["127.0.0.1"],
        "closed": str(directory),
        "access_log": "off",
        "log_json": False,
        "otlp": (),
    }


def pid_of(one: Beside) -> int | None:
    told = one.dump()
    return None if told is None else told["workers"][0]["pid"]


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

    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        one = Beside(data_plane, Telemetry("1"), settings(tmp_path), lambda: None, None)
        gateway = Gateway("shop", "wp", Traffic.SERVICE, (), (), ())
        one.take([published(record, 1) for record in (gateway, workload("db", "127.0.0.1", DB))])

        async with asyncio.TaskGroup() as group:
            one.begin(group)
            one.follow(Sidecar("shop/wp", (80,)))
            await until(lambda: not one.missing())
            hung = pid_of(one)
            assert hung is not None
            assert one._standing is not None
            (worker,) = one._standing.workers._workers
            applied = worker.heard
            await until(lambda: worker.heard > applied)  # it is asked, and answers
            assert pid_of(one) == hung
            monkeypatch.setattr(workers, "APPLY_TIMEOUT_S", 1.0)
            os.kill(hung, signal.SIGSTOP)
            await until(lambda: not Path(f"/proc/{hung}").exists())
            monkeypatch.undo()
            await until(lambda: not one.missing() and pid_of(one) not in (None, hung))
            one.close()
        data_plane.close()

    plane.run(main())


class _Fed:
    """A feed that knows everything from when it is told to."""

    def __init__(self, gateway: str, on_batch, on_progress) -> None:
        self.left = False
        self.whole = False
        self._gateway = gateway.partition("/")[2]
        self._on_batch, self._on_progress = on_batch, on_progress

    def tell(self) -> None:
        known = Gateway("shop", self._gateway, Traffic.SERVICE, (), (), ()), workload("db", "127.0.0.1", DB)
        self.whole = True
        self._on_batch([published(record, 1) for record in known])
        self._on_progress()

    def restore(self) -> None: ...

    async def run(self) -> None: ...

    def known(self) -> Knowledge:
        return Knowledge(self.whole, (), {})

    def leave(self) -> None:
        self.left = True


class _Watcher:
    waiting = 0

    def write(self, data: bytes) -> None: ...


def test_who_moves_to_another_gateway_is_served_by_the_former_until_the_other_serves(tmp_path):
    feeds: dict[str, _Fed] = {}

    def make(gateway, on_batch, on_progress):
        feeds[gateway] = _Fed(gateway, on_batch, on_progress)
        return feeds[gateway]

    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        telemetry = Telemetry("1")
        one = Beside(data_plane, telemetry, settings(tmp_path), lambda: None, make)
        known = Knowledge(True, (), {})
        async with asyncio.TaskGroup() as group:
            one.begin(group)
            one.follow(Sidecar("shop/wp", (80,)))
            feeds["shop/wp"].tell()
            await until(lambda: not one.missing())
            assert one.in_force(known).whole
            former = pid_of(one)
            one.follow(Sidecar("shop/other", (80,)))
            one.follow(Sidecar("shop/zz", (80,)))
            assert feeds["shop/other"].left
            assert one._standing is not None
            (worker,) = one._standing.workers._workers
            assert worker.channel is not None
            told = []
            worker.channel.send = lambda *message: told.append(message)
            untap = telemetry.taps.add(_Watcher())
            assert told == [("tap", True)], "who watches sees the former as well"
            del worker.channel.send
            untap()
            assert (one.gateway, await one.ready(wait=False), one.in_force(known).whole) == ("shop/wp", True, False)
            feeds["shop/zz"].tell()
            await until(lambda: one.gateway == "shop/zz")
            assert await one.ready(wait=False), "at no time is there none"
            assert one.in_force(known).whole
            await until(lambda: not Path(f"/proc/{former}").exists())
            assert pid_of(one) is not None
            assert (feeds["shop/wp"].left, feeds["shop/zz"].left) == (True, False)
            one.close()
        data_plane.close()

    plane.run(main())
