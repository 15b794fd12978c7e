"""`uproxy exec` as people use it: what it keeps of the command, what it refuses, and that it leaves nothing."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.lab.topology import Workload
from tests.mesh.conftest import PEER, Mesh
from tests.support import inside
from tests.support.job import FOREVER, argv_of, gone, is_ready, pid_or_0, running, started


def _run(job: Workload, *command: str, **options: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error; and nothing of it is left."""
    with started(job, argv_of(job, *command, **options)) as process:
        output, errors = process.communicate(timeout=100)
    gone(job)
    return process.returncode, output.decode(), errors.decode()


class TestTheCommand:
    def test_status_output_input_and_user_are_kept(self, job: Workload) -> None:
        with started(job, argv_of(job, "sh", "-c", "cat; id -un; echo $HOME; echo oops >&2; exit 7")) as process:
            output, errors = process.communicate(b"typed\n", timeout=100)
        assert process.returncode == 7
        assert output.decode().split() == ["typed", "nobody", "/nonexistent"]
        assert "oops" in errors.decode()
        gone(job)

    def test_death_by_signal_is_told_as_a_shell_does(self, job: Workload) -> None:
        assert _run(job, "sh", "-c", "kill -9 $$")[0] == 128 + 9

    def test_signals_reach_it(self, job: Workload) -> None:
        with running(job, "sh", "-c", f"trap 'exit 3' TERM; trap 'echo usr1' USR1; {FOREVER}") as process:
            assert process.stdout is not None
            process.send_signal(signal.SIGUSR1)
            assert process.stdout.readline() == b"usr1\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 3
        gone(job)

    def test_what_it_leaves_running_ends_with_it(self, job: Workload) -> None:
        status, output, _ = _run(job, "sh", "-c", "setsid sleep 300 >/dev/null 2>&1 & echo $!")
        assert status == 0
        assert not Path(f"/proc/{output.strip()}").exists()

    def test_orphans_are_reaped(self, job: Workload) -> None:
        with running(job, "sh", "-c", f"(sleep 1 &) ; (sleep 1 &) ; {FOREVER}") as process:
            inside.eventually(lambda: "sleep" in _comm_of_children(process.pid))
            inside.eventually(lambda: "sleep" not in _comm_of_children(process.pid))
            assert "Z" not in _states_of_children(process.pid)

    @pytest.mark.parametrize(("command", "status"), [("no-such-command", 127), ("/etc/passwd", 126)])
    def test_command_that_cannot_run(self, job: Workload, command: str, status: int) -> None:
        ended, _, errors = _run(job, command)
        assert ended == status
        assert command in errors

    def test_without_capture_it_dials_a_forwarded_port(self, mesh: Mesh, job: Workload) -> None:
        """No node agent takes part, so that none has to run."""
        dial = "import socket; s = socket.create_connection(('127.0.0.1', 7000)); s.sendall(b'x'); print(s.recv(1))"
        argv = argv_of(job, "python3", "-c", dial, node_socket="/nowhere")
        at = argv.index("--")
        argv[at:at] = ["--capture", "none", "--forward", "127.0.0.1:7000=peer.load:9000"]
        with inside.serving(mesh.peer, PEER[1], inside.echo), started(job, argv) as process:
            output, errors = process.communicate(timeout=100)
        assert (process.returncode, output) == (0, b"b'x'\n"), errors
        gone(job)


