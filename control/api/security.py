"""`security.istio.io` AuthorizationPolicy and PeerAuthentication, read from documents.

Whatever an L4 proxy cannot see or this mesh cannot do is refused by name: a policy that half holds is worse than none.
"""

from __future__ import annotations

from typing import Final

from control.api import labels as label
from control.api.address import parse_block
from control.api.declared import DeclaredPeerAuthentication, DeclaredPolicy
from control.api.document import Reader
from control.api.labels import Labels
from control.api.metadata import read_metadata
from control.api.names import wrong_dns_label, wrong_subdomain
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
    canonical_namespace,
    canonical_principal,
    canonical_value,
    parse_port,
)
from control.api.problems import shown

_NEEDS_WAYPOINT: Final = "needs a waypoint; an L4 proxy cannot see it"
_FORWARDED: Final = f"{_NEEDS_WAYPOINT} (the address that an HTTP header names); write ipBlocks or notIpBlocks"
_ACTIONS: Final = {
    "CUSTOM": "external authorisation is not there; write ALLOW or DENY",
    "AUDIT": "auditing is not there; write ALLOW or DENY",
}
_L7_CONDITIONS: Final = ("request.", "connection.sni", "remote.ip", "experimental.")
_PLAINTEXT: Final = "it would let plaintext in, and this mesh takes mTLS only; write STRICT"
_MODES: Final = {"PERMISSIVE": _PLAINTEXT, "DISABLE": _PLAINTEXT}


def read_authorization_policy(document: Reader) -> DeclaredPolicy:
    """Reads an AuthorizationPolicy."""
    metadata = read_metadata(document, wrong_subdomain)
    spec = document.child("spec", required="a mapping; `spec: {}` allows nobody")
    target = "it names a waypoint or a service behind one, and waypoints are not there yet; write selector"
    spec.refuse({"targetRef": target, "targetRefs": target, "provider": _ACTIONS["CUSTOM"]})
    action = spec.choice("action", [action.value for action in Action], default="ALLOW", others=_ACTIONS)
    policy = AuthorizationPolicy(
        namespace=metadata.namespace,
        name=metadata.name,
        action=Action(action),
        selector=_selector(spec),
        rules=tuple(_rule(reader, metadata.namespace) for reader in spec.children("rules")),
    )
    spec.finish()
    return DeclaredPolicy(policy, document.position)


def read_peer_authentication(document: Reader) -> DeclaredPeerAuthentication:
    """Reads a PeerAuthentication. Only modes that mean mTLS are taken."""
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


def _rule(reader: Reader, namespace: str) -> Rule:
    rule = Rule(
        sources=tuple(_source(item, namespace) for item in reader.children("from")),
        operations=tuple(_operation(item) for item in reader.children("to")),
        conditions=tuple(condition for item in reader.children("when") if (condition := _condition(item)) is not None),
    )
    reader.finish()
    return rule


def _source(item: Reader, namespace: str) -> Source:
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
    )
    reader.refuse(
        {
            "requestPrincipals": _NEEDS_WAYPOINT,
            "notRequestPrincipals": _NEEDS_WAYPOINT,
            "remoteIpBlocks": _FORWARDED,
            "notRemoteIpBlocks": _FORWARDED,
        }
    )
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


def _operation(item: Reader) -> Operation:
    reader = item.child("operation", required='a mapping, as {ports: ["8080"]}')
    item.finish()
    operation = Operation(
        ports=reader.parsed_list("ports", parse_port), not_ports=reader.parsed_list("notPorts", parse_port)
    )
    names = ("hosts", "notHosts", "methods", "notMethods", "paths", "notPaths")
    reader.refuse(dict.fromkeys(names, _NEEDS_WAYPOINT))
    reader.finish()
    if reader.empty:
        item.error("operation", "names nothing; a rule without `to` means every port")
    return operation


def _condition(reader: Reader) -> Condition | None:
    keys = [key.value for key in ConditionKey]
    text = reader.text("key", required=f"one of {', '.join(keys)}")
    if text.startswith(_L7_CONDITIONS):
        reader.error("key", f"{shown(text)} is refused: {_NEEDS_WAYPOINT}")
    elif text and text not in keys:
        reader.error("key", f"{shown(text)} is not known; known: {', '.join(keys)}", (text, keys))
    if text not in keys:
        return None
    key = ConditionKey(text)

    def canonical(value: str) -> str:
        return canonical_value(key, value)

    condition = Condition(key, reader.parsed_list("values", canonical), reader.parsed_list("notValues", canonical))
    if not reader.has("values") and not reader.has("notValues"):
        reader.error("", f"asks nothing of {key.value}; write values or notValues")
    reader.finish()
    return condition
