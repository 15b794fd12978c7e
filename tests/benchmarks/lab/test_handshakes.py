"""What a handshake agreed upon, read from its bytes: real ones, and damaged ones."""

from __future__ import annotations

import ssl
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lab import sources
from benchmarks.lab.handshakes import Agreed, agreed
from control.api.identity import SpiffeId
from control.server.ca import Authority

SERVER, CLIENT = b"\x0a\0\0\1", b"\x0a\0\0\2"
FLOW = (SERVER, 15008, CLIENT, 40000)


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("identity")
    authority = Authority.create(directory / "ca", "lab.example")
    sources.issue(authority, SpiffeId.parse("spiffe://lab.example/ns/default/sa/web"), directory)
    return directory


def shake_hands(identity: Path, version: ssl.TLSVersion, curve: str = "") -> tuple[bytes, ssl.SSLObject]:
    """What a server sends until both are through, and the client's end."""
    near, far = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    near.check_hostname = False
    near.load_verify_locations(identity / "bundle.pem")
    near.maximum_version = version
    far.load_cert_chain(identity / "chain.pem", identity / "key.pem")
    if curve:
        far.set_ecdh_curve(curve)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = near.wrap_bio(to_client, to_server)
    server = far.wrap_bio(to_server, to_client, server_side=True)
    sent = b""
    for _ in range(4):
        for end in (client, server):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
            if end is server:
                sent += (more := to_client.read())
                to_client.write(more)
    return sent, client


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_version_and_cipher_are_those_that_the_library_tells(identity: Path, version: ssl.TLSVersion) -> None:
    sent, client = shake_hands(identity, version)
    (found,) = agreed({FLOW: sent}, SERVER)
    told = client.cipher()
    assert told is not None
    assert found.version == str(client.version()).replace("v", " ")
    if version is ssl.TLSVersion.TLSv1_3:
        assert found.cipher == told[0].removeprefix("TLS_").replace("_", "-").rpartition("-SHA")[0]
        assert found.group in ("X25519", "X25519MLKEM768")
    assert not found.resumed


def test_the_group_is_that_of_the_second_hello_when_the_first_asks_again(identity: Path) -> None:
    sent, _ = shake_hands(identity, ssl.TLSVersion.TLSv1_3, "secp384r1")
    (found,) = agreed({FLOW: sent}, SERVER)
    assert found.group == "P-384"


def test_a_connection_that_is_not_tls_or_not_to_the_server_says_nothing(identity: Path) -> None:
    sent, _ = shake_hands(identity, ssl.TLSVersion.TLSv1_3)
    assert not agreed({FLOW: b"HTTP/1.1 200 OK\r\n\r\n"}, SERVER)
    assert not agreed({(CLIENT, *FLOW[1:]): sent}, SERVER)


def test_words_of_a_resumed_session_and_of_numbers_without_a_name() -> None:
    extensions = struct.pack(">HHH", 43, 2, 0x0304) + struct.pack(">HHH", 41, 2, 0)
    body = b"\x03\x03" + bytes(32) + b"\0" + b"\x13\x09\0" + struct.pack(">H", len(extensions)) + extensions
    record = b"\x16\x03\x03" + struct.pack(">H", len(body) + 4) + b"\x02" + len(body).to_bytes(3, "big") + body
    (found,) = agreed({FLOW: record}, SERVER)
    assert found == Agreed("TLS 1.3", "cipher suite 0x1309", "", resumed=True)
    assert str(found) == "TLS 1.3, cipher suite 0x1309, resumed"


@given(data=st.data())
def test_damaged_bytes_raise_nothing(identity: Path, data: st.DataObject) -> None:
    sent = bytearray(shake_hands(identity, ssl.TLSVersion.TLSv1_3)[0][:200])
    for at in data.draw(st.lists(st.integers(0, len(sent) - 1), max_size=5)):
        sent[at] = data.draw(st.integers(0, 255))
    agreed({FLOW: bytes(sent[: data.draw(st.integers(0, len(sent)))])}, SERVER)
