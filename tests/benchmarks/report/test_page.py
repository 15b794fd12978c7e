"""The page: whole, closed in itself, the same each time, and it says first what is bad."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks.harness.results import Check, Measure, Ratio, Results, Round, Series, Subject, Target, Withheld, read
from benchmarks.harness.statistics import TOO_FEW
from benchmarks.report import write
from benchmarks.report.findings import Findings
from benchmarks.report.markdown import document
from benchmarks.report.markup import tag
from benchmarks.report.page import page
from benchmarks.report.plot import WIDTH
from benchmarks.report.text import show
from benchmarks.report.verdicts import SHOWN
from benchmarks.report.wording import ratio
from tests.support.results import ROUNDS, realistic, runs

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


class Document(HTMLParser):
    """A page as elements and text. Fails on an element that is not closed where it must be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, name: str) -> list[str]:
        return [found[name] for _, found in self.elements if name in found]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words.append(data)


def drawn(document: Document) -> list[float]:
    """Every coordinate."""
    names = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "d")
    return [float(found) for name in names for text in document.attributes(name) for found in NUMBER.findall(text)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(runs())
def test_any_results_make_a_page(results: Results) -> None:
    text = page(results)
    text.encode()
    document = Document(text)
    assert {tag for tag, _ in document.elements}.isdisjoint({"script", "img", "iframe", "object", "embed", "form"})
    places = document.attributes("id")
    assert len(places) == len(set(places))
    links = {link for link in document.attributes("href") if not link.startswith("#")}
    assert links == {"results.json", "results.csv"}
    assert {link[1:] for link in document.attributes("href") if link.startswith("#")} <= set(places)
    assert "nan" not in "".join(document.attributes("d"))
    assert all(-WIDTH <= value <= 3 * WIDTH for value in drawn(document))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(runs())
def test_any_results_make_a_text(results: Results) -> None:
    show(results)


def test_the_same_results_make_the_same_page(tmp_path: Path) -> None:
    realistic().write(tmp_path / "results.json")
    path = write(read(tmp_path / "results.json"), tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == page(realistic())


def test_the_page_needs_nothing_from_outside() -> None:
    text = page(realistic())
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    assert not re.search(r"https?:|url\(|@import|<script|\son\w+=", text)
    assert "prefers-color-scheme: dark" in text


def test_names_are_text() -> None:
    name = '<script>alert(1)</script>"&'
    results = realistic()
    results.subjects.append(Subject(name, name, name, name))
    results.measures[0] = replace(results.measures[0], group=name, label=name)
    results.series.append(Series(results.measures[0].name, name, [Round(0, 5)], remark=name))
    document = Document(page(results))
    assert "script" not in {tag for tag, _ in document.elements}
    assert document.text.count(name) >= 5


def test_what_would_reorder_a_line_does_not_reach_the_page() -> None:
    results = replace(realistic(), conditions={"a\u202eb": "c\x00d\ud800"})
    assert "a?b" in page(results)
    assert "c?d?" in page(results)


def test_a_failed_check_stands_above_everything() -> None:
    assert 'role="alert"' not in page(realistic())
    text = page(realistic(failed=True))
    assert text.index('role="alert"') < text.index("A full run")
    assert "These numbers may not be trusted. 1 check failed" in Document(text).text
    assert text.count("Our median and wrk&#x27;s differ by 31 %.") == 2


def test_a_run_without_checks_says_so() -> None:
    assert "was not checked" in page(replace(realistic(), checks=[]))
    assert "was not checked" not in page(replace(realistic(), checks=[Check("one", True, "")]))


def test_losses_come_before_anything_else_that_was_found() -> None:
    text = Document(page(realistic())).text
    places = [
        text.index(words) for words in ("with the whole 95 %", "A target is met", "Made in this run", "7 rounds each")
    ]
    assert places == sorted(places)


def test_many_losses_are_folded_behind_the_largest() -> None:
    results = realistic()
    measures = [Measure(f"paths/x/{n}", "paths", "round trip", f"{n} B", "us") for n in range(SHOWN + 2)]
    ratios = [Ratio(one.name, "uproxy", "envoy", "value", 2 + n, 1.5 + n, 3 + n, 5) for n, one in enumerate(measures)]
    text = page(replace(results, measures=measures, ratios=ratios, series=[], targets=[]))
    (largest, folded, smallest) = (text.index(words) for words in ("15.00 times", "2 smaller losses", ">2.00 times"))
    assert largest < folded < smallest
    assert "smaller losses" not in page(realistic())


def test_each_suite_says_how_often_ours_is_worse_and_better() -> None:
    measures = [Measure("kernel/a/1", "kernel/a", "dial", "x", "us"), Measure("paths/b", "paths", "rr", "y", "us")]
    ratios = [
        Ratio("kernel/a/1", "captured", "bare", "value", 1.25, 1.2, 1.3, 5),
        Ratio("paths/b", "uproxy", "envoy", "value", 0.5, 0.4, 0.6, 5),
        Ratio("paths/b", "near-uproxy", "envoy", "value", 1.0, 0.9, 1.1, 5),
    ]
    aimed = Target("quickly", "paths/b", "uproxy", "envoy", "value", 0.3, "less", ratios[1])
    results = Results("now", quick=False, measures=measures, ratios=ratios, targets=[aimed])
    first, second = Findings(results).tallies()
    assert (first.suite, len(first.losses), len(first.gains), first.unclear) == ("kernel", 1, 0, 0)
    assert (second.suite, len(second.losses), len(second.gains), second.unclear) == ("paths", 0, 1, 1)
    dash = "\N{EN DASH}"
    text = Document(page(results)).text
    assert f"kernel 1 0 0 1.25: dial, x (captured / bare) {dash} {dash}" in text
    assert f"paths 0 1 1 {dash} 0.50: rr, y (uproxy / envoy) 0 of 1 met" in text
    written = document(results)
    assert "| kernel | 1 | 0 | 0 | 1.25: dial, x (captured / bare) |  |  |" in written
    assert written.index("1.25 (1.20") < written.index("## Where we win") < written.index("0.50 (0.40")


def test_words_keep_their_distance_from_markup_before_them() -> None:
    assert tag("p", tag("b", "p99"), " by\n share") == "<p><b>p99</b> by share</p>"


def test_every_round_of_every_series_is_drawn() -> None:
    results = realistic()
    document = Document(page(results))
    shown = [one for one in results.series if not one.refused]
    dots = [found for tag, found in document.elements if tag == "circle" and found["class"].startswith("round")]
    assert len(dots) == ROUNDS * len(shown)
    for one in shown[0].rounds:
        assert f"{shown[0].subject}, round {one.number}: " in document.text


def test_a_round_that_does_not_count_is_hollow_and_in_no_median() -> None:
    measure = Measure("paths/rr", "paths", "round trip", "64 B", "us")
    values = {1: 100.0, 2: 110.0, 3: 120.0, 4: 9000.0}
    rounds = [
        Round(
            number,
            value,
            {"p99_us": 2 * value},
            {64: 1000} if value < 9000 else {1 << 22: 1000},
            "sent late" if value > 1000 else "",
        )
        for number, value in values.items()
    ]
    document = Document(page(Results("now", quick=True, measures=[measure], series=[Series("paths/rr", "a", rounds)])))
    dots = [found["class"] for tag, found in document.elements if tag == "circle"]
    assert dots == ["round", "round", "round", "round hollow"]
    assert "a, round 4: 9,000 µs; does not count: sent late" in document.text
    assert "a, 64 B: 110 µs (100\N{EN DASH}120)" in document.text
    assert " 110 100\N{EN DASH}120 " in document.text
    assert " 220 " in document.text
    assert "3 rounds each" in document.text
    # Of a reference, which says so, all rounds are shown and count.
    bound = Series("paths/rr", "a", rounds, remark="bound by the generator")
    assert [one.number for one in bound.counted] == [1, 2, 3, 4]


def test_a_ratio_that_is_withheld_has_its_reason_in_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    results = realistic()
    gone = next(one for one in results.ratios if (one.measure, one.subject) == ("paths/open/500", "uproxy"))
    results.ratios.remove(gone)
    results.withheld.append(Withheld(gone.measure, gone.subject, gone.baseline, gone.key, "the generator was late"))
    assert "no ratio: the generator was late" in Document(page(results)).text
    show(results)
    out = capsys.readouterr().out
    assert re.search(r"^latency at a rate, p99, 500 requests/s .* withheld$", out, re.MULTILINE)
    assert re.search(r"^paths/open/500 +uproxy +the generator was late$", out, re.MULTILINE)


def test_ratios_of_too_few_requests_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    results = realistic()
    results.withheld += [
        Withheld("paths/open/500", name, "envoy-hbone", "value", f"{TOO_FEW}: 500 in a round of {name}")
        for name in ("uproxy", "envoy-tls")
    ]
    show(results)
    out = capsys.readouterr().out
    assert "Withheld for too few requests: 2 ratios of percentiles" in out
    assert "500 in a round" not in out


def test_a_refused_series_has_its_reason_and_no_dot() -> None:
    text = Document(page(realistic())).text
    assert "no number: the load generator decided 3 of 7 rounds" in text
    new = text[text.index("In 1/s") : text.index("small requests beside a bulk stream In")]
    assert "uproxy, round 3" in new
    assert "haproxy-tls, round 3" not in new


def test_a_method_said_for_a_group_stands_beside_it() -> None:
    text = Document(page(realistic())).text
    assert "a late request is timed from when it was due. In µs, less is better; 7 rounds each." in text


def test_a_condition_of_one_suite_stands_there_alone() -> None:
    text = Document(page(realistic())).text
    assert text.count("12 workloads of 4 services") == 1
    assert text.index("Suite architectures How this suite was measured workloads 12 workloads") > text.index(
        "haproxy-tls"
    )


def test_what_one_process_had_is_left_to_the_csv() -> None:
    text = page(realistic())
    assert "CPU, µs" in text
    assert "client proxy" not in text
    assert "taken, s" not in text


def test_an_axis_is_logarithmic_only_where_values_are_far_apart() -> None:
    text = Document(page(realistic())).text
    assert "Gbit/s, log scale" in text
    connections = text[text.index("In 1/s") : text.index("small requests beside a bulk stream In")]
    assert "1/s, log scale" not in connections


def test_the_text_has_a_line_for_each_measure(capsys: pytest.CaptureFixture[str]) -> None:
    results = realistic(failed=True)
    found = next(one for one in results.ratios if (one.measure, one.subject) == ("paths/bulk/4", "uproxy"))
    show(results)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("round trip of 64 B, ")]) == 4
    bulk = next(line for line in lines if line.startswith("bulk throughput, 4 streams"))
    assert re.split(" {2,}", bulk)[1] == "Gbit/s"
    assert bulk.endswith(f"  {ratio(found)} worse")
    assert "refused" in next(line for line in lines if line.startswith("new connections, connect"))
    warned = lines.index("These numbers may not be trusted:")
    assert lines[warned + 1 :] == ["  cross-check: Our median and wrk's differ by 31 %."]


