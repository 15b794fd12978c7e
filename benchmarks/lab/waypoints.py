"""A waypoint of a lab: `waypoint run` in a namespace of its own, without an application and without capture."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.lab.control import ControlPlane
from benchmarks.lab.sources import TRUST_DOMAIN, LabError
from benchmarks.lab.topology import Host, entered, tail
from control.api.address import HBONE_PORT
from control.api.identity import SpiffeId
from uproxy import cgroup

_READY_PORT = 15021
_ADMIN_PORT = 15000
_ADMIN_S = 5.0
_START_S = 120.0
_LOGGED_S = 5.0
_FIRST_NUMBER = 200
"""Of a waypoint's address on its host, out of the workloads' way."""


def declaration(gateway: str, address: str) -> str:
    """A Gateway of namespace default and its one process, `<gateway>-1`, as resources."""
    return f"""\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: {gateway}, namespace: default, labels: {{istio.io/waypoint-for: service}}}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{{name: mesh, port: {HBONE_PORT}, protocol: HBONE}}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: {gateway}-1
  namespace: default
  labels: {{gateway.networking.k8s.io/gateway-name: {gateway}}}
spec: {{address: {address}, serviceAccount: {gateway}}}
"""


def config_dump(netns: Path) -> dict[str, Any]:
    """What a uProxy or a waypoint in this namespace tells of its configuration. Raises OSError."""
    with entered(netns):
        connection = http.client.HTTPConnection("127.0.0.1", _ADMIN_PORT, timeout=_ADMIN_S)
        connection.connect()
    with closing(connection):
        connection.request("GET", "/config_dump")
        told: dict[str, Any] = json.loads(connection.getresponse().read())
    return told


class Waypoint:
    """One process of a waypoint. Its Gateway and its workload are declared as an operator does, with `meshctl`."""

    def __init__(self, control: ControlPlane, host: Host, gateway: str, account: str = "", number: int = 0) -> None:
        """Make its place; `apply` declares it and `start` starts it. `account`: whose workloads it serves, where each
        process of the Gateway has a service account of its own; `number`: of those on a host, from 0.
        """
        self.gateway = gateway
        self.account = account
        self.node = host.name
        self.name = f"{gateway}-{host.name}{f'-{account}' if account else ''}"
        self.address = f"10.96.{host.index}.{_FIRST_NUMBER + number}"
        self.identity = SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/ns/default/sa/{account or gateway}")
        self._control = control
        self._lab = host.lab
        self._box = host.place(self.name, self.address)
        self._log = self._lab.directory / f"{self.name}.log"
        self.state = self._lab.directory / "state" / self.name
        """Its identity, and its last good configuration."""
        self._process: subprocess.Popen[bytes] | None = None

    def apply(self, *options: str) -> None:
        """The Gateway, and this process as its instance."""
        where = f"@{self.node}{f'/{self.account}' if self.account else ''}"
        instance = f"{self.name}={self.address}{where}"
        self._control.meshctl("waypoint", "apply", self.gateway, "--instance", instance, *options)

    def start(self) -> None:
        """Join the first time, take up where it was later, and return when it is ready."""
        self.launch()
        self.await_ready()

    def launch(self) -> None:
        """As `start`, and return at once."""
        token = self._control.token(self.name, "--namespace", "default")
        arguments = ["--join", str(token), "--state", str(self.state)]
        arguments += ["--log-format", "json", *(["--gateway", self.gateway] if self.account else [])]
        with open(self._log, "ab") as log:
            self._process = self._lab.spawn(
                [sys.executable, "-I", "-m", "waypoint", "run", *arguments],
                self._box.netns_path,
                str(self._box.app_cgroup.relative_to(self._lab.names.cgroup)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def await_ready(self) -> None:
        """Return when it is ready. Raises LabError."""
        try:
            self._lab.wait([self.ready], _START_S, self.name)
        except LabError as error:
            raise LabError(f"{error}\n{self.logs()}") from None

    def ready(self) -> bool:
        """Whether it says so. Raises LabError when it gave up."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise LabError(f"`waypoint run` ended with {self._process.returncode}:\n{self.logs()}")
        with suppress(OSError, http.client.HTTPException):
            with entered(self._box.netns_path):
                connection = http.client.HTTPConnection(self.address, _READY_PORT, timeout=1)
                connection.connect()
            with closing(connection):
                connection.request("GET", "/healthz/ready")
                return connection.getresponse().status == 200
        return False

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def dump(self) -> dict[str, Any]:
        """Its `/config_dump`."""
        return config_dump(self._box.netns_path)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """In its network namespace: sockets that this thread makes meanwhile are made there."""
        with entered(self._box.netns_path):
            yield

    def kill(self) -> int:
        """SIGKILL, for all its processes at once; the first one's pid."""
        assert self._process is not None
        cgroup.kill(self._box.app_cgroup)
        self._process.wait()
        return self._process.pid

    def access_log(self) -> list[dict[str, Any]]:
        """The access log's lines so far."""
        entries = []
        for line in self._log.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    entries.append(entry)
        return entries

    def await_access(self, matches: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first line of the access log that matches; it may be written a moment later. Raises LabError."""
        deadline = time.monotonic() + _LOGGED_S
        while True:
            for entry in self.access_log():
                if matches(entry):
                    return entry
            if time.monotonic() > deadline:
                raise LabError(f"no such line in the access log:\n{self.logs()}")
            time.sleep(0.01)

    def logs(self) -> str:
        return tail(self._log)
