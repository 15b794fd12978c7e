"""The mesh's certificate authority: a root, an intermediate that does the daily work, and SVIDs.

A CA is one directory, made whole by `Authority.create` or not at all:

    root.pem, root-key.pem                  the trust anchor; its key is needed to make intermediates only
    intermediate.pem, intermediate-key.pem  signs SVIDs
    passphrase                              decrypts both keys, unless the operator keeps one elsewhere
    crl.pem                                 SVIDs that were revoked, once there are any

Keys are encrypted PKCS #8. An SVID is on P-256, the identity in the one URI SAN.
"""

from __future__ import annotations

import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from control import durable
from control.api.identity import SpiffeId, TrustDomain, make_id, parse_trust_domain, proxy_hash
from control.api.policy import DEFAULT_ROOT_NAMESPACE
from control.api.signing import CONFIG_KEY_OID

DEFAULT_TTL_S = 24 * 3600
# Nobody may learn of a revocation in time, so the life of an SVID bounds what a stolen key is good for.
MAX_TTL_S = 30 * 24 * 3600

PASSPHRASE_FILE = "passphrase"
ROOT_FILE = "root.pem"
ROOT_KEY_FILE = "root-key.pem"
INTERMEDIATE_FILE = "intermediate.pem"
INTERMEDIATE_KEY_FILE = "intermediate-key.pem"
CONTROL_PLANE_ACCOUNT = "control-plane"
"""Service account of the control plane, in the root namespace."""

CHAIN_FILE = "chain.pem"
BUNDLE_FILE = "bundle.pem"
REVOCATIONS_FILE = "crl.pem"

# Hosts' clocks differ: a certificate must be valid on a peer whose clock is a little behind.
_BACKDATE = timedelta(seconds=60)
_ROOT_LIFE = timedelta(days=3650)
_INTERMEDIATE_LIFE = timedelta(days=1825)
# 40 bytes for each; a proxy reads 256 KiB in PEM (`uproxy.tls.MAX_FILE_BYTES`).
MAX_REVOKED = 4000
_MAX_REVOCATIONS_BYTES = 256 * 1024
# A P-256 CSR has half a kilobyte.
_MAX_CSR_BYTES = 16 * 1024
_MAX_PASSPHRASE_BYTES = 1024
# `cryptography` encrypts PKCS #8 with 2,048 rounds of PBKDF2, so that a passphrase must be hard to guess by itself.
_MIN_PASSPHRASE_BYTES = 20


class CaError(Exception):
    """The CA refuses, or cannot do, what was asked. The text says what, and what to do."""


@dataclass(frozen=True, slots=True)
class RevocationList:
    """One of our own."""

    parsed: x509.CertificateRevocationList
    number: int
    """Rises from each list to the next (RFC 5280 section 5.2.3)."""

    @property
    def der(self) -> bytes:
        return self.parsed.public_bytes(serialization.Encoding.DER)

    def names(self, serial: int) -> bool:
        """Whether the certificate of this serial number is revoked."""
        return self.parsed.get_revoked_certificate_by_serial_number(serial) is not None


