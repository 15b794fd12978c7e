"""Gateway API's further cases of HTTPRoute, at a waypoint; each test has its case's name.

Those of Gateways, listeners and TLS have nothing here to be asked of: a waypoint has one listener, and no names.
"""

import time

import pytest

from tests.support.conformance import Suite, filtered, prefix, route, to

V1, V2, V3 = (f"backendRefs: [{to(version)}]" for version in ("v1", "v2", "v3"))


def exact(path: str) -> str:
    return f"[{{path: {{type: Exact, value: {path}}}}}]"


def test_http_route_exact_path_matching(suite: Suite) -> None:
    suite.apply(route(f"{{matches: {exact('/one')}, {V1}}}", f"{{matches: {exact('/two')}, {V2}}}"))
    found = [suite.ask(path).by for path in ("/one", "/two", "/", "/one/example", "/two/", "/Two")]
    assert found == ["v1", "v2", 404, 404, 404, 404]


def test_http_route_path_match_order(suite: Suite) -> None:
    suite.apply(
        route(
            f"{{matches: {prefix('/match/prefix/')}, {V1}}}",
            f"{{matches: {prefix('/match/')}, {V3}}}",
            f"{{matches: {prefix('/match/prefix/one')}, {V2}}}",
            f"{{matches: {exact('/match')}, {V1}}}",
            f"{{matches: {exact('/match/exact')}, {V2}}}",
            f"{{matches: {exact('/match/exact/one')}, {V3}}}",
        )
    )
    for path, wanted in (
        ("/match/exact/one", "v3"),
        ("/match/exact", "v2"),
        ("/match", "v1"),
        ("/match/prefix/one/any", "v2"),
        ("/match/prefix/any", "v1"),
        ("/match/any", "v3"),
    ):
        assert suite.ask(path).by == wanted, path


def test_http_route_matching_across_routes(suite: Suite) -> None:
    suite.apply(
        route(
            f"{{matches: {prefix('/')}, {V1}}}",
            f"{{matches: [{{headers: [{{name: version, value: one}}]}}], {V1}}}",
            name="one",
            hostnames="[example.com, example.net]",
        ),
        route(
            f"{{matches: {prefix('/v2')}, {V2}}}",
            f"{{matches: [{{headers: [{{name: version, value: two}}]}}], {V2}}}",
            name="two",
            hostnames="[example.com]",
        ),
    )
    for host, path, version, wanted in (
        ("example.com", "/", "", "v1"),
        ("example.com", "/example", "", "v1"),
        ("example.net", "/example", "", "v1"),
        ("example.com", "/example", "one", "v1"),
        ("example.com", "/v2", "", "v2"),
        ("example.com", "/v2example", "", "v1"),
        ("example.net", "/v2", "", "v1"),
        ("example.com", "/v2", "one", "v2"),
        ("example.com", "/", "two", "v2"),
    ):
        headers = {"version": version} if version else {}
        assert suite.ask(path, host=host, **headers).by == wanted, (host, path, version)


def test_http_route_header_matching(suite: Suite) -> None:
    def headers(*asked: str) -> str:
        pairs = ", ".join(f"{{name: {name}, value: {value}}}" for name, value in (one.split("=") for one in asked))
        return f"{{headers: [{pairs}]}}"

    suite.apply(
        route(
            f"{{matches: [{headers('version=one')}], {V1}}}",
            f"{{matches: [{headers('version=two')}], {V2}}}",
            f"{{matches: [{headers('version=two', 'color=orange')}], {V1}}}",
            f"{{matches: [{headers('color=blue')}, {headers('color=green')}], {V1}}}",
            f"{{matches: [{headers('color=red')}, {headers('color=yellow')}], {V2}}}",
        )
    )
    for version, color, wanted in (
        ("one", "", "v1"),
        ("two", "", "v2"),
        ("two", "orange", "v1"),
        ("", "orange", 404),
        ("", "blue", "v1"),
        ("", "green", "v1"),
        ("", "red", "v2"),
        ("", "yellow", "v2"),
        ("", "purple", 404),
        ("ONE", "", 404),
    ):
        given = {name: value for name, value in (("version", version), ("color", color)) if value}
        assert suite.ask(**given).by == wanted, given


