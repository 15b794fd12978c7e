"""Hypothesis strategies for what the mesh's records hold, drawn from few names so that references and clashes occur."""

from __future__ import annotations

import base64
import ipaddress
import json
from dataclasses import replace

from hypothesis import strategies as st

from control.api.address import IpAddress, IpBlock, parse_address, parse_block
from control.api.balancing import (
    Algorithm,
    ConsistentHash,
    Failover,
    HashOf,
    LoadBalancing,
    OutlierDetection,
    Warmup,
)
from control.api.extension import EnvoyFilter, ExternalAuthorization, Filter, Language, PythonFilter
from control.api.filters import (
    REDIRECTS,
    SCHEMES,
    Cors,
    Filters,
    Mirror,
    PathChange,
    Redirect,
    Replaced,
    Rewrite,
)
from control.api.gateway import Binding, Bound, Gateway, Instance, Placement, Process, Sidecar, Traffic, Via
from control.api.identity import make_id, parse_trust_domain
from control.api.index import AddressShard, Placed, ResidentService, ResidentWorkload
from control.api.jwt import JwtRule, RequestAuthentication, TokenHeader, canonical_jwks
from control.api.plaintext import Plaintext
from control.api.policy import Action, AuthorizationPolicy, Condition, ConditionKey, Operation, Rule, Source, Target
from control.api.records import Record
from control.api.revocations import Revocations
from control.api.route import (
    Backend,
    HeaderMatch,
    HeaderModifier,
    HTTPRoute,
    Match,
    Parent,
    PathKind,
    PathMatch,
    QueryMatch,
    Retry,
    RouteRule,
)
from control.api.topics import AddressesTopic, address_shard
from control.api.traffic import ConnectionLimits, Fault, RateLimit, Redis, Share, TrafficPolicy
from control.api.workload import Endpoint, Service, ServicePort, Workload

TRUST_DOMAIN = parse_trust_domain("cluster.local")

namespaces = st.sampled_from(["shop", "bank", "mesh-system"])
names = st.sampled_from(["web", "reviews", "db", "x"])
workload_names = st.sampled_from(["web-1", "web-2", "db.0", "x"])
accounts = st.sampled_from(["default", "web", "db"])
ports = st.integers(1, 65535)
weights = st.integers(1, 65535)
service_keys = st.builds("{}/{}".format, namespaces, names)
gateway_keys = service_keys
nodes = st.sampled_from(["", "a", "b"])


def _bindings(nodes: st.SearchStrategy[str]) -> st.SearchStrategy[Binding]:
    return st.builds(Binding, gateway_keys, st.sampled_from(Via), nodes) | st.builds(
        Binding, gateway_keys, st.sampled_from(Via), nodes, gateway_keys, st.integers(0, 100)
    ).filter(lambda binding: binding.canary != binding.gateway)


bindings = _bindings(st.just(""))
labels = st.dictionaries(st.sampled_from(["app", "version", "a.b/c"]), st.sampled_from(["", "web", "v1"]), max_size=3)


@st.composite
def addresses(draw: st.DrawFn) -> IpAddress:
    """Few enough that two records sometimes claim the same."""
    few = st.integers(0x0A000001, 0x0A000006).map(ipaddress.IPv4Address)
    v6 = st.integers(1, 3).map(lambda n: ipaddress.IPv6Address((0xFD00 << 112) + n))
    return parse_address(str(draw(st.one_of(few, v6))))


blocks = st.builds(
    lambda n, length: parse_block(str(ipaddress.ip_network((n, length), strict=False))),
    st.integers(0, 2**32 - 1),
    st.integers(0, 32),
)


def _few(items: st.SearchStrategy[object], **bounds: object) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(items, max_size=2, **bounds).map(tuple)


service_ports = st.builds(
    ServicePort,
    name=st.sampled_from(["", "http", "tcp"]),
    port=ports,
    target_port=st.one_of(ports, st.just("http")),
    app_protocol=st.sampled_from(["", "http", "kubernetes.io/h2c"]),
)


