"""The command line of `waypoint`: what it takes, and what it says of the rest."""

from pathlib import Path

import pytest

from waypoint import config
from waypoint.__main__ import main


@pytest.mark.parametrize(("argv", "status"), [(["--version"], 0), (["--help"], 0), ([], 2), (["walk"], 2)])
def test_the_first_word_is_the_command(argv, status, capsys):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == status
    assert "waypoint" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "--state"),
        (["--state", "d", "--workload", "shop/wp-1"], "--workload"),
        (["--state", "d", "--config", "mesh.yaml"], "--workload"),
        (["--state", "d", "--config", "mesh.yaml", "--workload", "wp-1"], "NAMESPACE/NAME"),
        (["--state", "d", "--config", "mesh.yaml", "--workload", "shop/wp-1", "--join", "t"], "--join"),
        (["--state", "d", "--admin-port", "0"], "--admin-port"),
        (["--state", "d", "--drain-timeout-s", "-1"], "--drain-timeout-s"),
        (["--state", "d", "--workers", "0"], "--workers"),
        (["--state", "d", "--workers", "65"], "--workers"),
    ],
)
def test_a_wrong_option_is_named(argv, named, capsys):
    with pytest.raises(SystemExit) as left:
        main(["run", *argv])
    assert left.value.code == 2
    assert named in capsys.readouterr().err


def test_the_two_ways_to_run():
    member = config.parse(["--state", "wp", "--join", "token"])
    assert (member.identity_dir, member.join, member.config, member.workload) == (Path("wp"), Path("token"), (), "")
    alone = config.parse(["--identity-dir", "wp", "--config", "a.yaml", "--workload", "shop/wp-1"])
    assert (alone.identity_dir, alone.config, alone.workload) == (Path("wp"), (Path("a.yaml"),), "shop/wp-1")


def test_without_an_identity_it_says_what_to_do(tmp_path, capsys):
    assert main(["run", "--state", str(tmp_path / "nothing")]) == 1
    assert "--join" in capsys.readouterr().err
