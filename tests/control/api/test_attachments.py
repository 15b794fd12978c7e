"""Policies and routes that hang on nothing, or on what is not theirs."""

from __future__ import annotations

import pytest

from control.api import resources
from control.api.mesh import Mesh
from control.api.problems import ResourceErrors
from control.api.route import Parent
from tests.control.api.test_waypoints import GATEWAY, POLICY, SERVICE, UNBOUND, WORKLOAD

BASE = (SERVICE, WORKLOAD, GATEWAY)
ROUTE = """\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{kind: Service, name: web}]
  rules:
  - matches: [{path: {value: /v2}}]
    backendRefs: [{name: web, port: 80}]
"""


def build(*texts):
    return Mesh.build(resources.parse("---\n".join(texts), "f.yaml"), "cluster.local")


def warnings_of(*texts):
    return [str(warning).removeprefix("f.yaml:") for warning in build(*texts).warnings]


def test_what_holds_together_is_not_spoken_of():
    mesh = build(*BASE, POLICY, ROUTE)
    assert mesh.warnings == ()
    assert [route.key for route in mesh.routes] == ["shop/web"]
    assert mesh.policies[0].targets


def test_a_policy_of_what_is_not_there_is_told():
    (warning,) = warnings_of(*BASE, POLICY.replace("name: web", "name: wep"))
    assert "spec.targetRefs[0]: there is no Service shop/wep; until there is, this does nothing" in warning
    assert "did you mean 'shop/web'?" in warning


def test_a_policy_of_an_unbound_service_is_told():
    (warning,) = warnings_of(UNBOUND, WORKLOAD, GATEWAY, POLICY)
    assert "nobody enforces this: Service shop/web is bound to no waypoint; label it istio.io/use-waypoint" in warning


def test_a_policy_that_asks_for_http_where_there_is_none_is_told():
    asking = POLICY.replace("name: web}]", "name: web}], rules: [{to: [{operation: {methods: [GET]}}]}]")
    opaque = SERVICE.replace("name: http,", "name: tcp,")
    (warning,) = warnings_of(opaque, WORKLOAD, GATEWAY, asking)
    assert "Service shop/web has ports that are not HTTP: 80. There an ALLOW does not match" in warning
    assert warnings_of(opaque, WORKLOAD, GATEWAY, POLICY) == []
    undeclared = SERVICE.replace("name: http,", "name: raw,")  # there, whatever it asks for is asked
    assert warnings_of(undeclared, WORKLOAD, GATEWAY, asking) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "kind: Service, name: web",
            "kind: Service, name: wep",
            "parentRefs[0].name: there is no Service shop/wep (NoMatchingParent); declare",
        ),
        (
            "name: web}]\n  rules",
            "name: web, port: 81}]\n  rules",
            "parentRefs[0].port: Service shop/web has no port 81 (NoMatchingParent); its ports: 80",
        ),
        (
            "{name: web, port: 80}",
            "{name: wep, port: 80}",
            "rules[0].backendRefs[0].name: there is no Service shop/wep (BackendNotFound); declare",
        ),
        ("{name: web, port: 80}", "{name: web, port: 81}", "backendRefs[0].port: Service shop/web has no port 81 (Ba"),
    ],
)
def test_a_route_from_or_to_what_is_not_there_is_refused(old, new, expected):
    assert old in ROUTE
    with pytest.raises(ResourceErrors) as caught:
        build(*BASE, ROUTE.replace(old, new))
    assert expected in str(caught.value)


def test_a_route_that_does_nothing_is_told():
    (warning,) = warnings_of(UNBOUND, WORKLOAD, GATEWAY, ROUTE)
    assert "spec.parentRefs[0]: does nothing: Service shop/web is bound to no waypoint" in warning
    (warning,) = warnings_of(SERVICE.replace("name: http,", "name: tcp,"), WORKLOAD, GATEWAY, ROUTE)
    assert "does nothing: port 80 of Service shop/web is not HTTP; write its appProtocol: http" in warning
    assert warnings_of(SERVICE.replace("name: http,", "name: raw,"), WORKLOAD, GATEWAY, ROUTE) == []


