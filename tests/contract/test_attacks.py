"""A broker in wrong hands, and whoever holds a proxy's key: what they send is refused, and people are told."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiomqtt

from control.api.address import parse_address
from control.client.replica import Status
from tests.contract.forgeries import FORGERIES
from tests.contract.world import PREFIX, Proxy, Records, Site, World, world
from tests.support.brokers import client
from tests.support.desired import gateway, guard, policy, route, service, together, workload
from tests.support.waiting import until

WAYPOINT = "istio.io/use-waypoint: wp"
OLD = together(
    service("web", labels=WAYPOINT),
    gateway("wp"),
    route("web", "web", ["web"], path="/v1"),
    guard("guard", "web", method="GET"),
    service("web", namespace="bank"),
    workload("web-1", "10.0.0.1", version="v1"),
    workload("db-1", "10.0.0.4", app="db", version="v1"),
    policy("a", caller="everybody"),
    policy("a", namespace="mesh-system", caller="everybody"),
)
NEW = together(
    service("web", labels=f"version: v2, {WAYPOINT}"),
    gateway("wp", labels="istio.io/waypoint-for: all"),
    route("web", "web", ["web"], path="/v2"),
    guard("guard", "web", method="DELETE"),
    workload("web-1", "10.0.0.1", version="v2"),
    workload("db-1", "10.0.0.4", app="db", version="v2"),
    policy("a", caller="nobody"),
    policy("a", namespace="mesh-system", caller="nobody"),
)

# Proxy -> topic -> how it must be told of.
TOLD: dict[str, dict[str, dict[str, str]]] = {
    "unsigned_root": {
        "web-1": {"root/shop": "altered"},
        "db-1": {"root/shop": "altered"},
        "node-a": {"addr": "altered"},
    },
    "altered_root": {"web-1": {"root/shop": "altered", "root/mesh-system": "altered"}},
    "moved_root": {"web-1": {"root/shop": "altered"}},
    "replayed": {
        "web-1": {"addr/": "replayed", "index/shop/": "replayed"},
        "node-a": {"addr": "replayed"},
        "db-1": {"policy/mesh-system/a": "replayed"},
    },
    "mixed": {
        "web-1": {"policy/shop/a": "older than what the root lists", "svc/shop/web": "older", "wl/": "older"},
        "wp-1": {"gw/shop/wp": "older", "route/shop/web": "older", "policy/shop/guard": "older"},
    },
    "altered_record": {
        "web-1": {"policy/shop/a": "altered", "gw/shop/wp": "altered"},
        "db-1": {"policy/mesh-system/a": "altered"},
        "wp-1": {"gw/shop/wp": "altered", "route/shop/web": "altered", "policy/shop/guard": "altered"},
    },
    "altered_addresses": {"web-1": {"addr/": "altered"}},
    "garbage": {"web-1": {"index/shop/": "malformed"}, "node-a": {"addr/": "malformed"}},
}


@asynccontextmanager
async def changed_once(site: Site, directory: Path) -> AsyncIterator[World]:
    """Everybody knows the second version of everything."""
    async with world(site, directory, seed=1) as made:
        made.apply(OLD)
        web = made.proxies["web-1"]
        web.want("shop/web")
        web.want_address(parse_address("10.0.0.4"))
        await made.settle()
        made.apply(NEW)
        await made.settle()
        yield made


def told(proxy: Proxy, topic: str, how: str) -> bool:
    return any(text.startswith(topic) and how in text for text in proxy.replica.problems())


def test_whatever_a_broker_forges_is_refused_and_told_of(site: Site, tmp_path: Path) -> None:
    async def check() -> None:
        async with changed_once(site, tmp_path / "world") as made:
            before = {name: dict(proxy.records) for name, proxy in made.proxies.items()}
            assert made.proxies["web-1"].state.gateway("shop/wp") is not None
            assert made.proxies["wp-1"].state.routes_for("shop/web")
            for name, expected in TOLD.items():
                await made.forge(FORGERIES[name](made.ledger, random.Random(1)))
                for which, texts in expected.items():
                    proxy = made.proxies[which]
                    for topic, how in texts.items():
                        await until(lambda proxy=proxy, topic=topic, how=how: told(proxy, topic, how))  # type: ignore[misc]
                for which, proxy in made.proxies.items():
                    assert proxy.records == before[which], f"{which} took something of {name}"
                    assert proxy.replica.whole
                    assert proxy.crash is None
                # People see it where they look: in what the proxies report.
                web = made.proxies["web-1"]
                web.subscriber.status_changed()
                await until(lambda web=web: reported(made, web) == web.replica.problems())  # type: ignore[misc]
                await made.settle()

    asyncio.run(check())


def reported(made: World, proxy: Proxy) -> tuple[str, ...]:
    report = made.plane.core.proxies().get(proxy.status_topic)
    return report.status.problems if report is not None else ()


def test_a_proxy_that_cannot_be_whole_says_what_is_missing(site: Site, tmp_path: Path) -> None:
    async def check() -> None:
        async with changed_once(site, tmp_path / "world") as made:
            web, node = made.proxies["web-1"], made.proxies["node-a"]
            forgotten = [(topic, b"") for topic, _ in FORGERIES["withheld"](made.ledger, random.Random(1))]
            await made.forge([*forgotten, ("addr/b3", b"")])
            # Who knows it keeps it: that the broker has forgotten something says nothing.
            assert web.replica.whole
            await web.stop(forget=True)
            await node.stop(forget=True)
            web.start()
            node.start()
            web.want("shop/web")
            await until(lambda: "root/shop" in web.replica.roots() or web.replica.waiting())
            await asyncio.sleep(0.5)
            assert not web.replica.whole
            assert any("index/shop/" in text for text in web.replica.waiting())
            assert web.records == {}, "before its policies are known, a proxy knows nothing"
            assert web.replica.service_status("shop/web") is Status.WAITING
            report = made.plane.core.proxies()[web.status_topic].status
            assert not report.whole
            assert report.waiting == web.replica.waiting()
            await made.settle()  # the control plane finds out what is missing

    asyncio.run(check())


def test_a_stolen_identity_changes_nothing_for_anybody(site: Site, tmp_path: Path) -> None:
    """The same forgeries with a uProxy's certificate: the broker lets none of them through."""

    async def publish(identity: Path, topic: str, payload: bytes) -> None:
        async with client(site.broker, identity) as thief:
            await thief.publish(PREFIX + topic, payload, qos=1, retain=True)

    async def check() -> None:
        async with changed_once(site, tmp_path / "world") as made:
            (stolen,) = (own for who, own in site.identities.items() if who.workload == "web-1")
            before: dict[str, Records] = {name: dict(proxy.records) for name, proxy in made.proxies.items()}
            for name in ("unsigned_root", "mixed", "altered_record"):
                for topic, payload in FORGERIES[name](made.ledger, random.Random(1)):
                    with contextlib.suppress(aiomqtt.MqttError):  # Mosquitto hangs up; NATS acknowledges and drops it
                        await publish(stolen, topic, payload)
            await made.settle()
            for name, proxy in made.proxies.items():
                assert proxy.records == before[name]
                assert proxy.replica.problems() == (), "nothing of it ever arrived"

    asyncio.run(check())


def test_a_stolen_identity_reports_for_itself_alone(site: Site, tmp_path: Path) -> None:
    async def check() -> None:
        async with changed_once(site, tmp_path / "world") as made:
            (stolen,) = (own for who, own in site.identities.items() if who.workload == "web-1")
            db = made.proxies["db-1"]
            true = made.plane.core.proxies()[db.status_topic].status
            for payload in (b"", b"\xff", db._report(False, 2**62)[1]):
                with contextlib.suppress(aiomqtt.MqttError):
                    async with client(site.broker, stolen) as thief:
                        await thief.publish(db.status_topic, payload, qos=1, retain=True)
            await made.settle()
            assert made.plane.core.proxies()[db.status_topic].status.online == true.online

    asyncio.run(check())
