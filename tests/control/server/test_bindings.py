"""The flip: no caller is refused while proxies change one by one, and nothing is enforced that cannot be kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from control.api.bindings import Canary, Standing, Wish, at_once
from control.api.gateway import Binding, Via
from control.api.status import ADDRESSES, Kind, ProxyStatus
from control.server.bindings import (
    LINGER_S,
    LONGEST_S,
    SWITCH_S,
    Phase,
    Report,
    Seen,
    State,
    Step,
    Trial,
    look,
    next_look,
    resumed,
    settled,
    standing,
    step,
    waits_for,
)
from tests.support.examples import examples

WEB = ("Service", "shop/web")
WP, OTHER, V2 = "shop/wp", "infra/other", "shop/wp-v2"
CANARY = Canary(V2, 10)
NONE = Standing((), enforced=False, binding=None)
READY = Seen(alive=True, ready=True, processes=(), destinations=(), callers=())
ABSENT = Seen(alive=False, ready=False, processes=(), destinations=(), callers=())


def wish(gateway=WP, *, optional=False, guarded=False, canary=None):
    return Wish(gateway, optional, guarded, canary)


def state(phase, *, gateway=WP, previous="", optional=False, stamp=(1, 1), since=0.0, trial=None):
    return State(gateway, previous, phase, optional, stamp, since, trial)


def patience_of_trial(trial):
    """How long proxies that are there are waited for, for a canary's sake."""
    return LINGER_S + LONGEST_S if trial.step is Step.LEAVING else LONGEST_S


def patience(old):
    """How long proxies that are there are waited for."""
    if old.phase is Phase.SWITCHING:
        return LINGER_S + LONGEST_S if old.previous else SWITCH_S
    return LONGEST_S


@dataclass
class Proxy:
    """Somebody who applies what is published later than it is published, but in order."""

    applied: int = -1
    """Number of the last publication."""
    live: bool = True
    excused: bool = False
    """It was waited for in vain, or was away: until it has caught up, it may be refused."""


