"""CUSTOM policies as Envoy's filters: services that are asked over HTTP whether a request may pass. No I/O.

Each service has two filters, in the order of the policies' names: one that marks the requests which rules of its
policies match, and Envoy's `ext_authz`, for requests with that mark. They stand before all other policies, and what
they hold stands with the routes of a place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

from control.api.extension import ExternalAuthorization
from control.api.policy import AuthorizationPolicy
from control.api.route import OURS, UNTOUCHED
from uproxy.rules import text_matcher
from waypoint.engine_envoy.parts import RBAC, Json, extension, injected, message, seconds, slot
from waypoint.engine_envoy.rules import NotExpressibleError, asked_rules, matcher

MAX_CHECKS: Final = 4
"""Services that may be asked about requests at one place."""
NOT_TAKEN: Final = [{"remove": name} for name in sorted(UNTOUCHED)] + [
    {"remove_on_match": {"key_matcher": {"prefix": OURS}}}
]
"""Of an answer: headers by which messages end or callers are known."""

_ALWAYS_ASKED: Final = ("x-forwarded-for", "x-forwarded-client-cert", "x-request-id", "traceparent")
_NEVER_ASKED: Final = UNTOUCHED - {"host", "content-length", *_ALWAYS_ASKED}
_ALWAYS_TOLD: Final = ("location", "www-authenticate", "content-type")
_NOBODY: Final = "nobody"


def idle_filters() -> list[Json]:
    """For a place at which nobody is asked."""
    return [
        one
        for index in range(MAX_CHECKS)
        for one in ({**extension(_marks(index), RBAC), "disabled": True}, slot(_asks(index)))
    ]


def marks() -> dict[str, str]:
    """Fields of the access log: the policy of which each service was asked last, as a format."""
    return {
        _marks(index): f"%DYNAMIC_METADATA(envoy.filters.http.rbac:{_mark(index)}shadow_effective_policy_id)%"
        for index in range(MAX_CHECKS)
    }


def checks(policies: Iterable[AuthorizationPolicy], cluster: Callable[[str, int], str]) -> dict[str, Json]:
    """What the filters of a place are to hold, by their names. Raises NotExpressibleError.

    `cluster`: through which a service port is asked as this waypoint; empty where there is no such service.
    """
    found = asked_rules(policies)
    if len(found) > MAX_CHECKS:
        raise NotExpressibleError(
            f"{len(found)} ExternalAuthorizations at one destination: this engine takes {MAX_CHECKS}"
        )
    filters: Json = {}
    for index, (authorizer, rules) in enumerate(found.items()):
        engine = {"shadow_rules": rules, "shadow_rules_stat_prefix": _mark(index)}
        filters[_marks(index)] = message("extensions.filters.http.rbac.v3.RBACPerRoute", rbac=engine)
        asked = cluster(authorizer.service, authorizer.port) or _NOBODY
        filters[_asks(index)] = injected(_asking(index, authorizer, asked))
    return filters


def _marks(index: int) -> str:
    return f"check-{index}"


def _asks(index: int) -> str:
    return f"ask-{index}"


def _mark(index: int) -> str:
    return f"check_{index}_"


def _asking(index: int, authorizer: ExternalAuthorization, cluster: str) -> Json:
    """`ext_authz`, as `waypoint.external_authorization` asks."""
    marked = {
        "filter": "envoy.filters.http.rbac",
        "path": [{"key": f"{_mark(index)}shadow_effective_policy_id"}],
        "value": {"present_match": True},
    }
    unasked = sorted(_NEVER_ASKED)
    if not text_matcher(authorizer.checked)("authorization"):  # Envoy sends it along where nobody says anything
        unasked.append("authorization")
    denied = (*authorizer.downstream_on_deny, *_ALWAYS_TOLD) if authorizer.downstream_on_deny else ()
    taken = {
        "allowed_upstream_headers": authorizer.upstream_on_allow,
        "allowed_client_headers_on_success": authorizer.downstream_on_allow,
        "allowed_client_headers": denied,  # none: all
    }
    config = message(
        "extensions.filters.http.ext_authz.v3.ExtAuthz",
        transport_api_version="V3",
        filter_enabled_metadata=marked,
        failure_mode_allow=authorizer.fail_open,
        status_on_error={"code": authorizer.status_on_error},
        clear_route_cache=True,
        allowed_headers=_names((*authorizer.checked, *_ALWAYS_ASKED)),
        disallowed_headers={"patterns": [*_names(unasked)["patterns"], {"prefix": OURS}]},
        http_service={
            "server_uri": {"uri": "http://asked", "cluster": cluster, "timeout": seconds(authorizer.timeout_ms)},
            "path_prefix": authorizer.path_prefix,
            "authorization_request": {
                "headers_to_add": [{"key": name, "value": value} for name, value in authorizer.added]
            },
            "authorization_response": {field: _names(names) for field, names in taken.items() if names},
        },
    )
    if authorizer.body_bytes:
        config["with_request_body"] = {
            "max_request_bytes": authorizer.body_bytes,
            "allow_partial_message": authorizer.partial_body,
        }
    return {"name": "ask", "typed_config": config}


def _names(patterns: Iterable[str]) -> Json:
    """A ListStringMatcher of names of headers; to Envoy an answer's `:status` is one as well, and meant by none."""
    return {"patterns": [_name(pattern) for pattern in patterns]}


def _name(pattern: str) -> Json:
    if pattern.startswith("*"):
        return {"safe_regex": {"regex": f"([^:].*)?{re.escape(pattern[1:])}"}}
    return matcher(pattern)
