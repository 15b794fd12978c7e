"""Why a connection or request of the mesh gets through, or does not: each decision in turn, by the code that takes it.

capture -> resolve -> binding -> (policy at the waypoint -> route ->) admission at each destination. It is the answer of
the configuration: whether processes run and applications listen is not asked. `meshctl why` shows it.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from control.api.address import FORBIDDEN_PORTS, AddressError, IpAddress, parse_address
from control.api.bindings import Subject
from control.api.gateway import Placement, Via
from control.api.identity import SpiffeId
from control.api.route import RouteRule
from control.api.workload import Workload, key
from control.client.state import State
from uproxy.admission import CALLER, Admission
from uproxy.errors import RefusedError
from uproxy.header_block import Headers
from uproxy.listener import Asked
from uproxy.rehearsal import difference
from uproxy.resolve import Plan, Resolver, host_port
from uproxy.rules import Decision
from waypoint import http1_head
from waypoint.authz import Check
from waypoint.balancers import said_of
from waypoint.destination import Destination, Destinations
from waypoint.messages import Fields, MessageError, RequestHead
from waypoint.request import Request, RequestError, read_request
from waypoint.rewriting import location
from waypoint.rules import rules_at
from waypoint.tokens import Token, TokenError
from waypoint.traffic import Ledger

_NONE: Final[Mapping[Subject, str]] = MappingProxyType({})

_Backend = tuple[str, int, int]
"""Key of a service, its port, weight."""


class QuestionError(ValueError):
    """A question about what is not in the configuration; says what is."""


@dataclass(frozen=True, slots=True)
class Question:
    """Who asks for what. The rest of a request is looked at where there is HTTP and a waypoint."""

    caller: str
    """Key of a workload."""
    host: str
    """An address, a name of a service, or the key of a workload."""
    port: int
    method: str = "GET"
    target: str = "/"
    fields: Fields = field(default=())
    """Without `Host`, it is what was dialled."""


@dataclass(frozen=True, slots=True)
class Step:
    """One decision."""

    stage: str
    ok: bool
    detail: str
    reason: str = ""
    """Machine readable, where it is refused: as in logs and headers."""


def explain(state: State, question: Question, under_way: Mapping[Subject, str] = _NONE) -> tuple[Step, ...]:
    """The chain of decisions. It ends with the first refusal, but for destinations, which are all asked.

    `under_way`: how far each binding to a waypoint is, in words, as far as it is known. Raises QuestionError.
    """
    caller = state.workload(question.caller)
    if caller is None:
        raise QuestionError(f"no workload {question.caller}")
    address = _address(state, question, caller.namespace)
    return tuple(_steps(state, question, caller, address, under_way))


def _address(state: State, question: Question, namespace: str) -> IpAddress:
    """What the caller's application dials. Raises QuestionError."""
    try:
        return parse_address(question.host)
    except AddressError:
        pass
    name = question.host if "." in question.host else f"{question.host}.{namespace}"
    service = state.service_named(name)
    if service is not None and service.vips:
        return service.vips[0]
    workload = state.workload(question.host if "/" in question.host else key(namespace, question.host))
    if workload is not None:
        return workload.addresses[0]
    if service is not None:
        raise QuestionError(f"service {service.key} has no address of its own; name one of its workloads")
    raise QuestionError(f"{question.host!r} is no service, workload or address of the mesh (seen from {namespace})")


