"""Filters of routes, from YAML."""

import pytest

from control.api.filters import Cors, Filters, Mirror, PathChange, Redirect, Replaced, Rewrite
from control.api.problems import ResourceErrors
from control.api.resources import parse

ROUTE = """\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{kind: Service, name: web}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /a}}]
    filters: [FILTER]
    BACKENDS
"""
BACKENDS = "backendRefs: [{name: web, port: 80}]"


def rule_of(text, backends=BACKENDS):
    (found,) = parse(ROUTE.replace("FILTER", text).replace("BACKENDS", backends), "f.yaml")
    return found.route.rules[0]


def redirect(content):
    return f"{{type: RequestRedirect, requestRedirect: {content}}}"


def rewrite(content):
    return f"{{type: URLRewrite, urlRewrite: {content}}}"


def mirror(content):
    return f"{{type: RequestMirror, requestMirror: {content}}}"


def cors(content):
    return f"{{type: CORS, cors: {content}}}"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (redirect("{hostname: example.org}"), Redirect(hostname="example.org")),
        (
            redirect("{scheme: http, port: 84, statusCode: 308, path: {type: ReplaceFullPath, replaceFullPath: /%7e}}"),
            Redirect("http", "", PathChange(Replaced.ALL, "/~"), 84, 308),
        ),
        (
            redirect("{path: {type: ReplacePrefixMatch, replacePrefixMatch: /b/}}"),
            Redirect(path=PathChange(Replaced.PREFIX, "/b")),
        ),
    ],
)  # fmt: skip
def test_a_redirect(text, wanted):
    assert rule_of(text, "").filters == Filters(redirect=wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (rewrite("{hostname: example.org}"), Rewrite("example.org")),
        (
            rewrite("{path: {type: ReplacePrefixMatch, replacePrefixMatch: ''}}"),
            Rewrite(path=PathChange(Replaced.PREFIX, "")),
        ),
    ],
)
def test_a_rewrite(text, wanted):
    assert rule_of(text).filters == Filters(rewrite=wanted)
    of_backend = rule_of(
        "{type: CORS, cors: {allowOrigins: ['*']}}", f"backendRefs: [{{name: web, port: 80, filters: [{text}]}}]"
    )
    assert of_backend.backends[0].filters == Filters(rewrite=wanted)


def test_cors():
    text = (
        "{allowOrigins: ['HTTPS://A.example', 'http://*.b.example:8080'], allowMethods: [GET], allowHeaders: [X-A], "
        "exposeHeaders: ['*'], allowCredentials: true, maxAge: 60}"
    )
    assert rule_of(cors(text)).filters.cors == Cors(
        ("https://a.example", "http://*.b.example:8080"), ("GET",), ("x-a",), ("*",), True, 60
    )
    assert rule_of(cors("{allowOrigins: ['*']}")).filters.cors == Cors(("*",), (), (), (), False, 5)


