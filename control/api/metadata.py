"""`metadata` of every resource: name, namespace, labels, annotations, and which of the latter we must refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from control.api import labels as label
from control.api.document import Reader, Wrong
from control.api.names import wrong_dns_label

DEFAULT_NAMESPACE: Final = "default"
MORE_ADDRESSES: Final = "mesh.uproxy.dev/addresses"
"""On a WorkloadEntry: further addresses, separated by commas, for a workload with IPv4 and IPv6."""

_OWN_PREFIX: Final = "mesh.uproxy.dev/"
_MAX_ANNOTATIONS: Final = 256

_SERVER_WRITTEN: Final = dict.fromkeys(
    (
        "uid",
        "resourceVersion",
        "generation",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "selfLink",
        "managedFields",
        "ownerReferences",
        "finalizers",
    ),
    "a Kubernetes API server writes it; remove it",
)

_NO_WAYPOINT: Final = "waypoints are not there yet, and without one its L7 policy would not hold; remove it"
_LABELS: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "istio.io/use-waypoint": (("none",), _NO_WAYPOINT),
    "istio.io/use-waypoint-namespace": ((), _NO_WAYPOINT),
    "istio.io/ingress-use-waypoint": (("false",), _NO_WAYPOINT),
    "istio.io/waypoint-for": (("none",), _NO_WAYPOINT),
    "istio.io/dataplane-mode": (
        ("ambient",),
        "every declared workload is in the mesh; leave the workload out of the configuration instead",
    ),
    "networking.istio.io/tunnel": (("http",), "workloads are reached over HBONE only; remove it"),
    "security.istio.io/tlsMode": (("istio",), "workloads are reached over mTLS only; remove it"),
    "topology.istio.io/network": (("",), "all workloads share one network; remove it"),
}
"""Labels that change what the mesh does: the values that say what it does anyway, and why others are refused."""

_ANNOTATIONS: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "istio.io/dry-run": (("false",), "every policy here is enforced; remove the policy instead"),
    "mesh.uproxy.dev/same-host": (("encrypted",), "the direct path is not there yet; write encrypted or remove it"),
    "mesh.uproxy.dev/udp": ((), "UDP is not carried yet, and refused; remove it"),
    "mesh.uproxy.dev/waypoint-binding": ((), _NO_WAYPOINT),
}
_CAPTURE_PREFIXES: Final = ("traffic.sidecar.istio.io/", "ambient.istio.io/")
_CAPTURE: Final = "capture covers all TCP of a workload and cannot be narrowed; remove it"


@dataclass(frozen=True, slots=True)
class Metadata:
    """What every resource says of itself."""

    namespace: str
    """Empty for a resource that has none."""
    name: str
    labels: dict[str, str]
    annotations: dict[str, str]


def read_metadata(
    document: Reader, wrong_name: Wrong, *, namespaced: bool = True, own_annotations: tuple[str, ...] = ()
) -> Metadata:
    """Reads `metadata`; `own_annotations` are those of ours that this kind understands."""
    reader = document.child("metadata", required="a mapping with name and namespace")
    name = reader.text("name", wrong_name, required="the resource's name")
    namespace = ""
    if namespaced:
        namespace = reader.text("namespace", wrong_dns_label, default=DEFAULT_NAMESPACE)
    elif reader.has("namespace"):
        reader.error("namespace", "is refused: this kind belongs to no namespace; remove it")
    labels = reader.pairs("labels", label.wrong_key, label.wrong_value, most=label.MAX_LABELS)
    if labels:
        _refuse(reader.child("labels"), labels, _LABELS)
    annotations = reader.pairs("annotations", label.wrong_key, _anything, most=_MAX_ANNOTATIONS)
    if annotations:
        _refuse_annotations(reader.child("annotations"), annotations, own_annotations)
    reader.refuse({**_SERVER_WRITTEN, "generateName": "a name must be known beforehand; write name"})
    reader.finish()
    return Metadata(namespace, name, labels, annotations)


def _anything(text: str) -> str:
    return ""


def _refuse(reader: Reader, found: dict[str, str], table: dict[str, tuple[tuple[str, ...], str]]) -> None:
    for name, value in found.items():
        allowed, reason = table.get(name, ((value,), ""))
        if value not in allowed:
            reader.error(name, f"is refused: {reason}")


def _refuse_annotations(reader: Reader, found: dict[str, str], own: tuple[str, ...]) -> None:
    _refuse(reader, found, _ANNOTATIONS)
    for name in found:
        if name.startswith(_CAPTURE_PREFIXES):
            reader.error(name, f"is refused: {_CAPTURE}")
        elif name.startswith(_OWN_PREFIX) and name not in own and name not in _ANNOTATIONS:
            known = ", ".join(own) if own else "none"
            reader.error(name, f"unknown annotation of ours; known for this kind: {known}")
