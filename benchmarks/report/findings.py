"""What the numbers of a run say: medians, what is better or worse, what was lost, and which targets hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, Literal

from benchmarks.harness.histogram import Histogram, count, merge, percentile, width
from benchmarks.harness.results import (
    LEAST_ROUNDS,
    UNSUSTAINED,
    Better,
    Measure,
    Prediction,
    Ratio,
    Results,
    Series,
    Subject,
    Target,
)
from benchmarks.harness.targets import BASELINES
from benchmarks.report.earlier import mended
from benchmarks.report.wording import NAMES, UNITS, percent, question, times

ASIDE: Final = frozenset({"taken_s", "operations"})
"""Details that say how a round was taken, not what it found."""
OURS: Final = frozenset(
    (
        *(
            "uproxy",
            "uproxy-forked",
            "waypoint",
            "built-in",
            "remote",
            "captured",
            "captured-full",
            "direct",
        ),
        *("ours", "ours-node", "ours-service-account", "ours-sidecar"),
        "mesh",
        *("soak-caller", "soak-called", "soak-waypoint", "soak-node-a", "soak-node-b"),
        *("near-uproxy", "near-direct"),
    )
)
"""Subjects that are made of uProxies or of our programs in the kernel; every other one is a peer, or a floor.

`remote-l4` is none of them: it reads no HTTP, and is compared with a `sidecar` that does so twice. Equal work without
L7 is `l7/0` and `l7-cpu/0` of `remote`.
"""
TAIL: Final = 10
"""A percentile is drawn where at least so many requests were slower; beyond it stands luck."""
PERCENTILES: Final = {"p50_us": 0.5, "p99_us": 0.99, "p999_us": 0.999}

Verdict = Literal["better", "worse", "unclear"]


@dataclass(frozen=True, slots=True)
class Loss:
    """A ratio with the whole interval on one side of 1; a gain has a factor below 1."""

    ratio: Ratio
    measure: Measure
    factor: float
    """How many times worse than the baseline, by the median."""


@dataclass(frozen=True, slots=True)
class Unsustained:
    """A rate that a subject did not sustain."""

    series: Series
    measure: Measure
    by: str
    """The baseline, if that did; else empty."""

    @property
    def text(self) -> str:
        """`remote did not sustain 1,000 requests/s: ...; sidecar did`."""
        other = f"; {self.by} did" if self.by else ""
        return f"{self.series.subject} {self.series.refused}, at {question(self.measure)}{other}"


@dataclass(frozen=True, slots=True)
class Tally:
    """What one suite says of ours."""

    suite: str
    losses: Sequence[Loss]
    """The worst first."""
    gains: Sequence[Loss]
    """The best first."""
    unclear: int
    """Ratios whose interval holds 1."""
    unsustained: Sequence[Unsustained]
    targets: Sequence[Target]


@dataclass(frozen=True, slots=True)
class Failure:
    """A subject that failed in one way, at one measure or many."""

    subject: str
    reason: str
    """May end with the last lines of a log."""
    measures: Sequence[Measure]

    @property
    def where(self) -> str:
        """`at 12 measures, first at Round trip, 1 connection`."""
        first = question(self.measures[0])
        return f"at {first}" if len(self.measures) == 1 else f"at {len(self.measures)} measures, first at {first}"


@dataclass(frozen=True, slots=True)
class Group:
    """Measures that share a plot, all in one unit."""

    title: str
    measures: Sequence[Measure]


class Findings:
    """A run, indexed."""

    def __init__(self, results: Results) -> None:
        self.results = results = mended(results)
        self.measures = {one.name: one for one in results.measures}
        self.subjects = {one.name: one for one in results.subjects}
        for series in results.series:
            self.subjects.setdefault(series.subject, Subject(series.subject, series.subject, ""))
        self.marks = {name: index for index, name in enumerate(self.subjects)}
        self._series = {(one.measure, one.subject): one for one in results.series}
        self._baselines = {(one.measure, one.baseline, one.key) for one in results.ratios}
        self._ratios = {(one.measure, one.subject, one.key): one for one in results.ratios}
        self._withheld = {(one.measure, one.subject, one.key): one.reason for one in results.withheld}

    def series(self, measures: Iterable[Measure]) -> list[tuple[Measure, Series]]:
        """What was tried of these measures, subject by subject within each."""
        return [
            (measure, self._series[measure.name, subject])
            for measure in measures
            for subject in self.subjects
            if (measure.name, subject) in self._series
        ]

    def ratio(self, measure: str, subject: str, key: str = "value") -> Ratio | None:
        return self._ratios.get((measure, subject, key))

    def withheld(self, measure: str, subject: str, key: str = "value") -> str:
        """Why there is no ratio, where it is not stated; else empty."""
        return self._withheld.get((measure, subject, key), "")

    def is_baseline(self, measure: str, subject: str, key: str) -> bool:
        return (measure, subject, key) in self._baselines

    def keys(self, measures: Iterable[Measure]) -> list[str]:
        """What these measures' ratios are of; the value first."""
        names = {one.name for one in measures}
        return in_order({ratio.key for ratio in self.results.ratios if ratio.measure in names})

    def suites(self) -> dict[str, list[Group]]:
        """Every suite's groups. A group of several units is several groups: they do not share an axis."""
        suites: dict[str, dict[tuple[str, str, str], list[Measure]]] = {}
        for measure in self.results.measures:
            groups = suites.setdefault(measure.suite, {})
            groups.setdefault((measure.group, measure.unit, measure.better), []).append(measure)
        return {
            suite: [Group(title, measures) for (title, _, _), measures in groups.items()]
            for suite, groups in suites.items()
        }

    def ours(self) -> list[tuple[Ratio, Measure]]:
        """Every ratio of what is ours to what is not: of values, and of details that a target is about.

        The other details say the same once more.
        """
        aimed = {(one.measure, one.key) for one in self.results.targets}
        return [
            (ratio, self.measures[ratio.measure])
            for ratio in self.results.ratios
            if ratio.subject in OURS
            and ratio.baseline not in OURS
            and ratio.measure in self.measures
            and (ratio.key == "value" or (ratio.measure, ratio.key) in aimed)
        ]

    def failures(self) -> list[Failure]:
        """Who failed, in the order in which it was found."""
        found: dict[tuple[str, str], list[Measure]] = {}
        for one in self.results.series:
            if one.failed:
                found.setdefault((one.subject, one.refused), []).append(self.measures[one.measure])
        return [Failure(subject, reason, measures) for (subject, reason), measures in found.items()]

    def unsustained(self) -> list[Unsustained]:
        """Rates that ours did not sustain, where it is compared with what is not ours."""
        found = []
        for one in self.results.series:
            measure = self.measures.get(one.measure)
            baseline = BASELINES.get(measure.suite, "") if measure is not None else ""
            if measure is None or one.subject not in OURS or not baseline or baseline in OURS:
                continue
            if one.refused.startswith(UNSUSTAINED):
                beside = self._series.get((one.measure, baseline))
                sustained = beside is not None and bool(beside.counted) and not beside.refused
                found.append(Unsustained(one, measure, baseline if sustained else ""))
        return found

    def losses(self) -> list[Loss]:
        """The worst first."""
        return sorted(self._decided("worse"), key=lambda one: (-one.factor, *_place(one)))

    def gains(self) -> list[Loss]:
        """The best first."""
        return sorted(self._decided("better"), key=lambda one: (one.factor, *_place(one)))

    def _decided(self, wanted: Verdict) -> list[Loss]:
        return [
            Loss(ratio, measure, factor(ratio, measure))
            for ratio, measure in self.ours()
            if verdict(ratio, measure) == wanted
        ]

    def tallies(self) -> list[Tally]:
        """A line for each suite; parts of a suite ("kernel/direct") are one."""
        lost, gained, carried = self.losses(), self.gains(), self.unsustained()
        unclear = [measure for ratio, measure in self.ours() if verdict(ratio, measure) == "unclear"]
        return [
            Tally(
                suite,
                [one for one in lost if _whole(one.measure.suite) == suite],
                [one for one in gained if _whole(one.measure.suite) == suite],
                sum(_whole(measure.suite) == suite for measure in unclear),
                [one for one in carried if _whole(one.measure.suite) == suite],
                [one for one in self.results.targets if _whole(one.measure) == suite],
            )
            for suite in dict.fromkeys(map(_whole, self.suites()))
        ]


