"""What a connection speaks, by its first bytes, where its port does not say. No I/O.

HTTP is what `http1_head` takes for the line that begins a request, or HTTP/2's preface; whatever cannot become one of
these is opaque TCP. What is nearly HTTP is opaque, too: it is passed on under L4 policy alone, and only where nothing
asks for more (`Rules.asks_http`).
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Final

from uproxy.hbone import PREFACE
from waypoint.http1_head import MAX_START_LINE, REQUEST_LINE

TIMEOUT_S: Final = 1.0
"""How long a client may be silent, or within its first line, before it is taken for one that waits for its server."""

_LINE: Final = re.compile(REQUEST_LINE)
# Its beginnings, of any length.
_VERSION: Final = rb"(?:H|HT|HTT|HTTP|HTTP/|HTTP/1|HTTP/1\.|HTTP/1\.[01]\r?)"
_BEGUN: Final = re.compile(
    rb"(?:\r|(?:\r\n)?[A-Z](?:[A-Z-]{0,31}+(?: (?:[!\x22$-~]*+(?: " + _VERSION + rb"?)?)?)?)?|\r\n|)"
)


class Begun(Enum):
    """What a connection's first bytes are of."""

    HTTP1 = auto()
    HTTP2 = auto()
    OPAQUE = auto()


def version(beginning: bytes) -> Begun | None:
    """Which HTTP, of a connection that speaks HTTP. None: it may still become either."""
    if not PREFACE.startswith(beginning[: len(PREFACE)]):
        return Begun.HTTP1
    return Begun.HTTP2 if len(beginning) >= len(PREFACE) else None


def begun(beginning: bytes) -> Begun | None:
    """None: it may still become one or another."""
    if beginning.startswith(PREFACE):
        return Begun.HTTP2
    if _LINE.match(beginning):
        return Begun.HTTP1
    if PREFACE.startswith(beginning):
        return None
    return None if len(beginning) <= MAX_START_LINE and _BEGUN.fullmatch(beginning) else Begun.OPAQUE
