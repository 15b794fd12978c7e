"""The worker processes of a waypoint, as its first process sees them: started, configured, watched, started again.

All listen at one port (SO_REUSEPORT), so a change is in force when the slowest of them says so, and not before: what
is *in force* here is the newest configuration that every worker has applied. The listening sockets, its *doors*, belong
to the first process, and each worker has all of them: those of one that has died are minded by another. Until there is
one in its place, with all of the configuration, the process is neither whole nor ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from control.api import messages
from control.api.address import IpAddress, parse_address
from control.api.status import Knowledge
from control.client.state import Changes
from uproxy import log_levels
from uproxy.channel import Channel, Message, encode
from uproxy.directory import Directory
from uproxy.doors import Door
from uproxy.errors import RefusedError
from uproxy.in_force import InForce
from uproxy.listener import Inherited
from uproxy.metrics import counters, summed
from uproxy.plane import Plane
from uproxy.process import FAREWELL_S, StartError
from uproxy.telemetry import Listing, Telemetry

APPLY_TIMEOUT_S: Final = 20.0
"""For a worker to start, to apply a batch or to say that it lives; one that takes longer hangs, and is killed."""
BEAT_S: Final = 5.0
"""How often one that owes nothing is asked whether it lives."""
METRICS_TIMEOUT_S: Final = 2.0
FIRST_RESTART_S: Final = 0.2
LAST_RESTART_S: Final = 5.0
_HEALTHY_S: Final = 10.0  # after a life of this length, the next restart is prompt again
_WATCH_S: Final = 1.0
_END_S: Final = 1.0  # for a process to end after its socket did

log = logging.getLogger("waypoint")


_NOTHING: Final = Listing(0, [])


@dataclass(slots=True, eq=False)
class _Worker:
    """One place for a worker, and the process that has it."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    channel: Channel | None = None
    started: float = 0.0
    """Monotonic seconds."""
    applied: int = -1
    """The newest batch that it has applied; -1: none yet."""
    owes_since: float | None = None
    """Monotonic seconds since which it has batches that it has not applied, or a question that it has not answered."""
    heard: float = 0.0
    """Monotonic seconds at which it last said that it owes nothing."""
    listening: bool = False
    minds: list[int] = field(default_factory=list)
    """At which of all listening sockets it was told to take callers."""
    restart_delay_s: float = FIRST_RESTART_S
    metrics: bytes = b""
    """As it last told them."""
    live: Listing = _NOTHING
    """As it last told it."""


@dataclass(slots=True)
class _Question:
    """What all workers are asked, and an operator waits for."""

    answer: Callable[[], None]
    """Gives the operator what there is."""
    missing: set[_Worker]


