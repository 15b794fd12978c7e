"""The kernel maps are equal to the state, by the least writing, and whole only when all is in."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf.loader import Loader
from bpf.maps import RangeKind, Route, Settings, Target
from control.api import index, messages, topics
from control.api.address import IpAddress, packed16, parse_address
from control.api.gateway import Binding, Via
from control.api.identity import parse_trust_domain
from control.api.index import Resident, ResidentService, ResidentWorkload
from control.api.messages import Envelope
from control.api.topics import AddressesTopic
from control.client.state import State
from tests.support import capture
from uproxy.capture.ranges import MeshRanges
from uproxy.node.sync import Difference, Sync, SyncError, desired, stable_id

TRUST_DOMAIN = parse_trust_domain("cluster.local")
RANGES = MeshRanges.parse(["240.240.0.0/16", "10.0.0.0/8", "fd00::/8"], ["10.9.0.0/16"])

BINDING = Binding("default/wp", Via.WAYPOINT)

Residents = dict[IpAddress, Resident]


def service(name: str, *vips: str, ports: tuple[int, ...] = (80,)) -> Residents:
    return dict.fromkeys(map(parse_address, vips), ResidentService("default", name, ports))


def workload(name: str, *addresses: str) -> Residents:
    return dict.fromkeys(map(parse_address, addresses), ResidentWorkload("default", name, name, {}))


class Mesh:
    """A state that is fed whole configurations, as a file source does."""

    def __init__(self) -> None:
        self.state = State("cluster.local")
        self.changed: frozenset[IpAddress] = frozenset()
        self._version = 0
        self._topics: set[str] = set()

    def become(self, *wanted: Residents) -> State:
        self._version += 1
        shards = index.shard_addresses({ip: one for residents in wanted for ip, one in residents.items()})
        batch = {
            topics.format_topic(TRUST_DOMAIN, AddressesTopic(shard)): self._envelope(index.write(content))
            for shard, content in shards.items()
        }
        tombstones = {topic: self._envelope(None) for topic in self._topics - batch.keys()}
        self._topics |= batch.keys()
        self.changed = self.state.apply([*batch.items(), *tombstones.items()]).addresses
        return self.state

    def _envelope(self, body: messages.Body | None) -> bytes:
        return messages.encode(Envelope(1, self._version, 0, body))


class NotToBeGoneThrough(dict[Any, Any]):
    def __iter__(self) -> NoReturn:
        raise AssertionError("all entries are gone through")

    keys = values = items = __iter__


names = st.sampled_from(["a", "b", "c", "d"])
addresses = st.sampled_from(["240.240.0.1", "240.240.0.2", "fd00::1", "10.0.0.1", "10.0.0.2", "10.0.0.3", "fd01::1"])
datagram_ports = st.sampled_from([(), (53,), (53, 80)])
residents = st.builds(
    ResidentService,
    st.just("default"),
    names,
    st.lists(st.sampled_from([80, 81, 443]), unique=True, min_size=1).map(tuple),
    st.booleans(),
    datagram_ports,
) | st.builds(
    ResidentWorkload,
    st.just("default"),
    names,
    names,
    st.just({}),
    st.sampled_from([(), ((0, BINDING),), ((80, BINDING), (443, BINDING))]),
    datagram_ports,
)
meshes = st.dictionaries(addresses.map(parse_address), residents)
contents = st.dictionaries(
    st.tuples(st.binary(min_size=16, max_size=16), st.integers(0, 3)),
    st.builds(Target, st.integers(1, 3), st.sampled_from([Route.TUNNEL, Route.WAYPOINT])),
)


@given(current=contents, wanted=contents)
def test_a_difference_turns_one_content_into_the_other(current, wanted):
    difference = Difference.between(current, wanted)
    result = {key: target for key, target in current.items() if key not in difference.delete} | dict(difference.put)
    assert result == wanted
    assert not difference.delete & difference.put.keys()
    assert all(current.get(key) != target for key, target in difference.put.items())
    assert bool(difference) == (current != wanted)


def test_desired_is_every_vip_and_port_and_every_address():
    entries = desired(service("db", "240.240.0.1", "fd00::1", ports=(80, 443)) | workload("one", "10.0.0.1", "fd01::1"))
    target = Target(stable_id("default/db"), Route.TUNNEL)
    expected = {(packed16(IpAddress(vip)), port): target for vip in ("240.240.0.1", "fd00::1") for port in (80, 443)}
    assert entries.services == expected
    assert {key: target.id for key, target in entries.workloads.items()} == {
        (packed16(IpAddress(address)), 0): stable_id("default/one") for address in ("10.0.0.1", "fd01::1")
    }


def test_what_is_bound_has_the_route_of_a_waypoint():
    bound = {
        parse_address("240.240.0.1"): ResidentService("default", "db", (80,), bound=True),
        parse_address("10.0.0.1"): ResidentWorkload("default", "one", "one", {}, ((8080, BINDING),)),
        parse_address("10.0.0.2"): ResidentWorkload("default", "two", "two", {}),
    }
    entries = desired(bound)
    assert [target.route for target in entries.services.values()] == [Route.WAYPOINT]
    assert [target.route for target in entries.workloads.values()] == [Route.WAYPOINT, Route.TUNNEL]


def test_ids_are_stable_and_never_zero():
    assert stable_id("default/db") == 0xE8853F44
    assert len({stable_id(f"default/{n}") for n in range(1000)}) == 1000


@pytest.fixture(scope="module")
def maps():
    with capture.pins() as pins, Loader(pins / "maps") as loader:
        yield loader.maps


@pytest.mark.root
class TestOnKernelMaps:
    @staticmethod
    def empty(maps) -> None:
        for targets in (maps.services, maps.workloads, maps.datagrams):
            for key in targets.items():
                targets.delete(key)
        maps.settings.write(Settings(0, whole=False))

    @given(steps=st.lists(st.tuples(meshes, st.booleans()), min_size=1, max_size=5))
    def test_after_any_changes_the_maps_equal_the_state(self, maps, steps):
        self.empty(maps)
        sync, mesh = Sync(maps, RANGES), Mesh()
        for step, only_changed in steps:
            state = mesh.become(step)
            before = maps.services.items(), maps.workloads.items(), maps.datagrams.items()
            stamps = {key: maps.services.generation_of(key) for key in before[0]}
            settings = maps.settings.read()

            written = sync.apply(state, mesh.changed if only_changed else None)

            wanted = desired(step)
            assert maps.services.items() == wanted.services
            assert maps.workloads.items() == wanted.workloads
            assert maps.datagrams.items() == wanted.datagrams
            least = 0
            for old, new in zip(before, (wanted.services, wanted.workloads, wanted.datagrams), strict=True):
                least += sum(old.get(key) != new.get(key) for key in old.keys() | new.keys())
            assert written == least
            after = maps.settings.read()
            assert after.whole
            assert after.generation == settings.generation + bool(written)
            for key, target in maps.services.items().items():
                unchanged = before[0].get(key) == target
                assert maps.services.generation_of(key) == (stamps[key] if unchanged else after.generation)
            mirrored = ("services", "workloads", "datagrams", "answering")
            assert sync.sizes() == {name: len(getattr(maps, name)) for name in mirrored}

    @given(first=meshes, second=meshes)
    def test_another_agent_goes_on_where_the_first_stopped(self, maps, first, second):
        self.empty(maps)
        Sync(maps, RANGES).apply(Mesh().become(first))
        generation = maps.settings.read().generation
        restarted = Sync(maps, RANGES)
        mesh = Mesh()
        assert restarted.apply(mesh.become(first)) == 0
        assert maps.settings.read() == Settings(generation, whole=True)
        mesh.become(second)
        restarted.apply(mesh.state, mesh.changed)
        assert maps.services.items() == desired(second).services
        assert maps.workloads.items() == desired(second).workloads

    def test_a_workload_of_this_host_answers_from_its_ports_for_datagrams_only(self, maps):
        self.empty(maps)
        maps.own.put(7, packed16(IpAddress("10.0.0.1")), 70)
        maps.own.put(8, packed16(IpAddress("10.0.0.2")), 80)
        try:
            sync, mesh = Sync(maps, RANGES), Mesh()
            one = {parse_address("10.0.0.1"): ResidentWorkload("default", "one", "one", {}, (), (53, 69))}
            other = {parse_address("10.0.0.3"): ResidentWorkload("default", "other", "other", {}, (), (53,))}
            sync.apply(mesh.become(one, workload("two", "10.0.0.2"), other))
            assert maps.answering.items() == {(7, 53), (7, 69)}
            assert [sync.answers(7, 53), sync.answers(7, 54), sync.answers(8, 53)] == [True, False, False]
            two = {parse_address("10.0.0.2"): ResidentWorkload("default", "two", "two", {}, (), (80,))}
            sync.apply(mesh.become(one, two, other), mesh.changed)
            assert maps.answering.items() == {(7, 53), (7, 69), (8, 80)}
            sync.apply(mesh.become(one, workload("two", "10.0.0.2"), other), mesh.changed)
            maps.own.delete(7, packed16(IpAddress("10.0.0.1")))
            sync.apply_answering(mesh.state)
            assert maps.answering.items() == set()
        finally:
            for cookie, address in maps.own.items():
                maps.own.delete(cookie, address)

    def test_datagrams_pass_as_the_maps_say_and_narrower_is_told(self, maps):
        self.empty(maps)
        sync, mesh = Sync(maps, RANGES), Mesh()
        assert sync.narrowed, "an earlier agent may have been killed"
        sync.narrowed = False
        dns = {parse_address("240.240.0.1"): ResidentService("default", "dns", (80,), datagrams=(53,))}
        sync.apply(mesh.become(dns))
        assert not sync.narrowed
        vip, outside = IpAddress("240.240.0.1"), IpAddress("192.0.2.1")
        assert [sync.passes(vip, 53), sync.passes(vip, 80), sync.passes(outside, 80)] == [True, False, True]
        sync.apply(mesh.become(service("dns", "240.240.0.1")), mesh.changed)
        assert sync.narrowed
        assert not sync.passes(vip, 53)
        assert maps.datagrams.items() == {}

    def test_a_change_of_one_address_does_not_go_through_all(self, maps, monkeypatch):
        """With 100,000 that takes milliseconds, for each endpoint that comes or goes."""
        self.empty(maps)
        sync, mesh = Sync(maps, RANGES), Mesh()
        others = service("db", "240.240.0.2"), workload("db", "10.0.0.2")
        dns = {parse_address("10.0.0.3"): ResidentWorkload("default", "dns", "dns", {}, (), (53,))}
        sync.apply(mesh.become(*others, dns))
        for mirror in (sync._services, sync._workloads, sync._datagrams):
            monkeypatch.setattr(mirror, "entries", NotToBeGoneThrough(mirror.entries))
        web = {parse_address("10.0.0.1"): ResidentWorkload("default", "web", "web", {}, (), (53,))}
        for step in ((*others, dns, service("web", "240.240.0.1"), web), others):
            sync.apply(mesh.become(*step), mesh.changed)
            wanted = desired({ip: one for residents in step for ip, one in residents.items()})
            assert maps.services.items() == wanted.services
            assert maps.workloads.items() == wanted.workloads
            assert maps.datagrams.items() == wanted.datagrams

    def test_only_what_changed_is_looked_at(self, maps):
        self.empty(maps)
        sync, mesh = Sync(maps, RANGES), Mesh()
        sync.apply(mesh.become(workload("w", "10.0.0.1")))
        mesh.become(workload("w", "10.0.0.1"), service("a", "240.240.0.1"), workload("v", "10.0.0.2"))
        assert sync.apply(mesh.state, {parse_address("10.0.0.2")}) == 1
        assert maps.services.items() == {}
        assert sync.apply(mesh.state) == 1

    def test_new_entries_go_in_before_old_ones_go_out_and_whole_comes_last(self, maps, monkeypatch):
        self.empty(maps)
        mesh, done = Mesh(), []
        sync = Sync(maps, RANGES)
        for kernel, name in ((maps.services, "service"), (maps.workloads, "workload"), (maps.settings, "settings")):
            for verb in ("put_all", "delete_all", "write"):
                if hasattr(kernel, verb):
                    original, did = getattr(kernel, verb), f"{verb.removesuffix('_all')} {name}"

                    def recorded(*args, original=original, what=did):
                        done.append(what)
                        return original(*args)

                    monkeypatch.setattr(kernel, verb, recorded)
        sync.apply(mesh.become(service("a", "240.240.0.1"), workload("w", "10.0.0.1")))
        assert done == ["put service", "put workload", "write settings"]
        done.clear()
        sync.apply(mesh.become(service("b", "240.240.0.2"), workload("v", "10.0.0.2")))
        assert done == ["put service", "put workload", "delete service", "delete workload", "write settings"]
        done.clear()
        sync.apply(mesh.become(service("b", "240.240.0.2"), workload("v", "10.0.0.2")))
        assert done == []

    def test_maps_that_cannot_all_be_written_do_not_become_whole(self, maps, monkeypatch):
        self.empty(maps)
        sync, mesh = Sync(maps, RANGES), Mesh()
        state = mesh.become(service("a", "240.240.0.1"), workload("w", "10.0.0.1"))

        def full(*_) -> None:
            raise OSError(7, "Argument list too long")

        with monkeypatch.context() as patched:
            patched.setattr(maps.workloads, "put_all", full)
            with pytest.raises(OSError, match="too long"):
                sync.apply(state)
        assert not maps.settings.read().whole
        sync.apply(state)
        assert maps.settings.read().whole
        assert maps.services.items() == desired(state.residents()).services
        assert maps.workloads.items() == desired(state.residents()).workloads

    def test_a_configuration_that_does_not_fit_is_refused_and_nothing_written(self, maps, monkeypatch):
        self.empty(maps)
        monkeypatch.setattr(maps.workloads, "capacity", lambda: 2)
        sync, mesh = Sync(maps, RANGES), Mesh()
        sync.apply(mesh.become(workload("a", "10.0.0.1")))
        before = maps.workloads.items(), maps.settings.read()
        state = mesh.become(service("s", "240.240.0.1"), *(workload(name, f"10.0.0.{ord(name)}") for name in "bcd"))
        with pytest.raises(SyncError, match=r"needs 3 entries in the kernel's map `workloads`, which has room for 2\."):
            sync.apply(state)
        assert (maps.workloads.items(), maps.settings.read()) == before
        assert maps.services.items() == {}
        state = mesh.become(service("s", "240.240.0.1"), workload("b", "10.0.0.2"), workload("c", "10.0.0.3"))
        sync.apply(state)
        assert maps.workloads.items() == desired(state.residents()).workloads

    def test_old_goes_out_before_new_goes_in_only_when_both_do_not_fit(self, maps, monkeypatch):
        self.empty(maps)
        monkeypatch.setattr(maps.workloads, "capacity", lambda: 2)
        sync, mesh, done = Sync(maps, RANGES), Mesh(), []
        for verb in ("put_all", "delete_all"):
            original = getattr(maps.workloads, verb)

            def recorded(*args, original=original, did=verb):
                done.append(did)
                return original(*args)

            monkeypatch.setattr(maps.workloads, verb, recorded)
        sync.apply(mesh.become(workload("a", "10.0.0.1")))
        sync.apply(mesh.become(workload("b", "10.0.0.2")))
        assert done == ["put_all", "put_all", "delete_all"]
        done.clear()
        state = mesh.become(workload("c", "10.0.0.3"), workload("d", "10.0.0.4"))
        sync.apply(state)
        assert done == ["delete_all", "put_all"]
        assert maps.workloads.items() == desired(state.residents()).workloads

    def test_an_address_outside_the_ranges_is_refused_and_nothing_written(self, maps):
        self.empty(maps)
        sync, mesh = Sync(maps, RANGES), Mesh()
        sync.apply(mesh.become(service("a", "240.240.0.1")))
        before = maps.services.items(), maps.settings.read()
        state = mesh.become(service("b", "240.240.0.2"), workload("w", "192.0.2.7"), workload("v", "10.9.0.1"))
        with pytest.raises(SyncError) as refused:
            sync.apply(state)
        assert str(refused.value).startswith(
            "workload default/v has address 10.9.0.1 (and 1 more), outside the mesh's ranges "
            "(240.240.0.0/16, 10.0.0.0/8, fd00::/8)"
        )
        assert (maps.services.items(), maps.settings.read()) == before
        sync.apply(mesh.become(service("b", "240.240.0.2")))
        assert maps.services.items() == desired(mesh.state.residents()).services

    def test_a_state_that_is_not_whole_makes_no_whole_maps(self, maps):
        self.empty(maps)
        Sync(maps, RANGES).apply(State("cluster.local"))
        assert not maps.settings.read().whole

    def test_an_empty_mesh_is_whole(self, maps):
        self.empty(maps)
        Sync(maps, RANGES).apply(Mesh().become())
        assert maps.settings.read() == Settings(0, whole=True)

    def test_egress_becomes_what_the_command_line_says_and_stays(self, maps):
        self.empty(maps)
        Sync(maps, RANGES, registry_only=True).apply(Mesh().become(service("a", "240.240.0.1")))
        assert maps.settings.read() == Settings(1, whole=True, registry_only=True)
        Sync(maps, RANGES)
        assert maps.settings.read() == Settings(1, whole=True)

    def test_ranges_become_what_the_command_line_says(self, maps):
        Sync(maps, MeshRanges.parse(["10.0.0.0/8", "fd00::/8"]))
        assert maps.ranges.items() == {
            (packed16(IpAddress("10.0.0.0")), 104): RangeKind.MESH,
            (packed16(IpAddress("fd00::")), 8): RangeKind.MESH,
        }
        Sync(maps, MeshRanges.parse(["11.0.0.0/8"], ["10.0.0.0/8"]))
        assert maps.ranges.items() == {
            (packed16(IpAddress("11.0.0.0")), 104): RangeKind.MESH,
            (packed16(IpAddress("10.0.0.0")), 104): RangeKind.EXCLUDED,
        }
