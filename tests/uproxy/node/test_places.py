"""Where capture may be put, and where it must not."""

from __future__ import annotations

import os

import pytest

from tests.support import capture
from uproxy import cgroup, linux
from uproxy.node.places import Cgroup, NetworkNamespace, PlaceError, check_siblings, is_populated_id

pytestmark = pytest.mark.root


@pytest.fixture
def opened():
    fds = []

    def opener(path) -> int:
        fds.append(os.open(path, os.O_RDONLY))
        return fds[-1]

    yield opener
    for fd in fds:
        os.close(fd)


def test_a_cgroup_is_known_by_its_inode(site, opened):
    found = Cgroup.of(opened(site.app), "app cgroup")
    assert found.id == os.stat(site.app).st_ino
    assert found.path == site.app
    assert not found.is_populated()


def test_the_root_cgroup_is_refused(opened):
    with pytest.raises(PlaceError, match="app cgroup: is the root cgroup: capture there would take the whole host"):
        Cgroup.of(opened(cgroup.mount_point()), "app cgroup")


def test_what_is_no_cgroup_is_refused(opened, tmp_path):
    with pytest.raises(PlaceError, match="proxy cgroup: not a directory of the cgroup2 hierarchy at /"):
        Cgroup.of(opened(tmp_path), "proxy cgroup")


def test_a_removed_cgroup_is_refused(site, opened):
    fd = opened(site.app)
    site.app.rmdir()
    with pytest.raises(PlaceError, match="was removed"):
        Cgroup.of(fd, "app cgroup")


def test_cgroups_must_be_beside_each_other(site, opened):
    below = site.app / "proxy"
    below.mkdir()
    app, proxy, inner = (Cgroup.of(opened(path), "cgroup") for path in (site.app, site.proxy, below))
    check_siblings(app, proxy)
    for first, second in ((app, inner), (inner, app), (app, app)):
        with pytest.raises(PlaceError, match="must be beside each other"):
            check_siblings(first, second)


def test_processes_count_where_they_are_and_above(site, opened):
    below = site.app / "below"
    below.mkdir()
    app, proxy = (Cgroup.of(opened(path), "cgroup") for path in (site.app, site.proxy))
    with capture.background(site.netns, below, lambda: os.read(0, 1) and None, lambda: None):
        pass  # a child that was there and is gone
    assert not app.is_populated()

    def wait() -> None:
        import signal

        signal.pause()

    with capture.background(site.netns, below, wait, lambda: None):
        assert app.is_populated()
        assert is_populated_id(app.id) is True
        assert not proxy.is_populated()
        assert is_populated_id(proxy.id) is False


def test_a_removed_cgroup_is_neither_empty_nor_full(site):
    number = os.stat(site.app).st_ino
    assert is_populated_id(number) is False
    site.app.rmdir()
    assert is_populated_id(number) is None
    assert is_populated_id(0) is None


def test_a_cgroup_that_cannot_be_looked_up_is_not_taken_for_gone(site, monkeypatch):
    """Without CAP_DAC_READ_SEARCH the kernel says EPERM; the workload must stay captured."""

    def refuse(mount: int, cgroup_id: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("bpf.libc.open_cgroup", refuse)
    with pytest.raises(PermissionError):
        is_populated_id(os.stat(site.app).st_ino)


def test_a_namespace_is_known_by_inode_and_cookie(site):
    found = NetworkNamespace.of(site.netns)
    assert found.ino == os.fstat(site.netns).st_ino
    assert found.cookie not in (0, NetworkNamespace.of(site.peer).cookie)
    assert found == NetworkNamespace.of(site.netns)


def test_looking_into_a_namespace_does_not_leave_us_there(site):
    before = os.readlink("/proc/thread-self/ns/net")
    NetworkNamespace.of(site.netns)
    assert os.readlink("/proc/thread-self/ns/net") == before


def test_the_hosts_namespace_is_refused(opened):
    with pytest.raises(PlaceError, match="the host's network namespace: closing it would cut off the host"):
        NetworkNamespace.of(opened("/proc/self/ns/net"))


def test_the_initial_namespace_is_refused_from_any_other(site, opened):
    """An agent in a namespace of its own, as in the lab, whose init may be hidden from it."""
    initial = opened(f"/proc/{os.getppid()}/ns/net")  # tests may run in a namespace of their own, but not who runs them

    def ask() -> str:
        with pytest.raises(PlaceError) as refused:
            NetworkNamespace.of(initial)
        return str(refused.value)

    if os.fstat(initial).st_ino != 0xEFFFFFF9 and not os.access("/proc/1/ns/net", os.R_OK):
        pytest.skip("this test does not run in the initial namespace, and init's is hidden")
    assert "host's network namespace" in capture.run_inside(site.netns, None, ask)


def test_another_kind_of_namespace_is_refused(opened, tmp_path):
    for path in ("/proc/self/ns/mnt", tmp_path):
        with pytest.raises(PlaceError, match="no network namespace"):
            NetworkNamespace.of(opened(path))


def test_entering_needs_a_namespace(opened, tmp_path):
    with pytest.raises(OSError, match="setns"), linux.inside(opened(tmp_path)):
        pass
