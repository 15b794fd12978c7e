"""Which rule of the HTTPRoutes of a service a request falls under, and to which backend it goes. No I/O.

Precedence is the Gateway API's (HTTPRouteRule.matches and HTTPRoute.hostnames): the most specific hostname; then an
exact path, the longest prefix, a method, more headers, more query parameters; then the route whose `namespace/name`
comes first, and in a route the rule and match that stand first. A rule is looked for on, not given up, when the route
of the more specific hostname has none.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from urllib.parse import unquote_plus

from control.api.route import (
    NO_MODIFIER,
    Backend,
    HeaderModifier,
    HTTPRoute,
    Match,
    PathKind,
    PathMatch,
    RouteRule,
)
from waypoint.http1_messages import Fields
from waypoint.request import Request, host_name

_Query = dict[str, str]
_SEVERAL_LINES: Final = b"set-cookie"  # its values cannot be joined by commas (RFC 9110 section 5.3)
_MODIFIERS_KEPT: Final = 1024  # compiled; a mesh has fewer, and an old one only costs its memory


class Router:
    """The routes of one service port, compiled. Never changes; made by `compile_routes`."""

    __slots__ = ("_asks_query", "_candidates", "_default")

    def __init__(self, candidates: tuple[_Candidate, ...], default: RouteRule | None) -> None:
        self._candidates = candidates
        self._default = default
        self._asks_query = any(candidate.query for candidate in candidates)

    def route(self, request: Request) -> RouteRule | None:
        """The rule that a request falls under. None: there are routes, and none of them matches (404).

        Without routes, every request falls under a rule whose only backend is the service itself.
        """
        if self._default is not None:
            return self._default
        query = _parameters(request.query) if self._asks_query else {}
        path = request.path
        below = path + "/"
        for candidate in self._candidates:
            # The path is compared here and not in a call: of many rules it tells most apart.
            found = path == candidate.path if candidate.exact else below.startswith(candidate.path)
            if found and candidate.matches(request, query):
                return candidate.rule
        return None


def compile_routes(routes: Iterable[HTTPRoute], service: str, port: int) -> Router:
    """The routes that are attached to a service (its key) and port, ready to be asked. Others are left out."""
    attached = [
        route
        for route in routes
        if any(parent.service == service and parent.port in (0, port) for parent in route.parents)
    ]
    if not attached:
        itself = Backend(service, port, 1, NO_MODIFIER, NO_MODIFIER)
        return Router((), RouteRule("", (), NO_MODIFIER, NO_MODIFIER, (itself,), 0, 0))
    ordered = sorted(attached, key=lambda route: route.key)
    candidates = [candidate for route in ordered for candidate in _candidates(route)]
    # The sort is stable: what is equal stays in the order of routes, rules and matches.
    return Router(tuple(sorted(candidates, key=lambda candidate: candidate.precedence)), None)


def choose_backend(rule: RouteRule, rng: random.Random) -> Backend | None:
    """One of the rule's backends, drawn with its weight. None when no backend has any (500)."""
    backends = rule.backends
    if len(backends) == 1:
        return backends[0] if backends[0].weight else None
    total = sum(backend.weight for backend in backends)
    left = rng.randrange(total) if total else 0
    for backend in backends:
        left -= backend.weight
        if left < 0:
            return backend
    return None


def modified(fields: Fields, *modifiers: HeaderModifier) -> Fields:
    """The fields of a head with what modifiers make of them, one after the other.

    A request meets the modifier of the rule first and the backend's last, a response the other way round.
    """
    for modifier in modifiers:
        if modifier is not NO_MODIFIER:
            fields = _compiled(modifier).apply(fields)
    return fields


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One match of one rule, for one of its route's hostnames."""

    exact: bool
    path: str
    """The path, or what its path and a slash begin with: a prefix is one of whole elements."""
    method: str
    headers: tuple[tuple[str, str], ...]
    query: tuple[tuple[str, str], ...]
    host: Callable[[str], bool] | None
    rule: RouteRule
    precedence: tuple[int, ...]
    """The smallest goes first."""

    def matches(self, request: Request, query: _Query) -> bool:
        """Whether a request whose path matches does so in everything else."""
        return (
            (not self.method or self.method == request.method)
            and (self.host is None or self.host(host_name(request.host)))
            and all(request.header(name) == value for name, value in self.headers)
            and all(query.get(name) == value for name, value in self.query)
        )


