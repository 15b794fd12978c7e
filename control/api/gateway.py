"""Waypoints, and what a binding asks of callers and of destinations.

A binding (label `istio.io/use-waypoint`) is worked out by the control plane, phase by phase; a proxy only reads what it
has to do now: a caller `Service.binding` and the residents', a destination `Workload.bounds`, a waypoint its `Gateway`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from control.api.address import IpAddress
from control.api.identity import SpiffeId, TrustDomain, make_id
from control.api.names import key

MAX_TRUSTED_PROXIES: Final = 16


class Traffic(Enum):
    """Which traffic a waypoint takes: `istio.io/waypoint-for`."""

    SERVICE = "service"
    WORKLOAD = "workload"
    ALL = "all"
    NONE = "none"


class Placement(Enum):
    """Where the processes of a waypoint stand: `metadata.PLACEMENT`."""

    REMOTE = "remote"
    """Anywhere: each of them serves everything."""
    NODE = "node"
    """On the nodes of what it serves: each serves the workloads of its own node."""
    SERVICE_ACCOUNT = "service-account"
    """Likewise, and each only those of its own service account, whose identity it has."""
    SIDECAR = "sidecar"
    """Beside each workload, as a child of its uProxy: no process of the Gateway has an address or an identity."""


class Engine(Enum):
    """What serves at a waypoint: `mesh.uproxy.dev/engine`."""

    BUILT_IN = "built-in"
    ENVOY = "envoy"
    """A real Envoy, as a child process."""


class Via(Enum):
    """What a caller does with a connection to something that is bound to a waypoint."""

    WAYPOINT = "waypoint"
    """Through the waypoint, or not at all."""
    PREFERRED = "preferred"
    """Through the waypoint while one of its processes answers, else directly (`mesh.uproxy.dev/waypoint-binding`)."""
    REFUSE = "refuse"
    """Not at all: the waypoint has never been ready, and its L7 policy must not be missed."""


@dataclass(frozen=True, slots=True)
class Binding:
    """To which waypoint a caller goes, and what it does when that does not answer."""

    gateway: str
    """Key of the Gateway."""
    via: Via
    node: str = ""
    """Where the workload is that was dialled by its own address, if the Gateway has a process for each node."""
    canary: str = ""
    """Key of another one, which serves a share of the callers; empty: there is none."""
    percent: int = 0
    """How many of the callers."""

    @property
    def gateways(self) -> tuple[str, ...]:
        """Keys of all that serve."""
        return (self.gateway, self.canary) if self.canary else (self.gateway,)

    def leads_to(self, gateway: str) -> bool:
        """Whether any caller goes to that Gateway."""
        return gateway in (self.gateway, self.canary)

    def takes_canary(self, caller: str) -> bool:
        """Whether a caller (key of a workload) is one of the canary's. It stays that when these become more."""
        place = hashlib.sha256(f"{self.canary} {caller}".encode()).digest()
        return int.from_bytes(place[:4], "big") % 100 < self.percent


@dataclass(frozen=True, slots=True)
class Process:
    """Who is believed about who calls: an identity that others may have too, at these addresses."""

    identity: SpiffeId
    addresses: tuple[IpAddress, ...]


@dataclass(frozen=True, slots=True)
class Bound:
    """What a destination demands of who connects to one of its ports."""

    port: int
    """The workload's port; 0: every port."""
    gateways: tuple[str, ...]
    """Keys of the Gateways whose identity is believed when it names the caller, in order; none when those are gone."""
    exempt: tuple[SpiffeId, ...]
    """Who else may connect directly although it is enforced, in order."""
    enforced: bool
    """Whether anybody else is refused with `waypoint-required`."""
    guarded: bool = False
    """Whether an L7 policy is missed by who connects directly, so that what did before it was enforced must end."""
    processes: tuple[Process, ...] = ()
    """Who is believed likewise, of Gateways whose processes each serve a part: those that serve this workload."""


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The process of a waypoint that a uProxy starts beside its workload, and hands streams to."""

    gateway: str
    """Key of the Gateway."""
    ports: tuple[int, ...]
    """Whose streams go through it, in order; 0: those of all ports. None while it only gets ready, or is let go."""

    def serves(self, port: int) -> bool:
        """Whether streams to a port of the workload go through it."""
        return port in self.ports or 0 in self.ports


@dataclass(frozen=True, slots=True)
class Instance:
    """One process of a waypoint."""

    workload: str
    """Key of its workload."""
    address: IpAddress
    account: str = ""
    """Name of the service account whose identity it has; empty: the Gateway's name."""
    node: str = ""
    """The host whose workloads it serves; empty: of all."""
    others: tuple[IpAddress, ...] = ()
    """Further addresses from which it connects, where it matters from which."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """A waypoint, as callers and its own processes know it."""

    namespace: str
    name: str
    traffic: Traffic
    instances: tuple[Instance, ...]
    """In the order of their keys."""
    services: tuple[str, ...]
    """Keys of the services that it serves, or is about to, in order."""
    workloads: tuple[str, ...]
    """Keys of the workloads likewise, in order."""
    trusted_proxies: int = 0
    """How many proxies before its callers write an address into X-Forwarded-For that is believed."""
    placement: Placement = Placement.REMOTE
    engine: Engine = Engine.BUILT_IN

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)

    def before(self, node: str, account: str) -> tuple[Instance, ...]:
        """The processes that serve workloads of a node and a service account (its name)."""
        return before(self.placement, self.instances, node, account)

    def identity_of(self, trust_domain: TrustDomain, instance: Instance) -> SpiffeId:
        """Who a process of it is."""
        return make_id(trust_domain, self.namespace, instance.account or self.name)


def before(placement: Placement, instances: Sequence[Instance], node: str, account: str) -> tuple[Instance, ...]:
    """Those of a Gateway's processes that serve workloads of a node and a service account (its name)."""
    match placement:
        case Placement.REMOTE:
            return tuple(instances)
        case Placement.NODE:
            return tuple(one for one in instances if one.node == node)
        case Placement.SERVICE_ACCOUNT:
            return tuple(one for one in instances if one.node == node and one.account == account)
        case Placement.SIDECAR:
            return ()


def gateway_identity(trust_domain: TrustDomain, gateway: str) -> SpiffeId:
    """Who the processes of a waypoint are, unless each has an account of its own: the service account has the Gateway's
    name. `gateway`: its key.
    """
    namespace, _, name = gateway.partition("/")
    return make_id(trust_domain, namespace, name)
