"""Real TLS 1.3 handshakes over socket pairs: who is let in, who is refused and in which words."""

import contextlib
import os
import ssl
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import combinations_with_replacement
from pathlib import Path
from socket import socketpair

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from control.api.identity import SpiffeId
from control.client.libcrypto import prefer_cipher_suites
from control.server.ca import Authority
from tests.support.certificates import DB, WEB, Forged, forge, forge_ca, identity_dir, pem, signed_with_sha1, usage
from uproxy import tls
from uproxy.errors import Flag, RefusedError
from uproxy.tls import Credentials, CredentialsError

TIMEOUT_S = 5.0


@dataclass
class Side:
    """One end of a handshake: its TLS socket afterwards, or what it raised."""

    context: ssl.SSLContext
    tls: ssl.SSLSocket | None = None
    error: OSError | None = None

    def shake_hands(self, raw, server_side: bool) -> None:
        raw.settimeout(TIMEOUT_S)
        try:
            self.tls = self.context.wrap_socket(raw, server_side=server_side)
            # With TLS 1.3 a client learns what the server thinks of its certificate by the first read alone.
            if server_side:
                self.tls.sendall(b"h")
            else:
                self.tls.recv(1)
        except OSError as error:
            self.error = error
            raw.close()


def meet(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[Side, Side]:
    sides = Side(client), Side(server)
    pair = socketpair()
    thread = threading.Thread(target=sides[1].shake_hands, args=(pair[1], True))
    thread.start()
    sides[0].shake_hands(pair[0], server_side=False)
    thread.join(2 * TIMEOUT_S)
    assert not thread.is_alive()
    return sides


@pytest.fixture
def close_after():
    opened: list[Side] = []
    yield opened.extend
    for side in opened:
        if side.tls is not None:
            side.tls.close()


def judged(ours: Side) -> SpiffeId | RefusedError:
    """What a uProxy makes of its peer: an identity, or a refusal from the handshake or from the leaf."""
    if isinstance(ours.error, ssl.SSLError):
        return tls.handshake_refusal(ours.error)
    assert ours.error is None, ours.error
    try:
        return tls.peer_identity(ours.tls, "cluster.local")
    except RefusedError as refusal:
        return refusal


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority.create(tmp_path_factory.mktemp("ca") / "ca", "cluster.local")


@pytest.fixture(scope="module")
def issuer(authority) -> Forged:
    """The mesh's intermediate, in the hands of somebody who signs anything."""
    root = Forged(authority.root, authority._key, None)
    return Forged(authority.intermediate, authority._key, root)


@pytest.fixture(scope="module")
def web(authority, tmp_path_factory):
    return Credentials.load(identity_dir(authority, tmp_path_factory.mktemp("web") / "id", WEB))


@pytest.fixture(scope="module")
def db(authority, tmp_path_factory):
    return Credentials.load(identity_dir(authority, tmp_path_factory.mktemp("db") / "id", DB))


def careless(server_side: bool, chain_and_key: Path | None, alpn: str | None = "h2") -> ssl.SSLContext:
    """A peer that checks nothing and presents what it was given."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    if alpn is not None:
        context.set_alpn_protocols([alpn])
    if chain_and_key is not None:
        context.load_cert_chain(chain_and_key)
    return context


def test_both_sides_learn_the_other_ones_identity(web, db, close_after):
    client, server = meet(tls.client_context(web), tls.server_context(db))
    close_after((client, server))
    assert judged(client) == DB
    assert judged(server) == WEB
    assert client.tls.version() == "TLSv1.3"
    assert client.tls.selected_alpn_protocol() == "h2"


def test_the_quick_cipher_is_preferred(web, db, close_after):
    client, server = meet(tls.client_context(web), tls.server_context(db))
    close_after((client, server))
    assert client.tls.cipher()[0] == "TLS_AES_128_GCM_SHA256"


@pytest.mark.parametrize("suite", ["TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"])
@pytest.mark.parametrize("we_serve", [True, False])
def test_a_peer_of_another_cipher_is_served(suite, we_serve, web, db, close_after):
    ours = tls.server_context(db) if we_serve else tls.client_context(db)
    prefer_cipher_suites([suite])
    try:
        others = tls.client_context(web) if we_serve else tls.server_context(web)
    finally:
        prefer_cipher_suites(tls._CIPHER_SUITES)
    client, server = meet(*((others, ours) if we_serve else (ours, others)))
    close_after((client, server))
    assert judged(server if we_serve else client) == WEB
    assert client.tls.cipher()[0] == suite


def test_no_session_is_resumed_and_no_name_is_sent(web, db, close_after):
    names = []
    context = tls.server_context(db)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    client, server = meet(tls.client_context(web), context)
    close_after((client, server))
    assert names == [None]
    assert not client.tls.session.has_ticket
    assert context.session_stats()["accept"] == 1
    assert context.num_tickets == 0


def test_contexts_trust_the_bundle_alone(web):
    for context in (tls.client_context(web), tls.server_context(web)):
        assert context.cert_store_stats()["x509"] == 1
        assert context.minimum_version == context.maximum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED


def nul_in_san(issuer: Forged) -> Forged:
    return forge(issuer, [f"{WEB}\0.evil.example"])


def long_chain(issuer: Forged) -> Forged:
    """A CA below the intermediate, which may sign leaves only (its pathLenConstraint is 0)."""
    return forge(forge_ca(issuer, "one too many"))


def very_long_chain(issuer: Forged) -> Forged:
    for n in range(12):
        issuer = forge_ca(issuer, f"link {n}")
    return forge(issuer)


def stranger(_issuer: Forged) -> Forged:
    return forge(forge_ca(forge_ca(None, "another root"), "another intermediate"))


def impostor(issuer: Forged) -> Forged:
    """The intermediate's name over another key."""
    key = ec.generate_private_key(ec.SECP256R1())
    return forge(Forged(issuer.certificate, key, issuer.issuer))


BAD = {
    "expired": (lambda ca: forge(ca, not_before=timedelta(hours=-2), not_after=timedelta(seconds=-1)), "expired"),
    "not yet valid": (lambda ca: forge(ca, not_before=timedelta(minutes=5)), "not-yet-valid"),
    "wrong EKU": (lambda ca: forge(ca, purposes=[ExtendedKeyUsageOID.CODE_SIGNING]), "wrong-purpose"),
    "any EKU": (lambda ca: forge(ca, purposes=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]), "purpose|extended"),
    "client EKU alone": (lambda ca: forge(ca, purposes=[ExtendedKeyUsageOID.CLIENT_AUTH]), "purpose|extended"),
    "server EKU alone": (lambda ca: forge(ca, purposes=[ExtendedKeyUsageOID.SERVER_AUTH]), "purpose|extended"),
    "no SAN": (lambda ca: forge(ca, []), "uri-sans"),
    "wrong SAN": (lambda ca: forge(ca, ["https://shop.example/web"]), "spiffe-id"),
    "DNS SAN": (
        lambda ca: forge(ca, [], extra=[(x509.SubjectAlternativeName([x509.DNSName("web.shop")]), False)]),
        "uri-sans",
    ),
    "two URI SANs": (lambda ca: forge(ca, [str(WEB), str(DB)]), "uri-sans"),
    "wrong trust domain": (lambda ca: forge(ca, ["spiffe://evil.example/ns/shop/sa/web"]), "trust-domain"),
    "trust domain of a longer name": (
        lambda ca: forge(ca, ["spiffe://cluster.local.evil.example/ns/shop/sa/web"]),
        "trust-domain",
    ),
    "no path": (lambda ca: forge(ca, ["spiffe://cluster.local"]), "spiffe-id"),
    "percent-encoding": (lambda ca: forge(ca, ["spiffe://cluster.local/ns/shop/sa/w%65b"]), "spiffe-id"),
    "NUL in SAN": (nul_in_san, "malformed"),
    "CA:true leaf": (
        lambda ca: forge(ca, ca=True, key_usage=usage(digital_signature=True, key_cert_sign=True)),
        "ca-certificate",
    ),
    "CA:true leaf without keyCertSign": (lambda ca: forge(ca, ca=True), "ca-certificate"),
    "the intermediate as a leaf": (lambda ca: ca, "wrong-purpose"),
    "keyCertSign": (lambda ca: forge(ca, key_usage=usage(digital_signature=True, key_cert_sign=True)), "key-usage"),
    "key usage without digitalSignature": (lambda ca: forge(ca, key_usage=usage(key_agreement=True)), "key-usage"),
    "key usage not critical": (lambda ca: forge(ca, key_usage_critical=False), "key-usage"),
    "unknown critical extension": (
        lambda ca: forge(ca, extra=[(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"x"), True)]),
        "critical-extension",
    ),
    "no authority key identifier": (lambda ca: forge(ca, names_issuer_key=False), "certificate-invalid"),
    "unknown CA": (stranger, "unknown-ca"),
    "the CA's name over another key": (impostor, "bad-signature"),
    "self-signed": (lambda _ca: forge(None), "unknown-ca"),
    "SHA-1": (lambda ca: signed_with_sha1(forge(ca)), "weak-signature"),
    "1024-bit RSA": (lambda ca: forge(ca, key=rsa.generate_private_key(65537, 1024)), "weak-key"),
    "long chain": (long_chain, "chain-too-long"),
    "very long chain": (very_long_chain, "chain-too-long"),
}


