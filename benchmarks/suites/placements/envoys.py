"""Envoy's configurations: one kind for every placement on the callers' and callees' machines, one for the waypoint.

All have the same route table, the same two RBAC filters and the same TLS; Envoy's counters are on, and so are
access logs, a line for each connection. Each knows only what its own workloads need, as with Istio's Sidecar resource.
What needs no L7 is a TCP connection in mTLS, whose caller the callee's proxy judges, as Istio's sidecars do with ports
that are not declared as HTTP.

A proxy beside workloads reads requests on the way out (routes) and on the way in (policy, and who calls, for the
application). Between proxies it is HTTP/1.1 in mTLS, as between Istio's sidecars. The waypoint ends HBONE, does all
of that in one pass, and speaks HBONE to the destination, as Istio's does; its listeners inside are chosen by authority
and endpoint instead of by metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.lab.sources import TRUST_DOMAIN
from benchmarks.peers.envoy import access_log, tls_context
from benchmarks.suites.placements.application import (
    BUSY,
    BUSY_MS,
    DENIED,
    HTTP_PORT,
    INSTANCES,
    L4_PORT,
    LIMIT_PER_S,
    LIMITED,
    SERVICE_PORT,
    SERVICES,
    Member,
    Service,
    identity,
    version,
)
from control.api.address import HBONE_PORT

Json = dict[str, Any]
Address = tuple[str, int]

LOOPBACK = "127.0.0.1"
OUTBOUND_PORT = 15001
INBOUND_PORT = 15006
"""Of a proxy's first workload; the next ones follow. Capture would keep the address that was dialled instead."""
L4_OUTBOUND_PORT = 15101
"""Of the first service; the next ones follow."""
THROUGH_PORT = 15201
"""Likewise, at a sidecar: what the callee's proxy reads as HTTP, and this one does not."""
L4_INBOUND_OFFSET = 100
"""From a workload's INBOUND_PORT to the one for connections that are not read as HTTP."""

_TYPE = "type.googleapis.com/envoy.extensions"
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_CALLER = "io.istio.peer_principal"
"""The filter state in which Istio's waypoint, too, keeps who calls."""
_WAYPOINT = "waypoint"
_LIMIT = f"{_TYPE}.filters.http.local_ratelimit.v3.LocalRateLimit"
_LUA = f"""\
function envoy_on_request(handle)
  local enough = os.clock() + {BUSY_MS / 1000}
  while os.clock() < enough do end
end
"""
_VERSIONS = (*(version(number + 1) for number in range(INSTANCES)), "")
"""Of a service, in the order of their routes; the last is any."""
_ANY = ("",)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a service's instance is reached, over TLS."""

    member: Member
    address: str
    port: int


Endpoints = Mapping[str, Sequence[Endpoint]]
"""Of each service by its name."""
Keys = Mapping[str, Path]
"""The directory of each service account's key and certificate."""


def beside(entry: str, address: str, members: Iterable[Member], endpoints: Endpoints, keys: Keys, admin: Path) -> Json:
    """An Envoy for some workloads: callers reach it at `entry`, other proxies at `address`.

    A caller is known by the address that it comes from; on loopback there is just one. `admin` becomes a socket,
    and the access log lies beside it.
    """
    callers = [member for member in members if member.calls]
    callees = [member for member in members if not member.calls]
    accounts = sorted({member.account for member in callers})
    addresses = {} if entry == LOOPBACK else _addresses(callers)
    listeners = _outbound(entry, accounts, addresses, admin) if accounts else []
    clusters = [
        _tls_cluster(_l4_name(account, service), _for_l4(endpoints[service.name]), keys[account])
        for account in accounts
        for service in SERVICES
    ]
    if entry == LOOPBACK:
        clusters += [
            _tls_cluster(_through_name(account, service), endpoints[service.name], keys[account], "http/1.1")
            for account in accounts
            for service in SERVICES
        ]
    clusters += [
        _tls_cluster(
            _cluster_name(account, service, chosen),
            _chosen(endpoints[service.name], chosen),
            keys[account],
            "http/1.1",
        )
        for account in accounts
        for service in SERVICES
        for chosen in _VERSIONS
    ]
    for number, member in enumerate(callees):
        listeners.append(_inbound(member, (address, INBOUND_PORT + number), keys, admin))
        clusters.append(_cluster(member.name, [_socket_address((member.address, HTTP_PORT))]))
        listeners.append(_l4_inbound(member, (address, INBOUND_PORT + L4_INBOUND_OFFSET + number), keys, admin))
        clusters.append(_cluster(f"{member.name}-l4", [_socket_address((member.address, L4_PORT))]))
    return _bootstrap(listeners, clusters, admin)


