"""Maps with no room left: what does not fit is refused, and never goes out in plaintext."""

from __future__ import annotations

import errno

import pytest

from bpf import layout, libbpf
from bpf.libbpf import BpfError
from bpf.maps import Route, Target
from control.api.address import IpAddress, packed16
from tests.bpf.dialling import dial
from tests.bpf.test_sendmsg import datagram
from tests.support.capture import (
    KNOWN_V4,
    NOT_CAPTURED,
    OUTSIDE_V4,
    PEER_V4,
    PEER_V6,
    PORT,
    SERVICE,
    UNKNOWN_V4,
    VIP_V4,
    WORKLOAD,
    Rig,
)

pytestmark = pytest.mark.root
ELSEWHERE = int.from_bytes(packed16(IpAddress("fd77::")), "big")
"""Filler: addresses that nobody dials."""


def filler(number: int) -> list[bytes]:
    return [(ELSEWHERE + one).to_bytes(16, "big") for one in range(number)]


@pytest.mark.parametrize("name", ["services", "workloads"])
def test_a_destination_for_which_there_is_no_room_is_refused(rig: Rig, counted, name):
    targets = getattr(rig.maps, name)
    kept, lacking = ((VIP_V4, PORT), (UNKNOWN_V4, PORT)) if name == "services" else ((KNOWN_V4, 0), (PEER_V4, 0))
    keys = [(address, PORT) for address in filler(targets.capacity() - len(targets))]
    targets.put_all(dict.fromkeys(keys, Target(1, Route.TUNNEL)), 1)
    try:
        assert len(targets) == targets.capacity()
        with pytest.raises(BpfError) as full:
            targets.put_all({(packed16(IpAddress(lacking[0])), lacking[1]): WORKLOAD}, 2)
        assert full.value.errno == errno.E2BIG
        with rig.site.uproxy(), rig.site.outside(PORT):
            with pytest.raises(ConnectionRefusedError):
                rig.site.in_app(lambda: dial(lacking[0], PORT))
            assert counted() == {"refused_no_config": 1}
            assert len(rig.site.in_app(lambda: dial(kept[0], PORT))) == 64, "what is in it works on"
            assert rig.site.in_app(lambda: dial(OUTSIDE_V4, PORT)) == b"outside"
    finally:
        targets.delete_all(keys)


@pytest.mark.parametrize("address", [VIP_V4, PEER_V4, PEER_V6])
def test_a_connection_whose_destination_cannot_be_filed_reaches_nobody_but_the_uproxy(rig: Rig, counted, address):
    rig.maps.services.put((packed16(IpAddress(address)), PORT), SERVICE, 5)
    orig = rig.maps.orig
    fill = [layout.pack("mesh_orig_key", addr=one, port=1) for one in filler(orig.capacity())]
    libbpf.update_all(orig.fd, orig.size, fill, [bytes(orig.size.value)] * len(fill))
    try:
        with rig.site.uproxy(), rig.site.outside(PORT):
            assert rig.site.in_app(lambda: dial(address, PORT)) == NOT_CAPTURED
        assert counted() == {"captured": 1, "orig_full": 1, "orig_missing": 1}
    finally:
        libbpf.delete_all(orig.fd, orig.size, fill)
    with rig.site.uproxy():
        assert len(rig.site.in_app(lambda: dial(address, PORT))) == 64


def test_half_a_batch_that_does_not_fit_can_be_told_from_none(rig: Rig):
    """What a batch that failed has written is there to be read."""
    services = rig.maps.services
    room = services.capacity() - len(services)
    keys = [(address, PORT) for address in filler(room + 10)]
    with pytest.raises(BpfError):
        services.put_all(dict.fromkeys(keys, Target(1, Route.TUNNEL)), 1)
    there = services.items()
    assert len(there) == services.capacity()
    services.delete_all([key for key in keys if key in there])
    assert len(services) == services.capacity() - room
    with pytest.raises(BpfError) as absent:
        services.delete_all(keys[:1])
    assert absent.value.errno == errno.ENOENT


def test_where_there_is_no_room_to_declare_them_datagrams_are_refused(rig: Rig, counted):
    declared = rig.maps.datagrams
    keys = [(address, PORT) for address in filler(declared.capacity())]
    declared.put_all(dict.fromkeys(keys, Target(1, Route.PLAINTEXT)), 1)
    try:
        with pytest.raises(BpfError) as full:
            declared.put((packed16(IpAddress(PEER_V4)), PORT), Target(1, Route.PLAINTEXT), 2)
        assert full.value.errno == errno.E2BIG
        with pytest.raises(PermissionError):
            rig.site.in_app(lambda: datagram(PEER_V4, PORT, connect=False))
        assert counted() == {"refused_protocol": 1}
    finally:
        declared.delete_all(keys)
