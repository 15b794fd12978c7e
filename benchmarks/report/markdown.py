"""What a run found as Markdown: the tables that a page about it is written around. Losses come before gains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.harness.results import Prediction, Results
from benchmarks.report import wording
from benchmarks.report.findings import OURS, Findings, Loss, furthest, judgement, met, outcome
from benchmarks.report.text import median_said


def document(results: Results) -> str:
    """The same results give the same text, byte for byte."""
    findings = Findings(results)
    results = findings.results
    machine, conditions = results.machine, results.conditions
    facts = [f"{name} {machine[name]}" for name in sorted(machine)]
    parts = [
        f"# {'A quick' if results.quick else 'A full'} run of {wording.moment(results.created)}",
        "Generated from the data beside it by `make publish`; what it means stands in [README.md](../README.md).",
        f"It took {wording.lasted(results.seconds)}" + (f": {taken}." if (taken := conditions.get("time")) else "."),
        f"Machine: {_text('; '.join(facts))}.",
        "## Suite by suite",
        _table(
            ("suite", "worse", "better", "cannot be told", "furthest behind", "furthest ahead", "targets"),
            (
                (
                    *(one.suite, len(one.losses) + len(one.unsustained), len(one.gains), one.unclear),
                    *(furthest(one.losses), furthest(one.gains), met(one.targets)),
                )
                for one in findings.tallies()
            ),
        ),
        "## Where we lose",
        *[f"- {_text(one.text)}" for one in findings.unsustained()],
        _decided(findings.losses()),
        "## Where we win",
        _decided(findings.gains()),
        "## Targets",
        _table(
            ("target", "bound", "found (95 %)", "outcome"),
            (
                (one.text, wording.bound(one), wording.ratio(one.ratio) if one.ratio else "", outcome(one))
                for one in results.targets
            ),
        ),
        "## Predictions",
        _table(
            ("of", "subject / baseline", "expected", "found (95 %)", "outcome"),
            (_prediction(findings, one) for one in results.predictions),
        ),
        "## Medians",
        *_medians(findings),
        "## Checks",
        _table(
            ("check", "", "what it says"),
            ((one.name, "passed" if one.passed else "**failed**", one.text) for one in results.checks),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _decided(found: Sequence[Loss]) -> str:
    return _table(
        ("measure", "subject / baseline", "of", "ratio (95 %)", ""),
        (
            (
                wording.question(one.measure),
                f"{one.ratio.subject} / {one.ratio.baseline}",
                wording.key(one.ratio.key, one.measure),
                wording.ratio(one.ratio),
                wording.better(one.measure.better) if one.ratio.key == "value" else "less is better",
            )
            for one in found
        ),
    )


def _prediction(findings: Findings, one: Prediction) -> tuple[str, ...]:
    found = one.ratio
    return (
        one.text,
        f"{one.subject} / {one.baseline}" if one.baseline else one.subject,
        wording.span(one.low, one.high),
        f"{wording.number(found.median)} ({wording.span(found.low, found.high)})" if found else "",
        judgement(findings, one),
    )


def _medians(findings: Findings) -> list[str]:
    """A table for each suite: a line a measure, a column a subject, then the ratios of ours, of value and CPU."""
    parts = []
    for suite, groups in findings.suites().items():
        measures = [measure for group in groups for measure in group.measures]
        subjects = dict.fromkeys(one.subject for _, one in findings.series(measures))
        ratios = [
            (name, key)
            for name in subjects
            for key in ("value", "cpu_us")
            if name in OURS and any(findings.ratio(one.name, name, key) for one in measures)
        ]
        head = ["measure", "unit", *subjects]
        head += [f"{name}, {'ratio' if key == 'value' else 'its CPU'} (95 %)" for name, key in ratios]
        lines = [
            (
                *(wording.question(one), wording.unit(one)),
                *(median_said(findings, one, name) for name in subjects),
                *(wording.ratio(found) if (found := findings.ratio(one.name, *of)) else "" for of in ratios),
            )
            for one in measures
        ]
        parts += [f"### {suite}", _table(head, lines)]
    return parts


def _table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    body = [_line(map(str, line)) for line in lines]
    return "\n".join([_line(head), _line("---" for _ in head), *body]) if body else "None."


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_text, cells))} |"


def _text(words: str) -> str:
    return " ".join(words.split()).replace("|", "\\|").replace("<", "&lt;")
