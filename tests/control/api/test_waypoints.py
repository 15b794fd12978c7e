"""What labels ask of waypoints, and what standings make of the records of callers, destinations and waypoints."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api import records, resources
from control.api.bindings import Standing, Wish
from control.api.declared import DeclaredGateway
from control.api.gateway import Binding, Bound, Instance, Placement, Sidecar, Traffic, Via
from control.api.identity import make_id, parse_trust_domain
from control.api.index import Placed, ResidentWorkload
from control.api.mesh import Elsewhere, Mesh
from control.api.metadata import PLACEMENT
from control.api.problems import Position, ResourceErrors
from control.api.topics import parse_topic

PLACED = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: wp-1
  namespace: shop
  labels: {gateway.networking.k8s.io/gateway-name: wp, kubernetes.io/hostname: host-a}
spec: {address: 10.0.0.9, serviceAccount: ACCOUNT}
"""
SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {istio.io/use-waypoint: wp}}
spec: {clusterIP: 240.240.0.1, selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
"""
WORKLOAD = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec: {address: 10.0.0.1, serviceAccount: web}
"""
GATEWAY = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: wp, namespace: shop, labels: {istio.io/waypoint-for: all}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: Same}}}]
"""
INSTANCE = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: wp-1, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: wp}}
spec: {address: 10.0.0.9, serviceAccount: wp}
"""
NAMESPACE = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/use-waypoint: wp, tier: a}}
"""
POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {targetRefs: [{kind: Service, name: web}]}
"""
UNBOUND = SERVICE.replace(", labels: {istio.io/use-waypoint: wp}", "")
OPTED_OUT = SERVICE.replace("use-waypoint: wp", "use-waypoint: none")
ON_WORKLOAD = WORKLOAD.replace("{app: web}", "{app: web, istio.io/use-waypoint: wp}")
OPTIONAL = SERVICE.replace("wp}}", "wp}, annotations: {mesh.uproxy.dev/waypoint-binding: optional}}")
WEB, POD = ("Service", "shop/web"), ("WorkloadEntry", "shop/web-1")
THROUGH = Binding("shop/wp", Via.WAYPOINT)
_NOWHERE = Position("elsewhere", 0, {})


def build(*texts, **options):
    return Mesh.build(resources.parse("---\n".join(texts), "f.yaml"), "cluster.local", **options)


def errors_of(*texts, **options):
    with pytest.raises(ResourceErrors) as caught:
        build(*texts, **options)
    return [str(error).removeprefix("f.yaml:") for error in caught.value.errors]


def bounds_of(mesh, name="web-1"):
    return next(workload.bounds for workload in mesh.workloads if workload.name == name)


def test_a_label_on_a_service_binds_it_and_the_ports_behind_it():
    mesh = build(SERVICE, WORKLOAD, GATEWAY, INSTANCE)
    assert mesh.wishes == {WEB: Wish("shop/wp", optional=False, guarded=False)}
    assert mesh.services[0].binding == THROUGH
    assert bounds_of(mesh) == (Bound(8080, ("shop/wp",), (), enforced=True),)
    assert bounds_of(mesh, "wp-1") == ()
    residents = mesh.residents()
    assert residents["240.240.0.1"].bound
    assert residents["10.0.0.1"].bindings == ((8080, THROUGH),)
    assert residents["10.0.0.1"].binding_at(8080) == THROUGH
    assert residents["10.0.0.1"].binding_at(9000) is None
    assert residents["10.0.0.9"].bindings == ()
    (gateway,) = mesh.gateways
    assert (gateway.traffic, gateway.instances) == (Traffic.ALL, (Instance("shop/wp-1", "10.0.0.9"),))
    assert (gateway.services, gateway.workloads) == (("shop/web",), ())
    assert mesh.warnings == ()


def test_a_label_on_a_workload_binds_all_its_ports():
    mesh = build(UNBOUND, ON_WORKLOAD, GATEWAY)
    assert mesh.wishes == {POD: Wish("shop/wp", optional=False, guarded=False)}
    assert mesh.services[0].binding is None
    (bound,) = bounds_of(mesh)
    assert bound == Bound(0, ("shop/wp",), (), enforced=True)
    assert mesh.workloads[0].bound_at(1234) == bound
    assert mesh.residents()["10.0.0.1"].binding_at(1234) == THROUGH
    assert mesh.gateways[0].workloads == ("shop/web-1",)


@pytest.mark.parametrize(
    ("traffic", "subjects"),
    [("service", {WEB}), ("workload", {POD}), ("all", {WEB, POD}), ("none", set())],
)
def test_a_label_on_a_namespace_binds_what_the_gateway_takes_and_says_nothing_of_the_rest(traffic, subjects):
    mesh = build(NAMESPACE, UNBOUND, WORKLOAD, GATEWAY.replace("for: all", f"for: {traffic}"), INSTANCE)
    assert mesh.wishes.keys() == subjects
    assert mesh.warnings == ()


