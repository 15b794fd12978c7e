"""A connection through two proxies against what TCP promises, over random histories of what applications do.

The oracle is plain TCP: what one end reads is what the other wrote, from the start and without a hole; an end of file
means that the other end said so and that all has arrived; a reset never looks like an end; and nobody waits for good.
Afterwards nothing is left in either proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control.server.ca import Authority
from tests.support.pair import DB_ADDRESS, Pair, running_pair
from uproxy import hbone, plane
from uproxy.errors import Flag

PATTERN = random.Random(1).randbytes(1 << 20)
MAX_CONNECTIONS = 3
PATIENCE_S = 10.0


@dataclass
class End:
    """One application: what it did and what it saw."""

    sock: socket.socket
    offset: int
    """Where in the pattern its bytes begin, so that no two ends write the same."""
    sent: int = 0
    received: bytearray = field(default_factory=bytearray)
    said_end: bool = False
    gone: bool = False
    """It closed or reset its socket, and sees no more."""
    was_reset: bool = False
    saw_end: bool = False
    saw_error: bool = False

    @property
    def content(self) -> bytes:
        start = self.offset
        return (PATTERN[start:] + PATTERN * (self.sent // len(PATTERN) + 1))[: self.sent]

    @property
    def done(self) -> bool:
        return self.gone or self.saw_end or self.saw_error

    def write(self, size: int) -> None:
        """As much of it as the socket takes."""
        if self.said_end or self.gone or self.saw_error:
            return
        start = (self.offset + self.sent) % len(PATTERN)
        try:
            self.sent += self.sock.send(PATTERN[start : start + size])
        except BlockingIOError:
            pass
        except OSError:
            self.saw_error = True

    def read(self, size: int) -> bool:
        """Whether there was anything to see."""
        if self.done:
            return False
        try:
            data = self.sock.recv(size)
        except BlockingIOError:
            return False
        except OSError:
            self.saw_error = True
            return True
        self.received += data
        self.saw_end = not data
        return True

    def say_end(self) -> None:
        if not self.said_end and not self.gone:
            self.said_end = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self.saw_error = True

    def close(self) -> None:
        """As a process that exits: a FIN, or an RST when it had not read everything."""
        if not self.gone:
            self.said_end = self.gone = True
            self.sock.close()

    def reset(self) -> None:
        if not self.gone:
            self.was_reset = self.gone = True
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.sock.close()


Ends = tuple[End, End]
Step = tuple[str, int, int, int]

sizes = st.one_of(st.integers(1, 100), st.sampled_from([16375, 65536, 1 << 18, 1 << 20]))
steps: st.SearchStrategy[Step] = st.tuples(
    # Mostly data, or few histories get far.
    st.sampled_from(["write"] * 6 + ["read"] * 4 + ["wait"] * 3 + ["end"] * 2 + ["freeze", "close", "reset", "cut"]),
    st.integers(0, MAX_CONNECTIONS - 1),
    st.integers(0, 1),
    sizes,
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ca") / "ca", "cluster.local")


@given(
    st.sampled_from([hbone.MAX_FRAME_SIZE, 16384]),  # ours, and Envoy's
    st.lists(st.booleans(), min_size=1, max_size=MAX_CONNECTIONS),
    st.lists(steps, max_size=40),
)
@settings(print_blob=True)
def test_a_connection_is_like_plain_tcp(
    tmp_path_factory: pytest.TempPathFactory,
    authority: Authority,
    max_frame: int,
    slow: list[bool],
    history: list[Step],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hbone, "MAX_FRAME_SIZE", max_frame)
        plane.run(live_through(tmp_path_factory.getbasetemp() / "pair", authority, slow, history))


async def live_through(directory: Path, authority: Authority, slow: list[bool], history: list[Step]) -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server((DB_ADDRESS, 0)) as listener:
        listener.setblocking(False)
        async with running_pair(directory, authority, listener.getsockname()[1]) as pair:
            before = descriptors()
            connections: list[Ends] = []
            for number, small in enumerate(slow):
                caller = pair.dial()
                async with asyncio.timeout(PATIENCE_S):
                    served, _ = await loop.sock_accept(listener)
                for sock in (caller, served):
                    sock.setblocking(False)
                    if small:
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)
                connections.append((End(caller, number * 1001), End(served, 500_000 + number * 1001)))
            if any(slow):
                await make_narrow(pair, len(slow))
            was_cut = await act(pair, connections, history)
            await to_the_end(connections)
            for ends in connections:
                check(ends, was_cut)
                for end in ends:
                    end.sock.close()
            await nothing_is_left(pair, before)
            if not was_cut:
                clean = [c for c in connections if not any(end.was_reset or end.gone for end in c)]
                ended = [record.flag for record in pair.web.telemetry.ended]
                assert ended.count(Flag.NONE) >= len(clean)


async def make_narrow(pair: Pair, count: int) -> None:
    """Small buffers in the proxies, too, so that bytes wait in them and not in the kernel."""
    for _ in range(1000):
        if len(pair.web.connections) == len(pair.db.connections) == count:
            break
        await asyncio.sleep(0.001)
    for proxy in (pair.web, pair.db):
        for live in proxy.connections._live:
            assert live.relay._sock is not None
            live.relay._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
    for carrier in (*pair.web.pool.tunnels(), *pair.db.inbound.server.tunnels()):
        carrier._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)


async def act(pair: Pair, connections: list[Ends], history: list[Step]) -> bool:
    """Whether a tunnel was broken on the way."""
    was_cut = False
    frozen: set[int] = set()
    for what, number, side, size in history:
        end = connections[number % len(connections)][side]
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
            case "cut":
                was_cut = True
                for carrier in pair.web.pool.tunnels():
                    with contextlib.suppress(OSError):  # it is broken already
                        carrier._sock.shutdown(socket.SHUT_RDWR)  # as a network that gives up
            case "freeze":
                freeze(pair, side, plane.READ if side in frozen else 0)
                frozen ^= {side}
            case _:
                await asyncio.sleep(0.001 * (size % 4))
    for side in frozen:
        freeze(pair, side, plane.READ)
    return was_cut


def freeze(pair: Pair, side: int, events: int) -> None:
    """One proxy reads no tunnel, or reads them again."""
    for carrier in (pair.web.pool.tunnels(), pair.db.inbound.server.tunnels())[side]:
        carrier.plane.rearm(carrier._sock.fileno(), events | (plane.WRITE if carrier.blocked else 0))


async def to_the_end(connections: list[Ends]) -> None:
    """Everybody says what is left to say, and reads until there is no more."""
    deadline = time.monotonic() + PATIENCE_S
    for ends in connections:
        for end in ends:
            end.say_end()
    while waiting := [end for ends in connections for end in ends if not end.done]:
        assert time.monotonic() < deadline, f"somebody waits for good: {waiting}"
        moved = [end.read(1 << 20) for end in waiting]  # each of them, not only up to the first that has something
        await asyncio.sleep(0 if any(moved) else 0.001)


def check(ends: Ends, was_cut: bool) -> None:
    for writer, reader in (ends, ends[::-1]):
        assert writer.content.startswith(reader.received), "the content differs"
        if reader.saw_end:
            assert writer.said_end, "an end that nobody said"
            assert len(reader.received) == writer.sent, "it was cut short, and looks whole"
        if not was_cut and not any(end.gone for end in ends):
            assert reader.saw_end, "an error that nobody made"
            assert not reader.saw_error


async def nothing_is_left(pair: Pair, before: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        tunnels = [*pair.web.pool.tunnels(), *pair.db.inbound.server.tunnels()]
        left = [
            *pair.plane.tasks,
            *pair.web.connections.records(),
            *pair.db.connections.records(),
            *(stream for carrier in tunnels for stream in carrier.connection.streams),
            *(relay for carrier in tunnels for relay in carrier.starved),
        ]
        # A tunnel has a descriptor at each end.
        extra = descriptors() - before - len(tunnels)
        if not left and extra <= 0:
            return
        assert time.monotonic() < deadline, f"left: {left}, {extra} descriptors"
        await asyncio.sleep(0.002)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
