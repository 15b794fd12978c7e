"""One workload's place on a plain host: a network namespace, a routed veth to the host, two sibling cgroups.

Everything has a name that follows from the workload's, so that what a crashed launcher left is found and
removed by the next one. The caller's own network namespace is "the host".
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import os
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from uproxy import cgroup, linux
from uproxy.cgroup import SandboxError

NETNS_DIR = Path("/run/netns")

# IFNAMSIZ is 16 with the terminating NUL.
_LINK_NAME_MAX = 15

# The workload's default gateway: link-local addresses that no interface owns. Permanent neighbour entries at
# both ends stand in for ARP and NDP, so the host needs no proxy_arp and nobody can claim to be the gateway.
_GATEWAY_V4 = "169.254.1.1"
_GATEWAY_V6 = "fe80::1"
_HOST_MAC = "ee:ee:ee:ee:ee:ee"
_WORKLOAD_MAC = "02:00:00:00:00:02"

_IP_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Sandbox:
    """The names of one workload's sandbox; nothing exists until `build`."""

    workload: str
    netns: str
    """Name of the network namespace, below /run/netns."""
    addresses: tuple[str, ...]
    """Mesh addresses, IPv4 or IPv6, in canonical text; each is routed to the workload as a host route."""
    cgroup: Path
    """Directory in the cgroup2 hierarchy that holds `app` and `proxy`."""

    @classmethod
    def below(cls, root: Path, mount: Path, workload: str, addresses: Sequence[str]) -> Sandbox:
        """The sandbox whose cgroup is `root`/`workload`; `mount` is the cgroup2 hierarchy.

        The namespace is named after the cgroup's path, `uproxy-web` for uproxy/web: no two sandboxes share one.
        """
        directory = root / workload
        netns = "-".join(directory.relative_to(mount).parts)
        return cls(workload, netns, tuple(addresses), directory)

    @property
    def netns_path(self) -> Path:
        return NETNS_DIR / self.netns

    @property
    def app_cgroup(self) -> Path:
        return self.cgroup / "app"

    @property
    def proxy_cgroup(self) -> Path:
        return self.cgroup / "proxy"

    @property
    def host_link(self) -> str:
        """The host's end of the veth: the workload's name where that is short and plain, else a digest."""
        if self.netns == f"uproxy-{self.workload}" and len(self.workload) <= _LINK_NAME_MAX - 3:
            return f"up-{self.workload}"
        return f"up-{hashlib.sha256(self.netns.encode()).hexdigest()[:12]}"


