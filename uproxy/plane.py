"""The data plane's turn: one epoll set of its own, nested in the asyncio loop that runs control work.

A *turn* is: poll the set once, run each ready descriptor's callback, step the coroutines that those woke, then
flush every tunnel that has frames to send, so that all frames of one turn leave in one TLS write (the largest single
gain under concurrency, docs/decisions.md). Coroutines here wait on `Waiter`s, not on asyncio futures: stepping one
costs about a microsecond, and a connection's life still reads top to bottom.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
EventCallback = Callable[[int], None]

_IP_BIND_ADDRESS_NO_PORT = 24  # ip(7); Python 3.11 has no name for it
READ = select.EPOLLIN
WRITE = select.EPOLLOUT
READ_READY = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP

# Events taken in one poll. More would let one turn run long; fewer would split the write of a busy turn.
EVENTS_PER_TURN = 128

log = logging.getLogger(__name__)


class Waiter(Generic[T]):
    """A one-shot value that one coroutine waits for. Settling it twice keeps the first result."""

    __slots__ = ("_error", "_plane", "_value", "settled", "task")

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._value: T | None = None
        self._error: BaseException | None = None
        self.settled = False
        self.task: Task | None = None

    def set(self, value: T) -> None:
        if not self.settled:
            self.settled = True
            self._value = value
            self._wake()

    def fail(self, error: BaseException) -> None:
        if not self.settled:
            self.settled = True
            self._error = error
            self._wake()

    def _wake(self) -> None:
        if self.task is not None:
            self._plane.wake(self.task)
            self.task = None

    def __await__(self) -> Generator[Waiter[T], None, T]:
        if not self.settled:
            yield self
        if self._error is not None:
            # Its traceback will hold the frames that wait, and they hold this: no cycle, for what hangs on it is large.
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error
        return self._value  # type: ignore[return-value]  # set() gave it


class Task:
    """A coroutine being stepped by the plane."""

    __slots__ = ("_coroutine", "_plane", "waiter")

    def __init__(self, plane: Plane, coroutine: Coroutine[Waiter[Any], None, None]) -> None:
        self._plane = plane
        self._coroutine = coroutine
        self.waiter: Waiter[Any] | None = None  # what it waits for, once it was stepped

    def step(self) -> None:
        self.waiter = None
        try:
            waiter: Waiter[Any] = self._coroutine.send(None)
        except StopIteration:
            self._plane.tasks.discard(self)
        except Exception:
            # A connection's own errors are RefusedError or OSError and are handled in its path; this is our bug.
            self._plane.tasks.discard(self)
            log.exception("a connection's coroutine failed")
        else:
            self.waiter, waiter.task = waiter, self
            if waiter.settled:
                self._plane.wake(self)


class Flushable(Protocol):
    """Something with frames to send at the end of the turn."""

    def flush(self) -> None: ...


class Plane:
    """One epoll set, its callbacks, its coroutines, and what must be flushed at the end of the turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.tasks: set[Task] = set()
        self._epoll = select.epoll()
        self._callbacks: dict[int, EventCallback] = {}
        self._woken: deque[Task] = deque()
        self._dirty: list[Flushable] = []
        self._in_turn = False
        loop.add_reader(self._epoll.fileno(), self._turn)

    def close(self) -> None:
        self.loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    # -- descriptors

    def watch(self, fd: int, events: int, callback: EventCallback) -> None:
        self._callbacks[fd] = callback
        self._epoll.register(fd, events)

    def rearm(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Stop watching. Call it before the descriptor is closed, and at most once for each `watch`."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    # -- coroutines and timers

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that waits only on this plane's Waiters; it starts before the turn ends."""
        task = Task(self, coroutine)
        self.tasks.add(task)
        self.wake(task)

    def abort(self, error: Exception) -> None:
        """Raise `error` in every coroutine, where it waits."""
        for task in list(self.tasks):
            if task.waiter is not None:
                task.waiter.fail(error)

    def wake(self, task: Task) -> None:
        self._woken.append(task)
        if not self._in_turn:
            self.loop.call_soon(self.run, _nothing)

    def mark_dirty(self, item: Flushable) -> None:
        """Flush `item` at the end of this turn. The caller keeps track of being marked already."""
        self._dirty.append(item)
        if not self._in_turn:
            self.loop.call_soon(self.run, _nothing)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        return self.loop.call_later(delay_s, self.run, callback)

    def run(self, callback: Callable[[], None]) -> None:
        """Call into the data plane from the control side, as a turn of its own."""
        outer, self._in_turn = self._in_turn, True
        try:
            callback()
            if not outer:
                self._finish_turn()
        finally:
            self._in_turn = outer

    async def wait(self, waiter: Waiter[T], timeout_s: float) -> T:
        """Wait with a deadline; raises TimeoutError when it passes."""
        if waiter.settled:
            return await waiter
        timer = self.call_later(timeout_s, lambda: waiter.fail(TimeoutError(f"nothing within {timeout_s:g} s")))
        try:
            return await waiter
        finally:
            timer.cancel()

    async def ready(self, sock: socket.socket, events: int, timeout_s: float) -> None:
        """Wait until an unwatched socket is readable or writable. Raises TimeoutError."""
        waiter: Waiter[None] = Waiter(self)
        fd = sock.fileno()
        self.watch(fd, events, lambda _: waiter.set(None))
        try:
            await self.wait(waiter, timeout_s)
        finally:
            self.unwatch(fd)

    async def connect(self, host: str, port: int, timeout_s: float, *, source: str | None = None) -> socket.socket:
        """Open a TCP connection, non-blocking and without delay. Raises OSError (TimeoutError among them)."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            # Without it, Nagle and delayed ACKs stall small messages for 40 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if source is not None:
                # Choose the port at connect(), by 4-tuple, so that the address does not run out of ports.
                sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
                sock.bind((source, 0))
            status = sock.connect_ex((host, port))
            if status == errno.EINPROGRESS:
                # On the same host the handshake is over by now: asking again is cheaper than waiting for it.
                status = sock.connect_ex((host, port))
            if status == errno.EALREADY:
                await self.ready(sock, WRITE, timeout_s)
                status = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if status not in (0, errno.EISCONN):
                raise OSError(status, os.strerror(status))
        except BaseException:
            sock.close()
            raise
        return sock

    # -- the turn

    def _turn(self) -> None:
        self._in_turn = True
        try:
            for fd, events in self._epoll.poll(0, EVENTS_PER_TURN):
                callback = self._callbacks.get(fd)
                # None: an earlier callback of this turn closed it.
                if callback is not None:
                    try:
                        callback(events)
                    except Exception:
                        # Our bug, in one connection: drop the descriptor, keep the others going.
                        log.exception("the callback of descriptor %d failed", fd)
                        self.unwatch(fd)
            self._finish_turn()
        finally:
            self._in_turn = False

    def _finish_turn(self) -> None:
        woken, dirty = self._woken, self._dirty
        # A flush may open windows and wake coroutines; those may produce frames. Bounded: coroutines only.
        while woken or dirty:
            while woken:
                woken.popleft().step()
            if dirty:
                items = dirty[:]
                dirty.clear()
                for item in items:
                    try:
                        item.flush()
                    except Exception:
                        # Our bug, in one tunnel: the others' frames still leave.
                        log.exception("a tunnel could not be flushed")


def _nothing() -> None: ...


_LINGER_RESET, _LINGER_OFF = b"\x01\0\0\0\0\0\0\0", b"\0\0\0\0\0\0\0\0"  # struct linger {1, 0} and {0, 0}


def reset_on_close(sock: socket.socket) -> None:
    """From here on whatever closes this socket, our own death included, resets it: what was written may be incomplete
    and must not look whole (docs/hbone.md 4). Only `close` ends it well."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)


def close(sock: socket.socket) -> None:
    """Close a socket on which both sides have sent FIN."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_OFF)
    sock.close()


def reset(sock: socket.socket) -> None:
    """Close with RST, never FIN."""
    reset_on_close(sock)
    sock.close()
