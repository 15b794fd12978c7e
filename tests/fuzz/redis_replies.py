"""What a Redis answers (`waypoint.resp`), whole and in pieces."""

from __future__ import annotations

from collections.abc import Iterable

from waypoint.resp import MAX_BULK, MAX_ITEMS, MAX_LINE, ReplyError, RespError, RespReader

MAX_BYTES = 4096
WORDS = (b"*2\r\n", b"$-1\r\n", b"$3\r\nabc\r\n", b":-9\r\n", b"-NOSCRIPT ", b"+OK\r\n", b"*-1\r\n", b"\r\n", b"65537")


def seeds() -> Iterable[bytes]:
    yield b"$40\r\n" + b"a" * 40 + b"\r\n*2\r\n:0\r\n:0\r\n"
    yield b"-NOAUTH Authentication required.\r\n"
    yield b"*2\r\n*1\r\n$-1\r\n+OK\r\n:12345678901\r\n"


def check(data: bytes) -> None:
    whole, broken = _fed(data, len(data) or 1)
    for size in (1, 7):
        pieces, also = _fed(data, size)
        assert broken == also
        assert broken or pieces == whole
    if not broken and "\ufffd" not in repr(whole):  # an error's text that is no UTF-8 has grown
        again = b"".join(map(_written, whole))
        assert _fed(again, len(again) or 1) == (whole, False), "what was read, written and read once more"


def _fed(data: bytes, size: int) -> tuple[list[object], bool]:
    reader, found = RespReader(), list[object]()
    try:
        for at in range(0, len(data), size):
            found += map(_plain, reader.feed(data[at : at + size]))
    except RespError:
        return found, True
    return found, False


def _plain(reply: object) -> object:
    """With errors as what compares; and within bounds."""
    match reply:
        case ReplyError():
            assert len(str(reply).encode()) <= 3 * MAX_LINE
            return ("error", str(reply))
        case list():
            assert len(reply) <= MAX_ITEMS
            return [_plain(one) for one in reply]
        case bytes():
            assert len(reply) <= MAX_BULK
    return reply


def _written(reply: object) -> bytes:
    match reply:
        case None:
            return b"$-1\r\n"
        case int():
            return b":%d\r\n" % reply
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        case ("error", str(text)):
            return b"-%b\r\n" % text.encode()
        case list():
            return b"*%d\r\n" % len(reply) + b"".join(map(_written, reply))
    raise AssertionError(reply)
