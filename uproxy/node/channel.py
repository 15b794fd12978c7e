"""What a uProxy and the node agent say to each other about the direct path, over a SOCK_SEQPACKET socket.

A uProxy says all that holds, again and again (`Said`): what it says no more is revoked, and so is what it has not said
for `LIFETIME_S`. The agent says who else is on this host and goes direct (`local`), and tells of connections that ended
(`Flow`). One message is one msgpack map. Needs no eBPF library: the uProxy is unprivileged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from control.api.address import AddressError, IpAddress, parse_address
from control.api.identity import IdentityError, SpiffeId

SOCKET_NAME: Final = "direct.sock"
LIFETIME_S: Final = 10.0
RENEWAL_S: Final = 3.0

MAX_MESSAGE: Final = 128 << 10
MAX_TOLD: Final = 1 << 20
_FRAME_BYTES: Final = 64  # of a message, around its entries
MAX_SERVICES: Final = 64
MAX_BACKENDS: Final = 256  # of one service; one with more goes by tunnels
MAX_ALLOWED: Final = 512
MAX_FLOWS: Final = 200  # of one message

End = tuple[IpAddress, int]


class ChannelError(Exception):
    """A message that is refused; the text says why."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A workload's port that a caller may choose."""

    address: IpAddress
    port: int
    weight: int
    identity: SpiffeId | None
    """Who must be there, as a tunnel has proved it to the caller; None: none has, so the caller goes there by one."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a caller dials and consents to reach directly: every backend that is ready, here or elsewhere."""

    address: IpAddress
    port: int
    backends: tuple[Backend, ...]


@dataclass(frozen=True, slots=True)
class Allowed:
    """Who may reach a port of the workload that says so, as its uProxy has authenticated and authorised it."""

    identity: SpiffeId
    tunnel: End
    """The caller's end of the tunnel in which it proved that."""
    address: IpAddress
    port: int


@dataclass(frozen=True, slots=True)
class Said:
    """All that a uProxy says at a time."""

    choices: tuple[Choice, ...] = ()
    allowed: tuple[Allowed, ...] = ()
    direct: bool = True
    """False, as its last word: its workload may go direct no more, neither as a caller nor as a destination."""


@dataclass(frozen=True, slots=True)
class Flow:
    """A direct connection that has ended, as one of its two uProxies is told of it."""

    inbound: bool
    source: End
    target: End
    dialled: End
    identity: str
    """Of the other end."""
    sent: int
    """Bytes, by the caller."""
    received: int
    srtt_us: int
    retransmits: int
    duration_s: float
    end: str
    """`closed`, `reset` or `failed` (never established)."""


def pack_said(said: Said) -> bytes:
    """At most MAX_MESSAGE bytes: for what does not fit, those who were allowed or chosen first go by tunnels."""
    room = MAX_MESSAGE - _FRAME_BYTES
    allowed = [msgpack.packb([str(one.identity), *one.tunnel, one.address, one.port]) for one in said.allowed]
    choices = [
        msgpack.packb(
            [one.address, one.port, [[b.address, b.port, b.weight, str(b.identity or "")] for b in one.backends]]
        )
        for one in said.choices
    ]
    for packed in (allowed, choices):
        room -= sum(map(len, packed))
        while room < 0 and packed:
            room += len(packed.pop(0))
    packer = msgpack.Packer()
    parts = [packer.pack_map_header(3), packer.pack("direct"), packer.pack(said.direct)]
    for name, entries in (("choices", choices), ("allowed", allowed)):
        parts += [packer.pack(name), packer.pack_array_header(len(entries)), *entries]
    return b"".join(parts)


def read_said(raw: bytes) -> Said:
    """Raises ChannelError: the sender is trusted with no more than its own workload."""
    try:
        match msgpack.unpackb(raw):
            case {"choices": list(choices), "allowed": list(allowed), "direct": bool(direct), **more} if not more:
                _at_most(choices, MAX_SERVICES)
                _at_most(allowed, MAX_ALLOWED)
                return Said(tuple(map(_choice, choices)), tuple(map(_allowed, allowed)), direct)
    except (ValueError, TypeError, msgpack.UnpackException, AddressError, IdentityError) as error:
        raise ChannelError(str(error)) from None
    raise ChannelError("the message is no {choices, allowed, direct}")


def _choice(value: Any) -> Choice:
    address, port, backends = value
    _at_most(backends, MAX_BACKENDS)
    return Choice(parse_address(address), _port(port), tuple(map(_backend, backends)))


def _backend(value: Any) -> Backend:
    address, port, weight, identity = value
    proved = _identity(identity) if identity != "" else None
    return Backend(parse_address(address), _port(port), _number(weight, 65535), proved)


def _allowed(value: Any) -> Allowed:
    identity, tunnel_address, tunnel_port, address, port = value
    tunnel = parse_address(tunnel_address), _port(tunnel_port)
    return Allowed(_identity(identity), tunnel, parse_address(address), _port(port))


def _identity(value: Any) -> SpiffeId:
    if type(value) is not str:
        raise ValueError(f"an identity must be text, not {type(value).__name__}")
    return SpiffeId.parse(value)


def _at_most(values: Any, most: int) -> None:
    if type(values) is not list or len(values) > most:
        raise ValueError(f"a list must have at most {most} entries")


def _port(value: Any) -> int:
    return _number(value, 65535)


def _number(value: Any, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{value!r} must be from 1 to {most}")
    return value


def pack_local(addresses: Sequence[IpAddress]) -> bytes:
    packed: bytes = msgpack.packb({"local": list(addresses)})
    return packed


def pack_flows(flows: Sequence[Flow], lost: int) -> bytes:
    """`lost`: how many more ended of which nothing else is known."""
    listed = [
        [
            *(one.inbound, *one.source, *one.target, *one.dialled, one.identity, one.sent, one.received),
            *(one.srtt_us, one.retransmits, one.duration_s, one.end),
        ]
        for one in flows
    ]
    packed: bytes = msgpack.packb({"flows": listed, "lost": lost})
    return packed


@dataclass(frozen=True, slots=True)
class Told:
    """What the agent says at a time. `local`: None when it says nothing of it."""

    local: frozenset[IpAddress] | None
    flows: tuple[Flow, ...]
    lost: int


def read_told(raw: bytes) -> Told:
    """A message of the agent, which is believed."""
    message = msgpack.unpackb(raw)
    local = message.get("local")
    flows = [
        Flow(inbound, (source, source_port), (target, target_port), (dialled, dialled_port), *rest)
        for inbound, source, source_port, target, target_port, dialled, dialled_port, *rest in message.get("flows", ())
    ]
    return Told(None if local is None else frozenset(local), tuple(flows), message.get("lost", 0))
