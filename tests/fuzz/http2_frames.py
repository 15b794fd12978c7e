"""Either end of an HTTP/2 connection (`uproxy.hbone.Connection`) and any peer: frames, between what our own side does.

An input is a script: a byte that says which end, and whether of a tunnel or as in a waypoint; and steps (`_STEPS`).
It is run twice, with what arrives whole and in pieces, and must come to the same. A ledger of RFC 9113's windows and
stream states, kept from the bytes alone, judges what is sent.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from tests.support.hbone import (
    ACK,
    CLIENT_HELLO,
    CONNECT,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    OK,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_FLAG,
    REQUEST_BLOCK,
    RESPONSE_BLOCK,
    RST_STREAM,
    SERVER_HELLO,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    literal_block,
    put,
    u32,
)
from uproxy import hbone
from uproxy.hbone import Connection, DataReceived, ErrorCode, ProtocolError, RequestReceived, Stream
from waypoint.http2_connection import LIMITS

MAX_BYTES = 1024
WORDS = (
    u32(0), u32(1), u32(0x7FFFFFFF), b"\x00\x04\x00\x00\x00\x00", b"\x00\x04\x7f\xff\xff\xff",
    b"\x00\x03\x00\x00\x00\x00", b"\x00\x05\x00\x00\x40\x00", b"\x88", b"\x20", b"\x3f\xe1\x1f", bytes(8),
    REQUEST_BLOCK, RESPONSE_BLOCK,
)  # fmt: skip

_CLIENT, _NO_HELLO, _OF_WAYPOINT, _BITS = 1, 2, 4, 3
_BLOCKS: Final = (
    REQUEST_BLOCK,
    RESPONSE_BLOCK,
    literal_block([(b":status", b"100")]),
    literal_block([(b"x", b"y")]),
    b"\x20" + REQUEST_BLOCK,
    literal_block([(b":method", b"GET"), (b":method", b"GET")]),
    b"",
    b"\x3f\xe1\x1f" + b"\x40\x01a\x01b" + REQUEST_BLOCK + b"\xbe",
)
_INITIAL_WINDOW, _MAX_FRAME = 4, 5
_DEFAULT_WINDOW, _DEFAULT_FRAME = 65535, 16384

Seen = list[tuple[object, ...]]


def seeds() -> Iterable[bytes]:
    for steps in (
        _block_step(1, END_HEADERS, 0) + b"\x03\x00\x00" + _frame_step(DATA, 0, 1, b"hello") + b"\x05\x00\x05\x01",
        _block_step(1, END_HEADERS, 0) + b"\x03\x00\x00\x04\x00\x10\x07\x00" + _frame_step(DATA, END_STREAM, 1, b""),
        _block_step(1, 0, 6) + _frame_step(CONTINUATION, END_HEADERS, 1, REQUEST_BLOCK),
        _frame_step(
            HEADERS, END_HEADERS | PADDED | PRIORITY_FLAG, 1, b"\x01" + u32(3) + b"\x10" + REQUEST_BLOCK + b"."
        ),
        _block_step(1, END_HEADERS, 0) + _frame_step(RST_STREAM, 0, 1, u32(8)) + _block_step(3, END_HEADERS, 5),
        _block_step(1, END_HEADERS, 0) + _frame_step(DATA, PADDED, 1, b"\x03abc...") + b"\x05\x00\x03\x00",
        _frame_step(SETTINGS, 0, 0, struct.pack(">HIHI", _INITIAL_WINDOW, 3, _MAX_FRAME, 20000)),
        _frame_step(PING, 0, 0, bytes(8)) + _frame_step(PING, ACK, 0, bytes(8)) + b"\x08\x01\x08\x02\x08\x00\x07\x00",
        _frame_step(GOAWAY, 0, 0, u32(1) + u32(0)) + _frame_step(PRIORITY, 0, 1, u32(0) + b"."),
        _frame_step(WINDOW_UPDATE, 0, 0, u32(100)) + _frame_step(0x42, 0, 0, b"?"),
        b"\x02" + bytes((3, *frame(0x42, 0, 1, b"?")[:3])) + b"\x06\x00\x01\x06\x00\x00",
        b"\x03\x00\x00" + _block_step(1, END_HEADERS, 1) + b"\x04\x00\xff" + _frame_step(WINDOW_UPDATE, 0, 1, u32(9)),
        b"\x03\x00\x00\x03\x00\x00" + _block_step(1, END_HEADERS, 2) + _block_step(1, END_HEADERS | END_STREAM, 1),
    ):
        for how in (0x10, 0x11, 0x14, 0x15):
            yield bytes((how,)) + steps
    yield b"\x12\x02\x2a" + CLIENT_HELLO
    yield b"\x13\x02\x12" + SERVER_HELLO


def _frame_step(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return bytes((0, kind, flags, stream_id, len(payload))) + payload


def _block_step(stream_id: int, flags: int, block: int) -> bytes:
    return bytes((1, stream_id, flags, block))


def check(data: bytes) -> None:
    how = data[0] if data else 0
    whole = _Run(how, data[1:], None).seen()
    pieces = _Run(how, data[1:], 1 + (how >> _BITS)).seen()
    # Who makes us answer and reads nothing is found out earlier in pieces.
    overflow = ("error", ErrorCode.ENHANCE_YOUR_CALM, True)
    assert whole == pieces or overflow in (whole[-1], pieces[-1]), f"\n{whole}\n{pieces}"


class _Run:
    """A script and the end that it is about. What arrives comes whole, or in pieces of `step` bytes or more."""

    def __init__(self, how: int, script: bytes, step: int | None) -> None:
        self._script = script
        self._at = 0
        self._step = step
        client = bool(how & _CLIENT)
        self._limits = LIMITS if how & _OF_WAYPOINT else hbone.TUNNEL
        self._connection = Connection(client=client, limits=self._limits)
        self._ledger = _Ledger(self._connection)
        self._streams: list[Stream] = []
        self._pending: Counter[int] = Counter()
        """Bytes that arrived on a stream and that nobody took."""
        self._seen: Seen = []
        self._looked_at = 0
        """Bytes of the output that the ledger knows."""
        self._hello = b"" if how & _NO_HELLO else SERVER_HELLO if client else CLIENT_HELLO

    def seen(self) -> Seen:
        """All that a tunnel sees of it, events and bytes, until the script or the connection ends."""
        try:
            self._feed(self._hello)
            while self._at < len(self._script):
                _STEPS[self._byte() % len(_STEPS)](self)
                self._look()
        except ProtocolError as error:
            self._seen.append(("error", error.code, str(error) == hbone.OVERFLOW))
            self._look()
        return self._seen

    # -- steps

    def frame(self) -> None:
        kind, flags, stream_id, length = self._byte(), self._byte(), self._byte(), self._byte()
        payload = self._bytes(length) if length < 255 else bytes(self._byte() << 8)
        self._feed(frame(kind, flags, stream_id if stream_id < 255 else 0x7FFFFFFF, payload))

    def block(self) -> None:
        stream_id, flags, block = self._byte(), self._byte(), self._byte()
        self._feed(frame(HEADERS, flags & ~(PADDED | PRIORITY_FLAG), stream_id, _BLOCKS[block % len(_BLOCKS)]))

    def raw(self) -> None:
        self._feed(self._bytes(self._byte()))

    def answer(self) -> None:
        """As a client: open a stream. As a server: answer one."""
        stream, how = self._stream(), self._byte()
        if self._connection.client:
            if self._connection.can_open:
                self._streams.append(self._connection.open(CONNECT))
        elif stream is not None and not stream.answered:
            self._connection.respond(stream, OK if how < 128 else [(b":status", b"503")], end=how >= 128)

    def write(self) -> None:
        stream, length = self._stream(), self._byte() << 8
        if stream is not None and stream.answered and not stream.local_closed and length:
            self._seen.append(("wrote", put(self._connection, stream, bytes(length))))

    def take(self) -> None:
        stream, length, how = self._stream(), self._byte() << 8, self._byte()
        if stream is not None and (taken := min(length, self._pending[stream.id])):
            self._pending[stream.id] -= taken
            self._connection.consumed(stream, taken, keeps_up=how > 127)

    def end(self) -> None:
        stream, how = self._stream(), self._byte()
        if stream is None:
            return
        if how > 127:
            self._connection.reset(stream, ErrorCode.CANCEL)
        elif stream.answered:
            self._connection.end(stream, [(b"x-sum", b"7")] if how > 63 else ())

    def drain(self) -> None:
        self._byte()
        self._look()
        self._connection.sent()
        self._looked_at = 0

    def occasion(self) -> None:
        match self._byte() % 4:
            case 0:
                self._connection.tick()
            case 1:
                self._connection.ping(bytes(8))
            case 2:
                self._connection.goaway(final=False)
            case _:
                self._connection.goaway()

    # -- how

    def _byte(self) -> int:
        return next(iter(self._bytes(1)), 0)

    def _bytes(self, count: int) -> bytes:
        taken = self._script[self._at : self._at + count]
        self._at += count
        return taken

    def _stream(self) -> Stream | None:
        number = self._byte()
        return self._streams[number % len(self._streams)] if self._streams else None

    def _feed(self, data: bytes) -> None:
        step = max(self._step, len(data) // 64) if self._step else len(data) or 1
        for start in range(0, len(data), step):
            left = data[start : start + step]
            while left:
                buffer = bytearray(left)
                try:
                    self._note(self._connection.receive(memoryview(buffer)))
                except ProtocolError as error:
                    self._note(error.events)
                    raise
                left = left[len(left) - self._connection.unread :]
                buffer[:] = bytes(len(buffer))  # a view that outlives the call shows zeros
        self._look()
        self._ledger.fed(data)

    def _note(self, events: Iterable[hbone.Event]) -> None:
        for event in events:
            if isinstance(event, RequestReceived):
                self._streams.append(event.stream)
            if isinstance(event, DataReceived):
                payload = bytes(event.data)
                assert payload
                self._pending[event.stream.id] += len(payload)
                self._ledger.passed_on(event.stream.id, payload)
                if self._seen and self._seen[-1][:2] == ("DataReceived", event.stream.id):
                    payload = self._seen.pop()[2] + payload
                self._seen.append(("DataReceived", event.stream.id, payload))
            else:
                values = (each.id if isinstance(each, Stream) else each for each in event)
                self._seen.append((type(event).__name__, *values))

    def _look(self) -> None:
        """What was made since the last look, and that it may be sent."""
        output = b"".join(map(bytes, self._connection.output()))
        new = output[self._looked_at :]
        if new:
            self._seen.append(("sent", new) if not self._seen or self._seen[-1][0] != "sent" else self._joined(new))
            self._ledger.made(new)
        self._looked_at = len(output)
        assert len(output) <= self._limits.output + hbone.MAX_SPILL
        assert len(self._connection.streams) <= self._limits.streams

    def _joined(self, new: bytes) -> tuple[object, ...]:
        return ("sent", self._seen.pop()[1] + new)


_STEPS: Final[tuple[Callable[[_Run], None], ...]] = (
    _Run.frame,
    _Run.block,
    _Run.raw,
    _Run.answer,
    _Run.write,
    _Run.take,
    _Run.end,
    _Run.drain,
    _Run.occasion,
)


class _Ledger:
    """What the two ends may send, reckoned from the bytes alone. What was fed has been accepted."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._fed, self._made = bytearray(), bytearray()
        self._initial, self._max_frame = _DEFAULT_WINDOW, _DEFAULT_FRAME
        self._credit: Counter[int] = Counter()
        """That the peer gave, less what we sent; on a stream beside the initial window. 0: the connection."""
        self._granted: Counter[int] = Counter()
        """Likewise the other way."""
        self._ended: set[int] = set()
        self._reset: set[int] = set()
        self._began: Counter[int] = Counter()
        self._arrived: dict[int, bytes] = {}
        self._passed_on: dict[int, bytes] = {}

    def passed_on(self, stream_id: int, payload: bytes) -> None:
        self._passed_on[stream_id] = self._passed_on.get(stream_id, b"") + payload

    def fed(self, data: bytes) -> None:
        """What arrived, and was no error."""
        self._fed += data
        for kind, flags, stream_id, payload in _whole_frames(self._fed):
            if kind == SETTINGS and not flags & ACK:
                for code, value in struct.iter_unpack(">HI", payload):
                    if code == _INITIAL_WINDOW:
                        self._initial = value
                    elif code == _MAX_FRAME:
                        self._max_frame = value
            elif kind == WINDOW_UPDATE:
                self._credit[stream_id] += int.from_bytes(payload) & 0x7FFFFFFF
            elif kind == DATA:
                self._granted[0] -= len(payload)
                self._granted[stream_id] -= len(payload)
                if flags & PADDED:
                    payload = payload[1 : len(payload) - payload[0]]
                self._arrived[stream_id] = self._arrived.get(stream_id, b"") + payload
        if self._fed:  # a frame is under way
            return
        assert 0 <= _DEFAULT_WINDOW + self._granted[0] <= hbone.CONNECTION_WINDOW
        for stream_id in self._connection.streams:
            window = self._connection.limits.stream_window + self._granted[stream_id]
            assert 0 <= window <= hbone.MAX_STREAM_WINDOW
            assert self._passed_on.get(stream_id, b"") == self._arrived.get(stream_id, b"")

    def made(self, data: bytes) -> None:
        """What is about to leave."""
        self._made += data
        for kind, flags, stream_id, payload in _whole_frames(self._made):
            assert len(payload) <= (self._max_frame if kind == DATA else _DEFAULT_FRAME)
            if kind in (SETTINGS, PING, GOAWAY):
                assert not stream_id
                continue
            assert stream_id not in self._reset, "a frame on a stream that was reset"
            if kind == WINDOW_UPDATE:
                increment = int.from_bytes(payload)
                assert 0 < increment <= hbone.MAX_WINDOW
                self._granted[stream_id] += increment
                continue
            assert stream_id
            if kind == RST_STREAM:
                self._reset.add(stream_id)
                continue
            assert stream_id not in self._ended, "a frame after END_STREAM"
            if kind == HEADERS:
                self._began[stream_id] += 1
                assert flags & END_HEADERS
                assert self._began[stream_id] == 1 or (self._began[stream_id] == 2 and flags & END_STREAM)
            else:
                assert kind == DATA
                assert self._began[stream_id], "DATA before HEADERS"
                self._credit[0] -= len(payload)
                self._credit[stream_id] -= len(payload)
                if payload:
                    assert _DEFAULT_WINDOW + self._credit[0] >= 0, "more than the connection's window"
                    assert self._initial + self._credit[stream_id] >= 0, "more than the stream's window"
            if flags & END_STREAM:
                self._ended.add(stream_id)
        assert not self._made, "half a frame"


def _whole_frames(data: bytearray) -> Iterable[tuple[int, int, int, bytes]]:
    """Takes what is whole off the front: type, flags, stream, payload."""
    if data.startswith(PREFACE):
        del data[: len(PREFACE)]
    while len(data) >= 9 and len(data) >= (end := 9 + int.from_bytes(data[:3])):
        kind, flags, stream_id = struct.unpack_from(">BBI", data, 3)
        payload = bytes(data[9:end])
        del data[:end]
        yield kind, flags, stream_id & 0x7FFFFFFF, payload
