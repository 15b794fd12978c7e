"""`meshctl connections` and `meshctl tap` beside real proxies: what is seen of connections while and as they happen."""

from __future__ import annotations

import http.client
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.support.site import APP_PORT, Site, dial, echo_server, eventually, get

NETWORK = "127.0.98"
WEB, DB = f"{NETWORK}.1:15000", f"{NETWORK}.2:15000"
WEB_ID, DB_ID = "spiffe://cluster.local/ns/shop/sa/web", "spiffe://cluster.local/ns/shop/sa/db"

DENY_WEB = """
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-web, namespace: shop}
spec:
  action: DENY
  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]}]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site.create(tmp_path_factory.mktemp("site"), NETWORK)
    with ExitStack() as stack:
        stack.enter_context(echo_server(made.application))
        for name in ("db", "web"):
            stack.enter_context(made.running(name, "--access-log", str(made.path / f"{name}.access")))
        yield made


@contextmanager
def open_connection(site: Site) -> Iterator[socket.socket]:
    with socket.create_connection(site.forward, timeout=30) as app:
        app.sendall(b"hello")
        assert app.recv(5) == b"hello"
        yield app


def meshctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "control.cli", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)


def connections(*admins: str) -> list[dict[str, Any]]:
    done = meshctl("connections", "-o", "json", *(word for admin in admins for word in ("--admin", admin)))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Tap:
    """`meshctl tap`, whose lines are read with a bound."""

    def __init__(self, *arguments: str) -> None:
        argv = [sys.executable, "-m", "control.cli", "tap", *arguments]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.pending = b""

    def line(self, wait_s: float = 10.0) -> str:
        """The next one; empty when none comes."""
        deadline = time.monotonic() + wait_s
        while b"\n" not in self.pending:
            ready = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))[0]
            data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not data:
                return ""
            self.pending += data
        line, self.pending = self.pending.split(b"\n", 1)
        return line.decode()


@contextmanager
def tap(*arguments: str) -> Iterator[Tap]:
    started = Tap(*arguments)
    with started.process:
        try:
            assert started.process.stderr is not None
            assert started.process.stderr.readline().startswith(b"watching ")
            yield started
        finally:
            started.process.kill()


def test_connections_names_both_ends_by_what_they_proved_and_counts_while_they_live(site: Site) -> None:
    with open_connection(site) as app:
        app.sendall(b"x" * 995)
        received = 0
        while received < 995:
            received += len(app.recv(4096))
        web, db = connections(WEB, DB)
        assert (web["workload"], web["identity"], web["total"]) == ("shop/web", WEB_ID, 1)
        (out,), (inn,) = web["connections"], db["connections"]
        assert (out["direction"], inn["direction"]) == ("outbound", "inbound")
        for seen in (out, inn):
            assert (seen["src.identity"], seen["dst.identity"]) == (WEB_ID, DB_ID)
            assert (seen["src.workload"], seen["dst.workload"]) == ("web", "db")
            assert seen["dst.service"] == "db.shop.svc.cluster.local"
            assert seen["bytes_sent"] == seen["bytes_recv"] == 1000
            assert seen["message"] == "connection"
        assert out["request_id"] == inn["request_id"]
        assert 0 <= int(out["duration"].removesuffix("ms")) < 30_000
        done = meshctl("connections", "--admin", WEB)
        head, row = done.stdout.splitlines()
        assert head.split() == ["PROXY", "DIRECTION", "SOURCE", "DESTINATION", "PEER", "SENT", "RECEIVED", "AGE"]
        for word in ("outbound", "shop/web", "db.shop.svc.cluster.local", "cluster.local/ns/shop/sa/db", "1000"):
            assert word in row
    eventually(lambda: [one["total"] for one in connections(WEB, DB)] == [0, 0])


def test_more_connections_than_are_shown_are_counted(site: Site) -> None:
    with ExitStack() as stack:
        for _ in range(1005):
            stack.enter_context(socket.create_connection(site.forward, timeout=30))
        eventually(lambda: json.loads(get(f"{NETWORK}.1", 15000, "/connections")[1])["total"] == 1005)
        shown = connections(WEB)[0]
        assert len(shown["connections"]) == 1000
        assert "5 more, which began before these" in meshctl("connections", "--admin", WEB).stdout
    eventually(lambda: [one["total"] for one in connections(WEB, DB)] == [0, 0])


def test_tap_tells_of_a_connection_when_it_opens_and_when_it_ends(site: Site) -> None:
    with tap("--admin", DB) as watching:
        with open_connection(site):
            opened = watching.line()
            assert f"{DB} inbound opened shop/web ({NETWORK}.1:" in opened
            assert f"-> db.shop.svc.cluster.local ({NETWORK}.2:{APP_PORT}) [cluster.local/ns/shop/sa/web]" in opened
            assert not watching.line(0.3)
        ended = watching.line()
        assert "inbound ended" in ended
        assert "sent 5 received 5" in ended


def test_tap_in_json_is_the_access_log(site: Site) -> None:
    with tap("--admin", WEB, "-o", "json") as watching:
        assert dial(site.forward) == b"hello"
        opened, complete = (json.loads(watching.line()) for _ in range(2))
    assert opened.pop("proxy") == complete.pop("proxy") == WEB
    assert (opened["message"], opened["level"]) == ("connection opened", "debug")
    assert "bytes_sent" not in opened

    def logged() -> list[dict[str, Any]]:
        lines = (site.path / "web.access").read_text().splitlines()
        return [one for one in lines if complete["request_id"] in one]

    eventually(logged)
    assert [name for name in complete if f"{name}=" in logged()[0]] == list(complete)[4:]


def test_tap_of_failures_shows_only_these_and_says_why(site: Site) -> None:
    with tap("--admin", DB, "--failed") as watching:
        assert dial(site.forward) == b"hello"
        site.mesh.write_text(site.resources + DENY_WEB)
        try:
            eventually(lambda: not _answers(site))
            refused = watching.line()
            assert "inbound failed shop/web" in refused
            assert "policy: " in refused
        finally:
            site.mesh.write_text(site.resources)
            eventually(lambda: _answers(site))


def test_config_dump_shows_what_is_known_and_nothing_of_the_key(site: Site) -> None:
    assert dial(site.forward) == b"hello"
    text = get(f"{NETWORK}.1", 15000, "/config_dump")[1]
    assert "PRIVATE KEY" not in text
    dump = json.loads(text)
    service = dump["services"]["shop/db"]
    assert (dump["service_count"], service["endpoint_count"]) == (1, 1)
    assert service["identities"] == [DB_ID]
    assert service["ports"] == [{"port": 6379, "target_port": APP_PORT}]
    assert service["endpoints"] == [
        {
            "service": "shop/db",
            "workload": "shop/db",
            "address": f"{NETWORK}.2",
            "identity": DB_ID,
            "ports": {"6379": APP_PORT},
            "weight": 1,
            "ready": True,
            "labels": {"app": "db"},
        }
    ]
    assert dump["workloads"]["shop/web"]["identity"] == dump["certificate"]["identity"] == WEB_ID
    assert (dump["policies"], dump["pending"], dump["logging"]) == ({}, [], "info")
    assert [one["peer"] for one in dump["tunnels"]] == [DB_ID]


def test_config_dump_shows_the_policies_that_select_the_workload(site: Site) -> None:
    def policies() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(get(f"{NETWORK}.2", 15000, "/config_dump")[1])["policies"]
        return found

    site.mesh.write_text(site.resources + DENY_WEB)
    try:
        eventually(policies)
        policy = policies()["shop/no-web"]
        assert policy["action"] == "DENY"
        assert policy["rules"] == [{"sources": [{"principals": ["cluster.local/ns/shop/sa/web"]}]}]
    finally:
        site.mesh.write_text(site.resources)
        eventually(lambda: not policies())


def _answers(site: Site) -> bool:
    try:
        return dial(site.forward) == b"hello"
    except ConnectionError:
        return False


def test_a_fifth_watcher_is_turned_away_and_told_why(site: Site) -> None:
    with ExitStack() as stack:
        for _ in range(4):
            one = http.client.HTTPConnection(f"{NETWORK}.1", 15000, timeout=30)
            stack.callback(one.close)
            one.request("GET", "/tap")
            stack.enter_context(one.getresponse())
        done = meshctl("tap", "--admin", WEB)
        assert (done.returncode, done.stdout) == (1, "")
        assert "answers: 4 watch already" in done.stderr


def test_the_access_log_tells_of_opened_connections_at_debug(site: Site) -> None:
    def level(wanted: str) -> None:
        asked = http.client.HTTPConnection(f"{NETWORK}.1", 15000, timeout=30)
        asked.request("POST", f"/logging?level={wanted}")
        assert asked.getresponse().read().decode() == f"level {wanted}\n"
        asked.close()

    def opened() -> int:
        return (site.path / "web.access").read_text().count("debug\taccess\tconnection opened\t")

    assert dial(site.forward) == b"hello"
    assert opened() == 0
    level("info,access:debug")
    try:
        assert dial(site.forward) == b"hello"
        eventually(lambda: opened() == 1)
    finally:
        level("info")
    assert dial(site.forward) == b"hello"
    time.sleep(0.3)  # the log is written every 0.1 s
    assert opened() == 1


def test_a_proxy_that_does_not_answer_is_named_and_the_others_are_shown(site: Site) -> None:
    done = meshctl("connections", "--admin", WEB, "--admin", f"{NETWORK}.9:15000", "-o", "json")
    assert done.returncode == 1
    assert [one["proxy"] for one in json.loads(done.stdout)] == [WEB]
    assert f"{NETWORK}.9:15000: its admin port does not answer" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--admin", "nowhere"), "is no IP:PORT, as in 127.0.0.1:15000"),
        (("web", "--admin", WEB), "name one or the other"),
        (("--node-socket", "/nonexistent.sock"), "is `uproxy node` running?"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments: tuple[str, ...], said: str) -> None:
    if os.geteuid() != 0 and "--node-socket" in arguments:
        said = "needs root"
    for command in ("connections", "tap"):
        done = meshctl(command, *arguments)
        assert done.returncode == 1
        assert said in done.stderr
