"""libbpf, typed, through cffi's ABI mode: no compiler at install time, and 0.3 µs more per call than with one.

Every failure is a BpfError with what libbpf itself logged; for a program that the verifier refuses, those are the
verifier's last lines, which hold the reason.
"""

from __future__ import annotations

import errno
import os
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, cast

from cffi import FFI

LIBRARY: Final = "libbpf.so.1"
_LOG_LINES: Final = 30  # of the verifier's log: the refused instruction, its registers, and the reason in the last line
_LOG_BUFFER: Final = 2 << 20  # bytes: libbpf passes a whole verifier log as one message
_BATCH: Final = 4096  # entries of one call: enough that what a call costs by itself is nothing
_ENOTSUPP: Final = 524  # <linux/errno.h>; a map of a type that has no batches
_INSTRUCTION: Final = struct.Struct("=BBhi")  # struct bpf_insn
_CALL: Final = 0x85  # BPF_JMP | BPF_CALL; with both registers 0 it is a call of a helper
_WARN, _INFO, _DEBUG = range(3)  # enum libbpf_print_level

_ffi: Final = FFI()
_ffi.cdef(
    """
    typedef int (*print_fn)(int level, const char *format, void *arguments);
    print_fn libbpf_set_print(print_fn fn);
    int libbpf_num_possible_cpus(void);
    const char *libbpf_version_string(void);

    void *bpf_object__open_file(const char *path, const void *opts);
    int bpf_object__load(void *object);
    void bpf_object__close(void *object);
    void *bpf_object__next_map(const void *object, const void *map);
    void *bpf_object__next_program(const void *object, void *program);

    const char *bpf_map__name(const void *map);
    int bpf_map__fd(const void *map);
    uint32_t bpf_map__type(const void *map);
    uint32_t bpf_map__key_size(const void *map);
    uint32_t bpf_map__value_size(const void *map);
    uint32_t bpf_map__max_entries(const void *map);
    uint32_t bpf_map__map_flags(const void *map);
    bool bpf_map__is_internal(const void *map);
    int bpf_map__set_pin_path(void *map, const char *path);
    void *bpf_map__initial_value(void *map, size_t *size);

    const char *bpf_program__name(const void *program);
    const char *bpf_program__section_name(const void *program);
    const uint64_t *bpf_program__insns(const void *program);
    size_t bpf_program__insn_cnt(const void *program);
    void *bpf_program__attach_cgroup(const void *program, int cgroup_fd);
    void *bpf_program__attach_netns(const void *program, int netns_fd);

    void *bpf_link__open(const char *path);
    int bpf_link__fd(const void *link);
    int bpf_link__pin(void *link, const char *path);
    int bpf_link__update_program(void *link, void *program);
    int bpf_link__destroy(void *link);

    int bpf_obj_get(const char *path);
    int bpf_obj_pin(int fd, const char *path);
    int bpf_obj_get_info_by_fd(int fd, void *info, uint32_t *size);
    int bpf_map_lookup_elem(int fd, const char *key, char *value);
    int bpf_map_update_elem(int fd, const char *key, const char *value, uint64_t flags);
    int bpf_map_delete_elem(int fd, const char *key);
    int bpf_map_lookup_batch(int fd, void *in_batch, void *out_batch, void *keys, void *values, uint32_t *count,
                             const void *opts);
    int bpf_map_update_batch(int fd, const void *keys, const void *values, uint32_t *count, const void *opts);
    int bpf_map_delete_batch(int fd, const void *keys, uint32_t *count, const void *opts);
    int bpf_map_get_next_key(int fd, const char *key, char *next);

    int vsnprintf(char *buffer, size_t size, const char *format, void *arguments);

    /* The beginnings of two structs of <linux/bpf.h>; the kernel fills as much as it is given room for. */
    struct link_info {
        uint32_t type; uint32_t id; uint32_t program_id; uint32_t pad;
        union { struct { uint64_t id; } cgroup; struct { uint32_t ino; } netns; };
    };
    struct map_info {
        uint32_t type; uint32_t id; uint32_t key_size; uint32_t value_size; uint32_t max_entries; uint32_t map_flags;
    };
    """
)

Pointer = Any  # an opaque `struct bpf_… *`


