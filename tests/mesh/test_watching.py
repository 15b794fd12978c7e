"""`meshctl connections` and `meshctl tap` on a host with captured workloads: found by the node agent, read inside."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.mesh.conftest import PEER, Mesh
from tests.support import inside


def _argv(mesh: Mesh, command: str, *arguments: str) -> list[str]:
    socket = ("--node-socket", str(mesh.shop.a.node_socket))
    return [sys.executable, "-m", "control.cli", command, *arguments, *socket]


def _connections(mesh: Mesh, *arguments: str) -> list[dict[str, Any]]:
    argv = _argv(mesh, "connections", "-o", "json", *arguments)
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_every_workload_of_the_host_is_asked(mesh: Mesh) -> None:
    found = _connections(mesh)
    assert {one["proxy"] for one in found} == {workload.name for workload in mesh.shop.a.workloads}


def test_a_captured_connection_is_seen_while_it_lives_and_when_it_ends(mesh: Mesh) -> None:
    argv = _argv(mesh, "tap", "caller", "-o", "json")
    tap = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with tap:
        try:
            assert tap.stdout is not None
            assert tap.stderr is not None
            assert tap.stderr.readline() == "watching caller\n"
            with inside.serving(mesh.peer, PEER[1], inside.echo), inside.dial(mesh.caller, PEER) as made:
                made.sendall(b"question")
                assert made.recv(16) == b"question"
                (caller,) = _connections(mesh, "caller")
                assert (caller["proxy"], caller["total"]) == ("caller", 1)
                (seen,) = caller["connections"]
                assert (seen["direction"], seen["dst.service"]) == ("outbound", "peer.load.svc.cluster.local")
                assert seen["dst.identity"] == "spiffe://lab.test/ns/load/sa/peer"
                assert seen["bytes_sent"] == seen["bytes_recv"] == 8
            opened, complete = (json.loads(tap.stdout.readline()) for _ in range(2))
        finally:
            tap.kill()
    assert (opened["message"], complete["message"]) == ("connection opened", "connection complete")
    assert (complete["proxy"], complete["bytes_sent"]) == ("caller", 8)
    assert opened["request_id"] == complete["request_id"] == seen["request_id"]
    inside.eventually(lambda: not _connections(mesh, "caller")[0]["connections"])


def test_what_uproxy_exec_runs_is_found_without_the_agent(mesh: Mesh) -> None:
    name = mesh.caller.box.netns.removeprefix("uproxy-")
    argv = [sys.executable, "-m", "control.cli", "connections", name, "-o", "json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    (answer,) = json.loads(done.stdout)
    assert (answer["proxy"], answer["workload"].partition("/")[2]) == (name, "caller")


def test_a_workload_that_is_not_there_is_named(mesh: Mesh) -> None:
    done = subprocess.run(_argv(mesh, "connections", "nobody"), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "no workload 'nobody' runs on this host; there are: " in done.stderr
