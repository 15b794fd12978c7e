"""How a WebSocket is opened: by HTTP/1.1 (RFC 6455 section 4) and by HTTP/2 (RFC 8441), which needs no keys. No I/O.

Envoy keeps the key that it has from HTTP/1.1, and its accepted one: whoever gives one gets its answer.
"""

from __future__ import annotations

import base64
import hashlib
import os
from typing import Final

from waypoint.messages import Fields, MessageError

PROTOCOL: Final = b"websocket"
KEY: Final = b"sec-websocket-key"
ACCEPT: Final = b"sec-websocket-accept"
_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def new_key() -> bytes:
    return base64.b64encode(os.urandom(16))


def key_of(fields: Fields) -> bytes:
    """The client's; empty where there is none. Raises MessageError for several."""
    found = [value for name, value in fields if name == KEY]
    if len(found) > 1:
        raise MessageError(400, "a WebSocket with several keys")
    return found[0] if found else b""


def accepted(key: bytes) -> bytes:
    """What the server says to this key."""
    return base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())


def without_accept(fields: Fields) -> list[tuple[bytes, bytes]]:
    return [field for field in fields if field[0] != ACCEPT]
