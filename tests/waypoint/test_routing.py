"""Routes against the Gateway API's conformance cases, and against a naive reading of its precedence."""

import random
import re
from collections import Counter
from dataclasses import replace
from urllib.parse import parse_qsl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    RouteRule,
)
from tests.support.examples import examples
from waypoint.request import host_name, read_request
from waypoint.routing import choose_backend, compile_routes, modified

SERVICE = "shop/echo"
EVERY_PORT = Parent(SERVICE, 0)


def match(path="/", *, exact=False, method="", headers=None, query=None):
    kind = PathKind.EXACT if exact else PathKind.PREFIX
    return Match(
        PathMatch(kind, path),
        tuple(HeaderMatch(name, value) for name, value in (headers or {}).items()),
        tuple(QueryMatch(name, value) for name, value in (query or {}).items()),
        method,
    )


def rule(to: str, *matches, name="", weight=1):
    backend = Backend(f"shop/{to}", 8080, weight, NO_MODIFIER, NO_MODIFIER)
    return RouteRule(name, matches or (match(),), NO_MODIFIER, NO_MODIFIER, (backend,), 0, 0)


def http_route(*rules, name="route", hostnames=(), parents=(EVERY_PORT,)):
    return HTTPRoute("shop", name, tuple(parents), tuple(hostnames), tuple(rules))


def ask(routes, target="/", method="GET", host="", port=80, **headers):
    """The name of the service that the request goes to; 404 when no rule matches."""
    fields = [(b"host", host.encode()), *((name.encode(), value.encode()) for name, value in headers.items())]
    found = compile_routes(routes, SERVICE, port).route(read_request(method, target, fields))
    if found is None:
        return 404
    backend = choose_backend(found, random.Random(1))
    return 500 if backend is None else backend.service.removeprefix("shop/")


# Conformance: the names are those of the suite's tests.


def test_mesh_basic():
    assert ask([]) == "echo"
    router = compile_routes([], SERVICE, 8080)
    backend = choose_backend(router.route(read_request("GET", "/any", [])), random.Random(1))
    assert (backend.service, backend.port) == (SERVICE, 8080)


def test_mesh_traffic_split():
    split = http_route(rule("v1", match("/v1", exact=True)), rule("v2", match("/v2", exact=True)))
    assert [ask([split], path) for path in ("/v1", "/v2", "/v3", "/", "/v1/x")] == ["v1", "v2", 404, 404, 404]


def test_mesh_ports():
    on_80 = http_route(rule("v1"), name="a", parents=[Parent(SERVICE, 80)])
    assert [ask([on_80], port=port) for port in (80, 8080)] == ["v1", "echo"]
    on_all = http_route(rule("v2"), name="b")
    assert [ask([on_all], port=port) for port in (80, 8080)] == ["v2", "v2"]
    assert [ask([on_80, on_all], port=port) for port in (80, 8080)] == ["v1", "v2"]
    other = http_route(rule("v3"), parents=[Parent("shop/other", 0), Parent(SERVICE, 8080)])
    assert [ask([other], port=port) for port in (80, 8080)] == ["echo", "v3"]


MATCHING = http_route(
    rule("v1", match("/"), match(headers={"version": "one"})),
    rule("v2", match("/v2"), match(headers={"version": "two"})),
)


@pytest.mark.parametrize(
    ("target", "headers", "wanted"),
    [
        ("/", {}, "v1"),
        ("/example", {}, "v1"),
        ("/", {"version": "one"}, "v1"),
        ("/v2", {}, "v2"),
        ("/v2/", {}, "v2"),
        ("/v2/example", {}, "v2"),
        ("/", {"version": "two"}, "v2"),
        ("/v2example", {}, "v1"),
        ("/foo/v2/example", {}, "v1"),
        ("/x/../v2", {}, "v2"),
        ("//v2", {}, "v2"),
        ("/%762", {}, "v2"),
        ("/v2?version=one", {}, "v2"),
        ("/", {"version": "Two"}, "v1"),
        ("/", {"version": "two,two"}, "v1"),
    ],
)
def test_mesh_http_route_matching(target, headers, wanted):
    assert ask([MATCHING], target, **headers) == wanted


