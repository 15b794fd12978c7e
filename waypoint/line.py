"""One socket in the place of a tunnel with one stream: what a `ByteStream` is on in a process beside a workload.

It keeps what a tunnel keeps: what is written in a turn leaves at its end, in one call; the peer is read only as far as
the stream's reader takes it; and a reset is never an end.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import select
import socket
import sys
import termios
from typing import Final

from uproxy import hbone, plane
from uproxy.hbone import ErrorCode
from uproxy.plane import Plane, Timer
from uproxy.relay import NOBODY, StreamOwner
from waypoint.byte_stream import ByteStream

OUTPUT: Final = 64 << 10
"""Bytes that wait for the peer; it is the window, too."""
UNREAD: Final = 64 << 10
"""Bytes that the stream's reader may have without having asked for more."""
FAREWELL_S: Final = 5.0
"""How long what a peer still sends is dropped, after all was said and has arrived: to close on it would be a reset."""
STALLED_S: Final = 60.0
"""How long a peer may take nothing of what was said before that."""

_READ: Final = memoryview(bytearray(64 << 10))  # every read's: whoever gets it copies it
_WRITE: Final = memoryview(bytearray(OUTPUT))  # every reservation's, likewise
_BROKEN: Final = select.EPOLLERR | select.EPOLLHUP

log = logging.getLogger(__name__)


class Line:
    """A connected socket that does not block, and is closed here and nowhere else: `byte_stream.Carrier`, and its
    `Frames`.
    """

    def __init__(self, data_plane: Plane, sock: socket.socket) -> None:
        self.plane = data_plane
        self.starved: dict[StreamOwner, None] = {}
        self.stream = hbone.Stream(1, OUTPUT, UNREAD)
        self.stream.owner = NOBODY
        self._sock = sock
        self._fd = sock.fileno()
        self._unsent = bytearray()
        self._unread = 0
        self._events = plane.READ
        self._dirty = False
        self._closed = False
        self._watched = True
        self._leaving: Timer | None = None
        self._left = 0  # bytes, and an end, that the peer had not got at the last look
        self._stalled_s = 0.0
        plane.reset_on_close(sock)
        data_plane.watch(self._fd, self._events, self._on_events)

    def open(self) -> ByteStream:
        """The stream: once, in the turn in which the line was made."""
        stream = ByteStream(self, self.stream)
        self.stream.owner = stream
        return stream

    waited_s = 0.0
    """Nothing waits here: whoever asks for more is another process."""

    @property
    def connection(self) -> Line:
        return self

    # -- sending

    @property
    def send_window(self) -> int:
        return OUTPUT - len(self._unsent)

    def reserve(self, stream: hbone.Stream) -> memoryview:
        return _WRITE[: 0 if self._closed or stream.local_closed else self.send_window]

    def commit(self, stream: hbone.Stream, length: int, *, end: bool = False) -> None:
        self._unsent += _WRITE[:length]
        if end:
            self.end(stream)

    def write(self, stream: hbone.Stream, data: bytes, *, end: bool = False) -> bool:
        if self._closed or stream.local_closed or len(data) > self.send_window:
            return False
        self._unsent += data
        if end:
            self.end(stream)
        return True

    def end(self, stream: hbone.Stream) -> None:
        stream.local_closed = True
        self.touch()

    def touch(self) -> None:
        """There is something to send, or an end: look at the end of the turn."""
        if not self._dirty and not self._closed:
            self._dirty = True
            self.plane.mark_dirty(self)

    def flush(self) -> None:
        self._dirty = False
        if self._closed:
            return
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
            if self.stream.local_closed:
                self._sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTCONN or self._unsent:
                self._lose(str(error.strerror or error))
                return
        if self.stream.local_closed and self.stream.remote_closed and not self._unsent:
            self._close()
            return
        self._rearm()
        if self.send_window > 0:
            self._feed()

    def _feed(self) -> None:
        for owner in list(self.starved):
            self.starved.pop(owner, None)
            owner.on_room()

    # -- receiving

    def consumed(self, stream: hbone.Stream, length: int, *, keeps_up: bool) -> None:
        self._unread -= length
        self._rearm()

    def _on_events(self, events: int) -> None:
        if events & plane.READ_READY and self._events & plane.READ:
            self._receive()
        elif events & _BROKEN:
            # Nothing is read now: what waits in the kernel is lost with an error, and stays there with mere ends.
            number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                self._lose(errno.errorcode.get(number, "closed"))
            else:
                self._watched = False
                self.plane.unwatch(self._fd)
        if events & plane.WRITE and not self._closed:
            self.flush()

    def _receive(self) -> None:
        try:
            length = self._sock.recv_into(_READ)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(str(error.strerror or error))
            return
        if length:
            if self.stream.owner is not NOBODY:
                self._unread += length
                self.stream.owner.on_data(_READ[:length])
        else:
            self.stream.remote_closed = True
            self.stream.owner.on_end()
            self.touch()
        self._rearm()

    def _rearm(self) -> None:
        if self._closed:
            return
        reads = not self.stream.remote_closed and self._unread < UNREAD
        self._watch((plane.READ if reads else 0) | (plane.WRITE if self._unsent and not self._dirty else 0))

    def _watch(self, events: int) -> None:
        if not self._watched:
            if events:
                self._watched, self._events = True, events
                self.plane.watch(self._fd, events, self._on_events)
        elif events != self._events:
            self._events = events
            self.plane.rearm(self._fd, events)

    # -- ends

    def reset(self, stream: hbone.Stream, code: ErrorCode) -> None:
        if code is not ErrorCode.NO_ERROR:
            self._close_by_reset()
        elif self._leaving is None and not self._closed:
            # All was said, and nothing more is wanted.
            self._unread = 0
            self._leaving = self.plane.call_later(FAREWELL_S, self._leave)
            self.touch()

    def reset_stream(self, stream: hbone.Stream, code: ErrorCode) -> None:
        self._close_by_reset()

    def _leave(self) -> None:
        """Close it, once the peer has all: with a reset only if it takes nothing more."""
        left = len(self._unsent) + self._unacknowledged()
        self._stalled_s = self._stalled_s + FAREWELL_S if left == self._left else 0.0
        self._left = left
        if not left:
            self._close()
        elif self._stalled_s >= STALLED_S:
            self._close_by_reset()
        else:
            self._leaving = self.plane.call_later(FAREWELL_S, self._leave)

    def _unacknowledged(self) -> int:
        """Bytes in the kernel, and the end, that the peer has not acknowledged (SIOCOUTQ of tcp(7))."""
        number = fcntl.ioctl(self._fd, termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(number, sys.byteorder)

    def _lose(self, text: str) -> None:
        owner = self.stream.owner
        self._close_by_reset()
        owner.on_reset(ErrorCode.CONNECT_ERROR, f"the connection broke: {text}")

    def _close_by_reset(self) -> None:
        if self._let_go():
            plane.reset(self._sock)

    def _close(self) -> None:
        if self._let_go():
            plane.close(self._sock)

    def _let_go(self) -> bool:
        """Whether it was there until now."""
        if self._closed:
            return False
        self._closed = True
        self._unsent.clear()
        if self._leaving is not None:
            self._leaving.cancel()
        self.plane.unwatch(self._fd)
        return True
