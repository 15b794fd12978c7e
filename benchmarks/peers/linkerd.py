"""A pair of linkerd2-proxies, one for each workload, without Kubernetes and without Linkerd's control plane.

Written from linkerd2-proxy's source (linkerd/app/src/env.rs, outbound/src/discover.rs, inbound/src/direct.rs,
proxy/identity-client) and from Linkerd's destination and identity controllers: no linkerd2-proxy has been run with it.
control.py beside each stands for the three services. The application's ports are declared opaque, as Linkerd's
documentation asks of whatever is not HTTP: each connection is one mutual TLS connection from proxy to proxy.
"""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import entered, tail
from benchmarks.peers import control
from benchmarks.peers.control import LINKERD_INBOUND_PORT, linkerd_name
from benchmarks.peers.place import Place

OUTBOUND_PORT, ADMIN_PORT = 4140, 4191
_READY_S = 20.0
_POLL_S = 0.05
_BUILD = re.compile(r'^proxy_build_info\{[^}]*\bversion="([^"]+)"', re.MULTILINE)


def environment(place: Place, ports: range) -> dict[str, str]:
    """What one proxy is told; the rest is as it has it by itself."""
    server = f"127.0.0.1:{control.PORT}"
    return {
        # On loopback the proxy asks neither for a name nor for TLS.
        "LINKERD2_PROXY_IDENTITY_SVC_ADDR": server,
        "LINKERD2_PROXY_DESTINATION_SVC_ADDR": server,
        "LINKERD2_PROXY_POLICY_SVC_ADDR": server,
        "LINKERD2_PROXY_POLICY_WORKLOAD": f"{place.identity.namespace}:{place.identity.service_account}",
        "LINKERD2_PROXY_IDENTITY_DIR": str(place.directory),
        "LINKERD2_PROXY_IDENTITY_TOKEN_FILE": str(place.directory / "token"),
        "LINKERD2_PROXY_IDENTITY_TRUST_ANCHORS": (place.identity_dir / "bundle.pem").read_text(),
        "LINKERD2_PROXY_IDENTITY_LOCAL_NAME": linkerd_name(place.identity),
        "LINKERD2_PROXY_OUTBOUND_LISTEN_ADDR": f"127.0.0.1:{OUTBOUND_PORT}",
        "LINKERD2_PROXY_INBOUND_LISTEN_ADDR": f"0.0.0.0:{LINKERD_INBOUND_PORT}",
        "LINKERD2_PROXY_ADMIN_LISTEN_ADDR": f"127.0.0.1:{ADMIN_PORT}",
        "LINKERD2_PROXY_DESTINATION_PROFILE_NETWORKS": "10.0.0.0/8",
        "LINKERD2_PROXY_INBOUND_PORTS": ",".join(map(str, ports)),
        # Of a port whose policy is not known.
        "LINKERD2_PROXY_INBOUND_DEFAULT_POLICY": "deny",
        # One, as the Envoys have: all of a subject runs on one core.
        "LINKERD2_PROXY_CORES": "1",
        "LINKERD2_PROXY_LOG": "warn",
    }


def start(program: Path, place: Place, ports: range) -> subprocess.Popen[bytes]:
    """One proxy of the pair, once it has its certificate. Raises LabError."""
    _make_key(place)
    # At the other ports it asks the kernel of every connection where it was going to, which nobody knows of a probe's.
    process = place.start([str(program)], [("127.0.0.1", ADMIN_PORT)], environment(place, ports))
    deadline = time.monotonic() + _READY_S
    while _admin(place, "/ready")[0] != http.client.OK:
        if process.poll() is not None or time.monotonic() > deadline:
            logs = tail(place.log) + tail(place.control_log)
            raise LabError(f"{program.name} does not become ready (exit status {process.poll()}):\n{logs}")
        time.sleep(_POLL_S)
    return process


def capture(client: Place, server: Place, ports: range) -> None:
    """Take the connections at both ends, as Linkerd's init container does. Raises LabError.

    The client's proxy dials the server's at its own port, which is no captured one; that port is redirected to itself,
    because the proxy asks SO_ORIGINAL_DST of every connection, and the kernel knows it of those that a rule has seen.
    Whoever dials the application without a proxy meets the server's, too.
    """
    wanted = f"{ports.start}-{ports.stop - 1}"
    client.redirect("output", f"ip daddr {server.address} tcp dport {wanted}", OUTBOUND_PORT)
    # Its own connections to the application come over loopback.
    arriving = f'iifname != "lo" tcp dport {{ {wanted}, {LINKERD_INBOUND_PORT} }}'
    server.redirect("prerouting", arriving, LINKERD_INBOUND_PORT)


def version(place: Place) -> str:
    """As a running one says itself."""
    found = _BUILD.search(_admin(place, "/metrics")[1])
    return f"linkerd2-proxy {found[1]}" if found else "linkerd2-proxy"


def _make_key(place: Place) -> None:
    """What `linkerd-identity-end-entity` holds in a pod: a key, a CSR, and a token that control.py does not look at."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = linkerd_name(place.identity)
    der = serialization.Encoding.DER
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    kept = place.directory / "key.p8"
    kept.touch(mode=0o600)
    kept.write_bytes(key.private_bytes(der, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    (place.directory / "csr.der").write_bytes(csr.public_bytes(der))
    (place.directory / "token").write_text("nobody looks at it")


def _admin(place: Place, path: str) -> tuple[int, str]:
    """One GET of the admin port; status 0 while nobody answers."""
    with suppress(OSError, http.client.HTTPException), _connected(place) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    return 0, ""


@contextmanager
def _connected(place: Place) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", ADMIN_PORT)
    with entered(place.box.netns_path):
        connection.sock = socket.create_connection(("127.0.0.1", ADMIN_PORT), 1.0)
    try:
        yield connection
    finally:
        connection.close()
