"""Reads the leaf certificate of a peer: a bounded DER reader of our own, and the rules of an X.509-SVID. And CRLs.

OpenSSL has verified the chain (signatures, validity, purpose) before anything here runs. But Python's `ssl`
accepts a leaf with CA:true or with two URI SANs, and shows names only as text, so what decides identity is
read here, from the bytes that were signed. Pure: no I/O, no clock, no `ssl`; linear in the input's length,
of fixed depth, and whatever the bytes are, it returns a `Leaf` or raises `X509Error`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from control.api.identity import SpiffeId

T = TypeVar("T")

# An SVID is 0.6 KB; one with a post-quantum key and signature stays under 10 KB. OpenSSL would take 100 KB.
MAX_LEAF_BYTES = 16 * 1024
# RFC 5280 section 4.1.2.2.
MAX_SERIAL_BYTES = 20
# The largest assigned OIDs have about 20 octets; the bound keeps dotted text short.
MAX_OID_BYTES = 64

# DER tags (X.690 section 8): class, constructed bit and number in one octet.
_BOOLEAN, _INTEGER, _BIT_STRING, _OCTET_STRING, _OID = 0x01, 0x02, 0x03, 0x04, 0x06
_UTC_TIME, _GENERALIZED_TIME, _SEQUENCE = 0x17, 0x18, 0x30
_VERSION, _ISSUER_UID, _SUBJECT_UID, _EXTENSIONS = 0xA0, 0x81, 0x82, 0xA3
_CRL_EXTENSIONS = 0xA0

# GeneralName (RFC 5280 section 4.2.1.6): context tags 0 to 8, and which of them are constructed.
_GENERAL_NAMES = frozenset((0xA0, 0x81, 0x82, 0xA3, 0xA4, 0xA5, 0x86, 0x87, 0x88))
_URI_NAME = 0x86

# Bit 0 first (RFC 5280 section 4.2.1.3).
_KEY_USAGES = (
    "digitalSignature",
    "nonRepudiation",
    "keyEncipherment",
    "dataEncipherment",
    "keyAgreement",
    "keyCertSign",
    "cRLSign",
    "encipherOnly",
    "decipherOnly",
)

_KEY_USAGE = "2.5.29.15"
_SUBJECT_ALT_NAME = "2.5.29.17"
_BASIC_CONSTRAINTS = "2.5.29.19"
_EXTENDED_KEY_USAGE = "2.5.29.37"
_READ = frozenset((_KEY_USAGE, _SUBJECT_ALT_NAME, _BASIC_CONSTRAINTS, _EXTENDED_KEY_USAGE))
SERVER_AUTH = "1.3.6.1.5.5.7.3.1"
CLIENT_AUTH = "1.3.6.1.5.5.7.3.2"


class X509Error(Exception):
    """A certificate that is not accepted. `reason` is a slug for metrics, `detail` is for the operator."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Leaf:
    """What an end-entity certificate says about itself, as far as a uProxy decides by it."""

    uri_sans: tuple[str, ...]
    is_ca: bool
    key_usage: frozenset[str] | None
    """Names of RFC 5280 section 4.2.1.3; None when the extension is absent."""
    key_usage_critical: bool
    extended_key_usage: tuple[str, ...] | None
    """Dotted OIDs in the certificate's order; None when the extension is absent."""
    unknown_critical: tuple[str, ...]
    """Dotted OIDs of critical extensions that are not read here."""
    serial: int
    not_before: int
    """First valid second, Unix time."""
    not_after: int
    """Last valid second, Unix time."""


