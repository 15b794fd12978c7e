"""How numbers, units and intervals are written."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Final

from benchmarks.harness.results import Better, Measure, Ratio, Target

UNITS: Final = {"ns": "ns", "us": "µs", "ms": "ms", "s": "s", "mb": "MB"}
"""How the key of a detail ends -> the unit as people write it. All of these are costs: less is better."""
NAMES: Final = {
    "p50": "p50",
    "p90": "p90",
    "p99": "p99",
    "p999": "p99.9",
    "p9999": "p99.99",
    "max": "worst",
    "cpu": "CPU",
    "softirq": "softirq",
    "pss": "PSS",
}
"""Details that people know, in the order of a table's columns."""
PARAMETERS: Final = {
    "bytes": "bytes",
    "rate": "requests/s offered",
    "delay_ms": "delay of the link, ms",
    "l7_percent": "calls that need L7, %",
    "near_percent": "calls that stay on their host, %",
    "rtt_ms": "round trip between hosts, ms",
    "services": "services of the mesh",
    "workloads": "workloads of a host",
}


DASH: Final = "\N{EN DASH}"


def number(value: float) -> str:
    """Three digits that mean something, or all of a whole number: 0.0123, 1.23, 12.3, 123, 12,345."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-4 or size >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(size)))}f}"


def short(value: float) -> str:
    """For an axis: 0.5, 20, 500, 20k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


def duration(nanoseconds: float) -> str:
    """For an axis of times: 500 ns, 20 µs, 5 ms, 1 s."""
    for size, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if nanoseconds >= size:
            return f"{nanoseconds / size:g} {unit}"
    return f"{nanoseconds:g} ns"


def span(low: float, high: float) -> str:
    return f"{number(low)}{DASH}{number(high)}"


def times(value: float) -> str:
    """A ratio: hundredths; more digits where it is small, or so near to 1 that its side could not be seen."""
    if 0 < abs(value - 1) < 0.01:
        return f"{value:.3f}"
    if 0.1 <= abs(value) < 100:
        return f"{value:.2f}"
    return f"{value:.2g}" if abs(value) < 0.1 else number(value)


def ratio(found: Ratio) -> str:
    """`0.95 (0.87-1.15)`."""
    return f"{times(found.median)} ({times(found.low)}{DASH}{times(found.high)})"


def question(measure: Measure) -> str:
    """What was measured, where its group is not said beside it."""
    return measure.label if measure.label.startswith(measure.group) else f"{measure.group}, {measure.label}"


def unit(measure: Measure) -> str:
    return "µs" if measure.unit == "us" else measure.unit


def key(name: str, measure: Measure | None) -> str:
    """What a ratio is of: the measure's own value, or a detail, with its unit."""
    if name == "value":
        return unit(measure) if measure else "value"
    whole, _, part = name.partition("/")
    stem, _, end = whole.rpartition("_")
    of = f" of {part}" if part else ""
    if stem and end in UNITS:
        return f"{NAMES.get(stem, stem.replace('_', ' '))}{of}, {UNITS[end]}"
    return whole.replace("_", " ") + of


def percent(share: float) -> str:
    """`8 %`; `0.3 %` where that would be nothing."""
    return f"{number(100 * share)} %" if share < 0.01 or share >= 10 else f"{100 * share:.0f} %"


def bound(target: Target) -> str:
    return f"{'≤' if target.better == 'less' else '≥'} {target.bound:g}"


def better(direction: Better | None) -> str:
    return {"less": "less is better", "more": "more is better", None: ""}[direction]


def counted(count: int, noun: str, plural: str = "") -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {plural or noun + 's'}"


def moment(created: str) -> str:
    """`23 November 2026, 06:10 UTC`; what is not a date stays as it is."""
    try:
        when = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{when.day} {when:%B %Y, %H:%M} UTC"


def lasted(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
