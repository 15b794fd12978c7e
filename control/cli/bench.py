"""`meshctl bench`: measure the mesh against its peers on this machine, and compare two such runs."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Final

from control.cli.output import CommandError, add_output_option, counted, printable, show_json, show_table

# All of the lab and the data plane comes with the benchmarks, which no other command needs: imported where it is used.

_RUN_EXAMPLES: Final = """\
examples:
  meshctl bench run --quick
  meshctl bench run --suite paths --output /tmp/paths
  meshctl bench run --peer ztunnel=/usr/local/bin/ztunnel

Needs root; --quick takes under five minutes, all of it under an hour. Progress goes to stderr, a summary to stdout, and
into DIR: results.json (everything), results.csv (a row for each round), report.html (for people). Exit status 1 if
something failed; what the harness refuses to report is no failure. Interrupted, it writes what it has: 130. One run at
a time measures on a machine.
"""
_COMPARE_EXAMPLES: Final = """\
examples:
  meshctl bench compare before after
  meshctl bench compare before/results.json after/results.json -o json

Ratios of subject and baseline agree when their intervals have a value in common. Of ratios that did not change about
1 in 200 moves all the same: repeat a run before you believe a small move. Exit status: 0 all agree, 1 something moved,
or B lacks a ratio that A has, 2 a file is not understood.
"""
_PLAN_EXAMPLES: Final = """\
examples:
  curl -sG prometheus:9090/api/v1/query --data-urlencode 'query=sum without (instance)
      (rate(istio_requests_total[1d]))' >rates.json
  kubectl get pods -A -o json >pods.json
  meshctl bench plan --prometheus rates.json --topology pods.json --run bench-20261123T221300Z
  meshctl bench plan --prometheus metrics.txt --seconds 3600 --topology instances.csv --l7 shop/reviews -o json

