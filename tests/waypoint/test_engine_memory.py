"""How much memory an Envoy may take."""

from __future__ import annotations

import contextlib
import http.client
from pathlib import Path

import pytest

from tests.support.conformance import running_suite
from tests.support.site import eventually
from tests.support.wasm import Module
from tests.waypoint.test_engine_extensions import attached, failed, lua, wasm
from waypoint.engine_envoy import child

BOMB = """
kept = {}
function envoy_on_request(handle)
  if not handle:headers():get("x-bomb") then return end
  for at = 1, 64 do kept[#kept + 1] = string.rep(tostring(#kept) .. " ", 8000000) end
end
"""


def test_code_that_takes_memory_without_end_takes_no_more_than_an_envoy_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails, or Envoy ends; and then all is as before."""
    monkeypatch.setattr(child, "memory_limit", lambda: 512 << 20)
    with running_suite(tmp_path, "envoy") as suite:
        suite.apply(lua(BOMB), attached("code"))
        assert suite.ask().status == 200
        for _ in range(3):
            with contextlib.suppress(OSError, http.client.HTTPException):
                assert failed(suite.ask(x_bomb="1"))
        suite.apply()

        def serves() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return suite.ask().status == 200
            return False

        eventually(serves)
        suite.apply(wasm(Module().made()), attached("code"))  # V8 maps more than that
        assert suite.ask().status == 200
