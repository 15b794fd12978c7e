"""The control plane as one object: changes in, publications out, whatever the broker held before."""

import errno
import time
from contextlib import nullcontext

import pytest

from control import durable
from control.api import index, messages, status, vips
from control.api.declared import Family
from control.api.identity import SpiffeId, proxy_hash
from control.api.problems import ResourceErrors
from control.api.status import Kind, ProxyStatus
from control.server import core as core_module
from control.server import publication
from control.server.ca import Authority
from control.server.core import MAX_EPOCH_AHEAD_S, Core, Retained
from control.server.registry import Action, NotFound
from control.server.registry import Held as HeldBack
from control.server.signing import ConfigKey
from control.server.store import Batch, Store
from tests.support.desired import (
    custom_policy,
    endpoints,
    extension,
    grant,
    namespace,
    peer_authentication,
    policy,
    route,
    service,
    together,
    workload,
)
from tests.support.published import PREFIX, Shelf, retained, sha256

SHOP = together(
    service("web"),
    service("db"),
    workload("web-1", "10.0.0.1"),
    workload("web-2", "10.0.0.2"),
    workload("db-1", "10.0.0.3", app="db"),
    policy("allow"),
)
START = 1_800_000_000.0


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


class Plane:
    """A control plane that can be stopped and started again, with a clock that is set by hand."""

    def __init__(self, ca_dir, path):
        self.now = START
        self.authority = Authority.open(ca_dir)
        self.ca_dir = ca_dir
        self.path = path
        self.shelf = Shelf()
        self.start()

    def start(self):
        self.store = Store(self.path)
        self.key = ConfigKey.open(self.ca_dir, self.authority, self.now)
        self.core = Core(self.store, self.authority, self.key, lambda: self.now)
        self.shelf.connect(self.core)

    def restart(self):
        self.store.close()
        self.start()

    def apply(self, *texts, **options):
        return self.core.apply([("test.yaml", together(*texts))], **options)

    def settle(self):
        """Publish everything; return what the broker then says."""
        self.shelf.drain(self.core)
        return self.shelf.read()


@pytest.fixture
def plane(tmp_path):
    Authority.create(tmp_path / "ca", "cluster.local")
    plane = Plane(tmp_path / "ca", tmp_path / "mesh.db")
    yield plane
    plane.store.close()


def test_an_empty_control_plane_publishes_trust_the_root_namespace_and_no_addresses(plane):
    assert plane.settle().namespaces == {"mesh-system"}
    # An empty shard says, by its signature, that nobody lives at an address that a proxy asks for.
    shards = [f"addr/{shard:02x}" for shard in range(256)]
    names = ("trust", "addr", "root", "root/mesh-system", *shards)
    assert plane.shelf.retained.keys() == {PREFIX + name for name in names}


def test_what_is_applied_is_published(plane):
    changes = plane.apply(SHOP)
    found = plane.settle()
    assert {change.action for change in changes.resources} == {Action.ADDED}
    assert changes.stamp == (plane.core.epoch, 2)
    assert found.records["ep/shop/web/web-1"]["address"] == "10.0.0.1"
    assert found.records["svc/shop/web"]["identities"] == ["spiffe://cluster.local/ns/shop/sa/web"]
    assert found.addresses["10.0.0.3"] == ["w", "shop", "db-1", "db", {"app": "db", "version": "v1"}]
    assert len(found.records) == 2 + 3 + 3 + 1
    assert found.namespaces == {"mesh-system", "shop"}


def test_the_namespaces_that_have_services_are_listed(plane):
    def listed():
        plane.settle()
        body = messages.decode(plane.shelf.retained[PREFIX + "root"]).body
        return index.read_namespaces(body).names

    assert listed() == set()
    plane.apply(SHOP, service("far", namespace="zoo"), workload("alone", "10.0.0.60", namespace="yard"))
    assert listed() == {"shop", "zoo"}
    before = plane.shelf.retained[PREFIX + "root"]
    plane.apply(service("farther", namespace="zoo"))
    assert listed() == {"shop", "zoo"}
    assert plane.shelf.retained[PREFIX + "root"] == before, "nothing has changed"
    plane.core.delete([("Service", "zoo", "far"), ("Service", "zoo", "farther")])
    assert listed() == {"shop"}
    plane.apply(service("far", namespace="zoo"))
    # A store of an earlier release has no list.
    plane.store.commit(Batch(plane.core._stamp, collected=[PREFIX + "root"]))
    plane.restart()
    assert listed() == {"shop", "zoo"}


def test_records_that_do_not_change_keep_their_bytes(plane):
    plane.apply(SHOP)
    plane.settle()
    before = dict(plane.shelf.retained)
    plane.now += 5
    plane.apply(workload("web-1", "10.0.0.1", version="v2"))
    plane.settle()
    changed = {
        topic.removeprefix(PREFIX) for topic, payload in plane.shelf.retained.items() if before[topic] != payload
    }
    own = f"wl/{proxy_hash(SpiffeId.parse('spiffe://cluster.local/ns/shop/sa/web'))}/web-1"
    shard = f"{int.from_bytes(sha256(own.encode())[:1]) % 64:02x}"
    indexes = {"root/shop", f"index/shop/{shard}", "addr", next(name for name in changed if name.startswith("addr/"))}
    assert changed == {own, "ep/shop/web/web-1", "ep/shop/web"} | indexes


