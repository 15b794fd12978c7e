"""The typed maps: what is written is what is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf.loader import Loader
from bpf.maps import Admission, RangeKind, Route, Settings, Target, Tuple
from tests.support import capture

pytestmark = pytest.mark.root
addresses = st.binary(min_size=16, max_size=16)
targets = st.builds(Target, st.integers(1, 2**32 - 1), st.sampled_from([Route.TUNNEL, Route.WAYPOINT]))


@pytest.fixture(scope="module")
def maps():
    with capture.pins() as pins, Loader(pins / "maps") as loader:
        yield loader.maps


@given(entries=st.dictionaries(st.tuples(addresses, st.integers(0, 65535)), targets, max_size=20))
def test_services(maps, entries):
    for number, (key, target) in enumerate(entries.items()):
        maps.services.put(key, target, number)
    assert maps.services.items() == entries
    assert len(maps.services) == len(entries)
    for number, key in enumerate(entries):
        assert maps.services.generation_of(key) == number
        assert maps.services.delete(key)
        assert not maps.services.delete(key)
        assert maps.services.generation_of(key) is None


@given(entries=st.dictionaries(st.tuples(addresses, st.just(0)), targets, max_size=20))
def test_workloads(maps, entries):
    for key, target in entries.items():
        maps.workloads.put(key, target, 1)
    assert maps.workloads.items() == entries
    assert all(maps.workloads.delete(key) for key in entries)


@given(entries=st.dictionaries(st.tuples(st.integers(0, 2**64 - 1), addresses), st.integers(0, 2**64 - 1), max_size=20))
def test_own(maps, entries):
    for (cookie, address), ino in entries.items():
        maps.own.put(cookie, address, ino)
    assert maps.own.items() == entries
    assert all(maps.own.delete(*key) for key in entries)


@given(kind=st.sampled_from(RangeKind), bits=st.integers(0, 128), address=addresses)
def test_ranges(maps, kind, bits, address):
    masked = (int.from_bytes(address, "big") >> (128 - bits) << (128 - bits)).to_bytes(16, "big")
    maps.ranges.put(masked, bits, kind)
    assert maps.ranges.items() == {(masked, bits): kind}
    assert maps.ranges.delete(masked, bits)
    assert not maps.ranges.delete(masked, bits)


ends = st.tuples(addresses, st.integers(0, 65535))
connections = st.builds(Tuple, st.integers(0, 2**64 - 1), ends, ends)


@given(
    entries=st.dictionaries(connections, st.tuples(st.integers(0, 2**64 - 1), st.sampled_from(Admission)), max_size=20)
)
def test_admitted(maps, entries):
    for connection, (since, kind) in entries.items():
        maps.admitted.put(connection, since, kind)
    assert maps.admitted.items() == entries
    assert all(maps.admitted.delete(connection) for connection in entries)


@given(entries=st.dictionaries(ends, st.integers(0, 2**64 - 1), max_size=20))
def test_probe_ports(maps, entries):
    for key, cookie in entries.items():
        maps.probe_ports.put(*key, cookie)
    assert maps.probe_ports.items() == entries
    assert all(maps.probe_ports.delete(*key) for key in entries)


@given(settings=st.builds(Settings, st.integers(0, 2**64 - 1), st.booleans()))
def test_settings(maps, settings):
    maps.settings.write(settings)
    assert maps.settings.read() == settings


def test_counters_begin_at_zero(maps):
    counters = maps.counters.read()
    assert {"captured", "refused_no_config", "dropped_syn"} <= counters.keys()
    assert not any(counters.values())
