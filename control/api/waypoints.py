"""What labels ask of waypoints, and what the standings of that make of records. Part of `mesh`.

A Gateway that is not there, or does not admit the namespace, refuses files. To a control plane, whose other namespaces
change without this one, the former is a warning, and so is the latter for what is bound already: it stays bound, since
nothing that somebody else changes may take a policy away. Nor may a Gateway that is relabelled to take other traffic.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from control.api import labels as label
from control.api.address import IpAddress
from control.api.bindings import Standing, Standings, Subject, Wish
from control.api.declared import (
    NO_CHOICE,
    DeclaredGateway,
    DeclaredNamespace,
    DeclaredPolicy,
    DeclaredRequestAuthentication,
    DeclaredService,
    DeclaredTraffic,
    DeclaredWorkload,
    Place,
    WaypointChoice,
    place_of,
)
from control.api.gateway import Binding, Bound, Gateway, Instance, Placement, Process, Sidecar, Traffic, before
from control.api.identity import SpiffeId, TrustDomain, make_id
from control.api.labels import Labels, selects
from control.api.metadata import WAYPOINT_BINDING, WAYPOINT_CANARY, WAYPOINT_EXEMPT
from control.api.policy import Target
from control.api.problems import Findings
from control.api.workload import Endpoint, Workload

PortBindings = tuple[tuple[int, Binding], ...]
"""Port -> binding, as `ResidentWorkload.bindings`."""

_TAKEN: Final = {
    "Service": (Traffic.SERVICE, Traffic.ALL),
    "WorkloadEntry": (Traffic.WORKLOAD, Traffic.ALL),
}
_FIELD: Final = f"metadata.labels[{label.USE_WAYPOINT!r}]"
_CANARY_FIELD: Final = f"metadata.annotations[{WAYPOINT_CANARY!r}]"

Asking = DeclaredService | DeclaredWorkload | DeclaredNamespace


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the labels of some namespaces ask for."""

    of: Mapping[Subject, Wish]
    exempt: Mapping[Subject, tuple[SpiffeId, ...]]
    """Who may connect directly, of those who exempt anybody."""


def wishes_of(
    namespaces: Iterable[DeclaredNamespace],
    objects: Iterable[DeclaredService | DeclaredWorkload],
    gateways: Mapping[str, DeclaredGateway],
    processes: Mapping[str, Sequence[Instance]],
    guarded: frozenset[Target],
    trust_domain: TrustDomain,
    standings: Standings | None,
    findings: Findings,
) -> Wishes:
    """What is asked for, and findings about what cannot be had.

    `gateways`: all there are, by key. `processes`: as of `processes_of`, which are behind no waypoint. `guarded`: what
    policies target. `standings`: None for files.
    """
    known = {namespace.name: namespace for namespace in namespaces}
    found: dict[Subject, Wish] = {}
    exempt: dict[Subject, tuple[SpiffeId, ...]] = {}
    told: set[tuple[Place, str]] = set()
    used: set[str] = set()
    """Namespaces whose canary some of their objects have."""
    skipped = _workloads_of(processes)
    for one in objects:
        subject = subject_of(one)
        namespace = known.get(one.namespace)
        inherited = NO_CHOICE if namespace is None else namespace.waypoint
        choice = inherited if one.waypoint is NO_CHOICE else one.waypoint.over(inherited)
        if choice == NO_CHOICE or (isinstance(one, DeclaredWorkload) and one.key in skipped):
            continue
        if choice.exempt:
            exempt[subject] = choice.exempt
            _check_exempt(one, choice, trust_domain, findings)
        if not choice.gateway:
            _check_idle(one, findings)
            continue
        wish = Wish(
            gateway=choice.gateway,
            optional=bool(choice.optional),
            guarded=Target("Gateway", choice.gateway) in guarded or Target("Service", one.key) in guarded,
            canary=choice.canary,
        )
        serving = _gateways_of(standings.get(subject)) if standings is not None else ()
        bound = wish.gateway in serving
        namespace_labels = {} if namespace is None else namespace.labels
        # What the namespace asks for is said once, of the namespace.
        asking = one if one.waypoint.gateway is not None or namespace is None else namespace
        asked: list[tuple[Asking, str, str]] = [(asking, _FIELD, wish.gateway)]
        asking_canary = one if one.waypoint.canary is not None or namespace is None else namespace
        if wish.canary is not None:
            asked.append((asking_canary, _CANARY_FIELD, wish.canary.gateway))
        for whose, field, name in asked:
            problem = _problem(name, gateways.get(name), one.namespace, namespace_labels)
            if problem and (place_of(whose), problem) not in told:
                told.add((place_of(whose), problem))
                refuse = standings is None if name not in gateways else name not in serving
                report = findings.error if refuse else findings.warn
                report(whose.position, field, problem, (name, gateways))
        gateway = gateways.get(wish.gateway)
        if gateway is not None and gateway.traffic not in _TAKEN[subject[0]]:
            if bound:
                findings.warn(one.position, _FIELD, _taken_still(gateway, subject))
            else:
                if asking is one:
                    findings.warn(one.position, _FIELD, _not_taken(gateway, subject))
                continue
        if wish.canary is not None:
            if asking_canary is namespace:
                used.add(namespace.name)
            idle = _idle_canary(subject, wish.gateway, wish.canary.gateway, gateways)
            problem = idle or _left_behind(wish.gateway, wish.canary.gateway, guarded)
            if problem and (place_of(asking_canary), problem) not in told:
                told.add((place_of(asking_canary), problem))
                findings.warn(asking_canary.position, _CANARY_FIELD, problem)
            if idle:
                wish = replace(wish, canary=None)
        found[subject] = wish
    for namespace in known.values():
        if namespace.waypoint.canary is not None and namespace.name not in used:
            problem = "does nothing: nothing in this namespace is bound to a waypoint, or each has a canary of its own"
            findings.warn(namespace.position, _CANARY_FIELD, problem)
    return Wishes(found, exempt)


