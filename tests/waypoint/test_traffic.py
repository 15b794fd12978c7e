"""How much is let through: rate limits and concurrency against a model, and faults by chance."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control.api.address import parse_address
from control.api.policy import Target
from control.api.traffic import Fault, RateLimit, Share, TrafficPolicy
from tests.support.certificates import DB, WEB
from tests.support.examples import examples
from waypoint import traffic as module
from waypoint.caller import Caller
from waypoint.request import Request, read_request
from waypoint.traffic import Excess, Ledger, Place, Traffic

TARGETS = (Target("Service", "shop/db"),)
ANN = Caller(WEB, parse_address("10.0.0.1"), 1)
BEN = Caller(DB, parse_address("10.0.0.2"), 1)


def policy(*limits: RateLimit, name: str = "t", most: int = 0, faults: tuple[Fault, ...] = ()) -> TrafficPolicy:
    return TrafficPolicy("shop", name, TARGETS, limits, most, faults)


def traffic(*policies: TrafficPolicy, ledger: Ledger | None = None, seed: int = 1) -> Traffic:
    return Traffic(policies, ledger or Ledger(), random.Random(seed))


def request(user: str = "") -> Request:
    return read_request("GET", "/", [(b"host", b"db"), *([(b"x-user", user.encode())] if user else [])])


def enter(at: Traffic, now: float, caller: Caller = ANN, user: str = "", rule: str = "") -> Place | Excess | None:
    return at.enter(caller, request(user), rule, now)


def test_nobody_counts_where_nothing_is_said():
    assert enter(traffic(), 0.0) is None


def test_a_burst_and_then_the_rate():
    limited = traffic(policy(RateLimit(10, 1000, 3)))
    assert [isinstance(enter(limited, 5.0), Place) for _ in range(5)] == [True, True, True, False, False]
    found = enter(limited, 5.0)
    assert isinstance(found, Excess)
    assert found.policy == "shop/t"
    assert found.wait_s == pytest.approx(0.1)
    assert isinstance(enter(limited, 5.0 + found.wait_s + 1e-9), Place), "retry-after is kept"
    assert isinstance(enter(limited, 5.15), Excess)


@settings(max_examples=examples(200))
@given(
    st.integers(1, 5),
    st.integers(1, 8),
    st.lists(st.integers(0, 40), max_size=60),
)
def test_never_more_than_the_limit_in_any_stretch_of_time(requests, burst, pauses):
    """Within any time t, at most burst + t / interval; and nobody is refused who had a token."""
    limited, now = traffic(policy(RateLimit(requests, 100, burst))), 0.0
    interval, tokens, last = 0.1 / requests, float(burst), 0.0
    taken: deque[float] = deque()
    for pause in pauses:
        now += pause / 100
        tokens = min(float(burst), tokens + (now - last) / interval)
        last = now
        let_through = isinstance(enter(limited, now), Place)
        if abs(tokens - 1) > 1e-6:
            assert let_through is (tokens >= 1)
        if let_through:
            tokens -= 1
            taken.append(now)
    for first in range(len(taken)):
        for end in range(first, len(taken)):
            assert end - first + 1 <= burst + (taken[end] - taken[first]) / interval + 1e-6


@settings(max_examples=examples(200))
@given(st.floats(0, 1e7), st.sampled_from((1, 3, 7)), st.sampled_from((100, 1000, 3_600_000)))
def test_a_full_allowance_is_full_at_any_time(now, burst, per_ms):
    limited = traffic(policy(RateLimit(1, per_ms, burst)))
    assert [isinstance(enter(limited, now), Place) for _ in range(burst + 1)] == [True] * burst + [False]


def test_each_identity_and_each_value_of_a_header_has_its_own():
    by_identity = traffic(policy(RateLimit(1, 1000, 1, Share.IDENTITY)))
    assert isinstance(enter(by_identity, 0.0, ANN), Place)
    assert isinstance(enter(by_identity, 0.0, ANN), Excess)
    assert isinstance(enter(by_identity, 0.0, BEN), Place)
    by_header = traffic(policy(RateLimit(1, 1000, 1, Share.HEADER, "x-user")))
    for user in ("ann", "ben", "", "x" * 1000):
        assert isinstance(enter(by_header, 0.0, user=user), Place)
        assert isinstance(enter(by_header, 0.0, user=user), Excess)


def test_only_rules_that_are_named_count():
    limited = traffic(policy(RateLimit(1, 1000, 1, rules=("canary",))))
    assert isinstance(enter(limited, 0.0, rule="canary"), Place)
    assert isinstance(enter(limited, 0.0, rule="stable"), Place)
    assert isinstance(enter(limited, 0.0, rule="canary"), Excess)


def test_who_is_refused_by_one_takes_nothing_of_another():
    wide, narrow = RateLimit(2, 1000, 2), RateLimit(1, 1000, 1, Share.IDENTITY)
    limited = traffic(policy(wide, narrow, most=5))
    assert isinstance(enter(limited, 0.0, ANN), Place)
    assert isinstance(enter(limited, 0.0, ANN), Excess)
    assert isinstance(enter(limited, 0.0, ANN), Excess)
    assert isinstance(enter(limited, 0.0, BEN), Place), "the wide one has a token left"


def test_at_one_time():
    limited = traffic(policy(most=2), policy(name="u", most=3))
    places = [enter(limited, 0.0) for _ in range(2)]
    assert enter(limited, 0.0) == Excess("shop/t", 0.0)
    assert isinstance(places[0], Place)
    places[0].leave()
    assert isinstance(enter(limited, 0.0), Place)


def test_what_was_counted_outlives_a_change_of_something_else():
    ledger, first = Ledger(), policy(RateLimit(1, 1000, 1), most=1)
    place = enter(traffic(first, ledger=ledger), 0.0)
    ledger.forget([first])
    assert isinstance(enter(traffic(first, ledger=ledger), 0.0), Excess)
    ledger.forget([])
    assert isinstance(enter(traffic(first, ledger=ledger), 0.0), Excess), "that request is still under way"
    assert isinstance(place, Place)
    place.leave()
    other = replace(first, rate_limits=(RateLimit(2, 1000, 1),))
    assert isinstance(enter(traffic(other, ledger=ledger), 0.0), Place), "another limit counts anew"


def test_no_caller_has_more_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_SHARES", 10)
    limited, ledger = policy(RateLimit(1, 10_000, 1, Share.HEADER, "x-user")), Ledger()
    at = traffic(limited, ledger=ledger)
    assert all(isinstance(enter(at, 0.0, user=f"u{number}"), Place) for number in range(10))
    assert isinstance(enter(at, 2.0, user="more"), Place)
    assert isinstance(enter(at, 2.0, user="still more"), Excess), "together with the one before"
    assert isinstance(enter(at, 2.0, user="u1"), Excess)
    assert isinstance(enter(at, 30.0, user="later"), Place)
    assert len(ledger.bucket(limited, 0)._full_at) <= 11


def test_faults_by_chance():
    faults = (Fault(20, delay_ms=500), Fault(10, status=503))
    at = traffic(policy(faults=faults))
    found = [enter(at, 0.0) for _ in range(5000)]
    assert all(isinstance(one, Place) and one.delay_ms in (0, 500) and one.status in (0, 503) for one in found)
    delayed = sum(isinstance(one, Place) and one.delay_ms == 500 for one in found)
    aborted = sum(isinstance(one, Place) and one.status == 503 for one in found)
    assert 850 < delayed < 1150
    assert 400 < aborted < 600
    always = enter(traffic(policy(faults=(Fault(100, status=418),))), 0.0)
    assert isinstance(always, Place)
    assert always.status == 418
