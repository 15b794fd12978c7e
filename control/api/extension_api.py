"""`mesh.uproxy.dev` Extension, read from documents: an envelope with a section for each type."""

from __future__ import annotations

import base64
import binascii
from typing import Final

from control.api.declared import DeclaredExtension
from control.api.document import Reader
from control.api.durations import milliseconds
from control.api.extension import (
    DEFAULT_FILTER_MS,
    MAX_CHECK_S,
    MAX_CHECKED_BODY,
    MAX_FILTER_MS,
    MAX_HEADERS,
    MAX_SETTINGS,
    EnvoyFilter,
    ExternalAuthorization,
    Filter,
    Language,
    PythonFilter,
    wrong_code_file,
    wrong_entry_point,
    wrong_header_pattern,
    wrong_inline,
    wrong_path_prefix,
    wrong_setting,
    wrong_sha256,
)
from control.api.filter_api import need
from control.api.http_text import wrong_field_value
from control.api.metadata import read_metadata
from control.api.names import key, wrong_service_name, wrong_subdomain
from control.api.route import wrong_modified

DEFAULT_TIMEOUT_MS: Final = 1000
_SECTIONS: Final = {
    "ExternalAuthorization": "externalAuthorization",
    "PythonFilter": "pythonFilter",
    Language.LUA.value: "lua",
    Language.WASM.value: "wasm",
}
"""Type -> the field that holds it."""


def read_extension(document: Reader) -> DeclaredExtension:
    """Reads an Extension."""
    metadata = read_metadata(document, wrong_subdomain)
    spec = document.child("spec", required="a mapping with a type and its section")
    kind = spec.choice("type", list(_SECTIONS), default="")
    need(spec, "type", ", ".join(_SECTIONS))
    for other, section in _SECTIONS.items():
        if other != kind and spec.has(section):
            spec.error(section, f"belongs to type {other}; this is {kind or 'none'}")
    content: ExternalAuthorization | Filter | None = None
    if kind == "ExternalAuthorization":
        asked = spec.child(_SECTIONS[kind], required="a mapping, as {service: authz, port: 8000}")
        content = _read_external_authorization(asked, metadata.namespace)
    elif kind == "PythonFilter":
        named = spec.child(_SECTIONS[kind], required="a mapping, as {name: greeter}")
        content = _read_python_filter(named, key(metadata.namespace, metadata.name))
    elif kind:
        code = spec.child(_SECTIONS[kind], required="a mapping, as {inline: …}")
        content = _read_envoy_filter(code, Language(kind), key(metadata.namespace, metadata.name))
    spec.finish()
    return DeclaredExtension(metadata.namespace, metadata.name, content, document.position)


def _read_external_authorization(reader: Reader, namespace: str) -> ExternalAuthorization:
    """Names and meanings are those of Istio's `envoyExtAuthzHttp`."""
    service = reader.text("service", wrong_service_name, required="the name of a Service of this namespace")
    timeout_ms = reader.parsed("timeout", milliseconds)
    if timeout_ms is not None and not 1 <= timeout_ms <= MAX_CHECK_S * 1000:
        reader.error("timeout", f"must be from 1ms to {MAX_CHECK_S}s")
    added = reader.pairs("includeAdditionalHeadersInCheck", _wrong_added, wrong_field_value, most=MAX_HEADERS)
    body = reader.child("includeRequestBodyInCheck")
    found = ExternalAuthorization(
        service=key(namespace, service),
        port=reader.integer("port", 1, 65535, required="a port of that Service"),
        timeout_ms=timeout_ms or DEFAULT_TIMEOUT_MS,
        path_prefix=reader.text("pathPrefix", wrong_path_prefix),
        fail_open=reader.boolean("failOpen", default=False),
        status_on_error=reader.integer("statusOnError", 400, 599, default=403),
        checked=_patterns(reader, "includeRequestHeadersInCheck"),
        added=tuple(sorted((name.lower(), value) for name, value in added.items())),
        body_bytes=_body_bytes(reader, body),
        partial_body=body.boolean("allowPartialMessage", default=False),
        upstream_on_allow=_patterns(reader, "headersToUpstreamOnAllow"),
        downstream_on_allow=_patterns(reader, "headersToDownstreamOnAllow"),
        downstream_on_deny=_patterns(reader, "headersToDownstreamOnDeny"),
    )
    if len({name for name, _ in found.added}) != len(found.added):
        reader.error("includeAdditionalHeadersInCheck", "names a header twice; remove one")
    if found.fail_open and reader.has("statusOnError"):
        reader.error("statusOnError", "cannot stand beside failOpen: nothing is refused then; remove one")
    body.refuse({"packAsBytes": "it is of gRPC; the body is sent as it is"})
    reader.refuse(
        {
            "includeHeadersInCheck": "write includeRequestHeadersInCheck",
            "clearRouteCache": "routes are chosen after the check anyway; remove it",
        }
    )
    body.finish()
    reader.finish()
    return found