def test_placements_are_one_table_and_two_charts() -> None:
    document = Document(page(realistic()))
    after = document.text.index("Where should an L7 proxy live? Medians")
    assert "Processor time by share of calls that need L7, ms for 1,000 requests" in document.text[after:]
    table = document.text[document.text.index("Envoy reads HTTP in every placement", after) :]
    assert table.index("processor time of all proxies") < table.index("readings of a call as HTTP 2 2 2 1 0")
    assert "isolation" not in table[: table.index("readings of a call as HTTP")], "nothing was measured of it"
    assert "Plaintext hops" in table
    assert "Memory of everything" not in document.text


def placement(results: Results, name: str, subject: str) -> Series:
    """A series of the suite; a measure that the run did not have is made."""
    full = f"architectures/{name}"
    if full not in {one.name for one in results.measures}:
        results.measures.append(Measure(full, "architectures", name, name, "us"))
    if results.find(full, subject) is None:
        results.series.append(Series(full, subject, [Round(number, 2000.0 + number) for number in (1, 2, 3)]))
    found = results.find(full, subject)
    assert found is not None
    return found


def test_a_table_says_why_there_is_no_number() -> None:
    results = realistic()
    for subject in ("sidecar", "node", "service-account", "remote"):
        placement(results, "latency/500", subject)
        placement(results, "upgrade/l7", subject)
    placement(results, "latency/500", "node").refused = "did not sustain 500 requests/s"
    failed = placement(results, "upgrade/l7", "service-account")
    failed.refused, failed.failed = "it ended", True
    sidecar = placement(results, "latency/500", "sidecar")
    sidecar.rounds = [replace(one, details={"added_p99_us": 800.0}) for one in sidecar.rounds]
    placement(results, "latency/500", "remote").rounds = [Round(1, 5.0, {"p999_us": 9.0}, {5000: 500})]
    text = Document(page(results)).text
    table = text[text.index("Envoy reads HTTP in every placement") :]
    assert "added to p99, ms 0.800 refused added to p99.9, ms refused withheld p99.9, ms refused withheld" in table
    assert "failed and cut 2002 2002 failed 2002 ... of so many 10 2 6 1" in table
    assert "plaintext hops between namespaces 0 2 2 0 0" in table
    assert "that of a real mesh holds one" in text


