"""SO_ORIGINAL_DST on the accepted socket: 64 bytes for a uProxy, the sockaddr for any other program."""

from __future__ import annotations

import pickle
import socket

import pytest

from tests.bpf.dialling import dial
from tests.support.capture import PORT, VIP_V4, VIP_V6, listening

pytestmark = pytest.mark.root
SIZES = (64, 63, 28, 27, 16, 15, 200)


def every_size(connection: socket.socket) -> bytes:
    answers: dict[tuple[int, int], bytes | None] = {}
    for level in (socket.IPPROTO_IP, socket.IPPROTO_IPV6):
        for size in SIZES:
            try:
                answers[level, size] = connection.getsockopt(level, 80, size)
            except OSError:
                answers[level, size] = None
    return pickle.dumps(answers)


def ask(rig, vip):
    with listening(rig.site.netns, rig.site.proxy, [("127.0.0.1", 15001), ("::1", 15001)], every_size):
        return pickle.loads(rig.site.in_app(lambda: dial(vip)))


def test_v4(rig):
    answers = ask(rig, VIP_V4)
    sockaddr = b"\x02\x00" + PORT.to_bytes(2, "big") + socket.inet_aton(VIP_V4) + bytes(8)
    whole = answers[0, 64]
    assert len(whole) == 64
    assert whole[:28] == sockaddr + bytes(12)
    assert answers[0, 200] == whole
    for size in (63, 28, 27, 16):
        assert answers[0, size] == sockaddr, size
    assert answers[0, 15] is None


def test_v6(rig):
    answers = ask(rig, VIP_V6)
    sockaddr = b"\x0a\x00" + PORT.to_bytes(2, "big") + bytes(4) + socket.inet_pton(socket.AF_INET6, VIP_V6) + bytes(4)
    whole = answers[41, 64]
    assert len(whole) == 64
    assert whole[:28] == sockaddr
    for size in (63, 28):
        assert answers[41, size] == sockaddr, size
    for size in (27, 16, 15):
        assert answers[41, size] is None, size


def test_other_options_are_the_kernels(rig):
    def others(connection: socket.socket) -> bytes:
        return pickle.dumps(
            (
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE),
                connection.getsockopt(socket.IPPROTO_IP, socket.IP_TTL),
                len(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)) > 100,
            )
        )

    with listening(rig.site.netns, rig.site.proxy, [("127.0.0.1", 15001)], others):
        assert pickle.loads(rig.site.in_app(lambda: dial(VIP_V4))) == (socket.SOCK_STREAM, 64, True)


def test_a_listener_outside_the_proxy_cgroup_learns_nothing(rig):
    """The hook follows the cgroup in which the listener was made."""
    ends = [("127.0.0.1", 15001)]
    with listening(rig.site.netns, None, ends, every_size):
        answers = pickle.loads(rig.site.in_app(lambda: dial(VIP_V4)))
    assert not any(answer for answer in answers.values())
