"""One uProxy's half of the same-host direct path: what it allows and consents to, said to the node agent.

As a destination it names callers that have come by a tunnel and were let in, for as long as policy lets them in and
their certificate lives. As a caller it names what it has reached by a tunnel, with all its backends. Either is said
anew at every change and every few seconds; without it the agent's grants run out, and connections go by tunnels.

A uProxy whose workload may not go direct has no channel.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from control.api.address import IpAddress, parse_address
from control.api.identity import SpiffeId
from control.api.index import ResidentWorkload
from control.client.state import State
from control.client.x509 import CertificateId
from uproxy.errors import Flag
from uproxy.node import channel
from uproxy.node.channel import MAX_ALLOWED, MAX_BACKENDS, MAX_SERVICES, Allowed, Backend, Choice, Flow, Said
from uproxy.outbound import Self
from uproxy.resolve import Hop, Plan, host_port
from uproxy.telemetry import Connection, Native, Peer, Telemetry
from uproxy.tls import Revocations
from uproxy.tunnel import Tunnel

log = logging.getLogger(__name__)

RECONNECT_S: Final = 0.5
_MESSAGES_PER_TURN: Final = 16
_CALLERS_AT_ONCE: Final = 16  # of some 8 KiB each at most: a chain has four certificates, an issuer's name 2 KiB

MayEnter = Callable[[SpiffeId, IpAddress, IpAddress, int], bool]
"""Whether policy lets a peer (identity, address) come for itself to an address and port of this workload."""


@dataclass(frozen=True, slots=True)
class _Caller:
    """Who was let in, and where."""

    identity: SpiffeId
    address: IpAddress
    to: IpAddress
    port: int


@dataclass(frozen=True, slots=True)
class _Proof:
    """The tunnel in which a caller proved who it is, and until when that holds (Unix time)."""

    port: int
    until: float
    certificates: tuple[CertificateId, ...]
    """By which it proved that."""


class DirectPath:
    """`inbound` tells it of callers, `outbound` of destinations, and `run` does the talking."""

    def __init__(self, path: Path, state: State, telemetry: Telemetry, own: Self) -> None:
        """`path`: the node agent's socket for this, which need not be there."""
        self.may_enter: MayEnter = _nobody
        self.lost = 0
        """Direct connections of which no record came, because this process did not take it in time."""
        self._path = path
        self._state = state
        self._telemetry = telemetry
        self._own = own
        self._enabled = False
        self._local: frozenset[IpAddress] = frozenset()
        self._allowed: dict[_Caller, _Proof] = {}
        self._dialled: dict[tuple[IpAddress, int], None] = {}
        self._proven: dict[IpAddress, SpiffeId] = {}
        """Who was at a backend's address, by the last tunnel that went there."""
        self._news = asyncio.Event()
        self._left = False

    # -- what happened by tunnels

    def let_in(self, carrier: Tunnel, to: IpAddress, port: int) -> None:
        """A caller came by a tunnel, for itself, and the application answered at this address."""
        if not self._enabled or carrier.peer_address not in self._local:
            return
        caller = _Caller(carrier.peer, carrier.peer_address, to, port)
        proof = _Proof(carrier.peer_port, carrier.peer_expires_at, carrier.certificates)
        known = self._allowed.get(caller)
        if known != proof and (known is not None or len(self._allowed) < MAX_ALLOWED):
            self._allowed[caller] = proof
            self._news.set()

    def reached(self, plan: Plan, hop: Hop) -> None:
        """What was dialled led to this backend, by a tunnel that goes straight there."""
        if not self._enabled or hop.address not in self._local:
            return
        if self._proven.get(hop.address) != hop.expected:
            self._proven[hop.address] = hop.expected
            self._news.set()
        dialled = plan.address, plan.port
        if dialled in self._dialled:
            return
        if len(self._dialled) >= MAX_SERVICES:
            del self._dialled[next(iter(self._dialled))]
        self._dialled[dialled] = None
        self._news.set()

    # -- what changes

    def changed(self) -> None:
        """The configuration is another."""
        own = self._state.workload(self._own.key)
        self._enabled = own is not None and own.direct
        if not self._enabled:
            self._allowed.clear()
            self._forget_callees()
        self._proven = {address: who for address, who in self._proven.items() if address in self._local}
        self._forget_callers()
        self._news.set()

    def renewed(self, revocations: Revocations) -> None:
        """Our certificate is another: callees are to see it, so what is dialled goes by a tunnel once more."""
        self._forget_callees()
        self._allowed = {
            caller: proof for caller, proof in self._allowed.items() if revocations.revoked(proof.certificates) is None
        }
        self._news.set()

    def _forget_callees(self) -> None:
        self._dialled.clear()
        self._proven.clear()

    def _forget_callers(self) -> None:
        now = time.time()
        self._allowed = {
            caller: proof
            for caller, proof in self._allowed.items()
            if proof.until > now
            and caller.address in self._local
            and self.may_enter(caller.identity, caller.address, caller.to, caller.port)
        }

    # -- another process takes over

    def describe(self) -> list[Mapping[str, Any]]:
        """All that is known here, for `go_on` of another process, in pieces."""
        allowed = [
            [str(one.identity), one.address, one.to, one.port, proof.port, proof.until, _written(proof.certificates)]
            for one, proof in self._allowed.items()
        ]
        pieces: list[Mapping[str, Any]] = [
            {"allowed": allowed[at : at + _CALLERS_AT_ONCE]} for at in range(0, len(allowed), _CALLERS_AT_ONCE)
        ]
        proven = [[address, str(who)] for address, who in self._proven.items()]
        return [*pieces, {"dialled": list(self._dialled), "proven": proven, "local": list(self._local)}]

    def go_on(self, pieces: Sequence[Mapping[str, Any]]) -> None:
        """As if all this had happened here, so that nothing that was granted ends. What policy says of it is asked
        again. Raises ValueError.
        """
        if not self._enabled:
            return
        try:
            for piece in pieces:
                for identity, address, to, port, tunnel_port, until, certificates in piece.get("allowed", ()):
                    caller = _Caller(SpiffeId.parse(identity), parse_address(address), parse_address(to), port)
                    self._allowed[caller] = _Proof(tunnel_port, until, _read(certificates))
                for address, port in piece.get("dialled", ()):
                    self._dialled[parse_address(address), port] = None
                for address, identity in piece.get("proven", ()):
                    self._proven[parse_address(address)] = SpiffeId.parse(identity)
                self._local |= frozenset(map(parse_address, piece.get("local", ())))
        except (ValueError, TypeError) as error:
            raise ValueError(f"what is said of the direct path cannot be read: {error}") from None

    def leave(self) -> None:
        """Another process talks to the agent from here on. Nothing ends by this."""
        self._left = True
        self._news.set()

    # -- the channel

    async def run(self) -> None:
        """Talk to the agent, whenever there is one and this workload may go direct. Until cancelled, or `leave`."""
        while not self._left:
            if self._enabled:
                with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                    sock.setblocking(False)
                    sock.connect(str(self._path))
                    await self._converse(sock)
            await asyncio.sleep(RECONNECT_S)

    async def _converse(self, sock: socket.socket) -> None:
        """Until this workload may go direct no more. Raises OSError when the agent has gone."""
        loop = asyncio.get_running_loop()
        gone = False

        def hear() -> None:
            nonlocal gone
            if not self._hear(sock):
                gone = True
                loop.remove_reader(sock)
                self._news.set()

        loop.add_reader(sock, hear)
        try:
            while not (gone or self._left):
                self._news.clear()
                self._forget_callers()
                with suppress(BlockingIOError):  # a busy agent: it is said again
                    sock.send(channel.pack_said(self._said()))
                if not self._enabled:
                    return
                with suppress(TimeoutError):
                    async with asyncio.timeout(channel.RENEWAL_S):
                        await self._news.wait()
        finally:
            loop.remove_reader(sock)

    def _hear(self, sock: socket.socket) -> bool:
        """Take what the agent says, a few messages in a turn. False when it has hung up."""
        for _ in range(_MESSAGES_PER_TURN):
            try:
                raw = sock.recv(channel.MAX_TOLD)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not raw:
                return False
            told = channel.read_told(raw)
            if told.local is not None:
                self._local = told.local
                self._news.set()
            self.lost += told.lost
            for flow in told.flows:
                self._record(flow)
        return True

    def _said(self) -> Said:
        choices = (self._choice(address, port) for address, port in self._dialled)
        return Said(
            tuple(choice for choice in choices if choice is not None),
            tuple(
                Allowed(caller.identity, (caller.address, proof.port), caller.to, caller.port)
                for caller, proof in self._allowed.items()
            ),
            self._enabled,
        )

    def _choice(self, address: IpAddress, port: int) -> Choice | None:
        """All backends that are ready; None for what is bound to a waypoint, is not known any more, or has too many."""
        found = self._state.service_at(address, port)
        if found is not None:
            service, _ = found
            backends = tuple(
                Backend(one.address, one.ports[port], one.weight, self._proof(one.address, one.identity))
                for one in self._state.endpoints(service.key)
                if one.ready and one.weight > 0 and port in one.ports
            )
            direct = service.binding is None
        else:
            resident = self._state.resident_at(address)
            workload = self._state.workload_at(address)
            backends = () if workload is None else (Backend(address, port, 1, self._proof(address, workload.identity)),)
            direct = isinstance(resident, ResidentWorkload) and resident.binding_at(port) is None
        return Choice(address, port, backends) if direct and 0 < len(backends) <= MAX_BACKENDS else None

    def _proof(self, address: IpAddress, expected: SpiffeId) -> SpiffeId | None:
        """Whom the configuration expects there, if that is who was there."""
        return expected if self._proven.get(address) == expected else None

    # -- connections that ended

    def _record(self, flow: Flow) -> None:
        """Into metrics and access log, as a connection that this process has carried."""
        now = time.monotonic()
        ends = {}
        for side, (address, port), own in (
            ("source", flow.source, not flow.inbound),
            ("target", flow.target, flow.inbound),
        ):
            workload = self._state.workload(self._own.key) if own else self._state.workload_at(address)
            identity = self._own.identity if own else flow.identity
            ends[side] = Peer(host_port(address, port), workload, identity)
        service = self._state.service_at(*flow.dialled)
        record = Connection(
            direction="inbound" if flow.inbound else "outbound",
            source=ends["source"],
            destination=ends["target"],
            started=now - flow.duration_s,
            destination_service=service[0].key if service is not None else "",
            request_id=os.urandom(16).hex(),
            bytes_sent=flow.received if flow.inbound else flow.sent,
            bytes_received=flow.sent if flow.inbound else flow.received,
            native=Native(flow.srtt_us, flow.retransmits),
        )
        if flow.end == "failed":
            record.flag, record.error = Flag.CONNECT, "connect-failed: it was not established"
        else:
            self._telemetry.opened(record)
            if flow.end == "reset":
                record.flag, record.error = Flag.RESET, "the connection was reset or timed out"
        self._telemetry.closed(record, now)


def _nobody(identity: SpiffeId, address: IpAddress, to: IpAddress, port: int) -> bool:
    return False


def _written(certificates: Sequence[CertificateId]) -> list[list[Any]]:
    return [[one.issuer, f"{one.serial:x}"] for one in certificates]  # a serial has up to 20 bytes


def _read(certificates: Sequence[Sequence[Any]]) -> tuple[CertificateId, ...]:
    return tuple(CertificateId(issuer, int(serial, 16)) for issuer, serial in certificates)
