"""The mesh as a whole: references, virtual addresses, warnings, and records that give the same mesh back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api import messages, resources, vips
from control.api.address import IpAddress
from control.api.declared import Family
from control.api.index import ResidentService, ResidentWorkload
from control.api.labels import selects
from control.api.mesh import Elsewhere, Mesh
from control.api.messages import Envelope
from control.api.problems import ResourceErrors
from control.api.workload import Endpoint, Workload
from control.client.state import State

SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, labels: {team: blue}}
spec:
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: main}
  - {name: raw, port: 81, targetPort: 9000}
"""
WORKLOAD = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec: {address: 10.0.0.1, serviceAccount: web, ports: {main: 8080}, weight: 2}
"""
SECOND = WORKLOAD.replace("web-1", "web-2").replace("10.0.0.1", "10.0.0.2").replace("{main: 8080}", "{main: 1, raw: 2}")
SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-a, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 7070}]
endpoints: [{addresses: [10.0.0.1], conditions: {ready: false}}]
"""
POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]}]
"""
PEER = POLICY.replace("AuthorizationPolicy", "PeerAuthentication").split("  rules")[0]
NAMESPACE = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n"


def build(*texts, **options):
    return Mesh.build(resources.parse("---\n".join(texts), "f.yaml"), "cluster.local", **options)


def errors_of(*texts):
    with pytest.raises(ResourceErrors) as caught:
        build(*texts)
    return [str(error).removeprefix("f.yaml:") for error in caught.value.errors]


def warnings_of(*texts):
    return [str(warning).removeprefix("f.yaml:") for warning in build(*texts).warnings]


def state_of(mesh):
    state = State("cluster.local")
    state.apply([(topic, messages.encode(Envelope(1, 1, 0, body))) for topic, body in mesh.records().items()])
    return state


def assert_same(state, mesh):
    assert sorted(state.services(), key=lambda s: s.key) == list(mesh.services)
    assert sorted(state.workloads(), key=lambda w: w.key) == list(mesh.workloads)
    endpoints = [e for service in mesh.services for e in state.endpoints(service.key)]
    assert sorted(endpoints, key=lambda e: (e.service, e.workload)) == list(mesh.endpoints)
    assert {p.key: p for w in mesh.workloads for p in state.policies_for(w)} == {p.key: p for p in mesh.policies}


def test_a_whole_mesh_survives_its_records():
    mesh = build(NAMESPACE, SERVICE, WORKLOAD, SECOND, SLICE, POLICY, PEER)
    assert mesh.warnings == ()
    assert_same(state_of(mesh), mesh)
    assert mesh.peer_authentications[0].selector == {"app": "web"}
    identity = mesh.workloads[0].identity
    assert str(identity) == "spiffe://cluster.local/ns/shop/sa/web"
    assert mesh.endpoints == (
        Endpoint("shop/web", "shop/web-1", IpAddress("10.0.0.1"), identity, {80: 7070}, 2, False, {"app": "web"}),
        Endpoint("shop/web", "shop/web-2", IpAddress("10.0.0.2"), identity, {80: 1, 81: 2}, 2, True, {"app": "web"}),
    )


@st.composite
def meshes(draw):
    """Texts of a mesh that holds together."""
    texts = []
    addresses = draw(st.lists(st.integers(1, 250), unique=True, min_size=1, max_size=6))
    for number in addresses:
        app, namespace = draw(st.sampled_from(["a", "b"])), draw(st.sampled_from(["shop", "bank"]))
        more = f", annotations: {{mesh.uproxy.dev/addresses: 'fd00::{number:x}'}}" if draw(st.booleans()) else ""
        texts.append(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n"
            f"metadata: {{name: w{number}, namespace: {namespace}, labels: {{app: {app}}}{more}}}\n"
            f"spec: {{address: 10.0.0.{number}, serviceAccount: {app}, ports: {{http: {8000 + number}}}}}\n"
        )
    for name in draw(st.lists(st.sampled_from(["s1", "s2", "s3"]), unique=True)):
        for namespace in draw(st.lists(st.sampled_from(["shop", "bank"]), unique=True)):
            family = draw(st.sampled_from(["[IPv4]", "[IPv6]", "[IPv6, IPv4]"]))
            texts.append(
                f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n"
                f"  selector: {{app: {draw(st.sampled_from(['a', 'b']))}}}\n  ipFamilies: {family}\n"
                f"  ports: [{{port: 80, targetPort: {draw(st.sampled_from(['http', '9000']))}}}]\n"
            )
    return draw(st.permutations(texts))


@given(meshes())
def test_any_mesh_survives_its_records_and_the_order_of_its_files_means_nothing(texts):
    mesh = build(*texts)
    assert_same(state_of(mesh), mesh)
    backwards = build(*reversed(texts))
    assert mesh.records() == backwards.records()
    addresses = [a for w in mesh.workloads for a in w.addresses] + [v for s in mesh.services for v in s.vips]
    assert len(set(addresses)) == len(addresses)


@given(meshes())
def test_endpoints_are_the_selected_workloads_by_a_naive_join(texts):
    declared = resources.parse("---\n".join(texts), "f.yaml")
    mesh = Mesh.build(declared, "cluster.local")
    expected = {
        (service.key, workload.key): workload.addresses[0]
        for service in declared
        if hasattr(service, "selector")
        for workload in mesh.workloads
        if workload.namespace == service.namespace and workload.labels["app"] == service.selector["app"]
    }
    assert {(e.service, e.workload): e.address for e in mesh.endpoints} == expected


def holders_of(mesh, *, outside):
    """What `Elsewhere` says of a mesh to whoever builds one of its namespaces alone."""
    addresses = {a: f"WorkloadEntry {w.key}" for w in mesh.workloads if w.namespace != outside for a in w.addresses}
    addresses |= {a: f"Service {s.key}" for s in mesh.services if s.namespace != outside for a in s.vips}
    return Elsewhere(
        addresses=addresses,
        principals=frozenset(w.identity.principal for w in mesh.workloads if w.namespace != outside),
        vips=mesh.vips,
        selects=lambda labels: any(selects(labels, w.labels) for w in mesh.workloads if w.namespace != outside),
    )


ROOT_POLICY = POLICY.replace("namespace: shop", "namespace: mesh-system").replace("app: web", "app: a")


@given(meshes())
def test_each_namespace_built_alone_is_that_part_of_the_whole(texts):
    declared = resources.parse("---\n".join([*texts, ROOT_POLICY]), "f.yaml")
    whole = Mesh.build(declared, "cluster.local")
    records, residents, warnings = {}, {}, []
    for namespace in ("shop", "bank", "mesh-system"):
        mine = [resource for resource in declared if resources.place_of(resource)[1] == namespace]
        part = Mesh.build(mine, "cluster.local", elsewhere=holders_of(whole, outside=namespace))
        records |= part.records()
        residents |= part.residents()
        warnings += part.warnings
    assert records == whole.records()
    assert residents == whole.residents()
    assert sorted(warnings) == sorted(whole.warnings)


@given(meshes())
def test_everybody_with_an_address_is_a_resident(texts):
    mesh = build(*texts)
    expected = {a: ResidentService(s.namespace, s.name, (80,)) for s in mesh.services for a in s.vips}
    for w in mesh.workloads:
        expected |= dict.fromkeys(w.addresses, ResidentWorkload(w.namespace, w.name, w.service_account, w.labels))
    assert mesh.residents() == expected


@given(meshes())
def test_whoever_is_an_endpoint_may_serve_and_nobody_else(texts):
    mesh = build(*texts)
    for service in mesh.services:
        serving = {e.identity for e in mesh.endpoints if e.service == service.key}
        assert service.identities == tuple(sorted(serving))


BEACON = """\
apiVersion: v1
kind: Service
metadata: {name: beacon, namespace: shop, annotations: {mesh.uproxy.dev/udp: plaintext}}
spec:
  clusterIP: 10.9.0.1
  selector: {app: web}
  ports:
  - {name: web, port: 80, targetPort: 9000}
  - {name: beacon, port: 53, targetPort: beacon, protocol: UDP}
