"""Makes a workload's key, and the request to have it certified.

    python -m control.client.csr --dir DIR --id spiffe://cluster.local/ns/shop/sa/web

A process of its own and short-lived: `cryptography` costs a proxy 25 MB, and the key
is made where it is used, so that it travels nowhere.
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from control import durable
from control.api.identity import SpiffeId

KEY_FILE = "key.pem"
CSR_FILE = "csr.pem"

_MAX_KEY_BYTES = 16 * 1024


class CsrError(Exception):
    """The key or the request cannot be made; the text says why and what to do."""


def make_request(directory: str | Path, identity: SpiffeId) -> Path:
    """Make key.pem, unless there is one, and csr.pem in a directory; return the path of csr.pem.

    A key that is there is kept, so that a chain.pem beside it stays right. Raises `CsrError`.
    """
    path = Path(directory)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = own_key(path / KEY_FILE)
        durable.write(path / CSR_FILE, request(key, identity))
    except OSError as error:
        raise CsrError(f"cannot write to {path}: {error.strerror}") from None
    return path / CSR_FILE


def request(key: ec.EllipticCurvePrivateKey, identity: SpiffeId | None) -> bytes:
    """A CSR in PEM with an empty subject and the identity as its critical SAN, like ztunnel's (docs/hbone.md 2.1).

    None: whoever signs knows who asks, and says so in the certificate.
    """
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if identity is not None:
        name = x509.UniformResourceIdentifier(str(identity))
        builder = builder.add_extension(x509.SubjectAlternativeName([name]), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def own_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The P-256 key in a file, made and durably written first when there is none. Raises `CsrError` and OSError."""
    if not path.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        durable.write(path, pem, 0o600)
        return key
    if os.stat(path).st_mode & 0o077:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        raise CsrError(f"{path} has mode {mode:04o}: others can read the key. Delete it, so that a new one is made")
    with path.open("rb") as file:
        content = file.read(_MAX_KEY_BYTES)
    try:
        kept = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError) as error:
        raise CsrError(f"{path} is not a plain private key in PEM: {error}. Delete it to have one made") from None
    if not isinstance(kept, ec.EllipticCurvePrivateKey) or not isinstance(kept.curve, ec.SECP256R1):
        raise CsrError(f"{path} is not an ECDSA P-256 key. Delete it to have one made")
    return kept


def _identity(text: str) -> SpiffeId:
    try:
        return SpiffeId.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 made, 1 refused, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m control.client.csr",
        description="Make a workload's key (key.pem, mode 0600) and a certificate request for it (csr.pem).",
    )
    parser.add_argument("--dir", required=True, type=Path, help="the workload's identity directory")
    parser.add_argument("--id", required=True, type=_identity, metavar="SPIFFE_ID", help="whose key it is")
    arguments = parser.parse_args(argv)
    try:
        print(make_request(arguments.dir, arguments.id))
    except CsrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
