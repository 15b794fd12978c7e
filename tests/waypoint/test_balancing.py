"""Which endpoint is chosen: each algorithm's shares, what comes first, and what is left alone. Chance is seeded."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control.api.address import parse_address
from control.api.balancing import (
    Algorithm,
    ConsistentHash,
    Failover,
    HashOf,
    LoadBalancing,
    OutlierDetection,
    Warmup,
)
from control.api.workload import Workload
from tests.support.certificates import DB
from tests.support.examples import examples
from uproxy.resolve import Hop
from waypoint.balancing import Balancer, Host

RANDOM = LoadBalancing(Algorithm.RANDOM)
ROUND_ROBIN = LoadBalancing(Algorithm.ROUND_ROBIN)
LEAST_REQUEST = LoadBalancing(Algorithm.LEAST_REQUEST)
HASHED = LoadBalancing(hash=ConsistentHash(HashOf.ADDRESS))
ONE_STRIKE = OutlierDetection(1, max_ejection_percent=100)

Endpoints = list[tuple[Hop, int]]


def hop(number: int, locality: str = "") -> Hop:
    address = parse_address(f"10.0.{number >> 8}.{number & 255}")
    workload = Workload("shop", f"db-{number}", "db", DB, (address,), {}, {}, "", 1, locality=locality)
    return Hop(address, DB, f"{address}:80".encode(), workload)


def endpoints(*weights: int) -> Endpoints:
    return [(hop(number), weight) for number, weight in enumerate(weights)]


def balancer(
    said: LoadBalancing | None,
    of: Endpoints,
    detection: OutlierDetection | None = None,
    own: str = "",
    seed: int = 1,
) -> Balancer:
    made = Balancer(random.Random(seed), lambda *_: None)
    made.configure(said, detection, own, of, 0.0)
    return made


def choose(made: Balancer, now: float = 0.0, where: int | None = None, tried: Iterable[Host] = ()) -> Host:
    found = made.choose(where, list(tried), None, now)
    assert found is not None
    return found


def shares(made: Balancer, count: int = 6000, now: float = 0.0) -> dict[str, float]:
    found = Counter(str(choose(made, now).hop.address) for _ in range(count))
    return {address: number / count for address, number in found.items()}


def number_of(host: Host) -> int:
    return int(host.hop.address.rpartition(".")[2])


# -- shares


@pytest.mark.parametrize("said", [RANDOM, ROUND_ROBIN, LEAST_REQUEST, None])
@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 7), (5,)])
def test_shares_are_by_weight(said, weights):
    found = shares(balancer(said, endpoints(*weights)))
    for number, weight in enumerate(weights):
        assert found[f"10.0.0.{number}"] == pytest.approx(weight / sum(weights), abs=0.03)


@settings(max_examples=examples(50))
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(0, 1000))
def test_in_turn_nobody_is_ever_more_than_one_ahead(weights, seed):
    """Of what is due to it by weight, at any time: that is what tells it from chance."""
    made, found = balancer(ROUND_ROBIN, endpoints(*weights), seed=seed), Counter[int]()
    for count in range(1, 3 * sum(weights)):
        found[number_of(choose(made))] += 1
        assert all(abs(found[n] - count * weight / sum(weights)) < 2 for n, weight in enumerate(weights))


def test_processes_do_not_go_in_step():
    assert len({number_of(choose(balancer(ROUND_ROBIN, endpoints(*[1] * 10), seed=seed))) for seed in range(30)}) > 5


def test_the_slow_one_gets_less():
    """Requests to one of four take ten times as long: under way there are about as many as elsewhere."""
    made, running = balancer(LEAST_REQUEST, endpoints(1, 1, 1, 1)), list[tuple[int, Host]]()
    found = Counter[int]()
    for now in range(8000):
        for end, host in [one for one in running if one[0] <= now]:
            host.under_way -= 1
            running.remove((end, host))
        host = choose(made)
        host.under_way += 1
        found[number_of(host)] += 1
        running.append((now + (200 if number_of(host) == 0 else 20), host))
    assert found[0] < 0.4 * found[1]
    by_chance = shares(balancer(RANDOM, endpoints(1, 1, 1, 1)))
    assert by_chance["10.0.0.0"] == pytest.approx(0.25, abs=0.03)


def test_under_way_is_by_weight_too():
    made, found = balancer(LEAST_REQUEST, endpoints(1, 4)), Counter[int]()
    for _ in range(500):  # none ends
        host = choose(made)
        host.under_way += 1
        found[number_of(host)] += 1
    assert found[1] / found[0] == pytest.approx(4, rel=0.2)


def test_alike_requests_go_to_one_endpoint_and_few_move_when_there_is_one_more():
    chance = random.Random(3)
    keys = [chance.getrandbits(64) for _ in range(3000)]
    made = balancer(HASHED, endpoints(*[1] * 10))
    before = [number_of(choose(made, where=key)) for key in keys]
    assert before == [number_of(choose(made, where=key)) for key in keys]
    made.configure(HASHED, None, "", endpoints(*[1] * 11), 0.0)
    moved = [new for key, old in zip(keys, before, strict=True) if (new := number_of(choose(made, where=key))) != old]
    assert set(moved) == {10}
    assert len(moved) / len(keys) == pytest.approx(1 / 11, abs=0.04)


def test_without_a_hash_a_request_goes_where_there_is_room():
    assert len(shares(balancer(HASHED, endpoints(1, 1, 1)))) == 3


# -- another one


@pytest.mark.parametrize("said", [RANDOM, ROUND_ROBIN, LEAST_REQUEST, HASHED])
def test_what_was_tried_comes_last(said):
    made = balancer(said, endpoints(1, 1, 1000))
    for where in range(100):
        tried = list[Host]()
        for _ in range(3):
            tried.append(choose(made, where=where if said is HASHED else None, tried=tried))
        assert len(set(tried)) == 3
        assert choose(made, where=where if said is HASHED else None, tried=tried) in tried


@pytest.mark.parametrize("said", [RANDOM, ROUND_ROBIN, LEAST_REQUEST, HASHED])
def test_what_failed_a_moment_ago_comes_last(said):
    made, where = balancer(said, endpoints(1, 1)), 5 if said is HASHED else None
    bad = {hop(0).authority}
    found = {made.choose(where, [], lambda one: one.authority in bad, 0.0) for _ in range(50)}
    assert [number_of(host) for host in found if host is not None] == [1]
    bad.add(hop(1).authority)
    assert made.choose(where, [], lambda one: one.authority in bad, 0.0) is not None


# -- new ones


@pytest.mark.parametrize("said", [Algorithm.ROUND_ROBIN, Algorithm.LEAST_REQUEST])
@pytest.mark.parametrize(
    ("warmup", "passed", "share"),
    [
        (Warmup(10_000), 0.0, 0.1),
        (Warmup(10_000), 5.0, 0.5),
        (Warmup(10_000, 30), 1.0, 0.3),
        (Warmup(10_000, 1, 200), 2.5, 0.5),
        (Warmup(10_000), 10.0, 1.0),
    ],
)
def test_a_new_endpoint_gets_its_share_little_by_little(said, warmup, passed, share):
    warming = LoadBalancing(said, warmup=warmup)
    made = balancer(warming, endpoints(1, 1))
    assert shares(made)["10.0.0.1"] == pytest.approx(0.5, abs=0.03), "those of the start are not new"
    made.configure(warming, None, "", endpoints(1, 1, 1), 100.0)
    assert shares(made, now=100.0 + passed)["10.0.0.2"] == pytest.approx(share / (2 + share), abs=0.03)


def test_when_all_are_new_all_are_equal():
    warming = LoadBalancing(Algorithm.LEAST_REQUEST, warmup=Warmup(10_000, 1))
    made = balancer(warming, endpoints(1))
    made.configure(warming, None, "", [(hop(n), 1) for n in (7, 8)], 0.0)
    assert shares(made)["10.0.0.7"] == pytest.approx(0.5, abs=0.03)


# -- those nearby

PLACES = ("eu/1/a", "eu/1/b", "eu/2/c", "us/1/d", "asia/1/e", "")
NEAR = LoadBalancing(Algorithm.RANDOM, local=True, failover=(Failover("eu", "asia"),))


def test_the_nearest_come_first_and_then_the_next():
    detection = OutlierDetection(1, max_ejection_percent=100)
    made = balancer(NEAR, [(hop(n, place), 1) for n, place in enumerate(PLACES)], detection, "eu/1/a")
    order = []
    for _ in PLACES:
        found = shares(made, 300, now=1.0)
        order.append(sorted(int(address.rpartition(".")[2]) for address in found))
        for host in {choose(made, now=1.0) for _ in range(50)}:
            made.answered(host, 500, 1.0)
        if order[-1] == [3, 5]:
            break
    assert order == [[0], [1], [2], [4], [3, 5]], "subzone, zone, region, the region to fail over to, all others"
    assert made.choose(None, [], None, 1.0) is None
    assert set(shares(made, 300, now=100.0)) == {"10.0.0.0"}, "they are back"


@pytest.mark.parametrize("said", [NEAR, LoadBalancing(hash=ConsistentHash(HashOf.ADDRESS), local=True)])
def test_a_level_gives_away_what_it_cannot_take(said):
    """Envoy's numbers: with 4 of 10 left, 1.4 * 40 % stay."""
    near = [(hop(n, "eu/1"), 1) for n in range(10)]
    made = balancer(said, [*near, *((hop(100 + n, "us/1"), 1) for n in range(10))], ONE_STRIKE, "eu/1")
    chance = random.Random(5)

    def stayed() -> float:
        found = Counter[int]()
        for _ in range(4000):
            found[number_of(choose(made, 1.0, chance.getrandbits(64) if said.hash is not None else None))] += 1
        assert max(found[n] for n in range(10)) < 2 * min(found[n] for n in range(10) if found[n]), "evenly"
        return sum(found[n] for n in range(10)) / 4000

    hosts = list(made._hosts.values())
    for host in hosts[:2]:
        made.answered(host, 500, 1.0)
    assert stayed() == 1.0
    for host in hosts[2:6]:
        made.answered(host, 500, 1.0)
    assert stayed() == pytest.approx(0.56, abs=0.04)


