"""What is known of the configuration, as far as it is in force where requests are served. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from control.api.status import Knowledge


class InForce:
    """Follows batches of configuration, which are numbered, to those who serve, and tells what those have applied."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, Knowledge]] = deque()
        """What was known when a batch was the newest one, of those that are not in force."""
        self._confirmed = Knowledge(False, (), {})

    def progressed(self, newest: int, applied: int, known: Callable[[], Knowledge]) -> None:
        """More may be known now, and everything that follows from it is in the newest batch."""
        if applied >= newest:
            return  # then all that is known is in force
        if self._marks and self._marks[-1][0] == newest:
            self._marks.pop()
        self._marks.append((newest, known()))

    def settle(self, applied: int) -> None:
        """Everything up to a batch is in force."""
        while self._marks and self._marks[0][0] <= applied:
            self._confirmed = self._marks.popleft()[1]

    def told(self, newest: int, applied: int, known: Knowledge, missing: tuple[str, ...]) -> Knowledge:
        """What of all that is known is in force; not whole while any of those who serve is `missing`."""
        if applied >= newest:
            self._marks.clear()
            self._confirmed = known
        if missing:
            return Knowledge(False, (*missing, *self._confirmed.waiting), self._confirmed.roots)
        return self._confirmed
