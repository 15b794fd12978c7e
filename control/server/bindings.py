"""The flip: how a label that binds something to a waypoint comes into force in many processes that change one by one.

Pure: wishes, what proxies have reported and the time in, the next phase out. At each moment some callers, destinations
and waypoint processes are a phase behind the others, so that each phase must agree with the one before it:

    wanted -> PENDING -> SWITCHING -> ENFORCED -> unwanted -> RELEASING -> LEAVING -> LINGERING -> gone
    PENDING -> REFUSED -> ENFORCED              when an L7 policy must not be missed until the waypoint is ready
    ENFORCED -> PENDING -> SWITCHING -> ENFORCED    from one waypoint to another (`State.previous` until the end)
    RELEASING, LEAVING -> SWITCHING             wanted again; from there it moves on, if to another waypoint
    PENDING, REFUSED -> LINGERING               unwanted, when a process of the waypoint is there

| phase     | destinations      | callers      | goes on when                                                     |
|-----------|-------------------|--------------|------------------------------------------------------------------|
| PENDING   | accept both       | direct       | all live processes of the waypoint hold it, destinations this    |
| REFUSED   | only the waypoint | refuse       | one process of the waypoint holds it, destinations have this     |
| SWITCHING | accept both       | the waypoint | callers have this, or 5 s: a straggler is told to go through it  |
| ENFORCED  | only the waypoint | the waypoint | for good                                                         |
| RELEASING | accept both       | the waypoint | destinations have this, or 60 s                                  |
| LEAVING   | accept both       | direct       | callers have this, or 60 s                                       |
| LINGERING | accept both       | direct       | 5 min: until connections through the waypoint have ended          |

While it moves from one waypoint to another, destinations accept only the two, callers use the previous one (PENDING)
and then the new one (SWITCHING), and the previous one is kept for 5 min as when LINGERING.

Beside that, what callers go through for good may have a canary, whose word destinations take all the time:

    wanted -> PREPARING -> SHARING -> unwanted -> LEAVING -> gone

| step      | callers                | goes on when                                                                |
|-----------|------------------------|-----------------------------------------------------------------------------|
| PREPARING | the waypoint           | all live processes of the canary hold it, destinations have this, or 60 s   |
| SHARING   | a share to the canary  | for as long as it is wanted                                                 |
| LEAVING   | the waypoint           | 5 min, and callers have this, or 6 min                                      |
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from control.api.bindings import Canary, Standing, Subject, Wish
from control.api.gateway import Binding, Via
from control.api.messages import Stamp
from control.api.status import ADDRESSES, Kind, ProxyStatus, RootStamp

SWITCH_S: Final = 5.0
"""How long callers are waited for before destinations enforce, and an L7 policy may be missed while a waypoint that is
there takes up its configuration."""
LONGEST_S: Final = 60.0
"""How long proxies that are alive and do not follow are waited for where going on would fail their connections."""
LINGER_S: Final = 300.0
"""How long a waypoint goes on to serve connections that were made through it."""


class Phase(Enum):
    """How far a flip has come."""

    PENDING = "pending"
    REFUSED = "refused"
    SWITCHING = "switching"
    ENFORCED = "enforced"
    RELEASING = "releasing"
    LEAVING = "leaving"
    LINGERING = "lingering"


class Step(Enum):
    """How far a canary has come."""

    PREPARING = "preparing"
    SHARING = "sharing"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Trial:
    """A canary on its way."""

    canary: Canary
    step: Step
    since: float
    """Unix time."""


@dataclass(frozen=True, slots=True)
class State:
    """Where one service or workload is on its way."""

    gateway: str
    """Key of the Gateway that it is bound to, or about to be."""
    previous: str
    """Key of the one that it leaves for that; empty where there is none."""
    phase: Phase
    optional: bool
    stamp: Stamp
    """Of the change set that said so: who has applied this holds to the phase."""
    since: float
    """Unix time."""
    trial: Trial | None = None
    """Of its canary."""

    @property
    def at_rest(self) -> bool:
        """Whether neither reports nor time take it further."""
        return self.phase is Phase.ENFORCED and (self.trial is None or self.trial.step is Step.SHARING)

    @property
    def gateways(self) -> frozenset[str]:
        """Keys of all that it has to do with."""
        trial = self.trial.canary.gateway if self.trial is not None else ""
        return frozenset((self.gateway, self.previous, trial)) - {""}


@dataclass(frozen=True, slots=True)
class Seen:
    """What proxies have reported, as far as it matters to one state."""

    alive: bool
    """Whether a process of the Gateway is there, ready or not."""
    ready: bool
    """Whether one has all of its configuration, as of the state's stamp."""
    processes: tuple[str, ...]
    """Keys of those that are there and have not; callers choose among all of them at random."""
    destinations: tuple[str, ...]
    """Keys of the live workloads behind it that have not applied the stamp."""
    callers: tuple[str, ...]
    """Keys of the live proxies that know of it and have not applied the stamp."""
    canary: bool = False
    """Whether a process of the canary is there, and all that are have their configuration."""


