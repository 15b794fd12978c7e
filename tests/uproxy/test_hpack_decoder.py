"""The general decoder of header blocks, beside that of `hpack`: the same fields, the same table, the same refusals."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
from hpack import Decoder as Reference
from hpack import Encoder
from hpack.exceptions import (
    HPACKDecodingError,
    HPACKError,
    InvalidTableIndexError,
    InvalidTableSizeError,
    OversizedHeaderListError,
)
from hypothesis import given
from hypothesis import strategies as st

from uproxy.hpack_decoder import DEFAULT_TABLE_SIZE, MAX_KNOWN_BLOCKS, Decoder

Fields = Sequence[tuple[bytes, bytes]]

MOST = 64 << 10
CALL: Fields = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/shop.Cart/Add"),
    (b":authority", b"cart:7070"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
)

_names = st.sampled_from((b":path", b"content-type", b"x-id", b"a", b"grpc-timeout")) | st.binary(max_size=40)
_fields = st.tuples(_names, st.sampled_from((b"", b"1", b"application/grpc")) | st.binary(max_size=200))
_steps = st.lists(
    st.tuples(st.lists(_fields, max_size=12), st.booleans(), st.none() | st.integers(0, DEFAULT_TABLE_SIZE)),
    max_size=12,
)


@given(steps=_steps)
def test_what_an_encoder_writes_is_read_whatever_its_table_does(
    steps: list[tuple[list[tuple[bytes, bytes]], bool, int | None]],
) -> None:
    encoder, decoder = Encoder(), Decoder(MOST)
    for fields, huffman, size in steps:
        if size is not None:
            encoder.header_table_size = size
        block = encoder.encode(fields, huffman)
        assert list(decoder.decode(block)) == fields
        if size is None:
            again = encoder.encode(fields, huffman)
            assert list(decoder.decode(again)) == fields


@given(blocks=st.lists(st.binary(max_size=64), max_size=4))
def test_of_any_bytes_it_makes_what_hpack_makes(blocks: list[bytes]) -> None:
    reference, decoder = Reference(MOST), Decoder(MOST)
    for block in blocks:
        wanted = found = None
        with contextlib.suppress(HPACKError, IndexError, ValueError):
            wanted = [(bytes(name), bytes(value)) for name, value, *_ in reference.decode(block, raw=True)]
        try:
            found = list(decoder.decode(block))
        except HPACKDecodingError as error:
            if "octets" in str(error):  # hpack takes integers with zeros before them
                return
        assert found == wanted
        if found is None:
            return


def test_a_block_that_comes_again_is_the_same_object_until_the_table_changes() -> None:
    encoder, decoder = Encoder(), Decoder(MOST)
    assert isinstance(decoder.decode(encoder.encode(CALL)), list)
    block = encoder.encode(CALL)
    known = decoder.decode(block)
    assert known == CALL
    assert decoder.decode(bytes(block)) is known
    decoder.decode(encoder.encode([(b"x-id", b"1")]))  # what was at one index is at another one now
    assert decoder.decode(encoder.encode(CALL)) == CALL
    assert decoder.decode(block) != CALL


def test_few_blocks_are_remembered() -> None:
    decoder = Decoder(MOST)
    for number in range(1, 10 * MAX_KNOWN_BLOCKS):
        decoder.decode(bytes((0x82,)) * number)
        assert len(decoder._known) <= MAX_KNOWN_BLOCKS


def test_what_is_long_is_not_remembered() -> None:
    """Whatever is made of it would be, too."""
    encoder, decoder = Encoder(), Decoder(MOST)
    fields = [(b"x-long", b"l" * 500), (b"x-long", b"l" * 500)]
    decoder.decode(encoder.encode(fields))
    block = encoder.encode(fields)
    assert decoder.decode(block) is decoder.decode(block)
    assert list(decoder.decode(block * 2)) == fields * 2
    assert decoder.decode(block * 2) is not decoder.decode(block * 2)


@pytest.mark.parametrize(
    ("block", "error"),
    [
        (b"\x80", InvalidTableIndexError),
        (b"\xbe", InvalidTableIndexError),
        (b"\xff\x80\x80\x80\x80\x80\x00", HPACKDecodingError),
        (b"\x82\x20", HPACKDecodingError),
        (b"\x3f\xe2\x1f", InvalidTableSizeError),
        (b"\x00\x01a\x05bcd", HPACKDecodingError),
        (b"\x00\x01a", HPACKDecodingError),
        (b"\x40\x81", HPACKDecodingError),
        (b"\x40\x01a\x84\xff\xff\xff\xff", HPACKDecodingError),
        (b"\xff", HPACKDecodingError),
    ],
    ids=["zero", "no-entry", "long-integer", "late-size", "size", "short", "no-value", "no-name", "huffman", "cut"],
)
def test_what_is_no_block_is_refused(block: bytes, error: type[HPACKDecodingError]) -> None:
    with pytest.raises(error):
        Decoder(MOST).decode(block)


def test_a_peer_that_keeps_a_larger_table_than_it_may_is_refused() -> None:
    decoder = Decoder(MOST)
    decoder.decode(b"\x82")  # which is remembered
    decoder.max_allowed_table_size = 0
    with pytest.raises(InvalidTableSizeError):
        decoder.decode(b"\x82")
    decoder = Decoder(MOST)
    decoder.max_allowed_table_size = 0
    assert list(decoder.decode(b"\x20\x82")) == [(b":method", b"GET")]


def test_a_small_block_cannot_become_a_large_list() -> None:
    encoder, decoder = Encoder(), Decoder(MOST)
    decoder.decode(encoder.encode([(b"x-bomb", b"b" * 3000)]))
    index = encoder.encode([(b"x-bomb", b"b" * 3000)])
    assert len(index) == 1
    with pytest.raises(OversizedHeaderListError):
        decoder.decode(index * 100)
