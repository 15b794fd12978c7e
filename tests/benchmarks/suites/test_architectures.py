"""The suite `architectures`: each placement does what it is measured for, and the measures say what they claim."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import load
from benchmarks.harness.bench import Bench, BenchError
from benchmarks.harness.results import Results, Round, Series, Subject
from benchmarks.lab import cores
from benchmarks.lab.capture import Capture, occurs
from benchmarks.lab.evidence import fresh_payload
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Lab
from benchmarks.report import placements
from benchmarks.suites import architectures
from benchmarks.suites.placements import configuration, density, isolation, mix, replacing
from benchmarks.suites.placements.application import HTTP_PORT, LIMIT_PER_S, SERVICES
from benchmarks.suites.placements.envoys import LOOPBACK
from benchmarks.suites.placements.memory import resident_mb, size_mb, with_children
from benchmarks.suites.placements.mix import Mix
from benchmarks.suites.placements.placement import PLAIN, Envoy, NodeAgent
from benchmarks.suites.placements.proof import prove
from benchmarks.suites.placements.standing import Site, stand

OURS = ("ours", "ours-node", "ours-service-account", "ours-sidecar")
WITH_L7 = ("sidecar", "sidecar-one-pass", "node", "service-account", "remote", *OURS)
PROXIED = (*WITH_L7, "remote-l4")
SOME = ("sidecar", "remote-l4", PLAIN)
"""Proven and measured as a run does it."""
REPLACED = ("service-account", "ours")
"""Proven when their processes have been replaced."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture(scope="module")
def site(lab: Lab) -> Site:
    return stand(lab, lambda line: None)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return load.build(tmp_path_factory.mktemp("load"))


@pytest.mark.root
@pytest.mark.parametrize("name", [one for one in PROXIED if one not in (*SOME, *REPLACED)])
def test_a_placement_routes_refuses_and_knows_who_calls(site: Site, name: str) -> None:
    prove(site, name)


@pytest.mark.root
def test_what_does_none_of_it_is_found_out(site: Site) -> None:
    """The proof of a placement with L7, of one that has none."""
    for without in (PLAIN, "remote-l4"):
        broken = dataclasses.replace(site, placements={"sidecar": site.placements[without]})
        with pytest.raises(LabError, match="where the caller is"):
            prove(broken, "sidecar")


@pytest.mark.root
def test_requests_cross_between_hosts_in_the_clear_without_a_proxy_only(lab: Lab, site: Site, tmp_path: Path) -> None:
    paths = {name: f"/{fresh_payload()}" for name in (*PROXIED, PLAIN)}
    with Capture(lab.hosts[1], tmp_path / "underlay.pcap") as capture:
        for name, path in paths.items():
            assert site.placements[name].callers[0].ask(SERVICES[0].name, path).status == 200
        capture.await_segment(HTTP_PORT)
    seen = [name for name, path in paths.items() if occurs(path.encode(), capture.file_bytes())]
    assert seen == [PLAIN]


@pytest.mark.root
def test_a_process_holds_the_keys_of_whom_it_speaks_for(site: Site) -> None:
    held = {
        name: sorted(
            sorted(identity.rpartition("/")[2] for identity in one.private_keys().values()) for one in placement.mesh
        )
        for name, placement in site.placements.items()
    }
    each = [*3 * [["cart"]], *2 * [["ratings"]], *2 * [["reviews"]], *3 * [["web"]]]
    assert held == {
        "sidecar": each,
        "sidecar-one-pass": each,
        "node": [["cart", "ratings", "reviews", "web"], ["cart", "web"]],
        "service-account": [["cart"], ["cart"], ["ratings"], ["reviews"], ["web"], ["web"]],
        "remote": [[], [], *each, ["wp"]],
        "remote-l4": [[], [], *each],
        "ours": [[], [], *each[:3], ["ours"], *each[3:]],
        "ours-node": [[], [], *each[:3], ["ours-node"], *each[3:]],
        "ours-service-account": [[], [], *sorted([*each, ["ratings"], ["reviews"]])],
        "ours-sidecar": [[], [], *each],
        PLAIN: [],
    }
    for name in PROXIED:
        serials = [serial for one in site.placements[name].mesh for serial in one.private_keys()]
        assert len(set(serials)) == len(serials), "two processes have the same key"


