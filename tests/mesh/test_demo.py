"""The demo as a program sees it, and that it fails when what it shows is not so."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.lab import demo, shop
from benchmarks.lab.l7 import L7
from benchmarks.lab.live import Live
from benchmarks.lab.measure import PathCost
from tests.support import dead_labs, inside


def test_json_shape_steps_and_paths() -> None:
    argv = [sys.executable, "-I", "-m", "control.cli", "demo", "--output", "json"]
    before = dead_labs.left()
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    told = json.loads(done.stdout)
    assert list(told) == ["steps", "paths"]
    assert [sorted(step) for step in told["steps"]] == [["evidence", "name", "ok"]] * len(told["steps"])
    assert all(step["ok"] is True and step["evidence"] for step in told["steps"])
    assert len(told["steps"]) == 28
    assert {step["name"] for step in told["steps"]} >= {
        "web's uProxy killed (-9): connections are refused, nothing leaves in the clear",
        "no request of that traffic failed",
        "control plane and broker killed (-9): traffic goes on",
        "a direct attempt around the waypoint is refused, and told why",
        "the waypoint killed (-9): calls to reviews are refused, db goes on",
        "no request of that traffic failed either",
    }
    assert [path["path"] for path in told["paths"]] == ["plain TCP", "mTLS tunnel", "waypoint, HTTP"]
    for path in told["paths"]:
        assert 0 < path["p50_us"] <= path["p99_us"]
        assert path["requests_per_s"] > 0
    inside.eventually(lambda: dead_labs.left() <= before)


def test_step_that_fails_is_told_and_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the policy, nobody is forbidden anything: the steps that show a refusal must say so."""
    monkeypatch.setattr(shop, "RESOURCES", shop.RESOURCES.split("---\napiVersion: security")[0])
    monkeypatch.setattr(Live, "steps", lambda _: [])
    monkeypatch.setattr(L7, "steps", lambda _: [])
    monkeypatch.setattr(demo, "measure", lambda *_: [PathCost("none", 1, 1, 1)])
    assert demo.main(["--output", "json"]) == 1
    steps = json.loads(capsys.readouterr().out)["steps"]
    failed = {step["name"] for step in steps if not step["ok"]}
    assert failed >= {
        "a caller that policy forbids is refused, and told why",
        "its application cannot get through its own uProxy either",
    }
    assert not failed & {"web reaches db, a Redis, by its service address", "the restarted uProxy serves again"}