QUERIES = http_route(
    rule("v1", match(query={"animal": "whale"})),
    rule("v2", match(query={"animal": "dolphin"})),
    rule("v1", match("/path1", query={"animal": "whale"})),
    rule("v2", match(headers={"version": "one"}, query={"animal": "whale"})),
    rule("v1", match("/path3", query={"animal": "shark"})),
    rule("v1", match("/path4", headers={"version": "three"}, query={"animal": "kraken"})),
    rule("v1", match("/path5"), match(query={"animal": "hydra"})),
)


@pytest.mark.parametrize(
    ("target", "headers", "wanted"),
    [
        ("/?animal=whale", {}, "v1"),
        ("/?animal=dolphin", {}, "v2"),
        ("/?animal=whale&otherparam=irrelevant", {}, "v1"),
        ("/?x&animal=dolphin", {}, "v2"),
        ("/?color=blue", {}, 404),
        ("/?animal=dog", {}, 404),
        ("/?animal=whaledolphin", {}, 404),
        ("/?animal=whale&animal=dolphin", {}, "v1"),
        ("/?animal=dog&animal=dolphin", {}, 404),
        ("/?Animal=whale", {}, 404),
        ("/?%61nimal=wh%61le", {}, "v1"),
        ("/", {}, 404),
        ("/path1?animal=whale", {}, "v1"),
        ("/?animal=whale", {"version": "one"}, "v2"),
        ("/path3?animal=shark", {}, "v1"),
        ("/path4?animal=kraken", {"version": "three"}, "v1"),
        ("/path4?animal=kraken", {}, 404),
        ("/path4", {"version": "three"}, 404),
        ("/path5?animal=hydra", {}, "v1"),
        ("/path5", {}, "v1"),
    ],
)
def test_mesh_http_route_query_param_matching(target, headers, wanted):
    assert ask([QUERIES], target, **headers) == wanted


def test_http_route_exact_path_matching():
    exact = http_route(rule("v1", match("/one", exact=True)), rule("v2", match("/two", exact=True)))
    found = [ask([exact], path) for path in ("/one", "/two", "/", "/one/example", "/two/", "/Two", "/one?a=b")]
    assert found == ["v1", "v2", 404, 404, 404, 404, "v1"]


def test_http_route_path_match_order():
    ordered = http_route(
        rule("v3", match("/match/exact/one", exact=True)),
        rule("v2", match("/match/exact", exact=True)),
        rule("v1", match("/match", exact=True)),
        rule("v2", match("/match/prefix/one/")),
        rule("v1", match("/match/prefix/")),
        rule("v3", match("/match/")),
    )
    wanted = {
        "/match/exact/one": "v3",
        "/match/exact": "v2",
        "/match": "v1",
        "/match/prefix/one/any": "v2",
        "/match/prefix/any": "v1",
        "/match/any": "v3",
        "/match/prefix/one": "v2",
        "/matching": 404,
    }
    assert {path: ask([ordered], path) for path in wanted} == wanted


def test_http_route_matching_across_routes():
    one = http_route(
        rule("v1", match("/"), match(headers={"version": "one"})),
        name="part1",
        hostnames=["example.com", "example.net"],
    )
    two = http_route(
        rule("v2", match("/v2"), match(headers={"version": "two"})), name="part2", hostnames=["example.com"]
    )
    for routes in ([one, two], [two, one]):
        assert ask(routes, "/", host="example.com") == "v1"
        assert ask(routes, "/example", host="example.com") == "v1"
        assert ask(routes, "/", host="example.net", version="one") == "v1"
        assert ask(routes, "/v2", host="example.com") == "v2"
        assert ask(routes, "/v2", host="example.net") == "v1"
        assert ask(routes, "/", host="example.com", version="two") == "v2"
        assert ask(routes, "/", host="example.net", version="two") == "v1"
        assert ask(routes, "/", host="example.org") == 404
        assert ask(routes, "/") == 404


