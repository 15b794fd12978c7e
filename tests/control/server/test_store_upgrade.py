"""A store of an earlier schema, opened by today's code: everything is there, and works."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from shutil import copyfile

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from control.api.declared import Family
from control.client.csr import request
from control.server import store as store_module
from control.server.ca import Authority
from control.server.core import Core
from control.server.enrolment import Enrolment, EnrolmentError, Member
from control.server.members import Members
from control.server.publication import Rank
from control.server.signing import ConfigKey
from control.server.store import Store, StoreError
from tests.support.certificates import DB, WEB
from tests.support.desired import gateway, service, workload
from tests.support.published import Shelf

FIRST = (Path(__file__).parent / "store_v1.sql").read_text()
THEN = 1_800_000_060
"""When the last change was made to it, and its epoch began a minute before."""
WEB_1 = Member(WEB, "web-1", ("10.0.0.1",))

# Dies in the middle of the second migration: the table is made, and its file written to, when the signal comes.
KILLED = """
import os, signal, sys
from control.server import store
store._MIGRATIONS = (store._MIGRATIONS[0], "CREATE TABLE bindings (kind TEXT); SELECT stop();")
connect = store.sqlite3.connect
def connected(*arguments, **options):
    rows = connect(*arguments, **options)
    rows.create_function("stop", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return rows
store.sqlite3.connect = connected
store.Store(sys.argv[1])
"""


class Upgraded:
    """The first schema's store with tokens and a certificate of a real CA, and a control plane on it.

    `web-1` holds a certificate, `fresh` is a token that nobody has used, `used` one that was, with the certificate.
    """

    def __init__(self, directory):
        self.now = THEN + 30  # of configuration; certificates go by the wall clock
        self.path, self.ca = directory / "mesh.db", directory / "ca"
        self.authority = Authority.create(self.ca, "cluster.local")
        with Store(directory / "other.db") as other:
            enrolment = Enrolment(other, self.authority, lambda *_: WEB_1, time.time)
            self.fresh, self.used = (enrolment.create_token("https://c:15012", WEB_1) for _ in range(2))
            self.key = ec.generate_private_key(ec.SECP256R1())
            self.chain = enrolment.join(self.used.id, self.used.secret, request(self.key, WEB)).chain_pem
            with closing(sqlite3.connect(self.path)) as rows, other.transaction() as new:
                rows.executescript(FIRST)
                for table in ("tokens", "certificates"):
                    for row in new.execute(f"SELECT * FROM {table}").fetchall():
                        rows.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)
                rows.commit()

    def clock(self):
        return self.now

    def start(self):
        self.store = Store(self.path)
        self.core = Core(self.store, self.authority, ConfigKey.open(self.ca, self.authority, self.now), self.clock)
        members = Members(self.core, self.authority.trust_domain)
        self.enrolment = Enrolment(self.store, self.authority, members.declared, time.time)
        return self


@pytest.fixture
def old(tmp_path):
    return Upgraded(tmp_path)


@pytest.fixture
def upgraded(old):
    yield old.start()
    old.store.close()


def schema(path):
    with closing(sqlite3.connect(path)) as rows:
        return rows.execute("PRAGMA user_version").fetchone()[0]


def content(path):
    """Table -> its rows, of all tables that the first schema has."""
    tables = ("resources", "vips", "records", "meta", "tokens", "certificates")
    with closing(sqlite3.connect(path)) as rows:
        return {table: rows.execute(f"SELECT * FROM {table} ORDER BY 1, 2, 3").fetchall() for table in tables}


def test_opening_it_changes_no_row(old):
    before = content(old.path)
    assert all(before.values()), "the first schema's store has rows in every table"
    assert schema(old.path) == 1
    with Store(old.path) as store:
        assert store.bindings() == {}
        assert store.bypasses() == {}
        assert store.stamp() == (1_800_000_000, 3)
        assert store.vips() == {("shop/web", Family.IPV4): "240.240.237.201"}
        assert len(store.documents(namespace="shop")) == 6
        assert len(store.messages_above_records(Rank.ROOT)) == 3
        assert len(store.tombstones(THEN + 1)) == 3
    assert content(old.path) == before
    assert schema(old.path) == 4


def test_what_was_published_is_taken_up_and_outdone(old):
    topic, payload = 0, 5
    shelf = Shelf({row[topic]: row[payload] for row in content(old.path)["records"]})
    upgraded = old.start()
    shelf.connect(upgraded.core)
    shelf.drain(upgraded.core)
    found = shelf.read()
    assert upgraded.core.epoch == upgraded.now
    assert {"svc/shop/web", "svc/shop/db", "policy/shop/allow", "ep/shop/web/web-1"} <= found.records.keys()
    assert found.records["svc/shop/web"]["vips"] == ["240.240.237.201"]
    assert found.addresses.keys() == {"10.0.0.1", "10.0.0.3", "240.240.7.7", "240.240.237.201"}
    upgraded.store.close()


def test_resources_are_changed_and_deleted(upgraded):
    shelf = Shelf()
    shelf.connect(upgraded.core)
    changes = upgraded.core.apply([("more.yaml", "---\n".join([workload("web-2", "10.0.0.2"), service("api")]))])
    assert changes.stamp == (upgraded.now, 2)
    assert upgraded.core.apply([("same.yaml", service("web"))]).stamp is None, "nothing about it has changed"
    upgraded.core.delete([("WorkloadEntry", "shop", "web-1")])
    shelf.drain(upgraded.core)
    found = shelf.read()
    assert "ep/shop/web/web-2" in found.records
    assert "ep/shop/web/web-1" not in found.records
    assert "10.0.0.2" in found.addresses
    assert len(upgraded.store.tombstones(upgraded.now + 1)) > 3


def test_tombstones_are_collected(upgraded):
    shelf = Shelf()
    shelf.connect(upgraded.core)
    shelf.drain(upgraded.core)
    upgraded.now += 8 * 24 * 3600
    upgraded.core.refresh()
    assert upgraded.store.tombstones(upgraded.now) == []


def test_tokens_and_certificates_are_good(upgraded):
    assert upgraded.enrolment.identities() == {WEB}
    assert upgraded.core.identities() == {WEB, DB}
    upgraded.enrolment.join(upgraded.fresh.id, upgraded.fresh.secret, request(upgraded.key, WEB))
    again = upgraded.enrolment.join(upgraded.used.id, upgraded.used.secret, request(upgraded.key, WEB))
    assert again.chain_pem == upgraded.chain, "whoever lost the answer gets it again"
    with pytest.raises(EnrolmentError, match="used already"):
        upgraded.enrolment.join(
            upgraded.used.id, upgraded.used.secret, request(ec.generate_private_key(ec.SECP256R1()), WEB)
        )
    leaf = x509.load_pem_x509_certificate(upgraded.chain).public_bytes(serialization.Encoding.DER)
    # Whose it is says the store: what the caller calls itself counts only where that knows nothing.
    renewed = upgraded.enrolment.renew(leaf, "somebody-else", request(upgraded.key, WEB))
    assert renewed.member == WEB_1
    with upgraded.store.transaction() as rows:
        kept = rows.execute("SELECT workload, addresses FROM certificates").fetchall()
    assert kept == [("web-1", json.dumps(["10.0.0.1"]))] * 3


def test_its_services_are_bound_and_bypassed(upgraded):
    upgraded.core.apply([("gateway.yaml", gateway("wp"))])
    upgraded.core.relabel(("Service", "shop", "web"), labels={"istio.io/use-waypoint": "wp"}, force=True)
    bindings = upgraded.store.bindings()
    assert list(bindings) == [("Service", "shop/web")]
    upgraded.store.close()
    assert upgraded.start().store.bindings() == bindings
    upgraded.core.bypass("shop/web", upgraded.now + 60, "a look")
    bypasses = upgraded.store.bypasses()
    assert list(bypasses) == ["shop/web"]
    upgraded.store.close()
    assert upgraded.start().core.bypasses() == bypasses


def test_a_migration_that_fails_leaves_the_store_as_it_was(old, monkeypatch):
    before = content(old.path)
    second = store_module._MIGRATIONS[1] + "INSERT INTO meta VALUES (1, 1, 1);"  # breaks its CHECK
    with monkeypatch.context() as patched:
        patched.setattr(store_module, "_MIGRATIONS", (store_module._MIGRATIONS[0], second))
        for _ in range(2):
            with pytest.raises(StoreError, match=r"mesh\.db cannot be brought to schema 2: CHECK.* left at schema 1"):
                Store(old.path)
    assert (schema(old.path), content(old.path)) == (1, before)
    with Store(old.path) as store:
        assert store.bindings() == {}


def test_a_disk_that_fills_up_meanwhile_is_named(old, monkeypatch):
    before = content(old.path)
    connect = sqlite3.connect

    def full(*arguments, **options):
        rows = connect(*arguments, **options)
        (pages,) = rows.execute("PRAGMA page_count").fetchone()
        rows.execute(f"PRAGMA max_page_count = {pages}")
        return rows

    with monkeypatch.context() as patched:
        patched.setattr(store_module.sqlite3, "connect", full)
        with pytest.raises(StoreError, match="schema 2: database or disk is full"):
            Store(old.path)
    assert (schema(old.path), content(old.path)) == (1, before)
    Store(old.path).close()


def test_a_process_that_is_killed_while_it_migrates_leaves_the_store_as_it_was(old):
    before = content(old.path)
    assert subprocess.run([sys.executable, "-c", KILLED, old.path]).returncode == -signal.SIGKILL
    assert (schema(old.path), content(old.path)) == (1, before)
    with Store(old.path) as store:
        assert store.bindings() == {}


def test_a_store_of_a_newer_schema_is_refused_and_left_alone(old, tmp_path):
    newer = len(store_module._MIGRATIONS) + 1
    with closing(sqlite3.connect(old.path)) as rows:
        rows.execute(f"PRAGMA user_version = {newer}")
    copyfile(old.path, tmp_path / "before.db")
    with pytest.raises(StoreError, match=rf"newer release \(schema {newer}; this one knows 4\)\. Run that release"):
        Store(old.path)
    assert content(old.path) == content(tmp_path / "before.db")
