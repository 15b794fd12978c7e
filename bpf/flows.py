"""Direct connections that have closed, as sock_ops recorded them: `struct mesh_flow`."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from bpf import layout, libbpf
from bpf.ringbuf import Ring

RECORD: Final = struct.Struct("=7Q16s16s16s5I4HI")
"""struct mesh_flow; a test compares it. Three times as fast as reading it through cffi."""
_ENDS: Final = layout.members("mesh_flow_end")


class End(IntEnum):
    """How a direct connection ended."""

    CLOSED = _ENDS["MESH_FLOW_CLOSED"]
    RESET = _ENDS["MESH_FLOW_RESET"]
    """By either end, by a timeout, or by us."""
    FAILED = _ENDS["MESH_FLOW_FAILED"]
    """Refused or timed out: it was never established."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Addresses are 16 packed bytes, times CLOCK_MONOTONIC."""

    source_cgroup: int
    source_netns: int
    target_netns: int
    opened_ns: int
    closed_ns: int
    sent: int
    """Bytes that the caller sent and the destination acknowledged."""
    received: int
    source: bytes
    target: bytes
    dialled: bytes
    service_id: int
    """Of the service that was dialled; 0 when it was the workload itself."""
    source_id: int
    target_id: int
    srtt_us: int
    retransmits: int
    source_port: int
    target_port: int
    dialled_port: int
    end: End


class Flows:
    """The one reader of the map `flows`."""

    def __init__(self, fd: int) -> None:
        self._ring = Ring(fd, libbpf.map_capacity(fd), RECORD)

    def drain(self) -> list[Flow]:
        """Those that closed since the last call, in that order. The counter `flows_lost` counts what did not fit."""
        found = []
        for *fields, end, _ in self._ring.drain():
            fields.append(End(end))
            found.append(Flow(*fields))
        return found

    def close(self) -> None:
        self._ring.close()
