"""msgpack's reader in Python: a second opinion, and one that guides the fuzzer, which sees nothing of the one in C."""

from __future__ import annotations

import msgpack
from msgpack.fallback import Unpacker

_REFUSED = (ValueError, TypeError, RecursionError, msgpack.UnpackException)


def agrees(data: bytes) -> None:
    """Both readers take it for the same, or refuse it."""
    try:
        found = repr(msgpack.unpackb(data, max_ext_len=0))
    except _REFUSED:
        found = ""
    unpacker = Unpacker(max_buffer_size=len(data), max_ext_len=0)
    try:
        unpacker.feed(data)
        second = repr(unpacker.unpack())
        if unpacker.tell() != len(data):
            second = ""
    except _REFUSED:
        second = ""
    assert found == second
