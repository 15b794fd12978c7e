"""Loads the objects, all on one set of pinned maps: every program sees the same, and so does a restarted agent."""

from __future__ import annotations

import errno
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Final

from bpf import layout, libbpf, maps
from bpf.libbpf import BpfError, Object, Program

OBJECTS: Final = Path(__file__).with_name("build")
_OLDEST_KERNEL: Final = (
    6,
    1,
)  # of those without backports: bpf_set_retval in every hook that refuses (docs/kernels.md)
_INBOUND_OBJECT: Final = "sk_lookup"
_DIALLING_OBJECT: Final = "connect"


class Place(Enum):
    """What a program is attached to."""

    APP = "app cgroup"
    PROXY = "proxy cgroup"
    NETNS = "network namespace"


HOOKS: Final[Mapping[str, Place]] = {
    # The order in which a workload is closed: the way in, then the uProxy's side, then the app's.
    "inbound": Place.NETNS,
    "sockops_proxy": Place.PROXY,
    "getsockopt": Place.PROXY,
    "setsockopt": Place.PROXY,
    "sock_create": Place.APP,
    "bind4": Place.APP,
    "bind6": Place.APP,
    "recvmsg4": Place.APP,
    "recvmsg6": Place.APP,
    "sendmsg4": Place.APP,
    "sendmsg6": Place.APP,
    "getpeername4": Place.APP,
    "getpeername6": Place.APP,
    "sockops_app": Place.APP,
    "connect4": Place.APP,
    "connect6": Place.APP,
}
"""Every program of a workload and its place. Each workload has all of them."""
PROBE_HOOK: Final = "sockops_probe"
"""The program for the cgroups of whoever probes workloads' health."""
PROBER: Final = "prober's cgroup"

_OBJECT_FILES: Final = (
    "getsockopt",
    "setsockopt",
    "sockops_proxy",
    "probe",
    "sock_create",
    "bind",
    "sendmsg",
    "recvmsg",
    "getpeername",
    "sockops",
    "connect",
)


class LoadError(Exception):
    """The programs cannot be loaded here; the text says what is missing and how to mend it."""


class Loader:
    """The programs of a node, loaded, and the maps they share. Closing it leaves links and pinned maps alone."""

    def __init__(self, pins: Path, objects: Path = OBJECTS, earlier: Sequence[Path] = ()) -> None:
        """`pins`: the directory for the maps. `earlier`: those of other schemas, whose maps are carried over where they
        mean the same, the first one's before the others'. Raises LoadError.
        """
        self._pins = pins
        self._objects = objects
        self._earlier = tuple(earlier)
        self._check_compiled()
        with ExitStack() as stack:
            self._programs: dict[str, Program] = {}
            fds: dict[str, int] = {}
            for name in _OBJECT_FILES:
                loaded = stack.enter_context(self._load(name))
                self._programs |= {program.name: program for program in loaded.programs()}
                fds |= {shared.name: shared.fd for shared in loaded.maps()}
            self.maps = maps.Maps(fds)
            stack.callback(self.maps.close)
            self._open = stack.pop_all()

    def program(self, hook: str) -> Program:
        """A program for a cgroup, one of HOOKS or PROBE_HOOK."""
        return self._programs[hook]

    @contextmanager
    def inbound(self, netns_cookie: int) -> Iterator[Program]:
        """The program for a network namespace, a copy for this one: it has no other way to know where it runs."""
        constants = netns_cookie.to_bytes(8, sys.byteorder)
        with self._load(_INBOUND_OBJECT, constants) as loaded:
            yield next(iter(loaded.programs()))

    @contextmanager
    def dialling(self, app_cgroup: int, netns_cookie: int) -> Iterator[Mapping[str, Program]]:
        """connect4 and connect6, a copy for this workload: only such a copy knows who calls, and may go direct."""
        constants = layout.pack("mesh_caller", cgroup=app_cgroup, netns_cookie=netns_cookie)
        with self._load(_DIALLING_OBJECT, constants) as loaded:
            yield {program.name: program for program in loaded.programs()}

    def close(self) -> None:
        self._open.close()

    def _load(self, name: str, constants: bytes | None = None) -> Object:
        path = self._objects / f"{name}.bpf.o"
        if not path.exists():
            raise LoadError(f"{path} is missing: run `make bpf` (needs clang and libbpf-dev)")
        try:
            with ExitStack() as stack:
                opened = stack.enter_context(Object(path))
                if constants is not None:
                    opened.set_constants(constants)
                for shared in opened.maps():
                    self._check_shape(path, shared)
                    shared.pin_at(self._pins / shared.name)
                opened.load()
                stack.pop_all()
                return opened
        except BpfError as error:
            raise LoadError(f"{error.strerror or error}{_hint(error)}") from None

    def _check_shape(self, path: Path, shared: libbpf.ObjectMap) -> None:
        """Programs and Python must mean the same bytes, and so must the programs of an earlier agent."""
        if shared.name not in maps.KINDS:
            raise LoadError(
                f"{path}: unknown map {shared.name}; its object is older or newer than this code: run `make bpf`"
            )
        wanted = maps.size_of(shared.name)
        if shared.size != wanted:
            raise LoadError(f"{path}: map {shared.name} has {shared.size}, mesh.h says {wanted}: run `make bpf`")
        pin = self._pins / shared.name
        with _pinned(pin) as fd:
            if fd is None:
                self._carry_over(shared)
                return
            found = libbpf.map_shape(fd)
        if found != shared.shape:
            raise LoadError(
                f"{pin} has {found}, this version's has {shared.shape}: it was made by another version. Stop the "
                "node's workloads, then `uproxy node --remove`"
            )

    def _carry_over(self, shared: libbpf.ObjectMap) -> None:
        """Pins an earlier schema's map for this one, so that both versions' programs see the same entries."""
        for directory in self._earlier:
            if _schema_of(directory) < maps.CHANGED.get(shared.name, 0):
                continue
            with _pinned(directory / shared.name) as fd:
                if fd is not None and libbpf.map_shape(fd) == shared.shape:
                    libbpf.pin_map(fd, self._pins / shared.name)
                    return

    def shares(self, name: str, earlier: Path) -> bool:
        """Whether a map of an earlier schema is the same as this one's; also when there is none."""
        with _pinned(earlier / name) as theirs, _pinned(self._pins / name) as ours:
            return theirs is None or (ours is not None and libbpf.map_id(ours) == libbpf.map_id(theirs))

    def _check_compiled(self) -> None:
        if not self._objects.is_dir():
            raise LoadError(f"{self._objects} is missing: run `make bpf` (needs clang and libbpf-dev)")

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _hint(error: BpfError) -> str:
    """What to do about a refused program. A kernel's number alone refuses nothing: distributions backport."""
    if error.errno == errno.EPERM:
        return "\n  needs root, or CAP_BPF and CAP_NET_ADMIN"
    release = platform.release()
    numbers = tuple(int(part) for part in release.split(".")[:2] if part.isdigit())
    if numbers < _OLDEST_KERNEL:
        return f"\n  this is Linux {release}; capture needs {'.'.join(map(str, _OLDEST_KERNEL))} or newer"
    return ""


@contextmanager
def _pinned(path: Path) -> Iterator[int | None]:
    """A descriptor of a pinned map, None when there is none."""
    try:
        fd = libbpf.open_pinned_map(path)
    except BpfError as error:
        if error.errno != errno.ENOENT:
            raise
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _schema_of(maps_directory: Path) -> int:
    """From `…/v<schema>/<node>/maps`."""
    return int(maps_directory.parent.parent.name.removeprefix("v"))
