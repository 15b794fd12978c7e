"""The waypoint processes that are declared for this node: started, kept alive and removed (docs/placements.md).

Each has a place of its own, as a workload of `uproxy exec` has: a network namespace with its mesh address, a cgroup, a
uid, and a directory, in which its key is made and stays. The control plane gives the agent a token for it, once.

A process goes on when the agent ends. The next agent finds it in its place and leaves it as it is. What is in the
places and is declared no more is drained and removed, its key included.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from control.api.address import IpAddress
from control.api.identity import SpiffeId, make_id
from control.api.index import ResidentWorkload
from control.client import certificates
from control.client.certificates import JoinError
from control.client.membership import Membership, MembershipError
from control.client.state import State
from uproxy import cgroup, handover, joining, sandbox
from uproxy.cgroup import SandboxError
from uproxy.claims import FIRST_WAYPOINT_UID, LAST_UID, LOCK_DIR, ClaimError, claimed_name, make_open_directory
from uproxy.entrance import Account, Entrance, exposures
from uproxy.sandbox import Sandbox
from uproxy.sidecar import JoinedIdentity
from uproxy.tls import CredentialsError

DEFAULT_DIRECTORY: Final = Path("/var/lib/uproxy-waypoint")
CGROUP_ROOT: Final = "uproxy-waypoints"
"""In the cgroup2 hierarchy; not in that of `uproxy exec`, where workloads choose the names."""

_PACKAGES: Final = ("uproxy", "control", "waypoint")
_COMMAND: Final = ("-I", "-m", "waypoint", "run")
_MARK: Final = b"\0-m\0waypoint\0run\0"
"""In the command line of a waypoint's first process, however it was started; its workers' have another."""
_LOOK_S: Final = 1.0
"""Between two looks whether anybody serves: who took over from ours by an upgrade is no child of this agent's."""
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.2, 30.0
_HEALTHY_S: Final = 10.0
"""What was up for this long is started again at once."""
_REMOVAL_S: Final = 60.0
"""For a process that is told to drain; more than anybody needs who is granted seconds."""
_ERRORS: Final = (
    JoinError,
    ClaimError,
    SandboxError,
    MembershipError,
    CredentialsError,
    OSError,
    subprocess.SubprocessError,
)
"""Why a process may not run now, and perhaps later."""

_log: Final = logging.getLogger("uproxy.node")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A process that is declared for this node."""

    identity: SpiffeId
    name: str
    """Of its WorkloadEntry, in the identity's namespace."""
    addresses: tuple[IpAddress, ...]
    """In order."""
    gateway: str
    """Name of its Gateway, in the same namespace."""

    @property
    def key(self) -> str:
        return f"{self.identity.namespace}/{self.name}"

    @property
    def place(self) -> str:
        """What its place is called on this host."""
        return f"{self.identity.namespace}.{self.name}"

    def is_member(self, found: Membership) -> bool:
        """Whether an identity directory is this one's."""
        return (found.identity, found.workload, tuple(sorted(found.addresses))) == (
            self.identity,
            self.name,
            self.addresses,
        )


class Declared:
    """What the configuration declares for one node."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._at: dict[IpAddress, ResidentWorkload] = {}

    def take(self, state: State, changed: Collection[IpAddress] | None) -> Mapping[str, Wanted]:
        """By place, after these addresses have changed; None: perhaps all."""
        if changed is None:
            self._at = {
                ip: resident
                for ip, resident in state.residents().items()
                if isinstance(resident, ResidentWorkload) and self._is_here(resident)
            }
        else:
            for ip in changed:
                found = state.resident_at(ip)
                if isinstance(found, ResidentWorkload) and self._is_here(found):
                    self._at[ip] = found
                else:
                    self._at.pop(ip, None)
        addresses: dict[ResidentWorkload, list[IpAddress]] = {}
        for ip in sorted(self._at):
            addresses.setdefault(self._at[ip], []).append(ip)
        wanted = [_wanted(state, resident, its) for resident, its in addresses.items()]
        return {one.place: one for one in wanted}

    def _is_here(self, resident: ResidentWorkload) -> bool:
        return resident.placed is not None and resident.placed.node == self._node


def _wanted(state: State, resident: ResidentWorkload, addresses: Sequence[IpAddress]) -> Wanted:
    assert resident.placed is not None
    identity = make_id(state.trust_domain, resident.namespace, resident.service_account)
    return Wanted(identity, resident.name, tuple(sorted(addresses)), resident.placed.gateway)


@dataclass(frozen=True, slots=True)
class Settings:
    """Where processes have their places, and how they are started."""

    directory: Path
    """Of their directories; each belongs to its process."""
    cgroup_root: Path
    agent_directory: Path
    """The agent's own identity, with which it gets tokens."""
    options: Path | None
    """A file with more options of `waypoint run`, for all of them."""


