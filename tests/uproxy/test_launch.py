from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from control.server.ca import Authority
from tests.support.certificates import WEB, identity_dir
from tests.support.membership import membership
from uproxy import config, launch

_NEEDED = ["--name", "web", "--address", "10.0.0.1", "--config", "mesh.yaml", "--identity-dir", "id"]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ca") / "ca", "cluster.local")


def _usage(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        launch.main(list(argv))
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([*_NEEDED], "no command: put it behind --"),
        ([*_NEEDED, "--"], "no command"),
        ([*_NEEDED, "--name", "Web!", "--", "true"], "'Web!' must be"),
        ([*_NEEDED, "--namespace", "a.b", "--", "true"], "'a.b' must be"),
        ([*_NEEDED, "--address", "10.0.0.300", "--", "true"], "'10.0.0.300' is not an IP address"),
        ([*_NEEDED[2:], "--", "true"], "--name"),
        (["--name", "web", "--config", "m.yaml", "--", "true"], "needs --join, or else --address, --identity-dir"),
        ([*_NEEDED, "--join", "t", "--", "true"], "--address, --config, --identity-dir: with --join"),
        (["--name", "web", "--join", "t", "--namespace", "shop", "--", "true"], "--namespace: with --join"),
        ([*_NEEDED, "--capture", "iptables", "--", "true"], "--capture"),
        ([*_NEEDED, "--capture", "nft", "--", "true"], "--capture nft needs --mesh-cidr"),
        ([*_NEEDED, "--capture", "auto", "--", "true"], "--capture auto needs --mesh-cidr"),
        ([*_NEEDED, "--mesh-cidr", "10.0.0.0/8", "--", "true"], "belong to --capture nft; the node agent has its own"),
        ([*_NEEDED, "--exclude-cidr", "10.0.0.0/8", "--", "true"], "belong to --capture nft"),
        ([*_NEEDED, "--dns", "--capture", "none", "--", "true"], "--dns needs --capture ebpf"),
        ([*_NEEDED, "--capture", "nft", "--mesh-cidr", "10.0.0.1/8", "--", "true"], "bits set beyond its prefix"),
    ],
)
def test_wrong_usage_is_told(capsys: pytest.CaptureFixture[str], argv: list[str], told: str) -> None:
    assert told in _usage(capsys, *argv)


def test_options_behind_the_separator_are_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    options, command = launch._parse([*_NEEDED, "--", "sh", "-c", "--", "--name"])
    assert options.name == "web"
    assert command == ["sh", "-c", "--", "--name"]


def test_paths_do_not_depend_on_the_working_directory() -> None:
    options, _ = launch._parse([*_NEEDED, "--state-dir", "state", "--", "true"])
    assert options.config == [Path.cwd() / "mesh.yaml"]
    assert options.state_dir == Path.cwd() / "state"


