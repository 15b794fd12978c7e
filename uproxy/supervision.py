"""The launcher's loop: one sidecar that must live, one command whose end is the end."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from uproxy import linux, upgrade
from uproxy.entrance import Entrance
from uproxy.sidecar import Process, Sidecar
from uproxy.upgrade import Requests

# Exit statuses of a launcher itself, as nohup(1), env(1) and container runtimes use them.
FAILED = 125
NOT_EXECUTABLE = 126
NOT_FOUND = 127

_ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
_FORWARDED = _ENDING | {signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGCONT}
SIGNALS = _FORWARDED | {signal.SIGCHLD}
"""What the loop reads from its SignalFd."""

UPGRADE_TIMEOUT_S = 90.0
"""Above what a uProxy grants its successor (handover.CONFIGURED_S)."""
MAX_FORMER = 8
"""Former sidecars that carry connections to their end; each has the memory of one."""

# A renewed certificate need not be in use at once: it is renewed at half of its life.
_IDENTITY_CHECK_S = 2.0


class LaunchError(Exception):
    """A workload that is not started; `status` is the launcher's exit status."""

    def __init__(self, text: str, status: int = FAILED) -> None:
        super().__init__(text)
        self.status = status


class InterruptedLaunchError(Exception):
    """Somebody ended the launcher before the command ran."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


def say(name: str, text: str) -> None:
    """Tell the operator, on standard error."""
    print(f"uproxy exec: {name}: {text}", file=sys.stderr, flush=True)


class Supervision:
    """Waits for what can happen: a signal, a child's end, readiness, the time of a restart, a wish for an upgrade."""

    def __init__(self, name: str, signals: linux.SignalFd, sidecar: Sidecar, requests: Requests | None = None) -> None:
        """`requests`: where upgrades are asked for; None: nowhere."""
        self._name = name
        self._signals = signals
        self._sidecar = sidecar
        self._requests = requests
        self._asking: socket.socket | None = None  # who waits for an upgrade to be over
        self._command_pid = 0
        self._command_status: int | None = None
        self._ending = False
        self._identity_trouble = ""

    def start_sidecar(self, timeout_s: float) -> None:
        """Return when it is ready. Raises LaunchError when it gave up or takes too long."""
        deadline = time.monotonic() + timeout_s
        self._sidecar.start()
        while not self._sidecar.ready:
            if time.monotonic() > deadline:
                pending = self._sidecar.pending() or "its own start (it does not answer yet)"
                raise LaunchError(f"the sidecar is not ready after {timeout_s:g} s; pending: {pending}")
            self._turn(deadline)

    def run(self, command: Sequence[str], entrance: Entrance, environment: Mapping[str, str]) -> int:
        """Start the command and wait for its end. Returns its exit status, 128 + n for signal n."""
        try:
            process = subprocess.Popen(command, env=environment, preexec_fn=entrance)
        except FileNotFoundError as error:
            raise LaunchError(str(error), NOT_FOUND) from None
        except PermissionError as error:
            raise LaunchError(str(error), NOT_EXECUTABLE) from None
        self._command_pid = process.pid
        while self._command_status is None:
            self._turn(time.monotonic() + _IDENTITY_CHECK_S)
            self._refresh_identity()
        process.returncode = self._command_status
        return self._command_status if self._command_status >= 0 else 128 - self._command_status

    def end_sidecar(self, timeout_s: float) -> None:
        """Let it drain; what does not end in time is killed with its cgroup."""
        self._ending = True
        self._sidecar.terminate()
        deadline = time.monotonic() + timeout_s
        while self._sidecar.processes() and time.monotonic() < deadline:
            self._turn(deadline)

    def _refresh_identity(self) -> None:
        try:
            if self._sidecar.identity.refresh():
                say(self._name, "the renewed certificate is handed to the sidecar")
            self._identity_trouble = ""
        except OSError as error:
            if str(error) != self._identity_trouble:  # once, not at every look
                say(self._name, f"no renewed certificate can be handed to the sidecar: {error}")
            self._identity_trouble = str(error)

    def _turn(self, until: float) -> None:
        """Wait for one thing to happen, at most until then."""
        sidecar = self._sidecar
        # One that takes over is as good as a restart.
        restart_at = sidecar.restart_at if not self._ending and sidecar.upgrade is None else None
        times = [until, *([restart_at] if restart_at is not None else [])]
        if sidecar.upgrade is not None:
            times.append(sidecar.upgrade.deadline)
        watched: dict[int, Callable[[], None]] = {self._signals.fileno(): self._on_signals}
        watched[sidecar.ready_fd] = self._on_ready_fd
        if sidecar.upgrade is not None:
            watched[sidecar.upgrade.ready_fd] = self._on_upgrade_fd
        for process in sidecar.processes():
            watched[process.end_fd] = partial(self._on_end_fd, process)
        if self._requests is not None:
            watched |= dict.fromkeys(self._requests.descriptors(), self._on_request)
        poll = select.poll()
        for fd in watched:
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        # Rounded up, or the last millisecond would be spent spinning.
        ready = poll.poll(max(0.0, min(times) - time.monotonic()) * 1000 + 1)
        if ready:
            watched[ready[0][0]]()  # the others are looked at again: this one may have closed them
        if sidecar.upgrade is not None and time.monotonic() >= sidecar.upgrade.deadline:
            sidecar.upgrade.why = "it took too long"
            sidecar.upgrade.process.kill()
        if restart_at is not None and time.monotonic() >= restart_at:
            self._restart()

    def _restart(self) -> None:
        try:
            self._sidecar.start()
        except (OSError, subprocess.SubprocessError) as error:
            say(self._name, f"the sidecar cannot be started, and is tried again: {error}")
            self._sidecar.postpone(time.monotonic())

    def _on_ready_fd(self) -> None:
        self._sidecar.read_ready()
        if self._sidecar.ready and self._sidecar.restarts:
            say(self._name, f"the sidecar serves again (restart {self._sidecar.restarts})")

    # -- upgrades

    def _on_request(self) -> None:
        assert self._requests is not None
        asking = self._requests.next()
        if asking is None:
            return
        wrong = self._wrong_time()
        if not wrong:
            try:
                self._sidecar.begin_upgrade(UPGRADE_TIMEOUT_S)
                self._asking = asking
                return
            except (OSError, subprocess.SubprocessError) as error:
                wrong = f"the new one cannot be started: {error}"
        upgrade.answer(asking, {"error": wrong})

    def _wrong_time(self) -> str:
        """Why there can be no upgrade now; empty when there can."""
        if not self._command_pid or self._ending:
            return "the workload is starting or ending"
        if self._sidecar.upgrade is not None:
            return "an upgrade is under way"
        if not self._sidecar.ready:
            return "the sidecar is being restarted, which is an upgrade too"
        if len(self._sidecar.former) >= MAX_FORMER:
            return f"{MAX_FORMER} former sidecars still carry connections: wait, or end one with SIGTERM"
        return ""

    def _on_upgrade_fd(self) -> None:
        if self._sidecar.read_upgrade():
            former = [process.pid for process in self._sidecar.former]
            say(self._name, f"upgraded: the sidecar is pid {self._sidecar.pid} now; former ones drain: {former}")
            self._answer({"pid": self._sidecar.pid, "former": former})

    def _answer(self, answer: Mapping[str, object]) -> None:
        if self._asking is not None:
            upgrade.answer(self._asking, answer)
            self._asking = None

    # -- signals, and ends

    def _on_signals(self) -> None:
        for event in self._signals.read():
            if event.number == signal.SIGCHLD or self._ending:
                continue
            if not self._command_pid:
                if event.number in _ENDING:
                    raise InterruptedLaunchError(event.number)
            elif event.code <= 0:
                # From a process. What a terminal sends (code > 0), it has sent to the command as well.
                with suppress(ProcessLookupError):
                    os.kill(self._command_pid, event.number)
        self._reap()

    def _reap(self) -> None:
        """Collect every child that ended, orphans of the command included."""
        for pid, code in linux.reaped():
            if pid == self._command_pid:
                self._command_status = code
                continue
            for process in self._sidecar.processes():
                if process.pid == pid and process.end_fd < 0:
                    self._on_end(process, code)

    def _on_end_fd(self, process: Process) -> None:
        self._on_end(process, process.status())

    def _on_end(self, process: Process, code: int | None) -> None:
        upgrading = self._sidecar.upgrade
        if process in self._sidecar.former:
            self._sidecar.former.remove(process)
            process.ended(code)
        elif upgrading is not None and process is upgrading.process:
            self._sidecar.upgrade_ended(code)
            error = f"the new one did not take over: {upgrading.why}; the sidecar is as before"
            say(self._name, error)
            self._answer({"error": error})
        else:
            self._on_sidecar_end(code)

    def _on_sidecar_end(self, code: int | None) -> None:
        served = self._sidecar.ready or bool(self._command_pid)
        self._sidecar.ended(code, time.monotonic())
        if self._ending:
            return
        if code is None:
            how = "as its fork server has, so that nobody knows how"
        else:
            how = f"status {code}" if code >= 0 else signal.Signals(-code).name
        if code is not None and code >= 0 and not served:
            raise LaunchError(f"the sidecar ended with {how} before it was ready; its messages say why")
        say(self._name, f"the sidecar ended ({how}); connections are refused until it is back")
