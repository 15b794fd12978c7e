"""The same-host direct path, end to end: granted after a tunnel has proved who calls, gone when anything changes."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import pytest
from cryptography import x509

from benchmarks.lab.apps import commands
from benchmarks.lab.topology import Host, Lab, Workload
from control import durable
from tests.support import inside

VIP = ("240.240.0.40", 9000)
VIP_V6 = ("fd96:0:0:ffff::40", 9000)

RESOURCES = f"""\
apiVersion: v1
kind: Namespace
metadata: {{name: near, annotations: {{mesh.uproxy.dev/same-host: direct}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: db, namespace: near}}
spec:
  clusterIP: {VIP[0]}
  selector: {{app: db}}
  ports: [{{name: tcp, port: {VIP[1]}, targetPort: tcp}}]
---
apiVersion: v1
kind: Service
metadata: {{name: db6, namespace: near}}
spec:
  clusterIP: "{VIP_V6[0]}"
  ipFamilies: [IPv6]
  selector: {{app: db6}}
  ports: [{{name: tcp, port: {VIP_V6[1]}, targetPort: tcp}}]
"""

TOLD = "annotations: {mesh.uproxy.dev/proxy-protocol: tcp}"

DENY = """\
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-web, namespace: near}
spec:
  action: DENY
  rules: [{from: [{source: {principals: ["*/ns/near/sa/web"]}}]}]
"""


@dataclass(frozen=True, slots=True)
class Near:
    """Two pairs on one host: `web` calls `db`, `web6` calls `db6`."""

    lab: Lab
    host: Host
    web: Workload
    db: Workload
    web6: Workload
    db6: Workload


@pytest.fixture(scope="module")
def near() -> Iterator[Near]:
    with Lab() as lab:
        host = lab.host("a")
        made = Near(
            lab,
            host,
            host.workload("web", commands.idle(), namespace="near"),
            host.workload("db", commands.idle(), namespace="near", ports={"tcp": 9000}),
            host.workload("web6", commands.idle(), namespace="near", ipv6=True),
            host.workload("db6", commands.idle(), namespace="near", ports={"tcp": 9000}, ipv6=True),
        )
        lab.configure(RESOURCES)
        lab.start()
        with inside.serving(made.db, 9000, inside.echo), inside.serving(made.db6, 9000, inside.echo):
            yield made


def is_refused(workload: Workload, to: tuple[str, int]) -> bool:
    try:
        inside.exchange(workload, to)
    except OSError:
        return True
    return False


@pytest.mark.parametrize("family", [4, 6])
def test_after_a_tunnel_connections_go_direct(near: Near, family: int) -> None:
    web, db, to = (near.web, near.db, VIP) if family == 4 else (near.web6, near.db6, VIP_V6)
    inside.eventually(lambda: inside.goes_direct(near.host, web, to))
    outbound = web.await_access(lambda entry: entry.get("path") == "direct")
    inbound = db.await_access(lambda entry: entry.get("path") == "direct")
    assert (outbound["bytes_sent"], outbound["bytes_recv"]) == (1000, 1000)
    assert (inbound["bytes_sent"], inbound["bytes_recv"]) == (1000, 1000)
    assert (outbound["src.identity"], outbound["dst.identity"]) == (str(web.identity), str(db.identity))
    assert (inbound["src.identity"], inbound["dst.identity"]) == (str(web.identity), str(db.identity))
    for workload, reporter in ((web, "source"), (db, "destination")):
        assert counted(workload, "istio_tcp_connections_closed_total", reporter) >= 1
        assert counted(workload, "istio_tcp_sent_bytes_total", reporter) % 1000 == 0
        assert counted(workload, "istio_tcp_received_bytes_total", reporter) >= 1000


def counted(workload: Workload, name: str, reporter: str) -> float:
    """What a metric counts of connections that went direct, in the workload's uProxy."""
    text = inside.http_get(workload, 15020, "/metrics")
    series = re.findall(rf'^{name}{{reporter="{reporter}",.*security_policy="none"}} (\d+)$', text, re.MULTILINE)
    return sum(map(int, series))


def open_direct(near: Near) -> socket.socket:
    """A connection that goes direct and stays. Soon after a restart of the agent one may be ended once more."""
    for _ in range(2):
        with suppress(ConnectionResetError, ConnectionAbortedError):
            return opened(near)
    return opened(near)


def opened(near: Near) -> socket.socket:
    inside.eventually(lambda: inside.goes_direct(near.host, near.web, VIP), 40)
    before = inside.dialled_direct(near.host)
    with ExitStack() as undo:
        made = undo.enter_context(inside.dial(near.web, VIP))
        assert inside.dialled_direct(near.host) == before + 1
        made.sendall(b"x")
        assert made.recv(1) == b"x"
        undo.pop_all()
        return made


@contextmanager
def configured(near: Near, resources: str) -> Iterator[None]:
    near.lab.configure(resources)
    try:
        yield
    finally:
        near.lab.configure(RESOURCES)
        inside.eventually(lambda: not is_refused(near.web, VIP))


