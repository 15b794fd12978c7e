"""Policies on requests against a naive reading of Istio's documentation, and the cases where it leaves room."""

import ipaddress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control.api.address import parse_address, parse_block
from control.api.identity import SpiffeId
from control.api.policy import Action, AuthorizationPolicy, Condition, ConditionKey, Operation, Rule, Source, Target
from tests.support.examples import examples
from waypoint.authz import compile_policies
from waypoint.forwarded import extended
from waypoint.request import host_name, read_request
from waypoint.tokens import Token

WEB = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/web")
DB = SpiffeId.parse("spiffe://cluster.local/ns/data/sa/db")
CALLER = parse_address("10.0.0.1")
VIP = parse_address("240.240.0.7")
TARGETS = (Target("Service", "shop/reviews"),)


def policy(action, *rules, name="p"):
    return AuthorizationPolicy("shop", name, Action(action), None, rules, TARGETS)


def to(**fields):
    return Rule(operations=(Operation(**fields),))


def when(name, values=(), not_values=()):
    return Rule(conditions=(Condition(ConditionKey.REQUEST_HEADERS, tuple(values), tuple(not_values), name),))


def http(method="GET", target="/", host="reviews.shop", *fields):
    named = [(b"host", host.encode())] if host else []
    return read_request(method, target, [*named, *fields])


def allowed(*policies, request=None, source=WEB, port=80):
    return compile_policies(policies).decide(source, CALLER, VIP, port, request).allowed


def matches(rule, request, **call):
    """Whether the rule matches; asked as ALLOW and as DENY, which must agree."""
    as_allow = allowed(policy("ALLOW", rule), request=request, **call)
    assert as_allow is not allowed(policy("DENY", rule), request=request, **call)
    return as_allow


# The documentation, read literally.
# https://istio.io/latest/docs/reference/config/security/authorization-policy/


def naive_decision(policies, call) -> bool:
    # "2. If there are any DENY policies that match the request, deny the request." Nobody can be asked about a
    # connection that is not HTTP; about requests, `checks` says who is.
    refusing = (Action.DENY,) if call[4] is not None else (Action.DENY, Action.CUSTOM)
    if any(p.action in refusing and naive_policy(p, call) for p in policies):
        return False
    # "3. If there are no ALLOW policies for the workload, allow the request."
    if not any(p.action is Action.ALLOW for p in policies):
        return True
    # "4. If any of the ALLOW policies match the request, allow the request." "5. Deny the request."
    return any(p.action is Action.ALLOW and naive_policy(p, call) for p in policies)


def naive_policy(policy, call) -> bool:
    return any(naive_rule(policy.action, rule, call) for rule in policy.rules)


def naive_rule(action, rule, call) -> bool:
    # On TCP, a DENY rule is taken without its HTTP fields, and an ALLOW rule with any is ignored
    # (https://istio.io/latest/docs/tasks/security/authorization/authz-tcp/).
    is_http = call[4] is not None
    asks_http = any(
        o.hosts or o.not_hosts or o.methods or o.not_methods or o.paths or o.not_paths for o in rule.operations
    ) or any(c.key.value.startswith("request.") for c in rule.conditions)
    asks_http = asks_http or any(c.key is ConditionKey.REMOTE_IP for c in rule.conditions)
    asks_http = asks_http or any(
        s.request_principals or s.not_request_principals or s.remote_ip_blocks or s.not_remote_ip_blocks
        for s in rule.sources
    )
    if action is Action.ALLOW and asks_http and not is_http:
        return False
    if rule.sources and not any(naive_source(source, call) for source in rule.sources):
        return False
    if rule.operations and not any(naive_operation(operation, call) for operation in rule.operations):
        return False
    return all(naive_condition(action, condition, call) for condition in rule.conditions)


def both(values, not_values, holds) -> bool:
    return (not values or holds(values)) and not (not_values and holds(not_values))


