"""What is planned from a run, against what that run has measured.

run.json is what a quick run of the suite has found, without histograms.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from benchmarks.harness.compare import load
from benchmarks.plan.model import L4, Demand, Model, _cheaper, demand, fit
from benchmarks.plan.topology import Instance, PlanError, Workload
from benchmarks.plan.traffic import Call, Traffic
from benchmarks.suites.placements.application import INSTANCES, SERVICES
from control.cli.__main__ import main

RUN = Path(__file__).parent / "run.json"
RATE = 500
KNOWN = ("sidecar", "node", "service-account", "remote")
CALLERS, CALLED = [one.caller for one in SERVICES], [one.name for one in SERVICES]
# On each host, so many of each: a caller of each account stands on the other host, too, and asks nothing there.
PLACES = [("a", CALLERS, INSTANCES), ("b", CALLED, INSTANCES), ("b", CALLERS, 1)]


def its_own() -> Demand:
    """The suite's own traffic: each caller asks its service, and all of them RATE times a second."""
    calls = [
        Call(
            Workload("default", one.caller), Workload("default", one.name), f"default/{one.name}", RATE / len(SERVICES)
        )
        for one in SERVICES
    ]
    instances = [
        Instance(Workload("default", account), f"{node}{number}", account, node)
        for node, accounts, count in PLACES
        for account in accounts
        for number in range(count)
    ]
    return demand(Traffic(calls, 0.0, []), instances, None)


@pytest.fixture(scope="module")
def results():
    return load(RUN)


def measured(results, measure, subject):
    return median(one.value for one in results.find(f"architectures/{measure}", subject).rounds)


def test_of_its_own_traffic_a_run_predicts_what_it_measured(results):
    for one in Model(results).estimates(its_own()):
        assert one.subject in KNOWN
        cores = measured(results, "cpu", one.subject) * RATE / 1e6
        assert one.cores == pytest.approx(cores, rel=0.01)
        assert one.memory_gb == pytest.approx(measured(results, "memory", one.subject) / 1000, rel=0.05)


def test_the_memory_of_a_placement_that_was_left_out_is_predicted(results):
    points = {
        name: [
            (int(one.details[f"host_{host}_processes"]), one.details[f"host_{host}_mb"])
            for one in results.find("architectures/memory", name).rounds
            for host in ("a", "b")
        ]
        for name in ("sidecar", "node", "service-account")
    }
    line = fit(points["sidecar"] + points["node"])
    for count, mb in points["service-account"]:
        assert line.of(count) == pytest.approx(mb, rel=0.05)


def test_where_no_call_needs_l7_uproxies_have_no_waypoint(results):
    none = replace(its_own(), l7_share=0.0, called={}, called_accounts={}, l7_per_second={})
    remote = next(one for one in Model(results).estimates(none) if one.subject == "remote")
    assert remote.processes == sum(len(accounts) * count for _, accounts, count in PLACES)
    assert remote.cores == pytest.approx(measured(results, "l7-cpu/0", "remote") * RATE / 1e6, rel=0.01)
    assert remote.memory_gb == pytest.approx(measured(results, "memory", L4) / 1000, rel=0.02)


def test_more_calls_than_one_waypoint_is_planned_for_get_more_of_them(results):
    own = its_own()
    much = replace(own, per_second=20 * own.per_second, l7_per_second={"default": 10_000.0})
    few, many = (
        next(one for one in Model(results).estimates(asked) if one.subject == "remote") for asked in (own, much)
    )
    each_us = median(one.details["cpu_us/waypoint"] for one in results.find("architectures/cpu", "remote").rounds)
    # Half of a core of each is used.
    assert many.processes - few.processes == math.ceil(10_000 * each_us / 1e6 / 0.5) - 1


def test_the_least_has_no_interval_and_the_others_are_multiples_of_it(results):
    least, *others = Model(results).estimates(its_own())
    assert (least.to_least.low, least.to_least.median, least.to_least.high) == (1, 1, 1)
    for one in others:
        assert one.cost >= least.cost
        assert one.to_least.low <= one.to_least.median <= one.to_least.high


def test_uproxies_pay_between_the_shares_that_are_said(results):
    model, own = Model(results), its_own()
    even = model.break_even(own)
    assert even is not None
    assert 0 <= even.rounds <= even.of == 5
    for share in (0.001, 0.25, 0.5, 0.75, 1.0):
        scaled = {name: rate * share for name, rate in own.l7_per_second.items()}
        found = model.estimates(replace(own, l7_share=share, l7_per_second=scaled))
        cost = {one.subject: one.cost for one in found}
        cheaper = cost[even.around] < min(cost[name] for name in ("sidecar", "node", "service-account"))
        assert cheaper == (even.low is not None and even.high is not None and even.low < share < even.high)