class Waypoints:
    """Keeps what runs on this node equal to what is declared for it."""

    def __init__(self, settings: Settings, node: str) -> None:
        self._settings = settings
        self._declared = Declared(node)
        self._wanted: Mapping[str, Wanted] = {}
        self._changed = asyncio.Event()
        self._kept: dict[str, tuple[_Place, asyncio.Task[None]]] = {}
        self._leaving: dict[str, asyncio.Task[None]] = {}

    def take(self, state: State, changed: Collection[IpAddress] | None) -> None:
        """There is new configuration."""
        self._wanted = self._declared.take(state, changed)
        self._changed.set()

    def problems(self) -> list[str]:
        """What somebody should look at."""
        return [f"waypoint {place.key}: {place.problem}" for place, _ in self._kept.values() if place.problem]

    async def run(self) -> None:
        """Until cancelled, which leaves all of it running. Comes after the first configuration."""
        make_open_directory(self._settings.directory)
        async with asyncio.TaskGroup() as group:
            for name in sorted(_there(self._settings) - self._wanted.keys()):
                self._leave(group, _Place(self._settings, name))
            while True:
                self._changed.clear()
                for name, (place, keeping) in list(self._kept.items()):
                    if self._wanted.get(name) != place.wanted:
                        del self._kept[name]
                        keeping.cancel()
                        self._leave(group, place, keeping)
                for name in self._wanted.keys() - self._kept.keys() - self._leaving.keys():
                    place = _Place(self._settings, name, self._wanted[name])
                    self._kept[name] = place, group.create_task(place.keep())
                await self._changed.wait()

    def _leave(self, group: asyncio.TaskGroup, place: _Place, keeping: asyncio.Task[None] | None = None) -> None:
        async def leave() -> None:
            if keeping is not None:
                await asyncio.wait([keeping])
            await place.remove()
            del self._leaving[place.name]
            self._changed.set()

        self._leaving[place.name] = group.create_task(leave())


