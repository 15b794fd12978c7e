"""`waypoint run --workers 3`: real processes that share a port, and what is said of them from outside."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from control.api.address import HBONE_PORT, parse_address
from control.api.gateway import Gateway, Instance, Traffic
from control.api.status import ProxyStatus
from control.api.workload import Workload
from control.server.bindings import Phase
from tests.support.certificates import WEB, identity_dir
from tests.support.hand_tunnel import HandTunnel
from tests.support.http_app import telling
from tests.support.pair import published
from tests.support.site import Site, eventually, get
from tests.support.waypoint_site import WP, asked, bound_site, joining, members, resources, waypoint
from uproxy.channel import Channel, Message
from uproxy.listener import opened
from uproxy.tls import Credentials, client_context
from uproxy.workers import APPLY_TIMEOUT_S

NETWORK = "127.0.97"
ADDRESS = f"{NETWORK}.3"
WORKERS = 3


def pids() -> list[int]:
    dump = json.loads(get(ADDRESS, 15000, "/config_dump")[1])
    return [worker["pid"] for worker in dump["workers"]]


def is_ready() -> bool:
    return get(ADDRESS, 15021, "/healthz/ready")[0] == 200


def metric(name: str) -> float:
    """The sum of all its samples."""
    text = get(ADDRESS, 15020, "/metrics")[1]
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def connected(site: Site, count: int) -> list[ssl.SSLSocket]:
    """Tunnels from web, without a stream in them."""
    context = client_context(Credentials.load(site.path / "web"))
    made = []
    for _ in range(count):
        sock = socket.create_connection((ADDRESS, 15008), timeout=30)
        made.append(context.wrap_socket(sock))
    return made


def has_ended(tunnel: ssl.SSLSocket) -> bool:
    """Whether the other end is gone; what it has said before is passed over."""
    tunnel.settimeout(0.01)
    try:
        while tunnel.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def none_can_start(site: Site) -> Iterator[None]:
    """No new worker finds a certificate; those that run go on with theirs."""
    chain, away = site.path / "wp" / "chain.pem", site.path / "wp" / "away.pem"
    chain.rename(away)
    try:
        yield
    finally:
        away.rename(chain)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return bound_site(tmp_path, NETWORK)


def test_requests_are_seen_by_who_watches_the_first_process(site: Site) -> None:
    def live() -> list[dict[str, object]]:
        found: list[dict[str, object]] = json.loads(get(ADDRESS, 15000, "/connections")[1])["connections"]
        return found

    with ExitStack() as stack:
        stack.enter_context(site.running("db"))
        stack.enter_context(site.running("web"))
        options = ("--config", str(site.mesh), "--workload", "shop/wp-1", f"--workers={WORKERS}")
        stack.enter_context(waypoint(site, *options))
        watching = http.client.HTTPConnection(ADDRESS, 15000, timeout=30)
        stack.callback(watching.close)
        watching.request("GET", "/tap")
        tap = stack.enter_context(watching.getresponse())
        assert live() == []
        with socket.create_server(site.application), socket.create_connection(site.forward, timeout=30) as app:
            app.sendall(b"GET /slow HTTP/1.1\r\nhost: db.shop\r\n\r\n")
            eventually(live)
            (request,) = live()
            assert (request["message"], request["method"], request["path"]) == ("request", "GET", "/slow")
            assert request["source_principal"] == str(WEB)
        eventually(lambda: not live())
        stack.enter_context(telling(site.application))
        seen = json.loads(tap.readline())
        assert (seen["message"], seen["path"]) == ("request complete", "/slow")
        for method in ("GET", "DELETE"):
            asked(method, site)
            seen = json.loads(tap.readline())
            assert (seen["method"], seen["response_code"]) == (method, {"GET": 200, "DELETE": 403}[method])


def test_connections_are_spread_a_dead_worker_is_replaced_and_all_drain(site: Site) -> None:
    with ExitStack() as stack:
        stack.enter_context(telling(site.application))
        stack.enter_context(site.running("db"))
        stack.enter_context(site.running("web"))
        options = ("--config", str(site.mesh), "--workload", "shop/wp-1", f"--workers={WORKERS}")
        process = stack.enter_context(waypoint(site, *options))
        first = pids()
        assert len(set(first)) == WORKERS
        assert is_ready()
        assert [asked(method, site).status for method in ("GET", "DELETE", "GET")] == [200, 403, 200]
        assert metric("istio_requests_total") == 3
        assert metric("istio_build") == 1
        eventually(lambda: site.log("wp").count("request complete") == 3)

        for _ in range(30):
            with socket.create_connection((ADDRESS, 15008), timeout=30) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        eventually(lambda: metric("istio_tcp_connections_failed_total") >= 30)
        failed = metric("istio_tcp_connections_failed_total")

        tunnels = connected(site, 60)
        eventually(lambda: metric("uproxy_tunnels_inbound") >= 60)
        with none_can_start(site):
            os.kill(first[0], signal.SIGKILL)
            eventually(lambda: get(ADDRESS, 15021, "/healthz/ready") == (503, "not ready, pending:\nworker 1\n"))
            assert "worker 1 ended with signal 9" in site.log("wp")
            assert asked("DELETE", site).status in (403, 503)  # 503: web's tunnel went to it
            for newcomer in connected(site, 30):  # also those for which it was chosen
                newcomer.close()
        ended = [tunnel for tunnel in tunnels if has_ended(tunnel)]
        assert 3 <= len(ended) <= 45  # 20 are its share
        for tunnel in tunnels:
            tunnel.close()

        eventually(lambda: is_ready() and None not in pids())
        again = pids()
        assert again[0] != first[0]
        assert again[1:] == first[1:]
        assert metric("uproxy_waypoint_worker_restarts_total") >= 1
        assert metric("istio_tcp_connections_failed_total") >= failed  # also what the dead one had counted
        # All of the configuration is in force in the new one, wherever the next tunnel lands.
        eventually(lambda: asked("GET", site).status == 200)
        assert asked("DELETE", site).status == 403

        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, site.log("wp")
        assert not any(is_alive(pid) for pid in again)
        assert "Traceback" not in site.log("wp")
        assert site.log("wp").count(": drained") == WORKERS


def test_a_renewed_certificate_reaches_every_worker(site: Site) -> None:
    def shown() -> set[bytes]:
        """The certificates of so many tunnels that no worker is missed, but once in thousands of times."""
        tunnels = connected(site, 30)
        found = {tunnel.getpeercert(binary_form=True) or b"" for tunnel in tunnels}
        for tunnel in tunnels:
            tunnel.close()
        return found

    with waypoint(site, "--config", str(site.mesh), "--workload", "shop/wp-1", f"--workers={WORKERS}"):
        workers = pids()
        (old,) = shown()
        identity_dir(site.authority, site.path / "wp", WP)
        eventually(lambda: old not in shown())
        assert len(shown()) == 1
        assert pids() == workers, "nobody was started again for it"


def test_a_worker_that_hangs_is_killed_and_replaced(site: Site) -> None:
    with waypoint(site, "--config", str(site.mesh), "--workload", "shop/wp-1", "--workers=2"):
        hung, other = pids()
        os.kill(hung, signal.SIGSTOP)
        site.mesh.write_text(site.mesh.read_text().replace("[DELETE]", "[DELETE, PUT]"))
        eventually(lambda: hung not in pids(), APPLY_TIMEOUT_S + 10)
        assert f"worker 1 has answered nothing for {APPLY_TIMEOUT_S:g} s, and is killed" in site.log("wp")
        assert not is_alive(hung)
        eventually(lambda: is_ready() and None not in pids())
        assert pids()[1] == other
        assert metric("uproxy_waypoint_worker_restarts_total") == 1


def test_what_a_worker_does_not_know_it_asks_the_first_process(site: Site) -> None:
    """Which this test is, to a worker that is as real as the caller who dials addresses that nobody has told it of."""
    told: list[Message] = []

    async def first_process() -> None:
        ours.setblocking(False)
        channel = Channel(told.append, lambda: told.append(["lost"]))
        await channel.attach(ours)
        channel.send("start", {**settings, "number": 1, "level": "INFO"})
        channel.send("apply", 1, [published(record, 1) for record in (gateway, process_of_it)])
        channel.send("listen", [0])
        await heard("listening")
        async with asyncio.TaskGroup() as group:
            first = group.create_task(asyncio.to_thread(asks, "10.9.9.1:80"))
            assert await heard("destination") == ["destination", 1, "10.9.9.1"]
            assert not first.done()
            channel.send("answer", 1, "no-config", "nobody told")
            assert await first == "503"
            second = group.create_task(asyncio.to_thread(asks, "10.9.9.2:80"))
            assert await heard("destination") == ["destination", 2, "10.9.9.2"]
            channel.send("answer", 2, "", "")
            assert await second == "400", "it is nothing that is served here"
        channel.close()

    async def heard(word: str) -> Message:
        """The next message of this kind."""
        for _ in range(1000):
            for message in told:
                if message[0] == word:
                    told.remove(message)
                    return message
            await asyncio.sleep(0.01)
        raise AssertionError(f"no {word!r} among {told}")

    def asks(authority: str) -> str:
        with socket.create_connection((ADDRESS, 15008), timeout=30) as sock, pytest.raises(AssertionError) as refused:
            HandTunnel(sock, site.path / "web", authority)
        return str(refused.value).rpartition(" ")[2]

    settings: dict[str, object] = {
        "workload": "wp-1",
        "identity": str(WP),
        "gateway": "shop/wp",
        "addresses": [ADDRESS],
        "identity_dir": str(site.path / "wp"),
        "closed": "",
        "access_log": "off",
        "log_json": False,
        "otlp": (),
    }
    address = parse_address(ADDRESS)
    process_of_it = Workload("shop", "wp-1", "wp", WP, (address,), {}, {}, "", 1)
    gateway = Gateway("shop", "wp", Traffic.ALL, (Instance("shop/wp-1", address),), (), ("shop/db",))
    ours, theirs = socket.socketpair()
    with opened(ADDRESS, HBONE_PORT, shared=True) as listening, theirs:
        given = [theirs.fileno(), listening.fileno()]
        command = [sys.executable, "-m", "waypoint.worker", str(given[0]), str(os.getpid()), str(given[1])]
        process = subprocess.Popen(command, pass_fds=given)
    try:
        asyncio.run(first_process())
    finally:
        process.kill()
        process.wait()


def test_workers_end_with_the_first_process(site: Site) -> None:
    with waypoint(site, "--config", str(site.mesh), "--workload", "shop/wp-1", "--workers=2") as process:
        workers = pids()
        process.kill()
        process.wait()
        eventually(lambda: not any(is_alive(pid) for pid in workers))


def test_only_what_every_worker_has_applied_is_reported(tmp_path: Path) -> None:
    with ExitStack() as stack:
        site = stack.enter_context(members(tmp_path, NETWORK))
        control = site.control
        stack.enter_context(waypoint(site, *joining(site), f"--workers={WORKERS}", "--access-log=off"))

        def reported() -> ProxyStatus:
            status = control.status(WP, "wp-1")
            assert status is not None
            return status

        def is_current() -> bool:
            return reported().roots["shop"][:2] == control.plane.core.roots()["shop"][:2]

        eventually(lambda: [one.state.phase for one in control.plane.core.progress()] == [Phase.ENFORCED])
        eventually(lambda: reported().whole and is_current())
        assert asked("GET", site).status == 200

        slow = pids()[1]
        os.kill(slow, signal.SIGSTOP)
        try:
            control.apply(resources(NETWORK).replace("[DELETE]", "[DELETE, PUT]"))
            time.sleep(1.5)
            assert not is_current()
        finally:
            os.kill(slow, signal.SIGCONT)
        eventually(is_current)
        assert asked("PUT", site).status == 403

        with none_can_start(site):
            os.kill(slow, signal.SIGKILL)
            eventually(lambda: not reported().whole and "worker 2" in reported().waiting)
        eventually(lambda: reported().whole and is_current() and is_ready())
        assert "Traceback" not in site.log("wp")
