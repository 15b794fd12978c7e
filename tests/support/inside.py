"""Clients and servers of a test, on sockets that were made inside workloads: captured as the applications' are."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.lab.topology import Host, Workload

_TIMEOUT_S = 30.0


def family_of(address: tuple[str, int]) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def dial(workload: Workload, address: tuple[str, int], timeout_s: float = _TIMEOUT_S) -> socket.socket:
    """Connect as the application of a workload."""
    (made,) = workload.sockets(1, family_of(address))
    try:
        made.settimeout(timeout_s)
        made.connect(address)
    except BaseException:
        made.close()
        raise
    return made


def listen(workload: Workload, port: int) -> socket.socket:
    """Listen as the application of a workload, on its address."""
    address = (workload.address, port)
    (made,) = workload.sockets(1, family_of(address))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(address)
    made.listen(1024)
    made.settimeout(_TIMEOUT_S)
    return made


@contextmanager
def serving(workload: Workload, port: int, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """Run `serve(connection)` in a thread per connection while the block runs."""
    listener = listen(workload, port)
    ended = threading.Event()
    threads: list[threading.Thread] = []

    def run(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(_TIMEOUT_S)
            serve(connection)

    def accept() -> None:
        listener.settimeout(0.1)
        while not ended.is_set():
            with suppress(TimeoutError):
                connection, _ = listener.accept()
                threads.append(threading.Thread(target=run, args=(connection,)))
                threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield
    finally:
        ended.set()
        for thread in (acceptor, *threads):
            thread.join(_TIMEOUT_S)
        listener.close()


def echo(connection: socket.socket) -> None:
    """Send back what comes, until the end of it."""
    while received := connection.recv(65536):
        connection.sendall(received)


def read_all(connection: socket.socket) -> bytes:
    whole = bytearray()
    while received := connection.recv(65536):
        whole += received
    return bytes(whole)


def exchange(workload: Workload, to: tuple[str, int]) -> None:
    """One connection to an echo that works, and shows the address that was dialled."""
    with dial(workload, to) as made:
        assert made.getpeername()[:2] == to
        made.sendall(b"x" * 1000)
        made.shutdown(socket.SHUT_WR)
        assert read_all(made) == b"x" * 1000


def dialled_direct(host: Host) -> int:
    """How many connections of a host went to a backend without a proxy."""
    return int(host.node().status()["counters"]["direct"])


def goes_direct(host: Host, workload: Workload, to: tuple[str, int]) -> bool:
    """Whether an exchange went without a proxy."""
    before = dialled_direct(host)
    exchange(workload, to)
    return dialled_direct(host) > before


def http_get(workload: Workload, port: int, path: str) -> str:
    """An HTTP GET on loopback of a workload's namespace, from outside of its app cgroup."""
    with workload.entered():
        made = socket.create_connection(("127.0.0.1", port), timeout=30)
    with made:
        made.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        return read_all(made).partition(b"\r\n\r\n")[2].decode()


def metric(workload: Workload, name: str) -> float:
    """The sum of a metric's series, from the workload's uProxy."""
    text = http_get(workload, 15020, "/metrics")
    found = re.findall(rf"^{name}(?:{{.*}})? ([0-9.e+-]+)$", text, re.MULTILINE)
    return sum(float(value) for value in found)


def descriptors(pid: int) -> int:
    """How many a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident_mb(pid: int) -> float:
    """Resident memory of a process (VmRSS), in 10^6 bytes."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def eventually(condition: Callable[[], bool], timeout_s: float = 40.0) -> None:
    """Wait until something is so; fails when it does not become so in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not become so within {timeout_s:g} s"
        time.sleep(0.02)
