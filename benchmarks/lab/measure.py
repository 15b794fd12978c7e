"""What the mesh costs: Redis PINGs from one host to the other, as plain TCP and through the mTLS tunnel."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.lab.apps import commands
from benchmarks.lab.shop import DB, Shop
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Lab, Workload

ROUNDS = 5
_PINGS = 800
CONNECTIONS = 16
_LOOP_S = 0.8


@dataclass(frozen=True, slots=True)
class PathCost:
    """What one way between the same two hosts costs."""

    path: str
    p50_us: float
    p99_us: float
    requests_per_s: float


def measure(lab: Lab, the_shop: Shop) -> list[PathCost]:
    """Redis PINGs from web's namespace to host b: plain TCP to a twin of db, and through the mesh; interleaved."""
    twin = the_shop.b.twin("db-twin")
    data = lab.directory / "data" / twin.workload
    data.mkdir()
    redis = commands.redis()
    lab.spawn(redis.argv(twin.addresses[0], data), twin.netns_path, stdout=subprocess.DEVNULL)
    plain = _PlainClient(lab, the_shop.web)
    targets: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, int]]] = {
        "plain TCP": (plain.job, (twin.addresses[0], DB[1])),
        "mTLS tunnel": (the_shop.web.job, DB),
    }
    _await_redis(plain, twin.addresses[0])
    times: dict[str, list[float]] = {path: [] for path in targets}
    rates: dict[str, list[float]] = {path: [] for path in targets}
    for turn in range(ROUNDS):
        # Each path goes first in every other round, so that a drift of the machine favours neither.
        for path, (job, (host, port)) in list(targets.items())[:: 1 if turn % 2 else -1]:
            answered = job(job="pings", host=host, port=port, count=_PINGS)
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


def _await_redis(client: _PlainClient, host: str) -> None:
    deadline = time.monotonic() + 5
    while "reply" not in (answer := client.job(job="redis", host=host, port=DB[1], command=["PING"])):
        if time.monotonic() > deadline:
            raise LabError(f"the twin of db does not answer: {answer}")
        time.sleep(0.02)
