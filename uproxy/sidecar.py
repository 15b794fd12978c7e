"""The uProxy process beside one workload, as its launcher sees it: started, watched, restarted, upgraded, ended.

No loop of its own: the launcher reaps children and polls; it tells the sidecar what happened and when.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from uproxy import linux
from uproxy.entrance import Account, Entrance

_READY_PORT = 15021
_STATUS_TIMEOUT_S = 2.0

_BACKOFF_FIRST_S, _BACKOFF_LAST_S = 0.2, 5.0
# A sidecar that was up for this long was healthy: its next restart is prompt again.
_HEALTHY_S = 10.0

IDENTITY_FILES = ("key.pem", "bundle.pem", "chain.pem")
REVOCATIONS_FILE = "crl.pem"


class Identity(Protocol):
    """What a sidecar proves itself with, where its uid can read it."""

    def install(self) -> None:
        """Put it there; called before every start. Raises OSError."""

    def refresh(self) -> bool:
        """Look for a new one while it runs; whether there was one. Raises OSError."""


class IdentityCopy:
    """A sidecar's own copy of its key and certificates, which its uid may read, and nobody else."""

    def __init__(self, source: Path, directory: Path, account: Account) -> None:
        self._source = source
        self._directory = directory
        self._account = account
        self._copied: tuple[tuple[int, int, int], ...] = ()

    def install(self) -> None:
        """Copy what is there now, chain.pem last: it belongs to the key and the roots copied before it."""
        self._copied = self._version()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chown(self._directory, self._account.uid, self._account.gid)
        try:
            self._copy(REVOCATIONS_FILE)
        except FileNotFoundError:
            (self._directory / REVOCATIONS_FILE).unlink(missing_ok=True)
        for name in IDENTITY_FILES:
            self._copy(name)

    def _copy(self, name: str) -> None:
        content = (self._source / name).read_bytes()
        fresh = self._directory / f".{name}.new"
        fresh.unlink(missing_ok=True)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            os.fchown(fd, self._account.uid, self._account.gid)
            file.write(content)
        fresh.rename(self._directory / name)

    def refresh(self) -> bool:
        """Copy again when the certificate, the trust bundle or the revocation list is another; whether one is."""
        if self._version() == self._copied:
            return False
        self.install()
        return True

    def _version(self) -> tuple[tuple[int, int, int], ...]:
        states = [(self._source / name).stat() for name in IDENTITY_FILES]
        with suppress(FileNotFoundError):
            states.append((self._source / REVOCATIONS_FILE).stat())
        return tuple((state.st_mtime_ns, state.st_ino, state.st_size) for state in states)


class JoinedIdentity:
    """A member's own directory: the sidecar renews its certificate there itself, and keeps its last configuration."""

    def __init__(self, directory: Path, account: Account) -> None:
        self._directory = directory
        self._account = account

    def install(self) -> None:
        """Give the directory to the account: each launch may have another."""
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchmod(directory, 0o700)
            os.fchown(directory, self._account.uid, self._account.gid)
            for name in os.listdir(directory):
                self._give(name, directory)
        finally:
            os.close(directory)

    def refresh(self) -> bool:
        return False

    def _give(self, name: str, directory: int) -> None:
        # The account before could write here, and we are root: follow no link, and give away no file that has
        # another name elsewhere.
        if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            return
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        try:
            status = os.fstat(file)
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                os.fchown(file, self._account.uid, self._account.gid)
        finally:
            os.close(file)


class Process(Protocol):
    """A `uproxy run` that was started."""

    @property
    def pid(self) -> int: ...

    @property
    def end_fd(self) -> int:
        """Readable when it has ended; -1 for a child, of which SIGCHLD tells."""

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def status(self) -> int | None:
        """How it ended (negative: the signal), once `end_fd` is readable; None when nobody knows."""

    def ended(self, status: int | None) -> None:
        """It was seen to end: let go of what is held for it."""


class Spawn(Protocol):
    """Starts a `uproxy run`, with these descriptors of ours and this output."""

    def __call__(self, ready: int, probes: Sequence[int], log: IO[bytes]) -> Process:
        """Raises OSError or subprocess.SubprocessError."""


class Child:
    """A child of the launcher."""

    end_fd = -1

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def status(self) -> int | None:
        return None

    def ended(self, status: int | None) -> None:
        self._process.returncode = status


@dataclass(frozen=True, slots=True)
class OwnProcess:
    """Starts an interpreter for each sidecar. `arguments`: the argv but for the descriptors."""

    arguments: tuple[str, ...]
    entrance: Entrance

    def __call__(self, ready: int, probes: Sequence[int], log: IO[bytes]) -> Child:
        arguments = [*self.arguments, "--ready-fd", str(ready)]
        for probe in probes:
            arguments += ["--probe-fd", str(probe)]
        return Child(
            subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[ready, *probes],
                cwd="/",
                # Nothing of the caller's environment steers a process that holds a key.
                env={"PATH": os.defpath, "LANG": "C.UTF-8"},
                # A session of its own: a terminal's Ctrl-C is for the command, and ends the sidecar last.
                start_new_session=True,
                preexec_fn=self.entrance,
            )
        )