@pytest.mark.parametrize("we_serve", [True, False], ids=["as client", "as server"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_certificate_is_refused_with_its_reason(name, we_serve, issuer, db, tmp_path, close_after):
    make, reason = BAD[name]
    forged = make(issuer)
    (tmp_path / "peer.pem").write_bytes(forged.key_pem + forged.chain_pem)
    theirs = careless(not we_serve, tmp_path / "peer.pem")
    if we_serve:
        client, server = meet(theirs, tls.server_context(db))
    else:
        client, server = meet(tls.client_context(db), theirs)
    close_after((client, server))
    verdict = judged(server if we_serve else client)
    assert isinstance(verdict, RefusedError), f"accepted as {verdict}"
    assert verdict.flag in (Flag.TLS_FAILURE, Flag.IDENTITY)
    assert verdict.detail
    assert any(part in verdict.reason for part in reason.split("|")), (verdict.reason, verdict.detail)
    assert "\0" not in str(verdict)


def revocation_list(issuer: Forged, *serials: int, ends: timedelta = timedelta(hours=1), signer: Forged | None = None):
    now = datetime.now(UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(now - timedelta(hours=2))
        .next_update(now + ends)
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - timedelta(hours=2))
        builder = builder.add_revoked_certificate(entry.build())
    signed = builder.sign((signer or issuer).key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def with_list(authority: Authority, directory: Path, content: bytes) -> Path:
    made = identity_dir(authority, directory, DB)
    (made / "crl.pem").write_bytes(content)
    return made


@pytest.mark.parametrize("we_serve", [True, False], ids=["as client", "as server"])
@pytest.mark.parametrize("what", ["nobody", "the peer", "its issuer"])
def test_what_a_list_names_is_refused(what, we_serve, tmp_path, close_after):
    root = forge_ca(None, "root")
    issuer = forge_ca(root, "intermediate", path_length=0)
    # A second one, so that ours stays good.
    other = forge_ca(root, "another intermediate", path_length=0)
    peer = forge(other)
    lists = [
        revocation_list(issuer),
        revocation_list(other, *([peer.certificate.serial_number] if what == "the peer" else [])),
        revocation_list(root, *([other.certificate.serial_number] if what == "its issuer" else [])),
    ]
    made = forge(issuer, [str(DB)]).write(tmp_path / "db", pem(root.certificate))
    (made / "crl.pem").write_bytes(b"".join(lists))
    ours = Credentials.load(made)
    (tmp_path / "peer.pem").write_bytes(peer.key_pem + peer.chain_pem)
    theirs = careless(not we_serve, tmp_path / "peer.pem")
    if we_serve:
        client, server = meet(theirs, tls.server_context(ours))
    else:
        client, server = meet(tls.client_context(ours), theirs)
    close_after((client, server))
    verdict = judged(server if we_serve else client)
    if what == "nobody":
        assert verdict == WEB
        ours_side = (server if we_serve else client).tls
        assert [one.serial for one in tls.certificates_of(ours_side)] == [
            peer.certificate.serial_number,
            other.certificate.serial_number,
            root.certificate.serial_number,
        ]
    else:
        assert isinstance(verdict, RefusedError)
        assert (verdict.reason, verdict.flag) == ("certificate-revoked", Flag.REVOKED)


def test_a_peer_whose_issuer_has_no_list_is_refused_where_lists_are_demanded(issuer, authority, tmp_path, close_after):
    ours = Credentials.load(with_list(authority, tmp_path / "db", revocation_list(issuer)))
    peer = forge(forge_ca(issuer.issuer, "another intermediate", path_length=0))
    (tmp_path / "peer.pem").write_bytes(peer.key_pem + peer.chain_pem)
    client, server = meet(careless(False, tmp_path / "peer.pem"), tls.server_context(ours))
    close_after((client, server))
    assert judged(server).reason == "crl-missing"


LISTS = {
    "ended": (lambda ca: revocation_list(ca, ends=timedelta(hours=-1)), "CRL has expired"),
    "signed by another": (
        lambda ca: revocation_list(ca, signer=forge_ca(None, "a stranger")),
        "CRL signature failure",
    ),
    "of another CA": (lambda ca: revocation_list(forge_ca(None, "a stranger")), "unable to get certificate CRL"),
    "no list": (lambda _ca: b"nothing", "meshctl ca revoke"),
    "empty": (lambda _ca: b"", "meshctl ca revoke"),
    "damaged": (lambda ca: revocation_list(ca).replace(b"MI", b"AA", 1), "cannot be used"),
}


@pytest.mark.parametrize("name", LISTS)
def test_load_refuses_a_list_by_which_nobody_could_be_judged(name, issuer, authority, tmp_path):
    make, told = LISTS[name]
    with pytest.raises(CredentialsError, match=told) as raised:
        Credentials.load(with_list(authority, tmp_path / "db", make(issuer)))
    assert "crl.pem" in str(raised.value)


def test_load_refuses_our_own_certificate_when_it_is_revoked(issuer, authority, tmp_path):
    made = identity_dir(authority, tmp_path / "db", DB)
    own = Credentials.load(made)
    (made / "crl.pem").write_bytes(revocation_list(issuer, own.serial))
    with pytest.raises(CredentialsError, match="certificate revoked"):
        Credentials.load(made)


def test_a_well_made_forgery_is_accepted(issuer, db, tmp_path, close_after):
    """The table above tests what it names: the same helper makes certificates that pass."""
    forged = forge(issuer)
    (tmp_path / "peer.pem").write_bytes(forged.key_pem + forged.chain_pem)
    client, server = meet(careless(False, tmp_path / "peer.pem"), tls.server_context(db))
    close_after((client, server))
    assert judged(server) == WEB


def test_a_client_without_a_certificate_is_refused(db, close_after):
    client, server = meet(careless(False, None), tls.server_context(db))
    close_after((client, server))
    assert judged(server).reason == "no-certificate"
    # The peer is told by an alert, and a uProxy in its place would say so.
    assert tls.handshake_refusal(client.error).detail == "the peer ended the handshake: certificate required"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_1], ids=["1.2", "1.1"])
@pytest.mark.parametrize("we_serve", [True, False], ids=["as client", "as server"])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated:DeprecationWarning")
def test_older_tls_is_refused(version, we_serve, issuer, db, tmp_path, close_after):
    forged = forge(issuer)
    (tmp_path / "peer.pem").write_bytes(forged.key_pem + forged.chain_pem)
    theirs = careless(not we_serve, tmp_path / "peer.pem")
    theirs.maximum_version = version
    if we_serve:
        client, server = meet(theirs, tls.server_context(db))
    else:
        client, server = meet(tls.client_context(db), theirs)
    close_after((client, server))
    verdict = judged(server if we_serve else client)
    assert isinstance(verdict, RefusedError)
    assert verdict.reason in ("tls-version", "refused-by-peer")
    assert "version" in verdict.detail or "protocol" in verdict.detail


@pytest.mark.parametrize("alpn", [None, "http/1.1", "istio"])
@pytest.mark.parametrize("we_serve", [True, False], ids=["as client", "as server"])
def test_a_peer_without_alpn_h2_is_refused(alpn, we_serve, issuer, db, tmp_path, close_after):
    forged = forge(issuer)
    (tmp_path / "peer.pem").write_bytes(forged.key_pem + forged.chain_pem)
    theirs = careless(not we_serve, tmp_path / "peer.pem", alpn)
    if we_serve:
        client, server = meet(theirs, tls.server_context(db))
    else:
        client, server = meet(tls.client_context(db), theirs)
    close_after((client, server))
    verdict = judged(server if we_serve else client)
    assert verdict.reason == "alpn"
    assert verdict.flag is Flag.IDENTITY


def test_plaintext_on_the_tls_port_is_named(db):
    ours, theirs = socketpair()
    with theirs:
        theirs.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        side = Side(tls.server_context(db))
        side.shake_hands(ours, server_side=True)
        assert tls.handshake_refusal(side.error).reason == "not-tls"


def test_a_peer_that_hangs_up_is_named(db):
    ours, theirs = socketpair()
    theirs.close()
    side = Side(tls.server_context(db))
    side.shake_hands(ours, server_side=True)
    assert tls.handshake_refusal(side.error).reason == "closed"


def test_load_reports_whose_credentials_they_are(authority, tmp_path):
    directory = identity_dir(authority, tmp_path / "id", WEB)
    credentials = Credentials.load(directory, WEB)
    leaf = x509.load_pem_x509_certificate((directory / "chain.pem").read_bytes())
    assert credentials.identity == WEB
    assert credentials.serial == leaf.serial_number
    assert credentials.not_after == leaf.not_valid_after_utc.timestamp()
    assert "PRIVATE" not in repr(credentials)


@pytest.fixture
def good_dir(authority, tmp_path):
    return identity_dir(authority, tmp_path / "id", WEB)


def refused(directory: Path, expected: SpiffeId | None = None) -> str:
    with pytest.raises(CredentialsError) as raised:
        Credentials.load(directory, expected)
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "mend"),
    [("key.pem", "control.client.csr"), ("chain.pem", "meshctl ca issue"), ("bundle.pem", "meshctl ca issue")],
)
def test_load_names_a_missing_file(good_dir, name, mend):
    (good_dir / name).unlink()
    told = refused(good_dir)
    assert str(good_dir / name) in told
    assert "does not exist" in told
    assert mend in told


