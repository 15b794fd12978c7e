from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lab import capture
from benchmarks.lab.sources import LabError

_HEADER = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1)


def _frame(payload: bytes, sequence: int, *, ports: tuple[int, int] = (40000, 7777), ipv6: bool = False) -> bytes:
    """An Ethernet frame with a TCP packet, padded as short frames are."""
    tcp = struct.pack(">HHIIBBHHH", *ports, sequence % 2**32, 0, 5 << 4, 0x18, 100, 0, 0) + payload
    if ipv6:
        ip = struct.pack(">IHBB", 6 << 28, len(tcp), 6, 64) + bytes(15) + b"\1" + bytes(15) + b"\2"
        return bytes(12) + b"\x86\xdd" + ip + tcp
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + b"\x0a\0\0\1" + b"\x0a\0\0\2"
    return (bytes(12) + b"\x08\x00" + ip + tcp).ljust(60, b"\xaa")


def _file(*frames: bytes) -> bytes:
    return _HEADER + b"".join(struct.pack("=IIII", 0, 0, len(frame), len(frame)) + frame for frame in frames)


@given(
    st.binary(min_size=1, max_size=400),
    st.lists(st.integers(0, 400), max_size=12),
    st.integers(0, 2**32 - 1),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_flow_is_put_together_whatever_the_packets(
    content: bytes, cuts: list[int], origin: int, random: object, ipv6: bool
) -> None:
    """Any segmentation, order and retransmission; sequence numbers that wrap."""
    edges = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    frames = [_frame(content[a:b], origin + a, ipv6=ipv6) for a, b in pairwise(edges)]
    frames += [_frame(content, origin, ipv6=ipv6)] * (len(cuts) % 2)
    random.shuffle(frames)  # type: ignore[attr-defined]
    (stream,) = capture.streams(list(capture._segments(_file(*frames)))).values()
    assert stream == content


@given(st.binary(min_size=8, max_size=64), st.integers(1, 63))
def test_needle_over_two_packets_is_found(needle: bytes, cut: int) -> None:
    cut = min(cut, len(needle) - 1)
    whole = b"before " + needle + b" after"
    at = 7 + cut
    assert capture.occurs(needle, _file(_frame(whole[:at], 5), _frame(whole[at:], 5 + at)))


def test_lost_packet_does_not_join_its_neighbours() -> None:
    assert not capture.occurs(b"secret", _file(_frame(b"sec", 1), _frame(b"ret", 9)))


def test_padding_is_no_payload() -> None:
    (segment,) = capture._segments(_file(_frame(b"", 1)))
    assert segment.payload == b""


def test_tls_is_told_from_plaintext() -> None:
    tls = list(capture._segments(_file(_frame(b"\x17\x03\x03\x00\x10...", 1, ports=(40000, 15008)))))
    plain = list(capture._segments(_file(_frame(b"GET / HTTP/1.1", 1, ports=(40000, 15008)))))
    assert capture.tls_flows(tls, 15008) == 1
    assert capture.tls_flows(plain, 15008) == 0


def test_other_kind_of_file_is_refused() -> None:
    with pytest.raises(LabError, match="another kind"):
        list(capture._segments(b"\x0a\x0d\x0d\x0a" + bytes(60)))
