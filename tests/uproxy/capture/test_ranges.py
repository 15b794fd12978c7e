"""Which addresses are the mesh's: by the longest prefix, the same in the agent's answer and in nftables' rules."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.address import AddressError, parse_address
from uproxy.capture import nft
from uproxy.capture.ranges import MeshRanges

blocks = st.builds(
    lambda number, bits: str(ipaddress.ip_network((number >> (32 - bits) << (32 - bits), bits))),
    st.integers(0x0A000000, 0x0A0000FF),
    st.integers(20, 32),
)


@given(mesh=st.sets(blocks, max_size=4), excluded=st.sets(blocks, max_size=4), last=st.integers(0, 255))
def test_the_longest_prefix_decides(mesh, excluded, last):
    excluded -= mesh
    address = ipaddress.ip_address(f"10.0.0.{last}")
    ranges = MeshRanges.parse(mesh, excluded)
    matching = [
        (ipaddress.ip_network(block).prefixlen, block)
        for block in mesh | excluded
        if address in ipaddress.ip_network(block)
    ]
    expected = bool(matching) and max(matching)[1] in mesh
    assert ranges.captures(parse_address(str(address))) == expected
    rules = nft.rules(61184, ranges)
    assert _first_match(rules, "to_uproxy", address) == ("redirect" if expected else "")
    assert _first_match(rules, "in_the_open", address) == ("drop" if expected else "")


def _first_match(rules: str, chain: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """What a chain of the rules does with a destination, by the rules that ask for one alone; empty: nothing."""
    for line in rules.split(f"chain {chain} {{")[1].partition("}\n\tchain")[0].splitlines():
        words = line.split()
        if words[:2] == ["ip", "daddr"] and address in ipaddress.ip_network(words[2]):
            return next((word for word in words if word in ("redirect", "drop")), "")
    return ""


def test_ranges_that_contradict_are_refused():
    with pytest.raises(ValueError, match=r"10\.0\.0\.0/8 is both a mesh range and excluded"):
        MeshRanges.parse(["10.0.0.0/8"], ["10.0.0.0/8"])
    with pytest.raises(AddressError, match="is not a CIDR block"):
        MeshRanges.parse(["mesh"])
    with pytest.raises(ValueError, match="more than 1024 ranges"):
        MeshRanges.parse(f"10.{n // 256}.{n % 256}.0/24" for n in range(1025))
