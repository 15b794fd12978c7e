"""The part of the suite `kernel` that is the maps: their memory, what a change costs as they grow, and filling them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from benchmarks.harness.bench import Probe, Sample
from benchmarks.harness.results import Measure, Subject
from benchmarks.lab import node
from benchmarks.lab.programs import memory_bytes
from bpf.arena import Backend
from bpf.libbpf import entries, update_all
from bpf.maps import Maps, Route, Target
from control.api.address import packed16

NAME: Final = "kernel/maps"
FILLING: Final = "kernel/filling"

_NOBODY: Final = 1
"""A caller that there is not, the root cgroup: whose services are declared in its name are in nobody's way."""
BACKENDS: Final = 10
_CHANGES: Final = 250
"""Of one take."""
_REST_S: Final = 0.2
"""Before each: a range is not written again for a second, and all that rest have to fit beside those in use."""
_CHANGING: Final = "changes of the maps"
_HOLDING: Final = "the kernel's memory"
_WRITING: Final = "writing all of a large mesh"

SINGLE: Final = Subject("single", "one by one", "A call of the kernel for each entry.")
BATCH: Final = Subject("batch", "in batches", "As the node agent does: packed in Python, up to 4,096 entries a call.")
PACKED: Final = Subject("packed", "in batches, packed before", "The same without the packing: the kernel's part.")


@dataclass(frozen=True, slots=True)
class Size:
    """Of a mesh in the maps."""

    services: int
    endpoints: int
    declared: int
    """Services that a caller may dial directly, with ten backends each."""


SMALL: Final = Size(10, 100, 10)
LARGE: Final = Size(10_000, 100_000, 2_000)


@dataclass(frozen=True, slots=True)
class Held:
    """A mesh in the maps."""

    subject: Subject
    maps: Maps
    size: Size
    at: Iterator[int] = field(default_factory=lambda: iter(range(10**9)), compare=False)
    """Where the next change is: each at another entry than the last."""

    def processes(self) -> Mapping[str, Sequence[int]]:
        return {"generator": [os.getpid()]}


@dataclass(frozen=True, slots=True)
class Filler:
    """A way to write all of a mesh."""

    subject: Subject
    write: Callable[[], None]
    empty: Callable[[], None]
    """Delete what was written."""

    def processes(self) -> Mapping[str, Sequence[int]]:
        return {"generator": [os.getpid()]}


def memory() -> Probe[Held]:
    def take(held: Held, seconds: float, number: int) -> Sample:
        del seconds, number  # it stands
        each = {f"mb/{name}": memory_bytes([fd]) / 1e6 for name, fd in held.maps.fds.items()}
        return Sample(sum(each.values()), 0, each)

    return Probe(Measure(f"{NAME}/memory", NAME, _HOLDING, "all maps of a node", "MB"), take)


def address_changes() -> Probe[Held]:
    """An endpoint's address goes and comes back: each a write of the entry, and one of the generation."""

    def change(held: Held, number: int) -> None:
        maps, key = held.maps, (packed16(node.further(node.ENDPOINTS, number % held.size.endpoints)), 0)
        settings = maps.settings.read()
        maps.workloads.delete_all([key])
        maps.settings.write(replace(settings, generation=settings.generation + 1))
        maps.workloads.put_all({key: Target(1, Route.TUNNEL)}, settings.generation + 2)
        maps.settings.write(replace(settings, generation=settings.generation + 2))

    return _changes("address", "an endpoint's address goes and comes back", change)


def backend_changes() -> Probe[Held]:
    """One of a service's ten backends goes and comes back: each a range of backends and the entry that names it."""

    def change(held: Held, number: int) -> None:
        which = number % held.size.declared
        backends = _backends(which)
        for some in (backends[1:], backends):
            held.maps.direct_services.put(_NOBODY, packed16(node.further(node.VIPS, which)), node.PORT, some)

    return _changes("backend", "one of ten backends goes and comes back", change)


def _changes(name: str, label: str, change: Callable[[Held, int], None]) -> Probe[Held]:
    def take(held: Held, seconds: float, number: int) -> Sample:
        del seconds, number  # always as many
        time.sleep(_REST_S)
        began, used = time.monotonic_ns(), time.thread_time_ns()
        for _ in range(_CHANGES):
            change(held, next(held.at))
        ended, used = time.monotonic_ns(), time.thread_time_ns() - used
        took_us = (ended - began) / 1000 / _CHANGES
        return Sample(took_us, _CHANGES, {"cpu_us": used / 1000 / _CHANGES}, counted=(began, ended))

    return Probe(Measure(f"{NAME}/{name}", NAME, _CHANGING, label, "us"), take)


def declare(maps: Maps, size: Size) -> None:
    for which in range(size.declared):
        address = packed16(node.further(node.VIPS, which))
        maps.direct_services.put(_NOBODY, address, node.PORT, _backends(which))


def _backends(which: int) -> list[Backend]:
    """Of a service: elsewhere, all of them."""
    first = node.further(node.ENDPOINTS, which * BACKENDS)
    return [Backend(packed16(node.further(first, by)), node.PORT, 1, 0, by + 1) for by in range(BACKENDS)]


def filling(size: Size) -> Probe[Filler]:
    count = size.services + size.endpoints
    label = f"{size.services:,} services and {size.endpoints:,} endpoints"

    def take(filler: Filler, seconds: float, number: int) -> Sample:
        del seconds, number  # once
        try:
            began, used = time.monotonic_ns(), time.thread_time_ns()
            filler.write()
            ended, used = time.monotonic_ns(), time.thread_time_ns() - used
        finally:
            filler.empty()
        details = {"all_ms": (ended - began) / 1e6, "cpu_us": used / 1000 / count}
        return Sample(count * 1e9 / (ended - began), count, details, counted=(began, ended))

    return Probe(Measure(f"{FILLING}/all", FILLING, _WRITING, label, "1/s", "more"), take)


def fillers(maps: Maps, size: Size) -> list[Filler]:
    every = ((maps.services, node.services(size.services)), (maps.workloads, node.endpoints(size.endpoints)))

    def one_by_one() -> None:
        for written, targets in every:
            for key, target in targets.items():
                written.put(key, target, generation=1)

    def in_batches() -> None:
        for written, targets in every:
            written.put_all(targets, generation=1)

    def empty() -> None:
        for written, targets in every:
            written.delete_all(targets)

    in_batches()
    raw = [(written, list(zip(*entries(written.fd, written.size), strict=True))) for written, _ in every]
    empty()

    def packed() -> None:
        for written, (keys, values) in raw:
            update_all(written.fd, written.size, keys, values)

    ways = ((SINGLE, one_by_one), (BATCH, in_batches), (PACKED, packed))
    return [Filler(subject, write, empty) for subject, write in ways]
