"""Bodies that say what there is, rather than what it is: index shards, roots, addresses, manifests, trust.

As in `records`: strict, canonical, `read_x(write(x)) == x`. Signatures and digests are only carried here; whether they
are right is the reader's business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgpack

from control.api.address import IpAddress
from control.api.fields import (
    Fields,
    RecordError,
    check_distinct,
    check_ordered,
    checked,
    number_in,
    read_address,
    read_binding,
    read_labels,
    read_port,
    typed,
    write_binding,
)
from control.api.gateway import Binding
from control.api.identity import TrustDomain, make_id
from control.api.labels import Labels
from control.api.messages import Body, Stamp, Value
from control.api.names import wrong_dns_label, wrong_service_name, wrong_subdomain
from control.api.signing import SIGNATURE, SIGNATURE_BYTES
from control.api.topics import (
    ADDRESS_SHARDS,
    INDEX_SHARDS,
    AddressesRootTopic,
    AddressesTopic,
    IndexTopic,
    RootTopic,
    TopicError,
    address_shard,
    entry_topic,
    format_shard,
    index_shard,
    parse_shard,
)
from control.api.workload import Workload, key

DIGEST_BYTES: Final = 32
MAX_ENDPOINTS: Final = 1_000_000  # of one service; as many topics as a proxy holds at most
_MAX_CERTIFICATES: Final = 4  # leaf and intermediate, and room for a longer chain
_MAX_CERTIFICATE_BYTES: Final = 8192  # ours have some 600


@dataclass(frozen=True, slots=True)
class IndexShard:
    """Part of what decides security in a namespace."""

    records: Mapping[str, bytes] = field(hash=False)
    """Entry (`topics.index_entry`) -> SHA-256 of the record's whole payload."""


@dataclass(frozen=True, slots=True)
class Root:
    """All shards of a namespace's index, or of the addresses: applied whole or not at all."""

    shards: Mapping[int, bytes] = field(hash=False)
    """Shard -> SHA-256 of its whole payload, of those that are not empty."""
    signature: bytes = b""
    """Of `signing.signed_bytes`; empty until it is signed."""


@dataclass(frozen=True, slots=True)
class ResidentService:
    """A service's virtual address."""

    namespace: str
    name: str
    ports: tuple[int, ...]
    bound: bool = False
    """Whether callers go through a waypoint, or are to refuse, rather than connect directly."""
    datagrams: tuple[int, ...] = ()
    """Ports, in order, to which datagrams may go in plaintext."""

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)


@dataclass(frozen=True, slots=True)
class Placed:
    """Which process of a waypoint a workload is, for the node agent that starts it."""

    gateway: str
    """Name of its Gateway, in its namespace."""
    node: str


@dataclass(frozen=True, slots=True)
class ResidentWorkload:
    """A workload's address: whom to expect there."""

    namespace: str
    name: str
    service_account: str
    labels: Labels = field(hash=False)
    """Those of `labels.telemetry` only."""
    bindings: tuple[tuple[int, Binding], ...] = ()
    """Port -> how callers reach it at this address, in the order of ports, each once. 0: every port that has none of
    its own."""
    datagrams: tuple[int, ...] = ()
    """As of a service."""
    placed: Placed | None = None
    """None: it is no process of a waypoint, or of one whose processes are not of one node each."""

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)

    def binding_at(self, port: int) -> Binding | None:
        """How callers reach a port; None: directly."""
        for bound, binding in self.bindings:
            if bound == port:
                return binding
        return self.bindings[0][1] if self.bindings and self.bindings[0][0] == 0 else None

    def as_workload(self, trust_domain: TrustDomain, address: IpAddress) -> Workload:
        """The workload as far as it is known from one of its addresses."""
        return Workload(
            namespace=self.namespace,
            name=self.name,
            service_account=self.service_account,
            identity=make_id(trust_domain, self.namespace, self.service_account),
            addresses=(address,),
            labels=self.labels,
            ports={},
            node="",
            weight=1,
        )


Resident = ResidentService | ResidentWorkload


@dataclass(frozen=True, slots=True)
class AddressShard:
    """Who lives at some of the mesh's addresses."""

    residents: Mapping[IpAddress, Resident] = field(hash=False)
    signature: bytes = b""
    """As of a root: a proxy that wants one address reads its shard alone. Empty where nobody signs (files)."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Which endpoints a service has, so that a proxy knows when it has them all."""

    count: int
    digest: bytes
    """`manifest_digest` of them."""


@dataclass(frozen=True, slots=True)
class Namespaces:
    """All namespaces that have services, so that a proxy knows of a name that nobody has it."""

    names: frozenset[str]
    signature: bytes = b""
    """As of a root."""


@dataclass(frozen=True, slots=True)
class Trust:
    """Proves itself: its certificates lead to the CA's root, which every proxy has pinned."""

    certificates: tuple[bytes, ...]
    """DER: the config key's, then the intermediate's."""


