"""How much memory an Envoy may take."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import resource
from pathlib import Path
from typing import Any

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


def test_one_that_is_forked_when_its_memory_is_bounded_no_more_is_not_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "envoy"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o700)
    monkeypatch.setattr(child, "find_envoy", lambda: str(program))
    monkeypatch.setattr(child, "memory_limit", lambda: 512 << 20)
    start = asyncio.create_subprocess_exec

    async def main() -> None:
        async def started(*args: Any, **options: Any) -> asyncio.subprocess.Process:
            process = await start(*args, **options)
            assert resource.prlimit(process.pid, resource.RLIMIT_DATA)[0] == 512 << 20
            its.unbound()  # `its` does not know of it yet
            return process

        monkeypatch.setattr(asyncio, "create_subprocess_exec", started)
        its = child.Child(tmp_path, 1, lambda line: None, lambda: None)
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            running = group.create_task(its.run())
            while its.pid is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            bounds = resource.prlimit(its.pid, resource.RLIMIT_DATA)
            running.cancel()
        assert bounds == resource.getrlimit(resource.RLIMIT_DATA)[1:] * 2

    asyncio.run(main())
