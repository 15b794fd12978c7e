"""Where should an L7 proxy live? The break-even charts, and a table: a column for each placement, a row a question.

Envoy reads HTTP in the first table; the second one has our waypoint instead. What a run did not measure is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from benchmarks.harness.results import Ratio, Series, Withheld
from benchmarks.harness.statistics import paired
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
_PLAIN_HTTP: Final = "plain-http"
_EQUAL: Final = ("remote", "sidecar-one-pass")
"""Two that read each call once."""
_PASSES: Final = {"sidecar": 2, "node": 2, "service-account": 2, "remote-l4": 0}
"""How often a call is read as HTTP; by a waypoint, once."""
BETWEEN: Final = {"node": 2, "service-account": 2}
"""How often a call crosses between network namespaces in the clear; with a proxy in the workload's own, never.

These and the next two are declared; a test holds them to what stands.
"""
READERS: Final = {
    "sidecar": 10,
    "node": 2,
    "service-account": 6,
    "remote": 1,
    "ours": 1,
    "ours-node": 1,
    "ours-service-account": 2,
    "ours-sidecar": 4,
}
"""Processes that read HTTP."""
CARRIERS: Final = READERS | dict.fromkeys(("remote", "ours", "ours-node", "ours-service-account", "ours-sidecar"), 10)
"""Processes of which each workload's connections take one."""
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
    declared: Mapping[str, int] | None = None
    """The answers themselves, where the measure was taken."""


