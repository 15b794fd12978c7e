"""mesh.json: read back as written, and refused in words when it is not what it should be."""

import contextlib
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.address import IpAddress
from control.client.membership import MEMBERSHIP_FILE, Membership, MembershipError, host_and_port
from tests.support.certificates import WEB

GOOD = Membership(
    WEB,
    "web-1",
    (IpAddress("10.9.0.1"), IpAddress("fd00::1")),
    "https://control.example:15012",
    ("mqtts://broker.example:8883", "mqtts://[fd00::2]:8883"),
)


def test_what_is_written_is_read_back(tmp_path):
    (tmp_path / MEMBERSHIP_FILE).write_bytes(GOOD.encode())
    assert Membership.load(tmp_path) == GOOD
    assert GOOD.key == "shop/web-1"


def test_a_fifo_in_its_place_holds_nobody_up(tmp_path):
    os.mkfifo(tmp_path / MEMBERSHIP_FILE)
    with pytest.raises(MembershipError, match="is not a regular file"):
        Membership.load(tmp_path)


def test_a_newer_control_plane_may_say_more():
    assert Membership.parse({**json.loads(GOOD.encode()), "networks": {"a": 1}}) == GOOD


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"trust_domain": "Cluster.Local"}, "trust domain"),
        ({"trust_domain": None}, "'trust_domain' must be text"),
        ({"namespace": "a.b"}, "must be 1-63"),
        ({"service_account": "a/b"}, "SPIFFE ID"),
        ({"workload": "../x"}, "must be 1-253"),
        ({"addresses": ["10.0.0"]}, "not an IP address"),
        ({"addresses": "10.0.0.1"}, "'addresses' must be a list"),
        ({"addresses": ["10.0.0.1"] * 17}, "at most 16"),
        ({"control": "http://control.example:15012"}, "https://host:port"),
        ({"control": "https://control.example"}, "https://host:port"),
        ({"brokers": []}, "'brokers' is empty"),
        ({"brokers": ["mqtt://broker:1883"]}, "mqtts://host:port"),
        ({"brokers": ["mqtts://broker:0"]}, "mqtts://host:port"),
        ({"brokers": ["mqtts://broker:65536"]}, "mqtts://host:port"),
        ({"brokers": ["mqtts://a..b:8883"]}, "not a host name"),
        ({"brokers": [f"mqtts://{'a' * 64}.example:8883"]}, "not a host name"),
        ({"brokers": ["mqtts://[fd00::zz]:8883"]}, "mqtts://host:port"),
        ({"brokers": ["mqtts://[fd00:::1]:8883"]}, "not an IP address"),
        ({"brokers": ["mqtts://broker:8883/path"]}, "mqtts://host:port"),
        ({"brokers": ["mqtts://user@broker:8883"]}, "mqtts://host:port"),
    ],
)
def test_what_is_wrong_is_named(change, told):
    with pytest.raises(MembershipError, match=told):
        Membership.parse({**json.loads(GOOD.encode()), **change})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 60_000, b" " * 65_537])
def test_a_damaged_file_says_what_to_do(tmp_path, content):
    (tmp_path / MEMBERSHIP_FILE).write_bytes(content)
    with pytest.raises(MembershipError, match=r"mesh\.json is damaged: .*Join again with a new token"):
        Membership.load(tmp_path)


def test_a_workload_that_has_not_joined_is_told_how(tmp_path):
    with pytest.raises(MembershipError, match="has not joined a mesh"):
        Membership.load(tmp_path)


def test_hosts_come_without_brackets():
    assert host_and_port("mqtts://[FD00::2]:8883", "mqtts") == ("fd00::2", 8883)
    assert host_and_port("https://127.0.0.1:15012", "https") == ("127.0.0.1", 15012)


@given(
    st.sampled_from(list(json.loads(GOOD.encode()))),
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda inner: st.lists(inner)),
)
def test_any_json_is_a_membership_or_an_error(name, value):
    with contextlib.suppress(MembershipError):
        membership = Membership.parse({**json.loads(GOOD.encode()), name: value})
        assert Membership.parse(json.loads(membership.encode())) == membership
