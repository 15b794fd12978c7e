"""`uproxy node` as a process: its life, its death, and what stays in the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bpf import bpffs, layout
from bpf.libbpf import BpfError
from bpf.loader import HOOKS, Loader
from control.api.identity import SpiffeId, make_id
from control.api.status import Kind, ProxyStatus
from control.client.files import FileSource
from tests.support import capture
from tests.support.brokers import Broker
from tests.support.capture import KNOWN_V4, OUTSIDE_V4, UNKNOWN_V4, VIP_V4, WORKLOAD_V4, WORKLOAD_V6
from tests.support.member_site import Control, controlled
from tests.support.udp import connected
from tests.support.waiting import until
from uproxy.capture.ranges import MeshRanges
from uproxy.node import agent
from uproxy.node.client import NodeClient, NodeError
from uproxy.node.probers import Probers
from uproxy.node.sync import Sync
from uproxy.node.workloads import Workloads

pytestmark = pytest.mark.root

CONFIG = f"""
apiVersion: v1
kind: Service
metadata: {{name: db, namespace: default}}
spec:
  clusterIP: {VIP_V4}
  ports: [{{name: tcp, port: 80, targetPort: 8080}}]
  selector: {{app: db}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: db-1, namespace: default}}
spec: {{address: {KNOWN_V4}, serviceAccount: db, labels: {{app: db}}}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: web-1, namespace: default}}
spec: {{address: {WORKLOAD_V4}, serviceAccount: web, labels: {{app: web}}}}
"""
MESH = ["240.240.0.0/16", "10.99.0.0/16", "fd99::/64"]


@dataclass
class Host:
    """Where one agent's name, files and pins are."""

    name: str
    directory: Path

    @property
    def config(self) -> Path:
        return self.directory / "mesh.yaml"

    @property
    def client(self) -> NodeClient:
        return NodeClient(self.directory / "run" / "node.sock")

    @property
    def pins(self) -> Path:
        return bpffs.BPFFS / "uproxy" / f"v{layout.SCHEMA}" / self.name

    def arguments(self, *more: str) -> list[str]:
        given = ["--name", self.name, "--run-dir", str(self.directory / "run"), "--config", str(self.config)]
        return [sys.executable, "-m", "uproxy", "node", *given, "--mesh-cidr", *MESH, *more]

    def joined_arguments(self) -> list[str]:
        """Of an agent that the control plane configures."""
        given = ["--name", self.name, "--run-dir", str(self.directory / "run"), "--mesh-cidr", *MESH]
        joined = ["--join", str(self.directory / "token"), "--identity-dir", str(self.directory / "identity")]
        return [sys.executable, "-m", "uproxy", "node", *given, *joined]

    def agent(self, *more: str) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        """Running and ready; killed at the end if it runs still."""
        return self.running(self.arguments(*more))

    @contextlib.contextmanager
    def running(self, arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
        try:
            self._wait(process)
            yield process
        finally:
            process.kill()
            process.communicate()

    def _wait(self, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(NodeError):
                self.client.status()
                return
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        raise AssertionError("the agent did not become ready")

    def fails(self, *arguments: str) -> str:
        """The complaint of an agent that does not start."""
        done = subprocess.run(arguments or self.arguments(), capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 1, done.stderr
        return done.stderr

    def remove(self) -> None:
        command = [sys.executable, "-m", "uproxy", "node", "--name", self.name, "--remove"]
        subprocess.run(command, check=True, capture_output=True, timeout=30)


@pytest.fixture
def make_host() -> Iterator[Callable[[Path], Host]]:
    """Makes hosts whose files are in a directory; what they pinned goes with the test."""
    made: list[Host] = []

    def make(directory: Path) -> Host:
        made.append(Host(capture.unique_name(), directory))
        return made[-1]

    yield make
    for one in made:
        if one.pins.exists():
            bpffs.remove(one.pins)


@pytest.fixture
def host(make_host, tmp_path) -> Host:
    made = make_host(tmp_path)
    made.config.write_text(CONFIG)
    return made


def register(host: Host, site: capture.Site, **changes) -> None:
    with site.registration() as where:
        given = {
            "namespace": "default",
            "service_account": "web",
            "addresses": [WORKLOAD_V4, WORKLOAD_V6],
            "app_cgroup": where.app.fd,
            "proxy_cgroup": where.proxy.fd,
            "netns": where.netns.fd,
        }
        host.client.register(changes.pop("workload", "web"), **(given | changes))


def dial(address: str, port: int = 80) -> bytes:
    with socket.create_connection((address, port), timeout=30) as sock:
        return sock.recv(64)


def assert_enforced(site: capture.Site) -> None:
    """Known is captured, unknown refused, outside left alone, the way in closed."""
    with site.uproxy(), site.outside():
        assert len(site.in_app(lambda: dial(VIP_V4))) == 64
        assert site.in_app(lambda: dial(OUTSIDE_V4)) == b"outside"
        with pytest.raises(ConnectionRefusedError):
            site.in_app(lambda: dial(UNKNOWN_V4))
        with pytest.raises(ConnectionRefusedError):
            site.at_peer(lambda: dial(WORKLOAD_V4, 15001))


def eventually(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def test_from_start_to_removal(host, site):
    with host.agent() as process:
        status = host.client.status()
        assert (status["whole"], status["services"], status["addresses"], status["error"]) == (True, 1, 2, "")
        register(host, site)
        assert_enforced(site)
        (listed,) = host.client.status()["workloads"]
        assert (listed["workload"], set(listed["address"])) == ("web", {WORKLOAD_V4, WORKLOAD_V6})
        assert host.client.status()["counters"]["refused_no_config"] == 1
        host.client.unregister("web")
        assert host.client.status()["workloads"] == []
        with site.outside():
            assert site.in_app(lambda: dial(capture.PEER_V4)) == b"outside"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not (host.directory / "run" / "node.sock").exists()
    assert host.pins.exists()
    host.remove()
    assert not host.pins.exists()


def test_capture_is_not_removed_under_a_running_workload(host, site):
    with host.agent() as process:
        register(host, site)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0

    def try_to_remove() -> str:
        return host.fails(sys.executable, "-m", "uproxy", "node", "--name", host.name, "--remove")

    with subprocess.Popen(["sleep", "60"]) as running:
        (site.app / "cgroup.procs").write_text(str(running.pid))
        complaint = try_to_remove()
        running.kill()
    assert "workloads still run" in complaint
    assert "web" in complaint
    assert_enforced_without_agent(site)
    host.remove()
    assert not host.pins.exists()


def assert_enforced_without_agent(site: capture.Site) -> None:
    with site.uproxy(), pytest.raises(ConnectionRefusedError):
        site.in_app(lambda: dial(UNKNOWN_V4))


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_dead_agent_opens_nothing_and_the_next_one_goes_on(host, site, end):
    with host.agent() as process:
        register(host, site)
        generation = host.client.status()["generation"]
        process.send_signal(end)
        process.wait(60)
    assert_enforced(site)
    with host.agent():
        status = host.client.status()
        assert status["whole"]
        assert status["generation"] == generation
        assert [one["workload"] for one in status["workloads"]] == ["web"]
        assert_enforced(site)
        host.client.unregister("web")
    assert {path.name for path in host.pins.iterdir()} == {"maps", "links", "probers"}
    assert list((host.pins / "links").iterdir()) == []


def test_capture_holds_all_through_a_restart(host, site, tmp_path):
    """An app that dials on and on sees no gap: neither plaintext nor an unexpected refusal."""
    done = tmp_path / "done"

    def dial_on() -> list[str]:
        wrong = []
        while not done.exists():
            try:
                if len(dial(VIP_V4)) != 64:
                    wrong.append("not captured")
            except OSError as error:
                wrong.append(f"refused: {error}")
            try:
                dial(capture.PEER_V4)
                wrong.append("in the open")
            except ConnectionRefusedError:
                pass
        return wrong

    def restart() -> None:
        process.kill()
        process.wait()
        with host.agent():
            time.sleep(0.2)
        done.touch()

    with host.agent() as process:
        register(host, site)
        with site.uproxy(), site.outside(), capture.background(site.netns, None, restart, lambda: None):
            assert site.in_app(dial_on) == []


@pytest.fixture
def of_an_earlier_version(host, site):
    """A workload that an agent of an earlier schema captured; that agent is gone."""
    with capture.pins(host.name, layout.SCHEMA - 1) as pins:
        with Loader(pins / "maps") as loader, site.registration("web") as registration:
            capture.fill(loader.maps)
            Workloads(loader, pins / "links").register(registration)
        yield pins


def test_an_upgrade_takes_running_workloads_over(host, site, of_an_earlier_version):
    with waiting(site):
        assert_enforced(site)
        with host.agent():
            assert [one["workload"] for one in host.client.status()["workloads"]] == ["web"]
            assert host.client.status()["error"] == ""
            assert not of_an_earlier_version.exists()
            assert_enforced(site)
            host.config.write_text(CONFIG.replace("clusterIP: 240.240.0.10", "clusterIP: 240.240.0.12"))
            with site.uproxy():
                eventually(lambda: dials(site, "240.240.0.12"))
                assert not dials(site, VIP_V4)


def dials(site: capture.Site, address: str) -> bool:
    try:
        return len(site.in_app(lambda: dial(address))) == 64
    except ConnectionRefusedError:
        return False


def test_an_upgrade_that_cannot_be_configured_leaves_the_earlier_version_in_force(host, site, of_an_earlier_version):
    host.config.write_text("kind: Nonsense")
    host.fails()
    assert len(list((of_an_earlier_version / "links" / "web").iterdir())) == len(HOOKS)
    assert_enforced(site)


def test_an_upgrade_while_the_earlier_agent_runs_is_refused(host, of_an_earlier_version):
    with bpffs.sole_owner(of_an_earlier_version):
        assert "another `uproxy node` of this name is running" in host.fails()


def test_a_downgrade_is_refused_with_what_to_do(host, site):
    with capture.pins(host.name, layout.SCHEMA + 1):
        complaint = host.fails()
    assert "was pinned by a later version" in complaint
    assert "Start that version; or end the node's workloads, then `uproxy node --remove`" in complaint


def test_removal_takes_every_version_away(host, site, of_an_earlier_version):
    remove = [sys.executable, "-m", "uproxy", "node", "--name", host.name, "--remove"]
    with capture.pins(host.name, layout.SCHEMA + 1) as later, waiting(site):
        assert "workloads still run" in host.fails(*remove)
        assert later.exists()
        assert of_an_earlier_version.exists()
        assert_enforced(site)
    with capture.pins(host.name, layout.SCHEMA + 1) as later:
        host.remove()
        assert not any(directory.exists() for directory in (later, of_an_earlier_version, host.pins))
    with site.outside(), pytest.raises(TimeoutError):
        site.in_app(lambda: socket.create_connection((VIP_V4, 80), timeout=0.5))


def waiting(site: capture.Site) -> contextlib.AbstractContextManager[int]:
    """A process in the app cgroup."""
    return capture.background(site.netns, site.app, signal.pause, lambda: None)


def test_a_changed_configuration_reaches_the_kernel(host, site):
    with host.agent():
        register(host, site)
        with site.uproxy():
            with pytest.raises(ConnectionRefusedError):
                site.in_app(lambda: dial(UNKNOWN_V4))
            host.config.write_text(CONFIG.replace(VIP_V4, UNKNOWN_V4))
            eventually(lambda: host.client.status()["generation"] == 2)
            assert len(site.in_app(lambda: dial(UNKNOWN_V4))) == 64
            with pytest.raises(ConnectionRefusedError):
                site.in_app(lambda: dial(VIP_V4))


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (CONFIG.replace("targetPort", "targetPrt"), "targetPrt"),
        (
            CONFIG.replace(VIP_V4, "198.51.100.1"),
            "service default/db has address 198.51.100.1, outside the mesh's ranges",
        ),
    ],
)
def test_a_wrong_configuration_changes_nothing_and_is_reported(host, site, broken, complaint):
    with host.agent():
        register(host, site)
        host.config.write_text(broken)
        eventually(lambda: complaint in host.client.status()["error"])
        assert host.client.status()["generation"] == 1
        assert_enforced(site)
        host.config.write_text(CONFIG)
        eventually(lambda: not host.client.status()["error"])
        assert host.client.status()["generation"] == 1


def test_a_wrong_configuration_at_start_is_refused_and_opens_nothing(host, site):
    with host.agent():
        register(host, site)
    host.config.write_text("kind: Nonsense")
    assert "mesh.yaml:1: apiVersion: is missing" in host.fails()
    assert_enforced(site)


def test_an_empty_mesh_is_whole_and_closed(host, site):
    host.config.write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: default}\n")
    with host.agent():
        assert host.client.status()["whole"]
        register(host, site)
        with site.outside():
            assert site.in_app(lambda: dial(OUTSIDE_V4)) == b"outside"
            with pytest.raises(ConnectionRefusedError):
                site.in_app(lambda: dial(VIP_V4))


def in_process(host: Host, loader: Loader, pins: Path) -> agent.Agent:
    options = agent.Options(
        name=host.name,
        config=(),
        identity_dir=host.directory,
        join=None,
        trust_domain="cluster.local",
        ranges=MeshRanges.parse(MESH),
        egress=agent.ALLOW_ANY,
        run_dir=host.directory,
        probe_cgroups=(),
        metrics=None,
        remove=False,
    )
    sync = Sync(loader.maps, options.ranges)
    probers = Probers(loader, pins / "probers", (), tuple)
    return agent.Agent(options, loader, sync, Workloads(loader, pins / "links"), probers)


def test_what_the_kernel_did_not_take_is_written_with_the_next_batch(host, loader, pins, monkeypatch):
    """Even if that batch changes nothing that the kernel holds."""
    running = in_process(host, loader, pins)
    running.apply([])
    source = FileSource([host.config], "cluster.local")
    with monkeypatch.context() as patched:
        patched.setattr(loader.maps.services, "put_all", lambda *_: (_ for _ in ()).throw(BpfError(7, "map full")))
        running.on_batch(source.load())
    assert "map full" in running.handle({"op": "status"}, ())["error"]
    assert loader.maps.services.items() == {}, "neither what failed nor what the maps held before"
    running.on_batch(source.load())
    status = running.handle({"op": "status"}, ())
    assert (status["error"], status["services"]) == ("", 1)
    assert len(loader.maps.services) == 1


BEACON = (KNOWN_V4, 5353)
WITH_DATAGRAMS = f"""{CONFIG}---
apiVersion: v1
kind: Service
metadata: {{name: beacon, namespace: default, annotations: {{mesh.uproxy.dev/udp: plaintext}}}}
spec: {{selector: {{app: db}}, ports: [{{port: 53, targetPort: {BEACON[1]}, protocol: UDP}}]}}
"""


def with_the_units_capabilities(arguments: list[str]) -> list[str]:
    unit = (Path(__file__).parents[3] / "deploy" / "uproxy-node.service").read_text()
    (allowed,) = re.findall("^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    bounds = ",".join(["-all", *(f"+{one.removeprefix('CAP_').lower()}" for one in allowed.split())])
    return ["setpriv", f"--bounding-set={bounds}", "--inh-caps=-all", *arguments]


def test_datagrams_pass_on_without_an_agent_until_the_next_one_is_told_otherwise(host, site):
    """With the capabilities of the unit; the application is another user."""
    host.config.write_text(WITH_DATAGRAMS)
    with host.running(with_the_units_capabilities(host.arguments())) as process:
        register(host, site)
        with connected(site, [BEACON, BEACON, (OUTSIDE_V4, 53)]) as ended:
            process.kill()
            process.wait(60)
            site.in_app(lambda: send(BEACON))
            with host.running(with_the_units_capabilities(host.arguments())) as again:
                assert ended() == [False, False, False]
                again.kill()
            host.config.write_text(CONFIG)
            with host.running(with_the_units_capabilities(host.arguments())):
                assert ended() == [True, True, False]
                assert host.client.status()["error"] == ""
                with pytest.raises(PermissionError):
                    site.in_app(lambda: send(BEACON))


def send(end: tuple[str, int]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", end)


def sweep_until(running: agent.Agent, condition: Callable[[], bool]) -> None:
    async def sweep() -> None:
        async with asyncio.TaskGroup() as group:
            sweeping = group.create_task(running.sweep())
            await until(condition)
            sweeping.cancel()

    asyncio.run(sweep())


def test_a_socket_that_was_just_being_connected_is_ended_by_a_sweep(host, site, monkeypatch, loader, pins):
    """And what cannot be ended is said, and tried again."""
    host.config.write_text(WITH_DATAGRAMS)
    running, source = in_process(host, loader, pins), FileSource([host.config], "cluster.local")
    running.apply(source.load())
    with site.registration() as where:
        place = (where.app.fd, where.proxy.fd, where.netns.fd)
        said = {"workload": "web", "namespace": "default", "service_account": "web", "address": [WORKLOAD_V4]}
        running.handle({"op": "register", "dns": False, **said}, place)
    entries = loader.maps.datagrams.items()
    host.config.write_text(CONFIG)
    running.apply(source.load())
    for key, target in entries.items():  # as it was when connect() was asked
        loader.maps.datagrams.put(key, target, 0)
    with connected(site, [BEACON]) as ended:
        monkeypatch.setattr(agent, "_SWEEP_INTERVAL_S", 0.05)
        with monkeypatch.context() as patched:
            patched.setattr(agent.datagrams, "end", lambda *_: (_ for _ in ()).throw(OSError("no such luck")))
            sweep_until(running, lambda: running.problems() != [])
            (problem,) = running.problems()
            assert problem.startswith("workload web: its UDP sockets: no such luck; restart it")
        assert ended() == [False]
        sweep_until(running, lambda: ended() == [True] and running.problems() == [])


def test_a_first_start_with_a_wrong_configuration_leaves_the_maps_not_whole(host):
    host.config.write_text("kind: Nonsense")
    host.fails()
    with capture.Loader(host.pins / "maps") as loader:
        assert not loader.maps.settings.read().whole


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"addresses": ["192.0.2.77"]}, "address 192.0.2.77 is outside the mesh's ranges"),
        ({"addresses": ["web"]}, "'web' is not an IP address"),
        ({"addresses": []}, "has 0 addresses"),
        ({"addresses": [KNOWN_V4]}, f"address {KNOWN_V4} is that of workload default/db-1 .service account db."),
        ({"service_account": "db"}, "is that of workload default/web-1 .service account web. in the configuration"),
        ({"workload": "../web"}, "workload name"),
        ({"namespace": 7}, "field 'namespace' must be a str"),
        ({"netns": 0}, "is no network namespace"),
        ({"probe_ports": [15008]}, "port 15008 cannot be probed"),
        ({"probe_ports": [0]}, "port 0 cannot be probed"),
        ({"probe_ports": ["http"]}, "probe_port must be a list of numbers"),
        ({"probe_ports": range(1, 18)}, "has 17 ports to be probed; at most 16"),
    ],
)
def test_a_wrong_registration_is_refused_with_its_reason(host, site, changes, complaint):
    with host.agent():
        with pytest.raises(NodeError, match=complaint):
            register(host, site, **changes)
        assert host.client.status()["workloads"] == []
    assert list((host.pins / "links").iterdir()) == []


