"""`uproxy exec`: run a command as a workload of the mesh, with a sidecar, on a host without an orchestrator.

The order keeps it closed: the sandbox is made and registered with the node agent, which attaches capture, before
the first process is in it; the command starts when the sidecar has proved that capture works. From then on a dead
sidecar means refused connections until it is back, never plaintext.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import control
import uproxy
from control.api.address import AddressError, parse_address
from control.api.names import wrong_dns_label, wrong_subdomain
from uproxy import cgroup, linux, sandbox
from uproxy.cgroup import SandboxError
from uproxy.entrance import Account, Entrance, exposures, sockets_inside
from uproxy.node.client import NodeClient, NodeError
from uproxy.sandbox import Sandbox
from uproxy.sidecar import Sidecar

# Exit statuses of the launcher itself, as nohup(1), env(1) and container runtimes use them.
_FAILED = 125
_NOT_EXECUTABLE = 126
_NOT_FOUND = 127

# The uids that systemd sets aside for service users made on the fly (DynamicUser=): no person has one.
_FIRST_UID, _LAST_UID = 61184, 65519

# A sidecar is ready within a second; the rest is for a loaded machine and an agent that is still loading.
_READY_TIMEOUT_S = 30.0
# Above what `uproxy run` grants itself for draining; what is left then is cut.
_DRAIN_MARGIN_S = 2.0
_DRAIN_TIMEOUT_S = 5.0

_LOCK_DIR = Path("/run/uproxy/exec")
_IDENTITY_FILES = ("key.pem", "chain.pem", "bundle.pem")

_ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
_FORWARDED = _ENDING | {signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGCONT}


class LaunchError(Exception):
    """A workload that is not started; `status` is the launcher's exit status."""

    def __init__(self, text: str, status: int = _FAILED) -> None:
        super().__init__(text)
        self.status = status


