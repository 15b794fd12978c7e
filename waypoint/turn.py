"""One attempt of a request, where endpoints are balanced: where it goes, and what is learnt of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from uproxy.errors import RefusedError
from uproxy.health import Health
from uproxy.resolve import MAX_HOPS, Hop
from waypoint import telemetry as flags
from waypoint.balancing import Balancer, Host
from waypoint.messages import End, Fields, ResponseEvent, ResponseHead
from waypoint.refusal import RefusalError

_OF_GRPC: Final = {b"2": 500, b"4": 504, b"13": 500, b"14": 503, b"15": 500}
"""Which statuses of gRPC say that the endpoint fails, and as what; others are answers."""
_FAILED: Final = frozenset({flags.BACKEND_BROKE, flags.BACKEND_UNREACHABLE, flags.TIMED_OUT})


class Turn:
    """The endpoint that an attempt goes to, and others should that not be reached.

    Each is chosen when it is asked for: whoever asks for the next one has not reached the one before.
    """

    __slots__ = ("_balancer", "_chosen", "_clock", "_grpc", "_health", "_host", "_told", "_tried", "_where", "cookie")

    def __init__(
        self,
        balancer: Balancer,
        health: Health,
        clock: Callable[[], float],
        where: int | None,
        cookie: bytes = b"",
        *,
        grpc: bool = False,
        tried: Sequence[Host] = (),
    ) -> None:
        """`where`: as of `Balancer.choose`. `cookie`: to be set with the answer, so that the next request comes here.

        Raises RefusedError when nobody is there.
        """
        self.cookie = cookie
        self._balancer = balancer
        self._health = health
        self._clock = clock
        self._where = where
        self._grpc = grpc
        self._tried = list(tried)
        self._chosen: list[Host] = []
        self._host: Host | None = None
        """Where it is now; None: it is over."""
        self._told = False
        """Whether it is known what became of it there."""
        first = self._choose()
        if first is None:
            raise RefusedError("no-endpoint", "every endpoint has failed too often, and is left alone for a while")
        self._go_to(first)

    def __getitem__(self, index: int) -> Hop:
        """Raises IndexError when there is no other one."""
        if index < len(self._chosen):
            host = self._chosen[index]
        else:
            self.unanswered(late=False)
            other = self._choose()
            if other is None or other in self._chosen:
                raise IndexError(index)
            host = other
        self._go_to(host)
        return host.hop

    def __iter__(self) -> Iterator[Hop]:
        for index in range(MAX_HOPS):
            try:
                yield self[index]
            except IndexError:
                return

    @property
    def tried(self) -> list[Host]:
        """By this attempt and those before it."""
        return [*self._tried, *self._chosen]

    def leave(self) -> None:
        """It is over. Again: nothing."""
        if self._host is not None:
            self._host.under_way -= 1
            self._host = None

    # -- what is learnt

    def read(self, events: Iterable[ResponseEvent]) -> None:
        """The endpoint has answered this."""
        for event in events:
            if isinstance(event, ResponseHead):
                if event.interim:
                    continue
                if not self._grpc or event.status != 200:
                    self.answered(event.status)
                else:
                    self._read_grpc(event.fields)
            elif self._grpc and isinstance(event, End):
                self._read_grpc(event.trailers)

    def _read_grpc(self, fields: Fields) -> None:
        for name, value in fields:
            if name == b"grpc-status":
                self.answered(_OF_GRPC.get(value, 200))

    def answered(self, status: int) -> None:
        """By this status, or as if by it."""
        if self._host is not None and not self._told:
            self._told = True
            self._balancer.answered(self._host, status, self._clock())

    def lost(self, refusal: RefusalError) -> None:
        """The attempt has come to this end."""
        if refusal.flag in _FAILED:
            self.unanswered(late=refusal.flag == flags.TIMED_OUT)

    def unanswered(self, *, late: bool) -> None:
        """`late`: it took too long."""
        if self._host is not None and not self._told:
            self._told = True
            self._balancer.unanswered(self._host, late=late, now=self._clock())

    def _choose(self) -> Host | None:
        is_bad = self._is_bad if self._health else None
        return self._balancer.choose(self._where, self.tried, is_bad, self._clock())

    def _is_bad(self, hop: Hop) -> bool:
        return self._health.is_bad(hop.authority) or self._health.is_bad(hop.address)

    def _go_to(self, host: Host) -> None:
        if host not in self._chosen:
            self._chosen.append(host)
        if host is not self._host:
            self.leave()
            host.under_way += 1
            self._host, self._told = host, False


Hops = tuple[Hop, ...] | Turn
"""Where an attempt may go, best first."""