def test_load_refuses_another_identity(good_dir):
    told = refused(good_dir, DB)
    assert str(WEB) in told
    assert str(DB) in told
    assert "--identity-dir" in told


def test_load_refuses_a_key_of_another_certificate(good_dir):
    other = ec.generate_private_key(ec.SECP256R1())
    (good_dir / "key.pem").write_bytes(Forged(None, other, None).key_pem)
    told = refused(good_dir)
    assert "key.pem is not the key of" in told
    assert "meshctl ca issue" in told or "control.client.csr" in told


OTHER_KEY = Forged(None, ec.generate_private_key(ec.SECP256R1()), None).key_pem


def with_next_key(directory: Path, key: bytes) -> Path:
    (directory / "key.next.pem").write_bytes(key)
    (directory / "key.next.pem").chmod(0o600)
    return directory


@pytest.mark.parametrize("before", [OTHER_KEY, None], ids=["renewed", "joined"])
def test_load_takes_the_next_key_where_the_chain_is_its(good_dir, before):
    with_next_key(good_dir, (good_dir / "key.pem").read_bytes())
    (good_dir / "key.pem").unlink()
    if before is not None:
        (good_dir / "key.pem").write_bytes(before)
        (good_dir / "key.pem").chmod(0o600)
    assert Credentials.load(good_dir).identity == WEB


