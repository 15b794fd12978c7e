"""Where a connection goes: by service address, by workload address, or nowhere."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.address import parse_address
from control.api.gateway import Binding, Gateway, Instance, Traffic, Via
from control.api.identity import SpiffeId
from control.api.index import ResidentWorkload
from control.api.workload import Endpoint, Service, ServicePort
from control.client.state import State
from tests.support.certificates import DB
from tests.support.pair import DB_ADDRESS, SERVICE_PORT, VIP, published, published_addresses, workload
from uproxy.errors import Flag, RefusedError
from uproxy.health import Health
from uproxy.resolve import MAX_HOPS, Resolver, backend_id


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


def test_what_the_kernel_has_drawn_comes_first_unless_it_failed_or_is_unknown() -> None:
    state = state_of(*(endpoint(n) for n in range(1, 6)))
    health = Health(lambda: 0.0)
    resolver = Resolver(state, random.Random(7), health)
    third = parse_address("10.0.0.3")
    for _ in range(20):
        hops = resolver.plan(VIP, SERVICE_PORT, backend_id(third, 7000)).hops
        assert hops[0].address == third
        assert len(set(hops)) == MAX_HOPS
    unknown = [resolver.plan(VIP, SERVICE_PORT, 1).hops[0].address for _ in range(200)]
    assert len(set(unknown)) == 5
    health.failed(third)
    failed = [resolver.plan(VIP, SERVICE_PORT, backend_id(third, 7000)).hops[0].address for _ in range(200)]
    assert set(failed) == set(unknown) - {third}


WAYPOINTS = ("10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4")
WP = SpiffeId.parse("spiffe://cluster.local/ns/infra/sa/wp")


def gateway(*addresses: str) -> Gateway:
    instances = tuple(Instance(f"infra/wp-{n}", parse_address(ip)) for n, ip in enumerate(addresses))
    return Gateway("infra", "wp", Traffic.ALL, instances, ("shop/db",), ())


def bound_state(via: Via, *endpoints: Endpoint, waypoint: Gateway | None) -> State:
    state = state_of(*endpoints)
    service = state.service("shop/db")
    assert service is not None
    bound = dataclasses.replace(service, binding=Binding("infra/wp", via))
    state.apply([published(record, 2) for record in (bound, *((waypoint,) if waypoint is not None else ()))])
    return state


def test_a_bound_service_goes_to_its_waypoint_with_the_authority_that_was_dialled() -> None:
    state = bound_state(Via.WAYPOINT, endpoint(1), waypoint=gateway(*WAYPOINTS[:2]))
    plan = Resolver(state, random.Random(1)).plan(VIP, SERVICE_PORT)
    assert plan.gateway == "infra/wp"
    assert {(hop.address, hop.expected, hop.authority) for hop in plan.hops} == {
        (ip, WP, f"{VIP}:{SERVICE_PORT}".encode()) for ip in WAYPOINTS[:2]
    }
    assert plan.service is not None
    backends = Resolver(state, random.Random(1)).backends(plan.service, SERVICE_PORT)
    assert [hop.address for hop in backends] == ["10.0.0.1"], "the waypoint itself goes straight"


def test_a_bound_service_needs_no_endpoint_here() -> None:
    assert Resolver(bound_state(Via.WAYPOINT, waypoint=gateway(WAYPOINTS[0])), random.Random(1)).plan(VIP, SERVICE_PORT)


def test_the_processes_of_a_waypoint_take_turns() -> None:
    resolver = Resolver(bound_state(Via.WAYPOINT, waypoint=gateway(*WAYPOINTS)), random.Random(3))
    plans = [resolver.plan(VIP, SERVICE_PORT) for _ in range(2000)]
    assert all(len({hop.address for hop in plan.hops}) == MAX_HOPS for plan in plans)
    first = Counter(plan.hops[0].address for plan in plans)
    assert all(abs(first[parse_address(ip)] / 2000 - 0.25) < 0.05 for ip in WAYPOINTS)


def test_a_waypoint_that_was_never_ready_is_not_missed() -> None:
    refused = refusal(bound_state(Via.REFUSE, endpoint(1), waypoint=gateway(WAYPOINTS[0])), VIP, SERVICE_PORT)
    assert refused.reason == "waypoint-not-ready"
    assert "waypoint infra/wp" in refused.detail


def test_a_waypoint_without_a_process_is_not_missed() -> None:
    for waypoint, text in ((gateway(), "of which no process runs"), (None, "which is not known here")):
        refused = refusal(bound_state(Via.WAYPOINT, endpoint(1), waypoint=waypoint), VIP, SERVICE_PORT)
        assert refused.reason == "no-waypoint"
        assert text in refused.detail


@pytest.mark.parametrize(("processes", "through"), [(0, 0), (1, 1), (4, 2)])
def test_a_preferred_waypoint_leaves_room_for_the_direct_way(processes: int, through: int) -> None:
    state = bound_state(Via.PREFERRED, endpoint(1), endpoint(2), endpoint(3), waypoint=gateway(*WAYPOINTS[:processes]))
    plan = Resolver(state, random.Random(1)).plan(VIP, SERVICE_PORT)
    assert [hop.expected for hop in plan.hops] == [WP] * through + [DB] * (MAX_HOPS - through)


def test_a_preferred_waypoint_does_without_endpoints_and_is_not_conjured_up() -> None:
    state = bound_state(Via.PREFERRED, waypoint=gateway(WAYPOINTS[0]))
    assert len(Resolver(state, random.Random(1)).plan(VIP, SERVICE_PORT).hops) == 1
    assert refusal(bound_state(Via.PREFERRED, waypoint=None), VIP, SERVICE_PORT).reason == "no-waypoint"


def test_a_workload_is_bound_by_port() -> None:
    state = state_of()
    state.apply([published(gateway(WAYPOINTS[0]), 2)])
    address = parse_address("10.0.0.7")
    resident = ResidentWorkload("shop", "db-7", "db", {}, ((7000, Binding("infra/wp", Via.WAYPOINT)),))
    state.apply([published_addresses({address: resident}, 2)])
    (bound,) = Resolver(state, random.Random(1)).plan(address, 7000).hops
    assert (bound.address, bound.expected, bound.authority) == (WAYPOINTS[0], WP, b"10.0.0.7:7000")
    (direct,) = Resolver(state, random.Random(1)).plan(address, 7001).hops
    assert (direct.address, direct.expected) == (address, DB)