def run_ip(commands: Sequence[str], *, netns: str = "") -> None:
    """Run iproute2 commands as one batch, in the caller's namespace or the named one."""
    if not commands:
        return
    argv = ["ip", *(["-netns", netns] if netns else []), "-batch", "-"]
    try:
        done = subprocess.run(
            argv,
            input="\n".join(commands) + "\n",
            capture_output=True,
            text=True,
            timeout=_IP_TIMEOUT_S,
            check=False,
            # A plain `su`, and cron, leave out where `ip` is.
            env={**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"},
        )
    except FileNotFoundError:
        raise SandboxError("the program `ip` is not installed: apt-get install iproute2") from None
    if done.returncode == 0:
        return
    text = done.stderr.strip()
    failed = text.rpartition("Command failed -:")[2].strip()
    which = commands[int(failed) - 1] if failed.isdigit() and int(failed) <= len(commands) else "; ".join(commands)
    if which.startswith("route add") and "File exists" in text:
        raise SandboxError(f"{which.split()[2]} is routed here already: another workload has this address")
    raise SandboxError(f"`ip {which}` failed{f' in {netns}' if netns else ''}: {text.splitlines()[0] if text else '?'}")


def build(sandbox: Sandbox) -> None:
    """Make the cgroups, the namespace and its link. On failure the caller calls `remove`."""
    sandbox.app_cgroup.mkdir(parents=True)
    sandbox.proxy_cgroup.mkdir()
    run_ip([f"netns add {sandbox.netns}"])
    host, workload = _link_commands(sandbox)
    peer = f"peer name eth0 address {_WORKLOAD_MAC} netns {sandbox.netns}"
    run_ip([f"link add name {sandbox.host_link} address {_HOST_MAC} type veth {peer}"])
    run_ip(workload, netns=sandbox.netns)
    run_ip(host)
    if any(":" not in address for address in sandbox.addresses):
        # Forwarding for what the workload sends; what comes for it is up to the host (see `forwarding_gaps`).
        write_sysctls({f"net/ipv4/conf/{sandbox.host_link}/forwarding": "1"})
    _inherit_congestion_control(sandbox)


def _link_commands(sandbox: Sandbox) -> tuple[list[str], list[str]]:
    """The batches (host, workload) that address and route both ends of the link."""
    link = sandbox.host_link
    host = [f"link set dev {link} up"]
    workload = ["link set dev lo up", "link set dev eth0 up"]
    if has_ipv6():
        # The gateway's address is enough: no link-local ones, no duplicate address detection to wait for.
        host.insert(0, f"link set dev {link} addrgenmode none")
        workload.insert(0, "link set dev eth0 addrgenmode none")
    versions = {ipaddress.ip_address(address).version for address in sandbox.addresses}
    for address in sandbox.addresses:
        if ipaddress.ip_address(address).version == 4:
            workload.append(f"address add {address}/32 dev eth0")
        else:
            workload.append(f"address add {address}/128 dev eth0 nodad")
        host.append(f"route add {address} dev {link}")
        host.append(f"neigh add {address} lladdr {_WORKLOAD_MAC} dev {link} nud permanent")
    for version, gateway in ((4, _GATEWAY_V4), (6, _GATEWAY_V6)):
        if version not in versions:
            continue
        workload += [
            f"neigh add {gateway} lladdr {_HOST_MAC} dev eth0 nud permanent",
            f"route add default via {gateway} dev eth0 onlink",
        ]
    return host, workload


def has_ipv6() -> bool:
    """Whether this kernel was started with IPv6 (ipv6.disable=1 leaves nothing of it)."""
    return Path("/proc/sys/net/ipv6").exists()


def write_sysctls(values: Mapping[str, str]) -> None:
    """Write below /proc/sys; what is under net/ applies to the calling thread's network namespace."""
    for name, value in values.items():
        Path("/proc/sys", name).write_text(value)


def _inherit_congestion_control(sandbox: Sandbox) -> None:
    """A new namespace starts from the initial one's choice; the workload should behave as on its own host."""
    setting = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    chosen = setting.read_text()
    with open(sandbox.netns_path) as netns, linux.inside(netns.fileno()):
        if setting.read_text() != chosen:
            with suppress(PermissionError):  # a choice that only the initial namespace may make
                setting.write_text(chosen)


def forwarding_gaps(addresses: Iterable[str]) -> list[str]:
    """Host settings that keep other hosts from reaching these addresses, each as the command that mends it.

    They concern the whole host, so they are the operator's to change.
    """
    versions = {ipaddress.ip_address(address).version for address in addresses}
    settings = {4: "net/ipv4/ip_forward", 6: "net/ipv6/conf/all/forwarding"}
    return [
        f"sysctl -w {setting.replace('/', '.')}=1"
        for version, setting in settings.items()
        if version in versions and Path("/proc/sys", setting).read_text().strip() == "0"
    ]


def remove(sandbox: Sandbox) -> None:
    """Remove what is there of it, killing what still runs in it. Calling it twice, or on nothing, is fine."""
    cgroup.remove(sandbox.cgroup)
    if _link_exists(sandbox.host_link):
        run_ip([f"link delete dev {sandbox.host_link}"])
    remove_netns(sandbox.netns)


def _link_exists(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def remove_netns(name: str) -> None:
    path = NETNS_DIR / name
    if not path.exists():
        return
    try:
        linux.unmount(path)
    except OSError as error:
        # A leftover file that nothing is mounted on, or somebody else was quicker.
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
    path.unlink(missing_ok=True)
