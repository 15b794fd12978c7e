"""Datagrams of a service that lets them pass in plaintext, between two hosts; and no others."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from benchmarks.lab import shop
from benchmarks.lab.topology import Workload
from tests.mesh.conftest import LOAD, Mesh
from tests.support import inside

_PORT = 5353
BEACONS = """\
---
apiVersion: v1
kind: Service
metadata: {name: beacon, namespace: load, annotations: {mesh.uproxy.dev/udp: plaintext}}
spec:
  selector: {app: peer}
  ports: [{name: beacon, port: 53, targetPort: 5353, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: beacon6, namespace: load, annotations: {mesh.uproxy.dev/udp: plaintext}}
spec:
  clusterIP: "fd96:0:0:ffff::53"
  ipFamilies: [IPv6]
  selector: {app: peer6}
  ports: [{name: beacon, port: 53, targetPort: 5353, protocol: UDP}]
"""
FAMILIES = pytest.mark.parametrize(("caller", "peer"), [("caller", "peer"), ("caller6", "peer6")], ids=["v4", "v6"])


def udp(workload: Workload) -> socket.socket:
    """As the application of a workload makes it."""
    (made,) = workload.sockets(1, inside.family_of((workload.address, 0)), socket.SOCK_DGRAM)
    made.settimeout(30)
    return made


def passes(made: socket.socket, to: tuple[str, int]) -> bool:
    try:
        made.sendto(b"x", to)
    except PermissionError:
        return False
    return True


def is_connected(made: socket.socket) -> bool:
    try:
        made.getpeername()
    except OSError:
        return False
    return True


@pytest.fixture
def declared(mesh: Mesh) -> Iterator[Mesh]:
    mesh.lab.configure(shop.RESOURCES + LOAD + BEACONS)
    yield mesh
    mesh.lab.configure(shop.RESOURCES + LOAD)


@FAMILIES
def test_question_and_answer_pass_until_the_service_says_so_no_more(declared: Mesh, caller: str, peer: str) -> None:
    ours, theirs = getattr(declared, caller), getattr(declared, peer)
    end = (theirs.address, _PORT)
    with udp(ours) as asking, udp(ours) as connected, udp(theirs) as answering:
        answering.bind(end)
        inside.eventually(lambda: passes(asking, end))
        got, source = answering.recvfrom(100)
        assert (got, source[0]) == (b"x", ours.address)
        inside.eventually(lambda: passes(answering, source[:2]))
        assert asking.recvfrom(100)[1][:2] == end
        connected.connect(end)
        connected.send(b"y")
        assert answering.recv(100) == b"y"
        assert not passes(asking, (theirs.address, _PORT + 1))
        assert not passes(asking, (theirs.address, 53)), "the service's port is its own addresses'"

        declared.lab.configure(shop.RESOURCES + LOAD)
        inside.eventually(lambda: not passes(asking, end))
        inside.eventually(lambda: not passes(answering, source[:2]))
        inside.eventually(lambda: not is_connected(connected))
