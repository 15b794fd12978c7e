"""HTTPRoutes of one place as Envoy's RouteConfiguration, in which all stands that holds for a request there. No I/O.

Envoy holds to the RouteConfiguration with which a request began, so that each request is served by one of them. The
precedence is `waypoint.routing`'s: Envoy takes the first route that matches, so they stand in that order. Of a rule
with several backends each has a route of its own, which takes its share of the numbers that Envoy draws.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from control.api.filters import ANY, Cors, Filters, Mirror, PathChange, Replaced
from control.api.route import Backend, HeaderModifier, PathKind, RouteRule
from waypoint.engine_envoy.parts import PRINCIPAL, Json, extension, header, literal, seconds
from waypoint.engine_envoy.rules import http_rules
from waypoint.engine_envoy.traffic import Limits
from waypoint.retry import MAX_KEPT
from waypoint.routing import Router
from waypoint.sides import IDEMPOTENT

_STATUSES: Final = {
    301: "MOVED_PERMANENTLY",
    302: "FOUND",
    303: "SEE_OTHER",
    307: "TEMPORARY_REDIRECT",
    308: "PERMANENT_REDIRECT",
}
_PORTS: Final = {"http": 80, "https": 443}
_MILLION: Final = 1_000_000
_IDEMPOTENT: Final = {"safe_regex": {"regex": "|".join(sorted(IDEMPOTENT))}}
_CORS_FIELDS: Final = [
    f"access-control-{name}"
    for name in ("allow-credentials", "allow-headers", "allow-methods", "allow-origin", "expose-headers", "max-age")
]
_ELSEWHERE: Final = {
    "retry_host_predicate": [
        extension("elsewhere", "extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"),
    ],
    "host_selection_retry_max_attempts": 5,
}
"""Another attempt goes to another endpoint, if drawing so often finds one."""
_DOT_SEGMENT: Final = ".*/[.]{1,2};.*"


@dataclass(frozen=True, slots=True)
class Clusters:
    """Where routes may lead."""

    named: Callable[[str, int], str]
    """The cluster of a service port; empty where there is no such service."""
    mirror: Callable[[str, int], str]
    """Likewise, for copies of requests."""
    hashed: Callable[[str], list[Json]]
    """What says to which endpoint of a service a request goes."""


def answer(status: int, reason: str, text: str) -> Json:
    """What a route says that asks nobody."""
    return {
        "direct_response": {"status": status, "body": {"inline_string": text + "\n"}},
        "response_headers_to_add": [header("x-uproxy-reason", reason), header("content-type", "text/plain")],
    }


def configuration(name: str, hosts: Sequence[Json], filters: Json) -> Json:
    """A RouteConfiguration. `filters`: what HTTP filters hold, by their names."""
    return {
        "name": name,
        "virtual_hosts": list(hosts),
        "typed_per_filter_config": filters,
        "ignore_port_in_host_matching": True,
    }


def refusing(name: str, status: int, reason: str, text: str) -> Json:
    """One that answers everybody alike."""
    everything = {"match": {"prefix": "/"}, **answer(status, reason, text)}
    return configuration(name, [_host("all", ["*"], [everything])], http_rules(()))


def straight(name: str, cluster: str, filters: Json) -> Json:
    """One that leads to one cluster."""
    route = {"match": {"prefix": "/"}, "route": _action(cluster, None)}
    return configuration(name, [_host("all", ["*"], [*_refused_paths(), route])], filters)


def routed(name: str, router: Router, port: int, clusters: Clusters, limits: Limits, filters: Json) -> Json:
    """One with the rules of a service port's routes. `port` was dialled."""
    made = _Maker(port, clusters, limits)
    hosts = []
    of_callers = [(callers, router.of(callers)) for callers in sorted(router.callers)]
    names = {"", *router.hostnames, *(found for _, its in of_callers for found in its.hostnames)}
    for hostname in sorted(names):
        routes = _refused_paths()
        for callers, its in of_callers:
            mark = {"filter_state": [_callers(callers)]}
            routes += [_marked(route, mark) for route in made.routes(its, hostname)]
        routes += made.routes(router, hostname)
        domains = [hostname, f"{hostname}."] if hostname else ["*"]
        hosts.append(_host(hostname or "all", domains, routes))
    return configuration(name, hosts, filters)


def _host(name: str, domains: list[str], routes: list[Json]) -> Json:
    return {"name": name, "domains": domains, "routes": routes}


