"""ReferenceGrant: which routes may send to Services of another namespace."""

import pytest

from control.api import resources
from control.api.declared import DeclaredGrant
from control.api.filters import Mirror
from control.api.mesh import Mesh
from control.api.problems import ResourceErrors
from tests.support.desired import gateway, grant, route, service, together

ABROAD = route("web", "web", ["web"]).replace("[{name: web, port: 80}]", "[{name: ape, namespace: zoo, port: 80}]")
BASE = (service("web"), service("ape", namespace="zoo"))


def build(*texts):
    return Mesh.build(resources.parse(together(*BASE, *texts), "f.yaml"), "cluster.local")


def backend(*texts):
    (found,) = build(*texts).routes
    return found.rules[0].backends[0]


def test_a_grant():
    (found,) = resources.parse(grant("g", "ape", "zoo"), "f.yaml")
    assert found == DeclaredGrant("zoo", "g", (("HTTPRoute", "shop"),), ("ape",), found.position)
    (every,) = resources.parse(grant("g", "ape", "zoo").replace(", name: ape", ""), "f.yaml")
    assert every.services == ()


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ((), True),
        ((grant("g", "ape", "zoo"),), False),
        ((grant("g", "ape", "zoo").replace(", name: ape", ""),), False),
        ((grant("g", "bee", "zoo"),), True),
        ((grant("g", "ape", "shop"),), True),
        ((grant("g", "ape", "zoo", routes="bank"),), True),
        ((grant("g", "ape", "zoo").replace("HTTPRoute", "GRPCRoute"),), True),
        ((grant("g", "bee", "zoo"), grant("h", "ape", "zoo")), False),
    ],
)
def test_only_what_a_grant_names_is_sent_to_another_namespace(given, refused):
    found = backend(ABROAD, *given)
    assert (found.service, found.refused) == ("zoo/ape", refused)


def test_a_mirror_of_another_namespace_needs_a_grant_too():
    mirror = "filters: [{type: RequestMirror, requestMirror: {backendRef: {name: ape, namespace: zoo, port: 80}}}], "
    copied = route("web", "web", ["web"]).replace("backendRefs:", mirror + "backendRefs:")
    without = build(copied)
    assert without.routes[0].rules[0].filters.mirrors == ()
    assert any("its copies go nowhere (RefNotPermitted)" in warning.problem for warning in without.warnings)
    granted = build(copied, grant("g", "ape", "zoo"))
    assert granted.routes[0].rules[0].filters.mirrors == (Mirror("zoo/ape", 80, 100, 100),)


def test_what_is_not_there_in_another_namespace_is_a_warning():
    mesh = build(ABROAD.replace("name: ape", "name: bee"), grant("g", "bee", "zoo"))
    assert any("there is no Service zoo/bee" in warning.problem for warning in mesh.warnings)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("kind: HTTPRoute", "kind: Gateway", "from[0].kind: Gateway is refused: nobody here refers to another"),
        ("group: gateway.networking.k8s.io", "group: ''", "from[0].group: '' must be gateway.networking.k8s.io"),
        (", namespace: shop}", "}", "from[0].namespace: is missing; it must be the namespace of the routes"),
        ("kind: Service", "kind: Secret", "to[0].kind: Secret is refused"),
        ("name: ape", "name: Ape", "to[0].name: 'Ape' must be"),
        ("  to: [{group: '', kind: Service, name: ape}]\n", "", "spec.to: is missing; it must be a list such as"),
    ],
)
def test_each_bad_grant_is_refused_with_its_mend(old, new, expected):
    text = grant("g", "ape", "zoo")
    assert old in text
    with pytest.raises(ResourceErrors) as caught:
        resources.parse(text.replace(old, new), "f.yaml")
    assert expected in str(caught.value)


def test_the_gateway_of_a_namespace_is_no_reason_to_send_there():
    assert backend(ABROAD, gateway("wp", namespace="zoo")).refused