@pytest.fixture
def prober(site) -> Path:
    path = site.directory / "prober"
    path.mkdir()
    return path


def probes(site: capture.Site, prober: Path, port: int = 8080) -> bool:
    """Whether a probe is let in."""
    try:
        return capture.run_inside(site.peer, prober, lambda: dial(WORKLOAD_V4, port)) == b"healthy"
    except ConnectionRefusedError:
        return False


def app_of(site: capture.Site) -> contextlib.AbstractContextManager[int]:
    ends = [(WORKLOAD_V4, 8080), (WORKLOAD_V4, 8081)]
    return capture.listening(site.netns, site.app, ends, lambda _: b"healthy")


def test_health_probes_are_let_in_whatever_becomes_of_the_agent(host, site, prober):
    options = ("--probe-cgroup", str(prober))
    with host.agent(*options) as process:
        register(host, site, probe_ports=[8080])
        with app_of(site):
            assert probes(site, prober)
            assert not probes(site, prober, 8081)
            with pytest.raises(ConnectionRefusedError):
                site.at_peer(lambda: dial(WORKLOAD_V4, 8080))
            process.kill()
            process.wait(60)
            assert probes(site, prober)
            with host.agent(*options):
                assert probes(site, prober)
                register(host, site, probe_ports=[8080])  # as it was: nothing to do
            with host.agent():
                assert not probes(site, prober), "the new agent was told of no prober"
    with host.agent(*options):
        host.client.unregister("web")
        maps = Loader(host.pins / "maps")
        assert maps.maps.probe_ports.items() == {}
        maps.close()
    host.remove()
    assert not host.pins.exists()


