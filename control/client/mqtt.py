"""One connection to the mesh's broker, and what aiomqtt lacks for it: who the broker is, and bounds on what it sends.

Only proxies that have joined import this: aiomqtt and paho take memory that a proxy with files does not need.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NoReturn, TypeVar

from control.api.identity import SpiffeId, make_id
from control.api.messages import MAX_PAYLOAD_BYTES
from control.api.policy import DEFAULT_ROOT_NAMESPACE
from control.client.dialling import dial
from control.client.lean_aiomqtt import aiomqtt
from control.client.membership import BROKER_SCHEME, host_and_port
from control.client.x509 import X509Error, check_svid, read_leaf

T = TypeVar("T")

KEEPALIVE_S: Final = 15
"""A broker that says nothing for twice as long is gone. It takes us for gone after 1.5 times this (MQTT 3.1.1 section
3.1.2.10)."""
TIMEOUT_S: Final = 15.0
"""For each answer of the broker. The TCP connection and the handshake have 5 s each of it."""
MAX_WAITING_BYTES: Final = 1024 * 1024
"""Of messages that have arrived and were not taken yet. Beyond, the broker waits."""
READ_SLICE_S: Final = 0.0005
"""Reading at a stretch, and to the end of a TLS record. aiomqtt would empty the socket: 30 ms, for 1,000 messages."""

_MESSAGE_OVERHEAD_BYTES: Final = 1024  # what a message takes beside its payload
_MAX_PACKET_BYTES: Final = MAX_PAYLOAD_BYTES + 4096  # with the topic; MQTT itself would let a packet have 256 MB
_CONNECT_TIMEOUT_S: Final = 5.0  # paho's own
_FAILURE: Final = 0x80  # the least failure among SUBACK's codes (MQTT 3.1.1 section 3.9.3)
_LAST_WORD_S: Final = 0.05  # a broker may refuse and hang up at once, and the loop may tell of both in either order

# paho tells what it raises as an error besides, and aiomqtt warns of more than 10 publishes in flight.
_quiet = logging.getLogger(f"{__name__}.paho")
_quiet.setLevel(logging.CRITICAL + 1)


class BrokerError(Exception):
    """The broker cannot be reached, or the connection to it is lost; the text says why."""


@dataclass(frozen=True, slots=True)
class BrokerAccess:
    """Where the broker is, and as whom we go there."""

    urls: Sequence[str]
    """`mqtts://host:8883`, any of which will do."""
    identity: SpiffeId
    context: Callable[[], ssl.SSLContext]
    """A new context for each connection, with the certificate of the moment: verifies the peer's chain, not its name.

    Raises OSError when there is none.
    """


@dataclass(frozen=True, slots=True)
class LastWill:
    """What the broker publishes for us, retained, when we are gone without a word."""

    topic: str
    payload: bytes


class Arrivals(asyncio.Queue[aiomqtt.Message]):
    """Messages that wait to be taken, in their order. Bounded: while it is full, the socket is not read.

    aiomqtt puts into it. Its own way to take out costs a task for each message.
    """

    def __init__(self) -> None:
        super().__init__()
        self._messages: deque[tuple[str, bytes]] = deque()
        self._bytes = 0
        self._any = asyncio.Event()

    def full(self) -> bool:
        return self._bytes >= MAX_WAITING_BYTES

    def put_nowait(self, item: aiomqtt.Message) -> None:
        payload = item.payload
        assert isinstance(payload, bytes), "paho hands out what it received"
        self._messages.append((item.topic.value, payload))
        self._bytes += len(payload) + _MESSAGE_OVERHEAD_BYTES
        self._any.set()

    def take(self) -> tuple[str, bytes] | None:
        """Topic and payload of the next message; None when there is none now."""
        if not self._messages:
            self._any.clear()
            return None
        message = self._messages.popleft()
        self._bytes -= len(message[1]) + _MESSAGE_OVERHEAD_BYTES
        return message

    async def wait(self) -> None:
        """Until there may be a message to take."""
        await self._any.wait()

    def wake(self) -> None:
        """Let `wait` return, though nothing has arrived."""
        self._any.set()


class _Link:
    """What the socket of one connection needs to know, and tells: in the loop, and in the thread that connects."""

    def __init__(self, broker: SpiffeId) -> None:
        self.broker = broker
        self.arrivals = Arrivals()
        self.fault = ""
        """Why the connection ended, where the socket knows."""
        self.on_close: Callable[[], object] = lambda: None
        """May be called in either."""
        self.closed = False
        self.heard_at = 0.0
        """When the broker last sent something, by the loop's clock."""
        self._socket: socket.socket | None = None
        self._abandoned = False

    def opened(self, sock: socket.socket) -> None:
        """Raises ConnectionAbortedError when nobody waits for this connection any more."""
        self._socket = sock
        if self._abandoned:
            raise ConnectionAbortedError

    def abandon(self) -> None:
        """End the connection as if it broke, so that the broker publishes the last will.

        The thread that connects cannot be stopped. What it has opened by now, paho will find closed.
        """
        self._abandoned = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # Not SSLSocket's own, after which plain text would pass.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Raises BrokerError for what aiomqtt raises."""
        try:
            yield
        except aiomqtt.MqttError as error:
            raise BrokerError(self.fault or str(error.__cause__ or error)) from None

    async def answered(self, call: Awaitable[T]) -> T:
        """What a call of aiomqtt's returns. Raises BrokerError when it fails, or nothing is heard for too long.

        A broker may send all that it retains before it answers, which takes its time on a slow line.
        """
        loop = asyncio.get_running_loop()
        self.heard_at = loop.time()
        timer: asyncio.TimerHandle | None = None
        try:
            async with asyncio.timeout(None) as patience:

                def check() -> None:
                    nonlocal timer
                    end = self.heard_at + TIMEOUT_S
                    if loop.time() < end:
                        timer = loop.call_at(end, check)
                    else:
                        patience.reschedule(end)

                check()
                with self.told():
                    return await call
        except TimeoutError:
            raise BrokerError(f"no answer within {TIMEOUT_S:.0f} s") from None
        finally:
            if timer is not None:
                timer.cancel()


