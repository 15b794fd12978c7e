"""Plain TCP, a pair of uProxies and a pair of Envoys, measured against each other: `python -m benchmarks.paths`.

Each path has two network namespaces of its own, joined by a veth pair: web's with the load generator and its proxy,
db's with its proxy and the application (load.c). Everything that works for a path is pinned to one core, as in
PERFORMANCE.md; this process is not, and only waits. All paths stand at once and the rounds alternate between them, so
that whatever else the machine does meets all of them alike. Compare the ratios: the times are this machine's. `cpu` is
the processor time of both proxies together, in us per operation (per MiB for bulk).

A closed loop measures capacity and unloaded latency. It cannot say how a path behaves at a given rate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from benchmarks import pairs
from benchmarks.netns import stop
from benchmarks.pairs import APP_PORT, DB_ADDRESS, ENTRY, Wire

CORE = 0
PATHS = ("tcp", "uproxy", "envoy")
_LOAD_C = Path(__file__).with_name("load.c")
_RUN_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Measure:
    """One kind of load: the generator's arguments, the number that counts in its report, and which way is better."""

    name: str
    arguments: tuple[str, ...]
    key: str
    unit: str
    more_is_better: bool = False
    sink: bool = False
    """Goes to the sink's port instead of the echo's."""


MEASURES = (
    Measure("rr1", ("rr", "1", "64"), "us_per_op", "us"),
    Measure("rr16", ("rr", "16", "64"), "us_per_op", "us"),
    Measure("rr64", ("rr", "64", "64"), "us_per_op", "us"),
    Measure("rr500", ("rr", "500", "64"), "us_per_op", "us"),
    Measure("rr1-16k", ("rr", "1", "16384"), "us_per_op", "us"),
    Measure("bulk", ("bulk",), "gbit_per_second", "Gbit/s", more_is_better=True, sink=True),
    Measure("connections", ("connect", "16"), "per_second", "1/s", more_is_better=True),
)


@dataclass
class Series:
    """All rounds of one measure on one path, as the generator reported them, and their medians."""

    measure: str
    path: str
    unit: str
    rounds: list[dict[str, float]] = field(default_factory=list)

    def median(self, key: str) -> float:
        return statistics.median(r[key] for r in self.rounds)


class LoadError(Exception):
    """The load generator found something wrong: a byte changed, a count differs, a peer hung up."""


def build_load(directory: Path) -> Path:
    """Compile load.c with the compiler that `make bpf` needs anyway, or gcc."""
    target = directory / "load"
    for compiler in ("clang", "gcc", "cc"):
        try:
            subprocess.run([compiler, "-O2", "-Wall", "-o", str(target), str(_LOAD_C)], check=True, timeout=60)
        except FileNotFoundError:
            continue
        return target
    raise LoadError("no C compiler: install clang or gcc")


@dataclass(frozen=True, slots=True)
class Standing:
    """A path that is ready for load: its wire, where the generator dials, and its proxies' process ids."""

    wire: Wire
    entry: tuple[str, int]
    proxies: tuple[int, ...]

    def cpu_s(self) -> float:
        """The processor time that the proxies have used so far: unlike the clock, it knows no neighbours."""
        ticks = 0
        for pid in self.proxies:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
        return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def standing(path: str, load: Path, directory: Path) -> Iterator[Standing]:
    """Set one path up: the application, and the proxies if it has any."""
    with ExitStack() as stack:
        wire = stack.enter_context(pairs.wire(directory, core=CORE))
        application = wire.db.start([str(load), "serve", DB_ADDRESS, str(APP_PORT)], core=CORE, stdout=subprocess.PIPE)
        stack.callback(stop, application)
        assert application.stdout is not None
        stack.callback(application.stdout.close)
        if application.stdout.readline() != b"ready\n":
            raise LoadError("the application did not start")
        sides: list[pairs.Running] = []
        if path == "uproxy":
            sides = [pairs.uproxy_server(wire), pairs.uproxy_client(wire)]
        elif path == "envoy":
            sides = [pairs.envoy_server(wire), pairs.envoy_client(wire)]
        proxies = tuple(stack.enter_context(side).pid for side in sides)
        yield Standing(wire, ENTRY if proxies else (DB_ADDRESS, APP_PORT), proxies)


