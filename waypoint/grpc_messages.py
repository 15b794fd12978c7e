"""How many messages of gRPC a body has carried.

Source: github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md, "Length-Prefixed-Message": a byte of flags, four of length, and
the message.
"""

from __future__ import annotations

from typing import Final

_PREFIX: Final = 5


class MessageCounter:
    """Takes a body in pieces, cut anywhere. A message counts when its prefix is there, as Envoy counts it."""

    __slots__ = ("_left", "_prefix", "count")

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self._left = 0
        """Bytes to come of the message that was counted last."""
        self._prefix = b""
        """What has come of the next one's prefix."""

    def add(self, data: bytes) -> None:
        place, end = self._left, len(data)
        if self._prefix:
            data, self._prefix = self._prefix + data, b""
            end = len(data)
        while place + _PREFIX <= end:
            self.count += 1
            place += _PREFIX + int.from_bytes(data[place + 1 : place + _PREFIX])
        self._left = max(0, place - end)
        self._prefix = data[place:]
