"""One line per connection, and at a waypoint per request, with ztunnel's field names, as JSON or text.

Writing never blocks the data plane: lines wait in a bounded buffer, are written a little at a time when the sink can
take them, and are dropped and counted when it cannot. No value can end a line or begin a field: every string is
escaped as a JSON string in ASCII, in both styles.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import select
import stat
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Final

from control.api.workload import host_of_key
from uproxy.errors import Flag

if TYPE_CHECKING:
    from uproxy.telemetry import Connection

MAX_BUFFER: Final = 512 * 1024
"""Bytes of lines that wait; about a thousand connections. Beyond, new lines are dropped."""
FLUSH_INTERVAL_S: Final = 0.1
MAX_FLUSH: Final = 256 * 1024
"""Bytes written in one go, so that a flush stays under a millisecond or so."""
MAX_VALUE: Final = 2048
"""Characters of one value; the longest that is not an error text is a SPIFFE ID."""

_CHUNK: Final = 4096  # PIPE_BUF: what a pipe that polls writable takes whole, without blocking (pipe(7))
_CHUNK_OF_FILE: Final = 64 * 1024  # a file takes any size whole, and each write costs a few microseconds
_STDOUT: Final = 1
OPENED: Final = "connection opened"
LIVES: Final = "connection"
COMPLETE: Final = "connection complete"
_ADDRESS: Final = re.compile(r"[0-9A-Za-z.:\[\]-]+")

Field = Callable[[str, "str | int"], str]
"""Name and value -> the text of a field."""
Fields = Callable[[Field], "list[str]"]
"""The fields of a line, each made by the function that it is called with."""

_log = logging.getLogger(__name__)


class Style(Enum):
    """How a line looks."""

    JSON = "json"
    TEXT = "text"


class AccessLog:
    """Formats closed connections and writes them to one sink. `dropped` counts lines that were lost."""

    def __init__(
        self,
        target: str,
        style: Style,
        loop: asyncio.AbstractEventLoop | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Opens `target`, a path or `-` for standard output; OSError if that fails. Without a loop, call `flush`."""
        self._target = target
        self._field, self._line = (_json_field, _json) if style is Style.JSON else (_text_field, _text)
        self._loop = loop
        self._wall_clock = wall_clock
        self._fd = _open(target)
        self._chunk_size = _chunk_size(self._fd)
        self._timer: asyncio.TimerHandle | None = None
        self._lines: deque[str] = deque()
        self._buffered = 0
        self._chunk = b""  # lines being written: what is left of them
        self._chunk_lines = 0
        self._torn = False  # the sink holds the beginning of a line that will not be finished
        self.dropped = 0

    def record(self, connection: Connection, now: float) -> None:
        """Adds the line of a connection that ended at `now` (monotonic seconds)."""
        fields = fields_so_far(connection, now, self._field)
        self._add(self._line(COMPLETE, level_of(connection), fields, _timestamp(self._wall_clock())))

    def note(self, message: str, level: str, fields: Fields) -> None:
        """Adds another line."""
        self._add(self._line(message, level, fields(self._field), _timestamp(self._wall_clock())))

    def _add(self, line: str) -> None:
        if self._buffered + len(line) > MAX_BUFFER:
            self.dropped += 1
            return
        self._lines.append(line)
        self._buffered += len(line)
        self._arm()

    def flush(self, wait_s: float = 0.0) -> None:
        """Writes what the sink takes now; waits up to `wait_s` for it when it is full (only when shutting down)."""
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        budget = MAX_FLUSH
        while budget > 0 and (self._chunk or self._lines):
            if not self._chunk:
                self._fill_chunk()
            if not poller.poll(wait_s * 1000):
                break
            try:
                written = os.write(self._fd, self._chunk[: self._chunk_size])
            except BlockingIOError:
                break
            except OSError:  # a full disk, a reader that went away: the mesh goes on without these lines
                self._drop_chunk()
                continue
            self._torn = written < len(self._chunk)
            self._chunk = self._chunk[written:]
            budget -= written

    def reopen(self) -> None:
        """Opens the file anew, after it was moved away (SIGHUP). The old one stays in use when that fails."""
        self.flush()
        if self._target == "-":
            return
        try:
            fd = _open(self._target)
        except OSError as error:
            _log.error("access log: cannot reopen %s, writing to the old file: %s", self._target, error)
            return
        if self._torn:
            self._drop_chunk()  # what is left of it would be half a line in the new file
            self._torn = False
        os.close(self._fd)
        self._fd, self._chunk_size = fd, _chunk_size(fd)

    def close(self, wait_s: float = 0.2) -> None:
        """Writes what is left, waiting at most `wait_s` in all for a slow sink, and closes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = time.monotonic() + wait_s
        while (self._chunk or self._lines) and (left := deadline - time.monotonic()) > 0:
            self.flush(left)
        if self._chunk:
            self._drop_chunk()
        self.dropped += len(self._lines)
        self._lines.clear()
        if self._fd != _STDOUT:
            os.close(self._fd)

    def _arm(self) -> None:
        if self._timer is None and self._loop is not None:
            self._timer = self._loop.call_later(FLUSH_INTERVAL_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.flush()
        if self._chunk or self._lines:
            self._arm()

    def _fill_chunk(self) -> None:
        """Takes whole lines, as many as fit one write; a longer line goes alone."""
        taken = [self._lines.popleft()]
        size = len(taken[0])
        while self._lines and size + len(self._lines[0]) < self._chunk_size:
            size += len(self._lines[0])
            taken.append(self._lines.popleft())
        self._buffered -= size
        self._chunk_lines = len(taken)
        self._chunk = ("\n" * self._torn + "".join(taken)).encode("ascii")

    def _drop_chunk(self) -> None:
        self.dropped += self._chunk_lines
        self._chunk = b""
        self._chunk_lines = 0


def _open(target: str) -> int:
    """A descriptor that does not block, without making anybody else's so."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    if target != "-":
        return os.open(target, flags, 0o640)
    kind = os.fstat(_STDOUT).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        # O_NONBLOCK belongs to the open file, which other processes share; opening it again makes one of our own.
        try:
            return os.open(f"/proc/self/fd/{_STDOUT}", flags & ~os.O_CREAT)
        except OSError:
            pass  # another user's pipe: polling before each small write has to do
    return _STDOUT


