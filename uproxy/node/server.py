"""The agent's Unix socket: one request and one answer per connection, from root only, each bounded in size and time.

The messages are those of `client`. Whatever a request says, the agent goes on: an error is an answer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgpack

from uproxy import linux
from uproxy.node.client import MAX_MESSAGE

_log: Final = logging.getLogger(__name__)

_MAX_CONVERSATIONS: Final = 16
_TIMEOUT_S: Final = 5.0
_MAX_DESCRIPTORS: Final = 4  # one more than any request has, so that too many are seen

Handler = Callable[[Mapping[str, Any], Sequence[int]], dict[str, Any]]
"""Answers a request with its descriptors, which are closed afterwards. Raises RequestError to refuse."""


class RequestError(Exception):
    """A request that is refused; the text goes to the caller."""


class ListenError(Exception):
    """The socket cannot be opened; the text says why."""


def listen(path: Path, *, for_all: bool = False, who: str = "node agent", option: str = "--run-dir") -> socket.socket:
    """The listening socket, for root only unless `for_all`. Raises ListenError. A dead process's is replaced.

    `who` listens there, and `option` says where else it could.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if path.exists() and not path.is_socket():
        raise ListenError(f"{path}: is no socket; remove it, or use another {option}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ListenError(f"{path}: {error.strerror}; remove it, or use another {option}") from None
        else:
            raise ListenError(f"{path}: another {who} listens there; stop it, or use another {option}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        linux.bind_file(listener, str(path), 0o666 if for_all else 0o600)
    except OSError as error:
        listener.close()
        raise ListenError(f"{path}: {error.strerror or error}") from None
    listener.setblocking(False)
    listener.listen(_MAX_CONVERSATIONS)
    return listener


async def serve(listener: socket.socket, handler: Handler) -> None:
    """Answers requests until cancelled."""
    loop = asyncio.get_running_loop()
    free = asyncio.Semaphore(_MAX_CONVERSATIONS)

    async def converse(connection: socket.socket) -> None:
        try:
            with connection:
                await _converse(connection, handler)
        finally:
            free.release()

    async with asyncio.TaskGroup() as conversations:
        while True:
            await free.acquire()
            connection, _ = await loop.sock_accept(listener)
            conversations.create_task(converse(connection))


async def _converse(connection: socket.socket, handler: Handler) -> None:
    descriptors: list[int] = []
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await _readable(connection)
        raw, descriptors, flags, _ = socket.recv_fds(connection, MAX_MESSAGE, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        if not raw:
            return
        answer = {"ok": True, **_answer(connection, raw, flags, descriptors, handler)}
    except RequestError as error:
        answer = {"ok": False, "error": str(error)}
    except (TimeoutError, OSError) as error:
        _log.warning("a request over the socket failed: %s", str(error) or "nothing came in time")
        return
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    try:
        connection.send(msgpack.packb(answer))
    except OSError as error:
        _log.warning("the answer to a request could not be sent: %s", error)


def _answer(
    connection: socket.socket, raw: bytes, flags: int, descriptors: Sequence[int], handler: Handler
) -> dict[str, Any]:
    if linux.peer_uid(connection) != 0:
        raise RequestError("only root may ask the node agent")
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise RequestError(f"a request has at most {MAX_MESSAGE} bytes and {_MAX_DESCRIPTORS} descriptors")
    try:
        request = msgpack.unpackb(raw)
    except (ValueError, msgpack.UnpackException) as error:
        raise RequestError(f"the request is not msgpack: {error}") from None
    if not isinstance(request, dict) or not all(isinstance(key, str) for key in request):
        raise RequestError("a request is a map with text keys")
    try:
        return handler(request, descriptors)
    except RequestError:
        raise
    except Exception as error:
        _log.exception("request %r failed", request.get("op"))
        raise RequestError(f"the node agent failed ({error}); its log has the details") from None


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    sock.setblocking(False)
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)
