"""Gateway API's mesh cases of HTTPRoute, from YAML to what a client sees; each test has its case's name."""

from collections import Counter

import pytest

from tests.support.conformance import Suite, filtered, prefix, route, to

V1, V2 = f"backendRefs: [{to('v1')}]", f"backendRefs: [{to('v2')}]"


def test_mesh_basic(suite: Suite) -> None:
    assert suite.ask().by == "v1"
    assert suite.ask(to="echo-v2").by == "v2"


def test_mesh_traffic_split(suite: Suite) -> None:
    suite.apply(
        route(
            f"{{matches: [{{path: {{type: Exact, value: /v1}}}}], {V1}}}",
            f"{{matches: [{{path: {{type: Exact, value: /v2}}}}], {V2}}}",
        )
    )
    assert [suite.ask(path).by for path in ("/v1", "/v2", "/v3")] == ["v1", "v2", 404]


def test_mesh_http_route_simple_same_namespace(suite: Suite) -> None:
    suite.apply(route(f"{{{V1}}}"))
    assert suite.ask().by == "v1"


def test_mesh_http_route_named_rule(suite: Suite) -> None:
    suite.apply(
        route(f"{{name: first, matches: {prefix('/')}, {V1}}}", f"{{name: other, matches: {prefix('/v2')}, {V2}}}")
    )
    for path, by, rule in (("/", "v1", "first"), ("/v2", "v2", "other")):
        assert suite.ask(path, x_request_id=rule).by == by
        assert suite.record_of(rule).route == rule


def test_mesh_ports(suite: Suite) -> None:
    marked = "filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-set, value: %s}]}}]"
    suite.apply(
        route(f"{{{marked % 'one'}, {V1}}}", name="a", parents="[{kind: Service, name: echo-v1, port: 80}]"),
        route(f"{{{marked % 'all'}, {V2}}}", name="b", parents="[{kind: Service, name: echo-v2}]"),
    )
    found = [
        suite.ask(to=name, port=port).headers.get("x-set") for name in ("echo-v1", "echo-v2") for port in (80, 8080)
    ]
    assert found == ["one", None, "all", "all"]


def test_mesh_frontend_hostname(suite: Suite) -> None:
    suite.apply(route(f"{{{V2}}}", parents="[{kind: Service, name: echo-v1}]"))
    assert suite.ask(to="echo-v1", host="anybody.example").by == "v2"
    assert suite.ask(to="echo-v3", host="echo-v1").by == "v3"


def test_mesh_http_route_matching(suite: Suite) -> None:
    suite.apply(
        route(
            f"{{matches: [{{path: {{value: /}}}}, {{headers: [{{name: version, value: one}}]}}], {V1}}}",
            f"{{matches: [{{path: {{value: /v2}}}}, {{headers: [{{name: version, value: two}}]}}], {V2}}}",
        )
    )
    for path, version, wanted in (
        ("/", "", "v1"),
        ("/example", "", "v1"),
        ("/", "one", "v1"),
        ("/v2", "", "v2"),
        ("/v2/", "", "v2"),
        ("/v2/example", "", "v2"),
        ("/", "two", "v2"),
        ("/v2example", "", "v1"),
        ("/foo/v2/example", "", "v1"),
    ):
        headers = {"version": version} if version else {}
        assert suite.ask(path, **headers).by == wanted, (path, version)


