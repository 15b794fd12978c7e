"""A request whose body was read before it goes on, in whole or in part."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from uproxy.hbone import ErrorCode
from uproxy.plane import Waiter
from waypoint.byte_stream import ByteStream
from waypoint.messages import Fields, RequestHead, ResponseEvent
from waypoint.sides import Incoming


class ReadAhead:
    """In the manner of `sides.Incoming`: gives what was read again, and then the rest."""

    __slots__ = ("_pieces", "_request")

    def __init__(self, request: Incoming, pieces: Iterable[bytes]) -> None:
        self._request = request
        self._pieces = deque(pieces)

    @property
    def on_gone(self) -> Callable[[], None]:
        return self._request.on_gone

    @on_gone.setter
    def on_gone(self, callback: Callable[[], None]) -> None:
        self._request.on_gone = callback

    @property
    def head(self) -> RequestHead:
        return self._request.head

    @property
    def whole(self) -> bool:
        return not self._pieces and self._request.whole

    @property
    def trailers(self) -> Fields:
        return self._request.trailers

    def at_hand(self, most: int) -> bytes:
        return b"" if self._pieces else self._request.at_hand(most)

    async def body(self) -> bytes:
        return self._pieces.popleft() if self._pieces else await self._request.body()

    async def send(self, events: Sequence[ResponseEvent], *, close: bool = False) -> None:
        await self._request.send(events, close=close)

    async def discard(self, reading: Waiter[None] | None) -> None:
        self._pieces.clear()
        if not self._request.whole:
            await self._request.discard(reading)

    def switched(self) -> ByteStream:
        return self._request.switched()

    def abort(self, text: str, code: ErrorCode = ErrorCode.INTERNAL_ERROR) -> None:
        self._request.abort(text, code)
