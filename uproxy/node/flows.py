"""Tells uProxies of direct connections that ended, for their metrics and access logs: the caller's and the other's.

Nobody is waited for. What a uProxy does not take in time is counted, and it is told how much that was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bpf.flows import End
from bpf.flows import Flow as Record
from control.api.address import IpAddress, from_packed
from control.api.identity import SpiffeId
from uproxy.node import channel
from uproxy.node.channel import Flow
from uproxy.node.peers import Peer

_ENDS: Final = {End.CLOSED: "closed", End.RESET: "reset", End.FAILED: "failed"}
_NS: Final = 1_000_000_000


class FlowTeller:
    """Remembers how much each uProxy has missed."""

    def __init__(self, identity_at: Callable[[IpAddress], SpiffeId | None]) -> None:
        self._identity_at = identity_at
        self._missed: dict[str, int] = {}

    def tell(self, records: list[Record], peers: dict[str, Peer]) -> None:
        """`peers`: by the name of their workload."""
        for name, peer in peers.items():
            flows = [
                self._flow(record, inbound)
                for record in records
                for inbound, mine in (
                    (False, record.source_cgroup == peer.workload.app_cgroup),
                    (True, record.target_netns == peer.workload.netns_cookie),
                )
                if mine
            ]
            for at in range(0, len(flows), channel.MAX_FLOWS):
                batch = flows[at : at + channel.MAX_FLOWS]
                if peer.tell(channel.pack_flows(batch, self._missed.get(name, 0))):
                    self._missed.pop(name, None)
                else:
                    self._missed[name] = self._missed.get(name, 0) + len(batch)

    def _flow(self, record: Record, inbound: bool) -> Flow:
        source, target = from_packed(record.source), from_packed(record.target)
        identity = self._identity_at(source if inbound else target)
        return Flow(
            inbound=inbound,
            source=(source, record.source_port),
            target=(target, record.target_port),
            dialled=(from_packed(record.dialled), record.dialled_port),
            identity=str(identity) if identity is not None else "",
            sent=record.sent,
            received=record.received,
            srtt_us=record.srtt_us,
            retransmits=record.retransmits,
            duration_s=(record.closed_ns - record.opened_ns) / _NS,
            end=_ENDS[record.end],
        )
