"""One attempt: where it goes, what is learnt of that, and that it is over once."""

from __future__ import annotations

import random

import pytest

from control.api.address import parse_address
from control.api.balancing import Algorithm, LoadBalancing, OutlierDetection
from tests.support.certificates import DB
from uproxy.errors import RefusedError
from uproxy.health import Health
from uproxy.resolve import Hop
from waypoint import telemetry as flags
from waypoint.balancing import Balancer
from waypoint.messages import END, Body, End, ResponseEvent, ResponseHead
from waypoint.refusal import RefusalError
from waypoint.turn import Turn

TWICE = OutlierDetection(2, 0, 2, max_ejection_percent=100)


class Endpoints:
    """Some, in turn."""

    def __init__(self, count: int = 4, detection: OutlierDetection = TWICE) -> None:
        self.ejected: list[str] = []
        self.health = Health(lambda: 0.0)
        self.balancer = Balancer(random.Random(1), lambda hop, why: self.ejected.append(hop.address))
        addresses = [parse_address(f"10.0.0.{number}") for number in range(count)]
        hops = [(Hop(address, DB, f"{address}:80".encode(), None), 1) for address in addresses]
        self.balancer.configure(LoadBalancing(Algorithm.ROUND_ROBIN), detection, "", hops, 0.0)
        self.hosts = list(self.balancer._hosts.values())

    def turn(self, *, grpc: bool = False) -> Turn:
        return Turn(self.balancer, self.health, lambda: 0.0, None, grpc=grpc)

    @property
    def under_way(self) -> int:
        return sum(host.under_way for host in self.hosts)


def head(status: int, **fields: str) -> ResponseHead:
    return ResponseHead(
        status, b"", [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
    )


def test_others_are_chosen_when_they_are_asked_for():
    endpoints = Endpoints()
    turn = endpoints.turn()
    assert turn[0] == turn[0]
    assert (len(turn.tried), endpoints.under_way) == (1, 1)
    hops = list(turn)
    assert len({hop.address for hop in hops}) == 3, "so many as are tried at most"
    assert list(turn) == hops, "again, where a connection was stale"
    assert endpoints.under_way == 1
    assert next(host for host in endpoints.hosts if host.under_way).hop == hops[-1]
    turn.leave()
    turn.leave()
    assert endpoints.under_way == 0
    assert len(list(Endpoints(2).turn())) == 2, "and no more than there are"


def test_who_was_not_reached_has_failed_once():
    endpoints = Endpoints(2)
    for _ in range(2):
        turn = endpoints.turn()
        assert len(list(turn)) == 2
        turn.lost(RefusalError(503, "connect-failed", "", flag=flags.BACKEND_UNREACHABLE))
        turn.leave()
    assert len(endpoints.ejected) == 2, "each twice"
    with pytest.raises(RefusedError, match="every endpoint has failed too often"):
        endpoints.turn()


@pytest.mark.parametrize(
    ("grpc", "events", "failed"),
    [
        (False, [head(200), Body(b"x"), END], False),
        (False, [head(500)], True),
        (False, [head(100), head(103)], False),
        (False, [head(100), head(503)], True),
        (False, [head(200, grpc_status="14"), END], False),
        (True, [head(200), Body(b"x"), End([(b"grpc-status", b"0")])], False),
        (True, [head(200), Body(b"x"), End([(b"grpc-status", b"14")])], True),
        (True, [head(200, grpc_status="13"), END], True),
        (True, [head(200), End([(b"grpc-status", b"5")])], False),
        (True, [head(200), End([(b"grpc-status", b"12")])], False),
        (True, [head(503), END], True),
    ],
)
def test_what_an_answer_says_of_the_endpoint(grpc: bool, events: list[ResponseEvent], failed: bool):
    endpoints = Endpoints(1)
    for _ in range(2):
        turn = endpoints.turn(grpc=grpc)
        turn.read(events)
        turn.read(events[-1:])
        turn.leave()
    assert bool(endpoints.ejected) is failed


@pytest.mark.parametrize(
    ("flag", "failed"),
    [
        (flags.BACKEND_BROKE, True),
        (flags.BACKEND_UNREACHABLE, True),
        (flags.TIMED_OUT, True),
        (flags.CALLER_GONE, False),
        (flags.MALFORMED, False),
        (flags.NO_FLAG, False),
    ],
)
def test_what_an_end_says_of_the_endpoint(flag: str, failed: bool):
    endpoints = Endpoints(1)
    for _ in range(2):
        turn = endpoints.turn()
        turn.lost(RefusalError(503, "x", "", flag=flag))
        turn.leave()
    assert bool(endpoints.ejected) is failed


def test_a_late_end_is_a_gateway_timeout():
    endpoints = Endpoints(1, OutlierDetection(0, 1, max_ejection_percent=100))
    endpoints.turn().lost(RefusalError(504, "timeout", "", flag=flags.TIMED_OUT))
    assert endpoints.ejected


def test_what_was_answered_and_then_broke_is_an_answer():
    endpoints = Endpoints(1)
    for _ in range(3):
        turn = endpoints.turn()
        turn.read([head(200)])
        turn.lost(RefusalError(502, "upstream", "", flag=flags.BACKEND_BROKE))
        turn.leave()
    assert not endpoints.ejected