def test_one_endpoint_that_flaps_costs_two_messages(plane):
    plane.apply(SHOP, endpoints("web-a", "web", [("10.0.0.1", True)]))
    plane.settle()
    assert plane.apply(endpoints("web-a", "web", [("10.0.0.1", False)])).messages == 2
    published = [one.topic.removeprefix(PREFIX) for one in plane.core.pending()]
    assert published == ["ep/shop/web/web-1", "ep/shop/web"]


def test_what_is_revoked_is_published_and_stays_whatever_else_changes(plane):
    def published():
        plane.settle()
        return plane.shelf.read().records.get("crl/mesh-system")

    plane.apply(SHOP)
    assert published() is None
    assert plane.core.revocations() == ()
    assert plane.core.revoke((b"one",))
    assert [one.topic.removeprefix(PREFIX).partition("/")[0] for one in plane.core.pending()] == [
        "crl",
        "index",
        "root",
    ]
    assert published() == {"lists": [b"one"]}
    assert not plane.core.revoke((b"one",))
    assert not plane.core.pending()
    plane.apply(policy("deny", namespace="mesh-system"))
    assert published() == {"lists": [b"one"]}
    plane.core.delete([("AuthorizationPolicy", "mesh-system", "deny")])
    assert published() == {"lists": [b"one"]}
    plane.restart()
    assert published() == {"lists": [b"one"]}
    assert plane.core.revocations() == (b"one",)
    assert plane.core.revoke((b"two", b"three"))
    assert published() == {"lists": [b"two", b"three"]}


def test_a_change_of_nothing_publishes_nothing(plane):
    plane.apply(SHOP)
    plane.settle()
    changes = plane.apply(SHOP)
    assert {change.action for change in changes.resources} == {Action.UNCHANGED}
    assert (changes.stamp, changes.messages) == (None, 0)
    assert not plane.core.pending()


def test_a_dry_run_changes_nothing(plane):
    plane.settle()
    changes = plane.apply(SHOP, dry_run=True)
    assert len(changes.resources) == 6
    assert changes.messages > 9
    assert changes.stamp is None
    assert not plane.core.pending()
    assert plane.core.get() == []


def test_a_change_that_is_wrong_anywhere_is_applied_nowhere(plane):
    plane.settle()
    with pytest.raises(ResourceErrors, match=r"10\.0\.0\.1 is the address of WorkloadEntry shop/web-1"):
        plane.apply(SHOP, workload("other", "10.0.0.1", namespace="zoo"))
    assert plane.core.get() == []
    assert not plane.core.pending()


def test_a_record_that_fits_in_no_message_is_refused(plane):
    rules = ", ".join(f"{{from: [{{source: {{namespaces: [n{number}-{'x' * 50}]}}}}]}}" for number in range(5_000))
    huge = (
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: huge, namespace: shop}\n"
        f"spec: {{action: ALLOW, rules: [{rules}]}}\n"
    )
    with pytest.raises(ResourceErrors, match=r"policy/shop/huge: a record of .* split the resource"):
        plane.apply(huge)
    assert plane.core.get() == []


def test_deletions_are_tombstones_that_are_collected_after_a_week(plane):
    plane.apply(SHOP)
    plane.settle()
    plane.core.delete([("Service", "shop", "db"), ("WorkloadEntry", "shop", "db-1")])
    assert "svc/shop/db" not in plane.settle().records
    assert PREFIX + "svc/shop/db" in plane.shelf.retained
    plane.now += publication.TOMBSTONE_S - 60
    plane.core.refresh()
    plane.settle()
    assert PREFIX + "svc/shop/db" in plane.shelf.retained
    plane.now += 120
    plane.core.refresh()
    found = plane.settle()
    assert not any("/shop/db" in topic or topic.endswith("/db-1") for topic in plane.shelf.retained)
    assert "svc/shop/web" in found.records


@pytest.mark.parametrize("taken", [True, False])
def test_a_tombstone_is_not_collected_before_it_is_published(plane, taken):
    plane.apply(SHOP)
    plane.settle()
    plane.core.delete([("WorkloadEntry", "shop", "web-2")])
    batch = plane.core.pending() if taken else ()
    plane.now += 2 * publication.TOMBSTONE_S
    plane.core.refresh()
    plane.shelf.log.clear()
    assert plane.core.pending() is batch or not taken
    plane.settle()
    (tombstone,) = (payload for topic, payload in plane.shelf.log if topic == PREFIX + "ep/shop/web/web-2")
    assert retained(tombstone).tombstone
    plane.core.refresh()
    plane.settle()
    assert PREFIX + "ep/shop/web/web-2" not in plane.shelf.retained


def test_what_lives_again_under_a_collected_topic_is_published_in_order(plane):
    plane.apply(SHOP)
    plane.core.delete([("Service", "shop", "web")])
    plane.settle()
    plane.now += publication.TOMBSTONE_S + 60
    plane.core.refresh()  # its topics are to be cleared
    plane.apply(SHOP)
    assert "svc/shop/web" in plane.settle().records  # the shelf checks that its manifest follows its endpoints


def test_a_tombstone_is_published_once(plane):
    plane.apply(SHOP)
    plane.core.delete([("Service", "shop", "db")])
    plane.settle()
    plane.apply(policy("allow", caller="zoo"))
    assert plane.shelf.drain(plane.core) == 3
    plane.core.delete([("AuthorizationPolicy", "shop", "allow")])
    assert plane.shelf.drain(plane.core) == 3


