"""Where the processes of a waypoint stand, and which of them serves what. Part of `mesh`.

With `remote` each serves everything that is bound to its Gateway. With `node` and `service-account` a process stands
before the workloads of its own node, or of its own node and service account: callers take the one before the endpoint
that they have drawn, and a workload believes that one alone about who calls. With `sidecar` callers know of none: the
uProxy of each workload hands what has come to a process beside it, which reaches that workload and nobody else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from control.api.bindings import Subject, Wish
from control.api.declared import DeclaredGateway, DeclaredPolicy, DeclaredRoute, DeclaredService, DeclaredTraffic
from control.api.gateway import Instance, Placement, before
from control.api.policy import Action, Target
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
        if gateway is not None and gateway.placement in STARTED:
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


def check_sidecars(
    routes: Sequence[DeclaredRoute],
    policies: Sequence[DeclaredPolicy],
    traffic: Sequence[DeclaredTraffic],
    services: Iterable[DeclaredService],
    endpoints: Iterable[Endpoint],
    wishes: Mapping[Subject, Wish],
    gateways: Mapping[str, DeclaredGateway],
    findings: Findings,
) -> None:
    """Refuses what a process beside one workload cannot do: reach anybody else, or stand before callers.

    `routes`: those of callers too.
    """
    beside = {subject: wish.gateway for subject, wish in wishes.items() if _is_sidecar(gateways.get(wish.gateway))}
    if not beside:
        return
    bound = {key: gateway for (kind, key), gateway in beside.items() if kind == "Service"}
    for item in routes:
        for parent in item.route.parents:
            if parent.service in bound:
                _check_route(item, parent.service, bound[parent.service], findings)
    for policy in policies:
        if policy.policy.action is Action.CUSTOM and (gateway := _asked_at(policy.targets, beside)):
            findings.error(policy.position, "spec.action", _reaches_nobody(gateway, "asks nobody: CUSTOM"))
    for one in traffic:
        if one.traffic.redis is not None and (gateway := _asked_at(one.targets, beside)):
            findings.error(one.position, "spec.redis", _reaches_nobody(gateway, "asks no Redis: this"))
    _check_single(services, endpoints, beside, findings)


def _is_sidecar(gateway: DeclaredGateway | None) -> bool:
    return gateway is not None and gateway.placement is Placement.SIDECAR


def _check_route(item: DeclaredRoute, service: str, gateway: str, findings: Findings) -> None:
    if item.route.namespace != service.partition("/")[0]:
        problem = (
            f"Service {service} is behind Gateway {gateway} of placement sidecar, which stands before no callers: a "
            "route of theirs needs another placement"
        )
        findings.error(item.position, "spec.parentRefs", problem)
        return
    for number, rule in enumerate(item.route.rules):
        for destination in rule.destinations:
            if destination.service != service:
                problem = _reaches_nobody(gateway, f"leads nowhere: a way to Service {destination.service}")
                findings.error(item.position, f"spec.rules[{number}]", problem)


def _reaches_nobody(gateway: str, what: str) -> str:
    doing, _, needs = what.partition(": ")
    return (
        f"Gateway {gateway} has placement sidecar, whose process reaches its own workload only, and {doing}; {needs} "
        "needs another placement"
    )


def _asked_at(targets: Iterable[Target], beside: Mapping[Subject, str]) -> str:
    """The Gateway, beside workloads, at which what has these targets holds; empty: none."""
    for target in targets:
        if target.kind == "Service" and ("Service", target.key) in beside:
            return beside["Service", target.key]
        if target.kind == "Gateway" and target.key in beside.values():
            return target.key
    return ""


def _check_single(
    services: Iterable[DeclaredService],
    endpoints: Iterable[Endpoint],
    beside: Mapping[Subject, str],
    findings: Findings,
) -> None:
    """Refuses two of them beside one workload, which may be bound itself."""
    bound = {key: gateway for (kind, key), gateway in beside.items() if kind == "Service"}
    of_workload = {key: gateway for (kind, key), gateway in beside.items() if kind == "WorkloadEntry"}
    positions = {service.key: service.position for service in services}
    for workload, gateway, service in _served(endpoints, bound):
        other = of_workload.setdefault(workload, gateway)
        if other != gateway:
            problem = (
                f"WorkloadEntry {workload} has Gateways {other} and {gateway} of placement sidecar, and one process "
                "only stands beside a workload; name one of them for all of its Services"
            )
            findings.error(positions[service], "metadata.labels", problem)


def _served(endpoints: Iterable[Endpoint], bound: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Workload, Gateway and Service, each once."""
    return iter(
        dict.fromkeys((one.workload, bound[one.service], one.service) for one in endpoints if one.service in bound)
    )
