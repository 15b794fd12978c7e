"""Revocation lists in running uProxies: live connections end, new ones are refused, and others notice nothing."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path

import pytest
from cryptography import x509

from benchmarks import pairs
from benchmarks.pairs import APP, ENTRY, Wire
from control.server.ca import Authority
from tests.support import hbone as raw
from tests.support.certificates import pem
from tests.support.envoy import assert_no_bug_was_logged, ended_how
from tests.support.raw_peer import PATIENCE_S, Peer, Server, context
from tests.support.site import eventually

pytestmark = pytest.mark.root

SOON_S = 20.0
"""A proxy looks every second."""


@pytest.fixture
def server(tmp_path: Path):
    with (
        pairs.wire(tmp_path, extra=("mallory",)) as wire,
        pairs.uproxy_server(wire) as process,
        wire.db.listen(APP, PATIENCE_S) as listener,
    ):
        yield Server(wire, process.pid, listener)
        assert_no_bug_was_logged(wire)


def serial(wire: Wire, name: str) -> int:
    return x509.load_pem_x509_certificate((wire.identity(name) / "chain.pem").read_bytes()).serial_number


def revoke(wire: Wire, whose: str, at: str) -> None:
    """Put a list with one certificate into an identity directory, by rename."""
    write(wire, at, Authority.open(wire.directory / "ca").revoke([serial(wire, whose)]))


def write(wire: Wire, at: str, content: bytes) -> None:
    fresh = wire.identity(at) / "crl.new"
    fresh.write_bytes(content)
    fresh.rename(wire.identity(at) / "crl.pem")


def connected(server: Server, name: str) -> tuple[Peer, socket.socket]:
    peer = server.peer(name)
    assert peer.ask([(b":method", b"CONNECT"), (b":authority", b"10.77.0.2:8080")]).status == b"200"
    return peer, server.listener.accept()[0]


def is_served(server: Server, name: str) -> None:
    peer, application = connected(server, name)
    with peer, application:
        pass


def refused(server: Server, name: str) -> None:
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_REVOKED"), server.tls(name) as end:
        end.recv(1)  # with TLS 1.3 the alert comes by the first read


def has_read_the_list(server: Server) -> bool:
    return "others revoked: 1" in (server.wire.directory / "db" / "uproxy.log").read_text()


def test_a_revoked_peers_connections_end_and_it_is_refused_while_others_go_on(server: Server):
    mallory, hers = connected(server, "mallory")
    web, ours = connected(server, "web")
    with mallory, web, hers, ours:
        revoke(server.wire, "mallory", at="db")
        began = time.monotonic()
        mallory.until(lambda: False)
        assert time.monotonic() - began < SOON_S
        assert b"certificate-revoked" in mallory.goaways[-1][2]
        assert ended_how(hers) == "reset"
        refused(server, "mallory")
        ours.sendall(b"unmoved")
        web.until(lambda: web.answers[1].data == b"unmoved")
        is_served(server, "web")
    log = server.wire.directory / "db" / "access.log"
    eventually(lambda: "CERT_REVOKED" in log.read_text())
    write(server.wire, "db", Authority.open(server.wire.directory / "ca").revoke([]))
    eventually(lambda: "others revoked: 0" in (server.wire.directory / "db" / "uproxy.log").read_text())
    is_served(server, "mallory")


def test_a_handshake_that_began_before_the_list_came_is_judged_by_the_list(server: Server):
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context(server.wire, "mallory").wrap_bio(incoming, outgoing)
    with server.tcp() as tcp:
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        tcp.sendall(outgoing.read())
        incoming.write(tcp.recv(1 << 16))  # the server has begun, with what it knows now
        revoke(server.wire, "mallory", at="db")
        eventually(lambda: has_read_the_list(server))
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                incoming.write(tcp.recv(1 << 16))
        tls.write(raw.CLIENT_HELLO)
        tcp.sendall(outgoing.read())
        tcp.settimeout(PATIENCE_S)
        assert ended_how(tcp) in ("fin", "reset")
    eventually(lambda: "certificate-revoked" in (server.wire.directory / "db" / "access.log").read_text())


def test_a_caller_ends_what_goes_to_a_revoked_peer(server: Server):
    wire = server.wire
    with pairs.uproxy_client(wire):
        application = wire.web.connect(ENTRY, PATIENCE_S)
        with application, server.listener.accept()[0] as far:
            application.sendall(b"before")
            assert far.recv(16) == b"before"
            revoke(wire, "db", at="web")
            application.settimeout(SOON_S)
            assert ended_how(application) == "reset"
        with wire.web.connect(ENTRY, PATIENCE_S) as application:
            assert ended_how(application) == "reset"
        eventually(lambda: "CERT_REVOKED" in (wire.directory / "web" / "access.log").read_text())


@pytest.mark.parametrize(
    "content",
    [b"", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", b"-----BEGIN X509 CRL-----\n"],
    ids=["empty", "no CRL", "cut off"],
)
def test_a_list_that_cannot_be_read_leaves_the_one_before_in_force(server: Server, content: bytes):
    wire = server.wire
    revoke(wire, "mallory", at="db")
    eventually(lambda: has_read_the_list(server))
    write(wire, "db", content)
    eventually(lambda: "is refused, the one before stays" in (wire.directory / "db" / "uproxy.log").read_text())
    refused(server, "mallory")
    is_served(server, "web")


def test_the_list_of_another_ca_refuses_nobody_by_its_serials_and_is_not_taken(server: Server, tmp_path: Path):
    other = Authority.create(tmp_path / "other", "cluster.local")
    write(server.wire, "db", other.revoke([serial(server.wire, "web")]) + pem(other.intermediate))
    eventually(lambda: "is refused, the one before stays" in (server.wire.directory / "db" / "uproxy.log").read_text())
    is_served(server, "web")
