"""What the engine envoy does not know is warned of when it is applied, where it counts."""

from __future__ import annotations

import pytest

from control.api import resources
from control.api.mesh import Mesh
from control.api.problems import ResourceErrors

MESH = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: wp, namespace: shop, annotations: {mesh.uproxy.dev/engine: ENGINE}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop, labels: {istio.io/use-waypoint: wp}}
spec: {selector: {app: db}, ports: [{name: http, port: 80}]}
---
"""
SERVICE = "targetRefs: [{group: '', kind: Service, name: db}]"
GATEWAY = "targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: wp}]"


def policy(spec: str) -> str:
    return (
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\n"
        f"spec: {{{spec}}}\n"
    )


def traffic(spec: str) -> str:
    return (
        "apiVersion: mesh.uproxy.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: t, namespace: shop}\n"
        f"spec: {{{spec}}}\n"
    )


def warnings(text: str, engine: str) -> list[str]:
    mesh = Mesh.build(resources.parse(MESH.replace("ENGINE", engine) + text, "f.yaml"), "cluster.local")
    return [str(warning) for warning in mesh.warnings if "engine" in str(warning)]


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        (traffic(f"{SERVICE}, connectionLimits: {{maxConnections: 3}}"), "connectionLimits.maxConnections"),
        (traffic(f"{GATEWAY}, connectionLimits: {{maxConnections: 3}}"), "connectionLimits.maxConnections"),
    ],
)
def test_what_the_engine_does_not_know(text: str, unknown: str) -> None:
    (warning,) = warnings(text, "envoy")
    assert f"the engine envoy of Gateway shop/wp does not know {unknown}, and refuses all requests" in warning
    assert warning.startswith("f.yaml:")
    assert not warnings(text, "built-in")


def extension(kind: str, section: str) -> str:
    return (
        "apiVersion: mesh.uproxy.dev/v1alpha1\nkind: Extension\nmetadata: {name: code, namespace: shop}\n"
        f"spec: {{type: {kind}, {section}}}\n---\n" + traffic(f"{SERVICE}, extensions: [code]")
    )


@pytest.mark.parametrize(
    ("text", "engine", "other", "kind"),
    [
        (extension("PythonFilter", "pythonFilter: {name: a}"), "envoy", "built-in", "PythonFilter"),
        (extension("Lua", "lua: {inline: x = 1}"), "built-in", "envoy", "Lua"),
        (extension("Wasm", "wasm: {inline: AGFzbQEAAAA=}"), "built-in", "envoy", "Wasm"),
    ],
)
def test_each_engine_runs_its_own_extensions(text: str, engine: str, other: str, kind: str) -> None:
    (warning,) = warnings(text, engine)
    assert f"the engine {engine} of Gateway shop/wp does not know Extension shop/code ({kind}), and refuses" in warning
    assert not warnings(text, other)


def test_a_canary_of_that_engine_does_not_know_it_either() -> None:
    gateway, _, service = MESH.replace("ENGINE", "built-in").partition("---")
    canary = gateway.replace("name: wp", "name: v2").replace("built-in", "envoy")
    service = service.replace(
        "use-waypoint: wp}", "use-waypoint: wp}, annotations: {mesh.uproxy.dev/waypoint-canary: v2=10}"
    )
    text = f"{gateway}---{canary}---{service}{traffic(f'{SERVICE}, connectionLimits: {{maxConnections: 3}}')}"
    mesh = Mesh.build(resources.parse(text, "f.yaml"), "cluster.local")
    (warning,) = (str(one) for one in mesh.warnings if "engine" in str(one))
    assert "the engine envoy of Gateway shop/v2 does not know connectionLimits" in warning


@pytest.mark.parametrize(
    "text",
    [
        policy(f"{SERVICE}, action: DENY, rules: [{{}}]"),
        policy(f"{SERVICE}, action: AUDIT, rules: [{{}}]"),
        policy(f"{SERVICE}, action: CUSTOM, provider: {{name: ask}}, rules: [{{}}]"),
        traffic(f"{SERVICE}, rateLimits: [{{requests: 1, per: 1s}}], maxConcurrentRequests: 3"),
        traffic(f"{SERVICE}, connectionLimits: {{maxRequestsPerConnection: 3}}"),
    ],
)
def test_what_it_does_know(text: str) -> None:
    assert not warnings(text, "envoy")


def test_no_other_engine_is_taken() -> None:
    with pytest.raises(ResourceErrors, match="'nginx' must be one of built-in, envoy"):
        warnings("", "nginx")
