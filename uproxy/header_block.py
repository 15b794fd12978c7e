"""Header blocks of CONNECT streams: HPACK (RFC 7541) as far as a tunnel needs it, and what a well-formed block is.

Our own blocks use no table, so they can be made and read without state; `hpack` reads what a peer writes otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from hpack.table import HeaderTable

Headers = Sequence[tuple[bytes, bytes]]

MAX_HEADERS: Final = 100  # Envoy's
MAX_STEADY: Final = 256  # beginnings of requests, of half a KiB each, that are remembered
MAX_KNOWN: Final = 1024  # bytes of a block, or of all names in one, that are remembered
MAX_BLOCK: Final = 64 << 10  # what is taken here, too

_STATIC: Final = HeaderTable.STATIC_TABLE
_NAME_INDEX: Final[dict[bytes, int]] = {}
for _index, (_name, _) in enumerate(_STATIC, start=1):
    _NAME_INDEX.setdefault(_name, _index)
_OK: Final = ((b":status", b"200"),)
# Of many fields in one go: each name, and each value, ends with a line feed, which none of them has.
_NAMES: Final = re.compile(rb"((?::[a-z]++\n)*+)(?:[!#$%&'*+\-.^_`|~0-9a-z]++\n)*+")
_TEXT: Final = bytes((*b"\t\n", *range(0x20, 0x7F), *range(0x80, 0x100)))
_PADDED: Final = re.compile(rb"\n[ \t]|[ \t]\n")
_REQUEST_PSEUDO: Final = frozenset({b":method", b":authority", b":scheme", b":path", b":protocol"})
_CONNECTION_HEADERS: Final = frozenset(
    {b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"}
)


def encode_headers(headers: Headers) -> bytes:
    """A block of literals without indexing and without Huffman coding: no state in either end."""
    # What one endpoint is asked for, and what is answered, is nearly always the same.
    known = _encoded if sum([len(value) for _, value in headers]) <= MAX_KNOWN else _encoded.__wrapped__
    block = b"".join(map(known, headers))
    if len(block) > MAX_BLOCK:
        raise ValueError(f"a header block of {len(block)} bytes does not fit what peers take: {MAX_BLOCK}")
    return block


@lru_cache(maxsize=1024)
def _encoded(header: tuple[bytes, bytes]) -> bytes:
    if header == _OK[0]:
        return b"\x88"  # static entry 8, whole
    name, value = header
    return _encoded_name(name) + _integer(len(value), 7) + value


@lru_cache(maxsize=256)  # most names are few
def _encoded_name(name: bytes) -> bytes:
    index = _NAME_INDEX.get(name, 0)
    return _integer(index, 4) if index else b"\0" + _integer(len(name), 7) + name


def _integer(value: int, bits: int) -> bytes:
    """RFC 7541 section 5.1, with the bits above the prefix zero."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes((value,))
    out = bytearray((limit,))
    value -= limit
    while value >= 128:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# A CONNECT as a uProxy writes it (`outbound`): what is the same each time, then two values of one connection.
_OWN_REQUEST: Final = re.compile(
    rb"(.{1,512}?)\0\x09forwarded(.)([!-~](?:[ -~]{0,124}[!-~])?)\0\x0btraceparent\x37([!-~]{55})", re.DOTALL
)
_steady_requests: dict[bytes, tuple[tuple[bytes, bytes], ...]] = {}


def read_own(block: bytes) -> Headers | None:
    """The headers of a block in the form in which a uProxy writes it, and well formed; None: read it in another way.

    It takes a fifth of the time: no loop, and what names the destination was read before.
    """
    if block == b"\x88":
        return _OK
    found = _OWN_REQUEST.fullmatch(block)
    if found is None:
        return None
    steady, length, forwarded, traceparent = found.groups()
    if length[0] != len(forwarded):
        return None
    before = _steady_requests.get(steady)
    if before is None:
        headers = decode_literals(steady)
        if headers is None or len(headers) > MAX_HEADERS - 2 or not well_formed(headers, request=True):
            return None
        if len(_steady_requests) >= MAX_STEADY:
            _steady_requests.clear()
        before = _steady_requests[steady] = tuple(headers)
    return (*before, (b"forwarded", forwarded), (b"traceparent", traceparent))


