"""A mesh that runs from a control plane: what changes in it, what goes on without it, and who is let in."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lab.apps import commands
from benchmarks.lab.control import ControlPlane
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Lab, Workload
from control.server.serve import STORE_FILE
from tests.mesh.test_datagrams import passes, udp
from tests.support import inside
from tests.support.upgrading import running as uproxies
from tests.support.upgrading import upgrade

_PORT = 9000
_PEER = ("240.240.0.30", _PORT)
_UNUSED = ("240.240.0.31", _PORT)
_BEACON = """\
apiVersion: v1
kind: Service
metadata: {name: beacon, namespace: load, annotations: {mesh.uproxy.dev/udp: plaintext}}
spec: {selector: {app: peer}, ports: [{name: beacon, port: 53, targetPort: 5353, protocol: UDP}]}
"""
_SAME_HOST = "mesh.uproxy.dev/same-host"

_RESOURCES = f"""\
apiVersion: v1
kind: Service
metadata: {{name: peer, namespace: load}}
spec: {{clusterIP: {_PEER[0]}, selector: {{app: peer}}, ports: [{{name: tcp, port: {_PORT}, targetPort: tcp}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: unused, namespace: load}}
spec: {{clusterIP: {_UNUSED[0]}, selector: {{app: peer}}, ports: [{{name: tcp, port: {_PORT}, targetPort: tcp}}]}}
"""
_DENY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: load}
spec: {selector: {matchLabels: {closed: "yes"}}, action: DENY, rules: [{}]}
"""


_PERMISSIVE = """\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: default, namespace: {namespace}}}
spec: {{mtls: {{mode: {mode}}}}}
"""


@dataclass(frozen=True, slots=True)
class Controlled:
    """`caller` and `other` on host a, `peer` on host b; all idle, and something answers for `peer`."""

    lab: Lab
    control: ControlPlane
    caller: Workload
    peer: Workload
    other: Workload


@pytest.fixture(scope="module")
def mesh() -> Iterator[Controlled]:
    with Lab(control=True) as lab:
        assert lab.control is not None
        a = lab.host("a")
        caller = a.workload("caller", commands.idle(), namespace="load")
        other = a.workload("other", commands.idle(), namespace="load")
        peer = lab.host("b").workload("peer", commands.idle(), namespace="load", ports={"tcp": _PORT})
        lab.configure(_RESOURCES)
        lab.start()
        with inside.serving(peer, _PORT, inside.echo):
            yield Controlled(lab, lab.control, caller, peer, other)


def _current(mesh: Controlled) -> dict[str, Any]:
    """Wait until every proxy has applied the newest configuration; what `meshctl status` says then."""
    told: dict[str, Any] = {}

    def is_current() -> bool:
        nonlocal told
        told = mesh.control.status()
        return len(told["proxies"]) == 5 and all(proxy["state"] == "current" for proxy in told["proxies"])

    inside.eventually(is_current, 40)
    return told


def _ends(mesh: Controlled, address: tuple[str, int] = _PEER) -> str:
    """How a dial of the caller ends: "echo", "FIN" or an errno's name."""
    try:
        with inside.dial(mesh.caller, address, timeout_s=10) as made:
            made.sendall(b"x")
            return "echo" if made.recv(1) == b"x" else "FIN"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def _await(mesh: Controlled, wanted: str, address: tuple[str, int] = _PEER, timeout_s: float = 20) -> None:
    """Wait until the caller's dials end like this."""
    deadline = time.monotonic() + timeout_s
    while (ended := _ends(mesh, address)) != wanted:
        if time.monotonic() > deadline:
            told = mesh.control.meshctl("status")
            pytest.fail(f"after {timeout_s:g} s dials still end in {ended}, not {wanted}: {told}\n{mesh.lab.logs()}")
        time.sleep(0.05)


@pytest.fixture(scope="class")
def gone(mesh: Controlled) -> Iterator[socket.socket]:
    """Control plane and broker are killed; a connection from before."""
    for caller in (mesh.caller, mesh.other):
        with inside.dial(caller, _PEER) as made:
            made.sendall(b"x")
            assert made.recv(1) == b"x"
        # What a uProxy that is killed has on disk may be some seconds old.
        inside.eventually(
            lambda state=caller.identity_dir / "state": state.exists() and b"/svc/load/peer" in state.read_bytes()
        )
    with inside.dial(mesh.caller, _PEER) as made:
        mesh.control.kill()
        yield made


@pytest.mark.usefixtures("gone")
class TestWithoutThem:
    """Control plane and broker are dead. One outage for all of it: the longer it is, the later proxies try again."""

    def test_traffic_goes_on(self, mesh: Controlled, gone: socket.socket) -> None:
        gone.sendall(b"a connection from before")
        assert gone.recv(64) == b"a connection from before"
        assert _ends(mesh) == "echo"

    def test_uproxy_and_node_agent_restart(self, mesh: Controlled) -> None:
        host = mesh.peer.host
        assert host.agent is not None
        host.agent.kill()
        host.agent.wait()
        host.node_socket.unlink(missing_ok=True)
        host.start_agent()
        inside.eventually(host.agent_running)
        assert host.node().status()["whole"] is True
        with inside.dial(mesh.caller, _PEER) as made:
            made.sendall(b"x")
            assert made.recv(1) == b"x"
        old = mesh.caller.proxy_pid()
        os.kill(old, signal.SIGKILL)
        _await(mesh, "ECONNREFUSED")
        _await(mesh, "echo")
        assert mesh.caller.proxy_pid() != old

    def test_upgraded_uproxy_begins_with_what_the_old_one_knew(self, mesh: Controlled) -> None:
        with inside.dial(mesh.caller, _PEER) as held:
            held.sendall(b"x")
            assert held.recv(1) == b"x"
            for workload in (mesh.caller, mesh.peer):
                upgrade(workload)
                assert _ends(mesh) == "echo"
            held.sendall(b"y")
            assert held.recv(1) == b"y"

    def test_what_was_never_dialled_is_refused_and_says_so(self, mesh: Controlled) -> None:
        began = time.monotonic()
        assert _ends(mesh, _UNUSED) == "ECONNRESET"
        assert time.monotonic() - began < 20
        mesh.caller.await_access(lambda entry: "no-config" in entry.get("error", ""))

    def test_workload_starts_again_with_what_it_kept(self, mesh: Controlled) -> None:
        other = mesh.other
        assert other.launcher is not None
        other.launcher.terminate()
        other.launcher.wait(60)
        other.launch()
        inside.eventually(other.running, 30)
        with inside.dial(other, _PEER) as made:
            made.sendall(b"x")
            assert made.recv(1) == b"x"


class TestTheyComeBack:
    def test_broker_without_its_data_is_given_everything(self, mesh: Controlled) -> None:
        mesh.control.kill()
        shutil.rmtree(mesh.control.broker_data())
        mesh.control.start()
        assert _current(mesh)["ok"] is True
        assert _ends(mesh) == "echo"
        assert _ends(mesh, _UNUSED) == "echo"


class TestChanges:
    def test_label_closes_and_opens_a_workload(self, mesh: Controlled) -> None:
        mesh.control.apply(_DENY)
        try:
            with inside.dial(mesh.caller, _PEER) as made:
                made.sendall(b"x")
                assert made.recv(1) == b"x"
                mesh.control.meshctl("label", "workload", "peer", "closed=yes", "-n", "load")
                with pytest.raises(ConnectionResetError):
                    made.recv(1)
            assert _ends(mesh) == "ECONNRESET"
            mesh.control.meshctl("label", "workload", "peer", "closed-", "-n", "load", "--overwrite")
            _await(mesh, "echo")
        finally:
            mesh.control.meshctl("delete", "policy", "nobody", "-n", "load")

    def test_upgraded_uproxy_follows_and_reports_and_the_old_one_only_follows(self, mesh: Controlled) -> None:
        mesh.control.apply(_DENY)
        try:
            with inside.dial(mesh.caller, _PEER) as of_the_old, ExitStack() as stack:
                of_the_old.sendall(b"x")
                assert of_the_old.recv(1) == b"x"
                (old,) = uproxies(mesh.peer)
                new = upgrade(mesh.peer)
                of_the_new = stack.enter_context(inside.dial(mesh.caller, _PEER))
                of_the_new.sendall(b"x")
                assert of_the_new.recv(1) == b"x"
                assert uproxies(mesh.peer) == {old, new}
                mesh.control.meshctl("label", "workload", "peer", "closed=yes", "-n", "load")
                for made in (of_the_old, of_the_new):
                    with pytest.raises(ConnectionResetError):
                        made.recv(1)
                inside.eventually(lambda: uproxies(mesh.peer) == {new})  # the end of the old one
            assert _current(mesh)["ok"] is True
            mesh.control.meshctl("label", "workload", "peer", "closed-", "-n", "load", "--overwrite")
            _await(mesh, "echo")
        finally:
            mesh.control.meshctl("delete", "policy", "nobody", "-n", "load")

    def test_annotations_let_workloads_of_one_host_go_direct(self, mesh: Controlled) -> None:
        (host, *_) = mesh.lab.hosts
        to = mesh.caller.address, _PORT
        mesh.control.meshctl("annotate", "workload", "caller", f"{_SAME_HOST}=direct", "-n", "load")
        mesh.control.meshctl("annotate", "workload", "other", f"{_SAME_HOST}=direct", "-n", "load")
        with inside.serving(mesh.caller, _PORT, inside.echo):
            inside.eventually(lambda: inside.goes_direct(host, mesh.other, to), 40)
            with inside.dial(mesh.other, to) as made:
                mesh.control.meshctl("annotate", "workload", "other", f"{_SAME_HOST}-", "-n", "load", "--overwrite")
                with pytest.raises((ConnectionResetError, ConnectionAbortedError)):
                    made.recv(1)
            assert not inside.goes_direct(host, mesh.other, to)
        mesh.control.meshctl("annotate", "workload", "caller", f"{_SAME_HOST}-", "-n", "load", "--overwrite")

    def test_datagrams_pass_while_a_service_says_so(self, mesh: Controlled) -> None:
        end = (mesh.peer.address, 5353)
        with udp(mesh.caller) as asking, udp(mesh.peer) as answering:
            answering.bind(end)
            assert not passes(asking, end)
            mesh.control.apply(_BEACON)
            try:
                inside.eventually(lambda: passes(asking, end), 40)
                got, source = answering.recvfrom(100)
                assert (got, source[0]) == (b"x", mesh.caller.address)
                inside.eventually(lambda: passes(answering, source[:2]), 40)
            finally:
                mesh.control.meshctl("delete", "service", "beacon", "-n", "load")
            inside.eventually(lambda: not passes(asking, end), 40)
            inside.eventually(lambda: not passes(answering, source[:2]), 40)

    def test_peer_authentication_of_the_root_namespace_opens_and_closes_the_mesh(self, mesh: Controlled) -> None:
        def takes_plaintext() -> bool:
            with mesh.caller.host.entered(), closing(socket.socket()) as made:
                made.settimeout(30)
                if made.connect_ex((mesh.peer.address, _PORT)):
                    return False
                made.sendall(b"x")
                return made.recv(1) == b"x"

        assert not takes_plaintext()
        mesh.control.apply(_PERMISSIVE.format(namespace="mesh-system", mode="PERMISSIVE"))
        try:
            inside.eventually(takes_plaintext)
            mesh.control.apply(_PERMISSIVE.format(namespace="load", mode="STRICT"))
            inside.eventually(lambda: not takes_plaintext())
            mesh.control.meshctl("delete", "pa", "default", "-n", "load")
            inside.eventually(takes_plaintext)
            assert "PERMISSIVE" in mesh.control.meshctl("get", "pa", "-n", "mesh-system")
        finally:
            mesh.control.meshctl("delete", "pa", "default", "-n", "mesh-system")
        inside.eventually(lambda: not takes_plaintext())
        assert _ends(mesh) == "echo"

    def test_refused_change_changes_nothing(self, mesh: Controlled) -> None:
        before = mesh.control.status()["version"]
        with pytest.raises(LabError, match="selectr"):
            mesh.control.apply(_DENY.replace("{selector:", "{selectr:") + "---\n" + _DENY.replace("nobody", "second"))
        assert mesh.control.status()["version"] == before
        assert "second" not in mesh.control.meshctl("get", "policies", "-n", "load")

    def test_deleted_service_is_gone_from_the_kernel(self, mesh: Controlled) -> None:
        document = "apiVersion: v1\nkind: Service\nmetadata: {name: brief, namespace: load}\nspec:\n"
        document += f"  clusterIP: 240.240.0.32\n  selector: {{app: peer}}\n  ports: [{{port: {_PORT}}}]\n"
        mesh.control.apply(document)
        _await(mesh, "echo", ("240.240.0.32", _PORT))
        mesh.control.meshctl("delete", "service", "brief", "-n", "load")
        _await(mesh, "ECONNREFUSED", ("240.240.0.32", _PORT))

    def test_status_names_every_proxy_with_version_and_age(self, mesh: Controlled) -> None:
        told = _current(mesh)
        assert told["ok"] is True
        names = {f"mesh-system/node-{mesh.lab.names.node(host.name)}" for host in mesh.lab.hosts}
        assert {proxy["workload"] for proxy in told["proxies"]} == names | {"load/caller", "load/peer", "load/other"}
        assert all(0 <= proxy["age_s"] < 60 for proxy in told["proxies"])


class TestBackup:
    def test_older_backup_becomes_the_mesh(self, mesh: Controlled) -> None:
        """Proxies have applied newer configuration: that must not keep them from taking what the backup says."""
        backup = mesh.lab.directory / "backup.db"
        store = mesh.control.directory / STORE_FILE
        with closing(sqlite3.connect(store)) as live, closing(sqlite3.connect(backup)) as copy:
            live.backup(copy)
        mesh.control.apply(_DENY)
        mesh.control.meshctl("label", "workload", "peer", "closed=yes", "-n", "load")
        _await(mesh, "ECONNRESET")
        before = _current(mesh)["version"]
        mesh.control.kill()
        for file in store.parent.glob(f"{STORE_FILE}*"):
            file.unlink()
        backup.rename(store)
        mesh.control.start()  # on the broker's data, which is newer than the store
        _await(mesh, "echo", timeout_s=40)
        assert _current(mesh)["version"] > before


class TestJoining:
    def test_used_token_is_refused(self, mesh: Controlled, tmp_path: Path) -> None:
        argv = mesh.peer.arguments()
        token = Path(argv[argv.index("--join") + 1])
        fresh = tmp_path / "state"
        argv = [sys.executable, "-I", "-m", "control.client.certify"]
        argv += ["join", "--token-file", str(token), "--dir", str(fresh)]
        with mesh.peer.host.entered():
            done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 2, done.stderr
        assert "used already" in done.stderr
        assert not (fresh / "chain.pem").exists()
