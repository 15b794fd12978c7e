"""What HTTP messages consist of, whichever version they come by: the values that readers give and writers take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Final, NamedTuple

Fields = Sequence[tuple[bytes, bytes]]
"""The header fields of a head in their order: names in lower case, values without white space at the ends."""


HTTP2: Final = "HTTP/2"


class MessageError(Exception):
    """A message that is not passed on. `status` is what the client is answered with."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Ending(IntEnum):
    """How the end of a body is known."""

    NONE = auto()
    """There is no body."""
    LENGTH = auto()
    CHUNKED = auto()
    CLOSE = auto()
    """Responses only: the connection ends with the body, so a lost connection cannot be told from a whole body."""


class Framing(NamedTuple):
    """Where a message ends."""

    ending: Ending
    length: int | None = None
    """What Content-Length says; None when it is absent. A response without a body (HEAD, 304) may say one, too."""


NO_BODY = Framing(Ending.NONE)
CHUNKED = Framing(Ending.CHUNKED)
UNTIL_CLOSE = Framing(Ending.CLOSE)


def length(octets: int) -> Framing:
    """A body of so many bytes."""
    return Framing(Ending.LENGTH, octets)


@dataclass(frozen=True, slots=True)
class RequestHead:
    method: str
    target: str
    """In origin form: a path that begins with `/`, and perhaps a query; visible ASCII, not normalised."""
    fields: Fields
    """With exactly one Host."""
    framing: Framing = NO_BODY
    keep_alive: bool = True
    """Whether the client takes another response on this connection."""
    protocol: str = "HTTP/1.1"
    """As it is logged; or HTTP/1.0, HTTP/2."""
    expects_continue: bool = False
    """The client waits for 100 (Continue) before it sends the body. The Expect field is among the fields then."""
    takes_trailers: bool = False
    """The client has said `TE: trailers`."""
    upgrades: bytes = b""
    """The protocol that the client asks for (RFC 9110 section 7.8), in lower case: `websocket`, mostly."""


UNREAD = RequestHead("GET", "/", (), keep_alive=False)
"""What is answered when a request could not be read."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    status: int
    reason: bytes
    fields: Fields
    framing: Framing = NO_BODY

    @property
    def interim(self) -> bool:
        """1xx: the response itself is still to come."""
        return self.status < 200 and not self.switches

    @property
    def switches(self) -> bool:
        """The WebSocket, or another protocol, begins: what comes next is no HTTP."""
        return self.status == 101


@dataclass(frozen=True, slots=True)
class Body:
    """The next bytes of a body, without framing; never empty."""

    data: bytes


@dataclass(frozen=True, slots=True)
class End:
    """The message is whole."""

    trailers: Fields = ()
    """What came behind the body, as far as it goes on."""


END = End()

RequestEvent = RequestHead | Body | End
ResponseEvent = ResponseHead | Body | End
