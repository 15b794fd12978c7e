"""AuthorizationPolicy and PeerAuthentication, data only; `uproxy.authz` decides.

Semantics are Istio's. What a CUSTOM policy matches must be allowed by a service that is asked. Then DENY policies are
asked, and one match refuses. Then, if any ALLOW policy selects the workload, one of them must match. An AUDIT policy
decides nothing. A policy matches when one of its rules does: an ALLOW
policy without rules therefore allows nobody, a rule without fields matches everybody. Within a rule one
of `sources`, one of `operations` and all of `conditions` must hold; within a source or an operation all
fields must hold; within a field one value must, and in a `not_` field none may. A caller without an
identity matches no positive field of identity, and every negative one.

A policy with targets holds at the waypoints that serve them, and one without at the uProxy of each workload that it
selects. Only the former may ask for what HTTP says (hosts, methods, paths, headers). Of a connection that is not HTTP
nothing is known of that: an ALLOW does not match, and any other matches as if the rule did not ask for it. About such a
connection, and at the uProxy of a workload, nobody can be asked: what a CUSTOM policy matches is refused there.

Patterns (all but ports, blocks and keys): `exact`, `prefix*`, `*suffix`, and `*` for anything that is present. A path
may be a template instead: `{*}` in place of a segment is any one segment, `{**}` at last any number of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal

from control.api.address import IpBlock, parse_block
from control.api.extension import ExternalAuthorization
from control.api.http_text import normal_path, wrong_field_value, wrong_header_name, wrong_method
from control.api.identity import SCHEME, IdentityError, SpiffeId
from control.api.labels import Labels, selects
from control.api.names import key, wrong_dns_label
from control.api.problems import shown

DEFAULT_ROOT_NAMESPACE: Final = "mesh-system"
"""Policies of this namespace apply to every namespace."""

ANY_SEGMENT: Final = "{*}"
REST: Final = "{**}"
_MAX_CLAIM: Final = 1024
_HOST: Final = re.compile(r"[A-Za-z0-9._*:\[\]-]{1,255}")


class Action(Enum):
    """What a matching policy does."""

    ALLOW = "ALLOW"
    DENY = "DENY"
    AUDIT = "AUDIT"
    """Says so in logs and metrics."""
    CUSTOM = "CUSTOM"
    """Has another service asked."""


class ConditionKey(Enum):
    """The attributes of a connection or request that a `when` may ask for."""

    SOURCE_IP = "source.ip"
    SOURCE_NAMESPACE = "source.namespace"
    SOURCE_PRINCIPAL = "source.principal"
    DESTINATION_IP = "destination.ip"
    DESTINATION_PORT = "destination.port"
    REMOTE_IP = "remote.ip"
    """At waypoints only: the address that trusted proxies say, `Gateway.trusted_proxies`."""
    REQUEST_HEADERS = "request.headers"
    """Likewise. Written `request.headers[x-name]`: any of the header's values."""
    REQUEST_PRINCIPAL = "request.auth.principal"
    """Likewise, as what follows: of the request's token, `<issuer>/<subject>`."""
    REQUEST_AUDIENCES = "request.auth.audiences"
    """Any of those that the token is for."""
    REQUEST_PRESENTER = "request.auth.presenter"
    """Who the token was issued to, its `azp`."""
    REQUEST_CLAIMS = "request.auth.claims"
    """Written `request.auth.claims[name]`, or `[outer][inner]`: the claim, or any of those that it lists."""


NAMED: Final = (ConditionKey.REQUEST_HEADERS, ConditionKey.REQUEST_CLAIMS)
"""Those that ask for one of several: `Condition.name`."""


