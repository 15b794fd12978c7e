"""The body of a route's message, and back: part of `records`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from control.api.durations import MAX_MS
from control.api.fields import (
    Fields,
    RecordError,
    check_distinct,
    check_ordered,
    checked,
    number_in,
    read_member,
    read_port,
    typed,
)
from control.api.filter_record import name_from, read_filters, read_service, write_filters
from control.api.http_text import wrong_field_value, wrong_header_name
from control.api.messages import Body, Value
from control.api.names import key, wrong_dns_label, wrong_service_name
from control.api.route import (
    MAX_ATTEMPTS,
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
    Retry,
    RouteRule,
    canonical_route_path,
    wrong_expression,
    wrong_hostname,
    wrong_modified,
    wrong_query_name,
    wrong_query_value,
)
from control.api.topics import RouteTopic

_T = TypeVar("_T")


def write_route(route: HTTPRoute) -> Body:
    """The body."""
    return {
        "parents": [[name_from(parent.service, route.namespace), parent.port] for parent in route.parents],
        "hostnames": list(route.hostnames),
        "rules": [_write_rule(rule, route.namespace) for rule in route.rules],
        **({"callers": route.callers} if route.callers else {}),
    }


def read_route(topic: RouteTopic, fields: Fields) -> HTTPRoute:
    """The route in a body, whose rest the caller looks at. Raises RecordError."""
    parents = tuple(_read_parent(item, topic.namespace) for item in fields.take("parents", list))
    if not parents:
        raise RecordError("parents is empty")
    check_distinct(parents, "parents")
    hostnames = tuple(
        checked(typed(item, str, "hostnames"), wrong_hostname, "hostnames") for item in fields.take("hostnames", list)
    )
    check_distinct(hostnames, "hostnames")
    rules = tuple(_read_rule(item, topic.namespace) for item in fields.take("rules", list))
    if not rules:
        raise RecordError("rules is empty")
    callers = checked(fields.take("callers", str), wrong_dns_label, "callers") if fields.has("callers") else ""
    if callers and not topic.name.startswith(f"{callers}."):
        raise RecordError(f"callers is {callers}, and the name does not begin with it")
    return HTTPRoute(topic.namespace, topic.name, parents, hostnames, rules, callers)


def _write_rule(rule: RouteRule, namespace: str) -> Body:
    return {
        "name": rule.name,
        "matches": [_write_match(match) for match in rule.matches],
        **_write_modifiers(rule.request, rule.response),
        **write_filters(rule.filters, namespace),
        "backends": [
            {
                "service": name_from(backend.service, namespace),
                "port": backend.port,
                "weight": backend.weight,
                **_write_modifiers(backend.request, backend.response),
                **write_filters(backend.filters, namespace),
                **({"refused": True} if backend.refused else {}),
            }
            for backend in rule.backends
        ],
        "timeout_ms": rule.timeout_ms,
        "backend_timeout_ms": rule.backend_timeout_ms,
        **_write_retry(rule.retry),
    }


def _write_retry(retry: Retry | None) -> Body:
    if retry is None:
        return {}
    return {"retry": [list(retry.codes), retry.attempts, retry.backoff_ms]}


def _write_match(match: Match) -> Body:
    body: Body = {"path": [match.path.kind.value, match.path.value]}
    if match.headers:
        body["headers"] = [_write_asked(header) for header in match.headers]
    if match.query:
        body["query"] = [_write_asked(parameter) for parameter in match.query]
    if match.method:
        body["method"] = match.method
    return body


def _write_asked(asked: HeaderMatch | QueryMatch) -> list[Value]:
    """[name, value], or [name, expression, true]."""
    return [asked.name, asked.value, True] if asked.expression else [asked.name, asked.value]


def _write_modifiers(request: HeaderModifier, response: HeaderModifier) -> Body:
    written = {"request": _write_modifier(request), "response": _write_modifier(response)}
    return {name: modifier for name, modifier in written.items() if modifier}


def _write_modifier(modifier: HeaderModifier) -> Body:
    body: Body = {}
    if modifier.set:
        body["set"] = [[name, value] for name, value in modifier.set]
    if modifier.add:
        body["add"] = [[name, value] for name, value in modifier.add]
    if modifier.remove:
        body["remove"] = list(modifier.remove)
    return body


def _read_parent(value: Value, namespace: str) -> Parent:
    match value:
        case [name, port]:
            return Parent(
                key(namespace, checked(typed(name, str, "parents"), wrong_service_name, "parents")),
                number_in(port, 0, 65535, "parents"),
            )
    raise RecordError("parents: each must be [name of a service, port]")


def _read_rule(value: Value, namespace: str) -> RouteRule:
    fields = Fields(value, "rules")
    request, response = _read_modifiers(fields)
    rule = RouteRule(
        name=fields.take("name", str),
        matches=tuple(_read_match(item) for item in fields.take("matches", list)),
        request=request,
        response=response,
        backends=tuple(_read_backend(item, namespace) for item in fields.take("backends", list)),
        timeout_ms=fields.number("timeout_ms", 0, MAX_MS),
        backend_timeout_ms=fields.number("backend_timeout_ms", 0, MAX_MS),
        filters=read_filters(fields, namespace),
        retry=_read_retry(fields.take("retry", list)) if fields.has("retry") else None,
    )
    fields.finish()
    if not rule.matches:
        raise RecordError("matches is empty")
    return rule


def _read_match(value: Value) -> Match:
    fields = Fields(value, "matches")
    match = Match(
        path=_read_path(fields.take("path", list)),
        headers=fields.optional_list("headers", _asked(HeaderMatch, wrong_header_name, wrong_field_value)),
        query=fields.optional_list("query", _asked(QueryMatch, wrong_query_name, wrong_query_value)),
        method=_read_method(fields.take("method", str)) if fields.has("method") else "",
    )
    fields.finish()
    check_distinct([header.name for header in match.headers], "headers")
    check_distinct([parameter.name for parameter in match.query], "query")
    return match


def _read_path(value: Value) -> PathMatch:
    match value:
        case [kind_text, text]:
            kind, path = read_member(kind_text, PathKind, "path"), typed(text, str, "path")
            try:
                canonical = canonical_route_path(kind, path)
            except ValueError as error:
                raise RecordError(f"path: {error}") from None
            if canonical != path:
                raise RecordError(f"path: {path!r} must be written {canonical!r}")
            return PathMatch(kind, path)
    raise RecordError("path must be [kind, value]")


def _read_method(text: str) -> str:
    if text not in METHODS:
        raise RecordError(f"method is {text[:40]!r}; it must be one of {', '.join(METHODS)}")
    return text


def _read_backend(value: Value, namespace: str) -> Backend:
    fields = Fields(value, "backends")
    request, response = _read_modifiers(fields)
    backend = Backend(
        service=read_service(fields.take("service", str), namespace, "backends"),
        port=read_port(fields.take("port", int), "backends"),
        weight=fields.number("weight", 0, MAX_WEIGHT),
        request=request,
        response=response,
        filters=read_filters(fields, namespace),
        refused=_read_refused(fields),
    )
    fields.finish()
    if backend.filters.cors is not None:
        raise RecordError("backends: cors belongs to the rule")
    return backend


def _read_retry(value: Value) -> Retry:
    match value:
        case [[*codes], attempts, backoff_ms]:
            found = tuple(number_in(code, 400, 599, "retry") for code in codes)
            check_ordered(found, "retry")
            return Retry(
                found, number_in(attempts, 1, MAX_ATTEMPTS, "retry"), number_in(backoff_ms, 0, MAX_MS, "retry")
            )
    raise RecordError("retry must be [codes, attempts, backoff]")


def _read_refused(fields: Fields) -> bool:
    if not fields.has("refused"):
        return False
    if not fields.take("refused", bool):
        raise RecordError("refused is false; it must then be absent")
    return True


def _read_modifiers(fields: Fields) -> tuple[HeaderModifier, HeaderModifier]:
    """For requests and for responses."""
    found = [
        _read_modifier(fields.take(name, dict)) if fields.has(name) else NO_MODIFIER for name in ("request", "response")
    ]
    return found[0], found[1]


def _read_modifier(value: Value) -> HeaderModifier:
    fields = Fields(value, "modifier")
    pair = _pair(_name_and_value, wrong_modified, wrong_field_value)
    modifier = HeaderModifier(
        set=fields.optional_list("set", pair),
        add=fields.optional_list("add", pair),
        remove=fields.optional_list("remove", lambda item, name: checked(typed(item, str, name), wrong_modified, name)),
    )
    fields.finish()
    if modifier == NO_MODIFIER:
        raise RecordError("a modifier is empty; it must then be absent")
    check_distinct([name for name, _ in (*modifier.set, *modifier.add)] + list(modifier.remove), "modifier")
    return modifier


def _name_and_value(name: str, value: str) -> tuple[str, str]:
    return name, value


def _asked(
    make: Callable[[str, str, bool], _T], wrong_name: Callable[[str], str], wrong_value: Callable[[str], str]
) -> Callable[[Value, str], _T]:
    """Reads what `_write_asked` writes."""

    def read(value: Value, field: str) -> _T:
        match value:
            case [*pair, True]:
                return _pair(lambda name, text: make(name, text, True), wrong_name, wrong_expression)(pair, field)
        return _pair(lambda name, text: make(name, text, False), wrong_name, wrong_value)(value, field)

    return read


def _pair(
    make: Callable[[str, str], _T], wrong_name: Callable[[str], str], wrong_value: Callable[[str], str]
) -> Callable[[Value, str], _T]:
    """Reads [name, value]."""

    def read(value: Value, field: str) -> _T:
        match value:
            case [name, content]:
                return make(
                    checked(typed(name, str, field), wrong_name, field),
                    checked(typed(content, str, field), wrong_value, field),
                )
        raise RecordError(f"{field}: each must be [name, value]")

    return read