def test_an_object_stands_above_its_namespace():
    assert build(NAMESPACE, OPTED_OUT, WORKLOAD, GATEWAY).wishes.keys() == {POD}
    other = GATEWAY.replace("name: wp", "name: other")
    mesh = build(NAMESPACE.replace("wp", "other"), SERVICE, WORKLOAD, GATEWAY, other)
    assert mesh.wishes[WEB].gateway == "shop/wp"
    assert mesh.wishes[POD].gateway == "shop/other"


def test_what_two_bind_believes_both_and_exempts_who_both_exempt():
    def exempting(text, *accounts):
        names = ",".join(f"spiffe://cluster.local/ns/mon/sa/{account}" for account in accounts)
        return text.replace("}}\nspec", "}, annotations: {mesh.uproxy.dev/waypoint-exempt: '%s'}}\nspec" % names)  # noqa: UP031

    one = exempting(SERVICE, "a", "b")
    two = exempting(SERVICE.replace("name: web", "name: too").replace("0.0.1", "0.0.2"), "b", "c")
    two = two.replace("use-waypoint: wp", "use-waypoint: wp2")
    mesh = build(one, two, WORKLOAD, GATEWAY, GATEWAY.replace("name: wp", "name: wp2"))
    exempt = make_id(parse_trust_domain("cluster.local"), "mon", "b")
    assert bounds_of(mesh) == (Bound(8080, ("shop/wp", "shop/wp2"), (exempt,), enforced=True),)


def test_what_stands_for_all_ports_stands_for_each():
    mesh = build(
        SERVICE, ON_WORKLOAD.replace("waypoint: wp", "waypoint: wp2"), GATEWAY, GATEWAY.replace("name: wp", "name: wp2")
    )
    assert [(bound.port, bound.gateways) for bound in bounds_of(mesh)] == [
        (0, ("shop/wp2",)),
        (8080, ("shop/wp", "shop/wp2")),
    ]
    assert mesh.residents()["10.0.0.1"].binding_at(8080) == Binding("shop/wp2", Via.WAYPOINT)


def test_an_optional_binding_is_preferred_and_never_enforced():
    mesh = build(OPTIONAL, WORKLOAD, GATEWAY)
    assert mesh.services[0].binding == Binding("shop/wp", Via.PREFERRED)
    assert not bounds_of(mesh)[0].enforced


@pytest.mark.parametrize("target", ["{kind: Service, name: web}", "{kind: Gateway, group: G, name: wp}"])
def test_a_policy_of_the_service_or_its_gateway_guards_it(target):
    target = target.replace("G,", "gateway.networking.k8s.io,")
    assert build(SERVICE, WORKLOAD, GATEWAY, POLICY.replace("{kind: Service, name: web}", target)).wishes[WEB].guarded


def test_a_policy_in_dry_run_guards_nothing():
    dry = POLICY.replace("metadata: {", "metadata: {annotations: {istio.io/dry-run: 'true'}, ", 1)
    assert dry != POLICY
    assert not build(SERVICE, WORKLOAD, GATEWAY, dry).wishes[WEB].guarded


def test_a_policy_elsewhere_guards_through_the_gateway():
    gateway = DeclaredGateway("edge", "wp", Traffic.SERVICE, {}, _NOWHERE)
    text = SERVICE.replace("waypoint: wp", "waypoint: wp, istio.io/use-waypoint-namespace: edge")
    for guarded in (frozenset(), frozenset({"edge/wp"})):
        elsewhere = Elsewhere(gateways={"edge/wp": gateway}, guarded=guarded)
        assert build(text, WORKLOAD, elsewhere=elsewhere).wishes == {WEB: Wish("edge/wp", False, bool(guarded))}


def test_a_destination_is_told_that_a_policy_is_missed_on_the_way_around():
    def guarded(policy, *, enforced=True, text=SERVICE):
        standings = {WEB: Standing(("shop/wp",), enforced=enforced, binding=THROUGH)}
        return [bound.guarded for bound in bounds_of(build(text, WORKLOAD, GATEWAY, *policy, standings=standings))]

    assert guarded([POLICY]) == [True]
    assert guarded([]) == [False]
    assert guarded([POLICY], enforced=False) == [False]
    assert guarded([POLICY], text=UNBOUND) == [False], "the label is gone: nothing must end any more"


