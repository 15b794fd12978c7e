"""Labels and annotations that would change what the mesh does are refused; the rest is the owner's business."""

from __future__ import annotations

import pytest

from control.api.bindings import Canary
from control.api.declared import NO_CHOICE, WaypointChoice
from control.api.identity import SpiffeId
from control.api.mesh import Mesh
from control.api.problems import ResourceErrors
from control.api.resources import parse


def service(labels="{}", annotations="{}"):
    return (
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: a, labels: {labels}, annotations: {annotations}}}\n"
        "spec: {clusterIP: None}\n"
    )


@pytest.mark.parametrize(
    "labels",
    [
        "{istio.io/use-waypoint: none}",
        "{istio.io/dataplane-mode: ambient}",
        "{networking.istio.io/tunnel: http}",
        "{security.istio.io/tlsMode: istio}",
        "{app: x, example.com/anything: at.all}",
    ],
)
def test_labels_that_ask_for_what_is_done_anyway_are_taken(labels):
    assert parse(service(labels=labels), "f")


@pytest.mark.parametrize(
    "labels",
    [
        "{istio.io/ingress-use-waypoint: 'true'}",
        "{istio.io/waypoint-for: service}",
        "{istio.io/dataplane-mode: none}",
        "{networking.istio.io/tunnel: none}",
        "{security.istio.io/tlsMode: disabled}",
        "{topology.istio.io/network: n1}",
    ],
)
def test_labels_that_ask_for_what_is_not_there_are_refused(labels):
    with pytest.raises(ResourceErrors, match=r"is refused: .*(remove it|leave the workload out)"):
        parse(service(labels=labels), "f")


@pytest.mark.parametrize(
    "annotations",
    [
        "{istio.io/dry-run: 'false'}",
        "{mesh.uproxy.dev/same-host: encrypted}",
        "{mesh.uproxy.dev/udp: refused}",
        '{kubectl.kubernetes.io/last-applied-configuration: \'{"any": "text at all"}\'}',
    ],
)
def test_annotations_that_ask_for_what_is_done_anyway_are_taken(annotations):
    assert parse(service(annotations=annotations), "f")


@pytest.mark.parametrize(
    "annotations",
    [
        "{istio.io/dry-run: 'true'}",
        "{mesh.uproxy.dev/same-host: direct}",  # of a Service
        "{traffic.sidecar.istio.io/excludeInboundPorts: '80'}",
        "{ambient.istio.io/bypass-inbound-capture: 'true'}",
    ],
)
def test_annotations_that_ask_for_what_is_not_there_are_refused(annotations):
    with pytest.raises(ResourceErrors, match=r"is refused: .*remove"):
        parse(service(annotations=annotations), "f")


def test_a_wrong_label_is_refused_once():
    with pytest.raises(ResourceErrors) as caught:
        parse(service(labels="[a]", annotations="b"), "f")
    assert len(caught.value.errors) == 2


def test_more_labels_than_the_bound_are_refused():
    labels = "{" + ", ".join(f"l{n}: x" for n in range(65)) + "}"
    with pytest.raises(ResourceErrors, match=r"metadata\.labels: has 65 entries; at most 64"):
        parse(service(labels=labels), "f")


@pytest.mark.parametrize(
    ("labels", "annotations", "choice"),
    [
        ("{}", "{}", NO_CHOICE),
        ("{istio.io/use-waypoint: wp}", "{}", WaypointChoice("default/wp")),
        ("{istio.io/use-waypoint: none}", "{}", WaypointChoice("")),
        ("{istio.io/use-waypoint: wp, istio.io/use-waypoint-namespace: edge}", "{}", WaypointChoice("edge/wp")),
        ("{}", "{mesh.uproxy.dev/waypoint-binding: optional}", WaypointChoice(optional=True)),
        ("{}", "{mesh.uproxy.dev/waypoint-binding: required}", WaypointChoice(optional=False)),
        (
            "{}",
            "{mesh.uproxy.dev/waypoint-exempt: 'spiffe://td/ns/b/sa/c, spiffe://td/ns/a/sa/b'}",
            WaypointChoice(exempt=(SpiffeId("td", "a", "b"), SpiffeId("td", "b", "c"))),
        ),
    ],
)
def test_a_choice_of_waypoint_is_read(labels, annotations, choice):
    (found,) = parse(service(labels=labels, annotations=annotations), "f")
    assert found.waypoint == choice


CANARY = "mesh.uproxy.dev/waypoint-canary"


