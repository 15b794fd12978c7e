"""Applications see of a connection what they would see over plain TCP, whatever is between them.

Each scenario of tests/support/torture.py runs over plain TCP between two namespaces on the same links, and over each
way of the mesh: both programs must have seen the same. `make soak` moves more than 10 GB that way, under checksums.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable

import pytest

from benchmarks.lab.topology import entered
from tests.mesh.conftest import NEAR_PEER, PEER, PEER_V6, Mesh
from tests.support import inside, torture
from tests.support.torture import SCENARIOS, Scenario, Seen, Way

_VOLUME = 1_500_000
_SOAK_VOLUME = 400_000_000
_SOAK_BYTES = 10_000_000_000
_PLAIN_PORT = 9000


@pytest.fixture(scope="module")
def plain(mesh: Mesh) -> Way:
    """Between twins of the caller's and the peer's place, outside of the mesh."""
    here, there = mesh.shop.a.twin("plain-caller"), mesh.shop.b.twin("plain-peer")
    (address,) = there.addresses

    def listen() -> socket.socket:
        with entered(there.netns_path):
            return socket.create_server((address, _PLAIN_PORT))

    def dial() -> tuple[socket.socket, tuple[str, int]]:
        with entered(here.netns_path):
            return socket.socket(), (address, _PLAIN_PORT)

    return Way("plain", listen, dial)


@pytest.fixture(scope="module")
def plainly(plain: Way) -> Callable[[Scenario, int], Seen]:
    """What a scenario looks like over plain TCP."""

    @functools.cache
    def seen(name: str, volume: int) -> Seen:
        return torture.play(SCENARIOS[name], plain, volume)

    return lambda scenario, volume: seen(scenario.name, volume)


def _tunnel(mesh: Mesh) -> Way:
    return Way(
        "tunnel", lambda: inside.listen(mesh.peer, PEER[1]), lambda: (mesh.caller.sockets(1, socket.AF_INET)[0], PEER)
    )


def _tunnel_v6(mesh: Mesh) -> Way:
    return Way(
        "tunnel-v6",
        lambda: inside.listen(mesh.peer6, PEER_V6[1]),
        lambda: (mesh.caller6.sockets(1, socket.AF_INET6)[0], PEER_V6),
    )


def _direct(mesh: Mesh) -> Way:
    with inside.serving(mesh.near_peer, NEAR_PEER[1], inside.echo):
        inside.eventually(lambda: inside.goes_direct(mesh.shop.a, mesh.near_caller, NEAR_PEER), 40)
    return Way(
        "direct",
        lambda: inside.listen(mesh.near_peer, NEAR_PEER[1]),
        lambda: (mesh.near_caller.sockets(1, socket.AF_INET)[0], NEAR_PEER),
    )


WAYS = {"tunnel": _tunnel, "tunnel-v6": _tunnel_v6, "direct": _direct}


def play(scenario: Scenario, way: Way, volume: int, mesh: Mesh) -> Seen:
    """What the programs saw, over this way and no other."""
    before = inside.dialled_direct(mesh.shop.a)
    seen = torture.play(scenario, way, volume)
    assert inside.dialled_direct(mesh.shop.a) - before == (way.name == "direct")
    return seen


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, mesh: Mesh) -> Way:
    made: Way = WAYS[request.param](mesh)
    return made


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_applications_see_what_they_see_over_plain_tcp(
    scenario: Scenario, way: Way, plainly: Callable[[Scenario, int], Seen], mesh: Mesh
) -> None:
    assert play(scenario, way, _VOLUME, mesh) == plainly(scenario, _VOLUME)


def test_the_programs_send_and_receive_the_same_bytes(plainly: Callable[[Scenario, int], Seen]) -> None:
    """Equal to plain TCP would be worth little if plain TCP's programs saw nothing."""
    seen = plainly(SCENARIOS["full-duplex-threads"], _VOLUME)
    assert seen["client: received"] == (_VOLUME, seen["server: sent"])
    assert seen["server: received"] == (_VOLUME, seen["client: sent"])
    assert seen["client: sent"] != seen["server: sent"]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_gigabytes_arrive_as_they_were_sent(mesh: Mesh, plainly: Callable[[Scenario, int], Seen]) -> None:
    moved = 0
    while moved < _SOAK_BYTES:
        for make in WAYS.values():
            for scenario in SCENARIOS.values():
                seen = play(scenario, make(mesh), _SOAK_VOLUME, mesh)
                assert seen == plainly(scenario, _SOAK_VOLUME), scenario.name
                moved += torture.bytes_of(seen)
    print(f"{moved / 1e9:.1f} GB received and digested")


def test_nothing_stays_behind(mesh: Mesh) -> None:
    for workload in (mesh.caller, mesh.peer, mesh.caller6, mesh.peer6, mesh.near_caller, mesh.near_peer):
        inside.eventually(lambda workload=workload: inside.metric(workload, "uproxy_tasks") == 0, 30)
