"""The compiled policies against a naive reading of Istio's documentation, and cases that people rely on."""

import ipaddress
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from control.api.address import parse_address, parse_block
from control.api.identity import SpiffeId, TrustDomain
from control.api.policy import (
    Action,
    AuthorizationPolicy,
    Condition,
    ConditionKey,
    Operation,
    Rule,
    Source,
)
from control.api.workload import Workload
from tests.support.certificates import DB
from uproxy import authz
from uproxy.admission import Admission
from uproxy.authz import Relayed, compile_policies

WEB = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/web")
A = parse_address("10.0.0.1")
B = parse_address("10.0.0.2")


def policy(action: str, *rules: Rule, name: str = "p") -> AuthorizationPolicy:
    return AuthorizationPolicy("shop", name, Action(action), None, rules)


def allowed(*policies: AuthorizationPolicy, source=WEB, source_ip=A, destination_ip=B, port=80) -> bool:
    return compile_policies(policies).decide(source, source_ip, destination_ip, port).allowed


REFUSING = (Action.DENY, Action.CUSTOM)
"""Nobody can be asked at a uProxy."""

# The documentation, read literally.
# https://istio.io/latest/docs/reference/config/security/authorization-policy/


def naive_decision(policies, source, source_ip, destination_ip, port) -> bool:
    call = (source, source_ip, destination_ip, port)
    # "2. If there are any DENY policies that match the request, deny the request."
    if any(p.action in REFUSING and naive_policy(p, call) for p in policies):
        return False
    # "3. If there are no ALLOW policies for the workload, allow the request."
    if not any(p.action is Action.ALLOW for p in policies):
        return True
    # "4. If any of the ALLOW policies match the request, allow the request." "5. Deny the request."
    return any(p.action is Action.ALLOW and naive_policy(p, call) for p in policies)


def naive_policy(policy, call) -> bool:
    # "A match occurs when at least one rule matches the request." "If not set, the match will never occur."
    return any(naive_rule(rule, call) for rule in policy.rules)


def naive_rule(rule, call) -> bool:
    # "at least one source, one operation and all conditions matches the request."
    # "An empty rule is always matched."
    # "If not set, any source is allowed." ... "any operation is allowed." ... "any condition is allowed."
    if rule.sources and not any(naive_source(source, call) for source in rule.sources):
        return False
    if rule.operations and not any(naive_operation(operation, call) for operation in rule.operations):
        return False
    return all(naive_condition(condition, call) for condition in rule.conditions)


def naive_source(source, call) -> bool:
    # "Fields in the source are ANDed together."
    identity, source_ip, _, _ = call
    principal = None if identity is None else str(identity).removeprefix("spiffe://")
    namespace = None if identity is None else identity.namespace
    if source.principals and not naive_texts(source.principals, principal):
        return False
    if source.not_principals and naive_texts(source.not_principals, principal):
        return False
    if source.namespaces and not naive_texts(source.namespaces, namespace):
        return False
    if source.not_namespaces and naive_texts(source.not_namespaces, namespace):
        return False
    if source.ip_blocks and not naive_blocks(source.ip_blocks, source_ip):
        return False
    return not (source.not_ip_blocks and naive_blocks(source.not_ip_blocks, source_ip))


def naive_operation(operation, call) -> bool:
    # "Fields in the operation are ANDed together."
    port = call[3]
    if operation.ports and port not in operation.ports:
        return False
    return not (operation.not_ports and port in operation.not_ports)


def naive_condition(condition, call) -> bool:
    identity, source_ip, destination_ip, port = call

    def among(values) -> bool:
        match condition.key:
            case ConditionKey.SOURCE_IP:
                return naive_blocks(values, source_ip)
            case ConditionKey.DESTINATION_IP:
                return naive_blocks(values, destination_ip)
            case ConditionKey.DESTINATION_PORT:
                return str(port) in values
            case ConditionKey.SOURCE_NAMESPACE:
                return naive_texts(values, None if identity is None else identity.namespace)
            case ConditionKey.SOURCE_PRINCIPAL:
                return naive_texts(values, None if identity is None else identity.principal)

    if condition.values and not among(condition.values):
        return False
    return not (condition.not_values and among(condition.not_values))


