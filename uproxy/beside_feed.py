"""Configuration for the waypoint's process beside a workload: its uProxy follows it, as a waypoint would.

It is a replica of its own, beside the uProxy's: what a waypoint reads, and the uProxy itself has no use for, by the
uProxy's identity. It reports nothing by itself: the uProxy's report says how much of it is in force.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from control.api.address import IpAddress
from control.api.policy import DEFAULT_ROOT_NAMESPACE
from control.api.status import Knowledge
from control.api.topics import RevocationsTopic, address_shard, format_topic
from control.client import snapshot
from control.client.libcrypto import ConfigVerifier
from control.client.membership import Membership
from control.client.mqtt import BrokerAccess
from control.client.replica import Batch, Replica
from control.client.snapshot import SnapshotError
from control.client.subscriber import Subscriber
from uproxy.credentials import CurrentCredentials
from uproxy.tls import broker_context

STATE_FILE: Final = "state-beside"
MAX_SHARDS: Final = 16
"""Shards of addresses asked for so that callers have names."""
_SAVE_INTERVAL_S: Final = 5.0

log = logging.getLogger("uproxy")


class Feed:
    """One Gateway's. All of it belongs to the loop. It is the process's `Directory`, too."""

    def __init__(
        self,
        membership: Membership,
        identity_dir: Path,
        credentials: CurrentCredentials,
        gateway_key: str,
        on_batch: Callable[[Sequence[tuple[str, bytes]]], None],
        on_progress: Callable[[], None],
    ) -> None:
        """Raises ValueError for a Gateway that is not of this workload's namespace."""
        trust_domain = membership.identity.trust_domain
        self._replica = Replica(trust_domain, ConfigVerifier(trust_domain, lambda: credentials.value.roots))
        self._replica.want_workload(membership.identity, membership.workload)
        self._replica.want_waypoint(gateway_key)
        self._revocations = format_topic(trust_domain, RevocationsTopic(DEFAULT_ROOT_NAMESPACE))
        self._on_batch = on_batch
        self._on_progress = on_progress
        self._state_file = identity_dir / STATE_FILE
        self._unsaved = asyncio.Event()
        self._shards: set[int] = set()
        self._keeps = True
        access = BrokerAccess(membership.brokers, membership.identity, lambda: broker_context(credentials.value))
        self._subscriber = Subscriber(self._replica, access, self._apply, _reports_nothing, on_progress=on_progress)
        self._subscriber.fall_silent()

    def restore(self) -> None:
        """Take up the last good state, if there is one: the control plane may be away."""
        try:
            content = snapshot.read(self._state_file)
            batches = self._replica.restore(content) if content is not None else ()
        except (OSError, SnapshotError) as error:
            log.error("%s cannot be used, and the control plane is asked for everything: %s", self._state_file, error)
            return
        for batch in batches:
            self._apply(batch)
        self._on_progress()

    async def run(self) -> None:
        """Follow the control plane, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._subscriber.run())
            group.create_task(self._keep_saved())

    @property
    def whole(self) -> bool:
        """Whether it has all that the process needs."""
        return self._replica.whole

    def known(self) -> Knowledge:
        """All of it, in force or not."""
        return Knowledge(self._replica.whole, self._replica.waiting(), self._replica.roots())

    def renewed(self) -> None:
        """There is a new certificate."""
        self._subscriber.certificate_renewed()

    async def save(self) -> None:
        """Have what is known on disk, now."""
        await asyncio.to_thread(self._save, self._replica.dump())

    def leave(self) -> None:
        """Another process, or another Gateway's feed, keeps the file from here on."""
        self._keeps = False

    def keep(self) -> None:
        """That one has left."""
        self._keeps = True
        self._unsaved.set()

    # -- what the process asks (directory.Directory)

    async def destination(self, address: IpAddress) -> None:
        """Nothing that it serves has to be asked for."""

    async def followed(self, service_key: str) -> None:
        """Likewise."""

    async def introduce(self, caller: IpAddress, service_key: str) -> None:
        """The answer comes as configuration."""
        shard = address_shard(caller)
        if shard not in self._shards and len(self._shards) < MAX_SHARDS:
            self._shards.add(shard)
            self._replica.want_address(caller)
            self._subscriber.interests_changed()

    def _apply(self, batch: Batch) -> None:
        self._unsaved.set()
        # What is revoked goes where credentials are read from, by the uProxy's own replica.
        self._on_batch([one for one in batch if one[0] != self._revocations])

    async def _keep_saved(self) -> None:
        while True:
            await self._unsaved.wait()
            await asyncio.sleep(_SAVE_INTERVAL_S)
            self._unsaved.clear()
            if self._keeps:
                await self.save()

    def _save(self, content: bytes) -> None:
        try:
            snapshot.write(self._state_file, content)
        except OSError as error:
            log.error("%s cannot be written, and a restart needs the control plane: %s", self._state_file, error)


def _reports_nothing(online: bool, version: int) -> tuple[str, bytes]:
    raise AssertionError("a silent subscriber was asked for a report")
