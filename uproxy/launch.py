"""`uproxy exec`: run a command as a workload of the mesh, with a sidecar, on a host without an orchestrator.

The order keeps it closed: the sandbox is made, and captured by the node agent's eBPF or by nftables, before
the first process is in it; the command starts when the sidecar has proved that capture works. From then on a dead
sidecar means refused connections until it is back, never plaintext.
"""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import control
import uproxy
from control.api.address import AddressError, parse_address
from control.api.names import wrong_dns_label, wrong_subdomain
from control.client.membership import Membership, MembershipError
from uproxy import cgroup, linux, sandbox, upgrade
from uproxy.capture import nft
from uproxy.capture.nft import NftError
from uproxy.capture.ranges import MeshRanges
from uproxy.cgroup import SandboxError
from uproxy.claims import FIRST_UID, LOCK_DIR, ClaimError, claimed_name, claimed_uid
from uproxy.entrance import Account, Entrance, exposures, sockets_inside
from uproxy.fork_client import DEFAULT_SOCKET as FORK_SOCKET
from uproxy.fork_client import ForkedBy
from uproxy.node.channel import SOCKET_NAME
from uproxy.node.client import DEFAULT_SOCKET, NodeClient, NodeError
from uproxy.sandbox import Sandbox
from uproxy.sidecar import IDENTITY_FILES, Identity, IdentityCopy, JoinedIdentity, OwnProcess, Sidecar, Spawn
from uproxy.supervision import (
    FAILED,
    NOT_EXECUTABLE,
    NOT_FOUND,
    SIGNALS,
    InterruptedLaunchError,
    LaunchError,
    Supervision,
    say,
)

# A sidecar is ready within a second; the rest is for a loaded machine and an agent that is still loading.
_READY_TIMEOUT_S = 30.0
# Above what `uproxy run` grants itself for draining; what is left then is cut.
_DRAIN_MARGIN_S = 2.0
_DRAIN_TIMEOUT_S = 5.0
_UPGRADE_DRAIN_TIMEOUT_S = 600.0
_DEFAULT_NAMESPACE = _DEFAULT_ACCOUNT = "default"
_DEFAULT_TRUST_DOMAIN = "cluster.local"


_DESCRIPTION = """\
Run COMMAND as a workload of the mesh: in a network namespace and cgroups of its own, with a sidecar, its connections
captured. It starts when the sidecar is ready; all of it is removed when COMMAND ends."""

_EPILOG = """\
examples, with the node agent running on this host; the first joins a mesh, and finds there who it is:
  uproxy exec --name web --join web.token --user www-data -- python3 app.py
  uproxy exec --name web --namespace shop --service-account web --address 10.96.0.10 --config mesh.yaml \\
      --identity-dir /etc/uproxy/web --user www-data -- python3 app.py

A COMMAND that runs as root can leave its sandbox: give it a --user.
exit status: COMMAND's, 128 + n when signal n ended it; 125 when the launcher failed, 126 and 127 as in a shell"""