def test_mesh_http_route_query_param_matching(suite: Suite) -> None:
    def asked(name: str, value: str) -> str:
        return f"queryParams: [{{name: {name}, value: {value}}}]"

    suite.apply(
        route(
            f"{{matches: [{{{asked('animal', 'whale')}}}], {V1}}}",
            f"{{matches: [{{{asked('animal', 'dolphin')}}}], {V2}}}",
            f"{{matches: [{{path: {{value: /path1}}, {asked('animal', 'whale')}}}], {V1}}}",
            f"{{matches: [{{headers: [{{name: version, value: one}}], {asked('animal', 'whale')}}}], {V2}}}",
            f"{{matches: [{{path: {{value: /path3}}, {asked('animal', 'shark')}}}], {V1}}}",
            f"{{matches: [{{path: {{value: /path4}}, headers: [{{name: version, value: three}}], "
            f"{asked('animal', 'kraken')}}}], {V1}}}",
            f"{{matches: [{{path: {{value: /path5}}}}, {{{asked('animal', 'hydra')}}}], {V1}}}",
        )
    )
    for path, version, wanted in (
        ("/?animal=whale", "", "v1"),
        ("/?animal=dolphin", "", "v2"),
        ("/?animal=dolphin&color=blue", "", "v2"),
        ("/?color=blue", "", 404),
        ("/?animal=dog", "", 404),
        ("/?animal=whaledolphin", "", 404),
        ("/", "", 404),
        ("/path1?animal=whale", "", "v1"),
        ("/?animal=whale", "one", "v2"),
        ("/path3?animal=shark", "", "v1"),
        ("/path4?animal=kraken", "three", "v1"),
        ("/path3", "", 404),
        ("/path4?animal=kraken", "", 404),
        ("/path4", "three", 404),
        ("/path5?animal=hydra", "", "v1"),
        ("/path5", "", "v1"),
        ("/?animal=hydra", "", "v1"),
    ):
        headers = {"version": version} if version else {}
        assert suite.ask(path, **headers).by == wanted, (path, version)


MODIFIERS = {
    "/set": "{set: [{name: X-Header-Set, value: set-overwrites-values}]}",
    "/add": "{add: [{name: X-Header-Add, value: add-appends-values}]}",
    "/remove": "{remove: [X-Header-Remove]}",
    "/multiple": "{set: [{name: X-Set-1, value: s1}, {name: X-Set-2, value: s2}], "
    "add: [{name: X-Add-1, value: a1}, {name: X-Add-2, value: a2}], remove: [X-Remove-1, X-Remove-2]}",
    "/case-insensitivity": "{set: [{name: X-HEADER-SET, value: set}], add: [{name: x-Header-add, value: add}], "
    "remove: [x-HEADER-remove]}",
}
"""Path -> what its rule makes of headers."""
MODIFIED = (
    ("/set", {}, {"x-header-set": "set-overwrites-values"}),
    ("/set", {"X-Header-Set": "x"}, {"x-header-set": "set-overwrites-values"}),
    ("/add", {}, {"x-header-add": "add-appends-values"}),
    ("/add", {"X-Header-Add": "x"}, {"x-header-add": "x,add-appends-values"}),
    ("/remove", {"X-Header-Remove": "x"}, {"x-header-remove": None}),
    (
        "/multiple",
        {"X-Set-2": "x", "X-Add-2": "x", "X-Remove-2": "x", "Another": "y"},
        {"x-set-1": "s1", "x-set-2": "s2", "x-add-1": "a1", "x-add-2": "x,a2", "x-remove-2": None, "another": "y"},
    ),
    (
        "/case-insensitivity",
        {"x-header-set": "x", "x-header-add": "x", "x-header-remove": "x", "Another": "y"},
        {"x-header-set": "set", "x-header-add": "x,add", "x-header-remove": None, "another": "y"},
    ),
)
"""Path, headers of the message, and what comes of them."""


def test_mesh_http_route_request_header_modifier(suite: Suite) -> None:
    suite.apply(route(*(filtered(path, "RequestHeaderModifier", given, to("v1")) for path, given in MODIFIERS.items())))
    for path, given, wanted in MODIFIED:
        arrived = suite.ask(path, **{name.replace("-", "_"): value for name, value in given.items()}).echoed["headers"]
        assert {name: arrived.get(name) for name in wanted} == wanted, path


def test_mesh_http_route_backend_request_header_modifier(suite: Suite) -> None:
    modifier = "{type: RequestHeaderModifier, requestHeaderModifier: %s}"
    backend = f"backendRefs: [{{name: echo-v1, port: 8080, filters: [{modifier}]}}]"
    suite.apply(route(*(f"{{matches: {prefix(path)}, {backend % given}}}" for path, given in MODIFIERS.items())))
    for path, given, wanted in MODIFIED:
        arrived = suite.ask(path, **{name.replace("-", "_"): value for name, value in given.items()}).echoed["headers"]
        assert {name: arrived.get(name) for name in wanted} == wanted, path


def test_http_route_response_header_modifier(suite: Suite) -> None:
    suite.apply(
        route(*(filtered(path, "ResponseHeaderModifier", given, to("v1")) for path, given in MODIFIERS.items()))
    )
    for path, given, wanted in MODIFIED:
        told = {f"answer_{name.lower().replace('-', '_')}": value for name, value in given.items()}
        headers = suite.ask(path, **told).headers
        assert {name: headers.get(name) for name in wanted} == wanted, path


