"""Ends connected UDP sockets that send where the configuration lets no datagram go any more.

The kernel asks nobody when such a socket sends: its hooks have been asked when it was connected.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from uproxy.node.destroy import Found, Sockets
from uproxy.node.places import cgroup_by_id, is_populated_id
from uproxy.node.workloads import Captured

Refused = Callable[[Captured, Found], bool]
"""Whether a workload's socket could not be connected so now."""

_MAY_BE_GONE: Final = (FileNotFoundError, ProcessLookupError)
_ROUNDS: Final = 4


def end(workload: Captured, is_refused: Refused) -> int:
    """Ends those of a workload: the application gets ECONNABORTED. Returns how many.

    Raises OSError, after which some may be left.
    """
    netns = _namespace(workload)
    if netns is None:
        return 0
    try:
        with closing(Sockets(netns, socket.IPPROTO_UDP)) as sockets:
            return _end(sockets, lambda found: _sends(workload, found, is_refused))
    finally:
        os.close(netns)


def _end(sockets: Sockets, sends: Callable[[Found], bool]) -> int:
    """Of sockets that share both ends (SO_REUSEPORT) the kernel finds but one, the first or the last of its list, until
    that has ended; hence the order.
    """
    ended: set[bytes] = set()
    for _ in range(_ROUNDS):
        found = list(filter(sends, sockets.connected()))
        if not found:
            return len(ended)
        ended |= {one.id for one in (*found, *reversed(found)) if sockets.destroy(one)}
    raise OSError(f"there are ever more that may not send ({len(ended)} ended)")


def _sends(workload: Captured, found: Found, is_refused: Refused) -> bool:
    """Whether a socket is to be ended, unless it is the uProxy's, which asks any nameserver."""
    return found.cgroup != workload.proxy_cgroup and is_refused(workload, found)


def _namespace(workload: Captured) -> int | None:
    """A descriptor of its network namespace; None when it has no process. Raises OSError."""
    for pid in _processes(workload):
        with suppress(*_MAY_BE_GONE):
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            if os.fstat(fd).st_ino == workload.netns_ino:
                return fd
            os.close(fd)
    if is_populated_id(workload.app_cgroup):
        raise OSError("none of its processes is in its network namespace")
    return None


def _processes(workload: Captured) -> Iterator[int]:
    """Those in its cgroups and below them."""
    for number in (workload.proxy_cgroup, workload.app_cgroup):
        with cgroup_by_id(number) as directory:
            found = Path(f"/proc/self/fd/{directory}/").rglob("cgroup.procs") if directory is not None else ()
            for procs in found:
                with suppress(*_MAY_BE_GONE):
                    yield from map(int, procs.read_text().split())