The coefficients are those of the machine that RUN was measured on: read what one placement costs to another, not cores.
Of placements whose interval reaches 1 it cannot be said that they cost more than the least.
"""
_NOT_UNDERSTOOD: Final = 2
_DIFFERS: Final = 1
_INTERRUPTED: Final = 130
_ENDING: Final = (signal.SIGINT, signal.SIGTERM)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench run`, `bench compare` and `bench plan` to the parser."""
    bench = commands.add_parser("bench", help="measure on this machine", description="Measure, and compare runs.")
    actions = bench.add_subparsers(metavar="COMMAND", required=True)
    run = actions.add_parser(
        "run",
        help="measure the mesh against its peers on this machine",
        description="Measure the mesh against its peers on this machine (needs root).",
        epilog=_RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument(
        "--suite",
        action="append",
        metavar="NAME",
        help="paths, kernel, architectures, memory, waypoint, control or soak; repeatable (default: all; --quick: "
        "the first four)",
    )
    run.add_argument("--quick", action="store_true", help="fewer, shorter rounds and measures, for a first look")
    run.add_argument(
        "--output", type=Path, metavar="DIR", help="where the files go (default: bench-DATE in this directory)"
    )
    run.add_argument(
        "--peer",
        action="append",
        default=[],
        type=_peer,
        metavar="NAME=PATH",
        help="measure a program that no package brings, too: ztunnel or linkerd (a linkerd2-proxy)",
    )
    run.set_defaults(run=_run)
    compare = actions.add_parser(
        "compare",
        help="say whether two runs agree",
        description="Say of every ratio whether two runs agree within their intervals.",
        epilog=_COMPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("a", type=Path, metavar="A", help="results.json of a run, or its directory")
    compare.add_argument("b", type=Path, metavar="B", help="of another")
    add_output_option(compare)
    compare.set_defaults(run=_compare)
    _add_plan(actions)


def _add_plan(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = actions.add_parser(
        "plan",
        help="say which placement of the L7 proxy would cost a mesh least",
        description="Say which placement of the L7 proxy would cost least, for a mesh whose istio_requests_total is "
        "known, by what the suite architectures has measured.",
        epilog=_PLAN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument(
        "--prometheus",
        type=Path,
        metavar="FILE",
        required=True,
        help="istio_requests_total: the JSON of an instant query of its rate(), or counters as /metrics has them",
    )
    plan.add_argument("--seconds", type=_positive, metavar="S", help="how long counters have counted; rates need none")
    plan.add_argument(
        "--topology",
        type=Path,
        metavar="FILE",
        help="instances with service account and node: kubectl get pods -A -o json, or CSV with the columns namespace, "
        "workload, service_account and node (default: what the labels pod and node say of reporters)",
    )
    plan.add_argument(
        "--l7",
        action="append",
        metavar="NAMESPACE/SERVICE",
        help="a service that needs L7; repeatable (default: all that are called)",
    )
    plan.add_argument(
        "--core-gb", type=_positive, metavar="GB", help="memory that costs as much as a core (default: 8)"
    )
    plan.add_argument(
        "--run",
        type=Path,
        metavar="RUN",
        dest="measured",
        help="results.json of a run with the suite architectures, or its directory (default: the newest bench-* here)",
    )
    add_output_option(plan)
    plan.set_defaults(run=_plan)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _peer(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not name or not equals or not os.access(path, os.X_OK) or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH with the path of a program")
    return name, Path(path).absolute()


def _run(arguments: argparse.Namespace) -> int:
    from benchmarks import run as benchmarks
    from benchmarks.harness.results import FILE

    every = [name for name in benchmarks.SUITES if not (arguments.quick and name in benchmarks.LONG)]
    names = _known(arguments.suite or every, benchmarks.SUITES, "suite")
    _known([name for name, _ in arguments.peer], benchmarks.PEERS, "peer")
    directory = arguments.output or Path(f"bench-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    if (directory / FILE).exists():
        raise CommandError(f"{directory} holds the results of a run, which are never overwritten: name another one")
    if os.geteuid() != 0:
        raise CommandError("measuring needs root: it builds network namespaces and loads eBPF programs")
    before = {number: signal.signal(number, _end_once) for number in _ENDING}
    try:
        return _measured(names, directory, arguments)
    except benchmarks.BusyError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"{error.filename or directory}: {error.strerror}") from error
    except KeyboardInterrupt:
        print("error: interrupted: not everything was written", file=sys.stderr)
        return _INTERRUPTED
    finally:
        for number, handler in before.items():
            # Ended once, it ignores them until the process is gone: a late one would take its status away.
            if signal.getsignal(number) is _end_once:
                signal.signal(number, handler)


def _measured(names: Sequence[str], directory: Path, arguments: argparse.Namespace) -> int:
    from benchmarks import run as benchmarks
    from benchmarks.report import text

    began = time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {line}", file=sys.stderr, flush=True)

    done = benchmarks.run(
        [benchmarks.find(name) for name in names],
        directory,
        quick=arguments.quick,
        peers=dict(arguments.peer),
        tell=tell,
    )
    text.show(done.results)
    for file in done.files:
        print(file)
    for failure in done.failures:
        first, *more = map(printable, failure.splitlines())
        print(f"error: {first}", *more, sep="\n  ", file=sys.stderr)
    if done.interrupted:
        print("error: interrupted: what was found before is in these files", file=sys.stderr)
        return _INTERRUPTED
    return 1 if done.failures else 0


def _end_once(number: int, frame: FrameType | None) -> None:
    """End the run. What follows takes seconds and is not ended again: removing what was made, and writing."""
    for one in _ENDING:
        # Ignored by what is started meanwhile, too (`ip netns delete`), since a terminal tells all of its processes.
        signal.signal(one, signal.SIG_IGN)
    print("ending: what was made is being removed, and what was found is being written", file=sys.stderr, flush=True)
    raise KeyboardInterrupt


def _known(names: Collection[str], known: Collection[str], what: str) -> list[str]:
    for name in names:
        if name not in known:
            raise CommandError(f"no {what} is called {name}: known is {', '.join(known)}", _NOT_UNDERSTOOD)
    return list(dict.fromkeys(names))


def _compare(arguments: argparse.Namespace) -> int:
    from benchmarks.harness.compare import compare, load
    from benchmarks.harness.results import ResultsError
    from benchmarks.report import wording

    try:
        rows = compare(load(arguments.a), load(arguments.b))
    except ResultsError as error:
        raise CommandError(str(error), _NOT_UNDERSTOOD) from error
    moved = sum(row.verdict == "moved" for row in rows)
    both = sum(row.a is not None and row.b is not None for row in rows)
    gone = [row for row in rows if row.verdict == "only in A"]
    status = _DIFFERS if moved or gone else 0
    if arguments.output == "json":
        show_json({"agree": not status, "ratios": [asdict(row) | {"verdict": row.verdict} for row in rows]})
        return status
    show_table(
        ("MEASURE", "SUBJECT", "BASELINE", "OF", "A", "B", "B/A", "VERDICT"),
        (
            (
                row.measure,
                row.subject,
                row.baseline,
                row.key,
                wording.ratio(row.a) if row.a else "",
                wording.ratio(row.b) if row.b else "",
                wording.times(row.b.median / row.a.median) if row.a and row.b else "",
                row.verdict,
            )
            for row in rows
        ),
    )
    for row in gone:
        print(f"{row.measure}: B has no ratio of {row.subject} to {row.baseline}: not measured there, or refused")
    lost = f", {len(gone)} gone" if gone else ""
    print(f"{both - moved} of {counted(both, 'ratio')} agree within their intervals, {moved} moved{lost}")
    return status


def _plan(arguments: argparse.Namespace) -> int:
    from benchmarks.harness.compare import load
    from benchmarks.harness.results import ResultsError
    from benchmarks.plan import model, topology, traffic
    from benchmarks.report import wording

    try:
        run = arguments.measured or _newest()
        made = model.Model(load(run))
        seen = traffic.read(_text(arguments.prometheus), arguments.seconds)
        listed = topology.read(_text(arguments.topology)) if arguments.topology else seen.instances
        asked = model.demand(seen, topology.of(model.workloads(seen), listed), arguments.l7)
    except (ResultsError, topology.PlanError) as error:
        raise CommandError(str(error), _NOT_UNDERSTOOD) from error
    core_gb = arguments.core_gb or model.CORE_GB
    estimates, even = made.estimates(asked, core_gb), made.break_even(asked, core_gb)
    if arguments.output == "json":
        show_json(
            {
                "run": str(run),
                "demand": asdict(asked) | {"outside_per_second": seen.outside_per_second},
                "core_gb": core_gb,
                "placements": [asdict(one) for one in estimates],
                "break_even": asdict(even) if even else None,
                "proofs": [asdict(one) for one in made.proofs()],
            }
        )
        return 0
    print(
        f"{wording.number(asked.per_second)} calls/s between {counted(sum(asked.instances.values()), 'instance')} on "
        f"{counted(len(asked.instances), 'node')}, {asked.l7_share:.0%} of which need L7"
    )
    if seen.outside_per_second:
        print(f"left out: {wording.number(seen.outside_per_second)} calls/s with an end outside of the mesh")
    show_table(
        ("PLACEMENT", "IS", "PROXIES", "CORES", "MEMORY GB", "COST IN CORES", "TO THE LEAST (95 %)"),
        (
            (
                one.subject,
                one.label,
                str(one.processes),
                wording.number(one.cores),
                wording.number(one.memory_gb),
                wording.number(one.cost),
                f"{one.to_least.median:.2f} ({one.to_least.low:.2f}{wording.DASH}{one.to_least.high:.2f})",
            )
            for one in estimates
        ),
    )
    least, *others = estimates
    tied = [one.subject for one in others if one.to_least.low <= 1]
    print(f"least: {least.subject}" + (f"; by these numbers not more than it: {', '.join(tied)}" if tied else ""))
    if even is not None:
        where = "at no share" if even.low is None else f"at a share of {even.low:.0%} to {even.high:.0%}"
        print(
            f"{even.around} costs less than each placement of Envoys beside workloads, accounts or nodes {where} of "
            f"calls that need L7, by the medians of the rounds; at some share in {even.rounds} of {even.of} rounds"
        )
    for proof in made.proofs():
        print(
            f"in the run itself: {proof.what}: {wording.number(proof.predicted)} {proof.unit} by this model, "
            f"{wording.number(proof.measured)} measured"
        )
    return 0


def _newest() -> Path:
    """The last run here. Raises CommandError."""
    from benchmarks.harness.results import FILE

    runs = sorted(one.parent for one in Path().glob(f"bench-*/{FILE}"))
    if not runs:
        raise CommandError(
            "there is no bench-* here: name a run with --run, or make one with meshctl bench run --suite architectures",
            _NOT_UNDERSTOOD,
        )
    return runs[-1]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: {error}", _NOT_UNDERSTOOD) from error
