"""What Prometheus says of requests, in both its forms, and where instances are."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.plan import topology, traffic
from benchmarks.plan.topology import Instance, PlanError, Workload

WEB, REVIEWS = Workload("shop", "web"), Workload("shop", "reviews")


def labels(reporter="source", source="web", destination="reviews", **more):
    return {
        "reporter": reporter,
        "source_workload": source,
        "source_workload_namespace": "shop",
        "destination_workload": destination,
        "destination_workload_namespace": "shop",
        "destination_service_name": "reviews",
        "destination_service_namespace": "shop",
        **more,
    }


def exposition(*samples):
    def line(named, value):
        escaped = {k: v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for k, v in named.items()}
        return "istio_requests_total{" + ",".join(f'{k}="{v}"' for k, v in escaped.items()) + f"}} {value}"

    return "\n".join(["# TYPE istio_requests_total counter", *(line(*one) for one in samples), "other_total 3", ""])


def query(*samples, kind="vector"):
    result = [{"metric": named, "value": [1_790_000_000.1, str(value)]} for named, value in samples]
    return json.dumps({"status": "success", "data": {"resultType": kind, "result": result}})


def test_both_forms_say_the_same():
    counted = traffic.read(exposition((labels(), 7200), (labels(response_code="503"), 360)), 3600)
    asked = traffic.read(query((labels(), 2.0), (labels(response_code="503"), 0.1)), None)
    assert counted == asked
    (call,) = counted.calls
    assert (call.source, call.destination, call.service) == (WEB, REVIEWS, "shop/reviews")
    assert counted.per_second == pytest.approx(2.1)


def test_a_request_that_several_report_is_one():
    found = traffic.read(query((labels("source"), 5), (labels("destination"), 6), (labels("waypoint"), 4)), None)
    assert found.per_second == 6


def test_what_comes_from_or_goes_outside_is_left_out_and_said():
    found = traffic.read(query((labels(), 5), (labels(source="unknown"), 2), (labels(destination="unknown"), 1)), None)
    assert (found.per_second, found.outside_per_second) == (5, 3)


def test_a_reporters_own_pod_and_node_are_an_instance():
    named = {"pod": "web-1", "node": "n1", "source_principal": "spiffe://cluster.local/ns/shop/sa/front"}
    assert traffic.read(query((labels(**named), 1)), None).instances == [Instance(WEB, "web-1", "front", "n1")]
    assert traffic.read(query((labels("waypoint", **named), 1)), None).instances == []


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), max_size=20))
def test_a_label_reads_as_it_was_before_it_was_escaped(text):
    found = traffic.read(exposition((labels(response_flags=text, destination_service_name=text), 1)), 1)
    assert found.calls[0].service == f"shop/{text}"


@given(st.text(max_size=60))
def test_anything_else_is_refused_and_never_breaks(text):
    for read in (traffic.read, lambda text, _: topology.read(text)):
        for whole in (text, f"istio_requests_total{text}", f'{{"items": [{text}]}}', f'{{"status": {text}}}'):
            with contextlib.suppress(PlanError):
                read(whole, 1)


@pytest.mark.parametrize(
    ("text", "seconds", "says"),
    [
        pytest.param("up 1\n", 1, "no istio_requests_total", id="another metric"),
        pytest.param(exposition((labels(), 1)), None, "--seconds", id="counters without a time"),
        pytest.param(query((labels(), 1)), 60, "need no --seconds", id="rates with one"),
        pytest.param(query((labels(), 1), kind="matrix"), None, "instant query", id="a range"),
        pytest.param(query((labels(), "NaN")), None, "NaN", id="no number"),
        pytest.param(query((labels(), 0)), None, "no request", id="nothing asked"),
        pytest.param('{"status": "error", "error": "bad query"}', None, "bad query", id="a query that failed"),
        pytest.param('istio_requests_total{a="b} 1', 1, "line 1", id="a broken line"),
        pytest.param(query(({"__name__": traffic.METRIC, **labels()}, 1), (labels(), 1)), 1, "some are", id="both"),
    ],
)
def test_what_cannot_be_planned_with_is_said(text, seconds, says):
    with pytest.raises(PlanError, match=says):
        traffic.read(text, seconds)


def test_pods_are_instances_of_what_istio_calls_their_workload():
    def pod(name, owner, phase="Running", node="n1"):
        metadata = {
            "namespace": "shop",
            "name": name,
            "labels": {"pod-template-hash": "5d9f"},
            "ownerReferences": owner,
        }
        spec = {"serviceAccountName": "sa", **({"nodeName": node} if node else {})}
        return {"metadata": metadata, "spec": spec, "status": {"phase": phase}}

    replicas = [{"kind": "ReplicaSet", "name": "web-5d9f", "controller": True}]
    stateful = [{"kind": "StatefulSet", "name": "db", "controller": True}]
    pods = [
        pod("web-5d9f-a", replicas),
        pod("db-0", stateful, node="n2"),
        pod("bare", []),
        pod("web-5d9f-b", replicas, node=""),
        pod("job-1", [], "Succeeded"),
    ]
    assert topology.read(json.dumps({"items": pods})) == [
        Instance(WEB, "web-5d9f-a", "sa", "n1"),
        Instance(Workload("shop", "db"), "db-0", "sa", "n2"),
        Instance(Workload("shop", "bare"), "bare", "sa", "n1"),
    ]


def test_rows_are_instances_and_a_workload_without_any_is_named():
    found = topology.read("node,namespace,workload,service_account\nn1,shop,web,front\nn2,shop,web,front\n")
    assert [(one.workload, one.account, one.node) for one in found] == [(WEB, "front", "n1"), (WEB, "front", "n2")]
    assert topology.of([WEB], found) == found
    with pytest.raises(PlanError, match="shop/reviews"):
        topology.of([WEB, REVIEWS], found)
    with pytest.raises(PlanError, match="line 2"):
        topology.read("namespace,workload,service_account,node\nshop,web,,n1\n")
    with pytest.raises(PlanError, match="columns"):
        topology.read("namespace,workload\n")
