"""What is counted of requests stays bounded, whatever callers and backends say."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from control.api.address import parse_address
from control.api.identity import SpiffeId
from control.api.workload import Workload
from uproxy.telemetry import IDLE_S, MAX_SERIES, Peer
from waypoint import telemetry
from waypoint.telemetry import Exchange, WaypointTelemetry

FLAGS = ("-", "DC", "UF", "NR", "UAEX")


def workload(name: str) -> Workload:
    identity = SpiffeId.parse(f"spiffe://cluster.local/ns/shop/sa/{name}")
    address = parse_address("10.0.0.1")
    return Workload("shop", name, name, identity, (address,), {"app": name}, {}, "", 1)


PEER = Peer("10.0.0.1:1", workload("web"), "spiffe://cluster.local/ns/shop/sa/web")


def exchange(**fields: object) -> Exchange:
    made = Exchange(PEER, PEER, 0.0, "id", destination_service="shop/db", status=200)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def label_sets(counted: WaypointTelemetry) -> list[dict[str, str]]:
    lines = re.findall(r"^istio_requests_total\{(.*)\} \d+$", counted.render().decode(), re.MULTILINE)
    return [dict(re.findall(r'(\w+)="([^"]*)"', line)) for line in lines]


def hostile() -> Iterator[Exchange]:
    """What callers write into their requests, and what backends answer."""
    for number in range(2000):
        yield exchange(method=f"M{number}", path=f"/{number}", authority=f"h{number}", user_agent=str(number))
        yield exchange(request_id=str(number), route="", protocol=f"HTTP/{number}")
        yield exchange(status=100 + number % 900)
        yield exchange(grpc=True, grpc_status=str(number % 1000))


def test_callers_and_backends_make_no_label_sets_of_their_own() -> None:
    counted = WaypointTelemetry("1")
    for one in hostile():
        counted.answered(one, 1.0)
    found = label_sets(counted)
    assert len(found) < 120
    codes = {labels["response_code"] for labels in found}
    assert {"200", "404", "503", "6xx", "9xx", "4xx"} <= codes
    assert all(re.fullmatch(r"[1-5]\d\d|[1-9]xx", code) for code in codes)
    grpc = {labels["grpc_response_status"] for labels in found if "grpc_response_status" in labels}
    assert grpc == {str(number) for number in range(17)} | {"unknown"}
    assert b"\nuproxy_telemetry_overflow_total 0" in counted.render()


def test_more_callers_than_there_is_room_for_are_counted_together() -> None:
    counted = WaypointTelemetry("1")
    for number in range(3 * MAX_SERIES):
        name = f"w{number}"
        caller = Peer("10.0.0.1:1", workload(name), f"spiffe://cluster.local/ns/shop/sa/{name}")
        one = exchange(status=100 + number % 900, flag=FLAGS[number % len(FLAGS)])
        one.source = caller
        counted.answered(one, float(number % 100))
    found = label_sets(counted)
    strangers = [labels for labels in found if labels["source_workload"] == "unknown"]
    assert len(found) - len(strangers) == MAX_SERIES
    assert len(strangers) <= 9 * len(FLAGS)
    for labels in strangers:
        known = {name for name, value in labels.items() if value != "unknown"}
        assert known == {
            "reporter",
            "request_protocol",
            "response_code",
            "response_flags",
            "connection_security_policy",
        }
        assert re.fullmatch(r"\dxx", labels["response_code"])
    total = sum(int(value) for value in re.findall(rb"^istio_requests_total\{.*\} (\d+)$", counted.render(), re.M))
    assert total == 3 * MAX_SERIES, "none is lost"
    assert b"\nuproxy_telemetry_overflow_total %d" % (2 * MAX_SERIES) in counted.render()


def test_label_sets_that_nobody_uses_give_up_their_place() -> None:
    counted = WaypointTelemetry("1")
    for number in range(MAX_SERIES):
        counted.answered(exchange(destination_service=f"shop/s{number}"), 0.0)
    counted.answered(exchange(destination_service="shop/s0"), IDLE_S)
    counted.answered(exchange(destination_service="shop/new"), IDLE_S + 1)
    services = {labels["destination_service_name"] for labels in label_sets(counted)}
    assert services == {"s0", "new"}


@pytest.mark.parametrize("family", [telemetry.DURATION, telemetry.RECEIVED, telemetry.SENT])
def test_histograms_hold_together(family: str) -> None:
    counted = WaypointTelemetry("1")
    for size in (0, 1, 700, 10_000_000):
        one = exchange(received=size, sent=size)
        one.started = 10.0 - size / 1000
        counted.answered(one, 10.0)
    lines = counted.render().decode().splitlines()
    buckets = [int(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{family}_bucket{{")]
    assert buckets == sorted(buckets)
    assert (buckets[0], buckets[1], buckets[-1]) == (1, 2, 4)
    (count,) = [line for line in lines if line.startswith(f"{family}_count{{")]
    (total,) = [line for line in lines if line.startswith(f"{family}_sum{{")]
    assert count.endswith("} 4")
    assert float(total.rpartition(" ")[2]) == 10_000_701
