"""What the mesh consists of (`Record`) as message bodies: `read(topic, write(x)) == x`.

What the topic says (namespace, name) is not repeated in the body, so the two cannot disagree. Reading is strict:
every field must be there, none may be added, and every value must be in its canonical form. What waypoints ask for
(`binding`, `bounds`, `sidecar`, `targets`, `authorizer`, `trustedProxies`, `placement`, `engine`), and `direct`,
`plaintext`, `locality`, `dryRun` and an endpoint's `node`, are absent where there is none, so that a mesh without them
is as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from control.api.address import AddressError, IpBlock, parse_block
from control.api.extension import ExternalAuthorization
from control.api.fields import (
    Fields,
    check_distinct,
    check_ordered,
    checked,
    number_in,
    read_address,
    read_any_identity,
    read_binding,
    read_flag,
    read_identity,
    read_key,
    read_member,
    read_port,
    read_target,
    typed,
    write_binding,
    write_target,
)
from control.api.fields import RecordError as RecordError  # what `read` raises
from control.api.gateway import (
    MAX_TRUSTED_PROXIES,
    Binding,
    Bound,
    Engine,
    Gateway,
    Instance,
    Placement,
    Process,
    Sidecar,
    Traffic,
)
from control.api.identity import SpiffeId, TrustDomain, make_id, proxy_hash
from control.api.jwt import RequestAuthentication
from control.api.labels import wrong_value
from control.api.locality import wrong_locality
from control.api.messages import Body, Value
from control.api.names import key, wrong_dns_label, wrong_service_name, wrong_subdomain
from control.api.plaintext import MAX_PORTS, Plaintext
from control.api.policy import (
    NAMED,
    Action,
    AuthorizationPolicy,
    Condition,
    ConditionKey,
    Operation,
    Rule,
    Source,
    canonical_claim,
    canonical_host,
    canonical_method,
    canonical_namespace,
    canonical_path,
    canonical_principal,
    canonical_value,
    wrong_condition_name,
)
from control.api.revocations import MAX_LISTS, Revocations
from control.api.route import HTTPRoute
from control.api.topics import (
    EndpointTopic,
    GatewayTopic,
    PolicyTopic,
    RecordTopic,
    RequestAuthenticationTopic,
    RevocationsTopic,
    RouteTopic,
    ServiceTopic,
    TrafficTopic,
    WorkloadTopic,
)
from control.api.traffic import TrafficPolicy
from control.api.workload import Endpoint, Service, ServicePort, Workload

Record = (
    Service
    | Endpoint
    | Workload
    | AuthorizationPolicy
    | RequestAuthentication
    | TrafficPolicy
    | Gateway
    | HTTPRoute
    | Revocations
)

MAX_WEIGHT: Final = 65_535


# Codecs of what only waypoints and the control plane have are imported where they are called: a uProxy that runs needs
# none of them, and half a megabyte less.


def topic_of(record: Record) -> RecordTopic:
    """Where a record is published."""
    match record:
        case Service():
            return ServiceTopic(record.namespace, record.name)
        case Endpoint():
            namespace, _, service = record.service.partition("/")
            return EndpointTopic(namespace, service, record.workload.partition("/")[2])
        case Workload():
            return WorkloadTopic(proxy_hash(record.identity), record.name)
        case AuthorizationPolicy():
            return PolicyTopic(record.namespace, record.name)
        case RequestAuthentication():
            return RequestAuthenticationTopic(record.namespace, record.name)
        case TrafficPolicy():
            return TrafficTopic(record.namespace, record.name)
        case Gateway():
            return GatewayTopic(record.namespace, record.name)
        case HTTPRoute():
            return RouteTopic(record.namespace, record.name)
        case Revocations():
            return RevocationsTopic(record.namespace)


def write(record: Record) -> Body:
    """The body of a record."""
    match record:
        case Service():
            return {
                "vips": list(record.vips),
                "ports": [[p.name, p.port, p.target_port, p.app_protocol] for p in record.ports],
                "labels": dict(record.labels),
                "identities": [str(identity) for identity in record.identities],
                **({} if record.binding is None else {"binding": write_binding(record.binding)}),
                **({"prefersZone": True} if record.prefers_zone else {}),
            }
        case Endpoint():
            return {
                "address": record.address,
                "identity": str(record.identity),
                "ports": [[port, target] for port, target in record.ports.items()],
                "weight": record.weight,
                "ready": record.ready,
                "labels": dict(record.labels),
                **({"locality": record.locality} if record.locality else {}),
                **({"node": record.node} if record.node else {}),
            }
        case Workload():
            return {
                "namespace": record.namespace,
                "service_account": record.service_account,
                "addresses": list(record.addresses),
                "labels": dict(record.labels),
                "ports": dict(record.ports),
                "node": record.node,
                "weight": record.weight,
                **({"bounds": [_write_bound(bound) for bound in record.bounds]} if record.bounds else {}),
                **({"direct": True} if record.direct else {}),
                **({} if record.plaintext is None else {"plaintext": _write_plaintext(record.plaintext)}),
                **({"proxyProtocol": list(record.proxy_protocol)} if record.proxy_protocol else {}),
                **({"locality": record.locality} if record.locality else {}),
                **({} if record.sidecar is None else {"sidecar": [record.sidecar.gateway, list(record.sidecar.ports)]}),
            }
        case AuthorizationPolicy():
            return {
                "action": record.action.value,
                "selector": None if record.selector is None else dict(record.selector),
                "rules": [_write_rule(rule) for rule in record.rules],
                **({"targets": [write_target(target) for target in record.targets]} if record.targets else {}),
                **({"dryRun": True} if record.dry_run else {}),
                **({} if record.authorizer is None else {"authorizer": _write_authorizer(record.authorizer)}),
            }
        case RequestAuthentication():
            from control.api.jwt_record import write_request_authentication

            return write_request_authentication(record)
        case TrafficPolicy():
            from control.api.traffic_record import write_traffic

            return write_traffic(record)
        case Gateway():
            return {
                "traffic": record.traffic.value,
                "instances": [_write_instance(record, instance) for instance in record.instances],
                "services": list(record.services),
                "workloads": list(record.workloads),
                **({"trustedProxies": record.trusted_proxies} if record.trusted_proxies else {}),
                **({"engine": record.engine.value} if record.engine is not Engine.BUILT_IN else {}),
                **({} if record.placement is Placement.REMOTE else {"placement": record.placement.value}),
            }
        case HTTPRoute():
            from control.api.route_record import write_route

            return write_route(record)
        case Revocations():
            return {"lists": list(record.lists)}


def read(topic: RecordTopic, body: Body, trust_domain: TrustDomain) -> Record:
    """The record in a body. Raises RecordError (without the topic's name, which the caller knows)."""
    fields = Fields(body)
    record = _read(topic, fields, trust_domain)
    fields.finish()
    return record


def _read(topic: RecordTopic, fields: Fields, trust_domain: TrustDomain) -> Record:
    match topic:
        case ServiceTopic():
            return _read_service(topic, fields, trust_domain)
        case EndpointTopic():
            return _read_endpoint(topic, fields, trust_domain)
        case WorkloadTopic():
            return _read_workload(topic, fields, trust_domain)
        case PolicyTopic():
            return _read_policy(topic, fields)
        case RequestAuthenticationTopic():
            from control.api.jwt_record import read_request_authentication

            return read_request_authentication(topic, fields)
        case TrafficTopic():
            from control.api.traffic_record import read_traffic

            return read_traffic(topic, fields)
        case GatewayTopic():
            return _read_gateway(topic, fields)
        case RouteTopic():
            from control.api.route_record import read_route

            return read_route(topic, fields)
        case RevocationsTopic():
            return _read_revocations(topic, fields)


def _block(value: Value, name: str) -> IpBlock:
    text = typed(value, str, name)
    try:
        block = parse_block(text)
    except AddressError as error:
        raise RecordError(f"{name}: {error}") from None
    if block != text:
        raise RecordError(f"{name}: {text!r} must be written {block!r}")
    return block


def _canonical(parse: Callable[[str], str]) -> Callable[[Value, str], str]:
    """A check for text that `parse` leaves as it is."""

    def check(value: Value, name: str) -> str:
        text = typed(value, str, name)
        try:
            canonical = parse(text)
        except ValueError as error:
            raise RecordError(f"{name}: {error}") from None
        if canonical != text:
            raise RecordError(f"{name}: {text!r} must be written {canonical!r}")
        return text

    return check


def _read_service(topic: ServiceTopic, fields: Fields, trust_domain: TrustDomain) -> Service:
    ports = tuple(_read_service_port(item) for item in fields.take("ports", list))
    check_distinct([port.port for port in ports], "ports")
    return Service(
        namespace=topic.namespace,
        name=topic.name,
        vips=fields.addresses("vips"),
        ports=ports,
        labels=fields.labels("labels"),
        identities=_read_identities(fields.take("identities", list), trust_domain, topic.namespace),
        binding=_read_binding(fields),
        prefers_zone=read_flag(fields, "prefersZone"),
    )


def _read_binding(fields: Fields) -> Binding | None:
    binding = read_binding(fields.take("binding", list), "binding") if fields.has("binding") else None
    if binding is not None and binding.node:
        raise RecordError("binding names a node; only that of a workload's own address does")
    return binding


def _read_identities(values: list[Value], trust_domain: TrustDomain, namespace: str) -> tuple[SpiffeId, ...]:
    found = [read_identity(typed(value, str, "identities"), trust_domain, namespace) for value in values]
    check_ordered(found, "identities")
    return tuple(found)


def _read_service_port(value: Value) -> ServicePort:
    match value:
        case [name, port, target, app_protocol]:
            if type(target) is not str:
                target = read_port(target, "ports")
            return ServicePort(
                typed(name, str, "ports"),
                read_port(port, "ports"),
                target,
                typed(app_protocol, str, "ports"),
            )
    raise RecordError("ports: each must be [name, port, target port, application protocol]")


def _read_endpoint(topic: EndpointTopic, fields: Fields, trust_domain: TrustDomain) -> Endpoint:
    ports: dict[int, int] = {}
    pairs = fields.take("ports", list)
    for item in pairs:
        match item:
            case [port, target]:
                ports[read_port(port, "ports")] = read_port(target, "ports")
            case _:
                raise RecordError("ports: each must be [service port, workload port]")
    check_distinct([item[0] for item in pairs], "ports")
    return Endpoint(
        service=key(topic.namespace, topic.service),
        workload=key(topic.namespace, topic.workload),
        address=read_address(fields.take("address", str), "address"),
        identity=read_identity(fields.take("identity", str), trust_domain, topic.namespace),
        ports=ports,
        weight=fields.number("weight", 1, MAX_WEIGHT),
        ready=fields.take("ready", bool),
        labels=fields.labels("labels"),
        locality=_read_locality(fields),
        node=_read_node(fields.take("node", str)) if fields.has("node") else "",
    )


def _read_node(value: Value) -> str:
    node = checked(typed(value, str, "node"), wrong_value, "node")
    if not node:
        raise RecordError("node is empty; it must then be absent")
    return node


def _read_workload(topic: WorkloadTopic, fields: Fields, trust_domain: TrustDomain) -> Workload:
    namespace = checked(fields.take("namespace", str), wrong_dns_label, "namespace")
    service_account = checked(fields.take("service_account", str), wrong_subdomain, "service_account")
    identity = make_id(trust_domain, namespace, service_account)
    if proxy_hash(identity) != topic.proxy_hash:
        raise RecordError(f"{identity} does not belong on this topic: its proxy hash is another")
    addresses = fields.addresses("addresses")
    if not addresses:
        raise RecordError("addresses is empty")
    return Workload(
        namespace=namespace,
        name=topic.instance,
        service_account=service_account,
        identity=identity,
        addresses=addresses,
        labels=fields.labels("labels"),
        ports={name: read_port(port, f"ports.{name}") for name, port in fields.take("ports", dict).items()},
        node=fields.take("node", str),
        weight=fields.number("weight", 1, MAX_WEIGHT),
        bounds=_read_bounds(fields, trust_domain),
        direct=read_flag(fields, "direct"),
        plaintext=_read_plaintext(fields),
        proxy_protocol=_read_proxy_protocol(fields),
        locality=_read_locality(fields),
        sidecar=_read_sidecar(fields),
    )


def _read_sidecar(fields: Fields) -> Sidecar | None:
    if not fields.has("sidecar"):
        return None
    match fields.take("sidecar", list):
        case [gateway, list(ports)]:
            found = Sidecar(read_key(gateway, "sidecar"), tuple(number_in(port, 0, 65535, "sidecar") for port in ports))
            check_ordered(found.ports, "sidecar")
            return found
    raise RecordError("sidecar must be [key of a Gateway, [ports]]")


def _write_bound(bound: Bound) -> list[Value]:
    # Said only where it is so, so that all other records are those of before there was this.
    rest: list[Value] = [True] if bound.guarded else []
    if bound.processes:
        processes: list[Value] = [[str(one.identity), *one.addresses] for one in bound.processes]
        rest = [bound.guarded, processes]
    return [bound.port, list(bound.gateways), [str(identity) for identity in bound.exempt], bound.enforced, *rest]


def _read_bounds(fields: Fields, trust_domain: TrustDomain) -> tuple[Bound, ...]:
    def read_bound(value: Value, name: str) -> Bound:
        match value:
            case [port, gateways, exempt, enforced, *rest] if (
                not rest or len(rest) == 2 or (rest[0] is True and len(rest) == 1)
            ):
                found = Bound(
                    port=number_in(port, 0, 65535, name),
                    gateways=tuple(read_key(item, name) for item in typed(gateways, list, name)),
                    exempt=tuple(
                        read_any_identity(typed(item, str, name), trust_domain) for item in typed(exempt, list, name)
                    ),
                    enforced=typed(enforced, bool, name),
                    guarded=bool(rest) and typed(rest[0], bool, name),
                    processes=_read_processes(rest[1], name, trust_domain) if len(rest) == 2 else (),
                )
                check_ordered(found.gateways, name)
                check_ordered(found.exempt, name)
                return found
        raise RecordError(
            f"{name}: each must be [port, [gateways], [exempt identities], enforced], or with true behind it, or with "
            "true or false and [[identity, addresses...]]"
        )

    bounds = fields.optional_list("bounds", read_bound)
    check_ordered([bound.port for bound in bounds], "bounds")
    return bounds


def _read_processes(value: Value, name: str, trust_domain: TrustDomain) -> tuple[Process, ...]:
    found: list[Process] = []
    for item in typed(value, list, name):
        match item:
            case [identity, _, *_]:
                addresses = tuple(read_address(address, name) for address in item[1:])
                check_distinct(addresses, name)
                found.append(Process(read_any_identity(typed(identity, str, name), trust_domain), addresses))
            case _:
                raise RecordError(f"{name}: each process must be [identity, addresses...]")
    if not found:
        raise RecordError(f"{name}: processes are empty; they must then be absent")
    check_ordered([(one.identity, one.addresses) for one in found], name)
    return tuple(found)


def _write_plaintext(plaintext: Plaintext) -> list[Value]:
    return [plaintext.others, list(plaintext.ports)]


def _read_plaintext(fields: Fields) -> Plaintext | None:
    if not fields.has("plaintext"):
        return None
    match fields.take("plaintext", list):
        case [bool(others), list(ports)] if others or ports:
            found = Plaintext(others, tuple(read_port(port, "plaintext") for port in ports))
            check_ordered(found.ports, "plaintext")
            if len(found.ports) > MAX_PORTS:
                raise RecordError(f"plaintext has {len(found.ports)} ports; at most {MAX_PORTS}")
            return found
    raise RecordError("plaintext must be [true, [ports that take none]] or [false, [ports that take it]]")


def _read_proxy_protocol(fields: Fields) -> tuple[int, ...]:
    ports = fields.optional_list("proxyProtocol", read_port)
    check_ordered(ports, "proxyProtocol")
    return ports


def _read_locality(fields: Fields) -> str:
    return checked(fields.take("locality", str), wrong_locality, "locality") if fields.has("locality") else ""


def _read_revocations(topic: RevocationsTopic, fields: Fields) -> Revocations:
    lists = tuple(typed(item, bytes, "lists") for item in fields.take("lists", list))
    if not 1 <= len(lists) <= MAX_LISTS:
        raise RecordError(f"lists has {len(lists)}; it must have from 1 to {MAX_LISTS}")
    return Revocations(topic.namespace, lists)


def _name_in(of_namespace: str) -> str:
    """The name in a key whose namespace the topic says."""
    return of_namespace.partition("/")[2]


def _write_instance(gateway: Gateway, instance: Instance) -> Value:
    named: list[Value] = [_name_in(instance.workload), instance.address]
    if gateway.placement is Placement.REMOTE:
        return named
    return [*named, instance.account, instance.node, list(instance.others)]


def _read_instance(value: Value, namespace: str, placement: Placement) -> Instance:
    match value:
        case [name, address, *rest] if len(rest) == (0 if placement is Placement.REMOTE else 3):
            name = checked(typed(name, str, "instances"), wrong_subdomain, "instances")
            found = Instance(key(namespace, name), read_address(address, "instances"))
            if not rest:
                return found
            account = typed(rest[0], str, "instances")
            if placement is Placement.SERVICE_ACCOUNT:
                checked(account, wrong_subdomain, "instances")
            elif account:
                raise RecordError("instances: only of placement service-account has each an account of its own")
            others = tuple(read_address(other, "instances") for other in typed(rest[2], list, "instances"))
            check_distinct((found.address, *others), "instances")
            return replace(found, account=account, node=_read_node(rest[1]), others=others)
    raise RecordError(
        "instances: each must be [name of a workload, address], and with another placement than remote "
        "[..., account, node, [further addresses]]"
    )


def _read_placement(fields: Fields) -> Placement:
    if not fields.has("placement"):
        return Placement.REMOTE
    placement = read_member(fields.take("placement", str), Placement, "placement")
    if placement is Placement.REMOTE:
        raise RecordError("placement is remote; it must then be absent")
    return placement


def _read_gateway(topic: GatewayTopic, fields: Fields) -> Gateway:
    placement = _read_placement(fields)
    gateway = Gateway(
        namespace=topic.namespace,
        name=topic.name,
        traffic=read_member(fields.take("traffic", str), Traffic, "traffic"),
        instances=tuple(_read_instance(item, topic.namespace, placement) for item in fields.take("instances", list)),
        services=tuple(read_key(item, "services", wrong_service_name) for item in fields.take("services", list)),
        workloads=tuple(read_key(item, "workloads") for item in fields.take("workloads", list)),
        trusted_proxies=(
            fields.number("trustedProxies", 1, MAX_TRUSTED_PROXIES) if fields.has("trustedProxies") else 0
        ),
        placement=placement,
        engine=_read_engine(fields),
    )
    check_ordered([instance.workload for instance in gateway.instances], "instances")
    check_ordered(gateway.services, "services")
    check_ordered(gateway.workloads, "workloads")
    return gateway


def _read_engine(fields: Fields) -> Engine:
    if not fields.has("engine"):
        return Engine.BUILT_IN
    engine = read_member(fields.take("engine", str), Engine, "engine")
    if engine is Engine.BUILT_IN:
        raise RecordError("engine: is not said of a waypoint that has the built-in one")
    return engine


def _write_rule(rule: Rule) -> Body:
    body: Body = {}
    if rule.sources:
        body["sources"] = [
            _present(
                principals=source.principals,
                not_principals=source.not_principals,
                namespaces=source.namespaces,
                not_namespaces=source.not_namespaces,
                ip_blocks=source.ip_blocks,
                not_ip_blocks=source.not_ip_blocks,
                request_principals=source.request_principals,
                not_request_principals=source.not_request_principals,
                remote_ip_blocks=source.remote_ip_blocks,
                not_remote_ip_blocks=source.not_remote_ip_blocks,
            )
            for source in rule.sources
        ]
    if rule.operations:
        body["operations"] = [
            _present(
                ports=operation.ports,
                not_ports=operation.not_ports,
                hosts=operation.hosts,
                not_hosts=operation.not_hosts,
                methods=operation.methods,
                not_methods=operation.not_methods,
                paths=operation.paths,
                not_paths=operation.not_paths,
            )
            for operation in rule.operations
        ]
    if rule.conditions:
        body["conditions"] = [
            {
                "key": c.key.value,
                **({"name": c.name} if c.name else {}),
                **_present(values=c.values, not_values=c.not_values),
            }
            for c in rule.conditions
        ]
    return body


def _present(**lists: tuple[str, ...] | tuple[int, ...]) -> Body:
    return {name: list(items) for name, items in lists.items() if items}


def _write_authorizer(authorizer: ExternalAuthorization) -> Body:
    from control.api.extension_record import write_external_authorization

    return write_external_authorization(authorizer)


def _read_authorizer(fields: Fields) -> ExternalAuthorization:
    from control.api.extension_record import read_external_authorization

    return read_external_authorization(fields.take("authorizer", dict), "authorizer")


def _read_policy(topic: PolicyTopic, fields: Fields) -> AuthorizationPolicy:
    policy = AuthorizationPolicy(
        namespace=topic.namespace,
        name=topic.name,
        action=read_member(fields.take("action", str), Action, "action"),
        selector=fields.selector("selector"),
        rules=tuple(_read_rule(item) for item in fields.take("rules", list)),
        targets=fields.optional_list("targets", lambda value, name: read_target(value, name, topic.namespace)),
        dry_run=read_flag(fields, "dryRun"),
        authorizer=_read_authorizer(fields) if fields.has("authorizer") else None,
    )
    check_ordered([(target.kind, target.key) for target in policy.targets], "targets")
    if policy.targets and policy.selector is not None:
        raise RecordError("selector cannot stand beside targets")
    if policy.asks_http and not policy.targets:
        raise RecordError("rules ask for what only a waypoint sees, and there are no targets")
    if policy.authorizer is not None and not (policy.targets and policy.action is Action.CUSTOM):
        raise RecordError("an authorizer belongs to CUSTOM and targets, and to nothing else")
    return policy


def _read_rule(value: Value) -> Rule:
    fields = Fields(value, "rules")
    rule = Rule(
        sources=fields.optional_list("sources", _read_source),
        operations=fields.optional_list("operations", _read_operation),
        conditions=fields.optional_list("conditions", _read_condition),
    )
    fields.finish()
    return rule


def _read_source(value: Value, name: str) -> Source:
    fields = Fields(value, name)
    source = Source(
        principals=fields.optional_list("principals", _canonical(canonical_principal)),
        not_principals=fields.optional_list("not_principals", _canonical(canonical_principal)),
        namespaces=fields.optional_list("namespaces", _canonical(canonical_namespace)),
        not_namespaces=fields.optional_list("not_namespaces", _canonical(canonical_namespace)),
        ip_blocks=fields.optional_list("ip_blocks", _block),
        not_ip_blocks=fields.optional_list("not_ip_blocks", _block),
        request_principals=fields.optional_list("request_principals", _canonical(canonical_claim)),
        not_request_principals=fields.optional_list("not_request_principals", _canonical(canonical_claim)),
        remote_ip_blocks=fields.optional_list("remote_ip_blocks", _block),
        not_remote_ip_blocks=fields.optional_list("not_remote_ip_blocks", _block),
    )
    fields.finish()
    return source


def _read_operation(value: Value, name: str) -> Operation:
    fields = Fields(value, name)
    operation = Operation(
        ports=fields.optional_list("ports", read_port),
        not_ports=fields.optional_list("not_ports", read_port),
        hosts=fields.optional_list("hosts", _canonical(canonical_host)),
        not_hosts=fields.optional_list("not_hosts", _canonical(canonical_host)),
        methods=fields.optional_list("methods", _canonical(canonical_method)),
        not_methods=fields.optional_list("not_methods", _canonical(canonical_method)),
        paths=fields.optional_list("paths", _canonical(canonical_path)),
        not_paths=fields.optional_list("not_paths", _canonical(canonical_path)),
    )
    fields.finish()
    return operation


def _read_condition(value: Value, name: str) -> Condition:
    fields = Fields(value, name)
    condition_key = read_member(fields.take("key", str), ConditionKey, "key")
    name = ""
    if condition_key in NAMED:
        name = checked(fields.take("name", str), lambda text: wrong_condition_name(condition_key, text), "name")
    check = _canonical(lambda value_text: canonical_value(condition_key, value_text))
    condition = Condition(
        condition_key,
        values=fields.optional_list("values", check),
        not_values=fields.optional_list("not_values", check),
        name=name,
    )
    if not condition.values and not condition.not_values:
        raise RecordError("a condition has neither values nor not_values")
    fields.finish()
    return condition
