"""Capture by nftables, end to end: what it brings to the uProxy, what it keeps out, and that it outlives whoever dies.

Each workload beside one that is captured by eBPF, or not at all, and over both families.
"""

from __future__ import annotations

import errno
import os
import queue
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.lab import remains
from benchmarks.lab.apps import commands
from benchmarks.lab.sources import LabError
from benchmarks.lab.topology import MESH_RANGES, App, Host, Lab, Workload, WorkloadOptions
from bpf import loader
from tests.support import inside, open_loop
from tests.support.secrecy import nothing_in_the_clear
from tests.support.upgrading import running as uproxies
from tests.support.upgrading import upgrade
from uproxy import linux
from uproxy.entrance import sockets_inside

PORT = 9000
NFT = ("--capture", "nft", "--mesh-cidr", *MESH_RANGES)
_FORWARDED = 7000

_SERVICE = """\
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: load}}
spec:
  clusterIP: "{vip}"
  ipFamilies: [{family}]
  selector: {{app: {name}}}
  ports: [{{name: tcp, port: 9000, targetPort: tcp}}]
"""
_JOBS = """\
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: job, namespace: load}
spec: {address: 10.96.1.100, serviceAccount: job}
"""


_PERMISSIVE = """\
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: open, namespace: load}
spec: {mtls: {mode: PERMISSIVE}}
"""


@dataclass(frozen=True, slots=True)
class Mesh:
    """Callers on host a, peers on host b; by capture and IP version, as `nft4`."""

    lab: Lab
    a: Host
    b: Host
    callers: dict[str, Workload]
    peers: dict[str, Workload]
    resources: str

    def vip(self, peer: str) -> tuple[str, int]:
        return _vip(peer), PORT


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Lab() as lab:
        a, b = lab.host("a"), lab.host("b")
        callers: dict[str, Workload] = {}
        peers: dict[str, Workload] = {}
        for capture, options in (("nft", NFT), ("ebpf", ())):
            for version in "46":
                kind = {"namespace": "load", "ipv6": version == "6", "launch": options}
                name = f"{capture}{version}"
                callers[name] = a.workload(f"caller-{name}", commands.idle(), **kind)
                peers[name] = b.workload(f"peer-{name}", commands.idle(), ports={"tcp": PORT}, **kind)
        for version, loopback in (("4", "127.0.0.1"), ("6", "[::1]")):
            forward = f"{loopback}:{_FORWARDED}=peer-nft{version}.load:{PORT}"
            callers[f"none{version}"] = a.workload(
                f"caller-none{version}",
                commands.idle(),
                namespace="load",
                ipv6=version == "6",
                launch=("--capture", "none", "--forward", forward),
            )
        services = [
            _SERVICE.format(name=peer.name, vip=_vip(name), family="IPv6" if name.endswith("6") else "IPv4")
            for name, peer in peers.items()
        ]
        made = Mesh(lab, a, b, callers, peers, "".join(services) + _JOBS)
        lab.configure(made.resources)
        lab.start()
        yield made


def _vip(peer: str) -> str:
    number = 30 + ("nft4", "nft6", "ebpf4", "ebpf6").index(peer)
    return f"fd96:0:0:ffff::{number}" if peer.endswith("6") else f"240.240.0.{number}"


def _exchanges(caller: Workload, address: tuple[str, int]) -> bool:
    try:
        with inside.dial(caller, address) as made:
            made.sendall(b"x")
            return made.recv(1) == b"x"
    except OSError:
        return False


def _error(
    caller: Workload,
    address: tuple[str, int],
    send: bytes = b"x",
    source_port: int = 0,
    timeout_s: float = 20.0,
) -> str:
    """How a connection fails, from `connect()` to the first answer; empty when it does not."""
    (made,) = caller.sockets(1, inside.family_of(address))
    try:
        with made:
            made.settimeout(timeout_s)
            if source_port:
                made.bind((caller.address, source_port))
            made.connect(address)
            made.sendall(send)
            return "" if made.recv(1) else "FIN"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)


def _ports_to(workload: Workload, port: int) -> list[int]:
    """Ports that a workload's established connections to a port of others have."""
    with workload.entered():
        tables = [Path(f"/proc/thread-self/net/tcp{version}").read_text() for version in ("", "6")]
    rows = [line.split()[1:4] for table in tables for line in table.splitlines()[1:]]
    wanted = f":{port:04X}"
    return [
        int(ours.rpartition(":")[2], 16) for ours, theirs, state in rows if theirs.endswith(wanted) and state == "01"
    ]


