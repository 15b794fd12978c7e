"""The uProxies of this host's workloads, each on a channel of its own: who is there is the kernel's word, not theirs.

A peer is known by the proxy cgroup that its process sits in, asked of the process itself (SO_PEERPIDFD, so that a pid
that was used again means nobody). Whoever sits in no workload's proxy cgroup is hung up on. Each peer speaks of its own
workload only, in messages of bounded size, and no faster than it is listened to.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from uproxy import cgroup
from uproxy.node import channel
from uproxy.node.channel import ChannelError, Said
from uproxy.node.destroy import Sockets
from uproxy.node.workloads import Captured

_log: Final = logging.getLogger(__name__)

_SO_PEERPIDFD: Final = 77  # <asm-generic/socket.h>, Linux 6.5
# <linux/pidfd.h>, Linux 6.13: struct pidfd_info begins with mask and cgroupid; 64 bytes are its first version.
_PIDFD_GET_INFO: Final = 3 << 30 | 64 << 16 | 0xFF << 8 | 11
_INFO_CGROUP: Final = 1 << 2
_PAUSE_S: Final = 0.05  # between two messages of a peer, and after one whom nobody knows
_MAX_PEERS: Final = 1024
_MAX_REASONS: Final = 50  # that are logged, each once
_BUFFER: Final = 1 << 20  # for flows, while a peer is busy


class Listener(Protocol):
    """What is told of peers."""

    def joined(self, peer: Peer) -> None: ...

    def heard(self, peer: Peer) -> None:
        """It has said something: `peer.said`, the same object if it is what it said before."""

    def left(self, peer: Peer) -> None: ...


class Peer:
    """One uProxy, while its channel is open."""

    def __init__(self, workload: Captured, connection: socket.socket, netns_fd: int) -> None:
        """Takes both descriptors over. Raises OSError."""
        self.workload = workload
        self.netns_fd = netns_fd
        self.said: Said | None = None
        """None until it has spoken."""
        self.heard_at = time.monotonic()
        self._connection = connection
        self.sockets = Sockets(netns_fd)

    def tell(self, message: bytes) -> bool:
        """Whether it could be sent: a peer that does not listen is not waited for."""
        try:
            self._connection.send(message, socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

    def hang_up(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    async def listen(self, told: Callable[[], None]) -> None:
        """Until it hangs up. Raises ChannelError for a message that none is."""
        loop = asyncio.get_running_loop()
        last = b""
        while raw := await loop.sock_recv(self._connection, channel.MAX_MESSAGE + 1):
            if len(raw) > channel.MAX_MESSAGE:
                raise ChannelError(f"a message has at most {channel.MAX_MESSAGE} bytes")
            if raw != last:  # mostly it is said again
                self.said, last = channel.read_said(raw), raw
            self.heard_at = time.monotonic()
            told()
            await asyncio.sleep(_PAUSE_S)

    def close(self) -> None:
        self._connection.close()
        os.close(self.netns_fd)


async def serve(listener: socket.socket, captured: Callable[[], Iterable[Captured]], told: Listener) -> None:
    """Until cancelled. `captured`: the workloads of the moment."""
    loop = asyncio.get_running_loop()
    free = asyncio.Semaphore(_MAX_PEERS)

    async def converse(peer: Peer) -> None:
        told.joined(peer)
        try:
            await peer.listen(lambda: told.heard(peer))
        except (ChannelError, OSError) as error:
            _log.warning("workload %s: its uProxy is hung up on: %s", peer.workload.name, error)
        finally:
            told.left(peer)
            peer.close()
            free.release()

    why: set[str] = set()
    async with asyncio.TaskGroup() as group:
        while True:
            await free.acquire()
            connection, _ = await loop.sock_accept(listener)
            try:
                peer = _identified(connection, captured())
            except (OSError, ValueError) as error:
                if str(error) not in why and len(why) < _MAX_REASONS:
                    why.add(str(error))
                    _log.warning("who comes for the direct path and is no workload's uProxy is hung up on: %s", error)
                connection.close()
                free.release()
                await asyncio.sleep(_PAUSE_S)
            else:
                group.create_task(converse(peer))


def _identified(connection: socket.socket, captured: Iterable[Captured]) -> Peer:
    """Raises OSError or ValueError for whom nobody knows."""
    try:
        pidfd = struct.unpack("=i", connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0]
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            raise OSError(error.errno, "this kernel has no SO_PEERPIDFD (Linux 6.5), so nothing goes direct") from None
        raise
    try:
        pid = _pid(pidfd)
        place = _cgroup_id(pidfd, pid)
        workload = next((one for one in captured if place and one.proxy_cgroup == place), None)
        if workload is None:
            raise ValueError("it is in no workload's proxy cgroup")
        netns_fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not _is_alive(pidfd) or os.fstat(netns_fd).st_ino != workload.netns_ino:
                raise ValueError("it is gone, or in another network namespace than its workload")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            connection.setblocking(False)
            return Peer(workload, connection, netns_fd)
        except (OSError, ValueError):
            os.close(netns_fd)
            raise
    finally:
        os.close(pidfd)


def _cgroup_id(pidfd: int, pid: int) -> int:
    """The cgroup that the process is in. Raises OSError when it is gone."""
    info = bytearray(struct.pack("=Q", _INFO_CGROUP).ljust(64, b"\0"))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
        mask, found = struct.unpack_from("=QQ", info)
        if mask & _INFO_CGROUP:
            return int(found)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise
    # An older kernel. What is read is this process's if it still lives afterwards, which the caller looks at.
    path = re.search(r"^0::(/.*)$", Path(f"/proc/{pid}/cgroup").read_text(), re.MULTILINE)
    return os.stat(f"{cgroup.mount_point()}{path[1]}").st_ino if path else 0


def _pid(pidfd: int) -> int:
    """Raises ValueError when it is gone, or in another pid namespace."""
    found = re.search(r"^Pid:\s*(\d+)$", Path(f"/proc/self/fdinfo/{pidfd}").read_text(), re.MULTILINE)
    if found is None or int(found[1]) == 0:
        raise ValueError("its process is gone")
    return int(found[1])


def _is_alive(pidfd: int) -> bool:
    return not select.select([pidfd], [], [], 0)[0]
