"""Policies from YAML: every L4 field read, every field that needs a waypoint or weakens the mesh refused by name."""

from __future__ import annotations

from dataclasses import replace

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
    Target,
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


def annotated(value, spec="spec: {}"):
    text = (
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
        f"metadata: {{name: p, namespace: shop, annotations: {{istio.io/dry-run: {value}}}}}\n{spec}"
    )
    (found,) = parse(text, "f.yaml")
    return found.policy


def test_a_policy_may_be_in_dry_run():
    assert annotated("'true'") == replace(policy("spec: {}"), dry_run=True)
    assert annotated("'false'") == policy("spec: {}")
    at_waypoint = annotated("'true'", "spec: {targetRefs: [{kind: Service, name: web}]}")
    assert (at_waypoint.dry_run, at_waypoint.targets) == (True, (Target("Service", "shop/web"),))


@pytest.mark.parametrize("value", ["'yes'", "''"])
def test_a_dry_run_that_is_neither_is_refused(value):
    with pytest.raises(ResourceErrors, match=f"istio.io/dry-run.*{value} must be true or false"):
        annotated(value)


def test_an_empty_spec_allows_nobody():
    assert policy("spec: {}") == AuthorizationPolicy("shop", "p", Action.ALLOW, None, ())


RULE = "spec:\n  rules:\n  - "
L7_OPERATION = ["hosts", "notHosts", "methods", "notMethods", "paths", "notPaths"]


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("requestPrincipals", "needs a waypoint; an L4 proxy"),
        ("notRequestPrincipals", "needs a waypoint; an L4 proxy"),
        ("remoteIpBlocks", "needs a waypoint; an L4 proxy"),
        ("notRemoteIpBlocks", "needs a waypoint; an L4 proxy"),
    ],
)
def test_a_source_that_nobody_can_vouch_for_is_refused_by_name(field, reason):
    (error,) = refusals(policy, f"{RULE}from: [{{source: {{{field}: [x]}}}}]")
    assert error.startswith(f"6: spec.rules[0].from[0].source.{field}: is refused: {reason}")


@pytest.mark.parametrize("field", L7_OPERATION)
def test_an_operation_that_only_a_waypoint_sees_is_refused_by_name(field):
    (error,) = refusals(policy, f"{RULE}to: [{{operation: {{{field}: [x]}}}}]")
    assert error.startswith(f"6: spec.rules[0].to[0].operation.{field}: is refused: needs a waypoint; an L4 proxy")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("request.headers[x]", "needs a waypoint; an L4 proxy"),
        ("request.auth.claims[iss]", "needs a waypoint; an L4 proxy"),
        ("connection.sni", "tunnels carry no server name"),
        ("remote.ip", "needs a waypoint; an L4 proxy"),
        ("experimental.envoy.filters.a", "it is not implemented"),
    ],
)
def test_a_condition_that_cannot_be_judged_is_refused_by_name(key, reason):
    (error,) = refusals(policy, f'{RULE}when: [{{key: "{key}", values: [x]}}]')
    assert error.startswith(f"6: spec.rules[0].when[0].key: {key!r} is refused: {reason}")


TARGETS = "spec:\n  targetRefs: [{kind: Service, name: web}]\n  rules:\n  - "


