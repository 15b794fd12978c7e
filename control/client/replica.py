"""What one proxy knows of the control plane's truth, and how far that can be trusted. No I/O and no clock.

Messages go in as a broker delivers them: in any order, twice, out of date, forged. *Batches* for `State.apply` come
out, each of them consistent: what a signed root lists is applied whole or not at all (`listed`), endpoints count by
their newest stamp (`endpoint_set`), and nothing comes out before the *base*, without which a proxy must not work.

The stamps in batches are the replica's own count. So the state takes what the replica says, also when the control plane
was restored from a backup and an old version of a record is the present one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from typing import Final

import msgpack

from control.api import index, messages, records, topics
from control.api.address import IpAddress
from control.api.fields import RecordError
from control.api.identity import SpiffeId, parse_trust_domain, proxy_hash
from control.api.index import Manifest, manifest_digest
from control.api.messages import Envelope, MessageError, Stamp
from control.api.names import wrong_dns_label, wrong_service_name, wrong_subdomain
from control.api.policy import DEFAULT_ROOT_NAMESPACE
from control.api.status import ADDRESSES
from control.api.topics import (
    AddressesRootTopic,
    AddressesTopic,
    EndpointTopic,
    GatewayTopic,
    IndexedTopic,
    IndexTopic,
    ManifestTopic,
    NamespacesTopic,
    PolicyTopic,
    RequestAuthenticationTopic,
    RevocationsTopic,
    RootTopic,
    RouteTopic,
    ServiceTopic,
    StatusTopic,
    Topic,
    TopicError,
    TrafficTopic,
    TrustTopic,
    WorkloadTopic,
    address_shard,
    format_topic,
    index_entry,
    index_shard,
    subtree,
)
from control.api.workload import key
from control.client import snapshot
from control.client.endpoint_set import EndpointSet
from control.client.following import Following, WantedTopic
from control.client.inbox import Arrival, Inbox, ListedTopic
from control.client.libcrypto import ConfigVerifier, VerifyError
from control.client.listed import NEVER, AddressIndex, Change, Listed, NamespaceIndex, SignedRoot
from control.client.snapshot import Snapshot, SnapshotError

Batch = list[tuple[str, bytes]]

MAX_ENDPOINT_BYTES: Final = 256 * 1024 * 1024
"""Of all services. Counted twice, as endpoints may be held and arrive again: some 200,000."""
_SETTLED_AT_ONCE: Final = 256  # endpoints, which takes 0.2 ms
_MAX_FLOORS: Final = 1024  # namespaces once dialled
_MAX_DROPPED: Final = 1000
_MAX_TEXTS: Final = 16  # problems, or things waited for
_MAX_TEXT: Final = 200  # characters
_EPOCH: Final = 1  # of the stamps in batches
_MAX_HEAD_BYTES: Final = 32  # of a message: the list's own and three numbers
_NO_ENDPOINTS: Final = Manifest(0, manifest_digest({}))
_LEVELS: Final[dict[type[IndexedTopic], str]] = {
    PolicyTopic: "policy",
    RequestAuthenticationTopic: "reqauth",
    TrafficTopic: "traffic",
    RouteTopic: "route",
}
"""Kinds that are wanted as a whole -> level of their topics."""

_Signed = RootTopic | AddressesRootTopic | AddressesTopic | NamespacesTopic


class Status(Enum):
    """How far something that is wanted is known."""

    KNOWN = "known"
    ABSENT = "absent"
    """The control plane says so, by its signature."""
    WAITING = "waiting"


@dataclass(slots=True)
class _Wanted:
    """A service or a Gateway that is of interest."""

    topic: WantedTopic
    shard: IndexTopic = field(init=False)
    """Which lists it."""
    asked: bool = False
    """Whether somebody has asked for it."""
    followed: bool = False
    """Whether something that is known leads to it."""
    settled: bool = False
    """Whether the applied root has told if there is such a one. From then on, no root is applied without it."""

    def __post_init__(self) -> None:
        self.shard = IndexTopic(self.topic.namespace, index_shard(index_entry(self.topic)))

    @property
    def key(self) -> str:
        return key(self.topic.namespace, self.topic.name)

    @property
    def ready(self) -> bool:
        """Whether all is there that belongs to it and that no root lists."""
        return True


@dataclass(slots=True)
class _WantedService(_Wanted):
    endpoints: EndpointSet = field(default_factory=EndpointSet)
    visible: bool = False
    """Whether its record and endpoints are handed out."""
    complete: bool = False
    """Whether its endpoints were all there once."""

    @property
    def ready(self) -> bool:
        return self.complete or self.endpoints.whole


@dataclass(frozen=True, slots=True)
class _HeldShard:
    """An address shard by itself: its own signature vouches for it."""

    stamp: Stamp
    payload: bytes


@dataclass(frozen=True, slots=True)
class _HeldNamespaces:
    """Which namespaces have services: likewise."""

    stamp: Stamp
    payload: bytes
    names: frozenset[str]


class Replica:
    """One proxy's copy. Ask for things (`want_...`), subscribe to `filters`, pass on what arrives."""

    def __init__(
        self, trust_domain: str, verifier: ConfigVerifier, root_namespace: str = DEFAULT_ROOT_NAMESPACE
    ) -> None:
        self._trust_domain = parse_trust_domain(trust_domain)
        self._root_namespace = root_namespace
        self._verifier = verifier
        self._revocations = RevocationsTopic(root_namespace)
        self._inbox = Inbox()
        self._own: tuple[str, WorkloadTopic] | None = None
        """Namespace and topic of this proxy's own workload."""
        self._base: list[Listed] = []
        self._namespaces: dict[str, NamespaceIndex] = {}
        self._addresses: AddressIndex | None = None
        self._kinds: tuple[type[IndexedTopic], ...] = ()
        """Kinds of which all records are of interest, in every namespace in which anything is."""
        self._services: dict[str, _WantedService] = {}
        self._gateways: dict[str, _Wanted] = {}
        self._by_shard: dict[IndexTopic, dict[WantedTopic, _Wanted]] = {}
        """The same, by the shard that lists it."""
        self._dropped: dict[WantedTopic, None] = {}
        """What is not wanted any more, and still subscribed to."""
        self._following = Following()
        self._followed: frozenset[WantedTopic] = frozenset()
        self.asks_anew = False
        """Whether `filters` says something else than when it was last called, because of what has come since."""
        self._address_shards: dict[int, _HeldShard | None] = {}
        self._wants_namespaces = False
        self._having: _HeldNamespaces | None = None
        self._floors: dict[str, Stamp] = {}
        """Of roots that were applied and are not of interest now: they must not come back older."""
        self._unverified: dict[str, tuple[_Signed, Envelope, bytes]] = {}
        """By topic, what waits for a key or was not signed by the present one."""
        self._to_verify: dict[str, None] = {}
        self._to_settle: dict[str, None] = {}
        self._endpoint_bytes = 0
        self._problems: deque[str] = deque(maxlen=_MAX_TEXTS)
        self._started = False
        self._serial = 0
        self._batch: Batch | None = None

    # What is wanted

    def want_workload(self, identity: SpiffeId, instance: str) -> None:
        """Makes a workload's own record, all policies that may select it, and what is revoked part of the base. Comes
        first.
        """
        self._own = (identity.namespace, WorkloadTopic(proxy_hash(identity), instance))
        for name in sorted({identity.namespace, self._root_namespace}):
            namespace = self._namespace(name)
            namespace.kinds = (PolicyTopic,)
            self._base.append(namespace)
        self._namespaces[identity.namespace].want(self._own[1])
        self._namespaces[self._root_namespace].want(self._revocations)

    def want_waypoint(self, gateway_key: str) -> None:
        """Makes the Gateway that this proxy is a process of part of the base, and follows it: to each of its services,
        to those that their routes name, and to all policies and routes of every namespace that has any of these.

        Comes after `want_workload`. Raises ValueError for what is no key of a Gateway of the workload's namespace.
        """
        topic = _gateway_topic(gateway_key)
        if self._own is None or topic is None or topic.namespace != self._own[0]:
            raise ValueError(f"{gateway_key!r} is no Gateway of this workload's namespace")
        self._following = Following(topic)
        self._kinds = (PolicyTopic, RequestAuthenticationTopic, TrafficTopic, RouteTopic)
        for namespace in self._namespaces.values():
            namespace.kinds = self._kinds
        self._namespaces[topic.namespace].want(topic)

    def want_all_addresses(self) -> None:
        """Makes all addresses of the mesh part of the base. Comes first."""
        self._addresses = AddressIndex(self._trust_domain, self._inbox, self._refuse)
        self._base.append(self._addresses)

    def want_service(self, service_key: str) -> None:
        """Asks for a service, its endpoints, and the Gateway that it is bound to.

        What can be no service's key is not asked for, and stays unknown.
        """
        topic = _service_topic(service_key)
        if topic is not None:
            self._take_up(topic).asked = True

    def drop_service(self, service_key: str) -> None:
        """Ends the interest in a service, from the next call of `filters` on."""
        self._drop(self._services.get(service_key))

    def services(self) -> tuple[str, ...]:
        """Keys of the services that are wanted, in the order in which they came to be."""
        return tuple(key for key, one in self._services.items() if one.topic not in self._dropped)

    def want_gateway(self, gateway_key: str) -> None:
        """Asks for a Gateway by itself, for a workload that is bound to it. As `want_service`."""
        topic = _gateway_topic(gateway_key)
        if topic is not None and topic != self._following.waypoint:
            self._take_up(topic).asked = True

    def drop_gateway(self, gateway_key: str) -> None:
        """As `drop_service`. A Gateway that a wanted service is bound to stays wanted."""
        self._drop(self._gateways.get(gateway_key))

    def gateways(self) -> tuple[str, ...]:
        """Keys of the Gateways that are wanted, as `services`."""
        return tuple(key for key, one in self._gateways.items() if one.topic not in self._dropped)

    def want_address(self, ip: IpAddress) -> None:
        """Asks who lives at an address. The answer has all addresses of its shard."""
        self._address_shards.setdefault(address_shard(ip), None)

    def want_namespaces(self) -> None:
        """Asks which namespaces have services."""
        self._wants_namespaces = True

    def filters(self) -> frozenset[str]:
        """MQTT topic filters for all that is wanted now.

        Unsubscribe from all others. What was dropped is forgotten here and not before: if it is wanted again, that is
        a new subscription, and the broker sends it again.
        """
        self._forget_dropped()
        self.asks_anew = False
        found: set[Topic] = {TrustTopic()}
        if self._wants_namespaces:
            found.add(NamespacesTopic())
        trees: set[tuple[str, ...]] = set()
        for namespace in self._namespaces.values():
            found.add(RootTopic(namespace.owner))
            if namespace.kinds:
                trees |= {(level, namespace.owner) for level in ("index", *map(_LEVELS.__getitem__, namespace.kinds))}
        if self._own is not None:
            found |= {self._own[1], self._revocations}
        if self._following.waypoint is not None:
            found.add(self._following.waypoint)
        if self._addresses is not None:
            trees.add(("addr",))  # and the root: a filter x/# takes in x (MQTT 3.1.1 section 4.7.1.2)
        else:
            found |= {AddressesTopic(shard) for shard in self._address_shards}
        for wanted in self._wanted():
            found.add(wanted.topic)
            if isinstance(wanted, _WantedService):
                trees.add(("ep", wanted.topic.namespace, wanted.topic.name))  # and the manifest
            if not self._namespaces[wanted.topic.namespace].kinds:
                found.add(wanted.shard)
        return frozenset(map(self._name, found)) | {subtree(self._trust_domain, *levels) for levels in trees}

    # Messages

    def session_started(self) -> None:
        """There is a new connection to the broker, which is going to send everything again."""
        for wanted in self._services.values():
            self._endpoint_bytes -= wanted.endpoints.bytes
            wanted.endpoints.start_session()
            self._endpoint_bytes += wanted.endpoints.bytes

    def receive(self, topic: str, payload: bytes, now: float) -> Sequence[Batch]:
        """Takes one message, whatever it is; what is refused is one of the `problems`. `now` is Unix time.

        Verifies at most two signatures; `work` does what is left over.
        """
        if payload:  # an empty one says that the broker forgot a topic, not that a record is gone
            try:
                parsed = topics.parse_topic(self._trust_domain, topic)
                if not self._has(parsed, payload):
                    self._take(topic, parsed, messages.decode(payload), payload, now)
            except (TopicError, MessageError, RecordError) as error:
                self._refuse(topic, f"malformed: {error}")
            except VerifyError as error:
                self._refuse(topic, str(error))
        self._verify_next(now)
        return self._batches()

    @property
    def has_work(self) -> bool:
        """Whether there is something for `work` to do."""
        return bool(self._to_verify or self._to_settle)

    def work(self, now: float) -> Sequence[Batch]:
        """Does one step of what messages left over. For when no message is waiting."""
        if self._to_verify:
            self._verify_next(now)
        elif self._to_settle:
            self._settle(self._services[self._to_settle.popitem()[0]])
        return self._batches()

    # What is known

    @property
    def based(self) -> bool:
        """Whether the base was whole once, and is handed out: a proxy can work."""
        return self._started

    @property
    def whole(self) -> bool:
        """Whether all that is wanted is known, as of the newest roots and manifests that arrived."""
        return next(self._lacks(), None) is None

    def waiting(self) -> tuple[str, ...]:
        """What keeps it from being whole, for people."""
        found: list[str] = []
        for text in self._lacks():
            if len(found) == _MAX_TEXTS - 1:
                found.append("and more")
                break
            found.append(text)
        return tuple(found)

    def service_status(self, service_key: str) -> Status:
        """KNOWN when the state has the service with all its endpoints, and the Gateway that it is bound to if there is
        one.
        """
        wanted = self._services.get(service_key)
        if wanted is None or not wanted.settled or wanted.topic in self._dropped:
            return Status.WAITING
        if not wanted.visible:
            return Status.ABSENT
        for gateway in self._following.gateways_of(ServiceTopic(wanted.topic.namespace, wanted.topic.name)):
            if self.gateway_status(key(gateway.namespace, gateway.name)) is Status.WAITING:
                return Status.WAITING
        return Status.KNOWN if wanted.complete else Status.WAITING

    def gateway_status(self, gateway_key: str) -> Status:
        """KNOWN when the state has the Gateway."""
        topic = _gateway_topic(gateway_key)
        if topic is None:
            return Status.WAITING
        wanted = self._gateways.get(gateway_key)
        settled = wanted is not None and wanted.settled and topic not in self._dropped
        if not settled and not (self._started and topic == self._following.waypoint):
            return Status.WAITING
        return Status.KNOWN if self._namespaces[topic.namespace].record(topic) is not None else Status.ABSENT

    def namespace_status(self, namespace: str) -> Status:
        """KNOWN when it has services."""
        if self._having is None:
            return Status.WAITING
        return Status.KNOWN if namespace in self._having.names else Status.ABSENT

    def address_status(self, ip: IpAddress) -> Status:
        """KNOWN when the state knows who lives at an address. Takes 1 ms in a mesh of 100,000 addresses."""
        if not self._started:
            return Status.WAITING
        if self._addresses is not None:
            payload = self._addresses.payload(address_shard(ip))
        else:
            shard = self._address_shards.get(address_shard(ip))
            if shard is None:
                return Status.WAITING
            payload = shard.payload
        body = messages.decode(payload).body if payload is not None else None
        held = body.get("addresses") if body is not None else None
        return Status.KNOWN if isinstance(held, dict) and ip in held else Status.ABSENT

    def roots(self) -> dict[str, tuple[int, int, int]]:
        """Namespace, or `ADDRESSES`, -> epoch, version and time of issue (Unix seconds) of its applied root."""
        return {
            one.owner or ADDRESSES: (*one.applied.stamp, one.applied.issued_at)
            for one in self._all_listed()
            if one.applied is not None
        }

    def age_s(self, now: float) -> float | None:
        """Seconds since the control plane last vouched for everything that is applied; None before it did."""
        issued = [issued_at for *_, issued_at in self.roots().values()]
        return max(0.0, now - min(issued)) if issued else None

    def problems(self) -> tuple[str, ...]:
        """What was refused lately and why, newest last."""
        return tuple(self._problems)

    # The last good state

    def dump(self) -> bytes:
        """All that is handed out, for `restore`."""
        found: list[tuple[str, bytes]] = []
        services = [one for one in self._services.values() if one.visible and one.topic not in self._dropped]
        floors = dict(self._floors)
        for one in self._all_listed():
            if one.applied is not None:
                floors[one.owner or ADDRESSES] = one.applied.stamp
                root = RootTopic(one.owner) if one.owner else AddressesRootTopic()
                found += [*one.messages(), (self._name(root), one.applied.payload)]
        for wanted in services:
            namespace, name = wanted.topic.namespace, wanted.topic.name
            below = self._name(EndpointTopic(namespace, name, ""))  # once: there may be 10,000, and traffic waits
            found += [(below + workload, payload) for workload, (_, payload) in wanted.endpoints.live.items()]
            if wanted.endpoints.manifest_payload is not None:
                found.append((self._name(ManifestTopic(namespace, name)), wanted.endpoints.manifest_payload))
        shards = {number: held for number, held in self._address_shards.items() if held is not None}
        found += [(self._name(AddressesTopic(number)), held.payload) for number, held in shards.items()]
        if self._having is not None:
            found.append((self._name(NamespacesTopic()), self._having.payload))
        keys = tuple(wanted.key for wanted in services)
        return snapshot.pack(Snapshot(self._trust_domain, keys, tuple(shards), floors, tuple(found)))

    def restore(self, dumped: bytes) -> Sequence[Batch]:
        """Takes up what an earlier process dumped: after the base is wanted, and before any message.

        Nothing comes out when it does not have this base whole. Raises SnapshotError, and then nothing was taken up.
        """
        # Signatures are not verified again: a certificate that has ended meanwhile ends no configuration.
        found = snapshot.unpack(dumped)
        if found.trust_domain != self._trust_domain:
            raise SnapshotError(f"it is of the mesh {found.trust_domain}; this proxy is of {self._trust_domain}")
        self._floors = dict(found.floors)
        for one in self._all_listed():
            one.floor = self._floors.pop(one.owner or ADDRESSES, NEVER)
        self._take_up_again(found)
        self._address_shards |= dict.fromkeys(found.address_shards)
        for topic, payload in found.messages:
            try:
                parsed, envelope = topics.parse_topic(self._trust_domain, topic), messages.decode(payload)
                match parsed:
                    case RootTopic() | AddressesRootTopic():
                        self._accept(topic, parsed, envelope, payload)
                    case AddressesTopic() if self._addresses is None:
                        self._accept(topic, parsed, envelope, payload)
                    case NamespacesTopic() if self._wants_namespaces:
                        self._accept(topic, parsed, envelope, payload)
                    case _:
                        self._take(topic, parsed, envelope, payload, 0)
            except (TopicError, MessageError, RecordError, VerifyError) as error:
                self._refuse(topic, f"of the snapshot: {error}")
        while self._to_settle:
            self._settle(self._services[self._to_settle.popitem()[0]])
        return self._batches()

    # Taking messages

    def _take(self, topic: str, parsed: Topic, envelope: Envelope, payload: bytes, now: float) -> None:
        """Raises RecordError and VerifyError."""
        match parsed:
            case RootTopic() | AddressesRootTopic() | NamespacesTopic():
                self._take_signed(topic, parsed, envelope, payload, now)
            case AddressesTopic() if self._addresses is None:
                self._take_signed(topic, parsed, envelope, payload, now)
            case EndpointTopic():
                self._take_endpoint(topic, parsed, envelope, payload)
            case ManifestTopic():
                self._take_manifest(parsed, envelope, payload)
            case TrustTopic():
                self._take_trust(envelope, now)
            case StatusTopic():
                pass  # another proxy's
            case listed:
                self._take_listed(topic, listed, envelope, payload)

    def _has(self, parsed: Topic, payload: bytes) -> bool:
        """Whether this very message counts already, as most of them do that a new session brings."""
        match parsed:
            case EndpointTopic(namespace, service, workload):
                wanted = self._services.get(key(namespace, service))
                if wanted is None:
                    return False
                stamp, held = wanted.endpoints.live.get(workload, (NEVER, b""))
                if held == payload:
                    self._take_version(wanted, workload, stamp, payload)
                    self._settle_soon(wanted)
                return held == payload
            case (
                RootTopic() | AddressesRootTopic() | NamespacesTopic() | ManifestTopic() | TrustTopic() | StatusTopic()
            ):
                return False
            case _:
                listed = self._listed_for(parsed)
                return listed is not None and listed.holds(parsed, messages.digest(payload))

    def _take_trust(self, envelope: Envelope, now: float) -> None:
        if envelope.body is None:
            raise VerifyError("unsigned: it is never deleted")
        if self._verifier.trust(index.read_trust(envelope.body), now):
            self._to_verify = dict.fromkeys(self._unverified)

    def _take_signed(self, topic: str, parsed: _Signed, envelope: Envelope, payload: bytes, now: float) -> None:
        """Files what its own signature vouches for, to be verified. Raises RecordError and VerifyError."""
        waiting = self._unverified.get(topic)
        if waiting is not None and waiting[1].stamp > envelope.stamp:
            if not self._verifier.ready:
                return
            if topic in self._to_verify:
                self._verify(topic, now)
        if not self._is_news(parsed, envelope, payload):
            return
        self._unverified[topic] = (parsed, envelope, payload)
        if self._verifier.ready:
            self._to_verify[topic] = None

    def _is_news(self, parsed: _Signed, envelope: Envelope, payload: bytes) -> bool:
        """Whether something signed is of interest and not known. Raises RecordError and VerifyError."""
        if isinstance(parsed, AddressesTopic):
            if parsed.shard not in self._address_shards:
                return False
            index.read_address_shard(parsed, _signed_body(envelope))
            return _is_newer(envelope, payload, self._address_shards[parsed.shard])
        if isinstance(parsed, NamespacesTopic):
            if not self._wants_namespaces:
                return False
            index.read_namespaces(_signed_body(envelope))
            return _is_newer(envelope, payload, self._having)
        listed = self._listed_at(parsed)
        if listed is None:
            return False
        root = index.read_root(parsed, _signed_body(envelope))
        return listed.is_news(envelope.stamp, envelope.issued_at, root.shards)

    def _verify_next(self, now: float) -> None:
        """Verifies one of the signed messages that wait for it."""
        if self._to_verify:
            self._verify(next(iter(self._to_verify)), now)

    def _verify(self, topic: str, now: float) -> None:
        del self._to_verify[topic]
        parsed, envelope, payload = self._unverified[topic]
        try:
            self._verifier.check(topic, envelope, now)  # one that fails stays: its key may be yet to come
            del self._unverified[topic]
            if self._is_news(parsed, envelope, payload):
                self._accept(topic, parsed, envelope, payload)
        except (RecordError, VerifyError) as error:
            self._refuse(topic, str(error))

    def _accept(self, topic: str, parsed: _Signed, envelope: Envelope, payload: bytes) -> None:
        """Takes up something signed, now that it is verified. Raises RecordError and VerifyError."""
        if isinstance(parsed, AddressesTopic):
            self._address_shards[parsed.shard] = _HeldShard(envelope.stamp, payload)
            if self._started:
                self._emit([(topic, payload)])
            return
        if isinstance(parsed, NamespacesTopic):
            names = index.read_namespaces(_signed_body(envelope)).names
            self._having = _HeldNamespaces(envelope.stamp, payload, names)
            return
        listed = self._listed_at(parsed)
        if listed is not None:
            root = index.read_root(parsed, _signed_body(envelope))
            listed.accept(SignedRoot(envelope.stamp, envelope.issued_at, root.shards, payload))
            self._apply(listed)
            self._sweep(listed)

    def _take_listed(self, topic: str, parsed: ListedTopic, envelope: Envelope, payload: bytes) -> None:
        """Files what a root may list. A tombstone among it says nothing that the root does not."""
        listed = self._listed_for(parsed)
        if listed is None or envelope.body is None:
            return
        digest = messages.digest(payload)
        if isinstance(parsed, AddressesTopic):
            if not index.read_address_shard(parsed, envelope.body).residents:
                return  # for readers of single shards; no root lists it
        elif not isinstance(parsed, IndexTopic):
            records.read(parsed, envelope.body, self._trust_domain)
        arrival = Arrival(parsed, listed.owner, envelope.stamp, listed.vouched, payload)
        if self._inbox.put(topic, digest, arrival):
            self._refuse(topic, "too much has come that no root lists; what came first was dropped for it")
        if not listed.arrived(topic, digest):
            listed.judge(topic, digest, arrival)
        self._apply(listed)
        self._fetch_with(parsed)

    def _take_endpoint(self, topic: str, parsed: EndpointTopic, envelope: Envelope, payload: bytes) -> None:
        wanted = self._services.get(key(parsed.namespace, parsed.service))
        if wanted is None:
            return
        live = None
        if envelope.body is not None:
            records.read(parsed, envelope.body, self._trust_domain)
            if self._endpoint_bytes > MAX_ENDPOINT_BYTES:
                raise RecordError("more endpoints than this proxy can hold")
            live = payload
        if self._take_version(wanted, parsed.workload, envelope.stamp, live) and wanted.visible:
            self._emit([(topic, live)])
        self._settle_soon(wanted)

    def _take_version(self, wanted: _WantedService, workload: str, stamp: Stamp, live: bytes | None) -> bool:
        """Returns whether the workload has another endpoint now, or none."""
        self._endpoint_bytes -= wanted.endpoints.bytes
        changed = wanted.endpoints.receive(workload, stamp, live)
        self._endpoint_bytes += wanted.endpoints.bytes
        return changed

    def _take_manifest(self, parsed: ManifestTopic, envelope: Envelope, payload: bytes) -> None:
        wanted = self._services.get(key(parsed.namespace, parsed.service))
        if wanted is not None:
            manifest = _NO_ENDPOINTS if envelope.body is None else index.read_manifest(envelope.body)
            wanted.endpoints.receive_manifest(envelope.stamp, manifest, payload)
            self._settle_soon(wanted)

    # Applying what is complete

    def _apply(self, listed: Listed) -> None:
        """Applies a root, if there is one for which everything has come."""
        if self._started and listed.ready:
            self._hand_out(listed.apply())
            for wanted in self._wanted():
                if wanted.topic.namespace == listed.owner:
                    self._show(wanted)
                    self._fetch(wanted)
            self._sweep(listed)

    def _sweep(self, listed: Listed) -> None:
        """Forgets what no root is going to list. What something wanted still waits for may be listed already."""
        waiting = [wanted.topic for wanted in self._wanted() if not wanted.settled]
        shards = {wanted.shard for wanted in self._wanted() if not wanted.settled}
        listed.sweep({*map(self._name, waiting), *map(self._name, shards)})

    def _fetch_with(self, parsed: ListedTopic) -> None:
        """Looks whether a message was the last one that something wanted waited for."""
        if isinstance(parsed, WantedTopic):
            wanted = self._find(parsed)
            if wanted is not None:
                self._fetch(wanted)
        elif isinstance(parsed, IndexTopic):
            for wanted in tuple(self._by_shard.get(parsed, {}).values()):
                self._fetch(wanted)

    def _fetch(self, wanted: _Wanted) -> None:
        """Hands out what was asked for, when all of it has come, or notes that there is none."""
        if not self._started or wanted.settled:
            return
        namespace = self._namespaces[wanted.topic.namespace]
        if namespace.fetch(wanted.topic, complete=wanted.ready):
            wanted.settled = True
            record = namespace.record(wanted.topic)
            if record is not None:
                self._hand_out([(self._name(wanted.topic), record)])
            self._show(wanted)

    def _show(self, wanted: _Wanted) -> None:
        """Lets the endpoints of a service follow its record, in and out."""
        if not isinstance(wanted, _WantedService):
            return
        there = wanted.settled and self._namespaces[wanted.topic.namespace].record(wanted.topic) is not None
        if there != wanted.visible:
            wanted.visible = there
            wanted.complete = there and (wanted.complete or wanted.endpoints.whole)
            self._emit_endpoints(wanted, wanted.endpoints.live, gone=not there)

    def _settle_soon(self, wanted: _WantedService) -> None:
        if wanted.endpoints.unsettled:
            if len(wanted.endpoints.live) <= _SETTLED_AT_ONCE:
                self._settle(wanted)
            else:
                self._to_settle[wanted.key] = None

    def _settle(self, wanted: _WantedService) -> None:
        """Compares endpoints with their manifest."""
        self._endpoint_bytes -= wanted.endpoints.bytes
        changed = wanted.endpoints.settle()
        self._endpoint_bytes += wanted.endpoints.bytes
        if wanted.visible:
            self._emit_endpoints(wanted, changed)
            wanted.complete |= wanted.endpoints.whole
        self._fetch(wanted)

    # Handing out

    def _batches(self) -> Sequence[Batch]:
        if not self._started and all(one.ready for one in self._base):
            self._start()
        self._follow()
        if self._batch is None or not self._started:
            return ()
        batch, self._batch = self._batch, None
        return (batch,)

    def _start(self) -> None:
        """Hands the base out, and everything else that has come."""
        self._started = True
        self._batch = []  # also when there is nothing in it: then that is known
        for listed in list(self._all_listed()):
            self._apply(listed)
        for wanted in self._wanted():
            self._fetch(wanted)
        for number, held in self._address_shards.items():
            if held is not None:
                self._emit([(self._name(AddressesTopic(number)), held.payload)])

    def _hand_out(self, changes: Sequence[Change]) -> None:
        """Emits what roots list, and notes where it leads."""
        for name, payload in changes:
            topic = topics.parse_topic(self._trust_domain, name)
            if isinstance(topic, PolicyTopic) and self._following.waypoint is None:
                continue  # a uProxy of a workload may hold many, and they lead it nowhere
            if isinstance(topic, ServiceTopic | GatewayTopic | RouteTopic | PolicyTopic):
                body = messages.decode(payload).body if payload is not None else None
                record = records.read(topic, body, self._trust_domain) if body is not None else None
                self._following.note(topic, record)
        self._emit(changes)

    def _emit(self, changes: Iterable[Change]) -> None:
        for topic, payload in changes:
            self._serial += 1
            stamped = _tombstone(self._serial) if payload is None else _restamped(payload, self._serial)
            if self._batch is None:
                self._batch = []
            self._batch.append((topic, stamped))

    def _emit_endpoints(self, wanted: _WantedService, workloads: Iterable[str], *, gone: bool = False) -> None:
        live = {} if gone else wanted.endpoints.live
        for workload in workloads:
            _, payload = live.get(workload, (NEVER, None))
            topic = EndpointTopic(wanted.topic.namespace, wanted.topic.name, workload)
            self._emit([(self._name(topic), payload)])

    # Interests

    def _wanted(self) -> Iterator[_Wanted]:
        """All that is of interest by itself, in two groups."""
        return chain(self._services.values(), self._gateways.values())

    def _find(self, topic: WantedTopic) -> _Wanted | None:
        held = self._services if isinstance(topic, ServiceTopic) else self._gateways
        return held.get(key(topic.namespace, topic.name))

    def _take_up(self, topic: WantedTopic) -> _Wanted:
        """Makes something of interest, if it is not."""
        self._dropped.pop(topic, None)
        wanted = self._find(topic)
        if wanted is None:
            if isinstance(topic, ServiceTopic):
                service = _WantedService(topic)
                self._services[service.key] = wanted = service
            else:
                wanted = _Wanted(topic)
                self._gateways[wanted.key] = wanted
            self._by_shard.setdefault(wanted.shard, {})[topic] = wanted
            self._namespace(topic.namespace).ask(topic)
            self._fetch(wanted)
        return wanted

    def _take_up_again(self, found: Snapshot) -> None:
        """Makes of interest what an earlier process had: services, which were whole whatever was on its way at the end,
        and Gateways.
        """
        below = subtree(self._trust_domain, "gw").removesuffix("#")
        gateways = (name.removeprefix(below) for name, _ in found.messages if name.startswith(below))
        for topic in (*map(_service_topic, found.services), *map(_gateway_topic, gateways)):
            if topic is None or topic == self._following.waypoint:
                continue
            wanted = self._take_up(topic)
            if isinstance(wanted, _WantedService):
                wanted.complete = True
            if self._following.waypoint is None:
                wanted.asked = True
            else:  # a waypoint has only what it was led to, and is still, or not
                wanted.followed = True
                self._followed |= {topic}

    def _drop(self, wanted: _Wanted | None) -> None:
        if wanted is not None:
            wanted.asked = False
            self._let_go(wanted)
        # Nobody calls `filters` while there is no broker. Its next session sends everything again.
        if len(self._dropped) > _MAX_DROPPED:
            self._forget_dropped()

    def _let_go(self, wanted: _Wanted) -> None:
        """Ends the interest, if nobody has any more."""
        if not wanted.asked and not wanted.followed:
            self._dropped[wanted.topic] = None

    def _follow(self) -> None:
        """Takes up where that leads which is known now, and lets go of what nothing leads to any more."""
        while self._started and self._following.changed:  # what is taken up may be here, and lead further
            before, self._followed = self._followed, self._following.wanted()
            for topic in sorted(self._followed - before, key=self._name):
                self._take_up(topic).followed = True
            for topic in sorted(before - self._followed, key=self._name):
                wanted = self._find(topic)
                if wanted is not None:
                    wanted.followed = False
                    self._let_go(wanted)
            self.asks_anew |= self._followed != before

    def _forget_dropped(self) -> None:
        while self._dropped:
            topic = next(iter(self._dropped))
            del self._dropped[topic]
            self._forget_wanted(topic)
            self._follow()

    def _forget_wanted(self, topic: WantedTopic) -> None:
        namespace = self._namespaces[topic.namespace]
        held = self._services if isinstance(topic, ServiceTopic) else self._gateways
        wanted = held.pop(key(topic.namespace, topic.name))
        sharing = self._by_shard[wanted.shard]
        del sharing[topic]
        if not sharing:
            del self._by_shard[wanted.shard]
        if wanted.settled and namespace.record(topic) is not None:
            self._hand_out([(self._name(topic), None)])
        if isinstance(wanted, _WantedService):
            if wanted.visible:
                self._emit_endpoints(wanted, wanted.endpoints.live, gone=True)
            self._endpoint_bytes -= wanted.endpoints.bytes
            self._to_settle.pop(wanted.key, None)
        namespace.drop(topic)
        in_use = any(one.topic.namespace == namespace.owner for one in self._wanted())
        if in_use or namespace in self._base:
            self._apply(namespace)
        else:
            self._forget(namespace)

    # What belongs to what

    def _all_listed(self) -> Iterator[Listed]:
        yield from self._namespaces.values()
        if self._addresses is not None:
            yield self._addresses

    def _listed_at(self, topic: RootTopic | AddressesRootTopic) -> Listed | None:
        """What a root is the root of, when that is of interest."""
        return self._namespaces.get(topic.namespace) if isinstance(topic, RootTopic) else self._addresses

    def _listed_for(self, topic: ListedTopic) -> Listed | None:
        """Which root lists a message, when the message is of interest."""
        match topic:
            case AddressesTopic():
                return self._addresses
            case WorkloadTopic():
                own = self._own is not None and self._own[1] == topic
                return self._namespaces[self._own[0]] if own and self._own is not None else None
            case RevocationsTopic(namespace):
                return self._namespaces[namespace] if self._own is not None and topic == self._revocations else None
            case ServiceTopic() | GatewayTopic():
                of_interest = topic == self._following.waypoint or self._find(topic) is not None
                return self._namespaces[topic.namespace] if of_interest else None
            case (
                PolicyTopic(namespace)
                | RequestAuthenticationTopic(namespace)
                | TrafficTopic(namespace)
                | RouteTopic(namespace)
            ):
                found = self._namespaces.get(namespace)
                return found if found is not None and isinstance(topic, found.kinds) else None
            case IndexTopic(namespace):
                found = self._namespaces.get(namespace)
                return found if found is not None and (found.kinds or topic in self._by_shard) else None

    def _namespace(self, name: str) -> NamespaceIndex:
        found = self._namespaces.get(name)
        if found is None:
            floor = self._floors.pop(name, NEVER)
            found = NamespaceIndex(self._trust_domain, name, self._inbox, self._refuse, floor)
            found.kinds = self._kinds
            self._namespaces[name] = found
        return found

    def _forget(self, namespace: NamespaceIndex) -> None:
        """Nothing of a namespace is wanted any more."""
        self._hand_out([(topic, None) for topic in namespace.records()])
        del self._namespaces[namespace.owner]
        topic = self._name(RootTopic(namespace.owner))
        self._unverified.pop(topic, None)
        self._to_verify.pop(topic, None)
        for name, _, _ in self._inbox.of(namespace.owner):
            self._inbox.forget(name)
        if namespace.stamp != NEVER:
            self._floors[namespace.owner] = namespace.stamp
            while len(self._floors) > _MAX_FLOORS:
                del self._floors[next(iter(self._floors))]

    def _lacks(self) -> Iterator[str]:
        for one in self._all_listed():
            name = f"root/{one.owner}" if one.owner else "addr"
            if one.target is not None and one.missing:
                first = self._short(next(iter(one.missing)))
                yield f"{name}: {len(one.missing)} of what it lists, as {first}"
            elif one.target is None and one.applied is None:
                yield name
        if not self._verifier.ready and self._unverified:
            yield "trust"
        for topic in self._to_verify:
            yield f"{self._short(topic)}: its signature is not verified yet"
        for service_key in self.services():
            wanted = self._services[service_key]
            if not wanted.settled:
                yield f"svc/{service_key}"
            if (wanted.visible or not wanted.settled) and not wanted.endpoints.whole:
                yield f"ep/{service_key}: {wanted.endpoints.progress()}"
        for gateway_key in self.gateways():
            if not self._gateways[gateway_key].settled:
                yield f"gw/{gateway_key}"
        if self._wants_namespaces and self._having is None:
            yield "root"
        for number, held in self._address_shards.items():
            if held is None and self._addresses is None:
                yield self._short(self._name(AddressesTopic(number)))

    def _refuse(self, topic: str, why: str) -> None:
        text = f"{self._short(topic)[:80]}: {why}"[:_MAX_TEXT]
        if text in self._problems:
            self._problems.remove(text)
        self._problems.append(text)

    def _name(self, topic: Topic) -> str:
        return format_topic(self._trust_domain, topic)

    def _short(self, topic: str) -> str:
        return topic.removeprefix(subtree(self._trust_domain).removesuffix("#"))


