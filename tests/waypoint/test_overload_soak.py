"""A real waypoint at twice its capacity, in an open loop: what it answers is not late, and nearly all that it can."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.open_requests import Kind, OpenRequests
from tests.support.site import Site
from tests.support.waypoint_site import bound_site

NETWORK = "127.0.98"
EACH_S = 0.002
"""What each request that is taken costs the waypoint, beside its own work."""

BACKLOG = 2500
"""Requests that are served in the time that the latest hundredth took, however fast the machine is: without an age of
what waits in tunnels these were 7,000."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = bound_site(tmp_path, NETWORK)
    with application(site.application), site.running("db"), site.running("web"), slow_waypoint(site):
        yield site


@contextmanager
def application(address: tuple[str, int]) -> Iterator[None]:
    """Answers requests, in a thread of its own."""
    loop = asyncio.new_event_loop()
    ready, over = threading.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(serve, *address, backlog=1024):
            ready.set()
            await over.wait()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(60)
    yield
    loop.call_soon_threadsafe(over.set)
    thread.join()


@contextmanager
def slow_waypoint(site: Site) -> Iterator[None]:
    ready, theirs = os.pipe()
    command = [sys.executable, "-m", "tests.support.overloaded_waypoint", str(EACH_S), "--state", str(site.path / "wp")]
    command += ["--config", str(site.mesh), "--workload", "shop/wp-1", "--access-log", "off", f"--ready-fd={theirs}"]
    with (site.path / "wp.log").open("a") as log:
        process = subprocess.Popen(command, pass_fds=[theirs], stdout=log, stderr=log)
    os.close(theirs)
    try:
        with os.fdopen(ready) as pipe:
            assert pipe.read() == "ready\n", site.log("wp")
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "connections"), [("http1", 500), ("http2", 4), ("http2", 32), ("grpc", 32)])
def test_at_twice_the_capacity_what_is_answered_is_not_late(site: Site, kind: Kind, connections: int) -> None:
    capacity = asyncio.run(OpenRequests("http1", site.forward, 16).run(2 / EACH_S, 3.0))
    load = OpenRequests(kind, site.forward, connections)
    answered = asyncio.run(load.run(2 * capacity, 12.0))
    assert load.refused
    assert not load.others
    took_s = sorted(load.took_s)
    p99_s = took_s[len(took_s) * 99 // 100]
    print(f"{kind} x {connections}: capacity {capacity:.0f}/s, answered {answered:.0f}/s, p99 {p99_s:.2f} s")
    assert p99_s * capacity < BACKLOG
    assert answered > 0.4 * capacity