@pytest.mark.parametrize(
    ("text", "canary"),
    [
        ("v2=10", Canary("default/v2", 10)),
        ("infra/v2=0", Canary("infra/v2", 0)),
        ("v2=100", Canary("default/v2", 100)),
        *((wrong, None) for wrong in ("v2", "v2=", "=10", "v2=101", "v2=-1", "v2=1e1", "v2=10%", "V2=1", "a/b/c=1")),
    ],
)
def test_a_canary_is_a_gateway_and_a_percentage(text, canary):
    written = service(annotations=f"{{{CANARY}: '{text}'}}")
    if canary is not None:
        assert parse(written, "f")[0].waypoint.canary == canary
    else:
        with pytest.raises(ResourceErrors, match="write GATEWAY=PERCENT, such as wp-v2=10"):
            parse(written, "f")


def test_the_gateway_of_a_namespace_is_its_own():
    labels = "{istio.io/use-waypoint: wp}"
    (found,) = parse(f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {labels}}}\n", "f")
    assert found.waypoint == WaypointChoice("shop/wp")


@pytest.mark.parametrize(
    ("labels", "annotations", "problem"),
    [
        ("{istio.io/use-waypoint: Wp}", "{}", "use-waypoint'.: 'Wp' must be .*; write the name of a Gateway, or none"),
        ("{istio.io/use-waypoint-namespace: a}", "{}", "says where a Gateway is, and istio.io/use-waypoint names none"),
        (
            "{istio.io/use-waypoint: none, istio.io/use-waypoint-namespace: a}",
            "{}",
            "says where a Gateway is, and istio.io/use-waypoint names none",
        ),
        ("{istio.io/use-waypoint: w, istio.io/use-waypoint-namespace: a.b}", "{}", "'a.b' must be 1-63"),
        ("{}", "{mesh.uproxy.dev/waypoint-binding: maybe}", "'maybe' must be optional or required"),
        ("{}", "{mesh.uproxy.dev/waypoint-exempt: prometheus}", "does not begin with 'spiffe://'"),
        (
            "{}",
            "{mesh.uproxy.dev/waypoint-exempt: '" + ",".join(f"spiffe://td/ns/a/sa/n{n}" for n in range(65)) + "'}",
            "has more than 64 identities",
        ),
    ],
)
def test_a_choice_that_means_nothing_is_refused(labels, annotations, problem):
    with pytest.raises(ResourceErrors, match=problem):
        parse(service(labels=labels, annotations=annotations), "f")


def test_what_an_object_says_stands_above_its_namespace():
    namespace = WaypointChoice("shop/wp", optional=True, exempt=())
    assert NO_CHOICE.over(namespace) == namespace
    assert WaypointChoice("").over(namespace) == WaypointChoice("", optional=True, exempt=())
    assert WaypointChoice(optional=False).over(namespace) == WaypointChoice("shop/wp", optional=False, exempt=())


@pytest.mark.parametrize("kind", ["labels: {istio.io/use-waypoint: wp}", "labels: {istio.io/waypoint-for: all}"])
def test_a_kind_that_cannot_be_bound_refuses_the_label(kind):
    text = f"""\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: a, {kind}}}
spec: {{mtls: {{mode: STRICT}}}}
"""
    with pytest.raises(ResourceErrors, match=r"is refused: .*remove it"):
        parse(text, "f")


def test_a_workload_s_own_labels_bind_it_and_those_of_its_spec_do_not():
    text = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: a}
spec: {address: 10.0.0.1, labels: {istio.io/use-waypoint: wp}}
"""
    with pytest.raises(ResourceErrors, match=r"spec\.labels.*belongs in metadata\.labels"):
        parse(text, "f")


@pytest.mark.parametrize(
    ("of_namespace", "of_workload", "direct"),
    [
        ("", "", False),
        ("direct", "", True),
        ("direct", "encrypted", False),
        ("encrypted", "direct", True),
        ("", "direct", True),
    ],
)
def test_a_workload_goes_direct_where_it_or_its_namespace_says_so(of_namespace, of_workload, direct):
    def said(mode):
        return f"{{mesh.uproxy.dev/same-host: {mode}}}" if mode else "{}"

    text = f"""\
apiVersion: v1
kind: Namespace
metadata: {{name: shop, annotations: {said(of_namespace)}}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: a, namespace: shop, annotations: {said(of_workload)}}}
spec: {{address: 10.0.0.1}}
"""
    (workload,) = Mesh.build(parse(text, "f"), "td").workloads
    assert workload.direct is direct


def test_any_other_mode_of_one_host_is_refused():
    text = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {mesh.uproxy.dev/same-host: plain}}
"""
    with pytest.raises(ResourceErrors, match=r"same-host.*must be direct or encrypted"):
        parse(text, "f")