@pytest.mark.parametrize("next_key", [OTHER_KEY, b"", b"garbage"])
def test_load_keeps_the_key_while_the_next_one_has_no_chain(good_dir, next_key):
    assert Credentials.load(with_next_key(good_dir, next_key)).identity == WEB


@pytest.mark.parametrize(("chain_at", "rename_at"), list(combinations_with_replacement(range(6), 2)))
def test_load_during_a_renewal_finds_a_pair_that_fits(authority, good_dir, monkeypatch, chain_at, rename_at):
    """The writer puts the new chain into place, then renames the next key, each between any two reads."""
    renewed = identity_dir(authority, good_dir.with_name("renewed"), WEB)
    with_next_key(good_dir, (renewed / "key.pem").read_bytes())
    real, reads = tls._read, 0

    def write_what_is_due() -> None:
        if reads == chain_at:
            (renewed / "chain.pem").replace(good_dir / "chain.pem")
        if reads == rename_at:
            (good_dir / "key.next.pem").replace(good_dir / "key.pem")

    def read(*arguments, **options):
        nonlocal reads
        write_what_is_due()
        reads += 1
        return real(*arguments, **options)

    monkeypatch.setattr(tls, "_read", read)
    assert Credentials.load(good_dir).identity == WEB
    assert reads == 5
    write_what_is_due()
    monkeypatch.undo()
    assert Credentials.load(good_dir).identity == WEB


