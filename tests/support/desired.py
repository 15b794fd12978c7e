"""Short resources for tests of the control plane."""

from __future__ import annotations

from collections.abc import Sequence


def service(
    name: str,
    namespace: str = "shop",
    app: str = "",
    vip: str = "",
    labels: str = "",
    datagrams: int = 0,
    canary: str = "",
) -> str:
    """A Service that selects `app`, by default the label of its own name; `app="-"`: without selector. `datagrams`: a
    port of protocol UDP whose datagrams pass. `canary`: the share of another waypoint.
    """
    udp = f", {{name: beacon, port: {datagrams}, targetPort: {datagrams + 1}, protocol: UDP}}" if datagrams else ""
    said = {"udp": "plaintext" if datagrams else "", "waypoint-canary": canary}
    annotations = ", ".join(f"mesh.uproxy.dev/{name}: {value}" for name, value in said.items() if value)
    annotated = f", annotations: {{{annotations}}}" if annotations else ""
    selector = "" if app == "-" else f"  selector: {{app: {app or name}}}\n"
    address = f"  clusterIP: {vip}\n" if vip else ""
    return (
        "apiVersion: v1\nkind: Service\n"
        f"metadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}{annotated}}}\n"
        f"spec:\n{selector}{address}  ports: [{{name: http, port: 80, targetPort: 8080}}{udp}]\n"
    )


def workload(
    name: str, address: str, namespace: str = "shop", app: str = "web", account: str = "", version: str = "v1"
) -> str:
    return (
        "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n"
        f"metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {app}, version: {version}}}}}\n"
        f"spec: {{address: {address}, serviceAccount: {account or app}}}\n"
    )


def endpoints(name: str, service: str, ready: Sequence[tuple[str, bool]], namespace: str = "shop") -> str:
    """An EndpointSlice; `ready`: address and readiness of each endpoint."""
    listed = ", ".join(
        f"{{addresses: [{address}], conditions: {{ready: {str(is_ready).lower()}}}}}" for address, is_ready in ready
    )
    return (
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n"
        f"metadata: {{name: {name}, namespace: {namespace}, labels: {{kubernetes.io/service-name: {service}}}}}\n"
        f"ports: [{{name: http, port: 8080}}]\nendpoints: [{listed}]\n"
    )


def policy(name: str, namespace: str = "shop", app: str = "", action: str = "ALLOW", caller: str = "shop") -> str:
    selector = f"  selector: {{matchLabels: {{app: {app}}}}}\n" if app else ""
    return (
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\n"
        f"spec:\n{selector}  action: {action}\n  rules: [{{from: [{{source: {{namespaces: [{caller}]}}}}]}}]\n"
    )


def peer_authentication(name: str, namespace: str = "shop", mode: str = "PERMISSIVE", app: str = "") -> str:
    selector = f"selector: {{matchLabels: {{app: {app}}}}}, " if app else ""
    return (
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{selector}mtls: {{mode: {mode}}}}}\n"
    )


def gateway(name: str, namespace: str = "shop", labels: str = "") -> str:
    """A waypoint that every namespace may use."""
    return (
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\n"
        f"metadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}\n"
        "spec:\n  gatewayClassName: istio-waypoint\n"
        "  listeners: [{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: All}}}]\n"
    )


def route(name: str, parent: str, backends: Sequence[str], namespace: str = "shop", path: str = "/") -> str:
    """An HTTPRoute of one service, to port 80 of others."""
    refs = ", ".join(f"{{name: {backend}, port: 80}}" for backend in backends)
    return (
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\n"
        f"spec:\n  parentRefs: [{{group: '', kind: Service, name: {parent}}}]\n"
        f"  rules: [{{matches: [{{path: {{type: PathPrefix, value: {path}}}}}], backendRefs: [{refs}]}}]\n"
    )


def grant(name: str, to: str, namespace: str, routes: str = "shop") -> str:
    """A ReferenceGrant that lets HTTPRoutes of a namespace send to a service."""
    return (
        "apiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\n"
        f"spec:\n  from: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: {routes}}}]\n"
        f"  to: [{{group: '', kind: Service, name: {to}}}]\n"
    )


def guard(name: str, service: str, namespace: str = "shop", method: str = "DELETE") -> str:
    """An AuthorizationPolicy that holds at the waypoint of a service."""
    return (
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\n"
        f"spec:\n  targetRefs: [{{group: '', kind: Service, name: {service}}}]\n  action: DENY\n"
        f"  rules: [{{to: [{{operation: {{methods: [{method}]}}}}]}}]\n"
    )


def request_authentication(name: str, service: str, namespace: str = "shop", issuer: str = "accounts") -> str:
    """Of the tokens to a service; without keys, so that none is valid."""
    return (
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\n"
        f"spec:\n  targetRefs: [{{group: '', kind: Service, name: {service}}}]\n"
        f"  jwtRules: [{{issuer: {issuer}, jwks: '{{\"keys\":[]}}'}}]\n"
    )


def traffic_policy(name: str, service: str, namespace: str = "shop", requests: int = 100) -> str:
    """So many requests to a service at one time."""
    return (
        "apiVersion: mesh.uproxy.dev/v1alpha1\nkind: TrafficPolicy\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\n"
        f"spec: {{targetRefs: [{{group: '', kind: Service, name: {service}}}], maxConcurrentRequests: {requests}}}\n"
    )


def extension(name: str, service: str, namespace: str = "shop", port: int = 80) -> str:
    """A service that is asked whether requests may pass."""
    return (
        "apiVersion: mesh.uproxy.dev/v1alpha1\nkind: Extension\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\n"
        f"spec: {{type: ExternalAuthorization, externalAuthorization: {{service: {service}, port: {port}}}}}\n"
    )


def custom_policy(name: str, service: str, provider: str, namespace: str = "shop") -> str:
    """All requests to a service, about which an Extension's service is asked."""
    return (
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\n"
        f"spec:\n  targetRefs: [{{group: '', kind: Service, name: {service}}}]\n  action: CUSTOM\n"
        f"  provider: {{name: {provider}}}\n  rules: [{{}}]\n"
    )


def namespace(name: str) -> str:
    return f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n"


def together(*documents: str) -> str:
    return "---\n".join(documents)
