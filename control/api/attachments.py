"""Whether policies and routes hang on something that takes them. Part of `mesh`.

A route to what is not there is an error: somebody's requests would fail. What is attached to something that no waypoint
serves does nothing, which is a warning. So is a backend that is not told who calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from control.api import labels as label
from control.api.bindings import Subject, Wish
from control.api.declared import (
    DeclaredExtension,
    DeclaredGateway,
    DeclaredGrant,
    DeclaredPolicy,
    DeclaredRequestAuthentication,
    DeclaredRoute,
    DeclaredService,
    DeclaredTraffic,
)
from control.api.extension import ExternalAuthorization, Filter, PythonFilter
from control.api.filters import Filters, Mirror
from control.api.names import key, wrong_subdomain
from control.api.policy import Action, AuthorizationPolicy, Target
from control.api.problems import Findings
from control.api.route import Backend, HTTPRoute, Match, Parent, RouteRule
from control.api.traffic import Redis, TrafficPolicy

_UNBOUND = f"is bound to no waypoint; label it {label.USE_WAYPOINT}"


def check_targets(
    policies: Sequence[DeclaredPolicy | DeclaredRequestAuthentication | DeclaredTraffic],
    services: Sequence[DeclaredService],
    gateways: Sequence[DeclaredGateway],
    wishes: Mapping[Subject, Wish],
    findings: Findings,
) -> None:
    """Warns of policies that hold nowhere, or for nothing but L4 on a port that is not HTTP."""
    if not any(item.targets for item in policies):
        return
    known = {"Service": {one.key for one in services}, "Gateway": {one.key for one in gateways}}
    by_key = {one.key: one for one in services}
    for item in policies:
        for index, target in enumerate(item.targets):
            path = f"spec.targetRefs[{index}]" if len(item.targets) == 1 else "spec.targetRefs"
            if target.key not in known[target.kind]:
                problem = f"there is no {target.kind} {target.key}; until there is, this does nothing"
                findings.warn(item.position, path, problem, (target.key, known[target.kind]))
            elif target.kind == "Service" and ("Service", target.key) not in wishes:
                problem = f"nobody enforces this: Service {target.key} {_UNBOUND}"
                findings.warn(item.position, path, problem)
            elif target.kind == "Service" and isinstance(item, DeclaredPolicy) and item.policy.asks_http:
                opaque = [str(port.port) for port in by_key[target.key].ports if port.is_opaque]
                if opaque:
                    problem = (
                        f"asks for what HTTP says, and Service {target.key} has ports that are not HTTP: "
                        f"{', '.join(opaque)}. There an ALLOW does not match, and a DENY as if it did not ask"
                    )
                    findings.warn(item.position, path, problem)


def with_authorizers(
    policies: Sequence[DeclaredPolicy], extensions: Sequence[DeclaredExtension], root_namespace: str, findings: Findings
) -> list[AuthorizationPolicy]:
    """With who is asked, by Extensions of a policy's own namespace or else of the root namespace.

    Warns of CUSTOM policies about which nobody can be: what they match is refused.
    """
    by_key = {one.key: one.content for one in extensions if isinstance(one.content, ExternalAuthorization)}
    found: list[AuthorizationPolicy] = []
    for item in policies:
        policy = item.policy
        if policy.action is Action.CUSTOM and not policy.targets:
            problem = "a uProxy cannot ask anybody: what this matches is refused. Write targetRefs, for a waypoint"
            findings.warn(item.position, "spec.action", problem)
        elif policy.action is Action.CUSTOM:
            places = [key(namespace, item.provider) for namespace in (policy.namespace, root_namespace)]
            authorizer = next((by_key[place] for place in places if place in by_key), None)
            policy = replace(policy, authorizer=authorizer)
            if authorizer is None:
                problem = (
                    f"there is no Extension {' or '.join(dict.fromkeys(places))} of type ExternalAuthorization; until "
                    "there is, what this matches is refused"
                )
                findings.warn(item.position, "spec.provider.name", problem, (places[0], by_key))
        found.append(policy)
    return found


def with_filters(
    policies: Sequence[DeclaredTraffic],
    extensions: Sequence[DeclaredExtension],
    root_namespace: str,
    findings: Findings,
) -> list[TrafficPolicy]:
    """Likewise, with the filters that TrafficPolicies name. One that is not there refuses requests."""
    by_key = {one.key: one.content for one in extensions if isinstance(one.content, Filter)}
    found: list[TrafficPolicy] = []
    for item in policies:
        filters: list[Filter] = []
        for name in item.extensions:
            places = [key(namespace, name) for namespace in (item.traffic.namespace, root_namespace)]
            there = next((by_key[place] for place in places if place in by_key), None)
            filters.append(there or PythonFilter(places[0]))
            if there is None:
                problem = (
                    f"there is no Extension {' or '.join(dict.fromkeys(places))} of type PythonFilter, Lua or Wasm; "
                    "until there is, requests are refused"
                )
                findings.warn(item.position, "spec.extensions", problem, (places[0], by_key))
        found.append(replace(item.traffic, filters=tuple(filters)))
    return found


def check_asked(
    extensions: Sequence[DeclaredExtension],
    policies: Sequence[DeclaredTraffic],
    services: Sequence[DeclaredService],
    wishes: Mapping[Subject, Wish],
    findings: Findings,
) -> None:
    """Warns of services that cannot be asked."""
    by_key = {one.key: one for one in services}
    asked: list[tuple[DeclaredExtension | DeclaredTraffic, str, ExternalAuthorization | Redis]] = [
        (one, "spec.externalAuthorization", one.content)
        for one in extensions
        if isinstance(one.content, ExternalAuthorization)
    ]
    asked += ((one, "spec.redis", one.traffic.redis) for one in policies if one.traffic.redis is not None)
    for item, path, whom in asked:
        service, port = by_key.get(whom.service), whom.port
        wish = wishes.get(("Service", whom.service))
        if service is None:
            problem = f"there is no Service {whom.service}; until there is, nobody can be asked"
            findings.warn(item.position, f"{path}.service", problem, (whom.service, by_key))
        elif all(one.port != port for one in service.ports):
            known = ", ".join(str(one.port) for one in service.ports) or "none"
            problem = f"Service {service.key} has no port {port}, and so nobody can be asked; its ports: {known}"
            findings.warn(item.position, f"{path}.port", problem)
        elif wish is not None:
            problem = (
                f"Service {service.key} is bound to waypoint {wish.gateway}, and no other waypoint can ask it; label "
                f"it {label.USE_WAYPOINT}: none"
            )
            findings.warn(item.position, f"{path}.service", problem)


def check_balancing(policies: Sequence[DeclaredTraffic], findings: Findings) -> None:
    """Warns of what is said a second time of how a target's endpoints are chosen; `policies` in the order of keys."""
    first: dict[tuple[str, Target], str] = {}
    for item in policies:
        for said, field in (
            (item.traffic.load_balancing, "loadBalancing"),
            (item.traffic.outlier_detection, "outlierDetection"),
        ):
            for target in item.targets if said is not None else ():
                other = first.setdefault((field, target), item.traffic.key)
                if other != item.traffic.key:
                    problem = (
                        f"TrafficPolicy {other} says it of {target.kind} {target.key} too, and comes first by name; "
                        "there, this does nothing"
                    )
                    findings.warn(item.position, f"spec.{field}", problem)


