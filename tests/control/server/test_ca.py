"""The certificate authority: what it signs, what it refuses, and that it is whole or absent on disk."""

import os
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from control import durable
from control.api.identity import SpiffeId, proxy_hash
from control.client.csr import request
from control.client.x509 import check_svid, read_leaf
from control.server.ca import MAX_TTL_S, Authority, CaError, write_identity
from tests.support.certificates import DB, WEB

KEY = ec.generate_private_key(ec.SECP256R1())
CSR = request(KEY, WEB)


@pytest.fixture(scope="module")
def ca_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ca") / "ca"
    Authority.create(directory, "cluster.local")
    return directory


@pytest.fixture(scope="module")
def authority(ca_dir):
    return Authority.open(ca_dir)


def csr(key, *names: x509.GeneralName, subject: str = "", extensions=()) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else [])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, digest).public_bytes(serialization.Encoding.PEM)


def test_an_svid_is_as_designed(authority):
    before = datetime.now(UTC).replace(microsecond=0)
    leaf, intermediate = x509.load_pem_x509_certificates(authority.issue(CSR, WEB))
    after = datetime.now(UTC)
    assert intermediate == authority.intermediate
    assert leaf.public_key() == KEY.public_key()
    assert leaf.version is x509.Version.v3
    assert leaf.subject.rfc4514_string() == f"CN={proxy_hash(WEB)}"
    assert leaf.issuer == intermediate.subject
    assert isinstance(leaf.signature_hash_algorithm, hashes.SHA256)
    assert before <= leaf.not_valid_before_utc + timedelta(seconds=60) <= after
    assert before <= leaf.not_valid_after_utc - timedelta(hours=24) <= after
    facts = {type(e.value): (e.value, e.critical) for e in leaf.extensions}
    assert facts == {
        x509.SubjectAlternativeName: (
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(WEB))]),
            False,
        ),
        x509.KeyUsage: (x509.KeyUsage(True, *[False] * 8), True),
        x509.ExtendedKeyUsage: (
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
            False,
        ),
        x509.BasicConstraints: (x509.BasicConstraints(False, None), True),
        x509.SubjectKeyIdentifier: (x509.SubjectKeyIdentifier.from_public_key(KEY.public_key()), False),
        x509.AuthorityKeyIdentifier: (
            x509.AuthorityKeyIdentifier.from_issuer_public_key(intermediate.public_key()),
            False,
        ),
    }


def test_serial_numbers_are_random(authority):
    serials = {x509.load_pem_x509_certificate(authority.issue(CSR, WEB)).serial_number for _ in range(20)}
    assert len(serials) == 20
    assert min(serials) > 2**64


def test_the_ca_certificates_limit_the_chain(authority):
    for certificate, path_length in ((authority.root, 1), (authority.intermediate, 0)):
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert constraints.value == x509.BasicConstraints(True, path_length)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://cluster.local"]
    assert authority.root.public_key() != authority.intermediate.public_key()
    assert authority.bundle_pem.count(b"BEGIN") == 1


segments = st.from_regex(r"[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,60}", fullmatch=True)


@given(segments, segments)
def test_every_identity_of_the_mesh_comes_back_from_its_leaf(authority, namespace, account):
    identity = SpiffeId.parse(f"spiffe://cluster.local/ns/{namespace}/sa/{account}")
    chain = authority.issue(request(KEY, identity), identity, 60).decode()
    leaf = chain[: chain.index("-----END CERTIFICATE-----")] + "-----END CERTIFICATE-----"
    assert check_svid(read_leaf(ssl.PEM_cert_to_DER_cert(leaf)), "cluster.local") == identity


@pytest.mark.parametrize(
    ("name", "asked", "told"),
    [
        ("another trust domain", "spiffe://other.example/ns/shop/sa/web", "another trust domain"),
        ("a longer trust domain", "spiffe://x.cluster.local/ns/shop/sa/web", "another trust domain"),
    ],
)
def test_identities_of_other_meshes_are_refused(authority, name, asked, told):
    identity = SpiffeId.parse(asked)
    with pytest.raises(CaError, match=told):
        authority.issue(request(KEY, identity), identity)


URI = x509.UniformResourceIdentifier


@pytest.mark.parametrize(
    ("pem", "told"),
    [
        (csr(KEY, URI(str(DB))), "asks for 'spiffe://cluster.local/ns/shop/sa/db'"),
        (csr(KEY, URI(str(WEB)), URI(str(DB))), "asks for 'spiffe://cluster.local/ns/shop/sa/db'"),
        (csr(ec.generate_private_key(ec.SECP384R1())), "not an ECDSA P-256 key"),
        (csr(rsa.generate_private_key(65537, 2048)), "not an ECDSA P-256 key"),
        (csr(ed25519.Ed25519PrivateKey.generate()), "not an ECDSA P-256 key"),
        (b"", "not a readable PKCS #10"),
        (b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "not a readable"),
        (CSR * 100, "bytes"),
    ],
)
def test_requests_that_cannot_be_certified_are_refused(authority, pem, told):
    with pytest.raises(CaError, match=told):
        authority.issue(pem, WEB)


