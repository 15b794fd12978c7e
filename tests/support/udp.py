"""Connected UDP sockets of an application, and which of them were ended."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tests.support import capture
from tests.support.capture import Site


@contextmanager
def connected(site: Site, ends: Sequence[tuple[str, int]], port: int = 0) -> Iterator[Callable[[], list[bool]]]:
    """A process of the application, without privileges, with one socket connected to each end, all from `port` if it is
    given. Gives who says of each whether it has ended.
    """
    sockets: list[socket.socket] = []

    def connect() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        os.setuid(65534)
        for end in ends:
            sock = socket.socket(socket.AF_INET6 if ":" in end[0] else socket.AF_INET, socket.SOCK_DGRAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("", port))
            sock.connect(end)
            sock.send(b"x")
            sockets.append(sock)

    def tell() -> None:
        while True:
            signal.sigwait([signal.SIGUSR1])
            os.write(write, bytes(_has_ended(sock) for sock in sockets))

    read, write = os.pipe()
    try:
        with capture.background(site.netns, site.app, tell, connect) as pid:

            def ended() -> list[bool]:
                os.kill(pid, signal.SIGUSR1)
                return [bool(one) for one in os.read(read, len(ends))]

            yield ended
    finally:
        os.close(read)
        os.close(write)


def _has_ended(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return True
    return False
