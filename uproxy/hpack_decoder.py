"""HPACK's general decoder (RFC 7541), with the table that a peer's encoder keeps at this end.

`header_block` reads what needs no table, in less time. What gRPC clients send does need it: after the first request a
head is mostly an octet for each field, and often the same octets each time, whose fields are remembered as long as the
table stays as it is. Huffman's code and the exceptions are those of `hpack`, whose own decoder takes four times as long
for a head with an id of its own.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from typing import Final

from hpack.exceptions import (
    HPACKDecodingError,
    InvalidTableIndexError,
    InvalidTableSizeError,
    OversizedHeaderListError,
)
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from uproxy.header_block import MAX_KNOWN, Headers

DEFAULT_TABLE_SIZE: Final = 4096
MAX_KNOWN_BLOCKS: Final = 16
"""Of one connection: calls of a few methods."""
MAX_KNOWN_CODES: Final = 1024
"""Texts in Huffman's code that are remembered, of up to 64 bytes each: names, and values that many requests have."""
_MAX_CODE: Final = 64
_ENTRY_OVERHEAD: Final = 32  # RFC 7541 section 4.1
_MAX_INTEGER_OCTETS: Final = 5  # after the prefix: nothing that fits into a block needs more

_STATIC: Final = HeaderTable.STATIC_TABLE
_STATIC_LENGTH: Final = len(_STATIC)
_INDEXED, _INCREMENTAL, _SIZE_UPDATE = 0x80, 0x40, 0x20


class Decoder:
    """Of one connection. After an exception its table is not the peer's any more: the connection must end."""

    __slots__ = ("_entries", "_known", "_limit", "_most", "_size", "max_allowed_table_size")

    def __init__(self, max_header_list_size: int) -> None:
        self.max_allowed_table_size = DEFAULT_TABLE_SIZE
        """That the peer has heard of."""
        self._most = max_header_list_size
        self._limit = DEFAULT_TABLE_SIZE  # that the peer keeps to
        self._entries: deque[tuple[bytes, bytes]] = deque()  # the newest first
        self._size = 0
        self._known: dict[bytes, Headers] = {}

    def decode(self, block: bytes) -> Headers:
        """The fields of a block; the same tuple for a short one that came before. Raises HPACKDecodingError."""
        known = self._known.get(block)
        if known is not None and self._limit <= self.max_allowed_table_size:
            return known
        headers: list[tuple[bytes, bytes]] = []
        left = self._most
        position, end = 0, len(block)
        literal = False
        try:
            while position < end:
                first = block[position]
                position += 1
                if first & _INDEXED:
                    index = first & 0x7F
                    if index == 0x7F:
                        index, position = _long_integer(block, position, index)
                    header = self._entry(index)
                elif first & (_INCREMENTAL | _SIZE_UPDATE) == _SIZE_UPDATE:
                    size = first & 0x1F
                    if size == 0x1F:
                        size, position = _long_integer(block, position, size)
                    if headers:
                        raise HPACKDecodingError("a table's size within a block")
                    self._resize(size)
                    literal = True
                    continue
                else:
                    literal = True
                    prefix = 0x3F if first & _INCREMENTAL else 0x0F
                    index = first & prefix
                    if index == prefix:
                        index, position = _long_integer(block, position, index)
                    if index:
                        name = self._entry(index)[0]
                    else:
                        name, position = _text(block, position)
                    value, position = _text(block, position)
                    header = (name, value)
                    if first & _INCREMENTAL:
                        self._add(header)
                left -= len(header[0]) + len(header[1]) + _ENTRY_OVERHEAD
                if left < 0:
                    raise OversizedHeaderListError(f"a header list of more than {self._most} bytes")
                headers.append(header)
        except IndexError:
            raise HPACKDecodingError("a truncated header block") from None
        if self._limit > self.max_allowed_table_size:
            raise InvalidTableSizeError("the peer did not shrink its table to what it may have")
        if literal or self._most - left > MAX_KNOWN + len(headers) * _ENTRY_OVERHEAD:
            return headers
        if len(self._known) >= MAX_KNOWN_BLOCKS:
            self._known.clear()
        self._known[block] = found = tuple(headers)
        return found

    def _entry(self, index: int) -> tuple[bytes, bytes]:
        if 0 < index <= _STATIC_LENGTH:
            return _STATIC[index - 1]
        index -= _STATIC_LENGTH + 1
        if not 0 <= index < len(self._entries):
            raise InvalidTableIndexError("a header block names an entry that its table has not")
        return self._entries[index]

    def _add(self, header: tuple[bytes, bytes]) -> None:
        """RFC 7541 section 4.4: one that is too large empties the table."""
        self._known.clear()
        self._entries.appendleft(header)
        self._size += len(header[0]) + len(header[1]) + _ENTRY_OVERHEAD
        self._shrink()

    def _resize(self, size: int) -> None:
        if size > self.max_allowed_table_size:
            raise InvalidTableSizeError(f"a table of {size} bytes; at most {self.max_allowed_table_size}")
        self._known.clear()
        self._limit = size
        self._shrink()

    def _shrink(self) -> None:
        while self._size > self._limit:
            name, value = self._entries.pop()
            self._size -= len(name) + len(value) + _ENTRY_OVERHEAD


def _long_integer(block: bytes, position: int, value: int) -> tuple[int, int]:
    """RFC 7541 section 5.1, behind a prefix that is full: the integer, and where it ends."""
    for shift in range(0, 7 * _MAX_INTEGER_OCTETS, 7):
        octet = block[position]
        position += 1
        value += (octet & 0x7F) << shift
        if not octet & 0x80:
            return value, position
    raise HPACKDecodingError("an integer of too many octets")


def _text(block: bytes, position: int) -> tuple[bytes, int]:
    """RFC 7541 section 5.2: the text, and where it ends."""
    first = block[position]
    position += 1
    length = first & 0x7F
    if length == 0x7F:
        length, position = _long_integer(block, position, length)
    end = position + length
    if end > len(block):
        raise HPACKDecodingError("a truncated header block")
    text = block[position:end]
    if first & 0x80:
        text = _decoded(text) if length <= _MAX_CODE else decode_huffman(text)
    return text, end


_decoded = lru_cache(maxsize=MAX_KNOWN_CODES)(decode_huffman)