def test_equal_work_stands_beside_the_table() -> None:
    results = realistic()
    results.subjects.append(Subject("sidecar-one-pass", "one pass", ""))
    assert "Equal work" not in Document(page(results)).text
    own = results.find("architectures/cpu", "remote")
    assert own is not None
    halves = [replace(one, value=one.value / 2) for one in own.rounds]
    results.series.append(Series("architectures/cpu", "sidecar-one-pass", halves))
    said = "ratio of remote to sidecar-one-pass, with 95 % intervals: processor time 2.00 (1.94\N{EN DASH}2.06)."
    assert said in Document(page(results)).text


@pytest.mark.parametrize(("rounds", "shaded"), [(1, False), (7, True)])
def test_break_even_is_drawn_with_the_range_of_the_rounds(rounds: int, shaded: bool) -> None:
    results = realistic()
    for one in results.series:
        one.rounds = [replace(each, histogram={}) for each in one.rounds[:rounds]]
    document = Document(page(results))
    assert ("band" in document.attributes("class")) is shaded
    assert "placements may break even where ranges overlap" in document.text


def test_rates_that_ours_did_not_sustain_are_the_first_losses() -> None:
    results = realistic()
    name = "architectures/latency/1000"
    for subject, mark in (("remote", "remote did not sustain"), ("remote-l4", "")):
        series = results.find(name, subject)
        assert series is not None
        series.refused = "did not sustain 1,000 requests/s: 700 ms (7 of 7 rounds)"
        text = Document(page(results)).text
        assert text.index("remote did not sustain 1,000") < text.index("with the whole 95 %")
        assert not mark or mark in document(results)
    assert "remote-l4 did not sustain" not in text
    assert "1 rate that ours did not sustain." in text


