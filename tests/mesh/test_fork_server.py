"""Sidecars of a fork server: as confined as others, and on their own when it has ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.lab.topology import Workload
from tests.mesh.conftest import PEER, Mesh
from tests.support import inside
from tests.support.job import FOREVER, gone, is_ready, pid_or_0, running


@contextmanager
def fork_server(job: Workload, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-I", "-m", "uproxy", "fork-server", "--socket", str(path)]
    with job.host.spawn(argv) as process:
        try:
            inside.eventually(lambda: _accepts(path))
            yield process
        finally:
            process.terminate()
            process.wait(60)


def _accepts(path: Path) -> bool:
    """A killed one leaves its socket, which refuses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fork.sock"


def says(job: Workload, content: bytes) -> bytes:
    with inside.dial(job, PEER) as connection:
        connection.sendall(content)
        return connection.recv(100)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def test_a_forked_sidecar_is_a_process_of_its_own_and_confined(mesh: Mesh, job: Workload, path: Path) -> None:
    with (
        fork_server(job, path) as server,
        inside.serving(mesh.peer, PEER[1], inside.echo),
        running(job, "sh", "-c", FOREVER, launched=["--fork-server", str(path)]),
    ):
        pid = job.proxy_pid()
        assert parent_of(pid) == server.pid
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
        )
        uid = int(status["Uid"].split()[0])
        assert 61184 <= uid <= 65519
        assert set(status["Uid"].split() + status["Gid"].split()) == {str(uid)}
        assert status["Groups"].strip() == ""
        assert (status["NoNewPrivs"], int(status["CapEff"], 16)) == ("1", 0)
        assert int(status["SigBlk"], 16) == 0
        assert "Max core file size        0                    0" in Path(f"/proc/{pid}/limits").read_text()
        assert Path(f"/proc/{pid}/environ").stat().st_uid == 0, "it can be dumped"
        assert Path(f"/proc/{pid}/ns/net").stat().st_ino == job.box.netns_path.stat().st_ino
        assert os.getsid(pid) == pid
        open_files = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        assert not any(str(path) in one or "signalfd" in one for one in open_files), open_files
        assert says(job, b"hello") == b"hello"
    gone(job)


def test_killed_is_restarted_and_the_command_goes_on(job: Workload, path: Path) -> None:
    with (
        fork_server(job, path) as server,
        running(job, "sh", "-c", FOREVER, launched=["--fork-server", str(path)]) as process,
    ):
        old = job.proxy_pid()
        os.kill(old, signal.SIGKILL)
        inside.eventually(lambda: pid_or_0(job) not in (0, old))
        inside.eventually(lambda: is_ready(job))
        assert parent_of(job.proxy_pid()) == server.pid
        assert process.poll() is None
    gone(job)


def test_it_serves_on_without_its_fork_server_and_closed_until_there_is_another(
    mesh: Mesh, job: Workload, path: Path
) -> None:
    with inside.serving(mesh.peer, PEER[1], inside.echo):
        with fork_server(job, path) as server:
            stack = running(job, "sh", "-c", FOREVER, launched=["--fork-server", str(path)])
            process = stack.__enter__()
            server.kill()
            server.wait()
        try:
            assert says(job, b"still here") == b"still here"
            os.kill(job.proxy_pid(), signal.SIGKILL)
            inside.eventually(lambda: pid_or_0(job) == 0)
            with pytest.raises(ConnectionRefusedError):
                says(job, b"in the open")
            assert process.poll() is None
            with fork_server(job, path):
                inside.eventually(lambda: is_ready(job))
                assert says(job, b"again") == b"again"
                stack.__exit__(None, None, None)
        finally:
            process.kill()
            process.wait()
    gone(job)


def test_it_dies_with_its_launcher_whether_or_not_its_fork_server_lives(job: Workload, path: Path) -> None:
    for server_first in (False, True):
        with (
            fork_server(job, path) as server,
            running(job, "sh", "-c", FOREVER, launched=["--fork-server", str(path)]) as process,
        ):
            pid = job.proxy_pid()
            if server_first:
                server.kill()
                server.wait()
            process.kill()
            process.wait()
            inside.eventually(lambda pid=pid: not _lives(pid))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_without_a_fork_server_it_says_so(job: Workload, path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=f"no fork server at {path}: start `uproxy fork-server`"),
        running(job, "true", launched=["--fork-server", str(path)]),
    ):
        pass


def test_an_identity_of_somebody_else_ends_the_launcher(mesh: Mesh, job: Workload, path: Path) -> None:
    mesh.lab.issue(mesh.caller.identity, job.identity_dir)
    with (
        fork_server(job, path),
        pytest.raises(AssertionError, match="ended with status 1 before it was ready"),
        running(job, "true", launched=["--fork-server", str(path)]),
    ):
        pass
    assert "sa/caller" in job.log.read_text()
    gone(job)
