"""Name queries of captured workloads, as resolvers ask them: names of the mesh and of others, and a dead proxy."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import dns.message
import dns.rcode
import dns.rrset
import pytest

from benchmarks.lab.apps import commands
from benchmarks.lab.topology import Host, Lab, Workload
from tests.support import inside
from tests.support.upgrading import running as uproxies
from tests.support.upgrading import upgrade
from uproxy.dns import FORWARD_TIMEOUT_S
from uproxy.entrance import Entrance

_PORT = 9000
_PEER, _PEER6, _LATE = "240.240.0.30", "fd96:0:0:ffff::30", "240.240.0.32"
_PUBLIC, _PUBLIC6 = "192.0.2.1", "2001:db8::1"
"""What the nameserver says of every name that there is: of the mesh's, too."""

_RESOURCES = f"""\
apiVersion: v1
kind: Service
metadata: {{name: peer, namespace: load}}
spec: {{clusterIP: {_PEER}, selector: {{app: peer}}, ports: [{{name: tcp, port: {_PORT}, targetPort: tcp}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: peer6, namespace: load}}
spec:
  clusterIP: "{_PEER6}"
  ipFamilies: [IPv6]
  selector: {{app: peer6}}
  ports: [{{name: tcp, port: {_PORT}, targetPort: tcp}}]
---
apiVersion: v1
kind: Service
metadata: {{name: pods, namespace: load}}
spec: {{clusterIP: None, selector: {{app: peer}}, ports: [{{name: tcp, port: {_PORT}, targetPort: tcp}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: unasked, namespace: load}}
spec: {{clusterIP: 240.240.0.31, selector: {{app: peer}}, ports: [{{name: tcp, port: {_PORT}, targetPort: tcp}}]}}
"""
_LATER = f"""\
---
apiVersion: v1
kind: Service
metadata: {{name: late, namespace: shop}}
spec: {{clusterIP: {_LATE}, selector: {{app: nobody}}, ports: [{{port: 80}}]}}
"""

# As an application does it: look a name up, dial what comes, say something.
_DIAL = """\
import socket, sys
for name in sys.argv[2:]:
    try:
        found = sorted({entry[4][0] for entry in socket.getaddrinfo(name, int(sys.argv[1]), type=socket.SOCK_STREAM)})
        with socket.create_connection((name, int(sys.argv[1])), 10) as made:
            made.sendall(b"x")
            print(name, *found, made.recv(1).decode())
    except OSError as error:
        print(name, error.errno)
"""
_LOOK_UP = """\
import socket, sys
for name in sys.argv[1:]:
    try:
        print(name, *sorted({entry[4][0] for entry in socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)}))
    except OSError as error:
        print(name, error.errno)
"""


@dataclass
class Nameserver:
    """Outside of the mesh, and knows every name."""

    addresses: tuple[str, ...]
    heard: list[str] = field(default_factory=list)
    free: threading.Event = field(default_factory=threading.Event)
    """Names that begin with "held" are answered when this is set."""

    @contextmanager
    def running(self, host: Host) -> Iterator[None]:
        sockets = []
        for address in self.addresses:
            with host.entered():
                made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
            made.bind((address, 53))
            made.settimeout(0.2)
            sockets.append(made)
        ended = threading.Event()
        threads = [threading.Thread(target=self._serve, args=(made, ended)) for made in sockets]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread, made in zip(threads, sockets, strict=True):
                thread.join()
                made.close()

    def _serve(self, made: socket.socket, ended: threading.Event) -> None:
        while not ended.is_set():
            try:
                query, sender = made.recvfrom(4096)
            except TimeoutError:
                continue
            asked = dns.message.from_wire(query)
            (question,) = asked.question
            self.heard.append(question.name.to_text(omit_final_dot=True))
            if self.heard[-1].startswith("held"):
                self.free.wait(60)
            answer = dns.message.make_response(asked)
            known = {"A": _PUBLIC, "AAAA": _PUBLIC6}
            kind = dns.rdatatype.to_text(question.rdtype)
            if kind in known:
                answer.answer.append(dns.rrset.from_text(question.name, 60, "IN", kind, known[kind]))
            made.sendto(answer.to_wire(), sender)