@pytest.mark.root
def test_processes_on_other_cores_are_found_out(site: Site, tmp_path: Path) -> None:
    """What uProxies start is looked at, too."""
    bench = Bench(Results("now", quick=True), tmp_path, quick=True)
    beside = site.placements["ours-sidecar"]
    architectures._check_core(bench, [beside])
    with subprocess.Popen(["sh", "-c", "sleep 60 & wait"], process_group=0) as parent:
        stranger = NodeAgent("stranger", "node agent", "a", parent.pid, tmp_path)
        cores.pin([parent.pid], cores.LAST)
        architectures._check_core(bench, [dataclasses.replace(beside, mesh=[*beside.mesh, stranger])])
        os.killpg(parent.pid, signal.SIGKILL)
    assert [one.passed for one in bench.results.checks] == [True, cores.FIRST == cores.LAST]


@pytest.mark.root
@pytest.mark.parametrize(
    ("name", "asked"),
    [("service-account", Mix(200)), ("node", Mix(200, l7=0.5, near=1.0))],
    ids=["far", "mixed"],
)
def test_all_callers_together_make_the_rate(site: Site, program: Path, name: str, asked: Mix) -> None:
    sample = mix.take(program, site.placements[name], asked, 0.8, 1)
    assert sample.counted is not None
    begin, end = sample.counted
    assert sample.operations * 1e9 / (end - begin) == pytest.approx(200, rel=0.25)
    assert 0 < sample.details["p50_us"] <= sample.value == sample.details["p99_us"] <= sample.details["p999_us"]


@pytest.mark.root
def test_a_request_that_is_refused_ends_the_round(site: Site, program: Path) -> None:
    placement = site.placements["sidecar"]
    strangers = [
        dataclasses.replace(one, member=dataclasses.replace(one.member, account=SERVICES[1].caller))
        for one in placement.callers
        if one.member.account == SERVICES[0].caller
    ]
    with pytest.raises(BenchError, match="sidecar"):
        mix.take(program, dataclasses.replace(placement, callers=strangers), Mix(200), 0.3, 1)


@pytest.mark.root
def test_what_a_report_declares_of_placements_is_so(site: Site) -> None:
    """How many processes read HTTP and carry connections, and how often a call leaves a namespace in the clear."""
    for name in placements.READERS:
        mesh = [one for one in site.placements[name].mesh if one.role != "node agent"]
        readers = [one for one in mesh if one.role == "waypoint"]
        carriers = [one for one in mesh if one.role != "waypoint"]
        if name == "ours-sidecar":  # what its uProxies have started
            readers = [one for one in mesh if len(with_children(one.pid)) > 1]
        assert (len(readers or carriers), len(carriers)) == (placements.READERS[name], placements.CARRIERS[name]), name
    for name in WITH_L7:
        proxied = [one for one in site.placements[name].callers if isinstance(site.placements[name].mesh[0], Envoy)]
        outside = {address != LOOPBACK for one in proxied for address, _ in one.entries.values()} or {False}
        assert outside == {placements.BETWEEN.get(name, 0) == 2}, name


def test_what_the_bad_filter_starts_is_not_charged_to_a_waypoint(tmp_path: Path) -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo; wait"], process_group=0, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        charged = [
            len(architectures._processes(NodeAgent("x", role, "a", parent.pid, tmp_path)))
            for role in ("waypoint", "server proxy")
        ]
        os.killpg(parent.pid, signal.SIGKILL)
    assert charged == [1, 2]


