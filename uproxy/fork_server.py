"""`uproxy fork-server`: starts the uProxies of a host's launchers from one process that has imported what they need.

They share the interpreter's memory, and nothing else: each is a process of its own, with its own key, user, namespace
and cgroup, and goes on when the fork server ends. One thread, which forks: nothing here may start another.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import select
import signal
import socket
import ssl
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Final, NoReturn

import msgpack

from uproxy import linux, process
from uproxy.fork_client import DEFAULT_SOCKET, MAX_MESSAGE, MAX_PROBES, ForkServerError, Order
from uproxy.node.server import ListenError, listen

_PRELOADED: Final = (
    *("uproxy.run", "uproxy.demand", "uproxy.member", "uproxy.direct", "uproxy.dns", "uproxy.otlp"),
    "concurrent.futures.thread",
)
_FAILED: Final = 125
_MAX_DESCRIPTORS: Final = 4 + MAX_PROBES
_ENDING: Final = frozenset({signal.SIGTERM, signal.SIGINT})

_DESCRIPTION = """\
Start the uProxies of this host's launchers (`uproxy exec --fork-server`) by forking one process, so that they share the
interpreter's memory. They go on when it ends; a launcher whose uProxy dies meanwhile tries until it is back."""

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Run until SIGTERM. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="uproxy fork-server", description=_DESCRIPTION)
    parser.add_argument("--socket", type=Path, default=DEFAULT_SOCKET, metavar="PATH", help="default: %(default)s")
    options = parser.parse_args(argv)
    process.log_to_stderr()
    if os.geteuid() != 0:
        print("uproxy fork-server: needs root, to start each uProxy as a user of its own", file=sys.stderr)
        return 1
    try:
        listener = listen(options.socket, who="fork server", option="--socket")
    except ListenError as error:
        print(f"uproxy fork-server: {error}", file=sys.stderr)
        return 1
    with listener:
        _preload()
        log.info("ready at %s", options.socket)
        ForkServer(listener).serve()
    return 0


def _preload() -> None:
    """What every uProxy needs, so that the pages that hold it are there once."""
    for name in _PRELOADED:
        import_module(name)
    for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER):
        ssl.SSLContext(protocol)  # OpenSSL fetches its algorithms for the first one
    gc.collect()
    gc.freeze()


class ForkServer:
    """The loop: launchers that come and go, and sidecars that end."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._signals = linux.SignalFd(_ENDING | {signal.SIGCHLD})
        self._poll = select.poll()
        self._connections: dict[int, socket.socket] = {}
        """By descriptor: of a launcher that has not asked yet, or whose sidecar runs."""
        self._sidecars: dict[int, socket.socket] = {}
        """By process id: the connection on which its end is told."""

    def serve(self) -> None:
        """Until a signal ends it. The sidecars go on."""
        self._poll.register(self._listener, select.POLLIN)
        self._poll.register(self._signals, select.POLLIN)
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._listener.fileno():
                    self._accept()
                elif fd == self._signals.fileno():
                    if any(event.number in _ENDING for event in self._signals.read()):
                        return
                    self._reap()
                elif fd in self._connections:
                    self._hear(self._connections[fd])

    def _accept(self) -> None:
        with suppress(BlockingIOError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._connections[connection.fileno()] = connection
            self._poll.register(connection, select.POLLIN)

    def _hear(self, connection: socket.socket) -> None:
        """A launcher asks, or has gone: its sidecar ends with it by itself."""
        descriptors: list[int] = []
        try:
            raw, descriptors, flags, _ = socket.recv_fds(
                connection, MAX_MESSAGE, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
            if not raw or connection in self._sidecars.values():
                self._forget(connection)
                return
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ForkServerError(f"a request has at most {MAX_MESSAGE} bytes and {_MAX_DESCRIPTORS} descriptors")
            if linux.peer_uid(connection) != 0:
                raise ForkServerError("only root may ask the fork server")
            self._fork(connection, Order.unpack(raw, descriptors))
        except OSError as error:
            log.warning("a request failed: %s", error)
            with suppress(OSError):
                connection.send(msgpack.packb({"error": str(error)}))
            self._forget(connection)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _fork(self, connection: socket.socket, order: Order) -> None:
        # Nobody reaps it before its pidfd is open: SIGCHLD waits in the descriptor.
        pid = os.fork()
        if pid == 0:
            _become(order)
        self._sidecars[pid] = connection
        pidfd = os.pidfd_open(pid)
        try:
            socket.send_fds(connection, [msgpack.packb({"pid": pid})], [pidfd])
        finally:
            os.close(pidfd)

    def _reap(self) -> None:
        for pid, status in linux.reaped():
            connection = self._sidecars.pop(pid, None)
            if connection is not None and connection.fileno() >= 0:
                with suppress(OSError):
                    connection.send(msgpack.packb({"ended": status}))
                self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        self._poll.unregister(connection)
        del self._connections[connection.fileno()]
        connection.close()


def _become(order: Order) -> NoReturn:
    """In the child: `uproxy run`, as if it had been started by itself. Never returns."""
    status = _FAILED
    try:
        os.setsid()
        _keep_only(order)
        # Nothing of the fork server's environment steers a process that holds a key.
        os.environ.clear()
        os.environ.update({"PATH": os.defpath, "LANG": "C.UTF-8"})
        os.chdir("/")
        linux.name_process(["uproxy", "run", *order.arguments])
        order.entrance()
        linux.die_with_writer(order.lifeline)
        arguments = [*order.arguments, "--ready-fd", str(order.ready)]
        for probe in order.probes:
            arguments += ["--probe-fd", str(probe)]
        status = import_module("uproxy.run").main(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else _FAILED
    except BaseException:
        with suppress(Exception):
            log.exception("the uProxy could not run")
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(status)


def _keep_only(order: Order) -> None:
    """The order's descriptors, with its output in the place of ours; everything else is the fork server's."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number in (1, 2):
        os.dup2(order.output, number)
    below = 3
    for kept in sorted({order.entrance.netns_fd, order.lifeline, order.ready, *order.probes}):
        os.closerange(below, kept)
        below = kept + 1
    os.closerange(below, os.sysconf("SC_OPEN_MAX"))
