"""Results are read as they were written, and what is not results is refused with a reason."""

import json

import pytest
from hypothesis import given

from benchmarks.harness.results import Results, ResultsError, read
from tests.support.results import realistic, runs


def test_results_are_read_as_they_were_written(tmp_path):
    found = realistic()
    found.series[0].remark, found.machine["wrk"] = "bound by the generator", "4.1.0"
    found.write(tmp_path / "results.json")
    assert read(tmp_path / "results.json") == found


@given(runs())
def test_any_results_are_read_as_they_were_written(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("results") / "results.json"
    found.write(path)
    assert read(path) == found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file"),
        ("", "is not JSON"),
        ("[]", "is not the results of a run, of schema 1"),
        ('{"schema": 2}', "is not the results of a run, of schema 1"),
        ('{"schema": 1}', "lacks what results have: KeyError('created')"),
    ],
)
def test_what_is_not_results_is_refused(tmp_path, text, told):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ResultsError, match=r"results\.json") as refused:
        read(path)
    assert told in str(refused.value)


@pytest.mark.parametrize("part", ["subjects", "measures", "series", "ratios", "targets", "checks"])
def test_a_part_that_is_not_what_it_should_be_is_refused(tmp_path, part):
    path = tmp_path / "results.json"
    for wrong in ([{"name": 1, "extra": 2}], [3], 4, None):
        path.write_text(json.dumps(Results("now", quick=True).to_json() | {part: wrong}))
        with pytest.raises(ResultsError, match="lacks what results have"):
            read(path)
