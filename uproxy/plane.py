"""The data plane's turn, and the loop that takes turns while asyncio waits.

A *turn* is: poll once, run each ready descriptor's callback, step the coroutines that those woke, then flush every
tunnel that has frames to send, so that all frames of one turn leave in one TLS write (the largest single gain under
concurrency, docs/decisions.md). Coroutines here wait on `Waiter`s, not on asyncio futures: stepping one costs about a
microsecond, and a connection's life still reads top to bottom.

Both planes share one epoll set and one thread. Control work (signals, files, admin ports) is asyncio's; when that has
nothing to do it calls its selector, and the selector takes turns until a descriptor or a timer of asyncio's is ready.
So a busy data plane pays one epoll_wait a turn, and nothing for asyncio.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import selectors
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from heapq import heappop, heappush
from time import monotonic
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
EventCallback = Callable[[int], None]

_IP_BIND_ADDRESS_NO_PORT = 24  # ip(7); Python 3.11 has no name for it
_SOL_SOCKET, _SO_LINGER = socket.SOL_SOCKET, int(socket.SO_LINGER)
READ = select.EPOLLIN
WRITE = select.EPOLLOUT
READ_READY = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP

# Timers of the data plane are deadlines of seconds: kept in steps, so that setting and cancelling one is cheap. A step
# stays until it comes, with or without timers: those of long deadlines are so many to a deadline, or there were tens of
# thousands after an hour of requests, each of which lets its connection idle for an hour.
TIMER_STEPS_PER_S = 10
MAX_STEPS = 256

# Coroutines stepped in one turn: 6 ms when they all begin or end connections. A peer that closes a thousand at once
# delays others' bytes by turns.
STEPS_PER_TURN = 64

# Events taken in one poll. More would let one turn run long; fewer would split the write of a busy turn.
EVENTS_PER_TURN = 128

# Where new work waits while there is much to do (`Plane.queue`): as many who wait are too many for others to go before
# them, a turn takes one in so many of them, and so many turns may pass in which none is taken.
MAX_AHEAD = 8
MAX_TURNS_WITHOUT = 2

_SHORT_S = MAX_STEPS / TIMER_STEPS_PER_S

log = logging.getLogger(__name__)


class Waiter(Generic[T]):
    """A one-shot value that one coroutine waits for. Settling it twice keeps the first result."""

    __slots__ = ("_error", "_plane", "_value", "patience_s", "settled", "task")

    _value: T  # there is one once it is settled, unless it failed
    patience_s: float  # of whoever waits with a deadline

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._error: BaseException | None = None
        self.settled = False
        self.task: Task | None = None

    def set(self, value: T) -> None:
        if not self.settled:
            self.settled = True
            self._value = value
            if self.task is not None:
                self._plane.wake(self.task)
                self.task = None

    def fail(self, error: BaseException) -> None:
        if not self.settled:
            self.settled = True
            self._error = error
            if self.task is not None:
                self._plane.wake(self.task)
                self.task = None

    def expire(self) -> None:
        """The deadline has come."""
        self.fail(TimeoutError(f"nothing within {self.patience_s:g} s"))

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
        return self._value


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


class Timer:
    """A deadline that has not come; it comes up to a step late, or a long one up to 1/128 of it, never early."""

    __slots__ = ("_step", "expire")

    def __init__(self, step: _Step, callback: Callable[[], None]) -> None:
        self._step = step
        self.expire = callback
        step.add(self)

    def cancel(self) -> None:
        self._step.discard(self)


_Step = set["Timer | Waiter[Any]"]
"""What expires in one step of time."""


class _Selector(selectors.EpollSelector):
    """asyncio's selector. `plane`, once it is there, waits in its place."""

    plane: Plane | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.plane is None:
            return super().select(timeout)
        return self.plane.take_turns(timeout)


