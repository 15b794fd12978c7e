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
from dataclasses import replace
from functools import partial
from typing import Final

from control.api.address import IpAddress
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
    condition_tests,
    connection_clauses,
    port_tests,
    source_tests,
    text_matcher,
)
from waypoint.request import Request, host_name, merged_slashes
from waypoint.tokens import Token

_CLAIM: Final = {ConditionKey.REQUEST_AUDIENCES: "aud", ConditionKey.REQUEST_PRESENTER: "azp"}
_OF_WHAT: Final = "this service or its waypoint"


class Policies:
    """The policies for one service at one waypoint. Made by `compile_policies`; never changes."""

    __slots__ = ("_asks_addresses", "_asks_hosts", "_connections", "_requests", "rehearsal")

    def __init__(self, policies: Collection[AuthorizationPolicy]) -> None:
        self._requests = Verdicts(policies, _request_clauses, _OF_WHAT)
        self._connections = Verdicts(policies, _connection_clauses, _OF_WHAT)
        asked = self._requests.asked | self._connections.asked
        self._asks_addresses = not asked.isdisjoint(ADDRESSES)
        self._asks_hosts = Fact.HOST in asked
        self.rehearsal: Policies | None = None
        """The same, as if policies in dry run were enforced; None when there are none."""
        if any(policy.dry_run for policy in policies):
            self.rehearsal = Policies([replace(policy, dry_run=False) for policy in policies])

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
        connection: Facts = (
            None if source is None else source.principal,
            None if source is None else source.namespace,
            address_number(source_ip) if self._asks_addresses else None,
            address_number(destination_ip) if self._asks_addresses else None,
            destination_port,
        )
        if request is None:
            return self._connections.decide(connection)
        hosts = (request.host, host_name(request.host)) if self._asks_hosts and request.host else None
        principal = None if token is None else token.principal
        return self._requests.decide((*connection, request.method, request.path, hosts, request, principal, token))


def compile_policies(policies: Iterable[AuthorizationPolicy]) -> Policies:
    """The policies that target a service or its Gateway (all of them: none is filtered here), ready to be asked."""
    return Policies(tuple(policies))


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
    asked = _tests(Fact.REQUEST_PRINCIPAL, text_matcher, source.request_principals, source.not_request_principals)
    return (*source_tests(source), *asked)


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
        yield Test(fact, matcher(values), False)
    if not_values:
        yield Test(fact, matcher(not_values), True)


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
