"""Topic names, built and parsed in one place: `mesh/v1/<trust domain>/<kind>/...`.

svc/<ns>/<name>, ep/<ns>/<service>/<workload>, wl/<proxy hash>/<instance>, policy/<ns>/<name>, gw/<ns>/<name>,
route/<ns>/<name>, reqauth/<ns>/<name>, traffic/<ns>/<name>
                                one record each
ep/<ns>/<service>               manifest: how many endpoints a service has, and which
index/<ns>/<00..3f>, root/<ns>  the records that decide security, by SHA-256, and the signed root above them
root                            which namespaces have services, signed
addr/<00..ff>, addr             who lives at which address, and the signed root above that
trust                           the certificates of the key that signs
status/<proxy hash>/<instance>  what a proxy has applied; a proxy's only publication

A level never holds `/`, `+` or `#`: every part is a checked resource name, a proxy hash or a shard's number.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from control.api.address import IpAddress, packed16
from control.api.identity import TrustDomain
from control.api.names import wrong_dns_label, wrong_service_name, wrong_subdomain

INDEX_SHARDS: Final = 64
"""Of one namespace."""
ADDRESS_SHARDS: Final = 256

_ROOT: Final = "mesh/v1"
_KINDS: Final = "svc, ep, wl, policy, reqauth, traffic, gw, route, crl, index, root, addr, trust, status"
_PROXY_HASH: Final = re.compile(r"[0-9a-f]{32}")
_SHARD: Final = re.compile(r"[0-9a-f]{2}")


class TopicError(ValueError):
    """A topic that is none of this mesh's."""


@dataclass(frozen=True, slots=True, order=True)
class ServiceTopic:
    namespace: str
    name: str


@dataclass(frozen=True, slots=True, order=True)
class EndpointTopic:
    """One workload of one service; both are of the same namespace."""

    namespace: str
    service: str
    workload: str


@dataclass(frozen=True, slots=True, order=True)
class WorkloadTopic:
    proxy_hash: str
    """Of the workload's identity, so that a broker can let a proxy read its own level only."""
    instance: str
    """The workload's name."""


@dataclass(frozen=True, slots=True, order=True)
class PolicyTopic:
    namespace: str
    name: str


@dataclass(frozen=True, slots=True, order=True)
class RequestAuthenticationTopic:
    namespace: str
    name: str


@dataclass(frozen=True, slots=True, order=True)
class TrafficTopic:
    """A TrafficPolicy."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True, order=True)
class GatewayTopic:
    """A waypoint."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True, order=True)
class RouteTopic:
    """An HTTPRoute."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True, order=True)
class RevocationsTopic:
    """Certificates that are revoked. There is one, in the root namespace."""

    namespace: str


@dataclass(frozen=True, slots=True, order=True)
class ManifestTopic:
    """Which endpoints one service has."""

    namespace: str
    service: str


@dataclass(frozen=True, slots=True, order=True)
class IndexTopic:
    """One shard of a namespace's index."""

    namespace: str
    shard: int


@dataclass(frozen=True, slots=True, order=True)
class RootTopic:
    """The signed root of a namespace's index."""

    namespace: str


@dataclass(frozen=True, slots=True, order=True)
class NamespacesTopic:
    """Which namespaces have services."""


@dataclass(frozen=True, slots=True, order=True)
class AddressesTopic:
    """One shard of the addresses."""

    shard: int


@dataclass(frozen=True, slots=True, order=True)
class AddressesRootTopic:
    """The signed root of the addresses."""


@dataclass(frozen=True, slots=True, order=True)
class TrustTopic:
    """The certificates of the key that signs."""


@dataclass(frozen=True, slots=True, order=True)
class StatusTopic:
    """What one proxy reports of itself."""

    proxy_hash: str
    instance: str


IndexedTopic = (
    ServiceTopic
    | WorkloadTopic
    | PolicyTopic
    | RequestAuthenticationTopic
    | TrafficTopic
    | GatewayTopic
    | RouteTopic
    | RevocationsTopic
)
"""What decides security. Endpoints do not: identity is checked, so a stale one can only fail."""
RecordTopic = IndexedTopic | EndpointTopic
Topic = (
    RecordTopic
    | ManifestTopic
    | IndexTopic
    | RootTopic
    | NamespacesTopic
    | AddressesTopic
    | AddressesRootTopic
    | TrustTopic
    | StatusTopic
)