def test_a_namespace_that_is_emptied_keeps_a_root_that_lists_nothing(plane):
    plane.apply(policy("allow"))
    plane.settle()
    plane.core.delete([("AuthorizationPolicy", "shop", "allow")])
    found = plane.settle()
    assert found.records == {}
    assert "shop" in found.namespaces


def test_deleting_what_is_not_there_is_refused(plane):
    with pytest.raises(NotFound, match="there is no Service shop/web"):
        plane.core.delete([("Service", "shop", "web")])
    with pytest.raises(NotFound, match="there is no Service shop/web"):
        plane.core.relabel(("Service", "shop", "web"), labels={"a": "b"})


def test_relabel_changes_labels_and_annotations(plane):
    plane.apply(SHOP)
    place = ("Service", "shop", "web")
    changes = plane.core.relabel(place, labels={"team": "a"}, annotations={"note": "x: y"})
    assert "+    team: a" in changes.resources[0].diff
    assert plane.settle().records["svc/shop/web"]["labels"] == {"team": "a"}
    assert plane.core.relabel(place, labels={"team": "a"}).resources[0].action is Action.UNCHANGED
    plane.core.relabel(place, labels={"team": None}, annotations={"note": None})
    assert plane.settle().records["svc/shop/web"]["labels"] == {}
    (_, text), *_ = plane.core.get("Service", "shop", "web")
    assert "annotations" not in text
    with pytest.raises(ResourceErrors, match="Service shop/web:"):
        plane.core.relabel(place, labels={"istio.io/dataplane-mode": "none"})


@pytest.mark.parametrize(("removed", "of", "is_held"), [(3, 3, False), (4, 4, True), (4, 7, True), (4, 8, False)])
def test_more_than_half_and_at_least_four_are_held(plane, removed, of, is_held):
    plane.apply(*(workload(f"w{number}", f"10.0.1.{number}") for number in range(of)), policy("allow"))
    gone = [("WorkloadEntry", "shop", f"w{number}") for number in range(removed)]
    with pytest.raises(HeldBack) if is_held else nullcontext():
        plane.core.delete(gone)


def test_what_removes_most_of_a_namespace_is_held_until_released(plane):
    plane.apply(*(workload(f"w{number}", f"10.0.1.{number}") for number in range(7)))
    everything = [place for place, _ in plane.core.get()]
    plane.settle()
    with pytest.raises(HeldBack, match="removes 7 of the 7 services and workloads of namespace shop"):
        plane.core.delete(everything)
    assert not plane.core.pending()
    assert len(plane.core.get()) == 7
    plane.core.delete(everything[:3])
    plane.core.delete(everything[3:6])
    plane.core.delete(everything[6:])
    assert plane.core.get() == []


def test_a_released_change_removes_everything(plane):
    plane.apply(*(workload(f"w{number}", f"10.0.1.{number}") for number in range(4)))
    plane.core.delete([place for place, _ in plane.core.get()], release=True)
    assert plane.settle().records == {}


@pytest.mark.parametrize("how", ["slice", "label", "delete"])
def test_a_service_keeps_its_last_ready_endpoints(plane, how):
    plane.apply(SHOP)
    before = plane.settle()
    match how:
        case "slice":
            changes = plane.apply(endpoints("web-a", "web", [("10.0.0.1", False), ("10.0.0.2", False)]))
        case "label":
            changes = plane.apply(service("web", app="nobody"))
        case "delete":
            changes = plane.core.delete([("WorkloadEntry", "shop", f"web-{number}") for number in (1, 2)])
    assert any("would have no ready endpoint; it keeps the last 2" in one.problem for one in changes.warnings)
    plane.restart()
    plane.apply(policy("other"))  # the namespace is built again, from the store
    after = plane.settle()
    for name in ("ep/shop/web/web-1", "ep/shop/web/web-2"):
        assert after.records[name] == before.records[name]
    assert after.records["svc/shop/web"]["identities"] == ["spiffe://cluster.local/ns/shop/sa/web"]
    text = plane.core.get("Service", "shop", "web")[0][1]
    plane.apply(text, release=True)
    ready = [name for name, body in plane.settle().records.items() if name.startswith("ep/shop/web") and body["ready"]]
    assert ready == []


def test_the_last_endpoints_go_when_others_are_ready(plane):
    plane.apply(SHOP)
    plane.apply(service("web", app="nobody"))
    plane.apply(workload("web-3", "10.0.0.9", app="nobody"))
    found = plane.settle()
    assert [name for name in found.records if name.startswith("ep/shop/web/")] == ["ep/shop/web/web-3"]
    assert found.records["svc/shop/web"]["identities"] == ["spiffe://cluster.local/ns/shop/sa/nobody"]


def test_a_service_that_never_had_an_endpoint_warns_of_nothing_kept(plane):
    changes = plane.apply(service("web", app="nobody"))
    assert not any("keeps" in one.problem for one in changes.warnings)


