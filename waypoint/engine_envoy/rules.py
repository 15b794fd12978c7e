"""AuthorizationPolicies as Envoy's RBAC filters: those that deny in one, those that allow in the other. No I/O.

Those that audit are the first one's shadow rules, which decide nothing: the one that matches is a request's metadata.
So is what all of them would decide, those in dry run too, where there are some of these.
The meaning is `waypoint.authz`'s. A rule that asks for something that is not known here is not left out: it makes
`NotExpressibleError`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from control.api.engines import unknown_to_envoy
from control.api.extension import ExternalAuthorization
from control.api.metadata import ENGINE
from control.api.policy import (
    ANY_SEGMENT,
    REST,
    Action,
    AuthorizationPolicy,
    Condition,
    ConditionKey,
    Operation,
    Rule,
    Source,
    is_path_template,
)
from control.api.traffic import TrafficPolicy
from waypoint.engine_envoy.parts import (
    JWT_METADATA,
    PAYLOAD,
    PRINCIPAL,
    RBAC,
    RBAC_ALLOW,
    RBAC_DENY,
    REVOKED,
    SERIAL,
    WOULD_ALLOW,
    WOULD_DENY,
    Json,
    extension,
    message,
)
from waypoint.request import merged_slashes

_PER_ROUTE: Final = "extensions.filters.http.rbac.v3.RBACPerRoute"
_SCHEME: Final = "spiffe://"
_CLAIMS: Final = {ConditionKey.REQUEST_AUDIENCES: "aud", ConditionKey.REQUEST_PRESENTER: "azp"}
_OF_DESTINATION: Final = (ConditionKey.DESTINATION_IP, ConditionKey.DESTINATION_PORT)


class NotExpressibleError(ValueError):
    """What a resource asks for, and Envoy cannot do; the text says what, and how to mend it."""


class NotThereError(NotExpressibleError):
    """A file that a resource names is not what it says; it may be in a while."""


def check_known(policy: TrafficPolicy, *, backend: bool = False) -> None:
    """That nothing is said but what this engine acts on; `backend` is that of `unknown_to_envoy`. Raises
    NotExpressibleError.
    """
    if unknown := unknown_to_envoy(policy, backend=backend):
        named = f"TrafficPolicy {policy.key}: {unknown}"
        raise NotExpressibleError(f"{named} is not known to the engine envoy; remove it, or the annotation {ENGINE}")


@dataclass(frozen=True, slots=True)
class _Side:
    """Envoy's words for one half of a policy."""

    all_of: str
    any_of: str
    none_of: str
    kind: str

    def both(self, parts: Sequence[Json]) -> Json:
        if not parts:
            return {"any": True}
        return parts[0] if len(parts) == 1 else {self.all_of: {self.kind: list(parts)}}

    def either(self, parts: Sequence[Json]) -> Json:
        return parts[0] if len(parts) == 1 else {self.any_of: {self.kind: list(parts)}}

    def field(self, one: Callable[[str], Json], values: Iterable[str], not_values: Iterable[str]) -> Iterable[Json]:
        """One of `values` holds, and none of `not_values`; what has none of either asks nothing."""
        if wanted := [one(value) for value in values]:
            yield self.either(wanted)
        if unwanted := [one(value) for value in not_values]:
            yield {self.none_of: self.either(unwanted)}


_CALLED: Final = _Side("and_rules", "or_rules", "not_rule", "rules")
_CALLING: Final = _Side("and_ids", "or_ids", "not_id", "ids")


def http_rules(policies: Collection[AuthorizationPolicy]) -> dict[str, Json]:
    """What the RBAC filters of requests are to hold, by their names. Raises NotExpressibleError."""
    held = _held(policies)
    deny = {**_engine("rules", held, Action.DENY, http=True), **_engine("shadow_rules", held, Action.AUDIT, http=True)}
    return {
        RBAC_DENY: message(_PER_ROUTE, rbac=deny),
        RBAC_ALLOW: message(_PER_ROUTE, rbac=_engine("rules", held, Action.ALLOW, http=True)),
        **dict(_rehearsed(policies)),
    }


