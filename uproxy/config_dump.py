"""What a proxy knows of the mesh, in words of JSON, for operators: `/config_dump`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import islice
from typing import Any, Final

from control.api.identity import SpiffeId
from control.api.workload import Service, Workload
from control.client.state import State
from uproxy.credentials import CurrentCredentials
from uproxy.tunnel import Tunnel

MAX_SERVICES: Final = 1000
"""Services shown, and workloads: all of them, but where a mesh is read from files. It takes some 50 ms."""
MAX_ENDPOINTS: Final = 100
"""Endpoints shown of a service."""


def of_state(state: State) -> dict[str, Any]:
    """Services with their endpoints, and workloads, by key; and how many there are."""
    services, workloads = state.services(), state.workloads()
    return {
        "whole": state.whole,
        "generation": state.generation,
        "service_count": len(services),
        "services": {service.key: _of_service(state, service) for service in services[:MAX_SERVICES]},
        "workload_count": len(workloads),
        "workloads": {workload.key: plain(workload) for workload in islice(workloads, MAX_SERVICES)},
    }


def of_policies(state: State, workload: Workload | None) -> dict[str, Any]:
    """Those that select this workload, by key."""
    found = state.policies_for(workload) if workload is not None else ()
    return {policy.key: plain(policy) for policy in found}


def of_certificate(credentials: CurrentCredentials) -> dict[str, Any]:
    """Unix times. Nothing of the key."""
    certificate = credentials.value
    return {
        "identity": str(certificate.identity),
        "serial": f"{certificate.serial:x}",
        "not_before": certificate.not_before,
        "not_after": certificate.not_after,
    }


def of_tunnels(tunnels: Iterable[Tunnel]) -> list[dict[str, Any]]:
    """Bytes in the windows."""
    return [
        {
            "peer": str(tunnel.peer),
            "address": tunnel.peer_address,
            "streams": len(tunnel.connection.streams),
            "send_window": tunnel.connection.send_window,
            "waiting_for_room": len(tunnel.starved),
        }
        for tunnel in tunnels
    ]


def plain(value: object) -> Any:
    """A value of the vocabulary as JSON has it; what is empty is left out."""
    if isinstance(value, SpiffeId):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        found = ((field.name, getattr(value, field.name)) for field in fields(value))
        return {name: plain(one) for name, one in found if one is not None and one not in ("", (), {})}
    if isinstance(value, Mapping):
        return {str(plain(name)): plain(one) for name, one in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [plain(one) for one in value]
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def _of_service(state: State, service: Service) -> dict[str, Any]:
    endpoints = state.endpoints(service.key)
    return {
        **plain(service),
        "endpoint_count": len(endpoints),
        "endpoints": [plain(endpoint) for endpoint in endpoints[:MAX_ENDPOINTS]],
    }
