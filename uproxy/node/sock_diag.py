"""Sockets as the kernel lists them: sock_diag(7), which tells the cgroup that each was made in (Linux 5.8)."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from control.api.address import IpAddress, from_packed

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_INET_DIAG_CGROUP_ID: Final = 21
_ALL_STATES: Final = 0xFFFFFFFF
_RECEIVE_BYTES: Final = 65536
_TIMEOUT_S: Final = 10.0

# struct nlmsghdr; struct inet_diag_req_v2 without its 48 bytes of address; the beginning of struct inet_diag_msg.
_HEADER: Final = struct.Struct("=IHHII")
_REQUEST: Final = struct.Struct("=BBBxI48x")
_MESSAGE: Final = struct.Struct("=BBxx2s2s16s16sI8sIIIII")
_ATTRIBUTE: Final = struct.Struct("=HH")


@dataclass(frozen=True, slots=True)
class Listed:
    """One socket that is bound, connected or listening."""

    inode: int
    """As /proc/PID/fd names it; 0 when no descriptor holds it any more."""
    cgroup_id: int
    """Of the cgroup it was made in."""
    local: tuple[IpAddress, int]
    remote: tuple[IpAddress, int]


def sockets(family: int, protocol: int) -> Iterator[Listed]:
    """The calling thread's network namespace's. Raises OSError: ENOENT when this kernel cannot list that protocol."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as line:
        line.settimeout(_TIMEOUT_S)
        request = _REQUEST.pack(family, protocol, 0, _ALL_STATES)
        flags = _NLM_F_REQUEST | _NLM_F_DUMP
        line.send(_HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, flags, 1, 0) + request)
        while True:
            received = line.recv(_RECEIVE_BYTES)
            at = 0
            while at < len(received):
                length, kind, *_ = _HEADER.unpack_from(received, at)
                body = received[at + _HEADER.size : at + length]
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    code = -struct.unpack_from("=i", body)[0]
                    raise OSError(code, f"sock_diag of protocol {protocol}: {os.strerror(code)}")
                yield _parse(body)
                at += _aligned(length)


def _parse(body: bytes) -> Listed:
    family, _, local_port, remote_port, local, remote, _, _, _, _, _, _, inode = _MESSAGE.unpack_from(body)
    size = 4 if family == socket.AF_INET else 16
    cgroup_id, at = 0, _MESSAGE.size
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if kind == _INET_DIAG_CGROUP_ID:
            (cgroup_id,) = struct.unpack_from("=Q", body, at + _ATTRIBUTE.size)
        at += _aligned(max(length, _ATTRIBUTE.size))
    return Listed(
        inode,
        cgroup_id,
        (from_packed(local[:size]), int.from_bytes(local_port, "big")),
        (from_packed(remote[:size]), int.from_bytes(remote_port, "big")),
    )


def _aligned(length: int) -> int:
    return (length + 3) & ~3
