"""The contract of DESIGN.md section 4, held on both brokers.

After any mix of publishes, deletions, duplicates, reordering, disconnects, broker restarts and control-plane restarts,
every proxy's state equals the control plane's, never goes back in version, and it knows whether it is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import tempfile
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from control.api.address import parse_address
from control.api.problems import ResourceErrors
from tests.contract.conftest import PROXIES
from tests.contract.forgeries import FORGERIES
from tests.contract.world import Site, World, world
from tests.support.desired import (
    endpoints,
    gateway,
    guard,
    policy,
    request_authentication,
    route,
    service,
    traffic_policy,
    workload,
)

SERVICES = ("shop/web", "shop/db", "bank/web")
WORKLOADS = {
    "shop/web-1": ("10.0.0.1", "web"),
    "shop/web-2": ("10.0.0.2", "web"),
    "shop/web-3": ("10.0.0.3", "web"),
    "shop/db-1": ("10.0.0.4", "db"),
    "bank/web-1": ("10.0.0.5", "web"),
    "bank/web-2": ("10.0.0.6", "web"),
}
POLICIES = ("shop/a", "shop/b", "bank/a", "mesh-system/a")
GATEWAYS = ("shop/wp", "bank/gw")
ROUTES = ("shop/web", "shop/db", "bank/web")
"""Each is attached to the service of its name."""
KINDS = {
    "svc": "Service",
    "wl": "WorkloadEntry",
    "policy": "AuthorizationPolicy",
    "guard": "AuthorizationPolicy",
    "reqauth": "RequestAuthentication",
    "traffic": "TrafficPolicy",
    "slice": "EndpointSlice",
    "gw": "Gateway",
    "route": "HTTPRoute",
}

proxies = st.sampled_from([who.workload for who in PROXIES])
who = st.one_of(proxies, st.just("control-plane"))
resources = st.one_of(
    st.tuples(st.just("svc"), st.sampled_from(SERVICES)),
    st.tuples(st.just("wl"), st.sampled_from([*WORKLOADS])),
    st.tuples(st.just("wl"), st.sampled_from([*WORKLOADS])),
    st.tuples(st.just("policy"), st.sampled_from(POLICIES)),
    st.tuples(st.just("guard"), st.sampled_from(["shop/guard", "bank/guard"])),
    st.tuples(st.just("reqauth"), st.sampled_from(["shop/tokens", "bank/tokens"])),
    st.tuples(st.just("traffic"), st.sampled_from(["shop/limit", "bank/limit"])),
    st.tuples(st.just("gw"), st.sampled_from(GATEWAYS)),
    st.tuples(st.just("route"), st.sampled_from(ROUTES)),
    st.tuples(st.just("slice"), st.just("shop/web-slice")),
)


class Contract(RuleBasedStateMachine):
    """What may happen. `site` is set by the test."""

    site: ClassVar[Site]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.broker = self.site.broker
        self.directory = Path(tempfile.mkdtemp(prefix="contract-"))
        self.stack = AsyncExitStack()
        self.desired: set[tuple[str, str]] = set()
        self.backed_up: set[tuple[str, str]] | None = None
        self.count = 0

    @initialize(seed=st.integers(0, 2**32), unruly=st.sampled_from([0.0, 0.2, 0.6]))
    def begin(self, seed: int, unruly: float) -> None:
        self.chance = random.Random(seed)
        self.broker.kill()
        self.broker.wipe()
        self.broker.start()
        self.world: World = self.run(self.stack.enter_async_context(world(self.site, self.directory, seed)))
        for proxy in self.world.proxies.values():
            proxy.unruly = unruly
        # Of a namespace that never had a record, nothing is published: whoever asks for a service there waits.
        first = {("svc", "shop/web"), ("wl", "shop/web-1"), ("wl", "shop/db-1"), ("policy", "bank/a")}
        self.apply(first | {("gw", gateway) for gateway in GATEWAYS})
        assert self.desired

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                self.run(self.world.settle())
        finally:
            self.run(self.stack.aclose())
            self.runner.close()
            shutil.rmtree(self.directory, ignore_errors=True)

    def run(self, action: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(action)

    def apply(self, added: set[tuple[str, str]]) -> None:
        # A slice may name a workload, and a label a Gateway, that was just deleted.
        with contextlib.suppress(ResourceErrors):
            self.world.apply(*(self.text(*each) for each in sorted(added)))
            self.desired |= added

    def text(self, kind: str, name: str) -> str:
        """A resource that differs each time."""
        self.count += 1
        namespace, _, own = name.partition("/")
        match kind:
            case "svc":
                waypoint = self.chance.choice(
                    [
                        "",
                        ", istio.io/use-waypoint: wp, istio.io/use-waypoint-namespace: shop",
                        ", istio.io/use-waypoint: gw, istio.io/use-waypoint-namespace: bank",
                    ]
                )
                canary = self.chance.choice(["", "", "bank/gw=50", "shop/wp=10"])
                return service(own, namespace, labels=f"version: v{self.count}{waypoint}", canary=canary)
            case "wl":
                address, app = WORKLOADS[name]
                return workload(own, address, namespace, app, version=f"v{self.count}")
            case "policy":
                return policy(own, namespace, caller=f"caller-{self.count}")
            case "guard":
                return guard(own, "web", namespace, method=f"M{self.count}")
            case "reqauth":
                return request_authentication(own, "web", namespace, issuer=f"issuer-{self.count}")
            case "traffic":
                return traffic_policy(own, "web", namespace, requests=self.count)
            case "gw":
                return gateway(
                    own, namespace, labels=f"istio.io/waypoint-for: {self.chance.choice(['all', 'service'])}"
                )
            case "route":
                backends = ["web", "db"] if namespace == "shop" else ["web"]
                return route(own, own, self.chance.sample(backends, 1), namespace, path=f"/{self.count}")
        backing = [its for kind, its in sorted(self.desired) if kind == "wl" and its.startswith("shop/web")]
        return endpoints(own, "web", [(WORKLOADS[its][0], self.chance.random() < 0.6) for its in backing])

    # Changes

    @rule(added=st.sets(resources, min_size=1, max_size=4))
    def change(self, added: set[tuple[str, str]]) -> None:
        self.apply(added)

    @rule(removed=st.sets(resources, min_size=1, max_size=3))
    def delete(self, removed: set[tuple[str, str]]) -> None:
        self.delete_desired(removed)

    def delete_desired(self, removed: set[tuple[str, str]]) -> None:
        gone = removed & self.desired
        if gone:
            places = [(KINDS[kind], *name.split("/")) for kind, name in sorted(gone)]
            with contextlib.suppress(ResourceErrors):  # and a deleted workload may be in a slice
                self.world.plane.core.delete(places, release=True, force=True)
                self.desired -= gone

    @rule(which=proxies, name=st.sampled_from(SERVICES), wanted=st.booleans())
    def interest(self, which: str, name: str, wanted: bool) -> None:
        proxy = self.world.proxies[which]
        if proxy.running and which not in ("node-a", "wp-1"):
            (proxy.want if wanted else proxy.drop)(name)

    @rule(which=st.sampled_from(["web-1", "db-1"]), name=st.sampled_from([*WORKLOADS]))
    def address(self, which: str, name: str) -> None:
        if self.world.proxies[which].running:
            self.world.proxies[which].want_address(parse_address(WORKLOADS[name][0]))

    @rule(added=st.sets(resources, min_size=1, max_size=4), removed=st.sets(resources, max_size=2))
    def changes_in_quick_succession(self, added: set[tuple[str, str]], removed: set[tuple[str, str]]) -> None:
        for _ in range(3):
            self.apply(added)
            self.delete_desired(removed)
            self.run(asyncio.sleep(0.01))

    @rule(number=st.integers(0, 255))
    def revoke(self, number: int) -> None:
        self.world.plane.core.revoke((bytes([number]),))

    @rule()
    def sign_again(self) -> None:
        self.world.plane.core.refresh()

    # Faults

    @rule(which=who)
    def cut(self, which: str) -> None:
        self.way(which).cut()

    @rule(which=who)
    def partition(self, which: str) -> None:
        self.way(which).partition()

    @rule(which=who)
    def refuse(self, which: str) -> None:
        self.way(which).refuse()

    @rule(which=who)
    def heal(self, which: str) -> None:
        self.way(which).heal()

    @rule(which=proxies)
    def slow(self, which: str) -> None:
        self.way(which).bytes_per_s = 50_000

    @rule(which=proxies, forget=st.booleans())
    def stop_proxy(self, which: str, forget: bool) -> None:
        self.run(self.world.proxies[which].stop(forget=forget))

    @rule(which=proxies)
    def start_proxy(self, which: str) -> None:
        async def start() -> None:
            self.world.proxies[which].start()

        if not self.world.proxies[which].running:
            self.run(start())

    @precondition(lambda self: self.broker.process is not None)
    @rule(how=st.sampled_from(["stop", "kill", "wipe"]), back=st.booleans())
    def broker_ends(self, how: str, back: bool) -> None:
        (self.broker.stop if how == "stop" else self.broker.kill)()
        if how == "wipe":
            self.broker.wipe()
        if back:
            self.broker.start()

    @precondition(lambda self: self.broker.process is None)
    @rule()
    def broker_is_back(self) -> None:
        self.broker.start()

    @rule()
    def restart_control_plane(self) -> None:
        self.run(self.world.restart_control_plane())

    @rule()
    def back_up(self) -> None:
        self.run(self.world.back_up())
        self.backed_up = set(self.desired)

    @precondition(lambda self: self.backed_up is not None)
    @rule()
    def restore(self) -> None:
        self.run(self.world.restore())
        assert self.backed_up is not None
        self.desired = set(self.backed_up)

    @precondition(lambda self: self.broker.process is not None)
    @rule(forgery=st.sampled_from([*FORGERIES]))
    def forge(self, forgery: str) -> None:
        self.run(self.world.forge(FORGERIES[forgery](self.world.ledger, self.chance)))

    # What must hold

    @rule(seconds=st.sampled_from([0.05, 0.2]))
    def time_passes(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @rule()
    def settle(self) -> None:
        self.run(self.world.settle())

    @invariant()
    def nobody_saw_anything_wrong(self) -> None:
        if hasattr(self, "world"):
            self.run(asyncio.sleep(0.01))
            for proxy in self.world.proxies.values():
                if proxy.crash is not None:
                    raise proxy.crash

    def way(self, which: str) -> Any:
        return self.world.way if which == "control-plane" else self.world.proxies[which].way


@pytest.fixture
def contract(site: Site) -> type[Contract]:
    machine: type[Contract] = type("OfBroker", (Contract,), {})
    machine.site = site
    return machine


def histories(machine: type[Contract], number: int, steps: int) -> None:
    # An example takes seconds and has real races in it: to shrink it would take an hour and lead elsewhere.
    settings_ = settings(
        max_examples=number,
        stateful_step_count=steps,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=settings_)


def test_every_proxy_ends_up_with_what_the_control_plane_says(contract: type[Contract]) -> None:
    histories(contract, int(os.environ.get("HISTORIES", "2")), 80)


@pytest.mark.soak
def test_every_proxy_ends_up_with_what_the_control_plane_says_for_long(contract: type[Contract]) -> None:
    histories(contract, 100, 150)