def _addresses(callers: Iterable[Member]) -> dict[str, list[str]]:
    """Of each service account's callers."""
    found: dict[str, list[str]] = {}
    for one in callers:
        found.setdefault(one.account, []).append(one.address)
    return found


def _outbound(entry: str, accounts: Sequence[str], addresses: Mapping[str, list[str]], admin: Path) -> list[Json]:
    """On the way out: a listener for what is read as HTTP, and one for each service that is not; of a sidecar, another
    one for each that is read by the callee's proxy only.
    """
    http = {
        account: _manager("outbound", [_host(account, service, [service.name]) for service in SERVICES])
        for account in accounts
    }
    made = [_logged("outbound", (entry, OUTBOUND_PORT), _chains(http, addresses), admin)]
    for number, service in enumerate(SERVICES):
        tcp = {account: _tcp_proxy("outbound", _l4_name(account, service)) for account in accounts}
        listen = entry, L4_OUTBOUND_PORT + number
        made.append(_logged(f"outbound-{service.name}-l4", listen, _chains(tcp, addresses), admin))
        if entry == LOOPBACK:
            through = {account: _tcp_proxy("outbound", _through_name(account, service)) for account in accounts}
            listen = entry, THROUGH_PORT + number
            made.append(_logged(f"outbound-{service.name}-through", listen, _chains(through, addresses), admin))
    return made


def _chains(filters: Mapping[str, Json], addresses: Mapping[str, list[str]]) -> list[Json]:
    """A filter chain for each service account; `addresses`: of its callers, where there is more than one account."""
    chains = []
    for account, one in filters.items():
        chain: Json = {"filters": [one]}
        if addresses:
            ranges = [{"address_prefix": address, "prefix_len": 32} for address in addresses[account]]
            chain["filter_chain_match"] = {"source_prefix_ranges": ranges}
        chains.append(chain)
    return chains


def _l4_inbound(member: Member, listen: Address, keys: Keys, admin: Path) -> Json:
    """On the way in to one workload, without a look at what is said: mTLS with its key, and who calls."""
    service = next(one for one in SERVICES if one.name == member.account)
    caller = {"authenticated": {"principal_name": {"exact": str(identity(service.caller))}}}
    allow = {"caller": {"permissions": [{"any": True}], "principals": [caller]}}
    policy = {
        "name": "rbac",
        "typed_config": {
            "@type": f"{_TYPE}.filters.network.rbac.v3.RBAC",
            "stat_prefix": "inbound",
            "rules": {"action": "ALLOW", "policies": allow},
        },
    }
    chain = {
        "filters": [policy, _tcp_proxy("inbound", f"{member.name}-l4")],
        "transport_socket": _server_tls(keys[member.account]),
    }
    return _logged(f"inbound-{member.name}-l4", listen, [chain], admin)


def _tcp_proxy(name: str, cluster: str) -> Json:
    typed = {"@type": f"{_TYPE}.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": name, "cluster": cluster}
    return {"name": "tcp", "typed_config": typed}


def _l4_name(account: str, service: Service) -> str:
    return f"{account}|{service.name}|l4"


def _through_name(account: str, service: Service) -> str:
    return f"{account}|{service.name}|through"


def _for_l4(endpoints: Iterable[Endpoint]) -> list[Endpoint]:
    return [replace(one, port=one.port + L4_INBOUND_OFFSET) for one in endpoints]


