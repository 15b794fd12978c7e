"""Labels, proxies' reports and time, through the control plane: what is published at each step, and what is refused."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from control.api import status
from control.api.identity import SpiffeId, proxy_hash
from control.api.messages import Envelope, encode
from control.api.status import Kind, ProxyStatus
from control.server.bindings import LINGER_S, SWITCH_S, Phase
from control.server.ca import Authority
from control.server.core import Core
from control.server.registry import Loose, NotFound
from control.server.signing import ConfigKey
from control.server.store import Store
from tests.support.desired import namespace, service, together, workload
from tests.support.published import PREFIX, Shelf

START = 1_800_000_000.0
WEB = ("Service", "shop", "web")
USE, FROM = "istio.io/use-waypoint", "istio.io/use-waypoint-namespace"
GATEWAY = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: {0}, namespace: {1}, labels: {{istio.io/waypoint-for: {2}}}}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {{namespaces: {{from: {3}}}}}}}]
"""
DELETES = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-deletes, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: web}]
  action: DENY
  rules: [{to: [{operation: {methods: [DELETE]}}]}]
"""


def gateway(name="wp", where="shop", takes="service", admits="Same"):
    return GATEWAY.format(name, where, takes, admits)


def instance(name="wp", where="shop", address="10.0.9.1"):
    return f"""\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: {name}-1
  namespace: {where}
  labels: {{gateway.networking.k8s.io/gateway-name: {name}}}
