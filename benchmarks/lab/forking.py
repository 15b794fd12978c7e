"""A host's fork server: `uproxy fork-server`, from which workloads' uProxies may be started."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Host, Lab

_START_S: Final = 60.0
_POLL_S: Final = 0.02


def launching(lab: Lab) -> list[str]:
    """Options of `uproxy exec` with which it asks the lab's fork server."""
    return ["--fork-server", str(_socket(lab))]


def start(host: Host) -> subprocess.Popen[bytes]:
    """Start the lab's fork server on this host, and return when it listens. Raises LabError."""
    path = _socket(host.lab)
    process = host.spawn([sys.executable, "-I", "-m", "uproxy", "fork-server", "--socket", str(path)])
    deadline = time.monotonic() + _START_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        while probe.connect_ex(str(path)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"the fork server does not listen at {path} (exit status {process.poll()})")
            time.sleep(_POLL_S)
    return process


def _socket(lab: Lab) -> Path:
    return lab.directory / "fork.sock"
