"""Hands the CA's revocation list out: what `meshctl ca revoke` writes is published, and its holders get no certificate.

The list in the CA's directory is the truth. What was published once is never taken back by an older list, nor by none.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from control.api.messages import MessageError
from control.server.ca import REVOCATIONS_FILE, Authority, CaError, RevocationList, read_revocations
from control.server.core import Core
from control.server.store import StoreError

_WATCH_S: Final = 1.0

_log = logging.getLogger(__name__)


class RevocationLists:
    """What is revoked by now."""

    def __init__(self, directory: Path, authority: Authority, core: Core) -> None:
        """`directory`: the CA's. Raises StoreError."""
        self._path = directory / REVOCATIONS_FILE
        self._authority = authority
        self._core = core
        self._seen: tuple[int, ...] | None = ()
        self.problem = ""
        """Why the list that is there now is not handed out; empty while it is."""
        self._current = self._published()

    def revoked(self, serial: int) -> bool:
        """Whether a certificate of this CA is, by its serial number."""
        return self._current is not None and self._current.names(serial)

    async def run(self) -> None:
        """Publish each new list within a second or so, until cancelled."""
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(_WATCH_S)

    def look(self) -> None:
        """Publish the list that is there, if it is another; call it in a thread. A bad one is reported once."""
        stamp = self._stamp()
        if stamp == self._seen:
            return
        try:
            found = read_revocations(self._path.parent, self._authority)
            if found is not None:
                self._take(found)
        except (CaError, MessageError, StoreError) as error:
            problem = f"{self._path} is not handed out, and what was revoked before stays so: {error}"
            if problem != self.problem:
                _log.error("%s", problem)
            self.problem = problem
        else:
            self._seen, self.problem = stamp, ""

    def _take(self, found: RevocationList) -> None:
        if self._current is not None and found.number < self._current.number:
            raise CaError(
                f"its number is {found.number}, below {self._current.number}, which was published. It is an old copy; "
                "each proxy's identity directory has the present one"
            )
        self._current = found  # before anybody is told: nobody it names renews meanwhile
        if self._core.revoke((found.der,)):
            _log.info(
                "a revocation list is published, number %d: certificates on it: %d", found.number, len(found.parsed)
            )

    def _published(self) -> RevocationList | None:
        """What an earlier life of this process has published."""
        for der in self._core.revocations():
            try:
                return self._authority.read_revocations(der)
            except CaError:
                continue  # of a CA that was replaced
        return None

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size