def test_a_waypoint_that_knows_not_where_it_is_prefers_nobody():
    assert len(shares(balancer(NEAR, [(hop(n, place), 1) for n, place in enumerate(PLACES)]))) == len(PLACES)


def test_what_failed_nearby_is_no_reason_to_fail():
    made = balancer(NEAR, [(hop(0, "eu/1/a"), 1), (hop(1, "us/1"), 1)], None, "eu/1/a")
    found = made.choose(None, [], lambda one: one == hop(0, "eu/1/a"), 0.0)
    assert found is not None
    assert number_of(found) == 1


# -- those that are ejected


@pytest.mark.parametrize("said", [RANDOM, ROUND_ROBIN, LEAST_REQUEST, HASHED])
def test_who_is_ejected_gets_nothing_until_it_is_back(said):
    told = list[str]()
    made = Balancer(random.Random(1), lambda hop, why: told.append(why))
    made.configure(said, ONE_STRIKE, "", endpoints(1, 1, 1), 0.0)
    chance = random.Random(2)

    def who(now: float) -> set[int]:
        return {number_of(choose(made, now, chance.getrandbits(64) if said is HASHED else None)) for _ in range(200)}

    assert who(1.0) == {0, 1, 2}
    (bad,) = [host for host in made._hosts.values() if number_of(host) == 1]
    made.answered(bad, 503, 1.0)
    assert told == ["1 times in a row 5xx or no answer; ejected for 30 s"]
    assert (who(1.0), who(30.9), len(made.ejected(30.9))) == ({0, 2}, {0, 2}, 1)
    assert (who(31.0), made.ejected(31.0)) == ({0, 1, 2}, [])


