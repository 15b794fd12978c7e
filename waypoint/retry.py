"""Whether a request is sent once more, and when. No I/O.

Gateway API's HTTPRouteRetry (GEP-1731). What the route names by its status is sent again, whatever its method: whoever
wrote the route knows what an answer of 503 means. What was not answered at all is sent again only where that does no
more than once (RFC 9110 section 9.2.2), or where nobody was reached.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from control.api.route import Retry
from uproxy.health import RetryBudget

MAX_KEPT: Final = 64 * 1024
"""Bytes of a request's body that are kept to be sent again; a request with more is not."""
BUDGET_FLOOR: Final = 100
"""Of the requests of ten seconds to one service: Gateway API's minRetryRate, beside a fifth of them all."""
MAX_BUDGETS: Final = 1024
"""Services that are counted apart."""
_LONGEST: Final = 10
"""Times the route's backoff: Envoy's."""


def pause_s(retry: Retry, tried: int, chance: random.Random) -> float:
    """Seconds before another attempt, after `tried` were made: at least the route's backoff, and so that many do not
    come at once.
    """
    return retry.backoff_ms / 1000 * min(1 << (tried - 1), _LONGEST) * (1 + chance.random() / 4)


class Budgets:
    """Bounds how many requests to each service are sent again, so that a failure of many is not made worse."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives monotonic seconds."""
        self._clock = clock
        self._of: dict[str, RetryBudget] = {}

    def at(self, service: str) -> RetryBudget:
        """That of a service (its key)."""
        found = self._of.get(service)
        if found is None:
            if len(self._of) >= MAX_BUDGETS:
                del self._of[next(iter(self._of))]
            found = self._of[service] = RetryBudget(self._clock, BUDGET_FLOOR)
        return found
