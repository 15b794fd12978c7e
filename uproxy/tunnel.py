"""A tunnel: one mTLS connection that carries HBONE, driven by the plane.

TLS runs over memory BIOs: one `recv` feeds the incoming one, every record in it is decrypted into one buffer, which is
parsed once; every frame of a turn is encrypted by one write and leaves by one `send`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import Protocol

from control.api.address import IpAddress
from control.api.identity import SpiffeId
from control.client.x509 import CertificateId
from uproxy import hbone, plane
from uproxy.errors import Flag, RefusedError
from uproxy.header_block import Headers
from uproxy.relay import Relay, StreamOwner, feed
from uproxy.resolve import host_port
from uproxy.tls import Revocations, certificates_of, handshake_refusal, leaf_of

CONNECT_TIMEOUT_S = 10.0  # ztunnel's
HANDSHAKE_TIMEOUT_S = 10.0
# Both ends ask after 10 s of silence and give up 20 s later (docs/hbone.md 2.2).
KEEPALIVE_S = 10.0
KEEPALIVE_TIMEOUT_S = 20.0
# A tunnel that moved as much since the last tick (process.TICK_S) carries bulk: 13 Mbit/s over 5 s.
BULK_BYTES = 8 << 20
# After our close_notify and FIN a peer that reads at all closes within a round trip.
LINGER_S = 30.0

# What one write of a whole output buffer makes, and the records' overhead: read at once, it ends with a record.
_CIPHERTEXT = bytearray(160 << 10)
_CIPHERTEXT_VIEW = memoryview(_CIPHERTEXT)
# A read of ciphertext can complete one record begun before it: never more plaintext than this.
_PLAINTEXT_VIEW = memoryview(bytearray((160 << 10) + (32 << 10)))

RequestCallback = Callable[["Tunnel", Relay, Headers, bool], None]


log = logging.getLogger(__name__)


class Identify(Protocol):
    """Checks the peer's leaf certificate after the handshake and returns who it is; raises RefusedError."""

    def __call__(self, tls: ssl.SSLObject) -> SpiffeId: ...


