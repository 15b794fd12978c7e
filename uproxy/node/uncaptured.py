"""Sockets of a captured workload that capture does not see, because they were made before it or elsewhere.

Hooks follow the cgroup that a socket was made in. A process that was moved into the app cgroup, or that was handed a
socket by one outside, dials past them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bpf import libc
from uproxy import cgroup, linux
from uproxy.node import sock_diag
from uproxy.node.sock_diag import Listed

_SIOCGSKNS: Final = 0x894C  # <linux/sockios.h>: a descriptor of the namespace that a socket is in
_PIDFD_GETFD: Final = 438  # pidfd_getfd(2), the same number on every architecture, Linux 5.6
_PROTOCOLS: Final = {socket.SOCK_STREAM: socket.IPPROTO_TCP, socket.SOCK_DGRAM: socket.IPPROTO_UDP}
_NAMES: Final = {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Uncaptured:
    """A socket that an application holds and capture does not see."""

    pid: int
    command: str
    protocol: str
    local: str
    remote: str
    origin: str
    """Why capture does not see it."""


def uncaptured(app_cgroup: int, workload_netns: int) -> list[Uncaptured]:
    """Those of the processes in a workload's app cgroup, which is named by its id; the namespace by its inode.

    A socket of the workload's namespace that is neither bound nor connected is not seen: the kernel lists none of
    these. Raises OSError when the cgroup is gone, and for want of root.
    """
    mount = os.open(cgroup.mount_point(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        directory = libc.open_cgroup(mount, app_cgroup)
    finally:
        os.close(mount)
    try:
        path = Path(f"/proc/self/fd/{directory}").readlink()
    finally:
        os.close(directory)
    own = {app_cgroup: path} | {found.stat().st_ino: found for found in path.rglob("*") if found.is_dir()}
    listings: dict[tuple[int, int, int], dict[int, Listed]] = {}
    return [
        found
        for below in own.values()
        for pid in map(int, (below / "cgroup.procs").read_text().split())
        for found in _of_process(pid, set(own), workload_netns, listings)
    ]


def _of_process(
    pid: int, own: set[int], workload_netns: int, listings: dict[tuple[int, int, int], dict[int, Listed]]
) -> Iterator[Uncaptured]:
    """`listings`: what the kernel listed so far, by namespace, family and type, and there by inode."""
    for inode, made in _sockets(pid):
        family, kind = made.family, made.type
        if family not in (socket.AF_INET, socket.AF_INET6) or kind not in _PROTOCOLS:
            continue
        with _namespace(made) as (netns, number):
            listing = listings.get((number, family, kind))
            if listing is None:
                with linux.inside(netns):
                    listing = listings[number, family, kind] = _listed(family, kind)
        known = listing.get(inode)
        if known is not None and known.cgroup_id not in own:
            origin = "was made in another cgroup"
        elif known is None and number != workload_netns:
            origin = "is of another network namespace"
        else:
            continue
        command = _command(pid)
        local, remote = (_text(known.local), _text(known.remote)) if known is not None else ("", "")
        yield Uncaptured(pid, command, _NAMES[socket.SocketKind(kind)], local, remote, origin)


def _sockets(pid: int) -> Iterator[tuple[int, socket.socket]]:
    """Each socket that a process holds, with its inode, as a descriptor of our own while the caller looks at it."""
    seen = set()
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for entry in _descriptors(pid):
            number = _libc.syscall(_PIDFD_GETFD, process, entry, 0)
            if number < 0:
                if ctypes.get_errno() in (errno.EBADF, errno.ESRCH):  # closed just now
                    continue
                raise OSError(ctypes.get_errno(), f"pidfd_getfd of process {pid}: {os.strerror(ctypes.get_errno())}")
            with socket.socket(fileno=number) as made:
                inode = os.fstat(number).st_ino
                if inode not in seen:
                    seen.add(inode)
                    yield inode, made
    finally:
        os.close(process)


def _descriptors(pid: int) -> list[int]:
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):
                if os.readlink(f"/proc/{pid}/fd/{entry}").startswith("socket:"):
                    found.append(int(entry))
    return found


@contextmanager
def _namespace(made: socket.socket) -> Iterator[tuple[int, int]]:
    """A descriptor of a socket's network namespace, and the namespace's inode."""
    fd = fcntl.ioctl(made.fileno(), _SIOCGSKNS)
    try:
        yield fd, os.fstat(fd).st_ino
    finally:
        os.close(fd)


def _listed(family: int, kind: int) -> dict[int, Listed]:
    try:
        return {one.inode: one for one in sock_diag.sockets(family, _PROTOCOLS[socket.SocketKind(kind)])}
    except OSError as error:
        if error.errno != errno.ENOENT:  # a kernel without udp_diag, say
            raise
        return {}


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _text(end: tuple[str, int]) -> str:
    address, port = end
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