def test_the_word_of_a_gateway_counts_while_it_is_there():
    standings = {WEB: Standing(("edge/wp", "shop/wp"), enforced=True, binding=THROUGH)}
    impostor = WORKLOAD.replace("name: web-1", "name: x").replace("serviceAccount: web", "serviceAccount: wp")
    text = SERVICE, WORKLOAD, impostor.replace("0.0.1", "0.0.3").replace("app: web", "app: x")
    edge = Elsewhere(gateways={"edge/wp": DeclaredGateway("edge", "wp", Traffic.SERVICE, {}, _NOWHERE)})
    for elsewhere, believed in ((Elsewhere(), ()), (edge, ("edge/wp",))):
        bounds = bounds_of(build(*text, standings=standings, elsewhere=elsewhere))
        assert bounds == (Bound(8080, believed, (), enforced=True),)
    both = build(*text[:2], GATEWAY, standings=standings, elsewhere=edge)
    assert bounds_of(both)[0].gateways == ("edge/wp", "shop/wp")


def test_records_say_what_stands_and_not_what_is_wished():
    standing = Standing(("shop/old", "shop/wp"), enforced=False, binding=Binding("shop/old", Via.WAYPOINT))
    standings = {WEB: standing, ("Service", "bank/x"): Standing(("shop/wp",), enforced=True, binding=THROUGH)}
    mesh = build(SERVICE, WORKLOAD, GATEWAY, GATEWAY.replace("name: wp", "name: old"), standings=standings)
    assert mesh.wishes.keys() == {WEB}
    assert mesh.services[0].binding == standing.binding
    assert bounds_of(mesh) == (Bound(8080, ("shop/old", "shop/wp"), (), enforced=False),)
    assert {one.name: one.services for one in mesh.gateways} == {"old": ("shop/web",), "wp": ("bank/x", "shop/web")}
    pending = build(SERVICE, WORKLOAD, GATEWAY, standings={})
    assert pending.wishes == mesh.wishes
    assert (pending.services[0].binding, bounds_of(pending), pending.bindings) == (None, (), {})
    assert pending.gateways[0].services == ()


def test_a_gateway_that_is_not_there_refuses_files_and_warns_a_control_plane():
    (error,) = errors_of(SERVICE.replace("waypoint: wp", "waypoint: wq"), WORKLOAD, GATEWAY)
    assert error == (
        "3: metadata.labels['istio.io/use-waypoint']: there is no Gateway shop/wq; apply it, as `meshctl waypoint "
        "apply` does, or name another (did you mean 'shop/wp'?)"
    )
    mesh = build(SERVICE, WORKLOAD, standings={})
    assert mesh.wishes.keys() == {WEB}
    assert "there is no Gateway shop/wp" in str(mesh.warnings)


def test_a_namespace_s_missing_gateway_is_told_once():
    second = UNBOUND.replace("name: web", "name: two").replace("0.0.1", "0.0.2")
    (error,) = errors_of(NAMESPACE, UNBOUND, second, WORKLOAD)
    assert error.startswith("3: metadata.labels['istio.io/use-waypoint']: there is no Gateway shop/wp")


@pytest.mark.parametrize(
    ("admits", "admitted"),
    [
        (None, False),
        ({}, True),
        ({"tier": "a"}, True),
        ({"tier": "b"}, False),
        ({"kubernetes.io/metadata.name": "shop"}, True),
        ({"kubernetes.io/metadata.name": "bank"}, False),
    ],
)
@pytest.mark.parametrize("standings", [None, {}])
def test_a_gateway_says_which_namespaces_it_admits(admits, admitted, standings):
    texts = (
        SERVICE.replace("waypoint: wp", "waypoint: wp, istio.io/use-waypoint-namespace: edge"),
        WORKLOAD,
        NAMESPACE.replace("istio.io/use-waypoint: wp, ", ""),
    )
    elsewhere = Elsewhere(gateways={"edge/wp": DeclaredGateway("edge", "wp", Traffic.SERVICE, admits, _NOWHERE)})
    if admitted:
        assert build(*texts, elsewhere=elsewhere, standings=standings).wishes.keys() == {WEB}
    else:
        (error,) = errors_of(*texts, elsewhere=elsewhere, standings=standings)
        assert "Gateway edge/wp does not admit namespace shop; widen its spec.listeners[0]" in error
        # What is bound stays bound, whatever the Gateway's owner does: a policy would be lost.
        bound = {WEB: Standing(("edge/wp",), enforced=True, binding=Binding("edge/wp", Via.WAYPOINT))}
        mesh = build(*texts, elsewhere=elsewhere, standings=bound)
        assert mesh.wishes.keys() == {WEB}
        assert "does not admit" in str(mesh.warnings)


