"""What a linkerd2-proxy does with opaque TCP, in its own words: LINKERD2_PROXY_* in, gRPC for the rest, mTLS between.

Run as a program. It writes what it asked and was told to stderr, a line of JSON each.
"""

from __future__ import annotations

import base64
import http.server
import json
import os
import select
import socket
import ssl
import struct
import sys
import threading
from pathlib import Path

from standin_grpc import CallError, call, read, write

PROTOCOL = "transport.l5d.io/v1"
_SO_ORIGINAL_DST = 80


def told(name: str) -> str:
    return os.environ[f"LINKERD2_PROXY_{name}"]


def address(name: str) -> tuple[str, int]:
    host, _, port = told(name).rpartition(":")
    return host, int(port)


def say(**what: object) -> None:
    sys.stderr.write(json.dumps(what) + "\n")  # at once: other threads write, too
    sys.stderr.flush()


def ask(service: str, path: str, message: bytes) -> bytes:
    with socket.create_connection(address(f"{service}_SVC_ADDR"), 5) as made:
        return call(made, path, message)


def pem(der: bytes, what: str) -> str:
    return f"-----BEGIN {what}-----\n{base64.encodebytes(der).decode()}-----END {what}-----\n"


def certify() -> None:
    """Ask for a certificate for the CSR of the directory, and keep it beside the key."""
    directory, name = Path(told("IDENTITY_DIR")), told("IDENTITY_LOCAL_NAME")
    token = Path(told("IDENTITY_TOKEN_FILE")).read_bytes()
    assert token
    request = write(1, name) + write(2, token) + write(3, (directory / "csr.der").read_bytes())
    answer = ask("IDENTITY", "/io.linkerd.proxy.identity.Identity/Certify", request)
    assert read(answer, 3, 1)[0] > 0, "no end of its life"
    chain = [*read(answer, 1), *read(answer, 2)]
    kept = "".join(pem(der, "CERTIFICATE") for der in chain) + pem((directory / "key.p8").read_bytes(), "PRIVATE KEY")
    (directory / "certified.pem").write_text(kept)


def context(purpose: int) -> ssl.SSLContext:
    made = ssl.SSLContext(purpose)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_cert_chain(Path(told("IDENTITY_DIR")) / "certified.pem")
    made.load_verify_locations(cadata=told("IDENTITY_TRUST_ANCHORS"))
    made.verify_mode = ssl.CERT_REQUIRED
    made.set_alpn_protocols([PROTOCOL])
    if purpose == ssl.PROTOCOL_TLS_SERVER:
        # A ticket makes a socket readable from which nothing can be read, and a blocking relay would wait.
        made.num_tickets = 0
    return made


def original(made: socket.socket) -> tuple[str, int]:
    _, port, host = struct.unpack("!HH4s", made.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)[:8])
    return socket.inet_ntoa(host), port


def outbound(near: socket.socket) -> None:
    host, port = original(near)
    say(dialled=[host, port])
    try:
        ask("POLICY", "/io.linkerd.proxy.outbound.OutboundPolicies/Watch", b"")
    except CallError as error:
        if error.status != "5":  # NOT_FOUND: the profile decides
            raise
    asked = write(1, "") + write(2, f"{host}:{port}")
    profile = ask("DESTINATION", "/io.linkerd.proxy.destination.Destination/GetProfile", asked)
    assert read(profile, 4) == [1], "not opaque"
    (packed,), (target,) = read(profile, 6, 1, 1, 1), read(profile, 6, 1, 2)
    endpoint = socket.inet_ntoa(struct.pack("!I", packed))
    (identity,), (name,) = read(profile, 6, 5, 1, 1), read(profile, 6, 5, 4, 1)
    assert read(profile, 6, 6, 3) == [b""], "no hint that it is opaque"
    (inbound_port,) = read(profile, 6, 6, 2, 1)
    say(endpoint=[endpoint, target], identity=identity.decode(), inbound_port=inbound_port)
    plain = socket.create_connection((endpoint, inbound_port), 5)
    # OpenSSL checks that this name is in the certificate, and that a trust anchor vouches for it.
    assert name == identity
    far = context(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(plain, server_hostname=name.decode())
    header = write(1, target)
    far.sendall(PROTOCOL.encode() + b"\r\n\r\n" + struct.pack("!I", len(header)) + header)
    relay(far, near)


def inbound(near: socket.socket) -> None:
    host, port = original(near)
    say(arrived=[host, port])
    assert port == address("INBOUND_LISTEN_ADDR")[1], "not from a proxy"
    near.settimeout(5)
    tls = context(ssl.PROTOCOL_TLS_SERVER).wrap_socket(near, server_side=True)
    assert tls.selected_alpn_protocol() == PROTOCOL
    preface = PROTOCOL.encode() + b"\r\n\r\n"
    assert exactly(tls, len(preface)) == preface
    (target,) = read(exactly(tls, struct.unpack("!I", exactly(tls, 4))[0]), 1)
    caller = [name for kind, name in tls.getpeercert()["subjectAltName"] if kind == "DNS"]
    asked = write(1, told("POLICY_WORKLOAD")) + write(2, target)
    server = ask("POLICY", "/io.linkerd.proxy.inbound.InboundServerPolicies/WatchPort", asked)
    assert read(server, 1, 2) == [b""], "not opaque"
    allowed = [name.decode() for name in read(server, 3, 2, 2, 2, 1, 1)]
    assert read(server, 3, 1, 1, 1, 1) == [0], "not from everywhere"
    say(caller=caller, allowed=allowed, target=target)
    if set(caller) & set(allowed):
        tls.settimeout(None)
        relay(tls, socket.create_connection((host, target), 5))
    tls.close()


def exactly(made: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        received += made.recv(count - len(received)) or sys.exit("ended too soon")
    return received


def relay(tls: ssl.SSLSocket, plain: socket.socket) -> None:
    tls.settimeout(None)
    plain.settimeout(None)
    with tls, plain:
        while True:
            ready = [tls] if tls.pending() else select.select([tls, plain], [], [])[0]
            for source in ready:
                data = source.recv(65536)
                if not data:
                    return
                (plain if source is tls else tls).sendall(data)


def serve(where: tuple[str, int], handle) -> None:
    listener = socket.create_server(where, backlog=256)

    def one(near: socket.socket) -> None:
        with near:
            try:
                handle(near)
            except (OSError, AssertionError, CallError) as error:
                say(error=repr(error))

    def accept() -> None:
        while True:
            threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


class Admin(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        ready = (Path(told("IDENTITY_DIR")) / "certified.pem").exists()
        self.send_response(200 if self.path == "/metrics" or ready else 503)
        self.end_headers()
        self.wfile.write(b'# TYPE proxy_build_info gauge\nproxy_build_info{git_branch="x",version="stand-in 1"} 1\n')

    def log_message(self, *args: object) -> None: ...


def main() -> None:
    serve(address("OUTBOUND_LISTEN_ADDR"), outbound)
    serve(address("INBOUND_LISTEN_ADDR"), inbound)
    threading.Thread(target=certify, daemon=True).start()
    http.server.ThreadingHTTPServer(address("ADMIN_LISTEN_ADDR"), Admin).serve_forever()
