"""What reaches what, and what both sides know of each other."""

from __future__ import annotations

import errno
import json
import re
import socket
import time

import pytest

from benchmarks.lab import shop
from benchmarks.lab.shop import DB, REVIEWS
from tests.mesh.conftest import LOAD, PEER, PEER_V6, Mesh
from tests.support import inside
from uproxy.entrance import sockets_inside

_REFUSED = re.compile("refused|not permitted|denied")

_DENY = """\
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-caller, namespace: load}
spec:
  action: DENY
  rules:
  - from: [{source: {serviceAccounts: [caller]}}]
"""


def test_both_versions_answer_at_one_service_address(mesh: Mesh) -> None:
    seen = set()
    for _ in range(40):
        answer = mesh.shop.web.job(job="http", host=REVIEWS[0], port=REVIEWS[1], path="/r")
        seen.add(json.loads(answer["body"])["version"])
        assert answer["peer"] == REVIEWS[0]
        if len(seen) == 2:
            break
    assert seen == {"v1", "v2"}


def test_workload_address_is_tunnelled_too(mesh: Mesh) -> None:
    answer = mesh.shop.web.job(job="redis", host=mesh.shop.db.address, port=DB[1], command=["PING"])
    assert answer["reply"] == "+PONG"
    entry = mesh.shop.db.await_access(lambda e: e["direction"] == "inbound")
    assert entry["src.identity"] == str(mesh.shop.web.identity)


@pytest.mark.parametrize(("caller", "peer", "address"), [("caller", "peer", PEER), ("caller6", "peer6", PEER_V6)])
def test_half_close_and_identity_over_both_families(
    mesh: Mesh, caller: str, peer: str, address: tuple[str, int]
) -> None:
    ours, theirs = getattr(mesh, caller), getattr(mesh, peer)

    def answer_after_the_end(connection: socket.socket) -> None:
        got = inside.read_all(connection)
        connection.sendall(b"%d bytes, all of them" % len(got))

    with inside.serving(theirs, 9000, answer_after_the_end), inside.dial(ours, address) as made:
        assert made.getpeername()[:2] == address
        made.sendall(b"x" * 100_000)
        made.shutdown(socket.SHUT_WR)
        assert inside.read_all(made) == b"100000 bytes, all of them"
    entry = theirs.await_access(lambda e: e.get("bytes_recv") == 100_000)
    assert (entry["src.identity"], entry["dst.identity"]) == (str(ours.identity), str(theirs.identity))


def test_reset_crosses_as_a_reset(mesh: Mesh) -> None:
    def reset(connection: socket.socket) -> None:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with inside.serving(mesh.peer, 9000, reset), inside.dial(mesh.caller, PEER) as made:
        made.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            made.recv(1)


def test_metrics_name_both_workloads(mesh: Mesh) -> None:
    before = inside.metric(mesh.peer, "istio_tcp_connections_closed_total")
    with inside.serving(mesh.peer, 9000, inside.echo), inside.dial(mesh.caller, PEER) as made:
        made.sendall(b"x")
        assert made.recv(1) == b"x"
    inside.eventually(lambda: inside.metric(mesh.peer, "istio_tcp_connections_closed_total") == before + 1)
    text = inside.http_get(mesh.peer, 15020, "/metrics")
    series = re.findall(r"^istio_tcp_connections_opened_total{(.*)} ", text, re.MULTILINE)
    told = {
        'source_workload="caller"',
        'source_principal="spiffe://lab.test/ns/load/sa/caller"',
        'destination_workload="peer"',
        'connection_security_policy="mutual_tls"',
    }
    assert any(told <= set(labels.split(",")) for labels in series), series


def test_policy_change_takes_effect_on_live_connections(mesh: Mesh) -> None:
    with inside.serving(mesh.peer, 9000, inside.echo), inside.dial(mesh.caller, PEER) as made:
        made.sendall(b"x")
        assert made.recv(1) == b"x"
        try:
            mesh.lab.configure(shop.RESOURCES + LOAD + _DENY)
            assert _ends(made), "a connection that a new DENY forbids goes on"
            assert _refusal(mesh) in {"ECONNRESET", "ECONNREFUSED"}
            entry = mesh.peer.await_access(lambda e: "no-caller" in e.get("policy", "") + e.get("error", ""))
            assert entry["src.identity"] == str(mesh.caller.identity)
        finally:
            mesh.lab.configure(shop.RESOURCES + LOAD)
        inside.eventually(lambda: _refusal(mesh) == "")


def test_unknown_address_in_the_mesh_ranges_is_refused(mesh: Mesh) -> None:
    for address in ("240.240.9.9", "10.96.2.250"):
        with pytest.raises(OSError, match=_REFUSED):
            inside.dial(mesh.caller, (address, 80), timeout_s=3)
    assert mesh.caller.host.node().status()["counters"]["refused_no_config"] >= 2


def test_udp_into_the_mesh_is_refused(mesh: Mesh) -> None:
    with open(mesh.caller.box.netns_path) as netns:
        (made,) = sockets_inside(mesh.caller.box.app_cgroup, netns.fileno(), [socket.AF_INET], socket.SOCK_DGRAM)
    with made, pytest.raises(OSError, match=_REFUSED):
        made.sendto(b"x", PEER)


def test_application_cannot_take_the_proxys_ports(mesh: Mesh) -> None:
    (made,) = mesh.caller.sockets()
    with made, pytest.raises(OSError, match=_REFUSED):
        made.bind(("127.0.0.1", 15002))


def _refusal(mesh: Mesh) -> str:
    """ "" when the caller reaches the peer, else how it failed."""
    try:
        with inside.dial(mesh.caller, PEER, timeout_s=5) as made:
            made.sendall(b"x")
            return "" if made.recv(1) == b"x" else "FIN"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def _ends(made: socket.socket) -> bool:
    """Whether an echo connection ends within some seconds."""
    deadline = time.monotonic() + 8
    try:
        while time.monotonic() < deadline:
            made.sendall(b"x")
            if not made.recv(1):
                return True
            time.sleep(0.05)
    except OSError:
        return True
    return False
