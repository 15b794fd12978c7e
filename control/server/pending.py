"""What the broker has not acknowledged yet: topics, in groups that are published one after the other.

A group is a namespace, or all addresses; within it the order is that of `publication.rank`. What is published is what
the store holds when the group's turn comes, so a broker that was away for long is told the last state and not each of
those before. What somebody changed comes before what an audit found, which may be everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class Pending:
    """Topics that wait, by group. A group whose turn has come waits no more, and may be changed again meanwhile."""

    def __init__(self) -> None:
        self._soon: dict[str, set[str]] = {}
        self._later: dict[str, set[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._soon or self._later)

    def __contains__(self, topic: str) -> bool:
        return any(topic in topics for queue in (self._soon, self._later) for topics in queue.values())

    def waiting(self, group: str) -> int:
        """How many topics of a group wait."""
        return len(self._soon.get(group, ())) + len(self._later.get(group, ()))

    def add(self, topics: Mapping[str, Iterable[str]], *, soon: bool) -> None:
        """Group -> topics to publish: `soon` those that somebody changed."""
        queue = self._soon if soon else self._later
        for group, found in topics.items():
            queue.setdefault(group, set()).update(found)
            if not queue[group]:
                del queue[group]

    def clear(self) -> None:
        self._soon.clear()
        self._later.clear()

    def take(self) -> frozenset[str]:
        """All topics of the group whose turn it is; empty when nothing waits."""
        queue = self._soon or self._later
        if not queue:
            return frozenset()
        group = next(iter(queue))
        return frozenset(self._soon.pop(group, ())) | frozenset(self._later.pop(group, ()))
