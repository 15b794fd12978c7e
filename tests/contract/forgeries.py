"""What a broker in wrong hands can send: each kind of forgery, made of what the control plane has really signed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from control.api import messages
from control.api.messages import Envelope
from tests.contract.world import Ledger

Forgery = Callable[[Ledger, random.Random], Iterator[tuple[str, bytes]]]
"""(topic without its prefix, payload), to be retained."""


def _newest(ledger: Ledger, *kinds: str) -> list[tuple[str, bytes]]:
    """The newest payload of every live topic of these kinds."""
    found = [(topic, issued[-1]) for topic, issued in sorted(ledger.issued.items()) if topic.split("/")[0] in kinds]
    return [(topic, payload) for topic, payload in found if payload and messages.decode(payload).body is not None]


def unsigned_root(ledger: Ledger, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """A newer root that lists nothing, with a signature of zeros."""
    for topic, payload in _newest(ledger, "root", "addr"):
        envelope = messages.decode(payload)
        if topic.startswith("root/") or topic == "addr":
            body = {"shards": {}, "signature": bytes(64)}
            yield topic, messages.encode(Envelope(envelope.epoch, envelope.version + 1000, envelope.issued_at, body))


def altered_root(ledger: Ledger, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """A root with a newer stamp under its old signature."""
    for topic, payload in _newest(ledger, "root"):
        envelope = messages.decode(payload)
        yield topic, messages.encode(Envelope(envelope.epoch, envelope.version + 1, envelope.issued_at, envelope.body))


def moved_root(ledger: Ledger, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """A real root under another namespace's topic."""
    roots = dict(_newest(ledger, "root"))
    if {"root/bank", "root/shop"} <= roots.keys():
        yield "root/shop", roots["root/bank"]


def replayed(ledger: Ledger, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """An old state of the whole mesh, as far as it goes: everything really signed once."""
    # Records before what lists them: a proxy tells of the last few that it refused.
    for topic, issued in sorted(ledger.issued.items(), reverse=True):
        if issued[0] and not topic.startswith("ep/"):
            yield topic, issued[0]


def mixed(ledger: Ledger, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Old records under the newest roots: a new service with an old policy."""
    for topic, issued in sorted(ledger.issued.items()):
        if topic.split("/")[0] in ("svc", "policy", "wl", "gw", "route") and len(issued) > 1 and issued[0]:
            yield topic, issued[0]


def altered_record(ledger: Ledger, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """A policy that allows everybody, a service with another identity and without a waypoint, a waypoint elsewhere and
    a route that leads nowhere, under stamps of the real ones or newer.
    """
    for topic, payload in _newest(ledger, "policy"):
        envelope = messages.decode(payload)
        body = {**(envelope.body or {}), "action": "ALLOW", "rules": []}
        yield topic, messages.encode(Envelope(envelope.epoch, envelope.version, envelope.issued_at, body))
    for topic, payload in _newest(ledger, "svc"):
        envelope = messages.decode(payload)
        body = {**(envelope.body or {}), "identities": ["spiffe://cluster.local/ns/shop/sa/thief"]}
        body.pop("binding", None)
        yield topic, messages.encode(Envelope(envelope.epoch, envelope.version + 9, envelope.issued_at, body))
    for kind, change in (("gw", {"instances": [["thief", "10.6.6.6"]]}), ("route", {"hostnames": ["thief"]})):
        for topic, payload in _newest(ledger, kind):
            envelope = messages.decode(payload)
            body = {**(envelope.body or {}), **change}
            yield topic, messages.encode(Envelope(envelope.epoch, envelope.version, envelope.issued_at, body))


def altered_addresses(ledger: Ledger, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Address shards that are empty, under the signatures of the real ones."""
    for topic, payload in _newest(ledger, "addr"):
        envelope = messages.decode(payload)
        if envelope.body is not None and envelope.body.get("addresses"):
            body = {**envelope.body, "addresses": {}}
            yield topic, messages.encode(Envelope(envelope.epoch, envelope.version + 1, envelope.issued_at, body))


def garbage(ledger: Ledger, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Bytes that mean nothing, under every topic."""
    for topic in sorted(ledger.issued):
        yield topic, chance.randbytes(20)


def withheld(ledger: Ledger, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Index shards and records that the broker has forgotten."""
    for topic, _ in _newest(ledger, "index", "policy", "gw", "route"):
        yield topic, b""


FORGERIES: dict[str, Forgery] = {
    forgery.__name__: forgery
    for forgery in (
        unsigned_root,
        altered_root,
        moved_root,
        replayed,
        mixed,
        altered_record,
        altered_addresses,
        garbage,
        withheld,
    )
}
