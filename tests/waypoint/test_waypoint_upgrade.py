"""A new waypoint takes over from the one that runs: real processes, under load of every kind, with any workers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgpack
import pytest

from control.server.bindings import Phase
from tests.support.http2_peer import speaking
from tests.support.http_app import telling
from tests.support.request_load import HTTP2, RequestLoad
from tests.support.site import Site, eventually, get
from tests.support.waypoint_site import WP, asked, bound_site, joining, members, resources, waypoint
from uproxy import handover
from waypoint.successor import Successor

NETWORK, OTHER = "127.0.65", "127.0.66"
GRPC_PORT, GRPC_FORWARD = 6381, 9081


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return bound_site(tmp_path, NETWORK)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """All but the waypoint."""
    site = bound_site(tmp_path_factory.mktemp("serving"), OTHER)
    with telling(site.application), site.running("db"), site.running("web"):
        yield site


def of(site: Site) -> tuple[str, ...]:
    return ("--config", str(site.mesh), "--workload", "shop/wp-1")


def dump() -> dict[str, object]:
    found: dict[str, object] = json.loads(get(f"{OTHER}.3", 15000, "/config_dump")[1])
    return found


def _with_grpc(site: Site, port: int) -> None:
    """db's port for gRPC, which its application serves at `port`."""
    http = re.search(r"ports: \[({port: 6379,[^}]*})", site.mesh.read_text())
    assert http is not None
    grpc = f"{{name: calls, port: {GRPC_PORT}, targetPort: {port}, appProtocol: grpc}}"
    named = http[1].replace("{", "{name: web, ", 1)
    site.mesh.write_text(site.mesh.read_text().replace(f"ports: [{http[1]}", f"ports: [{named}, {grpc}"))


def _under_load(site: Site, rounds: int) -> None:
    """Each waypoint has as many workers as chance says."""
    seed = secrets.randbits(32)
    chance = random.Random(seed)
    with ExitStack() as stack:
        server = stack.enter_context(_peer("grpc_interop", "serve", f"{NETWORK}.2"))
        assert server.stdout is not None
        _with_grpc(site, int(server.stdout.readline()))
        stack.enter_context(telling(site.application))
        stack.enter_context(site.running("db"))
        stack.enter_context(site.running("web", f"--forward={NETWORK}.1:{GRPC_FORWARD}=db.shop:{GRPC_PORT}"))

        def begun() -> subprocess.Popen[bytes]:
            workers = f"--workers={chance.randrange(1, 4)}"
            return stack.enter_context(waypoint(site, *of(site), "--access-log=off", "--take-over", workers))

        processes = [begun()]
        idle = stack.enter_context(socket.create_connection(site.forward, timeout=30))
        assert b"connection: close" not in _answer(idle)
        with _peer("grpc_load", f"{NETWORK}.1", str(GRPC_FORWARD)) as calling, RequestLoad(site.forward) as load:
            for _ in range(rounds):
                before = load.done.copy()
                eventually(lambda before=before: all(load.done[kind] > before[kind] + 5 for kind in KINDS), 30)
                processes.append(begun())
            before = load.done.copy()
            eventually(lambda before=before: all(load.done[kind] > before[kind] + 5 for kind in KINDS), 30)
            assert [one.poll() for one in processes[:1]] == [None], "a stream of gRPC is still open there"
            told = json.loads(calling.communicate(timeout=30)[0])
        assert load.failed == [], f"seed {seed}"
        assert told["failed"] == [], f"seed {seed}"
        assert told["done"] > 10 * rounds
        assert told["beats"] > 10
        assert b"\r\nconnection: close\r\n" in _answer(idle), "it waits in the first one, however long"
        for process in processes[:-1]:
            assert process.wait(60) == 0, "with its last connection it has ended"
        assert processes[-1].poll() is None
    assert "Traceback" not in site.log("wp")


KINDS = ("kept", "new", "http2")