class Tunnel:
    """One HBONE connection over mTLS, either end. `on_close` is called once, when it is gone."""

    def __init__(
        self,
        data_plane: plane.Plane,
        sock: socket.socket,
        tls: ssl.SSLObject,
        bios: tuple[ssl.MemoryBIO, ssl.MemoryBIO],
        peer: SpiffeId,
        *,
        client: bool,
        on_request: RequestCallback | None = None,
        queues: bool = False,
    ) -> None:
        """`queues`: what comes here is new work, that waits while the plane is busy."""
        self.plane = data_plane
        self.peer = peer
        self.connection = hbone.Connection(client=client)
        self.starved: dict[StreamOwner, None] = {}  # those that wait for room, in the order in which they get it
        self.blocked = False  # the socket takes no more for now
        self.closed = False
        self.error = ""
        self.on_close: Callable[[Tunnel], None] = _ignore
        self.idle_since = time.monotonic()
        self.retire_at = math.inf
        """When it is to take no more streams, for its age (monotonic seconds)."""
        self.carries_bulk = False
        self.was_flooded = False
        """Whether it ended because its peer asked for too much."""
        self._moved: dict[int, int] = {}  # stream id -> bytes so far, at the last tick
        address = sock.getpeername()
        # As the kernel writes it: canonical, and mapped addresses do not occur (IPV6_V6ONLY). Without a zone.
        self.peer_address = IpAddress(address[0].partition("%")[0])
        self.peer_port: int = address[1]
        # Written once, for the records of all streams.
        self.peer_end, self.peer_id = host_port(self.peer_address, self.peer_port), str(peer)
        self._sock = sock
        self._tls = tls
        self._incoming, self._outgoing = bios
        self._unsent = memoryview(b"")
        self._unread = b""  # plaintext that is work for later turns; the socket waits meanwhile
        self._lost = ""  # why nothing comes behind that
        self._queues = queues
        self._later = data_plane.queue if queues else data_plane.postpone
        self._waits = False  # for a later turn: the socket is not looked at meanwhile
        self._since = 0.0  # when that began, in monotonic seconds
        self._had_waited_s = 0.0  # what was heard at `_had_waited_at`, until its last piece was read
        self._had_waited_at = -1.0
        self._dirty = False
        self._retired = False
        self._finishing = False
        self._finished_at: float | None = None  # when all was sent, with close_notify and FIN behind it
        self._heard_at = time.monotonic()
        self._pinged_at: float | None = None
        self._on_request = on_request
        data_plane.watch(sock.fileno(), plane.READ, self._on_events)
        self.touch()
        # The peer may have sent frames right behind its last handshake message.
        if self._incoming.pending or tls.pending():
            self._decrypt()

    @property
    def certificates(self) -> tuple[CertificateId, ...]:
        """The peer's chain, the leaf first. Raises `X509Error` for what cannot be read."""
        return certificates_of(self._tls)

    @property
    def peer_expires_at(self) -> int:
        """When the peer's certificate expires, Unix time."""
        return leaf_of(self._tls).not_after

    @property
    def waited_s(self) -> float:
        """How long what was read last had waited here for its turn, from when this process could have read it."""
        if self._waits:
            return time.monotonic() - self._since
        return self._had_waited_s if self._had_waited_at == self._heard_at else 0.0

    # -- streams

    def open(self, headers: Headers) -> Relay:
        relay = Relay(self, self.connection.open(headers))
        self.touch()
        return relay

    def respond(self, relay: Relay, headers: Headers, *, end: bool = False) -> None:
        if not self.closed and relay.outcome is None:
            self.connection.respond(relay.stream, headers, end=end)
            self.touch()

    def reset_stream(self, stream: hbone.Stream, code: hbone.ErrorCode) -> None:
        if not self.closed:
            self.connection.reset(stream, code)
            self.touch()

    @property
    def usable(self) -> bool:
        """Whether another stream may be opened here."""
        return not self.closed and not self._retired and self.connection.can_open

    def retire(self) -> None:
        """Open no more streams here; the ones that are open go on."""
        self._retired = True

    # -- sending

    def touch(self) -> None:
        """There are frames to send: do it at the end of the turn."""
        if not self._dirty:
            self._dirty = True
            self.plane.mark_dirty(self)

    def flush(self) -> None:
        self._dirty = False
        if self.connection.overflowed:
            self._fail(hbone.OVERFLOW)
        if self.blocked or self.closed or self._finished_at is not None:
            return
        if self.connection.has_output:
            try:
                for frames in self.connection.output():
                    if frames:
                        self._tls.write(frames)
            except ssl.SSLError as error:
                self._fail(f"TLS: {error.reason or error}")
                return
            self.connection.sent()
            self._send(self._outgoing.read())
        if self._finishing and not self.blocked and not self.closed:
            self._finished_at = time.monotonic()
            self._say_goodbye()
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)

    def _send(self, data: bytes | memoryview) -> None:
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._fail(f"the tunnel broke: {error.strerror}")
            return
        if sent < len(data):
            self._unsent = memoryview(data)[sent:]
            if not self.blocked:
                self.blocked = True
                self._watch()
        elif self.blocked:
            self.blocked = False
            self._unsent = memoryview(b"")
            self._watch()
            feed(self.connection, self.starved)
            self.touch()

    def _watch(self) -> None:
        self.plane.rearm(self._sock.fileno(), (0 if self._waits else plane.READ) | (plane.WRITE if self.blocked else 0))

    # -- receiving

    def _on_events(self, events: int) -> None:
        try:
            if events & plane.WRITE and self.blocked:
                self._send(self._unsent)
            if events & plane.READ_READY and not self.closed and not self._waits:
                if self._queues and self.plane.busy:
                    self._wait(time.monotonic())
                else:
                    self._receive()
        except Exception:
            log.exception("a tunnel failed")
            self._fail("a bug of this proxy; its log has the traceback")

    def _receive(self) -> None:
        try:
            length = self._sock.recv_into(_CIPHERTEXT)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(f"the tunnel broke: {error.strerror}")
            return
        if not length:
            self._fail("the peer closed the tunnel")
            return
        if self._finished_at is not None:
            return  # nothing that can still come matters to anybody
        self._heard_at = time.monotonic()
        self._incoming.write(_CIPHERTEXT_VIEW[:length])
        self._decrypt()

    def _decrypt(self) -> None:
        tls, incoming, error = self._tls, self._incoming, self._lost
        length = len(self._unread)
        if length:
            _PLAINTEXT_VIEW[:length] = self._unread
        try:
            waiting = incoming.pending or tls.pending()
            while waiting:
                # The stubs know neither the buffer's type nor that a count comes back.
                rest = _PLAINTEXT_VIEW[length:] if length else _PLAINTEXT_VIEW
                taken: int = tls.read(len(rest), rest)  # type: ignore
                if not taken:
                    error = "the peer closed the tunnel"
                    break
                length += taken
                waiting = incoming.pending  # a record is read whole: there is always room for one
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            error = "the peer closed the tunnel"
        except ssl.SSLError as tls_error:
            # With TLS 1.3 this is also how a client learns that its certificate was refused.
            error = f"TLS: {tls_error.reason or tls_error}"
        try:
            self._dispatch(self.connection.receive(_PLAINTEXT_VIEW[:length]))
        except hbone.ProtocolError as protocol_error:
            # A stream that ended just before is the connection's no longer: only here its owner learns of it.
            self._dispatch(protocol_error.events)
            self.shut_down(protocol_error.code, f"the peer broke HTTP/2: {protocol_error}")
            return
        if self.connection.unread or self._waits:
            self._keep(_PLAINTEXT_VIEW[length - self.connection.unread : length], error)
        if error and not self._unread:
            self._fail(error)
        elif self.connection.has_output:
            self.touch()

    def _keep(self, unread: memoryview, error: str) -> None:
        """Leave this for a later turn; what is behind it waits in the socket, and slows the peer."""
        if self.closed:
            return
        self._unread, self._lost = bytes(unread), error
        if not self._unread:
            self._stop_waiting()
        elif self._waits:
            self._later(self._go_on)
        else:
            self._wait(self._heard_at)

    def _wait(self, since: float) -> None:
        self._waits, self._since = True, since
        self._watch()
        self._later(self._go_on)

    def _stop_waiting(self) -> None:
        self._waits = False
        self._had_waited_s, self._had_waited_at = time.monotonic() - self._since, self._heard_at
        self._watch()

    def _go_on(self) -> None:
        if self.closed:
            return
        try:
            if self._unread:
                self._decrypt()
                return
            self._receive()
            if self._waits and not self._unread and not self.closed:
                self._stop_waiting()  # nothing has come
        except Exception:
            log.exception("a tunnel failed")
            self._fail("a bug of this proxy; its log has the traceback")

    def _dispatch(self, events: list[hbone.Event]) -> None:
        for event in events:
            if self.closed:
                return
            if isinstance(event, hbone.DataReceived):
                event.stream.owner.on_data(event.data)
            elif isinstance(event, hbone.WindowOpened):
                if event.stream is None:
                    feed(self.connection, self.starved)
                elif event.stream.owner in self.starved:
                    del self.starved[event.stream.owner]
                    event.stream.owner.on_room()
            elif isinstance(event, hbone.StreamEnded):
                event.stream.owner.on_end()
            elif isinstance(event, hbone.StreamReset):
                event.stream.owner.on_reset(event.code)
            elif isinstance(event, hbone.ResponseReceived):
                event.stream.owner.on_response(event.headers)
                if event.ended:
                    event.stream.owner.on_end()
            elif isinstance(event, hbone.RequestReceived):
                assert self._on_request is not None
                self._on_request(self, Relay(self, event.stream), event.headers, event.ended)
            elif isinstance(event, hbone.PongReceived):
                self._pinged_at = None

    # -- keepalive and the end

    def end_if_revoked(self, revocations: Revocations) -> None:
        """Close now, with every stream, when the peer's certificate is no longer good."""
        try:
            revocations.refuse(self._tls)
        except RefusedError as error:
            self.shut_down(hbone.ErrorCode.NO_ERROR, str(error))

    def tick(self, now: float) -> None:
        """Called every few seconds: keepalive (docs/hbone.md 2.2)."""
        if self._finished_at is not None:
            if now - self._finished_at > LINGER_S:
                self._fail("the peer did not close the tunnel")
            return
        try:
            self.connection.tick()
        except hbone.ProtocolError as error:
            self.shut_down(error.code, f"the peer is slow: {error}")
            return
        self._look_for_bulk()
        if self.connection.streams:
            self.idle_since = now
        if self._pinged_at is not None:
            if now - self._pinged_at > KEEPALIVE_TIMEOUT_S:
                self.shut_down(hbone.ErrorCode.NO_ERROR, "the peer answered no PING")
        elif now - self._heard_at >= KEEPALIVE_S:
            self._pinged_at = now
            self.connection.ping(struct.pack(">d", now))
            self.touch()

    def _look_for_bulk(self) -> None:
        """Counted where bytes are counted anyway, and only now and then: nothing of it is on a message's path."""
        before = self._moved
        self._moved = {
            stream.id: stream.owner.sent + stream.owner.received
            for stream in self.connection.streams.values()
            if isinstance(stream.owner, Relay)
        }
        self.carries_bulk = any(moved - before.get(number, 0) >= BULK_BYTES for number, moved in self._moved.items())

    def drain(self, *, final: bool) -> None:
        """Ask the peer to open no more streams here; the ones that are open go on."""
        if not self.closed:
            self.connection.goaway(final=final)
            self.touch()

    def finish(self, text: str) -> None:
        """Close a tunnel that nobody needs any more, in order: what is queued leaves first, then GOAWAY, close_notify
        and FIN; the socket is closed when the peer has closed it too.

        A connection may have ended well for its sender while its last bytes are still here or on their way. Closing at
        once would lose them: the first, and with the RST that a closed socket answers to whatever the peer still sends,
        the second, too.
        """
        if not self.closed and not self._finishing:
            self._finishing = self._retired = True
            self.connection.goaway(text=text)
            self.touch()

    def shut_down(self, code: hbone.ErrorCode, text: str) -> None:
        """Close now, whatever is open: GOAWAY and close_notify, as far as the socket takes them."""
        if self.closed:
            return
        self.was_flooded = code is hbone.ErrorCode.ENHANCE_YOUR_CALM
        self.connection.goaway(code, text=text)
        self.flush()
        if not self.closed and not self.blocked:
            self._say_goodbye()
        self._fail(text)

    def _say_goodbye(self) -> None:
        with contextlib.suppress(ssl.SSLError):  # it wants the peer's close_notify, for which nobody waits here
            self._tls.unwrap()
        with contextlib.suppress(OSError):
            self._sock.send(self._outgoing.read())

    def _fail(self, text: str) -> None:
        """The tunnel is gone, and with it every stream; each ends as a reset, never as a clean end."""
        if self.closed:
            return
        self.closed = True
        self.error = text
        self.plane.unwatch(self._sock.fileno())
        self._sock.close()
        streams = list(self.connection.streams.values())
        self.connection.streams.clear()
        for stream in streams:
            if stream.owner is not None:
                stream.owner.on_reset(hbone.ErrorCode.CANCEL, text)
        self.on_close(self)


