"""Connections and requests as they happen, for whoever watches: the access log's lines, in JSON, as they come.

Watching must not cost the traffic. A watcher gets at most 1,000 lines in a second, a few microseconds each; what is
more than that, or comes while it does not read, is left out, counted, and told in a line of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Protocol

from uproxy.access_log import Fields, json_line

MAX_TAPS: Final = 4
"""Watchers at once; two people and their mistakes."""
INTERVAL_S: Final = 0.1
"""Between two writes to a watcher: soon enough for people, and one system call for many lines."""
MAX_LINES: Final = 100
"""In such an interval and for one watcher; formatting them takes less than 1 % of it."""
MAX_WAITING: Final = 256 * 1024
"""Bytes that wait in a watcher's connection; while there are more, nothing is added to them."""


class Outlet(Protocol):
    """Where a watcher reads."""

    @property
    def waiting(self) -> int:
        """Bytes that it was sent and has not taken."""

    def write(self, data: bytes) -> None: ...


class Taps:
    """The watchers of one process."""

    def __init__(self) -> None:
        self.on_change: Callable[[], None] = _nothing
        """Called when there are watchers, and when there are none any more."""
        self.watched = False
        """Whether there are any; while not, nobody needs to tell them anything."""
        self._taps: set[_Tap] = set()

    @property
    def full(self) -> bool:
        return len(self._taps) >= MAX_TAPS

    def add(self, outlet: Outlet) -> Callable[[], None]:
        """A watcher, from now until what is returned is called."""
        tap = _Tap(outlet)
        self._taps.add(tap)
        self._changed()

        def remove() -> None:
            self._taps.discard(tap)
            tap.close()
            self._changed()

        return remove

    def _changed(self) -> None:
        before, self.watched = self.watched, bool(self._taps)
        if self.watched is not before:
            self.on_change()

    def note(self, message: str, level: str, fields: Fields) -> None:
        """Something happened: to be called only when there are watchers."""
        line = ""
        for tap in self._taps:
            if tap.has_room():
                line = line or json_line(message, level, fields, time.time())
                tap.write(line)

    def pass_on(self, lines: bytes) -> None:
        """Lines that another process has made."""
        for line in lines.decode("ascii").splitlines(keepends=True):
            for tap in self._taps:
                if tap.has_room():
                    tap.write(line)


def _nothing() -> None:
    pass


class _Tap:
    """One watcher, and what it has not been sent yet."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._lines: list[str] = []
        self._left_out = 0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def has_room(self) -> bool:
        """Whether another line is taken; if not, it counts as left out."""
        if len(self._lines) < MAX_LINES:
            return True
        self._left_out += 1
        self._arm()
        return False

    def write(self, line: str) -> None:
        self._lines.append(line)
        self._arm()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(INTERVAL_S, self._send)

    def _send(self) -> None:
        self._timer = None
        if self._outlet.waiting > MAX_WAITING:
            self._arm()  # what was left out is told when it reads again
            return
        if self._left_out:
            count, self._left_out = self._left_out, 0
            self._lines.append(json_line("left out", "warning", lambda field: [field("lines", count)], time.time()))
        self._outlet.write("".join(self._lines).encode("ascii"))
        self._lines.clear()
