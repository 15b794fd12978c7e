"""What the control plane should publish, worked out the slow way: the whole mesh from all documents, every time."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from control.api import resources
from control.api.declared import Resource
from control.api.index import Resident, ResidentService
from control.api.mesh import Elsewhere, Mesh
from control.api.workload import Endpoint, Service
from control.server.core import Core
from control.server.store import Store
from tests.support.published import Read


@dataclass
class Oracle:
    """The expected state after a history of changes. Copy it (`dataclasses.replace`) with a backup."""

    services: dict[str, Service] = field(default_factory=dict)
    endpoints: dict[tuple[str, str], Endpoint] = field(default_factory=dict)
    mesh: Mesh = field(default_factory=lambda: Mesh.build([], "cluster.local"))

    def change(self, core: Core, store: Store, released: Collection[str]) -> None:
        """Takes the documents that are stored now; in the `released` namespaces, no last endpoint is kept."""
        parsed = [resource for _, text in core.get() for resource in resources.parse(text, "stored")]
        mesh = build(parsed, store)
        before = {key: endpoint for key, endpoint in self.endpoints.items() if endpoint.ready}
        endpoints = {(one.service, one.workload): one for one in mesh.endpoints}
        ready = {one.service for one in mesh.endpoints if one.ready}
        services: dict[str, Service] = {}
        for service in mesh.services:
            kept = {key: one for key, one in before.items() if key[0] == service.key}
            if service.key in ready or service.namespace in released:
                kept = {}
            endpoints |= kept
            # What is kept stands in place of the same workload, not ready now, which may be somebody else by then.
            identities = {one.identity for (of, _), one in endpoints.items() if of == service.key}
            services[service.key] = replace(service, identities=tuple(sorted(identities)))
        self.mesh, self.services, self.endpoints = mesh, services, endpoints

    def check(self, found: Read) -> None:
        """Raises AssertionError when the broker says anything else."""
        every = [*self.services.values(), *self.endpoints.values(), *self.mesh.workloads, *self.mesh.policies]
        expected = replace(self.mesh, services=tuple(self.services.values()), endpoints=tuple(self.endpoints.values()))
        assert len(every) == len(expected.records())
        assert found.records == {
            topic.removeprefix("mesh/v1/cluster.local/"): body for topic, body in expected.records().items()
        }
        assert found.addresses == {
            address: [*_resident(one), *([_unbound(one), list(one.datagrams)] if one.datagrams else [])]
            for address, one in expected.residents().items()
        }


def _resident(one: Resident) -> list[object]:
    """As published when nothing binds it, and no datagrams go there."""
    if isinstance(one, ResidentService):
        return ["s", one.namespace, one.name, list(one.ports)]
    return ["w", one.namespace, one.name, one.service_account, dict(one.labels)]


def _unbound(one: Resident) -> object:
    return False if isinstance(one, ResidentService) else []


def build(parsed: Iterable[Resource], store: Store) -> Mesh:
    """The whole mesh at once. Raises ResourceErrors."""
    return Mesh.build(parsed, "cluster.local", elsewhere=Elsewhere(vips=store.vips()))
