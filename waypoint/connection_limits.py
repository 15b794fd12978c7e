"""How many connections to a service one process has, and who waits for one (`control.api.traffic`). No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from control.api.policy import Target
from control.api.traffic import ConnectionLimits
from control.client.state import State
from uproxy.plane import Plane, Waiter

PENDING_TIMEOUT_S: Final = 10.0
"""For a request to wait for a connection, unless its route says less; below the 15 s that a caller's uProxy waits for
one of opaque TCP."""

_NONE: Final = ConnectionLimits()


class Shared(Protocol):
    """A connection that carries requests beside each other."""

    @property
    def quiet(self) -> bool:
        """Whether it carries none."""

    def close(self) -> None: ...

    def retire(self) -> None:
        """Carry no more of them, and close when those that it carries have ended."""


class Limiter:
    """Counts the connections to one service. What was counted outlives a change of the limits."""

    __slots__ = ("_called", "_limits", "_making_room", "_open", "_plane", "_waiting", "idle", "shared")

    def __init__(self, data_plane: Plane) -> None:
        self._plane = data_plane
        self._limits = _NONE
        self._open = 0
        self._waiting: deque[Waiter[None]] = deque()
        self._called = 0  # who waited, were let, and have not tried yet
        self._making_room = False
        self.idle: dict[object, Callable[[], None]] = {}
        """How to close each connection that waits for a request, the longest idle first: they make room for others."""
        self.shared: dict[Shared, int] = {}
        """How many requests each has carried. They make room, too, while they are quiet."""

    @property
    def limits(self) -> ConnectionLimits:
        return self._limits

    @limits.setter
    def limits(self, limits: ConnectionLimits) -> None:
        if limits == self._limits:
            return
        self._limits = limits
        self.go_on()  # there may be more room now

    @property
    def counts(self) -> bool:
        """Whether there is anything to remember."""
        return bool(self._open or self._waiting or self._called)

    def take(self, *, waited: bool) -> bool:
        """Whether one more may be opened: then it is counted, and `release` ends that. Who has not `waited` does not go
        before those who do.
        """
        most = self._limits.connections
        if waited:
            self._called -= 1
        elif most and (self._waiting or self._called):
            return False
        if most and self._open >= most and not self._make_room():
            return False
        self._open += 1
        if waited and (not most or self._open + self._called < most):
            self.go_on()  # where the limit was raised there is room for more than one
        return True

    def _make_room(self) -> bool:
        """Whether there is some now. It is for who has asked."""
        self._making_room = True
        try:
            if self.idle:
                next(iter(self.idle.values()))()
            else:
                quiet = next((one for one in self.shared if one.quiet), None)
                if quiet is not None:
                    quiet.close()
        finally:
            self._making_room = False
        return self._open < self._limits.connections

    def carries(self, connection: Shared) -> None:
        """Another request is on a shared connection."""
        if connection in self.shared:
            self.shared[connection] += 1
            if 0 < self._limits.requests_each <= self.shared[connection]:
                connection.retire()

    def line_up(self, *, waited: bool) -> Waiter[None] | None:
        """Settled when it is worth trying again; None: too many wait. Who has `waited` is the next."""
        if not waited and len(self._waiting) >= self._limits.pending:
            self._waiting = deque(one for one in self._waiting if not one.settled)
            if len(self._waiting) >= self._limits.pending:
                return None
        waiter: Waiter[None] = Waiter(self._plane)
        if waited:
            self._waiting.appendleft(waiter)
        else:
            self._waiting.append(waiter)
        return waiter

    def release(self) -> None:
        """One that was counted is closed, or not opened after all."""
        self._open -= 1
        if not self._making_room:
            self.go_on()

    def go_on(self) -> None:
        """Let who waits longest try again: by `take`, or else it says `pass_on`."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.settled:
                self._called += 1
                waiter.set(None)
                return

    def pass_on(self) -> None:
        """Who was let does not take its turn."""
        self._called -= 1
        self.go_on()


class Limiters:
    """Those of the services that have limits, by the TrafficPolicies of each and of the Gateway."""

    def __init__(self, data_plane: Plane, state: State, gateway: str) -> None:
        """`gateway`: key of the Gateway."""
        self._plane = data_plane
        self._state = state
        self._gateway = gateway
        self._generation = -1
        self._known: dict[str, Limiter | None] = {}  # in this generation of the state
        self._limiters: dict[str, Limiter] = {}

    def at(self, service_key: str) -> Limiter | None:
        """None: nothing is limited."""
        if self._generation != self._state.generation:
            self._generation = self._state.generation
            self._known.clear()
            self._limiters = {its: limiter for its, limiter in self._limiters.items() if limiter.counts}
            for its in self._limiters:
                self._known[its] = self._find(its)  # who waits may go on by what holds now
        if service_key not in self._known:
            self._known[service_key] = self._find(service_key)
        return self._known[service_key]

    def _find(self, service_key: str) -> Limiter | None:
        limits = limits_of(self._state, self._gateway, service_key)
        limiter = self._limiters.get(service_key)
        if limiter is None:
            if limits is None:
                return None
            limiter = self._limiters[service_key] = Limiter(self._plane)
        limiter.limits = limits if limits is not None else _NONE
        return limiter if limits is not None else None


def limits_of(state: State, gateway: str, service_key: str) -> ConnectionLimits | None:
    """What TrafficPolicies of the service and of the Gateway say; of each limit that several say the lowest holds."""
    targets = Target("Gateway", gateway), Target("Service", service_key)
    policies = {one.key: one for t in targets for one in state.traffic_targeting(t.kind, t.key)}
    said = [one.connection_limits for one in policies.values() if one.connection_limits is not None]
    if not said:
        return None
    return ConnectionLimits(
        _lowest(one.connections for one in said),
        _lowest(one.pending for one in said),
        _lowest(one.requests_each for one in said),
    )


def _lowest(limits: Iterable[int]) -> int:
    return min((limit for limit in limits if limit), default=0)