def _has_broken(made: socket.socket, send: bytes) -> bool:
    """Whether an echo connection ends with an error; fails when it ends as if all had come."""
    try:
        made.sendall(send)
        assert made.recv(64)
    except OSError:
        return True
    return False


both = pytest.mark.parametrize("version", ["4", "6"])


class TestWhatIsDialled:
    @both
    @pytest.mark.parametrize(("caller", "peer"), [("nft", "nft"), ("nft", "ebpf"), ("ebpf", "nft"), ("none", "nft")])
    def test_arrives_whole_with_its_identity(self, mesh: Mesh, caller: str, peer: str, version: str) -> None:
        ours, theirs = mesh.callers[caller + version], mesh.peers[peer + version]
        loopback = ("::1" if version == "6" else "127.0.0.1", _FORWARDED)
        address = loopback if caller == "none" else mesh.vip(peer + version)
        size = 100_000 + random.randrange(1000)

        def answer_after_the_end(connection: socket.socket) -> None:
            got = inside.read_all(connection)
            connection.sendall(b"%d bytes, all of them" % len(got))

        with inside.serving(theirs, PORT, answer_after_the_end), inside.dial(ours, address) as made:
            assert made.getpeername()[:2] == address
            made.sendall(b"x" * size)
            made.shutdown(socket.SHUT_WR)
            assert inside.read_all(made) == b"%d bytes, all of them" % size
        entry = theirs.await_access(lambda e: e.get("bytes_recv") == size)
        assert (entry["src.identity"], entry["dst.identity"]) == (str(ours.identity), str(theirs.identity))

    @both
    def test_workloads_address_is_tunnelled_too(self, mesh: Mesh, version: str) -> None:
        peer = mesh.peers["nft" + version]
        with inside.serving(peer, PORT, inside.echo):
            assert _exchanges(mesh.callers["nft" + version], (peer.address, PORT))

    def test_mapped_address_on_a_socket_of_the_other_family(self, mesh: Mesh) -> None:
        (made,) = mesh.callers["nft4"].sockets(1, socket.AF_INET6)
        with inside.serving(mesh.peers["nft4"], PORT, inside.echo), made:
            made.settimeout(30)
            made.connect((f"::ffff:{mesh.vip('nft4')[0]}", PORT))
            made.sendall(b"x")
            assert made.recv(1) == b"x"

    def test_family_that_the_workload_has_no_address_of_cannot_be_dialled(self, mesh: Mesh) -> None:
        assert _error(mesh.callers["nft4"], mesh.vip("nft6")) == "ENETUNREACH"

    @both
    def test_unknown_address_of_the_mesh_is_reset(self, mesh: Mesh, version: str) -> None:
        """The uProxy refuses it: the rules know ranges, not addresses."""
        address = "fd96:0:0:ffff::99" if version == "6" else "240.240.9.9"
        caller = mesh.callers["nft" + version]
        assert _error(caller, (address, 80)) == "ECONNRESET"
        entry = caller.await_access(lambda e: address in e["dst.addr"])
        assert "no-config" in entry["error"]

    @both
    def test_datagram_into_the_mesh_is_refused_and_others_leave(self, mesh: Mesh, version: str) -> None:
        family = socket.AF_INET6 if version == "6" else socket.AF_INET
        caller, outside = mesh.callers["nft" + version], f"fd95::{mesh.b.index}"
        outside = outside if version == "6" else mesh.b.underlay_address
        with open(caller.box.netns_path) as netns:
            (made,) = sockets_inside(caller.box.app_cgroup, netns.fileno(), [family], socket.SOCK_DGRAM)
        with mesh.b.entered():
            receiver = socket.socket(family, socket.SOCK_DGRAM)
        with made, receiver:
            receiver.bind((outside, 0))
            receiver.settimeout(30)
            for address in (mesh.vip("nft" + version), (mesh.peers["nft" + version].address, 53)):
                with pytest.raises(PermissionError):
                    made.sendto(b"x", address)
            made.sendto(b"a datagram", receiver.getsockname()[:2])
            assert receiver.recv(64) == b"a datagram"

    @both
    def test_datagram_of_the_uproxys_flow_is_refused_all_the_same(self, mesh: Mesh, version: str) -> None:
        """Conntrack's mark says that it is the uProxy's; whoever owns the socket now decides."""
        caller, address = mesh.callers["nft" + version], mesh.vip("nft" + version)
        family = inside.family_of(address)
        uid = int(re.findall(r"^Uid:\t(\d+)", Path(f"/proc/{caller.proxy_pid()}/status").read_text(), re.MULTILINE)[0])
        with open(caller.box.netns_path) as netns:
            (theirs,) = sockets_inside(caller.box.app_cgroup, netns.fileno(), [family], socket.SOCK_DGRAM)
        with theirs:
            with caller.entered(), linux.files_of(uid), socket.socket(family, socket.SOCK_DGRAM) as ours:
                ours.bind((caller.address, 0))
                ours.sendto(b"x", address)
                theirs_end = ours.getsockname()[:2]
            theirs.bind(theirs_end)
            with pytest.raises(PermissionError):
                theirs.sendto(b"x", address)

    @both
    def test_connection_outside_of_the_mesh_is_left_alone(self, mesh: Mesh, version: str) -> None:
        address = f"fd95::{mesh.b.index}" if version == "6" else mesh.b.underlay_address
        family = socket.AF_INET6 if version == "6" else socket.AF_INET
        with mesh.b.entered():
            listener = socket.create_server((address, 0), family=family)
        caller = mesh.callers["nft" + version]
        with listener, inside.dial(caller, listener.getsockname()[:2]) as made, listener.accept()[0] as accepted:
            made.sendall(b"in the open")
            assert accepted.recv(64) == b"in the open"
            assert accepted.getpeername()[0] == caller.address

    @both
    def test_dialling_the_uproxy_itself_leads_nowhere(self, mesh: Mesh, version: str) -> None:
        caller = mesh.callers["nft" + version]
        assert _error(caller, ("::1" if version == "6" else "127.0.0.1", 15001)) == "ECONNRESET"
        caller.await_access(lambda e: e.get("error", "").startswith("not-captured"))


