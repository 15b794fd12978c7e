"""What labels ask for, and how far the control plane has brought it: what is bound to which waypoint.

`Mesh.build` works the wishes out; `control.server.bindings` turns them into standings, phase by phase; the next build
writes these into records. Files have nobody who goes by phases: each wish is in force at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from control.api.gateway import Binding, Via

Subject = tuple[Literal["Service", "WorkloadEntry"], str]
"""What is bound: a kind, and the key of a service or workload."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A Gateway that serves a share of the callers (`mesh.uproxy.dev/waypoint-canary`)."""

    gateway: str
    """Key of the Gateway."""
    percent: int


@dataclass(frozen=True, slots=True)
class Wish:
    """What the labels and annotations of a service or workload, or of its namespace, ask for."""

    gateway: str
    """Key of the Gateway."""
    optional: bool
    """`mesh.uproxy.dev/waypoint-binding: optional`: a waypoint that does not answer is passed by."""
    guarded: bool
    """Whether an L7 AuthorizationPolicy targets the service or the Gateway, so that going directly must not last."""
    canary: Canary | None = None
    """Another Gateway, which is not that one."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a binding is, in the terms of the records that show it."""

    gateways: tuple[str, ...]
    """Keys of the Gateways that list it, and whose word on the caller its destinations take; in order. Several while
    it moves from one to the other, or has a canary."""
    enforced: bool
    """Whether its destinations refuse everybody else."""
    binding: Binding | None
    """What callers see."""


Standings = Mapping[Subject, Standing]
"""Those of all namespaces. What is not in it is not bound, whatever its labels say."""


def at_once(wish: Wish) -> Standing:
    """Where a wish ends up."""
    via = Via.PREFERRED if wish.optional else Via.WAYPOINT
    if wish.canary is None:
        return Standing((wish.gateway,), not wish.optional, Binding(wish.gateway, via))
    binding = Binding(wish.gateway, via, canary=wish.canary.gateway, percent=wish.canary.percent)
    return Standing(tuple(sorted(binding.gateways)), not wish.optional, binding)