def format_topic(trust_domain: TrustDomain, topic: Topic) -> str:
    """The topic's name on the broker."""
    return f"{_ROOT}/{trust_domain}/{_levels_of(topic)}"


def parse_topic(trust_domain: TrustDomain, text: str) -> Topic:
    """The topic of this name. Raises TopicError: another trust domain, an unknown kind, a malformed level."""
    prefix = f"{_ROOT}/{trust_domain}/"
    if not text.startswith(prefix):
        raise TopicError(f"{text[:80]!r} is not under {prefix!r}")
    topic = _topic_of(text.removeprefix(prefix).split("/"), text)
    wrong = _wrong_level(topic)
    if wrong:
        raise TopicError(f"{text[:80]!r}: {wrong}")
    return topic


def subtree(trust_domain: TrustDomain, *levels: str) -> str:
    """The MQTT filter for everything under some levels, as `mesh/v1/cluster.local/policy/shop/#`; without: all."""
    return "/".join((_ROOT, trust_domain, *levels, "#"))


def index_entry(topic: IndexedTopic) -> str:
    """A record's name in its namespace's index: the topic without trust domain and namespace."""
    match topic:
        case ServiceTopic(_, name):
            return f"svc/{name}"
        case WorkloadTopic(proxy_hash, instance):
            return f"wl/{proxy_hash}/{instance}"
        case PolicyTopic(_, name):
            return f"policy/{name}"
        case RequestAuthenticationTopic(_, name):
            return f"reqauth/{name}"
        case TrafficTopic(_, name):
            return f"traffic/{name}"
        case GatewayTopic(_, name):
            return f"gw/{name}"
        case RouteTopic(_, name):
            return f"route/{name}"
        case RevocationsTopic():
            return "crl"


def entry_topic(namespace: str, entry: str) -> IndexedTopic:
    """The record that an entry of a namespace's index stands for. Raises TopicError."""
    topic: IndexedTopic
    match entry.split("/"):
        case ["svc", name]:
            topic = ServiceTopic(namespace, name)
        case ["wl", proxy_hash, instance]:
            topic = WorkloadTopic(proxy_hash, instance)
        case ["policy", name]:
            topic = PolicyTopic(namespace, name)
        case ["reqauth", name]:
            topic = RequestAuthenticationTopic(namespace, name)
        case ["traffic", name]:
            topic = TrafficTopic(namespace, name)
        case ["gw", name]:
            topic = GatewayTopic(namespace, name)
        case ["route", name]:
            topic = RouteTopic(namespace, name)
        case ["crl"]:
            topic = RevocationsTopic(namespace)
        case _:
            known = "svc, wl, policy, reqauth, traffic, gw, route, crl"
            raise TopicError(f"{entry[:80]!r} is no entry of an index ({known})")
    wrong = _wrong_level(topic)
    if wrong:
        raise TopicError(f"{entry[:80]!r}: {wrong}")
    return topic


def index_shard(entry: str) -> int:
    """Which shard of its namespace's index lists this entry."""
    return hashlib.sha256(entry.encode()).digest()[0] % INDEX_SHARDS


def address_shard(address: IpAddress) -> int:
    """Which shard says who lives at this address."""
    return hashlib.sha256(packed16(address)).digest()[0]


def format_shard(shard: int) -> str:
    """A shard's number as topics and roots write it: two hex digits."""
    return f"{shard:02x}"


def parse_shard(text: str, shards: int) -> int:
    """The number of one of so many shards. Raises TopicError."""
    if not _SHARD.fullmatch(text) or int(text, 16) >= shards:
        raise TopicError(f"{text[:20]!r} is no shard from 00 to {format_shard(shards - 1)}")
    return int(text, 16)