class _Place:
    """Where one process runs, whether it does or not."""

    def __init__(self, settings: Settings, name: str, wanted: Wanted | None = None) -> None:
        """`wanted`: None for one that is there to be removed."""
        self._settings = settings
        self.name = name
        self.wanted = wanted
        self._state = settings.directory / name
        addresses = wanted.addresses if wanted is not None else ()
        self._box = Sandbox.below(settings.cgroup_root, cgroup.mount_point(), name, addresses)
        self._children: list[subprocess.Popen[bytes]] = []
        self._made = False
        """Whether this agent has made or found the place."""
        self.problem = ""
        """Why it does not run; empty when it does."""

    @property
    def key(self) -> str:
        return self.wanted.key if self.wanted is not None else self.name

    # -- while it is wanted

    async def keep(self) -> None:
        """Have it run, until cancelled."""
        assert self.wanted is not None
        pause_s = 0.0
        while True:
            began = time.monotonic()
            try:
                with self._claimed():
                    await self._run(self.wanted)
                self.problem = "its process ended; it is started again"
            except _ERRORS as error:
                self.problem = str(error)
            _log.error("waypoint %s: %s", self.key, self.problem)
            pause_s = next_pause_s(pause_s, time.monotonic() - began)
            await asyncio.sleep(pause_s)

    async def _run(self, wanted: Wanted) -> None:
        """Have it run; returns when it does no more. Raises one of _ERRORS."""
        if not (self._is_for(wanted) and handover.serves(self._state)):
            # What drains after an upgrade goes on, where its place is this agent's.
            if not (self._made and self._mains()):
                await _to_its_end(self._build)
            await self._start(wanted, await self._join(wanted))
        else:
            _log.info("waypoint %s: runs already", self.key)
        self._made, self.problem = True, ""
        while handover.serves(self._state):
            await _any_ends(self._mains(), _LOOK_S)
            self._reap()

    def _is_for(self, wanted: Wanted) -> bool:
        """Whether what is there is what is wanted, and not an earlier declaration's."""
        try:
            member = Membership.load(self._state)
        except MembershipError:
            return False
        of_gateway = _gateway_option(wanted).encode()
        return wanted.is_member(member) and all(of_gateway in line.split(b"\0") for line in self._mains().values())

    def _build(self) -> None:
        """Raises SandboxError or OSError."""
        sandbox.remove(self._box)
        self._made = True
        sandbox.build(self._box)
        for command in sandbox.forwarding_gaps(self._box.addresses):
            _log.warning("waypoint %s: other hosts cannot reach it until this one forwards: %s", self.key, command)

    async def _join(self, wanted: Wanted) -> Account:
        """Have an identity for it in its directory, and give that to its account. Raises one of _ERRORS."""
        try:
            if not wanted.is_member(Membership.load(self._state)):
                shutil.rmtree(self._state)
        except MembershipError:
            pass  # that of nobody yet
        account = self._account()
        try:
            joining.usable(self._state)
        except (MembershipError, CredentialsError):
            token = self._state.with_name(f".{self.name}.token")
            try:
                await certificates.fetch_token(self._settings.agent_directory, wanted.key, token)
                await certificates.join(self._state, token)
            finally:
                token.unlink(missing_ok=True)
            joining.usable(self._state)
        JoinedIdentity(self._state, account).install()
        return account

    def _account(self) -> Account:
        """That of the directory's owner, which is made if it is not there: whoever drains there has it too."""
        self._state.mkdir(mode=0o700, exist_ok=True)
        uid = self._state.lstat().st_uid
        if not _is_of_waypoint(uid):
            taken = {entry.stat(follow_symlinks=False).st_uid for entry in os.scandir(self._settings.directory)}
            free = (one for one in range(FIRST_WAYPOINT_UID, LAST_UID + 1) if one not in taken)
            try:
                uid = next(free)
            except StopIteration:
                raise ClaimError(f"no uid is free from {FIRST_WAYPOINT_UID} to {LAST_UID}") from None
            os.chown(self._state, uid, uid)
        return Account(uid, uid)

    async def _start(self, wanted: Wanted, account: Account) -> None:
        """Start a process; returns when it is ready. Raises one of _ERRORS, also when it ends before."""
        ready, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            child = self._spawned(wanted, account, theirs)
        except BaseException:
            os.close(ready)
            raise
        finally:
            os.close(theirs)
        self._children.append(child)
        try:
            await _readable([ready])
            if not os.read(ready, 64):
                await _any_ends([child.pid], _LOOK_S)
                raise SandboxError(f"its process ended ({child.poll()}) before it was ready; its messages say why")
        finally:
            os.close(ready)
        _log.info("waypoint %s: ready, pid %d", self.key, child.pid)

    def _spawned(self, wanted: Wanted, account: Account, ready: int) -> subprocess.Popen[bytes]:
        arguments = [*_COMMAND, "--state", str(self._state), _gateway_option(wanted), f"--ready-fd={ready}"]
        if self._settings.options is not None:
            arguments.append(f"@{self._settings.options}")
        reached = [Path(sys.prefix), Path(sys.base_prefix), *map(_directory_of, _PACKAGES), self._settings.directory]
        with self._opened_netns() as netns:
            enter = Entrance(
                self._box.proxy_cgroup,
                netns,
                account=account,
                restricted=True,
                exposures=exposures(reached),
            )
            return subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                pass_fds=[ready],
                cwd="/",
                # Nothing of the agent's environment steers a process that holds a key.
                env={"PATH": os.defpath, "LANG": "C.UTF-8"},
                # A terminal's Ctrl-C is for the agent.
                start_new_session=True,
                preexec_fn=enter,
            )

    @contextmanager
    def _opened_netns(self) -> Iterator[int]:
        """By a process that is in it, if there is one: the name may be in the mount namespace of an earlier agent."""
        mains = self._mains()
        path = Path(f"/proc/{next(iter(mains))}/ns/net") if mains else self._box.netns_path
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    # -- when it is not

    async def remove(self) -> None:
        """Let what runs there drain, then remove the place and the identity. Tries until it is done."""
        while True:
            try:
                with self._claimed():
                    await self._drain()
                    await asyncio.to_thread(sandbox.remove, self._box)
                    with suppress(FileNotFoundError):
                        await asyncio.to_thread(shutil.rmtree, self._state)
                break
            except _ERRORS as error:
                _log.error("waypoint %s: cannot be removed: %s", self.key, error)
            await asyncio.sleep(_LAST_PAUSE_S)
        _log.info("waypoint %s: removed", self.key)

    async def _drain(self) -> None:
        deadline = time.monotonic() + _REMOVAL_S
        told: set[int] = set()
        while (mains := self._mains()) and time.monotonic() < deadline:
            for pid in mains.keys() - told:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                told.add(pid)
            await _any_ends(mains, _LOOK_S)
            self._reap()

    # -- both

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """Against a workload of `uproxy exec`, or another agent, that has a place of this name. Raises ClaimError."""
        with claimed_name(LOCK_DIR / f"{self._box.netns}.lock"):
            yield

    def _mains(self) -> dict[int, bytes]:
        """Pid -> command line, of each first process that runs here: more than one after an upgrade."""
        found: dict[int, bytes] = {}
        with suppress(FileNotFoundError):
            for pid in (self._box.proxy_cgroup / "cgroup.procs").read_text().split():
                with suppress(OSError):
                    line = Path("/proc", pid, "cmdline").read_bytes()
                    if _MARK in line:
                        found[int(pid)] = line
        return found

    def _reap(self) -> None:
        self._children = [child for child in self._children if child.poll() is None]


