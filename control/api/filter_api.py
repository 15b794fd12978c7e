"""The filters of Gateway API routes, read from documents, and what else routes say in the same words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from control.api.document import Reader
from control.api.filters import (
    ANY,
    MAX_AGE_S,
    MAX_FRACTION,
    MAX_LISTED,
    MAX_MIRRORS,
    NO_FILTERS,
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
from control.api.http_text import wrong_field_value
from control.api.names import key, wrong_dns_label, wrong_service_name
from control.api.problems import shown
from control.api.route import METHODS, NO_MODIFIER, HeaderModifier, wrong_hostname, wrong_modified

_FIELDS: Final = {
    "RequestHeaderModifier": "requestHeaderModifier",
    "ResponseHeaderModifier": "responseHeaderModifier",
    "RequestRedirect": "requestRedirect",
    "URLRewrite": "urlRewrite",
    "RequestMirror": "requestMirror",
    "CORS": "cors",
}
"""Type of a filter -> the field that holds it."""
HTTP_FILTERS: Final = tuple(_FIELDS)
_SEVERAL: Final = "RequestMirror"  # Gateway API: of all others one
_OTHERS: Final = {
    "ExtensionRef": "it is not implemented",
    "ExternalAuth": "it is not implemented",
}


def read_filters(
    reader: Reader, namespace: str, allowed: Sequence[str] = HTTP_FILTERS
) -> tuple[HeaderModifier, HeaderModifier, Filters]:
    """What becomes of the headers of requests and of responses, and what else is done.

    `allowed`: the types that there are here.
    """
    request = response = NO_MODIFIER
    redirect: Redirect | None = None
    rewrite: Rewrite | None = None
    mirrors: list[Mirror] = []
    cors: Cors | None = None
    kinds: list[str] = []
    for item in reader.children("filters"):
        elsewhere = {kind: f"{kind} is none of the filters here" for kind in _FIELDS if kind not in allowed}
        kind = item.choice("type", allowed, default="", others=_OTHERS | elsewhere)
        need(item, "type", " or ".join(allowed))
        if kind in kinds and kind != _SEVERAL:
            item.error("type", f"{kind} stands twice here; make them one")
        kinds.append(kind)
        for name, field in _FIELDS.items():
            if name != kind and item.has(field):
                item.error(field, f"belongs to type {name}; this is {kind or 'none'}")
        match kind:
            case "RequestHeaderModifier":
                request = _read_modifier(_content(item, kind))
            case "ResponseHeaderModifier":
                response = _read_modifier(_content(item, kind))
            case "RequestRedirect":
                redirect = _read_redirect(_content(item, kind))
            case "URLRewrite":
                rewrite = _read_rewrite(_content(item, kind))
            case "RequestMirror":
                mirrors.append(_read_mirror(_content(item, kind), namespace))
            case "CORS":
                cors = _read_cors(_content(item, kind))
        item.finish()
    if redirect is not None and rewrite is not None:
        reader.error("filters", "has RequestRedirect and URLRewrite; what is redirected goes to no backend: remove one")
    if len(mirrors) > MAX_MIRRORS:
        reader.error("filters", f"has {len(mirrors)} of RequestMirror; at most {MAX_MIRRORS} are taken")
    filters = Filters(redirect, rewrite, tuple(mirrors), cors)
    return request, response, NO_FILTERS if filters == NO_FILTERS else filters


def need(reader: Reader, name: str, expected: str) -> None:
    """Reports a field that is missing."""
    if not reader.has(name) and not reader.lost:
        reader.error(name, f"is missing; it must be {expected}")


def read_service(reader: Reader, namespace: str) -> str:
    """Key of the Service that a reference names, of a namespace that says so or of the route's own."""
    reader.text("group", wrong_group)
    of_namespace = reader.text("namespace", wrong_dns_label, default=namespace)
    return key(of_namespace, reader.text("name", wrong_service_name, required="the name of a Service"))


def wrong_group(text: str) -> str:
    """What is wrong with the group of a reference to a Service, or an empty string."""
    return f"{shown(text)} must be '' for a Service" if text not in ("", "core") else ""


def lower_header(wrong: Callable[[str], str]) -> Callable[[str], str]:
    """Reads a header's name in any case."""
    return lambda text: as_is(wrong)(text.lower())


def as_is(wrong: Callable[[str], str]) -> Callable[[str], str]:
    """Reads a text that `wrong` finds right."""

    def parse(text: str) -> str:
        if problem := wrong(text):
            raise ValueError(problem)
        return text

    return parse


def check_once(reader: Reader, name: str, found: Iterable[str]) -> None:
    """Reports names that stand twice."""
    names = [item for item in found if item]
    for item in sorted({item for item in names if names.count(item) > 1}):
        reader.error(name, f"names {shown(item)} twice; only one of them could count: remove one")


