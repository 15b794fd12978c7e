"""Policies in dry run, and those that audit, at a running uProxy: in the access log, counted, and not done."""

from __future__ import annotations

import http.client
import json
from pathlib import Path

import pytest

from benchmarks import pairs
from benchmarks.pairs import APP, MESH
from tests.support.envoy import assert_no_bug_was_logged
from tests.support.raw_peer import PATIENCE_S, Server
from tests.support.site import eventually

pytestmark = pytest.mark.root

POLICY = """\
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: no-mallory
  namespace: shop
  annotations: {istio.io/dry-run: "true"}
spec:
  selector: {matchLabels: {app: db}}
  action: DENY
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/mallory]}}]
"""
ALLOW_WEB = """\
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web-only, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]
"""


def lines(server: Server) -> list[dict[str, str]]:
    return [json.loads(line) for line in (server.wire.directory / "db" / "access.log").read_text().splitlines()]


def counted(server: Server, metric: str = "uproxy_dry_run") -> list[str]:
    with server.wire.db.entered():
        connection = http.client.HTTPConnection(server.wire.db_address, 15020, timeout=PATIENCE_S)
        connection.connect()
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return [line for line in text.splitlines() if line.startswith(metric)]


def ask(server: Server, name: str) -> bytes:
    with server.peer(name) as peer:
        status = peer.ask([(b":method", b"CONNECT"), (b":authority", b"10.77.0.2:8080")]).status
        if status == b"200":
            server.listener.accept()[0].close()
        return status


@pytest.mark.parametrize("dry", [True, False], ids=["in dry run", "enforced"])
def test_a_deny_in_dry_run_is_told_and_not_done(dry: bool, tmp_path: Path) -> None:
    policy = POLICY if dry else POLICY.replace('"true"', '"false"')
    with (
        pairs.wire(tmp_path, extra=("mallory",)) as wire,
        pairs.uproxy_server(wire, mesh=MESH + policy) as process,
        wire.db.listen(APP, PATIENCE_S) as listener,
    ):
        server = Server(wire, process.pid, listener)
        assert ask(server, "web") == b"200"
        assert ask(server, "mallory") == (b"200" if dry else b"401")
        eventually(lambda: len(lines(server)) == 2)
        assert [line.get("dry_run") for line in lines(server)] == [
            None,
            "denied: denied by shop/no-mallory[0]" if dry else None,
        ]
        assert counted(server) == [f"uproxy_dry_run_{word}_total {int(dry)}" for word in ("allowed", "denied")]
        assert_no_bug_was_logged(wire)


def test_an_allow_in_dry_run_refuses_nobody_and_lets_nobody_in(tmp_path: Path) -> None:
    rehearsed = POLICY.replace("DENY", "ALLOW")
    with (
        pairs.wire(tmp_path, extra=("mallory",)) as wire,
        pairs.uproxy_server(wire, mesh=MESH + ALLOW_WEB + rehearsed) as process,
        wire.db.listen(APP, PATIENCE_S) as listener,
    ):
        server = Server(wire, process.pid, listener)
        assert ask(server, "web") == b"200"
        assert ask(server, "mallory") == b"401"
        eventually(lambda: len(lines(server)) == 2)
        assert [line.get("dry_run") for line in lines(server)] == [None, "allowed: allowed by shop/no-mallory[0]"]
        assert counted(server) == ["uproxy_dry_run_allowed_total 2", "uproxy_dry_run_denied_total 0"]
        assert_no_bug_was_logged(wire)


@pytest.mark.parametrize(("action", "status"), [("AUDIT", b"200"), ("CUSTOM", b"401")])
def test_an_audit_is_told_and_what_nobody_can_be_asked_about_is_refused(
    action: str, status: bytes, tmp_path: Path
) -> None:
    policy = POLICY.replace('  annotations: {istio.io/dry-run: "true"}\n', "").replace("DENY", action)
    policy += "  provider: {name: nobody}\n" if action == "CUSTOM" else ""
    with (
        pairs.wire(tmp_path, extra=("mallory",)) as wire,
        pairs.uproxy_server(wire, mesh=MESH + policy) as process,
        wire.db.listen(APP, PATIENCE_S) as listener,
    ):
        server = Server(wire, process.pid, listener)
        assert ask(server, "mallory") == status
        assert ask(server, "web") == b"200"
        eventually(lambda: len(lines(server)) == 2)
        told = [line.get("audit") for line in lines(server)]
        assert told == (["shop/no-mallory[0]", None] if action == "AUDIT" else [None, None])
        assert counted(server, "uproxy_audited") == [f"uproxy_audited_total {int(action == 'AUDIT')}"]
        assert_no_bug_was_logged(wire)
