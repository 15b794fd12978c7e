"""The lab's links: who sends with which congestion control, and how long a delay line takes."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from benchmarks.lab import link
from benchmarks.lab.apps import commands
from benchmarks.lab.topology import Host, Lab, entered
from benchmarks.netns import joined
from uproxy.sandbox import Sandbox

pytestmark = [pytest.mark.root, pytest.mark.mesh]
PORT = 8080


@contextmanager
def connected(client: Sandbox, server: Sandbox) -> Iterator[tuple[socket.socket, socket.socket]]:
    with entered(server.netns_path):
        listener = socket.create_server((server.addresses[0], PORT))
    with closing(listener):
        with entered(client.netns_path):
            near = socket.create_connection((server.addresses[0], PORT), 5)
        far, _ = listener.accept()
        with near, far:
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.settimeout(10)
            yield near, far


def algorithm(end: socket.socket) -> str:
    return end.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def round_trip_ms(near: socket.socket, far: socket.socket) -> float:
    """The median of a few."""
    took = []
    for _ in range(100):
        began = time.perf_counter()
        near.send(b"x")
        far.recv(1)
        far.send(b"x")
        near.recv(1)
        took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)


def pair(lab: Lab) -> tuple[Host, Sandbox, Sandbox]:
    a, b = lab.host("a"), lab.host("b")
    return b, a.twin("client"), b.twin("server")


def test_both_ends_of_a_connection_in_the_lab_use_cubic() -> None:
    with Lab() as lab:
        _, client, server = pair(lab)
        with connected(client, server) as ends:
            assert [algorithm(end) for end in ends] == ["cubic", "cubic"]
            seen = [
                subprocess.run(["ip", "netns", "exec", box.netns, "ss", "-tniH"], capture_output=True, text=True)
                for box in (client, server)
            ]
        assert all("cubic" in one.stdout and "bbr" not in one.stdout for one in seen), seen


def test_everything_that_a_uproxy_and_its_application_hold_open_uses_cubic() -> None:
    with Lab() as lab:
        a, b = lab.host("a"), lab.host("b")
        web, db = a.workload("web", commands.idle()), b.workload("db", commands.redis())
        lab.start()
        (near,) = web.sockets()
        with near:
            near.settimeout(10)
            near.connect((db.address, 6379))
            near.send(b"PING\r\n")
            assert near.recv(100) == b"+PONG\r\n"
            for workload in (web, db):
                listed = ["ip", "netns", "exec", workload.netns, "ss", "-tniH", "state", "established"]
                lines = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines()
                used = {line.split()[0] for line in lines if line.startswith("\t")}
                assert used == {"cubic"}, lines


def test_the_wire_between_two_nameless_namespaces_uses_cubic() -> None:
    with joined("10.77.0.1/24", "10.77.0.2/24") as (left, right), right.listen(("10.77.0.2", PORT)) as listener:
        with left.connect(("10.77.0.2", PORT)) as near, listener.accept()[0] as far:
            assert [algorithm(near), algorithm(far)] == ["cubic", "cubic"]
        # On loopback, too: that is where a captured connection goes first.
        here = ("127.0.0.1", PORT)
        with left.listen(here) as local, left.connect(here) as near, local.accept()[0] as far:
            assert [algorithm(near), algorithm(far)] == ["cubic", "cubic"]


@pytest.mark.parametrize("one_way_ms", [1, 5])
def test_a_round_trip_takes_twice_the_delay_longer(one_way_ms: int, tmp_path: Path) -> None:
    program = link.build(tmp_path)
    with Lab() as lab:
        host, client, server = pair(lab)
        with connected(client, server) as ends:
            before = round_trip_ms(*ends)
            with link.delayed(lab, host, program, one_way_ms, core=0) as carried:
                added = round_trip_ms(*ends) - before
            after = round_trip_ms(*ends)
        # Generous above: other work on this machine delays whoever waits.
        assert 2 * one_way_ms * 0.98 <= added < 2 * one_way_ms + 1.5
        assert after < one_way_ms
        assert carried.frames >= 200
        assert carried.lost == 0


def test_large_frames_pass_a_delay_line_whole_and_none_is_lost(tmp_path: Path) -> None:
    program = link.build(tmp_path)
    sent = bytes(range(256)) * 4096 * 32
    with Lab() as lab:
        host, client, server = pair(lab)
        with connected(client, server) as (near, far), link.delayed(lab, host, program, 0.25, core=0) as carried:
            writer = threading.Thread(target=near.sendall, args=(sent,))
            writer.start()
            got = bytearray()
            while len(got) < len(sent):
                got += far.recv(1 << 20)
            writer.join()
        assert got == sent
        assert carried.lost == 0
        # 32 MiB in frames of 1,448 bytes would be 23,000.
        assert carried.frames < 12_000


def test_a_delay_line_ends_even_when_the_signal_comes_before_it_waits(tmp_path: Path) -> None:
    """The signal is there before the line's first wait, in which it must be let through."""
    program = link.build(tmp_path)

    def already_told() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        os.kill(os.getpid(), signal.SIGTERM)

    with joined("10.77.0.1/24", "10.77.0.2/24") as (left, _):
        with left.entered():
            argv = [str(program), "wire", "lo", "1000"]
            line = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, preexec_fn=already_told)
        with line:
            try:
                out, _ = line.communicate(timeout=30)
            finally:
                line.kill()
    assert out.startswith('ready\n{"carried": ')