def test_virtual_addresses_stay_across_changes_and_restarts(plane):
    plane.apply(SHOP)
    vips = plane.settle().records["svc/shop/web"]["vips"]
    plane.restart()
    plane.apply(service("web", labels="a: b"))
    assert plane.settle().records["svc/shop/web"]["vips"] == vips
    with pytest.raises(ResourceErrors, match=f"{vips[0]} is the address of Service shop/web"):
        plane.apply(service("thief", namespace="zoo", vip=vips[0]))
    plane.core.delete([("Service", "shop", "web")])
    assert [service for service, _ in plane.store.vips()] == ["shop/db"]
    plane.apply(service("heir", namespace="zoo", vip=vips[0]))
    assert plane.settle().addresses[vips[0]] == ["s", "zoo", "heir", [80]]


def test_no_address_is_allocated_that_another_namespace_asks_for(plane):
    asked = vips.allocate("one/web", Family.IPV4, ())
    plane.apply(service("web", namespace="one"), service("web", namespace="two", vip=asked))
    found = plane.settle()
    assert found.records["svc/two/web"]["vips"] == [asked]
    assert found.records["svc/one/web"]["vips"] != [asked]


@pytest.mark.parametrize("together_now", [True, False])
def test_two_namespaces_never_get_one_address(plane, together_now):
    wanted = {vips.allocate(f"one/s{number}", Family.IPV4, ()): f"s{number}" for number in range(600)}
    other = next(f"s{number}" for number in range(10**6) if vips.allocate(f"two/s{number}", Family.IPV4, ()) in wanted)
    address = vips.allocate(f"two/{other}", Family.IPV4, ())
    texts = service(wanted[address], namespace="one"), service(other, namespace="two")
    for text in [together(*texts)] if together_now else texts:
        plane.apply(text)
    found = plane.settle()
    assert found.addresses[address] == ["s", "one", wanted[address], [80]]
    assert len(found.addresses) == 2


def test_an_address_may_move_between_namespaces_in_one_change(plane):
    plane.apply(workload("a", "10.0.0.1", namespace="one"), workload("b", "10.0.0.2", namespace="two"))
    plane.settle()
    plane.apply(workload("a", "10.0.0.2", namespace="one"), workload("b", "10.0.0.1", namespace="two"))
    found = plane.settle().addresses
    assert found["10.0.0.2"][1:3] == ["one", "a"]
    assert found["10.0.0.1"][1:3] == ["two", "b"]


def test_namespaces_must_be_declared_when_one_is(plane):
    plane.apply(SHOP)
    with pytest.raises(ResourceErrors, match="no Namespace 'shop'"):
        plane.apply(namespace("zoo"))
    plane.apply(namespace("zoo"), namespace("shop"))
    plane.restart()
    with pytest.raises(ResourceErrors, match="no Namespace 'lake'"):
        plane.apply(service("web", namespace="lake"))
    with pytest.raises(ResourceErrors, match="no Namespace 'shop'"):
        plane.core.delete([("Namespace", "", "shop")])


def test_policies_know_the_workloads_of_other_namespaces(plane):
    plane.apply(SHOP)
    plane.restart()
    changes = plane.apply(
        policy("for-web", namespace="mesh-system", app="web"),
        policy("for-nobody", namespace="mesh-system", app="nobody", caller="zoo"),
    )
    assert [(one.field, one.problem.split("(")[0].strip()) for one in changes.warnings] == [
        ("spec.selector", "selects no WorkloadEntry of any namespace; it does nothing"),
        ("spec.rules[0].from[0].source", "'zoo' matches no workload of trust domain cluster.local"),
    ]


def test_the_root_namespaces_peer_authentication_holds_in_every_namespace(plane):
    def open_ones(found):
        return {name.rpartition("/")[2] for name, body in found.records.items() if "plaintext" in body}

    root, shop = peer_authentication("mesh", "mesh-system"), peer_authentication("shop", mode="STRICT")
    plane.apply(SHOP)
    plane.apply(workload("ape", "10.0.0.9", namespace="zoo"))
    assert open_ones(plane.settle()) == set()
    plane.restart()
    plane.apply(root)
    assert open_ones(plane.settle()) == {"web-1", "web-2", "db-1", "ape"}
    plane.restart()
    plane.apply(shop)  # only this namespace is built, and the root's word is still heard
    plane.apply(workload("bee", "10.0.0.8", namespace="zoo"))
    assert open_ones(plane.settle()) == {"ape", "bee"}
    plane.core.delete([("PeerAuthentication", "mesh-system", "mesh")])
    assert open_ones(plane.settle()) == set()


def test_an_extension_of_the_root_namespace_is_asked_by_policies_of_every_namespace(plane):
    def asked(found):
        return found.records["policy/shop/p"].get("authorizer", {}).get("service")

    plane.apply(SHOP)
    plane.apply(custom_policy("p", "web", "sign-in"))
    assert asked(plane.settle()) is None
    plane.restart()
    plane.apply(extension("sign-in", "gate", namespace="mesh-system"))
    assert asked(plane.settle()) == "mesh-system/gate"
    plane.apply(workload("web-9", "10.0.0.10"))  # builds this namespace alone
    assert asked(plane.settle()) == "mesh-system/gate"
    plane.apply(extension("sign-in", "authz"))
    assert asked(plane.settle()) == "shop/authz"
    plane.core.delete([("Extension", "shop", "sign-in"), ("Extension", "mesh-system", "sign-in")])
    assert asked(plane.settle()) is None


