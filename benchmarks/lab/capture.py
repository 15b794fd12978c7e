"""Packets between the hosts, or on every interface of one: a tcpdump, and what its file says.

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

_START_TIMEOUT_S = 120.0
_SETTLE_S = 5.0

_PCAP_MAGIC = 0xA1B2C3D4
_FILE_HEADER = struct.Struct("=IHHiIII")
_PACKET_HEADER = struct.Struct("=IIII")
# Link types of pcap-linktype(7) -> where the EtherType is, and where the packet begins.
_ETHERNET, _COOKED = 1, 276
_LAYOUTS = {_ETHERNET: (12, 14), _COOKED: (0, 20)}

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
    """A tcpdump on a host's port of the bridge while the block runs; afterwards its packets are at hand.

    `everywhere`: on every interface of the host instead, its workloads' among them, each packet once for each.
    """

    def __init__(self, host: Host, path: Path, *, everywhere: bool = False) -> None:
        self._host = host
        self._path = path
        self._everywhere = everywhere
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Capture:
        # -U: each packet is in the file as soon as it is seen. -Z root: no other user could write there.
        interface = ["any", "-y", "LINUX_SLL2"] if self._everywhere else [self._host.name]
        argv = ["tcpdump", "-i", *interface, "-U", "-n", "-s", "0", "--immediate-mode", "-B", "16384"]
        argv += ["-Z", "root", "-w", str(self._path)]
        lab = self._host.lab
        try:
            where = self._host.netns if self._everywhere else lab.underlay
            self._process = lab.spawn(argv, sandbox.NETNS_DIR / where, stderr=subprocess.PIPE)
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
    if magic != _PCAP_MAGIC or link_type not in _LAYOUTS:
        raise LabError("tcpdump wrote a file of another kind than pcap with Ethernet or cooked frames")
    type_at, begin = _LAYOUTS[link_type]
    at = _FILE_HEADER.size
    while at + _PACKET_HEADER.size <= len(capture):
        _, _, size, _ = _PACKET_HEADER.unpack_from(capture, at)
        at += _PACKET_HEADER.size
        frame = capture[at : at + size]
        segment = _tcp_of(frame[type_at : type_at + 2], frame[begin:])
        if segment is not None:
            yield segment
        at += size


def _tcp_of(ether_type: bytes, packet: bytes) -> Segment | None:
    """The TCP packet in a frame; IPv4 (RFC 791), IPv6 without extension headers (RFC 8200)."""
    if ether_type == b"\x08\x00" and packet[9] == socket.IPPROTO_TCP:
        start = (packet[0] & 0x0F) * 4
        end = int.from_bytes(packet[2:4], "big")
        source, destination = packet[12:16], packet[16:20]
    elif ether_type == b"\x86\xdd" and packet[6] == socket.IPPROTO_TCP:
        start = 40
        end = start + int.from_bytes(packet[4:6], "big")
        source, destination = packet[8:24], packet[24:40]
    else:
        return None
    source_port, destination_port, sequence = struct.unpack_from(">HHI", packet, start)
    payload = packet[start + (packet[start + 12] >> 4) * 4 : end]
    return Segment((source, source_port, destination, destination_port), sequence, packet[start + 13], payload)