def waypoint(address: str, endpoints: Endpoints, key: Path, admin: Path) -> Json:
    """The waypoint of all services; `key` is the directory of its own identity."""
    remember = {
        "name": "caller",
        "typed_config": {
            "@type": f"{_TYPE}.filters.http.set_filter_state.v3.Config",
            "on_request_headers": [
                {
                    "object_key": _CALLER,
                    "factory_key": "envoy.string",
                    "format_string": {"text_format_source": {"inline_string": "%DOWNSTREAM_PEER_URI_SAN%"}},
                    "shared_with_upstream": "ONCE",
                }
            ],
        },
    }
    hosts = [
        {
            "name": service.name,
            "domains": [f"{service.address}:{SERVICE_PORT}"],
            "routes": [
                {
                    "match": {"connect_matcher": {}},
                    "route": {
                        "cluster": f"main-{service.name}",
                        "timeout": "0s",
                        "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
                    },
                }
            ],
        }
        for service in SERVICES
    ]
    terminate = _manager(
        "hbone",
        hosts,
        [remember],
        # A line for each CONNECT, which is a connection of a caller.
        access_log=access_log(_access_log(admin)),
        stream_idle_timeout="0s",
        upgrade_configs=[{"upgrade_type": "CONNECT"}],
        http2_protocol_options={
            "allow_connect": True,
            "max_concurrent_streams": 100,
            "connection_keepalive": {"interval": "10s", "timeout": "20s"},
        },
    )
    chain = {"filters": [terminate], "transport_socket": _server_tls(key, "h2")}
    listeners = [_listener("hbone", (address, HBONE_PORT), [chain])]
    clusters = []
    for service in SERVICES:
        listeners.append(_main(service))
        clusters.append(_inside_cluster(f"main-{service.name}", [f"main-{service.name}"]))
        for chosen in _VERSIONS:
            encaps = [f"encap-{one.member.name}" for one in _chosen(endpoints[service.name], chosen)]
            clusters.append(_inside_cluster(_cluster_name(_WAYPOINT, service, chosen), encaps))
        for one in endpoints[service.name]:
            listeners.append(_encap(one))
            clusters.append(_tunnel(one, key))
    extension = {"@type": f"{_TYPE}.bootstrap.internal_listener.v3.InternalListener"}
    return _bootstrap(listeners, clusters, admin) | {
        "bootstrap_extensions": [{"name": "envoy.bootstrap.internal_listener", "typed_config": extension}]
    }


def calling(services: Sequence[Service], endpoints: Endpoints, key: Path, admin: Path) -> Json:
    """An Envoy beside callers of services that have no routes: what it holds of so many."""
    account = services[0].caller if services else _WAYPOINT
    hosts = [_host(account, one, [one.name], _ANY) for one in services]
    chain = {"filters": [_manager("outbound", hosts)]}
    clusters = [_tls_cluster(_cluster_name(account, one, ""), endpoints[one.name], key, "http/1.1") for one in services]
    return _bootstrap([_logged("outbound", (LOOPBACK, OUTBOUND_PORT), [chain], admin)], clusters, admin)


def gateway(services: Sequence[Service], endpoints: Endpoints, admin: Path) -> Json:
    """A waypoint of services that have no routes, as Istio's holds so many: for each a filter chain and a cluster, to
    whose endpoints one listener makes tunnels.
    """
    chains, clusters = [], []
    for one in services:
        caller = {"filter_state": {"key": _CALLER, "string_match": {"exact": str(identity(one.caller))}}}
        match = {"prefix_ranges": [{"address_prefix": one.address, "prefix_len": 32}], "destination_port": SERVICE_PORT}
        manager = _manager("main", [_host(_WAYPOINT, one, ["*"], _ANY)], _policy(caller))
        chains.append({"filters": [manager], "filter_chain_match": match})
        name = _cluster_name(_WAYPOINT, one, "")
        addresses = [
            {"envoy_internal_address": {"server_listener_name": "encap", "endpoint_id": f"{each.address}:{each.port}"}}
            for each in endpoints[one.name]
        ]
        clusters.append(_cluster(name, addresses) | {"transport_socket": _internal_upstream()})
    encap = {
        "name": "encap",
        "internal_listener": {},
        "filter_chains": [{"filters": [_tcp_proxy("encap", "tunnel")]}],
    }
    clusters.append(_cluster("tunnel", [_socket_address((LOOPBACK, HBONE_PORT))]))
    main = _listener("main", (LOOPBACK, OUTBOUND_PORT), chains or [{"filters": [_tcp_proxy("none", "tunnel")]}])
    extension = {"@type": f"{_TYPE}.bootstrap.internal_listener.v3.InternalListener"}
    return _bootstrap([main, encap], clusters, admin) | {
        "bootstrap_extensions": [{"name": "envoy.bootstrap.internal_listener", "typed_config": extension}]
    }