def _place(one: Loss) -> tuple[str, str, str]:
    return one.measure.name, one.ratio.subject, one.ratio.key


def _whole(name: str) -> str:
    return name.partition("/")[0]


def direction(key: str, measure: Measure) -> Better | None:
    """Which way is better; None where nobody said so."""
    if key == "value":
        return measure.better
    return "less" if key.partition("/")[0].rpartition("_")[2] in UNITS else None


def verdict(ratio: Ratio, measure: Measure) -> Verdict:
    """Better or worse only when the whole interval is."""
    way = direction(ratio.key, measure)
    if way is None or ratio.low <= 1 <= ratio.high:
        return "unclear"
    return "better" if (ratio.high < 1) == (way == "less") else "worse"


def factor(ratio: Ratio, measure: Measure) -> float:
    """How many times worse than the baseline."""
    if direction(ratio.key, measure) == "less":
        return ratio.median
    return 1 / ratio.median if ratio.median > 0 else math.inf


def furthest(decided: Sequence[Loss]) -> str:
    """`2.54 times: round trip, 64 B, of uproxy`: the first of them, by the ratio itself."""
    if not decided:
        return ""
    one = decided[0]
    return f"{times(one.ratio.median)}: {question(one.measure)} ({one.ratio.subject} / {one.ratio.baseline})"


