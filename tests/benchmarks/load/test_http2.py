"""HTTP/2 and gRPC of the load generator and its server, against what others have written: grpcio, h2load, and h2."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import pytest

from benchmarks import load
from benchmarks.load import Outcome, Protocol
from tests.benchmarks.load.conftest import LOOPBACK, Served, spawn
from tests.benchmarks.load.test_load import answering

SECONDS = 0.2
BODY = 1000

Answer = Callable[[h2.connection.H2Connection, int, bool], None]
"""Answers the request of a stream; whether well, which every other one is."""


@pytest.fixture
def ran(program: Path) -> Callable[[int, Protocol], Outcome]:
    def run(port: int, protocol: Protocol) -> Outcome:
        return load.run(spawn, program, load.http_closed(2, "/of/Echo", "x", protocol, BODY), LOOPBACK, port, SECONDS)

    return run


Ran = Callable[[int, Protocol], Outcome]


class _Echo(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        assert handler_call_details.method == "/of/Echo"
        return grpc.unary_unary_rpc_method_handler(lambda message, context: message)


def test_a_real_grpc_server_answers_the_generator(ran: Ran) -> None:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((_Echo(),))
        port = server.add_insecure_port(f"{LOOPBACK}:0")
        server.start()
        try:
            found = ran(port, "grpc")
        finally:
            server.stop(None).wait()
    assert found.scheduled == found.answered > 10


def test_a_real_grpc_client_is_answered_by_the_server(served: Served) -> None:
    with grpc.insecure_channel(f"{LOOPBACK}:{served() + load.HTTP}") as channel:
        echo = channel.unary_unary("/any/thing")
        for length in (0, 1, 1000, 5000):
            assert echo(bytes(length), timeout=5) == bytes(length)


def test_h2load_is_answered_by_the_server(served: Served, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(bytes(BODY))
    asked = ["h2load", "-n", "2000", "-c", "4", "-m", "8", "-d", str(body)]
    told = subprocess.run(
        [*asked, f"http://{LOOPBACK}:{served() + load.HTTP}/x"], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    assert "2000 succeeded, 0 failed" in told


@contextmanager
def _serving(answer: Answer, seen: list[list[tuple[bytes, bytes]]] | None = None) -> Iterator[int]:
    """A server of the library h2; its port. `seen`: gets the heads that come."""

    def serve(made: socket.socket) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        connection.initiate_connection()
        answered = 0
        made.sendall(connection.data_to_send())
        while data := made.recv(1 << 16):
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    assert event.flow_controlled_length is not None
                    connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.RequestReceived) and seen is not None:
                    seen.append([(bytes(name), bytes(value)) for name, value in event.headers])
                elif isinstance(event, h2.events.StreamEnded):
                    answer(connection, event.stream_id, answered % 2 == 0)
                    answered += 1
            made.sendall(connection.data_to_send())

    with answering(serve) as port:
        yield port


def _echo(connection: h2.connection.H2Connection, stream: int, length: int = BODY, status: str = "200") -> None:
    connection.send_headers(stream, [(":status", status), ("content-type", "text/plain")])
    connection.send_data(stream, bytes(length), end_stream=True)


def _another_status(connection: h2.connection.H2Connection, stream: int, well: bool) -> None:
    _echo(connection, stream, status="200" if well else "404")


def _a_status_without_an_index(connection: h2.connection.H2Connection, stream: int, well: bool) -> None:
    _echo(connection, stream, status="200" if well else "503")


def _too_short(connection: h2.connection.H2Connection, stream: int, well: bool) -> None:
    _echo(connection, stream, BODY if well else BODY - 1)


def _reset(connection: h2.connection.H2Connection, stream: int, well: bool) -> None:
    if well:
        _echo(connection, stream)
    else:
        connection.reset_stream(stream)


def _going_away(connection: h2.connection.H2Connection, stream: int, well: bool) -> None:
    _echo(connection, stream)
    connection.close_connection(last_stream_id=stream)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (_another_status, "status 404"),
        (_a_status_without_an_index, "an HTTP/2 status that has no index"),
        (_too_short, "an answer that is not as long as the question"),
        (_reset, "the HTTP/2 stream was reset"),
    ],
)
def test_what_is_no_answer_is_an_error(ran: Ran, answer: Answer, reason: str) -> None:
    with _serving(answer) as port:
        found = ran(port, "http2")
    assert set(found.errors) == {reason}
    assert found.scheduled == found.answered + found.failed


def test_a_connection_that_goes_away_is_made_anew(ran: Ran) -> None:
    with _serving(_going_away) as port:
        found = ran(port, "http2")
    assert found.scheduled == found.answered > 10
    assert not found.errors


@pytest.mark.parametrize(("status", "good"), [("0", True), ("7", False), (None, False)])
def test_a_grpc_call_has_to_end_with_the_status_0(ran: Ran, status: str | None, good: bool) -> None:
    def answer(connection: h2.connection.H2Connection, stream: int, well: bool) -> None:
        connection.send_headers(stream, [(":status", "200"), ("content-type", "application/grpc")])
        connection.send_data(stream, bytes(BODY + 5), end_stream=status is None and not well)
        if status is not None or well:
            connection.send_headers(stream, [("grpc-status", "0" if well or not status else status)], end_stream=True)

    with _serving(answer) as port:
        found = ran(port, "grpc")
    assert set(found.errors) == (set() if good else {"a gRPC call without the status 0"})


@pytest.mark.parametrize(
    ("protocol", "differing"), [("http2", {b":path", b"x-request-id"}), ("grpc", {b"x-request-id"})]
)
def test_each_request_has_an_id_of_its_own(ran: Ran, protocol: Protocol, differing: set[bytes]) -> None:
    def answer(connection: h2.connection.H2Connection, stream: int, well: bool) -> None:
        kind = "application/grpc" if protocol == "grpc" else "text/plain"
        connection.send_headers(stream, [(":status", "200"), ("content-type", kind)])
        if protocol == "grpc":
            connection.send_data(stream, bytes(BODY + 5))
            connection.send_headers(stream, [("grpc-status", "0")], end_stream=True)
        else:
            connection.send_data(stream, bytes(BODY), end_stream=True)

    seen: list[list[tuple[bytes, bytes]]] = []
    with _serving(answer, seen) as port:
        assert not ran(port, protocol).errors
    assert len(seen) > 10
    for name in dict(seen[0]):
        values = {dict(fields)[name] for fields in seen}
        assert len(values) == (len(seen) if name in differing else 1)


def test_a_window_that_is_never_opened_again_is_an_error(ran: Ran) -> None:
    def serve(made: socket.socket) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        connection.initiate_connection()
        made.sendall(connection.data_to_send())
        while data := made.recv(1 << 16):
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.StreamEnded):
                    _echo(connection, event.stream_id)
            made.sendall(connection.data_to_send())

    with answering(serve) as port:
        found = ran(port, "http2")
    assert set(found.errors) <= {"the HTTP/2 connection's window was not opened again"}
    assert found.failed