def read_leaf(der: bytes) -> Leaf:
    """Read one DER certificate, strictly. Raises `X509Error` with reason `malformed` for anything else."""
    if len(der) > MAX_LEAF_BYTES:
        raise _malformed(f"the certificate has {len(der)} bytes; at most {MAX_LEAF_BYTES} are read")
    outer = _Reader(der, 0, len(der))
    certificate = outer.enter(_SEQUENCE, "Certificate")
    outer.end("the certificate")
    tbs = certificate.enter(_SEQUENCE, "tbsCertificate")
    signature_algorithm = certificate.value(_SEQUENCE, "signatureAlgorithm")
    certificate.value(_BIT_STRING, "signatureValue")
    certificate.end("signatureValue")

    version = tbs.enter(_VERSION, "version")
    if version.value(_INTEGER, "version") != b"\x02":
        raise _malformed("the certificate is not of version 3")
    version.end("version")
    serial = _serial(tbs.value(_INTEGER, "serialNumber"))
    # RFC 5280 section 4.1.1.2: the signed copy and the outer one are the same.
    if tbs.value(_SEQUENCE, "signature") != signature_algorithm:
        raise _malformed("signatureAlgorithm differs from the signed one")
    tbs.value(_SEQUENCE, "issuer")
    validity = tbs.enter(_SEQUENCE, "validity")
    not_before, not_after = _time(validity, "notBefore"), _time(validity, "notAfter")
    validity.end("validity")
    tbs.value(_SEQUENCE, "subject")
    tbs.value(_SEQUENCE, "subjectPublicKeyInfo")
    for uid in (_ISSUER_UID, _SUBJECT_UID):
        if tbs.next_is(uid):
            tbs.value(uid, "uniqueID")
    extensions = _extensions(tbs) if tbs.next_is(_EXTENSIONS) else {}
    tbs.end("extensions")

    key_usage = extensions.get(_KEY_USAGE)
    return Leaf(
        uri_sans=_whole(extensions, _SUBJECT_ALT_NAME, _uri_names) or (),
        is_ca=_whole(extensions, _BASIC_CONSTRAINTS, _is_ca) or False,
        key_usage=_whole(extensions, _KEY_USAGE, _key_usage),
        key_usage_critical=key_usage is not None and key_usage.critical,
        extended_key_usage=_whole(extensions, _EXTENDED_KEY_USAGE, _purposes),
        unknown_critical=tuple(oid for oid, item in extensions.items() if item.critical and oid not in _READ),
        serial=serial,
        not_before=not_before,
        not_after=not_after,
    )


def check_svid(leaf: Leaf, trust_domain: str) -> SpiffeId:
    """Return the one identity of an X.509-SVID of `trust_domain`. Raises `X509Error`."""
    identity = svid_identity(leaf)
    if identity.trust_domain != trust_domain:
        raise X509Error("trust-domain", f"{identity} is of another trust domain than {trust_domain}")
    return identity


def svid_identity(leaf: Leaf) -> SpiffeId:
    """Return the one identity of an X.509-SVID, of whatever trust domain (the SPIFFE X.509-SVID standard).

    Validity in time is not checked here: OpenSSL did so in the handshake. Raises `X509Error`.
    """
    if leaf.is_ca:
        raise X509Error("ca-certificate", "the leaf has CA:true; a signing certificate identifies no workload")
    usage = leaf.key_usage
    if usage is None or not leaf.key_usage_critical:
        raise X509Error("key-usage", "keyUsage must be present and critical in an SVID")
    if "digitalSignature" not in usage or usage & {"keyCertSign", "cRLSign"}:
        raise X509Error(
            "key-usage",
            f"an SVID's key signs handshakes and never certificates: keyUsage is {_listed(usage)}",
        )
    purposes = leaf.extended_key_usage
    if purposes is not None and not {SERVER_AUTH, CLIENT_AUTH} <= set(purposes):
        raise X509Error(
            "extended-key-usage",
            f"extendedKeyUsage must have serverAuth and clientAuth; it has {_listed(purposes)}",
        )
    if leaf.unknown_critical:
        raise X509Error(
            "critical-extension",
            f"critical extension that is not understood: {_listed(leaf.unknown_critical)}",
        )
    if len(leaf.uri_sans) != 1:
        raise X509Error(
            "uri-sans",
            f"an SVID has exactly one URI SAN; this leaf has {len(leaf.uri_sans)}: {_listed(leaf.uri_sans)}",
        )
    try:
        return SpiffeId.parse(leaf.uri_sans[0])
    except ValueError as error:
        raise X509Error("spiffe-id", str(error)) from None


@dataclass(frozen=True, slots=True)
class CertificateId:
    """What a revocation list calls a certificate."""

    issuer: bytes
    """The issuer's name: the content of its DER."""
    serial: int


