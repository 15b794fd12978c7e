"""`uproxy upgrade` under load: no connection is refused or cut, nothing is in the clear, and the old ones end."""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from benchmarks.lab.topology import Workload
from tests.mesh.conftest import NEAR_PEER, PEER, PEER_V6, Mesh
from tests.mesh.test_fork_server import fork_server, says
from tests.mesh.test_fork_server import path as path  # its fixture
from tests.mesh.test_permissive import _PERMISSIVE, _dial, configured
from tests.support import inside, open_loop
from tests.support.job import FOREVER, gone, running
from tests.support.secrecy import nothing_in_the_clear
from tests.support.upgrading import attempt, begun, upgrade
from tests.support.upgrading import running as uproxies
from uproxy.node.channel import RENEWAL_S

_RATE = 25.0  # connections a second of each pair: the machine is shared, and what is tested are moments
_HELD = 3


def _under_load(mesh: Mesh, rounds: int, most_s: float = 90.0) -> None:
    """Each of four uProxies is upgraded `rounds` times, in any order."""
    seed = secrets.randbits(32)
    chance = random.Random(seed)
    mark = secrets.token_bytes(16)
    pairs = [(mesh.caller, mesh.peer, PEER), (mesh.caller6, mesh.peer6, PEER_V6)]
    workloads = [mesh.caller, mesh.peer, mesh.caller6, mesh.peer6] * rounds
    chance.shuffle(workloads)
    payload = mark + random.randbytes(500)
    with nothing_in_the_clear((mesh.shop.a, mesh.shop.b), mark):
        with open_loop.running(pairs, payload, rate=_RATE, held=_HELD, most_s=most_s) as loads:
            open_loop.wait_for(loads, 5)
            for workload in workloads:
                former = uproxies(workload)
                assert upgrade(workload) not in former, f"seed {seed}"
                open_loop.wait_for(loads, 3)
            open_loop.go_on(loads)
        for load in loads:
            assert load.outcomes.keys() == {"ok"}, f"seed {seed}: {load.outcomes}"
            assert not load.broken, f"seed {seed}: {load.broken}"
            assert load.beats > _HELD
    for workload in set(workloads):
        inside.eventually(lambda workload=workload: len(uproxies(workload)) == 1, 30)


def test_upgrades_under_load_refuse_and_cut_nothing(mesh: Mesh) -> None:
    _under_load(mesh, 1)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_twenty_upgrades_of_each_uproxy_refuse_and_cut_nothing(mesh: Mesh) -> None:
    for _ in range(4):  # a load has all of its sockets from the beginning
        _under_load(mesh, 5)


@pytest.mark.soak
def test_either_one_killed_at_random_moments_opens_nothing_and_leaves_one_that_serves(mesh: Mesh) -> None:
    seed = secrets.randbits(32)
    chance = random.Random(seed)
    mark = secrets.token_bytes(16)
    pairs = [(mesh.caller, mesh.peer, PEER), (mesh.caller6, mesh.peer6, PEER_V6)]
    with nothing_in_the_clear((mesh.shop.a, mesh.shop.b), mark):
        with open_loop.running(pairs, mark + random.randbytes(500), rate=_RATE, held=_HELD, most_s=100) as loads:
            open_loop.wait_for(loads, 5)
            for _ in range(12):
                workload = chance.choice([mesh.caller, mesh.peer, mesh.caller6, mesh.peer6])
                before = uproxies(workload)
                with begun(workload) as asking:
                    inside.eventually(lambda workload=workload, before=before: uproxies(workload) > before)
                    time.sleep(chance.uniform(0, 1.2))  # it is ready within a second or so
                    for pid in chance.choice([before, uproxies(workload) - before]):
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    asking.wait(120)
                open_loop.go_on(loads)
        open_loop.assert_refused_or_reset(loads, seed)
    for workload in (mesh.caller, mesh.peer, mesh.caller6, mesh.peer6):
        inside.eventually(lambda workload=workload: len(uproxies(workload)) == 1, 30)


