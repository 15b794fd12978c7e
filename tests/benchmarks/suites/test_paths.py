"""The suite `paths`: every subject measured for real, at tiny sizes; and that its peers are what they are called."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import load
from benchmarks.harness.bench import Bench
from benchmarks.harness.results import Results
from benchmarks.harness.targets import TARGETS
from benchmarks.lab import cores, sources
from benchmarks.lab.sources import TRUST_DOMAIN, LabError
from benchmarks.lab.topology import Lab, entered
from benchmarks.peers.pairs import APP_PORT, HBONE_PORT, TLS_PORT, Peer, Started, peers
from benchmarks.peers.place import Place
from benchmarks.peers.standing import TOGETHER, stand_peer
from benchmarks.suites import paths
from benchmarks.suites.paths import Paths, Plan
from control.api.identity import SpiffeId
from control.server.ca import Authority

PAIRS = ("envoy-hbone", "envoy-tls", "haproxy-tls")
TINY = Plan(
    sizes={2: (64,)},
    streams=(1,),
    rates=(200,),
    delays_ms=(1.0,),
    delayed=1,
    idle=20,
    slow=1,
    http=(2,),
    rounds=1,
    seconds=0.2,
)


def named(name: str) -> Peer:
    return next(one for one in peers({}) if one.subject.name == name)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return load.build(tmp_path_factory.mktemp("load"))


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


def test_what_a_quick_run_measures_decides_on_every_target() -> None:
    assert (
        {target.measure for target in TARGETS if not target.elsewhere} <= measured(paths.QUICK) <= measured(paths.FULL)
    )


def measured(plan: Plan) -> set[str]:
    probes = [*paths.probes(plan, {}), *paths.through_waypoints(plan)]
    return {probe.measure.name for probe in probes}


def test_a_ztunnel_that_cannot_be_run_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="give the path of a ztunnel binary"):
        peers({"ztunnel": tmp_path / "nothing"})


def test_a_process_is_pinned_with_its_threads_and_children() -> None:
    code = "import subprocess, threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    code += "child = subprocess.Popen(['sleep', '60'])\nprint('ready', flush=True)\nchild.wait()"
    every = os.sched_getaffinity(0)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        try:
            cores.pin([process.pid], cores.LAST)
            assert not cores.strays([process.pid], cores.LAST)
            assert all(os.sched_getaffinity(pid) == {cores.LAST} for pid in (process.pid, *children))
            if len(every) > 1:
                os.sched_setaffinity(children[0], every)
                assert cores.strays([process.pid], cores.LAST) == children
        finally:
            for pid in (*children, process.pid):
                os.kill(pid, 9)


def test_what_keeps_cores_awake_ends_with_who_started_it() -> None:
    code = "import time\nfrom benchmarks.lab import cores\nwith cores.awake(cores.FIRST):\n    time.sleep(0.3)\n"
    code += "    print('ready', flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (spinning,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{spinning}/exe").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{spinning}/exe").exists()


@pytest.mark.root
@pytest.mark.mesh
@pytest.mark.timeout(300)
def test_every_subject_is_measured(tmp_path: Path) -> None:
    bench = Bench(Results("now", quick=True), tmp_path, quick=True)
    Paths(TINY).run(bench)
    results = bench.results
    assert [one.name for one in results.subjects] == ["tcp", "uproxy", *PAIRS, "waypoint", "envoy-waypoint"]
    names = [measure.name for measure in results.measures]
    assert names == [
        *("paths/idle", "paths/rr/2/64", "paths/open/200", "paths/bulk/1", "paths/connect"),
        *("paths/beside-bulk", "paths/http/2", "paths/delay/1/rr/1/64", "paths/slow-readers"),
    ]
    missing = {(one.measure, one.subject): one.refused for one in results.series if not one.rounds}
    # A TLS handshake of each connection may take longer than this short a round, on a machine with other work.
    slow = {key for key, reason in missing.items() if key[0] == "paths/connect" and "no request was answered" in reason}
    assert missing.keys() == slow, missing
    checked = {check.name: check for check in results.checks}
    assert checked["TCP cubic"].passed, checked
    assert checked["a link delayed by 1 ms"].details["added_us"] > 1900
    assert checked["a link delayed by 1 ms"].details["lost"] == 0
    for subject in ("uproxy", *PAIRS):
        taken = results.find("paths/rr/2/64", subject)
        assert taken is not None
        details = taken.rounds[0].details
        assert details["cpu_us/client proxy"] > 1
        assert details["cpu_us/server proxy"] > 1
        assert details["pss_mb"] > 5


@pytest.mark.root
@pytest.mark.mesh
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_carries_bytes_between_processes_that_prove_who_they_are(name: str, lab: Lab, program: Path) -> None:
    standing = stand_peer(named(name), lab.host("a"), lab.host("b"), program)
    assert standing.run(load.closed(2, 1000), 0.1, TOGETHER).operations > 1
    other = Authority.create(lab.directory / "other", TRUST_DOMAIN)
    port = HBONE_PORT if name == "envoy-hbone" else TLS_PORT
    address = (standing.server.addresses[0], port)
    place = lab.directory / "identities" / f"peer-{name}-client"
    stranger = lab.directory / "identities" / "stranger"
    sources.issue(other, SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/ns/default/sa/web"), stranger)
    with entered(standing.client.netns_path):
        assert handshake(address, place, trusted=place)
        assert not handshake(address, None, trusted=place)
        assert not handshake(address, stranger, trusted=place)


def handshake(address: tuple[str, int], identity: Path | None, *, trusted: Path) -> bool:
    """Whether the server takes this client. In TLS 1.3 it says so only after the client is through."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(trusted / "bundle.pem")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if identity is not None:
        context.load_cert_chain(identity / "chain.pem", identity / "key.pem")
    if address[1] == HBONE_PORT:
        context.set_alpn_protocols(["h2"])
    with socket.create_connection(address, 5) as plain:
        try:
            with context.wrap_socket(plain) as secure:
                secure.settimeout(0.5)
                return bool(secure.recv(1))
        except TimeoutError:
            return True  # taken, and nothing to say yet
        except (ssl.SSLError, ConnectionError):
            return False


