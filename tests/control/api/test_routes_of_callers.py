"""Routes that callers declare in their own namespace, of Services of another one."""

import pytest

from control.api import resources
from control.api.declared import DeclaredRoute
from control.api.mesh import Elsewhere, Mesh
from control.api.problems import ResourceErrors
from control.api.route import Parent
from tests.support.desired import route, service, together

TO_ZOO = route("r", "ape", ["web"]).replace("name: ape}]", "name: ape, namespace: zoo}]")


def build(*texts, elsewhere=None):
    return Mesh.build(resources.parse(together(*texts), "f.yaml"), "cluster.local", elsewhere=elsewhere or Elsewhere())


def declared(text):
    (found,) = resources.parse(text, "f.yaml")
    assert isinstance(found, DeclaredRoute)
    return found


def test_it_is_published_where_its_parents_are():
    (found,) = build(service("web"), service("ape", namespace="zoo"), TO_ZOO).routes
    assert (found.key, found.callers, found.parents) == ("zoo/shop.r", "shop", (Parent("zoo/ape", 0),))
    assert found.rules[0].backends[0].service == "shop/web"


def test_each_namespace_publishes_its_own_parents():
    both = TO_ZOO.replace("parentRefs: [", "parentRefs: [{kind: Service, name: web}, ")
    found = build(service("web"), service("ape", namespace="zoo"), both).routes
    assert [(one.key, one.callers, one.parents) for one in found] == [
        ("shop/r", "", (Parent("shop/web", 0),)),
        ("zoo/shop.r", "shop", (Parent("zoo/ape", 0),)),
    ]


def test_a_namespace_that_is_built_alone():
    there = Elsewhere(routes=[declared(TO_ZOO)])
    assert [one.key for one in build(service("ape", namespace="zoo"), elsewhere=there).routes] == ["zoo/shop.r"]
    assert build(service("bee", namespace="zoo"), elsewhere=there).routes == ()
    assert build(service("web"), TO_ZOO).routes == ()


def test_a_port_is_meant_by_its_name_and_none_by_one_that_there_is_not():
    def parents(section):
        named = TO_ZOO.replace("namespace: zoo}]", f"namespace: zoo, sectionName: {section}}}]")
        found = build(service("ape", namespace="zoo"), elsewhere=Elsewhere(routes=[declared(named)])).routes
        return [one.parents for one in found]

    assert parents("http") == [(Parent("zoo/ape", 80),)]
    assert parents("grpc") == []


def test_what_callers_ask_for_anyway_needs_no_grant():
    straight = TO_ZOO.replace("{name: web, port: 80}", "{name: ape, namespace: zoo, port: 80}")
    (found,) = build(service("ape", namespace="zoo"), straight).routes
    assert not found.rules[0].backends[0].refused
    aside = straight.replace("{name: ape, namespace: zoo, port: 80}", "{name: bee, namespace: zoo, port: 80}")
    (found,) = build(service("ape", namespace="zoo"), service("bee", namespace="zoo"), aside).routes
    assert found.rules[0].backends[0].refused


def test_two_routes_of_one_name_there_are_refused():
    own = route("shop.r", "ape", ["ape"], namespace="zoo")
    with pytest.raises(ResourceErrors, match=r"metadata.name: is shop\.r where its Service is, which is a route there"):
        build(service("web"), service("ape", namespace="zoo"), own, TO_ZOO)
