"""One group of measures: its plots, its table, and how its numbers came about."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from statistics import median

from benchmarks.harness.histogram import merge
from benchmarks.harness.results import Measure, Ratio, Round, Series
from benchmarks.report import wording
from benchmarks.report.findings import Findings, Group, columns, curve, details, parameter, verdict
from benchmarks.report.markup import Html, tag
from benchmarks.report.plot import (
    Axis,
    Block,
    Curve,
    Dot,
    Row,
    axis,
    chart,
    fitting,
    key,
    linear,
    logarithmic,
    measured,
    rows,
)
from benchmarks.report.verdicts import ratios, table

NINES = [(0.30103, "50 %"), (1.0, "90 %"), (2.0, "99 %"), (3.0, "99.9 %"), (4.0, "99.99 %")]


def section(findings: Findings, group: Group, anchor: str) -> Html:
    """A heading, a note on the method, plots side by side, and the table."""
    tried = findings.series(group.measures)
    counted = [(measure, series) for measure, series in tried if series.counted and not series.refused]
    title = tag("h3", group.title or group.measures[0].name, id=anchor)
    plots = [*_values(findings, group, counted), *_ratios(findings, group), *_latencies(findings, group, counted)]
    note = method(findings, group, [series for _, series in counted])
    figures = tag("div", *plots, class_="plots two" if len(plots) in (2, 4) else "plots") if plots else Html()
    return tag("section", title, tag("p", note, class_="note"), figures, _table(findings, group, tried))


def method(findings: Findings, group: Group, counted: Sequence[Series]) -> str:
    """What this group's numbers are. A condition named after the suite or the group belongs here."""
    measure = group.measures[0]
    conditions = findings.results.conditions
    said = [conditions[name] for name in dict.fromkeys((measure.suite, group.title)) if conditions.get(name)]
    taken = sorted({len(series.counted) for series in counted})
    often = f"{wording.span(taken[0], taken[-1]) if len(taken) > 1 else taken[0]} rounds each" if taken else "no rounds"
    if taken == [1]:
        often = "one round each, so no interval means anything"
    numbers = f"In {wording.unit(measure)}, {wording.better(measure.better)}; {often}."
    return " ".join([*said, numbers])


def _values(findings: Findings, group: Group, counted: Sequence[tuple[Measure, Series]]) -> list[Html]:
    """Every round and the medians: along the one parameter that varies, or row by row."""
    if not counted:
        return []
    unit = wording.unit(group.measures[0])
    every = fitting(
        (one.value for _, series in counted for one in series.rounds), (median(_all(series)) for _, series in counted)
    )
    along = parameter(group.measures)
    if along is None:
        blocks = [
            Block(measure.label if len(group.measures) > 1 else "", [_row(findings, measure, one) for _, one in found])
            for measure, found in _by_measure(counted)
        ]
        drawn = rows(group.title, blocks, axis(unit, every))
    else:
        name = wording.PARAMETERS.get(along, along.replace("_", " "))
        across = measured(name, (measure.parameters[along] for measure in group.measures))
        drawn = chart(group.title, _curves(findings, counted, along), across, axis(unit, every))
    words = f", {unit}. Every round is a dot, hollow where it does not count; marks are medians."
    return [_figure(drawn, group.title or unit, words)]


def _curves(findings: Findings, counted: Sequence[tuple[Measure, Series]], along: str) -> list[Curve]:
    curves = []
    for subject in findings.subjects:
        own = sorted(
            ((measure.parameters[along], measure, series) for measure, series in counted if series.subject == subject),
            key=lambda one: one[0],
        )
        if own:
            points = [Dot(x, median(_all(series)), _tip(measure, series)) for x, measure, series in own]
            dots = [
                Dot(x, one.value, _round_tip(measure, series, one), counts=one in series.counted)
                for x, measure, series in own
                for one in series.rounds
            ]
            curves.append(Curve(findings.marks[subject], subject, points, dots))
    return curves


