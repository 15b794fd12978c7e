"""The store: one writer, whole transactions, and what it says when it cannot be used."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress

import pytest

from control.api.declared import Family
from control.server.publication import Message, Rank
from control.server.store import Batch, Store, StoreError

WEB = ("Service", "shop", "web")
WRITER = """
import sys
from control.server.publication import Message, Rank
from control.server.store import Batch, Store
store = Store(sys.argv[1])
print("open", flush=True)
for number in range(1, 100_000):
    name = f"r{number % 50}"
    store.commit(Batch((1, number), {("Service", "shop", name): f"v{number}"}, messages=[
        Message(f"t/{name}", "shop", (1, number), Rank.RECORD, b"%d" % number * 500, b"c", 0),
        Message("t/last", "shop", (1, number), Rank.ROOT, b"%d" % number, b"c", 0),
    ]))
    print(number, flush=True)
"""


def message(topic, namespace="shop", rank=Rank.RECORD, payload=b"p", deleted_at=0):
    return Message(topic, namespace, (1, 2), rank, payload, b"c", deleted_at)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "mesh.db") as store:
        yield store


def test_a_new_store_is_empty(store):
    assert store.stamp() == (0, 0)
    assert store.documents() == []
    assert store.topics() == {}
    assert store.vips() == {}


def test_a_batch_is_read_back_after_it_was_reopened(tmp_path):
    vip = {("shop/web", Family.IPV4): "240.240.0.9"}
    batch = Batch((5, 6), {WEB: "text"}, dict(vip), [message("a"), message("b", "", Rank.ROOT)])
    with Store(tmp_path / "mesh.db") as store:
        store.commit(batch)
    with Store(tmp_path / "mesh.db") as store:
        assert store.stamp() == (5, 6)
        assert store.document(WEB) == "text"
        assert store.vips() == vip
        assert store.messages_of("shop") == [message("a")]
        assert store.messages_above_records(Rank.ROOT) == [message("b", "", Rank.ROOT)]
        assert store.messages(["b", "nothing", "a"]) == [message("b", "", Rank.ROOT), message("a")]


def test_a_batch_removes_and_replaces(store):
    store.commit(Batch((1, 1), {WEB: "old", ("Service", "zoo", "a"): "x"}, {("shop/web", Family.IPV4): "240.240.0.1"}))
    store.commit(Batch((1, 2), messages=[message("a"), message("b", deleted_at=50), message("c", deleted_at=70)]))
    # Two services swap their addresses, which no two may hold at once.
    store.commit(Batch((1, 3), vips={("shop/db", Family.IPV4): "240.240.0.2"}))
    swapped = {("shop/web", Family.IPV4): "240.240.0.2", ("shop/db", Family.IPV4): "240.240.0.1"}
    store.commit(Batch((1, 4), {WEB: None}, dict(swapped), [message("a", payload=b"new")], ["c"]))
    assert store.documents() == [(("Service", "zoo", "a"), "x")]
    assert store.vips() == swapped
    assert [one.payload for one in store.messages(["a"])] == [b"new"]
    assert store.topics() == {"a": "shop", "b": "shop"}
    assert store.tombstones(50) == []
    assert store.tombstones(51) == ["b"]
    store.commit(Batch((1, 5), vips={("shop/db", Family.IPV4): None}))
    assert store.vips().keys() == {("shop/web", Family.IPV4)}


def test_documents_are_found_by_any_part_of_their_place(store):
    places = [("Namespace", "", "shop"), ("Policy", "shop", "web"), WEB, ("Service", "zoo", "web")]
    store.commit(Batch((1, 1), {place: place[2] for place in reversed(places)}))
    assert [place for place, _ in store.documents()] == places
    assert [place for place, _ in store.documents(kind="Service")] == places[2:]
    assert [place for place, _ in store.documents(namespace="shop", name="web")] == places[1:3]
    assert store.namespaces() == {"shop", "zoo"}


def test_a_batch_that_fails_changes_nothing(store):
    store.commit(Batch((1, 1), vips={("shop/web", Family.IPV4): "240.240.0.1"}))
    taken = {("shop/db", Family.IPV4): "240.240.0.1"}
    with pytest.raises(StoreError, match="UNIQUE constraint failed"):
        store.commit(Batch((9, 9), {WEB: "text"}, dict(taken), [message("a")]))
    assert store.stamp() == (1, 1)
    assert store.document(WEB) is None
    assert store.topics() == {}
    store.commit(Batch((1, 2), {WEB: "text"}))


def test_a_full_disk_is_reported_and_undone(store):
    with store.transaction() as rows:
        (pages,) = rows.execute("PRAGMA page_count").fetchone()
        rows.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StoreError, match="cannot be written: database or disk is full"):
        store.commit(Batch((1, 1), {WEB: "x" * 100_000}))
    assert store.stamp() == (0, 0)
    store.commit(Batch((1, 1), {WEB: "short"}))


def test_an_error_of_the_caller_undoes_a_transaction(store):
    with suppress(KeyError), store.transaction() as rows:
        rows.execute("UPDATE meta SET epoch = 7")
        raise KeyError
    assert store.stamp() == (0, 0)


def test_a_second_writer_is_refused(tmp_path, store):
    with pytest.raises(StoreError, match=rf"in use by another control plane \(process {os.getpid()}\)"):
        Store(tmp_path / "mesh.db")


def test_a_closed_store_is_free_for_the_next(tmp_path):
    Store(tmp_path / "mesh.db").close()
    Store(tmp_path / "mesh.db").close()


def test_a_store_that_fails_to_open_lets_go_of_its_lock(tmp_path):
    path = tmp_path / "mesh.db"
    path.write_bytes(b"no database at all, but long enough" * 100)
    for _ in range(2):
        with pytest.raises(StoreError, match="damaged or no store: file is not a database"):
            Store(path)


def test_a_store_of_a_newer_release_is_refused(tmp_path):
    with closing(sqlite3.connect(tmp_path / "mesh.db")) as rows:
        rows.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match=r"a newer release \(schema 99; this one knows 4\)"):
        Store(tmp_path / "mesh.db")


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"none/mesh\.db\.lock cannot be opened: No such file"):
        Store(tmp_path / "none" / "mesh.db")


def test_nobody_else_may_read_it(tmp_path, store):
    store.commit(Batch((1, 1), {WEB: "text"}))
    for name in ("mesh.db", "mesh.db-wal", "mesh.db-shm", "mesh.db.lock"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0, name


def test_every_commit_is_synced(store):
    with store.transaction() as rows:
        assert rows.execute("PRAGMA synchronous").fetchone() == (2,)
        assert rows.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_killed_writer_leaves_whole_batches_and_no_lock(tmp_path):
    path = tmp_path / "mesh.db"
    last = 0
    for delay_s in (0.0, 0.05, 0.1):
        with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "open\n"
            time.sleep(delay_s)
            writer.send_signal(signal.SIGKILL)
            said = writer.stdout.read().split()
        with Store(path) as store:
            epoch, number = store.stamp()
            assert number >= int(said[-1] if said else 0), "what was reported done is there"
            assert epoch == (1 if number else 0)
            if number:
                name = f"r{number % 50}"
                assert store.document(("Service", "shop", name)) == f"v{number}"
                assert [one.payload for one in store.messages(["t/last", f"t/{name}"])] == [
                    b"%d" % number,
                    b"%d" % number * 500,
                ]
            last = max(last, number)
    assert last > 0