def test_a_grant_holds_for_the_routes_of_another_namespace_as_long_as_it_is_there(plane):
    def refused(found):
        (backend,) = found.records["route/shop/web"]["rules"][0]["backends"]
        return backend["service"], backend.get("refused", False)

    abroad = route("web", "web", ["web"]).replace("[{name: web, port: 80}]", "[{name: ape, namespace: zoo, port: 80}]")
    plane.apply(SHOP, service("ape", namespace="zoo"))
    (warning,) = [one for one in plane.apply(abroad).warnings if "RefNotPermitted" in one.problem]
    assert "no ReferenceGrant of namespace zoo lets HTTPRoutes of shop send to its Service ape" in warning.problem
    assert refused(plane.settle()) == ("zoo/ape", True)
    plane.restart()
    plane.apply(grant("g", "ape", "zoo"))
    assert refused(plane.settle()) == ("zoo/ape", False)
    plane.apply(workload("ape-1", "10.0.0.9", namespace="zoo", app="ape"))
    plane.apply(workload("web-9", "10.0.0.10"))  # each builds one namespace, and the grant still holds
    assert refused(plane.settle()) == ("zoo/ape", False)
    plane.apply(grant("g", "bee", "zoo"))
    assert refused(plane.settle()) == ("zoo/ape", True)
    plane.apply(grant("g", "ape", "zoo"))
    plane.core.delete([("ReferenceGrant", "zoo", "g")])
    assert refused(plane.settle()) == ("zoo/ape", True)


def test_a_route_of_callers_follows_what_they_declare(plane):
    def rules(found):
        body = found.records.get("route/zoo/shop.web")
        return body and (body["callers"], [match["path"][1] for match in body["rules"][0]["matches"]])

    to_zoo = route("web", "ape", ["web"]).replace("name: ape}]", "name: ape, namespace: zoo}]")
    plane.apply(SHOP, to_zoo)
    assert rules(plane.settle()) is None
    plane.restart()
    plane.apply(service("ape", namespace="zoo"))
    assert rules(plane.settle()) == ("shop", ["/"])
    plane.restart()
    plane.apply(to_zoo.replace("value: /", "value: /v2"))
    assert rules(plane.settle()) == ("shop", ["/v2"])
    plane.apply(service("bee", namespace="zoo"))
    assert rules(plane.settle()) == ("shop", ["/v2"])
    plane.apply(to_zoo.replace("name: ape, namespace: zoo}]", "name: web}]"))
    assert rules(plane.settle()) is None
    plane.apply(to_zoo)
    assert rules(plane.settle()) == ("shop", ["/"])
    plane.core.delete([("HTTPRoute", "shop", "web")])
    assert rules(plane.settle()) is None


def test_a_service_of_another_namespace_that_is_not_there_is_a_warning(plane):
    plane.apply(SHOP)
    abroad = route("web", "web", ["web"]).replace("[{name: web, port: 80}]", "[{name: ape, namespace: zoo, port: 81}]")
    told = [one.problem for one in plane.apply(abroad, grant("g", "ape", "zoo")).warnings]
    assert any(problem.startswith("there is no Service zoo/ape") for problem in told)
    plane.apply(service("ape", namespace="zoo"))
    told = [one.problem for one in plane.apply(abroad.replace("value: /", "value: /v2")).warnings]
    assert any(
        problem.startswith("Service zoo/ape has no port 81 (BackendNotFound); its ports: 80") for problem in told
    )


def test_releasing_what_holds_everywhere_takes_no_service_its_last_endpoint(plane):
    plane.apply(SHOP, endpoints("web-a", "web", [("10.0.0.1", True)]))
    plane.apply(endpoints("web-a", "web", [("10.0.0.1", False)]), workload("web-2", "10.0.0.2", app="db"))
    before = {name: body for name, body in plane.settle().records.items() if name.startswith("ep/shop/web/")}
    assert any(body["ready"] for body in before.values())
    plane.apply(peer_authentication("mesh", "mesh-system"), release=True)
    after = {name: body for name, body in plane.settle().records.items() if name.startswith("ep/shop/web/")}
    assert after == before


def test_old_warnings_are_not_told_again(plane):
    first = plane.apply(service("lonely", app="nobody"))
    assert [one.field for one in first.warnings] == ["spec.selector"]
    assert plane.apply(policy("allow")).warnings == plane.apply(policy("other")).warnings


# Epochs and audits


def test_every_start_takes_a_new_epoch_and_outdoes_the_last(plane):
    plane.apply(SHOP)
    plane.settle()
    before = dict(plane.shelf.retained)
    first = plane.core.epoch
    plane.restart()
    assert plane.core.epoch == first + 1
    plane.settle()
    stamps = {topic.removeprefix(PREFIX): retained(payload).stamp for topic, payload in plane.shelf.retained.items()}
    for name, stamp in stamps.items():
        again = name.split("/")[0] in ("root", "addr", "trust") or (name.count("/") == 2 and name.startswith("ep/"))
        assert (stamp[0] == first + 1) is again, name
        assert (before[PREFIX + name] == plane.shelf.retained[PREFIX + name]) is not again


def test_a_new_epoch_is_taken_though_the_broker_remembers_none(plane):
    plane.settle()
    first = plane.core.epoch
    plane.shelf.retained.clear()
    plane.restart()
    assert plane.core.epoch == first + 1


def test_the_epoch_is_at_least_the_time(plane):
    assert plane.core.epoch == int(START)
    plane.now += 1000
    plane.restart()
    assert plane.core.epoch == int(START) + 1000