def test_http_route_header_matching():
    routes = [
        http_route(
            rule("v1", match(headers={"version": "one"})),
            rule("v2", match(headers={"version": "two"})),
            rule("v1", match(headers={"version": "two", "color": "orange"})),
            rule("v2", match(headers={"version": "two", "color": "blue"})),
            rule("v1", match(headers={"color": "blue"}), match(headers={"color": "green"})),
            rule("v2", match(headers={"color": "red"}), match(headers={"color": "yellow"})),
        )
    ]
    assert ask(routes, version="one") == "v1"
    assert ask(routes, version="two") == "v2"
    assert ask(routes, version="two", color="orange") == "v1"
    assert ask(routes, version="two", color="blue") == "v2"
    assert [ask(routes, color=color) for color in ("orange", "blue", "green")] == [404, "v1", "v1"]
    assert [ask(routes, color=color) for color in ("red", "yellow", "purple")] == ["v2", "v2", 404]


def test_http_route_method_matching():
    routes = [
        http_route(
            rule("v1", match(method="POST")),
            rule("v2", match(method="GET")),
            rule("v1", match("/path1", method="GET")),
            rule("v2", match(method="PUT", headers={"version": "one"})),
            rule("v1", match("/path2", method="POST", headers={"version": "two"})),
            rule("v1", match("/path3", method="PATCH"), match("/path4", method="DELETE", headers={"version": "three"})),
            rule("v1", match("/path5")),
            rule("v2", match(method="PATCH")),
            rule("v3", match(headers={"version": "four"})),
        )
    ]
    wanted = {
        ("POST", "/"): "v1",
        ("GET", "/"): "v2",
        ("HEAD", "/"): 404,
        ("get", "/"): 404,
        ("GET", "/path1"): "v1",
        ("PUT", "/"): 404,
        ("PATCH", "/path3"): "v1",
        ("DELETE", "/path4"): 404,
        # precedence: path before method before header
        ("PATCH", "/path5"): "v1",
    }
    assert {key: ask(routes, key[1], key[0]) for key in wanted} == wanted
    assert ask(routes, "/", "PUT", version="one") == "v2"
    assert ask(routes, "/path2", "POST", version="two") == "v1"
    assert ask(routes, "/path4", "DELETE", version="three") == "v1"
    assert ask(routes, "/", "PATCH", version="four") == "v2"
    assert ask(routes, "/", "HEAD", version="four") == "v3"


def test_http_route_hostname_intersection():
    routes = [
        http_route(rule("v1", match("/s1")), name="a", hostnames=["*.wildcard.io"]),
        http_route(rule("v2", match("/s1")), name="b", hostnames=["very.specific.com"]),
        http_route(rule("v3", match("/s1")), name="c", hostnames=["*.anotherwildcard.io", "foo.wildcard.io"]),
    ]
    for host, wanted in {
        "bar.wildcard.io": "v1",
        "foo.bar.wildcard.io": "v1",
        "wildcard.io": 404,
        "foo.wildcard.io": "v3",
        "very.specific.com": "v2",
        "Very.Specific.COM.": "v2",
        "very.specific.com:1234": "v2",
        "non.matching.com": 404,
        "xwildcard.io": 404,
    }.items():
        assert ask(routes, "/s1", host=host) == wanted, host


def test_a_whole_hostname_goes_before_a_wildcard_of_the_same_length():
    routes = [
        http_route(rule("v1"), name="a", hostnames=["*.shop.io"]),
        http_route(rule("v2"), name="b", hostnames=["x.shop.io"]),
    ]
    assert [ask(routes, host=host) for host in ("x.shop.io", "y.shop.io")] == ["v2", "v1"]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_tie_goes_to_the_first_name_then_the_first_rule(reverse):
    routes = [http_route(rule("v1"), rule("v2"), name="a"), http_route(rule("v3"), name="b")]
    assert ask(routes[::-1] if reverse else routes) == "v1"


