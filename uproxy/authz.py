"""May this caller have this connection? AuthorizationPolicies, compiled once and asked per connection.

The meaning is Istio's and stands in `control.api.policy`. Here each field becomes one *test* of one fact
about a connection, and a rule: in every clause (from, to, each `when`), for one alternative, all tests hold.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from control.api.address import IpAddress
from control.api.identity import SpiffeId
from control.api.policy import (
    Action,
    AuthorizationPolicy,
    Condition,
    ConditionKey,
    Operation,
    Rule,
    Source,
)


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer for one connection. `policy` is `namespace/name[rule]`, empty when no rule decided."""

    allowed: bool
    policy: str
    reason: str
    """For the operator: which policy, or that none matched."""


class Policies:
    """The policies that select one workload. Made by `compile_policies`; never changes."""

    __slots__ = ("_allow", "_asks_addresses", "_default", "_deny")

    def __init__(self, deny: tuple[_Verdict, ...], allow: tuple[_Verdict, ...], default: Decision) -> None:
        self._deny = deny
        self._allow = allow
        self._default = default
        self._asks_addresses = any(test.fact in _ADDRESSES for verdict in (*deny, *allow) for test in verdict.tests())

    def decide(
        self,
        source: SpiffeId | None,
        source_ip: IpAddress,
        destination_ip: IpAddress,
        destination_port: int,
    ) -> Decision:
        """DENY before ALLOW, first match decides. `source` is None for a caller without a proven identity.

        `destination_port` is the workload's port, not the service's.
        """
        facts: _Facts = (
            None if source is None else source.principal,
            None if source is None else source.namespace,
            _number(source_ip) if self._asks_addresses else None,
            _number(destination_ip) if self._asks_addresses else None,
            destination_port,
        )
        for verdict in self._deny:
            if verdict.matches(facts):
                return verdict.decision
        for verdict in self._allow:
            if verdict.matches(facts):
                return verdict.decision
        return self._default


def compile_policies(policies: Iterable[AuthorizationPolicy]) -> Policies:
    """The policies that select one workload (all of them: none is filtered here), ready to be asked."""
    ordered = sorted(policies, key=lambda policy: policy.key)  # so that the rule reported is always the same one
    deny = [policy for policy in ordered if policy.action is Action.DENY]
    allow = [policy for policy in ordered if policy.action is Action.ALLOW]
    if allow:
        default = Decision(False, "", f"no ALLOW policy matched ({_names(allow)})")
    else:
        default = Decision(True, "", "no ALLOW policy selects this workload")
    return Policies(
        tuple(verdict for policy in deny for verdict in _verdicts(policy)),
        tuple(verdict for policy in allow for verdict in _verdicts(policy)),
        default,
    )


class _Fact(IntEnum):
    """Where in `_Facts` a test finds its value."""

    PRINCIPAL = 0
    NAMESPACE = 1
    SOURCE_IP = 2
    DESTINATION_IP = 3
    DESTINATION_PORT = 4


_Facts = tuple[str | None, str | None, int | None, int | None, int]
_ADDRESSES: Final = (_Fact.SOURCE_IP, _Fact.DESTINATION_IP)
_CONDITION_FACT: Final = {
    ConditionKey.SOURCE_PRINCIPAL: _Fact.PRINCIPAL,
    ConditionKey.SOURCE_NAMESPACE: _Fact.NAMESPACE,
    ConditionKey.SOURCE_IP: _Fact.SOURCE_IP,
    ConditionKey.DESTINATION_IP: _Fact.DESTINATION_IP,
    ConditionKey.DESTINATION_PORT: _Fact.DESTINATION_PORT,
}
_ALL_VERSION_BITS: Final = 0b111 << 128
_NAMES_SHOWN: Final = 5  # of policies that did not match; the text travels in a response header


@dataclass(frozen=True, slots=True)
class _Test:
    """One field. `holds` is False for a fact that is missing (None), so that a negated test then matches."""

    fact: _Fact
    holds: Callable[[object], bool]
    negated: bool


_Alternative = tuple[_Test, ...]
_Clause = tuple[_Alternative, ...]