def test_an_epoch_that_somebody_else_published_is_outdone(plane):
    first = plane.core.epoch
    assert plane.core.start_epoch(first - 1) == first
    assert plane.core.start_epoch(first) == first + 1  # nothing was published in it by us
    plane.settle()
    assert plane.core.start_epoch(first + 1) == first + 1
    assert plane.core.start_epoch(first + 5) == first + 6
    assert plane.core.roots()[status.ADDRESSES][0] == first + 6
    assert Store.stamp(plane.store)[0] == first + 6


def test_an_epoch_far_ahead_is_not_believed(plane):
    first = plane.core.epoch
    assert plane.core.start_epoch(2**63 - 1) == first
    assert "years ahead" in plane.core.problems()[0]
    ahead = int(START) + MAX_EPOCH_AHEAD_S
    assert plane.core.start_epoch(ahead) == ahead + 1
    plane.settle()
    assert plane.core.start_epoch(ahead + 1) == ahead + 1  # our own, though it is far ahead


def test_what_was_not_published_before_a_crash_is_published_after_it(plane):
    plane.settle()
    plane.apply(SHOP)
    batch = plane.core.pending()
    for one in batch[: len(batch) // 2]:
        plane.shelf.publish(one.topic, one.payload)
    plane.restart()
    assert len(plane.settle().records) == 9


def test_a_broker_that_lost_everything_gets_everything(plane):
    plane.apply(SHOP)
    plane.settle()
    before = dict(plane.shelf.retained)
    plane.shelf.retained.clear()
    plane.shelf.connect(plane.core)
    plane.settle()
    assert plane.shelf.retained == before


def test_a_broker_that_holds_everything_gets_nothing(plane):
    plane.apply(SHOP)
    batch = plane.core.pending()
    plane.settle()
    plane.apply(service("web", labels="a: b"))
    plane.settle()
    plane.core._pending.add({"shop": [one.topic for one in batch]}, soon=True)
    assert plane.core.pending()
    plane.shelf.connect(plane.core)
    assert not plane.core.pending()


def test_a_root_that_was_signed_again_is_published_with_its_stamp(plane):
    plane.apply(SHOP)
    plane.settle()
    plane.now += 30
    plane.core.refresh()
    stamp = plane.core.roots()["shop"][:2]
    plane.shelf.connect(plane.core)
    plane.settle()
    assert plane.core.roots()["shop"] == (*stamp, START + 30)


def test_what_is_foreign_is_withdrawn(plane):
    plane.apply(SHOP)
    plane.settle()
    held = {topic: retained(payload) for topic, payload in plane.shelf.retained.items()}
    newer = Retained((plane.core.epoch, 900), b"?" * 32)
    foreign = [
        "svc/zoo/a",
        "ep/zoo/a/b",
        "ep/zoo/a",
        "policy/shop/no",
        "index/zoo/00",
        "root/zoo",
        "wl/" + "0" * 32 + "/a",
    ]
    held |= {PREFIX + name: newer for name in foreign}
    held |= {
        PREFIX + "junk": Retained(None, b""),
        PREFIX + "svc/shop/bad": Retained(None, b""),
        PREFIX + "svc/zoo/gone": Retained((1, 1), b"", tombstone=True),
        PREFIX + "status/" + "0" * 32 + "/a": newer,
    }
    for name in ("junk", "svc/shop/bad", "svc/zoo/gone"):
        plane.shelf.retained[PREFIX + name] = b"?"
    plane.core.audited(held)
    plane.shelf.drain(plane.core)
    found = plane.shelf.read()
    assert "zoo" in found.namespaces
    assert len(found.records) == 9
    for name in ("junk", "svc/shop/bad", "svc/zoo/gone"):
        assert PREFIX + name not in plane.shelf.retained
    for name in foreign[:5]:
        assert retained(plane.shelf.retained[PREFIX + name]).tombstone


@pytest.mark.parametrize("version", [2, 7])  # that of ours, and a higher one
def test_what_is_newer_on_the_broker_is_issued_again_newer_still(plane, version):
    plane.apply(SHOP, service("gone"))
    plane.core.delete([("Service", "shop", "gone")])
    plane.settle()
    held = {topic: retained(payload) for topic, payload in plane.shelf.retained.items()}
    newer = Retained((plane.core.epoch, version), b"?" * 32)
    own = retained(plane.shelf.retained[PREFIX + "svc/shop/web"]).stamp
    shard = next(name for name in plane.shelf.retained if "/index/" in name).removeprefix(PREFIX)
    names = [
        "svc/shop/web",
        "ep/shop/web/web-1",
        "ep/shop/db",
        "policy/shop/allow",
        "svc/shop/gone",
        shard,
        "root/shop",
    ]
    held |= {PREFIX + name: newer for name in names}
    plane.core.audited(held)
    plane.settle()
    for name in names:
        assert retained(plane.shelf.retained[PREFIX + name]).stamp > own, name


def test_addresses_that_are_newer_on_the_broker_are_issued_again(plane):
    plane.apply(SHOP)
    plane.settle()
    held = {topic: retained(payload) for topic, payload in plane.shelf.retained.items()}
    shard = next(name for name in plane.shelf.retained if "/addr/" in name)
    own = held[shard].stamp
    held[shard] = Retained((plane.core.epoch, 7), b"?" * 32)
    plane.core.audited(held)
    plane.settle()
    assert retained(plane.shelf.retained[shard]).stamp > own


def test_restored_from_an_older_backup(plane, tmp_path):
    plane.apply(SHOP)
    plane.settle()
    plane.store.close()
    backup = plane.path.read_bytes()
    plane.start()
    plane.apply(service("later"), workload("later-1", "10.0.0.50", app="later"), service("far", namespace="zoo"))
    plane.apply(workload("web-1", "10.0.0.77"))
    plane.settle()
    plane.store.close()
    plane.path.write_bytes(backup)
    plane.start()
    found = plane.settle()
    assert len(found.records) == 9
    assert found.records["ep/shop/web/web-1"]["address"] == "10.0.0.1"
    stamps = {topic: retained(payload).stamp for topic, payload in plane.shelf.log}
    last = {topic: max(retained(p).stamp for t, p in plane.shelf.log if t == topic) for topic in stamps}
    for name in ("ep/shop/web/web-1", "root/shop", "root/zoo", "addr", "ep/shop/web", "svc/shop/later"):
        assert stamps[PREFIX + name] == last[PREFIX + name], name


# The heartbeat and the config key


def test_roots_are_signed_again_with_the_same_stamp_and_a_new_time(plane):
    plane.apply(SHOP)
    plane.settle()
    before = {
        topic: payload
        for topic, payload in plane.shelf.retained.items()
        if "/root/" in topic or topic.endswith("/addr")
    }
    plane.now += 30
    plane.core.refresh()
    assert {one.topic for one in plane.core.pending()} <= before.keys()
    plane.settle()
    for topic, payload in before.items():
        assert retained(plane.shelf.retained[topic]).stamp == retained(payload).stamp
        assert messages.decode(plane.shelf.retained[topic]).issued_at == START + 30
    assert plane.core.roots()["shop"] == (*retained(before[PREFIX + "root/shop"]).stamp, START + 30)


def test_a_root_is_not_signed_again_ahead_of_what_it_lists(plane):
    plane.settle()
    plane.apply(SHOP)
    plane.core.refresh()
    plane.settle()  # the shelf checks the order


def test_a_clock_that_is_set_back_is_published_with_a_higher_version(plane):
    plane.apply(SHOP)
    plane.settle()
    plane.now += 24 * 3600
    plane.core.refresh()
    ahead = plane.core.roots()
    plane.settle()
    plane.now -= 24 * 3600
    plane.core.refresh()
    for name, (epoch, version, issued_at) in plane.core.roots().items():
        assert (epoch, version) > ahead[name][:2]
        assert issued_at == START
    plane.settle()
    back = plane.core.roots()
    plane.now -= 50  # a small step is waited out
    plane.core.refresh()
    assert {name: root[:2] for name, root in plane.core.roots().items()} == {n: root[:2] for n, root in back.items()}


def test_the_config_key_is_renewed_at_half_its_life_and_everything_is_signed_with_it(plane):
    plane.apply(SHOP)
    plane.settle()
    old = plane.key.certificates
    plane.now += 14 * 24 * 3600
    plane.core.refresh()
    assert plane.key.certificates == old
    plane.now += 2 * 24 * 3600
    plane.core.refresh()
    assert plane.core.pending()[0].topic == PREFIX + "trust"
    plane.settle()
    assert plane.key.certificates != old
    assert messages.decode(plane.shelf.retained[PREFIX + "trust"]).body["certificates"] == list(plane.key.certificates)


def test_a_config_key_that_cannot_be_renewed_serves_on(plane, monkeypatch):
    plane.settle()
    plane.now += 16 * 24 * 3600
    monkeypatch.setattr(durable, "write", full_disk)
    plane.core.refresh()
    assert "the config key is not renewed: cannot write" in plane.core.problems()[0]
    plane.settle()
    assert plane.core.roots()[status.ADDRESSES][2] == plane.now


# Pending


def test_a_change_comes_before_what_an_audit_found(plane):
    for number in range(5):
        plane.apply(service("web", namespace=f"ns-{number}"))
    plane.settle()
    plane.shelf.retained.clear()
    plane.shelf.connect(plane.core)
    first = plane.core.pending()
    plane.apply(service("web", namespace="ns-4", labels="a: b"))
    assert plane.core.pending() is first
    for one in first:
        plane.shelf.publish(one.topic, one.payload)
    plane.core.published()
    assert {one.topic.split("/")[4] for one in plane.core.pending()} == {"ns-4"}
    assert len(plane.core.pending()) == 4  # with all that the audit found there
    plane.settle()


def test_many_changes_of_one_record_are_published_once(plane):
    plane.apply(SHOP)
    plane.settle()
    for number in range(5):
        plane.apply(service("web", labels=f"a: v{number}"))
    assert plane.shelf.drain(plane.core) == 3
    assert plane.shelf.read().records["svc/shop/web"]["labels"] == {"a": "v4"}


def test_the_publisher_is_woken_when_there_is_something(plane):
    woken = []
    plane.core.on_pending = lambda: woken.append(True)
    plane.apply(SHOP, dry_run=True)
    assert woken == []
    plane.apply(SHOP)
    assert woken == [True]
    plane.core.refresh()
    assert woken == [True, True]


# Statuses


def report(workload="shop/web-1", **changes):
    fields = {
        "kind": Kind.UPROXY, "workload": workload, "version": "0.1", "online": True, "whole": True, "waiting": (),
        "roots": {"shop": (5, 6, 7)}, "applied_at": 9, "serial": "ab", "not_after": 10, "problems": (),
    }  # fmt: skip
    body = status.write(ProxyStatus(**{**fields, **changes}))
    return messages.encode(messages.Envelope(1, 1, 1, body))


def test_statuses_are_kept_until_they_are_cleared(plane):
    topic = f"{PREFIX}status/{'0' * 32}/web-1"
    plane.core.status_received(topic, report())
    (found,) = plane.core.proxies().items()
    assert found[0] == topic
    assert found[1].status.roots == {"shop": (5, 6, 7)}
    assert found[1].received_at == START
    plane.core.status_received(topic, b"")
    assert plane.core.proxies() == {}


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        (f"status/{'0' * 32}/web-1", b"?"),
        (f"status/{'0' * 32}/web-1", messages.encode(messages.Envelope(1, 1, 1, {"kind": "uproxy"}))),
        ("svc/shop/web", report()),
        ("status/short", report()),
    ],
)
def test_a_status_that_is_none_is_noted_and_left_out(plane, name, payload):
    plane.core.status_received(PREFIX + name, payload)
    assert plane.core.proxies() == {}
    assert len(plane.core.problems()) == 1


