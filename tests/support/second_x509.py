"""Leaf certificates as `cryptography` reads them, to compare with our own reader."""

from __future__ import annotations

from cryptography import x509

from control.client.x509 import Leaf

KEY_USAGE_NAMES = {
    "digitalSignature": "digital_signature",
    "nonRepudiation": "content_commitment",
    "keyEncipherment": "key_encipherment",
    "dataEncipherment": "data_encipherment",
    "keyAgreement": "key_agreement",
    "keyCertSign": "key_cert_sign",
    "cRLSign": "crl_sign",
    "encipherOnly": "_encipher_only",
    "decipherOnly": "_decipher_only",
}
READ_HERE = (x509.SubjectAlternativeName, x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage)


def as_cryptography_reads(der: bytes) -> Leaf:
    """The same facts from the library that the CA uses; raises ValueError and others for what it refuses."""
    certificate = x509.load_der_x509_certificate(der)
    extensions = certificate.extensions
    found = {type(extension.value): extension for extension in extensions}

    def value(kind):
        return found[kind].value if kind in found else None

    names, constraints = value(x509.SubjectAlternativeName), value(x509.BasicConstraints)
    key_usage, purposes = value(x509.KeyUsage), value(x509.ExtendedKeyUsage)
    return Leaf(
        uri_sans=tuple(names.get_values_for_type(x509.UniformResourceIdentifier)) if names else (),
        is_ca=constraints.ca if constraints else False,
        key_usage=frozenset(n for n, a in KEY_USAGE_NAMES.items() if getattr(key_usage, a)) if key_usage else None,
        key_usage_critical=key_usage is not None and found[x509.KeyUsage].critical,
        extended_key_usage=tuple(oid.dotted_string for oid in purposes) if purposes else None,
        unknown_critical=tuple(
            e.oid.dotted_string for e in extensions if e.critical and not isinstance(e.value, READ_HERE)
        ),
        serial=certificate.serial_number,
        not_before=int(certificate.not_valid_before_utc.timestamp()),
        not_after=int(certificate.not_valid_after_utc.timestamp()),
    )
