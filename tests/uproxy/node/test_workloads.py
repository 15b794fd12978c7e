"""A workload is captured whole or not at all, and stays so until nobody is left in it."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from bpf import layout, libbpf, maps
from bpf.libbpf import BpfError, Link
from bpf.loader import HOOKS, Loader, LoadError
from bpf.maps import Settings
from tests.support import capture
from tests.support.capture import OUTSIDE_V4, UNKNOWN_V4, VIP_V4, WORKLOAD_V4, WORKLOAD_V6
from uproxy.node.places import PlaceError
from uproxy.node.workloads import RegistrationError, Workloads

pytestmark = pytest.mark.root


@pytest.fixture
def workloads(loader, pins) -> Workloads:
    return Workloads(loader, pins / "links")


@pytest.fixture
def registration(site):
    with site.registration("web") as made:
        yield made


@pytest.fixture
def other_site():
    with capture.site() as made:
        yield made


def dial(address: str, port: int = 80) -> bytes:
    with socket.create_connection((address, port), timeout=30) as sock:
        return sock.recv(64)


def is_captured(site: capture.Site) -> bool:
    """Whether the app is refused an address that only capture refuses so quickly, and the way in is closed."""
    with site.outside():
        try:
            site.in_app(lambda: dial(capture.PEER_V4))
        except ConnectionRefusedError:
            return True
        return False


def waiting(site: capture.Site):
    """A process in the app cgroup."""
    return capture.background(site.netns, site.app, signal.pause, lambda: None)


def links(pins: Path) -> dict[str, set[str]]:
    return {path.name: set(os.listdir(path)) for path in (pins / "links").iterdir()}


def test_registering_attaches_and_pins_every_program(workloads, registration, site, pins, loader):
    assert not is_captured(site)
    workloads.register(registration)
    assert links(pins) == {"web": set(HOOKS)}
    assert is_captured(site)
    with site.uproxy():
        assert len(site.in_app(lambda: dial(VIP_V4))) == 64
    own = loader.maps.own.items()
    assert {capture.packed16(WORKLOAD_V4), capture.packed16(WORKLOAD_V6)} == {address for _, address in own}
    assert set(own.values()) == {registration.netns.ino}
    assert workloads.problems() == []


def test_registering_again_does_nothing(workloads, registration, pins):
    workloads.register(registration)
    before = {path: path.stat().st_ino for path in (pins / "links" / "web").iterdir()}
    workloads.register(registration)
    assert {path: path.stat().st_ino for path in (pins / "links" / "web").iterdir()} == before


def test_registering_again_is_possible_while_it_runs(workloads, registration, site):
    workloads.register(registration)
    with waiting(site):
        workloads.register(registration)


def test_a_workload_that_runs_already_is_refused(workloads, registration, site, pins):
    with waiting(site), pytest.raises(RegistrationError, match=r"processes are in .* already"):
        workloads.register(registration)
    assert links(pins) == {}


@pytest.mark.parametrize("failing", list(HOOKS))
def test_a_failure_half_way_leaves_nothing(workloads, registration, site, pins, loader, monkeypatch, failing):
    real = Link.pin

    def pin(self, path: Path) -> None:
        if path.name == failing:
            raise BpfError(28, f"pin link {path}: No space left on device")
        real(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(Link, "pin", pin)
        with pytest.raises(RegistrationError, match=r"workload web: .*No space left"):
            workloads.register(registration)
    assert links(pins) == {}
    assert loader.maps.own.items() == {}
    assert workloads.captured() == ()
    assert not is_captured(site)
    workloads.register(registration)
    assert is_captured(site)


def test_name_queries_are_captured_for_who_asks_for_it_and_as_long_as_it_is_there(
    workloads, registration, pins, loader
):
    with_dns = dataclasses.replace(registration, dns=True)
    workloads.register(with_dns)
    assert loader.maps.dns_captured.items() == {registration.netns.cookie}
    again = Workloads(loader, pins / "links")
    again.adopt()
    assert [one.dns for one in again.captured()] == [True]
    workloads.register(registration)
    assert loader.maps.dns_captured.items() == set()
    workloads.register(with_dns)
    workloads.unregister(with_dns.name)
    assert loader.maps.dns_captured.items() == set()


def test_a_failed_registration_captures_no_name_queries(workloads, registration, loader, monkeypatch):
    monkeypatch.setattr(Link, "pin", lambda *_: (_ for _ in ()).throw(BpfError(28, "pin link")))
    with pytest.raises(RegistrationError):
        workloads.register(dataclasses.replace(registration, dns=True))
    assert loader.maps.dns_captured.items() == set()


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "+web", "Web", "web.", "-web", "a" * 101, "web\n", "wéb"])
def test_a_name_that_is_none_is_refused(workloads, registration, name, pins):
    with pytest.raises(RegistrationError, match="workload name"):
        workloads.register(dataclasses.replace(registration, name=name))
    assert links(pins) == {}


def test_a_name_with_dots_can_be_pinned(workloads, registration, pins, loader):
    workloads.register(dataclasses.replace(registration, name="web.v1.shop"))
    assert set(links(pins)) == {"web:v1:shop"}
    again = Workloads(loader, pins / "links")
    again.adopt()
    assert [one.name for one in again.captured()] == ["web.v1.shop"]
    again.unregister("web.v1.shop")
    assert links(pins) == {}


@pytest.mark.parametrize("count", [0, 9])
def test_the_number_of_addresses_is_bounded(workloads, registration, count):
    addresses = tuple(capture.parse_address(f"10.99.1.{n}") for n in range(count))
    with pytest.raises(RegistrationError, match=f"has {count} addresses, and must have 1-8"):
        workloads.register(dataclasses.replace(registration, addresses=addresses))


def test_cgroups_within_each_other_are_refused(workloads, registration):
    with pytest.raises(PlaceError, match="must be beside each other"):
        workloads.register(dataclasses.replace(registration, proxy=registration.app))


def test_nothing_is_shared_between_workloads(workloads, registration, other_site):
    workloads.register(registration)
    with other_site.registration("db", (capture.parse_address("10.99.0.3"),)) as other:
        for wrong, complaint in (
            ({"app": registration.app}, "its app cgroup is that of workload web"),
            ({"netns": registration.netns}, "its network namespace is that of workload web"),
            ({"addresses": (WORKLOAD_V6,)}, f"address {WORKLOAD_V6} is that of workload web"),
        ):
            with pytest.raises(RegistrationError, match=complaint):
                workloads.register(dataclasses.replace(other, **wrong))
        workloads.register(other)
    assert {one.name for one in workloads.captured()} == {"web", "db"}
    assert is_captured(other_site)


def test_a_name_is_taken_over_when_nobody_is_left_in_the_old_one(workloads, registration, site, other_site, pins):
    workloads.register(registration)
    with other_site.registration("web", (WORKLOAD_V4,)) as other:
        with waiting(site), pytest.raises(RegistrationError, match="still has processes"):
            workloads.register(other)
        assert is_captured(site)
        workloads.register(other)
    assert links(pins) == {"web": set(HOOKS)}
    assert is_captured(other_site)
    assert not is_captured(site)


def test_unregistering_detaches_and_unpins(workloads, registration, site, pins, loader):
    workloads.register(registration)
    workloads.unregister("web")
    assert links(pins) == {}
    assert loader.maps.own.items() == {}
    assert not is_captured(site)
    workloads.unregister("web")  # unknown: nothing to do


def test_what_a_uproxy_opened_to_plaintext_ends_with_the_registration(workloads, registration, site, loader):
    def open_port() -> None:
        with socket.socket() as sock:
            value = layout.pack("mesh_plaintext", others=True)
            sock.setsockopt(layout.constant("MESH_SOL"), layout.constant("MESH_SO_PLAINTEXT"), value)

    workloads.register(registration)
    site.in_proxy(open_port)
    assert loader.maps.plaintext.items() == {registration.netns.cookie: (True, ())}
    workloads.unregister("web")
    assert loader.maps.plaintext.items() == {}


def test_unregistering_is_refused_while_processes_are_left(workloads, registration, site):
    workloads.register(registration)
    with waiting(site):
        with pytest.raises(RegistrationError, match="workload web: its app cgroup still has processes"):
            workloads.unregister("web")
        assert is_captured(site)
    workloads.unregister("web")


def test_a_workload_whose_cgroup_is_gone_is_swept(workloads, registration, site, pins, loader):
    workloads.register(registration)
    workloads.sweep()
    assert links(pins) == {"web": set(HOOKS)}
    site.app.rmdir()
    workloads.sweep()
    assert links(pins) == {}
    assert loader.maps.own.items() == {}


def test_a_missing_pin_is_a_problem(workloads, registration, pins):
    workloads.register(registration)
    (pins / "links" / "web" / "bind6").unlink()
    assert workloads.problems() == ["workload web: not attached: bind6; restart the workload"]


class TestAnotherAgent:
    """A second loader and record on the same pins, as after a restart."""

    @pytest.fixture
    def successor(self, workloads, registration, pins):
        workloads.register(registration)
        with Loader(pins / "maps") as loaded:
            yield Workloads(loaded, pins / "links")

    def test_knows_what_the_first_one_knew(self, successor, workloads, site):
        successor.adopt()
        (ours,), (theirs,) = successor.captured(), workloads.captured()
        assert set(ours.addresses) == set(theirs.addresses)
        assert dataclasses.replace(ours, addresses=theirs.addresses) == theirs
        assert is_captured(site)

    def test_puts_its_own_programs_in_place(self, successor, site, pins):
        def programs() -> dict[str, int]:
            found = {}
            for pin in (pins / "links" / "web").iterdir():
                with Link.open_pinned(pin) as link:
                    found[pin.name] = int(link._info().program_id)
            return found

        before = programs()
        successor.adopt()
        after = programs()
        assert before.keys() == after.keys() == HOOKS.keys()
        assert all(before[hook] != after[hook] for hook in HOOKS)
        with site.uproxy():
            assert len(site.in_app(lambda: dial(VIP_V4))) == 64
        with pytest.raises(ConnectionRefusedError):
            site.at_peer(lambda: dial(WORKLOAD_V4, 8080))

    def test_no_connection_notices(self, successor, site, tmp_path):
        """Connections all along, while the programs are replaced again and again."""
        done = tmp_path / "done"

        def dial_on() -> tuple[int, int]:
            captured = refused = 0
            while not done.exists():
                captured += len(dial(VIP_V4)) == 64
                try:
                    dial(UNKNOWN_V4)
                except ConnectionRefusedError:
                    refused += 1
            return captured, refused

        def replace() -> None:
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                successor.adopt()
            done.touch()

        with site.uproxy(), capture.background(site.netns, None, replace, lambda: None):
            captured, refused = site.in_app(dial_on)
        assert captured == refused > 50

    def test_removes_what_was_not_complete(self, successor, pins, loader):
        (pins / "links" / "+half").mkdir()
        loader.maps.own.put(12345, capture.packed16(WORKLOAD_V4), 99)
        libbpf.update(loader.maps.plaintext.fd, bytes(8), layout.pack("mesh_plaintext"))
        successor.adopt()
        assert set(links(pins)) == {"web"}
        assert {cookie for cookie, _ in loader.maps.own.items()} == {successor.captured()[0].netns_cookie}
        assert loader.maps.plaintext.items() == {}

    def test_sweeps_what_died_meanwhile(self, successor, site, pins, loader):
        site.app.rmdir()
        successor.adopt()
        assert successor.captured() == ()
        assert links(pins) == {}
        assert loader.maps.own.items() == {}

    def test_takes_the_registration_again(self, successor, registration, site):
        successor.adopt()
        with waiting(site):
            successor.register(registration)
        successor.unregister("web")
        assert not is_captured(site)


def programs(directory: Path) -> dict[str, int]:
    """Hook → id of the program behind its pinned link."""
    found = {}
    for pin in directory.iterdir():
        with Link.open_pinned(pin) as link:
            found[pin.name] = int(link._info().program_id)
    return found


class TestAnAgentOfAnotherSchema:
    """Pins of an earlier schema, with a workload that runs, and a later version's loader and record beside them."""

    @pytest.fixture
    def old_pins(self, pins):
        with capture.pins(pins.name, layout.SCHEMA - 1) as directory:
            yield directory

    @pytest.fixture
    def old(self, old_pins, registration):
        with Loader(old_pins / "maps") as loaded:
            capture.fill(loaded.maps)
            workloads = Workloads(loaded, old_pins / "links")
            workloads.register(registration)
            yield workloads

    def successor(self, old_pins, pins):
        return Loader(pins / "maps", earlier=[old_pins / "maps"])

    def test_takes_maps_links_and_pins_over(self, old, old_pins, pins, site):
        before = programs(old_pins / "links" / "web")
        with self.successor(old_pins, pins) as loaded:
            assert len(loaded.maps.services) == 2, "carried over"
            workloads = Workloads(loaded, pins / "links", [old_pins / "links"])
            workloads.adopt()
            assert programs(old_pins / "links" / "web") == before, "not before the maps are whole"
            workloads.take_over()
            after = programs(pins / "links" / "web")
            assert after.keys() == HOOKS.keys()
            assert all(before[hook] != after[hook] for hook in HOOKS)
            assert not old_pins.exists()
            (ours,), (theirs,) = workloads.captured(), old.captured()
            assert dataclasses.replace(ours, addresses=tuple(sorted(ours.addresses))) == dataclasses.replace(
                theirs, addresses=tuple(sorted(theirs.addresses))
            )
            assert workloads.problems() == []
            assert is_captured(site)
            with site.uproxy():
                assert len(site.in_app(lambda: dial(VIP_V4))) == 64
            with pytest.raises(ConnectionRefusedError):
                site.at_peer(lambda: dial(WORKLOAD_V4, 8080))

    def test_maps_that_changed_are_made_anew_and_the_old_programs_go_on_meanwhile(
        self, old, old_pins, pins, site, monkeypatch
    ):
        monkeypatch.setattr(maps, "CHANGED", {"services": layout.SCHEMA, "settings": layout.SCHEMA})
        with self.successor(old_pins, pins) as loaded:
            assert not loaded.maps.settings.read().whole
            assert loaded.maps.services.items() == {}
            workloads = Workloads(loaded, pins / "links", [old_pins / "links"])
            workloads.adopt()
            with site.uproxy():
                assert len(site.in_app(lambda: dial(VIP_V4))) == 64
                capture.fill(loaded.maps)
                workloads.take_over()
                assert len(site.in_app(lambda: dial(VIP_V4))) == 64
                loaded.maps.services.delete((capture.packed16(VIP_V4), capture.PORT))
                with pytest.raises(ConnectionRefusedError):
                    site.in_app(lambda: dial(VIP_V4))

    def test_no_connection_notices(self, old, old_pins, pins, site, tmp_path, monkeypatch):
        monkeypatch.setattr(maps, "CHANGED", {"services": layout.SCHEMA, "settings": layout.SCHEMA})
        done, switched = tmp_path / "done", tmp_path / "switched"

        def dial_on() -> tuple[int, int]:
            captured = refused = 0
            while not done.exists():
                captured += len(dial(VIP_V4)) == 64
                try:
                    dial(UNKNOWN_V4)
                except ConnectionRefusedError:
                    refused += 1
            return captured, refused

        def upgrade() -> None:
            time.sleep(0.2)
            with self.successor(old_pins, pins) as loaded:
                workloads = Workloads(loaded, pins / "links", [old_pins / "links"])
                workloads.adopt()
                time.sleep(0.1)
                # Not capture.fill(), which empties the ranges first: they are carried over, and in force.
                loaded.maps.services.put((capture.packed16(VIP_V4), capture.PORT), capture.SERVICE, 1)
                loaded.maps.settings.write(Settings(1, whole=True))
                workloads.take_over()
                switched.touch()
                time.sleep(0.2)
            done.touch()

        with site.uproxy(), capture.background(site.netns, None, upgrade, lambda: None):
            captured, refused = site.in_app(dial_on)
        assert switched.exists()
        assert captured == refused > 50

    def test_goes_on_where_one_was_killed_half_way(self, old, old_pins, pins, site, monkeypatch):
        def killed(self, program) -> None:
            if program.name == "bind4":
                raise KeyboardInterrupt
            real(self, program)

        real = Link.update
        with monkeypatch.context() as patched, self.successor(old_pins, pins) as loaded:
            patched.setattr(Link, "update", killed)
            workloads = Workloads(loaded, pins / "links", [old_pins / "links"])
            workloads.adopt()
            with pytest.raises(KeyboardInterrupt):
                workloads.take_over()
        assert is_captured(site)
        with self.successor(old_pins, pins) as loaded:
            workloads = Workloads(loaded, pins / "links", [old_pins / "links"])
            workloads.adopt()
            workloads.take_over()
            assert links(pins) == {"web": set(HOOKS)}
            assert not old_pins.exists()
            assert is_captured(site)
            with site.uproxy():
                assert len(site.in_app(lambda: dial(VIP_V4))) == 64

    def test_leaves_what_it_cannot_take_over_captured_and_says_so(self, old, old_pins, pins, site, monkeypatch):
        def broken(self, program) -> None:
            raise BpfError(22, "replace the program: Invalid argument")

        with self.successor(old_pins, pins) as loaded:
            workloads = Workloads(loaded, pins / "links", [old_pins / "links"])
            workloads.adopt()
            with monkeypatch.context() as patched:
                patched.setattr(Link, "update", broken)
                workloads.take_over()
            (problem,) = workloads.problems()
            assert "workload web: keeps programs of the last agent: " in problem
            assert is_captured(site)
            assert workloads.captured() == ()
            workloads.take_over()
            assert workloads.problems() == []
            assert links(pins) == {"web": set(HOOKS)}

    def test_refuses_when_the_addresses_cannot_be_carried_over(self, old, old_pins, pins, site, monkeypatch):
        monkeypatch.setattr(maps, "CHANGED", {"own": layout.SCHEMA})
        with self.successor(old_pins, pins) as loaded:
            workloads = Workloads(loaded, pins / "links", [old_pins / "links"])
            with pytest.raises(LoadError, match=r"workloads run with the programs of an earlier version.*--remove"):
                workloads.adopt()
        assert links(old_pins) == {"web": set(HOOKS)}
        assert is_captured(site)

    def test_drops_what_died_meanwhile(self, old, old_pins, pins, site):
        site.app.rmdir()
        with self.successor(old_pins, pins) as loaded:
            workloads = Workloads(loaded, pins / "links", [old_pins / "links"])
            workloads.adopt()
            workloads.take_over()
            assert workloads.captured() == ()
            assert not old_pins.exists()


def test_hooks_that_a_version_adds_and_drops_are_attached_and_detached(workloads, registration, site, pins, loader):
    workloads.register(registration)
    directory = pins / "links" / "web"
    for hook in ("bind6", "sockops_proxy"):
        (directory / hook).unlink()
    (directory / "connect4").rename(directory / "dropped")
    again = Workloads(loader, pins / "links")
    with loader.program("connect4").attach_cgroup(registration.app.fd) as link:
        link.pin(directory / "connect4")
    again.adopt()
    assert links(pins) == {"web": set(HOOKS)}
    assert again.problems() == []
    with site.uproxy():
        assert len(site.in_app(lambda: dial(VIP_V4))) == 64


def test_without_any_agent_everything_stays_enforced(registration, site, pins):
    with Loader(pins / "maps") as loader:
        capture.fill(loader.maps)
        Workloads(loader, pins / "links").register(registration)
    with site.uproxy(), site.outside():
        assert len(site.in_app(lambda: dial(VIP_V4))) == 64
        assert site.in_app(lambda: dial(OUTSIDE_V4)) == b"outside"
        with pytest.raises(ConnectionRefusedError):
            site.in_app(lambda: dial(UNKNOWN_V4))
