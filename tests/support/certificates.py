"""Certificates for tests: good SVIDs from the real CA, and forged ones that it would never sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from control.api.identity import SpiffeId
from control.client.csr import make_request
from control.server.ca import Authority, write_identity

WEB = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/web")
DB = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/db")
BOTH_PURPOSES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def identity_dir(authority: Authority, directory: Path, identity: SpiffeId) -> Path:
    """An identity directory made the way an operator makes it: key and CSR here, certificate from the CA."""
    csr = make_request(directory, identity).read_bytes()
    write_identity(directory, authority.issue(csr, identity), authority.bundle_pem)
    return directory


def usage(**allowed: bool) -> x509.KeyUsage:
    """A key usage with only the named bits."""
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})


@dataclass(frozen=True)
class Forged:
    """A certificate with its key, and who signed it (None: itself)."""

    certificate: x509.Certificate
    key: Key
    issuer: Forged | None

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def chain_pem(self) -> bytes:
        """This certificate and all above it, without the root."""
        chain, at = b"", self
        while at.issuer is not None:
            chain, at = chain + pem(at.certificate), at.issuer
        return chain or pem(self.certificate)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def write(self, directory: Path, bundle_pem: bytes) -> Path:
        directory.mkdir()
        (directory / "key.pem").write_bytes(self.key_pem)
        (directory / "key.pem").chmod(0o600)
        (directory / "chain.pem").write_bytes(self.chain_pem)
        (directory / "bundle.pem").write_bytes(bundle_pem)
        return directory


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def forge(
    issuer: Forged | None,
    uris: Sequence[str] = (str(WEB),),
    *,
    not_before: timedelta = timedelta(minutes=-1),
    not_after: timedelta = timedelta(hours=1),
    purposes: Sequence[x509.ObjectIdentifier] | None = BOTH_PURPOSES,
    key_usage: x509.KeyUsage | None = None,
    key_usage_critical: bool = True,
    ca: bool = False,
    path_length: int | None = None,
    key: Key | None = None,
    extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
    common_name: str = "forged",
    names_issuer_key: bool = True,
) -> Forged:
    """Sign whatever is asked for; the defaults are a correct SVID of `WEB`. Without an issuer it signs itself."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    signer = issuer.key if issuer else key
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.certificate.subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + not_before)
        .not_valid_after(now + not_after)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length if ca else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(key_usage or usage(digital_signature=True), critical=key_usage_critical)
    )
    if names_issuer_key:
        builder = builder.add_extension(_authority_key_identifier(issuer, signer), critical=False)
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if purposes is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    for extension, critical in extra:
        builder = builder.add_extension(extension, critical=critical)
    return Forged(builder.sign(signer, hashes.SHA256()), key, issuer)


def signed_with_sha1(forged: Forged) -> Forged:
    """The same certificate under ecdsa-with-SHA1, which `cryptography` no longer signs: put together by hand."""
    sha256, sha1 = bytes.fromhex("300a06082a8648ce3d040302"), bytes.fromhex("300906072a8648ce3d0401")
    tbs = forged.certificate.tbs_certificate_bytes
    header = 2 + (tbs[1] & 0x7F)
    assert tbs[1] & 0x80
    tbs = der_value(0x30, tbs[header:].replace(sha256, sha1, 1))
    assert forged.issuer is not None
    assert isinstance(forged.issuer.key, ec.EllipticCurvePrivateKey)
    signature = forged.issuer.key.sign(tbs, ec.ECDSA(hashes.SHA1()))
    der = der_value(0x30, tbs, sha1, der_value(0x03, b"\0", signature))
    return Forged(x509.load_der_x509_certificate(der), forged.key, forged.issuer)


def der_value(tag: int, *contents: bytes) -> bytes:
    """One DER value: tag, minimal length, content."""
    content = b"".join(contents)
    if len(content) < 0x80:
        return bytes((tag, len(content))) + content
    size = len(content).to_bytes((len(content).bit_length() + 7) // 8)
    return bytes((tag, 0x80 | len(size))) + size + content


def _authority_key_identifier(issuer: Forged | None, signer: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    if issuer is None:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    # What the issuer's certificate says, not what its key is: so that a forger's chain fails at the signature.
    identifier = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def forge_ca(issuer: Forged | None, name: str, *, path_length: int | None = None) -> Forged:
    """A CA certificate; without an issuer, a root."""
    return forge(
        issuer,
        (),
        ca=True,
        path_length=path_length,
        purposes=None,
        key_usage=usage(key_cert_sign=True, crl_sign=True),
        common_name=name,
        not_after=timedelta(days=1),
    )
