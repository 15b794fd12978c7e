"""Headers of the PROXY protocol (`uproxy.proxy_protocol`), whole and cut short, and written again."""

from __future__ import annotations

from collections.abc import Iterable

from control.api.address import IpAddress
from control.api.identity import SpiffeId
from uproxy import proxy_protocol
from uproxy.proxy_protocol import MAX_BODY, HeaderError

MAX_BYTES = 600
WORDS = (
    b"\r\n\r\n\x00\r\nQUIT\n", b"\x21\x11", b"\x21\x21", b"\x00\x0c", b"\x00\x24", b"\xd0\x00\x1e",
    b"\x02\x00\x03", b"\x05\x00\x20", b"spiffe://cluster.local/ns/shop/sa/web", b"\x00" * 10 + b"\xff\xff",
)  # fmt: skip
_WEB = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/web")


def seeds() -> Iterable[bytes]:
    v4, v6 = (IpAddress("10.0.0.1"), 4711), (IpAddress("fd00::1"), 80)
    for source, destination in ((v4, v4), (v6, v6), (v4, v6)):
        yield proxy_protocol.header(source, destination, _WEB, authority=b"db.shop", unique_id=b"ab" * 16) + b"GET /"
        yield proxy_protocol.header(source, destination, _WEB)
    yield proxy_protocol.header(v4, v4, None)


def check(data: bytes) -> None:
    try:
        found = proxy_protocol.read(data)
    except HeaderError:
        return
    if found is None:
        assert len(data) < 16 + MAX_BODY
        return
    start = data[: found.length]
    assert proxy_protocol.read(start) == found, "what follows is not looked at"
    for length in range(found.length):
        assert proxy_protocol.read(start[:length]) is None, "a piece is neither refused nor taken for the whole"
    written = proxy_protocol.header(
        found.source,
        found.destination,
        found.principal,
        authority=found.authority,
        unique_id=found.unique_id.encode("ascii"),
    )
    again = proxy_protocol.read(written)
    assert again is not None
    assert (again.source, again.destination, again.principal) == (found.source, found.destination, found.principal)
    assert (again.authority, again.unique_id) == (found.authority, found.unique_id)
