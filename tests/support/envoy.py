"""Tunnels between two workloads, with a real Envoy or a real uProxy at either end, for tests to talk through."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from benchmarks import pairs
from benchmarks.pairs import APP_PORT, ENTRY, Wire

# Long enough for a loaded machine; nothing that works takes a tenth of it.
PATIENCE_S = 40.0
CLIENTS = {"envoy": pairs.envoy_client, "uproxy": pairs.uproxy_client}
SERVERS = {"envoy": pairs.envoy_server, "uproxy": pairs.uproxy_server}


@dataclass
class Tunnel:
    """A way from web to db's application: `connect` gives both ends of a new connection through it."""

    client: str
    server: str
    wire: Wire
    listener: socket.socket

    def dial(self) -> socket.socket:
        """web's end only: the tunnel may or may not get as far as the application."""
        return self.wire.web.connect(ENTRY, PATIENCE_S)

    def refused_how(self) -> str:
        """Dial, and wait for the end: "fin" or "reset". A quick reset may come before connect() has returned."""
        try:
            with self.dial() as near:
                return ended_how(near)
        except ConnectionResetError:
            return "reset"

    def accept(self) -> socket.socket:
        end, _ = self.listener.accept()
        end.settimeout(PATIENCE_S)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return end

    @contextmanager
    def without_application(self) -> Iterator[None]:
        """Nobody listens at the application's port meanwhile."""
        self.listener.close()
        try:
            yield
        finally:
            self.listener = self.wire.db.listen((self.wire.db_address, APP_PORT), PATIENCE_S)

    def tunnels(self) -> object:
        """web's tunnels with their windows, as its uProxy tells; nothing from an Envoy."""
        if self.client != "uproxy":
            return None
        with self.wire.web.entered():
            asked = http.client.HTTPConnection("127.0.0.1", 15000, timeout=PATIENCE_S)
            asked.connect()
        with contextlib.closing(asked):
            asked.request("GET", "/config_dump")
            return json.load(asked.getresponse())["tunnels"]

    @contextmanager
    def connected(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        with self.dial() as near, self.accept() as far:
            yield near, far


@contextmanager
def tunnel(
    client: str,
    server: str,
    directory: Path,
    addresses: tuple[str, str] = (pairs.WEB_ADDRESS, pairs.DB_ADDRESS),
    **options: object,
) -> Iterator[Tunnel]:
    """Start both proxies on a wire of their own; `client_…` and `server_…` options go to the one or the other."""
    of_client = {k.removeprefix("client_"): v for k, v in options.items() if k.startswith("client_")}
    of_server = {k.removeprefix("server_"): v for k, v in options.items() if k.startswith("server_")}
    with (
        pairs.wire(directory, addresses=addresses) as wire,
        SERVERS[server](wire, **of_server),
        CLIENTS[client](wire, **of_client),
    ):
        made = Tunnel(client, server, wire, wire.db.listen((wire.db_address, APP_PORT), PATIENCE_S))
        try:
            yield made
            assert_no_bug_was_logged(wire)
        finally:
            made.listener.close()


def assert_no_bug_was_logged(wire: Wire) -> None:
    """Whatever a peer does, a uProxy handles it; what it does not handle, it logs with a traceback."""
    for path in wire.directory.glob("*/uproxy.log"):
        text = path.read_text()
        start = text.find("Traceback")
        assert start < 0, text[max(start - 200, 0) : start + 3000]


# -- talking through a connection, with every wait bounded


def read_exactly(end: socket.socket, length: int) -> bytes:
    received = bytearray()
    while len(received) < length:
        part = end.recv(min(1 << 20, length - len(received)))
        assert part, f"end of stream after {len(received)} of {length} bytes"
        received += part
    return bytes(received)


def read_to_end(end: socket.socket) -> bytes:
    """Everything up to the FIN. A reset raises ConnectionResetError."""
    parts = []
    while part := end.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def ended_how(end: socket.socket) -> str:
    """How a connection ended from here: "fin" or "reset"."""
    try:
        while end.recv(1 << 16):
            pass
    except ConnectionResetError:
        return "reset"
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "fin"


def reset(end: socket.socket) -> None:
    """Close with RST."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    end.close()


def silent(end: socket.socket, for_s: float = 0.2) -> bool:
    """Whether nothing arrives, no FIN either."""
    return not select.select([end], [], [], for_s)[0]


def pattern(length: int, seed: int) -> bytes:
    """Bytes in which a lost, doubled or swapped piece shows."""
    block = bytearray()
    for i in range(64):
        block += sha256(f"{seed} {i}".encode()).digest() * 32
    whole = bytes(block)
    return b"".join(index.to_bytes(8, "big") + whole for index in range(length // (len(whole) + 8) + 1))[:length]


class Sender(threading.Thread):
    """Sends in the background, then half-closes if asked to. `join` raises what went wrong."""

    def __init__(self, end: socket.socket, data: bytes, *, finish: bool = True) -> None:
        super().__init__(daemon=True)
        self._end, self._data, self._finish = end, data, finish
        self._error: OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            self._end.sendall(self._data)
            if self._finish:
                self._end.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._error = error

    def done(self) -> None:
        self.join(PATIENCE_S)
        assert not self.is_alive(), "the sender is stuck"
        if self._error is not None:
            raise self._error


def fill(end: socket.socket, quiet_s: float = 0.5, limit: int = 1 << 30) -> int:
    """Write until the path takes no more for a while: how much it holds."""
    end.setblocking(False)
    block, sent, since = bytes(1 << 16), 0, time.monotonic()
    while time.monotonic() - since < quiet_s and sent < limit:
        with contextlib.suppress(BlockingIOError):
            sent += end.send(block)
            since = time.monotonic()
            continue
        select.select([], [end], [], 0.05)
    end.settimeout(PATIENCE_S)
    return sent


def descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"process {pid} is gone")