def test_a_request_without_possession_of_its_key_is_refused(authority):
    der = bytearray(x509.load_pem_x509_csr(CSR).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(CaError, match="signature is wrong"):
        authority.issue(forged, WEB)


def test_what_else_a_request_asks_for_is_not_granted(authority):
    greedy = csr(
        KEY,
        URI(str(WEB)),
        x509.DNSName("bank.example"),
        subject="root",
        extensions=[x509.BasicConstraints(True, None), x509.KeyUsage(*[True] * 7, False, False)],
    )
    leaf = x509.load_pem_x509_certificate(authority.issue(greedy, WEB))
    plain = x509.load_pem_x509_certificate(authority.issue(CSR, WEB))
    assert leaf.subject == plain.subject
    assert list(leaf.extensions) == list(plain.extensions)


@given(st.integers(0, 600), st.binary(min_size=0, max_size=6))
def test_damaged_requests_are_refused_or_certified_for_the_key_they_hold(authority, at, noise):
    der = bytearray(x509.load_pem_x509_csr(CSR).public_bytes(serialization.Encoding.DER))
    der[at % len(der) : at % len(der) + len(noise)] = noise
    try:
        chain = authority.issue(
            ssl.DER_cert_to_PEM_cert(bytes(der)).replace("CERTIFICATE", "CERTIFICATE REQUEST").encode(), WEB
        )
    except CaError:
        return
    assert x509.load_pem_x509_certificate(chain).public_key() == KEY.public_key()


@pytest.mark.parametrize("ttl_s", [0, -1, MAX_TTL_S + 1])
def test_lives_out_of_range_are_refused(authority, ttl_s):
    with pytest.raises(CaError, match="between one second and 30 days"):
        authority.issue(CSR, WEB, ttl_s)


def test_a_leaf_never_outlives_its_ca(authority):
    ending = Authority(authority.trust_domain, authority.root, authority.intermediate, authority._key)
    now = datetime.now(UTC)
    ending.intermediate = (
        x509.CertificateBuilder()
        .subject_name(authority.intermediate.subject)
        .issuer_name(authority.root.subject)
        .public_key(authority._key.public_key())
        .serial_number(5)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(hours=1))
        .sign(authority._key, hashes.SHA256())
    )
    assert ending.issue(CSR, WEB, 600)
    with pytest.raises(CaError, match="after the intermediate CA's own end"):
        ending.issue(CSR, WEB)


def test_files_of_a_ca_have_their_modes_and_keys_are_encrypted(ca_dir):
    assert ca_dir.stat().st_mode & 0o777 == 0o700
    modes = {file.name: file.stat().st_mode & 0o777 for file in ca_dir.iterdir()}
    assert modes == {
        "root.pem": 0o644,
        "intermediate.pem": 0o644,
        "root-key.pem": 0o600,
        "intermediate-key.pem": 0o600,
        "passphrase": 0o600,
    }
    passphrase = (ca_dir / "passphrase").read_bytes().strip()
    for name in ("root-key.pem", "intermediate-key.pem"):
        content = (ca_dir / name).read_bytes()
        assert content.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
        assert serialization.load_pem_private_key(content, passphrase)
        # Of 256 wrong keys one leaves padding that looks right: then what is inside is no key.
        with pytest.raises(ValueError, match=r"password|key data"):
            serialization.load_pem_private_key(content, b"wrong")


def test_a_passphrase_may_be_kept_elsewhere(tmp_path):
    secret = tmp_path / "secret"
    durable.write_new(secret, b"correct horse battery staple\n", 0o600)
    Authority.create(tmp_path / "ca", "cluster.local", secret)
    assert not (tmp_path / "ca" / "passphrase").exists()
    assert Authority.open(tmp_path / "ca", secret).issue(CSR, WEB)
    with pytest.raises(CaError, match="passphrase does not exist"):
        Authority.open(tmp_path / "ca")


@pytest.mark.parametrize(
    ("content", "mode", "told"),
    [
        (b"another passphrase entirely\n", 0o600, "wrong passphrase"),
        (b"", 0o600, "at least 20"),
        (b"short\n", 0o600, "at least 20"),
        (b"x" * 5000, 0o600, "more than 1024 bytes"),
        (b"correct horse battery staple\n", 0o644, "others can read the passphrase"),
        (b"correct horse battery staple\n", 0o640, "chmod 600"),
    ],
)
def test_passphrase_files_that_do_not_serve_are_named(tmp_path, ca_dir, content, mode, told):
    secret = tmp_path / "secret"
    durable.write_new(secret, content, mode)
    with pytest.raises(CaError, match=told):
        Authority.open(ca_dir, secret)


def test_a_ca_is_never_overwritten(ca_dir):
    files = {file: file.read_bytes() for file in ca_dir.iterdir()}
    with pytest.raises(CaError, match="never overwritten"):
        Authority.create(ca_dir, "cluster.local")
    assert {file: file.read_bytes() for file in ca_dir.iterdir()} == files
    assert [entry.name for entry in ca_dir.parent.iterdir()] == ["ca"]


