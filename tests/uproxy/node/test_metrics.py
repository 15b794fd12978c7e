"""What the node agent tells of itself over HTTP, and what it says when a map is nearly full."""

from __future__ import annotations

import http.client
import logging
import socket
import time
from collections.abc import Iterator

import pytest

from bpf import layout, libbpf
from bpf.maps import Level
from tests.uproxy.node.test_agent import Host, make_host
from uproxy.capture.ranges import MeshRanges
from uproxy.node import agent, metrics
from uproxy.node.agent import Agent, Options
from uproxy.node.probers import Probers
from uproxy.node.sync import Sync
from uproxy.node.workloads import Workloads

__all__ = ["make_host"]  # a fixture


@pytest.fixture
def host(tmp_path, make_host) -> Host:
    made = make_host(tmp_path)
    made.config.write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: default}\n")
    return made


@pytest.fixture
def port() -> int:
    """One that is free."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def get(port: int, path: str, address: str = "127.0.0.1") -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, port, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def eventually_ready(port: int, address: str = "127.0.0.1") -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            assert get(port, "/healthz/ready", address) == (200, "ready\n")
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def running(host, loader, pins) -> Iterator[Agent]:
    """An agent without its process."""
    options = Options(
        name=host.name,
        config=(),
        identity_dir=host.directory,
        join=None,
        trust_domain="cluster.local",
        ranges=MeshRanges.parse(["10.99.0.0/16"]),
        egress=agent.ALLOW_ANY,
        run_dir=host.directory,
        probe_cgroups=(),
        metrics=None,
        remove=False,
    )
    sync = Sync(loader.maps, options.ranges)
    made = Agent(options, loader, sync, Workloads(loader, pins / "links"), Probers(loader, pins / "probers", (), tuple))
    made.apply([])
    return made


@pytest.mark.parametrize(("entries", "said"), [(0, False), (79, False), (80, True), (100, True)])
def test_a_map_is_nearly_full_at_80_percent(entries, said):
    alarms = metrics.alarms({"services": Level(entries, 100), "workloads": Level(0, 100)})
    assert list(alarms) == ["services"] * said
    assert all(f"`services` has {entries} entries and room for 100" in text for text in alarms.values())


@pytest.mark.root
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_an_agent_serves_metrics_and_readiness(host, port, address):
    with host.agent("--metrics", f"[{address}]:{port}" if ":" in address else f"{address}:{port}"):
        eventually_ready(port, address)
        status, text = get(port, "/metrics", address)
        assert (status, get(port, "/stats/prometheus", address)) == (200, (200, text))
    assert "\nuproxy_node_whole 1\n" in text
    assert "\nuproxy_node_workloads 0\n" in text
    assert '\nuproxy_node_map_entries{map="services"} 0\n' in text
    assert '\nuproxy_node_map_capacity{map="services"} 131072\n' in text
    assert '\nuproxy_node_verdicts_total{verdict="refused_no_config"} 0\n' in text


@pytest.mark.root
def test_an_agent_whose_port_is_taken_goes_on(host):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with host.agent("--metrics", address) as process:
            assert host.client.status()["error"] == ""
            process.terminate()
            assert process.wait(60) == 0
            with process.stderr as log:
                assert f"no metrics: cannot listen on {address}: " in log.read()
            process.stderr = None


@pytest.mark.parametrize("given", ["15019", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "localhost:15019"])
def test_a_wrong_address_is_refused(given, capsys):
    with pytest.raises(SystemExit):
        agent.main(["--name", "n", "--config", "x", "--mesh-cidr", "10.0.0.0/8", "--metrics", given])
    assert repr(given.rpartition(":")[0] if given.startswith("localhost") else given) in capsys.readouterr().err


@pytest.mark.root
def test_it_is_not_ready_before_its_configuration_is_in_the_kernel(running):
    assert running.pending() == []
    running.configured.clear()
    assert running.pending() == ["config"]


@pytest.mark.root
def test_every_map_that_can_become_full_is_measured(running, loader):
    levels = loader.maps.levels()
    assert levels.keys() >= {"ranges", "services", "workloads", "own", "orig", "admitted", "listeners", "backends"}
    assert all(level.entries < level.capacity for level in levels.values())
    assert levels["ranges"].entries == len(loader.maps.ranges.items()) > 0


@pytest.mark.root
def test_a_large_map_is_not_counted_again_by_its_one_writer(running, loader):
    assert loader.maps.levels({"services": 5})["services"].entries == 5
    assert loader.maps.levels(running._sync.sizes()) == loader.maps.levels()


@pytest.mark.root
def test_a_map_that_is_nearly_full_is_in_the_status_and_once_in_the_log(running, loader, caplog):
    ports = loader.maps.probe_ports
    limit = ports.capacity() * 8 // 10
    keys = [layout.pack("mesh_service_key", addr=one.to_bytes(16, "big"), port=1) for one in range(limit + 2)]
    values = [bytes(ports.size.value)] * len(keys)
    libbpf.update_all(ports.fd, ports.size, keys[:limit], values[:limit])
    assert running.handle({"op": "status"}, ())["error"] == ""
    with caplog.at_level(logging.ERROR):
        for number in (limit, limit + 1):
            libbpf.update_all(ports.fd, ports.size, keys[number:][:1], values[:1])
            said = f"the kernel's map `probe_ports` has {number + 1:,} entries and room for {ports.capacity():,}"
            assert said in running.handle({"op": "status"}, ())["error"]
    assert [record.message.partition(" has ")[0] for record in caplog.records] == ["the kernel's map `probe_ports`"]
    assert f'uproxy_node_map_entries{{map="probe_ports"}} {limit + 2}\n' in running.metrics().decode()
    assert "uproxy_node_problems 1\n" in running.metrics().decode()
    libbpf.delete_all(ports.fd, ports.size, keys)
    assert running.handle({"op": "status"}, ())["error"] == ""
