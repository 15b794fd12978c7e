"""The node agent's metrics: Prometheus' text format, and when a map is so full that somebody should know.

A map that is full never opens anything: what is not in it is refused, or goes through the tunnel. Yet what it has no
room for does not work, so that it is said long before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from bpf.maps import Level

METRICS_PORT: Final = 15019
"""Of the host, on loopback: 15000 to 15090 are reserved in the namespaces of workloads, and this is none."""
_ALARM_SHARE: Final = 0.8


@dataclass(frozen=True, slots=True)
class Values:
    """Everything there is to tell, as of now."""

    workloads: int
    whole: bool
    generation: int
    problems: int
    verdicts: Mapping[str, int]
    """What the programs have counted (enum mesh_counter)."""
    levels: Mapping[str, Level]


def alarms(levels: Mapping[str, Level]) -> dict[str, str]:
    """What to say of each map that is nearly full."""
    return {
        name: f"the kernel's map `{name}` has {level.entries:,} entries and room for {level.capacity:,}: what does not "
        "fit will be refused, or goes through the tunnel. Give this node fewer services or workloads"
        for name, level in sorted(levels.items())
        if level.entries >= _ALARM_SHARE * level.capacity
    }


def render(values: Values) -> bytes:
    """In the text format 0.0.4."""
    return "".join(f"{line}\n" for line in _lines(values)).encode()


def _lines(values: Values) -> Iterator[str]:
    for name, kind, help_text, samples in (
        ("uproxy_node_workloads", "gauge", "Workloads under capture", {"": values.workloads}),
        ("uproxy_node_whole", "gauge", "1 when the maps hold a complete configuration", {"": int(values.whole)}),
        ("uproxy_node_generation", "gauge", "Changes of the maps, for good", {"": values.generation}),
        ("uproxy_node_problems", "gauge", "What the agent's status shows as wrong", {"": values.problems}),
        (
            "uproxy_node_verdicts_total",
            "counter",
            "What the programs in the kernel decided or met",
            {f'{{verdict="{verdict}"}}': number for verdict, number in values.verdicts.items()},
        ),
        (
            "uproxy_node_map_entries",
            "gauge",
            "Entries of a map in the kernel",
            {f'{{map="{name}"}}': level.entries for name, level in values.levels.items()},
        ),
        (
            "uproxy_node_map_capacity",
            "gauge",
            "Entries for which a map has room",
            {f'{{map="{name}"}}': level.capacity for name, level in values.levels.items()},
        ),
    ):
        yield f"# HELP {name} {help_text}"
        yield f"# TYPE {name} {kind}"
        for labels, number in samples.items():
            yield f"{name}{labels} {number}"
