"""AuthorizationPolicy and PeerAuthentication, data only; `uproxy.authz` decides.

Semantics are Istio's. DENY policies are asked first and one match refuses. Then, if any ALLOW policy
selects the workload, one of them must match. A policy matches when one of its rules does: an ALLOW
policy without rules therefore allows nobody, a rule without fields matches everybody. Within a rule one
of `sources`, one of `operations` and all of `conditions` must hold; within a source or an operation all
fields must hold; within a field one value must, and in a `not_` field none may. A caller without an
identity matches no positive field of identity, and every negative one.

Patterns (principals, namespaces): `exact`, `prefix*`, `*suffix`, and `*` for anything that is present.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from control.api.address import IpBlock, parse_block
from control.api.identity import SCHEME, IdentityError, SpiffeId
from control.api.labels import Labels, selects
from control.api.names import wrong_dns_label
from control.api.problems import shown

DEFAULT_ROOT_NAMESPACE: Final = "mesh-system"
"""Policies of this namespace apply to every namespace."""


class Action(Enum):
    """What a matching policy does."""

    ALLOW = "ALLOW"
    DENY = "DENY"


class ConditionKey(Enum):
    """The attributes of a connection that a `when` may ask for at L4."""

    SOURCE_IP = "source.ip"
    SOURCE_NAMESPACE = "source.namespace"
    SOURCE_PRINCIPAL = "source.principal"
    DESTINATION_IP = "destination.ip"
    DESTINATION_PORT = "destination.port"


class MtlsMode(Enum):
    """What a PeerAuthentication asks for. Only what the mesh enforces anyway can be asked for."""

    STRICT = "STRICT"
    UNSET = "UNSET"


@dataclass(frozen=True, slots=True)
class Source:
    """Who calls. An empty field asks nothing."""

    principals: tuple[str, ...] = ()
    """Patterns over `SpiffeId.principal`, without `spiffe://`."""
    not_principals: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    """Patterns over the namespace in the caller's identity."""
    not_namespaces: tuple[str, ...] = ()
    ip_blocks: tuple[IpBlock, ...] = ()
    """Of the address the caller's tunnel comes from."""
    not_ip_blocks: tuple[IpBlock, ...] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """What is called: ports of the workload (not of the service)."""

    ports: tuple[int, ...] = ()
    not_ports: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Condition:
    """One further demand. A value is canonical text for its key: a pattern, a CIDR block or a port number."""

    key: ConditionKey
    values: tuple[str, ...] = ()
    not_values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to match; see the module for how its parts combine."""

    sources: tuple[Source, ...] = ()
    operations: tuple[Operation, ...] = ()
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class AuthorizationPolicy:
    """A policy of one namespace, or of the whole mesh when that is the root namespace."""

    namespace: str
    name: str
    action: Action
    selector: Labels | None = field(hash=False)
    """Which workloads of its scope; None: all."""
    rules: tuple[Rule, ...]

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class PeerAuthentication:
    """Says how workloads are to be reached. Every mode it can hold means mTLS only."""

    namespace: str
    name: str
    selector: Labels | None = field(hash=False)
    mode: MtlsMode
    port_modes: Mapping[int, MtlsMode] = field(hash=False)
    """Port of the workload -> its own mode."""


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a pattern (see the module) matches a name that is present."""
    if pattern.startswith("*"):
        return name.endswith(pattern[1:])
    if pattern.endswith("*"):
        return name.startswith(pattern[:-1])
    return name == pattern


def canonical_value(key: ConditionKey, text: str) -> str:
    """The one form of a condition's value. Raises ValueError with what would be right."""
    match key:
        case ConditionKey.SOURCE_IP | ConditionKey.DESTINATION_IP:
            return parse_block(text)
        case ConditionKey.DESTINATION_PORT:
            return str(parse_port(text))
        case ConditionKey.SOURCE_PRINCIPAL:
            return canonical_principal(text)
        case ConditionKey.SOURCE_NAMESPACE:
            return canonical_namespace(text)


def canonical_principal(text: str) -> str:
    """A pattern over principals, without the scheme that some people write. Raises ValueError."""
    pattern = text.removeprefix(SCHEME)
    _check_pattern(pattern)
    if "*" not in pattern:
        try:
            SpiffeId.parse(SCHEME + pattern)
        except IdentityError:
            # It could match nobody, and an ALLOW or DENY that never holds is a mistake.
            raise ValueError(
                f"{shown(text)} is no principal; write <trust domain>/ns/<namespace>/sa/<service account>"
            ) from None
    return pattern


def canonical_namespace(text: str) -> str:
    """A pattern over namespaces. Raises ValueError."""
    _check_pattern(text)
    if "*" not in text and (wrong := wrong_dns_label(text)):
        raise ValueError(wrong)
    return text


def parse_port(text: str) -> int:
    """A port number as Istio's policies write it: in quotes. Raises ValueError."""
    if text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535:
        return int(text)
    raise ValueError(f"{shown(text)} is not a port from 1 to 65535")


def applies(policy: AuthorizationPolicy, namespace: str, labels: Labels, root_namespace: str) -> bool:
    """Whether the policy selects a workload with these labels in this namespace."""
    if policy.namespace not in (namespace, root_namespace):
        return False
    return policy.selector is None or selects(policy.selector, labels)


def _check_pattern(text: str) -> None:
    if not text:
        raise ValueError("an empty pattern matches nothing; write '*' for anything")
    if text.count("*") > 1 or "*" in text[1:-1]:
        raise ValueError(f"{shown(text)}: '*' may stand once, at the beginning or at the end")
