"""`mesh.h` for Python: the structs, sizes and constants of the one header that the programs are compiled from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from cffi import FFI

HEADER: Final = Path(__file__).with_name("mesh.h")

_TYPES: Final = """
typedef uint8_t __u8; typedef uint16_t __u16; typedef uint32_t __u32; typedef uint64_t __u64; typedef int32_t __s32;
typedef uint16_t __be16; typedef uint32_t __be32;
"""


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


def pack(struct: str, **fields: Any) -> bytes:
    """A struct as the bytes of a map's key or value; what is not named is zero. `addr` takes 16 packed bytes."""
    record: Any = ffi.new(f"struct {struct} *")
    for name, value in fields.items():
        if isinstance(value, bytes):
            ffi.memmove(getattr(record, name), value, len(value))
        else:
            setattr(record, name, value)
    return bytes(ffi.buffer(record))


def unpack(struct: str, raw: bytes) -> Any:
    """A struct's fields, from the bytes of a map's key or value."""
    record: Any = ffi.new(f"struct {struct} *")
    if len(raw) != ffi.sizeof(record[0]):
        raise ValueError(f"struct {struct} has {ffi.sizeof(record[0])} bytes, not {len(raw)}")
    ffi.memmove(record, raw, len(raw))
    return record


SCHEMA: Final = constant("MESH_SCHEMA")
"""Part of the pin path: an agent carries over from an earlier one what has the same shape and meaning."""