def redirected(suite: Suite, cases: dict[str, tuple[str, int, str]]) -> None:
    """Path of a request -> what its rule says, and the status and location that it gets."""
    suite.apply(route(*(filtered(path, "RequestRedirect", given) for path, (given, _, _) in cases.items())))
    for path, (_, status, where) in cases.items():
        answer = suite.ask(path + "?q=1")
        assert (answer.status, answer.headers["location"]) == (status, where + "?q=1"), path
    assert not any(echo.seen for echo in suite.echoes.values())


def test_mesh_http_route_redirect_host_and_status(suite: Suite) -> None:
    redirected(
        suite,
        {
            "/hostname-redirect": ("{hostname: example.org}", 302, "http://example.org/hostname-redirect"),
            "/host-and-status": (
                "{hostname: example.org, statusCode: 301}",
                301,
                "http://example.org/host-and-status",
            ),
        },
    )


def test_mesh_http_route_redirect_path(suite: Suite) -> None:
    replaced = "path: {type: ReplacePrefixMatch, replacePrefixMatch: /replacement-prefix}"
    whole = "path: {type: ReplaceFullPath, replaceFullPath: /full-path-replacement}"
    rules = {
        "/original-prefix": f"{{{replaced}}}",
        "/full": f"{{{whole}}}",
        "/path-and-host": f"{{hostname: example.org, {replaced}}}",
        "/path-and-status": f"{{statusCode: 301, {replaced}}}",
        "/full-path-and-host": f"{{hostname: example.org, {whole}}}",
        "/full-path-and-status": f"{{statusCode: 301, {whole}}}",
    }
    suite.apply(route(*(filtered(path, "RequestRedirect", given) for path, given in rules.items())))
    for path, status, where in (
        ("/original-prefix/lemon", 302, "http://echo/replacement-prefix/lemon"),
        ("/original-prefix", 302, "http://echo/replacement-prefix"),
        ("/full/path/original", 302, "http://echo/full-path-replacement"),
        ("/path-and-host/lemon", 302, "http://example.org/replacement-prefix/lemon"),
        ("/path-and-status/lemon", 301, "http://echo/replacement-prefix/lemon"),
        ("/full-path-and-host/x", 302, "http://example.org/full-path-replacement"),
        ("/full-path-and-status/x", 301, "http://echo/full-path-replacement"),
    ):
        answer = suite.ask(path)
        assert (answer.status, answer.headers["location"]) == (status, where), path


def test_mesh_http_route_redirect_port(suite: Suite) -> None:
    redirected(
        suite,
        {
            "/port": ("{port: 8083}", 302, "http://echo:8083/port"),
            "/port-and-host": ("{port: 8083, hostname: example.org}", 302, "http://example.org:8083/port-and-host"),
            "/port-and-status": ("{port: 8083, statusCode: 301}", 301, "http://echo:8083/port-and-status"),
            "/port-host-status": (
                "{port: 8083, hostname: example.org, statusCode: 301}",
                301,
                "http://example.org:8083/port-host-status",
            ),
        },
    )


def test_mesh_http_route_scheme_redirect(suite: Suite) -> None:
    redirected(
        suite,
        {
            "/scheme": ("{scheme: https}", 302, "https://echo/scheme"),
            "/scheme-and-host": ("{scheme: https, hostname: example.org}", 302, "https://example.org/scheme-and-host"),
            "/scheme-and-status": ("{scheme: https, statusCode: 301}", 301, "https://echo/scheme-and-status"),
            "/all": ("{scheme: https, hostname: example.org, statusCode: 301}", 301, "https://example.org/all"),
        },
    )


@pytest.mark.parametrize("status", [303, 307, 308])
def test_mesh_http_route_303_307_308_redirect(suite: Suite, status: int) -> None:
    redirected(suite, {"/x": (f"{{statusCode: {status}, hostname: example.org}}", status, "http://example.org/x")})


