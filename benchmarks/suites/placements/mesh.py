"""The mesh's resources where uProxies are: every service behind each waypoint at an address, and on its own at another.

One waypoint is the Envoy. The others are ours, one for each placement that a Gateway may have.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.lab.sources import TRUST_DOMAIN
from benchmarks.lab.waypoints import declaration
from benchmarks.suites.placements.application import (
    DENIED,
    HTTP_PORT,
    INSTANCES,
    L4_PORT,
    NUMBER,
    SERVICE_PORT,
    SERVICES,
    Service,
    member_name,
    version,
)
from control.api.address import HBONE_PORT
from control.api.gateway import Placement
from control.api.labels import NODE

GATEWAY = "wp"
WAYPOINT_ADDRESS = "10.96.3.200"


@dataclass(frozen=True, slots=True)
class Ours:
    """A process of a waypoint of ours."""

    gateway: str
    placement: Placement
    host: str
    address: str
    account: str = ""
    """Of its own, with placement service-account."""

    @property
    def name(self) -> str:
        return f"{self.gateway}{f'-{self.account}' if self.account else ''}-1"

    @property
    def identity(self) -> str:
        """Name of the service account whose identity it has."""
        return self.account or self.gateway


OURS = (
    Ours("ours", Placement.REMOTE, "c", "10.96.3.201"),
    Ours("ours-node", Placement.NODE, "b", "10.96.2.201"),
    *(
        Ours("ours-service-account", Placement.SERVICE_ACCOUNT, "b", f"10.96.2.{202 + number}", one.name)
        for number, one in enumerate(SERVICES)
    ),
)
"""Callers' hosts need none: a process stands before what is called."""
GATEWAYS = tuple(dict.fromkeys(one.gateway for one in OURS))


def address_behind(gateway: str, service: Service) -> str:
    """The virtual address at which a service is behind one of our waypoints."""
    return f"240.240.0.{60 + 10 * GATEWAYS.index(gateway) + SERVICES.index(service)}"


def _gateway(one: Ours) -> str:
    return f"""\
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  name: {one.gateway}
  namespace: default
  labels: {{istio.io/waypoint-for: service}}
  annotations: {{mesh.uproxy.dev/placement: {one.placement.value}}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{{name: mesh, port: {HBONE_PORT}, protocol: HBONE}}]
"""


def _process(one: Ours) -> str:
    return f"""\
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: {one.name}
  namespace: default
  labels: {{gateway.networking.k8s.io/gateway-name: {one.gateway}, {NODE}: {one.host}}}
spec: {{address: {one.address}, serviceAccount: {one.identity}}}
"""


def _instance(service: Service, number: int) -> str:
    """One instance as a Service, to which a path is routed."""
    return f"""\
---
apiVersion: v1
kind: Service
metadata: {{name: {member_name(service.name, number)}, namespace: default}}
spec:
  selector: {{service: {service.name}, {NUMBER}: "{number}"}}
  ports: [{{name: http, port: {SERVICE_PORT}, targetPort: {HTTP_PORT}}}]
"""


def _behind(gateway: str, service: Service) -> str:
    """The service behind one of our waypoints, with the routes and the policy that Envoys are configured with."""
    name = f"{service.name}-{gateway}"
    rules = "".join(
        f"""\
  - matches: [{{path: {{type: PathPrefix, value: /{version(number)}}}}}]
    backendRefs: [{{name: {member_name(service.name, number)}, port: {SERVICE_PORT}}}]
"""
        for number in range(1, INSTANCES + 1)
    )
    return f"""\
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default, labels: {{istio.io/use-waypoint: {gateway}}}}}
spec:
  clusterIP: {address_behind(gateway, service)}
  selector: {{service: {service.name}}}
  ports: [{{name: http, port: {SERVICE_PORT}, targetPort: {HTTP_PORT}}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}, namespace: default}}
spec:
  parentRefs: [{{kind: Service, group: "", name: {name}}}]
  rules:
{rules}  - backendRefs: [{{name: {name}, port: {SERVICE_PORT}}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}-denied, namespace: default}}
spec:
  targetRefs: [{{kind: Service, group: "", name: {name}}}]
  action: DENY
  rules: [{{to: [{{operation: {{paths: ["{DENIED}*"]}}}}]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}-caller, namespace: default}}
spec:
  targetRefs: [{{kind: Service, group: "", name: {name}}}]
  action: ALLOW
  rules: [{{from: [{{source: {{principals: ["{TRUST_DOMAIN}/ns/default/sa/{service.caller}"]}}}}]}}]
"""


RESOURCES = declaration(GATEWAY, WAYPOINT_ADDRESS) + "".join(
    f"""\
---
apiVersion: v1
kind: Service
metadata: {{name: {one.name}, namespace: default, labels: {{istio.io/use-waypoint: {GATEWAY}}}}}
spec:
  clusterIP: {one.address}
  selector: {{service: {one.name}}}
  ports: [{{name: http, port: {SERVICE_PORT}, targetPort: {HTTP_PORT}}}]
---
apiVersion: v1
kind: Service
metadata: {{name: {one.name}-l4, namespace: default}}
spec:
  clusterIP: {one.l4_address}
  selector: {{service: {one.name}}}
  ports: [{{name: tcp, port: {SERVICE_PORT}, targetPort: {L4_PORT}}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {one.name}, namespace: default}}
spec:
  selector: {{matchLabels: {{service: {one.name}}}}}
  action: ALLOW
  rules:
  - from: [{{source: {{principals: [{TRUST_DOMAIN}/ns/default/sa/{one.caller}]}}}}]
    to: [{{operation: {{ports: ["{L4_PORT}"]}}}}]
  - to: [{{operation: {{ports: ["{HTTP_PORT}"]}}}}]
"""
    for one in SERVICES
)
RESOURCES += "".join(map(_gateway, {one.gateway: one for one in OURS}.values()))
RESOURCES += "".join(map(_process, OURS))
RESOURCES += "".join(_instance(one, number) for one in SERVICES for number in range(1, INSTANCES + 1))
RESOURCES += "".join(_behind(gateway, one) for gateway in GATEWAYS for one in SERVICES)
"""The last rule of an L4 policy lets in whoever comes through a waypoint, which judges them. The binding lets in nobody
else.
"""