def test_any_content_of_the_target_is_left_alone(tmp_path):
    (tmp_path / "ca").mkdir()
    (tmp_path / "ca" / "notes").write_text("mine")
    with pytest.raises(CaError, match="not empty"):
        Authority.create(tmp_path / "ca", "cluster.local")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CaError, match="not empty"):
        Authority.create(tmp_path / "file", "cluster.local")
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["ca", "file", "notes"]


def test_an_empty_directory_becomes_the_ca(tmp_path):
    (tmp_path / "ca").mkdir()
    Authority.create(tmp_path / "ca", "cluster.local")
    assert Authority.open(tmp_path / "ca").trust_domain == "cluster.local"


@pytest.mark.parametrize("failing", range(5))
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, failing):
    write, writes = durable.write_new, []

    def write_until_full(path, content, mode=0o644):
        writes.append(path)
        if len(writes) > failing:
            raise OSError(28, "No space left on device")
        write(path, content, mode)

    monkeypatch.setattr(durable, "write_new", write_until_full)
    with pytest.raises(CaError, match="No space left"):
        Authority.create(tmp_path / "ca", "cluster.local")
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_race_one_is_refused(tmp_path):
    outcomes = []

    def create() -> None:
        try:
            outcomes.append(Authority.create(tmp_path / "ca", "cluster.local").root_fingerprint)
        except CaError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=create) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if "never overwritten" not in outcome]
    assert winners == [Authority.open(tmp_path / "ca").root_fingerprint]
    assert [entry.name for entry in tmp_path.iterdir()] == ["ca"]


@pytest.mark.parametrize("trust_domain", ["", "Cluster.Local", "a/b", "a:1", "x" * 256])
def test_trust_domains_are_checked_first(tmp_path, trust_domain):
    with pytest.raises(CaError, match="trust domain"):
        Authority.create(tmp_path / "ca", trust_domain)
    assert list(tmp_path.iterdir()) == []


def test_the_longest_trust_domain_has_a_ca(tmp_path):
    Authority.create(tmp_path / "ca", "x" * 255)
    assert Authority.open(tmp_path / "ca").trust_domain == "x" * 255


@pytest.fixture
def copied(ca_dir, tmp_path):
    """A CA to damage."""
    for file in ca_dir.iterdir():
        durable.write_new(tmp_path / file.name, file.read_bytes(), file.stat().st_mode & 0o777)
    return tmp_path


def test_a_key_that_is_not_encrypted_is_refused(copied):
    plain = KEY.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (copied / "intermediate-key.pem").write_bytes(plain)
    with pytest.raises(CaError, match="is not encrypted"):
        Authority.open(copied)


def test_a_ca_of_mixed_parts_is_refused(copied, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "ca"
    Authority.create(other, "cluster.local")
    intermediate = (copied / "intermediate.pem").read_bytes()
    (copied / "intermediate.pem").write_bytes((other / "intermediate.pem").read_bytes())
    with pytest.raises(CaError, match=r"is not the key of .*intermediate\.pem"):
        Authority.open(copied)
    (copied / "intermediate.pem").write_bytes(intermediate)
    (copied / "root.pem").write_bytes((other / "root.pem").read_bytes())
    with pytest.raises(CaError, match="does not hold a CA"):
        Authority.open(copied)


@pytest.mark.parametrize("name", ["root.pem", "intermediate.pem", "intermediate-key.pem", "passphrase"])
@pytest.mark.parametrize("content", [None, b"", b"\0" * 64, b"x" * 100_000], ids=["missing", "empty", "zeros", "huge"])
def test_a_damaged_ca_is_named(copied, name, content):
    if content is None:
        os.unlink(copied / name)
    else:
        (copied / name).write_bytes(content)
    with pytest.raises(CaError) as raised:
        Authority.open(copied)
    assert str(copied) in str(raised.value)


def test_issuing_needs_no_root_key(copied):
    (copied / "root-key.pem").unlink()
    assert Authority.open(copied).issue(CSR, WEB)


def test_an_identity_directory_is_written_by_rename(authority, tmp_path):
    directory = tmp_path / "web"
    write_identity(directory, authority.issue(CSR, WEB), authority.bundle_pem)
    assert directory.stat().st_mode & 0o777 == 0o700
    old = (directory / "chain.pem").open("rb")
    with old:
        write_identity(directory, authority.issue(CSR, WEB), authority.bundle_pem)
        assert old.read() != (directory / "chain.pem").read_bytes()
    assert sorted(entry.name for entry in directory.iterdir()) == ["bundle.pem", "chain.pem"]


def test_an_identity_directory_that_cannot_be_written_is_named(authority, tmp_path):
    (tmp_path / "web").write_text("a file")
    with pytest.raises(CaError, match="cannot write the certificate"):
        write_identity(tmp_path / "web", authority.issue(CSR, WEB), authority.bundle_pem)
