"""A replica at close quarters: what it asks for, what it waits for, what it refuses, and what it tells of that."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api import messages, records, signing
from control.api.address import IpAddress
from control.api.identity import make_id, proxy_hash
from control.api.index import ResidentService
from control.api.messages import MAX_PAYLOAD_BYTES, Envelope
from control.api.policy import Action, AuthorizationPolicy
from control.api.records import topic_of
from control.api.revocations import Revocations
from control.api.status import ADDRESSES
from control.api.topics import (
    AddressesTopic,
    EndpointTopic,
    IndexTopic,
    ManifestTopic,
    NamespacesTopic,
    PolicyTopic,
    RevocationsTopic,
    RootTopic,
    ServiceTopic,
    TrustTopic,
    address_shard,
    format_topic,
    index_entry,
    index_shard,
)
from control.api.workload import Endpoint, Service, ServicePort, Workload
from control.client import inbox as inbox_module
from control.client import replica as replica_module
from control.client import snapshot
from control.client.replica import Replica, Status
from control.client.snapshot import SnapshotError
from tests.support import plane
from tests.support.plane import NOW, ROOT_NAMESPACE, Broker, ControlPlane, Truth
from tests.support.records import TRUST_DOMAIN

WEB = make_id(TRUST_DOMAIN, "shop", "web")
BANK = make_id(TRUST_DOMAIN, "bank", "web")
VIP = IpAddress("240.240.0.1")


def name(topic):
    return format_topic(TRUST_DOMAIN, topic)


def service(key="shop/reviews", port=80):
    namespace, _, service_name = key.partition("/")
    ports = (ServicePort("http", port, 8080, ""),)
    return Service(namespace, service_name, (VIP,), ports, {}, (make_id(TRUST_DOMAIN, namespace, "web"),))


def endpoint(workload="web-1", key="shop/reviews", weight=1):
    namespace = key.partition("/")[0]
    identity = make_id(TRUST_DOMAIN, namespace, "web")
    return Endpoint(key, f"{namespace}/{workload}", IpAddress("10.0.0.1"), identity, {80: 8080}, weight, True, {})


def policy(policy_name, namespace="shop", action=Action.ALLOW):
    return AuthorizationPolicy(namespace, policy_name, action, None, ())


def workload(weight=1):
    return Workload("shop", "web-1", "web", WEB, (IpAddress("10.0.0.1"),), {}, {}, "", weight)


class Mesh:
    """A control plane, its broker and one proxy, in step unless told otherwise."""

    def __init__(self, proxy=None):
        self.plane = ControlPlane(int(NOW))
        self.proxy = proxy or plane.uproxy(WEB, "web-1")
        self.broker = Broker(self.proxy)
        self.truth = Truth()
        self.broker.publish(self.plane.start())
        self.put(workload())

    @property
    def replica(self) -> Replica:
        return self.proxy.replica

    def put(self, *found):
        """Publish records; what they are replaced by is delivered later."""
        self.truth.put(*found)
        published = self.plane.publish(self.truth)
        self.broker.publish(published)
        return published

    def remove(self, *topics):
        for topic in topics:
            del self.truth.records[topic]
        published = self.plane.publish(self.truth)
        self.broker.publish(published)
        return published

    def settle(self):
        self.proxy.deliver_all(NOW)

    def up(self):
        """Connected and whole."""
        self.proxy.connect(self.broker.retained)
        self.settle()
        assert self.replica.based
        return self

    def want(self, *keys):
        for key in keys:
            self.replica.want_service(key)
        self.proxy.subscribe(self.broker.retained)
        self.proxy.flush(NOW)
        self.settle()

    def inject(self, topic, payload):
        """Somebody else publishes. Returns what the replica says of it."""
        before, held = self.replica.problems(), dict(self.proxy.held)
        self.proxy.queue.insert(0, (topic, payload))
        self.proxy.deliver(NOW)
        self.proxy.idle(NOW)
        assert self.proxy.held == held
        return [text for text in self.replica.problems() if text not in before]

    def held(self, kind):
        prefix = f"mesh/v1/{TRUST_DOMAIN}/{kind}/"
        return {topic.removeprefix(prefix) for topic in self.proxy.held if topic.startswith(prefix)}

    def payload(self, topic):
        return self.broker.retained[name(topic)]


@pytest.fixture
def mesh():
    return Mesh()


def altered(payload, **fields):
    """The message with other fields in its envelope."""
    return messages.encode(replace(messages.decode(payload), **fields))


# What is asked for


def test_a_uproxy_asks_for_its_own_and_for_what_it_dials(mesh):
    prefix = f"mesh/v1/{TRUST_DOMAIN}/"

    def filters():
        return {one.removeprefix(prefix) for one in mesh.replica.filters()}

    base = {"trust", f"crl/{ROOT_NAMESPACE}", f"wl/{proxy_hash(WEB)}/web-1", "root/shop", f"root/{ROOT_NAMESPACE}"}
    base |= {f"{kind}/{namespace}/#" for kind in ("policy", "index") for namespace in ("shop", ROOT_NAMESPACE)}
    assert filters() == base
    mesh.replica.want_service("shop/reviews")
    assert filters() == base | {"svc/shop/reviews", "ep/shop/reviews/#"}
    mesh.replica.want_service("bank/db")
    shard = index_shard("svc/db")
    bank = {"svc/bank/db", "ep/bank/db/#", "root/bank", f"index/bank/{shard:02x}"}
    assert filters() == base | {"svc/shop/reviews", "ep/shop/reviews/#"} | bank
    mesh.replica.want_address(VIP)
    assert filters() - base - bank == {
        "svc/shop/reviews",
        "ep/shop/reviews/#",
        f"addr/{address_shard(VIP):02x}",
    }
    assert mesh.replica.services() == ("shop/reviews", "bank/db")
    mesh.replica.drop_service("bank/db")
    mesh.replica.drop_service("shop/reviews")
    mesh.replica.drop_service("shop/reviews")
    assert filters() == base | {f"addr/{address_shard(VIP):02x}"}


def test_a_node_agent_asks_for_addresses_alone():
    replica = plane.node_agent().replica
    assert replica.filters() == {f"mesh/v1/{TRUST_DOMAIN}/trust", f"mesh/v1/{TRUST_DOMAIN}/addr/#"}
    replica.want_address(VIP)
    assert len(replica.filters()) == 2


@pytest.mark.parametrize("key", ["", "shop", "shop/", "/reviews", "shop/a/b", "Shop/reviews", "shop/+", "#", "a/#"])
def test_what_is_no_service_is_not_asked_for(mesh, key):
    before = mesh.replica.filters()
    mesh.replica.want_service(key)
    assert mesh.replica.filters() == before
    assert mesh.replica.service_status(key) is Status.WAITING


# The base, and roots that are applied whole


def test_nothing_is_handed_out_before_the_base_is_whole(mesh):
    mesh.put(policy("a"), policy("b", ROOT_NAMESPACE), service(), endpoint())
    mesh.replica.want_service("shop/reviews")
    mesh.replica.want_address(VIP)
    mesh.proxy.connect(mesh.broker.retained)
    last = mesh.proxy.queue.index(
        (name(PolicyTopic(ROOT_NAMESPACE, "b")), mesh.payload(PolicyTopic(ROOT_NAMESPACE, "b")))
    )
    missing = mesh.proxy.queue.pop(last)
    mesh.settle()
    assert not mesh.proxy.held
    assert not mesh.replica.based
    assert not mesh.replica.whole
    assert f"root/{ROOT_NAMESPACE}: 1 of what it lists, as policy/{ROOT_NAMESPACE}/b" in mesh.replica.waiting()
    assert mesh.replica.roots() == {}
    assert mesh.replica.age_s(NOW) is None
    assert mesh.replica.service_status("shop/reviews") is Status.WAITING
    assert mesh.replica.address_status(VIP) is Status.WAITING
    mesh.proxy.queue.append(missing)
    mesh.settle()
    assert mesh.replica.based
    assert mesh.held("policy") == {"shop/a", f"{ROOT_NAMESPACE}/b"}
    assert mesh.held("svc") == {"shop/reviews"}


def test_a_base_without_records_is_handed_out_too():
    """The state must learn that not knowing a policy means that there is none."""
    control_plane, proxy = ControlPlane(int(NOW)), plane.uproxy(make_id(TRUST_DOMAIN, ROOT_NAMESPACE, "x"), "x")
    proxy.connect({})
    proxy.hear(control_plane.start())
    assert not proxy.state.whole
    proxy.deliver_all(NOW)
    assert proxy.state.whole
    assert proxy.held == {}


def test_a_root_is_applied_when_its_last_record_is_there(mesh):
    mesh.up().put(policy("a", action=Action.DENY), policy("b"))
    record = mesh.proxy.queue.pop(0)
    mesh.settle()
    assert mesh.held("policy") == set()
    assert not mesh.replica.whole
    (text,) = mesh.replica.waiting()
    assert text.startswith("root/shop: 1 of what it lists, as policy/shop/")
    before = mesh.replica.roots()["shop"]
    mesh.proxy.queue.append(record)
    mesh.settle()
    assert mesh.held("policy") == {"shop/a", "shop/b"}
    assert mesh.replica.whole
    assert mesh.replica.roots()["shop"] > before
    assert mesh.replica.problems() == ()


def test_a_root_overtakes_one_that_never_got_whole(mesh):
    mesh.up().put(policy("a"))
    mesh.proxy.queue.pop(0)
    mesh.settle()
    mesh.put(policy("a", action=Action.DENY))
    mesh.settle()
    assert mesh.replica.whole
    assert mesh.proxy.held[name(PolicyTopic("shop", "a"))] == records.write(policy("a", action=Action.DENY))


def test_what_a_root_no_longer_lists_is_gone_without_any_tombstone(mesh):
    mesh.put(policy("a"))
    mesh.up()
    mesh.remove(PolicyTopic("shop", "a"))
    mesh.broker.publish(mesh.plane.collect())
    mesh.proxy.connect(mesh.broker.retained)
    mesh.settle()
    assert mesh.held("policy") == set()
    assert mesh.replica.whole


def test_a_tombstone_alone_deletes_nothing_that_is_listed(mesh):
    mesh.put(policy("a"), service(), endpoint())
    mesh.up().want("shop/reviews")
    for topic in (
        PolicyTopic("shop", "a"),
        ServiceTopic("shop", "reviews"),
        IndexTopic("shop", index_shard("policy/a")),
    ):
        epoch = messages.decode(mesh.payload(topic)).epoch + 1
        mesh.inject(name(topic), altered(mesh.payload(topic), epoch=epoch, body=None))
        mesh.inject(name(topic), b"")
    assert mesh.replica.whole


# Trust and signatures


def test_roots_wait_for_the_key_and_are_verified_one_at_a_time(mesh, monkeypatch):
    mesh.put(policy("a"))
    mesh.proxy.connect({topic: p for topic, p in mesh.broker.retained.items() if topic != name(TrustTopic())})
    mesh.settle()
    assert not mesh.replica.based
    assert "trust" in mesh.replica.waiting()
    assert not mesh.replica.has_work
    checks = []
    check = mesh.replica._verifier.check
    monkeypatch.setattr(mesh.replica._verifier, "check", lambda *args: checks.append(args[0]) or check(*args))
    mesh.proxy.queue.append((name(TrustTopic()), mesh.payload(TrustTopic())))
    mesh.proxy.deliver(NOW)
    assert len(checks) == 1
    assert mesh.replica.has_work
    assert not mesh.replica.whole
    mesh.proxy.idle(NOW)
    assert len(checks) == 2
    assert mesh.replica.whole
    assert not mesh.replica.has_work


def test_a_new_key_may_arrive_after_what_it_signs(mesh):
    mesh.up()
    trust, *roots = [one for one in mesh.plane.change_key(1) if "/ep/" not in one[0]]
    assert trust[0] == name(TrustTopic())
    mesh.proxy.hear(roots)
    mesh.settle()
    assert "root/shop: altered, or signed by another key" in mesh.replica.problems()
    before = mesh.replica.roots()["shop"]
    mesh.proxy.hear([trust])
    mesh.settle()
    assert mesh.replica.roots()["shop"] > before
    assert mesh.replica.whole


def test_heartbeats_keep_it_young(mesh):
    mesh.up()
    assert mesh.replica.age_s(NOW + 40) == pytest.approx(40, abs=1)
    mesh.plane.now += 30
    mesh.broker.publish(mesh.plane.refresh())
    mesh.proxy.deliver(NOW)
    assert mesh.replica.age_s(NOW + 40) == pytest.approx(40, abs=1)  # the oldest counts
    mesh.settle()
    assert mesh.replica.age_s(NOW + 40) == pytest.approx(10, abs=1)
    assert mesh.replica.age_s(NOW) == 0  # our clock may be behind
    assert mesh.replica.problems() == ()


def test_a_late_heartbeat_makes_it_no_older(mesh):
    mesh.up()
    heartbeats = []
    for _ in range(2):
        mesh.plane.now += 30
        heartbeats.append(mesh.plane.refresh())
    mesh.proxy.hear(heartbeats[1] + heartbeats[0])
    mesh.settle()
    assert mesh.replica.age_s(NOW + 60) == pytest.approx(0, abs=1)
    assert mesh.replica.problems() == ()


def test_before_there_is_a_key_the_newest_root_is_kept(mesh):
    trust = (name(TrustTopic()), mesh.payload(TrustTopic()))
    old = (name(RootTopic("shop")), mesh.payload(RootTopic("shop")))
    mesh.put(policy("a"))
    mesh.proxy.connect({topic: payload for topic, payload in mesh.broker.retained.items() if topic != trust[0]})
    mesh.proxy.queue += [old, trust]
    mesh.settle()
    assert mesh.replica.whole
    assert mesh.held("policy") == {"shop/a"}


def test_a_root_that_waits_for_its_turn_is_not_lost_to_an_older_one(mesh):
    trust = (name(TrustTopic()), mesh.payload(TrustTopic()))
    old = (name(RootTopic("shop")), mesh.payload(RootTopic("shop")))
    mesh.put(policy("a"))
    mesh.proxy.connect({topic: payload for topic, payload in mesh.broker.retained.items() if topic != trust[0]})
    # Of the two roots that wait for the key, the trust's turn is the first one's.
    while mesh.proxy.queue:
        mesh.proxy.deliver(NOW)
    mesh.proxy.queue += [trust, old]
    while mesh.proxy.queue:
        mesh.proxy.deliver(NOW)
    mesh.settle()
    assert mesh.replica.whole
    assert mesh.held("policy") == {"shop/a"}


# Attacks


def root_signed_by_the_wrong_key(mesh):
    envelope = messages.decode(mesh.payload(RootTopic("shop")))
    envelope = replace(envelope, version=envelope.version + 1)
    signature = plane.signer(7).key.sign(signing.signed_bytes(name(RootTopic("shop")), envelope))
    return messages.encode(replace(envelope, body={**envelope.body, "signature": signature}))


def unsigned_root(mesh):
    envelope = messages.decode(mesh.payload(RootTopic("shop")))
    return messages.encode(replace(envelope, version=envelope.version + 1, body={**envelope.body, "signature": b""}))


def newer_root(mesh):
    payload = mesh.payload(RootTopic("shop"))
    return altered(payload, version=messages.decode(payload).version + 1)


def root_of_another_namespace(mesh):
    return mesh.payload(RootTopic("bank"))


def two_roots_of_one_stamp(mesh):
    """Even the right key cannot say two things."""
    envelope = messages.decode(mesh.payload(RootTopic("shop")))
    envelope = replace(envelope, issued_at=envelope.issued_at + 1, body={"shards": {}})
    signature = plane.signer().key.sign(signing.signed_bytes(name(RootTopic("shop")), envelope))
    return messages.encode(replace(envelope, body={**envelope.body, "signature": signature}))


def without_body(mesh):
    return altered(mesh.payload(RootTopic("shop")), epoch=2**40, body=None)


def huge(mesh):
    return bytes(MAX_PAYLOAD_BYTES + 1)


@pytest.mark.parametrize(
    ("forgery", "says"),
    [
        (root_signed_by_the_wrong_key, "altered, or signed by another key"),
        (unsigned_root, "unsigned"),
        (newer_root, "altered, or signed by another key"),
        (root_of_another_namespace, "altered, or signed by another key"),
        (two_roots_of_one_stamp, "was something else before"),
        (without_body, "unsigned"),
        (huge, "malformed: 262145 bytes"),
        (lambda mesh: b"\xc1", "malformed: not msgpack"),
        (lambda mesh: mesh.payload(PolicyTopic("shop", "a")), "malformed: body lacks 'shards'"),
    ],
)
def test_a_root_is_genuine_or_refused(mesh, forgery, says):
    mesh.put(policy("a"))
    mesh.put(policy("b", "bank"))
    mesh.up().want("bank/x")
    before = mesh.replica.roots()
    (problem,) = mesh.inject(name(RootTopic("shop")), forgery(mesh))
    assert problem.startswith("root/shop: ")
    assert says in problem
    assert mesh.replica.roots() == before
    assert mesh.replica.whole
    # And the next genuine one is taken.
    mesh.put(policy("c"))
    mesh.settle()
    assert "shop/c" in mesh.held("policy")


def test_an_older_root_is_a_replay_also_after_a_restart(mesh):
    mesh.put(policy("deny", action=Action.DENY))
    mesh.up()
    old = dict(mesh.broker.retained)
    mesh.remove(PolicyTopic("shop", "deny"))
    mesh.settle()
    dumped = mesh.replica.dump()
    (problem,) = mesh.inject(name(RootTopic("shop")), old[name(RootTopic("shop"))])
    assert problem.startswith("root/shop: replayed: version (")
    mesh.proxy.restart(dumped)
    mesh.proxy.connect(old)  # a broker that was set back
    mesh.settle()
    assert mesh.held("policy") == set()
    assert any(text.startswith("root/shop: replayed") for text in mesh.replica.problems())


def test_what_is_revoked_is_part_of_the_base_and_comes_with_its_root(mesh):
    topic = name(RevocationsTopic(ROOT_NAMESPACE))
    mesh.put(Revocations(ROOT_NAMESPACE, (b"one",)))
    kept_back = dict(mesh.broker.retained)
    del kept_back[topic]
    mesh.proxy.connect(kept_back)
    mesh.settle()
    assert not mesh.replica.based, "a broker cannot keep a revocation from it"
    assert any("crl/" in text for text in mesh.replica.waiting())
    mesh.proxy.connect(mesh.broker.retained)
    mesh.settle()
    assert mesh.proxy.held[topic] == {"lists": [b"one"]}
    old = mesh.payload(RevocationsTopic(ROOT_NAMESPACE))
    mesh.put(Revocations(ROOT_NAMESPACE, (b"two",)))
    mesh.settle()
    assert mesh.proxy.held[topic] == {"lists": [b"two"]}
    assert mesh.inject(topic, old) == [f"crl/{ROOT_NAMESPACE}: replayed: older than what the root lists"]
    forged = altered(old, version=2**40, body={"lists": [b"none"]})
    mesh.inject(topic, forged)
    assert mesh.proxy.held[topic] == {"lists": [b"two"]}


def test_a_record_is_what_the_root_lists_or_refused(mesh):
    mesh.put(policy("a"))
    old = mesh.payload(PolicyTopic("shop", "a"))
    mesh.put(policy("a", action=Action.DENY), service(), endpoint())
    mesh.up().want("shop/reviews")
    now = mesh.payload(PolicyTopic("shop", "a"))
    topic = name(PolicyTopic("shop", "a"))
    forged = altered(now, body=records.write(policy("a")))
    assert mesh.inject(topic, forged) == ["policy/shop/a: altered: not what the root lists"]
    assert mesh.inject(topic, old) == ["policy/shop/a: replayed: older than what the root lists"]
    assert mesh.inject(topic, now) == []  # that is a repetition
    (problem,) = mesh.inject(name(PolicyTopic("shop", "other")), now)
    assert problem.startswith("policy/shop/other: the root does not list it")
    reviews = mesh.payload(ServiceTopic("shop", "reviews"))
    (problem,) = mesh.inject(name(ServiceTopic("shop", "reviews")), altered(reviews, issued_at=1))
    assert problem.startswith("svc/shop/reviews: altered")
    # Nobody asked for these, so that they are nobody's business.
    assert mesh.inject(name(PolicyTopic("bank", "a")), now) == []
    assert mesh.inject(name(ServiceTopic("shop", "db")), reviews) == []
    assert mesh.replica.whole


def test_an_index_shard_is_what_the_root_lists_or_refused(mesh):
    mesh.put(policy("a"))
    number = index_shard(index_entry(PolicyTopic("shop", "a")))
    old = mesh.payload(IndexTopic("shop", number))
    mesh.put(policy("a", action=Action.DENY))
    mesh.up()
    topic = name(IndexTopic("shop", number))
    says = [f"index/shop/{number:02x}: not the shard that the root lists: altered, mixed or replayed"]
    assert mesh.inject(topic, old) == says
    assert mesh.inject(topic, mesh.payload(IndexTopic("shop", number))) == []


def test_a_forged_record_that_claims_to_be_newer_is_told_apart_by_time(mesh):
    """It could be the first message of the next change set; the root would follow."""
    mesh.put(policy("a"))
    mesh.up()
    now = messages.decode(mesh.payload(PolicyTopic("shop", "a")))
    forged = messages.encode(replace(now, version=now.version + 1, body=records.write(policy("a", action=Action.DENY))))
    assert mesh.inject(name(PolicyTopic("shop", "a")), forged) == []
    for _ in range(2):
        assert mesh.replica.problems() == ()
        mesh.plane.now += 30
        mesh.broker.publish(mesh.plane.refresh())
        mesh.settle()
    assert mesh.replica.problems() == ("policy/shop/a: no root lists it: forged, or its publication was broken off",)
    mesh.put(policy("b"))  # or sooner, by the next root
    mesh.settle()
    assert mesh.replica.whole


def test_a_record_of_old_stamp_is_taken_when_a_new_root_lists_it(mesh):
    """A restored control plane may publish again what the proxy has seen a newer version of."""
    mesh.put(policy("a"), policy("b"))
    backup = mesh.plane.backup()
    mesh.put(policy("a", action=Action.DENY))
    mesh.up()
    mesh.plane = backup
    mesh.plane.now += 1000
    mesh.broker.retained.clear()  # so that nothing tells of the newer version
    published = mesh.plane.start() + mesh.plane.audit({})
    mesh.proxy.connect({})
    mesh.broker.publish(published)
    mesh.settle()
    assert mesh.proxy.held[name(PolicyTopic("shop", "a"))] == records.write(policy("a"))
    assert mesh.replica.whole


def test_a_late_heartbeat_of_the_root_before_costs_the_next_one_nothing(mesh):
    """What it waits for may have old stamps, and must not be swept out with what the old root does not list."""
    mesh.put(policy("a"), policy("b"))
    backup = mesh.plane.backup()
    mesh.put(policy("a", action=Action.DENY), policy("b", action=Action.DENY))
    mesh.up()
    mesh.plane.now += 30
    (heartbeat,) = [one for one in mesh.plane.refresh() if one[0] == name(RootTopic("shop"))]
    mesh.plane = backup
    mesh.plane.now += 1000
    mesh.proxy.connect({})
    mesh.proxy.hear(mesh.plane.start())
    mesh.settle()
    assert not mesh.replica.whole
    mesh.proxy.hear([(topic, payload) for topic, payload in mesh.plane.audit({}) if "/policy/" not in topic])
    mesh.settle()
    for record in ("a", "b"):
        topic = name(PolicyTopic("shop", record))
        mesh.proxy.queue += [(topic, mesh.plane.store[topic].payload), heartbeat]
    mesh.settle()
    assert mesh.replica.whole
    assert mesh.proxy.held[name(PolicyTopic("shop", "a"))] == records.write(policy("a"))


def test_a_message_that_is_not_of_this_mesh_is_refused(mesh):
    mesh.up()
    payload = mesh.payload(RootTopic("shop"))
    for topic in ("mesh/v1/other.mesh/root/shop", "root/shop", "mesh/v1/cluster.local/nothing/shop/x", "", "x" * 500):
        (problem,) = mesh.inject(topic, payload)
        assert "malformed" in problem
        assert len(problem) <= 200
    assert len(mesh.replica.problems()) == 5


@given(st.binary(max_size=60), st.sampled_from(["root/shop", "policy/shop/a", "index/shop/00", "trust", "ep/shop/x/y"]))
def test_no_bytes_raise(payload, levels):
    replica = plane.uproxy(WEB, "web-1").replica
    assert list(replica.receive(f"mesh/v1/{TRUST_DOMAIN}/{levels}", payload, NOW)) == []


def test_a_trust_that_proves_nothing_is_refused(mesh):
    mesh.up()
    body = {"certificates": [plane.signer().certificates[1]]}
    (problem,) = mesh.inject(name(TrustTopic()), messages.encode(Envelope(2**40, 1, 0, body)))
    assert problem.startswith("trust: the config key is certified for")
    (problem,) = mesh.inject(name(TrustTopic()), messages.encode(Envelope(2**40, 1, 0, None)))
    assert problem == "trust: unsigned: it is never deleted"


# Services


def test_a_service_is_handed_out_with_all_its_endpoints(mesh):
    mesh.put(service(), endpoint("web-1"), endpoint("web-2"))
    mesh.up()
    mesh.replica.want_service("shop/reviews")
    mesh.proxy.subscribe(mesh.broker.retained)
    late = next(i for i, (topic, _) in enumerate(mesh.proxy.queue) if topic.endswith("/web-2"))
    missing = mesh.proxy.queue.pop(late)
    mesh.settle()
    assert mesh.held("svc") == set()
    assert mesh.replica.service_status("shop/reviews") is Status.WAITING
    assert mesh.replica.waiting() == ("svc/shop/reviews", "ep/shop/reviews: 1 of 2")
    mesh.proxy.queue.append(missing)
    mesh.settle()
    assert mesh.replica.service_status("shop/reviews") is Status.KNOWN
    assert mesh.held("ep") == {"shop/reviews/web-1", "shop/reviews/web-2"}
    # From now on each endpoint counts at once, and what is missing only shows.
    mesh.put(endpoint("web-3"), endpoint("web-4"))
    mesh.proxy.deliver(NOW)
    assert len(mesh.held("ep")) == 3
    assert not mesh.replica.whole
    assert mesh.replica.service_status("shop/reviews") is Status.KNOWN
    mesh.settle()
    assert mesh.replica.whole


def test_a_service_without_endpoints_is_known(mesh):
    mesh.put(service("bank/db"))
    mesh.up().want("bank/db")
    assert mesh.replica.service_status("bank/db") is Status.KNOWN


def test_there_is_no_service_when_the_root_says_so(mesh):
    mesh.put(policy("a", "bank"))
    mesh.up().want("bank/db", "shop/nothing", "nowhere/db")
    assert mesh.replica.service_status("bank/db") is Status.ABSENT
    assert mesh.replica.service_status("shop/nothing") is Status.ABSENT
    assert mesh.replica.service_status("nowhere/db") is Status.WAITING
    assert mesh.replica.service_status("never/asked") is Status.WAITING
    assert mesh.replica.waiting() == ("root/nowhere", "svc/nowhere/db", "ep/nowhere/db: no manifest yet")
    mesh.put(service("bank/db"), endpoint(key="bank/db"))
    mesh.settle()
    assert mesh.replica.service_status("bank/db") is Status.KNOWN
    assert mesh.held("ep") == {"bank/db/web-1"}


def test_a_deleted_service_takes_its_endpoints_along(mesh):
    mesh.put(service(), endpoint())
    mesh.up().want("shop/reviews")
    # The endpoints' own tombstones are lost.
    published = mesh.remove(ServiceTopic("shop", "reviews"))
    assert not any("/ep/" in topic and topic.endswith("web-1") for topic, _ in published)
    mesh.settle()
    assert mesh.replica.service_status("shop/reviews") is Status.ABSENT
    assert mesh.held("ep") == mesh.held("svc") == set()
    mesh.put(service(port=81))
    mesh.settle()
    assert mesh.replica.service_status("shop/reviews") is Status.KNOWN
    assert mesh.held("ep") == {"shop/reviews/web-1"}


def test_a_dropped_service_goes_with_the_next_batch_and_may_come_again(mesh):
    mesh.put(service(), endpoint(), service("bank/db"), endpoint(key="bank/db"))
    mesh.up().want("shop/reviews", "bank/db")
    roots = mesh.replica.roots()
    for key in ("shop/reviews", "bank/db"):
        mesh.replica.drop_service(key)
        assert mesh.replica.service_status(key) is Status.WAITING
    assert mesh.replica.services() == ()
    mesh.want()
    assert mesh.held("svc") == mesh.held("ep") == set()
    assert mesh.replica.roots().keys() == roots.keys() - {"bank"}
    assert mesh.replica.whole
    mesh.want("shop/reviews", "bank/db")
    assert mesh.held("svc") == {"shop/reviews", "bank/db"}
    assert mesh.held("ep") == {"shop/reviews/web-1", "bank/db/web-1"}
    assert mesh.proxy.state.endpoints("bank/db")


def test_a_service_that_is_wanted_again_before_anybody_unsubscribed_was_never_away(mesh):
    """The broker would not send it again."""
    mesh.put(service("bank/db"), endpoint(key="bank/db"))
    mesh.up().want("bank/db")
    mesh.replica.drop_service("bank/db")
    mesh.put(endpoint("web-2", key="bank/db"))
    mesh.settle()
    mesh.replica.want_service("bank/db")
    assert mesh.replica.service_status("bank/db") is Status.KNOWN
    assert mesh.held("ep") == {"bank/db/web-1", "bank/db/web-2"}


def test_services_share_a_shard_of_the_index(mesh):
    """Ending the interest in one must not forget what another waits with."""
    first = "s0"
    second = next(f"s{n}" for n in range(1, 999) if index_shard(f"svc/s{n}") == index_shard(f"svc/{first}"))
    mesh.put(service(f"bank/{first}"), service(f"bank/{second}"))
    mesh.up().want(f"bank/{first}")
    mesh.replica.want_service(f"bank/{second}")
    mesh.replica.drop_service(f"bank/{first}")
    mesh.want()
    assert mesh.replica.service_status(f"bank/{second}") is Status.KNOWN


def test_a_namespace_that_was_dropped_does_not_come_back_older(mesh):
    mesh.put(service("bank/db"))
    old = mesh.payload(RootTopic("bank"))
    mesh.put(service("bank/db", port=81))
    mesh.up().want("bank/db")
    for restart in (False, True):
        mesh.replica.drop_service("bank/db")
        mesh.want()
        if restart:
            mesh.proxy.restart(mesh.replica.dump())
            mesh.proxy.connect(mesh.broker.retained)
            mesh.settle()
        mesh.replica.want_service("bank/db")
        (problem,) = mesh.inject(name(RootTopic("bank")), old)
        assert "replayed" in problem
        mesh.want()
        assert mesh.replica.service_status("bank/db") is Status.KNOWN


def test_a_service_that_is_waited_for_holds_up_no_policy(mesh):
    """A broker that withholds one thing must not be able to keep a DENY from being applied by it."""
    mesh.put(service(), endpoint())
    mesh.up()
    mesh.replica.want_service("shop/reviews")
    mesh.put(policy("deny", action=Action.DENY))
    mesh.settle()
    assert mesh.held("policy") == {"shop/deny"}
    assert mesh.replica.service_status("shop/reviews") is Status.WAITING


def test_a_service_that_is_known_is_never_behind_its_policies(mesh):
    mesh.put(service(), endpoint())
    mesh.up().want("shop/reviews")
    mesh.put(service(port=81), policy("deny", action=Action.DENY))
    place = next(i for i, (topic, _) in enumerate(mesh.proxy.queue) if "/svc/" in topic)
    late = mesh.proxy.queue.pop(place)
    mesh.settle()
    assert mesh.held("policy") == set()
    mesh.proxy.queue.append(late)
    mesh.settle()
    assert mesh.held("policy") == {"shop/deny"}
    assert mesh.proxy.held[name(ServiceTopic("shop", "reviews"))]["ports"][0][1] == 81


def test_the_last_message_of_a_session_may_be_one_that_was_known(mesh):
    mesh.put(service(), endpoint("web-1"), endpoint("web-2"))
    mesh.up().want("shop/reviews")
    mesh.remove(EndpointTopic("shop", "reviews", "web-2"))
    mesh.broker.publish(mesh.plane.collect())
    mesh.proxy.connect({})
    mesh.proxy.hear(sorted(mesh.broker.retained.items()))  # the manifest before its endpoints
    mesh.settle()
    assert mesh.held("ep") == {"shop/reviews/web-1"}
    assert mesh.replica.whole


def test_many_endpoints_are_compared_with_their_manifest_when_there_is_time(mesh):
    count = 600
    mesh.put(service(), *(endpoint(f"web-{number}") for number in range(count)))
    mesh.up()
    mesh.replica.want_service("shop/reviews")
    mesh.proxy.subscribe(mesh.broker.retained)
    while mesh.proxy.queue:
        mesh.proxy.deliver(NOW)
    assert mesh.replica.has_work
    assert mesh.replica.service_status("shop/reviews") is Status.WAITING
    mesh.proxy.idle(NOW)
    assert mesh.replica.service_status("shop/reviews") is Status.KNOWN
    assert len(mesh.proxy.state.endpoints("shop/reviews")) == count


def test_a_service_that_is_dropped_is_compared_no_more(mesh):
    mesh.put(service("bank/db"), *(endpoint(f"web-{number}", key="bank/db") for number in range(300)))
    mesh.up().replica.want_service("bank/db")
    mesh.proxy.subscribe(mesh.broker.retained)
    while mesh.proxy.queue:
        mesh.proxy.deliver(NOW)
    assert mesh.replica.has_work
    mesh.replica.drop_service("bank/db")
    mesh.want()
    assert not mesh.replica.has_work


# Addresses


def test_an_address_shard_vouches_for_itself(mesh):
    mesh.truth.residents[VIP] = ResidentService("shop", "reviews", (80,))
    mesh.put(service())
    old = mesh.payload(AddressesTopic(address_shard(VIP)))
    mesh.truth.residents[VIP] = ResidentService("shop", "reviews", (81,))
    mesh.put()
    mesh.up()
    mesh.replica.want_address(VIP)
    assert mesh.replica.waiting() == (f"addr/{address_shard(VIP):02x}",)
    topic = name(AddressesTopic(address_shard(VIP)))
    payload = mesh.payload(AddressesTopic(address_shard(VIP)))
    assert "unsigned" in mesh.inject(topic, altered(payload, body=None))[0]
    assert "altered" in mesh.inject(topic, altered(payload, issued_at=1))[0]
    mesh.proxy.subscribe(mesh.broker.retained)
    mesh.settle()
    assert mesh.replica.address_status(VIP) is Status.KNOWN
    assert mesh.proxy.state.resident_at(VIP) == ResidentService("shop", "reviews", (81,))
    assert "replayed" in mesh.inject(topic, old)[0]
    assert mesh.inject(topic, payload) == []
    other = next(
        ip
        for n in range(2, 2000)
        if address_shard(ip := IpAddress(f"240.240.{n // 250}.{n % 250}")) == address_shard(VIP)
    )
    assert mesh.replica.address_status(other) is Status.ABSENT
    del mesh.truth.residents[VIP]
    mesh.put()
    mesh.settle()
    assert mesh.replica.address_status(VIP) is Status.ABSENT
    assert mesh.proxy.state.resident_at(VIP) is None


def test_the_list_of_namespaces_vouches_for_itself(mesh):
    topic = name(NamespacesTopic())
    assert topic not in mesh.replica.filters()
    mesh.put(service())
    old = mesh.payload(NamespacesTopic())
    mesh.put(service("bank/db"))
    payload = mesh.payload(NamespacesTopic())
    mesh.up()
    assert mesh.replica.whole
    mesh.replica.want_namespaces()
    assert topic in mesh.replica.filters()
    assert mesh.replica.waiting() == ("root",)
    assert mesh.replica.namespace_status("shop") is Status.WAITING
    assert "unsigned" in mesh.inject(topic, altered(payload, body=None))[0]
    assert "altered" in mesh.inject(topic, altered(payload, issued_at=1))[0]
    mesh.proxy.subscribe(mesh.broker.retained)
    mesh.settle()
    statuses = {one: mesh.replica.namespace_status(one) for one in ("shop", "bank", "com", ROOT_NAMESPACE)}
    assert statuses == dict(zip(statuses, [Status.KNOWN] * 2 + [Status.ABSENT] * 2, strict=True))
    assert "replayed" in mesh.inject(topic, old)[0]
    assert mesh.inject(topic, payload) == []
    mesh.remove(ServiceTopic("bank", "db"))
    mesh.settle()
    assert mesh.replica.namespace_status("bank") is Status.ABSENT
    mesh.broker.publish(mesh.plane.change_key(1))
    mesh.settle()
    assert mesh.replica.whole
    assert mesh.replica.namespace_status("shop") is Status.KNOWN


def test_the_list_of_namespaces_is_kept_over_a_restart(mesh):
    mesh.put(service())
    mesh.replica.want_namespaces()
    mesh.up()
    dumped = mesh.replica.dump()
    again = plane.uproxy(WEB, "web-1").replica
    again.want_namespaces()
    again.restore(dumped)
    assert again.namespace_status("shop") is Status.KNOWN
    other = plane.uproxy(WEB, "web-1").replica
    other.restore(dumped)
    assert other.namespace_status("shop") is Status.WAITING, "it is not wanted any more"
    assert other.problems() == ()


def test_a_node_agent_takes_all_addresses_or_none():
    mesh = Mesh(plane.node_agent())
    ips = [IpAddress(f"240.240.0.{n}") for n in range(1, 40)]
    mesh.truth.residents |= dict.fromkeys(ips, ResidentService("shop", "reviews", (80,)))
    mesh.put()
    mesh.proxy.connect(mesh.broker.retained)
    shard = AddressesTopic(address_shard(ips[0]))
    late = (name(shard), mesh.payload(shard))
    mesh.proxy.queue.remove(late)
    mesh.settle()
    assert not mesh.replica.based
    assert not mesh.proxy.held
    mesh.proxy.queue.append(late)
    mesh.settle()
    assert mesh.replica.whole
    assert set(mesh.proxy.state.residents()) == set(ips)
    assert {mesh.replica.address_status(ip) for ip in ips} == {Status.KNOWN}
    assert mesh.replica.address_status(IpAddress("10.9.9.9")) is Status.ABSENT
    mesh.truth.residents.clear()
    mesh.put()
    mesh.settle()
    assert not mesh.proxy.state.residents()
    assert mesh.replica.problems() == ()
    assert mesh.replica.roots().keys() == {ADDRESSES}


# The last good state


def restarted(mesh):
    mesh.proxy.restart(mesh.replica.dump())
    return mesh


def test_a_proxy_starts_from_its_snapshot_alone(mesh):
    mesh.truth.residents[VIP] = ResidentService("shop", "reviews", (80,))
    mesh.put(
        service(), endpoint("web-1"), endpoint("web-2"), policy("a"), policy("b", ROOT_NAMESPACE), service("bank/db")
    )
    mesh.up()
    mesh.replica.want_address(VIP)
    mesh.want("shop/reviews", "bank/db", "shop/nothing")
    held, roots = dict(mesh.proxy.held), mesh.replica.roots()
    restarted(mesh)
    assert mesh.proxy.held == held
    assert mesh.replica.roots() == roots
    assert mesh.replica.based
    assert mesh.replica.whole
    assert mesh.proxy.state.whole
    assert mesh.replica.services() == ("shop/reviews", "bank/db")
    assert mesh.replica.service_status("shop/reviews") is Status.KNOWN
    assert mesh.replica.address_status(VIP) is Status.KNOWN
    assert mesh.replica.age_s(NOW + 7) == pytest.approx(7, abs=1)
    # And goes on from there.
    mesh.proxy.connect(mesh.broker.retained)
    mesh.put(policy("c"), endpoint("web-3"))
    mesh.remove(EndpointTopic("shop", "reviews", "web-1"))
    mesh.settle()
    assert mesh.held("policy") == {"shop/a", f"{ROOT_NAMESPACE}/b", "shop/c"}
    assert mesh.held("ep") == {"shop/reviews/web-2", "shop/reviews/web-3"}
    assert mesh.replica.problems() == ()


def test_a_service_of_many_endpoints_is_restored(mesh):
    mesh.put(service(), *(endpoint(f"w-{number}") for number in range(replica_module._SETTLED_AT_ONCE + 1)))
    mesh.up().want("shop/reviews")
    held = dict(mesh.proxy.held)
    restarted(mesh)
    assert mesh.proxy.held == held
    assert mesh.replica.service_status("shop/reviews") is Status.KNOWN


def test_a_service_that_was_dropped_is_not_restored(mesh):
    mesh.put(service(), service("bank/db"))
    mesh.up().want("shop/reviews", "bank/db")
    mesh.replica.drop_service("bank/db")
    restarted(mesh)
    assert mesh.replica.services() == ("shop/reviews",)
    assert mesh.held("svc") == {"shop/reviews"}


def test_a_service_is_restored_with_what_was_on_its_way(mesh):
    mesh.put(service(), endpoint("web-1"))
    mesh.up().want("shop/reviews")
    mesh.put(endpoint("web-2"), endpoint("web-3"))
    mesh.proxy.deliver(NOW)
    restarted(mesh)
    assert mesh.replica.service_status("shop/reviews") is Status.KNOWN
    assert len(mesh.held("ep")) == 2
    assert not mesh.replica.whole


def test_a_snapshot_without_the_base_starts_nothing(mesh):
    mesh.put(policy("a"))
    mesh.up()
    mesh.proxy._want = lambda replica: replica.want_workload(BANK, "web-1")
    restarted(mesh)
    assert not mesh.replica.based
    assert not mesh.proxy.state.whole
    assert not mesh.proxy.held


def test_a_snapshot_taken_before_anything_came_starts_nothing(mesh):
    restarted(mesh)
    assert not mesh.replica.based
    assert not mesh.proxy.state.whole
    assert restarted(mesh.up()).replica.based


def test_a_snapshot_of_another_mesh_is_refused(mesh):
    mesh.up()
    dumped = mesh.replica.dump()
    other = Replica("other.mesh", plane.signer().verifier())
    with pytest.raises(SnapshotError, match=r"of the mesh cluster\.local; this proxy is of other\.mesh"):
        other.restore(dumped)


def test_a_record_that_changed_in_the_snapshot_is_not_restored(mesh):
    """Its digest is in the shard, the shard's in the root."""
    mesh.put(policy("a", action=Action.DENY))
    mesh.up()
    found = snapshot.unpack(mesh.replica.dump())
    topic = name(PolicyTopic("shop", "a"))
    spoilt = tuple((t, altered(p, issued_at=1) if t == topic else p) for t, p in found.messages)
    mesh.proxy.restart(snapshot.pack(replace(found, messages=spoilt)))
    assert not mesh.replica.based