def naive_texts(patterns, value) -> bool:
    """`abc`, `abc*`, `*abc`, and `*`: "will match when value is not empty"."""
    if value is None:
        return False
    for pattern in patterns:
        if pattern == "*":
            if value != "":
                return True
        elif pattern.startswith("*"):
            if value[len(value) - len(pattern) + 1 :] == pattern[1:] and len(value) >= len(pattern) - 1:
                return True
        elif pattern.endswith("*"):
            if value[: len(pattern) - 1] == pattern[:-1]:
                return True
        elif value == pattern:
            return True
    return False


def naive_blocks(blocks, address) -> bool:
    if address is None:
        return False
    ip = ipaddress.ip_address(address)
    return any(ip in ipaddress.ip_network(block) for block in blocks)


# Small vocabularies, so that matches and misses are both common.

NAMESPACES = ["shop", "shop2", "web", "b"]
ACCOUNTS = ["web", "webshop", "b"]
DOMAINS = [TrustDomain("cluster.local"), TrustDomain("b")]
ADDRESSES = ["10.0.0.1", "10.0.0.2", "10.0.1.1", "0.0.0.1", "::1", "::a00:1", "fd00::1", "fd00::2", "fd01::1"]
PORTS = [80, 8080, 1, 65535]

identities = st.builds(SpiffeId, st.sampled_from(DOMAINS), st.sampled_from(NAMESPACES), st.sampled_from(ACCOUNTS))
addresses = st.sampled_from(ADDRESSES).map(parse_address)
blocks = st.builds(
    lambda address, length: parse_block(
        str(ipaddress.ip_network(f"{address}/{min(length, 128 if ':' in address else 32)}", strict=False))
    ),
    st.sampled_from(ADDRESSES),
    st.sampled_from([0, 1, 8, 24, 31, 32, 33, 64, 96, 112, 127, 128]),
)


