"""Simulated proxies, many in one process: a uProxy's client of the control plane, with no data plane behind it.

    python -m benchmarks.simulated < PLAN

PLAN is JSON: {"trust_domain", "brokers": [url], "bundle": FILE, "proxies": [{"identity", "workload", "directory",
"services": [key], "all_addresses": bool}]}. What happens is told in lines of JSON, with times of CLOCK_MONOTONIC:

    {"event": "whole", "at"}                           every proxy knows all that it wants
    {"event": "applied", "root", "version", "at": []}  every proxy has this version of a root, or a newer one
    {"event": "endpoint", "topic", "at"}               an endpoint's record has changed; with one proxy only
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from control.api import messages, status
from control.api.identity import SpiffeId, proxy_hash
from control.api.messages import Envelope
from control.api.status import Kind, ProxyStatus
from control.api.topics import StatusTopic, format_topic
from control.client.libcrypto import ConfigVerifier
from control.client.mqtt import BrokerAccess
from control.client.replica import Batch, Replica
from control.client.state import State
from control.client.subscriber import Subscriber

# Those who connect at once share the broker's patience for a handshake.
_AT_ONCE = 20
_PAUSE_S = 0.1


class Proxy:
    """One proxy: its replica, what it makes of it, and the subscriber that feeds it."""

    def __init__(self, plan: dict[str, Any], mesh: dict[str, Any], on_batch: Callable[[Proxy, Batch], None]) -> None:
        self._identity = SpiffeId.parse(plan["identity"])
        self._workload = str(plan["workload"])
        self._directory = Path(plan["directory"])
        self._bundle = Path(mesh["bundle"])
        self._started = int(time.time())
        self._on_batch = on_batch
        roots = [ssl.PEM_cert_to_DER_cert(self._bundle.read_text())]
        self.replica = Replica(mesh["trust_domain"], ConfigVerifier(mesh["trust_domain"], lambda: roots))
        if plan.get("all_addresses"):
            self.replica.want_all_addresses()
        else:
            self.replica.want_workload(self._identity, self._workload)
        for service in plan.get("services", ()):
            self.replica.want_service(service)
        self.services = len(plan.get("services", ()))
        self._state = State(mesh["trust_domain"])
        access = BrokerAccess(mesh["brokers"], self._identity, self._context)
        self.subscriber = Subscriber(self.replica, access, self._apply, self._report)

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # the identity of the broker is checked, not its name
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(self._bundle)
        context.load_cert_chain(self._directory / "chain.pem", self._directory / "key.pem")
        return context

    def _apply(self, batch: Batch) -> None:
        self._state.apply(batch)
        self._on_batch(self, batch)
        self.subscriber.status_changed()

    def _report(self, online: bool, version: int) -> tuple[str, bytes]:
        topic = StatusTopic(proxy_hash(self._identity), self._workload)
        told = ProxyStatus(
            kind=Kind.UPROXY,
            workload=f"{self._identity.namespace}/{self._workload}",
            version="simulated",
            online=online,
            whole=self.replica.whole,
            waiting=self.replica.waiting(),
            roots=self.replica.roots(),
            applied_at=int(time.time()),
            serial="0",
            not_after=self._started + 3600,
            problems=self.replica.problems(),
        )
        payload = messages.encode(Envelope(self._started, version, int(time.time()), status.write(told)))
        return format_topic(self._identity.trust_domain, topic), payload


class Fleet:
    """All proxies of the process, and what is told of them."""

    def __init__(self, mesh: dict[str, Any]) -> None:
        self._proxies = [Proxy(plan, mesh, self._on_batch) for plan in mesh["proxies"]]
        self._whole: set[Proxy] = set()
        self._applied: dict[tuple[str, int, int], dict[Proxy, float]] = {}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number, proxy in enumerate(self._proxies):
                if number and not number % _AT_ONCE:
                    await asyncio.sleep(_PAUSE_S)
                group.create_task(proxy.subscriber.run())

    def _on_batch(self, proxy: Proxy, batch: Batch) -> None:
        now = time.monotonic()
        if proxy not in self._whole and proxy.replica.based and proxy.replica.whole:
            self._whole.add(proxy)
            if len(self._whole) == len(self._proxies):
                _tell(event="whole", at=now)
        for name, (epoch, version, _) in proxy.replica.roots().items():
            applied = self._applied.setdefault((name, epoch, version), {})
            if proxy not in applied:
                applied[proxy] = now
                if len(applied) == len(self._proxies):
                    _tell(event="applied", root=name, version=[epoch, version], at=list(applied.values()))
        if len(self._proxies) == 1 and proxy in self._whole:
            for topic, _ in batch:
                if topic.split("/")[3] == "ep":
                    _tell(event="endpoint", topic=topic, at=now)


def _tell(**event: object) -> None:
    print(json.dumps(event), flush=True)


def main() -> int:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(Fleet(json.loads(sys.stdin.read())).run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
