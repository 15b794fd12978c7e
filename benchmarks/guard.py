"""Whether the data plane costs more than it did: `python -m benchmarks.guard [--update]`.

What is compared is counted, not timed: machine instructions and system calls of a scripted conversation
(`benchmarks.scripted`) under valgrind, which are the same however busy the machine is. Instructions are given as a
multiple of those of a reference that is counted in the same run (a bare TLS echo of the same bytes, a bare handshake, a
fixed piece of Python), so that another build of Python or OpenSSL moves both. The baseline, `guard.json`, is part of
the repository; with another minor version of Python or another processor architecture there is nothing to compare with.

It sees neither what the kernel does, nor caches, nor time that is spent waiting: those are for `make bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from benchmarks import scripted
from control.client.csr import make_request
from control.server.ca import Authority, write_identity

TOLERANCE: Final = 0.025
"""Of the baseline's instructions; repeated counts, on an idle machine or a busy one, differ by a tenth of a percent."""
CALLS_TOLERANCE: Final = 0.01
"""Of the baseline's system calls; repeated counts are equal."""
SPARE_CALLS: Final = 0.2
"""System calls of an operation that are no change: memory is asked for now and then."""
TIMEOUT_S: Final = 240.0
BASELINE: Final = Path(__file__).with_name("guard.json")

_ROOT: Final = Path(__file__).parent.parent
_TOTALS: Final = re.compile(r"^totals: (\d+)(?: (\d+))?", re.MULTILINE)  # zeros at the end are left out
_SCENARIOS: Final = {scenario.name: scenario for scenario in scripted.SCENARIOS}
_WHAT_TO_DO: Final = """\
Nothing of the machine moves these numbers: the code does more than it did. Mend it; or, if that is the price of
something wanted, run `python -m benchmarks.guard --update` and say in the commit what it is the price of."""
_KEEP_IT: Final = """\
Better by more than the tolerance: run `python -m benchmarks.guard --update`, so that it is kept."""


class GuardError(Exception):
    """There is nothing to compare, or nothing to compare with; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one operation of a scenario."""

    ratio: float
    """Instructions, as a multiple of one operation of the reference's."""
    instructions: int
    """Not compared: for people."""
    calls: float
    """System calls."""


