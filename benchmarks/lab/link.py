"""Delay on a lab's link: a program (link.c) between one host's port and the bridge, in either direction.

netem would do, where a kernel has it; this is the same everywhere, runs on a core of the caller's choice, and none of
its work is done in a measured process. What it takes and gives are whole frames, offloads included.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Host, Lab
from uproxy import sandbox

_LINK_C = Path(__file__).with_name("link.c")
_INNER, _OUTER = "delay0-{}", "delay1-{}"  # of a host
_END_S = 5.0


@dataclass(slots=True)
class Carried:
    """What a delay line did; filled when it ends."""

    frames: int = 0
    lost: int = 0


def build(directory: Path) -> Path:
    """Compile link.c. Raises LabError."""
    target = directory / "link"
    for compiler in ("clang", "gcc"):
        command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(target), str(_LINK_C)]
        try:
            subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
        except FileNotFoundError:
            continue
        except subprocess.CalledProcessError as error:
            raise LabError(f"{compiler} cannot build the delay line:\n{error.stderr}") from error
        return target
    raise LabError("no C compiler: install clang or gcc")


@contextmanager
def delayed(lab: Lab, host: Host, program: Path, one_way_ms: float, *, core: int) -> Iterator[Carried]:
    """Everything to and from `host` takes so much longer, each way. Raises LabError when that cannot be set up."""
    port, netns = host.name, lab.underlay
    inner, outer = _INNER.format(port), _OUTER.format(port)
    sandbox.run_ip(
        [
            f"link add name {inner} type veth peer name {outer}",
            f"link set dev {outer} master br0 up",
            f"link set dev {inner} up",
            f"link set dev {port} nomaster",
        ],
        netns=netns,
    )
    carried = Carried()
    try:
        argv = ["taskset", "-c", str(core), str(program), port, inner, str(round(one_way_ms * 1e6))]
        line = lab.spawn(
            argv, sandbox.NETNS_DIR / netns, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            assert line.stdout is not None
            if line.stdout.readline() != b"ready\n":
                raise LabError(f"the delay line did not start: {line.communicate()[1].decode().strip()}")
            yield carried
        finally:
            line.send_signal(signal.SIGTERM)
            out, err = line.communicate(timeout=_END_S)
        if line.returncode:
            raise LabError(f"the delay line ended: {err.decode().strip()}")
        told = json.loads(out)
        carried.frames, carried.lost = told["carried"], told["lost"]
    finally:
        sandbox.run_ip([f"link set dev {port} master br0", f"link delete dev {inner}"], netns=netns)