def test_every_field_of_a_policy_that_waypoints_enforce():
    spec = """\
spec:
  action: DENY
  targetRefs:
  - {kind: Service, group: "", name: web, namespace: shop}
  - {kind: Gateway, group: gateway.networking.k8s.io, name: wp}
  rules:
  - from:
    - source: {requestPrincipals: [iss/ann], notRequestPrincipals: ['*/ben']}
    - source: {remoteIpBlocks: [10.0.0.0/8], notRemoteIpBlocks: [10.1.2.3, 'fd00::/8']}
    to:
    - operation:
        hosts: [Web.Shop, '*.example']
        notHosts: ['x:*']
        methods: [GET, P*]
        notMethods: [PUT]
        paths: [/v2/*, '*.css', '/a%7eb', '/%7e/{*}/b/{**}']
        notPaths: ['/v2/admin']
        ports: ["80"]
    when:
    - {key: 'request.headers[X-Role]', values: [admin, 'a*'], notValues: ['*z']}
    - {key: remote.ip, values: [10.0.0.0/8]}
"""
    sources = (
        Source(request_principals=("iss/ann",), not_request_principals=("*/ben",)),
        Source(remote_ip_blocks=("10.0.0.0/8",), not_remote_ip_blocks=("10.1.2.3/32", "fd00::/8")),
    )
    operation = Operation(
        ports=(80,),
        hosts=("web.shop", "*.example"),
        not_hosts=("x:*",),
        methods=("GET", "P*"),
        not_methods=("PUT",),
        paths=("/v2/*", "*.css", "/a~b", "/~/{*}/b/{**}"),
        not_paths=("/v2/admin",),
    )
    conditions = (
        Condition(ConditionKey.REQUEST_HEADERS, ("admin", "a*"), ("*z",), "x-role"),
        Condition(ConditionKey.REMOTE_IP, ("10.0.0.0/8",)),
    )
    found = policy(spec)
    assert found == AuthorizationPolicy(
        namespace="shop",
        name="p",
        action=Action.DENY,
        selector=None,
        rules=(Rule(sources, (operation,), conditions),),
        targets=(Target("Gateway", "shop/wp"), Target("Service", "shop/web")),
    )
    assert found.asks_http


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("spec: {targetRefs: [{name: web}]}", "targetRefs[0].kind: is missing; it must be Gateway or Service"),
        ("spec: {targetRefs: [{kind: Service}]}", "targetRefs[0].name: is missing; it must be the name of a Service"),
        ("spec: {targetRefs: [{kind: Gateway, name: w}]}", "[0].group: is missing; it must be gateway.networking.k8s"),
        (
            "spec: {targetRefs: [{kind: Gateway, group: '', name: w}]}",
            "group: '' must be 'gateway.networking.k8s.io' for a Gateway",
        ),
        ("spec: {targetRefs: [{kind: Service, group: apps, name: w}]}", "group: 'apps' must be '' for a Service"),
        ("spec: {targetRefs: [{kind: GatewayClass, name: w}]}", "kind: GatewayClass is refused: it is not implemented"),
        (
            "spec: {targetRefs: [{kind: Service, name: w, namespace: bank}]}",
            "namespace: must be shop, the policy's",
        ),
        ("spec: {targetRefs: [{kind: Service, name: w, sectionName: a}]}", "sectionName: is refused: a waypoint has"),
        ("spec: {targetRefs: [{kind: Service, name: 9}]}", "name: must be text"),
        (
            "spec: {targetRefs: [{kind: Service, name: w}, {kind: Service, name: w}]}",
            "targetRefs[1].name: Service shop/w stands twice; remove one",
        ),
        (
            "spec: {targetRefs: [" + ", ".join(f"{{kind: Service, name: w{n}}}" for n in range(17)) + "]}",
            "targetRefs: has 17; at most 16 are taken",
        ),
        (
            "spec: {targetRefs: [{kind: Service, name: w}], selector: {matchLabels: {a: b}}}",
            "selector: cannot stand beside targetRefs",
        ),
        (f"{TARGETS}to: [{{operation: {{methods: [get]}}}}]", "methods[0]: 'get' is no method; write it in upper case"),
        (f"{TARGETS}to: [{{operation: {{methods: ['']}}}}]", "methods[0]: an empty pattern matches nothing"),
        (f"{TARGETS}to: [{{operation: {{paths: [v2]}}}}]", "paths[0]: 'v2' must begin with '/' or '*'"),
        (f"{TARGETS}to: [{{operation: {{paths: ['/a/*/b']}}}}]", "paths[0]: '/a/*/b': '*' may stand once"),
        (f"{TARGETS}to: [{{operation: {{paths: ['/a?b']}}}}]", "paths[0]: '/a?b' is no path of up to 1024"),
        (f"{TARGETS}to: [{{operation: {{paths: ['/a%2Fb']}}}}]", "paths[0]: '/a%2Fb' has %2F; requests with it"),
        (f"{TARGETS}to: [{{operation: {{paths: ['/a/../b']}}}}]", "paths[0]: '/a/../b' has the segment '..'"),
        (
            f"{TARGETS}to: [{{operation: {{paths: ['/a{{*}}']}}}}]",
            "'/a{*}': 'a{*}' is no segment of a template",
        ),
        (
            f"{TARGETS}to: [{{operation: {{paths: ['/{{*}}/b*']}}}}]",
            "'/{*}/b*': 'b*' is no segment of a template",
        ),
        (f"{TARGETS}to: [{{operation: {{paths: ['/{{a}}']}}}}]", "paths[0]: '/{a}': '{a}' is no segment of a template"),
        (f"{TARGETS}to: [{{operation: {{paths: ['/{{**}}/{{*}}']}}}}]", "'/{**}/{*}': {**} must be the last operator"),
        (f"{TARGETS}to: [{{operation: {{paths: ['{{*}}/a']}}}}]", "'{*}/a' must begin with '/'"),
        (f"{TARGETS}to: [{{operation: {{paths: ['/{{*}}/..']}}}}]", "has the segment '..'"),
        (f"{TARGETS}to: [{{operation: {{hosts: ['a b']}}}}]", "hosts[0]: 'a b' is no host"),
        (f"{TARGETS}when: [{{key: 'request.headers[a b]', values: [x]}}]", "key: 'a b' is no header's name"),
        (f"{TARGETS}when: [{{key: 'request.headers', values: [x]}}]", "key: 'request.headers' is not known; known: "),
        (f"{TARGETS}when: [{{key: 'request.headers[x]'}}]", "asks nothing of request.headers; write values"),
        (f"{TARGETS}when: [{{key: 'request.headers[x]', values: ['a*b']}}]", "values[0]: 'a*b': '*' may stand once"),
    ],
)
def test_each_bad_policy_of_waypoints_is_refused_with_its_mend(spec, expected):
    found = refusals(policy, spec)
    assert [error for error in found if expected in error], found


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", "1: spec: is missing; it must be a mapping; `spec: {}` allows nobody"),
        ("spec: {action: CUSTOM}", "4: spec.provider: is missing; it must be a mapping, as {name: sign-in}"),
        ("spec: {action: CUSTOM, provider: {}}", "4: spec.provider.name: is missing; it must be the name of an Ext"),
        ("spec: {action: CUSTOM, provider: {name: A}}", "4: spec.provider.name: 'A'"),
        ("spec: {action: AUDIT, provider: {name: a}}", "4: spec.provider: is refused: it belongs to action CUSTOM"),
        ("spec: {action: deny}", "4: spec.action: 'deny' must be ALLOW or DENY or AUDIT or CUSTOM"),
        ("spec: {action: ''}", "4: spec.action: '' must be ALLOW or DENY"),
        ("spec: {provider: {name: x}}", "4: spec.provider: is refused: it belongs to action CUSTOM"),
        ("spec: {targetRef: {kind: Gateway, name: w}}", "4: spec.targetRef: is refused: write targetRefs, a list"),
        ("spec: {targetRefs: []}", "4: spec.targetRefs: is an empty list"),
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


