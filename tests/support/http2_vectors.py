"""Requests by HTTP/2 that become other ones when they are written as HTTP/1.1, and what becomes of each here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.support.hbone import CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PADDED, PRIORITY_FLAG, frame

Fields = Sequence[tuple[bytes, bytes]]

METHOD, SCHEME, AUTHORITY, PATH = (b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/x")
HEAD = (METHOD, SCHEME, AUTHORITY, PATH)
WEBSOCKET = ((b":method", b"CONNECT"), (b":protocol", b"websocket"))
SMUGGLED = b"GET /y HTTP/1.1\r\nHost: b\r\n\r\n"


@dataclass(frozen=True)
class Sent:
    """What is sent on a stream. No body: the head ends the stream."""

    fields: Fields
    body: bytes | None = None
    trailers: Fields = ()

    def frames(self, stream: int) -> bytes:
        bodiless = self.body is None and not self.trailers
        frames = frame(HEADERS, END_HEADERS | (END_STREAM if bodiless else 0), stream, block(self.fields))
        if self.body is not None:
            frames += frame(DATA, 0 if self.trailers else END_STREAM, stream, self.body)
        if self.trailers:
            frames += frame(HEADERS, END_HEADERS | END_STREAM, stream, block(self.trailers))
        return frames


def block(fields: Fields) -> bytes:
    """HPACK: literals without indexing, new names, no Huffman."""
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)


def _text(text: bytes) -> bytes:
    """RFC 7541 section 5.2."""
    if len(text) < 127:
        return bytes((len(text),)) + text
    left = len(text) - 127
    length = b"\x7f"
    while left >= 128:
        length += bytes((left & 127 | 128,))
        left >>= 7
    return length + bytes((left,)) + text


def _get(*fields: tuple[bytes, bytes], **pseudo: bytes) -> Sent:
    """A GET of /x with other fields; `pseudo`: other pseudo-header fields, empty for none."""
    whole = {b":method": b"GET", b":scheme": b"http", b":authority": b"a", b":path": b"/x"}
    whole |= {b":" + name.encode(): value for name, value in pseudo.items()}
    return Sent((*whole.items(), *fields))


def _without(name: bytes, *fields: tuple[bytes, bytes]) -> Sent:
    return Sent((*(field for field in HEAD if field[0] != name), *fields))


REFUSED = {
    **{
        f"a {kind} with {bad!r}": sent
        for bad in (b"\r\nX: y", b"\r\n\r\n" + SMUGGLED, b"\n", b"\r", b"\0")
        for kind, sent in {
            "value": _get((b"x", b"a" + bad)),
            "name": _get((b"x" + bad, b"a")),
            "method": _get(method=b"GET / HTTP/1.1" + bad),
            "path": _get(path=b"/x HTTP/1.1" + bad),
            "scheme": _get(scheme=b"http" + bad),
            "host": _get(authority=b"a" + bad),
            "trailer": Sent(HEAD, b"hello", ((b"x", b"a" + bad),)),
        }.items()
    },
    **{f"the value {value!r}": _get((b"x", value)) for value in (b" a", b"a ", b"\ta", b"a\t", b" ", b"\x7f", b"\x0b")},
    **{
        f"the name {name!r}": _get((name, b"a"))
        for name in (b"", b"X", b"x y", b"x:", b" x", b"x ", b"x\t", b"\xe9", b"x(", b'"x"', b"x/y", b"x\x7f")
    },
    **{
        f"{name.decode()}: {value.decode()}": Sent((*HEAD, (name, value)), b"hello")
        for name, value in (
            (b"connection", b"close"),
            (b"connection", b"content-length"),
            (b"keep-alive", b"5"),
            (b"proxy-connection", b"close"),
            (b"upgrade", b"h2c"),
            (b"upgrade", b"websocket"),
            (b"te", b"gzip"),
            (b"te", b"trailers, chunked"),
            (b"transfer-encoding", b"chunked"),
            (b"transfer-encoding", b"identity"),
            (b"transfer_encoding", b"chunked"),
            (b"content_length", b"0"),
            (b"x_forwarded_for", b"1.1.1.1"),
            (b"content-length", b"4"),
            (b"content-length", b"6"),
            (b"content-length", b"0"),
            (b"content-length", b"+5"),
            (b"content-length", b"05"),
            (b"content-length", b"5, 5"),
            (b"content-length", b"0x5"),
            (b"content-length", b""),
            (b"content-length", b"5 5"),
            (b"content-length", b"-5"),
            (b"host", b"b"),
        )
    },
    "two lengths": Sent((*HEAD, (b"content-length", b"5"), (b"content-length", b"0")), b"hello"),
    "two equal lengths": Sent((*HEAD, (b"content-length", b"5"), (b"content-length", b"5")), b"hello"),
    "a length without a body": Sent((*HEAD, (b"content-length", b"5"))),
    "a body behind length 0": Sent((*HEAD, (b"content-length", b"0")), SMUGGLED),
    "a length of less than the body, then trailers": Sent(
        (*HEAD, (b"content-length", b"5")), b"hello!", ((b"x", b"y"),)
    ),
    "two Hosts": Sent((*HEAD, (b"host", b"a"), (b"host", b"a"))),
    "two Hosts and no authority": _without(b":authority", (b"host", b"a"), (b"host", b"b")),
    "neither authority nor Host": _without(b":authority"),
    **{f"no {name.decode()}": _without(name) for name in (b":method", b":scheme", b":path")},
    **{f"{field[0].decode()} twice": Sent((*HEAD, field)) for field in HEAD},
    **{
        f"{field[0].decode()} behind a field": Sent((*_without(field[0]).fields, (b"x", b"y"), field)) for field in HEAD
    },
    "an unknown pseudo-header field": Sent((*HEAD, (b":x", b"y"))),
    "a status": Sent((*HEAD, (b":status", b"200"))),
    "a WebSocket that ends with its head": Sent((*WEBSOCKET, SCHEME, AUTHORITY, PATH)),
    "a WebSocket with a length": Sent((*WEBSOCKET, SCHEME, AUTHORITY, PATH, (b"content-length", b"5")), b"hello"),
    "a WebSocket with two keys": Sent(
        (*WEBSOCKET, SCHEME, AUTHORITY, PATH, (b"sec-websocket-key", b"a"), (b"sec-websocket-key", b"b")), b""
    ),
    "a WebSocket to nowhere": Sent((*WEBSOCKET, SCHEME, AUTHORITY), b""),
    "a WebSocket to a line": Sent((*WEBSOCKET, SCHEME, AUTHORITY, (b":path", b"/x HTTP/1.1\r\nX: y")), b""),
    "a protocol without CONNECT": Sent((*HEAD, (b":protocol", b"websocket"))),
    "a pseudo-header field behind the body": Sent(HEAD, b"hello", ((b":path", b"/y"),)),
    "a coding behind the body": Sent(HEAD, b"hello", ((b"transfer-encoding", b"chunked"),)),
    "a name in capitals behind the body": Sent(HEAD, b"hello", ((b"X", b"y"),)),
    **{
        f"the path {path!r}": _get(path=path)
        for path in (
            b"",
            b"x",
            b"*",
            b"../x",
            b"?x",
            b"/x y",
            b"/x#y",
            b"/\xe9",
            b"/\x7f",
            b"http://a/",
            b"//a/x HTTP/1.1",
            b"/x?a b",
            b"/x\t",
        )
    },
    **{
        f"the host {host!r}": _get(authority=host)
        for host in (
            b"",
            b"a b",
            b"a,b",
            b"a/b",
            b"a?b",
            b"a#b",
            b"u@a",
            b"a\\b",
            b"a:b",
            b"a:80:80",
            b"[::1",
            b"::1",
            b"\xe9",
            b"http://a",
            b"a:123456",
        )
    },
    **{
        f"the method {method!r}": _get(method=method)
        for method in (b"", b"get", b"GET /y", b"G:T", b"G\xcaT", b'"GET"', b"-GET", b"G(T")
    },
    **{f"the scheme {scheme!r}": _get(scheme=scheme) for scheme in (b"", b"ftp", b"HTTP://a/", b"http://b/?")},
}
"""Each answered with 400, or reset; nothing of it is forwarded as a whole request."""

OTHERWISE_REFUSED = {
    "a tunnel": (501, Sent(((b":method", b"CONNECT"), (b":authority", b"a:80")))),
    "a tunnel with a path": (501, Sent(((b":method", b"CONNECT"), SCHEME, AUTHORITY, PATH))),
    "another protocol": (501, Sent((WEBSOCKET[0], (b":protocol", b"connect-udp"), SCHEME, AUTHORITY, PATH), b"")),
    "a long path": (414, _get(path=b"/" + b"a" * 16384)),
    "another expectation": (417, Sent((*HEAD, (b"expect", b"200-ok")), b"hello")),
}
"""With which status."""

TAKEN = {
    "nothing special": _get(),
    "a body": Sent(HEAD, b"hello"),
    "a body with its length": Sent((*HEAD, (b"content-length", b"5")), b"hello"),
    "an empty body": Sent(HEAD, b""),
    "an empty body with its length": Sent((*HEAD, (b"content-length", b"0")), b""),
    "no body, with its length": Sent((*HEAD, (b"content-length", b"0"))),
    "a GET with a body": Sent(((b":method", b"GET"), *HEAD[1:]), b"hello"),
    "a body that looks like a request": Sent(HEAD, SMUGGLED),
    "a body that looks like chunks": Sent(HEAD, b"0\r\n\r\n" + SMUGGLED),
    "a body of a length that looks like a request": Sent((*HEAD, (b"content-length", b"28")), SMUGGLED),
    "a host that is said twice": _get((b"host", b"A")),
    "a host in Host alone": Sent((METHOD, SCHEME, PATH, (b"host", b"a"))),
    "the other scheme": _get(scheme=b"https"),
    "crumbs of a cookie": _get((b"cookie", b"a=1"), (b"cookie", b"b=2")),
    "trailers are taken": Sent((*HEAD, (b"te", b"trailers")), b"hello"),
    "trailers": Sent(HEAD, b"hello", ((b"content-length", b"9"), (b"host", b"b"), (b"x", b"y"))),
    "trailers without a body": Sent(HEAD, None, ((b"x", b"y"),)),
    "an expectation": Sent((*HEAD, (b"expect", b"100-continue")), b"hello"),
    "an empty value": _get((b"x", b"")),
    "octets above ASCII in a value": _get((b"x", b"caf\xc3\xa9 \xa0\x85")),
    "a field twice": _get((b"x", b"1"), (b"x", b"2")),
    "an underscore": _get((b"user_id", b"1")),
    "a query with everything": _get(path=b"/a?b=c&d=%20[]{}|^`\\\"<>?/;:@!$'()*,~"),
    "a method of another standard": _get(method=b"PROPFIND"),
    "a priority": _get((b"priority", b"u=1")),
}  # fmt: skip
"""Each one request."""

IN_OTHER_FRAMES = {
    "padding": frame(HEADERS, END_HEADERS | PADDED, 1, b"\3" + block(HEAD) + bytes(3))
    + frame(DATA, PADDED | END_STREAM, 1, b"\7hello" + bytes(7)),
    "a weight": frame(HEADERS, END_HEADERS | END_STREAM | PRIORITY_FLAG, 1, b"\0\0\0\0\x0f" + block(HEAD)),
    "a head in pieces": frame(HEADERS, END_STREAM, 1, block(HEAD)[:9])
    + frame(CONTINUATION, 0, 1, block(HEAD)[9:20])
    + frame(CONTINUATION, END_HEADERS, 1, block(HEAD)[20:]),
    "empty frames": frame(HEADERS, END_HEADERS, 1, block(HEAD))
    + frame(DATA, 0, 1)
    + frame(DATA, END_STREAM, 1, b"hello"),
}
"""Each one request on stream 1."""

REFUSED_IN_OTHER_FRAMES = {
    "a second frame of a body that was whole": frame(HEADERS, END_HEADERS, 1, block((*HEAD, (b"content-length", b"5"))))
    + frame(DATA, 0, 1, b"hello")
    + frame(DATA, END_STREAM, 1, SMUGGLED),
    "a second head": frame(HEADERS, END_HEADERS, 1, block(HEAD)) + frame(HEADERS, END_HEADERS, 1, block(HEAD)),
    "a field behind an unfinished head": frame(HEADERS, END_STREAM, 1, block(HEAD))
    + frame(DATA, END_STREAM, 1, b"hello"),
    "a head that ends within a name": frame(HEADERS, END_HEADERS | END_STREAM, 1, block(HEAD) + b"\0\5x"),
}
"""Each answered with 400, or reset."""

_PIECES = (
    b"\r\n", b"\n", b"\r", b" ", b"\t", b"\0", b":", b",", b"5", b"0", b"\xa0", b"\x0b", b"/..", b"#", b"%2f", b"A",
    b"HTTP/1.1", SMUGGLED,
)  # fmt: skip
_FIELDS = (
    (b"content-length", b"5"), (b"content-length", b"0"), (b"transfer-encoding", b"chunked"), (b"te", b"trailers"),
    (b"connection", b"x"), (b"host", b"a"), (b"host", b"b"), (b"expect", b"100-continue"), (b"cookie", b"a=1"),
    (b"x", b"y"), (b":path", b"/y"), (b"upgrade", b"h2c"), (b"trailer", b"x"),
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, messages: Sequence[Sent]) -> Sent:
    """One of them with up to three of its fields altered, added or left out, or another body."""
    sent = draw(st.sampled_from(messages))
    fields = list(sent.fields)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(len(fields) - 1, 0)))
        kind = draw(st.sampled_from(("add", "add", "name", "value", "value", "drop")))
        if kind == "add":
            fields.insert(draw(st.integers(0, len(fields))), draw(st.sampled_from(_FIELDS)))
        elif fields:
            name, value = fields.pop(at)
            piece = draw(st.sampled_from(_PIECES))
            where = draw(st.integers(0, len(value if kind == "value" else name)))
            if kind == "value":
                fields.insert(at, (name, value[:where] + piece + value[where:]))
            elif kind == "name":
                fields.insert(at, (name[:where] + piece + name[where:], value))
    body = draw(st.sampled_from((sent.body, sent.body, None, b"", b"hello", SMUGGLED)))
    return Sent(tuple(fields), body, sent.trailers)
