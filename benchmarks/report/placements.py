"""Where should an L7 proxy live? The break-even charts, and a table: a column for each placement, a row a question.

Envoy reads HTTP in the first table; the second one has our waypoint instead. What a run did not measure is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from benchmarks.report import wording
from benchmarks.report.findings import Findings, details
from benchmarks.report.markup import Html, join, tag
from benchmarks.report.plot import Curve, Dot, axis, chart, fitting, key, measured

SUITE: Final = "architectures"
RATE: Final = 500
CROWDS: Final = (2, 10, 30)
"""Workloads of a host."""
ENVOYS: Final = ("sidecar", "sidecar-one-pass", "node", "service-account", "remote", "remote-l4")
OURS: Final = ("ours-sidecar", "ours-node", "ours-service-account", "ours", "remote-l4")
_PASSES: Final = {"sidecar": 2, "node": 2, "service-account": 2, "remote-l4": 0}
"""How often a call is read as HTTP; by a waypoint, once."""
_PLAIN: Final = {
    "sidecar": "in both workloads' own",
    "sidecar-one-pass": "in both workloads' own",
    "node": "in both hosts', with all tenants of each",
    "service-account": "in both accounts' own",
    "remote": "in both uProxies, and the waypoint of all",
    "remote-l4": "in both uProxies",
    "ours": "in both uProxies, and the waypoint of all",
    "ours-node": "in both uProxies, and the waypoint of the called host",
    "ours-service-account": "in both uProxies, and the waypoint of the called account",
    "ours-sidecar": "in both uProxies, and the called workload's own process",
}


@dataclass(frozen=True, slots=True)
class _Line:
    """A row: what is asked, and where the answer is."""

    text: str
    measure: str
    key: str = "value"
    scale: float = 1.0


_QUESTIONS: Final[Mapping[str, Sequence[_Line]]] = {
    "Overhead": (
        _Line("processor time of all proxies and node agents, ms for 1,000 requests", "cpu"),
        _Line("... with broker and control plane, which rest", "cpu", "together_ms"),
        _Line("... where no call needs L7", "l7-cpu/0"),
        _Line("... where half of the calls do", "l7-cpu/50"),
        _Line("... where nine in ten calls stay on their host", "near-cpu/90"),
        _Line("added to p50, ms", f"latency/{RATE}", "added_p50_us", 1e-3),
        _Line("added to p99, ms", f"latency/{RATE}", "added_p99_us", 1e-3),
        _Line("p99.9, ms", f"latency/{RATE}", "p999_us", 1e-3),
        _Line("p50 with hosts 1 ms apart, ms", "rtt/1", "p50_us", 1e-3),
        _Line("memory after the load, 10 workloads on two hosts, MB", "memory"),
        *(
            line
            for size in CROWDS
            for line in (
                _Line(f"memory of a host with {size} workloads, MB", f"density/{size}", "host_mb"),
                _Line("... with a waypoint elsewhere, broker and control plane", f"density/{size}"),
                _Line("... the same, uProxies of a fork server", f"density-forked/{size}"),
            )
        ),
        _Line("processes in all", "identities", "processes"),
    ),
    "Feature isolation": (
        _Line("p99 alone, ms", "isolation/calm", "value", 1e-3),
        _Line("... beside a neighbour's flood, without limits", "isolation/flood", "value", 1e-3),
        _Line("... the same, limited by its owner", "isolation/limited", "value", 1e-3),
        _Line("... beside a neighbour's bad filter", "isolation/filter", "value", 1e-3),
        _Line("requests that fail beside a flood, %", "isolation/flood", "failed_percent"),
    ),
    "Security granularity": (
        _Line("keys in the process that has most", "identities"),
        _Line("workloads that it could pass for", "identities", "could_pass_for"),
        _Line("workloads that take its word on who calls", "identities", "believed_by"),
    ),
    "Upgrade impact": (
        _Line("of one process that reads HTTP: failed and cut", "upgrade/l7"),
        _Line("... callers that saw something", "upgrade/l7", "callers_hit"),
        _Line("of one process that carries connections: failed and cut", "upgrade/l4"),
        _Line("... callers that saw something", "upgrade/l4", "callers_hit"),
    ),
    "Configuration": (
        _Line("in the process that holds most, KB, 10 services", "config/10", "most_kb"),
        _Line("... 1,000 services", "config/1000", "most_kb"),
        _Line("in all processes, KB, 10 services", "config/10"),
        _Line("... 1,000 services", "config/1000"),
    ),
}
"""Those of the article; `_table` adds where calls are in the clear."""


def section(findings: Findings) -> Html:
    """Nothing where the suite was not run."""
    if f"{SUITE}/cpu" not in findings.measures:
        return Html()
    charts = [
        _break_even(findings, "Processor time", "ms for 1,000 requests", "l7-cpu/", "cpu", 1.0),
        _break_even(findings, "p99", "ms", "l7/", f"latency/{RATE}", 1e-3),
        _memory(findings, "density", "each uProxy an interpreter of its own"),
        _memory(findings, "density-forked", "uProxies of a fork server"),
    ]
    drawn = [one for one in charts if one]
    note = (
        f"Medians at {RATE} requests/s by all callers. How placements are measured stands with the suite "
        f"{SUITE}; the table of each row is there, with intervals."
    )
    figures = tag("div", *drawn, class_="plots two") if drawn else Html()
    tables = [
        _table(findings, "Envoy reads HTTP in every placement", ENVOYS),
        _table(findings, "Our waypoint reads HTTP", OURS),
    ]
    title = tag("h2", "Where should an L7 proxy live?", id="placements")
    return join([title, tag("p", note, class_="note"), figures, *tables])


def _break_even(findings: Findings, what: str, unit: str, part: str, whole: str, scale: float) -> Html:
    """A line for each placement, along the share of calls that need L7; `whole`: the measure where all do."""
    along = _varying(findings, part, "l7_percent") | {f"{SUITE}/{whole}": 100.0}
    words = f" by share of calls that need L7, {unit}. Where lines cross is where placements break even."
    return _chart(findings, what, unit, along, scale, "calls that need L7, %", words)


def _memory(findings: Findings, part: str, how: str) -> Html:
    """A line for each placement, along the workloads of a host."""
    along = _varying(findings, f"{part}/", "workloads")
    words = f" by workloads of a host, MB: proxies, node agent, kernel maps, waypoint, broker and control plane; {how}."
    return _chart(findings, "Memory of everything", "MB", along, 1.0, "workloads of a host", words)


def _varying(findings: Findings, part: str, parameter: str) -> dict[str, float]:
    """Measures whose name begins so -> what differs between them."""
    begin = f"{SUITE}/{part}"
    return {name: one.parameters[parameter] for name, one in findings.measures.items() if name.startswith(begin)}


def _chart(
    findings: Findings, what: str, unit: str, along: Mapping[str, float], scale: float, across: str, words: str
) -> Html:
    curves = []
    for subject in findings.subjects:
        points = [
            Dot(x, found * scale, f"{subject}, {across} {x:g}: {wording.number(found * scale)} {unit}")
            for name, x in sorted(along.items(), key=lambda one: one[1])
            if (found := _number(findings, name, subject, "value")) is not None
        ]
        if len(points) > 1:
            line = [(one.x, one.y) for one in points]
            curves.append(Curve(findings.marks[subject], subject, points, line=line))
    if not curves:
        return Html()
    values = [one.y for curve in curves for one in curve.points]
    drawn = chart(f"{what}, {across}", curves, measured(across, along.values()), axis(unit, fitting(values, values)))
    return tag("figure", tag("figcaption", tag("b", what), Html(" "), words), drawn)


def _table(findings: Findings, title: str, placements: Sequence[str]) -> Html:
    shown = [name for name in placements if name in findings.subjects]
    if len(shown) < 2:
        return Html()
    bodies = []
    for question, lines in _QUESTIONS.items():
        answers = [_row(one.text, [_cell(findings, one, name) for name in shown]) for one in lines]
        bodies.append(_body(question, len(shown), [one for one in answers if one]))
    hops = [
        _row("readings of a call as HTTP", [str(_PASSES.get(name, 1)) for name in shown]),
        _row("where a call is in the clear", [_PLAIN[name] for name in shown], style="words"),
    ]
    bodies.append(_body("Plaintext hops", len(shown), hops))
    heads = [tag("th", key(findings.marks[name]), findings.subjects[name].label, scope="col") for name in shown]
    head = tag("thead", tag("tr", tag("td"), *heads))
    return tag(
        "div",
        tag("table", tag("caption", tag("span", title)), head, *bodies),
        class_="scroll questions",
        tabindex="0",
        role="region",
        aria_label=title,
    )


def _body(question: str, columns: int, answers: Sequence[Html]) -> Html:
    """Nothing where nothing was measured."""
    if not answers:
        return Html()
    title = tag("th", tag("b", question), colspan=str(columns + 1), scope="rowgroup")
    return tag("tbody", tag("tr", title), *answers)


def _row(text: str, cells: Sequence[str], *, style: str = "number") -> Html:
    """Nothing where no cell says anything."""
    if not any(cells):
        return Html()
    return tag("tr", tag("th", text, scope="row"), *(tag("td", cell, class_=style) for cell in cells))


def _cell(findings: Findings, line: _Line, subject: str) -> str:
    found = _number(findings, f"{SUITE}/{line.measure}", subject, line.key)
    if found is None:
        return ""
    scaled = found * line.scale
    return f"{scaled:.0f}" if scaled == round(scaled) else wording.number(scaled)


def _number(findings: Findings, measure: str, subject: str, name: str) -> float | None:
    series = findings.results.find(measure, subject)
    if series is None or series.refused or not series.counted:
        return None
    return median(one.value for one in series.counted) if name == "value" else details(series).get(name)
