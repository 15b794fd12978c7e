"""`make kernels`: every eBPF program, and the tests of them, on kernels of Debian's in an emulator and on this one."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Final

from bpf import needs
from tests.kernels import guest

_TESTS: Final = ("tests/bpf", "tests/uproxy/node/test_features.py")
_LEFT_OUT: Final = (
    *("tests/bpf/test_beside.py", "tests/bpf/test_loader.py", "tests/bpf/test_needs.py"),
    "tests/bpf/test_direct_attacks.py::TestPlace::test_a_destination_that_another_program_changed_is_not_admitted",
)
"""They need clang, or the documentation."""
_TIMEOUT_S: Final = 1200.0


@dataclass(frozen=True, slots=True)
class Result:
    """What was seen on one kernel."""

    release: str
    check: dict[str, Any]
    """What `meshctl check -o json` says."""
    tests: str
    """pytest's last line; empty where they were not run."""
    passed: bool


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=__doc__)
    parser.add_argument(
        "series", nargs="*", default=["6.1"], help="such as 6.1: the newest cloud kernel of each is taken"
    )
    parser.add_argument("--load-only", action="store_true", help="run no tests: a minute instead of several")
    arguments = parser.parse_args()
    try:
        results = [*(_in_guest(series, arguments.load_only) for series in arguments.series), _here()]
    except guest.GuestError as error:
        sys.exit(str(error))
    _show(results)
    sys.exit(not all(result.passed for result in results))


def _in_guest(series: str, load_only: bool) -> Result:
    package = guest.newest(series)
    kernel = guest.fetch(package)
    print(f"{package}: begun", flush=True)
    tests = [] if load_only else [*_TESTS, *(f"--deselect={path}" for path in _LEFT_OUT)]
    report, console = guest.boot(kernel, guest.pack(kernel), tests, _TIMEOUT_S)
    found = json.loads(report)
    if not found["check"]:
        raise guest.GuestError(f"{package}: {found['errors']}")
    check = json.loads(found["check"])
    summary = next((line for line in reversed(console.splitlines()) if " passed" in line or " failed" in line), "")
    if found["tests"]:
        print(console)
    return Result(found["release"], check, summary, _is_whole(check) and not found["tests"])


def _here() -> Result:
    """This kernel's tests are in `make test`."""
    command = [sys.executable, "-m", "control.cli", "check", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise guest.GuestError(f"this host: {done.stderr.strip()}")
    check = json.loads(done.stdout)
    return Result(platform.release(), check, "", _is_whole(check))


def _is_whole(check: dict[str, Any]) -> bool:
    return all(feature["ok"] for feature in check["features"])


def _show(results: list[Result]) -> None:
    print("\n".join(needs.table()))
    features = {(one["capture"], one["name"]) for result in results for one in result.check["features"]}
    found = [{(one["capture"], one["name"]): one for one in result.check["features"]} for result in results]
    width = max(len(" ".join(feature)) for feature in features)
    print("\nkernels:", ", ".join(result.release for result in results))
    for feature in sorted(features):
        marks = ("-" if feature not in of else "yes" if of[feature]["ok"] else "NO" for of in found)
        print(f"{' '.join(feature):{width}}", *(f"{mark:4}" for mark in marks))
    for result in results:
        print(f"\n{result.release}: capture {result.check['capture']}: {result.check['reason']}")
        for one in result.check["features"]:
            if not one["ok"]:
                print(f"  NO {one['capture']} {one['name']}: {one['detail']}")
        if result.tests:
            print(f"  tests: {result.tests}")


main()
