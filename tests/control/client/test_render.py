"""The child that turns files into frames."""

from __future__ import annotations

import struct

import msgpack
import pytest

from control.api import messages
from control.client import render

WORKLOAD = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec: {address: 10.0.0.1, serviceAccount: web}
"""
POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec:
  rules:
"""
OPTIONS = ["--trust-domain=cluster.local", "--epoch=3", "--version=7", "--issued-at=1000"]


@pytest.fixture
def rendered(monkeypatch, capfdbinary):
    """Runs the child's main here, and gives its status, its frames and what it said."""
    monkeypatch.setattr("resource.setrlimit", lambda *limits: None)

    def run(*arguments):
        status = render.main([*OPTIONS, *map(str, arguments)])
        said = capfdbinary.readouterr()
        return status, list(frames(said.out)), said.err.decode()

    return run


def frames(data):
    while data:
        (length,) = struct.unpack("!I", data[:4])
        topic, payload = msgpack.unpackb(data[4 : 4 + length])
        yield topic, messages.decode(payload)
        data = data[4 + length :]


def test_records_are_framed_with_the_stamp_that_was_asked_for(tmp_path, rendered):
    (tmp_path / "a.yaml").write_text(WORKLOAD)
    status, found, said = rendered(tmp_path / "a.yaml")
    assert (status, said) == (0, "")
    (topic, workload), (where, shard) = found
    assert topic.startswith("mesh/v1/cluster.local/wl/")
    assert where == "mesh/v1/cluster.local/addr/b3"
    for envelope in (workload, shard):
        assert (envelope.epoch, envelope.version, envelope.issued_at) == (3, 7, 1000)
    assert workload.body["addresses"] == ["10.0.0.1"]
    assert shard.body == {"addresses": {"10.0.0.1": ["w", "shop", "web-1", "web", {"app": "web"}]}, "signature": b""}


def test_a_directory_means_its_yaml_files(tmp_path, rendered):
    (tmp_path / "a.yaml").write_text(WORKLOAD)
    (tmp_path / "b.yml").write_text(WORKLOAD.replace("web-1", "web-2").replace("0.1", "0.2"))
    (tmp_path / "notes.txt").write_text("no: [yaml")
    (tmp_path / ".a.yaml.swp.yaml").write_text("no: [yaml")
    (tmp_path / ".#a.yaml").symlink_to(tmp_path / "nowhere")
    (tmp_path / "deeper.yaml").mkdir()
    status, found, said = rendered(tmp_path)
    assert (status, said) == (0, "")
    assert [topic.split("/")[5] for topic, _ in found if "/wl/" in topic] == ["web-1", "web-2"]


def test_a_file_with_a_byte_order_mark_is_read(tmp_path, rendered):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbf" + WORKLOAD.encode())
    assert rendered(tmp_path / "a.yaml")[0] == 0


def test_warnings_go_to_standard_error_and_refuse_nothing(tmp_path, rendered):
    (tmp_path / "a.yaml").write_text(POLICY.replace("  rules:\n", "  selector: {matchLabels: {app: x}}\n"))
    status, found, said = rendered(tmp_path / "a.yaml")
    assert (status, len(found)) == (0, 1)
    assert "a.yaml:5: spec.selector: selects no WorkloadEntry" in said


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (WORKLOAD.replace("10.0.0.1", "x").encode(), "a.yaml:4: spec.address: 'x' is not an IP address"),
        (
            WORKLOAD.encode() + b"---\n" + WORKLOAD.encode(),
            "a.yaml:8: metadata.name: WorkloadEntry shop/web-1 is declared",
        ),
        (b"a: \xff\n", "a.yaml: byte 3 is not UTF-8; save it as UTF-8"),
        (
            (
                POLICY + "  - from: [{source: {principals: [" + "'cluster.local/ns/shop/*', " * 20_000 + "]}}]\n"
            ).encode(),
            "mesh/v1/cluster.local/policy/shop/p: a record of",
        ),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(tmp_path, rendered, content, expected):
    (tmp_path / "a.yaml").write_bytes(content)
    status, found, said = rendered(tmp_path / "a.yaml")
    assert (status, found) == (render.REFUSED, [])
    assert expected in said


def test_errors_of_all_files_come_at_once(tmp_path, rendered):
    (tmp_path / "a.yaml").write_text(WORKLOAD.replace("10.0.0.1", "x"))
    (tmp_path / "b.yaml").write_text("a: [")
    status, found, said = rendered(tmp_path, tmp_path / "missing.yaml")
    assert (status, found) == (render.REFUSED, [])
    assert "a.yaml:4: " in said
    assert "b.yaml:" in said
    assert "missing.yaml: cannot be read: No such file or directory" in said


def test_a_trust_domain_that_is_none_is_refused(tmp_path, rendered):
    (tmp_path / "a.yaml").write_text(WORKLOAD)
    status, found, said = rendered("--trust-domain=No", tmp_path)
    assert (status, found) == (render.REFUSED, [])
    assert "'No': a trust domain has only a-z" in said
