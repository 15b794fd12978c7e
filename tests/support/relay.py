"""A TCP relay between a client and a broker, which can be made to fail: cut, silent, slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.brokers import HOST
from tests.support.waiting import until


class Relay:
    """Passes bytes both ways until told otherwise."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self._target = target
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._refusing = False
        self.bytes_per_s: float | None = None
        """How quick the way from the target is; None: unlimited."""
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"mqtts://{HOST}:{self.port}"

    def cut(self) -> None:
        """Reset every connection."""
        for writer in list(self._open):
            writer.transport.abort()

    def partition(self) -> None:
        """Let nothing through, in either direction, without telling anybody; new connections hang too."""
        self._flowing.clear()

    def refuse(self, refusing: bool = True) -> None:
        """Reset connections, and every new one too."""
        self._refusing = refusing
        if refusing:
            self.cut()

    def heal(self) -> None:
        """Let through what was held, and what is to come."""
        self._refusing = False
        self._flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(HOST, self._target)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, far_writer}
        self._open |= ends
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, far_writer, limited=False))
                group.create_task(self._pass(far_reader, writer, limited=True))
        except* OSError:
            pass
        finally:
            self._open -= ends
            for each in ends:
                each.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, limited: bool) -> None:
        while data := await reader.read(65536):
            await self._flowing.wait()
            if limited and self.bytes_per_s is not None:
                await asyncio.sleep(len(data) / self.bytes_per_s)
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError  # one end is enough to end both: MQTT has no half-closed connections


@asynccontextmanager
async def relay(target: int) -> AsyncIterator[Relay]:
    """A relay to a port of this machine, at a port of its own."""
    made = Relay(target)
    server = await asyncio.start_server(made._serve, HOST, 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        made.heal()
        made.cut()
        await server.wait_closed()
        await until(lambda: not made._open)