"""
BEACON_AT_WORKLOAD = WORKLOAD.replace("{main: 8080}", "{main: 8080, beacon: 5353}")


def test_datagrams_go_to_the_ports_of_a_service_and_those_of_whom_it_selects():
    mesh = build(BEACON, BEACON_AT_WORKLOAD, SECOND.replace("app: web", "app: other"))
    assert mesh.residents() == {
        "10.9.0.1": ResidentService("shop", "beacon", (80,), datagrams=(53,)),
        "10.0.0.1": ResidentWorkload("shop", "web-1", "web", {"app": "web"}, datagrams=(5353,)),
        "10.0.0.2": ResidentWorkload("shop", "web-2", "web", {"app": "other"}),
    }
    (service,), (endpoint,) = mesh.services, mesh.endpoints
    assert [port.port for port in service.ports] == [80]
    assert endpoint.ports == {80: 9000}


def test_ports_for_datagrams_of_several_services_are_all_those_of_a_workload():
    other = BEACON.replace("name: beacon, namespace", "name: more, namespace").replace("10.9.0.1", "10.9.0.2")
    other = other.replace("{name: beacon, port: 53, targetPort: beacon", "{name: more, port: 53")
    assert build(BEACON, other, BEACON_AT_WORKLOAD).datagrams == {"shop/web-1": (53, 5353)}


def test_without_the_annotation_nothing_is_said_of_datagrams():
    assert (build(SERVICE, WORKLOAD).datagrams, build(SERVICE, WORKLOAD).virtual_datagrams) == ({}, {})


def test_residents_have_the_labels_that_telemetry_shows():
    labelled = WORKLOAD.replace("{app: web}", "{app: web, version: '', team: blue}")
    assert build(labelled).residents() == {"10.0.0.1": ResidentWorkload("shop", "web-1", "web", {"app": "web"})}


def vips_of(*texts, **elsewhere):
    mesh = Mesh.build(resources.parse("---\n".join(texts), "f.yaml"), "cluster.local", elsewhere=Elsewhere(**elsewhere))
    assert {mesh.vips[key] for key in mesh.vips} <= {vip for service in mesh.services for vip in service.vips}
    return {service.name: service.vips for service in mesh.services}


DB = SERVICE.replace("name: web,", "name: db,")
HEADLESS = SERVICE.replace("spec:", "spec:\n  clusterIP: None")


def test_a_service_keeps_the_address_it_was_given():
    kept = {("shop/web", Family.IPV4): IpAddress("240.240.7.7"), ("shop/gone", Family.IPV4): IpAddress("240.240.7.8")}
    assert vips_of(SERVICE, WORKLOAD, vips=kept) == {"web": ("240.240.7.7",)}
    assert vips_of(HEADLESS, WORKLOAD, vips=kept) == {"web": ()}
    asking = SERVICE.replace("spec:", "spec:\n  clusterIP: 240.240.9.9")
    assert vips_of(asking, WORKLOAD, vips=kept) == {"web": ("240.240.9.9",)}
    # Nobody else is given it, even where its name leads there.
    first = vips.allocate("shop/db", Family.IPV4, ())
    assert vips_of(SERVICE, DB, WORKLOAD, vips={("shop/web", Family.IPV4): first})["web"] == (first,)
    taken = {vips.allocate("shop/web", Family.IPV4, ()): "Service bank/web"}
    assert vips_of(SERVICE, WORKLOAD, addresses=taken)["web"] not in ((), tuple(taken))
    # An address that another namespace holds by now is not taken back.
    moved = vips_of(SERVICE, WORKLOAD, vips=kept, addresses={IpAddress("240.240.7.7"): "Service bank/web"})
    assert moved["web"] not in ((), ("240.240.7.7",))


def test_what_is_allocated_is_told_and_what_was_asked_for_is_not():
    asking = DB.replace("spec:", "spec:\n  ipFamilyPolicy: PreferDualStack\n  clusterIP: 10.9.9.9")
    mesh = build(SERVICE, asking, WORKLOAD)
    by_name = {service.name: service for service in mesh.services}
    assert mesh.vips == {
        ("shop/web", Family.IPV4): by_name["web"].vips[0],
        ("shop/db", Family.IPV6): by_name["db"].vips[1],
    }


@pytest.mark.parametrize(
    ("texts", "elsewhere", "expected"),
    [
        (
            [WORKLOAD],
            {"addresses": {"10.0.0.1": "WorkloadEntry bank/x"}},
            "4: spec.address: 10.0.0.1 is the address of WorkloadEntry bank/x too; an address is one workload",
        ),
        (
            [SERVICE.replace("spec:", "spec:\n  clusterIP: 10.9.9.9"), WORKLOAD],
            {"addresses": {"10.9.9.9": "Service bank/x"}},
            "5: spec.clusterIP: 10.9.9.9 is the address of Service bank/x too; choose another or remove it",
        ),
        (
            [SERVICE, WORKLOAD.replace("10.0.0.1", "240.240.7.7")],
            {"vips": {("shop/web", Family.IPV4): "240.240.7.7"}},
            "13: spec.address: 240.240.7.7 is the address of Service shop/web too; an address is one workload",
        ),
        (
            [SERVICE, DB.replace("spec:", "spec:\n  clusterIP: 240.240.7.7"), WORKLOAD],
            {"vips": {("shop/web", Family.IPV4): "240.240.7.7"}},
            "14: spec.clusterIP: 240.240.7.7 is the address of Service shop/web too; choose another or remove it",
        ),
        (
            [WORKLOAD],
            {"namespaces": frozenset({"shops"})},
            "3: metadata.namespace: no Namespace 'shop'; declare it, as the others are (did you mean 'shops'?)",
        ),
    ],
)
def test_what_clashes_with_elsewhere_is_an_error(texts, elsewhere, expected):
    with pytest.raises(ResourceErrors) as caught:
        vips_of(*texts, **elsewhere)
    assert [str(error).removeprefix("f.yaml:") for error in caught.value.errors] == [expected]


def test_callers_of_other_namespaces_are_known():
    calling = POLICY.replace("cluster.local/ns/shop/sa/web", "cluster.local/ns/bank/sa/web").replace(
        "rules: [", "rules: [{from: [{source: {namespaces: [bank]}}]}, "
    )
    assert len(build(WORKLOAD, calling).warnings) == 2
    elsewhere = Elsewhere(principals=frozenset({"cluster.local/ns/bank/sa/web"}))
    declared = resources.parse("---\n".join([WORKLOAD, calling]), "f.yaml")
    assert Mesh.build(declared, "cluster.local", elsewhere=elsewhere).warnings == ()


def test_virtual_addresses_that_are_asked_for_are_never_allocated():
    wanted = vips.allocate("shop/web", Family.IPV4, ())
    other = SERVICE.replace("name: web,", "name: db,").replace("spec:", f"spec:\n  clusterIP: {wanted}")
    by_name = {service.name: service for service in build(SERVICE, other, WORKLOAD).services}
    assert by_name["db"].vips == (wanted,)
    assert by_name["web"].vips not in ((wanted,), ())
    workload = WORKLOAD.replace("10.0.0.1", wanted)
    assert build(SERVICE, workload).services[0].vips != (wanted,)


def test_a_dual_stack_service_has_an_address_of_each_family_in_its_order():
    text = SERVICE.replace("spec:", "spec:\n  ipFamilyPolicy: PreferDualStack\n  clusterIP: fd00::9")
    first, second = build(text, WORKLOAD).services[0].vips
    assert (first, second.startswith("240.240.")) == ("fd00::9", True)


def test_a_headless_service_has_endpoints_and_no_address():
    mesh = build(SERVICE.replace("spec:", "spec:\n  clusterIP: None"), WORKLOAD)
    assert (mesh.services[0].vips, len(mesh.endpoints)) == ((), 1)


def test_a_full_range_is_an_error(monkeypatch):
    monkeypatch.setattr(vips, "_LAST", vips._FIRST)
    assert errors_of(SERVICE.replace("name: web,", "name: db,"), SERVICE, WORKLOAD) == [
        "13: spec.clusterIP: no address is left in 240.240.0.0/16; write one of another range"
    ]


def replaced(text, old, new):
    assert text.count(old) == 1, old
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([SERVICE, SERVICE, WORKLOAD], "12: metadata.name: Service shop/web is declared in f.yaml:1 too; remove one"),
        ([NAMESPACE, NAMESPACE], "7: metadata.name: Namespace shop is declared in f.yaml:1 too; remove one"),
        (
            [WORKLOAD, SECOND.replace("10.0.0.2", "10.0.0.1")],
            "9: spec.address: 10.0.0.1 is the address of WorkloadEntry sh",
        ),
        (
            [replaced(SERVICE, "spec:", "spec:\n  clusterIP: 10.0.0.1"), WORKLOAD],
            "5: spec.clusterIP: 10.0.0.1 is the address of WorkloadEntry shop/web-1 too",
        ),
        (
            [
                replaced(SERVICE, "spec:", "spec:\n  clusterIP: 10.9.9.9"),
                SERVICE.replace("name: web,", "name: zz,").replace("spec:", "spec:\n  clusterIP: 10.9.9.9"),
                WORKLOAD,
            ],
            "15: spec.clusterIP: 10.9.9.9 is the address of Service shop/web too",
        ),
        (
            [NAMESPACE.replace("shop", "shops"), WORKLOAD],
            "7: metadata.namespace: no Namespace 'shop'; declare it, as the others are (did you mean 'shops'?)",
        ),
        (
            [SERVICE, replaced(WORKLOAD, "{main: 8080}", "{mian: 8080}")],
            "spec.ports[0].targetPort: WorkloadEntry shop/web-1 has no port 'main'; its ports: mian (did you mean 'mi",
        ),
        (
            [BEACON, WORKLOAD],
            "9: spec.ports[1].targetPort: WorkloadEntry shop/web-1 has no port 'beacon'; its ports: main",
        ),
        (
            [SERVICE, replaced(WORKLOAD, ", ports: {main: 8080}", "")],
            "targetPort: WorkloadEntry shop/web-1 has no port 'main'; its ports: none",
        ),
        (
            [SERVICE, WORKLOAD, replaced(SLICE, "service-name: web", "service-name: wab")],
            "17: metadata.labels['kubernetes.io/service-name']: no Service 'wab' in namespace shop; declare it or n",
        ),
        (
            [SERVICE, WORKLOAD, replaced(SLICE, "10.0.0.1", "10.0.0.9")],
            "20: endpoints[0].addresses[0]: no WorkloadEntry has the address 10.0.0.9; declare one, with its servi",
        ),
        (
            [
                SERVICE,
                WORKLOAD,
                WORKLOAD.replace("shop", "bank").replace("0.1", "0.9"),
                replaced(SLICE, "0.0.1", "0.0.9"),
            ],
            "10.0.0.9 is WorkloadEntry bank/web-1, of another namespace",
        ),
        (
            [
                SERVICE,
                WORKLOAD,
                replaced(SLICE, "[10.0.0.1],", "[10.0.0.1], targetRef: {kind: WorkloadEntry, name: x},"),
            ],
            "targetRef says 'x', but 10.0.0.1 is WorkloadEntry shop/web-1",
        ),
        (
            [SERVICE, WORKLOAD, replaced(SLICE, "name: http", "name: htpp")],
            "19: ports[0].name: Service shop/web has no port named 'htpp'; its ports: 'http', 'raw' (did you mean 'h",
        ),
        (
            [SERVICE, WORKLOAD, SLICE, SLICE.replace("web-a", "web-b")],
            "10.0.0.1 stands twice for this Service; remove one",
        ),
        (
            [
                SERVICE,
                replaced(WORKLOAD, "labels", "annotations: {mesh.uproxy.dev/addresses: 'fd00::1'}, labels"),
                SLICE,
                SLICE.replace("web-a", "web-b")
                .replace("IPv4", "IPv6")
                .replace("10.0.0.1", "'fd00::1'")
                .replace("7070", "7"),
            ],
            "ports: leads shop/web-1 port 80 to 7, another EndpointSlice to 7070; make them agree",
        ),
    ],
)
def test_each_thing_that_does_not_hold_together_is_an_error_with_its_place(texts, expected):
    found = errors_of(*texts)
    assert len(found) == 1
    assert expected in found[0]


def test_namespaces_need_not_be_declared_when_none_is_and_two_always_are():
    assert build(SERVICE, WORKLOAD).warnings == ()
    root = POLICY.replace("namespace: shop", "namespace: mesh-system")
    default = WORKLOAD.replace("namespace: shop", "namespace: default").replace("0.1", "0.5")
    assert build(NAMESPACE, SERVICE, WORKLOAD, root, default)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([SERVICE], "5: spec.selector: selects no WorkloadEntry of namespace shop (none has the labels app=web)"),
        (
            [SERVICE.replace("  selector: {app: web}\n", "")],
            "1: Service shop/web has no selector and no EndpointSlice",
        ),
        (
            [WORKLOAD, replaced(POLICY, "{app: web}", "{app: wab}")],
            "10: spec.selector: selects no WorkloadEntry of namespace shop; it does nothing",
        ),
        ([WORKLOAD, PEER.replace("shop", "bank")], "spec.selector: selects no WorkloadEntry of namespace bank"),
        (
            [WORKLOAD, POLICY.replace("shop}", "mesh-system}").replace("app: web", "app: wab")],
            "spec.selector: selects no WorkloadEntry of any namespace; it does nothing",
        ),
        (
            [WORKLOAD, POLICY.replace("  rules", "  action: DENY\n  # rules")],
            "spec.rules: a DENY policy without rules denies nothing; write `rules: [{}]` to deny everybody",
        ),
        (
            [WORKLOAD, replaced(POLICY, "sa/web]", "sa/wab]")],
            "11: spec.rules[0].from[0].source: 'cluster.local/ns/shop/sa/wab' matches no workload of trust domain "
            "cluster.local (did you mean 'cluster.local/ns/shop/sa/web'?)",
        ),
        (
            [WORKLOAD, POLICY.replace("principals: [cluster", "principals: [other")],
            "matches no workload of trust domain",
        ),
        (
            [WORKLOAD, POLICY.replace("principals: [cluster.local/ns/shop/sa/web]", "namespaces: [shup]")],
            "'shup' matches no",
        ),
        (
            [WORKLOAD, POLICY.replace("principals: [cluster.local/ns/shop/sa/web]", "serviceAccounts: [shop/wab]")],
            "'*/ns/shop/sa/wab' matches no workload",
        ),
        (
            [WORKLOAD, POLICY.split("  rules")[0] + "  rules: [{when: [{key: source.namespace, notValues: [x]}]}]\n"],
            "spec.rules[0].when[0]: 'x' matches no workload",
        ),
        (
            [WORKLOAD, POLICY.split("  rules")[0] + "  rules: [{when: [{key: source.principal, values: ['x*']}]}]\n"],
            "spec.rules[0].when[0]: 'x*' matches no workload",
        ),
    ],
)
def test_what_does_nothing_is_a_warning_with_its_place(texts, expected):
    found = warnings_of(*texts)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    "source",
    [
        "{principals: ['*']}",
        "{principals: ['cluster.local/*']}",
        "{namespaces: ['sh*']}",
        "{notNamespaces: [shop]}",
        "{ipBlocks: [1.2.3.4]}",
    ],
)
def test_a_pattern_that_can_match_gives_no_warning(source):
    text = POLICY.replace("{principals: [cluster.local/ns/shop/sa/web]}", source)
    assert warnings_of(WORKLOAD, text) == []


def permissive(name, scope="", namespace="shop", mode="PERMISSIVE"):
    return (
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{scope}mtls: {{mode: {mode}}}}}\n"
    )


OF_WEB = "selector: {matchLabels: {app: web}}, "


def test_what_peer_authentications_say_stands_in_the_workloads_own_record():
    db = WORKLOAD.replace("web-1", "db-1").replace("app: web", "app: db").replace("10.0.0.1", "10.0.0.3")
    bank = db.replace("shop", "bank").replace("10.0.0.3", "10.0.0.4")
    ports = OF_WEB + "portLevelMtls: {8080: {mode: STRICT}}, "
    mesh = build(WORKLOAD, db, bank, permissive("all", namespace="mesh-system"), permissive("web", ports))
    bodies = {topic.rpartition("/")[2]: body.get("plaintext") for topic, body in mesh.records().items()}
    assert bodies == {"web-1": [True, [8080]], "db-1": [True, []]}
    assert_same(state_of(mesh), mesh)
    strict = build(WORKLOAD, db, permissive("all", namespace="mesh-system"), permissive("all", mode="STRICT"))
    assert [body.get("plaintext") for body in strict.records().values()] == [None, None]


ASKING = "metadata: {name: %s, namespace: shop, annotations: {mesh.uproxy.dev/proxy-protocol: '%s'}, "


def test_who_wants_a_proxy_protocol_header_stands_in_the_workloads_own_record():
    of_service = SERVICE.replace("metadata: {name: web, namespace: shop, ", ASKING % ("web", "raw, 80"))
    of_workload = WORKLOAD.replace("metadata: {name: web-1, namespace: shop, ", ASKING % ("web-1", "main, 5432"))
    for texts, wanted in (
        ((SERVICE, WORKLOAD, SECOND), {}),
        ((of_service, WORKLOAD, SECOND), {"web-1": (8080, 9000), "web-2": (1, 2)}),
        ((SERVICE, of_workload, SECOND), {"web-1": (5432, 8080)}),
        ((of_service, of_workload, SECOND, SLICE), {"web-1": (5432, 7070, 8080), "web-2": (1, 2)}),
    ):
        mesh = build(*texts)
        assert {one.name: one.proxy_protocol for one in mesh.workloads if one.proxy_protocol} == wanted
        assert_same(state_of(mesh), mesh)


@pytest.mark.parametrize(
    ("text", "name", "written", "problem"),
    [
        (SERVICE, "web", "main", "'main' is no port of this Service; its ports: http, raw"),
        (SERVICE, "web", "8080", "'8080' is no port of this Service"),
        (SERVICE, "web", "80,", "'' is no port of this Service"),
        (SERVICE, "web", "*", "'*' is no port"),
        (WORKLOAD, "web-1", "http", "'http' is not a port from 1 to 65535"),
        (WORKLOAD, "web-1", "70000", "'70000' is not a port"),
        (WORKLOAD, "web-1", "15008", "15008 is the uProxy's own, as all of 15000 to 15090"),
        (WORKLOAD, "web-1", ",".join(map(str, range(1, 66))), "has more than 64 ports"),
    ],
)
def test_a_port_that_cannot_have_a_proxy_protocol_header_is_refused(text, name, written, problem):
    asking = text.replace(f"metadata: {{name: {name}, namespace: shop, ", ASKING % (name, written))
    assert any("proxy-protocol" in error and problem in error for error in errors_of(asking))


def test_the_root_namespaces_peer_authentications_hold_where_they_are_not_built():
    root = build(permissive("all", namespace="mesh-system")).peer_authentications
    alone = build(WORKLOAD, elsewhere=Elsewhere(peer_authentications=root))
    assert alone.workloads == build(WORKLOAD, permissive("all", namespace="mesh-system")).workloads
    assert alone.workloads[0].plaintext is not None


def test_two_peer_authentications_of_one_scope_are_a_warning():
    assert warnings_of(WORKLOAD, permissive("a"), permissive("b", mode="STRICT")) == [
        "14: spec.mtls: PeerAuthentication a says it of the same workloads; where they differ STRICT holds"
    ]
    assert warnings_of(WORKLOAD, permissive("a", OF_WEB), permissive("b", OF_WEB), permissive("c")) == []


def test_a_selector_in_the_root_namespace_is_refused():
    assert errors_of(WORKLOAD, permissive("a", OF_WEB, "mesh-system", "STRICT")) == [
        "9: spec.selector: a PeerAuthentication of mesh-system is one for the whole mesh; remove selector, or move it "
        "to the namespace of the workloads"
    ]


def test_more_ports_than_the_kernel_holds_are_refused():
    parts = []
    for part in (1, 101):
        ports = ", ".join(f"{port}: {{mode: PERMISSIVE}}" for port in range(part, part + 40))
        parts.append(permissive(f"p{part}", f"{OF_WEB}portLevelMtls: {{{ports}}}, ", mode="UNSET"))
    assert [one.partition("spec.")[2] for one in errors_of(WORKLOAD, *parts)] == [
        "portLevelMtls: WorkloadEntry shop/web-1 has 80 ports unlike the others, by all that select it; at most 64 are "
        "taken"
    ]


def test_the_root_namespace_can_be_another():
    root = POLICY.replace("namespace: shop", "namespace: istio-system")
    assert build(WORKLOAD, root, root_namespace="istio-system").warnings == ()
    assert len(build(WORKLOAD, root).warnings) == 1


def test_a_dual_stack_workload_in_two_slices_is_one_endpoint_at_its_first_address():
    workload = WORKLOAD.replace("labels", "annotations: {mesh.uproxy.dev/addresses: 'fd00::1'}, labels")
    ready = SLICE.replace("ready: false", "ready: true")
    other = ready.replace("web-a", "web-b").replace("IPv4", "IPv6").replace("10.0.0.1", "'fd00::1'")
    (endpoint,) = build(SERVICE, workload, other, ready).endpoints
    assert (endpoint.address, endpoint.ports, endpoint.ready) == ("10.0.0.1", {80: 7070}, True)
    (endpoint,) = build(SERVICE, workload, other).endpoints
    assert endpoint.address == "fd00::1"
    for slices in ((other, SLICE), (SLICE, other)):
        (endpoint,) = build(SERVICE, workload, *slices).endpoints
        assert not endpoint.ready


def test_workloads_of_another_trust_domain_have_its_identities():
    (workload,) = Mesh.build(resources.parse(WORKLOAD, "f"), "example.org").workloads
    assert isinstance(workload, Workload)
    assert workload.identity.principal == "example.org/ns/shop/sa/web"
    with pytest.raises(ValueError, match="trust domain"):
        Mesh.build([], "Example")
