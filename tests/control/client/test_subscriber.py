"""A replica's line to the broker: real brokers, real TLS, the loop that carries traffic, and what goes wrong."""

import asyncio
import contextlib
import gc
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import aiomqtt
import pytest

from control.api import messages
from control.api.identity import proxy_hash
from control.api.messages import Envelope
from control.api.topics import subtree
from control.client import mqtt, subscriber
from control.client.mqtt import BrokerAccess
from control.client.subscriber import Subscriber
from control.server.ca import Authority
from tests.support import brokers
from tests.support.brokers import Broker
from tests.support.certificates import WEB, identity_dir
from uproxy import plane
from uproxy.plane import Plane

STATUS = f"mesh/v1/cluster.local/status/{proxy_hash(WEB)}/web-1"
SHOP = "mesh/v1/cluster.local/svc/shop"


class Replica:
    """Records what it is fed; wants what a test says. The subscriber's side of the real one, without its checks."""

    def __init__(self, *filters: str) -> None:
        self.wanted = frozenset(filters)
        self.heard: list[tuple[str, bytes]] = []
        self.sessions = 0
        self.has_work = False
        self.whole = True
        self.asks_anew = False
        self.on_receive: Callable[[], None] = lambda: None

    def filters(self) -> frozenset[str]:
        self.asks_anew = False
        return self.wanted

    def session_started(self) -> None:
        self.sessions += 1

    def receive(self, topic: str, payload: bytes, now: float) -> list[list[tuple[str, bytes]]]:
        assert abs(now - time.time()) < 60
        self.heard.append((topic, payload))
        self.on_receive()
        return [[(topic, payload)]]

    def work(self, now: float) -> list[list[tuple[str, bytes]]]:
        self.has_work = False
        return [[("work", b"")]]


@dataclass
class Proxy:
    """What surrounds a subscriber in a proxy."""

    subscriber: Subscriber
    replica: Replica
    applied: list[tuple[str, bytes]] = field(default_factory=list)
    on_batch: Callable[[], None] = lambda: None

    def apply(self, batch) -> None:
        self.applied += batch
        self.on_batch()


def report(online: bool, version: int) -> tuple[str, bytes]:
    return STATUS, messages.encode(Envelope(1, version, 0, {"online": online}))


def read_report(payload: bytes) -> tuple[bool, int]:
    envelope = messages.decode(payload)
    return envelope.body["online"], envelope.version


@contextlib.asynccontextmanager
async def subscribed(access: BrokerAccess, *filters: str) -> AsyncIterator[Proxy]:
    """A subscriber at work, in the loop of a data plane."""
    data_plane = Plane(asyncio.get_running_loop())
    replica = Replica(*filters)
    proxy = Proxy(Subscriber(replica, access, lambda batch: proxy.apply(batch), report), replica)
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(proxy.subscriber.run())
            yield proxy
            task.cancel()
    finally:
        data_plane.close()


