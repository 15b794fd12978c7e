"""What an engine does not know of resources: it refuses the requests that it is about, and whoever applies it is
warned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Final

from control.api.bindings import Subject, Wish
from control.api.declared import DeclaredGateway, DeclaredTraffic
from control.api.extension import EnvoyFilter, Filter, PythonFilter, type_of
from control.api.gateway import Engine
from control.api.metadata import ENGINE
from control.api.policy import Target
from control.api.problems import Findings
from control.api.traffic import RateLimit, TrafficPolicy

_TRAFFIC: Final = frozenset(
    (
        *("namespace", "name", "targets", "rate_limits", "max_requests", "faults"),
        *("connection_limits", "load_balancing", "outlier_detection", "filters"),
    )
)
_LIMIT: Final = frozenset(("requests", "per_ms", "burst", "share", "header", "rules"))
_OF_PLACES: Final = frozenset(("redis",))
"""What holds where a service is dialled, and not where a route sends requests."""


def unknown_to_envoy(policy: TrafficPolicy, *, backend: bool = False) -> str:
    """The first thing that it asks for and the engine envoy does not know; empty: nothing.

    `backend`: whether it is asked only about how requests go to a service, whatever was dialled.
    """
    if unknown := _unknown(policy, _TRAFFIC | _OF_PLACES if backend else _TRAFFIC):
        return unknown
    if not backend and (unknown := _filter(policy, PythonFilter)):
        return unknown
    if policy.connection_limits is not None and policy.connection_limits.connections:
        return "connectionLimits.maxConnections"
    return next(filter(None, (_unknown(limit, _LIMIT) for limit in policy.rate_limits)), "")


def unknown_to_built_in(policy: TrafficPolicy) -> str:
    """Likewise, of the built-in engine."""
    return _filter(policy, EnvoyFilter)


def _filter(policy: TrafficPolicy, kind: type[Filter]) -> str:
    """The first Extension of a kind."""
    return next((f"Extension {one.extension} ({type_of(one)})" for one in policy.filters if isinstance(one, kind)), "")


def _unknown(value: TrafficPolicy | RateLimit, known: frozenset[str]) -> str:
    """As it is written in a resource."""
    said = (one.name for one in fields(value) if one.name not in known and getattr(value, one.name) != one.default)
    first, *others = next(said, "").split("_")
    return first + "".join(map(str.title, others))


def check_engines(
    declared: Sequence[DeclaredTraffic],
    traffic: Sequence[TrafficPolicy],
    gateways: Mapping[str, DeclaredGateway],
    wishes: Mapping[Subject, Wish],
    findings: Findings,
) -> None:
    """Warns of what waypoints will refuse. `traffic`: what was declared, with its filters. `gateways`: all there are,
    by key.
    """
    for item, policy in zip(declared, traffic, strict=True):
        unknown = {Engine.ENVOY: unknown_to_envoy(policy), Engine.BUILT_IN: unknown_to_built_in(policy)}
        for gateway_key in dict.fromkeys(_gateways(item.targets, wishes)):
            gateway = gateways.get(gateway_key)
            if gateway is not None and unknown[gateway.engine]:
                problem = (
                    f"the engine {gateway.engine.value} of Gateway {gateway_key} does not know "
                    f"{unknown[gateway.engine]}, and refuses all requests that this is about; remove it, or change the "
                    f"annotation {ENGINE}"
                )
                findings.warn(item.position, "spec", problem)


def _gateways(targets: Sequence[Target], wishes: Mapping[Subject, Wish]) -> Iterator[str]:
    for target in targets:
        if target.kind == "Gateway":
            yield target.key
        elif (wish := wishes.get((target.kind, target.key))) is not None:
            yield wish.gateway
            if wish.canary is not None:
                yield wish.canary.gateway
