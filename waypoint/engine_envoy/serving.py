"""The data plane of a waypoint whose engine is Envoy, as `waypoint.run` knows one."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from control.api.status import Knowledge
from control.client.state import Changes, State
from uproxy.access_log import AccessLog
from uproxy.config import Who
from uproxy.credentials import CurrentCredentials
from uproxy.directory import Directory
from uproxy.errors import RefusedError
from uproxy.in_force import InForce
from uproxy.listener import Inherited
from uproxy.plane import Plane
from uproxy.process import StartError
from uproxy.telemetry import Listing
from waypoint.engine_envoy.child import Child
from waypoint.engine_envoy.delivery import Delivery
from waypoint.engine_envoy.files import Files
from waypoint.engine_envoy.records import Records
from waypoint.engine_envoy.rendering import Layout, Renderer, Rendering, bootstrap
from waypoint.gateway import GRACE_S
from waypoint.telemetry import WaypointTelemetry

START_TIMEOUT_S: Final = 20.0
LOOK_S: Final = 2.0
"""How often files of Extensions are looked for that are not there."""
_DRAIN_POLL_S: Final = 0.05
_DIRECTORY: Final = "envoy-"

log = logging.getLogger("waypoint")


class EnvoyServing:
    """Serves callers by an Envoy, by `state`, which somebody else brings up to date."""

    def __init__(
        self,
        data_plane: Plane,
        who: Who,
        gateway_key: str,
        state: State,
        credentials: CurrentCredentials,
        telemetry: WaypointTelemetry,
        access_log: AccessLog | None,
        directory: Directory | None,
        on_change: Callable[[], None],
        identity_dir: Path,
        threads: int,
    ) -> None:
        """`gateway_key`: of its Gateway. `directory`: where what is not known is asked for, if anywhere. `threads`: of
        Envoy's, that serve.

        `on_change` is called when what is in force, or `waiting`, may have changed. Raises StartError.
        """
        self._plane = data_plane
        self._state = state
        self._credentials = credentials
        self._telemetry = telemetry
        self._log = access_log
        self._drain_by = math.inf
        self._directory = directory
        self._on_change = on_change
        directory_name = f"{_DIRECTORY}{os.getpid()}"  # another process may run that is to leave
        self._layout = Layout((identity_dir / directory_name).absolute(), who, who.identity.trust_domain)
        self._renderer = Renderer(state, gateway_key, self._layout)
        self._files = Files(self._layout)
        self._child = Child(self._layout.directory, threads, self._record, self._child_ended)
        self._delivery = Delivery(self._files, self._child, threads)
        self._records = Records(state, telemetry.rehearsals)
        self._in_force = InForce()
        self._applied = -1
        """Generation of the state that requests are served by."""
        self._life = 0
        """Of the child that serves by it."""
        self._revoked: frozenset[tuple[object, int]] = frozenset()
        """Issuers and serial numbers of certificates."""
        self._revocation = 0
        """How often there were more of them."""
        self._renderings = 0
        self._refused: dict[str, str] = {}
        self._asked: set[str] = set()
        self._changed = asyncio.Event()
        self._ready = asyncio.Event()
        self._metrics = b""
        telemetry.counter(
            "uproxy_waypoint_engine_restarts_total", "Envoys that died and were replaced", lambda: self._child.restarts
        )
        telemetry.gauge(
            "uproxy_waypoint_engine_refused",
            "Places that the engine cannot serve",
            lambda: len(self._refused.keys() | self._delivery.rejected),
        )

    async def start(self, group: asyncio.TaskGroup, inherited: Inherited) -> None:
        """Take callers; return when they are served. Raises StartError.

        `inherited`: where another process takes callers; Envoy listens beside it (SO_REUSEPORT).
        """
        try:
            self._files.clear()
            self._files.write_bootstrap(bootstrap(self._layout))
            self._write_secrets()
            self._delivery.prepare(self._render())
        except OSError as error:
            raise StartError(f"cannot write {self._layout.directory}: {error.strerror}") from error
        group.create_task(self._child.run())
        self._changed.set()
        group.create_task(self._deliver())
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._ready.wait()
        except TimeoutError:
            raise StartError(
                f"Envoy does not serve after {START_TIMEOUT_S:g} s; its messages, on standard error, say why"
            ) from None

    def sockets(self) -> list[socket.socket]:
        """None that could be handed over."""
        return []

    # -- configuration

    def take(self, batch: Sequence[tuple[str, bytes]], changes: Changes) -> None:
        """The state has changed, by this batch."""
        if self._applied < self._state.generation:
            self._changed.set()

    def progressed(self, known: Callable[[], Knowledge]) -> None:
        """More may be known now, and the state has it."""
        self._in_force.progressed(self._state.generation, self._applied, known)

    def in_force(self, known: Knowledge) -> Knowledge:
        """What of all that is known requests are served by; not whole while nobody serves."""
        return self._in_force.told(self._state.generation, self._applied, known, self.waiting())

    def waiting(self) -> tuple[str, ...]:
        """What keeps it from serving."""
        return () if self._child.pid is not None and self._life == self._child.lives else ("envoy",)

    def problems(self) -> tuple[str, ...]:
        """What somebody should look at."""
        return (self._delivery.problem,) if self._delivery.problem else ()

    async def applied(self) -> None:
        """Return when requests are served by the state as it is now."""
        while self._applied < self._state.generation or self.waiting():  # noqa: ASYNC110 - only tests wait for it
            await asyncio.sleep(_DRAIN_POLL_S / 10)

    async def _deliver(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            generation = self._state.generation
            rendering = self._render()
            self._renderings += 1
            try:
                brought = await self._delivery.bring(rendering, self._renderings)
            except OSError as error:
                log.error("cannot write %s: %s; tried again", self._layout.directory, error)
                self._changed.set()
                await asyncio.sleep(1)
                continue
            self._life = self._child.lives
            if brought:
                self._applied = generation
                self._in_force.settle(generation)
                self._ready.set()
            self._on_change()
            if rendering.incomplete:
                asyncio.get_running_loop().call_later(LOOK_S, self._changed.set)

    def _render(self) -> Rendering:
        rendering = self._renderer.render(self._revocation)
        for place in rendering.refused.keys() - self._refused.keys():
            log.error("%s is refused to callers: %s", place, rendering.refused[place])
        self._refused = dict(rendering.refused)
        directory = self._directory
        if directory is not None:
            for service_key in rendering.awaited - self._asked:
                self._plane.spawn(_followed(directory, service_key))
        self._asked = set(rendering.awaited)
        return rendering

    def _child_ended(self) -> None:
        """Another one reads the files; what it serves by is asked anew."""
        self._changed.set()
        self._on_change()

    # -- its certificate

    def renewed(self) -> None:
        """There is a new certificate, or list of revoked ones."""
        self._write_secrets()
        self._changed.set()

    def _write_secrets(self) -> None:
        now = self._credentials.value
        revoked = frozenset((one.issuer, serial) for one in now.revocations.lists for serial in one.serials)
        self._revocation += bool(revoked - self._revoked)
        self._revoked = revoked
        roots = "".join(map(ssl.DER_cert_to_PEM_cert, now.roots)).encode()
        serials = {serial for _, serial in revoked}
        self._files.write_secrets(now.chain_and_key, roots, now.revocations.pem, serials, self._revocation)

    # -- operators

    def _record(self, line: bytes) -> None:
        now = time.monotonic()
        exchange = self._records.read(line, now)
        if exchange is not None:
            self._telemetry.answered(exchange, now)

    def reopen_log(self) -> None:
        """The access log's file was moved away."""
        if self._log is not None:
            self._log.reopen()

    def render(self) -> bytes:
        """All metrics of this process."""
        return self._telemetry.render()

    def live(self) -> Listing:
        """Envoy does not tell."""
        return Listing(0, [])

    def dump(self) -> dict[str, object]:
        """For operators."""
        return {
            "engine": "envoy",
            "pid": self._child.pid,
            "restarts": self._child.restarts,
            "applied": self._applied,
            "refused": self._refused,
            "rejected": sorted(self._delivery.rejected),
            "problem": self._delivery.problem,
        }

    # -- the end

    def interrupt(self) -> None:
        """Let `start` return."""
        self._ready.set()

    async def drain(self, timeout_s: float, grace_s: float) -> None:
        """Accept nothing more, tell callers, and let requests and connections end by themselves, for a while.

        `grace_s`: how long a connection may wait for a request, which may be on its way.
        """
        log.info("draining for up to %g s", timeout_s)
        self.hasten(timeout_s, grace_s)
        while time.monotonic() < self._drain_by:
            try:
                await self._child.ask("/drain_listeners?graceful&skip_exit", "POST")
                break
            except OSError:
                await asyncio.sleep(_DRAIN_POLL_S)
        idle_until = time.monotonic() + grace_s
        await asyncio.sleep(min(grace_s, GRACE_S))
        pause_s = _DRAIN_POLL_S
        while time.monotonic() < self._drain_by:
            # Whoever has a connection may bring a request, until the time of grace is over.
            if not await self._counts("rq" if time.monotonic() >= idle_until else "cx"):
                break
            await asyncio.sleep(pause_s)
            pause_s = min(1.1 * pause_s, 0.5)
        self._child.end()
        log.info("drained")

    def hasten(self, timeout_s: float, grace_s: float) -> None:
        """Drain within this time, if more is left."""
        self._drain_by = min(self._drain_by, time.monotonic() + timeout_s)

    async def _counts(self, what: str) -> bool:
        """Whether there are requests (`rq`) or callers' connections (`cx`) of HTTP, or connections of opaque TCP."""
        try:
            told = await self._child.ask(f"/stats?filter=^(http.in.downstream_{what}|tcp.tcp.downstream_cx)_active$")
        except OSError:
            return False
        return any(line.rpartition(b" ")[2] != b"0" for line in told.splitlines())

    def close(self) -> None:
        self._child.kill()
        shutil.rmtree(self._layout.directory, ignore_errors=True)
        if self._log is not None:
            self._log.close()


async def _followed(directory: Directory, service_key: str) -> None:
    try:
        await directory.followed(service_key)
    except RefusedError as error:
        log.info("%s: %s", service_key, error)