def naive_source(source, call) -> bool:
    identity, ip, _, _, request, token = call
    principal = token and token.principal
    if request is not None and not both(
        source.request_principals, source.not_request_principals, lambda v: naive_texts(v, principal)
    ):
        return False
    remote = source.remote_ip_blocks, source.not_remote_ip_blocks
    if request is not None and not both(*remote, lambda v: naive_blocks(v, naive_remote(call))):
        return False
    return (
        both(source.principals, source.not_principals, lambda v: naive_texts(v, identity and identity.principal))
        and both(source.namespaces, source.not_namespaces, lambda v: naive_texts(v, identity and identity.namespace))
        and both(source.ip_blocks, source.not_ip_blocks, lambda v: naive_blocks(v, ip))
    )


def naive_operation(operation, call) -> bool:
    _, _, _, port, request, _ = call
    if not both(operation.ports, operation.not_ports, lambda v: port in v):
        return False
    if request is None:
        return True
    names = [request.host, host_name(request.host)] if request.host else []
    return (
        both(operation.methods, operation.not_methods, lambda v: naive_texts(v, request.method))
        and both(operation.paths, operation.not_paths, lambda v: naive_texts(v, request.path))
        and both(operation.hosts, operation.not_hosts, lambda v: any(naive_texts(v, name) for name in names))
    )


def naive_condition(action, condition, call) -> bool:
    identity, source_ip, destination_ip, port, request, token = call
    values, not_values = condition.values, condition.not_values
    match condition.key:
        case ConditionKey.SOURCE_IP:
            return both(values, not_values, lambda v: naive_blocks(v, source_ip))
        case ConditionKey.DESTINATION_IP:
            return both(values, not_values, lambda v: naive_blocks(v, destination_ip))
        case ConditionKey.DESTINATION_PORT:
            return both(values, not_values, lambda v: str(port) in v)
        case ConditionKey.SOURCE_NAMESPACE:
            return both(values, not_values, lambda v: naive_texts(v, identity and identity.namespace))
        case ConditionKey.SOURCE_PRINCIPAL:
            return both(values, not_values, lambda v: naive_texts(v, identity and identity.principal))
        case ConditionKey.REQUEST_HEADERS:
            if request is None:
                return True
            lines = [value.decode() for name, value in request.fields if name.decode() == condition.name]
            whole = [",".join(lines)] if lines else []
            each = whole + [part.strip() for line in lines for part in line.split(",")]
            refusing, letting = (not_values, values) if action is Action.ALLOW else (values, not_values)
            one = both(refusing, (), lambda v: any(naive_texts(v, text) for text in each))
            other = both(letting, (), lambda v: any(naive_texts(v, text) for text in whole))
            # Each is a positive field for one of the actions and a `not` field for the other.
            if action is not Action.ALLOW:
                return (one or not values) and not (not_values and other)
            return (other or not values) and not (not_values and one)
    if request is None:
        return True
    if condition.key is ConditionKey.REMOTE_IP:
        return both(values, not_values, lambda v: naive_blocks(v, naive_remote(call)))
    said = naive_claims(condition, token) if token is not None else []
    return both(values, not_values, lambda v: any(naive_texts(v, text) for text in said))


def naive_remote(call):
    """One proxy is trusted here."""
    said = [part.strip() for part in (call[4].header("x-forwarded-for") or "").split(",")]
    return said[-1] or call[1]


def naive_claims(condition, token) -> list[str]:
    match condition.key:
        case ConditionKey.REQUEST_PRINCIPAL:
            return [token.principal]
        case ConditionKey.REQUEST_AUDIENCES:
            found = token.claims.get("aud", [])
        case ConditionKey.REQUEST_PRESENTER:
            found = token.claims.get("azp", [])
        case _:
            found = token.claims.get("realm", {}).get("role", []) if "][" in condition.name else token.claims["groups"]
    return found if isinstance(found, list) else [found]


def naive_texts(patterns, value) -> bool:
    if value is None:
        return False
    for pattern in patterns:
        if pattern == "*":
            return True
        if pattern.startswith("*"):
            found = len(value) >= len(pattern) - 1 and value[len(value) - len(pattern) + 1 :] == pattern[1:]
        elif pattern.endswith("*"):
            found = value[: len(pattern) - 1] == pattern[:-1]
        else:
            found = value == pattern
        if found:
            return True
    return False


