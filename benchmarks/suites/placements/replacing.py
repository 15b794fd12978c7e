"""What becomes of calls while a process is replaced: one that reads HTTP, then one that carries connections.

The next process serves beside the one that runs, which then drains for DRAIN_S and ends. A uProxy and our waypoint are
upgraded. An Envoy starts beside the other on the same ports, which is then told to drain its listeners: without hot
restart, as Istio runs it. Half of the calls need L7. One of the placement's processes is replaced, of the host of the
called services where there are several: whom that concerns is what differs.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.harness.bench import BenchError, Probe, Sample
from benchmarks.harness.results import Measure, Subject
from benchmarks.lab.sources import LabError
from benchmarks.load.together import Together, run_together
from benchmarks.suites.placements import mix
from benchmarks.suites.placements.mix import Mix
from benchmarks.suites.placements.placement import Envoy, Placement, UProxy

RATE: Final = 200
SECONDS: Final = 6.0
"""Of load around it: the next process starts, and the one before drains."""
_BEGIN_S: Final = 1.0
"""Of load before it."""


@dataclass(frozen=True, slots=True)
class Layer:
    name: str
    label: str
    roles: tuple[str, ...]
    """Of the process: the first role of which the placement has one."""

    def of(self, placement: Placement) -> list[Envoy | UProxy]:
        """The placement's processes of this layer."""
        for role in self.roles:
            found = [one for one in placement.mesh if isinstance(one, (Envoy, UProxy)) and one.role == role]
            if found:
                return found
        raise BenchError(f"{placement.subject.name} has no process of {self.label}")


LAYERS: Final = (
    Layer("l7", "a process that reads HTTP", ("waypoint", "server proxy")),
    Layer("l4", "a process that carries connections", ("server proxy",)),
)


@dataclass(frozen=True, slots=True)
class Replaceable:
    """A placement whose processes come and go: nothing is accounted but the applications."""

    placement: Placement

    @property
    def subject(self) -> Subject:
        return self.placement.subject

    def processes(self) -> Mapping[str, Sequence[int]]:
        return {"application": self.placement.applications}


def probes(suite: str, program: Path) -> list[Probe[Replaceable]]:
    """A measure for each layer."""
    return [
        Probe(
            Measure(
                f"{suite}/upgrade/{layer.name}",
                suite,
                "Upgrade: what is lost while one process is replaced",
                f"{layer.label}, {RATE} requests/s",
                "failed requests and cut connections",
            ),
            partial(_take, program, layer),
        )
        for layer in LAYERS
    ]


def _take(program: Path, layer: Layer, live: Replaceable, seconds: float, number: int) -> Sample:
    placement = live.placement
    name = placement.subject.name
    generators = mix.generators(program, placement, Mix(RATE, l7=0.5), seconds, number)
    if number == 0:  # the round that warms up: nothing is replaced
        run_together(name, generators, seconds)
        return Sample(0.0, 0.0)
    replaced = layer.of(placement)[0]
    failures: list[LabError] = []

    def replace() -> None:
        over.wait(_BEGIN_S)
        try:
            replaced.replace()
        except LabError as error:
            failures.append(error)

    over = threading.Event()
    replacing = threading.Thread(target=replace, name="replacing")
    replacing.start()
    try:
        found = run_together(name, generators, seconds, all_answered=False)
        in_time = not replacing.is_alive()
    finally:
        over.set()
        replacing.join()
    if failures:
        raise BenchError(f"{name}: {failures[0]}") from failures[0]
    bound = "" if in_time else f"replacing took longer than {seconds - _BEGIN_S:g} s"
    lost = sum(one.failed + one.broken for one in found.outcomes)
    return Sample(float(lost), 0.0, _details(generators, found), {}, bound)


def _details(generators: Mapping[str, object], found: Together) -> dict[str, float]:
    """Who saw something of it: of each caller both kinds of calls together."""
    by_caller: dict[str, int] = {}
    for name, one in zip(generators, found.outcomes, strict=True):
        caller = name.split()[0]
        by_caller[caller] = by_caller.get(caller, 0) + one.failed + one.broken
    return {
        "failed": float(sum(one.failed for one in found.outcomes)),
        "asked": float(sum(one.scheduled for one in found.outcomes)),
        "cut_while_idle": float(sum(one.broken for one in found.outcomes)),
        "callers": float(len(by_caller)),
        "callers_hit": float(sum(1 for seen in by_caller.values() if seen)),
        "longest_ms": max(one.max_us for one in found.outcomes) / 1000,
    }
