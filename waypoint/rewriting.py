"""What routes make of a request's host and path: redirects, and rewrites for a backend. No I/O.

Gateway API's HTTPRequestRedirectFilter, HTTPURLRewriteFilter and HTTPPathModifier. A query stays what it was.
"""

from __future__ import annotations

from typing import Final

from control.api.filters import PathChange, Redirect, Replaced, Rewrite
from control.api.route import RouteRule
from waypoint.messages import Fields
from waypoint.request import Request, host_name

_PORTS: Final = {"http": 80, "https": 443}


def location(redirect: Redirect, rule: RouteRule, request: Request, port: int) -> str:
    """Where a redirect leads. `port` was dialled; a port that is the scheme's own is left out."""
    scheme = redirect.scheme or "http"  # within the mesh's tunnels it is nothing else
    name = redirect.hostname or host_name(request.host)
    wanted = redirect.port or (_PORTS[scheme] if redirect.scheme else port)
    shown = "" if wanted == _PORTS[scheme] else f":{wanted}"
    return f"{scheme}://{name}{shown}{_changed(redirect.path, rule, request.path)}{request.query}"


def rewritten(rewrite: Rewrite, rule: RouteRule, target: str, fields: Fields) -> tuple[str, Fields]:
    """The target and the fields for a backend."""
    path, question, query = target.partition("?")
    if rewrite.hostname:
        host = rewrite.hostname.encode("ascii")
        fields = [(name, host if name == b"host" else value) for name, value in fields]
    return _changed(rewrite.path, rule, path) + question + query, fields


def _changed(change: PathChange | None, rule: RouteRule, path: str) -> str:
    """`rule` has the one match by which it holds."""
    if change is None:
        return path
    if change.kind is Replaced.ALL:
        return change.value
    return change.value + path[len(rule.matches[0].path.value.rstrip("/")) :] or "/"
