"""The same findings for a terminal, at the end of a run."""

from __future__ import annotations

from statistics import median

from benchmarks.harness.results import Measure, Results
from benchmarks.harness.statistics import TOO_FEW
from benchmarks.report import wording
from benchmarks.report.findings import OURS, Findings, outcome, verdict
from control.cli.output import printable, show_table


def show(results: Results) -> None:
    """Print a table for each suite, a line for each measure; then the targets, and what may not be trusted."""
    findings = Findings(results)
    results = findings.results
    for suite, groups in findings.suites().items():
        measures = [measure for group in groups for measure in group.measures]
        subjects = list(dict.fromkeys(one.subject for _, one in findings.series(measures)))
        subjects.sort(key=findings.marks.__getitem__)
        ours = [name for name in subjects if name in OURS]
        print(f"\nSuite {printable(suite)}, medians")
        show_table(
            ("MEASURE", "UNIT", *map(str.upper, subjects), *(f"RATIO OF {name.upper()}" for name in ours)),
            [
                (
                    wording.question(measure),
                    wording.unit(measure),
                    *(median_said(findings, measure, subject) for subject in subjects),
                    *(_ratio(findings, measure, subject) for subject in ours),
                )
                for measure in measures
            ],
        )
    for failure in findings.failures():
        first, *more = map(printable, failure.reason.splitlines() or [""])
        print(f"\nFAILED: {printable(failure.subject)} {printable(failure.where)}: {first}", *more, sep="\n  ")
    _show_remarks(results)
    if results.targets:
        print("\nTargets")
        show_table(
            ("TARGET", "BOUND", "FOUND", "OUTCOME"),
            [
                (one.text, wording.bound(one), wording.ratio(one.ratio) if one.ratio else "", outcome(one))
                for one in results.targets
            ],
        )
    failed = [one for one in results.checks if not one.passed]
    if failed:
        print("\nThese numbers may not be trusted:")
    for one in failed:
        print(f"  {printable(' '.join(f'{one.name}: {one.text}'.split()))}")
    if not results.checks:
        print("\nThe instrument was not checked in this run.")


def median_said(findings: Findings, measure: Measure, subject: str) -> str:
    """Empty: not measured."""
    found = findings.results.find(measure.name, subject)
    if found is None or not (found.counted or found.refused):
        return ""
    if found.refused:
        return "failed" if found.failed else "refused"
    return wording.number(median(one.value for one in found.counted))


def _ratio(findings: Findings, measure: Measure, subject: str) -> str:
    """`0.95 (0.87-1.15) better`, to the baseline of this measure."""
    ratio = findings.ratio(measure.name, subject)
    if ratio is None:
        return "withheld" if findings.withheld(measure.name, subject) else ""
    said = verdict(ratio, measure)
    return wording.ratio(ratio) + ("" if said == "unclear" else f" {said}")


def _show_remarks(results: Results) -> None:
    """Why there is no number, or not a number to compare with."""
    found = [(one.measure, one.subject, one.refused or one.remark) for one in results.series if not one.failed]
    remarks = [one for one in found if one[-1]]
    withheld = [one for one in results.withheld if one.key == "value"]
    few = [one for one in withheld if one.reason.startswith(TOO_FEW)]
    remarks += [(one.measure, one.subject, one.reason) for one in withheld if one not in few]
    if remarks:
        print("\nRefused, or to be read with care")
        show_table(("MEASURE", "SUBJECT", "WHY"), remarks)
    if few:
        print(f"\nWithheld for {TOO_FEW}: {wording.counted(len(few), 'ratio')} of percentiles; the report has each.")
