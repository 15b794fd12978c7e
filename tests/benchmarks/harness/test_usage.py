"""Processor time of real processes, against what they say of themselves."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

import pytest

from benchmarks.harness.usage import GoneError, Meter, processor_ns, pss_mb, softirq_ns

# Burns processor time, not time, and says how much it was: `spin(0.05)`.
SPIN = """
import os, subprocess, sys, threading, time

def spin(seconds, clock=time.process_time):
    began = clock()
    while clock() - began < seconds:
        pass
"""


class Program:
    """A Python program that waits for a line before each of its steps and answers when it is done."""

    def __init__(self, code: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SPIN) + textwrap.dedent(code)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # its children too
        self._process.communicate(timeout=10)

    def answer(self) -> str:
        return self._process.stdout.readline()

    def step(self) -> str:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer()


@pytest.mark.parametrize("seconds", [0.003, 0.1])
def test_processor_time_is_known_in_microseconds(seconds):
    code = f"print(flush=True); input(); spin({seconds}); print(time.process_time_ns(), flush=True); input()"
    with Program(code) as burner, Meter({"proxy": [burner.pid]}) as meter:
        before = processor_ns(burner.pid)
        said = int(burner.step())
        used = meter.used().processor_ns["proxy"]
    assert used == pytest.approx(said - before, abs=1_000_000)
    assert used >= seconds * 1e9


def test_threads_that_have_ended_count():
    code = """
    def work():
        spin(0.05, time.thread_time)

    print(flush=True); input()
    for _ in range(4):
        thread = threading.Thread(target=work); thread.start(); thread.join()
    print(flush=True); input()
    """
    with Program(code) as burner, Meter({"proxy": [burner.pid]}) as meter:
        burner.step()
        assert 0.2e9 <= meter.used().processor_ns["proxy"] < 0.25e9


CHILD = textwrap.dedent(SPIN) + "spin(0.1); print(flush=True); sys.stdin.readline()"


@pytest.mark.parametrize(
    ("ends", "exactness_ns"), [(True, 25_000_000), (False, 5_000_000)], ids=["comes and goes", "stays"]
)
def test_children_count_to_their_parent(ends, exactness_ns):
    code = f"""
    child = [sys.executable, "-S", "-c", {CHILD!r}]
    print(flush=True); input()
    started = subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    started.stdout.readline()
    used = time.clock_gettime_ns((~started.pid << 3) | 2)
    if {ends}:
        started.communicate(b"\\n")
    print(used, flush=True); input()
    """
    with Program(code) as parent, Meter({"proxy": [parent.pid]}) as meter:
        before = processor_ns(parent.pid)
        child = int(parent.step())
        own = processor_ns(parent.pid) - before
        used = meter.used().processor_ns["proxy"]
    assert child > 0.1e9
    assert used == pytest.approx(child + own, abs=exactness_ns)


def test_a_child_that_was_there_counts_from_now_on():
    code = """
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time\\nwhile True: pass"])
    print(flush=True); input(); print(flush=True); input()
    """
    with Program(code) as parent:
        time.sleep(0.3)
        with Meter({"proxy": [parent.pid]}) as meter:
            time.sleep(0.2)
            assert meter.used().processor_ns["proxy"] < 0.25e9


def test_only_the_part_that_counted_is_accounted():
    code = """
    print(flush=True); input(); spin(0.3); print(time.monotonic_ns(), flush=True)
    input(); time.sleep(0.3); spin(0.1); print(time.monotonic_ns(), flush=True); input()
    """
    with Program(code) as burner, Meter({"proxy": [burner.pid]}) as meter:
        begin = int(burner.step())
        end = int(burner.step())
        used = meter.used((begin, end)).processor_ns["proxy"]
    # Readings are 50 ms apart: at a change from all to nothing half of that is lost at most, and usually nothing.
    assert used == pytest.approx(0.1e9, abs=0.03e9)


@pytest.mark.parametrize("waited", [True, False], ids=["waited for", "not waited for"])
def test_a_process_that_ends_meanwhile_is_missed(waited):
    with Program("print(flush=True); input(); print(flush=True)") as short:
        with Meter({"proxy": [short.pid]}) as meter:
            short.step()
            os.waitid(os.P_PID, short.pid, os.WEXITED | (0 if waited else os.WNOWAIT))
            time.sleep(0.1)
            if waited:
                with pytest.raises(GoneError, match=f"process {short.pid} is gone"):
                    meter.used()
        with pytest.raises(GoneError):
            pss_mb([short.pid])


def test_memory_is_what_a_process_and_its_children_took():
    code = """
    print(flush=True); input(); kept = b"x" * 50_000_000; print(flush=True)
    input(); started = subprocess.Popen(
        [sys.executable, "-S", "-c", "kept = b'x' * 30_000_000; print(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    started.stdout.readline(); print(flush=True); input()
    """
    with Program(code) as grower:
        before = pss_mb([grower.pid])
        grower.step()
        grown = pss_mb([grower.pid])
        assert grown - before == pytest.approx(50, abs=2)
        grower.step()
        assert pss_mb([grower.pid]) - grown == pytest.approx(30 + 5, abs=5)  # its interpreter too


def test_pages_that_are_shared_count_once():
    code = """
    kept = b"x" * 50_000_000
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print(child, flush=True); input()
    """
    with Program(code) as parent:
        assert 50 <= pss_mb([parent.pid]) < 75


def test_softirq_time_grows():
    assert 0 <= softirq_ns() <= softirq_ns()
