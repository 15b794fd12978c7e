"""The workloads under capture: attaches the programs to a workload's cgroups and namespace, all or none, and pins them.

`links/<workload>/<hook>` in the pin directory is the only record. A restarted agent reads it back: the cgroup and
the namespace are in the links, the addresses in the map `own`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bpf import bpffs
from bpf.libbpf import BpfError, Link, Program
from bpf.loader import HOOKS, Loader, LoadError, Place
from control.api.address import FORBIDDEN_PORTS, IpAddress, from_packed, packed16
from uproxy.node.places import Cgroup, NetworkNamespace, cgroup_by_id, check_siblings, is_populated_id

_log: Final = logging.getLogger(__name__)

_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9._-]{0,98}[a-z0-9])?")
_PENDING: Final = "+"  # prefix of a directory that is not complete; no name begins with it
_WITNESS: Final = "connect4"  # the link that tells the app cgroup
MAX_ADDRESSES: Final = 8  # of one workload: one per family is usual
MAX_PROBE_PORTS: Final = 16  # of one workload


class RegistrationError(Exception):
    """A workload is not captured, or not released; the text says why and what to do. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class Registration:
    """What a launcher says of a workload."""

    name: str
    """Unique on the node."""
    addresses: tuple[IpAddress, ...]
    app: Cgroup
    proxy: Cgroup
    netns: NetworkNamespace
    dns: bool = False
    """Whether its name queries go to its uProxy."""
    probe_ports: tuple[int, ...] = ()
    """Those that health probes may dial."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A workload whose programs are attached and pinned."""

    name: str
    addresses: tuple[IpAddress, ...]
    app_cgroup: int
    proxy_cgroup: int
    netns_ino: int
    netns_cookie: int
    dns: bool
    probe_ports: tuple[int, ...] = ()


