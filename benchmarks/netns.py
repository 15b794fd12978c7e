"""Private network namespaces that have no name: one is gone when its descriptor and its processes are.

Nothing has to be cleaned up after a crash, and two runs side by side cannot meet. Needs CAP_SYS_ADMIN and
iproute2.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from benchmarks.lab import congestion

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)

_SYSCTLS = {
    # Thousands of short connections a second from one address: reuse the ports that are in TIME_WAIT.
    "net/ipv4/tcp_tw_reuse": "1",
    "net/ipv4/ip_local_port_range": "20000 65000",
}


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)} (a private network namespace needs root)")


def _family(address: tuple[str, int]) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


class Namespace:
    """A network namespace, held open by `fd`."""

    def __init__(self) -> None:
        self.fd = -1
        failure: list[OSError] = []

        def make() -> None:
            # unshare() moves the calling thread only, so a thread of its own takes the step and ends.
            try:
                _check(_LIBC.unshare(_CLONE_NEWNET), "unshare(CLONE_NEWNET)")
                self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                for name, value in _SYSCTLS.items():
                    Path("/proc/sys", name).write_text(value)
            except OSError as error:
                failure.append(error)

        thread = threading.Thread(target=make, name="netns")
        thread.start()
        thread.join()
        if failure:
            self.close()
            raise failure[0]
        self.ip("link", "set", "lo", "up")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put the calling thread into this namespace; a socket made inside stays there for life."""
        back = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check(_LIBC.setns(self.fd, _CLONE_NEWNET), "setns")
            yield
        finally:
            _check(_LIBC.setns(back, _CLONE_NEWNET), "setns back")
            os.close(back)

    def connect(self, address: tuple[str, int], timeout_s: float = 10.0) -> socket.socket:
        with self.entered():
            made = socket.socket(_family(address))
        try:
            made.settimeout(timeout_s)
            made.connect(address)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            made.close()
            raise
        return made

    def listen(self, address: tuple[str, int], timeout_s: float = 10.0) -> socket.socket:
        with self.entered():
            made = socket.socket(_family(address))
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(1024)
            made.settimeout(timeout_s)
        except BaseException:
            made.close()
            raise
        return made

    def ip(self, *arguments: str) -> None:
        subprocess.run(self._argv(["ip", *arguments]), pass_fds=[self.fd], check=True, timeout=10)

    def start(
        self,
        argv: Sequence[str],
        *,
        core: int | None = None,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process in here, pinned to `core`; the kernel kills it when the calling thread ends."""
        pinned = [] if core is None else ["taskset", "-c", str(core)]
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *self._argv([*pinned, *argv])],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            pass_fds=[self.fd, *pass_fds],
            cwd=cwd,
        )

    def _argv(self, argv: Sequence[str]) -> list[str]:
        return ["nsenter", f"--net=/proc/self/fd/{self.fd}", *argv]


def stop(process: subprocess.Popen[bytes], grace_s: float = 5.0) -> int:
    """End a process we started: SIGTERM, then SIGKILL. The exit status."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(grace_s)
    return process.returncode


@contextmanager
def joined(left: str, right: str) -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces on one wire (a veth pair), with the addresses `left` and `right` ("10.0.0.1/24")."""
    first = Namespace()
    try:
        second = Namespace()
        try:
            peer = f"/proc/self/fd/{second.fd}"
            subprocess.run(
                [
                    *first._argv(["ip", "link", "add", "wire", "type", "veth"]),
                    *["peer", "name", "wire", "netns", peer],
                ],
                pass_fds=[first.fd, second.fd],
                check=True,
                timeout=10,
            )
            for namespace, address in ((first, left), (second, right)):
                nodad = ["nodad"] if ":" in address else []
                namespace.ip("address", "add", address, "dev", "wire", *nodad)
                namespace.ip("link", "set", "wire", "up")
            for namespace in (first, second):
                with namespace.entered():
                    congestion.use_cubic()
            yield first, second
        finally:
            second.close()
    finally:
        first.close()
