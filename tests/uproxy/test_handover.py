"""A new uProxy takes over from the one that runs: two real processes, and successors that fail half way."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import uproxy
from tests.support.site import Site, dial, echo_server, eventually, get
from tests.support.waiting import until
from uproxy import handover
from uproxy.handover import PROTOCOL, HandoverError, Hello, Line, Message, Movable, Predecessor
from uproxy.listener import Inherited

NETWORK, STANDING = "127.0.98", "127.0.99"
WEB, DB = f"{NETWORK}.1", f"{NETWORK}.2"

DENY_WEB = """
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-web, namespace: shop}
spec:
  action: DENY
  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]}]
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site.create(tmp_path, NETWORK)
    with echo_server(made.application):
        yield made


@pytest.fixture
def running(site: Site) -> Iterator[dict[str, subprocess.Popen[str]]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(site.running(name)) for name in ("db", "web")}


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, subprocess.Popen[str]]]:
    """A mesh that is as before after each test, and the uProxy from which nobody takes over."""
    site = Site.create(tmp_path_factory.mktemp("standing"), STANDING)
    with echo_server(site.application), site.running("db"), site.running("web") as web:
        yield site, web
        assert web.poll() is None
        with site.running("web", "--take-over"):
            assert dial(site.forward) == b"hello"


class Load:
    """Connections one after the other, and pages of the new and the old one, until the block ends."""

    def __init__(self, site: Site) -> None:
        self.failed: list[str] = []
        self.done = 0
        self._site = site
        self._ended = threading.Event()

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=work) for work in (self._dial, self._dial, self._look)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _dial(self) -> None:
        while not self._ended.is_set():
            try:
                if dial(self._site.forward, b"x" * 1000) == b"x" * 1000:
                    self.done += 1
                else:
                    self.failed.append("an answer was cut")
            except OSError as error:
                self.failed.append(repr(error))

    def _look(self) -> None:
        while not self._ended.is_set():
            for port, path in ((15020, "/metrics"), (15021, "/healthz/ready")):
                try:
                    if get(WEB, port, path)[0] != 200:
                        self.failed.append(f"{path} was not served")
                except OSError as error:
                    self.failed.append(f"{path}: {error!r}")
            self._ended.wait(0.01)


def test_upgrades_of_both_ends_fail_no_connection_and_cut_none(site: Site) -> None:
    with ExitStack() as stack:
        now = {name: stack.enter_context(site.running(name)) for name in ("db", "web")}
        with socket.create_connection(site.forward, timeout=30) as held, Load(site) as load:
            held.sendall(b"a")
            assert held.recv(1) == b"a"
            first = dict(now)
            for name in ("web", "db", "web"):
                before = load.done
                now[name] = stack.enter_context(site.running(name, "--take-over"))
                eventually(lambda before=before: load.done > before + 5)
            held.sendall(b"b")
            assert held.recv(1) == b"b"
            assert all(process.poll() is None for process in first.values()), "what is in a tunnel stays where it is"
        for process in first.values():
            assert process.wait(60) == 0, "with its last connection the old one has ended"
        assert load.failed == []
        assert dial(site.forward) == b"hello"
        assert [now[name].poll() for name in now] == [None, None]
    assert "Traceback" not in site.log("web") + site.log("db")


def test_whoever_finds_nobody_to_take_over_from_starts_as_ever(site: Site) -> None:
    with site.running("db", "--take-over"), site.running("web", "--take-over") as web:
        assert dial(site.forward) == b"hello"
        web.kill()
        web.wait()
        with site.running("web", "--take-over"):  # the dead one's socket is still there
            assert dial(site.forward) == b"hello"


def test_a_successor_that_dies_is_followed_by_another_while_the_first_one_drains(site: Site) -> None:
    with (
        site.running("db"),
        site.running("web") as first,
        socket.create_connection(site.forward, timeout=30) as held,
    ):
        held.sendall(b"a")
        assert held.recv(1) == b"a"
        with site.running("web", "--take-over") as successor:
            eventually(lambda: "draining 1 connections" in site.log("web"))
            successor.kill()
            successor.wait()
        with site.running("web", "--take-over"):
            assert dial(site.forward) == b"hello"
            held.sendall(b"b")
            assert held.recv(1) == b"b"
            assert first.poll() is None


