"""What is refused when there is more to do than can be done: in a model of a busy process, and in a real one."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

import h2.exceptions
import pytest

from control.server.ca import Authority
from tests.support.certificates import WEB
from tests.support.http2_peer import speaking
from tests.support.through_waypoint import Through, run_through
from uproxy.plane import READ, Plane
from uproxy.tunnel import Tunnel
from waypoint import overload as module
from waypoint.overload import Overload

CAPACITY = 3000.0  # requests in a second
REFUSAL = 0.25  # of the work of a request that is served


class Model:
    """A process that does its work in the order of its coming; requests come by chance."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.backlog_s = 0.0
        self.chance = random.Random(seed)
        self.waiting: tuple[float, Callable[[], None]] | None = None
        self.busy = True
        self.overload = Overload(self, lambda: self.now, self.chance)  # type: ignore[arg-type]
        self.served = 0
        self.waits: list[float] = []

    def queue(self, callback: Callable[[], None]) -> None:
        assert self.waiting is None, "one tells how long all wait"
        self.waiting = (self.now + self.backlog_s, callback)

    def run(self, load: float, seconds: float, stall_each_s: float = 0.0) -> None:
        end, stalls_at = self.now + seconds, self.now + stall_each_s
        while self.now < end:
            passed = self.chance.expovariate(load * CAPACITY)
            self.now += passed
            self.backlog_s = max(0.0, self.backlog_s - passed)
            if stall_each_s and self.now > stalls_at:
                stalls_at += stall_each_s
                self.backlog_s += 0.15
            if self.waiting is not None and self.now >= self.waiting[0]:
                self.end_wait()
            if self.overload.sheds(self.now, 1):
                self.backlog_s += REFUSAL / CAPACITY
            else:
                self.waits.append(self.backlog_s)
                self.served += 1
                self.backlog_s += 1 / CAPACITY

    def run_one_way(self, load: float, seconds: float) -> None:
        """All come by one way, where they wait, and nothing else does."""
        end, free_at = self.now + seconds, self.now
        came = self.now
        while came < end:
            came += self.chance.expovariate(load * CAPACITY)
            self.now = max(free_at, came)
            self.end_wait()
            if self.overload.sheds(self.now, 1, ("one", self.now - came)):
                free_at = self.now + REFUSAL / CAPACITY
            else:
                self.waits.append(self.now - came)
                self.served += 1
                free_at = self.now + 1 / CAPACITY

    def rest(self, seconds: float) -> None:
        """Nobody asks for anything."""
        if self.waiting is not None:
            self.now = max(self.now, self.waiting[0])
        self.end_wait()
        self.now += seconds
        self.backlog_s = 0.0

    def end_wait(self) -> None:
        """At its time, which has come."""
        if self.waiting is None:
            return
        now, (self.now, callback) = self.now, self.waiting
        self.waiting = None
        callback()
        self.now = now