def test_one_identity_cannot_fill_the_memory_or_the_broker_with_statuses(plane, monkeypatch):
    plane.settle()
    monkeypatch.setattr(core_module, "MAX_REPORT_BYTES", 20_000)
    honest = f"{PREFIX}status/{'1' * 32}/web-1"
    for number in range(50):
        topic = f"{PREFIX}status/{'0' * 32}/w{number}"
        plane.core.status_received(topic, report(f"shop/w{number}"))
    taken = len(plane.core.proxies())
    assert 10 < taken < 20
    assert "reports of more workloads" in plane.core.problems()[-1]
    cleared = plane.core.pending()
    assert {one.topic for one in cleared} == {f"{PREFIX}status/{'0' * 32}/w{number}" for number in range(taken, 50)}
    assert {one.payload for one in cleared} == {b""}
    plane.core.published()
    plane.core.status_received(honest, report())
    assert honest in plane.core.proxies()
    # One that reports again takes no more room; one that goes makes room.
    for _ in range(30):
        plane.core.status_received(f"{PREFIX}status/{'0' * 32}/w0", report("shop/w0"))
    plane.core.status_received(f"{PREFIX}status/{'0' * 32}/w0", b"")
    plane.core.status_received(f"{PREFIX}status/{'0' * 32}/w40", report("shop/w40"))
    assert len(plane.core.proxies()) == taken + 1
    assert not plane.core.pending()


