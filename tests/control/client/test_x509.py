"""Our DER reader against `cryptography`, against damaged bytes, and the rules of an X.509-SVID."""

import contextlib
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from control.client.x509 import (
    CLIENT_AUTH,
    MAX_LEAF_BYTES,
    SERVER_AUTH,
    RevocationList,
    X509Error,
    certificate_id,
    check_svid,
    read_leaf,
    read_revocation_list,
)
from control.server.ca import Authority
from tests.support.certificates import BOTH_PURPOSES, WEB, forge, usage
from tests.support.certificates import der_value as tlv
from tests.support.examples import examples
from tests.support.second_x509 import KEY_USAGE_NAMES, as_cryptography_reads

KEY = ec.generate_private_key(ec.SECP256R1())
GOOD = forge(None, key=KEY)

oids = st.builds(
    lambda first, rest: x509.ObjectIdentifier(".".join(map(str, (*first, *rest)))),
    # Under arc 2 the second number is not bounded by 39 (X.660), which is where naive decoders go wrong.
    st.tuples(st.integers(0, 1), st.integers(0, 39)) | st.tuples(st.just(2), st.integers(0, 2**20)),
    st.lists(st.integers(0, 2**31), min_size=1, max_size=6),
)
uris = st.one_of(
    st.just(str(WEB)),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40),
)
dns_names = st.from_regex(r"[a-z0-9-]{1,20}(\.[a-z]{1,5})?", fullmatch=True)
directory_names = st.text(min_size=1, max_size=20).map(
    lambda text: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
)
general_names = st.one_of(
    uris.map(x509.UniformResourceIdentifier),
    dns_names.map(x509.DNSName),
    dns_names.map(lambda name: x509.RFC822Name(f"a@{name}")),
    st.ip_addresses().map(lambda address: x509.IPAddress(ip_address(str(address)))),
    oids.map(x509.RegisteredID),
    directory_names.map(x509.DirectoryName),
    st.builds(x509.OtherName, oids, st.just(b"\x0c\x02hi")),
)
bits = st.fixed_dictionaries(
    {name: st.booleans() for name in KEY_USAGE_NAMES.values() if not name.startswith("_")}
).filter(lambda chosen: any(chosen.values()))
extension_values = {
    "constraints": st.one_of(
        st.just(x509.BasicConstraints(False, None)),
        st.builds(x509.BasicConstraints, st.just(True), st.none() | st.integers(0, 300)),
    ),
    "usage": st.one_of(
        bits.map(lambda chosen: usage(**chosen)),
        st.sampled_from(("encipher_only", "decipher_only")).map(lambda b: usage(key_agreement=True, **{b: True})),
    ),
    "purposes": st.lists(st.sampled_from(BOTH_PURPOSES) | oids, min_size=1, max_size=5).map(x509.ExtendedKeyUsage),
    "names": st.lists(general_names, min_size=1, max_size=6).map(x509.SubjectAlternativeName),
    "issuer names": st.lists(general_names, min_size=1, max_size=3).map(x509.IssuerAlternativeName),
    "limits": dns_names.map(lambda name: x509.NameConstraints([x509.DNSName(name)], None)),
    "unknown": st.builds(
        lambda arc, value: x509.UnrecognizedExtension(x509.ObjectIdentifier(f"1.3.6.1.4.1.99999.{arc}"), value),
        st.integers(0, 2**40),
        st.binary(max_size=300),
    ),
}
moments = st.datetimes(datetime(1950, 1, 2), datetime(9999, 12, 30)).map(lambda moment: moment.replace(microsecond=0))


@st.composite
def certificates(draw) -> bytes:
    start = draw(moments)
    builder = (
        x509.CertificateBuilder()
        .subject_name(draw(directory_names))
        .issuer_name(draw(directory_names))
        .public_key(KEY.public_key())
        .serial_number(draw(st.integers(1, 2**159 - 1)))
        .not_valid_before(start)
        .not_valid_after(max(start, draw(moments)))
    )
    for kind in draw(st.lists(st.sampled_from(sorted(extension_values)), unique=True)):
        builder = builder.add_extension(draw(extension_values[kind]), critical=draw(st.booleans()))
    # Deterministic, so that hypothesis can replay an example byte for byte.
    return builder.sign(KEY, hashes.SHA256(), ecdsa_deterministic=True).public_bytes(serialization.Encoding.DER)


