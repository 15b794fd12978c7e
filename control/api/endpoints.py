"""Which workloads serve which service: by the Service's selector, or as its EndpointSlices say.

An EndpointSlice stands above the selector for the workloads it names, so that one can be taken out of service.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from control.api import labels as label
from control.api.address import IpAddress
from control.api.declared import DeclaredEndpoint, DeclaredEndpoints, DeclaredService
from control.api.problems import Findings
from control.api.selection import Workloads
from control.api.workload import Endpoint, ServicePort, Workload, key


@dataclass(slots=True)
class _Backend:
    """What the EndpointSlices say of one workload of one service; dual-stack workloads stand in several."""

    workload: Workload
    addresses: set[IpAddress] = field(default_factory=set)
    ports: dict[int, int] = field(default_factory=dict)
    ready: bool = True

    def endpoint(self, service_key: str) -> Endpoint:
        address = next(a for a in self.workload.addresses if a in self.addresses)
        return _endpoint(service_key, self.workload, address, dict(sorted(self.ports.items())), ready=self.ready)


def endpoints_of(
    services: Sequence[DeclaredService],
    slices: Sequence[DeclaredEndpoints],
    workloads: Sequence[Workload],
    last: Callable[[DeclaredService], Sequence[Endpoint]],
    findings: Findings,
) -> tuple[Endpoint, ...]:
    """All endpoints, in the order of their services' and workloads' keys.

    A service that would have no ready endpoint keeps the `last` ones it had.
    """
    sliced = _sliced(services, slices, workloads, findings)
    index = Workloads(workloads)
    endpoints: list[Endpoint] = []
    for service in services:
        found = {
            workload_key: backend.endpoint(service.key) for workload_key, backend in sliced.get(service.key, {}).items()
        }
        for workload in _selected(service, index, findings):
            if workload.key not in found:
                ports = _target_ports(service, workload, findings)
                found[workload.key] = _endpoint(service.key, workload, workload.addresses[0], ports, ready=True)
        if not found and service.selector is None:
            findings.warn(service.position, "", f"Service {service.key} has no selector and no EndpointSlice")
        if not any(endpoint.ready for endpoint in found.values()):
            found |= _kept(service, last(service), findings)
        endpoints += [found[workload_key] for workload_key in sorted(found)]
    return tuple(endpoints)


def _kept(service: DeclaredService, last: Sequence[Endpoint], findings: Findings) -> dict[str, Endpoint]:
    if last:
        problem = (
            f"Service {service.key} would have no ready endpoint; it keeps the last {len(last)}. "
            "If that is meant, do it again with --release"
        )
        findings.warn(service.position, "", problem)
    return {endpoint.workload: endpoint for endpoint in last}


def _endpoint(
    service_key: str, workload: Workload, address: IpAddress, ports: Mapping[int, int], *, ready: bool
) -> Endpoint:
    return Endpoint(
        service=service_key,
        workload=workload.key,
        address=address,
        identity=workload.identity,
        ports=ports,
        weight=workload.weight,
        ready=ready,
        labels=label.telemetry(workload.labels),
        locality=workload.locality,
        node=workload.node,
    )


def _selected(service: DeclaredService, workloads: Workloads, findings: Findings) -> list[Workload]:
    if service.selector is None:
        return []
    selected = workloads.selected(service.namespace, service.selector)
    if not selected:
        wanted = ", ".join(f"{name}={value}" for name, value in service.selector.items())
        findings.warn(
            service.position,
            "spec.selector",
            f"selects no WorkloadEntry of namespace {service.namespace} (none has the labels {wanted})",
        )
    return selected


def _target_ports(service: DeclaredService, workload: Workload, findings: Findings) -> dict[int, int]:
    """Service port -> workload port."""
    ports: dict[int, int] = {}
    for index, port in service.indexed_ports():
        target = _target_port(service, index, port, workload, findings)
        if target:
            ports[port.port] = target
    return ports


def _target_port(
    service: DeclaredService, index: int, port: ServicePort, workload: Workload, findings: Findings
) -> int:
    """The workload's port; 0 after an error. The workload's own word for the port stands above `targetPort`."""
    target = workload.ports.get(port.name, port.target_port)
    if isinstance(target, int):
        return target
    named = workload.ports.get(target, 0)
    if not named:
        known = f"{', '.join(workload.ports)}" if workload.ports else "none"
        findings.error(
            service.position,
            f"spec.ports[{index}].targetPort",
            f"WorkloadEntry {workload.key} has no port {target!r}; its ports: {known}",
            (target, workload.ports),
        )
    return named


def datagrams_of(
    services: Sequence[DeclaredService], workloads: Sequence[Workload], findings: Findings
) -> dict[str, tuple[int, ...]]:
    """Key of a workload -> its ports, in order, to which datagrams may go, of those that services select."""
    index = Workloads(workloads)
    found: dict[str, set[int]] = {}
    for service in services:
        if not service.datagrams:
            continue
        for workload in index.selected(service.namespace, service.selector or {}):
            ports = {_target_port(service, at, port, workload, findings) for at, port in service.datagrams.items()}
            found.setdefault(workload.key, set()).update(ports - {0})
    return {workload_key: tuple(sorted(ports)) for workload_key, ports in found.items() if ports}


def _sliced(
    services: Sequence[DeclaredService],
    slices: Sequence[DeclaredEndpoints],
    workloads: Sequence[Workload],
    findings: Findings,
) -> dict[str, dict[str, _Backend]]:
    """Service key -> workload key -> what the slices say."""
    by_key = {service.key: service for service in services}
    by_address = {address: workload for workload in workloads for address in workload.addresses}
    found: dict[str, dict[str, _Backend]] = {}
    for declared in slices:
        service = by_key.get(key(declared.namespace, declared.service))
        if service is None:
            names = [s.name for s in services if s.namespace == declared.namespace]
            findings.error(
                declared.position,
                f"metadata.labels[{label.SERVICE_NAME!r}]",
                f"no Service {declared.service!r} in namespace {declared.namespace}; declare it or name another",
                (declared.service, names),
            )
            continue
        ports = _slice_ports(declared, service, findings)
        for endpoint in declared.endpoints:
            workload = _workload_of(declared, endpoint, by_address, findings)
            if workload is not None:
                backends = found.setdefault(service.key, {})
                backend = backends.setdefault(workload.key, _Backend(workload))
                _merge(backend, declared, endpoint, ports, findings)
    return found


def _slice_ports(declared: DeclaredEndpoints, service: DeclaredService, findings: Findings) -> dict[int, int]:
    by_name: dict[str, ServicePort] = {port.name: port for port in service.ports}
    ports: dict[int, int] = {}
    for index, (name, target) in enumerate(declared.ports.items()):
        if name in by_name:
            ports[by_name[name].port] = target
        else:
            findings.error(
                declared.position,
                f"ports[{index}].name",
                f"Service {service.key} has no port named {name!r}; its ports: {', '.join(map(repr, by_name))}",
                (name, by_name),
            )
    return ports


def _workload_of(
    declared: DeclaredEndpoints,
    endpoint: DeclaredEndpoint,
    by_address: Mapping[IpAddress, Workload],
    findings: Findings,
) -> Workload | None:
    workload = by_address.get(endpoint.address)
    problem = ""
    if workload is None:
        problem = f"no WorkloadEntry has the address {endpoint.address}; declare one, with its service account"
    elif workload.namespace != declared.namespace:
        problem = f"{endpoint.address} is WorkloadEntry {workload.key}, of another namespace; name one of this one"
    elif endpoint.target and endpoint.target != workload.name:
        problem = f"targetRef says {endpoint.target!r}, but {endpoint.address} is WorkloadEntry {workload.key}"
    if problem:
        findings.error(declared.position, endpoint.path, problem)
        return None
    return workload


def _merge(
    backend: _Backend,
    declared: DeclaredEndpoints,
    endpoint: DeclaredEndpoint,
    ports: Mapping[int, int],
    findings: Findings,
) -> None:
    if endpoint.address in backend.addresses:
        findings.error(
            declared.position, endpoint.path, f"{endpoint.address} stands twice for this Service; remove one"
        )
    for port, target in ports.items():
        if backend.ports.setdefault(port, target) != target:
            findings.error(
                declared.position,
                "ports",
                f"leads {backend.workload.key} port {port} to {target}, another EndpointSlice to "
                f"{backend.ports[port]}; make them agree",
            )
    backend.addresses.add(endpoint.address)
    backend.ready = backend.ready and endpoint.ready
