"""A proxy without a network: the real replica and state, fed with what a `Shelf` holds and gets."""

from __future__ import annotations

import random
from collections.abc import Callable

from cryptography.hazmat.primitives.serialization import Encoding

from control.api.identity import SpiffeId
from control.api.policy import applies
from control.client.libcrypto import ConfigVerifier
from control.client.replica import Replica
from control.client.state import State
from control.server.ca import Authority
from tests.support.oracle import Oracle
from tests.support.published import Shelf


class Follower:
    """Wants what `replica` is told to want before it connects."""

    def __init__(self, authority: Authority, shelf: Shelf, clock: Callable[[], float]) -> None:
        root = authority.root.public_bytes(Encoding.DER)
        self.replica = Replica("cluster.local", ConfigVerifier(authority.trust_domain, lambda: [root]))
        self.state = State("cluster.local")
        self._shelf = shelf
        self._clock = clock
        self._filters: frozenset[str] = frozenset()
        shelf.subscribers.append(self.receive)

    def connect(self, seed: int) -> None:
        """A new session, in which the broker sends what it retains in any order."""
        self.replica.session_started()
        self._filters = frozenset()
        self._subscribe(random.Random(seed))

    def receive(self, topic: str, payload: bytes) -> None:
        if any(_matches(one, topic) for one in self._filters):
            self._apply(self.replica.receive(topic, payload, self._clock()))
            while self.replica.has_work:
                self._apply(self.replica.work(self._clock()))
            self._subscribe(random.Random(0))

    def check(self, oracle: Oracle, identity: SpiffeId, instance: str, services: tuple[str, ...]) -> None:
        """Raises AssertionError unless what is wanted is known, and as the oracle says."""
        assert self.replica.whole, self.replica.waiting()
        for key in services:
            assert self.state.service(key) == oracle.services.get(key)
            expected = {one.workload: one for one in oracle.endpoints.values() if one.service == key}
            assert {one.workload: one for one in self.state.endpoints(key)} == expected
        own = next((one for one in oracle.mesh.workloads if (one.identity, one.name) == (identity, instance)), None)
        assert self.state.workload(f"{identity.namespace}/{instance}") == own
        if own is not None:
            assert self.state.policies_for(own) == tuple(
                one for one in oracle.mesh.policies if applies(one, own.namespace, own.labels, "mesh-system")
            )

    def check_addresses(self, oracle: Oracle) -> None:
        assert self.replica.whole, self.replica.waiting()
        assert self.state.residents() == oracle.mesh.residents()

    def _subscribe(self, order: random.Random) -> None:
        new = self.replica.filters() - self._filters
        self._filters = self.replica.filters()
        held = [topic for topic in self._shelf.retained if any(_matches(one, topic) for one in new)]
        order.shuffle(held)
        for topic in held:
            self.receive(topic, self._shelf.retained[topic])

    def _apply(self, batches) -> None:
        for batch in batches:
            self.state.apply(batch)


def _matches(pattern: str, topic: str) -> bool:
    if pattern.endswith("/#"):
        return topic == pattern[:-2] or topic.startswith(pattern[:-1])
    return topic == pattern