@st.composite
def services(draw: st.DrawFn) -> Service:
    namespace = draw(namespaces)
    return Service(
        namespace=namespace,
        name=draw(names),
        vips=draw(_few(addresses(), unique=True)),
        ports=draw(_few(service_ports, unique_by=lambda port: port.port)),
        labels=draw(labels),
        identities=tuple(make_id(TRUST_DOMAIN, namespace, account) for account in sorted(draw(st.sets(accounts)))),
        binding=draw(st.none() | bindings),
        prefers_zone=draw(st.booleans()),
    )


processes = st.sets(
    st.tuples(
        st.builds(make_id, st.just(TRUST_DOMAIN), namespaces, accounts),
        st.lists(addresses(), min_size=1, max_size=2, unique=True).map(tuple),
    ),
    max_size=2,
).map(lambda found: tuple(Process(*one) for one in sorted(found)))


@st.composite
def bounds(draw: st.DrawFn) -> Bound:
    """Of a port from 0 to 3, so that a workload often has several."""
    exempt = draw(st.sets(st.builds(make_id, st.just(TRUST_DOMAIN), namespaces, accounts), max_size=2))
    return Bound(
        port=draw(st.integers(0, 3)),
        gateways=tuple(sorted(draw(st.sets(gateway_keys, max_size=2)))),
        exempt=tuple(sorted(exempt)),
        enforced=draw(st.booleans()),
        guarded=draw(st.booleans()),
        processes=draw(processes),
    )


plaintexts = st.builds(Plaintext, st.booleans(), st.sets(ports, max_size=2).map(sorted).map(tuple)).filter(
    lambda plaintext: plaintext.others or plaintext.ports
)


def _by_port(items: list[Bound]) -> tuple[Bound, ...]:
    return tuple(sorted(items, key=lambda bound: bound.port))


sidecars = st.builds(Sidecar, gateway_keys, st.sets(st.integers(0, 65535), max_size=2).map(sorted).map(tuple))
localities = st.sampled_from(["", "eu", "eu/eu-1", "eu/eu-1/rack.7"])


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    namespace, account = draw(namespaces), draw(accounts)
    return Workload(
        namespace=namespace,
        name=draw(workload_names),
        service_account=account,
        identity=make_id(TRUST_DOMAIN, namespace, account),
        addresses=tuple(draw(st.lists(addresses(), min_size=1, max_size=2, unique=True))),
        labels=draw(labels),
        ports=draw(st.dictionaries(st.sampled_from(["http", "tcp"]), ports, max_size=2)),
        node=draw(nodes),
        weight=draw(weights),
        bounds=draw(st.lists(bounds(), max_size=2, unique_by=lambda bound: bound.port).map(_by_port)),
        direct=draw(st.booleans()),
        plaintext=draw(st.none() | plaintexts),
        proxy_protocol=tuple(sorted(draw(st.sets(ports, max_size=2)))),
        locality=draw(localities),
        sidecar=draw(st.none() | sidecars),
    )


@st.composite
def endpoints(draw: st.DrawFn) -> Endpoint:
    namespace = draw(namespaces)
    return Endpoint(
        service=f"{namespace}/{draw(names)}",
        workload=f"{namespace}/{draw(workload_names)}",
        address=draw(addresses()),
        identity=make_id(TRUST_DOMAIN, namespace, draw(accounts)),
        ports=draw(st.dictionaries(ports, ports, max_size=2)),
        weight=draw(weights),
        ready=draw(st.booleans()),
        labels=draw(labels),
        locality=draw(localities),
        node=draw(nodes),
    )


