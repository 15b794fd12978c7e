"""Services, workloads and endpoints: what a proxy knows of the mesh.

Plain values, equal when their content is. Mappings are read-only by convention, part of equality and not of
the hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from control.api import labels as label
from control.api.address import IpAddress
from control.api.gateway import Binding, Bound, Sidecar
from control.api.identity import SpiffeId
from control.api.labels import Labels
from control.api.names import key as key  # beside what has one
from control.api.names import wrong_dns_label, wrong_service_name
from control.api.plaintext import Plaintext

CLUSTER_DOMAIN: Final = "cluster.local"
"""The DNS suffix of service host names. It is not the trust domain, though both are often the same text."""


def key_of_host(host: str) -> str | None:
    """Key of the service that a host name means: `name.ns`, `name.ns.svc` or `name.ns.svc.cluster.local`, in any case.

    None for what no service can be called.
    """
    host = host.lower().removesuffix(".").removesuffix(f".svc.{CLUSTER_DOMAIN}").removesuffix(".svc")
    name, _, namespace = host.partition(".")
    return key(namespace, name) if not wrong_service_name(name) and not wrong_dns_label(namespace) else None


def host_of_key(service_key: str) -> str:
    """The full host name of a service."""
    namespace, _, name = service_key.partition("/")
    return f"{name}.{namespace}.svc.{CLUSTER_DOMAIN}"


_HTTP1: Final = frozenset({"http", "http/1.1", "grpc-web", "kubernetes.io/ws"})
_HTTP2: Final = frozenset({"http2", "grpc", "kubernetes.io/h2c"})
_OPAQUE: Final = frozenset({"tcp", "tls", "https", "mongo", "mysql", "redis"})
OPAQUE_PORTS: Final = frozenset({25, 53, 3306, 27017})
"""SMTP, DNS, MySQL, MongoDB, as Istio has it: opaque TCP where nothing else is said. Their servers speak first."""


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a service. All are TCP."""

    name: str
    """Empty only where the service has a single port."""
    port: int
    target_port: int | str
    """The workload's port: a number, or a name that the workload maps to one."""
    app_protocol: str
    """As declared (`http`, `kubernetes.io/h2c`, ...); empty when not."""

    @property
    def is_http(self) -> bool:
        """Whether a waypoint reads requests here: by `app_protocol`, else by the name, as Istio does."""
        return self._speaks(_HTTP1) or self._speaks(_HTTP2)

    @property
    def is_http2(self) -> bool:
        """Whether requests go to its workloads by HTTP/2, without TLS and without asking (gRPC does)."""
        return self._speaks(_HTTP2) and not self._speaks(_HTTP1)

    @property
    def is_undeclared(self) -> bool:
        """Whether nothing says what it speaks: a waypoint goes by the first bytes of each connection."""
        return not (self.app_protocol or self.is_http or self._speaks(_OPAQUE) or self.port in OPAQUE_PORTS)

    @property
    def is_opaque(self) -> bool:
        """Whether a waypoint reads nothing here."""
        return not (self.is_http or self.is_undeclared)

    def _speaks(self, protocols: frozenset[str]) -> bool:
        if self.app_protocol:
            return self.app_protocol in protocols
        return any(self.name == protocol or self.name.startswith(f"{protocol}-") for protocol in protocols)


@dataclass(frozen=True, slots=True)
class Service:
    """A name with virtual addresses. No address: a headless service, reached by its workloads' addresses."""

    namespace: str
    name: str
    vips: tuple[IpAddress, ...]
    ports: tuple[ServicePort, ...]
    labels: Labels = field(hash=False)
    identities: tuple[SpiffeId, ...]
    """Who may serve it, in order. Services are signed and endpoints are not: an endpoint of anybody else is none."""
    binding: Binding | None = None
    """How callers reach it; None: directly."""
    prefers_zone: bool = False
    """Whether callers take endpoints of their own zone first, then of their region."""

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)

    @property
    def hostname(self) -> str:
        return f"{self.name}.{self.namespace}.svc.{CLUSTER_DOMAIN}"


@dataclass(frozen=True, slots=True)
class Workload:
    """One workload of the mesh: one network namespace, one sidecar, one identity."""

    namespace: str
    name: str
    service_account: str
    identity: SpiffeId
    addresses: tuple[IpAddress, ...]
    """At least one; the first is the one endpoints use unless they say otherwise."""
    labels: Labels = field(hash=False)
    ports: Mapping[str, int] = field(hash=False)
    """Named ports of this workload."""
    node: str
    """The host it runs on; empty when not declared."""
    weight: int
    """Share of traffic relative to the service's other endpoints, at least 1."""
    bounds: tuple[Bound, ...] = ()
    """Ports that waypoints stand before, in the order of their numbers, each once."""
    direct: bool = False
    """Whether it may be a caller or a destination on the direct path of one host (`mesh.uproxy.dev/same-host`)."""
    plaintext: Plaintext | None = None
    """Ports that take plaintext too; None: none does."""
    proxy_protocol: tuple[int, ...] = ()
    """Ports, in order, whose application reads from a PROXY protocol header who calls."""
    locality: str = ""
    """Where it runs: `control.api.locality`; empty when not declared."""
    sidecar: Sidecar | None = None
    """What stands beside it, of a waypoint of placement sidecar."""

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)

    def bound_at(self, port: int) -> Bound | None:
        """What is demanded of who connects to a port: what stands for that port alone, else what stands for all."""
        for bound in self.bounds:
            if bound.port == port:
                return bound
        return self.bounds[0] if self.bounds and self.bounds[0].port == 0 else None

    @property
    def canonical_service(self) -> str:
        """Istio's canonical service: by label, else the workload's own name."""
        return label.first_of(label.CANONICAL_NAME, self.labels, self.name)

    @property
    def canonical_revision(self) -> str:
        return label.first_of(label.CANONICAL_REVISION, self.labels, "latest")

    @property
    def app(self) -> str:
        """The `app` label, or empty."""
        return label.first_of(label.APP, self.labels, "")

    @property
    def version(self) -> str:
        """The `version` label, or empty."""
        return label.first_of(label.VERSION, self.labels, "")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One workload as a backend of one service: what a caller needs to reach it and to know it."""

    service: str
    """Key of the service."""
    workload: str
    """Key of the workload."""
    address: IpAddress
    identity: SpiffeId
    """What its certificate must say, exactly."""
    ports: Mapping[int, int] = field(hash=False)
    """Service port -> the workload's port."""
    weight: int
    ready: bool
    """Whether it takes new connections."""
    labels: Labels = field(hash=False)
    """The workload's `labels.telemetry`."""
    locality: str = ""
    """The workload's."""
    node: str = ""
    """The host that the workload runs on; empty when not declared."""

    def as_workload(self) -> Workload:
        """The workload behind it, as far as a caller needs to know it: for metrics and logs."""
        namespace, _, name = self.workload.partition("/")
        return Workload(
            namespace=namespace,
            name=name,
            service_account=self.identity.service_account,
            identity=self.identity,
            addresses=(self.address,),
            labels=self.labels,
            ports={},
            node=self.node,
            weight=self.weight,
            locality=self.locality,
        )
