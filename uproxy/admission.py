"""May this peer have a stream to a port of this workload, and for whom does it ask? (docs/hbone.md 4)

A port that a waypoint stands before takes streams from that waypoint, which says who calls, and from few others. Then
policy is asked. Any other port is a question of policy alone, and what its peer says of callers is not heard.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from control.api.address import AddressError, IpAddress, parse_address
from control.api.gateway import Bound, gateway_identity
from control.api.identity import IdentityError, SpiffeId, TrustDomain
from control.api.policy import AuthorizationPolicy
from control.api.workload import Workload
from uproxy.authz import Decision, Relayed, compile_policies
from uproxy.errors import Flag, RefusedError
from uproxy.header_block import Headers

CALLER: Final = b"x-uproxy-caller"

_CALLER: Final = re.compile(r"([^;]+);(?:\[([0-9a-f:.]+)\]|([0-9.]+)):([0-9]{1,5})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is behind a waypoint, as it says."""

    identity: SpiffeId
    address: IpAddress
    port: int


@dataclass(frozen=True, slots=True)
class Passage:
    """A stream that comes from a waypoint. `caller`: None when it did not say (Envoy does not)."""

    caller: Caller | None


@dataclass(frozen=True, slots=True)
class _Gate:
    """One port's bound, ready to be asked."""

    waypoints: frozenset[SpiffeId]
    processes: frozenset[tuple[SpiffeId, IpAddress]]
    """Who is a waypoint only where it connects from one of its own addresses."""
    exempt: frozenset[SpiffeId]
    bound: Bound