class MtlsMode(Enum):
    """What a PeerAuthentication asks for."""

    STRICT = "STRICT"
    """mTLS only."""
    PERMISSIVE = "PERMISSIVE"
    """mTLS, and plaintext too."""
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
    request_principals: tuple[str, ...] = ()
    """Patterns over `<issuer>/<subject>` of the request's token; for waypoints."""
    not_request_principals: tuple[str, ...] = ()
    remote_ip_blocks: tuple[IpBlock, ...] = ()
    """Of the address that trusted proxies say; for waypoints."""
    not_remote_ip_blocks: tuple[IpBlock, ...] = ()

    @property
    def asks_http(self) -> bool:
        return bool(
            self.request_principals or self.not_request_principals or self.remote_ip_blocks or self.not_remote_ip_blocks
        )


@dataclass(frozen=True, slots=True)
class Operation:
    """What is called. All but the ports is for waypoints."""

    ports: tuple[int, ...] = ()
    """At a uProxy of the workload; at a waypoint of the service, or of the workload when that was dialled."""
    not_ports: tuple[int, ...] = ()
    hosts: tuple[str, ...] = ()
    """Patterns over the authority, in lower case, which is how it is to be compared."""
    not_hosts: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    """Patterns over the method, which tells upper case from lower."""
    not_methods: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    """Patterns over the normalised path, without the query."""
    not_paths: tuple[str, ...] = ()

    @property
    def asks_http(self) -> bool:
        return bool(self.hosts or self.not_hosts or self.methods or self.not_methods or self.paths or self.not_paths)


@dataclass(frozen=True, slots=True)
class Condition:
    """One further demand. A value is canonical text for its key: a pattern, a CIDR block or a port number."""

    key: ConditionKey
    values: tuple[str, ...] = ()
    not_values: tuple[str, ...] = ()
    name: str = ""
    """Of the header, in lower case; of a claim, as `outer][inner`; empty for every other key."""

    @property
    def asks_http(self) -> bool:
        return self.key.value.startswith(("request.", "remote."))


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to match; see the module for how its parts combine."""

    sources: tuple[Source, ...] = ()
    operations: tuple[Operation, ...] = ()
    conditions: tuple[Condition, ...] = ()

    @property
    def asks_http(self) -> bool:
        """Whether anything of it can be told of HTTP requests only."""
        return (
            any(source.asks_http for source in self.sources)
            or any(operation.asks_http for operation in self.operations)
            or any(condition.asks_http for condition in self.conditions)
        )


TargetKind = Literal["Gateway", "Service"]


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """All requests through a waypoint, or those to one service."""

    kind: TargetKind
    key: str
    """Of a Gateway or Service of the policy's own namespace."""


@dataclass(frozen=True, slots=True)
class AuthorizationPolicy:
    """A policy of one namespace, or of the whole mesh when that is the root namespace."""

    namespace: str
    name: str
    action: Action
    selector: Labels | None = field(hash=False)
    """Which workloads of its scope; None: all, unless there are targets."""
    rules: tuple[Rule, ...]
    targets: tuple[Target, ...] = ()
    """At which waypoints it holds, in order, each once; none: at the workloads that it selects."""
    dry_run: bool = False
    """What it would do is told, and not done."""
    authorizer: ExternalAuthorization | None = None
    """Who is asked about what a CUSTOM policy with targets matches; None: nobody, and so that is refused."""

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)

    @property
    def asks_http(self) -> bool:
        return any(rule.asks_http for rule in self.rules)


@dataclass(frozen=True, slots=True)
class PeerAuthentication:
    """Says how workloads are to be reached; `control.api.plaintext` puts several together."""

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
        case ConditionKey.SOURCE_IP | ConditionKey.DESTINATION_IP | ConditionKey.REMOTE_IP:
            return parse_block(text)
        case ConditionKey.DESTINATION_PORT:
            return str(parse_port(text))
        case ConditionKey.SOURCE_PRINCIPAL:
            return canonical_principal(text)
        case ConditionKey.SOURCE_NAMESPACE:
            return canonical_namespace(text)
        case ConditionKey.REQUEST_HEADERS:
            return canonical_text(text)
        case _:
            return canonical_claim(text)


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


