"""Processes that die: nothing opens, nothing is truncated in silence, and what comes back serves."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from benchmarks.lab.capture import Capture, describe, occurs
from benchmarks.lab.shop import DB
from tests.mesh.conftest import PEER, Mesh
from tests.support import inside

_SECRET = "sent-while-the-proxy-was-dead-b7c1e7f0"


def _exchanges(mesh: Mesh) -> bool:
    try:
        with inside.dial(mesh.caller, PEER) as made:
            made.sendall(b"x")
            return made.recv(1) == b"x"
    except OSError:
        return False


def test_killed_proxy_refuses_and_sends_nothing_in_the_clear(mesh: Mesh) -> None:
    web = mesh.shop.web
    assert web.launcher is not None
    path = mesh.lab.directory / "crash.pcap"
    with Capture(mesh.shop.a, path) as capture:
        web.launcher.send_signal(signal.SIGSTOP)
        try:
            os.kill(web.proxy_pid(), signal.SIGKILL)
            inside.eventually(lambda: "ConnectionRefusedError" in str(_dial(mesh)))
            for _ in range(20):
                assert _dial(mesh)["error"] == "ConnectionRefusedError"
        finally:
            web.launcher.send_signal(signal.SIGCONT)
        inside.eventually(lambda: "reply" in web.job(job="redis", host=DB[0], port=DB[1], command=["PING"]))
    assert not occurs(_SECRET.encode(), capture.file_bytes())
    outside = [segment for segment in capture.segments() if 15008 not in segment.ports]
    assert not outside, describe(outside)


def _dial(mesh: Mesh) -> dict[str, object]:
    return mesh.shop.web.job(job="dial", host=DB[0], port=DB[1], send=_SECRET, timeout_s=20)


def test_peers_proxy_killed_in_mid_stream_is_a_reset(mesh: Mesh) -> None:
    """A clean end of the stream here would make half of the data look like all of it."""
    with inside.serving(mesh.peer, PEER[1], inside.echo):
        inside.eventually(lambda: _exchanges(mesh))
        with inside.dial(mesh.caller, PEER) as made:
            made.sendall(b"x")
            assert made.recv(1) == b"x"
            os.kill(mesh.peer.proxy_pid(), signal.SIGKILL)
            with pytest.raises(ConnectionResetError):
                made.recv(1)
        inside.eventually(lambda: _exchanges(mesh))


def test_dead_node_agent_opens_nothing_and_stops_nothing(mesh: Mesh) -> None:
    host = mesh.caller.host
    assert host.agent is not None
    with inside.serving(mesh.peer, PEER[1], inside.echo):
        host.agent.kill()
        host.agent.wait()
        assert _exchanges(mesh), "programs and maps are pinned: an agent's death must not be felt"
        with pytest.raises(OSError, match="refused"):
            inside.dial(mesh.caller, ("240.240.9.9", 80), timeout_s=20)
        # Straight to the application, past the peer's uProxy.
        with host.entered(), pytest.raises(ConnectionRefusedError):
            socket.create_connection((mesh.peer.address, PEER[1]), timeout=20)
        host.node_socket.unlink(missing_ok=True)
        host.start_agent()
        inside.eventually(host.agent_running)
        known = {one["workload"] for one in host.node().status()["workloads"]}
        assert known >= {"web", "caller", "caller6", "reviews-v2"}
        assert _exchanges(mesh)
