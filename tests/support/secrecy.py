"""Records every interface of hosts of the lab, and looks for what must not have been there."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from benchmarks.lab.capture import Capture, describe, occurs
from benchmarks.lab.topology import Host

_HBONE = 15008
_OPEN_PORT = 7007


@contextmanager
def nothing_in_the_clear(hosts: Sequence[Host], mark: bytes) -> Iterator[None]:
    """No packet of the block has the mark, nor is any TCP between these hosts and their workloads but tunnels."""
    open_mark = secrets.token_bytes(16)
    paths = [host.lab.directory / f"secrecy-{host.name}.pcap" for host in hosts]
    with ExitStack() as stack:
        captures = [
            stack.enter_context(Capture(host, path, everywhere=True)) for host, path in zip(hosts, paths, strict=True)
        ]
        yield
        _say_openly(hosts[0], hosts[-1], open_mark)
        for capture in captures:
            capture.await_segment(_OPEN_PORT)
    for capture in captures:
        found = capture.file_bytes()
        assert occurs(open_mark, found), "what is sent openly is found"
        assert not occurs(mark, found)
        others = [one for one in capture.segments() if not {_HBONE, _OPEN_PORT} & set(one.ports)]
        assert not others, describe(others)
    for path in paths:
        path.unlink()


def _say_openly(source: Host, destination: Host, mark: bytes) -> None:
    """What a leak would look like: from one host to the other, without a tunnel."""
    with destination.entered():
        listener = socket.create_server((destination.underlay_address, _OPEN_PORT))
    with listener:
        with source.entered():
            made = socket.create_connection((destination.underlay_address, _OPEN_PORT), timeout=30)
        with made, listener.accept()[0] as accepted:
            made.sendall(mark)
            assert accepted.recv(64) == mark
