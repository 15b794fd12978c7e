"""System calls that Python 3.11 has no function for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final, Protocol, cast

from cffi import FFI

BPF_FS_MAGIC: Final = 0xCAFE4A11  # <linux/magic.h>
CGROUP2_SUPER_MAGIC: Final = 0x63677270
_FILEID_KERNFS: Final = 0xFE  # <linux/exportfs.h>, Linux 5.5: a kernfs file by its 64-bit id

_ffi: Final = FFI()
_ffi.cdef(
    """
    struct file_handle { unsigned int handle_bytes; int handle_type; uint64_t id; };
    int mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data);
    int fstatfs(int fd, void *buf);
    int open_by_handle_at(int mount_fd, struct file_handle *handle, int flags);
    """
)


class _LibC(Protocol):
    def mount(self, source: bytes, target: bytes, type_: bytes, flags: int, data: Any, /) -> int: ...
    def fstatfs(self, fd: int, buf: Any, /) -> int: ...
    def open_by_handle_at(self, mount_fd: int, handle: Any, flags: int, /) -> int: ...


_libc: Final = cast("_LibC", _ffi.dlopen(None))


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = _ffi.errno
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def mount_bpffs(target: Path) -> None:
    """Mounts a bpf file system. Raises OSError."""
    _checked(_libc.mount(b"bpf", os.fsencode(target), b"bpf", 0, b"mode=0700"), f"mount bpffs at {target}")


def filesystem_magic(fd: int) -> int:
    """`f_type` of the file system that a descriptor is on. Raises OSError."""
    # f_type is the first word of struct statfs on every 64-bit Linux; the whole has 120 bytes.
    buffer = _ffi.new("long[64]")
    _checked(_libc.fstatfs(fd, buffer), "fstatfs")
    return int(cast("Any", buffer)[0]) & 0xFFFFFFFF


def open_cgroup(any_cgroup: int, cgroup_id: int) -> int:
    """A descriptor of the cgroup2 directory with this id. Raises OSError: ESTALE when it was removed.

    `any_cgroup` is a descriptor in the same mount. Needs CAP_DAC_READ_SEARCH.
    """
    handle: Any = _ffi.new("struct file_handle *")
    handle.handle_bytes = 8
    handle.handle_type = _FILEID_KERNFS
    handle.id = cgroup_id
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    return _checked(_libc.open_by_handle_at(any_cgroup, handle, flags), f"cgroup {cgroup_id}")
