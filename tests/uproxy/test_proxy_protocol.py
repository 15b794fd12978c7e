"""The PROXY protocol: what its header says, and that the applications which asked for it, and no others, are told."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.address import IpAddress, parse_address
from control.api.gateway import Bound
from control.api.identity import SpiffeId
from control.api.plaintext import Plaintext
from control.server.ca import Authority
from tests.support.certificates import DB, WEB
from tests.support.pair import DB_ADDRESS, WEB_ADDRESS, Pair, connected_pair, running_pair, workload
from tests.support.passing_waypoint import GATEWAY, WAYPOINT_ADDRESS, running_waypoint
from uproxy import plane, proxy_protocol
from uproxy.proxy_protocol import PRINCIPAL, End, HeaderError, header

PATIENCE_S = 10.0
PORT, OTHER_PORT = 21873, 21874
ASKS = replace(workload("db", DB_ADDRESS, DB), proxy_protocol=(PORT,))

addresses = st.ip_addresses().map(lambda address: parse_address(str(address)))
ends = st.tuples(addresses, st.integers(0, 65535))
identities = st.builds(
    SpiffeId,
    st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,252}[a-z0-9])?", fullmatch=True),
    st.from_regex(r"[a-z0-9]{1,63}", fullmatch=True),
    st.from_regex(r"[a-z0-9]{1,253}", fullmatch=True),
)


def read(data: bytes) -> tuple[End, End, dict[int, bytes], bytes]:
    """Source, destination, TLVs and what follows, by the letter of section 2.2 of the specification."""
    assert data[:12] == bytes.fromhex("0D0A0D0A000D0A515549540A")
    assert data[12] == 0x21  # version 2, PROXY
    size = {0x11: 4, 0x21: 16}[data[13]]
    length = int.from_bytes(data[14:16], "big")
    block, rest = data[16 : 16 + length], data[16 + length :]
    assert len(block) == length
    source, destination = (ipaddress.ip_address(block[at : at + size]) for at in (0, size))
    ports = [int.from_bytes(block[at : at + 2], "big") for at in (2 * size, 2 * size + 2)]
    tlvs, at = {}, 2 * size + 4
    while at < length:
        end = at + 3 + int.from_bytes(block[at + 1 : at + 3], "big")
        assert end <= length
        assert block[at] not in tlvs
        tlvs[block[at]] = block[at + 3 : end]
        at = end
    return (IpAddress(str(source)), ports[0]), (IpAddress(str(destination)), ports[1]), tlvs, rest


def unmapped(end: End) -> End:
    address = ipaddress.ip_address(end[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (IpAddress(str(mapped or address)), end[1])


@given(ends, ends, st.none() | identities, st.binary(max_size=20))
def test_a_header_says_who_calls_and_ends_where_it_says(
    source: End, destination: End, principal: SpiffeId | None, behind: bytes
) -> None:
    said = read(header(source, destination, principal) + behind)
    assert (unmapped(said[0]), unmapped(said[1])) == (unmapped(source), unmapped(destination))
    assert said[2] == ({} if principal is None else {PRINCIPAL: str(principal).encode()})
    assert said[3] == behind


@given(ends, ends)
def test_both_addresses_are_of_one_family_and_ipv4_stays_ipv4(source: End, destination: End) -> None:
    family = header(source, destination, None)[13]
    assert family == (0x11 if ":" not in source[0] + destination[0] else 0x21)


# -- on the way to an application


async def received(sock: socket.socket, size: int) -> bytes:
    """Everything, until there are `size` bytes or it ends."""
    found = b""
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < size and (part := await asyncio.get_running_loop().sock_recv(sock, size)):
            found += part
    return found


async def settled(pair: Pair) -> None:
    """No connection is left."""
    deadline = time.monotonic() + PATIENCE_S
    while pair.plane.tasks:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


def run(tmp_path: Path, test: Callable[[Pair], Awaitable[None]]) -> None:
    async def whole() -> None:
        authority = Authority.create(tmp_path / "ca", "cluster.local")
        async with running_pair(tmp_path, authority, PORT) as pair:
            await test(pair)
            await settled(pair)

    plane.run(whole())


async def told(pair: Pair, caller: socket.socket, port: int = PORT) -> tuple[End, End, dict[int, bytes], bytes]:
    """What the application reads of a caller that says `hello`."""
    return read(await seen(pair, caller, port))


async def seen(pair: Pair, caller: socket.socket, port: int) -> bytes:
    with caller, socket.create_server((DB_ADDRESS, port)) as listener:
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(caller, b"hello")
        caller.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(PATIENCE_S):
            served, _ = await loop.sock_accept(listener)
        with served:
            served.setblocking(False)
            return await received(served, 10_000)


def test_an_application_that_asks_is_told_who_calls_before_all_else(tmp_path: Path) -> None:
    async def test(pair: Pair) -> None:
        pair.apply(ASKS)
        source, destination, tlvs, rest = await told(pair, pair.dial())
        (carrier,) = pair.db.inbound.server.tunnels()
        assert (source, destination) == ((WEB_ADDRESS, carrier.peer_port), (DB_ADDRESS, PORT))
        assert (tlvs, rest) == ({PRINCIPAL: str(WEB).encode()}, b"hello")
        await settled(pair)
        assert pair.db.telemetry.ended[-1].bytes_received == len("hello")  # the header is ours, not the caller's

    run(tmp_path, test)


def test_an_application_that_does_not_ask_reads_what_was_sent_and_nothing_else(tmp_path: Path) -> None:
    async def test(pair: Pair) -> None:
        for record in (workload("db", DB_ADDRESS, DB), replace(ASKS, proxy_protocol=(OTHER_PORT,))):
            pair.apply(record)
            assert await seen(pair, pair.dial(), PORT) == b"hello"
        pair.apply(ASKS)
        assert await seen(pair, pair.dial(DB_ADDRESS, OTHER_PORT), OTHER_PORT) == b"hello"
        assert (await told(pair, pair.dial()))[3] == b"hello"
        pair.apply(replace(ASKS, proxy_protocol=()))
        assert await seen(pair, pair.dial(), PORT) == b"hello"

    run(tmp_path, test)


def test_of_who_comes_in_plaintext_the_address_is_told_and_no_identity(tmp_path: Path) -> None:
    async def test(pair: Pair) -> None:
        pair.apply(replace(ASKS, plaintext=Plaintext(True, ())))
        # As with sk_lookup, the accepted socket bears the address and port that were dialled.
        with socket.create_server((DB_ADDRESS, PORT)) as listener:
            caller = socket.create_connection((DB_ADDRESS, PORT), source_address=("127.0.77.9", 0))
            accepted, _ = listener.accept()
        for sock in (caller, accepted):
            sock.setblocking(False)
        ours = caller.getsockname()
        pair.plane.spawn(pair.db.inbound.serve_plaintext(accepted))
        assert await told(pair, caller) == (ours, (DB_ADDRESS, PORT), {}, b"hello")

    run(tmp_path, test)


def test_behind_a_waypoint_the_caller_is_told_as_the_waypoint_knows_it(tmp_path: Path) -> None:
    async def test(pair: Pair) -> None:
        pair.apply(GATEWAY)
        pair.apply(replace(ASKS, bounds=(Bound(0, ("shop/wp",), (), enforced=True),)))
        authority = Authority.open(tmp_path / "ca")
        with running_waypoint(pair, tmp_path, authority) as waypoint:
            for named, expected in (
                (
                    (b"spiffe://cluster.local/ns/shop/sa/web;10.1.2.3:456",),
                    ("10.1.2.3", 456, {PRINCIPAL: str(WEB).encode()}),
                ),
                ((), (WAYPOINT_ADDRESS, None, {})),  # Envoy says nothing of the caller
            ):
                near, far = connected_pair()
                plane.reset_on_close(far)

                async def ask(named: tuple[bytes, ...] = named, far: socket.socket = far) -> None:
                    (await waypoint.ask(*named)).attach(far)

                pair.plane.spawn(ask())
                source, destination, tlvs, rest = await told(pair, near)
                assert (source[0], tlvs, rest) == (expected[0], expected[2], b"hello")
                assert expected[1] in (source[1], None)
                assert destination == (DB_ADDRESS, PORT)

    run(tmp_path, test)


def test_nobody_may_come_past_the_uproxy_to_a_port_that_is_told(tmp_path: Path) -> None:
    async def test(pair: Pair) -> None:
        pair.apply(ASKS)
        assert not pair.db.inbound._may_enter(WEB, WEB_ADDRESS, DB_ADDRESS, PORT)
        assert pair.db.inbound._may_enter(WEB, WEB_ADDRESS, DB_ADDRESS, OTHER_PORT)

    run(tmp_path, test)


@given(ends, ends, identities, st.binary(max_size=300), st.from_regex(r"[0-9a-f]{0,32}", fullmatch=True), st.binary())
def test_what_is_written_is_read_again_and_what_follows_is_left(
    source: End, destination: End, principal: SpiffeId, authority: bytes, unique_id: str, rest: bytes
) -> None:
    written = header(source, destination, principal, authority=authority, unique_id=unique_id.encode())
    found = proxy_protocol.read(written + rest)
    assert found is not None
    assert found.length == len(written)
    assert (found.source, found.destination, found.principal) == (source, destination, principal)
    assert (found.authority, found.unique_id) == (authority, unique_id)


_V4 = IpAddress("10.0.0.1"), 4711
_WRITTEN = header(_V4, _V4, WEB)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n", "does not begin", id="a request"),
        pytest.param(b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n", "does not begin", id="version 1"),
        pytest.param(_WRITTEN[:12] + b"\x20" + _WRITTEN[13:], "not what we write", id="LOCAL"),
        pytest.param(_WRITTEN[:13] + b"\x31" + _WRITTEN[14:], "not what we write", id="a Unix socket"),
        pytest.param(_WRITTEN[:14] + b"\xff\xff" + _WRITTEN[16:], "not what we write", id="too long"),
        pytest.param(_WRITTEN[:14] + b"\x00\x04" + _WRITTEN[16:], "too short", id="no addresses"),
        pytest.param(header(_V4, _V4, None), "does not say who calls", id="nobody"),
        pytest.param(_WRITTEN[:15] + bytes([_WRITTEN[15] - 1]) + _WRITTEN[16:], "cut short", id="a value cut short"),
        pytest.param(
            _WRITTEN[:15] + bytes([2 * _WRITTEN[15] - 12]) + _WRITTEN[16:] + _WRITTEN[28:], "twice", id="two callers"
        ),
    ],
)
def test_what_is_no_header_of_ours_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(HeaderError, match=why):
        proxy_protocol.read(data)