def test_policy_holds_in_the_one_that_drains(site: Site, running: dict[str, subprocess.Popen[str]]) -> None:
    with socket.create_connection(site.forward, timeout=30) as held:
        held.sendall(b"a")
        assert held.recv(1) == b"a"
        with site.running("db", "--take-over"):
            held.sendall(b"b")
            assert held.recv(1) == b"b"
            site.mesh.write_text(site.resources + DENY_WEB)
            with pytest.raises(ConnectionResetError):
                held.recv(1)
            assert running["db"].wait(60) == 0


@pytest.mark.parametrize("how", ["drain time", "SIGTERM"])
def test_the_old_one_ends_when_it_must(site: Site, how: str) -> None:
    times = ["--drain-timeout-s=0.3", f"--upgrade-drain-timeout-s={0.3 if how == 'drain time' else 600}"]
    with (
        site.running("db"),
        site.running("web", *times) as old,
        socket.create_connection(site.forward, timeout=30) as held,
    ):
        held.sendall(b"a")
        assert held.recv(1) == b"a"
        with site.running("web", "--take-over"):
            if how == "SIGTERM":
                time.sleep(0.5)
                assert old.poll() is None
                old.terminate()
            with pytest.raises(ConnectionResetError):
                held.recv(1)
            assert old.wait(60) == 0
            assert dial(site.forward) == b"hello"


class Successor:
    """One that speaks the protocol by hand, as far as a test wants."""

    def __init__(self, site: Site) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(30)
        self._directory = site.path / "web"
        self._said = False

    def __enter__(self) -> Successor:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def ask(self, message: Message) -> tuple[dict[str, object], list[int]]:
        if not self._said:  # who has connected has a second for that
            self._said = True
            message = {"secret": (self._directory / handover.SECRET_NAME).read_text(), **message}
            self._sock.connect(str(self._directory / handover.SOCKET_NAME))
        self._sock.send(msgpack.packb(message))
        raw, fds, _, _ = socket.recv_fds(self._sock, 1 << 20, 253)
        return msgpack.unpackb(raw) if raw else {}, fds


HELLO = {
    "handover": PROTOCOL,
    "version": "9",
    "workload": "shop/web",
    "addresses": [f"{STANDING}.1"],
    "capture": "none",
}


WRONG = [
    ({"handover": PROTOCOL + 1}, "speaks hand-over protocol"),
    ({"workload": "shop/other"}, "workload"),
    ({"addresses": [DB]}, "addresses"),
    ({"capture": "ebpf"}, "capture"),
    ({"handover": None}, "protocol None"),
    ({"secret": "0" * 64}, "does not show"),
    ({"secret": None}, "does not show"),
    ({"secret": "\u1234"}, "does not show"),
    ({"secret": "", "ask": "upgrade"}, "does not show"),
]


def test_whoever_is_another_proxy_is_refused(standing: tuple[Site, object]) -> None:
    site, _ = standing
    for wrong, why in WRONG:
        with Successor(site) as other:
            answer, fds = other.ask({**HELLO, **wrong})
        assert why in str(answer["refused"])
        assert not fds
    said = site.refusal("web", "--take-over", "--address", f"{STANDING}.3")
    assert "does not let this one take over" in said
    assert "addresses" in said
    assert dial(site.forward) == b"hello"


def test_a_successor_that_dies_half_way_changes_nothing(standing: tuple[Site, object]) -> None:
    site, _ = standing
    before = site.log("web").count("this one goes on")
    for at in ("hello", "sockets", "rest"):
        _die_half_way(site, at)
    assert site.log("web").count("this one goes on") == before + 3


def test_whoever_asks_out_of_turn_is_refused(standing: tuple[Site, subprocess.Popen[str]]) -> None:
    site, web = standing
    with Successor(site) as other:
        other.ask(HELLO)
        assert other.ask({"ask": "leave"}) == ({}, [])
    assert dial(site.forward) == b"hello"
    assert web.poll() is None


def _die_half_way(site: Site, at: str) -> None:
    with socket.create_connection(site.forward, timeout=30) as held, Successor(site) as other:
        held.sendall(b"a")
        assert held.recv(1) == b"a"
        assert other.ask(HELLO)[0] == {"welcome": uproxy.__version__}
        fds: list[int] = []
        waiting: socket.socket | None = None
        if at != "hello":
            answer, fds = other.ask({"ask": "sockets"})
            assert answer == {"sockets": len(fds), "more": False}
            waiting = socket.create_connection(site.forward, timeout=30)  # the kernel takes it
            waiting.sendall(b"late")
        if at == "rest":
            assert other.ask({"ask": "rest"})[0] == {"done": True}
        for fd in fds:
            os.close(fd)
        other.__exit__()
        if waiting is not None:
            with waiting:
                assert waiting.recv(4) == b"late"
        held.sendall(b"b")
        assert held.recv(1) == b"b"
    assert dial(site.forward) == b"hello"


