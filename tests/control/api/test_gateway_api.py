"""Gateways and HTTPRoutes from YAML: every field read, everything that a waypoint does not do refused by name."""

from __future__ import annotations

import pytest

from control.api.declared import DeclaredGateway, DeclaredRoute
from control.api.gateway import Traffic
from control.api.problems import ResourceErrors
from control.api.resources import parse
from control.api.route import (
    NO_MODIFIER,
    Backend,
    HeaderMatch,
    HeaderModifier,
    HTTPRoute,
    Match,
    Parent,
    PathKind,
    PathMatch,
    QueryMatch,
    Retry,
    RouteRule,
)

GATEWAY = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: wp, namespace: shop, labels: {istio.io/waypoint-for: all}}
spec:
  gatewayClassName: istio-waypoint
  listeners:
  - {name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: Same}}}
"""
ROUTE = """\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: reviews, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: reviews, namespace: shop, port: 80}, {kind: Service, name: ratings}]
  hostnames: [reviews.example, '*.example']
  rules:
  - name: canary
    matches:
    - path: {type: Exact, value: /v2/%7ea}
      headers: [{type: Exact, name: X-User, value: tester}]
      queryParams: [{type: Exact, name: beta, value: "1"}]
      method: GET
    - path: {value: /v3/}
    filters:
    - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-A, value: a}], remove: [X-B]}}
    - {type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: X-C, value: c d}]}}
    timeouts: {request: 1m30s, backendRequest: 500ms}
    backendRefs:
    - group: ""
      kind: Service
      name: reviews-v2
      port: 8080
      weight: 0
      filters: [{type: RequestHeaderModifier, requestHeaderModifier: {add: [{name: x-d, value: d}]}}]
    - {name: reviews, port: 80}
  - backendRefs: [{name: reviews, port: 80}]
