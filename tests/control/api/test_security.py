"""Policies from YAML: every L4 field read, every field that needs a waypoint or weakens the mesh refused by name."""

from __future__ import annotations

import pytest

from control.api.declared import DeclaredPeerAuthentication, DeclaredPolicy
from control.api.policy import (
    Action,
    AuthorizationPolicy,
    Condition,
    ConditionKey,
    MtlsMode,
    Operation,
    PeerAuthentication,
    Rule,
    Source,
)
from control.api.problems import ResourceErrors
from control.api.resources import parse

WEB = "cluster.local/ns/shop/sa/web"


def policy(spec):
    text = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\n" + spec
    (found,) = parse(text, "f.yaml")
    assert isinstance(found, DeclaredPolicy)
    return found.policy


def peer(spec):
    text = (
        "apiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\nmetadata: {name: p, namespace: shop}\n" + spec
    )
    (found,) = parse(text, "f.yaml")
    assert isinstance(found, DeclaredPeerAuthentication)
    return found.peer_authentication


def refusals(read, spec):
    with pytest.raises(ResourceErrors) as caught:
        read(spec)
    return [str(error).removeprefix("f.yaml:") for error in caught.value.errors]


def test_every_field_of_a_policy():
    spec = f"""\
spec:
  action: DENY
  selector: {{matchLabels: {{app: web}}}}
  rules:
  - from:
    - source: {{principals: [{WEB}, spiffe://{WEB}, 'cluster.local/*'], notPrincipals: ['*/sa/x']}}
    - source: {{namespaces: [shop], notNamespaces: ['x*'], ipBlocks: [10.0.0.0/8, 10.1.2.3], notIpBlocks: ['fd00::/8']}}
    - source: {{serviceAccounts: [web, bank/teller], notServiceAccounts: [db]}}
    to:
    - operation: {{ports: ["80", "443"], notPorts: ["81"]}}
    when:
    - {{key: source.ip, values: [10.0.0.1]}}
    - {{key: source.namespace, values: [shop], notValues: [bank]}}
    - {{key: source.principal, notValues: [spiffe://{WEB}]}}
    - {{key: destination.ip, values: [10.0.0.0/24]}}
    - {{key: destination.port, values: ["080"]}}
  - {{}}
"""
    assert policy(spec) == AuthorizationPolicy(
        namespace="shop",
        name="p",
        action=Action.DENY,
        selector={"app": "web"},
        rules=(
            Rule(
                sources=(
                    Source(principals=(WEB, WEB, "cluster.local/*"), not_principals=("*/sa/x",)),
                    Source(
                        namespaces=("shop",),
                        not_namespaces=("x*",),
                        ip_blocks=("10.0.0.0/8", "10.1.2.3/32"),
                        not_ip_blocks=("fd00::/8",),
                    ),
                    Source(principals=("*/ns/shop/sa/web", "*/ns/bank/sa/teller"), not_principals=("*/ns/shop/sa/db",)),
                ),
                operations=(Operation(ports=(80, 443), not_ports=(81,)),),
                conditions=(
                    Condition(ConditionKey.SOURCE_IP, values=("10.0.0.1/32",)),
                    Condition(ConditionKey.SOURCE_NAMESPACE, values=("shop",), not_values=("bank",)),
                    Condition(ConditionKey.SOURCE_PRINCIPAL, not_values=(WEB,)),
                    Condition(ConditionKey.DESTINATION_IP, values=("10.0.0.0/24",)),
                    Condition(ConditionKey.DESTINATION_PORT, values=("80",)),
                ),
            ),
            Rule(),
        ),
    )


def test_an_empty_spec_allows_nobody():
    assert policy("spec: {}") == AuthorizationPolicy("shop", "p", Action.ALLOW, None, ())


RULE = "spec:\n  rules:\n  - "
L7_SOURCE = ["requestPrincipals", "notRequestPrincipals", "remoteIpBlocks", "notRemoteIpBlocks"]
L7_OPERATION = ["hosts", "notHosts", "methods", "notMethods", "paths", "notPaths"]
L7_KEYS = [
    "request.headers[x]",
    "request.auth.claims[iss]",
    "connection.sni",
    "remote.ip",
    "experimental.envoy.filters.a",
]