class TestTheWayIn:
    @both
    def test_only_tunnels_come_in(self, mesh: Mesh, version: str) -> None:
        peer = mesh.peers["nft" + version]
        with inside.serving(peer, PORT, inside.echo):
            for port in (PORT, 15000, 15001, 15020, 15021):
                with mesh.a.entered(), pytest.raises(ConnectionRefusedError):
                    socket.create_connection((peer.address, port), timeout=20)
            with mesh.a.entered(), socket.create_connection((peer.address, 15008), timeout=20):
                pass
            assert _exchanges(peer, (peer.address, PORT)), "its own address is its own business"

    def test_permissive_port_stays_closed(self, mesh: Mesh) -> None:
        """Its uProxy would have to tell eBPF, and says so."""
        peer = mesh.peers["nft4"]
        mesh.lab.configure(mesh.resources + _PERMISSIVE)
        try:
            with inside.serving(peer, PORT, inside.echo):
                inside.eventually(lambda: "no port takes plaintext" in peer.log.read_text())
                with mesh.a.entered(), pytest.raises(ConnectionRefusedError):
                    socket.create_connection((peer.address, PORT), timeout=20)
                assert _exchanges(mesh.callers["nft4"], mesh.vip("nft4"))
        finally:
            mesh.lab.configure(mesh.resources)

    def test_what_is_no_tcp_udp_or_icmp_does_not_come_in(self, mesh: Mesh) -> None:
        """UDP-Lite stands for all that the other capture refuses to make sockets of."""
        peer = mesh.peers["nft4"]
        received = {}
        for name, protocol in (("udp", socket.IPPROTO_UDP), ("udplite", socket.IPPROTO_UDPLITE)):
            with peer.entered():
                receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, protocol)
            with mesh.a.entered():
                sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, protocol)
            with receiver, sender:
                receiver.bind((peer.address, 4000))
                receiver.settimeout(1)
                sender.sendto(b"x", (peer.address, 4000))
                with suppress(TimeoutError):
                    received[name] = receiver.recv(8)
        assert received == {"udp": b"x"}

    def test_answers_of_others_than_the_uproxy_do_not_leave_its_ports(self, mesh: Mesh) -> None:
        caller = mesh.callers["nft4"]
        outcomes = {}
        for port in (15050, 15091):
            (listener,) = caller.sockets()
            with listener:
                listener.bind(("127.0.0.1", port))
                listener.listen()
                (made,) = caller.sockets()
                with made:
                    made.settimeout(1)
                    outcomes[port] = made.connect_ex(("127.0.0.1", port))
        assert outcomes[15091] == 0
        assert outcomes[15050] != 0


