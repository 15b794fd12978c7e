"""Rules of AuthorizationPolicies, compiled to tests of facts: what `uproxy.authz` and `waypoint.authz` share.

The meaning is Istio's and stands in `control.api.policy`. Here each field becomes one *test* of one fact about a
connection or request, and a rule: in every clause (from, to, each `when`), for one alternative, all tests hold.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

from control.api.address import IpAddress
from control.api.policy import Action, AuthorizationPolicy, Condition, ConditionKey, Operation, Rule, Source


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer for one connection or request. `policy` is `namespace/name[rule]`, empty when no rule decided."""

    allowed: bool
    policy: str
    reason: str
    """For the operator: which policy, or that none matched."""
    audit: str = ""
    """Likewise `namespace/name[rule]` of an AUDIT policy, which decides nothing; empty when none matches."""


class Fact(IntEnum):
    """Where in `Facts` a test finds its value. Those about HTTP are for waypoints."""

    PRINCIPAL = 0
    NAMESPACE = 1
    SOURCE_IP = 2
    DESTINATION_IP = 3
    DESTINATION_PORT = 4
    METHOD = 5
    PATH = 6
    HOST = 7
    HEADERS = 8
    REQUEST_PRINCIPAL = 9
    TOKEN = 10
    REMOTE_IP = 11


Facts = tuple[object, ...]
"""In the order of `Fact`, as far as they are known. None: the connection has no such thing."""
ADDRESSES: Final = (Fact.SOURCE_IP, Fact.DESTINATION_IP, Fact.REMOTE_IP)
"""Facts that are `address_number`s."""


Test = tuple[int, Callable[[object], bool], bool]
"""One field: the `Fact` that it is about, whether that holds, and whether it is negated. It does not hold for a fact
that is missing (None), so that a negated test then matches."""
Alternative = tuple[Test, ...]
Clause = tuple[Alternative, ...]
CompileRule = Callable[[Action, Rule], Iterable[Clause] | None]
"""The clauses of a policy's rule. None: it never matches."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One rule and what is decided when it matches."""

    clauses: tuple[Clause, ...]
    decision: Decision

    def matches(self, facts: Facts) -> bool:
        for clause in self.clauses:
            for alternative in clause:
                for fact, holds, negated in alternative:
                    if holds(facts[fact]) is negated:
                        break
                else:
                    break  # every test of this alternative holds: on to the next clause
            else:
                return False
        return True


class Verdicts:
    """Policies that hold together for something, compiled. Never changes.

    Nobody is asked here: what a CUSTOM policy matches is denied.
    """

    __slots__ = ("_allow", "_audit", "_default", "_deny", "asked")

    def __init__(self, policies: Iterable[AuthorizationPolicy], compile_rule: CompileRule, of_what: str) -> None:
        """`of_what`: what they hold for, for the operator. All of the policies count, but those in dry run."""
        # In order, so that the rule reported is always the same one.
        ordered = sorted((policy for policy in policies if not policy.dry_run), key=lambda policy: policy.key)
        allow = [policy for policy in ordered if policy.action is Action.ALLOW]
        deny = [policy for policy in ordered if policy.action in (Action.CUSTOM, Action.DENY)]
        audit = [policy for policy in ordered if policy.action is Action.AUDIT]
        self._deny, self._allow, self._audit = (verdicts(some, compile_rule) for some in (deny, allow, audit))
        if allow:
            self._default = Decision(False, "", f"no ALLOW policy matched ({_names(allow)})")
        else:
            self._default = Decision(True, "", f"no ALLOW policy selects {of_what}")
        self.asked = facts_asked((*self._deny, *self._allow, *self._audit))
        """The facts that a decision may depend on; nobody looks at the others."""

    def decide(self, facts: Facts) -> Decision:
        """DENY before ALLOW, first match decides."""
        return self.audited(self.denied(facts) or self.allowed(facts), facts)

    def audited(self, decision: Decision, facts: Facts) -> Decision:
        """With the AUDIT policy that matches, if one does."""
        for verdict in self._audit:
            if verdict.matches(facts):
                return replace(decision, audit=verdict.decision.policy)
        return decision

    def denied(self, facts: Facts) -> Decision | None:
        """The DENY that matches, if one does."""
        for verdict in self._deny:
            if verdict.matches(facts):
                return verdict.decision
        return None

    def allowed(self, facts: Facts) -> Decision:
        """What the ALLOW policies say, or that there are none."""
        for verdict in self._allow:
            if verdict.matches(facts):
                return verdict.decision
        return self._default


