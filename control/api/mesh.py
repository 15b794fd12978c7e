"""All declared resources together: references checked, virtual addresses allocated, endpoints worked out, as records.

What cannot be meant is an error, and the mesh is not built. What is allowed and does nothing is a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from control.api import records, topics, vips
from control.api.address import IpAddress
from control.api.attachments import (
    check_asked,
    check_balancing,
    check_routes,
    check_targets,
    published,
    with_authorizers,
    with_filters,
    with_grants,
    with_ports,
)
from control.api.bindings import Standings, Subject, Wish, at_once
from control.api.declared import (
    DeclaredEndpoints,
    DeclaredExtension,
    DeclaredGateway,
    DeclaredGrant,
    DeclaredNamespace,
    DeclaredPeerAuthentication,
    DeclaredPolicy,
    DeclaredRequestAuthentication,
    DeclaredRoute,
    DeclaredService,
    DeclaredTraffic,
    DeclaredWorkload,
    Resource,
    place_of,
)
from control.api.endpoints import datagrams_of, endpoints_of
from control.api.engines import check_engines
from control.api.gateway import Gateway, Instance
from control.api.identity import SpiffeId, TrustDomain, make_id, parse_trust_domain
from control.api.index import Placed, Resident, ResidentService, ResidentWorkload
from control.api.jwt import NO_KEYS, JwtRule, RequestAuthentication
from control.api.labels import Labels, telemetry
from control.api.messages import Body
from control.api.metadata import DEFAULT_NAMESPACE
from control.api.placements import STARTED, check_placed, check_sidecars, led_to
from control.api.plaintext import MAX_PORTS, plaintext_of
from control.api.policy import (
    DEFAULT_ROOT_NAMESPACE,
    Action,
    AuthorizationPolicy,
    ConditionKey,
    MtlsMode,
    PeerAuthentication,
    Target,
    pattern_matches,
)
from control.api.problems import Findings, Position, ResourceError, shown
from control.api.records import Record
from control.api.route import HTTPRoute
from control.api.selection import Workloads
from control.api.traffic import TrafficPolicy
from control.api.vips import Addresses, Vips
from control.api.waypoints import PortBindings, Ports, gateways_of, guarded_by, of_callers, processes_of, wishes_of
from control.api.workload import Endpoint, Service, Workload

_T = TypeVar("_T")


def _nowhere(selector: Labels) -> bool:
    return False


def _unknown(service_key: str) -> DeclaredService | None:
    return None


def _none(service: DeclaredService) -> Sequence[Endpoint]:
    return ()


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What is true outside of the resources that are built, so that one namespace can be built alone."""

    addresses: Mapping[IpAddress, str] = field(default_factory=dict)
    """Address -> who holds it, as `Service shop/web`."""
    namespaces: frozenset[str] = frozenset()
    """Those that are declared."""
    principals: frozenset[str] = frozenset()
    """Of the workloads of other namespaces."""
    vips: Vips = field(default_factory=dict)
    """What was allocated earlier: a service that still asks for none keeps its own."""
    gateways: Mapping[str, DeclaredGateway] = field(default_factory=dict)
    """Those of other namespaces, by key."""
    processes: Mapping[str, Sequence[Instance]] = field(default_factory=dict)
    """Of those that are not remote, by key."""
    guarded: frozenset[str] = frozenset()
    """Keys of the Gateways that policies of other namespaces target."""
    selects: Callable[[Labels], bool] = _nowhere
    """Whether a workload of another namespace has these labels. Asked for policies of the root namespace only."""
    peer_authentications: Sequence[PeerAuthentication] = ()
    """Those of the root namespace, unless that is built too."""
    extensions: Sequence[DeclaredExtension] = ()
    """Likewise."""
    fetched: Mapping[str, str] | None = None
    """Where keys of issuers are published -> those that were fetched there, as `canonical_jwks`. None: nobody does."""
    grants: Sequence[DeclaredGrant] = ()
    """Those of other namespaces."""
    routes: Sequence[DeclaredRoute] = ()
    """Those of other namespaces with parents here."""
    service: Callable[[str], DeclaredService | None] = _unknown
    """The Service of another namespace that has a key."""
    last: Callable[[DeclaredService], Sequence[Endpoint]] = _none
    """The ready endpoints that a service had. One that would have none keeps them."""


