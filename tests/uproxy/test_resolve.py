"""Where a connection goes: by service address, by workload address, or nowhere."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.address import parse_address
from control.api.identity import SpiffeId
from control.api.workload import Endpoint, Service, ServicePort
from control.client.state import State
from tests.support.certificates import DB
from tests.support.pair import DB_ADDRESS, SERVICE_PORT, VIP, published, workload
from uproxy.errors import Flag, RefusedError
from uproxy.resolve import MAX_HOPS, Resolver


def endpoint(number: int, *, weight: int = 1, ready: bool = True, port: int = SERVICE_PORT) -> Endpoint:
    address = parse_address(f"10.0.0.{number}")
    return Endpoint("shop/db", f"shop/db-{number}", address, DB, {port: 7000}, weight, ready, {})


def state_of(*endpoints: Endpoint) -> State:
    state = State("cluster.local")
    service = Service("shop", "db", (VIP,), (ServicePort("", SERVICE_PORT, 7000, ""),), {}, (DB,))
    state.apply([published(record, 1) for record in (service, workload("db", DB_ADDRESS, DB), *endpoints)])
    return state


def refusal(state: State, address: str, port: int) -> RefusedError:
    with pytest.raises(RefusedError) as refused:
        Resolver(state, random.Random(1)).plan(parse_address(address), port)
    return refused.value


def test_a_service_address_goes_to_an_endpoint_and_its_target_port() -> None:
    plan = Resolver(state_of(endpoint(1)), random.Random(1)).plan(VIP, SERVICE_PORT)
    (hop,) = plan.hops
    assert (hop.address, hop.authority, hop.expected) == ("10.0.0.1", b"10.0.0.1:7000", DB)
    assert plan.service is not None
    assert plan.service.key == "shop/db"


def test_a_workload_address_goes_there() -> None:
    plan = Resolver(state_of(), random.Random(1)).plan(DB_ADDRESS, 7000)
    (hop,) = plan.hops
    assert (hop.address, hop.authority, plan.service) == (DB_ADDRESS, f"{DB_ADDRESS}:7000".encode(), None)


def test_an_ipv6_authority_has_brackets() -> None:
    state = state_of()
    six = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/six")
    state.apply([published(workload("six", "fd00::6", six), 2)])
    (hop,) = Resolver(state, random.Random(1)).plan(parse_address("fd00::6"), 80).hops
    assert hop.authority == b"[fd00::6]:80"


def test_what_the_mesh_does_not_know_is_refused() -> None:
    assert refusal(state_of(), "10.9.9.9", 80).flag is Flag.NO_CONFIG
    assert refusal(state_of(endpoint(1)), VIP, SERVICE_PORT + 1).flag is Flag.NO_CONFIG
    assert refusal(State("cluster.local"), VIP, SERVICE_PORT).detail == "this uProxy has no configuration yet"


def test_a_service_without_a_ready_endpoint_is_refused() -> None:
    for endpoints in ((), (endpoint(1, ready=False),), (endpoint(1, port=1),)):
        assert refusal(state_of(*endpoints), VIP, SERVICE_PORT).reason == "no-endpoint"


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=8), st.integers())
def test_hops_are_different_ready_endpoints(drawn: list[tuple[int, bool]], seed: int) -> None:
    endpoints = [endpoint(n, weight=weight, ready=ready) for n, (weight, ready) in enumerate(drawn, 1)]
    ready_ones = {e.address for e in endpoints if e.ready}
    state = state_of(*endpoints)
    if not ready_ones:
        assert refusal(state, VIP, SERVICE_PORT).reason == "no-endpoint"
        return
    hops = Resolver(state, random.Random(seed)).plan(VIP, SERVICE_PORT).hops
    addresses = [hop.address for hop in hops]
    assert set(addresses) <= ready_ones
    assert len(addresses) == len(set(addresses)) == min(len(ready_ones), MAX_HOPS)


def test_the_first_hop_is_drawn_by_weight() -> None:
    state = state_of(endpoint(1, weight=1), endpoint(2, weight=3))
    rng = random.Random(7)
    first = Counter(Resolver(state, rng).plan(VIP, SERVICE_PORT).hops[0].address for _ in range(4000))
    assert abs(first[parse_address("10.0.0.2")] / 4000 - 0.75) < 0.03
