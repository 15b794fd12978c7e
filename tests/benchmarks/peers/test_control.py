"""What stands for Istio's and Linkerd's control planes, as a process, asked over gRPC by a client of another hand."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from benchmarks.peers import control
from benchmarks.peers.control import Control
from control.client import csr
from control.server.ca import Authority
from tests.benchmarks.suites.standin_grpc import CallError, call, read, write

WEB, DB = ("spiffe://lab.test/ns/default/sa/web", "spiffe://lab.test/ns/default/sa/db")
WEB_NAME, DB_NAME = (f"{name}.default.serviceaccount.identity.linkerd.lab.test" for name in ("web", "db"))
CERTIFY = "/io.linkerd.proxy.identity.Identity/Certify"
PROFILE = "/io.linkerd.proxy.destination.Destination/GetProfile"
PORT = "/io.linkerd.proxy.inbound.InboundServerPolicies/WatchPort"
CREATE = "/istio.v1.auth.IstioCertificateService/CreateCertificate"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca", "lab.test")


@pytest.fixture
def started(authority: Authority, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Start the one of "istio" or of "linkerd", of the workload `web`, and wait until it listens."""
    running = []

    def start(whose: str) -> None:
        told = Control(
            directory=str(tmp_path),
            ca_directory=str(tmp_path / "ca"),
            identity=WEB,
            server="10.98.2.10",
            ports=[8080, 8081],
            server_identity=DB,
            client_identity=WEB,
        )
        told.write(tmp_path / "control.json")
        log = (tmp_path / "log").open("wb")
        with log:
            running.append(subprocess.Popen(control.argv(whose, tmp_path / "control.json"), stderr=log))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and running[0].poll() is None:
            try:
                dialled().close()
                return
            except ConnectionRefusedError:
                time.sleep(0.02)
        raise AssertionError((tmp_path / "log").read_text())

    yield start
    for process in running:
        process.kill()
        process.wait()


def dialled() -> socket.socket:
    return socket.create_connection(("127.0.0.1", control.PORT), 10)


def ask(path: str, message: bytes) -> bytes:
    with dialled() as made:
        return call(made, path, message)


def request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, name: str = WEB_NAME) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    san = x509.SubjectAlternativeName([x509.DNSName(name)])
    return (
        builder.add_extension(san, critical=False).sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    )


def test_certify_gives_the_workload_a_certificate_of_the_mesh_for_its_name(started, authority: Authority) -> None:
    started("linkerd")
    key = ec.generate_private_key(ec.SECP256R1())
    answer = ask(CERTIFY, write(1, WEB_NAME) + write(2, "token") + write(3, request(key)))
    leaf, intermediate = (x509.load_der_x509_certificate(read(answer, number)[0]) for number in (1, 2))
    intermediate.verify_directly_issued_by(authority.root)
    leaf.verify_directly_issued_by(intermediate)
    assert leaf.public_key() == key.public_key()
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.DNSName(WEB_NAME)]
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} <= set(usage)
    assert read(answer, 3, 1) == [int(leaf.not_valid_after_utc.timestamp())]


@pytest.mark.parametrize(
    ("message", "status"),
    [
        # Somebody else; nobody; no CSR; not a CSR; of a key that the mesh does not use; not a message.
        (write(1, DB_NAME) + write(3, request(ec.generate_private_key(ec.SECP256R1()), DB_NAME)), "7"),
        (write(3, request(ec.generate_private_key(ec.SECP256R1()))), "7"),
        (write(1, WEB_NAME), "3"),
        (write(1, WEB_NAME) + write(3, b"nonsense"), "3"),
        (write(1, WEB_NAME) + write(3, request(rsa.generate_private_key(65537, 2048))), "3"),
        (b"\xff", "3"),
    ],
)
def test_certify_refuses_what_it_is_not_asked_for_by_the_workload(started, message: bytes, status: str) -> None:
    started("linkerd")
    with pytest.raises(CallError) as refused:
        ask(CERTIFY, message)
    assert refused.value.status == status


