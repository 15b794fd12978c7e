"""Runs of earlier versions, by the rules of this one: what they stated and should not have. Their files stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from benchmarks.harness.results import UNSUSTAINED, Measure, Results, Round, Series, Withheld
from benchmarks.harness.statistics import too_few

_TOO_HIGH: Final = "the rate was too high: "
"""What a refusal said of a rate that the subject did not sustain."""
_LATE_SHARE: Final = 0.5
"""Of a p99: a generator that was late by more is itself why it fell behind."""


def mended(results: Results) -> Results:
    """The same, where this version would have found the same."""
    measures = {one.name: one for one in results.measures}
    series = [_series(one, measures) for one in results.series]
    found = {(one.measure, one.subject): one for one in series}
    ratios, withheld = [], list(results.withheld)
    for ratio in results.ratios:
        both = [found.get((ratio.measure, subject)) for subject in (ratio.subject, ratio.baseline)]
        reason = next((why for one in both if one is not None and (why := too_few(one, ratio.key))), "")
        if reason:
            withheld.append(Withheld(ratio.measure, ratio.subject, ratio.baseline, ratio.key, reason))
        elif not _divided_wrongly(ratio.measure, ratio.key):
            ratios.append(ratio)
    gone = {(one.measure, one.subject, one.baseline, one.key): one.reason for one in withheld}
    targets = [
        replace(one, ratio=None, elsewhere=gone[name])
        if (name := (one.measure, one.subject, one.baseline, one.key)) in gone
        else one
        for one in results.targets
    ]
    predictions = [
        replace(one, ratio=None) if (one.measure, one.subject, one.baseline, one.key) in gone else one
        for one in results.predictions
    ]
    return replace(results, series=series, ratios=ratios, withheld=withheld, targets=targets, predictions=predictions)


def _series(one: Series, measures: Mapping[str, Measure]) -> Series:
    rounds = [
        replace(each, details={key: at for key, at in each.details.items() if not _divided_wrongly(one.measure, key)})
        for each in one.rounds
    ]
    refused = one.refused
    if _TOO_HIGH in refused and not any(map(_late, one.rounds)):
        often, _, why = refused.partition(" rounds say nothing of the subject: ")
        rate = measures[one.measure].parameters.get("rate") if one.measure in measures else None
        asked = f"{rate:,.0f} requests/s" if rate else "the rate"
        refused = f"{UNSUSTAINED} {asked}: {why.removeprefix(_TOO_HIGH).partition(';')[0]} ({often} rounds)"
    return replace(one, rounds=rounds, refused=refused)


def _divided_wrongly(measure: str, key: str) -> bool:
    """Proxies' time for everybody's requests, which was divided by those of one service's callers."""
    return "/isolation/" in measure and key.partition("/")[0] in ("cpu_us", "softirq_us")


def _late(one: Round) -> bool:
    punctual = one.details.get("punctual/p99_us", 0.0)
    return bool(one.bottleneck) and 0 < punctual < _LATE_SHARE * one.details.get("p99_us", 0.0)
