"""`gateway.networking.k8s.io` Gateway (class `istio-waypoint`), read from documents: Gateway API v1."""

from __future__ import annotations

from typing import Final

from control.api import labels as label
from control.api.address import HBONE_PORT
from control.api.declared import DeclaredGateway
from control.api.document import Reader
from control.api.filter_api import need
from control.api.gateway import MAX_TRUSTED_PROXIES, Engine, Placement, Traffic
from control.api.labels import Labels
from control.api.metadata import ENGINE, PLACEMENT, TRUSTED_PROXIES, Metadata, read_metadata
from control.api.names import wrong_subdomain
from control.api.problems import shown

GATEWAY_CLASS: Final = "istio-waypoint"

_NOT_THERE: Final = "it is not implemented; remove it"


def read_gateway(document: Reader) -> DeclaredGateway:
    """Reads a Gateway."""
    metadata = read_metadata(
        document,
        wrong_subdomain,
        own_labels=(label.WAYPOINT_FOR,),
        own_annotations=(ENGINE, PLACEMENT, TRUSTED_PROXIES),
    )
    traffic = metadata.labels.get(label.WAYPOINT_FOR, Traffic.SERVICE.value)
    known = [one.value for one in Traffic]
    if traffic not in known:
        problem = f"{shown(traffic)} must be one of {', '.join(known)}"
        document.error_at(f"metadata.labels[{label.WAYPOINT_FOR!r}]", problem)
    spec = document.child("spec", required="a mapping with gatewayClassName and listeners")
    spec.choice("gatewayClassName", [GATEWAY_CLASS], default="", others={})
    need(spec, "gatewayClassName", GATEWAY_CLASS)
    spec.refuse(
        {
            "addresses": "callers find a waypoint by its WorkloadEntries; remove it",
            **dict.fromkeys(
                ("infrastructure", "backendTLS", "tls", "allowedListeners", "defaultScope"),
                _NOT_THERE,
            ),
        }
    )
    listeners = spec.children("listeners")
    need(spec, "listeners", "[{name: mesh, port: 15008, protocol: HBONE}]")
    if len(listeners) > 1:
        spec.error("listeners", "has several; a waypoint has one, {name: mesh, port: 15008, protocol: HBONE}")
    admits = [_read_listener(reader) for reader in listeners]
    spec.finish()
    return DeclaredGateway(
        namespace=metadata.namespace,
        name=metadata.name,
        traffic=Traffic(traffic) if traffic in known else Traffic.NONE,
        admits=admits[0] if admits else None,
        position=document.position,
        trusted_proxies=_trusted_proxies(document, metadata),
        engine=_engine(document, metadata),
        placement=_read_placement(document, metadata),
    )


def _engine(document: Reader, metadata: Metadata) -> Engine:
    text = metadata.annotations.get(ENGINE, Engine.BUILT_IN.value)
    known = [one.value for one in Engine]
    if text in known:
        return Engine(text)
    document.error_at(f"metadata.annotations[{ENGINE!r}]", f"{shown(text)} must be one of {', '.join(known)}")
    return Engine.BUILT_IN


def _trusted_proxies(document: Reader, metadata: Metadata) -> int:
    text = metadata.annotations.get(TRUSTED_PROXIES, "0")
    if text.isascii() and text.isdigit() and len(text) <= 2 and int(text) <= MAX_TRUSTED_PROXIES:
        return int(text)
    problem = f"{shown(text)} must be a number from 0 to {MAX_TRUSTED_PROXIES}, in quotes"
    document.error_at(f"metadata.annotations[{TRUSTED_PROXIES!r}]", problem)
    return 0


def _read_placement(document: Reader, metadata: Metadata) -> Placement:
    text = metadata.annotations.get(PLACEMENT, Placement.REMOTE.value)
    if text == Placement.SIDECAR.value and metadata.annotations.get(ENGINE) == Engine.ENVOY.value:
        problem = f"the engine envoy does not stand beside a workload; remove it, or take another {PLACEMENT}"
        document.error_at(f"metadata.annotations[{ENGINE!r}]", problem)
    known = [one.value for one in Placement]
    if text in known:
        return Placement(text)
    document.error_at(f"metadata.annotations[{PLACEMENT!r}]", f"{shown(text)} must be one of {', '.join(known)}")
    return Placement.REMOTE


def _read_listener(reader: Reader) -> Labels | None:
    """The namespaces that it admits, as `DeclaredGateway.admits`."""
    reader.text("name", wrong_subdomain, required="mesh")
    if reader.integer("port", 1, 65535, required=str(HBONE_PORT)) not in (0, HBONE_PORT):
        reader.error("port", f"must be {HBONE_PORT}, where callers reach a waypoint")
    ingress = "a waypoint takes mesh traffic only; write HBONE"
    reader.choice("protocol", ["HBONE"], default="", others=dict.fromkeys(("HTTP", "HTTPS", "TCP", "TLS"), ingress))
    need(reader, "protocol", "HBONE")
    reader.refuse(
        {
            "hostname": "a waypoint takes connections by address; remove it",
            "tls": "tunnels are always mTLS; remove it",
        }
    )
    allowed = reader.child("allowedRoutes")
    allowed.refuse({"kinds": _NOT_THERE})
    namespaces = allowed.child("namespaces")
    source = namespaces.choice("from", ["Same", "All", "Selector"], default="Same", others={"None": "write Same"})
    selector: dict[str, str] = {}
    if source == "Selector":
        selecting = namespaces.child("selector", required="a mapping with matchLabels")
        selecting.refuse({"matchExpressions": "only matchLabels is taken; write matchLabels"})
        selector = selecting.pairs("matchLabels", label.wrong_key, label.wrong_value, most=label.MAX_LABELS)
        if not selector and not selecting.lost:
            selecting.error("matchLabels", "names no label; name one, or write `from: All`")
        selecting.finish()
    elif namespaces.has("selector"):
        namespaces.error("selector", "stands beside `from: Selector` only; write that or remove it")
    for one in (namespaces, allowed, reader):
        one.finish()
    return None if source == "Same" else selector
