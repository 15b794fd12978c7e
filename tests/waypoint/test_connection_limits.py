"""How many connections to a service there are, and who waits for one."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control.api.policy import Target
from control.api.traffic import ConnectionLimits, TrafficPolicy
from control.server.ca import Authority
from tests.support.examples import examples
from tests.support.http2_peer import Http2Peer, Message, served_by, speaking
from tests.support.through_waypoint import Through, run_through
from tests.support.waiting import until
from uproxy import plane
from uproxy.plane import Plane, Waiter
from waypoint import connection_limits, forwarding
from waypoint.connection_limits import Limiter

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
GET = b"GET / HTTP/1.1\r\nHost: db\r\n\r\n"
GET2 = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"db"), (b":path", b"/")]


def policy(*limits: int) -> TrafficPolicy:
    return TrafficPolicy("shop", "few", (Target("Service", "shop/db"),), connection_limits=ConnectionLimits(*limits))


@settings(max_examples=examples(200))
@given(st.integers(1, 4), st.integers(1, 4), st.randoms(use_true_random=False))
def test_never_more_are_open_than_may_be_and_nobody_waits_for_nothing(most, pending, chance: random.Random):
    """Against a model: who wants, has, and waits."""

    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        limiter = Limiter(data_plane)
        limiter.limits = ConnectionLimits(most, pending)
        opened = 0
        waiting: list[Waiter[None]] = []
        for _ in range(60):
            match chance.choice(("want", "want", "close", "give up")):
                case "want":
                    if limiter.take(waited=False):
                        assert not any(not one.settled for one in waiting), "nobody goes before those who wait"
                        opened += 1
                    else:
                        assert opened == most or waiting
                        place = limiter.line_up(waited=False)
                        if place is None:
                            assert len([one for one in waiting if not one.settled]) == pending
                        else:
                            waiting.append(place)
                case "close" if opened:
                    opened -= 1
                    limiter.release()
                case "give up" if waiting:
                    chance.choice(waiting).fail(ConnectionResetError("gone"))
            for place in [one for one in waiting if one.settled]:
                waiting.remove(place)
                if place._error is None:
                    assert limiter.take(waited=True), "whoever is woken finds room"
                    opened += 1
            assert opened <= most
            assert opened == most or not waiting
        data_plane.close()

    plane.run(main())


def test_a_newcomer_does_not_go_before_those_who_wait():
    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        limiter = Limiter(data_plane)
        limiter.limits = ConnectionLimits(1, 5)
        assert limiter.take(waited=False)
        places = [limiter.line_up(waited=False) for _ in range(2)]
        limiter.release()
        assert [place is not None and place.settled for place in places] == [True, False]
        assert not limiter.take(waited=False)
        assert limiter.take(waited=True)
        data_plane.close()

    plane.run(main())


def test_who_was_let_goes_before_a_newcomer_and_a_raised_limit_lets_all_in_their_order():
    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        limiter = Limiter(data_plane)
        limiter.limits = ConnectionLimits(1, 5)
        assert limiter.take(waited=False)
        first, second, third = (limiter.line_up(waited=False) for _ in range(3))
        assert first is not None
        assert second is not None
        assert third is not None
        limiter.release()
        assert not limiter.take(waited=False), "there is room, but not for who has not waited"
        limiter.pass_on()
        assert (first.settled, second.settled, third.settled) == (True, True, False)
        assert limiter.take(waited=True)
        assert not third.settled
        limiter.limits = ConnectionLimits(2, 5)
        assert third.settled
        again = limiter.line_up(waited=False)
        assert limiter.take(waited=True)
        assert again is not None
        assert not again.settled
        limiter.limits = ConnectionLimits()
        assert again.settled
        assert limiter.take(waited=True)
        data_plane.close()

    plane.run(main())


def test_room_that_is_made_is_for_who_has_asked_for_it():
    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        limiter = Limiter(data_plane)
        limiter.limits = ConnectionLimits(1, 5)
        assert limiter.take(waited=False)
        first, second = (limiter.line_up(waited=False) for _ in range(2))
        assert first is not None
        assert second is not None

        def close() -> None:
            limiter.idle.clear()
            limiter.release()

        limiter.idle[0] = close
        limiter.go_on()
        assert first.settled
        assert limiter.take(waited=True)
        assert not second.settled
        data_plane.close()

    plane.run(main())


class Connection:
    """Of HTTP/2."""

    quiet = retired = False

    def close(self) -> None: ...

    def retire(self) -> None:
        self.retired = True


def test_a_lower_limit_of_requests_holds_for_connections_that_are_past_it():
    async def main() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        limiter = Limiter(data_plane)
        limiter.limits = ConnectionLimits(1, 5, 10)
        connection = Connection()
        limiter.shared[connection] = 0
        for _ in range(5):
            limiter.carries(connection)
        limiter.limits = ConnectionLimits(1, 5, 3)
        assert not connection.retired
        limiter.carries(connection)
        assert connection.retired
        data_plane.close()

    plane.run(main())


async def by_turns(gate: asyncio.Event, seen: list[int], reader: Reader, writer: Writer) -> None:
    """Answers on each connection when it may."""
    seen.append(1)
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await gate.wait()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
    writer.close()


async def answer(reader: Reader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    with contextlib.suppress(IndexError, asyncio.IncompleteReadError):
        await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
    return int(head.split(b" ", 2)[1]), head


def test_requests_wait_for_a_connection_and_too_many_are_refused(identities: Path, authority: Authority):
    async def client(through: Through) -> None:
        through.pair.apply(policy(2, 3))
        callers = [await through.open() for _ in range(6)]
        for _, writer in callers:
            writer.write(GET)
        # Of six, two have connections, three wait, one is refused at once.
        done = [asyncio.Event() for _ in callers]
        answers: list[tuple[int, bytes]] = []

        async def read(reader: Reader, over: asyncio.Event) -> None:
            answers.append(await answer(reader))
            over.set()

        async with asyncio.TaskGroup() as tasks:
            for (reader, _), over in zip(callers, done, strict=True):
                tasks.create_task(read(reader, over))
            await until(lambda: answers)
            status, head = answers[0]
            assert status == 503
            assert b"\r\nx-uproxy-reason: overload\r\n" in head
            assert b"\r\nretry-after: 1\r\n" in head
            await until(lambda: len(seen) == 2)
            gate.set()
        assert sorted(status for status, _ in answers) == [200] * 5 + [503]
        assert len(seen) == 2, "what becomes free is used again"
        for _, writer in callers:
            writer.close()
        await until(lambda: len(through.telemetry.exchanges) == 6)
        assert sorted(one.flag for one in through.telemetry.exchanges) == ["-"] * 5 + ["UO"]

    gate, seen = asyncio.Event(), list[int]()
    run_through(identities, authority, partial(by_turns, gate, seen), client)


def test_who_waits_too_long_is_told_to_come_again(
    identities: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(forwarding, "PENDING_TIMEOUT_S", 0.1)

    async def client(through: Through) -> None:
        through.pair.apply(policy(1, 3))
        (reader, writer), (second, other) = await through.open(), await through.open()
        writer.write(GET)
        await until(lambda: seen)
        other.write(GET)
        status, head = await answer(second)
        assert status == 503
        assert b"\r\nretry-after: 1\r\n" in head
        gate.set()
        assert (await answer(reader))[0] == 200
        other.write(GET)
        assert (await answer(second))[0] == 200
        assert len(seen) == 1
        for one in (writer, other):
            one.close()

    gate, seen = asyncio.Event(), list[int]()
    run_through(identities, authority, partial(by_turns, gate, seen), client)


def test_a_caller_that_leaves_gives_its_turn_away(identities: Path, authority: Authority):
    async def client(through: Through) -> None:
        through.pair.apply(policy(1, 3))
        (reader, writer), (_, gone), (third, last) = [await through.open() for _ in range(3)]
        writer.write(GET)
        await until(lambda: seen)
        for waits in (gone, last):
            waits.write(GET)
            await asyncio.sleep(0.05)
        gone.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone.transport.abort()
        await until(lambda: any(one.flag == "DC" for one in through.telemetry.exchanges))
        gate.set()
        assert (await answer(reader))[0] == (await answer(third))[0] == 200
        for one in (writer, last):
            one.close()

    gate, seen = asyncio.Event(), list[int]()
    run_through(identities, authority, partial(by_turns, gate, seen), client)


def test_an_idle_connection_makes_room_for_another_caller(identities: Path, authority: Authority):
    async def client(through: Through) -> None:
        through.pair.apply(policy(1, 1))
        ours, theirs = await through.open(), await through.open(through.pair.db)
        for number, (reader, writer) in enumerate((ours, theirs, ours), 1):
            writer.write(GET)
            assert (await answer(reader))[0] == 200
            assert len(seen) == number, "a connection is one caller's"
            assert through.upstream.idle == 1
        for _, writer in (ours, theirs):
            writer.close()

    gate, seen = asyncio.Event(), list[int]()
    gate.set()
    run_through(identities, authority, partial(by_turns, gate, seen), client)


def test_a_connection_carries_so_many_requests_and_no_more(identities: Path, authority: Authority):
    async def client(through: Through) -> None:
        through.pair.apply(policy(0, 0, 2))
        reader, writer = await through.open()
        for opened in (1, 1, 2, 2, 3):
            writer.write(GET)
            assert (await answer(reader))[0] == 200
            assert len(seen) == opened
        writer.close()

    gate, seen = asyncio.Event(), list[int]()
    gate.set()
    run_through(identities, authority, partial(by_turns, gate, seen), client)


def test_http2_connections_are_counted_too_and_make_room_once_they_are_quiet(identities: Path, authority: Authority):
    served: list[int] = []

    async def respond(peer: Http2Peer, stream: int, message: Message) -> None:
        await peer.until(lambda: message.over)
        served.append(stream)
        peer.respond(stream, [(b":status", b"200")], ends=True)

    async def client(through: Through) -> None:
        through.pair.apply(policy(1, 5, 3))
        async with speaking(*await through.open()) as ours, speaking(*await through.open(through.pair.db)) as theirs:
            for peer in (ours, theirs, ours):
                answers = [await peer.answer(stream) for stream in [peer.request(GET2) for _ in range(2)]]
                assert [one.status for one in answers] == [200, 200]
            streams = [peer.request(GET2) for peer in (ours, theirs) for _ in range(5)]
            answers = [await peer.answer(one) for peer, one in zip([ours] * 5 + [theirs] * 5, streams, strict=True)]
            assert [one.status for one in answers].count(200) >= 6, "one connection at a time, of three requests each"
        assert max(served) <= 5, "a fourth request would be stream 7"

    run_through(identities, authority, served_by(respond), client, protocol="kubernetes.io/h2c")


def test_who_waits_while_a_connection_is_opened_goes_along_on_it(identities: Path, authority: Authority):
    gate = asyncio.Event()

    async def respond(peer: Http2Peer, stream: int, message: Message) -> None:
        if dict(message.headers)[b":path"] == b"/slow":
            await gate.wait()
        peer.respond(stream, [(b":status", b"200")], ends=True)

    async def client(through: Through) -> None:
        through.pair.apply(policy(1, 5))
        async with speaking(*await through.open()) as peer:
            first = peer.request([*GET2[:3], (b":path", b"/slow")])
            others = [peer.request(GET2) for _ in range(3)]
            for stream in others:
                assert (await peer.answer(stream)).status == 200
            gate.set()
            assert (await peer.answer(first)).status == 200

    run_through(identities, authority, served_by(respond), client, protocol="kubernetes.io/h2c")


def test_opaque_tcp_counts(identities: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("waypoint.opaque.PENDING_TIMEOUT_S", 0.1)

    async def echo(reader: Reader, writer: Writer) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    async def client(through: Through) -> None:
        through.pair.apply(policy(1, 1))
        reader, writer = await through.open()
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        late, refused = await through.open()
        with contextlib.suppress(ConnectionResetError):
            assert await late.read() == b""
        assert any("overload" in one.error for one in through.telemetry.ended)
        refused.close()
        writer.close()
        await until(lambda: not through.connections)
        reader, writer = await through.open()
        writer.write(b"again")
        assert await reader.readexactly(5) == b"again"
        writer.close()

    run_through(identities, authority, echo, client, protocol="tcp")


def test_a_lower_limit_is_of_several_the_one_that_holds():
    assert connection_limits._lowest([0, 5, 3]) == 3
    assert connection_limits._lowest([0, 0]) == 0