def patterns_over(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    def cut(value: str, at: int, kind: str) -> str:
        at %= len(value) + 1
        return {"exact": value, "prefix": value[:at] + "*", "suffix": "*" + value[at:], "any": "*"}[kind]

    return st.builds(cut, values, st.integers(0, 60), st.sampled_from(["exact", "exact", "prefix", "suffix", "any"]))


principals = patterns_over(identities.map(lambda identity: identity.principal))
namespaces = patterns_over(st.sampled_from(NAMESPACES))
ports = st.sampled_from(PORTS)


def some(values):
    return st.lists(values, max_size=2).map(tuple)


sources = st.builds(
    Source, some(principals), some(principals), some(namespaces), some(namespaces), some(blocks), some(blocks)
)
operations = st.builds(Operation, some(ports), some(ports))
conditions = st.one_of(
    st.builds(Condition, st.just(key), some(values), some(values))
    for key, values in {
        ConditionKey.SOURCE_IP: blocks,
        ConditionKey.DESTINATION_IP: blocks,
        ConditionKey.DESTINATION_PORT: ports.map(str),
        ConditionKey.SOURCE_NAMESPACE: namespaces,
        ConditionKey.SOURCE_PRINCIPAL: principals,
    }.items()
)
rules = st.builds(Rule, some(sources), some(operations), some(conditions))
policies = st.builds(
    AuthorizationPolicy,
    st.just("shop"),
    st.sampled_from("abc"),
    st.sampled_from(Action),
    st.none(),
    st.lists(rules, max_size=3).map(tuple),
)
calls = st.tuples(st.none() | identities, addresses, addresses, ports)


@settings(deadline=None)
@given(st.lists(policies, max_size=3), calls)
def test_compiled_policies_agree_with_the_documentation(given_policies, call):
    decision = compile_policies(given_policies).decide(*call)
    assert decision.allowed is naive_decision(given_policies, *call)
    assert bool(decision.audit) is any(p.action is Action.AUDIT and naive_policy(p, call) for p in given_policies)


@settings(deadline=None)
@given(st.lists(policies, max_size=3), st.lists(calls, min_size=2, max_size=20))
def test_what_was_decided_of_others_before_changes_nothing(given_policies, several):
    compiled = compile_policies(given_policies)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(authz, "MAX_DECIDED", 3)
        for call in several + several[::-1]:
            assert compiled.decide(*call) == compile_policies(given_policies).decide(*call)
            assert len(compiled._decided) <= 3


@settings(deadline=None)
@given(st.lists(policies, max_size=3), st.lists(policies, max_size=2), calls)
def test_policies_in_dry_run_decide_nothing(enforced, rehearsed, call):
    given_policies = [*enforced, *(replace(one, dry_run=True) for one in rehearsed)]
    assert compile_policies(given_policies).decide(*call) == compile_policies(enforced).decide(*call)


@settings(deadline=None)
@given(st.lists(policies, max_size=3), st.lists(policies, max_size=2), calls)
def test_a_rehearsal_decides_as_if_they_were_enforced(enforced, rehearsed, call):
    source, source_ip, destination_ip, port = call
    workload = Workload("shop", "db", "db", DB, (destination_ip,), {}, {}, "", 1)
    dry = [replace(one, dry_run=True) for one in rehearsed]
    one = Admission(workload, [*enforced, *dry], DB.trust_domain)
    assert (one.rehearsal is not None) is bool(dry)
    if one.rehearsal is not None and source is not None:
        would = one.rehearsal.decide(source, source_ip, None, destination_ip, port)
        assert would.allowed is naive_decision([*enforced, *rehearsed], *call)
        assert one.decide(source, source_ip, None, destination_ip, port).allowed is naive_decision(enforced, *call)


@settings(deadline=None)
@given(st.sampled_from(Action), rules, calls)
def test_one_rule_agrees_with_the_documentation(action, rule, call):
    """Fewer things at once, so that each one decides more often than in the test above."""
    one = [policy(action.value, rule)]
    assert compile_policies(one).decide(*call).allowed is naive_decision(one, *call)


@settings(deadline=None)
@given(
    st.one_of(
        *(st.builds(Source, **{name: st.lists(values, min_size=1, max_size=3).map(tuple)})
          for name, values in {
              "principals": principals, "not_principals": principals,
              "namespaces": namespaces, "not_namespaces": namespaces,
              "ip_blocks": blocks, "not_ip_blocks": blocks,
          }.items()),
    ),
    calls,
)  # fmt: skip
@example(Source(ip_blocks=(parse_block("10.0.0.1/32"),)), (None, parse_address("::a00:1"), B, 80))
@example(Source(not_ip_blocks=(parse_block("::/0"),)), (None, A, B, 80))
def test_each_source_field_alone_agrees_with_the_documentation(source, call):
    one = [policy("ALLOW", Rule(sources=(source,)))]
    assert compile_policies(one).decide(*call).allowed is naive_decision(one, *call)


@settings(deadline=None)
@given(st.lists(policies, max_size=4), calls, st.randoms(use_true_random=False))
def test_order_changes_nothing_not_even_the_policy_named(given_policies, call, random):
    unique = list({p.key: p for p in given_policies}.values())
    shuffled = unique[:]
    random.shuffle(shuffled)
    assert compile_policies(unique).decide(*call) == compile_policies(shuffled).decide(*call)


@settings(deadline=None)
@given(st.lists(policies, max_size=3), calls)
def test_the_policy_named_is_one_that_matches(given_policies, call):
    unique = [replace(p, name=f"p{i}") for i, p in enumerate(given_policies)]
    decision = compile_policies(unique).decide(*call)
    if decision.policy:
        key, _, index = decision.policy.rstrip("]").partition("[")
        named = next(p for p in unique if p.key == key)
        assert (named.action is Action.ALLOW) is decision.allowed
        assert naive_rule(named.rules[int(index)], call)
        assert decision.policy in decision.reason
    else:
        assert not any(naive_policy(p, call) for p in unique if p.action is not Action.AUDIT)


EVERYBODY = Rule()
FROM_SHOP = Rule(sources=(Source(namespaces=("shop",)),))
FROM_OTHER = Rule(sources=(Source(namespaces=("other",)),))


@pytest.mark.parametrize(
    ("deny", "allow", "wanted"),
    [
        (None, None, True),  # nothing selects the workload
        (None, [], False),  # an ALLOW without rules allows nobody
        (None, [EVERYBODY], True),
        (None, [FROM_SHOP], True),
        (None, [FROM_OTHER], False),
        (None, [FROM_OTHER, FROM_SHOP], True),
        ([], None, True),  # a DENY without rules denies nobody
        ([], [], False),
        ([], [FROM_SHOP], True),
        ([EVERYBODY], None, False),
        ([EVERYBODY], [EVERYBODY], False),  # DENY goes first, whatever is allowed
        ([FROM_SHOP], None, False),
        ([FROM_SHOP], [FROM_SHOP], False),
        ([FROM_OTHER], None, True),
        ([FROM_OTHER], [FROM_SHOP], True),
        ([FROM_OTHER], [FROM_OTHER], False),
    ],
)
def test_deny_goes_before_allow(deny, allow, wanted):
    given_policies = []
    if allow is not None:
        given_policies.append(policy("ALLOW", *allow, name="a"))
    if deny is not None:
        given_policies.append(policy("DENY", *deny, name="z"))  # sorts last: order of names must not decide
    assert allowed(*given_policies) is wanted


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (Source(principals=("*",)), False),
        (Source(not_principals=("*",)), True),
        (Source(principals=("cluster.local/ns/shop/sa/web",)), False),
        (Source(not_principals=("cluster.local/ns/shop/sa/web",)), True),
        (Source(namespaces=("*",)), False),
        (Source(namespaces=("",)), False),
        (Source(not_namespaces=("shop",)), True),
        (Source(ip_blocks=(parse_block("10.0.0.0/24"),)), True),
        (Source(not_namespaces=("shop",), ip_blocks=(parse_block("10.9.0.0/24"),)), False),
    ],
)
@pytest.mark.parametrize("action", ["ALLOW", "DENY"])
def test_a_caller_without_identity(action, source, wanted):
    """It matches no positive field of identity, so no ALLOW by name; and every negative one: DENY notX hits."""
    matched = allowed(policy(action, Rule(sources=(source,))), source=None) is (action == "ALLOW")
    assert matched is wanted


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("cluster.local/ns/shop/sa/web", True),
        ("cluster.local/ns/shop/sa/we", False),
        ("cluster.local/ns/shop/sa/web2", False),
        ("cluster.local/ns/shop/*", True),
        ("cluster.local/ns/sho*", True),
        ("cluster.local/ns/shop/sa/web*", True),
        ("cluster.local/ns/shop/sa/web2*", False),
        ("*/sa/web", True),
        ("*cluster.local/ns/shop/sa/web", True),
        ("*/sa/we", False),
        ("*xcluster.local/ns/shop/sa/web", False),
        ("*", True),
        ("*shop*", False),  # a suffix that ends in a star, as in Istio: no match in the middle
        ("spiffe://cluster.local/ns/shop/sa/web", False),  # the parser drops the scheme; here it is plain text
    ],
)
def test_principal_patterns(pattern, wanted):
    assert allowed(policy("ALLOW", Rule(sources=(Source(principals=(pattern,)),)))) is wanted
    also = ("nobody", pattern, "*nobody", "nobody*")
    assert allowed(policy("ALLOW", Rule(sources=(Source(principals=also),)))) is wanted
    assert allowed(policy("DENY", Rule(sources=(Source(not_principals=also),)))) is wanted