def test_connections_that_go_direct_never_notice(mesh: Mesh) -> None:
    with inside.serving(mesh.near_peer, NEAR_PEER[1], inside.echo):
        host = mesh.shop.a
        inside.eventually(lambda: inside.goes_direct(host, mesh.near_caller, NEAR_PEER))
        with inside.dial(mesh.near_caller, NEAR_PEER) as held:
            for workload in (mesh.near_caller, mesh.near_peer):
                former = uproxies(workload)
                assert upgrade(workload) not in former
                inside.eventually(lambda workload=workload, former=former: not uproxies(workload) & former)
            deadline = time.monotonic() + 1.2 * RENEWAL_S  # both ends say all they know once more
            while time.monotonic() < deadline:
                held.sendall(b"x")
                assert held.recv(1) == b"x"
                time.sleep(0.1)
            assert inside.goes_direct(host, mesh.near_caller, NEAR_PEER), "what was granted is granted"


def test_connection_in_plaintext_goes_on_in_the_new_one(mesh: Mesh) -> None:
    """With bytes that wait in the uProxy for a reader, and an end that was said."""
    content = random.randbytes(3_000_000)
    with configured(mesh, _PERMISSIVE, "peer") as peer, ExitStack() as stack:
        listener = stack.enter_context(inside.listen(peer, PEER[1]))
        made = stack.enter_context(_dial(mesh, peer))
        served, _ = listener.accept()
        stack.enter_context(served)
        made.sendall(b"a")
        assert served.recv(1) == b"a"
        sent = _fill(made, content)
        former = uproxies(peer)
        new = upgrade(peer)
        inside.eventually(lambda: uproxies(peer) == {new})
        assert not former & uproxies(peer), "nothing holds the old one up"
        received = b""
        while len(received) < sent:
            received += served.recv(1 << 20)
        assert received == content[:sent]
        made.shutdown(socket.SHUT_WR)
        assert served.recv(1) == b""
        served.sendall(b"bye")
        served.shutdown(socket.SHUT_WR)
        assert made.recv(4) == b"bye"
        assert made.recv(1) == b""
        own = f"{made.getsockname()[0]}:{made.getsockname()[1]}"
        entry = peer.await_access(lambda entry: entry.get("src.addr") == own)
        assert (entry["bytes_sent"], entry["bytes_recv"]) == (3, sent + 1), "logged once, as a whole"
        assert [one.get("src.addr") for one in peer.access_log()].count(own) == 1


def _fill(sock: socket.socket, content: bytes) -> int:
    """Send until nothing is taken any more; how much was."""
    sock.setblocking(False)
    sent, stuck_since = 0, time.monotonic()
    while time.monotonic() - stuck_since < 0.5 and sent < len(content):
        try:
            sent += sock.send(content[sent : sent + 65536])
            stuck_since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.02)
    sock.settimeout(30)
    return sent


def test_sidecar_of_a_fork_server_is_upgraded_by_it(mesh: Mesh, job: Workload, path: Path) -> None:
    with (
        fork_server(job, path) as server,
        inside.serving(mesh.peer, PEER[1], inside.echo),
        running(job, "sh", "-c", FOREVER, launched=["--fork-server", str(path)]),
        inside.dial(job, PEER) as held,
    ):
        held.sendall(b"x")
        assert held.recv(1) == b"x"
        (old,) = uproxies(job)
        server.terminate()  # as when it is upgraded, too
        server.wait(60)
        done = attempt(job)
        assert done.returncode == 1
        assert "the new one cannot be started" in done.stderr
        assert says(job, b"hello") == b"hello"
        with fork_server(job, path):
            new = upgrade(job)
            assert uproxies(job) == {old, new}
            assert says(job, b"hello") == b"hello"
            held.sendall(b"y")
            assert held.recv(1) == b"y"
            held.close()
            inside.eventually(lambda: uproxies(job) == {new})
            assert says(job, b"hello") == b"hello"
    gone(job)


def test_new_one_that_does_not_start_leaves_all_as_it_was(mesh: Mesh, job: Workload) -> None:
    del mesh
    with running(job, "sh", "-c", FOREVER):
        (old,) = uproxies(job)
        identity = job.host.lab.directory / "state" / job.name / "chain.pem"
        good = identity.read_bytes()
        identity.write_bytes(b"none")
        done = attempt(job)
        identity.write_bytes(good)
        assert done.returncode == 1
        assert "did not take over" in done.stderr
        assert uproxies(job) == {old}
        new = upgrade(job)
        inside.eventually(lambda: uproxies(job) == {new})
    gone(job)