def test_a_change_of_something_else_brings_nobody_back():
    made = balancer(RANDOM, endpoints(1, 1, 1), ONE_STRIKE)
    made.answered(choose(made), 500, 0.0)
    made.configure(LEAST_REQUEST, ONE_STRIKE, "", endpoints(1, 1, 1, 1), 1.0)
    assert (len(shares(made, now=2.0)), len(made.ejected(2.0))) == (3, 1)
    made.configure(LEAST_REQUEST, None, "", endpoints(1, 1, 1, 1), 3.0)
    assert (len(shares(made, now=3.0)), made.ejected(3.0)) == (4, [])


def test_who_has_gone_leaves_room_for_another_ejection():
    half = OutlierDetection(1, max_ejection_percent=50)
    made = balancer(RANDOM, endpoints(1, 1), half)
    made.answered(made._hosts[hop(0).authority], 500, 0.0)
    made.configure(RANDOM, half, "", [(hop(1), 1), (hop(2), 1)], 1.0)
    made.answered(made._hosts[hop(1).authority], 500, 1.0)
    assert [number_of(host) for host in made.ejected(1.0)] == [1]


def test_with_too_few_left_all_get_requests():
    made = balancer(RANDOM, endpoints(1, 1, 1, 1), OutlierDetection(1, max_ejection_percent=100, min_health_percent=50))
    for count, left in ((1, 3), (2, 2), (3, 4)):
        (host, *_) = [host for host in made._hosts.values() if not host.record.ejected]
        made.answered(host, 500, 1.0)
        assert (len(made.ejected(1.0)), len(shares(made, now=1.0))) == (count, left)


