"""Resources as somebody declared them: each checked by itself, references between them not yet (`mesh` does that)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from typing import Final

from control.api.address import IpAddress
from control.api.bindings import Canary
from control.api.extension import ExternalAuthorization, Filter
from control.api.gateway import Engine, Placement, Traffic
from control.api.identity import SpiffeId
from control.api.jwt import RequestAuthentication
from control.api.labels import Labels
from control.api.names import key
from control.api.policy import Action, AuthorizationPolicy, PeerAuthentication, Target
from control.api.problems import Position
from control.api.route import HTTPRoute
from control.api.traffic import TrafficPolicy
from control.api.workload import ServicePort


class Family(Enum):
    """An IP family, in the words of Kubernetes."""

    IPV4 = "IPv4"
    IPV6 = "IPv6"


@dataclass(frozen=True, slots=True)
class WaypointChoice:
    """What a Service, WorkloadEntry or Namespace says of waypoints. None: what its namespace says, else nothing."""

    gateway: str | None = None
    """Key of a Gateway; empty: `none`, which opts out."""
    optional: bool | None = None
    """Whether a waypoint that does not answer is passed by."""
    exempt: tuple[SpiffeId, ...] | None = None
    """Who may connect directly, in order."""
    canary: Canary | None = None
    """Which Gateway serves a share of the callers."""

    def over(self, namespace: WaypointChoice) -> WaypointChoice:
        """What holds for an object of a namespace that chose otherwise."""
        return WaypointChoice(
            gateway=namespace.gateway if self.gateway is None else self.gateway,
            optional=namespace.optional if self.optional is None else self.optional,
            exempt=namespace.exempt if self.exempt is None else self.exempt,
            canary=namespace.canary if self.canary is None else self.canary,
        )


NO_CHOICE: Final = WaypointChoice()


@dataclass(frozen=True, slots=True)
class DeclaredNamespace:
    """`v1` Namespace."""

    name: str
    labels: Labels
    position: Position = field(compare=False, repr=False)
    waypoint: WaypointChoice = NO_CHOICE
    direct: bool | None = None
    """What its workloads may do that say nothing of it: `metadata.SAME_HOST`."""


@dataclass(frozen=True, slots=True)
class DeclaredService:
    """`v1` Service."""

    namespace: str
    name: str
    labels: Labels
    selector: Labels | None
    """Workloads of its namespace that serve it; None: only those of its EndpointSlices."""
    ports: tuple[ServicePort, ...]
    """Those of TCP."""
    cluster_ips: tuple[IpAddress, ...]
    """Virtual addresses that were asked for, at most one of a family."""
    families: tuple[Family, ...]
    """Families to have a virtual address in; empty: headless."""
    position: Position = field(compare=False, repr=False)
    waypoint: WaypointChoice = NO_CHOICE
    proxy_protocol: tuple[int, ...] = ()
    """Its ports that want the header: `metadata.PROXY_PROTOCOL`."""
    datagrams: Mapping[int, ServicePort] = field(default_factory=dict, hash=False)
    """Index in `spec.ports` -> port, of those of UDP, whose datagrams pass in plaintext: `metadata.UDP`."""
    prefers_zone: bool = False

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)

    def indexed_ports(self) -> Iterator[tuple[int, ServicePort]]:
        """Those of TCP, each with its index in `spec.ports`."""
        places = (index for index in count() if index not in self.datagrams)
        return zip(places, self.ports, strict=False)


@dataclass(frozen=True, slots=True)
class DeclaredWorkload:
    """`networking.istio.io` WorkloadEntry."""

    namespace: str
    name: str
    labels: Labels
    addresses: tuple[IpAddress, ...]
    ports: Mapping[str, int]
    service_account: str
    node: str
    weight: int
    position: Position = field(compare=False, repr=False)
    waypoint: WaypointChoice = NO_CHOICE
    direct: bool | None = None
    """None: what its namespace says."""
    proxy_protocol: tuple[int, ...] = ()
    """Of its own ports, likewise."""
    locality: str = ""
    """Empty: it says nothing of it."""

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)


@dataclass(frozen=True, slots=True)
class DeclaredEndpoint:
    """One endpoint of an EndpointSlice."""

    address: IpAddress
    ready: bool
    target: str
    """Name of the WorkloadEntry that `targetRef` says it is; empty when it does not say."""
    path: str
    """Where it stands in its document."""


@dataclass(frozen=True, slots=True)
class DeclaredEndpoints:
    """`discovery.k8s.io/v1` EndpointSlice."""

    namespace: str
    name: str
    service: str
    """Name of the Service, of the same namespace."""
    endpoints: tuple[DeclaredEndpoint, ...]
    ports: Mapping[str, int]
    """Name of a Service port -> port of the endpoints."""
    position: Position = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class DeclaredPolicy:
    """`security.istio.io` AuthorizationPolicy."""

    policy: AuthorizationPolicy
    """Without its authorizer."""
    position: Position = field(compare=False, repr=False)
    provider: str = ""
    """Name of the Extension that says who is asked; empty unless it is CUSTOM."""

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.policy.targets

    @property
    def guards(self) -> tuple[Target, ...]:
        """What must not be reached past the waypoint that enforces it."""
        return () if self.policy.dry_run or self.policy.action is Action.AUDIT else self.policy.targets


@dataclass(frozen=True, slots=True)
class DeclaredPeerAuthentication:
    """`security.istio.io` PeerAuthentication."""

    peer_authentication: PeerAuthentication
    position: Position = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class DeclaredRequestAuthentication:
    """`security.istio.io` RequestAuthentication."""

    request_authentication: RequestAuthentication
    """Without keys where they are fetched."""
    key_uris: tuple[str, ...]
    """For each rule, where its keys are fetched; empty: they stand in it."""
    position: Position = field(compare=False, repr=False)

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.request_authentication.targets

    @property
    def guards(self) -> tuple[Target, ...]:
        return self.targets


@dataclass(frozen=True, slots=True)
class DeclaredTraffic:
    """`mesh.uproxy.dev` TrafficPolicy."""

    traffic: TrafficPolicy
    """Without its filters."""
    position: Position = field(compare=False, repr=False)
    extensions: tuple[str, ...] = ()
    """Names of the Extensions that are its filters, in order."""

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.traffic.targets

    @property
    def guards(self) -> tuple[Target, ...]:
        """What must not be reached past the waypoint: its filters may refuse; limits are no such matter."""
        return self.targets if self.extensions else ()


@dataclass(frozen=True, slots=True)
class DeclaredExtension:
    """`mesh.uproxy.dev` Extension."""

    namespace: str
    name: str
    content: ExternalAuthorization | Filter | None
    """By its type. None: its type was none."""
    position: Position = field(compare=False, repr=False)

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)


@dataclass(frozen=True, slots=True)
class DeclaredGateway:
    """Gateway API Gateway of class `istio-waypoint`."""

    namespace: str
    name: str
    traffic: Traffic
    admits: Labels | None
    """Namespaces whose objects it serves: those with these labels (none: every one); None: its own."""
    position: Position = field(compare=False, repr=False)
    trusted_proxies: int = 0
    placement: Placement = Placement.REMOTE
    engine: Engine = Engine.BUILT_IN

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)


@dataclass(frozen=True, slots=True)
class DeclaredRoute:
    """Gateway API HTTPRoute or GRPCRoute."""

    kind: str
    route: HTTPRoute
    """A GRPCRoute too: a method of gRPC is a path."""
    sections: tuple[str, ...]
    """The name of the port that each parent means; empty where it names none."""
    position: Position = field(compare=False, repr=False)

    @property
    def abroad(self) -> frozenset[str]:
        """Other namespaces that it has parents in."""
        return frozenset(parent.service.partition("/")[0] for parent in self.route.parents) - {self.route.namespace}


@dataclass(frozen=True, slots=True)
class DeclaredGrant:
    """Gateway API ReferenceGrant: which routes of other namespaces may send to Services of its own."""

    namespace: str
    name: str
    routes: tuple[tuple[str, str], ...]
    """Kinds and namespaces."""
    services: tuple[str, ...]
    """Names; empty: every one."""
    position: Position = field(compare=False, repr=False)

    def admits(self, kind: str, namespace: str, service_key: str) -> bool:
        """Whether routes of a kind and namespace may send to a Service."""
        of_namespace, _, name = service_key.partition("/")
        return (
            of_namespace == self.namespace
            and (kind, namespace) in self.routes
            and (not self.services or name in self.services)
        )


Resource = (
    DeclaredNamespace
    | DeclaredService
    | DeclaredWorkload
    | DeclaredEndpoints
    | DeclaredPolicy
    | DeclaredPeerAuthentication
    | DeclaredRequestAuthentication
    | DeclaredTraffic
    | DeclaredExtension
    | DeclaredGateway
    | DeclaredRoute
    | DeclaredGrant
)


Place = tuple[str, str, str]
"""Kind, namespace (empty for a Namespace) and name: what no two resources share."""


def place_of(resource: Resource) -> Place:
    """What a resource is referred to by."""
    match resource:
        case DeclaredNamespace():
            return "Namespace", "", resource.name
        case DeclaredService():
            return "Service", resource.namespace, resource.name
        case DeclaredWorkload():
            return "WorkloadEntry", resource.namespace, resource.name
        case DeclaredEndpoints():
            return "EndpointSlice", resource.namespace, resource.name
        case DeclaredPolicy():
            return "AuthorizationPolicy", resource.policy.namespace, resource.policy.name
        case DeclaredPeerAuthentication():
            declared = resource.peer_authentication
            return "PeerAuthentication", declared.namespace, declared.name
        case DeclaredRequestAuthentication():
            requests = resource.request_authentication
            return "RequestAuthentication", requests.namespace, requests.name
        case DeclaredTraffic():
            return "TrafficPolicy", resource.traffic.namespace, resource.traffic.name
        case DeclaredExtension():
            return "Extension", resource.namespace, resource.name
        case DeclaredGateway():
            return "Gateway", resource.namespace, resource.name
        case DeclaredRoute():
            return resource.kind, resource.route.namespace, resource.route.name
        case DeclaredGrant():
            return "ReferenceGrant", resource.namespace, resource.name
