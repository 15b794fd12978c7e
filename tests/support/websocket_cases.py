"""What Autobahn's suite asks of a WebSocket (RFC 6455, RFC 7692), as bytes that a client sends, and a server for them.

The numbers of the classes are Autobahn's. The server echoes messages; the client of a case sends all of it, and then
reads until the server has closed.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator
from typing import Final

import wsproto.frame_protocol
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage
from wsproto.extensions import PerMessageDeflate
from wsproto.utilities import LocalProtocolError

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
_MASK: Final = b"\x37\xfa\x21\x3d"


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, masked: bool = True, wide: int = 0
) -> bytes:
    """`wide`: bytes of a length that is written longer than it must be, 2 or 8."""
    length = len(payload)
    first = bytes((fin << 7 | rsv << 4 | opcode,))
    if length < 126 and not wide:
        size = bytes((masked << 7 | length,))
    elif wide != 8 and length < 65536:
        size = bytes((masked << 7 | 126,)) + struct.pack(">H", length)
    else:
        size = bytes((masked << 7 | 127,)) + struct.pack(">Q", length)
    if not masked:
        return first + size + payload
    key = int.from_bytes((_MASK * (length // 4 + 1))[:length])
    return first + size + _MASK + (int.from_bytes(payload) ^ key).to_bytes(length)


def close(code: int | None = 1000, reason: bytes = b"") -> bytes:
    return frame(CLOSE, b"" if code is None else struct.pack(">H", code) + reason)


def _deflated(data: bytes) -> bytes:
    """RFC 7692 section 7.2.1."""
    packer = zlib.compressobj(wbits=-15)
    return (packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]


_SIZES: Final = (0, 1, 125, 126, 127, 128, 65535, 65536)
_HELLO: Final = "Hello-µ@ßöäüàá-UTF-8!!".encode()
_VALID: Final = (
    b"\xce\xba\xe1\xbd\xb9",
    b"\xf4\x8f\xbf\xbf",
    b"\xef\xbf\xbf",
    b"\xed\x9f\xbf",
    b"\xef\xbb\xbf",
    b"\0",
    b"\x7f",
)
_INVALID: Final = (
    b"\x80", b"\xbf", b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf", b"\xc1\xbf", b"\xed\xa0\x80", b"\xed\xbf\xbf",
    b"\xf4\x90\x80\x80", b"\xfc\x83\xbf\xbf\xbf\xbf", b"\xfe", b"\xff", b"\xce", b"\xe1\xbd", b"\xf0\x90\x80",
    b"\xce\xba\xe1\xbd\xb9\xed\xa0\x80edited",
)  # fmt: skip
_GOOD_CODES: Final = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999)
_BAD_CODES: Final = (0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999, 5000, 65535)


def _cases() -> Iterator[tuple[str, bytes]]:
    for size in _SIZES:
        yield f"1.1 text of {size}", frame(TEXT, b"*" * size) + close()
        yield f"1.2 binary of {size}", frame(BINARY, b"\xfe" * size) + close()
    yield "2.1 ping", frame(PING) + close()
    yield "2.2 ping with text", frame(PING, b"Hello, world!") + close()
    yield "2.3 ping with bytes", frame(PING, b"\0\xff\xfe\xfd\xfc\xfb\0\xff") + close()
    yield "2.4 ping of 125", frame(PING, b"\xfe" * 125) + close()
    yield "2.5 ping of 126", frame(PING, b"\xfe" * 126) + close()
    yield "2.7 pong unasked", frame(PONG) + close()
    yield "2.9 pong unasked, then ping", frame(PONG, b"unsolicited") + frame(PING, b"ping") + close()
    yield "2.10 ten pings", b"".join(frame(PING, b"payload-%d" % i) for i in range(10)) + close()
    for rsv in range(1, 8):
        yield f"3 text with rsv {rsv}", frame(TEXT, b"a") + frame(TEXT, b"b", rsv=rsv) + frame(PING) + close()
    yield "3.6 binary with rsv", frame(BINARY, b"\0" * 8, rsv=6) + close()
    yield "3.7 close with rsv", frame(CLOSE, b"\x03\xe8", rsv=7)
    for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
        yield f"4 opcode {opcode}", frame(TEXT, b"a") + frame(opcode, b"reserved") + frame(PING) + close()
    yield "5.1 ping in pieces", frame(PING, b"a", fin=False) + frame(CONTINUATION, b"b") + close()
    yield "5.2 pong in pieces", frame(PONG, b"a", fin=False) + frame(CONTINUATION, b"b") + close()
    two = frame(TEXT, b"fragment1", fin=False), frame(CONTINUATION, b"fragment2")
    yield "5.3 text in two pieces", b"".join(two) + close()
    yield "5.6 ping between", two[0] + frame(PING, b"ping") + two[1] + close()
    yield "5.9 continuation of nothing", frame(CONTINUATION, b"a") + frame(TEXT, b"b") + close()
    yield "5.12 unfinished continuation of nothing", frame(CONTINUATION, b"a", fin=False) + frame(TEXT, b"b") + close()
    yield "5.15 continuation behind the end", b"".join(two) + frame(CONTINUATION, b"c", fin=False) + close()
    yield "5.18 a message within another", two[0] + frame(TEXT, b"fragment2") + close()
    many = (frame(CONTINUATION, b"fragment%d" % i, fin=i == 5) for i in range(2, 6))
    yield "5.19 five pieces and pings", frame(TEXT, b"fragment1", fin=False) + frame(PING, b"1").join(many) + close()
    empty = frame(TEXT, fin=False) + frame(CONTINUATION, fin=False) + frame(CONTINUATION)
    yield "6.1 empty pieces", empty + close()
    yield "6.2 text", frame(TEXT, _HELLO) + close()
    octets = [frame(CONTINUATION, _HELLO[at : at + 1], fin=False) for at in range(len(_HELLO))]
    yield "6.2 text, a piece an octet", frame(TEXT, fin=False) + b"".join(octets) + frame(CONTINUATION) + close()
    for valid in _VALID:
        yield f"6 text {valid!r}", frame(TEXT, valid) + close()
        halves = frame(TEXT, valid[:1], fin=False) + frame(CONTINUATION, valid[1:])
        yield f"6 text {valid!r} in pieces", halves + close()
    for invalid in _INVALID:
        yield f"6 text {invalid!r}", frame(TEXT, invalid) + close()
        halves = frame(TEXT, invalid[:-1], fin=False) + frame(CONTINUATION, invalid[-1:])
        yield f"6 text {invalid!r} in pieces", halves + close()
    yield "7.1.1 text, then close", frame(TEXT, b"Hello World!") + close()
    yield "7.1.2 close twice", close() + close()
    yield "7.1.3 ping behind close", close() + frame(PING)
    yield "7.1.4 text behind close", close() + frame(TEXT, b"Hello World!")
    yield "7.1.5 close within a message", frame(TEXT, b"fragment1", fin=False) + close() + frame(CONTINUATION, b"2")
    yield "7.1.6 a large message, then close", frame(TEXT, b"BAsd7&jh23" * 26 * 1024) + close() + frame(PING)
    yield "7.3.1 close without a code", close(None)
    yield "7.3.2 close of one octet", frame(CLOSE, b"a")
    yield "7.3.4 close with a reason", close(1000, b"Hello World!")
    yield "7.3.5 close with a reason of 123", close(1000, b"*" * 123)
    yield "7.3.6 close with a reason of 124", close(1000, b"*" * 124)
    yield "7.5.1 close with a reason that is no text", close(1000, b"\xce\xba\xe1\xbd\xb9\xed\xa0\x80edited")
    for code in (*_GOOD_CODES, *_BAD_CODES):
        yield f"7.7, 7.9 close with {code}", close(code)
        yield f"7.7, 7.9 close with {code} and a reason", close(code, b"reason")
    yield "9.1 text of 1 MiB", frame(TEXT, b"*" * (1 << 20)) + close()
    pieces = [frame(CONTINUATION, b"*" * 65536, fin=False)] * 15
    whole = frame(BINARY, b"*" * 65536, fin=False) + b"".join(pieces) + frame(CONTINUATION)
    yield "9.4 binary of 1 MiB in pieces", whole + close()
    halves = frame(TEXT, b"*" * 50, fin=False) + frame(CONTINUATION, b"*" * 50, fin=False) * 1299 + frame(CONTINUATION)
    yield "10.1 text in 1301 pieces", halves + close()
    yield "a length of 16 bits that fits 7", frame(TEXT, b"a", wide=2) + close()
    yield "a length of 64 bits that fits 7", frame(TEXT, b"a", wide=8) + close()
    yield "a length of 64 bits with its highest set", b"\x81\xff" + b"\xff" * 8 + _MASK + b"a" * 64
    yield "a frame without a mask", frame(TEXT, b"a", masked=False) + close()
    yield "an end without close", frame(TEXT, b"a")


def _compressed() -> Iterator[tuple[str, bytes]]:
    for size in (0, 16, 1024, 131072):
        text = b"{'a': 1, " * (size // 9)
        yield f"12.1 compressed text of {size}", frame(TEXT, _deflated(text), rsv=4) + close()
        yield f"12.2 compressed binary of {size}", frame(BINARY, _deflated(bytes(size)), rsv=4) + close()
    yield "12.3 a hundred compressed", frame(TEXT, _deflated(b"Hello"), rsv=4) * 100 + close()
    packed = _deflated(b"Hello Hello Hello")
    halves = frame(TEXT, packed[:5], fin=False, rsv=4) + frame(CONTINUATION, packed[5:])
    yield "12.4 compressed in pieces", halves + close()
    yield "12.5 text beside compressed", frame(TEXT, b"plain") + frame(TEXT, packed, rsv=4) + close()
    yield "12.6 compressed garbage", frame(TEXT, b"\xff\xff\xff", rsv=4) + close()
    yield "12.7 compressed ping", frame(PING, packed, rsv=4) + close()
    yield "12.8 a compressed continuation", frame(TEXT, packed[:5], fin=False) + frame(CONTINUATION, packed[5:], rsv=4)


PLAIN: Final = dict(_cases())
COMPRESSED: Final = dict(_compressed())


class Echo:
    """A server behind the opening handshake. `over` once it wants no more."""

    def __init__(self, *, compressed: bool) -> None:
        extensions: list[wsproto.extensions.Extension] = []
        if compressed:
            deflate = PerMessageDeflate()
            deflate.accept("permessage-deflate")
            extensions.append(deflate)
        self._connection = Connection(ConnectionType.SERVER, extensions)
        self._message: list[str | bytearray | bytes] = []
        self.over = False

    def feed(self, data: bytes) -> bytes:
        """What it answers; an answer does not depend on how data is cut up."""
        if self.over:
            return b""
        self._connection.receive_data(data)
        answers = b""
        for event in self._connection.events():
            if isinstance(event, TextMessage | BytesMessage):
                self._message.append(event.data)
                if event.message_finished:
                    text = isinstance(event, TextMessage)
                    whole = "".join(map(str, self._message)) if text else b"".join(map(bytes, self._message))  # type: ignore[arg-type]
                    self._message.clear()
                    kind = TextMessage if text else BytesMessage
                    answers += self._connection.send(kind(data=whole))  # type: ignore[arg-type]
            elif isinstance(event, Ping):
                answers += self._connection.send(event.response())
            elif isinstance(event, CloseConnection):
                self.over = True
                with contextlib.suppress(LocalProtocolError):
                    answers += self._connection.send(event.response())
                break
        return answers
