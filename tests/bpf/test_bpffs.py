"""The pin directory must be root's alone: whoever writes there decides what is enforced."""

from __future__ import annotations

import os

import pytest

from bpf import bpffs, layout
from bpf.bpffs import PinError
from tests.support import capture
from uproxy import linux

pytestmark = pytest.mark.root


@pytest.fixture
def bpf_root(tmp_path):
    """A bpffs of our own, as open as many hosts' is."""
    root = tmp_path / "bpf"
    bpffs.mount(root)
    root.chmod(0o1777)
    yield root
    linux.unmount(root)


def test_mounting_makes_a_bpffs_once(tmp_path):
    root = tmp_path / "bpf"
    bpffs.mount(root)
    try:
        first = os.stat(root).st_dev
        bpffs.mount(root)
        assert os.stat(root).st_dev == first != os.stat(tmp_path).st_dev
    finally:
        linux.unmount(root)
    with pytest.raises(OSError, match="Invalid argument"):
        linux.unmount(root)


def test_every_level_is_private(bpf_root):
    directory = bpffs.node_directory("a", bpf_root)
    assert directory == bpf_root / "uproxy" / f"v{layout.SCHEMA}" / "a"
    for level in (directory / "maps", directory / "links", directory, directory.parent, directory.parent.parent):
        assert os.stat(level).st_mode & 0o777 == 0o700
    assert bpffs.node_directory("a", bpf_root) == directory


@pytest.mark.parametrize("below", ["uproxy", f"uproxy/v{layout.SCHEMA}", f"uproxy/v{layout.SCHEMA}/a"])
def test_a_level_that_others_may_write_is_refused(bpf_root, below):
    bpffs.node_directory("a", bpf_root)
    (bpf_root / below).chmod(0o770)
    with pytest.raises(PinError, match=r"mode 0770, and must be root's with 0700"):
        bpffs.node_directory("a", bpf_root)


def test_a_level_of_another_owner_is_refused(bpf_root):
    (bpf_root / "uproxy").mkdir(mode=0o700)
    os.chown(bpf_root / "uproxy", 1000, 1000)
    with pytest.raises(PinError, match="has owner 1000"):
        bpffs.node_directory("a", bpf_root)


def test_a_symbolic_link_is_refused(bpf_root, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    os.symlink(tmp_path / "elsewhere", bpf_root / "uproxy")
    with pytest.raises(PinError, match="is no directory"):
        bpffs.node_directory("a", bpf_root)


def test_removal_leaves_other_nodes_alone(bpf_root):
    first, second = bpffs.node_directory("a", bpf_root), bpffs.node_directory("b", bpf_root)
    bpffs.remove(first)
    assert second.exists()
    assert not first.exists()
    bpffs.remove(second)
    assert not (bpf_root / "uproxy").exists()
    bpffs.remove(second)  # nothing to do


def test_pins_of_other_schemas_are_found_and_a_later_ones_refused(bpf_root):
    ours = bpffs.node_directory("a", bpf_root)
    assert bpffs.earlier_schemas("a", bpf_root) == ()
    first = bpffs.node_directory("a", bpf_root, schema=layout.SCHEMA - 1)
    bpffs.node_directory("b", bpf_root, schema=layout.SCHEMA + 1)
    assert bpffs.earlier_schemas("a", bpf_root) == (first,)
    later = bpffs.node_directory("a", bpf_root, schema=layout.SCHEMA + 1)
    with pytest.raises(PinError, match=r"was pinned by a later version .*Start that version; or end"):
        bpffs.earlier_schemas("a", bpf_root)
    assert set(bpffs.other_schemas("a", bpf_root).values()) == {first, later}
    assert ours.exists()
    first.chmod(0o770)
    with pytest.raises(PinError, match="mode 0770"):
        bpffs.other_schemas("a", bpf_root)


def test_one_agent_at_a_time():
    with capture.pins() as directory:
        with (
            bpffs.sole_owner(directory),
            pytest.raises(PinError, match="another `uproxy node` of this name"),
            bpffs.sole_owner(directory),
        ):
            pass
        with bpffs.sole_owner(directory):
            pass
