"""HTTP requests on a schedule, whatever becomes of those before them, by callers of every kind."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType

from tests.support.http2_peer import Http2Peer, speaking

KEPT = 4
"""Connections of HTTP/1.1 that take turns, so that each waits for a while between two requests."""
_PERIOD_S = 0.02
_TIMEOUT_S = 30.0
_SHED = -1
"""Instead of a status: the waypoint had more to do than it can, as on a machine that others use, and said so."""
HTTP2 = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"db.shop")]


class RequestLoad:
    """Runs while it is entered: at each beat one caller of each kind asks."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.done: Counter[str] = Counter()
        """Requests that were answered with 200, by kind: `kept` and `new` connections of HTTP/1.1, `http2`."""
        self.failed: list[str] = []
        self._target = target
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> RequestLoad:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    async def _run(self) -> None:
        kept = [_Connection(self._target) for _ in range(KEPT)]
        async with asyncio.TaskGroup() as group:
            group.create_task(self._speak_http2())
            number = 0
            async for _ in self._beats():
                group.create_task(self._asked("kept", kept[number % KEPT].ask))
                group.create_task(self._asked("new", self._ask_anew))
                number += 1
        for one in kept:
            one.close()

    async def _beats(self) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not self._over.is_set():
            yield
            due += _PERIOD_S
            await asyncio.sleep(max(0.0, due - loop.time()))

    async def _asked(self, kind: str, ask: Callable[[], Awaitable[int]]) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                status = await ask()
        except (OSError, EOFError, ValueError) as error:  # TimeoutError is one
            self.failed.append(f"{kind}: {error!r}")
            return
        if status == 200:
            self.done[kind] += 1
        elif status != _SHED:
            self.failed.append(f"{kind}: {status}")

    async def _ask_anew(self) -> int:
        once = _Connection(self._target)
        try:
            return await once.ask()
        finally:
            once.close()

    async def _speak_http2(self) -> None:
        """One connection, and the next one when it was told to go away."""
        while not self._over.is_set():
            async with speaking(*await asyncio.open_connection(*self._target)) as peer, asyncio.TaskGroup() as group:
                async for _ in self._beats():
                    if peer.goaways:
                        break
                    group.create_task(self._asked("http2", lambda peer=peer: _answered(peer)))


async def _answered(peer: Http2Peer) -> int:
    message = await peer.answer(peer.request(HTTP2))
    if not message.ended:
        raise ConnectionResetError("closed" if message.reset is None else f"reset with {message.reset}")
    return _SHED if (b"x-uproxy-reason", b"overload") in message.headers else message.status


class _Connection:
    """One of HTTP/1.1, and the next one when it was told that this one ends. One request at a time."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._turn = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self) -> int:
        async with self._turn:
            reader, writer = self._streams = self._streams or await asyncio.open_connection(*self._target)
            writer.write(b"GET / HTTP/1.1\r\nHost: db.shop\r\n\r\n")
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"\r\ncontent-length: ")[2].split(b"\r\n", 1)[0]))
            if b"\r\nconnection: close\r\n" in head:
                self.close()
            return _SHED if b"\r\nx-uproxy-reason: overload\r\n" in head else int(head.split(b" ", 2)[1])

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