@dataclass(frozen=True, slots=True)
class RevocationList:
    """A CRL (RFC 5280 section 5.1), as far as it says what is revoked. Its signature is OpenSSL's business."""

    issuer: bytes
    """As in `CertificateId`."""
    serials: frozenset[int]


def certificate_id(der: bytes) -> CertificateId:
    """Of a certificate that OpenSSL has verified, whatever else is in it. Raises `X509Error`."""
    tbs = _Reader(der, 0, len(der)).enter(_SEQUENCE, "Certificate").enter(_SEQUENCE, "tbsCertificate")
    if tbs.next_is(_VERSION):
        tbs.value(_VERSION, "version")
    serial = int.from_bytes(tbs.value(_INTEGER, "serialNumber"), signed=True)
    tbs.value(_SEQUENCE, "signature")
    return CertificateId(tbs.value(_SEQUENCE, "issuer"), serial)


def read_revocation_list(der: bytes) -> RevocationList:
    """Read one complete CRL. Raises `X509Error`, also for one that is only a part or speaks for other issuers."""
    outer = _Reader(der, 0, len(der))
    signed = outer.enter(_SEQUENCE, "CertificateList")
    outer.end("the revocation list")
    tbs = signed.enter(_SEQUENCE, "tbsCertList")
    if tbs.next_is(_INTEGER) and tbs.value(_INTEGER, "version") != b"\x01":
        raise _malformed("the revocation list is not of version 2")
    tbs.value(_SEQUENCE, "signature")
    issuer = tbs.value(_SEQUENCE, "issuer")
    _time(tbs, "thisUpdate")
    if tbs.next_is(_UTC_TIME) or tbs.next_is(_GENERALIZED_TIME):
        _time(tbs, "nextUpdate")
    serials = set()
    if tbs.next_is(_SEQUENCE):
        entries = tbs.enter(_SEQUENCE, "revokedCertificates")
        while entries.more():
            entry = entries.enter(_SEQUENCE, "a revoked certificate")
            serials.add(int.from_bytes(entry.value(_INTEGER, "a revoked serial number"), signed=True))
            _time(entry, "revocationDate")
            if entry.more():
                _refuse_critical(entry.enter(_SEQUENCE, "crlEntryExtensions"))
            entry.end("a revoked certificate")
    if tbs.next_is(_CRL_EXTENSIONS):
        wrapper = tbs.enter(_CRL_EXTENSIONS, "crlExtensions")
        _refuse_critical(wrapper.enter(_SEQUENCE, "crlExtensions"))
        wrapper.end("crlExtensions")
    tbs.end("crlExtensions")
    return RevocationList(issuer, frozenset(serials))


def _refuse_critical(items: _Reader) -> None:
    """Partial, delta and indirect lists say so in critical extensions (RFC 5280 sections 5.2.4, 5.2.5 and 5.3.3)."""
    while items.more():
        oid, extension = _extension(items)
        if extension.critical:
            raise X509Error("critical-extension", f"the list has critical extension {oid}; none is understood")


