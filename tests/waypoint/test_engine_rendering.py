"""What an Envoy is told: what it cannot express of a service is refused wherever requests go to that service."""

from __future__ import annotations

from pathlib import Path

import pytest

from control.api import resources
from control.api.address import parse_address
from control.api.identity import SpiffeId
from control.api.mesh import Mesh
from control.client.state import State
from tests.support.pair import published
from uproxy.config import Who
from waypoint.engine_envoy.rendering import Layout, Renderer

WP = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/wp")
_MESH = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: wp, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: app-1, namespace: shop, labels: {app: app}}
spec: {address: 10.1.0.1, serviceAccount: app}
---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: shop, labels: {istio.io/use-waypoint: wp}}
spec: {clusterIP: 240.240.0.1, selector: {app: app}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: behind, namespace: shop}
spec: {clusterIP: 240.240.0.2, selector: {app: app}, ports: [{name: http, port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: front, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: front}]
  rules: [{backendRefs: [{name: behind, port: 80}]}]
---
apiVersion: mesh.uproxy.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: said, namespace: shop}
spec: {targetRefs: [{group: "", kind: Service, name: behind}], SAID}
"""


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ("connectionLimits: {maxConnections: 1}", "TrafficPolicy shop/said: connectionLimits.maxConnections"),
        ("loadBalancing: {simple: RANDOM}, outlierDetection: {}", ""),
        ("loadBalancing: {localityLbSetting: {enabled: true}}", ""),
        ("connectionLimits: {maxRequestsPerConnection: 1}", ""),
        ("loadBalancing: {consistentHash: {useSourceIp: true}}", ""),
        ("maxConcurrentRequests: 1, rateLimits: [{requests: 1, per: 1s}]", ""),
    ],
)
def test_what_is_said_of_a_backend_is_not_ignored(tmp_path: Path, said: str, refused: str):
    mesh = Mesh.build(resources.parse(_MESH.replace("SAID", said), "f.yaml"), "cluster.local")
    state = State("cluster.local")
    known = (*mesh.services, *mesh.workloads, *mesh.endpoints, *mesh.gateways, *mesh.routes, *mesh.traffic)
    state.apply([published(record, 1) for record in known])
    layout = Layout(tmp_path, Who("wp-1", WP, (parse_address("10.1.0.9"),)), WP.trust_domain)
    found = Renderer(state, "shop/wp", layout).render().refused
    if refused:
        assert f"{refused} is not known to the engine envoy; remove it" in found["240.240.0.1:80"]
    else:
        assert not found
