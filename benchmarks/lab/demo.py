"""The demo: a mesh on this machine, what it does and what it refuses, each with the evidence, then what it costs.

`main` prints one line per step, or JSON: {"steps": [{"name", "ok", "evidence"}], "paths": [{"path", "p50_us",
"p99_us", "requests_per_s"}]}. Exit status 1 if a step fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import FrameType
from typing import Any

from benchmarks.lab import shop
from benchmarks.lab.evidence import Step, UnexpectedError
from benchmarks.lab.l7 import L7
from benchmarks.lab.live import Live
from benchmarks.lab.measure import CONNECTIONS, ROUNDS, PathCost, measure
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import Lab
from benchmarks.lab.tour import Tour
from benchmarks.lab.waypoints import Waypoint
from uproxy.cgroup import SandboxError


def main(argv: Sequence[str]) -> int:
    """Run the demo. Exit status: 0 when every step is right, 1 when one is not, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="meshctl demo", description="Build a mesh on this machine and show it.")
    parser.add_argument("--output", choices=("table", "json"), default="table")
    as_json = parser.parse_args(argv).output == "json"
    show = _Show(sys.stderr if as_json else sys.stdout, quiet=as_json)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        steps, paths = run(show)
    except BrokenPipeError:  # whoever read this has seen enough; the lab is removed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    if as_json:
        print(json.dumps({"steps": [asdict(step) for step in steps], "paths": [asdict(path) for path in paths]}))
    else:
        show.table(paths)
    return 0 if all(step.ok for step in steps) and paths else 1


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # the lab is removed on the way out


def run(show: _Show) -> tuple[list[Step], list[PathCost]]:
    """Build the lab, take the steps, measure, and remove the lab."""
    steps: list[Step] = []

    def take(name: str, step: Callable[[], str]) -> None:
        try:
            taken = Step(name, True, step())
        except (UnexpectedError, LabError, OSError, ValueError) as error:
            taken = Step(name, False, f"{type(error).__name__}: {error}".removeprefix("UnexpectedError: "))
        show.step(taken)
        steps.append(taken)

    try:
        with Lab(control=True) as lab:
            assert lab.control is not None
            show.progress(f"building a control plane, two hosts and four workloads (lab {lab.names.lab_id})")
            the_shop = shop.declare(lab)
            lab.start(show.progress)
            waypoint = Waypoint(lab.control, the_shop.b, "wp")
            live, l7 = Live(lab, lab.control, the_shop), L7(lab.control, the_shop, waypoint)
            for name, step in Tour(lab, the_shop).steps() + live.steps() + l7.steps():
                take(name, step)
            show.progress(f"measuring, {ROUNDS} interleaved rounds")
            paths = measure(lab, lab.control, the_shop, waypoint)
            show.progress("removing the lab")
            return steps, paths
    except BrokenPipeError:
        raise
    except (LabError, SandboxError, OSError) as error:
        failed = Step("the lab stands", False, str(error))
        show.step(failed)
        return [*steps, failed], []


class _Show:
    """Where people look while it runs."""

    def __init__(self, stream: Any, quiet: bool) -> None:
        self._stream = stream
        self._quiet = quiet
        self._began = time.monotonic()

    def progress(self, line: str) -> None:
        print(f"  {time.monotonic() - self._began:5.1f} s  {line}", file=self._stream, flush=True)

    def step(self, step: Step) -> None:
        if not self._quiet or not step.ok:
            print(f"{'ok  ' if step.ok else 'FAIL'}  {step.name}\n      {step.evidence}", file=self._stream, flush=True)

    def table(self, paths: Sequence[PathCost]) -> None:
        if not paths:
            return
        print(f"\n{'path':<28}{'RTT p50':>12}{'RTT p99':>12}{'requests/s':>14}", file=self._stream)
        for path in paths:
            print(
                f"{path.path:<28}{path.p50_us:>9.0f} µs{path.p99_us:>9.0f} µs{path.requests_per_s:>14,.0f}",
                file=self._stream,
            )
        print(
            f"HTTP from host a to host b; requests/s over {CONNECTIONS} connections. One machine runs it:\n"
            "read the ratio, not the times.",
            file=self._stream,
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
