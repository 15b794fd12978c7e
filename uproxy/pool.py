"""Tunnels to peers, shared by all connections that go the same way.

The key is (peer address, the identity expected there, owner): this process has one identity of its own, and a waypoint
keeps its callers' streams apart. A burst of connections to a new peer opens one tunnel; the others wait for it
(docs/hbone.md 2.6).
"""

from __future__ import annotations

import logging
import random
import ssl
import time
from collections.abc import Callable, Hashable, Sequence

from control.api.address import HBONE_PORT, IpAddress
from control.api.identity import SpiffeId
from uproxy import hbone, tunnel
from uproxy.errors import Flag, RefusedError
from uproxy.header_block import Headers
from uproxy.health import Health
from uproxy.plane import Plane, Waiter
from uproxy.relay import Relay
from uproxy.resolve import Hop
from uproxy.tls import Context, peer_identity
from uproxy.tunnel import Tunnel

# The peer itself waits up to 10 s for its application.
ANSWER_TIMEOUT_S = 15.0
IDLE_TIMEOUT_S = 300.0  # ztunnel's pool
# A tunnel that is older takes no new streams: those who come find a new one, which sees the peer's present certificate,
# policy and place behind a load balancer. The last of them are younger by a tenth, so that not all go at once.
MAX_AGE_S = 3600.0
# Tunnels on which one connection tries to open its stream: shared ones may be closing or full.
MAX_ATTEMPTS = 3
# Tunnels to one peer, as far as bulk asks for them: new streams avoid one that carries bulk.
MAX_BESIDE_BULK = 4

Key = tuple[str, SpiffeId, Hashable]

log = logging.getLogger(__name__)


