"""Makes the broker hold what `Core` says, over one MQTT connection at a time, and hears what proxies report.

At every connection it first reads all that the broker holds (the *audit*), because a broker may have been wiped,
restored, or written to by a control plane that is gone. Then it publishes what differs, and what changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import random
import secrets
import time
from collections.abc import Sequence
from typing import Final

from control.api import messages, status
from control.api.fields import RecordError
from control.api.identity import TrustDomain
from control.api.messages import MessageError
from control.api.topics import StatusTopic, TopicError, parse_topic, subtree
from control.client.mqtt import Arrivals, BrokerAccess, BrokerError, Connection, connection
from control.server.core import MAX_EPOCH_AHEAD_S, Core, Publication, Retained
from control.server.store import StoreError

MAX_IN_FLIGHT: Final = 16
"""Publishes that wait for their PUBACK. More fill the broker's queues and gain little."""
RAISE_PAUSE_S: Final = 600.0
"""Between two epochs that are taken because proxies report higher ones. Each publishes half of everything again, and
whoever has a proxy's key can report any."""
REFRESH_S: Final = 30.0
"""How often roots are signed again: a proxy knows by them how old its configuration is."""

_QUIET_S: Final = 0.3
_AUDIT_TIMEOUT_S: Final = 120.0
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0
_MESSAGES_AT_ONCE: Final = 64

_log = logging.getLogger(__name__)


