"""A Redis, asked over the mesh: one connection for each process, on which commands follow each other without a wait.

It is a stream to the Redis's uProxy, as this waypoint: mTLS, and policy of the mesh, are what protects it.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from uproxy.errors import RefusedError
from uproxy.plane import Plane, Waiter
from waypoint.byte_stream import ByteStream
from waypoint.resp import ReplyError, RespError, RespReader, command

MAX_WAITING: Final = 1024
"""Commands without a reply; more are not sent."""
SILENCE_S: Final = 2.0
"""Without any reply, while commands wait for one: the connection is given up."""
RETRY_S: Final = 0.5
"""Between two attempts to connect."""

_LOST: Final = (OSError, RefusedError, RespError)  # TimeoutError is an OSError

log = logging.getLogger(__name__)


class RedisError(Exception):
    """There is no answer."""


class RedisClient:
    """Runs one script in one Redis. Its coroutines end when nothing is asked; the connection stays."""

    def __init__(
        self,
        data_plane: Plane,
        name: str,
        script: bytes,
        connect: Callable[[], Awaitable[ByteStream]],
        clock: Callable[[], float],
    ) -> None:
        """`name`: for people. `connect` raises RefusedError. `clock`: monotonic seconds."""
        self._plane = data_plane
        self._name = name
        self._script = script
        self._digest = hashlib.sha1(script, usedforsecurity=False).hexdigest().encode()
        self._connect = connect
        self._clock = clock
        self._stream: ByteStream | None = None
        self._reader = RespReader()
        self._waiting: deque[Waiter[object]] = deque()
        self._unsent: list[bytes] = []
        self._sending = self._receiving = self._closed = False
        self._retry_at = 0.0
        self._why = ""
        """There is no connection."""

    async def run(self, keys: list[bytes], arguments: list[bytes], timeout_s: float) -> object:
        """What the script returns. Raises RedisError; RefusedError when this proxy shuts down."""
        if self._stream is not None and not self._receiving and not self._stream.quiet:
            self._lose("it has closed the connection")
            self._retry_at = 0.0
        if self._stream is None and not self._sending and self._clock() < self._retry_at:
            raise RedisError(f"{self._name}: {self._why}")
        if len(self._waiting) >= MAX_WAITING:
            raise RedisError(f"{self._name}: {MAX_WAITING} commands wait already")
        waiter: Waiter[object] = Waiter(self._plane)
        self._waiting.append(waiter)
        self._unsent.append(command(b"EVALSHA", self._digest, b"%d" % len(keys), *keys, *arguments))
        if not self._sending:
            self._sending = True
            self._plane.spawn(self._send())
        try:
            reply = await self._plane.wait(waiter, timeout_s)
        except TimeoutError:
            raise RedisError(f"{self._name}: no answer within {timeout_s:g} s") from None
        except ConnectionResetError as error:
            raise RedisError(f"{self._name}: {error}") from None
        if isinstance(reply, ReplyError):
            raise RedisError(f"{self._name}: {reply}")
        return reply

    async def _send(self) -> None:
        """What waits to be sent, on a new connection where there is none."""
        try:
            stream = self._stream
            if stream is None:
                stream = await self._connect()
                if self._closed:
                    stream.close()
                    raise ConnectionResetError("nobody asks it any more")
                self._stream, self._reader = stream, RespReader()
                self._waiting.appendleft(Waiter(self._plane))  # nobody's: whether the script is known shows by itself
                self._unsent.insert(0, command(b"SCRIPT", b"LOAD", self._script))
            while self._unsent:
                if not self._receiving:
                    self._receiving = True
                    self._plane.spawn(self._receive(stream))
                data = b"".join(self._unsent)
                self._unsent.clear()
                await stream.send(data, SILENCE_S)
        except _LOST as error:
            self._lose(str(error))
        finally:
            self._sending = False

    async def _receive(self, stream: ByteStream) -> None:
        """As long as a reply is to come."""
        try:
            while self._waiting and stream is self._stream:
                data = await stream.receive(SILENCE_S)
                if not data:
                    raise ConnectionResetError("it has closed the connection")
                for reply in self._reader.feed(data):
                    if not self._waiting:
                        raise RespError("a reply to nothing")
                    self._waiting.popleft().set(reply)
                    if isinstance(reply, ReplyError):  # it wants a password, or has lost the script
                        raise RespError(str(reply))
        except _LOST as error:
            if stream is self._stream:
                self._lose(str(error))
        finally:
            self._receiving = False

    def _lose(self, why: str) -> None:
        """The connection is gone, with everything on it."""
        log.warning("%s: %s", self._name, why)
        self._why, self._retry_at = why, self._clock() + RETRY_S
        if self._stream is not None:
            self._stream.abort(why)
            self._stream = None
        waiting = list(self._waiting)
        self._waiting.clear()
        self._unsent.clear()
        for waiter in waiting:
            waiter.fail(ConnectionResetError(why))

    def close(self) -> None:
        """Nobody asks it any more."""
        self._closed = True
        if self._stream is not None:
            self._stream.close()
            self._stream = None
