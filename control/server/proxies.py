"""What is to be said of every proxy: does it run what it should, how old is that, and what is wrong with it.

Pure: reports, roots and declared workloads in, rows out. A report is what a proxy says of itself; what it cannot know
(that it is behind, or silent) is worked out here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from control.api.status import Kind, ProxyStatus, RootStamp, root_title
from control.api.topics import StatusTopic


class State(Enum):
    """The worst thing that is true of a proxy."""

    CURRENT = "current"
    BEHIND = "behind"
    """A newer root than the one it has applied was published."""
    WAITING = "waiting"
    """It lacks something that it needs."""
    OFFLINE = "offline"
    """Its last will, or it took leave."""
    SILENT = "silent"
    """Its lease has run out without a last will."""
    ABSENT = "absent"
    """Declared, and nothing was heard of it."""


_GONE = (State.OFFLINE, State.SILENT)


@dataclass(frozen=True, slots=True)
class Row:
    """One proxy."""

    workload: str
    """`namespace/name`."""
    proxy_hash: str
    """Of the identity that it reports with."""
    state: State
    status: ProxyStatus | None
    """None: absent."""
    version: tuple[int, int] | None
    """The newest (epoch, version) that it has applied."""
    age_s: float | None
    """Since the control plane vouched for the oldest root that it has."""
    notes: tuple[str, ...]
    """What to know of it, the most important first."""


def rows(
    reports: Mapping[StatusTopic, tuple[ProxyStatus, float]],
    roots: Mapping[str, RootStamp],
    declared: Mapping[str, str],
    now: float,
) -> list[Row]:
    """One row for each report and each declared workload without any, by name.

    Of a workload that nobody declares any more there is none once it is gone: nothing is wrong then.

    `reports`: with the Unix time at which each came; `declared`: workload's key -> proxy hash of its identity.
    """
    found = [_row(topic, status, at, roots, declared, now) for topic, (status, at) in reports.items()]
    seen = {(status.workload, topic.proxy_hash) for topic, (status, _) in reports.items()}
    found = [row for row in found if row.state not in _GONE or _expected(row, declared)]
    found += [Row(*named, State.ABSENT, None, None, None, ()) for named in declared.items() if named not in seen]
    return sorted(found, key=lambda row: (row.workload, row.proxy_hash))


def _expected(row: Row, declared: Mapping[str, str]) -> bool:
    """Whether somebody counts on this proxy. Node agents are not declared; whoever made one wants to know of it."""
    is_node = row.status is not None and row.status.kind is Kind.NODE
    return is_node or declared.get(row.workload) == row.proxy_hash


def _row(
    topic: StatusTopic,
    status: ProxyStatus,
    received_at: float,
    roots: Mapping[str, RootStamp],
    declared: Mapping[str, str],
    now: float,
) -> Row:
    behind = sorted(name for name, root in status.roots.items() if name in roots and root[:2] < roots[name][:2])
    if not status.online:
        state = State.OFFLINE
    elif now - received_at > status.lease_s:
        state = State.SILENT
    elif not status.whole:
        state = State.WAITING
    else:
        state = State.BEHIND if behind else State.CURRENT
    notes: list[str] = []
    if declared.get(status.workload, topic.proxy_hash) != topic.proxy_hash:
        notes.append("reports under another identity than its WorkloadEntry's")
    if behind:
        notes.append(f"behind in {', '.join(map(root_title, behind))}")
    notes += (f"waits for {text}" for text in status.waiting)
    notes += reversed(status.problems)
    return Row(
        workload=status.workload,
        proxy_hash=topic.proxy_hash,
        state=state,
        status=status,
        version=max((root[:2] for root in status.roots.values()), default=None),
        age_s=now - min(root[2] for root in status.roots.values()) if status.roots else None,
        notes=tuple(notes),
    )


def all_well(rows: Iterable[Row]) -> bool:
    return all(row.state is State.CURRENT for row in rows)
