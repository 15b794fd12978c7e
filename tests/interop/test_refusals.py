"""Connections that are not made: what the caller sees, and that nothing reaches the application."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks.pairs import MESH
from tests.support.envoy import PATIENCE_S, Tunnel, tunnel

pytestmark = pytest.mark.root

DENY_ALL = """\
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
"""


def access_log(path: Path, wanted: str) -> dict[str, str]:
    """The record that mentions `wanted`; the log is written behind the connection."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for line in path.read_text().splitlines() if path.exists() else []:
            if wanted in line:
                return json.loads(line)
        time.sleep(0.05)
    raise AssertionError(f"{path} mentions no {wanted!r}:\n{path.read_text() if path.exists() else '(no file)'}")


def refused(way: Tunnel, expected: tuple[str, ...]) -> None:
    started = time.monotonic()
    assert way.refused_how() in expected
    assert time.monotonic() - started < PATIENCE_S / 2
    way.listener.settimeout(0.2)
    with pytest.raises(TimeoutError):
        way.listener.accept()


def test_an_envoy_that_policy_forbids_gets_401(tmp_path):
    with tunnel("envoy", "uproxy", tmp_path, server_mesh=MESH + DENY_ALL) as way:
        for _ in range(3):
            refused(way, ("fin", "reset"))
        record = access_log(tmp_path / "db" / "access.log", '"DENY"')
        assert record["src.identity"] == "spiffe://cluster.local/ns/shop/sa/web"
        assert "shop/nobody" in record["error"]


def test_a_uproxy_that_policy_forbids_resets_its_application_and_says_why(tmp_path):
    with tunnel("uproxy", "uproxy", tmp_path, server_mesh=MESH + DENY_ALL) as way:
        refused(way, ("reset",))
        theirs = access_log(tmp_path / "db" / "access.log", '"DENY"')
        ours = access_log(tmp_path / "web" / "access.log", '"DENY"')
        assert "401" in ours["error"]
        assert ours["request_id"] == theirs["request_id"], "one id in both logs"


@pytest.mark.parametrize("authority", ["10.77.0.2", "10.77.0.1:8080"])
def test_an_envoy_that_asks_for_nonsense_gets_400(tmp_path, authority: str):
    with tunnel("envoy", "uproxy", tmp_path, client_authority=authority) as way:
        refused(way, ("fin", "reset"))
        record = access_log(tmp_path / "db" / "access.log", "error")
        assert record["response_flags"] == "DENY"
        with pytest.raises(TimeoutError):
            way.listener.accept()


def test_an_envoy_may_ask_by_the_services_name(tmp_path):
    name = "db.shop.svc.cluster.local:8080"
    with tunnel("envoy", "uproxy", tmp_path, client_authority=name) as way, way.connected() as (near, far):
        near.sendall(b"hello")
        assert far.recv(5) == b"hello"


def test_a_uproxy_resets_its_application_when_envoy_knows_no_such_authority(tmp_path):
    """The Envoy serves 8080 and 8081; this service leads to 8090 of the same address."""
    mesh = MESH.replace("port: 8080}", "port: 8080, targetPort: 8090}")
    with tunnel("uproxy", "envoy", tmp_path, client_mesh=mesh) as way:
        refused(way, ("reset",))
        assert "404" in access_log(tmp_path / "web" / "access.log", "error")["error"]


def test_a_server_with_another_identity_than_expected_is_never_spoken_to(tmp_path):
    """The Envoy holds db's certificate; web's configuration says that the workload there is `ledger`."""
    mesh = MESH.replace("serviceAccount: db", "serviceAccount: ledger")
    with tunnel("uproxy", "envoy", tmp_path, client_mesh=mesh) as way:
        refused(way, ("reset",))
        record = access_log(tmp_path / "web" / "access.log", "error")
        assert record["response_flags"] == "IDENTITY_ERROR"
        assert "sa/ledger" in record["error"]