"""


def errors_of(text):
    with pytest.raises(ResourceErrors) as caught:
        parse(text, "f.yaml")
    return [str(error).removeprefix("f.yaml:") for error in caught.value.errors]


def replaced(text, old, new):
    assert old in text
    return text.replace(old, new)


def test_a_gateway():
    (found,) = parse(GATEWAY, "f.yaml")
    assert found == DeclaredGateway("shop", "wp", Traffic.ALL, None, found.position)


@pytest.mark.parametrize(
    ("old", "new", "traffic", "admits"),
    [
        (", labels: {istio.io/waypoint-for: all}", "", Traffic.SERVICE, None),
        ("for: all", "for: none", Traffic.NONE, None),
        (", allowedRoutes: {namespaces: {from: Same}}", "", Traffic.ALL, None),
        ("from: Same", "from: All", Traffic.ALL, {}),
        ("from: Same", "from: Selector, selector: {matchLabels: {a: b}}", Traffic.ALL, {"a": "b"}),
    ],
)
def test_what_a_gateway_takes_and_admits(old, new, traffic, admits):
    (found,) = parse(replaced(GATEWAY, old, new), "f.yaml")
    assert (found.traffic, found.admits) == (traffic, admits)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "for: all",
            "for: everything",
            "3: metadata.labels['istio.io/waypoint-for']: 'everything' must be one of serv",
        ),
        ("istio-waypoint", "istio", "5: spec.gatewayClassName: 'istio' must be istio-waypoint"),
        ("  gatewayClassName: istio-waypoint\n", "", "spec.gatewayClassName: is missing; it must be istio-waypoint"),
        ("name: mesh, ", "", "listeners[0].name: is missing"),
        ("15008", "443", "listeners[0].port: must be 15008, where callers reach a waypoint"),
        ("port: 15008, ", "", "listeners[0].port: is missing; it must be 15008"),
        ("HBONE", "HTTPS", "listeners[0].protocol: HTTPS is refused: a waypoint takes mesh traffic only; write HBONE"),
        ("protocol: HBONE, ", "", "listeners[0].protocol: is missing; it must be HBONE"),
        ("HBONE,", "HBONE, hostname: a.b,", "listeners[0].hostname: is refused: a waypoint takes connections by addr"),
        ("HBONE,", "HBONE, tls: {},", "listeners[0].tls: is refused: tunnels are always mTLS"),
        ("from: Same", "from: Sane", "namespaces.from: 'Sane' must be Same or All or Selector"),
        ("from: Same", "from: None", "namespaces.from: None is refused: write Same"),
        ("from: Same", "from: Selector", "namespaces.selector: is missing; it must be a mapping with matchLabels"),
        ("from: Same", "from: Selector, selector: {matchLabels: {}}", "selector.matchLabels: names no label"),
        ("from: Same", "from: Selector, selector: {matchExpressions: []}", "matchExpressions: is refused: only match"),
        ("from: Same", "from: All, selector: {matchLabels: {a: b}}", "selector: stands beside `from: Selector` only"),
        ("{namespaces: {from: Same}}", "{kinds: []}", "allowedRoutes.kinds: is refused: it is not implemented"),
        ("spec:\n", "spec:\n  addresses: []\n", "spec.addresses: is refused: callers find a waypoint by its WorkloadE"),
        (
            "spec:\n",
            "spec:\n  infrastructure: {}\n",
            "spec.infrastructure: is refused: it is not implemented; remove it",
        ),
        ("{name: mesh, ", "{nam: mesh, ", "listeners[0].nam: unknown field; known here: allowedRoutes, name, port"),
        ("v1\n", "v1beta1\n", "apiVersion: 'gateway.networking.k8s.io/v1beta1' must be gateway.networking.k8s.io/v1"),
        ("all}", "all, istio.io/use-waypoint: a}", "use-waypoint']: is refused: only a Service, WorkloadEntry or Nam"),
    ],
)
def test_each_bad_gateway_is_refused_with_its_mend(old, new, expected):
    found = errors_of(replaced(GATEWAY, old, new))
    assert [error for error in found if expected in error], found


def test_a_gateway_has_one_listener():
    more = GATEWAY + "  - {name: more, port: 15008, protocol: HBONE}\n"
    assert "spec.listeners: has several; a waypoint has one" in errors_of(more)[0]
    assert "spec.listeners: is missing" in errors_of(GATEWAY.split("  listeners")[0])[0]


def test_a_route():
    (found,) = parse(ROUTE, "f.yaml")
    assert isinstance(found, DeclaredRoute)
    anything = Match(PathMatch(PathKind.PREFIX, "/"), (), (), "")
    reviews = Backend("shop/reviews", 80, 1, NO_MODIFIER, NO_MODIFIER)
    assert found.route == HTTPRoute(
        namespace="shop",
        name="reviews",
        parents=(Parent("shop/reviews", 80), Parent("shop/ratings", 0)),
        hostnames=("reviews.example", "*.example"),
        rules=(
            RouteRule(
                name="canary",
                matches=(
                    Match(
                        path=PathMatch(PathKind.EXACT, "/v2/~a"),
                        headers=(HeaderMatch("x-user", "tester"),),
                        query=(QueryMatch("beta", "1"),),
                        method="GET",
                    ),
                    Match(PathMatch(PathKind.PREFIX, "/v3"), (), (), ""),
                ),
                request=HeaderModifier(set=(("x-a", "a"),), remove=("x-b",)),
                response=HeaderModifier(add=(("x-c", "c d"),)),
                backends=(
                    Backend("shop/reviews-v2", 8080, 0, HeaderModifier(add=(("x-d", "d"),)), NO_MODIFIER),
                    reviews,
                ),
                timeout_ms=90_000,
                backend_timeout_ms=500,
            ),
            RouteRule("", (anything,), NO_MODIFIER, NO_MODIFIER, (reviews,), 0, 0),
        ),
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{}", Retry((), 2, 25)),
        ("{codes: [503, 500], attempts: 3, backoff: 1s}", Retry((500, 503), 3, 1000)),
        ("{backoff: 0s}", Retry((), 2, 0)),
    ],
)
def test_a_retry(text, wanted):
    (found,) = parse(replaced(ROUTE, LAST, f"{LAST}    retry: {text}\n"), "f.yaml")
    assert found.route.rules[1].retry == wanted


def test_matches_by_expression():
    asked = (
        "path: {type: RegularExpression, value: '/v[0-9]+'}\n      "
        "headers: [{type: RegularExpression, name: A, value: 'x.*'}]\n      "
        "queryParams: [{type: RegularExpression, name: b, value: '1|2'}]"
    )
    (found,) = parse(replaced(ROUTE, MATCH, asked), "f.yaml")
    assert found.route.rules[0].matches[1] == Match(
        PathMatch(PathKind.EXPRESSION, "/v[0-9]+"),
        (HeaderMatch("a", "x.*", True),),
        (QueryMatch("b", "1|2", True),),
        "",
    )


@pytest.mark.parametrize(("text", "ms"), [("0s", 0), ("24h", 86_400_000), ("1h1m1s1ms", 3_661_001), ("10ms", 10)])
def test_timeouts(text, ms):
    (found,) = parse(replaced(ROUTE, "request: 1m30s, backendRequest: 500ms", f"request: {text}"), "f.yaml")
    assert found.route.rules[0].timeout_ms == ms


MATCH = "path: {value: /v3/}"
LAST = "  - backendRefs: [{name: reviews, port: 80}]\n"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "{kind: Service, name: ratings}",
            "{kind: Gateway, name: wp}",
            "kind: Gateway is refused: there is no ingress",
        ),
        ("{kind: Service, name: ratings}", "{name: ratings}", "parentRefs[1].kind: is missing; it must be Service"),
        ("{kind: Service, name: ratings}", "{kind: Service}", "parentRefs[1].name: is missing; it must be the name of"),
        ("name: ratings", "name: ratings, group: apps", "parentRefs[1].group: 'apps' must be '' for a Service"),
        ("name: ratings", "name: ratings, namespace: Bank", "parentRefs[1].namespace: 'Bank' must be 1-63"),
        ("name: ratings", "name: ratings, sectionName: 'a b'", "parentRefs[1].sectionName: 'a b' must be 1-"),
        ("name: ratings", "name: reviews, port: 80", "spec.parentRefs: names Service shop/reviews twice; remove one"),
        ("'*.example'", "'*.*'", "hostnames[1]: '*' must be 1-253"),
        ("'*.example'", "10.0.0.1", "hostnames[1]: '10.0.0.1' is an address; write a host name"),
        ("'*.example'", "reviews.example", "spec.hostnames: names a host twice; remove one"),
        (MATCH, "path: {type: RegularExpression, value: '/(a'}", "path.value: '/(a': a group has no ')'"),
        (MATCH, "path: {type: Suffix, value: '/a'}", "path.type: 'Suffix' must be Exact or PathPrefix or RegularExpr"),
        (MATCH, "path: {value: v3}", "path.value: 'v3' must begin with '/'"),
        (MATCH, "path: {value: /a//b}", "path.value: '/a//b' has an empty element, '//'; write one '/'"),
        (MATCH, "path: {value: '/a?b'}", "path.value: '/a?b' is no path of up to 1024 characters"),
        (MATCH, "path: {value: /a%2fb}", "path.value: '/a%2fb' has %2F; requests with it are refused"),
        (MATCH, "path: {value: /./a}", "path.value: '/./a' has the segment '.'"),
        (MATCH, "method: get", "method: 'get' must be GET or HEAD"),
        (MATCH, "headers: [{name: a b, value: x}]", "headers[0].name: 'a b' is no header's name"),
        (MATCH, "headers: [{name: a}]", "headers[0].value: is missing; it must be text to compare with"),
        (MATCH, "headers: [{name: a, value: x}, {name: A, value: y}]", "matches[1].headers: names 'a' twice"),
        (
            MATCH,
            "headers: [{type: RegularExpression, name: a, value: '*'}]",
            "headers[0].value: '*': '*' repeats nothing",
        ),
        (MATCH, "queryParams: [{name: a b, value: x}]", "queryParams[0].name: 'a b' is no name of a query parameter"),
        (MATCH, "queryParams: [{name: a, value: x}, {name: a, value: y}]", "queryParams: names 'a' twice"),
        (
            "type: ResponseHeaderModifier, response",
            "type: RequestHeaderModifier, request",
            "stands twice here; make th",
        ),
        (
            "type: ResponseHeaderModifier, response",
            "type: ExtensionRef, response",
            "type: ExtensionRef is refused: it is n",
        ),
        (
            "type: ResponseHeaderModifier, response",
            "response",
            "filters[1].type: is missing; it must be RequestHeaderM",
        ),
        ("type: ResponseHeaderModifier, response", "type: RequestHeaderModifier, response", "belongs to type Response"),
        (
            "{set: [{name: X-A, value: a}], remove: [X-B]}",
            "{}",
            "requestHeaderModifier: names no header; write set, ad",
        ),
        ("remove: [X-B]", "remove: [x-a]", "requestHeaderModifier: names 'x-a' twice"),
        ("remove: [X-B]", "remove: [Host]", "remove[0]: 'host' is the waypoint's own to write"),
        ("name: X-A", "name: X-Uproxy-Caller", "set[0].name: 'x-uproxy-caller' is the waypoint's own to write"),
        ("value: c d", "value: 'c\t'", "add[0].value: 'c\\t' is no header's value"),
        ("1m30s", "90", "timeouts.request: must be text, not the number 90"),
        ("1m30s", "1.5s", "timeouts.request: '1.5s' is no duration, such as 500ms, 10s or 1m30s"),
        ("1m30s", "25h", "timeouts.request: '25h' is longer than a day"),
        ("1m30s", "100ms", "timeouts.backendRequest: is longer than request, which ends it anyway"),
        ("name: reviews-v2", "name: Reviews", "backendRefs[0].name: 'Reviews' must be 1-63"),
        ("weight: 0", "weight: 1000001", "backendRefs[0].weight: 1000001 is out of range: 0 to 1000000"),
        ("weight: 0", "wait: 0", "backendRefs[0].wait: unknown field"),
        ("- {name: reviews, port: 80}", "- {name: reviews}", "backendRefs[1].port: is missing; it must be a port of"),
        (
            "- {name: reviews, port: 80}",
            "- {name: reviews, port: 80, namespace: Bank}",
            "backendRefs[1].namespace: 'Bank' must be 1-63",
        ),
        (
            LAST,
            f"{LAST}    retry: {{codes: [399]}}\n",
            "retry.codes[0]: must be a number from 400 to 599, not the number",
        ),
        (LAST, f"{LAST}    retry: {{codes: [500, 500]}}\n", "retry.codes: names '500' twice"),
        (LAST, f"{LAST}    retry: {{attempts: 11}}\n", "retry.attempts: 11 is out of range: 1 to 10"),
        (LAST, f"{LAST}    retry: {{backoff: 1}}\n", "retry.backoff: must be text, not the number 1"),
        (LAST, f"{LAST}    sessionPersistence: {{}}\n", "rules[1].sessionPersistence: is refused"),
        (LAST, f"{LAST}    name: canary\n", "spec.rules: gives two rules one name; rename one"),
    ],
)
def test_each_bad_route_is_refused_with_its_mend(old, new, expected):
    found = errors_of(replaced(ROUTE, old, new))
    assert [error for error in found if expected in error], found


@pytest.mark.parametrize("field", ["parentRefs", "rules"])
def test_a_route_without_parents_or_rules_is_refused(field):
    head, _, spec = ROUTE.partition("spec:\n")
    kept = [line for line in spec.splitlines() if line.startswith("  parentRefs")] if field == "rules" else []
    text = head + "spec:\n" + ("\n".join(kept) if kept else "  rules: [{backendRefs: [{name: a, port: 1}]}]") + "\n"
    (error,) = errors_of(text)
    assert f"spec.{field}: is missing; it must be a list such as" in error
