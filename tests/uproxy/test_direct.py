"""What a uProxy says of the direct path: whom it has reached, and as whom."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from control.api.address import IpAddress, parse_address
from control.api.identity import SpiffeId
from control.api.workload import Endpoint, Service, ServicePort, Workload
from control.client.state import State
from tests.support.certificates import DB, WEB
from tests.support.pair import SERVICE_PORT, VIP, WEB_ADDRESS, published, workload
from uproxy.direct import DirectPath
from uproxy.outbound import Self
from uproxy.resolve import Resolver
from uproxy.telemetry import Telemetry

FIRST, SECOND = parse_address("10.0.0.1"), parse_address("10.0.0.2")
OTHER = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/other")


def own(*, direct: bool) -> Workload:
    return dataclasses.replace(workload("web", WEB_ADDRESS, WEB), direct=direct)


def endpoint(name: str, address: IpAddress, identity: SpiffeId) -> Endpoint:
    return Endpoint("shop/db", f"shop/{name}", address, identity, {SERVICE_PORT: 7000}, 1, True, {})


def mesh() -> State:
    state = State("cluster.local")
    service = Service("shop", "db", (VIP,), (ServicePort("", SERVICE_PORT, 7000, ""),), {}, (DB, OTHER))
    endpoints = endpoint("db-1", FIRST, DB), endpoint("db-2", SECOND, DB)
    state.apply([published(record, 1) for record in (service, own(direct=True), *endpoints)])
    return state


def path_of(state: State) -> DirectPath:
    who = Self("shop/web", str(WEB), "cluster.local", (WEB_ADDRESS,))
    made = DirectPath(Path("/nowhere"), state, Telemetry("0"), who)
    made._local = frozenset((FIRST, SECOND))
    made.changed()
    return made


def reach(path: DirectPath, state: State, address: IpAddress) -> None:
    plan = Resolver(state, random.Random(1)).plan(VIP, SERVICE_PORT)
    path.reached(plan, next(hop for hop in plan.hops if hop.address == address))


def proved(path: DirectPath) -> dict[IpAddress, SpiffeId | None]:
    return {backend.address: backend.identity for choice in path._said().choices for backend in choice.backends}


def test_a_backend_is_near_as_whom_a_tunnel_has_proved_it() -> None:
    state = mesh()
    path = path_of(state)
    assert not proved(path)
    reach(path, state, FIRST)
    assert proved(path) == {FIRST: DB, SECOND: None}
    reach(path, state, SECOND)
    assert proved(path) == {FIRST: DB, SECOND: DB}


def test_a_backend_that_is_somebody_else_now_is_proved_anew() -> None:
    state = mesh()
    path = path_of(state)
    reach(path, state, FIRST)
    state.apply([published(endpoint("db-1", FIRST, OTHER), 2)])
    path.changed()
    assert proved(path) == {FIRST: None, SECOND: None}
    reach(path, state, FIRST)
    assert proved(path) == {FIRST: OTHER, SECOND: None}


@pytest.mark.parametrize("change", [{"ready": False}, {"ports": {}}], ids=str)
def test_a_backend_that_takes_no_connections_now_is_not_among_those_to_choose_from(change: dict[str, object]) -> None:
    state = mesh()
    path = path_of(state)
    reach(path, state, FIRST)
    reach(path, state, SECOND)
    state.apply([published(dataclasses.replace(endpoint("db-1", FIRST, DB), **change), 2)])
    path.changed()
    assert proved(path) == {SECOND: DB}


def test_nothing_is_said_of_what_may_not_go_direct() -> None:
    state = mesh()
    path = path_of(state)
    reach(path, state, FIRST)
    state.apply([published(own(direct=False), 2)])
    path.changed()
    reach(path, state, FIRST)
    assert not path._said().direct
    assert not proved(path)
