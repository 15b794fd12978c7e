"""The last good state of a replica as bytes, and as a file: a proxy starts from it when nobody answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgpack

from control import durable
from control.api.messages import Stamp

MAX_BYTES: Final = 512 * 1024 * 1024
"""Twice what a replica holds at most."""
_FORMAT: Final = 1
_DIGEST_BYTES: Final = 32
_MAX_NUMBER: Final = 2**63 - 1


class SnapshotError(ValueError):
    """A snapshot that cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a replica has to know to be what it was."""

    trust_domain: str
    services: tuple[str, ...]
    """Keys of those that are wanted."""
    address_shards: tuple[int, ...]
    """Those that are wanted by themselves."""
    floors: Mapping[str, Stamp] = field(hash=False)
    """Namespace, or `ADDRESSES` -> stamp of the newest root that was ever applied."""
    messages: tuple[tuple[str, bytes], ...]
    """Topics and payloads as they came; each root after all that it lists."""


def pack(snapshot: Snapshot) -> bytes:
    """SHA-256 of the rest, then msgpack."""
    packed: bytes = msgpack.packb(
        [
            _FORMAT,
            snapshot.trust_domain,
            snapshot.services,
            snapshot.address_shards,
            {owner: list(stamp) for owner, stamp in snapshot.floors.items()},
            snapshot.messages,
        ]
    )
    return hashlib.sha256(packed).digest() + packed


def unpack(dumped: bytes) -> Snapshot:
    """Raises SnapshotError."""
    digest, packed = dumped[:_DIGEST_BYTES], dumped[_DIGEST_BYTES:]
    if hashlib.sha256(packed).digest() != digest:
        raise SnapshotError("it is damaged: its checksum is wrong")
    try:
        return _read(msgpack.unpackb(packed, use_list=False, max_ext_len=0))
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise SnapshotError(f"it cannot be read: {error or type(error).__name__}") from None


def write(path: Path, dumped: bytes) -> None:
    """Replaces a snapshot's file, for its owner alone. Raises OSError."""
    durable.write(path, dumped, 0o600)


def read(path: Path) -> bytes | None:
    """The content of a snapshot's file; None when there is none. Raises OSError, and SnapshotError for a huge one."""
    try:
        with path.open("rb") as file:
            dumped = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(dumped) > MAX_BYTES:
        raise SnapshotError(f"{path} has more than {MAX_BYTES} bytes")
    return dumped


def _read(value: object) -> Snapshot:
    match value:
        case (int(version), *_) if version != _FORMAT:
            raise ValueError(f"it has format {version}; this software reads format {_FORMAT}")
        case (_, str(trust_domain), tuple(services), tuple(shards), dict(floors), tuple(messages)):
            if (
                all(type(one) is str for one in services)
                and all(type(one) is int and 0 <= one <= 255 for one in shards)
                and all(type(owner) is str and _is_stamp(stamp) for owner, stamp in floors.items())
                and all(_is_message(one) for one in messages)
            ):
                return Snapshot(trust_domain, services, shards, floors, messages)
    raise ValueError("it has not the form of a snapshot")


def _is_stamp(value: object) -> bool:
    match value:
        case (int(epoch), int(version)):
            return 0 <= epoch <= _MAX_NUMBER and 0 <= version <= _MAX_NUMBER
    return False


def _is_message(value: object) -> bool:
    match value:
        case (str(), bytes()):
            return True
    return False
