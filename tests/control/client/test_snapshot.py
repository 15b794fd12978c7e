"""A snapshot is read back as it was written, or refused."""

from __future__ import annotations

import contextlib
import hashlib
import stat

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.client import snapshot
from control.client.snapshot import Snapshot, SnapshotError, pack, unpack

GOOD = Snapshot("cluster.local", ("shop/a", "shop/b"), (0, 255), {"shop": (3, 4)}, (("t", b"p"),))

texts = st.text(max_size=5)
numbers = st.integers(0, 2**63 - 1)
snapshots = st.builds(
    Snapshot,
    texts,
    st.lists(texts).map(tuple),
    st.lists(st.integers(0, 255)).map(tuple),
    st.dictionaries(texts, st.tuples(numbers, numbers)),
    st.lists(st.tuples(texts, st.binary(max_size=5))).map(tuple),
)


@given(snapshots)
def test_it_is_read_as_it_was_written(content):
    assert unpack(pack(content)) == content


@given(st.binary(max_size=80))
def test_other_bytes_are_refused(dumped):
    with pytest.raises(SnapshotError, match="damaged"):
        unpack(dumped)


def test_every_damaged_byte_is_noticed():
    dumped = pack(GOOD)
    for at in range(len(dumped)):
        damaged = bytearray(dumped)
        damaged[at] ^= 1
        with pytest.raises(SnapshotError):
            unpack(bytes(damaged))
    with pytest.raises(SnapshotError):
        unpack(dumped[:-1])


def sealed(value):
    packed = msgpack.packb(value)
    return hashlib.sha256(packed).digest() + packed


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        [1],
        [1, "m", [], [], {}],
        [1, "m", [], [], {}, [], []],
        [1, 5, [], [], {}, []],
        [1, "m", [5], [], {}, []],
        [1, "m", [], [256], {}, []],
        [1, "m", [], [-1], {}, []],
        [1, "m", [], [True], {}, []],
        [1, "m", [], [], {"a": 5}, []],
        [1, "m", [], [], {"a": [1, -1]}, []],
        [1, "m", [], [], {"a": [1, 2, 3]}, []],
        [1, "m", [], [], {5: [1, 2]}, []],
        [1, "m", [], [], {}, [["t", "p"]]],
        [1, "m", [], [], {}, [["t"]]],
    ],
)
def test_another_form_is_refused(value):
    with pytest.raises(SnapshotError, match="it cannot be read"):
        unpack(sealed(value))
    assert unpack(sealed([1, "m", [], [], {}, []])).messages == ()


def test_another_format_is_refused_by_its_number():
    with pytest.raises(SnapshotError, match="it has format 2; this software reads format 1"):
        unpack(sealed([2, "whatever"]))


@given(st.binary(max_size=40))
def test_no_sealed_bytes_raise_anything_else(packed):
    with contextlib.suppress(SnapshotError):
        unpack(hashlib.sha256(packed).digest() + packed)


def test_the_file_is_its_owners_and_replaced_whole(tmp_path):
    path = tmp_path / "replica"
    assert snapshot.read(path) is None
    snapshot.write(path, pack(GOOD))
    snapshot.write(path, pack(GOOD))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert unpack(snapshot.read(path)) == GOOD
    assert [one.name for one in tmp_path.iterdir()] == ["replica"]


def test_a_huge_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "MAX_BYTES", 10)
    path = tmp_path / "replica"
    path.write_bytes(bytes(11))
    with pytest.raises(SnapshotError, match="more than 10 bytes"):
        snapshot.read(path)
    path.write_bytes(bytes(10))
    assert snapshot.read(path) == bytes(10)
