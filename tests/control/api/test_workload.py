"""What is derived from a workload's or service's fields."""

from __future__ import annotations

import pytest

from control.api.identity import SpiffeId
from control.api.workload import Endpoint, Service, ServicePort, Workload


def workload(labels):
    identity = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/web")
    return Workload("shop", "web-1", "web", identity, ("10.0.0.1",), labels, {}, "", 1)


@pytest.mark.parametrize(
    ("labels", "service", "revision", "app", "version"),
    [
        ({}, "web-1", "latest", "", ""),
        ({"app": "a", "version": "v"}, "a", "v", "a", "v"),
        ({"app.kubernetes.io/name": "k", "app.kubernetes.io/version": "w"}, "k", "w", "k", "w"),
        ({"app": "a", "app.kubernetes.io/name": "k"}, "k", "latest", "a", ""),
        (
            {"service.istio.io/canonical-name": "c", "service.istio.io/canonical-revision": "r", "app": "a"},
            "c",
            "r",
            "a",
            "",
        ),
    ],
)
def test_canonical_names_come_from_labels_in_istios_order(labels, service, revision, app, version):
    found = workload(labels)
    assert (found.canonical_service, found.canonical_revision) == (service, revision)
    assert (found.app, found.version) == (app, version)


def test_workloads_are_equal_by_content_and_can_stand_in_sets():
    assert workload({"a": "b"}) == workload({"a": "b"}) != workload({"a": "c"})
    assert len({workload({"a": "b"}), workload({"a": "b"}), workload({"a": "c"})}) == 2


def test_keys_and_host_names():
    service = Service("shop", "web", (), (), {}, ())
    assert (service.key, service.hostname) == ("shop/web", "web.shop.svc.cluster.local")
    assert workload({}).key == "shop/web-1"


def test_an_endpoint_tells_of_its_workload_what_a_caller_must_know():
    identity = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/reviews")
    labels = {"app": "reviews", "version": "v2"}
    endpoint = Endpoint("shop/ratings", "shop/reviews.v2", "10.0.0.1", identity, {80: 8080}, 3, True, labels)
    workload = endpoint.as_workload()
    assert (workload.key, workload.service_account, workload.identity) == ("shop/reviews.v2", "reviews", identity)
    assert (workload.addresses, workload.weight) == (("10.0.0.1",), 3)
    assert (workload.canonical_service, workload.canonical_revision) == ("reviews", "v2")


@pytest.mark.parametrize(
    ("name", "app_protocol", "http"),
    [
        ("http", "", True),
        ("http-web", "", True),
        ("httpx", "", False),
        ("https", "", False),
        ("", "", False),
        ("raw", "http", True),
        ("raw", "http/1.1", True),
        ("http", "tcp", False),
        ("http", "kubernetes.io/h2c", True),
        ("grpc", "", True),
        ("grpcs", "", False),
    ],
)
def test_a_port_is_http_by_its_protocol_else_by_its_name(name, app_protocol, http):
    assert ServicePort(name, 80, 80, app_protocol).is_http is http


@pytest.mark.parametrize(
    ("name", "app_protocol", "http2"),
    [
        ("http", "", False),
        ("http2", "", True),
        ("grpc", "", True),
        ("grpc-orders", "", True),
        ("grpc-web", "", False),
        ("grpc", "http", False),
        ("http", "grpc", True),
        ("", "kubernetes.io/h2c", True),
        ("", "grpc-web", False),
        ("", "kubernetes.io/ws", False),
    ],
)
def test_which_ports_speak_http2(name, app_protocol, http2):
    port = ServicePort(name, 80, 80, app_protocol)
    assert port.is_http2 is http2
    assert port.is_http
