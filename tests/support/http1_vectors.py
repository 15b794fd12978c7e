"""Requests that parsers have been known to read in different ways, and what becomes of each here.

The classes are those of the HTTP Garden's findings and of the request-smuggling literature: sizes, codings, line ends,
names and values, start lines, pipelining.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hypothesis import strategies as st

_CRLF = b"\r\n"


def request(*fields: bytes, line: bytes = b"POST /x HTTP/1.1", body: bytes = b"") -> bytes:
    """A request with `Host: a` first, unless a Host field is among those given."""
    host = () if any(field.lower().startswith(b"host") for field in fields) else (b"Host: a",)
    return _CRLF.join((line, *host, *fields, b"", body))


def chunked(body: bytes) -> bytes:
    return request(b"Transfer-Encoding: chunked", body=body)


def _lengths() -> Iterator[tuple[str, bytes]]:
    for value in (
        b"0x5", b"5_0", b"+5", b"-5", b"05", b"00", b"", b"5 5", b"5,5", b"5, 5", b"5,", b",5", b"5;", b"5.0", b"5e0",
        b"five", b"\xa05", b"5\xa0", b"5\x85", b"\x0b5", b"5\x0c", b"5\x00", b'"5"', b"9" * 19, b"18446744073709551621",
        b"\xef\xbc\x95",
    ):  # fmt: skip
        yield f"Content-Length {value!r}", request(b"Content-Length: " + value, body=b"hello")
    yield "negative zero", request(b"Content-Length: -0")
    yield "two lengths, first longer", request(b"Content-Length: 5", b"Content-Length: 0", body=b"hello")
    yield "two lengths, last longer", request(b"Content-Length: 0", b"Content-Length: 5", body=b"hello")
    yield "two equal lengths", request(b"Content-Length: 5", b"Content-Length: 5", body=b"hello")
    yield "an empty length before a real one", request(b"Content-Length:", b"Content-Length: 5", body=b"hello")
    yield "a length that differs by an underscore", request(b"Content_Length: 5", body=b"hello")


def _codings() -> Iterator[tuple[str, bytes]]:
    body = b"5\r\nhello\r\n0\r\n\r\n"
    both = (b"Content-Length: 5", b"Transfer-Encoding: chunked")
    yield "length, then chunked", request(*both, body=body)
    yield "chunked, then length", request(*reversed(both), body=body)
    yield "length 0 and chunked", request(b"Content-Length: 0", both[1], body=body)
    for value in (
        b"", b",chunked", b"chunked,", b"chunked, chunked", b"chunked, identity", b"identity, chunked", b"identity",
        b"gzip, chunked", b"chunked, gzip", b"xchunked", b"chunkedx", b"chunked;q=1", b"chunke", b"CHUNKED foo",
        b"\x0bchunked", b"chunked\x0b", b"\x0cchunked", b"\xa0chunked", b"chunked\x85", b"\x00chunked", b"chunked\x00",
        b'"chunked"', b"c\xc5\xbfhunked", b"chun\xe2\x84\xaaed", b"chunked\r\n identity", b"\r\n chunked",
        b"\r\n\tchunked", b"chunked\r", b"\rchunked",
    ):  # fmt: skip
        yield f"Transfer-Encoding {value!r}", request(b"Transfer-Encoding: " + value, body=body)
    yield "chunked twice", request(both[1], both[1], body=body)
    yield "identity, then chunked", request(b"Transfer-Encoding: identity", both[1], body=body)
    yield "chunked, then a length in a folded line", request(both[1], b" Content-Length: 5", body=body)
    yield "chunked in HTTP/1.0", request(both[1], line=b"POST /x HTTP/1.0", body=body)
    yield "a coding that differs by an underscore", request(b"Transfer_Encoding: chunked", body=body)
    yield "a coding before a space and the colon", request(b"Transfer-Encoding : chunked", body=body)
    yield "a coding before a tab and the colon", request(b"Transfer-Encoding\t: chunked", body=body)
    yield "a coding behind a bare line feed", request(b"X: y\nTransfer-Encoding: chunked", body=body)
    yield "a coding behind a bare carriage return", request(b"X: y\rTransfer-Encoding: chunked", body=body)


def _chunks() -> Iterator[tuple[str, bytes]]:
    for size in (
        b"0x5", b"5_", b"+5", b"-5", b"", b" 5", b"5 ", b"\t5", b"5\t", b"5\x0b", b"5\x00", b"5g", b"\xa05",
        b"1" * 16, b"f" * 16, b"10000000000000005", b"5\r", b"5\n", b"5;\r", b"5;a\rb", b"5;a\nb", b"5;a\x00", b"5 ;a",
        b"5;" + b"a" * 300,
    ):  # fmt: skip
        yield f"chunk size {size[:20]!r}", chunked(size + b"\r\nhello\r\n0\r\n\r\n")
    yield "a size that ends in LF", chunked(b"5\nhello\r\n0\r\n\r\n")
    yield "a size that ends in CR", chunked(b"5\rhello\r\n0\r\n\r\n")
    yield "a chunk that ends in LF", chunked(b"5\r\nhello\n0\r\n\r\n")
    yield "a chunk that ends in CR", chunked(b"5\r\nhello\r0\r\n\r\n")
    yield "a chunk that ends in XX", chunked(b"5\r\nhelloXX0\r\n\r\n")
    yield "a chunk that does not end", chunked(b"5\r\nhello0\r\n\r\n")
    yield "a chunk that is longer than its size", chunked(b"5\r\nhello!\r\n0\r\n\r\n")
    yield "an empty line before the last chunk", chunked(b"5\r\nhello\r\n\r\n0\r\n\r\n")
    yield "an empty line before the first chunk", chunked(b"\r\n5\r\nhello\r\n0\r\n\r\n")
    yield "a last chunk that ends in LF", chunked(b"5\r\nhello\r\n0\n\r\n")
    yield "an end in LF", chunked(b"5\r\nhello\r\n0\r\n\n")
    yield "an end in CR X", chunked(b"5\r\nhello\r\n0\r\n\rX")
    yield "trailers that end in LF", chunked(b"0\r\nX: y\n\r\n")
    yield "trailers that end in CR", chunked(b"0\r\nX: y\r\r\n\r\n")
    yield "a trailer without a colon", chunked(b"0\r\nGET / HTTP/1.1\r\n\r\n")
    yield "a trailer with a space before the colon", chunked(b"0\r\nX : y\r\n\r\n")
    yield "a trailer without a name", chunked(b"0\r\n: y\r\n\r\n")
    yield "a folded trailer", chunked(b"0\r\nX: y\r\n z\r\n\r\n")
    yield "a trailer with a NUL", chunked(b"0\r\nX: \x00\r\n\r\n")


def _lines() -> Iterator[tuple[str, bytes]]:
    yield "LF everywhere", b"GET / HTTP/1.1\nHost: a\n\n"
    yield "LF after the start line", b"GET / HTTP/1.1\nHost: a\r\n\r\n"
    yield "CR after the start line", b"GET / HTTP/1.1\rHost: a\r\n\r\n"
    yield "LF after a field", b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n"
    yield "CR after a field", b"GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n"
    yield "CR CR LF after a field", b"GET / HTTP/1.1\r\nHost: a\r\r\nX: y\r\n\r\n"
    yield "an end in LF LF", b"GET / HTTP/1.1\r\nHost: a\n\n"
    yield "an end in CR LF LF", b"GET / HTTP/1.1\r\nHost: a\r\n\n"
    yield "an end in LF CR LF", b"GET / HTTP/1.1\r\nHost: a\n\r\n"
    yield "an end in CR LF CR X", b"GET / HTTP/1.1\r\nHost: a\r\n\rX"
    yield "two empty lines before", b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"
    yield "LF before", b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"
    yield "CR before", b"\rGET / HTTP/1.1\r\nHost: a\r\n\r\n"
    yield "a space before", b" GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    yield "NUL before", b"\x00GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def _fields() -> Iterator[tuple[str, bytes]]:
    for field in (
        b"X : y", b"X\t: y", b"X\x0b: y", b": y", b"X", b"X y", b" X: y", b"\tX: y", b"X y: z", b"X\x00: y",
        b"X\x7f: y", b"X\xa0: y", b"\xa0X: y", b"\x85X: y", b"X\xe9: y", b"X(: y", b'"X": y', b"X/: y", b"X@: y",
        b"X[: y", b"X{: y", b"X,Y: z", b"X;Y: z", b"X=Y", b"\\X: y", b"<X>: y", b"X?: y", b"X: y\x00", b"X: \x00y",
        b"X: y\x7f", b"X: \x1b", b"X: y\rz", b"X: y\nz", b"X: y\n z", b"X: y\r\n z", b"X: y\r\n\tz", b"X: y\r\n ",
        b"X:\r\n y", b"X: \x0b", b"X: \x08", b"X_Forwarded_For: 1", b"x-forwarded_client-cert: 1",
        b"X_UPROXY_CALLER: a",
    ):  # fmt: skip
        yield f"field {field!r}", request(field, b"Y: z")
    keys = b"Sec-WebSocket-Key: a", b"Sec-WebSocket-Key: b"
    asked = request(b"Connection: upgrade", b"Upgrade: websocket", *keys, line=b"GET /x HTTP/1.1")
    yield "a WebSocket with two keys", asked
    yield "a first field that begins with a space", b"GET / HTTP/1.1\r\n X: y\r\nHost: a\r\n\r\n"
    yield "a first field that begins with a tab", b"GET / HTTP/1.1\r\n\tHost: a\r\n\r\n"
    for option in (b"close x", b"x(y)", b"\xa0close", b'"close"', b"x:y"):
        yield f"Connection {option!r}", request(b"Connection: " + option)


def _hosts() -> Iterator[tuple[str, bytes]]:
    yield "no Host", b"GET / HTTP/1.1\r\nX: y\r\n\r\n"
    yield "two Hosts", request(b"Host: a", b"Host: b")
    yield "two equal Hosts", request(b"Host: a", b"Host: a")
    yield "two Hosts in HTTP/1.0", request(b"Host: a", b"Host: b", line=b"GET / HTTP/1.0")
    for host in (
        b"", b"a b", b"a,b", b"a/b", b"a?b", b"a#b", b"a@b", b"a\\b", b"a:b", b"a:80:80", b"a:-1", b":80", b"[::1",
        b"[::1]x", b"::1", b"[a]", b"\xe9", b"a%00", b"http://a", b"a\x00", b"a:123456",
    ):  # fmt: skip
        yield f"Host {host!r}", request(b"Host: " + host)
    yield "another host in the target", request(b"Host: a", line=b"GET http://b/ HTTP/1.1")
    yield "a host in the target alone", b"GET http://a/ HTTP/1.1\r\n\r\n"
    yield "a user in the target", request(b"Host: a", line=b"GET http://u@a/ HTTP/1.1")


def _start_lines() -> Iterator[tuple[str, bytes]]:
    for line in (
        b"GET /", b"GET / ", b"GET", b"GET / HTTP/1", b"GET / HTTP/1.", b"GET / HTTP/1.2", b"GET / HTTP/1.32",
        b"GET / HTTP/1.10", b"GET / HTTP/1.01", b"GET / HTTP/01.1", b"GET / HTTP/0.9", b"GET / HTTP/2.0",
        b"GET / HTTP/257.1", b"GET / HTTP/1.257", b"GET / HTTP/-1.1", b"GET / http/1.1", b"GET / HTTP/1,1",
        b"GET / HTTP /1.1", b"GET / HTTP/1.1 ", b"GET / HTTP/1.1\t", b"GET / HTTP/1.1 X", b"GET / XTTP/1.1",
        b"GET  / HTTP/1.1", b"GET /  HTTP/1.1", b"GET\t/ HTTP/1.1", b"GET /\tHTTP/1.1", b"GET /a b HTTP/1.1",
        b"GET\x0b/\x0bHTTP/1.1", b"GET /\x00 HTTP/1.1", b"GET /\x7f HTTP/1.1", b"GET /\xe9 HTTP/1.1",
        b"GET /\xc3\xa9 HTTP/1.1", b"GET /#a HTTP/1.1", b"GET a HTTP/1.1", b"GET ../a HTTP/1.1", b"GET ?a HTTP/1.1",
        b"GET * HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET  HTTP/1.1", b"GET https://a/ HTTP/1.1", b"GET http:a HTTP/1.1",
        b"GET a:80 HTTP/1.1", b"get / HTTP/1.1", b"Get / HTTP/1.1", b"G\xcaT / HTTP/1.1", b"G(T / HTTP/1.1",
        b"G:T / HTTP/1.1", b"G\x00T / HTTP/1.1", b'"GET" / HTTP/1.1', b"-GET / HTTP/1.1", b"0 / HTTP/1.1",
        b"_ / HTTP/1.1", b" / HTTP/1.1", b"HTTP/1.1 200 OK", b"A" * 33 + b" / HTTP/1.1",
    ):  # fmt: skip
        yield f"start line {line!r}", request(line=line)


REFUSED = {
    name: data
    for group in (_lengths, _codings, _chunks, _lines, _fields, _hosts, _start_lines)
    for name, data in group()
}
"""Each answered with 400, and the connection closed."""

OTHERWISE_REFUSED = {
    "a long target": (414, request(line=b"GET /" + b"a" * 16384 + b" HTTP/1.1")),
    "a long head": (431, request(*(b"X-%d: " % i + b"y" * 8192 for i in range(8)))),
    "many fields": (431, request(*(b"X-%d: y" % i for i in range(100)))),
    "many trailers": (431, chunked(b"0\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(101)) + b"\r\n")),
    "long trailers": (431, chunked(b"0\r\n" + b"X: %b\r\n" % (b"y" * 65536) + b"\r\n")),
    "another protocol": (501, request(b"Connection: upgrade", b"Upgrade: websocket")),
    "another protocol without an option": (501, request(b"Upgrade: websocket")),
    "two protocols": (501, request(b"Connection: upgrade", b"Upgrade: h2c, websocket")),
    "a tunnel": (501, request(line=b"CONNECT a:80 HTTP/1.1")),
    "another expectation": (417, request(b"Expect: 200-ok", b"Content-Length: 5", body=b"hello")),
    "two expectations": (417, request(b"Expect: 100-continue, x", b"Content-Length: 5", body=b"hello")),
}
"""With which status."""

TAKEN = {
    "nothing special": request(line=b"GET / HTTP/1.1"),
    "an empty line before": b"\r\n" + request(line=b"GET / HTTP/1.1"),
    "a body": request(b"Content-Length: 5", body=b"hello"),
    "an empty body": request(b"Content-Length: 0"),
    "a GET with a body": request(b"Content-Length: 5", line=b"GET /x HTTP/1.1", body=b"hello"),
    "a HEAD with a chunked body": request(
        b"Transfer-Encoding: chunked", line=b"HEAD /x HTTP/1.1", body=b"2\r\nhi\r\n0\r\n\r\n"
    ),
    "a body that looks like a request": request(b"Content-Length: 30", body=b"GET /y HTTP/1.1\r\nHost: b\r\n\r\n  "),
    "a chunk that looks like an end": chunked(b"5\r\n0\r\n\r\n\r\n0\r\n\r\n"),
    "white space around a length": request(b"Content-Length: \t 5 \t", body=b"hello"),
    "no white space before a length": request(b"Content-Length:5", body=b"hello"),
    "a coding in capitals": request(b"TRANSFER-ENCODING: CHUNKED", body=b"5\r\nhello\r\n0\r\n\r\n"),
    "white space around a coding": request(b"Transfer-Encoding:\t chunked \t", body=b"5\r\nhello\r\n0\r\n\r\n"),
    "chunks": chunked(b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"),
    "a chunk size with zeros before it": chunked(b"0005\r\nhello\r\n000\r\n\r\n"),
    "a chunk size in hexadecimal": chunked(b"aA\r\n" + b"x" * 170 + b"\r\n0\r\n\r\n"),
    "chunk extensions": chunked(b'5;a;b=c;d="e;\\"f"\r\nhello\r\n0;g\r\n\r\n'),
    "no chunks": chunked(b"0\r\n\r\n"),
    "trailers": chunked(b"5\r\nhello\r\n0\r\nX: y\r\nContent-Length: 9\r\nHost: b\r\n\r\n"),
    "an option that names a field": request(b"Connection: x-a, close", b"X-A: 1", b"X-B: 2"),
    "an option that names the length": request(b"Connection: content-length", b"Content-Length: 5", body=b"hello"),
    "an option that names the coding": request(
        b"Connection: transfer-encoding", b"Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n"
    ),
    "an option that names the host": request(b"Connection: host, x-a"),
    "fields of the connection": request(b"Keep-Alive: 5", b"Proxy-Connection: close", b"TE: trailers", b"Trailer: X"),
    "h2c, which one can do without": request(
        b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"
    ),
    "an empty field": request(b"X:", b"Y: \t "),
    "a field twice": request(b"X: 1", b"X: 2"),
    "a field of the fifth class": request(b"!#$%&'*+-.^`|~09aZ: y"),
    "an underscore": request(b"User_Id: 1"),
    "octets above ASCII in a value": request(b"X: caf\xc3\xa9 \xa0\x85"),
    "a query with everything": request(line=b"GET /a?b=c&d=%20[]{}|^`\\\"<>?/;:@!$'()*,~ HTTP/1.1"),
    "a target that is a URL": request(b"Host: A", line=b"GET HTTP://a/b?c HTTP/1.1"),
    "a target that is a URL without a path": request(b"Host: a:80", line=b"GET http://a:80 HTTP/1.1"),
    "a target that is a URL with a query alone": request(b"Host: a", line=b"GET http://a?b HTTP/1.1"),
    "an empty port": request(b"Host: a:"),
    "a complete name as the host": request(b"Host: a_b.C."),
    "an option that names the expectation": request(
        b"Connection: expect", b"Expect: 100-continue", b"Content-Length: 5", body=b"hello"
    ),
    "an address as the host": request(b"Host: [::1]:8080"),
    "a method of another standard": request(line=b"PROPFIND / HTTP/1.1"),
    "HTTP/1.0": request(line=b"GET / HTTP/1.0"),
    "HTTP/1.0 without a host": b"GET / HTTP/1.0\r\n\r\n",
    "HTTP/1.0 with a body": request(b"Content-Length: 5", line=b"POST /x HTTP/1.0", body=b"hello"),
    "HTTP/1.0 with an expectation": request(
        b"Expect: 100-continue", b"Content-Length: 5", line=b"POST /x HTTP/1.0", body=b"hello"
    ),
    "an expectation without a body": request(b"Expect: 100-continue", line=b"GET / HTTP/1.1"),
    "an expectation": request(b"Expect: 100-Continue", b"Content-Length: 5", body=b"hello"),
}
"""Each one request."""

_FRAGMENTS = (
    b"\r\n", b"\n", b"\r", b" ", b"\t", b"\0", b":", b",", b";", b"0", b"5", b"0x", b"\xa0", b"\x0b", b"#", b"?", b"//",
    b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close, x\r\n", b"Host: b\r\n",
    b"Expect: 100-continue\r\n", b"0\r\n\r\n", b"5\r\nhello\r\n", b"X: y\r\n", b"GET /y HTTP/1.1\r\nHost: c\r\n\r\n",
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, messages: Sequence[bytes]) -> bytes:
    """One of the messages with up to three of its places altered."""
    data = draw(st.sampled_from(messages))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.sampled_from(_FRAGMENTS)) + data[at + draw(st.sampled_from((0, 0, 1, 2, 8))) :]
    return data
