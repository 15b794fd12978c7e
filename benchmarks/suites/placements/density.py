"""What all that a placement runs takes of memory as the workloads of a host grow, everything charged together.

A host has 30 workloads (crowd.py), of which the first two, ten and all are looked at after their start. Charged are the
proxies with what they have started, the node agent, the kernel's maps, a waypoint elsewhere, the broker and the control
plane. Envoys have their configuration from files here; in a mesh a control plane would tell them, too: ours and its
broker are charged to every placement alike.

uProxies stand twice: each an interpreter of its own, and started by a fork server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks.harness.bench import Bench
from benchmarks.harness.results import Measure, Round, Series
from benchmarks.harness.usage import processor_ns
from benchmarks.lab import forking
from benchmarks.lab.control import ControlPlane
from benchmarks.lab.topology import Host, Lab
from benchmarks.suites.placements import crowd
from benchmarks.suites.placements.crowd import PLACED, accounts
from benchmarks.suites.placements.memory import frames, maps_mb, size_mb, with_children
from benchmarks.suites.placements.mesh import BESIDE, GATEWAY
from benchmarks.suites.placements.standing import map_pins

SIZES: Final = (2, 10, 30)
"""Workloads of a host."""
OWN: Final = "density"
FORKED: Final = "density-forked"
_GROUPS: Final = {
    OWN: "Memory of everything, by workloads of a host",
    FORKED: "Memory of everything with uProxies of a fork server, by workloads of a host",
}
_SETTLED_S: Final = 5.0
"""Until proxies report as seldom as in the long run."""
_REST_S: Final = 4.0

Pages = set[int]
"""Of a process: the numbers of its physical pages."""


@dataclass(frozen=True, slots=True)
class Uproxies:
    """Those of one kind, in the order of their workloads."""

    alone: Sequence[Pages]
    with_beside: Sequence[Pages]
    """The same later, when those that are called have our process beside their workloads: its pages too."""
    shared: Sequence[Pages]
    """Of the node agent, and the fork server where there is one."""


@dataclass(frozen=True, slots=True)
class Found:
    """All that was looked at."""

    sidecars: Sequence[Pages]
    of_accounts: Sequence[Pages]
    of_nodes: Mapping[int, Pages]
    """By how many workloads there are."""
    waypoints: Mapping[str, Sequence[Pages]]
    """Gateway -> its processes; where each called account has one, in their order."""
    uproxies: Mapping[str, Uproxies]
    """OWN and FORKED."""
    maps_mb: float
    """Of the host."""
    control_mb: float
    broker_mb: float


@dataclass(frozen=True, slots=True)
class Charge:
    """What one placement takes."""

    host: Sequence[Pages]
    elsewhere: Sequence[Pages] = field(default=())
    captures: bool = True
    """By the kernel's maps."""


def measure(bench: Bench, suite: str, sizes: Sequence[int] = SIZES) -> float:
    """One round: what processes take after their start hardly differs. Raises LabError.

    Returns the processor time of broker and control plane while nothing changes: us a second.
    """
    with Lab(control=True) as lab:
        found, resting_us = look(lab, bench.progress, sizes)
    add(bench, suite, found, sizes)
    return resting_us


def add(bench: Bench, suite: str, found: Found, sizes: Sequence[int]) -> None:
    """A measure for each size and kind of uProxy, of the placements that this run has."""
    known = {one.name for one in bench.results.subjects}
    for kind, uproxies in found.uproxies.items():
        for size in sizes:
            name = f"{suite}/{kind}/{size}"
            made = Measure(name, suite, _GROUPS[kind], f"{size} workloads", "MB", parameters={"workloads": size})
            bench.results.measures.append(made)
            for subject, charge in charges(found, uproxies, size).items():
                if subject in known and (charge.captures or kind == OWN):
                    details = {
                        "host_mb": size_mb(charge.host) + (found.maps_mb if charge.captures else 0.0),
                        "waypoint_mb": size_mb(charge.elsewhere),
                        "control_plane_mb": found.control_mb,
                        "broker_mb": found.broker_mb,
                    }
                    total = sum(details.values())
                    details["maps_mb"] = found.maps_mb if charge.captures else 0.0
                    bench.results.series.append(Series(name, subject, [Round(1, total, details)]))