class Flips(RuleBasedStateMachine):
    """One service; three waypoints with two processes each, two callers, two destinations."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.wish = None
        self.state = None
        self.published = [NONE]
        """What proxies see, one for each stamp."""
        self.was_refused = [False]
        self.callers = [Proxy(0), Proxy(0)]
        self.destinations = [Proxy(0), Proxy(0)]
        self.waypoints = {one: [Proxy(0), Proxy(0)] for one in (WP, OTHER, V2)}
        self.readied = set()

    # What happens in the world

    @rule(
        gateway=st.sampled_from([WP, WP, OTHER]),
        optional=st.sampled_from([False, False, False, True]),
        guarded=st.sampled_from([False, False, False, True]),
        canary=st.sampled_from([None, CANARY, CANARY, Canary(V2, 60), Canary(OTHER, 10)]),
    )
    def label(self, gateway, optional, guarded, canary):
        canary = None if canary is None or canary.gateway == gateway else canary
        self.wish = wish(gateway, optional=optional, guarded=guarded, canary=canary)
        self.go_on()

    @precondition(lambda self: self.wish)
    @rule(percent=st.sampled_from([None, 0, 50, 100]))
    def annotate(self, percent):
        self.wish = replace(self.wish, canary=None if percent is None else Canary(V2, percent))
        self.go_on()

    @precondition(lambda self: self.wish)
    @rule()
    def unlabel(self):
        self.wish = None
        self.go_on()

    @rule(data=st.data())
    def somebody_applies(self, data):
        behind = [proxy for proxy in self.proxies() if proxy.applied < len(self.published) - 1]
        if behind:
            proxy = data.draw(st.sampled_from(behind))
            proxy.applied = data.draw(st.integers(proxy.applied + 1, len(self.published) - 1))
            self.forgive()
            self.go_on()

    @rule(data=st.data())
    def one_kind_applies(self, data):
        kinds = [self.callers, self.destinations, *self.waypoints.values()]
        for proxy in data.draw(st.sampled_from(kinds)):
            if proxy.live:
                proxy.applied = len(self.published) - 1
        self.forgive()
        self.go_on()

    @rule(times=st.integers(1, 3))
    def everybody_applies(self, times):
        for _ in range(times):
            for proxy in self.proxies():
                if proxy.live:
                    proxy.applied = len(self.published) - 1
            self.forgive()
            self.go_on()

    @rule(data=st.data(), times=st.integers(1, 3))
    def everybody_but_one_applies(self, data, times):
        straggler = data.draw(st.sampled_from(self.proxies()))
        for _ in range(times):
            for proxy in self.proxies():
                if proxy.live and proxy is not straggler:
                    proxy.applied = len(self.published) - 1
            self.forgive()
            self.go_on()

    @rule(seconds=st.sampled_from([0.1, 0.1, 1.0, SWITCH_S, LONGEST_S, LINGER_S]))
    def time_passes(self, seconds):
        self.now += seconds
        self.go_on()

    @precondition(lambda self: self.now > 1.0)
    @rule(data=st.data())
    def somebody_goes_or_comes_back(self, data):
        proxy = data.draw(st.sampled_from(self.proxies()))
        proxy.live = not proxy.live
        proxy.excused = True
        self.forgive()
        self.go_on()

    @rule()
    def the_control_plane_restarts(self):
        if self.state is not None:
            self.state = resumed({WEB: self.state}, self.now)[WEB]
        self.go_on()

    # What follows

    def go_on(self):
        old = self.state
        seen = self.seen()
        if seen.ready and old is not None:
            self.readied.add(old.gateway)
        if seen.canary:
            self.readied.add(old.trial.canary.gateway)
        stamp = (1, len(self.published))
        self.state = step(old, self.wish, seen, self.now, stamp)
        if self.state is None:
            self.readied.clear()
        before, after = (standing(one) if one else NONE for one in (old, self.state))
        if old and self.state is not old and self.now - old.since >= patience(old):
            self.excuse(old, self.proxies())
        elif old and self.state is not old and self.hurries(old):
            self.excuse(old, self.waypoints[old.gateway])
        elif old and old.trial and self.state is not old and self.now - old.trial.since >= patience_of_trial(old.trial):
            self.excuse(old, self.proxies())
        if before != after:
            self.published.append(after)
            self.was_refused.append(bool(self.state and self.state.phase is Phase.REFUSED))

    def seen(self):
        stamp = self.state.stamp[1] if self.state else 0
        needed = min(stamp, len(self.published) - 1)
        gateway = self.state.gateway if self.state else self.wish.gateway if self.wish else WP
        processes = {f"w{number}": one for number, one in enumerate(self.waypoints[gateway]) if one.live}
        trial = self.state.trial if self.state else None
        canaries = [one for one in self.waypoints[trial.canary.gateway] if one.live] if trial else []
        return Seen(
            bool(processes),
            any(one.applied >= needed for one in processes.values()),
            tuple(name for name, one in processes.items() if one.applied < needed),
            tuple(f"d{number}" for number, one in enumerate(self.destinations) if one.live and one.applied < needed),
            tuple(f"c{number}" for number, one in enumerate(self.callers) if one.live and one.applied < needed),
            bool(canaries) and all(one.applied >= needed for one in canaries),
        )

    def hurries(self, old):
        """Whether a policy makes it go on when one process of a waypoint is ready."""
        if old.phase is Phase.PENDING:
            return self.wish and self.wish.guarded and not old.previous and self.now - old.since >= SWITCH_S
        return old.phase is Phase.REFUSED

    def excuse(self, old, proxies):
        """Time is up, and the flip goes on although somebody lags."""
        for proxy in proxies:
            if proxy.applied < min(old.stamp[1], len(self.published) - 1):
                proxy.excused = True

    def forgive(self):
        for proxy in self.proxies():
            if proxy.applied == len(self.published) - 1 and proxy.live:
                proxy.excused = False

    def proxies(self):
        return [*self.callers, *self.destinations, *(one for them in self.waypoints.values() for one in them)]

    @invariant()
    def nobody_is_refused(self):
        for caller in self.callers:
            for destination in self.destinations:
                if caller.live and destination.live and not caller.excused and not destination.excused:
                    self.check_connection(caller, destination)

    def check_connection(self, caller, destination):
        oldest = min(caller.applied, destination.applied)
        if any(self.was_refused[oldest:]):
            return  # an L7 policy was not to be missed
        seen, demanded = self.published[caller.applied], self.published[destination.applied]
        if seen.binding is None:
            assert not demanded.enforced, "a caller goes directly and is refused"
            return
        assert seen.binding.via is not Via.REFUSE
        for gateway in seen.binding.gateways:
            assert gateway in demanded.gateways, "a destination does not know the waypoint that a caller goes through"
            for process in self.waypoints[gateway]:
                if process.live and not process.excused:
                    assert gateway in self.published[process.applied].gateways, "a waypoint does not know the service"

    @invariant()
    def nothing_is_bound_before_a_waypoint_was_ready(self):
        if self.state and self.state.phase in (Phase.SWITCHING, Phase.ENFORCED, Phase.RELEASING):
            assert self.state.gateway in self.readied
        if self.state and self.state.previous:
            assert self.state.previous in self.readied
        if self.state and self.state.trial and self.state.trial.step is not Step.PREPARING:
            assert self.state.trial.canary.gateway in self.readied

    @invariant()
    def whoever_goes_to_a_canary_could_go_to_its_waypoint(self):
        for seen in self.published[-1:]:
            if seen.binding and seen.binding.canary:
                assert set(seen.binding.gateways) <= set(seen.gateways)
                assert seen.binding.via is not Via.REFUSE

    @invariant()
    def refusal_is_for_policies(self):
        if self.state and self.state.phase is Phase.REFUSED:
            assert standing(self.state).enforced

    @invariant()
    def stamps_only_rise(self):
        if self.state:
            assert self.state.stamp[1] <= len(self.published)

    @initialize(bound=st.booleans())
    def begin(self, bound):
        if bound:
            self.label(WP, False, False, None)
            self.everybody_applies(3)

    def teardown(self):
        """Whoever is there follows; then everything ends as labels say."""
        for proxy in self.proxies():
            proxy.live, proxy.excused = True, False
        for _ in range(16):
            for proxy in self.proxies():
                proxy.applied = len(self.published) - 1
            self.now += LINGER_S
            self.go_on()
        if self.wish is None:
            assert self.state is None
        else:
            assert self.state.phase is Phase.ENFORCED
            assert standing(self.state) == at_once(self.wish)


def test_no_history_of_labels_reports_and_restarts_refuses_anybody():
    run_state_machine_as_test(Flips, settings=settings(max_examples=examples(300), stateful_step_count=30))


# -- one by one


def test_the_whole_way_and_back():
    phases = []
    found = None
    for asked in [wish()] * 4 + [None] * 5:
        found = step(found, asked, READY, 0.0, (1, len(phases)))
        phases.append(found and found.phase)
    assert phases[:4] == [Phase.PENDING, Phase.SWITCHING, Phase.ENFORCED, Phase.ENFORCED]
    assert phases[4:] == [Phase.RELEASING, Phase.LEAVING, *[Phase.LINGERING] * 3]
    assert step(found, None, READY, LINGER_S, (1, 9)) is None


def test_what_does_not_change_is_the_same_state():
    old = state(Phase.ENFORCED)
    assert step(old, wish(), READY, 9.0, (1, 9)) is old


def test_a_waypoint_that_disappears_changes_nothing():
    old = state(Phase.ENFORCED)
    assert step(old, wish(guarded=True), ABSENT, 1e6, (1, 9)) is old


def test_pending_waits_for_a_waypoint_however_long():
    old = state(Phase.PENDING)
    assert step(old, wish(), ABSENT, 1e6, (1, 9)) is old
    assert standing(old) == Standing((WP,), enforced=False, binding=None)


@pytest.mark.parametrize(
    ("phase", "waited", "follows"),
    [
        (Phase.SWITCHING, SWITCH_S - 1, Phase.SWITCHING),
        (Phase.SWITCHING, SWITCH_S, Phase.ENFORCED),
        (Phase.RELEASING, LONGEST_S - 1, Phase.RELEASING),
        (Phase.RELEASING, LONGEST_S, Phase.LEAVING),
        (Phase.LEAVING, LONGEST_S - 1, Phase.LEAVING),
        (Phase.LEAVING, LONGEST_S, Phase.LINGERING),
        (Phase.PENDING, LONGEST_S - 1, Phase.PENDING),
        (Phase.PENDING, LONGEST_S, Phase.SWITCHING),
        (Phase.REFUSED, LONGEST_S - 1, Phase.REFUSED),
        (Phase.REFUSED, LONGEST_S, Phase.ENFORCED),
    ],
)
def test_stragglers_are_waited_for_so_long_and_no_longer(phase, waited, follows):
    lagging = Seen(alive=True, ready=True, processes=(), destinations=("shop/web-1",), callers=("shop/a",))
    asked = None if phase in (Phase.RELEASING, Phase.LEAVING) else wish(guarded=phase is Phase.REFUSED)
    assert step(state(phase), asked, lagging, waited, (1, 2)).phase is follows


def test_each_process_of_a_waypoint_is_waited_for_so_long_and_no_longer():
    half = replace(READY, processes=("shop/wp-2",))
    assert waits_for(state(Phase.PENDING), half) == ("shop/wp-2",)
    found = [
        step(state(phase), wish(guarded=guarded), half, waited, (1, 2)).phase
        for phase, guarded, waited in (
            (Phase.PENDING, False, LONGEST_S - 1),
            (Phase.PENDING, False, LONGEST_S),
            (Phase.PENDING, True, SWITCH_S - 1),
            (Phase.PENDING, True, SWITCH_S),
            (Phase.REFUSED, True, 0.0),
        )
    ]
    assert found == [Phase.PENDING, Phase.SWITCHING, Phase.PENDING, Phase.SWITCHING, Phase.ENFORCED]


@pytest.mark.parametrize(
    ("seen", "waited", "follows"),
    [
        (ABSENT, 0.0, Phase.REFUSED),
        (replace(ABSENT, alive=True), SWITCH_S - 1, Phase.PENDING),
        (replace(ABSENT, alive=True), SWITCH_S, Phase.REFUSED),
        (READY, SWITCH_S, Phase.SWITCHING),
    ],
)
def test_an_l7_policy_is_missed_only_while_a_waypoint_takes_up_its_configuration(seen, waited, follows):
    assert step(state(Phase.PENDING), wish(guarded=True), seen, waited, (1, 2)).phase is follows
    assert (
        step(state(Phase.PENDING), wish(guarded=True, optional=True), seen, waited, (1, 2)).phase is not Phase.REFUSED
    )


def test_a_policy_that_goes_lets_calls_pass_again():
    assert step(state(Phase.REFUSED), wish(), ABSENT, 9.0, (1, 2)).phase is Phase.PENDING


def test_from_one_waypoint_to_another_is_never_open():
    moving = step(state(Phase.ENFORCED), wish(OTHER), ABSENT, 0.0, (1, 2))
    assert standing(moving) == Standing((OTHER, WP), enforced=True, binding=Binding(WP, Via.WAYPOINT))
    assert step(moving, wish(OTHER, guarded=True), ABSENT, 1e6, (1, 3)) is moving
    moved = step(moving, wish(OTHER), READY, 10.0, (1, 3))
    assert standing(moved) == Standing((OTHER, WP), enforced=True, binding=Binding(OTHER, Via.WAYPOINT))
    assert settled(moved, READY)
    assert step(moved, wish(OTHER), READY, 9.0 + LINGER_S, (1, 4)) is moved
    done = step(moved, wish(OTHER), READY, 10.0 + LINGER_S, (1, 4))
    assert standing(done) == at_once(wish(OTHER))


def test_another_waypoint_while_it_is_released_never_opens_the_direct_way():
    moving, through = state(Phase.RELEASING), []
    for number in range(2, 5):
        moving = step(moving, wish(OTHER, guarded=True), replace(READY, ready=False), 0.0, (1, number))
        through.append((moving.phase, moving.gateway, moving.previous, standing(moving).binding))
    assert through == [
        (Phase.SWITCHING, WP, "", Binding(WP, Via.WAYPOINT)),
        (Phase.ENFORCED, WP, "", Binding(WP, Via.WAYPOINT)),
        (Phase.PENDING, OTHER, WP, Binding(WP, Via.WAYPOINT)),
    ]


@pytest.mark.parametrize("phase", [Phase.RELEASING, Phase.LEAVING])
def test_who_moved_and_was_released_and_is_wanted_again_enforces_nothing_before_callers_follow(phase):
    old = state(phase, gateway=OTHER, previous=WP)
    lagging = replace(READY, callers=("shop/a",))
    assert step(old, wish(OTHER), lagging, LONGEST_S - 1, (1, 2)) is old
    again = step(old, wish(OTHER), lagging, LONGEST_S, (1, 2))
    assert again == step(old, wish(OTHER), READY, LONGEST_S, (1, 2))
    assert standing(again) == Standing((OTHER,), enforced=False, binding=Binding(OTHER, Via.WAYPOINT))


@pytest.mark.parametrize(
    ("asked", "seen", "follows"),
    [
        (wish(), READY, Phase.SWITCHING),
        (wish(OTHER, guarded=True), READY, Phase.SWITCHING),
        (wish(OTHER), READY, Phase.LEAVING),
        (wish(guarded=True), ABSENT, Phase.LEAVING),
    ],
)
def test_who_leaves_comes_back_where_a_policy_must_not_be_missed_and_the_waypoint_is_ready(asked, seen, follows):
    assert step(state(Phase.LEAVING), asked, replace(seen, callers=("shop/a",)), 1.0, (1, 2)).phase is follows


@pytest.mark.parametrize("phase", [Phase.PENDING, Phase.REFUSED])
def test_what_was_wanted_again_for_a_moment_goes_on_lingering(phase):
    lingers = step(state(phase), None, replace(ABSENT, alive=True), 7.0, (1, 2))
    assert (lingers.phase, lingers.gateway, lingers.since) == (Phase.LINGERING, WP, 7.0)
    assert step(state(phase), None, ABSENT, 7.0, (1, 2)) is None


def test_optional_is_never_enforced():
    for phase in Phase:
        if phase is not Phase.REFUSED:
            assert not standing(state(phase, optional=True)).enforced
    changed = step(state(Phase.ENFORCED, optional=True), wish(), READY, 9.0, (1, 2))
    assert (changed.phase, changed.stamp, changed.since) == (Phase.ENFORCED, (1, 2), 0.0)
    assert standing(changed).enforced


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("previous", ["", OTHER])
def test_whatever_waits_for_time_is_looked_at_in_time(phase, previous):
    """Time alone takes a state further at a look, and never between two."""
    lagging = Seen(alive=True, ready=True, processes=(), destinations=("shop/web-1",), callers=("shop/a",))
    old = state(phase, previous=previous)
    asked = wish(guarded=True) if phase not in (Phase.RELEASING, Phase.LEAVING, Phase.LINGERING) else None
    looks, now = [0.0], 0.0
    while (wait := next_look(old, now)) is not None:
        now += wait
        looks.append(now)
    phases = [step(old, asked, lagging, at, (1, 2)) for at in looks]
    for at, found, later in zip(looks, phases, [*looks[1:], 1e6], strict=True):
        follows = step(old, asked, lagging, at + (later - at) * 0.99, (1, 2))
        assert (follows and follows.phase) == (found and found.phase)


def test_only_what_is_under_way_begins_anew_after_a_restart():
    states = {WEB: state(Phase.SWITCHING), ("Service", "shop/db"): state(Phase.ENFORCED)}
    assert [one.since for one in resumed(states, 50.0).values()] == [50.0, 0.0]
    leaving = {WEB: state(Phase.ENFORCED, trial=Trial(CANARY, Step.LEAVING, 0.0))}
    assert [(one.since, one.trial.since) for one in resumed(leaving, 50.0).values()] == [(0.0, 50.0)]


# -- canaries


def test_a_canary_gets_its_share_when_it_is_ready_and_destinations_take_it_and_goes_when_callers_have_left():
    old, found = state(Phase.ENFORCED), []
    lagging = replace(READY, canary=True, destinations=("shop/web-1",))
    for number, (canary, seen, now) in enumerate(
        [
            (CANARY, READY, 0.0),
            (CANARY, READY, 1e6),
            (CANARY, lagging, LONGEST_S - 1),
            (CANARY, replace(READY, canary=True), 1.0),
            (Canary(V2, 60), READY, 2.0),
            (None, READY, 10.0),
            (None, replace(READY, callers=("shop/a",)), 10.0 + LINGER_S),
            (None, READY, 10.0 + LINGER_S),
        ]
    ):
        old = step(old, wish(canary=canary), seen, now, (1, number))
        found.append((old.trial and old.trial.step, len(standing(old).gateways), standing(old).binding.percent))
    assert found == [
        (Step.PREPARING, 2, 0),
        (Step.PREPARING, 2, 0),
        (Step.PREPARING, 2, 0),
        (Step.SHARING, 2, 10),
        (Step.SHARING, 2, 60),
        (Step.LEAVING, 2, 0),
        (Step.LEAVING, 2, 0),
        (None, 1, 0),
    ]


def test_stragglers_of_a_canary_are_waited_for_so_long_and_no_longer():
    lagging = replace(READY, canary=True, destinations=("shop/web-1",), callers=("shop/a",))
    preparing, leaving = (
        state(Phase.ENFORCED, trial=Trial(CANARY, one, 0.0)) for one in (Step.PREPARING, Step.LEAVING)
    )
    assert next_look(preparing, 0.0) == LONGEST_S
    assert step(preparing, wish(canary=CANARY), lagging, LONGEST_S, (1, 2)).trial.step is Step.SHARING
    assert next_look(leaving, LINGER_S) == LONGEST_S
    assert step(leaving, wish(), lagging, LINGER_S + LONGEST_S, (1, 2)).trial is None


def test_another_canary_waits_until_the_one_before_is_gone():
    sharing = state(Phase.ENFORCED, trial=Trial(CANARY, Step.SHARING, 0.0))
    other = wish(canary=Canary(OTHER, 10))
    leaving = step(sharing, other, replace(READY, canary=True), 1.0, (1, 2))
    assert leaving.trial == Trial(CANARY, Step.LEAVING, 1.0)
    gone = step(leaving, other, READY, 1.0 + LINGER_S, (1, 3))
    assert step(gone, other, READY, 500.0, (1, 4)).trial == Trial(Canary(OTHER, 10), Step.PREPARING, 500.0)


@pytest.mark.parametrize("phase", [Phase.PENDING, Phase.REFUSED, Phase.SWITCHING])
def test_no_canary_before_its_waypoint_is_enforced(phase):
    seen = replace(ABSENT, callers=("shop/a",), canary=True)
    assert step(state(phase), wish(canary=CANARY, guarded=True), seen, 0.0, (1, 2)).trial is None


def test_a_canary_leaves_with_its_waypoint():
    old = state(Phase.ENFORCED, trial=Trial(CANARY, Step.SHARING, 0.0))
    released = step(old, None, READY, 5.0, (1, 2))
    assert (released.phase, released.trial.step) == (Phase.RELEASING, Step.LEAVING)
    assert standing(released).binding == Binding(WP, Via.WAYPOINT)


def test_what_is_waited_for_of_a_canary():
    preparing = state(Phase.ENFORCED, trial=Trial(CANARY, Step.PREPARING, 0.0))
    assert not settled(preparing, READY)
    assert waits_for(preparing, READY) == ("a process of Gateway shop/wp-v2 that has its configuration",)
    sharing = state(Phase.ENFORCED, trial=Trial(CANARY, Step.SHARING, 0.0))
    assert settled(sharing, READY)
    assert not settled(sharing, replace(READY, callers=("shop/a",)))


def test_settled_and_what_is_waited_for():
    lagging = Seen(alive=True, ready=True, processes=(), destinations=("shop/web-1",), callers=("shop/a", "shop/web-1"))
    assert settled(state(Phase.ENFORCED), READY)
    assert not settled(state(Phase.ENFORCED), lagging)
    assert waits_for(state(Phase.ENFORCED), lagging) == ("shop/a", "shop/web-1")
    assert not settled(state(Phase.SWITCHING), READY)
    assert waits_for(state(Phase.SWITCHING), lagging) == ("shop/a", "shop/web-1")
    assert waits_for(state(Phase.RELEASING), lagging) == ("shop/web-1",)
    assert waits_for(state(Phase.PENDING), ABSENT) == ("a process of Gateway shop/wp: none is there",)
    assert settled(state(Phase.LINGERING), lagging)


# -- what reports say


def report(workload, kind=Kind.UPROXY, *, whole=True, proxy_hash="h", **roots):
    stamps = {(ADDRESSES if name == "addr" else name): (1, version, 0) for name, version in roots.items()}
    return Report(proxy_hash, ProxyStatus(kind, workload, "1", True, whole, (), stamps, 0, "ab", 2**33, ()))


PUBLISHED = {"shop": (1, 7, 0), "infra": (1, 4, 0), ADDRESSES: (1, 7, 0)}


def looked(
    *reports,
    gateway=WP,
    version=7,
    instances=None,
    destinations=frozenset({"shop/web-1"}),
    all_needed=frozenset(),
    trial=None,
):
    return look(
        WEB,
        state(Phase.PENDING, gateway=gateway, stamp=(1, version), trial=trial),
        reports,
        PUBLISHED,
        {"shop/wp-1": "w"} if instances is None else instances,
        {"shop/v2-1": "v", "shop/v2-2": "v"},
        destinations,
        all_needed=all_needed,
    )


def test_callers_are_those_who_know_of_the_namespace_or_of_all_addresses():
    found = looked(
        report("shop/a", shop=6),
        report("shop/b", shop=7),
        report("shop/c", infra=1),
        report("mesh-system/node-x", Kind.NODE, addr=6),
        report("mesh-system/node-y", Kind.NODE, addr=7),
    )
    assert found == Seen(
        alive=False, ready=False, processes=(), destinations=(), callers=("mesh-system/node-x", "shop/a")
    )


def test_a_destination_must_have_it_even_when_it_says_nothing_of_the_namespace():
    assert looked(report("shop/web-1", infra=9)).destinations == ("shop/web-1",)
    assert looked(report("shop/web-1", shop=7)).destinations == ()


@pytest.mark.parametrize(
    ("process", "alive", "ready"),
    [
        (report("shop/wp-1", Kind.WAYPOINT, proxy_hash="w", shop=7), True, True),
        (report("shop/wp-1", Kind.WAYPOINT, proxy_hash="w", shop=6), True, False),
        (report("shop/wp-1", Kind.WAYPOINT, proxy_hash="w", whole=False, shop=7), True, False),
        (report("shop/wp-1", Kind.WAYPOINT, proxy_hash="another", shop=7), False, False),
        (report("shop/wp-2", Kind.WAYPOINT, proxy_hash="w", shop=7), False, False),
        (report("shop/wp-1", Kind.UPROXY, proxy_hash="w", shop=7), False, False),
    ],
)
def test_a_waypoint_is_ready_when_one_of_its_own_processes_has_all_of_it(process, alive, ready):
    found = looked(process)
    assert (found.alive, found.ready) == (alive, ready)


def test_every_process_of_a_waypoint_counts():
    found = looked(
        report("shop/wp-1", Kind.WAYPOINT, proxy_hash="w", shop=7),
        report("shop/wp-2", Kind.WAYPOINT, proxy_hash="w", shop=6),
        instances={"shop/wp-1": "w", "shop/wp-2": "w"},
    )
    assert (found.alive, found.ready, found.processes) == (True, True, ("shop/wp-2",))


def test_of_processes_that_serve_a_part_each_one_that_is_not_there_is_waited_for():
    there = report("shop/wp-1", Kind.WAYPOINT, proxy_hash="w", shop=7)
    instances = {"shop/wp-1": "w", "shop/wp-2": "w", "shop/wp-3": "x"}
    assert looked(there, instances=instances).processes == ()
    found = looked(there, instances=instances, all_needed=frozenset({WP}))
    assert (found.alive, found.ready, found.processes) == (True, True, ("shop/wp-2", "shop/wp-3"))


@pytest.mark.parametrize(("one", "two", "ready"), [(7, 7, True), (7, 6, False), (6, 6, False)])
def test_a_canary_is_ready_when_all_its_processes_that_are_there_have_all_of_it(one, two, ready):
    trial = Trial(CANARY, Step.PREPARING, 0.0)
    reports = [report(f"shop/v2-{n}", Kind.WAYPOINT, proxy_hash="v", shop=has) for n, has in ((1, one), (2, two))]
    assert looked(*reports, trial=trial).canary is ready
    assert looked(*reports[:1], trial=trial).canary is (one == 7)
    assert not looked(trial=trial).canary
    assert not looked(*(replace(found, proxy_hash="x") for found in reports), trial=trial).canary
    assert not looked(*reports[:1], trial=trial, all_needed=frozenset({V2})).canary


def test_a_root_that_the_change_left_as_it_was_need_not_be_newer():
    process = report("infra/wp-1", Kind.WAYPOINT, proxy_hash="w", shop=7, infra=4)
    assert looked(process, gateway=OTHER, instances={"infra/wp-1": "w"}).ready
    late = report("infra/wp-1", Kind.WAYPOINT, proxy_hash="w", shop=7, infra=3)
    assert not looked(late, gateway=OTHER, instances={"infra/wp-1": "w"}).ready