def naive_blocks(blocks, address) -> bool:
    return any(ipaddress.ip_address(address) in ipaddress.ip_network(block) for block in blocks)


def some(values):
    return st.lists(values, max_size=2).map(tuple)


def patterns_over(*values):
    def cut(value, at, kind):
        at %= len(value) + 1
        return {"exact": value, "prefix": value[:at] + "*", "suffix": "*" + value[at:], "any": "*"}[kind]

    kinds = st.sampled_from(["exact", "exact", "exact", "prefix", "suffix", "any"])
    return st.builds(cut, st.sampled_from(values), st.integers(0, 20), kinds)


methods = patterns_over("GET", "PUT")
paths = patterns_over("/", "/admin", "/admin/x")
hosts = patterns_over("shop.io", "shop.io:80", "a.shop.io")
values = patterns_over("1", "2", "1,2")
blocks = st.sampled_from(["10.0.0.1/32", "10.0.0.0/8", "::/0"]).map(parse_block)
principals, namespaces = patterns_over(WEB.principal, DB.principal), patterns_over("shop", "data")
request_principals = patterns_over("accounts/ann", "accounts/ben")
ports = st.sampled_from([80, 81])
sources = st.builds(
    Source,
    some(principals),
    some(principals),
    some(namespaces),
    some(namespaces),
    some(blocks),
    some(blocks),
    some(request_principals),
    some(request_principals),
    some(blocks),
    some(blocks),
)
operations = st.builds(
    Operation,
    some(ports),
    some(ports),
    some(hosts),
    some(hosts),
    some(methods),
    some(methods),
    some(paths),
    some(paths),
)
one_field = st.one_of(
    st.builds(Operation, **{name: st.lists(kind, min_size=1, max_size=2).map(tuple)})
    for field, kind in {"ports": ports, "hosts": hosts, "methods": methods, "paths": paths}.items()
    for name in (field, f"not_{field}")
)
header_conditions = st.builds(
    Condition, st.just(ConditionKey.REQUEST_HEADERS), some(values), some(values), st.sampled_from(["x", "y"])
)
token_conditions = st.one_of(
    st.builds(Condition, st.just(ConditionKey.REQUEST_PRINCIPAL), some(request_principals), some(request_principals)),
    st.builds(Condition, st.just(ConditionKey.REQUEST_AUDIENCES), some(values), some(values)),
    st.builds(Condition, st.just(ConditionKey.REQUEST_PRESENTER), some(values), some(values)),
    st.builds(
        Condition,
        st.just(ConditionKey.REQUEST_CLAIMS),
        some(values),
        some(values),
        st.sampled_from(["groups", "realm][role"]),
    ),
)
conditions = (
    header_conditions
    | token_conditions
    | st.one_of(
        st.builds(Condition, st.just(key), some(kind), some(kind))
        for key, kind in {
            ConditionKey.SOURCE_IP: blocks,
            ConditionKey.REMOTE_IP: blocks,
            ConditionKey.DESTINATION_PORT: ports.map(str),
            ConditionKey.SOURCE_NAMESPACE: namespaces,
        }.items()
    )
)
rules = st.builds(Rule, some(sources), some(operations | one_field), some(conditions))
policies = st.builds(
    AuthorizationPolicy,
    st.just("shop"),
    st.sampled_from("abc"),
    st.sampled_from(Action),
    st.none(),
    st.lists(rules, max_size=2).map(tuple),
    st.just(TARGETS),
)
requests = st.builds(
    lambda method, target, host, fields: http(method, target, host, *fields),
    st.sampled_from(["GET", "PUT", "DELETE"]),
    st.sampled_from(["/", "/admin", "//admin", "/admin/x?y=1", "/x/../admin", "/administer"]),
    st.sampled_from(["", "shop.io", "SHOP.io:80", "a.shop.io", "shop.io."]),
    st.lists(
        st.tuples(st.sampled_from([b"x", b"y"]), st.sampled_from([b"1", b"2", b"1, 2", b"3"]))
        | st.tuples(
            st.just(b"x-forwarded-for"), st.sampled_from([b"10.0.0.1", b"9.9.9.9, fd00::1", b"10.0.0.1,6.6.6.6"])
        ),
        max_size=3,
    ),
)
callers = st.sampled_from([None, WEB, DB])
addresses = st.sampled_from(["10.0.0.1", "10.1.0.1", "fd00::1"]).map(parse_address)
some_texts = st.lists(st.sampled_from(["1", "2", "12"]), max_size=2)
claims = st.fixed_dictionaries(
    {"groups": some_texts},
    optional={
        "aud": some_texts | st.just("1"),
        "azp": st.just("2"),
        "realm": st.builds(lambda r: {"role": r}, some_texts),
    },
)
tokens = st.none() | st.builds(Token, claims, st.sampled_from(["accounts/ann", "accounts/ben"]))
calls = st.tuples(callers, addresses, st.just(VIP), ports, st.none(), st.none()) | st.tuples(
    callers, addresses, st.just(VIP), ports, requests, tokens
)