def subject_of(one: DeclaredService | DeclaredWorkload) -> Subject:
    return ("Service" if isinstance(one, DeclaredService) else "WorkloadEntry", one.key)


def guarded_by(
    policies: Iterable[DeclaredPolicy | DeclaredRequestAuthentication | DeclaredTraffic],
) -> frozenset[Target]:
    """What some policies hold for."""
    return frozenset(target for item in policies for target in item.guards)


def processes_of(
    gateways: Iterable[DeclaredGateway], workloads: Iterable[DeclaredWorkload], findings: Findings
) -> dict[str, list[Instance]]:
    """Key of a Gateway -> its processes, in the order of their keys.

    A workload that has a Gateway's identity and is no process of it would be believed about who calls: an error.
    """
    by_key = {gateway.key: gateway for gateway in gateways}
    believed = {gateway.key for gateway in by_key.values() if gateway.placement in (Placement.REMOTE, Placement.NODE)}
    instances: dict[str, list[Instance]] = {}
    for workload in workloads:
        account = f"{workload.namespace}/{workload.service_account}"
        name = workload.labels.get(label.GATEWAY_NAME)
        if name is None and account not in believed:
            continue
        gateway = by_key.get(f"{workload.namespace}/{name}")
        if gateway is not None and gateway.placement is Placement.SIDECAR:
            problem = f"does nothing: uProxies start the processes of Gateway {gateway.key} themselves; remove it"
            findings.warn(workload.position, f"metadata.labels[{label.GATEWAY_NAME!r}]", problem)
            continue
        of_account = gateway is not None and gateway.placement is Placement.SERVICE_ACCOUNT
        if account in believed if of_account else name != workload.service_account:
            findings.error(workload.position, "spec.serviceAccount", _mistaken(workload, None if of_account else name))
        elif gateway is None:
            problem = f"names no Gateway of namespace {workload.namespace}: {name!r}; apply it"
            findings.warn(workload.position, f"metadata.labels[{label.GATEWAY_NAME!r}]", problem)
        elif gateway.placement is not Placement.REMOTE and not workload.node:
            problem = f"serves nothing: Gateway {gateway.key} has a process for each node; label it {label.NODE}"
            findings.warn(workload.position, "metadata.labels", problem)
        elif workload.addresses:
            instances.setdefault(gateway.key, []).append(_instance(gateway.placement, workload))
    return {account: sorted(found, key=lambda instance: instance.workload) for account, found in instances.items()}


def _instance(placement: Placement, workload: DeclaredWorkload) -> Instance:
    address, *others = workload.addresses
    if placement is Placement.REMOTE:
        return Instance(workload.key, address)
    account = workload.service_account if placement is Placement.SERVICE_ACCOUNT else ""
    return Instance(workload.key, address, account, workload.node, tuple(others))


