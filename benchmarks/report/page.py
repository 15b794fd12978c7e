"""The page: what a colleague reads who was not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks.harness.results import FILE, Results
from benchmarks.report import placements, predictions, verdicts, wording
from benchmarks.report.findings import Findings
from benchmarks.report.groups import section
from benchmarks.report.markup import Html, join, tag
from benchmarks.report.plot import key
from benchmarks.report.style import sheet

POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"
"""The page fetches nothing and runs nothing, and a browser sees to it."""
METHOD: Final = """
All subjects of a suite stand at once and are measured in turn, round by round, so that whatever else the machine does
meets all of them. A ratio is taken within each round; reported are the median of these and its 95 % bootstrap interval.
Better or worse is said only when the whole interval is. Absolute times belong to the machine and the day: compare
ratios.
"""

QUICK: Final = (
    "A quick run: few and short rounds, wide intervals. Left out are round trips of 1 KB, 8 streams, delayed links, "
    "idle connections, slow readers, dials of workloads by their own addresses, the other rates, and of the placements "
    "our waypoints, most shares of L7, calls that stay on their host, hosts that are apart, isolation and upgrades."
)


def write(results: Results, directory: Path, data: str = FILE) -> Path:
    """Make report.html, to lie beside the file `data` and results.csv. Raises OSError."""
    path = directory / "report.html"
    path.write_text(page(results, data), encoding="utf-8")
    return path


def page(results: Results, data: str = FILE) -> str:
    """The same results give the same page, byte for byte."""
    findings = Findings(results)
    title = f"uProxy benchmarks, {wording.moment(results.created)}"
    suites = _suites(findings)
    special = {f"{suite}: {name}" for suite in findings.suites() for name in _conditions(results, suite)}
    main = tag(
        "main",
        tag("h1", "uProxy benchmarks"),
        verdicts.banner(results.checks),
        verdicts.failures(findings),
        tag("p", _what(results)),
        verdicts.summary(findings),
        _contents(findings),
        placements.section(findings),
        verdicts.losses(findings),
        verdicts.tallies(findings),
        predictions.section(findings),
        verdicts.targets(findings),
        verdicts.checks(results.checks),
        tag("h2", "How to read this", id="method"),
        tag("p", METHOD),
        _subjects(findings),
        *suites,
        tag("h2", "Machine and conditions", id="machine"),
        _fields("The machine", results.machine),
        _fields("The conditions", {name: said for name, said in results.conditions.items() if name not in special}),
        _files(data),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(sheet())),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', main), lang='en')}\n".replace("<tr>", "\n<tr>")


def _what(results: Results) -> str:
    """When, how long, of which commit, on which machine."""
    kind = QUICK if results.quick else "A full run."
    machine = results.machine
    facts = [f"Begun {wording.moment(results.created)}"]
    facts += [f"took {wording.lasted(results.seconds)}"] if results.seconds else []
    facts += [f"{name} {machine[name]}" for name in ("uProxy", "kernel", "processor", "cores") if machine.get(name)]
    return f"{kind} {'; '.join(facts)}."


def _contents(findings: Findings) -> Html:
    links = [("placements", "Where should an L7 proxy live?")] if placements.section(findings) else []
    links += [("losses", "Where we lose")]
    links += [("tallies", "Suite by suite")] if findings.measures else []
    links += [("predictions", "Predictions")] if findings.results.predictions else []
    links += [("targets", "Targets")]
    links += [("checks", "Checks")] if findings.results.checks else []
    links += [("method", "How to read this")]
    links += [(_anchor(index), f"Suite {suite}") for index, suite in enumerate(findings.suites())]
    links += [("machine", "Machine and conditions"), ("files", "Files")]
    items = [tag("li", tag("a", name, href=f"#{place}")) for place, name in links]
    return tag("nav", tag("ul", *items), aria_label="Contents")


def _suites(findings: Findings) -> list[Html]:
    parts = []
    for index, (suite, groups) in enumerate(findings.suites().items()):
        parts.append(tag("h2", f"Suite {suite}", id=_anchor(index)))
        parts.append(_fields("How this suite was measured", _conditions(findings.results, suite)))
        parts += [section(findings, group, f"{_anchor(index)}-{place}") for place, group in enumerate(groups)]
    return parts


def _conditions(results: Results, suite: str) -> dict[str, str]:
    """What `SUITE: NAME` says of how one suite alone was measured."""
    begin = f"{suite}: "
    return {name.removeprefix(begin): text for name, text in results.conditions.items() if name.startswith(begin)}


def _anchor(index: int) -> str:
    return f"suite-{index}"


def _subjects(findings: Findings) -> Html:
    body = [
        tag(
            "tr",
            tag("th", key(findings.marks[name]), name, scope="row", class_="nowrap"),
            tag("td", tag("b", subject.label), f". {subject.description} {subject.version}"),
        )
        for name, subject in findings.subjects.items()
    ]
    return verdicts.table("The subjects", ["subject", "what it is"], body) if body else Html()


def _fields(caption: str, fields: Mapping[str, str]) -> Html:
    lines = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in fields.items()]
    if not lines:
        return Html()
    return tag("div", tag("table", tag("caption", caption), tag("tbody", *lines), class_="fields"), class_="scroll")


def _files(data: str) -> Html:
    items = [
        tag("li", tag("a", data, href=data), ": everything, with every round and every histogram"),
        tag(
            "li",
            tag("a", "results.csv", href="results.csv"),
            ": a line for each round, with what each process had of processor time and memory",
        ),
    ]
    return join([tag("h2", "Files", id="files"), tag("ul", *items)])
