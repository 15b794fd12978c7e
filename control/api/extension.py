"""Extension, data only: what somebody adds to waypoints.

A kind of our own, as TrafficPolicy is. Each type has a section of its own in `spec`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from control.api.http_text import wrong_header_name
from control.api.problems import shown

MAX_CHECKED_BODY: Final = 65_536
"""Bytes of a request that one waits with for an answer; as many as are kept of one that may be sent again."""
MAX_CHECK_S: Final = 60
MAX_HEADERS: Final = 64
"""Of one list."""
MAX_FILTER_MS: Final = 10_000
DEFAULT_FILTER_MS: Final = 100
MAX_SETTINGS: Final = 64
MAX_SETTING: Final = 1024
"""Characters."""
MAX_INLINE: Final = 24_576
"""Bytes of code that stand in an Extension: of as many as a TrafficPolicy may name they fit into one record."""


@dataclass(frozen=True, slots=True)
class ExternalAuthorization:
    """A service that is asked over HTTP whether requests may pass: Istio's `envoyExtAuthzHttp`.

    Lists of headers are patterns over names in lower case: `exact`, `prefix*`, `*suffix`, `*`.
    """

    service: str
    """Key of a Service."""
    port: int
    timeout_ms: int
    path_prefix: str = ""
    """Before the request's own path; begins with `/`, and does not end with it."""
    fail_open: bool = False
    """Whether a request passes when there is no answer."""
    status_on_error: int = 403
    """What it is refused with otherwise."""
    checked: tuple[str, ...] = ()
    """Headers of the request that are sent along."""
    added: tuple[tuple[str, str], ...] = ()
    """Headers with their values that are sent besides, in order of their names."""
    body_bytes: int = 0
    """How much of the request's body is sent along; 0: nothing."""
    partial_body: bool = False
    """Whether of a longer body the beginning is sent; else the request is refused."""
    upstream_on_allow: tuple[str, ...] = ()
    """Headers of the answer that the request goes on with."""
    downstream_on_allow: tuple[str, ...] = ()
    """Headers of the answer that the response gets."""
    downstream_on_deny: tuple[str, ...] = ()
    """Headers of the answer that the caller gets with the refusal; none: all."""


@dataclass(frozen=True, slots=True)
class PythonFilter:
    """Python code that sees requests and responses at waypoints, in processes of its own. TrafficPolicies name it."""

    extension: str
    """Key of the Extension."""
    entry_point: str = ""
    """Its name in the group `uproxy.waypoint.filters`; empty: there is no such Extension, and requests are refused."""
    config: tuple[tuple[str, str], ...] = ()
    """What it is made with, in order of the names."""
    timeout_ms: int = DEFAULT_FILTER_MS
    """For one call."""
    fail_open: bool = False
    """Whether requests and responses go on without it when it fails."""


class Language(Enum):
    """What an Envoy runs."""

    LUA = "Lua"
    WASM = "Wasm"


@dataclass(frozen=True, slots=True)
class EnvoyFilter:
    """Code that sees requests and responses at waypoints whose engine is an Envoy, in that Envoy. TrafficPolicies name
    it. It stands here, or in a file on the waypoint's host.
    """

    extension: str
    """Key of the Extension."""
    language: Language
    inline: bytes = b""
    """Lua in UTF-8, or a module of WebAssembly."""
    file: str = ""
    """An absolute path."""
    sha256: str = ""
    """Of what the file holds, in lower case; empty exactly when there is none."""
    config: tuple[tuple[str, str], ...] = ()
    """What a module is configured with, in order of the names."""
    fail_open: bool = False
    """Whether requests and responses go on without it when it fails."""


Filter = PythonFilter | EnvoyFilter


def type_of(what: Filter) -> str:
    """The type of its Extension."""
    return what.language.value if isinstance(what, EnvoyFilter) else "PythonFilter"


def wrong_inline(code: bytes, language: Language) -> str:
    """What is wrong with code that stands in an Extension, or an empty string."""
    if not 0 < len(code) <= MAX_INLINE:
        return f"has {len(code)} bytes; from 1 to {MAX_INLINE} may stand here, more in a file"
    if language is Language.WASM:
        return "" if code.startswith(b"\0asm") else "is no module of WebAssembly: it does not begin with \\0asm"
    return "is no Lua: it has a NUL, or is compiled" if b"\0" in code or code.startswith(b"\x1b") else ""


def wrong_code_file(text: str) -> str:
    """What is wrong with the path of a file of code, or an empty string."""
    if re.fullmatch(r"/[^\0-\x1f\x7f]{1,1023}", text) and ".." not in text.split("/"):
        return ""
    return f"{shown(text)} is no absolute path of at most 1,024 characters without .."


def wrong_sha256(text: str) -> str:
    """What is wrong with a digest, or an empty string."""
    return "" if re.fullmatch(r"[0-9a-f]{64}", text) else f"{shown(text)} is no SHA-256: 64 hexadecimal digits"


def wrong_entry_point(text: str) -> str:
    """What is wrong with the name of an entry point, or an empty string."""
    if re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9_])?", text):
        return ""
    return f"{shown(text)} is no name of an entry point: letters, digits and - _ . between, at most 63"


def wrong_setting(text: str) -> str:
    """What is wrong with a setting's name or value, or an empty string."""
    return "" if len(text) <= MAX_SETTING else f"{shown(text)} has more than {MAX_SETTING} characters"


def wrong_header_pattern(text: str) -> str:
    """What is wrong with a pattern over names of headers, or an empty string."""
    if text == "*":
        return ""
    name = text[1:] if text.startswith("*") else text.removesuffix("*")
    if "*" in name or wrong_header_name(name):
        return f"{shown(text)} is no header's name in lower case, nor x-*, *-x or *"
    return ""


def wrong_path_prefix(text: str) -> str:
    """What is wrong with what stands before paths, or an empty string."""
    if text.startswith("/") and not text.endswith("/") and text.isascii() and not set(text) & set("?#\\ %"):
        return "" if text.isprintable() and len(text) <= 1024 else f"{shown(text)} has more than 1,024 characters"
    return f"{shown(text)} is no path such as /check: without a slash at its end, a query and encoded characters"
