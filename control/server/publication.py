"""Which messages make the published state equal to the desired one, in which order, with which stamps and signatures.

Pure: old messages and new bodies in, messages out. A message that need not change keeps its stamp and its bytes.

    record, manifest, index shard -> root of its namespace         address shard -> root of the addresses

Whatever stands on the right is published after what it lists, so that a proxy which sees the root finds the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Final

import msgpack

from control.api import index, messages
from control.api.address import IpAddress
from control.api.identity import TrustDomain
from control.api.index import AddressShard, IndexShard, Manifest, Namespaces, Resident, Root, Trust
from control.api.messages import Body, Envelope, MessageError, Stamp
from control.api.signing import SIGNATURE, signed_bytes
from control.api.topics import (
    ADDRESS_SHARDS,
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
    TrafficTopic,
    TrustTopic,
    WorkloadTopic,
    format_topic,
    index_entry,
    index_shard,
    parse_topic,
)

TOMBSTONE_S: Final = 7 * 24 * 3600
"""How long a deletion stays on the broker. Only who was away for longer finds out by root and manifest alone."""


class Rank(IntEnum):
    """What is published before what: a lower rank first."""

    TRUST = 0
    RECORD = 1
    MANIFEST = 2
    SHARD = 3
    ROOT = 4


@dataclass(frozen=True, slots=True)
class Message:
    """What is retained under one topic."""

    topic: str
    namespace: str
    """Whose index or manifest it belongs to; empty for addresses, trust and the list of namespaces."""
    stamp: Stamp
    rank: Rank
    payload: bytes
    content: bytes
    """SHA-256 of the body without its signature; empty for a tombstone."""
    deleted_at: int
    """Unix time at which it became a tombstone; 0 while it lives."""


@dataclass(frozen=True, slots=True)
class Pen:
    """Writes the messages of one change set."""

    trust_domain: TrustDomain
    stamp: Stamp
    now: int
    """Unix seconds."""
    sign: Callable[[bytes], bytes]

    def live(self, topic: str, namespace: str, body: Body) -> Message:
        """Raises MessageError for a body that fits in no message."""
        try:
            payload = messages.encode(Envelope(*self.stamp, self.now, body))
        except MessageError as error:
            raise MessageError(f"{topic}: {error}") from None
        return Message(topic, namespace, self.stamp, self._rank(topic), payload, content_digest(body), 0)

    def tombstone(self, topic: str, namespace: str) -> Message:
        payload = messages.encode(Envelope(*self.stamp, self.now, None))
        return Message(topic, namespace, self.stamp, self._rank(topic), payload, b"", self.now)

    def signed(self, topic: str, namespace: str, body: Body) -> Message:
        """As `live`, with the signature of what the body says now."""
        unsigned = Envelope(*self.stamp, self.now, body)
        return self.live(topic, namespace, {**body, SIGNATURE: self.sign(signed_bytes(topic, unsigned))})

    def again(self, message: Message) -> Message:
        """The same content under this pen's stamp and time, signed if it was. Raises ValueError for a tombstone."""
        body = messages.decode(message.payload).body
        if body is None:
            raise ValueError(f"{message.topic} is a tombstone, which has no content")
        write = self.signed if SIGNATURE in body else self.live
        return write(message.topic, message.namespace, body)

    def _rank(self, topic: str) -> Rank:
        return rank(_parsed(self.trust_domain, topic))


def content_digest(body: Body) -> bytes:
    """What tells whether a body has changed."""
    unsigned = {name: value for name, value in body.items() if name != SIGNATURE} if SIGNATURE in body else body
    packed: bytes = msgpack.packb(unsigned)
    return hashlib.sha256(packed).digest()


def namespace_messages(
    pen: Pen,
    namespace: str,
    old: Mapping[str, Message],
    bodies: Mapping[str, Body],
    again: frozenset[str] = frozenset(),
    unchanged: frozenset[str] = frozenset(),
) -> list[Message]:
    """The messages that change when a namespace's records become `bodies` (topic -> body), in publishing order.

    `old`: all of the namespace's messages, by topic. `again`: topics to issue once more, changed or not. `unchanged`:
    topics whose bodies are known to be the old ones, which saves a look. Raises MessageError.
    """
    changed = [
        pen.live(topic, namespace, bodies[topic])
        for topic in bodies
        if topic in again
        or (topic not in unchanged and (topic not in old or old[topic].content != content_digest(bodies[topic])))
    ]
    changed += [
        pen.tombstone(topic, namespace)
        for topic, message in old.items()
        if message.rank is Rank.RECORD and topic not in bodies and (not message.deleted_at or topic in again)
    ]
    changed += _manifests(pen, namespace, old, changed, again)
    shards = _index_shards(pen, namespace, old, changed, again)
    root = _root(pen, RootTopic(namespace), namespace, old, shards, again)
    return in_order(changed + shards + root)


