"""Dialling a name with several addresses: Happy Eyeballs (RFC 8305), for who waits in a thread or process of his own.

Both families come from one getaddrinfo(), so that there is nothing to race in looking up (section 3), and its order
(RFC 6724) stands but for the families, which take turns (section 4).
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

ATTEMPT_DELAY_S: Final = 0.25
"""Between attempts (section 5), while none has failed."""

_Address = tuple[socket.AddressFamily, tuple[Any, ...]]


def dial(host: str, port: int, timeout_s: float) -> socket.socket:
    """A connected socket, whose calls wait `timeout_s` at most, as this whole one does. Raises OSError."""
    deadline = time.monotonic() + timeout_s
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    waiting = alternated((family, address) for family, _, _, _, address in found)
    failed: OSError | None = None
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or selector.get_map():
                if waiting:
                    try:
                        _begin(selector, waiting.pop(0))
                    except OSError as error:
                        failed = failed or error
                        continue
                pause_s = deadline - time.monotonic()
                if pause_s <= 0:
                    break
                for key, _ in selector.select(min(pause_s, ATTEMPT_DELAY_S) if waiting else pause_s):
                    made = key.fileobj
                    assert isinstance(made, socket.socket)
                    selector.unregister(made)
                    number = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not number:
                        made.settimeout(timeout_s)
                        return made
                    made.close()
                    failed = failed or OSError(number, os.strerror(number))
        finally:
            for key in list(selector.get_map().values()):
                with suppress(OSError):
                    key.fileobj.close()  # type: ignore[union-attr]  # a socket
    if failed is not None and time.monotonic() < deadline:
        raise failed
    raise TimeoutError(errno.ETIMEDOUT, f"nobody answered within {timeout_s:g} s")


def alternated(addresses: Iterable[_Address]) -> list[_Address]:
    """The families in turns, beginning with that of the first address."""
    by_family: dict[socket.AddressFamily, list[_Address]] = {}
    for one in addresses:
        by_family.setdefault(one[0], []).append(one)
    queues = list(by_family.values())
    longest = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def _begin(selector: selectors.BaseSelector, address: _Address) -> None:
    """Raises OSError when it fails at once."""
    family, place = address
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        with suppress(BlockingIOError):
            made.connect(place)
        selector.register(made, selectors.EVENT_WRITE)
    except BaseException:
        made.close()
        raise
