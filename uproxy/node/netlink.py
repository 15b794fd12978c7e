"""Netlink as far as it is needed here: one request, its answers, their attributes. <linux/netlink.h>"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Final

ROUTE: Final = 0  # NETLINK_ROUTE
SOCK_DIAG: Final = 4  # NETLINK_SOCK_DIAG

_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port: struct nlmsghdr
_ATTRIBUTE: Final = struct.Struct("=HH")  # length, type: struct nlattr
_REQUEST, _ACKNOWLEDGE, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_NESTED: Final = 0x3FFF  # NLA_TYPE_MASK
_RECEIVE: Final = 1 << 16
_TIMEOUT_S: Final = 2.0


class Netlink:
    """A socket of the calling thread's network namespace, wherever it is used."""

    def __init__(self, protocol: int) -> None:
        """Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.settimeout(_TIMEOUT_S)
        self._sequence = 0

    def ask(self, kind: int, body: bytes, *, dump: bool = False) -> list[bytes]:
        """The bodies of the answers. Raises OSError as the kernel says (ENOENT: no such thing).

        Without `dump` an acknowledgement is asked for, so that a request without an answer ends too.
        """
        self._sequence += 1
        flags = _REQUEST | (_DUMP if dump else _ACKNOWLEDGE)
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0) + body)
        found: list[bytes] = []
        while True:
            raw = self._socket.recv(_RECEIVE)
            at = 0
            while at + _HEADER.size <= len(raw):
                length, answer, _, sequence, _ = _HEADER.unpack_from(raw, at)
                content = raw[at + _HEADER.size : at + length]
                at += _padded(max(length, _HEADER.size))
                if sequence != self._sequence:
                    continue  # of a request that ran out of time
                if answer == _DONE:
                    return found
                if answer == _ERROR:
                    error = -int.from_bytes(content[:4], sys.byteorder, signed=True)
                    if error:
                        raise OSError(error, os.strerror(error))
                    return found
                found.append(content)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Netlink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return (_ATTRIBUTE.pack(length, kind) + value).ljust(_padded(length), b"\0")


def attributes(raw: bytes) -> dict[int, bytes]:
    """Type -> value, of attributes one behind the other."""
    return dict(_each(raw))


def _each(raw: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(raw):
        length, kind = _ATTRIBUTE.unpack_from(raw, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _NESTED, raw[at + _ATTRIBUTE.size : at + length]
        at += _padded(length)


def _padded(length: int) -> int:
    return (length + 3) & ~3