class TestDeath:
    @both
    def test_killed_uproxy_refuses_and_sends_nothing_in_the_clear(self, mesh: Mesh, version: str) -> None:
        caller, peer = mesh.callers["nft" + version], mesh.peers["nft" + version]
        address, mark = mesh.vip("nft" + version), secrets.token_bytes(16)
        assert caller.launcher is not None
        with inside.serving(peer, PORT, inside.echo), nothing_in_the_clear((mesh.a, mesh.b), mark):
            held = inside.dial(caller, address)
            held.sendall(mark)
            assert held.recv(64) == mark
            caller.launcher.send_signal(signal.SIGSTOP)
            try:
                os.kill(caller.proxy_pid(), signal.SIGKILL)
                with held:
                    inside.eventually(lambda: _has_broken(held, mark))
                for target in (address, (peer.address, PORT), (peer.address, 15008)) * 5:
                    assert _error(caller, target, mark) == "ECONNREFUSED"
            finally:
                caller.launcher.send_signal(signal.SIGCONT)
            inside.eventually(lambda: _exchanges(caller, address))

    @both
    def test_connection_of_the_uproxy_that_conntrack_still_knows_is_no_way_out(self, mesh: Mesh, version: str) -> None:
        """Its mark lets out what the kernel sends for a closed socket; another socket with its two ends is not that."""
        caller, peer = mesh.callers["nft" + version], mesh.peers["nft" + version]
        mark = secrets.token_bytes(16)
        with inside.serving(peer, PORT, inside.echo), nothing_in_the_clear((mesh.a, mesh.b), mark):
            assert _exchanges(caller, mesh.vip("nft" + version))
            tunnels = _ports_to(caller, 15008)
            assert tunnels
            stopped = caller.proxy_pid()
            os.kill(stopped, signal.SIGSTOP)
            try:
                with caller.entered():
                    kill = ["ss", "--kill", "--tcp", "dport", "=", "15008"]
                    subprocess.run(kill, check=True, stdout=subprocess.DEVNULL)
                assert not _ports_to(caller, 15008)
                for port in tunnels:  # it is brought to the uProxy, which accepts nothing now
                    assert _error(caller, (peer.address, 15008), mark, port, 1.0) == "TimeoutError"
            finally:
                os.kill(stopped, signal.SIGCONT)
            inside.eventually(lambda: _exchanges(caller, mesh.vip("nft" + version)))

    @both
    def test_end_of_a_killed_uproxy_is_not_held_back(self, mesh: Mesh, version: str) -> None:
        """The kernel goes on sending for nobody: held back, the peer would wait for its keepalive."""
        caller, peer = mesh.callers["nft" + version], mesh.peers["nft" + version]
        ends: queue.Queue[str] = queue.Queue()

        def read_to_the_end(connection: socket.socket) -> None:
            ends.put(connection.recv(1).decode())
            try:
                inside.read_all(connection)
                ends.put("FIN")
            except OSError as error:
                ends.put(type(error).__name__)

        stopped = peer.proxy_pid()
        with inside.serving(peer, PORT, read_to_the_end):
            with inside.dial(caller, mesh.vip("nft" + version)) as made:
                made.sendall(b"x")
                assert ends.get(timeout=60) == "x"
                os.kill(stopped, signal.SIGSTOP)
                try:
                    made.settimeout(0.5)
                    with pytest.raises(TimeoutError):
                        made.sendall(bytes(16_000_000))
                    os.kill(caller.proxy_pid(), signal.SIGKILL)
                    inside.eventually(lambda: not _ports_to(caller, 15008))
                finally:
                    os.kill(stopped, signal.SIGCONT)
            assert ends.get(timeout=60) == "ConnectionResetError"
        with inside.serving(peer, PORT, inside.echo):
            inside.eventually(lambda: _exchanges(caller, mesh.vip("nft" + version)))

    def test_uproxies_killed_at_random_moments_open_nothing(self, mesh: Mesh) -> None:
        seed = secrets.randbits(32)
        chance = random.Random(seed)
        mark = secrets.token_bytes(16)
        names = ("nft4", "nft6")
        pairs = [(mesh.callers[name], mesh.peers[name], mesh.vip(name)) for name in names]
        workloads = [workload for pair in pairs for workload in pair[:2]]
        with nothing_in_the_clear((mesh.a, mesh.b), mark):
            payload = mark + random.randbytes(500)
            with open_loop.running(pairs, payload, rate=25.0, held=3, most_s=40.0) as loads:
                open_loop.wait_for(loads, 5)
                for _ in range(8):
                    with suppress(LabError, ProcessLookupError):  # it may not be back yet
                        os.kill(chance.choice(workloads).proxy_pid(), signal.SIGKILL)
                    time.sleep(chance.uniform(0.1, 1.2))
                open_loop.go_on(loads)
        open_loop.assert_refused_or_reset(loads, seed)

    def test_upgrades_under_load_refuse_and_cut_nothing(self, mesh: Mesh) -> None:
        """In explicit mode, too."""
        mark = secrets.token_bytes(16)
        peer = mesh.peers["nft4"]
        pairs = [
            (mesh.callers["nft4"], peer, mesh.vip("nft4")),
            (mesh.callers["none4"], peer, ("127.0.0.1", _FORWARDED)),
        ]
        workloads = [mesh.callers["nft4"], mesh.callers["none4"], peer]
        with nothing_in_the_clear((mesh.a, mesh.b), mark):
            payload = mark + random.randbytes(500)
            with open_loop.running(pairs, payload, rate=25.0, held=3, most_s=60.0) as loads:
                open_loop.wait_for(loads, 5)
                for workload in workloads:
                    former = uproxies(workload)
                    assert upgrade(workload) not in former
                open_loop.go_on(loads)
        for load in loads:
            assert load.outcomes.keys() == {"ok"}, load.outcomes
            assert not load.broken
        for workload in workloads:
            inside.eventually(lambda workload=workload: len(uproxies(workload)) == 1, 30)

    def test_killed_launcher_leaves_it_closed_and_the_next_one_cleans_up(self, mesh: Mesh) -> None:
        job, mark = _job(mesh), secrets.token_bytes(16)
        with inside.serving(mesh.peers["nft4"], PORT, inside.echo), nothing_in_the_clear((mesh.a, mesh.b), mark):
            with _started(job, NFT, ["sh", "-c", "setsid sleep 60 & echo up; sleep 60"]) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == b"up\n"
                assert _exchanges(job, mesh.vip("nft4"))
                process.kill()
                process.wait()
                inside.eventually(lambda: not (job.box.proxy_cgroup / "cgroup.procs").read_text())
            for target in (mesh.vip("nft4"), (mesh.peers["nft4"].address, PORT)) * 3:
                assert _error(job, target, mark) == "ECONNREFUSED"
        assert _run(job, NFT, ["sh", "-c", "exit 5"])[0] == 5