class Admission:
    """What one configuration says of who may come to a workload."""

    __slots__ = (
        "_gates",
        "_known",
        "_plaintext",
        "_policies",
        "_relayed",
        "_selecting",
        "_sidecar",
        "_trust_domain",
        "rehearsal",
    )

    def __init__(
        self, workload: Workload | None, policies: Iterable[AuthorizationPolicy], trust_domain: TrustDomain
    ) -> None:
        """`workload`: None when the configuration has it no longer: then nobody may. `policies`: that select it."""
        self._known = workload is not None
        self._plaintext = workload.plaintext if workload is not None else None
        self._sidecar = workload.sidecar if workload is not None else None
        self._trust_domain = trust_domain
        self._gates = {bound.port: self._gate(bound) for bound in (workload.bounds if workload is not None else ())}
        self._selecting = tuple(policies)
        self._policies = compile_policies(self._selecting)
        self._relayed: Relayed | None = None
        self.rehearsal: Admission | None = None
        """The same, as if policies in dry run were enforced; None when there are none."""
        if any(policy.dry_run for policy in self._selecting):
            enforced = [replace(policy, dry_run=False) for policy in self._selecting]
            self.rehearsal = Admission(workload, enforced, trust_domain)

    def enter(
        self, peer: SpiffeId | None, port: int, headers: Headers, source: IpAddress | None = None
    ) -> Passage | None:
        """How a stream comes to a port: None when its peer asks for itself. `peer`: None for who came in plaintext;
        `source`: from where it connects.

        Raises RefusedError: `waypoint-required`, or `bad-request` when a waypoint says who calls in no form we know.
        """
        if not self._gates:
            return None
        gate = self._gates.get(port) or self._gates.get(0)
        if gate is None:
            return None
        if peer in gate.waypoints or (peer, source) in gate.processes:
            return Passage(self._caller(headers))
        if gate.bound.enforced and peer not in gate.exempt and not self._stands_beside(peer, port):
            who = peer or "a caller in plaintext"
            raise RefusedError(
                "waypoint-required",
                f"{who} connects directly to port {port}, which is reached through {_named(gate.bound)}",
                status=401,
                flag=Flag.WAYPOINT,
            )
        return None

    @property
    def has_sidecar(self) -> bool:
        """Whether the process of any waypoint stands beside this workload."""
        return self._sidecar is not None

    def goes_beside(self, peer: SpiffeId, port: int) -> tuple[bool, bool]:
        """Whether a stream that its peer has for itself goes through the waypoint's process beside this workload, and
        whether it goes no other way while that is not there.
        """
        gate = self._gates.get(port) or self._gates.get(0)
        if gate is None or peer in gate.exempt or not self._stands_beside(peer, port):
            return False, False
        return True, gate.bound.enforced

    def _stands_beside(self, peer: SpiffeId | None, port: int) -> bool:
        """What comes in plaintext cannot be handed to it: it is nobody's, and the process speaks of callers."""
        return peer is not None and self._sidecar is not None and self._sidecar.serves(port)

    def overtaken(self, peer: SpiffeId | None, port: int) -> str:
        """Why a stream that its peer has for itself must end by and by, although it was let in; empty: it may stay.

        It came before the waypoint was demanded, and is past a policy that only the waypoint can hold to.
        """
        gate = self._gates.get(port) or self._gates.get(0)
        if gate is None or not (gate.bound.guarded and gate.bound.enforced) or peer in (gate.waypoints | gate.exempt):
            return ""
        through = _named(gate.bound)
        return (
            f"waypoint-required: made directly to port {port} before it was reached through {through} under L7 policy"
        )

    def decide(
        self, peer: SpiffeId, peer_address: IpAddress, passage: Passage | None, address: IpAddress, port: int
    ) -> Decision:
        """L4 authorization: who (from TLS), from where (the TCP peer), by which way, to which address and port."""
        if not self._known:
            return Decision(False, "", "the configuration no longer has this workload")
        if passage is None:
            return self._policies.decide(peer, peer_address, address, port)
        if self._relayed is None:  # most workloads never need it
            self._relayed = Relayed(self._selecting)
        caller = passage.caller
        if caller is None:
            return self._relayed.decide(None, None, peer, peer_address, address, port)
        return self._relayed.decide(caller.identity, caller.address, peer, peer_address, address, port)

    def decide_plaintext(self, source: IpAddress, address: IpAddress, port: int) -> Decision:
        """L4 authorization of who comes in plaintext, and so is nobody: positive fields of identity do not match."""
        if not self._known:
            return Decision(False, "", "the configuration no longer has this workload")
        if self._plaintext is None or not self._plaintext.takes(port):
            return Decision(False, "", f"port {port} takes mTLS only")
        return self._policies.decide(None, source, address, port)

    def _gate(self, bound: Bound) -> _Gate:
        waypoints = frozenset(gateway_identity(self._trust_domain, key) for key in bound.gateways)
        processes = frozenset((one.identity, address) for one in bound.processes for address in one.addresses)
        return _Gate(waypoints, processes, frozenset(bound.exempt), bound)

    def _caller(self, headers: Headers) -> Caller | None:
        said = [value for name, value in headers if name == CALLER]
        if not said:
            return None
        try:
            if len(said) > 1:
                raise ValueError(f"{len(said)} of them")
            return self._read_caller(said[0].decode("ascii"))
        except (ValueError, IdentityError, AddressError) as error:
            raise RefusedError(
                "bad-request", f"{CALLER.decode()} of a waypoint: {error}", status=400, flag=Flag.DENY
            ) from None

    def _read_caller(self, text: str) -> Caller:
        """`<SPIFFE ID>;<ip:port>`. Raises ValueError, IdentityError or AddressError."""
        match = _CALLER.fullmatch(text)
        if match is None or int(match[4]) > 65535:
            raise ValueError(f"{text[:300]!r} is no <SPIFFE ID>;<ip:port>")
        identity = SpiffeId.parse(match[1])
        if identity.trust_domain != self._trust_domain:
            raise ValueError(f"{identity} is of another trust domain than {self._trust_domain}")
        return Caller(identity, parse_address(match[2] or match[3]), int(match[4]))


def _named(bound: Bound) -> str:
    """Its waypoints, for people."""
    named = (*bound.gateways, *(f"{one.identity} at {one.addresses[0]}" for one in bound.processes))
    return " or ".join(named) or "a waypoint whose Gateway is not there, or of which no process serves this workload"