def _ignore(_: Tunnel) -> None: ...


async def dial(
    data_plane: plane.Plane,
    host: str,
    port: int,
    context: ssl.SSLContext,
    identify: Identify,
    source: str | None,
) -> Tunnel:
    """Open a tunnel to a peer's HBONE port. Raises RefusedError (retriable: nothing was sent)."""
    try:
        sock = await data_plane.connect(host, port, CONNECT_TIMEOUT_S, source=source)
    except TimeoutError as error:
        detail = f"{host}:{port}: no answer in {CONNECT_TIMEOUT_S:g} s: does a firewall or NetworkPolicy block {port}?"
        raise RefusedError("connect-failed", detail, retriable=True) from error
    except OSError as error:
        detail = f"{host}:{port}: {error.strerror}: is a uProxy running there?"
        raise RefusedError("connect-failed", detail, retriable=True) from error
    try:
        tls, bios = await handshake(data_plane, sock, context, server_side=False)
        peer = identify(tls)
        return Tunnel(data_plane, sock, tls, bios, peer, client=True)
    except OSError as error:  # it went away between two steps
        sock.close()
        detail = f"{host}:{port}: {error.strerror}"
        raise RefusedError("connect-failed", detail, flag=Flag.TLS_FAILURE, retriable=True) from error
    except BaseException:
        sock.close()
        raise