def gateways_of(
    declared: Sequence[DeclaredGateway], processes: Mapping[str, Sequence[Instance]], standings: Standings
) -> tuple[Gateway, ...]:
    """The records of some Gateways, in the order of their keys. `processes`: as of `processes_of`."""
    if not declared:
        return ()  # most namespaces; the standings are those of all
    served: dict[str, set[Subject]] = {}
    for subject, standing in standings.items():
        for gateway_key in standing.gateways:
            served.setdefault(gateway_key, set()).add(subject)
    return tuple(
        Gateway(
            namespace=gateway.namespace,
            name=gateway.name,
            traffic=gateway.traffic,
            instances=tuple(processes.get(gateway.key, ())),
            services=tuple(sorted(key for kind, key in served.get(gateway.key, ()) if kind == "Service")),
            workloads=tuple(sorted(key for kind, key in served.get(gateway.key, ()) if kind == "WorkloadEntry")),
            trusted_proxies=gateway.trusted_proxies,
            placement=gateway.placement,
            engine=gateway.engine,
        )
        for gateway in sorted(declared, key=lambda one: one.key)
    )


class Ports:
    """What the standings of services and of workloads make of the ports of workloads.

    Processes of waypoints are left out: a waypoint is not behind a waypoint.
    """

    def __init__(
        self,
        workloads: Iterable[Workload],
        endpoints: Iterable[Endpoint],
        processes: Mapping[str, Sequence[Instance]],
        standings: Standings,
        wishes: Wishes,
        gateways: Mapping[str, DeclaredGateway],
        led_to: Collection[str],
        trust_domain: TrustDomain,
    ) -> None:
        """`processes`: as of `processes_of`. `gateways`: those that there are, in all namespaces, by key. `led_to`:
        keys of the services to which routes of others lead.
        """
        self._wishes = wishes
        self._gateways = gateways
        self._processes = processes
        self._led_to = led_to
        self._trust_domain = trust_domain
        self._standing: dict[str, dict[int, dict[Subject, Standing]]] = {}
        if not standings:
            return
        known = {workload.key for workload in workloads} - _workloads_of(processes)
        for workload_key in known:
            whole: Subject = ("WorkloadEntry", workload_key)
            if whole in standings:
                self._add(workload_key, 0, whole, standings[whole])
        for endpoint in endpoints:
            service: Subject = ("Service", endpoint.service)
            if service in standings and endpoint.workload in known:
                for port in endpoint.ports.values():
                    self._add(endpoint.workload, port, service, standings[service])
        for ports in self._standing.values():
            # What stands for all ports holds beside what stands for one.
            for subject, standing in ports.get(0, {}).items():
                for of_port in ports.values():
                    of_port[subject] = standing

    def bounds(self, workload: Workload) -> tuple[Bound, ...]:
        """What is demanded at its ports. Who is exempt of a port that several bind is exempt of all these.

        A Gateway that is not there, which takes --force, is nobody whose word counts: a workload may have its name.
        """
        return tuple(
            Bound(
                port=port,
                gateways=tuple(
                    sorted({key for one in found.values() for key in one.gateways if self._serves_all(key)})
                ),
                exempt=self._exempt_of(found),
                enforced=any(one.enforced for one in found.values()),
                guarded=any(one.enforced and self._is_guarded(subject) for subject, one in found.items()),
                processes=self._believed(workload, found),
            )
            for port, found in sorted(self._standing.get(workload.key, {}).items())
        )

    def _serves_all(self, gateway_key: str) -> bool:
        gateway = self._gateways.get(gateway_key)
        return gateway is not None and gateway.placement is Placement.REMOTE

    def _believed(self, workload: Workload, found: Mapping[Subject, Standing]) -> tuple[Process, ...]:
        """Of Gateways whose processes each serve a part: those before the workload, and all where routes lead here."""
        believed: set[tuple[SpiffeId, tuple[IpAddress, ...]]] = set()
        for (_, key), standing in found.items():
            for gateway_key in standing.gateways:
                gateway = self._gateways.get(gateway_key)
                if gateway is None or gateway.placement in (Placement.REMOTE, Placement.SIDECAR):
                    continue
                processes: Sequence[Instance] = self._processes.get(gateway_key, ())
                if key not in self._led_to:
                    processes = before(gateway.placement, processes, workload.node, workload.service_account)
                for one in processes:
                    identity = make_id(self._trust_domain, gateway.namespace, one.account or gateway.name)
                    believed.add((identity, (one.address, *one.others)))
        return tuple(Process(*one) for one in sorted(believed))

    def bindings(self, workload: Workload) -> PortBindings:
        """How callers that dial its own address reach it: by its own waypoint, else by that of a service."""
        return tuple((port, self._located(binding, workload)) for port, binding in self._bindings(workload.key))

    def sidecar(self, workload: Workload) -> Sidecar | None:
        """What its uProxy starts. Of several, which are warned of, the first one that streams go through.

        A service that moves from one to another has that which its callers go through: the previous one, then the new.
        """
        found: dict[str, set[int]] = {}
        for port, standings in self._standing.get(workload.key, {}).items():
            for standing in standings.values():
                those = tuple(filter(self._is_sidecar, standing.gateways))
                if standing.binding is not None and standing.binding.gateway in those:
                    those = (standing.binding.gateway,)
                for gateway_key in those:
                    ports = found.setdefault(gateway_key, set())
                    # Before that, and after it, callers go past it.
                    if standing.binding is not None or standing.enforced:
                        ports.add(port)
        if not found:
            return None
        chosen = min(found, key=lambda gateway_key: (not found[gateway_key], gateway_key))
        return Sidecar(chosen, tuple(sorted(found[chosen])))

    def _is_sidecar(self, gateway_key: str) -> bool:
        gateway = self._gateways.get(gateway_key)
        return gateway is not None and gateway.placement is Placement.SIDECAR

    def _located(self, binding: Binding, workload: Workload) -> Binding:
        return binding if all(map(self._serves_all, binding.gateways)) else replace(binding, node=workload.node)

    def _bindings(self, workload_key: str) -> PortBindings:
        ports = self._standing.get(workload_key, {})
        for standing in ports.get(0, {}).values():
            if (binding := of_callers(standing, self._gateways)) is not None:
                return ((0, binding),)
        found: list[tuple[int, Binding]] = []
        for port, standings in sorted(ports.items()):
            bindings = (of_callers(standings[subject], self._gateways) for subject in sorted(standings))
            first = next((binding for binding in bindings if binding is not None), None)
            if first is not None:
                found.append((port, first))
        return tuple(found)

    def _add(self, workload_key: str, port: int, subject: Subject, standing: Standing) -> None:
        self._standing.setdefault(workload_key, {}).setdefault(port, {})[subject] = standing

    def _is_guarded(self, subject: Subject) -> bool:
        wish = self._wishes.of.get(subject)
        return wish is not None and wish.guarded

    def _exempt_of(self, subjects: Iterable[Subject]) -> tuple[SpiffeId, ...]:
        found = [frozenset(self._wishes.exempt.get(subject, ())) for subject in subjects]
        return tuple(sorted(frozenset.intersection(*found)))


