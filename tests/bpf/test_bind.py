"""The uProxy's ports are not the app's to take."""

from __future__ import annotations

import socket

import pytest

pytestmark = pytest.mark.root


def bind(family: int, kind: int, address: str, port: int) -> int:
    with socket.socket(family, kind) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((address, port))
        return sock.getsockname()[1]


@pytest.mark.parametrize("port", [15000, 15001, 15008, 15053, 15090])
@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_reserved_port_is_refused_to_the_app(rig, counted, port, family, address, kind):
    with pytest.raises(PermissionError, match="Permission denied"):
        rig.site.in_app(lambda: bind(family, kind, address, port))
    assert counted() == {"refused_bind": 1}


@pytest.mark.parametrize("port", [14999, 15091, 80, 0])
def test_other_ports_are_the_apps(rig, port):
    bound = rig.site.in_app(lambda: bind(socket.AF_INET, socket.SOCK_STREAM, "0.0.0.0", port))
    assert bound == port or port == 0


def test_the_uproxy_may_bind_its_own_ports(rig):
    assert rig.site.in_proxy(lambda: bind(socket.AF_INET6, socket.SOCK_STREAM, "::", 15008)) == 15008