class TestTheSidecar:
    def test_runs_confined(self, job: Workload) -> None:
        with running(job, "sh", "-c", FOREVER):
            pid = job.proxy_pid()
            status = dict(
                line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
            )
            uid = int(status["Uid"].split()[0])
            assert 61184 <= uid <= 65519
            assert set(status["Uid"].split() + status["Gid"].split()) == {str(uid)}
            assert status["Groups"].strip() == ""
            assert status["NoNewPrivs"] == "1"
            assert int(status["CapEff"], 16) == 0
            assert "Max core file size        0                    0" in Path(f"/proc/{pid}/limits").read_text()
            # What may not be dumped belongs to root in /proc, and an equal uid cannot trace it.
            assert Path(f"/proc/{pid}/environ").stat().st_uid == 0
            assert Path(f"/proc/{pid}/ns/net").stat().st_ino == job.box.netns_path.stat().st_ino
            assert Path(f"/proc/{pid}/environ").read_bytes().count(b"\0") <= 3
            state = job.host.lab.directory / "state" / job.name
            assert (state.stat().st_mode & 0o777, state.stat().st_uid) == (0o700, uid)
            key = state / "key.pem"
            assert (key.stat().st_mode & 0o777, key.stat().st_uid) == (0o600, uid)

    def test_killed_is_restarted_and_the_command_goes_on(self, job: Workload) -> None:
        with running(job, "sh", "-c", FOREVER) as process:
            for _ in range(2):
                old = job.proxy_pid()
                os.kill(old, signal.SIGKILL)
                inside.eventually(lambda old=old: pid_or_0(job) not in (0, old))
                inside.eventually(lambda: is_ready(job))
            assert process.poll() is None

    def test_renewed_certificate_is_handed_to_it(self, mesh: Mesh, job: Workload) -> None:
        with running(job, "sh", "-c", FOREVER):
            before = inside.metric(job, "uproxy_certificate_expiry_timestamp_seconds")
            mesh.lab.issue(job.identity, job.identity_dir, ttl_s=7200)
            inside.eventually(lambda: 0 < inside.metric(job, "uproxy_certificate_expiry_timestamp_seconds") < before)

    def test_restarts_when_its_identity_is_back(self, job: Workload) -> None:
        """A start that fails while the command runs is no reason to end the command."""
        with running(job, "sh", "-c", FOREVER) as process:
            chain = job.identity_dir / "chain.pem"
            away = chain.rename(chain.with_suffix(".away"))
            os.kill(job.proxy_pid(), signal.SIGKILL)
            time.sleep(0.5)
            assert pid_or_0(job) == 0
            away.rename(chain)
            inside.eventually(lambda: is_ready(job))
            assert process.poll() is None

    def test_certificate_of_somebody_else_is_named(self, mesh: Mesh, job: Workload) -> None:
        status, _, errors = _run(job, "true", identity_dir=str(mesh.caller.identity_dir))
        assert status == 125
        log = job.log.read_text()
        assert "sa/caller" in log
        assert "before it was ready" in errors

    def test_directory_closed_to_others_is_shown_to_it(self, job: Workload, tmp_path: Path) -> None:
        """A clone in root's home, say: the sidecar's uid may not enter it, and still has to read what is in it."""
        closed = tmp_path / "home"
        below = closed / "clone"
        below.mkdir(parents=True)
        below.chmod(0o755)
        closed.chmod(0o700)
        config = below / "mesh.yaml"
        config.write_bytes(job.host.lab.source.file.read_bytes())
        assert _run(job, "true", config=str(config))[0] == 0

    def test_configuration_nobody_may_enter_is_named(self, job: Workload, tmp_path: Path) -> None:
        tmp_path.chmod(0o700)
        config = tmp_path / "mesh.yaml"
        config.write_bytes(job.host.lab.source.file.read_bytes())
        status, _, errors = _run(job, "true", config=str(config))
        assert status == 125
        assert f"chmod o+rx {tmp_path}" in errors


class TestTheLauncher:
    def test_name_in_use_is_refused_by_name(self, job: Workload) -> None:
        with running(job, "sh", "-c", FOREVER) as first:
            with started(job, argv_of(job, "true")) as second:
                _, errors = second.communicate(timeout=30)
            assert second.returncode == 125
            assert (
                f"job: a workload of this name is running already (`uproxy exec`, pid {first.pid})" in errors.decode()
            )
            assert first.poll() is None
            assert is_ready(job), "the refused one has disturbed the first"

    def test_killed_takes_its_children_along_and_the_next_one_cleans_up(self, job: Workload) -> None:
        with running(job, "sh", "-c", "echo up; exec sleep 300") as process:
            children = _children(process.pid)
            assert len(children) == 2
            process.kill()
            process.wait()
            inside.eventually(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
        assert job.box.netns_path.exists()
        assert _run(job, "sh", "-c", "exit 5")[0] == 5

    def test_address_of_a_running_workload_is_refused(self, mesh: Mesh, job: Workload) -> None:
        status, _, errors = _run(job, "true", address=mesh.caller.address)
        assert status == 125
        assert mesh.caller.address in errors

    def test_without_an_agent_it_says_so(self, job: Workload, tmp_path: Path) -> None:
        status, _, errors = _run(job, "true", node_socket=str(tmp_path / "node.sock"))
        assert status == 125
        assert f"no node agent at {tmp_path}/node.sock: start `uproxy node`" in errors

    def test_unknown_workload_is_refused(self, job: Workload) -> None:
        status, _, errors = _run(job, "true", name="nobody-knows")
        assert status == 125
        assert "nobody-knows" in job.log.read_text() + errors

    def test_ended_while_it_waits_it_cleans_up(self, job: Workload) -> None:
        with started(job, argv_of(job, "sh", "-c", FOREVER)) as process:
            inside.eventually(lambda: pid_or_0(job) != 0)
            os.kill(job.proxy_pid(), signal.SIGSTOP)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (128 + signal.SIGTERM, 0)
        gone(job)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _states_of_children(pid: int) -> set[str]:
    states = set()
    for child in _children(pid):
        with suppress(OSError):
            states.add(Path(f"/proc/{child}/stat").read_text().rpartition(") ")[2][0])
    return states


def _comm_of_children(pid: int) -> set[str]:
    names = set()
    for child in _children(pid):
        with suppress(OSError):
            names.add(Path(f"/proc/{child}/comm").read_text().strip())
    return names
