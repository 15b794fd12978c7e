"""`gateway.networking.k8s.io` Gateway (class `istio-waypoint`) and HTTPRoute (of Services), read from documents.

Gateway API v1; what a waypoint does not do is refused by name: a route that half holds is worse than none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from control.api import labels as label
from control.api.address import HBONE_PORT
from control.api.declared import DeclaredGateway, DeclaredRoute
from control.api.document import Reader
from control.api.gateway import Traffic
from control.api.http_text import wrong_field_value, wrong_header_name
from control.api.labels import Labels
from control.api.metadata import read_metadata
from control.api.names import key, wrong_dns_label, wrong_service_name, wrong_subdomain
from control.api.problems import shown
from control.api.route import (
    MAX_TIMEOUT_MS,
    MAX_WEIGHT,
    METHODS,
    NO_MODIFIER,
    Backend,
    HeaderMatch,
    HeaderModifier,
    HTTPRoute,
    Match,
    Parent,
    PathKind,
    PathMatch,
    QueryMatch,
    RouteRule,
    canonical_route_path,
    wrong_expression,
    wrong_hostname,
    wrong_modified,
    wrong_query_name,
    wrong_query_value,
)

GATEWAY_CLASS: Final = "istio-waypoint"

_NOT_THERE: Final = "it is not implemented; remove it"
_EXPRESSION: Final = PathKind.EXPRESSION.value
_FILTERS: Final = ("RequestHeaderModifier", "ResponseHeaderModifier")
_OTHER_FILTERS: Final = dict.fromkeys(
    ("RequestMirror", "RequestRedirect", "URLRewrite", "ExtensionRef", "CORS"), "it is not implemented"
)
_DURATION: Final = re.compile(r"([0-9]{1,5}(h|ms|m|s)){1,4}")
_DURATION_PART: Final = re.compile(r"([0-9]+)(h|ms|m|s)")
_UNIT_MS: Final = {"h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}

_T = TypeVar("_T")


def read_gateway(document: Reader) -> DeclaredGateway:
    """Reads a Gateway."""
    metadata = read_metadata(document, wrong_subdomain, own_labels=(label.WAYPOINT_FOR,))
    traffic = metadata.labels.get(label.WAYPOINT_FOR, Traffic.SERVICE.value)
    known = [one.value for one in Traffic]
    if traffic not in known:
        problem = f"{shown(traffic)} must be one of {', '.join(known)}"
        document.error_at(f"metadata.labels[{label.WAYPOINT_FOR!r}]", problem)
    spec = document.child("spec", required="a mapping with gatewayClassName and listeners")
    spec.choice("gatewayClassName", [GATEWAY_CLASS], default="", others={})
    _need(spec, "gatewayClassName", GATEWAY_CLASS)
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
    _need(spec, "listeners", "[{name: mesh, port: 15008, protocol: HBONE}]")
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
    )


def _read_listener(reader: Reader) -> Labels | None:
    """The namespaces that it admits, as `DeclaredGateway.admits`."""
    reader.text("name", wrong_subdomain, required="mesh")
    if reader.integer("port", 1, 65535, required=str(HBONE_PORT)) not in (0, HBONE_PORT):
        reader.error("port", f"must be {HBONE_PORT}, where callers reach a waypoint")
    ingress = "a waypoint takes mesh traffic only; write HBONE"
    reader.choice("protocol", ["HBONE"], default="", others=dict.fromkeys(("HTTP", "HTTPS", "TCP", "TLS"), ingress))
    _need(reader, "protocol", "HBONE")
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


def read_http_route(document: Reader) -> DeclaredRoute:
    """Reads an HTTPRoute."""
    metadata = read_metadata(document, wrong_subdomain)
    spec = document.child("spec", required="a mapping with parentRefs and rules")
    spec.refuse({"useDefaultGateways": _NOT_THERE})
    parents = tuple(_read_parent(reader, metadata.namespace) for reader in spec.children("parentRefs"))
    _need(spec, "parentRefs", "a list such as [{group: '', kind: Service, name: reviews}]")
    for index, parent in enumerate(parents):
        if parent in parents[:index]:
            spec.error("parentRefs", f"names Service {parent.service} twice; remove one")
    hostnames = spec.parsed_list("hostnames", _hostname)
    if len(set(hostnames)) != len(hostnames):
        spec.error("hostnames", "names a host twice; remove one")
    rules = spec.children("rules")
    _need(spec, "rules", "a list such as [{backendRefs: [{name: reviews-v1, port: 80}]}]")
    route = HTTPRoute(
        namespace=metadata.namespace,
        name=metadata.name,
        parents=parents,
        hostnames=hostnames,
        rules=tuple(_read_rule(reader, metadata.namespace) for reader in rules),
    )
    names = [rule.name for rule in route.rules if rule.name]
    if len(set(names)) != len(names):
        spec.error("rules", "gives two rules one name; rename one")
    spec.finish()
    return DeclaredRoute(route, document.position)


def _need(reader: Reader, name: str, expected: str) -> None:
    if not reader.has(name) and not reader.lost:
        reader.error(name, f"is missing; it must be {expected}")


def _hostname(text: str) -> str:
    if problem := wrong_hostname(text):
        raise ValueError(problem)
    return text


def _read_parent(reader: Reader, namespace: str) -> Parent:
    ingress = "there is no ingress gateway; attach the route to a Service"
    reader.choice("kind", ["Service"], default="", others={"Gateway": ingress, "ServiceEntry": _NOT_THERE})
    _need(reader, "kind", "Service")
    reader.refuse({"sectionName": "it is not implemented; write port"})
    service = _read_service(reader, namespace)
    parent = Parent(service, reader.integer("port", 1, 65535))
    reader.finish()
    return parent


def _read_service(reader: Reader, namespace: str) -> str:
    """Key of the Service that a reference names."""
    reader.text("group", lambda text: f"{shown(text)} must be '' for a Service" if text not in ("", "core") else "")
    other = reader.text("namespace", wrong_dns_label, default=namespace)
    if other != namespace:
        reader.error("namespace", f"must be {namespace}, the route's own: references across namespaces are not there")
    return key(namespace, reader.text("name", wrong_service_name, required="the name of a Service of this namespace"))


def _read_rule(reader: Reader, namespace: str) -> RouteRule:
    reader.refuse(dict.fromkeys(("retry", "sessionPersistence"), _NOT_THERE))
    request, response = _read_filters(reader)
    matches = tuple(_read_match(item) for item in reader.children("matches"))
    timeout, backend_timeout = _read_timeouts(reader.child("timeouts"))
    rule = RouteRule(
        name=reader.text("name", wrong_subdomain),
        matches=matches or (Match(PathMatch(PathKind.PREFIX, "/"), (), (), ""),),
        request=request,
        response=response,
        backends=tuple(_read_backend(item, namespace) for item in reader.children("backendRefs")),
        timeout_ms=timeout,
        backend_timeout_ms=backend_timeout,
    )
    reader.finish()
    return rule


def _read_timeouts(reader: Reader) -> tuple[int, int]:
    """Those of the request and of each attempt, in milliseconds."""
    whole = reader.parsed("request", _milliseconds) or 0
    attempt = reader.parsed("backendRequest", _milliseconds) or 0
    if whole and attempt > whole:
        reader.error("backendRequest", "is longer than request, which ends it anyway; make it shorter")
    reader.finish()
    return whole, attempt


def _milliseconds(text: str) -> int:
    """Gateway API's duration (GEP-2257), as `1m30s`."""
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{shown(text)} is no duration, such as 500ms, 10s or 1m30s")
    found = sum(int(number) * _UNIT_MS[unit] for number, unit in _DURATION_PART.findall(text))
    if found > MAX_TIMEOUT_MS:
        raise ValueError(f"{shown(text)} is longer than a day; write 0s for no timeout")
    return found


