"""What a reader asks first: may these numbers be trusted, where do we lose, and which targets are met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from benchmarks.harness.results import Check, Ratio, Target
from benchmarks.report import wording
from benchmarks.report.findings import Findings, direction, furthest, met, outcome, verdict
from benchmarks.report.markup import Html, join, tag, text
from benchmarks.report.plot import Row, Scale, logarithmic, strip

SHOWN: Final = 12
"""Losses that are seen at once; the others are a tap away."""
LEVEL: Final = (0.8, 1.25)
"""Every axis of ratios reaches at least so far: an interval that is drawn large means something."""


def banner(checks: Sequence[Check]) -> Html:
    """A warning above everything, when the instrument did not vouch for itself."""
    failed = [check for check in checks if not check.passed]
    if failed:
        what = f"{wording.counted(len(failed), 'check')} failed in this run:"
        reasons = [tag("p", f"{check.name}: {check.text}") for check in failed]
        return tag(
            "div", tag("p", tag("b", "These numbers may not be trusted.")), tag("p", what), *reasons, class_="banner",
            role="alert",
        )  # fmt: skip
    if not checks:
        return tag("div", tag("p", tag("b", "The instrument was not checked in this run.")), class_="banner")
    return Html()


def failures(findings: Findings) -> Html:
    """Who failed, with all that is known of why."""
    failed = findings.failures()
    if not failed:
        return Html()
    said = []
    for one in failed:
        first, *log = one.reason.splitlines() or [""]
        said.append(tag("p", tag("b", f"{one.subject} failed"), Html(" "), f"{one.where}: {first}"))
        # Line by line: text that is escaped as a whole becomes one line.
        said += [tag("div", tag("pre", Html("\n".join(map(text, log)))), class_="scroll")] if log else []
    return tag("div", *said, class_="banner")


def summary(findings: Findings) -> Html:
    """One sentence on ratios, one on targets."""
    said = [verdict(ratio, measure) for ratio, measure in findings.ours()]
    decided = [target.met for target in findings.results.targets]
    sentences = []
    if said:
        sentences.append(
            f"Ratios of uProxy's values to its baselines': {said.count('better')} better, {said.count('worse')} worse, "
            f"{said.count('unclear')} without a difference that this run can show."
        )
    if carried := findings.unsustained():
        sentences.append(f"{wording.counted(len(carried), 'rate')} that ours did not sustain.")
    if decided:
        yes, no, open_ = map(decided.count, (True, False, None))
        sentences.append(f"Targets: {yes} met, {no} not met, {open_} not measured.")
    return tag("p", " ".join(sentences)) if sentences else Html()


def tallies(findings: Findings) -> Html:
    """Suite by suite: how many ratios are worse and better, the furthest of each, and targets."""
    found = findings.tallies()
    if not found:
        return Html()
    body = [
        tag(
            "tr",
            tag("th", one.suite, scope="row"),
            tag("td", str(len(one.losses) + len(one.unsustained)), class_="number"),
            tag("td", str(len(one.gains)), class_="number"),
            tag("td", str(one.unclear), class_="number"),
            tag("td", furthest(one.losses) or wording.DASH, class_="prose"),
            tag("td", furthest(one.gains) or wording.DASH, class_="prose"),
            tag("td", met(one.targets) or wording.DASH),
        )
        for one in found
    ]
    note = (
        "Ratios of what is ours to what is not, by whole 95 % intervals; a rate that ours did not sustain is worse. A "
        "suite without a peer has targets and checks."
    )
    head = ["suite", "#worse", "#better", "#cannot be told", "furthest behind", "furthest ahead", "targets"]
    return join([tag("h2", "Suite by suite", id="tallies"), table(note, head, body)])


def losses(findings: Findings) -> Html:
    """Every rate that ours did not sustain, and every ratio whose whole interval is on the wrong side of 1."""
    lost, compared = findings.losses(), len(findings.ours())
    carried = [tag("li", one.text) for one in findings.unsustained()]
    title = join([tag("h2", "Where we lose", id="losses"), tag("ul", *carried) if carried else Html()])
    if not compared:
        return join([title, tag("p", "Nothing of ours was compared with a baseline in this run.")])
    if not lost:
        also = "Besides, nowhere" if carried else "Nowhere"
        return join(
            [title, tag("p", f"{also} that this run can tell: no interval of {compared} is wholly on the wrong side.")]
        )
    scale = ratios([loss.ratio for loss in lost])
    body = [
        tag(
            "tr",
            tag("th", wording.question(loss.measure), scope="row"),
            tag("td", wording.ratio(loss.ratio), class_="number"),
            tag("td", _cell(findings, loss.ratio, scale, 1, "bad"), class_="strip"),
            tag("td", f"{wording.times(loss.factor)} times", class_="number"),
            tag("td", wording.key(loss.ratio.key, loss.measure)),
            tag("td", wording.better(direction(loss.ratio.key, loss.measure)), class_="soft"),
            tag("td", f"{loss.ratio.subject} / {loss.ratio.baseline}", class_="nowrap"),
        )
        for loss in lost
    ]
    note = (
        f"{wording.counted(len(lost), 'ratio')} of {compared} with the whole 95 % interval on the wrong side of 1 "
        "(dashed), the largest loss first."
    )
    head = ["measure", "#ratio", "", "#worse", "of", "", "subject / baseline"]
    if len(body) <= SHOWN:
        return join([title, table(note, head, body)])
    rest = wording.counted(len(body) - SHOWN, "smaller loss", "smaller losses")
    further = tag("details", tag("summary", rest), table("The smaller losses.", head, body[SHOWN:]))
    return join([title, table(note, head, body[:SHOWN]), further])


def targets(findings: Findings) -> Html:
    """Every target of the design, with what this run found."""
    found = findings.results.targets
    title = tag("h2", "Targets", id="targets")
    if not found:
        return join([title, tag("p", "This run has no targets.")])
    scale = ratios(
        [one.ratio for one in found if one.ratio and one.baseline], [one.bound for one in found if one.baseline]
    )
    body = [
        tag(
            "tr",
            tag("th", target.text, scope="row"),
            tag("td", *_outcome(target), class_="outcome"),
            tag("td", wording.bound(target), class_="number"),
            tag("td", wording.ratio(target.ratio) if target.ratio else wording.DASH, class_="number"),
            tag("td", _target(findings, target, scale), class_="strip"),
        )
        for target in found
    ]
    note = "A target is met when the whole 95 % interval is within its bound (dashed)."
    return join([title, table(note, ["target", "outcome", "#bound", "#found", ""], body)])


def _outcome(target: Target) -> list[Html]:
    colour = {True: "good", False: "bad", None: "soft"}[target.met]
    said, colon, rest = outcome(target).partition(":")
    return [tag("span" if target.met is None else "b", said, class_=colour), Html(f"{colon} "), text(rest)]


def checks(found: Sequence[Check]) -> Html:
    """The instrument's tests of itself."""
    body = [
        tag(
            "tr",
            tag("th", check.name, scope="row"),
            tag("td", tag("b", "passed", class_="good") if check.passed else tag("b", "failed", class_="bad")),
            tag("td", check.text, class_="prose"),
            tag("td", "; ".join(f"{name.replace('_', ' ')} {wording.number(v)}" for name, v in check.details.items())),
        )
        for check in found
    ]
    title = tag("h2", "Checks of the instrument", id="checks")
    note = "Made in this run, on this machine."
    return join([title, table(note, ["check", "", "what it says", "numbers"], body)]) if body else Html()