def read_literals(block: bytes, *, request: bool) -> tuple[Headers, bool] | None:
    """What `decode_literals` makes of a block, and whether it is well formed. What came before is remembered."""
    return (_known_literals if len(block) <= MAX_KNOWN else _known_literals.__wrapped__)(block, request)


@lru_cache(maxsize=MAX_STEADY)
def _known_literals(block: bytes, request: bool) -> tuple[Headers, bool] | None:
    headers = decode_literals(block)
    return None if headers is None else (tuple(headers), well_formed(headers, request=request))


def decode_literals(block: bytes) -> list[tuple[bytes, bytes]] | None:
    """Decode a block that uses neither Huffman coding nor the dynamic table, or None: then the general decoder must.

    Such a block leaves the decoder's state as it was, so this is always safe, and it takes a tenth of the time.
    """
    headers: list[tuple[bytes, bytes]] = []
    position, end = 0, len(block)
    try:
        while position < end:
            first = block[position]
            position += 1
            if first & 0x80:  # indexed: static entries only
                index = first & 0x7F
                if not 0 < index <= len(_STATIC):
                    return None
                headers.append(_STATIC[index - 1])
                continue
            if first & 0xE0:  # incremental indexing or a size update: stateful
                return None
            index = first & 0x0F
            if index == 0x0F:
                index += block[position]
                position += 1
                if index > len(_STATIC):
                    return None
            if index:
                name = _STATIC[index - 1][0]
            else:
                length = block[position]
                position += 1
                if length >= 0x7F:  # Huffman, or a long name
                    return None
                name = block[position : position + length]
                position += length
            length = block[position]
            position += 1
            if length & 0x80:
                return None
            if length == 0x7F:
                length += block[position]
                if block[position] & 0x80:
                    return None
                position += 1
            value = block[position : position + length]
            position += length
            headers.append((name, value))
    except IndexError:
        return None
    return headers if position == end else None


def well_formed(headers: Headers, *, request: bool) -> bool:
    """RFC 9113 sections 8.2 and 8.3: few names, values, and pseudo-headers that are known, first and single."""
    names = [name for name, _ in headers]
    if not (_named(names, request=request) and _valued(headers, names)):
        return False
    return request or (len(headers[0][1]) == 3 and headers[0][1].isdigit())


def well_formed_trailers(headers: Headers) -> bool:
    """RFC 9113 section 8.1: as any headers, without pseudo-headers."""
    names = [name for name, _ in headers]
    return _named(names, request=None) and _valued(headers, names)


def _named(names: Sequence[bytes], *, request: bool | None) -> bool:
    """`request`: None for trailers. What was asked before is remembered: most heads have the names of another one."""
    if len(names) > MAX_HEADERS:
        return False
    joined = b"\n".join(names)
    known = _known_names if len(joined) <= MAX_KNOWN else _known_names.__wrapped__
    return known(joined, len(names), request)


@lru_cache(maxsize=MAX_STEADY)
def _known_names(joined: bytes, count: int, request: bool | None) -> bool:
    names = joined.split(b"\n") if count else []
    found = _NAMES.fullmatch(joined + b"\n" if count else b"")
    if found is None or len(names) != count or not _CONNECTION_HEADERS.isdisjoint(names):
        return False
    pseudo = found[1].split()
    if request is None:
        return not pseudo
    if not request:
        return pseudo == [b":status"]
    return b":method" in pseudo and len(set(pseudo)) == len(pseudo) and _REQUEST_PSEUDO.issuperset(pseudo)


def _valued(headers: Headers, names: Sequence[bytes]) -> bool:
    joined = b"\n%b\n" % b"\n".join([value for _, value in headers])
    if joined.count(b"\n") != max(len(headers) + 1, 2) or joined.translate(None, _TEXT):
        return False
    if (b" " in joined or b"\t" in joined) and _PADDED.search(joined) is not None:
        return False
    return b"te" not in names or {value for name, value in headers if name == b"te"} == {b"trailers"}
