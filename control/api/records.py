"""Services, endpoints, workloads and policies as message bodies, and back: `read(topic, write(x)) == x`.

What the topic says (namespace, name) is not repeated in the body, so the two cannot disagree. Reading is strict:
every field must be there, none may be added, and every value must be in its canonical form.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final

from control.api.address import AddressError, IpBlock, parse_block
from control.api.fields import (
    Fields,
    check_distinct,
    checked,
    read_address,
    read_identity,
    read_port,
    typed,
)
from control.api.fields import RecordError as RecordError  # what `read` raises
from control.api.identity import SpiffeId, TrustDomain, make_id, proxy_hash
from control.api.messages import Body, Value
from control.api.names import wrong_dns_label, wrong_subdomain
from control.api.policy import (
    Action,
    AuthorizationPolicy,
    Condition,
    ConditionKey,
    Operation,
    Rule,
    Source,
    canonical_namespace,
    canonical_principal,
    canonical_value,
)
from control.api.topics import EndpointTopic, PolicyTopic, RecordTopic, ServiceTopic, WorkloadTopic
from control.api.workload import Endpoint, Service, ServicePort, Workload, key

Record = Service | Endpoint | Workload | AuthorizationPolicy

MAX_WEIGHT: Final = 65_535


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


def write(record: Record) -> Body:
    """The body of a record."""
    match record:
        case Service():
            return {
                "vips": list(record.vips),
                "ports": [[p.name, p.port, p.target_port, p.app_protocol] for p in record.ports],
                "labels": dict(record.labels),
                "identities": [str(identity) for identity in record.identities],
            }
        case Endpoint():
            return {
                "address": record.address,
                "identity": str(record.identity),
                "ports": [[port, target] for port, target in record.ports.items()],
                "weight": record.weight,
                "ready": record.ready,
                "labels": dict(record.labels),
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
            }
        case AuthorizationPolicy():
            return {
                "action": record.action.value,
                "selector": None if record.selector is None else dict(record.selector),
                "rules": [_write_rule(rule) for rule in record.rules],
            }


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
    )


def _read_identities(values: list[Value], trust_domain: TrustDomain, namespace: str) -> tuple[SpiffeId, ...]:
    found = [read_identity(typed(value, str, "identities"), trust_domain, namespace) for value in values]
    if any(first >= second for first, second in itertools.pairwise(found)):
        raise RecordError("identities must be in order, each once")
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
    )


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
    )


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
            )
            for source in rule.sources
        ]
    if rule.operations:
        body["operations"] = [
            _present(ports=operation.ports, not_ports=operation.not_ports) for operation in rule.operations
        ]
    if rule.conditions:
        body["conditions"] = [
            {"key": c.key.value, **_present(values=c.values, not_values=c.not_values)} for c in rule.conditions
        ]
    return body


def _present(**lists: tuple[str, ...] | tuple[int, ...]) -> Body:
    return {name: list(items) for name, items in lists.items() if items}


def _read_policy(topic: PolicyTopic, fields: Fields) -> AuthorizationPolicy:
    action = fields.take("action", str)
    if action not in Action.__members__:
        raise RecordError(f"action is {action[:40]!r}; it must be ALLOW or DENY")
    return AuthorizationPolicy(
        namespace=topic.namespace,
        name=topic.name,
        action=Action(action),
        selector=fields.selector("selector"),
        rules=tuple(_read_rule(item) for item in fields.take("rules", list)),
    )


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
    )
    fields.finish()
    return source


def _read_operation(value: Value, name: str) -> Operation:
    fields = Fields(value, name)
    operation = Operation(
        ports=fields.optional_list("ports", read_port), not_ports=fields.optional_list("not_ports", read_port)
    )
    fields.finish()
    return operation


def _read_condition(value: Value, name: str) -> Condition:
    fields = Fields(value, name)
    text = fields.take("key", str)
    if text not in {key.value for key in ConditionKey}:
        raise RecordError(f"key {text[:40]!r} is none that an L4 proxy knows")
    condition_key = ConditionKey(text)
    check = _canonical(lambda value_text: canonical_value(condition_key, value_text))
    condition = Condition(
        condition_key,
        values=fields.optional_list("values", check),
        not_values=fields.optional_list("not_values", check),
    )
    if not condition.values and not condition.not_values:
        raise RecordError("a condition has neither values nor not_values")
    fields.finish()
    return condition