def test_http_route_method_matching(suite: Suite) -> None:
    suite.apply(
        route(
            f"{{matches: [{{method: POST}}], {V1}}}",
            f"{{matches: [{{method: GET}}], {V2}}}",
            f"{{matches: [{{path: {{value: /path1}}, method: GET}}], {V1}}}",
            f"{{matches: [{{headers: [{{name: version, value: one}}], method: PUT}}], {V2}}}",
            f"{{matches: [{{path: {{value: /path2}}, headers: [{{name: version, value: two}}], method: POST}}], {V2}}}",
            f"{{matches: [{{path: {{value: /path3}}, method: PATCH}}], {V1}}}",
            f"{{matches: [{{path: {{value: /path4}}, headers: [{{name: version, value: three}}]}}], {V1}}}",
            f"{{matches: [{{path: {{value: /path4}}, method: DELETE}}], {V2}}}",
            f"{{matches: [{{path: {{value: /path5}}}}, {{method: PATCH}}], {V1}}}",
        )
    )
    for method, path, version, wanted in (
        ("POST", "/", "", "v1"),
        ("GET", "/", "", "v2"),
        ("HEAD", "/", "", 404),
        ("GET", "/path1", "", "v1"),
        ("PUT", "/", "one", "v2"),
        ("POST", "/path2", "two", "v2"),
        ("PUT", "/", "", 404),
        ("DELETE", "/path2", "two", 404),
        ("PATCH", "/path3", "", "v1"),
        ("DELETE", "/path4", "three", "v2"),
        ("GET", "/path5", "", "v1"),
        ("PATCH", "/x", "", "v1"),
    ):
        headers = {"version": version} if version else {}
        assert suite.ask(path, method, **headers).by == wanted, (method, path, version)


def test_http_route_hostname_intersection(suite: Suite) -> None:
    suite.apply(
        route(f"{{{V1}}}", name="a", hostnames="[very.specific.com]"),
        route(f"{{{V2}}}", name="b", hostnames="['*.wildcard.io']"),
    )
    for host, wanted in (
        ("very.specific.com", "v1"),
        ("very.specific.com:1234", "v1"),
        ("non.matching.com", 404),
        ("foo.specific.com", 404),
        ("foo.wildcard.io", "v2"),
        ("foo.bar.wildcard.io", "v2"),
        ("foo.wildcard.io:1234", "v2"),
        ("wildcard.io", 404),
    ):
        assert suite.ask(host=host).by == wanted, host


@pytest.mark.parametrize(
    ("given", "dialled", "where"),
    [
        ("{hostname: example.org}", 80, "http://example.org/x"),
        ("{port: 80, hostname: example.org}", 80, "http://example.org/x"),
        ("{port: 8080, hostname: example.org}", 80, "http://example.org:8080/x"),
        ("{scheme: https, hostname: example.org}", 80, "https://example.org/x"),
        ("{scheme: https, port: 443, hostname: example.org}", 80, "https://example.org/x"),
        ("{scheme: https, port: 8443, hostname: example.org}", 80, "https://example.org:8443/x"),
        ("{hostname: example.org}", 8080, "http://example.org:8080/x"),
        ("{port: 80, hostname: example.org}", 8080, "http://example.org/x"),
        ("{port: 8080, hostname: example.org}", 8080, "http://example.org:8080/x"),
        ("{scheme: http, hostname: example.org}", 8080, "http://example.org/x"),
        ("{scheme: http, port: 80, hostname: example.org}", 8080, "http://example.org/x"),
        ("{scheme: http, port: 8080, hostname: example.org}", 8080, "http://example.org:8080/x"),
        ("{scheme: https, hostname: example.org}", 8080, "https://example.org/x"),
        ("{scheme: https, port: 443, hostname: example.org}", 8080, "https://example.org/x"),
        ("{scheme: https, port: 8443, hostname: example.org}", 8080, "https://example.org:8443/x"),
    ],
)
def test_http_route_redirect_port_and_scheme(suite: Suite, given: str, dialled: int, where: str) -> None:
    suite.apply(route(filtered("/x", "RequestRedirect", given)))
    answer = suite.ask("/x", port=dialled)
    assert (answer.status, answer.headers["location"]) == (302, where)


