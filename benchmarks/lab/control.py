"""The control plane of a lab: `meshctl up` on a machine of its own, and the operator who types at it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.lab.sources import TRUST_DOMAIN, LabError
from control.cli.output import DIFFERS
from control.server.brokers import JETSTREAM_DIR
from control.server.ca import Authority
from uproxy import cgroup, sandbox

if TYPE_CHECKING:
    from benchmarks.lab.topology import Host, Lab, Workload

_START_TIMEOUT_S = 120.0
_COMMAND_TIMEOUT_S = 120.0
_CGROUP = "control"
_ANSWERED = (0, DIFFERS)


class ControlPlane:
    """Broker, control plane, CA and store, and the commands that change what they hold."""

    def __init__(self, lab: Lab, address: str) -> None:
        """`address`: of its machine, on the underlay."""
        self._lab = lab
        self.netns = lab.names.netns("control")
        self.address = address
        self.directory = lab.directory / "control"
        self._run = lab.directory / "run-control"
        self.socket = self._run / "control.sock"
        self._log = lab.directory / "control.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._applied: set[tuple[str, str, str]] = set()
        self._tokens: dict[tuple[str, ...], Path] = {}

    # -- the processes

    def start(self, progress: Callable[[str], None] = lambda line: None) -> None:
        """Start `meshctl up`, and return when it takes commands."""
        self.up()
        self._lab.wait([self.running], _START_TIMEOUT_S, "the control plane")
        progress("the control plane and its broker run")

    def up(self) -> None:
        """Start `meshctl up`; return at once."""
        (self._lab.names.cgroup / _CGROUP).mkdir(exist_ok=True)
        self._run.mkdir(exist_ok=True)
        arguments = ["--dir", str(self.directory), "--trust-domain", TRUST_DOMAIN, "--host", self.address]
        arguments += ["--socket", str(self.socket)]
        with open(self._log, "ab") as log:
            self._process = self._lab.spawn(
                [*_MESHCTL, "up", *arguments],
                sandbox.NETNS_DIR / self.netns,
                _CGROUP,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def running(self) -> bool:
        """Whether it answers. Raises LabError when it gave up."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise LabError(f"`meshctl up` ended with {self._process.returncode}:\n{self.logs()}")
        return self.socket.is_socket() and self._meshctl("status").returncode in _ANSWERED

    def kill(self) -> None:
        """SIGKILL for the control plane and its broker, both at once."""
        cgroup.kill(self._lab.names.cgroup / _CGROUP)
        if self._process is not None:
            self._process.wait()

    def broker_data(self) -> Path:
        """Where the broker keeps what it retains."""
        return self.directory / "broker" / JETSTREAM_DIR

    def processes(self) -> dict[str, int]:
        """Its processes: program -> pid."""
        pids = map(int, (self._lab.names.cgroup / _CGROUP / "cgroup.procs").read_text().split())
        named = {Path(f"/proc/{pid}/comm").read_text().strip(): pid for pid in pids}
        assert self._process is not None
        return {name if pid != self._process.pid else "meshctl up": pid for name, pid in named.items()}

    def logs(self) -> str:
        if not self._log.exists():
            return ""
        kept = self._log.read_text(errors="replace").splitlines()[-20:]
        return "--- control.log\n" + "".join(f"{line}\n" for line in kept)

    # -- the operator

    def meshctl(self, *words: str, stdin: str = "") -> str:
        """What a command prints. Raises LabError when it is refused."""
        done = self._meshctl(*words, stdin=stdin)
        if done.returncode not in _ANSWERED:
            raise LabError(f"meshctl {' '.join(words)}: exit status {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, document: str) -> str:
        """`meshctl apply` of resources in YAML."""
        return self.meshctl("apply", "-f", "-", stdin=document)

    def status(self) -> dict[str, Any]:
        """What `meshctl status` says."""
        told: dict[str, Any] = json.loads(self.meshctl("status", "-o", "json"))
        return told

    def _meshctl(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [*_MESHCTL, *words],
                input=stdin,
                capture_output=True,
                text=True,
                timeout=_COMMAND_TIMEOUT_S,
                env={**os.environ, "MESHCTL_SOCKET": str(self.socket)},
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"meshctl {' '.join(words)} does not end within {_COMMAND_TIMEOUT_S:g} s") from None

    # -- the lab's source of configuration

    def configure(self, documents: Sequence[str]) -> None:
        """Apply these, and delete what an earlier call applied and this one leaves out."""
        text = "---\n".join(documents)
        wanted = {_reference(document) for document in yaml.safe_load_all(text) if document is not None}
        self.apply(text)
        for kind, namespace, name in sorted(self._applied - wanted):
            self.meshctl("delete", kind, name, *(["--namespace", namespace] if namespace else []))
        self._applied = wanted

    def node_arguments(self, host: Host) -> list[str]:
        name = self._lab.names.node(host.name)
        return ["--join", str(self.token("--node", name)), "--identity-dir", str(self._lab.directory / "state" / name)]

    def workload_arguments(self, workload: Workload) -> list[str]:
        return ["--join", str(self.token(workload.name, "--namespace", workload.identity.namespace))]

    def identity_dir(self, workload: Workload) -> Path:
        return self._lab.directory / "state" / workload.name

    def authority(self) -> Authority:
        return Authority.open(self.directory / "ca")

    def token(self, *words: str) -> Path:
        """The file with a join token, made once: whoever has joined starts again without it."""
        if words not in self._tokens:
            directory = self._lab.directory / "tokens"
            directory.mkdir(mode=0o700, exist_ok=True)
            self._tokens[words] = directory / str(len(self._tokens))
            self.meshctl("token", "create", *words, "--out", str(self._tokens[words]))
        return self._tokens[words]


_MESHCTL = [sys.executable, "-I", "-m", "control.cli"]


def _reference(document: dict[str, Any]) -> tuple[str, str, str]:
    metadata = document["metadata"]
    return document["kind"], metadata.get("namespace", "default"), metadata["name"]
