"""What a Redis is asked and answers: RESP2, as far as it is needed. Pure: bytes in, replies out."""

from __future__ import annotations

from typing import Final

MAX_LINE: Final = 1024
MAX_BULK: Final = 65_536
MAX_ITEMS: Final = 64
"""Of one array, and of those in it together."""


class ReplyError(Exception):
    """What a Redis answers instead of what was asked for."""


class RespError(Exception):
    """What came is no reply, or a larger one than there is to this program's questions."""


def command(*arguments: bytes) -> bytes:
    """One command, as it is sent."""
    parts = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        parts.append(b"$%d\r\n%b\r\n" % (len(argument), argument))
    return b"".join(parts)


class RespReader:
    """Takes replies out of a stream of bytes."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> list[object]:
        """The replies that are whole now: int, bytes, None, ReplyError, or a list of these. Raises RespError."""
        self._received += data
        found: list[object] = []
        at = 0
        while (read := _read(self._received, at, [MAX_ITEMS])) is not None:
            reply, at = read
            found.append(reply)
        del self._received[:at]
        return found


def _read(data: bytearray, at: int, room: list[int]) -> tuple[object, int] | None:
    """The reply that begins here, and where the next one does; None: it is not whole. Raises RespError.

    `room`: how many items there may still be.
    """
    end = data.find(b"\r\n", at)
    if end < 0 or end - at > MAX_LINE:
        if len(data) - at > MAX_LINE:
            raise RespError(f"a line of more than {MAX_LINE} bytes")
        return None
    kind, text, at = data[at : at + 1], bytes(data[at + 1 : end]), end + 2
    if kind == b"+":
        return text, at
    if kind == b"-":
        return ReplyError(text.decode("utf-8", "replace")), at
    number = _number(text)
    if kind == b":":
        return number, at
    if kind == b"$":
        return _read_bulk(data, at, number)
    if kind == b"*":
        room[0] -= max(number, 0)
        if number < -1 or room[0] < 0:
            raise RespError(f"an array of {number} items")
        items: list[object] = []
        for _ in range(number):
            read = _read(data, at, room)
            if read is None:
                return None
            items.append(read[0])
            at = read[1]
        return (items if number >= 0 else None), at
    raise RespError(f"a reply that begins with {bytes(kind)!r}")


def _read_bulk(data: bytearray, at: int, length: int) -> tuple[object, int] | None:
    if length == -1:
        return None, at
    if not 0 <= length <= MAX_BULK:
        raise RespError(f"a text of {length} bytes")
    end = at + length
    if len(data) < end + 2:
        return None
    if data[end : end + 2] != b"\r\n":
        raise RespError("a text that is longer than it says")
    return bytes(data[at:end]), end + 2


def _number(text: bytes) -> int:
    digits = text.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 19:
        raise RespError(f"{text[:40]!r} where a number belongs")
    return int(text)
