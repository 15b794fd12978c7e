"""Connections that a flip has overtaken: made directly, to a port where a policy is now missed on that way.

They are ended within five minutes, a few in a second, each in a quiet moment: nothing has moved for a second, and who
spoke last was the application here, so that nobody waits for its answer. In the last minute the quiet ones go first,
whoever spoke last, and then the others. Each is reset: a FIN could make an answer look whole that is not.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Final

from control.api.identity import SpiffeId
from uproxy.admission import Admission
from uproxy.errors import Flag
from uproxy.relay import Relay

LONGEST_S: Final = 300.0
"""By then all have ended, whatever they do."""
PATIENCE_S: Final = 240.0
"""For so long only a quiet moment ends one."""
QUIET_S: Final = 1.0
STEP_S: Final = 0.25
"""Between two looks. One connection is ended at a look, so four in a second, unless there are too many for the time."""


@dataclass(slots=True, eq=False)
class Direct:
    """One connection that its peer made for itself."""

    relay: Relay
    peer: SpiffeId
    port: int


@dataclass(slots=True, eq=False)
class _Overdue:
    """What is seen of one that must end. Times are monotonic seconds."""

    reason: str
    since: float
    moved: float
    """When bytes were last seen to have moved."""
    carried: int = -1
    """Bytes, in both directions, when it was last looked at."""

    def look(self, relay: Relay, now: float) -> None:
        carried = relay.sent + relay.received
        if carried != self.carried or relay.stalled:
            self.carried, self.moved = carried, now

    def rank(self, relay: Relay, now: float) -> int:
        """0: it may end now; 1, 2: it has to when the time comes near, the lower ones first."""
        if now - self.moved < QUIET_S:
            return 2
        return 0 if relay.answered else 1


class Overtaken:
    """Those of one process. No I/O and no clock of its own."""

    def __init__(self) -> None:
        self._direct: set[Direct] = set()
        self._overdue: dict[Direct, _Overdue] = {}  # in the order in which they came to be

    def add(self, direct: Direct) -> None:
        self._direct.add(direct)

    def remove(self, direct: Direct) -> None:
        self._direct.discard(direct)
        self._overdue.pop(direct, None)

    def judge(self, admission: Admission, now: float) -> int:
        """Say which have to end, by a configuration that has changed. How many these are."""
        for direct in self._direct:
            reason = admission.overtaken(direct.peer, direct.port)
            known = self._overdue.get(direct)
            if not reason:
                self._overdue.pop(direct, None)
            elif known is not None:
                known.reason = reason
            else:
                self._overdue[direct] = _Overdue(reason, now, now)
        return len(self._overdue)

    def step(self, now: float) -> int:
        """To be called every STEP_S: end some. How many are left."""
        if not self._overdue:
            return 0
        may_end: list[tuple[bool, int, Direct]] = []
        must_end: list[Direct] = []
        room = 1
        for older, (direct, overdue) in enumerate(self._overdue.items(), 1):
            overdue.look(direct.relay, now)
            waited = now - overdue.since
            # So many at each look, and those up to here are over in time.
            room = max(room, math.ceil(older / max(1, int((LONGEST_S - waited) / STEP_S))))
            rank = overdue.rank(direct.relay, now)
            if waited > LONGEST_S - STEP_S:
                must_end.append(direct)
            elif rank == 0 or waited >= PATIENCE_S:
                may_end.append((waited < PATIENCE_S, rank, direct))
        chosen = heapq.nsmallest(max(0, room - len(must_end)), may_end, key=lambda one: one[:2])
        for direct in [*must_end, *(direct for _, _, direct in chosen)]:
            reason = self._overdue[direct].reason
            self.remove(direct)
            direct.relay.cut(reason, Flag.WAYPOINT)
        return len(self._overdue)
