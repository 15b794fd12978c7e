"""The control plane's memory: one SQLite file, one writer.

resources     what people applied: one canonical YAML document each
vips          virtual addresses that were allocated, so that a service keeps its own
records       what is (or is about to be) retained on the broker, tombstones included
meta          epoch and version of the last change set
tokens        join tokens: a digest of the secret, whom it is for, and what it was taken for
certificates  the certificates that were given out, until they end
bindings      how far each binding to a waypoint has come
canaries      likewise each canary of one
bypasses      bindings that an operator has suspended for a while
fetched_keys  what issuers publish of the keys that they sign tokens with

A change set is one transaction, synced to the disk before `commit` returns: after a crash it is there whole or not at
all. A second process is refused by a lock beside the file; the lock goes with the process that held it.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from control.api.address import IpAddress
from control.api.bindings import Canary, Subject
from control.api.declared import Family, Place
from control.api.messages import Stamp
from control.server.bindings import Bypass, Phase, State, Step, Trial
from control.server.publication import Message, Rank

Vips = dict[tuple[str, Family], IpAddress]
"""(service key, family) -> virtual address."""

_BUSY_S: Final = 10.0
"""For readers of other processes, such as a backup."""

_MIGRATIONS: Final = (
    """
    CREATE TABLE resources (
        kind TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL, document TEXT NOT NULL,
        PRIMARY KEY (namespace, kind, name)
    ) WITHOUT ROWID;
    CREATE TABLE vips (
        service TEXT NOT NULL, family TEXT NOT NULL, address TEXT NOT NULL UNIQUE,
        PRIMARY KEY (service, family)
    ) WITHOUT ROWID;
    CREATE TABLE records (
        topic TEXT NOT NULL PRIMARY KEY, namespace TEXT NOT NULL, epoch INTEGER NOT NULL, version INTEGER NOT NULL,
        rank INTEGER NOT NULL, payload BLOB NOT NULL, content BLOB NOT NULL, deleted_at INTEGER NOT NULL
    );
    CREATE INDEX records_of_namespace ON records (namespace);
    CREATE INDEX records_of_rank ON records (rank) WHERE rank > 1;
    CREATE INDEX records_deleted ON records (deleted_at) WHERE deleted_at > 0;
    CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 0), epoch INTEGER NOT NULL, version INTEGER NOT NULL);
    INSERT INTO meta VALUES (0, 0, 0);
    CREATE TABLE tokens (
        id TEXT NOT NULL PRIMARY KEY, secret_sha256 BLOB NOT NULL, identity TEXT NOT NULL, workload TEXT NOT NULL,
        addresses TEXT NOT NULL, expires_at INTEGER NOT NULL, used_at INTEGER, key_sha256 BLOB, chain BLOB
    );
    CREATE TABLE certificates (
        serial TEXT NOT NULL UNIQUE, identity TEXT NOT NULL, workload TEXT NOT NULL, addresses TEXT NOT NULL,
        not_after INTEGER NOT NULL
    );
    CREATE INDEX certificates_of_identity ON certificates (identity, workload);
    """,
    """
    CREATE TABLE bindings (
        kind TEXT NOT NULL, key TEXT NOT NULL, gateway TEXT NOT NULL, previous TEXT NOT NULL, phase TEXT NOT NULL,
        optional INTEGER NOT NULL, epoch INTEGER NOT NULL, version INTEGER NOT NULL, since REAL NOT NULL,
        PRIMARY KEY (kind, key)
    ) WITHOUT ROWID;
    CREATE TABLE bypasses (service TEXT NOT NULL PRIMARY KEY, until REAL NOT NULL, reason TEXT NOT NULL) WITHOUT ROWID;
    """,
    """
    CREATE TABLE fetched_keys (uri TEXT NOT NULL PRIMARY KEY, jwks TEXT NOT NULL) WITHOUT ROWID;
    """,
    """
    CREATE TABLE canaries (
        kind TEXT NOT NULL, key TEXT NOT NULL, gateway TEXT NOT NULL, percent INTEGER NOT NULL, step TEXT NOT NULL,
        since REAL NOT NULL, PRIMARY KEY (kind, key)
    ) WITHOUT ROWID;
    """,
)
"""Each brings a store from its index to the next version (PRAGMA user_version). Never edited once released."""

_MESSAGE: Final = "topic, namespace, epoch, version, rank, payload, content, deleted_at"

_RANKS: Final = tuple(Rank)


class StoreError(Exception):
    """The store cannot be used; the text says why and what to do."""


@dataclass(slots=True)
class Batch:
    """What one transaction writes."""

    stamp: Stamp
    documents: dict[Place, str | None] = field(default_factory=dict)
    """None: removed."""
    vips: dict[tuple[str, Family], IpAddress | None] = field(default_factory=dict)
    """None: given back."""
    messages: list[Message] = field(default_factory=list)
    collected: list[str] = field(default_factory=list)
    """Topics of tombstones that have served their time."""
    bindings: dict[Subject, State | None] = field(default_factory=dict)
    """Those that change; None: gone."""
    bypasses: dict[str, Bypass | None] = field(default_factory=dict)
    """By the service's key; None: ended."""
    fetched_keys: dict[str, str | None] = field(default_factory=dict)
    """By where they are published; None: nobody asks for them any more."""