Content = IndexShard | Root | Namespaces | AddressShard | Manifest | Trust


def write(content: Content) -> Body:
    """The body of any of them. A signature is written as it is; sign `signing.signed_bytes`, then write it again."""
    match content:
        case IndexShard():
            return {"records": dict(content.records)}
        case Root():
            shards: Body = {format_shard(shard): content.shards[shard] for shard in sorted(content.shards)}
            return {"shards": shards, SIGNATURE: content.signature}
        case Namespaces():
            return {"namespaces": list[Value](sorted(content.names)), SIGNATURE: content.signature}
        case AddressShard():
            addresses: Body = {ip: write_resident(resident) for ip, resident in content.residents.items()}
            return {"addresses": addresses, SIGNATURE: content.signature}
        case Manifest():
            return {"count": content.count, "digest": content.digest}
        case Trust():
            return {"certificates": list(content.certificates)}


def read_index_shard(topic: IndexTopic, body: Body) -> IndexShard:
    """Raises RecordError, also for an entry that belongs in another shard."""
    fields = Fields(body)
    records: dict[str, bytes] = {}
    for entry, value in fields.take("records", dict).items():
        _check_entry(topic, entry)
        records[entry] = _digest(value, "records")
    fields.finish()
    return IndexShard(records)


def read_root(topic: RootTopic | AddressesRootTopic, body: Body) -> Root:
    """Raises RecordError."""
    count = INDEX_SHARDS if isinstance(topic, RootTopic) else ADDRESS_SHARDS
    fields = Fields(body)
    shards = {_shard(name, count): _digest(value, "shards") for name, value in fields.take("shards", dict).items()}
    root = Root(shards, _signature(fields))
    fields.finish()
    return root


def read_namespaces(body: Body) -> Namespaces:
    """Raises RecordError."""
    fields = Fields(body)
    names = [
        checked(typed(item, str, "namespaces"), wrong_dns_label, "namespaces")
        for item in fields.take("namespaces", list)
    ]
    check_ordered(names, "namespaces")
    namespaces = Namespaces(frozenset(names), _signature(fields))
    fields.finish()
    return namespaces


def read_address_shard(topic: AddressesTopic, body: Body) -> AddressShard:
    """Raises RecordError, also for an address that belongs in another shard."""
    fields = Fields(body)
    residents: dict[IpAddress, Resident] = {}
    for text, value in fields.take("addresses", dict).items():
        address = read_address(text, "addresses")
        if address_shard(address) != topic.shard:
            raise RecordError(f"addresses: {address} belongs in shard {format_shard(address_shard(address))}")
        residents[address] = read_resident(value)
    shard = AddressShard(residents, _signature(fields))
    fields.finish()
    return shard


def read_manifest(body: Body) -> Manifest:
    """Raises RecordError."""
    fields = Fields(body)
    manifest = Manifest(fields.number("count", 0, MAX_ENDPOINTS), _digest(fields.take("digest", bytes), "digest"))
    fields.finish()
    return manifest


def read_trust(body: Body) -> Trust:
    """Raises RecordError. Whether the certificates are to be trusted is not looked at."""
    fields = Fields(body)
    certificates = tuple(typed(item, bytes, "certificates") for item in fields.take("certificates", list))
    if not 1 <= len(certificates) <= _MAX_CERTIFICATES:
        raise RecordError(f"certificates has {len(certificates)}; it must have from 1 to {_MAX_CERTIFICATES}")
    if not all(1 <= len(one) <= _MAX_CERTIFICATE_BYTES for one in certificates):
        raise RecordError(f"certificates has one that is not from 1 to {_MAX_CERTIFICATE_BYTES} bytes")
    fields.finish()
    return Trust(certificates)


def write_resident(resident: Resident) -> Value:
    """One entry of an address shard."""
    match resident:
        case ResidentService(namespace, name, ports, bound, datagrams):
            # Said only where it is so, so that all other entries are those of before there was this; likewise below.
            rest: list[Value] = [bound, list(datagrams)] if datagrams else [True] if bound else []
            return ["s", namespace, name, list(ports), *rest]
        case ResidentWorkload(namespace, name, service_account, labels, bindings, datagrams, placed):
            listed: list[Value] = [[port, *write_binding(binding)] for port, binding in bindings]
            if placed is not None:
                rest = [listed, list(datagrams), [placed.gateway, placed.node]]
            else:
                rest = [listed, list(datagrams)] if datagrams else [listed] if listed else []
            return ["w", namespace, name, service_account, dict(labels), *rest]