class TestTheLauncher:
    def test_needs_no_node_agent_and_leaves_nothing(self, mesh: Mesh) -> None:
        dial = _dialling(mesh.vip("nft4"))
        with inside.serving(mesh.peers["nft4"], PORT, inside.echo):
            status, output, errors = _run(mesh_job := _job(mesh), [*NFT, "--node-socket", "/nowhere"], dial)
        assert (status, output) == (0, "b'x'\n"), errors
        known = [one["workload"] for one in mesh.a.node().status()["workloads"]]
        assert mesh_job.name not in known
        assert "nft4" not in "".join(known)

    def test_workload_of_both_families_dials_both(self, mesh: Mesh) -> None:
        options = [*NFT, "--address", "fd96:0:0:1::100"]
        for name in ("nft4", "nft6"):
            with inside.serving(mesh.peers[name], PORT, inside.echo):
                status, output, errors = _run(_job(mesh), options, _dialling(mesh.vip(name)))
            assert (status, output) == (0, "b'x'\n"), errors

    def test_uproxy_that_a_fork_server_starts_is_known_by_its_uid_too(self, mesh: Mesh) -> None:
        path = mesh.lab.directory / "fork.sock"
        server = mesh.a.spawn([sys.executable, "-I", "-m", "uproxy", "fork-server", "--socket", str(path)])
        try:
            inside.eventually(path.is_socket)
            with inside.serving(mesh.peers["nft4"], PORT, inside.echo):
                dial = _dialling(mesh.vip("nft4"))
                status, output, errors = _run(_job(mesh), [*NFT, "--fork-server", str(path)], dial)
        finally:
            server.terminate()
        assert (status, output) == (0, "b'x'\n"), errors

    def test_command_gets_no_privileges_by_a_set_uid_program(self, mesh: Mesh) -> None:
        """Only where it could take the rules away with them."""
        said = {}
        for capture, options in (("nft", NFT), ("ebpf", ())):
            said[capture] = _run(_job(mesh), options, ["grep", "NoNewPrivs", "/proc/self/status"])[1].split()
        assert said == {"nft": ["NoNewPrivs:", "1"], "ebpf": ["NoNewPrivs:", "0"]}

    def test_root_of_a_user_namespace_can_take_neither_rules_nor_uid(self, mesh: Mesh) -> None:
        script = """
            unshare --map-root-user id -u
            unshare --map-root-user nft flush ruleset && echo flushed
            unshare --map-root-user setpriv --reuid 61184 true && echo taken
            exec python3 -c "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('240.240.0.30', 9))"
        """
        _, output, errors = _run(_job(mesh), NFT, ["sh", "-c", script])
        assert output == "0\n"
        assert "PermissionError" in errors

    def test_root_is_refused(self, mesh: Mesh) -> None:
        status, _, errors = _run(_job(mesh), [*NFT, "--user", "root"], ["true"])
        assert status == 125
        assert "needs a --user other than root" in errors

    def test_address_outside_of_the_ranges_is_refused(self, mesh: Mesh) -> None:
        options = ["--capture", "nft", "--mesh-cidr", "240.240.0.0/16"]
        status, _, errors = _run(_job(mesh), options, ["true"])
        assert status == 125
        assert "address 10.96.1.100 is outside the mesh's ranges (240.240.0.0/16)" in errors

    def test_auto_is_the_node_agents_where_one_runs(self, mesh: Mesh) -> None:
        listed = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
        job = _job(mesh)
        with _started(job, ["--capture", "auto", "--mesh-cidr", *MESH_RANGES], listed) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            assert job.name in [one["workload"] for one in mesh.a.node().status()["workloads"]]

    def test_auto_does_not_make_do_with_less_while_the_agent_is_down(self, mesh: Mesh) -> None:
        options = ["--capture", "auto", "--mesh-cidr", *MESH_RANGES, "--node-socket", "/nowhere"]
        status, _, errors = _run(_job(mesh), options, ["true"])
        assert status == 125
        assert "no node agent at /nowhere: start `uproxy node`" in errors

    def test_auto_is_nftables_where_no_program_loads(self, mesh: Mesh) -> None:
        options = ["--capture", "auto", "--mesh-cidr", *MESH_RANGES, "--node-socket", "/nowhere"]
        hidden = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {loader.OBJECTS} && exec "$@"', "sh"]
        with inside.serving(mesh.peers["nft4"], PORT, inside.echo):
            status, output, errors = _run(_job(mesh), options, _dialling(mesh.vip("nft4")), hidden)
        assert (status, output) == (0, "b'x'\n"), errors
        assert "job: capture: nft: no eBPF: programs: " in errors


