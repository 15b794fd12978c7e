"""Connections that were made directly before a flip: which have to end, when, and how many at a time."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.api.address import parse_address
from control.api.gateway import Bound
from control.api.identity import SpiffeId
from control.api.workload import Workload
from tests.support.certificates import DB, WEB
from uproxy.admission import Admission
from uproxy.errors import Flag
from uproxy.overtaken import LONGEST_S, PATIENCE_S, QUIET_S, STEP_S, Direct, Overtaken

PROMETHEUS = SpiffeId.parse("spiffe://cluster.local/ns/ops/sa/prometheus")
WAYPOINT = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/wp")
WORKLOAD = Workload("shop", "db", "db", DB, (parse_address("10.0.0.2"),), {}, {}, "", 1)
GUARDED = Bound(80, ("shop/wp",), (PROMETHEUS,), enforced=True, guarded=True)


class Traffic:
    """A connection as far as it is looked at. `talks`: whether bytes move before each look."""

    def __init__(self, *, talks=False, answered=True, stalled=False):
        self.sent, self.received = 7, 3
        self.talks, self.answered, self.stalled = talks, answered, stalled
        self.ended = None

    def cut(self, text, flag):
        assert self.ended is None, "cut twice"
        self.ended = (text, flag)


class World:
    """Steps as the data plane takes them. `ended` says how many seconds after the flip each one ended."""

    def __init__(self, *traffic, bound=GUARDED):
        self.overtaken = Overtaken()
        self.direct = {Direct(one, WEB, 80): one for one in traffic}
        self.now = 1000.0
        self.ended = {}
        for direct in self.direct:
            self.overtaken.add(direct)
        self.overdue = self.overtaken.judge(admission(bound), self.now)

    def run(self, seconds):
        since = 1000.0
        for _ in range(int(seconds / STEP_S)):
            self.now += STEP_S
            for one in self.direct.values():
                one.sent += one.talks
            self.overtaken.step(self.now)
            for one in self.direct.values():
                if one.ended is not None:
                    self.ended.setdefault(one, self.now - since)
        return self


def admission(*bounds):
    return Admission(dataclasses.replace(WORKLOAD, bounds=bounds), (), WORKLOAD.identity.trust_domain)


def test_a_quiet_connection_ends_within_moments_and_says_why():
    quiet = Traffic()
    world = World(quiet).run(QUIET_S + 2 * STEP_S)
    assert QUIET_S <= world.ended[quiet] <= QUIET_S + 2 * STEP_S
    text, flag = quiet.ended
    assert flag is Flag.WAYPOINT
    assert text.startswith("waypoint-required: ")
    assert "shop/wp" in text


@pytest.mark.parametrize(
    "bound",
    [
        dataclasses.replace(GUARDED, guarded=False),
        dataclasses.replace(GUARDED, enforced=False),
        dataclasses.replace(GUARDED, port=81),
        dataclasses.replace(GUARDED, exempt=(WEB,)),
        dataclasses.replace(GUARDED, gateways=("shop/web",)),
    ],
    ids=["no policy", "not enforced", "another port", "exempt", "the waypoint itself"],
)
def test_others_stay_for_good(bound):
    assert str(WEB) == "spiffe://cluster.local/ns/shop/sa/web"
    world = World(Traffic(), bound=bound).run(2 * LONGEST_S)
    assert (world.overdue, world.ended) == (0, {})


def test_a_port_without_a_bound_of_its_own_has_that_of_all_ports():
    assert World(Traffic(), bound=dataclasses.replace(GUARDED, port=0)).run(3).ended


@pytest.mark.parametrize(
    "busy", [Traffic(talks=True), Traffic(answered=False), Traffic(stalled=True)], ids=["talks", "waits", "is stalled"]
)
def test_who_has_no_quiet_moment_is_left_alone_for_minutes_and_ends_all_the_same(busy):
    world = World(busy).run(PATIENCE_S - STEP_S)
    assert not world.ended
    world.run(LONGEST_S - PATIENCE_S + STEP_S)
    assert PATIENCE_S <= world.ended[busy] <= LONGEST_S


def test_a_moment_counts_from_the_last_byte():
    one = Traffic(talks=True)
    world = World(one).run(10)
    one.talks = False
    world.run(QUIET_S - STEP_S)
    assert not world.ended
    world.run(2 * STEP_S)
    assert world.ended


def test_what_is_let_off_is_let_off():
    busy = Traffic(talks=True)
    world = World(busy).run(10)
    assert world.overtaken.judge(admission(), world.now) == 0
    world.run(LONGEST_S)
    assert not world.ended
    world.overtaken.judge(admission(GUARDED), world.now)
    world.run(PATIENCE_S - STEP_S)
    assert not world.ended, "its time begins anew"
    world.run(LONGEST_S)
    assert world.ended


def test_a_change_of_something_else_gives_no_more_time():
    busy = Traffic(talks=True)
    world = World(busy)
    for _ in range(31):
        world.run(10)
        world.overtaken.judge(admission(GUARDED, Bound(81, ("shop/wp",), (), enforced=True)), world.now)
    assert world.ended[busy] <= LONGEST_S


def test_who_has_ended_by_itself_is_not_touched():
    one = Traffic(talks=True)
    world = World(one)
    (direct,) = world.direct
    world.overtaken.remove(direct)
    assert world.overtaken.step(world.now) == 0
    assert World(Traffic()).overtaken.judge(admission(), 0.0) == 0


def test_few_end_in_a_second():
    world = World(*(Traffic() for _ in range(100))).run(60)
    assert len(world.ended) == 100
    for second in range(60):
        assert sum(second < ended <= second + 1 for ended in world.ended.values()) <= 1 / STEP_S


def crowds(first, second, gap_s):
    """The most that end at one look, of two groups that a policy came to forbid at different times."""
    world = World(*first)
    world.run(gap_s)
    later = [Direct(one, WEB, 80) for one in second]
    for direct in later:
        world.overtaken.add(direct)
    world.overtaken.judge(admission(GUARDED), world.now)
    most, left = 0, sum(one.ended is None for one in [*first, *second])
    while left and world.now < 1000 + gap_s + LONGEST_S:
        world.now += STEP_S
        for one in [*first, *second]:
            one.sent += one.talks
        world.overtaken.step(world.now)
        before, left = left, sum(one.ended is None for one in [*first, *second])
        most = max(most, before - left)
    assert not left
    return most


def test_those_that_wait_for_their_moment_do_not_hold_up_those_whose_time_comes():
    busy, unanswered = [Traffic(talks=True) for _ in range(100)], [Traffic(answered=False) for _ in range(1100)]
    assert crowds(busy, unanswered, PATIENCE_S - 5) <= 6


def test_one_whose_time_comes_does_not_hurry_the_others():
    assert crowds([Traffic(talks=True)], [Traffic() for _ in range(2000)], PATIENCE_S - 2) <= 3


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 60))
def test_all_end_in_time_and_never_in_a_crowd(talks, times):
    world = World(*(Traffic(talks=one) for one in talks * times)).run(LONGEST_S)
    assert len(world.ended) == len(talks) * times
    moments = {}
    for ended in world.ended.values():
        moments[ended] = moments.get(ended, 0) + 1
    # At most what the last minute has to take, spread over it.
    assert max(moments.values()) <= -(-len(world.ended) // int((LONGEST_S - PATIENCE_S) / STEP_S)) + 1
