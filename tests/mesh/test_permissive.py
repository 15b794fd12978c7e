"""PERMISSIVE: what comes in plaintext reaches the application through its uProxy, where it may; nothing else does."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks.lab import shop
from benchmarks.lab.topology import Workload
from tests.mesh.conftest import LOAD, PEER, PEER_V6, Mesh
from tests.mesh.test_fork_server import fork_server
from tests.support import inside
from tests.support.job import FOREVER, running
from uproxy.resolve import host_port

_PERMISSIVE = """\
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: open, namespace: load}
spec: {mtls: {mode: PERMISSIVE}}
"""

_BUT_ONE_PORT = """\
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: %(name)s, namespace: load}
spec:
  selector: {matchLabels: {app: %(name)s}}
  mtls: {mode: PERMISSIVE}
  portLevelMtls: {9001: {mode: STRICT}}
"""

_POLICY = """\
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: who, namespace: load}
spec:
  action: %s
  rules:
  - from: [{source: {%s}}]
"""

FAMILIES = pytest.mark.parametrize(
    ("name", "caller", "vip"), [("peer", "caller", PEER), ("peer6", "caller6", PEER_V6)], ids=["v4", "v6"]
)


@contextmanager
def configured(mesh: Mesh, more: str, name: str) -> Iterator[Workload]:
    """The mesh with these resources too, once a workload's uProxy has them; without them again afterwards."""
    peer: Workload = getattr(mesh, name)
    mesh.lab.configure(shop.RESOURCES + LOAD + more)
    try:
        inside.eventually(lambda: _takes(mesh, peer))
        yield peer
    finally:
        mesh.lab.configure(shop.RESOURCES + LOAD)
        for one in (mesh.peer, mesh.peer6):  # each has its own pace
            inside.eventually(lambda one=one: not _takes(mesh, one))


def _takes(mesh: Mesh, peer: Workload) -> bool:
    """Whether a SYN in plaintext gets to the workload's uProxy: for a port on which the application never listens."""
    before = _count(peer, "plaintext_syn")
    with suppress(ConnectionRefusedError, ConnectionResetError), _dial(mesh, peer, 9999) as made:
        made.recv(1)
        pytest.fail("no FIN comes from a refusal")
    return _count(peer, "plaintext_syn") > before


def _dial(mesh: Mesh, peer: Workload, port: int = 9000) -> socket.socket:
    """From another host, outside of the mesh."""
    with mesh.shop.a.entered():
        return socket.create_connection((peer.address, port), timeout=30)


def _exchange(made: socket.socket) -> bytes:
    made.sendall(b"x")
    return made.recv(1)


def _reset(made: socket.socket, address: tuple[str, int]) -> str:
    """Dial; the uProxy accepts and then says no, with a reset. Returns the end of what it logs of the caller."""
    with made:
        made.settimeout(30)
        made.bind(("", 0))
        ours = f":{made.getsockname()[1]}"
        with pytest.raises(ConnectionResetError):
            _exchange_with(made, address)
        return ours


def _exchange_with(made: socket.socket, address: tuple[str, int]) -> bytes:
    made.connect(address)
    return _exchange(made)


def _count(peer: Workload, counter: str) -> int:
    counters: dict[str, int] = peer.host.node().status()["counters"]
    return counters[counter]


@FAMILIES
def test_plaintext_reaches_the_application_and_is_told_as_such(
    mesh: Mesh, name: str, caller: str, vip: tuple[str, int]
) -> None:
    def answer_after_the_end(connection: socket.socket) -> None:
        got = inside.read_all(connection)
        connection.sendall(b"%d bytes, all of them" % len(got))

    with configured(mesh, _PERMISSIVE, name) as peer, inside.serving(peer, 9000, answer_after_the_end):
        with _dial(mesh, peer) as made:
            ours = made.getsockname()
            made.sendall(b"p" * 300_000)
            made.shutdown(socket.SHUT_WR)
            assert inside.read_all(made) == b"300000 bytes, all of them"
        with inside.dial(getattr(mesh, caller), vip) as made:  # mTLS goes on beside it
            made.sendall(b"m" * 1000)
            made.shutdown(socket.SHUT_WR)
            assert inside.read_all(made) == b"1000 bytes, all of them"
        plain = peer.await_access(lambda e: e.get("bytes_recv") == 300_000)
        assert plain["src.addr"] == host_port(*ours[:2])
        assert plain["dst.addr"].endswith(":9000")
        assert (plain["dst.workload"], plain["direction"], plain["bytes_sent"]) == (name, "inbound", 25)
        assert not plain.keys() & {"src.identity", "dst.identity", "src.workload", "dst.hbone_addr", "error"}
        tunnelled = peer.await_access(lambda e: e.get("bytes_recv") == 1000)
        assert tunnelled["src.identity"] == str(getattr(mesh, caller).identity)
        text = inside.http_get(peer, 15020, "/metrics")
    series = re.findall(r"^istio_tcp_connections_closed_total{(.*)} ", text, re.MULTILINE)
    told = {'source_principal="unknown"', 'connection_security_policy="unknown"', f'destination_workload="{name}"'}
    assert any({*told, 'response_flags="-"'} <= set(labels.split(",")) for labels in series), series


