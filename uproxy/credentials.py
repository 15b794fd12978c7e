"""This process's own identity as it is now: renewed on disk while it runs, and never replaced by something worse."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from control.api.identity import SpiffeId
from uproxy.tls import BUNDLE_FILE, CHAIN_FILE, REVOCATIONS_FILE, Credentials, CredentialsError

_WATCH_S: Final = 1.0

log = logging.getLogger(__name__)


class CurrentCredentials:
    """The credentials of an identity directory. `value` changes while `watch` runs."""

    def __init__(self, directory: Path, identity: SpiffeId) -> None:
        """Raises CredentialsError when there are none that can be used."""
        self.directory = directory
        self._identity = identity
        self.problem = ""
        """Why what is in the directory now is not in use; empty while it is."""
        self._hurry = asyncio.Event()
        self._read = self._stamp()  # before reading: a change meanwhile is then one more
        self.value = Credentials.load(directory, identity)

    async def watch(self, on_renewed: Callable[[], None]) -> None:
        """Take up each renewed certificate, bundle and revocation list. A bad one is reported, and tried again until it
        is mended.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_S):
                    await self._hurry.wait()
            self._hurry.clear()
            stamp = self._stamp()
            if stamp == self._read and not self.problem:
                continue
            self._read = stamp
            try:
                self.value = Credentials.load(self.directory, self._identity)
                on_renewed()
            except (CredentialsError, OSError) as error:  # OSError: of memory or descriptors, which may come back
                problem = f"the new certificate is refused, the one before stays: {error}"
                if problem != self.problem:
                    log.error("%s", problem)
                self.problem = problem
                continue
            self.problem = ""
            revoked = sum(len(one.serials) for one in self.value.revocations.lists)
            log.info("a new certificate is in use: serial %x, others revoked: %d", self.value.serial, revoked)

    def hurry(self) -> None:
        """Something has changed there: `watch` is to look now."""
        self._hurry.set()

    def _stamp(self) -> tuple[int, ...]:
        """Changes whenever one of the files is replaced; empty while the certificate or the bundle is missing."""
        with contextlib.suppress(OSError):
            stamps = [(self.directory / name).stat().st_mtime_ns for name in (CHAIN_FILE, BUNDLE_FILE)]
            with contextlib.suppress(FileNotFoundError):
                stamps.append((self.directory / REVOCATIONS_FILE).stat().st_mtime_ns)
            return tuple(stamps)
        return ()