class Workloads:
    """All captured workloads of a node. `links` is the directory of pins; `earlier` those of other schemas."""

    def __init__(self, loader: Loader, links: Path, earlier: Sequence[Path] = ()) -> None:
        self._loader = loader
        self._own = loader.maps.own
        self._plaintext = loader.maps.plaintext
        self._dns_captured = loader.maps.dns_captured
        self._nameservers = loader.maps.nameservers
        self._probe_ports = loader.maps.probe_ports
        self._links = links
        self._earlier = tuple(earlier)
        self._captured: dict[str, Captured] = {}
        self._left_behind: dict[str, str] = {}
        """Workload → why this agent's programs are not in force there."""

    def captured(self) -> tuple[Captured, ...]:
        return tuple(self._captured.values())

    def adopt(self) -> None:
        """Takes over the pins of an earlier agent: live links get this agent's programs, dead ones go.

        Raises LoadError when what an agent of another schema has pinned cannot be taken over; it goes on enforcing
        what it did.
        """
        for earlier in self._earlier:
            if _directories(earlier) and not self._loader.shares(self._own.name, earlier.with_name("maps")):
                raise LoadError(
                    f"{earlier}: workloads run with the programs of an earlier version, whose map own has another "
                    "shape. They stay captured as they are. End them, then `uproxy node --remove`, then start again"
                )
        for links in (self._links, *self._earlier):
            for directory in _directories(links):
                if directory.name.startswith(_PENDING):
                    _unpin(directory)  # its launcher was never told that it may start
        for directory in _directories(self._links):
            self._adopt(directory)
        self.sweep()
        self._drop_orphans()
        for captured in self._captured.values():
            self._renew(captured, self._directory(captured))

    def take_over(self) -> None:
        """Puts this agent's programs behind the links of agents of other schemas, and its pins in place of theirs.

        To be called when the maps are whole, and now and then: until then the earlier programs go on, on the maps they
        know. Each link is switched at once, and a directory of pins moves at once, so that an agent that is killed in
        between has successors that go on.
        """
        for earlier in self._earlier:
            for directory in _directories(earlier):
                captured = self._read(directory)
                if is_populated_id(captured.app_cgroup) is None:
                    _unpin(directory)
                    self._left_behind.pop(captured.name, None)
                elif captured.name in self._captured:
                    # It was registered again, in another place: this one stays closed until nobody is left in it.
                    self._left_behind[captured.name] = "it runs twice"
                elif self._renew(captured, directory):
                    directory.rename(self._links / directory.name)
                    self._captured[captured.name] = captured
                    _log.info("workload %s: taken over from %s", captured.name, earlier)
            if not _directories(earlier):
                bpffs.remove(earlier.parent)

    def register(self, wanted: Registration) -> None:
        """Attaches and pins every program. Raises RegistrationError. The same again does nothing."""
        self.sweep()
        if self._is_same(wanted):
            return
        self._check(wanted)
        if wanted.name in self._captured:
            self.unregister(wanted.name)
        with ExitStack() as undo:
            pending = self._links / f"{_PENDING}{_pin_name(wanted.name)}"
            pending.mkdir(mode=0o700)
            undo.callback(_unpin, pending)
            try:
                self._plaintext.delete(wanted.netns.cookie)  # a new workload is closed until its uProxy says otherwise
                for address in wanted.addresses:
                    self._own.put(wanted.netns.cookie, packed16(address), wanted.netns.ino)
                    undo.callback(self._own.delete, wanted.netns.cookie, packed16(address))
                    for port in wanted.probe_ports:
                        self._probe_ports.put(packed16(address), port, wanted.netns.cookie)
                        undo.callback(self._probe_ports.delete, packed16(address), port)
                if wanted.dns:
                    self._dns_captured.put(wanted.netns.cookie)
                    undo.callback(self._dns_captured.delete, wanted.netns.cookie)
                self._attach(wanted, pending)
                pending.rename(self._links / _pin_name(wanted.name))
            except (BpfError, LoadError, OSError) as error:
                raise RegistrationError(f"workload {wanted.name}: {error}") from None
            undo.pop_all()
        self._captured[wanted.name] = Captured(
            wanted.name,
            wanted.addresses,
            wanted.app.id,
            wanted.proxy.id,
            wanted.netns.ino,
            wanted.netns.cookie,
            wanted.dns,
            wanted.probe_ports,
        )
        _log.info("workload %s: captured (%s)", wanted.name, ", ".join(wanted.addresses))

    def unregister(self, name: str) -> None:
        """Detaches and unpins. Raises RegistrationError while the app cgroup has processes. Unknown: nothing to do."""
        captured = self._captured.get(name)
        if captured is None:
            return
        if is_populated_id(captured.app_cgroup):
            raise RegistrationError(
                f"workload {name}: its app cgroup still has processes, and without capture they would be in the open; "
                "end them first (cgroup.kill)"
            )
        self._release(captured)
        _log.info("workload %s: released", name)

    def sweep(self) -> None:
        """Removes the pins of workloads whose app cgroup is gone: nobody is left whom they could hold."""
        for captured in self.captured():
            if is_populated_id(captured.app_cgroup) is None:
                self._release(captured)
                _log.info("workload %s: gone, swept", captured.name)

    def problems(self) -> list[str]:
        """What is wrong with the capture of live workloads; each text says what to do."""
        found = [f"workload {name}: {why}; restart the workload" for name, why in sorted(self._left_behind.items())]
        for captured in self.captured():
            missing = HOOKS.keys() - {pin.name for pin in self._directory(captured).iterdir()}
            if missing:
                found.append(
                    f"workload {captured.name}: not attached: {', '.join(sorted(missing))}; restart the workload"
                )
        return found

    def _is_same(self, wanted: Registration) -> bool:
        held = self._captured.get(wanted.name)
        return held is not None and (
            held.app_cgroup,
            held.netns_cookie,
            set(held.addresses),
            held.dns,
            set(held.probe_ports),
        ) == (wanted.app.id, wanted.netns.cookie, set(wanted.addresses), wanted.dns, set(wanted.probe_ports))

    def _check(self, wanted: Registration) -> None:
        if not _NAME.fullmatch(wanted.name):
            raise RegistrationError(
                f"workload name {wanted.name[:120]!r}: use 1-100 of a-z, 0-9, '-', '_' and '.', "
                "with a letter or digit at both ends"
            )
        if not 1 <= len(wanted.addresses) <= MAX_ADDRESSES:
            raise RegistrationError(f"workload {wanted.name}: has {len(wanted.addresses)} addresses, and must have 1-8")
        for port in wanted.probe_ports:
            if not 1 <= port <= 65535 or port in FORBIDDEN_PORTS:
                raise RegistrationError(f"workload {wanted.name}: port {port} cannot be probed: it is none of an app's")
        if len(wanted.probe_ports) > MAX_PROBE_PORTS:
            raise RegistrationError(
                f"workload {wanted.name}: has {len(wanted.probe_ports)} ports to be probed; at most {MAX_PROBE_PORTS}"
            )
        check_siblings(wanted.app, wanted.proxy)
        if wanted.app.is_populated():
            raise RegistrationError(
                f"workload {wanted.name}: processes are in {wanted.app.path} already, and what sockets they have would "
                "not be captured; register first, then start them"
            )
        for other in self.captured():
            if other.name == wanted.name:
                continue
            if other.app_cgroup == wanted.app.id:
                raise RegistrationError(f"workload {wanted.name}: its app cgroup is that of workload {other.name}")
            if other.netns_cookie == wanted.netns.cookie:
                raise RegistrationError(
                    f"workload {wanted.name}: its network namespace is that of workload {other.name}; each has its own"
                )
            for address in set(other.addresses) & set(wanted.addresses):
                raise RegistrationError(f"workload {wanted.name}: address {address} is that of workload {other.name}")

    def _attach(self, wanted: Registration, directory: Path) -> None:
        cgroups = {Place.APP: wanted.app.fd, Place.PROXY: wanted.proxy.fd}
        with self._loader.dialling(wanted.app.id, wanted.netns.cookie) as dialling:
            for hook, place in HOOKS.items():
                if place is Place.NETNS:
                    with (
                        self._loader.inbound(wanted.netns.cookie) as program,
                        program.attach_netns(wanted.netns.fd) as link,
                    ):
                        link.pin(directory / hook)
                else:
                    program = dialling.get(hook) or self._loader.program(hook)
                    with program.attach_cgroup(cgroups[place]) as link:
                        link.pin(directory / hook)

    def _adopt(self, directory: Path) -> None:
        captured = self._read(directory)
        self._captured[captured.name] = captured

    def _read(self, directory: Path) -> Captured:
        pins = _read_pins(directory)
        own = [
            (cookie, from_packed(packed))
            for (cookie, packed), ino in self._own.items().items()
            if ino == pins.netns_ino
        ]
        cookie = own[0][0] if own else 0
        return Captured(
            _name_of(directory),
            tuple(address for _, address in own),
            pins.app_cgroup,
            pins.proxy_cgroup,
            pins.netns_ino,
            cookie,
            cookie in self._dns_captured.items(),
            tuple(sorted({port for (_, port), netns in self._probe_ports.items().items() if netns == cookie})),
        )

    def _renew(self, captured: Captured, directory: Path) -> bool:
        """Puts this agent's programs behind the pinned links, each at once, so that no connection meets a gap.

        Hooks that the earlier agent had not are attached, those that this one has not are detached, last. Returns
        whether all is so.
        """
        try:
            with self._loader.dialling(captured.app_cgroup, captured.netns_cookie) as dialling:
                for hook, place in HOOKS.items():
                    if place is Place.NETNS:
                        self._renew_inbound(captured, directory / hook)
                    else:
                        program = dialling.get(hook) or self._loader.program(hook)
                        _renew_on_cgroup(captured, directory / hook, place, program)
            for pin in directory.iterdir():
                if pin.name not in HOOKS:
                    pin.unlink()
        except (BpfError, LoadError, OSError) as error:
            # A cgroup or namespace that died just now has nothing left to renew; the next sweep sees that.
            _log.warning("workload %s: keeps programs of the last agent: %s", captured.name, error)
            self._left_behind[captured.name] = f"keeps programs of the last agent: {error}"
            return False
        self._left_behind.pop(captured.name, None)
        return True

    def _renew_inbound(self, captured: Captured, pin: Path) -> None:
        if not pin.exists():
            return  # nothing here leads back to a namespace; `problems` says what to do
        with Link.open_pinned(pin) as link:
            if captured.netns_cookie and link.netns_ino():
                with self._loader.inbound(captured.netns_cookie) as program:
                    link.update(program)

    def _release(self, captured: Captured) -> None:
        _unpin(self._directory(captured))
        for address in captured.addresses:
            self._own.delete(captured.netns_cookie, packed16(address))
            for port in captured.probe_ports:
                self._probe_ports.delete(packed16(address), port)
        self._plaintext.delete(captured.netns_cookie)
        self._forget_dns(captured.netns_cookie)
        del self._captured[captured.name]
        self._left_behind.pop(captured.name, None)

    def _drop_orphans(self) -> None:
        """What the maps have of namespaces that no link knows: left by an agent that was killed while it registered."""
        known = {captured.netns_ino for captured in self.captured()}
        known |= {_read_pins(directory).netns_ino for links in self._earlier for directory in _directories(links)}
        for (cookie, address), ino in self._own.items().items():
            if ino not in known:
                self._own.delete(cookie, address)
        cookies = {cookie for cookie, _ in self._own.items()}
        for cookie in self._plaintext.items().keys() - cookies:
            self._plaintext.delete(cookie)
        for target, cookie in self._probe_ports.items().items():
            if cookie not in cookies:
                self._probe_ports.delete(*target)
        for cookie in self._dns_captured.items() - cookies:
            self._forget_dns(cookie)

    def _forget_dns(self, netns_cookie: int) -> None:
        self._dns_captured.delete(netns_cookie)
        self._nameservers.forget(netns_cookie)

    def _directory(self, captured: Captured) -> Path:
        return self._links / _pin_name(captured.name)