@pytest.mark.parametrize("name", [f"{'0' * 32}/no name", "short", f"{'0' * 32}/web-1"])
def test_what_is_no_status_is_taken_off_the_broker_once(plane, name):
    plane.settle()
    topic = f"{PREFIX}status/{name}"
    plane.core.status_received(topic, b"?")
    (cleared,) = plane.core.pending()
    assert (cleared.topic, cleared.payload) == (topic, b"")
    plane.core.published()
    plane.core.status_received(topic, b"")  # we hear ourselves
    assert not plane.core.pending()


def test_what_waits_to_be_taken_off_the_broker_is_bounded(plane):
    plane.settle()
    for number in range(core_module._MAX_UNTAKEN + 10):
        plane.core.status_received(f"{PREFIX}status/{'0' * 32}/w{number}", b"?")
    assert len(plane.core.pending()) == core_module._MAX_UNTAKEN


def test_the_last_words_of_the_long_gone_are_cleared(plane):
    plane.settle()
    topic = f"{PREFIX}status/{'0' * 32}/web-1"
    plane.core.status_received(topic, report(not_after=int(START)))
    week = 7 * 24 * 3600
    for ahead, cleared in ((week - 10, False), (week + 10, True)):
        plane.now = START + ahead
        plane.core.refresh()
        assert (topic in {one.topic for one in everything_pending(plane)}) is cleared
    plane.core.status_received(topic, report(not_after=int(START)))  # one that lives, though its certificate does not
    plane.core.refresh()
    assert topic not in {one.topic for one in everything_pending(plane)}


def everything_pending(plane):
    found = []
    while batch := plane.core.pending():
        found += batch
        plane.core.published()
    return found


def test_identities_are_those_of_declared_workloads(plane):
    plane.apply(SHOP, workload("a", "10.9.9.9", namespace="zoo", account="keeper"))
    plane.restart()
    assert sorted(map(str, plane.core.identities())) == [
        "spiffe://cluster.local/ns/shop/sa/db",
        "spiffe://cluster.local/ns/shop/sa/web",
        "spiffe://cluster.local/ns/zoo/sa/keeper",
    ]


def test_a_change_while_everything_is_published_takes_milliseconds(plane):
    """A guard against costs that grow with the mesh, not a measurement."""
    for number in range(40):
        plane.apply(
            service("web", namespace=f"ns-{number}"),
            *(workload(f"w{one}", f"10.{number}.0.{one}", namespace=f"ns-{number}") for one in range(25)),
        )
    began = time.process_time()
    plane.apply(workload("w0", "10.0.0.0", namespace="ns-0", version="v2"))
    assert time.process_time() - began < 0.1
    assert len(plane.core._registry._forms) <= 8, "records are kept in memory of few namespaces only"
