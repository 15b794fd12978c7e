"""A workload of the mesh's configuration that the lab does not start: each test runs a command as it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.lab import remains
from benchmarks.lab.topology import Workload
from tests.support import inside

FOREVER = "echo up; while :; do sleep 0.05; done"


def argv_of(job: Workload, *command: str, user: str = "nobody", **options: str) -> list[str]:
    argv = [*job.arguments()[:-1]]
    argv += ["--drain-timeout-s", "1"]
    argv[argv.index("--user") + 1] = user
    for name, value in options.items():
        argv[argv.index(f"--{name.replace('_', '-')}") + 1] = value
    return [*argv, "--", *command]


def started(job: Workload, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    return job.host.spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@contextmanager
def running(job: Workload, *command: str, launched: Sequence[str] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher, once its command has printed a line; ended with the block if it still runs.

    `launched`: further options of `uproxy exec`.
    """
    argv = argv_of(job, *command)
    at = argv.index("--")
    with started(job, [*argv[:at], *launched, *argv[at:]]) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline(), process.stderr.read().decode()
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def gone(job: Workload) -> None:
    left = [entry for entry in remains.left_of(job.netns) if Path(entry).name.startswith(job.netns)]
    assert not left
    assert not job.box.cgroup.exists()
    assert not (job.host.lab.directory / "state" / job.name).exists()
    with job.host.entered():
        links = subprocess.run(["ip", "-o", "link", "show"], capture_output=True, text=True, check=True).stdout
        assert job.box.host_link not in links
    known = [one["workload"] for one in job.host.node().status()["workloads"]]
    assert job.name not in known


def pid_or_0(job: Workload) -> int:
    with suppress(Exception):
        return job.proxy_pid()
    return 0


def is_ready(job: Workload) -> bool:
    with suppress(OSError):
        return "pending" not in inside.http_get(job, 15021, "/healthz/ready")
    return False
