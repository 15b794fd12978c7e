"""What is derived from a workload's or service's fields."""

from __future__ import annotations

import pytest

from control.api.identity import SpiffeId
from control.api.workload import Service, Workload


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
