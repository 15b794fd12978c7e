"""What a waypoint judges of a request's target and host (`waypoint.request`): one spelling each, and none that lies."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import unquote_to_bytes

from waypoint.request import RequestError, host_name, read_request

MAX_BYTES = 512
WORDS = (
    b"%2F", b"%2f", b"%5C", b"%00", b"%2e", b"%2E%2e", b"%61", b"%", b"//", b"/./", b"/../", b"/..;", b";v=1", b"\\",
    b"?", b"#", b"{", b"|", b'"', b"\xff", b"..", b"[::1]:80", b"example.", b":80",
)  # fmt: skip
_REFUSED = (b"/a%2fb", b"/a%5Cb", b"/a%00", b"/a\\b", b"/%2e%2e;/", b"/a#b", b"/%zz", b"a", b"/a?b#c")
_CANONICAL = re.compile(r"(?:/(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-F]{2})*)+")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def seeds() -> Iterable[bytes]:
    for path in (b"/", b"/a/b?c=d", b"/%61%7e/./../{x}", b"/a//b/..", b"/a;b=c/..;x", b"/caf%c3%a9?q=%2F", *_REFUSED):
        yield b"shop.example:80 " + path


def check(data: bytes) -> None:
    """The host, a space, and the target."""
    host, _, raw = data.partition(b" ")
    target = raw.decode("latin-1")
    try:
        found = read_request("GET", target, [(b"host", host)])
    except RequestError:
        return
    assert _CANONICAL.fullmatch(found.path), found.path
    assert "//" not in found.path
    assert not {".", ".."} & set(found.path.split("/"))
    for escaped in re.findall("%(..)", found.path):
        octet = int(escaped, 16)
        assert octet not in _UNRESERVED, f"{found.path} has two spellings"
        assert octet not in b"\0/\\", f"{found.path} hides a separator"
    assert re.fullmatch(r"(?:\?[!-\"$-~]*)?", found.query), found.query
    # Whoever reads it again reads the same, and so does who decodes it, as far as there were no dot segments.
    again = read_request("GET", found.target, [(b"host", found.host.encode("latin-1"))])
    assert (again.path, again.query, again.host) == (found.path, found.query, found.host)
    path = raw.partition(b"?")[0]
    if not re.search(rb"(?:/|%2[fF])\.|%2[eE]|//", path):
        assert unquote_to_bytes(found.path) == unquote_to_bytes(path)
    assert host_name(found.host).lower() in found.host
