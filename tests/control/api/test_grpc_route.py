"""GRPCRoute, from YAML: a method of gRPC is a path."""

import pytest

from control.api.declared import DeclaredRoute, place_of
from control.api.problems import ResourceErrors
from control.api.resources import parse
from control.api.route import HeaderMatch, Match, PathKind, PathMatch

ROUTE = """\
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: echo, namespace: shop}
spec:
  parentRefs: [{kind: Service, name: echo, port: 80}]
  hostnames: [echo.example]
  rules:
  - name: first
    matches: [MATCH]
    filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: X-C, value: c}]}}]
    backendRefs: [{name: echo, port: 80, weight: 3}]
  - backendRefs: [{name: echo, port: 80}]
"""


def route_of(match):
    (found,) = parse(ROUTE.replace("MATCH", match), "f.yaml")
    assert isinstance(found, DeclaredRoute)
    assert place_of(found) == ("GRPCRoute", "shop", "echo")
    return found.route


@pytest.mark.parametrize(
    ("text", "kind", "path"),
    [
        ("{service: pkg.v1.Echo, method: Say}", PathKind.EXACT, "/pkg.v1.Echo/Say"),
        ("{type: Exact, service: pkg.Echo}", PathKind.PREFIX, "/pkg.Echo"),
        ("{method: Say}", PathKind.EXPRESSION, "/[^/]+/Say"),
        ("{type: RegularExpression, service: 'a|b'}", PathKind.EXPRESSION, "/(?:a|b)/[^/]+"),
        ("{type: RegularExpression, service: .*, method: S.*}", PathKind.EXPRESSION, "/(?:.*)/(?:S.*)"),
    ],
)
def test_a_method_is_a_path(text, kind, path):
    first, second = route_of(f"{{method: {text}, headers: [{{name: Version, value: two}}]}}").rules
    assert first.matches == (Match(PathMatch(kind, path), (HeaderMatch("version", "two"),), (), ""),)
    assert (first.name, first.backends[0].weight, first.response.add) == ("first", 3, (("x-c", "c"),))
    assert second.matches == (Match(PathMatch(PathKind.PREFIX, "/"), (), (), ""),)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("MATCH", "{method: {}}", "rules[0].matches[0].method: asks for nothing; write service or method"),
        ("MATCH", "{method: {service: a/b}}", "method.service: 'a/b' is no name of gRPC's"),
        ("MATCH", "{method: {type: RegularExpression, method: '('}}", "method.method: '(': a group has no ')'"),
        ("MATCH", "{path: {value: /}}", "matches[0].path: unknown field"),
        ("name: first", "timeouts: {request: 1s}", "rules[0].timeouts: unknown field"),
        ("name: first", "sessionPersistence: {}", "rules[0].sessionPersistence: is refused"),
        ("type: ResponseHeaderModifier", "type: URLRewrite", "type: URLRewrite is refused: URLRewrite is none of the"),
    ],
)
def test_each_bad_route_is_refused_with_its_mend(old, new, expected):
    assert old in ROUTE
    with pytest.raises(ResourceErrors) as caught:
        parse(ROUTE.replace(old, new).replace("MATCH", "{}"), "f.yaml")
    assert expected in str(caught.value)
