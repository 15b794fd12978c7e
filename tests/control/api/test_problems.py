"""Errors say where they are as precisely as is known."""

from __future__ import annotations

import pytest

from control.api.problems import Findings, Position, Report, ResourceError, ResourceErrors, shown

POSITION = Position("f", 2, {"spec": 3, "spec.ports": 4, "spec.ports[1]": 7})


@pytest.mark.parametrize(
    ("field", "line"),
    [("spec.ports[1].port", 7), ("spec.ports[0].port", 4), ("spec.x", 3), ("kind", 2), ("", 2), ("spec['a.b']", 3)],
)
def test_an_error_stands_at_the_nearest_line_that_is_written(field, line):
    assert POSITION.error(field, "no") == ResourceError("f", line, field, "no")


def test_the_text_of_an_error():
    assert str(ResourceError("f", 3, "spec.x", "no")) == "f:3: spec.x: no"
    assert str(ResourceError("f", 0, "", "no")) == "f: no"


def test_errors_are_raised_in_the_order_of_their_lines():
    report = Report()
    report.raise_errors()
    for line in (5, 2, 9):
        report.add(ResourceError("f", line, "", "no"))
    with pytest.raises(ResourceErrors) as caught:
        report.raise_errors()
    assert [error.line for error in caught.value.errors] == [2, 5, 9]


def test_findings_keep_warnings_apart():
    findings = Findings()
    findings.warn(POSITION, "spec", "hm")
    findings.report.raise_errors()
    assert [str(warning) for warning in findings.warnings] == ["f:3: spec: hm"]


def test_long_texts_are_cut_and_near_words_suggested():
    assert len(shown("x" * 1000)) < 70
    report = Report()
    report.add(ResourceError("f", 1, "prots", "unknown"), ("prots", ["name", "ports"]))
    report.add(ResourceError("f", 1, "zzz", "unknown"), ("zzz", ["name", "ports"]))
    report.add(ResourceError("f", 1, "x", "unknown"), ("x" * 10**6, (f"x{n}" for n in range(10**9))))
    assert [error.problem for error in report.errors] == ["unknown (did you mean 'ports'?)", "unknown", "unknown"]