_NOTHING: Final = Elsewhere()


@dataclass(frozen=True, slots=True)
class Mesh:
    """A configuration that holds together: of all namespaces, or of one. Everything is in the order of its key."""

    trust_domain: TrustDomain
    services: tuple[Service, ...]
    workloads: tuple[Workload, ...]
    endpoints: tuple[Endpoint, ...]
    policies: tuple[AuthorizationPolicy, ...]
    gateways: tuple[Gateway, ...]
    routes: tuple[HTTPRoute, ...]
    peer_authentications: tuple[PeerAuthentication, ...]
    """No records: what they say of a workload stands in its own."""
    request_authentications: tuple[RequestAuthentication, ...]
    traffic: tuple[TrafficPolicy, ...]
    vips: Vips
    """Of the services that ask for no address. Who keeps them gives them back as `Elsewhere.vips`."""
    wishes: Mapping[Subject, Wish]
    """What labels ask to bind to waypoints. Who keeps standings works them out from these."""
    bindings: Mapping[str, PortBindings]
    """Key of a workload -> how callers reach its ports at its own addresses, of those that are bound."""
    datagrams: Mapping[str, tuple[int, ...]]
    """Key of a workload -> its ports to which datagrams may go in plaintext, of those that have any."""
    virtual_datagrams: Mapping[str, tuple[int, ...]]
    """Likewise key of a service -> ports of its virtual addresses."""
    warnings: tuple[ResourceError, ...]

    @classmethod
    def build(
        cls,
        resources: Iterable[Resource],
        trust_domain: str,
        root_namespace: str = DEFAULT_ROOT_NAMESPACE,
        *,
        elsewhere: Elsewhere = _NOTHING,
        standings: Standings | None = None,
    ) -> Mesh:
        """Builds the mesh. Raises ResourceErrors with everything that does not hold together, and
        IdentityError for a trust domain that is none.

        `standings`: what is bound to waypoints, of all namespaces. None: what the labels ask for, at once.
        """
        findings = Findings()
        declared = _unique(resources, findings)
        _check_namespaces(declared, elsewhere.namespaces, root_namespace, findings)
        domain = parse_trust_domain(trust_domain)
        declared_services = sorted(_of(DeclaredService, declared), key=lambda service: service.key)
        addresses = Addresses(declared_services, elsewhere.addresses, elsewhere.vips)
        direct = {one.name for one in _of(DeclaredNamespace, declared) if one.direct}
        workloads = _workloads(_of(DeclaredWorkload, declared), direct, domain, addresses, findings)
        policies = sorted(_of(DeclaredPolicy, declared), key=lambda item: item.policy.key)
        peer_authentications = _of(DeclaredPeerAuthentication, declared)
        _check_selectors(policies, peer_authentications, workloads, root_namespace, elsewhere.selects, findings)
        _check_scopes(peer_authentications, root_namespace, findings)
        workloads = _with_plaintext(workloads, peer_authentications, elsewhere, root_namespace, findings)
        _check_callers(policies, workloads, elsewhere.principals, domain, findings)
        endpoints = endpoints_of(
            declared_services, _of(DeclaredEndpoints, declared), workloads, elsewhere.last, findings
        )
        workloads = _with_proxy_protocol(workloads, _of(DeclaredWorkload, declared), declared_services, endpoints)
        declared_workloads, gateways = _of(DeclaredWorkload, declared), _of(DeclaredGateway, declared)
        grants = (*_of(DeclaredGrant, declared), *elsewhere.grants)
        routes = with_grants(with_ports(_of(DeclaredRoute, declared), declared_services, findings), grants, findings)
        unsaid = Findings()  # it is said where they are declared
        consumers = with_grants(with_ports(elsewhere.routes, declared_services, unsaid), grants, unsaid)
        authentications = sorted(
            _of(DeclaredRequestAuthentication, declared), key=lambda item: item.request_authentication.key
        )
        traffic = sorted(_of(DeclaredTraffic, declared), key=lambda item: item.traffic.key)
        extensions = _of(DeclaredExtension, declared)
        targets = guarded_by((*policies, *authentications, *traffic))
        processes = processes_of(gateways, declared_workloads, findings)
        every_gateway = {**elsewhere.gateways, **{gateway.key: gateway for gateway in gateways}}
        wishes = wishes_of(
            _of(DeclaredNamespace, declared),
            (*declared_services, *declared_workloads),
            every_gateway,
            processes,
            targets.union(Target("Gateway", gateway_key) for gateway_key in elsewhere.guarded),
            domain,
            standings,
            findings,
        )
        standing = {subject: at_once(wish) for subject, wish in wishes.of.items()} if standings is None else standings
        ports = Ports(
            workloads,
            endpoints,
            {**elsewhere.processes, **processes},
            standing,
            wishes,
            every_gateway,
            led_to((*routes, *consumers)),
            domain,
        )
        check_placed(
            declared_services, endpoints, wishes.of, every_gateway, {**elsewhere.processes, **processes}, findings
        )
        check_balancing(traffic, findings)
        check_targets((*policies, *authentications, *traffic), declared_services, gateways, wishes.of, findings)
        check_asked(extensions, traffic, declared_services, wishes.of, findings)
        check_sidecars(
            (*routes, *consumers), policies, traffic, declared_services, endpoints, wishes.of, every_gateway, findings
        )
        filtered = with_filters(traffic, (*extensions, *elsewhere.extensions), root_namespace, findings)
        check_engines(traffic, filtered, every_gateway, wishes.of, findings)
        check_routes(routes, declared_services, elsewhere.service, wishes.of, findings)
        mesh = cls(
            trust_domain=domain,
            services=_services(declared_services, endpoints, addresses, standing, every_gateway, findings),
            workloads=tuple(
                replace(workload, bounds=bounds, sidecar=ports.sidecar(workload))
                if (bounds := ports.bounds(workload))
                else workload
                for workload in workloads
            ),
            endpoints=endpoints,
            policies=tuple(with_authorizers(policies, (*extensions, *elsewhere.extensions), root_namespace, findings)),
            peer_authentications=tuple(item.peer_authentication for item in peer_authentications),
            request_authentications=tuple(_with_keys(item, elsewhere.fetched, findings) for item in authentications),
            traffic=tuple(filtered),
            gateways=gateways_of(gateways, processes, standing),
            routes=published(routes, consumers, declared_services, findings),
            vips=addresses.allocated,
            wishes=wishes.of,
            bindings={workload.key: bindings for workload in workloads if (bindings := ports.bindings(workload))},
            datagrams=datagrams_of(declared_services, workloads, findings),
            virtual_datagrams={
                service.key: tuple(sorted(port.port for port in service.datagrams.values()))
                for service in declared_services
                if service.datagrams
            },
            warnings=tuple(findings.warnings),
        )
        findings.report.raise_errors()
        return mesh

    def records(self) -> dict[str, Body]:
        """Topic -> body of every record."""
        every: Iterable[Record] = (
            *self.services,
            *self.workloads,
            *self.endpoints,
            *self.policies,
            *self.request_authentications,
            *self.traffic,
            *self.gateways,
            *self.routes,
        )
        return {
            topics.format_topic(self.trust_domain, records.topic_of(record)): records.write(record) for record in every
        }

    def residents(self) -> dict[IpAddress, Resident]:
        """Who lives at each address."""
        found: dict[IpAddress, Resident] = {}
        placed = {
            instance.workload: Placed(gateway.name, instance.node)
            for gateway in self.gateways
            if gateway.placement in STARTED
            for instance in gateway.instances
        }
        for workload in self.workloads:
            resident = ResidentWorkload(
                workload.namespace,
                workload.name,
                workload.service_account,
                telemetry(workload.labels),
                self.bindings.get(workload.key, ()),
                self.datagrams.get(workload.key, ()),
                placed.get(workload.key),
            )
            found |= dict.fromkeys(workload.addresses, resident)
        for service in self.services:
            ports = tuple(port.port for port in service.ports)
            resident_service = ResidentService(
                service.namespace,
                service.name,
                ports,
                service.binding is not None,
                self.virtual_datagrams.get(service.key, ()),
            )
            found |= dict.fromkeys(service.vips, resident_service)
        return found


