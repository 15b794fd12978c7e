"""The demo's traffic: it goes on by itself, and a request that fails cannot be overlooked."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lab.apps import client as client_module
from tests.support.inside import eventually


@contextmanager
def _serving(answer: Callable[[socket.socket], None]) -> Iterator[list[Any]]:
    """A server on loopback: each connection in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

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
        yield list(listener.getsockname())
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def _pong(made: socket.socket) -> None:
    while made.recv(64):
        made.sendall(b"+PONG\r\n")


def _http(version: str) -> Callable[[socket.socket], None]:
    def answer(made: socket.socket) -> None:
        made.recv(4096)
        body = json.dumps({"version": version}).encode()
        made.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body)

    return answer


class Client:
    def __init__(self) -> None:
        argv = [sys.executable, "-I", str(Path(client_module.__file__))]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def job(self, **job: object) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client()
    with made.process:
        yield made
        assert made.process.stdin is not None
        made.process.stdin.close()
        assert made.process.wait(5) == 0


def test_traffic_goes_on_beside_jobs_and_is_counted(client: Client) -> None:
    with _serving(_http("v7")) as http, _serving(_pong) as redis:
        assert client.job(job="traffic", http=http, redis=redis) == {"began": True}
        assert client.job(job="http", host=http[0], port=http[1])["status"] == 200
        eventually(lambda: min(client.job(job="traffic-told")["requests"].values()) >= 5)
        told = client.job(job="traffic-told", end=True)
    assert told["failed"] == 0
    assert told["answers"] == {"v7": told["requests"]["new connections"]}
    assert told["longest_ms"] > 0


def test_failed_requests_are_counted_and_told(client: Client) -> None:
    def refuse(made: socket.socket) -> None:
        made.recv(4096)
        made.sendall(b"HTTP/1.1 503 Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    def cut(made: socket.socket) -> None:
        made.recv(64)

    with _serving(refuse) as http, _serving(cut) as redis:
        client.job(job="traffic", http=http, redis=redis)
        eventually(lambda: client.job(job="traffic-told")["failed"] >= 10)
        told = client.job(job="traffic-told", end=True)
    assert told["requests"] == {"new connections": 0, "one connection": 0}
    text = " ".join(told["failures"])
    assert "http: ConnectionError: status 503" in text
    assert "redis: ConnectionError: no PONG" in text


def test_traffic_is_one_at_a_time_and_wrong_order_is_an_error(client: Client) -> None:
    with _serving(_http("v1")) as http, _serving(_pong) as redis:
        assert client.job(job="traffic-told")["error"] == "OSError"
        client.job(job="traffic", http=http, redis=redis)
        assert client.job(job="traffic", http=http, redis=redis)["error"] == "OSError"
        client.job(job="traffic-told", end=True)
        assert client.job(job="traffic", http=http, redis=redis) == {"began": True}
        client.job(job="traffic-told", end=True)
