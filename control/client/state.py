"""What a proxy knows of the mesh: apply messages, look things up. No I/O and no clock.

Invariant: the state is a function of the newest message of each topic, whatever order, repetition or staleness they
arrived in. A batch is applied whole or not at all.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final, Generic, TypeVar

from control.api import index, messages, records, topics
from control.api.address import IpAddress
from control.api.gateway import Binding, Gateway
from control.api.identity import parse_trust_domain
from control.api.index import Resident, ResidentWorkload
from control.api.jwt import RequestAuthentication
from control.api.messages import Body, MessageError, Stamp
from control.api.policy import DEFAULT_ROOT_NAMESPACE, AuthorizationPolicy, Target, TargetKind, applies
from control.api.records import Record, RecordError
from control.api.route import HTTPRoute
from control.api.topics import AddressesTopic, RecordTopic, Topic, TopicError, address_shard
from control.api.traffic import TrafficPolicy
from control.api.workload import Endpoint, Service, ServicePort, Workload, key_of_host
from control.client.residents import PackedShard

MAX_TOPICS: Final = 1_000_000  # ten times the largest mesh we aim at; a runaway publisher must not eat the host

_MAX_ASKED: Final = 10_000
"""Addresses whose residents are kept as objects once they were asked for; a proxy has fewer peers."""

Content = Record | PackedShard
_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class Changes:
    """Keys of what a batch changed; all empty when it changed nothing."""

    services: frozenset[str] = frozenset()
    workloads: frozenset[str] = frozenset()
    endpoints: frozenset[str] = frozenset()
    """Keys of the services whose endpoints, or whose identities that may serve, changed."""
    policies: frozenset[str] = frozenset()
    """And of RequestAuthentications and TrafficPolicies."""
    addresses: frozenset[IpAddress] = frozenset()
    """Where somebody else lives now than before, or nobody; or somebody who is bound otherwise."""
    gateways: frozenset[str] = frozenset()
    routes: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class _Held:
    """The newest message of a topic."""

    stamp: Stamp
    record: Content | None
    """None: a tombstone, kept so that an older message cannot bring the record back."""


_NOTHING: Final = _Held((-1, -1), None)


class _Claims(Generic[_K, _V]):
    """Who holds a key that several records may claim (an address that moved): the newest record does.

    That is how a reused address works before the tombstone of its last holder arrives, in any order.
    """

    __slots__ = ("_before", "_claims", "_keys", "holder")

    def __init__(self) -> None:
        self.holder: dict[_K, _V] = {}
        self._claims: dict[_K, dict[str, tuple[Stamp, _V]]] = {}
        self._keys: dict[str, Sequence[_K]] = {}
        self._before: dict[_K, _V | None] = {}

    def claim(self, topic: str, keys: Sequence[_K], stamp: Stamp, value: _V) -> None:
        """A topic claims these keys for a value, and no others any more."""
        dropped = [claimed for claimed in self._keys.get(topic, ()) if claimed not in keys]
        self._keys[topic] = keys
        for claimed in keys:
            self._claims.setdefault(claimed, {})[topic] = (stamp, value)
            self._settle(claimed)
        self._forgo(topic, dropped)

    def release(self, topic: str) -> None:
        """A topic claims nothing any more."""
        self._forgo(topic, self._keys.pop(topic, ()))

    def _forgo(self, topic: str, keys: Sequence[_K]) -> None:
        for claimed in keys:
            del self._claims[claimed][topic]
            self._settle(claimed)

    def take_moved(self) -> list[_V]:
        """Those that lost or won a key since the last call."""
        moved: list[_V] = []
        for claimed, before in self._before.items():
            after = self.holder.get(claimed)
            if before != after:
                moved += [value for value in (before, after) if value is not None]
        self._before.clear()
        return moved

    def _settle(self, claimed: _K) -> None:
        self._before.setdefault(claimed, self.holder.get(claimed))
        claims = self._claims[claimed]
        if claims:
            newest = max(claims, key=lambda topic: (claims[topic][0], topic))
            self.holder[claimed] = claims[newest][1]
        else:
            del self._claims[claimed], self.holder[claimed]


class State:
    """The store. Look-ups on a connection's path take constant time."""

    def __init__(self, trust_domain: str, root_namespace: str = DEFAULT_ROOT_NAMESPACE) -> None:
        self.trust_domain = parse_trust_domain(trust_domain)
        self.root_namespace = root_namespace
        self.whole = False
        """Whether a complete batch has been applied: until then, not knowing something proves nothing."""
        self.generation = 0
        """Rises with each batch that changed something."""
        self._held: dict[str, _Held] = {}
        self._services: dict[str, Service] = {}
        self._vips: _Claims[IpAddress, Service] = _Claims()
        self._workloads: _Claims[str, Workload] = _Claims()
        self._addresses: _Claims[IpAddress, Workload] = _Claims()
        self._endpoints: dict[str, dict[str, Endpoint]] = {}
        self._policies: dict[str, dict[str, AuthorizationPolicy]] = {}
        """By namespace and name, those without targets."""
        self._targeting: dict[Target, dict[str, AuthorizationPolicy]] = {}
        self._authenticating: dict[Target, dict[str, RequestAuthentication]] = {}
        self._traffic: dict[Target, dict[str, TrafficPolicy]] = {}
        self._gateways: dict[str, Gateway] = {}
        self._routes: dict[str, dict[str, HTTPRoute]] = {}
        """By key of a parent, then their own."""
        self._shards: dict[int, PackedShard] = {}
        self._asked: dict[IpAddress, Resident | None] = {}
        """Who lives at an address that was asked for, or that nobody does."""
        self._peers: dict[IpAddress, Workload] = {}
        """Workloads that are known from their addresses alone, once they were asked for."""

    def apply(self, batch: Sequence[tuple[str, bytes]]) -> Changes:
        """Applies a batch. Raises RecordError, and then nothing of it is applied."""
        services, endpoints, policies, gateways, routes = set(), set(), set(), set(), set()
        addresses: set[IpAddress] = set()
        for topic, new in self._newest_of(batch).items():
            old = self._held.get(topic, _NOTHING)
            self._held[topic] = new
            for record, other in ((old.record, new.record), (new.record, old.record)):
                if record == other:
                    break
                match record:
                    case Service():
                        services.add(record.key)
                        if not isinstance(other, Service) or other.identities != record.identities:
                            endpoints.add(record.key)
                    case Endpoint():
                        endpoints.add(record.service)
                    case AuthorizationPolicy() | RequestAuthentication() | TrafficPolicy():
                        policies.add(record.key)
                    case Gateway():
                        gateways.add(record.key)
                    case HTTPRoute():
                        routes.add(record.key)
                    case PackedShard():
                        addresses |= record.differences(other if isinstance(other, PackedShard) else None)
            self._file(topic, old.record, new.record, new.stamp)
        services |= {service.key for service in self._vips.take_moved()}
        workloads = {w.key for w in (*self._workloads.take_moved(), *self._addresses.take_moved())}
        self.whole = True
        for address in addresses:
            self._asked.pop(address, None)
            self._peers.pop(address, None)
        changes = Changes(
            services=frozenset(services),
            workloads=frozenset(workloads),
            endpoints=frozenset(endpoints),
            policies=frozenset(policies),
            addresses=frozenset(addresses),
            gateways=frozenset(gateways),
            routes=frozenset(routes),
        )
        self.generation += bool(changes)
        return changes

    def service_at(self, ip: IpAddress, port: int) -> tuple[Service, ServicePort] | None:
        """The service and port that live at a virtual address."""
        service = self._vips.holder.get(ip)
        if service is not None:
            for service_port in service.ports:
                if service_port.port == port:
                    return service, service_port
        return None

    def service(self, service_key: str) -> Service | None:
        return self._services.get(service_key)

    def service_named(self, host: str) -> Service | None:
        """The service of a host name: `name.ns`, `name.ns.svc` or `name.ns.svc.cluster.local`, in any case."""
        service_key = key_of_host(host)
        return self._services.get(service_key) if service_key is not None else None

    def services(self) -> tuple[Service, ...]:
        return tuple(self._services.values())

    def endpoints(self, service_key: str) -> tuple[Endpoint, ...]:
        """All endpoints of a service, ready or not, that may serve it: none without the service's own record."""
        service = self._services.get(service_key)
        if service is None:
            return ()
        found = self._endpoints.get(service_key, {}).values()
        return tuple(endpoint for endpoint in found if endpoint.identity in service.identities)

    def covers(self, ip: IpAddress) -> bool:
        """Whether it is known who lives at an address, or that nobody does."""
        return address_shard(ip) in self._shards

    def resident_at(self, ip: IpAddress) -> Resident | None:
        """Who lives at an address, a service or a workload, whether or not more is known of it."""
        if ip not in self._asked:
            shard = self._shards.get(address_shard(ip))
            if shard is None:
                return None
            if len(self._asked) >= _MAX_ASKED:
                self._asked.clear()
                self._peers.clear()
            self._asked[ip] = shard.resident_at(ip)
        return self._asked[ip]

    @property
    def address_bytes(self) -> int:
        """What the addresses take, packed as they are."""
        return sum(len(shard.packed) for shard in self._shards.values())

    def residents(self) -> dict[IpAddress, Resident]:
        """Every address that somebody lives at, made anew: a second for each 100,000."""
        return {ip: resident for shard in self._shards.values() for ip, resident in shard.residents().items()}

    def workload_at(self, ip: IpAddress) -> Workload | None:
        """The workload at an address, by its record or else as far as its address tells."""
        known = self._addresses.holder.get(ip) or self._peers.get(ip)
        if known is None:
            resident = self.resident_at(ip)
            if isinstance(resident, ResidentWorkload):
                known = self._peers[ip] = resident.as_workload(self.trust_domain, ip)
        return known

    def workload(self, workload_key: str) -> Workload | None:
        return self._workloads.holder.get(workload_key)

    def workloads(self) -> tuple[Workload, ...]:
        return tuple(self._workloads.holder.values())

    def gateway(self, gateway_key: str) -> Gateway | None:
        return self._gateways.get(gateway_key)

    def binding_at(self, ip: IpAddress, port: int) -> Binding | None:
        """How a port is reached at an address: of a service as its record says, of a workload as its address does.

        None: directly, or nobody is known there.
        """
        found = self.service_at(ip, port)
        if found is not None:
            return found[0].binding
        resident = self.resident_at(ip)
        return resident.binding_at(port) if isinstance(resident, ResidentWorkload) else None

    def routes_for(self, service_key: str) -> tuple[HTTPRoute, ...]:
        """The routes that have a service as a parent, whatever the port, in order of their keys."""
        return _in_order(self._routes.get(service_key, {}))

    def policies_targeting(self, kind: TargetKind, target_key: str) -> tuple[AuthorizationPolicy, ...]:
        """The policies that hold at waypoints for all requests (a Gateway's key) or a service, in order of keys."""
        return _in_order(self._targeting.get(Target(kind, target_key), {}))

    def authentications_targeting(self, kind: TargetKind, target_key: str) -> tuple[RequestAuthentication, ...]:
        """Likewise, of tokens."""
        return _in_order(self._authenticating.get(Target(kind, target_key), {}))

    def traffic_targeting(self, kind: TargetKind, target_key: str) -> tuple[TrafficPolicy, ...]:
        """Likewise, of how much is let through."""
        return _in_order(self._traffic.get(Target(kind, target_key), {}))

    def traffic_policies(self) -> set[TrafficPolicy]:
        """All of them."""
        return {policy for found in self._traffic.values() for policy in found.values()}

    def policies_for(self, workload: Workload) -> tuple[AuthorizationPolicy, ...]:
        """The policies that select a workload, in order of their keys. Linear: compile them once per generation."""
        scopes = {self.root_namespace, workload.namespace}
        found = [
            policy
            for scope in scopes
            for policy in self._policies.get(scope, {}).values()
            if applies(policy, workload.namespace, workload.labels, self.root_namespace)
        ]
        return tuple(sorted(found, key=lambda policy: policy.key))

    def _newest_of(self, batch: Sequence[tuple[str, bytes]]) -> dict[str, _Held]:
        """What of the batch is newer than what is held, all of it checked, by topic."""
        fresh: dict[str, _Held] = {}
        for topic, payload in batch:
            held = self._read(topic, payload)
            newest = fresh.get(topic) or self._held.get(topic)
            if newest is None or held.stamp > newest.stamp:
                fresh[topic] = held
        if len(self._held) + sum(topic not in self._held for topic in fresh) > MAX_TOPICS:
            raise RecordError(f"more than {MAX_TOPICS} topics: this proxy would run out of memory")
        return fresh

    def _read(self, topic: str, payload: bytes) -> _Held:
        try:
            parsed = topics.parse_topic(self.trust_domain, topic)
            envelope = messages.decode(payload)
            record = None if envelope.body is None else self._read_body(parsed, envelope.body)
        except (TopicError, MessageError, RecordError) as error:
            raise RecordError(f"{topic[:120]}: {error}") from None
        return _Held(envelope.stamp, record)

    def _read_body(self, topic: Topic, body: Body) -> Content:
        if isinstance(topic, AddressesTopic):
            return PackedShard.pack(topic.shard, index.read_address_shard(topic, body))
        if isinstance(topic, RecordTopic):
            return records.read(topic, body, self.trust_domain)
        raise RecordError("is of a kind that no state is made of")

    def _file(self, topic: str, old: Content | None, new: Content | None, stamp: Stamp) -> None:
        """Brings every index from a topic's old record to its new one."""
        self._drop(old)
        match new:
            case Service():
                self._services[new.key] = new
                self._vips.claim(topic, new.vips, stamp, new)
            case Workload():
                self._workloads.claim(topic, (new.key,), stamp, new)
                self._addresses.claim(topic, new.addresses, stamp, new)
            case Endpoint():
                self._endpoints.setdefault(new.service, {})[new.workload] = new
            case AuthorizationPolicy(targets=()):
                self._policies.setdefault(new.namespace, {})[new.name] = new
            case AuthorizationPolicy():
                for target in new.targets:
                    self._targeting.setdefault(target, {})[new.key] = new
            case RequestAuthentication():
                for target in new.targets:
                    self._authenticating.setdefault(target, {})[new.key] = new
            case TrafficPolicy():
                for target in new.targets:
                    self._traffic.setdefault(target, {})[new.key] = new
            case Gateway():
                self._gateways[new.key] = new
            case HTTPRoute():
                for service_key in _parents(new):
                    self._routes.setdefault(service_key, {})[new.key] = new
            case PackedShard():
                self._shards[new.shard] = new
            case None:
                self._vips.release(topic)
                self._workloads.release(topic)
                self._addresses.release(topic)

    def _drop(self, old: Content | None) -> None:
        match old:
            case Service():
                del self._services[old.key]
            case Endpoint():
                _discard(self._endpoints, old.service, old.workload)
            case AuthorizationPolicy(targets=()):
                _discard(self._policies, old.namespace, old.name)
            case AuthorizationPolicy():
                for target in old.targets:
                    _discard(self._targeting, target, old.key)
            case RequestAuthentication():
                for target in old.targets:
                    _discard(self._authenticating, target, old.key)
            case TrafficPolicy():
                for target in old.targets:
                    _discard(self._traffic, target, old.key)
            case Gateway():
                del self._gateways[old.key]
            case HTTPRoute():
                for service_key in _parents(old):
                    _discard(self._routes, service_key, old.key)
            case PackedShard():
                del self._shards[old.shard]
            case Workload() | None:
                pass  # a workload is filed by its claims alone


def _parents(route: HTTPRoute) -> set[str]:
    return {parent.service for parent in route.parents}


def _in_order(found: Mapping[str, _V]) -> tuple[_V, ...]:
    return tuple(found[its] for its in sorted(found))


def _discard(index: dict[_K, dict[str, _V]], outer: _K, inner: str) -> None:
    """Removes an entry, and the level above it when that was its last."""
    entries = index[outer]
    del entries[inner]
    if not entries:
        del index[outer]
