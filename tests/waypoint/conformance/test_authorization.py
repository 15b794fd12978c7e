"""AuthorizationPolicy, RequestAuthentication and TrafficPolicy at a waypoint, from YAML to what a client sees.

Who may have what is `test_waypoint_authz`'s to say, in all its cases; here each engine is asked about each field once.
"""

from __future__ import annotations

import time
from collections import Counter
from urllib.parse import quote

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from tests.support.conformance import Suite, route, to

KEY = ed25519.Ed25519PrivateKey.generate()
ISSUER = "https://issuer.example/realm"


def policy(action: str, *rules: str, name: str = "policy") -> str:
    return (
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
        f"metadata: {{name: {name}, namespace: shop}}\n"
        f"spec:\n  targetRefs: [{{group: '', kind: Service, name: echo}}]\n  action: {action}\n"
    ) + (f"  rules: [{', '.join(rules)}]\n" if rules else "")


def operation(**fields: str) -> str:
    return f"{{to: [{{operation: {{{', '.join(f'{name}: {value}' for name, value in fields.items())}}}}}]}}"


def source(**fields: str) -> str:
    return f"{{from: [{{source: {{{', '.join(f'{name}: {value}' for name, value in fields.items())}}}}}]}}"


def when(key: str, **fields: str) -> str:
    return f"{{when: [{{key: '{key}', {', '.join(f'{name}: {value}' for name, value in fields.items())}}}]}}"


@pytest.mark.parametrize(
    ("rule", "matching", "other"),
    [
        ("{}", {}, None),
        (operation(methods="[GET, 'P*']"), {"method": "PUT"}, {"method": "DELETE"}),
        (operation(notMethods="[GET]"), {"method": "PUT"}, {}),
        (operation(paths="[/a, '/b/*', '*.js']"), {"path": "/b/c?d"}, {"path": "/b"}),
        (operation(paths="[/a, '/b/*', '*.js']"), {"path": "/x/y.js?z"}, {"path": "/a/"}),
        (operation(paths="['/v/{*}/x', '/w/{**}']"), {"path": "/v/1/x"}, {"path": "/v/1/2/x"}),
        (operation(paths="['/v/{*}/x', '/w/{**}']"), {"path": "/w/1/2"}, {"path": "/v//x"}),
        (operation(notPaths="['/open/*']"), {"path": "/%6fpen/../shut"}, {"path": "/open/x"}),
        (operation(paths="[/admin]"), {"path": "//%61dmin"}, {"path": "/admin2"}),
        (operation(hosts="[shop.example, '*.test']"), {"host": "Shop.Example:8080"}, {"host": "shop.example.org"}),
        (operation(hosts="[shop.example, '*.test']"), {"host": "a.test"}, {"host": "test"}),
        (operation(ports="['80']"), {"port": 80}, {"port": 8080}),
        (source(principals="[cluster.local/ns/shop/sa/web]"), {}, {"caller": "consumer"}),
        (source(principals="['*/sa/app']"), {"caller": "consumer"}, {}),
        (source(namespaces="[shop, 'other*']"), {}, {"caller": "consumer"}),
        (source(notNamespaces="['cons*']"), {}, {"caller": "consumer"}),
        (source(ipBlocks="[127.0.77.1/32]"), {}, {"caller": "consumer"}),
        (source(remoteIpBlocks="[127.0.77.4]"), {"caller": "consumer"}, {"x_forwarded_for": "127.0.77.4"}),
        (when("request.headers[x-a]", values="[one, 'two*']"), {"x_a": "twofold"}, {"x_a": "none"}),
        (when("request.headers[x-a]", notValues="[one]"), {}, {"x_a": "one"}),
        (when("source.namespace", values="[consumer]"), {"caller": "consumer"}, {}),
        (when("destination.ip", values="[240.240.7.0/24]"), {}, None),
        (when("destination.port", values="['8080']"), {"port": 8080}, {}),
        (when("remote.ip", values="[127.0.77.1]"), {}, {"caller": "consumer"}),
    ],
)
def test_each_field(suite: Suite, rule: str, matching: dict[str, object], other: dict[str, object] | None) -> None:
    def ask(given: dict[str, object]) -> int:
        more = {name: value for name, value in given.items() if name != "caller"}
        caller = suite.consumer if "caller" in given else None
        return suite.ask(**more, caller=caller).status  # type: ignore[arg-type]

    for action, matched, unmatched in (("ALLOW", 200, 403), ("DENY", 403, 200)):
        suite.apply(policy(action, rule))
        assert ask(matching) == matched, action
        if other is not None:
            assert ask(other) == unmatched, action


