"""Resources from YAML: each kind read in full, each bad input refused by file, line, field and mend."""

from __future__ import annotations

import pytest

from control.api.declared import (
    DeclaredEndpoint,
    DeclaredEndpoints,
    DeclaredNamespace,
    DeclaredPeerAuthentication,
    DeclaredPolicy,
    DeclaredService,
    DeclaredWorkload,
    Family,
)
from control.api.problems import Position, ResourceErrors
from control.api.resources import parse
from control.api.workload import ServicePort

HERE = Position("", 0, {})

SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {team: blue}, annotations: {prometheus.io/scrape: "true"}}
spec:
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: http, protocol: TCP, appProtocol: kubernetes.io/h2c}
  - {name: raw, port: 81}
"""
WORKLOAD = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: web-1
  namespace: shop
  labels: {app: web, kubernetes.io/hostname: host-a}
  annotations: {mesh.uproxy.dev/addresses: "fd00::1, 10.0.0.2"}
spec:
  address: 10.0.0.1
  serviceAccount: web
  ports: {http: 8080}
  labels: {version: v1}
  weight: 3
"""
SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-a, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports:
- {name: http, port: 8080, protocol: TCP}
endpoints:
- addresses: [10.0.0.1]
  conditions: {ready: true, serving: true, terminating: false}
  targetRef: {kind: WorkloadEntry, name: web-1, namespace: shop, apiVersion: networking.istio.io/v1}
- addresses: [10.0.0.2]
  conditions: {ready: false}
- addresses: [10.0.0.3]
  conditions: {terminating: true}
"""
NAMESPACE = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {team: blue}}\n"
POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec: {}
"""


def errors_of(text):
    with pytest.raises(ResourceErrors) as caught:
        parse(text, "f.yaml")
    assert str(caught.value) == "\n".join(map(str, caught.value.errors))
    return [str(error) for error in caught.value.errors]


def one(text):
    (resource,) = parse(text, "f.yaml")
    return resource


BEACON = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, annotations: {mesh.uproxy.dev/udp: plaintext}}
spec:
  selector: {app: web}
  ports:
  - {name: dns-udp, port: 53, targetPort: dns, protocol: UDP}
  - {name: dns, port: 53, targetPort: dns}
  - {name: beacon, port: 54, protocol: UDP}
