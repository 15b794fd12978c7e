"""Services before which each waypoint stands, with some number of routes: as resources, and as an Envoy has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks import load
from benchmarks.lab.waypoints import declaration
from benchmarks.load import Protocol
from benchmarks.peers.pairs import APP_PORT

ROUTES: Final = (1, 10, 1000)
"""Of a service; each waypoint stands before one with each number."""
PORTS: Final[dict[Protocol, int]] = {"http1": 80, "http2": 81, "grpc": 82}
HTTP_PORT: Final = APP_PORT + load.HTTP
DENIED: Final = "/r0000/denied"
_PROTOCOLS: Final[dict[Protocol, str]] = {"http1": "http", "http2": "kubernetes.io/h2c", "grpc": "grpc"}
_RULES: Final = 16
"""Of one HTTPRoute: as many as the Gateway API lets it have."""


def service(gateway: str, routes: int) -> str:
    return f"{gateway}-{routes}"


def address(place: int, routes: int) -> str:
    """Of a service. `place`: which waypoint's it is, from 0."""
    return f"240.240.{70 + place}.{1 + ROUTES.index(routes)}"


def host(protocol: Protocol, routes: int) -> str:
    """Whom requests are for, as they say."""
    return f"{protocol}-{routes}"


def prefixes(routes: int) -> Sequence[str]:
    return [f"/r{number:04}" for number in range(routes)]


def path(routes: int) -> str:
    """Of what is asked for: the route in the middle, where who looks at them in turn has looked at half of them."""
    return f"{prefixes(routes)[routes // 2]}/Echo"


def resources(server: str, gateways: Sequence[tuple[str, str]]) -> str:
    """All but routes. `gateways`: names and addresses of the waypoints. `server`: the workload behind all services."""
    return "---\n".join(
        part
        for place, (gateway, own) in enumerate(gateways)
        for part in (declaration(gateway, own), *(_of_service(place, gateway, routes, server) for routes in ROUTES))
    )


def routes_of(gateway: str) -> str:
    """The routes of the services of one waypoint: nobody else has to read them."""
    return "---\n".join(
        _route(service(gateway, routes), port, first // _RULES, prefixes(routes)[first : first + _RULES])
        for routes in ROUTES
        for port in PORTS.values()
        for first in range(0, routes, _RULES)
    )


def hosts() -> dict[str, Sequence[str]]:
    """As an Envoy has the routes: name of a host -> prefixes."""
    return {host(protocol, routes): prefixes(routes) for protocol in PORTS for routes in ROUTES}


def _of_service(place: int, gateway: str, routes: int, server: str) -> str:
    name = service(gateway, routes)
    ports = "".join(
        f"  - {{name: {protocol}, port: {port}, targetPort: {HTTP_PORT}, appProtocol: {_PROTOCOLS[protocol]}}}\n"
        for protocol, port in PORTS.items()
    )
    return f"""\
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default, labels: {{istio.io/use-waypoint: {gateway}}}}}
spec:
  clusterIP: {address(place, routes)}
  selector: {{app: {server}}}
  ports:
{ports}---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: deny-{name}, namespace: default}}
spec:
  targetRefs: [{{group: "", kind: Service, name: {name}}}]
  action: DENY
  rules: [{{to: [{{operation: {{paths: ["{DENIED}*"]}}}}]}}]
"""


def _route(name: str, port: int, number: int, group: Sequence[str]) -> str:
    rules = "".join(
        f"  - matches: [{{path: {{type: PathPrefix, value: {prefix}}}}}]\n"
        f"    backendRefs: [{{name: {name}, port: {port}}}]\n"
        for prefix in group
    )
    return f"""\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}-{port}-{number}, namespace: default}}
spec:
  parentRefs: [{{group: "", kind: Service, name: {name}, port: {port}}}]
  rules:
{rules}"""