@pytest.mark.parametrize(
    ("action", "field", "value", "status"),
    [
        ("ALLOW", "values", "one", 403),
        ("ALLOW", "values", "'one,two'", 200),
        ("ALLOW", "notValues", "one", 403),
        ("ALLOW", "notValues", "two", 403),
        ("DENY", "values", "one", 403),
        ("DENY", "values", "two", 403),
        ("DENY", "values", "'one,two'", 403),
        ("DENY", "notValues", "one", 403),
        ("DENY", "notValues", "'one,two'", 200),
    ],
)
def test_several_lines_of_a_header_are_one_value(
    suite: Suite, action: str, field: str, value: str, status: int
) -> None:
    suite.apply(policy(action, when("request.headers[x-a]", **{field: f"[{value}]"})))
    assert suite.ask(x_a="one\r\nx-a: two").status == status


def test_routes_see_several_lines_of_a_header_as_one_value(suite: Suite) -> None:
    for value, version in (("one", "v1"), ("two", "v1"), ("'one,two'", "v2")):
        named = f"{{matches: [{{headers: [{{name: x-a, value: {value}}}]}}], backendRefs: [{to('v2')}]}}"
        suite.apply(route(named, f"{{backendRefs: [{to('v1')}]}}"))
        assert suite.ask(x_a="one\r\nx-a: two").by == version, value


def test_a_denial_goes_before_what_is_allowed_and_nobody_is_allowed_by_no_rule(suite: Suite) -> None:
    suite.apply(policy("ALLOW", "{}"), policy("DENY", operation(paths="[/x]"), name="deny"))
    assert [suite.ask(path).status for path in ("/x", "/y")] == [403, 200]
    suite.apply(policy("ALLOW"))
    denied = suite.ask()
    assert (denied.status, denied.body.strip()) == (403, b"RBAC: access denied")
    assert denied.headers["x-uproxy-reason"] == "policy"


def test_an_audit_is_recorded_and_decides_nothing(suite: Suite) -> None:
    audit = policy("AUDIT", operation(methods="[PUT]"), operation(paths="[/audited]"), name="audit")
    suite.apply(audit, policy("DENY", operation(methods="[PUT]"), name="deny"))
    assert not suite.warnings
    for method, path, *expected in (
        ("GET", "/audited", 200, "shop/audit[1]", ""),
        ("PUT", "/audited", 403, "shop/audit[0]", "shop/deny[0]"),
        ("GET", "/", 200, "", ""),
    ):
        request_id = f"{method}-{path[1:]}"
        answer = suite.ask(path, method, x_request_id=request_id)
        exchange = suite.record_of(request_id)
        assert [answer.status, exchange.audit, exchange.policy] == expected


def test_nobody_says_of_himself_who_he_is(suite: Suite) -> None:
    names = ("x-forwarded-for", "x-forwarded-client-cert", "x-uproxy-caller", "x-uproxy-policy")
    claimed = {name.replace("-", "_"): "127.0.77.9" for name in names}
    for caller, identity, address in ((None, "shop/sa/web", 1), (suite.consumer, "consumer/sa/app", 4)):
        arrived = suite.ask(caller=caller, **claimed).echoed["headers"]
        assert [arrived.get(name) for name in names] == [
            f"127.0.77.{address}",
            f"URI=spiffe://cluster.local/ns/{identity}",
            None,
            None,
        ]


