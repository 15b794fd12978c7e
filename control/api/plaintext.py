"""Which ports of a workload take plaintext beside mTLS: what PeerAuthentications together say of it.

The meaning is Istio's: one with a selector holds for the workloads of its namespace that it selects, one without for
its namespace, or, in the root namespace, for the whole mesh; the narrower says more, and UNSET leaves it to the wider.
Two things are stricter than Istio's: where nobody says anything it is STRICT, and where two of the same scope differ
STRICT holds, not the older one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from control.api.labels import Labels, selects
from control.api.policy import MtlsMode, PeerAuthentication

MAX_PORTS: Final = 64
"""What the kernel holds for one workload (MESH_PLAINTEXT_PORTS of bpf/mesh.h)."""
PROXY_PORTS: Final = range(15000, 15091)
"""The uProxy's, which take no plaintext whatever is said of them."""


@dataclass(frozen=True, slots=True)
class Plaintext:
    """The ports of one workload that take plaintext too."""

    others: bool
    """Whether they are all but `ports`, rather than those."""
    ports: tuple[int, ...]
    """At most MAX_PORTS, in order, each once."""

    def takes(self, port: int) -> bool:
        return (port in self.ports) is not self.others and port not in PROXY_PORTS


def plaintext_of(
    namespace: str, labels: Labels, said: Iterable[PeerAuthentication], root_namespace: str
) -> Plaintext | None:
    """What PeerAuthentications say of a workload with these labels in this namespace; None: no port takes plaintext.

    The result may have more than MAX_PORTS, which nobody can publish.
    """
    selecting: list[PeerAuthentication] = []
    of_namespace: list[PeerAuthentication] = []
    of_mesh: list[PeerAuthentication] = []
    for one in said:
        if one.selector is None and one.namespace == root_namespace:
            of_mesh.append(one)
        elif one.namespace == namespace and one.selector is None:
            of_namespace.append(one)
        elif one.namespace == namespace and one.selector is not None and selects(one.selector, labels):
            selecting.append(one)
    wider = _first_set(_strictest(of_namespace), _strictest(of_mesh), MtlsMode.STRICT)
    mode = _first_set(_strictest(selecting), wider)
    ports = sorted({port for one in selecting for port in one.port_modes})
    unlike = tuple(port for port in ports if _first_set(_strictest(selecting, port), wider) is not mode)
    if mode is MtlsMode.STRICT and not unlike:
        return None
    return Plaintext(mode is MtlsMode.PERMISSIVE, unlike)


def _strictest(said: Sequence[PeerAuthentication], port: int | None = None) -> MtlsMode:
    """What those of one scope say, of a port or of every other one."""
    modes = {_first_set(one.port_modes.get(port or 0, MtlsMode.UNSET), one.mode) for one in said}
    return next((mode for mode in (MtlsMode.STRICT, MtlsMode.PERMISSIVE) if mode in modes), MtlsMode.UNSET)


def _first_set(*modes: MtlsMode) -> MtlsMode:
    return next((mode for mode in modes if mode is not MtlsMode.UNSET), MtlsMode.UNSET)
