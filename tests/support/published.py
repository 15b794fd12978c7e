"""A broker without a network, and a reader who believes nothing that it holds unless roots, digests and signatures do.

Written from the description of the wire (docs/control-plane.md) and not from the code that publishes, so that the two
can disagree. `Shelf.publish` also checks the order: whatever lists something comes after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgpack
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from control.server.core import Core, Retained

PREFIX = "mesh/v1/cluster.local/"
KINDS = ("svc", "wl", "policy", "reqauth", "traffic", "gw", "route", "crl")
"""Records that the index lists."""


@dataclass
class Read:
    """What the messages on a broker amount to."""

    records: dict[str, dict] = field(default_factory=dict)
    """Topic without its prefix -> body, of records that live."""
    addresses: dict[str, list] = field(default_factory=dict)
    namespaces: set[str] = field(default_factory=set)
    """Those with a root."""


@dataclass
class Shelf:
    """What is retained, by topic."""

    retained: dict[str, bytes] = field(default_factory=dict)
    log: list[tuple[str, bytes]] = field(default_factory=list)
    """Everything that was ever published, in order."""
    highest: dict[str, list[int]] = field(default_factory=dict)
    """Topic -> epoch, version and time, of what proxies take by its stamp."""
    subscribers: list[Callable[[str, bytes], None]] = field(default_factory=list)
    """Called with whatever is published."""

    def publish(self, topic: str, payload: bytes) -> None:
        self.log.append((topic, payload))
        if payload:
            self.retained[topic] = payload
        else:
            self.retained.pop(topic, None)
        self._check_listed(topic)
        self._check_forward(topic)
        for subscriber in self.subscribers:
            subscriber(topic, payload)

    def drain(self, core: Core) -> int:
        """Publish all that is pending; returns how many messages that were."""
        count = 0
        while batch := core.pending():
            for publication in batch:
                self.publish(publication.topic, publication.payload)
            count += len(batch)
            core.published()
        return count

    def connect(self, core: Core) -> None:
        """What a publisher does at every connection."""
        held = {topic: retained(payload) for topic, payload in self.retained.items()}
        core.start_epoch(max((one.stamp[0] for one in held.values() if one.stamp), default=0))
        core.audited(held)

    def read(self) -> Read:
        """Check everything and tell what it says. Raises AssertionError."""
        found = Read()
        key = self._key()
        for topic in self.retained:
            levels = topic.removeprefix(PREFIX).split("/")
            if levels[0] == "root" and len(levels) == 2:
                found.namespaces.add(levels[1])
                self._read_namespace(levels[1], key, found)
        self._read_endpoints(found)
        self._read_addresses(key, found)
        having = {name.split("/")[1] for name in found.records if name.startswith("svc/")}
        assert self._signed("root", key)["namespaces"] == sorted(having)
        return found

    def _key(self) -> Ed25519PublicKey:
        leaf, _ = self._body("trust")["certificates"]
        key = x509.load_der_x509_certificate(leaf).public_key()
        assert isinstance(key, Ed25519PublicKey)
        return key

    def _read_namespace(self, namespace: str, key: Ed25519PublicKey, found: Read) -> None:
        root = self._signed(f"root/{namespace}", key)
        present = {levels[2]: topic for topic, levels in self._live("index") if levels[1] == namespace}
        assert root["shards"].keys() == present.keys()
        for shard, digest in root["shards"].items():
            assert sha256(self.retained[present[shard]]) == digest
            records = self._body(f"index/{namespace}/{shard}")["records"]
            assert records, "an empty shard is a tombstone"
            for entry, listed in records.items():
                assert f"{hashlib.sha256(entry.encode()).digest()[0] & 63:02x}" == shard
                kind, _, rest = entry.partition("/")
                name = entry if kind == "wl" else f"{kind}/{namespace}/{rest}".rstrip("/")
                assert sha256(self.retained[PREFIX + name]) == listed
                assert name not in found.records
                found.records[name] = self._body(name)

    def _read_endpoints(self, found: Read) -> None:
        stamps: dict[str, list] = {}
        for topic, levels in self._live("ep"):
            service = "/".join(levels[1:3])
            if len(levels) == 4:
                stamps.setdefault(service, []).append([levels[3], *self._envelope(topic)[1:3]])
                found.records["/".join(levels)] = self._envelope(topic)[4]
        manifests = {"/".join(levels[1:3]) for topic, levels in self._live("ep") if len(levels) == 3}
        assert manifests == {name.removeprefix("svc/") for name in found.records if name.startswith("svc/")}
        assert stamps.keys() <= manifests
        for service in manifests:
            manifest = self._body(f"ep/{service}")
            assert manifest["count"] == len(stamps.get(service, []))
            assert manifest["digest"] == sha256(msgpack.packb(sorted(stamps.get(service, []))))
        indexed = {name for name in found.records if not name.startswith("ep/")}
        assert indexed == {"/".join(levels) for kind in KINDS for _, levels in self._live(kind)}

    def _read_addresses(self, key: Ed25519PublicKey, found: Read) -> None:
        root = self._signed("addr", key)
        full: dict[str, bytes] = {}
        for topic, levels in self._live("addr"):
            if len(levels) == 2:
                shard = self._signed(f"addr/{levels[1]}", key)
                found.addresses |= shard["addresses"]
                if shard["addresses"]:
                    full[levels[1]] = sha256(self.retained[topic])
        assert root["shards"] == full

    def _check_listed(self, topic: str) -> None:
        """What a message lists is there already."""
        match topic.removeprefix(PREFIX).split("/"):
            case ["root", namespace] if topic in self.retained:
                for shard, digest in self._body(f"root/{namespace}")["shards"].items():
                    assert sha256(self.retained[f"{PREFIX}index/{namespace}/{shard}"]) == digest
            case ["addr"] if topic in self.retained:
                for shard, digest in self._body("addr")["shards"].items():
                    assert sha256(self.retained[f"{PREFIX}addr/{shard}"]) == digest
            case ["index", namespace, _] if self._envelope(topic)[4] is not None:
                for entry, digest in self._envelope(topic)[4]["records"].items():
                    kind, _, rest = entry.partition("/")
                    name = entry if kind == "wl" else f"{kind}/{namespace}/{rest}".rstrip("/")
                    assert sha256(self.retained[PREFIX + name]) == digest
            case ["ep", namespace, service] if self._envelope(topic)[4] is not None:
                live = [
                    [levels[3], *self._envelope(name)[1:3]]
                    for name, levels in self._live("ep")
                    if levels[1:3] == [namespace, service] and len(levels) == 4
                ]
                assert self._envelope(topic)[4]["digest"] == sha256(msgpack.packb(sorted(live)))

    def _check_forward(self, topic: str) -> None:
        """What proxies take by its stamp never goes back."""
        levels = topic.removeprefix(PREFIX).split("/")
        if levels[0] in ("root", "addr", "trust") or (levels[0] == "ep" and len(levels) == 3):
            _, *stamp, body = self._envelope(topic)
            if body is not None:
                assert stamp >= self.highest.get(topic, [0, 0, 0])
                self.highest[topic] = stamp

    def _live(self, kind: str) -> Iterable[tuple[str, list[str]]]:
        for topic in self.retained:
            levels = topic.removeprefix(PREFIX).split("/")
            if levels[0] == kind and self._envelope(topic)[4] is not None:
                yield topic, levels

    def _signed(self, name: str, key: Ed25519PublicKey) -> dict:
        _, epoch, version, issued_at, body = self._envelope(PREFIX + name)
        unsigned = {field: value for field, value in body.items() if field != "signature"}
        packed = msgpack.packb([PREFIX + name, epoch, version, issued_at, unsigned])
        key.verify(body["signature"], b"uproxy-mesh config v1\0" + packed)
        return body

    def _body(self, name: str) -> dict:
        return self._envelope(PREFIX + name)[4]

    def _envelope(self, topic: str) -> list:
        """Schema, epoch, version, issued_at, body; an index entry that was deleted has no topic or no body."""
        if topic not in self.retained:
            return [1, 0, 0, 0, None]
        return msgpack.unpackb(self.retained[topic])


def retained(payload: bytes) -> Retained:
    """What an audit says of a payload."""
    try:
        _, epoch, version, _, body = msgpack.unpackb(payload)
    except (ValueError, TypeError):
        return Retained(None, sha256(payload))
    return Retained((epoch, version), sha256(payload), body is None)


def sha256(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest()
