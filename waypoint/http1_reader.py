"""Readers of HTTP/1.1: bytes in whatever pieces they come, events out. See `waypoint.http1`."""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Final

from waypoint.http1_head import MAX_HEAD, check_start, read_request, read_response, read_trailers
from waypoint.messages import END, Body, End, Ending, Fields, Framing, MessageError, RequestEvent, ResponseEvent

MAX_CHUNK_LINE: Final = 256
"""Bytes of a chunk's size with its extensions, which are dropped."""

_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t -~\x80-\xff]*)?\r\n")
_BROKEN_LINE: Final = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")


class _State(Enum):
    """What the next bytes are."""

    HEAD = auto()
    LENGTH = auto()
    CHUNK_LINE = auto()
    CHUNK = auto()
    CHUNK_END = auto()
    TRAILERS = auto()
    UNTIL_CLOSE = auto()
    SWITCHED = auto()
    """Nothing that is read here."""
    DONE = auto()
    """The next message's, or superfluous."""
    REFUSED = auto()


_OF_BODY: Final = {
    Ending.NONE: _State.DONE,
    Ending.LENGTH: _State.LENGTH,
    Ending.CHUNKED: _State.CHUNK_LINE,
    Ending.CLOSE: _State.UNTIL_CLOSE,
}


class _Reader:
    """What requests and responses have in common: bodies, and lines that have not come as a whole."""

    __slots__ = ("_buffer", "_left", "_seen", "_state", "_trailers")

    def __init__(self, state: _State) -> None:
        self._buffer = bytearray()
        self._state = state
        self._left = 0  # bytes of the body, or of the chunk, still to come
        self._trailers: Fields = ()
        self._seen = 0  # bytes of the buffer in which the end of a head was looked for in vain

    def rest(self) -> bytes:
        """What came behind a message with which HTTP ends."""
        return self._take(len(self._buffer))

    def _begin_body(self, framing: Framing) -> None:
        self._left = framing.length or 0
        self._state = _OF_BODY[framing.ending]
        if self._state is _State.LENGTH and not self._left:
            self._state = _State.DONE

    def _begin_with(self, framing: Framing, data: bytes, start: int) -> list[Body | End]:
        """What there is of the message after its head, all that has come: mostly it is the whole body."""
        if framing.length == len(data) - start and framing.ending is Ending.LENGTH:
            self._state = _State.DONE
            return [Body(data[start:]), END] if framing.length else [END]
        self._begin_body(framing)
        self._buffer += data[start:]
        return self._rest()

    def _rest(self) -> list[Body | End]:
        """What there is of the message after its head."""
        data = self._body() if self._buffer else b""
        events: list[Body | End] = [Body(data)] if data else []
        if self._state is _State.DONE:
            events.append(End(self._trailers) if self._trailers else END)
            self._trailers = ()
        return events

    def _body(self) -> bytes:
        """What there is of the body in the buffer, without framing."""
        if self._state is _State.LENGTH:
            data = self._take(self._left)
            self._left -= len(data)
            if not self._left:
                self._state = _State.DONE
            return data
        if self._state is _State.UNTIL_CLOSE:
            return self._take(len(self._buffer))
        pieces: list[bytes] = []
        while self._buffer and self._chunked(pieces):
            pass
        return b"".join(pieces)

    def _chunked(self, pieces: list[bytes]) -> bool:
        """One step in a chunked body. False when it is at its end, or when more is needed."""
        buffer = self._buffer
        if self._state is _State.CHUNK:
            piece = self._take(self._left)
            pieces.append(piece)
            self._left -= len(piece)
            if not self._left:
                self._state = _State.CHUNK_END
        elif self._state is _State.CHUNK_END:
            if len(buffer) < 2:
                return False
            if buffer[:2] != b"\r\n":
                raise MessageError(400, "a chunk does not end where its size says")
            del buffer[:2]
            self._state = _State.CHUNK_LINE
        elif self._state is _State.CHUNK_LINE:
            found = _CHUNK_LINE.match(buffer, 0, MAX_CHUNK_LINE)
            if found is None:
                if b"\n" in buffer or len(buffer) >= MAX_CHUNK_LINE:
                    raise MessageError(400, "malformed chunk size or extension")
                return False
            self._left = int(found[1], 16)
            del buffer[: found.end()]
            self._state = _State.CHUNK if self._left else _State.TRAILERS
        elif self._state is _State.TRAILERS:
            end = 2 if buffer.startswith(b"\r\n") else self._end_of_lines()
            if not end:
                return False
            self._trailers = read_trailers(self._take(end))
            self._state = _State.DONE
            return False
        else:
            return False
        return True

    def _take(self, count: int) -> bytes:
        buffer = self._buffer
        self._seen = 0
        if count >= len(buffer):
            data = bytes(buffer)
            buffer.clear()
        else:
            data = bytes(buffer[:count])
            del buffer[:count]
        return data

    def _end_of_lines(self) -> int:
        """How long the head (or the trailers) at the start of the buffer is, with its empty line; 0: not there yet."""
        buffer = self._buffer
        end = buffer.find(b"\r\n\r\n", max(self._seen - 3, 0))
        if end >= 0:
            if end + 4 > MAX_HEAD:
                raise MessageError(431, f"a head of more than {MAX_HEAD} bytes")
            return end + 4
        # Other line ends never lead to the empty line that is waited for.
        if _BROKEN_LINE.search(buffer, max(self._seen - 1, 0)):
            raise MessageError(400, "a line that does not end in CR LF")
        if len(buffer) > MAX_HEAD:
            raise MessageError(431, f"a head of more than {MAX_HEAD} bytes")
        self._seen = len(buffer)
        return 0


