"""Several generators at once: they begin together, and one that fails is said."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from functools import partial
from pathlib import Path

import pytest

from benchmarks import load
from benchmarks.harness.bench import BenchError
from benchmarks.load.together import run_together
from tests.benchmarks.load.conftest import LOOPBACK, Served, free_ports

SECONDS = 0.3


def _start(argv: list[str], late_s: float = 0.0) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        ["sh", "-c", f'sleep {late_s}; exec "$@"', "sh", *argv], stdin=pipe, stdout=pipe, stderr=pipe
    )


def test_who_waits_begins_with_the_last(program: Path, served: Served) -> None:
    argv = load.argv(program, load.closed(1, 64), LOOPBACK, served(), SECONDS, waits=True)
    late_s = 2 * SECONDS  # alone, the first would have ended before the second began
    found = run_together("x", {"first": partial(_start, argv), "second": partial(_start, argv, late_s)}, SECONDS)
    assert found.seconds > SECONDS / 2
    assert len(found.outcomes) == 2


def test_one_that_cannot_begin_is_said_and_nobody_is_left(program: Path, served: Served) -> None:
    somewhere = served()
    with free_ports(1) as nowhere:
        pass
    started = []

    def start(port: int) -> subprocess.Popen[bytes]:
        started.append(_start(load.argv(program, load.closed(1, 64), LOOPBACK, port, SECONDS, waits=True)))
        return started[-1]

    with pytest.raises(BenchError, match=r"x: second: .*Connection refused"):
        run_together("x", {"first": partial(start, somewhere), "second": partial(start, nowhere)}, SECONDS)
    assert [one.poll() is None for one in started] == [False, False]


def test_what_callers_together_did_not_sustain_is_their_rate(program: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as listener:

        def slowly() -> None:
            made = [listener.accept()[0] for _ in range(2)]
            with contextlib.ExitStack() as stack:
                for one in map(stack.enter_context, made):
                    threading.Thread(target=answer, args=(one,), daemon=True).start()
                ended.wait()

        def answer(one: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := one.recv(64):
                    ended.wait(0.02)
                    one.sendall(data)

        ended = threading.Event()
        thread = threading.Thread(target=slowly)
        thread.start()
        argv = load.argv(program, load.opened(1, 64, 100), LOOPBACK, listener.getsockname()[1], SECONDS, waits=True)
        found = run_together("x", {name: partial(_start, argv) for name in ("a", "b")}, SECONDS)
        ended.set()
        thread.join()
    assert found.sample("p99_us", 0.0).bottleneck.startswith("did not sustain 200 requests/s: ")