@dataclass(frozen=True, slots=True)
class Bypass:
    """A binding of a service that an operator has suspended."""

    until: float
    """Unix time at which it ends by itself."""
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a proxy that is online and within its lease says of itself."""

    proxy_hash: str
    status: ProxyStatus


def step(old: State | None, wish: Wish | None, seen: Seen, now: float, stamp: Stamp) -> State | None:
    """The state that follows; the very same one when nothing does. None: not bound.

    `seen`: as of the old state's stamp, and of the Gateway that is wished for where there is no state. `stamp`: of the
    change set that will say so.
    """
    if old is None:
        if wish is None:
            return None
        phase = Phase.REFUSED if _guarded(wish) and not seen.alive else Phase.PENDING
        return State(wish.gateway, "", phase, wish.optional, stamp, now)
    new = _followed(old, wish, seen, now)
    if new is None:
        return None
    if wish is not None and wish.optional != new.optional:
        new = replace(new, optional=wish.optional)
    trial = _tried(old.trial, _wanted_canary(new, wish), seen, now)
    if trial != new.trial:
        new = replace(new, trial=trial)
    if new == old:
        return old
    moved = (new.gateway, new.previous, new.phase) != (old.gateway, old.previous, old.phase)
    return replace(new, stamp=stamp, since=now if moved else old.since)


def _followed(old: State, wish: Wish | None, seen: Seen, now: float) -> State | None:
    waited = now - old.since
    wanted = wish is not None and wish.gateway == old.gateway
    match old.phase:
        case Phase.PENDING | Phase.REFUSED if wish is None:
            if old.previous:
                return _phase(old, Phase.RELEASING, gateway=old.previous, previous="")
            # It may have been lingering when it was wanted again, with connections through what is there.
            return _phase(old, Phase.LINGERING) if seen.alive else None
        case Phase.PENDING | Phase.REFUSED if wish is not None and not wanted:
            if wish.gateway == old.previous:
                return _phase(old, Phase.ENFORCED, gateway=old.previous, previous="")
            return replace(old, gateway=wish.gateway)
        case Phase.PENDING | Phase.REFUSED if wish is not None and _is_ready(old, wish, seen, waited):
            # Who was refused until now may have no other way, so there is nobody to switch.
            return _phase(old, Phase.SWITCHING if old.phase is Phase.PENDING else Phase.ENFORCED)
        case Phase.PENDING if wish is not None and _guarded(wish) and not old.previous:
            return _phase(old, Phase.REFUSED) if not seen.alive or waited >= SWITCH_S else old
        case Phase.REFUSED if wish is not None and not _guarded(wish):
            return _phase(old, Phase.PENDING)
        case Phase.SWITCHING | Phase.ENFORCED if wish is None:
            return _phase(old, Phase.RELEASING)
        case Phase.SWITCHING if old.previous:
            done = waited >= LINGER_S and (not seen.callers or waited >= LINGER_S + LONGEST_S)
            return _phase(old, Phase.ENFORCED, previous="") if done else old
        case Phase.SWITCHING:
            return _phase(old, Phase.ENFORCED) if not seen.callers or waited >= SWITCH_S else old
        case Phase.ENFORCED if wish is not None and not wanted:
            return _phase(old, Phase.PENDING, gateway=wish.gateway, previous=old.gateway)
        case Phase.RELEASING if wish is not None:
            # Callers may go directly still, so that nothing can be enforced yet; and none of them shall any more.
            return old if _uses_previous(old, seen, waited) else _phase(old, Phase.SWITCHING, previous="")
        case Phase.LEAVING if wish is not None and seen.ready and (wanted or _guarded(wish)):
            return old if _uses_previous(old, seen, waited) else _phase(old, Phase.SWITCHING, previous="")
        case Phase.RELEASING:
            return _phase(old, Phase.LEAVING) if not seen.destinations or waited >= LONGEST_S else old
        case Phase.LEAVING:
            return _phase(old, Phase.LINGERING) if not seen.callers or waited >= LONGEST_S else old
        case Phase.LINGERING if wish is not None:
            return _phase(old, Phase.PENDING, gateway=wish.gateway, previous="")
        case Phase.LINGERING:
            return None if waited >= LINGER_S else old
    return old


def _wanted_canary(state: State, wish: Wish | None) -> Canary | None:
    """The canary that a state may have: where no caller goes directly any more, and none has to."""
    enforced = state.phase is Phase.ENFORCED or (state.phase is Phase.SWITCHING and state.previous)
    return wish.canary if wish is not None and wish.gateway == state.gateway and enforced else None


def _tried(old: Trial | None, wanted: Canary | None, seen: Seen, now: float) -> Trial | None:
    if old is None:
        return None if wanted is None else Trial(wanted, Step.PREPARING, now)
    waited = now - old.since
    again = wanted is not None and wanted.gateway == old.canary.gateway
    match old.step:
        case Step.PREPARING if not again:
            return None  # no caller has heard of it
        case Step.SHARING if not again:
            return replace(old, step=Step.LEAVING, since=now)
        case Step.PREPARING if wanted is not None and seen.canary and (not seen.destinations or waited >= LONGEST_S):
            return Trial(wanted, Step.SHARING, now)
        case Step.LEAVING if wanted is not None and again and seen.canary:
            return Trial(wanted, Step.SHARING, now)
        case Step.LEAVING if waited >= LINGER_S and (not seen.callers or waited >= LINGER_S + LONGEST_S):
            return None
        case Step.PREPARING | Step.SHARING if wanted is not None and wanted != old.canary:
            return replace(old, canary=wanted)
    return old


def _phase(old: State, phase: Phase, *, gateway: str | None = None, previous: str | None = None) -> State:
    return replace(
        old,
        phase=phase,
        gateway=old.gateway if gateway is None else gateway,
        previous=old.previous if previous is None else previous,
    )


def _is_ready(old: State, wish: Wish, seen: Seen, waited: float) -> bool:
    if not seen.ready or (seen.destinations and waited < LONGEST_S):
        return False
    # That some calls fail is better than that all do, and than that a policy is missed.
    patience = SWITCH_S if _guarded(wish) and not old.previous else LONGEST_S
    return old.phase is Phase.REFUSED or not seen.processes or waited >= patience


def _uses_previous(old: State, seen: Seen, waited: float) -> bool:
    """Whether a caller may go through the previous waypoint still, and is waited for."""
    return bool(old.previous and seen.callers) and waited < LONGEST_S


def _guarded(wish: Wish) -> bool:
    return wish.guarded and not wish.optional


def settled(state: State, seen: Seen) -> bool:
    """Whether every proxy concerned does what was asked for last, so that an operator need not wait."""
    if state.trial is not None and (state.trial.step is Step.PREPARING or seen.callers):
        return False
    match state.phase:
        case Phase.ENFORCED:
            return not seen.destinations and not seen.callers
        case Phase.SWITCHING:
            return bool(state.previous) and not seen.callers
        case _:
            return state.phase is Phase.LINGERING


def waits_for(state: State, seen: Seen) -> tuple[str, ...]:
    """For whom it waits, in words for people."""
    found: list[str] = []
    match state.phase:
        case Phase.PENDING | Phase.REFUSED:
            if not seen.alive:
                found.append(f"a process of Gateway {state.gateway}: none is there")
            elif not seen.ready:
                found.append(f"a process of Gateway {state.gateway} that has its configuration")
            else:
                found += seen.processes
            found += seen.destinations
        case Phase.RELEASING:
            found += seen.destinations
        case Phase.SWITCHING | Phase.LEAVING:
            found += seen.callers
        case Phase.ENFORCED:
            found += sorted({*seen.destinations, *seen.callers})
        case Phase.LINGERING:
            pass
    trial = state.trial
    if trial is not None and trial.step is Step.PREPARING:
        if not seen.canary:
            found.append(f"a process of Gateway {trial.canary.gateway} that has its configuration")
        found += [one for one in seen.destinations if one not in found]
    return tuple(found)


def next_look(state: State, now: float) -> float | None:
    """Seconds until time alone may take a state further; None when it cannot."""
    looks = [_next(state.since, now, _bounds(state))]
    if state.trial is not None:
        looks.append(_next(state.trial.since, now, _BOUNDS[state.trial.step]))
    return min((seconds for seconds in looks if seconds is not None), default=None)


_BOUNDS: Final[Mapping[Step, tuple[float, ...]]] = {
    Step.PREPARING: (LONGEST_S,),
    Step.SHARING: (),
    Step.LEAVING: (LINGER_S, LINGER_S + LONGEST_S),
}


def _next(since: float, now: float, bounds: tuple[float, ...]) -> float | None:
    left = [bound - (now - since) for bound in bounds]
    return min((seconds for seconds in left if seconds > 0), default=None)


def _bounds(state: State) -> tuple[float, ...]:
    """Seconds since its phase began at which time alone may take it further."""
    match state.phase:
        case Phase.ENFORCED:
            return ()
        case Phase.LINGERING:
            return (LINGER_S,)
        case Phase.SWITCHING if state.previous:
            return (LINGER_S, LINGER_S + LONGEST_S)
        case Phase.SWITCHING:
            return (SWITCH_S,)
        case Phase.PENDING:
            return (SWITCH_S, LONGEST_S)
        case _:
            return (LONGEST_S,)


def standing(state: State) -> Standing:
    """What records say of a state."""
    gateways = tuple(sorted(state.gateways))
    via = Via.PREFERRED if state.optional else Via.WAYPOINT
    through = Binding(state.gateway, via)
    if state.trial is not None and state.trial.step is Step.SHARING:
        through = replace(through, canary=state.trial.canary.gateway, percent=state.trial.canary.percent)
    match state.phase:
        case Phase.PENDING if state.previous:
            return Standing(gateways, not state.optional, Binding(state.previous, via))
        case Phase.REFUSED:
            return Standing(gateways, enforced=True, binding=Binding(state.gateway, Via.REFUSE))
        case Phase.ENFORCED:
            return Standing(gateways, not state.optional, through)
        case Phase.SWITCHING:
            return Standing(gateways, bool(state.previous) and not state.optional, through)
        case Phase.RELEASING:
            return Standing(gateways, enforced=False, binding=through)
        case _:
            return Standing(gateways, enforced=False, binding=None)


def resumed(states: Mapping[Subject, State], now: float) -> dict[Subject, State]:
    """The states after a time in which nothing was heard of any proxy: whoever is waited for gets the whole time."""

    def begun(state: State) -> State:
        if state.phase is not Phase.ENFORCED:
            state = replace(state, since=now)
        trial = state.trial
        return state if trial is None else replace(state, trial=replace(trial, since=now))

    return {subject: state if state.at_rest else begun(state) for subject, state in states.items()}


def look(
    subject: Subject,
    state: State,
    reports: Iterable[Report],
    published: Mapping[str, RootStamp],
    instances: Mapping[str, str],
    canaries: Mapping[str, str],
    destinations: frozenset[str],
    *,
    all_needed: Collection[str] = (),
    beside: Collection[str] = (),
) -> Seen:
    """What proxies have reported that matters to a state.

    `reports`: of the proxies that are online and within their lease; `published`: namespace, or `ADDRESSES`, -> its
    root; `instances`: key of each workload that is a process of the Gateway -> proxy hash of its identity;
    `canaries`: likewise of the canary; `destinations`: keys of the workloads behind the subject; `all_needed`: keys of
    the Gateways of which a process that is not there is waited for; `beside`: of those whose processes uProxies start,
    and report of.
    """
    namespace = _namespace(subject[1])
    owners = {_namespace(one) for one in (subject[1], *state.gateways)}
    needed = {namespace, _namespace(state.gateway)}
    trial = state.trial.canary.gateway if state.trial is not None else ""
    needed_by_canary = {namespace, _namespace(trial)}
    alive = ready = False
    kind = Kind.UPROXY if state.gateway in beside else Kind.WAYPOINT
    missing = set(instances) if state.gateway in all_needed else set()
    canary: list[bool] = []
    lagging: list[str] = []
    behind: list[str] = []
    callers: list[str] = []
    for report in reports:
        status = report.status
        held = {owner: _has(status, owner, state.stamp, published) for owner in (*owners, ADDRESSES)}
        if status.kind is Kind.WAYPOINT and canaries.get(status.workload) == report.proxy_hash:
            canary.append(status.whole and all(held[owner] is True for owner in needed_by_canary))
        if status.kind is kind and instances.get(status.workload) == report.proxy_hash:
            alive = True
            missing.discard(status.workload)
            if status.whole and all(held[owner] is True for owner in needed):
                ready = True
            else:
                lagging.append(status.workload)
        if status.kind is not Kind.WAYPOINT and (held[namespace] is False or held[ADDRESSES] is False):
            callers.append(status.workload)
        if status.workload in destinations and held[namespace] is not True:
            behind.append(status.workload)
    lagging += missing
    complete = trial not in all_needed or len(canary) == len(canaries)
    held_by_canary = bool(canary) and all(canary) and complete
    return Seen(alive, ready, tuple(sorted(lagging)), tuple(sorted(behind)), tuple(sorted(callers)), held_by_canary)


def _has(status: ProxyStatus, owner: str, stamp: Stamp, published: Mapping[str, RootStamp]) -> bool | None:
    """Whether a proxy has applied a root as of a change set; None when it does not follow that root.

    A root that the change set left as it was keeps its older stamp.
    """
    applied = status.roots.get(owner)
    if applied is None:
        return None
    root = published.get(owner)
    return root is None or applied[:2] >= min(stamp, root[:2])


def _namespace(key: str) -> str:
    return key.partition("/")[0]