@pytest.mark.root
def test_another_user_is_refused(standing: tuple[Site, object]) -> None:
    site, _ = standing
    path = site.path / "web" / handover.SOCKET_NAME
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o666)  # as if it had been let in
    held = os.open(path, os.O_PATH)  # past the directories, which are closed to it
    stranger = subprocess.run(
        [sys.executable, "-c", _STRANGER, str(held)], pass_fds=[held], capture_output=True, text=True, check=False
    )
    os.close(held)
    assert "uid 65534 may not" in stranger.stdout, stranger
    assert dial(site.forward) == b"hello"


_STRANGER = """
import os, socket, sys
os.setgid(65534), os.setuid(65534)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.settimeout(30)
sock.connect(f"/proc/self/fd/{sys.argv[1]}")
print(sock.recv(4096))
"""


# -- one end alone, where the other must be slow


class Giver:
    """A proxy that only listens."""

    def __init__(self, listeners: Sequence[socket.socket] = ()) -> None:
        self.history: list[str] = []
        self.resumed = asyncio.Event()
        self.given: Sequence[Movable] = ()
        self._listeners = listeners

    async def prepare(self) -> None:
        self.history.append("prepare")

    def pause(self) -> list[int]:
        self.history.append("pause")
        return [one.fileno() for one in self._listeners]

    def resume(self) -> None:
        self.history.append("resume")
        self.resumed.set()

    def direct(self) -> list[Message]:
        return [{"local": [str(number)]} for number in range(3)]

    def connections(self) -> Sequence[Movable]:
        return self.given

    def leave(self) -> None:
        self.history.append("leave")


class Given:
    """A connection, of which much is to be said."""

    def __init__(self) -> None:
        self._ends = socket.socketpair()
        self.gone = False

    def describe(self) -> tuple[Message, Sequence[int]]:
        return {"x": b"x" * 100_000}, [one.fileno() for one in self._ends]

    def let_go(self) -> None:
        assert not self.gone
        self.gone = True

    def close(self) -> None:
        for one in self._ends:
            one.close()


OWN = Hello("1", "shop/web", (WEB,), "none")


@contextmanager
def listening(directory: Path) -> Iterator[socket.socket]:
    listener = handover.listen(directory)
    assert listener is not None
    with listener:
        yield listener


def test_a_successor_that_is_slow_loses_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "PATIENCE_S", 0.2)

    async def main() -> None:
        with listening(tmp_path) as listener:
            giver = Giver([listener])
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(handover.serve(listener, tmp_path, OWN, giver))
                slow = await Predecessor.find(tmp_path, OWN)
                assert slow is not None
                for sock in await slow.sockets():
                    sock.close()
                await giver.resumed.wait()
                with pytest.raises(HandoverError, match="it took too long"):
                    await slow.leave()
                slow.close()
                assert giver.history == ["prepare", "pause", "resume"]
                serving.cancel()

    asyncio.run(main())


def test_a_successor_that_gave_up_before_its_leave_was_read_does_not_take_over(tmp_path: Path) -> None:
    async def main() -> None:
        with listening(tmp_path) as listener:
            giver = Giver([listener])
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(handover.serve(listener, tmp_path, OWN, giver))
                hasty = await Predecessor.find(tmp_path, OWN)
                assert hasty is not None
                for sock in await hasty.sockets():
                    sock.close()
                await hasty.rest()
                await hasty._line.send({"ask": "leave"})
                hasty.close()
                async with asyncio.timeout(30):
                    await giver.resumed.wait()
                assert giver.history == ["prepare", "pause", "resume"]
                serving.cancel()

    asyncio.run(main())