def _refused_paths() -> list[Json]:
    """What `waypoint.request` refuses and Envoy would take."""
    text = "the path has a dot segment with parameters, which applications read in different ways"
    return [{"match": {"safe_regex": {"regex": _DOT_SEGMENT}}, **answer(400, "bad-request", text)}]


def _callers(namespace: str) -> Json:
    expression = f"spiffe://[^/]+/ns/{re.escape(namespace)}/sa/[^/]+"
    return {"key": PRINCIPAL, "string_match": {"safe_regex": {"regex": expression}}}


def _marked(route: Json, also: Json) -> Json:
    return {**route, "match": {**route["match"], **also}}


@dataclass(frozen=True, slots=True)
class _Maker:
    port: int
    clusters: Clusters
    limits: Limits

    def routes(self, router: Router, hostname: str) -> list[Json]:
        """In the order in which they are asked, for one host name; the last one takes all."""
        found = [route for rule in router.ordered(hostname) for route in self._of_rule(rule)]
        missing = answer(404, "no-route", "no route of this service matches")
        return [*found, {"match": {"prefix": "/"}, **missing}]

    def _of_rule(self, rule: RouteRule) -> Iterator[Json]:
        """`rule` has one match, or none where it takes all."""
        match = _match(rule)
        if rule.filters.cors is not None:
            yield from _preflights(match, rule.filters.cors)
        for route in self._shares(rule):
            share = {"runtime_fraction": route.pop("share")} if "share" in route else {}
            route["match"] = {**match, **share}
            if rule.name:
                route["name"] = rule.name
            route["metadata"] = {"filter_metadata": {"uproxy": {"rule": rule.name, "backend": route.pop("to", "")}}}
            if "route" in route and (limits := self.limits.of_rule(rule.name)):
                route["route"]["rate_limits"] = limits
            for one in _by_method(route, rule):
                yield from _by_origin(one, rule.filters.cors) if rule.filters.cors is not None else (one,)

    def _shares(self, rule: RouteRule) -> Iterator[Json]:
        """A route for each backend, without its match; `share`: of how many of the requests that have come so far."""
        if rule.filters.redirect is not None:
            yield self._redirected(rule, rule.filters, (rule.response,))
            return
        weighted = [backend for backend in rule.backends if backend.weight]
        if not weighted:
            yield answer(500, "no-backend", "the route that matches has no backend")
            return
        total, sum_ = sum(backend.weight for backend in weighted), 0
        for backend in weighted:
            sum_ += backend.weight
            route = self._to(rule, backend)
            route["to"] = backend.service
            if sum_ < total:
                numerator = round(sum_ * _MILLION / total)
                route["share"] = {"default_value": {"numerator": numerator, "denominator": "MILLION"}}
            yield route

    def _to(self, rule: RouteRule, backend: Backend) -> Json:
        if backend.filters.redirect is not None:
            return self._redirected(rule, backend.filters, (backend.response, rule.response))
        cluster = self.clusters.named(backend.service, backend.port)
        if backend.refused:
            text = f"no ReferenceGrant lets this route send to Service {backend.service}"
            return answer(500, "no-backend", text)
        if not cluster:
            return answer(500, "no-backend", f"there is no service {backend.service}")
        action = _action(cluster, rule)
        if hashed := self.clusters.hashed(backend.service):
            action["hash_policy"] = hashed
        if mirrors := self._mirrors((*rule.filters.mirrors, *backend.filters.mirrors)):
            action["request_mirror_policies"] = mirrors
        rewrite = backend.filters.rewrite or rule.filters.rewrite
        if rewrite is not None and rewrite.hostname:
            action["host_rewrite_literal"] = rewrite.hostname
        if rewrite is not None and rewrite.path is not None and (changed := _changed(rewrite.path, rule)):
            action["regex_rewrite"] = changed
        return {
            "route": action,
            **_headers("request", (rule.request, backend.request)),
            **_headers("response", (backend.response, rule.response)),
        }

    def _redirected(self, rule: RouteRule, filters: Filters, modifiers: Sequence[HeaderModifier]) -> Json:
        """As `waypoint.rewriting.location`."""
        redirect = filters.redirect
        assert redirect is not None
        scheme = redirect.scheme or "http"
        port = redirect.port or (_PORTS[scheme] if redirect.scheme else self.port)
        action: Json = {"scheme_redirect": scheme, "response_code": _STATUSES[redirect.status]}
        if redirect.hostname:
            action["host_redirect"] = redirect.hostname
        if port != _PORTS[scheme]:
            action["port_redirect"] = port
        if redirect.path is not None:
            if redirect.path.kind is Replaced.ALL:
                action["path_redirect"] = redirect.path.value
            elif changed := _changed(redirect.path, rule):
                action["regex_rewrite"] = changed
        return {"redirect": action, **_headers("response", modifiers)}

    def _mirrors(self, mirrors: Iterable[Mirror]) -> list[Json]:
        found = ((mirror, self.clusters.mirror(mirror.service, mirror.port)) for mirror in mirrors)
        return [
            {
                "cluster": cluster,
                "runtime_fraction": {"default_value": _fraction(mirror)},
                "disable_shadow_host_suffix_append": True,
            }
            for mirror, cluster in found
            if cluster and mirror.numerator
        ]


