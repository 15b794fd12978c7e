"""The guard over what the data plane costs: it is kept to here, and it can fail."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from benchmarks import guard
from benchmarks.guard import Cost, GuardError, Record

_PYTHON = {
    "python": "CPython 3.11.2",
    "compiler": "GCC 12.2.0",
    "machine": "x86_64",
    "openssl": "OpenSSL 3.0.17",
}
# Of an empty loop at each receipt of bytes from a tunnel: a tenth of a round trip.
_ROUNDS = 75
_SLOWED = """\
import sys
sys.path.insert(0, "")
from benchmarks import scripted
from uproxy import hbone

receive = hbone.Connection.receive

def slowly(connection, data):
    for _ in range({rounds}):
        pass
    return receive(connection, data)

hbone.Connection.receive = slowly
sys.exit(scripted.main(sys.argv[1:]))
"""


def _counted():
    """What counts needs the interpreter of the baseline. CI has it: there the refusal is a failure."""
    try:
        guard.refuse_another_interpreter(guard.load(), guard.interpreter())
    except GuardError as error:
        if not os.environ.get("CI"):
            return pytest.mark.skip(reason=str(error))
    return pytest.mark.root


def _record(ratio=10.0, calls=8.0, **conditions):
    return Record(_PYTHON | conditions, {"round-trip-64": Cost(ratio, 1000, calls)})


def _verdicts(before, now):
    return [row.verdict for row in guard.compare(before, now)]


@_counted()
@pytest.mark.timeout(300)
def test_the_data_plane_costs_no_more_than_its_baseline_says():
    baseline, now = guard.load(), guard.count()
    rows = guard.compare(baseline, now)
    assert not guard.failed(rows), guard.report(baseline, now, rows)


@_counted()
@pytest.mark.timeout(300)
def test_a_codec_that_does_a_tenth_more_fails_it(tmp_path):
    slowed = tmp_path / "slowed.py"
    slowed.write_text(_SLOWED.format(rounds=_ROUNDS))
    baseline, now = guard.load(), guard.count(["round-trip-64"], [str(slowed)])
    baseline = replace(baseline, costs={"round-trip-64": baseline.costs["round-trip-64"]})
    rows = guard.compare(baseline, now)
    assert [row.verdict for row in rows] == ["worse", "same"]
    assert 0.05 < rows[0].change < 0.15
    said = guard.report(baseline, now, rows)
    assert "worse" in said
    assert "--update" in said


def test_a_change_within_the_tolerance_is_none():
    inside, outside = 1 + guard.TOLERANCE * 0.9, 1 + guard.TOLERANCE * 1.1
    assert _verdicts(_record(), _record(ratio=10.0 * inside)) == ["same", "same"]
    assert _verdicts(_record(), _record(ratio=10.0 * outside)) == ["worse", "same"]
    assert _verdicts(_record(ratio=10.0 * outside), _record()) == ["better", "same"]


def test_system_calls_count_too():
    more = _record(calls=9.0)
    assert _verdicts(_record(), more) == ["same", "worse"]
    assert guard.failed(guard.compare(_record(), more))
    assert _verdicts(_record(calls=0.05), _record(calls=0.15)) == ["same", "same"]


def test_an_improvement_does_not_fail_and_asks_to_be_kept():
    before, better = _record(), _record(ratio=8.0)
    rows = guard.compare(before, better)
    assert not guard.failed(rows)
    assert "better" in guard.report(before, better, rows)
    assert "so that it is kept" in guard.report(before, better, rows)
    assert "so that it is kept" not in guard.report(before, before, guard.compare(before, before))


def test_a_scenario_that_has_no_baseline_fails():
    rows = guard.compare(replace(_record(), costs={}), _record())
    assert [row.verdict for row in rows] == ["new", "new"]
    assert guard.failed(rows)


def test_a_scenario_that_is_counted_no_more_fails_and_is_named():
    for gone in ("handshake-64", "echo"):
        before = replace(_record(), costs={**_record().costs, gone: Cost(2.0, 100, 1.0)})
        rows = guard.compare(before, _record())
        assert [row.verdict for row in rows] == ["same", "same", "gone", "gone"]
        assert guard.failed(rows)
        assert f"counted no more: {gone}." in guard.report(before, _record(), rows)


def test_with_another_library_what_is_equal_is_equal_and_what_costs_more_is_refused():
    other = _record(openssl="OpenSSL 3.5.0")
    rows = guard.compare(_record(), other)
    assert not guard.failed(rows)
    assert "openssl OpenSSL 3.0.17 -> OpenSSL 3.5.0" in guard.report(_record(), other, rows)
    with pytest.raises(GuardError, match="counted with others: openssl") as refused:
        guard.compare(_record(), _record(ratio=20.0, openssl="OpenSSL 3.5.0"))
    assert "OpenSSL 3.0.17 -> OpenSSL 3.5.0" in str(refused.value)
    assert "worse" in str(refused.value)
    assert "--update" in str(refused.value)


@pytest.mark.parametrize(
    "other",
    [{"python": "CPython 3.13.1"}, {"python": "CPython 3.11.9"}, {"compiler": "Clang 18.1.3"}, {"machine": "aarch64"}],
)
def test_another_interpreter_is_not_compared(other):
    with pytest.raises(GuardError, match="--update"):
        guard.compare(_record(), _record(**other))


def test_a_baseline_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "guard.json"
    guard.save(_record(), path)
    assert guard.load(path) == _record()


@pytest.mark.parametrize("text", ["", "{}", '{"conditions": {}, "costs": {"x": {"ratio": 1}}}'])
def test_a_baseline_that_is_none_is_an_error(tmp_path, text):
    path = tmp_path / "guard.json"
    path.write_text(text)
    with pytest.raises(GuardError, match=r"guard\.json"):
        guard.load(path)


def test_the_exit_status_says_whether_it_is_worse(monkeypatch, capsys):
    monkeypatch.setattr(guard, "load", _record)
    for ratio, status in ((10.0, 0), (11.0, 1)):
        monkeypatch.setattr(guard, "count", lambda ratio=ratio: _record(ratio))
        assert guard.main(["--output", "json"]) == status
        told = json.loads(capsys.readouterr().out)
        assert told["failed"] == bool(status)
        assert told["rows"][0]["change"] == pytest.approx(ratio / 10 - 1)


def test_what_cannot_be_compared_has_an_exit_status_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(guard, "load", _record)
    monkeypatch.setattr(guard, "count", lambda: _record(python="CPython 3.13.1"))
    assert guard.main([]) == 2
    assert "counted with CPython 3.11.2 GCC 12.2.0 x86_64, this is CPython 3.13.1" in capsys.readouterr().err


def test_the_baseline_says_all_conditions():
    assert set(guard.load().conditions) == set(guard.conditions())


def test_valgrind_that_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert guard.main([]) == 2
    assert "make setup" in capsys.readouterr().err