def charges(found: Found, uproxies: Uproxies, size: int) -> dict[str, Charge]:
    """By placement."""
    around = [*uproxies.alone[:size], *uproxies.shared]
    of_accounts = found.waypoints["ours-service-account"][: accounts(size) // 2]
    return {
        "sidecar": Charge(found.sidecars[:size], captures=False),
        "node": Charge([found.of_nodes[size]], captures=False),
        "service-account": Charge(found.of_accounts[: accounts(size)], captures=False),
        "remote": Charge(around, found.waypoints[GATEWAY]),
        "remote-l4": Charge(around),
        "ours": Charge(around, found.waypoints["ours"]),
        "ours-node": Charge([*around, *found.waypoints["ours-node"]]),
        "ours-service-account": Charge([*around, *of_accounts]),
        BESIDE: Charge([*uproxies.with_beside[:size], *uproxies.shared]),
    }


def look(lab: Lab, progress: Callable[[str], None], sizes: Sequence[int]) -> tuple[Found, float]:
    """Have all of it stand, and look at it; and what `measure` returns. Raises LabError."""
    control = lab.control
    assert control is not None
    a, b, c = lab.host("a"), lab.host("b"), lab.host("c")
    most = max(sizes)
    lab.start(progress)
    server = forking.start(b)
    kinds = {
        OWN: crowd.workloads(a, "own", most),
        FORKED: crowd.workloads(b, "forked", most, *forking.launching(lab)),
    }
    lab.configure("")
    for name, some in kinds.items():
        crowd.launch(lab, some)
        progress(f"running: {most} workloads ({name})")
    waypoints = crowd.start_waypoints(control, a, c)
    envoys = crowd.start_envoys(lab, a, c, sizes)
    progress("running: waypoints and Envoys")
    resting_us = _resting_us(control)
    alone = {name: [frames(one.proxy_pid()) for one in some] for name, some in kinds.items()}
    crowd.put_beside(lab, control, kinds.values())
    progress("running: our processes beside workloads")
    shared = {OWN: [_agent(a)], FORKED: [_agent(b), frames(server.pid)]}
    uproxies = {
        name: Uproxies(alone[name], [_with_children(one.proxy_pid()) for one in some], shared[name])
        for name, some in kinds.items()
    }
    running = control.processes()
    broker = running.pop("nats-server")
    found = Found(
        [frames(one.pid) for one in envoys.sidecars],
        [frames(one.pid) for one in envoys.of_accounts],
        {size: frames(one.pid) for size, one in envoys.of_nodes.items()},
        {
            GATEWAY: [frames(envoys.waypoint.pid)],
            **{name: [_with_children(one.pid) for one in waypoints[name]] for name in PLACED},
        },
        uproxies,
        maps_mb(map_pins(a)),
        size_mb(map(frames, running.values())),
        size_mb([frames(broker)]),
    )
    return found, resting_us


def _agent(host: Host) -> Pages:
    assert host.agent is not None
    return _with_children(host.agent.pid)


def _with_children(pid: int) -> Pages:
    return set[int]().union(*map(frames, with_children(pid)))


def _resting_us(control: ControlPlane) -> float:
    """Processor time of broker and control plane in a second, while nothing changes."""
    pids = list(control.processes().values())
    time.sleep(_SETTLED_S)
    began, before = time.monotonic(), _processor_ns(pids)
    time.sleep(_REST_S)
    return (_processor_ns(pids) - before) / 1000 / (time.monotonic() - began)


def _processor_ns(pids: Iterable[int]) -> int:
    return sum(map(processor_ns, pids))