def _fraction(mirror: Mirror) -> Json:
    for denominator, name in ((100, "HUNDRED"), (10_000, "TEN_THOUSAND")):
        if mirror.numerator * denominator % mirror.denominator == 0:
            return {"numerator": mirror.numerator * denominator // mirror.denominator, "denominator": name}
    return {"numerator": round(mirror.numerator * _MILLION / mirror.denominator), "denominator": "MILLION"}


def _match(rule: RouteRule) -> Json:
    if not rule.matches:
        return {"prefix": "/"}
    (asked,) = rule.matches
    match: Json = {}
    path = asked.path
    if path.kind is PathKind.EXACT:
        match["path"] = path.value
    elif path.kind is PathKind.EXPRESSION:
        match["safe_regex"] = {"regex": path.value}
    elif path.value == "/":
        match["prefix"] = "/"
    else:
        match["path_separated_prefix"] = path.value
    headers = [{"name": one.name, "string_match": _value(one.value, one.expression)} for one in asked.headers]
    if asked.method:
        headers.append({"name": ":method", "string_match": {"exact": asked.method}})
    if headers:
        match["headers"] = headers
    if asked.query:
        match["query_parameters"] = [
            {"name": one.name, "string_match": _value(one.value, one.expression)} for one in asked.query
        ]
    return match


def _value(text: str, expression: bool) -> Json:
    return {"safe_regex": {"regex": text}} if expression else {"exact": text}


def _action(cluster: str, rule: RouteRule | None) -> Json:
    action: Json = {"cluster": cluster, "timeout": seconds(rule.timeout_ms if rule is not None else 0)}
    # A connection to a backend may just have been closed: as Istio does, but for what may not be sent twice.
    retry: Json = {
        "retry_on": "connect-failure,refused-stream,reset",
        "num_retries": 2,
        "retriable_request_headers": [{"name": ":method", "string_match": _IDEMPOTENT}],
        **_ELSEWHERE,
    }
    if rule is not None and rule.backend_timeout_ms:
        retry["per_try_timeout"] = seconds(rule.backend_timeout_ms)
        if rule.retry is None:
            retry["num_retries"] = 0
    action["retry_policy"] = retry
    return action


def _by_method(route: Json, rule: RouteRule) -> Iterator[Json]:
    """A rule that has requests sent again does so, too, where nothing came back, if they are idempotent."""
    retry = rule.retry
    if retry is None or "route" not in route:
        yield route
        return
    policy: Json = {
        "retry_on": "retriable-status-codes,connect-failure,refused-stream",
        "retriable_status_codes": list(retry.codes),
        "num_retries": retry.attempts,
        "retry_back_off": {"base_interval": seconds(retry.backoff_ms), "max_interval": seconds(10 * retry.backoff_ms)},
        **_ELSEWHERE,
    }
    if rule.backend_timeout_ms:
        policy["per_try_timeout"] = seconds(rule.backend_timeout_ms)
    idempotent = {**policy, "retry_on": policy["retry_on"] + ",reset"}
    match = route["match"]
    asked = [*match.get("headers", ()), {"name": ":method", "string_match": _IDEMPOTENT}]
    kept = {"request_body_buffer_limit": MAX_KEPT}
    yield {
        **route,
        **kept,
        "match": {**match, "headers": asked},
        "route": {**route["route"], "retry_policy": idempotent},
    }
    yield {**route, **kept, "route": {**route["route"], "retry_policy": policy}}


def _changed(change: PathChange, rule: RouteRule) -> Json:
    """What becomes of a path; empty where nothing does."""
    if change.kind is Replaced.ALL:
        return _rewritten("^.+$", change.value)
    before = re.escape(rule.matches[0].path.value.rstrip("/"))
    if change.value:
        return _rewritten(f"^{before}", change.value) if before else _rewritten("^/", change.value + "/")
    return _rewritten(f"^{before}/?", "/") if before else {}


def _rewritten(expression: str, value: str) -> Json:
    return {"pattern": {"regex": expression}, "substitution": value.replace("\\", "\\\\")}


def _headers(which: str, modifiers: Sequence[HeaderModifier]) -> Json:
    """What becomes of headers by one modifier after the other. Envoy removes first, then sets and adds in order."""
    removed: list[str] = []
    options: list[tuple[str, str, bool]] = []
    for modifier in modifiers:
        for name, value in modifier.set:
            options = [option for option in options if option[0] != name]
            options.append((name, value, False))
        options += [(name, value, True) for name, value in modifier.add]
        if modifier.remove:
            options = [option for option in options if option[0] not in modifier.remove]
            removed += modifier.remove
    found: Json = {}
    if options:
        found[f"{which}_headers_to_add"] = [
            header(name, literal(value), append=append) for name, value, append in options
        ]
    if removed:
        found[f"{which}_headers_to_remove"] = removed
    return found


def _asked(match: Json, *headers: Json) -> Json:
    return {**match, "headers": [*match.get("headers", ()), *headers]}


def _from(cors: Cors) -> list[Json]:
    """Requests of pages of the origins that are let in."""
    if ANY in cors.origins:
        return [{"name": "origin", "present_match": True}]
    origins = ("[a-z0-9_.-]+".join(re.escape(part) for part in origin.split(ANY)) for origin in cors.origins)
    return [{"name": "origin", "string_match": {"safe_regex": {"regex": f"(?i)(?:{'|'.join(origins)})"}}}]


def _preflights(match: Json, cors: Cors) -> Iterator[Json]:
    """What browsers ask beforehand, answered as `waypoint.cors.preflight` does."""
    asking: list[Json] = [
        {"name": ":method", "string_match": {"exact": "OPTIONS"}},
        {"name": "origin", "present_match": True},
        {"name": "access-control-request-method", "present_match": True},
    ]
    vary = header("vary", "origin")
    if cors.methods == (ANY,):
        methods = "%REQ(ACCESS-CONTROL-REQUEST-METHOD)%" if cors.credentials else ANY
    else:
        methods = ", ".join(cors.methods or ("GET", "HEAD", "POST"))
    headers = ", ".join(cors.headers)
    if cors.headers == (ANY,) and cors.credentials:
        headers = "%REQ(ACCESS-CONTROL-REQUEST-HEADERS)%"
    told = [
        vary,
        *_allowed_origin(cors),
        header("access-control-allow-methods", methods),
        *([{**header("access-control-allow-headers", headers), "keep_empty_value": False}] if headers else []),
        header("access-control-max-age", str(cors.max_age_s)),
    ]
    answered = {"direct_response": {"status": 204}}
    if cors.origins:
        yield {"match": _asked(match, *asking, *_from(cors)), **answered, "response_headers_to_add": told}
    yield {"match": _asked(match, *asking), **answered, "response_headers_to_add": [vary]}


def _by_origin(route: Json, cors: Cors) -> Iterator[Json]:
    """A route for pages that are let in, and one for all others; what a backend says of CORS counts for neither."""
    added = route.get("response_headers_to_add", [])
    removed = [*route.get("response_headers_to_remove", ()), *_CORS_FIELDS]
    vary = header("vary", "origin", append=True)
    told = [vary, *_allowed_origin(cors)]
    if cors.exposed and not (cors.exposed == (ANY,) and cors.credentials):
        told.append(header("access-control-expose-headers", ", ".join(cors.exposed)))
    if cors.origins:
        yield {
            **route,
            "match": _asked(route["match"], *_from(cors)),
            "response_headers_to_add": [*added, *told],
            "response_headers_to_remove": removed,
        }
    yield {**route, "response_headers_to_add": [*added, vary], "response_headers_to_remove": removed}


def _allowed_origin(cors: Cors) -> list[Json]:
    origin = ANY if ANY in cors.origins and not cors.credentials else "%REQ(ORIGIN)%"
    found = [header("access-control-allow-origin", origin)]
    return [*found, header("access-control-allow-credentials", "true")] if cors.credentials else found