def test_orders_to_an_envoy_are_not_taken_from_callers(suite: Suite) -> None:
    answered = suite.ask(
        delay_ms="200", x_envoy_upstream_rq_timeout_ms="1", x_envoy_max_retries="3", x_envoy_retry_on="5xx"
    )
    assert answered.status == 200


def test_policy_is_asked_before_routes_and_of_the_whole_path_in_one_form(suite: Suite) -> None:
    suite.apply(policy("DENY", operation(paths="[/admin]")))
    for path in ("/admin", "/./admin", "/x/../admin", "//admin", "/%61dmin", "/admin?x"):
        assert suite.ask(path).status == 403, path
    for path in ("/admin%2Fx", "/admin%5Cx", "/%00", "/..;/admin", "/;/..;x/admin"):
        assert suite.ask(path).status in (400, 403), path
    assert suite.ask("/x/%7e/./y").echoed["path"] == "/x/~/y"


def authentication(*more: str) -> str:
    public = jwt.algorithms.OKPAlgorithm.to_jwk(KEY.public_key())
    rules = "".join(f"    {line}\n" for line in more)
    return (
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: users, namespace: shop}\n"
        "spec:\n  targetRefs: [{group: '', kind: Service, name: echo}]\n  jwtRules:\n"
        f"  - issuer: {ISSUER}\n    jwks: '{{\"keys\":[{public}]}}'\n{rules}"
    )


def token(key: ed25519.Ed25519PrivateKey = KEY, **claims: object) -> str:
    said = {"iss": ISSUER, "sub": "alice", "exp": int(time.time()) + 600, **claims}
    return "Bearer " + jwt.encode(said, key, "EdDSA")


def test_tokens(suite: Suite) -> None:
    outputs = "outputClaimToHeaders: [{header: x-user, claim: sub}]"
    suite.apply(authentication("audiences: [echo]", outputs))
    assert suite.ask().status == 200, "nobody asks for one"
    taken = suite.ask(authorization=token(aud="echo"), x_user="mallory")
    assert taken.status == 200
    assert (taken.echoed["headers"]["x-user"], "authorization" in taken.echoed["headers"]) == ("alice", False)
    # As Istio's Envoy says it: a valid token, and not for this service.
    assert suite.ask(authorization=token(aud="other")).status == (403 if suite.engine == "envoy" else 401)
    for bad in (
        token(aud="echo", exp=1),
        token(aud="echo", iss="https://nobody.example"),
        token(ed25519.Ed25519PrivateKey.generate(), aud="echo"),
        "Bearer nonsense",
    ):
        assert suite.ask(authorization=bad).status == 401, bad
    assert "x-user" not in suite.ask(x_user="mallory").echoed["headers"], "only a token may say so"


@pytest.mark.parametrize(
    ("rule", "matching", "other"),
    [
        (source(requestPrincipals="['*']"), {}, None),
        (source(requestPrincipals=f"['{ISSUER}/alice']"), {}, {"sub": "bob"}),
        (source(requestPrincipals=f"['{ISSUER}/*']"), {"sub": "bob"}, None),
        (source(requestPrincipals="['*/alice']"), {}, {"sub": "bob"}),
        (source(requestPrincipals="['https://issuer.example/realm/al*']"), {}, {"sub": "bob"}),
        (source(notRequestPrincipals=f"['{ISSUER}/bob']"), {}, {"sub": "bob"}),
        (when("request.auth.principal", values=f"['{ISSUER}/alice']"), {}, {"sub": "bob"}),
        (when("request.auth.audiences", values="[a]"), {"aud": ["b", "a"]}, {"aud": "ab"}),
        (when("request.auth.presenter", values="[app]"), {"azp": "app"}, {"azp": "other"}),
        (when("request.auth.claims[groups]", values="[admin, 'dev*']"), {"groups": ["x", "devs"]}, {"groups": ["x"]}),
        (when("request.auth.claims[realm][roles]", values="[r]"), {"realm": {"roles": ["r"]}}, {"realm": "r"}),
        (when("request.auth.claims[level]", values="['7']"), {"level": 7}, {"level": 8}),
        (when("request.auth.claims[verified]", values="['true']"), {"verified": True}, {"verified": False}),
        (when("request.auth.claims[scope]", values="[write]"), {"scope": "read write"}, {"scope": "read"}),
    ],
)
def test_what_a_token_says(suite: Suite, rule: str, matching: dict[str, object], other: dict[str, object]) -> None:
    for action, matched, unmatched in (("ALLOW", 200, 403), ("DENY", 403, 200)):
        suite.apply(authentication(), policy(action, rule))
        assert suite.ask(authorization=token(**matching)).status == matched, action
        assert suite.ask().status == (matched if "notRequest" in rule else unmatched), (action, "without a token")
        if other is not None:
            assert suite.ask(authorization=token(**other)).status == unmatched, action