def test_mesh_http_route_rewrite_path(suite: Suite) -> None:
    def change(kind: str, value: str) -> str:
        field = kind[0].lower() + kind[1:]
        return f"{{path: {{type: {kind}, {field}: {value}}}}}"

    modified = (
        "{matches: %s, filters: [{type: URLRewrite, urlRewrite: %s}, {type: RequestHeaderModifier, "
        "requestHeaderModifier: {set: [{name: x-set, value: s}]}}], backendRefs: [%s]}"
    )
    suite.apply(
        route(
            filtered("/prefix/one", "URLRewrite", change("ReplacePrefixMatch", "/one"), to("v1")),
            filtered("/strip-prefix", "URLRewrite", change("ReplacePrefixMatch", "/"), to("v1")),
            filtered("/empty-prefix", "URLRewrite", change("ReplacePrefixMatch", "''"), to("v1")),
            filtered("/", "URLRewrite", change("ReplacePrefixMatch", "/root"), to("v1")),
            filtered("/full/one", "URLRewrite", change("ReplaceFullPath", "/one"), to("v1")),
            modified % (prefix("/full/rewrite"), change("ReplaceFullPath", "/test"), to("v1")),
            modified % (prefix("/prefix/rewrite"), change("ReplacePrefixMatch", "/prefix"), to("v1")),
        )
    )
    for path, wanted in (
        ("/prefix/one/two", "/one/two"),
        ("/any/thing", "/root/any/thing"),
        ("/prefix/one", "/one"),
        ("/prefix/one/", "/one/"),
        ("/strip-prefix/three", "/three"),
        ("/strip-prefix", "/"),
        ("/strip-prefix/", "/"),
        ("/empty-prefix/three?q=/strip-prefix", "/three?q=/strip-prefix"),
        ("/empty-prefix", "/"),
        ("/full/one/two", "/one"),
        ("/full/one/two?q=1", "/one?q=1"),
    ):
        assert suite.ask(path).echoed["path"] == wanted, path
    for path, wanted in (("/full/rewrite/x", "/test"), ("/prefix/rewrite/x", "/prefix/x")):
        echoed = suite.ask(path, x_set="before").echoed
        assert (echoed["path"], echoed["headers"]["x-set"]) == (wanted, "s")


def test_mesh_http_route_weight(suite: Suite) -> None:
    suite.apply(route(f"{{backendRefs: [{to('v1', 70)}, {to('v2', 30)}, {to('v3', 0)}]}}"))
    for _ in range(10):
        found = Counter(suite.ask().by for _ in range(500))
        if abs(found["v1"] - 350) <= 25:
            break
    assert abs(found["v1"] - 350) <= 25
    assert found["v3"] == 0


def test_mesh_ports_by_section_name(suite: Suite) -> None:
    suite.apply(route(f"{{{V2}}}", parents="[{kind: Service, name: echo, sectionName: http-alt}]"))
    assert [suite.ask(port=port).by for port in (80, 8080, 8083)] == ["v1", "v2", "v1"]


def test_mesh_consumer_route(suite: Suite) -> None:
    def told(name: str, value: str) -> str:
        setting = f"{{set: [{{name: {name}, value: {value}}}]}}"
        return f"filters: [{{type: ResponseHeaderModifier, responseHeaderModifier: {setting}}}]"

    producers = route(f"{{{told('x-by', 'producer')}, {V1}}}", parents="[{kind: Service, name: echo-v1}]")
    to_v1 = "backendRefs: [{name: echo-v1, namespace: shop, port: 80}]"
    consumers = route(
        f"{{matches: {prefix('/mine')}, {told('x-by', 'consumer')}, {to_v1}}}",
        parents="[{kind: Service, name: echo-v1, namespace: shop, port: 80}]",
        namespace="consumer",
    )

    def asked(path: str, port: int = 80) -> list[tuple[str | int, str | None]]:
        answers = [suite.ask(path, to="echo-v1", port=port, caller=caller) for caller in (None, suite.consumer)]
        return [(answer.by, answer.headers.get("x-by")) for answer in answers]

    suite.apply(producers)
    assert asked("/mine") == [("v1", "producer")] * 2
    suite.apply(producers, consumers)
    assert asked("/mine") == [("v1", "producer"), ("v1", "consumer")]
    assert asked("/other") == [("v1", "producer"), (404, None)], "it stands instead of the others, for its namespace"
    assert asked("/mine", port=8080) == [("v1", "producer")] * 2
    suite.apply(consumers)
    assert asked("/mine") == [("v1", None), ("v1", "consumer")]
