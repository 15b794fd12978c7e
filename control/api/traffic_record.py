"""The body of a TrafficPolicy's message, and back: part of `records`."""

from __future__ import annotations

from control.api.balancing_record import (
    read_load_balancing,
    read_outlier_detection,
    write_load_balancing,
    write_outlier_detection,
)
from control.api.durations import MAX_MS
from control.api.extension import Filter
from control.api.extension_record import read_filter, write_filter
from control.api.fields import (
    Fields,
    RecordError,
    check_distinct,
    check_ordered,
    checked,
    number_in,
    read_key,
    read_member,
    read_port,
    read_targets,
    typed,
    write_target,
)
from control.api.http_text import wrong_header_name
from control.api.messages import Body, Value
from control.api.names import wrong_service_name, wrong_subdomain
from control.api.topics import TrafficTopic
from control.api.traffic import (
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


def write_traffic(record: TrafficPolicy) -> Body:
    """The body."""
    body: Body = {
        "targets": [write_target(target) for target in record.targets],
        "rate_limits": [_write_limit(one) for one in record.rate_limits],
        "max_requests": record.max_requests,
        "faults": [[one.percentage, one.delay_ms, one.status] for one in record.faults],
        **({} if record.load_balancing is None else {"loadBalancing": write_load_balancing(record.load_balancing)}),
        **(
            {}
            if record.outlier_detection is None
            else {"outlierDetection": write_outlier_detection(record.outlier_detection)}
        ),
    }
    if (limits := record.connection_limits) is not None:
        body["connections"] = [limits.connections, limits.pending, limits.requests_each]
    if (redis := record.redis) is not None:
        body["redis"] = [redis.service, redis.port, redis.timeout_ms, redis.fail_open]
    if record.filters:
        body["filters"] = [write_filter(one) for one in record.filters]
    if record.upgrades:
        body["upgrades"] = list(record.upgrades)
    return body


def read_traffic(topic: TrafficTopic, fields: Fields) -> TrafficPolicy:
    """The TrafficPolicy in a body, whose rest the caller looks at. Raises RecordError."""
    targets = read_targets(fields, topic.namespace)
    limits = tuple(_read_limit(item) for item in fields.take("rate_limits", list))
    if len(limits) > MAX_RATE_LIMITS:
        raise RecordError(f"rate_limits has {len(limits)}; at most {MAX_RATE_LIMITS}")
    found = TrafficPolicy(
        topic.namespace,
        topic.name,
        targets,
        limits,
        fields.number("max_requests", 0, MAX_REQUESTS),
        tuple(_read_fault(item) for item in fields.take("faults", list)),
        _read_connection_limits(fields.take("connections", list)) if fields.has("connections") else None,
        read_load_balancing(fields),
        read_outlier_detection(fields),
        _read_filters(fields),
        _read_redis(fields.take("redis", list)) if fields.has("redis") else None,
        _read_upgrades(fields.take("upgrades", list)) if fields.has("upgrades") else (),
    )
    if (found.redis is not None) is not any(limit.everywhere for limit in limits):
        raise RecordError("redis: it is there for rate limits that all processes count, and for nothing else")
    return found


def _read_redis(value: Value) -> Redis:
    match value:
        case [service, port, timeout_ms, bool(fail_open)]:
            return Redis(
                read_key(service, "redis", wrong_service_name),
                read_port(port, "redis"),
                number_in(timeout_ms, 1, MAX_REDIS_MS, "redis"),
                fail_open,
            )
    raise RecordError("redis must be [service, port, milliseconds, fails open]")


def _read_filters(fields: Fields) -> tuple[Filter, ...]:
    found = fields.optional_list("filters", read_filter)
    check_distinct([one.extension for one in found], "filters")
    if len(found) > MAX_FILTERS:
        raise RecordError(f"filters has {len(found)}; at most {MAX_FILTERS}")
    return found


def _read_upgrades(value: list[Value]) -> tuple[str, ...]:
    found = tuple(checked(typed(name, str, "upgrades"), wrong_upgrade, "upgrades") for name in value)
    if not 0 < len(found) <= MAX_UPGRADES:
        raise RecordError(f"upgrades has {len(found)}; from 1 to {MAX_UPGRADES}, or it must be absent")
    check_ordered(found, "upgrades")
    return found


def _write_limit(limit: RateLimit) -> list[Value]:
    # Said only where it is so, so that all other records are those of before there was this.
    everywhere: list[Value] = [True] if limit.everywhere else []
    rules: list[Value] = list(limit.rules)
    return [limit.requests, limit.per_ms, limit.burst, limit.share.value, limit.header, rules, *everywhere]


def _read_limit(value: Value) -> RateLimit:
    match value:
        case [requests, per_ms, burst, share, header, rules, *everywhere] if not everywhere or (
            everywhere[0] is True and len(everywhere) == 1
        ):
            found = RateLimit(
                number_in(requests, 1, MAX_REQUESTS, "rate_limits"),
                number_in(per_ms, 1, MAX_MS, "rate_limits"),
                number_in(burst, 1, MAX_REQUESTS, "rate_limits"),
                read_member(share, Share, "rate_limits"),
                typed(header, str, "rate_limits"),
                tuple(
                    checked(typed(name, str, "rate_limits"), wrong_subdomain, "rate_limits")
                    for name in typed(rules, list, "rate_limits")
                ),
                bool(everywhere),
            )
        case _:
            raise RecordError(
                "rate_limits: each must be [requests, milliseconds, burst, share, header, [rules]], or with true "
                "behind it"
            )
    if (found.share is Share.HEADER) is not bool(found.header):
        raise RecordError(f"rate_limits: a header belongs to {Share.HEADER.value}, and to nothing else")
    if found.header:
        checked(found.header, wrong_header_name, "rate_limits")
    check_distinct(found.rules, "rate_limits")
    if len(found.rules) > MAX_RULES:
        raise RecordError(f"rate_limits: {len(found.rules)} names of rules; at most {MAX_RULES}")
    return found


def _read_fault(value: Value) -> Fault:
    match value:
        case [percentage, delay_ms, 0]:
            return Fault(number_in(percentage, 1, 100, "faults"), delay_ms=number_in(delay_ms, 1, MAX_MS, "faults"))
        case [percentage, 0, status]:
            return Fault(number_in(percentage, 1, 100, "faults"), status=number_in(status, 200, 599, "faults"))
    raise RecordError("faults: each must be [percentage, milliseconds, 0] or [percentage, 0, status]")


def _read_connection_limits(value: Value) -> ConnectionLimits:
    match value:
        case [connections, pending, requests_each]:
            found = ConnectionLimits(
                number_in(connections, 0, MAX_REQUESTS, "connections"),
                number_in(pending, 0, MAX_REQUESTS, "connections"),
                number_in(requests_each, 0, MAX_REQUESTS, "connections"),
            )
        case _:
            raise RecordError("connections must be [connections, pending requests, requests of each]")
    if bool(found.connections) is not bool(found.pending):
        raise RecordError("connections: requests wait where connections are limited, and nowhere else")
    if not (found.connections or found.requests_each):
        raise RecordError("connections limits nothing; it must then be absent")
    return found