def traffic(*lines: str) -> str:
    return (
        "apiVersion: mesh.uproxy.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: limits, namespace: shop}\n"
        "spec:\n  targetRefs: [{group: '', kind: Service, name: echo}]\n" + "".join(f"  {line}\n" for line in lines)
    )


def test_rate_limits_of_all_of_each_caller_and_of_each_value(suite: Suite) -> None:
    suite.apply(traffic("rateLimits: [{requests: 1, per: 1h, burst: 3}]"))
    assert Counter(suite.ask().status for _ in range(5)) == {200: 3, 429: 2}
    refused = suite.ask()
    assert (refused.status, refused.headers["x-uproxy-reason"]) == (429, "rate-limited")
    assert int(refused.headers["retry-after"]) > 0

    suite.apply(traffic("rateLimits: [{requests: 1, per: 1h, burst: 2, by: Identity}]"))
    for caller in (None, suite.consumer):
        assert Counter(suite.ask(caller=caller).status for _ in range(4)) == {200: 2, 429: 2}

    suite.apply(traffic("rateLimits: [{requests: 1, per: 1h, burst: 1, by: Header, header: x-key}]"))
    for key in ("a", "b"):
        assert [suite.ask(x_key=key).status for _ in range(2)] == [200, 429], key
    assert [suite.ask().status for _ in range(2)] == [200, 429], "those without it have one together"


def test_faults(suite: Suite) -> None:
    suite.apply(traffic("fault: {abort: {status: 503, percentage: 100}}"))
    refused = suite.ask()
    assert (refused.status, refused.headers["x-uproxy-reason"]) == (503, "fault")
    suite.apply(traffic("fault: {delay: {duration: 300ms, percentage: 100}}"))
    began = time.monotonic()
    assert suite.ask().status == 200
    assert time.monotonic() - began >= 0.3
    suite.apply(traffic("fault: {abort: {status: 418, percentage: 50}}"))
    found = Counter(suite.ask().status for _ in range(60))
    assert set(found) == {200, 418}
    assert 10 < found[418] < 50, found


EXTENSION = (
    "apiVersion: mesh.uproxy.dev/v1alpha1\nkind: Extension\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n"
)


def judge(*more: str, name: str = "judge", to: str = "judge") -> str:
    said = ", ".join([f"service: {to}, port: 80", *more])
    return EXTENSION.format(name=name) + f"  type: ExternalAuthorization\n  externalAuthorization: {{{said}}}\n"


NOBODY = """apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: shop}
spec: {selector: {app: nobody}, ports: [{name: http, port: 80}]}
"""


def asks(*rules: str, name: str = "ask", provider: str = "judge") -> str:
    return policy("CUSTOM", *(rules or ("{}",)), name=name) + f"  provider: {{name: {provider}}}\n"


def verdict(status: int, *fields: str, body: str = "") -> dict[str, str]:
    """Headers of a request that tell the judge what to say of it."""
    said = "\r\n".join([f"HTTP/1.1 {status} Said", f"content-length: {len(body)}", *fields, "", body])
    return {"verdict": quote(said)}