@dataclass(frozen=True)
class Site:
    lab: Lab
    nameserver: Nameserver
    caller: Workload
    caller6: Workload | None
    """None with a control plane, which has an IPv4 address only."""
    plain: Workload

    def run(self, workload: Workload, resolv_conf: str, script: str, *arguments: str) -> list[str]:
        """What a Python script prints as the application of a workload, which has this resolv.conf."""
        file = self.lab.directory / "resolv.conf"
        file.write_text(resolv_conf)
        mount = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
        command = [*["unshare", "-m", "sh", "-c", mount, str(file)], sys.executable, "-I", "-c", script, *arguments]
        netns = os.open(workload.box.netns_path, os.O_RDONLY)
        try:
            ended = subprocess.run(
                command,
                preexec_fn=Entrance(workload.box.app_cgroup, netns),
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        finally:
            os.close(netns)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.splitlines()

    def resolv_conf(self, *more: str) -> str:
        return "\n".join([f"nameserver {self.nameserver.addresses[0]}", *more, ""])

    def ask(
        self, name: str, kind: str = "A", workload: Workload | None = None, timeout_s: float = 5.0
    ) -> dns.message.Message:
        """One query on a connected socket, as glibc and dig have it. Raises OSError."""
        asking = workload or self.caller
        nameserver = self.nameserver.addresses[1 if ":" in asking.address else 0]
        (made,) = asking.sockets(1, inside.family_of((nameserver, 53)), socket.SOCK_DGRAM)
        with made:
            made.settimeout(timeout_s)
            made.connect((nameserver, 53))
            query = dns.message.make_query(name, kind, use_edns=0)
            made.send(query.to_wire())
            answer = dns.message.from_wire(made.recv(65535))
            assert query.is_response(answer)
            return answer

    def addresses(self, name: str, kind: str = "A", workload: Workload | None = None) -> list[str]:
        answer = self.ask(name, kind, workload)
        assert answer.rcode() == dns.rcode.NOERROR
        return sorted(record.address for found in answer.answer for record in found)


@pytest.fixture(scope="module", params=["files", "control"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with Lab(control=request.param == "control") as lab:
        a, b = lab.host("a"), lab.host("b")
        caller = a.workload("caller", commands.idle(), namespace="web", dns=True)
        plain = a.workload("plain", commands.idle(), namespace="web")
        peers = [b.workload("peer", commands.idle(), namespace="load", ports={"tcp": _PORT})]
        caller6 = None
        if not lab.control:
            caller6 = a.workload("caller6", commands.idle(), namespace="web", dns=True, ipv6=True)
            peers.append(b.workload("peer6", commands.idle(), namespace="load", ports={"tcp": _PORT}, ipv6=True))
        lab.configure(_RESOURCES)
        nameserver = Nameserver((b.underlay_address, f"fd95::{b.index}"))
        lab.start()
        with ExitStack() as running:
            running.enter_context(nameserver.running(b))
            for peer in peers:
                running.enter_context(inside.serving(peer, _PORT, inside.echo))
            yield Site(lab, nameserver, caller, caller6, plain)


@pytest.fixture(autouse=True)
def fresh(site: Site) -> None:
    site.nameserver.heard.clear()


def test_a_name_is_looked_up_and_dialled_through_the_mesh(site: Site) -> None:
    names = ["peer.load.svc.cluster.local", "peer.load.svc", "peer.load", "PEER.Load."]
    told = site.run(site.caller, site.resolv_conf(), _DIAL, str(_PORT), *names)
    assert told == [f"{name} {_PEER} x" for name in names]
    told = site.run(site.caller, site.resolv_conf(), _DIAL, str(_PORT), "pods.load")
    assert told == [f"pods.load {site.lab.hosts[1].workloads[0].address} x"]
    assert site.nameserver.heard == [], "nobody else was asked"
    entry = site.caller.await_access(lambda entry: entry.get("dst.service") == "peer.load.svc.cluster.local")
    assert entry["direction"] == "outbound"


@pytest.mark.parametrize("site", ["files"], indirect=True)
def test_over_ipv6_too(site: Site) -> None:
    assert site.caller6 is not None
    conf = f"nameserver {site.nameserver.addresses[1]}\n"
    told = site.run(site.caller6, conf, _DIAL, str(_PORT), "peer6.load", "peer6.load.svc.cluster.local")
    assert told == [f"{name} {_PEER6} x" for name in ("peer6.load", "peer6.load.svc.cluster.local")]
    assert site.nameserver.heard == []


@pytest.mark.parametrize("site", ["files"], indirect=True)
def test_no_query_is_lost_while_the_uproxy_is_upgraded(site: Site) -> None:
    """Neither those that come meanwhile nor one that the old one waits for."""
    ended = threading.Event()
    answers: dict[str, list[object]] = {"peer.load": [], "held.example.com": []}

    def ask(name: str) -> None:
        try:
            answers[name].append(site.addresses(name))
        except OSError as error:
            answers[name].append(error)

    def go_on_asking() -> None:
        while not ended.is_set():
            ask("peer.load")

    asking = [threading.Thread(target=go_on_asking), threading.Thread(target=ask, args=("held.example.com",))]
    for thread in asking:
        thread.start()
    try:
        inside.eventually(lambda: "held.example.com" in site.nameserver.heard)
        began = time.monotonic()
        upgrade(site.caller)
        took_s = time.monotonic() - began
    finally:
        site.nameserver.free.set()
        ended.set()
        for thread in asking:
            thread.join()
    inside.eventually(lambda: len(uproxies(site.caller)) == 1)
    if took_s < 0.8 * FORWARD_TIMEOUT_S:  # else it was given up
        assert answers["held.example.com"] == [[_PUBLIC]]
    assert answers["peer.load"]
    assert all(one == [_PEER] for one in answers["peer.load"]), answers


def test_search_domains_find_short_names(site: Site) -> None:
    """As Kubernetes sets them. A name that the mesh's zone does not have goes on to the next domain."""
    search = site.resolv_conf("search load.svc.cluster.local svc.cluster.local example.org", "options ndots:5")
    told = site.run(site.caller, search, _LOOK_UP, "peer", "peer.load", "peer6", "www.example.com")
    assert told == [
        f"peer {_PEER}",
        f"peer.load {_PEER}",
        f"peer6 {_PEER6}",
        f"www.example.com {_PUBLIC} {_PUBLIC6}",
    ]
    assert set(site.nameserver.heard) == {"www.example.com.example.org"}, "this one knows every name"


def test_what_is_not_there_is_told_rightly(site: Site) -> None:
    """No data where there is such a name, no such name where there is none: resolvers treat these differently."""
    for name in ("peer.load.svc.cluster.local", "peer.load"):
        nothing = site.ask(name, "AAAA")
        assert (nothing.rcode(), nothing.answer) == (dns.rcode.NOERROR, [])
        assert nothing.authority
    assert site.ask("load.svc.cluster.local").rcode() == dns.rcode.NOERROR
    for name in ("nobody.load.svc.cluster.local", "peer.nowhere.svc", "nowhere.svc.cluster.local", "a.peer.load.svc"):
        began = time.monotonic()
        assert site.ask(name).rcode() == dns.rcode.NXDOMAIN
        assert time.monotonic() - began < 4, "nobody waits for what is known not to be there"
    assert site.run(site.caller, site.resolv_conf(), _LOOK_UP, "nobody.load.svc") == ["nobody.load.svc -2"]
    assert site.nameserver.heard == []


def test_other_names_are_asked_for_where_the_application_asked(site: Site) -> None:
    for name in ("www.example.com", "example.com", "nobody.load", "localhost.localdomain"):
        assert site.addresses(name) == [_PUBLIC]
        assert site.addresses(name, "AAAA", site.caller6 or site.caller) == [_PUBLIC6]
        assert site.nameserver.heard == [name, name]
        site.nameserver.heard.clear()
    assert inside.metric(site.caller, "uproxy_dns_forwarded_total") >= 4
    assert inside.metric(site.caller, "uproxy_dns_answered_total") > 0


def test_the_next_nameserver_is_asked_when_one_cannot_be_reached(site: Site) -> None:
    conf = (
        f"nameserver 127.0.0.53\nnameserver 192.0.2.250\nnameserver {site.nameserver.addresses[0]}\noptions timeout:2\n"
    )
    began = time.monotonic()
    told = site.run(site.caller, conf, _LOOK_UP, "www.example.com", "peer.load")
    assert told == [f"www.example.com {_PUBLIC} {_PUBLIC6}", f"peer.load {_PEER}"]
    assert time.monotonic() - began < 2, "each that cannot be reached says so at once"
    assert set(site.nameserver.heard) == {"www.example.com"}


def test_a_service_that_comes_and_goes_is_told_so(site: Site) -> None:
    assert site.ask("late.shop.svc").rcode() == dns.rcode.NXDOMAIN
    assert site.addresses("late.shop") == [_PUBLIC]
    site.lab.configure(_RESOURCES + _LATER)
    inside.eventually(lambda: site.ask("late.shop.svc").rcode() == dns.rcode.NOERROR)
    site.nameserver.heard.clear()
    assert site.addresses("late.shop") == site.addresses("late.shop.svc") == [_LATE]
    assert site.nameserver.heard == []
    site.lab.configure(_RESOURCES)
    inside.eventually(lambda: site.ask("late.shop.svc").rcode() == dns.rcode.NXDOMAIN)


def test_a_workload_that_does_not_ask_for_it_is_left_alone(site: Site) -> None:
    assert site.addresses("peer.load.svc.cluster.local", workload=site.plain) == [_PUBLIC]
    assert site.nameserver.heard == ["peer.load.svc.cluster.local"]


def test_a_uproxy_that_does_not_run_means_no_answer_and_no_query_outside(site: Site) -> None:
    pid = site.caller.proxy_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        for name in ("peer.load", "www.example.com"):
            with pytest.raises(TimeoutError):
                site.ask(name, timeout_s=0.7)
        assert site.nameserver.heard == []
    finally:
        os.kill(pid, signal.SIGCONT)
    os.kill(pid, signal.SIGKILL)
    inside.eventually(lambda: not Path(f"/proc/{pid}").exists())
    with pytest.raises(ConnectionRefusedError):
        site.ask("peer.load")
    assert set(site.nameserver.heard) <= {"www.example.com"}, "asked by the proxy that had been stopped"
    inside.eventually(lambda: _is_answered(site, "peer.load"))
    assert site.addresses("peer.load") == [_PEER]


@pytest.mark.parametrize("site", ["control"], indirect=True)
def test_without_control_plane_what_is_known_is_told_and_nothing_of_the_meshs_leaves(site: Site) -> None:
    """The last test of its lab: the control plane stays dead."""
    assert site.lab.control is not None
    assert site.addresses("peer.load") == [_PEER]
    kept = site.caller.identity_dir / "state"
    inside.eventually(lambda: kept.exists() and b"/svc/load/peer" in kept.read_bytes())
    site.lab.control.kill()
    site.nameserver.heard.clear()
    assert site.addresses("peer.load.svc") == [_PEER]
    assert site.addresses("example.com") == [_PUBLIC]
    assert site.ask("peer.nowhere.svc").rcode() == dns.rcode.NXDOMAIN
    assert site.ask("unheard-of.load.svc").rcode() == dns.rcode.NXDOMAIN, "the signed root says so"
    # Nobody can say more of a service that was never asked for.
    for name in ("unasked.load", "unasked.load.svc.cluster.local"):
        assert site.ask(name, timeout_s=6).rcode() == dns.rcode.SERVFAIL
    assert site.nameserver.heard == ["example.com"]
    # Nor does a uProxy that starts now know less.
    os.kill(site.caller.proxy_pid(), signal.SIGKILL)
    inside.eventually(lambda: _is_answered(site, "peer.load"))
    assert site.addresses("peer.load") == [_PEER]
    assert site.addresses("example.com") == [_PUBLIC]
    assert site.ask("unasked.load", timeout_s=6).rcode() == dns.rcode.SERVFAIL
    assert site.nameserver.heard == ["example.com"] * 2


def _is_answered(site: Site, name: str) -> bool:
    """Whether anything is said to a query; false while no uProxy runs, or none is ready."""
    try:
        return site.ask(name).rcode() == dns.rcode.NOERROR
    except OSError:
        return False
