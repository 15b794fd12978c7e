"""What the kernel tests do inside a workload."""

from __future__ import annotations

import ctypes
import socket

from tests.support.capture import PORT


def dial(address: str, port: int = PORT, *, family: int | None = None) -> bytes:
    """What the other end answers; raises what connect() raises."""
    with connected(address, port, family=family) as sock:
        return sock.recv(4096)


def connected(address: str, port: int = PORT, *, family: int | None = None) -> socket.socket:
    sock = socket.socket(family or (socket.AF_INET6 if ":" in address else socket.AF_INET))
    sock.settimeout(5)
    try:
        sock.connect((address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def disconnect(sock: socket.socket) -> None:
    """connect(AF_UNSPEC), which Python's socket module does not offer."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(sock.fileno(), bytes(16), 16):
        raise OSError(ctypes.get_errno(), "connect(AF_UNSPEC)")
