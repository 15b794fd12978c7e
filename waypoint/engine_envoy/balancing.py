"""How endpoints are chosen, as a cluster of Envoy's says it. No I/O."""

from __future__ import annotations

from typing import Final

from control.api.balancing import Algorithm, HashOf, LoadBalancing, OutlierDetection, Warmup
from waypoint.engine_envoy.parts import PRINCIPAL, Json, seconds
from waypoint.outliers import LONGEST_S

_CONFIG: Final = {
    Algorithm.LEAST_REQUEST: "least_request_lb_config",
    Algorithm.ROUND_ROBIN: "round_robin_lb_config",
}
_RING: Final = {"minimum_ring_size": 16_384}
"""As even as ours with up to 160 endpoints."""


def hashed(said: LoadBalancing | None) -> list[Json]:
    """What of a request says to which endpoint it goes: hash policies of its route."""
    if said is None or said.hash is None:
        return []
    name = said.hash.name
    match said.hash.of:
        case HashOf.HEADER:
            return [{"header": {"header_name": name}}]
        case HashOf.PARAMETER:
            return [{"query_parameter": {"name": name}}]
        case HashOf.ADDRESS:
            return [{"connection_properties": {"source_ip": True}}]
        case HashOf.IDENTITY:
            return [{"filter_state": {"key": PRINCIPAL}}]
        case HashOf.COOKIE:
            lasts = {} if said.hash.ttl_ms is None else {"ttl": seconds(said.hash.ttl_ms)}
            return [{"cookie": {"name": name, "path": said.hash.path, **lasts}}]


def hashed_tcp(said: LoadBalancing | None) -> list[Json]:
    """Likewise of a connection of opaque TCP, of which only the caller is known."""
    of = None if said is None or said.hash is None else said.hash.of
    if of is HashOf.ADDRESS:
        return [{"source_ip": {}}]
    return [{"filter_state": {"key": PRINCIPAL}}] if of is HashOf.IDENTITY else []


def of_cluster(said: LoadBalancing | None, detection: OutlierDetection | None) -> Json:
    """What a cluster says."""
    # Envoy's RANDOM knows no weights.
    algorithm = said.algorithm if said is not None else Algorithm.LEAST_REQUEST
    found: Json = {"lb_policy": algorithm.value}
    if said is not None and said.hash is not None:
        found = {"lb_policy": "RING_HASH", "ring_hash_lb_config": _RING}
    elif said is not None and said.warmup is not None:
        found[_CONFIG[algorithm]] = {"slow_start_config": _slow_start(said.warmup)}
    if detection is not None:
        found["outlier_detection"] = _outliers(detection)
        found["common_lb_config"] = {"healthy_panic_threshold": {"value": detection.min_health_percent}}
    return found


def _slow_start(warmup: Warmup) -> Json:
    return {
        "slow_start_window": seconds(warmup.duration_ms),
        "aggression": {"default_value": warmup.aggression / 100, "runtime_key": "uproxy.aggression"},
        "min_weight_percent": {"value": warmup.minimum_percent},
    }


def _outliers(detection: OutlierDetection) -> Json:
    """0 errors eject nobody."""

    def enforced(errors: int) -> int:
        return 100 if errors else 0

    base_ms = detection.base_ejection_ms
    return {
        "consecutive_5xx": detection.consecutive_5xx,
        "enforcing_consecutive_5xx": enforced(detection.consecutive_5xx),
        "consecutive_gateway_failure": detection.consecutive_gateway,
        "enforcing_consecutive_gateway_failure": enforced(detection.consecutive_gateway),
        "consecutive_local_origin_failure": detection.consecutive_local_origin,
        "enforcing_consecutive_local_origin_failure": enforced(detection.consecutive_local_origin),
        "split_external_local_origin_errors": detection.split_local_origin,
        "enforcing_success_rate": 0,
        "enforcing_local_origin_success_rate": 0,
        "interval": seconds(detection.interval_ms),
        "base_ejection_time": seconds(base_ms),
        "max_ejection_time": seconds(max(base_ms, int(LONGEST_S * 1000))),
        "max_ejection_percent": detection.max_ejection_percent,
        "always_eject_one_host": detection.max_ejection_percent > 0,
    }
