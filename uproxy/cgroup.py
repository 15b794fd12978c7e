"""Control groups (version 2) by path: find the hierarchy, kill what is in a subtree, remove it."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

# A killed process needs an instant to be gone; a process in an uninterruptible sleep may take longer.
_KILL_TIMEOUT_S = 5.0


class SandboxError(Exception):
    """A sandbox that cannot be made here. The text says what is missing and how to mend it."""


def mount_point() -> Path:
    """Where the cgroup2 hierarchy is mounted (on a hybrid system that is not /sys/fs/cgroup)."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, kind, *_ = line.split(" ")
        if kind == "cgroup2":
            return Path(target)
    raise SandboxError(
        "no cgroup2 hierarchy is mounted, and capture is attached to cgroups: mount -t cgroup2 none /sys/fs/cgroup"
    )


def kill(directory: Path) -> None:
    """SIGKILL for everything in the subtree (also what is stopped or forks), and wait until it is gone."""
    try:
        (directory / "cgroup.kill").write_text("1")
    except FileNotFoundError:
        return
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while _populated(directory):
        if time.monotonic() > deadline:
            raise SandboxError(f"processes in {directory} do not die; see {directory}/*/cgroup.procs")
        time.sleep(0.002)


def _populated(directory: Path) -> bool:
    try:
        return "populated 1" in (directory / "cgroup.events").read_text()
    except OSError:
        if directory.exists():
            raise
        return False  # somebody else has removed it


def remove(directory: Path) -> None:
    """Kill what is in the subtree and remove it, leaves first."""
    kill(directory)
    for parent, children, _ in os.walk(directory, topdown=False):
        for child in children:
            _remove_empty(Path(parent, child))
    if directory.exists():
        _remove_empty(directory)


def _remove_empty(directory: Path) -> None:
    # A zombie not yet reaped, or a killed process on its way out, holds a cgroup for an instant (EBUSY).
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while True:
        try:
            directory.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.002)
