"""The load generator against its own server, and against servers that misbehave."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks import load
from benchmarks.harness import histogram
from benchmarks.load import Outcome
from tests.benchmarks.load.conftest import LOOPBACK, Served, free_ports, spawn

SECONDS = 0.3


@pytest.fixture
def ran(program: Path) -> Callable[..., Outcome]:
    def run(wanted: load.Load, port: int, seconds: float = SECONDS, host: str = LOOPBACK) -> Outcome:
        return load.run(spawn, program, wanted, host, port, seconds)

    return run


Ran = Callable[..., Outcome]


@contextmanager
def answering(answer: Callable[[socket.socket], None], address: str = LOOPBACK) -> Iterator[int]:
    """A server whose every connection is given to `answer`, in a thread of its own. Its port."""
    with socket.create_server((address, 0), backlog=512) as listener:

        def serve(made: socket.socket) -> None:
            with made, suppress(OSError):
                answer(made)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    made, _ = listener.accept()
                    threading.Thread(target=serve, args=(made,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def echo(made: socket.socket) -> None:
    while data := made.recv(1 << 16):
        made.sendall(data)


def heads(made: socket.socket) -> Iterator[bytes]:
    """Each request of a connection."""
    read = b""
    while data := made.recv(1 << 16):
        read += data
        while b"\r\n\r\n" in read:
            head, _, read = read.partition(b"\r\n\r\n")
            yield head


LOADS = [
    (load.closed(8, 64), 0, "closed"),
    (load.closed(2, 262_144), 0, "the longest echo"),
    (load.opened(8, 64, 1000), 0, "open"),
    (load.opened(8, 64, 1000, poisson=False), 0, "at even distances"),
    (load.http_closed(8, "/bytes/100", "db"), load.HTTP, "HTTP closed"),
    (load.http_closed(2, "/bytes/1000000", "db"), load.HTTP, "long answers"),
    (load.http_open(8, "/bytes/0", "db", 1000), load.HTTP, "HTTP open"),
    (load.http_closed(8, "/any", "db", "http1", 1024), load.HTTP, "POST"),
    (load.http_closed(8, "/any", "db", "http2", 1024), load.HTTP, "HTTP/2"),
    (load.http_closed(8, "/any", "db", "grpc", 1024), load.HTTP, "gRPC"),
    (load.http_open(8, "/any", "db", 1000, "grpc", 10), load.HTTP, "gRPC open"),
    (load.connects(4), 0, "connects"),
    (load.dials(), 0, "dials"),
    (load.beside_bulk(4, 64, 500, 2, 0.2), 0, "beside bulk"),
    (load.slow_readers(20, 4, 64, 500), 0, "slow readers"),
]


@pytest.mark.parametrize(("wanted", "offset"), [one[:2] for one in LOADS], ids=[one[2] for one in LOADS])
def test_each_load_has_its_requests_answered_and_counted(ran: Ran, served: Served, wanted: load.Load, offset: int):
    before = time.monotonic_ns()
    found = ran(wanted, served() + offset)
    assert found.scheduled == found.answered > 10
    assert not found.errors
    assert found.broken == 0
    assert 10 < found.operations <= found.answered
    assert found.operations == histogram.count(found.histogram)
    assert found.seconds == pytest.approx(SECONDS)
    assert before < found.start_ns < found.end_ns < time.monotonic_ns()
    assert found.value > 0
    assert 0 < found.percentile_us(0.5) <= found.percentile_us(0.99) <= found.max_us * 1.001
    assert found.mean_us == pytest.approx(histogram.mean(found.histogram) / 1000, rel=0.01)
    assert 0 < found.generator.cpu_share < 1.05


def test_a_closed_loop_is_worth_its_time_per_operation(ran: Ran, served: Served):
    found = ran(load.closed(4, 64), served())
    assert found.value == pytest.approx(found.seconds * 1e6 / found.operations)
    # So many are on their way at any time (Little's law).
    assert found.mean_us / found.value == pytest.approx(4, rel=0.1)


def test_dials_go_to_all_of_the_addresses_and_to_no_other(ran: Ran):
    seen: Counter[str] = Counter()

    def count(made: socket.socket) -> None:
        seen[made.getsockname()[0]] += 1
        made.sendall(made.recv(1))

    with answering(count, "0.0.0.0") as port:
        found = ran(load.dials(4), port, host="127.0.3.254")
    assert found.scheduled == found.answered == sum(seen.values())
    assert seen.keys() == {"127.0.3.254", "127.0.3.255", "127.0.4.0", "127.0.4.1"}
    assert min(seen.values()) > 0.5 * max(seen.values())
    assert found.value == found.percentile_us(0.25)


@pytest.mark.parametrize("streams", [1, 5])
def test_bulk_arrives_whole_and_is_counted(ran: Ran, served: Served, streams: int):
    found = ran(load.bulk(streams), served())
    assert found.value == pytest.approx(found.operations * 2**20 * 8 / SECONDS / 1e9)
    assert found.value > 0.05


def test_streams_beside_requests_are_counted_too(ran: Ran, served: Served):
    assert ran(load.beside_bulk(4, 64, 500, 1, 0.2), served()).gbit_per_s > 0.05
    assert ran(load.opened(4, 64, 500), served()).gbit_per_s == 0


@pytest.mark.parametrize(("streams", "gbit_per_s"), [(1, 0.05), (1, 0.4), (3, 0.2)])
def test_streams_beside_requests_keep_to_their_rate(ran: Ran, served: Served, streams: int, gbit_per_s: float):
    port = served()
    # The warm-up is a tenth: what a stream sends once late is made up for within it, on a machine that is not busy.
    found = [ran(load.beside_bulk(4, 64, 500, streams, gbit_per_s), port, 1.0) for _ in range(3)]
    assert min(abs(one.gbit_per_s / gbit_per_s - 1) for one in found) < 0.03
    assert [one.asked_gbit_per_s for one in found] == pytest.approx([gbit_per_s] * 3)


def test_streams_that_cannot_be_carried_make_the_round_one_that_does_not_count(ran: Ran, served: Served):
    found = ran(load.beside_bulk(4, 64, 500, 1, 800), served())
    assert found.gbit_per_s < 400
    assert "of 800 Gbit/s" in found.bottleneck


def test_idle_connections_are_held_and_work(ran: Ran, served: Served):
    found = ran(load.idle(2000), served())
    assert (found.value, found.operations) == (2000, 2000)


def test_idle_connections_may_be_of_http(ran: Ran, served: Served):
    found = ran(load.http_idle(200, "/any", "db", 64), served() + load.HTTP)
    assert (found.value, found.operations) == (200, 200)


def test_ipv6(ran: Ran, served: Served):
    port = served("::1")
    assert ran(load.closed(2, 64), port, host="::1").operations > 10
    assert ran(load.opened(2, 64, 500), port, host="::1").operations > 10


def test_an_open_loop_keeps_to_its_rate_and_its_schedule(ran: Ran, served: Served):
    port = served()
    even = ran(load.opened(4, 64, 1000, poisson=False), port)
    assert even.operations == pytest.approx(300, abs=1)
    assert even.scheduled == pytest.approx(330, abs=1)
    # The same seed has the same arrivals, another has others.
    first, again, other = (ran(load.opened(4, 64, 2000).seeded(seed), port, 1.0) for seed in (3, 3, 4))
    assert first.scheduled == again.scheduled != other.scheduled
    # Poisson: of 2,200 expected, the deviation is 47.
    assert all(abs(one.scheduled - 2200) < 5 * 47 for one in (first, other))


def test_an_echo_that_differs_ends_the_run(ran: Ran):
    def damaged(made: socket.socket) -> None:
        number = 0
        while data := bytearray(made.recv(1 << 16)):
            number += 1
            data[0] ^= number == 100
            made.sendall(data)

    with answering(damaged) as port, pytest.raises(load.LoadError, match="the echo differs from what was sent"):
        ran(load.closed(2, 64), port)


def test_an_answer_to_another_request_is_no_answer(ran: Ran):
    """Each request has bytes of its own: a server that always sends the first one's is found out."""

    def first_only(made: socket.socket) -> None:
        made.sendall(made.recv(1))
        first = b""
        while data := made.recv(64):
            first = first or data
            made.sendall(first)

    with answering(first_only) as port, pytest.raises(load.LoadError, match="the echo differs"):
        ran(load.closed(1, 64), port)


