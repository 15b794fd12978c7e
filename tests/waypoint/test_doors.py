"""What a waypoint listens on: everything that was handed over, and as much more as it needs."""

from __future__ import annotations

import contextlib
import socket

import pytest

from control.api.address import HBONE_PORT, parse_address
from uproxy.doors import doors
from uproxy.listener import Inherited, opened
from uproxy.process import StartError

ADDRESSES = [parse_address("127.0.68.3"), parse_address("127.0.68.4")]


@pytest.mark.parametrize(("handed_over", "least", "found"), [(0, 1, 1), (0, 3, 3), (3, 1, 3), (2, 3, 3)])
def test_no_socket_that_was_handed_over_is_lost_and_no_worker_without_one(
    handed_over: int, least: int, found: int
) -> None:
    with contextlib.ExitStack() as stack:
        given = [
            stack.enter_context(opened(address, HBONE_PORT, shared=True))
            for _ in range(handed_over)
            for address in ADDRESSES
        ]
        inherited = Inherited()
        for sock in given:
            inherited.add(sock)
        made = doors(ADDRESSES, inherited, least)
        for sock in (one for door in made for one in door):
            stack.enter_context(sock)
        assert len(made) == found
        assert all([sock.getsockname()[0] for sock in door] == ADDRESSES for door in made)
        assert {sock for door in made for sock in door} >= set(given)


def test_an_address_of_others_is_told() -> None:
    with socket.create_server((ADDRESSES[0], HBONE_PORT)), pytest.raises(StartError, match=r"127\.0\.68\.3:15008"):
        doors(ADDRESSES, Inherited(), 1)
