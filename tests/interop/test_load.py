"""Much at once through a pair of uProxies: everything arrives, memory stays bounded, nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import time
from dataclasses import dataclass

import pytest

from benchmarks import pairs
from benchmarks.pairs import APP, Wire
from tests.support.envoy import (
    PATIENCE_S,
    Tunnel,
    assert_no_bug_was_logged,
    descriptors,
    ended_how,
    fill,
    pattern,
    read_exactly,
    read_to_end,
    resident_mb,
)

pytestmark = pytest.mark.root
MIB = 1 << 20


@dataclass
class Pair(Tunnel):
    """A pair of uProxies with their process ids."""

    pids: tuple[int, int] = (0, 0)


@pytest.fixture
def pair(tmp_path):
    with (
        pairs.wire(tmp_path) as wire,
        pairs.uproxy_server(wire) as server,
        pairs.uproxy_client(wire) as client,
        wire.db.listen(APP, PATIENCE_S) as listener,
    ):
        yield Pair("uproxy", "uproxy", wire, listener, (client.pid, server.pid))
        assert_no_bug_was_logged(wire)


def gauges(wire: Wire, name: str) -> dict[str, float]:
    """uProxy's own gauges, from its metrics port."""
    namespace = wire.web if name == "web" else wire.db
    address = pairs.WEB_ADDRESS if name == "web" else pairs.DB_ADDRESS
    with namespace.connect((address, 15020), 5) as made:
        made.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        text = b""
        while part := made.recv(1 << 16):
            text += part
    found = {}
    for line in text.decode().splitlines():
        if line.startswith("uproxy_"):
            key, _, value = line.rpartition(" ")
            found[key] = float(value)
    return found


def settles(probe, wanted, for_s: float = 10.0):
    """The last value of `probe()`, once `wanted` likes it or time is up."""
    deadline = time.monotonic() + for_s
    while not wanted(value := probe()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


def test_a_hundred_megabytes_each_way_over_20_connections_one_of_them_with_a_slow_reader(pair: Pair):
    """Content equal, memory bounded, and the slow one slows nobody else (issue: "must show")."""
    each = 5 * MIB
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(pair.connected()) for _ in range(20)]
        data = [(pattern(each, 2 * i), pattern(each, 2 * i + 1)) for i in range(20)]
        before = [resident_mb(pid) for pid in pair.pids]
        peaks = list(before)
        to_send: dict[socket.socket, memoryview] = {}
        expected: dict[socket.socket, bytes] = {}
        got: dict[socket.socket, bytearray] = {}
        slow = ends[7][1]
        with selectors.DefaultSelector() as selector:
            for (near, far), (there, back) in zip(ends, data, strict=True):
                for end, out, into in ((near, there, back), (far, back, there)):
                    end.setblocking(False)
                    to_send[end], expected[end], got[end] = memoryview(out), into, bytearray()
                    selector.register(end, selectors.EVENT_READ | selectors.EVENT_WRITE)
            quick = [end for end in got if end is not slow]
            deadline, next_slow_read, done_at = time.monotonic() + 60, 0.0, 0.0
            while selector.get_map():
                assert time.monotonic() < deadline, "nothing moves any more"
                for key, events in selector.select(0.05):
                    end = key.fileobj
                    if events & selectors.EVENT_WRITE:
                        sent = end.send(to_send[end][: 256 << 10])
                        to_send[end] = to_send[end][sent:]
                    # A trickle while the others run; what is left afterwards goes at full speed.
                    trickles = end is slow and not done_at
                    if events & selectors.EVENT_READ and not (trickles and time.monotonic() < next_slow_read):
                        got[end] += end.recv(4096 if trickles else MIB)
                        if trickles:
                            next_slow_read = time.monotonic() + 0.02
                    wants = (selectors.EVENT_WRITE if to_send[end] else 0) | (
                        selectors.EVENT_READ if len(got[end]) < each else 0
                    )
                    if not wants:
                        selector.unregister(end)
                    elif wants != key.events:
                        selector.modify(end, wants)
                peaks = [max(peak, resident_mb(pid)) for peak, pid in zip(peaks, pair.pids, strict=True)]
                if not done_at and all(len(got[end]) == each for end in quick):
                    done_at = time.monotonic()
                    assert len(got[slow]) < each, "the slow reader was not slow"
        assert all(got[end] == expected[end] for end in got)
        # One stream window per direction and connection, and the buffers of one tunnel.
        assert max(after - first for after, first in zip(peaks, before, strict=True)) < 40


def test_two_thousand_connections_leave_nothing_behind(pair: Pair):
    def one(number: int) -> None:
        with pair.connected() as (near, far):
            near.sendall(number.to_bytes(4, "big"))
            assert read_exactly(far, 4) == number.to_bytes(4, "big")
            if number % 5 == 0:  # some are reset, from either end
                end = near if number % 2 else far
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")

    for number in range(100):
        one(number)
    before = settles(lambda: [descriptors(pid) for pid in pair.pids], lambda _: False, 0.5)
    memory = [resident_mb(pid) for pid in pair.pids]
    for number in range(2000):
        one(number)
    assert settles(lambda: [descriptors(pid) for pid in pair.pids], lambda now: now <= before) == before
    for name in ("web", "db"):
        assert settles(lambda name=name: gauges(pair.wire, name)["uproxy_tasks"], lambda now: now == 0) == 0
    assert max(resident_mb(pid) - first for pid, first in zip(pair.pids, memory, strict=True)) < 8


def test_a_thousand_idle_connections_cost_little_and_all_still_work(pair: Pair):
    before = [resident_mb(pid) for pid in pair.pids]
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(pair.connected()) for _ in range(1000)]
        assert max(resident_mb(pid) - first for pid, first in zip(pair.pids, before, strict=True)) < 25
        for number, (near, _) in enumerate(ends):
            near.sendall(number.to_bytes(4, "big"))
        for number, (_, far) in enumerate(ends):
            assert read_exactly(far, 4) == number.to_bytes(4, "big")


def test_many_readers_that_stop_hold_a_bounded_amount(pair: Pair):
    """50 connections whose applications never read: some have the large window by then, most the small one."""
    before = [resident_mb(pid) for pid in pair.pids]
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(pair.connected()) for _ in range(50)]
        for near, _ in ends:
            fill(near, quiet_s=0.03)
        grown = [resident_mb(pid) - first for pid, first in zip(pair.pids, before, strict=True)]
        assert max(grown) < 16 * 1 + 34 / 4 + 10
        near, far = stack.enter_context(pair.connected())
        near.sendall(b"still here")
        assert read_exactly(far, 10) == b"still here"


def test_a_killed_proxy_ends_every_connection_with_a_reset(pair: Pair):
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(pair.connected()) for _ in range(10)]
        os.kill(pair.pids[1], signal.SIGKILL)
        assert {ended_how(near) for near, _ in ends} == {"reset"}


def test_a_drain_lets_open_connections_finish_and_refuses_new_ones(pair: Pair):
    with pair.connected() as (near, far):
        near.sendall(b"question")
        assert read_exactly(far, 8) == b"question"
        os.kill(pair.pids[1], signal.SIGTERM)
        time.sleep(0.3)
        far.sendall(b"answer")
        far.close()
        assert read_to_end(near) == b"answer"
        near.close()
    assert pair.refused_how() == "reset"
    log = pair.wire.directory / "web" / "access.log"
    first = settles(log.read_text, lambda text: "\n" in text).splitlines()[0]
    assert "error" not in json.loads(first)
