"""Many workloads and large meshes to measure with: resources by the thousand, and processes of simulated proxies."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lab.control import ControlPlane
from benchmarks.lab.sources import TRUST_DOMAIN, LabError
from benchmarks.lab.topology import Lab
from control.api.identity import SpiffeId
from control.server.brokers import BROKER_PORT
from uproxy import sandbox

NAMESPACE = "fleet"

SERVICES_EACH = 100
"""Services of one namespace of a large mesh."""
ENDPOINTS_EACH = 10
"""Endpoints of one of its services."""


class Simulation:
    """A process of simulated proxies (benchmarks.simulated) on the control plane's machine, and what it tells."""

    def __init__(self, lab: Lab, control: ControlPlane, bundle: Path, proxies: Sequence[dict[str, Any]]) -> None:
        plan = {
            "trust_domain": TRUST_DOMAIN,
            "brokers": [f"mqtts://{control.address}:{BROKER_PORT}"],
            "bundle": str(bundle),
            "proxies": list(proxies),
        }
        self._process = lab.spawn(
            [sys.executable, "-m", "benchmarks.simulated"],
            sandbox.NETNS_DIR / control.netns,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._read = b""
        self.began = time.monotonic()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(plan).encode())
        self._process.stdin.close()

    def wait(self, matches: Callable[[dict[str, Any]], bool], timeout_s: float) -> dict[str, Any]:
        """The next event that matches; those before it are passed over. Raises LabError."""
        deadline = time.monotonic() + timeout_s
        for event in self._events(deadline):
            if matches(event):
                return event
        raise LabError(f"the simulated proxies did not tell what was waited for within {timeout_s:g} s")

    def whole(self, timeout_s: float) -> float:
        """Seconds from the start until every proxy knew all that it wants."""
        at: float = self.wait(lambda event: event["event"] == "whole", timeout_s)["at"]
        return at - self.began

    def applied(self, version: Sequence[int], timeout_s: float) -> list[float]:
        """When each proxy had this version of its namespace's root, by CLOCK_MONOTONIC."""
        wanted = {"event": "applied", "root": NAMESPACE, "version": list(version)}
        at: list[float] = self.wait(lambda event: wanted.items() <= event.items(), timeout_s)["at"]
        return at

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _events(self, deadline: float) -> Iterator[dict[str, Any]]:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while True:
            line, newline, rest = self._read.partition(b"\n")
            if newline:
                self._read = rest
                yield json.loads(line)
            elif select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                more = os.read(fd, 1 << 20)
                if not more:
                    raise LabError("the simulated proxies have ended; see above")
                self._read += more
            else:
                return


def members(lab: Lab, count: int) -> list[dict[str, Any]]:
    """Identities for simulated proxies, each of its own: what `benchmarks.simulated` is given."""
    made = []
    for number in range(count):
        identity = SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/ns/{NAMESPACE}/sa/f{number}")
        directory = lab.directory / "fleet" / f"f{number}"
        lab.issue(identity, directory)
        made.append({"identity": str(identity), "workload": f"f{number}", "directory": str(directory)})
    return made


def member_entries(count: int) -> str:
    """Their WorkloadEntries, in YAML."""
    return "".join(
        _entry(NAMESPACE, f"f{number}", f"10.192.{number >> 8}.{number & 255}", f"f{number}", "fleet")
        for number in range(count)
    )


def large_namespace(number: int) -> str:
    """One namespace of a large mesh, in YAML: its services, and the workloads behind them, of one service account."""
    namespace = f"n{number}"
    parts = []
    for index in range(SERVICES_EACH):
        service = number * SERVICES_EACH + index
        parts.append(
            f"apiVersion: v1\nkind: Service\nmetadata: {{name: s{index}, namespace: {namespace}}}\n"
            f"spec: {{clusterIP: {service_address(service)}, selector: {{app: s{index}}}, "
            "ports: [{name: http, port: 80, targetPort: 8080}]}\n---\n"
        )
        for endpoint in range(ENDPOINTS_EACH):
            at = service * ENDPOINTS_EACH + endpoint
            address = f"10.{128 + (at >> 16)}.{at >> 8 & 255}.{at & 255}"
            parts.append(_entry(namespace, f"s{index}-{endpoint}", address, namespace, f"s{index}"))
    return "".join(parts)


def service_address(service: int) -> str:
    """The virtual address of a service of the large mesh."""
    return f"240.240.{16 + (service >> 8)}.{service & 255}"


def _entry(namespace: str, name: str, address: str, account: str, app: str) -> str:
    return (
        "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n"
        f"metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {app}}}}}\n"
        f"spec: {{address: {address}, serviceAccount: {account}}}\n---\n"
    )