def test_http_route_rewrite_host(suite: Suite) -> None:
    modified = (
        "{filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-set, value: s}], "
        "add: [{name: x-add, value: a}]}}, {type: URLRewrite, urlRewrite: {hostname: test.example.org}}], %s}"
    )
    suite.apply(
        route(filtered("/one", "URLRewrite", "{hostname: one.example.org}", to("v1")), name="a"),
        route(modified % V2, name="b", hostnames="[rewrite.example]"),
    )
    assert suite.ask("/one").echoed["host"] == "one.example.org"
    echoed = suite.ask("/one", host="rewrite.example").echoed
    assert (echoed["host"], echoed["path"], echoed["name"]) == ("test.example.org", "/one", "v2")
    assert (echoed["headers"]["x-set"], echoed["headers"]["x-add"]) == ("s", "a")


def test_http_route_backend_url_rewrite(suite: Suite) -> None:
    rewriting = "filters: [{type: URLRewrite, urlRewrite: {hostname: one.example.org, path: %s}}]"
    replaced = "{type: ReplacePrefixMatch, replacePrefixMatch: /new}"
    suite.apply(
        route(
            f"{{matches: {prefix('/old')}, {rewriting % '{type: ReplaceFullPath, replaceFullPath: /rule}'}, "
            f"backendRefs: [{{name: echo-v1, port: 8080, {rewriting % replaced}}}]}}",
        )
    )
    echoed = suite.ask("/old/x?q").echoed
    assert (echoed["host"], echoed["path"]) == ("one.example.org", "/new/x?q")


def test_http_route_backend_request_redirect(suite: Suite) -> None:
    elsewhere = "filters: [{type: RequestRedirect, requestRedirect: {hostname: example.org}}]"
    suite.apply(route(f"{{backendRefs: [{{name: echo-v1, port: 8080, {elsewhere}}}]}}"))
    answer = suite.ask("/x")
    assert (answer.status, answer.headers["location"]) == (302, "http://example.org/x")


def test_http_route_request_header_modifier_backend_weights(suite: Suite) -> None:
    marked = "filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: backend, value: %s}]}}]"
    suite.apply(
        route(
            f"{{backendRefs: [{{name: echo-v1, port: 8080, weight: 5, {marked % 'v1'}}}, "
            f"{{name: echo-v2, port: 8080, weight: 5, {marked % 'v2'}}}]}}"
        )
    )
    found = [suite.ask().echoed for _ in range(40)]
    assert {one["name"] for one in found} == {"v1", "v2"}
    assert all(one["headers"]["backend"] == one["name"] for one in found)


def test_http_route_no_backend_refs(suite: Suite) -> None:
    suite.apply(route(f"{{matches: {prefix('/x')}}}", f"{{{V1}}}"))
    assert [suite.ask(path).by for path in ("/x", "/")] == [500, "v1"]


def test_http_route_timeout_request(suite: Suite) -> None:
    suite.apply(
        route(
            f"{{matches: {prefix('/slow')}, timeouts: {{request: 200ms}}, {V1}}}",
            f"{{matches: {prefix('/any')}, timeouts: {{request: 0s}}, {V1}}}",
        )
    )
    assert suite.ask("/slow", delay_ms="1000").status == 504
    assert suite.ask("/slow").by == "v1"
    assert suite.ask("/any", delay_ms="400").by == "v1"


def test_http_route_timeout_backend_request(suite: Suite) -> None:
    suite.apply(
        route(
            f"{{matches: {prefix('/slow')}, timeouts: {{backendRequest: 200ms}}, {V1}}}",
            f"{{matches: {prefix('/any')}, timeouts: {{backendRequest: 0s}}, {V1}}}",
        )
    )
    assert suite.ask("/slow", delay_ms="1000").status == 504
    assert suite.ask("/any", delay_ms="400").by == "v1"


CORS = {
    "/one": "{allowOrigins: ['https://www.foo.com', 'https://*.bar.com'], allowMethods: [GET, OPTIONS], "
    "allowHeaders: [x-header-1, X-Header-2], exposeHeaders: [x-header-3, x-header-4], maxAge: 3600}",
    "/wildcard": "{allowOrigins: ['*'], allowMethods: ['*'], allowHeaders: ['*'], exposeHeaders: ['*']}",
    "/credentials": "{allowOrigins: ['*'], allowMethods: ['*'], allowHeaders: ['*'], allowCredentials: true}",
    "/ports": "{allowOrigins: ['https://*.foo.com:8443', 'http://*']}",
}