class TestRefusals:
    """What is known to be wrong before anything is made."""

    @pytest.fixture
    def argv(self, tmp_path: Path) -> list[str]:
        (tmp_path / "mesh.yaml").touch()
        (tmp_path / "id").mkdir()
        for name in ("key.pem", "chain.pem", "bundle.pem"):
            (tmp_path / "id" / name).touch()
        files = ["--config", str(tmp_path / "mesh.yaml"), "--identity-dir", str(tmp_path / "id")]
        return [*_NEEDED[:4], *files, "--state-dir", str(tmp_path / "state"), "--capture", "none"]

    @pytest.fixture(autouse=True)
    def as_root(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)

    def _refused(self, capsys: pytest.CaptureFixture[str], argv: list[str], status: int = 125) -> str:
        assert launch.main([*argv]) == status
        return capsys.readouterr().err

    def test_without_root(
        self, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert "uproxy run --capture none" in self._refused(capsys, [*argv, "--", "true"])

    def test_unknown_user(self, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert "--user no-such-user" in self._refused(capsys, [*argv, "--user", "no-such-user", "--", "true"])

    @pytest.mark.parametrize(
        ("more", "told"),
        [
            ([], "--capture nft needs a --user other than root"),
            (["--user", "root"], "--capture nft needs a --user other than root"),
            (["--user", "nobody", "--probe-port", "80"], "--probe-port needs --capture ebpf"),
        ],
    )
    def test_what_nftables_cannot_tell_apart(
        self, argv: list[str], more: list[str], told: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        argv += ["--capture", "nft", "--mesh-cidr", "10.0.0.0/8", *more]
        assert told in self._refused(capsys, [*argv, "--", "true"])

    def test_missing_configuration(self, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "mesh.yaml").unlink()
        assert "mesh.yaml: no such file" in self._refused(capsys, [*argv, "--", "true"])

    def test_missing_certificate(self, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "id/chain.pem").unlink()
        told = self._refused(capsys, [*argv, "--", "true"])
        assert "no chain.pem in it" in told
        assert "meshctl ca issue" in told

    def test_identity_in_the_directory_that_is_removed(
        self, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "state").mkdir()
        (tmp_path / "id").rename(tmp_path / "state/web")
        argv[argv.index("--identity-dir") + 1] = str(tmp_path / "state/web")
        assert "removed at the end" in self._refused(capsys, [*argv, "--", "true"])
        assert (tmp_path / "state/web/key.pem").exists()

    def test_cgroup_root_elsewhere(self, argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "is not below the cgroup2" in self._refused(
            capsys, [*argv, "--cgroup-root", str(tmp_path), "--", "true"]
        )

    def test_no_cgroup2(
        self, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from uproxy import cgroup

        def none() -> Path:
            raise cgroup.SandboxError("no cgroup2 hierarchy is mounted")

        monkeypatch.setattr(cgroup, "mount_point", none)
        assert "no cgroup2" in self._refused(capsys, [*argv, "--", "true"])


class TestMember:
    """What a launch takes from the identity directory of a workload that has joined."""

    @pytest.fixture
    def state(self, tmp_path: Path, authority: Authority) -> Path:
        directory = identity_dir(authority, tmp_path / "state" / "web", WEB)
        (directory / "mesh.json").write_bytes(membership(addresses=("10.96.0.10", "fd00::10")).encode())
        return directory

    def _options(self, state: Path, name: str = "web") -> argparse.Namespace:
        argv = ["--name", name, "--join", "gone.token", "--state-dir", str(state.parent), "--", "true"]
        return launch._parse(argv)[0]

    def test_takes_who_it_is_from_there_and_needs_no_token(self, state: Path) -> None:
        options = self._options(state)
        launch._become_member(options, state)
        assert (options.namespace, options.service_account) == ("shop", "web")
        assert options.address == ("10.96.0.10", "fd00::10")
        arguments = launch._sidecar_arguments(options, state)
        assert arguments[arguments.index("--identity-dir") + 1] == str(state)
        assert not {"--config", "--workload", "--address", "--join"} & set(arguments)

    def test_its_sidecar_posts_spans_where_the_launch_says(self, state: Path) -> None:
        spans = ["--otlp", "collector.observability:4318", "--otlp-share", "0.5"]
        argv = ["--name", "web", "--join", "gone.token", "--state-dir", str(state.parent), *spans, "--", "true"]
        arguments = launch._sidecar_arguments(launch._parse(argv)[0], state)
        settings = config.parse(arguments)
        assert settings.otlp == config.Collector("collector.observability", 4318, 0.5)
        arguments = launch._sidecar_arguments(self._options(state), state)
        assert config.parse(arguments).otlp is None

    def test_of_another_name_is_refused(self, state: Path) -> None:
        with pytest.raises(launch.LaunchError, match="is workload shop/web's: use --name web"):
            launch._become_member(self._options(state, "db"), state)

    def test_without_an_address_is_refused(self, state: Path) -> None:
        (state / "mesh.json").write_bytes(membership(addresses=()).encode())
        with pytest.raises(launch.LaunchError, match="without an address"):
            launch._become_member(self._options(state), state)

    def test_without_identity_or_token_is_refused(self, state: Path) -> None:
        (state / "chain.pem").unlink()
        with pytest.raises(
            launch.LaunchError, match=r"cannot join with .*gone\.token: the token file .* cannot be read"
        ):
            launch._become_member(self._options(state), state)