def test_a_backend_that_is_not_told_who_calls_is_told_of():
    there = SERVICE.replace("name: web,", "name: db,").replace("240.240.0.1", "240.240.0.2")
    route = ROUTE.replace("{name: web, port: 80}", "{name: db, port: 80}")
    assert warnings_of(*BASE, there, route) == []
    (warning,) = warnings_of(*BASE, there.replace("istio.io/use-waypoint: wp", ""), route)
    assert "spec.rules[0].backendRefs[0]: Service shop/db is not bound to Gateway shop/wp" in warning
    assert "label it istio.io/use-waypoint as the parent is" in warning
    other = GATEWAY.replace("name: wp,", "name: wp2,")
    (warning,) = warnings_of(*BASE, other, there.replace("use-waypoint: wp", "use-waypoint: wp2"), route)
    assert "Service shop/db is not bound to Gateway shop/wp, which" in warning


@pytest.mark.parametrize("backends", ["", "    backendRefs: [{name: web, port: 80, weight: 0}]\n"])
def test_a_rule_that_leads_nowhere_is_told(backends):
    (warning,) = warnings_of(*BASE, ROUTE.replace("    backendRefs: [{name: web, port: 80}]\n", backends))
    assert "spec.rules[0]: has no backendRefs with a weight; its requests are answered 500" in warning


def test_a_rule_that_redirects_needs_no_backend():
    elsewhere = "    filters: [{type: RequestRedirect, requestRedirect: {hostname: example.org}}]\n"
    assert warnings_of(*BASE, ROUTE.replace("    backendRefs: [{name: web, port: 80}]\n", elsewhere)) == []


def test_a_port_is_meant_by_its_name():
    named = ROUTE.replace("name: web}]\n  rules", "name: web, sectionName: http}]\n  rules")
    mesh = build(*BASE, named)
    assert (mesh.routes[0].parents, mesh.warnings) == ((Parent("shop/web", 80),), ())


@pytest.mark.parametrize(
    ("parents", "expected"),
    [
        (
            "sectionName: grpc}",
            "parentRefs[0].sectionName: Service shop/web has no port named grpc (NoMatchingParent); names",
        ),
        ("sectionName: http, port: 81}", "parentRefs[0].sectionName: is port 80 of Service shop/web, and port is 81"),
        (
            "sectionName: http}, {kind: Service, name: web, port: 80}",
            "spec.parentRefs: names one port by its number and its name; remove one",
        ),
        ("sectionName: http}, {kind: Service, name: wep, sectionName: http}", "there is no Service shop/wep"),
    ],
)
def test_a_port_s_name_that_means_none_or_another_is_refused(parents, expected):
    with pytest.raises(ResourceErrors) as caught:
        build(*BASE, ROUTE.replace("name: web}]\n  rules", f"name: web, {parents}]\n  rules"))
    assert expected in str(caught.value)


def test_two_routes_of_one_name_are_refused():
    grpc = ROUTE.replace("HTTPRoute", "GRPCRoute").replace("path: {value: /v2}", "method: {service: a.B}")
    with pytest.raises(ResourceErrors, match="HTTPRoute shop/web has the same name, which routes of a namespace share"):
        build(*BASE, ROUTE, grpc)


def test_a_mirror_that_is_not_there_is_refused():
    mirror = "{type: RequestMirror, requestMirror: {backendRef: {name: wep, port: 80}}}"
    copied = ROUTE.replace("    backendRefs:", f"    filters: [{mirror}]\n    backendRefs:", 1)
    with pytest.raises(ResourceErrors, match=r"rules\[0\]\.filters\.name: there is no Service shop/wep"):
        build(*BASE, copied)


def test_of_two_routes_in_conflict_the_first_by_name_wins():
    other = ROUTE.replace("{name: web, namespace: shop}", "{name: a, namespace: shop}")
    (warning,) = warnings_of(*BASE, ROUTE, other.replace("name: web}]\n  rules", "name: web, port: 80}]\n  rules"))
    assert "PathPrefix /v2 at Service shop/web port 80 is that of HTTPRoute shop/a, spec.rules[0] too, which wins" in (
        warning
    )
    for old, new in [
        ("/v2", "/v3"),
        ("spec:\n", "spec:\n  hostnames: [a.b]\n"),
        ("value: /v2", "value: /v2, type: Exact"),
    ]:
        assert warnings_of(*BASE, ROUTE, other.replace(old, new)) == []


def test_a_rule_in_conflict_with_an_earlier_one_of_its_route_is_told():
    again = ROUTE + "  - matches: [{path: {value: /v2/}}]\n    backendRefs: [{name: web, port: 80}]\n"
    (warning,) = warnings_of(*BASE, again)
    assert "spec.rules[1]: PathPrefix /v2 at Service shop/web port 80 is that of HTTPRoute shop/web" in warning
