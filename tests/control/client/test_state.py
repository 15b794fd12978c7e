"""The state store against a model: any order, repetition and staleness of messages gives the same state."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api import index, messages, topics
from control.api.gateway import Binding, Gateway, Via
from control.api.identity import make_id
from control.api.index import AddressShard, ResidentService, ResidentWorkload
from control.api.jwt import RequestAuthentication
from control.api.messages import Envelope
from control.api.policy import AuthorizationPolicy, Target, applies
from control.api.records import RecordError, topic_of, write
from control.api.route import HTTPRoute
from control.api.traffic import TrafficPolicy
from control.api.workload import Endpoint, Service, ServicePort, Workload
from control.client import state as state_module
from control.client.state import Changes, State
from tests.support.records import TRUST_DOMAIN, address_shards, records, workloads

ROOT = "mesh-system"
stamps = st.tuples(st.integers(1, 2), st.integers(0, 4))


def message(topic, stamp, content):
    body = None if content is None else index.write(content) if isinstance(content, AddressShard) else write(content)
    return topic, messages.encode(Envelope(*stamp, 0, body))


def published(record, version=1, epoch=1):
    return message(topics.format_topic(TRUST_DOMAIN, topic_of(record)), (epoch, version), record)


def gone(record, version):
    return message(topics.format_topic(TRUST_DOMAIN, topic_of(record)), (1, version), None)


@st.composite
def histories(draw):
    """All versions that some topics ever had: (topic, stamp) -> record, or None for a tombstone."""
    found = {}
    read_here = records().filter(lambda record: not (isinstance(record, AuthorizationPolicy) and record.targets))
    placed = read_here.map(lambda record: (topic_of(record), record)) | address_shards()
    for topic, content in draw(st.lists(placed, max_size=8)):
        found[topics.format_topic(TRUST_DOMAIN, topic), draw(stamps)] = content
    for topic, _ in list(found):
        for stamp in draw(st.lists(stamps, max_size=2)):
            found.setdefault((topic, stamp), None)
    return found


@st.composite
def deliveries(draw, history):
    """The versions in any order, some more than once, in batches; each at least once."""
    every = [(topic, stamp, record) for (topic, stamp), record in history.items()]
    order = draw(st.permutations(every + draw(st.lists(st.sampled_from(every), max_size=4) if every else st.just([]))))
    cuts = sorted(draw(st.lists(st.integers(0, len(order)), max_size=3)))
    return [list(order[a:b]) for a, b in itertools.pairwise([0, *cuts, len(order)])]


class Model:
    """What must be known after some messages, worked out the slow way."""

    def __init__(self):
        self.newest = {}

    def apply(self, batch):
        for topic, stamp, record in batch:
            if topic not in self.newest or stamp > self.newest[topic][0]:
                self.newest[topic] = (stamp, record)

    def of(self, kind):
        return [(stamp, topic, record) for topic, (stamp, record) in self.newest.items() if isinstance(record, kind)]

    def holder(self, kind, claims):
        claiming = [(stamp, topic, record) for stamp, topic, record in self.of(kind) if claims(record)]
        return max(claiming, key=lambda claim: claim[:2])[2] if claiming else None

    def claims(self):
        addresses = {a for *_, w in self.of(Workload) for a in w.addresses}
        return {a: self.holder(Workload, lambda w, a=a: a in w.addresses) for a in addresses}

    def parts(self):
        """What no look-up shows by itself, and changes are told of."""
        return {
            "claims": self.claims(),
            "all endpoints": {(e.service, e.workload): e for *_, e in self.of(Endpoint)},
            "identities": {s.key: s.identities for *_, s in self.of(Service)},
        }

    def view(self):
        workload_keys = {w.key for *_, w in self.of(Workload)}
        residents = {ip: resident for *_, shard in self.of(AddressShard) for ip, resident in shard.residents.items()}
        addresses = {a: w.as_workload(TRUST_DOMAIN, a) for a, w in residents.items() if isinstance(w, ResidentWorkload)}
        addresses |= self.claims()
        services = {s.key: s for *_, s in self.of(Service)}
        vips = {a for *_, s in self.of(Service) for a in s.vips}
        return {
            "services": services,
            "vips": {a: self.holder(Service, lambda s, a=a: a in s.vips) for a in vips},
            "workloads": {k: self.holder(Workload, lambda w, k=k: w.key == k) for k in workload_keys},
            "addresses": addresses,
            "residents": residents,
            "endpoints": {
                (e.service, e.workload): e
                for *_, e in self.of(Endpoint)
                if e.service in services and e.identity in services[e.service].identities
            },
            "policies": {p.key: p for *_, p in self.of(AuthorizationPolicy) if not p.targets},
            "targeting": {(t, p.key): p for *_, p in self.of(AuthorizationPolicy) for t in p.targets},
            "authenticating": {(t, one.key): one for *_, one in self.of(RequestAuthentication) for t in one.targets},
            "traffic": {(t, one.key): one for *_, one in self.of(TrafficPolicy) for t in one.targets},
            "gateways": {g.key: g for *_, g in self.of(Gateway)},
            "routes": {(parent.service, r.key): r for *_, r in self.of(HTTPRoute) for parent in r.parents},
        }


def view(state, model):
    """The same, asked of the state."""
    expected = model.view()
    ports = {s.key: {p.port for p in s.ports} for s in expected["services"].values()}
    vips = {}
    for address, service in expected["vips"].items():
        for port in ports[service.key] or {1}:
            found = state.service_at(address, port)
            assert (found is None) == (port not in {p.port for p in service.ports})
            vips[address] = service if found is None else found[0]
            assert found is None or found[1].port == port
    addresses = (
        {a for w in state.workloads() for a in w.addresses} | set(state.residents()) | set(expected["addresses"])
    )
    assert all(state.resident_at(ip) == resident for ip, resident in state.residents().items())
    namespaces = {"shop", "bank", "mesh-system"}
    keys = [f"{namespace}/{name}" for namespace in sorted(namespaces) for name in ("web", "reviews", "db", "x")]
    targets = [Target(kind, target) for kind in ("Gateway", "Service") for target in keys]
    return {
        "services": {s.key: s for s in state.services()},
        "vips": vips,
        "workloads": {w.key: w for w in state.workloads()},
        "addresses": {a: w for a in addresses if (w := state.workload_at(a)) is not None},
        "residents": dict(state.residents()),
        "endpoints": {(e.service, e.workload): e for key in keys for e in state.endpoints(key)},
        "policies": {p.key: p for scope in namespaces for p in policies_of(state, scope)},
        "targeting": {(t, p.key): p for t in targets for p in ordered(state.policies_targeting(t.kind, t.key))},
        "authenticating": {
            (t, one.key): one for t in targets for one in ordered(state.authentications_targeting(t.kind, t.key))
        },
        "traffic": {(t, one.key): one for t in targets for one in ordered(state.traffic_targeting(t.kind, t.key))},
        "gateways": {key: gateway for key in keys if (gateway := state.gateway(key)) is not None},
        "routes": {(key, route.key): route for key in keys for route in ordered(state.routes_for(key))},
    }


def ordered(found):
    assert list(found) == sorted(found, key=lambda one: one.key)
    return found


def policies_of(state, namespace):
    """Every policy of a namespace, by asking for workloads with every set of labels that a selector can want."""
    found = {}
    values = (None, "", "web", "v1")
    for app, version, other in itertools.product(values, repeat=3):
        labels = {k: v for k, v in (("app", app), ("version", version), ("a.b/c", other)) if v is not None}
        for policy in state.policies_for(Workload(namespace, "x", "x", None, (), labels, {}, "", 1)):
            assert applies(policy, namespace, labels, ROOT)
            found[policy.key] = policy
    return found.values()


@given(histories().flatmap(lambda history: st.tuples(st.just(history), deliveries(history))))
def test_the_state_is_that_of_the_newest_messages_in_any_order(drawn):
    history, batches = drawn
    state, model = State(TRUST_DOMAIN, ROOT), Model()
    for batch in batches:
        before = model.view() | model.parts()
        generation = state.generation
        changes = state.apply([message(*item) for item in batch])
        model.apply(batch)
        assert view(state, model) == model.view()
        assert changes == differences(before, model.view() | model.parts())
        assert state.generation == generation + bool(changes)
        assert state.whole
    assert state.traffic_policies() == {one for *_, one in model.of(TrafficPolicy)}
    at_once = State(TRUST_DOMAIN, ROOT)
    at_once.apply([message(topic, stamp, record) for (topic, stamp), record in history.items()])
    assert view(at_once, model) == view(state, model)


def differences(before, after):
    """What a batch changed, by the views before and after it."""

    def changed(name):
        return {
            (k, v)
            for k in before[name].keys() | after[name].keys()
            if before[name].get(k) != after[name].get(k)
            for v in (before[name].get(k), after[name].get(k))
            if v is not None
        }

    return Changes(
        services=frozenset(s.key for _, s in changed("services") | changed("vips")),
        workloads=frozenset(w.key for _, w in changed("workloads") | changed("claims")),
        endpoints=frozenset(e.service for _, e in changed("all endpoints")) | {k for k, _ in changed("identities")},
        policies=frozenset(
            one.key for name in ("policies", "targeting", "authenticating", "traffic") for _, one in changed(name)
        ),
        addresses=frozenset(ip for ip, _ in changed("residents")),
        gateways=frozenset(key for key, _ in changed("gateways")),
        routes=frozenset(r.key for _, r in changed("routes")),
    )


def test_a_binding_is_found_where_it_counts():
    state = State(TRUST_DOMAIN)
    bound, other = Binding("shop/wp", Via.WAYPOINT), Binding("shop/other", Via.REFUSE)
    pod = ResidentWorkload("shop", "web-1", "web", {}, ((0, bound), (8080, other)))
    free = ResidentWorkload("shop", "web-2", "web", {}, ((8080, other),))
    state.apply([published(dataclasses.replace(SERVICE, binding=bound)), shard(1, {"10.0.0.1": pod})])
    assert [state.binding_at(SERVICE.vips[0], port) for port in (80, 81, 82)] == [bound, bound, None]
    assert [state.binding_at("10.0.0.1", port) for port in (80, 8080)] == [bound, other]
    assert state.binding_at("10.9.9.9", 80) is None
    assert state.apply([shard(2, {"10.0.0.1": free})]).addresses == {"10.0.0.1"}
    assert [state.binding_at("10.0.0.1", port) for port in (80, 8080)] == [None, other]
    assert state.apply([published(SERVICE, version=2)]).services == {SERVICE.key}
    assert state.binding_at(SERVICE.vips[0], 80) is None


BAD = [
    ("mesh/v1/cluster.local/trust", messages.encode(Envelope(9, 9, 0, {"certificates": [b"x"]}))),
    ("mesh/v1/cluster.local/addr/00", messages.encode(Envelope(9, 9, 0, {"addresses": {"x": []}, "signature": b""}))),
    ("mesh/v1/cluster.local/svc/shop/web", b"\xc1"),
    ("mesh/v1/cluster.local/svc/shop/web", messages.encode(Envelope(9, 9, 0, {"vips": 1}))),
    ("mesh/v1/other.example/svc/shop/web", messages.encode(Envelope(9, 9, 0, None))),
    ("nonsense", b""),
    ("mesh/v1/cluster.local/svc/shop/web", b""),
]


@given(histories().flatmap(lambda h: st.tuples(deliveries(h), st.sampled_from(BAD), st.integers(0, 20))))
def test_a_bad_message_anywhere_in_a_batch_changes_nothing(drawn):
    batches, bad, place = drawn
    state, model = State(TRUST_DOMAIN, ROOT), Model()
    for batch in batches[:-1]:
        state.apply([message(*item) for item in batch])
        model.apply(batch)
    generation, whole = state.generation, state.whole
    last = [message(*item) for item in batches[-1]]
    last.insert(min(place, len(last)), bad)
    with pytest.raises(RecordError, match=bad[0][:40]):
        state.apply(last)
    assert view(state, model) == model.view()
    assert (state.generation, state.whole) == (generation, whole)


@given(workloads(), workloads())
def test_a_reused_address_belongs_to_the_newest_and_falls_back(old, new):
    new = Workload(new.namespace, "newer", new.service_account, new.identity, old.addresses, {}, {}, "", 1)
    state = State(TRUST_DOMAIN)
    state.apply([published(new, version=2)])
    state.apply([published(old, version=1)])
    assert [state.workload_at(a) for a in old.addresses] == [new] * len(old.addresses)
    state.apply([gone(new, version=3)])
    assert [state.workload_at(a) for a in old.addresses] == [old] * len(old.addresses)


WEB = make_id(TRUST_DOMAIN, "shop", "web")
THIEF = make_id(TRUST_DOMAIN, "shop", "thief")


def test_an_endpoint_serves_only_as_one_of_its_service_s_identities():
    state = State(TRUST_DOMAIN)
    mine = Endpoint("shop/web", "shop/web-1", "10.0.0.1", WEB, {80: 80}, 1, True, {})
    other = dataclasses.replace(mine, workload="shop/web-2", identity=THIEF)
    state.apply([published(mine), published(other)])
    assert state.endpoints("shop/web") == ()
    service = dataclasses.replace(SERVICE, identities=(WEB,))
    assert state.apply([published(service)]).endpoints == {"shop/web"}
    assert state.endpoints("shop/web") == (mine,)
    assert state.apply([published(dataclasses.replace(SERVICE, identities=()), version=2)]).endpoints == {"shop/web"}
    assert state.endpoints("shop/web") == ()


def shard(version, residents):
    (number,) = {topics.address_shard(ip) for ip in residents} or {topics.address_shard("10.0.0.1")}
    topic = topics.format_topic(TRUST_DOMAIN, topics.AddressesTopic(number))
    return message(topic, (1, version), AddressShard(residents))


def test_who_lives_at_an_address_is_known_before_anything_else_of_them():
    state = State(TRUST_DOMAIN)
    web = ResidentWorkload("shop", "web-1", "web", {"app": "web"})
    assert state.apply([shard(1, {"10.0.0.1": web})]).addresses == {"10.0.0.1"}
    assert state.resident_at("10.0.0.1") == web
    known = state.workload_at("10.0.0.1")
    assert known == web.as_workload(TRUST_DOMAIN, "10.0.0.1")
    assert state.workload_at("10.0.0.1") is known  # made once, not for each connection
    assert state.workloads() == ()
    other = dataclasses.replace(web, service_account="other")
    state.apply([shard(2, {"10.0.0.1": other})])
    assert state.workload_at("10.0.0.1").service_account == "other"
    whole = dataclasses.replace(known, node="a")
    state.apply([published(whole)])
    assert state.workload_at("10.0.0.1") == whole
    state.apply([shard(3, {"10.0.0.1": ResidentService("shop", "web", (80,))}), gone(whole, 2)])
    assert state.workload_at("10.0.0.1") is None
    assert state.service_at("10.0.0.1", 80) is None  # its record says how to reach it


def test_residents_that_were_asked_for_are_kept_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(state_module, "_MAX_ASKED", 3)
    state = State(TRUST_DOMAIN)
    addresses = [f"10.0.0.{number}" for number in range(1, 9)]
    one = ResidentWorkload("shop", "web-1", "web", {})
    for version, ip in enumerate(addresses):
        state.apply([shard(version, {ip: one})])
    for ip in addresses * 2:
        assert state.resident_at(ip) == one
        assert state.workload_at(ip).addresses == (ip,)
        assert len(state._asked) <= 3
        assert len(state._peers) <= 3
    assert state.resident_at("10.0.1.1") is None


def test_a_shard_covers_its_addresses_also_where_nobody_lives():
    state = State(TRUST_DOMAIN)
    assert not state.covers("10.0.0.1")
    state.apply([shard(1, {})])
    assert state.covers("10.0.0.1")
    assert state.resident_at("10.0.0.1") is None
    assert not all(state.covers(f"10.0.0.{number}") for number in range(2, 20)), "of other shards"
    empty = state.address_bytes
    state.apply([shard(2, {"10.0.0.1": ResidentWorkload("shop", "web-1", "web", {})})])
    assert state.address_bytes > empty


def test_an_address_nobody_had_is_known_once_somebody_has_it():
    state = State(TRUST_DOMAIN)
    one = ResidentWorkload("shop", "web-1", "web", {})
    neighbour = next(ip for n in range(1, 2000) if topics.address_shard(ip := f"10.1.{n >> 8}.{n & 255}") == 0xB3)
    state.apply([shard(1, {"10.0.0.1": one})])
    assert state.workload_at(neighbour) is None
    state.apply([shard(2, {"10.0.0.1": one, neighbour: one})])
    assert state.workload_at(neighbour).name == "web-1"
    state.apply([shard(3, {"10.0.0.1": one})])
    assert state.workload_at(neighbour) is None


SERVICE = Service(
    "shop",
    "web",
    ("240.240.0.1", "fd75:5072:6f78::1"),
    (ServicePort("http", 80, 8080, ""), ServicePort("x", 81, 81, "")),
    {},
    (),
)


@pytest.mark.parametrize(
    "host",
    [
        "web.shop",
        "web.shop.svc",
        "web.shop.svc.cluster.local",
        "WEB.Shop.SVC.cluster.local",
        "web.shop.svc.cluster.local.",
    ],
)
def test_a_service_is_found_by_each_of_its_names(host):
    state = State(TRUST_DOMAIN)
    state.apply([published(SERVICE)])
    assert state.service_named(host) == SERVICE
    assert state.service_named(SERVICE.hostname) == SERVICE == state.service("shop/web")


@pytest.mark.parametrize(
    "host",
    [
        "",
        "web",
        "web.",
        ".shop",
        "web.shop.cluster.local",
        "web.shop.svc.svc",
        "shop.web",
        "a.web.shop",
        "web.shop.svc.x",
        "web.shop..",
    ],
)
def test_no_other_name_finds_it(host):
    state = State(TRUST_DOMAIN)
    state.apply([published(SERVICE)])
    assert state.service_named(host) is None


def test_a_service_is_found_by_each_address_and_port_and_no_other():
    state = State(TRUST_DOMAIN)
    state.apply([published(SERVICE)])
    for vip in SERVICE.vips:
        assert [state.service_at(vip, p.port) for p in SERVICE.ports] == [(SERVICE, p) for p in SERVICE.ports]
        assert state.service_at(vip, 8080) is None
    assert state.service_at("240.240.0.2", 80) is None


def test_another_message_with_the_stamp_that_is_held_changes_nothing():
    state = State(TRUST_DOMAIN)
    state.apply([published(SERVICE, version=2)])
    other = dataclasses.replace(SERVICE, vips=("240.240.9.9",))
    assert not state.apply([published(other, version=2)])
    assert not state.apply([published(other, version=9, epoch=0)])
    assert state.service("shop/web") == SERVICE
    assert state.apply([published(other, version=0, epoch=2)]).services == {"shop/web"}


def test_a_new_state_is_not_whole_and_an_empty_batch_makes_it_so():
    state = State(TRUST_DOMAIN)
    assert (state.whole, state.generation, state.workloads()) == (False, 0, ())
    assert not state.apply([])
    assert (state.whole, state.generation) == (True, 0)


def test_more_topics_than_the_bound_are_refused(monkeypatch):
    monkeypatch.setattr(state_module, "MAX_TOPICS", 1)
    state = State(TRUST_DOMAIN)
    state.apply([published(SERVICE)])
    state.apply([published(SERVICE, version=2)])
    with pytest.raises(RecordError, match="more than 1 topics"):
        state.apply([published(Service("shop", "db", (), (), {}, ()))])
    assert [service.name for service in state.services()] == ["web"]


def test_a_trust_domain_that_is_none_is_refused():
    with pytest.raises(ValueError, match="trust domain"):
        State("Cluster.Local")


def test_a_proxy_that_keeps_state_and_reads_files_holds_no_yaml_parser():
    script = "import control.client.state, control.client.files, sys; print('yaml' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    assert output.strip() == "False"
