"""Two-way copy between an application's socket and one CONNECT stream.

Backpressure: an application is read only when its stream, its tunnel and the output buffer have room (`reserve`), and a
peer gets credit only for bytes that the application's socket took. So nothing queues, but for what a peer had already
sent when the application stopped reading: at most one stream window (`_pending`).

Ends (docs/hbone.md 2.5 and 4): FIN crosses as END_STREAM and comes out as FIN; a reset or an error crosses as
RST_STREAM(CONNECT_ERROR) (RFC 9113 section 8.5) and comes out as RST, so truncated data never looks whole.
"""

from __future__ import annotations

import logging
import select
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from uproxy import hbone, plane
from uproxy.errors import Flag
from uproxy.hbone import ErrorCode
from uproxy.header_block import Headers

if TYPE_CHECKING:
    from uproxy.tunnel import Tunnel

_BROKEN = select.EPOLLERR

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a relayed connection ended. `flag` is NONE for a clean end, else mostly RESET; `text` says who and why."""

    flag: Flag
    text: str


CLEAN = Outcome(Flag.NONE, "")


class StreamOwner(Protocol):
    """Who is told what happens on a stream: a relay, or whoever takes the stream over from one."""

    stream: hbone.Stream

    def on_response(self, headers: Headers) -> None: ...

    def on_data(self, data: memoryview) -> None:
        """`data` is gone when this returns."""

    def on_end(self) -> None: ...

    def on_reset(self, code: int, text: str = "") -> None: ...

    def on_room(self) -> None:
        """It waited in `Tunnel.starved`, and may send again."""


def feed(connection: hbone.Connection, starved: dict[StreamOwner, None]) -> None:
    """Let the streams that waited for room send again, but for those without a window."""
    if connection.send_window > 0:
        for owner in [one for one in starved if one.stream.send_window > 0]:
            del starved[owner]
            owner.on_room()


class _Nobody:
    """Owns the streams of relays that have ended: what still arrives is dropped."""

    def on_response(self, headers: Headers) -> None: ...

    def on_data(self, data: memoryview) -> None: ...

    def on_end(self) -> None: ...

    def on_reset(self, code: int, text: str = "") -> None: ...


NOBODY = _Nobody()


class Relay:
    """One stream and, once attached, one application socket.

    Invariant: every path ends in `_finish` exactly once, which settles `done`, closes the socket and leaves the stream
    closed or reset.
    """

    __slots__ = (
        "_end_pending",
        "_events",
        "_fd",
        "_pending",
        "_read_closed",
        "_sock",
        "_watched",
        "_write_closed",
        "active",
        "answered",
        "done",
        "outcome",
        "received",
        "response",
        "sent",
        "stream",
        "tunnel",
    )

    def __init__(self, tunnel: Tunnel, stream: hbone.Stream) -> None:
        self.tunnel = tunnel
        self.stream = stream
        self.response: plane.Waiter[Headers] = plane.Waiter(tunnel.plane)
        self.done: plane.Waiter[Outcome] = plane.Waiter(tunnel.plane)
        self.outcome: Outcome | None = None
        self.sent = 0  # bytes from the application into the tunnel
        self.received = 0  # bytes from the tunnel that the application's socket took
        self.active = False  # bytes moved since the last look at half-closed streams
        self.answered = True  # the last bytes that moved, if any did, were the application's
        self._sock: socket.socket | None = None
        self._fd = -1
        self._events = 0
        self._watched = False
        self._pending = bytearray()
        self._end_pending = False  # the peer ended, and its last bytes wait in _pending
        self._read_closed = False  # the application sent FIN
        self._write_closed = False  # FIN went to the application
        stream.owner = self

    def attach(self, sock: socket.socket) -> None:
        """Start copying. What the peer sent meanwhile goes first. The relay owns the socket from here.

        The caller has said `reset_on_close`.
        """
        if self.outcome is not None:
            plane.reset(sock)
            return
        self._sock = sock
        self._fd = sock.fileno()
        self._want(0 if self._read_closed else plane.READ)
        if self._pending or self._end_pending:
            self._write_pending()

    @property
    def half_closed(self) -> bool:
        return self._read_closed is not self._write_closed

    @property
    def stalled(self) -> bool:
        """Whether bytes wait for a receiver that does not take them."""
        return bool(self._pending) or self in self.tunnel.starved

    # -- from the tunnel

    def on_response(self, headers: Headers) -> None:
        self.response.set(headers)

    def on_data(self, data: memoryview) -> None:
        sock = self._sock
        if sock is None or self._pending:
            if self.outcome is None:
                self._pending += data
            return
        try:
            taken = sock.send(data)
        except BlockingIOError:
            taken = 0
        except OSError as error:
            self._app_broke(error)
            return
        if taken:
            self.received += taken
            self.active = True
            self.answered = False
        if taken == len(data):
            self.tunnel.connection.consumed(self.stream, taken, keeps_up=True)
            return
        if taken:
            self.tunnel.connection.consumed(self.stream, taken, keeps_up=False)
        self._pending += data[taken:]
        self._want(self._events | plane.WRITE)

    def on_end(self) -> None:
        if self._pending or self._sock is None:
            self._end_pending = True
        else:
            self._shutdown_write()

    def on_reset(self, code: int, text: str = "") -> None:
        """The stream is gone. RST goes to the application, unless everything had arrived and it was NO_ERROR.

        NO_ERROR behind an END_STREAM only says that the peer reads no more (RFC 9113 section 8.1); Envoy sends it when
        its application closes first. What had arrived is delivered, then FIN; then the socket is closed.
        """
        if code == ErrorCode.NO_ERROR and not text and (self._end_pending or self._write_closed):
            self._read_closed = True
            if self._write_closed:
                self._finish(CLEAN)
            elif self._sock is not None:
                self._want(self._events & ~plane.READ)
            return
        name = ErrorCode(code).name if code in ErrorCode.__members__.values() else str(code)
        self._finish(Outcome(Flag.RESET, text or f"the peer reset the stream: {name}"))

    def on_room(self) -> None:
        """Read the application again: the window opened, or the tunnel can send."""
        if not self._read_closed and self._sock is not None:
            self._want(self._events | plane.READ)

    # -- from the application's socket

    def _on_events(self, events: int) -> None:
        try:
            if events & plane.READ_READY:
                if self._read_closed or not self._events & plane.READ:
                    # ERR and HUP are reported whatever was asked for.
                    if events & _BROKEN:
                        self._app_broke(None)
                        return
                    if not events & plane.WRITE:
                        self._unwatch()
                elif self._read():
                    self._read_more()
            if events & plane.WRITE and self.outcome is None:
                self._write_pending()
        except Exception:
            log.exception("a relay failed")
            self.cut("a bug of this proxy; its log has the traceback")

    def _read(self) -> bool:
        """One frame of what the application sent. Whether it filled all the room, so that more may be there."""
        assert self._sock is not None
        connection = self.tunnel.connection
        room = connection.reserve(self.stream)
        if not room and self.stream.send_window > 0 and connection.send_window > 0:
            # The output buffer is full. Left for the next turn, the same ones would fill it again: epoll reports in
            # the same order each time.
            self.tunnel.flush()
            if self.outcome is not None:
                return False
            room = connection.reserve(self.stream)
        if not room:
            self._want(self._events & ~plane.READ)
            self.tunnel.starved[self] = None
            return False
        try:
            length = self._sock.recv_into(room)
        except BlockingIOError:
            return False
        except OSError as error:
            self._app_broke(error)
            return False
        self.active = True
        if length:
            connection.commit(self.stream, length)
            self.sent += length
            self.answered = True
            self.tunnel.touch()
            return length == len(room)
        self._read_closed = True
        connection.end(self.stream)
        self.tunnel.touch()
        if self._write_closed:
            self._finish(CLEAN)
        else:
            self._want(self._events & ~plane.READ)
        return False

    def _read_more(self) -> None:
        """The rest of what a turn takes from one stream, where the peer wants frames that are smaller."""
        for _ in range(self.tunnel.connection.frames_at_once - 1):
            if not self._read():
                return

    def _write_pending(self) -> None:
        assert self._sock is not None
        if self._pending:
            try:
                taken = self._sock.send(self._pending)
            except BlockingIOError:
                taken = 0
            except OSError as error:
                self._app_broke(error)
                return
            del self._pending[:taken]
            self.received += taken
            self.active = True
            self.answered = False
            if taken:
                self.tunnel.connection.consumed(self.stream, taken, keeps_up=False)
                self.tunnel.touch()
        if self._pending:
            self._want(self._events | plane.WRITE)
            return
        self._want(self._events & ~plane.WRITE)
        if self._end_pending:
            self._end_pending = False
            self._shutdown_write()

    def _shutdown_write(self) -> None:
        assert self._sock is not None
        self._write_closed = True
        if self._read_closed:
            self._finish(CLEAN)  # which closes the socket, and so sends the FIN
            return
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._app_broke(error)

    def _app_broke(self, error: OSError | None) -> None:
        assert self._sock is not None
        number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        error = error or OSError(number, "connection reset" if number else "connection closed")
        self._finish(Outcome(Flag.RESET, f"the application's connection broke: {error.strerror or error}"))

    # -- ends

    def cut(self, text: str, flag: Flag = Flag.RESET) -> None:
        """End both sides at once: a policy no longer allows it, or the drain time is over."""
        self._finish(Outcome(flag, text))

    def abandon(self) -> None:
        """Give up before anything was attached."""
        self._finish(Outcome(Flag.RESET, "given up"))

    def discard(self) -> None:
        """The request was refused and answered: what its sender still sends is dropped."""
        self.outcome = CLEAN
        self.stream.owner = NOBODY
        self._pending.clear()

    def hand_over(self, owner: StreamOwner) -> tuple[bytes, bool]:
        """Give the stream to another owner instead of a socket. What its sender has sent so far, and whether that is
        all. Raises ConnectionResetError when the stream is gone already.
        """
        if self.outcome is not None:
            raise ConnectionResetError(self.outcome.text)
        received = bytes(self._pending), self._end_pending
        self.discard()
        self.stream.owner = owner
        return received

    def _finish(self, outcome: Outcome) -> None:
        if self.outcome is not None:
            return
        self.outcome = outcome
        # A relay, its stream and its tunnel must not keep each other alive until a full garbage collection.
        self.stream.owner = NOBODY
        self.tunnel.starved.pop(self, None)
        sock, self._sock = self._sock, None
        self._pending.clear()
        if sock is not None:
            if self._watched:
                self._watched = False
                self.tunnel.plane.forget(self._fd)
            if outcome is CLEAN:
                plane.close(sock)
            else:
                plane.reset(sock)
        if outcome is not CLEAN:
            self.tunnel.reset_stream(self.stream, ErrorCode.CONNECT_ERROR if sock is not None else ErrorCode.CANCEL)
        if not self.response.settled:
            self.response.fail(ConnectionResetError(outcome.text))
        self.done.set(outcome)

    def _want(self, events: int) -> None:
        if self._watched:
            if events != self._events:
                self.tunnel.plane.rearm(self._fd, events)
        else:
            self.tunnel.plane.watch(self._fd, events, self._on_events)
            self._watched = True
        self._events = events

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self._events = 0
            self.tunnel.plane.unwatch(self._fd)
