"""Which waypoint processes a node's agent takes from the configuration to be its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api import index, messages, topics
from control.api.address import IpAddress
from control.api.identity import make_id, parse_trust_domain
from control.api.index import AddressShard, Placed, ResidentWorkload
from control.api.messages import Envelope
from control.client.membership import Membership
from control.client.state import State
from uproxy import cgroup, sandbox
from uproxy.claims import FIRST_WAYPOINT_UID
from uproxy.node.waypoints import Declared, Settings, Wanted, Waypoints, next_pause_s, remove_all

DOMAIN = parse_trust_domain("cluster.local")
WP = make_id(DOMAIN, "shop", "wp")
FIRST, SECOND, OTHER = IpAddress("10.0.0.1"), IpAddress("fd00::1"), IpAddress("10.0.0.2")


def process(name: str, placed: Placed | None, account: str = "wp") -> ResidentWorkload:
    return ResidentWorkload("shop", name, account, {}, placed=placed)


HERE, THERE = process("wp-a", Placed("wp", "a")), process("wp-b", Placed("wp", "b"))


class Mesh:
    """A state whose addresses change."""

    def __init__(self) -> None:
        self.state = State(DOMAIN)
        self._version = 0

    def say(self, residents: dict[IpAddress, ResidentWorkload]) -> frozenset[IpAddress]:
        """All addresses of the mesh from now on; those that changed."""
        self._version += 1
        batch = []
        shards = index.shard_addresses(residents)
        for number in range(topics.ADDRESS_SHARDS):
            topic = topics.format_topic(DOMAIN, topics.AddressesTopic(number))
            body = index.write(shards.get(number, AddressShard({})))
            batch.append((topic, messages.encode(Envelope(1, self._version, 0, body))))
        return self.state.apply(batch).addresses


def test_what_is_placed_on_this_node_is_wanted_with_all_its_addresses():
    mesh, declared = Mesh(), Declared("a")
    mesh.say({SECOND: HERE, FIRST: HERE, OTHER: THERE})
    assert declared.take(mesh.state, None) == {"shop.wp-a": Wanted(WP, "wp-a", (FIRST, SECOND), "wp")}
    changed = mesh.say({FIRST: HERE, OTHER: process("web-1", None, "web")})
    assert declared.take(mesh.state, changed) == {"shop.wp-a": Wanted(WP, "wp-a", (FIRST,), "wp")}
    assert declared.take(mesh.state, mesh.say({})) == {}


_residents = st.dictionaries(
    st.sampled_from([FIRST, SECOND, OTHER]),
    st.sampled_from([HERE, THERE, process("wp-a", None), process("wp-a", Placed("wp-2", "a")), process("x", None)]),
)


@given(st.lists(_residents, min_size=1, max_size=4))
def test_taking_changes_one_after_the_other_is_taking_all_at_once(said):
    mesh, declared = Mesh(), Declared("a")
    declared.take(mesh.state, None)
    for residents in said:
        found = declared.take(mesh.state, mesh.say(residents))
        assert found == Declared("a").take(mesh.state, None)


def test_an_identity_of_another_account_name_or_address_is_not_its_own():
    wanted = Wanted(WP, "wp-a", (FIRST, SECOND), "wp")
    door = {"control": "https://c:15012", "brokers": ("mqtts://c:8883",)}
    assert wanted.is_member(Membership(WP, "wp-a", (SECOND, FIRST), **door))
    for identity, name, addresses in (
        (make_id(DOMAIN, "shop", "web"), "wp-a", (FIRST, SECOND)),
        (WP, "wp-b", (FIRST, SECOND)),
        (WP, "wp-a", (FIRST,)),
    ):
        assert not wanted.is_member(Membership(identity, name, addresses, **door))


def test_a_place_is_not_removed_while_it_is_still_being_made(tmp_path, monkeypatch):
    making, go_on, removed_again = threading.Event(), threading.Event(), threading.Event()
    done: list[str] = []

    def make(box):
        making.set()
        assert go_on.wait(60)
        done.append("made")

    def remove(box):
        done.append("removed")
        if len(done) > 1:
            removed_again.set()

    monkeypatch.setattr(sandbox, "build", make)
    monkeypatch.setattr(sandbox, "forwarding_gaps", lambda addresses: [])
    monkeypatch.setattr(sandbox, "remove", remove)
    settings = Settings(tmp_path / "ids", cgroup.mount_point() / "uproxy-none", tmp_path / "agent", None)
    settings.directory.mkdir()
    mesh = Mesh()

    async def main() -> None:
        waypoints = Waypoints(settings, "a")
        waypoints.take(mesh.state, mesh.say({FIRST: HERE}))
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            running = group.create_task(waypoints.run())
            assert await asyncio.to_thread(making.wait, 10)
            waypoints.take(mesh.state, mesh.say({}))
            await asyncio.sleep(0.1)  # in which it would be removed
            go_on.set()
            assert await asyncio.to_thread(removed_again.wait, 10)
            running.cancel()

    try:
        asyncio.run(main())
    finally:
        go_on.set()
    assert done == ["removed", "made", "removed"]


def test_what_dies_at_once_is_started_ever_later_and_what_lived_at_once():
    pauses = [0.0]
    for _ in range(10):
        pauses.append(next_pause_s(pauses[-1], lived_s=1.0))
    assert pauses[1:] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]
    assert next_pause_s(30.0, lived_s=10.0) == 0.2


@pytest.mark.root
def test_all_places_are_removed_and_nothing_else_that_is_beside_them(tmp_path):
    root = cgroup.mount_point() / f"uproxy-test-{os.getpid()}"
    settings = Settings(tmp_path, root, tmp_path / "agent", None)
    inside = root / "shop.wp-a" / "proxy"
    inside.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as process:
        (inside / "cgroup.procs").write_text(str(process.pid))
        without_cgroup, by_hand = tmp_path / "shop.wp-b", tmp_path / "wp-1"
        for directory, owner in ((without_cgroup, FIRST_WAYPOINT_UID), (by_hand, 0)):
            directory.mkdir()
            (directory / "key.pem").touch()
            os.chown(directory, owner, owner)
        try:
            remove_all(settings)
            assert process.wait(60) == -signal.SIGKILL
            assert not (root / "shop.wp-a").exists()
            assert list(tmp_path.iterdir()) == [by_hand]
        finally:
            process.kill()
            cgroup.remove(root)