def _chunk_size(fd: int) -> int:
    """Bytes that one write may have."""
    return _CHUNK_OF_FILE if stat.S_ISREG(os.fstat(fd).st_mode) else _CHUNK


@functools.lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _timestamp(wall: float) -> str:
    """RFC 3339, UTC, with microseconds."""
    seconds, micros = divmod(round(wall * 1_000_000), 1_000_000)
    return f"{_second(seconds)}.{micros:06d}Z"


def json_line(message: str, level: str, fields: Fields, wall: float) -> str:
    """A line in JSON, for whoever else shows what the log has. `wall`: Unix time, in seconds."""
    return _json(message, level, fields(_json_field), _timestamp(wall))


def _json(message: str, level: str, fields: list[str], timestamp: str) -> str:
    head = f'{{"level":"{level}","time":"{timestamp}","scope":"access","message":"{message}"'
    return f"{head},{','.join(fields)}}}\n"


def _text(message: str, level: str, fields: list[str], timestamp: str) -> str:
    return f"{timestamp}\t{level}\taccess\t{message}\t{' '.join(fields)}\n"


def fields_so_far(connection: Connection, now: float, field: Field) -> list[str]:
    """What is known, in ztunnel's order; the fields that ztunnel has not follow. `now`: monotonic seconds."""
    fields = _ends(connection, field)
    fields.append(field("bytes_sent", connection.bytes_sent))
    fields.append(field("bytes_recv", connection.bytes_received))
    fields.append(field("duration", f"{max(0, int((now - connection.started) * 1000))}ms"))
    if connection.error:
        fields.append(field("error", connection.error))
    if connection.flag is not Flag.NONE:
        fields.append(field("response_flags", connection.flag.value))
    if connection.policy:
        fields.append(field("policy", connection.policy))
    if connection.audit:
        fields.append(field("audit", connection.audit))
    if connection.dry_run:
        fields.append(field("dry_run", connection.dry_run))
    _add_names(fields, connection, field)
    return fields


def fields_when_opened(connection: Connection, field: Field) -> list[str]:
    """The same, without what is counted and how it ends."""
    fields = _ends(connection, field)
    _add_names(fields, connection, field)
    return fields


def _ends(connection: Connection, field: Field) -> list[str]:
    source, destination = connection.source, connection.destination
    caller, callee = source.workload or _NOBODY, destination.workload or _NOBODY
    fields = [field("src.addr", source.address)]
    fields += _of_source(field, caller.name, caller.namespace, source.identity)
    fields.append(field("dst.addr", destination.address))
    if connection.hbone_address:
        fields.append(field("dst.hbone_addr", connection.hbone_address))
    fields += _of_destination(
        field,
        connection.destination_service,
        callee.name,
        callee.namespace,
        destination.identity,
        connection.direction,
    )
    return fields


def _add_names(fields: list[str], connection: Connection, field: Field) -> None:
    if connection.caller:
        fields.append(field("caller", connection.caller))
    if connection.native is not None:
        fields.append(field("path", "direct"))
        fields.append(field("srtt_us", connection.native.srtt_us))
        fields.append(field("retransmits", connection.native.retransmits))
    if connection.request_id:
        fields.append(field("request_id", connection.request_id))


class _Nobody:
    name = namespace = ""


_NOBODY: Final = _Nobody()


# The same peers come again and again; this saves half of a line's cost.
@functools.lru_cache(maxsize=512)
def _of_source(field: Field, workload: str, namespace: str, identity: str) -> tuple[str, ...]:
    return _named(field, ("src.workload", workload), ("src.namespace", namespace), ("src.identity", identity))


@functools.lru_cache(maxsize=512)
def _of_destination(
    field: Field, service: str, workload: str, namespace: str, identity: str, direction: str
) -> tuple[str, ...]:
    return _named(
        field,
        ("dst.service", host_of_key(service) if service else ""),
        ("dst.workload", workload),
        ("dst.namespace", namespace),
        ("dst.identity", identity),
        ("direction", direction),
    )


def _named(field: Field, *values: tuple[str, str]) -> tuple[str, ...]:
    """Those that are known."""
    return tuple(field(name, value) for name, value in values if value)


def level_of(connection: Connection) -> str:
    """Of the line at its end."""
    return "info" if connection.flag is Flag.NONE and not connection.error else "error"


def _json_field(name: str, value: str | int) -> str:
    if isinstance(value, int):
        return f'"{name}":{value}'
    return f'"{name}":{encode_basestring_ascii(value[:MAX_VALUE])}'


def _text_field(name: str, value: str | int) -> str:
    """Numbers and addresses bare, as ztunnel has them, other strings quoted."""
    if isinstance(value, int):
        return f"{name}={value}"
    quoted = _quoted(value)
    if name.endswith("addr") and _ADDRESS.fullmatch(quoted, 1, len(quoted) - 1):
        return f"{name}={quoted[1:-1]}"
    return f"{name}={quoted}"


def _quoted(value: str) -> str:
    return encode_basestring_ascii(value[:MAX_VALUE])  # escapes all but space to ~, without " and \
