"""What one launcher has to itself on this machine: names, and a uid for its sidecar.

The kernel releases both when the launcher ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

LOCK_DIR: Final = Path("/run/uproxy/exec")

# The uids that systemd sets aside for service users made on the fly (DynamicUser=): no person has one.
FIRST_UID: Final = 61184
LAST_UID: Final = 65519
FIRST_WAYPOINT_UID: Final = 65008
"""From here on they are those of waypoint processes that a node agent starts, which hold no lock: whom one belongs to
says the owner of its directory."""


class ClaimError(Exception):
    """Somebody else has it; the text says who, and what to do."""


@contextmanager
def claimed_name(path: Path) -> Iterator[None]:
    """Hold a lock file. Raises ClaimError with the holder's pid when another launcher holds it."""
    make_open_directory(path.parent)
    fd = _locked(path)
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _locked(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 32).decode("ascii", "replace").strip()
            os.close(fd)
            raise ClaimError(
                f"a workload of this name is running already (`uproxy exec`, pid {holder or '?'}): "
                "choose another --name, or end that one"
            ) from None
        # The holder before us may have removed the file between our open and our lock.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)


@contextmanager
def claimed_uid(wanted: int | None) -> Iterator[int]:
    """A uid that no other launcher gives to a sidecar: `wanted`, or a free one. Each is a lock on one byte."""
    make_open_directory(LOCK_DIR)
    with open(LOCK_DIR / "uids", "ab") as file:
        for uid in range(FIRST_UID, FIRST_WAYPOINT_UID) if wanted is None else [wanted]:
            if _lock_byte(file.fileno(), uid):
                yield uid
                return
    if wanted is not None:
        raise ClaimError(f"--uid {wanted} is another sidecar's: each needs one of its own")
    raise ClaimError(f"no uid is free from {FIRST_UID} to {FIRST_WAYPOINT_UID - 1}")


def _lock_byte(fd: int, position: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, position)
    except BlockingIOError:
        return False
    return True


def make_open_directory(path: Path) -> None:
    """Whatever the caller's umask: a sidecar's uid passes through it to what is its own."""
    if not path.exists():
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o755)
