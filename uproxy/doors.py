"""Where a waypoint takes callers: listening sockets that outlive the worker, and the process, that accepts there."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from control.api.address import HBONE_PORT, IpAddress
from uproxy.listener import Inherited, opened
from uproxy.process import StartError

Door = tuple[socket.socket, ...]
"""One listening socket at each address. The kernel spreads connections among the doors."""


def doors(addresses: Sequence[IpAddress], inherited: Inherited, least: int) -> list[Door]:
    """All that were handed over, since connections may wait at each, and new ones up to `least`. Raises StartError."""

    def listening(address: IpAddress) -> socket.socket:
        try:
            found = inherited.take(socket.SOCK_STREAM, address, HBONE_PORT)
            return found or opened(address, HBONE_PORT, shared=True)
        except OSError as error:
            raise StartError(f"cannot listen on {address}:{HBONE_PORT}: {error.strerror}") from error

    count = max(least, inherited.count(socket.SOCK_STREAM, addresses[0], HBONE_PORT))
    return [tuple(map(listening, addresses)) for _ in range(count)]
