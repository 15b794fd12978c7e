"""What a lab leaves on the machine, found by its id, and how all of it is removed.

Run as a program it is a lab's reaper: it waits for the owner to die, in whatever way, and removes the lab.
"""

from __future__ import annotations

import os
import select
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from uproxy import cgroup, sandbox

LABS_DIR = Path("/run/uproxy-lab")
_LAUNCH_LOCKS = Path("/run/uproxy/exec")
_PREFIX = "uproxy-lab-"
_OWNER_FILE = "owner"
# A command that the dead owner had just started (`ip netns add`) may finish after the first sweep.
_SETTLE_S = 0.3
# Between making a lab's directory and saying in it who owns it; generous.
_CLAIM_S = 60.0


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that cannot be mistaken for a later one with the same pid."""

    pid: int
    started: str
    """Start time since boot in clock ticks, field 22 of proc_pid_stat(5)."""

    @classmethod
    def of(cls, pid: int) -> Owner:
        """Raises ProcessLookupError when there is no such process."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except FileNotFoundError:
            raise ProcessLookupError(pid) from None
        # The second field, in parentheses, may hold spaces and parentheses itself.
        state, *rest = text.rpartition(")")[2].split()
        if state in "ZX":
            raise ProcessLookupError(pid)
        return cls(pid, rest[18])

    def lives(self) -> bool:
        try:
            return Owner.of(self.pid) == self
        except ProcessLookupError:
            return False


@dataclass(frozen=True, slots=True)
class LabNames:
    """Everything a lab makes outside of its own processes has one of these names, or begins with one."""

    lab_id: str

    @property
    def prefix(self) -> str:
        return f"{_PREFIX}{self.lab_id}"

    @property
    def directory(self) -> Path:
        return LABS_DIR / self.lab_id

    @property
    def cgroup(self) -> Path:
        return cgroup.mount_point() / self.prefix

    def node(self, host: str) -> str:
        """A node agent's name; its pins bear it."""
        return f"{self.prefix}-{host}"

    def netns(self, name: str) -> str:
        return f"{self.prefix}-{name}"

    def claim(self) -> None:
        """Make the lab's directory, and say in it that this process owns the lab."""
        LABS_DIR.mkdir(parents=True, exist_ok=True)
        for directory in (LABS_DIR, self.directory):
            directory.mkdir(exist_ok=True)
            directory.chmod(0o755)
        owner = Owner.of(os.getpid())
        fresh = self.directory / f".{_OWNER_FILE}"
        fresh.write_text(f"{owner.pid} {owner.started}\n")
        fresh.rename(self.directory / _OWNER_FILE)

    def owner(self) -> Owner | None:
        with suppress(OSError, ValueError):
            pid, started = (self.directory / _OWNER_FILE).read_text().split()
            return Owner(int(pid), started)
        return None


def sweep(names: LabNames) -> None:
    """Remove everything of one lab, whoever made it. Calling it twice is fine."""
    cgroup.remove(names.cgroup)
    for name in _matching(sandbox.NETNS_DIR, names.prefix):
        sandbox.remove_netns(name)
    for root in _pin_roots():
        for name in _matching(root, names.prefix):
            shutil.rmtree(root / name, ignore_errors=True)  # unlinking a pin fails only where somebody was quicker
    for name in _matching(_LAUNCH_LOCKS, names.prefix):
        (_LAUNCH_LOCKS / name).unlink(missing_ok=True)
    shutil.rmtree(names.directory, ignore_errors=True)
    with suppress(OSError):  # other labs are in it
        LABS_DIR.rmdir()


def sweep_dead() -> list[str]:
    """Remove the labs whose owner is dead; return their ids."""
    if not LABS_DIR.is_dir():
        return []
    swept = []
    for directory in LABS_DIR.iterdir():
        names = LabNames(directory.name)
        owner = names.owner()
        # Without an owner file it was killed while claiming, or is being claimed this instant: leave it a while.
        if not (_is_young(directory) if owner is None else owner.lives()):
            sweep(names)
            swept.append(names.lab_id)
    return swept


def _is_young(directory: Path) -> bool:
    try:
        return time.time() - directory.stat().st_mtime < _CLAIM_S
    except FileNotFoundError:
        return True  # somebody else has swept it


def left_of(prefix: str = _PREFIX) -> list[str]:
    """Names on this machine that begin with `prefix`: what a test looks at to see that nothing is left."""
    mount = cgroup.mount_point()
    places = [sandbox.NETNS_DIR, mount, *_pin_roots(), _LAUNCH_LOCKS]
    left = [str(place / name) for place in places for name in _matching(place, prefix)]
    labs = [str(LABS_DIR / name) for name in _matching(LABS_DIR, prefix.removeprefix(_PREFIX))]
    return left + labs


def _matching(place: Path, prefix: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(place) if name.startswith(prefix))
    except FileNotFoundError:
        return []


def _pin_roots() -> list[Path]:
    """<bpffs>/uproxy/v<schema> of every mounted bpffs and every schema."""
    roots = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, kind, *_ = line.split(" ")
        if kind == "bpf":
            roots += sorted(Path(target, "uproxy").glob("v*"))
    return roots


def _reap(lab_id: str, owner: Owner) -> None:
    names = LabNames(lab_id)
    with suppress(ProcessLookupError):
        watch = os.pidfd_open(owner.pid)
        # Checked after the open: from here on the descriptor cannot mean another process.
        if owner.lives():
            select.select([watch], [], [])
    sweep(names)
    time.sleep(_SETTLE_S)
    sweep(names)


if __name__ == "__main__":
    _reap(sys.argv[1], Owner(int(sys.argv[2]), sys.argv[3]))
