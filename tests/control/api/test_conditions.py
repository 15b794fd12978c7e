"""What became of a route: the reasons are Gateway API's."""

import dataclasses

import pytest

from control.api.conditions import statuses_of
from control.api.filters import Filters, Mirror
from control.api.gateway import Binding, Via
from control.api.route import NO_MODIFIER, Backend, HTTPRoute, Match, Parent, PathKind, PathMatch, RouteRule
from control.api.workload import Service, ServicePort

EVERYTHING = Match(PathMatch(PathKind.PREFIX, "/"), (), (), "")
BACKEND = Backend("shop/v1", 80, 1, NO_MODIFIER, NO_MODIFIER)
RULE = RouteRule("", (EVERYTHING,), NO_MODIFIER, NO_MODIFIER, (BACKEND,), 0, 0)
ROUTE = HTTPRoute("shop", "web", (Parent("shop/web", 80), Parent("shop/v1", 0)), (), (RULE,))
SERVICES = {
    key: Service("shop", key[5:], (), (ServicePort("http", 80, 80, ""),), {}, (), binding)
    for key, binding in (("shop/web", Binding("shop/wp", Via.WAYPOINT)), ("shop/v1", None))
}


def found(route, without=""):
    known = {key: service for key, service in SERVICES.items() if key != without}
    return [
        [(condition.type, condition.status, condition.reason) for condition in parent.conditions]
        for parent in statuses_of(route, known.get)
    ]


def test_what_holds_together():
    fine = [("Accepted", True, "Accepted"), ("ResolvedRefs", True, "ResolvedRefs")]
    assert found(ROUTE) == [
        [*fine, ("mesh.uproxy.dev/Enforced", True, "WaypointBound")],
        [*fine, ("mesh.uproxy.dev/Enforced", False, "NoWaypoint")],
    ]


def with_rule(**changes):
    return dataclasses.replace(ROUTE, rules=(RULE, dataclasses.replace(RULE, **changes)))


@pytest.mark.parametrize(
    ("route", "without", "accepted", "resolved"),
    [
        (ROUTE, "shop/web", "NoMatchingParent", "ResolvedRefs"),
        (ROUTE, "shop/v1", "Accepted", "BackendNotFound"),
        (dataclasses.replace(ROUTE, parents=(Parent("shop/web", 81),)), "", "NoMatchingParent", "ResolvedRefs"),
        (with_rule(backends=(dataclasses.replace(BACKEND, port=81),)), "", "Accepted", "BackendNotFound"),
        (with_rule(backends=(dataclasses.replace(BACKEND, refused=True),)), "", "Accepted", "RefNotPermitted"),
        (with_rule(filters=Filters(mirrors=(Mirror("far/x", 80, 1, 1),))), "", "Accepted", "BackendNotFound"),
    ],
)
def test_the_reasons(route, without, accepted, resolved):
    first = found(route, without)[0]
    assert [reason for _, _, reason in first[:2]] == [accepted, resolved]
    assert [status for _, status, _ in first[:2]] == [accepted == "Accepted", resolved == "ResolvedRefs"]
