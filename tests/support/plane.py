"""A control plane, a broker and proxies without a network: what they tell each other, and what can go wrong between.

The messages are made by the real publication and signed by a real key; registry and store are dictionaries here, and
the broker delivers in the order that a test asks for.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from control.api import messages, records
from control.api.address import IpAddress
from control.api.identity import SpiffeId
from control.api.index import Resident
from control.api.messages import Body, Stamp
from control.api.records import Record
from control.api.signing import CONFIG_KEY_OID
from control.api.topics import (
    AddressesTopic,
    NamespacesTopic,
    RecordTopic,
    RootTopic,
    ServiceTopic,
    StatusTopic,
    Topic,
    address_shard,
    format_topic,
    parse_topic,
)
from control.api.workload import Workload
from control.client.libcrypto import ConfigVerifier
from control.client.replica import Batch, Replica
from control.client.state import State
from control.server import publication
from control.server.publication import Message, Pen, Rank
from tests.support.certificates import forge, forge_ca
from tests.support.records import TRUST_DOMAIN

CONTROL_PLANE = f"spiffe://{TRUST_DOMAIN}/ns/mesh-system/sa/control-plane"
ROOT_NAMESPACE = "mesh-system"

NOW = time.time()
"""When it is, here."""

_ROOT = forge_ca(None, "root", path_length=1)
_INTERMEDIATE = forge_ca(_ROOT, "intermediate", path_length=0)

Publication = tuple[str, bytes]


@dataclass(frozen=True)
class Signer:
    """A config key, the certificates that prove it, and the root they lead to."""

    key: Ed25519PrivateKey
    certificates: tuple[bytes, bytes]
    root: bytes

    def verifier(self) -> ConfigVerifier:
        return ConfigVerifier(TRUST_DOMAIN, lambda: [self.root])


@cache
def signer(number: int = 0) -> Signer:
    """One of several keys of one mesh."""
    key = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
    purposes = (x509.ObjectIdentifier(CONFIG_KEY_OID),)
    # Made when it is needed, and valid at NOW, which is when the tests were loaded.
    leaf = forge(_INTERMEDIATE, (CONTROL_PLANE,), key=key, purposes=purposes, not_before=timedelta(hours=-12))
    return Signer(key, (leaf.der, _INTERMEDIATE.der), _ROOT.der)


@dataclass
class Truth:
    """What the mesh should be: records by topic, and who lives where."""

    records: dict[RecordTopic, Record] = field(default_factory=dict)
    residents: dict[IpAddress, Resident] = field(default_factory=dict)

    def put(self, *found: Record) -> None:
        for record in found:
            self.records[records.topic_of(record)] = record

    def namespaces(self) -> set[str]:
        return {namespace_of(record) for record in self.records.values()} | {ROOT_NAMESPACE}


def namespace_of(record: Record) -> str:
    """Whose index or manifest a record belongs to."""
    return record.identity.namespace if isinstance(record, Workload) else records.topic_of(record).namespace


class ControlPlane:
    """Publishes a truth. Every method returns what it publishes, in order."""

    def __init__(self, now: int, key: Signer | None = None) -> None:
        self.now = now
        self.signer = key or signer()
        self.truth = Truth()
        self.store: dict[str, Message] = {}
        self.epoch = 0
        self.version = 0
        self.history: dict[tuple[str, tuple[int, int]], Truth] = {}
        """(topic, stamp) of each root, manifest and address shard -> the truth as of it."""

    def start(self, seen: int = 0) -> list[Publication]:
        """A new epoch, above all that was seen."""
        self.epoch, self.version = max(self.epoch + 1, seen + 1, self.now), 0
        pen = self._pen()
        above = [message for message in self.store.values() if message.rank in (Rank.MANIFEST, Rank.ROOT)]
        addresses = [message for message in self.store.values() if not message.namespace and message not in above]
        changed = [publication.trust_message(pen, self.signer.certificates)]
        changed += publication.reissued(pen, above + addresses)
        if self._topic(RootTopic(ROOT_NAMESPACE)) not in self.store:
            changed += publication.namespace_messages(pen, ROOT_NAMESPACE, {}, {})
        return self._commit(changed)

    def publish(self, truth: Truth) -> list[Publication]:
        """A change set."""
        before, self.truth = self.truth, Truth(dict(truth.records), dict(truth.residents))
        pen = self._pen()
        changed: list[Message] = []
        for namespace in sorted(before.namespaces() | truth.namespaces()):
            bodies = {
                self._topic(topic): records.write(record)
                for topic, record in truth.records.items()
                if namespace_of(record) == namespace
            }
            changed += publication.namespace_messages(pen, namespace, self._held(namespace), bodies)
        shards = {address_shard(ip): {} for ip in before.residents | truth.residents}
        for ip, resident in truth.residents.items():
            shards[address_shard(ip)][ip] = resident
        changed += publication.address_messages(pen, self._held(""), shards)
        having = {
            namespace: any(topic.namespace == namespace for topic in truth.records if isinstance(topic, ServiceTopic))
            for namespace in before.namespaces() | truth.namespaces()
        }
        published = self.store.get(self._topic(NamespacesTopic()))
        changed += publication.namespaces_messages(pen, published, having)
        return self._commit(changed)

    def refresh(self) -> list[Publication]:
        """Every root signed anew."""
        roots = [message for message in self.store.values() if message.rank is Rank.ROOT]
        return self._commit([replace(self._pen(), stamp=root.stamp).again(root) for root in roots])

    def collect(self) -> list[Publication]:
        """Tombstones that everybody must have seen are cleared from the broker."""
        gone = [topic for topic, message in self.store.items() if message.deleted_at]
        for topic in gone:
            del self.store[topic]
        return [(topic, b"") for topic in gone]

    def backup(self) -> ControlPlane:
        """All that a control plane knows which is restored later."""
        found = copy.copy(self)
        found.store = dict(self.store)
        return found

    def audit(self, retained: Mapping[str, bytes]) -> list[Publication]:
        """Makes the broker hold what the store does, whoever published there meanwhile; for every connection."""
        stamps = {topic: messages.decode(payload).stamp for topic, payload in retained.items()}
        differing = [message for topic, message in self.store.items() if retained.get(topic) != message.payload]
        pen, changed = self._pen(), []
        newer: dict[str, set[str]] = {}
        for message in differing:
            if stamps.get(message.topic, (-1, -1)) >= message.stamp:
                newer.setdefault(message.namespace, set()).add(message.topic)
        for namespace, topics in newer.items():
            held = self._held(namespace)
            if namespace:
                bodies = {t: body for t, m in held.items() if m.rank is Rank.RECORD and (body := _body(m)) is not None}
                changed += publication.namespace_messages(pen, namespace, held, bodies, frozenset(topics))
            else:
                changed += publication.reissued(pen, held.values())
        for topic in retained.keys() - self.store.keys():
            parsed = parse_topic(TRUST_DOMAIN, topic)
            if isinstance(parsed, RootTopic):
                changed += publication.namespace_messages(pen, parsed.namespace, {}, {})
            elif isinstance(parsed, AddressesTopic):
                changed += publication.address_messages(pen, self._held(""), {parsed.shard: {}})
            elif not isinstance(parsed, StatusTopic):
                changed.append(pen.tombstone(topic, getattr(parsed, "namespace", "")))
        again = {message.topic for message in changed}
        older = [(m.topic, m.payload) for m in publication.in_order(differing) if m.topic not in again]
        return older + self._commit(changed)

    def change_key(self, number: int) -> list[Publication]:
        """Another config key; everything that is signed is signed again."""
        self.signer = signer(number)
        pen = self._pen()
        changed = [publication.trust_message(pen, self.signer.certificates)]
        return self._commit(changed + publication.reissued(pen, list(self.store.values())))

    def _pen(self) -> Pen:
        return Pen(TRUST_DOMAIN, (self.epoch, self.version + 1), self.now, self.signer.key.sign)

    def _commit(self, changed: Iterable[Message]) -> list[Publication]:
        found = publication.in_order({message.topic: message for message in changed}.values())
        if any(message.stamp == (self.epoch, self.version + 1) for message in found):
            self.version += 1
        for message in found:
            self.store[message.topic] = message
            if message.rank is not Rank.RECORD:
                self.history[message.topic, message.stamp] = self.truth
        return [(message.topic, message.payload) for message in found]

    def _held(self, namespace: str) -> dict[str, Message]:
        return {topic: message for topic, message in self.store.items() if message.namespace == namespace}

    def _topic(self, topic: Topic) -> str:
        return format_topic(TRUST_DOMAIN, topic)


def _body(message: Message):
    return messages.decode(message.payload).body


class Proxy:
    """A replica with its state, and the messages that are on their way to it."""

    def __init__(self, want: Callable[[Replica], None], key: Signer | None = None) -> None:
        self._want = want
        self._signer = key or signer()
        self.queue: list[Publication] = []
        self.subscribed: frozenset[str] = frozenset()
        self.held: dict[str, Body] = {}
        """Topic -> body of all that the replica has handed out."""
        self._boot()

    def _boot(self) -> None:
        self.held.clear()
        self._last: Stamp = (0, 0)
        self.replica = Replica(TRUST_DOMAIN, self._signer.verifier(), ROOT_NAMESPACE)
        self.state = State(TRUST_DOMAIN, ROOT_NAMESPACE)
        self._want(self.replica)

    def restart(self, snapshot: bytes | None) -> None:
        """A new process, which may find what an earlier one left. Not connected."""
        self.disconnect()
        self._boot()
        if snapshot is not None:
            self._apply(self.replica.restore(snapshot))

    def connect(self, retained: Mapping[str, bytes]) -> None:
        """A new session: the broker sends all that is retained."""
        self.disconnect()
        self.replica.session_started()
        self.subscribe(retained)

    def disconnect(self) -> None:
        """What was on its way is lost."""
        self.queue.clear()
        self.subscribed = frozenset()

    def subscribe(self, retained: Mapping[str, bytes]) -> None:
        """Follow the replica's interests."""
        wanted = self.replica.filters()
        fresh = wanted - self.subscribed
        self.subscribed = wanted
        self.queue += [(topic, payload) for topic, payload in retained.items() if _matches(fresh, topic)]

    def hear(self, published: Iterable[Publication]) -> None:
        """What the broker passes on."""
        self.queue += [(topic, payload) for topic, payload in published if _matches(self.subscribed, topic)]

    def deliver(self, now: float, at: int = 0) -> None:
        """The message at a place of the queue arrives."""
        self._apply(self.replica.receive(*self.queue.pop(at), now))

    def deliver_all(self, now: float) -> None:
        """Everything arrives in order, and all work is done."""
        while self.queue:
            self.deliver(now)
        self.idle(now)

    def flush(self, now: float) -> None:
        """Something arrives that says nothing."""
        self._apply(self.replica.receive("", b"", now))

    def idle(self, now: float) -> None:
        while self.replica.has_work:
            self._apply(self.replica.work(now))

    def _apply(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self.state.apply(batch)
            for topic, payload in batch:
                envelope = messages.decode(payload)
                assert envelope.stamp > self._last, "the state would not take it"
                self._last = envelope.stamp
                if envelope.body is None:
                    del self.held[topic]  # nothing is taken back that was not handed out
                else:
                    self.held[topic] = envelope.body


def uproxy(identity: SpiffeId, instance: str) -> Proxy:
    """Beside one workload."""
    return Proxy(lambda replica: replica.want_workload(identity, instance))


def node_agent() -> Proxy:
    return Proxy(lambda replica: replica.want_all_addresses())


def _matches(filters: Iterable[str], topic: str) -> bool:
    """MQTT 3.1.1 section 4.7, without `+`."""
    return any(
        topic == one or (one.endswith("/#") and (topic == one[:-2] or topic.startswith(one[:-1]))) for one in filters
    )


class Broker:
    """Retains, and passes on to whoever is connected."""

    def __init__(self, *proxies: Proxy) -> None:
        self.retained: dict[str, bytes] = {}
        self.proxies = proxies
        self.log: list[Publication] = []
        """All that was ever published."""

    def publish(self, published: Iterable[Publication]) -> None:
        for topic, payload in published:
            if payload:
                self.retained[topic] = payload
                self.log.append((topic, payload))
            else:
                self.retained.pop(topic, None)
            for proxy in self.proxies:
                proxy.hear([(topic, payload)])

    def epoch(self) -> int:
        """The highest that anything retained has."""
        return max((messages.decode(payload).epoch for payload in self.retained.values()), default=0)
