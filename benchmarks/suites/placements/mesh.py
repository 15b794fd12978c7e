"""The mesh's resources where uProxies are: every service behind the waypoint on one port, and on its own on another."""

from __future__ import annotations

from benchmarks.lab.sources import TRUST_DOMAIN
from benchmarks.lab.waypoints import declaration
from benchmarks.suites.placements.application import HTTP_PORT, L4_PORT, SERVICE_PORT, SERVICES

GATEWAY = "wp"
WAYPOINT_ADDRESS = "10.96.3.200"

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
"""The last rule lets in whoever comes through the waypoint, which judges them, and the binding nobody else."""