def _steps(
    state: State, question: Question, caller: Workload, address: IpAddress, under_way: Mapping[Subject, str]
) -> Iterator[Step]:
    dialled = host_port(address, question.port)
    if state.workload_at(address) is None and not any(address in service.vips for service in state.services()):
        detail = f"{dialled} is nobody's address: refused inside the mesh's address ranges, left alone outside them"
        yield Step("capture", False, detail, "no-config")
        return
    yield Step("capture", True, f"{caller.key} ({caller.identity}) dials {dialled}; its uProxy takes the connection")
    resolver = Resolver(state, random.Random(), caller=caller.key)
    try:
        plan = resolver.plan(address, question.port)
    except RefusedError as error:
        stage = "binding" if state.binding_at(address, question.port) is not None else "resolve"
        yield Step(stage, False, error.detail, error.reason)
        return
    what = f"service {plan.service.key}" if plan.service is not None else f"workload {_name(state, address)}"
    yield Step("resolve", True, f"{dialled} is port {question.port} of {what}")
    subject: Subject = ("Service", plan.service.key) if plan.service else ("WorkloadEntry", _name(state, address))
    how_far = f"; {under_way[subject]}" if subject in under_way else ""
    gateway = state.gateway(plan.gateway) if plan.gateway else None
    if gateway is not None and any(hop.address == one.address for hop in plan.hops for one in gateway.instances):
        instances = ", ".join(instance.workload for instance in gateway.instances)
        if gateway.placement is not Placement.REMOTE:
            instances += f" (placement {gateway.placement.value}: the one before the endpoint)"
        binding = state.binding_at(address, question.port)
        passed = " (directly while none answers)" if binding is not None and binding.via is Via.PREFERRED else ""
        if binding is not None and binding.canary:
            whose = "one" if plan.gateway == binding.canary else "none"
            passed += (
                f"; {caller.key} is {whose} of the {binding.percent} % of callers whose waypoint is {binding.canary}"
            )
        yield Step("binding", True, f"through waypoint {plan.gateway}, run by {instances}{passed}{how_far}")
        yield from _through(state, question, caller, plan)
        return
    none_runs = f"waypoint {plan.gateway} is optional, and no process of it runs: " if plan.gateway else ""
    yield Step("binding", True, f"{none_runs}directly, with mTLS from instance to instance{how_far}")
    for place in _places(state, plan):
        admitted = _admitted(state, place, caller.identity, caller.addresses[0], ())
        yield admitted
        workload = state.workload(place.workload)
        if admitted.ok and workload is not None:
            yield from _beside(state, question, caller, plan, workload, place)


def _beside(
    state: State, question: Question, caller: Workload, plan: Plan, workload: Workload, place: _Place
) -> Iterator[Step]:
    """What the waypoint's process beside a workload decides, if one is."""
    goes, _ = Admission(workload, (), state.trust_domain).goes_beside(caller.identity, place.port)
    if not goes or workload.sidecar is None:
        return
    gateway = workload.sidecar.gateway
    detail = f"{place.workload} has the process of waypoint {gateway} beside it (placement sidecar)"
    yield Step("beside", True, detail)
    name = plan.service.hostname if plan.service is not None else ""
    asked = Destinations(state, gateway, own=workload.key).dialled(place.address, place.port, name)
    yield from _decided(state, question, caller, plan, gateway, asked)


def _through(state: State, question: Question, caller: Workload, plan: Plan) -> Iterator[Step]:
    """What the waypoint decides, and then the destinations it may choose."""
    asked = Asked(host_port(plan.address, plan.port), plan.address, plan.port)
    decided = yield from _decided(state, question, caller, plan, plan.gateway, asked)
    if decided is None:
        return
    destination, backends = decided
    if destination.backend is None:
        yield from _balancing(state, plan.gateway, dict.fromkeys(service for service, _, _ in backends))
    places = list(_behind(state, destination, backends))
    if not places and backends:
        yield Step("destination", False, "no backend has a ready endpoint", "no-endpoint")
    said = f"{caller.identity};{host_port(caller.addresses[0], 0)}"
    gateway = state.gateway(plan.gateway)
    assert gateway is not None  # the plan leads to one of its instances
    for place in places:
        workload = state.workload(place.workload)
        serving = gateway.before(workload.node, workload.service_account) if workload is not None else ()
        process = (serving or gateway.instances)[0]
        waypoint = gateway.identity_of(state.trust_domain, process)
        yield _admitted(state, place, waypoint, process.address, ((CALLER, said.encode()),))