@st.composite
def damaged(draw) -> bytes:
    """A certificate after some bytes were set, inserted, deleted or cut off: mostly in lengths and tags."""
    der = bytearray(draw(certificates()))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(der)))
        match draw(st.sampled_from(("set", "insert", "delete", "cut", "flip", "repeat"))):
            case "set":
                der[at : at + 1] = bytes((draw(st.integers(0, 255)),))
            case "insert":
                der[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del der[at : at + draw(st.integers(1, 8))]
            case "cut":
                del der[at:]
            case "flip":
                if at < len(der):
                    der[at] ^= 1 << draw(st.integers(0, 7))
            case "repeat":
                der[at:at] = der[at : at + draw(st.integers(1, 40))]
    return bytes(der)


@given(certificates())
def test_reads_what_cryptography_wrote(der):
    assert read_leaf(der) == as_cryptography_reads(der)


@given(damaged())
@settings(max_examples=examples(400))
def test_damaged_der_is_refused_or_read_as_cryptography_reads_it(der):
    try:
        leaf = read_leaf(der)
    except X509Error:
        return
    try:
        expected = as_cryptography_reads(der)
    except Exception:  # what only the other side refuses (keys, names) is no disagreement
        return
    assert leaf == expected


@given(st.binary(max_size=2048) | st.binary(max_size=64).map(lambda tail: GOOD.der[: len(GOOD.der) // 2] + tail))
def test_any_bytes_are_a_leaf_or_an_x509_error(der):
    with contextlib.suppress(X509Error):
        read_leaf(der)


@given(certificates())
def test_a_certificate_is_called_by_its_issuer_and_serial(der):
    certificate = x509.load_der_x509_certificate(der)
    found = certificate_id(der)
    assert found.serial == certificate.serial_number
    assert tlv(0x30, found.issuer) == certificate.issuer.public_bytes()


def revocation_list(issuer, serials, *extensions, entry_extensions=(), end=True) -> bytes:
    now = datetime(2030, 1, 1)
    builder = x509.CertificateRevocationListBuilder().issuer_name(issuer).last_update(now)
    builder = builder.next_update(now + timedelta(days=1))
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now)
        for extension, critical in entry_extensions:
            entry = entry.add_extension(extension, critical=critical)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(KEY, hashes.SHA256(), ecdsa_deterministic=True).public_bytes(serialization.Encoding.DER)


@given(
    directory_names,
    st.sets(st.integers(1, 2**159 - 1), max_size=20),
    st.sampled_from([(), ((x509.CRLNumber(7), False),)]),
    st.sampled_from([(), ((x509.CRLReason(x509.ReasonFlags.key_compromise), False),)]),
)
def test_reads_the_list_that_cryptography_wrote(issuer, serials, extensions, entry_extensions):
    der = revocation_list(issuer, serials, *extensions, entry_extensions=entry_extensions)
    found = read_revocation_list(der)
    assert found.serials == serials
    assert tlv(0x30, found.issuer) == issuer.public_bytes()


NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a CA")])


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 300))
@settings(max_examples=examples(400))
def test_a_damaged_list_is_refused_or_read_as_cryptography_reads_it(noise, at, cut):
    der = revocation_list(NAME, [5, 2**100], (x509.CRLNumber(7), False))
    damaged_list = der[:at] + noise + der[at + cut :]
    try:
        found = read_revocation_list(damaged_list)
    except X509Error:
        return
    try:
        expected = x509.load_der_x509_crl(damaged_list)
        serials = frozenset(entry.serial_number for entry in expected)
    except Exception:  # what only the other side refuses is no disagreement
        return
    assert found == RevocationList(found.issuer, serials)


@pytest.mark.parametrize(
    "der",
    [
        revocation_list(NAME, [5], (x509.DeltaCRLIndicator(1), True)),
        revocation_list(
            NAME,
            [5],
            (
                x509.IssuingDistributionPoint(
                    full_name=None,
                    relative_name=None,
                    only_contains_user_certs=True,
                    only_contains_ca_certs=False,
                    only_some_reasons=None,
                    indirect_crl=False,
                    only_contains_attribute_certs=False,
                ),
                True,
            ),
        ),
        revocation_list(NAME, [5], entry_extensions=((x509.CertificateIssuer([x509.DirectoryName(NAME)]), True),)),
    ],
    ids=["changes alone", "a part", "of other issuers"],
)
def test_a_list_that_is_not_a_whole_one_of_its_issuer_is_refused(der):
    with pytest.raises(X509Error) as raised:
        read_revocation_list(der)
    assert raised.value.reason == "critical-extension"


def test_a_list_of_many_is_read_soon():
    der = revocation_list(NAME, range(1, 4001))
    started = time.process_time()
    assert len(read_revocation_list(der).serials) == 4000
    assert time.process_time() - started < 0.5


def test_every_truncation_is_refused():
    for length in range(len(GOOD.der)):
        with pytest.raises(X509Error):
            read_leaf(GOOD.der[:length])


def test_one_byte_after_the_certificate_is_refused():
    with pytest.raises(X509Error, match="1 bytes follow the certificate"):
        read_leaf(GOOD.der + b"\x00")


OID_SAN, OID_KEY_USAGE, OID_CONSTRAINTS, OID_EKU = (
    bytes.fromhex(oid) for oid in ("0603551d11", "0603551d0f", "0603551d13", "0603551d25")
)
SEQUENCE, OCTETS = 0x30, 0x04


def extension(oid: bytes, value: bytes, critical: bytes = b"") -> bytes:
    return tlv(SEQUENCE, oid, critical, tlv(OCTETS, value))


def certificate(
    *extensions: bytes,
    version: bytes = b"\xa0\x03\x02\x01\x02",
    serial: bytes = b"\x02\x01\x07",
    algorithm: bytes = b"\x30\x03\x06\x01\x2a",
    validity: bytes = tlv(SEQUENCE, tlv(0x17, b"260101000000Z"), tlv(0x17, b"270101000000Z")),
    uids: bytes = b"",
    wrapped: bytes | None = None,
) -> bytes:
    """A certificate by hand, for what no library writes. The signature is empty: nothing here verifies it."""
    empty = tlv(SEQUENCE)
    if wrapped is None:
        wrapped = tlv(0xA3, tlv(SEQUENCE, *extensions)) if extensions else b""
    tbs = tlv(SEQUENCE, version, serial, b"\x30\x03\x06\x01\x2a", empty, validity, empty, empty, uids, wrapped)
    return tlv(SEQUENCE, tbs, algorithm, b"\x03\x01\x00")


def uri(name: bytes) -> bytes:
    return tlv(0x86, name)


def test_the_handmade_certificate_is_read():
    leaf = read_leaf(certificate(extension(OID_SAN, tlv(SEQUENCE, uri(b"spiffe://a/b"))), uids=b"\x81\x01\x00"))
    assert leaf.uri_sans == ("spiffe://a/b",)
    assert leaf.serial == 7
    assert leaf.not_before == datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    assert leaf.not_after == datetime(2027, 1, 1, tzinfo=UTC).timestamp()
    assert read_leaf(certificate()).key_usage is None


SAN = extension(OID_SAN, tlv(SEQUENCE, uri(b"spiffe://a/b")))


@pytest.mark.parametrize(
    ("der", "told"),
    [
        (certificate(SAN, SAN), "appears twice"),
        (certificate(extension(OID_SAN, tlv(SEQUENCE, uri(b"spiffe://a\0b")))), "byte 0x00"),
        (certificate(extension(OID_SAN, tlv(SEQUENCE, uri(b"spiffe://a b")))), "byte 0x20"),
        (certificate(extension(OID_SAN, tlv(SEQUENCE, uri(b"spiffe://\xc3\xa9")))), "byte 0xc3"),
        (certificate(extension(OID_SAN, tlv(SEQUENCE))), "subjectAltName is empty"),
        (certificate(extension(OID_SAN, tlv(SEQUENCE, tlv(0x89, b"x")))), "unknown kind 0x89"),
        (certificate(extension(OID_SAN, tlv(SEQUENCE, tlv(0xA6, b"x")))), "unknown kind 0xa6"),
        (certificate(extension(OID_SAN, tlv(SEQUENCE, uri(b"a:b")) + b"\x05\x00")), "2 bytes follow"),
        (certificate(extension(OID_SAN, tlv(SEQUENCE, uri(b"a:b")), b"\x01\x01\x00")), "critical=FALSE"),
        (certificate(extension(OID_SAN, tlv(SEQUENCE, uri(b"a:b")), b"\x01\x01\x01")), "neither 00 nor FF"),
        (certificate(extension(OID_CONSTRAINTS, tlv(SEQUENCE, b"\x01\x01\x00"))), "cA=FALSE"),
        (certificate(extension(OID_CONSTRAINTS, tlv(SEQUENCE, b"\x01\x01\x01"))), "neither 00 nor FF"),
        (certificate(extension(OID_CONSTRAINTS, tlv(SEQUENCE, b"\x01\x01\xff\x02\x01\xff"))), "negative"),
        (certificate(extension(OID_CONSTRAINTS, tlv(SEQUENCE, b"\x01\x01\xff\x02\x02\x00\x01"))), "not minimal"),
        (certificate(extension(OID_KEY_USAGE, b"\x03\x01\x00")), "one to nine bits"),
        (certificate(extension(OID_KEY_USAGE, b"\x03\x02\x00\x80")), "one to nine bits"),
        (certificate(extension(OID_KEY_USAGE, b"\x03\x02\x06\xa0")), "one to nine bits"),
        (certificate(extension(OID_KEY_USAGE, b"\x03\x02\x08\x80")), "one to nine bits"),
        (certificate(extension(OID_KEY_USAGE, b"\x03\x03\x06\x80\x40")), "one to nine bits"),
        (certificate(extension(OID_KEY_USAGE, b"\x03\x04\x00\x80\x80\x01")), "one to nine bits"),
        (certificate(extension(OID_EKU, tlv(SEQUENCE))), "extendedKeyUsage is empty"),
        (certificate(extension(OID_EKU, tlv(SEQUENCE, b"\x06\x02\x80\x01"))), "not minimal"),
        (certificate(extension(OID_EKU, tlv(SEQUENCE, b"\x06\x01\x81"))), "cut off"),
        (certificate(extension(OID_EKU, tlv(SEQUENCE, b"\x06\x00"))), "empty"),
        (certificate(extension(OID_EKU, tlv(SEQUENCE, tlv(0x06, b"\x01" * 65)))), "too long"),
        (certificate(wrapped=tlv(0xA3, tlv(SEQUENCE))), "list of extensions is empty"),
        (certificate(wrapped=tlv(0xA3, tlv(SEQUENCE, SAN)) * 2), "bytes follow extensions"),
        (certificate(version=b""), "version has tag 0x02"),
        (certificate(version=b"\xa0\x03\x02\x01\x01"), "not of version 3"),
        (certificate(serial=b"\x02\x01\x00"), "not positive"),
        (certificate(serial=b"\x02\x01\xff"), "not positive"),
        (certificate(serial=b"\x02\x02\x00\x01"), "not minimal"),
        (certificate(serial=b"\x02\x00"), "not minimal"),
        (certificate(serial=tlv(0x02, b"\x01" * 21)), "21 octets"),
        (certificate(algorithm=b"\x30\x03\x06\x01\x2b"), "differs from the signed one"),
        (certificate(validity=tlv(SEQUENCE, tlv(0x17, b"260101000000Z"))), "notAfter is missing"),
        (certificate(validity=tlv(SEQUENCE, *[tlv(0x17, b"2601010000Z")] * 2)), "not a time"),
        (certificate(validity=tlv(SEQUENCE, *[tlv(0x17, b"260101000000+0100")] * 2)), "not a time"),
        (certificate(validity=tlv(SEQUENCE, *[tlv(0x17, b"260230000000Z")] * 2)), "not a date"),
        (certificate(validity=tlv(SEQUENCE, *[tlv(0x18, b"00000101000000Z")] * 2)), "not a date"),
        (certificate(validity=tlv(SEQUENCE, *[tlv(0x18, b"\xb2\xb6".ljust(14, b"0") + b"Z")] * 2)), "not a time"),
        (b"\x30\x80\x00\x00", "indefinite"),
        (b"\x30\x84\x00\x00\x00\x01\x00", "too large"),
        (b"\x30\x81\x01\x00", "not minimal"),
        (b"\x30\x82\x00\x80" + bytes(128), "not minimal"),
        (b"\x31\x00", "tag 0x31 where 0x30"),
        (b"", "cut off"),
        (bytes(MAX_LEAF_BYTES + 1), "at most"),
    ],
)
def test_malformed_certificates_are_refused_by_name(der, told):
    with pytest.raises(X509Error, match=told) as raised:
        read_leaf(der)
    assert raised.value.reason == "malformed"


@pytest.mark.parametrize(
    "der",
    [
        certificate(extension(OID_SAN, tlv(SEQUENCE, *[uri(b"a:")] * 4000))),
        certificate(*[extension(tlv(0x06, bytes((0x2A, 0x81 + n // 128, n % 128))), b"") for n in range(1300)]),
        certificate(extension(OID_EKU, tlv(SEQUENCE, *[tlv(0x06, b"\xff" * 63 + b"\x01")] * 240))),
        b"\x30\x82\x3f\xfc" * 4096,
    ],
    ids=["names", "extensions", "purposes", "nesting"],
)
def test_the_largest_input_takes_bounded_time(der):
    assert len(der) <= MAX_LEAF_BYTES
    started = time.process_time()
    with contextlib.suppress(X509Error):
        read_leaf(der)
    assert time.process_time() - started < 0.25


GOOD_LEAF = read_leaf(GOOD.der)


def test_a_good_svid_is_its_one_uri():
    assert check_svid(GOOD_LEAF, "cluster.local") == WEB


def test_absent_extended_key_usage_allows_both_purposes():
    assert check_svid(replace(GOOD_LEAF, extended_key_usage=None), "cluster.local") == WEB


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_ca": True}, "ca-certificate"),
        ({"key_usage": None}, "key-usage"),
        ({"key_usage_critical": False}, "key-usage"),
        ({"key_usage": frozenset({"keyAgreement"})}, "key-usage"),
        ({"key_usage": frozenset({"digitalSignature", "keyCertSign"})}, "key-usage"),
        ({"key_usage": frozenset({"digitalSignature", "cRLSign"})}, "key-usage"),
        ({"extended_key_usage": (SERVER_AUTH,)}, "extended-key-usage"),
        ({"extended_key_usage": (CLIENT_AUTH,)}, "extended-key-usage"),
        ({"extended_key_usage": ("2.5.29.37.0",)}, "extended-key-usage"),
        ({"unknown_critical": ("1.2.3",)}, "critical-extension"),
        ({"uri_sans": ()}, "uri-sans"),
        ({"uri_sans": (str(WEB), str(WEB))}, "uri-sans"),
        ({"uri_sans": ("https://cluster.local/ns/shop/sa/web",)}, "spiffe-id"),
        ({"uri_sans": ("spiffe://cluster.local",)}, "spiffe-id"),
        ({"uri_sans": ("spiffe://cluster.local/ns/shop/sa/web/",)}, "spiffe-id"),
        ({"uri_sans": ("spiffe://other.example/ns/shop/sa/web",)}, "trust-domain"),
        ({"uri_sans": ("spiffe://sub.cluster.local/ns/shop/sa/web",)}, "trust-domain"),
    ],
)
def test_what_is_no_svid_of_this_mesh_is_refused(change, reason):
    with pytest.raises(X509Error) as raised:
        check_svid(replace(GOOD_LEAF, **change), "cluster.local")
    assert raised.value.reason == reason
    assert len(str(raised.value)) < 500


def test_the_detail_of_a_refusal_stays_short_whatever_the_peer_sends():
    names = tuple(f"spiffe://a/{n:0500}" for n in range(20))
    with pytest.raises(X509Error) as raised:
        check_svid(replace(GOOD_LEAF, uri_sans=names), "cluster.local")
    assert len(str(raised.value)) < 500


def test_the_mesh_ca_itself_is_no_workload(tmp_path):
    authority = Authority.create(tmp_path / "ca", "cluster.local")
    for ca in (authority.root, authority.intermediate):
        with pytest.raises(X509Error, match="CA:true"):
            check_svid(read_leaf(ca.public_bytes(serialization.Encoding.DER)), "cluster.local")


@pytest.mark.parametrize(("two_digits", "year"), [(b"49", 2049), (b"50", 1950), (b"99", 1999), (b"00", 2000)])
def test_the_century_of_a_utc_time_is_that_of_rfc_5280(two_digits, year):
    times = tlv(0x17, two_digits + b"0101000000Z"), tlv(0x18, b"21000101000000Z")
    leaf = read_leaf(certificate(validity=tlv(SEQUENCE, *times)))
    assert leaf.not_before == datetime(year, 1, 1, tzinfo=UTC).timestamp()


def test_times_are_those_of_the_certificate():
    forged = forge(None, key=KEY, not_before=timedelta(days=-25000), not_after=timedelta(days=400000))
    leaf = read_leaf(forged.der)
    assert leaf.not_before == int(forged.certificate.not_valid_before_utc.timestamp())
    assert leaf.not_after == int(forged.certificate.not_valid_after_utc.timestamp())
