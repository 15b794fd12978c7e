"""All bindings to waypoints of one control plane: what is bound and how far, and what follows for each of them.

`bindings` says what follows for one; the store has what is here. Not for several threads at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from control.api.bindings import Standing, Subject, Wish
from control.api.identity import TrustDomain
from control.api.messages import Stamp
from control.api.status import RootStamp
from control.server import bindings
from control.server.bindings import Bypass, Phase, Report, Seen, State
from control.server.registry import Bound

_NOTHING = Seen(alive=False, ready=False, processes=(), destinations=(), callers=())


@dataclass(frozen=True, slots=True)
class World:
    """What is known when the next phases are worked out."""

    bound: Mapping[str, Bound]
    """By namespace."""
    reports: tuple[Report, ...]
    """Of the proxies that are online and within their lease."""
    published: Mapping[str, RootStamp]
    """Namespace, or `ADDRESSES`, -> its root."""
    now: float
    """Unix time."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one binding is, for people."""

    subject: Subject
    state: State
    settled: bool
    """Whether every proxy concerned does what was asked for last."""
    waits_for: tuple[str, ...]


class Flips:
    """The bindings of one mesh."""

    def __init__(
        self, trust_domain: TrustDomain, states: Mapping[Subject, State], bypasses: Mapping[str, Bypass]
    ) -> None:
        self._trust_domain = trust_domain
        self.states = states
        self.bypasses = bypasses
        """By the service's key."""

    @property
    def under_way(self) -> bool:
        """Whether the report of a proxy may take something further."""
        return any(not state.at_rest and state.phase is not Phase.LINGERING for state in self.states.values())

    def namespaces(self) -> frozenset[str]:
        """Those that must be built for the bindings to be worked on."""
        return concerned(self.states)

    def stepped(self, world: World, bypasses: Mapping[str, Bypass], stamp: Stamp) -> dict[Subject, State]:
        """What follows for all bindings, as of a change set with this stamp."""
        wishes: dict[Subject, Wish] = {}
        for bound in world.bound.values():
            wishes |= bound.wishes
        for service in bypasses:
            for subject in _passed_by(service, world):
                wishes.pop(subject, None)
        found: dict[Subject, State] = {}
        for subject in sorted({*self.states, *wishes}):
            old, wish = self.states.get(subject), wishes.get(subject)
            new = old
            # Nobody may have looked at its namespace since the start.
            home = world.bound.get(_namespace(subject[1]))
            if home is not None and subject not in home.served:
                new = None
            elif home is not None:
                new = bindings.step(old, wish, self._seen(subject, old, wish, world), world.now, stamp)
            if new is not None:
                found[subject] = new
        return found

    def progress(self, world: World) -> list[Progress]:
        """How far each binding is, in the order of their names."""
        found: list[Progress] = []
        for subject in sorted(self.states):
            state = self.states[subject]
            seen = self._look(subject, state, world)
            found.append(Progress(subject, state, bindings.settled(state, seen), bindings.waits_for(state, seen)))
        return found

    def next_look(self, now: float) -> float | None:
        """Seconds until time alone takes something further; None when it does not."""
        looks = [bindings.next_look(state, now) for state in self.states.values()]
        looks += [max(0.0, bypass.until - now) for bypass in self.bypasses.values()]
        return min((look for look in looks if look is not None), default=None)

    def _seen(self, subject: Subject, old: State | None, wish: Wish | None, world: World) -> Seen:
        if old is not None:
            return _NOTHING if old.at_rest else self._look(subject, old, world)
        if wish is None:
            return _NOTHING
        return self._look(subject, State(wish.gateway, "", Phase.PENDING, wish.optional, (0, 0), world.now), world)

    def _look(self, subject: Subject, state: State, world: World) -> Seen:
        trial = state.trial.canary.gateway if state.trial is not None else ""
        instances, canaries = self._processes(state.gateway, world), self._processes(trial, world)
        bound = world.bound.get(_namespace(subject[1]))
        destinations = bound.served.get(subject, frozenset()) if bound is not None else frozenset()
        needed = frozenset(one for home in world.bound.values() for one in home.needed)
        beside = frozenset(one for home in world.bound.values() for one in home.beside)
        return bindings.look(
            subject,
            state,
            world.reports,
            world.published,
            instances,
            canaries,
            destinations,
            all_needed=needed,
            beside=beside,
        )

    def _processes(self, gateway: str, world: World) -> Mapping[str, str]:
        """Key of each process of a Gateway -> proxy hash of its identity."""
        home = world.bound.get(_namespace(gateway))
        return home.instances.get(gateway, {}) if home is not None else {}


def standings(states: Mapping[Subject, State]) -> dict[Subject, Standing]:
    """What records say of all bindings."""
    return {subject: bindings.standing(state) for subject, state in states.items()}


def concerned(states: Mapping[Subject, State]) -> frozenset[str]:
    """Namespaces whose records tell of these bindings: those of services and workloads, and of Gateways."""
    keys = {one for (_, key), state in states.items() for one in (key, *state.gateways)}
    return frozenset(map(_namespace, keys))


def changed_states(before: Mapping[Subject, State], after: Mapping[Subject, State]) -> dict[Subject, State | None]:
    """The bindings that are not as they were; None: gone."""
    every = {*before, *after}
    return {subject: after.get(subject) for subject in every if before.get(subject) is not after.get(subject)}


def concerned_by_change(before: Mapping[Subject, State], after: Mapping[Subject, State]) -> frozenset[str]:
    """Namespaces whose records change with the bindings."""
    old, new = standings(before), standings(after)
    differing = {subject for subject in {*old, *new} if old.get(subject) != new.get(subject)}

    def those(states: Mapping[Subject, State]) -> dict[Subject, State]:
        return {subject: state for subject, state in states.items() if subject in differing}

    return concerned(those(before)) | concerned(those(after))


def live(reports: Iterable[tuple[Report, float]], now: float) -> tuple[Report, ...]:
    """Those of proxies that are online and within their lease. Each comes with the Unix time at which it arrived."""
    return tuple(
        report for report, received_at in reports if report.status.online and now - received_at <= report.status.lease_s
    )


def _passed_by(service: str, world: World) -> list[Subject]:
    """What a bypass of a service suspends: its binding, and those of the workloads behind it."""
    subject: Subject = ("Service", service)
    bound = world.bound.get(_namespace(service))
    behind = bound.served.get(subject, frozenset()) if bound is not None else frozenset()
    return [subject, *(("WorkloadEntry", key) for key in sorted(behind))]


def _namespace(key: str) -> str:
    return key.partition("/")[0]
