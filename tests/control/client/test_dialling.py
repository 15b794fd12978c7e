"""Happy Eyeballs: a name whose first address does not answer costs a quarter of a second, and leaves nothing open."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.client.dialling import ATTEMPT_DELAY_S, alternated, dial

INET, INET6 = socket.AF_INET, socket.AF_INET6
ANSWERS, REFUSES, SILENT = "127.0.0.1", "127.0.0.3", "127.0.0.2"
PATIENCE_S = 20.0


class Names:
    """What getaddrinfo() answers: addresses of loopback, as if the first few were of IPv6."""

    def __init__(self, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.port = port
        self.addresses: list[str] = []
        monkeypatch.setattr(socket, "getaddrinfo", self._answer)

    def _answer(self, host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        assert (host, port) == ("control.test", self.port)
        if not self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.addresses]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    """One port: somebody answers at ANSWERS, nobody listens at REFUSES, and at SILENT a backlog is full."""
    with (
        contextlib.ExitStack() as stack,
        socket.create_server((ANSWERS, 0)) as listener,
        socket.create_server((SILENT, listener.getsockname()[1]), backlog=0) as full,
    ):
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(full.getsockname())
        yield Names(listener.getsockname()[1], monkeypatch)


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    left = set(os.listdir("/proc/self/fd")) - before
    assert not [fd for fd in left if os.path.exists(f"/proc/self/fd/{fd}")]


def dialled(names: Names, *addresses: str, timeout_s: float = PATIENCE_S) -> tuple[str, float]:
    """Who answered, and after how long."""
    names.addresses = list(addresses)
    began = time.monotonic()
    with dial("control.test", names.port, timeout_s) as made:
        assert made.gettimeout() == timeout_s
        return made.getpeername()[0], time.monotonic() - began


def test_the_first_address_that_answers_is_taken_at_once(names: Names) -> None:
    who, took_s = dialled(names, ANSWERS, SILENT)
    assert who == ANSWERS
    assert took_s < PATIENCE_S / 2


def test_one_that_is_silent_delays_by_a_quarter_of_a_second(names: Names) -> None:
    who, took_s = dialled(names, SILENT, ANSWERS)
    assert who == ANSWERS
    assert ATTEMPT_DELAY_S <= took_s < PATIENCE_S / 2


def test_one_that_refuses_delays_nothing(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control.client.dialling.ATTEMPT_DELAY_S", PATIENCE_S)
    who, took_s = dialled(names, REFUSES, REFUSES, ANSWERS)
    assert who == ANSWERS
    assert took_s < PATIENCE_S / 2


def test_what_began_first_may_answer_last(names: Names) -> None:
    assert dialled(names, SILENT, REFUSES, SILENT, ANSWERS)[0] == ANSWERS


def test_when_all_refuse_that_is_said(names: Names) -> None:
    with pytest.raises(ConnectionRefusedError) as caught:
        dialled(names, REFUSES, REFUSES)
    assert caught.value.errno == errno.ECONNREFUSED


def test_all_of_it_ends_in_time(names: Names) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"nobody answered within 0\.4 s"):
        dialled(names, SILENT, SILENT, timeout_s=0.4)
    assert 0.4 <= time.monotonic() - began < PATIENCE_S / 2


def test_a_name_that_nobody_has_is_said(names: Names) -> None:
    with pytest.raises(socket.gaierror, match="not known"):
        dialled(names)


@given(st.lists(st.tuples(st.sampled_from([INET, INET6]), st.tuples(st.integers()))))
def test_families_take_turns_and_keep_their_own_order(addresses: list[tuple[socket.AddressFamily, tuple[int]]]) -> None:
    found = alternated(addresses)
    assert sorted(found) == sorted(addresses)
    assert found[:1] == addresses[:1]
    for family in (INET, INET6):
        assert [one for one in found if one[0] is family] == [one for one in addresses if one[0] is family]
    fewer = min(sum(one[0] is family for one in addresses) for family in (INET, INET6))
    turns = [one[0] for one in found[: 2 * fewer]]
    assert all(first is not second for first, second in itertools.pairwise(turns))
