"""Copies of requests for mirrors: their answers go to nobody, and they hold nobody up.

A copy is a request of its own, made for the same caller: the mirror's uProxy judges it as any other. What a mirror does
not take in time it does not get.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from control.api.filters import Mirror
from uproxy.errors import RefusedError
from uproxy.plane import Plane, Waiter
from waypoint.caller import Caller
from waypoint.destination import Destinations
from waypoint.messages import HTTP2, End, MessageError, RequestHead
from waypoint.sides import Outgoing
from waypoint.turn import Hops, Turn
from waypoint.upstream import Upstream
from waypoint.ways import Cause

MAX_COPIES: Final = 256
"""Under way at a time in one process; there are no more while these last."""
MAX_WAITING: Final = 256 * 1024
"""Bytes of a body that a mirror has not taken yet; with more the copy is given up."""
TIMEOUT_S: Final = 15.0
"""For all of a copy: Envoy's, of a route that says nothing."""

log = logging.getLogger(__name__)


class Mirrors:
    """Makes copies of one waypoint's requests."""

    def __init__(self, data_plane: Plane, destinations: Destinations, upstream: Upstream) -> None:
        self._plane = data_plane
        self._destinations = destinations
        self._upstream = upstream
        self._random = random.Random()
        self._under_way = 0

    def copies(
        self, mirrors: Sequence[Mirror], head: RequestHead, caller: Caller, cause: Cause, *, ended: bool
    ) -> tuple[Copy, ...]:
        """Those that are drawn, on their way; `ended`: there is no body, else it is to be written to each."""
        made: list[Copy] = []
        for mirror in mirrors:
            if self._under_way >= MAX_COPIES or self._random.randrange(mirror.denominator) >= mirror.numerator:
                continue
            try:
                hops = self._destinations.hops(mirror.service, mirror.port, caller, None)
            except RefusedError as error:
                log.info("%s: no copy for %s: %s", cause.request_id, mirror.service, error)
                continue
            http2 = self._destinations.speaks_http2(mirror.service, mirror.port, head.protocol == HTTP2)
            copy = Copy(self._plane, mirror.service, http2=http2, ended=ended)
            # Nobody would tell the caller to go on with the body.
            fields = [field for field in head.fields if field[0] != b"expect"]
            self._under_way += 1
            self._plane.spawn(
                self._send(
                    copy, replace(head, fields=fields, expects_continue=False, upgrades=b""), caller, hops, cause
                )
            )
            made.append(copy)
        return tuple(made)

    async def _send(self, copy: Copy, head: RequestHead, caller: Caller, hops: Hops, cause: Cause) -> None:
        """Raises nothing."""
        turn = hops if isinstance(hops, Turn) else None
        claim: Waiter[Outgoing] = Waiter(self._plane)
        timer = self._plane.call_later(TIMEOUT_S, lambda: copy.give_up(f"not done within {TIMEOUT_S:g} s"))
        copy.claim = claim
        self._plane.spawn(self._upstream.outgoing(caller, hops, cause, claim, http2=copy.http2, fresh=False))
        try:
            copy.outgoing = outgoing = await claim
            if copy.lost:
                outgoing.done(uploaded=True)
                raise ConnectionResetError(copy.lost)
            await _carry(copy, head, outgoing, turn)
        except (OSError, MessageError, ValueError, RefusedError) as error:
            log.info("%s: copy for %s: %s", cause.request_id, copy.service, copy.lost or error)
            copy.give_up(str(error))
        finally:
            timer.cancel()
            self._under_way -= 1
            if turn is not None:
                turn.leave()


class Copy:
    """One copy. Whoever has it writes the body, and ends it or gives it up."""

    __slots__ = ("_ended", "_more", "_plane", "_waiting", "_waits", "claim", "http2", "lost", "outgoing", "service")

    def __init__(self, data_plane: Plane, service: str, *, http2: bool, ended: bool) -> None:
        self.service = service
        self.http2 = http2
        self.claim: Waiter[Outgoing] | None = None
        self.outgoing: Outgoing | None = None
        self.lost = ""
        """Why it was given up."""
        self._plane = data_plane
        self._ended = ended
        self._waiting: deque[bytes] = deque()
        self._waits = 0  # bytes
        self._more: Waiter[None] | None = None

    @property
    def bodiless(self) -> bool:
        """Whether it has ended before its beginning was sent."""
        return self._ended and not self._waiting

    def write(self, data: bytes) -> None:
        """More of the body, which never waits."""
        if self.lost:
            return
        self._waiting.append(data)
        self._waits += len(data)
        if self._waits > MAX_WAITING:
            self.give_up(f"more than {MAX_WAITING} bytes wait")
        self._wake()

    def end(self) -> None:
        """The body is whole."""
        self._ended = True
        self._wake()

    def give_up(self, text: str) -> None:
        """Again, or once it is done: nothing."""
        if not self.lost:
            self.lost = text
            self._waiting.clear()
            if self.outgoing is not None:
                self.outgoing.abort(text)
            elif self.claim is not None:
                self.claim.fail(ConnectionResetError(text))
            self._wake()

    def close(self) -> None:
        """There is no more of the request: a body that is not whole is not shown as if it were."""
        if not self._ended:
            self.give_up("the request was not whole")

    async def body(self) -> bytes:
        """What comes next; empty at the end. Raises ConnectionResetError once it was given up."""
        while not (self._waiting or self._ended or self.lost):
            self._more = Waiter(self._plane)
            await self._more
        if self.lost:
            raise ConnectionResetError(self.lost)
        data = self._waiting.popleft() if self._waiting else b""
        self._waits -= len(data)
        return data

    def _wake(self) -> None:
        if self._more is not None:
            self._more.set(None)
            self._more = None


async def _carry(copy: Copy, head: RequestHead, outgoing: Outgoing, turn: Turn | None) -> None:
    """The request, and its answer to nobody. Raises OSError, MessageError, ValueError."""
    bodiless = copy.bodiless
    await outgoing.begin(head, ended=bodiless)
    if not bodiless:
        while data := await copy.body():
            await outgoing.write(data)
        await outgoing.end(())
    while True:
        events = await outgoing.events()
        if turn is not None:
            turn.read(events)
        if isinstance(events[-1], End):
            break
    copy.outgoing = None
    outgoing.done(uploaded=True)
