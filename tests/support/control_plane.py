"""A control plane for tests: a real store, key and core, and a publisher that carries them to a broker."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from control.client.mqtt import BrokerAccess
from control.server.ca import Authority
from control.server.core import Core
from control.server.publisher import Publisher
from control.server.rights import control_plane_id
from control.server.signing import ConfigKey
from control.server.store import Store
from tests.support.brokers import control_plane_dir, tls
from tests.support.waiting import until


class ControlPlane:
    """Can be stopped and started again on its store, and put back to an older copy of it."""

    def __init__(self, directory: Path, ca_dir: Path, url: str, clock: Callable[[], float] = time.time) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.authority = Authority.open(ca_dir)
        self.path = directory / "mesh.db"
        self.url = url
        self._ca_dir, self._clock = ca_dir, clock
        own = control_plane_dir(self.authority, directory / "own")
        self._access = BrokerAccess([url], control_plane_id(self.authority.trust_domain), lambda: tls(own))
        self._open()

    def _open(self) -> None:
        self.store = Store(self.path)
        key = ConfigKey.open(self._ca_dir, self.authority, self._clock())
        self.core = Core(self.store, self.authority, key, self._clock)
        self.publisher = Publisher(self.core, self._access)

    def close(self) -> None:
        self.store.close()

    def restart(self) -> None:
        """A new process, as far as the store is concerned. The publisher must not be running."""
        self.close()
        self._open()

    def backup(self) -> bytes:
        self.close()
        content = self.path.read_bytes()
        self._open()
        return content

    def restore(self, content: bytes) -> None:
        self.close()
        for path in self.path.parent.glob("mesh.db*"):
            path.unlink()
        self.path.write_bytes(content)
        self._open()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The publisher at work."""
        task = asyncio.get_running_loop().create_task(self.publisher.run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def settled(self) -> None:
        """Until the broker has acknowledged everything."""
        await until(lambda: self.publisher.published and not self.core.pending())
