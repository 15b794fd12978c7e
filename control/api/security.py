"""`security.istio.io` AuthorizationPolicy and PeerAuthentication, read from documents.

Whatever the proxies that enforce a policy cannot see or do is refused by name: one that half holds is worse than none.
"""

from __future__ import annotations

import re
from typing import Final

from control.api import labels as label
from control.api.address import parse_block
from control.api.declared import DeclaredPeerAuthentication, DeclaredPolicy
from control.api.document import Reader
from control.api.labels import Labels
from control.api.metadata import DRY_RUN, Metadata, read_metadata
from control.api.names import key, wrong_dns_label, wrong_service_name, wrong_subdomain
from control.api.plaintext import MAX_PORTS, PROXY_PORTS
from control.api.policy import (
    NAMED,
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
    TargetKind,
    canonical_claim,
    canonical_host,
    canonical_method,
    canonical_namespace,
    canonical_path,
    canonical_principal,
    canonical_value,
    parse_port,
    wrong_condition_name,
)
from control.api.problems import shown

NEEDS_WAYPOINT: Final = (
    "needs a waypoint; an L4 proxy cannot see it. Write targetRefs: a Service that is bound to one, or its Gateway"
)
"""Of what is not written for one."""
_MAX_TARGETS: Final = 16  # Istio's
_OTHER_CONDITIONS: Final = {
    "connection.sni": "tunnels carry no server name; remove it",
    "experimental.": "it is not implemented; remove it",
}
_NAMED: Final = re.compile(r"(request\.headers|request\.auth\.claims)\[(.*)\]")
_CONDITIONS: Final = tuple(f"{one.value}[...]" if one in NAMED else one.value for one in ConditionKey)
_PROXY_PORTS: Final = f"{PROXY_PORTS[0]} to {PROXY_PORTS[-1]}"
_GROUPS: Final = {"Gateway": ("gateway.networking.k8s.io",), "Service": ("", "core")}
_MODES: Final = {
    "DISABLE": "a workload of this mesh always takes mTLS; write PERMISSIVE to let plaintext in too, or STRICT"
}


def read_authorization_policy(document: Reader) -> DeclaredPolicy:
    """Reads an AuthorizationPolicy."""
    metadata = read_metadata(document, wrong_subdomain, own_annotations=(DRY_RUN,))
    spec = document.child("spec", required="a mapping; `spec: {}` allows nobody")
    spec.refuse({"targetRef": "write targetRefs, a list"})
    targets = read_targets(spec, metadata.namespace)
    http = spec.has("targetRefs")
    action = Action(spec.choice("action", [action.value for action in Action], default="ALLOW"))
    policy = AuthorizationPolicy(
        namespace=metadata.namespace,
        name=metadata.name,
        action=action,
        selector=_selector(spec),
        rules=tuple(_rule(reader, metadata.namespace, http=http) for reader in spec.children("rules")),
        targets=targets,
        dry_run=_dry_run(document, metadata, action),
    )
    provider = _provider(spec, action)
    if http and spec.has("selector"):
        spec.error("selector", "cannot stand beside targetRefs: a policy holds at workloads or at waypoints")
    spec.finish()
    return DeclaredPolicy(policy, document.position, provider)


def _provider(spec: Reader, action: Action) -> str:
    """The name of the Extension that a CUSTOM policy has asked."""
    if action is not Action.CUSTOM:
        spec.refuse({"provider": "it belongs to action CUSTOM; remove it"})
        return ""
    reader = spec.child("provider", required="a mapping, as {name: sign-in}, with the name of an Extension")
    name = reader.text("name", wrong_subdomain, required="the name of an Extension")
    reader.finish()
    return name


def _dry_run(document: Reader, metadata: Metadata, action: Action) -> bool:
    text = metadata.annotations.get(DRY_RUN, "false")
    field = f"metadata.annotations[{DRY_RUN!r}]"
    if text not in ("true", "false"):
        document.error_at(field, f"{shown(text)} must be true or false")
    elif text == "true" and action in (Action.AUDIT, Action.CUSTOM):
        document.error_at(field, f"is for ALLOW and DENY; this is {action.value}: remove it")
    return text == "true"


