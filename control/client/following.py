"""What a replica wants because of what it knows: waypoints of bound services; what a waypoint serves and asks. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from control.api.extension import ExternalAuthorization
from control.api.gateway import Gateway
from control.api.policy import AuthorizationPolicy, Target
from control.api.records import Record
from control.api.route import HTTPRoute
from control.api.topics import GatewayTopic, IndexedTopic, PolicyTopic, RouteTopic, ServiceTopic, TrafficTopic
from control.api.traffic import Redis, TrafficPolicy
from control.api.workload import Service

WantedTopic = ServiceTopic | GatewayTopic


class Following:
    """Is told of every service, Gateway, route and policy that is handed out, and says where they lead."""

    def __init__(self, waypoint: GatewayTopic | None = None) -> None:
        """`waypoint`: the Gateway that this proxy is a process of; what that serves is wanted. None: it is none."""
        self.waypoint = waypoint
        self.changed = True
        """Whether `wanted` may say something else than when it was last called."""
        self._bindings: dict[ServiceTopic, tuple[GatewayTopic, ...]] = {}
        self._served: frozenset[ServiceTopic] = frozenset()
        self._asked: dict[PolicyTopic | TrafficTopic, tuple[frozenset[WantedTopic], ServiceTopic]] = {}
        """Targets of each policy that has somebody asked, and whom."""
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
            case PolicyTopic() | TrafficTopic() if self.waypoint is not None:
                self._note_policy(topic, record)
            case _:
                pass

    def gateways_of(self, service: ServiceTopic) -> tuple[GatewayTopic, ...]:
        """The Gateways that a service is bound to, but for this proxy's own."""
        return self._bindings.get(service, ())

    def wanted(self) -> frozenset[WantedTopic]:
        """Where everything leads that counts now."""
        self.changed = False
        backends = (backends for parents, backends in self._routes.values() if not parents.isdisjoint(self._served))
        here = self._served.union(() if self.waypoint is None else (self.waypoint,))
        asked = (service for targets, service in self._asked.values() if not targets.isdisjoint(here))
        return self._served.union(*self._bindings.values(), asked, *backends)

    def _note_binding(self, topic: ServiceTopic, record: Record | None) -> None:
        before = self._bindings.pop(topic, None)
        if isinstance(record, Service) and record.binding is not None:
            named = (one.partition("/") for one in record.binding.gateways)
            gateways = (GatewayTopic(namespace, name) for namespace, _, name in named)
            self._bindings[topic] = tuple(gateway for gateway in gateways if gateway != self.waypoint)
        self.changed |= self._bindings.get(topic) != before

    def _note_policy(self, topic: PolicyTopic | TrafficTopic, record: Record | None) -> None:
        before = self._asked.pop(topic, None)
        match record:
            case (
                AuthorizationPolicy(authorizer=ExternalAuthorization(service=service))
                | TrafficPolicy(redis=Redis(service=service))
            ):
                targets = frozenset(_target_topic(target) for target in record.targets)
                self._asked[topic] = targets, ServiceTopic(*service.split("/"))
        self.changed |= self._asked.get(topic) != before

    def _note_route(self, topic: RouteTopic, record: Record | None) -> None:
        self._routes.pop(topic, None)
        if isinstance(record, HTTPRoute):
            backends = (destination.service for rule in record.rules for destination in rule.destinations)
            parents = (parent.service for parent in record.parents)
            self._routes[topic] = _service_topics(parents), _service_topics(backends)
        self.changed = True


def _target_topic(target: Target) -> WantedTopic:
    namespace, _, name = target.key.partition("/")
    return GatewayTopic(namespace, name) if target.kind == "Gateway" else ServiceTopic(namespace, name)


def _service_topics(keys: Iterable[str]) -> frozenset[ServiceTopic]:
    return frozenset(ServiceTopic(namespace, name) for namespace, _, name in (one.partition("/") for one in keys))