def main(argv: Sequence[str]) -> int:
    """Run the command to its end. Its exit status is ours; 128 + n when signal n ended it."""
    options, command = _parse(argv)
    status: int | None = None
    try:
        with ExitStack() as undo:
            status = _run(options, command, undo)
    except InterruptedLaunchError as ended:
        status = 128 + ended.number
    except LaunchError as error:
        say(options.name, str(error))
        status = error.status
    except (ClaimError, SandboxError, NodeError, NftError, OSError, subprocess.SubprocessError) as error:
        # After the command's end it is the cleaning up that failed, which must not hide how the command ended.
        say(options.name, str(error) if status is None else f"not everything could be removed: {error}")
        status = FAILED if status is None else status
    return status


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="uproxy exec",
        usage="uproxy exec --name NAME (--join FILE | --address IP --config FILE --identity-dir DIR) [option…] "
        "-- COMMAND [argument…]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    who = parser.add_argument_group("the workload")
    who.add_argument("--name", required=True, help="as its WorkloadEntry is named; unique on this host")
    who.add_argument("--user", help="whom COMMAND runs as (default: the caller)")
    member = parser.add_argument_group("a member of a mesh")
    member.add_argument(
        "--join",
        type=Path,
        metavar="FILE",
        help="join with this token, unless an earlier launch has; FILE need not exist any more then",
    )
    alone = parser.add_argument_group("without a control plane")
    alone.add_argument("--namespace", help=f"default: {_DEFAULT_NAMESPACE}")
    alone.add_argument("--service-account", metavar="NAME", help=f"default: {_DEFAULT_ACCOUNT}")
    alone.add_argument("--trust-domain", metavar="NAME", help=f"default: {_DEFAULT_TRUST_DOMAIN}")
    alone.add_argument("--address", nargs="+", action="extend", metavar="IP", help="its mesh addresses")
    alone.add_argument("--config", nargs="+", action="extend", type=Path, metavar="FILE", help="resources in YAML")
    alone.add_argument("--identity-dir", type=Path, metavar="DIR", help=f"holds {', '.join(sorted(IDENTITY_FILES))}")
    capture = parser.add_argument_group("capture")
    capture.add_argument(
        "--node-socket", type=Path, default=DEFAULT_SOCKET, metavar="PATH", help="default: %(default)s"
    )
    capture.add_argument(
        "--capture",
        choices=("ebpf", "nft", "auto", "none"),
        default="ebpf",
        help="default: %(default)s, by the node agent. nft: by nftables, where the kernel lacks eBPF's hooks. auto: "
        "the first of the two that this host can. With none, only what COMMAND dials through --forward or --socks5 is "
        "in the mesh",
    )
    capture.add_argument(
        "--mesh-cidr",
        nargs="+",
        action="extend",
        default=[],
        metavar="CIDR",
        help="ranges of VIPs and workloads; with --capture nft or auto. With ebpf, those of the node agent hold",
    )
    capture.add_argument(
        "--exclude-cidr", nargs="+", action="extend", default=[], metavar="CIDR", help="ranges that are left alone"
    )
    capture.add_argument(
        "--probe-port",
        action="append",
        type=int,
        default=[],
        metavar="PORT",
        help="let health probes dial it without mTLS, those of the node agent's --probe-cgroup; may be repeated",
    )
    capture.add_argument(
        "--dns",
        action="store_true",
        help="answer COMMAND's name queries for services of the mesh; all others go to the nameserver that was asked",
    )
    capture.add_argument("--forward", action="append", default=[], metavar="LOCALIP:PORT=SERVICE.NS:PORT")
    capture.add_argument("--socks5", metavar="IP:PORT", help="as --forward: with --capture none")
    sidecar = parser.add_argument_group("the sidecar")
    sidecar.add_argument("--log", type=Path, metavar="FILE", help="its output (default: standard error)")
    sidecar.add_argument("--log-format", choices=("json", "text"), default="text", help="default: %(default)s")
    sidecar.add_argument(
        "--drain-timeout-s", type=float, default=_DRAIN_TIMEOUT_S, metavar="S", help="default: %(default)s"
    )
    sidecar.add_argument(
        "--upgrade-drain-timeout-s",
        type=float,
        default=_UPGRADE_DRAIN_TIMEOUT_S,
        metavar="S",
        help="how long connections live on in a sidecar that was upgraded; default: %(default)s",
    )
    sidecar.add_argument("--otlp", metavar="HOST:PORT", help="post spans to this collector, a service of the mesh")
    sidecar.add_argument("--otlp-share", metavar="SHARE", help="of the traces that begin here, how many are recorded")
    sidecar.add_argument(
        "--fork-server",
        type=Path,
        metavar="PATH",
        help=f"let `uproxy fork-server` start it, to save memory; its socket is {FORK_SOCKET} by default",
    )
    sidecar.add_argument("--uid", type=int, help=f"default: a free one from {FIRST_UID} up")
    sidecar.add_argument("--state-dir", type=Path, default=upgrade.DEFAULT_STATE_DIR, help="default: %(default)s")
    sidecar.add_argument("--cgroup-root", type=Path, metavar="DIR", help="default: uproxy/ in the cgroup2 hierarchy")
    before, separator, command = _split(argv)
    options = parser.parse_args(before)
    if not separator or not command:
        parser.error("no command: put it behind --, as in `uproxy exec … -- python3 app.py`")
    wrong = _wrong_mode(options) or _wrong_capture(options) or wrong_subdomain(options.name) or _read_ranges(options)
    if wrong:
        parser.error(wrong)
    if options.join is None:
        wrong = _complete(options)
        if wrong:
            parser.error(wrong)
    options.state_dir = options.state_dir.absolute()
    return options, command


def _wrong_mode(options: argparse.Namespace) -> str:
    """What is missing without a control plane, or said twice with one; empty when nothing is."""
    needed = {"--address": options.address, "--config": options.config, "--identity-dir": options.identity_dir}
    if options.join is None:
        missing = [option for option, value in needed.items() if value is None]
        return f"needs --join, or else {', '.join(missing)}" if missing else ""
    declared = {
        **needed,
        "--namespace": options.namespace,
        "--service-account": options.service_account,
        "--trust-domain": options.trust_domain,
    }
    given = [option for option, value in declared.items() if value is not None]
    return f"{', '.join(given)}: with --join, the control plane says this" if given else ""