@pytest.mark.parametrize(("text", "traffic"), [(SERVICE, "workload"), (ON_WORKLOAD, "service"), (SERVICE, "none")])
def test_a_label_that_the_gateway_does_not_take_is_told(text, traffic):
    texts = (UNBOUND, text) if text is ON_WORKLOAD else (text, WORKLOAD)
    mesh = build(*texts, GATEWAY.replace("for: all", f"for: {traffic}"))
    assert mesh.wishes == {}
    assert f"does nothing: Gateway shop/wp does not take traffic to {'se' if text is SERVICE else 'wo'}" in str(
        mesh.warnings
    )


@pytest.mark.parametrize("name", ["waypoint-binding: optional", "waypoint-exempt: spiffe://cluster.local/ns/a/sa/b"])
def test_an_annotation_without_a_waypoint_is_told(name):
    mesh = build(UNBOUND.replace("shop}", f"shop, annotations: {{mesh.uproxy.dev/{name}}}}}", 1), WORKLOAD)
    assert "does nothing: no istio.io/use-waypoint binds this to a waypoint" in str(mesh.warnings)


def test_nobody_of_another_trust_domain_is_exempt():
    exempt = "annotations: {mesh.uproxy.dev/waypoint-exempt: spiffe://other/ns/a/sa/b}"
    (error,) = errors_of(SERVICE.replace("wp}}", f"wp}}, {exempt}}}"), WORKLOAD, GATEWAY)
    assert "spiffe://other/ns/a/sa/b is of another trust domain than cluster.local" in error


def test_only_a_process_of_a_gateway_has_its_identity():
    (error,) = errors_of(GATEWAY, WORKLOAD.replace("serviceAccount: web", "serviceAccount: wp"))
    assert "spec.serviceAccount: is the identity of Gateway shop/wp, whose processes are believed" in error
    (error,) = errors_of(GATEWAY, INSTANCE.replace("serviceAccount: wp", "serviceAccount: web"))
    assert "spec.serviceAccount: must be 'wp', the name of the Gateway" in error
    assert "names no Gateway of namespace shop: 'wp'; apply it" in str(build(INSTANCE).warnings)


def test_each_object_is_told_of_its_own_label():
    second = SERVICE.replace("name: web", "name: two").replace("0.0.1", "0.0.2")
    assert [error.partition(":")[0] for error in errors_of(SERVICE, second, WORKLOAD)] == ["3", "8"]


def test_a_label_that_names_no_gateway_takes_no_workload_out_of_its_binding():
    pretender = INSTANCE.replace("labels: {", "labels: {app: web, ")
    mesh = build(SERVICE, pretender, GATEWAY.replace("name: wp", "name: wq"), standings={WEB: _ENFORCED})
    assert bounds_of(mesh, "wp-1") == (Bound(8080, (), (), enforced=True),)


_ENFORCED = Standing(("shop/wp",), enforced=True, binding=THROUGH)
standings_of_few = st.dictionaries(
    st.sampled_from([WEB, POD, ("Service", "shop/two"), ("Service", "bank/x"), ("WorkloadEntry", "shop/wp-1")]),
    st.builds(
        Standing,
        st.sets(st.sampled_from(["shop/wp", "shop/wp2"]), min_size=1).map(sorted).map(tuple),
        st.booleans(),
        st.none() | st.builds(Binding, st.sampled_from(["shop/wp", "shop/wp2"]), st.sampled_from(Via)),
    ),
)


@given(standings_of_few)
def test_records_by_a_naive_reading_of_standings(standings):
    two = SERVICE.replace("name: web", "name: two").replace("0.0.1", "0.0.2").replace("80, targetPort: 8080", "81")
    gateways = (GATEWAY, GATEWAY.replace("name: wp", "name: wp2"))
    mesh = build(SERVICE, two, WORKLOAD, INSTANCE, *gateways, standings=standings)
    behind = {8080: [WEB, POD], 81: [("Service", "shop/two"), POD], 9: [POD]}
    workload = next(workload for workload in mesh.workloads if workload.name == "web-1")
    for port, subjects in behind.items():
        here = [standings[subject] for subject in subjects if subject in standings]
        bound = workload.bound_at(port)
        assert (bound is not None) == bool(here)
        if bound is not None:
            assert bound.enforced == any(one.enforced for one in here)
            assert set(bound.gateways) == {gateway for one in here for gateway in one.gateways}
        bindings = [one.binding for one in here if one.binding is not None]
        assert (mesh.residents()["10.0.0.1"].binding_at(port) in bindings) or not bindings
        assert (mesh.residents()["10.0.0.1"].binding_at(port) is None) == (not bindings)
    assert bounds_of(mesh, "wp-1") == ()
    for service in mesh.services:
        standing = standings.get(("Service", service.key))
        assert service.binding == (standing and standing.binding)
        assert mesh.residents()[service.vips[0]].bound == (service.binding is not None)
    for gateway in mesh.gateways:
        served = {subject for subject, one in standings.items() if gateway.key in one.gateways}
        assert {("Service", key) for key in gateway.services} | {
            ("WorkloadEntry", key) for key in gateway.workloads
        } == served
    for topic, body in mesh.records().items():
        assert records.write(records.read(parse_topic(mesh.trust_domain, topic), body, mesh.trust_domain)) == body