@FAMILIES
def test_strict_refuses_at_the_syn(mesh: Mesh, name: str, caller: str, vip: tuple[str, int]) -> None:
    peer: Workload = getattr(mesh, name)
    with inside.serving(peer, 9000, inside.echo):
        dropped = _count(peer, "dropped_syn")
        with pytest.raises(ConnectionRefusedError):
            _dial(mesh, peer)
        assert _count(peer, "dropped_syn") > dropped


@FAMILIES
def test_a_port_that_is_excepted_refuses_at_the_syn(mesh: Mesh, name: str, caller: str, vip: tuple[str, int]) -> None:
    with (
        configured(mesh, _BUT_ONE_PORT % {"name": name}, name) as peer,
        inside.serving(peer, 9000, inside.echo),
        inside.serving(peer, 9001, inside.echo),
    ):
        with _dial(mesh, peer, 9000) as made:
            assert _exchange(made) == b"x"
        taken = _count(peer, "plaintext_syn")
        with pytest.raises(ConnectionRefusedError):
            _dial(mesh, peer, 9001)
        for port in (15000, 15001, 15006, 15020, 15021):
            with pytest.raises(ConnectionRefusedError):
                _dial(mesh, peer, port)
        assert _count(peer, "plaintext_syn") == taken


@pytest.mark.parametrize(
    ("action", "source", "allowed"),
    [
        ("ALLOW", 'principals: ["*"]', False),
        ("ALLOW", 'notPrincipals: ["lab.test/ns/load/sa/caller"]', True),
        ("ALLOW", "namespaces: [load]", False),
        ("ALLOW", 'ipBlocks: ["10.95.0.0/24", "fd95::/64"]', True),
        ("DENY", 'notPrincipals: ["lab.test/ns/load/sa/caller"]', False),
        ("DENY", 'principals: ["*"]', True),
        ("DENY", 'notNamespaces: ["load"]', False),
        ("DENY", 'ipBlocks: ["10.95.0.0/24", "fd95::/64"]', False),
    ],
)
def test_policy_sees_nobody(mesh: Mesh, action: str, source: str, allowed: bool) -> None:
    """Istio's: without a principal no positive field of identity matches, and every negative one does."""
    with (
        configured(mesh, _PERMISSIVE + _POLICY % (action, source), "peer") as peer,
        inside.serving(peer, 9000, inside.echo),
        mesh.shop.a.entered(),
    ):
        made = socket.socket()
        if allowed:
            with made:
                assert _exchange_with(made, (peer.address, 9000)) == b"x"
        else:
            ours = _reset(made, (peer.address, 9000))
            told = peer.await_access(lambda e: e.get("src.addr", "").endswith(ours))
            assert (told["response_flags"], told.get("policy", "")) == ("DENY", "load/who[0]" * (action == "DENY"))


@FAMILIES
def test_back_to_strict_cuts_plaintext_and_nothing_else(
    mesh: Mesh, name: str, caller: str, vip: tuple[str, int]
) -> None:
    with (
        configured(mesh, _PERMISSIVE, name) as peer,
        inside.serving(peer, 9000, inside.echo),
        _dial(mesh, peer) as plain,
        inside.dial(getattr(mesh, caller), vip) as tunnelled,
    ):
        assert _exchange(plain) == _exchange(tunnelled) == b"x"
        mesh.lab.configure(shop.RESOURCES + LOAD)
        with pytest.raises(ConnectionResetError):
            plain.recv(1)
        assert _exchange(tunnelled) == b"x"
        inside.eventually(lambda: _refused(mesh, peer))
        told = peer.await_access(lambda e: "takes mTLS only" in e.get("error", ""))
        assert told["response_flags"] == "RESET"


def _refused(mesh: Mesh, peer: Workload) -> bool:
    try:
        _dial(mesh, peer).close()
    except ConnectionRefusedError:
        return True
    return False


