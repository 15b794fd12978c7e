"""The way to the application of one workload: where it listens, and what it is told before anything else."""

from __future__ import annotations

import errno
import socket

from control.api.address import IpAddress
from control.api.identity import SpiffeId
from uproxy import plane, proxy_protocol
from uproxy.errors import Flag, RefusedError
from uproxy.plane import Plane
from uproxy.resolve import host_port

CONNECT_TIMEOUT_S = 10.0


async def dial(data_plane: Plane, address: IpAddress, port: int) -> tuple[socket.socket, str]:
    """Dial it: at the workload's address, then at loopback, where many listen only.

    The connection, and which of the two that was. Raises RefusedError.
    """
    failed: OSError | None = None
    for host in (address, "::1" if ":" in address else "127.0.0.1"):
        try:
            app = await data_plane.connect(host, port, CONNECT_TIMEOUT_S)
            plane.reset_on_close(app)
            return app, host
        except OSError as error:
            failed = error
            if error.errno != errno.ECONNREFUSED:
                break
    detail = f"the application at {host_port(address, port)}: {failed}"
    raise RefusedError("app-unreachable", detail, flag=Flag.CONNECT)


def tell(
    app: socket.socket, source: proxy_protocol.End, caller: SpiffeId | None, destination: proxy_protocol.End
) -> None:
    """Tell it who calls, on a new connection. Raises RefusedError, and closes that, when it cannot be told: the
    caller's own bytes must not be taken for the header.
    """
    header = proxy_protocol.header(source, destination, caller)
    try:
        if app.send(header) == len(header):
            return
        detail = "it took a part only"
    except OSError as error:
        detail = str(error)
    plane.reset(app)
    raise RefusedError(
        "app-unreachable", f"the PROXY protocol header for {host_port(*destination)}: {detail}", flag=Flag.CONNECT
    )
