"""Explicit mode: static ports and SOCKS5, against the running pair."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.server.ca import Authority
from tests.support.pair import DB_ADDRESS, SERVICE_PORT, VIP, Pair, connected_pair, running_pair
from uproxy import explicit, plane
from uproxy.explicit import Directory, Forward

GREETING, ACCEPTED = b"\x05\x01\x00", b"\x05\x00"
NAME = b"db.shop.svc.cluster.local"


def request(kind: int, host: bytes, port: int, command: int = 1) -> bytes:
    return bytes((5, command, 0, kind)) + host + port.to_bytes(2, "big")


def named(host: bytes, port: int = SERVICE_PORT) -> bytes:
    return request(3, bytes((len(host),)) + host, port)


async def converse(pair: Pair, *messages: bytes) -> bytes:
    """What the SOCKS port answers to messages sent one after the other, until it closes or echoes `ping`."""
    loop = asyncio.get_running_loop()
    app, proxied = connected_pair()
    pair.plane.spawn(explicit.serve_socks(pair.plane, pair.web.outbound, Directory(pair.state), proxied))
    answers = b""
    for message in messages:
        for byte in message:  # a byte at a time: the negotiation may arrive in any pieces
            await loop.sock_sendall(app, bytes((byte,)))
        await asyncio.sleep(0.02)
    try:
        async with asyncio.timeout(0.3):
            while part := await loop.sock_recv(app, 100):
                answers += part
    except (TimeoutError, ConnectionError):
        pass
    app.close()
    return answers


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ca") / "ca", "cluster.local")


def test_socks5(tmp_path: Path, authority: Authority) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    async def main() -> None:
        app = await asyncio.start_server(echo, DB_ADDRESS, 0)
        try:
            async with running_pair(tmp_path, authority, app.sockets[0].getsockname()[1]) as pair:
                ok = ACCEPTED + b"\x05\x00\x00\x01" + bytes(6)
                by_name = await converse(pair, GREETING, named(NAME), b"ping")
                assert by_name == ok + b"ping"
                by_address = await converse(pair, GREETING, request(1, socket.inet_aton(VIP), SERVICE_PORT), b"ping")
                assert by_address == ok + b"ping"
                assert (await converse(pair, GREETING, named(b"nobody.shop")))[3:4] == b"\x02", "not allowed"
                assert (await converse(pair, GREETING, named(NAME, 1)))[3:4] == b"\x02", "no such service port"
                outside = await converse(pair, GREETING, request(1, socket.inet_aton("192.0.2.1"), 80))
                assert outside[3:4] == b"\x02", "not an open proxy"
                udp = await converse(pair, GREETING, request(1, socket.inet_aton(VIP), 80, command=3))
                assert udp[3:4] == b"\x07"
                assert (await converse(pair, GREETING, request(9, b"", 80)))[3:4] == b"\x08"
                assert await converse(pair, b"\x05\x01\x02") == b"\x05\xff", "no acceptable method"
                assert (await converse(pair, b"\x04\x01\x00P"))[1:2] == b"\x07", "SOCKS4"
                assert await converse(pair, b"GET / HTTP/1.1\r\n\r\n")
                assert not pair.plane.tasks
        finally:
            app.close()

    plane.run(main())


@pytest.mark.parametrize("text", ["", "9080", "127.0.0.1:9080", "a=b", "1.2.3.4:0=x:1", "1.2.3.4:70000=x:1", ":1=x:1"])
def test_a_wrong_forward_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=":PORT"):
        Forward.parse(text)


@given(st.from_regex(r"[a-z0-9.-]{1,40}", fullmatch=True), st.integers(1, 65535), st.ip_addresses(v=6))
def test_a_forward_reads_as_it_is_written(host: str, port: int, local: object) -> None:
    assert Forward.parse(f"[{local}]:{port}={host}:{port}") == Forward(str(local), port, host, port)