def _candidates(route: HTTPRoute) -> Iterable[_Candidate]:
    for rule in route.rules:
        for match in rule.matches:
            for hostname in route.hostnames or ("",):
                yield _Candidate(
                    exact=match.path.kind is PathKind.EXACT,
                    path=match.path.value if match.path.kind is PathKind.EXACT else _prefix(match.path) + "/",
                    method=match.method,
                    headers=tuple((header.name, header.value) for header in match.headers),
                    query=tuple((parameter.name, parameter.value) for parameter in match.query),
                    host=_host_test(hostname) if hostname else None,
                    rule=rule,
                    precedence=(*_host_precedence(hostname), *_match_precedence(match)),
                )


def _host_precedence(hostname: str) -> tuple[int, int]:
    """Most characters in a hostname without wildcard, then most characters in any."""
    return (0 if hostname.startswith("*.") else -len(hostname), -len(hostname))


def _match_precedence(match: Match) -> tuple[int, ...]:
    exact = match.path.kind is PathKind.EXACT
    return (
        not exact,
        0 if exact else -len(_prefix(match.path)),
        not match.method,
        -len(match.headers),
        -len(match.query),
    )


def _prefix(path: PathMatch) -> str:
    """Without a slash at its end, which says nothing; empty: every path."""
    return path.value.rstrip("/")


def _host_test(hostname: str) -> Callable[[str], bool]:
    if hostname.startswith("*."):
        suffix = hostname[1:]
        return lambda name: name.endswith(suffix) and name != suffix
    return hostname.__eq__


def _parameters(query: str) -> _Query:
    """Query parameters by name, decoded as forms are. Of several with one name the first counts (Gateway API)."""
    found: _Query = {}
    for pair in query[1:].split("&"):
        name, _, value = pair.partition("=")
        found.setdefault(unquote_plus(name), unquote_plus(value))
    return found


@dataclass(frozen=True, slots=True)
class _Modifier:
    """A HeaderModifier as bytes."""

    set: tuple[tuple[bytes, bytes], ...]
    add: tuple[tuple[bytes, bytes], ...]
    dropped: frozenset[bytes]
    """What `set` replaces, and what is removed."""
    removed: frozenset[bytes]

    def apply(self, fields: Fields) -> Fields:
        changed = [(name, value) for name, value in fields if name not in self.dropped]
        changed += [(name, value) for name, value in self.set if name not in self.removed]
        for name, value in self.add:
            if name not in self.removed:
                changed = _appended(changed, name, value)
        return changed


def _appended(fields: list[tuple[bytes, bytes]], name: bytes, value: bytes) -> list[tuple[bytes, bytes]]:
    """With the value at the end of the field's last line, or in a line of its own if the field is new."""
    if name == _SEVERAL_LINES:
        return [*fields, (name, value)]
    for index in range(len(fields) - 1, -1, -1):
        if fields[index][0] == name:
            fields[index] = (name, fields[index][1] + b"," + value)
            return fields
    return [*fields, (name, value)]


@lru_cache(maxsize=_MODIFIERS_KEPT)
def _compiled(modifier: HeaderModifier) -> _Modifier:
    def encoded(pairs: Sequence[tuple[str, str]]) -> tuple[tuple[bytes, bytes], ...]:
        return tuple((name.encode("ascii"), value.encode("latin-1")) for name, value in pairs)

    removed = frozenset(name.encode("ascii") for name in modifier.remove)
    replaced = encoded(modifier.set)
    return _Modifier(replaced, encoded(modifier.add), removed.union(name for name, _ in replaced), removed)
