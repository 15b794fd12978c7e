"""The system calls that Python 3.11's `os` lacks, one function each. A failure is an OSError that names the call."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38

_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_PRIVATE = 0x40000

_ARG_START = 45
"""In /proc/PID/stat, of the fields behind the name; the next one is where the arguments end (proc(5))."""

_SFD_NONBLOCK = os.O_NONBLOCK
_SFD_CLOEXEC = os.O_CLOEXEC
_SOCKADDR_BYTES = 16
_SIGSET_BYTES = 128
_SIGINFO_BYTES = 128
_UCRED = struct.Struct("=iII")  # pid, uid, gid: struct ucred, unix(7)

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def setns(fd: int, kind: int = CLONE_NEWNET) -> None:
    """Move the calling thread into the namespace that `fd` holds."""
    _checked(_libc.setns(fd, kind), "setns")


def unshare(kind: int) -> None:
    _checked(_libc.unshare(kind), "unshare")


@contextmanager
def inside(netns_fd: int) -> Iterator[None]:
    """The calling thread in another network namespace for a while; sockets made inside stay there."""
    back = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(netns_fd)
        try:
            yield
        finally:
            setns(back)
    finally:
        os.close(back)


@contextmanager
def files_of(uid: int) -> Iterator[None]:
    """The calling thread opens files and makes sockets as somebody else for a while: setfsuid(2), which never fails."""
    before = _libc.setfsuid(uid)
    try:
        yield
    finally:
        _libc.setfsuid(before)


def disconnect(fd: int) -> None:
    """Make a TCP socket as new, whatever state it is in: connect(2) with AF_UNSPEC."""
    _checked(_libc.connect(fd, bytes(_SOCKADDR_BYTES), _SOCKADDR_BYTES), "connect(AF_UNSPEC)")


def _prctl(option: int, value: int, what: str) -> None:
    _checked(_libc.prctl(option, value, 0, 0, 0), f"prctl({what})")


def die_with_parent(parent: int) -> None:
    """SIGKILL for the caller when its parent dies; a parent that is dead already is noticed too.

    A change of uid clears it: call this after dropping privileges.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, "PR_SET_PDEATHSIG")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_writer(fd: int) -> None:
    """SIGKILL for the caller when the last writer of this pipe is gone; one that is gone already is noticed too.

    For a process whose parent is not the one to die with. The kernel sends it (fcntl(2), O_ASYNC and F_SETSIG) in the
    name of the user that calls: after a change of uid, call it again.
    """
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(fd, 0)  # a hang-up is told unasked
    if poll.poll(0):
        os.kill(os.getpid(), signal.SIGKILL)


def name_process(arguments: Sequence[str]) -> None:
    """What ps(1) shows of a process that was forked: these in place of its parent's arguments, cut to their length."""
    _checked(_libc.prctl(_PR_SET_NAME, " ".join(arguments[:2]).encode(), 0, 0, 0), "prctl(PR_SET_NAME)")
    fields = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_START + 1])
    shown = "\0".join(arguments).encode()[: max(end - start - 1, 0)]
    ctypes.memmove(start, shown.ljust(end - start, b"\0"), end - start)


def reaped() -> Iterator[tuple[int, int]]:
    """Every child that has ended, with its returncode (negative: the signal): each is told once."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, os.waitstatus_to_exitcode(status)


@contextmanager
def short_path(directory: Path, name: str) -> Iterator[str]:
    """A path of a Unix socket that fits into sun_path, 108 bytes, however long the directory's is. Raises OSError."""
    held = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{held}/{name}"
    finally:
        os.close(held)


def bind_file(sock: socket.socket, path: str, mode: int = 0o600) -> None:
    """Bind a Unix socket, whose file has this mode from the beginning on: a chmod would come too late. Raises OSError.

    The mask is the whole process's: what another thread makes meanwhile is narrowed, too.
    """
    before = os.umask(0o777 & ~mode)
    try:
        sock.bind(path)
    finally:
        os.umask(before)


def peer_uid(connection: socket.socket) -> int:
    """Who has connected to a Unix socket: SO_PEERCRED, unix(7)."""
    _, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)


def forbid_new_privileges() -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")


def adopt_orphans() -> None:
    """Descendants whose parent dies become children of the caller, who can then reap them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, "PR_SET_CHILD_SUBREAPER")


def forbid_dumps() -> None:
    """No core file and no ptrace by an equal uid. execve() resets it: whoever holds a key calls it itself."""
    _prctl(_PR_SET_DUMPABLE, 0, "PR_SET_DUMPABLE")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None) -> None:
    result = _libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        options.encode() if options else None,
    )
    _checked(result, f"mount {source} on {target}")


def private_mounts() -> None:
    """A mount namespace of the caller's own, whose mounts nobody else sees."""
    unshare(CLONE_NEWNS)
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE, None)


def bind_mount(source: str | Path, target: Path) -> None:
    _mount(str(source), str(target), None, _MS_BIND | _MS_REC, None)


def tmpfs_mount(target: Path, mode: int) -> None:
    _mount("tmpfs", str(target), "tmpfs", 0, f"mode={mode:o},size=1m")


def unmount(target: Path) -> None:
    """Detach now, free when the last user is gone (MNT_DETACH)."""
    _checked(_libc.umount2(str(target).encode(), 2), f"umount {target}")


@dataclass(frozen=True, slots=True)
class Signal:
    """One delivered signal. `code` > 0 means the kernel sent it (a terminal's Ctrl-C), not a process."""

    number: signal.Signals
    code: int


class SignalFd:
    """Blocked signals, read as events from a descriptor that can be polled.

    `previous` is the mask from before, which children must restore.
    """

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        chosen = set(signals)
        mask = ctypes.create_string_buffer(_SIGSET_BYTES)
        _libc.sigemptyset(mask)
        for number in chosen:
            _libc.sigaddset(mask, int(number))
        self.previous = signal.pthread_sigmask(signal.SIG_BLOCK, chosen)
        self._fd = _checked(_libc.signalfd(-1, mask, _SFD_NONBLOCK | _SFD_CLOEXEC), "signalfd")

    def fileno(self) -> int:
        return self._fd

    def read(self) -> list[Signal]:
        """All that are pending now; empty when none is. Layout: struct signalfd_siginfo, signalfd(2)."""
        try:
            raw = os.read(self._fd, _SIGINFO_BYTES * 16)
        except BlockingIOError:
            return []
        events = []
        for at in range(0, len(raw), _SIGINFO_BYTES):
            number, _errno, code = struct.unpack_from("=Iii", raw, at)
            events.append(Signal(signal.Signals(number), code))
        return events

    def close(self) -> None:
        """Unblock; what is pending is delivered in the ordinary way."""
        os.close(self._fd)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.previous)
