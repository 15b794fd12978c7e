"""Floods, as fast as one core can send them, against a running uProxy: memory stays, and others are still served.

`make test` gives each a second; `make soak` a minute (FLOOD_SECONDS). The flooder dials again whenever it is cut off.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count

import pytest

from benchmarks import pairs
from benchmarks.pairs import APP, DB_ADDRESS
from control.api.address import HBONE_PORT
from tests.support import hbone as raw
from tests.support.envoy import assert_no_bug_was_logged, descriptors, resident_mb
from tests.support.hbone import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    HEADERS,
    PING,
    PRIORITY,
    RST_STREAM,
    WINDOW_UPDATE,
    frame,
    literal_block,
    settings,
    u32,
)
from tests.support.raw_peer import PATIENCE_S, Peer, Server, context

pytestmark = pytest.mark.root

SECONDS = float(os.environ.get("FLOOD_SECONDS", "60"))
MAX_GROWTH_MB = 16.0
BUSY_P99 = 2.0
MAX_P99_S = 0.02
"""Of another peer's round trips: so many times that beside as many busy processes that leave the proxy alone, or, where
that is less, so much. With two processors it is these processes that make most of it."""
CONNECT = literal_block([(b":method", b"CONNECT"), (b":authority", f"{DB_ADDRESS}:{APP[1]}".encode())])
NOBODY = literal_block([(b":method", b"CONNECT"), (b":authority", f"{DB_ADDRESS}:1".encode())])
_CHUNK = 64 << 10


def endless(one: bytes, first: bytes = b"") -> Callable[[], Iterator[bytes]]:
    """Hello, `first`, and then the same frames for ever."""
    chunk = one * max(1, _CHUNK // len(one))

    def parts() -> Iterator[bytes]:
        yield raw.CLIENT_HELLO + first
        while True:
            yield chunk

    return parts


def streams(after: Callable[[int], bytes], block: bytes = CONNECT) -> Callable[[], Iterator[bytes]]:
    """A request on each stream there is, and what follows it."""

    def parts() -> Iterator[bytes]:
        yield raw.CLIENT_HELLO
        for first in count(1, 1000):
            yield b"".join(frame(HEADERS, END_HEADERS, i, block) + after(i) for i in range(first, first + 1000, 2))

    return parts


def bomb() -> Iterator[bytes]:
    """A byte for each header, of the longest that the static table has."""
    yield raw.CLIENT_HELLO
    for stream_id in count(1, 2):
        yield frame(HEADERS, END_HEADERS, stream_id, b"\x20" + b"\x90" * 16_000)


FLOODER = ("10.77.0.3", 0)
OPEN = frame(HEADERS, END_HEADERS, 1, CONNECT)
FLOODS: dict[str, Callable[[], Iterator[bytes]]] = {
    "rapid reset": streams(lambda i: frame(RST_STREAM, 0, i, u32(8))),
    "requests that are refused": streams(lambda i: b"", NOBODY),
    "CONTINUATION": endless(frame(CONTINUATION, 0, 1, b"\x00"), frame(HEADERS, 0, 1, CONNECT)),
    "PING": endless(frame(PING, 0, 0, bytes(8))),
    "SETTINGS": endless(settings([(4, 70_000)])),
    "PRIORITY": endless(frame(PRIORITY, 0, 1, u32(0) + b"a")),
    "empty DATA": endless(frame(DATA, 0, 1), OPEN),
    "windows": endless(frame(WINDOW_UPDATE, 0, 1, u32(1)) + frame(WINDOW_UPDATE, 0, 0, u32(1)), OPEN),
    "windows of streams": endless(settings([(4, 0)]) + settings([(4, 65_535)]), OPEN),
    "header bomb": bomb,
    "unknown frames": endless(frame(0x42, 0, 0, bytes(32))),
}
HANDSHAKES = "handshakes"
"""That begin, and whose peer is gone before it was proved."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    with (
        pairs.wire(tmp_path_factory.mktemp("wire"), extra=("mallory",)) as wire,
        pairs.uproxy_server(wire) as process,
        wire.db.listen(APP, PATIENCE_S) as listener,
    ):
        # The flooder has an address of its own, as every workload: who floods is kept out by it.
        wire.web.ip("address", "add", f"{FLOODER[0]}/32", "dev", "wire")
        over = threading.Event()
        serving = threading.Thread(target=echo, args=(listener, over))
        serving.start()
        try:
            yield Server(wire, process.pid, listener)
        finally:
            over.set()
            serving.join()
        assert_no_bug_was_logged(wire)


def echo(listener: socket.socket, over: threading.Event) -> None:
    """Send back what the first who speaks says; whoever says nothing is let go."""
    listener.settimeout(0.1)
    threads: list[threading.Thread] = []
    while not over.is_set():
        with suppress(OSError):
            application, _ = listener.accept()
            threads.append(threading.Thread(target=serve, args=(application,), daemon=True))
            threads[-1].start()
    for thread in threads:
        thread.join(timeout=PATIENCE_S)