# Weights


def test_http_route_weight():
    weighted = RouteRule(
        "",
        (match(),),
        NO_MODIFIER,
        NO_MODIFIER,
        tuple(Backend(f"shop/{n}", 80, w, NO_MODIFIER, NO_MODIFIER) for n, w in (("a", 70), ("b", 30), ("c", 0))),
        0,
        0,
    )
    rng = random.Random(4)
    drawn = Counter(choose_backend(weighted, rng).service for _ in range(5000))
    assert drawn["shop/a"] == pytest.approx(3500, abs=150)
    assert drawn["shop/b"] == pytest.approx(1500, abs=150)
    assert set(drawn) == {"shop/a", "shop/b"}


@pytest.mark.parametrize("weights", [(), (0,), (0, 0)])
def test_http_route_no_backend_refs(weights):
    backends = tuple(Backend("shop/a", 80, weight, NO_MODIFIER, NO_MODIFIER) for weight in weights)
    empty = RouteRule("", (match(),), NO_MODIFIER, NO_MODIFIER, backends, 0, 0)
    assert choose_backend(empty, random.Random(1)) is None


# Header modifiers

FIELDS = [(b"host", b"echo"), (b"x-header-set", b"a"), (b"x-header-add", b"b"), (b"x-header-remove", b"c")]


@pytest.mark.parametrize(
    ("modifier", "changed"),
    [
        (NO_MODIFIER, {}),
        (HeaderModifier(set=(("x-header-set", "new"),)), {b"x-header-set": b"new"}),
        (HeaderModifier(set=(("x-new", "new"),)), {b"x-new": b"new"}),
        (HeaderModifier(add=(("x-header-add", "new"),)), {b"x-header-add": b"b,new"}),
        (HeaderModifier(add=(("x-new", "1"), ("x-new", "2"))), {b"x-new": b"1,2"}),
        (HeaderModifier(remove=("x-header-remove", "absent")), {b"x-header-remove": None}),
        (
            HeaderModifier(set=(("x-header-set", "new"),), add=(("x-header-add", "new"),), remove=("x-header-remove",)),
            {b"x-header-set": b"new", b"x-header-add": b"b,new", b"x-header-remove": None},
        ),
        (
            HeaderModifier(set=(("x-a", "1"),), add=(("x-a", "2"), ("x-header-set", "b"))),
            {b"x-a": b"1,2", b"x-header-set": b"a,b"},
        ),
        (
            HeaderModifier(set=(("x-header-set", "1"),), add=(("x-b", "2"),), remove=("x-header-set", "x-b")),
            {b"x-header-set": None},
        ),
    ],
)
def test_http_route_request_header_modifier(modifier, changed):
    found = modified(FIELDS, modifier)
    assert len(dict(found)) == len(found)
    wanted = dict(FIELDS) | changed
    assert dict(found) == {name: value for name, value in wanted.items() if value is not None}


def test_set_replaces_every_line_of_a_field():
    lines = [(b"x-a", b"1"), (b"b", b""), (b"x-a", b"2")]
    assert modified(lines, HeaderModifier(set=(("x-a", "3"),))) == [(b"b", b""), (b"x-a", b"3")]


def test_add_goes_behind_the_last_line():
    lines = [(b"x-a", b"1"), (b"x-a", b"2"), (b"b", b"")]
    assert modified(lines, HeaderModifier(add=(("x-a", "3"),))) == [(b"x-a", b"1"), (b"x-a", b"2,3"), (b"b", b"")]
    assert lines[1] == (b"x-a", b"2")  # what was given stays as it is


def test_cookies_are_not_joined():
    lines = [(b"set-cookie", b"a=1; Expires=Wed, 21 Oct 2026 07:28:00 GMT")]
    assert modified(lines, HeaderModifier(add=(("set-cookie", "b=2"),))) == [*lines, (b"set-cookie", b"b=2")]


