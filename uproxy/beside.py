"""The waypoint's process beside a workload (placement `sidecar`), as its uProxy sees it: started, fed, handed streams.

It is a worker as a waypoint has them (`uproxy.workers`), a child that holds no key and knows no broker. Streams come to
it as connections of their own, which nobody else can make: a TCP pair over loopback, of which one end goes through a
socket pair that only the two of them have. Each begins with a PROXY protocol header. Restarts, and what it means when
it hangs, are the workers'.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from control.api.gateway import Sidecar
from control.api.status import Knowledge
from control.client.state import Changes
from uproxy import plane
from uproxy.errors import Flag, RefusedError
from uproxy.listener import Inherited
from uproxy.plane import Plane, Waiter
from uproxy.telemetry import Listing, Telemetry

if TYPE_CHECKING:
    from uproxy.beside_feed import Feed

PATIENCE_S: Final = 5.0
"""How long a stream waits for a process that is not there."""
START_TIMEOUT_S: Final = 20.0
"""How long a uProxy that starts waits for it before it lets the mesh in."""
BACKLOG: Final = 128
_ATTEMPTS: Final = 4
"""To make a connection to it, while strangers fill the backlog."""
RETIRE_S: Final = 30.0
"""How long what was begun may go on in a process that another Gateway, or none, follows."""
RETRY_S: Final = 2.0
"""Until another attempt to make what one needs that could not be made."""
GRACE_S: Final = 1.0
"""How long a connection may wait for a request, in a process that ends: as `gateway.GRACE_S` of a waypoint."""

log = logging.getLogger("uproxy")

Batch = Sequence[tuple[str, bytes]]


class Beside:
    """What one uProxy has beside its workload, if anything. All of it belongs to the loop."""

    def __init__(
        self,
        data_plane: Plane,
        telemetry: Telemetry,
        settings: Mapping[str, object],
        on_change: Callable[[], None],
        make_feed: Callable[[str, Callable[[Batch], None], Callable[[], None]], Feed] | None,
    ) -> None:
        """`settings`: of `waypoint.worker`'s `start`, but for the Gateway. `make_feed` is given the Gateway's key, who
        takes batches, and who is told of progress; None: `take` is called with what files say.

        `on_change` is called when it is ready, or no longer, or has applied more.
        """
        self._plane = data_plane
        self._telemetry = telemetry
        self._settings = settings
        self._on_change = on_change
        self._make_feed = make_feed
        self._group: asyncio.TaskGroup | None = None
        self._whole: dict[str, bytes] = {}
        """What files say, by topic."""
        self._standing: _Standing | None = None
        """Where streams go."""
        self._next: _Standing | None = None
        """Another Gateway's, in its place as soon as it serves: until then nothing is lost."""
        self._retry: asyncio.TimerHandle | None = None
        self._unmade = ""
        """The Gateway whose process could not be made, while that is tried again."""
        self._waiting: list[Waiter[None]] = []
        self._moved = asyncio.Event()
        self._restarts: int | None = None
        """Of processes that were let go; None: there was none, ever."""
        self._ended = False

    def begin(self, group: asyncio.TaskGroup) -> None:
        """Its tasks may run from now on."""
        self._group = group
        for standing in self._all():
            standing.begin(group)

    def follow(self, sidecar: Sidecar | None) -> None:
        """What the configuration says now."""
        wanted = "" if sidecar is None else sidecar.gateway
        pending, self._retry, self._unmade = self._retry, None, ""
        if pending is not None:
            pending.cancel()
        if self._ended or wanted == (self.gateway if self._next is None else self._next.gateway):
            if pending is not None:
                self._on_change()
            return
        if self._next is not None:
            self._let_go(self._next)
            self._next = None
            if self._standing is not None and self._standing.feed is not None:
                self._standing.feed.keep()
        # What files say the former one has taken already, and serves nothing any more.
        goes_on = bool(wanted) and self._make_feed is not None
        if self._standing is not None and not (goes_on and self._standing.launched):
            self._let_go(self._standing)
            self._standing = None
        if wanted and wanted != self.gateway:
            self._add(wanted, sidecar)
        self._on_change()

    def _add(self, wanted: str, sidecar: Sidecar | None) -> None:
        """Have a process for another Gateway, if that can be."""
        settings = {**self._settings, "gateway": wanted}
        try:
            standing = _Standing(wanted, self._plane, self._telemetry, settings, self._changed, self._make_feed)
        except OSError as error:  # no descriptor is left: the former one goes on
            log.error("no process of waypoint %s can be started yet: %s", wanted, error)
            self._retry = self._plane.loop.call_later(RETRY_S, self.follow, sidecar)
            self._unmade = wanted
            return
        except ValueError as error:  # what goes through it alone is refused
            log.error("no process of waypoint %s can be started: %s", wanted, error)
            if self._standing is not None:
                self._let_go(self._standing)
                self._standing = None
            return
        log.info("a process of waypoint %s is started beside this workload", wanted)
        self._count_restarts()
        self._telemetry.taps.on_change = self._tap
        if self._standing is None:
            self._standing = standing
        else:
            self._next = standing
            if self._standing.feed is not None:
                self._standing.feed.leave()
        standing.take(list(self._whole.items()))
        if self._group is not None:
            standing.begin(self._group)

    def take(self, batch: Batch) -> None:
        """A batch of what files say."""
        if self._make_feed is None:
            self._whole.update(batch)
            for standing in self._all():
                standing.take(batch)

    @property
    def gateway(self) -> str:
        """Key of the Gateway whose process stands here; empty: none does."""
        return self._standing.gateway if self._standing is not None else ""

    def _all(self) -> list[_Standing]:
        return [one for one in (self._standing, self._next) if one is not None]

    def missing(self) -> tuple[str, ...]:
        """What keeps it from serving."""
        if self._standing is not None:
            return self._standing.missing()
        return self._not_made()

    def _not_made(self) -> tuple[str, ...]:
        return (f"a process of Gateway {self._unmade}",) if self._unmade else ()

    async def started(self) -> None:
        """Return when it serves, or has not in a while: then what goes through it alone is refused."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT_S):
                while self.missing():
                    self._moved.clear()
                    await self._moved.wait()

    async def ready(self, *, wait: bool) -> bool:
        """Whether it takes streams. `wait`: for a while; raises RefusedError when it does not by then."""
        if self._serves:
            return True
        if not wait:
            return False
        waiter: Waiter[None] = Waiter(self._plane)
        self._waiting.append(waiter)
        try:
            await self._plane.wait(waiter, PATIENCE_S)
        except TimeoutError:
            detail = f"the process of Gateway {self.gateway} beside this workload: {', '.join(self.missing())}"
            raise _unavailable(detail) from None
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
        if not self._serves:
            raise _unavailable("the process beside this workload was let go")
        return True

    @property
    def _serves(self) -> bool:
        return self._standing is not None and not self.missing()

    def connect(self, header: bytes) -> socket.socket:
        """A connection to it, which was told by the header what it is. Raises RefusedError."""
        if self._standing is None or self._ended:
            raise _unavailable("it takes nothing new")
        return self._standing.connect(header)

    def in_force(self, known: Knowledge) -> Knowledge:
        """What of all that is known holds for every connection; not whole while it, or the next one, is missing."""
        for standing in self._all():
            known = standing.in_force(known)
        if self._unmade:
            known = Knowledge(False, (*known.waiting, *self._not_made()), known.roots)
        return known

    def renewed(self) -> None:
        """There is a new certificate."""
        for standing in self._all():
            if standing.feed is not None:
                standing.feed.renewed()

    async def save(self) -> None:
        """Have what it, or the next one, is fed with on disk, for a successor."""
        for standing in self._all()[-1:]:
            if standing.feed is not None:
                await standing.feed.save()

    def leave(self) -> None:
        """Another process keeps that from here on."""
        for standing in self._all():
            if standing.feed is not None:
                standing.feed.leave()

    # -- operators

    def render(self) -> bytes | asyncio.Future[bytes]:
        """The metrics of this process and that one, together."""
        return self._telemetry.render() if self._standing is None else self._standing.workers.render()

    def reopen_log(self) -> None:
        """The access log's file was moved away."""
        for standing in self._all():
            standing.workers.reopen_log()

    def _tap(self) -> None:
        for standing in self._all():
            standing.workers.tap()

    def live(self) -> asyncio.Future[Listing] | None:
        """Requests that are under way there."""
        return None if self._standing is None else self._standing.workers.live()

    def dump(self) -> dict[str, object] | None:
        """For operators."""
        if self._standing is None:
            return None
        return {"gateway": self.gateway, "missing": self.missing(), **self._standing.workers.dump()}

    # -- the end

    async def drain(self, timeout_s: float, grace_s: float) -> None:
        """Let what is under way there end. What was handed over before this is taken; nothing more is handed over."""
        self._ended = True
        if self._next is not None:
            self._next.close()
            self._next = None
        if self._standing is not None:
            await self._standing.workers.drain(timeout_s, grace_s)

    def close(self) -> None:
        self._ended = True
        for standing in self._all():
            standing.close()
        self._standing = self._next = None

    def _let_go(self, standing: _Standing) -> None:
        """Nothing new goes there; what is under way may end."""
        self._restarts = (self._restarts or 0) + standing.workers.restarts
        if standing.feed is not None:
            standing.feed.leave()
        if self._group is None:
            standing.close()
        else:
            self._group.create_task(standing.retire())

    def _count_restarts(self) -> None:
        if self._restarts is not None:
            return
        self._restarts = 0

        def counted() -> int:
            return (self._restarts or 0) + (self._standing.workers.restarts if self._standing is not None else 0)

        self._telemetry.counter(
            "uproxy_waypoint_worker_restarts_total",
            "Processes of a waypoint beside this workload that died and were replaced",
            counted,
        )

    def _changed(self) -> None:
        if self._next is not None and not self._next.missing():
            former, self._standing, self._next = self._standing, self._next, None
            if former is not None:
                self._let_go(former)
        if not self.missing():
            self._plane.run(self._wake)
        self._moved.set()
        self._on_change()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            waiter.set(None)


