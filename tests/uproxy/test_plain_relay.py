"""Two sockets with a relay between them are like one TCP connection, over random histories of what both ends do."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.uproxy.test_relay_model import PATIENCE_S, End, check, descriptors, sizes, to_the_end
from uproxy import plane
from uproxy.errors import Flag
from uproxy.plain_relay import HANDED_OVER, READ_BYTES, PlainRelay
from uproxy.plane import Plane
from uproxy.relay import Outcome

Step = tuple[str, int, int]
steps: st.SearchStrategy[Step] = st.tuples(
    st.sampled_from(["write"] * 6 + ["read"] * 4 + ["wait"] * 3 + ["end", "move"] * 2 + ["close", "reset", "cut"]),
    st.integers(0, 1),
    sizes,
)


class Relayed:
    """A relay between two ends that the test holds."""

    def __init__(self, data_plane: Plane, *, narrow: bool) -> None:
        self.outcome: Outcome | None = None
        caller, peer = _connected(narrow)
        app, served = _connected(narrow)
        self.ends = End(caller, 0), End(served, 500_000)
        self.relay = PlainRelay(data_plane, peer)
        for sock in (peer, app):
            plane.reset_on_close(sock)
        data_plane.run(lambda: self.relay.attach(app))
        data_plane.spawn(self._wait())

    async def _wait(self) -> None:
        outcome = await self.relay.done
        if outcome is not HANDED_OVER:
            self.outcome = outcome

    def move(self, data_plane: Plane) -> None:
        """Another relay goes on with the sockets, which have other descriptors then, as in another process."""
        if self.relay.sockets is None:
            return
        peer, app = (one.dup() for one in self.relay.sockets)
        progress = self.relay.progress
        data_plane.run(self.relay.let_go)
        self.relay = PlainRelay(data_plane, peer, progress)
        data_plane.run(lambda: self.relay.attach(app))
        data_plane.spawn(self._wait())


def _connected(narrow: bool) -> tuple[socket.socket, socket.socket]:
    """The two ends of a TCP connection. `narrow`: little fits into the kernel's buffers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        second, _ = listener.accept()
    for sock in (first, second):
        sock.setblocking(False)
        if narrow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
    return first, second


@given(st.booleans(), st.lists(steps, max_size=40))
@example(False, [("end", 0, 1), ("wait", 0, 1), ("move", 0, 1)])
@settings(print_blob=True)
def test_it_is_like_plain_tcp(narrow: bool, history: list[Step]) -> None:
    plane.run(live_through(narrow, history))


async def live_through(narrow: bool, history: list[Step]) -> None:
    data_plane = Plane(asyncio.get_running_loop())
    before = descriptors()
    relayed = Relayed(data_plane, narrow=narrow)
    was_cut = False
    for what, side, size in history:
        end = relayed.ends[side]
        match what:
            case "write":
                end.write(size)
            case "read":
                end.read(size)
            case "end":
                end.say_end()
            case "close":
                end.close()
            case "reset":
                end.reset()
            case "move":
                relayed.move(data_plane)
            case "cut":
                was_cut = was_cut or relayed.relay.outcome is None
                data_plane.run(lambda: relayed.relay.cut("the test says so"))
            case _:
                await asyncio.sleep(0.001 * (size % 4))
    await to_the_end([relayed.ends])
    check(relayed.ends, was_cut)
    if not was_cut and not any(end.gone for end in relayed.ends):
        await until(lambda: relayed.outcome is not None)
        assert relayed.outcome is not None
        assert relayed.outcome.flag is Flag.NONE
        assert (relayed.relay.received, relayed.relay.sent) == tuple(end.sent for end in relayed.ends)
    for end in relayed.ends:
        end.sock.close()
    await until(lambda: not data_plane.tasks and descriptors() <= before)
    data_plane.close()


async def until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


async def in_plane(test) -> None:
    data_plane = Plane(asyncio.get_running_loop())
    relayed = Relayed(data_plane, narrow=True)
    try:
        await test(data_plane, relayed)
    finally:
        for end in relayed.ends:
            end.sock.close()
        await until(lambda: not data_plane.tasks)
        data_plane.close()


def test_a_reader_that_does_not_read_stops_its_writer():
    async def test(data_plane: Plane, relayed: Relayed) -> None:
        caller, _ = relayed.ends
        await fill(caller)
        assert len(relayed.relay._in.pending) <= READ_BYTES
        assert caller.sent < 1 << 20  # the kernel's four buffers, and one read

    plane.run(in_plane(test))


def test_what_waits_goes_along_when_another_process_goes_on():
    """In both directions, behind an end that was said; and until all has arrived, whoever dies resets."""

    async def test(data_plane: Plane, relayed: Relayed) -> None:
        for end in relayed.ends:
            await fill(end)
            end.say_end()
        before = relayed.relay.progress
        assert before.pending_in
        assert before.pending_out
        relayed.move(data_plane)
        assert relayed.relay.progress == before
        for sock in relayed.relay.sockets or ():
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == b"\1\0\0\0\0\0\0\0"
        await to_the_end([relayed.ends])
        check(relayed.ends, was_cut=False)
        assert [bytes(end.received) for end in relayed.ends] == [end.content for end in relayed.ends[::-1]]

    plane.run(in_plane(test))


async def fill(end: End) -> None:
    stuck_since = time.monotonic()
    while time.monotonic() - stuck_since < 0.2:
        before = end.sent
        end.write(1 << 20)
        if end.sent > before:
            stuck_since = time.monotonic()
        await asyncio.sleep(0.001)


def test_an_end_that_hangs_up_both_ways_costs_no_turns_while_its_last_bytes_wait(monkeypatch: pytest.MonkeyPatch):
    """The peer has had the application's FIN and sent its own, and the application does not read: EPOLLHUP stays."""

    async def test(data_plane: Plane, relayed: Relayed) -> None:
        caller, served = relayed.ends
        served.say_end()
        await until(lambda: relayed.relay.half_closed)
        waits_since = time.monotonic()
        # Until the application's buffers are full for good, while the peer's have room for a FIN.
        while time.monotonic() - waits_since < 0.1:
            if not relayed.relay._in.pending:
                caller.write(4096)
                waits_since = time.monotonic()
            await asyncio.sleep(0.001)
        caller.say_end()
        await asyncio.sleep(0.02)
        assert relayed.relay._in.pending
        turns = 0

        def turn(patience_s: float) -> list[object]:
            nonlocal turns
            turns += 1
            return Plane._turn(data_plane, patience_s)

        with monkeypatch.context() as patched:
            patched.setattr(data_plane, "_turn", turn)
            await asyncio.sleep(0.2)
        assert turns < 20
        await to_the_end([relayed.ends])
        check(relayed.ends, was_cut=False)

    plane.run(in_plane(test))


def test_a_reset_reaches_an_end_that_only_listens():
    async def test(data_plane: Plane, relayed: Relayed) -> None:
        caller, served = relayed.ends
        caller.say_end()
        await until(lambda: relayed.relay.half_closed)
        caller.reset()
        await until(lambda: relayed.outcome is not None)
        assert relayed.outcome is not None
        assert relayed.outcome.flag is Flag.RESET
        assert "peer's connection broke" in relayed.outcome.text
        with pytest.raises(BrokenPipeError):  # what Linux makes of an RST after a FIN
            served.sock.send(b"x")

    plane.run(in_plane(test))
