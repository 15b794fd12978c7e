"""mTLS between proxies: this workload's certificate, the two TLS contexts made from it, and who the peer is.

TLS 1.3 and ALPN h2, nothing else; a certificate is required on both sides; no SNI, no session tickets, no
system CAs (docs/hbone.md 2.1). OpenSSL verifies the peer's chain, its times and its
purpose in the handshake; `peer_identity` then decides, from the leaf's own bytes, who the peer is.
"""

from __future__ import annotations

import _ssl
import base64
import binascii
import functools
import os
import re
import ssl
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from control.api.identity import SpiffeId
from control.client.libcrypto import prefer_cipher_suites
from control.client.membership import NEXT_KEY_FILE
from control.client.x509 import (
    CertificateId,
    Leaf,
    RevocationList,
    X509Error,
    certificate_id,
    check_svid,
    read_leaf,
    read_revocation_list,
    svid_identity,
)
from uproxy.errors import Flag, RefusedError

KEY_FILE = "key.pem"
CHAIN_FILE = "chain.pem"
BUNDLE_FILE = "bundle.pem"
REVOCATIONS_FILE = "crl.pem"
"""Need not be there. Without it nothing is revoked before it ends."""

# A leaf and its intermediates; each further one costs every peer 0.1 to 0.2 ms per handshake.
MAX_CHAIN = 4
# A bundle of a hundred roots stays under this; a file that is larger is not one of ours.
MAX_FILE_BYTES = 256 * 1024

_ALPN = "h2"
# OpenSSL's level 2: RSA of 2048 bits, P-256, and SHA-256 at least, in every certificate of a chain. Set here,
# because a distribution's openssl.cnf may say less.
_SECURITY_LEVEL = "DEFAULT:@SECLEVEL=2"
# The quickest of what ztunnel offers first, as BoringSSL and Go have it: AES with 128 bits takes an eighth less time.
_CIPHER_SUITES = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_REVOCATION_LIST = re.compile(rb"-----BEGIN X509 CRL-----(.+?)-----END X509 CRL-----", re.DOTALL)

# X509_V_ERR_* of OpenSSL's x509_vfy.h to the reason that metrics and logs carry.
_CHAIN_REASONS = {
    3: "crl-missing",
    7: "bad-signature",
    8: "crl-bad-signature",
    9: "certificate-not-yet-valid",
    10: "certificate-expired",
    11: "crl-not-yet-valid",
    12: "crl-expired",
    18: "unknown-ca",
    19: "unknown-ca",
    20: "unknown-ca",
    21: "unknown-ca",
    23: "certificate-revoked",
    25: "chain-too-long",
    26: "wrong-purpose",
    34: "critical-extension",
    66: "weak-key",
    67: "weak-key",
    68: "weak-signature",
    79: "unknown-ca",
    82: "key-usage",
}
# OpenSSL's reason names, where the handshake fails outside of the chain.
_HANDSHAKE_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no-certificate",
    "UNSUPPORTED_PROTOCOL": "tls-version",
    "WRONG_VERSION_NUMBER": "not-tls",
    "HTTP_REQUEST": "not-tls",
    "EXCESSIVE_MESSAGE_SIZE": "chain-too-long",
    "EE_KEY_TOO_SMALL": "weak-key",
    "CA_KEY_TOO_SMALL": "weak-key",
    "CA_MD_TOO_WEAK": "weak-signature",
}


_REVOKED = 23


@dataclass(frozen=True, slots=True)
class Revocations:
    """The revocation lists of an identity directory."""

    lists: tuple[RevocationList, ...] = ()
    pem: bytes = b""
    """The same, for OpenSSL."""

    @classmethod
    def read(cls, path: Path) -> Revocations:
        """Nothing is revoked where there is no file. Raises `CredentialsError`."""
        try:
            content = _read(path)
        except _MissingError:
            return cls()
        found = _REVOCATION_LIST.findall(content)
        if not found:
            raise CredentialsError(
                f"{path} holds no revocation list in PEM. Make one with `meshctl ca revoke`, or remove the file"
            )
        try:
            ders = [binascii.a2b_base64(base64) for base64 in found]
            lists = tuple(read_revocation_list(der) for der in ders)
        except ValueError as error:
            raise CredentialsError(f"{path} is damaged: {error}") from None
        except X509Error as error:
            raise CredentialsError(f"a revocation list of {path} cannot be used: {error}") from None
        return cls(lists, b"".join(map(crl_pem, ders)))

    def __bool__(self) -> bool:
        return bool(self.lists)

    def revoked(self, certificates: Iterable[CertificateId]) -> CertificateId | None:
        """The first of a chain's certificates that is."""
        for certificate in certificates:
            for one in self.lists:
                if one.issuer == certificate.issuer and certificate.serial in one.serials:
                    return certificate
        return None

    def refuse(self, peer: ssl.SSLObject) -> None:
        """Of a finished handshake: OpenSSL has looked at the lists of its beginning. Raises `RefusedError`."""
        if not self.lists:
            return
        try:
            found = self.revoked(certificates_of(peer))
        except X509Error as error:
            raise _identity_refusal(error.reason, error.detail) from None
        if found is not None:
            detail = f"the peer's certificate, or one above it, is revoked: serial {found.serial:x}"
            raise RefusedError("certificate-revoked", detail, flag=Flag.REVOKED)


