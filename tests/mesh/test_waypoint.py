"""A mesh with a waypoint: who the application is told called, and what flips and a kill do to requests."""

from __future__ import annotations

import json
import random
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass

import pytest

from benchmarks.lab import shop
from benchmarks.lab.apps import commands
from benchmarks.lab.control import ControlPlane
from benchmarks.lab.evidence import HBONE_PORT
from benchmarks.lab.shop import REVIEWS, Shop
from benchmarks.lab.topology import MESH_RANGES, Lab, Workload
from benchmarks.lab.waypoints import Waypoint
from control.api.identity import SpiffeId
from tests.support import inside
from tests.support.hand_tunnel import HandTunnel

_CALLERS, _TURNS = 50, 60
_FLIPS = 20
_KEPT_FLIPS = 6
_PER_S = 50
_ONLY_CALLERS = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-callers, namespace: default}
spec:
  selector: {matchLabels: {app: reviews}}
  action: ALLOW
  rules: [{from: [{source: {principals: ["lab.test/ns/default/sa/caller-*"]}}]}]
"""
_NO_DELETE = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-delete, namespace: default}
spec:
  targetRefs: [{kind: Service, name: reviews}]
  action: DENY
  rules: [{to: [{operation: {methods: [DELETE]}}]}]
"""
_SECOND = """\
apiVersion: v1
kind: Service
metadata: {name: reviews-second, namespace: default}
spec: {selector: {app: reviews, version: v2}, ports: [{name: http, port: 80, targetPort: http}]}
"""
_TO_SECOND = """\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: to-second, namespace: default}
spec:
  parentRefs: [{kind: Service, group: "", name: reviews, port: 9080}]
  rules: [{backendRefs: [{name: reviews-second, port: 80}]}]
"""
# Everybody may call: what is under test here is the way, not policy.
_OPEN = shop.RESOURCES.split("---\napiVersion: security")[0]


@dataclass(frozen=True, slots=True)
class Bound:
    lab: Lab
    control: ControlPlane
    shop: Shop
    waypoint: Waypoint
    redirected: Workload
    """A caller that nftables captures."""

    def flip(self, *, bound: bool) -> None:
        """Returns when `meshctl label --wait` does."""
        change = f"istio.io/use-waypoint={self.waypoint.gateway}" if bound else "istio.io/use-waypoint-"
        self.control.meshctl("label", "service", "reviews", change, "--overwrite", "--wait")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Bound]:
    with Lab(control=True) as lab:
        assert lab.control is not None
        the_shop = shop.declare(lab)
        launch = ("--capture", "nft", "--mesh-cidr", *MESH_RANGES)
        redirected = the_shop.a.workload("redirected", commands.client(), launch=launch)
        lab.configure(_OPEN)
        lab.start()
        waypoint = Waypoint(lab.control, the_shop.b, "wp")
        waypoint.apply()
        waypoint.start()
        yield Bound(lab, lab.control, the_shop, waypoint, redirected)


def test_flips_under_load_fail_no_request_and_leave_none_on_the_wrong_way(
    mesh: Bound, record_property: Callable[[str, object], None]
) -> None:
    took = _flipped_under_load(mesh, mesh.shop.web, _FLIPS)
    record_property("label_to_settled_s", {"p50": statistics.median(took), "longest": took[-1]})