@pytest.mark.parametrize(
    ("differences", "shares"),
    [
        pytest.param([(-1.0, 1.0), (-1.0, 3.0)], (0.0, 0.25), id="until one of them is cheaper"),
        pytest.param([(1.0, -1.0), (-1.0, -1.0)], (0.5, 1.0), id="from a share on"),
        pytest.param([(1.0, -3.0), (-3.0, 1.0)], (0.25, 0.75), id="between"),
        pytest.param([(3.0, -1.0), (-1.0, 3.0)], None, id="another one is cheaper everywhere"),
        pytest.param([(1.0, 1.0), (-1.0, -1.0)], None, id="one is"),
        pytest.param([(-1.0, -2.0)], (0.0, 1.0), id="always"),
    ],
)
def test_shares_are_those_at_which_nobody_else_is_cheaper(differences, shares):
    assert _cheaper(*differences) == shares


def test_services_that_need_l7_are_named_and_unknown_ones_refused():
    calls = [
        Call(Workload("x", "web"), Workload("x", name), f"x/{name}", rate)
        for name, rate in (("one", 3.0), ("two", 1.0))
    ]
    instances = [Instance(Workload("x", name), "1", name, "n") for name in ("web", "one", "two")]
    found = demand(Traffic(calls, 0.0, []), instances, ["x/two"])
    assert (found.l7_share, found.called, found.l7_per_second) == (0.25, {"n": 1}, {"x": 1.0})
    assert found.near_share == 1
    with pytest.raises(PlanError, match="nobody calls x/three"):
        demand(Traffic(calls, 0.0, []), instances, ["x/three"])


def test_calls_stay_on_their_node_as_often_as_instances_share_one():
    web, db = Workload("x", "web"), Workload("x", "db")
    calls = [Call(web, db, "x/db", 2.0)]
    places = [(web, "n1"), (web, "n2"), (db, "n1"), (db, "n2"), (db, "n2"), (db, "n3")]
    instances = [Instance(workload, str(number), "sa", node) for number, (workload, node) in enumerate(places)]
    # From n1 to the one of four that is there, from n2 to two of four.
    assert demand(Traffic(calls, 0.0, []), instances, None).near_share == pytest.approx((1 / 4 + 2 / 4) / 2)


def test_a_line_goes_through_what_was_measured():
    assert fit([(1, 70.0), (4, 115.0)]).of(2) == pytest.approx(85.0)
    assert fit([(4, 100.0)]).of(2) == pytest.approx(50.0)
    assert fit([(1, 70.0), (2, 85.0), (4, 120.0)]).error == pytest.approx(0.01, abs=0.01)
    assert fit([(1, 70.0)]).of(0) == 0


# -- the command


@pytest.fixture
def files(tmp_path):
    named = (
        'reporter="source",source_workload="web",source_workload_namespace="shop",destination_workload="reviews",'
        'destination_workload_namespace="shop",destination_service_name="reviews",destination_service_namespace="shop"'
    )
    (tmp_path / "metrics.txt").write_text(f"istio_requests_total{{{named}}} 1800000\n")
    (tmp_path / "nodes.csv").write_text(
        "namespace,workload,service_account,node\nshop,web,web,n1\nshop,reviews,reviews,n2\n"
    )
    return [
        *("bench", "plan", "--prometheus", str(tmp_path / "metrics.txt"), "--seconds", "3600"),
        *("--topology", str(tmp_path / "nodes.csv"), "--run", str(RUN)),
    ]


def test_the_command_says_which_is_least_and_how_sure_that_is(files, capsys):
    assert main(files) == 0
    out = capsys.readouterr().out
    assert "500 calls/s between 2 instances on 2 nodes, 100% of which need L7" in out
    assert "\nleast: " in out
    assert "in the run itself: memory, sidecar: " in out


def test_programs_get_all_of_it(files, capsys):
    assert main([*files, "-o", "json", "--core-gb", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["core_gb"] == 4
    for one in found["placements"]:
        assert one["cost"] == pytest.approx(one["cores"] + one["memory_gb"] / 4)


def test_a_run_that_did_not_measure_placements_is_refused(files, tmp_path, results, capsys):
    kept = [one for one in results.measures if one.suite != "architectures"]
    lacking = json.loads(json.dumps(results.to_json()))
    lacking["measures"] = [one for one in lacking["measures"] if one["name"] in {each.name for each in kept}]
    lacking["series"] = []
    (tmp_path / "results.json").write_text(json.dumps(lacking))
    assert main([*files[:-1], str(tmp_path)]) == 2
    assert "meshctl bench run --suite architectures" in capsys.readouterr().err


def test_without_a_run_here_one_has_to_be_named(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(files[:-2]) == 2
    assert "--run" in capsys.readouterr().err