def read_peer_authentication(document: Reader) -> DeclaredPeerAuthentication:
    """Reads a PeerAuthentication."""
    metadata = read_metadata(document, wrong_subdomain)
    spec = document.child("spec", required="a mapping, as {mtls: {mode: STRICT}}")
    selector = _selector(spec)
    by_port = spec.child("portLevelMtls")
    port_modes: dict[int, MtlsMode] = {}
    for name in by_port.names:
        mode = _mode(by_port.child(name))
        try:
            port_modes[parse_port(name)] = mode
        except ValueError as error:
            by_port.error(name, str(error))
        else:
            if mode is MtlsMode.PERMISSIVE and int(name) in PROXY_PORTS:
                by_port.error(name, f"is the uProxy's own, as all of {_PROXY_PORTS}, and takes no plaintext; remove it")
    if len(port_modes) > MAX_PORTS:
        spec.error("portLevelMtls", f"has {len(port_modes)} ports; at most {MAX_PORTS} are taken")
    if port_modes and selector is None:
        spec.error("portLevelMtls", "needs a selector: ports are those of certain workloads")
    resource = PeerAuthentication(metadata.namespace, metadata.name, selector, _mode(spec.child("mtls")), port_modes)
    spec.finish()
    return DeclaredPeerAuthentication(resource, document.position)


def _mode(reader: Reader) -> MtlsMode:
    mode = reader.choice("mode", [mode.value for mode in MtlsMode], default="UNSET", others=_MODES)
    reader.finish()
    return MtlsMode(mode)


def _selector(spec: Reader) -> Labels | None:
    if not spec.has("selector"):
        return None
    reader = spec.child("selector")
    reader.refuse({"matchExpressions": "only matchLabels is taken; write matchLabels"})
    labels = reader.pairs("matchLabels", label.wrong_key, label.wrong_value, most=label.MAX_LABELS)
    if not labels and not reader.has("matchLabels") and not reader.lost:
        spec.error("selector", "has no matchLabels; name labels, or remove selector to mean every workload")
    elif reader.has("matchLabels") and not labels:
        reader.error("matchLabels", "names no label; name one, or remove selector to mean every workload")
    reader.finish()
    return labels


def read_targets(spec: Reader, namespace: str) -> tuple[Target, ...]:
    """The waypoints at which a policy holds, and services behind some."""
    readers = spec.children("targetRefs")
    if len(readers) > _MAX_TARGETS:
        spec.error("targetRefs", f"has {len(readers)}; at most {_MAX_TARGETS} are taken")
    found: list[Target] = []
    for reader in readers[:_MAX_TARGETS]:
        target = _target(reader, namespace)
        if target in found:
            reader.error("name", f"{target.kind} {target.key} stands twice; remove one")
        found.append(target)
    return tuple(sorted(set(found)))


def _target(reader: Reader, namespace: str) -> Target:
    others = dict.fromkeys(("GatewayClass", "ServiceEntry"), "it is not implemented; name a Service or Gateway")
    kind: TargetKind = (
        "Gateway" if reader.choice("kind", list(_GROUPS), default="", others=others) == "Gateway" else "Service"
    )
    if not reader.has("kind") and not reader.lost:
        reader.error("kind", "is missing; it must be Gateway or Service")
    groups = _GROUPS[kind]
    reader.text("group", lambda text: "" if text in groups else f"{shown(text)} must be {groups[0]!r} for a {kind}")
    if kind == "Gateway" and not reader.has("group") and not reader.lost:
        reader.error("group", f"is missing; it must be {groups[0]}")
    other = reader.text("namespace", wrong_dns_label, default=namespace)
    if other != namespace:
        reader.error("namespace", f"must be {namespace}, the policy's own")
    reader.refuse({"sectionName": "a waypoint has one listener; remove it"})
    wrong = wrong_service_name if kind == "Service" else wrong_subdomain
    name = reader.text("name", wrong, required=f"the name of a {kind} of this namespace")
    reader.finish()
    return Target(kind, key(namespace, name))


def _rule(reader: Reader, namespace: str, *, http: bool) -> Rule:
    """`http`: whether it holds at waypoints, which see requests."""
    rule = Rule(
        sources=tuple(_source(item, namespace, http=http) for item in reader.children("from")),
        operations=tuple(_operation(item, http=http) for item in reader.children("to")),
        conditions=tuple(
            condition for item in reader.children("when") if (condition := _condition(item, http=http)) is not None
        ),
    )
    reader.finish()
    return rule