def _decided(
    state: State, question: Question, caller: Workload, plan: Plan, gateway: str, what: Asked
) -> Generator[Step, None, tuple[Destination, list[_Backend]] | None]:
    """What a waypoint's process decides; returns where it may go on to, None when it refuses."""
    request: Request | None = None
    try:
        destination = Destinations(state, gateway).find(what)
        if destination.http or destination.undeclared:  # asked as a request, whatever it will begin with
            head = _head(question, plan)
            request = read_request(head.method, head.target, head.fields)
    except RefusedError as error:
        yield Step("waypoint", False, error.detail, error.reason)
        return None
    except MessageError as error:
        yield Step("waypoint", False, f"{error.status}: {error}", "bad-request")
        return None
    except RequestError as error:
        yield Step("waypoint", False, f"400: {error}", "bad-request")
        return None
    asked = f"{request.method} {request.target}" if request is not None else "opaque TCP"
    rules = rules_at(state, gateway, destination, Ledger())
    token: Token | None = None
    if request is not None:
        try:
            token, request = rules.tokens.verify(request)
        except TokenError as error:
            yield Step("waypoint token", False, f"{asked}: {error}", "token")
            return None
    who = caller.identity, caller.addresses[0], plan.address, plan.port
    for check in rules.policies.checks(*who, request, token) if request is not None else ():
        step = _check(check, asked)
        yield step
        if not step.ok:
            return None
    facts = (*who, request, token)
    decision, rehearsal = rules.policies.decide(*facts), rules.policies.rehearsal
    would = None if rehearsal is None else rehearsal.decide(*facts)
    said = f"{asked}: {decision.reason}{_rehearsed(decision, would)}"
    yield Step("waypoint policy", decision.allowed, said, "" if decision.allowed else "policy")
    if not decision.allowed:
        return None
    backends: list[_Backend] = [(destination.service_key, destination.port, 1)]
    if request is not None and destination.backend is None:
        rule = rules.router.route(request, caller.identity.namespace)
        step, backends = _route(rule, request, plan.port)
        yield step
    return destination, backends


def _check(check: Check, asked: str) -> Step:
    """Who else decides: what that would say, nobody knows here."""
    stage = "waypoint external authorization"
    if check.authorizer is None:
        refused = f"{asked}: {check.rule} names no Extension that is there, so nobody can be asked"
        return Step(stage, False, refused, "policy")
    place = f"{check.authorizer.service}:{check.authorizer.port}"
    return Step(stage, True, f"{asked}: by {check.rule} Service {place} is asked, and must answer 200")


def _head(question: Question, plan: Plan) -> RequestHead:
    """As an application would send it, and as the waypoint reads it. Raises MessageError."""
    fields = question.fields
    if not any(name == b"host" for name, _ in fields):
        address = f"[{plan.address}]" if ":" in plan.address else plan.address
        named = not any(character in question.host for character in "/:")
        fields = ((b"host", (question.host if named else address).encode()), *fields)
    lines = [f"{question.method} {question.target} HTTP/1.1".encode(), *(b"%b: %b" % field for field in fields)]
    head = b"".join(line + b"\r\n" for line in (*lines, b""))
    if head.count(b"\r\n") != len(lines) + 1:
        raise MessageError(400, "a line end within the request line or a field")
    return http1_head.read_request(head, b"")


