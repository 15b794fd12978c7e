"""Virtual addresses are the same every time, free, and inside their range."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api import vips
from control.api.declared import Family

families = pytest.mark.parametrize("family", list(Family))


@families
@given(keys=st.lists(st.text(max_size=8), unique=True, max_size=20))
def test_addresses_are_stable_distinct_and_in_range(family, keys):
    def allocate_all():
        taken = set()
        for key in keys:
            taken.add(vips.allocate(key, family, taken))
        return taken

    network = ipaddress.ip_network(vips.RANGES[family])
    found = allocate_all()
    assert found == allocate_all()
    assert len(found) == len(keys)
    for address in found:
        assert ipaddress.ip_address(address) in network
        assert 0 < int(ipaddress.ip_address(address)) - int(network.network_address) < 0xFF00


@families
def test_a_taken_address_is_passed_over_and_a_full_range_has_none(family, monkeypatch):
    first = vips.allocate("shop/web", family, ())
    second = vips.allocate("shop/web", family, {first})
    assert first != second
    monkeypatch.setattr(vips, "_LAST", 3)
    taken = set()
    for _ in range(3):
        taken.add(vips.allocate("shop/web", family, taken))
    assert len(taken) == 3
    assert vips.allocate("shop/web", family, taken) is None