def _source(item: Reader, namespace: str, *, http: bool) -> Source:
    reader = item.child("source", required="a mapping, as {principals: [...]}")
    item.finish()

    def account(text: str) -> str:
        return _account_pattern(text, namespace)

    accounts = reader.parsed_list("serviceAccounts", account)
    for name in ("principals", "namespaces"):
        if accounts and reader.has(name):
            reader.error("serviceAccounts", f"cannot stand beside {name}; write one of them")
    source = Source(
        principals=reader.parsed_list("principals", canonical_principal) + accounts,
        not_principals=reader.parsed_list("notPrincipals", canonical_principal)
        + reader.parsed_list("notServiceAccounts", account),
        namespaces=reader.parsed_list("namespaces", canonical_namespace),
        not_namespaces=reader.parsed_list("notNamespaces", canonical_namespace),
        ip_blocks=reader.parsed_list("ipBlocks", parse_block),
        not_ip_blocks=reader.parsed_list("notIpBlocks", parse_block),
        request_principals=reader.parsed_list("requestPrincipals", canonical_claim) if http else (),
        not_request_principals=reader.parsed_list("notRequestPrincipals", canonical_claim) if http else (),
        remote_ip_blocks=reader.parsed_list("remoteIpBlocks", parse_block) if http else (),
        not_remote_ip_blocks=reader.parsed_list("notRemoteIpBlocks", parse_block) if http else (),
    )
    if not http:
        names = ("requestPrincipals", "notRequestPrincipals", "remoteIpBlocks", "notRemoteIpBlocks")
        reader.refuse(dict.fromkeys(names, NEEDS_WAYPOINT))
    reader.finish()
    if reader.empty:
        item.error("source", "names nothing; a rule without `from` means every caller")
    return source


def _account_pattern(text: str, namespace: str) -> str:
    """`account` or `namespace/account` as a pattern over principals: of our trust domain, since no other gets in."""
    account_namespace, slash, account = text.rpartition("/")
    account_namespace = account_namespace if slash else namespace
    if "*" in text or wrong_dns_label(account_namespace) or wrong_subdomain(account):
        raise ValueError(f"{shown(text)} must be a service account, `name` or `namespace/name`, without patterns")
    return f"*/ns/{account_namespace}/sa/{account}"


def _operation(item: Reader, *, http: bool) -> Operation:
    reader = item.child("operation", required='a mapping, as {ports: ["8080"]}')
    item.finish()
    operation = Operation(
        ports=reader.parsed_list("ports", parse_port),
        not_ports=reader.parsed_list("notPorts", parse_port),
        hosts=reader.parsed_list("hosts", canonical_host) if http else (),
        not_hosts=reader.parsed_list("notHosts", canonical_host) if http else (),
        methods=reader.parsed_list("methods", canonical_method) if http else (),
        not_methods=reader.parsed_list("notMethods", canonical_method) if http else (),
        paths=reader.parsed_list("paths", canonical_path) if http else (),
        not_paths=reader.parsed_list("notPaths", canonical_path) if http else (),
    )
    if not http:
        names = ("hosts", "notHosts", "methods", "notMethods", "paths", "notPaths")
        reader.refuse(dict.fromkeys(names, NEEDS_WAYPOINT))
    reader.finish()
    if reader.empty:
        item.error("operation", "names nothing; a rule without `to` means every port")
    return operation


def _condition(reader: Reader, *, http: bool) -> Condition | None:
    text = reader.text("key", required=f"one of {', '.join(_CONDITIONS)}")
    named = _NAMED.fullmatch(text)
    attribute, name = (ConditionKey(named[1]), named[2]) if named is not None else (_unnamed(text), "")
    if attribute is ConditionKey.REQUEST_HEADERS:
        name = name.lower()
    refused = next((reason for start, reason in _OTHER_CONDITIONS.items() if text.startswith(start)), "")
    if not refused and not http and text.startswith(("request.", "remote.")):
        refused = NEEDS_WAYPOINT
    if refused:
        reader.error("key", f"{shown(text)} is refused: {refused}")
    elif text and attribute is None:
        known = ", ".join(_CONDITIONS)
        reader.error("key", f"{shown(text)} is not known; known: {known}", (text, _CONDITIONS))
    elif attribute in NAMED and (problem := wrong_condition_name(attribute, name)):
        reader.error("key", problem)
    elif attribute is not None:
        return _condition_of(reader, attribute, name)
    return None


def _unnamed(text: str) -> ConditionKey | None:
    """The attribute that has no name of its own behind it."""
    return next((one for one in ConditionKey if one.value == text and one not in NAMED), None)


def _condition_of(reader: Reader, attribute: ConditionKey, name: str) -> Condition:
    def canonical(value: str) -> str:
        return canonical_value(attribute, value)

    values, not_values = reader.parsed_list("values", canonical), reader.parsed_list("notValues", canonical)
    condition = Condition(attribute, values, not_values, name)
    if not reader.has("values") and not reader.has("notValues"):
        reader.error("", f"asks nothing of {attribute.value}; write values or notValues")
    reader.finish()
    return condition