@pytest.mark.root
@pytest.mark.mesh
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_whose_client_is_of_another_ca_carries_nothing(name: str, lab: Lab, program: Path) -> None:
    peer, other = named(name), Authority.create(lab.directory / "other", TRUST_DOMAIN)

    def start(client: Place, server: Place) -> Started:
        sources.issue(other, client.identity, client.identity_dir)
        return peer.start(client, server)

    standing = stand_peer(replace(peer, start=start), lab.host("a"), lab.host("b"), program)
    with entered(standing.client.netns_path), socket.create_connection(standing.entry, 5) as end:
        end.settimeout(10)
        end.send(b"x")
        with contextlib.suppress(ConnectionError):
            assert end.recv(1) == b""


# What ztunnel does with what it is told, but for the tunnel: it writes down what it found, and relays.
STAND_IN = """\
    import json, os, socket, struct, sys, threading

    if sys.argv[1:] == ["version"]:
        print("stand-in 1.0")
        sys.exit()
    told = {name: os.environ.get(name) for name in
            ("PROXY_MODE", "PROXY_WORKLOAD_INFO", "XDS_ADDRESS", "CA_ADDRESS", "FAKE_CA", "LOCAL_XDS_PATH")}
    config = open(told["LOCAL_XDS_PATH"]).read()
    with open(told["LOCAL_XDS_PATH"] + ".seen", "w") as seen:
        json.dump([sys.argv[1:], told, config], seen)

    def copy(source, target):
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def serve(listener):
        while True:
            near, _ = listener.accept()
            try:
                _, port, address = struct.unpack("!HH4s", near.getsockopt(socket.SOL_IP, 80, 16)[:8])
                # Not the port that is redirected: past it, as ztunnel's tunnel goes.
                far = socket.create_connection((socket.inet_ntoa(address), port + 100))
            except OSError:
                near.close()
                continue
            threading.Thread(target=copy, args=(near, far), daemon=True).start()
            threading.Thread(target=copy, args=(far, near), daemon=True).start()

    for port in (15008, 15001):
        last = threading.Thread(target=serve, args=(socket.create_server(("0.0.0.0", port)),))
        last.start()
    last.join()
"""


@pytest.mark.root
@pytest.mark.mesh
def test_a_ztunnel_is_told_who_it_is_by_files_and_gets_what_the_client_dials(
    lab: Lab, program: Path, tmp_path: Path
) -> None:
    script = tmp_path / "ztunnel"
    script.write_text(f"#!{sys.executable}\n{textwrap.dedent(STAND_IN)}")
    script.chmod(0o755)
    peer = peers({"ztunnel": script})[-1]
    assert peer.subject.version == "ztunnel stand-in 1.0"
    standing = stand_peer(peer, lab.host("a"), lab.host("b"), program)
    with entered(standing.server.netns_path):
        listener = socket.create_server((standing.server.addresses[0], APP_PORT + 100))
    with listener, entered(standing.client.netns_path), socket.create_connection(standing.entry, 5) as near:
        listener.settimeout(5)
        far, _ = listener.accept()
        with far:
            near.send(b"hello")
            assert far.recv(5) == b"hello"
    for name, side in (("web", standing.client), ("db", standing.server)):
        seen = lab.directory / "peers" / side.workload / "workloads.yaml.seen"
        argv, told, config = json.loads(seen.read_text())
        assert argv == ["proxy", "ztunnel"]
        assert told["PROXY_MODE"] == "dedicated"
        assert told["PROXY_WORKLOAD_INFO"] == f"default/{name}/{name}"
        assert (told["XDS_ADDRESS"], told["CA_ADDRESS"], told["FAKE_CA"]) == ("", "", "true")
        assert all(address in config for address in (standing.client.addresses[0], standing.server.addresses[0]))
