"""`meshctl check` beside running workloads: what an application was given from outside of its cgroup is found."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.mesh.conftest import PEER, Mesh
from tests.support import inside

_HOLDER = """\
import socket, sys, time
made = [eval(one) for one in sys.argv[1:]]
print("made", flush=True)
time.sleep(60)
"""
_LISTENING = "socket.create_server(('127.0.0.1', 0))"
_DATAGRAM = "[s := socket.socket(type=socket.SOCK_DGRAM), s.bind(('127.0.0.1', 0))]"
_NEW = "socket.socket()"


def _check(mesh: Mesh, *arguments: str) -> tuple[int, str]:
    argv = [sys.executable, "-m", "control.cli", "check", "--node-socket", str(mesh.shop.a.node_socket), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert not done.stderr
    return done.returncode, done.stdout


def _uncaptured(mesh: Mesh) -> list[dict[str, Any]]:
    status, text = _check(mesh, "-o", "json")
    found: list[dict[str, Any]] = json.loads(text)["uncaptured"]
    assert status == (3 if found else 0)
    return found


@contextmanager
def _moved_in(mesh: Mesh, sockets: Sequence[str]) -> Iterator[int]:
    """A process that makes these sockets where it is, and is then moved into the caller's app cgroup."""
    with mesh.caller.entered():
        holder = subprocess.Popen([sys.executable, "-c", _HOLDER, *sockets], stdout=subprocess.PIPE)
    with holder:
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            (mesh.caller.box.app_cgroup / "cgroup.procs").write_text(str(holder.pid))
            yield holder.pid
        finally:
            holder.kill()


def test_a_workload_that_was_captured_from_the_start_has_none(mesh: Mesh) -> None:
    status, text = _check(mesh)
    assert status == 0
    assert "capture: ebpf: every program passes the verifier" in text
    assert "uncaptured" not in text
    assert "workloads, nothing is wrong" in text


def test_sockets_of_a_process_that_was_moved_in_are_named(mesh: Mesh) -> None:
    with _moved_in(mesh, [_LISTENING, _DATAGRAM, _NEW]) as pid:
        found = _uncaptured(mesh)
        assert [(one["workload"], one["pid"], one["protocol"]) for one in found] == [
            ("caller", pid, "tcp"),
            ("caller", pid, "udp"),
        ]
        assert all(one["origin"] == "was made in another cgroup" for one in found)
        assert all(one["local"].startswith("127.0.0.1:") for one in found)
        text = _check(mesh)[1]
        assert f"uncaptured: workload caller: tcp socket {found[0]['local']}" in text
    inside.eventually(lambda: not _uncaptured(mesh))


def test_a_socket_of_another_namespace_is_named_though_it_is_connected_to_nothing(mesh: Mesh) -> None:
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, _NEW], stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        (mesh.caller.box.app_cgroup / "cgroup.procs").write_text(str(holder.pid))
        found = _uncaptured(mesh)
        holder.kill()
    assert [one["origin"] for one in found] == ["is of another network namespace"]


def test_a_socket_made_in_the_cgroup_is_captured_whoever_holds_it(mesh: Mesh) -> None:
    """The opposite: the same kinds of sockets, made after the move."""
    with inside.serving(mesh.peer, PEER[1], inside.echo), inside.dial(mesh.caller, PEER) as made:
        holder = subprocess.Popen(["sleep", "60"], pass_fds=[made.fileno()])
        with holder:
            (mesh.caller.box.app_cgroup / "cgroup.procs").write_text(str(holder.pid))
            assert made.family == socket.AF_INET
            assert _uncaptured(mesh) == []
            holder.kill()
