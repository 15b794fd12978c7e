"""Certificates that the control plane issues to itself: for its broker, its HTTPS server and its MQTT client."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from control import durable
from control.api.identity import SpiffeId
from control.server.ca import DEFAULT_TTL_S, Authority, write_identity

KEY_FILE: Final = "key.pem"


def issue_own(authority: Authority, directory: Path, identity: SpiffeId, ttl_s: int = DEFAULT_TTL_S) -> None:
    """Put a new key.pem (0600) and its chain.pem and bundle.pem into a directory, which is made if absent.

    Key and chain do not match for a moment, so whoever reads them is told afterwards. Raises CaError, OSError.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    chain = authority.issue(csr.public_bytes(serialization.Encoding.PEM), identity, ttl_s)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    durable.write(directory / KEY_FILE, private, 0o600)
    write_identity(directory, chain, authority.bundle_pem)
