"""One CONNECT stream as bytes to receive and to send, for code that reads them itself instead of relaying a socket.

It stands where a `Relay` with its application's socket stands in a uProxy, and keeps the same promises: a peer gets
credit only for bytes that were dealt with (asking for more says so), sending waits for room in the stream, the tunnel
and its output buffer, and a reset is never an end. All of it belongs to the data plane's turns.
"""

from __future__ import annotations

from collections.abc import Callable

from uproxy import plane
from uproxy.hbone import ErrorCode
from uproxy.header_block import Headers
from uproxy.relay import NOBODY, Relay


class ByteStream:
    """Either end of a stream that was answered with 200. One coroutine receives and one sends, at a time each.

    Invariant: whoever has it calls `close` or `abort`, whatever else happens; the stream is over after that.
    """

    __slots__ = (
        "_connection",
        "_deaf",
        "_ended",
        "_error",
        "_given",
        "_reader",
        "_received",
        "_writer",
        "on_gone",
        "stream",
        "tunnel",
    )

    def __init__(self, relay: Relay) -> None:
        """Take a stream over. Raises ConnectionResetError when it is gone already."""
        self.tunnel = relay.tunnel
        self.stream = relay.stream
        self.on_gone: Callable[[], None] = _ignore
        """Called once when the peer reads no more: the stream is lost, or whole and not wanted any longer."""
        self._connection = relay.tunnel.connection
        self._error = ""  # why it is lost; empty while it is not
        self._deaf = False  # the peer reads no more
        self._given = 0  # bytes that the receiver has, and for which the peer has no credit yet
        self._reader: plane.Waiter[None] | None = None
        self._writer: plane.Waiter[None] | None = None
        received, self._ended = relay.hand_over(self)
        self._received = bytearray(received)

    # -- receiving

    async def receive(self, timeout_s: float | None) -> bytes:
        """All that has come, at least a byte; empty once the peer has ended its side.

        Raises ConnectionResetError when the stream is lost, TimeoutError when nothing comes in time.
        """
        if self._given:
            self._connection.consumed(self.stream, self._given, keeps_up=not self._received)
            self.tunnel.touch()
            self._given = 0
        if not (self._received or self._ended or self._error):
            self._reader = plane.Waiter(self.tunnel.plane)
            try:
                await self._wait(self._reader, timeout_s)
            finally:
                self._reader = None
        if self._error:
            raise ConnectionResetError(self._error)
        data = bytes(self._received)
        self._received.clear()
        self._given = len(data)
        return data

    @property
    def quiet(self) -> bool:
        """Whether the peer has said nothing that was not received: a byte, an end or a reset."""
        return not (self._received or self._ended or self._error)

    # -- sending

    async def send(self, data: bytes, timeout_s: float | None) -> None:
        """Return when all of it is on its way. Raises ConnectionResetError, or TimeoutError when the peer takes none of
        it in time. A peer that has ended its side and reads no more misses it, which is no error.
        """
        left = memoryview(data)
        while left and not self._deaf:
            if self._error:
                raise ConnectionResetError(self._error)
            room = self._room()
            if room:
                length = min(len(room), len(left))
                room[:length] = left[:length]
                self._connection.commit(self.stream, length)
                self.tunnel.touch()
                left = left[length:]
            elif not self._error:
                self._writer = plane.Waiter(self.tunnel.plane)
                self.tunnel.starved[self] = None
                try:
                    await self._wait(self._writer, timeout_s)
                finally:
                    self._writer = None
                    self.tunnel.starved.pop(self, None)

    def _room(self) -> memoryview:
        room = self._connection.reserve(self.stream)
        if not room and self.stream.send_window > 0 and self._connection.send_window > 0:
            self.tunnel.flush()  # the output buffer is full
            if not self._error:
                room = self._connection.reserve(self.stream)
        return room

    # -- ends

    def end(self) -> None:
        """Nothing more will be sent; the peer may go on."""
        if not self._error:
            self._connection.end(self.stream)
            self.tunnel.touch()

    def close(self) -> None:
        """End it well: what was sent arrives, and what the peer still sends is dropped."""
        if self._error:
            return
        self._connection.end(self.stream)
        # A whole answer, and nothing more is read (RFC 9113 section 8.1). Nothing is sent when the peer has ended too.
        self._connection.reset(self.stream, ErrorCode.NO_ERROR)
        self.tunnel.touch()
        self._leave("closed")

    def abort(self, text: str) -> None:
        """End it as a reset, so that nobody takes what was sent for the whole; `text` is for those who wait here."""
        if not self._error:
            self.tunnel.reset_stream(self.stream, ErrorCode.CONNECT_ERROR)
            self._leave(text)

    # -- from the tunnel

    def on_response(self, headers: Headers) -> None: ...

    def on_data(self, data: memoryview) -> None:
        self._received += data
        self._wake(self._reader)

    def on_end(self) -> None:
        self._ended = True
        self._wake(self._reader)

    def on_reset(self, code: int, text: str = "") -> None:
        if code == ErrorCode.NO_ERROR and not text and self._ended:
            # What it has sent is whole, and it reads no more (see `Relay.on_reset`).
            self._deaf = True
            self._wake(self._writer)
        else:
            name = ErrorCode(code).name if code in ErrorCode.__members__.values() else str(code)
            self._leave(text or f"the peer reset the stream: {name}")
        self.on_gone()

    def on_room(self) -> None:
        self._wake(self._writer)

    def _leave(self, error: str) -> None:
        self._error = error
        self.stream.owner = NOBODY
        self.tunnel.starved.pop(self, None)
        self._wake(self._reader)
        self._wake(self._writer)

    async def _wait(self, waiter: plane.Waiter[None], timeout_s: float | None) -> None:
        await (waiter if timeout_s is None else self.tunnel.plane.wait(waiter, timeout_s))

    @staticmethod
    def _wake(waiter: plane.Waiter[None] | None) -> None:
        if waiter is not None:
            waiter.set(None)


def _ignore() -> None: ...
