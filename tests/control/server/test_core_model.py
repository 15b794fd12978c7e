"""Any history of changes, crashes, lost connections and restores ends in the desired state on the broker.

The broker is a `Shelf`, whose reader checks every root, digest and signature, and the order of what is published. What
is desired, the `Oracle` works out from all documents at once; the control plane never does that. Two proxies
follow: one that dials services, and a node agent that wants all addresses.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from control.api import resources
from control.api.identity import SpiffeId
from control.api.problems import ResourceErrors
from control.server.ca import Authority
from control.server.core import Core
from control.server.registry import Held
from control.server.signing import ConfigKey
from control.server.store import Store
from tests.support.desired import (
    endpoints,
    namespace,
    peer_authentication,
    policy,
    service,
    together,
    workload,
)
from tests.support.examples import examples
from tests.support.follower import Follower
from tests.support.oracle import Oracle, build
from tests.support.published import Shelf

NAMESPACES = ["mesh-system", "shop", "zoo"]
WORKLOADS = [f"w{number}" for number in range(5)]
APPS = ["a", "b"]
SERVICES = tuple(f"{where}/{app}" for where in NAMESPACES for app in APPS)
DIALLER = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/a")
ODD = st.integers(0, 9).map(lambda number: number == 0)
"""True once in ten times: most changes must be good ones for a history to get anywhere."""


def usual_address(name, namespace):
    return f"10.0.{NAMESPACES.index(namespace)}.{WORKLOADS.index(name) + 1}"


@st.composite
def documents(draw):
    kind = draw(
        st.sampled_from(["service", "workload", "workload", "workload", "endpoints", "policy", "authentication"])
    )
    where, app = draw(st.sampled_from(NAMESPACES)), draw(st.sampled_from(APPS))
    match kind:
        case "service":
            selected = draw(st.sampled_from(["", "", "a", "none", "none"]))
            vip = draw(st.sampled_from(["", "10.9.0.1", "10.0.0.1"])) if draw(ODD) else ""
            datagrams = draw(st.sampled_from([0, 0, 53, 69]))
            return service(app, where, selected, vip, draw(st.sampled_from(["", "a: b"])), datagrams)
        case "workload":
            name = draw(st.sampled_from(WORKLOADS))
            address = (
                usual_address(*draw(st.tuples(st.sampled_from(WORKLOADS), st.sampled_from(NAMESPACES))))
                if draw(ODD)
                else usual_address(name, where)
            )
            account = draw(st.sampled_from(["", "", "x"]))
            return workload(name, address, where, app, account, draw(st.sampled_from(["v1", "v2"])))
        case "endpoints":
            names = draw(st.lists(st.sampled_from(WORKLOADS), min_size=1, max_size=2, unique=True))
            ready = [(usual_address(name, where), draw(st.booleans())) for name in names]
            return endpoints(f"of-{app}", app, ready, where)
        case "authentication":
            mode = draw(st.sampled_from(["STRICT", "PERMISSIVE", "UNSET"]))
            of_app = "" if where == "mesh-system" else draw(st.sampled_from(["", "a"]))
            return peer_authentication(f"for-{of_app or 'all'}", where, mode, of_app)
        case "policy":
            action = draw(st.sampled_from(["ALLOW", "DENY"]))
            return policy(draw(st.sampled_from(["p0", "p1"])), where, draw(st.sampled_from(["", "a"])), action)


def distinct(texts):
    """Without all but the last text for one resource."""
    return list({resources.place_of(resources.parse(text, "given")[0]): text for text in texts}.values())


def namespace_of(place):
    return place[2] if place[0] == "Namespace" else place[1]


class Histories(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.directory = Path(tempfile.mkdtemp())
        Authority.create(self.directory / "ca", "cluster.local")
        self.authority = Authority.open(self.directory / "ca")
        self.now = 1_800_000_000
        self.shelf = Shelf()
        self.oracle = Oracle()
        self.backup = None
        self.dialler = Follower(self.authority, self.shelf, lambda: self.now)
        self.dialler.replica.want_workload(DIALLER, "w0")
        for key in SERVICES:
            self.dialler.replica.want_service(key)
        self.node = Follower(self.authority, self.shelf, lambda: self.now)
        self.node.replica.want_all_addresses()
        self.open()
        self.connect_proxies(0)
        for where in NAMESPACES:
            served = [workload(name, usual_address(name, where), where, "a") for name in WORKLOADS[:3]]
            self.apply([service("a", where), service("b", where), *served], release=False, doubled=False)

    def teardown(self):
        if hasattr(self, "store"):
            self.settle()
            self.store.close()
            shutil.rmtree(self.directory)

    def open(self):
        self.now += 5
        self.store = Store(self.directory / "mesh.db")
        self.store._rows.execute("PRAGMA synchronous = OFF")  # no power fails here, and it takes most of the time
        key = ConfigKey.open(self.directory / "ca", self.authority, self.now)
        self.core = Core(self.store, self.authority, key, lambda: self.now)
        self.shelf.connect(self.core)

    @rule(
        texts=st.lists(documents(), min_size=1, max_size=8), release=st.sampled_from([False, False, True]), doubled=ODD
    )
    def apply(self, texts, release, doubled):
        text = together(*(texts if doubled else distinct(texts)))
        self.change(lambda: self.core.apply([("test.yaml", text)], release=release), text, (), release)

    @rule(name=st.sampled_from(["shop", "zoo"]), all_of_them=st.booleans())
    def declare(self, name, all_of_them):
        text = together(*map(namespace, NAMESPACES if all_of_them else [name]))
        self.change(lambda: self.core.apply([("test.yaml", text)]), text, (), False)

    @precondition(lambda self: self.core.get())
    @rule(data=st.data(), release=st.sampled_from([False, False, True]))
    def delete(self, data, release):
        existing = [place for place, _ in self.core.get()]
        places = data.draw(st.lists(st.sampled_from(existing), min_size=1, unique=True))
        self.change(lambda: self.core.delete(places, release=release), "", places, release)

    @precondition(lambda self: self.core.get("WorkloadEntry"))
    @rule(data=st.data(), app=st.sampled_from([*APPS, None]))
    def relabel(self, data, app):
        place, text = data.draw(st.sampled_from(self.core.get("WorkloadEntry")))
        edited = text.replace("app: a\n", f"app: {app}\n").replace("app: b\n", f"app: {app}\n") if app else ""
        self.change(lambda: self.core.relabel(place, labels={"app": app}), edited, (), False, checked=app is not None)

    def change(self, act, text, removed, release, checked=True):
        before = dict(self.core.get())
        try:
            changes = act()
        except (ResourceErrors, Held) as problem:
            assert dict(self.core.get()) == before
            if checked:
                self.check_refusal(problem, before, text, removed)
            return
        after = dict(self.core.get())
        touched = {place for place in before.keys() | after.keys() if before.get(place) != after.get(place)}
        if release:
            touched |= {change.place for change in changes.resources}
        names = {namespace_of(place) for place in touched}
        declared_first = any(place[0] == "Namespace" for place in after) and not any(
            place[0] == "Namespace" for place in before
        )
        if declared_first:
            names |= set(NAMESPACES)
        self.oracle.change(self.core, self.store, names if release else ())

    def check_refusal(self, problem, before, text, removed):
        """What was refused in parts is refused as a whole."""
        stored = {place: resources.parse(document, "stored")[0] for place, document in before.items()}
        try:
            given = resources.parse(text, "given") if text else []
            after = stored | {resources.place_of(one): one for one in given}
        except ResourceErrors:
            return
        if len({resources.place_of(one) for one in given}) < len(given):
            return
        after = {place: one for place, one in after.items() if place not in removed}
        if isinstance(problem, Held):
            guarded = [place for place in before if place[0] in ("Service", "WorkloadEntry")]
            gone = {name: [p for p in guarded if p[1] == name and p not in after] for name in NAMESPACES}
            assert any(
                len(gone[name]) >= 4 and 2 * len(gone[name]) > sum(p[1] == name for p in guarded) for name in NAMESPACES
            )
        else:
            with pytest.raises(ResourceErrors):
                build(after.values(), self.store)

    @rule(batches=st.integers(1, 3))
    def publish_some(self, batches):
        for _ in range(batches):
            for one in self.core.pending():
                self.shelf.publish(one.topic, one.payload)
            self.core.published()

    @rule(share=st.floats(0, 1))
    def lose_the_connection(self, share):
        batch = self.core.pending()
        for one in batch[: int(share * len(batch))]:
            self.shelf.publish(one.topic, one.payload)
        self.shelf.connect(self.core)

    @rule(data=st.data())
    def lose_messages_on_the_broker(self, data):
        if self.shelf.retained:
            lost = data.draw(st.lists(st.sampled_from(sorted(self.shelf.retained)), unique=True, max_size=5))
            for topic in lost:
                del self.shelf.retained[topic]
        self.shelf.connect(self.core)

    @rule(wiped=st.booleans(), share=st.floats(0, 1))
    def crash(self, wiped, share):
        batch = self.core.pending()
        for one in batch[: int(share * len(batch))]:
            self.shelf.publish(one.topic, one.payload)
        self.store.close()
        if wiped:
            self.shelf.retained.clear()
            self.connect_proxies(0)
        self.open()

    @rule(seed=st.integers(0, 2**32))
    def connect_proxies(self, seed):
        self.dialler.connect(seed)
        self.node.connect(seed)

    @rule()
    def back_up(self):
        copy = self.directory / "backup.db"
        copy.unlink(missing_ok=True)
        with closing(sqlite3.connect(self.directory / "mesh.db")) as live, closing(sqlite3.connect(copy)) as kept:
            live.backup(kept)
        self.backup = replace(self.oracle)

    @precondition(lambda self: self.backup is not None)
    @rule()
    def restore(self):
        self.store.close()
        shutil.copy(self.directory / "backup.db", self.directory / "mesh.db")
        self.oracle = replace(self.backup)
        self.open()

    @rule(passed_s=st.sampled_from([1, 30, 8 * 24 * 3600, 16 * 24 * 3600]))
    def time_passes(self, passed_s):
        self.now += passed_s
        self.core.refresh()

    @rule()
    def settle(self):
        self.shelf.drain(self.core)
        self.oracle.check(self.shelf.read())
        self.dialler.check(self.oracle, DIALLER, "w0", SERVICES)
        self.node.check_addresses(self.oracle)


@pytest.mark.parametrize("histories", [15, pytest.param(400, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_any_history_ends_in_the_desired_state(histories):
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=examples(histories), stateful_step_count=30, suppress_health_check=list(HealthCheck)
        ),
    )