MANY_PORTS = ", ".join(f"{port}: {{mode: STRICT}}" for port in range(1, 66))


def test_every_field_of_a_peer_authentication():
    spec = "spec: {selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: UNSET}}}"
    expected = PeerAuthentication("shop", "p", {"app": "web"}, MtlsMode.STRICT, {8080: MtlsMode.UNSET})
    assert peer(spec) == expected
    spec = spec.replace("STRICT", "PERMISSIVE").replace("UNSET", "STRICT")
    expected = PeerAuthentication("shop", "p", {"app": "web"}, MtlsMode.PERMISSIVE, {8080: MtlsMode.STRICT})
    assert peer(spec) == expected
    assert peer("spec: {}") == PeerAuthentication("shop", "p", None, MtlsMode.UNSET, {})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            "spec: {mtls: {mode: DISABLE}}",
            "4: spec.mtls.mode: DISABLE is refused: a workload of this mesh always takes mTLS; write PERMISSIVE",
        ),
        ("spec: {mtls: {mode: strict}}", "4: spec.mtls.mode: 'strict' must be STRICT or PERMISSIVE or UNSET"),
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
        (
            "spec: {selector: {matchLabels: {a: b}}, portLevelMtls: {15021: {mode: PERMISSIVE}}}",
            "4: spec.portLevelMtls.15021: is the uProxy's own, as all of 15000 to 15090, and takes no plaintext",
        ),
        (
            f"spec: {{selector: {{matchLabels: {{a: b}}}}, portLevelMtls: {{{MANY_PORTS}}}}}",
            "4: spec.portLevelMtls: has 65 ports; at most 64 are taken",
        ),
        ("", "1: spec: is missing"),
    ],
)
def test_each_bad_peer_authentication_is_refused(spec, expected):
    found = refusals(peer, spec)
    assert [error for error in found if expected in error], found
