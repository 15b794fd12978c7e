"""The array of backends: shares as the weights say, ranges that never meet, nothing written that may still be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf import layout, libbpf
from bpf.arena import QUARANTINE_S, Arena, ArenaFullError, Backend, alias_table
from bpf.loader import Loader
from bpf.maps import Grant, Pair
from tests.support import capture

WEIGHTS = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 2**31 - 1)), min_size=1, max_size=40)


def backend(number: int, weight: int = 1) -> Backend:
    return Backend(number.to_bytes(16, "big"), 80, weight, 0, number)


@given(weights=WEIGHTS.filter(any))
def test_an_alias_table_gives_each_backend_its_share(weights):
    slots = [
        layout.unpack("mesh_backend", raw)
        for raw in alias_table([backend(number, weight) for number, weight in enumerate(weights)])
    ]
    shares = dict.fromkeys(range(len(weights)), 0.0)
    for at, slot in enumerate(slots):
        kept = 1.0 if slot.alias == at else slot.keep / 2**32
        shares[slot.id] += kept / len(slots)
        shares[slots[slot.alias].id] += (1 - kept) / len(slots)
    total = sum(weights)
    for number, weight in enumerate(weights):
        assert shares[number] == pytest.approx(weight / total, abs=1e-8)
        assert weight or not shares[number], "a backend without a weight is drawn"


def test_no_backend_with_a_weight_is_an_error():
    for backends in ([], [backend(1, 0)]):
        with pytest.raises(ValueError, match="no backend has a weight"):
            alias_table(backends)


@pytest.fixture(scope="module")
def shared_maps():
    with capture.pins() as pins, Loader(pins / "maps") as loader:
        yield loader.maps


@pytest.fixture
def maps(shared_maps):
    yield shared_maps
    for key in shared_maps.direct_services.items():
        shared_maps.direct_services.delete(*key)


@pytest.mark.root
class TestArena:
    CAPACITY = 100
    SLOT = layout.sizeof("struct mesh_backend")

    @pytest.fixture
    def clock(self):
        return [0.0]

    @pytest.fixture
    def arena(self, maps, clock):
        arena = Arena(maps.direct_services.backends_fd, self.CAPACITY, self.SLOT, lambda: clock[0])
        yield arena
        arena.close()

    def test_what_is_stored_is_what_the_kernel_has(self, maps, arena):
        slots = alias_table([backend(number) for number in range(7)])
        base = arena.store(slots)
        for at, slot in enumerate(slots):
            key = (base + at).to_bytes(4, "little")
            assert libbpf.lookup(maps.direct_services.backends_fd, key, self.SLOT) == slot

    def test_a_released_range_rests_before_it_is_used_again(self, arena, clock):
        slots = alias_table([backend(number) for number in range(self.CAPACITY)])
        base = arena.store(slots)
        arena.release(base, len(slots))
        clock[0] = QUARANTINE_S - 0.001
        with pytest.raises(ArenaFullError, match="no room for 1 more"):
            arena.store(slots[:1])
        clock[0] = QUARANTINE_S
        assert arena.store(slots) == base

    @given(steps=st.lists(st.one_of(st.integers(1, 30), st.just(0)), max_size=60))
    def test_ranges_never_meet_and_are_never_lost(self, shared_maps, steps):
        clock = 0.0
        arena = Arena(shared_maps.direct_services.backends_fd, self.CAPACITY, self.SLOT, lambda: clock)
        held: list[tuple[int, int]] = []
        for count in steps:
            clock += QUARANTINE_S + 1
            if count:
                try:
                    base = arena.store([bytes(self.SLOT)] * count)
                except ArenaFullError:
                    continue
                taken = {at for one, length in held for at in range(one, one + length)}
                assert not taken & set(range(base, base + count))
                assert base + count <= self.CAPACITY
                held.append((base, count))
            elif held:
                arena.release(*held.pop(len(held) // 2))
        for one in held:
            arena.release(*one)
        clock += QUARANTINE_S + 1
        assert arena.store([bytes(self.SLOT)] * self.CAPACITY) == 0
        arena.close()

    def test_a_range_in_use_twice_is_refused(self, arena):
        arena.claim(10, 5)
        with pytest.raises(ValueError, match=r"slots 14\.\.14 are in use twice"):
            arena.claim(14, 1)


@pytest.mark.root
class TestDirectServices:
    KEY = (7, bytes(range(16)), 80)

    def test_another_agent_goes_on_with_what_is_there(self):
        with capture.pins() as pins:
            with Loader(pins / "maps") as first:
                first.maps.direct_services.put(*self.KEY, [backend(1), backend(2)])
                first.maps.direct_services.put(8, *self.KEY[1:], [backend(3)])
            with Loader(pins / "maps") as second:
                services = second.maps.direct_services
                assert services.items() == {self.KEY: 2, (8, *self.KEY[1:]): 1}
                services.put(9, *self.KEY[1:], [backend(4)])
                assert services.read(*self.KEY) == [1, 2]
                assert services.read(8, *self.KEY[1:]) == [3]
                assert services.delete(*self.KEY)
                assert not services.delete(*self.KEY)
                assert services.read(*self.KEY) == []

    def test_what_does_not_fit_leaves_the_old_in_force(self, maps):
        maps.direct_services.put(*self.KEY, [backend(1)])
        with pytest.raises(ArenaFullError):
            maps.direct_services.put(*self.KEY, [backend(number) for number in range(65536)])
        assert maps.direct_services.read(*self.KEY) == [1]

    def test_a_full_map_of_services_loses_no_range(self, maps, monkeypatch):
        def full(*_: object) -> None:
            raise libbpf.BpfError(7, "full")

        with monkeypatch.context() as patch:
            patch.setattr(libbpf, "update", full)
            for _ in range(3):
                with pytest.raises(libbpf.BpfError):
                    maps.direct_services.put(*self.KEY, [backend(number) for number in range(20000)])
        assert maps.direct_services.items() == {}


@pytest.mark.root
def test_grants(maps):
    pair, grant = Pair(5, bytes(range(16)), 8080), Grant(10**12, 77, 1, 2)
    maps.grants.put(pair, grant)
    assert maps.grants.items() == {pair: grant}
    suspended = Grant(10**12, 77, 1, 2, suspended_ns=9)
    maps.grants.put(pair, suspended)
    assert maps.grants.renew(pair, 2 * 10**12)
    assert maps.grants.get(pair) == Grant(2 * 10**12, 77, 1, 2, suspended_ns=9)
    assert maps.grants.delete(pair)
    assert not maps.grants.delete(pair)
    assert not maps.grants.renew(pair, 3 * 10**12)
    assert maps.grants.get(pair) is None