class Loop(asyncio.SelectorEventLoop):
    """asyncio's loop, on a selector that takes turns of the data plane."""

    called = False
    """Whether something was scheduled since `take_turns` began: then asyncio has to look again."""

    def __init__(self) -> None:
        self.selector = _Selector()
        super().__init__(self.selector)

    def call_soon(self, *args: Any, **kwargs: Any) -> asyncio.Handle:  # type: ignore[override]  # passed on as they are
        self.called = True
        return super().call_soon(*args, **kwargs)

    def call_at(self, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:  # type: ignore[override]
        self.called = True
        return super().call_at(*args, **kwargs)


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a `Loop`."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(main)


class Plane:
    """The data plane's callbacks, coroutines and timers, and what must be flushed at the end of the turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        assert isinstance(loop, Loop)
        self.loop = loop
        self.tasks: set[Task] = set()
        self._selector = loop.selector
        # The same epoll set, through a descriptor of our own: both close theirs.
        self._epoll = select.epoll.fromfd(os.dup(loop.selector.fileno()))
        self._callbacks: dict[int, EventCallback] = {}
        self._woken: deque[Task] = deque()
        self._dirty: list[Flushable] = []
        self.wake: Callable[[Task], None] = self._woken.append
        """Step a coroutine in this turn, or soon."""
        self.mark_dirty: Callable[[Flushable], None] = self._dirty.append
        """Flush something at the end of this turn. The caller keeps track of being marked already."""
        self._postponed: deque[Callable[[], None]] = deque()
        self._queued: deque[Callable[[], None]] = deque()
        self._turns_without = 0  # in which nothing that was queued was taken
        self._timers: dict[int, _Step] = {}
        self._due: list[int] = []  # the steps that have timers: a heap
        self._selector.plane = self

    def close(self) -> None:
        self._selector.plane = None
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

    def forget(self, fd: int) -> None:
        """Stop watching what is closed next. The kernel takes it out of the set, as nobody else holds that socket."""
        self._callbacks.pop(fd, None)

    # -- coroutines and timers

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that waits only on this plane's Waiters; it starts in this turn, or soon."""
        task = Task(self, coroutine)
        self.tasks.add(task)
        self.wake(task)

    def abort(self, error: Exception) -> None:
        """Raise `error` in every coroutine, where it waits."""
        for task in list(self.tasks):
            if task.waiter is not None:
                task.waiter.fail(error)

    def postpone(self, callback: Callable[[], None]) -> None:
        """Call `callback` in a later turn, of which each has one such call, behind what is ready then.

        So a peer that asks for much delays others by one of its pieces, and many such peers by one piece, too.
        """
        self._postponed.append(callback)

    def queue(self, callback: Callable[[], None]) -> None:
        """Likewise for what brings new work: it waits while more coroutines can go on than a turn steps, so that what
        was begun is done before more is taken up.
        """
        self._queued.append(callback)

    @property
    def busy(self) -> bool:
        """Whether new work is to be queued, behind what waits there."""
        return len(self._woken) > STEPS_PER_TURN or len(self._queued) >= MAX_AHEAD

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        return Timer(self._step(delay_s), callback)

    def _step(self, delay_s: float) -> _Step:
        number = int((monotonic() + delay_s) * TIMER_STEPS_PER_S) + 1
        if delay_s > _SHORT_S:
            number += -number % -(-int(delay_s * TIMER_STEPS_PER_S) // MAX_STEPS)
        step = self._timers.get(number)
        if step is None:
            step = self._timers[number] = set()
            heappush(self._due, number)
        return step

    def run(self, callback: Callable[[], None]) -> None:
        """Call into the data plane from the control side, and send at once what that asks for."""
        callback()
        self._finish_turn()

    async def wait(self, waiter: Waiter[T], timeout_s: float) -> T:
        """Wait with a deadline; raises TimeoutError when it passes."""
        if waiter.settled:
            return await waiter
        expired = self.expires(waiter, timeout_s)
        try:
            return await waiter
        finally:
            expired.discard(waiter)

    def expires(self, waiter: Waiter[Any], timeout_s: float) -> _Step:
        """Let it fail when the deadline passes. Whoever waits takes it out of what is returned afterwards."""
        waiter.patience_s = timeout_s
        step = self._step(timeout_s)
        step.add(waiter)
        return step

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

    def take_turns(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        """Turns, until asyncio has something to do: a ready descriptor, a due timer, or a call that was scheduled.

        `timeout`: seconds until asyncio's next timer, None when it has none (as for BaseSelector.select).
        """
        loop = self.loop
        loop.called = False
        self._finish_turn()  # what control work asked for since the last turn
        if loop.called:
            return self._turn(0.0)
        now = monotonic()
        end = None if timeout is None else now + max(timeout, 0.0)
        while True:
            ready = self._turn(self._patience(now, end))
            now = monotonic()
            if self._due and self._due[0] <= now * TIMER_STEPS_PER_S:
                self._expire(now)
            if ready or loop.called or (end is not None and now >= end):
                return ready

    def _patience(self, now: float, end: float | None) -> float:
        """Seconds that a poll may wait; -1 for ever."""
        if self._postponed or self._woken or self._queued:
            return 0.0
        if self._due:
            step = self._due[0] / TIMER_STEPS_PER_S
            if end is None or step < end:
                end = step
        if end is None:
            return -1.0
        return end - now if end > now else 0.0

    def _expire(self, now: float) -> None:
        while self._due and self._due[0] <= now * TIMER_STEPS_PER_S:
            timers = self._timers.pop(heappop(self._due))
            while timers:
                self._call(timers.pop().expire)
        self._finish_turn()

    def _turn(self, patience_s: float) -> list[tuple[selectors.SelectorKey, int]]:
        """One turn. Returns the ready descriptors that are asyncio's."""
        ready = []
        callbacks = self._callbacks
        for fd, events in self._epoll.poll(patience_s, EVENTS_PER_TURN):
            callback = callbacks.get(fd)
            if callback is not None:
                try:
                    callback(events)
                except Exception:
                    # Our bug, in one connection: drop the descriptor, keep the others going.
                    log.exception("the callback of descriptor %d failed", fd)
                    self.unwatch(fd)
            else:
                key = self._selector.get_map().get(fd)
                # None: an earlier callback of this turn closed it.
                if key is not None:
                    # An error or a hang-up counts as both, as in selectors.EpollSelector.
                    writable = selectors.EVENT_WRITE if events & ~select.EPOLLIN else 0
                    readable = selectors.EVENT_READ if events & ~select.EPOLLOUT else 0
                    ready.append((key, (writable | readable) & key.events))
        if self._postponed:
            self._call(self._postponed.popleft())
        if self._queued:
            self._take_queued()
        if self._woken or self._dirty:
            self._finish_turn(STEPS_PER_TURN)
        return ready

    def _take_queued(self) -> None:
        if len(self._woken) > STEPS_PER_TURN and self._turns_without < MAX_TURNS_WITHOUT:
            self._turns_without += 1
            return
        self._turns_without = 0
        for _ in range(1 + len(self._queued) // MAX_AHEAD):
            self._call(self._queued.popleft())
            if len(self._woken) > STEPS_PER_TURN:
                return

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:
            log.exception("a call of the data plane failed")  # our bug; the others still come

    def _finish_turn(self, steps: int = -1) -> None:
        """Step what was woken, all of it or so many at most, and flush what that gives to send."""
        woken, dirty = self._woken, self._dirty
        # A flush may open windows and wake coroutines; those may produce frames.
        while (woken and steps) or dirty:
            while woken and steps:
                steps -= 1
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


_LINGER_RESET, _LINGER_OFF = b"\x01\0\0\0\0\0\0\0", b"\0\0\0\0\0\0\0\0"  # struct linger {1, 0} and {0, 0}


def reset_on_close(sock: socket.socket) -> None:
    """From here on whatever closes this socket, our own death included, resets it: what was written may be incomplete
    and must not look whole (docs/hbone.md 4). Only `close` ends it well."""
    _linger(sock, _LINGER_RESET)


def close(sock: socket.socket) -> None:
    """Close a socket on which both sides have sent FIN."""
    _linger(sock, _LINGER_OFF)
    sock.close()


def reset(sock: socket.socket) -> None:
    """Close with RST, never FIN."""
    _linger(sock, _LINGER_RESET)
    sock.close()


def _linger(sock: socket.socket, how: bytes) -> None:
    try:
        sock.setsockopt(_SOL_SOCKET, _SO_LINGER, how)
    except OSError:
        return  # it is broken already
