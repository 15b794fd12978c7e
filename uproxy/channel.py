"""Messages between the first process of a waypoint and one worker: msgpack lists with their length before them.

Both ends are this program, on a socket pair that nobody else has: a message that is not understood is a bug, and ends
the connection.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from typing import Any, Final, cast

import msgpack

MAX_MESSAGE: Final = 512 * 1024 * 1024
"""Bytes of one message, of which the largest is all of the configuration; and of what waits to be sent."""

_LENGTH: Final = struct.Struct("!I")

Message = list[Any]
"""A word that says what it is, then what belongs to it."""

log = logging.getLogger(__name__)


class Channel(asyncio.Protocol):
    """One end. `on_lost` is called once, when the other end is gone or was not understood."""

    def __init__(self, on_message: Callable[[Message], None], on_lost: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self._attached = False

    async def attach(self, sock: socket.socket) -> None:
        """Begin, over a connected socket that does not block."""
        await asyncio.get_running_loop().create_connection(lambda: self, sock=sock)
        self._attached = True

    def send(self, *message: object) -> None:
        """Queue a message; behind too much that waits, it ends the connection. Dropped before `attach` returned."""
        self.send_encoded(encode(*message))

    def send_encoded(self, framed: bytes) -> None:
        """As `send`, of what `encode` made."""
        if self._transport is None or not self._attached or self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() + len(framed) > MAX_MESSAGE:
            log.error("more than %d bytes wait for the other end", MAX_MESSAGE)
            self._transport.abort()
            return
        self._transport.write(framed)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # create_connection makes no other

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost()

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            while (body := self._next()) is not None:
                self._on_message(msgpack.unpackb(body))
        except Exception:
            log.exception("a message between the processes of this waypoint was not understood")
            self.close()

    def _next(self) -> bytes | None:
        """The next whole message. Raises ValueError for one that is too large."""
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > MAX_MESSAGE:
            raise ValueError(f"{length} bytes are more than any message has")
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        body = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        return body


def encode(*message: object) -> bytes:
    """A message as it is sent."""
    body: bytes = msgpack.packb(message)
    return _LENGTH.pack(len(body)) + body
