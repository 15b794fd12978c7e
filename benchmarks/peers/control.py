"""What ztunnel and linkerd2-proxy need of their control planes, without Kubernetes: a gRPC server beside each proxy.

    python -m benchmarks.peers.control istio|linkerd FILE

Both have their certificate from here, signed by the lab's CA. linkerd2-proxy also learns here where it may dial whom,
and who may dial it. Nothing changes while it runs. It listens on loopback in the proxy's network namespace and looks at
no token: who is in there is the workload.

The messages are those of istio/api (security/v1alpha1/ca.proto) and of linkerd/linkerd2-proxy-api (proto/).
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import json
import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from benchmarks.peers.grpc_server import Call, RefusedError, Status, serve
from benchmarks.peers.protobuf import ProtobufError, field, fixed32, read, text
from control.api.identity import SpiffeId
from control.server import ca

PORT = 15012
"""Where it listens, on loopback: istiod's, which is where a ztunnel outside of Kubernetes looks for its CA."""
LINKERD_INBOUND_PORT = 4143
_LIFE = timedelta(days=1)
_DETECT_S = 10
"""How long linkerd2-proxy looks for HTTP, at its admin port: Linkerd's own default."""


@dataclass(frozen=True, slots=True)
class Control:
    """What the server of one proxy is told. JSON carries it."""

    directory: str
    """Its own, for a key."""
    ca_directory: str
    identity: str
    """The SPIFFE id of the workload whose proxy asks."""
    server: str
    """The address of the workload behind the second proxy of the pair."""
    ports: Sequence[int]
    """Of its application."""
    server_identity: str
    client_identity: str
    """Who may dial it."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Control:
        return cls(**json.loads(path.read_text()))


def argv(whose: str, config: Path) -> list[str]:
    """The command that runs one: "istio" or "linkerd"."""
    return [sys.executable, "-I", "-m", "benchmarks.peers.control", whose, str(config)]


def linkerd_name(identity: SpiffeId) -> str:
    """The identity as Linkerd writes it: a DNS name, which is the name in TLS, too."""
    account, namespace = identity.service_account, identity.namespace
    return f"{account}.{namespace}.serviceaccount.identity.linkerd.{identity.trust_domain}"


def istio_calls(control: Control) -> dict[str, Call]:
    """Of Istio's control plane: ztunnel has everything but its certificate from a file."""
    return {"/istio.v1.auth.IstioCertificateService/CreateCertificate": Call(_reading(_create_certificate, control))}


def linkerd_calls(control: Control) -> dict[str, Call]:
    """Of Linkerd's. Of an address that is no service its policy controller knows nothing; the profile says it all."""
    return {
        "/io.linkerd.proxy.identity.Identity/Certify": Call(_reading(_certify, control)),
        "/io.linkerd.proxy.destination.Destination/GetProfile": Call(_reading(_profile, control), stays_open=True),
        "/io.linkerd.proxy.inbound.InboundServerPolicies/WatchPort": Call(_reading(_port, control), stays_open=True),
        "/io.linkerd.proxy.outbound.OutboundPolicies/Watch": Call(_no_policy),
    }


_Fields = dict[int, list[int | bytes]]


def _reading(answer: Callable[[Control, _Fields], bytes], control: Control) -> Callable[[bytes], bytes]:
    def read_first(message: bytes) -> bytes:
        try:
            return answer(control, read(message))
        except (ProtobufError, ca.CaError, ValueError) as error:
            raise RefusedError(Status.INVALID_ARGUMENT, str(error)) from error

    return read_first


def _create_certificate(control: Control, request: _Fields) -> bytes:
    """IstioCertificateRequest: csr = 1 (PEM). Answer: cert_chain = 1, repeated, in PEM; the last one is the root."""
    authority = ca.Authority.open(control.ca_directory)
    identity = SpiffeId.parse(control.identity)
    chain = authority.issue(text(request, 1).encode(), identity, int(_LIFE.total_seconds()))
    certificates = [*x509.load_pem_x509_certificates(chain), authority.root]
    return b"".join(field(1, one.public_bytes(serialization.Encoding.PEM)) for one in certificates)


def _certify(control: Control, request: _Fields) -> bytes:
    """CertifyRequest: identity = 1, token = 2, certificate_signing_request = 3 (DER, though the proto says PEM).

    CertifyResponse: leaf_certificate = 1, intermediate_certificates = 2 (both DER), valid_until = 3 (a Timestamp).
    """
    name = linkerd_name(SpiffeId.parse(control.identity))
    if text(request, 1) != name:
        raise RefusedError(Status.PERMISSION_DENIED, f"{text(request, 1)} is not {name}, who lives here")
    encoded = request.get(3, [b""])[-1]
    csr = x509.load_der_x509_csr(encoded if isinstance(encoded, bytes) else b"")
    key = csr.public_key()
    if not csr.is_signature_valid or not isinstance(key, ec.EllipticCurvePublicKey):
        raise RefusedError(Status.INVALID_ARGUMENT, "the CSR is not signed by an elliptic curve's key of its own")
    leaf, intermediate = _issue(Path(control.ca_directory), key, name)
    der = serialization.Encoding.DER
    until = field(1, int(leaf.not_valid_after_utc.timestamp()))
    return field(1, leaf.public_bytes(der)) + field(2, intermediate.public_bytes(der)) + field(3, until)


