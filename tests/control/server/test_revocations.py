"""The CA's revocation list, on its way into the mesh."""

from __future__ import annotations

from pathlib import Path

import pytest

from control.server.ca import Authority, write_revocations
from control.server.revocations import RevocationLists
from tests.support.control_plane import ControlPlane


@pytest.fixture
def plane(tmp_path: Path):
    Authority.create(tmp_path / "ca", "cluster.local")
    made = ControlPlane(tmp_path / "control", tmp_path / "ca", "mqtts://127.0.0.1:1")
    yield made
    made.close()


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    return tmp_path / "ca"


def lists_of(plane: ControlPlane, ca: Path) -> RevocationLists:
    made = RevocationLists(ca, plane.authority, plane.core)
    made.look()
    return made


def revoke(plane: ControlPlane, ca: Path, *serials: int) -> bytes:
    path, _ = write_revocations(ca, plane.authority, serials)
    return path.read_bytes()


def test_what_is_revoked_is_published_once_and_holds(plane: ControlPlane, ca: Path) -> None:
    lists = lists_of(plane, ca)
    assert plane.core.revocations() == ()
    assert not lists.revoked(7)
    for serials in ((7,), (8, 9)):
        pem = revoke(plane, ca, *serials)
        lists.look()
        assert plane.core.revocations() == (plane.authority.read_revocations(pem).der,)
        stamp = plane.store.stamp()
        lists.look()
        assert plane.store.stamp() == stamp
    assert [serial for serial in range(5, 12) if lists.revoked(serial)] == [7, 8, 9]


def test_two_lists_of_one_second_have_an_order(plane: ControlPlane, ca: Path) -> None:
    numbers = [plane.authority.read_revocations(revoke(plane, ca, serial)).number for serial in (1, 2, 3)]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("what", ["gone", "older", "of another CA", "no list"])
def test_what_is_published_is_not_taken_back(
    plane: ControlPlane, ca: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    old = revoke(plane, ca, 7)
    revoke(plane, ca, 8)
    lists = lists_of(plane, ca)
    published = plane.core.revocations()
    file = ca / "crl.pem"
    if what == "gone":
        file.unlink()
    else:
        other = Authority.create(tmp_path / "other", "cluster.local")
        file.write_bytes({"older": old, "of another CA": other.revoke([1]), "no list": b"-----BEGIN"}[what])
    for made in (lists, lists_of(plane, ca)):  # also by a control plane that starts anew
        made.look()
        made.look()
        assert plane.core.revocations() == published
        assert made.revoked(7)
        assert made.revoked(8)
        assert bool(made.problem) is (what != "gone")
    assert caplog.text.count("is not handed out") == 2 * (what != "gone")
    revoke_anew = plane.authority.revoke([9], plane.authority.revoke([7, 8]))
    file.write_bytes(revoke_anew)
    lists.look()
    assert lists.problem == ""
    assert lists.revoked(9)
