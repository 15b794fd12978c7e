"""A request on its way through a waypoint: what is known of it, and how it is ended where it waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from control.api.extension import ExternalAuthorization, PythonFilter
from control.api.route import Backend, RouteRule
from uproxy.hbone import ErrorCode
from uproxy.plane import Plane, Timer, Waiter
from waypoint import telemetry as flags
from waypoint.authz import Allowed
from waypoint.byte_stream import StreamError
from waypoint.caller import Caller
from waypoint.messages import Fields, MessageError
from waypoint.mirror import Copy
from waypoint.refusal import RefusalError
from waypoint.request import Request
from waypoint.retry import MAX_KEPT
from waypoint.sides import IDEMPOTENT, STALL_TIMEOUT_S, Incoming, Outgoing
from waypoint.telemetry import Exchange
from waypoint.traffic import Place
from waypoint.turn import Turn

_PASSED_ON: Final[dict[int | None, ErrorCode]] = {
    code: code for code in (ErrorCode.CANCEL, ErrorCode.ENHANCE_YOUR_CALM, ErrorCode.INADEQUATE_SECURITY)
}
"""What a backend's reset says of the request. Others say it of the connection, or (REFUSED_STREAM) that it may be sent
again, which it may not once there was a response."""


@dataclass(slots=True, eq=False)
class Course:
    """A request, and how far it has come, so that a deadline, or its caller's leaving, can end it where it waits."""

    request: Incoming
    caller: Caller
    exchange: Exchange
    still_permitted: Callable[[], str] = lambda: ""
    """Why not, when policy has changed."""
    claim: Waiter[Outgoing] | Waiter[list[Any]] | Waiter[int] | Waiter[None] | None = None
    """What it waits for before it has a way to a backend."""
    http2: bool = False
    """Whether the backend takes requests by HTTP/2."""
    outgoing: Outgoing | None = None
    cause: RefusalError | None = None
    """Why it was stopped."""
    missed: RefusalError | None = None
    """Why this attempt was stopped."""
    kept: list[bytes] | None = None
    """What has come of the request's body, if it may be sent again."""
    copies: Sequence[Copy] = ()
    """For mirrors."""
    allowed: Mapping[ExternalAuthorization | None, Allowed] | None = None
    """Who was asked and lets it pass; None: nobody was."""
    added: Fields = ()
    """To the response, by them."""
    trusted_proxies: int = 0
    """As the Gateway says."""
    permitted: Request | None = None
    """As routes see it, once policy has let it in."""
    generation: int = 0
    """Of the configuration that has let it in."""
    rule: RouteRule | None = None
    """Under which it falls, and where that sends it, once both are known."""
    backend: Backend | None = None
    filtered: Request | None = None
    """As filters have left it, if there were any."""
    filters: tuple[PythonFilter, ...] = ()
    """That its response comes to."""
    answering: bool = False
    """Whether bytes of the final response may have gone to the caller."""
    uploaded: Waiter[None] | None = None
    """Settled when the request's body was read to its end, or is read no more. None: there is no body."""
    over: bool = False
    """Whether nobody wants the rest of the request's body."""
    timer: Timer | None = None
    attempt_timer: Timer | None = None
    place: Place | None = None
    """What it takes up of what is limited."""
    turn: Turn | None = None
    """Where this attempt goes, if its backend's endpoints are balanced."""

    def stop(self, cause: RefusalError) -> None:
        if self.cause is None:
            self.cause = cause
        self._break(cause.detail)

    def miss(self, missed: RefusalError) -> None:
        """This attempt has taken too long."""
        self.missed = missed
        self._break(missed.detail)

    def _break(self, text: str) -> None:
        if self.outgoing is not None:
            self.outgoing.abort(text)
        elif self.claim is not None:
            self.claim.fail(ConnectionResetError(text))

    def pass_on(self, data: bytes) -> None:
        """More of the request's body has come: for records, mirrors, and another attempt."""
        if self.exchange.request_messages is not None:
            self.exchange.request_messages.add(data)
        for copy in self.copies:
            copy.write(data)
        if self.kept is not None:
            self.kept.append(data)
            if self.exchange.received > MAX_KEPT:
                self.kept = None

    def settle(self) -> None:
        """It is over."""
        self.over = True
        for timer in (self.timer, self.attempt_timer):
            if timer is not None:
                timer.cancel()
        if self.place is not None:
            self.place.leave()
        if self.turn is not None:
            self.turn.leave()
        if self.outgoing is not None:
            self.outgoing.abort("given up")
        for copy in self.copies:
            copy.close()

    def broken(self, error: Exception, *, begun: bool = False) -> RefusalError:
        """The backend's connection failed, by itself or because the request was stopped. `begun`: within a response."""
        if self.cause is not None:
            return self.cause
        if self.missed is not None:
            return self.missed
        if isinstance(error, TimeoutError):
            return RefusalError(504, "timeout", f"no response within {STALL_TIMEOUT_S:g} s", flag=flags.TIMED_OUT)
        status = error.status if isinstance(error, MessageError) and begun else 503
        said = error.code if isinstance(error, StreamError) else None
        code = _PASSED_ON.get(said, ErrorCode.INTERNAL_ERROR)
        retriable = not begun and self.request.head.method in IDEMPOTENT
        text = f"the backend's connection: {error}"
        return RefusalError(status, "upstream", text, flag=flags.BACKEND_BROKE, code=code, retriable=retriable)

    def lost(self, error: Exception, *, begun: bool = False) -> RefusalError:
        """Likewise, while an endpoint was to answer."""
        found = self.broken(error, begun=begun)
        if self.turn is not None:
            self.turn.lost(found)
        return found

    async def pause(self, plane: Plane, seconds: float) -> None:
        """Raises RefusalError when the request is stopped meanwhile."""
        claim: Waiter[None] = Waiter(plane)
        self.claim = claim
        timer = plane.call_later(seconds, lambda: claim.set(None))
        try:
            await claim
        except ConnectionResetError as error:
            raise self.broken(error) from None
        finally:
            self.claim = None
            timer.cancel()
        if self.cause is not None:
            raise self.cause