@pytest.mark.parametrize("seed", range(3))
def test_at_twice_the_capacity_what_is_taken_waits_for_a_bounded_time(seed: int):
    model = Model(seed)
    model.run(2.0, 5)
    model.waits.clear()
    model.served = 0
    model.run(2.0, 20)
    waits = sorted(model.waits)
    assert waits[len(waits) * 99 // 100] < 0.4
    # x served and 2 - x refused are all that can be done: x + 0.3 (2 - x) = 1.
    assert model.served > 0.9 * (1 - 2 * REFUSAL) / (1 - REFUSAL) * CAPACITY * 20
    model.run(0.5, 5)
    refused = model.overload.refused
    model.run(0.5, 5)
    assert model.overload.refused == refused, "and when it is over, it is over"


@pytest.mark.parametrize("seed", range(3))
def test_who_sends_more_than_its_part_is_refused_a_share_and_nobody_else_is(seed: int):
    model = Model(seed)
    model.run_one_way(2.0, 5)
    model.waits.clear()
    model.served = 0
    model.run_one_way(2.0, 20)
    waits = sorted(model.waits)
    assert waits[len(waits) * 99 // 100] < 0.4
    assert model.served > 0.9 * (1 - 2 * REFUSAL) / (1 - REFUSAL) * CAPACITY * 20
    refused = model.overload.refused
    for _ in range(1000):
        assert not model.overload.sheds(model.now, 1, ("another", 0.0))
    model.run_one_way(0.5, 5)
    refused = model.overload.refused
    model.run_one_way(0.5, 5)
    assert model.overload.refused == refused


def test_who_waited_for_its_own_connection_tells_nothing_of_its_way_and_shares_its_lot():
    model = Model(1)
    model.busy = False
    assert not any(model.overload.sheds(model.now + number / 100, 1, ("one", None)) for number in range(200))
    model.now += 2
    model.run_one_way(2.0, 5)
    refused = sum(model.overload.sheds(model.now, 1, ("one", None)) for _ in range(1000))
    assert 100 < refused < 960, "as much as of all that come this way"
    model.now += 2
    assert not any(model.overload.sheds(model.now, 1, ("one", None)) for _ in range(1000)), "that was long ago"


def test_ways_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_MAX_SHARES", 10)
    model = Model(1)
    for number in range(100):
        model.overload.sheds(2.0 * number, 1, (number, 1.0))
        model.end_wait()
    assert len(model.overload._each) <= 10
    model.overload.forget(99)
    assert 99 not in model.overload._each


def test_to_forget_ways_costs_little_where_many_are_late(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_MAX_SHARES", 10)
    model = Model(1)
    kept = [model.overload._each]
    for way in range(1000):
        model.now += 0.01
        model.overload.sheds(model.now, 1, (way, 1.0))
        if model.overload._each is not kept[-1]:
            kept.append(model.overload._each)
    assert len(kept) <= 12, "ten seconds"
    assert len(model.overload._each) <= 200, "of the last two of them"


@pytest.mark.parametrize("load", [0.1, 0.5, 0.9])
def test_nothing_is_refused_while_there_is_room(load: float):
    model = Model(1)
    model.run(load, 30)
    assert model.overload.refused == 0


def test_a_hiccup_of_the_machine_refuses_nobody():
    model = Model(1)
    model.run(0.3, 30, stall_each_s=1.0)
    assert model.overload.refused == 0


@pytest.mark.parametrize("seed", range(3))
def test_who_comes_when_it_has_been_over_for_a_while_is_not_refused(seed: int):
    model = Model(seed)
    model.run(4.0, 5)
    assert model.overload.share > 0.5
    refused = model.overload.refused
    model.rest(60)
    model.run(1 / CAPACITY, 30)
    assert model.overload.refused == refused, "one request in a second, of a process that has nothing else to do"


def test_there_are_never_more_requests_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_UNDER_WAY", 10)
    model = Model(1)
    assert not model.overload.sheds(0.0, 10)
    assert model.overload.sheds(0.0, 11)


async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
    writer.close()


class Load:
    """Work for the data plane that comes as fast as it is done: a hundred coroutines are always before a request's."""

    def __init__(self, data_plane: Plane) -> None:
        self._plane = data_plane
        self._waiting = 0
        self._ours, self._theirs = socket.socketpair()
        self._theirs.send(b"!")
        data_plane.watch(self._ours.fileno(), READ, self._top_up)

    def _top_up(self, _: int) -> None:
        while self._waiting < 100:
            self._waiting += 1
            self._plane.spawn(self._work())

    async def _work(self) -> None:
        time.sleep(0.0003)  # noqa: ASYNC251 - it uses the turn up
        self._waiting -= 1

    def close(self) -> None:
        self._plane.unwatch(self._ours.fileno())
        self._ours.close()
        self._theirs.close()


GET = b"GET / HTTP/1.1\r\nHost: db\r\n\r\n"
HEAD = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"db"), (b":path", b"/")]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two looks that are late are enough."""
    monkeypatch.setattr(module, "LATE", 2)
    monkeypatch.setattr(module, "_STEP", 0.5)


@pytest.mark.usefixtures("hasty")
def test_a_busy_process_refuses_and_says_when_to_come_again(identities: Path, authority: Authority):
    async def client(through: Through) -> None:
        heads: list[bytes] = []

        async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, until: bytes) -> None:
            while not any(until in head for head in heads):
                writer.write(GET)
                heads.append(await reader.readuntil(b"\r\n\r\n"))

        callers = [await through.open() for _ in range(8)]
        load = Load(through.pair.plane)
        async with asyncio.TaskGroup() as tasks:
            for caller in callers:
                tasks.create_task(ask(*caller, until=b" 503 "))
        (refused,) = {re.sub(rb"x-request-id: [0-9a-f]{32}\r\n", b"", head) for head in heads if b" 503 " in head}
        assert refused == (
            b"HTTP/1.1 503 Service Unavailable\r\n"
            b"x-uproxy-reason: overload\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"
        )
        load.close()
        heads.clear()
        await ask(*callers[0], until=b" 200 ")
        for _, writer in callers:
            writer.close()
        assert {"OM", "-"} == {one.flag for one in through.telemetry.exchanges}
        assert b"\nuproxy_waypoint_shed_requests_total " in through.telemetry.render()
        (series,) = re.findall(rb'istio_requests_total{(.*response_flags="OM".*)}', through.telemetry.render())
        assert b'destination_service="db.shop.svc.cluster.local"' in series
        assert b'response_code="503"' in series
        assert b'source_workload="web"' in series

    run_through(identities, authority, hello, client)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("grpc", [False, True], ids=["http2", "grpc"])
def test_so_are_callers_of_http2_and_grpc_also_in_the_middle_of_a_body(
    identities: Path, authority: Authority, grpc: bool
):
    kind = [(b"content-type", b"application/grpc"), (b"te", b"trailers")] if grpc else []

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            load = Load(through.pair.plane)
            refused = None
            while refused is None:
                asked = [peer.request([*HEAD, *kind], b"hello", ends=number % 2 == 0) for number in range(16)]
                answers = [await peer.answer(stream) for stream in asked[::2]]
                refused = next((one for one in answers if (b"x-uproxy-reason", b"overload") in one.headers), None)
                for stream in asked[1::2]:
                    with contextlib.suppress(h2.exceptions.ProtocolError):
                        peer.end(stream)
            load.close()
            fields = dict(refused.headers)
            assert fields[b"retry-after"] == b"1"
            assert fields[b":status"] == (b"200" if grpc else b"503")
            assert fields.get(b"grpc-status") == (b"14" if grpc else None)
            assert not refused.body
            for _ in range(100):
                answer = await peer.answer(peer.request([*HEAD, *kind], b"hello"))
                if (b"x-uproxy-reason", b"overload") not in answer.headers:
                    break
            else:
                raise AssertionError("and when it is over, it is over")

    run_through(identities, authority, hello, client)


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
def test_what_one_caller_sends_too_fast_is_refused_while_others_are_served(
    identities: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch, hasty: None, http2: bool
):
    """Where it waits is told by the caller's own tunnel: the plane has nothing else to do."""
    monkeypatch.setattr(Tunnel, "waited_s", property(lambda tunnel: 1.0 if tunnel.peer == WEB else 0.0))

    async def client(through: Through) -> None:
        while not [one for one in through.telemetry.exchanges if one.flag == "OM"]:
            if http2:
                async with speaking(*await through.open()) as peer:
                    for stream in [peer.request(HEAD, b"") for _ in range(8)]:
                        await peer.answer(stream)
            else:
                reader, writer = await through.open()
                writer.write(GET)
                await reader.readuntil(b"\r\n\r\n")
                writer.close()
            await asyncio.sleep(module.LOOK_S)

    run_through(identities, authority, hello, client)
