"""Header blocks of tunnels (`uproxy.header_block`), beside the whole of HPACK and h2's idea of what is well formed."""

from __future__ import annotations

from collections.abc import Iterable

from h2.exceptions import ProtocolError
from h2.utilities import HeaderValidationFlags, validate_headers
from hpack import Decoder, Encoder
from hpack.exceptions import HPACKDecodingError, HPACKError
from hpack.hpack import DEFAULT_MAX_HEADER_LIST_SIZE

from tests.support.hbone import CONNECT, OK
from uproxy.header_block import (
    decode_literals,
    encode_headers,
    read_own,
    well_formed,
    well_formed_trailers,
)
from uproxy.hpack_decoder import Decoder as OurDecoder

MAX_BYTES = 1024
WORDS = (
    b":method", b":authority", b":scheme", b":path", b":status", b":protocol", b"CONNECT", b"connection", b"te",
    b"trailers", b"upgrade", b"\x0f\x2f", b"\x7f", b"\x00\x09forwarded",
    b"\x00\x0btraceparent\x37", b"\x00", b"\x10", b"\x20", b"\x88", b"\x82\x86\x84\x41",
)  # fmt: skip
_REQUEST = HeaderValidationFlags(is_client=False, is_trailer=False, is_response_header=False, is_push_promise=False)
_TRAILERS = HeaderValidationFlags(is_client=False, is_trailer=True, is_response_header=False, is_push_promise=False)
_RESPONSE = HeaderValidationFlags(is_client=True, is_trailer=False, is_response_header=True, is_push_promise=False)


def seeds() -> Iterable[bytes]:
    more = [(b"forwarded", b'for="10.0.0.1:1";host=a.b'), (b"traceparent", b"00-" + b"a" * 32), (b"x-y", b"z" * 200)]
    own = [
        *CONNECT,
        (b"forwarded", b'for="10.0.0.1:1"'),
        (b"traceparent", b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"),
    ]
    for headers in (CONNECT, OK, own, [*CONNECT, *more], [(b"grpc-status", b"0"), (b"te", b"trailers")]):
        yield encode_headers(headers)
        yield Encoder().encode(headers)
        yield Encoder().encode(headers, huffman=False)


def check(data: bytes) -> None:
    quick, whole = decode_literals(data), _decoded(data)
    for _ in range(2):  # what was read once is remembered
        own = read_own(data)
        assert own is None or (list(own) == whole and well_formed(own, request=own[0][0] != b":status"))
    assert quick is None or quick == whole, (quick, whole)
    _same_by_our_decoder(data, whole)
    if whole is None:
        return
    if well_formed(whole, request=True):
        _same_when_written_again(whole)
        pseudo = {name: value for name, value in whole if name[:1] == b":"}
        hosts = [value for name, value in whole if name == b"host"]
        # `listener.asked_for` refuses what h2 does of these: a Host that names something else.
        is_connect = pseudo.keys() == {b":method", b":authority"} and pseudo[b":method"] == b"CONNECT"
        if is_connect and hosts in ([], [pseudo[b":authority"]]):
            _h2_takes(whole, _REQUEST)
    if well_formed(whole, request=False):
        _same_when_written_again(whole)
        _h2_takes(whole, _RESPONSE)
    if well_formed_trailers(whole):
        _same_when_written_again(whole)
        _h2_takes(whole, _TRAILERS)


def _decoded(block: bytes) -> list[tuple[bytes, bytes]] | None:
    try:
        return [(bytes(name), bytes(value)) for name, value, *_ in Decoder().decode(block, raw=True)]
    except (HPACKError, IndexError, ValueError):
        return None


def _same_by_our_decoder(block: bytes, whole: list[tuple[bytes, bytes]] | None) -> None:
    decoder = OurDecoder(DEFAULT_MAX_HEADER_LIST_SIZE)
    found: list[tuple[bytes, bytes]] | None = None
    try:
        found = list(decoder.decode(block))
    except HPACKDecodingError as error:
        if "octets" in str(error):  # hpack takes integers with zeros before them
            return
    assert found == whole, (found, whole)
    if found is None:
        return
    if isinstance(again := decoder.decode(block), tuple):  # nothing in it has changed the table
        assert list(again) == found


def _same_when_written_again(headers: list[tuple[bytes, bytes]]) -> None:
    try:
        block = encode_headers(headers)
    except ValueError:
        assert sum(len(name) + len(value) + 32 for name, value in headers) > 16384 - 32 * len(headers)
        return
    assert _decoded(block) == headers
    assert decode_literals(block) in (None, headers)


def _h2_takes(headers: list[tuple[bytes, bytes]], flags: HeaderValidationFlags) -> None:
    try:
        list(validate_headers(headers, flags))
    except ProtocolError as error:
        raise AssertionError(f"h2 refuses what is taken: {error}: {headers}") from error
