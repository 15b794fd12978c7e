from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from uproxy import cgroup
from uproxy.cgroup import SandboxError
from uproxy.entrance import Account, Entrance, Exposure, exposures

_NOBODY = Account(65534, 65534)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """home (closed) / clone / code, and home / clone / other; what is above is as it is."""
    for directory in ("home/clone/code", "home/clone/other"):
        (tmp_path / directory).mkdir(parents=True)
    for directory in tmp_path.rglob("*"):
        directory.chmod(0o755)
    (tmp_path / "home").chmod(0o700)
    (tmp_path / "home/clone/code/file").write_text("content\n")
    (tmp_path / "home/clone/other/secret").write_text("secret")
    return tmp_path / "home"


def test_open_directories_need_nothing() -> None:
    assert exposures([Path("/usr"), Path("/usr/bin")]) == ()


def test_closed_directory_is_covered_once(tree: Path) -> None:
    (exposure,) = exposures([tree / "clone/code", tree / "clone/other", Path("/usr")])
    assert tree.is_relative_to(exposure.closed)
    assert exposure.needed == (tree / "clone/code", tree / "clone/other")


def test_what_lies_below_an_exposed_directory_comes_with_it(tree: Path) -> None:
    (exposure,) = exposures([tree / "clone", tree / "clone/code"])
    assert exposure.needed == (tree / "clone",)


def test_closed_target_is_refused_by_name(tree: Path) -> None:
    (tree / "clone/code").chmod(0o700)
    for wanted in ([tree / "clone/code"], [tree / "clone", tree / "clone/code"]):
        with pytest.raises(SandboxError, match=rf"{tree}/clone/code is closed .* chmod o\+rx"):
            exposures(wanted)


@pytest.mark.root
class TestEntering:
    @pytest.fixture
    def group(self) -> Iterator[Path]:
        made = cgroup.mount_point() / f"uproxy-test-{uuid.uuid4().hex[:6]}"
        made.mkdir()
        try:
            yield made
        finally:
            cgroup.remove(made)

    @pytest.fixture(autouse=True)
    def opened(self) -> Iterator[None]:
        self.netns = os.open("/proc/self/ns/net", os.O_RDONLY)
        yield
        os.close(self.netns)

    def _run(self, entrance: Entrance, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["sh", "-c", script], preexec_fn=entrance, capture_output=True, text=True, check=False)

    def _entrance(self, group: Path, needed: tuple[Exposure, ...] = ()) -> Entrance:
        return Entrance(group, self.netns, account=_NOBODY, restricted=True, exposures=needed)

    def test_exposed_is_all_that_is_seen(self, group: Path, tree: Path) -> None:
        code, other = tree / "clone/code", tree / "clone/other"
        done = self._run(
            self._entrance(group, exposures([code])), f"cat {code}/file; ls {tree}/clone; cat {other}/secret"
        )
        assert done.stdout.split() == ["content", "code"]
        assert "secret" not in done.stdout
        # Nothing changed for anybody else.
        assert sorted(os.listdir(tree / "clone")) == ["code", "other"]
        assert tree.stat().st_mode & 0o777 == 0o700

    def test_without_exposure_it_is_closed(self, group: Path, tree: Path) -> None:
        done = self._run(self._entrance(group), f"cat {tree}/clone/code/file")
        assert done.stdout == ""
        assert "ermission denied" in done.stderr

    def test_account_and_restrictions(self, group: Path) -> None:
        done = self._run(
            self._entrance(group), "id; ulimit -c; grep NoNewPrivs /proc/self/status; cat /proc/self/cgroup"
        )
        assert "uid=65534" in done.stdout
        assert "groups=65534" in done.stdout
        assert "root" not in done.stdout
        assert "\n0\n" in done.stdout
        assert "NoNewPrivs:\t1" in done.stdout
        assert group.name in done.stdout

    def test_failure_is_told(self, group: Path, capfd: pytest.CaptureFixture[str]) -> None:
        entrance = Entrance(group / "missing", 0)
        with pytest.raises(subprocess.SubprocessError):
            subprocess.run(["true"], preexec_fn=entrance, check=False)
        assert "cannot enter the sandbox" in capfd.readouterr().err