class Workers:
    """Serves callers in processes of its own."""

    def __init__(
        self,
        count: int,
        settings: dict[str, object],
        open_doors: Callable[[Inherited], list[Door]],
        data_plane: Plane,
        telemetry: Telemetry,
        directory: Directory | None,
        on_change: Callable[[], None],
    ) -> None:
        """`settings`: of `worker`'s `start`. `open_doors` raises StartError. `telemetry`: of this process. `directory`
        answers what workers ask.

        `on_change` is called when what is in force, or `waiting`, may have changed.
        """
        self._settings = settings
        self._open_doors = open_doors
        self._doors: list[Door] = []
        self._drain_by = math.inf
        self._plane = data_plane
        self._telemetry = telemetry
        self._directory = directory
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._workers = [_Worker(number) for number in range(1, count + 1)]
        self._held: dict[str, bytes] = {}
        """The newest message of each topic that is not deleted: all of the configuration."""
        self._sent = 0
        self._in_force = InForce()
        self._questions: dict[int, _Question] = {}
        self._asked = 0
        self._remains = b""
        """What workers had counted that are gone, as of the last scrape: counters never go back."""
        self.restarts = 0
        """Workers that died and were replaced."""
        self._ending = False
        self._group: asyncio.TaskGroup
        self._level = log_levels.levels()
        self._ready = asyncio.Event()
        self._failure = ""
        self._timers: set[asyncio.TimerHandle] = set()
        telemetry.taps.on_change = self.tap

    # -- configuration

    def take(self, batch: Sequence[tuple[str, bytes]], changes: Changes) -> None:
        """A batch that a state has taken."""
        for topic, payload in batch:
            if messages.decode(payload).body is None:
                self._held.pop(topic, None)
            else:
                self._held[topic] = payload
        self._sent += 1
        framed = encode("apply", self._sent, batch)
        for worker in self._workers:
            if worker.channel is not None:
                worker.channel.send_encoded(framed)
                worker.owes_since = worker.owes_since or time.monotonic()

    def progressed(self, known: Callable[[], Knowledge]) -> None:
        """More may be known now, and everything that follows from it was taken."""
        self._in_force.progressed(self._sent, self._applied(), known)

    def in_force(self, known: Knowledge) -> Knowledge:
        """What of all that is known every worker has applied; not whole while a worker is missing."""
        return self._in_force.told(self._sent, self._applied(), known, self.waiting())

    def problems(self) -> tuple[str, ...]:
        """What somebody should look at."""
        return ()

    def waiting(self) -> tuple[str, ...]:
        """What keeps it from serving as it should."""
        return tuple(f"worker {worker.number}" for worker in self._workers if not worker.listening)

    def _applied(self) -> int:
        """The newest batch that all workers have applied that there are; -1 when there are none."""
        return min((worker.applied for worker in self._workers if worker.channel is not None), default=-1)

    def _settle(self) -> None:
        self._in_force.settle(self._applied())

    # -- the workers' lives

    async def start(self, group: asyncio.TaskGroup, inherited: Inherited) -> None:
        """Return when all take callers, also at the sockets that another process has handed over, or `interrupt` was
        called. Raises StartError when one ends before.
        """
        self._group = group
        self._doors = self._open_doors(inherited)
        for worker in self._workers:
            await self._launch(worker)
        self._later(_WATCH_S, self._watch)
        await self._ready.wait()
        if self._failure:
            raise StartError(self._failure)

    async def _launch(self, worker: _Worker) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            try:
                worker.process = _process(theirs.fileno(), [sock.fileno() for sock in self.sockets()])
            except OSError as error:
                ours.close()
                log.error("worker %d does not start: %s", worker.number, error)
                self._ended(worker)
                return
        worker.started = worker.owes_since = time.monotonic()
        worker.applied, worker.listening = -1, False
        worker.channel = channel = Channel(
            lambda message: self._on_message(worker, message), lambda: self._on_lost(worker)
        )
        await channel.attach(ours)
        channel.send("start", {**self._settings, "number": worker.number, "level": self._level})
        channel.send("apply", self._sent, list(self._held.items()))
        worker.minds = self._minded_by(worker)
        channel.send("listen", worker.minds)
        channel.send("tap", self._telemetry.taps.watched)

    def _on_message(self, worker: _Worker, message: Message) -> None:
        match message:
            case ["applied", int(serial)]:
                worker.applied = serial
                self._heard(worker)
                self._settle()
                self._on_change()
            case ["lives"]:
                self._heard(worker)
            case ["listening"]:
                worker.listening = True
                self._share()
                if not self.waiting():
                    self._ready.set()
                self._on_change()
            case ["metrics", int(question), bytes(text)]:
                worker.metrics = text
                self._told(question, worker)
            case ["live", int(question), int(total), list(lines)]:
                worker.live = Listing(total, lines)
                self._told(question, worker)
            case ["tapped", bytes(lines)]:
                self._telemetry.taps.pass_on(lines)
            case ["destination", int(question), str(address)]:
                dialled = parse_address(address)
                self._plane.spawn(self._look_up(worker.channel, question, lambda known: known.destination(dialled)))
            case ["followed", int(question), str(service_key)]:
                self._plane.spawn(self._look_up(worker.channel, question, lambda known: known.followed(service_key)))
            case ["introduce", str(address)]:
                self._plane.spawn(self._introduce(parse_address(address)))
            case _:
                raise ValueError(f"{message[0]!r} is nothing that a worker says")

    def _heard(self, worker: _Worker) -> None:
        worker.heard = time.monotonic()
        worker.owes_since = None if worker.applied == self._sent else worker.heard

    def _on_lost(self, worker: _Worker) -> None:
        """A worker has ended, or is going to."""
        worker.channel, worker.listening = None, False
        process, worker.process = worker.process, None
        if process is not None:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            how = f"status {process.returncode}" if process.returncode >= 0 else f"signal {-process.returncode}"
            if not self._ending:
                log.error("worker %d ended with %s", worker.number, how)
                if not self._ready.is_set():
                    self._failure = f"worker {worker.number} ended with {how} before it was ready; its messages say why"
                    self._ready.set()
        if worker.metrics:
            self._remains = counters(summed([self._remains, worker.metrics]))
            worker.metrics = b""
        worker.live = _NOTHING
        for question in list(self._questions):
            self._told(question, worker)
        self._ended(worker)

    def _ended(self, worker: _Worker) -> None:
        """Start another one, later."""
        self._share()
        self._settle()
        self._on_change()
        if self._ending or self._failure:
            return
        if time.monotonic() - worker.started > _HEALTHY_S:
            worker.restart_delay_s = FIRST_RESTART_S
        self._later(worker.restart_delay_s, lambda: self._restart(worker))
        worker.restart_delay_s = min(2 * worker.restart_delay_s, LAST_RESTART_S)

    def _minded_by(self, worker: _Worker) -> list[int]:
        """At which sockets it takes callers: at those of its own doors, and of workers before it that are not there."""
        count = len(self._workers)
        found: list[int] = []
        for number, door in enumerate(self._doors):
            places = (self._workers[(number + step) % count] for step in range(count))
            if next((one for one in places if one.listening or one is worker), None) is worker:
                found += range(number * len(door), (number + 1) * len(door))
        return found

    def _share(self) -> None:
        """There is one more worker that takes callers, or one less."""
        for worker in self._workers:
            if worker.listening and worker.channel is not None and worker.minds != self._minded_by(worker):
                worker.minds = self._minded_by(worker)
                worker.channel.send("listen", worker.minds)

    def _restart(self, worker: _Worker) -> None:
        if not self._ending:
            self.restarts += 1
            self._group.create_task(self._launch(worker))

    def _watch(self) -> None:
        """Kill what hangs: its successor will do better, and a change waits for it. Pass on an operator's log level."""
        level, self._level = self._level, log_levels.levels()
        if level != self._level:
            for worker in self._workers:
                if worker.channel is not None:
                    worker.channel.send("level", self._level)
        now = time.monotonic()
        for worker in self._workers:
            if worker.process is None or worker.channel is None:
                continue
            if worker.owes_since is None:
                if now - worker.heard >= BEAT_S:
                    worker.owes_since = now
                    worker.channel.send("lives")
            elif now - worker.owes_since > APPLY_TIMEOUT_S:
                log.error("worker %d has answered nothing for %g s, and is killed", worker.number, APPLY_TIMEOUT_S)
                worker.process.kill()
        if not self._ending:
            self._later(_WATCH_S, self._watch)

    def _later(self, delay_s: float, callback: Callable[[], None]) -> None:
        def run() -> None:
            self._timers.discard(timer)
            callback()

        timer = self._loop.call_later(delay_s, run)
        self._timers.add(timer)

    # -- what workers ask

    async def _look_up(
        self, channel: Channel | None, question: int, ask: Callable[[Directory], Coroutine[Any, Any, None]]
    ) -> None:
        refusal = ("", "")
        try:
            if self._directory is not None:
                await ask(self._directory)
        except RefusedError as error:
            refusal = (error.reason, error.detail)
        if channel is not None:  # the configuration that is the answer went before
            channel.send("answer", question, *refusal)

    async def _introduce(self, address: IpAddress) -> None:
        with contextlib.suppress(RefusedError):  # this proxy shuts down
            if self._directory is not None:
                await self._directory.introduce(address, "")

    # -- operators

    def render(self) -> asyncio.Future[bytes]:
        """The sum of all metrics, as soon as all workers have told theirs, or have not within 2 s."""
        result: asyncio.Future[bytes] = self._loop.create_future()

        def answer() -> None:
            told = [worker.metrics for worker in self._workers]
            result.set_result(summed([self._telemetry.render(), self._remains, *told]))

        self._ask("metrics", answer)
        return result

    def live(self) -> asyncio.Future[Listing]:
        """Connections of opaque TCP, and requests that are under way, of all workers; likewise."""
        result: asyncio.Future[Listing] = self._loop.create_future()

        def answer() -> None:
            told = [worker.live for worker in self._workers]
            result.set_result(Listing(sum(live.total for live in told), [line for live in told for line in live.lines]))

        self._ask("live", answer)
        return result

    def _ask(self, what: str, answer: Callable[[], None]) -> None:
        self._asked += 1
        number = self._asked
        asked = {worker for worker in self._workers if worker.listening}
        self._questions[number] = _Question(answer, asked)
        for worker in self._workers:
            if worker in asked and worker.channel is not None:
                worker.channel.send(what, number)
        self._later(METRICS_TIMEOUT_S, lambda: self._answer(number))
        if not asked:
            self._answer(number)

    def _told(self, number: int, worker: _Worker) -> None:
        question = self._questions.get(number)
        if question is not None:
            question.missing.discard(worker)
            if not question.missing:
                self._answer(number)

    def _answer(self, number: int) -> None:
        question = self._questions.pop(number, None)
        if question is not None:
            question.answer()

    def tap(self) -> None:
        """Somebody watches now, or nobody does any more."""
        for worker in self._workers:
            if worker.channel is not None:
                worker.channel.send("tap", self._telemetry.taps.watched)

    def reopen_log(self) -> None:
        """The access log's file was moved away."""
        for worker in self._workers:
            if worker.process is not None and worker.listening:
                worker.process.send_signal(signal.SIGHUP)

    def renewed(self) -> None:
        """There is a new certificate: workers look for it themselves."""

    def dump(self) -> dict[str, object]:
        """For operators."""
        return {
            "workers": [
                {
                    "number": worker.number,
                    "pid": worker.process.pid if worker.process is not None else None,
                    "listening": worker.listening,
                    "applied": worker.applied,
                }
                for worker in self._workers
            ],
            "batches": self._sent,
        }

    # -- the end

    def interrupt(self) -> None:
        """Let `start` return."""
        self._ready.set()

    def sockets(self) -> list[socket.socket]:
        """Where callers are taken."""
        return [sock for door in self._doors for sock in door]

    async def drain(self, timeout_s: float, grace_s: float) -> None:
        """As `Serving.drain`: let all workers drain, and end."""
        self._ending = True
        self._close_doors()
        self.hasten(timeout_s, grace_s)
        pause_s = 0.02
        while any(worker.process is not None for worker in self._workers):
            if time.monotonic() >= self._drain_by + FAREWELL_S + _END_S:
                break
            await asyncio.sleep(pause_s)
            pause_s = min(1.1 * pause_s, 0.5)

    def hasten(self, timeout_s: float, grace_s: float) -> None:
        """As `Serving.hasten`."""
        self._drain_by = min(self._drain_by, time.monotonic() + timeout_s)
        for worker in self._workers:
            if worker.channel is not None:
                worker.channel.send("drain", timeout_s, grace_s)

    def _close_doors(self) -> None:
        for sock in self.sockets():
            sock.close()
        self._doors = []

    def close(self) -> None:
        self._ending = True
        self._close_doors()
        for timer in self._timers:
            timer.cancel()
        for worker in self._workers:
            if worker.process is not None:
                worker.process.kill()
                worker.process.wait()
            if worker.channel is not None:
                worker.channel.close()


def _process(fd: int, listening: Sequence[int]) -> subprocess.Popen[bytes]:
    """A worker at the other end of a socket pair. Raises OSError."""
    # -P: a module in the working directory must not stand in for one of ours.
    command = [sys.executable, "-P", "-m", "waypoint.worker", str(fd), str(os.getpid()), *map(str, listening)]
    return subprocess.Popen(command, pass_fds=[fd, *listening], stdin=subprocess.DEVNULL)
