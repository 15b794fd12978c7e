"""Waypoints with a process on each of two hosts: which one a call takes, and whom a workload believes."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.lab import shop
from benchmarks.lab.control import ControlPlane
from benchmarks.lab.evidence import HBONE_PORT
from benchmarks.lab.shop import REVIEWS, Shop
from benchmarks.lab.topology import Lab, Workload
from benchmarks.lab.waypoints import Waypoint
from control.api.identity import SpiffeId
from tests.support import inside
from tests.support.hand_tunnel import HandTunnel
from tests.support.shop_calls import versions

# Everybody may call: what is under test here is the way, not policy.
_OPEN = shop.RESOURCES.split("---\napiVersion: security")[0]
_PER_S = 30
_REVIEWS = SpiffeId.parse("spiffe://lab.test/ns/default/sa/reviews")


@dataclass(frozen=True, slots=True)
class Placed:
    lab: Lab
    control: ControlPlane
    shop: Shop
    nodes: tuple[Waypoint, Waypoint]
    """Of one Gateway, on host a and host b."""
    accounts: tuple[Waypoint, Waypoint]
    """Likewise, for the service account reviews."""
    envoys: tuple[Waypoint, Waypoint]
    """As `nodes`, with Envoy as the engine."""

    def bind(self, waypoint: Waypoint) -> None:
        """As `bind_to`."""
        self.bind_to(waypoint.gateway)

    def bind_to(self, gateway: str) -> None:
        """Returns when `meshctl label --wait` does. The other is released first: moving from one to the other takes
        five minutes, in which both are let in.
        """
        self.control.meshctl("label", "service", "reviews", "istio.io/use-waypoint-", "--wait")
        self.control.meshctl("label", "service", "reviews", f"istio.io/use-waypoint={gateway}", "--wait")

    def call(self, times: int) -> Counter[str]:
        return versions(self.shop, times)

    def enter(self, workload: Workload, waypoint: Waypoint, identity_dir: Path | None = None) -> int:
        """From a waypoint's address, by its identity or another one, straight to a workload: what its uProxy says."""
        with waypoint.entered():
            made = socket.create_connection((workload.address, HBONE_PORT), timeout=30)
        return _status(made, identity_dir or waypoint.state, workload)


def _status(made: socket.socket, identity_dir: Path, workload: Workload) -> int:
    try:
        with closing(HandTunnel(made, identity_dir, f"{workload.address}:{REVIEWS[1]}")):
            return 200
    except AssertionError as refused:
        return int(str(refused).rpartition(" ")[2])


@pytest.fixture(scope="module")
def mesh() -> Iterator[Placed]:
    with Lab(control=True) as lab:
        assert lab.control is not None
        the_shop = shop.declare(lab)
        lab.configure(_OPEN)
        lab.start()
        nodes = Waypoint(lab.control, the_shop.a, "nodes"), Waypoint(lab.control, the_shop.b, "nodes")
        of_account = {"account": "reviews", "number": 1}
        accounts = (
            Waypoint(lab.control, the_shop.a, "accounts", **of_account),
            Waypoint(lab.control, the_shop.b, "accounts", **of_account),
        )
        for one in nodes:
            one.apply("--placement", "node")
        for one in accounts:
            one.apply("--placement", "service-account")
        envoys = (
            Waypoint(lab.control, the_shop.a, "envoys", number=2),
            Waypoint(lab.control, the_shop.b, "envoys", number=2),
        )
        for one in envoys:
            one.apply("--placement", "node")
        lab.control.meshctl("annotate", "gateway", "envoys", "mesh.uproxy.dev/engine=envoy")
        lab.control.meshctl("waypoint", "apply", "beside", "--placement", "sidecar")
        for one in (*nodes, *accounts, *envoys):
            one.launch()
        for one in (*nodes, *accounts, *envoys):
            one.await_ready()
        yield Placed(lab, lab.control, the_shop, nodes, accounts, envoys)


def _served(waypoint: Waypoint) -> Counter[str]:
    """The addresses of the workloads that its requests went to."""
    return Counter(line["upstream_host"].rpartition(":")[0] for line in waypoint.access_log())