def test_a_prober_may_come_and_go(host, site, prober, monkeypatch, loader, pins):
    relative = prober.relative_to(capture.cgroup.mount_point())
    prober.rmdir()
    with host.agent("--probe-cgroup", str(relative)):
        register(host, site, probe_ports=[8080])
        assert f"--probe-cgroup {prober}: is not there" in host.client.status()["error"]
    watching = Probers(loader, pins / "probers", [prober], tuple)
    assert len(watching.problems()) == 1
    held = []
    for _ in range(2):  # each time it is another cgroup
        prober.mkdir()
        watching.look()
        assert watching.problems() == []
        held.append([pin.name for pin in (pins / "probers").iterdir()])
        prober.rmdir()
    assert held[0] != held[1]
    assert [len(names) for names in held] == [1, 1]
    watching.look()
    assert list((pins / "probers").iterdir()) == []


@pytest.mark.parametrize("path", ["", "/", "/proc"])
def test_what_cannot_be_a_probers_cgroup_is_refused(host, path):
    complaint = host.fails(*host.arguments("--probe-cgroup", path or str(capture.cgroup.mount_point())))
    assert f"--probe-cgroup {path or capture.cgroup.mount_point()}: " in complaint


def test_a_workload_in_a_probers_cgroup_is_refused(host, site, prober):
    with host.agent("--probe-cgroup", str(site.directory)), pytest.raises(NodeError, match="contain one another"):
        register(host, site)


