"""Messages as protobuf encodes them: against the examples of its own documentation, and back."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peers.protobuf import ProtobufError, field, fixed32, read, text


def test_fields_are_those_of_the_documentation() -> None:
    # protobuf.dev, Encoding: 150 in field 1, "testing" in field 2, and the first of them within field 3.
    assert field(1, 150) == bytes.fromhex("089601")
    assert field(2, "testing") == bytes.fromhex("120774657374696e67")
    assert field(3, field(1, 150)) == bytes.fromhex("1a03089601")
    assert fixed32(1, 0x0A620001) == bytes.fromhex("0d0100620a")


VALUES = st.one_of(st.integers(0, 2**64 - 1), st.binary(max_size=300))


@given(st.lists(st.tuples(st.integers(1, 2**29 - 1), VALUES)))
def test_what_is_written_is_read(fields) -> None:
    expected: dict[int, list[int | bytes]] = {}
    for number, value in fields:
        expected.setdefault(number, []).append(value)
    assert read(b"".join(field(number, value) for number, value in fields)) == expected


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_an_error(encoded: bytes) -> None:
    with contextlib.suppress(ProtobufError):
        read(encoded)


@pytest.mark.parametrize("encoded", ["08", "0896", "0a05616263", "0d0102", "0b", "08" + "ff" * 10])
def test_what_ends_too_soon_is_an_error(encoded: str) -> None:
    with pytest.raises(ProtobufError):
        read(bytes.fromhex(encoded))


def test_a_string_is_the_last_one_and_empty_when_it_is_not_there() -> None:
    message = read(field(1, "a") + field(1, "b") + field(2, 7) + field(3, b"\xff"))
    assert (text(message, 1), text(message, 9)) == ("b", "")
    for number in (2, 3):
        with pytest.raises(ProtobufError):
            text(message, number)
