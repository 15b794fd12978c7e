"""Waypoint processes that node agents start: from a declaration to calls, and what becomes of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmarks.lab import shop
from benchmarks.lab.control import ControlPlane
from benchmarks.lab.shop import REVIEWS, Shop
from benchmarks.lab.topology import Host, Lab
from control.api.labels import NODE
from tests.support import inside
from tests.support.shop_calls import versions
from uproxy.claims import FIRST_WAYPOINT_UID, LAST_UID
from uproxy.sandbox import NETNS_DIR, Sandbox

# Everybody may call: what is under test here is who starts what.
_OPEN = shop.RESOURCES.split("---\napiVersion: security")[0]
_PER_S = 30


@dataclass(frozen=True, slots=True)
class Placed:
    """A process that is declared, and where its agent puts it."""

    host: Host
    name: str
    address: str
    gateway: str
    account: str = ""

    @property
    def directory(self) -> Path:
        return _directory(self.host) / f"default.{self.name}"

    @property
    def box(self) -> Sandbox:
        lab = self.host.lab
        return Sandbox.below(_cgroup(self.host), lab.names.cgroup.parent, f"default.{self.name}", [self.address])

    @property
    def instance(self) -> str:
        account = f"/{self.account}" if self.account else ""
        return f"{self.name}={self.address}@{_node(self.host)}{account}"

    def pids(self) -> list[int]:
        """Of its first processes: several after an upgrade."""
        found = []
        with suppress(FileNotFoundError):
            for pid in (self.box.proxy_cgroup / "cgroup.procs").read_text().split():
                with suppress(OSError):
                    if b"\0waypoint\0run\0" in Path("/proc", pid, "cmdline").read_bytes():
                        found.append(int(pid))
        return found


@dataclass(frozen=True, slots=True)
class Mesh:
    lab: Lab
    control: ControlPlane
    shop: Shop
    on_a: Placed
    on_b: Placed

    def call(self, times: int) -> Counter[str]:
        return versions(self.shop, times)

    def served_by_both(self) -> bool:
        return set(self.call(12)) == {"v1", "v2"}

    def under_load(self) -> None:
        self.shop.web.job(job="open-loop", host=REVIEWS[0], port=REVIEWS[1], per_s=_PER_S)

    def failures(self) -> list[str]:
        requests = self.shop.web.job(job="open-loop-end")["requests"]
        assert len(requests) > 5
        assert {said for _, _, said, failure in requests if not failure} == {f"URI={self.shop.web.identity}"}
        return [failure for *_, failure in requests if failure]

    def restart_agent(self, host: Host) -> None:
        assert host.agent is not None
        host.agent.send_signal(signal.SIGKILL)
        host.agent.wait(10)
        host.start_agent()
        self.lab.wait([host.agent_running], 20, "the node agent")


def _soon(condition: Callable[[], bool]) -> None:
    """A process takes seconds to start on a machine that is busy, and an endpoint that failed comes last for some."""
    inside.eventually(condition, 40)


def _node(host: Host) -> str:
    return host.lab.names.node(host.name)


def _directory(host: Host) -> Path:
    return host.lab.directory / f"waypoints-{host.name}"


def _cgroup(host: Host) -> Path:
    return host.lab.names.cgroup / f"{host.name}-waypoints"


def _with_the_units_capabilities() -> list[str]:
    """Those of the unit with its drop-in."""
    deploy = Path(__file__).parents[2] / "deploy"
    files = "uproxy-node.service", "uproxy-node-waypoints.conf"
    lines = [re.findall("^CapabilityBoundingSet=(.*)$", (deploy / file).read_text(), re.MULTILINE) for file in files]
    allowed = [one.removeprefix("CAP_").lower() for (line,) in lines for one in line.split()]
    return ["setpriv", f"--bounding-set={','.join(['-all', *(f'+{one}' for one in allowed)])}", "--inh-caps=-all"]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Lab(control=True) as lab:
        assert lab.control is not None
        the_shop = shop.declare(lab)
        for workload in the_shop.workloads():
            labels = {**workload.options.labels, NODE: _node(workload.host)}
            workload.options = replace(workload.options, labels=labels)
        options = lab.directory / "waypoint.options"
        options.write_text("--log-format json\n")
        for host in lab.hosts:
            host.agent_options += ["--waypoints", str(_directory(host)), "--waypoint-options", str(options)]
            host.agent_options += ["--cgroup-root", str(_cgroup(host))]
            host.agent_within = _with_the_units_capabilities()
        lab.configure(_OPEN)
        lab.start()
        on_a = Placed(the_shop.a, "wp-a", "10.96.1.200", "wp")
        on_b = Placed(the_shop.b, "wp-b", "10.96.2.200", "wp")
        lab.control.meshctl(
            *["waypoint", "apply", "wp", "--placement", "node", "--instance", on_a.instance, on_b.instance]
        )
        lab.control.meshctl("label", "service", "reviews", "istio.io/use-waypoint=wp", "--wait")
        yield Mesh(lab, lab.control, the_shop, on_a, on_b)


def test_what_is_declared_for_a_node_runs_there_and_serves(mesh: Mesh) -> None:
    assert mesh.served_by_both()
    for placed in (mesh.on_a, mesh.on_b):
        (pid,) = placed.pids()
        assert mesh.lab.names.node(placed.host.name) in placed.instance
        assert Path(f"/proc/{pid}/ns/net").stat().st_ino == placed.box.netns_path.stat().st_ino


def test_each_has_a_uid_and_a_key_of_its_own_and_no_privileges(mesh: Mesh) -> None:
    (pid,) = mesh.on_a.pids()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    uids = set(status["Uid"].split())
    assert uids == {str(mesh.on_a.directory.stat().st_uid)}
    assert FIRST_WAYPOINT_UID <= int(uids.pop()) <= LAST_UID
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"
    assert mesh.on_a.directory.stat().st_mode & 0o777 == 0o700
    key = mesh.on_a.directory / "key.pem"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.stat().st_uid == mesh.on_a.directory.stat().st_uid
    tokens = [one.name for one in _directory(mesh.on_a.host).iterdir() if "token" in one.name]
    assert tokens == []


def test_a_process_that_dies_is_started_again(mesh: Mesh) -> None:
    (before,) = mesh.on_a.pids()
    os.kill(before, signal.SIGKILL)
    _soon(lambda: mesh.on_a.pids() not in ([], [before]))
    _soon(mesh.served_by_both)


def test_it_goes_on_without_the_agent_and_the_next_agent_leaves_it_alone(mesh: Mesh) -> None:
    before = mesh.on_a.pids()
    mesh.under_load()
    mesh.restart_agent(mesh.on_a.host)
    _soon(lambda: "runs already" in mesh.on_a.host.logs())
    assert mesh.failures() == []
    assert mesh.on_a.pids() == before
    os.kill(before[0], signal.SIGKILL)
    _soon(lambda: mesh.on_a.pids() not in ([], before))
    _soon(mesh.served_by_both)


def test_an_upgrade_fails_no_request_and_its_successor_is_looked_after(mesh: Mesh) -> None:
    (before,) = mesh.on_b.pids()
    with ExitStack() as held:
        # So many that some are through b's process, which has a reason to go on when another one has taken over.
        for sock in mesh.shop.web.sockets(24):
            held.enter_context(sock).connect(REVIEWS)
        mesh.under_load()
        done = subprocess.run(
            [sys.executable, "-I", "-m", "waypoint", "upgrade", "--state", str(mesh.on_b.directory)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert mesh.failures() == []
        (successor,) = set(mesh.on_b.pids()) - {before}
        os.kill(successor, signal.SIGKILL)
        _soon(lambda: bool(set(mesh.on_b.pids()) - {before, successor}))
        _soon(mesh.served_by_both)
        assert before in mesh.on_b.pids()


def test_it_is_removed_with_what_declares_it_while_an_agent_is_there_or_when_one_is_back(mesh: Mesh) -> None:
    extra = [Placed(mesh.shop.b, f"extra-{number}", f"10.96.2.{210 + number}", "extra") for number in range(2)]
    for one in extra:
        mesh.control.meshctl("waypoint", "apply", "extra", "--placement", "node", "--instance", one.instance)
    _soon(lambda: all((one.directory / "handover.sock").exists() for one in extra))
    assert len({one.directory.stat().st_uid for one in (*extra, mesh.on_b)}) == 3
    mesh.control.meshctl("delete", "WorkloadEntry", "extra-0")
    _soon(lambda: not _left(extra[0]))
    assert _left(extra[1])
    host = mesh.shop.b
    assert host.agent is not None
    host.agent.send_signal(signal.SIGTERM)
    assert host.agent.wait(10) == 0
    assert extra[1].pids(), "what runs goes on"
    mesh.control.meshctl("delete", "WorkloadEntry", "extra-1")
    (mesh.lab.directory / "state" / _node(host) / "state").unlink()  # so that nothing reminds the next one
    host.start_agent()
    mesh.lab.wait([host.agent_running], 20, "the node agent")
    _soon(lambda: not _left(extra[1]))
    assert mesh.served_by_both()


def _left(placed: Placed) -> list[Path]:
    places = [placed.directory, placed.box.cgroup, NETNS_DIR / placed.box.netns]
    return [path for path in places if path.exists()]


def test_a_process_of_a_service_account_has_that_accounts_identity(mesh: Mesh) -> None:
    of_account = Placed(mesh.shop.a, "reviews-wp-a", "10.96.1.201", "accounts", "reviews")
    mesh.control.meshctl(
        "waypoint", "apply", "accounts", "--placement", "service-account", "--instance", of_account.instance
    )
    _soon(lambda: (of_account.directory / "handover.sock").exists())
    membership = json.loads((of_account.directory / "mesh.json").read_text())
    assert membership["service_account"] == "reviews"
    assert membership["workload"] == "reviews-wp-a"
    (pid,) = of_account.pids()
    assert b"\0--gateway=accounts\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
