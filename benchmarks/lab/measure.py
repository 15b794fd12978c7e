"""What the mesh costs: HTTP between two hosts, as plain TCP, through the mTLS tunnel, and through a waypoint."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.lab.apps import commands
from benchmarks.lab.control import ControlPlane
from benchmarks.lab.shop import REVIEWS, Shop
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Lab, Workload
from benchmarks.lab.waypoints import Waypoint

ROUNDS = 5
_REQUESTS = 400
CONNECTIONS = 16
_LOOP_S = 0.8
_PATIENCE_S = 10.0
_DIRECT, _ROUTED = ("240.240.0.40", REVIEWS[1]), ("240.240.0.41", REVIEWS[1])


@dataclass(frozen=True, slots=True)
class PathCost:
    """What one way between the same two hosts costs."""

    path: str
    p50_us: float
    p99_us: float
    requests_per_s: float


def _services(gateway: str) -> str:
    """Two services with one endpoint, reviews v1 on host b; the binding of one is optional, so that both ways stand."""
    return "---\n".join(
        f"""\
apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: default
{metadata}spec:
  clusterIP: {vip[0]}
  selector: {{app: reviews, version: v1}}
  ports: [{{name: http, port: {vip[1]}, targetPort: http}}]
"""
        for name, vip, metadata in (
            ("measured", _DIRECT, ""),
            (
                "measured-routed",
                _ROUTED,
                f"  labels: {{istio.io/use-waypoint: {gateway}}}\n"
                "  annotations: {mesh.uproxy.dev/waypoint-binding: optional}\n",
            ),
        )
    )


def measure(lab: Lab, control: ControlPlane, the_shop: Shop, waypoint: Waypoint) -> list[PathCost]:
    """HTTP from web's namespace to host b: plain TCP to a twin of reviews v1, and two ways through the mesh, in turn.

    Raises LabError.
    """
    twin = the_shop.b.twin("reviews-twin")
    data = lab.directory / "data" / twin.workload
    data.mkdir()
    lab.spawn(commands.nginx("v1").argv(twin.addresses[0], data), twin.netns_path, stdout=subprocess.DEVNULL)
    control.apply(_services(waypoint.gateway))
    plain, web = _PlainClient(lab, the_shop.web), the_shop.web
    targets: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, int]]] = {
        "plain TCP": (plain.job, (twin.addresses[0], REVIEWS[1])),
        "mTLS tunnel": (web.job, _DIRECT),
        "waypoint, HTTP": (web.job, _ROUTED),
    }
    expected = {"plain TCP": "", "mTLS tunnel": "", "waypoint, HTTP": f"URI={web.identity}"}
    for path, (job, target) in targets.items():
        _await(job, target, expected[path])
    times: dict[str, list[float]] = {path: [] for path in targets}
    rates: dict[str, list[float]] = {path: [] for path in targets}
    for turn in range(ROUNDS):
        # Each path goes first in every other round, so that a drift of the machine favours neither.
        for path, (job, (host, port)) in list(targets.items())[:: 1 if turn % 2 else -1]:
            answered = job(job="round-trips", host=host, port=port, count=_REQUESTS)
            looped = job(job="closed-loop", host=host, port=port, connections=CONNECTIONS, seconds=_LOOP_S)
            if "us" not in answered or "requests" not in looped:
                raise LabError(f"measuring {path}: {answered if 'us' not in answered else looped}")
            times[path] += answered["us"]
            rates[path].append(looped["requests"] / looped["seconds"])
    return [_cost(path, times[path], rates[path]) for path in targets]


def _cost(path: str, times_us: list[float], rates: list[float]) -> PathCost:
    ordered = sorted(times_us)
    p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    return PathCost(path, round(p50, 1), round(p99, 1), round(sorted(rates)[len(rates) // 2]))


class _PlainClient:
    """The client in web's namespace, and not in its app cgroup: nothing captures it."""

    def __init__(self, lab: Lab, web: Workload) -> None:
        argv = commands.client().argv(web.address, web.data)
        self._process = lab.spawn(argv, web.box.netns_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def job(self, **job: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def _await(job: Callable[..., dict[str, Any]], target: tuple[str, int], caller: str) -> None:
    """Until the application answers there, and was told this of its caller: which tells the ways apart."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        answer = job(job="http", host=target[0], port=target[1])
        if answer.get("status") == 200 and json.loads(answer["body"])["caller"] == caller:
            return
        if time.monotonic() > deadline:
            raise LabError(f"{target[0]}:{target[1]} answers {answer}, where the caller should be {caller!r}")
        time.sleep(0.02)