def test_modifiers_come_one_after_the_other():
    outer = HeaderModifier(set=(("x-a", "1"),))
    inner = HeaderModifier(add=(("x-a", "2"),))
    assert modified([], outer, inner) == [(b"x-a", b"1,2")]
    assert modified([], inner, outer) == [(b"x-a", b"1")]


# The documentation, read literally: https://gateway-api.sigs.k8s.io/reference/spec/

paths = st.sampled_from(["/", "/a", "/a/", "/a/b", "/ab", "/b"])
asked_values = st.sampled_from([("1", False), ("2", False), ("1|2", True), (".*2", True)])
header_matches = st.builds(lambda name, value: HeaderMatch(name, *value), st.sampled_from(["x", "y"]), asked_values)
query_matches = st.builds(lambda name, value: QueryMatch(name, *value), st.sampled_from("pq"), asked_values)
expressions = st.sampled_from(["/.*", "/v[0-9](/.*)?", ".*x", "/(v1|v2)"])
path_matches = st.one_of(
    st.builds(PathMatch, st.sampled_from([PathKind.EXACT, PathKind.PREFIX]), paths),
    st.builds(PathMatch, st.just(PathKind.EXPRESSION), expressions),
)
matches = st.builds(
    Match,
    path_matches,
    st.lists(header_matches, max_size=2, unique_by=lambda asked: asked.name).map(tuple),
    st.lists(query_matches, max_size=2, unique_by=lambda asked: asked.name).map(tuple),
    st.sampled_from(["", "", "GET", "PUT"]),
)
rules = st.lists(st.lists(matches, min_size=1, max_size=2).map(tuple), max_size=3)
hostnames = st.sampled_from(["shop.io", "a.shop.io", "*.shop.io", "*.io", "*.a.shop.io"])


@st.composite
def some_routes(draw):
    count = draw(st.integers(1, 3))
    names = draw(st.permutations(["a", "b", "c"]))[:count]
    return [
        HTTPRoute(
            "shop",
            name,
            (Parent(SERVICE, draw(st.sampled_from([0, 80, 81]))),),
            tuple(draw(st.lists(hostnames, max_size=2, unique=True))),
            tuple(
                RouteRule(f"{name}{number}", asked, NO_MODIFIER, NO_MODIFIER, (), 0, 0)
                for number, asked in enumerate(draw(rules))
            ),
        )
        for name in names
    ]  # fmt: skip


requests = st.builds(
    lambda method, path, query, host, headers: read_request(
        method, path + query, [(b"host", host.encode()), *((k.encode(), v.encode()) for k, v in headers)]
    ),
    st.sampled_from(["GET", "PUT", "HEAD"]),
    paths,
    st.sampled_from(["", "?", "?p=1", "?q=2&p=1", "?p=2&p=1", "?q=1"]),
    st.sampled_from(["", "shop.io", "a.shop.io:80", "b.a.shop.io", "IO", "x.io"]),
    st.lists(st.tuples(st.sampled_from("xy"), st.sampled_from("12")), max_size=3),
)