@pytest.mark.parametrize("standings", [{}, {WEB: _ENFORCED, ("Service", "bank/x"): _ENFORCED}])
def test_each_namespace_built_alone_is_that_part_of_the_whole(standings):
    """With a Gateway, routes and policies in one namespace, and a service bound to it in another."""
    other = SERVICE.replace("name: web, namespace: shop", "name: x, namespace: bank").replace("0.0.1", "0.0.2")
    other = other.replace("waypoint: wp", "waypoint: wp, istio.io/use-waypoint-namespace: shop")
    guard = POLICY.replace("kind: Service, name: web", "kind: Gateway, group: gateway.networking.k8s.io, name: wp")
    texts = [SERVICE, WORKLOAD, INSTANCE, GATEWAY.replace("Same", "All"), guard, other]
    declared = resources.parse("---\n".join(texts), "f.yaml")
    whole = Mesh.build(declared, "cluster.local", standings=standings)
    gateways = {one.key: one for one in declared if isinstance(one, DeclaredGateway)}
    found, wishes = {}, {}
    for namespace in ("shop", "bank"):
        mine = [one for one in declared if resources.place_of(one)[1] == namespace]
        outside = Elsewhere() if namespace == "shop" else Elsewhere(gateways=gateways, guarded=frozenset({"shop/wp"}))
        part = Mesh.build(mine, "cluster.local", elsewhere=outside, standings=standings)
        found |= part.records()
        wishes |= part.wishes
    assert found == whole.records()
    assert wishes == whole.wishes
    assert all(wish.guarded for wish in wishes.values())


# -- placements


def placed(placement):
    return GATEWAY.replace("shop,", f"shop, annotations: {{mesh.uproxy.dev/placement: {placement}}},")


def process(name, address, node="", account="wp", more=""):
    host = f", kubernetes.io/hostname: {node}" if node else ""
    text = INSTANCE.replace("wp-1", name).replace("gateway-name: wp", f"gateway-name: wp{host}")
    text = text.replace("10.0.0.9, serviceAccount: wp", f"{address}, serviceAccount: {account}")
    return text.replace("labels:", f"annotations: {{mesh.uproxy.dev/addresses: '{more}'}}, labels:") if more else text


def on(node, name="web-1", address="10.0.0.1", account="web"):
    text = WORKLOAD.replace("web-1", name).replace(
        "10.0.0.1, serviceAccount: web", f"{address}, serviceAccount: {account}"
    )
    return text.replace("{app: web}", f"{{app: web, kubernetes.io/hostname: {node}}}")


BY_NODE = (
    on("a"),
    on("b", "web-2", "10.0.0.2"),
    process("wp-a", "10.0.0.9", "a", more="fd00::9"),
    process("wp-b", "10.0.0.8", "b"),
)


def believed(mesh, name="web-1"):
    return [(str(one.identity).partition("/ns/")[2], *one.addresses) for one in bounds_of(mesh, name)[0].processes]


def test_a_workload_believes_the_process_of_its_own_node():
    mesh = build(SERVICE, placed("node"), *BY_NODE)
    assert believed(mesh) == [("shop/sa/wp", "10.0.0.9", "fd00::9")]
    assert believed(mesh, "web-2") == [("shop/sa/wp", "10.0.0.8")]
    assert bounds_of(mesh)[0].gateways == (), "nobody by the identity alone"
    (gateway,) = mesh.gateways
    assert gateway.placement is Placement.NODE
    assert [(one.workload, one.account, one.node) for one in gateway.instances] == [
        ("shop/wp-a", "", "a"),
        ("shop/wp-b", "", "b"),
    ]
    assert [endpoint.node for endpoint in mesh.endpoints] == ["a", "b"]
    assert mesh.bindings["shop/web-2"] == ((8080, Binding("shop/wp", Via.WAYPOINT, "b")),)
    assert mesh.services[0].binding == THROUGH, "of a service the endpoint says it"
    assert not mesh.warnings


def test_a_workload_believes_the_process_of_its_own_service_account():
    processes = process("wp-web", "10.0.0.8", "a", "web"), process("wp-api", "10.0.0.9", "a", "api")
    mesh = build(SERVICE, placed("service-account"), on("a"), on("a", "web-2", "10.0.0.2", "api"), *processes)
    assert believed(mesh) == [("shop/sa/web", "10.0.0.8")]
    assert believed(mesh, "web-2") == [("shop/sa/api", "10.0.0.9")]
    assert {one.account for one in mesh.gateways[0].instances} == {"web", "api"}
    assert "wp-web" not in {endpoint.workload for endpoint in mesh.endpoints}


