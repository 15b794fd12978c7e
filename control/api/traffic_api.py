"""`mesh.uproxy.dev` TrafficPolicy, read from documents."""

from __future__ import annotations

from typing import Final

from control.api.declared import DeclaredTraffic
from control.api.document import Reader
from control.api.durations import milliseconds
from control.api.http_text import wrong_header_name
from control.api.metadata import read_metadata
from control.api.names import wrong_subdomain
from control.api.security import NEEDS_WAYPOINT, read_targets
from control.api.traffic import MAX_RATE_LIMITS, MAX_REQUESTS, MAX_RULES, Fault, RateLimit, Share, TrafficPolicy

_EMPTY: Final = "says nothing; write rateLimits, maxConcurrentRequests or fault"


def read_traffic_policy(document: Reader) -> DeclaredTraffic:
    """Reads a TrafficPolicy."""
    metadata = read_metadata(document, wrong_subdomain)
    spec = document.child("spec", required="a mapping with targetRefs")
    targets = read_targets(spec, metadata.namespace)
    if not targets and not spec.lost:
        spec.error("targetRefs", f"is missing: this {NEEDS_WAYPOINT}")
    limits = spec.children("rateLimits")
    if len(limits) > MAX_RATE_LIMITS:
        spec.error("rateLimits", f"has {len(limits)}; at most {MAX_RATE_LIMITS} are taken")
    policy = TrafficPolicy(
        metadata.namespace,
        metadata.name,
        targets,
        tuple(_read_limit(reader) for reader in limits[:MAX_RATE_LIMITS]),
        spec.integer("maxConcurrentRequests", 1, MAX_REQUESTS),
        _read_faults(spec.child("fault")),
    )
    if not (policy.rate_limits or policy.max_requests or policy.faults or spec.lost):
        document.error("spec", _EMPTY)
    spec.finish()
    return DeclaredTraffic(policy, document.position)


def _read_limit(reader: Reader) -> RateLimit:
    requests = reader.integer("requests", 1, MAX_REQUESTS, required=f"a number from 1 to {MAX_REQUESTS}")
    per_ms = reader.parsed("per", milliseconds, required="a duration, such as 1s")
    if per_ms == 0:
        reader.error("per", "is no time at all; write a longer one")
    share = Share(reader.choice("by", [share.value for share in Share], default=Share.ALL.value))
    header = reader.text("header", lambda text: wrong_header_name(text.lower())).lower()
    if share is Share.HEADER and not header and not reader.has("header"):
        reader.error("header", "is missing; `by: Header` needs the name of one")
    elif header and share is not Share.HEADER:
        reader.error("header", "needs `by: Header`")
    rules = reader.parsed_list("rules", _rule_name)
    if len(set(rules)) != len(rules):
        reader.error("rules", "names one twice; remove one")
    elif len(rules) > MAX_RULES:
        reader.error("rules", f"has {len(rules)}; at most {MAX_RULES} are taken")
    burst = reader.integer("burst", 1, MAX_REQUESTS, default=requests)
    reader.finish()
    return RateLimit(requests, per_ms or 1, burst, share, header, rules)


def _read_faults(reader: Reader) -> tuple[Fault, ...]:
    found: list[Fault] = []
    if reader.has("delay"):
        delay = reader.child("delay")
        delay_ms = delay.parsed("duration", milliseconds, required="a duration, such as 2s")
        if delay_ms == 0:
            delay.error("duration", "is no time at all; write a longer one")
        found.append(Fault(_percentage(delay), delay_ms=delay_ms or 1))
        delay.finish()
    if reader.has("abort"):
        abort = reader.child("abort")
        status = abort.integer("status", 200, 599, required="a number from 200 to 599")
        found.append(Fault(_percentage(abort), status=status))
        abort.finish()
    reader.finish()
    return tuple(found)


def _percentage(reader: Reader) -> int:
    return reader.integer("percentage", 1, 100, required="a number from 1 to 100")


def _rule_name(text: str) -> str:
    if problem := wrong_subdomain(text):
        raise ValueError(problem)
    return text
