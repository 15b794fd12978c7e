"""Two-way copy between two sockets: a peer that came in plaintext, and the application.

Backpressure: an end is read only when the other took all that was read of it before, so at most one read (READ_BYTES)
waits in each direction. Ends: FIN crosses as FIN, and an error as RST on both sides, so truncated data never looks
whole. Nothing of it is only in this process's memory, so another one can go on with it (`progress`, `let_go`).
"""

from __future__ import annotations

import errno
import logging
import select
import socket
from dataclasses import dataclass, field

from uproxy import plane
from uproxy.errors import Flag
from uproxy.plane import Plane, Waiter
from uproxy.relay import CLEAN, Outcome

READ_BYTES = 65536

_BUFFER = memoryview(bytearray(READ_BYTES))  # every read's, since it is empty or copied when the read is over

log = logging.getLogger(__name__)

HANDED_OVER = Outcome(Flag.NONE, "another process goes on with it")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a relay has come. An end that was said can be read again, so it is not here."""

    sent: int = 0
    received: int = 0
    pending_in: bytes = b""
    """Read from the peer, and not taken by the application yet."""
    pending_out: bytes = b""


@dataclass(slots=True, eq=False)
class _Way:
    """One direction."""

    source: socket.socket
    sink: socket.socket
    whose: str
    """Who writes into it, for people."""
    pending: bytearray = field(default_factory=bytearray)
    """Read, and not taken yet. Nothing more is read meanwhile."""
    ended: bool = False
    """The source sent FIN, and all before it was taken."""


class PlainRelay:
    """A peer's socket and, once attached, an application's.

    Invariant: every path ends in `_finish` exactly once, which settles `done` and closes both sockets.
    """

    def __init__(self, data_plane: Plane, peer: socket.socket, before: Progress | None = None) -> None:
        """The caller has said `reset_on_close` of `peer`, and keeps it until `attach`. `before`: what another process
        had done.
        """
        self._goes_on = before is not None
        self._before = before or Progress()
        self.done: Waiter[Outcome] = Waiter(data_plane)
        self.outcome: Outcome | None = None
        self.sent = self._before.sent  # bytes that the peer's socket took
        self.received = self._before.received  # bytes that the application's socket took
        self.active = False  # bytes moved since the last look at half-closed connections
        self._plane = data_plane
        self._peer = peer
        self._in: _Way | None = None
        self._out: _Way | None = None
        self._watched: dict[socket.socket, int] = {}

    @property
    def half_closed(self) -> bool:
        return self._in is not None and self._out is not None and self._in.ended is not self._out.ended

    def attach(self, app: socket.socket) -> None:
        """Start copying. The relay owns both sockets from here. The caller has said `reset_on_close`."""
        before = self._before
        self._in = _Way(self._peer, app, "peer", bytearray(before.pending_in))
        self._out = _Way(app, self._peer, "application", bytearray(before.pending_out))
        self._rearm()

    @property
    def sockets(self) -> tuple[socket.socket, socket.socket] | None:
        """The peer's and the application's; None before the one is attached, and after the end."""
        return None if self._in is None or self.outcome is not None else (self._in.source, self._in.sink)

    @property
    def progress(self) -> Progress:
        assert self._in is not None
        assert self._out is not None
        return Progress(self.sent, self.received, bytes(self._in.pending), bytes(self._out.pending))

    def let_go(self) -> None:
        """Another process has both sockets now."""
        self._finish(HANDED_OVER)

    def cut(self, text: str) -> None:
        """End both sides at once: a policy no longer allows it, or the drain time is over."""
        self._finish(Outcome(Flag.RESET, text))

    # -- what the sockets say

    def _on_events(self, into: _Way, out_of: _Way, events: int) -> None:
        """Something about the socket that `into` fills and `out_of` empties."""
        try:
            if events & plane.READ_READY:
                if not out_of.ended and not out_of.pending:
                    self._read(out_of)
                elif events & select.EPOLLERR:  # reported whatever was asked for, as is EPOLLHUP
                    self._broke(out_of, None)
                elif not into.pending:
                    self._unwatch(out_of.source)  # until there is something to do with it
            if events & plane.WRITE and into.pending and self.outcome is None:
                self._write(into, into.pending)
            if self.outcome is None:
                self._rearm()
        except Exception:
            log.exception("a relay failed")
            self.cut("a bug of this proxy; its log has the traceback")

    def _read(self, way: _Way) -> None:
        try:
            length = way.source.recv_into(_BUFFER)
        except BlockingIOError:
            return
        except OSError as error:
            self._broke(way, error)
            return
        self.active = True
        if length:
            self._write(way, _BUFFER[:length])
        else:
            self._end(way)

    def _write(self, way: _Way, data: memoryview | bytearray) -> None:
        try:
            taken = way.sink.send(data)
        except BlockingIOError:
            taken = 0
        except OSError as error:
            self._broke(self._other(way), error)
            return
        if way is self._in:
            self.received += taken
        else:
            self.sent += taken
        self.active = self.active or taken > 0
        way.pending = bytearray(data[taken:])

    def _end(self, way: _Way) -> None:
        way.ended = True
        if self._other(way).ended:
            self._finish(CLEAN)  # which closes the sockets, and so sends the FIN
            return
        try:
            way.sink.shutdown(socket.SHUT_WR)
        except OSError as error:
            # The process before has shut it already, and since the other end was said, too, it is closed.
            if not (self._goes_on and error.errno == errno.ENOTCONN):
                self._broke(self._other(way), error)

    def _broke(self, way: _Way, error: OSError | None) -> None:
        """The end that `way` reads is gone."""
        number = way.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        error = error or OSError(number, "connection reset" if number else "connection closed")
        self._finish(Outcome(Flag.RESET, f"the {way.whose}'s connection broke: {error.strerror or error}"))

    # -- what is watched, and the end

    def _rearm(self) -> None:
        """Both sockets, for what can go on there; where nothing can, for errors alone."""
        assert self._in is not None
        assert self._out is not None
        self._watch(self._in, self._out)
        self._watch(self._out, self._in)

    def _watch(self, into: _Way, out_of: _Way) -> None:
        sock = out_of.source
        events = (plane.WRITE if into.pending else 0) | (0 if out_of.ended or out_of.pending else plane.READ)
        known = self._watched.get(sock)
        if known is None:
            if not events:
                return
            self._plane.watch(sock.fileno(), events, lambda found: self._on_events(into, out_of, found))
        elif known != events:
            self._plane.rearm(sock.fileno(), events)
        self._watched[sock] = events

    def _other(self, way: _Way) -> _Way:
        assert self._in is not None
        assert self._out is not None
        return self._out if way is self._in else self._in

    def _unwatch(self, sock: socket.socket) -> None:
        if self._watched.pop(sock, None) is not None:
            self._plane.unwatch(sock.fileno())

    def _finish(self, outcome: Outcome) -> None:
        if self.outcome is not None:
            return
        self.outcome = outcome
        assert self._in is not None
        for sock in (self._in.source, self._in.sink):
            self._unwatch(sock)
            if outcome is HANDED_OVER:
                sock.close()
            elif outcome is CLEAN:
                plane.close(sock)
            else:
                plane.reset(sock)
        self.done.set(outcome)
