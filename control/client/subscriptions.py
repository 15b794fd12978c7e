"""The filters of one connection: which to ask for, and for which to ask again. Pure.

A broker need not be ready when it takes a subscription: nats-server 2.15 that has just started acknowledges it before
it has read what it retains, and sends none of that or a part, and nothing later. And what is published in the moment of
a subscription comes neither as live nor as retained: of the messages within 20 ms of it, 2 in 100. MQTT has no word for
the end of what is retained. But to subscribe again to the same filter brings all of it again (MQTT 3.1.1 section
3.8.4), and loses nothing. So each filter is asked for twice, and what stays doubtful for as long as it is.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

_HEADLESS: Final = frozenset(("policy", "reqauth", "traffic", "route", "index"))
"""Kinds whose filters have no topic at their root. In `ep/ns/service/#` that is the manifest, and the rest says little
without it."""


class Subscriptions:
    """What is wanted, what was asked of the broker, and what came of it."""

    def __init__(self) -> None:
        self._wanted: frozenset[str] = frozenset()
        self._held: set[str] = set()
        self._refused: set[str] = set()
        self._silent: set[str] = set()
        self._doubted: set[str] = set()
        self._asked: set[str] = set()
        self._asked_once: set[str] = set()

    def want(self, filters: frozenset[str]) -> None:
        """From now on it is exactly these."""
        self._wanted = filters

    @property
    def missing(self) -> list[str]:
        """What has to be asked for, in a fixed order."""
        return sorted(self._wanted - (self._held - self._doubted))

    @property
    def surplus(self) -> list[str]:
        """What is held and no longer wanted."""
        return sorted(self._held - self._wanted)

    @property
    def refused(self) -> frozenset[str]:
        """What is wanted, and the broker does not let us have."""
        return self._wanted & self._refused

    def asked(self, filters: Collection[str], refused: frozenset[str]) -> None:
        """The broker has answered."""
        granted = set(filters) - refused
        self._held = self._held - refused | granted
        self._silent |= granted
        self._doubted.difference_update(filters)
        self._asked_once = self._asked_once - granted | granted - self._asked
        self._asked |= granted
        self._refused = self._refused - granted | refused

    def dropped(self, filters: Collection[str]) -> None:
        """The broker sends these no more."""
        for each in (self._held, self._asked, self._asked_once):
            each.difference_update(filters)

    def heard(self, topic: str) -> None:
        """Something came. A filter is a topic, or a level and all below it (`x/#`)."""
        self._silent -= {topic, f"{topic}/#"}
        levels = topic.split("/")
        if _HEADLESS.intersection(levels[3:4]):  # mesh/v1/<trust domain>/<kind>/...
            self._silent.discard("/".join((*levels[:-1], "#")))

    def look_again(self) -> None:
        """Ask a second time for what was asked for once."""
        self._doubted |= self._asked_once

    def doubt_silent(self) -> None:
        """Ask again for what brought nothing. There may be nothing."""
        self._doubted |= self._silent

    def doubt_all(self) -> None:
        """Ask again for everything."""
        self._doubted |= self._held