def _whole_head(data: bytes) -> int:
    """The length of the head that this begins with; 0: it does not, or may be none."""
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD) + 4
    return end if end > 4 else 0


class RequestReader(_Reader):
    """One client's requests."""

    __slots__ = ("_default_host", "_started")

    def __init__(self, default_host: bytes) -> None:
        """`default_host` is the authority that was dialled: it stands for a Host that HTTP/1.0 may leave out."""
        super().__init__(_State.HEAD)
        self._default_host = default_host
        self._started = False  # the start line of an unfinished head is well formed

    def feed(self, data: bytes) -> list[RequestEvent]:
        """Events of the present message. Raises MessageError.

        What comes after its end waits for `proceed`, all of it: do not go on receiving meanwhile.
        """
        if self._state is _State.HEAD and not self._buffer and (end := _whole_head(data)):
            try:
                head = read_request(data[:end], self._default_host)
                return [head, *self._begin_with(head.framing, data, end)]
            except MessageError:
                self._state = _State.REFUSED
                raise
        self._buffer += data
        return self._read()

    def proceed(self) -> list[RequestEvent]:
        """After End: go on to the next message with what has come of it. Raises MessageError."""
        assert self._state is _State.DONE
        self._state = _State.HEAD
        return self._read()

    def eof(self) -> None:
        """The client has ended its side. Raises MessageError when that cuts a request off."""
        if self._state is not _State.DONE and not self.idle:
            self._state = _State.REFUSED
            raise MessageError(400, "the request was cut off")

    @property
    def idle(self) -> bool:
        """Whether nothing of a next request has come, but for an empty line that some clients send after a body."""
        between = self._state in (_State.HEAD, _State.DONE)
        return between and (not self._buffer or self._buffer == b"\r\n")

    def _read(self) -> list[RequestEvent]:
        if not self._buffer or self._state is _State.DONE:
            return []
        try:
            if self._state is not _State.HEAD:
                return [*self._rest()]
            end = self._end_of_lines()
            if not end:
                self._started = self._started or check_start(self._buffer)
                return []
            head = read_request(self._take(end), self._default_host)
            self._started = False
            self._begin_body(head.framing)
            return [head, *self._rest()]
        except MessageError:
            self._state = _State.REFUSED
            raise


class ResponseReader(_Reader):
    """The responses on one connection to a server, each to one request."""

    __slots__ = ("_method", "_stays", "_upgrades", "begun")

    def __init__(self) -> None:
        super().__init__(_State.DONE)
        self._method = ""
        self._upgrades = b""
        self._stays = True
        self.begun = False
        """Whether anything of the expected response has come: a byte of it, or of an interim response."""

    def expect(self, method: str, *, upgrades: bytes = b"") -> None:
        """A request was sent, or is about to be: what comes next answers it. `upgrades`: it asks for this protocol."""
        assert self.reusable
        self._state = _State.HEAD
        self._method = method
        self._upgrades = upgrades
        self.begun = False

    @property
    def reusable(self) -> bool:
        """Whether the connection may carry another request: the response is whole and nothing came after it."""
        return self._state is _State.DONE and self._stays and not self._buffer

    def feed(self, data: bytes) -> list[ResponseEvent]:
        """Events of the expected response. Raises MessageError."""
        self.begun = True
        if self._state is _State.HEAD and not self._buffer and (end := _whole_head(data)):
            try:
                head, self._stays = read_response(data[:end], self._method, upgrades=self._upgrades)
                if not (head.interim or head.switches):
                    return [head, *self._begin_with(head.framing, data, end)]
            except MessageError as error:
                self._state = _State.REFUSED
                error.status = 502
                raise
        self._buffer += data
        if self._state in (_State.DONE, _State.REFUSED):  # `reusable` is False from here on
            return []
        try:
            if self._state is not _State.HEAD:
                return [*self._rest()]
            events: list[ResponseEvent] = []
            while end := self._end_of_lines():
                head, self._stays = read_response(self._take(end), self._method, upgrades=self._upgrades)
                events.append(head)
                if head.switches:
                    self._state = _State.SWITCHED
                    return events
                if not head.interim:
                    self._begin_body(head.framing)
                    return [*events, *self._rest()]
            return events
        except MessageError as error:
            self._state = _State.REFUSED
            error.status = 502
            raise

    def eof(self) -> list[ResponseEvent]:
        """The server has ended its side. Raises MessageError when that cuts a response off."""
        self._stays = False
        if self._state is _State.UNTIL_CLOSE:
            self._state = _State.DONE
            return [END]
        if self._state is not _State.DONE:
            self._state = _State.REFUSED
            raise MessageError(502, "the response was cut off" if self.begun else "the server closed the connection")
        return []