def _of(kind: type[_T], resources: Iterable[Resource]) -> list[_T]:
    return [resource for resource in resources if isinstance(resource, kind)]


def _unique(resources: Iterable[Resource], findings: Findings) -> list[Resource]:
    """The resources without second declarations of one, which are errors."""
    first: dict[tuple[str, str, str], Resource] = {}
    for resource in resources:
        place = place_of(resource)
        other = first.setdefault(place, resource)
        if other is not resource:
            kind, namespace, name = place
            where = f"{other.position.file}:{other.position.line}"
            named = f"{namespace}/{name}" if namespace else name
            findings.error(resource.position, "metadata.name", f"{kind} {named} is declared in {where} too; remove one")
    return list(first.values())


def _check_namespaces(
    resources: Sequence[Resource], elsewhere: frozenset[str], root_namespace: str, findings: Findings
) -> None:
    """Whoever declares namespaces must declare all but the two that always exist; whoever declares none need not."""
    declared = elsewhere.union(namespace.name for namespace in _of(DeclaredNamespace, resources))
    if not declared:
        return
    for resource in resources:
        _, namespace, _ = place_of(resource)
        if namespace and namespace not in declared | {DEFAULT_NAMESPACE, root_namespace}:
            findings.error(
                resource.position,
                "metadata.namespace",
                f"no Namespace {namespace!r}; declare it, as the others are",
                (namespace, declared),
            )