def test_load_refuses_two_keys_of_other_certificates(good_dir):
    (good_dir / "key.pem").write_bytes(OTHER_KEY)
    assert "key.pem is not the key of" in refused(with_next_key(good_dir, OTHER_KEY))


def test_load_refuses_a_next_key_that_others_can_open(good_dir):
    with_next_key(good_dir, OTHER_KEY).joinpath("key.next.pem").chmod(0o640)
    assert "key.next.pem has mode 0640" in refused(good_dir)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_load_refuses_a_key_that_others_can_open(good_dir, mode):
    (good_dir / "key.pem").chmod(mode)
    told = refused(good_dir)
    assert f"mode {mode:04o}" in told
    assert "chmod 600" in told


def test_load_refuses_an_expired_certificate(issuer, authority, tmp_path):
    forged = forge(issuer, not_before=timedelta(days=-2), not_after=timedelta(days=-1))
    told = refused(forged.write(tmp_path / "id", authority.bundle_pem))
    assert "expired at 20" in told
    assert "meshctl ca issue" in told


def test_load_refuses_a_certificate_of_the_future(issuer, authority, tmp_path):
    forged = forge(issuer, not_before=timedelta(minutes=30))
    told = refused(forged.write(tmp_path / "id", authority.bundle_pem))
    assert "not valid before" in told
    assert "clocks" in told


