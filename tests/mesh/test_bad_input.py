"""Peers that are not who they should be, and requests that are not what they should be: refused, and nothing breaks."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks.lab import shop
from benchmarks.lab.connect import Answer, connect, request, tls_context
from benchmarks.lab.sources import TRUST_DOMAIN
from control.api.identity import SpiffeId
from control.client import csr
from control.server.ca import Authority, write_identity
from tests.mesh.conftest import LOAD, PEER, Mesh
from tests.support import inside
from uproxy import linux, sandbox
from uproxy.sandbox import Sandbox

_HBONE = 15008


def _reach(mesh: Mesh) -> socket.socket:
    """A connection to the peer's uProxy from host a."""
    with mesh.caller.host.entered():
        return socket.create_connection((mesh.peer.address, _HBONE), timeout=30)


def _ask(mesh: Mesh, identity_dir: Path, authority: str = "") -> Answer:
    """A CONNECT with this identity."""
    with _reach(mesh) as made:
        return connect(made, identity_dir, authority or f"{mesh.peer.address}:{PEER[1]}")


def _issued(mesh: Mesh, path: Path, service_account: str = "stranger", ttl_s: int = 3600) -> Path:
    mesh.lab.issue(SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/ns/load/sa/{service_account}"), path, ttl_s)
    return path


@pytest.fixture
def serves(mesh: Mesh) -> Iterator[None]:
    """Whatever the test did to the peer's uProxy, it is the same process and serves as before."""
    pid = mesh.peer.proxy_pid()
    with inside.serving(mesh.peer, PEER[1], inside.echo):
        yield
        with inside.dial(mesh.caller, PEER) as made:
            made.sendall(b"still there")
            assert made.recv(64) == b"still there"
    assert mesh.peer.proxy_pid() == pid


@pytest.mark.usefixtures("serves")
class TestCaller:
    """Who dials the peer's uProxy by hand."""

    def test_valid_certificate_is_let_in(self, mesh: Mesh, tmp_path: Path) -> None:
        assert _ask(mesh, _issued(mesh, tmp_path)).status == 200

    def test_expired_certificate_is_refused(self, mesh: Mesh, tmp_path: Path) -> None:
        _issued(mesh, tmp_path, ttl_s=1)
        time.sleep(2.1)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            _ask(mesh, tmp_path)

    def test_certificate_of_another_ca_is_refused(self, mesh: Mesh, tmp_path: Path) -> None:
        other = Authority.create(tmp_path / "ca", TRUST_DOMAIN)
        identity = SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/ns/load/sa/caller")
        request = csr.make_request(tmp_path / "id", identity)
        # With the lab's roots, so that it is not the caller who refuses.
        ours = (mesh.caller.identity_dir / "bundle.pem").read_bytes()
        write_identity(tmp_path / "id", other.issue(request.read_bytes(), identity), ours)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            _ask(mesh, tmp_path / "id")

    def test_no_certificate_is_refused(self, mesh: Mesh) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.set_alpn_protocols(["h2"])
        context.load_verify_locations(mesh.caller.identity_dir / "bundle.pem")
        # TLS 1.3: the client learns of it when it first reads.
        with _reach(mesh) as made, context.wrap_socket(made) as secure, pytest.raises((ssl.SSLError, ConnectionError)):
            assert not secure.recv(1)

    @pytest.mark.parametrize(
        "authority",
        ["nonsense", "10.96.2.12", "10.96.2.12:0", "10.96.2.12:99999", "10.96.2.12:http", "[::1:80"],
    )
    def test_malformed_authority_is_a_bad_request(self, mesh: Mesh, authority: str) -> None:
        assert _ask(mesh, mesh.caller.identity_dir, authority).status == 400

    def test_authority_of_another_workload_is_a_bad_request(self, mesh: Mesh) -> None:
        assert _ask(mesh, mesh.caller.identity_dir, f"{mesh.shop.db.address}:6379").status == 400

    def test_other_method_is_a_bad_request(self, mesh: Mesh) -> None:
        target = f"{mesh.peer.address}:{PEER[1]}"
        get = [(":method", "GET"), (":authority", target), (":scheme", "https"), (":path", "/")]
        with _reach(mesh) as made:
            assert request(made, mesh.caller.identity_dir, get).status == 400

    def test_port_of_the_proxy_itself_is_unreachable(self, mesh: Mesh) -> None:
        """Else a caller would reach the admin endpoint, or make the proxy dial itself for ever."""
        for port in (15000, 15001, 15008):
            assert _ask(mesh, mesh.caller.identity_dir, f"{mesh.peer.address}:{port}").status == 503

    def test_bytes_that_are_no_tls_end_the_connection(self, mesh: Mesh) -> None:
        with _reach(mesh) as made:
            made.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
            made.settimeout(15)
            with suppress(ConnectionResetError):
                inside.read_all(made)  # a TLS alert, then the end

    def test_oversized_frame_ends_the_connection(self, mesh: Mesh) -> None:
        with _reach(mesh) as made, tls_context(mesh.caller.identity_dir).wrap_socket(made) as secure:
            secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            # A frame of 2^24 - 1 octets, which nobody allowed (RFC 9113 section 4.2).
            secure.sendall(b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(64))
            secure.settimeout(15)
            said = b""
            while more := secure.recv(65536):
                said += more
        assert _goaway_code(said) == 6, "no GOAWAY with FRAME_SIZE_ERROR"


def _goaway_code(said: bytes) -> int:
    """The error code of the last GOAWAY among these frames; -1 without one."""
    code = -1
    while len(said) >= 9:
        size = int.from_bytes(said[:3], "big")
        if said[3] == 7:
            code = int.from_bytes(said[13:17], "big")
        said = said[9 + size :]
    return code


_VICTIM = """\
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: victim, namespace: load}
spec: {address: 10.96.2.200, serviceAccount: victim, labels: {app: victim}, ports: {tcp: 9000}}
"""


@contextmanager
def _impostor(mesh: Mesh, identity_dir: Path, heard: list[bytes]) -> Iterator[str]:
    """A host-b namespace at a workload's address, where a TLS server with this identity waits for tunnels."""
    host = mesh.peer.host
    box = Sandbox.below(host.cgroup_root, mesh.lab.names.cgroup.parent, "victim", ["10.96.2.200"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(identity_dir / "chain.pem", identity_dir / "key.pem")
    with host.entered():
        sandbox.build(box)
    try:
        with open(box.netns_path) as netns, linux.inside(netns.fileno()):
            listener = socket.create_server((box.addresses[0], _HBONE))

        def serve() -> None:
            listener.settimeout(30)
            try:
                accepted, _ = listener.accept()
                with context.wrap_socket(accepted, server_side=True) as secure:
                    heard.append(b"handshake")
                    while received := secure.recv(65536):
                        heard.append(received)
            except OSError as error:
                heard.append(b"ended: %r" % type(error).__name__.encode())

        thread = threading.Thread(target=serve)
        thread.start()
        yield box.addresses[0]
        thread.join(30)
        listener.close()
    finally:
        with host.entered():
            sandbox.remove(box)


def _talk(mesh: Mesh, address: tuple[str, int]) -> None:
    with inside.dial(mesh.caller, address) as made:
        made.sendall(b"for the victim's eyes only")
        made.recv(1)


def test_server_with_another_identity_gets_no_byte(mesh: Mesh, tmp_path: Path) -> None:
    """A certificate of the same CA, valid, and of somebody else: exactly what the check of identities is for."""
    heard: list[bytes] = []
    _issued(mesh, tmp_path, service_account="impostor")
    generation = inside.metric(mesh.caller, "uproxy_config_generation")
    known = mesh.caller.host.node().status()["addresses"]
    mesh.lab.configure(shop.RESOURCES + LOAD + _VICTIM)
    try:
        inside.eventually(lambda: inside.metric(mesh.caller, "uproxy_config_generation") > generation)
        inside.eventually(lambda: mesh.caller.host.node().status()["addresses"] > known)
        with _impostor(mesh, tmp_path, heard) as address, pytest.raises(ConnectionError):
            _talk(mesh, (address, 9000))
        entry = mesh.caller.await_access(lambda e: e.get("dst.addr", "").startswith(address))
        assert entry["response_flags"] == "IDENTITY_ERROR"
        assert "impostor" in entry["error"]
    finally:
        mesh.lab.configure(shop.RESOURCES + LOAD)
    assert not any(b"victim" in piece for piece in heard)