@pytest.mark.parametrize("cgroup", ["directory", "app", "proxy"])
def test_a_probers_cgroup_around_a_workload_that_is_there_already_is_left_alone(host, site, cgroup):
    option = ("--probe-cgroup", str(getattr(site, cgroup)))
    complaint = f"{option[1]}: workload web is in it, or around it"
    with host.agent():
        register(host, site, probe_ports=[8080])
    with host.agent(*option):
        assert complaint in host.client.status()["error"]
        assert list((host.pins / "probers").iterdir()) == []
        with app_of(site):
            assert not probes(site, getattr(site, cgroup))
        host.client.unregister("web")
        deadline = time.monotonic() + 20
        while host.client.status()["error"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert host.client.status()["error"] == "", "it is nobody's now"
        with pytest.raises(NodeError, match="contain one another"):
            register(host, site, probe_ports=[8080])


def test_the_initial_namespace_and_the_root_cgroup_are_refused(host, site):
    with host.agent():
        own, root = os.open("/proc/self/ns/net", os.O_RDONLY), os.open(capture.cgroup.mount_point(), os.O_RDONLY)
        try:
            with pytest.raises(NodeError, match="the host's network namespace"):
                register(host, site, netns=own)
            with pytest.raises(NodeError, match="app cgroup: is the root cgroup"):
                register(host, site, app_cgroup=root)
        finally:
            os.close(own)
            os.close(root)


def test_a_request_with_too_few_descriptors_or_unknown_fields_is_refused(host):
    request = {
        "op": "register",
        "workload": "w",
        "namespace": "n",
        "service_account": "s",
        "address": ["10.99.0.2"],
        "dns": False,
    }
    with host.agent():
        with pytest.raises(NodeError, match="three descriptors: app cgroup, proxy cgroup, network namespace; 1 came"):
            host.client._call(request, [0])
        with pytest.raises(NodeError, match="unknown field 'color'"):
            host.client._call(request | {"color": "red"}, [0, 1, 2])
        with pytest.raises(NodeError, match="unknown op 'attach'; there are register, unregister and status"):
            host.client._call({"op": "attach"})
        assert host.client.status()["whole"]


def test_two_agents_of_one_name_or_one_directory_are_refused(host, make_host, tmp_path):
    second = make_host(tmp_path)
    with host.agent():
        assert "another `uproxy node` of this name is running" in host.fails()
        assert "another node agent listens there" in second.fails()
        assert host.client.status()["whole"]


def test_two_agents_of_different_names_do_not_meet(host, make_host, site, tmp_path):
    (tmp_path / "second").mkdir()
    second = make_host(tmp_path / "second")
    second.config.write_text(CONFIG.replace(VIP_V4, UNKNOWN_V4))
    with host.agent(), second.agent():
        register(host, site)
        assert second.client.status()["workloads"] == []
        assert_enforced(site)


def test_a_pin_directory_that_others_may_write_is_refused(host):
    """In a mount namespace with a bpffs of its own, so that the host's is not touched."""
    prepare = 'mount -t bpf bpf /sys/fs/bpf && mkdir -m 0777 /sys/fs/bpf/uproxy && exec "$@"'
    complaint = host.fails("unshare", "--mount", "sh", "-c", prepare, "sh", *host.arguments())
    assert "/sys/fs/bpf/uproxy has owner 0 and mode 0777, and must be root's with 0700" in complaint


def test_without_privileges_it_says_so(host):
    complaint = host.fails("setpriv", "--bounding-set", "-all", "--inh-caps", "-all", *host.arguments())
    assert complaint.startswith("uproxy node: needs root, or CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF")


def test_what_starting_waypoints_takes_is_missed_with_the_units_own_capabilities(host):
    complaint = host.fails(*with_the_units_capabilities([*host.joined_arguments(), "--waypoints", "/nowhere"]))
    assert "needs root, or CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_KILL, CAP_SETGID, CAP_SETUID" in complaint


def test_without_objects_it_says_what_to_run(host, tmp_path):
    """In a mount namespace where the objects are hidden."""
    objects = Path(layout.__file__).parent / "build"
    hide = f'mount -t tmpfs none {objects} && exec "$@"'
    complaint = host.fails("unshare", "--mount", "sh", "-c", hide, "sh", *host.arguments())
    assert "run `make bpf`" in complaint


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--name"),
        (["--name", "a/b", "--config", "x", "--mesh-cidr", "10.0.0.0/8"], "use 1-63 of a-z"),
        (["--name", "a", "--config", "x"], "--mesh-cidr is needed"),
        (
            ["--name", "a", "--config", "x", "--mesh-cidr", "10.0.0.0/8", "--join", "t"],
            "configures instead of --config",
        ),
        (["--name", "a", "--mesh-cidr", "10.0.0.0/8", "--trust-domain", "td"], "--trust-domain belongs to --config"),
        (
            ["--name", "a", "--config", "x", "--mesh-cidr", "10.0.0.0/8", "--waypoints"],
            "--waypoints belongs to a control plane",
        ),
        (
            ["--name", "a", "--mesh-cidr", "10.0.0.0/8", "--cgroup-root", "/sys/fs/cgroup/x"],
            "--waypoint-options and --cgroup-root belong to --waypoints",
        ),
        (["--name", "a", "--config", "x", "--mesh-cidr", "10.0.0.1/8"], "has bits set beyond its prefix"),
        (["--name", "a", "--config", "x", "--mesh-cidr", "10.0.0.0/8", "--trust-domain", "A B"], "trust domain"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as left:
        agent.main(arguments)
    assert left.value.code == 2
    assert complaint in capsys.readouterr().err


def test_everything_is_attached(host, site):
    with host.agent():
        register(host, site)
        assert {pin.name for pin in (host.pins / "links" / "web").iterdir()} == set(HOOKS)
        (host.pins / "links" / "web" / "bind4").unlink()
        assert "not attached: bind4" in host.client.status()["error"]


@pytest.fixture
def joined(host, tmp_path) -> Iterator[tuple[Broker, Control]]:
    """A control plane that has the configuration, and a token for the host's agent."""
    with controlled(tmp_path, [identity_of(host)]) as (broker, control):
        control.apply(CONFIG)
        (host.directory / "token").write_text(control.token(control.members.node(host.name)))
        yield broker, control


def identity_of(host) -> SpiffeId:
    return make_id("cluster.local", "mesh-system", f"node-{host.name}")


def reported(host, control) -> ProxyStatus | None:
    return control.status(identity_of(host), f"node-{host.name}")


def test_a_node_that_has_joined_follows_the_control_plane(host, site, joined):
    _, control = joined
    with host.running(host.joined_arguments()) as process:
        status = host.client.status()
        assert (status["whole"], status["services"], status["addresses"], status["error"]) == (True, 1, 2, "")
        register(host, site)
        with site.uproxy():
            with pytest.raises(ConnectionRefusedError):
                site.in_app(lambda: dial(UNKNOWN_V4))
            control.apply(CONFIG.replace(VIP_V4, UNKNOWN_V4))
            eventually(lambda: host.client.status()["generation"] == 2)
            assert len(site.in_app(lambda: dial(UNKNOWN_V4))) == 64
            with pytest.raises(ConnectionRefusedError):
                site.in_app(lambda: dial(VIP_V4))
        control.apply(CONFIG.replace(VIP_V4, "198.51.100.1"))
        eventually(lambda: "198.51.100.1, outside the mesh's ranges" in host.client.status()["error"])
        eventually(lambda: any("198.51.100.1" in text for text in reported(host, control).problems))
        assert reported(host, control).kind is Kind.NODE
        control.apply(CONFIG)
        eventually(lambda: not host.client.status()["error"])
        assert_enforced(site)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    eventually(lambda: not reported(host, control).online)


def test_a_node_that_has_joined_starts_from_disk_and_without_a_disk_opens_nothing(host, site, joined):
    broker, control = joined
    state = host.directory / "identity" / "state"
    with host.running(host.joined_arguments()):
        register(host, site)
        eventually(state.exists)
    control.stop()
    broker.kill()
    (host.directory / "token").unlink()
    with host.running(host.joined_arguments()):
        assert host.client.status()["whole"]
        assert_enforced(site)
    state.unlink()
    process = subprocess.Popen(host.joined_arguments(), stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(2)
        assert process.poll() is None
        with pytest.raises(NodeError):
            host.client.status()
        assert_enforced(site)
        broker.start()
        host._wait(process)
        assert host.client.status()["whole"]
        assert_enforced(site)
    finally:
        process.kill()
        process.communicate()


def test_a_node_has_its_own_identity_and_no_other(host, make_host, joined, tmp_path):
    other = make_host(tmp_path)
    assert f"node {other.name} must be spiffe://cluster.local/ns/mesh-system/sa/node-{other.name}" in other.fails(
        *other.joined_arguments()
    )