def test_load_refuses_a_leaf_that_is_no_svid(issuer, authority, tmp_path):
    forged = forge(issuer, [str(WEB), str(DB)])
    assert "exactly one URI SAN" in refused(forged.write(tmp_path / "id", authority.bundle_pem))


def test_load_refuses_a_chain_of_another_root(good_dir):
    (good_dir / "bundle.pem").write_bytes(pem(forge_ca(None, "another root").certificate))
    told = refused(good_dir)
    assert "is not accepted under" in told
    assert "issuer" in told


def test_load_refuses_a_chain_without_its_intermediate(good_dir):
    chain = (good_dir / "chain.pem").read_text()
    (good_dir / "chain.pem").write_text(chain[: chain.index("-----END CERTIFICATE-----") + 26])
    assert "is not accepted under" in refused(good_dir)


def test_load_refuses_too_long_a_chain(issuer, authority, tmp_path):
    told = refused(very_long_chain(issuer).write(tmp_path / "id", authority.bundle_pem))
    assert "holds 14 certificates" in told


def test_load_refuses_an_encrypted_key_without_asking(good_dir):
    key = serialization.load_pem_private_key((good_dir / "key.pem").read_bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (good_dir / "key.pem").write_bytes(encrypted)
    assert "is encrypted" in refused(good_dir)


@pytest.mark.parametrize("name", ["key.pem", "chain.pem", "bundle.pem"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"x" * (300 * 1024)],
    ids=["empty", "zeros", "broken", "huge"],
)
def test_load_names_the_file_that_is_damaged(good_dir, name, content):
    (good_dir / name).write_bytes(content)
    told = refused(good_dir)
    assert str(good_dir) in told


def test_a_certificate_in_the_key_file_is_not_presented(good_dir, issuer, db, close_after):
    stowaway = forge(issuer, [str(DB)])
    (good_dir / "key.pem").write_bytes(stowaway.chain_pem + (good_dir / "key.pem").read_bytes())
    client, server = meet(tls.client_context(Credentials.load(good_dir, WEB)), tls.server_context(db))
    close_after((client, server))
    assert judged(server) == WEB


@given(
    st.sampled_from(["key.pem", "chain.pem", "bundle.pem"]),
    st.integers(0, 5000),
    st.binary(max_size=8),
    st.integers(0, 8),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_refused_in_words_or_harmless(good_dir, name, at, noise, cut):
    content = (good_dir / name).read_bytes()
    at %= len(content) + 1
    (good_dir / name).write_bytes(content[:at] + noise + content[at + cut :])
    with contextlib.suppress(CredentialsError):
        assert Credentials.load(good_dir).identity == WEB
    (good_dir / name).write_bytes(content)


def test_load_does_not_wait_for_a_pipe(good_dir):
    (good_dir / "chain.pem").unlink()
    os.mkfifo(good_dir / "chain.pem")
    assert "not a regular file" in refused(good_dir)


def test_credentials_outlive_the_files_they_came_from(good_dir, db, close_after):
    """A rotation that is half done on disk cannot mix two keys: contexts are made from what was checked."""
    credentials = Credentials.load(good_dir)
    for file in good_dir.iterdir():
        file.unlink()
    client, server = meet(tls.client_context(credentials), tls.server_context(db))
    close_after((client, server))
    assert judged(server) == WEB


def test_a_bundle_of_two_roots_accepts_both(issuer, authority, tmp_path, web, close_after):
    """Two roots overlap while a mesh changes from one to the other."""
    other = forge_ca(None, "the next root", path_length=1)
    theirs = Credentials.load(
        forge(forge_ca(other, "the next intermediate", path_length=0), [str(DB)]).write(
            tmp_path / "db", authority.bundle_pem + pem(other.certificate)
        )
    )
    ours = Credentials.load(forge(issuer).write(tmp_path / "web", authority.bundle_pem + pem(other.certificate)))
    client, server = meet(tls.client_context(ours), tls.server_context(theirs))
    close_after((client, server))
    assert judged(client) == DB
    assert judged(server) == WEB
    client, server = meet(tls.client_context(web), tls.server_context(theirs))
    close_after((client, server))
    assert judged(client).reason == "unknown-ca"
