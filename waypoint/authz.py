"""May this caller have this request? AuthorizationPolicies that target a Gateway or a Service. No I/O.

The meaning is Istio's and stands in `control.api.policy`; the engine is `uproxy.rules`. Of the destination, the address
and port are asked that the caller dialled. Where the documentation leaves room, the reading is the one that refuses:
- `hosts`: without regard to case, and with or without the port, so that `shop.example` is `Shop.Example:8080` too;
- `request.headers[x]`: several lines, and values in one line, are one text joined by commas; a DENY for a value, and
  an ALLOW but for a value, see each part of it as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from control.api.address import IpAddress
from control.api.extension import ExternalAuthorization
from control.api.identity import SpiffeId
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
from uproxy.rules import (
    ADDRESSES,
    Alternative,
    Clause,
    Decision,
    Fact,
    Facts,
    Test,
    Verdicts,
    address_number,
    block_matcher,
    condition_tests,
    connection_clauses,
    facts_asked,
    port_tests,
    source_tests,
    text_matcher,
    verdicts,
)
from waypoint.forwarded import remote_address
from waypoint.messages import Fields
from waypoint.request import Request, host_name, merged_slashes
from waypoint.tokens import Token

_CLAIM: Final = {ConditionKey.REQUEST_AUDIENCES: "aud", ConditionKey.REQUEST_PRESENTER: "azp"}
_OF_WHAT: Final = "this service or its waypoint"
_NO_REMOTE: Final = Decision(False, "", "x-forwarded-for has no address where a trusted proxy writes one")


@dataclass(frozen=True, slots=True)
class Check:
    """Who else must allow a request."""

    rule: str
    """Of a CUSTOM policy, as `Decision.policy`."""
    authorizer: ExternalAuthorization | None
    """None: nobody can be asked."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What somebody who lets a request pass adds to it."""

    upstream: Fields = ()
    """Of the request, in place of its own fields of these names."""
    downstream: Fields = ()
    """Of the response."""

    def applied(self, request: Request) -> Request:
        """The request as it goes on."""
        if not self.upstream:
            return request
        names = {name for name, _ in self.upstream}
        kept = [field for field in request.fields if field[0] not in names]
        return replace(request, fields=[*kept, *self.upstream])


class Policies:
    """The policies for one service at one waypoint. Made by `compile_policies`; never changes."""

    __slots__ = (
        "_asks_addresses",
        "_asks_hosts",
        "_asks_remote",
        "_connections",
        "_custom",
        "_requests",
        "_trusted_proxies",
        "asks_others",
        "rehearsal",
    )

    def __init__(self, policies: Collection[AuthorizationPolicy], trusted_proxies: int) -> None:
        ordered = sorted(policies, key=lambda policy: policy.key)
        custom = [policy for policy in ordered if policy.action is Action.CUSTOM]
        self._custom = [(policy.authorizer, verdicts([policy], _request_clauses)) for policy in custom]
        self.asks_others = bool(custom)
        """Whether there may be any `checks`."""
        self._requests = Verdicts([one for one in ordered if one not in custom], _request_clauses, _OF_WHAT)
        self._connections = Verdicts(ordered, _connection_clauses, _OF_WHAT)
        asked = self._requests.asked.union(self._connections.asked, *(facts_asked(found) for _, found in self._custom))
        self._asks_addresses = not asked.isdisjoint(ADDRESSES)
        self._asks_hosts = Fact.HOST in asked
        self._asks_remote = Fact.REMOTE_IP in asked
        self._trusted_proxies = trusted_proxies
        self.rehearsal: Policies | None = None
        """The same, as if policies in dry run were enforced; None when there are none."""
        if any(policy.dry_run for policy in policies):
            self.rehearsal = Policies([replace(policy, dry_run=False) for policy in policies], trusted_proxies)

    def checks(
        self,
        source: SpiffeId | None,
        source_ip: IpAddress,
        destination_ip: IpAddress,
        destination_port: int,
        request: Request,
        token: Token | None = None,
    ) -> tuple[Check, ...]:
        """Who is to be asked before `decide` is, as for that; each once."""
        facts = self._facts(source, source_ip, destination_ip, destination_port, request, token)
        found: dict[ExternalAuthorization | None, Check] = {}
        for authorizer, rules in self._custom:
            rule = next((rule.decision.policy for rule in rules if rule.matches(facts)), None)
            if rule is not None:
                found.setdefault(authorizer, Check(rule, authorizer))
        return tuple(found.values())

    def decide(
        self,
        source: SpiffeId | None,
        source_ip: IpAddress,
        destination_ip: IpAddress,
        destination_port: int,
        request: Request | None,
        token: Token | None = None,
    ) -> Decision:
        """DENY before ALLOW, first match decides. `source`: the caller, None without a proven identity.

        `request`: None for a connection that is not HTTP, of which nothing is known that a request would tell. `token`:
        the request's, verified.
        """
        facts = self._facts(source, source_ip, destination_ip, destination_port, request, token)
        if request is None:
            return self._connections.decide(facts)
        if self._asks_remote and facts[Fact.REMOTE_IP] is None:
            return _NO_REMOTE
        return self._requests.decide(facts)

    def _facts(
        self,
        source: SpiffeId | None,
        source_ip: IpAddress,
        destination_ip: IpAddress,
        destination_port: int,
        request: Request | None,
        token: Token | None,
    ) -> Facts:
        connection: Facts = (
            None if source is None else source.principal,
            None if source is None else source.namespace,
            address_number(source_ip) if self._asks_addresses else None,
            address_number(destination_ip) if self._asks_addresses else None,
            destination_port,
        )
        if request is None:
            return connection
        hosts = (request.host, host_name(request.host)) if self._asks_hosts and request.host else None
        principal = None if token is None else token.principal
        facts = (*connection, request.method, request.path, hosts, request, principal, token)
        if not self._asks_remote:
            return facts
        remote = remote_address(request.header("x-forwarded-for"), source_ip, self._trusted_proxies)
        return (*facts, None if remote is None else address_number(remote))