# Bounds


def test_what_nobody_lists_cannot_fill_the_memory(mesh, monkeypatch):
    monkeypatch.setattr(inbox_module, "MAX_BYTES", 200_000)
    mesh.up()
    now = messages.decode(mesh.payload(RootTopic("shop")))
    for number in range(2000):
        record = records.write(policy(f"p{number}"))
        forged = messages.encode(Envelope(now.epoch, now.version + 9, 0, record))
        mesh.proxy.queue.append((name(PolicyTopic("shop", f"p{number}")), forged))
    mesh.settle()
    assert mesh.replica._inbox._bytes <= 200_000
    assert any("too much has come" in text for text in mesh.replica.problems())
    assert len(mesh.replica.problems()) <= 16
    # What comes now is what the broker retains, so it is what counts.
    mesh.put(policy("a"), policy("b"))
    mesh.settle()
    assert mesh.held("policy") == {"shop/a", "shop/b"}


def test_a_change_that_does_not_fit_is_not_applied_in_part(mesh, monkeypatch):
    mesh.up().put(policy("a"), policy("b"))
    monkeypatch.setattr(inbox_module, "MAX_BYTES", 1000)
    mesh.settle()
    assert mesh.held("policy") == set()
    assert not mesh.replica.whole
    monkeypatch.undo()
    mesh.proxy.connect(mesh.broker.retained)
    mesh.settle()
    assert mesh.held("policy") == {"shop/a", "shop/b"}
    assert mesh.replica.whole