class Publisher:
    """Carries a `Core` to a broker."""

    def __init__(self, core: Core, access: BrokerAccess) -> None:
        """`access`: as the control plane, to any of several brokers that are one cluster."""
        self._core = core
        self._access = access
        self._trust_domain: TrustDomain = access.identity.trust_domain
        self._client_id = f"control-plane-{secrets.token_hex(16)}"
        self._statuses = subtree(self._trust_domain, "status").removesuffix("#")
        self._wake = asyncio.Event()
        self._stirred = asyncio.Event()
        """Something that is bound to a waypoint may go on."""
        self._ending = False
        """Python 3.11's TaskGroup drops a cancellation that meets a failure, such as the loss of the connection."""
        self._epoch_seen = 0
        """The highest that anybody has published, or that a proxy has applied."""
        self.connected = False
        self.problem = "not connected yet"
        """Why it is not connected; empty when it is."""
        self.published = False
        """Whether the broker has acknowledged all that there is to publish."""
        self.messages = 0
        """That a broker has acknowledged."""

    async def run(self) -> None:
        """Publish until cancelled; a broker that goes away is dialled again."""
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(self._wake.set)

        def stir() -> None:
            loop.call_soon_threadsafe(self._stirred.set)

        self._core.on_pending = wake
        self._core.on_progress = stir
        async with asyncio.TaskGroup() as group:
            group.create_task(self._refresh())
            group.create_task(self._reconnect())
            try:
                await asyncio.Event().wait()
            finally:
                self._ending = True

    async def _refresh(self) -> None:
        loop = asyncio.get_running_loop()
        raised_at = -math.inf
        while True:
            await asyncio.sleep(REFRESH_S)
            if self._epoch_seen > self._core.epoch and loop.time() - raised_at > RAISE_PAUSE_S:
                # A proxy that was away remembers more than our store and the broker do.
                raised_at = loop.time()
                try:
                    await self._raise_epoch()
                except StoreError as error:
                    _log.error("no new epoch can be taken: %s", error)
            await asyncio.to_thread(self._core.refresh)

    async def _reconnect(self) -> None:
        pause, attempt = _FIRST_PAUSE_S, 0
        while True:
            url = self._access.urls[attempt % len(self._access.urls)]
            attempt += 1
            try:
                async with connection(self._access, url, self._client_id) as broker:
                    await self._serve(broker)
            except* (BrokerError, StoreError) as lost:  # a disk that is full may have room again
                pause = _FIRST_PAUSE_S if self.connected else min(2 * pause, _LONGEST_PAUSE_S)
                self.problem = f"{url}: {_first(lost)}"
                _log.warning("broker %s", self.problem)
            finally:
                self.connected = self.published = False
            if self._ending:
                return
            await asyncio.sleep(random.uniform(0.0, pause))

    async def _serve(self, broker: Connection) -> None:
        """What one connection is for, until it is lost: raises a group of BrokerError then."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._carry(broker))
            # In the body, not in a task: in Python 3.11 a task that fails while a group waits for its end leaves its
            # parent's count of cancellations raised, and the next timeout in the parent ends as a cancellation.
            await broker.lost()

    async def _carry(self, broker: Connection) -> None:
        async with asyncio.TaskGroup() as group:
            audit = _Audit()
            # From the first moment: while what has arrived is not taken, the socket is not read, and no answer arrives.
            group.create_task(self._hear(broker.arrivals, audit))
            await self._read_all(broker, audit)
            await self._raise_epoch()
            await asyncio.to_thread(self._core.audited, audit.held)
            self.connected, self.problem = True, ""
            _log.info("connected to the broker, which holds %d records", len(audit.held))
            await asyncio.to_thread(self._core.resume)
            group.create_task(self._advance())
            await self._publish(broker)

    async def _raise_epoch(self) -> None:
        seen, self._epoch_seen = self._epoch_seen, 0
        await asyncio.to_thread(self._core.start_epoch, seen)

    async def _read_all(self, broker: Connection, audit: _Audit) -> None:
        """Has the broker tell everything that it holds.

        MQTT has no mark at the end of retained messages. A broker by itself sends them before it answers the next
        request; one of a cluster may not, and then silence is all there is to go by. Statuses are asked for twice:
        what is published in the moment of a subscription may be lost (`control.client.subscriptions`).
        """
        everything, statuses = [subtree(self._trust_domain)], [self._statuses + "#"]
        try:
            async with asyncio.timeout(_AUDIT_TIMEOUT_S):
                await _grant(broker, everything)
                await _grant(broker, statuses)
                await audit.silence()
                await _grant(broker, statuses)
        except TimeoutError:
            raise BrokerError(f"it was still sending records after {_AUDIT_TIMEOUT_S:.0f} s") from None
        await broker.unsubscribe(everything)

    async def _hear(self, arrivals: Arrivals, audit: _Audit) -> None:
        while True:
            await arrivals.wait()
            for topic, payload in itertools.islice(iter(arrivals.take, None), _MESSAGES_AT_ONCE):
                if topic.startswith(self._statuses):
                    self._status(topic, payload)
                else:
                    audit.take(topic, payload)
                    self._epoch_seen = max(self._epoch_seen, audit.epoch)
            await asyncio.sleep(0)

    def _status(self, topic: str, payload: bytes) -> None:
        self._core.status_received(topic, payload)
        applied = _epoch_applied(self._trust_domain, topic, payload)
        if applied <= time.time() + MAX_EPOCH_AHEAD_S:  # or it would hide what others report
            self._epoch_seen = max(self._epoch_seen, applied)

    async def _advance(self) -> None:
        """Brings bindings to waypoints on, as proxies report that they follow. While no report is heard, nobody can be
        waited for, so nothing goes on.
        """
        while True:
            self._stirred.clear()
            wait = await asyncio.to_thread(self._core.advance)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._stirred.wait()

    async def _publish(self, broker: Connection) -> None:
        while True:
            self._wake.clear()
            batch = await asyncio.to_thread(self._core.pending)
            if not batch:
                self.published = True
                await self._wake.wait()
                continue
            self.published = False
            await _send(broker, batch)
            self.messages += len(batch)
            self._core.published()


class _Audit:
    """What the broker holds, but for statuses."""

    def __init__(self) -> None:
        self.held: dict[str, Retained] = {}
        """By topic."""
        self.epoch = 0
        """The highest of all."""
        self._news = asyncio.Event()

    def take(self, topic: str, payload: bytes) -> None:
        self._news.set()
        try:
            envelope = messages.decode(payload)
        except MessageError:
            self.held[topic] = Retained(None, messages.digest(payload))
            return
        self.epoch = max(self.epoch, envelope.epoch)
        self.held[topic] = Retained(envelope.stamp, messages.digest(payload), tombstone=envelope.body is None)

    async def silence(self) -> None:
        """Until nothing has come for a while."""
        with contextlib.suppress(TimeoutError):
            while True:
                self._news.clear()
                async with asyncio.timeout(_QUIET_S):
                    await self._news.wait()


def _first(group: BaseExceptionGroup[BrokerError | StoreError]) -> BaseException:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def _epoch_applied(trust_domain: TrustDomain, topic: str, payload: bytes) -> int:
    """The highest epoch of a root that a proxy has applied; 0 where it cannot be told."""
    try:
        parsed, body = parse_topic(trust_domain, topic), messages.decode(payload).body
        if not isinstance(parsed, StatusTopic) or body is None:
            return 0
        return max((epoch for epoch, _, _ in status.read(parsed, body).roots.values()), default=0)
    except (TopicError, MessageError, RecordError):
        return 0


async def _grant(broker: Connection, filters: Sequence[str]) -> None:
    refused = await broker.subscribe(filters)
    if refused:
        raise BrokerError(f"it does not let the control plane read {', '.join(sorted(refused))}: check its users")


async def _send(broker: Connection, batch: Sequence[Publication]) -> None:
    """Publish in this order, which the broker keeps; returns when it has acknowledged all."""
    room = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def one(publication: Publication) -> None:
        try:
            await broker.publish(publication.topic, publication.payload)
        finally:
            room.release()

    async with asyncio.TaskGroup() as group:
        for publication in batch:
            await room.acquire()
            group.create_task(one(publication))
