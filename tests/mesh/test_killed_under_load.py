"""Agents and uProxies killed, restarted and upgraded at random moments under load: no plaintext, no needless loss.

Every interface of both hosts is recorded. What the applications send has a mark in it that must not be there.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Host, Workload
from bpf import bpffs, layout
from tests.mesh.conftest import PEER, PEER_V6, Mesh
from tests.support import inside, open_loop
from tests.support.open_loop import Load
from tests.support.secrecy import nothing_in_the_clear

_RATE = 25.0  # connections a second of each pair: the machine is shared, and what is tested are moments
_HELD = 3
_MOST_S = 45.0


@contextmanager
def _loads(mesh: Mesh, mark: bytes) -> Iterator[list[Load]]:
    """Load over IPv4 and IPv6, which has begun."""
    pairs = [(mesh.caller, mesh.peer, PEER), (mesh.caller6, mesh.peer6, PEER_V6)]
    payload = mark + random.randbytes(500)
    with open_loop.running(pairs, payload, rate=_RATE, held=_HELD, most_s=_MOST_S) as loads:
        open_loop.wait_for(loads, 5)
        yield loads


@contextmanager
def _agents_back(*hosts: Host) -> Iterator[None]:
    try:
        yield
    finally:
        for host in hosts:
            if host.agent is None or host.agent.poll() is not None:
                host.node_socket.unlink(missing_ok=True)
                host.start_agent()
            inside.eventually(host.agent_running, 30)


def _end_agent(host: Host, chance: random.Random) -> None:
    """Killed, or asked to end; some of the time its successor finds its pins as those of an earlier version."""
    assert host.agent is not None
    host.agent.send_signal(chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
    host.agent.wait()
    host.node_socket.unlink(missing_ok=True)
    pins = bpffs.BPFFS / "uproxy" / f"v{layout.SCHEMA}" / host.lab.names.node(host.name)
    earlier = bpffs.BPFFS / "uproxy" / f"v{layout.SCHEMA - 1}" / pins.name
    if chance.random() < 0.5 and not earlier.exists():
        earlier.parent.mkdir(mode=0o700, exist_ok=True)
        pins.rename(earlier)


def test_agents_that_die_start_and_are_upgraded_lose_no_connection(mesh: Mesh) -> None:
    seed = secrets.randbits(32)
    chance = random.Random(seed)
    mark = secrets.token_bytes(16)
    hosts = (mesh.shop.a, mesh.shop.b)
    killed = 0
    with nothing_in_the_clear(hosts, mark), _loads(mesh, mark) as loads:
        with _agents_back(*hosts):
            deadline = time.monotonic() + 12
            while time.monotonic() < deadline or killed < 4:
                host = chance.choice(hosts)
                _end_agent(host, chance)
                killed += 1
                time.sleep(chance.uniform(0, 0.2))
                host.start_agent()
                if chance.random() < 0.5:
                    time.sleep(chance.uniform(0, 2))  # its successor may be killed while it still takes over
                else:
                    inside.eventually(host.agent_running, 30)
        open_loop.wait_for(loads, 5)
        for host in hosts:
            status = host.node().status()
            assert status["error"] == "", f"seed {seed}"
            assert {one["workload"] for one in status["workloads"]} == {one.name for one in host.workloads}
    for load in loads:
        assert load.outcomes.keys() == {"ok"}, f"seed {seed}, {killed} ends: {load.outcomes}"
        assert not load.broken, f"seed {seed}, {killed} ends: {load.broken}"
        assert load.beats > 20 * _HELD


def test_uproxies_that_are_killed_end_connections_with_errors_and_come_back(mesh: Mesh) -> None:
    """Nothing is in the clear, nothing that ends early looks whole, and in the end all is as before."""
    seed = secrets.randbits(32)
    chance = random.Random(seed)
    mark = secrets.token_bytes(16)
    workloads = (mesh.caller, mesh.peer, mesh.caller6, mesh.peer6)
    with nothing_in_the_clear((mesh.shop.a, mesh.shop.b), mark):
        with _loads(mesh, mark) as loads:
            for _ in range(8):
                _kill_proxy(chance.choice(workloads))
                time.sleep(chance.uniform(0.1, 1.5))
            open_loop.go_on(loads)
        open_loop.assert_refused_or_reset(loads, seed)


def _kill_proxy(workload: Workload) -> None:
    with suppress(LabError, ProcessLookupError):  # it may not be back yet
        os.kill(workload.proxy_pid(), signal.SIGKILL)
