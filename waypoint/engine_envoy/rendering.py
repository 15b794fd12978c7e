"""What a state says, as Envoy's resources. No I/O.

A place is an internal listener with the HTTP filters of `_filters`; what they do there stands in the RouteConfiguration
of the place, which changes without the listener. Its clusters lead to exits, one for each identity that backends have:
an exit makes a CONNECT of a connection, names the caller in it, and takes nobody else's certificate at its other end.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from control.api.address import HBONE_PORT, IpAddress
from control.api.balancing import LoadBalancing, OutlierDetection
from control.api.identity import SpiffeId, TrustDomain
from control.api.locality import zone_distance
from control.api.metadata import TRUSTED_PROXIES
from control.api.workload import Endpoint
from control.client.state import State
from uproxy.config import Who
from uproxy.listener import MAX_TUNNELS
from uproxy.resolve import host_port
from uproxy.tunnel import HANDSHAKE_TIMEOUT_S
from waypoint.balancers import said_of
from waypoint.balancing import AT_RANDOM, rank_of
from waypoint.connection_limits import limits_of
from waypoint.destination import Destination, Destinations
from waypoint.detection import TIMEOUT_S as DETECTION_S
from waypoint.engine_envoy import balancing, checks, extensions, routes, tokens, traffic
from waypoint.engine_envoy.parts import (
    CALLER,
    ORIGINAL_DST,
    PRINCIPAL,
    RBAC,
    RBAC_ALLOW,
    RBAC_DENY,
    REVOKED,
    SERIAL,
    TOKENS,
    WOULD_ALLOW,
    WOULD_DENY,
    Json,
    digest,
    extension,
    header,
    message,
    source,
)
from waypoint.engine_envoy.rules import NotExpressibleError, NotThereError, check_known, http_rules, tcp_rules
from waypoint.engine_envoy.tokens import TokenBook
from waypoint.mirror import TIMEOUT_S as MIRROR_TIMEOUT_S
from waypoint.routing import compile_routes
from waypoint.rules import Held, held_at
from waypoint.sides import STALL_TIMEOUT_S
from waypoint.upstream import IDLE_TIMEOUT_S

HBONE: Final = "hbone"
"""The RouteConfiguration of what callers may ask for."""
PROBE: Final = "probe"
"""That of the version that requests are served by."""
STUCK_S: Final = 15.0
"""A thread of Envoy's that does nothing else for so long is at fault."""
_MANAGER: Final = "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_HTTP_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_STATE: Final = "extensions.filters.http.set_filter_state.v3.Config"
_SHADOWS: Final = "envoy.filters.http.rbac"
_REHEARSED: Final = (WOULD_DENY, WOULD_ALLOW)
_PEER: Final = "%FILTER_STATE(" + PRINCIPAL + ":PLAIN)%"
_OURS: Final = {"remove_on_match": {"key_matcher": {"prefix": "x-uproxy-"}}}
_NOBODY: Final = {"action": "ALLOW", "policies": {}}
_MAX_STREAMS: Final = 1024  # as a uProxy lets a peer open in one tunnel (`hbone.MAX_CONCURRENT_STREAMS`)
_WINDOW: Final = 256 << 10  # bytes, as a uProxy gives a stream at first. Envoy holds as much of each that nobody reads
_CONNECT_TIMEOUT: Final = "10s"  # `tunnel.CONNECT_TIMEOUT_S`
_MANY: Final = 1_000_000  # Envoy's own limits would refuse what nobody has limited