def with_ports(
    routes: Sequence[DeclaredRoute], services: Sequence[DeclaredService], findings: Findings
) -> list[DeclaredRoute]:
    """In the order of their keys, with the ports that their parents mean by name; without a second one of a key.

    Errors for names that there are not, and for keys that stand twice: the records of both kinds have one.
    """
    by_key = {one.key: one for one in services}
    found: dict[str, DeclaredRoute] = {}
    for item in sorted(routes, key=lambda item: item.route.key):
        other = found.setdefault(item.route.key, item)
        if other is not item:
            problem = f"{other.kind} {other.route.key} has the same name, which routes of a namespace share; rename one"
            findings.error(item.position, "metadata.name", problem)
        elif any(item.sections):
            meant = (
                _with_port(item, index, parent, by_key.get(parent.service), findings)
                for index, parent in enumerate(item.route.parents)
            )
            parents = tuple(parent for parent in meant if parent is not None)
            found[item.route.key] = replace(item, route=replace(item.route, parents=parents))
            if len(set(parents)) != len(parents):
                findings.error(
                    item.position, "spec.parentRefs", "names one port by its number and its name; remove one"
                )
    return list(found.values())


def with_grants(
    routes: Sequence[DeclaredRoute], grants: Sequence[DeclaredGrant], findings: Findings
) -> list[DeclaredRoute]:
    """With what other namespaces let them do: backends that they do not are marked, and mirrors are left out.

    Warns of both.
    """
    return [
        item
        if all(place.startswith(f"{item.route.namespace}/") for place in _sent_to(item))
        else _granted(item, grants, findings)
        for item in routes
    ]


def _sent_to(item: DeclaredRoute) -> Iterator[str]:
    return (destination.service for rule in item.route.rules for destination in rule.destinations)


