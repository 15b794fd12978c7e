"""Small modules of WebAssembly for Proxy-Wasm, put together by hand (WebAssembly core specification, section 5)."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

REQUEST: Final = 0
RESPONSE: Final = 2
DATA: Final = 1024
"""Where texts stand in memory."""
FOUND: Final = 512
"""Where the host writes what it returns."""
NEXT: Final = 508
"""Holds how much of the memory for values was given to the host."""
CONFIGURED: Final = 520
"""Where the host says what the module is configured with."""
VALUES: Final = 32_768
"""Where the host writes values, one after the other."""

CONTINUE: Final = b"\x41\x00"
UNREACHABLE: Final = b"\x00"
FOREVER: Final = b"\x03\x40\x0c\x00\x0b"
_DROP: Final = b"\x1a"
_STORED: Final = b"\x36\x02\x00"
_IMPORTS: Final = {
    "proxy_add_header_map_value": (5, 1),
    "proxy_replace_header_map_value": (5, 1),
    "proxy_get_header_map_value": (5, 1),
    "proxy_send_local_response": (8, 1),
    "proxy_http_call": (10, 1),
    "proxy_get_buffer_bytes": (5, 1),
}
_EXPORTS: Final = {
    "proxy_abi_version_0_2_1": (0, 0),
    "proxy_on_memory_allocate": (1, 1),
    "proxy_on_context_create": (2, 0),
    "proxy_on_vm_start": (2, 1),
    "proxy_on_configure": (2, 1),
    "proxy_on_request_headers": (3, 1),
    "proxy_on_response_headers": (3, 1),
}


@dataclass
class Module:
    """One that is being made; `on_request` and `on_response` are instructions, which leave what to do next."""

    texts: bytearray = field(default_factory=bytearray)

    def add(self, of: int, name: str, value: str) -> bytes:
        """Instructions: adds a header."""
        return _number(of) + self._text(name) + self._text(value) + _called("proxy_add_header_map_value") + _DROP

    def replace(self, of: int, name: str, value: str) -> bytes:
        """Instructions: sets a header."""
        return _number(of) + self._text(name) + self._text(value) + _called("proxy_replace_header_map_value") + _DROP

    def when(self, name: str, then: bytes) -> bytes:
        """Instructions: what is done when the request has this header."""
        found = _number(FOUND) + _number(FOUND + 4)
        return _number(REQUEST) + self._text(name) + found + _called("proxy_get_header_map_value") + _if_zero(then)

    def configured(self) -> bytes:
        """Instructions: adds to the request a header `x-config` with what the module is configured with."""
        value = _loaded(CONFIGURED) + _loaded(CONFIGURED + 4)
        return _number(REQUEST) + self._text("x-config") + value + _called("proxy_add_header_map_value") + _DROP

    def answer(self, status: int, body: str, **fields: str) -> bytes:
        """Instructions: answers by itself. `fields`: headers, by their names with `_` for `-`."""
        nothing = _number(0) + _number(0)
        told = self._bytes(_pairs({name.replace("_", "-"): value for name, value in fields.items()}))
        given = _number(status) + nothing + self._text(body) + told + _number(-1)
        return given + _called("proxy_send_local_response") + _DROP

    def call(self, cluster: str) -> bytes:
        """Instructions: asks somebody; marks the request with `x-called` when that is done."""
        nothing = _number(0) + _number(0)
        asked = self._bytes(_pairs({":method": "GET", ":path": "/", ":authority": "called"}))
        given = self._text(cluster) + asked + nothing + nothing + _number(1000) + _number(FOUND)
        return given + _called("proxy_http_call") + _if_zero(self.add(REQUEST, "x-called", "yes"))

    def made(self, on_request: bytes = b"", on_response: bytes = b"") -> bytes:
        """The module."""
        got = _number(7) + _number(0) + _number(1000) + _number(CONFIGURED) + _number(CONFIGURED + 4)
        taken = _loaded(NEXT) + b"\x20\x00\x6a"  # with the size that is asked for
        code = {
            "proxy_abi_version_0_2_1": b"",
            "proxy_on_memory_allocate": _loaded(NEXT) + _number(VALUES) + b"\x6a" + _number(NEXT) + taken + _STORED,
            "proxy_on_context_create": b"",
            "proxy_on_vm_start": _number(1),
            "proxy_on_configure": got + _called("proxy_get_buffer_bytes") + _DROP + _number(1),
            "proxy_on_request_headers": on_request + CONTINUE,
            "proxy_on_response_headers": on_response + CONTINUE,
        }
        shapes = [*_IMPORTS.values(), *_EXPORTS.values()]
        types = [b"\x60" + _listed([b"\x7f"] * takes) + _listed([b"\x7f"] * gives) for takes, gives in shapes]
        first = len(_IMPORTS)
        imports = [_name("env") + _name(name) + b"\0" + _leb(index) for index, name in enumerate(_IMPORTS)]
        functions = [_leb(first + index) for index in range(len(_EXPORTS))]
        exports = [_name(name) + b"\0" + _leb(first + index) for index, name in enumerate(_EXPORTS)]
        bodies = [_sized(_leb(0) + code[name] + b"\x0b") for name in _EXPORTS]
        data = b"\0" + _number(DATA) + b"\x0b" + _sized(bytes(self.texts))
        sections = {
            1: _listed(types),
            2: _listed(imports),
            3: _listed(functions),
            5: _listed([b"\0" + _leb(16)]),
            7: _listed([_name("memory") + b"\2" + _leb(0), *exports]),
            10: _listed(bodies),
            11: _listed([data]),
        }
        return b"\0asm\1\0\0\0" + b"".join(bytes([number]) + _sized(body) for number, body in sections.items())

    def _text(self, text: str) -> bytes:
        return self._bytes(text.encode())

    def _bytes(self, data: bytes) -> bytes:
        """Instructions: where they are, and how many."""
        place = DATA + len(self.texts)
        self.texts += data
        return _number(place) + _number(len(data))


def _pairs(fields: Mapping[str, str]) -> bytes:
    """Headers, as the host takes them (Proxy-Wasm, serialized maps)."""
    sizes = b"".join(struct.pack("<II", len(name), len(value)) for name, value in fields.items())
    texts = "".join(f"{name}\0{value}\0" for name, value in fields.items())
    return struct.pack("<I", len(fields)) + sizes + texts.encode()


def _number(value: int) -> bytes:
    """An instruction: a constant, in signed LEB128."""
    found = b"\x41"
    while not -64 <= value < 64:
        found += bytes([value & 0x7F | 0x80])
        value >>= 7
    return found + bytes([value & 0x7F])


def _loaded(place: int) -> bytes:
    return _number(place) + b"\x28\x02\x00"


def _called(name: str) -> bytes:
    return b"\x10" + _leb(list(_IMPORTS).index(name))


def _if_zero(then: bytes) -> bytes:
    return b"\x45\x04\x40" + then + b"\x0b"


def _leb(value: int) -> bytes:
    found = b""
    while value >= 128:
        found += bytes([value & 0x7F | 0x80])
        value >>= 7
    return found + bytes([value])


def _sized(body: bytes) -> bytes:
    return _leb(len(body)) + body


def _listed(items: Sequence[bytes]) -> bytes:
    return _leb(len(items)) + b"".join(items)


def _name(text: str) -> bytes:
    return _sized(text.encode())