def address_messages(
    pen: Pen, old: Mapping[str, Message], shards: Mapping[int, Mapping[IpAddress, Resident]]
) -> list[Message]:
    """The messages that change when address shards get new residents, in publishing order. Raises MessageError.

    `old`: the messages of these shards and of their root. An empty shard is a signed message too, since a uProxy
    takes nothing about addresses that is unsigned; the root does not list it.
    """
    changed = [
        message
        for shard, residents in shards.items()
        if (message := _address_shard(pen, shard, residents, old)) is not None
    ]
    return changed + _root(pen, AddressesRootTopic(), "", old, changed, frozenset())


def namespaces_messages(pen: Pen, old: Message | None, having: Mapping[str, bool]) -> list[Message]:
    """The list of namespaces that have services, when it changes; `having`: whether some of them have any, now."""
    body = messages.decode(old.payload).body if old is not None else None
    before = index.read_namespaces(body).names if body is not None else frozenset()
    after = before.union(name for name in having if having[name]).difference(
        name for name in having if not having[name]
    )
    return [_namespaces(pen, after)] if after != before else []


def trust_message(pen: Pen, certificates: tuple[bytes, ...]) -> Message:
    """The certificates (DER) of the key that signs: its own, then the intermediate's."""
    return pen.live(format_topic(pen.trust_domain, TrustTopic()), "", index.write(Trust(certificates)))


def reissued(pen: Pen, old: Iterable[Message]) -> list[Message]:
    """Issues again what proxies take by its stamp: manifests, roots, address shards. Other messages are left out.

    The root of the addresses and shards that there are not yet are made: a proxy that asks for one address must be
    told, by a signature, that nobody lives there. So is the list of namespaces, from the manifests.
    """
    changed: list[Message] = []
    addresses: list[Message] = []
    absent = set(range(ADDRESS_SHARDS))
    having: set[str] = set()
    has_list = False
    for message in old:
        topic = _parsed(pen.trust_domain, message.topic)
        if isinstance(topic, AddressesTopic):
            addresses.append(pen.again(message))
            absent.remove(topic.shard)
        elif isinstance(topic, NamespacesTopic):
            changed.append(pen.again(message))
            has_list = True
        elif isinstance(topic, ManifestTopic | RootTopic) and not message.deleted_at:
            changed.append(pen.again(message))
            if isinstance(topic, ManifestTopic):
                having.add(topic.namespace)
    if not has_list:
        changed.append(_namespaces(pen, having))
    nobody = index.write(AddressShard({}))
    addresses += [
        pen.signed(format_topic(pen.trust_domain, AddressesTopic(shard)), "", nobody) for shard in sorted(absent)
    ]
    return in_order([*changed, *addresses, *_root(pen, AddressesRootTopic(), "", {}, addresses, frozenset())])


def in_order(changed: Iterable[Message]) -> list[Message]:
    """Messages in publishing order; those of equal rank stay as they are."""
    return sorted(changed, key=lambda message: message.rank)


def rank(topic: Topic) -> Rank:
    match topic:
        case TrustTopic():
            return Rank.TRUST
        case ServiceTopic() | EndpointTopic() | WorkloadTopic() | GatewayTopic() | RouteTopic():
            return Rank.RECORD
        case PolicyTopic() | RequestAuthenticationTopic() | TrafficTopic() | RevocationsTopic() | StatusTopic():
            return Rank.RECORD
        case ManifestTopic():
            return Rank.MANIFEST
        case IndexTopic() | AddressesTopic() | NamespacesTopic():
            return Rank.SHARD
        case RootTopic() | AddressesRootTopic():
            return Rank.ROOT


@lru_cache(maxsize=16_384)  # each topic of a namespace is looked at several times while its messages are made
def _parsed(trust_domain: TrustDomain, topic: str) -> Topic:
    return parse_topic(trust_domain, topic)