class _LibBpf(Protocol):
    """The functions above, as Python sees them."""

    def libbpf_set_print(self, function: Any, /) -> Any: ...
    def libbpf_num_possible_cpus(self) -> int: ...
    def libbpf_version_string(self) -> Pointer: ...
    def bpf_object__open_file(self, path: bytes, opts: Pointer, /) -> Pointer: ...
    def bpf_object__load(self, bpf_object: Pointer, /) -> int: ...
    def bpf_object__close(self, bpf_object: Pointer, /) -> None: ...
    def bpf_object__next_map(self, bpf_object: Pointer, bpf_map: Pointer, /) -> Pointer: ...
    def bpf_object__next_program(self, bpf_object: Pointer, program: Pointer, /) -> Pointer: ...
    def bpf_map__name(self, bpf_map: Pointer, /) -> Pointer: ...
    def bpf_map__fd(self, bpf_map: Pointer, /) -> int: ...
    def bpf_map__type(self, bpf_map: Pointer, /) -> int: ...
    def bpf_map__key_size(self, bpf_map: Pointer, /) -> int: ...
    def bpf_map__value_size(self, bpf_map: Pointer, /) -> int: ...
    def bpf_map__max_entries(self, bpf_map: Pointer, /) -> int: ...
    def bpf_map__map_flags(self, bpf_map: Pointer, /) -> int: ...
    def bpf_map__is_internal(self, bpf_map: Pointer, /) -> bool: ...
    def bpf_map__set_pin_path(self, bpf_map: Pointer, path: bytes, /) -> int: ...
    def bpf_map__initial_value(self, bpf_map: Pointer, size: Pointer, /) -> Pointer: ...
    def bpf_program__name(self, program: Pointer, /) -> Pointer: ...
    def bpf_program__section_name(self, program: Pointer, /) -> Pointer: ...
    def bpf_program__insns(self, program: Pointer, /) -> Pointer: ...
    def bpf_program__insn_cnt(self, program: Pointer, /) -> int: ...
    def bpf_program__attach_cgroup(self, program: Pointer, cgroup_fd: int, /) -> Pointer: ...
    def bpf_program__attach_netns(self, program: Pointer, netns_fd: int, /) -> Pointer: ...
    def bpf_link__open(self, path: bytes, /) -> Pointer: ...
    def bpf_link__fd(self, link: Pointer, /) -> int: ...
    def bpf_link__pin(self, link: Pointer, path: bytes, /) -> int: ...
    def bpf_link__update_program(self, link: Pointer, program: Pointer, /) -> int: ...
    def bpf_link__destroy(self, link: Pointer, /) -> int: ...
    def bpf_obj_get(self, path: bytes, /) -> int: ...
    def bpf_obj_pin(self, fd: int, path: bytes, /) -> int: ...
    def bpf_obj_get_info_by_fd(self, fd: int, info: Pointer, size: Pointer, /) -> int: ...
    def bpf_map_lookup_elem(self, fd: int, key: bytes, value: Pointer, /) -> int: ...
    def bpf_map_update_elem(self, fd: int, key: bytes, value: bytes, flags: int, /) -> int: ...
    def bpf_map_delete_elem(self, fd: int, key: bytes, /) -> int: ...
    def bpf_map_lookup_batch(
        self,
        fd: int,
        in_batch: Pointer,
        out_batch: Pointer,
        keys: Pointer,
        values: Pointer,
        count: Pointer,
        opts: Pointer,
        /,
    ) -> int: ...
    def bpf_map_update_batch(
        self, fd: int, keys: Pointer, values: Pointer, count: Pointer, opts: Pointer, /
    ) -> int: ...
    def bpf_map_delete_batch(self, fd: int, keys: Pointer, count: Pointer, opts: Pointer, /) -> int: ...
    def bpf_map_get_next_key(self, fd: int, key: Pointer, next_key: Pointer, /) -> int: ...


class BpfError(OSError):
    """A call of libbpf or the kernel that failed; the text ends with what libbpf logged about it."""


def _load_library() -> _LibBpf:
    try:
        return cast("_LibBpf", _ffi.dlopen(LIBRARY))
    except OSError as error:
        raise BpfError(f"{LIBRARY} cannot be loaded ({error}); on Debian: apt-get install libbpf1") from None


_libc: Final = cast("Any", _ffi.dlopen(None))
_lib: Final = _load_library()
_text_buffer: Final = cast("Any", _ffi.new("char[]", _LOG_BUFFER))
_log: Final[deque[str]] = deque(maxlen=_LOG_LINES)


