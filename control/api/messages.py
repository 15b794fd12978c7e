"""The envelope around every record: msgpack [schema, epoch, version, issued_at, body].

A body is a mapping of plain values; None is a tombstone, which says that the record is gone. Decoding is strict
and bounded: any bytes give an Envelope or MessageError, never much memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import msgpack

Value = None | bool | int | str | bytes | list["Value"] | dict[str, "Value"]
Body = dict[str, Value]
Stamp = tuple[int, int]
"""(epoch, version): orders all versions of a record."""

SCHEMA: Final = 1
"""Of the bodies in `records`. A proxy refuses another number rather than guess what a field means."""

MAX_PAYLOAD_BYTES: Final = 256 * 1024  # brokers take 1 MB by default (EMQX, NATS); the largest sane policy is far below
MAX_WEIGHT: Final = 80_000
"""Values in a payload, each list and map counted as four. The fullest record that we write, an address shard, has one
for three bytes. A broker could send one for each byte, and a proxy would stand still over each for 200 ms.
"""
_CONTAINER: Final = 3  # beside itself as a value: made, hooked and checked
_MAX_NUMBER: Final = 2**63 - 1
_MAX_DEPTH: Final = 8  # the deepest body, a route's, nests 8


class MessageError(ValueError):
    """A payload that is no envelope of ours, or a body that fits in none."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """One version of one record."""

    epoch: int
    """Raised at every start, restore or change of the writer, before its first publish."""
    version: int
    """Rises within an epoch. (epoch, version) orders all versions of a record."""
    issued_at: int
    """Unix time in seconds by the writer's clock; only ever reported, never decided by."""
    body: Body | None
    """None: tombstone."""

    @property
    def stamp(self) -> Stamp:
        return (self.epoch, self.version)


def encode(envelope: Envelope) -> bytes:
    """The payload. Raises MessageError for what `decode` would not take back."""
    weight = _check(envelope)
    if weight > MAX_WEIGHT:
        raise MessageError(f"a record of {weight} values; at most {MAX_WEIGHT} fit: split the resource")
    payload: bytes = msgpack.packb(
        [SCHEMA, envelope.epoch, envelope.version, envelope.issued_at, envelope.body], use_bin_type=True
    )
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise MessageError(f"a record of {len(payload)} bytes; at most {MAX_PAYLOAD_BYTES} fit: split the resource")
    return payload


def decode(payload: bytes) -> Envelope:
    """The envelope in a payload. Raises MessageError."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise MessageError(f"{len(payload)} bytes; at most {MAX_PAYLOAD_BYTES} are taken")
    weighed = _Weighed()
    try:
        message = msgpack.unpackb(
            payload,
            raw=False,
            strict_map_key=True,
            max_ext_len=0,
            object_pairs_hook=weighed.mapping,
            list_hook=weighed.sequence,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise MessageError(f"not msgpack as we write it: {error or type(error).__name__}") from None
    if type(message) is not list or len(message) != 5:
        raise MessageError("not an envelope: [schema, epoch, version, issued_at, body]")
    schema, epoch, version, issued_at, body = message
    if type(schema) is not int or schema != SCHEMA:
        raise MessageError(f"schema {schema!r}; this proxy reads schema {SCHEMA} only: upgrade the older side")
    envelope = Envelope(epoch, version, issued_at, body)
    _check(envelope)
    return envelope


def digest(payload: bytes) -> bytes:
    """What an index lists of a payload: its SHA-256, 32 bytes."""
    return hashlib.sha256(payload).digest()


class _Weighed:
    """What msgpack makes lists and maps of, counted, so that it stops at what is too much and not behind it."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = MAX_WEIGHT + _CONTAINER + 5  # with the envelope's own list

    def sequence(self, items: list[Value]) -> list[Value]:
        self._left -= _CONTAINER + len(items)
        if self._left < 0:
            raise ValueError(f"more than {MAX_WEIGHT} values")
        return items

    def mapping(self, pairs: list[tuple[str, Value]]) -> Body:
        self._left -= _CONTAINER + len(pairs)
        if self._left < 0:
            raise ValueError(f"more than {MAX_WEIGHT} values")
        body = dict(pairs)
        if len(body) != len(pairs):
            raise ValueError("a key stands twice in one map")
        return body


def _check(envelope: Envelope) -> int:
    """The weight of the body."""
    for name, number in (
        ("epoch", envelope.epoch),
        ("version", envelope.version),
        ("issued_at", envelope.issued_at),
    ):
        if type(number) is not int or not 0 <= number <= _MAX_NUMBER:
            raise MessageError(f"{name} is {number!r}; it must be a whole number from 0 to 2^63 - 1")
    if envelope.body is not None:
        if type(envelope.body) is not dict:
            raise MessageError("the body must be a mapping, or nil for a tombstone")
        return _check_value(envelope.body, _MAX_DEPTH)
    return 0


def _check_value(value: object, depth: int) -> int:
    """The weight of what is in a value. Exact types only: an extension or a float would mean something to one side
    alone.
    """
    weight = 0
    if type(value) is dict or type(value) is list:
        if depth == 0:
            raise MessageError(f"the body nests deeper than {_MAX_DEPTH}")
        if type(value) is dict and not all(type(name) is str for name in value):
            raise MessageError("a key is no text")
        weight = _CONTAINER + len(value)
        for item in value.values() if type(value) is dict else value:
            if type(item) is not str:  # most are, and calls are most of the work
                weight += _check_value(item, depth - 1)
    elif type(value) is int:
        if not -_MAX_NUMBER <= value <= _MAX_NUMBER:
            raise MessageError("a number is beyond 2^63 - 1")
    elif value is not None and type(value) not in (bool, str, bytes):
        raise MessageError(
            f"a {type(value).__name__} in the body; only nil, booleans, numbers, text, bytes, lists, maps"
        )
    return weight
