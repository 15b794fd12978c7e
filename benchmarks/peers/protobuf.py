"""As much of protobuf's wire format as a control plane's few messages need (protobuf.dev, Encoding)."""

from __future__ import annotations

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10


class ProtobufError(ValueError):
    """Bytes that are no message."""


def field(number: int, value: int | str | bytes) -> bytes:
    """One field: an integer or a boolean, a string, or bytes, which may be another message."""
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | _LENGTH) + _varint(len(content)) + content


def fixed32(number: int, value: int) -> bytes:
    """One field of the type fixed32."""
    return _varint(number << 3 | _FIXED32) + value.to_bytes(4, "little")


def read(message: bytes) -> dict[int, list[int | bytes]]:
    """All fields by number, each with its values in order. Raises ProtobufError."""
    found: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        kind = key & 7
        value: int | bytes
        if kind == _VARINT:
            value, at = _read_varint(message, at)
        else:
            if kind == _LENGTH:
                length, at = _read_varint(message, at)
            elif kind in (_FIXED32, _FIXED64):
                length = 4 if kind == _FIXED32 else 8
            else:
                raise ProtobufError(f"wire type {kind} at byte {at}")
            if at + length > len(message):
                raise ProtobufError(f"field {key >> 3} ends beyond the message")
            content = message[at : at + length]
            value = content if kind == _LENGTH else int.from_bytes(content, "little")
            at += length
        found.setdefault(key >> 3, []).append(value)
    return found


def text(message: dict[int, list[int | bytes]], number: int) -> str:
    """The last value of a string field, as proto3 reads it; "" when it is not there. Raises ProtobufError."""
    value = message.get(number, [b""])[-1]
    if isinstance(value, int):
        raise ProtobufError(f"field {number} is a number")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise ProtobufError(f"field {number} is not UTF-8") from None


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index in range(_LONGEST_VARINT):
        if at + index == len(message):
            break
        byte = message[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise ProtobufError(f"no number at byte {at}")