@pytest.mark.parametrize(
    ("path", "origin", "allowed"),
    [
        ("/one", "https://www.foo.com", "https://www.foo.com"),
        ("/one", "https://WWW.foo.com", "https://WWW.foo.com"),
        ("/one", "https://www.bar.com", "https://www.bar.com"),
        ("/one", "https://many.labels.bar.com", "https://many.labels.bar.com"),
        ("/one", "https://bar.com", None),
        ("/one", "http://www.foo.com", None),
        ("/one", "https://www.foo.com:8443", None),
        ("/one", "https://evil.com?.bar.com", None),
        ("/one", "https://evil.com/.bar.com", None),
        ("/one", "https://xbar.com", None),
        ("/one", "null", None),
        ("/wildcard", "https://any.example", "*"),
        ("/wildcard", "https://any.example:8443", "*"),
        ("/credentials", "https://any.example:8443", "https://any.example:8443"),
        ("/ports", "https://a.b.foo.com:8443", "https://a.b.foo.com:8443"),
        ("/ports", "https://a.b.foo.com", None),
        ("/ports", "http://any.example", "http://any.example"),
        ("/ports", "http://any.example:80", None),
    ],
)
def test_http_route_cors_origins(suite: Suite, path: str, origin: str, allowed: str | None) -> None:
    """Alike for what a browser asks beforehand and for the request itself."""
    suite.apply(route(*(filtered(one, "CORS", given, to("v1")) for one, given in CORS.items())))
    asked = suite.ask(path, "OPTIONS", origin=origin, access_control_request_method="GET")
    assert asked.status == 204
    assert not suite.echoes["v1"].seen
    answer = suite.ask(path, origin=origin, answer_access_control_allow_origin="https://forged.example")
    assert answer.by == "v1"
    for one in (asked, answer):
        assert one.headers.get("access-control-allow-origin") == allowed
        assert one.headers["vary"] == "origin"
        wanted = "true" if path == "/credentials" else None
        assert one.headers.get("access-control-allow-credentials") == wanted


def test_http_route_cors(suite: Suite) -> None:
    suite.apply(route(*(filtered(one, "CORS", given, to("v1")) for one, given in CORS.items())))

    def preflight(path: str, origin: str = "https://www.foo.com") -> dict[str, str | None]:
        asked = {"access_control_request_method": "PUT", "access_control_request_headers": "x-header-1, x-other"}
        headers = suite.ask(path, "OPTIONS", origin=origin, **asked).headers
        names = ("allow-methods", "allow-headers", "max-age", "expose-headers")
        return {name: headers.get(f"access-control-{name}") for name in names}

    assert preflight("/one") == {
        "allow-methods": "GET, OPTIONS",
        "allow-headers": "x-header-1, x-header-2",
        "max-age": "3600",
        "expose-headers": None,
    }
    assert set(preflight("/one", "https://other.example").values()) == {None}
    assert preflight("/wildcard") == {
        "allow-methods": "*",
        "allow-headers": "*",
        "max-age": "5",
        "expose-headers": None,
    }
    assert preflight("/credentials") == {
        "allow-methods": "PUT",
        "allow-headers": "x-header-1, x-other",
        "max-age": "5",
        "expose-headers": None,
    }
    assert preflight("/ports", "http://any.example")["allow-methods"] == "GET, HEAD, POST"
    answer = suite.ask("/one", origin="https://www.foo.com", answer_access_control_expose_headers="forged")
    assert answer.headers["access-control-expose-headers"] == "x-header-3, x-header-4"
    assert suite.ask("/wildcard", origin="https://a.example").headers["access-control-expose-headers"] == "*"
    # What is no preflight goes on to the application.
    assert suite.ask("/one", "OPTIONS", origin="https://www.foo.com").echoed["method"] == "OPTIONS"
    # A browser shows its page why it failed.
    suite.apply(route(filtered("/one", "CORS", CORS["/one"])))
    refused = suite.ask("/one", origin="https://www.foo.com")
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (500, "https://www.foo.com")


def test_http_route_named_rule(suite: Suite) -> None:
    suite.apply(
        route(f"{{name: named, matches: {prefix('/named')}, {V1}}}", f"{{matches: {prefix('/unnamed')}, {V2}}}")
    )
    assert [suite.ask(path).by for path in ("/named", "/unnamed")] == ["v1", "v2"]


def copies(suite: Suite, version: str, wanted: int) -> list[dict[str, object]]:
    """The requests that a version got, once there are so many."""
    deadline = time.monotonic() + 10
    while len(suite.echoes[version].seen) < wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return suite.echoes[version].seen


