"""Sockets that take connections, and the server side of tunnels: accept -> TLS -> who is the peer? -> CONNECT streams.

What a stream asks for, and whether it may have it, is its owner's business: `inbound` for a workload, else a waypoint.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Coroutine
from functools import lru_cache
from typing import Any, NamedTuple

from uproxy import hbone, plane, trace, tunnel
from uproxy.errors import Flag, RefusedError
from uproxy.plane import Plane
from uproxy.relay import Relay
from uproxy.resolve import host_port
from uproxy.tls import Context, peer_identity
from uproxy.trace import Traced
from uproxy.tunnel import RequestCallback, Tunnel

BACKLOG = 4096
ACCEPTS_PER_TURN = 64
# A handshake costs a millisecond: one at a time, or the tunnels that are open wait for a crowd of newcomers, or for
# somebody who begins handshakes and ends none.
HANDSHAKES_PER_TURN = 1
# Handshakes that wait for their peer. Anybody who reaches the port can start one and then say nothing, so the oldest
# makes room for a newcomer: a peer that does answer is done within a round trip or two.
MAX_HANDSHAKES = 512
MAX_TUNNELS = 4096
# Floods that an address may end tunnels with at once, and seconds until it may with another. Beyond, it is kept out:
# each new tunnel costs a handshake and lets it begin again.
MAX_FLOODS = 5
CALM_S = 1.0

_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([^\[\]:/@\s]{1,253})):([0-9]{1,5})", re.ASCII)

Serve = Callable[[socket.socket], Coroutine[Any, Any, None]]
Refused = Callable[[str, float, RefusedError], None]

log = logging.getLogger(__name__)


class Inherited:
    """Listening sockets that another process has handed over, until somebody wants to listen there."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, str, int], list[socket.socket]] = {}

    def add(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        host, port = sock.getsockname()[:2] if sock.family != socket.AF_UNIX else ("", 0)
        self._waiting.setdefault((sock.type, host, port), []).append(sock)

    def take(self, kind: socket.SocketKind, address: str, port: int) -> socket.socket | None:
        """The caller's from here on; None when there is none left. A Unix socket is known by its kind alone."""
        waiting = self._waiting.get((kind, address, port))
        return waiting.pop(0) if waiting else None

    def count(self, kind: socket.SocketKind, address: str, port: int) -> int:
        """How many may be taken."""
        return len(self._waiting.get((kind, address, port), ()))

    def close(self) -> None:
        """Nobody listens there any more."""
        for waiting in self._waiting.values():
            for sock in waiting:
                sock.close()
        self._waiting.clear()


class Listeners:
    """The data plane's listening sockets, of one process."""

    def __init__(self, data_plane: Plane, inherited: Inherited | None = None) -> None:
        """`inherited`: sockets that are used instead of new ones."""
        self._plane = data_plane
        self._inherited = inherited or Inherited()
        self._paused = False
        self.sockets: list[socket.socket] = []

    def listen(self, address: str, port: int, serve: Serve, at_once: int = ACCEPTS_PER_TURN) -> None:
        """Spawn `serve` for each connection, at most `at_once` in one turn. Raises OSError."""
        self.add(self._inherited.take(socket.SOCK_STREAM, address, port) or opened(address, port), serve, at_once)

    def add(self, listener: socket.socket, serve: Serve, at_once: int) -> None:
        """As `listen`, with a socket that listens; it is closed with the others."""
        family = listener.family
        self.sockets.append(listener)
        self._plane.watch(listener.fileno(), plane.READ, lambda _: self._accept(listener, family, serve, at_once))

    def drop(self, listener: socket.socket) -> None:
        """Accept no more from this one. It stays open, and is the caller's again."""
        self.sockets.remove(listener)
        self._plane.unwatch(listener.fileno())

    def pause(self) -> None:
        """Accept no more; what comes waits in the kernel."""
        self._paused = True
        for listener in self.sockets:
            self._plane.rearm(listener.fileno(), 0)

    def resume(self) -> None:
        self._paused = False
        for listener in self.sockets:
            self._plane.rearm(listener.fileno(), plane.READ)

    def close(self) -> None:
        for listener in self.sockets:
            self._plane.unwatch(listener.fileno())
            listener.close()
        self.sockets.clear()

    def _accept(self, listener: socket.socket, family: int, serve: Serve, at_once: int) -> None:
        for _ in range(at_once):
            try:
                # `accept` without looking up what is known here, which takes as long as the system call.
                fd, _ = listener._accept()  # type: ignore[attr-defined]  # it has no public name
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    # The backlog keeps what we cannot take yet; asking again at once would only burn CPU.
                    log.error("cannot accept: %s", error.strerror)
                    self._plane.rearm(listener.fileno(), 0)
                    self._plane.call_later(0.1, lambda: self._rearm(listener))
                    return
                continue  # that one connection is gone (ECONNABORTED, EPROTO, ...)
            sock = socket.socket(family, socket.SOCK_STREAM, 0, fileno=fd)  # a protocol left out would be asked for
            sock.setblocking(False)
            self._plane.spawn(serve(sock))

    def _rearm(self, listener: socket.socket) -> None:
        if listener in self.sockets and not self._paused:
            self._plane.rearm(listener.fileno(), plane.READ)


def opened(address: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket that listens. Raises OSError.

    `shared`: with other sockets of this user that say so too, among which the kernel spreads connections.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # Accepted sockets inherit it.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class TunnelServer:
    """Tunnels from peers, from their TCP connection on."""

    def __init__(
        self,
        data_plane: Plane,
        context: Callable[[], Context],
        trust_domain: str,
        on_request: RequestCallback,
        on_refused: Refused,
        *,
        queues: bool = False,
    ) -> None:
        """`context` gives the TLS context of the moment. `on_request` is called in the turn in which a stream came.

        `on_refused` is told of each connection that never became a tunnel: from where (`ip:port`), since when
        (monotonic seconds) and why not. `queues`: as a tunnel's.
        """
        self._plane = data_plane
        self._context = context
        self._trust_domain = trust_domain
        self._on_request = on_request
        self._on_refused = on_refused
        self._queues = queues
        self._handshakes: dict[socket.socket, None] = {}  # oldest first
        self._tunnels: set[Tunnel] = set()
        self._flooded: dict[str, float] = {}
        """Address -> when all of its floods are forgotten (monotonic seconds)."""

    def tunnels(self) -> list[Tunnel]:
        return list(self._tunnels)

    async def serve(self, sock: socket.socket) -> None:
        """One mTLS connection from a peer. Never raises."""
        started, source = time.monotonic(), _peer_address(sock)
        if self._flooded and self._is_kept_out(sock, started):
            sock.close()
            self._on_refused(source, started, _overload("it has ended its last tunnels with floods"))
            return
        if len(self._tunnels) >= MAX_TUNNELS:
            sock.close()
            self._on_refused(source, started, _overload(f"{len(self._tunnels)} tunnels are as many as are served"))
            return
        if len(self._handshakes) >= MAX_HANDSHAKES:
            self._give_up_handshake(next(iter(self._handshakes)))
        self._handshakes[sock] = None
        try:
            tls, bios = await tunnel.handshake(self._plane, sock, self._context(), server_side=True)
            peer = peer_identity(tls, self._trust_domain)
            self._context().revocations.refuse(tls)
            accepted = Tunnel(
                self._plane,
                sock,
                tls,
                bios,
                peer,
                client=False,
                on_request=self._on_request,
                queues=self._queues,
            )
        except RefusedError as error:
            sock.close()
            given_up = _overload(f"the oldest of {MAX_HANDSHAKES} handshakes made room for another")
            self._on_refused(source, started, error if sock in self._handshakes else given_up)
            return
        except OSError as error:  # it went away between two steps
            sock.close()
            self._on_refused(source, started, RefusedError("tls-failure", str(error), flag=Flag.TLS_FAILURE))
            return
        finally:
            self._handshakes.pop(sock, None)
        if not accepted.closed:
            self._tunnels.add(accepted)
            accepted.on_close = self._ended

    def _ended(self, gone: Tunnel) -> None:
        self._tunnels.discard(gone)
        if gone.was_flooded:
            now = time.monotonic()
            self._flooded[gone.peer_address] = max(self._flooded.get(gone.peer_address, now), now) + CALM_S

    def _is_kept_out(self, sock: socket.socket, now: float) -> bool:
        try:
            address = sock.getpeername()[0].partition("%")[0]
        except OSError:  # it is gone already
            return True
        return self._flooded.get(address, now) - now > MAX_FLOODS * CALM_S

    def _give_up_handshake(self, sock: socket.socket) -> None:
        """Its coroutine waits for the peer; to it, the peer hangs up."""
        del self._handshakes[sock]
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def tick(self, now: float) -> None:
        for carrier in self.tunnels():
            carrier.tick(now)
        self._flooded = {address: until for address, until in self._flooded.items() if until > now}

    def end_revoked(self) -> None:
        """There may be other revocation lists."""
        for carrier in self.tunnels():
            carrier.end_if_revoked(self._context().revocations)

    def drain(self, *, final: bool) -> None:
        for carrier in self.tunnels():
            carrier.drain(final=final)

    def finish(self) -> None:
        """Every connection has ended: close the tunnels in order."""
        for carrier in self.tunnels():
            carrier.finish("shutting down")

    def close(self) -> None:
        for carrier in self.tunnels():
            carrier.shut_down(hbone.ErrorCode.NO_ERROR, "shutting down")


class Asked(NamedTuple):
    """What a CONNECT asks for; `host` is an address, in any spelling, or a name."""

    authority: str
    host: str
    port: int


def asked_for(fields: dict[bytes, bytes]) -> Asked:
    """Read a request's headers (RFC 9113 sections 8.3.1 and 8.5). Raises RefusedError with status 400."""
    method = fields[b":method"]
    if method != b"CONNECT" or b":protocol" in fields:
        raise bad_request(f"{method.decode('latin-1')} on the HBONE port; only a plain CONNECT is served")
    authority = fields.get(b":authority", b"")
    if fields.get(b"host", authority) != authority:
        raise bad_request("Host names another destination than :authority does")
    return _read_authority(authority)


@lru_cache(maxsize=256)  # of one workload few are asked for
def _read_authority(value: bytes) -> Asked:
    authority = value.decode("latin-1")
    match = _AUTHORITY.fullmatch(authority)
    if match is None or not 0 < int(match[3]) < 65536:
        raise bad_request(f"{authority[:300]!r} is no host:port")
    return Asked(authority, match[1] or match[2], int(match[3]))


def traced(fields: dict[bytes, bytes]) -> Traced:
    """The trace, under whose id the caller logs this connection, or a new one."""
    return trace.read(fields.get(b"traceparent", b"")) or Traced(os.urandom(16).hex(), "")


def refuse(carrier: Tunnel, relay: Relay, error: RefusedError, request_id: str) -> None:
    """Answer a CONNECT with the status, and why (docs/hbone.md 4): a reason for programs, the rule, the id in logs."""
    headers = [
        (b":status", str(error.status).encode()),
        (b"x-uproxy-reason", error.reason.encode()),
        (b"x-request-id", request_id.encode()),
    ]
    if error.policy:
        headers.append((b"x-uproxy-policy", error.policy.encode()))
    carrier.respond(relay, headers, end=True)
    relay.discard()
    # The answer is whole, and nothing more is read (RFC 9113 section 8.1): a sender that never ended its side would
    # hold the stream for good.
    carrier.reset_stream(relay.stream, hbone.ErrorCode.NO_ERROR)


def bad_request(detail: str) -> RefusedError:
    return RefusedError("bad-request", detail, status=400, flag=Flag.DENY)


def _overload(detail: str) -> RefusedError:
    return RefusedError("overload", detail, flag=Flag.TLS_FAILURE)


def _peer_address(sock: socket.socket) -> str:
    try:
        return host_port(*sock.getpeername()[:2])
    except OSError:
        return "-"