def test_an_endpoint_is_opaque_and_has_its_own_identity(started) -> None:
    started("linkerd")
    answer = ask(PROFILE, write(2, "10.98.2.10:8081"))
    assert read(answer, 4) == [1]
    assert read(answer, 6, 1, 1, 1) == [0x0A62020A]
    assert read(answer, 6, 1, 2) == [8081]
    assert read(answer, 6, 5, 1, 1) == read(answer, 6, 5, 4, 1) == [DB_NAME.encode()]
    assert (read(answer, 6, 6, 3), read(answer, 6, 6, 2, 1)) == ([b""], [4143])
    for unknown in ("10.98.2.10:9", "10.98.2.11:8081", ""):
        # Of nobody there is no profile, since without one a proxy goes there in plaintext.
        with pytest.raises(CallError, match=r"^5: "):
            ask(PROFILE, write(2, unknown))


def test_a_port_takes_the_client_and_nobody_else(started) -> None:
    started("linkerd")
    application, admin = (ask(PORT, write(1, "default:db") + write(2, port)) for port in (8080, 4191))
    for answer in (application, admin):
        assert read(answer, 3, 2, 2, 2, 1, 1) == [WEB_NAME.encode()]
        assert (read(answer, 3, 2, 1), read(answer, 3, 2, 2, 1)) == ([], [])  # never without mutual TLS
        labels = dict(zip(read(answer, 4, 1), read(answer, 4, 2), strict=True))
        assert labels == {b"group": b"", b"kind": b"default", b"name": b"benchmark"}
    assert (read(application, 1, 1), read(application, 1, 2)) == ([], [b""])
    assert read(admin, 1, 1, 1, 1) == [10]
    assert read(admin, 1, 1, 3, 4, 1) == [b""]


def test_a_stream_stays_open_and_others_are_answered_meanwhile(started) -> None:
    started("linkerd")
    with dialled() as watching:
        call(watching, PROFILE, write(2, "10.98.2.10:8080"))
        watching.settimeout(0.3)
        with pytest.raises(TimeoutError):
            watching.recv(1)
        assert ask(PROFILE, write(2, "10.98.2.10:8080"))


def test_what_is_not_a_call_is_refused_and_the_next_one_is_answered(started) -> None:
    started("linkerd")
    with pytest.raises(CallError, match=r"^12: "):
        ask("/io.linkerd.proxy.destination.Destination/Get", b"")
    with pytest.raises(ConnectionError):
        ask(CERTIFY, bytes(40_000))
    with dialled() as made:
        made.sendall(b"GET / HTTP/1.1\r\n\r\n" * 3)
        while made.recv(4096):
            pass
    assert ask(PROFILE, write(2, "10.98.2.10:8080"))


def test_a_ztunnel_has_its_certificate_from_whom_it_trusts(started, authority: Authority, tmp_path: Path) -> None:
    started("istio")
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "root.pem").write_bytes(authority.bundle_pem)
    trusting = ssl.create_default_context(cafile=tmp_path / "root.pem")
    trusting.set_alpn_protocols(["h2"])

    def create(identity: str) -> bytes:
        asked = csr.request(key, csr.SpiffeId.parse(identity))
        with closing(trusting.wrap_socket(dialled(), server_hostname="localhost")) as secure:
            assert (secure.version(), secure.selected_alpn_protocol()) == ("TLSv1.3", "h2")
            return call(secure, CREATE, write(1, asked) + write(3, 86400))

    leaf, intermediate, root = map(x509.load_pem_x509_certificate, read(create(WEB), 1))
    assert root == authority.root
    leaf.verify_directly_issued_by(intermediate)
    intermediate.verify_directly_issued_by(root)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier(WEB)]
    assert leaf.public_key() == key.public_key()
    with pytest.raises(CallError, match=r"^3: "):
        create(DB)