def test_where_routes_lead_all_processes_may_come():
    other = UNBOUND.replace("name: web", "name: other").replace("240.240.0.1", "240.240.0.2")
    route = """\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: to-web, namespace: shop}
spec:
  parentRefs: [{kind: Service, group: "", name: other}]
  rules: [{backendRefs: [{name: web, port: 80}]}]
"""
    bound = other.replace("namespace: shop", "namespace: shop, labels: {istio.io/use-waypoint: wp}")
    mesh = build(SERVICE, placed("node"), *BY_NODE, bound, route)
    assert len(believed(mesh)) == len(believed(mesh, "web-2")) == 2
    own = route.replace("name: other", "name: web")
    assert len(believed(build(SERVICE, placed("node"), *BY_NODE, own))) == 1, "its own route leads nowhere else"


def test_an_endpoint_without_a_process_before_it_is_told():
    mesh = build(
        SERVICE, placed("node"), *BY_NODE[:3], on("", "web-3", "10.0.0.3").replace(", kubernetes.io/hostname: ", "")
    )
    assert believed(mesh, "web-2") == believed(mesh, "web-3") == []
    said = [str(warning) for warning in mesh.warnings]
    assert len(said) == 2
    assert "Gateway shop/wp has no process on node b: endpoints there get no calls" in said[1]
    mesh = build(SERVICE, placed("service-account"), on("a"), process("wp-api", "10.0.0.9", "a", "api"))
    assert "no process on node a for service account web" in str(mesh.warnings[0])


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ((placed("everywhere"),), "'everywhere' must be one of remote, node, service-account"),
        ((placed("node"), process("wp-a", "10.0.0.9", "a", "web")), "must be 'wp', the name of the Gateway"),
        ((WORKLOAD.replace("labels", "annotations: {mesh.uproxy.dev/placement: node}, labels"),), "said of a Gateway"),
        ((placed("node"), WORKLOAD.replace("serviceAccount: web", "serviceAccount: wp")), "is the identity of Gateway"),
    ],
)
def test_what_cannot_be_placed_is_refused(texts, problem):
    assert problem in "\n".join(errors_of(*texts))


def test_a_process_that_says_no_node_serves_nothing():
    mesh = build(SERVICE, placed("node"), on("a"), process("wp-a", "10.0.0.9"))
    assert mesh.gateways[0].instances == ()
    assert any("label it kubernetes.io/hostname" in str(warning) for warning in mesh.warnings)


def test_the_processes_of_another_namespace_are_believed_by_node():
    there = build(placed("node"), *BY_NODE[2:])
    service, workload = (text.replace("namespace: shop", "namespace: bank") for text in (SERVICE, on("a")))
    service = service.replace("use-waypoint: wp", "use-waypoint: wp, istio.io/use-waypoint-namespace: shop")
    gateway = next(one for one in resources.parse(placed("node").replace("from: Same", "from: All"), "f.yaml"))
    elsewhere = Elsewhere(gateways={"shop/wp": gateway}, processes={"shop/wp": there.gateways[0].instances})
    mesh = build(service, workload, elsewhere=elsewhere)
    assert believed(mesh) == [("shop/sa/wp", "10.0.0.9", "fd00::9")]
    of_account = resources.parse(placed("service-account").replace("from: Same", "from: All"), "f.yaml")
    elsewhere = Elsewhere(gateways={"shop/wp": next(iter(of_account))})
    assert "of its own namespace" in "\n".join(errors_of(service, workload, elsewhere=elsewhere))


# -- canaries


def canaried(text, share="v2=10"):
    end = "}}" if "wp}}" in text else ", tier: a}}"
    annotation = f"annotations: {{mesh.uproxy.dev/waypoint-canary: {share}}}"
    return text.replace(f"wp{end}", f"wp{end[:-1]}, {annotation}}}")


V2 = GATEWAY.replace("name: wp", "name: v2")
GROUP = "gateway.networking.k8s.io"


def test_a_canary_is_believed_as_its_waypoint_is_and_gets_its_share():
    mesh = build(canaried(SERVICE), WORKLOAD, GATEWAY, INSTANCE, V2)
    through = Binding("shop/wp", Via.WAYPOINT, canary="shop/v2", percent=10)
    assert mesh.services[0].binding == through
    assert bounds_of(mesh) == (Bound(8080, ("shop/v2", "shop/wp"), (), enforced=True),)
    assert mesh.residents()["10.0.0.1"].bindings == ((8080, through),)
    assert [gateway.services for gateway in mesh.gateways] == [("shop/web",)] * 2
    assert mesh.warnings == ()
    inherited = build(canaried(NAMESPACE), UNBOUND, WORKLOAD, GATEWAY, INSTANCE, V2)
    assert inherited.services[0].binding == through


