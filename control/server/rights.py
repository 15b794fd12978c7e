"""Who may read and write what on the broker: the least that each identity needs, in MQTT's own terms.

Everything follows from the identity, and from whether there is a Gateway of its name, so that two brokers, or a broker
restored from a backup, cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from control.api.identity import SpiffeId, TrustDomain, make_id, proxy_hash
from control.api.policy import DEFAULT_ROOT_NAMESPACE
from control.api.topics import RevocationsTopic, TrustTopic, format_topic, subtree

BROKER_ACCOUNT: Final = "broker"
CONTROL_PLANE_ACCOUNT: Final = "control-plane"
NODE_PREFIX: Final = "node-"


@dataclass(frozen=True, slots=True)
class Rights:
    """What one identity may do. Whatever is not named is refused."""

    identity: SpiffeId
    reads: tuple[str, ...]
    """Topics, and filters that end in `/#`, which stand for their parent too."""
    writes: tuple[str, ...]
    """Topics and filters it may publish to, in a last will as anywhere."""


def control_plane_id(trust_domain: TrustDomain) -> SpiffeId:
    return make_id(trust_domain, DEFAULT_ROOT_NAMESPACE, CONTROL_PLANE_ACCOUNT)


def broker_id(trust_domain: TrustDomain) -> SpiffeId:
    """Whom every client expects to find behind the broker's address."""
    return make_id(trust_domain, DEFAULT_ROOT_NAMESPACE, BROKER_ACCOUNT)


def is_node(identity: SpiffeId) -> bool:
    """Whether this is a host's node agent."""
    return identity.namespace == DEFAULT_ROOT_NAMESPACE and identity.service_account.startswith(NODE_PREFIX)


def rights_of(identity: SpiffeId, *, waypoint: bool = False) -> Rights:
    """What this identity may do; `waypoint`: it is that of a Gateway's processes, which hold policies for others."""
    domain = identity.trust_domain
    if identity == control_plane_id(domain):
        return Rights(identity, (subtree(domain),), (subtree(domain),))
    digest = proxy_hash(identity)
    reads = [format_topic(domain, TrustTopic()), subtree(domain, "addr")]
    if not is_node(identity):
        reads += [subtree(domain, kind) for kind in ("svc", "ep", "gw", "index", "root")]
        if waypoint:
            reads += [subtree(domain, kind) for kind in ("policy", "reqauth", "traffic", "route")]
        else:
            namespaces = sorted({identity.namespace, DEFAULT_ROOT_NAMESPACE})
            reads += [subtree(domain, "policy", namespace) for namespace in namespaces]
        reads.append(subtree(domain, "wl", digest))
        reads.append(format_topic(domain, RevocationsTopic(DEFAULT_ROOT_NAMESPACE)))
    # One level below the hash, and not a subtree: a proxy has one status topic per instance, and no others.
    return Rights(identity, tuple(reads), (subtree(domain, "status", digest).removesuffix("#") + "+",))