@settings(max_examples=examples(200))
@given(st.lists(policies, max_size=3), calls)
def test_decisions_agree_with_the_documentation(given_policies, call):
    compiled = compile_policies(given_policies, 1)
    decision = compiled.decide(*call)
    assert decision.allowed is naive_decision(given_policies, call)
    audited = any(one.action is Action.AUDIT and naive_policy(one, call) for one in given_policies)
    assert bool(decision.audit) is audited
    if call[4] is not None:
        asked = any(one.action is Action.CUSTOM and naive_policy(one, call) for one in given_policies)
        assert [check.authorizer for check in compiled.checks(*call)] == [None] * asked
        assert compiled.asks_others or not asked


@settings(deadline=None)
@given(st.lists(policies, max_size=3), st.lists(policies, max_size=2), calls)
def test_what_is_in_dry_run_decides_nothing_and_is_rehearsed(enforced, rehearsed, call):
    rehearsed = [one for one in rehearsed if one.action in (Action.ALLOW, Action.DENY)]
    compiled = compile_policies([*enforced, *(replace(one, dry_run=True) for one in rehearsed)], 1)
    assert compiled.decide(*call) == compile_policies(enforced, 1).decide(*call)
    assert (compiled.rehearsal is not None) is bool(rehearsed)
    if compiled.rehearsal is not None:
        assert compiled.rehearsal.decide(*call).allowed is naive_decision([*enforced, *rehearsed], call)


@settings(max_examples=examples(200))
@given(
    st.sampled_from(Action),
    st.builds(Rule, operations=st.lists(one_field, min_size=1, max_size=2).map(tuple))
    | st.builds(Rule, conditions=st.lists(header_conditions | token_conditions, min_size=1, max_size=2).map(tuple)),
    calls,
)
def test_one_field_agrees_with_the_documentation(action, rule, call):
    """Fewer things at once, so that each one decides more often than in the test above."""
    one = [AuthorizationPolicy("shop", "p", action, None, (rule,), TARGETS)]
    assert compile_policies(one, 1).decide(*call).allowed is naive_decision(one, call)