def test_a_repetition_is_kept_nowhere(mesh):
    mesh.put(policy("a"), service(), endpoint())
    mesh.up().want("shop/reviews")
    mesh.proxy.connect(mesh.broker.retained)
    mesh.settle()
    assert mesh.replica._inbox._topics == {}


def test_what_is_dropped_while_there_is_no_broker_is_forgotten_all_the_same(mesh, monkeypatch):
    monkeypatch.setattr(replica_module, "_MAX_DROPPED", 3)
    mesh.put(*(service(f"n{number}/db") for number in range(10)))
    mesh.up().want(*(f"n{number}/db" for number in range(10)))
    mesh.proxy.disconnect()
    for number in range(10):
        mesh.replica.drop_service(f"n{number}/db")
    mesh.proxy.flush(NOW)
    assert len(mesh.held("svc")) <= 3


def test_namespaces_once_dialled_are_remembered_to_a_limit(mesh, monkeypatch):
    monkeypatch.setattr(replica_module, "_MAX_FLOORS", 2)
    for number in range(5):
        mesh.put(service(f"n{number}/db"))
    mesh.up()
    for number in range(5):
        mesh.want(f"n{number}/db")
        mesh.replica.drop_service(f"n{number}/db")
        mesh.want()
    assert mesh.replica._floors.keys() == {"n3", "n4"}