log = logging.getLogger("waypoint")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where Envoy finds what changes, and what does not: settings of one process."""

    directory: Path
    who: Who
    trust_domain: TrustDomain

    def file(self, kind: str, name: str = "") -> str:
        return str(self.directory / (f"{kind}-{digest(name)}.json" if name else f"{kind}.json"))


@dataclass(frozen=True, slots=True)
class Rendering:
    """One configuration. Resources by their names."""

    listeners: Mapping[str, Json]
    clusters: Mapping[str, Json]
    endpoints: Mapping[str, Json]
    """Of clusters that have some of their own."""
    routes: Mapping[str, Json]
    tokens: Json
    modules: Mapping[str, extensions.Module] = field(default_factory=dict)
    """Of WebAssembly, by their names."""
    incomplete: bool = False
    """Whether another one, later, may serve more of the same."""
    revocation: int = 0
    """Of whom is believed."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """What is served nothing but refusals, and why."""
    awaited: frozenset[str] = frozenset()
    """Keys of services that routes lead to, and that are not known yet."""

    @property
    def needs(self) -> tuple[object, ...]:
        """All but what holds at places."""
        return self.listeners, self.clusters, self.endpoints, self.tokens

    def beside(self, other: Rendering) -> Rendering:
        """With all that requests of another one still need."""
        return replace(
            self,
            listeners={**other.listeners, **self.listeners},
            clusters={**other.clusters, **self.clusters},
            endpoints={**other.endpoints, **self.endpoints},
            tokens=tokens.both(other.tokens, self.tokens),
            modules={**other.modules, **self.modules},
        )


class Renderer:
    """Renders the states of one waypoint."""

    def __init__(self, state: State, gateway: str, layout: Layout) -> None:
        """`gateway`: key of the Gateway."""
        self._state = state
        self._gateway = gateway
        self._layout = layout
        self._destinations = Destinations(state, gateway, own=layout.who.key)

    def render(self, revocation: int = 0) -> Rendering:
        """`revocation`: the number of times that certificates were revoked."""
        return _Rendering(self._state, self._gateway, self._layout, self._destinations, revocation).all()


class _Rendering:
    """One that is being made."""

    def __init__(self, state: State, gateway: str, layout: Layout, destinations: Destinations, revocation: int) -> None:
        self._state = state
        self._gateway = gateway
        self._layout = layout
        self._destinations = destinations
        self._revocation = revocation
        self._tokens = TokenBook()
        self._listeners: dict[str, Json] = {}
        self._clusters: dict[str, Json] = {}
        self._endpoints: dict[str, Json] = {}
        self._routes: dict[str, Json] = {}
        self._modules: dict[str, extensions.Module] = {}
        self._incomplete = False
        self._refused: dict[str, str] = {}
        self._awaited: set[str] = set()

    def all(self) -> Rendering:
        entrances = []
        for destination in self._destinations.all():
            name = host_port(destination.address, destination.dialled_port)
            if name in self._listeners:
                continue
            held = held_at(self._state, self._gateway, destination)
            http = [self._manager(name, destination.service_key)] if destination.http or destination.undeclared else []
            tcp = [] if destination.http else self._connections(name, destination, held)
            if http:
                self._routes[name] = self._requests(name, destination, held)
            self._listeners[name] = _listener(name, http, tcp)
            self._clusters[name] = _internal(name, "STATIC", [_endpoint(name)])
            entrances.append(name)
        self._routes[HBONE] = _entrance(entrances)
        self._listeners.update(_hbone_listeners(self._layout, self._revocation))
        return Rendering(
            listeners=self._listeners,
            clusters=self._clusters,
            endpoints=self._endpoints,
            routes=self._routes,
            tokens=self._tokens.resource(),
            modules=self._modules,
            incomplete=self._incomplete,
            revocation=self._revocation,
            refused=self._refused,
            awaited=frozenset(self._awaited),
        )

    # -- places

    def _requests(self, name: str, destination: Destination, held: Held) -> Json:
        """What holds for the requests of a place."""
        try:
            if held.trusted_proxies:
                named = f"Gateway {self._gateway}: {TRUSTED_PROXIES}"
                raise NotExpressibleError(f"{named} is not known to the engine envoy; remove the annotation")
            limits = traffic.limits_of(held.traffic)
            filters = {
                **http_rules(held.policies),
                **checks.checks(held.policies, self._asker),
                **self._extended(held),
                **limits.filters,
            }
            return self._routed(name, destination, held, limits, filters)
        except NotExpressibleError as error:
            self._incomplete |= isinstance(error, NotThereError)
            self._refused[name] = str(error)
            return routes.refusing(name, 503, "not-expressible", f"the engine envoy cannot serve this: {error}")

    def _extended(self, held: Held) -> Json:
        """What Extensions do with requests. Raises NotExpressibleError."""
        filters = extensions.wanted(held.traffic)
        self._modules.update((module.name, module) for module in extensions.modules(filters))
        return extensions.held(filters, self._layout.directory)

    def _routed(self, name: str, destination: Destination, held: Held, limits: traffic.Limits, filters: Json) -> Json:
        """Raises NotExpressibleError."""
        if requirement := self._tokens.name(held.authentications):
            kind = "extensions.filters.http.jwt_authn.v3.PerRouteConfig"
            filters[TOKENS] = message(kind, requirement_name=requirement)
        if destination.backend is not None:
            cluster = self._straight(name, destination, limits.max_requests)
            return routes.straight(name, cluster, filters)
        router = compile_routes(held.routes, destination.service_key, destination.port)
        clusters = routes.Clusters(
            lambda service, port: self._cluster(self._checked(service), port, limits.max_requests),
            lambda service, port: self._mirror(self._checked(service), port),
            lambda service: balancing.hashed(self._balancing(service)[0]),
        )
        return routes.routed(name, router, destination.dialled_port, clusters, limits, filters)

    def _checked(self, service: str) -> str:
        """A service that requests are sent to, if nothing asks more of that than Envoy does. Raises
        NotExpressibleError.
        """
        for policy in self._state.traffic_targeting("Service", service):
            check_known(policy, backend=True)
        return service

    def _balancing(self, service_key: str) -> tuple[LoadBalancing | None, OutlierDetection | None]:
        """As TrafficPolicies say it, and not `trafficDistribution`."""
        service = self._state.service(service_key)
        if service is None:
            return None, None
        return said_of(self._state, self._gateway, replace(service, prefers_zone=False))

    def _requests_each(self, service_key: str) -> int:
        """That a connection to a service carries; 0: any number."""
        limits = limits_of(self._state, self._gateway, service_key)
        return limits.requests_each if limits is not None else 0

    def _connections(self, name: str, destination: Destination, held: Held) -> list[Json]:
        """What holds for connections of opaque TCP: filters."""
        try:
            traffic.limits_of(held.traffic)
            rules = tcp_rules(held.policies)
            if destination.undeclared and held.asks_http:
                rules = [_NOBODY]
            if destination.backend is None:
                self._checked(destination.service_key)
        except NotExpressibleError as error:
            self._refused[name] = str(error)
            rules = [_NOBODY]
        filters = [
            extension(f"rbac-{index}", "extensions.filters.network.rbac.v3.RBAC", rules=one, stat_prefix="tcp")
            for index, one in enumerate(rules)
        ]
        if destination.backend is not None:
            cluster = self._straight(name, destination, 0)
        else:
            cluster = self._cluster(destination.service_key, destination.port, 0)
        proxy = "extensions.filters.network.tcp_proxy.v3.TcpProxy"
        hashed = balancing.hashed_tcp(self._balancing(destination.service_key)[0])
        tcp = extension("tcp", proxy, stat_prefix="tcp", cluster=cluster, idle_timeout="0s", hash_policy=hashed)
        return [*filters, tcp]

    def _manager(self, name: str, service: str) -> Json:
        """HTTP of a place."""
        return extension(
            "requests",
            _MANAGER,
            stat_prefix="in",
            rds={"config_source": source(self._layout.file("routes", name)), "route_config_name": name},
            http_filters=_filters(self._layout),
            access_log=[_access_log(service)],
            use_remote_address=True,  # and not what X-Forwarded-For says
            skip_xff_append=True,
            normalize_path=True,
            merge_slashes=True,
            path_with_escaped_slashes_action="REJECT_REQUEST",
            server_header_transformation="PASS_THROUGH",
            generate_request_id=True,
            preserve_external_request_id=True,
            always_set_request_id_in_response=False,
            request_id_extension={
                "typed_config": message(
                    "extensions.request_id.uuid.v3.UuidRequestIdConfig",
                    pack_trace_reason=False,
                    use_request_id_for_trace_sampling=False,
                )
            },
            upgrade_configs=[{"upgrade_type": "websocket"}],
            stream_idle_timeout=f"{STALL_TIMEOUT_S:g}s",
            common_http_protocol_options={"idle_timeout": "3600s"},
            max_request_headers_kb=64,
            local_reply_config=_refusals(),
        )

    # -- clusters and exits

    def _cluster(self, service_key: str, port: int, max_requests: int) -> str:
        """The name of the cluster of a service port; empty where there is no such service."""
        service = self._state.service(service_key)
        if service is None:
            self._awaited.add(service_key)
            return ""
        name = f"{service_key}:{port}" + (f"/{max_requests}" if max_requests else "")
        if name not in self._clusters:
            ready = [
                endpoint
                for endpoint in self._state.endpoints(service_key)
                if endpoint.ready and endpoint.weight > 0 and port in endpoint.ports
            ]
            said, detection = self._balancing(service_key)
            own = self._state.workload(self._layout.who.key)
            ranks: dict[int, list[Json]] = {}
            for one in self._destinations.preferred(ready):
                at = own.locality if own is not None else ""
                if service.prefers_zone and said is None and detection is None:
                    rank = zone_distance(at, one.locality)
                else:
                    known = said or AT_RANDOM
                    rank = rank_of(replace(known, local=known.local or service.prefers_zone), at, one.locality)
                ranks.setdefault(rank, []).append(self._member(one, one.ports[port]))
            to_http1, to_http2 = (self._destinations.speaks_http2(service_key, port, its) for its in (False, True))
            eds = {"eds_config": source(self._layout.file("endpoints", name))}
            self._clusters[name] = {
                **_internal(name, "EDS", None),
                "eds_cluster_config": eds,
                **balancing.of_cluster(said, detection),
                **_speaking(to_http1, to_http2, self._requests_each(service_key)),
            }
            _limit(self._clusters[name], max_requests)
            self._endpoints[name] = _assignment(name, *(ranks[rank] for rank in sorted(ranks)))
        return name

    def _mirror(self, service_key: str, port: int) -> str:
        """The name of the cluster for copies of requests.

        Envoy sends them without the state of the caller's connection, so they go through a listener that makes it from
        what the request says.
        """
        cluster = self._cluster(service_key, port, 0)
        name = f"mirror {cluster}"
        if cluster and name not in self._listeners:
            action = {"cluster": cluster, "timeout": f"{MIRROR_TIMEOUT_S:g}s"}
            manager = _onward("copies", "%REQ(X-UPROXY-CALLER)%", action)
            self._listeners[name] = _listener(name, [manager], [])
            self._clusters[name] = _internal(name, "STATIC", [_endpoint(name)])
        return name if cluster else ""

    def _asker(self, service_key: str, port: int) -> str:
        """The name of the cluster through which a service port is asked, by this waypoint as itself."""
        cluster = self._cluster(service_key, port, 0)
        name = f"ask {cluster}"
        if cluster and name not in self._listeners:
            who = self._layout.who
            caller = f"{who.identity};{host_port(who.addresses[0], 0)}"
            retry = {"retry_on": "connect-failure,refused-stream,reset", "num_retries": 2}  # to ask twice does no harm
            manager = _onward("checks", caller, {"cluster": cluster, "timeout": "0s", "retry_policy": retry})
            self._listeners[name] = _listener(name, [manager], [])
            self._clusters[name] = {
                **_internal(name, "STATIC", [_endpoint(name)]),
                **_protocols({"explicit_http_config": {"http_protocol_options": {}}}, [], checks.NOT_TAKEN),
            }
        return name if cluster else ""

    def _straight(self, name: str, destination: Destination, max_requests: int) -> str:
        """The cluster of one workload that was dialled by itself."""
        hop = destination.backend
        assert hop is not None
        cluster = f"straight {name}"
        member = self._exit_to(hop.expected, hop.authority.decode(), 1)
        self._clusters[cluster] = {
            **_internal(cluster, "STATIC", [member]),
            **_speaking(
                destination.http2,
                destination.http2 or destination.undeclared,
                self._requests_each(destination.service_key),
            ),
        }
        _limit(self._clusters[cluster], max_requests)
        return cluster

    def _member(self, endpoint: Endpoint, port: int) -> Json:
        return self._exit_to(endpoint.identity, host_port(endpoint.address, port), endpoint.weight)

    def _exit_to(self, identity: SpiffeId, authority: str, weight: int) -> Json:
        """An endpoint: the exit of an identity, and what is asked for there. When certificates are revoked, there is
        another exit: requests go through its new tunnels, and what is open in those of the old one ends with that.
        """
        name = f"{identity}?{self._revocation}"
        if name not in self._listeners:
            self._listeners[name] = _exit(name)
            self._clusters[name] = _tunnels(name, identity, self._layout, self._revocation)
        return _endpoint(name, authority, weight)


def _onward(name: str, caller: str, action: Json) -> Json:
    """HTTP of requests that this waypoint makes: all do one thing, and leave as those of `caller`, a format."""
    state = {
        "object_key": CALLER,
        "factory_key": "envoy.hashable_string",
        "format_string": {"text_format_source": {"inline_string": caller}},
        "shared_with_upstream": "TRANSITIVE",
    }
    route = {"match": {"prefix": "/"}, "route": action}
    return extension(
        name,
        _MANAGER,
        stat_prefix=name,
        server_header_transformation="PASS_THROUGH",
        forward_client_cert_details="ALWAYS_FORWARD_ONLY",
        # Listeners come while clusters that are new may still wait for their endpoints.
        route_config={
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}],
            "validate_clusters": False,
        },
        http_filters=[extension("state", _STATE, on_request_headers=[state]), _router()],
    )


def _listener(name: str, http: Sequence[Json], tcp: Sequence[Json]) -> Json:
    """An internal one, whose connections have the addresses of the caller's. `http`: filters for what is HTTP; where
    there are filters of both kinds, a connection's first bytes decide.
    """
    filters = [extension(ORIGINAL_DST, "extensions.filters.listener.original_dst.v3.OriginalDst")]
    chains: list[Json] = [{"name": "only", "filters": list(http or tcp)}]
    if http and tcp:
        filters.append(extension("inspector", "extensions.filters.listener.http_inspector.v3.HttpInspector"))
        known = {"application_protocols": ["http/1.0", "http/1.1", "h2c"]}
        chains = [
            {"name": "http", "filter_chain_match": known, "filters": list(http)},
            {"name": "tcp", "filters": list(tcp)},
        ]
    return {
        "name": name,
        "internal_listener": {},
        "listener_filters": filters,
        "listener_filters_timeout": f"{DETECTION_S:g}s",
        "continue_on_listener_filters_timeout": True,
        "filter_chains": chains,
    }


def _exit(name: str) -> Json:
    tunnelling = {
        "hostname": "%DOWNSTREAM_LOCAL_ADDRESS%",
        "headers_to_add": [header("x-uproxy-caller", f"%FILTER_STATE({CALLER}:PLAIN)%")],
    }
    proxy = "extensions.filters.network.tcp_proxy.v3.TcpProxy"
    return _listener(
        name,
        [],
        [extension("tcp", proxy, stat_prefix="exit", cluster=name, idle_timeout="0s", tunneling_config=tunnelling)],
    )


def _tunnels(name: str, identity: SpiffeId, layout: Layout, revocation: int) -> Json:
    """HBONE to whoever has an identity, at the address that a connection was made for."""
    options = message(
        "extensions.upstreams.http.v3.HttpProtocolOptions",
        common_http_protocol_options={"idle_timeout": "300s"},
        explicit_http_config={
            "http2_protocol_options": {
                "allow_connect": True,
                "initial_stream_window_size": _WINDOW,
                "connection_keepalive": {"interval": "10s", "timeout": "20s"},
            }
        },
    )
    return {
        "name": name,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": {"upstream_port_override": HBONE_PORT},
        "connect_timeout": _CONNECT_TIMEOUT,
        "cleanup_interval": "60s",
        "upstream_bind_config": {"source_address": {"address": layout.who.addresses[0], "port_value": 0}},
        "typed_extension_protocol_options": {_HTTP_OPTIONS: options},
        "transport_socket": extension(
            "tls",
            "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            common_tls_context=tls_context(layout, {"exact": str(identity)}, revocation),
        ),
        **_unlimited(),
    }


def tls_context(layout: Layout, peer: Json, revocation: int) -> Json:
    """TLS 1.3 with the certificate of this waypoint; the other side's SPIFFE ID matches `peer`, a StringMatcher.

    Who is believed stands in a file of its own for each `revocation`: whatever has the context is made anew, with it.
    """
    return {
        "alpn_protocols": ["h2"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificate_sds_secret_configs": [{"name": "own", "sds_config": source(layout.file("own"))}],
        "combined_validation_context": {
            "default_validation_context": {"match_typed_subject_alt_names": [{"san_type": "URI", "matcher": peer}]},
            "validation_context_sds_secret_config": {
                "name": "roots",
                "sds_config": source(layout.file("roots", str(revocation))),
            },
        },
    }


def _endpoint(listener: str, authority: str = "", weight: int = 1) -> Json:
    """An internal listener; `authority`: what its connections are for."""
    address: Json = {"server_listener_name": listener}
    found: Json = {"endpoint": {"address": {"envoy_internal_address": address}}, "load_balancing_weight": weight}
    if authority:
        address["endpoint_id"] = authority
        found["metadata"] = {"filter_metadata": {ORIGINAL_DST: {"local": authority}}}
    return found


def _assignment(name: str, *levels: Sequence[Json]) -> Json:
    """`levels`: those that come first, first."""
    endpoints = [{"priority": priority, "lb_endpoints": list(members)} for priority, members in enumerate(levels)]
    return {"cluster_name": name, "endpoints": endpoints}


def _internal(name: str, kind: str, members: Sequence[Json] | None) -> Json:
    """A cluster that leads to internal listeners."""
    raw = extension("raw", "extensions.transport_sockets.raw_buffer.v3.RawBuffer")
    cluster: Json = {
        "name": name,
        "type": kind,
        "connect_timeout": _CONNECT_TIMEOUT,
        "transport_socket": extension(
            "internal",
            "extensions.transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
            transport_socket=raw,
            passthrough_metadata=[{"kind": {"host": {}}, "name": ORIGINAL_DST}],
        ),
        **_unlimited(),
    }
    if members is not None:
        cluster["load_assignment"] = _assignment(name, members)
    return cluster


def _speaking(to_http1: bool, to_http2: bool, requests_each: int) -> Json:
    """Whether requests go on as HTTP/2, of callers who speak HTTP/1.1 and HTTP/2; how many by one connection."""
    http1: Json = {"http_protocol_options": {"enable_trailers": True}}
    http2: Json = {"http2_protocol_options": {}}
    if to_http1 == to_http2:
        kept = {"explicit_http_config": http2 if to_http2 else http1}
    else:
        kept = {"use_downstream_protocol_config": {**http1, **http2}}
    return _protocols(kept, [_OURS], [_OURS], requests_each)


def _protocols(kept: Json, of_requests: Sequence[Json], of_responses: Sequence[Json], requests_each: int = 0) -> Json:
    """What a cluster speaks, and what becomes of headers there."""
    upstream = [
        extension(
            "answers",
            "extensions.filters.http.header_mutation.v3.HeaderMutation",
            mutations={"request_mutations": list(of_requests), "response_mutations": list(of_responses)},
        ),
        extension("codec", "extensions.filters.http.upstream_codec.v3.UpstreamCodec"),
    ]
    common: Json = {"idle_timeout": f"{IDLE_TIMEOUT_S:g}s"}
    if requests_each:
        common["max_requests_per_connection"] = requests_each
    options = message(
        "extensions.upstreams.http.v3.HttpProtocolOptions",
        common_http_protocol_options=common,
        **kept,
        http_filters=upstream,
    )
    return {"typed_extension_protocol_options": {_HTTP_OPTIONS: options}}


def _unlimited() -> Json:
    most = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests", "max_retries"), _MANY)
    return {"circuit_breakers": {"thresholds": [most]}}


def _limit(cluster: Json, max_requests: int) -> None:
    if max_requests:
        cluster["circuit_breakers"]["thresholds"][0]["max_requests"] = max_requests


def _entrance(names: Iterable[str]) -> Json:
    """What callers may ask for: each place by its address and port."""
    hosts = [
        {
            "name": name,
            "domains": [name],
            "routes": [
                {
                    "match": {"connect_matcher": {}},
                    "route": {
                        "cluster": name,
                        "timeout": "0s",
                        "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
                    },
                }
            ],
        }
        for name in names
    ]
    text = "this is nothing that the Gateway of this waypoint serves"
    other = {"match": {"connect_matcher": {}}, **routes.answer(400, "wrong-destination", text)}
    return {"name": HBONE, "virtual_hosts": [*hosts, {"name": "other", "domains": ["*"], "routes": [other]}]}


def bootstrap(layout: Layout) -> Json:
    """What Envoy starts with: where everything else comes from, and the listeners that never change."""
    return {
        "node": {"id": layout.who.key, "cluster": "uproxy"},
        "admin": {"address": {"pipe": {"path": "admin.sock", "mode": 0o600}}},
        "dynamic_resources": {
            "lds_config": source(layout.file("listeners")),
            "cds_config": source(layout.file("clusters")),
        },
        "static_resources": {"listeners": [_probe(layout)]},
        "bootstrap_extensions": [extension("internal", "extensions.bootstrap.internal_listener.v3.InternalListener")],
        # Code of Extensions may never end: then an Envoy does, and another one starts.
        "watchdogs": {"worker_watchdog": {"kill_timeout": f"{STUCK_S:g}s"}},
        "layered_runtime": {
            "layers": [
                {
                    "name": "static",
                    "static_layer": {
                        **{
                            f"envoy.resource_limits.listener.{name}.connection_limit": MAX_TUNNELS
                            for name in _hbone_names(layout)
                        },
                        "re2.max_program_size.error_level": 100_000,
                        # Several lines of a header are one value, joined by commas, of which rules see the parts.
                        "envoy.reloadable_features.match_headers_individually": False,
                        "envoy.reloadable_features.rbac_match_headers_individually": False,
                    },
                }
            ]
        },
    }


def _hbone_names(layout: Layout) -> dict[str, IpAddress]:
    """Of the listeners that callers' tunnels end in."""
    return {f"{HBONE}-{index}": address for index, address in enumerate(layout.who.addresses)}


