"""The turns of the data plane: what waits is served between what is much."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from uproxy import plane
from uproxy.plane import MAX_AHEAD, MAX_STEPS, MAX_TURNS_WITHOUT, STEPS_PER_TURN, TIMER_STEPS_PER_S, Plane


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def told(ends: tuple[socket.socket, socket.socket], much: int, postponed: bool) -> list[str]:
    """What happens, in order, when a lot is to be done and a socket becomes readable just after the first of it."""
    order: list[str] = []

    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        done = asyncio.Event()

        def one() -> None:
            if not order:
                ends[1].send(b"x")
            order.append("much")
            if order.count("much") == much:
                done.set()

        async def coroutine() -> None:
            one()

        def readable(_: int) -> None:
            data_plane.unwatch(ends[0].fileno())
            order.append("other")

        def begin() -> None:
            for _ in range(much):
                if postponed:
                    data_plane.postpone(one)
                else:
                    data_plane.spawn(coroutine())

        data_plane.watch(ends[0].fileno(), plane.READ, readable)
        data_plane.call_later(0.0, lambda: data_plane.postpone(begin))
        async with asyncio.timeout(30):
            await done.wait()
        assert not data_plane.tasks
        data_plane.close()

    plane.run(main())
    return order


def test_a_socket_that_is_ready_is_served_between_many_coroutines(ends: tuple[socket.socket, socket.socket]) -> None:
    order = told(ends, 10 * STEPS_PER_TURN, postponed=False)
    assert order.index("other") == STEPS_PER_TURN
    assert order.count("much") == 10 * STEPS_PER_TURN


def test_of_what_was_postponed_each_turn_does_one(ends: tuple[socket.socket, socket.socket]) -> None:
    order = told(ends, 20, postponed=True)
    assert order.index("other") == 1
    assert order.count("much") == 20


def test_new_work_waits_while_much_is_under_way_but_not_for_ever() -> None:
    order: list[str] = []

    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        done = asyncio.Event()

        async def coroutine() -> None:
            order.append("step")
            if len(order) == 20 * STEPS_PER_TURN + 3:
                done.set()

        def begin() -> None:
            for _ in range(20 * STEPS_PER_TURN):
                data_plane.spawn(coroutine())
            assert data_plane.busy
            for _ in range(3):
                data_plane.queue(lambda: order.append("new"))

        data_plane.call_later(0.0, lambda: data_plane.postpone(begin))
        async with asyncio.timeout(30):
            await done.wait()
        data_plane.close()

    plane.run(main())
    before = [order[:at].count("step") for at, what in enumerate(order) if what == "new"]
    each = MAX_TURNS_WITHOUT + 1
    assert before == [STEPS_PER_TURN * (each * number + MAX_TURNS_WITHOUT) for number in range(3)]


def test_of_much_new_work_a_turn_takes_a_part(ends: tuple[socket.socket, socket.socket]) -> None:
    order: list[str] = []

    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        done = asyncio.Event()

        def begin() -> None:
            ends[1].send(b"x")
            for _ in range(3 * MAX_AHEAD):
                data_plane.queue(lambda: order.append("new"))
            data_plane.queue(done.set)

        def readable(_: int) -> None:
            data_plane.unwatch(ends[0].fileno())
            order.append("other")

        data_plane.watch(ends[0].fileno(), plane.READ, readable)
        data_plane.call_later(0.0, lambda: data_plane.postpone(begin))
        async with asyncio.timeout(30):
            await done.wait()
        data_plane.close()

    plane.run(main())
    assert order.index("other") == 1 + 3
    assert order.count("new") == 3 * MAX_AHEAD


def test_what_control_work_wakes_is_done_when_it_has_run() -> None:
    done: list[int] = []

    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())

        async def coroutine(number: int) -> None:
            done.append(number)

        def spawn_many() -> None:
            for number in range(10 * STEPS_PER_TURN):
                data_plane.spawn(coroutine(number))

        data_plane.run(spawn_many)
        assert len(done) == 10 * STEPS_PER_TURN
        data_plane.close()

    plane.run(main())


@pytest.mark.parametrize("delay_s", [0.0, 0.25, 5.0, 25.6, 25.7, 30.0, 300.0, 3600.0])
def test_deadlines_come_in_time_and_leave_little_behind(monkeypatch: pytest.MonkeyPatch, delay_s: float) -> None:
    seen: list[tuple[float, int]] = []

    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        with monkeypatch.context() as clock:
            for turn in range(20 * MAX_STEPS):
                now = 1000 + turn / TIMER_STEPS_PER_S
                clock.setattr(plane, "monotonic", lambda now=now: now)
                data_plane.call_later(delay_s, lambda: None).cancel()
                seen.append((max(data_plane._due) / TIMER_STEPS_PER_S - now - delay_s, len(data_plane._timers)))
                while data_plane._due[0] <= now * TIMER_STEPS_PER_S:
                    data_plane._expire(now)
        data_plane.close()

    plane.run(main())
    assert min(late for late, _ in seen) >= 0
    assert max(late for late, _ in seen) <= 1 / TIMER_STEPS_PER_S + delay_s / 128 + 1e-6
    assert max(steps for _, steps in seen) <= MAX_STEPS + 2