class _Interrupted(Exception):
    """Somebody ended the launcher before the command ran."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


def main(argv: Sequence[str]) -> int:
    """Run the command to its end. Its exit status is ours; 128 + n when signal n ended it."""
    options, command = _parse(argv)
    try:
        with ExitStack() as undo:
            return _run(options, command, undo)
    except _Interrupted as ended:
        return 128 + ended.number
    except LaunchError as error:
        _say(options.name, str(error))
        return error.status
    except (SandboxError, NodeError, OSError) as error:
        _say(options.name, str(error))
        return _FAILED


def _say(name: str, text: str) -> None:
    print(f"uproxy exec: {name}: {text}", file=sys.stderr, flush=True)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="uproxy exec",
        usage="uproxy exec --name NAME --address IP [option…] -- COMMAND [argument…]",
        description="Run COMMAND as a workload of the mesh, in a network namespace of its own, with a sidecar.",
        epilog="Exit status: the command's; 125 when the launcher failed, 126 and 127 as in a shell. "
        "A command that runs as root can leave its sandbox: give it a --user.",
    )
    parser.add_argument("--name", required=True, help="the workload, as its WorkloadEntry is named")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--service-account", default="default")
    parser.add_argument("--trust-domain", default="cluster.local")
    parser.add_argument("--address", required=True, nargs="+", action="extend", metavar="IP", help="its mesh addresses")
    parser.add_argument(
        "--config", required=True, nargs="+", action="extend", type=Path, metavar="FILE", help="resources"
    )
    parser.add_argument("--identity-dir", required=True, type=Path, help=" and ".join(_IDENTITY_FILES))
    parser.add_argument("--node-socket", type=Path, default=Path("/run/uproxy/node.sock"))
    parser.add_argument("--capture", choices=("ebpf", "none"), default="ebpf")
    parser.add_argument("--user", help="whom COMMAND runs as (default: the caller)")
    parser.add_argument("--uid", type=int, help=f"the sidecar's uid (default: a free one from {_FIRST_UID} up)")
    parser.add_argument("--state-dir", type=Path, default=Path("/var/lib/uproxy"))
    parser.add_argument("--cgroup-root", type=Path, help="default: uproxy/ in the cgroup2 hierarchy")
    parser.add_argument("--log", type=Path, help="file for the sidecar's output (default: standard error)")
    parser.add_argument("--log-format", choices=("json", "text"), default="text")
    parser.add_argument("--drain-timeout-s", type=float, default=_DRAIN_TIMEOUT_S)
    parser.add_argument("--forward", action="append", default=[], metavar="IP:PORT=SERVICE.NS:PORT")
    parser.add_argument("--socks5", metavar="IP:PORT")
    before, separator, command = _split(argv)
    options = parser.parse_args(before)
    if not separator or not command:
        parser.error("no command: put it behind --, as in `uproxy exec … -- python3 app.py`")
    for wrong in (wrong_subdomain(options.name), wrong_dns_label(options.namespace)):
        if wrong:
            parser.error(wrong)
    try:
        options.address = tuple(parse_address(text) for text in options.address)
    except AddressError as error:
        parser.error(str(error))
    options.config = [path.absolute() for path in options.config]
    return options, command


def _split(argv: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    if "--" not in argv:
        return list(argv), False, []
    at = list(argv).index("--")
    return list(argv[:at]), True, list(argv[at + 1 :])


def _run(options: argparse.Namespace, command: list[str], undo: ExitStack) -> int:
    """Every step registers how to undo it before it is taken, so that a failure anywhere leaves nothing."""
    _check(options, command)
    box = _sandbox(options)
    state = options.state_dir / options.name
    # Two names, because either could be shared with a launcher whose other options differ.
    undo.enter_context(_claimed(_LOCK_DIR / f"{box.netns}.lock", options.name))
    undo.enter_context(_claimed(options.state_dir / f"{options.name}.lock", options.name))
    uid = undo.enter_context(_claimed_uid(options.uid))
    signals = linux.SignalFd(_FORWARDED | {signal.SIGCHLD})
    undo.callback(signals.close)
    linux.adopt_orphans()

    # Under the locks, whatever bears our names is what a killed launcher left.
    sandbox.remove(box)
    undo.callback(sandbox.remove, box)
    sandbox.build(box)
    for command_line in sandbox.forwarding_gaps(box.addresses):
        _say(options.name, f"other hosts cannot reach it until this one forwards: {command_line}")
    netns = undo.enter_context(_opened(box.netns_path))
    probes: list[socket.socket] = []
    if options.capture == "ebpf":
        undo.enter_context(_registered(options, box, netns))
        families = sorted({socket.AF_INET6 if ":" in address else socket.AF_INET for address in box.addresses})
        probes = sockets_inside(box.app_cgroup, netns, families)
        for probe in probes:
            undo.callback(probe.close)

    account = Account(uid, uid)
    undo.callback(shutil.rmtree, state, ignore_errors=True)
    sidecar = Sidecar(
        _sidecar_arguments(options, state),
        Entrance(
            box.proxy_cgroup,
            netns,
            account=account,
            restricted=True,
            exposures=exposures(_directories_of_sidecar(options)),
            parent=os.getpid(),
            signal_mask=signals.previous,
        ),
        probes,
        log=undo.enter_context(_log(options.log)),
        prepare=lambda: _install_identity(options.identity_dir, state, account),
    )
    launch = _Supervision(options.name, signals, sidecar)
    undo.callback(launch.end_sidecar, options.drain_timeout_s + _DRAIN_MARGIN_S)
    launch.start_sidecar()
    entrance = Entrance(
        box.app_cgroup,
        netns,
        account=_account_of(options.user) if options.user else None,
        parent=os.getpid(),
        signal_mask=signals.previous,
    )
    undo.callback(cgroup.kill, box.app_cgroup)
    return launch.run(command, entrance, _environment(options.user))


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
            raise LaunchError(f"{command[0]} is not executable", _NOT_EXECUTABLE)
        raise LaunchError(f"{command[0]}: command not found", _NOT_FOUND)
    if options.user is not None:
        _account_of(options.user)
    for path in options.config:
        if not path.is_file():
            raise LaunchError(f"--config {path}: no such file")
    for name in _IDENTITY_FILES:
        if not (options.identity_dir / name).is_file():
            raise LaunchError(
                f"--identity-dir {options.identity_dir}: no {name} in it. Make the identity with "
                "`python -m control.client.csr` and `meshctl ca issue`"
            )
    if options.capture == "ebpf" and not options.node_socket.is_socket():
        raise LaunchError(f"no node agent at {options.node_socket}: start `uproxy node` on this host first")


def _sandbox(options: argparse.Namespace) -> Sandbox:
    mount = cgroup.mount_point()
    root = options.cgroup_root or mount / "uproxy"
    if not root.is_relative_to(mount) or root == mount:
        raise LaunchError(f"--cgroup-root {root} is not below the cgroup2 hierarchy at {mount}")
    return Sandbox.below(root, mount, options.name, options.address)


def _make_opened(path: Path) -> None:
    """Whatever the caller's umask: the sidecar's uid passes through it to what is its own."""
    if not path.exists():
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o755)


@contextmanager
def _claimed(path: Path, name: str) -> Iterator[None]:
    """Hold a lock file, which the kernel releases whatever ends us. Refused by name when somebody holds it."""
    _make_opened(path.parent)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 32).decode("ascii", "replace").strip()
            os.close(fd)
            raise LaunchError(
                f"a workload of this name is running already (`uproxy exec`, pid {holder or '?'}): "
                "choose another --name, or end that one"
            ) from None
        # The holder before us may have removed the file between our open and our lock.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                break
        os.close(fd)
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


@contextmanager
def _claimed_uid(wanted: int | None) -> Iterator[int]:
    """A uid that no other launcher of this machine gives to a sidecar, held through a lock on one byte per uid."""
    _make_opened(_LOCK_DIR)
    with open(_LOCK_DIR / "uids", "ab") as file:
        for uid in [wanted] if wanted is not None else range(_FIRST_UID, _LAST_UID + 1):
            with suppress(BlockingIOError):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, uid)
                yield uid
                return
    if wanted is not None:
        raise LaunchError(f"--uid {wanted} is another sidecar's: each needs one of its own")
    raise LaunchError(f"no uid is free from {_FIRST_UID} to {_LAST_UID}")


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
        )
    try:
        yield
    finally:
        try:
            client.unregister(options.name)
        except (NodeError, OSError) as error:
            _say(options.name, f"the node agent was not told of its end and will find out by itself: {error}")


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


def _install_identity(source: Path, state: Path, account: Account) -> None:
    """Give the sidecar a copy that it may read, and nobody else; at each start, so that a renewed one is used."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chown(state, account.uid, account.gid)
    for name in _IDENTITY_FILES:
        content = (source / name).read_bytes()
        fresh = state / f".{name}.new"
        fresh.unlink(missing_ok=True)
        with open(fresh, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(content)
            os.fchown(file.fileno(), account.uid, account.gid)
        fresh.rename(state / name)


def _sidecar_arguments(options: argparse.Namespace, state: Path) -> list[str]:
    # -I: neither the working directory nor the environment adds to what is imported.
    arguments = [sys.executable, "-I", "-m", "uproxy", "run", "--workload", options.name]
    arguments += ["--namespace", options.namespace, "--service-account", options.service_account]
    arguments += ["--trust-domain", options.trust_domain, "--identity-dir", str(state)]
    for address in options.address:
        arguments += ["--address", address]
    for path in options.config:
        arguments += ["--config", str(path)]
    arguments += ["--capture", options.capture, "--access-log", "-", "--log-format", options.log_format]
    arguments += ["--drain-timeout-s", str(options.drain_timeout_s)]
    for forward in options.forward:
        arguments += ["--forward", forward]
    if options.socks5:
        arguments += ["--socks5", options.socks5]
    return arguments


def _directories_of_sidecar(options: argparse.Namespace) -> list[Path]:
    """What an account that owns nothing must reach: the interpreter, our packages, the configuration, its state."""
    code = [Path(package.__path__[0]) for package in (uproxy, control)]
    data = [path.parent for path in options.config] + [options.state_dir]
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


class _Supervision:
    """The loop over what can happen: a signal, a child's end, readiness, the time of a restart."""

    def __init__(self, name: str, signals: linux.SignalFd, sidecar: Sidecar) -> None:
        self._name = name
        self._signals = signals
        self._sidecar = sidecar
        self._command_pid = 0
        self._command_status: int | None = None
        self._ending = False

    def start_sidecar(self) -> None:
        """Return when it is ready. Raises LaunchError when it gave up, or takes too long."""
        deadline = time.monotonic() + _READY_TIMEOUT_S
        self._sidecar.start()
        while not self._sidecar.ready:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"the sidecar is not ready after {_READY_TIMEOUT_S:.0f} s; "
                    f"pending: {self._sidecar.pending() or 'its own start (it does not answer yet)'}"
                )
            self._turn(deadline)

    def run(self, command: list[str], entrance: Entrance, environment: dict[str, str]) -> int:
        """Start the command and wait for it, with everything that happens meanwhile."""
        try:
            process = subprocess.Popen(command, env=environment, preexec_fn=entrance)
        except FileNotFoundError as error:
            raise LaunchError(str(error), _NOT_FOUND) from None
        except PermissionError as error:
            raise LaunchError(str(error), _NOT_EXECUTABLE) from None
        self._command_pid = process.pid
        while self._command_status is None:
            self._turn(None)
        process.returncode = self._command_status
        return self._command_status if self._command_status >= 0 else 128 - self._command_status

    def end_sidecar(self, timeout_s: float) -> None:
        """Let it drain; what does not end in time is killed with its cgroup."""
        self._ending = True
        self._sidecar.terminate()
        deadline = time.monotonic() + timeout_s
        while self._sidecar.pid and time.monotonic() < deadline:
            self._turn(deadline)

    def _turn(self, until: float | None) -> None:
        """Wait for one thing to happen, at most until then."""
        now = time.monotonic()
        restart_at = self._sidecar.restart_at if not self._ending else None
        wakeups = [at for at in (until, restart_at) if at is not None]
        poll = select.poll()
        poll.register(self._signals, select.POLLIN)
        if self._sidecar.ready_fd >= 0:
            poll.register(self._sidecar.ready_fd, select.POLLIN)
        events = poll.poll(max(0.0, min(wakeups) - now) * 1000 + 1 if wakeups else None)
        for fd, _ in events:
            if fd == self._signals.fileno():
                self._on_signals()
            elif fd == self._sidecar.ready_fd:
                self._sidecar.read_ready()
                if self._sidecar.ready and self._sidecar.restarts:
                    _say(self._name, f"the sidecar serves again (restart {self._sidecar.restarts})")
        if restart_at is not None and time.monotonic() >= restart_at:
            self._sidecar.start()

    def _on_signals(self) -> None:
        for event in self._signals.read():
            if event.number == signal.SIGCHLD or self._ending:
                continue
            if not self._command_pid:
                if event.number in _ENDING:
                    raise _Interrupted(event.number)
            elif event.code <= 0:
                # From a process. What a terminal sends (code > 0), it has sent to the command as well.
                with suppress(ProcessLookupError):
                    os.kill(self._command_pid, event.number)
        self._reap()

    def _reap(self) -> None:
        """Collect every child that ended, orphans of the command included."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid == self._command_pid:
                self._command_status = code
            elif pid == self._sidecar.pid:
                self._on_sidecar_end(code)

    def _on_sidecar_end(self, code: int) -> None:
        was_ready = self._sidecar.ready or self._command_pid
        self._sidecar.ended(code, time.monotonic())
        if self._ending:
            return
        how = f"status {code}" if code >= 0 else signal.Signals(-code).name
        if code >= 0 and not was_ready:
            raise LaunchError(f"the sidecar ended with {how} before it was ready; its messages say why")
        _say(self._name, f"the sidecar ended ({how}); connections are refused until it is back")
