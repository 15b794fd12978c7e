"""What a run of the benchmarks found, as data: the JSON that is written, compared, and drawn.

A *measure* is one question ("round trip of 64 B, 64 connections"), a *subject* one answerer ("Envoy pair, HBONE"), a
*series* all rounds of one measure on one subject. Ratios are between series whose rounds alternated in one run, and
nothing else is ever compared inside a report: absolute times belong to the machine.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

SCHEMA = 1
FILE = "results.json"
PACKED = f"{FILE}.xz"
"""The same, compressed, as it is published."""
"""What a run is called in its directory."""
LEAST_ROUNDS: Final = 3
"""Of fewer there is no ratio: the interval of two reaches 6 standard deviations to each side, and says nothing."""
UNSUSTAINED: Final = "did not sustain"
"""How the reason of a round, or of a refusal, begins where the subject carried less than it was asked for."""

Better = Literal["less", "more"]


class ResultsError(Exception):
    """A results file that cannot be read: says which file, what is wrong with it, and what would be right."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Something that is measured: `name` is short and unique ("envoy-hbone"), `label` is for people."""

    name: str
    label: str
    description: str
    """One or two sentences: which processes, where, speaking what."""
    version: str = ""
    """Of the program, as it says itself: "Envoy 1.40.0"."""
    reference: bool = False
    """The wire itself, without a proxy: shown also where the load generator decided, and labelled so."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One question. `name` is unique in a run: "paths/rr/64/64B"."""

    name: str
    suite: str
    group: str
    """Measures of one group share a plot: its title."""
    label: str
    unit: str
    """Of a round's value: us, ms, Gbit/s, 1/s, MB, identities, ms/1000 requests ..."""
    better: Better = "less"
    parameters: Mapping[str, float] = field(default_factory=dict)
    """What distinguishes it within its group: connections, bytes, rate, delay_ms, ..."""


@dataclass(frozen=True, slots=True)
class Round:
    """One measurement. Keys of `details` carry their unit: p50_us, p99_us, p999_us, max_us, cpu_us, softirq_us, ..."""

    number: int
    value: float
    details: Mapping[str, float] = field(default_factory=dict)
    histogram: Mapping[int, int] = field(default_factory=dict)
    """HDR counts: lower bound of the bucket in ns -> how many; empty where nothing was timed."""
    bottleneck: str = ""
    """Why this round is shown, and is in no ratio: the load generator decided it, or the subject did not sustain the
    rate (UNSUSTAINED)."""


@dataclass(slots=True)
class Series:
    """All rounds of one measure on one subject. `refused` says why there is no number to report."""

    measure: str
    subject: str
    rounds: list[Round] = field(default_factory=list)
    refused: str = ""
    failed: bool = False
    """`refused` says how the subject failed: it is not the harness that refuses."""
    remark: str = ""
    """What has to stand beside the numbers: "bound by the generator"."""

    @property
    def counted(self) -> list[Round]:
        """Of what medians and ratios are: not of rounds that the load generator decided, but for a reference."""
        return [one for one in self.rounds if self.remark or not one.bottleneck]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Subject over baseline, round by round: the median, and its 95 % bootstrap interval."""

    measure: str
    subject: str
    baseline: str
    key: str
    """"value", or a key of the rounds' details."""
    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Withheld:
    """A ratio that is not stated, and why."""

    measure: str
    subject: str
    baseline: str
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Target:
    """A target of the design, and whether this run meets it: the whole interval has to."""

    text: str
    measure: str
    subject: str
    baseline: str
    key: str
    bound: float
    better: Better
    ratio: Ratio | None = None
    """None: not measured in this run, or withheld."""
    elsewhere: str = ""
    """Of a target that no suite measures: where it is, or that nothing does yet. Why a ratio is withheld."""

    @property
    def met(self) -> bool | None:
        if self.ratio is None:
            return None
        return self.ratio.high <= self.bound if self.better == "less" else self.ratio.low >= self.bound


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was expected before anything was measured, and what this run found."""

    text: str
    measure: str
    subject: str
    baseline: str
    """Empty: of the value itself, else of the ratio to it."""
    key: str
    low: float
    high: float
    ratio: Ratio | None = None
    """None: not measured in this run, or withheld."""

    @property
    def held(self) -> bool | None:
        """None: not measured, too few rounds, or the interval reaches out of what was expected without leaving it."""
        if self.ratio is None or self.ratio.rounds < LEAST_ROUNDS:
            return None
        if self.low <= self.ratio.low and self.ratio.high <= self.high:
            return True
        return False if self.ratio.high < self.low or self.ratio.low > self.high else None


@dataclass(frozen=True, slots=True)
class Check:
    """A test of the instrument itself, made in the run that it vouches for."""

    name: str
    passed: bool
    text: str
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Results:
    """A whole run."""

    created: str
    """ISO 8601, UTC."""
    quick: bool
    seconds: float = 0.0
    machine: dict[str, str] = field(default_factory=dict)
    """What it ran on and with: kernel, processor, cores, every program's version, the commit."""
    conditions: dict[str, str] = field(default_factory=dict)
    """How it was measured: pinning, rounds, warm-up, congestion control, delays."""
    subjects: list[Subject] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    withheld: list[Withheld] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def find(self, measure: str, subject: str) -> Series | None:
        return next((one for one in self.series if (one.measure, one.subject) == (measure, subject)), None)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA} | asdict(self)

    def write(self, path: Path) -> None:
        # A full run has some hundred thousand buckets of histograms: no spaces.
        path.write_text(json.dumps(self.to_json(), separators=(",", ":")) + "\n")


def read(path: Path) -> Results:
    """What `Results.write` wrote, compressed or not. Raises ResultsError."""
    try:
        found = json.loads(lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_text())
    except lzma.LZMAError as error:
        raise ResultsError(f"{path} is not compressed by xz ({error}); give the results.json of a run") from error
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}; give the results.json of a run") from error
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON ({error}); give the results.json of a run") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ResultsError(f"{path} is not the results of a run, of schema {SCHEMA}; give a results.json")
    try:
        return _results(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultsError(f"{path} lacks what results have: {error!r}") from error


def _results(found: dict[str, Any]) -> Results:
    return Results(
        created=found["created"],
        quick=found["quick"],
        seconds=found["seconds"],
        machine=found["machine"],
        conditions=found["conditions"],
        subjects=[Subject(**one) for one in found["subjects"]],
        measures=[Measure(**one) for one in found["measures"]],
        series=[_series(one) for one in found["series"]],
        ratios=[_ratio(one) for one in found["ratios"]],
        withheld=[Withheld(**one) for one in found.get("withheld", [])],
        targets=[Target(**(one | {"ratio": one["ratio"] and _ratio(one["ratio"])})) for one in found["targets"]],
        predictions=[
            Prediction(**(one | {"ratio": one["ratio"] and _ratio(one["ratio"])}))
            for one in found.get("predictions", [])
        ],
        checks=[Check(**one) for one in found["checks"]],
    )


def _ratio(found: dict[str, Any]) -> Ratio:
    return Ratio(**(found | {name: float(found[name]) for name in ("median", "low", "high")}))


def _series(found: dict[str, Any]) -> Series:
    rounds = [
        Round(**(one | {"histogram": {int(bound): count for bound, count in one["histogram"].items()}}))
        for one in found["rounds"]
    ]
    # Older runs do not say who failed.
    failed = found.get("failed", False)
    return Series(found["measure"], found["subject"], rounds, found["refused"], failed, found["remark"])
