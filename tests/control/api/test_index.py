"""Shards, roots, addresses, manifests and trust: what is written is read, and nothing else is."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api import index, messages
from control.api.address import IpAddress
from control.api.fields import RecordError
from control.api.index import (
    IndexShard,
    Manifest,
    Namespaces,
    ResidentWorkload,
    Root,
    Trust,
    manifest_digest,
)
from control.api.messages import Envelope
from control.api.records import topic_of
from control.api.topics import (
    AddressesRootTopic,
    AddressesTopic,
    EndpointTopic,
    IndexTopic,
    ManifestTopic,
    NamespacesTopic,
    RootTopic,
    TrustTopic,
    address_shard,
    index_entry,
    index_shard,
)
from tests.support.records import (
    TRUST_DOMAIN,
    address_shards,
    addresses,
    namespaces,
    records,
    residents,
    workload_names,
)

digests = st.binary(min_size=32, max_size=32)
signatures = st.just(b"") | st.binary(min_size=64, max_size=64)
entries = records().map(topic_of).filter(lambda topic: not isinstance(topic, EndpointTopic)).map(index_entry)


@st.composite
def index_shards(draw):
    found = draw(st.dictionaries(entries, digests, min_size=1))
    shard = index_shard(next(iter(found)))
    return IndexTopic("shop", shard), IndexShard({e: d for e, d in found.items() if index_shard(e) == shard})


def roots(shards):
    return st.builds(Root, st.dictionaries(st.integers(0, shards - 1), digests, max_size=4), signatures)


contents = st.one_of(
    index_shards(),
    st.tuples(address_shards(), signatures).map(lambda drawn: (drawn[0][0], replace(drawn[0][1], signature=drawn[1]))),
    st.tuples(st.just(RootTopic("shop")), roots(64)),
    st.tuples(st.just(AddressesRootTopic()), roots(256)),
    st.tuples(st.just(ManifestTopic("shop", "web")), st.builds(Manifest, st.integers(0, 1_000_000), digests)),
    st.tuples(
        st.just(NamespacesTopic()),
        st.builds(Namespaces, st.frozensets(namespaces), signatures),
    ),
    st.tuples(
        st.just(TrustTopic()),
        st.builds(Trust, st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=4).map(tuple)),
    ),
)


def read(topic, body):
    match topic:
        case IndexTopic():
            return index.read_index_shard(topic, body)
        case RootTopic() | AddressesRootTopic():
            return index.read_root(topic, body)
        case AddressesTopic():
            return index.read_address_shard(topic, body)
        case ManifestTopic():
            return index.read_manifest(body)
        case TrustTopic():
            return index.read_trust(body)
        case NamespacesTopic():
            return index.read_namespaces(body)


@given(contents)
def test_what_is_written_survives_the_wire(drawn):
    topic, content = drawn
    payload = messages.encode(Envelope(1, 1, 0, index.write(content)))
    assert read(topic, messages.decode(payload).body) == content


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.binary(max_size=33),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@given(contents, st.data())
def test_a_body_with_a_field_missing_or_added_or_replaced_is_refused_or_canonical(drawn, data):
    topic, content = drawn
    body = index.write(content)
    field = data.draw(st.sampled_from(sorted(body)))
    with pytest.raises(RecordError, match="lacks"):
        read(topic, {name: value for name, value in body.items() if name != field})
    with pytest.raises(RecordError, match="unknown fields: more"):
        read(topic, {**body, "more": 1})
    replaced = {**body, field: data.draw(values)}
    try:
        found = read(topic, replaced)
    except RecordError:
        return
    assert index.write(found) == replaced


@given(st.dictionaries(workload_names, st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_a_manifest_s_digest_is_of_the_sorted_stamps(stamps):
    listed = sorted([name, epoch, version] for name, (epoch, version) in stamps.items())
    assert manifest_digest(stamps) == hashlib.sha256(msgpack.packb(listed)).digest()
    assert manifest_digest(dict(reversed(stamps.items()))) == manifest_digest(stamps)


_DIGEST = bytes(32)
_SHARD = IndexTopic("shop", index_shard("svc/web"))
_OTHER = IndexTopic("shop", index_shard("svc/web") ^ 1)
_IP = "10.0.0.1"
_ADDRESSES = AddressesTopic(address_shard(IpAddress(_IP)))


@pytest.mark.parametrize(
    ("topic", "body", "problem"),
    [
        (_SHARD, {"records": {"svc/web": bytes(31)}}, "records has 31 bytes; it must have 32"),
        (_SHARD, {"records": {"svc/web": "x" * 32}}, "records must be bytes"),
        (_SHARD, {"records": {"ep/web/w": _DIGEST}}, "no entry of an index"),
        (_OTHER, {"records": {"svc/web": _DIGEST}}, "'svc/web' belongs in shard"),
        (RootTopic("shop"), {"shards": {"40": _DIGEST}, "signature": b""}, "no shard from 00 to 3f"),
        (RootTopic("shop"), {"shards": {"0A": _DIGEST}, "signature": b""}, "no shard"),
        (RootTopic("shop"), {"shards": {}, "signature": bytes(63)}, "signature has 63 bytes; it must have 0 or 64"),
        (AddressesRootTopic(), {"shards": {"100": _DIGEST}, "signature": b""}, "no shard from 00 to ff"),
        (_ADDRESSES, {"addresses": {"10.0.0.01": ["s", "shop", "web", []]}, "signature": b""}, "not an IP"),
        (_ADDRESSES, {"addresses": {"::ffff:10.0.0.1": ["s", "shop", "web", []]}, "signature": b""}, "must be written"),
        (_ADDRESSES, {"addresses": {"10.0.0.2": ["s", "shop", "web", []]}, "signature": b""}, "belongs in shard"),
        (_ADDRESSES, {"addresses": {_IP: ["s", "shop", "web", [80, 80]]}, "signature": b""}, "names one twice"),
        (_ADDRESSES, {"addresses": {_IP: ["s", "shop", "web", [0]]}, "signature": b""}, "from 1 to 65535"),
        (_ADDRESSES, {"addresses": {_IP: ["s", "shop", "web"]}, "signature": b""}, "each must be"),
        (_ADDRESSES, {"addresses": {_IP: ["s", "Shop", "web", []]}, "signature": b""}, "must be 1-63"),
        (_ADDRESSES, {"addresses": {_IP: ["s", "shop", "1", []]}, "signature": b""}, "must be 1-63"),
        (_ADDRESSES, {"addresses": {_IP: ["w", "shop", "web", "W", {}]}, "signature": b""}, "must be 1-253"),
        (_ADDRESSES, {"addresses": {_IP: ["w", "shop", "web", "web", {"-": ""}]}, "signature": b""}, "label"),
        (ManifestTopic("a", "b"), {"count": -1, "digest": _DIGEST}, "from 0 to"),
        (ManifestTopic("a", "b"), {"count": True, "digest": _DIGEST}, "must be int"),
        (ManifestTopic("a", "b"), {"count": 1, "digest": b""}, "digest has 0 bytes"),
        (NamespacesTopic(), {"namespaces": ["b", "a"], "signature": b""}, "must be in order"),
        (NamespacesTopic(), {"namespaces": ["a", "a"], "signature": b""}, "must be in order"),
        (NamespacesTopic(), {"namespaces": ["A"], "signature": b""}, "must be 1-63"),
        (NamespacesTopic(), {"namespaces": [1], "signature": b""}, "must be str"),
        (TrustTopic(), {"certificates": []}, "from 1 to 4"),
        (TrustTopic(), {"certificates": [b"x"] * 5}, "from 1 to 4"),
        (TrustTopic(), {"certificates": [b""]}, "from 1 to 8192 bytes"),
        (TrustTopic(), {"certificates": [bytes(8193)]}, "from 1 to 8192 bytes"),
        (TrustTopic(), {"certificates": ["x"]}, "must be bytes"),
    ],
)
def test_each_wrong_value_is_refused_by_name(topic, body, problem):
    with pytest.raises(RecordError, match=problem):
        read(topic, body)


def test_a_resident_stands_in_for_its_workload():
    resident = ResidentWorkload("shop", "web-1", "web", {"app": "web"})
    workload = resident.as_workload(TRUST_DOMAIN, IpAddress(_IP))
    assert (workload.key, str(workload.identity)) == (resident.key, "spiffe://cluster.local/ns/shop/sa/web")
    assert (workload.canonical_service, workload.addresses) == ("web", (_IP,))


@given(st.dictionaries(addresses(), residents))
def test_every_address_is_in_its_shard_and_shards_are_in_order(drawn):
    shards = index.shard_addresses(drawn)
    assert {ip: resident for shard in shards.values() for ip, resident in shard.residents.items()} == drawn
    assert list(shards) == sorted(shards)
    for number, shard in shards.items():
        assert shard.residents
        assert list(shard.residents) == sorted(shard.residents)
        assert index.read_address_shard(AddressesTopic(number), index.write(shard)) == shard
