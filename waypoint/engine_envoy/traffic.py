"""TrafficPolicies as Envoy's filters: rate limits and faults. No I/O.

Each rate limit has a filter of its own, since all of them must let a request through; what the filters hold stands with
the routes of a place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from control.api.traffic import Fault, RateLimit, Share, TrafficPolicy
from waypoint.engine_envoy.parts import Json, extension, message, seconds
from waypoint.engine_envoy.rules import NotExpressibleError, check_known

MAX_LIMITS: Final = 10
"""Rate limits of one place: Envoy tells so many stages of them apart."""
FAULT: Final = "fault"

_FILL_MS: Final = 50  # Envoy fills a bucket no more often
_WITHOUT_END: Final = 4_000_000_000
_SHARES: Final = 10_000
_LIMIT: Final = "extensions.filters.http.local_ratelimit.v3.LocalRateLimit"
_FAULT: Final = "extensions.filters.http.fault.v3.HTTPFault"
_CALLER_HEADER: Final = "x-forwarded-client-cert"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the TrafficPolicies of one place make of its routes."""

    filters: Json
    """Of all its requests: the configuration of filters, by their names."""
    of_rules: tuple[tuple[frozenset[str], Json], ...]
    """Rate limits of single rules: their names, and what their routes say (`RateLimit`)."""
    max_requests: int
    """At one time; 0: any number."""

    def of_rule(self, name: str) -> list[Json]:
        return [limit for names, limit in self.of_rules if name in names]


def idle_filters() -> list[Json]:
    """The filters, in the order in which they are asked, for a place at which nothing is limited."""
    limits = [extension(_name(index), _LIMIT, stat_prefix="limit") for index in range(MAX_LIMITS)]
    return [*limits, extension(FAULT, _FAULT)]


def limits_of(policies: Sequence[TrafficPolicy]) -> Limits:
    """`policies`: in the order of their keys. Raises NotExpressibleError."""
    for policy in policies:
        check_known(policy)
    limits = [(policy, limit) for policy in policies for limit in policy.rate_limits]
    if len(limits) > MAX_LIMITS:
        raise NotExpressibleError(f"{len(limits)} rateLimits at one destination: this engine takes {MAX_LIMITS}")
    filters: Json = {}
    of_rules: list[tuple[frozenset[str], Json]] = []
    for index, (_, limit) in enumerate(limits):
        counted = _counted(index, limit)
        filters[_name(index)] = _limit(index, limit, [] if limit.rules else [counted])
        if limit.rules:
            of_rules.append((frozenset(limit.rules), {**counted, "stage": index}))
    faults = [(policy, fault) for policy in policies for fault in policy.faults]
    if faults:
        filters[FAULT] = _fault(faults)
    most = [policy.max_requests for policy in policies if policy.max_requests]
    return Limits(filters, tuple(of_rules), min(most, default=0))


def _name(index: int) -> str:
    return f"limit-{index}"


def _counted(index: int, limit: RateLimit) -> Json:
    """What a request is counted under."""
    actions: list[Json] = [{"generic_key": {"descriptor_key": "limit", "descriptor_value": str(index)}}]
    match limit.share:
        case Share.IDENTITY:
            actions.append({"request_headers": {"header_name": _CALLER_HEADER, "descriptor_key": "share"}})
        case Share.HEADER:
            actions.append({"request_headers": {"header_name": limit.header, "descriptor_key": "share"}})
            actions[-1]["request_headers"]["skip_if_absent"] = True
        case Share.ALL:
            pass
    return {"actions": actions}


def _limit(index: int, limit: RateLimit, counted: list[Json]) -> Json:
    """A request is counted in the bucket of its own descriptor; what has none is not counted."""
    entry = {"key": "limit", "value": str(index)}
    bucket = _bucket(limit)
    descriptors: list[Json] = [{"entries": [entry], "token_bucket": bucket}]
    if limit.share is not Share.ALL:  # one for each value that comes
        descriptors.insert(0, {"entries": [entry, {"key": "share"}], "token_bucket": bucket})
    always = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    config = message(
        _LIMIT,
        stat_prefix="limit",
        token_bucket={"max_tokens": _WITHOUT_END, "tokens_per_fill": _WITHOUT_END, "fill_interval": "1s"},
        filter_enabled=always,
        filter_enforced=always,
        always_consume_default_token_bucket=False,
        descriptors=descriptors,
        max_dynamic_descriptors=_SHARES,
        stage=index,
        response_headers_to_add=[
            {"header": {"key": name, "value": value}}
            for name, value in (("retry-after", str(_retry_after_s(limit))), ("x-uproxy-reason", "rate-limited"))
        ],
    )
    if counted:
        config["rate_limits"] = counted
    return config


def _bucket(limit: RateLimit) -> Json:
    """So many in each interval that it is as even as Envoy has it."""
    filled = math.ceil(_FILL_MS * limit.requests / limit.per_ms)
    every_ms = filled * limit.per_ms / limit.requests
    return {
        "max_tokens": max(limit.burst, filled),
        "tokens_per_fill": filled,
        "fill_interval": seconds(math.ceil(every_ms)),
    }


def _retry_after_s(limit: RateLimit) -> int:
    return max(1, math.ceil(limit.per_ms / limit.requests / 1000))


def _fault(faults: Sequence[tuple[TrafficPolicy, Fault]]) -> Json:
    delays = [fault for _, fault in faults if fault.delay_ms]
    aborts = [fault for _, fault in faults if fault.status]
    if len(delays) > 1 or len(aborts) > 1:
        several = ", ".join(sorted({policy.key for policy, _ in faults}))
        raise NotExpressibleError(f"TrafficPolicy {several}: several faults of one kind at one destination; keep one")
    config = message(_FAULT)
    for fault in delays:
        config["delay"] = {"fixed_delay": seconds(fault.delay_ms), "percentage": _percentage(fault)}
    for fault in aborts:
        config["abort"] = {"http_status": fault.status, "percentage": _percentage(fault)}
    return config


def _percentage(fault: Fault) -> Json:
    return {"numerator": fault.percentage, "denominator": "HUNDRED"}
