"""Where a workload runs: its cgroups and its network namespace, checked before anything is attached to them."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bpf import libc
from uproxy import cgroup, linux

_NS_GET_NSTYPE: Final = 0xB703  # _IO(0xb7, 3), <linux/nsfs.h>
_SO_NETNS_COOKIE: Final = 71  # <asm-generic/socket.h>, Linux 5.14
_NET_NS_INIT_INO: Final = 0xEFFFFFF9  # the initial namespace, <linux/nsfs.h> since Linux 6.18; nobody's before
_ROOT_CGROUP_ID: Final = 1


class PlaceError(Exception):
    """Nothing may be attached there; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A cgroup2 directory, held by a descriptor of the caller's."""

    fd: int
    id: int
    """As the kernel numbers it (bpf_link_info, bpf_get_current_cgroup_id): the inode of the directory."""
    path: Path

    @classmethod
    def of(cls, fd: int, what: str) -> Cgroup:
        """Raises PlaceError: not a cgroup2 directory, or the root, which would capture the whole host."""
        if libc.filesystem_magic(fd) != libc.CGROUP2_SUPER_MAGIC:
            raise PlaceError(f"{what}: not a directory of the cgroup2 hierarchy at {cgroup.mount_point()}")
        found = cls(fd, os.fstat(fd).st_ino, Path(f"/proc/self/fd/{fd}").readlink())
        if found.id == _ROOT_CGROUP_ID:
            raise PlaceError(f"{what}: is the root cgroup: capture there would take the whole host; make one below it")
        if found.path.name.endswith(" (deleted)"):
            raise PlaceError(f"{what}: {found.path}: was removed")
        return found

    def is_populated(self) -> bool:
        """Whether a process is in it or below it."""
        return bool(_is_populated(self.fd))

    def is_related(self, other: Cgroup) -> bool:
        """Whether one of them contains the other."""
        return self.path.is_relative_to(other.path) or other.path.is_relative_to(self.path)


def check_siblings(app: Cgroup, proxy: Cgroup) -> None:
    """Raises PlaceError when one contains the other: the uProxy's own connections would be captured, in a circle."""
    if app.is_related(proxy):
        raise PlaceError(f"the app cgroup {app.path} and the proxy cgroup {proxy.path} must be beside each other")


def is_populated_id(cgroup_id: int) -> bool | None:
    """Whether a process is in a cgroup or below it; None when there is no such cgroup any more.

    Raises OSError when that cannot be found out (which must not be taken for gone: the gone are released).
    """
    with cgroup_by_id(cgroup_id) as fd:
        return None if fd is None else _is_populated(fd)


@contextmanager
def cgroup_by_id(cgroup_id: int) -> Iterator[int | None]:
    """A descriptor of a cgroup's directory; None when there is no such cgroup any more. Raises OSError."""
    if not cgroup_id:
        yield None
        return
    mount = os.open(cgroup.mount_point(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = libc.open_cgroup(mount, cgroup_id)
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        yield None
        return
    finally:
        os.close(mount)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_populated(directory: int) -> bool | None:
    try:
        fd = os.open("cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:  # removed while it was held
        return None
    try:
        return b"populated 1" in os.read(fd, 4096)
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class NetworkNamespace:
    """A network namespace, held by a descriptor of the caller's."""

    fd: int
    ino: int
    cookie: int
    """As the programs name it (SO_NETNS_COOKIE): unique until the next boot, while inodes are used again."""

    @classmethod
    def of(cls, fd: int) -> NetworkNamespace:
        """Raises PlaceError: no network namespace, or the host's own."""
        try:
            kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
        except OSError:
            kind = 0
        if kind != linux.CLONE_NEWNET:
            raise PlaceError("the third descriptor is no network namespace (open /run/netns/NAME or /proc/PID/ns/net)")
        ino = os.fstat(fd).st_ino
        if ino in _host_namespaces():
            raise PlaceError(
                "that is the host's network namespace: closing it would cut off the host. Give the workload a "
                "namespace of its own, as `uproxy exec` does"
            )
        with linux.inside(fd), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inside:
            cookie = int.from_bytes(inside.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)
        return cls(fd, ino, cookie)


def _host_namespaces() -> set[int]:
    """Inodes of the network namespaces that are no workload's: the initial one, init's and the agent's own."""
    found = {_NET_NS_INIT_INO, os.stat("/proc/self/ns/net").st_ino}
    with suppress(PermissionError):  # an init with more capabilities than ours, as in some containers, is not shown
        found.add(os.stat("/proc/1/ns/net").st_ino)
    return found
