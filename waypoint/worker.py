"""One worker process of a waypoint: serves callers by the configuration that the first process hands it.

`python -m waypoint.worker FD PARENT SOCKET...` is started by `workers`, never by people. FD is this end of the socket
pair, PARENT the first process, with whose life this one ends, and which alone ends it: signals to the whole group are
for that. SOCKET is each listening socket that there is. In come, by `channel`: `start` (once, what this waypoint is),
`apply` (a batch), `listen` (at which of the sockets), `lives` (whether it does), `metrics`, `live`, `tap` (whether
anybody watches), `answer` (to `destination` and `followed`), `level`, `drain` (for how long); out go `applied`,
`listening`, `lives`, `metrics`, `live`, `tapped`, `destination`, `followed` and `introduce`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import uproxy
from control.api.address import IpAddress, parse_address
from control.api.identity import SpiffeId
from control.client.state import State
from uproxy import linux, log_levels, plane, process
from uproxy.channel import Channel, Message
from uproxy.config import Collector, Who
from uproxy.credentials import CurrentCredentials
from uproxy.errors import Flag, RefusedError
from uproxy.landlock import close_to_us
from uproxy.plane import Plane, Waiter
from uproxy.process import StartError
from uproxy.tap import Taps
from uproxy.tls import CredentialsError
from waypoint.beside import ServingBeside
from waypoint.serving import Serving
from waypoint.telemetry import WaypointTelemetry

_PATIENCE_S: Final = 6.0  # the first process waits 5 s for the control plane
_STRANGERS_S: Final = 60.0

log = logging.getLogger("waypoint")


def main() -> int:
    """Run until it has drained. Returns the exit status."""
    fd, parent, *listening = map(int, sys.argv[1:])
    linux.die_with_parent(parent)
    process.harden()
    try:
        return plane.run(_run(socket.socket(fileno=fd), [socket.socket(fileno=one) for one in listening]))
    except (StartError, CredentialsError) as error:
        print(f"waypoint worker: {error}", file=sys.stderr)
        return 1


async def _run(sock: socket.socket, listening: Sequence[socket.socket]) -> int:
    """Raises StartError or CredentialsError."""
    worker = _Worker(listening)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    await worker.run(sock)
    return 0


class _Stopped(Exception):
    """Ends the task group."""


class _Upwards:
    """Where the first process, which is always quick, watches for all who watch there."""

    waiting = 0

    def __init__(self, send: Callable[[str, bytes], None]) -> None:
        self._send = send

    def write(self, data: bytes) -> None:
        self._send("tapped", data)


def _collector(host: str, port: str, share: str) -> Collector:
    return Collector(host, int(port), float(share))


def _nothing() -> None:
    pass


class _Worker:
    """The worker, and where its data plane asks what it does not know."""

    def __init__(self, listening: Sequence[socket.socket]) -> None:
        self._listening = listening
        self._loop = asyncio.get_running_loop()
        self._plane = Plane(self._loop)
        self._stopping = asyncio.Event()
        self._started = asyncio.Event()
        self._failed: Exception | None = None
        self._channel: Channel | None = None
        self._serving: Serving | ServingBeside | None = None
        self._credentials: CurrentCredentials | None = None
        self._state: State | None = None
        self._telemetry: WaypointTelemetry | None = None
        self._asked: dict[int, Waiter[None]] = {}
        self._questions = 0
        self._strangers: set[IpAddress] = set()
        self._untap: Callable[[], None] = _nothing
        self._draining = 0.0, 0.0
        """Seconds to drain, and of grace."""

    def _stop(self) -> None:
        self._stopping.set()
        self._started.set()

    async def run(self, sock: socket.socket) -> None:
        """Raises StartError or CredentialsError."""
        sock.setblocking(False)
        self._channel = Channel(self._on_message, self._on_lost)
        await self._channel.attach(sock)
        try:
            await self._started.wait()
            if self._serving is not None:
                self._loop.add_signal_handler(signal.SIGHUP, self._serving.reopen_log)
                await self._serve(self._serving)
        finally:
            if self._serving is not None:
                self._serving.close()
            self._plane.close()
            self._channel.close()
        if self._failed is not None:
            raise self._failed

    async def _serve(self, serving: Serving | ServingBeside) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                if self._credentials is not None:
                    group.create_task(self._credentials.watch(serving.renewed))
                group.create_task(self._forget_strangers())
                if serving.exporter is not None:
                    group.create_task(serving.exporter.run())
                await self._stopping.wait()
                if self._failed is None:
                    await self._drain(serving)
                raise _Stopped
        except* _Stopped:
            pass

    async def _drain(self, serving: Serving | ServingBeside) -> None:
        # Nobody waits at a door that is left open here, when those who come after are gone.
        serving.listen(())
        for sock in self._listening:
            sock.close()
        await serving.drain(*self._draining)

    # -- what the first process says

    def _on_message(self, message: Message) -> None:
        match message:
            case ["start", dict(settings)]:
                try:
                    self._start(settings)
                except CredentialsError as error:
                    self._fail(error)
                except OSError as error:
                    self._fail(StartError(f"cannot open the access log: {error}"))
            case ["apply", int(serial), list(batch)]:
                self._apply(serial, [(topic, payload) for topic, payload in batch])
            case ["listen", list(numbers)]:
                self._listen([self._listening[number] for number in numbers])
            case ["drain", float(timeout_s), float(grace_s)]:
                if self._stopping.is_set() and self._serving is not None:
                    self._serving.hasten(timeout_s, grace_s)
                self._draining = timeout_s, grace_s
                self._stop()
            case ["lives"]:
                self._send("lives")
            case ["metrics", int(question)] if self._telemetry is not None:
                self._send("metrics", question, self._telemetry.render())
            case ["live", int(question)] if self._serving is not None:
                live = self._serving.live()
                self._send("live", question, live.total, live.lines)
            case ["tap", bool(watched)] if self._telemetry is not None:
                self._tap(self._telemetry.taps, watched)
            case ["answer", int(question), str(reason), str(detail)]:
                self._answered(question, reason, detail)
            case ["level", str(level)]:
                log_levels.set_levels(level, of_others=True)
            case _:
                raise ValueError(f"{message[0]!r} is nothing that a worker is told now")

    def _start(self, settings: dict[str, str | int | float | bool | list[str]]) -> None:
        """Raises CredentialsError or OSError."""
        name = f"worker {settings['number']}"
        logging.basicConfig(
            format=f"%(asctime)s %(levelname)s %(name)s: {name}: %(message)s",
            stream=sys.stderr,
        )
        log_levels.set_levels(str(settings["level"]), of_others=True)
        addresses = settings["addresses"]
        assert isinstance(addresses, list)
        who = Who(
            str(settings["workload"]), SpiffeId.parse(str(settings["identity"])), tuple(map(parse_address, addresses))
        )
        self._state = State(who.identity.trust_domain)
        access_log = process.open_log(str(settings["access_log"]), bool(settings["log_json"]), self._loop)
        self._telemetry = WaypointTelemetry(uproxy.__version__, access_log)
        if settings["closed"]:
            self._give_up(Path(str(settings["closed"])))
            self._serving = ServingBeside(
                self._plane, who, str(settings["gateway"]), self._state, self._telemetry, access_log, self
            )
            self._started.set()
            return
        self._credentials = CurrentCredentials(Path(str(settings["identity_dir"])), who.identity)
        otlp = settings["otlp"]
        self._serving = Serving(
            self._plane,
            who,
            str(settings["gateway"]),
            self._state,
            self._credentials,
            self._telemetry,
            access_log,
            self,
            _collector(*otlp) if isinstance(otlp, list) and otlp else None,
        )
        self._started.set()

    def _give_up(self, directory: Path) -> None:
        """Where the uProxy has its key, which has the same user. Without Landlock only that nobody opens it."""
        try:
            close_to_us(directory)
        except OSError as error:
            log.warning("%s stays open to this process: %s", directory, error)

    def _apply(self, serial: int, batch: list[tuple[str, bytes]]) -> None:
        if self._state is None or self._serving is None:
            raise ValueError("a batch before the start")
        self._serving.take(batch, self._state.apply(batch))
        # It is in force now: live connections were authorised again, too.
        self._send("applied", serial)

    def _listen(self, sockets: Sequence[socket.socket]) -> None:
        if self._state is None or self._serving is None or not self._state.whole:
            raise ValueError("told to listen before there is a configuration")
        if not self._stopping.is_set():
            self._serving.listen(sockets)
            self._send("listening")

    def _tap(self, taps: Taps, watched: bool) -> None:
        self._untap()
        self._untap = taps.add(_Upwards(self._send)) if watched else _nothing

    def _on_lost(self) -> None:
        # Without the first process nobody brings this one up to date: it does not even drain.
        self._fail(StartError("the connection to the first process ended"))

    def _fail(self, error: Exception) -> None:
        self._failed = self._failed or error
        self._stop()

    def _send(self, *message: object) -> None:
        if self._channel is not None:
            self._channel.send(*message)

    # -- what the data plane asks (directory.Directory)

    async def destination(self, address: IpAddress) -> None:
        """Return when everything about an address is known, here as in the first process. Raises RefusedError."""
        await self._ask("destination", address, f"who lives at {address}")

    async def followed(self, service_key: str) -> None:
        """Likewise for a service to which a route leads."""
        await self._ask("followed", service_key, f"the configuration of service {service_key}")

    async def _ask(self, what: str, about: str, described: str) -> None:
        """Raises RefusedError."""
        self._questions += 1
        question, waiter = self._questions, Waiter[None](self._plane)
        self._asked[question] = waiter
        try:
            self._send(what, question, about)
            await self._plane.wait(waiter, _PATIENCE_S)
        except TimeoutError:
            detail = f"{described} did not come from the first process within {_PATIENCE_S:g} s"
            raise RefusedError("no-config", detail, flag=Flag.NO_CONFIG) from None
        finally:
            del self._asked[question]

    async def introduce(self, caller: IpAddress, service_key: str) -> None:
        """Ask who calls, at most once a minute: the answer comes as configuration."""
        if caller not in self._strangers and len(self._strangers) < 1000:
            self._strangers.add(caller)
            self._send("introduce", caller)

    def _answered(self, question: int, reason: str, detail: str) -> None:
        waiter = self._asked.get(question)
        if waiter is None:
            return
        if reason:
            error = RefusedError(reason, detail, flag=Flag.NO_CONFIG)
            self._plane.run(lambda: waiter.fail(error))
        else:
            self._plane.run(lambda: waiter.set(None))

    async def _forget_strangers(self) -> None:
        while True:
            await asyncio.sleep(_STRANGERS_S)
            self._strangers.clear()


if __name__ == "__main__":
    sys.exit(main())
