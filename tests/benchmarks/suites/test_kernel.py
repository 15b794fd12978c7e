"""The suite `kernel`: every subject measured for real, at tiny sizes; and that it notices what it does not measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.harness.bench import Bench
from benchmarks.harness.results import Results, Round
from benchmarks.harness.targets import TARGETS
from benchmarks.lab.node import Node
from benchmarks.lab.remains import left_of
from benchmarks.lab.topology import Lab
from benchmarks.suites import kernel
from benchmarks.suites.kernel import Kernel, Plan
from benchmarks.suites.maps import Size
from control.api.address import IpAddress
from uproxy.node.workloads import Captured

TINY = Plan(
    dialled=("outside", "service", "workload"),
    sizes={2: 64},
    streams=(1,),
    rounds=1,
    near_rounds=1,
    fillings=1,
    seconds=0.2,
    large=Size(300, 3000, 100),
)
CAPTURED, DIRECT = "kernel: what is dialled in the mesh is captured", "kernel: what is granted goes directly"


def measured(directory: Path, plan: Plan = TINY) -> Bench:
    bench = Bench(Results("now", quick=True), directory, quick=True)
    Kernel(plan).run(bench)
    return bench


def rounds(bench: Bench, measure: str, subject: str) -> Round:
    (found,) = (one for one in bench.results.series if (one.measure, one.subject) == (measure, subject))
    assert found.rounds, found.refused
    return found.rounds[0]


def passed(bench: Bench, name: str) -> bool:
    (found,) = (check.passed for check in bench.results.checks if check.name.startswith(name))
    return found


def test_what_a_quick_run_measures_decides_on_every_target() -> None:
    aimed = {target.measure for target in TARGETS if target.measure.startswith("kernel/")}
    quick, whole = ({probe.measure.name for probe in kernel.near_probes(plan)} for plan in (kernel.QUICK, kernel.WHOLE))
    assert aimed
    assert aimed <= quick <= whole


@pytest.mark.root
@pytest.mark.mesh
def test_every_subject_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs: list[Lab] = []

    def lab() -> Lab:
        labs.append(Lab())
        return labs[-1]

    monkeypatch.setattr(kernel, "Lab", lab)
    bench = measured(tmp_path)
    assert left_of(labs[0].names.prefix) == []
    assert not bench.failures
    assert all(check.passed for check in bench.results.checks), bench.results.checks
    for one in bench.results.series:
        assert one.rounds, (one.measure, one.subject, one.refused)
        assert one.rounds[0].value > 0
    assert [one.name for one in bench.results.measures] == [
        *("kernel/connect/outside", "kernel/connect/service", "kernel/connect/workload"),
        *("kernel/direct/rr/2/64", "kernel/direct/bulk/1", "kernel/direct/connect"),
        *("kernel/programs/connection", "kernel/maps/memory", "kernel/maps/address", "kernel/maps/backend"),
        "kernel/filling/all",
    ]
    ran = rounds(bench, "kernel/programs/connection", "captured").details
    assert {"connect4_us", "sockops_app_us", "sockops_proxy_us"} <= ran.keys()
    near = rounds(bench, "kernel/programs/connection", "direct").details
    assert "sockops_proxy_us" not in near, "no proxy takes part"
    assert 0.5 < sum(near[hook] for hook in near if hook.startswith(("connect4", "sockops"))) < 100
    small, large = (rounds(bench, "kernel/maps/memory", name).value for name in ("captured", "captured-full"))
    assert large - small == pytest.approx(3200 * 90 / 1e6, rel=0.5)
    assert rounds(bench, "kernel/connect/service", "captured-full").details["connection_us"] > 10
    added = rounds(bench, "kernel/connect/service", "captured")
    assert added.details["added_us"] == added.value - rounds(bench, "kernel/connect/service", "bare").value


@pytest.mark.root
@pytest.mark.mesh
def test_a_direct_path_that_is_not_taken_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connections are captured instead, and a listener answers there: the numbers alone would not tell."""
    lead = Node.lead_directly

    def without_a_grant(on: Node, caller: Captured, vip: IpAddress, target: Captured, ports: Sequence[int]) -> None:
        lead(on, caller, vip, target, ports)
        for pair in on.maps.grants.items():
            on.maps.grants.delete(pair)

    monkeypatch.setattr(Node, "lead_directly", without_a_grant)
    bench = measured(tmp_path, replace(TINY, dialled=("service",)))
    assert passed(bench, CAPTURED)
    assert not passed(bench, DIRECT)
    assert rounds(bench, "kernel/direct/connect", "direct").value > 0
