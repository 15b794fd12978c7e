"""Extension as people write it, and what a CUSTOM policy makes of one."""

from __future__ import annotations

import pytest

from control.api.declared import DeclaredExtension
from control.api.extension import MAX_INLINE, EnvoyFilter, ExternalAuthorization, Language, PythonFilter
from control.api.mesh import Mesh
from control.api.policy import Action
from control.api.problems import ResourceErrors
from control.api.records import RecordError, read, write
from control.api.resources import parse
from control.api.topics import PolicyTopic, TrafficTopic
from tests.support.desired import custom_policy, extension, gateway, service
from tests.support.records import TRUST_DOMAIN

HEAD = "apiVersion: mesh.uproxy.dev/v1alpha1\nkind: Extension\nmetadata: {name: e, namespace: shop}\n"
ASKED = "service: authz, port: 8000"


def spec(text):
    (found,) = parse(f"{HEAD}spec: {{{text}}}\n", "f.yaml")
    assert isinstance(found, DeclaredExtension)
    return found.content


def section(text):
    return spec(f"type: ExternalAuthorization, externalAuthorization: {{{text}}}")


def test_every_field():
    found = section(
        f"{ASKED}, timeout: 300ms, pathPrefix: /check, statusOnError: 503, "
        "includeRequestHeadersInCheck: [Cookie, x-ext-*], includeAdditionalHeadersInCheck: {X-Mesh: 'a b'}, "
        "includeRequestBodyInCheck: {maxRequestBytes: 8192, allowPartialMessage: true}, "
        "headersToUpstreamOnAllow: [x-user, '*-id'], headersToDownstreamOnAllow: ['*'], "
        "headersToDownstreamOnDeny: [set-cookie, location]"
    )
    assert found == ExternalAuthorization(
        "shop/authz",
        8000,
        300,
        "/check",
        status_on_error=503,
        checked=("cookie", "x-ext-*"),
        added=(("x-mesh", "a b"),),
        body_bytes=8192,
        partial_body=True,
        upstream_on_allow=("*-id", "x-user"),
        downstream_on_allow=("*",),
        downstream_on_deny=("location", "set-cookie"),
    )
    assert section(f"{ASKED}, failOpen: true") == ExternalAuthorization("shop/authz", 8000, 1000, fail_open=True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "externalAuthorization: {}",
            "spec.type: is missing; it must be ExternalAuthorization, PythonFilter, Lua, Wasm",
        ),
        ("type: ExternalAuthorization", "spec.externalAuthorization: is missing; it must be a mapping, as {service:"),
        ("type: Magic", "spec.type: 'Magic' must be"),
        ("type: Magic, magic: {}", "spec.magic: unknown field"),
    ],
)
def test_what_is_no_envelope_is_refused_by_name(text, problem):
    assert_refused(lambda: spec(text), problem)


def test_every_field_of_a_filter():
    found = spec(
        "type: PythonFilter, pythonFilter: {name: greeter, config: {b: two, a: '1'}, timeout: 1s, failOpen: true}"
    )
    assert found == PythonFilter("shop/e", "greeter", (("a", "1"), ("b", "two")), 1000, True)
    assert spec("type: PythonFilter, pythonFilter: {name: g}") == PythonFilter("shop/e", "g", (), 100)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "name: is missing; it must be the name of an entry point"),
        ("{name: 'a b'}", "name: 'a b' is no name of an entry point"),
        ("{name: a, timeout: 11s}", "timeout: must be from 1ms to 10s"),
        ("{name: a, config: {a: 1}}", "config.a: must be text"),
        ("{name: a, config: {a: " + "x" * 1025 + "}}", "has more than 1024 characters"),
        ("{name: a, path: b}", "path: unknown field"),
    ],
)
def test_what_no_filter_has_is_refused_by_name(text, problem):
    assert_refused(lambda: spec(f"type: PythonFilter, pythonFilter: {text}"), problem)


SHA256 = "0a" * 32