def test_what_a_service_allows_goes_on_with_what_it_says(suite: Suite) -> None:
    more = (
        "pathPrefix: /check",
        "includeRequestHeadersInCheck: ['*']",
        "includeAdditionalHeadersInCheck: {x-mesh: here}",
        "headersToUpstreamOnAllow: ['*']",
        "headersToDownstreamOnAllow: ['*']",
    )
    suite.apply(judge(*more), asks(operation(paths="['/a*']")))
    assert not suite.warnings
    said = verdict(
        200,
        "connection: close",
        "x-user: ann",
        "x-forwarded-for: 6.6.6.6",
        "x-uproxy-caller: forged",
        "x-forwarded-client-cert: forged",
    )
    answer = suite.ask("/a?b=1", host="Db.Shop", cookie="c=1", x_user="forged", body=b"12", method="POST", **said)
    (check,) = suite.judged
    assert (check["method"], check["path"], check["host"], check["body"]) == ("POST", "/check/a?b=1", "Db.Shop", "")
    heard = check["headers"]
    assert {"cookie": "c=1", "x-mesh": "here", "content-length": "0", "x-forwarded-for": "127.0.77.1"}.items() <= (
        heard.items()
    )
    assert heard["x-forwarded-client-cert"] == "URI=spiffe://cluster.local/ns/shop/sa/web"
    assert not [name for name in heard if name.startswith(("x-uproxy-", "x-envoy-"))]
    arrived = answer.echoed["headers"]
    assert (answer.status, answer.echoed["body"], arrived["x-user"]) == (200, "12", "ann")
    assert (arrived["x-forwarded-for"], arrived["x-request-id"]) == ("127.0.77.1", heard["x-request-id"])
    assert arrived["x-forwarded-client-cert"] == heard["x-forwarded-client-cert"]
    assert answer.headers["x-user"] == "ann"
    assert not {"x-uproxy-caller", "x-forwarded-for", "x-forwarded-client-cert"} & answer.headers.keys()
    assert suite.ask("/b").status == 200
    assert len(suite.judged) == 1, "no rule matches"
    assert suite.judges() == {"spiffe://cluster.local/ns/shop/sa/wp"}, "who has asked"


def test_a_service_behind_the_waypoint_is_told_that_the_waypoint_asks(suite: Suite) -> None:
    suite.apply(judge("includeRequestHeadersInCheck: [verdict]"), asks(), bound_judge=True)
    assert suite.ask(**verdict(200, "connection: close")).status == 200
    assert suite.judges() == {"spiffe://cluster.local/ns/shop/sa/wp"}


def test_only_what_is_said_of_a_request_is_told(suite: Suite) -> None:
    suite.apply(judge(), asks())
    answer = suite.ask(authorization="Basic secret", cookie="c=1")
    assert answer.status == 200
    (check,) = suite.judged
    assert not {"authorization", "cookie"} & check["headers"].keys()
    assert answer.echoed["headers"]["authorization"] == "Basic secret"


def test_what_a_service_denies_is_answered_as_it_says(suite: Suite) -> None:
    carried = "includeRequestHeadersInCheck: [verdict]"
    suite.apply(judge(carried), asks())
    said = verdict(
        401, "content-type: a/b", "x-why: w", "x-uproxy-policy: forged", "www-authenticate: Basic", body="no"
    )
    denied = suite.ask(x_request_id="denied", **said)
    assert (denied.status, denied.body) == (401, b"no")
    told = {"content-type": "a/b", "x-why": "w", "www-authenticate": "Basic", "content-length": "2"}
    assert told.items() <= denied.headers.items()
    assert denied.headers["x-uproxy-reason"] == "external-authorization"
    assert denied.headers.get("x-uproxy-policy") in (None, "shop/ask[0]")
    exchange = suite.record_of("denied")
    assert (exchange.status, exchange.flag, exchange.policy, exchange.attempts) == (401, "UAEX", "shop/ask[0]", 0)
    suite.apply(judge(carried, "headersToDownstreamOnDeny: [set-cookie]"), asks())
    moved = suite.ask(**verdict(302, "location: /sign-in", "set-cookie: a", "x-why: w"))
    assert (moved.status, moved.headers["location"], moved.headers["set-cookie"]) == (302, "/sign-in", "a")
    assert "x-why" not in moved.headers