@pytest.mark.parametrize("placement", ["nodes", "accounts", "envoys"])
def test_a_call_takes_the_process_before_the_endpoint_that_it_is_for(mesh: Placed, placement: str) -> None:
    on_a, on_b = getattr(mesh, placement)
    mesh.bind(on_a)
    answered = mesh.call(24)
    assert set(answered) == {"v1", "v2"}, "both hosts' endpoints are called"
    # What a line says may be read a moment after its answer.
    inside.eventually(lambda: _served(on_a) == {mesh.shop.reviews_v2.address: answered["v2"]})
    inside.eventually(lambda: _served(on_b) == {mesh.shop.reviews_v1.address: answered["v1"]})


@pytest.mark.parametrize("placement", ["nodes", "accounts", "envoys"])
def test_a_workload_lets_in_its_own_nodes_process_and_no_other(mesh: Placed, placement: str) -> None:
    on_a, on_b = getattr(mesh, placement)
    mesh.bind(on_a)
    assert mesh.enter(mesh.shop.reviews_v2, on_a) == 200
    assert mesh.enter(mesh.shop.reviews_v1, on_b) == 200
    assert mesh.enter(mesh.shop.reviews_v1, on_a) == 401, "the same Gateway's, of another node"
    assert mesh.enter(mesh.shop.reviews_v2, on_b) == 401


def test_a_fellow_of_a_service_account_is_not_its_waypoint(mesh: Placed) -> None:
    on_a, _ = mesh.accounts
    mesh.bind(on_a)
    fellow = mesh.lab.directory / "callers" / "fellow"
    mesh.lab.issue(_REVIEWS, fellow)
    assert mesh.enter(mesh.shop.reviews_v2, on_a, fellow) == 200, "at the process' address it is what the process is"
    with mesh.shop.a.entered():
        made = socket.create_connection((mesh.shop.reviews_v2.address, HBONE_PORT), timeout=30)
    assert _status(made, fellow, mesh.shop.reviews_v2) == 401


def test_a_dead_process_takes_its_own_node_out_and_nobody_elses_calls(mesh: Placed) -> None:
    on_a, on_b = mesh.nodes
    mesh.bind(on_a)
    on_a.kill()
    try:
        assert set(mesh.call(12)) == {"v1"}
    finally:
        on_a.start()
    assert mesh.enter(mesh.shop.reviews_v2, on_b) == 401, "nobody stands in for it"


def test_moving_from_one_placement_to_another_fails_no_request(mesh: Placed) -> None:
    mesh.bind(mesh.nodes[0])
    web = mesh.shop.web
    web.job(job="open-loop", host=REVIEWS[0], port=REVIEWS[1], per_s=_PER_S)
    time.sleep(0.5)
    before = sum(_served(mesh.accounts[0]).values())
    mesh.control.meshctl("label", "service", "reviews", "istio.io/use-waypoint=accounts", "--overwrite", "--wait")
    time.sleep(0.5)
    requests = web.job(job="open-loop-end")["requests"]
    assert len(requests) > _PER_S * 0.8
    assert not [failure for *_, failure in requests if failure]
    assert {said for _, _, said, _ in requests} == {f"URI={web.identity}"}, "through a waypoint, all the time"
    inside.eventually(lambda: sum(_served(mesh.accounts[0]).values()) > before)


def test_beside_each_workload_calls_take_its_own_process_and_no_waypoint(mesh: Placed) -> None:
    mesh.bind_to("beside")
    assert set(mesh.call(24)) == {"v1", "v2"}, "each told that web calls, by a process beside it"
    web = mesh.lab.directory / "callers" / "web"
    mesh.lab.issue(mesh.shop.web.identity, web)
    with mesh.shop.a.entered():
        made = socket.create_connection((mesh.shop.reviews_v2.address, HBONE_PORT), timeout=30)
    assert _status(made, web, mesh.shop.reviews_v2) == 200, "whoever comes by mTLS goes through it, like web itself"


def test_no_request_fails_while_a_waypoint_moves_beside_its_workloads_and_away(mesh: Placed) -> None:
    mesh.bind(mesh.nodes[0])
    web = mesh.shop.web
    web.job(job="open-loop", host=REVIEWS[0], port=REVIEWS[1], per_s=_PER_S)
    for gateway in ("beside", "nodes"):
        time.sleep(0.5)
        mesh.control.meshctl("label", "service", "reviews", f"istio.io/use-waypoint={gateway}", "--overwrite", "--wait")
    time.sleep(0.5)
    requests = web.job(job="open-loop-end")["requests"]
    assert not [failure for *_, failure in requests if failure]
    assert {said for _, _, said, _ in requests} == {f"URI={web.identity}"}, "through one or the other, all the time"