def _read_ranges(options: argparse.Namespace) -> str:
    """Puts the ranges that nftables needs into `ranges`; returns what is wrong with them, or an empty string."""
    options.ranges = None
    if options.capture not in ("nft", "auto"):
        given = options.mesh_cidr or options.exclude_cidr
        return "--mesh-cidr and --exclude-cidr belong to --capture nft; the node agent has its own" if given else ""
    if not options.mesh_cidr:
        return f"--capture {options.capture} needs --mesh-cidr: without a range of its own nothing belongs to the mesh"
    try:
        options.ranges = MeshRanges.parse(options.mesh_cidr, options.exclude_cidr)
    except ValueError as error:
        return str(error)
    return ""


def _wrong_capture(options: argparse.Namespace) -> str:
    """What does not fit the capture; empty when all does."""
    if options.dns and options.capture != "ebpf":
        return "--dns needs --capture ebpf, which brings the name queries to the sidecar"
    return ""


def _complete(options: argparse.Namespace) -> str:
    """Fills in who the workload is where nobody else says it; returns what is wrong with it, or an empty string."""
    options.namespace = options.namespace or _DEFAULT_NAMESPACE
    options.service_account = options.service_account or _DEFAULT_ACCOUNT
    options.trust_domain = options.trust_domain or _DEFAULT_TRUST_DOMAIN
    # The sidecar's working directory is another one.
    options.config = [path.absolute() for path in options.config]
    try:
        options.address = tuple(parse_address(text) for text in options.address)
    except AddressError as error:
        return str(error)
    return wrong_dns_label(options.namespace)


