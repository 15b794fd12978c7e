"""Which rule of the HTTPRoutes of a service a request falls under, and to which backend it goes. No I/O.

Precedence is the Gateway API's (HTTPRouteRule.matches and HTTPRoute.hostnames): the most specific hostname; then an
exact path, the longest prefix, the longest expression (this is Istio's), a method, more headers, more query parameters;
then the route whose `namespace/name` comes first, and in a route the rule and match that stand first. A rule is looked
for on, not given up, when the route of the more specific hostname has none.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final
from urllib.parse import unquote_plus

from control.api.expression import Expression, expression
from control.api.route import (
    NO_MODIFIER,
    Backend,
    HeaderMatch,
    HeaderModifier,
    HTTPRoute,
    PathKind,
    PathMatch,
    QueryMatch,
    RouteRule,
)
from waypoint.messages import Fields
from waypoint.request import Request, host_name

_Query = dict[str, str]
_SEVERAL_LINES: Final = b"set-cookie"  # its values cannot be joined by commas (RFC 9110 section 5.3)
_LONGEST_NAME: Final = 253  # that DNS knows; what is longer could have thousands of labels
_MODIFIERS_KEPT: Final = 1024  # compiled; a mesh has fewer, and an old one only costs its memory


class Router:
    """The routes of one service port, compiled. Never changes; made by `compile_routes`."""

    __slots__ = ("_asks_host", "_asks_query", "_by_host", "_default", "_of_callers")

    def __init__(
        self, candidates: Iterable[_Candidate], default: RouteRule | None, of_callers: Mapping[str, Router]
    ) -> None:
        """`candidates`: of what is equal, the first wins. `of_callers`: for namespaces with routes of their own."""
        self._of_callers = of_callers
        by_host: dict[str, list[_Candidate]] = {}
        for candidate in candidates:
            by_host.setdefault(candidate.hostname, []).append(candidate)
        self._default = default
        self._asks_query = any(candidate.query for found in by_host.values() for candidate in found)
        self._by_host = {hostname: _Paths(found) for hostname, found in by_host.items()}
        self._asks_host = any(by_host)

    @property
    def callers(self) -> Iterable[str]:
        """Namespaces whose callers have routes of their own."""
        return self._of_callers.keys()

    def of(self, callers: str) -> Router:
        """The routes of the callers of one such namespace."""
        return self._of_callers[callers]

    @property
    def hostnames(self) -> Iterable[str]:
        """What routes call hosts; empty for every host."""
        return self._by_host.keys()

    def ordered(self, hostname: str) -> Iterator[RouteRule]:
        """The rules that hosts of one of `hostnames` may fall under, in the order in which they are asked, each with
        one match. One without any takes all requests.
        """
        if self._default is not None:
            yield self._default
            return
        for name in dict.fromkeys(_hostnames(hostname)):
            if name in self._by_host:
                yield from self._by_host[name].ordered()

    def route(self, request: Request, callers: str = "") -> RouteRule | None:
        """The rule that a request falls under, with the one of its matches by which it does.

        None: there are routes, and none of them matches (404). Without routes, every request falls under a rule whose
        only backend is the service itself. `callers`: the caller's namespace, whose own routes stand instead of all
        others (GEP-1426).
        """
        if self._of_callers and callers in self._of_callers:
            return self._of_callers[callers].route(request)
        if self._default is not None:
            return self._default
        query = parameters(request.query) if self._asks_query else {}
        for hostname in _hostnames(host_name(request.host)) if self._asks_host else ("",):
            paths = self._by_host.get(hostname)
            if paths is not None:
                found = paths.find(request, query)
                if found is not None:
                    return found
        return None


def compile_routes(routes: Iterable[HTTPRoute], service: str, port: int) -> Router:
    """The routes that are attached to a service (its key) and port, ready to be asked. Others are left out."""
    attached = [
        route
        for route in routes
        if any(parent.service == service and parent.port in (0, port) for parent in route.parents)
    ]
    of_callers = {
        callers: _router([route for route in attached if route.callers == callers], service, port, {})
        for callers in {route.callers for route in attached if route.callers}
    }
    return _router([route for route in attached if not route.callers], service, port, of_callers)


def _router(routes: list[HTTPRoute], service: str, port: int, of_callers: Mapping[str, Router]) -> Router:
    if not routes:
        itself = Backend(service, port, 1, NO_MODIFIER, NO_MODIFIER)
        return Router((), RouteRule("", (), NO_MODIFIER, NO_MODIFIER, (itself,), 0, 0), of_callers)
    ordered = sorted(routes, key=lambda route: route.key)
    return Router((candidate for route in ordered for candidate in _candidates(route)), None, of_callers)


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


_Test = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One match of one rule, for one of its route's hostnames."""

    hostname: str
    """As the route says it; empty: every one."""
    path: PathMatch
    method: str
    headers: tuple[tuple[str, _Test], ...]
    query: tuple[tuple[str, _Test], ...]
    rule: RouteRule
    """With this match alone."""

    def matches(self, request: Request, query: _Query) -> bool:
        """Whether a request of this host and path matches in everything else."""
        return (
            (not self.method or self.method == request.method)
            and all((value := request.header(name)) is not None and test(value) for name, test in self.headers)
            and all((value := query.get(name)) is not None and test(value) for name, test in self.query)
        )

    @property
    def precedence(self) -> tuple[int, ...]:
        """Among those of one host and path, or of expressions; the smallest goes first."""
        length = len(self.path.value) if self.path.kind is PathKind.EXPRESSION else 0
        return -length, not self.method, -len(self.headers), -len(self.query)