def test_a_canary_that_is_none_is_told():
    assert "there is no Gateway shop/v2" in errors_of(canaried(SERVICE), WORKLOAD, GATEWAY, INSTANCE)[0]
    for mesh, said in (
        (build(canaried(SERVICE, "wp=10"), WORKLOAD, GATEWAY, INSTANCE), "is the waypoint itself"),
        (
            build(canaried(SERVICE), WORKLOAD, GATEWAY, INSTANCE, V2.replace("for: all", "for: workload")),
            "does not take traffic",
        ),
        (build(canaried(SERVICE, "v2=10").replace("use-waypoint: wp", "a: wp"), WORKLOAD), "does nothing"),
    ):
        assert said in str(mesh.warnings[0])
        assert mesh.services[0].binding in (THROUGH, None)


def test_policies_that_callers_of_a_canary_leave_behind_are_told():
    policy = POLICY.replace("{kind: Service, name: web}", f"{{group: {GROUP}, kind: Gateway, name: wp}}")
    (warning,) = build(canaried(SERVICE), WORKLOAD, GATEWAY, INSTANCE, V2, policy).warnings
    assert "policies that target Gateway shop/wp do not hold for callers that go through shop/v2" in str(warning)
    both = policy, policy.replace("name: wp}", "name: v2}").replace("name: p,", "name: p2,")
    assert build(canaried(SERVICE), WORKLOAD, GATEWAY, INSTANCE, V2, *both).warnings == ()


def test_what_a_namespace_says_of_a_canary_is_told_once_and_of_the_namespace():
    policy = POLICY.replace("{kind: Service, name: web}", f"{{group: {GROUP}, kind: Gateway, name: wp}}")
    second = UNBOUND.replace("name: web", "name: shelf").replace("240.240.0.1", "240.240.0.2")
    mesh = (UNBOUND, second, WORKLOAD, GATEWAY, INSTANCE, V2)
    (warning,) = build(canaried(NAMESPACE), *mesh, policy).warnings
    assert "policies that target Gateway shop/wp do not hold" in str(warning)
    assert warning.line == 3, "of the Namespace"
    (warning,) = build(canaried(NAMESPACE, "wp=10"), *mesh).warnings
    assert "is the waypoint itself" in str(warning)
    assert build(canaried(NAMESPACE), *mesh).warnings == ()
    (warning,) = build(canaried(NAMESPACE).replace("use-waypoint: wp", "a: wp"), *mesh).warnings
    assert "nothing in this namespace is bound to a waypoint" in str(warning)
    own = canaried(SERVICE), WORKLOAD.replace("{app: web}", "{app: web, istio.io/use-waypoint: none}")
    (warning,) = build(canaried(NAMESPACE, "v2=20"), *own, GATEWAY, INSTANCE, V2).warnings
    assert "each has a canary of its own" in str(warning)


@pytest.mark.parametrize(
    ("placement", "account", "placed"),
    [
        ("remote", "wp", None),
        ("node", "wp", Placed("wp", "host-a")),
        ("service-account", "web", Placed("wp", "host-a")),
    ],
)
def test_an_address_says_which_node_starts_the_process_that_lives_there(placement, account, placed):
    gateway = GATEWAY.replace("namespace: shop,", f"namespace: shop, annotations: {{{PLACEMENT}: {placement}}},")
    mesh = build(gateway, PLACED.replace("ACCOUNT", account), WORKLOAD)
    resident = mesh.residents()["10.0.0.9"]
    assert isinstance(resident, ResidentWorkload)
    assert resident.placed == placed
    other = mesh.residents()["10.0.0.1"]
    assert isinstance(other, ResidentWorkload)
    assert other.placed is None


# -- beside each workload

BESIDE = SERVICE, WORKLOAD, placed("sidecar")
ROUTE = """\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: of-web, namespace: shop}
spec:
  parentRefs: [{kind: Service, group: "", name: web}]
  rules: [{backendRefs: [{name: web, port: 80}]}]
"""


def sidecar_of(mesh, name="web-1"):
    return next(workload.sidecar for workload in mesh.workloads if workload.name == name)


def test_callers_see_nothing_of_what_stands_beside_a_workload():
    mesh = build(*BESIDE, ROUTE)
    assert sidecar_of(mesh) == Sidecar("shop/wp", (8080,))
    assert bounds_of(mesh) == (Bound(8080, (), (), enforced=True),), "nobody is believed, and no port is open beside it"
    assert mesh.services[0].binding is None
    assert mesh.bindings == {}
    (gateway,) = mesh.gateways
    assert gateway.placement is Placement.SIDECAR
    assert (gateway.instances, gateway.services) == ((), ("shop/web",))
    assert not mesh.warnings
    for topic, body in mesh.records().items():
        if "/wl/" in topic:
            assert records.read(parse_topic("cluster.local", topic), body, mesh.trust_domain) in mesh.workloads


