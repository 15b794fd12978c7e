"""Code of an Extension that never ends, in a real Envoy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.conformance import running_suite
from tests.support.site import eventually
from tests.support.wasm import FOREVER, Module
from tests.waypoint.test_engine_extensions import attached, wasm
from waypoint.engine_envoy import rendering


def test_an_envoy_in_which_code_never_ends_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "STUCK_S", 1.0)
    module = Module()
    with running_suite(tmp_path, "envoy") as suite:
        suite.apply(wasm(module.made(module.when("x-loop", FOREVER))), attached("code"))
        assert suite.ask().status == 200
        with pytest.raises((OSError, EOFError)):
            suite.ask(x_loop="1")

        def serves() -> bool:
            try:
                return suite.ask().status == 200
            except (OSError, EOFError):
                return False

        eventually(serves)