def _row(findings: Findings, measure: Measure, series: Series) -> Row:
    values = _all(series)
    middle = median(values)
    rounds = [
        Dot(one.value, 0, _round_tip(measure, series, one), counts=one in series.counted) for one in series.rounds
    ]
    return Row(
        findings.marks[series.subject],
        series.subject,
        middle,
        min(values),
        max(values),
        wording.number(middle),
        _tip(measure, series),
        rounds,
    )


def _ratios(findings: Findings, group: Group) -> list[Html]:
    """A plot for each thing that was compared: value, processor time, percentiles."""
    plots = []
    for name in findings.keys(group.measures):
        found = [
            (measure, ratio)
            for measure in group.measures
            for subject in findings.subjects
            if (ratio := findings.ratio(measure.name, subject, name))
        ]
        blocks = [
            Block(
                measure.label if len(group.measures) > 1 else "",
                [_interval(findings, one, measure) for _, one in pairs],
            )
            for measure, pairs in groupby(found, key=lambda pair: pair[0])
        ]
        if not blocks:
            continue
        baselines = ", ".join(dict.fromkeys(ratio.baseline for _, ratio in found))
        less = name != "value" or group.measures[0].better == "less"
        sides = ("← better", "worse →") if less else ("← worse", "better →")
        scale = axis(f"ratio to {baselines}", ratios(ratio for _, ratio in found), most=5)
        what = group.title if name == "value" else wording.key(name, group.measures[0])
        drawn = rows(f"{what}, ratio to {baselines}", blocks, scale, at=1, ends=sides)
        words = f": {what}. Medians of the rounds' ratios, and their 95 % intervals."
        plots.append(_figure(drawn, f"Ratio to {baselines}", words))
    return plots


def _interval(findings: Findings, ratio: Ratio, measure: Measure) -> Row:
    words = f"{ratio.subject} / {ratio.baseline}, {measure.label}: {wording.ratio(ratio)}, {ratio.rounds} rounds"
    value = wording.times(ratio.median)
    return Row(findings.marks[ratio.subject], ratio.subject, ratio.median, ratio.low, ratio.high, value, words)


def _latencies(findings: Findings, group: Group, counted: Sequence[tuple[Measure, Series]]) -> list[Html]:
    """How slow the slowest were, where requests were timed: all rounds together, and the range of the rounds."""
    drawn: list[tuple[Measure, list[Curve]]] = []
    for measure, found in _by_measure(counted):
        curves = []
        for _, series in found:
            line = curve(merge(one.histogram for one in series.counted))
            if len(line) > 1:
                each = [curve(one.histogram) for one in series.counted]
                band = [
                    (together[0][0], min(y for _, y in together), max(y for _, y in together))
                    for together in zip(*(one for one in each if one), strict=False)
                ]
                curves.append(Curve(findings.marks[series.subject], series.subject, line=line, band=band))
        if curves:
            drawn.append((measure, curves))
    every = [y for _, curves in drawn for one in curves for _, y in one.line if y > 0]
    every += [y for _, curves in drawn for one in curves for band in one.band for y in band[1:] if y > 0]
    up = axis("latency", logarithmic(every) if every else linear([1]), wording.duration)
    far = max((one.line[-1][0] for _, curves in drawn for one in curves), default=1.0)
    across = Axis(
        "share of requests at most this slow", linear([far]), [tick for tick in NINES if tick[0] <= far * 1.06]
    )
    return [
        _figure(
            chart(f"{group.title}, {measure.label}: latency by percentile", curves, across, up),
            "Latency",
            f": {measure.label}. All rounds that count together; shaded, the range of the rounds.",
        )
        for measure, curves in drawn
    ]


