"""The envelope codec: what is encoded is decoded, and any bytes are an envelope or the one error."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.messages import MAX_PAYLOAD_BYTES, MAX_WEIGHT, Envelope, MessageError, decode, encode

numbers = st.integers(0, 2**63 - 1)
scalars = (
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.text(max_size=20) | st.binary(max_size=40)
)
values = scalars
for _ in range(3):  # within the depth that is allowed
    values = scalars | st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3)
bodies = st.dictionaries(st.text(max_size=8), values, max_size=4)
envelopes = st.builds(Envelope, numbers, numbers, numbers, st.none() | bodies)


@given(envelopes)
def test_an_envelope_survives_the_wire(envelope):
    payload = encode(envelope)
    assert decode(payload) == envelope
    assert decode(payload).stamp == (envelope.epoch, envelope.version)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_envelope_or_refused(payload):
    _decode_or_refuse(payload)


@given(envelopes, st.data())
def test_a_damaged_envelope_is_an_envelope_or_refused(envelope, data):
    payload = bytearray(encode(envelope))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    _decode_or_refuse(bytes(payload))


@given(envelopes, st.data())
def test_a_cut_or_lengthened_envelope_is_refused(envelope, data):
    payload = encode(envelope)
    with pytest.raises(MessageError):
        decode(payload[: data.draw(st.integers(0, len(payload) - 1))])
    with pytest.raises(MessageError):
        decode(payload + b"\0")


def _decode_or_refuse(payload):
    try:
        envelope = decode(payload)
    except MessageError:
        return
    assert decode(encode(envelope)) == envelope


_NESTED = [1, 1, 1, 0, {"a": [[[[[[[[1]]]]]]]]}]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ([2, 1, 1, 0, None], "schema 2"),
        (["1", 1, 1, 0, None], "schema '1'"),
        ([True, 1, 1, 0, None], "schema True"),
        ([1, 1, 1, 0], "not an envelope"),
        ([1, 1, 1, 0, None, None], "not an envelope"),
        ({"schema": 1}, "not an envelope"),
        (None, "not an envelope"),
        ([1, -1, 1, 0, None], "epoch"),
        ([1, 2**63, 1, 0, None], "epoch"),
        ([1, 1, True, 0, None], "version"),
        ([1, 1, "1", 0, None], "version"),
        ([1, 1, 1, 0.5, None], "issued_at"),
        ([1, 1, 1, 0, []], "the body must be"),
        ([1, 1, 1, 0, "x"], "the body must be"),
        ([1, 1, 1, 0, {"a": 1.5}], "float"),
        ([1, 1, 1, 0, {b"a": 1}], "a key is no text"),
        ([1, 1, 1, 0, {1: 1}], "not msgpack as we write it"),
        ([1, 1, 1, 0, {"a": msgpack.ExtType(1, b"x")}], "not msgpack as we write it"),
        ([1, 1, 1, 0, {"a": msgpack.Timestamp(1)}], "not msgpack as we write it"),
        ([1, 1, 1, 0, {"a": 2**64 - 1}], "beyond"),
        (_NESTED, "nests deeper"),
    ],
)
def test_other_messages_are_refused_by_name(message, problem):
    with pytest.raises(MessageError, match=problem):
        decode(msgpack.packb(message))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x95\x01\x01\x01\x00\x82\xa1a\x01\xa1a\x02",  # the key a twice
        b"\x95\x01\x01\x01\x00\x81\xa1\xff\x01",  # a key that is not UTF-8
        b"\xdd\xff\xff\xff\xff",  # an array that claims four thousand million items
        b"\x91" * 5000,  # nested five thousand deep
    ],
)
def test_malformed_payloads_are_refused(payload):
    with pytest.raises(MessageError):
        decode(payload)


def test_a_payload_beyond_the_limit_is_neither_made_nor_taken():
    body = {"a": "x" * MAX_PAYLOAD_BYTES}
    with pytest.raises(MessageError, match="at most"):
        encode(Envelope(1, 1, 0, body))
    with pytest.raises(MessageError, match="at most"):
        decode(msgpack.packb([1, 1, 1, 0, body]))


@pytest.mark.parametrize(
    ("item", "weight"),
    [(None, 1), (1, 1), ("", 1), ([], 4), ({}, 4), ([[1]], 9)],
    ids=["nil", "1", "text", "list", "map", "nested"],
)
def test_what_is_too_much_to_take_apart_is_neither_made_nor_taken(item, weight):
    fits = (MAX_WEIGHT - 2 * 3 - 1) // weight  # the body and its list
    envelope = Envelope(1, 1, 0, {"a": [item] * fits})
    assert decode(encode(envelope)) == envelope
    more = {"a": [item] * (fits + 1)}
    with pytest.raises(MessageError, match="values"):
        encode(Envelope(1, 1, 0, more))
    with pytest.raises(MessageError, match="more than 80000 values"):
        decode(msgpack.packb([1, 1, 1, 0, more]))