"""


def test_ports_of_udp_stand_apart_with_their_places():
    service = one(BEACON)
    assert service.ports == (ServicePort("dns", 53, "dns", ""),)
    assert service.datagrams == {0: ServicePort("dns-udp", 53, "dns", ""), 2: ServicePort("beacon", 54, 54, "")}
    assert list(service.indexed_ports()) == [(1, service.ports[0])]


def test_a_service_may_have_ports_of_udp_alone():
    assert one("".join(line for line in BEACON.splitlines(True) if "name: dns," not in line)).ports == ()


def test_a_service():
    assert one(SERVICE) == DeclaredService(
        namespace="shop",
        name="web",
        labels={"team": "blue"},
        selector={"app": "web"},
        ports=(ServicePort("http", 80, "http", "kubernetes.io/h2c"), ServicePort("raw", 81, 81, "")),
        cluster_ips=(),
        families=(Family.IPV4,),
        position=HERE,
    )


@pytest.mark.parametrize("said", ["PreferClose", "PreferSameZone"])
def test_a_service_whose_callers_prefer_their_own_zone(said):
    assert one(SERVICE.replace("spec:\n", f"spec:\n  trafficDistribution: {said}\n")).prefers_zone
    assert not one(SERVICE).prefers_zone


@pytest.mark.parametrize(
    ("fields", "addresses", "families"),
    [
        ("clusterIP: 10.9.0.1", ("10.9.0.1",), (Family.IPV4,)),
        ("clusterIP: ''", (), (Family.IPV4,)),
        ("clusterIP: FD00::9", ("fd00::9",), (Family.IPV6,)),
        ("clusterIP: None", (), ()),
        ("clusterIPs: [None]", (), ()),
        (
            "clusterIP: fd00::9\n  clusterIPs: ['fd00:0::9', 10.9.0.1]",
            ("fd00::9", "10.9.0.1"),
            (Family.IPV6, Family.IPV4),
        ),
        ("ipFamilies: [IPv6]", (), (Family.IPV6,)),
        ("ipFamilies: [IPv6, IPv4]", (), (Family.IPV6, Family.IPV4)),
        ("ipFamilyPolicy: PreferDualStack", (), (Family.IPV4, Family.IPV6)),
        ("ipFamilyPolicy: RequireDualStack\n  clusterIP: fd00::9", ("fd00::9",), (Family.IPV6, Family.IPV4)),
        ("ipFamilyPolicy: SingleStack\n  ipFamilies: [IPv6]", (), (Family.IPV6,)),
    ],
)
def test_the_virtual_addresses_a_service_asks_for(fields, addresses, families):
    service = one(f"{SERVICE}  {fields}\n")
    assert (service.cluster_ips, service.families) == (addresses, families)


def test_a_headless_service_needs_no_ports():
    text = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {clusterIP: None, selector: {app: web}}\n"
    assert (one(text).namespace, one(text).ports) == ("default", ())


def test_a_workload_entry():
    assert one(WORKLOAD) == DeclaredWorkload(
        namespace="shop",
        name="web-1",
        labels={"app": "web", "kubernetes.io/hostname": "host-a", "version": "v1"},
        addresses=("10.0.0.1", "fd00::1", "10.0.0.2"),
        ports={"http": 8080},
        service_account="web",
        node="host-a",
        weight=3,
        position=HERE,
    )


def test_a_workload_entry_with_little():
    text = "apiVersion: networking.istio.io/v1beta1\nkind: WorkloadEntry\nmetadata: {name: a}\n"
    text += "spec: {address: '::ffff:10.0.0.1'}\n"
    workload = one(text)
    assert (workload.namespace, workload.service_account, workload.weight) == ("default", "default", 1)
    assert (workload.addresses, workload.ports, workload.node) == (("10.0.0.1",), {}, "")


def test_a_workload_may_be_on_loopback_and_so_may_its_endpoint():
    assert one(replaced(WORKLOAD, "10.0.0.1", "127.0.0.5")).addresses[0] == "127.0.0.5"
    assert one(replaced(SLICE, "10.0.0.1", "127.0.0.5")).endpoints[0].address == "127.0.0.5"


def test_an_endpoint_slice():
    found = one(SLICE)
    assert found == DeclaredEndpoints(
        namespace="shop",
        name="web-a",
        service="web",
        endpoints=(
            DeclaredEndpoint("10.0.0.1", True, "web-1", "endpoints[0].addresses[0]"),
            DeclaredEndpoint("10.0.0.2", False, "", "endpoints[1].addresses[0]"),
            DeclaredEndpoint("10.0.0.3", False, "", "endpoints[2].addresses[0]"),
        ),
        ports={"http": 8080},
        position=HERE,
    )
    assert found.position.error("endpoints[1].addresses[0]", "").line == 11


def test_a_namespace():
    assert one(NAMESPACE) == DeclaredNamespace("shop", {"team": "blue"}, HERE)


def test_many_documents_in_one_file():
    text = "---\n".join(
        [NAMESPACE, SERVICE, WORKLOAD, SLICE, POLICY, POLICY.replace("AuthorizationPolicy", "PeerAuthentication")]
    )
    assert [type(resource) for resource in parse(text, "f.yaml")] == [
        DeclaredNamespace,
        DeclaredService,
        DeclaredWorkload,
        DeclaredEndpoints,
        DeclaredPolicy,
        DeclaredPeerAuthentication,
    ]


def replaced(text, old, new):
    assert text.count(old) == 1, old
    return text.replace(old, new)


S, W, E, N = SERVICE, WORKLOAD, SLICE, NAMESPACE


@pytest.mark.parametrize(
    ("text", "old", "new", "expected"),
    [
        # the document
        (S, "apiVersion: v1\n", "", "f.yaml:1: apiVersion: is missing; it must be the API of the kind, such as v1"),
        (S, "kind: Service\n", "", "f.yaml:1: kind: is missing; it must be one of Service, Namespace,"),
        (S, "kind: Service", "kind: Sevice", "f.yaml:2: kind: 'Sevice' is not taken; known: Service, Namespace"),
        (
            S,
            "kind: Service",
            "kind: ServiceEntry",
            "f.yaml:2: kind: 'ServiceEntry' is not taken (not implemented yet)",
        ),
        (
            S,
            "spec:\n",
            "spec:\n  trafficDistribution: PreferSameNode\n",
            "f.yaml:5: spec.trafficDistribution: PreferSameNode is refused: callers do not compare nodes",
        ),
        (S, "apiVersion: v1", "apiVersion: v2", "f.yaml:1: apiVersion: 'v2' must be v1 for a Service"),
        (S, "spec:", "status: {}\nspec:", "f.yaml:4: status: is refused: it is what a controller writes; remove it"),
        (
            S,
            "spec:",
            "specs:",
            "f.yaml:4: specs: unknown field; known here: apiVersion, kind, metadata, spec (did you mean 'spec'?)",
        ),
        # metadata
        (S, "name: web,", "name: Web,", "f.yaml:3: metadata.name: 'Web' must be 1-63 of a-z"),
        (S, "name: web,", "name: 1web,", "f.yaml:3: metadata.name: '1web' must be"),
        (S, "{name: web, ", "{", "f.yaml:3: metadata.name: is missing; it must be the resource's name"),
        (S, "namespace: shop", "namespace: shop.x", "f.yaml:3: metadata.namespace: 'shop.x' must be"),
        (
            S,
            "namespace: shop",
            "namepsace: shop",
            "metadata.namepsace: unknown field; known here: annotations, labels, name, namespace (did you",
        ),
        (S, "namespace: shop", "uid: x", "metadata.uid: is refused: a Kubernetes API server writes it; remove it"),
        (S, "{team: blue}", "{-team: blue}", "f.yaml:3: metadata.labels.-team: '-team': a label's name must be"),
        (S, "{team: blue}", "{team: a b}", "f.yaml:3: metadata.labels.team: 'a b': a label's value must be"),
        (S, "{team: blue}", "{team: 7}", "metadata.labels.team: must be text, not the number 7; write it in quotes"),
        (S, "{team: blue}", "[team]", "f.yaml:3: metadata.labels: must be a mapping, not a list"),
        (
            S,
            "{team: blue}",
            "{istio.io/use-waypoint: W}",
            "metadata.labels['istio.io/use-waypoint']: 'W' must be 1-253",
        ),
        (
            N,
            "{team: blue}",
            "{istio.io/dataplane-mode: none}",
            "metadata.labels['istio.io/dataplane-mode']: is refused",
        ),
        (N, "{team: blue}", "{team: blue}, annotations: {mesh.uproxy.dev/udp: plaintext}", "it is said of a Service"),
        (S, "prometheus.io/scrape", "mesh.uproxy.dev/usp", "annotations['mesh.uproxy.dev/usp']: unknown annotation"),
        (
            S,
            "prometheus.io/scrape",
            "mesh.uproxy.dev/addresses",
            "known for this kind: mesh.uproxy.dev/proxy-protocol, mesh.uproxy.dev/udp, mesh.uproxy.dev/waypoint",
        ),
        (S, "prometheus.io/scrape", "istio.io/dry-run", "it is said of an AuthorizationPolicy"),
        (S, "prometheus.io/scrape", "traffic.sidecar.istio.io/excludeOutboundPorts", "cannot be narrowed"),
        (
            N,
            "{name: shop",
            "{namespace: x, name: shop",
            "metadata.namespace: is refused: this kind belongs to no namesp",
        ),
        (N, "metadata", "spec: {finalizers: [kubernetes]}\nmetadata", "f.yaml:3: spec: is refused"),
        # Service
        (
            BEACON,
            "plaintext",
            "maybe",
            "f.yaml:3: metadata.annotations['mesh.uproxy.dev/udp']: 'maybe' must be plaintext or refused",
        ),
        (
            BEACON,
            "plaintext",
            "refused",
            "spec.ports[0].protocol: UDP is refused: the mesh carries TCP only; remove the port, or write the an",
        ),
        (BEACON, "port: 54", "port: 53", "f.yaml:9: spec.ports[2].port: 53 stands twice in this Service; remove one"),
        (BEACON, "name: beacon", "name: dns", "f.yaml:9: spec.ports[2].name: 'dns' stands twice in this Service"),
        (BEACON, "port: 54, protocol: UDP", "port: 54, protocol: SCTP", "spec.ports[2].protocol: SCTP is refused"),
        (
            BEACON,
            "  selector: {app: web}\n",
            "",
            "spec.selector: is missing; the workloads behind a port of protocol UDP are those that it selects",
        ),
        (
            S,
            'prometheus.io/scrape: "true"',
            "mesh.uproxy.dev/udp: plaintext",
            "metadata.annotations['mesh.uproxy.dev/udp']: no port of spec.ports has protocol UDP; give it to one",
        ),
        (S, "port: 80,", "port: 0,", "f.yaml:7: spec.ports[0].port: 0 is out of range: 1 to 65535"),
        (
            S,
            "port: 80,",
            "port: '80',",
            "f.yaml:7: spec.ports[0].port: must be a number from 1 to 65535, not the text '80'",
        ),
        (S, "port: 80,", "prot: 80,", "f.yaml:7: spec.ports[0].port: is missing; it must be a number"),
        (S, "port: 81", "port: 80", "f.yaml:8: spec.ports[1].port: 80 stands twice in this Service; remove one"),
        (S, "name: raw", "name: http", "f.yaml:8: spec.ports[1].name: 'http' stands twice in this Service; rename one"),
        (S, "name: raw, ", "", "f.yaml:8: spec.ports[1].name: is missing; a Service with several ports must name each"),
        (S, "targetPort: http", "targetPort: 70000", "spec.ports[0].targetPort: 70000 is out of range"),
        (S, "targetPort: http", "targetPort: '80'", "spec.ports[0].targetPort: '80' must be 1-15 of a-z"),
        (S, "protocol: TCP", "protocol: UDP", "spec.ports[0].protocol: UDP is refused: the mesh carries TCP only"),
        (S, "protocol: TCP", "nodePort: 30000", "spec.ports[0].nodePort: is refused"),
        (S, "{app: web}", "{}", "f.yaml:5: spec.selector: names no label"),
        (S, "{app: web}", "web", "f.yaml:5: spec.selector: must be a mapping, not the text 'web'"),
        (
            S,
            "  selector: {app: web}",
            "  type: LoadBalancer",
            "spec.type: LoadBalancer is refused: only virtual addresses",
        ),
        (
            S,
            "  selector: {app: web}",
            "  externalIPs: [1.2.3.4]",
            "spec.externalIPs: is refused: it is not implemented",
        ),
        (S, "  selector: {app: web}", "  sessionAffinity: ClientIP", "spec.sessionAffinity: ClientIP is refused"),
        (S, "  selector: {app: web}", "  publishNotReadyAddresses: true", "spec.publishNotReadyAddresses: is refused"),
        (
            S,
            "  selector: {app: web}",
            "  clusterIP: 10.0.0",
            "spec.clusterIP: '10.0.0' is not an IP address (such as 10.0",
        ),
        (S, "  selector: {app: web}", "  clusterIP: 127.0.0.1", "spec.clusterIP: 127.0.0.1 is a loopback address"),
        (
            S,
            "  selector: {app: web}",
            "  clusterIPs: [10.0.0.1, 10.0.0.2]",
            "spec.clusterIPs: has two addresses of one fam",
        ),
        (S, "  selector: {app: web}", "  {clusterIP: 10.0.0.1, clusterIPs: [10.0.0.2]}", "not valid YAML"),
        (S, "  selector: {app: web}", "  clusterIP: 10.0.0.1\n  clusterIPs: [10.0.0.2]", "must begin with clusterIP"),
        (
            S,
            "  selector: {app: web}",
            "  clusterIP: 10.0.0.1\n  ipFamilies: [IPv6]",
            "clusterIP: is not of the families in",
        ),
        (S, "  selector: {app: web}", "  ipFamilies: [IPv5]", "spec.ipFamilies[0]: 'IPv5' must be IPv4 or IPv6"),
        (S, "  selector: {app: web}", "  ipFamilies: [IPv4, IPv4]", "spec.ipFamilies: names a family twice"),
        (
            S,
            "  selector: {app: web}",
            "  ipFamilies: [IPv4, IPv6]\n  ipFamilyPolicy: SingleStack",
            "has one family, but two",
        ),
        # WorkloadEntry
        (
            W,
            "  address: 10.0.0.1\n",
            "",
            "f.yaml:8: spec.address: is missing; it must be the workload's IP address in the",
        ),
        (W, "address: 10.0.0.1", "address: web.example", "f.yaml:9: spec.address: 'web.example' is not an IP address"),
        (W, "address: 10.0.0.1", "address: unix:///x", "f.yaml:9: spec.address: a Unix socket is refused"),
        (W, "address: 10.0.0.1", "address: 0.0.0.0", "f.yaml:9: spec.address: 0.0.0.0 is unspecified"),
        (
            W,
            "fd00::1, 10.0.0.2",
            "fd00::1, x",
            "f.yaml:7: metadata.annotations['mesh.uproxy.dev/addresses']: 'x' is not",
        ),
        (W, "fd00::1, 10.0.0.2", "10.0.0.1", "10.0.0.1 stands twice; remove one"),
        (W, "fd00::1, 10.0.0.2", ",".join(f"10.1.0.{n}" for n in range(9)), "a workload has at most 8 addresses"),
        (W, "serviceAccount: web", "serviceAccount: Web", "f.yaml:10: spec.serviceAccount: 'Web' must be"),
        (W, "{http: 8080}", "{http: 80800}", "f.yaml:11: spec.ports.http: 80800 is out of range"),
        (W, "{http: 8080}", "{HTTP: 8080}", "f.yaml:11: spec.ports.HTTP: 'HTTP' must be"),
        (
            W,
            "{version: v1}",
            "{app: x}",
            "f.yaml:12: spec.labels.app: differs from metadata.labels, 'web'; write it once",
        ),
        (W, "weight: 3", "weight: 0", "f.yaml:13: spec.weight: 0 is out of range: 1 to 65535"),
        (W, "weight: 3", "network: net1", "f.yaml:13: spec.network: is refused: all workloads share one network"),
        (W, "weight: 3", "locality: a//b", "f.yaml:13: spec.locality: must be a region, region/zone"),
        (
            W,
            "networking.istio.io/v1",
            "networking.istio.io/v1alpha3",
            "must be networking.istio.io/v1 or networking.ist",
        ),
        # EndpointSlice
        (
            E,
            "kubernetes.io/service-name: web",
            "",
            "kubernetes.io/service-name']: is missing; it must name the Service",
        ),
        (E, "addressType: IPv4\n", "", "addressType: is missing; it must be IPv4 or IPv6"),
        (
            E,
            "addressType: IPv4",
            "addressType: FQDN",
            "f.yaml:4: addressType: FQDN is refused: write the endpoints' IP",
        ),
        (E, "[10.0.0.1]", "[10.0.0.1, 10.0.0.9]", "f.yaml:8: endpoints[0].addresses: has several"),
        (
            E,
            "[10.0.0.1]",
            "['fd00::1']",
            "f.yaml:8: endpoints[0].addresses: fd00::1 is not IPv4, which addressType says",
        ),
        (E, "addresses: [10.0.0.1]\n  ", "", "endpoints[0].addresses: is missing"),
        (E, "{ready: false}", "{ready: maybe}", "f.yaml:12: endpoints[1].conditions.ready: must be true or false"),
        (
            E,
            "{ready: false}",
            "{raedy: false}",
            "raedy: unknown field; known here: ready, serving, terminating (did you mean 'ready'?)",
        ),
        (
            E,
            "kind: WorkloadEntry, ",
            "kind: Pod, ",
            "endpoints[0].targetRef.kind: Pod is refused: endpoints are workload",
        ),
        (E, "kind: WorkloadEntry, ", "", "endpoints[0].targetRef.kind: is missing"),
        (E, "  conditions: {ready: false}", "  zone: a", "endpoints[1].zone: is refused"),
        (E, "port: 8080, protocol: TCP}", "protocol: TCP}", "f.yaml:6: ports[0].port: is missing"),
        (E, "port: 8080, protocol: TCP}", "port: 8080, protocol: UDP}", "f.yaml:6: ports[0].protocol: UDP is refused"),
        (E, "ports:\n- {name: http, port: 8080, protocol: TCP}\n", "", "ports: is missing; it must be a list"),
        (
            E,
            "port: 8080, protocol: TCP}",
            "port: 1}\n- {name: http, port: 2}",
            "f.yaml:7: ports[1].name: 'http' stands twice",
        ),
    ],
)
def test_each_bad_input_is_refused_with_its_place_and_its_mend(text, old, new, expected):
    found = errors_of(replaced(text, old, new))
    assert [error for error in found if expected in error], found


def test_all_errors_of_a_file_come_at_once_in_their_order():
    text = (
        SERVICE
        + "---\n"
        + WORKLOAD.replace("address: 10.0.0.1", "address: x").replace("weight", "wieght")
        + "---\na: *b\n"
    )
    found = errors_of(text.replace("port: 81", "port: 99999"))
    assert [error.split(": ")[0:2] for error in found] == [
        ["f.yaml:8", "spec.ports[1].port"],
        ["f.yaml:18", "spec.address"],
        ["f.yaml:22", "spec.wieght"],
        ["f.yaml:24", "the alias *b is not taken"],
    ]


def test_a_service_without_ports_is_refused():
    text = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}}\n"
    assert errors_of(text) == [
        "f.yaml:4: spec.ports: is missing; it must be a list such as [{name: http, port: 80, targetPort: 8080}]"
    ]


def test_a_missing_spec_or_metadata_is_one_error_each():
    assert len(errors_of("apiVersion: v1\nkind: Service\n")) == 2
    assert len(errors_of("apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nspec: x\nmetadata: y\n")) == 2
