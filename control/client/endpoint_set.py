"""The endpoints of one service, which no root lists: which of them are current, and whether they are all there.

Each workload's newest endpoint counts. The service's manifest has their number and a digest over their stamps; they
are *whole* when it is that of the newest manifest. Stamps alone do not do after a proxy was away for long (tombstones
have been cleared meanwhile) or the control plane was restored (it may publish an older stamp again): if instead
exactly what the broker holds now, that is the newest of each received in this session, is what the newest manifest
says, then that is what counts.

Invariants: an endpoint that a manifest has left out never comes back with a stamp that is not above that manifest's;
within a session, none goes back, in whatever order messages come.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from control.api.index import Manifest, manifest_digest
from control.api.messages import Stamp

Version = tuple[Stamp, bytes]
"""Stamp and payload of a live endpoint."""
_Seen = tuple[Stamp, bytes | None]
"""The same of what arrived; None: a tombstone."""

_NEVER: Final = (-1, -1)
_ENTRY_BYTES: Final = 300  # what an endpoint takes beside its payload
_MAX_GONE: Final = 1000  # of one service, between two manifests; one forgotten can but come back until the next


class EndpointSet:
    """Pure. Workloads are named by their topic level.

    What is received counts at once. Comparing with the manifest takes time in proportion to the number of endpoints
    (6 ms for 10,000), so it is a step of its own: `settle`, due while `unsettled`.
    """

    __slots__ = (
        "_floor",
        "_gone",
        "_manifest",
        "_manifest_seen",
        "_seen",
        "bytes",
        "live",
        "manifest_payload",
        "unsettled",
        "whole",
    )

    def __init__(self) -> None:
        self.live: dict[str, Version] = {}
        self.whole = False
        self.unsettled = False
        self.manifest_payload: bytes | None = None
        """Of the newest manifest."""
        self._manifest: tuple[Stamp, Manifest] | None = None
        self._manifest_seen = False
        """Whether the newest manifest is of this session."""
        self._floor: Stamp = _NEVER
        """Of the manifest that last was matched: what it left out is gone, up to here."""
        self._gone: dict[str, Stamp] = {}
        """Workloads whose endpoint was taken back above the floor."""
        self._seen: dict[str, _Seen] = {}
        """The newest that arrived in this session, though `live` may have a newer one of an earlier session."""
        self.bytes = 0
        """What is kept, at most; also what does not count now."""

    def start_session(self) -> None:
        """A new connection: the broker sends everything again."""
        self._seen.clear()
        self._manifest_seen = False
        self._count()

    def receive(self, workload: str, stamp: Stamp, payload: bytes | None) -> bool:
        """Takes one endpoint (None: its tombstone). Returns whether the workload has another endpoint now, or none."""
        self.bytes -= self._size_of(workload)
        arrived, seen, held = (stamp, payload), self._seen.get(workload), self.live.get(workload)
        if seen is None or stamp >= seen[0]:
            # One object for both where they agree, so that a reconnect costs no memory.
            self._seen[workload] = held if held is not None and held == arrived else arrived
            if payload is None and stamp <= self._floor:
                del self._seen[workload]  # no manifest lists what came before it
        changed = self._take_newer(workload, stamp, payload)
        self.bytes += self._size_of(workload)
        if len(self._gone) > _MAX_GONE:
            self._forget_gone(next(iter(self._gone)))
        if changed:
            self.whole = False
        # No manifest speaks of what is newer than it is, so there is nothing to compare until the next one.
        if self._manifest is not None and stamp <= self._manifest[0] and not self.whole:
            self.unsettled = True
        return changed

    def receive_manifest(self, stamp: Stamp, manifest: Manifest, payload: bytes) -> None:
        """Takes a manifest."""
        if self._manifest is not None and stamp < self._manifest[0]:
            return
        self._manifest_seen = True
        # One of the same stamp that says otherwise is damaged, or the one before was. The broker's present word counts,
        # so that damage does not last.
        if (stamp, manifest) != self._manifest:
            self._manifest, self.manifest_payload = (stamp, manifest), payload
            self.whole = False
        self.unsettled = not self.whole

    def settle(self) -> list[str]:
        """Finds out whether the endpoints are whole. Returns the workloads that had to be put right for it."""
        self.unsettled = False
        if self._manifest is None or self.whole:
            return []
        changed: list[str] = []
        if self._is_listed(self.live):
            self.whole = True
        elif self._manifest_seen and self._is_listed(seen := self._seen_live()):
            self.whole = True
            before, self.live = self.live, seen
            workloads = sorted(before.keys() | self.live.keys())
            changed = [workload for workload in workloads if before.get(workload) != self.live.get(workload)]
        if self.whole:
            self._floor = self._manifest[0]
            self._gone = {workload: stamp for workload, stamp in self._gone.items() if stamp > self._floor}
            for workload in [
                name for name, (stamp, payload) in self._seen.items() if payload is None and stamp <= self._floor
            ]:
                del self._seen[workload]
            self._count()
        return changed

    def progress(self) -> str:
        """How far it is, for people."""
        if self._manifest is None:
            return "no manifest yet"
        return f"{len(self.live)} of {self._manifest[1].count}"

    def _forget_gone(self, workload: str) -> None:
        self.bytes -= self._size_of(workload)
        del self._gone[workload]
        if workload in self._seen and self._seen[workload][1] is None:
            del self._seen[workload]
        self.bytes += self._size_of(workload)

    def _seen_live(self) -> dict[str, Version]:
        return {workload: (stamp, payload) for workload, (stamp, payload) in self._seen.items() if payload is not None}

    def _count(self) -> None:
        held = sum(map(_size, self.live.values())) + sum(map(_size, self._seen.values()))
        self.bytes = held + len(self._gone) * _ENTRY_BYTES

    def _size_of(self, workload: str) -> int:
        return (
            _size(self.live.get(workload)) + _size(self._seen.get(workload)) + (workload in self._gone) * _ENTRY_BYTES
        )

    def _take_newer(self, workload: str, stamp: Stamp, payload: bytes | None) -> bool:
        held = self.live.get(workload)
        if held is not None:
            if stamp < held[0] or (stamp == held[0] and payload in (held[1], None)):
                return False
        elif stamp <= self._gone.get(workload, self._floor):
            return False
        if payload is None:
            self._gone.pop(workload, None)
            self._gone[workload] = stamp  # the latest comes last
            return self.live.pop(workload, None) is not None
        self._gone.pop(workload, None)
        self.live[workload] = stamp, payload
        return True

    def _is_listed(self, endpoints: Mapping[str, Version]) -> bool:
        assert self._manifest is not None
        manifest = self._manifest[1]
        if len(endpoints) != manifest.count:
            return False
        return manifest_digest({workload: stamp for workload, (stamp, _) in endpoints.items()}) == manifest.digest


def _size(version: _Seen | None) -> int:
    """A tombstone is counted as what is gone."""
    return _ENTRY_BYTES + len(version[1]) if version is not None and version[1] is not None else 0