def test_a_root_that_could_not_be_verified_goes_with_its_namespace(mesh):
    mesh.put(service("bank/db"))
    mesh.up().want("bank/db")
    mesh.inject(name(RootTopic("bank")), altered(mesh.payload(RootTopic("bank")), epoch=2**40))
    assert len(mesh.replica._unverified) == 1
    mesh.replica.drop_service("bank/db")
    mesh.want()
    assert mesh.replica._unverified == {}


def test_what_came_of_a_namespace_without_its_root_goes_with_it(mesh):
    mesh.put(service("bank/db"))
    mesh.up().replica.want_service("bank/db")
    mesh.proxy.subscribe({topic: payload for topic, payload in mesh.broker.retained.items() if "/root/" not in topic})
    mesh.settle()
    assert len(mesh.replica._inbox._topics) == 2
    mesh.replica.drop_service("bank/db")
    mesh.want()
    assert mesh.replica._inbox._topics == {}


def test_policies_of_a_namespace_that_is_only_dialled_are_none_of_our_business(mesh):
    mesh.put(service("bank/db"), policy("a", "bank"))
    mesh.up().want("bank/db")
    mesh.inject(name(PolicyTopic("bank", "a")), mesh.payload(PolicyTopic("bank", "a")))
    assert mesh.replica._inbox._topics == {}