def _read_match(reader: Reader) -> Match:
    path = reader.child("path")
    kinds = [kind.value for kind in PathKind]
    kind = PathKind(path.choice("type", kinds, default=PathKind.PREFIX.value))
    value = path.parsed("value", lambda text: canonical_route_path(kind, text))
    path.finish()
    match = Match(
        path=PathMatch(kind, value or "/"),
        headers=tuple(
            _read_asked(item, HeaderMatch, _lower_header(wrong_header_name), wrong_field_value)
            for item in reader.children("headers")
        ),
        query=tuple(
            _read_asked(item, QueryMatch, _as_is(wrong_query_name), wrong_query_value)
            for item in reader.children("queryParams")
        ),
        method=reader.choice("method", METHODS, default="", others={}),
    )
    _check_once(reader, "headers", (header.name for header in match.headers))
    _check_once(reader, "queryParams", (parameter.name for parameter in match.query))
    reader.finish()
    return match


def _read_asked(
    reader: Reader, make: Callable[[str, str, bool], _T], name: Callable[[str], str], wrong_value: Callable[[str], str]
) -> _T:
    """One {type, name, value} that is compared."""
    by_expression = reader.choice("type", ["Exact", _EXPRESSION], default="Exact") == _EXPRESSION
    found = make(
        reader.parsed("name", name, required="a name") or "",
        reader.text("value", wrong_expression if by_expression else wrong_value, required="text to compare with"),
        by_expression,
    )
    reader.finish()
    return found