def canonical_text(text: str) -> str:
    """A pattern over the value of a header. Raises ValueError."""
    _check_pattern(text)
    if problem := wrong_field_value(text):
        raise ValueError(problem)
    return text


def canonical_claim(text: str) -> str:
    """A pattern over what a token says. Raises ValueError."""
    _check_pattern(text)
    if len(text) > _MAX_CLAIM or not text.isprintable():
        raise ValueError(f"{shown(text)} is no claim: up to {_MAX_CLAIM} printable characters")
    return text


def wrong_condition_name(attribute: ConditionKey, text: str) -> str:
    """What a condition on one of `NAMED` asks for."""
    return wrong_header_name(text) if attribute is ConditionKey.REQUEST_HEADERS else wrong_claim_name(text)


def wrong_claim_name(text: str) -> str:
    """The path of a claim, as in `Condition.name`."""
    if all(part and len(part) <= _MAX_CLAIM and part.isprintable() and "[" not in part for part in text.split("][")):
        return ""
    return f"{shown(text)} is no claim's name; write request.auth.claims[name], or [outer][inner] for a nested one"


def canonical_host(text: str) -> str:
    """A pattern over hosts, with or without a port. Raises ValueError."""
    _check_pattern(text)
    if not _HOST.fullmatch(text):
        raise ValueError(f"{shown(text)} is no host, as shop.example, *.example or shop.example:*")
    return text.lower()


def canonical_method(text: str) -> str:
    """A pattern over methods. Raises ValueError."""
    _check_pattern(text)
    if problem := wrong_method(text.replace("*", "") or "GET"):
        raise ValueError(problem)
    return text


def canonical_path(text: str) -> str:
    """A pattern over normalised paths, or a template. Raises ValueError for one that no such path can match."""
    if is_path_template(text):
        return _canonical_template(text)
    _check_pattern(text)
    if not text.startswith(("/", "*")):
        raise ValueError(f"{shown(text)} must begin with '/' or '*'")
    return normal_path(text)


def is_path_template(text: str) -> bool:
    """Whether a pattern over paths is a template, as Istio tells them apart."""
    return "{" in text or "}" in text


def _canonical_template(text: str) -> str:
    segments = text.split("/")
    if segments[0] or len(text) > _MAX_CLAIM:
        raise ValueError(f"{shown(text)} must begin with '/', and have up to {_MAX_CLAIM} characters")
    rest = segments[segments.index(REST) + 1 :] if REST in segments else []
    if any(segment in (ANY_SEGMENT, REST) for segment in rest):
        raise ValueError(f"{shown(text)}: {REST} must be the last operator")
    literal = [segment for segment in segments if segment not in (ANY_SEGMENT, REST)]
    for segment in literal:
        if any(character in segment for character in "*{}"):
            raise ValueError(
                f"{shown(text)}: {shown(segment)} is no segment of a template; write {ANY_SEGMENT} for any one "
                f"segment, {REST} for any number of them, and '*' in no other way"
            )
    path = iter(normal_path("/".join(literal) or "/").split("/"))
    return "/".join(segment if segment in (ANY_SEGMENT, REST) else next(path) for segment in segments)


def parse_port(text: str) -> int:
    """A port number as Istio's policies write it: in quotes. Raises ValueError."""
    if text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535:
        return int(text)
    raise ValueError(f"{shown(text)} is not a port from 1 to 65535")


def applies(policy: AuthorizationPolicy, namespace: str, labels: Labels, root_namespace: str) -> bool:
    """Whether the policy selects a workload with these labels in this namespace. One with targets selects none."""
    if policy.targets or policy.namespace not in (namespace, root_namespace):
        return False
    return policy.selector is None or selects(policy.selector, labels)


def _check_pattern(text: str) -> None:
    if not text:
        raise ValueError("an empty pattern matches nothing; write '*' for anything")
    if text.count("*") > 1 or "*" in text[1:-1]:
        raise ValueError(f"{shown(text)}: '*' may stand once, at the beginning or at the end")
