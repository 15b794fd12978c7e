"""Two waypoints between the same two uProxies, ours and an Envoy's: HTTP is read, judged and routed by either.

Each is the waypoint of a service of its own, whose endpoint is the application of the subject `uproxy`. Both are one
process with one worker, deny by policy what begins with /deny, and keep no access log.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.metadata import version

from benchmarks import load
from benchmarks.harness.results import Subject
from benchmarks.lab.sources import TRUST_DOMAIN
from benchmarks.lab.topology import Host, Lab, Workload
from benchmarks.lab.waypoints import declaration
from benchmarks.peers import envoy
from benchmarks.peers.pairs import APP_PORT
from benchmarks.peers.place import Place
from benchmarks.peers.standing import Standing
from control.api.address import HBONE_PORT
from control.api.identity import SpiffeId

OURS = Subject(
    "waypoint",
    "our waypoint",
    "`waypoint run`, one process on a third host, between the two uProxies: HTTP/1.1, HBONE before and behind it; a "
    "policy that denies a path, no access log.",
    f"uProxy {version('uproxy-mesh')}",
)
ENVOYS = Subject(
    "envoy-waypoint",
    "Envoy as the waypoint",
    "An Envoy with one worker on a third host between the same two uProxies, of the shape of Istio's waypoint (CONNECT "
    "ended, HTTP in between, CONNECT again), with an RBAC filter that denies the same path as ours, without telemetry "
    "filters or the caller's identity. No access log. Values include both uProxies.",
)
SERVICE_PORT = 80
_HTTP_PORT = APP_PORT + load.HTTP
# Gateway -> its address on the third host, and that of the service before which it stands.
_PLACES = {OURS.name: ("10.96.3.200", "240.240.0.61"), ENVOYS.name: ("10.96.3.201", "240.240.0.62")}


def resources(server: Workload) -> str:
    """The Gateways and the services, whose one endpoint is `server`."""
    return "".join(
        f"""\
---
{declaration(gateway, address)}---
apiVersion: v1
kind: Service
metadata: {{name: through-{gateway}, namespace: default, labels: {{istio.io/use-waypoint: {gateway}}}}}
spec:
  clusterIP: {service}
  selector: {{app: {server.name}}}
  ports: [{{name: http, port: {SERVICE_PORT}, targetPort: {_HTTP_PORT}}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: deny-{gateway}, namespace: default}}
spec:
  targetRefs: [{{group: "", kind: Service, name: through-{gateway}}}]
  action: DENY
  rules: [{{to: [{{operation: {{paths: [/deny*]}}}}]}}]
"""
        for gateway, (address, service) in _PLACES.items()
    )


def stand_ours(lab: Lab, host: Host, uproxy: Standing) -> Standing:
    """Start our waypoint; `uproxy` is the pair that it stands between. Raises LabError."""
    place = _place(host, OURS.name)
    argv = [
        *(sys.executable, "-I", "-m", "waypoint", "run", "--workload", f"default/{OURS.name}-1"),
        *("--trust-domain", TRUST_DOMAIN, "--config", str(lab.directory / "mesh.yaml")),
        *("--identity-dir", str(place.identity_dir), "--access-log", "off"),
    ]
    return _between(uproxy, OURS, place, place.start(argv, [(place.address, HBONE_PORT)]).pid)


def stand_envoy(host: Host, uproxy: Standing, server: Workload) -> Standing:
    """Start the Envoy; `uproxy` is the pair that it stands between. Raises LabError."""
    place = _place(host, ENVOYS.name)
    tunnel = (server.address, HBONE_PORT)
    config = envoy.waypoint_config(
        place.identity_dir, TRUST_DOMAIN, (place.address, HBONE_PORT), tunnel, f"{server.address}:{_HTTP_PORT}"
    )
    written = place.directory / "envoy.json"
    written.write_text(json.dumps(config, indent=1))
    pid = place.start(envoy.argv(written), [(place.address, HBONE_PORT)]).pid
    return _between(uproxy, replace(ENVOYS, version=envoy.version()), place, pid)


def _between(uproxy: Standing, subject: Subject, place: Place, pid: int) -> Standing:
    return replace(
        uproxy,
        subject=subject,
        entry=(_PLACES[subject.name][1], SERVICE_PORT),
        proxies={**uproxy.proxies, "waypoint": [pid]},
        tls_address=place.address,
        logs=(*uproxy.logs, place.log),
    )


def _place(host: Host, gateway: str) -> Place:
    identity = SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/ns/default/sa/{gateway}")
    directory = host.lab.directory / "identities" / gateway
    host.lab.issue(identity, directory)
    return Place(host.lab, host.place(gateway, _PLACES[gateway][0]), identity, directory)
