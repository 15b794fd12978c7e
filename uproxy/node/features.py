"""What this host's kernel can do for capture: found out by doing it, in a cgroup and a namespace made for that.

`python -m uproxy.node.features` does it for a launcher, which lives long and should not hold what this takes: the
capture that this host gets on the first line of standard output, and why on the second.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bpf import bpffs
from control.api.address import IpAddress, IpBlock
from uproxy import cgroup, linux
from uproxy.capture import nft
from uproxy.capture.nft import NftError
from uproxy.capture.ranges import MeshRanges
from uproxy.cgroup import SandboxError
from uproxy.errors import RefusedError
from uproxy.redirect import OUTBOUND_PORT, PROBE_PORT, PROBE_V4, PROBE_V6, redirected_destination

_BTF: Final = Path("/sys/kernel/btf/vmlinux")
_TIMEOUT_S: Final = 2.0
_RANGES: Final = MeshRanges((IpBlock("192.0.2.0/24"),))  # RFC 5737: nobody's
_OUTSIDE: Final = "192.0.2.1"
_NOBODY: Final = 65534  # whom the tried rules exempt


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that a capture needs, and whether it works here."""

    capture: str
    """`ebpf` or `nft`."""
    name: str
    ok: bool
    detail: str
    """What was found; when it does not work, why."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which capture a host gets."""

    capture: str
    """`ebpf`, `nft` or `none`: what `uproxy exec --capture auto` takes."""
    reason: str


def probe() -> list[Feature]:
    """Everything that the captures need, tried now. Needs root; leaves nothing behind. Raises OSError."""
    return [*_ebpf(), *_nft()]


def verdict(features: list[Feature]) -> Verdict:
    """eBPF where all of it works, else nftables, else none."""
    lacking = {one.capture: one for one in reversed(features) if not one.ok}
    if "ebpf" not in lacking:
        return Verdict("ebpf", "every program passes the verifier and can be attached")
    why_not = f"no eBPF: {_why_not(lacking['ebpf'])}"
    if "nft" not in lacking:
        return Verdict("nft", f"{why_not}; nftables redirects what is the mesh's, and refuses the rest of it")
    return Verdict(
        "none",
        f"{why_not}; no nftables: {_why_not(lacking['nft'])}; what an application dials by --forward or --socks5 is in "
        "the mesh, no more",
    )


def _why_not(one: Feature) -> str:
    return f"{one.name}: {_first_line(one.detail)}"


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""


# -- eBPF


def _ebpf() -> Iterator[Feature]:
    with ExitStack() as stack:
        try:
            place = stack.enter_context(_cgroup())
        except (SandboxError, OSError) as error:
            yield Feature("ebpf", "cgroup v2", False, str(error))
            return
        yield Feature("ebpf", "cgroup v2", True, f"at {cgroup.mount_point()}")
        yield _bpffs()
        btf = f"{_BTF}, which nothing here needs" if _BTF.exists() else "no kernel BTF, and nothing here needs it"
        yield Feature("ebpf", "kernel", True, f"Linux {platform.release()}; {btf}")
        try:
            # Imported here: without the library even its import fails.
            from bpf import libbpf, loader
        except OSError as error:
            yield Feature("ebpf", "libbpf", False, str(error))
            return
        yield Feature("ebpf", "libbpf", True, libbpf.version())
        objects = sorted(loader.OBJECTS.glob("*.bpf.o"))
        if not objects:
            yield Feature("ebpf", "programs", False, f"{loader.OBJECTS} has none: run `make bpf`")
        netns = stack.enter_context(_namespace())
        for path in objects:
            yield from _object(path, place, netns)


def _object(path: Path, cgroup_fd: int, netns: int) -> Iterator[Feature]:
    """Its programs: through the verifier, with maps of their own, and attached where they belong."""
    from bpf.libbpf import BpfError, Object
    from bpf.loader import HOOKS, PROBE_HOOK, PROBER, Place

    name = path.name.removesuffix(".bpf.o")
    try:
        with Object(path) as opened:
            programs = list(opened.programs())
            opened.load()
            for program in programs:
                place = HOOKS.get(program.name)
                if place is None and program.name != PROBE_HOOK:
                    continue  # of another version
                try:
                    attached = program.attach_netns(netns) if place is Place.NETNS else program.attach_cgroup(cgroup_fd)
                    attached.close()
                except BpfError as error:
                    yield Feature("ebpf", f"program {program.name}", False, f"cannot be attached: {error.strerror}")
                else:
                    yield Feature(
                        "ebpf",
                        f"program {program.name}",
                        True,
                        f"{place.value if place else PROBER}: loads and attaches",
                    )
    except BpfError as error:
        yield Feature("ebpf", f"program {name}", False, f"does not load: {error.strerror or error}")