principals = st.sampled_from(["*", "cluster.local/ns/shop/sa/web", "cluster.local/ns/shop/*", "*/sa/web"])
namespace_patterns = st.sampled_from(["*", "shop", "sh*", "*op"])
sources = st.builds(
    Source,
    principals=_few(principals),
    not_principals=_few(principals),
    namespaces=_few(namespace_patterns),
    not_namespaces=_few(namespace_patterns),
    ip_blocks=_few(blocks),
    not_ip_blocks=_few(blocks),
)
_request_principals = st.sampled_from(["*", "https://issuer.example/*", "https://issuer.example/ann"])
http_sources = st.builds(
    Source,
    principals=_few(principals),
    request_principals=_few(_request_principals),
    not_request_principals=_few(_request_principals),
    remote_ip_blocks=_few(blocks),
    not_remote_ip_blocks=_few(blocks),
)
operations = st.builds(Operation, ports=_few(ports), not_ports=_few(ports))
http_operations = st.builds(
    Operation,
    ports=_few(ports),
    hosts=_few(st.sampled_from(["*", "reviews.shop", "shop.example:*"])),
    not_hosts=_few(st.sampled_from(["*", "reviews.shop"])),
    methods=_few(st.sampled_from(["GET", "P*", "*"])),
    not_methods=_few(st.sampled_from(["GET", "*T"])),
    paths=_few(st.sampled_from(["/", "/v2/*", "*.css", "*", "/{*}/x/{**}"])),
    not_paths=_few(st.sampled_from(["/admin*", "/a%2Ab"])),
)


def _values(key: ConditionKey) -> st.SearchStrategy[str] | st.SearchStrategy[IpBlock]:
    match key:
        case ConditionKey.SOURCE_IP | ConditionKey.DESTINATION_IP | ConditionKey.REMOTE_IP:
            return blocks
        case ConditionKey.SOURCE_PRINCIPAL:
            return principals
        case ConditionKey.SOURCE_NAMESPACE:
            return namespace_patterns
        case ConditionKey.DESTINATION_PORT:
            return ports.map(str)
        case _:
            return st.sampled_from(["*", "beta", "be*", "*ta"])


_NAMES = {ConditionKey.REQUEST_HEADERS: ("x-user", "cookie"), ConditionKey.REQUEST_CLAIMS: ("groups", "a][b", "scope")}


def _conditions(key: ConditionKey) -> st.SearchStrategy[Condition]:
    values, name = _values(key), st.sampled_from(_NAMES.get(key, ("",)))
    return st.builds(Condition, st.just(key), _few(values, min_size=1), _few(values), name)


def _rules(
    sources: st.SearchStrategy[Source],
    operations: st.SearchStrategy[Operation],
    conditions: st.SearchStrategy[Condition],
) -> st.SearchStrategy[Rule]:
    return st.builds(Rule, sources=_few(sources), operations=_few(operations), conditions=_few(conditions))


http_rules = _rules(
    sources | http_sources, operations | http_operations, st.sampled_from(ConditionKey).flatmap(_conditions)
)
rules = _rules(
    sources,
    operations,
    st.sampled_from([one for one in ConditionKey if not one.value.startswith(("request.", "remote."))]).flatmap(
        _conditions
    ),
)
selecting_policies = st.builds(
    AuthorizationPolicy,
    namespace=namespaces,
    name=names,
    action=st.sampled_from(Action),
    selector=st.none() | labels,
    rules=_few(rules),
    dry_run=st.booleans(),
)
"""Those that uProxies enforce."""


_header_patterns = st.sets(st.sampled_from(["*", "x-user", "x-*", "*-id"]), max_size=2).map(sorted).map(tuple)
external_authorizations = st.builds(
    ExternalAuthorization,
    service=service_keys,
    port=ports,
    timeout_ms=st.integers(1, 60_000),
    path_prefix=st.sampled_from(["", "/check"]),
    fail_open=st.booleans(),
    status_on_error=st.integers(400, 599),
    checked=_header_patterns,
    added=st.dictionaries(st.sampled_from(["x-mesh", "x-zone"]), st.sampled_from(["", "a b"])).map(
        lambda added: tuple(sorted(added.items()))
    ),
    body_bytes=st.integers(0, 100),
    partial_body=st.booleans(),
    upstream_on_allow=_header_patterns,
    downstream_on_allow=_header_patterns,
    downstream_on_deny=_header_patterns,
)


