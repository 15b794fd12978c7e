"""Patterns, canonical values and the scope of policies."""

from __future__ import annotations

import fnmatch
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.policy import (
    Action,
    AuthorizationPolicy,
    Condition,
    ConditionKey,
    Operation,
    Rule,
    Target,
    applies,
    canonical_namespace,
    canonical_principal,
    canonical_value,
    parse_port,
    pattern_matches,
)

words = st.text("ab/", max_size=4)
patterns = st.one_of(words.filter(bool), words.map(lambda w: w + "*"), words.map(lambda w: "*" + w))


@given(patterns, words)
def test_patterns_match_as_a_file_glob_does(pattern, name):
    assert pattern_matches(pattern, name) is fnmatch.fnmatchcase(name, pattern)


@pytest.mark.parametrize("text", ["", "a*b", "**", "*a*", "a**"])
def test_other_patterns_are_refused(text):
    for canonical in (canonical_principal, canonical_namespace):
        with pytest.raises(ValueError, match=r"pattern|'\*' may stand once"):
            canonical(text)


def test_a_principal_may_be_written_as_a_uri():
    assert canonical_principal("spiffe://cluster.local/ns/a/sa/b") == "cluster.local/ns/a/sa/b"
    assert canonical_principal("spiffe://cluster.local/*") == "cluster.local/*"


@pytest.mark.parametrize("text", ["web", "ns/a/sa/b", "cluster.local/ns/a", "spiffe:/x", "Cluster.local/ns/a/sa/b"])
def test_a_principal_that_could_match_nobody_is_refused(text):
    with pytest.raises(ValueError, match="is no principal; write <trust domain>"):
        canonical_principal(text)


@pytest.mark.parametrize(
    ("key", "text", "canonical"),
    [
        (ConditionKey.SOURCE_IP, "10.0.0.1", "10.0.0.1/32"),
        (ConditionKey.DESTINATION_IP, "FD00::/8", "fd00::/8"),
        (ConditionKey.DESTINATION_PORT, "080", "80"),
        (ConditionKey.SOURCE_NAMESPACE, "shop", "shop"),
        (ConditionKey.SOURCE_PRINCIPAL, "spiffe://a/ns/b/sa/c", "a/ns/b/sa/c"),
    ],
)
def test_condition_values_have_one_form(key, text, canonical):
    assert canonical_value(key, text) == canonical
    assert canonical_value(key, canonical) == canonical


@pytest.mark.parametrize("text", ["", "0", "65536", "-1", "+1", "1.0", "http", "0x50", " 80", "²", "1" * 9])
def test_what_is_no_port_is_refused(text):
    with pytest.raises(ValueError, match="is not a port from 1 to 65535"):
        parse_port(text)


@given(
    st.sampled_from(["shop", "root"]),
    st.none() | st.just({}) | st.just({"app": "web"}),
    st.sampled_from(["shop", "bank"]),
)
def test_a_policy_applies_to_its_namespace_or_from_the_root_to_all(scope, selector, namespace):
    policy = AuthorizationPolicy(scope, "p", Action.DENY, selector, ())
    in_scope = scope in ("root", namespace)
    assert applies(policy, namespace, {"app": "web", "x": "y"}, "root") is in_scope
    assert applies(policy, namespace, {"app": "db"}, "root") is (in_scope and not selector)


def test_a_policy_with_targets_selects_no_workload():
    policy = AuthorizationPolicy("shop", "p", Action.DENY, None, (Rule(),), (Target("Service", "shop/web"),))
    assert not applies(policy, "shop", {}, "mesh-system")
    assert applies(replace(policy, targets=()), "shop", {}, "mesh-system")


@pytest.mark.parametrize(
    ("rule", "asks"),
    [
        (Rule(), False),
        (Rule(operations=(Operation(ports=(80,)),)), False),
        (Rule(conditions=(Condition(ConditionKey.SOURCE_IP, ("10.0.0.0/8",)),)), False),
        *((Rule(operations=(Operation(**{field: ("x",)}),)), True) for field in ("hosts", "not_hosts", "methods")),
        *((Rule(operations=(Operation(**{field: ("x",)}),)), True) for field in ("not_methods", "paths", "not_paths")),
        (Rule(conditions=(Condition(ConditionKey.REQUEST_HEADERS, ("x",), (), "x"),)), True),
    ],
)
def test_a_rule_asks_for_http_or_not(rule, asks):
    assert rule.asks_http == asks
    assert AuthorizationPolicy("shop", "p", Action.ALLOW, None, (Rule(), rule)).asks_http == asks
