"""May this caller have this connection? AuthorizationPolicies, compiled once and asked per connection."""

from __future__ import annotations

from collections.abc import Iterable

from control.api.address import IpAddress
from control.api.identity import SpiffeId
from control.api.policy import Action, AuthorizationPolicy, Rule
from uproxy.rules import ADDRESSES, Clause, Facts, Verdicts, address_number, connection_clauses
from uproxy.rules import Decision as Decision  # beside what decides


class Policies:
    """The policies that select one workload. Made by `compile_policies`; never changes."""

    __slots__ = ("_asks_addresses", "_verdicts")

    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts
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
        facts: Facts = (
            None if source is None else source.principal,
            None if source is None else source.namespace,
            address_number(source_ip) if self._asks_addresses else None,
            address_number(destination_ip) if self._asks_addresses else None,
            destination_port,
        )
        return self._verdicts.decide(facts)


def compile_policies(policies: Iterable[AuthorizationPolicy]) -> Policies:
    """The policies that select one workload (all of them: none is filtered here), ready to be asked."""
    return Policies(Verdicts(policies, _clauses, "this workload"))


def _clauses(action: Action, rule: Rule) -> Iterable[Clause]:
    return connection_clauses(rule)
