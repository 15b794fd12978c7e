"""Health probes, end to end: a process in the prober's cgroup gets through to declared ports, and nobody else does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.lab.apps import commands
from benchmarks.lab.topology import Host, Lab, Workload
from tests.support import inside
from uproxy import sandbox

PROBED, OTHER = 8080, 8081
_PROBES = ("--probe-port", str(PROBED))

# What a kubelet does: connect, ask, and look at the answer.
_PROBE = """\
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30) as made:
        made.sendall(b"GET /healthz HTTP/1.0\\r\\n\\r\\n")
        print(made.makefile("rb").read().decode(), "from", made.getsockname()[0], end="")
except OSError as error:
    print(type(error).__name__, end="")
"""

WORKLOADS = pytest.mark.parametrize("name", ["web", "web6"], ids=["v4", "v6"])


@dataclass(frozen=True, slots=True)
class Probed:
    """`web` and `web6` on host b, STRICT, where a prober's cgroup is; host a is another machine."""

    lab: Lab
    a: Host
    b: Host
    prober: Path
    workloads: dict[str, Workload]


@pytest.fixture(scope="module")
def probed() -> Iterator[Probed]:
    with Lab() as lab:
        a, b = lab.host("a"), lab.host("b")
        prober = lab.names.cgroup / "prober"
        prober.mkdir()
        b.agent_options = ["--probe-cgroup", str(prober)]
        workloads = {
            name: b.workload(name, commands.idle(), namespace="shop", launch=_PROBES, ipv6=name == "web6")
            for name in ("web", "web6")
        }
        lab.configure("")
        lab.start()
        yield Probed(lab, a, b, prober, workloads)


def _healthy(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.sendall(b"healthy, said to " + connection.getpeername()[0].encode())


def _probe(probed: Probed, workload: Workload, port: int, cgroup: str = "prober", host: Host | None = None) -> str:
    """What a process of a host, in a cgroup of the lab, is told by a workload."""
    netns = sandbox.NETNS_DIR / (host or probed.b).netns
    argv = [sys.executable, "-I", "-c", _PROBE, workload.address, str(port)]
    process = probed.lab.spawn(argv, netns, cgroup, stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process.communicate(timeout=30)[0].decode()


def _dropped(workload: Workload) -> int:
    dropped: int = workload.host.node().status()["counters"]["dropped_syn"]
    return dropped


@WORKLOADS
def test_a_probe_gets_through_past_mtls_and_policy(probed: Probed, name: str) -> None:
    workload = probed.workloads[name]
    logged = len(workload.access_log())
    with inside.serving(workload, PROBED, _healthy):
        answer = _probe(probed, workload, PROBED)
    told, _, source = answer.partition(" from ")
    assert told == f"healthy, said to {source}"  # by the application itself: its peer is the prober
    assert len(workload.access_log()) == logged, "no uProxy saw it"


@WORKLOADS
def test_everybody_else_is_dropped_at_the_syn(probed: Probed, name: str) -> None:
    workload = probed.workloads[name]
    with inside.serving(workload, PROBED, _healthy), inside.serving(workload, OTHER, _healthy):
        for port, cgroup, host in (
            (PROBED, "lab", probed.b),  # a process of the same host, outside of the cgroup
            (PROBED, "lab", probed.a),
            (OTHER, "prober", probed.b),  # a port that was not declared
        ):
            dropped = _dropped(workload)
            assert _probe(probed, workload, port, cgroup, host) == "ConnectionRefusedError", (port, cgroup)
            assert _dropped(workload) > dropped
        assert _probe(probed, workload, PROBED).startswith("healthy")


@WORKLOADS
def test_a_dead_uproxy_and_a_dead_agent_keep_no_probe_out(probed: Probed, name: str) -> None:
    """So that a kubelet sees the application, not its sidecar; and whoever else dials is still refused."""
    workload = probed.workloads[name]
    assert probed.b.agent is not None
    with inside.serving(workload, PROBED, _healthy):
        probed.b.agent.kill()
        probed.b.agent.wait()
        try:
            os.kill(workload.proxy_pid(), signal.SIGKILL)
            assert _probe(probed, workload, PROBED).startswith("healthy")
            assert _probe(probed, workload, PROBED, "lab") == "ConnectionRefusedError"
        finally:
            probed.b.start_agent()
            inside.eventually(probed.b.agent_running, timeout_s=20)
        assert _probe(probed, workload, PROBED).startswith("healthy")
        assert _probe(probed, workload, PROBED, "lab") == "ConnectionRefusedError"
    inside.eventually(workload.running, timeout_s=20)


def test_a_probers_cgroup_around_running_workloads_is_left_alone(probed: Probed) -> None:
    """Whoever restarts the agent with too wide a cgroup is told; the others it names go on."""
    web = probed.workloads["web"]
    assert probed.b.agent is not None
    before = probed.b.agent_options
    probed.b.agent.kill()
    probed.b.agent.wait()
    probed.b.agent_options = [*before, "--probe-cgroup", str(probed.lab.names.cgroup / "b")]
    try:
        probed.b.start_agent()
        inside.eventually(probed.b.agent_running, timeout_s=20)
        error = probed.b.node().status()["error"]
        assert f"--probe-cgroup {probed.lab.names.cgroup}/b: workload web" in error
        with inside.serving(web, PROBED, _healthy):
            assert _probe(probed, web, PROBED).startswith("healthy")
            assert _probe(probed, web, PROBED, f"b/{web.box.cgroup.name}/app") == "ConnectionRefusedError"
    finally:
        probed.b.agent.kill()
        probed.b.agent.wait()
        probed.b.agent_options = before
        probed.b.start_agent()
        inside.eventually(probed.b.agent_running, timeout_s=20)
    assert probed.b.node().status()["error"] == ""