def _content(item: Reader, kind: str) -> Reader:
    return item.child(_FIELDS[kind], required="a mapping")


def _read_modifier(reader: Reader) -> HeaderModifier:
    name = lower_header(wrong_modified)

    def pairs(field: str) -> tuple[tuple[str, str], ...]:
        return tuple(_read_header(item, name) for item in reader.children(field))

    modifier = HeaderModifier(pairs("set"), pairs("add"), reader.parsed_list("remove", name))
    named = [header for header, _ in (*modifier.set, *modifier.add)] + list(modifier.remove)
    check_once(reader, "", named)
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


def _read_redirect(reader: Reader) -> Redirect:
    hostname, path = _read_location(reader)
    status = reader.integer("statusCode", 300, 399, default=302)
    if status not in REDIRECTS:
        reader.error("statusCode", f"{status} must be {' or '.join(map(str, REDIRECTS))}")
    redirect = Redirect(
        scheme=reader.choice("scheme", SCHEMES, default=""),
        hostname=hostname,
        path=path,
        port=reader.integer("port", 1, 65535),
        status=status,
    )
    reader.finish()
    return redirect


def _read_rewrite(reader: Reader) -> Rewrite:
    rewrite = Rewrite(*_read_location(reader))
    reader.finish()
    if reader.empty:
        reader.error("", "changes nothing; write hostname or path")
    return rewrite


def _read_location(reader: Reader) -> tuple[str, PathChange | None]:
    hostname = reader.parsed("hostname", _whole_hostname) or ""
    if not reader.has("path"):
        return hostname, None
    path = reader.child("path")
    kinds = [one.value for one in Replaced]
    kind = Replaced(path.choice("type", kinds, default=Replaced.ALL.value))
    need(path, "type", " or ".join(kinds))
    value = path.parsed(_REPLACEMENTS[kind], lambda text: canonical_replacement(kind, text), required="a path")
    path.finish()
    return hostname, PathChange(kind, value or "")


_REPLACEMENTS: Final = {Replaced.ALL: "replaceFullPath", Replaced.PREFIX: "replacePrefixMatch"}


def _whole_hostname(text: str) -> str:
    if problem := "a pattern is no host name" if "*" in text else wrong_hostname(text):
        raise ValueError(problem)
    return text


def _read_mirror(reader: Reader, namespace: str) -> Mirror:
    backend = reader.child("backendRef", required="a mapping with name and port")
    read_kind(backend)
    service = read_service(backend, namespace)
    port = backend.integer("port", 1, 65535, required="a port of the Service", default=1)
    backend.finish()
    numerator, denominator = reader.integer("percent", 0, 100, default=100), 100
    if reader.has("fraction"):
        if reader.has("percent"):
            reader.error("fraction", "stands beside percent; remove one")
        fraction = reader.child("fraction")
        numerator = fraction.integer("numerator", 0, MAX_FRACTION, required="a number", default=0)
        denominator = fraction.integer("denominator", 1, MAX_FRACTION, default=100)
        fraction.finish()
        if numerator > denominator:
            reader.error("fraction", f"{numerator} of {denominator} is more than all; make numerator smaller")
    reader.finish()
    return Mirror(service, port, numerator, denominator)


def read_kind(reader: Reader) -> None:
    """Of what a reference to a backend names."""
    reader.choice(
        "kind", ["Service"], default="Service", others={"ServiceImport": "InvalidKind, it is not implemented"}
    )


def _read_cors(reader: Reader) -> Cors:
    cors = Cors(
        origins=_read_listed(reader, "allowOrigins", lambda text: as_is(wrong_origin)(text.lower())),
        methods=_read_listed(reader, "allowMethods", as_is(_wrong_cors_method)),
        headers=_read_listed(reader, "allowHeaders", lower_header(wrong_listed_header)),
        exposed=_read_listed(reader, "exposeHeaders", lower_header(wrong_listed_header)),
        credentials=reader.boolean("allowCredentials", default=False),
        max_age_s=reader.integer("maxAge", 1, MAX_AGE_S, default=5),
    )
    need(reader, "allowOrigins", "a list such as [https://example.com]")
    reader.finish()
    return cors


def _read_listed(reader: Reader, name: str, parse: Callable[[str], str]) -> tuple[str, ...]:
    found = reader.parsed_list(name, parse)
    check_once(reader, name, found)
    if len(found) > MAX_LISTED:
        reader.error(name, f"has {len(found)} entries; at most {MAX_LISTED} are taken")
    if ANY in found and len(found) > 1:
        reader.error(name, "has others beside '*', which is all; remove one or the other")
    return found


def _wrong_cors_method(text: str) -> str:
    known = (*METHODS, ANY)
    return "" if text in known else f"{shown(text)} must be {' or '.join(known)}"
