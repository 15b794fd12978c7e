"""What the control plane signed is known from what somebody else signed, whatever they hold."""

from __future__ import annotations

import contextlib
import ssl
import time
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from control.api.identity import parse_trust_domain
from control.api.index import Trust
from control.api.messages import Envelope
from control.api.signing import CONFIG_KEY_OID, SIGNATURE, signed_bytes
from control.client import libcrypto_declarations
from control.client.libcrypto import ConfigVerifier, VerifyError, ed25519_key, verify_chain, verify_ed25519
from tests.support.certificates import BOTH_PURPOSES, WEB, forge, forge_ca, signed_with_sha1, usage

TRUST_DOMAIN = parse_trust_domain("cluster.local")
CONTROL_PLANE = "spiffe://cluster.local/ns/mesh-system/sa/control-plane"
CONFIG = x509.ObjectIdentifier(CONFIG_KEY_OID)
NOW = time.time()
TOPIC = "mesh/v1/cluster.local/root/shop"

ROOT = forge_ca(None, "root", path_length=1)
INTERMEDIATE = forge_ca(ROOT, "intermediate", path_length=0)
KEY = Ed25519PrivateKey.generate()


def config_leaf(issuer=INTERMEDIATE, uris=(CONTROL_PLANE,), key=KEY, purposes=(CONFIG,), **options):
    return forge(issuer, uris, key=key, purposes=purposes, **options)


LEAF = config_leaf()


def verifier(roots=(ROOT,)):
    return ConfigVerifier(TRUST_DOMAIN, lambda: [root.der for root in roots])


def trusted(*certificates):
    return Trust(tuple(one.der for one in certificates))


def signed(envelope, key=KEY, topic=TOPIC):
    return replace(envelope, body={**envelope.body, SIGNATURE: key.sign(signed_bytes(topic, envelope))})


ENVELOPE = Envelope(3, 7, 1000, {"shards": {"00": bytes(32)}})


def test_the_generated_module_is_fresh():
    assert libcrypto_declarations.TARGET.read_text() == libcrypto_declarations.generate()


@given(st.binary(max_size=300), st.binary(min_size=32, max_size=32))
def test_signatures_agree_with_cryptography(message, seed):
    key = Ed25519PrivateKey.from_private_bytes(seed)
    public, signature = key.public_key().public_bytes_raw(), key.sign(message)
    assert verify_ed25519(public, message, signature)
    assert not verify_ed25519(public, message + b"\0", signature)
    assert not verify_ed25519(KEY.public_key().public_bytes_raw(), message, signature)


