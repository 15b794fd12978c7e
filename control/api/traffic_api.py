"""`mesh.uproxy.dev` TrafficPolicy, read from documents."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from control.api.balancing_api import read_load_balancing, read_outlier_detection
from control.api.declared import DeclaredTraffic
from control.api.document import Reader
from control.api.durations import milliseconds
from control.api.http_text import wrong_header_name
from control.api.metadata import read_metadata
from control.api.names import key, wrong_service_name, wrong_subdomain
from control.api.security import NEEDS_WAYPOINT, read_targets
from control.api.traffic import (
    DEFAULT_PENDING,
    DEFAULT_REDIS_MS,
    MAX_FILTERS,
    MAX_RATE_LIMITS,
    MAX_REDIS_MS,
    MAX_REQUESTS,
    MAX_RULES,
    MAX_UPGRADES,
    ConnectionLimits,
    Fault,
    RateLimit,
    Redis,
    Share,
    TrafficPolicy,
    wrong_upgrade,
)

_EMPTY: Final = (
    "says nothing; write rateLimits, maxConcurrentRequests, connectionLimits, fault, loadBalancing, "
    "outlierDetection, extensions or upgrades"
)


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
        _read_connection_limits(spec.child("connectionLimits")) if spec.has("connectionLimits") else None,
        read_load_balancing(spec),
        read_outlier_detection(spec),
        upgrades=_read_upgrades(spec),
    )
    policy = replace(policy, redis=_read_redis(spec, policy))
    extensions = spec.parsed_list("extensions", _rule_name)
    if len(set(extensions)) != len(extensions):
        spec.error("extensions", "names one twice; remove one")
    elif len(extensions) > MAX_FILTERS:
        spec.error("extensions", f"has {len(extensions)}; at most {MAX_FILTERS} are taken")
    if not (spec.lost or extensions) and policy == TrafficPolicy(policy.namespace, policy.name, targets):
        document.error("spec", _EMPTY)
    spec.finish()
    return DeclaredTraffic(policy, document.position, extensions)


def _read_upgrades(spec: Reader) -> tuple[str, ...]:
    found = spec.parsed_list("upgrades", _upgrade)
    if len(found) > MAX_UPGRADES:
        spec.error("upgrades", f"has {len(found)}; at most {MAX_UPGRADES} are taken")
    elif len(set(found)) != len(found):
        spec.error("upgrades", "names one twice; remove one")
    return tuple(sorted(set(found)))[:MAX_UPGRADES]


def _upgrade(text: str) -> str:
    if problem := wrong_upgrade(text.lower()):
        raise ValueError(problem)
    return text.lower()


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
    scope = reader.choice("scope", ["Process", "Global"], default="Process")
    reader.finish()
    return RateLimit(requests, per_ms or 1, burst, share, header, rules, scope == "Global")


def _read_redis(spec: Reader, policy: TrafficPolicy) -> Redis | None:
    wanted = any(limit.everywhere for limit in policy.rate_limits)
    if not spec.has("redis"):
        if wanted and not spec.lost:
            spec.error(
                "redis", "is missing: a rate limit of scope Global is counted there; write {service: …, port: …}"
            )
        return None
    reader = spec.child("redis")
    if not wanted and not spec.lost:
        spec.error("redis", "counts rate limits of scope Global, and there is none")
    service = reader.text("service", wrong_service_name, required="the name of a Service of this namespace")
    timeout_ms = reader.parsed("timeout", milliseconds)
    if timeout_ms is not None and not 1 <= timeout_ms <= MAX_REDIS_MS:
        reader.error("timeout", f"must be from 1ms to {MAX_REDIS_MS // 1000}s")
    found = Redis(
        key(policy.namespace, service),
        reader.integer("port", 1, 65535, required="a port of that Service"),
        timeout_ms or DEFAULT_REDIS_MS,
        reader.boolean("failOpen", default=True),
    )
    reader.finish()
    return found


def _read_connection_limits(reader: Reader) -> ConnectionLimits:
    connections = reader.integer("maxConnections", 1, MAX_REQUESTS)
    if reader.has("maxPendingRequests") and not connections and not reader.lost:
        reader.error("maxPendingRequests", "needs maxConnections: without it no request waits for a connection")
    pending = reader.integer("maxPendingRequests", 1, MAX_REQUESTS, default=DEFAULT_PENDING if connections else 0)
    requests_each = reader.integer("maxRequestsPerConnection", 1, MAX_REQUESTS)
    if not (connections or pending or requests_each or reader.lost):
        reader.error_at(reader.path("maxConnections"), "is missing; write it or maxRequestsPerConnection")
    reader.finish()
    return ConnectionLimits(connections, pending, requests_each)


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