@pytest.mark.parametrize(
    ("standing", "ports"),
    [
        pytest.param(Standing(("shop/wp",), False, None), (), id="pending, or let go"),
        pytest.param(Standing(("shop/wp",), False, THROUGH), (8080,), id="switching"),
        pytest.param(Standing(("shop/wp",), True, Binding("shop/wp", Via.REFUSE)), (8080,), id="refused"),
        pytest.param(Standing(("shop/far", "shop/wp"), True, Binding("shop/far", Via.WAYPOINT)), (8080,), id="moving"),
    ],
)
def test_streams_go_through_it_from_when_callers_would(standing, ports):
    mesh = build(*BESIDE, GATEWAY.replace("name: wp", "name: far"), standings={WEB: standing})
    assert sidecar_of(mesh) == Sidecar("shop/wp", ports)
    seen = mesh.services[0].binding
    assert seen is None or seen.gateway == "shop/far"


@pytest.mark.parametrize("through", ["shop/old", "shop/wp"])
def test_a_service_that_moves_from_one_to_another_has_that_which_its_callers_go_through(through):
    both = Standing(("shop/old", "shop/wp"), True, Binding(through, Via.WAYPOINT))
    mesh = build(*BESIDE, placed("sidecar").replace("name: wp,", "name: old,"), standings={WEB: both})
    assert sidecar_of(mesh) == Sidecar(through, (8080,))


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        pytest.param(
            (ROUTE.replace("{name: web, port: 80}", "{name: other, port: 80}"),),
            "leads nowhere; a way to Service shop/other needs another placement",
            id="a route that leads elsewhere",
        ),
        pytest.param(
            (ROUTE.replace("space: shop", "space: far").replace("name: web}]", "name: web, namespace: shop}]"),),
            "stands before no callers: a route of theirs needs another placement",
            id="a route of callers",
        ),
        pytest.param(
            (POLICY.replace("spec: {", "spec: {action: CUSTOM, provider: {name: asks}, rules: [{}], "),),
            "asks nobody; CUSTOM needs another placement",
            id="somebody who is asked",
        ),
        pytest.param(
            (
                placed("sidecar").replace("name: wp,", "name: second,"),
                SERVICE.replace("name: web,", "name: twin,").replace("240.240.0.1", "240.240.0.3").replace(
                    "use-waypoint: wp", "use-waypoint: second"
                ),
            ),
            "one process only stands beside a workload",
            id="two beside one workload",
        ),
        pytest.param(
            (placed("sidecar, mesh.uproxy.dev/engine: envoy").replace("name: wp,", "name: other-wp,"),),
            "the engine envoy does not stand beside a workload",
            id="envoy",
        ),
    ],
)  # fmt: skip
def test_what_a_process_beside_a_workload_cannot_do_is_refused_by_name(texts, problem):
    other = UNBOUND.replace("name: web", "name: other").replace("240.240.0.1", "240.240.0.2")
    found = errors_of(*BESIDE, other, *texts)
    assert any(problem in error for error in found), found


def test_what_it_cannot_do_is_refused_where_workloads_are_bound_themselves():
    asks = POLICY.replace("kind: Service, name: web", "kind: Gateway, group: gateway.networking.k8s.io, name: wp")
    asks = asks.replace("spec: {", "spec: {action: CUSTOM, provider: {name: asks}, rules: [{}], ")
    found = errors_of(UNBOUND, ON_WORKLOAD, placed("sidecar"), asks)
    assert any("asks nobody; CUSTOM needs another placement" in error for error in found), found
    second = placed("sidecar").replace("name: wp,", "name: second,")
    found = errors_of(
        SERVICE.replace("use-waypoint: wp", "use-waypoint: second"), ON_WORKLOAD, placed("sidecar"), second
    )
    assert any("one process only stands beside a workload" in error for error in found), found


def test_a_process_is_not_declared_of_a_waypoint_beside_each_workload():
    mesh = build(*BESIDE, INSTANCE)
    assert any("uProxies start the processes of Gateway shop/wp themselves" in str(one) for one in mesh.warnings)
    assert mesh.gateways[0].instances == ()


def test_no_canary_shares_with_what_callers_do_not_see():
    canary = SERVICE.replace("wp}}", "far}, annotations: {mesh.uproxy.dev/waypoint-canary: wp=10}}")
    mesh = build(canary, WORKLOAD, placed("sidecar"), GATEWAY.replace("name: wp", "name: far"))
    assert any("is beside each workload, past which no caller goes" in str(one) for one in mesh.warnings)
    assert mesh.wishes[WEB].canary is None
