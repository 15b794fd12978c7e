"""Writers of HTTP/1.1: the messages of one exchange, as bytes for either peer. See `waypoint.http1`."""

from __future__ import annotations

from waypoint.http1_head import OF_CONNECTION, OLD, check_written
from waypoint.messages import (
    CHUNKED,
    NO_BODY,
    UNTIL_CLOSE,
    Ending,
    Fields,
    Framing,
    RequestHead,
    ResponseHead,
    length,
)
from waypoint.remembered import remembered


class _Writer:
    """The body of one message. A ValueError is a mistake of ours, and means that the connection must be given up."""

    __slots__ = ("_ending", "_left", "ended")

    def __init__(self) -> None:
        self.ended = False
        """Whether what says that the message is whole was asked for; before that nothing else may follow it."""
        self._ending = Ending.NONE
        self._left = 0  # bytes that were promised and not written

    def body(self, data: bytes) -> bytes:
        """The next bytes of the body as they are sent."""
        if self._ending is Ending.CHUNKED:
            return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        if self._ending is Ending.LENGTH:
            self._left -= len(data)
            if self._left < 0:
                raise ValueError("a body is longer than its head says")
        elif self._ending is Ending.NONE:
            return b""
        return data

    def end(self) -> bytes:
        """What says that the body is whole."""
        return self._end(())

    def _end(self, trailers: Fields) -> bytes:
        if self._ending is Ending.LENGTH and self._left:
            raise ValueError("a body is shorter than its head says")
        self.ended = True
        if self._ending is not Ending.CHUNKED:
            return b""
        return b"0\r\n%b\r\n" % b"".join(b"%b: %b\r\n" % field for field in trailers)

    def _begin(self, framing: Framing) -> None:
        self._ending = framing.ending
        self._left = framing.length or 0


class RequestWriter(_Writer):
    """One request, to a server."""

    __slots__ = ()

    def head(self, request: RequestHead) -> bytes:
        """Raises ValueError for a head that no reader of ours would take."""
        self._begin(request.framing)
        line = f"{request.method} {request.target} HTTP/1.1\r\n".encode("ascii")
        return _written(request.fields, line, request.framing, request=True, upgrade=request.upgrades)


class ResponseWriter(_Writer):
    """The response to one request, and the interim ones before it."""

    __slots__ = ("_request", "close")

    def __init__(self, request: RequestHead) -> None:
        super().__init__()
        self._request = request
        self.close = not request.keep_alive  # which HTTP/1.0 never is, to which bodies may end with the connection
        """Whether the connection must be closed once the response is sent. Holds after the head."""

    def head(self, response: ResponseHead, *, close: bool = False) -> bytes:
        """Empty for what this client cannot be sent. Raises ValueError for a head that no reader of ours would take.

        `close` asks for the connection to be closed after this response.
        """
        line = b"HTTP/1.1 %d %b\r\n" % (response.status, response.reason)
        if response.interim:
            if self._request.protocol == OLD:  # RFC 9110 section 15.2
                return b""
            return _written(response.fields, line, response.framing)
        if response.switches:
            self.close = True  # once that is over
            return _written(response.fields, line, response.framing, upgrade=self._request.upgrades)
        framing = self._framing(response.status, response.framing)
        self.close = self.close or close
        if self._request.method != "HEAD":
            self._begin(framing)
        return _written(response.fields, line, framing, close=self.close)

    def last(self, trailers: Fields) -> bytes:
        """What says that the body is whole, with trailers for a client that takes them (RFC 9110 section 6.5.1)."""
        return self._end(trailers if self._request.takes_trailers else ())

    def _framing(self, status: int, framing: Framing) -> Framing:
        """The end of the body as this client understands it: chunked where that is possible and it has no length."""
        if framing is NO_BODY and status not in (204, 304) and self._request.method != "HEAD":
            return length(0)  # which HTTP/2 need not say
        if framing.ending in (Ending.CHUNKED, Ending.CLOSE):
            return UNTIL_CLOSE if self._request.protocol == OLD else CHUNKED
        return framing


@remembered
def _written(
    fields: Fields,
    start: bytes,
    framing: Framing,
    *,
    request: bool = False,
    close: bool = False,
    upgrade: bytes = b"",
) -> bytes:
    names = [name for name, _ in fields]
    if not OF_CONNECTION.isdisjoint(names):
        raise ValueError("a field that only writers may write is among the fields of a head")
    if (text := b" ".join(names)) != text.lower():
        raise ValueError("a field's name is not in lower case")
    if request and names.count(b"host") != 1:
        raise ValueError("a request needs one host field")
    if framing.ending is Ending.CLOSE and not close:
        raise ValueError("a body without an end")
    lines = [start, *[b"%b: %b\r\n" % field for field in fields]]
    if upgrade:
        lines += (b"connection: upgrade\r\n", b"upgrade: %b\r\n" % upgrade)
    elif close:
        lines.append(b"connection: close\r\n")
    if framing.length is not None:
        lines.append(b"content-length: %d\r\n" % framing.length)
    elif framing.ending is Ending.CHUNKED:
        lines.append(b"transfer-encoding: chunked\r\n")
    lines.append(b"\r\n")
    head = b"".join(lines)
    check_written(head, len(lines), request=request)
    return head
