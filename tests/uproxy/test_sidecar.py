from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.capture import run_inside
from uproxy import linux, supervision, upgrade
from uproxy.entrance import Account, Entrance
from uproxy.sidecar import IDENTITY_FILES, IdentityCopy, JoinedIdentity, OwnProcess, Sidecar
from uproxy.supervision import SIGNALS, LaunchError, Supervision

_ACCOUNT = Account(os.getuid(), os.getgid())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    made.mkdir()
    for name in IDENTITY_FILES:
        (made / name).write_text(f"{name} 1")
    return made


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> IdentityCopy:
    return IdentityCopy(source, tmp_path / "copy", _ACCOUNT)


Supervise = Callable[[str, str], tuple[int, str]]


class _Free:
    """An entrance that leads nowhere."""

    netns_fd = -1

    def __call__(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # as any does


@pytest.fixture
def make(copy: IdentityCopy) -> Callable[[str], Sidecar]:
    """A sidecar that runs a shell script, `$2` being the number of its ready descriptor."""

    def made(script: str) -> Sidecar:
        entrance: Entrance = _Free()  # type: ignore[assignment]
        return Sidecar(OwnProcess(("sh", "-c", script, "sh"), entrance), -1, [], sys.__stderr__.buffer, copy)

    return made


def _reap(sidecar: Sidecar, now: float) -> None:
    _, status = os.waitpid(sidecar.pid, 0)
    sidecar.ended(os.waitstatus_to_exitcode(status), now)


class TestIdentityCopy:
    def test_is_for_one_account_only(self, copy: IdentityCopy, tmp_path: Path) -> None:
        copy.install()
        assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o700
        assert {path.name for path in (tmp_path / "copy").iterdir()} == set(IDENTITY_FILES)
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "copy").iterdir())

    def test_is_renewed_when_the_chain_is(self, copy: IdentityCopy, source: Path, tmp_path: Path) -> None:
        copy.install()
        assert not copy.refresh()
        fresh = source / "fresh"
        fresh.write_text("chain.pem 2")
        fresh.rename(source / "chain.pem")
        assert copy.refresh()
        assert (tmp_path / "copy/chain.pem").read_text() == "chain.pem 2"
        assert not copy.refresh()

    def test_a_revocation_list_comes_and_goes_with_its_source(
        self, copy: IdentityCopy, source: Path, tmp_path: Path
    ) -> None:
        copy.install()
        assert not (tmp_path / "copy/crl.pem").exists()
        for text in ("crl 1", "crl, longer"):
            (source / "crl.pem").write_text(text)
            assert copy.refresh()
            assert (tmp_path / "copy/crl.pem").read_text() == text
            assert not copy.refresh()
        (source / "crl.pem").unlink()
        assert copy.refresh()
        assert not (tmp_path / "copy/crl.pem").exists()

    def test_failure_keeps_the_old_one(self, copy: IdentityCopy, source: Path, tmp_path: Path) -> None:
        copy.install()
        (source / "chain.pem").unlink()
        with pytest.raises(FileNotFoundError):
            copy.refresh()
        assert (tmp_path / "copy/chain.pem").read_text() == "chain.pem 1"