class _BrokerSocket(ssl.SSLSocket):
    """The socket under paho: lets no MQTT pass before the broker has proved itself, and bounds what is read."""

    link: _Link
    _reading_since = 0.0
    """When the loop began to read without a pause; 0 while it does not."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            self.link.opened(self)
            super().do_handshake(block)
            _check_broker(self, self.link.broker)
        except BaseException:
            self.close()
            raise

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        # paho asks for the rest of a packet at once.
        if buflen > _MAX_PACKET_BYTES:
            self.link.fault = f"the broker sends a packet of {buflen} bytes; at most {_MAX_PACKET_BYTES} are read"
            raise ConnectionAbortedError(self.link.fault)
        # What TLS has decrypted already must be read: the loop hears only of what is in the kernel's buffer. That it
        # hears of that again and again meanwhile costs little, for it is at work on the messages anyway.
        if not self.pending():
            now = time.perf_counter()
            if self.link.arrivals.full() or (self._reading_since and now - self._reading_since > READ_SLICE_S):
                self._reading_since = 0.0
                raise ssl.SSLWantReadError
            self._reading_since = self._reading_since or now
        try:
            received = super().recv(buflen, flags)
            self.link.heard_at = time.monotonic()  # the loop's clock
            return received
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            self._reading_since = 0.0
            raise
        except OSError as error:
            self.link.fault = getattr(error, "reason", None) or str(error)
            raise

    def close(self) -> None:
        self.link.closed = True  # before the number of the descriptor may be another's
        super().close()
        self.link.on_close()


def _check_broker(connection: ssl.SSLSocket, broker: SpiffeId) -> None:
    """Raises ConnectionRefusedError for everybody else, of our own mesh too."""
    der = connection.getpeercert(binary_form=True)
    assert der is not None, "the context requires a certificate"
    try:
        peer = check_svid(read_leaf(der), broker.trust_domain)
    except X509Error as error:
        raise ConnectionRefusedError(f"it is not the broker: {error.detail}") from None
    if peer != broker:
        raise ConnectionRefusedError(f"it is {peer}, not the broker")


class Connection:
    """An open connection to the broker. What waits raises BrokerError once it is lost."""

    def __init__(self, client: aiomqtt.Client, link: _Link) -> None:
        self._client = client
        self._link = link

    @property
    def arrivals(self) -> Arrivals:
        return self._link.arrivals

    async def subscribe(self, filters: Sequence[str]) -> frozenset[str]:
        """Subscribe with QoS 0; returns the filters that the broker refuses.

        TCP loses nothing, and a broker that would drop something hangs up instead. In nats-server a QoS 1 subscription
        is a JetStream consumer: 48 KB, and every publish of anybody is matched by all of them in turn.
        """
        codes = await self._link.answered(self._client.subscribe([(name, 0) for name in filters]))
        # A refusal is not raised: SUBACK carries a code for each filter.
        values = (code if isinstance(code, int) else code.value for code in codes)
        return frozenset(name for name, value in zip(filters, values, strict=True) if value >= _FAILURE)

    async def unsubscribe(self, filters: Sequence[str]) -> None:
        await self._link.answered(self._client.unsubscribe(list(filters)))

    async def publish(self, topic: str, payload: bytes, *, retain: bool = True) -> None:
        """Publish with QoS 1; returns when the broker has it."""
        await self._link.answered(self._client.publish(topic, payload, qos=1, retain=retain))

    async def lost(self) -> NoReturn:
        """Waits for the end of the connection."""
        with self._link.told():
            # `Arrivals` keeps the messages to itself, so that aiomqtt's iterator only ever raises.
            async for _ in self._client.messages:
                pass
        raise AssertionError("aiomqtt's iterator has no end")


class _Loop:
    """The loop as aiomqtt sees it.

    aiomqtt has descriptors watched a moment later and by their numbers. If the socket is closed by then, the number may
    be that of another one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, link: _Link) -> None:
        self._loop = loop
        self._link = link

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def call_soon_threadsafe(self, callback: Callable[..., object], *arguments: Any) -> None:
        def unless_closed() -> None:
            if not self._link.closed:
                callback(*arguments)

        watches = callback in (self._loop.add_reader, self._loop.add_writer)
        self._loop.call_soon_threadsafe(unless_closed if watches else partial(callback, *arguments))


