"""The `waypoint` command says that there is none yet, and does nothing else."""

import pytest

from waypoint.__main__ import main


@pytest.mark.parametrize("argv", [["run"], ["run", "--port", "15008"]])
def test_run_refuses_and_says_what_to_do(argv, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "not part of this release" in err
    assert "uproxy run" in err
    assert "istio.io/use-waypoint" in err


@pytest.mark.parametrize(("argv", "status"), [(["--version"], 0), (["--help"], 0), ([], 2), (["walk"], 2)])
def test_the_rest_is_argparse(argv, status, capsys):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == status
    assert "waypoint" in "".join(capsys.readouterr())
