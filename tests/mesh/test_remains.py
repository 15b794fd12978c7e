"""Nothing of a lab is left, however its owner ends; and no lab touches another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.lab import remains
from benchmarks.lab.apps import commands
from benchmarks.lab.remains import LabNames, Owner
from benchmarks.lab.topology import Lab
from tests.support import inside

_OWNER = """
import time
from benchmarks.lab.apps import commands
from benchmarks.lab.topology import Lab

with Lab(control=CONTROL) as lab:
    lab.host("a").workload("one", commands.idle())
    lab.start()
    print(lab.names.lab_id, lab._reaper.pid, flush=True)
    time.sleep(300)
"""


@contextmanager
def _owner(*, control: bool = False) -> Iterator[tuple[subprocess.Popen[str], LabNames, int]]:
    """A process with a lab that runs, the lab's names, and the pid of its reaper."""
    root = Path(__file__).parents[2]
    program = f"CONTROL = {control}\n{_OWNER}"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        lab_id, reaper = process.stdout.readline().split()
        try:
            yield process, LabNames(lab_id), int(reaper)
        finally:
            process.kill()


def test_success_leaves_nothing() -> None:
    with Lab() as lab:
        lab.host("a").workload("one", commands.idle())
        lab.start()
        assert len(remains.left_of(lab.names.prefix)) >= 5, "the search does not see a lab that is there"
    assert not remains.left_of(lab.names.prefix)


def test_exception_leaves_nothing() -> None:
    def fail() -> None:
        with Lab() as lab:
            names.append(lab.names)
            lab.host("a").workload("one", commands.idle())
            lab.start()
            raise KeyboardInterrupt

    names: list[LabNames] = []
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not remains.left_of(names[0].prefix)


@pytest.mark.parametrize("control", [False, True], ids=["files", "control plane"])
def test_killed_owner_leaves_nothing(control: bool) -> None:
    with _owner(control=control) as (process, names, _):
        launched = _pids_of(names)
        programs = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in launched}
        assert len(launched) >= 4
        assert ("nats-server" in programs) is control
        process.kill()
        process.wait()
        inside.eventually(lambda: not remains.left_of(names.prefix))
    inside.eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in launched))


def test_a_later_lab_sweeps_what_a_killed_reaper_left() -> None:
    with _owner() as (process, names, reaper):
        assert remains.left_of(names.prefix)
        os.kill(reaper, signal.SIGKILL)
        process.kill()
        process.wait()
        with Lab() as other:
            assert not remains.left_of(names.prefix)
            assert remains.left_of(other.names.prefix)


def test_a_living_lab_is_not_swept() -> None:
    with _owner() as (process, names, _):
        before = remains.left_of(names.prefix)
        assert names.lab_id not in remains.sweep_dead()
        assert remains.left_of(names.prefix) == before
        process.terminate()
        process.wait()
        inside.eventually(lambda: not remains.left_of(names.prefix))


def test_owner_is_not_mistaken_for_a_later_process() -> None:
    me = Owner.of(os.getpid())
    assert me.lives()
    assert not Owner(me.pid, str(int(me.started) - 1)).lives()


def _pids_of(names: LabNames) -> list[int]:
    return [int(pid) for file in names.cgroup.rglob("cgroup.procs") for pid in file.read_text().split()]
