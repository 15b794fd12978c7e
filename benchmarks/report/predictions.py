"""What was expected before the run, beside what it found."""

from __future__ import annotations

from typing import Final

from benchmarks.harness.results import Prediction
from benchmarks.report import wording
from benchmarks.report.findings import Findings, judgement
from benchmarks.report.markup import Html, join, tag
from benchmarks.report.verdicts import table

_COLOURS: Final = {True: "good", False: "bad", None: "soft"}


def section(findings: Findings) -> Html:
    """Nothing of a run that nothing was predicted of."""
    found = findings.results.predictions
    if not found:
        return Html()
    told = [one.held for one in found if one.ratio is not None]
    words = (
        f"{told.count(True)} held, {told.count(False)} wrong, {told.count(None)} not decided: too few rounds, or the "
        f"interval reaches beyond what was expected; {len(found) - len(told)} not measured in this run, or withheld."
    )
    title = tag("h2", "Predictions", id="predictions")
    note = (
        "Written down before the run (docs/benchmarks/predictions.md). One holds when the whole interval is within it."
    )
    rows = [_row(findings, one) for one in found]
    return join([title, tag("p", words), table(note, ["of", "", "#expected", "#found", "outcome"], rows)])


def _row(findings: Findings, one: Prediction) -> Html:
    of = f"{one.subject} / {one.baseline}" if one.baseline else one.subject
    found = wording.ratio(one.ratio) if one.ratio else wording.DASH
    if one.ratio and not one.baseline:
        found = f"{wording.number(one.ratio.median)} ({wording.span(one.ratio.low, one.ratio.high)})"
    return tag(
        "tr",
        tag("th", one.text, scope="row"),
        tag("td", of, class_="nowrap"),
        tag("td", wording.span(one.low, one.high), class_="number"),
        tag("td", found, class_="number"),
        tag("td", tag("b", judgement(findings, one)), class_=_COLOURS[one.held]),
    )
