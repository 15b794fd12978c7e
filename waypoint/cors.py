"""What browsers are told of a route that has a CORS filter. No I/O.

Gateway API's HTTPCORSFilter; https://fetch.spec.whatwg.org/#http-cors-protocol. A preflight is answered here, and no
backend is asked. Whether a page may do something is the browser's to enforce, by what it is told: who may call at all
is for policy, which was asked before. What a backend says of CORS does not count where a route says it.
"""

from __future__ import annotations

import re
from typing import Final

from control.api.filters import ANY, Cors
from waypoint.messages import NO_BODY, Fields, ResponseHead
from waypoint.request import Request

_LABELS: Final = re.compile(r"[a-z0-9_.-]+")
_SAFE: Final = frozenset(("GET", "HEAD", "POST"))  # those that need no leave: CORS-safelisted methods
_OURS: Final = frozenset(
    (
        b"access-control-allow-credentials",
        b"access-control-allow-headers",
        b"access-control-allow-methods",
        b"access-control-allow-origin",
        b"access-control-expose-headers",
        b"access-control-max-age",
    )
)


def is_preflight(request: Request) -> bool:
    """Whether a browser asks, before it sends the request itself."""
    return (
        request.method == "OPTIONS"
        and request.header("origin") is not None
        and request.header("access-control-request-method") is not None
    )


def preflight(cors: Cors, request: Request) -> ResponseHead:
    """The answer to one. Without any leave in it where the origin has none."""
    fields: list[tuple[bytes, bytes]] = [(b"vary", b"origin")]
    allowed = _allowed_origin(cors, request)
    if allowed:
        asked_method = request.header("access-control-request-method") or ""
        asked_headers = request.header("access-control-request-headers") or ""
        fields += _origin_fields(cors, allowed)
        if cors.methods == (ANY,):
            methods = asked_method if cors.credentials else ANY
        else:
            methods = ", ".join(cors.methods or sorted(_SAFE))
        fields.append((b"access-control-allow-methods", methods.encode("latin-1")))
        # With credentials `*` is a header of that name, so that those which were asked for are named.
        headers = (asked_headers if cors.credentials else ANY) if cors.headers == (ANY,) else ", ".join(cors.headers)
        if headers:
            fields.append((b"access-control-allow-headers", headers.encode("latin-1")))
        fields.append((b"access-control-max-age", b"%d" % cors.max_age_s))
    return ResponseHead(204, b"No Content", fields, NO_BODY)


def answered(cors: Cors, request: Request, fields: Fields) -> Fields:
    """The fields of a response, with what its page may do with it."""
    kept = [(name, value) for name, value in fields if name not in _OURS]
    kept.append((b"vary", b"origin"))
    allowed = _allowed_origin(cors, request)
    if allowed:
        kept += _origin_fields(cors, allowed)
        # As above; of responses nobody names headers beforehand, so those that there are.
        exposed = cors.exposed
        if exposed == (ANY,) and cors.credentials:
            exposed = tuple(sorted({name.decode("ascii") for name, _ in fields}))
        if exposed:
            kept.append((b"access-control-expose-headers", ", ".join(exposed).encode("ascii")))
    return kept


def _origin_fields(cors: Cors, allowed: str) -> list[tuple[bytes, bytes]]:
    fields = [(b"access-control-allow-origin", allowed.encode("latin-1"))]
    if cors.credentials:
        fields.append((b"access-control-allow-credentials", b"true"))
    return fields


def _allowed_origin(cors: Cors, request: Request) -> str:
    """What is said of the origin; empty: nothing."""
    origin = request.header("origin")
    if origin is None:
        return ""
    if ANY in cors.origins:
        return origin if cors.credentials else ANY
    return origin if any(_matches(pattern, origin.lower()) for pattern in cors.origins) else ""


def _matches(pattern: str, origin: str) -> bool:
    """A `*` stands for any number of labels, and for no port."""
    if ANY not in pattern:
        return pattern == origin
    before, _, after = pattern.partition(ANY)
    named = origin[len(before) : len(origin) - len(after)]
    return origin.startswith(before) and origin.endswith(after) and _LABELS.fullmatch(named) is not None
