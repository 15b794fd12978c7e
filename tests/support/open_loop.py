"""Connections begun on a schedule, whatever becomes of those before them: what a caller sees while others die."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from benchmarks.lab.topology import Workload
from tests.support import inside

_TIMEOUT_S = 30.0
_AT_ONCE = 100  # sockets that one message carries
_BEAT_S = 0.05


@dataclass
class Load:
    """Exchanges of one caller with one address. Each is a connection: `payload` there and back, then the end."""

    target: tuple[str, int]
    payload: bytes
    spare: list[socket.socket]
    outcomes: Counter[str] = field(default_factory=Counter)
    """"ok", "truncated", "wrong", or the error's name."""
    broken: list[str] = field(default_factory=list)
    """What ended connections that were held all along."""
    beats: int = 0
    """Exchanges on those."""

    @property
    def done(self) -> int:
        return sum(self.outcomes.values())

    async def run(self, rate: float, held: int, until: threading.Event) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            for _ in range(held):
                group.create_task(self._hold(self.spare.pop(), until))
            due = loop.time()
            while not until.is_set() and self.spare:
                group.create_task(self._exchange(self.spare.pop()))
                due += 1 / rate
                await asyncio.sleep(max(0.0, due - loop.time()))

    async def _exchange(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with sock:
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    await loop.sock_connect(sock, self.target)
                    await loop.sock_sendall(sock, self.payload)
                    sock.shutdown(socket.SHUT_WR)
                    answer = b""
                    while received := await loop.sock_recv(sock, 65536):
                        answer += received
            except OSError as error:  # TimeoutError is one
                self.outcomes[type(error).__name__] += 1
                return
        if answer == self.payload:
            self.outcomes["ok"] += 1
        else:
            self.outcomes["truncated" if self.payload.startswith(answer) else "wrong"] += 1

    async def _hold(self, sock: socket.socket, until: threading.Event) -> None:
        loop = asyncio.get_running_loop()
        with sock:
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    await loop.sock_connect(sock, self.target)
                while not until.is_set():
                    async with asyncio.timeout(_TIMEOUT_S):
                        await loop.sock_sendall(sock, self.payload)
                        answer = b""
                        while len(answer) < len(self.payload):
                            received = await loop.sock_recv(sock, 65536)
                            if not received:
                                raise EOFError("the end came early")
                            answer += received
                    assert answer == self.payload
                    self.beats += 1
                    await asyncio.sleep(_BEAT_S)
            except (OSError, EOFError) as error:
                self.broken.append(repr(error))


@contextmanager
def running(
    pairs: Sequence[tuple[Workload, Workload, tuple[str, int]]],
    payload: bytes,
    *,
    rate: float,
    held: int,
    most_s: float,
) -> Iterator[list[Load]]:
    """Load from each caller to each peer's address while the block runs, for `most_s` at the longest.

    `rate`: connections a second of each pair; `held`: connections of each pair that are kept open and used.
    """
    loads = []
    for caller, _, target in pairs:
        family = inside.family_of(target)
        wanted = held + int(rate * most_s)
        spare = []
        while len(spare) < wanted:
            spare += caller.sockets(min(_AT_ONCE, wanted - len(spare)), family)
        for sock in spare:
            sock.setblocking(False)
        loads.append(Load(target, payload, spare))
    listeners = [inside.listen(peer, target[1]) for _, peer, target in pairs]
    until = threading.Event()

    async def serve(listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        async with asyncio.TaskGroup() as group:
            while True:
                connection, _ = await loop.sock_accept(listener)
                group.create_task(_echo(connection))

    async def work() -> None:
        async with asyncio.TaskGroup() as servers:
            serving = [servers.create_task(serve(listener)) for listener in listeners]
            async with asyncio.TaskGroup() as group:
                for load in loads:
                    group.create_task(load.run(rate, held, until))
            for task in serving:
                task.cancel()

    thread = threading.Thread(target=asyncio.run, args=(work(),))
    thread.start()
    try:
        yield loads
    finally:
        until.set()
        thread.join(2 * _TIMEOUT_S)
        for sock in [*listeners, *(one for load in loads for one in load.spare)]:
            sock.close()
    assert not thread.is_alive()


async def _echo(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    connection.setblocking(False)
    with connection, suppress(OSError):
        while received := await loop.sock_recv(connection, 65536):
            await loop.sock_sendall(connection, received)


def wait_for(loads: Sequence[Load], more: int, timeout_s: float = 60.0) -> None:
    """Until each has that many further exchanges behind it."""
    wanted = [load.done + more for load in loads]
    deadline = time.monotonic() + timeout_s
    while any(load.done < least for load, least in zip(loads, wanted, strict=True)):
        assert time.monotonic() < deadline, [load.outcomes for load in loads]
        time.sleep(0.02)


def go_on(loads: Sequence[Load]) -> None:
    """Wait until each has had ten more answers."""
    for load in loads:
        before = load.outcomes["ok"]
        inside.eventually(lambda load=load, before=before: load.outcomes["ok"] > before + 10, 30)


def assert_refused_or_reset(loads: Sequence[Load], seed: int) -> None:
    """Whatever did not succeed was refused or reset, and never looked like an end."""
    for load in loads:
        errors = load.outcomes.keys() - {"ok"}
        # OSError: ENOTCONN, of a connection that was reset just before it was shut down.
        assert errors <= {"ConnectionRefusedError", "ConnectionResetError", "BrokenPipeError", "OSError"}, (
            f"seed {seed}: {load}"
        )
        assert not [one for one in load.broken if "EOFError" in one], f"seed {seed}: {load.broken}"