def _hbone_listeners(layout: Layout, revocation: int) -> Iterator[tuple[str, Json]]:
    """By their names. When certificates are revoked, callers are told to make new tunnels, and the old ones end: a
    filter chain that is replaced drains.
    """
    peers = f"spiffe://{layout.trust_domain}/"
    anybody = {"safe_regex": {"regex": f"spiffe://{layout.trust_domain}/ns/[^/,]+/sa/[^/,]+"}}
    tls = extension(
        "tls",
        "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        require_client_certificate=True,
        disable_stateless_session_resumption=True,
        common_tls_context=tls_context(layout, {"prefix": peers}, revocation),
    )
    known = {
        ORIGINAL_DST + ".local_ip": "%REQ(:AUTHORITY)%",
        ORIGINAL_DST + ".remote_ip": "%DOWNSTREAM_REMOTE_ADDRESS%",
        PRINCIPAL: "%DOWNSTREAM_PEER_URI_SAN%",
        SERIAL: "%DOWNSTREAM_PEER_SERIAL%",
        CALLER: "%DOWNSTREAM_PEER_URI_SAN%;%DOWNSTREAM_REMOTE_ADDRESS%",
    }
    kinds = {PRINCIPAL: "envoy.hashable_string", CALLER: "envoy.hashable_string", SERIAL: "envoy.string"}
    state = [
        {
            "object_key": name,
            "factory_key": kinds.get(name, name),
            "format_string": {"text_format_source": {"inline_string": text}},
            "shared_with_upstream": "TRANSITIVE" if name == CALLER else "ONCE",
        }
        for name, text in known.items()
    ]
    # A certificate with two names would be one that nobody has.
    named = {"filter_state": {"key": PRINCIPAL, "string_match": anybody}}
    rules = {"action": "ALLOW", "policies": {"named": {"permissions": [{"any": True}], "principals": [named]}}}
    manager = extension(
        HBONE,
        _MANAGER,
        stat_prefix=HBONE,
        codec_type="HTTP2",
        rds={"config_source": source(layout.file("routes", HBONE)), "route_config_name": HBONE},
        use_remote_address=True,  # and not what X-Forwarded-For says: callers are known by it
        skip_xff_append=True,
        stream_idle_timeout="0s",
        upgrade_configs=[{"upgrade_type": "CONNECT"}],
        http2_protocol_options={
            "allow_connect": True,
            "max_concurrent_streams": _MAX_STREAMS,
            "initial_stream_window_size": _WINDOW,
            "connection_keepalive": {"interval": "10s", "timeout": "20s"},
        },
        http_filters=[
            extension("state", _STATE, on_request_headers=state),
            _discovered(REVOKED, layout, RBAC),
            extension("named", RBAC, rules=rules),
            _router(),
        ],
    )
    for name, address in _hbone_names(layout).items():
        yield (
            name,
            {
                "name": name,
                "address": {"socket_address": {"address": address, "port_value": HBONE_PORT}},
                "filter_chains": [
                    {
                        "transport_socket": tls,
                        "transport_socket_connect_timeout": f"{HANDSHAKE_TIMEOUT_S:g}s",
                        "filters": [manager],
                    }
                ],
            },
        )