spec: {{address: {address}, serviceAccount: {name}}}
"""


def at(text, placement, node="", account=""):
    """A Gateway, or an instance of one, that is placed."""
    text = text.replace(
        ", labels: {istio.io", f", annotations: {{mesh.uproxy.dev/placement: {placement}}}, labels: {{istio.io"
    )
    text = text.replace("gateway-name: wp}", f"gateway-name: wp, kubernetes.io/hostname: {node}}}")
    return text.replace("serviceAccount: wp", f"serviceAccount: {account}") if account else text


SHOP = together(
    service("web"), workload("web-1", "10.0.0.1"), workload("db-1", "10.0.0.3", app="db"), gateway(), instance()
)


class Plane:
    """A control plane, what it publishes, and proxies that report what they are told to."""

    def __init__(self, directory):
        self.now = START
        self.directory = directory
        Authority.create(directory / "ca", "cluster.local")
        self.shelf = Shelf()
        self.start()

    def start(self):
        authority = Authority.open(self.directory / "ca")
        self.store = Store(self.directory / "mesh.db")
        key = ConfigKey.open(self.directory / "ca", authority, self.now)
        self.core = Core(self.store, authority, key, lambda: self.now)
        self.shelf.connect(self.core)
        self.core.resume()

    def restart(self):
        self.store.close()
        self.start()

    def apply(self, *texts, **options):
        return self.core.apply([("test.yaml", together(*texts))], **options)

    def label(self, gateway="wp", place=WEB, **options):
        return self.core.relabel(place, labels={USE: gateway}, **options)

    def settle(self):
        self.shelf.drain(self.core)
        return self.shelf.read()

    def report(self, name, account, kind=Kind.UPROXY, where="shop", **options):
        """A proxy says that it has applied all that is published."""
        identity = SpiffeId.parse(f"spiffe://cluster.local/ns/{where}/sa/{account}")
        roots = {
            owner: root for owner, root in self.core.roots().items() if kind is not Kind.UPROXY or "/" not in owner
        }
        found = ProxyStatus(
            kind,
            f"{where}/{name}",
            "1",
            options.get("online", True),
            options.get("whole", True),
            (),
            options.get("roots", roots),
            int(self.now),
            "ab",
            int(self.now) + 9999,
            (),
        )
        payload = encode(Envelope(int(START), 1, int(self.now), status.write(found)))
        self.core.status_received(f"{PREFIX}status/{proxy_hash(identity)}/{name}", payload)

    def everybody_follows(self):
        self.settle()
        self.report("wp-1", "wp", Kind.WAYPOINT)
        self.report("web-1", "web")
        self.report("db-1", "db")
        return self.core.advance()

    def enforce(self, gateway="wp"):
        self.label(gateway)
        for _ in range(3):
            self.everybody_follows()
        assert self.phase() is Phase.ENFORCED

    def believed(self):
        """The processes that web-1 believes."""
        bounds = next(record for name, record in self.settle().records.items() if name.endswith("/web-1")).get("bounds")
        return bounds[0][5] if bounds and len(bounds[0]) == 6 else []

    def phase(self, key="shop/web"):
        return next((one.state.phase for one in self.core.progress() if one.subject[1] == key), None)

    def seen(self):
        """What is published: how callers see the service, what its destination demands, what the Gateway serves."""
        records = self.settle().records
        found = SimpleNamespace(
            binding=records["svc/shop/web"].get("binding"),
            bounds=next(body for name, body in records.items() if name.endswith("/web-1") and name[:3] == "wl/").get(
                "bounds"
            ),
            serves=records["gw/shop/wp"]["services"],
        )
        return found


@pytest.fixture
def plane(tmp_path):
    plane = Plane(tmp_path)
    plane.apply(SHOP)
    yield plane
    plane.store.close()


def test_the_whole_flip_as_it_is_published(plane):
    before = plane.seen()
    assert (before.binding, before.bounds, before.serves) == (None, None, [])
    plane.label()
    pending = plane.seen()
    assert (plane.phase(), pending.binding, pending.serves) == (Phase.PENDING, None, ["shop/web"])
    assert "False" in repr(pending.bounds)
    plane.everybody_follows()
    switching = plane.seen()
    assert plane.phase() is Phase.SWITCHING
    assert "shop/wp" in repr(switching.binding)
    assert switching.bounds == pending.bounds
    plane.everybody_follows()
    enforced = plane.seen()
    assert plane.phase() is Phase.ENFORCED
    assert enforced.binding == switching.binding
    assert "True" in repr(enforced.bounds)
    assert not plane.core.progress()[0].settled
    plane.everybody_follows()
    assert plane.core.progress()[0].settled
    assert plane.core.advance() is None


def test_and_back(plane):
    plane.enforce()
    enforced = plane.seen()
    plane.label(None)
    releasing = plane.seen()
    assert plane.phase() is Phase.RELEASING
    assert releasing.binding == enforced.binding
    assert "False" in repr(releasing.bounds)
    plane.everybody_follows()
    leaving = plane.seen()
    assert (plane.phase(), leaving.binding, leaving.bounds) == (Phase.LEAVING, None, releasing.bounds)
    plane.everybody_follows()
    assert plane.phase() is Phase.LINGERING
    assert plane.core.progress()[0].settled
    plane.now += LINGER_S
    plane.core.advance()
    gone = plane.seen()
    assert (plane.phase(), gone.binding, gone.bounds, gone.serves) == (None, None, None, [])


CANARY = "mesh.uproxy.dev/waypoint-canary"


def test_a_canary_as_it_is_published(plane):
    plane.apply(gateway("v2"), instance("v2", address="10.0.9.2"))
    plane.enforce()
    plane.core.relabel(WEB, annotations={CANARY: "v2=10"})
    preparing = plane.seen()
    assert preparing.binding == ["shop/wp", "waypoint"]
    assert "['shop/v2', 'shop/wp']" in repr(preparing.bounds)
    plane.everybody_follows()
    assert plane.core.progress()[0].waits_for == ("a process of Gateway shop/v2 that has its configuration",)
    plane.report("v2-1", "v2", Kind.WAYPOINT)
    plane.core.advance()
    sharing = plane.seen()
    assert sharing.binding == ["shop/wp", "waypoint", "shop/v2", 10]
    assert sharing.bounds == preparing.bounds
    plane.restart()
    assert plane.seen().binding == sharing.binding
    plane.core.relabel(WEB, annotations={CANARY: "v2=60"})
    assert plane.seen().binding == ["shop/wp", "waypoint", "shop/v2", 60]
    with pytest.raises(Loose, match="serves Service shop/web"):
        plane.core.delete([("Gateway", "shop", "v2")])
    plane.core.relabel(WEB, annotations={CANARY: None})
    leaving = plane.seen()
    assert (leaving.binding, leaving.bounds) == (preparing.binding, preparing.bounds)
    plane.everybody_follows()
    plane.now += LINGER_S
    plane.core.advance()
    gone = plane.seen()
    assert "shop/v2" not in repr((gone.binding, gone.bounds))
    assert plane.store.bindings()["Service", "shop/web"].trial is None
    assert plane.core.advance() is None


def test_a_canary_that_is_not_there_takes_force(plane):
    plane.enforce()
    with pytest.raises(Loose, match="would be bound to Gateway shop/v2, and there is none"):
        plane.core.relabel(WEB, annotations={CANARY: "v2=10"})
    plane.core.relabel(WEB, annotations={CANARY: "v2=10"}, force=True)
    plane.everybody_follows()
    assert plane.seen().binding == ["shop/wp", "waypoint"]


def test_nothing_is_bound_while_no_waypoint_is_ready(plane):
    plane.label()
    plane.settle()
    plane.report("web-1", "web")
    plane.report("wp-1", "wp", Kind.WAYPOINT, whole=False)
    plane.now += 1000
    plane.core.advance()
    assert plane.phase() is Phase.PENDING
    # Somebody else who calls himself the waypoint is none.
    plane.report("wp-1", "web", Kind.WAYPOINT)
    plane.core.advance()
    assert plane.phase() is Phase.PENDING


def test_a_policy_that_must_not_be_missed_refuses_calls_until_a_waypoint_is_ready(plane):
    plane.apply(DELETES)
    plane.label()
    refused = plane.seen()
    assert plane.phase() is Phase.REFUSED
    assert "refuse" in repr(refused.binding)
    assert "True" in repr(refused.bounds)
    plane.everybody_follows()
    assert plane.phase() is Phase.ENFORCED
    assert "refuse" not in repr(plane.seen().binding)


def test_but_calls_go_on_while_a_waypoint_that_is_there_takes_its_configuration_up(plane):
    plane.apply(DELETES)
    plane.everybody_follows()
    plane.label()
    assert (plane.phase(), plane.seen().binding) == (Phase.PENDING, None)
    plane.everybody_follows()
    assert plane.phase() is Phase.SWITCHING


def test_callers_are_not_sent_to_a_waypoint_of_which_one_process_lags(plane):
    plane.apply(instance().replace("wp-1", "wp-2").replace("10.0.9.1", "10.0.9.2"))
    plane.settle()
    before = dict(plane.core.roots())
    plane.label()
    plane.settle()
    plane.report("wp-2", "wp", Kind.WAYPOINT, roots=before)
    plane.everybody_follows()
    assert plane.phase() is Phase.PENDING
    assert plane.core.progress()[0].waits_for == ("shop/wp-2",)
    plane.report("wp-2", "wp", Kind.WAYPOINT)
    plane.core.advance()
    assert plane.phase() is Phase.SWITCHING


def test_a_caller_that_does_not_follow_is_waited_for_five_seconds_and_named(plane):
    plane.label()
    plane.settle()
    plane.report("db-1", "db", roots=dict(plane.core.roots()))
    plane.everybody_follows()
    plane.settle()
    plane.report("web-1", "web")
    wait = plane.core.advance()
    assert plane.phase() is Phase.SWITCHING
    assert plane.core.progress()[0].waits_for == ("shop/db-1",)
    assert 0 < wait <= SWITCH_S
    plane.now += wait
    plane.core.advance()
    assert plane.phase() is Phase.ENFORCED


def test_a_caller_whose_lease_has_run_out_is_not_waited_for(plane):
    plane.label()
    plane.everybody_follows()
    plane.now += status.LEASE_S + 1
    plane.core.resume()
    plane.settle()
    plane.report("web-1", "web")
    plane.core.advance()
    assert plane.phase() is Phase.ENFORCED


def test_a_control_plane_that_restarts_goes_on(plane):
    plane.label()
    plane.everybody_follows()
    plane.now += 1000
    plane.restart()
    plane.core.advance()
    assert plane.phase() is Phase.ENFORCED or plane.phase() is Phase.SWITCHING
    before = plane.seen()
    assert "shop/wp" in repr(before.binding)
    plane.everybody_follows()
    plane.everybody_follows()
    assert plane.phase() is Phase.ENFORCED
    assert plane.store.bindings()["Service", "shop/web"].phase is Phase.ENFORCED


def test_a_change_of_something_else_leaves_bindings_as_they_are(plane):
    plane.enforce()
    before = plane.seen()
    plane.apply(workload("web-1", "10.0.0.1", version="v2"))
    after = plane.seen()
    assert (after.binding, after.bounds, after.serves) == (before.binding, before.bounds, before.serves)


def test_a_new_endpoint_of_what_is_bound_is_bound_from_its_first_record_on(plane):
    plane.enforce()
    plane.apply(workload("web-2", "10.0.0.2"))
    records = plane.settle().records
    bounds = [body.get("bounds") for name, body in records.items() if name.startswith("wl/") and "/web-" in name]
    assert bounds[0]
    assert bounds[0] == bounds[1]


def test_a_gateway_that_takes_other_traffic_keeps_what_is_bound_and_says_so(plane):
    plane.apply(DELETES)
    plane.enforce()
    before = plane.seen()
    change = plane.apply(gateway(takes="workload"))
    plane.everybody_follows()
    after = plane.seen()
    assert plane.phase() is Phase.ENFORCED
    assert (after.binding, after.bounds, after.serves) == (before.binding, before.bounds, before.serves)
    (warning,) = change.warnings
    assert "Service shop/web stays bound to Gateway shop/wp, which takes traffic to services no more" in str(warning)
    plane.label("none")
    assert plane.phase() is Phase.RELEASING


def test_it_keeps_what_a_namespace_label_bound_too_and_binds_nothing_new(plane):
    plane.apply(namespace("shop"), gateway(takes="all"))
    plane.core.relabel(("Namespace", "", "shop"), labels={USE: "wp"})
    plane.apply(service("db"), gateway(takes="service"), workload("db-2", "10.0.0.4", app="db"))
    assert plane.phase("shop/db-1") is Phase.PENDING
    assert plane.phase("shop/db-2") is None


def test_an_endpoint_that_a_bound_service_keeps_as_its_last_one_stays_bound(plane):
    plane.enforce()
    before = plane.seen()
    change = plane.apply(workload("web-1", "10.0.0.1", app="nobody"))
    assert any("it keeps the last 1" in str(warning) for warning in change.warnings)
    assert plane.seen().bounds == before.bounds
    assert "shop/wp" in repr(plane.settle().addresses["10.0.0.1"])


def test_a_service_that_is_deleted_is_bound_no_more(plane):
    plane.enforce()
    plane.core.delete([WEB])
    assert plane.core.progress() == []
    assert plane.store.bindings() == {}
    assert plane.settle().records["gw/shop/wp"]["services"] == []


# -- Gateways whose processes each serve a part


def test_a_process_of_another_namespace_reaches_the_workloads_of_its_node(plane):
    on_node = workload("web-1", "10.0.0.1").replace("labels: {", "labels: {kubernetes.io/hostname: a, ")
    plane.apply(namespace("infra"), namespace("shop"), at(gateway(where="infra", admits="All"), "node"), on_node)
    plane.core.relabel(WEB, labels={USE: "wp", FROM: "infra"})
    plane.apply(at(instance(where="infra", address="10.0.9.2"), "node", "b"))
    assert plane.believed() == []
    plane.apply(at(instance(where="infra", address="10.0.9.3"), "node", "a"))
    assert plane.believed() == [["spiffe://cluster.local/ns/infra/sa/wp", "10.0.9.3"]]
    plane.restart()
    plane.core.delete([("WorkloadEntry", "infra", "wp-1")])
    assert plane.believed() == []


def test_all_processes_are_waited_for_before_callers_go_that_way(plane):
    other = at(instance(address="10.0.9.2"), "node", "b").replace("wp-1", "wp-2")
    plane.apply(at(gateway(), "node"), at(instance(), "node", "a"), other)
    plane.label()
    for _ in range(3):
        plane.everybody_follows()
    (progress,) = plane.core.progress()
    assert (progress.state.phase, progress.waits_for) == (Phase.PENDING, ("shop/wp-2",))
    plane.settle()
    plane.report("wp-2", "wp", Kind.WAYPOINT)
    plane.everybody_follows()
    assert plane.phase() is Phase.SWITCHING


def test_processes_of_service_accounts_have_a_waypoints_rights(plane):
    assert {str(one) for one in plane.core.waypoints()} == {"spiffe://cluster.local/ns/shop/sa/wp"}
    plane.apply(at(gateway(), "service-account"), at(instance(), "", "a", "web"))
    assert "spiffe://cluster.local/ns/shop/sa/web" in {str(one) for one in plane.core.waypoints()}
    plane.restart()
    assert "spiffe://cluster.local/ns/shop/sa/web" in {str(one) for one in plane.core.waypoints()}


# -- what is refused


def test_a_label_that_names_no_gateway_is_refused(plane):
    with pytest.raises(Loose, match="Service shop/web would be bound to Gateway shop/other, and there is none"):
        plane.label("other")
    plane.label("other", force=True)
    assert plane.phase() is Phase.PENDING
    plane.apply(workload("web-2", "10.0.0.2"))  # nothing to do with it
    plane.restart()
    plane.apply(workload("web-2", "10.0.0.4"))
    assert plane.core.get("Service", "shop", "web")


def test_a_gateway_that_serves_somebody_is_not_deleted_but_by_force(plane):
    plane.enforce()
    place = ("Gateway", "shop", "wp")
    with pytest.raises(Loose, match="Gateway shop/wp serves Service shop/web, whose callers would be refused"):
        plane.core.delete([place])
    plane.core.delete([place], force=True)
    assert plane.phase() is Phase.ENFORCED
    assert "shop/wp" in repr(plane.settle().records["svc/shop/web"]["binding"])


def test_a_gateway_that_serves_somebody_keeps_its_placement_but_by_force(plane):
    placed = at(gateway(), "node")
    plane.enforce()
    with pytest.raises(Loose, match="Gateway shop/wp serves Service shop/web, and would stand elsewhere"):
        plane.apply(placed)
    plane.apply(placed, force=True)
    assert plane.settle().records["gw/shop/wp"]["placement"] == "node"
    plane.apply(placed)


def test_a_gateway_that_serves_nobody_goes(plane):
    plane.core.delete([("Gateway", "shop", "wp"), ("WorkloadEntry", "shop", "wp-1")])
    assert "gw/shop/wp" not in plane.settle().records


def test_a_dry_run_binds_nothing(plane):
    plane.label(dry_run=True)
    assert plane.core.progress() == []


# -- several namespaces


def test_a_gateway_of_another_namespace_serves_and_is_listed_there(plane):
    plane.apply(gateway("far", "infra", admits="All"), instance("far", "infra", "10.0.9.2"))
    plane.core.relabel(WEB, labels={USE: "far", FROM: "infra"})
    assert plane.settle().records["gw/infra/far"]["services"] == ["shop/web"]
    plane.report("web-1", "web")
    plane.report("far-1", "far", Kind.WAYPOINT, "infra")
    plane.core.advance()
    assert plane.phase() is Phase.SWITCHING


def test_a_policy_of_another_namespace_guards_what_its_gateway_serves(plane):
    plane.apply(gateway("far", "infra", admits="All"), instance("far", "infra", "10.0.9.2"))
    plane.core.relabel(WEB, labels={USE: "far", FROM: "infra"})
    assert plane.phase() is Phase.PENDING
    guard = DELETES.replace("namespace: shop", "namespace: infra").replace(
        'group: "", kind: Service, name: web', "group: gateway.networking.k8s.io, kind: Gateway, name: far"
    )
    plane.apply(guard)
    plane.core.advance()
    assert plane.phase() is Phase.REFUSED


def test_a_namespace_label_binds_its_services(plane):
    plane.apply(namespace("shop"))
    plane.core.relabel(("Namespace", "", "shop"), labels={USE: "wp"})
    assert [one.subject for one in plane.core.progress()] == [("Service", "shop/web")]


# -- break glass


def test_a_bypass_opens_the_direct_path_for_a_while_and_ends_by_itself_which_is_logged(plane, caplog):
    caplog.set_level(logging.INFO)
    plane.enforce()
    until = plane.now + 1800
    plane.core.bypass("shop/web", until, "the waypoint is on fire")
    assert plane.phase() is Phase.RELEASING
    plane.everybody_follows()
    plane.everybody_follows()
    assert plane.seen().binding is None
    plane.restart()
    plane.core.advance()
    assert plane.core.bypasses()["shop/web"].reason == "the waypoint is on fire"
    plane.now += 400
    plane.core.advance()
    assert plane.phase() is None
    plane.now = until - 1
    plane.core.advance()
    assert not caplog.messages
    plane.now = until
    plane.core.advance()
    assert caplog.messages == ["the bypass of service shop/web has ended, which was for: the waypoint is on fire"]
    assert plane.core.bypasses() == {}
    assert plane.store.bypasses() == {}
    for _ in range(3):
        plane.everybody_follows()
    assert plane.phase() is Phase.ENFORCED


def test_only_what_is_bound_is_bypassed(plane):
    with pytest.raises(NotFound, match="Service shop/web is not bound to a waypoint"):
        plane.core.bypass("shop/web", plane.now + 60, "x")


# -- rights


def test_a_gateway_makes_its_name_an_identity_with_the_rights_of_a_waypoint(plane):
    assert plane.core.waypoints() == {SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/wp")}
