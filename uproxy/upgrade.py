"""`uproxy upgrade`: has a launcher replace its sidecar by one of the software that is installed now (docs/upgrades.md).

The launcher listens on a SOCK_SEQPACKET socket beside its state directory, for root alone. One msgpack map there,
`{"op": "upgrade"}`, and when it is over one back: `{"pid", "former"}`, or `{"error"}`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgpack

from uproxy import linux

DEFAULT_STATE_DIR: Final = Path("/var/lib/uproxy")
_MAX_MESSAGE: Final = 4096
_MAX_WAITING: Final = 4
_MAX_NAME: Final = 64
_ANSWER_S: Final = 120.0  # above `supervision.UPGRADE_TIMEOUT_S`

_DESCRIPTION = """\
Replace the sidecar of a workload that `uproxy exec` runs by one of the software that is installed now. The new one
takes over its listening sockets; connections that are open go on in the old one. Returns when the new one serves."""


def main(argv: Sequence[str]) -> int:
    """Ask, and wait. Exit status 0 when the new one serves, 1 when the old one goes on."""
    parser = argparse.ArgumentParser(prog="uproxy upgrade", description=_DESCRIPTION)
    parser.add_argument("name", metavar="NAME", help="the workload")
    parser.add_argument(
        "--state-dir", type=Path, default=DEFAULT_STATE_DIR, metavar="DIR", help="its launcher's; default: %(default)s"
    )
    options = parser.parse_args(argv)
    answer = _asked(options.state_dir, options.name)
    if "error" in answer:
        print(f"uproxy upgrade: {options.name}: {answer['error']}", file=sys.stderr)
        return 1
    draining = ", ".join(map(str, answer["former"]))
    print(f"{options.name}: the sidecar is pid {answer['pid']} now" + (f"; draining: {draining}" if draining else ""))
    return 0


def _asked(state_dir: Path, name: str) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(_ANSWER_S)
        try:
            with linux.short_path(state_dir, _file(name)) as path:
                sock.connect(path)
            sock.send(msgpack.packb({"op": "upgrade"}))
            answer = sock.recv(_MAX_MESSAGE)
        except TimeoutError:
            return {"error": f"its launcher did not answer within {_ANSWER_S:g} s"}
        except OSError as error:
            return {
                "error": f"{state_dir / _file(name)}: {error.strerror}; does `uproxy exec` run it, with this state?"
            }
    if not answer:
        return {"error": "its launcher has ended"}
    found: dict[str, Any] = msgpack.unpackb(answer)
    return found


def _file(name: str) -> str:
    """No workload's name begins with a dot, and some are longer than a Unix socket's may be."""
    short = name if len(name) <= _MAX_NAME else hashlib.sha256(name.encode()).hexdigest()
    return f".{short}.sock"


class Requests:
    """A launcher's end. Nothing here waits."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._waiting: list[socket.socket] = []

    def descriptors(self) -> list[int]:
        """To be watched for reading."""
        return [one.fileno() for one in (self._listener, *self._waiting)]

    def next(self) -> socket.socket | None:
        """Something can be read. Who asks for an upgrade, and waits for `answer`; None: nobody yet."""
        with suppress(BlockingIOError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._waiting.append(connection)
            if len(self._waiting) > _MAX_WAITING:
                self._waiting.pop(0).close()
        for connection in list(self._waiting):
            try:
                raw = connection.recv(_MAX_MESSAGE)
            except BlockingIOError:
                continue
            except OSError:
                raw = b""
            self._waiting.remove(connection)
            if linux.peer_uid(connection) != 0:
                answer(connection, {"error": "only root may ask"})
            elif raw != _REQUEST:
                answer(connection, {"error": "this launcher knows upgrades only"})
            else:
                return connection
        return None

    def close(self) -> None:
        for connection in (self._listener, *self._waiting):
            connection.close()


_REQUEST: Final = msgpack.packb({"op": "upgrade"})


def answer(connection: socket.socket, said: Mapping[str, object]) -> None:
    """To whoever still waits for it."""
    with connection, suppress(OSError):
        connection.send(msgpack.packb(said))


@contextmanager
def requests(state_dir: Path, name: str) -> Iterator[Requests]:
    """Listens for requests, for root only. The caller holds the name, so whoever listened here is gone.

    Raises OSError.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    heard = Requests(listener)
    try:
        with linux.short_path(state_dir, _file(name)) as path:
            with suppress(FileNotFoundError):
                os.unlink(path)
            linux.bind_file(listener, path)
        listener.listen(_MAX_WAITING)
        yield heard
    finally:
        heard.close()
        (state_dir / _file(name)).unlink(missing_ok=True)
