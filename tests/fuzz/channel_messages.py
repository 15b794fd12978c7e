"""What a uProxy says to the node agent (`uproxy.node.channel`), which trusts it with no more than its own workload."""

from __future__ import annotations

from collections.abc import Iterable

import msgpack

from control.api.address import parse_address
from control.api.identity import SpiffeId
from tests.fuzz import pure_msgpack
from uproxy.node.channel import (
    MAX_ALLOWED,
    MAX_BACKENDS,
    MAX_SERVICES,
    Allowed,
    Backend,
    ChannelError,
    Choice,
    Said,
    pack_said,
    read_said,
)

MAX_BYTES = 1024
WORDS = (
    b"\xa6direct", b"\xa7choices", b"\xa7allowed", b"\x90", b"\xc0", b"\xc2", b"\xc3", b"\xa0", b"\xa810.0.0.1",
    b"\xa8fd75::01", b"\xb0::ffff:10.0.0.1\0", b"\xcd\xff\xff", b"\xce\x00\x01\x00\x00", b"\xcb" + bytes(8),
    b"spiffe://cluster.local/ns/shop/sa/web",
)  # fmt: skip
_IDENTITY = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/web")
_V4, _V6 = parse_address("10.0.0.1"), parse_address("fd75::1")


def seeds() -> Iterable[bytes]:
    backends = Backend(_V4, 8080, 1, _IDENTITY), Backend(_V6, 1, 65535, None)
    allowed = Allowed(_IDENTITY, (_V4, 40000), _V4, 8080), Allowed(_IDENTITY, (_V6, 1), _V6, 65535)
    yield pack_said(Said())
    yield pack_said(Said(direct=False))
    whole = pack_said(Said((Choice(_V4, 80, backends), Choice(_V6, 81, ())), allowed))
    yield whole
    for text in (str(_IDENTITY), _V4):
        for other in ([], [1], {}, {"a": 1}, 5, b"x", msgpack.Timestamp(1)):
            yield whole.replace(msgpack.packb(text), msgpack.packb(other))


def check(data: bytes) -> None:
    pure_msgpack.agrees(data)
    try:
        said = read_said(data)
    except ChannelError:
        return
    assert len(said.choices) <= MAX_SERVICES
    assert len(said.allowed) <= MAX_ALLOWED
    for choice in said.choices:
        assert len(choice.backends) <= MAX_BACKENDS
        _check_end(choice.address, choice.port)
        for backend in choice.backends:
            _check_end(backend.address, backend.port)
    for one in said.allowed:
        _check_end(one.address, one.port)
        _check_end(*one.tunnel)
    assert read_said(pack_said(said)) == said


def _check_end(address: str, port: int) -> None:
    assert parse_address(address) == address
    assert 1 <= port <= 65535