def met(targets: Sequence[Target]) -> str:
    """`2 of 5 met, 1 not measured`."""
    if not targets:
        return ""
    missing = sum(one.met is None for one in targets)
    return f"{sum(one.met is True for one in targets)} of {len(targets)} met" + (
        f", {missing} not measured" if missing else ""
    )


def outcome(target: Target) -> str:
    """`not met: the median is 32 % off, the interval's end 52 %`. The end is the one that decides."""
    if target.ratio is None:
        return f"not measured here: {target.elsewhere}" if target.elsewhere else "not measured"
    end = target.ratio.high if target.better == "less" else target.ratio.low
    middle, last = _distance(target, target.ratio.median), _distance(target, end)
    return f"{'met' if target.met else 'not met'}: the median is {middle}, the interval's end {last}"


def judgement(findings: Findings, one: Prediction) -> str:
    """`held`; `one round: not decided`."""
    if one.ratio is None:
        return "withheld" if findings.withheld(one.measure, one.subject, one.key) else "not measured"
    if one.ratio.rounds < LEAST_ROUNDS:
        return f"{'one round' if one.ratio.rounds == 1 else f'{one.ratio.rounds} rounds'}: not decided"
    return {True: "held", False: "wrong", None: "not decided"}[one.held]


def _distance(target: Target, found: float) -> str:
    """How far a ratio is from the bound, as a share of it."""
    kept = found <= target.bound if target.better == "less" else found >= target.bound
    if target.bound == 0:
        return "within" if kept else "off"
    return f"{percent(abs(found - target.bound) / abs(target.bound))} {'within' if kept else 'off'}"


def parameter(measures: Sequence[Measure]) -> str | None:
    """What alone tells these measures apart, and so can be an axis."""
    if len(measures) < 2:
        return None
    names = {name for measure in measures for name in measure.parameters}
    if any(names != set(measure.parameters) for measure in measures):
        return None
    varying = [name for name in sorted(names) if len({measure.parameters[name] for measure in measures}) > 1]
    if len(varying) != 1 or len({measure.parameters[varying[0]] for measure in measures}) < len(measures):
        return None
    return varying[0]


def details(series: Series) -> dict[str, float]:
    """Medians of the details of rounds that count; percentiles that none gave are of all their requests together.

    So is p99.9 always, and it is there where more than TAIL requests were slower.
    """
    found: dict[str, list[float]] = {}
    for one in series.counted:
        for key, value in one.details.items():
            found.setdefault(key, []).append(value)
    requests = merge(one.histogram for one in series.counted)
    whole = {key: percentile(requests, share) / 1e3 for key, share in PERCENTILES.items()} if count(requests) else {}
    if count(requests) * (1 - PERCENTILES["p999_us"]) < TAIL * (1 - 1e-9):
        whole.pop("p999_us", None)
    return whole | {key: median(values) for key, values in found.items() if not key.endswith("p999_us")}


def columns(found: Iterable[Mapping[str, float]]) -> list[str]:
    """Details for a table. What each process had of a sum (`cpu_us/client proxy`) is left to the CSV."""
    return in_order({key for one in found for key in one if key not in ASIDE and "/" not in key})


def in_order(keys: Iterable[str]) -> list[str]:
    """The value, then what people know, then the rest by name."""
    known = list(NAMES)

    def place(key: str) -> tuple[bool, int, str]:
        stem = key.rpartition("_")[0]
        return key != "value", known.index(stem) if stem in known else len(known), key

    return sorted(keys, key=place)


def curve(histogram: Histogram, step: float = 0.05) -> list[tuple[float, float]]:
    """(nines, ns): how slow the slowest tenth, hundredth, thousandth was. 1 nine is the 90th percentile.

    Ends where fewer than TAIL requests are slower; a histogram of fewer than two TAILs is no curve.
    """
    total = count(histogram)
    if total < 2 * TAIL:
        return []
    points: list[tuple[float, float]] = []
    last = math.log10(total / TAIL)
    buckets, passed, bucket = iter(sorted(histogram.items())), 0, 0
    for index in range(1, int(last / step) + 1):
        nines = index * step
        while passed < total * (1 - 10**-nines):
            bucket, number = next(buckets)
            passed += number
        points.append((nines, bucket + width(bucket) / 2))
    return points