class Context(ssl.SSLContext):
    """With what was revoked when it was made."""

    revocations = Revocations()


class CredentialsError(Exception):
    """This workload's own key, certificate or trust bundle cannot be used; the text says what to do."""


class _MissingError(CredentialsError):
    """A file is not there."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """One identity's key, chain and trust bundle, read at one moment and checked against each other."""

    identity: SpiffeId
    not_before: int
    """First valid second of the leaf, Unix time."""
    not_after: int
    """Last valid second of the leaf, Unix time."""
    serial: int
    roots: tuple[bytes, ...] = field(repr=False)
    """Certificates (DER) of the mesh's roots."""
    chain_and_key: bytes = field(repr=False)
    revocations: Revocations = field(repr=False)

    @classmethod
    def load(cls, identity_dir: str | Path, expected: SpiffeId | None = None) -> Credentials:
        """Read key.pem, chain.pem, bundle.pem and crl.pem of an identity directory, and prove that they fit together.

        A renewal that is being written, or was interrupted, may have left the chain's key in key.next.pem; then that
        one is taken. `expected` is the identity that this process was started for. Raises `CredentialsError`.
        """
        directory = Path(identity_dir)
        keys = _keys(directory)
        chain = _certificates(directory / CHAIN_FILE)
        revocations = Revocations.read(directory / REVOCATIONS_FILE)
        bundle = _certificates(directory / BUNDLE_FILE)
        if not 1 <= len(chain) <= MAX_CHAIN:
            raise CredentialsError(
                f"{directory / CHAIN_FILE} holds {len(chain)} certificates; it must hold the leaf, then its "
                f"intermediates, {MAX_CHAIN} at most. Issue it again with `meshctl ca issue`"
            )
        if not bundle:
            raise CredentialsError(f"{directory / BUNDLE_FILE} holds no certificate; it must hold the mesh's roots")
        try:
            leaf = read_leaf(chain[0])
            identity = svid_identity(leaf)
        except X509Error as error:
            raise CredentialsError(
                f"the first certificate of {directory / CHAIN_FILE} is not a usable X.509-SVID: {error}"
            ) from None
        if expected is not None and identity != expected:
            raise CredentialsError(
                f"{directory / CHAIN_FILE} identifies {identity}, but this proxy was started for {expected}. "
                "Point --identity-dir at the directory of that identity"
            )
        _check_time(leaf, directory / CHAIN_FILE)
        # Written anew from what was read, and the leaf first, so that OpenSSL cannot read another one.
        chain_pem = "".join(map(ssl.DER_cert_to_PEM_cert, chain)).encode()
        candidates = [
            cls(
                identity=identity,
                not_before=leaf.not_before,
                not_after=leaf.not_after,
                serial=leaf.serial,
                chain_and_key=chain_pem + key,
                roots=tuple(bundle),
                revocations=revocations,
            )
            for key in keys
        ]
        credentials = next((found for found in candidates[:-1] if found._key_fits()), candidates[-1])
        credentials._prove(directory)
        return credentials

    def _key_fits(self) -> bool:
        try:
            client_context(self)
        except ssl.SSLError:
            return False
        return True

    def _prove(self, directory: Path) -> None:
        """Do one handshake with ourselves in memory, so that an error shows at start and not at a peer."""
        try:
            client, server = client_context(self), server_context(self)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise CredentialsError(
                    f"{directory / KEY_FILE} is not the key of {directory / CHAIN_FILE}. Make a CSR from this key "
                    "with `python -m control.client.csr` and issue the certificate again"
                ) from None
            raise CredentialsError(
                f"OpenSSL cannot load the key, chain or bundle of {directory}: {error.reason or error}"
            ) from None
        try:
            _handshake_in_memory(client, server)
        except ssl.SSLError as error:
            under = directory / BUNDLE_FILE
            also = f" and {REVOCATIONS_FILE}" if self.revocations else ""
            raise CredentialsError(
                f"{directory / CHAIN_FILE} is not accepted under {under}{also}: {handshake_refusal(error).detail}"
            ) from None


