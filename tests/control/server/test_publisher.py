"""The publisher on a real nats-server: what the broker holds becomes what the store says, whatever it was before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from control.api import messages, status
from control.api.identity import proxy_hash
from control.api.messages import Envelope
from control.api.status import Kind, ProxyStatus
from control.server import publisher
from control.server.ca import Authority
from control.server.core import Publication
from tests.support.brokers import BROKERS, PATIENCE_S, Broker, client
from tests.support.certificates import WEB, identity_dir
from tests.support.control_plane import ControlPlane
from tests.support.desired import policy, service, together, workload
from tests.support.published import PREFIX, Shelf
from tests.support.relay import relay
from tests.support.waiting import until, until_true

SHOP = together(service("web"), workload("web-1", "10.0.0.1"), workload("web-2", "10.0.0.2"), policy("allow"))
STATUS = f"{PREFIX}status/{proxy_hash(WEB)}/web-1"


@dataclass
class Site:
    broker: Broker
    plane: ControlPlane
    web: Path

    def apply(self, *texts: str, **options: bool) -> None:
        self.plane.core.apply([("test.yaml", together(*texts))], **options)

    async def held(self) -> Shelf:
        """What the broker holds, but for statuses."""
        shelf = Shelf()
        async with client(self.broker, self.plane.path.parent / "own") as reader:
            await reader.subscribe(PREFIX + "#")
            await reader.publish(PREFIX + "end", b"", qos=1)
            async with asyncio.timeout(PATIENCE_S):
                async for message in reader.messages:
                    topic = str(message.topic)
                    if topic == PREFIX + "end":
                        return shelf
                    if not topic.startswith(PREFIX + "status/"):
                        shelf.retained[topic] = bytes(message.payload)
        raise AssertionError

    async def put(self, topic: str, payload: bytes) -> None:
        async with client(self.broker, self.plane.path.parent / "own") as writer:
            await writer.publish(PREFIX + topic, payload, qos=1, retain=True)

    async def report(self, payload: bytes) -> None:
        async with client(self.broker, self.web) as proxy:
            await proxy.publish(STATUS, payload, qos=1, retain=True)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self.plane.running():
            await self.plane.settled()
            yield


@pytest.fixture(params=BROKERS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    authority = Authority.create(tmp_path / "ca", "cluster.local")
    with BROKERS[request.param](tmp_path / "broker", authority, [WEB]) as broker:
        plane = ControlPlane(tmp_path / "plane", tmp_path / "ca", broker.url)
        yield Site(broker, plane, identity_dir(authority, tmp_path / "web", WEB))
        plane.close()


def web_status(epoch: int) -> bytes:
    report = ProxyStatus(
        kind=Kind.UPROXY,
        workload="shop/web-1",
        version="1",
        online=True,
        whole=True,
        waiting=(),
        roots={"shop": (epoch, 1, 1)},
        applied_at=1,
        serial="01",
        not_after=1,
        problems=(),
    )
    return messages.encode(Envelope(int(time.time()), 1, int(time.time()), status.write(report)))


def test_what_is_applied_is_on_the_broker_in_an_order_in_which_all_that_is_listed_is_there(site: Site) -> None:
    async def check() -> None:
        live = Shelf()  # checks the order of what it is told
        async with client(site.broker, site.plane.path.parent / "own") as watcher:
            await watcher.subscribe(PREFIX + "#", qos=0)
            site.apply(SHOP)
            async with site.running():
                site.apply(workload("web-3", "10.0.0.3"), policy("deny", action="DENY"))
                await site.plane.settled()
                site.plane.core.delete([("WorkloadEntry", "shop", "web-2")])
                await site.plane.settled()
                held = await site.held()
            while live.retained != held.retained:
                message = await asyncio.wait_for(anext(aiter(watcher.messages)), PATIENCE_S)
                topic = str(message.topic)
                if topic != PREFIX + "end":
                    live.publish(topic, bytes(message.payload))
        found = held.read()
        assert found.addresses.keys() & {"10.0.0.1", "10.0.0.2", "10.0.0.3"} == {"10.0.0.1", "10.0.0.3"}
        assert {"svc/shop/web", "ep/shop/web/web-3", "policy/shop/deny"} <= found.records.keys()
        assert "ep/shop/web/web-2" not in found.records

    asyncio.run(check())


def test_a_broker_that_lost_everything_is_filled_again(site: Site) -> None:
    async def check() -> None:
        site.apply(SHOP)
        async with site.running():
            before = (await site.held()).retained
            site.broker.stop()
            await until(lambda: not site.plane.publisher.connected)
            assert "mqtts://" in site.plane.publisher.problem
            site.apply(workload("web-3", "10.0.0.3"))  # meanwhile
            site.broker.wipe()
            site.broker.start()
            await until(lambda: site.plane.publisher.connected)
            await site.plane.settled()
            after = await site.held()
        assert before.keys() < after.retained.keys()
        assert "ep/shop/web/web-3" in after.read().records

    asyncio.run(check())


def test_what_a_control_plane_did_not_publish_does_not_stay(site: Site) -> None:
    async def check() -> None:
        ahead = int(time.time()) + 3600
        foreign = messages.encode(Envelope(ahead, 7, 0, {"name": "ghost"}))
        for topic in ("svc/shop/ghost", "policy/shop/open", "ep/shop/web/ghost", "root/gone"):
            await site.put(topic, foreign)
        for topic in ("svc/shop/UPPER", "nonsense", "svc/shop/garbage"):
            await site.put(topic, b"\xff")
        site.apply(SHOP)
        async with site.running():
            held = await site.held()
        read = held.read()
        assert not any("ghost" in name or "open" in name for name in read.records)
        assert not held.retained.keys() & {PREFIX + "svc/shop/UPPER", PREFIX + "nonsense", PREFIX + "svc/shop/garbage"}
        assert site.plane.core.epoch > ahead

    asyncio.run(check())


def test_a_restored_store_outdoes_what_the_broker_and_proxies_remember(site: Site) -> None:
    async def check() -> None:
        site.apply(SHOP)
        old = site.plane.backup()
        async with site.running():
            site.apply(workload("web-3", "10.0.0.3"))
            await site.plane.settled()
        newest = site.plane.core.epoch
        site.plane.restore(old)
        async with site.running():
            assert site.plane.core.epoch > newest
            held = (await site.held()).read()
        assert "ep/shop/web/web-2" in held.records
        assert "ep/shop/web/web-3" not in held.records

    asyncio.run(check())


def test_an_epoch_that_only_a_proxy_remembers_is_outdone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "REFRESH_S", 0.1)
    monkeypatch.setattr(publisher, "RAISE_PAUSE_S", 0.0)

    async def check() -> None:
        ahead = int(time.time()) + 10_000
        await site.report(web_status(ahead))
        async with site.running():
            assert site.plane.core.epoch > ahead
            assert [one.status.roots for one in site.plane.core.proxies().values()] == [{"shop": (ahead, 1, 1)}]
            await site.report(web_status(ahead + 500))  # a proxy that was away until now
            await until(lambda: site.plane.core.epoch > ahead + 500)
            # Nobody has applied this. It is not believed, and hides nothing that is true.
            await site.report(web_status(2**62))
            async with client(site.broker, site.web) as other:
                await other.publish(
                    STATUS.replace("web-1", "web-2"), web_status(ahead + 900).replace(b"web-1", b"web-2"), 1
                )
            await until(lambda: site.plane.core.epoch > ahead + 900)
            assert site.plane.core.epoch < ahead + 5000

    asyncio.run(check())


def test_a_stolen_identity_cannot_have_everything_published_again_and_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "REFRESH_S", 0.1)

    async def check() -> None:
        async with site.running():
            first = site.plane.core.epoch
            await site.report(web_status(first + 10))
            await until(lambda: site.plane.core.epoch > first)
            raised = site.plane.core.epoch
            for _ in range(2):
                await site.report(web_status(raised + 10))
                await asyncio.sleep(0.5)
            assert site.plane.core.epoch == raised
            assert "is there another control plane of this mesh" in site.plane.core.problems()[-1]

    asyncio.run(check())


def test_a_disk_that_takes_nothing_ends_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "REFRESH_S", 0.1)
    monkeypatch.setattr(publisher, "RAISE_PAUSE_S", 0.0)
    core = site.plane.core

    def writable(be: bool) -> None:
        site.plane.store._rows.execute(f"PRAGMA query_only = {not be}")

    def told() -> int:
        return sum("cannot be written" in problem for problem in core.problems())

    async def check() -> None:
        async with site.running():
            writable(False)
            await until(told)
            await site.report(web_status(core.epoch + 1000))
            await asyncio.sleep(0.5)
            assert told() == 1
            writable(True)
            before = core.roots()["mesh-system"]
            await until(lambda: core.roots()["mesh-system"] > before)
            site.apply(SHOP)
            await site.plane.settled()
            assert "svc/shop/web" in (await site.held()).read().records

    asyncio.run(check())


def test_roots_are_signed_again_all_the_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "REFRESH_S", 0.1)
    ahead = 0.0
    site.plane.close()
    site.plane = ControlPlane(
        site.plane.path.parent, Path(site.plane._ca_dir), site.broker.url, lambda: time.time() + ahead
    )

    async def check() -> None:
        nonlocal ahead

        async def roots() -> list[Envelope]:
            held = await site.held()
            held.read()  # the signature is right each time
            return [messages.decode(held.retained[PREFIX + name]) for name in ("root/shop", "addr")]

        site.apply(SHOP)
        async with site.running():
            first = await roots()
            ahead = 60.0

            async def later() -> bool:
                return all(new.issued_at >= old.issued_at + 60 for new, old in zip(await roots(), first, strict=True))

            await until_true(later)
            assert [one.stamp for one in await roots()] == [one.stamp for one in first]

    asyncio.run(check())


def test_a_connection_that_is_cut_or_hangs_is_dialled_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control.client.mqtt.TIMEOUT_S", 1.0)

    async def check() -> None:
        async with relay(site.broker.port) as way:
            site.plane.close()
            site.plane = ControlPlane(site.plane.path.parent, Path(site.plane._ca_dir), way.url)
            async with site.running():
                for index, fault in enumerate((way.cut, way.partition, way.refuse), 1):
                    fault()
                    site.apply(SHOP, workload("more", f"10.0.1.{index}"))
                    if fault is way.partition:
                        await until(lambda: not site.plane.publisher.connected)
                    way.heal()
                    await until(lambda: site.plane.publisher.connected)
                    await site.plane.settled()
                    address = (await site.held()).read().records["ep/shop/web/more"]["address"]
                    assert address == f"10.0.1.{index}"

    asyncio.run(check())


def test_a_slow_line_is_no_silent_broker(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control.client.mqtt.TIMEOUT_S", 0.8)
    monkeypatch.setattr(publisher, "_QUIET_S", 0.05)  # shorter than the line's own pauses, which mean nothing

    async def check() -> None:
        async with client(site.broker, site.plane.path.parent / "own") as writer:
            for number in range(300):
                await writer.publish(f"{PREFIX}policy/shop/p{number}", bytes(5000), qos=1, retain=True)
        async with relay(site.broker.port) as way:
            site.plane.close()
            site.plane = ControlPlane(site.plane.path.parent, Path(site.plane._ca_dir), way.url)
            way.bytes_per_s = 500_000
            async with site.running():
                assert not any(topic.startswith(PREFIX + "policy/") for topic in (await site.held()).retained)

    asyncio.run(check())


def test_an_audit_ends_with_silence_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "_QUIET_S", 0.2)

    async def check() -> None:
        audit = publisher._Audit()
        loop = asyncio.get_running_loop()
        for number in range(5):
            loop.call_later(0.1 * number, audit.take, f"{PREFIX}svc/shop/s{number}", b"")
        await audit.silence()
        assert len(audit.held) == 5

    asyncio.run(check())


def test_at_most_sixteen_publishes_are_in_flight_and_in_order() -> None:
    class Counting:
        def __init__(self) -> None:
            self.in_flight = self.most = 0
            self.topics: list[str] = []

        async def publish(self, topic: str, payload: bytes) -> None:
            self.topics.append(topic)
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
            await asyncio.sleep(0)
            self.in_flight -= 1

    counting = Counting()
    batch = [Publication(str(number), b"") for number in range(200)]
    asyncio.run(publisher._send(counting, batch))  # type: ignore[arg-type]
    assert counting.topics == [one.topic for one in batch]
    assert 8 <= counting.most <= 16