TOUCH = """
import mmap, os, sys
held = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_ANONYMOUS | mmap.{flag})
child = os.fork()
for at in range(0, len(held), mmap.PAGESIZE):
    held[at] = 1
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.mark.root
@pytest.mark.parametrize(("flag", "times"), [("MAP_SHARED", 1), ("MAP_PRIVATE", 2)])
def test_memory_counts_once_where_processes_share_it(flag: str, times: int) -> None:
    program = [sys.executable, "-I", "-S", "-c", TOUCH.format(flag=flag)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(2)]
        both, alone = resident_mb(pids), [resident_mb([pid]) for pid in pids]
        process.communicate("")
    assert min(alone) > 33
    assert 33 * times < both < 33 * times + 25


def results() -> Results:
    """One measure of two rounds, with and without a proxy."""
    found = Results("now", quick=True)
    for subject, added in ((PLAIN, 0), ("sidecar", 700)):
        rounds = [
            Round(
                number,
                number * 100 + added,
                {
                    "p50_us": number * 10,
                    "p99_us": number * 100 + added,
                    "p999_us": number * 200 + added,
                    "cpu_us": 500 * number,
                    "cpu_us/server proxy": 300,
                    "behind_share": 0.0,
                },
                bottleneck="sent late",
            )
            for number in (1, 2)
        ]
        found.series.append(Series("architectures/latency/500", subject, rounds, refused="sent late"))
    return found


def test_latency_is_compared_with_the_wire_of_the_same_round() -> None:
    found = results()
    architectures.add_difference(found, "architectures/latency/500")
    sidecar = found.find("architectures/latency/500", "sidecar")
    assert sidecar is not None
    added = [[one.details[f"added_{key}_us"] for key in ("p50", "p99", "p999")] for one in sidecar.rounds]
    assert added == [[0, 700, 700]] * 2


def test_processor_time_counts_although_requests_were_sent_late_but_not_when_answers_were_missing() -> None:
    found = results()
    architectures.add_cpu(found, "architectures/latency/500", architectures.CPU)
    cpu = found.find("architectures/cpu", "sidecar")
    assert cpu is not None
    assert (cpu.refused, [one.value for one in cpu.rounds]) == ("", [500, 1000])
    assert [one.details for one in cpu.rounds] == [{"cpu_us/server proxy": 300}] * 2
    overloaded = results()
    for series in overloaded.series:
        series.rounds = [
            dataclasses.replace(one, details={**one.details, "behind_share": 0.2}) for one in series.rounds
        ]
    architectures.add_cpu(overloaded, "architectures/latency/500", architectures.CPU)
    cpu = overloaded.find("architectures/cpu", "sidecar")
    assert cpu is not None
    assert "sent late" in cpu.refused


@pytest.mark.root
def test_a_run_measures_every_placement(lab: Lab, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a tiny size, on some of what stands: every measure has a number for every placement."""
    some = dataclasses.replace(site, placements={name: site.placements[name] for name in SOME})
    tiny = architectures.Plan(
        rates=(architectures.CPU_RATE,),
        rounds=1,
        seconds=0.4,
        l7_percent=(50,),
        rtts_ms=(1.0,),
        axis_rounds=1,
        axis_seconds=0.4,
    )
    monkeypatch.setattr(architectures, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(architectures, "QUICK", tiny)
    monkeypatch.setattr(architectures, "Lab", lambda: contextlib.nullcontext(lab))
    monkeypatch.setattr(architectures, "stand", lambda lab, progress, *, further: some)
    found = Results("now", quick=True)
    bench = Bench(found, tmp_path, quick=True)
    architectures.SUITE.run(bench)
    measured = {(one.measure, one.subject) for one in found.series if one.rounds}
    expected = {
        (f"architectures/{name}", subject)
        for name in ("latency/500", "rtt/1", "cpu", "memory", "identities")
        for subject in SOME[:-1]
    }
    expected |= {(f"architectures/{name}/50", subject) for name in ("l7", "l7-cpu") for subject in SOME[:-2]}
    expected |= {(f"architectures/{name}", PLAIN) for name in ("latency/500", "rtt/1")}
    # A machine that is too busy for four generators at once says so, of what was under way then.
    assert [one for one in bench.failures if "shared only" not in one] == []
    assert {subject for _, subject in expected - measured} == {one.split(": ")[1].split()[0] for one in bench.failures}
    placed, together, apart = found.checks
    assert placed.passed
    assert together.passed, together.text
    # How exact delays are is the machine's matter.
    assert (apart.name, apart.details["lost"]) == ("architectures: hosts 1 ms apart", 0)
    assert "added_us" in apart.details


@pytest.mark.root
@pytest.mark.parametrize(
    ("name", "situations", "buckets"),
    [("node", ["calm", "flood", "limited", "filter"], 2), ("ours-service-account", ["limited", "filter"], 1)],
    ids=["envoy", "waypoint"],
)
def test_a_neighbour_does_what_is_asked_of_it(
    site: Site, program: Path, name: str, situations: list[str], buckets: int
) -> None:
    """At an Envoy and at our waypoint: the flood is as fast as it goes, the limit holds, the filter burns.

    `buckets`: an Envoy of a node has one for each workload that is called.
    """
    seconds = 0.5
    probes = {probe.measure.name.rpartition("/")[2]: probe for probe in isolation.probes("architectures", program)}
    taken = {one: probes[one].take(site.placements[name], seconds, 1) for one in situations}
    assert {one.operations for one in taken.values()} == {0}, "proxies' time is not of these requests alone"
    found = {one: sample.details for one, sample in taken.items()}
    for situation, told in found.items():
        assert (told["neighbour_per_second"] > 0) == (situation != "calm")
        assert not told["neighbour_refused"] or situation == "limited"
    # However slow the machine: what a bucket holds, what comes into it in a second, and less than as much again that
    # was on its way when counting began.
    assert found["limited"]["neighbour_per_second"] * (seconds * 1.1 + 0.4) < 3 * buckets * LIMIT_PER_S


@pytest.mark.root
@pytest.mark.parametrize(
    ("name", "layers"),
    [("service-account", {"l7": "server proxy"}), ("ours", {"l7": "waypoint", "l4": "server proxy"})],
    ids=REPLACED,
)
def test_a_process_is_replaced_by_one_that_does_the_same(
    site: Site, program: Path, tmp_path: Path, name: str, layers: dict[str, str]
) -> None:
    """`layers`: the role of the process that is replaced of each."""
    placement = site.placements[name]
    before = {one.name: one.pid for one in placement.mesh}
    probes = [one for one in replacing.probes("a", program) if one.measure.name.rpartition("/")[2] in layers]
    found = Results("now", quick=False)
    Bench(found, tmp_path, quick=False).interleave(probes, [replacing.Replaceable(placement)], rounds=1, seconds=0.3)
    taken = [one.bottleneck for series in found.series for one in series.rounds]
    # The load is over before the former process drained.
    assert [one.startswith("replacing took longer") for one in taken] == [True] * len(layers)
    replaced = [one for one in placement.mesh if one.pid != before[one.name]]
    assert sorted(one.role for one in replaced) == sorted(layers.values())
    assert not [one for one in replaced if Path("/proc", str(before[one.name])).exists()]
    prove(site, name)


@pytest.mark.root
def test_configuration_is_looked_at_in_processes_of_every_kind(tmp_path: Path) -> None:
    """Each has proven to know what is declared. How much memory that takes is the machine's matter."""
    found = Results("now", quick=False)
    found.subjects += [Subject(name, name, "") for name in ("sidecar", "remote", "ours", PLAIN)]
    configuration.measure(Bench(found, tmp_path, quick=False), "architectures", (1, 2))
    assert "3 starts" in found.conditions["architectures: starts"]
    sizes = {one.measure for one in found.series}
    assert sizes == {"architectures/config/1", "architectures/config/2"}
    assert {one.subject for one in found.series} == {"sidecar", "remote", "ours"}
    assert {key for one in found.series for key in one.rounds[0].details} == {
        *("uproxy_kb", "node_agent_kb", "kernel_maps_kb", "envoy_kb", "envoy_waypoint_kb", "waypoint_kb"),
        *("most_kb", "processes"),
    }


@pytest.mark.root
def test_everything_that_a_placement_runs_stands_and_is_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process of every placement is a real one. How much memory that takes is the machine's matter."""
    monkeypatch.setattr(density, "_SETTLED_S", 0.0)
    monkeypatch.setattr(density, "_REST_S", 0.2)
    found = Results("now", quick=False)
    found.subjects += [Subject(name, name, "") for name in PROXIED]
    assert density.measure(Bench(found, tmp_path, quick=False), "architectures", (2,)) > 0
    told = {(one.measure.rpartition("/")[0], one.subject): one.rounds[0] for one in found.series}
    charged = set(PROXIED) - {"sidecar-one-pass"}
    uproxies = charged - {"sidecar", "node", "service-account"}
    assert told.keys() == {
        *(("architectures/density", name) for name in charged),
        *(("architectures/density-forked", name) for name in uproxies),
    }
    for (_, name), one in told.items():
        assert min(one.details[f"{what}_mb"] for what in ("host", "control_plane", "broker")) > 5
        assert (one.details["maps_mb"] > 0) == (name in uproxies)
        assert (one.details["waypoint_mb"] > 0) == (name in ("remote", "ours"))
    around = told["architectures/density", "remote-l4"].details["host_mb"]
    for name in OURS[1:]:
        assert told["architectures/density", name].details["host_mb"] > around + 5, "a process of its own"


def test_what_stands_on_a_host_is_charged_once_and_to_who_has_it(tmp_path: Path) -> None:
    """Pages of 1 MB each, as it were."""
    pages = 1_000_000 // resource.getpagesize() + 1
    mb = size_mb([set(range(pages))])

    def process(number: int) -> set[int]:
        """One page that all share, and one of its own."""
        return {*range(pages), *range((number + 1) * pages, (number + 2) * pages)}

    ours = ("ours", "ours-node", "ours-service-account")
    uproxies = density.Uproxies(
        [process(one) for one in range(10)],
        [process(one) | (process(20 + one) if one % 2 else set()) for one in range(10)],
        [process(10)],
    )
    held = density.Found(
        [process(30 + one) for one in range(10)],
        [process(40 + one) for one in range(6)],
        {2: process(50), 10: process(51)},
        {"wp": [process(60)], **{name: [process(61 + one) for one in range(3)] for name in ours}},
        {density.OWN: uproxies},
        maps_mb=0.5,
        control_mb=7.0,
        broker_mb=3.0,
    )
    found = Results("now", quick=False)
    found.subjects += [Subject(name, name, "") for name in PROXIED]
    density.add(Bench(found, tmp_path, quick=False), "architectures", held, (2, 10))
    told = {(one.measure.rpartition("/")[2], one.subject): one.rounds[0] for one in found.series}
    rest = 10.0
    wanted = {
        ("2", "sidecar"): 3 * mb,
        ("10", "sidecar"): 11 * mb,
        ("10", "node"): 2 * mb,
        ("2", "service-account"): 3 * mb,
        ("10", "service-account"): 7 * mb,
        ("2", "remote-l4"): 4 * mb + 0.5,
        ("2", "remote"): 4 * mb + 0.5 + 2 * mb,
        ("10", "ours-service-account"): 12 * mb + 0.5 + 3 * mb,
        ("2", "ours-service-account"): 4 * mb + 0.5 + mb,
        ("2", "ours-sidecar"): 4 * mb + 0.5 + mb,
        ("10", "ours-sidecar"): 12 * mb + 0.5 + 5 * mb,
    }
    assert {key: told[key].value for key in wanted} == pytest.approx({key: mb + rest for key, mb in wanted.items()})


def test_broker_and_control_plane_are_charged_to_every_placement_alike() -> None:
    found = results()
    architectures.add_cpu(found, "architectures/latency/500", architectures.CPU)
    architectures.add_control(found, 4000.0)  # a thousand requests are two seconds
    cpu = found.find("architectures/cpu", "sidecar")
    assert cpu is not None
    assert [(one.value, one.details["control_ms"], one.details["together_ms"]) for one in cpu.rounds] == [
        (500, 8, 508),
        (1000, 8, 1008),
    ]


def test_what_processes_hold_is_added_up_for_the_placements_of_a_run(tmp_path: Path) -> None:
    found = Results("now", quick=False)
    found.subjects += [Subject(name, name, "") for name in ("sidecar", "node", "remote", "ours", PLAIN)]
    ours = {("uproxy", 100): 1.0, ("node agent", 100): 10.0, ("kernel maps", 100): 450.0, ("waypoint", 100): 400.0}
    held = {**ours, ("envoy", 10): 30.0, ("envoy", 50): 90.0, ("envoy waypoint", 100): 500.0}
    configuration.add(Bench(found, tmp_path, quick=False), "architectures", held, (100,))
    kb = {one.subject: one.rounds[0] for one in found.series}
    assert {name: one.value for name, one in kb.items()} == {
        "sidecar": 20 * 30,
        "node": 2 * 90,
        "remote": 20 * 1 + 2 * 10 + 2 * 450 + 500,
        "ours": 20 * 1 + 2 * 10 + 2 * 450 + 400,
    }
    assert {name: one.details["most_kb"] for name, one in kb.items()} == {
        "sidecar": 30,
        "node": 90,
        "remote": 500,
        "ours": 400,
    }
    assert kb["remote"].details["processes"] == 23