def test_one_that_must_not_take_over_after_all_leaves_the_way_to_the_one_that_runs(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, directory = handover._asked, site.path / "web"

    async def all_but_leave(line: Line, what: str) -> None:
        if what == "leave":
            raise TimeoutError
        await asked(line, what)

    monkeypatch.setattr(handover, "_asked", all_but_leave)

    async def main() -> None:
        with listening(directory) as listener:
            giver = Giver([listener])
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(handover.serve(listener, directory, OWN, giver))
                said = await asyncio.to_thread(site.refusal, "web", "--take-over")
                assert "takes its place back: it took too long" in said
                assert giver.history == ["prepare", "pause", "resume"]
                found = await Predecessor.find(directory, OWN)
                assert found is not None
                found.close()
                serving.cancel()

    asyncio.run(main())


def test_whoever_connects_and_says_nothing_keeps_nobody_from_taking_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "FIRST_WORD_S", 0.2)
    told: list[bytes] = []
    connected: set[int] = set()

    async def say_nothing(number: int) -> None:
        while True:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.setblocking(False)
                try:
                    sock.connect(str(tmp_path / handover.SOCKET_NAME))
                except BlockingIOError:
                    await asyncio.sleep(0.01)
                    continue
                connected.add(number)
                told.append(await asyncio.get_running_loop().sock_recv(sock, 1000))

    async def main() -> None:
        with listening(tmp_path) as listener:
            giver = Giver([listener])
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(handover.serve(listener, tmp_path, OWN, giver))
                silent = [group.create_task(say_nothing(number)) for number in range(8)]
                await until(lambda: len(connected) == 8)
                async with asyncio.timeout(5):
                    found = await Predecessor.find(tmp_path, OWN)
                assert found is not None
                await until(lambda: len(told) > 8)
                assert "says nothing" in msgpack.unpackb(told[0])["refused"]
                for sock in await found.sockets():
                    sock.close()
                found.close()
                await giver.resumed.wait()
                for task in (serving, *silent):
                    task.cancel()

    asyncio.run(main())


def test_whoever_waits_while_another_takes_over_asks_that_one(tmp_path: Path) -> None:
    async def main() -> None:
        with listening(tmp_path) as listener:
            giver = Giver([listener])
            async with asyncio.TaskGroup() as group:
                former = group.create_task(handover.serve(listener, tmp_path, OWN, giver))
                first = await Predecessor.find(tmp_path, OWN)
                assert first is not None
                second = group.create_task(Predecessor.find(tmp_path, OWN))
                (handed,) = await first.sockets()
                await first.rest()
                await first.leave()
                first.close()
                await former
                assert giver.history == ["prepare", "pause", "leave"]
                assert listener.fileno() == -1
                with handed:
                    newer = Hello("2", "shop/web", (WEB,), "none")
                    assert handover.listen(tmp_path, handed) is handed
                    serving = group.create_task(handover.serve(handed, tmp_path, newer, Giver()))
                    found = await second
                    assert found is not None
                    assert found.version == "2"
                    found.close()
                    serving.cancel()

    asyncio.run(main())


def test_a_line_that_is_full_is_waited_in_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "HELLO_S", 0.2)
    with listening(tmp_path), ExitStack() as stack:
        for _ in range(handover.STRANGERS + 1):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.setblocking(False)
            sock.connect(str(tmp_path / handover.SOCKET_NAME))
        assert handover.serves(tmp_path)
        assert handover.listen(tmp_path) is None, "another one runs"
        with pytest.raises(HandoverError, match="does not answer"):
            asyncio.run(Predecessor.find(tmp_path, OWN))


def test_connections_that_a_successor_can_no_longer_take_stay(tmp_path: Path) -> None:
    async def main() -> None:
        with listening(tmp_path) as listener:
            giver = Giver([listener])
            given = giver.given = [Given() for _ in range(50)]
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(handover.serve(listener, tmp_path, OWN, giver))
                first = await Predecessor.find(tmp_path, OWN)
                assert first is not None
                for sock in await first.sockets():
                    sock.close()
                await first._line.send({"ask": "rest"})
                first.close()
                await giver.resumed.wait()
                assert not any(one.gone for one in given)
                other = await Predecessor.find(tmp_path, OWN)
                assert other is not None
                for sock in await other.sockets():
                    sock.close()
                rest = await other.rest()
                assert [len(said["x"]) for said, _, _ in rest.connections] == [100_000] * 50
                for _, peer, app in rest.connections:
                    peer.close()
                    app.close()
                assert all(one.gone for one in given)
                other.close()
                serving.cancel()
            for one in given:
                one.close()

    asyncio.run(main())


def test_a_bug_costs_the_hand_over_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        with listening(tmp_path) as listener:
            giver = Giver([listener])
            giver.given = [None]  # type: ignore[list-item]
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(handover.serve(listener, tmp_path, OWN, giver))
                other = await Predecessor.find(tmp_path, OWN)
                assert other is not None
                for sock in await other.sockets():
                    sock.close()
                await other.rest()
                await giver.resumed.wait()
                other.close()
                assert not serving.done()
                serving.cancel()

    asyncio.run(main())
    assert "a hand-over failed as none should" in caplog.text


