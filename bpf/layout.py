"""`mesh.h` for Python: the structs, sizes and constants of the one header that the programs are compiled from."""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import Any, Final

from cffi import FFI

HEADER: Final = Path(__file__).with_name("mesh.h")

_TYPES: Final = """
typedef uint8_t __u8; typedef uint16_t __u16; typedef uint32_t __u32; typedef uint64_t __u64; typedef int32_t __s32;
typedef uint16_t __be16; typedef uint32_t __be32;
"""
_INTEGERS: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}


def _declarations(header: str) -> str:
    """The header without its preprocessor lines (a guard and an include), which cffi does not read."""
    return "\n".join(line for line in header.splitlines() if not line.startswith("#"))


ffi: Final = FFI()
ffi.cdef(_TYPES + _declarations(HEADER.read_text(encoding="utf-8")))


def members(enum: str) -> dict[str, int]:
    """Names and values of an enum, such as `mesh_counter`."""
    values: dict[str, int] = dict(ffi.typeof(f"enum {enum}").relements)
    return values


def constant(name: str) -> int:
    """One of `enum mesh_constant`."""
    return members("mesh_constant")[name]


def sizeof(type_name: str) -> int:
    """Bytes of a C type, such as `struct mesh_service`."""
    return ffi.sizeof(type_name)


def pack(struct_name: str, **fields: Any) -> bytes:
    """A struct as the bytes of a map's key or value; what is not named is zero. Arrays, as `addr`, are packed bytes."""
    codec, zeros = _codec(struct_name)
    return codec.pack(*(zeros | fields).values())


@functools.cache
def _codec(struct_name: str) -> tuple[struct.Struct, dict[str, int | bytes]]:
    """cffi's own way of filling a struct takes five times as long, and there are 100,000 of them at a start."""
    formats, zeros, at = "=", dict[str, int | bytes](), 0
    for name, field in ffi.typeof(f"struct {struct_name}").fields or ():
        if field.offset != at:
            raise ValueError(f"struct {struct_name} has a hole before {name}: name the padding")
        size = ffi.sizeof(field.type)
        formats += _INTEGERS[size] if field.type.kind == "primitive" else f"{size}s"
        zeros[name] = 0 if field.type.kind == "primitive" else b""
        at += size
    return struct.Struct(formats), zeros


def unpack(struct_name: str, raw: bytes) -> Any:
    """A struct's fields, from the bytes of a map's key or value."""
    record: Any = ffi.new(f"struct {struct_name} *")
    if len(raw) != ffi.sizeof(record[0]):
        raise ValueError(f"struct {struct_name} has {ffi.sizeof(record[0])} bytes, not {len(raw)}")
    ffi.memmove(record, raw, len(raw))
    return record


SCHEMA: Final = constant("MESH_SCHEMA")
"""Part of the pin path: an agent carries over from an earlier one what has the same shape and meaning."""
