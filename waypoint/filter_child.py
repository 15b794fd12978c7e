"""A process in which one filter runs: `python -m waypoint.filter_child FD PARENT ENTRY_POINT [CLOSED]`, from
`filter_pool`.

FD is this end of a socket pair. In come the settings, then calls; out goes `["ready", for requests, for responses]`, or
`["failed", why]`, and one answer to each call. It ends with PARENT. CLOSED is a directory with a key, which it closes
to itself where the kernel has Landlock.
"""

from __future__ import annotations

import importlib.metadata
import resource
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgpack

from uproxy import linux
from uproxy.landlock import close_to_us
from waypoint.extending import Answer, Request, Response

GROUP: Final = "uproxy.waypoint.filters"
MAX_MEMORY: Final = 512 << 20
"""Bytes of address space, of which Python takes 30 MiB to begin with."""
MAX_FILES: Final = 64

_LENGTH: Final = struct.Struct("!I")
_TOLD: Final = 500  # characters of what a filter raised


def main() -> int:
    """Run until the other end closes. Returns the exit status."""
    fd, parent, name, *closed = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    linux.die_with_parent(parent)
    linux.forbid_new_privileges()
    linux.forbid_dumps()
    for directory in closed:
        try:
            close_to_us(Path(directory))
        except OSError as error:
            print(f"filter {name}: {directory} stays open to it: {error}", file=sys.stderr)
    for what, limit in (
        (resource.RLIMIT_AS, MAX_MEMORY),
        (resource.RLIMIT_NOFILE, MAX_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    with socket.socket(fileno=fd) as sock:
        settings = _receive(sock)
        try:
            made = _found(name)(dict(settings or ()))
        except Exception as error:
            _send(sock, ["failed", _said(error)])
            return 1
        _send(sock, ["ready", hasattr(made, "on_request"), hasattr(made, "on_response")])
        while (call := _receive(sock)) is not None:
            try:
                answer = _called(made, call)
            except Exception as error:
                traceback.print_exc()
                answer = ["failed", _said(error)]
            _send(sock, answer)
    return 0


def _found(name: str) -> Callable[[dict[str, str]], object]:
    """Raises LookupError, and whatever loading it raises."""
    found = importlib.metadata.entry_points(group=GROUP, name=name)
    if not found:
        raise LookupError(f"no package that is installed here has entry point {name!r} in group {GROUP}")
    made: Callable[[dict[str, str]], object] = next(iter(found)).load()
    return made


def _called(made: Any, call: list[Any]) -> list[Any]:
    method, target, authority, caller, address, identifier, headers, *rest = call
    request = Request(
        method, target, authority, caller, address, identifier, [(name, value) for name, value in headers]
    )
    if rest:
        status, sent = rest
        response = Response(status, [(name, value) for name, value in sent])
        made.on_response(request, response)
        return ["go", response.headers]
    answer = made.on_request(request)
    if isinstance(answer, Answer):
        return ["answer", answer.status, answer.headers, answer.body]
    if answer is not None:
        raise TypeError(f"on_request returned {type(answer).__name__}; it must be Answer or None")
    return ["go", request.headers]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_TOLD]


def _receive(sock: socket.socket) -> Any:
    """The next message; None at the end."""
    head = sock.recv(_LENGTH.size, socket.MSG_WAITALL)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    return msgpack.unpackb(sock.recv(length, socket.MSG_WAITALL))


def _send(sock: socket.socket, message: list[Any]) -> None:
    body = msgpack.packb(message)
    sock.sendall(_LENGTH.pack(len(body)) + body)


if __name__ == "__main__":
    sys.exit(main())
