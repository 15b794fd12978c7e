"""The body of a TrafficPolicy's message, and back: part of `records`."""

from __future__ import annotations

from control.api.durations import MAX_MS
from control.api.fields import (
    Fields,
    RecordError,
    check_distinct,
    check_ordered,
    checked,
    number_in,
    read_member,
    read_target,
    typed,
    write_target,
)
from control.api.http_text import wrong_header_name
from control.api.messages import Body, Value
from control.api.names import wrong_subdomain
from control.api.topics import TrafficTopic
from control.api.traffic import MAX_RATE_LIMITS, MAX_REQUESTS, MAX_RULES, Fault, RateLimit, Share, TrafficPolicy


def write_traffic(record: TrafficPolicy) -> Body:
    """The body."""
    return {
        "targets": [write_target(target) for target in record.targets],
        "rate_limits": [
            [one.requests, one.per_ms, one.burst, one.share.value, one.header, list(one.rules)]
            for one in record.rate_limits
        ],
        "max_requests": record.max_requests,
        "faults": [[one.percentage, one.delay_ms, one.status] for one in record.faults],
    }


def read_traffic(topic: TrafficTopic, fields: Fields) -> TrafficPolicy:
    """The TrafficPolicy in a body, whose rest the caller looks at. Raises RecordError."""
    targets = tuple(read_target(item, "targets", topic.namespace) for item in fields.take("targets", list))
    if not targets:
        raise RecordError("targets is empty")
    check_ordered([(target.kind, target.key) for target in targets], "targets")
    limits = tuple(_read_limit(item) for item in fields.take("rate_limits", list))
    if len(limits) > MAX_RATE_LIMITS:
        raise RecordError(f"rate_limits has {len(limits)}; at most {MAX_RATE_LIMITS}")
    return TrafficPolicy(
        topic.namespace,
        topic.name,
        targets,
        limits,
        fields.number("max_requests", 0, MAX_REQUESTS),
        tuple(_read_fault(item) for item in fields.take("faults", list)),
    )


def _read_limit(value: Value) -> RateLimit:
    match value:
        case [requests, per_ms, burst, share, header, rules]:
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
            )
        case _:
            raise RecordError("rate_limits: each must be [requests, milliseconds, burst, share, header, [rules]]")
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