@pytest.mark.parametrize("which", ["500", "broken", "late", "nobody", "no service"])
def test_what_is_no_answer_refuses_unless_it_is_said_otherwise(suite: Suite, which: str) -> None:
    said = {
        "late": {"verdict": "late"},
        "broken": {"verdict": quote("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 9\r\n\r\nhal")},
    }
    asked = said.get(which) or verdict(500)
    more = ["includeRequestHeadersInCheck: [verdict]", "timeout: 300ms"]
    to = {"nobody": "nobody", "no service": "missing"}.get(which, "judge")
    for added, status in (("", 403), ("statusOnError: 503", 503), ("failOpen: true", 200)):
        suite.apply(judge(*more, *([added] if added else []), to=to), asks(), NOBODY)
        answer = suite.ask(**asked)
        assert answer.status == status, added
        assert ("x-uproxy-reason" in answer.headers) is (status != 200)


def test_without_an_extension_nobody_passes(suite: Suite) -> None:
    suite.apply(asks(operation(paths="[/a]")))
    assert "there is no Extension" in "".join(suite.warnings)
    assert [suite.ask(path).status for path in ("/a", "/b")] == [403, 200]


def test_a_body_goes_along_as_far_as_is_asked(suite: Suite) -> None:
    for limit, partial, status, seen in (
        (10, False, 200, "0123456789"),
        (9, False, 413, None),
        (9, True, 200, "012345678"),
    ):
        body = f"includeRequestBodyInCheck: {{maxRequestBytes: {limit}, allowPartialMessage: {str(partial).lower()}}}"
        suite.apply(judge(body), asks())
        suite.judged.clear()
        answer = suite.ask(method="POST", body=b"0123456789")
        assert answer.status == status
        assert [check["body"] for check in suite.judged] == ([] if seen is None else [seen])
        if status == 200:
            assert answer.echoed["body"] == "0123456789"
            assert suite.judged[0]["headers"]["x-envoy-auth-partial-body"] == str(partial).lower()


def test_it_is_asked_after_tokens_and_before_other_policies_each_service_once(suite: Suite) -> None:
    carried = ("includeRequestHeadersInCheck: [verdict]", "headersToUpstreamOnAllow: [x-group]")
    second = "pathPrefix: /second"
    policies = (
        asks(when("request.auth.claims[groups]", values="[dev]"), name="a"),
        asks(operation(paths="[/x]"), name="b"),
        asks(operation(paths="[/x, /y]"), name="c", provider="other"),
        policy("DENY", when("request.headers[x-group]", values="[banned]"), name="deny"),
    )
    suite.apply(authentication(), judge(*carried), judge(*carried, second, name="other"), *policies)

    def ask(path: str, groups: str, **more: str) -> tuple[int, list[str]]:
        suite.judged.clear()
        status = suite.ask(path, authorization=token(groups=[groups]), **more).status
        return status, [check["path"] for check in suite.judged]

    assert ask("/", "ops") == (200, [])
    assert ask("/", "dev") == (200, ["/"])
    assert ask("/x", "dev") == (200, ["/x", "/second/x"])
    assert ask("/y", "ops", **verdict(200, "x-group: banned")) == (403, ["/second/y"])
    assert ask("/x", "dev", **verdict(401)) == (401, ["/x"]), "the others are not asked"
    suite.judged.clear()
    assert suite.ask("/x", authorization="Bearer nonsense").status == 401
    assert not suite.judged


def test_routes_see_what_an_authorization_adds(suite: Suite) -> None:
    named = f"{{matches: [{{headers: [{{name: x-user, value: ann}}]}}], backendRefs: [{to('v2')}]}}"
    routes = route(named, f"{{backendRefs: [{to('v1')}]}}")
    carried = ("includeRequestHeadersInCheck: [verdict]", "headersToUpstreamOnAllow: [x-user]")
    suite.apply(routes, judge(*carried), asks())
    assert suite.ask().by == "v1"
    assert suite.ask(**verdict(200, "x-user: ann")).by == "v2"
