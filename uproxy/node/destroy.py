"""The sockets of a workload's namespace: whose is this one, and away with those (sock_diag(7), SOCK_DESTROY).

The socket that asks is made inside the namespace and sees nothing else. Destroying needs CAP_NET_ADMIN there, entering
it CAP_SYS_ADMIN; the agent has both.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from control.api.address import IpAddress, from_packed
from uproxy import linux
from uproxy.node import netlink
from uproxy.node.netlink import Netlink

# <linux/sock_diag.h>, <linux/inet_diag.h>
_BY_FAMILY, _DESTROY = 20, 21
_REQUEST: Final = struct.Struct("=BBBBI")  # family, protocol, extensions, padding, states: inet_diag_req_v2
_ID: Final = struct.Struct(">HH16s16s")  # ports and addresses; behind them interface and cookie, of the host's order
_ID_BYTES: Final = 48
_ANY_SOCKET: Final = b"\0" * 4 + b"\xff" * 8  # no interface, no cookie
_MESSAGE_BYTES: Final = 72
_CGROUP_ID: Final = 21  # INET_DIAG_CGROUP_ID, Linux 5.9
_ESTABLISHED: Final = 1
_LIVE: Final = 0xFFF & ~(1 << 6) & ~(1 << 10)  # every state but TIME_WAIT and LISTEN, which nobody talks on

End = tuple[IpAddress, int]


@dataclass(frozen=True, slots=True)
class Found:
    """One socket. A v4-mapped end is an IPv4 one here."""

    local: End
    remote: End
    state: int
    cgroup: int
    """In which it was made; 0 when the kernel does not say."""
    family: int
    id: bytes
    """As the kernel names it: struct inet_diag_sockid."""


class Sockets:
    """Asks in one network namespace, of TCP unless it is told otherwise. Raises OSError, as its methods do."""

    def __init__(self, netns_fd: int, protocol: int = socket.IPPROTO_TCP) -> None:
        self._protocol = protocol
        with linux.inside(netns_fd):
            self._netlink = Netlink(netlink.SOCK_DIAG)

    def established(self, local: End, remote: End) -> Found | None:
        """The one established connection with these ends, if there is one."""
        family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
        ports_and_addresses = _ID.pack(local[1], remote[1], _raw(local[0]), _raw(remote[0]))
        request = _REQUEST.pack(family, self._protocol, 0, 0, _LIVE) + ports_and_addresses + _ANY_SOCKET
        try:
            answers = self._netlink.ask(_BY_FAMILY, request)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        for found in map(_read, answers):
            # A listener answers for what is not there.
            if (found.local, found.remote, found.state) == (local, remote, _ESTABLISHED):
                return found
        return None

    def live(self) -> Iterator[Found]:
        """All but listeners and those in TIME_WAIT."""
        return self._dump(_LIVE)

    def connected(self) -> Iterator[Found]:
        """Those that are established, as a UDP socket is once connect() was called."""
        return self._dump(1 << _ESTABLISHED)

    def _dump(self, states: int) -> Iterator[Found]:
        for family in (socket.AF_INET, socket.AF_INET6):
            request = _REQUEST.pack(family, self._protocol, 0, 0, states) + bytes(_ID_BYTES)
            yield from map(_read, self._netlink.ask(_BY_FAMILY, request, dump=True))

    def destroy(self, found: Found) -> bool:
        """Abort it: ECONNABORTED here, RST to its peer. False when it was gone already."""
        request = _REQUEST.pack(found.family, self._protocol, 0, 0, _LIVE) + found.id
        try:
            self._netlink.ask(_DESTROY, request)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def close(self) -> None:
        self._netlink.close()


def _read(raw: bytes) -> Found:
    family, state = raw[0], raw[1]
    identity = raw[4 : 4 + _ID_BYTES]
    local_port, remote_port, local, remote = _ID.unpack_from(identity)
    cgroup = netlink.attributes(raw[_MESSAGE_BYTES:]).get(_CGROUP_ID, b"")
    return Found(
        (_address(family, local), local_port),
        (_address(family, remote), remote_port),
        state,
        int.from_bytes(cgroup, sys.byteorder),
        family,
        identity,
    )


def _raw(address: IpAddress) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.inet_pton(family, address).ljust(16, b"\0")


def _address(family: int, raw: bytes) -> IpAddress:
    return from_packed(raw[:4] if family == socket.AF_INET else raw)
