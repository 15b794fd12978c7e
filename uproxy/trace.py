"""`traceparent`, the header that makes spans of several processes one trace: W3C Trace Context, version 00."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

_RECORDED: Final = 0x01
# A trace, a span (neither is all zeros), and flags.
_HEADER: Final = re.compile(rb"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


class Traced(NamedTuple):
    """What a caller says: its trace (32 hex digits), and its span in it (16), empty when it records none."""

    trace: str
    span: str


def read(header: bytes) -> Traced | None:
    """None for what is no such header."""
    found = _HEADER.fullmatch(header)
    if found is None:
        return None
    return Traced(found[1].decode(), found[2].decode() if int(found[3], 16) & _RECORDED else "")


def write(trace: str, own: str, callers: str) -> bytes:
    """For who is called next, so that its span follows ours or else the caller's; empty: that one is not recorded."""
    follows = own or callers
    return (f"00-{trace}-{follows}-01" if follows else f"00-{trace}-{trace[:16]}-00").encode()