async def _to_its_end(act: Callable[[], None]) -> None:
    """Do this in a thread, and wait for it also when cancelled: what it makes is removed next. Raises what it does."""
    thread = asyncio.get_running_loop().run_in_executor(None, act)
    try:
        await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait([thread])
        with suppress(*_ERRORS):
            thread.result()
        raise


def next_pause_s(pause_s: float, lived_s: float) -> float:
    """Before the next start, when the one after `pause_s` lived so long; 0 before the first."""
    return _FIRST_PAUSE_S if lived_s >= _HEALTHY_S else min(max(2 * pause_s, _FIRST_PAUSE_S), _LAST_PAUSE_S)


def remove_all(settings: Settings) -> None:
    """Removes every place at once, and kills what is in it. Raises SandboxError or OSError."""
    for name in _there(settings):
        sandbox.remove(Sandbox.below(settings.cgroup_root, cgroup.mount_point(), name, ()))
        shutil.rmtree(settings.directory / name, ignore_errors=True)


def _there(settings: Settings) -> set[str]:
    """Names of the places on this host: what is in the cgroup is an agent's, and directories that belong to a uid of
    processes that agents start.
    """
    found: set[str] = set()
    with suppress(FileNotFoundError):
        found |= {one.name for one in os.scandir(settings.cgroup_root) if one.is_dir()}
    with suppress(FileNotFoundError):
        for one in os.scandir(settings.directory):
            if one.is_dir(follow_symlinks=False) and _is_of_waypoint(one.stat(follow_symlinks=False).st_uid):
                found.add(one.name)
    return found


def _is_of_waypoint(uid: int) -> bool:
    return FIRST_WAYPOINT_UID <= uid <= LAST_UID


def _gateway_option(wanted: Wanted) -> str:
    """Said in every placement, so that the command line tells which Gateway a process is of."""
    return f"--gateway={wanted.gateway}"


def _directory_of(package: str) -> Path:
    """Where a package is, without importing it: the node agent has nothing to do with what a waypoint does."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


async def _any_ends(pids: Collection[int], timeout_s: float) -> bool:
    """Whether one of these processes ends in time, or has."""
    held: list[int] = []
    try:
        for pid in pids:
            try:
                held.append(os.pidfd_open(pid))
            except ProcessLookupError:
                return True
        try:
            async with asyncio.timeout(timeout_s):
                await _readable(held)
        except TimeoutError:
            return False
        return True
    finally:
        for fd in held:
            os.close(fd)


async def _readable(descriptors: Sequence[int]) -> None:
    """Return when one of them is."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    try:
        for fd in descriptors:
            loop.add_reader(fd, event.set)
        await event.wait()
    finally:
        for fd in descriptors:
            loop.remove_reader(fd)
