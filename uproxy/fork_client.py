"""The fork server as a launcher uses it: it starts a sidecar there, and learns of its end.

One SOCK_SEQPACKET connection for each sidecar, msgpack maps. There: what to run, and where, with descriptors; back: its
process id with a pidfd, or an error; and when it has ended, how.
"""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import msgpack

from uproxy.entrance import Account, Entrance, Exposure

DEFAULT_SOCKET: Final = Path("/run/uproxy/fork.sock")
PROTOCOL: Final = 1
"""Of launchers and fork servers, which are upgraded apart: a launcher lives as long as its workload."""
MAX_MESSAGE: Final = 65536  # bytes
MAX_PROBES: Final = 4
_TIMEOUT_S: Final = 10.0
_LAST_WORD_S: Final = 1.0
"""How long a fork server may take to tell how a sidecar ended, of which the kernel says that it has."""


class ForkServerError(OSError):
    """The fork server cannot be reached, or refused; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a fork server is to start. The descriptors are this process's."""

    arguments: tuple[str, ...]
    """Of `uproxy run`, but for the descriptors."""
    entrance: Entrance
    """Its `parent` means nothing here: the sidecar dies with the last writer of `lifeline`."""
    output: int
    lifeline: int
    """The end of a pipe that is read."""
    ready: int
    probes: tuple[int, ...]

    @property
    def descriptors(self) -> list[int]:
        return [self.entrance.netns_fd, self.output, self.lifeline, self.ready, *self.probes]

    def pack(self) -> bytes:
        enter, account = self.entrance, self.entrance.account
        packed: bytes = msgpack.packb(
            {
                "protocol": PROTOCOL,
                "arguments": list(self.arguments),
                "cgroup": str(enter.cgroup),
                "account": [account.uid, account.gid, list(account.groups)] if account is not None else None,
                "restricted": enter.restricted,
                "exposures": [[str(one.closed), list(map(str, one.needed))] for one in enter.exposures],
                "signals": [int(number) for number in enter.signal_mask],
            }
        )
        return packed

    @classmethod
    def unpack(cls, raw: bytes, descriptors: Sequence[int]) -> Order:
        """Raises ForkServerError for what `pack` of this protocol does not write."""
        try:
            found = msgpack.unpackb(raw)
            if found["protocol"] != PROTOCOL:
                raise ForkServerError(
                    f"the fork server speaks protocol {PROTOCOL}, and {found['protocol']} the launcher: restart that"
                )
            account = found["account"]
            netns, output, lifeline, ready, *probes = descriptors
            entrance = Entrance(
                Path(found["cgroup"]),
                netns,
                account=Account(account[0], account[1], tuple(account[2])) if account is not None else None,
                restricted=found["restricted"],
                exposures=tuple(
                    Exposure(Path(closed), tuple(map(Path, needed))) for closed, needed in found["exposures"]
                ),
                signal_mask=tuple(map(signal.Signals, found["signals"])),
            )
            return cls(tuple(found["arguments"]), entrance, output, lifeline, ready, tuple(probes))
        except (ValueError, TypeError, KeyError, IndexError, msgpack.UnpackException) as error:
            raise ForkServerError(f"the request is not one of a launcher: {error!r}") from None


class Forked:
    """A sidecar that a fork server has started: `uproxy.sidecar.Process`."""

    def __init__(self, connection: socket.socket, pid: int, pidfd: int, lifeline: int) -> None:
        self.pid = pid
        self.end_fd = pidfd
        self._connection = connection
        self._lifeline = lifeline

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.end_fd, signal.SIGTERM)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.end_fd, signal.SIGKILL)

    def status(self) -> int | None:
        """How it ended, once `end_fd` is readable; None when its fork server has ended before it and nobody knows."""
        try:
            if not select.select([self._connection], [], [], _LAST_WORD_S)[0]:
                return None
            told = msgpack.unpackb(self._connection.recv(MAX_MESSAGE))
            return int(told["ended"])
        except (OSError, ValueError, KeyError, TypeError, msgpack.UnpackException):
            return None

    def ended(self, status: int | None) -> None:
        del status  # it is nobody's child here
        self._connection.close()
        os.close(self.end_fd)
        os.close(self._lifeline)


@dataclass(frozen=True, slots=True)
class ForkedBy:
    """Starts sidecars at the fork server of this socket: `uproxy.sidecar.Spawn`."""

    path: Path
    arguments: tuple[str, ...]
    entrance: Entrance

    def __call__(self, ready: int, probes: Sequence[int], log: IO[bytes]) -> Forked:
        """Raises ForkServerError."""
        lifeline, held = os.pipe2(os.O_CLOEXEC)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(_TIMEOUT_S)
        order = Order(self.arguments, self.entrance, log.fileno(), lifeline, ready, tuple(probes))
        try:
            try:
                connection.connect(str(self.path))
                socket.send_fds(connection, [order.pack()], order.descriptors)
                raw, pidfds, _, _ = socket.recv_fds(connection, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
            except OSError as error:
                raise ForkServerError(
                    f"the fork server at {self.path}: {error.strerror or error}; start `uproxy fork-server`"
                ) from None
            answer = _answer(raw)
            if not pidfds:
                raise ForkServerError(f"the fork server at {self.path}: {answer.get('error', 'no answer')}")
            return Forked(connection, answer["pid"], pidfds[0], held)
        except BaseException:
            os.close(held)
            connection.close()
            raise
        finally:
            os.close(lifeline)


def _answer(raw: bytes) -> dict[str, Any]:
    try:
        found = msgpack.unpackb(raw)
    except (ValueError, msgpack.UnpackException):
        return {}
    return found if isinstance(found, dict) else {}