async def handshake(
    data_plane: plane.Plane, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool
) -> tuple[ssl.SSLObject, tuple[ssl.MemoryBIO, ssl.MemoryBIO]]:
    """The TLS handshake on a connected, non-blocking socket. Raises RefusedError with flag TLS_FAILURE."""
    bios = incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_side=server_side)
    deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
    try:
        while True:
            done = False
            try:
                tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                pass
            finally:
                # Also after a failure: the alert tells the peer why.
                await _send_all(data_plane, sock, outgoing.read(), deadline)
            if done:
                break
            await data_plane.ready(sock, plane.READ, deadline - time.monotonic())
            received = sock.recv(65536)
            if not received:
                raise OSError("the peer closed the connection during the TLS handshake")
            incoming.write(received)
    except ssl.SSLError as error:
        refused = handshake_refusal(error)
        refused.retriable = True
        raise refused from error
    except OSError as error:
        text = str(error) if isinstance(error, TimeoutError) else error.strerror or str(error)
        detail = f"TLS handshake with {_peername(sock)}: {text}"
        raise RefusedError("tls-failure", detail, flag=Flag.TLS_FAILURE, retriable=True) from error
    return tls, bios


async def _send_all(data_plane: plane.Plane, sock: socket.socket, data: bytes, deadline: float) -> None:
    while data:
        try:
            data = data[sock.send(data) :]
        except BlockingIOError:
            await data_plane.ready(sock, plane.WRITE, deadline - time.monotonic())


def _peername(sock: socket.socket) -> str:
    try:
        return host_port(*sock.getpeername()[:2])
    except OSError:
        return "a peer that is gone"