def client_context(credentials: Credentials) -> Context:
    """Make the context for dialling. Make one per identity and reuse it: it holds the parsed key and chain.

    Use it without `server_hostname`, so that no SNI is sent.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, credentials)
    context.set_alpn_protocols([_ALPN])
    return context


def broker_context(credentials: Credentials) -> Context:
    """Make a context for dialling the broker, which speaks no HTTP/2: who it is, the caller finds out."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, credentials)


def server_context(credentials: Credentials) -> Context:
    """Make the context for accepting. Make one per identity and reuse it, as for dialling."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, credentials)
    context.set_alpn_protocols([_ALPN])
    # Two tickets cost a third of the server's handshake, and a tunnel lives too long to be resumed.
    context.num_tickets = 0
    return context


def peer_identity(tls: ssl.SSLObject | ssl.SSLSocket, trust_domain: str) -> SpiffeId:
    """Return who the peer of a finished handshake is. Raises `RefusedError` (flag IDENTITY) with the reason.

    The chain was verified by OpenSSL; the leaf is read here. A client must still compare the result with the
    identity that it dialled.
    """
    # Python's ssl lets a handshake finish when the ALPN lists share nothing; RFC 7301 section 3.2 would not.
    if tls.version() != "TLSv1.3" or tls.selected_alpn_protocol() != _ALPN:
        raise _identity_refusal(
            "tls-version" if tls.version() != "TLSv1.3" else "alpn",
            f"it negotiated {tls.version()} and ALPN {tls.selected_alpn_protocol()}, not TLSv1.3 and h2",
        )
    try:
        return check_svid(leaf_of(tls), trust_domain)
    except X509Error as error:
        raise _identity_refusal(error.reason, error.detail) from None


def leaf_of(tls: ssl.SSLObject | ssl.SSLSocket) -> Leaf:
    """The peer's certificate. Raises RefusedError when there is none, X509Error for what cannot be read."""
    der = tls.getpeercert(binary_form=True)
    if der is None:
        raise _identity_refusal("no-certificate", "the peer presented no certificate")
    return read_leaf(der)


def certificates_of(tls: ssl.SSLObject | ssl.SSLSocket) -> tuple[CertificateId, ...]:
    """The peer's chain as OpenSSL verified it, the leaf first. Raises `X509Error` for what cannot be read."""
    if sys.version_info >= (3, 13):
        chain = tls.get_verified_chain()
    else:  # it is there already, and has no public name yet
        chain = [one.public_bytes(_ssl.ENCODING_DER) for one in tls._sslobj.get_verified_chain()]  # type: ignore[union-attr]
    return tuple(certificate_id(der) for der in chain)


def handshake_refusal(error: ssl.SSLError) -> RefusedError:
    """Say in words why a handshake (or, with TLS 1.3, the first read after it) failed. Flag TLS_FAILURE."""
    name = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = _CHAIN_REASONS.get(error.verify_code, "certificate-invalid")
        detail = f"the peer's certificate is not accepted: {error.verify_message}"
        if error.verify_code == _REVOKED:
            return RefusedError(reason, detail, flag=Flag.REVOKED)
    elif "_ALERT_" in name:
        reason = "refused-by-peer"
        detail = f"the peer ended the handshake: {name.partition('_ALERT_')[2].replace('_', ' ').lower()}"
    elif isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        reason, detail = "closed", "the peer closed the connection during the handshake"
    else:
        reason = _HANDSHAKE_REASONS.get(name, "tls")
        detail = f"the handshake failed: {name.replace('_', ' ').lower() or error}"
    return RefusedError(reason, detail, flag=Flag.TLS_FAILURE)


def _identity_refusal(reason: str, detail: str) -> RefusedError:
    return RefusedError(reason, f"the peer is not accepted: {detail}", flag=Flag.IDENTITY)


@functools.cache
def _prefer_quick_ciphers() -> None:
    """Once a process: `ssl` has no way to say it of one context."""
    prefer_cipher_suites(_CIPHER_SUITES)