@contextmanager
def _peer(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", f"tests.support.{module}", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _answer(sock: socket.socket) -> bytes:
    sock.sendall(b"GET / HTTP/1.1\r\nHost: db.shop\r\n\r\n")
    answer = b""
    while b"}" not in answer:
        received = sock.recv(65536)
        assert received, answer
        answer += received
    return answer


def test_upgrades_under_load_fail_no_request(site: Site) -> None:
    _under_load(site, 3)


def test_an_upgrade_changes_the_engine_and_fails_no_request(site: Site) -> None:
    def is_answered() -> None:
        before = load.done.copy()
        eventually(lambda: all(load.done[kind] > before[kind] + 5 for kind in KINDS), 30)

    with telling(site.application), site.running("db"), site.running("web"), ExitStack() as stack:
        options = (*of(site), "--access-log=off", "--take-over")
        first = stack.enter_context(waypoint(site, *options))
        with RequestLoad(site.forward) as load:
            is_answered()
            envoy = "namespace: shop, annotations: {mesh.uproxy.dev/engine: envoy}, labels: {istio.io/waypoint-for"
            site.mesh.write_text(
                site.mesh.read_text().replace("namespace: shop, labels: {istio.io/waypoint-for", envoy)
            )
            second = stack.enter_context(waypoint(site, *options))
            is_answered()
            stack.enter_context(waypoint(site, *options, "--workers=2"))
            is_answered()
            assert json.loads(get(f"{NETWORK}.3", 15000, "/config_dump")[1])["engine"] == "envoy"
        assert load.failed == []
        assert [first.wait(60), second.wait(60)] == [0, 0], "no connection is left there"


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_twenty_upgrades_under_load_fail_no_request(site: Site) -> None:
    _under_load(site, 20)


def test_one_that_cannot_start_leaves_all_as_it_was(serving: Site) -> None:
    chain = serving.path / "wp" / "chain.pem"
    with waypoint(serving, *of(serving)) as old:
        for workers in (1, 2):
            away = chain.rename(chain.with_name("away.pem"))
            command = [sys.executable, "-m", "waypoint", "run", "--state", str(chain.parent), *of(serving)]
            command += ["--take-over", f"--workers={workers}"]
            ended = subprocess.run(command, capture_output=True, timeout=30, check=False)
            away.rename(chain)
            assert ended.returncode == 1
            assert asked("GET", serving).status == 200
        assert old.poll() is None
        with waypoint(serving, *of(serving), "--take-over", "--workers=2"):
            assert old.wait(60) == 0
            assert asked("GET", serving).status == 200
            assert len(dump()["workers"]) == 2  # type: ignore[arg-type]


def upgraded(site: Site) -> int:
    """`waypoint upgrade`; the new one's pid."""
    command = [sys.executable, "-m", "waypoint", "upgrade", "--state", str(site.path / "wp")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.fullmatch(r".*/wp: the waypoint is pid (\d+) now; the one before drains\n", done.stdout)
    assert found is not None, f"{done}{site.log('wp')}"
    return int(found[1])


def test_a_command_and_sighup_begin_one_with_the_options_as_they_are_now(serving: Site) -> None:
    options = serving.path / "options"
    options.write_text(f"--config {serving.mesh} # resources\n--workload shop/wp-1\n--drain-timeout-s=0.4\n")
    notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notices.bind(str(serving.path / "notices"))
    notices.settimeout(30)

    def told() -> int:
        """The pid that a service manager is told."""
        found = re.fullmatch(rb"READY=1\nMAINPID=(\d+)", notices.recv(4096))
        assert found is not None
        return int(found[1])

    def workers() -> int:
        with suppress(ConnectionError):  # the one that leaves may take the question with it
            return len(dump().get("workers", ()))  # type: ignore[arg-type]
        return 0

    with notices, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOTIFY_SOCKET", str(serving.path / "notices"))
        with waypoint(serving, f"@{options}") as first:
            assert told() == first.pid
            second = upgraded(serving)
            try:
                assert told() == second
                assert first.wait(60) == 0
                assert asked("GET", serving).status == 200
                os.kill(second, signal.SIGHUP)  # nothing has changed
                options.write_text(options.read_text() + "--nonsense\n")
                os.kill(second, signal.SIGHUP)
                eventually(lambda: "the settings as they are now are wrong" in serving.log("wp"))
                options.write_text(options.read_text().replace("--nonsense", "--workers=2"))
                os.kill(second, signal.SIGHUP)
                second = told()
                eventually(lambda: workers() == 2)
                assert asked("GET", serving).status == 200
            finally:
                os.kill(second, signal.SIGTERM)
                eventually(lambda: not (serving.path / "wp" / "handover.sock").exists())
    missing = subprocess.run(
        [sys.executable, "-m", "waypoint", "upgrade", "--state", str(serving.path / "wp")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (missing.returncode, "nobody runs with" in missing.stderr) == (1, True)


def test_one_that_must_not_take_over_after_all_leaves_the_way_to_the_one_that_runs(serving: Site) -> None:
    directory = serving.path / "wp"
    listener = handover.listen(directory)
    assert listener is not None
    listener.settimeout(60)

    answers: list[dict[str, object]] = [
        {"welcome": "1"},
        {"sockets": 1},
        {"done": True},
        {"refused": "this one goes on"},
    ]

    def take_back() -> None:
        taking, _ = listener.accept()
        with taking:
            taking.settimeout(60)
            for answer in answers:
                taking.recv(1 << 16)
                fds = [listener.fileno()] if "sockets" in answer else []
                socket.send_fds(taking, [msgpack.packb(answer)], fds)

    with listener:
        running = threading.Thread(target=take_back)
        running.start()
        command = [sys.executable, "-m", "waypoint", "run", "--state", str(directory), *of(serving), "--take-over"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        running.join()
        assert ended.returncode == 1
        assert "takes its place back: this one goes on" in ended.stderr
        assert handover.serves(directory)
        handover.remove(directory)


def test_request_by_http2_that_is_on_its_way_when_a_drain_begins_is_answered(serving: Site) -> None:
    async def ask() -> None:
        async with speaking(*await asyncio.open_connection(*serving.forward)) as peer:
            assert (await peer.answer(peer.request(HTTP2))).status == 200
            upgrading = asyncio.to_thread(lambda: stack.enter_context(waypoint(serving, *of(serving), "--take-over")))
            await asyncio.gather(upgrading, peer.until(lambda: bool(peer.goaways), 30))
            await asyncio.sleep(0.5)  # nobody else asks for anything there
            late = await peer.answer(peer.request(HTTP2))
            assert late.ended
            assert late.status == 200

    with waypoint(serving, *of(serving)) as process, ExitStack() as stack:
        asyncio.run(ask())
        assert process.wait(60) == 0


def test_who_is_told_to_end_takes_a_successor_along_that_is_not_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "slow"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))

    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    async def main() -> None:
        before = children()
        async with asyncio.TaskGroup() as group:
            starting = group.create_task(Successor([]).start())
            await asyncio.sleep(0)
            assert len(children() - before) == 1
            starting.cancel()
        assert not children() - before

    asyncio.run(main())


def test_sigterm_ends_one_that_drains_after_an_upgrade(serving: Site) -> None:
    with (
        waypoint(serving, *of(serving), "--workers=2", "--drain-timeout-s=0.4") as old,
        socket.create_connection(serving.forward, timeout=30) as idle,
    ):
        _answer(idle)
        with waypoint(serving, *of(serving), "--take-over"):
            assert old.poll() is None
            old.send_signal(signal.SIGTERM)
            assert old.wait(60) == 0
            assert idle.recv(1) == b""
            assert asked("GET", serving).status == 200


def test_a_member_begins_with_what_the_one_before_knew(tmp_path: Path) -> None:
    with ExitStack() as stack:
        site = stack.enter_context(members(tmp_path, NETWORK))
        control = site.control
        old = stack.enter_context(waypoint(site, *joining(site)))
        eventually(lambda: [one.state.phase for one in control.plane.core.progress()] == [Phase.ENFORCED])
        assert asked("GET", site).status == 200
        control.stop()
        new = stack.enter_context(waypoint(site, "--take-over", "--workers=2"))
        assert old.wait(60) == 0
        assert asked("GET", site).status == 200
        control.start()
        control.apply(resources(NETWORK).replace("[DELETE]", "[DELETE, PUT]"))

        def is_current() -> bool:
            status = control.status(WP, "wp-1")
            return status is not None and status.roots["shop"][:2] == control.plane.core.roots()["shop"][:2]

        eventually(is_current)
        assert asked("PUT", site).status == 403
        assert [one.state.phase for one in control.plane.core.progress()] == [Phase.ENFORCED]
        assert new.poll() is None
    assert "Traceback" not in site.log("wp")