@_ffi.callback("print_fn")
def _collect(level: int, text_format: Pointer, arguments: Pointer) -> int:
    """libbpf's log: the last lines of what it has to say, its debug level left out."""
    if level != _DEBUG:
        # libbpf hands over a va_list; on x86-64 and arm64 it arrives as a pointer that vsnprintf takes back.
        length = _libc.vsnprintf(_text_buffer, _LOG_BUFFER, text_format, arguments)
        text = bytes(_ffi.buffer(_text_buffer, min(length, _LOG_BUFFER - 1))).decode(errors="replace")
        _log.extend(line for line in text.splitlines() if line.strip())
    return 0


_lib.libbpf_set_print(_collect)


def _failure(code: int, what: str) -> BpfError:
    log = "".join(f"\n  {line}" for line in _log)
    _log.clear()
    return BpfError(code, f"{what}: {os.strerror(code)}{log}")


def _checked(result: int, what: str) -> int:
    """The result of an int function, which is -errno on failure."""
    if result < 0:
        raise _failure(-result, what)
    return result


def _pointer(pointer: Pointer, what: str) -> Pointer:
    """The result of a pointer function, which is NULL with errno set on failure."""
    if pointer == _ffi.NULL:
        raise _failure(_ffi.errno, what)
    return pointer


def _text(pointer: Pointer) -> str:
    return cast("bytes", _ffi.string(pointer)).decode()


def version() -> str:
    """libbpf's own version, such as `v1.1`."""
    return _text(_lib.libbpf_version_string())


def possible_cpus() -> int:
    """How many values a per-CPU map has per key."""
    return _checked(_lib.libbpf_num_possible_cpus(), "number of CPUs")


@dataclass(frozen=True, slots=True)
class MapSize:
    """Bytes of a map's key and value."""

    key: int
    value: int


@dataclass(frozen=True, slots=True)
class MapShape:
    """What two maps must share to stand for one another."""

    type: int
    size: MapSize
    max_entries: int
    flags: int


@dataclass(frozen=True, slots=True)
class ObjectMap:
    """A map as an object declares it."""

    name: str
    pointer: Pointer

    @property
    def fd(self) -> int:
        """Valid once the object is loaded and until it is closed."""
        return _checked(_lib.bpf_map__fd(self.pointer), f"map {self.name}")

    @property
    def size(self) -> MapSize:
        return MapSize(_lib.bpf_map__key_size(self.pointer), _lib.bpf_map__value_size(self.pointer))

    @property
    def shape(self) -> MapShape:
        return MapShape(
            _lib.bpf_map__type(self.pointer),
            self.size,
            _lib.bpf_map__max_entries(self.pointer),
            _lib.bpf_map__map_flags(self.pointer),
        )

    def pin_at(self, path: Path) -> None:
        """Before loading: takes the map that is pinned there, or makes one and pins it."""
        _checked(_lib.bpf_map__set_pin_path(self.pointer, os.fsencode(path)), f"pin path of map {self.name}")


class Link:
    """A program's attachment. It ends when nobody holds it: neither this object nor a pin."""

    def __init__(self, pointer: Pointer, name: str) -> None:
        self._pointer = pointer
        self._name = name

    @classmethod
    def open_pinned(cls, path: Path) -> Link:
        return cls(_pointer(_lib.bpf_link__open(os.fsencode(path)), f"pinned link {path}"), path.name)

    def pin(self, path: Path) -> None:
        _checked(_lib.bpf_link__pin(self._pointer, os.fsencode(path)), f"pin link {path}")

    def update(self, program: Program) -> None:
        """Replaces the program at once: no connection sees neither or both."""
        result = _lib.bpf_link__update_program(self._pointer, program.pointer)
        _checked(result, f"replace the program of link {self._name}")

    def cgroup_id(self) -> int:
        """Of the cgroup it is attached to; 0 when that is gone."""
        return int(self._info().cgroup.id)

    def netns_ino(self) -> int:
        """Inode of the network namespace it is attached to; 0 when that is gone."""
        return int(self._info().netns.ino)

    def _info(self) -> Any:
        info: Any = _ffi.new("struct link_info *")
        size = cast("Any", _ffi.new("uint32_t *", _ffi.sizeof(info[0])))
        _checked(
            _lib.bpf_obj_get_info_by_fd(_lib.bpf_link__fd(self._pointer), info, size), f"info of link {self._name}"
        )
        return info

    def close(self) -> None:
        """Lets go of it; a pin keeps it."""
        _lib.bpf_link__destroy(self._pointer)

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Program:
    """A program of a loaded object; valid until the object is closed (its links live on)."""

    name: str
    pointer: Pointer

    def section(self) -> str:
        """Its ELF section, which names the kernel's hook, such as `cgroup/connect4`."""
        return _text(_lib.bpf_program__section_name(self.pointer))

    def helpers(self) -> set[int]:
        """Numbers of the kernel's helper functions that it calls (enum bpf_func_id of <linux/bpf.h>)."""
        code = _lib.bpf_program__insns(self.pointer)
        size = _lib.bpf_program__insn_cnt(self.pointer) * _INSTRUCTION.size
        instructions = _INSTRUCTION.iter_unpack(bytes(_ffi.buffer(code, size)))
        return {number for opcode, registers, _, number in instructions if opcode == _CALL and registers == 0}

    def attach_cgroup(self, cgroup_fd: int) -> Link:
        """Runs it for the cgroup and all below it, beside whatever else is attached there."""
        what = f"attach {self.name} to a cgroup"
        return Link(_pointer(_lib.bpf_program__attach_cgroup(self.pointer, cgroup_fd), what), self.name)

    def attach_netns(self, netns_fd: int) -> Link:
        """Runs it for a network namespace."""
        what = f"attach {self.name} to a network namespace"
        return Link(_pointer(_lib.bpf_program__attach_netns(self.pointer, netns_fd), what), self.name)


