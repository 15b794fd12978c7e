"""`loadBalancing` and `outlierDetection` of a TrafficPolicy, read from documents."""

from __future__ import annotations

from typing import Final

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
from control.api.document import Reader
from control.api.durations import milliseconds
from control.api.http_text import wrong_cookie_path, wrong_header_name, wrong_token
from control.api.locality import wrong_region

_RING: Final = "an endpoint has 100 places on the ring, whatever their number; remove it"


def read_load_balancing(spec: Reader) -> LoadBalancing | None:
    """None: it is not said."""
    if not spec.has("loadBalancing"):
        return None
    reader = spec.child("loadBalancing")
    if reader.empty:
        spec.error("loadBalancing", "says nothing; write simple, consistentHash or localityLbSetting")
    reader.refuse({"warmupDurationSecs": "Istio has replaced it; write warmup: {duration}"})
    simple = reader.choice(
        "simple",
        [algorithm.value for algorithm in Algorithm],
        default=Algorithm.LEAST_REQUEST.value,
        others={
            "LEAST_CONN": "Istio has renamed it; write LEAST_REQUEST",
            "PASSTHROUGH": "a waypoint always chooses an endpoint; remove it",
            "UNSPECIFIED": "it is the default; remove it",
        },
    )
    hashed = _read_hash(reader)
    if hashed is not None and reader.has("simple"):
        reader.error("simple", "stands beside consistentHash; remove one of them")
    warmup = _read_warmup(reader)
    if warmup is not None and (hashed is not None or simple == Algorithm.RANDOM.value):
        reader.error("warmup", "needs `simple: LEAST_REQUEST` or `ROUND_ROBIN`; remove it, or write one of these")
    local, failover = _read_locality(reader)
    reader.finish()
    return LoadBalancing(Algorithm(simple), hashed, warmup, local, failover)


def _read_hash(parent: Reader) -> ConsistentHash | None:
    if not parent.has("consistentHash"):
        return None
    reader = parent.child("consistentHash")
    reader.refuse(dict.fromkeys(("ringHash", "maglev", "minimumRingSize"), _RING))
    said: list[ConsistentHash] = []
    if name := reader.text("httpHeaderName", lambda text: wrong_header_name(text.lower())).lower():
        said.append(ConsistentHash(HashOf.HEADER, name))
    if reader.has("httpCookie"):
        said.append(_read_cookie(reader.child("httpCookie")))
    if name := reader.text("httpQueryParameterName"):
        said.append(ConsistentHash(HashOf.PARAMETER, name))
    if reader.boolean("useSourceIp", default=False):
        said.append(ConsistentHash(HashOf.ADDRESS))
    if reader.boolean("useSourceIdentity", default=False):
        said.append(ConsistentHash(HashOf.IDENTITY))
    if len(said) != 1 and not reader.lost:
        known = ", ".join(one.value for one in HashOf)
        parent.error("consistentHash", f"must say exactly one of {known}, not {len(said) or 'none'}")
    reader.finish()
    return said[0] if said else None


def _read_cookie(reader: Reader) -> ConsistentHash:
    name = reader.text("name", wrong_token, required="the cookie's name")
    ttl_ms = reader.parsed("ttl", milliseconds)
    path = reader.text("path", wrong_cookie_path)
    reader.refuse({"attributes": "a cookie of ours has Path, Max-Age and HttpOnly, and no more; remove it"})
    if path and ttl_ms is None and not reader.has("ttl"):
        reader.error("path", "needs a ttl: without one, no cookie is set")
    reader.finish()
    return ConsistentHash(HashOf.COOKIE, name, ttl_ms, path)


def _read_warmup(parent: Reader) -> Warmup | None:
    if not parent.has("warmup"):
        return None
    reader = parent.child("warmup")
    duration_ms = reader.parsed("duration", milliseconds, required="a duration, such as 30s")
    if duration_ms == 0:
        reader.error("duration", "is no time at all; write a longer one")
    warmup = Warmup(
        duration_ms or 1,
        reader.integer("minimumPercent", 1, 100, default=10),
        reader.hundredths("aggression", 100, MAX_AGGRESSION, default=100),
    )
    reader.finish()
    return warmup


def _read_locality(parent: Reader) -> tuple[bool, tuple[Failover, ...]]:
    """Whether endpoints nearby come first, and where requests go then."""
    if not parent.has("localityLbSetting"):
        return False, ()
    reader = parent.child("localityLbSetting")
    reader.refuse(
        {
            "distribute": "shares by locality are not implemented; write weights in an HTTPRoute, or remove it",
            "failoverPriority": "endpoints are ranked by region, zone and subzone; remove it",
        }
    )
    enabled = reader.boolean("enabled", default=True)
    failover: list[Failover] = []
    for one in reader.children("failover"):
        found = Failover(
            one.text("from", wrong_region, required="a region"), one.text("to", wrong_region, required="a region")
        )
        if found.origin and found.origin == found.to:
            one.error("to", "is where it comes from; name another region")
        elif found.origin in [other.origin for other in failover]:
            one.error("from", f"{found.origin} stands twice; remove one")
        failover.append(found)
        one.finish()
    if len(failover) > MAX_FAILOVERS:
        reader.error("failover", f"has {len(failover)}; at most {MAX_FAILOVERS} are taken")
    elif failover and not enabled:
        reader.error("failover", "stands beside `enabled: false`; remove one of them")
    reader.finish()
    return enabled, tuple(sorted(failover, key=lambda one: one.origin))


def read_outlier_detection(spec: Reader) -> OutlierDetection | None:
    """None: it is not said."""
    if not spec.has("outlierDetection"):
        return None
    reader = spec.child("outlierDetection")
    reader.refuse({"consecutiveErrors": "Istio has replaced it; write consecutive5xxErrors"})
    standard = OutlierDetection()

    def errors(name: str, default: int) -> int:
        return reader.integer(name, 0, MAX_ERRORS, default=default)

    def duration(name: str, default: int) -> int:
        found = reader.parsed(name, milliseconds)
        if found == 0:
            reader.error(name, "is no time at all; write a longer one")
        return found or default

    found = OutlierDetection(
        errors("consecutive5xxErrors", standard.consecutive_5xx),
        errors("consecutiveGatewayErrors", standard.consecutive_gateway),
        errors("consecutiveLocalOriginFailures", standard.consecutive_local_origin),
        reader.boolean("splitExternalLocalOriginErrors", default=False),
        duration("interval", standard.interval_ms),
        duration("baseEjectionTime", standard.base_ejection_ms),
        reader.integer("maxEjectionPercent", 0, 100, default=standard.max_ejection_percent),
        reader.integer("minHealthPercent", 0, 100, default=standard.min_health_percent),
    )
    if reader.has("consecutiveLocalOriginFailures") and not found.split_local_origin:
        reader.error("consecutiveLocalOriginFailures", "needs `splitExternalLocalOriginErrors: true`")
    reader.finish()
    return found