def _granted(item: DeclaredRoute, grants: Sequence[DeclaredGrant], findings: Findings) -> DeclaredRoute:
    namespace = item.route.namespace
    parents = {parent.service for parent in item.route.parents}

    def refused(service: str) -> bool:
        if service in parents or service.startswith(f"{namespace}/"):
            return False  # who calls a Service may be sent to it
        return not any(grant.admits(item.kind, namespace, service) for grant in grants)

    def without(filters: Filters) -> Filters:
        kept = tuple(mirror for mirror in filters.mirrors if not refused(mirror.service))
        return filters if kept == filters.mirrors else replace(filters, mirrors=kept)

    for number, rule in enumerate(item.route.rules):
        for place, destination in _destinations(rule, f"spec.rules[{number}]"):
            if refused(destination.service):
                what = "its copies go nowhere" if isinstance(destination, Mirror) else "its requests are answered 500"
                other, _, name = destination.service.partition("/")
                problem = (
                    f"{what} (RefNotPermitted): no ReferenceGrant of namespace {other} lets {item.kind}s of "
                    f"{namespace} send to its Service {name}"
                )
                findings.warn(item.position, place, problem)
    rules = tuple(
        replace(
            rule,
            filters=without(rule.filters),
            backends=tuple(
                replace(backend, filters=without(backend.filters), refused=refused(backend.service))
                for backend in rule.backends
            ),
        )
        for rule in item.route.rules
    )
    return replace(item, route=replace(item.route, rules=rules))


def published(
    routes: Sequence[DeclaredRoute],
    elsewhere: Sequence[DeclaredRoute],
    services: Sequence[DeclaredService],
    findings: Findings,
) -> tuple[HTTPRoute, ...]:
    """What is published of the namespaces that these services are of, in the order of their keys.

    `elsewhere`: routes of other namespaces with parents among the services.
    """
    keys = {service.key for service in services}
    found: dict[str, HTTPRoute] = {}
    for item in routes:
        own = tuple(parent for parent in item.route.parents if parent.service.startswith(f"{item.route.namespace}/"))
        if own:
            found[item.route.key] = replace(item.route, parents=own)
    for item in (*routes, *elsewhere):
        callers, name = item.route.namespace, f"{item.route.namespace}.{item.route.name}"
        for namespace in sorted(item.abroad):
            here = [
                one for one in item.route.parents if one.service in keys and one.service.startswith(f"{namespace}/")
            ]
            if not here:
                continue
            route = replace(item.route, namespace=namespace, name=name, parents=tuple(here), callers=callers)
            if route.key in found or wrong_subdomain(name):
                problem = f"is {name} where its Service is, which is a route there or too long; rename it"
                findings.error(item.position, "metadata.name", problem)
            found[route.key] = route
    return tuple(found[key] for key in sorted(found))


def _with_port(
    item: DeclaredRoute, index: int, parent: Parent, service: DeclaredService | None, findings: Findings
) -> Parent | None:
    """None: there is no such port."""
    section = item.sections[index]
    if not section or service is None:
        return parent
    ports = {port.name: port.port for port in service.ports}
    path = f"spec.parentRefs[{index}].sectionName"
    if section not in ports:
        known = ", ".join(sorted(filter(None, ports))) or "none"
        problem = f"Service {service.key} has no port named {section} (NoMatchingParent); names that there are: {known}"
        findings.error(item.position, path, problem, (section, ports))
        return None
    if parent.port not in (0, ports[section]):
        problem = f"is port {ports[section]} of Service {service.key}, and port is {parent.port}; remove one"
        findings.error(item.position, path, problem)
    return Parent(parent.service, ports[section])


def check_routes(
    routes: Sequence[DeclaredRoute],
    services: Sequence[DeclaredService],
    elsewhere: Callable[[str], DeclaredService | None],
    wishes: Mapping[Subject, Wish],
    findings: Findings,
) -> None:
    """Errors for routes from and to what is not there; warnings for what does nothing, and for conflicts.

    `routes`: in the order of their keys, in which the first wins. `elsewhere` finds the services of other namespaces,
    which come and go without asking those that refer to them: what is not there is a warning then.
    """
    by_key = {one.key: one for one in services}
    for item in routes:
        by_key |= {key: found for key in _sent_to(item) if key not in by_key and (found := elsewhere(key)) is not None}
    taken: dict[tuple[str, int, str, Match], str] = {}
    for item in routes:
        for index, parent in enumerate(item.route.parents):
            path = f"spec.parentRefs[{index}]"
            _check_reference(item, path, parent.service, parent.port, by_key, findings)
            if parent.service in by_key and parent.service.startswith(f"{item.route.namespace}/"):
                _check_parent(item, path, parent, by_key[parent.service], wishes, findings)
        for number, rule in enumerate(item.route.rules):
            path = f"spec.rules[{number}]"
            for place, destination in _destinations(rule, path):
                _check_reference(item, place, destination.service, destination.port, by_key, findings)
                if destination.service in by_key and destination.service.startswith(f"{item.route.namespace}/"):
                    _check_backend(item, place, destination.service, wishes, findings)
            if rule.filters.redirect is None and not any(backend.weight for backend in rule.backends):
                findings.warn(item.position, path, "has no backendRefs with a weight; its requests are answered 500")
        _check_conflicts(item, by_key, taken, findings)


