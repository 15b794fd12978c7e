"""Configuration from files: the same messages that a broker would carry, made by a short-lived child."""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgpack

from control.api import messages
from control.api.messages import Envelope
from control.api.policy import DEFAULT_ROOT_NAMESPACE

Batch = list[tuple[str, bytes]]

_RENDER_TIMEOUT_S: Final = 150.0  # beyond the child's own limit of processor time
_REFUSED: Final = 2  # the child's exit status for resources that are wrong; `render` has it too
_LENGTH: Final = struct.Struct("!I")


class ConfigError(Exception):
    """The files were refused; the text is every error in them. What was applied before stays."""


_Fingerprint = tuple[tuple[str, int, int, int], ...]


class FileSource:
    """Turns files into batches, each of them the whole configuration, with tombstones for what went away.

    A path may be a directory, whose YAML files are then read.
    """

    def __init__(
        self, paths: Sequence[str | Path], trust_domain: str, root_namespace: str = DEFAULT_ROOT_NAMESPACE
    ) -> None:
        self._paths = tuple(Path(path).absolute() for path in paths)
        self._trust_domain = trust_domain
        self._root_namespace = root_namespace
        # Nobody else writes these records, so one epoch does, and versions are counted from here.
        self._epoch = 1
        self._version = 0
        self._topics: frozenset[str] = frozenset()
        self._seen: _Fingerprint = ()
        self.warnings = ""
        """What the last good load warned of, a line each."""

    def load(self) -> Batch:
        """The whole configuration now; blocks for the child's life, some 0.2 s. Raises ConfigError."""
        self._seen = self._fingerprint()  # before reading: a change meanwhile is then one more
        version = self._version + 1
        issued_at = int(time.time())
        output, warnings = self._render(version, issued_at)
        batch = list(_frames(output))
        topics = frozenset(topic for topic, _ in batch)
        # All that ever went away, not only now: the last batch may not have been applied.
        tombstone = messages.encode(Envelope(self._epoch, version, issued_at, None))
        batch += [(topic, tombstone) for topic in sorted(self._topics - topics)]
        self._version = version
        self._topics |= topics
        self.warnings = warnings
        return batch

    async def watch(
        self,
        on_batch: Callable[[Batch], None],
        on_error: Callable[[ConfigError], None],
        interval_s: float = 0.5,
    ) -> None:
        """Loads again whenever a file has changed since the last load, until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            if self._fingerprint() == self._seen:
                continue
            try:
                batch = await asyncio.to_thread(self.load)
            except ConfigError as error:
                on_error(error)
            else:
                on_batch(batch)

    def _render(self, version: int, issued_at: int) -> tuple[bytes, str]:
        """Standard output and standard error of the child. Raises ConfigError."""
        command = [
            sys.executable,
            "-I",  # a module in the working directory must not stand in for one of ours
            "-X",
            "utf8",
            "-m",
            "control.client.render",
            f"--trust-domain={self._trust_domain}",
            f"--root-namespace={self._root_namespace}",
            f"--epoch={self._epoch}",
            f"--version={version}",
            f"--issued-at={issued_at}",
            "--",
            *map(str, self._paths),
        ]
        try:
            child = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_RENDER_TIMEOUT_S, check=False, env={}
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(f"reading the configuration took more than {_RENDER_TIMEOUT_S:.0f} s") from None
        except OSError as error:
            raise ConfigError(f"the reader of the configuration does not start: {error}") from error
        said = child.stderr.decode(errors="replace").strip()
        if child.returncode == _REFUSED:
            raise ConfigError(said)
        if child.returncode != 0:
            last = said.rpartition("\n")[2]
            raise ConfigError(f"the reader of the configuration failed with status {child.returncode}: {last}")
        return child.stdout, said

    def _fingerprint(self) -> _Fingerprint:
        """Changes when a file is written, replaced, added or removed."""
        found: list[tuple[str, int, int, int]] = []
        for path in self._paths:
            try:
                for file in (path, *path.iterdir()) if path.is_dir() else (path,):
                    status = file.stat()
                    found.append((str(file), status.st_ino, status.st_size, status.st_mtime_ns))
            except OSError as error:
                found.append((str(path), -1, error.errno or 0, 0))
        return tuple(sorted(found))


def _frames(output: bytes) -> Iterator[tuple[str, bytes]]:
    """The messages in the child's output. Raises ConfigError when it is cut short."""
    offset = 0
    while offset < len(output):
        if len(output) - offset < _LENGTH.size:
            raise ConfigError("the reader of the configuration stopped in the middle of its output")
        (length,) = _LENGTH.unpack_from(output, offset)
        offset += _LENGTH.size
        if length > len(output) - offset:
            raise ConfigError("the reader of the configuration stopped in the middle of its output")
        topic, payload = msgpack.unpackb(output[offset : offset + length], raw=False)
        offset += length
        yield topic, payload