class _Reader:
    """A cursor over the DER values in data[at:stop]. Each call moves past one value, or raises."""

    __slots__ = ("at", "data", "stop")

    def __init__(self, data: bytes, at: int, stop: int) -> None:
        self.data = data
        self.at = at
        self.stop = stop

    def next_is(self, tag: int) -> bool:
        return self.at < self.stop and self.data[self.at] == tag

    def more(self) -> bool:
        return self.at < self.stop

    def any_value(self, what: str) -> tuple[int, bytes]:
        """Return tag and content of the next value, whatever its tag."""
        if not self.more():
            raise _malformed(f"{what} is missing")
        tag = self.data[self.at]
        return tag, self.value(tag, what)

    def value(self, tag: int, what: str) -> bytes:
        """Return the content octets of the next value, which must have this tag."""
        start = self._content(tag, what)
        return self.data[start : self.at]

    def enter(self, tag: int, what: str) -> _Reader:
        """Return a reader of what is inside the next value, which must have this tag."""
        start = self._content(tag, what)
        return _Reader(self.data, start, self.at)

    def end(self, what: str) -> None:
        if self.more():
            raise _malformed(f"{self.stop - self.at} bytes follow {what}")

    def _content(self, tag: int, what: str) -> int:
        """Move past one value and return where its content starts.

        Lengths are definite and minimal (X.690 section 10.1). Three length octets hold every certificate
        that is read at all, so that no length is ever a large integer.
        """
        data, at, stop = self.data, self.at, self.stop
        if at + 2 > stop:
            raise _malformed(f"{what} is cut off")
        if data[at] != tag:
            raise _malformed(f"{what} has tag 0x{data[at]:02x} where 0x{tag:02x} belongs")
        length = data[at + 1]
        at += 2
        if length >= 0x80:
            octets = length & 0x7F
            if not 1 <= octets <= 3 or at + octets > stop:
                raise _malformed(f"{what} has a length that is indefinite, too large or cut off")
            length = int.from_bytes(data[at : at + octets])
            if length < 0x80 or length >> (8 * (octets - 1)) == 0:
                raise _malformed(f"{what} has a length that is not minimal")
            at += octets
        if length > stop - at:
            raise _malformed(f"{what} is cut off")
        self.at = at + length
        return at


@dataclass(frozen=True, slots=True)
class _Extension:
    critical: bool
    content: bytes


def _extensions(tbs: _Reader) -> dict[str, _Extension]:
    """Extensions by OID, in the certificate's order. A second extension of one OID is refused."""
    wrapper = tbs.enter(_EXTENSIONS, "extensions")
    items = wrapper.enter(_SEQUENCE, "extensions")
    wrapper.end("extensions")
    found: dict[str, _Extension] = {}
    while items.more():
        oid, extension = _extension(items)
        if oid in found:
            raise _malformed(f"extension {oid} appears twice")
        found[oid] = extension
    if not found:
        raise _malformed("the list of extensions is empty")
    return found


def _extension(items: _Reader) -> tuple[str, _Extension]:
    """The next one, with its OID."""
    item = items.enter(_SEQUENCE, "an extension")
    oid = _oid(item.value(_OID, "an extension's OID"))
    critical = item.next_is(_BOOLEAN)
    # DEFAULT FALSE is left out in DER (X.690 section 11.5), so that a boolean here is TRUE.
    if critical and not _boolean(item):
        raise _malformed(f"extension {oid} spells out critical=FALSE")
    content = item.value(_OCTET_STRING, f"extension {oid}")
    item.end(f"extension {oid}")
    return oid, _Extension(critical, content)


def _whole(extensions: dict[str, _Extension], oid: str, parse: Callable[[_Reader], T]) -> T | None:
    """Parse the whole content of one extension; None when the certificate does not have it."""
    extension = extensions.get(oid)
    if extension is None:
        return None
    reader = _Reader(extension.content, 0, len(extension.content))
    parsed = parse(reader)
    reader.end(f"extension {oid}")
    return parsed


def _uri_names(extension: _Reader) -> tuple[str, ...]:
    names = extension.enter(_SEQUENCE, "subjectAltName")
    uris = []
    if not names.more():
        raise _malformed("subjectAltName is empty")
    while names.more():
        tag, content = names.any_value("a subjectAltName")
        if tag not in _GENERAL_NAMES:
            raise _malformed(f"subjectAltName holds a name of unknown kind 0x{tag:02x}")
        if tag == _URI_NAME:
            # Only visible ASCII: a NUL or a line break is where two readers of one name begin to disagree.
            bad = next((octet for octet in content if not 0x21 <= octet <= 0x7E), None)
            if bad is not None:
                raise _malformed(f"a URI in subjectAltName holds byte 0x{bad:02x}")
            uris.append(content.decode("ascii"))
    return tuple(uris)


def _is_ca(extension: _Reader) -> bool:
    constraints = extension.enter(_SEQUENCE, "basicConstraints")
    is_ca = constraints.next_is(_BOOLEAN)
    if is_ca and not _boolean(constraints):
        raise _malformed("basicConstraints spells out cA=FALSE")
    if constraints.more() and _integer(constraints.value(_INTEGER, "pathLenConstraint")) < 0:
        raise _malformed("pathLenConstraint is negative")
    constraints.end("basicConstraints")
    return is_ca


