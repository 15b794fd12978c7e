"""Two workloads of one host: plain TCP between them, a pair of Envoys, uProxies, and uProxies that let them go direct.

What goes direct is plain TCP from kernel to kernel, once both uProxies have agreed to it (docs/direct.md): the first
connections of a port take the tunnel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks import load
from benchmarks.harness.results import Subject
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Host, Workload
from benchmarks.peers.pairs import Peer, peers
from benchmarks.peers.standing import (
    TOGETHER,
    UPROXY,
    Standing,
    resources,
    stand_peer,
    stand_uproxy,
    workloads,
)

PLAIN: Final = "near-tcp"
BASELINE: Final = "near-envoy-hbone"
TUNNEL: Final = replace(
    UPROXY,
    name="near-uproxy",
    label="uProxy pair, one host",
    description="Two workloads of one host, each with its uProxy, captured by eBPF: HBONE in mTLS between them.",
)
DIRECT: Final = replace(
    UPROXY,
    name="near-direct",
    label="uProxy pair, one host, direct",
    description="The same in a namespace that allows the direct path: once mTLS has proved the caller and policy let "
    "it in, the kernel connects the two, and bytes are plain TCP that never leaves the host.",
)
_ADDRESSES: Final = {TUNNEL.name: "240.240.0.63", DIRECT.name: "240.240.0.64"}
_NAMESPACES: Final = {TUNNEL.name: "near", DIRECT.name: "near-direct"}
_GRANTED_S: Final = 20.0
_TRY_S: Final = 0.1

RESOURCES: Final = f"""\
---
apiVersion: v1
kind: Namespace
metadata: {{name: {_NAMESPACES[TUNNEL.name]}}}
---
apiVersion: v1
kind: Namespace
metadata: {{name: {_NAMESPACES[DIRECT.name]}, annotations: {{mesh.uproxy.dev/same-host: direct}}}}
""" + "".join(f"---\n{resources(name, _NAMESPACES[name], _ADDRESSES[name])}" for name in _ADDRESSES)

Pairs = Mapping[str, tuple[Workload, Workload]]
Start = tuple[Subject, Callable[[], Standing]]


def declare(host: Host, program: Path) -> Pairs:
    """The workloads, before the lab starts, with RESOURCES."""
    return {name: workloads(host, host, program, name, namespace) for name, namespace in _NAMESPACES.items()}


def starts(host: Host, program: Path, pairs: Pairs) -> list[Start]:
    """How each subject is started, once the lab has."""
    known = {one.subject.name: one for one in peers({})}
    made: list[Start] = []
    for name in (PLAIN, BASELINE):
        peer = known[name.removeprefix("near-")]
        subject = replace(peer.subject, name=name, label=f"{peer.subject.label}, one host")
        made.append((subject, partial(stand_peer, Peer(subject, peer.start), host, host, program)))
    for subject in (TUNNEL, DIRECT):
        stand = partial(stand_uproxy, *pairs[subject.name], program, subject, _ADDRESSES[subject.name])
        made.append((subject, stand))
    return made


def carried(pairs: Pairs) -> tuple[int, int]:
    """How many connections of the subject DIRECT have gone direct, and how many by a tunnel, of those that ended."""
    _, server = pairs[DIRECT.name]
    ended = server.access_log()
    direct = sum(one.get("path") == "direct" for one in ended)
    return direct, len(ended) - direct


def await_direct(standing: Standing, pairs: Pairs) -> None:
    """Connect until echo and sink are granted to the caller. Raises LabError when they are not in time."""
    _, server = pairs[DIRECT.name]
    wanted = (load.closed(1, 64), load.bulk(1))
    deadline = time.monotonic() + _GRANTED_S
    while time.monotonic() < deadline:
        for asked in wanted:
            standing.run(asked, _TRY_S, TOGETHER)
        ports = {
            str(one.get("dst.addr", "")).rpartition(":")[2]
            for one in server.access_log()
            if one.get("path") == "direct"
        }
        if len(ports) == len(wanted):
            return
    raise LabError(f"nothing goes direct on {server.host.name} within {_GRANTED_S:g} s:\n{server.host.logs()}")
