"""SPIFFE IDs (`control.api.identity`) beside the standard's grammar in one expression."""

from __future__ import annotations

import re
from collections.abc import Iterable

from control.api.identity import IdentityError, SpiffeId, make_id, proxy_hash

MAX_BYTES = 2200
WORDS = (b"spiffe://", b"/ns/", b"/sa/", b"..", b"%2F", b"@", b":8080", b"?", b"#", b"\xc3\xa9", b"\x00", b"\n")
_SEGMENT = r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+"
_GRAMMAR = re.compile(rf"spiffe://([a-z0-9._-]{{1,255}})/ns/({_SEGMENT})/sa/({_SEGMENT})")


def seeds() -> Iterable[bytes]:
    yield b"spiffe://cluster.local/ns/shop/sa/web"
    yield b"spiffe://a_b-c.1/ns/A.b-c_d/sa/..."
    yield b"spiffe://cluster.local/ns/" + b"x" * 1000 + b"/sa/" + b"y" * 1000
    yield b"spiffe://" + b"t" * 255 + b"/ns/n/sa/s"
    for account in (b".", b"..", b"", b"a/", b"a%41", b"a?", b"\xc3\xa9", b"a\n"):
        yield b"spiffe://cluster.local/ns/shop/sa/" + account


def check(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    expected = _GRAMMAR.fullmatch(text) if len(data) <= 2048 else None
    try:
        found = SpiffeId.parse(text)
    except IdentityError:
        found = None
    assert (found is None) == (expected is None), f"{text!r} is read as {found}"
    if found is None or expected is None:
        return
    assert (found.trust_domain, found.namespace, found.service_account) == expected.groups()
    assert str(found) == text
    assert make_id(found.trust_domain, found.namespace, found.service_account) == found
    assert len(proxy_hash(found)) == 32
