"""The `uproxy run` process: how it starts, what it refuses to start with, how it takes changes, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from control.api.identity import SpiffeId
from control.server.ca import Authority, write_identity
from tests.support import capture
from tests.support.certificates import DB, WEB, identity_dir
from tests.support.site import APP_PORT, FORWARD_PORT, Site, dial, echo_server, eventually, get
from uproxy.redirect import PROBE_V4

NETWORK = "127.0.79"
WEB_ADDRESS, DB_ADDRESS = f"{NETWORK}.1", f"{NETWORK}.2"
FORWARD = (WEB_ADDRESS, FORWARD_PORT)

DENY_WEB = """
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-web, namespace: shop}
spec:
  action: DENY
  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]}]
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site.create(tmp_path, NETWORK)


@pytest.fixture
def running(site: Site) -> Iterator[tuple[Site, subprocess.Popen[str], subprocess.Popen[str]]]:
    with ExitStack() as stack:
        stack.enter_context(echo_server((DB_ADDRESS, APP_PORT)))
        db = stack.enter_context(site.running("db"))
        web = stack.enter_context(site.running("web"))
        yield site, web, db


def call(message: bytes = b"hello") -> bytes:
    return dial(FORWARD, message)


def test_traffic_metrics_readiness_and_admin(running: tuple[Site, object, object]) -> None:
    site, *_ = running
    assert call() == b"hello"
    assert get(WEB_ADDRESS, 15021, "/healthz/ready") == (200, "ready\n")
    status, dump = get(WEB_ADDRESS, 15000, "/config_dump")
    assert status == 200
    assert "shop/db" in dump
    assert "PRIVATE KEY" not in dump

    def counted() -> bool:
        metrics = get(WEB_ADDRESS, 15020, "/metrics")[1]
        closed = [x for x in metrics.splitlines() if x.startswith("istio_tcp_connections_closed_total{")]
        return any(x.endswith(" 1") and 'destination_service_name="db"' in x for x in closed)

    eventually(counted)
    eventually(lambda: "connection complete" in site.log("web"))


def test_a_policy_in_the_file_takes_effect_and_a_broken_file_changes_nothing(
    running: tuple[Site, object, object],
) -> None:
    site, *_ = running
    with socket.create_connection(FORWARD, timeout=30) as app:
        app.sendall(b"a")
        assert app.recv(1) == b"a"
        site.mesh.write_text(site.resources + DENY_WEB)
        with pytest.raises(ConnectionResetError):
            app.recv(1)  # the policy cuts a connection that it no longer allows
    with pytest.raises(ConnectionError):
        call()
    site.mesh.write_text(site.resources + "---\nkind: Servise\n")
    eventually(lambda: "the new configuration is refused" in site.log("db"))
    with pytest.raises(ConnectionError):
        call()
    site.mesh.write_text(site.resources)

    def served() -> bool:
        try:
            return call() == b"hello"
        except ConnectionError:
            return False

    eventually(served)


def test_a_renewed_certificate_is_used_without_a_failed_connection(running: tuple[Site, object, object]) -> None:
    site, *_ = running
    with socket.create_connection(FORWARD, timeout=30) as app:
        app.sendall(b"a")
        assert app.recv(1) == b"a"
        csr = (site.path / "web" / "csr.pem").read_bytes()
        write_identity(site.path / "web", site.authority.issue(csr, WEB), site.authority.bundle_pem)
        eventually(lambda: "a new certificate is in use" in site.log("web"))
        assert call() == b"hello"
        app.sendall(b"b")
        assert app.recv(1) == b"b"  # a stream that was open stays on its tunnel


def test_rotations_of_both_ends_under_load_fail_no_stream(running: tuple[Site, object, object]) -> None:
    site, *_ = running
    over = threading.Event()

    def new_connections() -> int:
        made = 0
        while not over.is_set():
            assert call() == b"hello"
            made += 1
        return made

    def one_connection() -> int:
        exchanged = 0
        with socket.create_connection(FORWARD, timeout=30) as app:
            while not over.is_set():
                app.sendall(b"%08d" % exchanged)
                assert app.recv(8, socket.MSG_WAITALL) == b"%08d" % exchanged
                exchanged += 1
                time.sleep(0.001)
        return exchanged

    def both_use(number: int) -> bool:
        return all(site.log(name).count("a new certificate is in use") == number for name in ("web", "db"))

    with ThreadPoolExecutor(6) as threads:
        load = [threads.submit(work) for work in (new_connections,) * 3 + (one_connection,) * 3]
        try:
            for number in range(1, 4):
                for name, identity in (("web", WEB), ("db", DB)):
                    csr = (site.path / name / "csr.pem").read_bytes()
                    write_identity(site.path / name, site.authority.issue(csr, identity), site.authority.bundle_pem)
                eventually(partial(both_use, number))
                assert not [one.exception() for one in load if one.done()]
        finally:
            over.set()
    assert min(one.result() for one in load) > 10
    assert "Traceback" not in site.log("web") + site.log("db")


def test_a_new_root_in_the_bundle_is_trusted(running: tuple[Site, object, object], tmp_path: Path) -> None:
    site, *_ = running
    other = Authority.create(tmp_path / "other-ca", "cluster.local")
    for name in ("web", "db"):
        bundle = site.path / name / "bundle.pem"
        bundle.write_bytes(bundle.read_bytes() + other.bundle_pem)
    eventually(lambda: all("a new certificate is in use" in site.log(name) for name in ("web", "db")))
    csr = (site.path / "db" / "csr.pem").read_bytes()
    (site.path / "db" / "chain.pem").write_bytes(other.issue(csr, DB))
    eventually(lambda: site.log("db").count("a new certificate is in use") == 2)
    assert call() == b"hello"