@pytest.mark.parametrize(
    ("fields", "request_", "wanted"),
    [
        ({"methods": ("DELETE",)}, http("DELETE"), True),
        ({"methods": ("DELETE",)}, http("GET"), False),
        ({"methods": ("DELETE",)}, http("delete"), False),
        ({"not_methods": ("GET", "HEAD")}, http("POST"), True),
        ({"paths": ("/admin*",)}, http(target="/admin"), True),
        ({"paths": ("/admin*",)}, http(target="//admin/x"), True),
        ({"paths": ("/admin*",)}, http(target="/%61dmin"), True),
        ({"paths": ("/admin*",)}, http(target="/public/../admin"), True),
        ({"paths": ("/admin*",)}, http(target="/public?/admin"), False),
        ({"paths": ("/admin",)}, http(target="/admin?x=1"), True),
        # As docs/resources.md says, and what to do about it.
        ({"paths": ("/admin", "/admin/*")}, http(target="/admin;x=1"), False),
        ({"paths": ("/admin", "/admin/*", "/admin;*")}, http(target="/%61dmin;x=1"), True),
        ({"paths": ("/a:b",)}, http(target="/a%3ab"), False),
        ({"paths": ("/a:b", "/a%3Ab")}, http(target="/a%3ab"), True),
        ({"paths": ("*/info",)}, http(target="/a/info"), True),
        ({"paths": ("//admin",)}, http(target="/admin"), True),
        ({"not_paths": ("/health",)}, http(target="/x"), True),
        ({"hosts": ("shop.io",)}, http(host="Shop.IO"), True),
        ({"hosts": ("shop.io",)}, http(host="shop.io:8080"), True),
        ({"hosts": ("shop.io:*",)}, http(host="shop.io:8080"), True),
        ({"hosts": ("shop.io:80",)}, http(host="shop.io"), False),
        ({"hosts": ("shop.io",)}, http(host="shop.io."), True),
        ({"hosts": ("*.shop.io",)}, http(host="a.shop.io:1"), True),
        ({"hosts": ("*",)}, http(host=""), False),
        ({"not_hosts": ("*",)}, http(host=""), True),
        ({"methods": ("GET",), "paths": ("/a",)}, http("GET", "/b"), False),
        # Istio's examples of templates, and what is near them.
        ({"paths": ("/foo/{*}",)}, http(target="/foo/bar"), True),
        ({"paths": ("/foo/{*}",)}, http(target="/foo/bar/baz"), False),
        ({"paths": ("/foo/{*}",)}, http(target="/foo/"), False),
        ({"paths": ("/foo/{**}",)}, http(target="/foo/bar/baz.txt"), True),
        ({"paths": ("/foo/{**}",)}, http(target="/foo/"), True),
        ({"paths": ("/foo/{**}",)}, http(target="/foo"), False),
        ({"paths": ("/foo/{**}/",)}, http(target="/foo/bar"), False),
        ({"paths": ("/foo/{**}/",)}, http(target="/foo/bar/"), True),
        ({"paths": ("/foo/{*}/bar/{**}",)}, http(target="/foo/buzz/bar/baz"), True),
        ({"paths": ("/foo/{*}/bar/{**}",)}, http(target="/foo/a/b/bar/baz"), False),
        ({"paths": ("/a.b/{*}",)}, http(target="/a.b/c"), True),
        ({"paths": ("/a.b/{*}",)}, http(target="/axb/c"), False),
        ({"paths": ("/x", "/users/{*}/mail")}, http(target="/users/%61nn//mail"), True),
        ({"not_paths": ("/health/{**}",)}, http(target="/health/live"), False),
    ],
)
def test_operations(fields, request_, wanted):
    assert matches(to(**fields), request_) is wanted


@pytest.mark.parametrize(
    ("rule", "lines", "allow", "deny"),
    [
        (when("x", ["1"]), [b"1"], True, True),
        (when("x", ["1"]), [], False, False),
        (when("x", ["*"]), [b""], True, True),
        (when("x", ["1"]), [b"1", b"2"], False, True),  # a DENY is not talked away by a second line
        (when("x", ["1"]), [b"2, 1"], False, True),
        (when("x", ["1"]), [b"1", b"1"], False, True),
        (when("x", ["1,2"]), [b"1", b"2"], True, True),
        (when("x", not_values=["1"]), [], True, True),
        (when("x", not_values=["1"]), [b"2"], True, True),
        (when("x", not_values=["1"]), [b"1"], False, False),
        (when("x", not_values=["1"]), [b"1", b"2"], False, True),  # nor is an ALLOW but for 1
    ],
)
def test_headers(rule, lines, allow, deny):
    request = http("GET", "/", "h", *((b"x", line) for line in lines))
    assert allowed(policy("ALLOW", rule), request=request) is allow
    assert allowed(policy("DENY", rule), request=request) is not deny


@pytest.mark.parametrize(
    ("action", "rule", "port", "wanted"),
    [
        ("ALLOW", to(methods=("GET",)), 80, False),
        ("ALLOW", to(not_methods=("GET",)), 80, False),
        ("ALLOW", to(ports=(80,)), 80, True),
        ("ALLOW", to(ports=(80,), methods=("GET",)), 80, False),
        ("ALLOW", Rule(operations=(Operation(ports=(80,)), Operation(methods=("GET",)))), 80, False),
        ("ALLOW", when("x", not_values=["1"]), 80, False),
        ("DENY", to(methods=("GET",)), 80, False),
        ("DENY", to(ports=(80,), methods=("GET",)), 80, False),
        ("DENY", to(ports=(80,), methods=("GET",)), 81, True),
        ("DENY", when("x", ["1"]), 80, False),
        ("DENY", Rule((Source(namespaces=("data",)),), (Operation(paths=("/x",)),)), 80, True),
    ],
)
def test_a_connection_that_is_not_http(action, rule, port, wanted):
    """Nothing is known of it: a DENY for HTTP holds as far as it can be told, and an ALLOW for HTTP does not."""
    assert allowed(policy(action, rule), port=port) is wanted


def test_decisions_name_their_rule():
    compiled = compile_policies(
        [policy("ALLOW", to(methods=("PUT",)), to(methods=("GET",)), name="a"), policy("DENY", to(paths=("/x",)))]
    )

    def decide(request):
        decision = compiled.decide(WEB, CALLER, VIP, 80, request)
        return decision.allowed, decision.policy, decision.reason

    assert decide(http("GET", "/")) == (True, "shop/a[1]", "allowed by shop/a[1]")
    assert decide(http("GET", "/x")) == (False, "shop/p[0]", "denied by shop/p[0]")
    assert decide(http("DELETE", "/")) == (False, "", "no ALLOW policy matched (shop/a)")
    assert compile_policies([]).decide(None, CALLER, VIP, 80, http()).reason.startswith("no ALLOW policy selects")


@pytest.mark.parametrize(
    ("source", "user", "wanted"),
    [
        (Source(request_principals=("*",)), None, False),
        (Source(request_principals=("*",)), "ann", True),
        (Source(request_principals=("accounts/*",)), "ann", True),
        (Source(request_principals=("accounts/ben",)), "ann", False),
        (Source(not_request_principals=("*",)), None, True),
        (Source(not_request_principals=("*",)), "ann", False),
        (Source(not_request_principals=("accounts/ben",)), "ann", True),
        (Source(not_request_principals=("accounts/ann",)), "ann", False),
    ],
)
def test_request_principals(source, user, wanted):
    token = Token({}, f"accounts/{user}") if user else None
    for action in (Action.ALLOW, Action.DENY):
        verdict = compile_policies([policy(action.value, Rule((source,)))]).decide(WEB, CALLER, VIP, 80, http(), token)
        assert verdict.allowed is (wanted is (action is Action.ALLOW))