def _main(service: Service) -> Json:
    """Inside the waypoint: one service's requests, read, judged and routed."""
    caller = {"filter_state": {"key": _CALLER, "string_match": {"exact": str(identity(service.caller))}}}
    host = _host(_WAYPOINT, service, ["*"])
    host["routes"] = _owners_routes(_cluster_name(_WAYPOINT, service, "")) + host["routes"]
    manager = _manager("main", [host], _policy(caller) + _owners_filters())
    # The tunnel's certificate is not this connection's: tell the application from the state what others tell it.
    manager["typed_config"]["route_config"]["request_headers_to_add"] = [
        {
            "header": {"key": "x-forwarded-client-cert", "value": f"URI=%FILTER_STATE({_CALLER}:PLAIN)%"},
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        }
    ]
    return {"name": f"main-{service.name}", "internal_listener": {}, "filter_chains": [{"filters": [manager]}]}


def _encap(endpoint: Endpoint) -> Json:
    """Inside the waypoint: a connection becomes a CONNECT for one instance."""
    proxy = {
        "@type": f"{_TYPE}.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "encap",
        "cluster": f"tunnel-{endpoint.member.name}",
        "tunneling_config": {"hostname": f"{endpoint.member.address}:{HTTP_PORT}"},
    }
    chain = {"filters": [{"name": "tcp", "typed_config": proxy}]}
    return {"name": f"encap-{endpoint.member.name}", "internal_listener": {}, "filter_chains": [chain]}


def _tunnel(endpoint: Endpoint, key: Path) -> Json:
    options = {
        "@type": f"type.googleapis.com/{_HTTP_OPTIONS}",
        "common_http_protocol_options": {"idle_timeout": "3600s"},
        "explicit_http_config": {"http2_protocol_options": {"allow_connect": True}},
    }
    made = _tls_cluster(f"tunnel-{endpoint.member.name}", [endpoint], key, "h2")
    return made | {"typed_extension_protocol_options": {_HTTP_OPTIONS: options}}


def _inbound(member: Member, listen: Address, keys: Keys, admin: Path) -> Json:
    """On the way in to one workload: mTLS with its key, policy, and the caller's name for the application."""
    service = next(one for one in SERVICES if one.name == member.account)
    everything = {"match": {"prefix": "/"}, "route": {"cluster": member.name, "timeout": "0s"}}
    hosts = [{"name": member.name, "domains": ["*"], "routes": [*_owners_routes(member.name), everything]}]
    caller = {"authenticated": {"principal_name": {"exact": str(identity(service.caller))}}}
    told: Json = {"forward_client_cert_details": "SANITIZE_SET", "set_current_client_cert_details": {"uri": True}}
    manager = _manager("inbound", hosts, _policy(caller) + _owners_filters(), **told)
    chain = {"filters": [manager], "transport_socket": _server_tls(keys[member.account], "http/1.1")}
    return _logged(f"inbound-{member.name}", listen, [chain], admin)


def _host(account: str, service: Service, domains: list[str], versions: Sequence[str] = _VERSIONS) -> Json:
    """The routes to a service: the path of a version goes to its instance, every other to any."""
    routes = [
        {
            "match": {"path_separated_prefix": f"/{chosen}"} if chosen else {"prefix": "/"},
            "route": {"cluster": _cluster_name(account, service, chosen), "timeout": "0s"},
        }
        for chosen in versions
    ]
    return {"name": service.name, "domains": domains, "routes": routes}


def _chosen(endpoints: Sequence[Endpoint], chosen: str) -> list[Endpoint]:
    return [one for one in endpoints if chosen in ("", one.member.version)]


def _cluster_name(account: str, service: Service, chosen: str) -> str:
    return f"{account}|{service.name}|{chosen}"


def _policy(principal: Json) -> list[Json]:
    """A DENY of a path and an ALLOW of a caller, as Istio makes a filter of each action."""
    path = {"url_path": {"path": {"prefix": DENIED}}}
    deny = {"denied-path": {"permissions": [path], "principals": [{"any": True}]}}
    allow = {"caller": {"permissions": [{"any": True}], "principals": [principal]}}
    return [
        {
            "name": f"rbac-{action.lower()}",
            "typed_config": {
                "@type": f"{_TYPE}.filters.http.rbac.v3.RBAC",
                "rules": {"action": action, "policies": policies},
            },
        }
        for action, policies in (("DENY", deny), ("ALLOW", allow))
    ]


