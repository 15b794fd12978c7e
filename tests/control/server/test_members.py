"""Whom a node's agent may ask a token for."""

from __future__ import annotations

import pytest

from control.api.identity import make_id
from control.server.enrolment import Member
from control.server.members import Members

MESH = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: NAME, namespace: shop, annotations: {mesh.uproxy.dev/placement: NAME}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: NAME-a
  namespace: shop
  labels: {gateway.networking.k8s.io/gateway-name: NAME, kubernetes.io/hostname: host-a}
spec: {address: 10.97.0.NUMBER, serviceAccount: ACCOUNT}
"""
WEB = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/hostname: host-a}}
spec: {address: 10.97.0.1, serviceAccount: web}
"""
_ACCOUNTS = {"remote": "remote", "node": "node", "service-account": "web"}


@pytest.fixture
def members(plane, authority):
    texts = [WEB]
    for number, (name, account) in enumerate(_ACCOUNTS.items(), 7):
        texts.append(MESH.replace("NAME", name).replace("NUMBER", str(number)).replace("ACCOUNT", account))
    plane.core.apply([("mesh.yaml", "---\n".join(texts))])
    return Members(plane.core, authority.trust_domain)


@pytest.mark.parametrize(("name", "address"), [("node", "10.97.0.8"), ("service-account", "10.97.0.9")])
def test_a_process_is_its_own_nodes_and_no_others(members, name, address):
    identity = make_id("cluster.local", "shop", _ACCOUNTS[name])
    assert members.placed("host-a", "shop", f"{name}-a") == Member(identity, f"{name}-a", (address,))
    for node, namespace, asked in (
        ("host-b", "shop", f"{name}-a"),
        ("", "shop", f"{name}-a"),
        ("host-a", "bank", f"{name}-a"),
        ("host-a", "shop", f"{name}-b"),
    ):
        assert members.placed(node, namespace, asked) is None


@pytest.mark.parametrize("name", ["remote-a", "web-1", "node-host-a"])
def test_whoever_else_is_on_the_node_is_not_its_agents(members, name):
    assert members.placed("host-a", "shop", name) is None
    assert members.placed("host-a", "mesh-system", name) is None