@contextlib.asynccontextmanager
async def connection(
    access: BrokerAccess, url: str, client_id: str, will: LastWill | None = None
) -> AsyncIterator[Connection]:
    """Connect, with a clean session; raises BrokerError. The last will is published unless the block ends in order."""
    host, port = host_and_port(url, BROKER_SCHEME)
    link = _Link(make_id(access.identity.trust_domain, DEFAULT_ROOT_NAMESPACE, "broker"))
    try:
        context = access.context()
    except OSError as error:
        raise BrokerError(f"no certificate to connect with: {error}") from None
    context.sslsocket_class = type("BrokerSocket", (_BrokerSocket,), {"link": link})
    client = aiomqtt.Client(
        host,
        port,
        identifier=client_id,
        clean_session=True,
        will=aiomqtt.Will(will.topic, will.payload, qos=1, retain=True) if will is not None else None,
        tls_context=context,
        keepalive=KEEPALIVE_S,
        # aiomqtt's own limits are asyncio.wait_for's, which Python 3.11 lets swallow a cancellation now and then.
        timeout=math.inf,
        queue_type=lambda maxsize: link.arrivals,  # type: ignore[arg-type]  # called, and nothing else
        socket_options=((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),),
        logger=_quiet,
    )
    client._loop = _Loop(client._loop, link)  # type: ignore[assignment]
    # paho would try one address after the other, for 5 s each.
    client._client._create_socket_connection = partial(dial, host, port, _CONNECT_TIMEOUT_S)  # type: ignore[method-assign]
    try:
        await _enter(client, link)
        yield Connection(client, link)
    except BaseException:
        link.abandon()
        raise
    else:
        with contextlib.suppress(BrokerError):
            await link.answered(client.__aexit__(None, None, None))
    finally:
        # aiomqtt leaves paho's socket and timer in the loop when connecting fails late, and when a packet makes paho
        # raise: then the loop would be told of the same packet for ever.
        client._client._sock_close()


async def _enter(client: aiomqtt.Client, link: _Link) -> None:
    """Connect. By itself aiomqtt waits out its time where the broker hangs up instead of answering."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(TIMEOUT_S) as patience:

            def give_up() -> None:
                if link.on_close is tell:
                    patience.reschedule(loop.time() + _LAST_WORD_S)

            def tell() -> None:
                loop.call_soon_threadsafe(give_up)

            link.on_close = tell
            try:
                with link.told():
                    await client.__aenter__()
                if link.closed:  # in the same turn as it was accepted, which aiomqtt forgets
                    raise BrokerError(link.fault or "it hangs up at once")
            finally:
                link.on_close = lambda: None
    except TimeoutError:
        raise BrokerError(link.fault or "it hangs up, or says nothing") from None
