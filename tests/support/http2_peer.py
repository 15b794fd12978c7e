"""Either end of an HTTP/2 connection, by the h2 library: what comes is kept by stream, and can be waited for."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings

_GOAWAY = 7
Headers = Sequence[tuple[bytes, bytes]]


class Message:
    """What came on one stream so far."""

    def __init__(self) -> None:
        self.interim: list[Headers] = []
        self.headers: Headers = ()
        self.body = bytearray()
        self.trailers: Headers = ()
        self.ended = False
        self.reset: int | None = None

    @property
    def status(self) -> int:
        return int(dict(self.headers)[b":status"])

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None


class Http2Peer:
    """One connection; made by `speaking`."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        tasks: asyncio.TaskGroup,
        on_request: Handler | None,
        *,
        reads: bool,
        websockets: bool,
    ) -> None:
        config = h2.config.H2Configuration(
            client_side=on_request is None,
            header_encoding=None,
            validate_outbound_headers=False,  # a test may send what is malformed
            normalize_outbound_headers=False,
        )
        self.h2 = h2.connection.H2Connection(config)
        if websockets:
            offered = {h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL: 1}
            self.h2.local_settings = h2.settings.Settings(client=on_request is None, initial_values=offered)
        self.messages: dict[int, Message] = {}
        self.goaways: list[tuple[int, int]] = []
        self.closed = False
        self._reads = reads
        self._reader, self._writer = reader, writer
        self._tasks = tasks
        self._on_request = on_request
        self._changed = asyncio.Condition()
        self.h2.initiate_connection()
        self._send()

    def request(self, headers: Headers, body: bytes | None = None, *, ends: bool = True) -> int:
        """Open a stream; the body must fit the windows."""
        stream = self.h2.get_next_available_stream_id()
        self.messages[stream] = Message()
        self.h2.send_headers(stream, list(headers), end_stream=body is None and ends)
        if body is not None:
            self.h2.send_data(stream, body, end_stream=ends)
        self._send()
        return stream

    def respond(self, stream: int, headers: Headers, *, ends: bool = False) -> None:
        """Send a head, or trailers."""
        self.h2.send_headers(stream, list(headers), end_stream=ends)
        self._send()

    async def send(self, stream: int, data: bytes, *, ends: bool = False) -> None:
        """Send DATA as the windows allow it."""
        while data or ends:
            room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size, len(data))
            if data and not room:
                async with self._changed:
                    await self._changed.wait()
                continue
            last = room == len(data)
            self.h2.send_data(stream, data[:room], end_stream=ends and last)
            self._send()
            await self._writer.drain()
            data = data[room:]
            if last:
                return

    def end(self, stream: int, trailers: Headers = ()) -> None:
        if trailers:
            self.h2.send_headers(stream, list(trailers), end_stream=True)
        else:
            self.h2.end_stream(stream)
        self._send()

    def reset(self, stream: int, code: int) -> None:
        self.h2.reset_stream(stream, code)
        self._send()

    def goaway(self, last: int) -> None:
        """Behind h2's back, which would end the connection with it."""
        self._writer.write(b"\0\0\x08\x07\0\0\0\0\0" + struct.pack(">LL", last, 0))

    def credit(self, stream: int, octets: int) -> None:
        self.h2.acknowledge_received_data(octets, stream)
        self._send()

    async def until(self, test: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Raises TimeoutError."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(test)

    async def answer(self, stream: int) -> Message:
        """The whole message on a stream, or what came of it before it was reset or the connection ended."""
        message = self.messages[stream]
        await self.until(lambda: message.over or self.closed)
        return message

    def _send(self) -> None:
        self._writer.write(self.h2.data_to_send())

    async def pump(self) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            if self._on_request is not None:
                self.h2.receive_data(await self._reader.readexactly(24))  # the preface
            while True:
                head = await self._reader.readexactly(9)
                frame = head + await self._reader.readexactly(int.from_bytes(head[:3]))
                if head[3] == _GOAWAY:  # h2 would end the connection with it
                    self.goaways.append(struct.unpack_from(">LL", frame, 9))
                else:
                    for event in self.h2.receive_data(frame):
                        self._take(event)
                self._send()
                async with self._changed:
                    self._changed.notify_all()
        self.closed = True
        async with self._changed:
            self._changed.notify_all()

    def _take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived():
                message = self.messages[event.stream_id] = Message()
                message.headers = event.headers
                assert self._on_request is not None
                self._tasks.create_task(_served(self._on_request(self, event.stream_id, message)))
            case h2.events.InformationalResponseReceived():
                self.messages[event.stream_id].interim.append(event.headers)
            case h2.events.ResponseReceived():
                self.messages[event.stream_id].headers = event.headers
            case h2.events.TrailersReceived():
                self.messages[event.stream_id].trailers = event.headers
            case h2.events.DataReceived():
                self.messages[event.stream_id].body += event.data
                if self._reads and event.flow_controlled_length:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.StreamEnded():
                self.messages[event.stream_id].ended = True
            case h2.events.StreamReset():
                self.messages[event.stream_id].reset = int(event.error_code)


Handler = Callable[[Http2Peer, int, Message], Coroutine[None, None, None]]


@contextlib.asynccontextmanager
async def speaking(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    on_request: Handler | None = None,
    *,
    reads: bool = True,
    websockets: bool = False,
) -> AsyncIterator[Http2Peer]:
    """`on_request`: it is the server, and this is called for each stream, in a task of its own.

    `reads`: credit is given for what comes. `websockets`: it says that it takes them (RFC 8441).
    """
    async with asyncio.TaskGroup() as tasks:
        peer = Http2Peer(reader, writer, tasks, on_request, reads=reads, websockets=websockets)
        pump = tasks.create_task(peer.pump())
        try:
            yield peer
        finally:
            pump.cancel()
            writer.close()


def served_by(
    on_request: Handler, *, websockets: bool = False
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """For `asyncio.start_server`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with speaking(reader, writer, on_request, websockets=websockets) as peer:
            await peer.until(lambda: peer.closed, 60)

    return serve


async def _served(serving: Coroutine[None, None, None]) -> None:
    with contextlib.suppress(h2.exceptions.ProtocolError, ConnectionError):  # the caller has gone meanwhile
        await serving