class Pool:
    """Open tunnels, by peer. `context` gives the TLS context of the moment, so that a rotation applies to new ones."""

    def __init__(self, plane: Plane, context: Callable[[], Context], addresses: Sequence[IpAddress]) -> None:
        self._plane = plane
        self._context = context
        # The workload's own address, by family, so that peers see it, whatever else this host has.
        self._sources = {":" in address: address for address in reversed(addresses)}
        self._tunnels: dict[Key, list[Tunnel]] = {}
        self._dialling: dict[Key, list[Waiter[None]]] = {}
        self.health = Health(time.monotonic)

    def source(self, peer: str) -> IpAddress | None:
        """Our own address that a peer sees; None: the host chooses one."""
        return self._sources.get(":" in peer)

    def tunnels(self) -> list[Tunnel]:
        return [t for group in self._tunnels.values() for t in group]

    async def connect(self, hop: Hop, headers: Headers, owner: Hashable = None) -> Relay:
        """Open a CONNECT stream to a hop and wait for its 200. Raises RefusedError with what the peer said.

        Streams of different owners never share a tunnel.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                carrier, fresh = await self._tunnel((hop.address, hop.expected, owner))
            except RefusedError:
                self.health.failed(hop.address)
                raise
            relay = carrier.open(headers)
            try:
                answer = await self._plane.wait(relay.response, ANSWER_TIMEOUT_S)
            except TimeoutError as error:
                relay.abandon()
                raise RefusedError(
                    "connect-timeout", f"{hop.address}: no answer to CONNECT within {ANSWER_TIMEOUT_S:g} s"
                ) from error
            except ConnectionResetError as error:
                # Nothing was sent but HEADERS. An old tunnel may have been closing, or full: use a new one.
                carrier.retire()
                if fresh or attempt == MAX_ATTEMPTS:
                    raise RefusedError("connect-failed", f"{hop.address}: {error}", retriable=True) from error
                continue
            fields = dict(answer)
            if fields[b":status"] == b"200":
                if self.health:
                    self.health.worked(hop.authority)
                return relay
            relay.abandon()
            if fields[b":status"] == b"503":
                self.health.failed(hop.authority)
            raise _refusal(hop, fields)
        raise AssertionError("the last attempt returns or raises")

    async def _tunnel(self, key: Key) -> tuple[Tunnel, bool]:
        """A tunnel with room for a stream, and whether it was opened just now."""
        while True:
            busy: Tunnel | None = None
            group = self._tunnels.get(key, ())
            for carrier in group:
                if carrier.usable:
                    if not carrier.carries_bulk:
                        return carrier, False
                    busy = carrier
            if busy is not None and len(group) >= MAX_BESIDE_BULK:
                return busy, False
            waiting = self._dialling.get(key)
            if waiting is None:
                return await self._dial(key), True
            waiter: Waiter[None] = Waiter(self._plane)
            waiting.append(waiter)
            await waiter

    async def _dial(self, key: Key) -> Tunnel:
        address, expected, _ = key
        waiting = self._dialling[key] = []

        def identify(tls: ssl.SSLObject) -> SpiffeId:
            peer = peer_identity(tls, expected.trust_domain)
            self._context().revocations.refuse(tls)
            if peer != expected:
                raise RefusedError(
                    "wrong-identity",
                    f"{address}:{HBONE_PORT} proved to be {peer}, not {expected}",
                    flag=Flag.IDENTITY,
                    retriable=True,
                )
            return peer

        refused = RefusedError("connect-failed", f"{address}: a bug of this proxy; its log has the traceback")
        try:
            source = self.source(address)
            carrier = await tunnel.dial(self._plane, address, HBONE_PORT, self._context(), identify, source)
            carrier.on_close = lambda gone: self._forget(key, gone)
            carrier.retire_at = time.monotonic() + MAX_AGE_S * random.uniform(0.9, 1.0)
            if carrier.closed:  # its first bytes were an alert: our certificate was refused
                raise RefusedError("tls-failure", f"{address}: {carrier.error}", flag=Flag.TLS_FAILURE)
            self._tunnels.setdefault(key, []).append(carrier)
            self.health.worked(address)
            for waiter in waiting:
                waiter.set(None)
            return carrier
        except RefusedError as error:
            refused = error
            raise
        except Exception as error:
            log.exception("a dial failed as none should")
            raise refused from error
        finally:
            del self._dialling[key]
            for waiter in waiting:
                waiter.fail(refused)
            del refused  # its traceback holds this frame

    def _forget(self, key: Key, gone: Tunnel) -> None:
        group = self._tunnels.get(key, [])
        if gone in group:
            group.remove(gone)
        if not group:
            self._tunnels.pop(key, None)

    def tick(self, now: float) -> None:
        """Keepalive for all, and an end for those that nobody uses or that are old."""
        self.health.tick(now)
        for carrier in self.tunnels():
            carrier.tick(now)
            if now > carrier.retire_at:
                carrier.retire()
            unused = not carrier.connection.streams
            if unused and (now - carrier.idle_since > IDLE_TIMEOUT_S or not carrier.usable):
                carrier.finish("idle")

    def retire(self) -> None:
        """Open no more streams on these tunnels; each closes with its last stream (a certificate was rotated)."""
        for carrier in self.tunnels():
            carrier.retire()

    def end_revoked(self) -> None:
        """There may be other revocation lists."""
        for carrier in self.tunnels():
            carrier.end_if_revoked(self._context().revocations)

    def finish(self) -> None:
        """No more streams will be opened: close every tunnel in order."""
        for carrier in self.tunnels():
            carrier.finish("shutting down")

    def close(self) -> None:
        for carrier in self.tunnels():
            carrier.shut_down(hbone.ErrorCode.NO_ERROR, "shutting down")


def _refusal(hop: Hop, fields: dict[bytes, bytes]) -> RefusedError:
    """What a status other than 200 means (docs/hbone.md 2.4), with the reason that a uProxy adds to it."""
    text = fields[b":status"].decode("latin-1")
    status = int(text) if text.isdigit() else 502
    default = {400: "bad-request", 401: "policy"}.get(status, "upstream")
    reason = fields.get(b"x-uproxy-reason", default.encode()).decode("latin-1")
    policy = fields.get(b"x-uproxy-policy", b"").decode("latin-1")
    by = f" by {policy}" if policy else ""
    flag = Flag.DENY if status in (401, 403) else Flag.CONNECT
    return RefusedError(
        reason,
        f"http status: {status}: {hop.address} refused {hop.authority.decode()}: {reason}{by}",
        status=status,
        flag=Flag.WAYPOINT if reason == "waypoint-required" else flag,
        policy=policy,
        retriable=status == 503,
    )
