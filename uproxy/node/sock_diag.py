"""Sockets as the kernel lists them: sock_diag(7), which tells the cgroup that each was made in (Linux 5.8)."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from control.api.address import IpAddress, from_packed
from uproxy.node import netlink
from uproxy.node.netlink import Netlink

_SOCK_DIAG_BY_FAMILY: Final = 20
_INET_DIAG_CGROUP_ID: Final = 21
_ALL_STATES: Final = 0xFFFFFFFF

# struct inet_diag_req_v2 without its 48 bytes of address; the beginning of struct inet_diag_msg.
_REQUEST: Final = struct.Struct("=BBBxI48x")
_MESSAGE: Final = struct.Struct("=BBxx2s2s16s16sI8sIIIII")


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
    with Netlink(netlink.SOCK_DIAG) as line:
        try:
            listed = line.ask(_SOCK_DIAG_BY_FAMILY, _REQUEST.pack(family, protocol, 0, _ALL_STATES), dump=True)
        except TimeoutError:
            raise
        except OSError as error:
            raise OSError(error.errno, f"sock_diag of protocol {protocol}: {error.strerror}") from None
    yield from map(_parse, listed)


def _parse(body: bytes) -> Listed:
    family, _, local_port, remote_port, local, remote, _, _, _, _, _, _, inode = _MESSAGE.unpack_from(body)
    size = 4 if family == socket.AF_INET else 16
    return Listed(
        inode,
        int.from_bytes(netlink.attributes(body[_MESSAGE.size :]).get(_INET_DIAG_CGROUP_ID, b""), sys.byteorder),
        (from_packed(local[:size]), int.from_bytes(local_port, "big")),
        (from_packed(remote[:size]), int.from_bytes(remote_port, "big")),
    )