# -- what it costs


@pytest.mark.parametrize("said", [RANDOM, ROUND_ROBIN, LEAST_REQUEST, HASHED])
def test_a_thousand_endpoints_cost_hardly_more_than_ten(said):
    """Ten times as much would be linear by far."""

    def cost(count: int) -> float:
        made = balancer(said, endpoints(*[1] * count))
        best = 1.0
        for turn in range(5):
            began = time.process_time()
            for number in range(300):
                made.choose((number * 0x9E3779B97F4A7C15 + turn) % 2**64 if said is HASHED else None, [], None, 0.0)
            best = min(best, time.process_time() - began)
        return best

    assert cost(1000) < 10 * cost(10)


# -- any history

_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("answered"), st.integers(0, 7), st.sampled_from([200, 500])),
        st.tuples(st.just("passed"), st.sampled_from([1, 10, 31, 100])),
        st.tuples(st.just("endpoints"), st.sets(st.integers(0, 7), min_size=1)),
    ),
    max_size=25,
)


@settings(max_examples=examples(120))
@given(_STEPS, st.sampled_from([RANDOM, ROUND_ROBIN, LEAST_REQUEST, HASHED, NEAR]), st.integers(0, 100))
def test_after_any_history_requests_go_to_whoever_is_there_and_not_ejected(steps, said, percent):
    """By a model that knows who is ejected until when, and nothing of how endpoints are chosen."""

    def known(numbers: Iterable[int]) -> Endpoints:
        return [(hop(number, PLACES[number % len(PLACES)]), 1 + number % 3) for number in sorted(numbers)]

    now, there = 0.0, set(range(8))
    ejections: dict[int, float] = {}
    made = Balancer(random.Random(1), lambda one, why: ejections.update({int(one.address.rpartition(".")[2]): now}))
    detection = OutlierDetection(1, max_ejection_percent=percent)
    made.configure(said, detection, "eu/1/a", known(there), now)
    out: dict[int, float] = {}
    for step in steps:
        match step:
            case ("answered", int(number), int(status)) if number in there:
                ejections.clear()
                made.answered(made._hosts[hop(number).authority], status, now)
                for one in ejections:
                    assert status == 500
                    assert one == number
                    out[one] = made._hosts[hop(one).authority].record.until
            case ("passed", int(seconds)):
                now += seconds
            case ("endpoints", set(numbers)):
                out = {number: until for number, until in out.items() if number in numbers}
                there = numbers
                made.configure(said, detection, "eu/1/a", known(there), now)
        left = there - {number for number, until in out.items() if until > now}
        found = {made.choose(where << 60 if said is HASHED else None, [], None, now) for where in range(16)}
        if not left:
            assert found == {None}
            continue
        went = {number_of(host) for host in found if host is not None}
        assert None not in found
        assert went <= left
        assert {number_of(host) for host in made.ejected(now)} == there - left
        if said is NEAR and len({PLACES[number % len(PLACES)] for number in there} & {PLACES[0]}) and left == there:
            assert {PLACES[number % len(PLACES)] for number in went} == {PLACES[0]}, "the nearest"