def _profile(control: Control, request: _Fields) -> bytes:
    """GetDestination: path = 2. DestinationProfile: opaque_protocol = 4, endpoint = 6.

    As Linkerd answers for the address of a workload whose ports are declared opaque: it is itself the endpoint, the
    bytes are nobody's business, and its proxy takes them at its inbound port behind a header that names the target.
    """
    host, _, port = text(request, 2).rpartition(":")
    if host != control.server or port not in map(str, control.ports):
        raise RefusedError(Status.NOT_FOUND, f"nobody is known at {host}:{port}")
    name = linkerd_name(SpiffeId.parse(control.server_identity))
    tls = field(1, field(1, name)) + field(4, field(1, name))  # dns_like_identity, server_name
    hint = field(3, b"") + field(2, field(1, LINKERD_INBOUND_PORT))  # opaque, opaque_transport
    address = field(1, _ip(host)) + field(2, int(port))
    return field(4, 1) + field(6, field(1, address) + field(3, 1) + field(5, tls) + field(6, hint))


def _port(control: Control, request: _Fields) -> bytes:
    """PortSpec: workload = 1, port = 2. Server: protocol = 1, authorizations = 3, labels = 4.

    The application's ports take what they are sent; any other is a port of the proxy itself, where HTTP is looked for.
    Both take who has the client's identity, over mutual TLS.
    """
    port = request.get(2, [0])[-1]
    name = linkerd_name(SpiffeId.parse(control.client_identity))
    metadata = field(1, "benchmark")  # default = 1
    authorization = (
        field(1, field(1, field(1, _ip("0.0.0.0")) + field(2, 0)))  # networks: net: ip, prefix_len
        + field(2, field(2, field(2, field(1, field(1, name)))))  # meshTLS: identities: identities: name
        + field(4, metadata)
    )
    if port in control.ports:
        protocol = field(2, b"")  # opaque
    else:
        route = field(1, metadata) + field(4, field(1, b""))  # metadata; rules: one match, of everything
        protocol = field(1, field(1, field(1, _DETECT_S)) + field(3, route))  # detect: timeout, http_routes
    named = {"group": "", "kind": "default", "name": "benchmark"}
    labels = b"".join(field(4, field(1, key) + field(2, value)) for key, value in named.items())
    return field(1, protocol) + field(3, authorization) + labels


def _no_policy(message: bytes) -> bytes:
    raise RefusedError(Status.NOT_FOUND, "no service, so no policy of its own")


def _ip(address: str) -> bytes:
    return fixed32(1, int(ipaddress.IPv4Address(address)))  # ipv4 = 1


@functools.cache
def _signer(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The intermediate and its key."""
    certificate = x509.load_pem_x509_certificate((directory / ca.INTERMEDIATE_FILE).read_bytes())
    key = serialization.load_pem_private_key(
        (directory / ca.INTERMEDIATE_KEY_FILE).read_bytes(), ca.read_passphrase(directory)
    )
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return certificate, key


def _issue(directory: Path, key: ec.EllipticCurvePublicKey, name: str) -> tuple[x509.Certificate, x509.Certificate]:
    """A certificate for a DNS name, which the mesh's own CA never makes, and the intermediate."""
    issuer, signing = _signer(directory)
    now = datetime.now(UTC)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    # A common name has at most 64 characters (RFC 5280 appendix A.1), and nobody looks at it.
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]))
        .issuer_name(issuer.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + _LIFE)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    return builder.sign(signing, hashes.SHA256()), issuer


def _tls(control: Control) -> ssl.SSLContext:
    """As `localhost`: ztunnel speaks to its CA over TLS only."""
    key = ec.generate_private_key(ec.SECP256R1())
    plain = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    file = Path(control.directory) / "control.pem"
    file.touch(mode=0o600)
    certificates = _issue(Path(control.ca_directory), key.public_key(), "localhost")
    parts = [key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)]
    file.write_bytes(b"".join(parts + [one.public_bytes(pem) for one in certificates]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(file)
    context.set_alpn_protocols(["h2"])
    return context


def main(whose: str, file: str) -> None:
    """Serve until killed."""
    control = Control.read(Path(file))
    calls = {"istio": istio_calls, "linkerd": linkerd_calls}[whose](control)
    # linkerd2-proxy speaks plainly to a control plane on loopback, whatever it is told.
    asyncio.run(serve(calls, ("127.0.0.1", PORT), _tls(control) if whose == "istio" else None))


if __name__ == "__main__":
    main(*sys.argv[1:])