def _workloads(
    declared: Iterable[DeclaredWorkload],
    direct: Collection[str],
    trust_domain: TrustDomain,
    addresses: Addresses,
    findings: Findings,
) -> tuple[Workload, ...]:
    """`direct`: the namespaces whose workloads may go direct, unless they say otherwise."""
    workloads: list[Workload] = []
    for entry in sorted(declared, key=lambda item: item.key):
        workload = Workload(
            namespace=entry.namespace,
            name=entry.name,
            service_account=entry.service_account,
            identity=make_id(trust_domain, entry.namespace, entry.service_account),
            addresses=entry.addresses,
            labels=entry.labels,
            ports=entry.ports,
            node=entry.node,
            weight=entry.weight,
            direct=entry.namespace in direct if entry.direct is None else entry.direct,
            locality=entry.locality,
        )
        for address in entry.addresses:
            other = addresses.claim(address, f"WorkloadEntry {entry.key}")
            if other:
                problem = f"{address} is the address of {other} too; an address is one workload"
                findings.error(entry.position, "spec.address", problem)
        workloads.append(workload)
    return tuple(workloads)


def _services(
    declared: Sequence[DeclaredService],
    endpoints: Iterable[Endpoint],
    addresses: Addresses,
    standings: Standings,
    gateways: Mapping[str, DeclaredGateway],
    findings: Findings,
) -> tuple[Service, ...]:
    """Services with their virtual addresses: first those asked for, so that no allocation takes one of them."""
    for service in declared:
        for address in service.cluster_ips:
            other = addresses.claim(address, vips.holder(service))
            if other:
                problem = f"{address} is the address of {other} too; choose another or remove it"
                findings.error(service.position, "spec.clusterIP", problem)
    identities: dict[str, set[SpiffeId]] = {}
    for endpoint in endpoints:
        identities.setdefault(endpoint.service, set()).add(endpoint.identity)
    return tuple(
        Service(
            namespace=service.namespace,
            name=service.name,
            vips=tuple(_vips_of(service, addresses, findings)),
            ports=service.ports,
            labels=service.labels,
            identities=tuple(sorted(identities.get(service.key, ()))),
            binding=of_callers(standings.get(("Service", service.key)), gateways),
            prefers_zone=service.prefers_zone,
        )
        for service in declared
    )