def test_policy_that_denies_ends_it_at_once(near: Near) -> None:
    with open_direct(near) as made, configured(near, RESOURCES + DENY):
        with pytest.raises((ConnectionResetError, ConnectionAbortedError)):
            made.recv(1)
        assert is_refused(near.web, VIP)


def test_no_connection_outlives_what_allowed_it(near: Near) -> None:
    """Also none that was being made while policy changed."""
    held: list[socket.socket] = []
    ended = threading.Event()

    def dial_on() -> None:
        while not ended.is_set() and len(held) < 2000:
            with suppress(OSError):
                held.append(inside.dial(near.web, VIP))

    open_direct(near).close()
    before = inside.dialled_direct(near.host)
    dialler = threading.Thread(target=dial_on)
    dialler.start()
    try:
        inside.eventually(lambda: inside.dialled_direct(near.host) >= before + 20)
        with configured(near, RESOURCES + DENY):
            inside.eventually(lambda: is_refused(near.web, VIP))
            time.sleep(1)
            ended.set()
            dialler.join()
            for made in held:
                made.settimeout(20)
                with pytest.raises((ConnectionResetError, ConnectionAbortedError)):
                    made.recv(1)
    finally:
        ended.set()
        dialler.join()
        for made in held:
            made.close()
    print(f"{len(held)} connections, {inside.dialled_direct(near.host) - before} of them direct")


def test_mode_that_is_taken_back_ends_it(near: Near) -> None:
    encrypted = RESOURCES.replace("same-host: direct", "same-host: encrypted")
    with open_direct(near) as made, configured(near, encrypted):
        with pytest.raises((ConnectionResetError, ConnectionAbortedError)):
            made.recv(1)
        before = inside.dialled_direct(near.host)
        inside.exchange(near.web, VIP)
        assert inside.dialled_direct(near.host) == before


def test_certificate_of_the_caller_that_is_revoked_ends_it(near: Near) -> None:
    chain = x509.load_pem_x509_certificates((near.web.identity_dir / "chain.pem").read_bytes())
    revocations = near.db.identity_dir / "crl.pem"
    with open_direct(near) as made:
        durable.write(revocations, near.lab.source.authority().revoke([chain[0].serial_number]), 0o600)
        try:
            made.settimeout(20)
            with pytest.raises((ConnectionResetError, ConnectionAbortedError)):
                made.recv(1)
            assert is_refused(near.web, VIP)
        finally:
            near.lab.issue(near.web.identity, near.web.identity_dir)
            inside.eventually(lambda: not is_refused(near.web, VIP))
            revocations.unlink()


def test_application_that_is_told_who_calls_ends_it(near: Near) -> None:
    """By a PROXY protocol header, which a caller that comes without a uProxy could make up."""

    def answer() -> bytes:
        with inside.dial(near.web, VIP) as made:
            made.sendall(b"x")
            made.shutdown(socket.SHUT_WR)
            return inside.read_all(made)

    with open_direct(near) as made:
        near.lab.configure(RESOURCES.replace("name: db, namespace: near}", f"name: db, namespace: near, {TOLD}}}"))
        try:
            with pytest.raises((ConnectionResetError, ConnectionAbortedError)):
                made.recv(1)
            before = inside.dialled_direct(near.host)
            for _ in range(3):
                told = answer()
                assert told.startswith(b"\r\n\r\n\0\r\nQUIT\n")
                assert told.endswith(b"/ns/near/sa/webx")
            assert inside.dialled_direct(near.host) == before
        finally:
            near.lab.configure(RESOURCES)
            inside.eventually(lambda: answer() == b"x")


def test_another_agent_goes_on_with_it(near: Near) -> None:
    """And while there is none, it runs out, and tunnels carry on."""
    with open_direct(near) as made:
        assert near.host.agent is not None
        near.host.agent.send_signal(signal.SIGKILL)
        near.host.agent.wait()
        near.host.start_agent()
        near.lab.wait([near.host.agent_running], 60, "the node agent")
        time.sleep(11)
        made.sendall(b"x")
        assert made.recv(1) == b"x"
    near.host.agent.send_signal(signal.SIGKILL)
    near.host.agent.wait()
    try:
        time.sleep(11)
        inside.exchange(near.web, VIP)
    finally:
        near.host.start_agent()
        near.lab.wait([near.host.agent_running], 60, "the node agent")
    ends = [entry for entry in near.web.access_log() if entry["direction"] == "outbound"][-1]
    assert "path" not in ends


def test_dead_uproxy_ends_it(near: Near) -> None:
    with open_direct(near) as made:
        os.kill(near.db.proxy_pid(), signal.SIGKILL)
        made.settimeout(20)
        with pytest.raises((ConnectionResetError, ConnectionAbortedError)):
            made.recv(1)
    inside.eventually(lambda: inside.goes_direct(near.host, near.web, VIP), 40)