def test_another_workloads_record_is_none_of_our_business(mesh):
    other = replace(workload(), name="web-2")
    mesh.put(other)
    mesh.up()
    topic = name(topic_of(other))
    mesh.inject(topic, mesh.broker.retained[topic])
    assert mesh.replica._inbox._topics == {}
    assert mesh.replica.problems() == ()


def test_nothing_is_kept_that_no_root_will_list(mesh):
    mesh.put(policy("a"), service(), endpoint(), service("bank/db"), endpoint(key="bank/db"))
    old = dict(mesh.broker.retained)
    mesh.up().want("shop/reviews", "bank/db")
    assert mesh.replica._inbox._topics == {}
    assert mesh.replica._unverified == {}
    mesh.put(policy("a", action=Action.DENY), service(port=81), service("bank/db", port=81))
    mesh.put(policy("a"), service(port=82), service("bank/db", port=82))
    mesh.settle()
    assert mesh.replica._inbox._topics == {}
    mesh.proxy.hear(old.items())
    mesh.settle()
    mesh.broker.publish(mesh.plane.refresh())
    mesh.plane.now += 30
    mesh.broker.publish(mesh.plane.refresh())
    mesh.settle()
    assert mesh.replica._inbox._topics == {}
    # One that is dropped while it is waited for leaves nothing either.
    mesh.replica.want_service("bank/x")
    mesh.put(service("bank/x"))
    record = (name(ServiceTopic("bank", "x")), mesh.payload(ServiceTopic("bank", "x")))
    mesh.proxy.queue.append(record)
    mesh.proxy.deliver(NOW, len(mesh.proxy.queue) - 1)
    mesh.replica.drop_service("bank/x")
    mesh.want()
    assert mesh.replica._inbox._topics == {}
    mesh.replica.drop_service("bank/db")
    mesh.want()
    assert mesh.replica._namespaces.keys() == {"shop", ROOT_NAMESPACE}


def test_endpoints_cannot_fill_the_memory(mesh, monkeypatch):
    monkeypatch.setattr(replica_module, "MAX_ENDPOINT_BYTES", 100_000)
    mesh.put(service(), endpoint())
    mesh.up().want("shop/reviews")
    stamp = messages.decode(mesh.payload(ManifestTopic("shop", "reviews"))).stamp
    for number in range(2000):
        topic = EndpointTopic("shop", "reviews", f"w{number}")
        payload = messages.encode(Envelope(stamp[0], stamp[1] + 1, 0, records.write(endpoint(f"w{number}"))))
        mesh.proxy.queue.append((name(topic), payload))
    mesh.settle()
    assert mesh.replica._endpoint_bytes < 102_000
    assert "more endpoints than this proxy can hold" in mesh.replica.problems()[-1]
    # A new session begins with an empty account, and what the broker holds is what counts.
    mesh.proxy.connect(mesh.broker.retained)
    mesh.settle()
    assert mesh.held("ep") == {"shop/reviews/web-1"}
    assert mesh.replica.whole
    mesh.replica.drop_service("shop/reviews")
    mesh.want()
    assert mesh.replica._endpoint_bytes == 0


def test_texts_are_few_and_short(mesh):
    mesh.up()
    for number in range(40):
        mesh.replica.want_service(f"n{number}/x")
        mesh.inject(f"mesh/v1/{TRUST_DOMAIN}/{'x' * 300}/{number}", b"x")
    assert len(mesh.replica.waiting()) == 16
    assert mesh.replica.waiting()[-1] == "and more"
    assert len(mesh.replica.problems()) <= 16
    assert all(len(text) <= 200 for text in mesh.replica.problems())


def test_a_problem_that_repeats_is_told_once_and_last(mesh):
    mesh.up()
    for payload in (b"x", b"y", b"x"):
        mesh.inject(name(RootTopic("shop")), payload)
    mesh.inject(name(RootTopic(ROOT_NAMESPACE)), b"x")
    mesh.inject(name(RootTopic("shop")), b"x")
    texts = mesh.replica.problems()
    assert len(texts) == 2
    assert texts[-1].startswith("root/shop: malformed")


# What is handed out


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.integers(1, 2**63 - 1))
def test_a_message_keeps_all_but_its_stamp(epoch, version, issued_at, serial):
    body = records.write(policy("a"))
    stamped = replica_module._restamped(messages.encode(Envelope(epoch, version, issued_at, body)), serial)
    assert messages.decode(stamped) == Envelope(1, serial, issued_at, body)


def test_a_message_that_is_packed_at_more_length_is_handed_out_too():
    """Another writer's msgpack may spend more bytes on a number or on the list."""
    body = records.write(policy("a"))
    wide = b"\xdd\0\0\0\5" + b"".join(b"\xcf" + number.to_bytes(8) for number in (1, 7, 8, 9)) + msgpack.packb(body)
    assert messages.decode(wide).stamp == (7, 8)
    assert messages.decode(replica_module._restamped(wide, 3)) == Envelope(1, 3, 9, body)