def serve(application: socket.socket) -> None:
    with application, suppress(OSError):
        application.settimeout(PATIENCE_S)
        application.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := application.recv(1 << 16):
            application.sendall(data)


def round_trips(peer: Peer, seconds: float) -> list[float]:
    """Seconds that each took, of one every five milliseconds."""
    taken: list[float] = []
    end = time.monotonic() + seconds
    wanted = len(peer.answers[1].data)
    while (began := time.monotonic()) < end:
        peer.send(frame(DATA, 0, 1, b"x"))
        wanted += 1
        peer.until(lambda: len(peer.answers[1].data) >= wanted)  # noqa: B023 - it is called at once
        assert not peer.closed, peer.goaways
        taken.append(time.monotonic() - began)
        time.sleep(0.005)
    return taken


def flood(tls: ssl.SSLContext, dialled: Callable[[], socket.socket], name: str, end: float, cut: object) -> None:
    """In a process of its own: dial, flood, and dial again when cut off."""
    if name == HANDSHAKES:
        begin_handshakes(tls, dialled, end)
        return
    while time.monotonic() < end:
        with suppress(OSError), dialled() as tcp, tls.wrap_socket(tcp) as channel:
            channel.settimeout(1.0)
            for part in FLOODS[name]():
                if time.monotonic() > end:
                    return
                channel.sendall(part)
        with cut.get_lock():  # type: ignore[attr-defined]
            cut.value += 1  # type: ignore[attr-defined]
        time.sleep(0.002)


def begin_handshakes(tls: ssl.SSLContext, dialled: Callable[[], socket.socket], end: float) -> None:
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        tls.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    hello = outgoing.read()
    while time.monotonic() < end:
        with suppress(OSError), dialled() as tcp:
            tcp.sendall(hello)
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # no TIME_WAIT uses ports up


def dial(server: Server) -> socket.socket:
    with server.wire.web.entered():
        made = socket.socket()
    made.settimeout(PATIENCE_S)
    made.bind(FLOODER)
    made.connect((DB_ADDRESS, HBONE_PORT))
    return made


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def spin(end: float) -> None:
    while time.monotonic() < end:
        pass


def beside_busy_processes(peer: Peer, seconds: float) -> list[float]:
    """Round trips while as many processes are busy as in a flood: one that sends, one that answers."""
    busy = [multiprocessing.get_context("fork").Process(target=spin, args=(time.monotonic() + seconds,)) for _ in "ab"]
    for process in busy:
        process.start()
    try:
        return round_trips(peer, seconds)
    finally:
        for process in busy:
            process.kill()
            process.join()


def withstand(server: Server, name: str, seconds: float) -> tuple[float, float, int]:
    """p99 of another peer on a busy machine and during a flood (seconds), and how often the flooder was cut off."""
    with server.peer() as peer:
        assert peer.ask([(b":method", b"CONNECT"), (b":authority", f"{DB_ADDRESS}:{APP[1]}".encode())]).status == b"200"
        busy = beside_busy_processes(peer, min(seconds, 5.0))
        memory, files = resident_mb(server.pid), descriptors(server.pid)
        cut = multiprocessing.get_context("fork").Value("i", 0)
        flooder = multiprocessing.get_context("fork").Process(
            target=flood,
            args=(context(server.wire, "mallory"), lambda: dial(server), name, time.monotonic() + seconds, cut),
        )
        flooder.start()
        try:
            loaded = round_trips(peer, seconds)
        finally:
            flooder.join(PATIENCE_S)
            flooder.kill()
        assert resident_mb(server.pid) - memory < MAX_GROWTH_MB
        deadline = time.monotonic() + PATIENCE_S
        while descriptors(server.pid) > files and time.monotonic() < deadline:
            time.sleep(0.05)
        assert descriptors(server.pid) <= files
    # Whoever reads the answers may ask for as much as he likes; whoever does not is ended when enough of them wait.
    assert cut.value > 0 or name in ("requests that are refused", HANDSHAKES), "nobody ended it"
    return percentile(busy, 0.99), percentile(loaded, 0.99), cut.value


@pytest.mark.parametrize("name", [*FLOODS, HANDSHAKES])
def test_a_flood_is_cut_off_and_costs_no_memory(server: Server, name: str):
    withstand(server, name, 1.0)


@pytest.mark.soak
@pytest.mark.timeout(SECONDS * 2 + 120)
@pytest.mark.parametrize("name", [*FLOODS, HANDSHAKES])
def test_a_long_flood_leaves_others_served(server: Server, name: str):
    busy, loaded, times = withstand(server, name, SECONDS)
    print(f"{name}: p99 {busy * 1e6:.0f} -> {loaded * 1e6:.0f} us, cut off {times} times")
    assert loaded < max(BUSY_P99 * busy, MAX_P99_S)
