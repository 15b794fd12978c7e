"""Packets between the hosts: a tcpdump on the underlay, and what its file says.

The search looks at each packet's bytes and at each TCP flow put together, so that a payload cannot hide in a
segment boundary.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Host
from uproxy import sandbox

_START_TIMEOUT_S = 10.0
_SETTLE_S = 5.0

_PCAP_MAGIC = 0xA1B2C3D4
_FILE_HEADER = struct.Struct("=IHHiIII")
_PACKET_HEADER = struct.Struct("=IIII")
_LINKTYPE_ETHERNET = 1

# TLS record types that carry a handshake and data, with the record version of TLS 1.3 (RFC 8446 section 5.1).
_TLS_RECORDS = (b"\x16\x03\x01", b"\x16\x03\x03", b"\x17\x03\x03")

Flow = tuple[bytes, int, bytes, int]
"""Source address and port, destination address and port."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One TCP packet."""

    flow: Flow
    sequence: int
    flags: int
    payload: bytes

    @property
    def ports(self) -> tuple[int, int]:
        return self.flow[1], self.flow[3]


class Capture:
    """A tcpdump on a host's port of the bridge while the block runs; afterwards its packets are at hand."""

    def __init__(self, host: Host, path: Path) -> None:
        self._host = host
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Capture:
        # -U: each packet is in the file as soon as it is seen. -Z root: no other user could write there.
        argv = ["tcpdump", "-i", self._host.name, "-U", "-n", "-s", "0", "--immediate-mode", "-B", "16384"]
        argv += ["-Z", "root", "-w", str(self._path)]
        lab = self._host.lab
        try:
            self._process = lab.spawn(argv, sandbox.NETNS_DIR / lab.underlay, stderr=subprocess.PIPE)
        except FileNotFoundError:
            raise LabError("tcpdump is not installed: apt-get install tcpdump") from None
        self._await_listening()
        return self

    def _await_listening(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        said = b""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while b"listening on" not in said:
            ready, _, _ = select.select([self._process.stderr], [], [], max(0.0, deadline - time.monotonic()))
            more = os.read(self._process.stderr.fileno(), 4096) if ready else b""
            if not more:
                raise LabError(f"tcpdump does not start: {said.decode(errors='replace').strip()}")
            said += more

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_SETTLE_S)
        finally:
            self._process.stderr.close()

    def file_bytes(self) -> bytes:
        return self._path.read_bytes()

    def segments(self) -> list[Segment]:
        """The TCP packets so far, in order."""
        return list(_segments(self.file_bytes()))

    def await_segment(self, port: int, timeout_s: float = _SETTLE_S) -> None:
        """Wait until a packet to or from this port is in the file: what came before it is then there too."""
        deadline = time.monotonic() + timeout_s
        while not any(port in segment.ports for segment in self.segments()):
            if time.monotonic() > deadline:
                raise LabError(f"tcpdump saw no packet of port {port}")
            time.sleep(0.02)


def occurs(needle: bytes, capture: bytes) -> bool:
    """Whether these bytes crossed, in one packet or over several of one flow."""
    if needle in capture:
        return True
    return any(needle in stream for stream in streams(_segments(capture)).values())


def streams(segments: Iterator[Segment] | list[Segment]) -> dict[Flow, bytes]:
    """What each direction of each connection carried, retransmissions dropped.

    A hole, which means that the capture lost a packet, stays visible as a NUL byte.
    """
    by_flow: dict[Flow, dict[int, bytes]] = {}
    for segment in segments:
        if segment.payload:
            pieces = by_flow.setdefault(segment.flow, {})
            pieces[segment.sequence] = max(pieces.get(segment.sequence, b""), segment.payload, key=len)
    return {flow: _joined(pieces) for flow, pieces in by_flow.items()}


def _joined(pieces: dict[int, bytes]) -> bytes:
    # Sequence numbers wrap at 2^32: order them by their distance from any one of the flow.
    origin = next(iter(pieces))
    whole = bytearray()
    expected: int | None = None
    for distance, payload in sorted(
        (((sequence - origin + 2**31) % 2**32) - 2**31, payload) for sequence, payload in pieces.items()
    ):
        fresh = payload
        if expected is not None and distance < expected:
            fresh = payload[expected - distance :]
        elif expected is not None and distance > expected:
            whole += b"\0"
        whole += fresh
        expected = max(expected or distance, distance + len(payload))
    return bytes(whole)


def tls_flows(segments: list[Segment], port: int) -> int:
    """How many flows of a port carry TLS records from their first byte on."""
    return sum(
        stream.startswith(_TLS_RECORDS) for flow, stream in streams(segments).items() if port in (flow[1], flow[3])
    )


def describe(segments: list[Segment]) -> str:
    """Packets and payload bytes by server port."""
    counts: dict[int, tuple[int, int]] = {}
    for segment in segments:
        port = min(segment.ports)
        packets, size = counts.get(port, (0, 0))
        counts[port] = (packets + 1, size + len(segment.payload))
    return ", ".join(f"port {port}: {packets} packets, {size} B" for port, (packets, size) in sorted(counts.items()))


def _segments(capture: bytes) -> Iterator[Segment]:
    if len(capture) < _FILE_HEADER.size:
        return
    magic, *_, link_type = _FILE_HEADER.unpack_from(capture)
    if magic != _PCAP_MAGIC or link_type != _LINKTYPE_ETHERNET:
        raise LabError("tcpdump wrote a file of another kind than pcap with Ethernet frames")
    at = _FILE_HEADER.size
    while at + _PACKET_HEADER.size <= len(capture):
        _, _, size, _ = _PACKET_HEADER.unpack_from(capture, at)
        at += _PACKET_HEADER.size
        segment = _tcp_of(capture[at : at + size])
        if segment is not None:
            yield segment
        at += size


def _tcp_of(frame: bytes) -> Segment | None:
    """The TCP packet in an Ethernet frame; IPv4 (RFC 791), IPv6 without extension headers (RFC 8200)."""
    ether_type = frame[12:14]
    if ether_type == b"\x08\x00" and frame[23] == socket.IPPROTO_TCP:
        start = 14 + (frame[14] & 0x0F) * 4
        end = 14 + int.from_bytes(frame[16:18], "big")
        source, destination = frame[26:30], frame[30:34]
    elif ether_type == b"\x86\xdd" and frame[20] == socket.IPPROTO_TCP:
        start = 54
        end = start + int.from_bytes(frame[18:20], "big")
        source, destination = frame[22:38], frame[38:54]
    else:
        return None
    source_port, destination_port, sequence = struct.unpack_from(">HHI", frame, start)
    payload = frame[start + (frame[start + 12] >> 4) * 4 : end]
    return Segment((source, source_port, destination, destination_port), sequence, frame[start + 13], payload)