def naive_route(routes, request, port):
    """Every match of every rule, then the order of the documentation, criterion after criterion."""
    attached = [r for r in routes if any(p.port in (0, port) for p in r.parents)]
    found = [
        (host, m, route, number, place)
        for route in attached
        for number, one in enumerate(route.rules)
        for place, m in enumerate(one.matches)
        for host in (route.hostnames or [""])
        if naive_host(host, request) and naive_match(m, request)
    ]
    for criterion in (
        # "precedence must be given to rules from the HTTPRoute with the largest number of:
        # * Characters in a matching non-wildcard hostname.
        lambda f: 0 if f[0].startswith("*") else len(f[0]),
        # * Characters in a matching hostname."
        lambda f: len(f[0]),
        # "* "Exact" path match.
        lambda f: f[1].path.kind is PathKind.EXACT,
        # * "Prefix" path match with largest number of characters.
        lambda f: f[1].path.kind is PathKind.PREFIX,
        lambda f: len(f[1].path.value.rstrip("/")) if f[1].path.kind is PathKind.PREFIX else 0,
        # Where expressions stand is left to the implementation; so it is in Istio.
        lambda f: len(f[1].path.value) if f[1].path.kind is PathKind.EXPRESSION else 0,
        # * Method match.
        lambda f: f[1].method != "",
        # * Largest number of header matches.
        lambda f: len(f[1].headers),
        # * Largest number of query param matches."
        lambda f: len(f[1].query),
        # "* The Route appearing first in alphabetical order by "{namespace}/{name}"."
        lambda f: -ord(f[2].name),
        # "matching precedence MUST be granted to the FIRST matching rule (in list order)"
        lambda f: -f[3],
        lambda f: -f[4],
    ):
        best = max(map(criterion, found), default=None)
        found = [f for f in found if criterion(f) == best]
    return replace(found[0][2].rules[found[0][3]], matches=(found[0][1],)) if found else None


def naive_host(hostname, request):
    name = host_name(request.host)
    if hostname.startswith("*."):
        labels, suffix = name.split("."), hostname.split(".")[1:]
        return len(labels) > len(suffix) and labels[-len(suffix) :] == suffix
    return hostname in ("", name)


def naive_match(asked, request):
    # "based on a URL path prefix split by `/`. ... on a path element by element basis"; "a trailing `/` is ignored"
    if asked.path.kind is PathKind.EXACT:
        path = request.path == asked.path.value
    elif asked.path.kind is PathKind.EXPRESSION:
        path = re.fullmatch(asked.path.value, request.path) is not None
    else:
        wanted = [element for element in asked.path.value.split("/") if element]
        path = [element for element in request.path.split("/") if element][: len(wanted)] == wanted
    joined: dict[str, str] = {}
    for name, value in request.fields:
        text = name.decode()
        joined[text] = f"{joined[text]},{value.decode()}" if text in joined else value.decode()
    parameters: dict[str, str] = {}
    for name, value in parse_qsl(request.query.removeprefix("?"), keep_blank_values=True):
        parameters.setdefault(name, value)
    return (
        path
        and asked.method in ("", request.method)
        and all(naive_value(h, joined) for h in asked.headers)
        and all(naive_value(q, parameters) for q in asked.query)
    )


def naive_value(asked, values):
    value = values.get(asked.name)
    if value is None or not asked.expression:
        return value == asked.value
    return re.fullmatch(asked.value, value) is not None


def test_of_a_thousand_rules_few_are_asked(monkeypatch):
    asked = []
    monkeypatch.setattr("waypoint.request.Request.header", lambda _, name: asked.append(name))
    many = http_route(*(rule(f"v{n}", match(f"/v{n}", headers={"version": "one"})) for n in range(1000)))
    router = compile_routes([many], SERVICE, 80)
    assert router.route(read_request("GET", "/v777/x", [])) is None
    assert asked == ["version"]


def test_a_host_of_a_thousand_labels_is_not_taken_apart():
    route = http_route(rule("v1"), hostnames=["*.shop.io"])
    assert ask([route], host="a." * 100 + "shop.io") == "v1"
    assert ask([route], host="a." * 1000 + "shop.io") == 404


@settings(max_examples=examples(200))
@given(some_routes(), requests, st.sampled_from([80, 81]), st.randoms(use_true_random=False))
def test_routing_agrees_with_the_documentation(routes, request, port, rng):
    shuffled = routes[:]
    rng.shuffle(shuffled)
    found = compile_routes(shuffled, SERVICE, port).route(request)
    if any(parent.port in (0, port) for one in routes for parent in one.parents):
        assert found == naive_route(routes, request, port)
    else:
        assert found.backends[0].service == SERVICE