def _service_topic(service_key: str) -> ServiceTopic | None:
    """None for what can be no service's key."""
    namespace, _, name = service_key.partition("/")
    return ServiceTopic(namespace, name) if not wrong_dns_label(namespace) and not wrong_service_name(name) else None


def _gateway_topic(gateway_key: str) -> GatewayTopic | None:
    """None for what can be no Gateway's key."""
    namespace, _, name = gateway_key.partition("/")
    return GatewayTopic(namespace, name) if not wrong_dns_label(namespace) and not wrong_subdomain(name) else None


def _is_newer(envelope: Envelope, payload: bytes, held: _HeldShard | _HeldNamespaces | None) -> bool:
    """Whether something that is signed by itself is to take the place of what is held. Raises VerifyError."""
    if held is None:
        return True
    if envelope.stamp < held.stamp:
        raise VerifyError(f"replayed: version {envelope.stamp} is older than {held.stamp}, which was applied")
    return payload != held.payload  # or signed again, by another key


def _signed_body(envelope: Envelope) -> messages.Body:
    if envelope.body is None:
        raise VerifyError("unsigned: it is never deleted")
    return envelope.body


def _tombstone(serial: int) -> bytes:
    return messages.encode(Envelope(_EPOCH, serial, 0, None))


def _restamped(payload: bytes, serial: int) -> bytes:
    """A message that `messages.decode` has taken, with another stamp and the same body."""
    unpacker = msgpack.Unpacker()
    unpacker.feed(payload[:_MAX_HEAD_BYTES])
    unpacker.read_array_header()
    for _ in range(3):  # schema, epoch, version
        unpacker.skip()
    head: bytes = msgpack.packb([messages.SCHEMA, _EPOCH, serial])
    return b"\x95" + head[1:] + payload[unpacker.tell() :]
