"""The mesh's resources where uProxies are: every service behind each waypoint at an address, and on its own at another.

One waypoint is the Envoy. The others are ours, one for each placement that a Gateway may have.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import starmap
from pathlib import Path

from benchmarks.lab.sources import TRUST_DOMAIN
from benchmarks.lab.waypoints import declaration
from benchmarks.suites.placements.application import (
    BUSY,
    BUSY_MS,
    DENIED,
    HTTP_PORT,
    INSTANCES,
    L4_PORT,
    LIMIT_PER_S,
    LIMITED,
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
BESIDE = "ours-sidecar"
"""The Gateway whose processes stand beside workloads of their own: uProxies start them."""
GATEWAYS = (*dict.fromkeys(one.gateway for one in OURS), BESIDE)


FILTER = "busy"
"""Name of the entry point of the bad filter."""


def address_behind(gateway: str, service: Service, *, busy: bool = False) -> str:
    """The virtual address at which a service is behind one of our waypoints; `busy`: with a bad filter."""
    return f"240.240.0.{60 + 10 * GATEWAYS.index(gateway) + SERVICES.index(service) + (5 if busy else 0)}"


def l4_address_beside(service: Service) -> str:
    """The virtual address at which the workloads with a process beside them are reached at L4_PORT."""
    return f"240.240.0.{98 + SERVICES.index(service)}"


def called_by(gateway: str, service: str) -> str:
    """The value of the label `service` of the workloads that serve behind this Gateway."""
    return f"{service}-beside" if gateway == BESIDE else service


def install_filter(directory: Path) -> None:
    """The bad filter as a package, for PYTHONPATH: it burns processor time, and changes nothing."""
    info = directory / f"{FILTER}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {FILTER}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[uproxy.waypoint.filters]\n{FILTER} = {FILTER}_filter:Busy\n")
    (directory / f"{FILTER}_filter.py").write_text(_FILTER)


_FILTER = f"""\
import time


class Busy:
    def __init__(self, settings):
        pass

    def on_request(self, request):
        if request.target.startswith({BUSY!r}):
            enough = time.process_time() + {BUSY_MS / 1000}
            while time.process_time() < enough:
                pass
"""


def _gateway(name: str, placement: Placement) -> str:
    return f"""\
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  name: {name}
  namespace: default
  labels: {{istio.io/waypoint-for: service}}
  annotations: {{mesh.uproxy.dev/placement: {placement.value}}}
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


def _behind(gateway: str, service: Service, *, busy: bool = False) -> str:
    """The service behind one of our waypoints, with the routes, the policy and the limit that Envoys are configured
    with; `busy`: with a bad filter, too. A process beside a workload reaches nobody else: its routes lead there.
    """
    name = f"{service.name}-{gateway}{'-busy' if busy else ''}"
    rules = "".join(
        f"""\
  - matches: [{{path: {{type: PathPrefix, value: /{version(number)}}}}}]
    backendRefs: [{{name: {name if gateway == BESIDE else member_name(service.name, number)}, port: {SERVICE_PORT}}}]
"""
        for number in range(1, INSTANCES + 1)
    )
    return f"""\
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default, labels: {{istio.io/use-waypoint: {gateway}}}}}
spec:
  clusterIP: {address_behind(gateway, service, busy=busy)}
  selector: {{service: {called_by(gateway, service.name)}}}
  ports: [{{name: http, port: {SERVICE_PORT}, targetPort: {HTTP_PORT}}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}, namespace: default}}
spec:
  parentRefs: [{{kind: Service, group: "", name: {name}}}]
  rules:
  - name: limited
    matches: [{{path: {{type: PathPrefix, value: {LIMITED}}}}}]
    backendRefs: [{{name: {name}, port: {SERVICE_PORT}}}]
{rules}  - backendRefs: [{{name: {name}, port: {SERVICE_PORT}}}]
---
apiVersion: mesh.uproxy.dev/v1alpha1
kind: TrafficPolicy
metadata: {{name: {name}, namespace: default}}
spec:
  targetRefs: [{{group: "", kind: Service, name: {name}}}]
  rateLimits: [{{requests: {LIMIT_PER_S}, per: 1s, rules: [limited]}}]
{f"  extensions: [{FILTER}]{chr(10)}" if busy else ""}---
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


def _l4(name: str, address: str, service: Service) -> str:
    """What needs no L7 of the workloads with the label `service` of this name: a service, and who may call."""
    return f"""\
---
apiVersion: v1
kind: Service
metadata: {{name: {name}-l4, namespace: default}}
spec:
  clusterIP: {address}
  selector: {{service: {name}}}
  ports: [{{name: tcp, port: {SERVICE_PORT}, targetPort: {L4_PORT}}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: default}}
spec:
  selector: {{matchLabels: {{service: {name}}}}}
  action: ALLOW
  rules:
  - from: [{{source: {{principals: [{TRUST_DOMAIN}/ns/default/sa/{service.caller}]}}}}]
    to: [{{operation: {{ports: ["{L4_PORT}"]}}}}]
  - to: [{{operation: {{ports: ["{HTTP_PORT}"]}}}}]
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
"""
    for one in SERVICES
)
RESOURCES += "".join(_l4(one.name, one.l4_address, one) for one in SERVICES)
RESOURCES += "".join(_l4(called_by(BESIDE, one.name), l4_address_beside(one), one) for one in SERVICES)
RESOURCES += "".join(starmap(_gateway, {one.gateway: one.placement for one in OURS}.items()))
RESOURCES += _gateway(BESIDE, Placement.SIDECAR)
RESOURCES += "".join(map(_process, OURS))
RESOURCES += "".join(_instance(one, number) for one in SERVICES for number in range(1, INSTANCES + 1))
RESOURCES += "".join(
    _behind(gateway, one, busy=busy)
    for gateway in GATEWAYS
    for one in SERVICES
    for busy in ((False,) if gateway == BESIDE else (False, True))
)
RESOURCES += f"""\
---
apiVersion: mesh.uproxy.dev/v1alpha1
kind: Extension
metadata: {{name: {FILTER}, namespace: default}}
spec: {{type: PythonFilter, pythonFilter: {{name: {FILTER}, timeout: 1s}}}}
"""
"""The last rule of an L4 policy lets in whoever comes through a waypoint, which judges them. The binding lets in nobody
else. A uProxy starts what stands beside its workload with an environment of its own, which has no bad filter.
"""
