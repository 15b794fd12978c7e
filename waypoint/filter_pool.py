"""The processes in which one filter runs: started ahead, asked one thing at a time, killed when they do not answer.

A call that its process does not answer in time, or with more than it may, costs the process, and nobody but that call:
the others wait for a process that is free. So what a filter does wrong stays with the request for which it does it.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any, Final

import msgpack

from control.api.extension import PythonFilter
from uproxy.plane import READ, Plane, Timer, Waiter

CHILDREN: Final = 2
"""Of one filter: while one is started anew, the other one goes on."""
MAX_WAITING: Final = 256
"""Calls of one filter that wait for a process."""
WAIT_S: Final = 2.0
"""For a process to be free."""
START_S: Final = 10.0
"""For a process to load the filter."""
MAX_ANSWER: Final = 256 << 10
"""Bytes of an answer, which holds all headers or a body."""
FIRST_RESTART_S: Final = 0.1
LAST_RESTART_S: Final = 30.0
"""Between two starts of a process that does not live to be called."""

_LENGTH: Final = struct.Struct("!I")
_ROOM: Final = 208 << 10  # of the socket, which Linux doubles: a call with two heads of 64 KiB, as UTF-8, fits

log = logging.getLogger(__name__)


class FilterError(Exception):
    """A filter gave no answer that can be used."""


class _Child:
    """One process, and the call that it works on."""

    def __init__(self, pool: FilterPool, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self._pool = pool
        self._process = process
        self._sock = sock
        self._received = bytearray()
        self._timer: Timer | None = None
        self.call: Waiter[list[Any]] | None = None
        self.ready = False
        self.called = False

    @property
    def alive(self) -> bool:
        return self._sock.fileno() >= 0

    def tell(self, message: object, timeout_s: float) -> None:
        """Send something to which there is an answer."""
        body: bytes = msgpack.packb(message)
        plane = self._pool.plane
        self._timer = plane.call_later(timeout_s, lambda: self.end(f"no answer within {timeout_s:g} s"))
        try:
            sent = self._sock.send(_LENGTH.pack(len(body)) + body)
        except OSError as error:
            plane.postpone(lambda error=error: self.end(str(error)))  # type: ignore[misc]
            return
        if sent < _LENGTH.size + len(body):
            plane.postpone(lambda: self.end("the call is larger than a socket takes"))

    def on_readable(self, _: int) -> None:
        try:
            data = self._sock.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            self.end(str(error))
            return
        self._received += data
        if not data:
            self.end("its process ended")
        elif len(self._received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received)
            if length > MAX_ANSWER or len(self._received) > _LENGTH.size + length:
                self.end(f"an answer of more than {MAX_ANSWER} bytes")
            elif len(self._received) == _LENGTH.size + length:
                self._take(bytes(self._received[_LENGTH.size :]))

    def _take(self, body: bytes) -> None:
        self._received.clear()
        if self._timer is not None:
            self._timer.cancel()
        try:
            answer = msgpack.unpackb(body)
        except ValueError:
            answer = None
        if not (isinstance(answer, list) and answer):
            self.end("an answer that means nothing")
            return
        call, self.call = self.call, None
        if call is not None:
            call.set(answer)
            self._pool.on_free(self)
        elif answer[0] == "ready" and not self.ready:
            self.ready = True
            self._pool.on_ready(self, bool(answer[1]), bool(answer[2]))
        else:
            self.end(str(answer[1]) if answer[0] == "failed" else "an answer that nobody asked for")

    def end(self, why: str) -> None:
        """Kill it. Again: nothing."""
        if not self.alive:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._pool.plane.unwatch(self._sock.fileno())
        self._sock.close()
        self._process.kill()
        self._process.wait()
        call, self.call = self.call, None
        self._pool.on_end(self, why)
        if call is not None:
            call.fail(FilterError(why))


class FilterPool:
    """Calls one filter."""

    def __init__(self, data_plane: Plane, what: PythonFilter, closed: Path | None) -> None:
        """`closed`: a directory that its processes must not open, if there is one."""
        self.plane = data_plane
        self._closed = closed
        self.what = what
        self.on_request = True
        self.on_response = True
        """Whether it has anything to say of these; known once a process is ready."""
        self.deaths = 0
        self._children: set[_Child] = set()
        self._free: list[_Child] = []
        self._waiting: deque[Waiter[_Child]] = deque()
        self._delay_s = FIRST_RESTART_S
        self._starts: set[Timer] = set()
        self._why = ""
        """Why no process runs."""
        self._retired = False
        for _ in range(CHILDREN):
            self._start()

    async def call(self, message: list[object]) -> list[Any]:
        """What the filter answers. Raises FilterError."""
        child = self._free.pop() if self._free else await self._a_child()
        while not child.alive:  # it has ended since it was given to this call
            child = await self._a_child()
        waiter: Waiter[list[Any]] = Waiter(self.plane)
        child.call, child.called = waiter, True
        child.tell(message, self.what.timeout_ms / 1000)
        answer = await waiter
        if answer[0] == "failed":
            raise FilterError(str(answer[1]))
        return answer

    async def _a_child(self) -> _Child:
        """Raises FilterError."""
        if self._why:
            raise FilterError(self._why)
        if len(self._waiting) >= MAX_WAITING:
            raise FilterError(f"{MAX_WAITING} calls wait already")
        waiter: Waiter[_Child] = Waiter(self.plane)
        self._waiting.append(waiter)
        try:
            return await self.plane.wait(waiter, WAIT_S)
        except TimeoutError:
            raise FilterError(f"no process was free within {WAIT_S:g} s") from None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = _process(theirs.fileno(), self.what.entry_point, self._closed)
            except OSError as error:
                ours.close()
                self._failed(f"no process starts: {error}")
                return
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
        child = _Child(self, process, ours)
        self._children.add(child)
        self.plane.watch(ours.fileno(), READ, child.on_readable)
        child.tell(self.what.config, START_S)

    def on_ready(self, child: _Child, on_request: bool, on_response: bool) -> None:
        """A process has loaded the filter."""
        self.on_request, self.on_response = on_request, on_response
        self._why = ""
        self.on_free(child)

    def on_free(self, child: _Child) -> None:
        """A process waits for a call."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.settled:
                waiter.set(child)
                return
        if self._retired:
            child.end("the filter is not used any more")
        else:
            self._free.append(child)

    def on_end(self, child: _Child, why: str) -> None:
        """A process has ended, or was killed."""
        self._children.discard(child)
        if child in self._free:
            self._free.remove(child)
        if self._retired:
            return
        self.deaths += 1
        log.error("Extension %s: %s", self.what.extension, why)
        if child.called:
            # By a call, mostly: others must not wait for what that has done.
            self._delay_s = FIRST_RESTART_S
            self._start()
        else:
            self._failed(why)

    def _failed(self, why: str) -> None:
        """It does not even live to be called: nobody waits for that, unless another one runs; it is tried again, later
        and later.
        """
        if not any(child.ready for child in self._children):
            self._why = why
            while self._waiting:
                self._waiting.popleft().fail(FilterError(why))
        timer = self.plane.call_later(self._delay_s, lambda: self._start_again(timer))
        self._starts.add(timer)
        self._delay_s = min(2 * self._delay_s, LAST_RESTART_S)

    def _start_again(self, timer: Timer) -> None:
        self._starts.discard(timer)
        self._start()

    def retire(self) -> None:
        """End each process as soon as it is free."""
        self._retired = True
        for timer in self._starts:
            timer.cancel()
        for child in list(self._free):
            child.end("the filter is not used any more")

    def close(self) -> None:
        """End all processes; calls that are under way fail."""
        self.retire()
        for child in list(self._children):
            child.end("the filter is not used any more")


def _process(fd: int, entry_point: str, closed: Path | None) -> subprocess.Popen[bytes]:
    """At the other end of a socket pair. Raises OSError."""
    # -P: a module in the working directory must not stand in for one of ours.
    command = [sys.executable, "-P", "-m", "waypoint.filter_child", str(fd), str(os.getpid()), entry_point]
    if closed is not None:
        command.append(str(closed))
    return subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.DEVNULL)
