"""10,000 retained records: nothing is dropped in silence, also for who reads slowly."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from control.client.replica import Status
from tests.contract.world import Site, World, world
from tests.support.desired import policy, service, workload
from tests.support.waiting import until

SERVICES = 2500
NAMESPACES = ("shop", "bank", "zoo", "farm", "port")


def mesh() -> list[str]:
    """Each service has two records, and its workload two."""
    found = [policy("a"), policy("a", namespace="mesh-system"), workload("web-1", "10.0.0.1"), service("web")]
    for number in range(SERVICES):
        namespace = NAMESPACES[number % len(NAMESPACES)]
        name, address = f"s{number}", f"10.{1 + number // 250}.{number % 250}.1"
        found += [service(name, namespace), workload(f"{name}-1", address, namespace, app=name)]
    return found


def republished(made: World, since: int) -> list[str]:
    """Records that were given to the publisher after so many."""
    return [topic for topic in made.ledger.order[since:] if topic.split("/")[0] in ("svc", "wl", "policy")]


def test_ten_thousand_records_reach_everybody_however_slow(site: Site, tmp_path: Path) -> None:
    async def check() -> None:
        async with world(site, tmp_path / "world", seed=1) as made:
            began = time.monotonic()
            await asyncio.to_thread(made.apply, *mesh())
            applied = time.monotonic()
            await until(lambda: made.plane.publisher.published and not made.plane.core.pending(), 60.0)
            published = time.monotonic()
            records = [name for name in made.truth() if name.split("/")[0] in ("svc", "ep", "wl", "policy")]
            assert len(records) >= 10_000
            web, node = made.proxies["web-1"], made.proxies["node-a"]
            for number in range(10):
                web.want(f"{NAMESPACES[number % len(NAMESPACES)]}/s{number}")
            await made.settle()
            assert web.replica.service_status("zoo/s2") is Status.KNOWN
            assert len(node.addresses()) == 2 * (SERVICES + 1)
            settled = time.monotonic()
            print(
                f"apply {applied - began:.1f} s, publish {published - applied:.1f} s, all {settled - published:.1f} s"
            )

            # A node agent on a slow line, which begins anew while things change: nobody else waits for it.
            await node.stop(forget=True)
            node.way.bytes_per_s = 20_000
            node.start()
            for round_ in range(5):
                made.apply(workload("web-1", "10.0.0.1", version=f"v{round_}"), policy("a", caller=f"caller-{round_}"))
                stamp = made.plane.core.roots()["shop"][:2]
                await until(lambda stamp=stamp: web.replica.roots()["shop"][:2] == stamp)  # type: ignore[misc]
            assert len(node.addresses()) < 2 * SERVICES, "it still reads, and nobody has waited for it"
            await made.settle()

            # A control plane that begins anew reads everything, and finds that nothing is missing.
            since = len(made.ledger.order)
            made.way.bytes_per_s = 4_000_000
            await made.restart_control_plane()
            await made.settle()
            assert republished(made, since) == []

            # And a proxy that was away while much of it was deleted knows nothing of that.
            await web.stop()
            gone = [
                ("Service", NAMESPACES[number % len(NAMESPACES)], f"s{number}") for number in range(2, SERVICES, 10)
            ]
            await asyncio.to_thread(made.plane.core.delete, gone, release=True)
            web.start()
            await made.settle()
            assert web.replica.service_status("zoo/s2") is Status.ABSENT
            assert web.replica.service_status("bank/s1") is Status.KNOWN

    asyncio.run(check())
