"""Explicit mode, for people without privileges: static local ports, and SOCKS5 (RFC 1928).

The application is told where to dial; from there on its connection is like any captured one. Destinations outside the
mesh are refused: this is a door into the mesh, not an open proxy.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from control.api.address import AddressError, from_packed, parse_address
from control.api.workload import key_of_host
from control.client.state import State
from uproxy import plane
from uproxy.errors import RefusedError
from uproxy.outbound import Outbound
from uproxy.plane import Plane
from uproxy.redirect import OriginalDestination, Route

if TYPE_CHECKING:
    from uproxy.demand import Demand

SOCKS_TIMEOUT_S = 10.0  # for the whole negotiation

_VERSION, _NO_AUTHENTICATION, _NO_METHOD, _CONNECT = 5, 0, 0xFF, 1
_IPV4, _HOST_NAME, _IPV6 = 1, 3, 4
# Replies of RFC 1928 section 6.
_SUCCEEDED, _NOT_ALLOWED, _BAD_COMMAND, _BAD_ADDRESS = 0, 2, 7, 8

log = logging.getLogger(__name__)


class SocksError(Exception):
    """A client that is not served; `reply` is the code of RFC 1928 section 6."""

    def __init__(self, reply: int, text: str) -> None:
        super().__init__(text)
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Forward:
    """`--forward LOCAL:PORT=HOST:PORT`: a local port that stands for one service port."""

    local_host: str
    local_port: int
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Forward:
        """Read the option. Raises ValueError with what would be right."""
        local, equals, remote = text.partition("=")
        if not equals:
            raise ValueError(
                f"{text!r}: write LOCALIP:PORT=SERVICE.NAMESPACE:PORT, as in 127.0.0.1:9080=reviews.shop:80"
            )
        return cls(*split_host_port(local), *split_host_port(remote))


def split_host_port(text: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is no HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


@dataclass(frozen=True, slots=True)
class Directory:
    """What the mesh says about names and addresses; `demand` asks for what is not known yet, if there is anybody."""

    state: State
    demand: Demand | None = None

    async def destination_of(self, host: str, port: int) -> OriginalDestination:
        """A service's name or an address, as a destination. Raises RefusedError when the mesh knows no such name."""
        with contextlib.suppress(AddressError):
            return OriginalDestination(parse_address(host), port, Route.UNKNOWN)
        service_key = key_of_host(host)
        if self.demand is not None and service_key is not None and self.state.service(service_key) is None:
            await self.demand.service(service_key)
        service = self.state.service_named(host)
        if service is None or not service.vips:
            raise RefusedError("no-config", f"the mesh has no service {host!r}; names are SERVICE.NAMESPACE")
        return OriginalDestination(service.vips[0], port, Route.UNKNOWN)

    async def has(self, destination: OriginalDestination) -> bool:
        """Whether this is a service port or a workload. Raises RefusedError when nobody says in time."""
        if self._has(destination) or self.demand is None:
            return self._has(destination)
        await self.demand.destination(destination.address)
        return self._has(destination)

    def _has(self, destination: OriginalDestination) -> bool:
        address, port = destination.address, destination.port
        return self.state.service_at(address, port) is not None or self.state.workload_at(address) is not None


async def serve_forward(outbound: Outbound, directory: Directory, forward: Forward, app: socket.socket) -> None:
    """A connection to a static local port."""
    await serve_named(outbound, directory, (forward.host, forward.port), app)


async def serve_named(
    outbound: Outbound, directory: Directory, dialled: tuple[str, int], app: socket.socket, *, traced: bool = True
) -> None:
    """A connection to a host and port of the mesh. `traced`: as in `Outbound.serve`."""
    host, port = dialled
    try:
        destination = await directory.destination_of(host, port)
    except RefusedError as error:
        log.warning("forward to %s:%d: %s", host, port, error)
        plane.reset(app)
        return
    await outbound.serve(app, destination, traced=traced)


async def serve_socks(data_plane: Plane, outbound: Outbound, directory: Directory, app: socket.socket) -> None:
    """A connection to the SOCKS5 port: negotiate, then go on like any other. CONNECT only, no authentication.

    The reply is sent before the tunnel is up, as for a captured connection, whose connect() has succeeded by then too:
    a refusal afterwards is a reset.
    """
    try:
        host, port = await _negotiate(data_plane, app)
        destination = await directory.destination_of(host, port)
        if not await directory.has(destination):
            raise SocksError(_NOT_ALLOWED, f"{host}:{port} is not in the mesh")
        app.send(_reply(_SUCCEEDED))
    except RefusedError as error:
        _refuse(app, _NOT_ALLOWED, str(error))
        return
    except SocksError as error:
        _refuse(app, error.reply, str(error))
        return
    except OSError as error:
        log.info("socks5: %s", error)
        app.close()
        return
    await outbound.serve(app, destination)


async def _negotiate(data_plane: Plane, app: socket.socket) -> tuple[str, int]:
    deadline = time.monotonic() + SOCKS_TIMEOUT_S

    def read(length: int) -> Awaitable[bytes]:
        return _read(data_plane, app, length, deadline)

    version, methods = await read(2)
    if version != _VERSION:
        raise SocksError(_BAD_COMMAND, f"SOCKS version {version}; only 5 is served")
    if _NO_AUTHENTICATION not in await read(methods):
        app.send(bytes((_VERSION, _NO_METHOD)))
        raise OSError("the client offers no method without authentication")
    app.send(bytes((_VERSION, _NO_AUTHENTICATION)))
    _, command, _, kind = await read(4)
    if command != _CONNECT:
        raise SocksError(_BAD_COMMAND, f"SOCKS command {command}; only CONNECT is served")
    if kind == _HOST_NAME:
        (length,) = await read(1)
        host = (await read(length)).decode("latin-1")
    elif kind in (_IPV4, _IPV6):
        host = from_packed(await read(4 if kind == _IPV4 else 16))
    else:
        raise SocksError(_BAD_ADDRESS, f"SOCKS address type {kind}")
    port = int.from_bytes(await read(2), "big")
    return host, port


async def _read(data_plane: Plane, app: socket.socket, length: int, deadline: float) -> bytes:
    """Exactly `length` bytes, so that what follows the negotiation stays in the socket. Raises OSError."""
    received = b""
    while len(received) < length:
        try:
            part = app.recv(length - len(received))
        except BlockingIOError:
            await data_plane.ready(app, plane.READ, deadline - time.monotonic())
            continue
        if not part:
            raise OSError("the client closed the connection during the SOCKS negotiation")
        received += part
    return received


def _reply(code: int) -> bytes:
    return bytes((_VERSION, code, 0, _IPV4, 0, 0, 0, 0, 0, 0))


def _refuse(app: socket.socket, code: int, text: str) -> None:
    log.info("socks5: refused: %s", text)
    with contextlib.suppress(OSError):
        app.send(_reply(code))
    app.close()