def _dialling(address: tuple[str, int]) -> list[str]:
    script = "import socket; s = socket.create_connection(%r, 10); s.sendall(b'x'); print(s.recv(1))"
    return ["python3", "-c", script % (address,)]


def _job(mesh: Mesh) -> Workload:
    """A workload of the configuration that the lab does not start."""
    made = Workload(mesh.a, "job", App(lambda *_: [], "sh"), "10.96.1.100", WorkloadOptions(namespace="load"))
    if not (made.identity_dir / "chain.pem").exists():
        mesh.lab.issue(made.identity, made.identity_dir)
    return made


@contextmanager
def _started(
    job: Workload, options: Sequence[str], command: Sequence[str], before: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    argv = [*before, *job.arguments()[:-1], "--drain-timeout-s", "1", *options, "--", *command]
    with job.host.spawn(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.terminate()


def _run(
    job: Workload, options: Sequence[str], command: Sequence[str], before: Sequence[str] = ()
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error; and nothing of it is left."""
    with _started(job, options, command, before) as process:
        output, errors = process.communicate(timeout=100)
    left = [entry for entry in remains.left_of(job.netns) if Path(entry).name.startswith(job.netns)]
    assert not left
    assert not job.box.cgroup.exists()
    with job.host.entered():
        links = subprocess.run(["ip", "-o", "link", "show"], capture_output=True, text=True, check=True).stdout
    assert job.box.host_link not in links
    return process.returncode, output.decode(), errors.decode()
