"""Labels and annotations that would change what the mesh does are refused; the rest is the owner's business."""

from __future__ import annotations

import pytest

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
        "{istio.io/use-waypoint: wp}",
        "{istio.io/use-waypoint-namespace: x}",
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
        '{kubectl.kubernetes.io/last-applied-configuration: \'{"any": "text at all"}\'}',
    ],
)
def test_annotations_that_ask_for_what_is_done_anyway_are_taken(annotations):
    assert parse(service(annotations=annotations), "f")


@pytest.mark.parametrize(
    "annotations",
    [
        "{istio.io/dry-run: 'true'}",
        "{mesh.uproxy.dev/same-host: direct}",
        "{mesh.uproxy.dev/udp: plaintext}",
        "{mesh.uproxy.dev/waypoint-binding: optional}",
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