@dataclass(slots=True)
class Upgrade:
    """A `uproxy run` that is to take over from the one that runs."""

    process: Process
    ready_fd: int
    """Readable when it says that it has, or is gone; -1 once it has been read."""
    deadline: float
    why: str = "its messages say why"
    """Why it did not."""


class Sidecar:
    """One `uproxy run` at a time, and beside it those that it took over from. Times are `time.monotonic()`."""

    def __init__(
        self,
        spawn: Spawn,
        netns_fd: int,
        probes: Sequence[socket.socket],
        log: IO[bytes],
        identity: Identity,
    ) -> None:
        """`netns_fd`: where its ports are."""
        self._spawn = spawn
        self._netns_fd = netns_fd
        self._probes = probes
        self._log = log
        self.identity = identity
        self._process: Process | None = None
        self.upgrade: Upgrade | None = None
        """While there is one."""
        self.former: list[Process] = []
        """They carry connections to their end."""
        self._started_at = 0.0
        self._backoff_s = _BACKOFF_FIRST_S
        self.ready = False
        self.ready_fd = -1
        """Readable when the sidecar says that it is ready, or is gone; -1 when nothing is awaited."""
        self.restart_at: float | None = None
        self.restarts = 0

    @property
    def pid(self) -> int:
        """0 when it does not run."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        self.identity.install()
        self.restart_at = None
        self._process, self.ready_fd = self._spawned()
        self._started_at = time.monotonic()

    def begin_upgrade(self, timeout_s: float) -> None:
        """Start another one, which takes over from this one when it is ready. Raises OSError or
        subprocess.SubprocessError.
        """
        self.upgrade = Upgrade(*self._spawned(), time.monotonic() + timeout_s)

    def _spawned(self) -> tuple[Process, int]:
        ready_fd, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            for probe in self._probes:
                # The one before may have left it connected.
                linux.disconnect(probe.fileno())
            return self._spawn(theirs, [probe.fileno() for probe in self._probes], self._log), ready_fd
        except BaseException:
            os.close(ready_fd)
            raise
        finally:
            os.close(theirs)

    def read_upgrade(self) -> bool:
        """Its `ready_fd` is readable. Whether it has taken over."""
        assert self.upgrade is not None
        taken_over = os.read(self.upgrade.ready_fd, 64) != b""
        os.close(self.upgrade.ready_fd)
        self.upgrade.ready_fd = -1
        if taken_over:
            if self._process is not None:
                self.former.append(self._process)
            self._close_ready_fd()
            self._process, self.upgrade, self.ready = self.upgrade.process, None, True
            self.restart_at, self._started_at = None, time.monotonic()
        return taken_over

    def upgrade_ended(self, status: int | None) -> None:
        """Before it has taken over."""
        assert self.upgrade is not None
        self.upgrade.process.ended(status)
        if self.upgrade.ready_fd >= 0:
            os.close(self.upgrade.ready_fd)
        self.upgrade = None

    def processes(self) -> list[Process]:
        """All that run."""
        upgrade = [self.upgrade.process] if self.upgrade is not None else []
        return [*([self._process] if self._process is not None else []), *upgrade, *self.former]

    def read_ready(self) -> None:
        """`ready_fd` is readable: a line means ready, an end of file means that the process is on its way out."""
        self.ready = os.read(self.ready_fd, 64) != b""
        self._close_ready_fd()

    def ended(self, status: int | None, now: float) -> None:
        """The process has ended, with this returncode (negative: the signal). Schedules the restart."""
        assert self._process is not None
        self._process.ended(status)
        self._process = None
        self.ready = False
        self._close_ready_fd()
        if now - self._started_at >= _HEALTHY_S:
            self._backoff_s = _BACKOFF_FIRST_S
        self.restarts += 1
        self.postpone(now)

    def postpone(self, now: float) -> None:
        """Schedule the next start, later each time."""
        self.restart_at = now + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, _BACKOFF_LAST_S)

    def terminate(self) -> None:
        """Ask all that run to drain and exit."""
        for process in self.processes():
            process.terminate()

    def pending(self) -> str:
        """What its readiness endpoint says is missing; "" when it does not answer."""
        # Imported here: it takes megabytes, and a launcher lives as long as its workload.
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", _READY_PORT, timeout=_STATUS_TIMEOUT_S)
        try:
            with linux.inside(self._netns_fd):
                connection.connect()
            connection.request("GET", "/healthz/ready")
            answer = connection.getresponse().read(4096).decode("utf-8", "replace")
            return " ".join(answer.split())
        except (OSError, http.client.HTTPException):
            return ""
        finally:
            connection.close()

    def _close_ready_fd(self) -> None:
        if self.ready_fd >= 0:
            os.close(self.ready_fd)
            self.ready_fd = -1
