"""Whether the data plane costs more than it did: `python -m benchmarks.guard [--update]`.

What is compared is counted, not timed: machine instructions and system calls of a scripted conversation
(`benchmarks.scripted`) under valgrind, which are the same however busy the machine is. Instructions are given as a
multiple of those of a reference that is counted in the same run (a bare TLS echo of the same bytes, a bare handshake, a
fixed piece of Python), so that another build of OpenSSL moves both. The baseline, `guard.json`, is part of the
repository. With another interpreter, by version, compiler or architecture, there is nothing to compare with; with
another library, valgrind or kind of processor what is equal is equal, and what costs more proves nothing.

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

TOLERANCE: Final = 0.03
"""Of the baseline's instructions. Repeated counts, on an idle machine or a busy one, differ by a tenth of a percent; a
bare echo of 64 B through TLS, which some are divided by, costs up to 1.5 % more with where its bytes lie in memory."""
CALLS_TOLERANCE: Final = 0.015
"""Of the baseline's system calls; repeated counts are equal, or for HTTP on a busy machine within 1 %."""
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
_RECORD: Final = "on a commit that is known to be good, `python -m benchmarks.guard --update` makes a baseline for here"
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
    """One comparison. `before` is None for what the baseline does not have, `now` for what is counted no more."""

    scenario: str
    quantity: Literal["instructions", "calls"]
    before: float | None
    now: float | None

    @property
    def change(self) -> float:
        """Of the baseline: 0.1 is 10 % more."""
        return self.now / self.before - 1 if self.before and self.now is not None else 0.0

    @property
    def verdict(self) -> Literal["same", "worse", "better", "new", "gone"]:
        if self.before is None:
            return "new"
        if self.now is None:
            return "gone"
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
    return interpreter() | {
        "build": " ".join(platform.python_build()),
        "openssl": ssl.OPENSSL_VERSION,
        "libc": " ".join(platform.libc_ver()),
        "valgrind": valgrind.strip(),
        "processor": _features(Path("/proc/cpuinfo").read_text()),
    }


def interpreter() -> dict[str, str]:
    """The conditions that have to be those of the baseline."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "compiler": platform.python_compiler(),
        "machine": platform.machine(),
    }


def _features(cpuinfo: str) -> str:
    """What valgrind lets programs know of an x86 processor, by which libraries choose their code."""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    return " ".join(one for one in ("cx16", "abm", "avx", "avx2", "bmi1", "f16c", "rdrand", "rdseed") if one in known)


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
    """Two rows for each scenario of either. Raises GuardError when they cannot be compared."""
    refuse_another_interpreter(baseline, now.conditions)
    rows = []
    for name in dict.fromkeys([*now.costs, *baseline.costs]):
        before, after = baseline.costs.get(name), now.costs.get(name)
        rows.append(Row(name, "instructions", before.ratio if before else None, after.ratio if after else None))
        rows.append(Row(name, "calls", before.calls if before else None, after.calls if after else None))
    if any(row.verdict == "worse" for row in rows) and (differing := _differing(baseline, now)):
        raise GuardError(
            f"something costs more than in the baseline, which was counted with others: {differing}. Whether they or "
            f"the code cost that cannot be said here: {_RECORD}\n{_table(rows)}"
        )
    return rows


def refuse_another_interpreter(baseline: Record, here: Mapping[str, str]) -> None:
    """An instruction is one of this architecture, of this interpreter as it was compiled. Raises GuardError."""
    wanted, found = (
        " ".join(conditions.get(name, "?") for name in interpreter()) for conditions in (baseline.conditions, here)
    )
    if wanted != found:
        raise GuardError(
            f"the baseline was counted with {wanted}, this is {found}, and what is counted differs between them: "
            f"compare where CI runs; or, {_RECORD}"
        )


def failed(rows: Sequence[Row]) -> bool:
    """Whether anything costs more than it did, is not in the baseline, or is in the baseline only."""
    return any(row.verdict in ("worse", "new", "gone") for row in rows)


def report(baseline: Record, now: Record, rows: Sequence[Row]) -> str:
    """For people: a table, and what to do."""
    lines = [_table(rows)]
    if differing := _differing(baseline, now):
        lines.append(f"Not as in the baseline: {differing}.")
    verdicts = {row.verdict for row in rows}
    if gone := dict.fromkeys(row.scenario for row in rows if row.verdict == "gone"):
        lines.append(f"In the baseline, and counted no more: {', '.join(gone)}.")
    if failed(rows):
        lines.append(_WHAT_TO_DO)
    if "better" in verdicts:
        lines.append(_KEEP_IT)
    return "\n".join(lines)


def _table(rows: Sequence[Row]) -> str:
    lines = [f"{'one operation':46} {'of':13} {'baseline':>9} {'now':>9} {'change':>8}"]
    for row in rows:
        scenario = _SCENARIOS.get(row.scenario)
        counted = row.quantity == "instructions"
        unit = "system calls" if not counted else scenario.reference if scenario else ""
        label = "" if not counted else scenario.label if scenario else row.scenario
        before, now = ("-" if value is None else f"{value:.2f}" for value in (row.before, row.now))
        said = "" if row.verdict == "same" else row.verdict
        lines.append(f"{label:46} {unit:13} {before:>9} {now:>9} {row.change:+8.1%} {said}".rstrip())
    return "\n".join(lines)


def _differing(baseline: Record, now: Record) -> str:
    return ", ".join(
        f"{name} {baseline.conditions.get(name)} -> {value}"
        for name, value in now.conditions.items()
        if baseline.conditions.get(name) != value
    )


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
