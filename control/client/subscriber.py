"""Keeps a proxy's replica in step with the broker: connects, subscribes, feeds what arrives, reports, and again.

Runs in the loop that carries the data plane's traffic, so it works in slices. Only proxies that have joined import it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final

from control.api.identity import proxy_hash
from control.client.mqtt import Arrivals, BrokerAccess, BrokerError, Connection, LastWill, connection
from control.client.replica import Batch, Replica
from control.client.subscriptions import Subscriptions

SLICE_S: Final = 0.002
"""Work on messages at a stretch; between two slices the data plane has its turn."""
REPORT_INTERVAL_S: Final = 20.0
"""A report is due at least so often; the lease in it is three times that."""
REPORT_PAUSE_S: Final = 0.05
"""Between two reports in the long run, so that a burst of changes is few reports."""
REPORTS_AT_ONCE: Final = 4
"""So many may follow each other without a pause: a change in steps waits for a report at each of them."""

_FIRST_RETRY_S: Final = 0.2
_LAST_RETRY_S: Final = 30.0
# A connection that held for so long was good: after it, the next attempt is prompt again.
_HEALTHY_S: Final = 10.0
# What was refused or brought nothing is asked for again: the broker may not have read its rules or its store yet.
_FIRST_DOUBT_S: Final = 1.0
_LAST_DOUBT_S: Final = 30.0
_FILTERS_AT_ONCE: Final = 64  # of some 80 bytes each

Report = Callable[[bool, int], tuple[str, bytes]]
"""(online, version) -> topic and payload of a status with this version in its envelope.