def _route(rule: RouteRule | None, request: Request, port: int) -> tuple[Step, list[_Backend]]:
    """The step, and the key, port and weight of each backend that gets any requests."""
    asked = f"{request.method} {request.target}"
    if rule is None:
        return Step("route", False, f"{asked}: 404, there are routes and no rule of them matches", "no-route"), []
    name = f"rule {rule.name}" if rule.name else "to"
    if rule.filters.redirect is not None:
        where = location(rule.filters.redirect, rule, request, port)
        return Step("route", True, f"{asked}: {name} {rule.filters.redirect.status} {where}"), []
    chosen = [backend for backend in rule.backends if backend.weight]
    backends = [(backend.service, backend.port, backend.weight) for backend in chosen if not backend.refused]
    if chosen and not backends:
        refused = f"{asked}: 500, no ReferenceGrant lets {'it' if name == 'to' else name} send to {chosen[0].service}"
        return Step("route", False, refused, "no-backend"), []
    if not backends:
        return Step("route", False, f"{asked}: 500, the rule that matches has no backend", "no-backend"), []
    total = sum(weight for _, _, weight in backends)
    shares = ", ".join(f"{service}:{port} ({100 * weight / total:.4g} %)" for service, port, weight in backends)
    return Step("route", True, f"{asked}: {name} {shares}"), backends


def _balancing(state: State, gateway: str, services: Iterable[str]) -> Iterator[Step]:
    """Where something says how endpoints are chosen. Which are ejected, each process knows for itself."""
    for service in filter(None, map(state.service, services)):
        said, detection = said_of(state, gateway, service)
        if said is None and detection is None:
            continue
        how = "at random" if said is None else said.algorithm.value
        if said is not None and said.hash is not None:
            how = f"by {' '.join(filter(None, (said.hash.of.value, said.hash.name)))}"
        nearest = ", the nearest first" if said is not None and said.local else ""
        failing = ", without those that fail" if detection is not None else ""
        yield Step("balancing", True, f"{service.key}: {how}{nearest}{failing}")


@dataclass(frozen=True, slots=True)
class _Place:
    """A workload's port that the connection may end at."""

    workload: str
    address: IpAddress
    port: int


def _behind(state: State, destination: Destination, backends: Iterable[_Backend]) -> Iterator[_Place]:
    if destination.backend is not None:
        yield _Place(_name(state, destination.address), destination.address, destination.dialled_port)
        return
    for service, port, _ in backends:
        yield from _ready(state, service, port)


def _places(state: State, plan: Plan) -> Iterator[_Place]:
    """Where a direct connection may end."""
    if plan.service is not None:
        yield from _ready(state, plan.service.key, plan.port)
    else:
        yield _Place(_name(state, plan.address), plan.address, plan.port)


def _ready(state: State, service: str, port: int) -> Iterator[_Place]:
    for endpoint in sorted(state.endpoints(service), key=lambda endpoint: endpoint.workload):
        if endpoint.ready and endpoint.weight > 0 and port in endpoint.ports:
            yield _Place(endpoint.workload, endpoint.address, endpoint.ports[port])


def _admitted(state: State, place: _Place, peer: SpiffeId, peer_address: IpAddress, headers: Headers) -> Step:
    """What its uProxy says to a stream from this peer. The address of its waypoint may be another's."""
    where = f"{place.workload} ({host_port(place.address, place.port)})"
    if place.port in FORBIDDEN_PORTS:
        return Step("destination", False, f"{where}: the port belongs to the proxy", "port-forbidden")
    workload = state.workload(place.workload)
    policies = state.policies_for(workload) if workload is not None else ()
    admission = Admission(workload, policies, state.trust_domain)
    try:
        passage = admission.enter(peer, place.port, headers, peer_address)
    except RefusedError as error:
        return Step("destination", False, f"{where}: {error.detail}", error.reason)
    facts = peer, peer_address, passage, place.address, place.port
    decision, rehearsal = admission.decide(*facts), admission.rehearsal
    would = None if rehearsal is None else rehearsal.decide(*facts)
    said = f"{where}: {decision.reason}{_rehearsed(decision, would)}"
    return Step("destination", decision.allowed, said, "" if decision.allowed else "policy")


def _rehearsed(decision: Decision, would: Decision | None) -> str:
    """What policies in dry run would change, as the end of a sentence."""
    other = difference(decision, would) if would is not None else ""
    return f"; with policies in dry run it would be {other}" if other else ""


def _name(state: State, address: IpAddress) -> str:
    workload = state.workload_at(address)
    return workload.key if workload is not None else address
