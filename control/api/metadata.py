"""`metadata` of every resource: name, namespace, labels, annotations, and which of the latter we must refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from control.api import labels as label
from control.api.bindings import Canary
from control.api.declared import NO_CHOICE, WaypointChoice
from control.api.document import Reader, Wrong
from control.api.identity import IdentityError, SpiffeId
from control.api.names import key, wrong_dns_label, wrong_subdomain
from control.api.problems import shown

DEFAULT_NAMESPACE: Final = "default"
MORE_ADDRESSES: Final = "mesh.uproxy.dev/addresses"
"""On a WorkloadEntry: further addresses, separated by commas, for a workload with IPv4 and IPv6."""

SAME_HOST: Final = "mesh.uproxy.dev/same-host"
"""On a WorkloadEntry or Namespace: `direct` lets connections between workloads of one host go without a tunnel once
both ends agree; else they are `encrypted`."""

PROXY_PROTOCOL: Final = "mesh.uproxy.dev/proxy-protocol"
"""On a Service or WorkloadEntry: its ports, separated by commas, behind which applications read from a header of the
PROXY protocol, version 2, who calls."""

UDP: Final = "mesh.uproxy.dev/udp"
"""On a Service: `plaintext` lets datagrams to its ports of protocol UDP pass outside of any tunnel; else they are
`refused`."""

TRUSTED_PROXIES: Final = "mesh.uproxy.dev/trusted-proxies"
"""On a Gateway: how many proxies before its callers write into X-Forwarded-For whom they were called by."""

PLACEMENT: Final = "mesh.uproxy.dev/placement"
"""On a Gateway: where its processes stand (`gateway.Placement`); else they are `remote`."""

ENGINE: Final = "mesh.uproxy.dev/engine"
"""On a Gateway: what serves there, `built-in` or `envoy`."""

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

DRY_RUN: Final = "istio.io/dry-run"
"""On an AuthorizationPolicy: `true` tells what it would do, and does it not."""
WAYPOINT_BINDING: Final = "mesh.uproxy.dev/waypoint-binding"
"""Beside `istio.io/use-waypoint`: `optional` passes by a waypoint that does not answer, else it is `required`."""
WAYPOINT_EXEMPT: Final = "mesh.uproxy.dev/waypoint-exempt"
"""Likewise: SPIFFE IDs, separated by commas, of those who may connect directly."""
WAYPOINT_CANARY: Final = "mesh.uproxy.dev/waypoint-canary"
"""Likewise: `GATEWAY=PERCENT`, of which callers another Gateway serves; `NAMESPACE/GATEWAY` for one elsewhere."""

_PERCENT: Final = re.compile("[0-9]{1,3}", re.ASCII)
_MAX_EXEMPT: Final = 64  # as they stand in the record of every workload behind the service
_MAX_PROXY_PROTOCOL: Final = 64  # likewise

_BINDS: Final = "only a Service, WorkloadEntry or Namespace can be bound to a waypoint; remove it"
_LABELS: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    label.USE_WAYPOINT: (("none",), _BINDS),
    label.USE_WAYPOINT_NAMESPACE: ((), _BINDS),
    label.WAYPOINT_FOR: (("none",), "it says which traffic a waypoint takes, and stands on its Gateway; remove it"),
    "istio.io/ingress-use-waypoint": (("false",), "there is no ingress gateway; remove it"),
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
    DRY_RUN: (("false",), "it is said of an AuthorizationPolicy; remove it"),
    SAME_HOST: (("encrypted",), "it is said of a WorkloadEntry or a Namespace; remove it"),
    PROXY_PROTOCOL: ((), "it is said of a Service or a WorkloadEntry; remove it"),
    UDP: (("refused",), "it is said of a Service; remove it"),
    TRUSTED_PROXIES: (("0",), "it is said of a Gateway; remove it"),
    ENGINE: (("built-in",), "it is said of a Gateway; remove it"),
    PLACEMENT: (("remote",), "it is said of a Gateway; remove it"),
    WAYPOINT_BINDING: ((), _BINDS),
    WAYPOINT_EXEMPT: ((), _BINDS),
    WAYPOINT_CANARY: ((), _BINDS),
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
    document: Reader,
    wrong_name: Wrong,
    *,
    namespaced: bool = True,
    own_labels: tuple[str, ...] = (),
    own_annotations: tuple[str, ...] = (),
) -> Metadata:
    """Reads `metadata`; `own_labels` and `own_annotations` are those that this kind understands."""
    return _read(document, wrong_name, namespaced, own_labels, own_annotations)[0]


def _read(
    document: Reader, wrong_name: Wrong, namespaced: bool, own_labels: tuple[str, ...], own_annotations: tuple[str, ...]
) -> tuple[Metadata, Reader]:
    """Metadata, and the reader that it came from."""
    reader = document.child("metadata", required="a mapping with name and namespace")
    name = reader.text("name", wrong_name, required="the resource's name")
    namespace = ""
    if namespaced:
        namespace = reader.text("namespace", wrong_dns_label, default=DEFAULT_NAMESPACE)
    elif reader.has("namespace"):
        reader.error("namespace", "is refused: this kind belongs to no namespace; remove it")
    labels = reader.pairs("labels", label.wrong_key, label.wrong_value, most=label.MAX_LABELS)
    if labels:
        _refuse(reader.child("labels"), labels, _LABELS, own_labels)
    annotations = reader.pairs("annotations", label.wrong_key, _anything, most=_MAX_ANNOTATIONS)
    if annotations:
        _refuse_annotations(reader.child("annotations"), annotations, own_annotations)
    reader.refuse({**_SERVER_WRITTEN, "generateName": "a name must be known beforehand; write name"})
    reader.finish()
    return Metadata(namespace, name, labels, annotations), reader


def _anything(text: str) -> str:
    return ""


def read_bindable_metadata(
    document: Reader, wrong_name: Wrong, *, namespaced: bool = True, own_annotations: tuple[str, ...] = ()
) -> tuple[Metadata, WaypointChoice]:
    """Reads `metadata` of a kind that can be bound to a waypoint, and what it says of that."""
    metadata, reader = _read(
        document,
        wrong_name,
        namespaced,
        (label.USE_WAYPOINT, label.USE_WAYPOINT_NAMESPACE),
        (*own_annotations, WAYPOINT_BINDING, WAYPOINT_EXEMPT, WAYPOINT_CANARY),
    )
    choice = WaypointChoice(
        gateway=_gateway(reader, metadata.namespace or metadata.name, metadata.labels),
        optional=_optional(reader, metadata.annotations),
        exempt=_exempt(reader, metadata.annotations),
        canary=_canary(reader, metadata.namespace or metadata.name, metadata.annotations),
    )
    return metadata, NO_CHOICE if choice == NO_CHOICE else choice  # one object for all that say nothing


def _gateway(reader: Reader, namespace: str, labels: dict[str, str]) -> str | None:
    """Key of the Gateway that labels name; empty for `none`."""
    name, of = labels.get(label.USE_WAYPOINT), labels.get(label.USE_WAYPOINT_NAMESPACE)
    written = reader.child("labels") if labels else reader
    if of is not None and (name is None or name == "none"):
        written.error(label.USE_WAYPOINT_NAMESPACE, f"says where a Gateway is, and {label.USE_WAYPOINT} names none")
    elif of is not None and (problem := wrong_dns_label(of)):
        written.error(label.USE_WAYPOINT_NAMESPACE, problem)
    if name is None:
        return None
    if name == "none":
        return ""
    if problem := wrong_subdomain(name):
        written.error(label.USE_WAYPOINT, f"{problem}; write the name of a Gateway, or none")
    return key(namespace if of is None else of, name)


def _optional(reader: Reader, annotations: dict[str, str]) -> bool | None:
    text = annotations.get(WAYPOINT_BINDING)
    if text not in (None, "optional", "required"):
        reader.child("annotations").error(WAYPOINT_BINDING, f"{shown(text or '')} must be optional or required")
    return None if text is None else text == "optional"


def _exempt(reader: Reader, annotations: dict[str, str]) -> tuple[SpiffeId, ...] | None:
    text = annotations.get(WAYPOINT_EXEMPT)
    if text is None:
        return None
    found: set[SpiffeId] = set()
    for written in text.split(",")[: _MAX_EXEMPT + 1]:
        try:
            found.add(SpiffeId.parse(written.strip()))
        except IdentityError as error:
            reader.child("annotations").error(WAYPOINT_EXEMPT, str(error))
    if len(found) > _MAX_EXEMPT:
        reader.child("annotations").error(WAYPOINT_EXEMPT, f"has more than {_MAX_EXEMPT} identities")
    return tuple(sorted(found))


def _canary(reader: Reader, own: str, annotations: dict[str, str]) -> Canary | None:
    text = annotations.get(WAYPOINT_CANARY)
    if text is None:
        return None
    gateway, _, share = text.partition("=")
    namespace, slash, name = gateway.partition("/")
    namespace, name = (namespace, name) if slash else (own, gateway)
    problem = wrong_dns_label(namespace) or wrong_subdomain(name)
    if not problem and not (_PERCENT.fullmatch(share) and int(share) <= 100):
        problem = f"{shown(share)} is no percentage from 0 to 100"
    if problem:
        reader.child("annotations").error(WAYPOINT_CANARY, f"{problem}; write GATEWAY=PERCENT, such as wp-v2=10")
        return None
    return Canary(key(namespace, name), int(share))


def read_same_host(document: Reader, metadata: Metadata) -> bool | None:
    """Whether the workload, or the workloads of the namespace, may go direct; None where nothing is said."""
    text = metadata.annotations.get(SAME_HOST)
    if text not in (None, "direct", "encrypted"):
        document.error_at(f"metadata.annotations[{SAME_HOST!r}]", f"{shown(text or '')} must be direct or encrypted")
    return None if text is None else text == "direct"


def read_proxy_protocol(document: Reader, metadata: Metadata, parse: Callable[[str], int]) -> tuple[int, ...]:
    """The ports that `PROXY_PROTOCOL` names, in order. `parse` gives the number of one, or raises ValueError."""
    text = metadata.annotations.get(PROXY_PROTOCOL)
    if text is None:
        return ()
    field = f"metadata.annotations[{PROXY_PROTOCOL!r}]"
    found: set[int] = set()
    for written in text.split(",")[: _MAX_PROXY_PROTOCOL + 1]:
        try:
            found.add(parse(written.strip()))
        except ValueError as error:
            document.error_at(field, str(error))
    if len(found) > _MAX_PROXY_PROTOCOL:
        document.error_at(field, f"has more than {_MAX_PROXY_PROTOCOL} ports")
    return tuple(sorted(found))


def read_udp(document: Reader, metadata: Metadata) -> bool:
    """Whether a Service's datagrams may pass in plaintext."""
    text = metadata.annotations.get(UDP, "refused")
    if text not in ("plaintext", "refused"):
        document.error_at(f"metadata.annotations[{UDP!r}]", f"{shown(text)} must be plaintext or refused")
    return text == "plaintext"


def _refuse(
    reader: Reader, found: dict[str, str], table: dict[str, tuple[tuple[str, ...], str]], own: tuple[str, ...]
) -> None:
    for name, value in found.items():
        allowed, reason = table.get(name, ((value,), ""))
        if value not in allowed and name not in own:
            reader.error(name, f"is refused: {reason}")


def _refuse_annotations(reader: Reader, found: dict[str, str], own: tuple[str, ...]) -> None:
    _refuse(reader, found, _ANNOTATIONS, own)
    for name in found:
        if name.startswith(_CAPTURE_PREFIXES):
            reader.error(name, f"is refused: {_CAPTURE}")
        elif name.startswith(_OWN_PREFIX) and name not in own and name not in _ANNOTATIONS:
            known = ", ".join(own) if own else "none"
            reader.error(name, f"unknown annotation of ours; known for this kind: {known}")