def test_decisions_name_their_rule():
    both = compile_policies([policy("ALLOW", FROM_OTHER, FROM_SHOP, name="a"), policy("DENY", FROM_OTHER, name="d")])
    decision = both.decide(WEB, A, B, 80)
    assert (decision.policy, decision.reason) == ("shop/a[1]", "allowed by shop/a[1]")
    other = SpiffeId.parse("spiffe://cluster.local/ns/other/sa/web")
    decision = both.decide(other, A, B, 80)
    assert (decision.policy, decision.reason) == ("shop/d[0]", "denied by shop/d[0]")
    decision = both.decide(None, A, B, 80)
    assert (decision.policy, decision.reason) == ("", "no ALLOW policy matched (shop/a)")
    decision = compile_policies([]).decide(None, A, B, 80)
    assert (decision.policy, decision.reason) == ("", "no ALLOW policy selects this workload")


def test_the_reason_stays_short():
    many = compile_policies(policy("ALLOW", name=f"p{i}") for i in range(1000))
    reason = many.decide(WEB, A, B, 80).reason
    assert reason == "no ALLOW policy matched (shop/p0, shop/p1, shop/p10, shop/p100, shop/p101 and 995 more)"


# docs/hbone.md section 4, read literally: connections that a bound waypoint makes for somebody.


def naive_relayed(policies, caller, caller_ip, waypoint, waypoint_ip, destination_ip, port) -> bool:
    of_caller = (caller, caller_ip, destination_ip, port)
    of_waypoint = (waypoint, waypoint_ip, destination_ip, port)
    for p in policies:
        if p.action in REFUSING:
            # "A DENY matches if caller or waypoint matches"; "header absent: ... a notPrincipals DENY does" match.
            if naive_policy(p, of_caller):
                return False
            # "the binding itself admits the waypoint": it is not of those that are denied for being none of some.
            if any(naive_rule(rule, of_waypoint) for rule in map(positive, p.rules) if rule is not None):
                return False
    allow = [p for p in policies if p.action is Action.ALLOW]
    if not allow:
        return True
    # "an ALLOW is judged on the caller"; "header absent: ... an ALLOW that names sources does not match".
    rules = [rule for p in allow for rule in p.rules]
    return any(naive_rule(rule, of_caller) for rule in (rules if caller else map(anonymous, rules)) if rule is not None)


