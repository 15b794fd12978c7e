"""Where the processes of a waypoint stand, and which of them serves what. Part of `mesh`.

With `remote` each serves everything that is bound to its Gateway. With the others a process stands before the workloads
of its own node, or of its own node and service account: callers take the one before the endpoint that they have drawn,
and a workload believes that one alone about who calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from control.api.bindings import Subject, Wish
from control.api.declared import DeclaredGateway, DeclaredRoute, DeclaredService
from control.api.gateway import Instance, Placement, before
from control.api.problems import Findings
from control.api.workload import Endpoint

STARTED: Final = frozenset({Placement.NODE, Placement.SERVICE_ACCOUNT})
"""Where a process stands on a node of its own, whose agent can start it."""


def led_to(routes: Iterable[DeclaredRoute]) -> frozenset[str]:
    """Keys of the Services to which routes of other Services lead, or send copies."""
    found: set[str] = set()
    for item in routes:
        route = item.route
        named = {destination.service for rule in route.rules for destination in rule.destinations}
        parents = {parent.service for parent in route.parents}
        found |= named - parents if len(parents) == 1 else named
    return frozenset(found)


def check_placed(
    services: Iterable[DeclaredService],
    endpoints: Iterable[Endpoint],
    wishes: Mapping[Subject, Wish],
    gateways: Mapping[str, DeclaredGateway],
    processes: Mapping[str, Sequence[Instance]],
    findings: Findings,
) -> None:
    """Warns of endpoints that no process stands before, so that nobody calls them: once of a service and node."""
    placed: dict[str, DeclaredGateway] = {}
    for service in services:
        wish = wishes.get(("Service", service.key))
        gateway = gateways.get(wish.gateway) if wish is not None else None
        if gateway is not None and gateway.placement is not Placement.REMOTE:
            placed[service.key] = gateway
    if not placed:
        return
    bare: dict[str, set[str]] = {}
    for endpoint in endpoints:
        gateway = placed.get(endpoint.service)
        if gateway is None:
            continue
        account = endpoint.identity.service_account
        if not before(gateway.placement, processes.get(gateway.key, ()), endpoint.node, account):
            of = f" for service account {account}" if gateway.placement is Placement.SERVICE_ACCOUNT else ""
            where = f"node {endpoint.node}" if endpoint.node else "a node that no kubernetes.io/hostname names"
            bare.setdefault(endpoint.service, set()).add(f"{where}{of}")
    for service in services:
        for where in sorted(bare.get(service.key, ())):
            problem = f"Gateway {placed[service.key].key} has no process on {where}: endpoints there get no calls"
            findings.warn(service.position, "", problem)