def _owners_filters() -> list[Json]:
    """What a service's owner may have: a limit and a filter, which only the routes for them turn on."""
    limit = {"@type": _LIMIT, "stat_prefix": "limited"}
    lua = {"@type": f"{_TYPE}.filters.http.lua.v3.Lua"}
    return [
        {"name": "limit", "disabled": True, "typed_config": limit},
        {"name": "lua", "disabled": True, "typed_config": lua},
    ]


def _owners_routes(cluster: str) -> list[Json]:
    always = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    limit = {
        "@type": _LIMIT,
        "stat_prefix": "limited",
        "token_bucket": {"max_tokens": LIMIT_PER_S, "tokens_per_fill": LIMIT_PER_S, "fill_interval": "1s"},
        "filter_enabled": always,
        "filter_enforced": always,
    }
    lua = {"@type": f"{_TYPE}.filters.http.lua.v3.LuaPerRoute", "source_code": {"inline_string": _LUA}}
    return [
        {
            "match": {"prefix": prefix},
            "route": {"cluster": cluster, "timeout": "0s"},
            "typed_per_filter_config": {name: config},
        }
        for prefix, name, config in ((LIMITED, "limit", limit), (BUSY, "lua", lua))
    ]


def _manager(name: str, hosts: list[Json], filters: Sequence[Json] = (), **options: Any) -> Json:
    router = {"name": "router", "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"}}
    return {
        "name": "hcm",
        "typed_config": {
            "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": name,
            "route_config": {"virtual_hosts": hosts},
            "http_filters": [*filters, router],
            "normalize_path": True,
            **options,
        },
    }


def _listener(name: str, listen: Address, chains: list[Json]) -> Json:
    return {"name": name, "address": _socket_address(listen), "filter_chains": chains}


def _logged(name: str, listen: Address, chains: list[Json], admin: Path) -> Json:
    """A listener that writes a line for each connection that ends, as a uProxy does."""
    return _listener(name, listen, chains) | {"access_log": access_log(_access_log(admin))}


def _access_log(admin: Path) -> Path:
    return admin.with_suffix(".access.log")


def _bootstrap(listeners: list[Json], clusters: list[Json], admin: Path) -> Json:
    return {
        "admin": {"address": {"pipe": {"path": str(admin)}}},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }


def _socket_address(address: Address) -> Json:
    return {"socket_address": {"address": address[0], "port_value": address[1]}}


def _inside(listener: str) -> Json:
    """An address that is another listener of the same Envoy."""
    return {"envoy_internal_address": {"server_listener_name": listener}}


def _cluster(name: str, addresses: Iterable[Json]) -> Json:
    endpoints = [{"endpoint": {"address": address}} for address in addresses]
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    }


def _inside_cluster(name: str, listeners: Iterable[str]) -> Json:
    return _cluster(name, map(_inside, listeners)) | {"transport_socket": _internal_upstream()}


def _internal_upstream() -> Json:
    raw = {"name": "raw", "typed_config": {"@type": f"{_TYPE}.transport_sockets.raw_buffer.v3.RawBuffer"}}
    internal = {
        "@type": f"{_TYPE}.transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
        "transport_socket": raw,
    }
    return {"name": "internal_upstream", "typed_config": internal}


def _tls_cluster(name: str, endpoints: Sequence[Endpoint], key: Path, *protocols: str) -> Json:
    """Instances of one service, of which each must prove to be its service account's."""
    expected = {"exact": str(identity(endpoints[0].member.account))}
    tls = {
        "@type": f"{_TYPE}.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": tls_context(key, expected, *protocols),
    }
    addresses = [_socket_address((one.address, one.port)) for one in endpoints]
    return _cluster(name, addresses) | {"transport_socket": {"name": "tls", "typed_config": tls}}


def _server_tls(key: Path, *protocols: str) -> Json:
    tls = {
        "@type": f"{_TYPE}.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": tls_context(key, {"prefix": f"spiffe://{TRUST_DOMAIN}/"}, *protocols),
    }
    return {"name": "tls", "typed_config": tls}