@pytest.mark.parametrize("wanted", [load.closed(1, 64), load.opened(1, 64, 100), load.http_open(1, "/", "x", 100)])
def test_a_target_that_is_not_there_is_said(ran: Ran, wanted: load.Load):
    with free_ports(1) as port:
        pass
    with pytest.raises(load.LoadError, match="before the load, connection 0: connect: Connection refused"):
        ran(wanted, port)


def test_each_request_has_an_id_of_its_own(ran: Ran):
    seen = []

    def collect(made: socket.socket) -> None:
        for head in heads(made):
            seen.append(head)
            made.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with answering(collect) as port:
        assert not ran(load.http_closed(2, "/of", "x"), port).errors
    named = [
        re.fullmatch(rb"GET /of\?id=([0-9a-f-]{36}) HTTP/1.1\r\nHost: x\r\nX-Request-Id: ([0-9a-f-]{36})", head)
        for head in seen
    ]
    ids = [found[1] for found in named if found is not None and found[1] == found[2]]
    assert len(seen) > 10
    assert len(set(ids)) == len(seen)


def test_every_status_but_200_is_an_error_and_not_an_operation(ran: Ran):
    def third_fails(made: socket.socket) -> None:
        for number, _ in enumerate(heads(made)):
            status = b"503 Service Unavailable" if number % 3 == 2 else b"200 OK"
            made.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\nhi")

    with answering(third_fails) as port:
        found = ran(load.http_open(1, "/", "x", 300), port)
    assert set(found.errors) == {"status 503"}
    assert found.failed == pytest.approx(found.scheduled / 3, abs=2)
    assert found.scheduled == found.answered + found.failed


