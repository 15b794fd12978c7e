"""`gateway.networking.k8s.io` HTTPRoute, GRPCRoute and ReferenceGrant, of Services, read from documents.

Gateway API v1. What a waypoint does not do is refused by name: a route that half holds is worse than none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from control.api.declared import DeclaredGrant, DeclaredRoute
from control.api.document import Reader
from control.api.durations import milliseconds
from control.api.filter_api import (
    HTTP_FILTERS,
    as_is,
    check_once,
    lower_header,
    need,
    read_filters,
    read_kind,
    read_service,
    wrong_group,
)
from control.api.filters import Replaced
from control.api.http_text import wrong_field_value, wrong_header_name
from control.api.metadata import read_metadata
from control.api.names import wrong_dns_label, wrong_service_name, wrong_subdomain
from control.api.problems import shown
from control.api.route import (
    MAX_ATTEMPTS,
    MAX_WEIGHT,
    METHODS,
    Backend,
    HeaderMatch,
    HTTPRoute,
    Match,
    Parent,
    PathKind,
    PathMatch,
    QueryMatch,
    Retry,
    RouteRule,
    canonical_route_path,
    wrong_expression,
    wrong_hostname,
    wrong_query_name,
    wrong_query_value,
)

ROUTES: Final = ("HTTPRoute", "GRPCRoute")
_GROUP: Final = "gateway.networking.k8s.io"
_NO_ONE: Final = "nobody here refers to another namespace by it"
_NOT_THERE: Final = "it is not implemented; remove it"
_EXPRESSION: Final = PathKind.EXPRESSION.value
_BACKEND_FILTERS: Final = tuple(
    kind for kind in HTTP_FILTERS if kind != "CORS"
)  # which asks before a backend is chosen
_GRPC_FILTERS: Final = ("RequestHeaderModifier", "ResponseHeaderModifier", "RequestMirror")  # Gateway API's
_GRPC_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,1023}(\.[A-Za-z_][A-Za-z0-9_]{0,1023}){0,64}")
_ANY_ELEMENT: Final = "[^/]+"
_EVERYTHING: Final = Match(PathMatch(PathKind.PREFIX, "/"), (), (), "")
_ATTEMPTS: Final = 2  # Istio's, where nothing is said
_BACKOFF_MS: Final = 25  # Envoy's

_T = TypeVar("_T")


def read_http_route(document: Reader) -> DeclaredRoute:
    """Reads an HTTPRoute."""
    return _read_route(document, "HTTPRoute", _read_rule)


def read_grpc_route(document: Reader) -> DeclaredRoute:
    """Reads a GRPCRoute: the same to a waypoint, since a method of gRPC is a path (gRPC over HTTP/2, `:path`)."""
    return _read_route(document, "GRPCRoute", _read_grpc_rule)


def _read_route(document: Reader, kind: str, read_rule: Callable[[Reader, str], RouteRule]) -> DeclaredRoute:
    metadata = read_metadata(document, wrong_subdomain)
    spec = document.child("spec", required="a mapping with parentRefs and rules")
    spec.refuse({"useDefaultGateways": _NOT_THERE})
    parents = [_read_parent(reader, metadata.namespace) for reader in spec.children("parentRefs")]
    need(spec, "parentRefs", "a list such as [{group: '', kind: Service, name: reviews}]")
    for index, parent in enumerate(parents):
        if parent in parents[:index]:
            spec.error("parentRefs", f"names Service {parent[0].service} twice; remove one")
    hostnames = spec.parsed_list("hostnames", _hostname)
    if len(set(hostnames)) != len(hostnames):
        spec.error("hostnames", "names a host twice; remove one")
    rules = spec.children("rules")
    need(spec, "rules", "a list such as [{backendRefs: [{name: reviews-v1, port: 80}]}]")
    route = HTTPRoute(
        namespace=metadata.namespace,
        name=metadata.name,
        parents=tuple(parent for parent, _ in parents),
        hostnames=hostnames,
        rules=tuple(read_rule(reader, metadata.namespace) for reader in rules),
    )
    names = [rule.name for rule in route.rules if rule.name]
    if len(set(names)) != len(names):
        spec.error("rules", "gives two rules one name; rename one")
    spec.finish()
    return DeclaredRoute(kind, route, tuple(section for _, section in parents), document.position)


def _hostname(text: str) -> str:
    if problem := wrong_hostname(text):
        raise ValueError(problem)
    return text


def _read_parent(reader: Reader, namespace: str) -> tuple[Parent, str]:
    """The parent, and the name of the port that it means."""
    ingress = "there is no ingress gateway; attach the route to a Service"
    reader.choice("kind", ["Service"], default="", others={"Gateway": ingress, "ServiceEntry": _NOT_THERE})
    need(reader, "kind", "Service")
    service = read_service(reader, namespace)
    parent = Parent(service, reader.integer("port", 1, 65535))
    section = reader.text("sectionName", wrong_dns_label)
    reader.finish()
    return parent, section


def _read_rule(reader: Reader, namespace: str) -> RouteRule:
    reader.refuse({"sessionPersistence": _NOT_THERE})
    request, response, filters = read_filters(reader, namespace)
    matches = tuple(_read_match(item) for item in reader.children("matches"))
    timeout, backend_timeout = _read_timeouts(reader.child("timeouts"))
    rule = RouteRule(
        name=reader.text("name", wrong_subdomain),
        matches=matches or (_EVERYTHING,),
        request=request,
        response=response,
        backends=tuple(_read_backend(item, namespace, _BACKEND_FILTERS) for item in reader.children("backendRefs")),
        timeout_ms=timeout,
        backend_timeout_ms=backend_timeout,
        filters=filters,
        retry=_read_retry(reader.child("retry")) if reader.has("retry") else None,
    )
    _check_rule(reader, rule)
    reader.finish()
    return rule


def _check_rule(reader: Reader, rule: RouteRule) -> None:
    """What Gateway API lets no rule say together."""
    if rule.filters.redirect is not None and rule.backends:
        reader.error("backendRefs", "stands beside RequestRedirect, which sends requests to no backend; remove one")
    changes = [
        one for filters in (rule.filters, *(backend.filters for backend in rule.backends)) for one in filters.paths
    ]
    if any(change.kind is Replaced.PREFIX for change in changes) and any(
        match.path.kind is not PathKind.PREFIX for match in rule.matches
    ):
        reader.error("filters", "has ReplacePrefixMatch, and a match by no prefix; write PathPrefix or ReplaceFullPath")


def _read_retry(reader: Reader) -> Retry:
    codes = reader.integers("codes", 400, 599)
    check_once(reader, "codes", map(str, codes))
    backoff = reader.parsed("backoff", milliseconds)
    retry = Retry(
        codes=tuple(sorted(codes)),
        attempts=reader.integer("attempts", 1, MAX_ATTEMPTS, default=_ATTEMPTS),
        backoff_ms=_BACKOFF_MS if backoff is None else backoff,
    )
    reader.finish()
    return retry


def _read_timeouts(reader: Reader) -> tuple[int, int]:
    """Those of the request and of each attempt, in milliseconds."""
    whole = reader.parsed("request", milliseconds) or 0
    attempt = reader.parsed("backendRequest", milliseconds) or 0
    if whole and attempt > whole:
        reader.error("backendRequest", "is longer than request, which ends it anyway; make it shorter")
    reader.finish()
    return whole, attempt


def _read_match(reader: Reader) -> Match:
    path = reader.child("path")
    kinds = [kind.value for kind in PathKind]
    kind = PathKind(path.choice("type", kinds, default=PathKind.PREFIX.value))
    value = path.parsed("value", lambda text: canonical_route_path(kind, text))
    path.finish()
    match = Match(
        path=PathMatch(kind, value or "/"),
        headers=tuple(
            _read_asked(item, HeaderMatch, lower_header(wrong_header_name), wrong_field_value)
            for item in reader.children("headers")
        ),
        query=tuple(
            _read_asked(item, QueryMatch, as_is(wrong_query_name), wrong_query_value)
            for item in reader.children("queryParams")
        ),
        method=reader.choice("method", METHODS, default="", others={}),
    )
    check_once(reader, "headers", (header.name for header in match.headers))
    check_once(reader, "queryParams", (parameter.name for parameter in match.query))
    reader.finish()
    return match


def _read_grpc_rule(reader: Reader, namespace: str) -> RouteRule:
    reader.refuse({"sessionPersistence": _NOT_THERE})
    request, response, filters = read_filters(reader, namespace, _GRPC_FILTERS)
    matches = tuple(_read_grpc_match(item) for item in reader.children("matches"))
    rule = RouteRule(
        name=reader.text("name", wrong_subdomain),
        matches=matches or (_EVERYTHING,),
        request=request,
        response=response,
        backends=tuple(_read_backend(item, namespace, _GRPC_FILTERS) for item in reader.children("backendRefs")),
        timeout_ms=0,
        backend_timeout_ms=0,
        filters=filters,
    )
    reader.finish()
    return rule


def _read_grpc_match(reader: Reader) -> Match:
    headers = tuple(
        _read_asked(item, HeaderMatch, lower_header(wrong_header_name), wrong_field_value)
        for item in reader.children("headers")
    )
    check_once(reader, "headers", (header.name for header in headers))
    path = _read_grpc_method(reader.child("method")) if reader.has("method") else _EVERYTHING.path
    reader.finish()
    return Match(path, headers, (), "")


def _read_grpc_method(reader: Reader) -> PathMatch:
    """As a path: `/package.Service/Method`."""
    kind = reader.choice("type", ["Exact", _EXPRESSION], default="Exact")
    wrong = wrong_expression if kind == _EXPRESSION else _wrong_grpc_name
    service, method = reader.text("service", wrong), reader.text("method", wrong)
    if not (reader.has("service") or reader.has("method")) and not reader.lost:
        reader.error("", "asks for nothing; write service or method")
    reader.finish()
    if kind == _EXPRESSION:
        either = [f"(?:{asked})" if asked else _ANY_ELEMENT for asked in (service, method)]
        return PathMatch(PathKind.EXPRESSION, "/" + "/".join(either))
    if not service:
        return PathMatch(PathKind.EXPRESSION, f"/{_ANY_ELEMENT}/{method}")
    return PathMatch(PathKind.EXACT, f"/{service}/{method}") if method else PathMatch(PathKind.PREFIX, f"/{service}")


def _wrong_grpc_name(text: str) -> str:
    return (
        "" if _GRPC_NAME.fullmatch(text) else f"{shown(text)} is no name of gRPC's, such as package.Service or Method"
    )


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


def _read_backend(reader: Reader, namespace: str, allowed: Sequence[str]) -> Backend:
    read_kind(reader)
    request, response, filters = read_filters(reader, namespace, allowed)
    backend = Backend(
        service=read_service(reader, namespace),
        port=reader.integer("port", 1, 65535, required="a port of the Service", default=1),
        weight=reader.integer("weight", 0, MAX_WEIGHT, default=1),
        request=request,
        response=response,
        filters=filters,
    )
    reader.finish()
    return backend


def read_reference_grant(document: Reader) -> DeclaredGrant:
    """Reads a ReferenceGrant."""
    metadata = read_metadata(document, wrong_subdomain)
    spec = document.child("spec", required="a mapping with from and to")
    routes: list[tuple[str, str]] = []
    for item in spec.children("from"):
        item.choice("group", [_GROUP], default="", others={})
        need(item, "group", _GROUP)
        kind = item.choice(
            "kind", ROUTES, default="", others=dict.fromkeys(("Gateway", "TLSRoute", "TCPRoute"), _NO_ONE)
        )
        need(item, "kind", " or ".join(ROUTES))
        routes.append((kind, item.text("namespace", wrong_dns_label, required="the namespace of the routes")))
        item.finish()
    services: list[str] = []
    for item in spec.children("to"):
        item.text("group", wrong_group)
        item.choice("kind", ["Service"], default="", others=dict.fromkeys(("Secret", "ConfigMap"), _NO_ONE))
        need(item, "kind", "Service")
        services.append(item.text("name", lambda text: wrong_service_name(text) if text else ""))
        item.finish()
    need(spec, "from", f"a list such as [{{group: {_GROUP}, kind: HTTPRoute, namespace: shop}}]")
    need(spec, "to", "a list such as [{group: '', kind: Service}]")
    spec.finish()
    every = "" in services
    return DeclaredGrant(
        metadata.namespace, metadata.name, tuple(routes), () if every else tuple(services), document.position
    )
