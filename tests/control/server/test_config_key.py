"""The config key: certified for one use, encrypted at rest, replaced when it is damaged or old."""

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import ExtensionOID

from control.api.signing import CONFIG_KEY_OID, SIGNATURE_BYTES
from control.server.ca import Authority, CaError
from control.server.signing import CONFIG_KEY_FILE, LIFE, ConfigKey

NOW = 1_800_000_000.0
DAY_S = 24 * 3600


@pytest.fixture
def ca_dir(tmp_path):
    Authority.create(tmp_path / "ca", "cluster.local")
    return tmp_path / "ca"


@pytest.fixture
def authority(ca_dir):
    return Authority.open(ca_dir)


def opened(ca_dir, authority, now=NOW):
    return ConfigKey.open(ca_dir, authority, now)


def test_its_certificate_is_good_for_configuration_alone(ca_dir, authority):
    der, intermediate = opened(ca_dir, authority).certificates
    leaf = x509.load_der_x509_certificate(der)
    leaf.verify_directly_issued_by(x509.load_der_x509_certificate(intermediate))
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == ["spiffe://cluster.local/ns/mesh-system/sa/control-plane"]
    usage = leaf.extensions.get_extension_for_oid(ExtensionOID.EXTENDED_KEY_USAGE)
    assert usage.critical
    assert [oid.dotted_string for oid in usage.value] == [CONFIG_KEY_OID]
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert leaf.not_valid_after_utc.timestamp() == NOW + LIFE.total_seconds()


def test_it_signs_for_its_certificate(ca_dir, authority):
    key = opened(ca_dir, authority)
    signature = key.sign(b"message")
    assert len(signature) == SIGNATURE_BYTES
    public = x509.load_der_x509_certificate(key.certificates[0]).public_key()
    assert isinstance(public, Ed25519PublicKey)
    public.verify(signature, b"message")


def test_it_is_kept_encrypted_for_the_next_start(ca_dir, authority):
    first = opened(ca_dir, authority)
    path = ca_dir / CONFIG_KEY_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(TypeError, match="encrypted"):
        serialization.load_pem_private_key(path.read_bytes(), None)
    again = opened(ca_dir, authority, NOW + LIFE.total_seconds() / 2 - 1)
    assert again.certificates == first.certificates
    assert again.sign(b"m") == first.sign(b"m")


def test_it_is_due_at_half_its_life_and_renewed_at_a_start_after_that(ca_dir, authority):
    first = opened(ca_dir, authority)
    half = NOW + LIFE.total_seconds() / 2
    assert not first.due(half - 1)
    assert first.due(half)
    second = opened(ca_dir, authority, half)
    assert second.certificates != first.certificates
    assert not second.due(half)


def test_a_renewed_key_is_the_one_that_is_kept(ca_dir, authority):
    key = opened(ca_dir, authority)
    before = key.certificates
    key.renew(NOW + DAY_S)
    assert key.certificates != before
    assert opened(ca_dir, authority, NOW + DAY_S).certificates == key.certificates


@pytest.mark.parametrize("damage", ["empty", "cut", "other CA", "other key"])
def test_one_that_cannot_be_used_is_replaced(ca_dir, authority, tmp_path, damage, caplog):
    path = ca_dir / CONFIG_KEY_FILE
    old = opened(ca_dir, authority).certificates
    content = path.read_bytes()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "other CA":
            passphrase = (ca_dir / "passphrase").read_bytes()
            Authority.create(tmp_path / "other", "cluster.local", write(tmp_path / "passphrase", passphrase))
            (tmp_path / "other" / "passphrase").write_bytes(passphrase)
            (tmp_path / "other" / "passphrase").chmod(0o600)
            ConfigKey.open(tmp_path / "other", Authority.open(tmp_path / "other"), NOW)
            path.write_bytes((tmp_path / "other" / CONFIG_KEY_FILE).read_bytes())
        case "other key":
            path.unlink()
            opened(ca_dir, authority)
            other = path.read_bytes()
            mark = b"-----BEGIN CERTIFICATE-----"
            path.write_bytes(other[: other.index(mark)] + content[content.index(mark) :])
    new = opened(ca_dir, authority)
    assert new.certificates != old
    assert "is replaced" in caplog.text
    x509.load_der_x509_certificate(new.certificates[0]).verify_directly_issued_by(authority.intermediate)


def write(path, content):
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def test_a_passphrase_kept_elsewhere_is_used(tmp_path):
    passphrase = write(tmp_path / "passphrase", b"a passphrase that is long enough\n")
    authority = Authority.create(tmp_path / "ca", "cluster.local", passphrase)
    key = ConfigKey.open(tmp_path / "ca", authority, NOW, passphrase)
    assert ConfigKey.open(tmp_path / "ca", authority, NOW, passphrase).certificates == key.certificates
    with pytest.raises(CaError, match="does not exist"):
        ConfigKey.open(tmp_path / "ca", authority, NOW)


def test_it_never_outlives_the_intermediate(ca_dir, authority):
    end = authority.intermediate.not_valid_after_utc.timestamp()
    with pytest.raises(CaError, match="the intermediate CA ends at"):
        opened(ca_dir, authority, end - LIFE.total_seconds() + 1)


def test_one_made_while_the_clock_was_ahead_is_replaced(ca_dir, authority):
    ahead = opened(ca_dir, authority, NOW + 90 * DAY_S)
    assert ahead.due(NOW)
    assert not ahead.due(NOW + 90 * DAY_S)
    now = opened(ca_dir, authority)
    assert now.certificates != ahead.certificates
    assert not now.due(NOW)


def test_one_that_lives_serves_on_where_it_cannot_be_renewed(ca_dir, authority, monkeypatch, caplog):
    end = authority.intermediate.not_valid_after_utc.timestamp()
    last = opened(ca_dir, authority, end - LIFE.total_seconds())
    again = opened(ca_dir, authority, end - DAY_S)
    assert again.certificates == last.certificates
    assert "the config key is not renewed, and serves on: the intermediate CA ends at" in caplog.text
    with pytest.raises(CaError, match="the intermediate CA ends at"):
        opened(ca_dir, authority, end + 1)
