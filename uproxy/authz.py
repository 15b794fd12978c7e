"""May this caller have this connection? AuthorizationPolicies, compiled once and asked per connection.

Two ways to ask: of a caller that connects itself (`Policies`), and of one for whom a waypoint connects (`Relayed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from control.api.address import IpAddress
from control.api.identity import SpiffeId
from control.api.policy import Action, AuthorizationPolicy, Rule
from uproxy.rules import ADDRESSES, Clause, Fact, Facts, Test, Verdicts, address_number, connection_clauses
from uproxy.rules import Decision as Decision  # beside what decides

MAX_DECIDED: Final = 1024
"""Decisions that are remembered, so that the same callers are not judged again by every rule; a quarter of a MiB."""


class Policies:
    """The policies that select one workload. Made by `compile_policies`; never changes."""

    __slots__ = ("_asks_addresses", "_decided", "_verdicts")

    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts
        self._decided: dict[Facts, Decision] = {}
        self._asks_addresses = not verdicts.asked.isdisjoint(ADDRESSES)

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
        if self._asks_addresses:
            facts = _facts(source, source_ip, destination_ip, destination_port)
        else:
            facts = _facts(source, None, None, destination_port)
        decision = self._decided.get(facts)
        if decision is None:
            if len(self._decided) >= MAX_DECIDED:
                self._decided.clear()
            decision = self._decided[facts] = self._verdicts.decide(facts)
        return decision


def compile_policies(policies: Iterable[AuthorizationPolicy]) -> Policies:
    """The policies that select one workload (all of them: none is filtered here), ready to be asked."""
    return Policies(Verdicts(policies, _clauses, _WHAT))


def _clauses(action: Action, rule: Rule) -> Iterable[Clause]:
    return connection_clauses(rule)


class Relayed:
    """The policies that select one workload, for connections that a bound waypoint makes (docs/hbone.md 4).

    A DENY matches if it matches the caller or the waypoint; an ALLOW is asked about the caller alone, since the binding
    itself admits the waypoint. So is a DENY of everybody *but* some, or it would refuse every waypoint.
    """

    __slots__ = ("_of_stranger", "_of_waypoint", "_verdicts")

    def __init__(self, policies: Iterable[AuthorizationPolicy]) -> None:
        selecting = tuple(policies)
        self._verdicts = Verdicts(selecting, _clauses, _WHAT)
        self._of_waypoint = Verdicts(selecting, _clauses_of_waypoint, _WHAT)
        self._of_stranger = Verdicts(selecting, _clauses_of_stranger, _WHAT)

    def decide(
        self,
        caller: SpiffeId | None,
        caller_ip: IpAddress | None,
        waypoint: SpiffeId,
        waypoint_ip: IpAddress,
        destination_ip: IpAddress,
        destination_port: int,
    ) -> Decision:
        """`caller` and its address are None when the waypoint did not say: then no ALLOW that names sources matches,
        and a DENY of everybody but some does.
        """
        verdicts = self._of_stranger if caller is None else self._verdicts
        facts = _facts(caller, caller_ip, destination_ip, destination_port)
        of_waypoint = _facts(waypoint, waypoint_ip, destination_ip, destination_port)
        decision = verdicts.denied(facts) or self._of_waypoint.denied(of_waypoint) or verdicts.allowed(facts)
        return verdicts.audited(decision, facts)


_WHAT: Final = "this workload"
_SOURCE: Final = (Fact.PRINCIPAL, Fact.NAMESPACE, Fact.SOURCE_IP)


def _facts(
    source: SpiffeId | None, source_ip: IpAddress | None, destination_ip: IpAddress | None, destination_port: int
) -> Facts:
    return (
        None if source is None else source.principal,
        None if source is None else source.namespace,
        None if source_ip is None else address_number(source_ip),
        None if destination_ip is None else address_number(destination_ip),
        destination_port,
    )


def _clauses_of_stranger(action: Action, rule: Rule) -> Iterable[Clause] | None:
    """An ALLOW of a caller that is not known cannot be one of some sources, nor of all but some."""
    if action is Action.ALLOW:
        return _without(lambda test: test[0] in _SOURCE, connection_clauses(rule))
    return connection_clauses(rule)


def _clauses_of_waypoint(action: Action, rule: Rule) -> Iterable[Clause] | None:
    """A waypoint is none of those that a DENY of all but some sources means."""
    if action is Action.ALLOW:
        return None
    return _without(lambda test: test[2] and test[0] in _SOURCE, connection_clauses(rule))


def _without(fails: Callable[[Test], bool], clauses: Iterable[Clause]) -> Iterable[Clause] | None:
    """The clauses when some tests never hold; None when one of them cannot hold then."""
    left = tuple(tuple(tests for tests in clause if not any(map(fails, tests))) for clause in clauses)
    return left if all(left) else None