@st.composite
def targeting_policies(draw: st.DrawFn) -> AuthorizationPolicy:
    """Those that waypoints enforce."""
    namespace = draw(namespaces)
    targets = st.builds(Target, st.sampled_from(["Gateway", "Service"]), names.map(lambda name: f"{namespace}/{name}"))
    action = draw(st.sampled_from(Action))
    return AuthorizationPolicy(
        namespace=namespace,
        name=draw(names),
        action=action,
        selector=None,
        rules=draw(_few(http_rules)),
        targets=tuple(sorted(draw(st.sets(targets, min_size=1, max_size=2)))),
        authorizer=draw(st.none() | external_authorizations) if action is Action.CUSTOM else None,
    )


policies = selecting_policies | targeting_policies()

_RSA_N = base64.urlsafe_b64encode(b"\x80" + bytes(255)).decode().rstrip("=")
_POINT = base64.urlsafe_b64encode(bytes(32)).decode().rstrip("=")
_jwks = st.lists(
    st.sampled_from(
        [
            {"kty": "RSA", "n": _RSA_N, "e": "AQAB", "kid": "1"},
            {"kty": "EC", "crv": "P-256", "x": _POINT, "y": _POINT},
            {"kty": "OKP", "crv": "Ed25519", "x": _POINT, "alg": "EdDSA", "kid": "2"},
        ]
    ),
    unique_by=lambda jwk: jwk["kty"],
).map(lambda found: canonical_jwks(json.dumps({"keys": found})))
_token_names = st.sampled_from(["t", "session", "access_token"])
jwt_rules = st.builds(
    JwtRule,
    issuer=st.sampled_from(["https://issuer.example", "accounts"]),
    jwks=_jwks,
    audiences=_few(st.sampled_from(["reviews", "web"])),
    headers=_few(st.builds(TokenHeader, st.sampled_from(["x-jwt", "authorization"]), st.sampled_from(["", "Bearer "]))),
    parameters=_few(_token_names),
    cookies=_few(_token_names),
    claim_headers=_few(st.tuples(st.sampled_from(["x-sub", "x-group"]), st.sampled_from(["sub", "a][b"]))),
    payload_header=st.sampled_from(["", "x-payload"]),
    forward=st.booleans(),
)


@st.composite
def request_authentications(draw: st.DrawFn) -> RequestAuthentication:
    namespace = draw(namespaces)
    targets = st.builds(Target, st.sampled_from(["Gateway", "Service"]), names.map(lambda name: f"{namespace}/{name}"))
    return RequestAuthentication(
        namespace=namespace,
        name=draw(names),
        targets=tuple(sorted(draw(st.sets(targets, min_size=1, max_size=2)))),
        rules=draw(_few(jwt_rules)),
    )


@st.composite
def _rate_limits(draw: st.DrawFn) -> RateLimit:
    share = draw(st.sampled_from(Share))
    numbers = st.integers(1, 1000)
    return RateLimit(
        draw(numbers),
        draw(numbers),
        draw(numbers),
        share,
        draw(st.sampled_from(["x-user", "cookie"])) if share is Share.HEADER else "",
        draw(_few(st.sampled_from(["canary", "stable"]), unique=True)),
        draw(st.booleans()),
    )


_percentages = st.integers(1, 100)
_faults = st.builds(Fault, _percentages, delay_ms=st.integers(1, 1000)) | st.builds(
    Fault, _percentages, status=st.integers(200, 599)
)


_connection_limits = st.builds(ConnectionLimits, st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)) | st.builds(
    ConnectionLimits, requests_each=st.integers(1, 9)
)