class _Paths:
    """The candidates of one hostname, by path: of a thousand, those that have the request's are asked."""

    __slots__ = ("_exact", "_expressions", "_lengths", "_prefixes")

    def __init__(self, candidates: list[_Candidate]) -> None:
        # The sort is stable: what is equal stays in the order of routes, rules and matches.
        candidates = sorted(candidates, key=lambda candidate: candidate.precedence)
        self._exact: dict[str, list[_Candidate]] = {}
        self._prefixes: dict[str, list[_Candidate]] = {}
        """By what a path and a slash begin with, since a prefix is one of whole elements."""
        self._expressions: list[tuple[Expression, _Candidate]] = []
        for candidate in candidates:
            path = candidate.path
            if path.kind is PathKind.EXACT:
                self._exact.setdefault(path.value, []).append(candidate)
            elif path.kind is PathKind.PREFIX:
                self._prefixes.setdefault(path.value.rstrip("/") + "/", []).append(candidate)
            else:
                self._expressions.append((expression(path.value), candidate))
        self._lengths = sorted({len(prefix) for prefix in self._prefixes}, reverse=True)

    def ordered(self) -> Iterator[RouteRule]:
        """As `find` asks them."""
        longest = sorted(self._prefixes.items(), key=lambda item: -len(item[0]))
        for candidates in (*self._exact.values(), *(found for _, found in longest)):
            for candidate in candidates:
                yield candidate.rule
        for _, candidate in self._expressions:
            yield candidate.rule

    def find(self, request: Request, query: _Query) -> RouteRule | None:
        """An exact path goes before the longest prefix, and that before an expression, as in Istio."""
        path = request.path
        for candidate in self._exact.get(path, ()):
            if candidate.matches(request, query):
                return candidate.rule
        path += "/"
        for length in self._lengths:
            if length <= len(path) and path[length - 1] == "/":
                for candidate in self._prefixes.get(path[:length], ()):
                    if candidate.matches(request, query):
                        return candidate.rule
        for asked, candidate in self._expressions:
            if asked.matches(request.path) and candidate.matches(request, query):
                return candidate.rule
        return None


def _candidates(route: HTTPRoute) -> Iterator[_Candidate]:
    for rule in route.rules:
        for match in rule.matches:
            for hostname in route.hostnames or ("",):
                yield _Candidate(
                    hostname=hostname,
                    path=match.path,
                    method=match.method,
                    headers=tuple((header.name, _test(header)) for header in match.headers),
                    query=tuple((parameter.name, _test(parameter)) for parameter in match.query),
                    rule=rule if len(rule.matches) == 1 else replace(rule, matches=(match,)),
                )


def _test(asked: HeaderMatch | QueryMatch) -> _Test:
    return expression(asked.value).matches if asked.expression else asked.value.__eq__


def _hostnames(name: str) -> Iterator[str]:
    """What routes may call a host: itself, with most labels first `*` and what follows them, and not at all."""
    yield name
    dot = name.find(".") if len(name) <= _LONGEST_NAME else -1
    while dot >= 0:
        yield "*" + name[dot:]
        dot = name.find(".", dot + 1)
    yield ""


def parameters(query: str) -> _Query:
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
