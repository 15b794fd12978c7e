"""The agent's socket: whatever comes in, an answer goes out, and the next request is served."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
import threading
import time
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uproxy.node import server
from uproxy.node.client import NodeClient, NodeError
from uproxy.node.server import ListenError, RequestError

pytestmark = pytest.mark.root


def echo(request, descriptors):
    """Answers with what came; `op` chooses a failure."""
    match request.get("op"):
        case "refuse":
            raise RequestError("not today")
        case "break":
            raise RuntimeError("a bug")
    return {"request": request, "names": [os.readlink(f"/proc/self/fd/{fd}") for fd in descriptors]}


@contextlib.contextmanager
def serving(path):
    """A server in a thread of its own."""
    listener = server.listen(path)
    loop = asyncio.new_event_loop()
    task = None

    def run() -> None:
        nonlocal task
        task = loop.create_task(server.serve(listener, echo))
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(lambda: task.cancel())
        thread.join(30)
        listener.close()
        path.unlink()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    where = tmp_path_factory.mktemp("run") / "node.sock"
    with serving(where):
        yield where


def ask(path, raw: bytes, fds=()) -> dict | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(30)
        sock.connect(str(path))
        socket.send_fds(sock, [raw], list(fds))
        answer = sock.recv(1 << 20)
    return msgpack.unpackb(answer) if answer else None


def test_a_request_is_answered_with_its_descriptors(path, tmp_path):
    fds = [os.open(tmp_path, os.O_RDONLY), os.open("/", os.O_RDONLY)]
    answer = ask(path, msgpack.packb({"op": "echo", "n": 1}), fds)
    for fd in fds:
        os.close(fd)
    assert answer == {"ok": True, "request": {"op": "echo", "n": 1}, "names": [str(tmp_path), "/"]}


def test_descriptors_are_closed_after_every_request(path):
    before = len(os.listdir("/proc/self/fd"))
    for op in ("echo", "refuse", "break"):
        ask(path, msgpack.packb({"op": op}), [0, 1, 2])
    ask(path, b"\xc1", [0, 1])
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the server may not have closed its last connection yet


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"\xc1", "the request is not msgpack"),
        (msgpack.packb([1, 2]), "a request is a map with text keys"),
        (msgpack.packb({"op": "refuse"}), "not today"),
        (msgpack.packb({"op": "break"}), "the node agent failed (a bug); its log has the details"),
        (b"\x81", "the request is not msgpack"),
    ],
)
def test_what_is_wrong_is_said(path, raw, complaint):
    answer = ask(path, raw)
    assert answer["ok"] is False
    assert complaint in answer["error"]


@given(raw=st.binary(min_size=1, max_size=200))
def test_any_bytes_get_an_answer(path, raw):
    assert set(ask(path, raw)) >= {"ok"}


def test_too_much_is_refused(path):
    answer = ask(path, msgpack.packb({"op": "echo", "pad": "x" * 140_000}))
    assert "at most 131072 bytes" in answer["error"]
    assert "4 descriptors" in ask(path, msgpack.packb({"op": "echo"}), [0] * 5)["error"]


def ask_as_nobody(path) -> str:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            os.write(write, repr(ask(path, msgpack.packb({"op": "echo"}))).encode())
        except OSError as error:
            os.write(write, repr(error).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as source:
        said = source.read().decode()
    os.waitpid(child, 0)
    return said


def test_only_root_is_answered():
    """By the file's mode; and by the peer's uid, should somebody have opened the file up."""
    with tempfile.TemporaryDirectory(dir="/run") as public:
        os.chmod(public, 0o755)
        where = Path(public) / "node.sock"
        with serving(where):
            assert "Permission denied" in ask_as_nobody(where)
            where.chmod(0o666)
            assert "only root may ask" in ask_as_nobody(where)
            assert ask(where, msgpack.packb({"op": "echo"}))["ok"]


def test_silent_callers_do_not_keep_others_out(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "_TIMEOUT_S", 0.2)
    where = tmp_path / "node.sock"
    with serving(where), contextlib.ExitStack() as silent:
        for _ in range(40):
            sock = silent.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(str(where))
        deadline = time.monotonic() + 20
        while True:
            try:
                assert ask(where, msgpack.packb({"op": "echo"}))["ok"]
                break
            except BlockingIOError:
                assert time.monotonic() < deadline


def test_the_socket_is_for_root_only(path, tmp_path):
    where = tmp_path / "deep" / "node.sock"
    listener = server.listen(where)
    assert os.stat(where).st_mode & 0o777 == 0o600
    listener.close()


def test_a_dead_agents_socket_is_replaced_and_a_live_ones_not(tmp_path):
    where = tmp_path / "node.sock"
    first = server.listen(where)
    with pytest.raises(ListenError, match="another node agent listens there"):
        server.listen(where)
    first.close()
    server.listen(where).close()


def test_what_is_no_socket_is_not_removed(tmp_path):
    where = tmp_path / "node.sock"
    where.write_text("precious")
    with pytest.raises(ListenError, match="is no socket; remove it"):
        server.listen(where)
    assert where.read_text() == "precious"


def test_the_client_says_when_nobody_is_there(tmp_path):
    with pytest.raises(NodeError, match="No such file or directory; is `uproxy node` running"):
        NodeClient(tmp_path / "node.sock").status()
    listener = server.listen(tmp_path / "node.sock")
    with pytest.raises(NodeError, match=r"did not answer within 0\.1 s"):
        NodeClient(tmp_path / "node.sock", timeout_s=0.1).status()
    listener.close()
    with pytest.raises(NodeError, match="Connection refused; is `uproxy node` running"):
        NodeClient(tmp_path / "node.sock").status()


def test_the_client_passes_a_refusal_on(path):
    client = NodeClient(path)
    with pytest.raises(NodeError, match=r"^not today$"):
        client._call({"op": "refuse"})
