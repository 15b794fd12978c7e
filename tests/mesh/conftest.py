"""The mesh that the end-to-end tests share: the demo's shop, and a caller and a peer whose sockets the tests hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.lab import shop
from benchmarks.lab.apps import commands
from benchmarks.lab.shop import Shop
from benchmarks.lab.topology import App, Lab, Workload, WorkloadOptions

PEER = ("240.240.0.30", 9000)
PEER_V6 = ("fd96:0:0:ffff::30", 9000)
NEAR_PEER = ("240.240.0.31", 9000)
JOB = "10.96.1.100"

# A namespace of their own, where the shop's policy does not reach.
LOAD = f"""\
---
apiVersion: v1
kind: Service
metadata: {{name: peer, namespace: load}}
spec:
  clusterIP: {PEER[0]}
  selector: {{app: peer}}
  ports: [{{name: tcp, port: {PEER[1]}, targetPort: tcp}}]
---
apiVersion: v1
kind: Service
metadata: {{name: peer6, namespace: load}}
spec:
  clusterIP: "{PEER_V6[0]}"
  ipFamilies: [IPv6]
  selector: {{app: peer6}}
  ports: [{{name: tcp, port: {PEER_V6[1]}, targetPort: tcp}}]
---
apiVersion: v1
kind: Namespace
metadata: {{name: load}}
---
apiVersion: v1
kind: Namespace
metadata: {{name: near, annotations: {{mesh.uproxy.dev/same-host: direct}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: peer, namespace: near}}
spec:
  clusterIP: {NEAR_PEER[0]}
  selector: {{app: near-peer}}
  ports: [{{name: tcp, port: {NEAR_PEER[1]}, targetPort: tcp}}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: job, namespace: load}}
spec: {{address: {JOB}, serviceAccount: job}}
"""


@dataclass(frozen=True, slots=True)
class Mesh:
    """`caller` on host a and `peer` on host b are idle: tests make sockets in their app cgroups. The near ones are on a
    both, and may go direct.
    """

    lab: Lab
    shop: Shop
    caller: Workload
    peer: Workload
    caller6: Workload
    peer6: Workload
    near_caller: Workload
    near_peer: Workload


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.mesh)


@pytest.fixture(scope="session")
def mesh() -> Iterator[Mesh]:
    with Lab() as lab:
        the_shop = shop.declare(lab)
        a, b = the_shop.a, the_shop.b
        made = Mesh(
            lab,
            the_shop,
            a.workload("caller", commands.idle(), namespace="load"),
            b.workload("peer", commands.idle(), namespace="load", ports={"tcp": PEER[1]}),
            a.workload("caller6", commands.idle(), namespace="load", ipv6=True),
            b.workload("peer6", commands.idle(), namespace="load", ports={"tcp": PEER[1]}, ipv6=True),
            a.workload("near-caller", commands.idle(), namespace="near"),
            a.workload("near-peer", commands.idle(), namespace="near", ports={"tcp": NEAR_PEER[1]}),
        )
        lab.configure(shop.RESOURCES + LOAD)
        lab.start()
        yield made


@pytest.fixture
def job(mesh: Mesh) -> Workload:
    """A workload of the configuration that the lab does not start: each test runs a command as it."""
    made = Workload(mesh.shop.a, "job", App(lambda address, data: [], "sh"), JOB, WorkloadOptions(namespace="load"))
    mesh.lab.issue(made.identity, made.identity_dir)
    return made
