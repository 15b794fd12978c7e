"""A broker that somebody else runs: we write its configuration and certificate, and tell it when they change."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Final

from control.api.identity import SpiffeId
from control.server.brokers import IDENTITY_DIR, Listen, all_rights, mosquitto_files, nats_files, prepare, write_files
from control.server.ca import DEFAULT_TTL_S, Authority, CaError
from control.server.rights import broker_id
from control.server.svid import due, issue_own

_RENEWAL_RETRY_S: Final = 60.0
_MAX_PID_BYTES: Final = 32

_log = logging.getLogger(__name__)


class ForeignBroker:
    """Keeps a directory that a nats-server or a Mosquitto reads its configuration from."""

    def __init__(
        self,
        directory: Path,
        listen: Listen,
        authority: Authority,
        pid_file: Path | None,
        svid_ttl_s: int = DEFAULT_TTL_S,
    ) -> None:
        """`pid_file`: of the broker, which is sent SIGHUP after a change; None: somebody else sees to that."""
        self._directory = directory.resolve()
        self._listen = listen
        self._authority = authority
        self._pid_file = pid_file
        self._svid_ttl_s = svid_ttl_s
        self._identities: frozenset[SpiffeId] = frozenset()
        self._waypoints: frozenset[SpiffeId] = frozenset()
        self.ready = asyncio.Event()
        """Set once everything that the broker reads is there."""

    async def run(self) -> None:
        """Keep the broker's certificate fresh until cancelled. Raises BrokerError, CaError or OSError."""
        prepare(self._directory)
        self._certify()
        self._configure()
        self._tell()
        self.ready.set()
        while True:
            await due(self._directory / IDENTITY_DIR, self._svid_ttl_s)
            try:
                self._certify()
            except (CaError, OSError) as error:
                _log.warning("the broker's certificate cannot be renewed: %s", error)
                await asyncio.sleep(min(_RENEWAL_RETRY_S, self._svid_ttl_s / 10))
                continue
            self._tell()

    async def admit(self, identities: Collection[SpiffeId], waypoints: Collection[SpiffeId] = ()) -> None:
        """Let exactly these in (and the control plane), as soon as the broker reads it. Raises OSError."""
        self._identities, self._waypoints = frozenset(identities), frozenset(waypoints)
        if self._directory.is_dir() and self._configure():
            self._tell()

    def _configure(self) -> bool:
        """Write what both kinds of broker read; whether anything changed."""
        rights = all_rights(self._authority, self._identities, self._waypoints)
        files = {
            **nats_files(self._directory, self._listen, rights),
            **mosquitto_files(self._directory, self._listen, rights),
        }
        return write_files(self._directory, files)

    def _certify(self) -> None:
        identity = broker_id(self._authority.trust_domain)
        issue_own(self._authority, self._directory / IDENTITY_DIR, identity, self._svid_ttl_s)

    def _tell(self) -> None:
        if self._pid_file is None:
            return
        try:
            with self._pid_file.open("rb") as file:
                pid = int(file.read(_MAX_PID_BYTES))
            if pid <= 1:
                raise ValueError(f"{pid} is no process of a broker")
            os.kill(pid, signal.SIGHUP)
        except (OSError, ValueError, OverflowError) as error:
            # It reads everything when it starts; until then nobody new gets in.
            _log.warning("the broker of %s cannot be told of a change: %s", self._pid_file, error)
