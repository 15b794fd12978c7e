"""What the uProxy tells the kernel about plaintext is what bpf/mesh.h reads; and what it cannot tell opens nothing."""

from __future__ import annotations

import asyncio
import logging
import socket

import pytest

from bpf import layout
from control.api.plaintext import MAX_PORTS, PROXY_PORTS, Plaintext
from uproxy import door, plane
from uproxy.plane import Plane


def test_the_layout_and_the_constants_are_those_of_the_header():
    constant = layout.constant
    assert constant("MESH_SOL") == door.SOL_MESH
    assert constant("MESH_SO_PLAINTEXT") == door.SO_PLAINTEXT
    assert constant("MESH_PLAINTEXT_PORTS") == MAX_PORTS
    assert constant("MESH_PORT_PLAINTEXT") == door.PLAINTEXT_PORT
    first, last = constant("MESH_PORT_RESERVED_FIRST"), constant("MESH_PORT_RESERVED_LAST")
    assert range(first, last + 1) == PROXY_PORTS
    assert door.PLAINTEXT.size == layout.ffi.sizeof("struct mesh_plaintext")
    filled = layout.ffi.new("struct mesh_plaintext *")
    layout.ffi.memmove(filled, door.PLAINTEXT.pack(1, 2, 80, 90, *(0,) * (MAX_PORTS - 2)), door.PLAINTEXT.size)
    assert (filled.others, filled.count, list(filled.ports)[:3]) == (1, 2, [80, 90, 0])


def test_where_the_kernel_does_not_take_it_nobody_listens_and_it_is_said_once(caplog: pytest.LogCaptureFixture):
    """Here no eBPF program answers the option, as with a node agent of an earlier version."""

    async def serve(peer: socket.socket) -> None:
        peer.close()

    async def open_it() -> None:
        data_plane = Plane(asyncio.get_running_loop())
        closed = door.Door(data_plane, serve)
        for _ in range(3):
            closed.set(Plaintext(True, ()))
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", door.PLAINTEXT_PORT))
        closed.set(None)
        data_plane.close()

    with caplog.at_level(logging.INFO):
        plane.run(open_it())
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "does not take the ports (Protocol not available): that needs --capture ebpf and a node agent" in caplog.text