@pytest.mark.parametrize(
    ("share", "wanted"),
    [
        ("", (100, 100)),
        (", percent: 0", (0, 100)),
        (", fraction: {numerator: 5}", (5, 100)),
        (", fraction: {numerator: 1, denominator: 3}", (1, 3)),
    ],
)
def test_mirrors(share, wanted):
    text = mirror(f"{{backendRef: {{name: copy, port: 81}}{share}}}")
    found = rule_of(f"{text}, {text}")
    assert found.filters == Filters(mirrors=(Mirror("shop/copy", 81, *wanted),) * 2)
    assert [one.service for one in found.destinations] == ["shop/web", "shop/copy", "shop/copy"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (mirror("{}"), "requestMirror.backendRef: is missing; it must be a mapping with name and port"),
        (mirror("{backendRef: {name: copy}}"), "backendRef.port: is missing; it must be a port of the Service"),
        (mirror("{backendRef: {name: copy, port: 81, kind: ServiceImport}}"), "kind: ServiceImport is refused"),
        (mirror("{backendRef: {name: copy, port: 81, weight: 1}}"), "backendRef.weight: unknown field"),
        (mirror("{backendRef: {name: copy, port: 81}, percent: 101}"), "percent: 101 is out of range"),
        (mirror("{backendRef: {name: a, port: 1}, percent: 1, fraction: {numerator: 1}}"), "stands beside percent"),
        (mirror("{backendRef: {name: a, port: 1}, fraction: {numerator: 101}}"), "101 of 100 is more than all"),
        (", ".join([mirror("{backendRef: {name: a, port: 1}}")] * 5), "has 5 of RequestMirror; at most 4 are taken"),
        (redirect("{statusCode: 304}"), "requestRedirect.statusCode: 304 must be 301 or 302 or"),
        (redirect("{scheme: ftp}"), "requestRedirect.scheme: 'ftp' must be http or https"),
        (redirect("{port: 0}"), "requestRedirect.port: 0 is out of range"),
        (redirect("{hostname: '*.example'}"), "requestRedirect.hostname: a pattern is no host name"),
        (redirect("{hostname: 10.0.0.1}"), "requestRedirect.hostname: '10.0.0.1' is an address"),
        (redirect("{path: {type: ReplaceFullPath}}"), "path.replaceFullPath: is missing; it must be a path"),
        (redirect("{path: {replaceFullPath: /a}}"), "path.type: is missing; it must be ReplaceFullPath or"),
        (
            redirect("{path: {type: ReplaceFullPath, replaceFullPath: /a, replacePrefixMatch: /b}}"),
            "path.replacePrefixMatch: unknown field",
        ),
        (redirect("{path: {type: ReplaceFullPath, replaceFullPath: a}}"), "replaceFullPath: 'a' must begin with '/'"),
        (redirect("{path: {type: ReplaceFullPath, replaceFullPath: //a}}"), "'//a' has an empty element"),
        (redirect("{path: {type: ReplaceFullPath, replaceFullPath: /../a}}"), "has the segment '..'"),
        (redirect("{hostname: a.example}"), "backendRefs: stands beside RequestRedirect, which sends requests to no"),
        (f"{redirect('{}')}, {rewrite('{hostname: a.b}')}", "filters: has RequestRedirect and URLRewrite"),
        (rewrite("{}"), "urlRewrite: changes nothing; write hostname or path"),
        (f"{rewrite('{hostname: a.b}')}, {rewrite('{hostname: a.c}')}", "filters[1].type: URLRewrite stands twice"),
        (cors("{allowMethods: [GET]}"), "cors.allowOrigins: is missing; it must be a list such as"),
        (cors("{allowOrigins: [a.example]}"), "allowOrigins[0]: 'a.example' is no origin, such as https://"),
        (cors("{allowOrigins: ['https://a.example/']}"), "is no origin, such as https://"),
        (cors("{allowOrigins: ['https://a.*.example']}"), "is no origin, such as https://"),
        (cors("{allowOrigins: ['https://a.example:70000']}"), "is no origin, such as https://"),
        (cors("{allowOrigins: ['*', 'https://a.example']}"), "allowOrigins: has others beside '*'"),
        (cors("{allowOrigins: ['https://a.b', 'https://A.b']}"), "allowOrigins: names 'https://a.b' twice"),
        (cors("{allowOrigins: ['*'], allowMethods: [get]}"), "allowMethods[0]: 'get' must be GET or"),
        (cors("{allowOrigins: ['*'], allowHeaders: ['a b']}"), "allowHeaders[0]: 'a b' is no header's name"),
        (cors("{allowOrigins: ['*'], maxAge: 0}"), "maxAge: 0 is out of range"),
        (cors(f"{{allowOrigins: [{', '.join(f'http://a{n}.b' for n in range(65))}]}}"), "has 65 entries; at most 64"),
        ("{type: ExtensionRef, extensionRef: {}}", "type: ExtensionRef is refused: it is not implemented"),
        ("{type: ExternalAuth}", "type: ExternalAuth is refused: it is not implemented"),
        ("{type: Rewrite}", "type: 'Rewrite' must be RequestHeaderModifier or"),
    ],
)
def test_each_bad_filter_is_refused_with_its_mend(text, expected):
    with pytest.raises(ResourceErrors) as caught:
        rule_of(text)
    assert expected in str(caught.value)


def test_cors_of_a_backend_is_refused():
    with pytest.raises(ResourceErrors, match="CORS is refused: CORS is none of the filters here"):
        rule_of(rewrite("{hostname: a.b}"), f"backendRefs: [{{name: web, port: 80, filters: [{cors('{}')}]}}]")


def test_what_replaces_a_prefix_needs_one():
    text = ROUTE.replace("FILTER", rewrite("{path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}"))
    with pytest.raises(ResourceErrors, match="has ReplacePrefixMatch, and a match by no prefix; write PathPrefix or"):
        parse(text.replace("type: PathPrefix", "type: Exact").replace("BACKENDS", BACKENDS), "f.yaml")