def check_removable(links: Path) -> None:
    """Raises RegistrationError while a captured workload still runs: without its pins it would be in the open."""
    running = [_name_of(one) for one in _directories(links) if is_populated_id(_read_pins(one).app_cgroup)]
    if running:
        raise RegistrationError(
            f"workloads still run, and without capture they would be in the open: {', '.join(running)}; end them first"
        )


def _renew_on_cgroup(captured: Captured, pin: Path, place: Place, program: Program) -> None:
    """Behind its link; attached where there is none."""
    if pin.exists():
        with Link.open_pinned(pin) as link:
            link.update(program)
        return
    with cgroup_by_id(captured.app_cgroup if place is Place.APP else captured.proxy_cgroup) as fd:
        if fd is not None:
            with program.attach_cgroup(fd) as link:
                link.pin(pin)


@dataclass(frozen=True, slots=True)
class _Pins:
    app_cgroup: int
    proxy_cgroup: int
    netns_ino: int


def _read_pins(directory: Path) -> _Pins:
    app_cgroup = proxy_cgroup = netns_ino = 0
    for pin in sorted(directory.iterdir()):
        with Link.open_pinned(pin) as link:
            match HOOKS.get(pin.name):
                case Place.NETNS:
                    netns_ino = link.netns_ino()
                case Place.PROXY:
                    proxy_cgroup = link.cgroup_id()
                case Place.APP if pin.name == _WITNESS:
                    app_cgroup = link.cgroup_id()
    return _Pins(app_cgroup, proxy_cgroup, netns_ino)


def _directories(links: Path) -> list[Path]:
    return sorted(links.iterdir()) if links.is_dir() else []


def _pin_name(name: str) -> str:
    return name.replace(".", ":")  # bpffs keeps the dot for itself (bpf_lookup() in kernel/bpf/inode.c)


def _name_of(directory: Path) -> str:
    return directory.name.replace(":", ".")


def _unpin(directory: Path) -> None:
    for pin in sorted(directory.iterdir()):
        pin.unlink()
    directory.rmdir()