def _table(findings: Findings, group: Group, tried: Sequence[tuple[Measure, Series]]) -> Html:
    if not tried:
        return tag("p", "Nothing was measured here.")
    found = {id(series): details(series) for _, series in tried}
    keys = columns(found.values())
    names = [measure.name for measure in group.measures]
    against = dict.fromkeys(ratio.baseline for ratio in findings.results.ratios if ratio.measure in names)
    unit = wording.unit(group.measures[0])
    head = ["measure", "subject", f"#median, {unit}", "#range of rounds"]
    head += [f"#ratio to {', '.join(against)}"] if against else []
    compared = [name for name in findings.keys(group.measures) if name != "value"]
    for name in keys:
        head += [f"#{wording.key(name, None)}"] + (["#its ratio"] if name in compared else [])
    bodies = []
    for measure, series in _by_measure(tried):
        lines = []
        for index, (_, one) in enumerate(series):
            first = tag("th", measure.label, scope="rowgroup", rowspan=len(series)) if index == 0 else Html()
            name = tag("span", key(findings.marks[one.subject]), one.subject, class_="nowrap")
            remark = tag("span", one.remark, class_="remark") if one.remark else Html()
            cells = _cells(findings, measure, one, found[id(one)], keys, compared if against else None)
            subject = tag("th", name, remark, scope="row")
            lines.append(tag("tr", first, subject, *cells))
        bodies.append(tag("tbody", *lines, class_="measure"))
    words = f"{group.title}: medians over rounds that count" + (
        ", ratios with their 95 % intervals." if against else "."
    )
    return table(words, head, bodies, bodies=True)


def _cells(
    findings: Findings,
    measure: Measure,
    series: Series,
    found: dict[str, float],
    keys: Sequence[str],
    compared: Sequence[str] | None,
) -> list[Html]:
    """A series' part of its line, from the median on. `compared`: which keys have a column of ratios, if any has."""
    if series.refused or not series.counted:
        width = 2 + len(keys) + (0 if compared is None else 1 + len(compared))
        reason = series.refused or "no round was taken"
        # A log stands with the failures.
        words = f"failed: {reason.partition(chr(10))[0]}" if series.failed else f"no number: {reason}"
        return [tag("td", words, colspan=width, class_="soft")]
    values = _all(series)
    cells = [
        tag("td", tag("b", wording.number(median(values))), class_="number"),
        tag("td", wording.span(min(values), max(values)), class_="number"),
    ]
    if compared is not None:
        cells.append(_ratio(findings, measure, series, "value"))
    for name in keys:
        cells.append(tag("td", wording.number(found[name]) if name in found else "", class_="number"))
        cells += [_ratio(findings, measure, series, name)] if name in (compared or ()) else []
    return cells


def _ratio(findings: Findings, measure: Measure, series: Series, name: str) -> Html:
    ratio = findings.ratio(measure.name, series.subject, name)
    if ratio is None:
        if reason := findings.withheld(measure.name, series.subject, name):
            return tag("td", f"no ratio: {reason}", class_="soft")
        words = "baseline" if findings.is_baseline(measure.name, series.subject, name) else ""
        return tag("td", words, class_="number soft")
    said = verdict(ratio, measure)
    colour = {"better": "good", "worse": "bad", "unclear": "soft"}[said]
    words = wording.ratio(ratio) + ("" if said == "unclear" else f" {said}")
    return tag("td", words, class_=f"number {colour}")


def _by_measure(pairs: Sequence[tuple[Measure, Series]]) -> list[tuple[Measure, list[tuple[Measure, Series]]]]:
    return [(measure, list(found)) for measure, found in groupby(pairs, key=lambda pair: pair[0])]


def _figure(drawn: Html, name: str, words: str) -> Html:
    return tag("figure", tag("figcaption", tag("b", name), words), drawn)


def _all(series: Series) -> list[float]:
    return [one.value for one in series.counted]


def _tip(measure: Measure, series: Series) -> str:
    """What a mark says when it is pointed at."""
    values = _all(series)
    found = f"{wording.number(median(values))} {wording.unit(measure)} ({wording.span(min(values), max(values))})"
    return f"{series.subject}, {measure.label}: {found}"


def _round_tip(measure: Measure, series: Series, one: Round) -> str:
    found = f"{series.subject}, round {one.number}: {wording.number(one.value)} {wording.unit(measure)}"
    return f"{found}; does not count: {one.bottleneck}" if one.bottleneck else found
