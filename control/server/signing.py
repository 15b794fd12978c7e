"""The config key: signs what decides security, so that a broker can withhold configuration but never make any up.

Ed25519, with a certificate from the CA that is good for nothing else (`control.api.signing.CONFIG_KEY_OID`). Key and
certificate are one file, written by rename, so that no crash leaves one without the other.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from control import durable
from control.server.ca import Authority, CaError, read_passphrase

CONFIG_KEY_FILE: Final = "config-key.pem"
"""In the CA's directory: the encrypted key, then its certificate."""

LIFE: Final = timedelta(days=30)
"""Nothing revokes it before, and a proxy that starts while the control plane is away needs it valid."""
_MAX_BYTES: Final = 64 * 1024

_log = logging.getLogger(__name__)


class ConfigKey:
    """The key that is in use, and its certificate. `renew` replaces both."""

    def __init__(self, directory: Path, authority: Authority, passphrase: bytes, now: float) -> None:
        """`open` makes one."""
        self._path = directory / CONFIG_KEY_FILE
        self._authority = authority
        self._passphrase = passphrase
        loaded = self._load()
        if loaded is not None:
            self._key, self._certificate = loaded
        if loaded is None or self.due(now):
            try:
                self.renew(now)
            except CaError as error:
                if loaded is None or not _lives(self._certificate, now):
                    raise
                _log.warning("the config key is not renewed, and serves on: %s", error)

    @classmethod
    def open(
        cls, directory: str | Path, authority: Authority, now: float, passphrase_file: str | Path | None = None
    ) -> ConfigKey:
        """The key in a CA's directory; a new one when there is none that serves. `now`: Unix seconds.

        Raises CaError.
        """
        path = Path(directory)
        return cls(path, authority, read_passphrase(path, passphrase_file), now)

    @property
    def certificates(self) -> tuple[bytes, bytes]:
        """DER: the key's own, then the intermediate's."""
        der = serialization.Encoding.DER
        return self._certificate.public_bytes(der), self._authority.intermediate.public_bytes(der)

    def sign(self, message: bytes) -> bytes:
        """64 bytes."""
        return self._key.sign(message)

    def due(self, now: float) -> bool:
        """Whether half of its life is over; or it has not begun, as the clock was wrong when the key was made."""
        half = self._certificate.not_valid_after_utc - LIFE / 2
        return not self._certificate.not_valid_before_utc <= datetime.fromtimestamp(now, UTC) < half

    def renew(self, now: float) -> None:
        """Takes a new key. Everything that is signed must then be signed again. Raises CaError."""
        self._key, self._certificate = self._make(now)

    def _make(self, now: float) -> tuple[Ed25519PrivateKey, x509.Certificate]:
        key = Ed25519PrivateKey.generate()
        certificate = self._authority.certify_config_key(key.public_key(), datetime.fromtimestamp(now, UTC), LIFE)
        encrypted = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(self._passphrase),
        )
        try:
            durable.write(self._path, encrypted + certificate.public_bytes(serialization.Encoding.PEM), 0o600)
        except OSError as error:
            raise CaError(f"cannot write the config key to {self._path}: {error.strerror}") from None
        return key, certificate

    def _load(self) -> tuple[Ed25519PrivateKey, x509.Certificate] | None:
        """What the file holds; None when there is none that this CA made."""
        try:
            with self._path.open("rb") as file:
                content = file.read(_MAX_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CaError(f"{self._path} cannot be read: {error.strerror}") from None
        try:
            key = serialization.load_pem_private_key(content, self._passphrase)
            certificate = x509.load_pem_x509_certificate(content)
            certificate.verify_directly_issued_by(self._authority.intermediate)
        except (ValueError, TypeError, InvalidSignature) as error:
            # Nothing is lost with it: another key is made, and everything is signed again at every start.
            _log.warning("%s is replaced, as it cannot be used: %s", self._path, error)
            return None
        if not isinstance(key, Ed25519PrivateKey) or key.public_key() != certificate.public_key():
            _log.warning("%s is replaced: its key is not that of its certificate", self._path)
            return None
        return key, certificate


def _lives(certificate: x509.Certificate, now: float) -> bool:
    return certificate.not_valid_before_utc <= datetime.fromtimestamp(now, UTC) < certificate.not_valid_after_utc