@given(st.integers(0, 511))
def test_no_bit_of_a_signature_or_key_is_spare(bit):
    message = b"root"
    public, signature = bytearray(KEY.public_key().public_bytes_raw()), bytearray(KEY.sign(message))
    signature[bit // 8] ^= 1 << bit % 8
    assert not verify_ed25519(bytes(public), message, bytes(signature))
    public[bit // 8 % 32] ^= 1 << bit % 8
    assert not verify_ed25519(bytes(public), message, KEY.sign(message))


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_key_of_the_wrong_length_verifies_nothing(size):
    assert not verify_ed25519(bytes(size), b"m", KEY.sign(b"m"))


@pytest.mark.parametrize("size", [0, 63, 65, 4096])
def test_a_signature_of_the_wrong_length_verifies_nothing(size):
    assert not verify_ed25519(KEY.public_key().public_bytes_raw(), b"m", bytes(size))


def test_the_key_of_a_certificate_is_its_ed25519_key():
    assert ed25519_key(LEAF.der) == KEY.public_key().public_bytes_raw()
    with pytest.raises(VerifyError, match="no Ed25519 key"):
        ed25519_key(INTERMEDIATE.der)
    with pytest.raises(VerifyError, match="no Ed25519 key"):
        # The same length of key, in the same field.
        ed25519_key(config_leaf(key=X25519PrivateKey.generate()).der)
    with pytest.raises(VerifyError, match="bytes follow"):
        ed25519_key(LEAF.der + b"\0")
    with pytest.raises(VerifyError, match="cannot be read"):
        ed25519_key(b"\x30\x03abc")


OTHER_ROOT = forge_ca(None, "other root")


def test_a_chain_leads_to_one_of_the_roots():
    verify_chain(LEAF.der, [INTERMEDIATE.der], [OTHER_ROOT.der, ROOT.der], int(NOW))


@pytest.mark.parametrize(
    ("intermediates", "roots", "at"),
    [
        pytest.param([INTERMEDIATE.der], [], NOW, id="no roots"),
        pytest.param([INTERMEDIATE.der], [OTHER_ROOT.der], NOW, id="another root"),
        pytest.param([], [ROOT.der], NOW, id="no intermediate"),
        pytest.param([], [INTERMEDIATE.der], NOW, id="an intermediate is no anchor"),
        pytest.param([INTERMEDIATE.der], [ROOT.der], NOW + 7200, id="later"),
        pytest.param([INTERMEDIATE.der], [ROOT.der], NOW - 7200, id="earlier"),
        pytest.param([INTERMEDIATE.der] * 3, [ROOT.der], NOW, id="too many"),
        pytest.param([b"x"], [ROOT.der], NOW, id="no certificate"),
    ],
)
def test_any_other_chain_is_refused(intermediates, roots, at):
    with pytest.raises(VerifyError):
        verify_chain(LEAF.der, intermediates, roots, int(at))


def test_a_root_of_the_same_name_with_another_key_signs_nothing():
    impostor = forge_ca(None, "root", path_length=1)
    with pytest.raises(VerifyError, match="root"):
        verify_chain(LEAF.der, [INTERMEDIATE.der], [impostor.der], int(NOW))


def test_a_sha1_signature_is_no_proof():
    with pytest.raises(VerifyError, match="weak"):
        verify_chain(signed_with_sha1(forge(INTERMEDIATE)).der, [INTERMEDIATE.der], [ROOT.der], int(NOW))


def established(directory):
    """One end of a TLS connection in memory, on which nothing has arrived."""
    server_side, client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    forge(INTERMEDIATE).write(directory / "identity", b"")
    server_side.load_cert_chain(directory / "identity" / "chain.pem", directory / "identity" / "key.pem")
    client_side.check_hostname, client_side.verify_mode = False, ssl.CERT_NONE
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, server = client_side.wrap_bio(back, there), server_side.wrap_bio(there, back, server_side=True)
    for end in (client, server, client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
    with pytest.raises(ssl.SSLWantReadError):
        client.read()
    return client


def test_errors_stay_out_of_the_queue_that_ssl_reads(tmp_path):
    """A leftover would make the next read of a TLS connection fail, with our reason."""
    connection = established(tmp_path)
    checker = verifier()
    for content in (Trust((b"\x30\x03abc",)), Trust((LEAF.der, b"\x30\x03abc")), trusted(LEAF)):
        with pytest.raises(VerifyError):
            checker.trust(content, NOW)
        with pytest.raises(ssl.SSLWantReadError):
            connection.read()
    assert not verify_ed25519(b"\xff" * 32, b"m", b"\xff" * 64)
    with pytest.raises(ssl.SSLWantReadError):
        connection.read()


def test_what_the_control_plane_signed_is_taken():
    checker = verifier()
    assert not checker.ready
    assert checker.trust(trusted(LEAF, INTERMEDIATE), NOW)
    assert checker.ready
    assert not checker.trust(trusted(LEAF, INTERMEDIATE), NOW)  # no other key than before
    checker.check(TOPIC, signed(ENVELOPE), NOW)


def refuses(checker, envelope, topic=TOPIC, at=NOW):
    with pytest.raises(VerifyError) as caught:
        checker.check(topic, envelope, at)
    return str(caught.value)


def test_what_was_not_signed_for_this_place_is_refused():
    checker = verifier()
    assert "no config key" in refuses(checker, signed(ENVELOPE))
    checker.trust(trusted(LEAF, INTERMEDIATE), NOW)
    good = signed(ENVELOPE)
    assert "unsigned" in refuses(checker, ENVELOPE)
    assert "unsigned" in refuses(checker, replace(good, body=None))
    assert "unsigned" in refuses(checker, replace(good, body={**good.body, SIGNATURE: b""}))
    assert "unsigned" in refuses(checker, replace(good, body={**good.body, SIGNATURE: "a" * 64}))
    for altered in (
        replace(good, epoch=4),
        replace(good, version=8),
        replace(good, issued_at=1001),
        replace(good, body={**good.body, "shards": {}}),
        replace(good, body={**good.body, "more": 1}),
    ):
        assert "altered" in refuses(checker, altered)
    assert "altered" in refuses(checker, good, topic=TOPIC.replace("shop", "bank"))
    assert "altered" in refuses(checker, signed(ENVELOPE, Ed25519PrivateKey.generate()))


def test_a_key_ends_with_its_certificate():
    checker = verifier()
    checker.trust(trusted(LEAF, INTERMEDIATE), NOW)
    assert "not valid now" in refuses(checker, signed(ENVELOPE), at=NOW + 3700)
    assert "not valid now" in refuses(checker, signed(ENVELOPE), at=NOW - 3700)


IMPOSTORS = {
    "a workload": lambda: config_leaf(uris=(str(WEB),)),
    "two names": lambda: config_leaf(uris=(CONTROL_PLANE, str(WEB))),
    "another trust domain": lambda: config_leaf(uris=(CONTROL_PLANE.replace("cluster", "other"),)),
    "the control plane's own SVID": lambda: config_leaf(purposes=BOTH_PURPOSES, key=None),
    "any purpose": lambda: config_leaf(purposes=None),
    "a second purpose": lambda: config_leaf(purposes=(CONFIG, ExtendedKeyUsageOID.CLIENT_AUTH)),
    "a CA": lambda: config_leaf(ca=True, key_usage=usage(digital_signature=True)),
    "signs certificates": lambda: config_leaf(key_usage=usage(digital_signature=True, key_cert_sign=True)),
    "unknown critical": lambda: config_leaf(
        extra=[(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\0"), True)]
    ),
    "no Ed25519": lambda: config_leaf(key=None),
    "expired": lambda: config_leaf(not_before=timedelta(hours=-2), not_after=timedelta(hours=-1)),
    "not yet": lambda: config_leaf(not_before=timedelta(hours=1), not_after=timedelta(hours=2)),
    "signed by itself": lambda: forge(None, (CONTROL_PLANE,), purposes=(CONFIG,)),
    "signed by a workload": lambda: config_leaf(forge(INTERMEDIATE)),
}


@pytest.mark.parametrize("why", IMPOSTORS)
def test_no_other_certificate_makes_a_config_key(why):
    checker = verifier()
    checker.trust(trusted(LEAF, INTERMEDIATE), NOW)
    with pytest.raises(VerifyError):
        checker.trust(trusted(IMPOSTORS[why](), INTERMEDIATE), NOW)
    checker.check(TOPIC, signed(ENVELOPE), NOW)  # and the key of before stays


@given(st.binary(max_size=200))
def test_any_bytes_for_a_certificate_are_refused(der):
    with pytest.raises(VerifyError):
        verifier().trust(Trust((der, INTERMEDIATE.der)), NOW)


def test_a_damaged_certificate_is_refused():
    """Every byte of it counts, and whatever stands there crashes nothing."""
    checker = verifier()
    for at in range(0, len(LEAF.der), 3):
        damaged = bytearray(LEAF.der)
        damaged[at] ^= 0x41
        with pytest.raises(VerifyError):
            checker.trust(Trust((bytes(damaged), INTERMEDIATE.der)), NOW)
    assert not checker.ready


def test_the_key_changes_with_the_trust_and_the_root_with_the_bundle():
    roots = [ROOT]
    checker = ConfigVerifier(TRUST_DOMAIN, lambda: [root.der for root in roots])
    checker.trust(trusted(LEAF, INTERMEDIATE), NOW)
    new_root = forge_ca(None, "new root", path_length=1)
    new_intermediate = forge_ca(new_root, "new intermediate", path_length=0)
    new_key = Ed25519PrivateKey.generate()
    content = trusted(config_leaf(new_intermediate, key=new_key), new_intermediate)
    with pytest.raises(VerifyError):
        checker.trust(content, NOW)
    roots.append(new_root)
    now = time.time()  # the module may have been loaded minutes ago
    assert checker.trust(content, now)
    checker.check(TOPIC, signed(ENVELOPE, new_key), now)
    assert "another key" in refuses(checker, signed(ENVELOPE), at=now)


def test_nothing_leaks():
    checker = verifier()
    content = trusted(LEAF, INTERMEDIATE)
    bad = trusted(LEAF)

    def use(rounds):
        for _ in range(rounds):
            checker.trust(content, NOW)
            checker.check(TOPIC, signed(ENVELOPE), NOW)
            with pytest.raises(VerifyError):
                checker.trust(bad, NOW)
            with pytest.raises(VerifyError):
                ed25519_key(LEAF.der + b"\0")

    use(100)
    before = resident_bytes()
    use(800)  # some 5 KB of OpenSSL's objects each
    assert resident_bytes() - before < 1_000_000


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
