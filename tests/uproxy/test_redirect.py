"""The uProxy reads the kernel's answer by its own description of it; here it is held against bpf/mesh.h."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf import layout
from control.api.address import HBONE_PORT
from uproxy import redirect
from uproxy.redirect import ORIG_DST, ORIG_DST_MAGIC, ORIG_DST_VERSION, Route, parse_original_destination

FIELDS = ("sockaddr", "magic", "version", "route", "service_id", "backend", "drawn", "generation", "reserved")


def sockaddr(address: str, port: int) -> bytes:
    ip = ipaddress.ip_address(address)
    if ip.version == 4:
        return socket.AF_INET.to_bytes(2, "little") + port.to_bytes(2, "big") + ip.packed + bytes(8)
    return socket.AF_INET6.to_bytes(2, "little") + port.to_bytes(2, "big") + bytes(4) + ip.packed + bytes(4)


def answer(address: str, port: int, route: int, magic: int = ORIG_DST_MAGIC, version: int = ORIG_DST_VERSION) -> bytes:
    return ORIG_DST.pack(sockaddr(address, port).ljust(28, b"\0"), magic, version, route, 7, 8, 5, 9, 0)


def test_the_layout_is_that_of_the_header() -> None:
    assert ORIG_DST.size == layout.ffi.sizeof("struct mesh_orig_dst") == 64
    filled = layout.ffi.new("struct mesh_orig_dst *")
    layout.ffi.memmove(filled, answer("10.1.2.3", 80, Route.WAYPOINT), 64)
    assert [getattr(filled, name) for name in FIELDS[1:]] == [
        ORIG_DST_MAGIC,
        ORIG_DST_VERSION,
        Route.WAYPOINT,
        7,
        8,
        5,
        9,
        0,
    ]


def test_constants_are_those_of_the_header() -> None:
    constant = layout.constant
    assert constant("MESH_ORIG_DST_MAGIC") == ORIG_DST_MAGIC
    assert constant("MESH_ORIG_DST_VERSION") == ORIG_DST_VERSION
    routes = layout.members("mesh_route")
    del routes["MESH_ROUTE_PLAINTEXT"]  # a datagram's, and those do not come to a uProxy
    assert {f"MESH_ROUTE_{r.name}": r.value for r in Route if r is not Route.UNKNOWN} == routes
    assert constant("MESH_PORT_OUTBOUND") == redirect.OUTBOUND_PORT
    assert constant("MESH_PORT_HBONE") == HBONE_PORT
    assert constant("MESH_PORT_PROBE") == redirect.PROBE_PORT
    assert int(ipaddress.ip_address(redirect.PROBE_V4)) == constant("MESH_PROBE_V4")
    words = [constant(f"MESH_PROBE_V6_{word}") for word in range(4)]
    packed = b"".join((word & 0xFFFFFFFF).to_bytes(4, "big") for word in words)
    assert ipaddress.ip_address(redirect.PROBE_V6).packed == packed


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)), st.integers(0, 65535), st.sampled_from(Route))
def test_every_answer_reads_as_it_was_written(ip: ipaddress.IPv4Address, port: int, route: Route) -> None:
    read = parse_original_destination(answer(str(ip), port, route))
    mapped = getattr(ip, "ipv4_mapped", None)
    assert (read.address, read.port, read.route, read.drawn) == (str(mapped or ip), port, route, 5)


@given(st.binary(max_size=80))
def test_any_other_answer_is_refused_or_read(data: bytes) -> None:
    try:
        read = parse_original_destination(data)
    except ValueError:
        return
    ipaddress.ip_address(read.address)


def test_a_bare_sockaddr_has_no_route() -> None:
    assert parse_original_destination(sockaddr("10.1.2.3", 80)).route is Route.UNKNOWN
    assert parse_original_destination(sockaddr("10.1.2.3", 80)).drawn == 0
    assert parse_original_destination(sockaddr("fd00::1", 80)).route is Route.UNKNOWN


def test_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version 2"):
        parse_original_destination(answer("10.1.2.3", 80, 1, version=2))


@pytest.mark.parametrize("ask", [redirect.original_destination, redirect.redirected_destination])
def test_a_connection_that_was_not_captured_is_refused(
    ask: Callable[[socket.socket], redirect.OriginalDestination],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted, pytest.raises(redirect.RefusedError) as refused:
            ask(accepted)
    assert refused.value.reason == "not-captured"