@dataclass(frozen=True, slots=True)
class Record:
    """What was counted, and with which versions: the baseline's form."""

    conditions: Mapping[str, str]
    costs: Mapping[str, Cost]


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison. `before` is None for what the baseline does not have."""

    scenario: str
    quantity: Literal["instructions", "calls"]
    before: float | None
    now: float

    @property
    def change(self) -> float:
        """Of the baseline: 0.1 is 10 % more."""
        return self.now / self.before - 1 if self.before else 0.0

    @property
    def verdict(self) -> Literal["same", "worse", "better", "new"]:
        if self.before is None:
            return "new"
        spare = TOLERANCE * self.before
        if self.quantity == "calls":
            spare = max(CALLS_TOLERANCE * self.before, SPARE_CALLS)
        if abs(self.now - self.before) <= spare:
            return "same"
        return "worse" if self.now > self.before else "better"


def count(
    names: Sequence[str] = (), program: Sequence[str] = ("-m", "benchmarks.scripted"), tree: Path = _ROOT
) -> Record:
    """Count the named scenarios (none: all). Raises GuardError.

    `program`: what Python is told to run, in `tree`; it runs `scripted.main`.
    """
    if shutil.which("valgrind") is None:
        raise GuardError("valgrind is not installed: `make setup` installs it, as root, or lists what is missing")
    with tempfile.TemporaryDirectory(prefix="guard-") as temporary:
        directory = Path(temporary)
        _issue_identities(directory)
        ran = _run(directory, [*program, temporary, *names], tree)
        # Between two marks is what counts; each part ends where the next one begins.
        parts = [_totals(directory / f"counts.{2 * number + 2}") for number in range(len(ran))]
    each = {
        name: (instructions / operations, calls / operations)
        for (name, operations), (instructions, calls) in zip(ran, parts, strict=True)
    }
    costs = {
        name: Cost(round(found[0] / each[_SCENARIOS[name].reference][0], 4), round(found[0]), round(found[1], 3))
        for name, found in each.items()
        if name in _SCENARIOS
    }
    return Record(conditions(), costs)


def _issue_identities(directory: Path) -> None:
    authority = Authority.create(directory / "ca", scripted.TRUST_DOMAIN)
    for identity in scripted.IDENTITIES:
        own = directory / identity.service_account
        issued = authority.issue(make_request(own, identity).read_bytes(), identity)
        write_identity(own, issued, authority.bundle_pem)


def _run(directory: Path, arguments: Sequence[str], tree: Path) -> list[tuple[str, int]]:
    """What ran, in order, with the number of its operations. Raises GuardError."""
    command = [
        *("valgrind", "--tool=callgrind", "--vgdb=no", f"--log-file={directory / 'log'}"),
        *(f"--callgrind-out-file={directory / 'counts'}", "--collect-systime=yes"),
        f"--dump-before={scripted.MARK}",
        *(sys.executable, *arguments),
    ]
    # Nothing of the caller's environment: the order of sets depends on the seed, and the stack's place on its size.
    environment = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONHASHSEED": "0"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise GuardError(f"the conversation did not end within {TIMEOUT_S:g} s") from None
    if done.returncode:
        raise GuardError(f"the conversation failed:\n{done.stderr}")
    return [(name, operations) for name, operations in json.loads(done.stdout)]


def _totals(path: Path) -> tuple[int, int]:
    """Instructions and system calls of a part."""
    found = _TOTALS.search(path.read_text())
    if found is None:
        raise GuardError(f"{path.name} has no totals: is this another version of valgrind?")
    return int(found[1]), int(found[2] or 0)


def conditions() -> dict[str, str]:
    """What counts depend on, beside the code."""
    valgrind = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "machine": platform.machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "openssl": ssl.OPENSSL_VERSION,
        "libc": " ".join(platform.libc_ver()),
        "valgrind": valgrind.strip(),
    }


def load(path: Path = BASELINE) -> Record:
    """Raises GuardError."""
    try:
        read = json.loads(path.read_text())
        costs = {name: Cost(**cost) for name, cost in read["costs"].items()}
        return Record(dict(read["conditions"]), costs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GuardError(f"{path}: no baseline: {error!r}: run `python -m benchmarks.guard --update`") from None


def save(record: Record, path: Path = BASELINE) -> None:
    path.write_text(_json(record) + "\n")


def compare(baseline: Record, now: Record) -> list[Row]:
    """Two rows for each scenario that was counted now. Raises GuardError when they cannot be compared."""
    wanted, found = _kind(baseline), _kind(now)
    if wanted != found:
        raise GuardError(
            f"the baseline was counted with {wanted}, this is {found}, and what is counted differs between them: "
            "compare where CI runs, or move the baseline there with `python -m benchmarks.guard --update`"
        )
    rows = []
    for name, cost in now.costs.items():
        before = baseline.costs.get(name)
        rows.append(Row(name, "instructions", before.ratio if before else None, cost.ratio))
        rows.append(Row(name, "calls", before.calls if before else None, cost.calls))
    return rows


def _kind(record: Record) -> str:
    """What must be equal: an instruction is one of this architecture, of the bytecode of this Python."""
    return f"{record.conditions['python'].rpartition('.')[0]} on {record.conditions['machine']}"


def failed(rows: Sequence[Row]) -> bool:
    """Whether anything costs more than it did, or is not in the baseline."""
    return any(row.verdict in ("worse", "new") for row in rows)


def report(baseline: Record, now: Record, rows: Sequence[Row]) -> str:
    """For people: a table, and what to do."""
    lines = [f"{'one operation':46} {'of':13} {'baseline':>9} {'now':>9} {'change':>8}"]
    for row in rows:
        scenario = _SCENARIOS[row.scenario]
        unit = scenario.reference if row.quantity == "instructions" else "system calls"
        label = scenario.label if row.quantity == "instructions" else ""
        before = "-" if row.before is None else f"{row.before:.2f}"
        said = "" if row.verdict == "same" else row.verdict
        lines.append(f"{label:46} {unit:13} {before:>9} {row.now:9.2f} {row.change:+8.1%} {said}".rstrip())
    differing = [
        f"{name} {baseline.conditions.get(name)} -> {value}"
        for name, value in now.conditions.items()
        if baseline.conditions.get(name) != value
    ]
    if differing:
        lines.append(f"Not as in the baseline: {', '.join(differing)}.")
    verdicts = {row.verdict for row in rows}
    if failed(rows):
        lines.append(_WHAT_TO_DO)
    if "better" in verdicts:
        lines.append(_KEEP_IT)
    return "\n".join(lines)


def _json(record: Any) -> str:
    return json.dumps(asdict(record), indent=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 when something costs more than in the baseline, 2 when that cannot be said."""
    parser = argparse.ArgumentParser("python -m benchmarks.guard", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--update", action="store_true", help="make what is counted now the baseline")
    parser.add_argument("--output", choices=("table", "json"), default="table")
    options = parser.parse_args(argv)
    try:
        now = count()
        if options.update:
            save(now)
        baseline = load()
        rows = compare(baseline, now)
    except GuardError as error:
        print(f"benchmarks.guard: {error}", file=sys.stderr)
        return 2
    if options.output == "json":
        each = [asdict(row) | {"change": row.change, "verdict": row.verdict} for row in rows]
        print(json.dumps({"failed": failed(rows), "rows": each} | asdict(now), indent=1))
    else:
        print(report(baseline, now, rows))
    return 1 if failed(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