def test_flips_under_load_are_the_same_for_a_caller_whose_kernel_knows_no_route(mesh: Bound) -> None:
    """Captured by nftables: the uProxy alone decides between direct and through the waypoint."""
    _flipped_under_load(mesh, mesh.redirected, _FLIPS // 3)


def _flipped_under_load(mesh: Bound, caller: Workload, flips: int) -> list[float]:
    """How long each flip took, in order. No request fails meanwhile, and each goes the way of its time."""
    through = f"URI={caller.identity}"
    phases: list[tuple[float, float, str]] = []  # since when, how long the flip took, and what the application is told
    caller.job(job="open-loop", host=REVIEWS[0], port=REVIEWS[1], per_s=_PER_S)
    for flip in range(flips):
        began = time.monotonic()
        mesh.flip(bound=flip % 2 == 0)
        since = time.monotonic()
        phases.append((since, since - began, through if flip % 2 == 0 else ""))
        time.sleep(0.3)
        phases.append((time.monotonic(), 0, "either"))
    requests = caller.job(job="open-loop-end")["requests"]
    assert not [failure for *_, failure in requests if failure]
    assert len(requests) > flips * 0.3 * _PER_S
    looked_at = 0
    for (since, _, expected), (until, _, _) in zip(phases[::2], phases[1::2], strict=True):
        told = {said for began, ended, said, _ in requests if since < began and ended < until}
        assert told <= {expected}
        looked_at += bool(told)
    assert looked_at > flips / 2
    return sorted(seconds for _, seconds, _ in phases[::2])


def test_flips_fail_no_request_on_kept_connections_and_new_ones_go_the_right_way(mesh: Bound) -> None:
    """Kept connections may go the way of before: what was opened directly stays; the waypoint sends its own away."""
    mesh.flip(bound=False)
    web = mesh.shop.web
    through = f"URI={web.identity}"
    web.job(job="kept-alive", host=REVIEWS[0], port=REVIEWS[1], connections=16, pause_s=0.005, turns=20)
    phases: list[tuple[float, float, str]] = []
    for flip in range(_KEPT_FLIPS):
        mesh.flip(bound=flip % 2 == 0)
        since = time.monotonic()
        time.sleep(0.5)
        phases.append((since, time.monotonic(), through if flip % 2 == 0 else ""))
    requests = web.job(job="kept-alive-end")["requests"]
    assert not [failure for *_, failure, _ in requests if failure]
    kept = {opened for _, _, _, _, opened in requests}
    assert len(requests) > 10 * len(kept), "connections were kept"
    looked_at = 0
    for since, until, caller in phases:
        told = {said for _, ended, said, _, opened in requests if since < opened and ended < until}
        assert told <= {caller}
        looked_at += bool(told)
    assert looked_at > _KEPT_FLIPS / 2


def test_a_kept_connection_from_before_the_flip_ends_when_a_policy_is_missed_on_it(mesh: Bound) -> None:
    mesh.flip(bound=False)
    web = mesh.shop.web
    # It pauses for longer than the moment in which a connection may be ended.
    web.job(job="kept-alive", host=REVIEWS[0], port=REVIEWS[1], connections=2, pause_s=2.5, turns=1000)
    time.sleep(1)
    mesh.flip(bound=True)
    flipped = time.monotonic()
    time.sleep(6)
    mesh.control.apply(_NO_DELETE)
    try:
        guarded = time.monotonic()
        time.sleep(8)
        requests = web.job(job="kept-alive-end")["requests"]
    finally:
        mesh.control.meshctl("delete", "policy", "no-delete")
    assert not [failure for *_, failure, _ in requests if failure]
    before = [(said, opened) for began, _, said, _, opened in requests if flipped < began < guarded]
    assert before
    assert all(said == "" and opened < flipped for said, opened in before), "without a policy it stays"
    last = [(said, opened) for began, _, said, _, opened in requests if began > guarded + 5]
    assert last
    assert all(said == f"URI={web.identity}" and opened > guarded for said, opened in last)


def test_a_route_to_a_service_that_is_new_to_the_waypoint_fails_no_request(mesh: Bound) -> None:
    mesh.flip(bound=True)
    web = mesh.shop.web
    mesh.control.apply(_SECOND)
    web.job(job="kept-alive", host=REVIEWS[0], port=REVIEWS[1], connections=8, pause_s=0.0, turns=1000)
    try:
        for _ in range(5):
            mesh.control.apply(_TO_SECOND)
            inside.eventually(lambda: _versions(mesh) == {"v2"})
            mesh.control.meshctl("delete", "httproute", "to-second")
            inside.eventually(lambda: _versions(mesh) == {"v1", "v2"})
        requests = web.job(job="kept-alive-end")["requests"]
    finally:
        mesh.control.meshctl("delete", "service", "reviews-second")
    assert len(requests) > 100
    assert not [failure for *_, failure, _ in requests if failure]


def _versions(mesh: Bound) -> set[str]:
    """Who answers, of ten times."""
    answers = (mesh.shop.web.job(job="http", host=REVIEWS[0], port=REVIEWS[1]) for _ in range(10))
    return {json.loads(answer["body"])["version"] for answer in answers}


def test_every_request_arrives_with_its_own_caller(mesh: Bound) -> None:
    """50 identities, each on a connection of its own that stays; many requests under way at once, in random order.

    Between them comes one that the workloads' policy does not let in: it must not get through on another's stream.
    """
    mesh.flip(bound=True)
    pick = random.Random(7)
    with ExitStack() as stack:
        callers: dict[str, HandTunnel] = {}
        for number in range(_CALLERS):
            name = f"caller-{number}"
            callers[f"spiffe://lab.test/ns/default/sa/{name}"] = stack.enter_context(closing(_tunnel(mesh, name)))
        mesh.control.apply(_ONLY_CALLERS)
        stack.callback(mesh.control.meshctl, "delete", "policy", "only-callers")
        inside.eventually(lambda: not any(_is_let_in(mesh, "stranger") for _ in range(6)))
        for turn in range(_TURNS):
            some = pick.sample(sorted(callers), 10)
            for identity in some:
                callers[identity].send(f"/{turn}/{identity.rpartition('/')[2]}")
            pick.shuffle(some)
            for identity in some:
                status, body = callers[identity].receive()
                assert status == 200, body
                answer = json.loads(body)
                assert answer["caller"] == f"URI={identity}"
                assert answer["path"] == f"/{turn}/{identity.rpartition('/')[2]}"
            assert not _is_let_in(mesh, "stranger")


def _tunnel(mesh: Bound, name: str) -> HandTunnel:
    """Through the waypoint to reviews, with the identity of that service account."""
    directory = mesh.lab.directory / "callers" / name
    if not directory.exists():
        mesh.lab.issue(SpiffeId.parse(f"spiffe://lab.test/ns/default/sa/{name}"), directory)
    with mesh.shop.a.entered():
        made = socket.create_connection((mesh.waypoint.address, HBONE_PORT), timeout=10)
    return HandTunnel(made, directory, f"{REVIEWS[0]}:{REVIEWS[1]}")


def _is_let_in(mesh: Bound, name: str) -> bool:
    with closing(_tunnel(mesh, name)) as tunnel:
        tunnel.send("/")
        return tunnel.receive()[0] == 200


def test_killed_waypoint_refuses_its_service_and_nobody_else(mesh: Bound) -> None:
    mesh.flip(bound=True)
    web = mesh.shop.web
    mesh.waypoint.kill()
    for _ in range(5):
        assert web.job(job="http", host=REVIEWS[0], port=REVIEWS[1])["error"] in (
            "ConnectionResetError",
            "ConnectionRefusedError",
        )
    assert web.job(job="redis", host=shop.DB[0], port=shop.DB[1], command=["PING"])["reply"] == "+PONG"
    mesh.waypoint.start()
    assert web.job(job="http", host=REVIEWS[0], port=REVIEWS[1])["status"] == 200