_hashes = (
    st.builds(ConsistentHash, st.sampled_from([HashOf.HEADER, HashOf.PARAMETER]), st.just("x-user"))
    | st.builds(ConsistentHash, st.sampled_from([HashOf.ADDRESS, HashOf.IDENTITY]))
    | st.builds(ConsistentHash, st.just(HashOf.COOKIE), st.just("Id"), st.integers(0, 10), st.sampled_from(["", "/a"]))
    | st.just(ConsistentHash(HashOf.COOKIE, "Id"))
)
_outlier_detections = st.builds(
    OutlierDetection,
    st.integers(0, 10),
    st.integers(0, 10),
    st.integers(0, 10),
    st.booleans(),
    st.integers(1, 1000),
    st.integers(1, 1000),
    st.integers(0, 100),
    st.integers(0, 100),
)


@st.composite
def load_balancings(draw: st.DrawFn) -> LoadBalancing:
    local = draw(st.booleans())
    return LoadBalancing(
        draw(st.sampled_from(Algorithm)),
        draw(st.none() | _hashes),
        draw(st.none() | st.builds(Warmup, st.integers(1, 1000), st.integers(1, 100), st.integers(100, 1000))),
        local,
        (Failover("eu", "us"), Failover("us", "eu"))[: draw(st.integers(0, 2))] if local else (),
    )


_python_filters = st.builds(
    PythonFilter,
    st.sampled_from(["shop/a", "shop/b"]),
    st.sampled_from(["", "greeter", "a.b-c"]),
    st.sampled_from([(), (("a", "1"), ("b", ""))]),
    st.integers(1, 10_000),
    st.booleans(),
)


@st.composite
def _envoy_filters(draw: st.DrawFn) -> Filter:
    language = draw(st.sampled_from(Language))
    name, opens = draw(st.sampled_from(["shop/a", "shop/b"])), draw(st.booleans())
    config = draw(st.sampled_from([(), (("a", "1"), ("b", ""))])) if language is Language.WASM else ()
    if draw(st.booleans()):
        return EnvoyFilter(name, language, b"", "/a/b c", "0a" * 32, config, opens)
    code = b"\0asm\1\0\0\0" if language is Language.WASM else b"x = '\xc3\xa9'"
    return EnvoyFilter(name, language, code, config=config, fail_open=opens)


@st.composite
def traffic_policies(draw: st.DrawFn) -> TrafficPolicy:
    namespace = draw(namespaces)
    targets = st.builds(Target, st.sampled_from(["Gateway", "Service"]), names.map(lambda name: f"{namespace}/{name}"))
    limits = draw(_few(_rate_limits()))
    counted = any(limit.everywhere for limit in limits)
    return TrafficPolicy(
        namespace,
        draw(names),
        tuple(sorted(draw(st.sets(targets, min_size=1, max_size=2)))),
        limits,
        draw(st.integers(0, 5)),
        draw(_few(_faults)),
        draw(st.none() | _connection_limits),
        draw(st.none() | load_balancings()),
        draw(st.none() | _outlier_detections),
        draw(_few(_python_filters | _envoy_filters(), unique_by=lambda one: one.extension)),
        Redis(f"{namespace}/redis", draw(st.integers(1, 65535)), draw(st.integers(1, 10_000)), draw(st.booleans()))
        if counted
        else None,
        tuple(sorted(draw(st.sets(st.sampled_from(["spdy/3.1", "tcp", "x"]))))),
    )


