"""The design's targets that are ratios of what these suites measure, and what each suite's ratios are to."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from benchmarks.harness.results import Better, Ratio, Target

BASELINES: Final = {"paths": "envoy-hbone", "paths/http": "envoy-waypoint", "architectures": "sidecar"}
"""Suite of a measure -> the subject that all others are compared to."""

_OURS: Final = "uproxy"


def _target(text: str, measure: str, bound: float, better: Better = "less", key: str = "value") -> Target:
    return Target(text, measure, _OURS, BASELINES["paths"], key, bound, better)


TARGETS: Final = (
    _target("round trip of 64 B, 1 connection", "paths/rr/1/64", 1.0),
    _target("round trip of 64 B, 64 connections", "paths/rr/64/64", 0.75),
    _target("round trip of 64 B, 500 connections", "paths/rr/500/64", 0.5),
    _target("round trip of 16 KiB, 1 connection", "paths/rr/1/16384", 1.1),
    _target("bulk throughput, 1 stream", "paths/bulk/1", 0.9, "more"),
    _target("new connections per second", "paths/connect", 2.0, "more"),
    _target("p99 of small requests beside a bulk stream", "paths/beside-bulk", 0.3),
    Target(
        "HTTP through a waypoint, as fast as it goes, 16 connections",
        "paths/http/16",
        "waypoint",
        BASELINES["paths/http"],
        "value",
        0.4,  # 2.5 times the requests a second
        "less",
    ),
)


def judged(ratios: list[Ratio]) -> list[Target]:
    """Every target with the ratio that decides on it; none for what this run did not measure."""
    found = {(one.measure, one.subject, one.baseline, one.key): one for one in ratios}
    return [replace(one, ratio=found.get((one.measure, one.subject, one.baseline, one.key))) for one in TARGETS]
