"""Messages that have arrived and that no applied root lists: of a change that is not whole yet, or nobody's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from control.api.messages import Stamp
from control.api.topics import AddressesTopic, IndexedTopic, IndexTopic

MAX_BYTES: Final = 32 * 1024 * 1024
"""Twice what 100,000 addresses take in all, the largest thing that is applied at once."""
MAX_VERSIONS: Final = 4
"""Of one topic: a few changes in a row may be under way, reordered."""
_OVERHEAD_BYTES: Final = 500  # what an entry takes beside its payload

ListedTopic = IndexedTopic | IndexTopic | AddressesTopic


@dataclass(frozen=True, slots=True)
class Arrival:
    """One message that a root may list yet."""

    topic: ListedTopic
    owner: str
    """Namespace of the root that would list it; empty for addresses."""
    stamp: Stamp
    vouched: int
    """How often the applied root had been signed anew when this arrived."""
    payload: bytes


class Inbox:
    """Arrivals by topic and SHA-256. What exceeds the bounds pushes out what came first."""

    def __init__(self) -> None:
        self._topics: dict[str, dict[bytes, Arrival]] = {}
        self._bytes = 0

    def put(self, topic: str, digest: bytes, arrival: Arrival) -> bool:
        """Keeps an arrival. Returns whether others had to go because all of it together was too much."""
        # A topic's latest arrival is what the broker retains now, so all of the topic moves to the end.
        versions = self._topics[topic] = self._topics.pop(topic, {})
        if digest in versions:
            versions[digest] = versions.pop(digest)
            return False
        versions[digest] = arrival
        self._bytes += _size(arrival)
        if len(versions) > MAX_VERSIONS:
            self.discard(topic, next(iter(versions)))
        full = self._bytes > MAX_BYTES
        while self._bytes > MAX_BYTES:
            oldest = next(iter(self._topics))
            self.discard(oldest, next(iter(self._topics[oldest])))
        return full

    def get(self, topic: str, digest: bytes) -> Arrival | None:
        return self._topics.get(topic, {}).get(digest)

    def discard(self, topic: str, digest: bytes) -> None:
        """Forgets one arrival, if it is here."""
        versions = self._topics.get(topic, {})
        arrival = versions.pop(digest, None)
        if arrival is not None:
            self._bytes -= _size(arrival)
            if not versions:
                del self._topics[topic]

    def forget(self, topic: str) -> None:
        """Forgets all versions of a topic."""
        for digest in list(self._topics.get(topic, {})):
            self.discard(topic, digest)

    def of(self, owner: str) -> list[tuple[str, bytes, Arrival]]:
        """Topic, digest and arrival of everything that one root would list."""
        return [
            (topic, digest, arrival)
            for topic, versions in self._topics.items()
            for digest, arrival in versions.items()
            if arrival.owner == owner
        ]


def _size(arrival: Arrival) -> int:
    return len(arrival.payload) + _OVERHEAD_BYTES