def only(rule: Rule, names_source, conditional) -> Rule | None:
    """The rule without the sources that cannot match; None when it cannot match itself."""
    left = tuple(source for source in rule.sources if not names_source(source))
    of_source = (ConditionKey.SOURCE_IP, ConditionKey.SOURCE_NAMESPACE, ConditionKey.SOURCE_PRINCIPAL)
    if (rule.sources and not left) or any(conditional(c) for c in rule.conditions if c.key in of_source):
        return None
    return replace(rule, sources=left)


def positive(rule: Rule) -> Rule | None:
    return only(
        rule, lambda s: s.not_principals or s.not_namespaces or s.not_ip_blocks, lambda condition: condition.not_values
    )


def anonymous(rule: Rule) -> Rule | None:
    return only(rule, lambda s: s != Source(), lambda condition: condition.values or condition.not_values)


relayed_calls = st.one_of(
    st.tuples(identities, addresses, identities, addresses, addresses, ports),
    st.tuples(st.none(), st.none(), identities, addresses, addresses, ports),
)


@settings(deadline=None)
@given(st.lists(policies, max_size=3), relayed_calls)
def test_relayed_connections_agree_with_the_documentation(given_policies, call):
    assert Relayed(given_policies).decide(*call).allowed is naive_relayed(given_policies, *call)


@settings(deadline=None)
@given(st.sampled_from(Action), rules, relayed_calls)
def test_one_rule_on_relayed_connections_agrees_with_the_documentation(action, rule, call):
    one = [policy(action.value, rule)]
    assert Relayed(one).decide(*call).allowed is naive_relayed(one, *call)


WAYPOINT = SpiffeId.parse("spiffe://cluster.local/ns/infra/sa/wp")
FROM_WEB = Source(principals=(WEB.principal,))
NOT_FROM_WEB = Source(not_principals=(WEB.principal,))
FROM_WAYPOINT = Source(principals=(WAYPOINT.principal,))
OTHER = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/other")


@pytest.mark.parametrize(
    ("action", "source", "caller", "wanted"),
    [
        ("ALLOW", FROM_WEB, WEB, True),  # the binding admits the waypoint
        ("ALLOW", FROM_WEB, OTHER, False),
        ("ALLOW", FROM_WEB, None, False),
        ("ALLOW", FROM_WAYPOINT, OTHER, False),  # an ALLOW is judged on the caller
        ("ALLOW", FROM_WAYPOINT, None, False),
        ("ALLOW", NOT_FROM_WEB, OTHER, True),
        ("ALLOW", NOT_FROM_WEB, None, False),  # who calls is not known: it could be web
        ("ALLOW", Source(not_ip_blocks=(parse_block("10.9.0.0/16"),)), None, False),
        ("DENY", FROM_WEB, WEB, False),
        ("DENY", FROM_WEB, OTHER, True),
        ("DENY", FROM_WEB, None, True),
        ("DENY", FROM_WAYPOINT, WEB, False),
        ("DENY", NOT_FROM_WEB, WEB, True),
        ("DENY", NOT_FROM_WEB, OTHER, False),
        ("DENY", NOT_FROM_WEB, None, False),
        ("DENY", Source(ip_blocks=(parse_block("10.0.0.9/32"),)), WEB, False),  # the waypoint's address
    ],
)
def test_relayed_connections(action, source, caller, wanted):
    policies = [policy(action, Rule(sources=(source,)))]
    caller_ip = None if caller is None else A
    decision = Relayed(policies).decide(caller, caller_ip, WAYPOINT, parse_address("10.0.0.9"), B, 80)
    assert decision.allowed is wanted


def test_anybody_may_come_through_a_waypoint_when_no_source_is_named():
    policies = [policy("ALLOW", Rule(operations=(Operation(ports=(80,)),)))]
    for caller, ip in ((WEB, A), (None, None)):
        assert Relayed(policies).decide(caller, ip, WAYPOINT, A, B, 80).allowed
        assert not Relayed(policies).decide(caller, ip, WAYPOINT, A, B, 81).allowed
