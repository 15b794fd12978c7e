"""Consistent hashing: even shares, few moves, and the same place whatever happened before."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.examples import examples
from waypoint.hash_ring import HashRing

_chance = random.Random(7)
KEYS = [_chance.getrandbits(64) for _ in range(6000)]


def ring(things: dict[bytes, int]) -> HashRing[bytes]:
    made: HashRing[bytes] = HashRing()
    made.set({name: (name, weight) for name, weight in things.items()})
    return made


def anybody(thing: bytes) -> bool:
    return True


def endpoints(count: int) -> dict[bytes, int]:
    return {b"10.0.%d.%d:80" % divmod(number, 256): 1 for number in range(count)}


@pytest.mark.parametrize("count", [2, 10, 100])
def test_equal_things_have_nearly_equal_shares(count):
    made = ring(endpoints(count))
    shares = Counter(made.find(key, anybody) for key in KEYS)
    assert len(shares) == count
    mean = len(KEYS) / count
    # The spread of the ring, 1/sqrt(places), and that of the sample: five standard deviations of both.
    spread = 5 * (1 / 100 + 1 / mean) ** 0.5
    assert all(abs(found / mean - 1) < spread for found in shares.values())


def test_shares_are_by_weight():
    shares = Counter(ring({b"a": 1, b"b": 3, b"c": 6}).find(key, anybody) for key in KEYS)
    assert shares[b"a"] / len(KEYS) == pytest.approx(0.1, abs=0.06)
    assert shares[b"b"] / len(KEYS) == pytest.approx(0.3, abs=0.1)
    assert shares[b"c"] / len(KEYS) == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize("count", [2, 10, 100])
def test_one_more_moves_only_what_goes_to_it(count):
    before, after = ring(endpoints(count)), ring(endpoints(count + 1))
    new = (endpoints(count + 1).keys() - endpoints(count).keys()).pop()
    moved = 0
    for key in KEYS:
        to = after.find(key, anybody)
        if to != before.find(key, anybody):
            moved += 1
            assert to == new
    assert 0.5 / (count + 1) < moved / len(KEYS) < 1.7 / (count + 1)


def test_what_is_not_usable_leaves_the_others_where_they_are():
    made = ring(endpoints(10))
    gone = b"10.0.0.3:80"
    for key in KEYS[:1000]:
        found = made.find(key, anybody)
        other = made.find(key, lambda thing: thing != gone)
        assert other == found if found != gone else other not in (gone, None)
    assert made.find(1, lambda thing: False) is None
    assert ring({}).find(1, anybody) is None


@settings(max_examples=examples(25))
@given(st.lists(st.dictionaries(st.sampled_from([b"a", b"b", b"c", b"d", b"e"]), st.integers(1, 50)), max_size=6))
def test_only_what_stands_on_it_now_counts(steps):
    """As a ring that never had anything else."""
    made: HashRing[bytes] = HashRing()
    for things in steps:
        made.set({name: (name, weight) for name, weight in things.items()})
        fresh = ring(things)
        assert [made.find(key, anybody) for key in KEYS[:60]] == [fresh.find(key, anybody) for key in KEYS[:60]]


def test_processes_agree():
    """Where things stand is fixed: other waypoints, older ones too, choose alike."""
    made = ring(endpoints(5))
    found = [made.find(number << 60, anybody) for number in range(8)]
    assert b" ".join(one[7:8] for one in found if one is not None) == b"4 4 3 0 2 1 2 4"