Versions rise; that of a connection's last will is above those of its reports and below those of the next connection,
wherever the broker has told the will by then.
"""
_VERSIONS_PER_CONNECTION: Final = 2**32

log = logging.getLogger(__name__)


class _Renewed(Exception):
    """Ends a connection, for another one: with a new certificate, or without reports."""


class Subscriber:
    """The control plane's line to one replica. All methods belong to the loop."""

    def __init__(
        self,
        replica: Replica,
        access: BrokerAccess,
        on_batch: Callable[[Batch], None],
        report: Report,
        now: Callable[[], float] = time.time,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_batch` takes what the replica hands out. `now`: Unix time in seconds.

        `on_progress` is called after each slice: the replica may know more, also where it handed out nothing.
        """
        self._replica = replica
        self._access = access
        self._on_batch = on_batch
        self._report = report
        self._now = now
        self._on_progress = on_progress
        # Nobody can guess it, so nobody else can take the session over; and ourselves we do, when a connection is dead
        # and the broker has not noticed.
        self._client_id = f"{proxy_hash(access.identity)}-{secrets.token_hex(16)}"
        self._connections = 0
        self._interests = asyncio.Event()
        self._report_due = asyncio.Event()
        self._renewed = asyncio.Event()
        self._subscriptions = Subscriptions()
        """Of the present connection."""
        self._heard_at = 0.0
        self._refused: frozenset[str] = frozenset()
        """What the broker refuses, as last told."""
        self._silent = False
        self._fault = "not connected to the broker yet"
        self._bug = ""
        self.connected = False
        """Whether the broker is there, and has accepted our subscriptions."""

    def interests_changed(self) -> None:
        """The replica wants to hear of more, or of less."""
        self._interests.set()

    def status_changed(self) -> None:
        """There is something new to report."""
        self._report_due.set()

    def certificate_renewed(self) -> None:
        """Connect again, with the new certificate."""
        self._renewed.set()

    def fall_silent(self) -> None:
        """Follow on, and report no more: somebody else does for this proxy. Not even our end is told then."""
        self._silent = True
        self._renewed.set()

    def problems(self) -> tuple[str, ...]:
        """What keeps the replica from hearing all that it wants to."""
        refused = [f"the broker refuses to let us read {name}" for name in sorted(self._refused)]
        return tuple(text for text in (self._fault, *refused, self._bug) if text)

    async def run(self) -> None:
        """For ever: one connection after the other, to any of the brokers."""
        task = asyncio.current_task()
        failures = 0
        for url in _in_turn(self._access.urls):
            started = time.monotonic()
            try:
                await self._connection(url)
                continue
            except BrokerError as error:
                self._lost(url, str(error))
            except Exception as error:
                # No thread or memory left, or our bug: the data plane keeps going with what it has.
                log.exception("the connection to the broker failed")
                self._lost(url, f"internal error: {error!r}")
            if task is not None and task.cancelling():
                # Python 3.11's TaskGroup drops a cancellation that meets a failure, here the loss of the connection.
                raise asyncio.CancelledError
            failures = 0 if time.monotonic() - started > _HEALTHY_S else failures + 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_retry_delay_s(failures)):
                    await self._renewed.wait()  # the certificate may have been what was wrong

    async def _connection(self, url: str) -> None:
        """One connection. Returns when there is a new certificate to connect with, or nothing more to report; raises
        BrokerError.
        """
        self._connections += 1
        self._renewed.clear()
        first_version = self._connections * _VERSIONS_PER_CONNECTION
        will: LastWill | None = None
        if not self._silent:
            will = LastWill(*self._report(False, first_version + _VERSIONS_PER_CONNECTION - 1))
        async with connection(self._access, url, self._client_id, will) as broker:
            self._replica.session_started()
            self._subscriptions = Subscriptions()
            try:
                with contextlib.suppress(_Renewed), _one_of(BrokerError, _Renewed):
                    async with asyncio.TaskGroup() as group:
                        group.create_task(broker.lost())
                        group.create_task(self._feed(broker.arrivals))
                        group.create_task(self._subscribe(broker, url))
                        if will is not None:
                            group.create_task(self._send_reports(broker, first_version))
                        await self._renewed.wait()
                        raise _Renewed
            finally:
                self.connected = False

    async def _feed(self, arrivals: Arrivals) -> None:
        while True:
            if not self._replica.has_work:
                await arrivals.wait()
            end = time.perf_counter() + SLICE_S
            while time.perf_counter() < end and self._step(arrivals):
                pass
            if self._replica.asks_anew:
                self._interests.set()
            self._on_progress()
            await asyncio.sleep(0)

    def _step(self, arrivals: Arrivals) -> bool:
        """Handle one message, or what messages left over. Returns whether there may be more."""
        message = arrivals.take()
        if message is None and not self._replica.has_work:
            return False
        try:
            if message is not None:
                self._heard_at = time.monotonic()
                self._subscriptions.heard(message[0])
                batches = self._replica.receive(*message, self._now())
            else:
                batches = self._replica.work(self._now())
            for batch in batches:
                self._on_batch(batch)
        except Exception as error:
            # Our bug, in the configuration; the data plane keeps going with what it has.
            log.exception("a message of the control plane could not be handled: %s", message and message[0])
            self._bug = f"internal error: {error!r}"
        return True

    async def _subscribe(self, broker: Connection, url: str) -> None:
        """Keep the subscriptions equal to the replica's interests."""
        subscriptions = self._subscriptions
        pause_s = _FIRST_DOUBT_S
        while True:
            self._interests.clear()
            subscriptions.want(self._replica.filters())
            for filters in _portions(subscriptions.missing):
                subscriptions.asked(filters, await broker.subscribe(filters))
            for filters in _portions(subscriptions.surplus):
                await broker.unsubscribe(filters)
                subscriptions.dropped(filters)
            broker.arrivals.wake()  # what is wanted now may need work on what is there
            self._subscribed(url)
            try:
                async with asyncio.timeout(pause_s):
                    await self._interests.wait()
                pause_s = _FIRST_DOUBT_S
            except TimeoutError:
                self._doubt(pause_s)
                pause_s = min(2 * pause_s, _LAST_DOUBT_S)

    def _doubt(self, pause_s: float) -> None:
        """Ask again, after a pause, for what may have been lost; less and less often."""
        if not self._replica.whole:
            if time.monotonic() - self._heard_at > _FIRST_DOUBT_S:  # else it may be on its way
                self._subscriptions.doubt_all()
        else:
            self._subscriptions.look_again()
            if pause_s < _LAST_DOUBT_S:
                self._subscriptions.doubt_silent()

    async def _send_reports(self, broker: Connection, version: int) -> None:
        paid_until = 0.0
        while True:
            version += 1
            self._report_due.clear()
            await broker.publish(*self._report(True, version))
            now = time.monotonic()
            paid_until = max(paid_until, now) + REPORT_PAUSE_S
            await asyncio.sleep(max(0.0, paid_until - now - (REPORTS_AT_ONCE - 1) * REPORT_PAUSE_S))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_INTERVAL_S):
                    await self._report_due.wait()

    def _subscribed(self, url: str) -> None:
        refused = self._subscriptions.refused
        for name in sorted(refused - self._refused):
            log.error("the broker refuses to let us read %s", name)
        if not self.connected:
            log.info("connected to the broker %s", url)
        if not self.connected or refused != self._refused:
            self._report_due.set()
        self.connected, self._fault, self._refused = True, "", refused

    def _lost(self, url: str, reason: str) -> None:
        fault = f"no connection to the broker {url}: {reason}"
        if fault != self._fault:  # once, not at every attempt
            log.warning("%s", fault)
        self._fault = fault


@contextlib.contextmanager
def _one_of(*kinds: type[Exception]) -> Iterator[None]:
    """Raises the first of these exceptions that a task group raises, by itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        expected, others = group.split(kinds)
        if others is not None or expected is None:
            raise
        found: BaseException = expected
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        raise found from None


def _in_turn(urls: Sequence[str]) -> Iterator[str]:
    """The brokers' URLs for ever, from any of them on: so proxies spread."""
    at = random.randrange(len(urls))
    while True:
        yield urls[at]
        at = (at + 1) % len(urls)


def _portions(names: Sequence[str]) -> Iterator[list[str]]:
    rest = iter(names)
    while portion := list(islice(rest, _FILTERS_AT_ONCE)):
        yield portion


def _retry_delay_s(failures: int) -> float:
    """Full jitter, so that a thousand proxies do not come at once to a broker that is back."""
    return random.uniform(0.0, min(_LAST_RETRY_S, _FIRST_RETRY_S * 2.0 ** min(failures, 16)))