def table(caption: str, head: Iterable[str], body: Sequence[Html], *, bodies: bool = False) -> Html:
    """A table that scrolls by itself where the screen is too narrow. `bodies`: `body` is whole `tbody` elements.

    A heading that begins with # stands over numbers.
    """
    top = tag("thead", tag("tr", *map(_head, head)))
    rows = join(body) if bodies else tag("tbody", *body)
    name = tag("caption", tag("span", caption)) if caption else Html()
    return tag("div", tag("table", name, top, rows), class_="scroll", tabindex="0", role="region", aria_label=caption)


def _head(cell: str) -> Html:
    if not cell:
        return tag("td")
    return tag("th", cell.removeprefix("#"), scope="col", class_="number" if cell.startswith("#") else "")


def ratios(found: Iterable[Ratio], bounds: Iterable[float] = ()) -> Scale:
    """An axis for ratios: logarithmic, so that twice and half are as far from 1."""
    values = [value for ratio in found for value in (ratio.low, ratio.median, ratio.high)]
    return logarithmic([*LEVEL, *(value for value in (*values, *bounds) if value > 0 and math.isfinite(value))])


def _target(findings: Findings, target: Target, scale: Scale) -> Html:
    if target.ratio is None or not target.baseline:
        return Html()
    return _cell(findings, target.ratio, scale, target.bound, "good" if target.met else "bad")


def _cell(findings: Findings, ratio: Ratio, scale: Scale, at: float, colour: str) -> Html:
    words = wording.ratio(ratio)
    mark = findings.marks.get(ratio.subject, 0)
    return strip(words, Row(mark, "", ratio.median, ratio.low, ratio.high, "", words), scale, at, colour)
