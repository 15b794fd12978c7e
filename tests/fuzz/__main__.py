"""`make fuzz`: each parser under atheris for FUZZ_SECONDS of processor time, and what led to new places kept.

Ends with 1 when an input broke a parser. Interrupted, it keeps what was found so far.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tests.fuzz import corpus

_SECONDS: Final = float(os.environ.get("FUZZ_SECONDS", "3600"))
_PROGRESS_S: Final = 60.0
_WORK: Final = Path("build/fuzz")
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_STATUS: Final = re.compile(r"#(\d+)\s.* cov: (\d+) ft: (\d+) corp: (\d+)")
_OPTIONS: Final = (
    "-len_control=20",
    "-rss_limit_mb=1024",
    "-timeout=600",  # of wall time; the worker looks at processor time
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("parsers", nargs="*", default=corpus.PARSERS, metavar="PARSER", help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time; default: one for each core")
    arguments = parser.parse_args()
    if unknown := set(arguments.parsers) - set(corpus.PARSERS):
        parser.error(f"no parser {', '.join(unknown)}; there are {', '.join(corpus.PARSERS)}")
    waiting, running, broken = list(arguments.parsers), list[_Run](), list[_Run]()
    said = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < arguments.jobs:
                running.append(_Run(waiting.pop(0)))
            time.sleep(1)
            for run in [run for run in running if run.over]:
                running.remove(run)
                run.finish()
                broken += [run] * run.broken
            if time.monotonic() - said > _PROGRESS_S:
                said = time.monotonic()
                _show(running)
    except KeyboardInterrupt:
        for run in running:
            run.finish()
    sys.exit(bool(broken))


def _in_dictionary(word: bytes) -> str:
    """A line of libFuzzer's."""
    return '"' + "".join(f"\\x{octet:02x}" for octet in word) + '"\n'


def _show(runs: Iterable[_Run]) -> None:
    for run in runs:
        print(run, flush=True)


class _Run:
    """One parser in a process of its own, with a folder of inputs that stays for the next time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._folder = _WORK / name
        self._inputs = self._folder / "inputs"
        self._inputs.mkdir(parents=True, exist_ok=True)
        parser = corpus.parser(name)
        for data in (*parser.seeds(), *corpus.kept(name)):
            (self._inputs / corpus.digest(data)).write_bytes(data)
        words = self._folder / "words"
        words.write_text("".join(map(_in_dictionary, parser.WORDS)))
        options = [*_OPTIONS, f"-max_len={parser.MAX_BYTES}", f"-dict={words}", f"-artifact_prefix={self._folder}/"]
        self._log = self._folder / "log"
        self._process = self._worker(*options, str(self._inputs))
        self._seconds = 0.0

    def __str__(self) -> str:
        text = f"{self.name}: {self._spent():.0f} of {_SECONDS:.0f} s"
        executed, edges, features, kept = self._status()
        return f"{text}, {executed:,} inputs, {edges} places in the code, {features} features, {kept} inputs kept"

    def _status(self) -> list[int]:
        """As it says itself: inputs tried, places reached, features, inputs kept."""
        found = _STATUS.findall(self._log.read_text(errors="replace"))
        return [int(number) for number in found[-1]] if found else [0, 0, 0, 0]

    @property
    def over(self) -> bool:
        return self._process.poll() is not None or self._spent() >= _SECONDS

    @property
    def broken(self) -> bool:
        """Whether it ended by itself. Holds once it is finished."""
        return not self._stopped

    def finish(self) -> None:
        """End it, say what was found, and keep the fewest inputs that reach all that was reached."""
        self._stopped = self._process.poll() is None
        print(self, flush=True)
        self._process.terminate()
        self._process.wait()
        corpus.spend(self.name, self._seconds, self._status()[0])
        if not self._stopped:
            print(f"{self.name}: BROKEN; the input and the traceback are in {self._folder}", flush=True)
            return
        fewest = self._folder / "fewest"
        shutil.rmtree(fewest, ignore_errors=True)
        fewest.mkdir()
        if self._worker("-merge=1", str(fewest), str(self._inputs)).wait() == 0:
            corpus.keep(self.name, [path.read_bytes() for path in fewest.iterdir()])
            shutil.rmtree(self._inputs)
            fewest.rename(self._inputs)

    def _worker(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.fuzz.worker", self.name, *arguments]
        with self._log.open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def _spent(self) -> float:
        """Seconds of processor time."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            return self._seconds
        self._seconds = max(self._seconds, (int(fields[11]) + int(fields[12])) / _TICKS)
        return self._seconds


if __name__ == "__main__":
    main()
