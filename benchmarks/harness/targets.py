"""The design's targets, those that no suite measures too, and what each suite's ratios are to."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from benchmarks.harness.results import Better, Results, Target
from benchmarks.harness.statistics import value

BASELINES: Final = {
    "paths": "envoy-hbone",
    "paths/http": "envoy-waypoint",
    "paths/near": "near-envoy-hbone",
    "kernel/connect": "bare",
    "kernel/programs": "captured",
    "kernel/direct": "bare",
    "kernel/maps": "captured",
    "kernel/filling": "single",
    "architectures": "sidecar",
    "memory": "envoy",
    "waypoint": "envoy-as-guided",
}
"""Suite of a measure -> the subject that all others are compared to."""

_OURS: Final = "uproxy"


def _target(text: str, measure: str, bound: float, better: Better = "less", key: str = "value") -> Target:
    return Target(text, measure, _OURS, BASELINES["paths"], key, bound, better)


def _elsewhere(text: str, measure: str, bound: float, where: str, subject: str = _OURS, baseline: str = "") -> Target:
    """One that no suite measures. Without a baseline the bound is no ratio; `text` says of what it is."""
    return Target(text, measure, subject, baseline, "value", bound, "less", elsewhere=where)


def _absolute(text: str, measure: str, subject: str, bound: float) -> Target:
    """One whose bound is no ratio but a value; `text` says of what it is."""
    return Target(text, measure, subject, "", "value", bound, "less")


def _direct(text: str, measure: str, bound: float, better: Better) -> Target:
    text = f"same-host direct path against plain TCP, {text}"
    return Target(text, f"kernel/direct/{measure}", "direct", BASELINES["kernel/direct"], "value", bound, better)


_UPGRADES: Final = "full runs show it of one process (architectures/upgrade), and tests count it: docs/upgrades.md"

TARGETS: Final = (
    _target("round trip of 64 B, 1 connection", "paths/rr/1/64", 1.0),
    _target("round trip of 64 B, 64 connections", "paths/rr/64/64", 0.75),
    _target("round trip of 64 B, 500 connections", "paths/rr/500/64", 0.5),
    _target("round trip of 16 KiB, 1 connection", "paths/rr/1/16384", 1.1),
    _target("bulk throughput, 1 stream", "paths/bulk/1", 0.9, "more"),
    _target("new connections per second", "paths/connect", 2.0, "more"),
    _target("p99 of small requests beside a bulk stream", "paths/beside-bulk", 0.3),
    Target(
        "HTTP through a waypoint, 16 connections: the saturated best case",
        "paths/http/16",
        "waypoint",
        BASELINES["paths/http"],
        "value",
        0.4,  # 2.5 times the requests a second
        "less",
    ),
    *(
        Target(
            f"{what} of HTTP/1.1 through a waypoint, 8 clients, at {share} % of the knee",
            f"waypoint/{part}http1/10/{share}",
            "built-in",
            BASELINES["waypoint"],
            "value",
            bound,
            "less",
        )
        for what, part, bound in (("the waypoint's CPU per request", "cpu/", 0.5), ("p99", "", 0.7))
        for share in (10, 50, 80)
    ),
    _direct("round trip of 64 B", "rr/1/64", 1.03, "less"),
    _direct("bulk throughput, 1 stream", "bulk/1", 0.97, "more"),
    _direct("new connections per second", "connect", 0.9, "more"),
    _absolute("memory of each further sidecar, MB", "memory/marginal", _OURS, 20),
    _absolute("memory of each further sidecar from a fork server, MB", "memory/marginal", "uproxy-forked", 8),
    _absolute(
        "a label until it is enforced on one host, the slowest of a round, ms", "control/label/worst", "mesh", 100
    ),
    _absolute("a change until 1,000 proxies have it, the slowest of a round, ms", "control/many/worst", "mesh", 1000),
    _absolute("growth of a uProxy with 10,000 services in the mesh, MB", "control/growth", "mesh", 5),
    _elsewhere("requests that fail in graceful restarts", "restarts", 0, _UPGRADES),
)


def judged(results: Results) -> list[Target]:
    """Every target with the ratio that decides on it; none for what this run did not measure, or withholds."""
    found = {(one.measure, one.subject, one.baseline, one.key): one for one in results.ratios}
    reasons = {(one.measure, one.subject, one.baseline, one.key): one.reason for one in results.withheld}
    judged = []
    for one in TARGETS:
        name = (one.measure, one.subject, one.baseline, one.key)
        ratio = found.get(name) if one.baseline else value(results, one.measure, one.subject)
        judged.append(replace(one, ratio=ratio, elsewhere=reasons.get(name, one.elsewhere)))
    return judged
