"""Upgrades of sidecars, as an operator makes them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.lab.topology import Workload


def upgrade(workload: Workload) -> int:
    """`uproxy upgrade`; the new uProxy's pid."""
    done = attempt(workload)
    found = re.match(rf"{workload.name}: the sidecar is pid (\d+) now", done.stdout)
    assert found is not None, f"{done}\n{workload.logs()}"
    return int(found[1])


def attempt(workload: Workload) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_argv(workload), capture_output=True, text=True, timeout=120, check=False)


def begun(workload: Workload) -> subprocess.Popen[bytes]:
    return subprocess.Popen(_argv(workload), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _argv(workload: Workload) -> list[str]:
    state = workload.host.lab.directory / "state"
    return [sys.executable, "-I", "-m", "uproxy", "upgrade", workload.name, "--state-dir", str(state)]


def running(workload: Workload) -> set[int]:
    """The pids of its uProxies: of the one that serves, and of those that carry connections to their end."""
    pids = map(int, (workload.box.proxy_cgroup / "cgroup.procs").read_text().split())
    return {pid for pid in pids if b"\0run\0" in _command_line(pid)}


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
