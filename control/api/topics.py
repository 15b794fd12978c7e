"""Topic names, built and parsed in one place: `mesh/v1/<trust domain>/<kind>/...`, one topic per record.

A level never holds `/`, `+` or `#`: every part is a checked resource name or a proxy hash.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from control.api.identity import TrustDomain
from control.api.names import wrong_dns_label, wrong_service_name, wrong_subdomain

_ROOT: Final = "mesh/v1"
_PROXY_HASH: Final = re.compile(r"[0-9a-f]{32}")


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


Topic = ServiceTopic | EndpointTopic | WorkloadTopic | PolicyTopic


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
    raise TopicError(f"{text[:80]!r} is of no known kind (svc, ep, wl, policy) or has too many or few levels")


def _wrong_level(topic: Topic) -> str:
    match topic:
        case ServiceTopic(namespace, name):
            return wrong_dns_label(namespace) or wrong_service_name(name)
        case EndpointTopic(namespace, service, workload):
            return wrong_dns_label(namespace) or wrong_service_name(service) or wrong_subdomain(workload)
        case WorkloadTopic(proxy_hash, instance):
            hashed = "" if _PROXY_HASH.fullmatch(proxy_hash) else f"{proxy_hash!r} is not a proxy hash"
            return hashed or wrong_subdomain(instance)
        case PolicyTopic(namespace, name):
            return wrong_dns_label(namespace) or wrong_subdomain(name)