def _rehearsed(policies: Collection[AuthorizationPolicy]) -> Iterator[tuple[str, Json]]:
    if any(policy.dry_run for policy in policies):
        held = _held(replace(policy, dry_run=False) for policy in policies)
        for name, action in ((WOULD_DENY, Action.DENY), (WOULD_ALLOW, Action.ALLOW)):
            rules = _engine("shadow_rules", held, action, http=True)
            yield name, message(_PER_ROUTE, rbac={**rules, "shadow_rules_stat_prefix": f"{name}-"})


def revoked(serials: Collection[int]) -> Json:
    """The filter that refuses callers by the serial numbers of their certificates: what is revoked holds at once, and
    not only when tunnels are made anew.
    """
    if not serials:
        return extension(REVOKED, RBAC)
    texts = sorted(map(_serial, serials))
    who = _CALLING.either([{"filter_state": {"key": SERIAL, "string_match": {"exact": text}}} for text in texts])
    policies = {REVOKED: {"permissions": [{"any": True}], "principals": [who]}}
    return extension(REVOKED, RBAC, rules={"action": Action.DENY.value, "policies": policies})


def _serial(number: int) -> str:
    """As Envoy writes it: in whole bytes."""
    text = f"{abs(number):x}"
    return "-" * (number < 0) + text.zfill(len(text) + len(text) % 2)


def tcp_rules(policies: Iterable[AuthorizationPolicy]) -> list[Json]:
    """What RBAC of connections that are not HTTP is to hold: filters' rules. Raises NotExpressibleError."""
    held = _held(policies)
    engines = (_engine("rules", held, action, http=False) for action in (Action.DENY, Action.ALLOW))
    return [engine["rules"] for engine in engines if engine]


def asked_rules(policies: Iterable[AuthorizationPolicy]) -> dict[ExternalAuthorization, Json]:
    """Who is asked about requests, in order, and the rules that say about which."""
    found: dict[ExternalAuthorization, list[AuthorizationPolicy]] = {}
    for policy in _held(policies):
        if policy.action is Action.CUSTOM and policy.authorizer is not None:
            found.setdefault(policy.authorizer, []).append(policy)
    return {
        authorizer: {"action": Action.ALLOW.value, "policies": dict(_named(its, http=True))}
        for authorizer, its in found.items()
    }


def _held(policies: Iterable[AuthorizationPolicy]) -> list[AuthorizationPolicy]:
    """In the order of their keys."""
    return sorted((policy for policy in policies if not policy.dry_run), key=lambda policy: policy.key)


def _does(policy: AuthorizationPolicy, *, http: bool) -> Action:
    """Where nobody can be asked, what asks refuses."""
    unasked = policy.action is Action.CUSTOM and not (http and policy.authorizer is not None)
    return Action.DENY if unasked else policy.action


def _engine(field: str, held: Iterable[AuthorizationPolicy], action: Action, *, http: bool) -> Json:
    """The policies of one kind as the rules of a filter, under the name of its field; empty where there are none."""
    found = [policy for policy in held if _does(policy, http=http) is action]
    does = Action.DENY if action is Action.DENY else Action.ALLOW
    return {field: {"action": does.value, "policies": dict(_named(found, http=http))}} if found else {}


def _named(policies: Iterable[AuthorizationPolicy], *, http: bool) -> Iterable[tuple[str, Json]]:
    for policy in policies:
        for index, rule in enumerate(policy.rules):
            if http or not (policy.action is Action.ALLOW and rule.asks_http):
                yield f"{policy.key}[{index}]", _policy(policy.action, rule, http=http)


