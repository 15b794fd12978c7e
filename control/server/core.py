"""The control plane as one object: desired state in, messages to publish out. No network and no asyncio.

Whoever applies (REST) and whoever publishes (MQTT) meet here. The published truth is in the store before anybody is
told of it; what is *pending* is only what the broker has not acknowledged yet. That is not stored: at every connection
the publisher says what the broker holds (`audited`), and all that differs is pending.

Threads: every method may be called from any thread. `apply`, `delete` and `relabel` of thousands of resources take
seconds: run them in a thread. Meanwhile `pending` and `published` answer, and `refresh` does nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from control.api import index, messages, records, status
from control.api.address import IpAddress
from control.api.bindings import Subject
from control.api.declared import Place
from control.api.fields import RecordError
from control.api.gateway import Gateway, gateway_identity
from control.api.identity import SpiffeId, TrustDomain
from control.api.index import AddressShard, Resident
from control.api.messages import Body, MessageError, Stamp
from control.api.metadata import PLACEMENT
from control.api.policy import DEFAULT_ROOT_NAMESPACE
from control.api.problems import ResourceError, ResourceErrors
from control.api.revocations import Revocations
from control.api.status import ADDRESSES, ProxyStatus, RootStamp
from control.api.topics import (
    AddressesRootTopic,
    AddressesTopic,
    GatewayTopic,
    NamespacesTopic,
    RevocationsTopic,
    RootTopic,
    ServiceTopic,
    StatusTopic,
    Topic,
    TopicError,
    format_topic,
    parse_topic,
    subtree,
)
from control.api.workload import key
from control.server import documents, publication
from control.server.bindings import Bypass, Phase, State, resumed
from control.server.bindings import Report as BindingReport
from control.server.ca import Authority, CaError
from control.server.documents import Document
from control.server.flips import Flips, Progress, World, changed_states, concerned_by_change, live, standings
from control.server.pending import Pending
from control.server.publication import Message, Pen, Rank
from control.server.registry import Bound, Built, ChangeSet, NotFound, Plan, Registry, named_place
from control.server.residents import Residents
from control.server.signing import ConfigKey
from control.server.store import Batch, Store, StoreError

MAX_EPOCH_AHEAD_S: Final = 366 * 24 * 3600
"""An epoch is the Unix time of a start, or one above the last: only a clock that was wrong leaves one far ahead."""
MAX_REPORT_BYTES: Final = 16 * 1024 * 1024
"""Of one identity, which may report of as many workloads as it likes, and may be stolen: 10,000 honest ones."""
_REPORT_OVERHEAD_BYTES: Final = 1000
_MAX_UNTAKEN: Final = 1000  # statuses that wait to be taken off the broker
_MAX_PROBLEMS: Final = 100
_CLOCK_STEP_S: Final = 60
_RETRY_S: Final = 5.0
_STATUSES: Final = "status/"
"""Their group among what waits, where others go by their namespace."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Publication:
    """One retained message to publish with QoS 1. An empty payload clears the topic."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Retained:
    """What a broker holds under one topic."""

    stamp: Stamp | None
    """(epoch, version) of its envelope; None when it is none of ours."""
    digest: bytes
    """SHA-256 of the payload (`messages.digest`)."""
    tombstone: bool = False
    """Whether the envelope has no body."""


@dataclass(frozen=True, slots=True)
class Report:
    """The last status of a proxy."""

    status: ProxyStatus
    received_at: float
    """Unix time by our clock."""
    size: int
    """Bytes."""


class Core:
    """The control plane's state. Takes a new epoch when it is made."""

    def __init__(
        self,
        store: Store,
        authority: Authority,
        config_key: ConfigKey,
        clock: Callable[[], float] = time.time,
        on_pending: Callable[[], None] = lambda: None,
        root_namespace: str = DEFAULT_ROOT_NAMESPACE,
    ) -> None:
        """`clock` gives Unix seconds. `on_pending` is called, from any thread, whenever there is something to publish:
        it only wakes the publisher up (`loop.call_soon_threadsafe`), and calls nothing here.
        """
        self._store = store
        self._trust_domain = authority.trust_domain
        self._config_key = config_key
        self._clock = clock
        self.on_pending = on_pending
        self.on_progress: Callable[[], None] = lambda: None
        """Likewise, when something that is bound to a waypoint may go on: `advance`."""
        self._root_namespace = root_namespace
        self._revocations = format_topic(self._trust_domain, RevocationsTopic(root_namespace))
        self._writing = threading.Lock()
        """Held by whoever works out what to write next, which may take long."""
        self._queue_lock = threading.Lock()
        """Held while the store and what waits are brought into step. Taken after `_writing`."""
        self._pending = Pending()
        self._taken: tuple[Publication, ...] = ()
        self._epoch_used = False
        """Whether something of this epoch may be on a broker."""
        self._roots: dict[str, RootStamp] = {}
        self._reports: dict[str, Report] = {}
        self._report_bytes: dict[str, int] = {}
        """By proxy hash."""
        self._problems: deque[str] = deque(maxlen=_MAX_PROBLEMS)
        self._registry = Registry(store, self._trust_domain, root_namespace, _residents(store, self._trust_domain))
        self._flips = Flips(self._trust_domain, store.bindings(), store.bypasses())
        self._stamp = store.stamp()
        with self._writing:
            self._begin_epoch(max(self._stamp[0] + 1, int(clock())))

    # Desired state

    def apply(
        self,
        files: Iterable[tuple[str, str]],
        *,
        dry_run: bool = False,
        release: bool = False,
        force: bool = False,
    ) -> ChangeSet:
        """Adds or replaces the resources of some files: (name to show in errors, YAML text).

        All of it or nothing. Raises ResourceErrors (what is wrong, with file and line), registry.Held (a change that
        takes much away, without `release`) and registry.Loose (one that binds something to a waypoint that is not
        there, without `force`). A dry run does all but commit.
        """
        errors: list[ResourceError] = []
        given: list[Document] = []
        for file, text in files:
            try:
                given += documents.read(text, file)
            except ResourceErrors as problem:
                errors += problem.errors
        if errors:
            raise ResourceErrors(errors)
        with self._writing:
            return self._change(given, (), dry_run=dry_run, release=release, force=force)

    def delete(
        self, places: Iterable[Place], *, dry_run: bool = False, release: bool = False, force: bool = False
    ) -> ChangeSet:
        """Removes resources. Raises registry.NotFound, and what `apply` raises."""
        with self._writing:
            return self._change((), dict.fromkeys(places), dry_run=dry_run, release=release, force=force)

    def relabel(
        self,
        place: Place,
        *,
        labels: Mapping[str, str | None] = {},
        annotations: Mapping[str, str | None] = {},
        dry_run: bool = False,
        release: bool = False,
        force: bool = False,
    ) -> ChangeSet:
        """Sets labels and annotations of one resource; None removes one. Raises what `delete` raises."""
        with self._writing:
            text = self._store.document(place)
            if text is None:
                raise NotFound(f"there is no {named_place(place)}")
            edited = documents.with_metadata(text, {"labels": labels, "annotations": annotations})
            given = documents.read(edited, named_place(place))
            return self._change(given, (), dry_run=dry_run, release=release, force=force)

    def get(self, kind: str = "", namespace: str = "", name: str = "") -> list[tuple[Place, str]]:
        """Resources and their YAML in order of namespace, kind and name; an empty argument stands for all."""
        return self._store.documents(kind, namespace, name)

    # Keys of issuers

    def key_uris(self) -> frozenset[str]:
        """Where keys are to be fetched."""
        with self._writing:
            return frozenset(self._registry.key_uris())

    def take_keys(self, fetched: Mapping[str, str]) -> None:
        """Keys were fetched (`canonical_jwks`), by where they are published: what asks for them is published anew."""
        with self._writing:
            wanted = self._registry.key_uris()
            old = self._registry.fetched
            new = {uri: jwks for uri, jwks in {**old, **fetched}.items() if uri in wanted}
            changed = {uri for uri in {*old, *new} if old.get(uri) != new.get(uri)}
            if changed:
                again = {namespace for uri in changed for namespace in wanted.get(uri, ())}
                pen, states = self._pen(), dict(self._flips.states)
                plan = self._registry.plan((), standings=standings(states), again=again, fetched=new)
                self._put(plan, self._messages(pen, plan), states, self._flips.bypasses, pen.stamp)

    # Certificates

    def revoke(self, lists: tuple[bytes, ...]) -> bool:
        """Publishes what is revoked (CRLs, DER) in place of what was. Whether that is anything new.

        Raises MessageError when it is too large, and StoreError.
        """
        with self._writing:
            home = {message.topic: message for message in self._store.messages_of(self._root_namespace)}
            bodies = _bodies(home)
            body = records.write(Revocations(self._root_namespace, lists))
            if bodies.get(self._revocations) == body:
                return False
            pen = self._pen()
            bodies[self._revocations] = body
            changed = publication.namespace_messages(pen, self._root_namespace, home, bodies)
            self._commit(Batch(pen.stamp, messages=changed), soon=True)
            return True

    def revocations(self) -> tuple[bytes, ...]:
        """What `revoke` has published last, in this life or an earlier one."""
        message = self._store.message(self._revocations)
        body = messages.decode(message.payload).body if message is not None else None
        if body is None:
            return ()
        found = records.read(RevocationsTopic(self._root_namespace), body, self._trust_domain)
        return found.lists if isinstance(found, Revocations) else ()

    # Waypoints

    def bypass(self, service: str, until: float, reason: str) -> None:
        """Suspends the binding of a service (its key) until a time (Unix seconds), which may be past: then it ends.

        Raises registry.NotFound for a service that is not bound.
        """
        with self._writing:
            if until > self._clock() and ("Service", service) not in self._flips.states:
                raise NotFound(f"Service {service} is not bound to a waypoint; `meshctl waypoint list` shows what is")
            self._flip({**self._flips.bypasses, service: Bypass(until, reason)})

    def advance(self) -> float | None:
        """Takes every binding as far as proxies have followed. Seconds until it is to be asked again at the latest.

        Ask it only while statuses are heard, whenever `on_progress` was called.
        """
        with self._writing:
            try:
                self._flip(self._flips.bypasses)
            except (ResourceErrors, StoreError, MessageError) as error:
                self._note(f"bindings to waypoints cannot go on: {error}")
                return _RETRY_S
            return self._flips.next_look(self._clock())

    def resume(self) -> None:
        """Says that statuses are heard from now on: nobody was waited for before."""
        with self._writing:
            self._flips.states = resumed(self._flips.states, self._clock())

    def progress(self) -> list[Progress]:
        """How far each binding to a waypoint is."""
        with self._writing:
            return self._flips.progress(self._world({}))

    def phases(self) -> list[Phase]:
        """That of each binding to a waypoint; `progress` tells more, and waits for changes that are under way."""
        return [state.phase for state in self._flips.states.values()]

    def bypasses(self) -> dict[str, Bypass]:
        """Key of the service -> the bypass."""
        return dict(self._flips.bypasses)

    # Publishing

    @property
    def epoch(self) -> int:
        """The epoch of what is published from now on."""
        return self._stamp[0]

    def start_epoch(self, seen_epoch: int) -> int:
        """The epoch, raised (and stored) when it is not above the highest that was seen on a broker or in a status.

        Call it at every connection, before `audited`. What this process itself has published does not count.
        """
        with self._writing:
            if seen_epoch > max(self.epoch, int(self._clock()) + MAX_EPOCH_AHEAD_S):
                # A proxy can report any number, and the largest would leave no epoch above it.
                self._note(f"epoch {seen_epoch} was seen, which is years ahead; whoever published it is not believed")
                seen_epoch = 0
            if seen_epoch > self.epoch or (seen_epoch == self.epoch and not self._epoch_used):
                if self._epoch_used:
                    self._note(
                        f"epoch {seen_epoch} was seen, which is not ours: is there another control plane of this mesh, "
                        "or was its clock ahead once?"
                    )
                self._begin_epoch(max(seen_epoch + 1, int(self._clock())))
            return self.epoch

    def audited(self, held: Mapping[str, Retained]) -> None:
        """Says what the broker holds under `mesh/v1/<trust domain>/`, but for `status/`.

        From then on exactly that is pending which differs. What the broker holds and we do not know becomes a
        tombstone; what it holds with a stamp that is not below ours is issued again, newer still. May take seconds.
        """
        with self._writing:
            differing, newer = self._compare(held)
            pen = self._pen()
            changed: list[Message] = []
            for namespace, topics in newer.items():
                changed += self._issued_again(pen, namespace, topics)
            known = self._store.topics()
            garbage: list[str] = []
            foreign: list[Topic] = []
            for name in sorted(held.keys() - known.keys()):
                topic = self._parsed(name)
                if topic is None or held[name].stamp is None or held[name].tombstone:
                    garbage.append(name)
                elif not isinstance(topic, StatusTopic):
                    foreign.append(topic)
            changed += self._withdrawn(pen, foreign)
            for name in garbage:
                # What the store does not hold is cleared when its turn comes.
                differing.setdefault(self._group(name), set()).add(name)
            with self._queue_lock:
                self._pending.clear()
                self._pending.add(differing, soon=False)
                self._taken = ()
            if changed:
                self._commit(Batch(pen.stamp, messages=changed), soon=False)
            elif differing:
                self.on_pending()

    def pending(self) -> Sequence[Publication]:
        """The next messages to publish, in this order; empty when there is nothing. The same ones until `published`.

        It is one namespace, or all addresses; those of a change set come before those of an audit. At most 16 may be
        in flight at once, which keeps the order as long as one connection carries them.
        """
        with self._queue_lock:
            if not self._taken:
                topics = self._pending.take()
                found = sorted(self._store.messages(topics), key=lambda message: (message.rank, message.topic))
                gone = sorted(topics - {message.topic for message in found})
                self._taken = (
                    *(Publication(topic, b"") for topic in gone),
                    *(Publication(message.topic, message.payload) for message in found),
                )
                self._epoch_used = self._epoch_used or bool(self._taken)
            return self._taken

    def published(self) -> None:
        """Says that the broker has acknowledged everything `pending` gave last."""
        with self._queue_lock:
            self._taken = ()

    def refresh(self) -> None:
        """Signs every root again with the time of now, renews the config key in time, and lets old tombstones go.

        Call it every 30 s. It leaves out a turn while a change set is being worked out.
        """
        if not self._writing.acquire(blocking=False):
            return
        try:
            now = self._clock()
            self._forget_reports(now)
            if self._config_key.due(now):
                self._renew_config_key(now)
            if any(issued_at > now + _CLOCK_STEP_S for *_, issued_at in self._roots.values()):
                # The clock was set back. Of an equal stamp proxies take only what is later, and would see no age.
                self._reissue(soon=False)
            roots = [
                replace(self._pen(), stamp=root.stamp).again(root)
                for root in self._store.messages_above_records(Rank.ROOT)
            ]
            self._commit(Batch(self._stamp, messages=roots, collected=self._old_tombstones(int(now))), soon=False)
        except StoreError as error:
            self._note(f"roots cannot be signed again, so that every proxy's configuration seems to age: {error}")
        finally:
            self._writing.release()

    def status_received(self, topic: str, payload: bytes) -> None:
        """Takes the status of a proxy; an empty payload forgets it. Never raises for what it holds."""
        if not payload and topic not in self._reports:
            return  # we cleared it ourselves
        try:
            parsed = parse_topic(self._trust_domain, topic)
            if not isinstance(parsed, StatusTopic):
                raise TopicError(f"{topic[:120]!r} is no status")
            body = messages.decode(payload).body if payload else None
            self._forget_report(topic, parsed)
            if body is not None:
                self._take_report(topic, parsed, Report(status.read(parsed, body), self._clock(), len(payload)))
            if self._flips.under_way:
                self.on_progress()
        except (TopicError, MessageError, RecordError) as error:
            self._note(f"status {topic[:120]}: {error}")
            self._clear([topic])

    # What is known

    def proxies(self) -> dict[str, Report]:
        """Topic of the status -> report, of every proxy that reported since the start."""
        return dict(self._reports)

    def roots(self) -> dict[str, RootStamp]:
        """Namespace, or `ADDRESSES` -> epoch, version and time of issue of its root: what proxies should have."""
        return dict(self._roots)

    def identities(self) -> frozenset[SpiffeId]:
        """Those of all declared workloads."""
        with self._queue_lock:
            return self._registry.residents.identities()

    def resident(self, address: IpAddress) -> Resident | None:
        """Who lives at an address."""
        with self._queue_lock:
            return self._registry.residents.holder(address)

    def waypoints(self) -> frozenset[SpiffeId]:
        """Those of the processes of all Gateways, and of uProxies that have such processes."""
        with self._queue_lock:
            found = {one for bound in self._registry.bound.values() for those in bound.beside.values() for one in those}
        placed: list[str] = []
        for (_, namespace, name), text in self._store.documents(kind="Gateway"):
            found.add(gateway_identity(self._trust_domain, key(namespace, name)))
            if PLACEMENT in text:
                placed.append(format_topic(self._trust_domain, GatewayTopic(namespace, name)))
        for message in self._store.messages(placed):
            body = messages.decode(message.payload).body
            topic = self._parsed(message.topic)
            if body is not None and isinstance(topic, GatewayTopic):
                gateway = records.read(topic, body, self._trust_domain)
                assert isinstance(gateway, Gateway)
                found.update(gateway.identity_of(self._trust_domain, one) for one in gateway.instances)
        return frozenset(found)

    def problems(self) -> tuple[str, ...]:
        """What people should know of: statuses that cannot be read and the like; bounded, newest last."""
        return tuple(self._problems)

    def _take_report(self, topic: str, parsed: StatusTopic, report: Report) -> None:
        taken = self._report_bytes.get(parsed.proxy_hash, 0) + report.size + _REPORT_OVERHEAD_BYTES
        if taken > MAX_REPORT_BYTES:
            raise RecordError(f"its identity reports of more workloads than {MAX_REPORT_BYTES} bytes hold")
        self._report_bytes[parsed.proxy_hash] = taken
        self._reports[topic] = report

    def _forget_report(self, topic: str, parsed: StatusTopic) -> None:
        report = self._reports.pop(topic, None)
        if report is not None:
            self._report_bytes[parsed.proxy_hash] -= report.size + _REPORT_OVERHEAD_BYTES
            if not self._report_bytes[parsed.proxy_hash]:
                del self._report_bytes[parsed.proxy_hash]

    def _forget_reports(self, now: float) -> None:
        """Clears the last words of proxies that are gone for good: their certificates ended long ago."""
        ended = now - publication.TOMBSTONE_S
        self._clear(
            topic
            for topic, report in list(self._reports.items())
            if report.status.not_after < ended and report.received_at + report.status.lease_s < now
        )

    def _clear(self, statuses: Iterable[str]) -> None:
        """Takes statuses off the broker, a bounded number at a time."""
        below = subtree(self._trust_domain, "status").removesuffix("#")
        found = [topic for topic in statuses if topic.startswith(below)]
        if found:
            with self._queue_lock:
                room = max(0, _MAX_UNTAKEN - self._pending.waiting(_STATUSES))
                self._pending.add({_STATUSES: found[:room]}, soon=False)
            self.on_pending()

    def _change(
        self, given: Sequence[Document], removed: Collection[Place], *, dry_run: bool, release: bool, force: bool
    ) -> ChangeSet:
        pen = self._pen()
        old = self._flips.states
        # What is bound follows from the resources, and records from both.
        plan = self._registry.plan(given, removed, release=release, standings=standings(old))
        new = self._flips.stepped(self._world(plan.bound), self._flips.bypasses, pen.stamp)
        if again := concerned_by_change(old, new):
            plan = self._registry.plan(given, removed, release=release, standings=standings(new), again=again)
        if not force:
            self._registry.check_gateways(plan, old, new)
        changed, touched = self._messages(pen, plan), changed_states(old, new)
        if dry_run:
            return ChangeSet(plan.changes, plan.warnings, len(changed), None, touched)
        self._put(plan, changed, new, self._flips.bypasses, pen.stamp)
        return ChangeSet(plan.changes, plan.warnings, len(changed), pen.stamp if changed else None, touched)

    def _flip(self, bypasses: Mapping[str, Bypass]) -> None:
        """Brings bindings on, and what is published with them."""
        old, now = self._flips.states, self._clock()
        kept = {service: bypass for service, bypass in bypasses.items() if bypass.until > now}
        if not old and not self._flips.bypasses and not kept:
            return
        unseen = self._flips.namespaces() - self._registry.bound.keys()
        pen = self._pen()
        seen = self._registry.plan((), standings=standings(old), again=unseen).bound if unseen else {}
        new = self._flips.stepped(self._world(seen), kept, pen.stamp)
        again = concerned_by_change(old, new) | unseen
        if again or new != old or kept != self._flips.bypasses:
            ended = {service: self._flips.bypasses[service] for service in self._flips.bypasses.keys() - kept.keys()}
            plan = self._registry.plan((), standings=standings(new), again=again)
            self._put(plan, self._messages(pen, plan), new, kept, pen.stamp)
            for service, bypass in sorted(ended.items()):
                _log.info("the bypass of service %s has ended, which was for: %s", service, bypass.reason)

    def _put(
        self,
        plan: Plan,
        changed: list[Message],
        states: dict[Subject, State],
        bypasses: Mapping[str, Bypass],
        stamp: Stamp,
    ) -> None:
        """Puts a plan into force, with the bindings that it was made for."""
        flips = self._flips
        batch = Batch(
            stamp if changed else self._stamp,
            dict(plan.documents),
            dict(plan.vips),
            changed,
            bindings=changed_states(flips.states, states),
            bypasses={
                service: bypasses.get(service)
                for service in {*flips.bypasses, *bypasses}
                if flips.bypasses.get(service) != bypasses.get(service)
            },
            fetched_keys={
                uri: plan.fetched.get(uri)
                for uri in {*self._registry.fetched, *plan.fetched}
                if self._registry.fetched.get(uri) != plan.fetched.get(uri)
            },
        )
        self._commit(batch, soon=True, plan=plan)
        flips.states, flips.bypasses = states, bypasses
        if states:
            self.on_progress()

    def _world(self, bound: Mapping[str, Bound]) -> World:
        """`bound`: of the namespaces that are about to change."""
        now = self._clock()
        reports = [
            (BindingReport(topic.proxy_hash, report.status), report.received_at)
            for name, report in list(self._reports.items())
            if isinstance(topic := self._parsed(name), StatusTopic)
        ]
        return World({**self._registry.bound, **bound}, live(reports, now), self._roots, now)

    def _messages(self, pen: Pen, plan: Plan) -> list[Message]:
        try:
            changed = [
                message
                for namespace, built in sorted(plan.namespaces.items())
                for message in publication.namespace_messages(
                    pen, namespace, built.old, self._all_bodies(namespace, built), unchanged=built.unchanged
                )
            ]
            return [*changed, *self._namespaces_messages(pen, plan), *self._address_messages(pen, plan)]
        except MessageError as error:
            raise ResourceErrors([ResourceError("what would be published", 0, "", str(error))]) from None

    def _all_bodies(self, namespace: str, built: Built) -> Mapping[str, Body]:
        """What resources say, and what none says: whatever they become, what is revoked stays so."""
        kept = built.old.get(self._revocations) if namespace == self._root_namespace else None
        body = messages.decode(kept.payload).body if kept is not None else None
        return built.bodies if body is None else {**built.bodies, self._revocations: body}

    def _namespaces_messages(self, pen: Pen, plan: Plan) -> list[Message]:
        having: dict[str, bool] = {}
        for namespace, built in plan.namespaces.items():
            services = format_topic(self._trust_domain, ServiceTopic(namespace, ""))
            having[namespace] = any(topic.startswith(services) for topic in built.bodies)
        published = self._store.message(format_topic(self._trust_domain, NamespacesTopic()))
        return publication.namespaces_messages(pen, published, having)

    def _address_messages(self, pen: Pen, plan: Plan) -> list[Message]:
        changed = {namespace: built.residents for namespace, built in plan.namespaces.items()}
        shards = self._registry.residents.shards_with(changed)
        if not shards:
            return []
        return publication.address_messages(pen, self._addresses_published(shards), shards)

    def _addresses_published(self, shards: Iterable[int]) -> dict[str, Message]:
        topics: list[Topic] = [AddressesRootTopic(), *map(AddressesTopic, shards)]
        found = self._store.messages(format_topic(self._trust_domain, topic) for topic in topics)
        return {message.topic: message for message in found}

    def _begin_epoch(self, epoch: int) -> None:
        """Takes an epoch, and issues everything again that proxies take by its stamp.

        Whoever published before, and whatever of it a restored store has forgotten, is thus outdone.
        """
        self._stamp = (epoch, 0)
        self._epoch_used = False
        self._reissue(soon=False)

    def _old_tombstones(self, now: int) -> list[str]:
        """Those that have served their time; it has not begun while the broker has not even got them."""
        with self._queue_lock:
            taken = {one.topic for one in self._taken}
            return [
                topic
                for topic in self._store.tombstones(now - publication.TOMBSTONE_S)
                if topic not in taken and topic not in self._pending
            ]

    def _renew_config_key(self, now: float) -> None:
        try:
            self._config_key.renew(now)
        except CaError as error:
            # The old one serves for as long as it lasts, and the next refresh tries again.
            self._note(f"the config key is not renewed: {error}")
        else:
            self._reissue(soon=True)

    def _reissue(self, *, soon: bool) -> None:
        pen = self._pen()
        home = {message.topic: message for message in self._store.messages_of(self._root_namespace)}
        root = format_topic(self._trust_domain, RootTopic(self._root_namespace))
        changed = [publication.trust_message(pen, self._config_key.certificates)]
        published = self._store.messages_above_records(Rank.MANIFEST, Rank.ROOT) + self._store.messages_of("")
        changed += publication.reissued(pen, published)
        if root not in home:
            changed += publication.namespace_messages(pen, self._root_namespace, home, _bodies(home))
        self._commit(Batch(pen.stamp, messages=changed), soon=soon)

    def _compare(self, held: Mapping[str, Retained]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
        """Namespace -> topics on which the broker differs, and those of them where its stamp is not below ours."""
        differing: dict[str, set[str]] = {}
        newer: dict[str, set[str]] = {}
        # Trust and addresses are of namespace "", and no proxy is whole without the root namespace.
        namespaces = set(self._store.topics().values()) - {"", self._root_namespace}
        for namespace in ("", self._root_namespace, *sorted(namespaces)):
            for message in self._store.messages_of(namespace):
                other = held.get(message.topic)
                if other is not None and other.digest == messages.digest(message.payload):
                    continue
                differing.setdefault(namespace, set()).add(message.topic)
                # A root keeps its stamp when it is signed again.
                again = message.rank is Rank.ROOT and other is not None and other.stamp == message.stamp
                if other is not None and other.stamp is not None and other.stamp >= message.stamp and not again:
                    newer.setdefault(namespace, set()).add(message.topic)
        return differing, newer

    def _issued_again(self, pen: Pen, namespace: str, topics: set[str]) -> list[Message]:
        old = {message.topic: message for message in self._store.messages_of(namespace)}
        if not namespace:
            return publication.reissued(pen, old.values())
        return publication.namespace_messages(pen, namespace, old, _bodies(old), frozenset(topics))

    def _withdrawn(self, pen: Pen, foreign: Iterable[Topic]) -> list[Message]:
        """What takes the place of messages that somebody else published: tombstones, and roots that list nothing."""
        changed: list[Message] = []
        for topic in foreign:
            if isinstance(topic, RootTopic):
                changed += publication.namespace_messages(pen, topic.namespace, {}, {})
            else:
                name = format_topic(self._trust_domain, topic)
                changed.append(pen.tombstone(name, getattr(topic, "namespace", "")))
        return changed

    def _commit(self, batch: Batch, *, soon: bool, plan: Plan | None = None) -> None:
        """Makes a batch durable, and what it publishes pending."""
        topics: dict[str, list[str]] = {}
        for message in batch.messages:
            topics.setdefault(message.namespace, []).append(message.topic)
        for name in batch.collected:
            topics.setdefault(self._group(name), []).append(name)
        with self._queue_lock:
            self._store.commit(batch)
            self._stamp = batch.stamp
            if plan is not None:
                self._registry.accept(plan)
            self._pending.add(topics, soon=soon)
            for message in batch.messages:
                if message.rank is Rank.ROOT:
                    issued_at = messages.decode(message.payload).issued_at
                    self._roots[message.namespace or ADDRESSES] = (*message.stamp, issued_at)
        if topics:
            self.on_pending()

    def _pen(self) -> Pen:
        epoch, version = self._stamp
        return Pen(self._trust_domain, (epoch, version + 1), int(self._clock()), self._config_key.sign)

    def _group(self, topic: str) -> str:
        """Among whom a topic waits that the store does not hold: what lives under it again is published in order."""
        return getattr(self._parsed(topic), "namespace", "")

    def _parsed(self, topic: str) -> Topic | None:
        try:
            return parse_topic(self._trust_domain, topic)
        except TopicError:
            return None

    def _note(self, problem: str) -> None:
        if problem in self._problems:
            self._problems.remove(problem)
        self._problems.append(problem)


def _bodies(published: Mapping[str, Message]) -> dict[str, Body]:
    """Topic -> body of the records that live."""
    return {
        topic: body
        for topic, message in published.items()
        if message.rank is Rank.RECORD and (body := messages.decode(message.payload).body) is not None
    }


def _residents(store: Store, trust_domain: TrustDomain) -> Residents:
    """Who lives where, as published."""
    shards: list[AddressShard] = []
    for message in store.messages_of(""):
        topic = parse_topic(trust_domain, message.topic)
        body = messages.decode(message.payload).body
        if isinstance(topic, AddressesTopic) and body is not None:
            shards.append(index.read_address_shard(topic, body))
    return Residents(trust_domain, shards)
