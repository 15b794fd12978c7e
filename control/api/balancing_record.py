"""How endpoints are chosen, in a TrafficPolicy's message, and back: part of `traffic_record`."""

from __future__ import annotations

from control.api.balancing import (
    MAX_AGGRESSION,
    MAX_ERRORS,
    MAX_FAILOVERS,
    Algorithm,
    ConsistentHash,
    Failover,
    HashOf,
    LoadBalancing,
    OutlierDetection,
    Warmup,
)
from control.api.durations import MAX_MS
from control.api.fields import Fields, RecordError, check_ordered, checked, number_in, read_flag, read_member, typed
from control.api.http_text import wrong_cookie_path, wrong_header_name, wrong_token
from control.api.locality import wrong_region
from control.api.messages import Body, Value

_NAMED = frozenset({HashOf.HEADER, HashOf.COOKIE, HashOf.PARAMETER})


def write_load_balancing(said: LoadBalancing) -> Body:
    """Of what may be absent, what is there."""
    body: Body = {"algorithm": said.algorithm.value}
    if said.hash is not None:
        body["hash"] = [said.hash.of.value, said.hash.name, said.hash.ttl_ms, said.hash.path]
    if said.warmup is not None:
        body["warmup"] = [said.warmup.duration_ms, said.warmup.minimum_percent, said.warmup.aggression]
    if said.local:
        body["local"] = True
    if said.failover:
        body["failover"] = [[one.origin, one.to] for one in said.failover]
    return body


def read_load_balancing(fields: Fields) -> LoadBalancing | None:
    """Raises RecordError."""
    if not fields.has("loadBalancing"):
        return None
    within = Fields(fields.take("loadBalancing", dict), "loadBalancing")
    found = LoadBalancing(
        read_member(within.take("algorithm", str), Algorithm, "algorithm"),
        _read_hash(within.take("hash", list)) if within.has("hash") else None,
        _read_warmup(within.take("warmup", list)) if within.has("warmup") else None,
        read_flag(within, "local"),
        within.optional_list("failover", _read_failover),
    )
    within.finish()
    check_ordered([one.origin for one in found.failover], "failover")
    if len(found.failover) > MAX_FAILOVERS:
        raise RecordError(f"failover has {len(found.failover)}; at most {MAX_FAILOVERS}")
    if found.failover and not found.local:
        raise RecordError("failover needs local")
    return found


def _read_hash(value: Value) -> ConsistentHash:
    match value:
        case [of, str(name), int() | None as ttl_ms, str(path)]:
            found = ConsistentHash(read_member(of, HashOf, "hash"), name, ttl_ms, path)
        case _:
            raise RecordError("hash must be [what of, name, milliseconds or nothing, path]")
    if bool(found.name) is not (found.of in _NAMED):
        raise RecordError("hash: a name belongs to a header, cookie or parameter, and to nothing else")
    if found.of is HashOf.HEADER:
        checked(found.name, wrong_header_name, "hash")
    elif found.of is HashOf.COOKIE:
        checked(found.name, wrong_token, "hash")
    if found.ttl_ms is not None:
        number_in(found.ttl_ms, 0, MAX_MS, "hash")
    if (found.ttl_ms is not None and found.of is not HashOf.COOKIE) or (found.path and found.ttl_ms is None):
        raise RecordError("hash: only a cookie that is set has a lifetime and a path")
    if found.path:
        checked(found.path, wrong_cookie_path, "hash")
    return found


def _read_warmup(value: Value) -> Warmup:
    match value:
        case [duration_ms, minimum_percent, aggression]:
            return Warmup(
                number_in(duration_ms, 1, MAX_MS, "warmup"),
                number_in(minimum_percent, 1, 100, "warmup"),
                number_in(aggression, 100, MAX_AGGRESSION, "warmup"),
            )
    raise RecordError("warmup must be [milliseconds, percent, hundredths]")


def _read_failover(value: Value, name: str) -> Failover:
    match value:
        case [str(origin), str(to)] if origin != to:
            return Failover(checked(origin, wrong_region, name), checked(to, wrong_region, name))
    raise RecordError(f"{name}: each must be [region, another region]")


def write_outlier_detection(said: OutlierDetection) -> list[Value]:
    """In the order of its fields."""
    return [
        said.consecutive_5xx,
        said.consecutive_gateway,
        said.consecutive_local_origin,
        said.split_local_origin,
        said.interval_ms,
        said.base_ejection_ms,
        said.max_ejection_percent,
        said.min_health_percent,
    ]


def read_outlier_detection(fields: Fields) -> OutlierDetection | None:
    """Raises RecordError."""
    name = "outlierDetection"
    if not fields.has(name):
        return None
    match fields.take(name, list):
        case [of_5xx, of_gateway, of_local, split, interval_ms, base_ms, most, least]:
            return OutlierDetection(
                number_in(of_5xx, 0, MAX_ERRORS, name),
                number_in(of_gateway, 0, MAX_ERRORS, name),
                number_in(of_local, 0, MAX_ERRORS, name),
                typed(split, bool, name),
                number_in(interval_ms, 1, MAX_MS, name),
                number_in(base_ms, 1, MAX_MS, name),
                number_in(most, 0, 100, name),
                number_in(least, 0, 100, name),
            )
    raise RecordError(f"{name} must have eight values")