class _Standing:
    """The process for one Gateway, and what feeds it. Making one raises OSError, and ValueError of `make_feed`."""

    def __init__(
        self,
        gateway: str,
        data_plane: Plane,
        telemetry: Telemetry,
        settings: dict[str, object],
        on_change: Callable[[], None],
        make_feed: Callable[[str, Callable[[Batch], None], Callable[[], None]], Feed] | None,
    ) -> None:
        # Imported here: few workloads have a waypoint's process beside them.
        from uproxy.workers import Workers

        self.gateway = gateway
        self.feed = make_feed(gateway, self.take, self._progressed) if make_feed is not None else None
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self._listener.setblocking(False)
        self._door, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._door.setblocking(False)
        self._theirs.setblocking(False)
        self._on_change = on_change
        self.launched = False
        """Whether there was a configuration for it."""
        self._group: asyncio.TaskGroup | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._fed = False
        self.workers = Workers(
            1, settings, lambda _: [(self._theirs,)], data_plane, telemetry, self.feed, self._on_workers
        )
        # It may take as many attempts as it needs: what goes through it alone is refused meanwhile.
        self.workers.interrupt()

    def begin(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        if self.feed is not None:
            self.feed.restore()
            self._tasks.append(group.create_task(self.feed.run()))
        self._launch()

    def take(self, batch: Batch) -> None:
        if batch:
            self._fed = True
            self.workers.take(batch, Changes())
            self._launch()

    def missing(self) -> tuple[str, ...]:
        if not self.launched:
            return (f"the configuration of Gateway {self.gateway}",)
        return self.workers.waiting()

    def in_force(self, known: Knowledge) -> Knowledge:
        """Of what both know, the process and its uProxy."""
        if self.feed is None:
            return known
        missing = self.missing()
        theirs = self.workers.in_force(self.feed.known())
        roots = {
            owner: min(root, theirs.roots[owner]) if owner in theirs.roots else root
            for owner, root in known.roots.items()
        }
        whole = known.whole and theirs.whole and not missing
        return Knowledge(whole, (*known.waiting, *(missing or theirs.waiting)), roots)

    def connect(self, header: bytes) -> socket.socket:
        """Raises RefusedError."""
        try:
            ours, theirs = self._pair()
        except OSError as error:
            raise _unavailable(f"no connection to the process of Gateway {self.gateway}: {error}") from error
        plane.reset_on_close(ours)
        plane.reset_on_close(theirs)
        try:
            with theirs:
                # In a buffer of its own, which is empty and large enough.
                if ours.send(header) != len(header):
                    raise BlockingIOError("the header was taken in part")
                socket.send_fds(self._door, [b"s"], [theirs.fileno()])
        except OSError as error:  # a thousand wait already, or the process is gone
            plane.reset(ours)
            raise _unavailable(f"the process of Gateway {self.gateway} takes nothing: {error}") from error
        return ours

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        """Two ends of a TCP connection over loopback: unlike a socket pair's, they tell a reset from an end.

        Raises OSError.
        """
        for _ in range(_ATTEMPTS):
            ours = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            try:
                ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with contextlib.suppress(BlockingIOError):
                    ours.connect(self._listener.getsockname())  # on loopback it is made when this returns
                theirs = self._accepted(ours.getsockname())
            except BaseException:
                ours.close()
                raise
            if theirs is not None:
                theirs.setblocking(False)
                theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return ours, theirs
            ours.close()
        raise BlockingIOError("others fill the way to it")

    def _accepted(self, name: tuple[str, int]) -> socket.socket | None:
        """The other end of the connection from there; None: it was not made, since strangers' waited for its place.

        Raises OSError.
        """
        for _ in range(BACKLOG + 1):
            try:
                theirs, peer = self._listener.accept()
            except BlockingIOError:
                break
            if peer == name:
                return theirs
            theirs.close()  # a stranger's: nobody but us has any business there
        return None

    async def retire(self) -> None:
        """Let what is under way end, for a while."""
        await self.workers.drain(RETIRE_S, GRACE_S)
        self.close()

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.workers.close()
        for sock in (self._door, self._theirs, self._listener):
            sock.close()

    def _progressed(self) -> None:
        """The feed may know more, and what follows from it was taken."""
        if self.feed is not None:
            self.workers.progressed(self.feed.known)
            self._launch()
            self._on_change()

    def _launch(self) -> None:
        """Start it, once there is a configuration for it."""
        fed = self._fed and (self.feed is None or self.feed.whole)
        if fed and self._group is not None and not self.launched:
            self.launched = True
            self._tasks.append(self._group.create_task(self.workers.start(self._group, Inherited())))

    def _on_workers(self) -> None:
        self._on_change()


def _unavailable(detail: str) -> RefusedError:
    return RefusedError("waypoint-unavailable", detail, flag=Flag.CONNECT, retriable=True)
