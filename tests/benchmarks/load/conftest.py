"""The load generator, built once, and a server for it on loopback."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks import load

LOOPBACK = "127.0.0.1"


def spawn(argv: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@contextmanager
def free_ports(count: int) -> Iterator[int]:
    """The first of so many ports in a row that nothing listens on."""
    for first in range(20100, 60000, 10):
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server((LOOPBACK, port)))
            stack.close()
            yield first
            return
    raise AssertionError("no free ports")


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return load.build(tmp_path_factory.mktemp("load"))


Served = Callable[..., int]


@pytest.fixture
def served(program: Path) -> Iterator[Served]:
    """Starts our server, and gives its first port."""
    with ExitStack() as stack:

        def start(address: str = LOOPBACK, stall_ms: int = 0, every_ms: int = 0, tls: load.Tls | None = None) -> int:
            with free_ports(load.PORTS) as port:
                pass
            served = load.serving(spawn, program, address, port, stall_ms=stall_ms, every_ms=every_ms, tls=tls)
            stack.enter_context(served)
            return port

        yield start
