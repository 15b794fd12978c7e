"""What a launcher asks a fork server for, and what is refused."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uproxy import fork_server, linux
from uproxy.entrance import Account, Entrance, Exposure
from uproxy.fork_client import ForkedBy, ForkServerError, Order
from uproxy.node.server import listen

_paths = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).map(
    lambda text: Path("/", text.replace("/", "_"))
)
_ids = st.integers(0, 2**32 - 2)
_orders = st.builds(
    Order,
    arguments=st.lists(st.text(max_size=20), max_size=8).map(tuple),
    entrance=st.builds(
        Entrance,
        cgroup=_paths,
        netns_fd=st.just(3),
        account=st.none() | st.builds(Account, _ids, _ids, st.lists(_ids, max_size=3).map(tuple)),
        restricted=st.booleans(),
        exposures=st.lists(st.builds(Exposure, _paths, st.lists(_paths, max_size=3).map(tuple)), max_size=3).map(tuple),
        signal_mask=st.lists(st.sampled_from(signal.Signals), max_size=3).map(tuple),
    ),
    output=st.just(4),
    lifeline=st.just(5),
    ready=st.just(6),
    probes=st.lists(st.integers(7, 10), max_size=4).map(tuple),
)


@given(_orders)
def test_an_order_arrives_as_it_was_given(order: Order) -> None:
    assert Order.unpack(order.pack(), order.descriptors) == order


@given(_orders, st.data())
def test_what_is_no_order_is_refused_and_never_raises_anything_else(order: Order, data: st.DataObject) -> None:
    raw = bytearray(order.pack())
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=4)):
        raw[at] = data.draw(st.integers(0, 255))
    descriptors = order.descriptors[: data.draw(st.integers(0, len(order.descriptors)))]
    with contextlib.suppress(ForkServerError):
        Order.unpack(bytes(raw), descriptors)


def test_a_launcher_that_speaks_another_protocol_is_told_so() -> None:
    raw = msgpack.packb({"protocol": 0})
    with pytest.raises(ForkServerError, match="and 0 the launcher: restart that"):
        Order.unpack(raw, [])


class TestTheServer:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Iterator[Path]:
        """Of a server in a child: it forks, which a process with threads should not."""
        path = tmp_path / "fork.sock"
        listener = listen(path)
        child = os.fork()
        if child == 0:
            try:
                fork_server.ForkServer(listener).serve()
            finally:
                os._exit(0)
        listener.close()
        yield path
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == 0

    def _ask(self, path: Path, raw: bytes, descriptors: list[int]) -> dict[str, object]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(30)
            connection.connect(str(path))
            socket.send_fds(connection, [raw], descriptors)
            found = msgpack.unpackb(connection.recv(1000))
            assert connection.recv(1) == b"", "the connection is kept"
            assert isinstance(found, dict)
            return found

    def test_refuses_what_it_cannot_read_and_goes_on(self, path: Path) -> None:
        assert "not one of a launcher" in str(self._ask(path, b"\xc1", [])["error"])
        assert "not one of a launcher" in str(self._ask(path, msgpack.packb([]), [0])["error"])
        assert "at most" in str(self._ask(path, b"x", [0] * 20)["error"])
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as gone:
            gone.connect(str(path))
        assert "not one of a launcher" in str(self._ask(path, b"\x80", [])["error"])

    def test_tells_how_a_sidecar_ended(self, path: Path) -> None:
        entrance = Entrance(Path("/nowhere"), os.open("/proc/self/ns/net", os.O_RDONLY))
        try:
            with open(os.devnull, "ab", buffering=0) as log:
                ready, theirs = os.pipe()
                forked = ForkedBy(path, ("--help",), entrance)(theirs, [], log)
                os.close(theirs)
                assert os.read(ready, 1) == b"", "its end of the pipe is closed"
                os.close(ready)
            assert select.select([forked.end_fd], [], [], 10)[0]
            assert forked.status() == 125, "it cannot enter a cgroup that is not there"
            forked.ended(125)
        finally:
            os.close(entrance.netns_fd)


def test_a_process_dies_with_the_last_writer_of_a_pipe() -> None:
    for gone_before in (False, True):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(write)
                if gone_before:
                    select.select([read], [], [])
                linux.die_with_writer(read)
                signal.pause()
            finally:
                os._exit(0)
        os.close(read)
        if not gone_before:
            threading.Event().wait(0.2)
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.close(write)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def test_a_forked_process_shows_its_own_arguments() -> None:
    code = (
        "import os, sys\nfrom uproxy import linux\n"
        "linux.name_process(['uproxy', 'run', '--workload', 'web', 'and more' * 100])\n"
        "print(open('/proc/self/comm').read() + open('/proc/self/cmdline').read())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    name, shown = told.split("\n", 1)
    assert name == "uproxy run"
    assert shown.startswith("uproxy\0run\0--workload\0web\0and more")