def _vips_of(service: DeclaredService, addresses: Addresses, findings: Findings) -> Iterator[IpAddress]:
    """One address of each family of the service, in the order of its families."""
    for family in service.families:
        address = addresses.vip(service, family)
        if address is None:
            problem = f"no address is left in {vips.RANGES[family]}; write one of another range"
            findings.error(service.position, "spec.clusterIP", problem)
        else:
            yield address


def _check_selectors(
    policies: Iterable[DeclaredPolicy],
    peer_authentications: Iterable[DeclaredPeerAuthentication],
    workloads: Sequence[Workload],
    root_namespace: str,
    selects_elsewhere: Callable[[Labels], bool],
    findings: Findings,
) -> None:
    """Warns of policies that select no workload, or that can never match."""
    scopes: list[tuple[str, Labels | None, Position]] = [
        (item.policy.namespace, item.policy.selector, item.position) for item in policies if not item.policy.targets
    ]
    scopes += [
        (item.peer_authentication.namespace, item.peer_authentication.selector, item.position)
        for item in peer_authentications
    ]
    index = Workloads(workloads)
    for namespace, selector, position in scopes:
        everywhere = namespace == root_namespace
        scope = "any namespace" if everywhere else f"namespace {namespace}"
        found = index.any_selected(None if everywhere else [namespace], selector or {})
        if not found and not (everywhere and selects_elsewhere(selector or {})):
            findings.warn(position, "spec.selector", f"selects no WorkloadEntry of {scope}; it does nothing")
    for item in policies:
        if item.policy.action is Action.DENY and not item.policy.rules:
            problem = "a DENY policy without rules denies nothing; write `rules: [{}]` to deny everybody"
            findings.warn(item.position, "spec.rules", problem)


def _check_scopes(
    peer_authentications: Iterable[DeclaredPeerAuthentication], root_namespace: str, findings: Findings
) -> None:
    """Refuses a PeerAuthentication whose scope is none, and warns of two for one namespace."""
    first: dict[str, str] = {}
    for item in sorted(peer_authentications, key=lambda item: item.peer_authentication.name):
        declared = item.peer_authentication
        if declared.selector is None:
            other = first.setdefault(declared.namespace, declared.name)
            if other != declared.name:
                problem = f"PeerAuthentication {other} says it of the same workloads; where they differ STRICT holds"
                findings.warn(item.position, "spec.mtls", problem)
        elif declared.namespace == root_namespace:
            problem = (
                f"a PeerAuthentication of {root_namespace} is one for the whole mesh; remove selector, or move it to "
                "the namespace of the workloads"
            )
            findings.error(item.position, "spec.selector", problem)


def _with_plaintext(
    workloads: tuple[Workload, ...],
    peer_authentications: Sequence[DeclaredPeerAuthentication],
    elsewhere: Elsewhere,
    root_namespace: str,
    findings: Findings,
) -> tuple[Workload, ...]:
    """The workloads, with what PeerAuthentications say of each."""
    said = (*elsewhere.peer_authentications, *(item.peer_authentication for item in peer_authentications))
    if not any(one.mode is MtlsMode.PERMISSIVE or MtlsMode.PERMISSIVE in one.port_modes.values() for one in said):
        return workloads
    found: list[Workload] = []
    for workload in workloads:
        plaintext = plaintext_of(workload.namespace, workload.labels, said, root_namespace)
        if plaintext is not None and len(plaintext.ports) > MAX_PORTS:
            position = next(
                item.position
                for item in peer_authentications
                if item.peer_authentication.namespace == workload.namespace and item.peer_authentication.port_modes
            )
            problem = (
                f"WorkloadEntry {workload.key} has {len(plaintext.ports)} ports unlike the others, by all that select "
                f"it; at most {MAX_PORTS} are taken"
            )
            findings.error(position, "spec.portLevelMtls", problem)
            plaintext = None
        found.append(workload if plaintext is None else replace(workload, plaintext=plaintext))
    return tuple(found)