def compile_policies(policies: Iterable[AuthorizationPolicy], trusted_proxies: int = 0) -> Policies:
    """The policies that target a service or its Gateway (all of them: none is filtered here), ready to be asked."""
    return Policies(tuple(policies), trusted_proxies)


def _connection_clauses(action: Action, rule: Rule) -> Iterable[Clause] | None:
    """A DENY matches as if it did not ask for HTTP, and an ALLOW that does never matches (Istio's rule)."""
    if action is Action.ALLOW and rule.asks_http:
        return None
    return connection_clauses(rule)


def _request_clauses(action: Action, rule: Rule) -> Iterable[Clause]:
    if rule.sources:
        yield tuple(_source_tests(source) for source in rule.sources)
    if rule.operations:
        yield tuple(_operation_tests(operation) for operation in rule.operations)
    for condition in rule.conditions:
        yield (_request_tests(action, condition) if condition.asks_http else condition_tests(condition),)


def _source_tests(source: Source) -> Alternative:
    return (
        *source_tests(source),
        *_tests(Fact.REQUEST_PRINCIPAL, text_matcher, source.request_principals, source.not_request_principals),
        *_tests(Fact.REMOTE_IP, block_matcher, source.remote_ip_blocks, source.not_remote_ip_blocks),
    )


def _operation_tests(operation: Operation) -> Alternative:
    paths, not_paths = (tuple(map(merged_slashes, found)) for found in (operation.paths, operation.not_paths))
    return (
        *port_tests(operation),
        *_tests(Fact.METHOD, text_matcher, operation.methods, operation.not_methods),
        *_tests(Fact.PATH, _path_matcher, paths, not_paths),
        *_tests(Fact.HOST, _host_matcher, operation.hosts, operation.not_hosts),
    )


def _tests(
    fact: Fact,
    matcher: Callable[[Collection[str]], Callable[[object], bool]],
    values: Collection[str],
    not_values: Collection[str],
) -> Iterable[Test]:
    if values:
        yield int(fact), matcher(values), False
    if not_values:
        yield int(fact), matcher(not_values), True


def _path_matcher(patterns: Collection[str]) -> Callable[[object], bool]:
    plain = text_matcher(pattern for pattern in patterns if not is_path_template(pattern))
    templates = [re.compile(_expression(pattern)) for pattern in patterns if is_path_template(pattern)]
    if not templates:
        return plain

    def holds(path: object) -> bool:
        return isinstance(path, str) and (plain(path) or any(template.fullmatch(path) for template in templates))

    return holds


def _expression(template: str) -> str:
    """Matches in time linear in the path: what may vary ends at a slash, or is last."""
    operators = {ANY_SEGMENT: "[^/]+", REST: ".*"}
    return "/".join(operators.get(segment, re.escape(segment)) for segment in template.split("/"))


def _host_matcher(patterns: Collection[str]) -> Callable[[object], bool]:
    matches = text_matcher(patterns)

    def holds(hosts: object) -> bool:
        return isinstance(hosts, tuple) and any(map(matches, hosts))

    return holds


def _request_tests(action: Action, condition: Condition) -> Alternative:
    """What a condition asks of a request, its headers or its token."""
    if condition.key is ConditionKey.REQUEST_HEADERS:
        return _header_tests(action, condition)
    if condition.key is ConditionKey.REQUEST_PRINCIPAL:
        return tuple(_tests(Fact.REQUEST_PRINCIPAL, text_matcher, condition.values, condition.not_values))
    if condition.key is ConditionKey.REMOTE_IP:
        return tuple(_tests(Fact.REMOTE_IP, block_matcher, condition.values, condition.not_values))
    claim = _CLAIM.get(condition.key, condition.name)
    return tuple(_tests(Fact.TOKEN, partial(_claim_matcher, claim), condition.values, condition.not_values))


def _claim_matcher(claim: str, patterns: Collection[str]) -> Callable[[object], bool]:
    matches = text_matcher(patterns)

    def holds(token: object) -> bool:
        return isinstance(token, Token) and any(map(matches, token.claim(claim)))

    return holds


def _header_tests(action: Action, condition: Condition) -> Alternative:
    # Whoever may add to a header that refuses him must not be let through by what he adds.
    allowing = action is Action.ALLOW
    return (
        *_tests(Fact.HEADERS, partial(_header_matcher, condition.name, parts=not allowing), condition.values, ()),
        *_tests(Fact.HEADERS, partial(_header_matcher, condition.name, parts=allowing), (), condition.not_values),
    )


def _header_matcher(name: str, patterns: Collection[str], *, parts: bool) -> Callable[[object], bool]:
    matches = text_matcher(patterns)

    def holds(request: object) -> bool:
        value = request.header(name) if isinstance(request, Request) else None
        if value is None:
            return False
        return matches(value) or (parts and any(matches(part.strip(" \t")) for part in value.split(",")))

    return holds