def _levels_of(topic: Topic) -> str:
    match topic:
        case ServiceTopic(namespace, name):
            return f"svc/{namespace}/{name}"
        case EndpointTopic(namespace, service, workload):
            return f"ep/{namespace}/{service}/{workload}"
        case WorkloadTopic(proxy_hash, instance):
            return f"wl/{proxy_hash}/{instance}"
        case PolicyTopic(namespace, name):
            return f"policy/{namespace}/{name}"
        case RequestAuthenticationTopic(namespace, name):
            return f"reqauth/{namespace}/{name}"
        case TrafficTopic(namespace, name):
            return f"traffic/{namespace}/{name}"
        case GatewayTopic(namespace, name):
            return f"gw/{namespace}/{name}"
        case RouteTopic(namespace, name):
            return f"route/{namespace}/{name}"
        case RevocationsTopic(namespace):
            return f"crl/{namespace}"
        case ManifestTopic(namespace, service):
            return f"ep/{namespace}/{service}"
        case IndexTopic(namespace, shard):
            return f"index/{namespace}/{format_shard(shard)}"
        case RootTopic(namespace):
            return f"root/{namespace}"
        case NamespacesTopic():
            return "root"
        case AddressesTopic(shard):
            return f"addr/{format_shard(shard)}"
        case AddressesRootTopic():
            return "addr"
        case TrustTopic():
            return "trust"
        case StatusTopic(proxy_hash, instance):
            return f"status/{proxy_hash}/{instance}"


def _topic_of(levels: list[str], text: str) -> Topic:
    match levels:
        case ["svc", namespace, name]:
            return ServiceTopic(namespace, name)
        case ["ep", namespace, service, workload]:
            return EndpointTopic(namespace, service, workload)
        case ["wl", proxy_hash, instance]:
            return WorkloadTopic(proxy_hash, instance)
        case ["policy", namespace, name]:
            return PolicyTopic(namespace, name)
        case ["reqauth", namespace, name]:
            return RequestAuthenticationTopic(namespace, name)
        case ["traffic", namespace, name]:
            return TrafficTopic(namespace, name)
        case ["gw", namespace, name]:
            return GatewayTopic(namespace, name)
        case ["route", namespace, name]:
            return RouteTopic(namespace, name)
        case ["crl", namespace]:
            return RevocationsTopic(namespace)
        case ["ep", namespace, service]:
            return ManifestTopic(namespace, service)
        case ["index", namespace, shard]:
            return IndexTopic(namespace, parse_shard(shard, INDEX_SHARDS))
        case ["root", namespace]:
            return RootTopic(namespace)
        case ["root"]:
            return NamespacesTopic()
        case ["addr", shard]:
            return AddressesTopic(parse_shard(shard, ADDRESS_SHARDS))
        case ["addr"]:
            return AddressesRootTopic()
        case ["trust"]:
            return TrustTopic()
        case ["status", proxy_hash, instance]:
            return StatusTopic(proxy_hash, instance)
    raise TopicError(f"{text[:80]!r} is of no known kind ({_KINDS}) or has too many or few levels")


def _wrong_level(topic: Topic) -> str:
    match topic:
        case ServiceTopic(namespace, name) | ManifestTopic(namespace, name):
            return wrong_dns_label(namespace) or wrong_service_name(name)
        case EndpointTopic(namespace, service, workload):
            return wrong_dns_label(namespace) or wrong_service_name(service) or wrong_subdomain(workload)
        case WorkloadTopic(proxy_hash, instance) | StatusTopic(proxy_hash, instance):
            hashed = "" if _PROXY_HASH.fullmatch(proxy_hash) else f"{proxy_hash!r} is not a proxy hash"
            return hashed or wrong_subdomain(instance)
        case (
            PolicyTopic(namespace, name)
            | RequestAuthenticationTopic(namespace, name)
            | TrafficTopic(namespace, name)
            | GatewayTopic(namespace, name)
            | RouteTopic(namespace, name)
        ):
            return wrong_dns_label(namespace) or wrong_subdomain(name)
        case IndexTopic(namespace) | RootTopic(namespace) | RevocationsTopic(namespace):
            return wrong_dns_label(namespace)
        case NamespacesTopic() | AddressesTopic() | AddressesRootTopic() | TrustTopic():
            return ""
