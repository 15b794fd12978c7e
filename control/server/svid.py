"""Certificates that the control plane issues to itself: for its broker, its HTTPS server and its MQTT client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from control import durable
from control.api.identity import SpiffeId
from control.server.ca import DEFAULT_TTL_S, Authority, write_identity

KEY_FILE: Final = "key.pem"
_CHAIN_FILE: Final = "chain.pem"
_LOOK_S: Final = 60.0
_LEAST_PAUSE_S: Final = 0.5


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


async def due(directory: Path, ttl_s: int = DEFAULT_TTL_S, now: Callable[[], float] = time.time) -> None:
    """Wait until the certificate in a directory should be replaced: half of its life is over, or it has not begun.

    By the clock that others check it with, which may be set, and which goes on while a host is suspended.
    """
    while True:
        left_s = _left_s(directory, ttl_s, now())
        await asyncio.sleep(min(max(left_s, _LEAST_PAUSE_S), _LOOK_S))
        if left_s <= 0:
            return


def _left_s(directory: Path, ttl_s: int, now: float) -> float:
    """Seconds until it is due; 0 or less: it is, also when it cannot be read."""
    try:
        leaf = x509.load_pem_x509_certificate((directory / _CHAIN_FILE).read_bytes())
    except (OSError, ValueError):
        return 0.0
    if datetime.fromtimestamp(now, UTC) < leaf.not_valid_before_utc:
        return 0.0
    return (leaf.not_valid_after_utc - timedelta(seconds=ttl_s / 2)).timestamp() - now
