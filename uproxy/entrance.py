"""How processes and sockets get into a sandbox."""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from uproxy import linux
from uproxy.cgroup import SandboxError


@dataclass(frozen=True, slots=True)
class Account:
    """Whom a process runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Entrance:
    """Puts the process that calls it into a sandbox: for `Popen(preexec_fn=…)`, between fork and exec.

    The order matters: joining needs root, so the account comes last but for what its change would reset.
    """

    cgroup: Path
    netns_fd: int
    account: Account | None = None
    restricted: bool = False
    """No core dumps, and as `unprivileged`: for the proxy, which holds a key."""
    unprivileged: bool = False
    """No new privileges: neither sudo nor any other set-uid program gives it more than its account has."""
    exposures: tuple[Exposure, ...] = ()
    parent: int = 0
    """When not 0: die with this process."""
    signal_mask: Collection[signal.Signals | int] = ()
    """The mask to run with."""

    def __call__(self) -> None:
        try:
            self._enter()
        except OSError as error:
            # All that the parent will see of it is that something failed.
            os.write(2, f"cannot enter the sandbox: {error}\n".encode())
            raise

    def _enter(self) -> None:
        (self.cgroup / "cgroup.procs").write_text("0")
        linux.setns(self.netns_fd)
        if self.exposures:
            linux.private_mounts()
            for exposure in self.exposures:
                exposure.mount()
        if self.restricted:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self.restricted or self.unprivileged:
            linux.forbid_new_privileges()
        if self.account is not None:
            os.setgroups(self.account.groups)
            os.setgid(self.account.gid)
            os.setuid(self.account.uid)
        if self.parent:
            linux.die_with_parent(self.parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.signal_mask)


def sockets_inside(
    cgroup: Path, netns_fd: int, families: Sequence[int], kind: int = socket.SOCK_STREAM
) -> list[socket.socket]:
    """One new socket per family, made in the cgroup and the namespace by a child that hands them over.

    Hooks follow the cgroup and namespace that a socket was made in, whoever uses it.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        child = os.fork()
        if child == 0:
            _hand_over_sockets(theirs, Entrance(cgroup, netns_fd), families, kind)
        theirs.close()
        text, fds, _, _ = socket.recv_fds(ours, 4096, len(families))
        os.waitpid(child, 0)
    made = [socket.socket(fileno=fd) for fd in fds]
    if len(made) != len(families):
        for one in made:
            one.close()
        raise SandboxError(f"no socket could be made in {cgroup}: {text.decode() or 'the child died'}")
    return made


def _hand_over_sockets(channel: socket.socket, enter: Entrance, families: Sequence[int], kind: int) -> None:
    """In the child: never returns, so that nothing of the parent runs twice."""
    try:
        enter()
        made = [socket.socket(family, kind) for family in families]
        socket.send_fds(channel, [b"ok"], [one.fileno() for one in made])
    except BaseException as error:
        channel.send(str(error).encode()[:4096] or b"?")
    finally:
        os._exit(0)


@dataclass(frozen=True, slots=True)
class Exposure:
    """A directory that only its owner may enter, and the directories below it that the proxy must reach.

    A virtual environment in root's home is an example. The proxy gets a view in which an empty directory
    covers `closed` and only `needed` are mounted through; for everybody else nothing changes.
    """

    closed: Path
    needed: tuple[Path, ...]

    def mount(self) -> None:
        """Needs a mount namespace of the caller's own."""
        held = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in self.needed]
        linux.tmpfs_mount(self.closed, 0o755)
        for path, fd in held:
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
            linux.bind_mount(f"/proc/self/fd/{fd}", path)
            os.close(fd)


def exposures(directories: Iterable[Path]) -> tuple[Exposure, ...]:
    """What must be exposed so that an account that owns nothing reaches these directories; often nothing.

    Raises SandboxError for a directory that is closed itself, or below one that is exposed already.
    """
    by_closed: dict[Path, list[Path]] = {}
    exposed: Path | None = None
    for directory in sorted({directory.resolve() for directory in directories}):
        # In sorted order, what lies below an exposed directory comes right after it.
        reached = exposed if exposed is not None and directory.is_relative_to(exposed) else None
        closed = _topmost_closed(directory, reached)
        if closed is None:
            continue
        if reached is not None or not _open_to_all(directory):
            at = directory if not _open_to_all(directory) else closed
            raise SandboxError(f"{at} is closed to the proxy's uid: chmod o+rx {at}, or use another directory")
        by_closed.setdefault(closed, []).append(directory)
        exposed = directory
    return tuple(Exposure(closed, tuple(needed)) for closed, needed in by_closed.items())


def _topmost_closed(directory: Path, below: Path | None) -> Path | None:
    """The first directory on the way down that others may not enter, starting below `below`."""
    for step in reversed((directory, *directory.parents)):
        if (below is None or (step != below and step.is_relative_to(below))) and not _open_to_all(step):
            return step
    return None


def _open_to_all(directory: Path) -> bool:
    return bool(directory.stat().st_mode & 0o001)