def read_resident(value: Value) -> Resident:
    """Raises RecordError."""
    match value:
        case ["s", namespace, name, ports, *rest] if rest in ([], [True]) or len(rest) == 2:
            found = tuple(read_port(port, "addresses") for port in typed(ports, list, "addresses"))
            check_distinct(found, "addresses")
            return ResidentService(
                _name(namespace, wrong_dns_label),
                _name(name, wrong_service_name),
                found,
                bound=bool(rest) and typed(rest[0], bool, "addresses"),
                datagrams=_read_datagrams(rest),
            )
        case ["w", namespace, name, service_account, labels, *rest] if len(rest) <= 3:
            return ResidentWorkload(
                _name(namespace, wrong_dns_label),
                _name(name, wrong_subdomain),
                _name(service_account, wrong_subdomain),
                read_labels(labels, "addresses"),
                _read_bound(rest),
                _read_datagrams(rest),
                _read_placed(rest),
            )
    raise RecordError(
        'addresses: each must be ["s", namespace, name, [ports]], with true when bound, or '
        '["w", namespace, name, service account, {labels}], with [[port, gateway, via]] when bound; '
        "or with that, false or [] if not bound, and [ports] for datagrams; of a workload, behind these, "
        "[gateway, node] of a process of a waypoint"
    )


def _read_bound(rest: list[Value]) -> tuple[tuple[int, Binding], ...]:
    """From what stands behind the fields that every workload has: its bindings, then ports for datagrams."""
    match rest:
        case [] | [[], _, *_]:
            return ()
        case _:
            return _read_bindings(rest[0])


def _read_datagrams(rest: list[Value]) -> tuple[int, ...]:
    """From what stands behind the fields that every resident has: how it is bound, then these."""
    if len(rest) < 2:
        return ()
    found = tuple(read_port(port, "addresses") for port in typed(rest[1], list, "addresses"))
    if not found and len(rest) == 2:
        raise RecordError("addresses: ports for datagrams are empty; they must then be absent")
    check_ordered(found, "addresses")
    return found


def _read_placed(rest: list[Value]) -> Placed | None:
    """From what stands behind all these."""
    match rest[2:]:
        case []:
            return None
        case [[gateway, node]]:
            return Placed(_name(gateway, wrong_subdomain), typed(node, str, "addresses"))
    raise RecordError("addresses: a process of a waypoint must be [gateway, node]")


def _read_bindings(value: Value) -> tuple[tuple[int, Binding], ...]:
    found: list[tuple[int, Binding]] = []
    for item in typed(value, list, "addresses"):
        match item:
            case [port, *binding]:
                found.append((number_in(port, 0, 65535, "addresses"), read_binding(binding, "addresses")))
            case _:
                raise RecordError("addresses: each binding must be [port, gateway, via], or with more behind it")
    if not found:
        raise RecordError("addresses: bindings are empty; they must then be absent")
    check_ordered([port for port, _ in found], "addresses")
    return tuple(found)


def shard_addresses(residents: Mapping[IpAddress, Resident]) -> dict[int, AddressShard]:
    """Shard -> its residents, in the order of their addresses' text, of the shards that are not empty; unsigned."""
    shards: dict[int, dict[IpAddress, Resident]] = {}
    for address in sorted(residents):
        shards.setdefault(address_shard(address), {})[address] = residents[address]
    return {shard: AddressShard(shards[shard]) for shard in sorted(shards)}


def manifest_digest(stamps: Mapping[str, Stamp]) -> bytes:
    """SHA-256 over a service's endpoints. `stamps`: name of the workload (its topic level) -> stamp of the endpoint."""
    listed = [[name, *stamps[name]] for name in sorted(stamps)]
    packed: bytes = msgpack.packb(listed)
    return hashlib.sha256(packed).digest()


def _check_entry(topic: IndexTopic, entry: str) -> None:
    try:
        entry_topic(topic.namespace, entry)
    except TopicError as error:
        raise RecordError(f"records: {error}") from None
    if index_shard(entry) != topic.shard:
        raise RecordError(f"records: {entry[:80]!r} belongs in shard {format_shard(index_shard(entry))}")


def _shard(name: str, count: int) -> int:
    try:
        return parse_shard(name, count)
    except TopicError as error:
        raise RecordError(f"shards: {error}") from None


def _digest(value: Value, name: str) -> bytes:
    return _bytes_of(value, (DIGEST_BYTES,), name)


def _signature(fields: Fields) -> bytes:
    return _bytes_of(fields.take(SIGNATURE, bytes), (0, SIGNATURE_BYTES), SIGNATURE)


def _bytes_of(value: Value, lengths: tuple[int, ...], name: str) -> bytes:
    found = typed(value, bytes, name)
    if len(found) not in lengths:
        raise RecordError(f"{name} has {len(found)} bytes; it must have {' or '.join(map(str, lengths))}")
    return found


def _name(value: Value, wrong: Callable[[str], str]) -> str:
    return checked(typed(value, str, "addresses"), wrong, "addresses")