def _destinations(rule: RouteRule, path: str) -> Iterator[tuple[str, Backend | Mirror]]:
    """Each with its place in the document."""
    for index, backend in enumerate(rule.backends):
        yield f"{path}.backendRefs[{index}]", backend
        for mirror in backend.filters.mirrors:
            yield f"{path}.backendRefs[{index}].filters", mirror
    for mirror in rule.filters.mirrors:
        yield f"{path}.filters", mirror


def _check_reference(
    item: DeclaredRoute,
    path: str,
    service_key: str,
    port: int,
    services: Mapping[str, DeclaredService],
    findings: Findings,
) -> None:
    service = services.get(service_key)
    reason = "NoMatchingParent" if ".parentRefs" in path else "BackendNotFound"
    tell = findings.error if service_key.startswith(f"{item.route.namespace}/") else findings.warn
    if service is None:
        problem = f"there is no Service {service_key} ({reason}); declare it or name another"
        tell(item.position, f"{path}.name", problem, (service_key, services))
    elif port and all(one.port != port for one in service.ports):
        ports = ", ".join(str(one.port) for one in service.ports) or "none"
        problem = f"Service {service_key} has no port {port} ({reason}); its ports: {ports}"
        tell(item.position, f"{path}.port", problem)


def _check_parent(
    item: DeclaredRoute,
    path: str,
    parent: Parent,
    service: DeclaredService,
    wishes: Mapping[Subject, Wish],
    findings: Findings,
) -> None:
    if ("Service", service.key) not in wishes:
        findings.warn(item.position, path, f"does nothing: Service {service.key} {_UNBOUND}")
        return
    meant = [port for port in service.ports if parent.port in (0, port.port)]
    if meant and all(port.is_opaque for port in meant):
        numbers = ", ".join(str(port.port) for port in meant)
        problem = (
            f"does nothing: port {numbers} of Service {service.key} is not HTTP; write its appProtocol: http, or "
            "name it http"
        )
        findings.warn(item.position, path, problem)


def _check_backend(
    item: DeclaredRoute, path: str, backend: str, wishes: Mapping[Subject, Wish], findings: Findings
) -> None:
    """Warns of a backend whose destinations do not take the word on the caller of the waypoint that calls them."""
    own = wishes.get(("Service", backend))
    parents = {parent.service for parent in item.route.parents}
    for gateway in sorted({wish.gateway for parent in parents if (wish := wishes.get(("Service", parent)))}):
        if own is None or own.gateway != gateway:
            problem = (
                f"Service {backend} is not bound to Gateway {gateway}, which sends it these requests: its policies "
                f"see the waypoint as the caller and not who calls, so that a DENY of that caller does not hold; label "
                f"it {label.USE_WAYPOINT} as the parent is"
            )
            findings.warn(item.position, path, problem)


def _check_conflicts(
    item: DeclaredRoute,
    services: Mapping[str, DeclaredService],
    taken: dict[tuple[str, int, str, Match], str],
    findings: Findings,
) -> None:
    """Warns of matches that another rule wins. `taken`: who has a match of a service, port and host."""
    told: set[tuple[int, str]] = set()
    for number, place in _matches(item.route, services):
        path = f"spec.rules[{number}]"
        mine = f"{item.kind} {item.route.key}, {path}"
        holder = taken.setdefault(place, mine)
        if holder != mine and (number, holder) not in told:
            told.add((number, holder))
            service_key, port, _, match = place
            problem = (
                f"{match.path.kind.value} {match.path.value} at Service {service_key} port {port} is that of {holder} "
                "too, which wins; make them differ, or remove one"
            )
            findings.warn(item.position, path, problem)


def _matches(
    route: HTTPRoute, services: Mapping[str, DeclaredService]
) -> Iterator[tuple[int, tuple[str, int, str, Match]]]:
    """Index of a rule, and what it matches: service, port, host and match."""
    for parent in route.parents:
        own = parent.service.startswith(f"{route.namespace}/")  # of others', each namespace has its own
        ports = services[parent.service].ports if own and parent.service in services else ()
        for port in ports:
            if parent.port in (0, port.port):
                for number, rule in enumerate(route.rules):
                    for hostname in route.hostnames or ("",):
                        for match in rule.matches:
                            yield number, (parent.service, port.port, hostname, _ordered(match))


def _ordered(match: Match) -> Match:
    """The same match, equal to each that asks for the same in another order."""
    headers = tuple(sorted(match.headers, key=lambda header: header.name))
    return replace(match, headers=headers, query=tuple(sorted(match.query, key=lambda parameter: parameter.name)))
