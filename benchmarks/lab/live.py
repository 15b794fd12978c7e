"""What the control plane does: changes under traffic, and what goes on when it and its broker are gone."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from benchmarks.lab import sources
from benchmarks.lab.apps import commands
from benchmarks.lab.control import ControlPlane
from benchmarks.lab.evidence import Steps, Traffic, UnexpectedError, Web, ask, until
from benchmarks.lab.shop import DB, Shop
from benchmarks.lab.topology import Lab

_POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: reviews-too, namespace: default}
spec:
  selector: {matchLabels: {app: db}}
  action: ALLOW
  rules:
  - from: [{source: {principals: [lab.test/ns/default/sa/reviews]}}]
"""
_ENFORCED_S = 5.0
_START_S = 120.0
# Longer than a uProxy's lease on nothing at all: so many requests could not come out of a queue.
_ALONE_S = 3.0


class Live:
    """The steps, in order; traffic from web runs beside most of them."""

    def __init__(self, lab: Lab, control: ControlPlane, the_shop: Shop) -> None:
        self._lab = lab
        self._control = control
        self._shop = the_shop
        self._web = Web(the_shop.web)
        self._traffic = Traffic(the_shop.web)

    def steps(self) -> Steps:
        return [
            ("a policy applied under traffic lets reviews call db", self.policy),
            ("a label under traffic makes a new workload a backend of reviews", self.backend),
            ("a deletion under traffic takes it out again", self.deletion),
            ("no request of that traffic failed", self.no_failure),
            ("meshctl status shows each proxy's version and age", self.status),
            ("control plane and broker killed (-9): traffic goes on", self.alone),
            ("a uProxy restarts without them and serves", self.restart_alone),
            ("both are back: the next change reaches everybody", self.back),
        ]

    def policy(self) -> str:
        self._traffic.begin()
        caller, db = self._shop.reviews_v1, self._shop.db
        before = ask(caller, db, DB[1]).status
        began = time.monotonic()
        self._control.apply(_POLICY)
        took = until(lambda: ask(caller, db, DB[1]).status == 200, _ENFORCED_S, began, "reviews may not call db")
        if before != 401:
            raise UnexpectedError(f"before the policy the CONNECT of reviews was answered {before}")
        return f"CONNECT of {caller.identity} to db: 401, then 200, {took} after `meshctl apply` was started"

    def backend(self) -> str:
        host = self._shop.a
        fresh = host.workload(
            "reviews-v3", commands.python_http("v3"), service_account="reviews", labels={"app": "reviews-next"}
        )
        self._control.apply(sources.entry(fresh))
        fresh.launch()
        self._lab.wait([fresh.running], _START_S, "reviews-v3")
        if "v3" in self._traffic.told()["answers"]:
            raise UnexpectedError("v3 answers before anybody made it a backend")
        began = time.monotonic()
        self._control.meshctl("label", "workload", "reviews-v3", "app=reviews", "--overwrite")
        took = until(lambda: "v3" in self._traffic.told()["answers"], _ENFORCED_S, began, "v3 does not answer")
        return f"joined with a token; its first answer came {took} after `meshctl label … app=reviews` was started"

    def deletion(self) -> str:
        began = time.monotonic()
        self._control.meshctl("delete", "workload", "reviews-v3")
        settled = time.monotonic() - began
        time.sleep(0.5)
        before = self._traffic.told()["answers"]
        time.sleep(1.0)
        after = self._traffic.told()["answers"]
        fresh = {version: count - before.get(version, 0) for version, count in after.items()}
        if fresh.get("v3") or not fresh.get("v1") or not fresh.get("v2"):
            raise UnexpectedError(f"answers by version after the deletion: {fresh}")
        return f"`meshctl delete` took {settled * 1000:.0f} ms; then v1 {fresh['v1']}x, v2 {fresh['v2']}x, v3 never"

    def no_failure(self) -> str:
        return self._traffic.without_failure()

    def status(self) -> str:
        version, proxies = self._agreed()
        ages = ", ".join(f"{proxy['workload'].split('/')[1]} {proxy['age_s']:.1f} s" for proxy in proxies)
        return f"{len(proxies)} proxies, all of them current at version {version}; age: {ages}"

    def alone(self) -> str:
        killed = " and ".join(f"{name} ({pid})" for name, pid in self._control.processes().items())
        self._traffic.begin()
        self._control.kill()
        time.sleep(_ALONE_S)
        told = self._traffic.without_failure()
        if self._control.processes():
            raise UnexpectedError(f"still alive: {self._control.processes()}")
        return f"killed {killed}; in {_ALONE_S:g} s from then on {told}"

    def restart_alone(self) -> str:
        took = {}
        for workload in (self._shop.web, self._shop.db):
            os.kill(workload.proxy_pid(), signal.SIGKILL)
            took[workload.name] = self._web.answers_again("greeting", "hello from web")
        refused = ask(self._shop.reviews_v2, self._shop.db, DB[1])
        if refused.status != 200:
            raise UnexpectedError(f"the policy applied before is gone: reviews was answered {refused}")
        told = ", ".join(f"{name}'s: db answers web after {seconds:.2f} s" for name, seconds in took.items())
        return f"{told}; the policy applied above still lets reviews in"

    def back(self) -> str:
        self._control.start()
        caller, db = self._shop.reviews_v1, self._shop.db
        began = time.monotonic()
        self._control.meshctl("delete", "policy", "reviews-too")
        took = until(lambda: ask(caller, db, DB[1]).status == 401, _START_S, began, "db still lets reviews in")
        version, proxies = self._agreed()
        return f"its deletion is enforced at db {took} later; {len(proxies)} proxies at version {version}"

    def _agreed(self) -> tuple[str, list[dict[str, Any]]]:
        """The version, and all proxies, once every one of them has applied it."""
        expected = {workload.name for workload in self._shop.workloads()}
        expected |= {f"node-{self._lab.names.node(host.name)}" for host in self._lab.hosts}
        told: dict[str, Any] = {}
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            told = self._control.status()
            current = [proxy for proxy in told["proxies"] if proxy["state"] == "current"]
            if {proxy["workload"].partition("/")[2] for proxy in current} >= expected:
                return ".".join(map(str, told["version"])), current
            time.sleep(0.1)
        raise UnexpectedError(f"the proxies are not current within {_START_S:g} s: {told}")