@st.composite
def gateways(draw: st.DrawFn) -> Gateway:
    namespace = draw(namespaces)
    instances = draw(st.dictionaries(workload_names, addresses(), max_size=2))
    placement = draw(st.sampled_from(Placement))

    def instance(name: str) -> Instance:
        found = Instance(f"{namespace}/{name}", instances[name])
        if placement is Placement.REMOTE:
            return found
        account = draw(accounts) if placement is Placement.SERVICE_ACCOUNT else ""
        others = draw(st.lists(addresses().filter(lambda one: one != found.address), max_size=1))
        return replace(found, account=account, node=draw(nodes.filter(bool)), others=tuple(others))

    return Gateway(
        namespace=namespace,
        name=draw(names),
        traffic=draw(st.sampled_from(Traffic)),
        instances=tuple(instance(name) for name in sorted(instances)),
        services=tuple(sorted(draw(st.sets(service_keys, max_size=3)))),
        workloads=tuple(sorted(draw(st.sets(st.builds("{}/{}".format, namespaces, workload_names), max_size=3)))),
        trusted_proxies=draw(st.integers(0, 2)),
        placement=placement,
    )


_header_names = st.sampled_from(["x-user", "cookie", "x-added"])
_header_values = st.sampled_from(["a", "two words", ""])


@st.composite
def modifiers(draw: st.DrawFn) -> HeaderModifier:
    """Each header in at most one place."""
    found = draw(st.lists(_header_names, max_size=3, unique=True))
    first, second = sorted((draw(st.integers(0, 3)), draw(st.integers(0, 3))))
    return HeaderModifier(
        set=tuple((name, draw(_header_values)) for name in found[:first]),
        add=tuple((name, draw(_header_values)) for name in found[first:second]),
        remove=tuple(found[second:]),
    )


_expressions = st.sampled_from(["/v[0-9]+(/.*)?", ".*", "a|b"])
matches = st.builds(
    Match,
    path=st.builds(
        PathMatch,
        st.sampled_from([PathKind.EXACT, PathKind.PREFIX]),
        st.sampled_from(["/", "/v2", "/v2/x%2A"]),
    )
    | st.builds(PathMatch, st.just(PathKind.EXPRESSION), _expressions),
    headers=_few(
        st.builds(HeaderMatch, _header_names, _header_values)
        | st.builds(HeaderMatch, _header_names, _expressions, st.just(True)),
        unique_by=lambda header: header.name,
    ),
    query=_few(
        st.builds(QueryMatch, st.sampled_from(["a", "b"]), st.sampled_from(["1", "\u00fc &"]))
        | st.builds(QueryMatch, st.sampled_from(["a", "b"]), _expressions, st.just(True)),
        unique_by=lambda parameter: parameter.name,
    ),
    method=st.sampled_from(["", "GET", "DELETE"]),
)


changes = st.builds(PathChange, st.just(Replaced.ALL), st.sampled_from(["/", "/a/b/"])) | st.builds(
    PathChange, st.just(Replaced.PREFIX), st.sampled_from(["", "/a"])
)
_hosts = st.sampled_from(["", "example.org"])
redirects = st.builds(
    Redirect,
    scheme=st.sampled_from(["", *SCHEMES]),
    hostname=_hosts,
    path=st.none() | changes,
    port=st.integers(0, 65535),
    status=st.sampled_from(REDIRECTS),
)
rewrites = st.builds(Rewrite, hostname=_hosts, path=st.none() | changes).filter(lambda rewrite: rewrite != Rewrite())
_listed = _few(st.sampled_from(["x-a", "x-b"]), unique=True) | st.just(("*",))
cors = st.builds(
    Cors,
    origins=st.sampled_from([("*",), ("https://a.example", "http://*.b.example:8080", "http://*")]),
    methods=_few(st.sampled_from(["GET", "PUT"]), unique=True) | st.just(("*",)),
    headers=_listed,
    exposed=_listed,
    credentials=st.booleans(),
    max_age_s=st.integers(1, 86_400),
)
retries = st.builds(
    Retry,
    codes=st.sets(st.integers(400, 599), max_size=3).map(sorted).map(tuple),
    attempts=st.integers(1, 10),
    backoff_ms=st.integers(0, 1000),
)


