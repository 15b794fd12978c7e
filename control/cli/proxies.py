"""The admin ports of proxies: of the workloads on this host, or those that are named."""

from __future__ import annotations

import argparse
import http.client
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from control.cli.output import CommandError

ADMIN_PORT: Final = 15000
_TIMEOUT_S: Final = 5.0


class UnreachableError(Exception):
    """A proxy cannot be asked; the text says why."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """One that can be asked. `name`: of its workload, or its address as it was given."""

    name: str
    dial: Callable[[], socket.socket]
    """A connection to its admin port. Raises OSError."""


def add_proxy_options(parser: argparse.ArgumentParser) -> None:
    """Which proxies a command asks."""
    parser.add_argument("workload", nargs="*", help="of this host; default: all")
    parser.add_argument(
        "--admin",
        action="append",
        default=[],
        metavar="IP:PORT",
        help="ask the proxy whose admin port this is, instead of workloads; may be repeated",
    )
    parser.add_argument(
        "--node-socket", type=Path, metavar="PATH", help="ask those that this node agent knows, and no others"
    )


def proxies(arguments: argparse.Namespace) -> list[Proxy]:
    """Those that the command line means. Raises CommandError when there are none."""
    if arguments.admin:
        if arguments.workload:
            raise CommandError("workloads and --admin: name one or the other")
        return [Proxy(text, _dialler(*_host_port(text))) for text in arguments.admin]
    return _of_this_host(arguments.workload, arguments.node_socket)


def get(proxy: Proxy, path: str) -> bytes:
    """What its admin port answers. Raises UnreachableError."""
    try:
        with proxy.dial() as sock:
            asked = http.client.HTTPConnection("admin", timeout=_TIMEOUT_S)
            asked.sock = sock
            asked.request("GET", path)
            answer = asked.getresponse()
            body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(f"{proxy.name}: its admin port does not answer: {error}") from None
    if answer.status != http.HTTPStatus.OK:
        raise UnreachableError(f"{proxy.name}: its admin port answers {answer.status} to {path}")
    return body


def _of_this_host(names: list[str], node_socket: Path | None) -> list[Proxy]:
    if os.geteuid() != 0:
        raise CommandError(
            "needs root, to enter the workloads' network namespaces; or name a proxy with --admin IP:PORT"
        )
    known = _workloads(node_socket)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise CommandError(f"no workload {unknown[0]!r} runs on this host; there are: {', '.join(sorted(known))}")
    if not known:
        raise CommandError("no workload runs on this host, as far as a node agent and `uproxy exec` tell")
    return [Proxy(name, _inside(known[name])) for name in names or sorted(known)]


def _workloads(node_socket: Path | None) -> dict[str, int]:
    """Inodes of the network namespaces. With `node_socket`, of what that agent knows; else of all that run here."""
    # Imported here: most commands need nothing of a proxy's.
    from uproxy.node.client import DEFAULT_SOCKET, NodeClient, NodeError
    from uproxy.node.inside import launched

    found = {} if node_socket is not None else launched()
    if node_socket is None and not DEFAULT_SOCKET.exists():
        return found
    try:
        registered = NodeClient(node_socket or DEFAULT_SOCKET).status()["workloads"]
    except NodeError as error:
        raise CommandError(str(error)) from None
    seen = set(found.values())
    return found | {one["workload"]: one["netns"] for one in registered if one["netns"] not in seen}


def _inside(netns: int) -> Callable[[], socket.socket]:
    def dial() -> socket.socket:
        from uproxy.node.inside import connect

        return connect(netns, ("127.0.0.1", ADMIN_PORT), _TIMEOUT_S)

    return dial


def _dialler(host: str, port: int) -> Callable[[], socket.socket]:
    return lambda: socket.create_connection((host, port), timeout=_TIMEOUT_S)


def _host_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise CommandError(f"--admin {text!r} is no IP:PORT, as in 127.0.0.1:{ADMIN_PORT}")
    return host.removeprefix("[").removesuffix("]"), int(port)