def _context(protocol: int, credentials: Credentials) -> Context:
    _prefer_quick_ciphers()
    context = Context(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.set_ciphers(_SECURITY_LEVEL)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=b"".join(credentials.roots))
    if credentials.revocations:
        _demand_revocation_lists(context, credentials)
    # `ssl` reads a key from a path alone. A file in memory keeps to the bytes that were checked, also when
    # a rotation replaces key and chain on disk at this moment.
    with _memory_file(credentials.chain_and_key) as path:
        context.load_cert_chain(path, password=_no_passphrase)
    return context


def _demand_revocation_lists(context: Context, credentials: Credentials) -> None:
    """Every leaf's issuer must have a list that is signed and current, or nobody of it is accepted, as with Envoy. With
    a list of a root all of the chain is checked; else the leaf, so that a root's key may stay where it is.
    """
    context.revocations = credentials.revocations
    issuers = {one.issuer for one in credentials.revocations.lists}
    above = not issuers.isdisjoint(certificate_id(root).issuer for root in credentials.roots)
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN if above else ssl.VERIFY_CRL_CHECK_LEAF
    with _memory_file(credentials.revocations.pem) as path:
        context.load_verify_locations(cafile=path)


def crl_pem(der: bytes) -> bytes:
    body = base64.encodebytes(der)
    return b"-----BEGIN X509 CRL-----\n" + body + b"-----END X509 CRL-----\n"


@contextmanager
def _memory_file(content: bytes) -> Iterator[str]:
    descriptor = os.memfd_create("uproxy-identity", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _no_passphrase() -> str:
    # Without this callback OpenSSL would ask on the terminal, and wait.
    raise CredentialsError(f"{KEY_FILE} is encrypted; a workload's key is kept plain, with mode 0600")


def _keys(directory: Path) -> list[bytes]:
    """What may be the key of the chain, at least one: key.next.pem, if there is one, then key.pem.

    Read in this order, and before the chain, so that a renewal written meanwhile leaves a pair that fits.
    """
    keys = []
    with suppress(_MissingError):
        keys.append(_read(directory / NEXT_KEY_FILE, secret=True))
    try:
        keys.append(_read(directory / KEY_FILE, secret=True))
    except _MissingError:
        if not keys:
            raise
    return keys


def _read(path: Path, secret: bool = False) -> bytes:
    try:
        # Nonblocking, so that a FIFO in the place of a file cannot hold up the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        made_by = "`python -m control.client.csr`" if secret else "`meshctl ca issue`"
        raise _MissingError(f"{path} does not exist; {made_by} makes it") from None
    except OSError as error:
        raise CredentialsError(f"{path} cannot be opened: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CredentialsError(f"{path} is not a regular file")
        if secret and status.st_mode & 0o077:
            raise CredentialsError(
                f"{path} has mode {stat.S_IMODE(status.st_mode):04o}: others can read this workload's key. "
                f"Replace the key, or if nobody has read it: chmod 600 {path}"
            )
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise CredentialsError(f"{path} has more than {MAX_FILE_BYTES} bytes")
    return content


def _certificates(path: Path) -> list[bytes]:
    """DER of each certificate in a PEM file, in its order."""
    try:
        return [ssl.PEM_cert_to_DER_cert(pem.decode("ascii")) for pem in _CERTIFICATE.findall(_read(path))]
    except ValueError as error:
        raise CredentialsError(f"{path} is damaged: {error}") from None


def _check_time(leaf: Leaf, path: Path) -> None:
    now = time.time()
    if now > leaf.not_after:
        raise CredentialsError(
            f"the certificate in {path} expired at {_utc(leaf.not_after)}. Issue a new one with `meshctl ca issue`"
        )
    if now < leaf.not_before:
        raise CredentialsError(
            f"the certificate in {path} is not valid before {_utc(leaf.not_before)}; it is {_utc(int(now))} "
            "here. Check the clocks of this host and of the CA's"
        )


def _utc(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _handshake_in_memory(client_side: ssl.SSLContext, server_side: ssl.SSLContext) -> None:
    """Let the two contexts shake hands. Raises what the first side that fails raises."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    waiting = [client_side.wrap_bio(to_client, to_server), server]
    # TLS 1.3 needs two turns of each side.
    for _ in range(4):
        for side in list(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
    if waiting:
        raise ssl.SSLError("the handshake did not finish")