@FAMILIES
def test_a_policy_that_comes_later_cuts_too(mesh: Mesh, name: str, caller: str, vip: tuple[str, int]) -> None:
    with (
        configured(mesh, _PERMISSIVE, name) as peer,
        inside.serving(peer, 9000, inside.echo),
        _dial(mesh, peer) as plain,
    ):
        assert _exchange(plain) == b"x"
        mesh.lab.configure(shop.RESOURCES + LOAD + _PERMISSIVE + _POLICY % ("ALLOW", "namespaces: [load]"))
        with pytest.raises(ConnectionResetError):
            plain.recv(1)


@FAMILIES
def test_a_dead_uproxy_means_refused_and_its_successor_takes_plaintext_again(
    mesh: Mesh, name: str, caller: str, vip: tuple[str, int]
) -> None:
    with configured(mesh, _PERMISSIVE, name) as peer, inside.serving(peer, 9000, inside.echo):
        pid = peer.proxy_pid()
        with _dial(mesh, peer) as made:
            assert _exchange(made) == b"x"
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(ConnectionResetError):
                made.recv(1)
        seen: set[object] = set()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                with _dial(mesh, peer) as made:
                    seen.add(_exchange(made))
                    break
            except OSError as error:
                seen.add(type(error))
        # A reset in the moment of its death, when its listener goes with connections that it has not accepted.
        assert seen - {ConnectionResetError} == {ConnectionRefusedError, b"x"}
        assert peer.proxy_pid() != pid


@FAMILIES
def test_a_dead_node_agent_changes_nothing_nor_does_its_successor(
    mesh: Mesh, name: str, caller: str, vip: tuple[str, int]
) -> None:
    """The uProxy tells the kernel itself: what it opens and closes needs no agent."""
    peer: Workload = getattr(mesh, name)
    host = peer.host
    assert host.agent is not None
    with inside.serving(peer, 9000, inside.echo):
        host.agent.kill()
        host.agent.wait()
        try:
            assert _refused(mesh, peer)
            mesh.lab.configure(shop.RESOURCES + LOAD + _PERMISSIVE)
            inside.eventually(lambda: not _refused(mesh, peer))
            with _dial(mesh, peer) as plain:
                assert _exchange(plain) == b"x"
                host.node_socket.unlink(missing_ok=True)
                host.start_agent()
                inside.eventually(host.agent_running)
                assert _exchange(plain) == b"x"
            assert not _refused(mesh, peer)
        finally:
            mesh.lab.configure(shop.RESOURCES + LOAD)
            inside.eventually(host.agent_running)
        for one in (mesh.peer, mesh.peer6):
            inside.eventually(lambda one=one: not _takes(mesh, one))
        assert _refused(mesh, peer)


@FAMILIES
def test_connections_in_plaintext_are_shown_while_they_live(
    mesh: Mesh, name: str, caller: str, vip: tuple[str, int]
) -> None:
    with (
        configured(mesh, _PERMISSIVE, name) as peer,
        inside.serving(peer, 9000, inside.echo),
        _dial(mesh, peer) as plain,
    ):
        plain.sendall(b"x" * 1000)
        received = 0
        while received < 1000:
            received += len(plain.recv(1000))
        ours = host_port(*plain.getsockname()[:2])
        shown = json.loads(inside.http_get(peer, 15000, "/connections"))["connections"]
        (one,) = [one for one in shown if one["src.addr"] == ours]
        assert (one["bytes_recv"], one["bytes_sent"], one["dst.workload"]) == (1000, 1000, name)
        assert "src.identity" not in one
        assert json.loads(inside.http_get(peer, 15000, "/config_dump"))["plaintext"] == {"others": True, "ports": []}


def test_a_uproxy_of_a_fork_server_takes_plaintext_too(mesh: Mesh, job: Workload, tmp_path: Path) -> None:
    """The kernel is told by a socket of the proxy cgroup, which a forked process has joined first."""
    launched = ["--fork-server", str(tmp_path / "fork.sock")]
    with (
        configured(mesh, _PERMISSIVE, "peer"),
        fork_server(job, tmp_path / "fork.sock"),
        running(job, "sh", "-c", FOREVER, launched=launched),
        inside.serving(job, 9000, inside.echo),
        mesh.shop.b.entered(),
        socket.create_connection((job.address, 9000), timeout=30) as made,
    ):
        assert _exchange(made) == b"x"


def test_nobody_dials_the_plaintext_port_itself(mesh: Mesh) -> None:
    with configured(mesh, _PERMISSIVE, "peer") as peer:
        (made,) = peer.sockets()
        _reset(made, ("127.0.0.1", 15006))
        told = peer.await_access(lambda e: e.get("dst.addr") == "127.0.0.1:15006")
        assert "wrong-destination" in told["error"]
        (made,) = peer.sockets()
        with made, pytest.raises(ConnectionRefusedError):
            made.connect((peer.address, 15006))
