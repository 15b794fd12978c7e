"""Addresses and blocks have one text each."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.address import (
    AddressError,
    IpAddress,
    from_packed,
    is_ipv6,
    packed16,
    parse_address,
    parse_block,
    reason_not_unicast,
)

ips = st.ip_addresses().map(str)


_parts = st.integers(0, 300).map(str) | st.text("0125", min_size=1, max_size=3)


@given(ips)
def test_packing_and_unpacking_give_the_canonical_address(text):
    address = parse_address(text)
    assert parse_address(address) == address
    assert from_packed(packed16(address)) == address
    assert len(packed16(address)) == 16


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_has_one_form_however_it_arrives(ip):
    mapped = f"::ffff:{ip}"
    assert parse_address(mapped) == parse_address(str(ip)) == str(ip)
    assert from_packed(ip.packed) == from_packed(ipaddress.ip_address(mapped).packed) == str(ip)
    assert not is_ipv6(parse_address(mapped))


@given(st.ip_addresses(v=6))
def test_an_ipv6_address_is_read_in_any_spelling(ip):
    assert parse_address(ip.exploded.upper()) == parse_address(ip.compressed)


@given(st.text("0125.\n", max_size=16) | st.lists(_parts, min_size=3, max_size=5).map(".".join))
def test_ipv4_is_what_the_standard_library_says_it_is(text):
    try:
        expected = str(ipaddress.IPv4Address(text))
    except ValueError:
        with pytest.raises(AddressError):
            parse_address(text)
    else:
        assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "web",
        "10.0.0",
        "10.0.0.256",
        "010.0.0.1",
        "1.2.3.04",
        "10.0.0.1:80",
        "[::1]",
        "fe80::1%eth0",
        " 10.0.0.1",
        "1" * 70,
        "\u0661.1.1.1",
    ],
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(AddressError):
        parse_address(text)


@given(st.text(max_size=50))
def test_any_text_is_an_address_or_refused(text):
    try:
        address = parse_address(text)
    except AddressError:
        return
    assert ipaddress.ip_address(address)


@pytest.mark.parametrize("length", [0, 3, 5, 15, 17])
def test_a_packed_address_of_another_length_is_refused(length):
    with pytest.raises(AddressError):
        from_packed(bytes(length))


@given(ips, st.data())
def test_a_block_is_canonical_and_holds_what_it_was_made_of(text, data):
    ip = ipaddress.ip_address(text)
    network = ipaddress.ip_network((ip, data.draw(st.integers(0, ip.max_prefixlen))), strict=False)
    block = parse_block(str(network))
    assert parse_block(block) == block
    assert ipaddress.ip_network(block).num_addresses == network.num_addresses


def test_a_bare_address_is_a_block_of_one():
    assert parse_block("10.0.0.1") == "10.0.0.1/32"
    assert parse_block("FD00::1") == "fd00::1/128"
    assert parse_block("::ffff:10.0.0.0/104") == "10.0.0.0/8"


def test_bits_beyond_the_prefix_are_refused_with_the_block_that_was_meant():
    with pytest.raises(AddressError, match=r"write 10\.0\.0\.0/8"):
        parse_block("10.1.2.3/8")


@pytest.mark.parametrize(
    "text", ["", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/255.0.0.0", "10.0.0.0/", "::/129", "fe80::%1/64"]
)
def test_what_is_no_block_is_refused(text):
    with pytest.raises(AddressError):
        parse_block(text)


@pytest.mark.parametrize(
    "text", ["0.0.0.0", "127.0.0.1", "::1", "::", "224.0.0.1", "ff02::1", "169.254.1.1", "fe80::1", "255.255.255.255"]
)
def test_addresses_that_no_workload_can_have(text):
    assert reason_not_unicast(parse_address(text))


def test_loopback_is_right_only_where_it_is_allowed():
    assert reason_not_unicast(IpAddress("127.0.0.1"), loopback=True) == ""
    assert reason_not_unicast(IpAddress("0.0.0.0"), loopback=True)


@pytest.mark.parametrize("text", ["10.0.0.1", "240.240.0.1", "fd00::1", "192.0.2.1"])
def test_addresses_that_a_workload_can_have(text):
    assert reason_not_unicast(IpAddress(text)) == ""