def _split(argv: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    if "--" not in argv:
        return list(argv), False, []
    at = list(argv).index("--")
    return list(argv[:at]), True, list(argv[at + 1 :])


def _run(options: argparse.Namespace, command: list[str], undo: ExitStack) -> int:
    """Every step registers how to undo it before it is taken, so that a failure anywhere leaves nothing."""
    _check(options, command)
    state = options.state_dir / options.name
    undo.enter_context(claimed_name(options.state_dir / f"{options.name}.lock"))
    if options.join is not None:
        _become_member(options, state)
    box = _sandbox(options)
    # A second name, because a launcher with another --state-dir could share it.
    undo.enter_context(claimed_name(LOCK_DIR / f"{box.netns}.lock"))
    uid = undo.enter_context(claimed_uid(options.uid))
    signals = linux.SignalFd(SIGNALS)
    undo.callback(signals.close)
    linux.adopt_orphans()

    # Under the locks, whatever bears our names is what a killed launcher left.
    sandbox.remove(box)
    undo.callback(sandbox.remove, box)
    sandbox.build(box)
    for command_line in sandbox.forwarding_gaps(box.addresses):
        say(options.name, f"other hosts cannot reach it until this one forwards: {command_line}")
    netns = undo.enter_context(_opened(box.netns_path))
    probes: list[socket.socket] = []
    if options.capture == "ebpf":
        undo.enter_context(_registered(options, box, netns))
    elif options.capture == "nft":
        _redirect(options, uid, netns)
    if options.capture != "none":
        families = sorted({socket.AF_INET6 if ":" in address else socket.AF_INET for address in box.addresses})
        probes = sockets_inside(box.app_cgroup, netns, families)
        for probe in probes:
            undo.callback(probe.close)

    account = Account(uid, uid)
    identity: Identity
    if options.join is not None:
        identity = JoinedIdentity(state, account)
    else:
        identity = IdentityCopy(options.identity_dir, state, account)
        undo.callback(shutil.rmtree, state, ignore_errors=True)
    sidecar = Sidecar(
        _spawn(options, state, box, netns, account, signals),
        netns,
        probes,
        log=undo.enter_context(_log(options.log)),
        identity=identity,
    )
    requests = undo.enter_context(upgrade.requests(options.state_dir, options.name))
    supervision = Supervision(options.name, signals, sidecar, requests)
    undo.callback(supervision.end_sidecar, options.drain_timeout_s + _DRAIN_MARGIN_S)
    supervision.start_sidecar(_READY_TIMEOUT_S)
    entrance = Entrance(
        box.app_cgroup,
        netns,
        account=_account_of(options.user) if options.user else None,
        unprivileged=options.capture == "nft",  # whoever is root could take the rules away
        parent=os.getpid(),
        signal_mask=signals.previous,
    )
    undo.callback(cgroup.kill, box.app_cgroup)
    return supervision.run(command, entrance, _environment(options.user))


def _check(options: argparse.Namespace, command: list[str]) -> None:
    """Everything that can be known to be wrong before anything is made."""
    if os.geteuid() != 0:
        raise LaunchError(
            "needs root, to make a network namespace and cgroups; without root, use "
            "`uproxy run --capture none` with --forward or --socks5"
        )
    found = shutil.which(command[0])
    if found is None:
        exists = os.path.exists(command[0]) and "/" in command[0]
        if exists:
            raise LaunchError(f"{command[0]} is not executable", NOT_EXECUTABLE)
        raise LaunchError(f"{command[0]}: command not found", NOT_FOUND)
    if options.user is not None:
        _account_of(options.user)
    if options.join is None:
        _check_files(options)
    if options.capture == "auto":
        _choose_capture(options)
    if options.capture == "ebpf" and not options.node_socket.is_socket():
        raise LaunchError(f"no node agent at {options.node_socket}: start `uproxy node` on this host first")
    if options.fork_server is not None and not options.fork_server.is_socket():
        raise LaunchError(f"no fork server at {options.fork_server}: start `uproxy fork-server` on this host first")
    if options.capture == "nft":
        _check_nft(options)


def _choose_capture(options: argparse.Namespace) -> None:
    """What `auto` is here. A node agent that is down does not make it less: that is a host with eBPF."""
    if options.node_socket.is_socket():
        options.capture = "ebpf"
        return
    command = [sys.executable, "-I", "-m", "uproxy.node.features"]
    child = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode != 0:
        raise LaunchError(f"which capture this host can is not to be found out: {child.stdout.strip()}")
    capture, _, reason = child.stdout.strip().partition("\n")
    if capture == "none":
        raise LaunchError(f"this host can capture nothing: {reason}. `meshctl check` says more")
    options.capture = capture
    say(options.name, f"capture: {capture}: {reason}")


def _check_nft(options: argparse.Namespace) -> None:
    """The rules know the sidecar by its uid, and no cgroup."""
    if options.user is None or _account_of(options.user).uid == 0:
        raise LaunchError(
            "--capture nft needs a --user other than root: root could take the sidecar's uid, or the rules away"
        )
    if options.probe_port:
        raise LaunchError("--probe-port needs --capture ebpf: nftables cannot tell a prober from anybody else")


def _check_files(options: argparse.Namespace) -> None:
    for path in options.config:
        if not path.is_file():
            raise LaunchError(f"--config {path}: no such file")
    for name in IDENTITY_FILES:
        if not (options.identity_dir / name).is_file():
            raise LaunchError(
                f"--identity-dir {options.identity_dir}: no {name} in it. Make the identity with "
                "`python -m control.client.csr` and `meshctl ca issue`"
            )
    if options.identity_dir.resolve().is_relative_to((options.state_dir / options.name).resolve()):
        raise LaunchError(
            f"--identity-dir {options.identity_dir} is the sidecar's own directory, which is removed at the end: "
            f"keep the identity elsewhere, such as /etc/uproxy/{options.name}"
        )


def _become_member(options: argparse.Namespace, state: Path) -> None:
    """Join the mesh, unless an earlier launch has, and take who the workload is from there. Raises LaunchError."""
    command = [sys.executable, "-I", "-m", "uproxy.joining", str(state), str(options.join.absolute())]
    child = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode != 0:
        raise LaunchError(child.stdout.strip() or f"joining ended with status {child.returncode}")
    try:
        member = Membership.load(state)
    except MembershipError as error:
        raise LaunchError(str(error)) from None
    if member.workload != options.name:
        raise LaunchError(f"the token, and {state} with it, is workload {member.key}'s: use --name {member.workload}")
    if not member.addresses:
        raise LaunchError(f"{member.key} joined without an address, as node agents do: create a token that has one")
    options.namespace, options.service_account = member.identity.namespace, member.identity.service_account
    options.address = member.addresses


def _sandbox(options: argparse.Namespace) -> Sandbox:
    mount = cgroup.mount_point()
    root = options.cgroup_root or mount / "uproxy"
    if not root.is_relative_to(mount) or root == mount:
        raise LaunchError(f"--cgroup-root {root} is not below the cgroup2 hierarchy at {mount}")
    return Sandbox.below(root, mount, options.name, options.address)


@contextmanager
def _registered(options: argparse.Namespace, box: Sandbox, netns_fd: int) -> Iterator[None]:
    """Known to the node agent, with capture attached."""
    client = NodeClient(options.node_socket)
    # A killed launcher's registration. The agent refuses as long as anything runs in it, and says so below.
    with suppress(NodeError):
        client.unregister(options.name)
    with _opened(box.app_cgroup) as app, _opened(box.proxy_cgroup) as proxy:
        client.register(
            workload=options.name,
            namespace=options.namespace,
            service_account=options.service_account,
            addresses=box.addresses,
            app_cgroup=app,
            proxy_cgroup=proxy,
            netns=netns_fd,
            dns=options.dns,
            probe_ports=options.probe_port,
        )
    try:
        yield
    finally:
        try:
            client.unregister(options.name)
        except (NodeError, OSError) as error:
            say(options.name, f"the node agent was not told of its end and will find out by itself: {error}")


def _redirect(options: argparse.Namespace, uid: int, netns_fd: int) -> None:
    """Put nftables' rules in force: they end with the namespace, and with nothing else."""
    for address in options.address:
        if not options.ranges.captures(address):
            raise LaunchError(
                f"address {address} is outside the mesh's ranges ({', '.join(options.ranges.mesh)}): others would "
                "reach it in plaintext; choose one inside, or a --mesh-cidr that has it"
            )
    if _account_of(options.user).uid == uid:
        raise LaunchError(
            f"--user {options.user} has the sidecar's uid {uid}, which is not captured: use another --uid"
        )
    with linux.inside(netns_fd):
        nft.load(nft.rules(uid, options.ranges))


@contextmanager
def _log(path: Path | None) -> Iterator[IO[bytes]]:
    """Opened here, so that the sidecar needs no right to write anywhere; its standard error when there is none."""
    if path is None:
        yield sys.stderr.buffer
    else:
        with open(path, "ab", buffering=0) as file:
            yield file


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _spawn(
    options: argparse.Namespace, state: Path, box: Sandbox, netns_fd: int, account: Account, signals: linux.SignalFd
) -> Spawn:
    """How sidecars are started."""
    entrance = Entrance(
        box.proxy_cgroup,
        netns_fd,
        account=account,
        restricted=True,
        exposures=exposures(_directories_of_sidecar(options)),
        parent=os.getpid(),
        signal_mask=signals.previous,
    )
    arguments = _sidecar_arguments(options, state)
    if options.fork_server is not None:
        return ForkedBy(options.fork_server, tuple(arguments), entrance)
    # -I: neither the working directory nor the environment adds to what is imported.
    return OwnProcess((sys.executable, "-I", "-m", "uproxy", "run", *arguments), entrance)


def _sidecar_arguments(options: argparse.Namespace, state: Path) -> list[str]:
    arguments = ["--identity-dir", str(state)]
    if options.join is None:
        arguments += ["--workload", options.name]
        arguments += ["--namespace", options.namespace, "--service-account", options.service_account]
        arguments += ["--trust-domain", options.trust_domain]
        for address in options.address:
            arguments += ["--address", address]
        for path in options.config:
            arguments += ["--config", str(path)]
    arguments += ["--capture", options.capture, "--access-log", "-", "--log-format", options.log_format]
    arguments += ["--drain-timeout-s", str(options.drain_timeout_s)]
    arguments += ["--take-over", "--upgrade-drain-timeout-s", str(options.upgrade_drain_timeout_s)]
    if options.capture == "ebpf":
        arguments += ["--direct-socket", str(options.node_socket.absolute().with_name(SOCKET_NAME))]
    if options.otlp:
        arguments += ["--otlp", options.otlp]
    if options.otlp_share:
        arguments += ["--otlp-share", options.otlp_share]
    if options.dns:
        arguments.append("--dns")
    for forward in options.forward:
        arguments += ["--forward", forward]
    if options.socks5:
        arguments += ["--socks5", options.socks5]
    return arguments


def _directories_of_sidecar(options: argparse.Namespace) -> list[Path]:
    """What an account that owns nothing must reach: the interpreter, our packages, the configuration, its state."""
    code = [Path(package.__path__[0]) for package in (uproxy, control)]
    data = [path.parent for path in options.config or ()] + [options.state_dir]
    return [Path(sys.prefix), Path(sys.base_prefix), *code, *data]


def _account_of(user: str) -> Account:
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise LaunchError(f"--user {user}: there is no such user here") from None
    return Account(entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(user, entry.pw_gid)))


def _environment(user: str | None) -> dict[str, str]:
    environment = dict(os.environ)
    if user is not None:
        environment |= {"USER": user, "LOGNAME": user, "HOME": pwd.getpwnam(user).pw_dir}
    return environment