def run(load: Path, path: Standing, measure: Measure, seconds: float) -> dict[str, float]:
    """One round. Raises LoadError with the generator's reason."""
    mode, *rest = measure.arguments
    host, port = path.entry
    before = path.cpu_s()
    generator = path.wire.web.start(
        [str(load), mode, host, str(port + measure.sink), *rest, f"{seconds:g}"],
        core=CORE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = generator.communicate(timeout=_RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"{measure.name}: no end within {_RUN_TIMEOUT_S:g} s") from error
    finally:
        stop(generator)
    if generator.returncode:
        raise LoadError(f"{measure.name}: {err.decode().strip()}")
    report: dict[str, float] = json.loads(out)
    # The generator's warm-up, a tenth, is in the processor time and not in its count.
    used_us = (path.cpu_s() - before) * 1e6
    report["cpu_us"] = used_us / (report["operations"] * 1.1 if "operations" in report else report["bytes"] / 2**20)
    return report


def measure_all(
    paths: Sequence[str], measures: Sequence[Measure], rounds: int, seconds: float, table: TextIO
) -> list[Series]:
    """Alternate the paths, round by round, so that they share the machine's good and bad moments."""
    with tempfile.TemporaryDirectory(prefix="uproxy-paths-") as text, ExitStack() as stack:
        directory = Path(text)
        load = build_load(directory)
        ready = {path: stack.enter_context(standing(path, load, directory / path)) for path in paths}
        found: list[Series] = []
        for measure in measures:
            series = {path: Series(measure.name, path, measure.unit) for path in paths}
            for number in range(rounds):
                # Another path leads each round, lest one always runs behind the same neighbour.
                for path in [*paths[number % len(paths) :], *paths[: number % len(paths)]]:
                    try:
                        series[path].rounds.append(run(load, ready[path], measure, seconds))
                    except LoadError as error:
                        raise LoadError(f"{path}: {error}") from error
            found += series.values()
            print(_row(measure, series), file=table, flush=True)
        return found


def _row(measure: Measure, series: dict[str, Series]) -> str:
    cells = [f"{measure.name:11} {measure.unit:6}"]
    for path, one in series.items():
        tail = f"p99 {one.median('p99_us'):7.0f}" if "p99_us" in one.rounds[0] else " " * 11
        cells.append(f"{path} {one.median(measure.key):8.2f} {tail} cpu {one.median('cpu_us'):6.1f}")
    ratio = ratios(list(series.values())).get(measure.name)
    if ratio is not None:
        low, high, cpu = ratio["low"], ratio["high"], ratio["cpu"]
        cells.append(f"uproxy/envoy {ratio['median']:.2f} ({low:.2f}-{high:.2f}) cpu {cpu:.2f}")
    return "  ".join(cells)


def ratios(found: Sequence[Series]) -> dict[str, dict[str, float]]:
    """uProxy over Envoy, round by round (neighbours in time), by measure: the median and the extremes."""
    by_path = {(one.measure, one.path): one for one in found}
    result = {}
    for measure in MEASURES:
        ours, theirs = by_path.get((measure.name, "uproxy")), by_path.get((measure.name, "envoy"))
        if ours is None or theirs is None:
            continue
        each = [a[measure.key] / b[measure.key] for a, b in zip(ours.rounds, theirs.rounds, strict=True)]
        cpu = ours.median("cpu_us") / theirs.median("cpu_us")
        result[measure.name] = {"median": statistics.median(each), "low": min(each), "high": max(each), "cpu": cpu}
    return result


def as_json(found: Sequence[Series], seconds: float) -> dict[str, object]:
    """Everything that was measured, with the conditions."""
    keys = {m.name: m.key for m in MEASURES}
    return {
        "conditions": {
            "core": CORE,
            "seconds_per_round": seconds,
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "measures": [asdict(one) | {"median": one.median(keys[one.measure])} for one in found],
        "uproxy_over_envoy": ratios(found),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; exit status 1 when a path fails under load."""
    parser = argparse.ArgumentParser("python -m benchmarks.paths", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="three short rounds, for a first look")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--measures", nargs="+", choices=[m.name for m in MEASURES], metavar="MEASURE")
    parser.add_argument("--output", choices=("table", "json"), default="table")
    options = parser.parse_args(argv)
    rounds, seconds = (3, 0.5) if options.quick else (7, 1.5)
    measures = [m for m in MEASURES if options.measures is None or m.name in options.measures]
    try:
        # Programs get JSON on standard output, and whoever waits for it the rows as they come.
        table = sys.stderr if options.output == "json" else sys.stdout
        found = measure_all(options.paths, measures, rounds, seconds, table)
    except LoadError as error:
        print(f"benchmarks.paths: {error}", file=sys.stderr)
        return 1
    if options.output == "json":
        json.dump(as_json(found, seconds), sys.stdout, indent=1)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