@pytest.mark.parametrize("field", L7_SOURCE)
def test_a_source_that_only_a_waypoint_sees_is_refused_by_name(field):
    (error,) = refusals(policy, f"{RULE}from: [{{source: {{{field}: [x]}}}}]")
    assert error.startswith(f"6: spec.rules[0].from[0].source.{field}: is refused: needs a waypoint; an L4 proxy")


@pytest.mark.parametrize("field", L7_OPERATION)
def test_an_operation_that_only_a_waypoint_sees_is_refused_by_name(field):
    (error,) = refusals(policy, f"{RULE}to: [{{operation: {{{field}: [x]}}}}]")
    assert error.startswith(f"6: spec.rules[0].to[0].operation.{field}: is refused: needs a waypoint; an L4 proxy")


@pytest.mark.parametrize("key", L7_KEYS)
def test_a_condition_that_only_a_waypoint_sees_is_refused_by_name(key):
    (error,) = refusals(policy, f'{RULE}when: [{{key: "{key}", values: [x]}}]')
    assert error.startswith(f"6: spec.rules[0].when[0].key: {key!r} is refused: needs a waypoint; an L4 proxy")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", "1: spec: is missing; it must be a mapping; `spec: {}` allows nobody"),
        ("spec: {action: CUSTOM}", "4: spec.action: CUSTOM is refused: external authorisation is not there"),
        ("spec: {action: AUDIT}", "4: spec.action: AUDIT is refused: auditing is not there; write ALLOW or DENY"),
        ("spec: {action: deny}", "4: spec.action: 'deny' must be ALLOW or DENY"),
        ("spec: {action: ''}", "4: spec.action: '' must be ALLOW or DENY"),
        ("spec: {provider: {name: x}}", "4: spec.provider: is refused: external authorisation"),
        ("spec: {targetRef: {kind: Gateway, name: w}}", "4: spec.targetRef: is refused: it names a waypoint"),
        ("spec: {targetRefs: []}", "4: spec.targetRefs: is refused: it names a waypoint"),
        ("spec: {selector: {}}", "4: spec.selector: has no matchLabels"),
        ("spec: {selector: {matchLabels: {}}}", "4: spec.selector.matchLabels: names no label"),
        ("spec: {selector: {matchLabels: {app: 'w*'}}}", "4: spec.selector.matchLabels.app: 'w*': a label's value"),
        ("spec: {selector: {matchExpressions: []}}", "4: spec.selector.matchExpressions: is refused: only matchLabels"),
        ("spec: {selector: {app: web}}", "4: spec.selector.app: unknown field"),
        ("spec: {rules: []}", "4: spec.rules: is an empty list; give it an item or remove the field"),
        ("spec: {rules: }", "4: spec.rules: is empty; give it a value or remove it"),
        (f"{RULE}from:", "6: spec.rules[0].from: is empty; give it a value or remove it"),
        (f"{RULE}from: []", "6: spec.rules[0].from: is an empty list"),
        (f"{RULE}form: []", "6: spec.rules[0].form: unknown field; known here: from, to, when (did you mean 'from'?)"),
        (f"{RULE}from: [{{}}]", "6: spec.rules[0].from[0].source: is missing"),
        (f"{RULE}from: [{{source: {{}}}}]", "6: spec.rules[0].from[0].source: names nothing; a rule without `from` me"),
        (f"{RULE}from: [{{principals: [{WEB}]}}]", "6: spec.rules[0].from[0].principals: unknown field"),
        (
            f"{RULE}from: [{{source: {{principals: []}}}}]",
            "6: spec.rules[0].from[0].source.principals: is an empty list",
        ),
        (f"{RULE}from: [{{source: {{principals: {WEB}}}}}]", "source.principals: must be a list, not the text"),
        (
            f"{RULE}from: [{{source: {{principals: [web]}}}}]",
            "source.principals[0]: 'web' is no principal; write <trust",
        ),
        (f"{RULE}from: [{{source: {{principals: ['']}}}}]", "source.principals[0]: an empty pattern matches nothing"),
        (
            f"{RULE}from: [{{source: {{principals: ['a*b']}}}}]",
            "principals[0]: 'a*b': '*' may stand once, at the begin",
        ),
        (f"{RULE}from: [{{source: {{principals: ['*a*']}}}}]", "principals[0]: '*a*': '*' may stand once"),
        (f"{RULE}from: [{{source: {{namespaces: [Shop]}}}}]", "source.namespaces[0]: 'Shop' must be"),
        (
            f"{RULE}from: [{{source: {{serviceAccounts: ['w*']}}}}]",
            "serviceAccounts[0]: 'w*' must be a service account",
        ),
        (f"{RULE}from: [{{source: {{serviceAccounts: [a/b/c]}}}}]", "serviceAccounts[0]: 'a/b/c' must be a service"),
        (
            f"{RULE}from: [{{source: {{serviceAccounts: [a], namespaces: [b]}}}}]",
            "source.serviceAccounts: cannot stand beside namespaces; write one of them",
        ),
        (
            f"{RULE}from: [{{source: {{ipBlocks: [10.0.0.1/8]}}}}]",
            "ipBlocks[0]: '10.0.0.1/8' has bits set beyond its pr",
        ),
        (f"{RULE}from: [{{source: {{ipBlocks: [x]}}}}]", "ipBlocks[0]: 'x' is not a CIDR block (such as 10.0.0.0/8)"),
        (f"{RULE}to: [{{operation: {{}}}}]", "to[0].operation: names nothing; a rule without `to` means every port"),
        (
            f"{RULE}to: [{{operation: {{ports: [80]}}}}]",
            'ports[0]: must be text, not the number 80; write it in quotes: "80"',
        ),
        (f"{RULE}to: [{{operation: {{ports: ['0']}}}}]", "ports[0]: '0' is not a port from 1 to 65535"),
        (f"{RULE}to: [{{operation: {{ports: ['65536']}}}}]", "ports[0]: '65536' is not a port from 1 to 65535"),
        (f"{RULE}to: [{{operation: {{ports: ['http']}}}}]", "ports[0]: 'http' is not a port from 1 to 65535"),
        (
            f"{RULE}when: [{{key: source.ip}}]",
            "6: spec.rules[0].when[0]: asks nothing of source.ip; write values or not",
        ),
        (f"{RULE}when: [{{values: [x]}}]", "when[0].key: is missing; it must be one of source.ip, source.namespace"),
        (
            f"{RULE}when: [{{key: source.ipp, values: [x]}}]",
            "key: 'source.ipp' is not known; known: source.ip, ",
        ),
        (f"{RULE}when: [{{key: source.ip, values: [x]}}]", "when[0].values[0]: 'x' is not a CIDR block"),
        (f"{RULE}when: [{{key: destination.port, values: [x]}}]", "when[0].values[0]: 'x' is not a port"),
    ],
)
def test_each_bad_policy_is_refused_with_its_place_and_its_mend(spec, expected):
    found = refusals(policy, spec)
    assert [error for error in found if expected in error], found