class Object:
    """A compiled file of programs: opened, then adjusted, then loaded into the kernel."""

    def __init__(self, path: Path) -> None:
        _log.clear()
        self._path = path
        self._pointer = _pointer(_lib.bpf_object__open_file(os.fsencode(path), _ffi.NULL), f"open {path}")

    def maps(self) -> Iterator[ObjectMap]:
        """The maps it shares with others, without libbpf's own for constants and variables."""
        for pointer in self._next(_lib.bpf_object__next_map):
            if not _lib.bpf_map__is_internal(pointer):
                yield ObjectMap(_text(_lib.bpf_map__name(pointer)), pointer)

    def programs(self) -> Iterator[Program]:
        for pointer in self._next(_lib.bpf_object__next_program):
            yield Program(_text(_lib.bpf_program__name(pointer)), pointer)

    def set_constants(self, value: bytes) -> None:
        """Before loading: the object's `const volatile` variables, all of them."""
        for pointer in self._next(_lib.bpf_object__next_map):
            if _text(_lib.bpf_map__name(pointer)).endswith(".rodata"):
                size = cast("Any", _ffi.new("size_t *"))
                memory = _pointer(_lib.bpf_map__initial_value(pointer, size), f"{self._path}: constants")
                if size[0] != len(value):
                    raise BpfError(
                        f"{self._path}: its constants have {size[0]} bytes, not {len(value)}; run `make bpf`"
                    )
                _ffi.memmove(memory, value, len(value))
                return
        raise BpfError(f"{self._path}: has no constants; run `make bpf`")

    def load(self) -> None:
        """Hands programs and maps to the kernel. Raises BpfError with the verifier's reason."""
        _log.clear()
        _checked(_lib.bpf_object__load(self._pointer), f"load {self._path}")

    def close(self) -> None:
        _lib.bpf_object__close(self._pointer)

    def _next(self, step: Any) -> Iterator[Pointer]:
        item = step(self._pointer, _ffi.NULL)
        while item != _ffi.NULL:
            yield item
            item = step(self._pointer, item)

    def __enter__(self) -> Object:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_pinned_map(path: Path) -> int:
    """A descriptor of a pinned map. Raises BpfError: ENOENT when there is none."""
    return _checked(_lib.bpf_obj_get(os.fsencode(path)), f"pinned map {path}")


def map_capacity(fd: int) -> int:
    """How many entries it can have; of a ring, its bytes."""
    return int(_map_info(fd).max_entries)


def pin_map(fd: int, path: Path) -> None:
    """One more name for a map. Raises BpfError."""
    _checked(_lib.bpf_obj_pin(fd, os.fsencode(path)), f"pin map {path}")


def map_id(fd: int) -> int:
    """As the kernel numbers maps: two descriptors of one map have the same."""
    return int(_map_info(fd).id)


def map_shape(fd: int) -> MapShape:
    info = _map_info(fd)
    size = MapSize(int(info.key_size), int(info.value_size))
    return MapShape(int(info.type), size, int(info.max_entries), int(info.map_flags))