def test_http_route_request_mirror(suite: Suite) -> None:
    mirror = "{backendRef: {name: echo-v2, port: 8080}}"
    suite.apply(
        route(
            filtered("/mirror", "RequestMirror", mirror, to("v1")),
            f"{{matches: {prefix('/mirror-and-modify')}, filters: [{{type: RequestMirror, requestMirror: {mirror}}}, "
            f"{{type: RequestHeaderModifier, requestHeaderModifier: {{set: [{{name: x-set, value: s}}]}}}}], {V1}}}",
        )
    )
    assert suite.ask("/mirror", "POST", body=b"hello").by == "v1"
    (copy,) = copies(suite, "v2", 1)
    assert (copy["method"], copy["path"], copy["body"]) == ("POST", "/mirror", "hello")
    assert suite.ask("/mirror-and-modify").by == "v1"
    assert copies(suite, "v2", 2)[1]["headers"]["x-set"] == "s"  # type: ignore[index]


def test_http_route_request_multiple_mirrors(suite: Suite) -> None:
    mirrors = ", ".join(
        f"{{type: RequestMirror, requestMirror: {{backendRef: {{name: echo-{version}, port: 8080}}}}}}"
        for version in ("v2", "v3")
    )
    suite.apply(route(f"{{filters: [{mirrors}], {V1}}}"))
    assert suite.ask("/many").by == "v1"
    assert [copies(suite, version, 1)[0]["path"] for version in ("v2", "v3")] == ["/many", "/many"]


@pytest.mark.parametrize(
    ("share", "of_500"),
    [("percent: 20", 100), ("fraction: {numerator: 1, denominator: 2}", 250)],
)
def test_http_route_request_percentage_mirror(suite: Suite, share: str, of_500: int) -> None:
    suite.apply(
        route(filtered("/", "RequestMirror", f"{{backendRef: {{name: echo-v2, port: 8080}}, {share}}}", to("v1")))
    )
    for _ in range(10):
        suite.echoes["v2"].seen.clear()
        assert {suite.ask().by for _ in range(500)} == {"v1"}
        found = len(copies(suite, "v2", of_500 - 25))
        if abs(found - of_500) <= 25:
            break
    assert abs(found - of_500) <= 25


def test_a_mirror_that_fails_or_hangs_is_nobody_s_business(suite: Suite) -> None:
    suite.apply(route(filtered("/", "RequestMirror", "{backendRef: {name: echo-v2, port: 8080}}", to("v1"))))
    assert suite.ask(fail_times="1", fail_with="reset").by in ("v1", 503)  # of the two, who comes first fails
    started = time.monotonic()
    assert suite.ask("/slow", delay_ms="300").by == "v1"
    assert suite.ask(body=b"x" * 1_000_000, method="POST").by == "v1"
    assert time.monotonic() - started < 40


RETRY = "retry: {attempts: %d, backoff: 10ms, codes: [%s]}"


def test_http_route_retry(suite: Suite) -> None:
    suite.apply(
        route(
            f"{{matches: {prefix('/three')}, {RETRY % (3, '500')}, {V1}}}",
            f"{{matches: {prefix('/codes')}, {RETRY % (2, '500, 502, 503, 504')}, {V1}}}",
        )
    )

    def status(path: str, times: int, code: int, method: str = "GET", body: bytes = b"") -> int:
        identity = f"{path[1:]}-{times}-{code}-{method}"
        answer = suite.ask(path, method, body=body, fail_times=str(times), fail_with=str(code), x_request_id=identity)
        seen = [one for one in suite.echoes["v1"].seen if one["headers"].get("x-request-id") == identity]
        assert {one["body"] for one in seen} == {body.decode()}
        attempts.append(len(seen))
        return answer.status

    attempts: list[int] = []
    assert [status("/three", times, 500) for times in (2, 3, 4)] == [200, 200, 500]
    assert status("/three", 1, 503) == 503
    assert attempts == [3, 4, 4, 1]
    for code in (500, 502, 503, 504):
        assert [status("/codes", times, code) for times in (1, 3)] == [200, code]
    # What the route names is sent again whatever its method, with its body, if that is not too large to be kept.
    attempts.clear()
    assert status("/three", 2, 500, "POST", b"body") == 200
    assert status("/three", 1, 500, "PUT", b"x" * 70_000) == 500
    assert attempts == [3, 1]


