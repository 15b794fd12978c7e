"""Where a connection goes: by service address, by workload address, or nowhere."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.address import parse_address
from control.api.gateway import Binding, Gateway, Instance, Placement, Traffic, Via
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


def shared_state(percent: int, *canaries: str) -> State:
    """Of infra/wp, which has one process, so many callers go through infra/v2."""
    state = bound_state(Via.WAYPOINT, waypoint=gateway(WAYPOINTS[0]))
    service = state.service("shop/db")
    assert service is not None
    instances = tuple(Instance(f"infra/v2-{ip}", parse_address(ip)) for ip in canaries)
    binding = Binding("infra/wp", Via.WAYPOINT, canary="infra/v2", percent=percent)
    canary = Gateway("infra", "v2", Traffic.ALL, instances, ("shop/db",), ())
    state.apply([published(record, 3) for record in (dataclasses.replace(service, binding=binding), canary)])
    return state


def gateways_of_callers(state: State) -> list[str]:
    resolvers = [Resolver(state, random.Random(1), caller=f"shop/caller-{number}") for number in range(1000)]
    return [resolver.plan(VIP, SERVICE_PORT).gateway for resolver in resolvers]


def test_a_canary_has_its_share_of_callers_who_stay_when_they_become_more() -> None:
    before: set[int] = set()
    for percent in (0, 10, 50, 100):
        found = gateways_of_callers(shared_state(percent, WAYPOINTS[1]))
        assert found == gateways_of_callers(shared_state(percent, WAYPOINTS[1]))
        through = {number for number, name in enumerate(found) if name == "infra/v2"}
        assert abs(len(through) - 10 * percent) < 40
        assert before <= through
        before = through


def test_who_does_not_get_to_a_canary_goes_to_its_waypoint() -> None:
    assert set(gateways_of_callers(shared_state(100))) == {"infra/wp"}, "it has no process"
    plan = Resolver(shared_state(100, *WAYPOINTS[1:]), random.Random(1)).plan(VIP, SERVICE_PORT)
    assert [hop.expected.service_account for hop in plan.hops] == ["v2", "v2", "wp"]
    health = Health(lambda: 0.0)
    health.failed(WAYPOINTS[1])
    first, second = Resolver(shared_state(100, WAYPOINTS[1]), random.Random(1), health).plan(VIP, SERVICE_PORT).hops
    assert (first.expected.service_account, second.expected.service_account) == ("wp", "v2")


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


# -- waypoints with a process for each node

_PLACED_WP = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/wp")
_BOUND = Binding("shop/wp", Via.WAYPOINT)


def on(node: str, number: int, *, weight: int = 1) -> Endpoint:
    return dataclasses.replace(endpoint(number, weight=weight), node=node)


def process(name: str, number: int, node: str, account: str = "") -> Instance:
    return Instance(f"shop/{name}", parse_address(f"10.1.0.{number}"), account, node)


def placed(placement: Placement, instances: Sequence[Instance], *endpoints: Endpoint) -> Resolver:
    state = state_of(*endpoints)
    service = state.service("shop/db")
    assert service is not None
    gateway = Gateway("shop", "wp", Traffic.SERVICE, tuple(instances), ("shop/db",), (), placement=placement)
    state.apply([published(dataclasses.replace(service, binding=_BOUND), 2), published(gateway, 2)])
    return Resolver(state, random.Random(1), Health(lambda: 0.0))


def first(resolver: Resolver, times: int) -> Counter[str]:
    return Counter(resolver.plan(VIP, SERVICE_PORT).hops[0].address for _ in range(times))


def test_each_process_has_the_calls_of_the_endpoints_that_it_stands_before() -> None:
    instances = process("a", 1, "a"), process("b", 2, "b"), process("b-2", 3, "b"), process("c", 4, "c")
    resolver = placed(Placement.NODE, instances, on("a", 1), on("b", 2), on("b", 3, weight=6), on("d", 4, weight=99))
    share = first(resolver, 8000)
    assert share.keys() == {"10.1.0.1", "10.1.0.2", "10.1.0.3"}, "nobody goes where there is no endpoint, or no process"
    assert abs(share["10.1.0.1"] - 1000) < 150
    assert abs(share["10.1.0.2"] - 3500) < 250
    plan = resolver.plan(VIP, SERVICE_PORT)
    assert {(hop.expected, hop.authority) for hop in plan.hops} == {(_PLACED_WP, f"{VIP}:{SERVICE_PORT}".encode())}
    assert len({hop.address for hop in plan.hops}) == MAX_HOPS, "another one is tried when the first fails"
    assert plan.gateway == "shop/wp"


def test_a_process_of_a_service_account_is_expected_to_be_that() -> None:
    instances = process("db", 1, "a", "db"), process("db-b", 3, "b", "db"), process("web", 2, "a", "web")
    resolver = placed(Placement.SERVICE_ACCOUNT, instances, on("a", 1))
    (hop,) = resolver.plan(VIP, SERVICE_PORT).hops
    assert (hop.address, hop.expected) == ("10.1.0.1", DB)


def test_a_service_without_a_process_before_any_endpoint_is_refused() -> None:
    for instances in ((), (process("b", 2, "b"),)):
        with pytest.raises(RefusedError, match=r"no process serves it \(placement node\)") as refused:
            placed(Placement.NODE, instances, on("a", 1)).plan(VIP, SERVICE_PORT)
        assert refused.value.reason == "no-waypoint"


def test_a_workloads_own_address_is_reached_through_the_process_of_its_node() -> None:
    instances = process("a", 1, "a"), process("b", 2, "b")
    state = state_of()
    gateway = Gateway("shop", "wp", Traffic.ALL, instances, (), (), placement=Placement.NODE)
    resident = ResidentWorkload("shop", "db", "db", {}, ((0, dataclasses.replace(_BOUND, node="b")),))
    state.apply([published(gateway, 2), published_addresses({DB_ADDRESS: resident}, 2)])
    (hop,) = Resolver(state, random.Random(1)).plan(DB_ADDRESS, 7000).hops
    assert (hop.address, hop.authority) == ("10.1.0.2", f"{DB_ADDRESS}:7000".encode())


ZONES = ("us/1", "eu/2", "eu/1/a", "eu/1/b", "")


def near(own: str, *, prefers: bool = True, health: Health | None = None) -> Resolver:
    """Of db, and of a service with an endpoint in each zone."""
    state = State("cluster.local")
    ports = (ServicePort("", SERVICE_PORT, 7000, ""),)
    known = (
        Service("shop", "db", (VIP,), ports, {}, (DB,), prefers_zone=prefers),
        dataclasses.replace(workload("db", DB_ADDRESS, DB), locality=own),
        *(dataclasses.replace(endpoint(number), locality=zone) for number, zone in enumerate(ZONES)),
    )
    state.apply([published(record, 1) for record in known])
    return Resolver(state, random.Random(5), health, caller="shop/db")


def numbers(resolver: Resolver, drawn: int = 0) -> list[int]:
    return [int(hop.address.rpartition(".")[2]) for hop in resolver.plan(VIP, SERVICE_PORT, drawn).hops]


def test_endpoints_of_the_caller_s_zone_come_first_and_then_those_of_its_region() -> None:
    resolver = near("eu/1/a")
    found = [numbers(resolver) for _ in range(200)]
    assert {tuple(sorted(hops[:2])) for hops in found} == {(2, 3)}, "a zone is one, whatever its subzones"
    assert {hops[0] for hops in found} == {2, 3}
    assert {hops[2] for hops in found} == {1}
    beyond = near("asia/1")
    assert {numbers(beyond)[0] for _ in range(200)} == set(range(5)), "nobody is near"
    assert [numbers(near("us/1/x"))[0], len(numbers(near("us/1/x")))] == [0, 3]


@pytest.mark.parametrize("resolver", [near("eu/1", prefers=False), near("")])
def test_nobody_is_preferred_unless_the_service_says_so_and_the_caller_knows_where_it_is(resolver: Resolver) -> None:
    assert {numbers(resolver)[0] for _ in range(200)} == set(range(5))


def test_what_failed_nearby_comes_behind_what_works_elsewhere() -> None:
    health = Health(lambda: 0.0)
    resolver = near("eu/1", health=health)
    for number in (2, 3):
        health.failed(parse_address(f"10.0.0.{number}"))
    found = [numbers(resolver) for _ in range(100)]
    assert {hops[0] for hops in found} == {1}
    assert {number for hops in found for number in hops[1:]} == {0, 4}


def test_what_the_kernel_has_drawn_elsewhere_does_not_come_first() -> None:
    resolver = near("eu/1")
    for number, first in ((3, {3}), (0, {2, 3})):
        drawn = backend_id(parse_address(f"10.0.0.{number}"), 7000)
        assert {numbers(resolver, drawn)[0] for _ in range(50)} == first
