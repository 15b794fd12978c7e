"""What decides who a peer is (`control.client.x509`), beside the library that the CA uses; and revocation lists."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from control.api.identity import SpiffeId
from control.client.x509 import X509Error, certificate_id, read_leaf, read_revocation_list, svid_identity
from tests.support.certificates import WEB, forge
from tests.support.certificates import der_value as tlv
from tests.support.second_x509 import as_cryptography_reads

MAX_BYTES = 2048
WORDS = (
    b"\x06\x03\x55\x1d\x0f", b"\x06\x03\x55\x1d\x11", b"\x06\x03\x55\x1d\x13", b"\x06\x03\x55\x1d\x25", b"\x01\x01\xff",
    b"\x01\x01\x00", b"\x30\x00", b"\x30\x80", b"\x30\x81\x7f", b"\x30\x82\x00\xff", b"\x86", b"\x03\x02\x07\x80",
    b"spiffe://", b"/ns/", b"/sa/", b"\x17\x0d", b"\x18\x0f", b"Z", b"\x02\x01\x00", b"\xa0\x03\x02\x01\x02",
)  # fmt: skip


def seeds() -> Iterable[bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    yield forge(None, key=key).der
    yield forge(None, key=key, uris=(str(WEB), "https://a.example")).der
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a CA")])
    now = datetime(2030, 1, 1)
    lists = x509.CertificateRevocationListBuilder().issuer_name(name).last_update(now)
    lists = lists.next_update(now + timedelta(days=1))
    entry = x509.RevokedCertificateBuilder().serial_number(2**100).revocation_date(now)
    reason = x509.CRLReason(x509.ReasonFlags.key_compromise)
    for builder in (
        lists,
        lists.add_extension(x509.CRLNumber(7), critical=False).add_revoked_certificate(
            entry.add_extension(reason, critical=False).build()
        ),
    ):
        yield builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def check(data: bytes) -> None:
    _check_leaf(data)
    _check_revocation_list(data)


def _check_leaf(der: bytes) -> None:
    try:
        leaf = read_leaf(der)
    except X509Error:
        return
    assert certificate_id(der).serial == leaf.serial
    with contextlib.suppress(X509Error):
        assert svid_identity(leaf) == SpiffeId.parse(*leaf.uri_sans)
    try:
        expected = as_cryptography_reads(der)
        issuer = x509.load_der_x509_certificate(der).issuer.public_bytes()
    except x509.DuplicateExtension as error:
        raise AssertionError("an extension stands twice") from error
    except Exception:  # what only the other refuses (keys, names) is no disagreement
        return
    assert leaf == expected
    assert tlv(0x30, certificate_id(der).issuer) == issuer


def _check_revocation_list(der: bytes) -> None:
    try:
        found = read_revocation_list(der)
    except X509Error:
        return
    try:
        expected = x509.load_der_x509_crl(der)
        serials, issuer = {entry.serial_number for entry in expected}, expected.issuer.public_bytes()
    except Exception:
        return
    assert found.serials == serials
    assert tlv(0x30, found.issuer) == issuer