def test_one_that_does_not_answer_is_not_taken_over_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "HELLO_S", 0.2)

    async def main() -> None:
        with listening(tmp_path), pytest.raises(HandoverError, match="does not answer"):
            await Predecessor.find(tmp_path, OWN)

    asyncio.run(main())


def test_more_sockets_than_one_message_has_room_for_are_handed_over(tmp_path: Path) -> None:
    wanted = 2 * handover.SOCKETS_AT_ONCE + 3

    async def main() -> None:
        with ExitStack() as stack:
            made = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(wanted)]
            giver = Giver(made)
            listener = stack.enter_context(listening(tmp_path))
            inherited = Inherited()
            async with asyncio.TaskGroup() as group:
                group.create_task(handover.serve(listener, tmp_path, OWN, giver))
                predecessor = await Predecessor.find(tmp_path, OWN)
                assert predecessor is not None
                for sock in await predecessor.sockets():
                    inherited.add(sock)
                rest = await predecessor.rest()
                assert [piece["local"] for piece in rest.direct] == [["0"], ["1"], ["2"]]
                await predecessor.leave()
                predecessor.close()
            for one in made:
                taken = inherited.take(socket.SOCK_STREAM, *one.getsockname())
                assert taken is not None
                taken.close()
            assert giver.history == ["prepare", "pause", "leave"]

    asyncio.run(main())


def test_a_directory_in_which_nothing_can_be_made_costs_only_the_upgrade(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert handover.listen(tmp_path / "none") is None
    with listening(tmp_path):
        assert handover.listen(tmp_path) is None, "another one runs"
    assert caplog.text.count("nobody can take over from this one") == 2


def test_however_long_the_path_is(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)

    async def main() -> None:
        with listening(deep) as listener:
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(handover.serve(listener, deep, OWN, Giver()))
                found = await Predecessor.find(deep, OWN)
                assert found is not None
                found.close()
                serving.cancel()

    asyncio.run(main())


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=3),
)


@given(st.binary(max_size=200) | ANYTHING.map(msgpack.packb))
@example(b"")
@example(b"\xc1")
@example(msgpack.packb([1]))
@example(msgpack.packb({"refused": "no"}))
def test_any_bytes_are_a_message_or_an_error(raw: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def main() -> None:
        line = Line(ours)
        theirs.send(raw)
        theirs.close()
        try:
            said, descriptors = await line.receive()
        except (HandoverError, handover.GoneError):
            return
        finally:
            line.close()
        assert said == msgpack.unpackb(raw)
        assert "refused" not in said
        assert descriptors == []
        assert OWN.wrong(said), "who says none of what is asked for is nobody's successor"

    asyncio.run(main())


def test_descriptors_that_nobody_wants_are_closed() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def main() -> None:
        line = Line(ours)
        before = len(os.listdir("/proc/self/fd"))
        for message in ({"refused": "no"}, [1], {}):
            socket.send_fds(theirs, [msgpack.packb(message)], [0, 1])
            with suppress(HandoverError):
                await line.receive(most=1)
        assert len(os.listdir("/proc/self/fd")) == before
        line.close()

    asyncio.run(main())
    theirs.close()


def test_without_the_secret_nobody_takes_over(tmp_path: Path) -> None:
    """Not even when there is none."""

    async def main() -> None:
        with listening(tmp_path) as listener:
            secret = tmp_path / handover.SECRET_NAME
            assert secret.stat().st_mode & 0o777 == 0o600
            giver = Giver([listener])
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(handover.serve(listener, tmp_path, OWN, giver))
                secret.unlink()
                with pytest.raises(HandoverError, match="does not show"):
                    await Predecessor.find(tmp_path, OWN)
                serving.cancel()
            assert giver.history == []

    asyncio.run(main())


def test_a_successor_of_an_older_version_makes_a_secret_and_keeps_one_that_is_there(tmp_path: Path) -> None:
    with listening(tmp_path) as listener:
        secret = tmp_path / handover.SECRET_NAME
        first = secret.read_text()
        assert handover.listen(tmp_path, listener) is listener
        assert secret.read_text() == first
        secret.unlink()
        assert handover.listen(tmp_path, listener) is listener
        assert secret.read_text() not in ("", first)
