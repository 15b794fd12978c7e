"""Heads of HTTP/2, as they go on."""

from __future__ import annotations

import pytest

from waypoint.http2_heads import read_request, written_request

REQUEST = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/")]


@pytest.mark.parametrize(
    ("crumbs", "cookie"),
    [([b"a=1", b"b=2"], b"a=1; b=2"), ([b"a=1", b""], b"a=1"), ([b"", b"a=1", b"", b"b=2"], b"a=1; b=2"), ([b""], b"")],
)
def test_crumbs_of_a_cookie_are_one_that_can_be_written(crumbs: list[bytes], cookie: bytes) -> None:
    head = read_request([*REQUEST, *((b"cookie", crumb) for crumb in crumbs)], ended=True)
    assert (b"cookie", cookie) in head.fields
    assert (b"cookie", cookie) in written_request(head)
