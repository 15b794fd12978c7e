"""Topics: built and parsed alike, and nothing else is taken."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.address import IpAddress
from control.api.records import topic_of
from control.api.topics import (
    ADDRESS_SHARDS,
    INDEX_SHARDS,
    AddressesRootTopic,
    AddressesTopic,
    EndpointTopic,
    IndexTopic,
    ManifestTopic,
    NamespacesTopic,
    PolicyTopic,
    RequestAuthenticationTopic,
    RevocationsTopic,
    RootTopic,
    ServiceTopic,
    StatusTopic,
    TopicError,
    TrafficTopic,
    TrustTopic,
    WorkloadTopic,
    address_shard,
    entry_topic,
    format_topic,
    index_entry,
    index_shard,
    parse_topic,
    subtree,
)
from tests.support.records import TRUST_DOMAIN, addresses, names, namespaces, records, workload_names

_HASH = "0123456789abcdef" * 2
hashes = st.sampled_from([_HASH, "0" * 32])
others = st.one_of(
    st.builds(ManifestTopic, namespaces, names),
    st.builds(IndexTopic, namespaces, st.integers(0, INDEX_SHARDS - 1)),
    st.builds(RootTopic, namespaces),
    st.builds(AddressesTopic, st.integers(0, ADDRESS_SHARDS - 1)),
    st.just(AddressesRootTopic()),
    st.just(TrustTopic()),
    st.just(NamespacesTopic()),
    st.builds(StatusTopic, hashes, workload_names),
)


@given(records().map(topic_of) | others)
def test_a_topic_survives_its_text(topic):
    assert parse_topic(TRUST_DOMAIN, format_topic(TRUST_DOMAIN, topic)) == topic


@given(st.text(max_size=60).map(lambda text: f"mesh/v1/cluster.local/{text}") | st.text(max_size=60))
def test_any_text_is_a_topic_with_that_very_text_or_refused(text):
    try:
        topic = parse_topic(TRUST_DOMAIN, text)
    except TopicError:
        return
    assert format_topic(TRUST_DOMAIN, topic) == text


@pytest.mark.parametrize(
    ("topic", "text"),
    [
        (ServiceTopic("shop", "web"), "svc/shop/web"),
        (EndpointTopic("shop", "web", "web-1"), "ep/shop/web/web-1"),
        (ManifestTopic("shop", "web"), "ep/shop/web"),
        (WorkloadTopic(_HASH, "web-1"), f"wl/{_HASH}/web-1"),
        (PolicyTopic("shop", "web"), "policy/shop/web"),
        (RequestAuthenticationTopic("shop", "web"), "reqauth/shop/web"),
        (RevocationsTopic("mesh-system"), "crl/mesh-system"),
        (TrafficTopic("shop", "web"), "traffic/shop/web"),
        (IndexTopic("shop", 10), "index/shop/0a"),
        (RootTopic("shop"), "root/shop"),
        (NamespacesTopic(), "root"),
        (AddressesTopic(255), "addr/ff"),
        (AddressesRootTopic(), "addr"),
        (TrustTopic(), "trust"),
        (StatusTopic(_HASH, "web-1"), f"status/{_HASH}/web-1"),
    ],
)
def test_each_kind_has_its_place(topic, text):
    assert format_topic(TRUST_DOMAIN, topic) == f"mesh/v1/cluster.local/{text}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mesh/v1/cluster.local/",
        "mesh/v1/cluster.local/svc/shop",
        "mesh/v1/cluster.local/svc/shop/web/more",
        "mesh/v1/cluster.local/svc/shop/+",
        "mesh/v1/cluster.local/svc/#",
        "mesh/v1/cluster.local/svc/Shop/web",
        "mesh/v1/cluster.local/svc//web",
        "mesh/v1/cluster.local/secret/shop/web",
        "mesh/v1/other.example/svc/shop/web",
        "mesh/v2/cluster.local/svc/shop/web",
        "mesh/v1/cluster.local/ep/shop",
        "mesh/v1/cluster.local/ep/shop/1web",
        "mesh/v1/cluster.local/ep/shop/web/web-1/more",
        f"mesh/v1/cluster.local/wl/{_HASH.upper()}/web",
        f"mesh/v1/cluster.local/wl/{_HASH}0/web",
        f"mesh/v1/cluster.local/wl/{_HASH}/WEB",
        "mesh/v1/cluster.local/policy/shop/-",
        "mesh/v1/cluster.local/gw/shop",
        "mesh/v1/cluster.local/gw/shop/WP",
        "mesh/v1/cluster.local/route/shop/a/b",
        "mesh/v1/cluster.local/index/shop/40",
        "mesh/v1/cluster.local/index/shop/0A",
        "mesh/v1/cluster.local/index/shop/0",
        "mesh/v1/cluster.local/index/Shop/00",
        "mesh/v1/cluster.local/root/shop/web",
        "mesh/v1/cluster.local/root/Shop",
        "mesh/v1/cluster.local/addr/",
        "mesh/v1/cluster.local/addr/100",
        "mesh/v1/cluster.local/addr/00/00",
        "mesh/v1/cluster.local/trust/x",
        "mesh/v1/cluster.local/status/web",
        f"mesh/v1/cluster.local/status/{_HASH.upper()}/web",
    ],
)
def test_other_topics_are_refused(text):
    with pytest.raises(TopicError):
        parse_topic(TRUST_DOMAIN, text)


@given(records().map(topic_of).filter(lambda topic: not isinstance(topic, EndpointTopic)), namespaces)
def test_an_index_entry_is_its_record_s_topic_without_the_namespace(topic, namespace):
    entry = index_entry(topic)
    of = namespace if isinstance(topic, WorkloadTopic) else topic.namespace
    assert entry_topic(of, entry) == topic
    assert index_shard(entry) == hashlib.sha256(entry.encode()).digest()[0] & 63


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "svc",
        "svc/Web",
        "svc/web/x",
        "ep/web/web-1",
        "ep/web",
        "wl/x/web",
        "policy/-",
        "gw/-",
        "route/a/b",
        f"wl/{_HASH}/+",
    ],
)
def test_an_entry_of_no_record_is_refused(entry):
    with pytest.raises(TopicError):
        entry_topic("shop", entry)


def test_an_entry_of_no_namespace_is_refused():
    with pytest.raises(TopicError):
        entry_topic("Shop", "svc/web")


@given(addresses())
def test_an_address_has_one_shard(address):
    assert format_topic(TRUST_DOMAIN, AddressesTopic(address_shard(address))).endswith(
        f"addr/{address_shard(address):02x}"
    )


def test_shards_stay_where_they_are():
    # Proxies and control planes of different versions must agree for ever.
    assert index_shard("svc/web") == 0x37
    assert address_shard(IpAddress("10.0.0.1")) == 0xB3
    assert address_shard(IpAddress("fd00::1")) == 0x68


def test_a_subtree_is_a_filter():
    assert subtree(TRUST_DOMAIN, "policy", "shop") == "mesh/v1/cluster.local/policy/shop/#"
    assert subtree(TRUST_DOMAIN) == "mesh/v1/cluster.local/#"