def filters(services: st.SearchStrategy[str], *, of_rule: bool) -> st.SearchStrategy[Filters]:
    """Of a rule or of a backend; mirrors go to some of the services."""
    mirrors = st.integers(1, 1_000_000).flatmap(
        lambda of: st.builds(Mirror, services, ports, st.integers(0, of), st.just(of))
    )
    return st.builds(
        Filters,
        redirect=st.none() | redirects,
        rewrite=st.none() | rewrites,
        mirrors=_few(mirrors),
        cors=st.none() | cors if of_rule else st.none(),
    )


@st.composite
def routes(draw: st.DrawFn) -> HTTPRoute:
    namespace = draw(namespaces)
    services = names.map(lambda name: f"{namespace}/{name}")
    anywhere = services | service_keys
    backends = st.builds(
        Backend,
        anywhere,
        ports,
        st.integers(0, 1_000_000),
        modifiers(),
        modifiers(),
        filters(anywhere, of_rule=False),
        st.booleans(),
    )
    rules = st.builds(
        RouteRule,
        name=st.sampled_from(["", "canary"]),
        matches=_few(matches, min_size=1),
        request=modifiers(),
        response=modifiers(),
        backends=_few(backends),
        timeout_ms=st.integers(0, 100_000),
        backend_timeout_ms=st.integers(0, 100_000),
        filters=filters(anywhere, of_rule=True),
        retry=st.none() | retries,
    )
    parents = st.builds(Parent, services, st.integers(0, 65535))
    callers = draw(st.just("") | namespaces)
    return HTTPRoute(
        namespace=namespace,
        name=f"{callers}.{draw(names)}" if callers else draw(names),
        callers=callers,
        parents=draw(_few(parents, min_size=1, unique=True)),
        hostnames=draw(_few(st.sampled_from(["reviews.shop", "*.example"]), unique=True)),
        rules=draw(_few(rules, min_size=1)),
    )


datagrams = st.sets(ports, max_size=2).map(sorted).map(tuple)


@st.composite
def resident_workloads(draw: st.DrawFn) -> ResidentWorkload:
    bound = draw(st.dictionaries(st.integers(0, 3), _bindings(nodes), max_size=2))
    return ResidentWorkload(
        draw(namespaces),
        draw(workload_names),
        draw(accounts),
        draw(labels),
        tuple(sorted(bound.items(), key=_port)),
        draw(datagrams),
        draw(st.none() | st.builds(Placed, names, nodes.filter(bool))),
    )


def _port(item: tuple[int, Binding]) -> int:
    return item[0]


residents = (
    st.builds(
        ResidentService,
        namespaces,
        names,
        st.lists(ports, max_size=3, unique=True).map(tuple),
        st.booleans(),
        datagrams,
    )
    | resident_workloads()
)


@st.composite
def address_shards(draw: st.DrawFn) -> tuple[AddressesTopic, AddressShard]:
    """Unsigned, of few addresses: each shard that is drawn has some that `addresses` draws, and others."""
    shard = address_shard(draw(addresses()))
    held = draw(st.dictionaries(st.sampled_from(_BY_SHARD[shard]), residents, max_size=3))
    return AddressesTopic(shard), AddressShard(held)


_BY_SHARD: dict[int, list[IpAddress]] = {}
for _text in [f"10.0.{n >> 8}.{n & 255}" for n in range(1, 1024)] + [f"fd00::{n}" for n in range(1, 4)]:
    _BY_SHARD.setdefault(address_shard(parse_address(_text)), []).append(parse_address(_text))


revocations = st.builds(Revocations, namespaces, st.lists(st.binary(max_size=20), min_size=1, max_size=4).map(tuple))


def records() -> st.SearchStrategy[Record]:
    return st.one_of(
        services(),
        workloads(),
        endpoints(),
        policies,
        request_authentications(),
        traffic_policies(),
        gateways(),
        routes(),
        revocations,
    )
