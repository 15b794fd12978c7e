"""Two runs compared: what agrees, what moved, and what only one of them has."""

import json
from dataclasses import replace

import pytest

from benchmarks.harness.compare import compare, load
from benchmarks.harness.results import Ratio, Results, ResultsError, Target
from control.cli.__main__ import main


def ratio(measure: str, median: float, reach: float = 0.1, key: str = "value") -> Ratio:
    return Ratio(measure, "uproxy", "envoy-hbone", key, median, median - reach, median + reach, 5)


def run(*ratios: Ratio, aimed: tuple[str, str] = ("", "")) -> Results:
    measure, key = aimed
    target = Target("of the design", measure, "uproxy", "envoy-hbone", key, 1.0, "less")
    return Results("2026-01-01T00:00:00Z", quick=True, ratios=list(ratios), targets=[target] if measure else [])


BEFORE = run(ratio("rr", 1.0), ratio("bulk", 0.5), ratio("connect", 2.0))
AFTER = run(ratio("rr", 1.15), ratio("bulk", 0.75), ratio("idle", 0.3))


def test_ratios_agree_when_their_intervals_meet():
    assert [(row.measure, row.verdict) for row in compare(BEFORE, AFTER)] == [
        ("rr", "agree"),
        ("bulk", "moved"),
        ("connect", "only in A"),
        ("idle", "only in B"),
    ]


def test_details_are_compared_where_a_target_is_about_them():
    tails = run(
        ratio("rr", 1.0), ratio("rr", 1.0, key="p99_us"), ratio("rr", 1.0, key="p50_us"), aimed=("rr", "p99_us")
    )
    assert [row.key for row in compare(tails, tails)] == ["value", "p99_us"]


def test_a_run_agrees_with_itself_and_the_order_does_not_matter():
    assert {row.verdict for row in compare(BEFORE, BEFORE)} == {"agree"}
    there = {row.measure: row.verdict for row in compare(BEFORE, AFTER)}
    back = {row.measure: row.verdict for row in compare(AFTER, BEFORE)}
    assert {name for name, verdict in there.items() if verdict in ("agree", "moved")} == {"rr", "bulk"}
    assert all(back[name] == there[name] for name in ("rr", "bulk"))


def test_ratios_to_different_baselines_are_not_compared():
    other = run(replace(ratio("rr", 1.0), baseline="envoy-tls"))
    with pytest.raises(ResultsError, match="no ratio in common"):
        compare(BEFORE, other)


def test_a_directory_is_its_results(tmp_path):
    BEFORE.write(tmp_path / "results.json")
    assert load(tmp_path) == load(tmp_path / "results.json") == BEFORE


@pytest.fixture
def files(tmp_path):
    for name, results in (("before", BEFORE), ("after", AFTER)):
        (tmp_path / name).mkdir()
        results.write(tmp_path / name / "results.json")
    return tmp_path / "before", tmp_path / "after"


def test_the_command_shows_both_and_what_moved(files, capsys):
    before, after = map(str, files)
    assert main(["bench", "compare", before, after]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["MEASURE", "SUBJECT", "BASELINE", "OF", "A", "B", "B/A", "VERDICT"]
    rows = [line.replace("\N{EN DASH}", "-").split() for line in out.splitlines()[1:-2]]
    assert " ".join(rows[0]) == "rr uproxy envoy-hbone value 1.00 (0.90-1.10) 1.15 (1.05-1.25) 1.15 agree"
    assert out.splitlines()[-2:] == [
        "connect: B has no ratio of uproxy to envoy-hbone: not measured there, or refused",
        "1 of 2 ratios agree within their intervals, 1 moved, 1 gone",
    ]


def test_what_is_gone_from_the_second_run_is_a_difference_and_what_is_new_in_it_is_none(tmp_path, capsys):
    more, less = tmp_path / "more.json", tmp_path / "less.json"
    run(ratio("rr", 1.0), ratio("bulk", 0.5)).write(more)
    run(ratio("rr", 1.0)).write(less)
    assert main(["bench", "compare", str(more), str(less)]) == 1
    out = capsys.readouterr().out
    assert "bulk: B has no ratio of uproxy" in out
    assert out.endswith("1 of 1 ratio agree within their intervals, 0 moved, 1 gone\n")
    assert main(["bench", "compare", str(more), str(less), "-o", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["agree"] is False
    assert main(["bench", "compare", str(less), str(more)]) == 0


def test_all_agree(files, capsys):
    before = str(files[0])
    assert main(["bench", "compare", before, before + "/results.json"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 of 3 ratios agree within their intervals, 0 moved"


def test_the_command_answers_programs(files, capsys):
    before, after = map(str, files)
    assert main(["bench", "compare", before, after, "--output", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["agree"] is False
    assert [one["verdict"] for one in found["ratios"]] == ["agree", "moved", "only in A", "only in B"]
    assert found["ratios"][0]["b"]["median"] == 1.15
    assert found["ratios"][2]["b"] is None


@pytest.mark.parametrize("wrong", ["nowhere", "empty", "text", "ratio"])
def test_what_is_not_a_run_is_not_understood(files, tmp_path, capsys, wrong):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    bad = BEFORE.to_json() | {"ratios": [BEFORE.to_json()["ratios"][0] | {"low": "small"}]}
    (tmp_path / "ratio").write_text(json.dumps(bad))
    assert main(["bench", "compare", str(files[0]), str(tmp_path / wrong)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {tmp_path / wrong}")
    assert err.count("\n") == 1