def test_http_route_retry_with_timeouts(suite: Suite) -> None:
    suite.apply(
        route(
            f"{{matches: {prefix('/each')}, timeouts: {{backendRequest: 200ms}}, {RETRY % (2, '500')}, {V1}}}",
            f"{{matches: {prefix('/all')}, timeouts: {{request: 400ms}}, {RETRY % (20 // 2, '500')}, {V1}}}",
        )
    )
    slow = {"delay_ms": "300"}
    assert suite.ask("/each", **slow).status == 504
    assert len(suite.echoes["v1"].seen) == 3
    assert suite.ask("/each", fail_times="2", fail_with="500", x_request_id="each").by == "v1"
    assert suite.ask("/all", fail_times="20", fail_with="500", x_request_id="all", **slow).status == 504
    # A request that would be done twice is not, where nobody knows whether it was done.
    suite.echoes["v1"].seen.clear()
    assert suite.ask("/each", "POST", **slow).status == 504
    assert len(suite.echoes["v1"].seen) == 1


def test_http_route_retry_connection_error(suite: Suite) -> None:
    suite.apply(route(f"{{{RETRY % (3, '503')}, {V1}}}"))
    # A kept connection that is reset is no attempt: its server may have closed it before.
    for times, wanted, attempts in ((2, 200, {3}), (9, 503, {4, 5})):
        suite.echoes["v1"].seen.clear()
        answer = suite.ask(fail_times=str(times), fail_with="reset", x_request_id=f"reset-{times}")
        assert (answer.status, len(suite.echoes["v1"].seen)) in {(wanted, number) for number in attempts}
    suite.echoes["v1"].seen.clear()
    assert suite.ask(method="POST", fail_times="1", fail_with="reset", x_request_id="post").status == 503
    assert len(suite.echoes["v1"].seen) == 1


FAR = """apiVersion: v1
kind: Service
metadata: {name: far, namespace: far}
spec: {clusterIP: 240.240.7.99, ports: [{name: http, port: 80}]}
"""
GRANT = """apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {name: grant, namespace: far}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}]
  to: [{group: "", kind: Service, name: far}]
"""
TO_FAR = "{name: far, namespace: far, port: 80, weight: 1}"


def test_http_route_invalid_cross_namespace_backend_ref(suite: Suite) -> None:
    suite.apply(route(f"{{backendRefs: [{TO_FAR}]}}"), FAR)
    assert suite.ask().status == 500
    assert any("RefNotPermitted" in warning for warning in suite.warnings)


def test_http_route_invalid_non_existent_backend_ref(suite: Suite) -> None:
    suite.apply(route(f"{{backendRefs: [{TO_FAR}]}}"), GRANT)
    assert suite.ask().status == 500
    assert any("there is no Service far/far" in warning for warning in suite.warnings)


def test_http_route_invalid_reference_grant(suite: Suite) -> None:
    for wrong in (("namespace: shop}", "namespace: bank}"), ("HTTPRoute", "GRPCRoute"), ("name: far}]", "name: fat}]")):
        assert wrong[0] in GRANT
        suite.apply(route(f"{{backendRefs: [{TO_FAR}]}}"), FAR, GRANT.replace(*wrong))
        assert suite.ask().status == 500, wrong


def test_http_route_partially_invalid_via_invalid_reference_grant(suite: Suite) -> None:
    suite.apply(
        route(
            f"{{matches: {prefix('/far')}, backendRefs: [{TO_FAR}]}}",
            f"{{matches: {prefix('/both')}, backendRefs: [{TO_FAR}, {to('v2')}]}}",
            f"{{{V1}}}",
        ),
        FAR,
    )
    assert [suite.ask(path).by for path in ("/far", "/")] == [500, "v1"]
    assert {suite.ask("/both").by for _ in range(40)} == {500, "v2"}, "each has its share"


def test_http_route_reference_grant(suite: Suite) -> None:
    """Nobody serves `far`: 503 says that the waypoint would have asked it."""
    suite.apply(route(f"{{backendRefs: [{TO_FAR}]}}"), FAR, GRANT)
    assert suite.ask().status == 503
    suite.apply(route(f"{{backendRefs: [{TO_FAR}]}}"), FAR)
    assert suite.ask().status == 500
