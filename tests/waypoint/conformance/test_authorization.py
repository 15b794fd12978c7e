"""AuthorizationPolicy, RequestAuthentication and TrafficPolicy at a waypoint, from YAML to what a client sees.

Who may have what is `test_waypoint_authz`'s to say, in all its cases; here each engine is asked about each field once.
"""

from __future__ import annotations

import time
from collections import Counter

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from tests.support.conformance import Suite

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
    assert suite.ask(authorization=token(aud="other")).status == (401 if suite.engine == "built-in" else 403)
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
