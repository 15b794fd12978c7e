"""A workload's key and request: made where the workload runs, kept when they are there."""

import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from control.client import csr
from control.client.csr import CsrError, make_request
from tests.support.certificates import DB, WEB


def test_key_and_request_fit_together(tmp_path):
    path = make_request(tmp_path / "web", WEB)
    assert path == tmp_path / "web" / "csr.pem"
    assert (tmp_path / "web").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "web" / "key.pem").stat().st_mode & 0o777 == 0o600
    pem = (tmp_path / "web" / "key.pem").read_bytes()
    assert pem.startswith(b"-----BEGIN PRIVATE KEY-----")
    key = serialization.load_pem_private_key(pem, None)
    assert isinstance(key.curve, ec.SECP256R1)
    request = x509.load_pem_x509_csr(path.read_bytes())
    assert request.is_signature_valid
    assert request.public_key() == key.public_key()
    assert list(request.subject) == []
    (extension,) = request.extensions
    assert extension.critical
    assert extension.value.get_values_for_type(x509.UniformResourceIdentifier) == [str(WEB)]
    assert sorted(entry.name for entry in (tmp_path / "web").iterdir()) == ["csr.pem", "key.pem"]


def test_a_key_that_is_there_is_kept(tmp_path):
    make_request(tmp_path, WEB)
    key = (tmp_path / "key.pem").read_bytes()
    request = x509.load_pem_x509_csr(make_request(tmp_path, DB).read_bytes())
    assert (tmp_path / "key.pem").read_bytes() == key
    assert request.public_key() == serialization.load_pem_private_key(key, None).public_key()


def pem(key, encryption=None) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        encryption or serialization.NoEncryption(),
    )


P256 = ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(
    ("content", "mode", "told"),
    [
        (pem(P256), 0o644, "others can read the key"),
        (pem(P256), 0o640, "mode 0640"),
        (pem(P256, serialization.BestAvailableEncryption(b"x")), 0o600, "not a plain private key"),
        (pem(rsa.generate_private_key(65537, 2048)), 0o600, "not an ECDSA P-256 key"),
        (pem(ec.generate_private_key(ec.SECP384R1())), 0o600, "not an ECDSA P-256 key"),
        (b"", 0o600, "not a plain private key"),
        (b"\0" * 50_000, 0o600, "not a plain private key"),
    ],
)
def test_a_key_that_cannot_be_used_is_left_and_named(tmp_path, content, mode, told):
    (tmp_path / "key.pem").write_bytes(content)
    (tmp_path / "key.pem").chmod(mode)
    with pytest.raises(CsrError, match=told):
        make_request(tmp_path, WEB)
    assert (tmp_path / "key.pem").read_bytes() == content
    assert not (tmp_path / "csr.pem").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "web").write_text("a file")
    with pytest.raises(CsrError, match="cannot write to"):
        make_request(tmp_path / "web", WEB)


def test_as_a_command(tmp_path):
    made = subprocess.run(
        [sys.executable, "-m", "control.client.csr", "--dir", tmp_path, "--id", str(WEB)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (made.returncode, made.stdout, made.stderr) == (0, f"{tmp_path / 'csr.pem'}\n", "")


def test_exit_statuses(tmp_path, capsys):
    (tmp_path / "web").write_text("a file")
    assert csr.main(["--dir", str(tmp_path / "web"), "--id", str(WEB)]) == 1
    assert "error: cannot write" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        csr.main(["--dir", str(tmp_path), "--id", "spiffe://cluster.local/web"])
    assert left.value.code == 2
    assert "spiffe://<trust domain>/ns/<namespace>/sa/<account>" in capsys.readouterr().err
