"""The pin directory `<bpffs>/uproxy/v<schema>/<node>/`: whoever can write there decides what the kernel enforces."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from bpf import layout, libc

BPFFS: Final = Path("/sys/fs/bpf")
_ATTEMPTS: Final = 10


class PinError(Exception):
    """The pin directory cannot be used as it is; the text says what to do."""


def mount(bpffs: Path = BPFFS) -> None:
    """Mounts the bpf file system where there is none. Raises PinError."""
    try:
        # A lock that all agents of the host share: two mounts on one another would hide the first one's pins.
        with _locked(bpffs.parent):
            if not _is_bpffs(bpffs):
                bpffs.mkdir(exist_ok=True)
                libc.mount_bpffs(bpffs)
    except OSError as error:
        raise PinError(
            f"{bpffs}: no bpf file system, and mounting one failed: {error.strerror}; are you root?"
        ) from None


def node_directory(node: str, bpffs: Path = BPFFS, schema: int = layout.SCHEMA) -> Path:
    """The node's directory, made if need be, with what belongs in it. Raises PinError: not root's alone.

    bpffs is often writable by everybody (mode 1777), so each level is checked and not only made.
    """
    directory = bpffs / "uproxy" / f"v{schema}" / node
    # Another node's `remove` may take an empty parent away between two steps; it does so once.
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError):
            _make(bpffs, directory)
            return directory
    raise PinError(f"{directory} keeps disappearing while it is made: is another `uproxy node --remove` running?")


def _make(bpffs: Path, directory: Path) -> None:
    below = (directory / name for name in ("maps", "links", "probers"))
    for level in (bpffs / "uproxy", directory.parent, directory, *below):
        with suppress(FileExistsError):
            level.mkdir(mode=0o700)
        _check_private(level)


def other_schemas(node: str, bpffs: Path = BPFFS) -> dict[int, Path]:
    """{schema: directory} of what agents of other versions have pinned for this node. Raises PinError: not root's."""
    found = {}
    for directory in bpffs.glob(f"uproxy/v*/{node}"):
        number = directory.parent.name.removeprefix("v")
        if number.isdecimal() and int(number) != layout.SCHEMA:
            _make(bpffs, directory)
            found[int(number)] = directory
    return found


def earlier_schemas(node: str, bpffs: Path = BPFFS) -> tuple[Path, ...]:
    """As `other_schemas`, the latest first. Raises PinError when a later version than this one has pinned something."""
    found = other_schemas(node, bpffs)
    if found and max(found) > layout.SCHEMA:
        raise PinError(
            f"{found[max(found)]} was pinned by a later version (this one has schema {layout.SCHEMA}), and stays in "
            "force. Start that version; or end the node's workloads, then `uproxy node --remove`"
        )
    return tuple(found[schema] for schema in sorted(found, reverse=True))


def remove(directory: Path) -> None:
    """Unpins all that is below a directory and removes it, and its parents when they are empty then."""
    for path, names, files in os.walk(directory, topdown=False):
        for name in files:
            (Path(path) / name).unlink()
        for name in names:
            (Path(path) / name).rmdir()
    with suppress(FileNotFoundError):
        directory.rmdir()
    for parent in (directory.parent, directory.parent.parent):  # v<schema>, uproxy: shared with other nodes
        try:
            parent.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise


@contextmanager
def sole_owner(directory: Path) -> Iterator[None]:
    """Holds a node's directory for one agent. Raises PinError when another has it. The kernel releases it with us."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PinError(
                f"{directory}: another `uproxy node` of this name is running; stop it, or use --name"
            ) from None
        yield
    finally:
        os.close(fd)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _is_bpffs(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return libc.filesystem_magic(fd) == libc.BPF_FS_MAGIC
    finally:
        os.close(fd)


def _check_private(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise PinError(f"{path} is no directory: somebody else made it; remove it")
    if found.st_uid != 0 or stat.S_IMODE(found.st_mode) & 0o077:
        raise PinError(
            f"{path} has owner {found.st_uid} and mode {stat.S_IMODE(found.st_mode):04o}, and must be root's with "
            "0700: others could replace what the kernel enforces. Find out who made it, then remove it"
        )