def _probe(layout: Layout) -> Json:
    manager = extension(
        PROBE,
        _MANAGER,
        stat_prefix=PROBE,
        rds={"config_source": source(layout.file("routes", PROBE)), "route_config_name": PROBE},
        http_filters=[_router()],
    )
    return {
        "name": PROBE,
        "address": {"pipe": {"path": "probe.sock", "mode": 0o600}},
        "filter_chains": [{"filters": [manager]}],
    }


def probed(version: str) -> Json:
    """The RouteConfiguration that answers with a version."""
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": version}}}
    return {"name": PROBE, "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]}


def _router() -> Json:
    return extension("router", "extensions.filters.http.router.v3.Router", suppress_envoy_headers=True)


def _filters(layout: Layout) -> list[Json]:
    """Those of each place, in the order in which they are asked. What a place does not say refuses everybody."""
    said = {
        "x-forwarded-for": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
        "x-forwarded-client-cert": f"URI={_PEER}",
        "x-uproxy-caller": f"%FILTER_STATE({CALLER}:PLAIN)%",  # for mirrors
    }
    callers = [
        _OURS,
        # Envoy would take orders from them: timeouts, retries.
        {"remove_on_match": {"key_matcher": {"prefix": "x-envoy-"}}},
        *({"append": header(name, value)} for name, value in said.items()),
    ]
    return [
        extension(
            "callers",
            "extensions.filters.http.header_mutation.v3.HeaderMutation",
            mutations={"request_mutations": callers},
        ),
        _discovered(REVOKED, layout, RBAC),
        _discovered(TOKENS, layout, "extensions.filters.http.jwt_authn.v3.JwtAuthentication"),
        *checks.idle_filters(),
        *({**extension(name, RBAC), "disabled": True} for name in _REHEARSED),
        extension(RBAC_DENY, RBAC, rules=_NOBODY),
        extension(RBAC_ALLOW, RBAC, rules=_NOBODY),
        *extensions.idle_filters(),
        *traffic.idle_filters(),
        extension("grpc", "extensions.filters.http.grpc_stats.v3.FilterConfig", emit_filter_state=True),
        _router(),
    ]


def _discovered(name: str, layout: Layout, kind: str) -> Json:
    """A filter whose configuration stands in a file of its own, and holds for the next request."""
    asked = {
        "config_source": source(layout.file(name)),
        "type_urls": [f"type.googleapis.com/envoy.{kind}"],
    }
    return {"name": name, "config_discovery": asked}


def _refusals() -> Json:
    """What programs are told of refusals by filters (`x-uproxy-reason`)."""

    def mapper(expression: str, reason: str, **more: Any) -> Json:
        kind = "extensions.access_loggers.filters.cel.v3.ExpressionFilter"
        told = [header("x-uproxy-reason", reason), header("x-request-id", "%REQ(X-REQUEST-ID)%")]
        return {
            "filter": {"extension_filter": extension("asked", kind, expression=expression)},
            "headers_to_add": [*told, *more.pop("also", ())],
            **more,
        }

    def refused(details: str, reason: str) -> Json:
        return mapper(f"response.code_details.startsWith('{details}')", reason)

    return {
        "mappers": [
            mapper(
                extensions.FALSE_ANSWER,
                "extension",
                also=[header(name, "") for name in extensions.OF_THE_MESH[1:]],
                status_code=503,
                body={"inline_string": extensions.REFUSED_TEXT},
            ),
            refused("rbac_access_denied", "policy"),
            refused("jwt_authn_access_denied", "token"),
            refused("ext_authz_", "external-authorization"),
            refused("fault_filter_abort", "fault"),
            refused("wasm_fail_stream", "extension"),
        ]
    }


_LOGGED: Final = {
    "started": "%START_TIME(%s.%6f)%",
    "took_ms": "%DURATION%",
    "method": "%REQ(:METHOD)%",
    "path": "%REQ(:PATH)%",
    "authority": "%REQ(:AUTHORITY)%",
    "protocol": "%PROTOCOL%",
    "user_agent": "%REQ(USER-AGENT)%",
    "kind": "%REQ(CONTENT-TYPE)%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "traceparent": "%REQ(TRACEPARENT)%",
    "status": "%RESPONSE_CODE%",
    "flags": "%RESPONSE_FLAGS%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "grpc": "%GRPC_STATUS_NUMBER%",
    "grpc_messages": "%FILTER_STATE(envoy.filters.http.grpc_stats:PLAIN)%",
    "received": "%BYTES_RECEIVED%",
    "sent": "%BYTES_SENT%",
    "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
    "caller": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "identity": _PEER,
    "upstream": "%UPSTREAM_HOST%",
    **{name: f"%DYNAMIC_METADATA({_SHADOWS}:{name}-shadow_engine_result)%" for name in _REHEARSED},
    **{f"{name}-rule": f"%DYNAMIC_METADATA({_SHADOWS}:{name}-shadow_effective_policy_id)%" for name in _REHEARSED},
    "audit": f"%DYNAMIC_METADATA({_SHADOWS}:shadow_effective_policy_id)%",
    **checks.marks(),
    "refused_by": "%RESP(X-UPROXY-POLICY)%",
    "rule": "%METADATA(ROUTE:uproxy:rule)%",
    "backend": "%METADATA(ROUTE:uproxy:backend)%",
}


def _access_log(service: str) -> Json:
    """A line of JSON for each request, to standard output, which the waypoint reads (`records`)."""
    fields: dict[str, Any] = {**_LOGGED, "service": service}
    log_format = {"json_format": fields, "omit_empty_values": True}
    return extension("records", "extensions.access_loggers.stream.v3.StdoutAccessLog", log_format=log_format)
