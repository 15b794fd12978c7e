"""`meshctl` as operators and programs use it: output, exit statuses, help."""

import json
import subprocess
import sys
from types import ModuleType

import pytest
from cryptography import x509

from control.client.csr import make_request
from tests.support.certificates import DB, WEB
from uproxy.tls import Credentials, CredentialsError

GOOD = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: web-1, namespace: shop}
spec: {address: 10.1.0.1, serviceAccount: web, labels: {app: web}}
"""


@pytest.fixture
def ca(meshctl, tmp_path):
    assert meshctl("ca", "init", "--dir", tmp_path / "ca", "--trust-domain", "cluster.local")[0] == 0
    return tmp_path / "ca"


def test_a_workload_gets_an_identity(meshctl, ca, tmp_path):
    request = make_request(tmp_path / "web", WEB)
    status, out, err = meshctl(
        "ca", "issue", "--dir", ca, "--csr", request, "--id", WEB, "--out", tmp_path / "web", "-o", "json"
    )
    assert (status, err) == (0, "")
    credentials = Credentials.load(tmp_path / "web", WEB)
    answer = json.loads(out)
    assert answer["identity"] == str(WEB)
    assert int(answer["serial"], 16) == credentials.serial
    assert credentials.not_after - credentials.not_before == 24 * 3600 + 60


def test_the_life_of_a_certificate_can_be_chosen(meshctl, ca, tmp_path):
    request = make_request(tmp_path / "web", WEB)
    issue = ("ca", "issue", "--dir", ca, "--csr", request, "--id", WEB, "--out", tmp_path / "web", "--ttl")
    assert meshctl(*issue, "90m")[0] == 0
    credentials = Credentials.load(tmp_path / "web")
    assert credentials.not_after - credentials.not_before == 90 * 60 + 60
    for wrong in ("24", "1.5h", "h", "-1h", "1w", "", "٣h"):
        status, _, err = meshctl(*issue[:-1], f"--ttl={wrong}")
        assert status == 2
        assert "is not a time such as 30s, 90m, 24h or 7d" in err
    for wrong in ("0s", "31d", "999999999d"):
        status, _, err = meshctl(*issue, wrong)
        assert status == 1
        assert "between one second and 30 days" in err
    assert Credentials.load(tmp_path / "web") == credentials


def test_certificates_are_revoked_one_after_the_other(meshctl, ca, tmp_path):
    serials = []
    for name, identity in (("web", WEB), ("db", DB)):
        request = make_request(tmp_path / name, identity)
        issue = ("ca", "issue", "--dir", ca, "--csr", request, "--id", identity, "--out", tmp_path / name)
        assert meshctl(*issue)[0] == 0
        serials.append(Credentials.load(tmp_path / name).serial)
    status, out, err = meshctl("ca", "revoke", "--dir", ca, "--serial", f"{serials[0]:x}", "-o", "json")
    assert (status, err, json.loads(out)) == (0, "", {"file": str(ca / "crl.pem"), "revoked": 1})
    status, out, _ = meshctl("ca", "revoke", "--dir", ca, "--certificate", tmp_path / "db" / "chain.pem")
    assert (status, "revoked  2" in out) == (0, True)
    found = x509.load_pem_x509_crl((ca / "crl.pem").read_bytes())
    assert {entry.serial_number for entry in found} == set(serials)
    (tmp_path / "web" / "crl.pem").write_bytes((ca / "crl.pem").read_bytes())
    with pytest.raises(CredentialsError, match="certificate revoked"):
        Credentials.load(tmp_path / "web")


def test_what_cannot_be_revoked_is_said(meshctl, ca, tmp_path):
    assert meshctl("ca", "init", "--dir", tmp_path / "other", "--trust-domain", "cluster.local")[0] == 0
    for argv, status, told in [
        ((), 1, "say what to revoke"),
        (("--serial", "xyz"), 2, "no serial number"),
        (("--certificate", tmp_path / "nothing.pem"), 1, "cannot be read"),
        (("--certificate", ca / "passphrase"), 1, "no certificate in PEM"),
        (("--certificate", ca / "intermediate.pem"), 1, "not of this CA"),
    ]:
        answer = meshctl("ca", "revoke", "--dir", ca, *argv)
        assert (answer[0], answer[1], told in answer[2]) == (status, "", True)
    assert not (ca / "crl.pem").exists()
    assert meshctl("ca", "revoke", "--dir", tmp_path / "other", "--serial", "1")[0] == 0
    (tmp_path / "other" / "crl.pem").rename(ca / "crl.pem")
    status, _, err = meshctl("ca", "revoke", "--dir", ca, "--serial", "1")
    assert (status, "not signed by this CA" in err) == (1, True)


def test_init_tells_what_it_made(meshctl, tmp_path):
    status, out, err = meshctl("ca", "init", "--dir", tmp_path / "ca", "--trust-domain", "mesh.example", "-o", "json")
    assert (status, err) == (0, "")
    answer = json.loads(out)
    root = x509.load_pem_x509_certificate((tmp_path / "ca" / "root.pem").read_bytes())
    assert answer["trust_domain"] == "mesh.example"
    assert answer["passphrase"] == str(tmp_path / "ca" / "passphrase")
    assert answer["root_until"] == root.not_valid_after_utc.isoformat()
    status, out, _ = meshctl("ca", "init", "--dir", tmp_path / "other", "--trust-domain", "mesh.example")
    assert status == 0
    assert "trust domain        mesh.example\n" in out
    passphrase = (tmp_path / "ca" / "passphrase").read_text().strip()
    assert passphrase not in out


def test_refusals_are_one_line_on_stderr(meshctl, ca, tmp_path):
    request = make_request(tmp_path / "web", WEB)
    out_dir = tmp_path / "out"
    issue = ("ca", "issue", "--csr", request, "--out", out_dir)
    for argv, told in [
        (("ca", "init", "--dir", ca, "--trust-domain", "cluster.local"), "never overwritten"),
        ((*issue, "--dir", ca, "--id", DB), "asks for"),
        ((*issue, "--dir", tmp_path / "nowhere", "--id", WEB), "meshctl ca init"),
        ((*issue, "--dir", ca, "--id", WEB, "--passphrase-file", tmp_path / "nothing"), "does not exist"),
        (("ca", "issue", "--csr", tmp_path / "no.pem", "--out", out_dir, "--dir", ca, "--id", WEB), "cannot be read"),
    ]:
        status, out, err = meshctl(*argv)
        assert (status, out) == (1, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert told in err
    assert not out_dir.exists()


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("ca",),
        ("ca", "init"),
        ("nonsense",),
        ("ca", "issue", "--dir", "x", "--csr", "x", "--out", "x", "--id", "cluster.local/ns/shop/sa/web"),
        ("validate",),
        ("validate", "-f"),
        ("validate", "-f", "x", "--trust-domain", "Not A Domain"),
        ("demo", "--output", "yaml"),
        ("bench",),
        ("bench", "run", "--peer", "ztunnel"),
        ("bench", "compare", "before"),
        ("apply",),
        ("apply", "-f"),
        ("diff",),
        ("get",),
        ("get", "all", "-o", "xml"),
        ("label",),
        ("token",),
        ("token", "create", "web", "--ttl", "10"),
        ("status", "shop"),
        ("up", "--port", "0"),
        ("up", "--port", "65536"),
        ("up", "--listen", "localhost"),
        ("up", "--host", "a b"),
        ("up", "--trust-domain", "Not A Domain"),
        ("serve",),
        ("serve", "--broker", "broker.example"),
        ("serve", "--broker", "mqtt://broker.example:1883"),
    ],
)
def test_what_is_not_understood_exits_with_2(meshctl, argv):
    status, out, err = meshctl(*argv)
    assert (status, out) == (2, "")
    assert "usage: meshctl" in err


@pytest.mark.parametrize(
    "command",
    [
        *(
            "",
            "ca",
            "ca init",
            "ca issue",
            "ca revoke",
            "validate",
            "demo",
            "up",
            "serve",
            "apply",
            "diff",
            "delete",
            "get",
            "label",
        ),
        *("annotate", "check", "token", "token create", "status", "bench", "bench run", "bench compare"),
    ],
)
def test_every_command_explains_itself(meshctl, command):
    status, out, _ = meshctl(*command.split(), "--help")
    assert status == 0
    if command not in ("ca", "token", "bench"):
        assert "example" in out
    assert max(map(len, out.splitlines())) <= 120


def test_validate_counts_what_it_takes(meshctl, tmp_path):
    (tmp_path / "mesh.yaml").write_text(GOOD)
    assert meshctl("validate", "-f", tmp_path / "mesh.yaml") == (0, "ok: 2 resources, 0 warnings\n", "")
    status, out, _ = meshctl("validate", "-f", tmp_path / "mesh.yaml", "-o", "json")
    assert status == 0
    assert json.loads(out) == {"ok": True, "resources": 2, "errors": [], "warnings": []}


def test_validate_names_every_error_of_every_file(meshctl, tmp_path):
    (tmp_path / "a.yaml").write_text(GOOD.replace("port: 80,", "port: 80000,"))
    (tmp_path / "b.yaml").write_bytes(b"apiVersion: v1\nkind: \xff\n")
    files = (tmp_path / "a.yaml", tmp_path / "b.yaml", tmp_path / "c.yaml")
    status, out, err = meshctl("validate", "-f", *files)
    assert (status, out) == (1, "refused: 3 errors\n")
    lines = err.splitlines()
    assert lines[0].startswith(f"error: {tmp_path}/a.yaml:6: spec.ports[0].port: ")
    assert lines[1] == f"error: {tmp_path}/b.yaml:2: is not UTF-8; save it as UTF-8 text"
    assert lines[2] == f"error: {tmp_path}/c.yaml: cannot be read: No such file or directory"
    status, out, _ = meshctl("validate", "-f", files[0], "-f", files[1], "-o", "json")
    assert status == 1
    answer = json.loads(out)
    assert not answer["ok"]
    assert answer["errors"][0]["file"] == str(tmp_path / "a.yaml")
    assert answer["errors"][0]["line"] == 6
    assert answer["errors"][0]["field"] == "spec.ports[0].port"


def test_validate_follows_references_between_files(meshctl, tmp_path):
    service, workload = GOOD.split("---\n")
    (tmp_path / "service.yaml").write_text(service)
    (tmp_path / "workload.yaml").write_text(workload)
    status, out, err = meshctl("validate", "-f", tmp_path / "service.yaml")
    assert (status, out) == (0, "ok: 1 resource, 1 warning\n")
    assert err.startswith(f"warning: {tmp_path}/service.yaml:")
    assert meshctl("validate", "-f", tmp_path / "service.yaml", tmp_path / "workload.yaml")[2] == ""


def test_validate_reads_stdin(tmp_path):
    checked = subprocess.run(
        [sys.executable, "-m", "control.cli", "validate", "-f", "-"],
        input=GOOD,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "ok: 2 resources, 0 warnings\n", "")


@pytest.mark.parametrize("status", [0, 1])
def test_demo_is_that_of_the_lab(meshctl, monkeypatch, status):
    called = []
    lab = ModuleType("benchmarks.lab.demo")
    lab.main = lambda argv: called.append(argv) or status
    monkeypatch.setitem(sys.modules, "benchmarks.lab.demo", lab)
    assert meshctl("demo", "--output", "json")[0] == status
    assert called == [["--output", "json"]]


def test_the_version_is_that_of_the_distribution(meshctl):
    status, out, _ = meshctl("--version")
    assert status == 0
    assert out.startswith("meshctl 0.")
