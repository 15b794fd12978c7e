"""Whether two runs say the same.

Only ratios are compared, subject to baseline within each run: times belong to the machine and its moment. Of each
measure and subject it is the ratio of the values, and of what a target is about.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.harness.results import FILE, PACKED, Ratio, Results, ResultsError, read
from benchmarks.harness.statistics import agree

Verdict = Literal["agree", "moved", "only in A", "only in B"]


@dataclass(frozen=True, slots=True)
class Row:
    """One ratio, as both runs found it; None where a run did not measure it, or refused to report it."""

    measure: str
    subject: str
    baseline: str
    key: str
    a: Ratio | None
    b: Ratio | None

    @property
    def verdict(self) -> Verdict:
        if self.a is None:
            return "only in B"
        if self.b is None:
            return "only in A"
        return "agree" if agree(self.a, self.b) else "moved"


def load(path: Path) -> Results:
    """A results.json, or a directory with one in it, compressed or not. Raises ResultsError."""
    if not path.is_dir():
        return read(path)
    packed = path / PACKED
    return read(packed if packed.exists() else path / FILE)


def compare(a: Results, b: Results) -> list[Row]:
    """In A's order, then what only B has. Raises ResultsError when the runs have no ratio in common."""
    ours, theirs = _ratios(a), _ratios(b)
    if not ours.keys() & theirs.keys():
        raise ResultsError("the runs have no ratio in common: compare runs of the same suites")
    return [Row(*name, ours.get(name), theirs.get(name)) for name in dict.fromkeys([*ours, *theirs])]


def _ratios(results: Results) -> dict[tuple[str, str, str, str], Ratio]:
    aimed = {(one.measure, one.subject, one.baseline, one.key) for one in results.targets}
    names = {(one.measure, one.subject, one.baseline, one.key): one for one in results.ratios}
    return {name: ratio for name, ratio in names.items() if ratio.key == "value" or name in aimed}