def test_memory_of_placements_stands_along_the_workloads_of_a_host() -> None:
    results = realistic()
    for size, mb in ((2, 200.0), (10, 300.0)):
        name = f"architectures/density/{size}"
        group = "Memory of everything, by workloads of a host"
        parameters = {"workloads": float(size)}
        results.measures.append(Measure(name, "architectures", group, f"{size}", "MB", parameters=parameters))
        results.series += [
            Series(name, one, [Round(1, mb + at, {"host_mb": mb + at - 120})])
            for at, one in enumerate(("sidecar", "node", "remote"))
        ]
    text = Document(page(results)).text
    table = text[text.index("Envoy reads HTTP in every placement") :]
    assert "Memory of everything by workloads of a host, MB: proxies, node agent" in text[: -len(table)]
    assert "memory of a host with 10 workloads, MB 180 181" in table
    assert "with a waypoint elsewhere, broker and control plane 300 301" in table


def test_what_was_predicted_stands_beside_what_was_found() -> None:
    document = Document(page(realistic()))
    assert re.search(r"\d+ held, \d+ wrong, \d+ not decided", document.text)
    assert (
        "lost while a process that reads HTTP is replaced sidecar 1.00\u20138.00 \u2013 not measured" in document.text
    )


def test_without_the_suite_nothing_is_said_of_placements() -> None:
    results = realistic()
    results.measures = [one for one in results.measures if one.suite == "paths"]
    results.series = [one for one in results.series if one.measure.startswith("paths/")]
    results.ratios = [one for one in results.ratios if one.measure.startswith("paths/")]
    results.predictions = []
    document = Document(page(results))
    assert "L7 proxy live" not in document.text
    assert "Predictions" not in document.text