class Store:
    """An open store. May be used by several threads; one transaction runs at a time."""

    def __init__(self, path: str | Path) -> None:
        """Opens the store, made when it is not there. Raises StoreError: held by another process, or unusable."""
        self.path = Path(path)
        self._turn = threading.RLock()
        self._lock = _lock(self.path)
        try:
            self._rows = _connect(self.path)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the use of the store, and lets another process have it."""
        with self._turn:
            self._rows.close()
            os.close(self._lock)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction: durable when the block ends, undone when it raises. They do not nest.

        Raises StoreError when the store fails, as on a full disk.
        """
        with self._turn:
            try:
                self._rows.execute("BEGIN IMMEDIATE")
                yield self._rows
                self._rows.execute("COMMIT")
            except BaseException as error:
                if self._rows.in_transaction:  # SQLite itself has undone it on some errors
                    self._rows.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise StoreError(f"{self.path} cannot be written: {error}") from error
                raise

    def commit(self, batch: Batch) -> None:
        """Writes a batch whole."""
        with self.transaction() as rows:
            rows.executemany(
                "DELETE FROM resources WHERE kind = ? AND namespace = ? AND name = ?",
                [place for place, document in batch.documents.items() if document is None],
            )
            rows.executemany(
                "INSERT OR REPLACE INTO resources (kind, namespace, name, document) VALUES (?, ?, ?, ?)",
                [(*place, document) for place, document in batch.documents.items() if document is not None],
            )
            rows.executemany(
                "DELETE FROM vips WHERE service = ? AND family = ?",
                [(service, family.value) for service, family in batch.vips],
            )
            rows.executemany(
                "INSERT INTO vips (service, family, address) VALUES (?, ?, ?)",
                [(name, family.value, vip) for (name, family), vip in batch.vips.items() if vip is not None],
            )
            rows.executemany(
                f"INSERT OR REPLACE INTO records ({_MESSAGE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (one.topic, one.namespace, *one.stamp, one.rank, one.payload, one.content, one.deleted_at)
                    for one in batch.messages
                ],
            )
            rows.executemany("DELETE FROM records WHERE topic = ?", [(topic,) for topic in batch.collected])
            rows.executemany("DELETE FROM bindings WHERE kind = ? AND key = ?", batch.bindings)
            rows.executemany(
                "INSERT INTO bindings VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (*subject, one.gateway, one.previous, one.phase.value, one.optional, *one.stamp, one.since)
                    for subject, one in batch.bindings.items()
                    if one is not None
                ],
            )
            rows.executemany("DELETE FROM canaries WHERE kind = ? AND key = ?", batch.bindings)
            rows.executemany(
                "INSERT INTO canaries VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (*subject, trial.canary.gateway, trial.canary.percent, trial.step.value, trial.since)
                    for subject, one in batch.bindings.items()
                    if one is not None and (trial := one.trial) is not None
                ],
            )
            rows.executemany("DELETE FROM bypasses WHERE service = ?", [(service,) for service in batch.bypasses])
            rows.executemany(
                "INSERT INTO bypasses VALUES (?, ?, ?)",
                [(service, one.until, one.reason) for service, one in batch.bypasses.items() if one is not None],
            )
            rows.executemany("DELETE FROM fetched_keys WHERE uri = ?", [(uri,) for uri in batch.fetched_keys])
            rows.executemany(
                "INSERT INTO fetched_keys VALUES (?, ?)",
                [(uri, jwks) for uri, jwks in batch.fetched_keys.items() if jwks is not None],
            )
            rows.execute("UPDATE meta SET epoch = ?, version = ?", batch.stamp)

    def stamp(self) -> Stamp:
        """Epoch and version of the last batch; (0, 0) for a new store."""
        ((epoch, version),) = self._all("SELECT epoch, version FROM meta")
        return epoch, version

    def document(self, place: Place) -> str | None:
        found = self._all("SELECT document FROM resources WHERE kind = ? AND namespace = ? AND name = ?", place)
        return found[0][0] if found else None

    def documents(self, kind: str = "", namespace: str = "", name: str = "") -> list[tuple[Place, str]]:
        """Resources and their documents in order of namespace, kind and name; an empty argument stands for all."""
        asked = {"kind": kind, "namespace": namespace, "name": name}
        given = [column for column, value in asked.items() if value]
        where = f" WHERE {' AND '.join(f'{column} = ?' for column in given)}" if given else ""
        found = self._all(
            f"SELECT kind, namespace, name, document FROM resources{where} ORDER BY namespace, kind, name",
            tuple(asked[column] for column in given),
        )
        return [((kind, namespace, name), document) for kind, namespace, name, document in found]

    def namespaces(self) -> frozenset[str]:
        """Namespaces that hold resources."""
        return frozenset(
            namespace for (namespace,) in self._all("SELECT DISTINCT namespace FROM resources WHERE namespace != ''")
        )

    def vips(self) -> Vips:
        found = self._all("SELECT service, family, address FROM vips")
        return {(service, Family(family)): IpAddress(address) for service, family, address in found}

    def bindings(self) -> dict[Subject, State]:
        canaries = self._all("SELECT * FROM canaries")
        trials = {
            (kind, key): Trial(Canary(gateway, percent), Step(step), since)
            for kind, key, gateway, percent, step, since in canaries
        }
        found = self._all("SELECT * FROM bindings ORDER BY kind, key")
        return {
            (kind, key): State(
                gateway, previous, Phase(phase), bool(optional), (epoch, version), since, trials.get((kind, key))
            )
            for kind, key, gateway, previous, phase, optional, epoch, version, since in found
        }

    def bypasses(self) -> dict[str, Bypass]:
        """Key of the service -> the bypass."""
        found = self._all("SELECT service, until, reason FROM bypasses ORDER BY service")
        return {service: Bypass(until, reason) for service, until, reason in found}

    def fetched_keys(self) -> dict[str, str]:
        """Where keys of issuers are published -> `control.api.jwt.canonical_jwks` of what was last fetched there."""
        return dict(self._all("SELECT uri, jwks FROM fetched_keys"))

    def message(self, topic: str) -> Message | None:
        found = self._messages("topic = ?", (topic,))
        return found[0] if found else None

    def messages_of(self, namespace: str) -> list[Message]:
        """All of a namespace (empty: addresses, trust and the list of namespaces), tombstones too."""
        return self._messages("namespace = ?", (namespace,))

    def messages_above_records(self, *ranks: Rank) -> list[Message]:
        """Manifests, shards or roots of all namespaces."""
        return self._messages(f"rank IN ({', '.join('?' * len(ranks))}) AND rank > 1", ranks)

    def messages(self, topics: Iterable[str]) -> list[Message]:
        """Those of some topics, as of one moment; topics that hold nothing are left out."""
        with self._turn:
            return [message for topic in topics if (message := self.message(topic)) is not None]

    def topics(self) -> dict[str, str]:
        """Topic -> namespace of every message."""
        return dict(self._all("SELECT topic, namespace FROM records"))

    def sizes(self) -> tuple[int, int]:
        """How many messages live, and how many are tombstones."""
        # Two counts by indexes: one of both would read every payload.
        ((records, deleted),) = self._all(
            "SELECT (SELECT count(*) FROM records), (SELECT count(*) FROM records WHERE deleted_at > 0)"
        )
        return records - deleted, deleted

    def tombstones(self, until: int) -> list[str]:
        """Topics of tombstones that were made before a time (Unix seconds)."""
        found = self._all("SELECT topic FROM records WHERE deleted_at > 0 AND deleted_at < ?", (until,))
        return [topic for (topic,) in found]

    def _messages(self, where: str, values: tuple[object, ...]) -> list[Message]:
        found = self._all(f"SELECT {_MESSAGE} FROM records WHERE {where}", values)
        return [
            Message(topic, namespace, (epoch, version), _RANKS[rank], payload, content, deleted_at)
            for topic, namespace, epoch, version, rank, payload, content, deleted_at in found
        ]

    def _all(self, query: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        with self._turn:
            try:
                return self._rows.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise StoreError(f"{self.path} cannot be read: {error}") from error


def _lock(path: Path) -> int:
    """The descriptor that holds the lock. Raises StoreError when another process does."""
    lock = path.with_name(f"{path.name}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{lock} cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise StoreError(
            f"{path} is in use by another control plane (process {holder}); a store has one writer. Stop it first"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _connect(path: Path) -> sqlite3.Connection:
    try:
        rows = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise StoreError(f"{path} cannot be opened: {error}") from None
    try:
        path.chmod(0o600)
        rows.execute("PRAGMA journal_mode = WAL")
        rows.execute("PRAGMA synchronous = FULL")
        _migrate(rows, path)
    except sqlite3.Error as error:
        rows.close()
        raise StoreError(f"{path} is damaged or no store: {error}. Restore it from a backup") from None
    except BaseException:
        rows.close()
        raise
    return rows


def _migrate(rows: sqlite3.Connection, path: Path) -> None:
    """Brings the tables up to date, each schema whole or not at all. Raises StoreError, also for a newer release's."""
    (version,) = rows.execute("PRAGMA user_version").fetchone()
    if version > len(_MIGRATIONS):
        raise StoreError(
            f"{path} was written by a newer release (schema {version}; this one knows {len(_MIGRATIONS)}). "
            "Run that release, or restore a backup from before the upgrade"
        )
    for number, statements in enumerate(_MIGRATIONS[version:], start=version + 1):
        try:
            # executescript commits what was open, so the transaction is part of the script.
            rows.executescript(f"BEGIN IMMEDIATE; {statements} PRAGMA user_version = {number}; COMMIT;")
        except sqlite3.Error as error:
            raise StoreError(
                f"{path} cannot be brought to schema {number}: {error}. It is left at schema {number - 1}; "
                "mend what that says, and start again"
            ) from None
