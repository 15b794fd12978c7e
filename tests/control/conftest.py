"""A control plane in this process."""

import pytest

from control.server.ca import Authority
from tests.support.operators import operated


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return tmp_path_factory.mktemp("ca") / "ca"


@pytest.fixture(scope="module")
def authority(ca):
    return Authority.create(ca, "cluster.local")


@pytest.fixture
def plane(ca, authority, tmp_path, monkeypatch):
    """`meshctl` finds it."""
    with operated(ca, authority, tmp_path / "control") as plane:
        monkeypatch.setenv("MESHCTL_SOCKET", str(plane.socket))
        yield plane
