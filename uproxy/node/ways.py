"""Whether native TCP from one workload to another is safe on this host: looked at, tried once, and looked at again.

Nobody else may be on the way (`routes`), a connection must arrive at its workload, and what was let through must be
possible to end.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final

from bpf.libbpf import BpfError
from bpf.maps import Admission, Maps, Tuple
from control.api.address import IpAddress, packed16
from uproxy import linux
from uproxy.node import routes
from uproxy.node.destroy import Found
from uproxy.node.peers import Peer

_log: Final = logging.getLogger(__name__)

RETRY_S: Final = 30.0
"""Until a way that did not hold is tried again."""
_PORT: Final = 15021  # the uProxy's readiness, which tells nobody anything
_TIMEOUT_S: Final = 1.0
_POLL_S: Final = 0.005

Way = tuple[int, int, IpAddress]
"""From an app cgroup to another, at an address."""


class Ways:
    """What is known of the ways of a host. The one writer of probes in `admitted` is whoever tries one."""

    def __init__(self, maps: Maps) -> None:
        self._maps = maps
        self._known: dict[Way, float | None] = {}
        """None: it holds; else when it may be tried (again), in monotonic seconds; infinity: it is being tried."""
        self._trying: set[asyncio.Task[None]] = set()

    def holds(self, caller: Peer, target: Peer, address: IpAddress, then: Callable[[], None]) -> bool:
        """Whether it is known to hold. Where nothing is known it is tried, and `then` is called when it holds."""
        way = caller.workload.app_cgroup, target.workload.app_cgroup, address
        after = self._known.get(way, 0.0)
        if after is None:
            return True
        if time.monotonic() >= after:
            self._known[way] = float("inf")
            task = asyncio.get_running_loop().create_task(self._try(caller, target, address, way, then))
            self._trying.add(task)
            task.add_done_callback(self._trying.discard)
        return False

    def suspend(self, cgroup: int) -> None:
        """Of a workload whose ways hold no more: they are tried again later."""
        later = time.monotonic() + RETRY_S
        self._known |= {way: later for way, after in self._known.items() if cgroup in way[:2] and after is None}

    def forget(self, cgroup: int) -> None:
        """Of a workload that is gone, or whose uProxy is."""
        self._known = {way: after for way, after in self._known.items() if cgroup not in way[:2]}

    async def _try(self, caller: Peer, target: Peer, address: IpAddress, way: Way, then: Callable[[], None]) -> None:
        try:
            problem = await self._problem(caller, target, address)
        except (OSError, BpfError, ValueError) as error:  # TimeoutError too
            problem = str(error) or f"no answer within {_TIMEOUT_S:g} s"
        if way not in self._known:
            return  # forgotten meanwhile
        self._known[way] = time.monotonic() + RETRY_S if problem else None
        if problem:
            _log.warning(
                "workload %s goes to %s by tunnels only: %s", caller.workload.name, target.workload.name, problem
            )
        else:
            then()

    async def _problem(self, caller: Peer, target: Peer, address: IpAddress) -> str:
        """Empty when there is none. Raises OSError (TimeoutError) or BpfError."""
        sources = sources_of(caller.workload.addresses, address)
        if not sources:
            return f"it has no address of the family of {address}"
        own = sources[0]
        for one, peer in (*((source, caller) for source in sources), (address, target)):
            shared = routes.shared(one, peer.netns_fd)
            if shared:
                return shared
        with _socket_inside(caller.netns_fd, own) as probe:
            async with asyncio.timeout(_TIMEOUT_S):
                arrived = await self._arrive(probe, target, own, address)
            if arrived.cgroup != target.workload.proxy_cgroup:
                return f"a connection to {address}:{_PORT} arrived at somebody else"
            if not target.sockets.destroy(arrived):  # while its other end is open: nobody else has a reason to end it
                return "a connection that was tried ended by itself"
        return ""

    async def _arrive(self, probe: socket.socket, target: Peer, own: IpAddress, address: IpAddress) -> Found:
        """The other end of a connection that is let through for this. Raises OSError or BpfError."""
        port: int = probe.getsockname()[1]
        connection = Tuple(
            netns_cookie=target.workload.netns_cookie,
            source=(packed16(own), port),
            destination=(packed16(address), _PORT),
        )
        self._maps.admitted.put(connection, time.monotonic_ns(), Admission.PROBE)
        try:
            await asyncio.get_running_loop().sock_connect(probe, (address, _PORT))
            while True:
                found = target.sockets.established((address, _PORT), (own, port))
                if found is not None:
                    return found
                await asyncio.sleep(_POLL_S)
        finally:
            self._maps.admitted.delete(connection)


def sources_of(addresses: Sequence[IpAddress], destination: IpAddress) -> list[IpAddress]:
    """From which of a caller's addresses it may dial this one."""
    return [one for one in addresses if (":" in one) == (":" in destination)]


def _socket_inside(netns_fd: int, address: IpAddress) -> socket.socket:
    """Bound to this address of that namespace. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with linux.inside(netns_fd):
        made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        made.bind((address, 0))
    except OSError:
        made.close()
        raise
    return made
