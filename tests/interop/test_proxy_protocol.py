"""Real servers that take PROXY protocol headers, behind a uProxy: each learns who calls by the header alone."""

from __future__ import annotations

import http.client
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import pairs
from benchmarks.netns import Namespace, stop
from benchmarks.pairs import APP, APP_PORT, DB_ADDRESS, ENTRY, MESH, WEB_ADDRESS, Wire
from benchmarks.peers import envoy
from tests.support.envoy import PATIENCE_S, assert_no_bug_was_logged
from tests.support.inside import eventually
from uproxy.proxy_protocol import PRINCIPAL

pytestmark = pytest.mark.root

ASKING = MESH.replace(
    "metadata: {name: db, namespace: shop}\nspec:\n",
    "metadata: {name: db, namespace: shop, annotations: {mesh.uproxy.dev/proxy-protocol: tcp}}\nspec:\n",
)
V6 = ("fd77::1", "fd77::2")

_HAPROXY = """\
defaults
  mode http
  timeout client 20s
  timeout server 20s
  timeout connect 20s
frontend application
  bind {at} accept-proxy
  http-request return status 200 content-type text/plain lf-string "%[src] %[dst] %[dst_port]"
"""
_NGINX = """\
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/nginx.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    server {{
        listen {at} proxy_protocol;
        location / {{
            return 200 "$proxy_protocol_addr $proxy_protocol_server_addr $proxy_protocol_server_port";
        }}
    }}
}}
"""

Application = Callable[[Namespace, str, Path], "subprocess.Popen[bytes]"]


def haproxy(namespace: Namespace, at: str, directory: Path) -> subprocess.Popen[bytes]:
    (directory / "haproxy.cfg").write_text(_HAPROXY.format(at=at))
    return namespace.start(["haproxy", "-db", "-f", str(directory / "haproxy.cfg")])


def nginx(namespace: Namespace, at: str, directory: Path) -> subprocess.Popen[bytes]:
    config = directory / "nginx.conf"
    config.write_text(_NGINX.format(at=at, directory=directory))
    return namespace.start(["nginx", "-p", str(directory), "-e", str(directory / "nginx.log"), "-c", str(config)])


@contextmanager
def serving(wire: Wire, application: Application) -> Iterator[None]:
    at = f"[{wire.db_address}]:{APP_PORT}" if ":" in wire.db_address else f"{wire.db_address}:{APP_PORT}"
    process = application(wire.db, at, wire.directory)
    try:
        eventually(lambda: accepts(wire))
        yield
    finally:
        stop(process)


def accepts(wire: Wire) -> bool:
    try:
        wire.db.connect((wire.db_address, APP_PORT)).close()
    except ConnectionRefusedError:
        return False
    return True


def asked(wire: Wire) -> str:
    """What the application answers to web, through the mesh."""
    with wire.web.entered():
        client = http.client.HTTPConnection(*ENTRY, timeout=PATIENCE_S)
        client.connect()
    try:
        client.request("GET", "/")
        answer = client.getresponse()
        return answer.read().decode() if answer.status == 200 else f"status {answer.status}"
    except (ConnectionError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        client.close()


@pytest.mark.parametrize("addresses", [(WEB_ADDRESS, DB_ADDRESS), V6], ids=["v4", "v6"])
@pytest.mark.parametrize("application", [haproxy, nginx])
def test_a_server_that_asks_learns_the_callers_address(
    tmp_path: Path, application: Application, addresses: tuple[str, str]
) -> None:
    mesh = ASKING.replace(WEB_ADDRESS, f'"{addresses[0]}"').replace(DB_ADDRESS, f'"{addresses[1]}"')
    with (
        pairs.wire(tmp_path, addresses=addresses) as wire,
        pairs.uproxy_server(wire, mesh=mesh),
        pairs.uproxy_client(wire, mesh=mesh),
        serving(wire, application),
    ):
        assert asked(wire) == f"{addresses[0]} {addresses[1]} {APP_PORT}"
        # The same server without the annotation: it gets no header, and serves nobody without one.
        (wire.directory / "db" / "mesh.yaml").write_text(
            mesh.replace("proxy-protocol: tcp", "proxy-protocol: tcp-sink")
        )
        eventually(lambda: asked(wire) != f"{addresses[0]} {addresses[1]} {APP_PORT}")
        assert_no_bug_was_logged(wire)


def test_an_envoy_reads_who_calls_as_from_a_ztunnel(tmp_path: Path) -> None:
    log = tmp_path / "connections"
    with (
        pairs.wire(tmp_path) as wire,
        pairs.uproxy_server(wire, mesh=ASKING),
        pairs.uproxy_client(wire, mesh=ASKING),
        envoy.running(_envoy(log), wire.db, wire.directory / "envoy"),
    ):
        with wire.web.connect(ENTRY, PATIENCE_S) as end:
            assert end.recv(10) == b"hello"
        caller = f"spiffe://cluster.local/ns/shop/sa/web {WEB_ADDRESS} {DB_ADDRESS}:{APP_PORT}"
        eventually(lambda: log.exists() and caller in log.read_text())
        assert_no_bug_was_logged(wire)


def _envoy(log: Path) -> dict[str, object]:
    """Reads the header as Istio has its waypoints read it, and greets."""
    types = "type.googleapis.com/envoy.extensions"
    rule = {"tlv_type": PRINCIPAL, "on_tlv_present": {"key": "peer_principal"}}
    line = (
        "%DYNAMIC_METADATA(envoy.filters.listener.proxy_protocol:peer_principal)% "
        "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_LOCAL_ADDRESS%\n"
    )
    listener = {
        "address": {"socket_address": {"address": APP[0], "port_value": APP[1]}},
        "listener_filters": [
            {
                "name": "envoy.filters.listener.proxy_protocol",
                "typed_config": {
                    "@type": f"{types}.filters.listener.proxy_protocol.v3.ProxyProtocol",
                    "rules": [rule],
                },
            }
        ],
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "greeting",
                        "typed_config": {
                            "@type": f"{types}.filters.network.direct_response.v3.Config",
                            "response": {"inline_string": "hello"},
                        },
                    }
                ]
            }
        ],
        "access_log": [
            {
                "name": "file",
                "typed_config": {
                    "@type": f"{types}.access_loggers.file.v3.FileAccessLog",
                    "path": str(log),
                    "log_format": {"text_format_source": {"inline_string": line}},
                },
            }
        ],
    }
    return {
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 19901}}},
        "static_resources": {"listeners": [listener]},
    }