def test_every_field_of_a_peer_authentication():
    spec = "spec: {selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: UNSET}}}"
    expected = PeerAuthentication("shop", "p", {"app": "web"}, MtlsMode.STRICT, {8080: MtlsMode.UNSET})
    assert peer(spec) == expected
    assert peer("spec: {}") == PeerAuthentication("shop", "p", None, MtlsMode.UNSET, {})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("spec: {mtls: {mode: PERMISSIVE}}", "4: spec.mtls.mode: PERMISSIVE is refused: it would let plaintext in"),
        (
            "spec: {mtls: {mode: DISABLE}}",
            "4: spec.mtls.mode: DISABLE is refused: it would let plaintext in, and this mes",
        ),
        ("spec: {mtls: {mode: strict}}", "4: spec.mtls.mode: 'strict' must be STRICT or UNSET"),
        ("spec: {mtls: {mdoe: STRICT}}", "4: spec.mtls.mdoe: unknown field; known here: mode (did you mean 'mode'?)"),
        ("spec: {mtls: STRICT}", "4: spec.mtls: must be a mapping, not the text 'STRICT'"),
        ("spec: {portLevelMtls: {8080: {mode: STRICT}}}", "4: spec.portLevelMtls: needs a selector"),
        (
            "spec: {selector: {matchLabels: {a: b}}, portLevelMtls: {http: {mode: STRICT}}}",
            "4: spec.portLevelMtls.http: 'http' is not a port",
        ),
        (
            "spec: {selector: {matchLabels: {a: b}}, portLevelMtls: {80: {mode: DISABLE}}}",
            "4: spec.portLevelMtls.80.mode: DISABLE is refused",
        ),
        ("", "1: spec: is missing"),
    ],
)
def test_each_bad_peer_authentication_is_refused(spec, expected):
    found = refusals(peer, spec)
    assert [error for error in found if expected in error], found
