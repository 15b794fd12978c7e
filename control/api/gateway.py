"""Waypoints, and what a binding asks of callers and of destinations.

A binding (label `istio.io/use-waypoint`) is worked out by the control plane, phase by phase; a proxy only reads what it
has to do now: a caller `Service.binding` and the residents', a destination `Workload.bounds`, a waypoint its `Gateway`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from control.api.address import IpAddress
from control.api.identity import SpiffeId, TrustDomain, make_id
from control.api.names import key


class Traffic(Enum):
    """Which traffic a waypoint takes: `istio.io/waypoint-for`."""

    SERVICE = "service"
    WORKLOAD = "workload"
    ALL = "all"
    NONE = "none"


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


@dataclass(frozen=True, slots=True)
class Instance:
    """One process of a waypoint."""

    workload: str
    """Key of its workload."""
    address: IpAddress


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

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)


def gateway_identity(trust_domain: TrustDomain, gateway: str) -> SpiffeId:
    """Who the processes of a waypoint are: the service account has the Gateway's name. `gateway`: its key."""
    namespace, _, name = gateway.partition("/")
    return make_id(trust_domain, namespace, name)