def _manifests(
    pen: Pen, namespace: str, old: Mapping[str, Message], changed: Sequence[Message], again: frozenset[str]
) -> list[Message]:
    """The manifests of services that came, went or got other endpoints."""
    concerned: set[str] = set()
    for name in (*again, *(message.topic for message in changed)):
        match _parsed(pen.trust_domain, name):
            case ServiceTopic(_, service) | EndpointTopic(_, service) | ManifestTopic(_, service):
                concerned.add(service)
    if not concerned:
        return []
    held = {**old, **{message.topic: message for message in changed}}
    stamps = _endpoint_stamps(pen.trust_domain, concerned, held)
    found: list[Message] = []
    for service in sorted(concerned):
        name = format_topic(pen.trust_domain, ManifestTopic(namespace, service))
        before = old.get(name)
        record = held.get(format_topic(pen.trust_domain, ServiceTopic(namespace, service)))
        if record is not None and not record.deleted_at:
            body = index.write(Manifest(len(stamps[service]), index.manifest_digest(stamps[service])))
            if before is None or before.content != content_digest(body) or name in again:
                found.append(pen.live(name, namespace, body))
        elif before is not None and (not before.deleted_at or name in again):
            found.append(pen.tombstone(name, namespace))
    return found


def _endpoint_stamps(
    trust_domain: TrustDomain, services: Collection[str], held: Mapping[str, Message]
) -> dict[str, dict[str, Stamp]]:
    """Service -> workload -> stamp, of the endpoints of some services that live."""
    stamps: dict[str, dict[str, Stamp]] = {service: {} for service in services}
    for name, message in held.items():
        # A cheap look first, at what may be thousands of topics.
        if not message.deleted_at and name.rsplit("/", 2)[1] in stamps:
            match _parsed(trust_domain, name):
                case EndpointTopic(_, service, workload):
                    stamps[service][workload] = message.stamp
    return stamps


def _index_shards(
    pen: Pen, namespace: str, old: Mapping[str, Message], changed: Iterable[Message], again: frozenset[str]
) -> list[Message]:
    """The shards whose entries changed. An empty one is a tombstone."""
    entries: dict[int, dict[str, Message]] = {}
    for message in changed:
        topic = _parsed(pen.trust_domain, message.topic)
        if isinstance(topic, IndexedTopic):
            entry = index_entry(topic)
            entries.setdefault(index_shard(entry), {})[entry] = message
    for topic_name in again:
        match _parsed(pen.trust_domain, topic_name):
            case IndexTopic(_, number):
                entries.setdefault(number, {})
    found: list[Message] = []
    for shard, new in sorted(entries.items()):
        shard_topic = IndexTopic(namespace, shard)
        name = format_topic(pen.trust_domain, shard_topic)
        listed = _listed(shard_topic, old.get(name))
        for entry, message in new.items():
            if message.deleted_at:
                listed.pop(entry, None)
            else:
                listed[entry] = messages.digest(message.payload)
        if listed:
            body = index.write(IndexShard({entry: listed[entry] for entry in sorted(listed)}))
            found.append(pen.live(name, namespace, body))
        elif name in old:
            found.append(pen.tombstone(name, namespace))
    return found


def _listed(topic: IndexTopic, message: Message | None) -> dict[str, bytes]:
    body = messages.decode(message.payload).body if message is not None else None
    return dict(index.read_index_shard(topic, body).records) if body is not None else {}


def _namespaces(pen: Pen, names: Collection[str]) -> Message:
    topic = format_topic(pen.trust_domain, NamespacesTopic())
    return pen.signed(topic, "", index.write(Namespaces(frozenset(names))))


def _address_shard(
    pen: Pen, shard: int, residents: Mapping[IpAddress, Resident], old: Mapping[str, Message]
) -> Message | None:
    """The shard, when it changed."""
    topic = format_topic(pen.trust_domain, AddressesTopic(shard))
    body = index.write(AddressShard({address: residents[address] for address in sorted(residents)}))
    unchanged = topic in old and old[topic].content == content_digest(body)
    return None if unchanged else pen.signed(topic, "", body)


def _root(
    pen: Pen,
    topic: RootTopic | AddressesRootTopic,
    namespace: str,
    old: Mapping[str, Message],
    changed: Iterable[Message],
    again: frozenset[str],
) -> list[Message]:
    """The root above some shards, when one of these changed or there was none yet."""
    name = format_topic(pen.trust_domain, topic)
    body = messages.decode(old[name].payload).body if name in old else None
    shards = dict(index.read_root(topic, body).shards) if body is not None else {}
    touched = name not in old or name in again
    for message in changed:
        match _parsed(pen.trust_domain, message.topic):
            case IndexTopic(_, shard) | AddressesTopic(shard):
                touched = True
                if _is_empty(message):
                    shards.pop(shard, None)
                else:
                    shards[shard] = messages.digest(message.payload)
    return [pen.signed(name, namespace, index.write(Root(shards)))] if touched else []


def _is_empty(shard: Message) -> bool:
    return bool(shard.deleted_at) or shard.content == _NO_ADDRESSES


_NO_ADDRESSES: Final = content_digest(index.write(AddressShard({})))
