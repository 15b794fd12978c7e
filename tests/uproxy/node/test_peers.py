"""Who is heard on the channels for the direct path: a workload's uProxy, and nobody else, and it within bounds."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.identity import SpiffeId
from tests.support import capture, near
from tests.support.near import Pair, Place
from uproxy.node import channel, peers, server
from uproxy.node.channel import Allowed, ChannelError, Flow, Said, read_said
from uproxy.node.peers import Peer

root = pytest.mark.root


class Heard:
    """What came of whom."""

    def __init__(self) -> None:
        self.joined_names: list[str] = []
        self.said: list[tuple[str, Said | None]] = []

    def joined(self, peer: Peer) -> None:
        self.joined_names.append(peer.workload.name)

    def heard(self, peer: Peer) -> None:
        self.said.append((peer.workload.name, peer.said))

    def left(self, peer: Peer) -> None:
        peer.sockets.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with near.pair() as made:
        yield made


@pytest.fixture
def serving(pair: Pair, tmp_path: Path) -> Iterator[tuple[Path, Heard]]:
    """A server in a thread of its own."""
    path, heard = tmp_path / "direct.sock", Heard()
    listener = server.listen(path, for_all=True)
    loop = asyncio.new_event_loop()
    task = loop.create_task(peers.serve(listener, lambda: [pair.web.captured, pair.db.captured], heard))

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield path, heard
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)
        listener.close()


def converse(path: Path, raw: bytes) -> bytes:
    """Whether the agent still listens after a message: what it sends, empty when it hangs up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(0.5)
        sock.connect(str(path))
        with suppress(BrokenPipeError):
            sock.send(raw)
        try:
            return sock.recv(1 << 17)
        except TimeoutError:
            return b"listens"
        except ConnectionResetError:
            return b""


def inside(place: Place, directory: str, path: Path, raw: bytes) -> bytes:
    """From a process in one of its cgroups, as a user who owns nothing."""

    def ask() -> bytes:
        os.setgid(65534)
        os.setuid(65534)
        return converse(path, raw)

    path.parent.chmod(0o755)
    for parent in path.parents[:4]:
        parent.chmod(parent.stat().st_mode | 0o011)
    return capture.run_inside(place.netns, place.box.cgroup / directory, ask)


@root
def test_a_uproxy_is_known_by_its_cgroup(pair, serving):
    path, heard = serving
    assert inside(pair.web, "proxy", path, channel.pack_said(Said())) == b"listens"
    assert heard.joined_names == ["web"]
    assert heard.said == [("web", Said())]


@root
def test_an_application_is_hung_up_on(pair, serving):
    path, heard = serving
    assert inside(pair.web, "app", path, channel.pack_said(Said())) == b""
    assert not heard.joined_names


@root
def test_anybody_else_is_hung_up_on(serving):
    path, heard = serving
    assert converse(path, channel.pack_said(Said())) == b""
    assert not heard.joined_names


@root
def test_on_an_older_kernel_nobody_is_heard_and_the_log_says_so_once(pair, serving, monkeypatch, caplog):
    monkeypatch.setattr(peers, "_SO_PEERPIDFD", 9999)
    path, heard = serving
    for _ in range(3):
        assert inside(pair.web, "proxy", path, channel.pack_said(Said())) == b""
    assert not heard.joined_names
    assert caplog.text.count("SO_PEERPIDFD (Linux 6.5)") == 1


@root
def test_a_process_in_another_namespace_is_hung_up_on(pair, serving):
    """The right cgroup alone is not enough."""
    path, heard = serving
    raw = channel.pack_said(Said())
    assert capture.run_inside(pair.db.netns, pair.web.box.proxy_cgroup, lambda: converse(path, raw)) == b""
    assert not heard.joined_names


