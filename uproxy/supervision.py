"""The launcher's loop: one sidecar that must live, one command whose end is the end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from uproxy import linux
from uproxy.entrance import Entrance
from uproxy.sidecar import Sidecar

# Exit statuses of a launcher itself, as nohup(1), env(1) and container runtimes use them.
FAILED = 125
NOT_EXECUTABLE = 126
NOT_FOUND = 127

_ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
_FORWARDED = _ENDING | {signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGCONT}
SIGNALS = _FORWARDED | {signal.SIGCHLD}
"""What the loop reads from its SignalFd."""

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
    """Waits for what can happen: a signal, a child's end, readiness, the time of a restart."""

    def __init__(self, name: str, signals: linux.SignalFd, sidecar: Sidecar) -> None:
        self._name = name
        self._signals = signals
        self._sidecar = sidecar
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
        while self._sidecar.pid and time.monotonic() < deadline:
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
        restart_at = self._sidecar.restart_at if not self._ending else None
        wakeup = until if restart_at is None else min(until, restart_at)
        poll = select.poll()
        poll.register(self._signals, select.POLLIN)
        if self._sidecar.ready_fd >= 0:
            poll.register(self._sidecar.ready_fd, select.POLLIN)
        end_fd = self._sidecar.end_fd
        if end_fd >= 0:
            poll.register(end_fd, select.POLLIN)
        # Rounded up, or the last millisecond would be spent spinning.
        for fd, _ in poll.poll(max(0.0, wakeup - time.monotonic()) * 1000 + 1):
            if fd == self._signals.fileno():
                self._on_signals()
            elif fd == self._sidecar.ready_fd:
                self._on_ready_fd()
            elif fd == end_fd:
                self._on_sidecar_end(self._sidecar.status())
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
            elif pid == self._sidecar.pid and self._sidecar.end_fd < 0:
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