def facts_asked(of: Iterable[Verdict]) -> frozenset[Fact]:
    """Those that their matching may depend on."""
    return frozenset(Fact(test[0]) for v in of for clause in v.clauses for tests in clause for test in tests)


def verdicts(policies: Iterable[AuthorizationPolicy], compile_rule: CompileRule) -> tuple[Verdict, ...]:
    """The rules of some policies that can match."""
    found = []
    for policy in policies:
        for index, rule in enumerate(policy.rules):
            clauses = compile_rule(policy.action, rule)
            if clauses is not None:
                allowed = policy.action is Action.ALLOW
                name = f"{policy.key}[{index}]"
                nobody = ", since nobody can be asked here" if policy.action is Action.CUSTOM else ""
                decision = Decision(allowed, name, f"{'allowed' if allowed else 'denied'} by {name}{nobody}")
                found.append(Verdict(tuple(clauses), decision))
    return tuple(found)


_CONDITION_FACT: Final = {
    ConditionKey.SOURCE_PRINCIPAL: Fact.PRINCIPAL,
    ConditionKey.SOURCE_NAMESPACE: Fact.NAMESPACE,
    ConditionKey.SOURCE_IP: Fact.SOURCE_IP,
    ConditionKey.DESTINATION_IP: Fact.DESTINATION_IP,
    ConditionKey.DESTINATION_PORT: Fact.DESTINATION_PORT,
}
_ALL_VERSION_BITS: Final = 0b111 << 128
_NAMES_SHOWN: Final = 5  # of policies that did not match; the text travels in a response header


def connection_clauses(rule: Rule) -> Iterable[Clause]:
    """What a rule asks of a connection, leaving out what it asks of HTTP."""
    if rule.sources:
        yield tuple(source_tests(source) for source in rule.sources)
    if rule.operations:
        yield tuple(port_tests(operation) for operation in rule.operations)
    for condition in rule.conditions:
        yield (condition_tests(condition),)


def source_tests(source: Source) -> Alternative:
    return (
        *_field(Fact.PRINCIPAL, source.principals, source.not_principals),
        *_field(Fact.NAMESPACE, source.namespaces, source.not_namespaces),
        *_field(Fact.SOURCE_IP, source.ip_blocks, source.not_ip_blocks),
    )


def port_tests(operation: Operation) -> Alternative:
    return tuple(_field(Fact.DESTINATION_PORT, operation.ports, operation.not_ports))


def condition_tests(condition: Condition) -> Alternative:
    """None of them for a condition on HTTP."""
    fact = _CONDITION_FACT.get(condition.key)
    return () if fact is None else tuple(_field(fact, condition.values, condition.not_values))


def _field(fact: Fact, values: Collection[str | int], not_values: Collection[str | int]) -> Iterable[Test]:
    if values:
        yield int(fact), _matcher(fact, values), False
    if not_values:
        yield int(fact), _matcher(fact, not_values), True


def _matcher(fact: Fact, values: Collection[str | int]) -> Callable[[object], bool]:
    if fact is Fact.DESTINATION_PORT:
        return frozenset(int(value) for value in values).__contains__
    if fact in ADDRESSES:
        return block_matcher(str(value) for value in values)
    return text_matcher(str(value) for value in values)


def text_matcher(patterns: Iterable[str]) -> Callable[[object], bool]:
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


def block_matcher(blocks: Iterable[str]) -> Callable[[object], bool]:
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


def address_number(address: IpAddress) -> int:
    """The address as the tests of blocks take it."""
    parsed = ipaddress.ip_address(address)
    return _numbered(parsed.version, int(parsed))


def _numbered(version: int, value: int) -> int:
    """The address below its version, so that no IPv4 address is in an IPv6 block, nor the other way round."""
    return version << 128 | value


def _names(policies: Collection[AuthorizationPolicy]) -> str:
    keys = [policy.key for policy in policies]
    more = len(keys) - _NAMES_SHOWN
    return ", ".join(keys[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
