"""Text of resources in YAML -> checked resources, or every error in it with file, line, field and mend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from control.api import labels as label
from control.api.address import AddressError, IpAddress, is_ipv6, parse_address, reason_not_unicast
from control.api.declared import (
    DeclaredEndpoint,
    DeclaredEndpoints,
    DeclaredNamespace,
    DeclaredService,
    DeclaredWorkload,
    Family,
    Resource,
)
from control.api.declared import place_of as place_of  # beside `parse`, since whoever parses goes on to ask it
from control.api.document import Map, Reader, position_of, read_documents
from control.api.extension_api import read_extension
from control.api.gateway_api import read_gateway
from control.api.locality import wrong_locality
from control.api.metadata import (
    MORE_ADDRESSES,
    PROXY_PROTOCOL,
    SAME_HOST,
    UDP,
    read_bindable_metadata,
    read_metadata,
    read_proxy_protocol,
    read_same_host,
    read_udp,
)
from control.api.names import wrong_dns_label, wrong_port_name, wrong_service_name, wrong_subdomain
from control.api.plaintext import PROXY_PORTS
from control.api.policy import parse_port
from control.api.problems import Report, shown
from control.api.records import MAX_WEIGHT
from control.api.request_authentication import read_request_authentication
from control.api.route_api import read_grpc_route, read_http_route, read_reference_grant
from control.api.security import read_authorization_policy, read_peer_authentication
from control.api.traffic_api import read_traffic_policy
from control.api.workload import ServicePort

_MAX_ADDRESSES: Final = 8
_REMOVE: Final = "the mesh carries TCP only; remove the port"
_TCP_ONLY: Final = {"UDP": _REMOVE, "SCTP": _REMOVE}
_NO_UDP: Final = {
    "UDP": f"the mesh carries TCP only; remove the port, or write the annotation {UDP}: plaintext, which lets its "
    "datagrams pass unencrypted",
    "SCTP": _REMOVE,
}


def parse(text: str, file: str) -> list[Resource]:
    """The resources of one file. Raises ResourceErrors with everything that is wrong in it."""
    report = Report()
    resources: list[Resource] = []
    for document in read_documents(text, file, report):
        resource = read_resource(document, file, report)
        if resource is not None:
            resources.append(resource)
        if report.full:
            break
    report.raise_errors()
    return resources


def read_resource(document: Map, file: str, report: Report) -> Resource | None:
    """The resource of one document; None, or one not to be used, when the report got errors."""
    reader = Reader(document, "", position_of(document, file), report)
    version = reader.text("apiVersion", required="the API of the kind, such as v1")
    kind = reader.text("kind", required=f"one of {', '.join(_KINDS)}")
    if not version or not kind:
        return None
    if kind not in _KINDS:
        later = " (not implemented yet)" if kind in _LATER else ""
        reader.error("kind", f"{shown(kind)} is not taken{later}; known: {', '.join(_KINDS)}", (kind, _KINDS))
        return None
    versions, read = _KINDS[kind]
    if version not in versions:
        reader.error("apiVersion", f"{shown(version)} must be {' or '.join(versions)} for a {kind}")
    reader.refuse({"status": "it is what a controller writes; remove it"})
    resource = read(reader)
    reader.finish()
    return resource


def _read_namespace(document: Reader) -> DeclaredNamespace:
    metadata, waypoint = read_bindable_metadata(
        document, wrong_dns_label, namespaced=False, own_annotations=(SAME_HOST,)
    )
    if document.has("spec"):
        document.error("spec", "is refused: only a Kubernetes API server uses it; remove it")
    direct = read_same_host(document, metadata)
    return DeclaredNamespace(metadata.name, metadata.labels, document.position, waypoint, direct)


def _read_service(document: Reader) -> DeclaredService:
    metadata, waypoint = read_bindable_metadata(document, wrong_service_name, own_annotations=(PROXY_PROTOCOL, UDP))
    udp = read_udp(document, metadata)
    spec = document.child("spec", required="a mapping with ports and selector")
    virtual = "only virtual addresses inside the mesh are served; write ClusterIP or remove it"
    spec.choice(
        "type",
        ["ClusterIP"],
        default="ClusterIP",
        others=dict.fromkeys(("NodePort", "LoadBalancer", "ExternalName"), virtual),
    )
    spec.choice("sessionAffinity", ["None"], default="None", others={"ClientIP": "it is not implemented"})
    spec.choice("internalTrafficPolicy", ["Cluster"], default="Cluster", others={"Local": "it is not implemented"})
    if spec.boolean("publishNotReadyAddresses", default=False):
        spec.error("publishNotReadyAddresses", "is refused: it is not implemented; remove it")
    spec.refuse(
        dict.fromkeys(
            (
                "externalIPs",
                "externalName",
                "externalTrafficPolicy",
                "loadBalancerIP",
                "loadBalancerClass",
                "loadBalancerSourceRanges",
                "allocateLoadBalancerNodePorts",
                "healthCheckNodePort",
                "sessionAffinityConfig",
            ),
            "it is not implemented; remove it",
        )
    )
    nearest = spec.choice(
        "trafficDistribution",
        ["PreferClose", "PreferSameZone"],
        default="",
        others={"PreferSameNode": "callers do not compare nodes; write PreferSameZone"},
    )
    cluster_ips, families = _read_cluster_ips(spec)
    ports, datagrams = _read_service_ports(spec, needed=bool(families), udp=udp)

    def port_of(text: str) -> int:
        for port in ports:
            if text in (port.name or None, str(port.port)):
                return port.port
        known = ", ".join(port.name or str(port.port) for port in ports)
        raise ValueError(f"{shown(text)} is no port of this Service; its ports: {known or 'none'}")

    selector = _read_selector(spec)
    if udp and not datagrams and not spec.lost:
        document.error_at(
            f"metadata.annotations[{UDP!r}]", "no port of spec.ports has protocol UDP; give it to one, or remove this"
        )
    if datagrams and selector is None and not spec.lost:
        spec.error("selector", "is missing; the workloads behind a port of protocol UDP are those that it selects")
    service = DeclaredService(
        namespace=metadata.namespace,
        name=metadata.name,
        labels=metadata.labels,
        selector=selector,
        ports=ports,
        cluster_ips=cluster_ips,
        families=families,
        position=document.position,
        waypoint=waypoint,
        proxy_protocol=read_proxy_protocol(document, metadata, port_of),
        datagrams=datagrams,
        prefers_zone=bool(nearest),
    )
    spec.finish()
    return service


def _read_selector(spec: Reader) -> dict[str, str] | None:
    selector = spec.pairs("selector", label.wrong_key, label.wrong_value, most=label.MAX_LABELS)
    if not selector and spec.has("selector"):
        spec.error("selector", "names no label; name one, or remove selector and write an EndpointSlice")
    return selector or None


def _read_service_ports(
    spec: Reader, *, needed: bool, udp: bool
) -> tuple[tuple[ServicePort, ...], dict[int, ServicePort]]:
    """Those of TCP; and those of UDP, by their index among all."""
    readers = spec.children("ports")
    if needed and not spec.has("ports") and not spec.lost:
        spec.error("ports", "is missing; it must be a list such as [{name: http, port: 80, targetPort: 8080}]")
    ports: list[ServicePort] = []
    datagrams: dict[int, ServicePort] = {}
    for index, reader in enumerate(readers):
        protocol, port = _read_service_port(reader, udp=udp)
        alike = datagrams.values() if protocol == "UDP" else ports
        if any(port.port == other.port for other in alike):
            reader.error("port", f"{port.port} stands twice in this Service; remove one")
        if any(port.name == other.name for other in (*ports, *datagrams.values())) and reader.has("name"):
            reader.error("name", f"{shown(port.name)} stands twice in this Service; rename one")
        if not reader.has("name") and len(readers) > 1:
            reader.error("name", "is missing; a Service with several ports must name each")
        if protocol == "UDP":
            datagrams[index] = port
        else:
            ports.append(port)
    return tuple(ports), datagrams


def _read_service_port(reader: Reader, *, udp: bool) -> tuple[str, ServicePort]:
    """Its protocol, and the port."""
    if udp:
        protocol = reader.choice("protocol", ["TCP", "UDP"], default="TCP", others={"SCTP": _REMOVE})
    else:
        protocol = reader.choice("protocol", ["TCP"], default="TCP", others=_NO_UDP)
    reader.refuse({"nodePort": "only virtual addresses inside the mesh are served; remove it"})
    number = reader.integer("port", 1, 65535, required="a number from 1 to 65535")
    port = ServicePort(
        name=reader.text("name", wrong_dns_label),
        port=number,
        target_port=reader.integer_or_text("targetPort", 1, 65535, wrong_port_name, default=number),
        app_protocol=reader.text("appProtocol", label.wrong_key),
    )
    reader.finish()
    return protocol, port


def _read_cluster_ips(spec: Reader) -> tuple[tuple[IpAddress, ...], tuple[Family, ...]]:
    """The addresses that were asked for and the families to have one in; no family for a headless service."""
    first = spec.text("clusterIP")
    listed = spec.parsed_list("clusterIPs", _none_or_address)
    if listed and first and _written(first) != listed[0]:
        spec.error("clusterIPs", f"must begin with clusterIP, {first}")
    policy = spec.choice(
        "ipFamilyPolicy", ["SingleStack", "PreferDualStack", "RequireDualStack"], default="SingleStack"
    )
    families = spec.parsed_list("ipFamilies", _family)
    if first == "None" or "None" in listed:
        return (), ()
    addresses = tuple(IpAddress(text) for text in listed)
    if first and not listed and (address := spec.parsed("clusterIP", _unicast_address)) is not None:
        addresses = (address,)
    return addresses, _families(spec, addresses, families, policy)


def _families(
    spec: Reader, addresses: tuple[IpAddress, ...], declared: tuple[Family, ...], policy: str
) -> tuple[Family, ...]:
    of_addresses = tuple(Family.IPV6 if is_ipv6(address) else Family.IPV4 for address in addresses)
    families = declared or of_addresses or (Family.IPV4,)
    if len(set(of_addresses)) != len(of_addresses):
        spec.error("clusterIPs", "has two addresses of one family; at most one of each is taken")
    if len(set(families)) != len(families):
        spec.error("ipFamilies", "names a family twice; remove one")
    elif of_addresses and declared and families[: len(of_addresses)] != of_addresses:
        field = "clusterIPs" if spec.has("clusterIPs") else "clusterIP"
        spec.error(field, f"is not of the families in ipFamilies: {', '.join(f.value for f in families)}")
    if policy == "SingleStack" and len(families) > 1 and spec.has("ipFamilyPolicy"):
        spec.error("ipFamilyPolicy", "SingleStack has one family, but two are named; write PreferDualStack")
    if policy != "SingleStack" and len(families) == 1:
        families += tuple(family for family in Family if family not in families)
    return families


def _written(text: str) -> str:
    """The canonical address, or the text when it is none (which is reported where it is read)."""
    try:
        return parse_address(text)
    except AddressError:
        return text


def _none_or_address(text: str) -> str:
    return text if text == "None" else _unicast_address(text)


def _unicast_address(text: str, *, loopback: bool = False) -> IpAddress:
    address = parse_address(text)
    if reason := reason_not_unicast(address, loopback=loopback):
        raise AddressError(reason)
    return address


def _family(text: str) -> Family:
    try:
        return Family(text)
    except ValueError:
        raise ValueError(f"{shown(text)} must be IPv4 or IPv6") from None


def _read_workload_entry(document: Reader) -> DeclaredWorkload:
    metadata, waypoint = read_bindable_metadata(
        document, wrong_subdomain, own_annotations=(MORE_ADDRESSES, PROXY_PROTOCOL, SAME_HOST)
    )
    spec = document.child("spec", required="a mapping with address and serviceAccount")
    spec.refuse({"network": "all workloads share one network; remove it"})
    labels = spec.pairs("labels", label.wrong_key, label.wrong_value, most=label.MAX_LABELS)
    for name in labels.keys() & metadata.labels.keys():
        if labels[name] != metadata.labels[name]:
            spec.child("labels").error(name, f"differs from metadata.labels, {metadata.labels[name]!r}; write it once")
    for name in labels.keys() & {label.USE_WAYPOINT, label.USE_WAYPOINT_NAMESPACE} - metadata.labels.keys():
        spec.child("labels").error(name, "belongs in metadata.labels; write it there")
    ports = spec.child("ports")
    for name in ports.names:
        if problem := wrong_dns_label(name):
            ports.error(name, problem)
    numbers = {name: ports.integer(name, 1, 65535) for name in ports.names}

    def port_of(text: str) -> int:
        number = numbers[text] if text in numbers else parse_port(text)
        if number in PROXY_PORTS:
            raise ValueError(f"{number} is the uProxy's own, as all of {PROXY_PORTS[0]} to {PROXY_PORTS[-1]}")
        return number

    workload = DeclaredWorkload(
        namespace=metadata.namespace,
        name=metadata.name,
        labels={**metadata.labels, **labels},
        addresses=_read_addresses(document, spec, metadata.annotations.get(MORE_ADDRESSES, "")),
        ports=numbers,
        service_account=spec.text("serviceAccount", wrong_subdomain, default="default"),
        node={**metadata.labels, **labels}.get(label.NODE, ""),
        weight=spec.integer("weight", 1, MAX_WEIGHT, default=1),
        position=document.position,
        waypoint=waypoint,
        direct=read_same_host(document, metadata),
        proxy_protocol=read_proxy_protocol(document, metadata, port_of),
        locality=spec.text("locality", wrong_locality),
    )
    spec.finish()
    return workload


def _read_addresses(document: Reader, spec: Reader, more: str) -> tuple[IpAddress, ...]:
    first = spec.parsed("address", _workload_address, required="the workload's IP address in the mesh")
    addresses = [] if first is None else [first]
    field = f"metadata.annotations[{MORE_ADDRESSES!r}]"
    for text in more.split(",")[: _MAX_ADDRESSES + 1] if more else ():
        try:
            address = _workload_address(text.strip())
        except AddressError as error:
            document.error_at(field, str(error))
            continue
        if address in addresses:
            document.error_at(field, f"{address} stands twice; remove one")
        addresses.append(address)
    if len(addresses) > _MAX_ADDRESSES:
        document.error_at(field, f"a workload has at most {_MAX_ADDRESSES} addresses")
    return tuple(addresses)


def _workload_address(text: str) -> IpAddress:
    if text.startswith("unix:"):
        raise AddressError("a Unix socket is refused: the mesh carries TCP; write the workload's IP address")
    return _unicast_address(text, loopback=True)


def _read_endpoint_slice(document: Reader) -> DeclaredEndpoints:
    metadata = read_metadata(document, wrong_subdomain)
    service = metadata.labels.get(label.SERVICE_NAME, "")
    if not service:
        field = f"metadata.labels[{label.SERVICE_NAME!r}]"
        document.error_at(field, "is missing; it must name the Service these endpoints belong to")
    family = document.choice(
        "addressType", [f.value for f in Family], default="", others={"FQDN": "write the endpoints' IP addresses"}
    )
    if not document.has("addressType"):
        document.error("addressType", "is missing; it must be IPv4 or IPv6")
    endpoints = tuple(_read_endpoint(reader, family) for reader in document.children("endpoints"))
    return DeclaredEndpoints(
        namespace=metadata.namespace,
        name=metadata.name,
        service=service,
        endpoints=tuple(endpoint for endpoint in endpoints if endpoint is not None),
        ports=_read_slice_ports(document),
        position=document.position,
    )


def _read_endpoint(reader: Reader, family: str) -> DeclaredEndpoint | None:
    addresses = reader.parsed_list("addresses", _workload_address)
    if not reader.has("addresses"):
        reader.error("addresses", "is missing; it must be a list of one IP address")
    elif len(addresses) > 1:
        reader.error("addresses", "has several; all but the first mean nothing: write one endpoint for each")
    for address in addresses:
        if family and is_ipv6(address) != (family == Family.IPV6.value):
            reader.error("addresses", f"{address} is not {family}, which addressType says; write another EndpointSlice")
    conditions = reader.child("conditions")
    ready = conditions.boolean("ready", default=True)
    conditions.boolean("serving", default=ready)  # of a terminating endpoint, which takes no new connection here
    terminating = conditions.boolean("terminating", default=False)
    conditions.finish()
    reader.refuse(
        dict.fromkeys(("hostname", "zone", "hints", "deprecatedTopology"), "it is not implemented; remove it")
    )
    reader.text("nodeName", wrong_subdomain)  # the workload's own node label says it to us
    target = _read_target(reader.child("targetRef")) if reader.has("targetRef") else ""
    reader.finish()
    if not addresses:
        return None
    return DeclaredEndpoint(addresses[0], ready and not terminating, target, reader.path("addresses") + "[0]")


def _read_target(reader: Reader) -> str:
    kind = "endpoints are workloads that a WorkloadEntry declares; write WorkloadEntry"
    reader.choice("kind", ["WorkloadEntry"], default="", others={"Pod": kind, "Node": kind})
    if not reader.has("kind") and not reader.lost:
        reader.error("kind", "is missing; it must be WorkloadEntry")
    reader.text("apiVersion")
    reader.text("namespace", wrong_dns_label)
    name = reader.text("name", wrong_subdomain, required="the name of a WorkloadEntry of this namespace")
    reader.finish()
    return name


def _read_slice_ports(document: Reader) -> dict[str, int]:
    ports: dict[str, int] = {}
    if not document.has("ports"):
        document.error("ports", "is missing; it must be a list such as [{name: http, port: 8080}]")
    for reader in document.children("ports"):
        reader.choice("protocol", ["TCP"], default="TCP", others=_TCP_ONLY)
        name = reader.text("name", lambda text: text and wrong_dns_label(text))
        if name in ports:
            reader.error("name", f"{shown(name)} stands twice in this EndpointSlice; rename one")
        ports[name] = reader.integer("port", 1, 65535, required="a number from 1 to 65535")
        reader.text("appProtocol", label.wrong_key)
        reader.finish()
    return ports


_ISTIO_NETWORKING: Final = ("networking.istio.io/v1", "networking.istio.io/v1beta1")
_ISTIO_SECURITY: Final = ("security.istio.io/v1", "security.istio.io/v1beta1")
_KINDS: Final[dict[str, tuple[tuple[str, ...], Callable[[Reader], Resource]]]] = {
    "Service": (("v1",), _read_service),
    "Namespace": (("v1",), _read_namespace),
    "WorkloadEntry": (_ISTIO_NETWORKING, _read_workload_entry),
    "EndpointSlice": (("discovery.k8s.io/v1",), _read_endpoint_slice),
    "AuthorizationPolicy": (_ISTIO_SECURITY, read_authorization_policy),
    "PeerAuthentication": (_ISTIO_SECURITY, read_peer_authentication),
    "RequestAuthentication": (_ISTIO_SECURITY, read_request_authentication),
    "TrafficPolicy": (("mesh.uproxy.dev/v1alpha1",), read_traffic_policy),
    "Extension": (("mesh.uproxy.dev/v1alpha1",), read_extension),
    "Gateway": (("gateway.networking.k8s.io/v1",), read_gateway),
    "HTTPRoute": (("gateway.networking.k8s.io/v1",), read_http_route),
    "GRPCRoute": (("gateway.networking.k8s.io/v1",), read_grpc_route),
    "ReferenceGrant": (("gateway.networking.k8s.io/v1", "gateway.networking.k8s.io/v1beta1"), read_reference_grant),
}
_LATER: Final = ("ServiceEntry",)