def _read_python_filter(reader: Reader, extension: str) -> PythonFilter:
    timeout_ms = reader.parsed("timeout", milliseconds)
    if timeout_ms is not None and not 1 <= timeout_ms <= MAX_FILTER_MS:
        reader.error("timeout", f"must be from 1ms to {MAX_FILTER_MS // 1000}s")
    config = reader.pairs("config", wrong_setting, wrong_setting, most=MAX_SETTINGS)
    found = PythonFilter(
        extension,
        reader.text("name", wrong_entry_point, required="the name of an entry point of group uproxy.waypoint.filters"),
        tuple(sorted(config.items())),
        timeout_ms or DEFAULT_FILTER_MS,
        reader.boolean("failOpen", default=False),
    )
    reader.finish()
    return found


def _read_envoy_filter(reader: Reader, language: Language, extension: str) -> EnvoyFilter:
    def code(text: str) -> bytes:
        inline = _module(text) if language is Language.WASM else text.encode()
        if problem := wrong_inline(inline, language):
            raise ValueError(problem)
        return inline

    if not (reader.has("inline") or reader.has("file") or reader.lost):
        reader.error("inline", "is missing; write the code, or file and sha256")
    elif reader.has("inline") and (reader.has("file") or reader.has("sha256")):
        reader.error("inline", "cannot stand beside file and sha256; remove one")
    file = reader.text("file", wrong_code_file)
    config: dict[str, str] = {}
    if language is Language.WASM:
        config = reader.pairs("config", wrong_setting, wrong_setting, most=MAX_SETTINGS)
    found = EnvoyFilter(
        extension,
        language,
        reader.parsed("inline", code) or b"",
        file,
        reader.text("sha256", wrong_sha256, required="the SHA-256 of what the file holds" if file else ""),
        tuple(sorted(config.items())),
        reader.boolean("failOpen", default=False),
    )
    if found.sha256 and not reader.has("file"):
        reader.error("sha256", "needs file")
    reader.finish()
    return found


def _module(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"is no base64: {error}") from None


def _body_bytes(reader: Reader, body: Reader) -> int:
    if not reader.has("includeRequestBodyInCheck"):
        return 0
    return body.integer("maxRequestBytes", 1, MAX_CHECKED_BODY, required=f"a number from 1 to {MAX_CHECKED_BODY}")


def _patterns(reader: Reader, name: str) -> tuple[str, ...]:
    found = reader.parsed_list(name, _pattern)
    if len(found) > MAX_HEADERS:
        reader.error(name, f"has {len(found)}; at most {MAX_HEADERS} are taken")
    return tuple(sorted(set(found)))


def _pattern(text: str) -> str:
    lower = text.lower()
    if problem := wrong_header_pattern(lower):
        raise ValueError(problem)
    return lower


def _wrong_added(name: str) -> str:
    return wrong_modified(name.lower())