@root
def test_a_process_that_has_ended_is_hung_up_on(pair, serving):
    """Its connection lives on in another process, and so may its pid."""
    path, heard = serving
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def connect() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            for _ in range(200):  # more than the agent looks at meanwhile
                socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect_ex(str(path))
            sock.connect(str(path))
            socket.send_fds(theirs, [b"x"], [sock.fileno()])

    with ours, theirs:
        capture.run_inside(pair.web.netns, pair.web.box.cgroup / "app", connect)
        _, (fd,), _, _ = socket.recv_fds(ours, 16, 1)
        with socket.socket(fileno=fd) as inherited:
            inherited.settimeout(15)
            with suppress(OSError):
                assert inherited.recv(16) == b""
    assert not heard.joined_names


@root
@pytest.mark.parametrize("raw", [b"\xc1", b"\x80", bytes(channel.MAX_MESSAGE + 1)], ids=["no msgpack", "empty", "long"])
def test_a_message_that_is_none_ends_the_channel(pair, serving, raw):
    path, heard = serving
    assert inside(pair.web, "proxy", path, raw) == b""
    assert not heard.said


IDENTITY = SpiffeId("td", "a", "b")
SAID = Said(
    (channel.Choice("240.240.0.1", 80, (channel.Backend("10.0.0.1", 8080, 2, IDENTITY),)),),
    (Allowed(IDENTITY, ("10.0.0.2", 40000), "fd00::1", 8080),),
)


def test_what_is_said_is_read():
    assert read_said(channel.pack_said(SAID)) == SAID


@given(st.binary(max_size=200) | st.integers(0, len(channel.pack_said(SAID)) - 1), st.integers(1, 255))
def test_any_bytes_are_read_or_refused(raw, flip):
    if isinstance(raw, int):
        whole = bytearray(channel.pack_said(SAID))
        whole[raw] ^= flip
        raw = bytes(whole)
    with suppress(ChannelError):
        assert isinstance(read_said(raw), Said)


@pytest.mark.parametrize("wrong", [None, True, 1, 1.5, b"x", [], ["10.0.0.1"], {}, {"a": 1}, msgpack.Timestamp(1)])
def test_a_value_of_another_type_is_refused_wherever_it_stands(wrong):
    """The agent reads this of processes that it does not trust: anything but a ChannelError would end it."""
    whole = msgpack.unpackb(channel.pack_said(SAID))

    def everywhere(value):
        if value != wrong:
            yield wrong
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            for changed in everywhere(item):
                again = value.copy()
                again[key] = changed
                yield again

    for said in everywhere(whole):
        with suppress(ChannelError):
            assert channel.pack_said(read_said(msgpack.packb(said))) == msgpack.packb(said)


def test_too_much_is_refused():
    many = Said(allowed=SAID.allowed * (channel.MAX_ALLOWED + 1))
    with pytest.raises(ChannelError, match="at most"):
        read_said(channel.pack_said(many))


def test_what_does_not_fit_is_not_said():
    """The oldest choices go first, and whom one lets in matters more."""
    many = tuple(channel.Backend("10.0.0.1", port, 1, IDENTITY) for port in range(1, channel.MAX_BACKENDS + 1))
    choices = tuple(channel.Choice("240.240.0.1", port, many) for port in range(1, channel.MAX_SERVICES + 1))
    raw = channel.pack_said(Said(choices, SAID.allowed * channel.MAX_ALLOWED))
    assert channel.MAX_MESSAGE - 16_000 < len(raw) <= channel.MAX_MESSAGE
    said = read_said(raw)
    assert said.allowed == SAID.allowed * channel.MAX_ALLOWED
    assert said.choices == choices[-len(said.choices) :]
    longest = SpiffeId("td", "a", "b" * 2000)
    allowed = tuple(Allowed(longest, ("10.0.0.2", port), "fd00::1", 8080) for port in range(1, 501))
    raw = channel.pack_said(Said(SAID.choices, allowed))
    assert len(raw) <= channel.MAX_MESSAGE
    assert 0 < len(read_said(raw).allowed) < 500


def test_flows_are_read():
    end = ("10.0.0.1", 80)
    flow = Flow(True, end, end, end, "spiffe://td/ns/a/sa/b", 1, 2, 3, 4, 0.5, "closed")
    told = channel.read_told(channel.pack_flows([flow], 7))
    assert (told.local, told.flows, told.lost) == (None, (flow,), 7)