@pytest.mark.parametrize("open_loop", [True, False])
def test_a_broken_connection_is_counted_and_made_anew(ran: Ran, open_loop: bool):
    """As in a restart: the load goes on, and the errors say what was wrong."""

    def tenth_breaks(made: socket.socket) -> None:
        for number, _ in enumerate(heads(made)):
            if number == 10:
                return
            made.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    wanted = load.http_open(2, "/", "x", 500) if open_loop else load.http_closed(2, "/", "x")
    with answering(tenth_breaks) as port:
        found = ran(wanted, port)
    assert found.scheduled == found.answered + found.failed
    assert found.failed >= 5
    assert set(found.errors) <= {"the peer closed before it had answered", "receive: Connection reset by peer"}
    assert found.answered >= 8 * found.failed


def test_what_a_keep_alive_connection_announces_is_no_error(ran: Ran):
    def once(made: socket.socket) -> None:
        for _ in heads(made):
            made.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello")
            return

    with answering(once) as port:
        found = ran(load.http_open(2, "/", "x", 200), port)
    assert found.answered == found.scheduled
    assert found.broken == 0


def test_idle_connections_that_end_are_counted_apart(ran: Ran):
    def silent_end(made: socket.socket) -> None:
        for number, _ in enumerate(heads(made)):
            made.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
            if number == 3:
                return

    with answering(silent_end) as port:
        found = ran(load.http_open(2, "/", "x", 100), port)
    assert found.broken > 2
    assert found.scheduled == found.answered + found.failed


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", "an answer without Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nhello", "more bytes than the answer's Content-Length"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", "not an HTTP/1.1 answer"),
        (b"nonsense\r\n\r\n", "not an HTTP/1.1 answer"),
        (b"x" * 10_000, "an answer's head of 8 KB"),
    ],
)
def test_what_is_no_answer_is_an_error(ran: Ran, answer: bytes, reason: str):
    def after_the_first(made: socket.socket) -> None:
        for number, _ in enumerate(heads(made)):
            made.sendall(answer if number else b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with answering(after_the_first) as port:
        found = ran(load.http_open(1, "/", "x", 200), port)
    assert reason in found.errors
    assert found.scheduled == found.answered + found.failed


def test_silence_ends_the_run_with_a_reason_after_ten_seconds(ran: Ran):
    def first_only(made: socket.socket) -> None:
        made.sendall(made.recv(1))
        made.recv(64)
        time.sleep(30)

    began = time.monotonic()
    with answering(first_only) as port, pytest.raises(load.LoadError, match="no answer on any connection for 10 s"):
        ran(load.opened(2, 64, 100), port)
    assert time.monotonic() - began < 25


def test_one_connection_that_falls_silent_is_an_error_even_if_all_others_go_on(ran: Ran):
    """A lost wake-up of one connection must not hide behind the throughput of the rest."""
    served_one = threading.Event()

    def all_but_one(made: socket.socket) -> None:
        made.sendall(made.recv(1))
        if not served_one.is_set():
            served_one.set()
            made.recv(64)
            time.sleep(30)
        echo(made)

    with answering(all_but_one) as port:
        found = ran(load.closed(4, 64), port)
    assert found.failed == 1
    assert found.scheduled == found.answered + 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["closed", LOOPBACK, "80", "1"],
        ["closed", LOOPBACK, "80", "1", "--connections", "0", "--size", "1"],
        ["closed", LOOPBACK, "80", "1", "--connections", "1"],
        ["closed", "example.com", "80", "1", "--connections", "1", "--size", "1"],
        ["closed", LOOPBACK, "65536", "1", "--connections", "1", "--size", "1"],
        ["open", LOOPBACK, "80", "1", "--connections", "1", "--size", "1"],
        ["closed", LOOPBACK, "80", "nan", "--connections", "1", "--size", "1"],
        ["closed", LOOPBACK, "80", "1", "--connections", "1", "--size", "1", "--colour", "red"],
        ["dials", LOOPBACK, "80", "1", "--seed", "1"],
        ["nothing", LOOPBACK, "80", "1"],
    ],
)
def test_wrong_arguments_are_refused(program: Path, arguments: list[str]):
    with spawn([str(program), *arguments]) as process:
        out, err = process.communicate(timeout=10)
    assert process.returncode == 1
    assert not out
    assert err


@pytest.mark.parametrize("text", ["", "ready\n", "{}", '{"kind": "open"}', "[]"])
def test_what_is_no_report_is_refused(text: str):
    with pytest.raises(load.LoadError, match="no report"):
        load.parse(text)
