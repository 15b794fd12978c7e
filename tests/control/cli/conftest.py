"""A control plane in this process for what an operator types, and `meshctl` against it."""

import pytest

from control.cli.__main__ import main
from control.server.ca import Authority
from tests.support.operators import operated


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return tmp_path_factory.mktemp("ca") / "ca"


@pytest.fixture(scope="module")
def authority(ca):
    return Authority.create(ca, "cluster.local")


@pytest.fixture
def plane(ca, authority, tmp_path):
    with operated(ca, authority, tmp_path / "control") as plane:
        yield plane


@pytest.fixture
def meshctl(capsys, plane, monkeypatch):
    """Run a command against the control plane; its exit status, stdout and stderr."""
    monkeypatch.setenv("MESHCTL_SOCKET", str(plane.socket))

    def run(*argv: object) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as left:
            status = left.code
        out, err = capsys.readouterr()
        return status, out, err

    return run
