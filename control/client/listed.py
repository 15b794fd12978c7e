"""What a signed root lists, applied whole or not at all: a namespace's records, through index shards, or the addresses.

A verified root is the *target* until everything that it lists, and that this proxy is interested in, has arrived with
the right digest; then it is *applied*. Until then all stays as it was. So nobody can pair a new record with an old one.

Invariants: the stamp of the applied root never gets lower; what is held is what the applied root lists.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Final

from control.api import index, messages
from control.api.fields import RecordError
from control.api.identity import TrustDomain
from control.api.messages import Stamp
from control.api.topics import (
    AddressesTopic,
    IndexedTopic,
    IndexTopic,
    entry_topic,
    format_topic,
    index_entry,
    index_shard,
)
from control.client.inbox import Arrival, Inbox, ListedTopic
from control.client.libcrypto import VerifyError

Change = tuple[str, bytes | None]
"""A topic and its new message; None: it is gone."""
Report = Callable[[str, str], None]
"""Takes the topic of what was refused, and why."""

NEVER: Final = (-1, -1)
"""Below every stamp."""
_PATIENCE: Final = 2
"""Times that the root was signed anew, each 30 s, without listing a message: even the largest change set is published
in less, so no root is going to."""


@dataclass(frozen=True, slots=True)
class SignedRoot:
    """A root whose signature was verified."""

    stamp: Stamp
    issued_at: int
    shards: Mapping[int, bytes] = field(hash=False)
    payload: bytes


class Listed(ABC):
    """Everything under one root."""

    def __init__(self, trust_domain: TrustDomain, owner: str, inbox: Inbox, report: Report, floor: Stamp) -> None:
        """No root below `floor` is taken, which was applied in an earlier life."""
        self.owner = owner
        """Namespace; empty for the addresses."""
        self.applied: SignedRoot | None = None
        self.target: SignedRoot | None = None
        self.missing: dict[str, bytes] = {}
        """Topic -> digest of what the target still lacks."""
        self.vouched = 0
        """How often the applied root was signed anew."""
        self._trust_domain = trust_domain
        self._inbox = inbox
        self._report = report
        self.floor = floor

    @property
    def ready(self) -> bool:
        """Whether the target can be applied."""
        return self.target is not None and not self.missing

    @property
    def stamp(self) -> Stamp:
        """No root of a lower stamp is taken."""
        return self.applied.stamp if self.applied is not None else self.floor

    def is_news(self, stamp: Stamp, issued_at: int, shards: Mapping[int, bytes]) -> bool:
        """Whether a root is worth verifying. Raises VerifyError when it cannot be the present one."""
        if stamp < self.stamp:
            raise VerifyError(f"replayed: version {stamp} is older than {self.stamp}, which was applied")
        for known in (self.applied, self.target):
            if known is not None and stamp == known.stamp:
                if shards != known.shards:
                    raise VerifyError(f"altered: version {stamp} was something else before")
                return issued_at > known.issued_at
        return self.target is None or stamp > self.target.stamp

    def accept(self, root: SignedRoot) -> None:
        """Takes a verified root. Raises VerifyError as `is_news`."""
        if not self.is_news(root.stamp, root.issued_at, root.shards):
            return
        if self.applied is not None and root.stamp == self.applied.stamp:
            self.applied = root
            self.vouched += 1
        elif self.target is not None and root.stamp == self.target.stamp:
            self.target = root
        else:
            self.target = root
            self.plan()

    def sweep(self, keep: Container[str] = ()) -> None:
        """Forgets arrivals that no root is going to list, but for some topics, and reports those that none has."""
        if self.applied is None or self.target is not None:
            return  # of old stamp is also what a restored control plane publishes again
        for topic, digest, one in self._inbox.of(self.owner):
            if one.stamp > self.applied.stamp:
                if self.vouched - one.vouched >= _PATIENCE:
                    self._report(topic, "no root lists it: forged, or its publication was broken off")
            elif topic not in keep:
                self.judge(topic, digest, one)
                self._inbox.discard(topic, digest)

    @abstractmethod
    def holds(self, topic: ListedTopic, digest: bytes) -> bool:
        """Whether this very message is applied."""

    @abstractmethod
    def plan(self) -> None:
        """Works out what the target lacks: again, after a change of interests."""

    @abstractmethod
    def arrived(self, topic: str, digest: bytes) -> bool:
        """Another message is in the inbox. Returns whether the target lacked it."""

    @abstractmethod
    def judge(self, topic: str, digest: bytes, arrival: Arrival) -> None:
        """Reports a message that contradicts the applied root."""

    @abstractmethod
    def apply(self) -> list[Change]:
        """Makes the target, which is ready, the applied root."""

    @abstractmethod
    def messages(self) -> list[tuple[str, bytes]]:
        """All that is held under the applied root."""


@dataclass(frozen=True, slots=True)
class _Record:
    digest: bytes
    stamp: Stamp
    payload: bytes


@dataclass(frozen=True, slots=True)
class _Shard:
    """An index shard that the applied root lists."""

    digest: bytes
    payload: bytes
    records: dict[str, _Record]
    """By entry; those of interest."""


@dataclass(frozen=True, slots=True)
class _Staged:
    """An index shard of the target that differs from the applied one."""

    digest: bytes
    payload: bytes
    wanted: dict[str, tuple[str, bytes]]
    """Entry -> topic and digest; those of interest."""


class NamespaceIndex(Listed):
    """The records of one namespace that decide security, as far as this proxy is interested."""

    def __init__(
        self, trust_domain: TrustDomain, namespace: str, inbox: Inbox, report: Report, floor: Stamp = NEVER
    ) -> None:
        super().__init__(trust_domain, namespace, inbox, report, floor)
        self.kinds: tuple[type[IndexedTopic], ...] = ()
        """Kinds of which all records are of interest. Decided before the first root."""
        self._entries: dict[str, int] = {}
        """Other entries of interest -> their shard."""
        self._asked: dict[str, int] = {}
        """Entries that are to become of interest -> their shard."""
        self._shards: dict[int, _Shard] = {}
        self._staged: dict[int, _Staged] = {}
        self._staging = False
        """Whether what is missing are shards; else they are records."""

    def want(self, topic: IndexedTopic) -> None:
        """Makes a record of interest, before the first root."""
        entry = index_entry(topic)
        self._entries[entry] = index_shard(entry)

    def wants(self, topic: IndexedTopic) -> bool:
        """Whether a record is of interest under the applied root."""
        return self._is_wanted(index_entry(topic), topic)

    def ask(self, topic: IndexedTopic) -> None:
        """A record is to become of interest, by `fetch`."""
        entry = index_entry(topic)
        self._asked[entry] = index_shard(entry)

    def fetch(self, topic: IndexedTopic, *, complete: bool) -> bool:
        """Makes a record that was asked for one of interest, once all that this needs has arrived.

        After that `record` has it, or the applied root does not list it. `complete` is whether what belongs to it, and
        no root lists, is there; without that, only the answer that there is no such record is taken.
        """
        if self.applied is None:
            return False
        entry = index_entry(topic)
        number = index_shard(entry)
        if number in self.applied.shards:
            shard = self._current_shard(number, self.applied.shards[number])
            listed = self._read(number, shard.payload) if shard is not None else None
            if shard is None or listed is None:
                return False
            if entry in listed:
                name, digest = format_topic(self._trust_domain, topic), listed[entry]
                arrival = self._inbox.get(name, digest)
                if arrival is None or not complete:
                    return False
                shard.records[entry] = _Record(digest, arrival.stamp, arrival.payload)
                self._inbox.discard(name, digest)
            self._shards[number] = shard
        self._entries[entry] = self._asked.pop(entry)
        if self.target is not None:
            self.plan()
        return True

    def drop(self, topic: IndexedTopic) -> None:
        """Ends the interest in a record, fetched or only asked for."""
        entry = index_entry(topic)
        number = index_shard(entry)
        self._inbox.forget(format_topic(self._trust_domain, topic))
        self._entries.pop(entry, None)
        self._asked.pop(entry, None)
        if number in self._shards:
            self._shards[number].records.pop(entry, None)
            if not self._is_needed(number) and number not in self._asked.values():
                del self._shards[number]
        if self.target is not None:
            self.plan()

    def record(self, topic: IndexedTopic) -> bytes | None:
        """A record of interest that the applied root lists."""
        held = self._find(topic)
        return held.payload if held is not None else None

    def records(self) -> list[str]:
        """Topics of all records of interest that the applied root lists."""
        return [self._record_topic(entry) for shard in self._shards.values() for entry in shard.records]

    def holds(self, topic: ListedTopic, digest: bytes) -> bool:
        match topic:
            case IndexTopic(_, number):
                return self._is_current(number, digest)
            case AddressesTopic():
                return False
            case _:
                held = self._find(topic)
                return held is not None and held.digest == digest

    def plan(self) -> None:
        assert self.target is not None
        self.missing, self._staged, self._staging = {}, {}, True
        for number, digest in self.target.shards.items():
            if self._is_needed(number) and not self._is_current(number, digest) and not self._stage(number, digest):
                self.missing[self._shard_topic(number)] = digest
        if not self.missing:
            self._find_missing_records()

    def arrived(self, topic: str, digest: bytes) -> bool:
        if self.missing.get(topic) != digest:
            return False
        # Shards are taken apart one by one as they come, so that no single message takes long.
        if self._staging and not self._stage(int(topic[-2:], 16), digest):
            return False
        del self.missing[topic]
        if self._staging and not self.missing:
            self._find_missing_records()
        return True

    def judge(self, topic: str, digest: bytes, arrival: Arrival) -> None:
        if self.applied is None or arrival.stamp > self.applied.stamp:
            return
        match arrival.topic:
            case AddressesTopic():
                pass
            case IndexTopic(_, number):
                if self._is_needed(number) and self.applied.shards.get(number) != digest:
                    self._report(topic, "not the shard that the root lists: altered, mixed or replayed")
            case record if self.wants(record):
                held = self._find(record)
                if held is None:
                    self._report(topic, "the root does not list it: forged, or replayed after it was deleted")
                elif arrival.stamp < held.stamp:
                    self._report(topic, "replayed: older than what the root lists")
                elif digest != held.digest:
                    self._report(topic, "altered: not what the root lists")

    def apply(self) -> list[Change]:
        assert self.target is not None
        shards: dict[int, _Shard] = {}
        changes: list[Change] = []
        for number, staged in self._staged.items():
            records: dict[str, _Record] = {}
            for entry, (topic, digest) in staged.wanted.items():
                held = self._record(number, entry)
                if held is None or held.digest != digest:
                    arrival = self._inbox.get(topic, digest)
                    if arrival is None:  # a full inbox pushed it out
                        self.plan()
                        return []
                    held = _Record(digest, arrival.stamp, arrival.payload)
                    changes.append((topic, arrival.payload))
                records[entry] = held
            shards[number] = _Shard(staged.digest, staged.payload, records)
        for number, old in self._shards.items():
            if self.target.shards.get(number) == old.digest:
                shards[number] = old
            else:
                kept = shards[number].records if number in shards else {}
                changes += [(self._record_topic(entry), None) for entry in old.records if entry not in kept]
        for number, staged in self._staged.items():
            self._inbox.discard(self._shard_topic(number), staged.digest)
            for topic, digest in staged.wanted.values():
                self._inbox.discard(topic, digest)
        self.applied, self.target = self.target, None
        self._shards, self._staged = shards, {}
        return changes

    def messages(self) -> list[tuple[str, bytes]]:
        found: list[tuple[str, bytes]] = []
        for number, shard in self._shards.items():
            found.append((self._shard_topic(number), shard.payload))
            found += [(self._record_topic(entry), record.payload) for entry, record in shard.records.items()]
        return found

    def _is_wanted(self, entry: str, topic: IndexedTopic) -> bool:
        return entry in self._entries or isinstance(topic, self.kinds)

    def _is_needed(self, number: int) -> bool:
        return bool(self.kinds) or number in self._entries.values()

    def _is_current(self, number: int, digest: bytes) -> bool:
        shard = self._shards.get(number)
        return shard is not None and shard.digest == digest

    def _record(self, number: int, entry: str) -> _Record | None:
        shard = self._shards.get(number)
        return shard.records.get(entry) if shard is not None else None

    def _find(self, topic: IndexedTopic) -> _Record | None:
        entry = index_entry(topic)
        return self._record(index_shard(entry), entry)

    def _current_shard(self, number: int, digest: bytes) -> _Shard | None:
        """A shard that the applied root lists, also when it was not of interest before."""
        if self._is_current(number, digest):
            return self._shards[number]
        arrival = self._inbox.get(self._shard_topic(number), digest)
        return _Shard(digest, arrival.payload, {}) if arrival is not None else None

    def _stage(self, number: int, digest: bytes) -> bool:
        """Takes a shard of the target apart. False: it is not here, or cannot be read."""
        arrival = self._inbox.get(self._shard_topic(number), digest)
        listed = self._read(number, arrival.payload) if arrival is not None else None
        if arrival is None or listed is None:
            return False
        wanted = {
            entry: (format_topic(self._trust_domain, topic), digest)
            for entry, digest in listed.items()
            if self._is_wanted(entry, topic := entry_topic(self.owner, entry))
        }
        self._staged[number] = _Staged(digest, arrival.payload, wanted)
        return True

    def _find_missing_records(self) -> None:
        self._staging = False
        for number, staged in self._staged.items():
            for entry, (topic, digest) in staged.wanted.items():
                held = self._record(number, entry)
                if (held is None or held.digest != digest) and self._inbox.get(topic, digest) is None:
                    self.missing[topic] = digest

    def _read(self, number: int, payload: bytes) -> Mapping[str, bytes] | None:
        """What a shard lists; None (and a report) when a signed root lists what this software cannot read."""
        topic = IndexTopic(self.owner, number)
        try:
            body = messages.decode(payload).body
            return index.read_index_shard(topic, {} if body is None else body).records
        except (messages.MessageError, RecordError) as error:
            self._report(self._shard_topic(number), f"cannot be read: {error}")
            return None

    def _shard_topic(self, number: int) -> str:
        return format_topic(self._trust_domain, IndexTopic(self.owner, number))

    def _record_topic(self, entry: str) -> str:
        return format_topic(self._trust_domain, entry_topic(self.owner, entry))


class AddressIndex(Listed):
    """All addresses of the mesh, for who needs all of them."""

    def __init__(self, trust_domain: TrustDomain, inbox: Inbox, report: Report, floor: Stamp = NEVER) -> None:
        super().__init__(trust_domain, "", inbox, report, floor)
        self._shards: dict[int, _Record] = {}

    def payload(self, number: int) -> bytes | None:
        """A shard's message; None when nobody lives there."""
        held = self._shards.get(number)
        return held.payload if held is not None else None

    def holds(self, topic: ListedTopic, digest: bytes) -> bool:
        held = self._shards.get(topic.shard) if isinstance(topic, AddressesTopic) else None
        return held is not None and held.digest == digest

    def plan(self) -> None:
        assert self.target is not None
        self.missing = {}
        for number, digest in self.target.shards.items():
            topic = AddressesTopic(number)
            name = format_topic(self._trust_domain, topic)
            if not self.holds(topic, digest) and self._inbox.get(name, digest) is None:
                self.missing[name] = digest

    def arrived(self, topic: str, digest: bytes) -> bool:
        if self.missing.get(topic) != digest:
            return False
        del self.missing[topic]
        return True

    def judge(self, topic: str, digest: bytes, arrival: Arrival) -> None:
        if self.applied is None or arrival.stamp > self.applied.stamp or not isinstance(arrival.topic, AddressesTopic):
            return
        if self.applied.shards.get(arrival.topic.shard) != digest:
            self._report(topic, "not the shard that the root lists: altered, mixed or replayed")

    def apply(self) -> list[Change]:
        assert self.target is not None
        shards: dict[int, _Record] = {}
        changes: list[Change] = []
        for number, digest in self.target.shards.items():
            topic = AddressesTopic(number)
            if self.holds(topic, digest):
                shards[number] = self._shards[number]
                continue
            name = format_topic(self._trust_domain, topic)
            arrival = self._inbox.get(name, digest)
            if arrival is None:  # a full inbox pushed it out
                self.plan()
                return []
            shards[number] = _Record(digest, arrival.stamp, arrival.payload)
            changes.append((name, arrival.payload))
        for number in self._shards.keys() - shards.keys():
            changes.append((format_topic(self._trust_domain, AddressesTopic(number)), None))
        for name, payload in changes:
            if payload is not None:
                self._inbox.discard(name, messages.digest(payload))
        self.applied, self.target, self._shards = self.target, None, shards
        return changes

    def messages(self) -> list[tuple[str, bytes]]:
        return [
            (format_topic(self._trust_domain, AddressesTopic(number)), shard.payload)
            for number, shard in self._shards.items()
        ]