def _map_info(fd: int) -> Any:
    info: Any = _ffi.new("struct map_info *")
    size = cast("Any", _ffi.new("uint32_t *", _ffi.sizeof(info[0])))
    _checked(_lib.bpf_obj_get_info_by_fd(fd, info, size), "info of a map")
    return info


def lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """A map's value, or None. For a per-CPU map `value_size` counts every CPU's, each rounded up to 8 bytes."""
    value = _ffi.new("char[]", value_size)
    result = _lib.bpf_map_lookup_elem(fd, key, value)
    if result == -errno.ENOENT:
        return None
    _checked(result, "look up in a map")
    return bytes(_ffi.buffer(value))


def update(fd: int, key: bytes, value: bytes) -> None:
    """Inserts or replaces, as a whole. Raises BpfError: E2BIG or ENOSPC when the map is full."""
    _checked(_lib.bpf_map_update_elem(fd, key, value, 0), "write to a map")


def delete(fd: int, key: bytes) -> bool:
    """Whether there was such an entry."""
    result = _lib.bpf_map_delete_elem(fd, key)
    if result == -errno.ENOENT:
        return False
    _checked(result, "delete from a map")
    return True


def update_all(fd: int, size: MapSize, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
    """Inserts or replaces many, each as a whole. Raises BpfError: E2BIG when the map is full, and some are in."""
    for at in range(0, len(keys), _BATCH):
        some = b"".join(keys[at : at + _BATCH]), b"".join(values[at : at + _BATCH])
        count: Any = _ffi.new("uint32_t *", len(some[0]) // size.key)
        result = _lib.bpf_map_update_batch(fd, _ffi.from_buffer(some[0]), _ffi.from_buffer(some[1]), count, _ffi.NULL)
        _checked(result, f"write {len(keys)} entries to a map")


def delete_all(fd: int, size: MapSize, keys: Sequence[bytes]) -> None:
    """Deletes many, which are all there. Raises BpfError: ENOENT when one is not, and some are deleted."""
    for at in range(0, len(keys), _BATCH):
        some = b"".join(keys[at : at + _BATCH])
        count: Any = _ffi.new("uint32_t *", len(some) // size.key)
        result = _lib.bpf_map_delete_batch(fd, _ffi.from_buffer(some), count, _ffi.NULL)
        _checked(result, f"delete {len(keys)} entries from a map")


def entries(fd: int, size: MapSize) -> Iterator[tuple[bytes, bytes]]:
    """All keys with their values, of a hash or LPM map that nobody else changes meanwhile."""
    for keys, values in _batches(fd, size):
        for at in range(len(keys) // size.key):
            yield keys[at * size.key : (at + 1) * size.key], values[at * size.value : (at + 1) * size.value]


def count(fd: int, size: MapSize) -> int:
    """How many entries a map has: about, while others change it."""
    try:
        return sum(len(some) // size.key for some, _ in _batches(fd, size))
    except BpfError as error:
        if error.errno != _ENOTSUPP:
            raise
        return sum(1 for _ in keys(fd, size.key))


def _batches(fd: int, size: MapSize) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values, some at a time."""
    position = _ffi.new("char[]", max(size.key, 4))
    start: Pointer = _ffi.NULL
    key_buffer, value_buffer = _ffi.new("char[]", _BATCH * size.key), _ffi.new("char[]", _BATCH * size.value)
    while True:
        found: Any = _ffi.new("uint32_t *", _BATCH)
        result = _lib.bpf_map_lookup_batch(fd, start, position, key_buffer, value_buffer, found, _ffi.NULL)
        if result != -errno.ENOENT:  # the end, which may come with the last ones
            _checked(result, "read a map")
        number = int(found[0])
        yield bytes(_ffi.buffer(key_buffer, number * size.key)), bytes(_ffi.buffer(value_buffer, number * size.value))
        if result:
            return
        start = position


def keys(fd: int, key_size: int) -> Iterator[bytes]:
    """All keys. While iterating only the caller may delete, and only keys it has got already."""
    next_key = _ffi.new("char[]", key_size)
    previous: Pointer = _ffi.NULL
    while True:
        result = _lib.bpf_map_get_next_key(fd, previous, next_key)
        if result == -errno.ENOENT:
            return
        _checked(result, "iterate over a map")
        found = bytes(_ffi.buffer(next_key))
        yield found
        previous = _ffi.from_buffer(found)
