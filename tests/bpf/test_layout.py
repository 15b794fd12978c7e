"""mesh.h has one meaning: what cffi made of it is what clang made of it, as the objects' BTF says."""

from __future__ import annotations

import dataclasses
import itertools
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from cffi import FFI

from bpf import flows, layout, loader, maps
from uproxy import redirect
from uproxy.node import client

# <linux/btf.h>: the kinds that mesh.h can produce.
INT, PTR, ARRAY, STRUCT, ENUM, TYPEDEF = 1, 2, 3, 4, 6, 8

ffi = FFI()
ffi.cdef(
    """
    struct btf_type { uint32_t name_off; uint32_t info; uint32_t size_or_type; };
    struct btf_member { uint32_t name_off; uint32_t type; uint32_t offset; };
    struct btf_enum { uint32_t name_off; int32_t val; };
    void *btf__parse(const char *path, void *ext);
    void btf__free(void *btf);
    uint32_t btf__type_cnt(const void *btf);
    const struct btf_type *btf__type_by_id(const void *btf, uint32_t id);
    const char *btf__name_by_offset(const void *btf, uint32_t offset);
    int64_t btf__resolve_size(const void *btf, uint32_t id);
    """
)
libbpf: Any = ffi.dlopen("libbpf.so.1")


def read_btf(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """{struct: (size, {field: (offset, size)})} and {enum: {name: value}} of an object, those of mesh.h."""
    btf = libbpf.btf__parse(str(path).encode(), ffi.NULL)
    assert btf != ffi.NULL
    name = lambda offset: ffi.string(libbpf.btf__name_by_offset(btf, offset)).decode()  # noqa: E731
    structs, enums = {}, {}
    for number in range(1, libbpf.btf__type_cnt(btf)):
        kind = libbpf.btf__type_by_id(btf, number)
        what, count, own = kind.info >> 24 & 0x1F, kind.info & 0xFFFF, name(kind.name_off)
        if not own.startswith("mesh_"):
            continue
        if what == STRUCT:
            members = ffi.cast("struct btf_member *", kind + 1)
            structs[own] = (
                kind.size_or_type,
                {
                    name(members[i].name_off): (
                        members[i].offset // 8,
                        libbpf.btf__resolve_size(btf, members[i].type),
                    )
                    for i in range(count)
                },
            )
        elif what == ENUM:
            values = ffi.cast("struct btf_enum *", kind + 1)
            enums[own] = {name(values[i].name_off): values[i].val & 0xFFFFFFFF for i in range(count)}
    libbpf.btf__free(btf)
    return structs, enums


@pytest.fixture(scope="module")
def btf():
    structs: dict[str, Any] = {}
    for path in sorted(loader.OBJECTS.glob("*.bpf.o")):
        found, _ = read_btf(path)
        for name, shape in found.items():
            assert structs.setdefault(name, shape) == shape, f"{path} and another object differ about struct {name}"
    return structs


def declared(kind: str) -> list[str]:
    return re.findall(rf"^{kind} (mesh_\w+) {{", layout.HEADER.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", declared("struct"))
def test_every_offset_and_size_is_what_clang_says(btf, name):
    assert name in btf, f"no object has struct {name} in its BTF: it must be in a map"
    size, fields = btf[name]
    kind = layout.ffi.typeof(f"struct {name}")
    ours = {field: (info.offset, layout.ffi.sizeof(info.type)) for field, info in kind.fields}
    assert ours == fields
    assert layout.ffi.sizeof(kind) == size


@pytest.mark.parametrize("name", declared("struct"))
def test_no_struct_has_a_hole(btf, name):
    size, fields = btf[name]
    end = 0
    for field, (offset, length) in fields.items():
        assert offset == end, f"struct {name}: {offset - end} bytes before {field} belong to no field"
        end = offset + length
    assert end == size


def test_the_answer_to_so_original_dst_is_as_agreed(btf):
    size, fields = btf["mesh_orig_dst"]
    assert size == 64
    assert {name: offset for name, (offset, _) in fields.items()} == {
        "sockaddr": 0,
        "magic": 28,
        "version": 32,
        "route": 34,
        "service_id": 36,
        "backend": 40,
        "drawn": 44,
        "generation": 48,
        "reserved": 56,
    }


def test_the_uproxys_reading_is_the_kernels():
    assert redirect.ORIG_DST.size == layout.sizeof("struct mesh_orig_dst")
    assert layout.constant("MESH_ORIG_DST_MAGIC") == redirect.ORIG_DST_MAGIC
    assert layout.constant("MESH_ORIG_DST_VERSION") == redirect.ORIG_DST_VERSION
    routes = layout.members("mesh_route")
    del routes["MESH_ROUTE_PLAINTEXT"]  # a datagram's, and those do not come to a uProxy
    for name, number in routes.items():
        assert redirect.Route[name.removeprefix("MESH_ROUTE_")] == number
    packed = layout.pack("mesh_orig_dst", magic=layout.constant("MESH_ORIG_DST_MAGIC"), version=1, route=3)
    sockaddr = b"\x02\x00" + (80).to_bytes(2, "big") + socket.inet_aton("240.240.0.10") + bytes(20)
    read = redirect.parse_original_destination(sockaddr + packed[28:])
    assert (read.address, read.port, read.route) == ("240.240.0.10", 80, redirect.Route.PROBE)


def test_the_clients_probe_addresses_are_the_headers():
    words = [layout.constant(f"MESH_PROBE_V6_{n}").to_bytes(4, "big") for n in range(4)]
    port = layout.constant("MESH_PORT_PROBE")
    assert (socket.inet_ntop(socket.AF_INET6, b"".join(words)), port) == client.PROBE_V6
    assert (socket.inet_ntoa(layout.constant("MESH_PROBE_V4").to_bytes(4, "big")), port) == client.PROBE_V4


def test_the_record_of_a_flow_is_the_kernels():
    numbers = itertools.count(1)
    values = {
        name: next(numbers).to_bytes(16, "big") if info.type.kind == "array" else next(numbers)
        for name, info in layout.ffi.typeof("struct mesh_flow").fields
    }
    assert flows.RECORD.unpack(layout.pack("mesh_flow", **values)) == tuple(values.values())
    names = [field.name for field in dataclasses.fields(flows.Flow)]
    assert names == [name for name in values if name != "pad"]


def test_counters_are_numbered_without_gaps():
    numbers = layout.members("mesh_counter")
    assert sorted(numbers.values()) == list(range(numbers["MESH_COUNTERS"] + 1))


@pytest.mark.parametrize("name", sorted(maps.KINDS))
def test_every_map_has_a_size(name):
    size = maps.size_of(name)
    assert (size.key > 0, size.value > 0) == (name != "flows", name != "flows"), "only a ring has no entries"


def test_pack_and_unpack_are_inverse():
    address = bytes(range(16))
    raw = layout.pack("mesh_service_key", addr=address, port=0x1234)
    assert raw == address + (0x1234).to_bytes(2, "little") + b"\0\0"
    assert layout.unpack("mesh_service_key", raw).port == 0x1234
    with pytest.raises(ValueError, match="has 20 bytes, not 19"):
        layout.unpack("mesh_service_key", raw[:-1])