def _policy(action: Action, rule: Rule, *, http: bool) -> Json:
    """`http`: else a DENY matches as if it did not ask for it (Istio's rule)."""
    called: list[Json] = []
    calling: list[Json] = []
    if rule.operations:
        called.append(_CALLED.either([_CALLED.both(list(_operation(one, http=http))) for one in rule.operations]))
    if rule.sources:
        calling.append(_CALLING.either([_CALLING.both(list(_source(one, http=http))) for one in rule.sources]))
    for condition in rule.conditions:
        if condition.asks_http and not http:
            continue
        side, parts = (_CALLED, called) if condition.key in _OF_DESTINATION else (_CALLING, calling)
        parts += _condition(side, action, condition)
    return {"permissions": [_CALLED.both(called)], "principals": [_CALLING.both(calling)]}


def _source(source: Source, *, http: bool) -> Iterable[Json]:
    yield from _CALLING.field(_principal, source.principals, source.not_principals)
    yield from _CALLING.field(_namespace, source.namespaces, source.not_namespaces)
    yield from _CALLING.field(_caller_block, source.ip_blocks, source.not_ip_blocks)
    if http:
        # Without trusted proxies, which this engine does not know, it is who connects.
        yield from _CALLING.field(_caller_block, source.remote_ip_blocks, source.not_remote_ip_blocks)
        yield from _CALLING.field(_request_principal, source.request_principals, source.not_request_principals)


def _operation(operation: Operation, *, http: bool) -> Iterable[Json]:
    yield from _CALLED.field(_port, map(str, operation.ports), map(str, operation.not_ports))
    if http:
        yield from _CALLED.field(_method, operation.methods, operation.not_methods)
        yield from _CALLED.field(_path, operation.paths, operation.not_paths)
        yield from _CALLED.field(_host, operation.hosts, operation.not_hosts)


def _condition(side: _Side, action: Action, condition: Condition) -> Iterable[Json]:
    one: Callable[[str], Json]
    match condition.key:
        case ConditionKey.SOURCE_IP | ConditionKey.REMOTE_IP:
            one = _caller_block
        case ConditionKey.SOURCE_NAMESPACE:
            one = _namespace
        case ConditionKey.SOURCE_PRINCIPAL:
            one = _principal
        case ConditionKey.DESTINATION_IP:
            one = _called_block
        case ConditionKey.DESTINATION_PORT:
            one = _port
        case ConditionKey.REQUEST_HEADERS:
            # As `waypoint.authz`: whoever may add to a header that refuses him must not be let through by it.
            name, allowing = condition.name, action is Action.ALLOW
            yield from side.field(lambda text: _header(name, text, parts=not allowing), condition.values, ())
            yield from side.field(lambda text: _header(name, text, parts=allowing), (), condition.not_values)
            return
        case ConditionKey.REQUEST_PRINCIPAL:
            one = _request_principal
        case ConditionKey.REQUEST_AUDIENCES | ConditionKey.REQUEST_PRESENTER | ConditionKey.REQUEST_CLAIMS:
            claim = _CLAIMS.get(condition.key, condition.name).split("][")
            yield from side.field(lambda text: _claim(claim, text), condition.values, condition.not_values)
            return
        case _:
            raise NotExpressibleError(f"when {condition.key.value}: is not known to this engine; remove it")
    yield from side.field(one, condition.values, condition.not_values)


def matcher(pattern: str, before: str = "") -> Json:
    """A StringMatcher of a pattern over a text that begins with `before`."""
    if pattern == "*":
        return {"prefix": before} if before else {"safe_regex": {"regex": "(?s).*"}}
    if pattern.endswith("*"):
        return {"prefix": before + pattern[:-1]}
    if pattern.startswith("*"):
        return {"suffix": pattern[1:]}
    return {"exact": before + pattern}


def _expression(pattern: str, anything: str) -> str:
    """A pattern as a regular expression, whose `*` stands for what `anything` matches."""
    return anything.join(re.escape(part) for part in pattern.split("*"))