async def until(condition: Callable[[], object], patience_s: float = 60.0) -> None:
    try:
        async with asyncio.timeout(patience_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError("it never came to be") from None


@pytest.fixture(autouse=True)
def nothing_is_lost_in_the_loop(caplog):
    """asyncio logs what callbacks raised, and errors that nobody asked for."""
    yield
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority.create(tmp_path_factory.mktemp("ca") / "ca", "cluster.local")


@pytest.fixture(scope="module")
def web_dir(authority, tmp_path_factory):
    return identity_dir(authority, tmp_path_factory.mktemp("web") / "id", WEB)


@pytest.fixture(scope="module")
def operator_dir(authority, tmp_path_factory):
    return brokers.control_plane_dir(authority, tmp_path_factory.mktemp("operator") / "id")


@pytest.fixture(scope="module", params=brokers.BROKERS)
def broker(request, authority, tmp_path_factory):
    directory = tmp_path_factory.mktemp("brokers") / request.param
    with brokers.BROKERS[request.param](directory, authority, [WEB]) as running:
        yield running


@pytest.fixture
def operator(broker, operator_dir):
    """Makes the control plane's own client."""
    return lambda: brokers.client(broker, operator_dir)


def access(broker: Broker, directory, port: int | None = None) -> BrokerAccess:
    return BrokerAccess((f"mqtts://127.0.0.1:{port or broker.port}",), WEB, lambda: brokers.tls(directory))


async def publish(client, *names: str, payload: bytes = b"v1") -> list[str]:
    topics = [f"{SHOP}/{name}" for name in names]
    for topic in topics:
        await client.publish(topic, payload, qos=1, retain=True)
    return topics


def test_what_is_retained_and_what_comes_later_reaches_the_replica(broker, operator, web_dir):
    async def scenario() -> None:
        async with operator() as control:
            (early,) = await publish(control, "early")
            async with subscribed(access(broker, web_dir), early, f"{SHOP}/late") as proxy:
                await until(lambda: proxy.replica.heard)
                await publish(control, "late", "foreign")
                await until(lambda: len(proxy.replica.heard) == 2)
                assert [topic.rpartition("/")[2] for topic, _ in proxy.applied] == ["early", "late"]
                assert proxy.subscriber.connected
                assert proxy.subscriber.problems() == ()
                assert proxy.replica.sessions == 1

    plane.run(scenario())


def test_subscriptions_follow_the_interests(broker, operator, web_dir):
    async def scenario() -> None:
        async with operator() as control:
            first, second, third = await publish(control, "first", "second", "third")
            async with subscribed(access(broker, web_dir), first) as proxy:
                await until(lambda: proxy.replica.heard == [(first, b"v1")])
                proxy.replica.wanted = frozenset({second, third})
                proxy.subscriber.interests_changed()
                await until(lambda: len(proxy.replica.heard) == 3)
                await asyncio.sleep(0.1)  # UNSUBSCRIBE goes out after SUBACK
                await publish(control, "first", "second", payload=b"v2")
                await until(lambda: len(proxy.replica.heard) == 4)
                await publish(control, "third", payload=b"v2")
                await until(lambda: len(proxy.replica.heard) == 5)
                assert proxy.replica.heard[3:] == [(second, b"v2"), (third, b"v2")]

    plane.run(scenario())


def test_where_a_message_leads_is_subscribed_to(broker, operator, web_dir):
    async def scenario() -> None:
        async with operator() as control:
            first, second = await publish(control, "leads", "led-to")
            async with subscribed(access(broker, web_dir), first) as proxy:

                def lead() -> None:
                    proxy.replica.wanted = frozenset({first, second})
                    proxy.replica.asks_anew = True

                proxy.replica.on_receive = lead
                await publish(control, "leads", payload=b"v2")
                await until(lambda: (second, b"v1") in proxy.replica.heard)

    plane.run(scenario())


def test_a_thousand_interests_are_asked_for_in_portions(broker, operator, web_dir):
    async def scenario() -> None:
        async with operator() as control:
            wanted = await publish(control, *(f"many-{number}" for number in range(0, 1000, 100)))
            others = [f"{SHOP}/none-{number}" for number in range(990)]
            async with subscribed(access(broker, web_dir), *wanted, *others) as proxy:
                await until(lambda: len(proxy.replica.heard) == len(wanted))
                await until(lambda: proxy.subscriber.connected)

    plane.run(scenario())


def test_work_that_a_new_interest_leaves_is_done_without_a_message(broker, web_dir):
    async def scenario() -> None:
        async with subscribed(access(broker, web_dir), f"{SHOP}/none") as proxy:
            await until(lambda: proxy.subscriber.connected)
            proxy.replica.has_work = True
            proxy.subscriber.interests_changed()
            await until(lambda: proxy.applied == [("work", b"")])

    plane.run(scenario())


def is_nats(broker: Broker) -> bool:
    return "nats" in broker.directory.name


def test_what_the_broker_refuses_is_told_and_the_rest_is_heard(broker, operator, web_dir, caplog):
    forbidden = subtree("cluster.local", "policy", "other")

    async def scenario() -> None:
        async with operator() as control:
            (allowed,) = await publish(control, "allowed")
            async with subscribed(access(broker, web_dir), forbidden, allowed) as proxy:
                await until(lambda: proxy.replica.heard == [(allowed, b"v1")])
                await until(lambda: proxy.subscriber.connected)
                # Mosquitto takes any subscription, and then lets nothing through.
                told = (f"the broker refuses to let us read {forbidden}",)
                assert proxy.subscriber.problems() == (told if is_nats(broker) else ())
                await control.publish("mesh/v1/cluster.local/policy/other/deny", b"v1", qos=1)
                proxy.replica.wanted = frozenset({allowed})
                proxy.subscriber.interests_changed()
                await until(lambda: proxy.subscriber.problems() == ())
                assert proxy.replica.heard == [(allowed, b"v1")]

    plane.run(scenario())
    assert caplog.text.count("refuses") == is_nats(broker)


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """What the broker is asked for, as it is asked."""
    found = []
    real = mqtt.Connection.subscribe

    async def subscribe(self, filters):
        found.append([name.removeprefix("mesh/v1/cluster.local/") for name in filters])
        return await real(self, filters)

    monkeypatch.setattr(mqtt.Connection, "subscribe", subscribe)
    monkeypatch.setattr(subscriber, "_FIRST_DOUBT_S", 0.05)
    monkeypatch.setattr(subscriber, "_LAST_DOUBT_S", 0.2)
    return found


def test_what_was_refused_is_asked_for_again(broker, operator, web_dir, asked):
    if not is_nats(broker):
        return

    async def scenario() -> None:
        async with operator() as control:
            (allowed,) = await publish(control, "allowed")
            async with subscribed(access(broker, web_dir), subtree("cluster.local", "policy", "other"), allowed):
                await until(lambda: len(asked) == 5)

    plane.run(scenario())
    assert asked[:5] == [*[["policy/other/#", "svc/shop/allowed"]] * 2, *[["policy/other/#"]] * 3]


def test_all_is_asked_for_twice_and_what_brought_nothing_for_a_while(broker, operator, web_dir, asked):
    async def scenario() -> None:
        async with operator() as control:
            (there,) = await publish(control, "there")
            async with subscribed(access(broker, web_dir), there, f"{SHOP}/none") as proxy:
                await until(lambda: len(asked) == 3)
                await asyncio.sleep(0.5)
                assert asked == [*[["svc/shop/none", "svc/shop/there"]] * 2, ["svc/shop/none"]]
                # A new interest, and there is doubt again.
                proxy.replica.wanted |= {f"{SHOP}/nobody"}
                proxy.subscriber.interests_changed()
                await until(lambda: len(asked) == 6)
                assert asked[3:] == [["svc/shop/nobody"], *[["svc/shop/nobody", "svc/shop/none"]] * 2]

    plane.run(scenario())


def test_while_the_replica_is_not_whole_all_is_asked_for_again(broker, operator, web_dir, asked):
    """However often something comes that does not help, as the roots do that are signed anew."""

    async def scenario() -> None:
        async with operator() as control:
            topics = await publish(control, "part", "beat")
            async with subscribed(access(broker, web_dir), *topics) as proxy:
                proxy.replica.whole = False
                async with asyncio.timeout(30):
                    while len(asked) < 7:
                        await asyncio.sleep(0.15)
                        await publish(control, "beat")
                proxy.replica.whole = True
                await asyncio.sleep(0.5)
                assert asked == [["svc/shop/beat", "svc/shop/part"]] * len(asked)
                assert len(asked) <= 9

    plane.run(scenario())


@contextlib.asynccontextmanager
async def reports(control) -> AsyncIterator[list[tuple[bool, int]]]:
    """(online, version) of each report of WEB that the broker passes on from now."""
    found: list[tuple[bool, int]] = []

    async def read() -> None:
        async for message in control.messages:
            if message.payload and not message.retain:
                found.append(read_report(message.payload))

    await control.subscribe(STATUS)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(read())
        yield found
        task.cancel()


async def retained_report(operator) -> tuple[bool, int]:
    """What somebody who connects now is told."""
    async with operator() as control, asyncio.timeout(30):
        await control.subscribe(STATUS)
        async for message in control.messages:
            return read_report(message.payload)


def test_reports_say_what_changed_and_how_it_ended(broker, operator, web_dir, monkeypatch):
    monkeypatch.setattr(subscriber, "REPORT_INTERVAL_S", 0.5)

    async def scenario() -> None:
        async with operator() as control, reports(control) as told:
            async with subscribed(access(broker, web_dir), f"{SHOP}/none") as proxy:
                await until(lambda: told)
                began, burst = time.monotonic(), len(told)
                for _ in range(100):
                    proxy.subscriber.status_changed()
                    await asyncio.sleep(0.002)
                await until(lambda: len(told) > burst)
                await asyncio.sleep(0.2)
                allowed = subscriber.REPORTS_AT_ONCE + (time.monotonic() - began) / subscriber.REPORT_PAUSE_S
                assert len(told) - burst <= allowed, "a burst of changes is few reports"
                quiet = len(told)
                await until(lambda: len(told) > quiet)  # of the interval
                assert (await retained_report(operator))[0]
            # The proxy is gone without a word.
            await until(lambda: not told[-1][0])
            assert [online for online, _ in told[:-1]] == [True] * (len(told) - 1)
            versions = [version for _, version in told]
            assert versions == sorted(set(versions))
            assert await retained_report(operator) == told[-1]

    plane.run(scenario())


def test_a_change_in_steps_does_not_pause_at_each_of_them(broker, operator, web_dir, monkeypatch):
    monkeypatch.setattr(subscriber, "REPORT_PAUSE_S", 5.0)
    monkeypatch.setattr(subscriber, "REPORT_INTERVAL_S", 60.0)

    async def scenario() -> None:
        async with (
            operator() as control,
            reports(control) as told,
            subscribed(access(broker, web_dir), f"{SHOP}/none") as proxy,
        ):
            await until(lambda: told)
            async with asyncio.timeout(4.0):
                while len(told) < subscriber.REPORTS_AT_ONCE:
                    reported = len(told)
                    proxy.subscriber.status_changed()
                    await until(lambda reported=reported: len(told) > reported)

    plane.run(scenario())


def test_a_renewed_certificate_is_taken_into_use_and_nobody_is_told_that_we_went(broker, operator, authority, tmp_path):
    directory = identity_dir(authority, tmp_path / "id", WEB)
    contexts = []

    def context():
        contexts.append(brokers.tls(directory))
        return contexts[-1]

    async def scenario() -> None:
        way = BrokerAccess((broker.url,), WEB, context)
        async with operator() as control, reports(control) as told:
            (topic,) = await publish(control, "there")
            async with subscribed(way, topic) as proxy:
                await until(lambda: told and proxy.replica.heard)
                identity_dir(authority, directory, WEB)
                proxy.subscriber.certificate_renewed()
                await until(lambda: proxy.replica.sessions == 2 and len(proxy.replica.heard) == 2)
                await until(lambda: len({version >> 32 for _, version in told}) == 2)
                assert len(contexts) == 2
                assert all(online for online, _ in told)

    plane.run(scenario())


def test_one_that_falls_silent_goes_on_hearing_and_nobody_is_told_that_it_went(broker, operator, web_dir):
    async def scenario() -> None:
        async with operator() as control, reports(control) as told:
            async with subscribed(access(broker, web_dir), f"{SHOP}/early", f"{SHOP}/late") as proxy:
                await until(lambda: told)
                proxy.subscriber.fall_silent()
                await until(lambda: proxy.replica.sessions == 2 and proxy.subscriber.connected)
                proxy.subscriber.status_changed()
                await publish(control, "late")
                await until(lambda: proxy.replica.heard)
            first = told[0]
            # Of another process, which the broker serves after whatever the silent one has said last.
            async with subscribed(access(broker, web_dir), f"{SHOP}/none"):
                await until(lambda: told.count(first) == 2)
                assert all(online for online, _ in told)
                assert {version >> 32 for _, version in told} == {1}, "nothing was told in its second connection"

    plane.run(scenario())


def test_a_new_certificate_ends_the_wait_for_the_next_attempt(broker, web_dir, monkeypatch):
    monkeypatch.setattr(subscriber, "_retry_delay_s", lambda failures: 3600.0)
    usable = False

    def context():
        if not usable:
            raise FileNotFoundError("no certificate yet")
        return brokers.tls(web_dir)

    async def scenario() -> None:
        nonlocal usable
        async with subscribed(BrokerAccess((broker.url,), WEB, context), f"{SHOP}/none") as proxy:
            await until(lambda: "no certificate yet" in str(proxy.subscriber.problems()))
            usable = True
            proxy.subscriber.certificate_renewed()
            await until(lambda: proxy.subscriber.connected)

    plane.run(scenario())


def test_a_broker_that_was_away_is_found_again(authority, tmp_path, broker, operator_dir, web_dir, caplog):
    """A broker of our own, since it is killed; all that is retained arrives anew."""
    with brokers.BROKERS[broker.directory.name](tmp_path / "own", authority, [WEB]) as own:

        async def scenario() -> None:
            async with brokers.client(own, operator_dir) as control:
                (topic,) = await publish(control, "kept")
            async with subscribed(access(own, web_dir), topic) as proxy:
                await until(lambda: len(proxy.replica.heard) == 1)
                own.stop()
                await until(lambda: not proxy.subscriber.connected and proxy.subscriber.problems())
                (told,) = proxy.subscriber.problems()
                assert f"no connection to the broker {own.url}: " in told
                await asyncio.sleep(0.3)
                own.start()
                await until(lambda: proxy.subscriber.connected and len(proxy.replica.heard) >= 2)
                assert proxy.subscriber.problems() == ()
                assert proxy.replica.sessions == 2

        plane.run(scenario())
    assert 1 <= caplog.text.count("no connection to the broker") <= 4  # each reason once, not each attempt


def test_a_broker_that_has_not_read_its_store_yet_is_asked_again(authority, tmp_path, broker, operator_dir, web_dir):
    """nats-server sends none of these 2,000, or a part, to whoever subscribes right after its start."""
    with brokers.BROKERS[broker.directory.name](tmp_path / "own", authority, [WEB]) as own:

        async def scenario() -> None:
            async with brokers.client(own, operator_dir) as control:
                for number in range(0, 2000, 10):
                    async with asyncio.TaskGroup() as group:
                        for name in range(number, number + 10):
                            group.create_task(publish(control, f"cold-{name}"))
            own.stop()
            own.start()
            async with subscribed(access(own, web_dir), f"{SHOP}/#") as proxy:
                proxy.replica.whole = False
                await until(lambda: len({topic for topic, _ in proxy.replica.heard}) == 2000)

        plane.run(scenario())


def test_a_broker_that_is_away_is_told_of_once(web_dir, monkeypatch, caplog):
    attempts = []
    monkeypatch.setattr(subscriber, "_retry_delay_s", lambda failures: attempts.append(failures) or 0.005)

    async def scenario() -> None:
        way = BrokerAccess((f"mqtts://127.0.0.1:{brokers.free_port()}",), WEB, lambda: brokers.tls(web_dir))
        async with subscribed(way) as proxy:
            await until(lambda: len(attempts) == 5)
            assert "Connection refused" in str(proxy.subscriber.problems())

    plane.run(scenario())
    assert attempts == [1, 2, 3, 4, 5]
    assert len(caplog.records) == 1


def test_an_end_that_meets_the_loss_of_the_connection_is_an_end(broker, web_dir, monkeypatch):
    """Python 3.11's TaskGroup raises the loss then, and forgets the cancellation."""

    async def lost(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise mqtt.BrokerError("at that moment")

    monkeypatch.setattr(mqtt.Connection, "lost", lost)
    monkeypatch.setattr(subscriber, "_retry_delay_s", lambda failures: 3600.0)

    async def scenario() -> None:
        async with asyncio.timeout(30):
            async with subscribed(access(broker, web_dir)) as proxy:
                await until(lambda: proxy.subscriber.connected)

    plane.run(scenario())


def test_any_of_the_brokers_will_do(broker, web_dir):
    async def scenario() -> None:
        dead = f"mqtts://127.0.0.1:{brokers.free_port()}"
        way = BrokerAccess((dead, dead, broker.url), WEB, lambda: brokers.tls(web_dir))
        async with subscribed(way, f"{SHOP}/none") as proxy:
            await until(lambda: proxy.subscriber.connected)

    plane.run(scenario())


def test_a_host_that_is_short_of_threads_ends_nothing(broker, web_dir, caplog):
    short = [True]

    def context():
        if short:
            short.clear()
            raise RuntimeError("can't start new thread")
        return brokers.tls(web_dir)

    async def scenario() -> None:
        async with subscribed(BrokerAccess((broker.url,), WEB, context), f"{SHOP}/none") as proxy:
            await until(lambda: proxy.subscriber.connected)
            assert proxy.subscriber.problems() == ()

    plane.run(scenario())
    assert 'internal error: RuntimeError("can\'t start new thread")' in caplog.text


def test_a_bug_in_the_configuration_leaves_the_line_up(broker, operator, web_dir, caplog):
    async def scenario() -> None:
        async with operator() as control:
            (bad,) = await publish(control, "bad")
            async with subscribed(access(broker, web_dir), bad, f"{SHOP}/good") as proxy:

                def fail() -> None:
                    proxy.on_batch = lambda: None
                    raise ZeroDivisionError("ours")

                proxy.on_batch = fail
                await until(lambda: proxy.subscriber.problems() == ("internal error: ZeroDivisionError('ours')",))
                await publish(control, "good")
                await until(lambda: len(proxy.applied) == 2)

    plane.run(scenario())
    assert f"{SHOP}/bad" in caplog.text


# -- room for the data plane


def burn(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_messages_are_handled_in_slices():
    """Messages take 0.5 ms each, 400 of them wait, and others have their turn after four."""
    burst = [aiomqtt.Message(f"{SHOP}/{number}", b"", 0, True, 0, None) for number in range(400)]
    taken, most = 0, 0

    def receive() -> None:
        nonlocal taken
        taken += 1
        burn(0.0005)

    async def scenario() -> None:
        nonlocal most
        replica = Replica()
        replica.on_receive = receive
        line = Subscriber(replica, BrokerAccess((), WEB, ssl.create_default_context), lambda _: None, report)
        arrivals = mqtt.Arrivals()
        for message in burst:
            arrivals.put_nowait(message)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(line._feed(arrivals))
            while taken < len(burst):
                before = taken
                await asyncio.sleep(0)
                most = max(most, taken - before)
            task.cancel()

    plane.run(scenario())
    assert 2 <= most <= 4


def test_a_replica_that_is_slow_makes_the_broker_wait(broker, operator, web_dir, monkeypatch):
    """Nothing is lost, and what waits here stays within its bound and one TLS record."""
    monkeypatch.setattr(mqtt, "MAX_WAITING_BYTES", 64 * 1024)
    most = 0
    payload = bytes(3000)
    names = [f"bulk-{number}" for number in range(300)]
    real = mqtt.Arrivals.put_nowait

    def put(self, item) -> None:
        nonlocal most
        real(self, item)
        most = max(most, self._bytes)

    monkeypatch.setattr(mqtt.Arrivals, "put_nowait", put)

    async def scenario() -> None:
        async with operator() as control:
            topics = await publish(control, *names, payload=payload)
            async with subscribed(access(broker, web_dir), f"{SHOP}/#") as proxy:
                proxy.replica.on_receive = lambda: burn(0.0005)
                heard = proxy.replica.heard
                await until(lambda: {topic for topic, _ in heard if "/bulk-" in topic} == set(topics))
                assert proxy.subscriber.connected
                assert proxy.replica.sessions == 1
            for topic in topics:
                await control.publish(topic, b"", qos=1, retain=True)

    plane.run(scenario())
    assert most < (64 + 2 * 16) * 1024
    if is_nats(broker):  # Mosquitto sends each message by itself, and each is handled before the next is read
        assert most >= 64 * 1024


def test_the_data_plane_takes_turns_meanwhile(broker, operator, web_dir):
    """Its own descriptors, in the same epoll set, while MQTT flows in asyncio's."""

    async def scenario() -> None:
        async with operator() as control:
            topics = await publish(control, *(f"turn-{number}" for number in range(100)))
            data_plane = Plane(asyncio.get_running_loop())
            here, there = socket.socketpair()
            for sock in (here, there):
                sock.setblocking(False)
            rounds = 0

            def echo(fd: int) -> None:
                nonlocal rounds
                rounds += 1
                there.send(here.recv(1)) if fd == here.fileno() else here.send(there.recv(1))

            data_plane.watch(here.fileno(), plane.READ, lambda _: echo(here.fileno()))
            data_plane.watch(there.fileno(), plane.READ, lambda _: echo(there.fileno()))
            here.send(b"x")
            replica = Replica(*topics)
            between: set[int] = set()  # a turn of the data plane, between one message and the next

            def receive() -> None:
                burn(0.0005)
                between.add(rounds)

            replica.on_receive = receive
            async with asyncio.TaskGroup() as group:
                line = Subscriber(replica, access(broker, web_dir), lambda _: None, report)
                task = group.create_task(line.run())
                await until(lambda: len(replica.heard) == 100)
                assert len(between) > 20  # a slice holds at most 4 messages as slow as these
                before = rounds
                await asyncio.sleep(0.05)
                assert rounds > before
                task.cancel()
            data_plane.unwatch(here.fileno())
            data_plane.unwatch(there.fileno())
            here.close()
            there.close()
            data_plane.close()

    plane.run(scenario())
