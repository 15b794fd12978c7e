"""What a CONNECT's authority means to a waypoint."""

from __future__ import annotations

from dataclasses import replace

import pytest

from control.api.address import IpAddress, parse_address
from control.api.gateway import Gateway, Placement, Traffic
from control.api.records import Record
from control.api.workload import Endpoint, Service, ServicePort
from control.client.state import State
from tests.support.certificates import DB, WEB
from tests.support.pair import published, workload
from uproxy.errors import RefusedError
from uproxy.listener import asked_for
from waypoint.destination import Destination, Destinations

VIP, OTHER_VIP, POD = (parse_address(text) for text in ("240.240.0.1", "240.240.0.2", "10.0.0.7"))
HTTP = ServicePort("web", 80, 8080, "http")
TCP = ServicePort("raw", 81, 8081, "")
SERVICE = Service("shop", "db", (VIP,), (HTTP, TCP), {}, (DB,))
OTHER = Service("shop", "other", (OTHER_VIP,), (replace(HTTP, port=90),), {}, (DB,))
ENDPOINT = Endpoint("shop/db", "shop/db", POD, DB, {80: 8080, 81: 8081}, 1, True, {})
GATEWAY = Gateway("shop", "wp", Traffic.ALL, (), ("shop/db",), ("shop/db",))


def known(*records: Record) -> Destinations:
    state = State("cluster.local")
    state.apply([published(record, 1) for record in records])
    return Destinations(state, "shop/wp")


def find(destinations: Destinations, authority: str) -> Destination:
    return destinations.find(asked_for({b":method": b"CONNECT", b":authority": authority.encode()}))


def test_services_by_address_and_by_name() -> None:
    destinations = known(SERVICE, OTHER, ENDPOINT, GATEWAY)
    for authority in ("240.240.0.1:80", "db.shop.svc.cluster.local:80", "[::ffff:240.240.0.1]:80"):
        found = find(destinations, authority)
        assert (found.services, found.port, found.http, found.backend) == ((SERVICE,), 80, True, None)
    assert not find(destinations, "240.240.0.1:81").http


def test_a_workload_behind_a_service_has_its_policies_and_no_choice() -> None:
    destinations = known(SERVICE, ENDPOINT, replace(GATEWAY, workloads=()))
    found = find(destinations, "10.0.0.7:8080")
    assert (found.services, found.port, found.http) == ((SERVICE,), 80, True)
    assert found.backend is not None
    assert (found.backend.address, found.backend.authority, found.backend.expected) == (POD, b"10.0.0.7:8080", DB)
    with pytest.raises(RefusedError, match="wrong-destination"):
        find(destinations, "10.0.0.7:9999")


def test_a_workload_behind_a_service_is_served_at_each_of_its_addresses() -> None:
    second = parse_address("fd00::7")
    both = replace(workload("db", POD, DB), addresses=(POD, second))
    found = find(known(SERVICE, ENDPOINT, both, replace(GATEWAY, workloads=())), "[fd00::7]:8080")
    assert (found.services, found.http) == ((SERVICE,), True)
    assert found.backend is not None
    assert (found.backend.address, found.backend.authority) == (second, b"[fd00::7]:8080")


@pytest.mark.parametrize("vips", [(VIP,), ()], ids=["a virtual address", "headless"])
def test_who_says_which_service_was_dialled_is_served_by_its_policies(vips: tuple[IpAddress, ...]) -> None:
    state = State("cluster.local")
    records = (replace(SERVICE, vips=vips), ENDPOINT, replace(GATEWAY, workloads=(), placement=Placement.SIDECAR))
    state.apply([published(record, 1) for record in records])
    destinations = Destinations(state, "shop/wp", own="shop/db")
    found = destinations.find(destinations.dialled(POD, 8080, "db.shop.svc.cluster.local"))
    assert [service.key for service in found.services] == ["shop/db"]


def test_the_policies_of_all_services_in_front_of_a_port_hold() -> None:
    behind_both = replace(ENDPOINT, service="shop/other", ports={90: 8081})
    gateway = replace(GATEWAY, services=("shop/db", "shop/other"))
    found = find(known(SERVICE, OTHER, ENDPOINT, behind_both, gateway), "10.0.0.7:8081")
    assert found.services == (SERVICE, OTHER)
    assert found.http, "one of the two says so, and more can be asked of HTTP"


def test_a_workload_that_is_bound_by_itself_is_opaque() -> None:
    found = find(known(workload("db", POD, DB), replace(GATEWAY, services=())), "10.0.0.7:22")
    assert (found.services, found.port, found.http) == ((), 22, False)
    assert found.backend is not None


@pytest.mark.parametrize("authority", ["240.240.0.2:90", "240.240.0.1:82", "10.9.9.9:80", "nobody.shop:80", "x:1"])
def test_anything_else_is_refused(authority: str) -> None:
    with pytest.raises(RefusedError, match="wrong-destination") as refused:
        find(known(SERVICE, OTHER, ENDPOINT, GATEWAY), authority)
    assert (refused.value.status, refused.value.retriable) == (400, False)


def test_what_has_not_come_yet_may_be_known_elsewhere() -> None:
    for records in ((GATEWAY,), ()):
        with pytest.raises(RefusedError, match="no-config") as refused:
            find(known(*records), "240.240.0.1:80")
        assert refused.value.status == 503


@pytest.mark.parametrize(
    ("name", "protocol", "http"),
    [
        ("http", "", True),
        ("http-admin", "", True),
        ("", "http", True),
        ("tcp", "http/1.1", True),
        ("http", "tcp", False),
        ("https", "", False),
        ("httpx", "", False),
        ("", "", False),
        ("", "kubernetes.io/h2c", True),
    ],
)
def test_which_ports_are_http(name: str, protocol: str, http: bool) -> None:
    assert ServicePort(name, 80, 8080, protocol).is_http is http


def test_a_process_sends_to_what_it_stands_before_and_elsewhere_only_where_that_is_nothing() -> None:
    endpoints = [
        replace(
            ENDPOINT, workload=f"shop/db-{number}", address=parse_address(f"10.0.1.{number}"), node=node, identity=one
        )
        for number, (node, one) in enumerate((("a", DB), ("a", WEB), ("b", DB)), 1)
    ]
    service = replace(SERVICE, identities=tuple(sorted((DB, WEB))))

    def chosen(placement: Placement, node: str) -> set[str]:
        state = State("cluster.local")
        own = replace(workload("db", "10.0.0.9", DB), node=node)
        records = (service, *endpoints, replace(GATEWAY, placement=placement), own)
        state.apply([published(record, 1) for record in records])
        destinations = Destinations(state, "shop/wp", own=own.key)
        return {hop.address for hop in destinations.backends("shop/db", 80)}

    everywhere = {"10.0.1.1", "10.0.1.2", "10.0.1.3"}
    assert chosen(Placement.REMOTE, "a") == everywhere
    assert chosen(Placement.NODE, "a") == {"10.0.1.1", "10.0.1.2"}
    assert chosen(Placement.NODE, "b") == {"10.0.1.3"}
    assert chosen(Placement.SERVICE_ACCOUNT, "a") == {"10.0.1.1"}
    assert chosen(Placement.NODE, "c") == everywhere, "where a route led it"