def _regex(expression: str) -> Json:
    return {"safe_regex": {"regex": expression}}


def _principal(pattern: str) -> Json:
    return {"filter_state": {"key": PRINCIPAL, "string_match": matcher(pattern, _SCHEME)}}


def _namespace(pattern: str) -> Json:
    expression = f"{_SCHEME}[^/]+/ns/{_expression(pattern, '[^/]*')}/sa/[^/]+"
    return {"filter_state": {"key": PRINCIPAL, "string_match": _regex(expression)}}


def _caller_block(block: str) -> Json:
    return {"remote_ip": _cidr(block)}


def _called_block(block: str) -> Json:
    return {"destination_ip": _cidr(block)}


def _cidr(block: str) -> Json:
    network = ipaddress.ip_network(block)
    return {"address_prefix": str(network.network_address), "prefix_len": network.prefixlen}


def _port(text: str) -> Json:
    return {"destination_port": int(text)}


def _method(pattern: str) -> Json:
    return {"header": {"name": ":method", "string_match": matcher(pattern)}}


def _path(pattern: str) -> Json:
    pattern = merged_slashes(pattern)
    if is_path_template(pattern):
        operators = {ANY_SEGMENT: "[^/]+", REST: ".*"}
        expression = "/".join(operators.get(part, re.escape(part)) for part in pattern.split("/"))
        return {"url_path": {"path": _regex(expression)}}
    return {"url_path": {"path": matcher(pattern)}}


def _host(pattern: str) -> Json:
    """With and without the port, in any case."""
    expression = f"(?i){_expression(pattern, '.*')}[.]?(?::[0-9]*)?"
    return {"header": {"name": ":authority", "string_match": _regex(expression)}}


def _header(name: str, pattern: str, *, parts: bool) -> Json:
    """The value, of several lines joined by commas; `parts`: or any of what stands between commas."""
    expression = f"(?s){_expression(pattern, '.*')}"
    if parts:
        expression += f"|(?s)(?:.*,)?[ \\t]*{_expression(pattern, '[^,]*')}[ \\t]*(?:,.*)?"
    return {"header": {"name": name, "string_match": _regex(expression)}}


def _request_principal(pattern: str) -> Json:
    """Of `<issuer>/<subject>` the parts are known: each place in the pattern may be where they meet."""
    plain = pattern.strip("*")
    if pattern == "*":
        return _claim(["iss"], "*")
    found: list[Json] = []
    for place in (index for index, character in enumerate(plain) if character == "/"):
        issuer, subject = plain[:place], plain[place + 1 :]
        if pattern.startswith("*"):
            issuer = "*" + issuer
        elif pattern.endswith("*"):
            subject += "*"
        found.append({"and_ids": {"ids": [_claim(["iss"], issuer), _claim(["sub"], subject)]}})
    if pattern.startswith("*"):
        found.append(_claim(["sub"], pattern))
    elif pattern.endswith("*"):
        found.append(_claim(["iss"], pattern))
    return _CALLING.either(found or [{"not_id": {"any": True}}])


def _claim(path: list[str], pattern: str) -> Json:
    """A claim, or any of those that it lists; numbers and truth as they are written."""
    values: list[Json] = [{"string_match": matcher(pattern)}]
    if pattern in ("true", "false"):
        values.append({"bool_match": pattern == "true"})
    elif re.fullmatch(r"-?[0-9]{1,15}", pattern):
        values.append({"double_match": {"exact": int(pattern)}})
    any_of = [*values, *({"list_match": {"one_of": value}} for value in values)]
    segments = [{"key": part} for part in (PAYLOAD, *path)]
    asked = {"filter": JWT_METADATA, "path": segments, "value": {"or_match": {"value_matchers": any_of}}}
    return {"sourced_metadata": {"metadata_matcher": asked}}