@pytest.mark.parametrize(
    ("trusted", "said", "wanted"),
    [
        (0, [], "10.0.0.1"),
        (0, [b"6.6.6.6"], "10.0.0.1"),  # anybody writes it
        (1, [], "10.0.0.1"),  # who comes past the proxy is who connects
        (1, [b"6.6.6.6"], "6.6.6.6"),
        (1, [b"9.9.9.9, 6.6.6.6"], "6.6.6.6"),
        (1, [b"9.9.9.9", b"6.6.6.6"], "6.6.6.6"),
        (2, [b"6.6.6.6"], "10.0.0.1"),
        (2, [b"9.9.9.9,6.6.6.6 ,7.7.7.7"], "6.6.6.6"),
        (1, [b"6.6.6.6:4711"], "6.6.6.6"),
        (1, [b"fd00::6"], "fd00::6"),
        (1, [b"[fd00::6]:80"], "fd00::6"),
        (1, [b"::ffff:6.6.6.6"], "6.6.6.6"),
    ],
)
def test_remote_addresses(trusted, said, wanted):
    request = http("GET", "/", "h", *((b"x-forwarded-for", line) for line in said))
    block = parse_block(wanted)
    sources = Rule((Source(remote_ip_blocks=(block,)),))
    conditions = Rule(conditions=(Condition(ConditionKey.REMOTE_IP, (block,)),))
    not_sources = Rule((Source(not_remote_ip_blocks=(block,)),))
    for rule_, holds in ((sources, True), (conditions, True), (not_sources, False)):
        for action in (Action.ALLOW, Action.DENY):
            compiled = compile_policies([policy(action.value, rule_)], trusted)
            allowed_ = compiled.decide(WEB, CALLER, VIP, 80, request).allowed
            assert allowed_ is (holds is (action is Action.ALLOW))


@pytest.mark.parametrize("said", ["unknown", "", "6.6.6.6.6", "_hidden", "[6.6.6.6", "6.6.6.6 7.7.7.7", "1:2:3"])
@pytest.mark.parametrize("action", [Action.ALLOW, Action.DENY])
def test_a_trusted_proxy_that_says_no_address_is_refused(said, action):
    """Neither side of a rule may be the one that lets it through."""
    for source in (Source(remote_ip_blocks=(parse_block("0.0.0.0/0"),)), Source(not_remote_ip_blocks=("::/0",))):
        compiled = compile_policies([policy(action.value, Rule((source,)))], 1)
        request = http("GET", "/", "h", (b"x-forwarded-for", said.encode()))
        decision = compiled.decide(WEB, CALLER, VIP, 80, request)
        assert not decision.allowed
        assert decision.reason.startswith("x-forwarded-for has no address")


@pytest.mark.parametrize(
    ("trusted", "said", "wanted"),
    [
        (0, "6.6.6.6", "10.0.0.1"),
        (1, None, "10.0.0.1"),
        (1, "9.9.9.9, 6.6.6.6", "6.6.6.6, 10.0.0.1"),
        (2, "9.9.9.9,6.6.6.6", "9.9.9.9, 6.6.6.6, 10.0.0.1"),
        (2, "6.6.6.6", "10.0.0.1"),
    ],
)
def test_only_what_trusted_proxies_wrote_goes_on(trusted, said, wanted):
    assert extended(said, CALLER, trusted) == wanted


def test_an_audit_policy_is_told_and_decides_nothing():
    audit = policy("AUDIT", to(methods=("PUT",)), to(paths=("/x",)), name="a")
    deny = policy("DENY", to(methods=("PUT",)))
    compiled = compile_policies([audit, deny])

    def decide(request):
        decision = compiled.decide(WEB, CALLER, VIP, 80, request)
        return decision.allowed, decision.audit, decision.policy

    assert decide(http("GET", "/x")) == (True, "shop/a[1]", "")
    assert decide(http("PUT", "/x")) == (False, "shop/a[0]", "shop/p[0]")
    assert decide(http("GET", "/")) == (True, "", "")


def test_what_a_custom_policy_matches_is_refused_where_nobody_can_be_asked():
    compiled = compile_policies([policy("CUSTOM", to(methods=("PUT",)), to(ports=(81,)))])
    assert compiled.decide(WEB, CALLER, VIP, 80, None).policy == "shop/p[0]"
    assert "nobody can be asked" in compiled.decide(WEB, CALLER, VIP, 80, None).reason
    only_http = compile_policies([policy("CUSTOM", to(ports=(81,)))])
    assert only_http.decide(WEB, CALLER, VIP, 80, None).allowed
    # About a request somebody else decides.
    assert [check.rule for check in compiled.checks(WEB, CALLER, VIP, 80, http("PUT"))] == ["shop/p[0]"]
    assert compiled.checks(WEB, CALLER, VIP, 80, http("GET")) == ()