class TestJoinedIdentity:
    @pytest.fixture
    def given(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
        """Who was given what, by file name: only root can give files away."""
        found = {}

        def fchown(fd: int, uid: int, gid: int) -> None:
            found[Path(os.readlink(f"/proc/self/fd/{fd}")).name] = (uid, gid)

        monkeypatch.setattr(os, "fchown", fchown)
        return found

    def test_belongs_to_the_account_with_all_its_files(self, source: Path, given: dict[str, tuple[int, int]]) -> None:
        source.chmod(0o755)
        (source / "state").write_text("the last good configuration")
        JoinedIdentity(source, Account(61200, 61201)).install()
        assert given == dict.fromkeys(["source", "state", *IDENTITY_FILES], (61200, 61201))
        assert source.stat().st_mode & 0o777 == 0o700

    def test_gives_away_nothing_that_the_account_before_has_planted(
        self, source: Path, tmp_path: Path, given: dict[str, tuple[int, int]]
    ) -> None:
        other = tmp_path / "shadow"
        other.write_text("somebody else's")
        (source / "link").symlink_to(other)
        (source / "hard").hardlink_to(other)
        os.mkfifo(source / "fifo")
        (source / "directory").mkdir()
        JoinedIdentity(source, _ACCOUNT).install()
        assert set(given) == {"source", *IDENTITY_FILES}

    def test_a_directory_that_is_a_link_is_refused(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(source)
        with pytest.raises(OSError, match="link"):
            JoinedIdentity(tmp_path / "link", _ACCOUNT).install()


class TestSidecar:
    def test_says_when_it_is_ready(self, make: Callable[[str], Sidecar]) -> None:
        sidecar = make("echo ready > /proc/$$/fd/$2; sleep 100")
        sidecar.start()
        select.select([sidecar.ready_fd], [], [], 5)
        sidecar.read_ready()
        assert sidecar.ready
        assert sidecar.ready_fd == -1
        sidecar.terminate()
        _reap(sidecar, time.monotonic())
        assert not sidecar.ready

    def test_end_before_ready_is_not_ready(self, make: Callable[[str], Sidecar]) -> None:
        sidecar = make("exit 1")
        sidecar.start()
        select.select([sidecar.ready_fd], [], [], 5)
        sidecar.read_ready()
        assert not sidecar.ready
        _reap(sidecar, time.monotonic())

    def test_backs_off_from_200_ms_to_5_s(self, make: Callable[[str], Sidecar]) -> None:
        sidecar = make("exit 1")
        waits = []
        for _ in range(7):
            sidecar.start()
            now = time.monotonic()
            _reap(sidecar, now)
            assert sidecar.restart_at is not None
            waits.append(round(sidecar.restart_at - now, 3))
        assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
        assert sidecar.restarts == 7

    def test_healthy_life_makes_the_next_restart_prompt(self, make: Callable[[str], Sidecar]) -> None:
        sidecar = make("exit 1")
        for later in (0, 0, 0, 11):
            sidecar.start()
            now = time.monotonic() + later
            _reap(sidecar, now)
        assert sidecar.restart_at is not None
        assert round(sidecar.restart_at - now, 3) == 0.2

    def test_failed_start_leaves_no_descriptor(self, make: Callable[[str], Sidecar], source: Path) -> None:
        sidecar = make("exit 0")
        before = len(os.listdir("/proc/self/fd"))
        (source / "key.pem").unlink()
        with pytest.raises(FileNotFoundError):
            sidecar.start()
        assert len(os.listdir("/proc/self/fd")) == before
        assert sidecar.ready_fd == -1


class TestSupervision:
    @pytest.fixture
    def supervise(self, capsys: pytest.CaptureFixture[str]) -> Callable[[Sidecar, float], str]:
        """Supervises until it is ready; what it printed."""

        def in_child(sidecar: Sidecar, timeout_s: float) -> str:
            signals = linux.SignalFd(SIGNALS)
            supervision = Supervision("web", signals, sidecar)
            try:
                supervision.start_sidecar(timeout_s)
            finally:
                supervision.end_sidecar(2)
                signals.close()
            return capsys.readouterr().err

        # Alone, as a launcher is: a signal goes to any thread that does not block it.
        return lambda sidecar, timeout_s: run_inside(None, None, lambda: in_child(sidecar, timeout_s))

    def test_late_sidecar_is_named_with_what_is_pending(
        self, make: Callable[[str], Sidecar], supervise: Callable[[Sidecar, float], str]
    ) -> None:
        with pytest.raises(LaunchError, match=r"not ready after 0\.3 s; pending: its own start"):
            supervise(make("sleep 100"), 0.3)

    def test_sidecar_that_gives_up_is_told_at_once(
        self, make: Callable[[str], Sidecar], supervise: Callable[[Sidecar, float], str]
    ) -> None:
        began = time.monotonic()
        with pytest.raises(LaunchError, match="ended with status 3 before it was ready"):
            supervise(make("exit 3"), 20)
        assert time.monotonic() - began < 15

    def test_killed_before_ready_is_tried_again(
        self, make: Callable[[str], Sidecar], supervise: Callable[[Sidecar, float], str], tmp_path: Path
    ) -> None:
        once = tmp_path / "once"
        script = f"if [ ! -e {once} ]; then touch {once}; kill -9 $$; fi; echo ready > /proc/$$/fd/$2; sleep 100"
        told = supervise(make(script), 10)
        assert "the sidecar ended (SIGKILL); connections are refused until it is back" in told
        assert "serves again (restart 1)" in told


@pytest.mark.root
class TestUpgrades:
    """The launcher's command asks for them, with `uproxy upgrade`."""

    _READY = "echo ready > /proc/$$/fd/$2; exec sleep 100"

    @pytest.fixture
    def supervise(self, make: Callable[[str], Sidecar], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Supervise:
        """With the first sidecar ready at once, what becomes of the next ones: (command's status, sidecar, output)."""

        def run(later: str, command: str) -> tuple[int, str]:
            pids = tmp_path / "pids"
            first = f"echo $$ >> {pids}; if [ $(wc -l < {pids}) = 1 ]; then {self._READY}; fi; cd {tmp_path}; {later}"

            def in_child() -> int:
                signals = linux.SignalFd(SIGNALS)
                sidecar = make(first)
                with upgrade.requests(tmp_path, "web") as requests:
                    supervision = Supervision("web", signals, sidecar, requests)
                    try:
                        supervision.start_sidecar(10)
                        entrance: Entrance = _Free()  # type: ignore[assignment]
                        environment = {**os.environ, "UPGRADE": f"{sys.executable} -m uproxy upgrade web"}
                        environment |= {"STATE": str(tmp_path), "SIDECAR": str(sidecar.pid)}
                        return supervision.run(["sh", "-c", command], entrance, environment)
                    finally:
                        supervision.end_sidecar(5)
                        assert not sidecar.processes()
                        signals.close()

            status: int = run_inside(None, None, in_child)
            out, err = capfd.readouterr()
            return status, out + err

        return run

    def test_the_new_one_takes_over_and_the_old_one_is_left_to_drain(self, supervise: Supervise) -> None:
        status, told = supervise(self._READY, "$UPGRADE --state-dir $STATE && kill -0 $SIDECAR")
        assert status == 0, told
        assert "web: the sidecar is pid" in told
        assert "; draining: " in told

    def test_one_that_gives_up_leaves_the_old_one(self, supervise: Supervise) -> None:
        status, told = supervise("exit 1", "$UPGRADE --state-dir $STATE || { kill -0 $SIDECAR && exit 7; }")
        assert status == 7, told
        assert "the new one did not take over: its messages say why; the sidecar is as before" in told
        assert "connections are refused" not in told

    def test_one_that_takes_too_long_is_killed(self, supervise: Supervise, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(supervision, "UPGRADE_TIMEOUT_S", 0.5)
        status, told = supervise("sleep 100", "$UPGRADE --state-dir $STATE || { kill -0 $SIDECAR && exit 7; }")
        assert status == 7, told
        assert "it took too long" in told

    def test_there_is_one_at_a_time(self, supervise: Supervise) -> None:
        one, begun = "$UPGRADE --state-dir $STATE", "[ $(wc -l < $STATE/pids) = 2 ]"
        command = f"{one} & until {begun}; do sleep 0.05; done; {one} && exit 1; touch $STATE/go; wait"
        status, told = supervise(f"until [ -e go ]; do sleep 0.05; done; {self._READY}", command)
        assert status == 0, told
        assert "an upgrade is under way" in told
        assert "web: the sidecar is pid" in told

    def test_old_one_that_dies_meanwhile_is_followed_by_the_new_one(self, supervise: Supervise) -> None:
        later = f"kill -9 $(head -n 1 pids); sleep 0.5; {self._READY}"
        status, told = supervise(later, "$UPGRADE --state-dir $STATE && [ $(wc -l < $STATE/pids) = 2 ]")
        assert status == 0, told
        assert "connections are refused until it is back" in told
        assert "web: the sidecar is pid" in told
        assert told.count("serves again") == 0, "it was not restarted besides"

    def test_too_many_that_drain_are_enough(self, supervise: Supervise, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(supervision, "MAX_FORMER", 1)
        one = "$UPGRADE --state-dir $STATE"
        status, told = supervise(self._READY, f"{one} && {{ {one} || exit 7; }}")
        assert status == 7, told
        assert "1 former sidecars still carry connections" in told

    def test_whoever_says_anything_else_is_told_so(self, supervise: Supervise) -> None:
        status, told = supervise("exit 1", f"{sys.executable} -c '{_SAYS_ANYTHING}' $STATE")
        assert status == 0, told
        assert told.count("knows upgrades only") == 3

    def test_without_a_launcher_it_fails(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert upgrade.main(["web", "--state-dir", str(tmp_path)]) == 1
        assert "does `uproxy exec` run it" in capsys.readouterr().err
        assert upgrade.main(["web", "--state-dir", str(tmp_path / "none")]) == 1

    def test_however_long_its_name_is(self, tmp_path: Path) -> None:
        name = "a." * 120 + "a"
        with upgrade.requests(tmp_path, name), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
            (path,) = tmp_path.iterdir()
            assert path.stat().st_mode & 0o777 == 0o600
            assert path.name.startswith(".")
            with linux.short_path(tmp_path, path.name) as short:
                asking.connect(short)
        assert not list(tmp_path.iterdir())


_SAYS_ANYTHING = """
import socket, sys
for said in (b"x", b"\\x81\\xa2op\\xa1x", b""):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(sys.argv[1] + "/.web.sock")
    sock.send(said)
    print(sock.recv(4096))
"""