_QUESTIONS: Final[Mapping[str, Sequence[_Line]]] = {
    "Overhead": (
        _Line("processor time of all proxies and node agents, ms for 1,000 requests", "cpu"),
        _Line("... with broker and control plane, which rest", "cpu", "together_ms"),
        _Line("... where no call needs L7", "l7-cpu/0"),
        _Line("... where half of the calls do", "l7-cpu/50"),
        _Line("... where nine in ten calls stay on their host", "near-cpu/90"),
        _Line("added to p50, ms", f"latency/{RATE}", "added_p50_us", 1e-3),
        _Line("added to p99, ms", f"latency/{RATE}", "added_p99_us", 1e-3),
        _Line("added to p99.9, ms", f"latency/{RATE}", "added_p999_us", 1e-3),
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
        _Line("... limited by its owner, %", "isolation/limited", "failed_percent"),
        _Line("... beside a bad filter, %", "isolation/filter", "failed_percent"),
    ),
    "Security granularity": (
        _Line("keys in the process that has most, as processes declare them", "identities"),
        _Line("workloads that it could pass for", "identities", "could_pass_for"),
        _Line("workloads that take its word on who calls", "identities", "believed_by"),
    ),
    "Upgrade impact": (
        _Line("one process that reads HTTP is replaced: failed and cut", "upgrade/l7"),
        _Line("... of so many", "upgrade/l7", declared=READERS),
        _Line("... callers that saw something", "upgrade/l7", "callers_hit"),
        _Line("one process that carries connections is replaced: failed and cut", "upgrade/l4"),
        _Line("... of so many", "upgrade/l4", declared=CARRIERS),
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

_NOTES: Final = (
    "A p99 has a ratio where ten requests of each round were slower, and p99.9 a number where ten of all rounds "
    "together were: else it is withheld. Refused: the load generator decided the number, or the rate was not "
    "sustained; the suite's tables say which.",
    "A limit counts for each process: where two processes read the requests, twice as many get through. An Envoy of a "
    "node or service account counts for each called workload.",
    "Keys: Envoys list theirs, uProxies and waypoints declare theirs. A node agent holds none here; that of a real "
    "mesh holds one, and may get join tokens for the waypoint processes of its node. The control plane, which is in no "
    "column, holds the CA.",
    "In order to upgrade all, so many processes are replaced. Envoys are, without hot restart, as Istio runs them.",
    "A call crosses between namespaces in the clear where the proxy stands outside of the workload's own: from the "
    "caller to its proxy, and from the other proxy to who is called. Whoever reads the host's links reads it there.",
    "Configuration is looked at once; what is smaller than the starts of an Envoy differ by says nothing. ours-sidecar "
    "is not measured: nobody is called there, so that no process stands beside a workload.",
)
_NO_MAPS: Final = "This run left the kernel maps of hosts with uProxies out of configuration, and started Envoys once."
_WITH_FILTER: Final = "Memory and processes of our waypoints have the processes of the benchmark's bad filter in them."


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
        f"{SUITE}; the table of each row is there, with the range of its rounds."
    )
    figures = tag("div", *drawn, class_="plots two") if drawn else Html()
    tables = [
        _table(findings, "Envoy reads HTTP in every placement", ENVOYS),
        _equal_work(findings),
        _table(findings, "Our waypoint reads HTTP", OURS),
    ]
    title = tag("h2", "Where should an L7 proxy live?", id="placements")
    notes = tag("ul", *(tag("li", one) for one in (*_NOTES, *_earlier(findings))), class_="note")
    return join([title, tag("p", note, class_="note"), figures, *tables, notes])


def _earlier(findings: Findings) -> list[str]:
    """What has to be said of runs of earlier versions."""
    taken = [one for one in findings.results.series if one.measure.startswith(f"{SUITE}/config/") and one.rounds]
    without = taken and not any("kernel_maps_kb" in one.rounds[0].details for one in taken)
    memory = findings.results.conditions.get(f"{SUITE}: memory", "")
    filtered = findings.results.find(f"{SUITE}/memory", "ours") is not None and "bad filter" not in memory
    return [_NO_MAPS] * bool(without) + [_WITH_FILTER] * filtered


def _equal_work(findings: Findings) -> Html:
    """A line: ratios of two that read each call once, where both were measured."""
    said = []
    for words, measure, name in (
        ("processor time", "cpu", "value"),
        (f"p50 at {RATE} requests/s", f"latency/{RATE}", "p50_us"),
        (f"p99 at {RATE} requests/s", f"latency/{RATE}", "value"),
    ):
        one, other = (findings.results.find(f"{SUITE}/{measure}", subject) for subject in _EQUAL)
        if one is None or other is None or one.refused or other.refused:
            continue
        found = paired(one, other, name)
        if isinstance(found, Ratio):
            said.append(f"{words} {wording.ratio(found)}")
        elif isinstance(found, Withheld):
            said.append(f"{words} withheld ({found.reason})")
    if not said:
        return Html()
    words = f"Equal work, each call read once: ratio of {' to '.join(_EQUAL)}, with 95 % intervals: {'; '.join(said)}. "
    return tag("p", words, "The latter has no routes by path, which the waypoint has.")


def _break_even(findings: Findings, what: str, unit: str, part: str, whole: str, scale: float) -> Html:
    """A line for each placement, along the share of calls that need L7; `whole`: the measure where all do."""
    along = _varying(findings, part, "l7_percent") | {f"{SUITE}/{whole}": 100.0}
    words = (
        f" by share of calls that need L7, {unit}. Shaded is the range of the rounds: placements may break even where "
        "ranges overlap."
    )
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
        points, band = [], []
        for name, x in sorted(along.items(), key=lambda one: one[1]):
            values = [value * scale for value in _values(findings.results.find(name, subject))]
            if values:
                y = median(values)
                points.append(Dot(x, y, f"{subject}, {across} {x:g}: {wording.number(y)} {unit}"))
                band.append((x, min(values), max(values)))
        if len(points) > 1:
            line = [(one.x, one.y) for one in points]
            shaded = band if any(low < high for _, low, high in band) else []
            curves.append(Curve(findings.marks[subject], subject, points, line=line, band=shaded))
    if not curves:
        return Html()
    medians = [one.y for curve in curves for one in curve.points]
    every = [*medians, *(end for curve in curves for _, *ends in curve.band for end in ends)]
    drawn = chart(f"{what}, {across}", curves, measured(across, along.values()), axis(unit, fitting(every, medians)))
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
        _row("plaintext hops between namespaces", [str(BETWEEN.get(name, 0)) for name in shown]),
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
    """The number, or why there is none; empty where nothing was to be measured."""
    series = findings.results.find(f"{SUITE}/{line.measure}", subject)
    if series is None:
        return ""
    if line.declared is not None:
        return str(line.declared.get(subject, ""))
    if series.refused:
        return "failed" if series.failed else "refused"
    found = _number(findings, series, line.key)
    if found is None:
        timed = any(one.histogram for one in series.counted)
        return "withheld" if timed and line.key.endswith("p999_us") else ""
    scaled = found * line.scale
    return f"{scaled:.0f}" if scaled == round(scaled) else wording.number(scaled)


def _number(findings: Findings, series: Series, name: str) -> float | None:
    if name == "value":
        values = _values(series)
        return median(values) if values else None
    if name == "added_p999_us":  # of all rounds together: one alone has too few requests
        plain = findings.results.find(series.measure, _PLAIN_HTTP)
        each = [details(one).get("p999_us") for one in (series, plain) if one is not None]
        with_, without = each if len(each) == 2 else (None, None)
        return with_ - without if with_ is not None and without is not None else None
    return details(series).get(name)


def _values(series: Series | None) -> list[float]:
    """Of rounds that count."""
    return [] if series is None or series.refused else [one.value for one in series.counted]
