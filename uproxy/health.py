"""What a process remembers of endpoints that failed, and how much trying again it allows itself (docs/hbone.md 4).

Both are of this process alone, for seconds, and only about what happened before a byte of the application was sent. No
endpoint is given up for good: one that failed comes last until its time is over, and is tried when the others fail too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

FIRST_S: Final = 2.0
"""For which an endpoint comes last after a failure; doubled by each further one."""
LONGEST_S: Final = 30.0
MAX_REMEMBERED: Final = 4096
"""Endpoints; the one that failed first is forgotten for another."""

BUDGET_SHARE: Final = 0.2
"""Of the connections of the last ten seconds: as many may be tried on another endpoint."""
BUDGET_FLOOR: Final = 10
"""Connections in ten seconds that may be tried again however few there were."""
BUDGET_WINDOW_S: Final = 10.0


class Health:
    """Endpoints that failed a moment ago. A key is an endpoint's authority, or the address of a uProxy or waypoint."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives monotonic seconds."""
        self._clock = clock
        self._failed: dict[object, tuple[float, float]] = {}
        """Key -> until when it comes last, and for how long that was."""

    def __len__(self) -> int:
        """How many are remembered; 0, as nearly always, means that nobody needs to ask."""
        return len(self._failed)

    def failed(self, key: object) -> None:
        """It was not reached, or answered 503."""
        now = self._clock()
        until, lasted = self._failed.pop(key, (0.0, 0.0))
        if now < until:  # connections that were under way together are one failure
            self._failed[key] = (until, lasted)
            return
        lasts = min(2 * lasted, LONGEST_S) if lasted else FIRST_S
        if len(self._failed) >= MAX_REMEMBERED:
            del self._failed[next(iter(self._failed))]
        self._failed[key] = (now + lasts, lasts)

    def worked(self, key: object) -> None:
        self._failed.pop(key, None)

    def is_bad(self, key: object) -> bool:
        found = self._failed.get(key)
        return found is not None and self._clock() < found[0]

    def tick(self, now: float) -> None:
        """Forgets what nobody has tried again for a long time."""
        for key in [key for key, (until, _) in self._failed.items() if now - until > LONGEST_S]:
            del self._failed[key]


class RetryBudget:
    """Bounds how many connections are tried on a second endpoint, so that a failure of many is not made worse."""

    def __init__(self, clock: Callable[[], float], floor: int = BUDGET_FLOOR) -> None:
        """`clock` gives monotonic seconds. `floor`: as many are allowed in ten of them, however few there were."""
        self._clock = clock
        self._floor = floor
        self._began = clock()
        self._tried = self._tried_before = 0
        self._again = self._again_before = 0

    def tried(self) -> None:
        """A connection was given its first endpoint."""
        self._turn()
        self._tried += 1

    def allows(self) -> bool:
        """Whether one may be given another; it counts as given then."""
        before = self._turn()
        again = self._again + self._again_before * before
        if again >= self._floor + BUDGET_SHARE * (self._tried + self._tried_before * before):
            return False
        self._again += 1
        return True

    def _turn(self) -> float:
        """The share of the window before this one that still counts."""
        elapsed = self._clock() - self._began
        if elapsed >= BUDGET_WINDOW_S:
            recent = elapsed < 2 * BUDGET_WINDOW_S
            self._tried_before, self._again_before = (self._tried, self._again) if recent else (0, 0)
            self._tried = self._again = 0
            self._began += elapsed - elapsed % BUDGET_WINDOW_S
            elapsed %= BUDGET_WINDOW_S
        return 1.0 - elapsed / BUDGET_WINDOW_S
