"""Hypothesis strategies for what the mesh's records hold, drawn from few names so that references and clashes occur."""

from __future__ import annotations

import ipaddress

from hypothesis import strategies as st

from control.api.address import IpAddress, IpBlock, parse_address, parse_block
from control.api.identity import make_id, parse_trust_domain
from control.api.index import AddressShard, ResidentService, ResidentWorkload
from control.api.policy import Action, AuthorizationPolicy, Condition, ConditionKey, Operation, Rule, Source
from control.api.records import Record
from control.api.topics import AddressesTopic, address_shard
from control.api.workload import Endpoint, Service, ServicePort, Workload

TRUST_DOMAIN = parse_trust_domain("cluster.local")

namespaces = st.sampled_from(["shop", "bank", "mesh-system"])
names = st.sampled_from(["web", "reviews", "db", "x"])
workload_names = st.sampled_from(["web-1", "web-2", "db.0", "x"])
accounts = st.sampled_from(["default", "web", "db"])
ports = st.integers(1, 65535)
weights = st.integers(1, 65535)
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
    )


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
        node=draw(st.sampled_from(["", "a"])),
        weight=draw(weights),
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
operations = st.builds(Operation, ports=_few(ports), not_ports=_few(ports))


def _values(key: ConditionKey) -> st.SearchStrategy[str] | st.SearchStrategy[IpBlock]:
    match key:
        case ConditionKey.SOURCE_IP | ConditionKey.DESTINATION_IP:
            return blocks
        case ConditionKey.SOURCE_PRINCIPAL:
            return principals
        case ConditionKey.SOURCE_NAMESPACE:
            return namespace_patterns
        case ConditionKey.DESTINATION_PORT:
            return ports.map(str)


conditions = st.sampled_from(ConditionKey).flatmap(
    lambda key: st.builds(
        Condition, key=st.just(key), values=_few(_values(key), min_size=1), not_values=_few(_values(key))
    )
)
rules = st.builds(Rule, sources=_few(sources), operations=_few(operations), conditions=_few(conditions))
policies = st.builds(
    AuthorizationPolicy,
    namespace=namespaces,
    name=names,
    action=st.sampled_from(Action),
    selector=st.none() | labels,
    rules=_few(rules),
)


residents = st.builds(
    ResidentService, namespaces, names, st.lists(ports, max_size=3, unique=True).map(tuple)
) | st.builds(ResidentWorkload, namespaces, workload_names, accounts, labels)


@st.composite
def address_shards(draw: st.DrawFn) -> tuple[AddressesTopic, AddressShard]:
    """Unsigned, of few addresses: each shard that is drawn has some that `addresses` draws, and others."""
    shard = address_shard(draw(addresses()))
    held = draw(st.dictionaries(st.sampled_from(_BY_SHARD[shard]), residents, max_size=3))
    return AddressesTopic(shard), AddressShard(held)


_BY_SHARD: dict[int, list[IpAddress]] = {}
for _text in [f"10.0.{n >> 8}.{n & 255}" for n in range(1, 1024)] + [f"fd00::{n}" for n in range(1, 4)]:
    _BY_SHARD.setdefault(address_shard(parse_address(_text)), []).append(parse_address(_text))


def records() -> st.SearchStrategy[Record]:
    return st.one_of(services(), workloads(), endpoints(), policies)
