"""The process that takes over from this one: of the software that is installed now, by settings as they are now."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence

from uproxy.handover import UPGRADE_S, HandoverError


class Successor:
    """How one is started, one at a time."""

    def __init__(self, argv: Sequence[str]) -> None:
        """`argv`: of this one's `waypoint run`."""
        self.argv = [word for word in argv if word != "--take-over" and not word.startswith("--ready-fd=")]
        self._starting = False

    async def start(self) -> int:
        """Its pid, when it has taken over. Raises HandoverError when it has not."""
        if os.getpid() == 1:
            raise HandoverError("the first process of a container cannot be another one: start another container")
        if self._starting:
            raise HandoverError("an upgrade is under way")
        self._starting = True
        try:
            return await self._start()
        except OSError as error:
            raise HandoverError(f"the new one cannot be started: {error}") from None
        finally:
            self._starting = False

    async def _start(self) -> int:
        """Raises HandoverError or OSError."""
        process, ready = self._spawned()
        took_over = False
        try:
            async with asyncio.timeout(UPGRADE_S):
                await _readable(ready)
            took_over = bool(os.read(ready, 64))
            why = "its messages say why"
        except TimeoutError:
            why = f"it was not ready within {UPGRADE_S:g} s"
        finally:
            os.close(ready)
            if not took_over:  # nor will it after this one, which may be told to end meanwhile
                process.kill()
                process.wait()
        if not took_over:
            raise HandoverError(f"the new one did not take over: {why}")
        return process.pid

    def _spawned(self) -> tuple[subprocess.Popen[bytes], int]:
        """The process, and what can be read when it is ready, or gone. Raises OSError."""
        ready, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # -P: a module in the working directory must not stand in for one of ours.
        command = [sys.executable, "-P", "-m", "waypoint", "run", *self.argv, "--take-over", f"--ready-fd={theirs}"]
        try:
            return subprocess.Popen(command, pass_fds=[theirs], stdin=subprocess.DEVNULL), ready
        except OSError:
            os.close(ready)
            raise
        finally:
            os.close(theirs)


async def _readable(descriptor: int) -> None:
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(descriptor)