def _bpffs() -> Feature:
    kinds = Path("/proc/filesystems").read_text().split()
    if "bpf" not in kinds:
        return Feature(
            "ebpf", "bpffs", False, "this kernel has no bpf file system, in which programs outlive the agent"
        )
    mounted = any(
        line.split()[1:3] == [str(bpffs.BPFFS), "bpf"] for line in Path("/proc/self/mounts").read_text().splitlines()
    )
    return Feature("ebpf", "bpffs", True, f"at {bpffs.BPFFS}" if mounted else "not mounted; `uproxy node` mounts it")


# -- nftables


def _nft() -> Iterator[Feature]:
    with ExitStack() as stack:
        try:
            netns = stack.enter_context(_namespace())
            with linux.inside(netns):
                nft.load(nft.rules(_NOBODY, _RANGES))
        except (NftError, OSError) as error:
            yield Feature("nft", "rules", False, str(error))
            return
        yield Feature("nft", "rules", True, "they load")
        tries: list[tuple[str, Callable[[], str]]] = [("redirect", lambda: _redirected(PROBE_V4))]
        if Path("/proc/sys/net/ipv6").exists():
            tries.append(("redirect, IPv6", lambda: _redirected(PROBE_V6)))
        tries.append(("refusal", _refused))
        for name, attempt in tries:
            with linux.inside(netns):
                try:
                    detail, ok = attempt(), True
                except (OSError, RefusedError) as error:
                    detail, ok = str(error), False
            yield Feature("nft", name, ok, detail)


def _redirected(address: IpAddress) -> str:
    """Dial what is always captured, take it where a uProxy would, and ask where it was going."""
    family, loopback = (socket.AF_INET6, "::1") if ":" in address else (socket.AF_INET, "127.0.0.1")
    with linux.files_of(_NOBODY):
        listener = socket.create_server((loopback, OUTBOUND_PORT), family=family)
    with listener:
        listener.settimeout(_TIMEOUT_S)
        with socket.create_connection((address, PROBE_PORT), _TIMEOUT_S):
            accepted, _ = listener.accept()
            with accepted:
                found = redirected_destination(accepted)
    if (found.address, found.port) != (address, PROBE_PORT):
        raise OSError(f"SO_ORIGINAL_DST says {found.address}:{found.port}, not {address}:{PROBE_PORT}")
    return "a connection is redirected, and conntrack knows where it was going"


def _refused() -> str:
    """A datagram into the mesh must not leave."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(b"x", (_OUTSIDE, 9))
        except PermissionError:
            return "a datagram into the mesh is refused"
    raise OSError("a datagram into the mesh was sent")


# -- places to try it in


@contextmanager
def _cgroup() -> Iterator[int]:
    directory = cgroup.mount_point() / f"uproxy-check-{os.getpid()}"
    directory.mkdir()
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        with suppress(OSError):
            directory.rmdir()


@contextmanager
def _namespace() -> Iterator[int]:
    """A network namespace with loopback and a route for everything, all of which leads there. Raises OSError."""
    back = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.unshare(linux.CLONE_NEWNET)
        try:
            made = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            commands = "link set lo up\nroute add default dev lo\nroute add ::/0 dev lo\n"
            with suppress(FileNotFoundError):  # without `ip` the tries fail, each with its reason
                subprocess.run(
                    ["ip", "-force", "-batch", "-"], input=commands, text=True, capture_output=True, check=False
                )
        finally:
            linux.setns(back)
    finally:
        os.close(back)
    try:
        yield made
    finally:
        os.close(made)


def main() -> int:
    """The exit status; 1 and the reason alone when it cannot be found out."""
    try:
        found = verdict(probe())
    except OSError as error:
        print(error)
        return 1
    print(f"{found.capture}\n{found.reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