def _with_proxy_protocol(
    workloads: tuple[Workload, ...],
    declared: Iterable[DeclaredWorkload],
    services: Iterable[DeclaredService],
    endpoints: Iterable[Endpoint],
) -> tuple[Workload, ...]:
    """The workloads with the ports that want a PROXY protocol header: by what they and their services say."""
    ports = {entry.key: set(entry.proxy_protocol) for entry in declared if entry.proxy_protocol}
    of_services = {service.key: service.proxy_protocol for service in services if service.proxy_protocol}
    for endpoint in endpoints if of_services else ():
        wanted = of_services.get(endpoint.service, ())
        found = {endpoint.ports[port] for port in wanted if port in endpoint.ports}
        if found:
            ports.setdefault(endpoint.workload, set()).update(found)
    return tuple(
        replace(workload, proxy_protocol=tuple(sorted(ports[workload.key]))) if workload.key in ports else workload
        for workload in workloads
    )


def _with_keys(
    item: DeclaredRequestAuthentication, fetched: Mapping[str, str] | None, findings: Findings
) -> RequestAuthentication:
    """With the keys that are fetched. Until they come, no token of that issuer is valid."""
    rules: list[JwtRule] = []
    for index, (rule, uri) in enumerate(zip(item.request_authentication.rules, item.key_uris, strict=True)):
        path = f"spec.jwtRules[{index}].jwksUri"
        if uri and fetched is None:
            findings.error(item.position, path, "is refused: only a control plane fetches keys; write them in jwks")
        elif uri and uri not in (fetched or {}):
            problem = f"the keys are fetched now; until they come, tokens of {rule.issuer} are refused"
            findings.warn(item.position, path, problem)
        rules.append(replace(rule, jwks=(fetched or {}).get(uri, NO_KEYS)) if uri else rule)
    return replace(item.request_authentication, rules=tuple(rules))


def _check_callers(
    policies: Sequence[DeclaredPolicy],
    workloads: Sequence[Workload],
    elsewhere: frozenset[str],
    trust_domain: TrustDomain,
    findings: Findings,
) -> None:
    """Warns of patterns over identities that no declared workload has: an ALLOW or DENY of nobody."""
    if not policies:
        return  # a change of one endpoint should not cost a look at all identities of the mesh
    principals = elsewhere.union(workload.identity.principal for workload in workloads)
    namespaces = frozenset(principal.split("/")[2] for principal in principals)
    for item in policies:
        for path, patterns, names in _identity_patterns(item.policy, principals, namespaces):
            for pattern in patterns:
                if not _matches_any(pattern, names, trust_domain):
                    problem = f"{shown(pattern)} matches no workload of trust domain {trust_domain}"
                    findings.warn(item.position, path, problem, (pattern, names))


def _matches_any(pattern: str, names: frozenset[str], trust_domain: TrustDomain) -> bool:
    # The two usual forms are looked up, since there may be many workloads and many policies.
    if pattern in names or (pattern.startswith("*/") and trust_domain + pattern[1:] in names):
        return True
    return "*" in pattern and any(pattern_matches(pattern, name) for name in names)


def _identity_patterns(
    policy: AuthorizationPolicy, principals: frozenset[str], namespaces: frozenset[str]
) -> Iterator[tuple[str, tuple[str, ...], frozenset[str]]]:
    """Every field of a policy that asks for identities: path, patterns, and the names that there are."""
    for index, rule in enumerate(policy.rules):
        for number, source in enumerate(rule.sources):
            path = f"spec.rules[{index}].from[{number}].source"
            yield path, source.principals + source.not_principals, principals
            yield path, source.namespaces + source.not_namespaces, namespaces
        for number, condition in enumerate(rule.conditions):
            path = f"spec.rules[{index}].when[{number}]"
            if condition.key is ConditionKey.SOURCE_PRINCIPAL:
                yield path, condition.values + condition.not_values, principals
            elif condition.key is ConditionKey.SOURCE_NAMESPACE:
                yield path, condition.values + condition.not_values, namespaces