def of_callers(standing: Standing | None, gateways: Mapping[str, DeclaredGateway]) -> Binding | None:
    """What callers see of a standing: of a waypoint beside each workload nothing, since they dial the workload."""
    binding = None if standing is None else standing.binding
    gateway = None if binding is None else gateways.get(binding.gateway)
    return None if gateway is not None and gateway.placement is Placement.SIDECAR else binding


def _workloads_of(processes: Mapping[str, Sequence[Instance]]) -> frozenset[str]:
    return frozenset(instance.workload for found in processes.values() for instance in found)


def _gateways_of(standing: Standing | None) -> tuple[str, ...]:
    return () if standing is None else standing.gateways


def _problem(name: str, gateway: DeclaredGateway | None, namespace: str, namespace_labels: Labels) -> str:
    """Why a Gateway (its key is `name`) cannot be had; empty when it can."""
    if gateway is None:
        return f"there is no Gateway {name}; apply it, as `meshctl waypoint apply` does, or name another"
    if not _admits(gateway, namespace, namespace_labels):
        return (
            f"Gateway {gateway.key} does not admit namespace {namespace}; widen its "
            "spec.listeners[0].allowedRoutes.namespaces, or name a Gateway of this namespace"
        )
    if gateway.placement is Placement.SERVICE_ACCOUNT and gateway.namespace != namespace:
        return (
            f"Gateway {gateway.key} has a process for each service account of its own namespace; name one of namespace "
            f"{namespace}"
        )
    if gateway.placement is Placement.SIDECAR and gateway.namespace != namespace:
        return (
            f"Gateway {gateway.key} has a process beside each workload of its own namespace; name one of namespace "
            f"{namespace}"
        )
    return ""


