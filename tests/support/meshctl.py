"""`meshctl up` and `serve` as processes of their own, for tests from end to end."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.brokers import HOST, free_port

PATIENCE_S = 60.0


@dataclass
class Plane:
    """A control plane that runs, and its command line."""

    process: subprocess.Popen[str]
    directory: Path
    socket: Path
    broker_port: int
    told: dict[str, Any]
    """What it said of itself when it was ready."""

    def meshctl(self, *argv: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "control.cli", *map(str, argv), "--socket", str(self.socket)]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=PATIENCE_S, check=False)

    def ask(self, *argv: object, stdin: str = "") -> Any:
        """The JSON that a command answers; it must succeed."""
        done = self.meshctl(*argv, "-o", "json", stdin=stdin)
        assert done.returncode in (0, 3), done.stderr
        return json.loads(done.stdout)

    def published(self) -> None:
        """Wait until the broker holds everything."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.ask("status")["broker"]["published"]:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def kill(self) -> None:
        """No last words: as a crash."""
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def log(self) -> str:
        return (self.directory.parent / f"{self.directory.name}.log").read_text()


@contextlib.contextmanager
def running(directory: Path, command: str, *options: object, broker_port: int) -> Iterator[Plane]:
    """`meshctl COMMAND --dir DIRECTORY …`, from its being ready until the block ends; then it must end in order."""
    socket = directory.with_suffix(".sock")
    argv = [sys.executable, "-m", "control.cli", command, "--dir", directory, "--socket", socket]
    argv += ["--host", HOST, "--listen", HOST, "--port", free_port(), "--metrics-port", 0, "-o", "json", *options]
    with (
        directory.with_suffix(".log").open("a") as log,
        subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            # One JSON object, printed when it is ready; nothing when it fails.
            said = ""
            while (line := process.stdout.readline()) and line != "}\n":
                said += line
            plane = Plane(process, directory, socket, broker_port, json.loads(said + line) if line else {})
            assert line, plane.log()
            yield plane
            if process.poll() is None:
                process.terminate()
                assert process.wait(PATIENCE_S) == 0, plane.log()
        finally:
            process.kill()


@contextlib.contextmanager
def up(directory: Path, *options: object, port: int = 0) -> Iterator[Plane]:
    """`meshctl up`, with nats-server on a port that is free, or on the one that it had before."""
    port = port or free_port()
    with running(directory, "up", "--broker-port", port, *options, broker_port=port) as plane:
        yield plane


def certify(*argv: object) -> subprocess.CompletedProcess[str]:
    """A workload's side: `python -m control.client.certify …`."""
    command = [sys.executable, "-m", "control.client.certify", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