@dataclass(frozen=True, slots=True)
class _Verdict:
    """One rule and what is decided when it matches."""

    clauses: tuple[_Clause, ...]
    decision: Decision

    def matches(self, facts: _Facts) -> bool:
        for clause in self.clauses:
            for alternative in clause:
                for test in alternative:
                    if test.holds(facts[test.fact]) is test.negated:
                        break
                else:
                    break  # every test of this alternative holds: on to the next clause
            else:
                return False
        return True

    def tests(self) -> Iterable[_Test]:
        return (test for clause in self.clauses for alternative in clause for test in alternative)


def _verdicts(policy: AuthorizationPolicy) -> Iterable[_Verdict]:
    allowed = policy.action is Action.ALLOW
    for index, rule in enumerate(policy.rules):
        name = f"{policy.key}[{index}]"
        decision = Decision(allowed, name, f"{'allowed' if allowed else 'denied'} by {name}")
        yield _Verdict(tuple(_clauses(rule)), decision)


def _clauses(rule: Rule) -> Iterable[_Clause]:
    if rule.sources:
        yield tuple(_source(source) for source in rule.sources)
    if rule.operations:
        yield tuple(_operation(operation) for operation in rule.operations)
    for condition in rule.conditions:
        yield (_condition(condition),)


def _source(source: Source) -> _Alternative:
    return (
        *_field(_Fact.PRINCIPAL, source.principals, source.not_principals),
        *_field(_Fact.NAMESPACE, source.namespaces, source.not_namespaces),
        *_field(_Fact.SOURCE_IP, source.ip_blocks, source.not_ip_blocks),
    )


def _operation(operation: Operation) -> _Alternative:
    return tuple(_field(_Fact.DESTINATION_PORT, operation.ports, operation.not_ports))


def _condition(condition: Condition) -> _Alternative:
    return tuple(_field(_CONDITION_FACT[condition.key], condition.values, condition.not_values))


def _field(fact: _Fact, values: Collection[str | int], not_values: Collection[str | int]) -> Iterable[_Test]:
    if values:
        yield _Test(fact, _matcher(fact, values), False)
    if not_values:
        yield _Test(fact, _matcher(fact, not_values), True)


def _matcher(fact: _Fact, values: Collection[str | int]) -> Callable[[object], bool]:
    if fact is _Fact.DESTINATION_PORT:
        return frozenset(int(value) for value in values).__contains__
    if fact in _ADDRESSES:
        return _block_matcher(str(value) for value in values)
    return _text_matcher(str(value) for value in values)


def _text_matcher(patterns: Iterable[str]) -> Callable[[object], bool]:
    """Exact values in a set; `*` alone means present; `*suffix` and `prefix*` in one C call each."""
    exact, prefixes, suffixes = set(), [], []
    for pattern in patterns:
        if pattern.startswith("*"):  # before the prefix, as Istio does
            suffixes.append(pattern[1:])  # every value ends with "", so "*" needs no case of its own
        elif pattern.endswith("*"):
            prefixes.append(pattern[:-1])
        else:
            exact.add(pattern)
    if not prefixes and not suffixes:
        return frozenset(exact).__contains__
    starts, ends = tuple(prefixes), tuple(suffixes)

    def holds(value: object) -> bool:
        return isinstance(value, str) and (value in exact or value.startswith(starts) or value.endswith(ends))

    return holds


def _block_matcher(blocks: Iterable[str]) -> Callable[[object], bool]:
    """Networks grouped by mask: one AND and one look-up per distinct prefix length."""
    by_mask: dict[int, set[int]] = {}
    for block in blocks:
        network = ipaddress.ip_network(block)
        mask = _ALL_VERSION_BITS | int(network.netmask)
        by_mask.setdefault(mask, set()).add(_numbered(network.version, int(network.network_address)))
    masks = tuple(by_mask.items())

    def holds(value: object) -> bool:
        return isinstance(value, int) and any(value & mask in networks for mask, networks in masks)

    return holds


def _number(address: IpAddress) -> int:
    parsed = ipaddress.ip_address(address)
    return _numbered(parsed.version, int(parsed))


def _numbered(version: int, value: int) -> int:
    """The address below its version, so that no IPv4 address is in an IPv6 block, nor the other way round."""
    return version << 128 | value


def _names(policies: Collection[AuthorizationPolicy]) -> str:
    keys = [policy.key for policy in policies]
    more = len(keys) - _NAMES_SHOWN
    return ", ".join(keys[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