class Authority:
    """A CA opened for issuing: holds the intermediate's key in memory, never the root's."""

    def __init__(
        self,
        trust_domain: TrustDomain,
        root: x509.Certificate,
        intermediate: x509.Certificate,
        key: ec.EllipticCurvePrivateKey,
    ) -> None:
        self.trust_domain = trust_domain
        self.root = root
        self.intermediate = intermediate
        self._key = key
        self._key_identifier = intermediate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value

    @classmethod
    def create(cls, directory: str | Path, trust_domain: str, passphrase_file: str | Path | None = None) -> Authority:
        """Make a new CA in a directory that does not exist yet or is empty.

        Without `passphrase_file` a random passphrase is made and kept beside the keys. Raises `CaError`.
        """
        try:
            domain = parse_trust_domain(trust_domain)
        except ValueError as error:
            raise CaError(str(error)) from None
        target = Path(directory).resolve()
        _refuse_existing(target)
        passphrase = _read_passphrase(Path(passphrase_file)) if passphrase_file is not None else None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # mkdtemp gives mode 0700.
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        except OSError as error:
            raise CaError(f"cannot make a directory beside {target}: {error.strerror}") from None
        try:
            authority = _populate(staging, domain, passphrase)
            # rename(2) replaces an empty directory and nothing else: of two that race, one is refused.
            staging.rename(target)
            durable.sync_directory(target.parent)
        except OSError as error:
            _refuse_existing(target)
            raise CaError(f"cannot write the CA to {target}: {error.strerror}") from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return authority

    @classmethod
    def open(cls, directory: str | Path, passphrase_file: str | Path | None = None) -> Authority:
        """Open a CA for issuing. Raises `CaError`."""
        path = Path(directory)
        root = _certificate(path / ROOT_FILE)
        intermediate = _certificate(path / INTERMEDIATE_FILE)
        key = _private_key(path / INTERMEDIATE_KEY_FILE, read_passphrase(path, passphrase_file))
        if key.public_key() != intermediate.public_key():
            raise CaError(f"{path / INTERMEDIATE_KEY_FILE} is not the key of {path / INTERMEDIATE_FILE}")
        try:
            intermediate.verify_directly_issued_by(root)
            domain = _trust_domain(root)
        except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
            raise CaError(f"{path} does not hold a CA made by `meshctl ca init`: {error}") from None
        return cls(domain, root, intermediate, key)

    @property
    def bundle_pem(self) -> bytes:
        """The roots that a proxy of this mesh trusts."""
        return self.root.public_bytes(serialization.Encoding.PEM)

    @property
    def root_fingerprint(self) -> str:
        """SHA-256 of the root certificate, hex."""
        return self.root.fingerprint(hashes.SHA256()).hex()

    def issue(self, csr_pem: bytes, identity: SpiffeId, ttl_s: int = DEFAULT_TTL_S) -> bytes:
        """Certify the key of a CSR for `identity`; return the leaf, then the intermediate, in PEM.

        Raises `CaError`. The CSR proves possession of its key and says nothing else: URIs in it are checked
        against `identity`, and no name in it is copied.
        """
        if identity.trust_domain != self.trust_domain:
            raise CaError(f"{identity} is of another trust domain; this CA is of {self.trust_domain}")
        if not 1 <= ttl_s <= MAX_TTL_S:
            raise CaError(f"a certificate lives between one second and {MAX_TTL_S // 86400} days, not {ttl_s} s")
        public_key = requested_key(csr_pem, identity)
        now = datetime.now(UTC).replace(microsecond=0)
        not_after = now + timedelta(seconds=ttl_s)
        if not_after > self.intermediate.not_valid_after_utc:
            raise CaError(
                f"the certificate would end at {not_after}, after the intermediate CA's own end at "
                f"{self.intermediate.not_valid_after_utc}. Ask for a shorter life, or make a new CA"
            )
        certificate = (
            _builder(_common_name(proxy_hash(identity)), self.intermediate.subject, public_key, now, not_after)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))]), critical=False)
            .add_extension(_LEAF_USAGE, critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(self._key_identifier),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        return certificate.public_bytes(pem) + self.intermediate.public_bytes(pem)

    def revoke(self, serials: Collection[int], before: bytes = b"") -> bytes:
        """The revocation list (PEM) with these SVIDs and those of the list before, but for those that have ended.

        It is good as long as the intermediate: a list that ended would cut everybody off. Raises `CaError`.
        """
        now = datetime.now(UTC).replace(microsecond=0)
        number = int(now.timestamp())
        revoked = dict.fromkeys(serials, now)
        if before:
            known = self.read_revocations(before)
            number = max(number, known.number + 1)
            for entry in known.parsed:
                if entry.revocation_date_utc > now - timedelta(seconds=MAX_TTL_S):
                    revoked[entry.serial_number] = entry.revocation_date_utc
        if len(revoked) > MAX_REVOKED:
            raise CaError(f"a revocation list has at most {MAX_REVOKED} certificates; make a new CA instead")
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.intermediate.subject)
            .last_update(now - _BACKDATE)
            .next_update(self.intermediate.not_valid_after_utc)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(self._key_identifier), critical=False
            )
            .add_extension(x509.CRLNumber(number), critical=False)
        )
        for serial, since in sorted(revoked.items()):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(since).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def read_revocations(self, content: bytes) -> RevocationList:
        """A list that this CA has signed, in PEM or DER. Raises `CaError`."""
        try:
            found = (x509.load_pem_x509_crl if content.startswith(b"-----") else x509.load_der_x509_crl)(content)
            if not found.is_signature_valid(self._key.public_key()):
                raise CaError(f"{REVOCATIONS_FILE} was not signed by this CA; move it away")
            number = found.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        except (ValueError, x509.ExtensionNotFound) as error:
            raise CaError(f"{REVOCATIONS_FILE} is no revocation list: {error}") from None
        return RevocationList(found, number)

    def certify_config_key(self, key: ed25519.Ed25519PublicKey, now: datetime, life: timedelta) -> x509.Certificate:
        """Certify a key to sign configuration as the control plane, and for nothing else. Raises `CaError`.

        The one extended key usage is critical and our own, so that no TLS peer takes it and no TLS certificate signs.
        """
        identity = make_id(self.trust_domain, DEFAULT_ROOT_NAMESPACE, CONTROL_PLANE_ACCOUNT)
        now = now.replace(microsecond=0)
        if now + life > self.intermediate.not_valid_after_utc:
            raise CaError(f"the intermediate CA ends at {self.intermediate.not_valid_after_utc}; make a new CA in time")
        name = _common_name(f"{self.trust_domain} mesh configuration")
        return (
            _builder(name, self.intermediate.subject, key, now, now + life)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))]), critical=False)
            .add_extension(_LEAF_USAGE, critical=True)
            .add_extension(x509.ExtendedKeyUsage([x509.ObjectIdentifier(CONFIG_KEY_OID)]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(self._key_identifier),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )


def read_revocations(directory: str | Path, authority: Authority) -> RevocationList | None:
    """The revocation list in the CA's directory; None when there is none. Raises `CaError`."""
    path = Path(directory) / REVOCATIONS_FILE
    return authority.read_revocations(_read(path, _MAX_REVOCATIONS_BYTES)) if path.exists() else None


def write_revocations(directory: str | Path, authority: Authority, serials: Collection[int]) -> tuple[Path, int]:
    """Add to the revocation list in the CA's directory. Where it is, and how many it has. Raises `CaError`."""
    path = Path(directory) / REVOCATIONS_FILE
    pem = authority.revoke(serials, _read(path, _MAX_REVOCATIONS_BYTES) if path.exists() else b"")
    try:
        durable.write(path, pem)
    except OSError as error:
        raise CaError(f"cannot write {path}: {error.strerror}") from None
    return path, len(x509.load_pem_x509_crl(pem))


def write_identity(directory: str | Path, chain_pem: bytes, bundle_pem: bytes) -> None:
    """Put chain.pem and bundle.pem into an identity directory, beside the key that never came here."""
    path = Path(directory)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The roots first: a proxy that loads between the two writes trusts at least what its chain needs.
        durable.write(path / BUNDLE_FILE, bundle_pem)
        durable.write(path / CHAIN_FILE, chain_pem)
    except OSError as error:
        raise CaError(f"cannot write the certificate to {path}: {error.strerror}") from None


def _key_usage(*, digital_signature: bool, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


_LEAF_USAGE = _key_usage(digital_signature=True, signs_certificates=False)
_CA_USAGE = _key_usage(digital_signature=False, signs_certificates=True)


def _populate(directory: Path, trust_domain: TrustDomain, passphrase: bytes | None) -> Authority:
    """Make keys and certificates of a new CA in an empty directory."""
    if passphrase is None:
        passphrase = secrets.token_urlsafe(32).encode()
        durable.write_new(directory / PASSPHRASE_FILE, passphrase + b"\n", 0o600)
    now = datetime.now(UTC).replace(microsecond=0)
    root_key = ec.generate_private_key(ec.SECP256R1())
    root_name = _common_name(f"{trust_domain} mesh root")
    root = _ca_certificate(
        root_name, root_key.public_key(), root_name, root_key, trust_domain, now + _ROOT_LIFE, path_length=1
    )
    key = ec.generate_private_key(ec.SECP256R1())
    intermediate = _ca_certificate(
        _common_name(f"{trust_domain} mesh intermediate"),
        key.public_key(),
        root_name,
        root_key,
        trust_domain,
        now + _INTERMEDIATE_LIFE,
        path_length=0,
    )
    for name, private in ((ROOT_KEY_FILE, root_key), (INTERMEDIATE_KEY_FILE, key)):
        encrypted = private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(passphrase),
        )
        durable.write_new(directory / name, encrypted, 0o600)
    for name, certificate in ((ROOT_FILE, root), (INTERMEDIATE_FILE, intermediate)):
        durable.write_new(directory / name, certificate.public_bytes(serialization.Encoding.PEM))
    durable.sync_directory(directory)
    return Authority(trust_domain, root, intermediate, key)


def _ca_certificate(
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    trust_domain: TrustDomain,
    not_after: datetime,
    *,
    path_length: int,
) -> x509.Certificate:
    """A CA certificate whose URI SAN is the trust domain, which names no workload (SPIFFE X.509-SVID 3.1).

    `path_length` is how many CAs may follow: the intermediate signs leaves only, so that no chain grows.
    """
    issuer_identifier = x509.SubjectKeyIdentifier.from_public_key(issuer_key.public_key())
    now = datetime.now(UTC).replace(microsecond=0)
    return (
        _builder(subject, issuer, public_key, now, not_after)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]),
            critical=False,
        )
        .add_extension(_CA_USAGE, critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_identifier), critical=False
        )
        .sign(issuer_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey,
    now: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _common_name(name: str) -> x509.Name:
    # RFC 5280 appendix A.1: a common name has at most 64 characters; a trust domain may have 255.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def requested_key(csr_pem: bytes, identity: SpiffeId) -> ec.EllipticCurvePublicKey:
    """Return the key of a CSR after the checks that do not depend on who signs."""
    if len(csr_pem) > _MAX_CSR_BYTES:
        raise CaError(f"the CSR has {len(csr_pem)} bytes; a P-256 CSR has less than {_MAX_CSR_BYTES}")
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        valid = csr.is_signature_valid
        key = csr.public_key()
        names = _csr_uris(csr)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CaError(f"the CSR is not a readable PKCS #10 request in PEM: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CaError("the CSR's key is not an ECDSA P-256 key; `python -m control.client.csr` makes one")
    if not valid:
        raise CaError("the CSR's signature is wrong: whoever made it does not hold its key")
    other = [name for name in names if name != str(identity)]
    if other:
        raise CaError(f"the CSR asks for {other[0]!r}, but {identity} is to be issued")
    return key


def _csr_uris(csr: x509.CertificateSigningRequest) -> list[str]:
    try:
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _trust_domain(root: x509.Certificate) -> TrustDomain:
    names = root.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1 or not re.match(r"spiffe://[^/]+\Z", uris[0]):
        raise ValueError(f"the root names no trust domain in its URI SAN: {uris}")
    return parse_trust_domain(uris[0].removeprefix("spiffe://"))


def _refuse_existing(target: Path) -> None:
    try:
        occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise CaError(f"{target} cannot be read: {error.strerror}") from None
    if occupied:
        raise CaError(
            f"{target} exists and is not empty; a CA is never overwritten, because every certificate under "
            "it would be lost. Choose another directory, or move this one away"
        )


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise CaError(f"{path} does not exist; `meshctl ca init` makes a CA") from None
    except OSError as error:
        raise CaError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise CaError(f"{path} has more than {limit} bytes")
    return content


def read_passphrase(directory: Path, passphrase_file: str | Path | None = None) -> bytes:
    """What decrypts the keys in a CA's directory: from there, or from where the operator keeps it. Raises `CaError`."""
    return _read_passphrase(directory / PASSPHRASE_FILE if passphrase_file is None else Path(passphrase_file))


def _read_passphrase(path: Path) -> bytes:
    content = _read(path, _MAX_PASSPHRASE_BYTES)
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) and mode & 0o077:
        raise CaError(f"{path} has mode {stat.S_IMODE(mode):04o}: others can read the passphrase. chmod 600 {path}")
    passphrase = content.rstrip(b"\r\n")
    if len(passphrase) < _MIN_PASSPHRASE_BYTES:
        raise CaError(
            f"{path} holds {len(passphrase)} characters; the passphrase of a CA has at least {_MIN_PASSPHRASE_BYTES}, "
            "for example: openssl rand -base64 32"
        )
    return passphrase


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path, 64 * 1024))
    except ValueError as error:
        raise CaError(f"{path} is not a certificate in PEM: {error}") from None


def _private_key(path: Path, passphrase: bytes) -> ec.EllipticCurvePrivateKey:
    content = _read(path, 64 * 1024)
    try:
        key = serialization.load_pem_private_key(content, passphrase)
    except TypeError:
        raise CaError(f"{path} is not encrypted; a CA's key is never kept plain") from None
    except ValueError:
        raise CaError(f"{path} cannot be decrypted: wrong passphrase, or the file is damaged") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CaError(f"{path} is not an ECDSA key")
    return key