def _admits(gateway: DeclaredGateway, namespace: str, namespace_labels: Labels) -> bool:
    if gateway.namespace == namespace:
        return gateway.admits is None or _selected(gateway.admits, namespace, namespace_labels)
    return gateway.admits is not None and _selected(gateway.admits, namespace, namespace_labels)


def _selected(selector: Labels, namespace: str, namespace_labels: Labels) -> bool:
    return selects(selector, {**namespace_labels, label.NAMESPACE_NAME: namespace})


def _not_taken(gateway: DeclaredGateway, subject: Subject) -> str:
    what = "services" if subject[0] == "Service" else "workloads"
    return (
        f"does nothing: Gateway {gateway.key} does not take traffic to {what} "
        f"({label.WAYPOINT_FOR}: {gateway.traffic.value}); label the Gateway otherwise"
    )


def _idle_canary(subject: Subject, waypoint: str, name: str, gateways: Mapping[str, DeclaredGateway]) -> str:
    """Why a canary (its key is `name`) gets nobody; empty when it does. One that is not there yet is waited for."""
    canary = gateways.get(name)
    for one in filter(None, (gateways.get(waypoint), canary)):
        if one.placement is Placement.SIDECAR:
            return f"does nothing: Gateway {one.key} is beside each workload, past which no caller goes; remove it"
    if canary is None:
        return ""
    if canary.key == waypoint:
        return f"does nothing: Gateway {waypoint} is the waypoint itself; name another, or remove it"
    return "" if canary.traffic in _TAKEN[subject[0]] else _not_taken(canary, subject)


def _left_behind(waypoint: str, canary: str, guarded: frozenset[Target]) -> str:
    """Which policies the callers of a canary leave behind; empty when none."""
    if Target("Gateway", waypoint) not in guarded or Target("Gateway", canary) in guarded:
        return ""
    return (
        f"policies that target Gateway {waypoint} do not hold for callers that go through {canary}, which none "
        "targets; target both, or the Service"
    )


def _taken_still(gateway: DeclaredGateway, subject: Subject) -> str:
    kind, key = subject
    what = "services" if kind == "Service" else "workloads"
    return (
        f"{kind} {key} stays bound to Gateway {gateway.key}, which takes traffic to {what} no more "
        f"({label.WAYPOINT_FOR}: {gateway.traffic.value}), lest a policy hold nowhere; label the Gateway otherwise, or "
        f"label the {kind} {label.USE_WAYPOINT}: none to release it"
    )


def _mistaken(workload: DeclaredWorkload, name: str | None) -> str:
    if name is None:
        return (
            f"is the identity of Gateway {workload.namespace}/{workload.service_account}, whose processes are believed "
            f"about who calls; label it {label.GATEWAY_NAME} if it is one, or give it another"
        )
    return f"must be {name!r}, the name of the Gateway that {label.GATEWAY_NAME} makes it a process of"


def _check_exempt(
    one: DeclaredService | DeclaredWorkload, choice: WaypointChoice, trust_domain: TrustDomain, findings: Findings
) -> None:
    for identity in choice.exempt or ():
        if identity.trust_domain != trust_domain:
            problem = f"{identity} is of another trust domain than {trust_domain}; nobody of it can connect"
            findings.error(one.position, f"metadata.annotations[{WAYPOINT_EXEMPT!r}]", problem)


def _check_idle(one: DeclaredService | DeclaredWorkload, findings: Findings) -> None:
    """Warns of what an object says for the case that it is bound, when it is not."""
    for annotation, said in (
        (WAYPOINT_BINDING, one.waypoint.optional),
        (WAYPOINT_EXEMPT, one.waypoint.exempt),
        (WAYPOINT_CANARY, one.waypoint.canary),
    ):
        if said is not None:
            problem = f"does nothing: no {label.USE_WAYPOINT} binds this to a waypoint"
            findings.warn(one.position, f"metadata.annotations[{annotation!r}]", problem)