def test_every_field_of_code_for_an_envoy():
    found = spec("type: Lua, lua: {inline: x = 1, failOpen: true}")
    assert found == EnvoyFilter("shop/e", Language.LUA, b"x = 1", fail_open=True)
    found = spec(f"type: Lua, lua: {{file: /a/b.lua, sha256: {SHA256}}}")
    assert found == EnvoyFilter("shop/e", Language.LUA, file="/a/b.lua", sha256=SHA256)
    found = spec("type: Wasm, wasm: {inline: 'AGFzbQ EAAAA=', config: {b: two, a: '1'}}")
    assert found == EnvoyFilter("shop/e", Language.WASM, b"\0asm\1\0\0\0", config=(("a", "1"), ("b", "two")))
    found = spec(f"type: Wasm, wasm: {{file: /a.wasm, sha256: {SHA256}}}")
    assert found == EnvoyFilter("shop/e", Language.WASM, file="/a.wasm", sha256=SHA256)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("type: Lua, lua: {}", "inline: is missing; write the code, or file and sha256"),
        ("type: Lua, lua: {inline: ''}", f"has 0 bytes; from 1 to {MAX_INLINE}"),
        ("type: Lua, lua: {inline: " + "x" * (MAX_INLINE + 1) + "}", f"has {MAX_INLINE + 1} bytes"),
        ('type: Lua, lua: {inline: "\\e\\x4c"}', "is no Lua: it has a NUL, or is compiled"),
        ('type: Lua, lua: {inline: "a\\0"}', "is no Lua"),
        (f"type: Lua, lua: {{inline: x = 1, file: /a, sha256: {SHA256}}}", "inline: cannot stand beside file"),
        ("type: Lua, lua: {file: /a}", "sha256: is missing; it must be the SHA-256"),
        (f"type: Lua, lua: {{file: a/b, sha256: {SHA256}}}", "file: 'a/b' is no absolute path"),
        (f"type: Lua, lua: {{file: /a/../b, sha256: {SHA256}}}", "file: '/a/../b' is no absolute path"),
        ("type: Lua, lua: {file: /a, sha256: abc}", "sha256: 'abc' is no SHA-256"),
        ("type: Lua, lua: {inline: x = 1, config: {a: b}}", "config: unknown field"),
        ("type: Wasm, wasm: {inline: x}", "inline: is no base64"),
        ("type: Wasm, wasm: {inline: eCA9IDE=}", "inline: is no module of WebAssembly"),
        ("type: Wasm, lua: {inline: x = 1}", "lua: belongs to type Lua; this is Wasm"),
    ],
)
def test_what_is_no_code_is_refused_by_name(text, problem):
    assert_refused(lambda: spec(text), problem)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("port: 80", "service: is missing; it must be the name of a Service"),
        ("service: authz", "port: is missing; it must be a port"),
        ("service: a/b, port: 80", "service: 'a/b'"),
        (f"{ASKED}, timeout: 0s", "timeout: must be from 1ms to 60s"),
        (f"{ASKED}, timeout: 2m", "timeout: must be from 1ms to 60s"),
        (f"{ASKED}, pathPrefix: check", "pathPrefix: 'check' is no path such as /check"),
        (f"{ASKED}, pathPrefix: /check/", "pathPrefix: '/check/' is no path"),
        (f"{ASKED}, pathPrefix: '/a?b'", "pathPrefix: '/a?b' is no path"),
        (f"{ASKED}, statusOnError: 200", "statusOnError: 200 is out of range: 400 to 599"),
        (f"{ASKED}, statusOnError: 503, failOpen: true", "statusOnError: cannot stand beside failOpen"),
        (f"{ASKED}, includeRequestHeadersInCheck: ['a*b']", "[0]: 'a*b' is no header's name in lower case, nor x-*"),
        (f"{ASKED}, includeRequestHeadersInCheck: ['']", "[0]: '' is no header's name"),
        (f"{ASKED}, includeAdditionalHeadersInCheck: {{host: a}}", "host: 'host' is the waypoint's own to write"),
        (f"{ASKED}, includeAdditionalHeadersInCheck: {{x-a: b, X-A: b}}", "names a header twice"),
        (f"{ASKED}, includeRequestBodyInCheck: {{}}", "maxRequestBytes: is missing; it must be a number from 1 to"),
        (f"{ASKED}, includeRequestBodyInCheck: {{maxRequestBytes: 65537}}", "65537 is out of range"),
        (f"{ASKED}, includeRequestBodyInCheck: {{maxRequestBytes: 1, packAsBytes: true}}", "packAsBytes: is refused"),
        (f"{ASKED}, clearRouteCache: true", "clearRouteCache: is refused: routes are chosen after"),
        (f"{ASKED}, grpc: {{}}", "grpc: unknown field"),
    ],
)
def test_what_is_not_taken_is_refused_by_name(text, problem):
    assert_refused(lambda: section(text), problem)


def assert_refused(read_, problem):
    with pytest.raises(ResourceErrors) as caught:
        read_()
    assert any(problem in str(error) for error in caught.value.errors), [str(error) for error in caught.value.errors]


BOUND = [gateway("wp"), service("web", labels="istio.io/use-waypoint: wp")]


def built(*documents):
    mesh = Mesh.build([one for text in (*BOUND, *documents) for one in parse(text, "f.yaml")], TRUST_DOMAIN)
    (policy,) = [one for one in mesh.policies if one.action is Action.CUSTOM]
    return policy, [f"{one.field}: {one.problem}" for one in mesh.warnings]


def test_a_policy_is_published_with_who_is_asked():
    policy, warnings = built(custom_policy("p", "web", "sign-in"), extension("sign-in", "authz"), service("authz"))
    assert policy.authorizer == ExternalAuthorization("shop/authz", 80, 1000)
    assert not [one for one in warnings if "asked" in one]
    body = write(policy)
    assert read(PolicyTopic("shop", "p"), body, TRUST_DOMAIN) == policy
    for broken in ({"action": "DENY"}, {"targets": []}):
        with pytest.raises(RecordError):
            read(PolicyTopic("shop", "p"), {**body, **broken}, TRUST_DOMAIN)


