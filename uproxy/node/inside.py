"""The way into workloads' network namespaces, for operators on their host."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from uproxy import linux
from uproxy.claims import LOCK_DIR
from uproxy.sandbox import NETNS_DIR


def launched() -> dict[str, int]:
    """What `uproxy exec` runs here, with or without capture: the inode of the namespace, by the namespace's name.

    That is the workload's, but where --cgroup-root put it elsewhere.
    """
    found = {}
    for lock in LOCK_DIR.glob("*.lock"):
        with suppress(OSError):  # the launcher was killed, and the namespace is gone
            found[lock.stem.removeprefix("uproxy-")] = (NETNS_DIR / lock.stem).stat().st_ino
    return found


def connect(netns: int, address: tuple[str, int], timeout_s: float) -> socket.socket:
    """A TCP connection made in the namespace with this inode. Raises OSError, also when no process is in it."""
    found = _namespace(netns)
    try:
        with linux.inside(found):
            return socket.create_connection(address, timeout=timeout_s)
    finally:
        os.close(found)


def _namespace(netns: int) -> int:
    for process in os.listdir("/proc"):
        if process.isdigit():
            with suppress(OSError):  # it has ended, or is none of ours to look into
                namespace = os.open(f"/proc/{process}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                if os.fstat(namespace).st_ino == netns:
                    return namespace
                os.close(namespace)
    raise FileNotFoundError("no process is in its network namespace: did its uProxy end?")
