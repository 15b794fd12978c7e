"""A BPF ring buffer of records of one size, read through its memory: no callback, no thread, nobody is woken.

Pages (kernel/bpf/ringbuf.c): the consumer's position, writable; the producer's position; the data, mapped twice in a
row, so that what wraps around is still one piece. Positions count bytes and never wrap. A record has a header of eight
bytes: its length with two flags on top, and an offset of the kernel's own.
"""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Iterator
from typing import Any, Final

_HEADER: Final = 8
_BUSY: Final = 1 << 31
_DISCARDED: Final = 1 << 30


class Ring:
    """The one consumer of a ring. Positions survive it: the next consumer of a pinned ring goes on there."""

    def __init__(self, fd: int, size: int, record: struct.Struct) -> None:
        """`size`: bytes of the data, as max_entries says."""
        self._size = size
        self._record = struct.Struct(f"=II{record.format.lstrip('=')}")
        if self._record.size != _HEADER + -(-record.size // 8) * 8:
            raise ValueError(f"records of {record.size} bytes: their size must be a multiple of 8")
        self._consumer = mmap.mmap(fd, mmap.PAGESIZE)
        self._producer = mmap.mmap(fd, mmap.PAGESIZE + 2 * size, prot=mmap.PROT_READ, offset=mmap.PAGESIZE)

    def drain(self) -> Iterator[tuple[Any, ...]]:
        """The records that are complete, oldest first. What was yielded is consumed."""
        position = _position(self._consumer)
        end = _position(self._producer)
        try:
            while position < end:
                offset = mmap.PAGESIZE + position % self._size
                length, _, *fields = self._record.unpack_from(self._producer, offset)
                if length & _BUSY:  # reserved, and still being written: what comes after it waits
                    return
                position += self._record.size
                if not length & _DISCARDED:
                    yield tuple(fields)
        finally:
            self._consumer[:8] = position.to_bytes(8, sys.byteorder)

    def close(self) -> None:
        self._consumer.close()
        self._producer.close()


def _position(page: mmap.mmap) -> int:
    return int.from_bytes(page[:8], sys.byteorder)