def test_an_extension_of_its_own_namespace_counts_before_one_of_the_root_namespace():
    everybodys = extension("sign-in", "gate", namespace="mesh-system")
    policy, _ = built(custom_policy("p", "web", "sign-in"), everybodys)
    assert policy.authorizer is not None
    assert policy.authorizer.service == "mesh-system/gate"
    policy, _ = built(custom_policy("p", "web", "sign-in"), everybodys, extension("sign-in", "authz"))
    assert policy.authorizer is not None
    assert policy.authorizer.service == "shop/authz"


def test_nobody_to_be_asked_is_warned_of():
    policy, warnings = built(custom_policy("p", "web", "signin"), extension("sign-in", "authz", namespace="bank"))
    assert policy.authorizer is None
    assert [one for one in warnings if "there is no Extension shop/signin or mesh-system/signin of type" in one]
    assert [one for one in warnings if "there is no Service bank/authz; until there is, nobody can be asked" in one]
    _, warnings = built(custom_policy("p", "web", "a"), extension("a", "authz", port=81), service("authz"))
    assert [one for one in warnings if "has no port 81, and so nobody can be asked; its ports: 80" in one]
    _, warnings = built(custom_policy("p", "web", "a"), extension("a", "web"))
    assert [one for one in warnings if "is bound to waypoint shop/wp, and no other waypoint can ask it" in one]
    policy, warnings = built(
        custom_policy("p", "web", "a").replace(
            "targetRefs: [{group: '', kind: Service, name: web}]", "selector: {matchLabels: {app: web}}"
        )
    )
    assert policy.authorizer is None
    assert [one for one in warnings if "a uProxy cannot ask anybody: what this matches is refused" in one]


def filtered(*documents):
    policy = (
        "apiVersion: mesh.uproxy.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: t, namespace: shop}\n"
        "spec: {targetRefs: [{group: '', kind: Service, name: web}], extensions: [first, second]}\n"
    )
    mesh = Mesh.build([one for text in (*BOUND, policy, *documents) for one in parse(text, "f.yaml")], TRUST_DOMAIN)
    (found,) = mesh.traffic
    return found, [f"{one.field}: {one.problem}" for one in mesh.warnings], mesh.wishes.values()


def python_filter(name, namespace="shop"):
    head = HEAD.replace("name: e", f"name: {name}").replace("shop", namespace)
    return f"{head}spec: {{type: PythonFilter, pythonFilter: {{name: of-{namespace}}}}}\n"


def test_a_traffic_policy_is_published_with_its_filters_in_its_own_order():
    found, warnings, wishes = filtered(
        python_filter("second"), python_filter("first", "mesh-system"), python_filter("second", "mesh-system")
    )
    assert [one.extension for one in found.filters] == ["mesh-system/first", "shop/second"]
    assert not [one for one in warnings if "Extension" in one]
    assert any(wish.guarded for wish in wishes), "a filter may refuse: nobody goes around it"
    assert read(TrafficTopic("shop", "t"), write(found), TRUST_DOMAIN) == found


def test_a_filter_that_is_not_there_is_warned_of_and_refuses():
    found, warnings, _ = filtered(python_filter("first"), extension("second", "web"))
    assert [one.entry_point for one in found.filters] == ["of-shop", ""]
    assert [one for one in warnings if "no Extension shop/second or mesh-system/second of type PythonFilter" in one]


@pytest.mark.parametrize(
    ("filters", "problem"),
    [
        ([], "filters is empty"),
        ([["shop/a", "a", [], 1]], "filters: each must be"),
        ([["shop/a", "a", [], 0, False]], "filters is 0"),
        ([["a", "a", [], 1, False]], "must be namespace/name"),
        ([["shop/a", "a b", [], 1, False]], "no name of an entry point"),
        ([["shop/a", "Perl", b"x", [], False]], "filters"),
        ([["shop/a", "Lua", b"", [], False]], "has 0 bytes"),
        ([["shop/a", "Wasm", b"x", [], False]], "no module of WebAssembly"),
        ([["shop/a", "Lua", ["a", SHA256], [], False]], "no absolute path"),
        ([["shop/a", "Lua", ["/a", "b"], [], False]], "no SHA-256"),
        ([["shop/a", "Lua", b"x", [["a", "1"]], False]], "Lua has no config"),
        ([["shop/a", "a", [["b", "1"], ["a", "1"]], 1, False]], "must be in order"),
        ([["shop/a", "a", [["b", 1]], 1, False]], "each setting must be"),
        ([["shop/a", "a", [], 1, False]] * 2, "names one twice"),
        ([[f"shop/a{n}", "a", [], 1, False] for n in range(9)], "filters has 9; at most 8"),
    ],
)
def test_each_wrong_filter_of_a_record_is_refused_by_name(filters, problem):
    found, *_ = filtered(python_filter("first"), python_filter("second"))
    with pytest.raises(RecordError, match=problem):
        read(TrafficTopic("shop", "t"), {**write(found), "filters": filters}, TRUST_DOMAIN)