def _key_usage(extension: _Reader) -> frozenset[str]:
    """A named bit list: no trailing zero bits (X.690 section 11.2.2), at most nine bits, at least one."""
    content = extension.value(_BIT_STRING, "keyUsage")
    if not 2 <= len(content) <= 3 or content[0] > 7:
        raise _malformed("keyUsage is not a list of one to nine bits")
    unused, bits = content[0], int.from_bytes(content[1:])
    width = 8 * (len(content) - 1)
    if bits & ((1 << unused) - 1) or not bits >> unused & 1 or width - unused > len(_KEY_USAGES):
        raise _malformed("keyUsage is not a list of one to nine bits")
    return frozenset(name for index, name in enumerate(_KEY_USAGES) if bits << index >> (width - 1) & 1)


def _purposes(extension: _Reader) -> tuple[str, ...]:
    purposes = extension.enter(_SEQUENCE, "extendedKeyUsage")
    found = []
    while purposes.more():
        found.append(_oid(purposes.value(_OID, "a key purpose")))
    if not found:
        raise _malformed("extendedKeyUsage is empty")
    return tuple(found)


def _boolean(reader: _Reader) -> bool:
    content = reader.value(_BOOLEAN, "a boolean")
    if content not in (b"\x00", b"\xff"):
        raise _malformed("a boolean is neither 00 nor FF")
    return content == b"\xff"


def _integer(content: bytes) -> int:
    if not content or (len(content) > 1 and content[0] in (0x00, 0xFF) and (content[0] ^ content[1]) < 0x80):
        raise _malformed("an integer is not minimal")
    return int.from_bytes(content, signed=True)


def _serial(content: bytes) -> int:
    if len(content) > MAX_SERIAL_BYTES:
        raise _malformed(f"the serial number has {len(content)} octets, more than {MAX_SERIAL_BYTES}")
    serial = _integer(content)
    if serial <= 0:
        raise _malformed("the serial number is not positive")
    return serial


def _oid(content: bytes) -> str:
    """Dotted text of an object identifier: base 128, the first two arcs in one number (X.690 8.19)."""
    if not content or len(content) > MAX_OID_BYTES or content[-1] & 0x80:
        raise _malformed("an object identifier is empty, too long or cut off")
    arcs: list[int] = []
    value, fresh = 0, True
    for octet in content:
        if fresh and octet == 0x80:
            raise _malformed("an object identifier is not minimal")
        value = value << 7 | octet & 0x7F
        fresh = not octet & 0x80
        if fresh:
            arcs.append(value)
            value = 0
    root = min(arcs[0] // 40, 2)
    return ".".join(map(str, (root, arcs[0] - 40 * root, *arcs[1:])))


def _time(validity: _Reader, what: str) -> int:
    """Unix time of a UTCTime or GeneralizedTime in the one form that RFC 5280 section 4.1.2.5 allows."""
    tag, content = validity.any_value(what)
    digits = {_UTC_TIME: 12, _GENERALIZED_TIME: 14}.get(tag)
    if digits is None or len(content) != digits + 1 or content[-1:] != b"Z" or not content[:-1].isdigit():
        raise _malformed(f"{what} is not a time of the form YYMMDDhhmmssZ or YYYYMMDDhhmmssZ")
    text = content[:-1].decode("ascii")
    if tag == _UTC_TIME:
        text = ("19" if text[:2] >= "50" else "20") + text
    month, day, hour, minute, second = (int(text[index : index + 2]) for index in range(4, 14, 2))
    try:
        moment = datetime(int(text[:4]), month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        raise _malformed(f"{what} is not a date: {text}") from None
    return int(moment.timestamp())


def _listed(names: frozenset[str] | tuple[str, ...]) -> str:
    """Names for an error text: quoted, and no longer than a log line should be."""
    text = ", ".join(repr(name) for name in sorted(names))
    return (text if len(text) <= 300 else text[:300] + "…") or "none"


def _malformed(detail: str) -> X509Error:
    return X509Error("malformed", detail)
