"""Much data, a slow reader, and many connections: everything arrives, and nothing stays behind."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.mesh.conftest import PEER, Mesh
from tests.support import inside

_CONNECTIONS = 20
# Bytes per connection and direction, 100 MB in all. The slow one has more than all kernel buffers on the way hold.
_SLOW, _EACH = 24_000_000, 4_000_000
# What a uProxy may hold for 19 busy streams and one whose reader sleeps: windows, and pieces that are on their way.
_GROWTH_MB = 16


class TestBulk:
    """100 MB each way at once over 20 connections; on one of them the reader sleeps until the others are done."""

    def test_content_is_equal_and_memory_bounded(self, mesh: Mesh) -> None:
        payloads = [random.Random(number).randbytes(_EACH if number else _SLOW) for number in range(_CONNECTIONS)]
        received: dict[int, str] = {}
        others_done = threading.Event()
        slow_senders: list[threading.Thread] = []

        def serve(connection: socket.socket) -> None:
            """Read the number of the connection, then send and read its payload at once."""
            number = connection.recv(1)[0]
            sender = threading.Thread(target=_send, args=(connection, payloads[number]))
            sender.start()
            if number == 0:
                others_done.wait(60)
            received[number] = _digest_to_the_end(connection)
            sender.join()

        def call(number: int) -> str:
            with inside.dial(mesh.caller, PEER, timeout_s=60) as made:
                made.sendall(bytes([number]))
                sender = threading.Thread(target=_send, args=(made, payloads[number]))
                if number == 0:
                    slow_senders.append(sender)
                sender.start()
                digest = _digest_to_the_end(made)
                sender.join()
                return digest

        proxies = [mesh.caller.proxy_pid(), mesh.peer.proxy_pid()]
        with inside.serving(mesh.peer, PEER[1], serve), _peaks(proxies) as peaks:
            before = [inside.resident_mb(pid) for pid in proxies]
            with ThreadPoolExecutor(_CONNECTIONS) as pool:
                slow, *others = [pool.submit(call, number) for number in range(_CONNECTIONS)]
                answers = {number: other.result(90) for number, other in enumerate(others, 1)}
                assert slow_senders[0].is_alive(), "nothing held back the sender whose reader sleeps"
                others_done.set()
                answers[0] = slow.result(60)
            inside.eventually(lambda: len(received) == _CONNECTIONS)
        expected = {number: hashlib.blake2b(payload).hexdigest() for number, payload in enumerate(payloads)}
        assert answers == expected
        assert received == expected
        grown = [peak - start for peak, start in zip(peaks, before, strict=True)]
        assert max(grown) < _GROWTH_MB, f"the uProxies grew by {grown} MB"


def _send(connection: socket.socket, payload: bytes) -> None:
    connection.sendall(payload)
    connection.shutdown(socket.SHUT_WR)


def _digest_to_the_end(connection: socket.socket) -> str:
    digest = hashlib.blake2b()
    while piece := connection.recv(262_144):
        digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _peaks(pids: list[int]) -> Iterator[list[float]]:
    """The highest resident memory of each process, in 10^6 bytes, seen while the block runs."""
    peaks = [0.0] * len(pids)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            peaks[:] = [max(peak, inside.resident_mb(pid)) for peak, pid in zip(peaks, pids, strict=True)]

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        ended.set()
        watcher.join()


class TestChurn:
    """2,000 connections, opened and closed in every way that an application has."""

    _COUNT = 2_000
    _AT_ONCE = 100

    def test_nothing_stays_behind(self, mesh: Mesh) -> None:
        with inside.serving(mesh.peer, PEER[1], inside.echo):
            self._round(mesh, self._AT_ONCE)  # warm: tunnels, buffers and code are there
            self._settled(mesh)
            before = self._held(mesh)
            for _ in range(self._COUNT // self._AT_ONCE):
                self._round(mesh, self._AT_ONCE)
            self._settled(mesh)
        after = self._held(mesh)
        # A tunnel more is no leak: how many a burst needs depends on the moment.
        assert all(after[name] <= before[name] + 4 for name in before), f"{before} -> {after}"
        inside.eventually(lambda: self._map_entries(mesh) == 0)

    def _round(self, mesh: Mesh, count: int) -> None:
        made = mesh.caller.sockets(count)
        for one in made:
            one.setblocking(False)
            one.connect_ex(PEER)
        for number, one in enumerate(made):
            one.settimeout(20)
            match number % 4:
                case 0:  # an exchange, and an orderly end
                    self._exchange(one)
                    one.shutdown(socket.SHUT_WR)
                    assert one.recv(1) == b""
                case 1:  # an exchange, then a reset
                    self._exchange(one)
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                case 2:  # closed with the answer unread
                    one.sendall(b"x")
                case _:  # closed while it connects
                    pass
            one.close()

    def _exchange(self, one: socket.socket) -> None:
        one.sendall(b"ping")
        assert one.recv(4) == b"ping"

    def _settled(self, mesh: Mesh) -> None:
        """Wait until no connection is open or being set up at either end."""
        for workload in (mesh.caller, mesh.peer):
            inside.eventually(lambda workload=workload: inside.metric(workload, "uproxy_tasks") == 0, 30)

    def _held(self, mesh: Mesh) -> dict[str, int]:
        """Descriptors of both proxies."""
        workloads = (mesh.caller, mesh.peer)
        last = {}
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            now = {workload.name: inside.descriptors(workload.proxy_pid()) for workload in workloads}
            if now == last:
                return now
            last = now
            time.sleep(0.3)
        pytest.fail(f"descriptors keep changing: {last}")

    def _map_entries(self, mesh: Mesh) -> int:
        """Captured connections that the kernel maps still hold, on either host."""
        return sum(int(host.node().status()["pending"]) for host in mesh.lab.hosts)
