"""Two ends of an HBONE connection without a socket, and raw frames to break one with.

The frame builder is independent of `uproxy.hbone`: a mistake there must not be repeated here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from uproxy.hbone import Connection, DataReceived, Event, Stream
from uproxy.header_block import Headers

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY_FLAG = 0x1, 0x1, 0x4, 0x8, 0x20

CONNECT = [(b":method", b"CONNECT"), (b":authority", b"10.0.0.2:8080")]
OK = [(b":status", b"200")]


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """One frame (RFC 9113 section 4.1); `length` lies about the payload's."""
    told = len(payload) if length is None else length
    return struct.pack(">I", told)[1:] + struct.pack(">BBI", kind, flags, stream_id) + payload


def settings(values: Iterable[tuple[int, int]] = (), *, ack: bool = False) -> bytes:
    payload = b"".join(struct.pack(">HI", code, value) for code, value in values)
    return frame(SETTINGS, ACK if ack else 0, 0, payload)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def literal_block(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """HPACK: literals without indexing, new names, no Huffman; names and values of fewer than 127 bytes."""
    return b"".join(b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in headers)


REQUEST_BLOCK = literal_block(CONNECT)
RESPONSE_BLOCK = literal_block(OK)
CLIENT_HELLO = PREFACE + settings() + settings(ack=True)
SERVER_HELLO = settings() + settings(ack=True)


def request(stream_id: int = 1, *, flags: int = END_HEADERS) -> bytes:
    return frame(HEADERS, flags, stream_id, REQUEST_BLOCK)


def feed(connection: Connection, data: bytes, step: int | None = None) -> list[Event]:
    """Give bytes to one end, whole or `step` at a time. DATA comes back as bytes, not as views into the buffer."""
    events: list[Event] = []
    step = step or len(data) or 1
    for start in range(0, len(data), step):
        part = data[start : start + step]
        while part:
            buffer = bytearray(part)
            for event in connection.receive(memoryview(buffer)):
                if isinstance(event, DataReceived):
                    event = DataReceived(event.stream, memoryview(bytes(event.data)))
                events.append(event)
            part = part[len(part) - connection.unread :]
            # A view that outlives the call would show zeros now, as in the tunnel's shared buffer.
            buffer[:] = bytes(len(buffer))
    return events


def drain(connection: Connection) -> bytes:
    """Everything one end wants to send."""
    data = b"".join(bytes(part) for part in connection.output())
    connection.sent()
    return data


def frames_of(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Split whole frames: (type, flags, stream id, payload). A client's preface is skipped."""
    position = len(PREFACE) if data.startswith(PREFACE) else 0
    found = []
    while position < len(data):
        length = int.from_bytes(data[position : position + 3], "big")
        kind, flags, stream_id = struct.unpack_from(">BBI", data, position + 3)
        payload = data[position + 9 : position + 9 + length]
        assert len(payload) == length, "a frame was cut short"
        found.append((kind, flags, stream_id, payload))
        position += 9 + length
    return found


def put(connection: Connection, stream: Stream, data: bytes) -> int:
    """Write as much of `data` as there is room for now, as the tunnel does; how much that was."""
    done = 0
    while done < len(data):
        room = connection.reserve(stream)
        if not room:
            break
        part = data[done : done + len(room)]
        room[: len(part)] = part
        connection.commit(stream, len(part))
        done += len(part)
    return done


class Pair:
    """A client and a server that are joined by two byte queues."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step
        self.client = Connection(client=True)
        self.server = Connection(client=False)
        self.client_events: list[Event] = []
        self.server_events: list[Event] = []
        self.exchange()
        self.client_events.clear()
        self.server_events.clear()

    def exchange(self) -> None:
        """Deliver until both ends are silent."""
        while True:
            to_server, to_client = drain(self.client), drain(self.server)
            if not to_server and not to_client:
                return
            self.server_events += feed(self.server, to_server, self.step)
            self.client_events += feed(self.client, to_client, self.step)

    def opened(self, headers: Headers = CONNECT) -> tuple[Stream, Stream]:
        """An answered stream: the client's end and the server's."""
        mine = self.client.open(headers)
        self.exchange()
        theirs = self.server.streams[mine.id]
        self.server.respond(theirs, OK)
        self.exchange()
        return mine, theirs


def data_of(events: Iterable[Event], stream: Stream) -> bytes:
    """The payload that arrived for one stream, joined."""
    return b"".join(bytes(e.data) for e in events if isinstance(e, DataReceived) and e.stream is stream)


def connected(*, client: bool, step: int | None = None) -> Connection:
    """One end whose (raw) peer has said hello; what it sent so far is discarded."""
    connection = Connection(client=client)
    feed(connection, SERVER_HELLO if client else CLIENT_HELLO, step)
    drain(connection)
    return connection