def test_a_bad_renewal_is_reported_and_the_old_certificate_stays(running: tuple[Site, object, object]) -> None:
    site, *_ = running
    (site.path / "web" / "chain.pem").write_text("nonsense")
    eventually(lambda: "the new certificate is refused" in site.log("web"))
    assert call() == b"hello"


def test_a_drain_lets_connections_end_and_refuses_new_ones(
    running: tuple[Site, subprocess.Popen[str], subprocess.Popen[str]],
) -> None:
    _, web, db = running
    with socket.create_connection(FORWARD, timeout=30) as app:
        app.sendall(b"a")
        assert app.recv(1) == b"a"
        db.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        app.sendall(b"b")
        assert app.recv(1) == b"b"
        with pytest.raises(ConnectionError):
            call()
    assert db.wait(timeout=60) == 0
    web.send_signal(signal.SIGTERM)
    assert web.wait(timeout=60) == 0


def test_a_drain_ends_by_itself(running: tuple[Site, subprocess.Popen[str], subprocess.Popen[str]]) -> None:
    site, _, db = running
    with socket.create_connection(FORWARD, timeout=30) as app:
        app.sendall(b"a")
        assert app.recv(1) == b"a"
        db.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionResetError):
            app.recv(1)  # cut after the drain time, and not as a clean end
    assert db.wait(timeout=60) == 0
    assert "1 connections were cut" in site.log("db")


def test_the_key_cannot_be_dumped(running: tuple[Site, subprocess.Popen[str], object]) -> None:
    _, web, _ = running
    # prctl(2): a process that is not dumpable belongs to root in /proc, and writes no core.
    limits = Path(f"/proc/{web.pid}/limits").read_text()
    assert [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core")] == [["0", "0"]]


def test_heavy_libraries_stay_out() -> None:
    heavy = ("yaml", "cryptography", "aiohttp", "cffi", "dns")
    script = f"import sys, uproxy.run; print([m for m in {heavy} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


def test_what_it_does_not_start_with(site: Site) -> None:
    assert "has no WorkloadEntry shop/db" in refused_with(
        site, site.resources.replace("name: db, namespace: shop", "name: x, namespace: shop")
    )
    assert "mesh.yaml:" in refused_with(site, site.resources + "---\nkind: Servise\n")
    site.mesh.write_text(site.resources)
    site.mesh.unlink()
    assert "mesh.yaml" in site.refusal("db")
    site.mesh.write_text(site.resources)
    other = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/other")
    identity_dir(site.authority, site.path / "other", other)
    os.rename(site.path / "db", site.path / "db.good")
    assert "key.pem" in site.refusal("db")
    os.rename(site.path / "other", site.path / "db")
    said = site.refusal("db")
    assert "sa/other" in said
    assert "sa/db" in said


def refused_with(site: Site, mesh: str) -> str:
    site.mesh.write_text(mesh)
    return site.refusal("db")


def test_an_expired_certificate_does_not_start(site: Site) -> None:
    csr = (site.path / "db" / "csr.pem").read_bytes()
    write_identity(site.path / "db", site.authority.issue(csr, DB, ttl_s=1), site.authority.bundle_pem)
    time.sleep(2)
    assert "expired" in site.refusal("db")


def test_a_port_in_use_is_named(site: Site) -> None:
    with socket.create_server((DB_ADDRESS, 15008)):
        assert f"cannot listen on {DB_ADDRESS}:15008" in site.refusal("db")


def test_capture_without_a_probe_does_not_start(site: Site) -> None:
    command = [part for part in site.command("db") if part not in ("--capture", "none")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert "--probe-fd" in ended.stderr


@pytest.mark.root
@pytest.mark.parametrize("elsewhere", [False, True])
def test_capture_that_is_not_in_force_is_seen_at_the_start(site: Site, elsewhere: bool) -> None:
    """A connection from the workload's cgroup has to come to the uProxy; that somebody takes it proves nothing."""

    def start() -> str:
        capture.ip("link set lo up")
        if elsewhere:
            capture.ip(f"address add {PROBE_V4}/32 dev lo")  # its own readiness port takes it
        with socket.socket() as probe:
            command = site.command("db", "--capture", "ebpf", f"--probe-fd={probe.fileno()}")
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=20, check=False, pass_fds=[probe.fileno()]
            )
        assert ended.returncode == 1, ended.stderr
        return ended.stderr

    with capture.namespace() as namespace:
        said = capture.run_inside(namespace.fd, None, start)
    assert f"a connection from the workload's cgroup to {PROBE_V4} was not captured" in said


@pytest.mark.parametrize(
    "options",
    [
        ["--capture", "sometimes"],
        ["--forward", "0.0.0.0:80=db.shop:1"],
        ["--socks5", "192.0.2.1:1080"],
        ["--address", "nowhere"],
        ["--trust-domain", "Bad"],
        ["--drain-timeout-s", "-1"],
        ["--capture", "ebpf"],
        ["--dns"],
        ["--join", "token"],
    ],
)
def test_a_wrong_option_is_a_usage_error(site: Site, options: list[str]) -> None:
    ended = subprocess.run(site.command("web", *options), capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 2
    assert "uproxy run: error:" in ended.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--config", "m.yaml", "--namespace", "n"], "--config needs --workload, --service-account, --address too"),
        (["--address", "10.0.0.1", "--trust-domain", "td"], "--address, --trust-domain: without --config"),
        ([], "has not joined a mesh"),
        (["--join", "no-such-file"], "no-such-file"),
    ],
)
def test_who_the_workload_is_must_be_said_once(options: list[str], told: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "uproxy", "run", "--identity-dir", str(tmp_path / "id"), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == (2 if "--" in told else 1)
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr
