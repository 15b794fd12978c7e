"""What is refused when there is more to do than can be done: in a model of a busy process, and in a real one."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from control.server.ca import Authority
from tests.support.through_waypoint import Through, run_through
from uproxy.plane import READ, Plane
from waypoint import overload as module
from waypoint.overload import Overload

CAPACITY = 3000.0  # requests in a second
REFUSAL = 0.3  # of the work of a request that is served


class Model:
    """A process that does its work in the order of its coming; requests come by chance."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.backlog_s = 0.0
        self.chance = random.Random(seed)
        self.waiting: tuple[float, Coroutine[Any, Any, None]] | None = None
        self.overload = Overload(self, lambda: self.now, self.chance)  # type: ignore[arg-type]
        self.served = 0
        self.waits: list[float] = []

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        assert self.waiting is None, "one tells how long all wait"
        self.waiting = (self.now + self.backlog_s, coroutine)

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

    def rest(self, seconds: float) -> None:
        """Nobody asks for anything."""
        if self.waiting is not None:
            self.now = max(self.now, self.waiting[0])
            self.end_wait()
        self.now += seconds
        self.backlog_s = 0.0

    def end_wait(self) -> None:
        """At its time, which has come."""
        assert self.waiting is not None
        now, (self.now, coroutine) = self.now, self.waiting
        self.waiting = None
        with contextlib.suppress(StopIteration):
            coroutine.send(None)
        self.now = now

    def close(self) -> None:
        if self.waiting is not None:
            self.waiting[1].close()


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
    model.close()


@pytest.mark.parametrize("load", [0.1, 0.5, 0.9])
def test_nothing_is_refused_while_there_is_room(load: float):
    model = Model(1)
    model.run(load, 30)
    assert model.overload.refused == 0
    model.close()


def test_a_hiccup_of_the_machine_refuses_nobody():
    model = Model(1)
    model.run(0.3, 30, stall_each_s=1.0)
    assert model.overload.refused == 0
    model.close()


@pytest.mark.parametrize("seed", range(3))
def test_who_comes_when_it_has_been_over_for_a_while_is_not_refused(seed: int):
    model = Model(seed)
    model.run(4.0, 5)
    assert model.overload.share > 0.5
    refused = model.overload.refused
    model.rest(60)
    model.run(1 / CAPACITY, 30)
    assert model.overload.refused == refused, "one request in a second, of a process that has nothing else to do"
    model.close()


def test_there_are_never_more_requests_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_UNDER_WAY", 10)
    model = Model(1)
    assert not model.overload.sheds(0.0, 10)
    assert model.overload.sheds(0.0, 11)
    model.close()


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
        time.sleep(0.001)  # noqa: ASYNC251 - it uses the turn up
        self._waiting -= 1

    def close(self) -> None:
        self._plane.unwatch(self._ours.fileno())
        self._ours.close()
        self._theirs.close()


def test_a_busy_process_refuses_and_says_when_to_come_again(
    identities: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "LATE", 2)
    monkeypatch.setattr(module, "_STEP", 0.5)

    async def client(through: Through) -> None:
        heads: list[bytes] = []

        async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, until: bytes) -> None:
            while not any(until in head for head in heads):
                writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
                head = await reader.readuntil(b"\r\n\r\n")
                if b" 503 " in head:
                    await reader.readexactly(len(b"overload\n"))
                heads.append(head)

        callers = [await through.open() for _ in range(8)]
        load = Load(through.pair.plane)
        async with asyncio.TaskGroup() as tasks:
            for caller in callers:
                tasks.create_task(ask(*caller, until=b" 503 "))
        (refused,) = {head.partition(b"x-request-id")[0] for head in heads if b" 503 " in head}
        assert b"\r\nx-uproxy-reason: overload\r\n" in refused
        assert all(b"\r\nretry-after: 1\r\n" in head for head in heads if b" 503 " in head)
        load.close()
        heads.clear()
        await ask(*callers[0], until=b" 200 ")
        for _, writer in callers:
            writer.close()
        assert {"OM", "-"} == {one.flag for one in through.telemetry.exchanges}
        assert b"\nuproxy_waypoint_shed_requests_total " in through.telemetry.render()

    run_through(identities, authority, hello, client)
