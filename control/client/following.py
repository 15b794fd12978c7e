"""What a replica wants because of what it knows: the waypoints of bound services, and what a waypoint serves. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from control.api.gateway import Gateway
from control.api.records import Record
from control.api.route import HTTPRoute
from control.api.topics import GatewayTopic, IndexedTopic, RouteTopic, ServiceTopic
from control.api.workload import Service

WantedTopic = ServiceTopic | GatewayTopic


class Following:
    """Is told of every service, Gateway and route that is handed out, and says where they lead."""

    def __init__(self, waypoint: GatewayTopic | None = None) -> None:
        """`waypoint`: the Gateway that this proxy is a process of; what that serves is wanted. None: it is none."""
        self.waypoint = waypoint
        self.changed = True
        """Whether `wanted` may say something else than when it was last called."""
        self._bindings: dict[ServiceTopic, GatewayTopic] = {}
        self._served: frozenset[ServiceTopic] = frozenset()
        self._routes: dict[RouteTopic, tuple[frozenset[ServiceTopic], frozenset[ServiceTopic]]] = {}
        """Parents and backends of each."""

    def note(self, topic: IndexedTopic, record: Record | None) -> None:
        """Another record counts from now on, or (None) none any more."""
        match topic:
            case ServiceTopic():
                self._note_binding(topic, record)
            case GatewayTopic() if topic == self.waypoint:
                self._served = _service_topics(record.services) if isinstance(record, Gateway) else frozenset()
                self.changed = True
            case RouteTopic() if self.waypoint is not None:
                self._note_route(topic, record)
            case _:
                pass

    def gateway_of(self, service: ServiceTopic) -> GatewayTopic | None:
        """The Gateway that a service is bound to, unless it is this proxy's own."""
        return self._bindings.get(service)

    def wanted(self) -> frozenset[WantedTopic]:
        """Where everything leads that counts now."""
        self.changed = False
        backends = (backends for parents, backends in self._routes.values() if not parents.isdisjoint(self._served))
        return self._served.union(self._bindings.values(), *backends)

    def _note_binding(self, topic: ServiceTopic, record: Record | None) -> None:
        before = self._bindings.pop(topic, None)
        if isinstance(record, Service) and record.binding is not None:
            namespace, _, name = record.binding.gateway.partition("/")
            gateway = GatewayTopic(namespace, name)
            if gateway != self.waypoint:
                self._bindings[topic] = gateway
        self.changed |= self._bindings.get(topic) != before

    def _note_route(self, topic: RouteTopic, record: Record | None) -> None:
        self._routes.pop(topic, None)
        if isinstance(record, HTTPRoute):
            backends = (destination.service for rule in record.rules for destination in rule.destinations)
            parents = (parent.service for parent in record.parents)
            self._routes[topic] = _service_topics(parents), _service_topics(backends)
        self.changed = True


def _service_topics(keys: Iterable[str]) -> frozenset[ServiceTopic]:
    return frozenset(ServiceTopic(namespace, name) for namespace, _, name in (one.partition("/") for one in keys))
