"""Endpoints that failed come last, for seconds; trying again has a budget."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tests.support.pair import SERVICE_PORT, VIP
from tests.uproxy.test_resolve import endpoint, state_of
from uproxy.health import (
    BUDGET_FLOOR,
    BUDGET_SHARE,
    BUDGET_WINDOW_S,
    FIRST_S,
    LONGEST_S,
    MAX_REMEMBERED,
    Health,
    RetryBudget,
)
from uproxy.resolve import Resolver


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_failure_is_remembered_for_seconds_and_longer_when_it_comes_again() -> None:
    health = Health(clock := Clock())
    lasts = FIRST_S
    for _ in range(8):
        health.failed("a")
        health.failed("a")  # at once again: it was under way beside the first
        clock.now += lasts - 0.1
        assert health.is_bad("a")
        clock.now += 0.2
        assert not health.is_bad("a")
        lasts = min(2 * lasts, LONGEST_S)


def test_an_endpoint_that_works_is_forgotten() -> None:
    health = Health(clock := Clock())
    health.failed("a")
    clock.now += FIRST_S
    health.failed("a")
    health.worked("a")
    assert not health
    health.failed("a")
    clock.now += FIRST_S
    assert not health.is_bad("a"), "it begins anew"


def test_what_nobody_tries_again_is_forgotten_in_time_and_the_memory_is_bounded() -> None:
    health = Health(clock := Clock())
    for number in range(MAX_REMEMBERED + 10):
        health.failed(number)
    assert len(health) == MAX_REMEMBERED
    assert not health.is_bad(0)
    assert health.is_bad(MAX_REMEMBERED + 9)
    clock.now += FIRST_S + LONGEST_S + 1
    health.tick(clock.now)
    assert not health


def test_bad_endpoints_come_last_and_are_tried_when_there_is_no_other() -> None:
    health = Health(Clock())
    resolver = Resolver(state_of(*(endpoint(number) for number in range(1, 6))), random.Random(7), health)
    health.failed(b"10.0.0.1:7000")
    health.failed("10.0.0.2")
    for _ in range(200):
        assert {hop.address for hop in resolver.plan(VIP, SERVICE_PORT).hops} == {"10.0.0.3", "10.0.0.4", "10.0.0.5"}
    health.failed("10.0.0.3")
    health.failed("10.0.0.4")
    for _ in range(50):
        first, *others = (hop.address for hop in resolver.plan(VIP, SERVICE_PORT).hops)
        assert first == "10.0.0.5"
        assert len(others) == 2
    health.failed("10.0.0.5")
    assert len(resolver.plan(VIP, SERVICE_PORT).hops) == 3


def test_weights_hold_among_those_that_are_well() -> None:
    health = Health(Clock())
    endpoints = (endpoint(1, weight=1), endpoint(2, weight=3), endpoint(3, weight=100))
    resolver = Resolver(state_of(*endpoints), random.Random(7), health)
    health.failed("10.0.0.3")
    first = [resolver.plan(VIP, SERVICE_PORT).hops[0].address for _ in range(2000)]
    assert 400 < first.count("10.0.0.1") < 600
    assert "10.0.0.3" not in first


@given(st.lists(st.tuples(st.sampled_from(["tried", "again"]), st.floats(0.0, 3.0)), max_size=300))
def test_the_budget_holds_in_any_window(steps: list[tuple[str, float]]) -> None:
    budget = RetryBudget(clock := Clock())
    tried: list[float] = []
    again: list[float] = []
    for kind, pause in steps:
        clock.now += pause
        if kind == "tried":
            budget.tried()
            tried.append(clock.now)
        elif budget.allows():
            again.append(clock.now)
        recent = sum(at > clock.now - BUDGET_WINDOW_S for at in again)
        # Two windows are what the estimate is made of.
        offered = sum(at > clock.now - 3 * BUDGET_WINDOW_S for at in tried)
        assert recent <= 2 * (BUDGET_FLOOR + 1) + 2 * BUDGET_SHARE * offered


def test_a_quiet_process_may_always_try_some_again() -> None:
    budget = RetryBudget(clock := Clock())
    assert sum(budget.allows() for _ in range(100)) == BUDGET_FLOOR
    clock.now += 3 * BUDGET_WINDOW_S
    assert budget.allows()


def test_a_busy_process_may_try_a_fifth_again() -> None:
    budget = RetryBudget(Clock())
    for _ in range(1000):
        budget.tried()
    assert 205 <= sum(budget.allows() for _ in range(1000)) <= 215
