"""A control plane's REST interface for tests: the real one, on a socket, without broker and certificate server."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from control.server.api import Api, BrokerState, listen
from control.server.ca import Authority
from control.server.core import Core
from control.server.enrolment import Enrolment
from control.server.members import Members
from control.server.signing import ConfigKey
from control.server.store import Store

URL = "https://control.test:15012"


@dataclass
class Operated:
    """A running interface, and what is behind it."""

    socket: Path
    core: Core
    store: Store
    enrolment: Enrolment
    broker: BrokerState = field(default_factory=lambda: BrokerState(connected=True, problem="", published=True))
    changes: int = 0
    """How often identities may have come or gone."""
    admissions: list[str] = field(default_factory=list)
    """Whom the broker had to let in at once."""
    clock: Callable[[], float] = time.time


@contextlib.contextmanager
def operated(ca: Path, authority: Authority, directory: Path) -> Iterator[Operated]:
    """Serve on a socket in `directory`, which holds the store too."""
    directory.mkdir(exist_ok=True)
    with Store(directory / "mesh.db") as store:
        core = Core(store, authority, ConfigKey.open(ca, authority, time.time()))
        members = Members(core, authority.trust_domain)
        enrolment = Enrolment(store, authority, members.declared, time.time)
        found = Operated(directory / "control.sock", core, store, enrolment)

        def changed() -> None:
            found.changes += 1

        api = Api(
            core,
            store,
            enrolment,
            members,
            authority.trust_domain,
            URL,
            lambda: found.broker,
            changed,
            lambda identity: found.admissions.append(str(identity)),
            list,
            lambda: found.clock(),
        )
        stop: list[Callable[[], object]] = []

        async def serve(listening) -> None:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None
            stop.append(lambda: loop.call_soon_threadsafe(task.cancel))
            with contextlib.suppress(asyncio.CancelledError):
                await api.run(listening)

        with listen(found.socket) as listening:
            thread = threading.Thread(target=lambda: asyncio.run(serve(listening)))
            thread.start()
            try:
                yield found
            finally:
                deadline = time.monotonic() + 10
                while not stop and time.monotonic() < deadline:
                    time.sleep(0.01)
                stop[0]()
                thread.join(30)
                assert not thread.is_alive()
