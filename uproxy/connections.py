"""The connections that are being relayed: to re-authorise them, to drain them, and to end half-closed ones.

Every relayed connection is here from its 200 to its end, so what this holds is what the process carries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from uproxy.telemetry import Connection

# A connection that one side has closed and on which nothing moves: applications that use half-close answer sooner, and
# without an end such sockets pile up for good when a peer forgets them (ztunnel#1629).
HALF_CLOSED_TIMEOUT_S = 600.0


class Carrier(Protocol):
    """What moves a connection's bytes: a `Relay`, or a waypoint's two streams."""

    active: bool
    """Whether bytes moved since somebody set it to False."""

    @property
    def half_closed(self) -> bool: ...

    def cut(self, text: str) -> None:
        """End it on both sides at once, as a reset; `text` says why."""


@dataclass(slots=True, eq=False)
class Live:
    """One relayed connection. `permitted` is asked again when policy changes: the text says why it must end."""

    relay: Carrier
    record: Connection
    permitted: Callable[[], str] | None
    half_closed_since: float = field(default_factory=time.monotonic)


class Connections:
    """The live connections of one process."""

    def __init__(self) -> None:
        self._live: set[Live] = set()

    def __len__(self) -> int:
        return len(self._live)

    def add(self, live: Live) -> None:
        self._live.add(live)

    def remove(self, live: Live) -> None:
        self._live.discard(live)

    def __iter__(self) -> Iterator[Live]:
        return iter(list(self._live))

    def records(self) -> list[Connection]:
        return [live.record for live in self._live]

    def reauthorise(self) -> int:
        """Ask every connection again whether policy allows it; cut those that it does not. Returns how many."""
        cut = 0
        for live in list(self._live):
            refusal = live.permitted() if live.permitted is not None else ""
            if refusal:
                live.relay.cut(refusal)
                cut += 1
        return cut

    def cut_all(self, text: str) -> None:
        """The drain time is over."""
        for live in list(self._live):
            live.relay.cut(text)

    def tick(self, now: float) -> None:
        """Called every few seconds: end what has been half-closed and silent for too long."""
        for live in list(self._live):
            if live.relay.active or not live.relay.half_closed:
                live.relay.active = False
                live.half_closed_since = now
            elif now - live.half_closed_since > HALF_CLOSED_TIMEOUT_S:
                live.relay.cut(f"half-closed and silent for {HALF_CLOSED_TIMEOUT_S:g} s")
