"""`uproxy.beside`: what a stream gets that must go through a process which is not there."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from control.api.address import parse_address
from control.api.gateway import Gateway, Sidecar, Traffic
from control.api.status import Knowledge
from control.client.membership import Membership
from control.server.ca import Authority
from tests.support.certificates import DB, identity_dir
from tests.support.pair import published, workload
from tests.support.waiting import until
from uproxy import beside, beside_feed, plane, workers
from uproxy.beside import Beside
from uproxy.credentials import CurrentCredentials
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

    def keep(self) -> None:
        self.left = False


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


@asynccontextmanager
async def _served(directory, make):
    """By wp's process, and what has fed it; `make` may raise for others."""
    feeds: dict[str, _Fed] = {}

    def made(gateway, on_batch, on_progress):
        make(gateway)
        feeds[gateway] = _Fed(gateway, on_batch, on_progress)
        return feeds[gateway]

    data_plane = Plane(asyncio.get_running_loop())
    one = Beside(data_plane, Telemetry("1"), settings(directory), lambda: None, made)
    async with asyncio.TaskGroup() as group:
        one.begin(group)
        one.follow(Sidecar("shop/wp", (80,)))
        await until(lambda: "shop/wp" in feeds)
        feeds["shop/wp"].tell()
        await until(lambda: not one.missing())
        yield one, feeds, data_plane
        one.close()
    data_plane.close()


def _any(gateway):
    pass


@pytest.mark.parametrize("dies", ["before", "meanwhile"])
def test_a_former_process_that_dies_during_a_move_is_replaced_and_serves_on(monkeypatch, tmp_path, dies):
    monkeypatch.setattr(beside, "PATIENCE_S", 60.0)

    async def main() -> None:
        async with _served(tmp_path, _any) as (one, feeds, data_plane):
            if dies == "meanwhile":
                one.follow(Sidecar("shop/zz", (80,)))
            os.kill(pid_of(one), signal.SIGKILL)
            await until(one.missing)
            one.follow(Sidecar("shop/zz", (80,)))
            assert one.gateway == "shop/wp", "the other one has nothing to serve with yet"
            found = []

            async def stream() -> None:
                found.append(await one.ready(wait=True))

            data_plane.run(lambda: data_plane.spawn(stream()))
            await until(lambda: found == [True])
            assert one.gateway == "shop/wp"
            feeds["shop/zz"].tell()
            await until(lambda: one.gateway == "shop/zz")
            assert not one.missing()

    plane.run(main())


def test_who_is_moved_and_moved_back_is_kept_on_disk_by_the_former_feed(tmp_path):
    async def main() -> None:
        async with _served(tmp_path, _any) as (one, feeds, _):
            former = pid_of(one)
            one.follow(Sidecar("shop/zz", (80,)))
            assert (feeds["shop/wp"].left, feeds["shop/zz"].left) == (True, False)
            one.follow(Sidecar("shop/wp", (80,)))
            assert (feeds["shop/wp"].left, feeds["shop/zz"].left) == (False, True)
            assert (one.gateway, pid_of(one)) == ("shop/wp", former)

    plane.run(main())


def test_a_process_that_cannot_be_made_yet_is_tried_again_while_the_former_serves(monkeypatch, tmp_path):
    monkeypatch.setattr(beside, "RETRY_S", 0.05)
    attempts = []

    def make(gateway):
        attempts.append(gateway)
        if attempts.count(gateway) == 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def main() -> None:
        known = Knowledge(True, (), {})
        async with _served(tmp_path, make) as (one, feeds, _):
            assert attempts == ["shop/wp"] * 2, "the first one, too"
            former = pid_of(one)
            one.follow(Sidecar("shop/zz", (80,)))
            assert (one.gateway, pid_of(one), await one.ready(wait=False)) == ("shop/wp", former, True)
            assert not one.in_force(known).whole, "what goes to the other one is not enforced"
            await until(lambda: "shop/zz" in feeds)
            assert not one.in_force(known).whole
            feeds["shop/zz"].tell()
            await until(lambda: one.gateway == "shop/zz")
            assert one.in_force(known).whole
            one.follow(Sidecar("shop/other", (80,)))
            one.follow(Sidecar("shop/zz", (80,)))
            assert one.in_force(known).whole, "nothing else is wanted any more"
            assert attempts == ["shop/wp", "shop/wp", "shop/zz", "shop/zz", "shop/other"]

    plane.run(main())


def test_a_feed_keeps_the_file_until_it_leaves_and_when_it_is_to_keep_it_again(monkeypatch, tmp_path):
    monkeypatch.setattr(beside_feed, "_SAVE_INTERVAL_S", 0.01)
    directory = tmp_path / "db"
    identity_dir(Authority.create(tmp_path / "ca", "cluster.local"), directory, DB)
    membership = Membership(DB, "db", (parse_address("127.0.0.1"),), "https://127.0.0.1:1", ("mqtts://127.0.0.1:1",))

    async def main() -> None:
        feed = beside_feed.Feed(
            membership, directory, CurrentCredentials(directory, DB), "shop/wp", lambda _: None, lambda: None
        )
        async with asyncio.TaskGroup() as group:
            saving = group.create_task(feed._keep_saved())
            feed.leave()
            feed._unsaved.set()
            await until(lambda: not feed._unsaved.is_set())
            assert not (directory / beside_feed.STATE_FILE).exists()
            feed.keep()
            await until((directory / beside_feed.STATE_FILE).exists)
            saving.cancel()

    plane.run(main())
