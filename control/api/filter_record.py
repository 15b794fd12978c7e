"""The filters of a route's message, and back: part of `route_record`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from control.api.fields import (
    Fields,
    RecordError,
    check_distinct,
    checked,
    number_in,
    read_key,
    read_member,
    read_port,
    typed,
)
from control.api.filters import (
    ANY,
    MAX_AGE_S,
    MAX_FRACTION,
    MAX_LISTED,
    MAX_MIRRORS,
    REDIRECTS,
    SCHEMES,
    Cors,
    Filters,
    Mirror,
    PathChange,
    Redirect,
    Replaced,
    Rewrite,
    canonical_replacement,
    wrong_listed_header,
    wrong_origin,
)
from control.api.http_text import wrong_method
from control.api.messages import Body, Value
from control.api.names import key, wrong_service_name, wrong_subdomain

_DEFAULT_STATUS: Final = Redirect().status


def write_filters(filters: Filters, namespace: str) -> Body:
    """Those that are there, of a route of a namespace."""
    body: Body = {}
    if filters.redirect is not None:
        body["redirect"] = _write_redirect(filters.redirect)
    if filters.rewrite is not None:
        body["rewrite"] = _write_location(filters.rewrite.hostname, filters.rewrite.path)
    if filters.mirrors:
        body["mirrors"] = [
            [name_from(one.service, namespace), one.port, one.numerator, one.denominator] for one in filters.mirrors
        ]
    if filters.cors is not None:
        cors = filters.cors
        body["cors"] = {
            "origins": list(cors.origins),
            "methods": list(cors.methods),
            "headers": list(cors.headers),
            "exposed": list(cors.exposed),
            "credentials": cors.credentials,
            "max_age_s": cors.max_age_s,
        }
    return body


def read_filters(fields: Fields, namespace: str) -> Filters:
    """What `write_filters` wrote. Raises RecordError."""
    return Filters(
        redirect=_read_redirect(fields.take("redirect", dict)) if fields.has("redirect") else None,
        rewrite=_read_rewrite(fields.take("rewrite", dict)) if fields.has("rewrite") else None,
        mirrors=_read_mirrors(fields, namespace),
        cors=_read_cors(fields.take("cors", dict)) if fields.has("cors") else None,
    )


def name_from(service: str, namespace: str) -> str:
    """How a service's key is written in a route of a namespace: of that one it is the name alone."""
    return service.removeprefix(f"{namespace}/")


def read_service(value: Value, namespace: str, name: str) -> str:
    """The key of a service. Raises RecordError."""
    text = typed(value, str, name)
    if "/" not in text:
        return key(namespace, checked(text, wrong_service_name, name))
    if text.startswith(f"{namespace}/"):
        raise RecordError(f"{name}: {text[:80]!r} is of the route's own namespace, which is not written")
    return read_key(text, name, wrong_service_name)


def _write_redirect(redirect: Redirect) -> Body:
    body = _write_location(redirect.hostname, redirect.path)
    if redirect.scheme:
        body["scheme"] = redirect.scheme
    if redirect.port:
        body["port"] = redirect.port
    if redirect.status != _DEFAULT_STATUS:
        body["status"] = redirect.status
    return body


def _write_location(hostname: str, path: PathChange | None) -> Body:
    body: Body = {}
    if hostname:
        body["hostname"] = hostname
    if path is not None:
        body["path"] = [path.kind.value, path.value]
    return body


def _read_redirect(value: Value) -> Redirect:
    fields = Fields(value, "redirect")
    hostname, path = _read_location(fields)
    redirect = Redirect(
        scheme=_one_of(fields.take("scheme", str), SCHEMES, "scheme") if fields.has("scheme") else "",
        hostname=hostname,
        path=path,
        port=read_port(fields.take("port", int), "port") if fields.has("port") else 0,
        status=_status(fields.take("status", int)) if fields.has("status") else _DEFAULT_STATUS,
    )
    fields.finish()
    return redirect


def _status(status: int) -> int:
    if status not in REDIRECTS or status == _DEFAULT_STATUS:
        raise RecordError(f"redirect: status is {status}; {_DEFAULT_STATUS} is absent, others are {REDIRECTS}")
    return status


def _read_rewrite(value: Value) -> Rewrite:
    fields = Fields(value, "rewrite")
    rewrite = Rewrite(*_read_location(fields))
    fields.finish()
    if rewrite == Rewrite():
        raise RecordError("rewrite is empty; it must then be absent")
    return rewrite


def _read_location(fields: Fields) -> tuple[str, PathChange | None]:
    hostname = checked(fields.take("hostname", str), wrong_subdomain, "hostname") if fields.has("hostname") else ""
    return hostname, _read_change(fields.take("path", list)) if fields.has("path") else None


def _read_change(value: Value) -> PathChange:
    match value:
        case [kind_text, text]:
            change = PathChange(read_member(kind_text, Replaced, "path"), typed(text, str, "path"))
            try:
                canonical = canonical_replacement(change.kind, change.value)
            except ValueError as error:
                raise RecordError(f"path: {error}") from None
            if canonical != change.value:
                raise RecordError(f"path: {change.value!r} must be written {canonical!r}")
            return change
    raise RecordError("path must be [kind, value]")


def _read_mirrors(fields: Fields, namespace: str) -> tuple[Mirror, ...]:
    found = fields.optional_list("mirrors", lambda value, name: _read_mirror(value, namespace, name))
    if len(found) > MAX_MIRRORS:
        raise RecordError(f"mirrors has {len(found)}; at most {MAX_MIRRORS}")
    return found


def _read_mirror(value: Value, namespace: str, name: str) -> Mirror:
    match value:
        case [service, port, numerator, denominator]:
            of = number_in(denominator, 1, MAX_FRACTION, name)
            key_of_service = read_service(service, namespace, name)
            return Mirror(key_of_service, read_port(port, name), number_in(numerator, 0, of, name), of)
    raise RecordError(f"{name}: each must be [name of a service, port, numerator, denominator]")


def _read_cors(value: Value) -> Cors:
    fields = Fields(value, "cors")
    cors = Cors(
        origins=_texts(fields, "origins", wrong_origin),
        methods=_texts(fields, "methods", wrong_method),
        headers=_texts(fields, "headers", wrong_listed_header),
        exposed=_texts(fields, "exposed", wrong_listed_header),
        credentials=fields.take("credentials", bool),
        max_age_s=fields.number("max_age_s", 1, MAX_AGE_S),
    )
    fields.finish()
    if not cors.origins:
        raise RecordError("cors: origins is empty")
    return cors


def _texts(fields: Fields, name: str, wrong: Callable[[str], str]) -> tuple[str, ...]:
    found = tuple(checked(typed(item, str, name), wrong, name) for item in fields.take(name, list))
    check_distinct(found, name)
    if len(found) > MAX_LISTED or (ANY in found and len(found) > 1):
        raise RecordError(f"{name} has more than {MAX_LISTED} entries, or others beside {ANY!r}")
    return found


def _one_of(text: str, choices: tuple[str, ...], name: str) -> str:
    if text not in choices:
        raise RecordError(f"{name} is {text[:40]!r}; it must be one of {', '.join(choices)}")
    return text