def _lower_header(wrong: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: _as_is(wrong)(text.lower())


def _as_is(wrong: Callable[[str], str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if problem := wrong(text):
            raise ValueError(problem)
        return text

    return parse


def _check_once(reader: Reader, name: str, found: Iterable[str]) -> None:
    names = [item for item in found if item]
    for item in sorted({item for item in names if names.count(item) > 1}):
        reader.error(name, f"names {shown(item)} twice; only one of them could count: remove one")


def _read_backend(reader: Reader, namespace: str) -> Backend:
    reader.choice("kind", ["Service"], default="Service", others={"ServiceImport": _NOT_THERE})
    request, response = _read_filters(reader)
    backend = Backend(
        service=_read_service(reader, namespace),
        port=reader.integer("port", 1, 65535, required="a port of the Service", default=1),
        weight=reader.integer("weight", 0, MAX_WEIGHT, default=1),
        request=request,
        response=response,
    )
    reader.finish()
    return backend


def _read_filters(reader: Reader) -> tuple[HeaderModifier, HeaderModifier]:
    """What becomes of the headers of requests and of responses."""
    found: dict[str, HeaderModifier] = {}
    for item in reader.children("filters"):
        kind = item.choice("type", _FILTERS, default="", others=_OTHER_FILTERS)
        _need(item, "type", " or ".join(_FILTERS))
        for name in _FILTERS:
            field = name[0].lower() + name[1:]
            if name == kind:
                modifier = _read_modifier(item.child(field, required="a mapping with set, add or remove"))
                if kind in found:
                    item.error("type", f"{kind} stands twice here; make them one")
                found[kind] = modifier
            elif item.has(field):
                item.error(field, f"belongs to type {name}; this is {kind or 'none'}")
        item.finish()
    return found.get(_FILTERS[0], NO_MODIFIER), found.get(_FILTERS[1], NO_MODIFIER)


def _read_modifier(reader: Reader) -> HeaderModifier:
    name = _lower_header(wrong_modified)

    def pairs(field: str) -> tuple[tuple[str, str], ...]:
        return tuple(_read_header(item, name) for item in reader.children(field))

    modifier = HeaderModifier(pairs("set"), pairs("add"), reader.parsed_list("remove", name))
    named = [header for header, _ in (*modifier.set, *modifier.add)] + list(modifier.remove)
    _check_once(reader, "", named)
    if not named and not reader.lost:
        reader.error("", "names no header; write set, add or remove")
    reader.finish()
    return modifier


def _read_header(reader: Reader, name: Callable[[str], str]) -> tuple[str, str]:
    found = (
        reader.parsed("name", name, required="a name") or "",
        reader.text("value", wrong_field_value, required="text"),
    )
    reader.finish()
    return found
