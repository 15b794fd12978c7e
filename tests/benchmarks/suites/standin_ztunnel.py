"""What ztunnel does with what it is told, but for HBONE: it says what that was, gets its certificate, and relays.

Run as a program. Its port 15008 ends TLS as ztunnel's does, and nothing comes of it.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import struct
import sys
import threading
import urllib.parse
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from standin_grpc import call, read, write

_TOLD = (
    *("PROXY_MODE", "PROXY_WORKLOAD_INFO", "XDS_ADDRESS", "CA_ADDRESS", "CA_ROOT_CA"),
    *("LOCAL_XDS_PATH", "FAKE_CA"),
)


def certificate(told: dict[str, str], directory: Path) -> ssl.SSLContext:
    """A key, a CSR for the SPIFFE id that the workloads' file gives, and the CA's answer, as a server's context."""
    import yaml

    namespace, name, account = told["PROXY_WORKLOAD_INFO"].split("/")
    workloads = yaml.safe_load(Path(told["LOCAL_XDS_PATH"]).read_text())["workloads"]
    (ours,) = (one for one in workloads if (one["namespace"], one["name"]) == (namespace, name))
    identity = f"spiffe://{ours['trustDomain']}/ns/{namespace}/sa/{account}"
    key = ec.generate_private_key(ec.SECP256R1())
    san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(san, critical=True)
    pem = serialization.Encoding.PEM
    url = urllib.parse.urlsplit(told["CA_ADDRESS"])
    trusting = ssl.create_default_context(cafile=told["CA_ROOT_CA"])
    trusting.set_alpn_protocols(["h2"])
    with socket.create_connection((url.hostname, url.port), 5) as plain:
        secure = trusting.wrap_socket(plain, server_hostname=url.hostname)
        assert secure.selected_alpn_protocol() == "h2"
        request = write(1, csr.sign(key, hashes.SHA256()).public_bytes(pem)) + write(3, 86400)
        answer = call(secure, "/istio.v1.auth.IstioCertificateService/CreateCertificate", request)
    *chain, root = read(answer, 1)
    kept = directory / "certified.pem"
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    kept.write_bytes(b"".join([private, *chain]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(kept)
    context.load_verify_locations(cadata=root.decode())
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    return context


def copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def relay(near: socket.socket) -> None:
    try:
        _, port, host = struct.unpack("!HH4s", near.getsockopt(socket.SOL_IP, 80, 16)[:8])
        # Not the port that is redirected: past it, as ztunnel's tunnel goes.
        far = socket.create_connection((socket.inet_ntoa(host), port + 100))
    except OSError:
        near.close()
        return
    threading.Thread(target=copy, args=(near, far), daemon=True).start()
    copy(far, near)


def end_tls(context: ssl.SSLContext, near: socket.socket) -> None:
    try:
        with context.wrap_socket(near, server_side=True) as secure:
            secure.recv(1)
    except OSError:
        near.close()


def serve(port: int, handle) -> threading.Thread:
    listener = socket.create_server(("0.0.0.0", port))

    def accept() -> None:
        while True:
            threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

    made = threading.Thread(target=accept)
    made.start()
    return made


def main() -> None:
    if sys.argv[1:] == ["version"]:
        print("stand-in 1.0")
        return
    told = {name: os.environ.get(name, "unset") for name in _TOLD}
    config = Path(told["LOCAL_XDS_PATH"])
    config.with_suffix(".seen").write_text(json.dumps([sys.argv[1:], told, config.read_text()]))
    context = certificate(told, config.parent)
    serve(15008, lambda near: end_tls(context, near))
    serve(15001, relay).join()
