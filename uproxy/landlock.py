"""Landlock (the kernel's Documentation/userspace-api/landlock.rst): a process gives up files that its user may open."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from uproxy import linux

# The numbers are those of every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH: Final = 1
_EXECUTE, _WRITE_FILE, _READ_FILE = 1 << 0, 1 << 1, 1 << 2
_OF_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE
_ALL: Final = (1 << 13) - 1
"""What the first version knows: to read, write, list, make, remove and execute."""
_RULESET: Final = struct.Struct("=Q")
_SCOPED_RULESET: Final = struct.Struct("=QQQ")
_SCOPED_SINCE: Final = 6  # the version of Linux 6.12
_SCOPED: Final = 0b11
"""Abstract Unix sockets, and signals."""
_VERSION: Final = 1  # of landlock_create_ruleset's flags
_RULE: Final = struct.Struct("=Qi")  # packed, as struct landlock_path_beneath_attr

_libc = ctypes.CDLL(None, use_errno=True)


def close_to_us(directory: Path) -> None:
    """From here on this process, and whatever it starts, cannot open what is in a directory, nor get more privileges,
    nor trace others; where the kernel (6.12) has that, nor signal others or connect to abstract Unix sockets of theirs.

    Landlock knows only what is allowed: whatever stands beside the way to that directory now. What is made there later
    is closed too; and of a directory above it that our user may not list, all but what modules are loaded from. Raises
    OSError, where the kernel has no Landlock with ENOSYS or EOPNOTSUPP.
    """
    version = _call("landlock_create_ruleset", _CREATE_RULESET, 0, 0, _VERSION)
    wanted = _RULESET.pack(_ALL) if version < _SCOPED_SINCE else _SCOPED_RULESET.pack(_ALL, 0, _SCOPED)
    ruleset = _call("landlock_create_ruleset", _CREATE_RULESET, wanted, len(wanted), 0)
    try:
        for path in _beside(directory.resolve()):
            _allow(ruleset, path)
        linux.forbid_new_privileges()
        _call("landlock_restrict_self", _RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _beside(directory: Path) -> Iterator[Path]:
    """Everything that is neither in it nor on the way to it, as far as we may see that. Raises OSError."""
    inner = directory
    for outer in directory.parents:
        try:
            found = [Path(entry.path) for entry in os.scandir(outer)]
        except PermissionError:
            if outer == outer.parent:
                raise  # hardly anything would be left
            found = [path for path in _loaded_from() if outer in path.parents]
        for path in found:
            if not path.is_relative_to(inner):
                yield path
        inner = outer


def _loaded_from() -> list[Path]:
    return [Path(one).resolve() for one in (sys.prefix, sys.base_prefix, *sys.path)]


def _allow(ruleset: int, path: Path) -> None:
    """All of it; nothing, when it cannot be opened: its user may not, or it is gone, or a link, whose end counts."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        kind = os.fstat(fd).st_mode
        if not stat.S_ISLNK(kind):
            rights = _ALL if stat.S_ISDIR(kind) else _OF_FILES
            _call("landlock_add_rule", _ADD_RULE, ruleset, _PATH_BENEATH, _RULE.pack(rights, fd), 0)
    finally:
        os.close(fd)


def _call(name: str, number: int, *arguments: int | bytes) -> int:
    result: int = _libc.syscall(number, *(ctypes.c_long(one) if isinstance(one, int) else one for one in arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result
