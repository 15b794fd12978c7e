"""Least rights, tried: what a stolen identity can do on real brokers, over real TLS."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiomqtt
import pytest

from control.api.identity import SpiffeId, TrustDomain, proxy_hash
from control.server.ca import Authority
from control.server.rights import control_plane_id, is_node, rights_of
from tests.support.brokers import BROKERS, HOST, PATIENCE_S, Broker, client, control_plane_dir, nats, tls
from tests.support.certificates import DB, WEB, forge, forge_ca, identity_dir, pem

DOMAIN = TrustDomain("cluster.local")
NODE = SpiffeId.parse("spiffe://cluster.local/ns/mesh-system/sa/node-a")
STRANGER = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/stranger")

TREE = "mesh/v1/cluster.local/"
WEB_HASH, DB_HASH, NODE_HASH = proxy_hash(WEB), proxy_hash(DB), proxy_hash(NODE)
OWN_STATUS = f"status/{WEB_HASH}/web-1"

ADDRESSES = {"trust", "addr", "addr/0a"}
SHARED = ADDRESSES | {"svc/shop/web", "gw/shop/wp", "ep/shop/web", "ep/shop/web/web-1.a", "index/shop/0a", "root/shop"}
OF_WEB = SHARED | {"crl/mesh-system", "policy/shop/allow", "policy/mesh-system/deny", f"wl/{WEB_HASH}/web-1"}
STATUSES = {OWN_STATUS, f"status/{DB_HASH}/db-1"}
OF_OTHERS = {"policy/bank/allow", "reqauth/shop/web", "route/shop/web", f"wl/{DB_HASH}/db-1", f"wl/{NODE_HASH}/node-a"}
EVERYTHING = OF_WEB | OF_OTHERS | STATUSES

# What a uProxy subscribes to, and what each of it holds.
NEEDED = ("trust", "addr/#", "addr/0a", "svc/#", "svc/shop/web", "ep/#", "ep/shop/web/#", "gw/shop/wp")
NEEDED += ("index/shop/#", "root/shop")
OF_ITS_OWN = ("policy/shop/#", "policy/mesh-system/#", "crl/mesh-system", f"wl/{WEB_HASH}/#")
GREEDY = ("#", "+/#", "mesh/#", "mesh/v1/+/wl/#", "/#", f"$share/thieves/{TREE}wl/#", "$queue/#")
INTERNAL = ("$SYS/#", "$JS/#", "$JS/API/#", "$MQTT/#", "$MQTT/sub/#", "$MQTT/sub/+", "$MQTT/rmsgs/#", "$MQTT_rmsgs/#")
AS_SUBJECTS = ("_INBOX/#", "+/sub/+", ">", "$MQTT.sub.>", "mesh.v1.cluster//local.>", "mesh/v1/cluster/local/#")
INSIDE = ("#", "+/+", "+/+/+", "wl/#", "wl/+/+", f"wl/{DB_HASH}/#", f"wl/{DB_HASH}/db-1", f"wl/{NODE_HASH}/#")
INSIDE += ("policy/#", "policy/+/allow", "policy/bank/#", "status/#", f"status/{WEB_HASH}/#", f"status/{DB_HASH}/db-1")


@dataclass
class Site:
    """A broker with one retained record under every kind of topic."""

    broker: Broker
    control_plane: Path
    web: Path
    node: Path
    stranger: Path
    directory: Path


@pytest.fixture(scope="module", params=BROKERS)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp(request.param)
    authority = Authority.create(directory / "ca", "cluster.local")
    with BROKERS[request.param](directory / "broker", authority, [WEB, DB, NODE]) as broker:
        made = Site(
            broker,
            control_plane_dir(authority, directory / "control-plane"),
            *(identity_dir(authority, directory / who.service_account, who) for who in (WEB, NODE, STRANGER)),
            directory,
        )
        asyncio.run(fill(made))
        yield made


async def fill(site: Site) -> None:
    async with client(site.broker, site.control_plane) as control_plane:
        for topic in EVERYTHING:
            await control_plane.publish(TREE + topic, b"true", qos=1, retain=True)


async def received(connection: aiomqtt.Client, until: str) -> list[tuple[str, bytes]]:
    """Topics below the tree, with payloads, up to the first message of a topic."""
    found = []
    async with asyncio.timeout(PATIENCE_S):
        async for message in connection.messages:
            topic = str(message.topic).removeprefix(TREE)
            if topic == until:
                return found
            found.append((topic, bytes(message.payload)))
    raise AssertionError("the connection ended")


async def retained(site: Site) -> dict[str, bytes]:
    """Everything that the broker holds for us."""
    async with client(site.broker, site.control_plane) as control_plane:
        await control_plane.subscribe(TREE + "#")
        await control_plane.publish(TREE + "mark", b"", qos=1)
        return dict(await received(control_plane, "mark"))


async def seen_by(site: Site, identity: Path, filters: Sequence[str]) -> tuple[set[str], bool]:
    """What an identity is sent, retained and live, when it subscribes; and whether a filter was refused."""
    async with client(site.broker, site.control_plane) as control_plane, client(site.broker, identity) as thief:
        codes = [code for each in filters for code in await thief.subscribe(each)]
        for topic in sorted(EVERYTHING):
            await control_plane.publish(TREE + topic, b"true", qos=1, retain=True)
        # Last, where everybody may look: what is to come has come by then.
        await thief.subscribe(TREE + "trust")
        await control_plane.publish(TREE + "trust", b"end", qos=1)
        found = set()
        async with asyncio.timeout(PATIENCE_S):
            async for message in thief.messages:
                if message.payload == b"end":
                    break
                found.add(str(message.topic).removeprefix(TREE))
        return found, any(code.is_failure for code in codes)


def test_rights_follow_from_the_identity() -> None:
    assert rights_of(control_plane_id(DOMAIN)).reads == ("mesh/v1/cluster.local/#",)
    assert is_node(NODE)
    assert not is_node(SpiffeId(DOMAIN, "shop", "node-a"))
    assert rights_of(NODE).reads == (TREE + "trust", TREE + "addr/#")
    waypoint = rights_of(WEB, waypoint=True)
    assert {TREE + "policy/#", TREE + "reqauth/#", TREE + "traffic/#", TREE + "route/#", TREE + "gw/#"} <= set(
        waypoint.reads
    )
    assert waypoint.writes == rights_of(WEB).writes
    assert {TREE + "route/#", TREE + "reqauth/#", TREE + "traffic/#"}.isdisjoint(rights_of(WEB).reads)
    assert rights_of(NODE, waypoint=True) == rights_of(NODE)
    assert rights_of(NODE).writes == (f"{TREE}status/{NODE_HASH}/+",)
    # A service account of a namespace that merely looks like the root's gets no node's or control plane's rights.
    assert rights_of(SpiffeId(DOMAIN, "shop", "control-plane")).writes == (
        f"{TREE}status/{proxy_hash(SpiffeId(DOMAIN, 'shop', 'control-plane'))}/+",
    )


@pytest.mark.parametrize("wanted", [*NEEDED, *OF_ITS_OWN])
def test_a_uproxy_reads_what_it_needs(site: Site, wanted: str) -> None:
    found, refused = asyncio.run(seen_by(site, site.web, [TREE + wanted]))
    assert not refused
    assert found - {"trust"} == {topic for topic in OF_WEB if aiomqtt.Topic(topic).matches(wanted)} - {"trust"}
    assert found


@pytest.mark.parametrize("greedy", [*GREEDY, *INTERNAL, *AS_SUBJECTS, *(TREE + each for each in INSIDE)])
def test_a_stolen_identity_reads_nothing_of_others(site: Site, greedy: str) -> None:
    found, refused = asyncio.run(seen_by(site, site.web, [greedy]))
    assert found <= OF_WEB
    # Mosquitto grants a filter that reaches too far, and then delivers what may be read.
    assert refused == ("nats" in str(site.broker.directory))


def test_nobody_can_burden_nats_with_consumers(tmp_path: Path) -> None:
    """Each QoS 1 subscription is one, and every publish of anybody is matched by all of them."""
    authority = Authority.create(tmp_path / "ca", "cluster.local")
    web, own = identity_dir(authority, tmp_path / "web", WEB), control_plane_dir(authority, tmp_path / "own")

    async def attack(broker: Broker) -> None:
        async with client(broker, own) as control_plane, client(broker, web) as thief, client(broker, web) as honest:
            greedy = [(f"{TREE}svc/shop/s{number}", 1) for number in range(200)]
            codes = await thief.subscribe(greedy)
            assert sum(not code.is_failure for code in codes) <= 64
            (code,) = await honest.subscribe(TREE + "svc/#")
            assert not code.is_failure
            await control_plane.publish(TREE + "svc/shop/s199", b"here", qos=1)
            message = await asyncio.wait_for(anext(aiter(honest.messages)), PATIENCE_S)
            assert message.payload == b"here"

    with nats(tmp_path / "broker", authority, [WEB]) as broker:
        asyncio.run(attack(broker))


@pytest.mark.parametrize("greedy", [TREE + "#", TREE + "svc/#", TREE + "policy/mesh-system/#", TREE + "wl/#"])
def test_a_node_agent_reads_addresses_alone(site: Site, greedy: str) -> None:
    found, _ = asyncio.run(seen_by(site, site.node, [TREE + "addr/#", greedy]))
    assert found - {"trust"} == ADDRESSES - {"trust"}


def test_a_stolen_identity_publishes_its_own_status_and_nothing_else(site: Site) -> None:
    async def attempt(topic: str, qos: int) -> None:
        # NATS acknowledges and drops what it refuses; Mosquitto ends the connection.
        async with client(site.broker, site.web) as thief:
            await thief.publish(topic, b"forged", qos=qos, retain=True)
        async with client(site.broker, site.web) as thief:
            await thief.publish(topic, b"", qos=qos, retain=True)

    async def attack() -> list[tuple[str, bytes]]:
        async with client(site.broker, site.control_plane) as control_plane:
            await control_plane.subscribe(TREE + "#")
            await control_plane.publish(TREE + "mark", b"", qos=1)
            await received(control_plane, "mark")
            refused = EVERYTHING - {OWN_STATUS}
            refused |= {"new/kind", "mark2", f"status/{WEB_HASH}", f"status/{WEB_HASH}/web-1/more", "status/x/web-1"}
            for topic in sorted(refused):
                for qos in (0, 1):
                    await ignoring_the_end(attempt(TREE + topic, qos))
            async with client(site.broker, site.web) as honest:
                await honest.publish(TREE + OWN_STATUS, b"true", qos=1, retain=True)
            await control_plane.publish(TREE + "mark", b"", qos=1)
            return await received(control_plane, "mark")

    assert asyncio.run(attack()) == [(OWN_STATUS, b"true")]
    assert asyncio.run(retained(site)) == dict.fromkeys(EVERYTHING, b"true")


def test_a_stolen_identity_does_not_reach_what_the_broker_keeps_for_itself(site: Site) -> None:
    """nats-server's JetStream API is a subject like any other: here the retained records would go."""
    orders = [
        "$JS/API/STREAM/PURGE/$MQTT_rmsgs",
        "$JS/API/STREAM/DELETE/$MQTT_rmsgs",
        "$JS/API/STREAM/DELETE/$MQTT_sess",
        "$MQTT/rmsgs/mesh/v1/cluster.local/trust",
        "$MQTT/msgs/mesh/v1/cluster.local/trust",
        "$SYS/REQ/SERVER/PING",
        "$SYS/broker/uptime",
        "$CONTROL/dynamic-security/v1",
    ]

    async def attack() -> None:
        for topic in orders:
            for qos in (0, 1):

                async def attempt(topic: str = topic, qos: int = qos) -> None:
                    async with client(site.broker, site.web) as thief:
                        await thief.publish(topic, b"{}", qos=qos, retain=bool(qos))

                await ignoring_the_end(attempt())

    asyncio.run(attack())
    assert asyncio.run(retained(site)) == dict.fromkeys(EVERYTHING, b"true")


def test_a_will_obeys_the_same_rule(site: Site) -> None:
    async def die_with_a_will(topic: str) -> None:
        thief = client(site.broker, site.web, will=aiomqtt.Will(TREE + topic, b"will", 1, True))
        await thief.__aenter__()
        connection = thief._client.socket()
        assert connection is not None
        connection.shutdown(socket.SHUT_RDWR)
        with pytest.raises(aiomqtt.MqttError):
            await asyncio.wait_for(anext(aiter(thief.messages)), PATIENCE_S)
        await ignoring_the_end(thief.__aexit__(None, None, None))

    async def attack() -> list[tuple[str, bytes]]:
        async with client(site.broker, site.control_plane) as control_plane:
            await control_plane.subscribe(TREE + "#")
            await control_plane.publish(TREE + "mark", b"", qos=1)
            await received(control_plane, "mark")
            for topic in ("svc/shop/web", "root/shop", f"status/{DB_HASH}/db-1", f"wl/{WEB_HASH}/web-1"):
                await ignoring_the_end(die_with_a_will(topic))
            # The same death with a will that is allowed: the rest is absent for want of rights, not of wills.
            await die_with_a_will(OWN_STATUS)
            return await received(control_plane, OWN_STATUS)

    assert asyncio.run(attack()) == []
    asyncio.run(fill(site))


async def ignoring_the_end(attempt: object) -> None:
    """An attempt that a broker may answer by ending the connection."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            await attempt  # type: ignore[misc]
    except aiomqtt.MqttError:
        pass


def test_an_identity_that_nobody_declared_can_do_nothing(site: Site) -> None:
    async def attempt() -> list[str]:
        found = []
        async with client(site.broker, site.stranger) as stranger:
            await stranger.subscribe(TREE + "#")
            await stranger.publish(f"{TREE}status/{proxy_hash(STRANGER)}/x", b"here", qos=1, retain=True)
            async with asyncio.timeout(0.5):
                async for message in stranger.messages:
                    found.append(str(message.topic))
        return found

    with pytest.raises((aiomqtt.MqttError, TimeoutError)):
        asyncio.run(attempt())
    assert asyncio.run(retained(site)) == dict.fromkeys(EVERYTHING, b"true")


def test_a_session_is_not_inherited_with_its_client_id(site: Site) -> None:
    """A client id is no secret that anything rests on: who takes one over gets nothing that it may not read."""

    async def attack() -> set[str]:
        own = site.directory / "db"
        if not own.exists():
            identity_dir(site.broker.authority, own, DB)
        async with client(site.broker, own, identifier="known", clean_session=False) as db:
            await db.subscribe(f"{TREE}wl/{DB_HASH}/#")
        async with client(site.broker, site.control_plane) as control_plane:
            await control_plane.publish(f"{TREE}wl/{DB_HASH}/db-1", b"true", qos=1, retain=True)
            found = set()
            async with client(site.broker, site.web, identifier="known", clean_session=False) as thief:
                await control_plane.publish(f"{TREE}wl/{DB_HASH}/db-1", b"true", qos=1, retain=True)
                await thief.subscribe(TREE + "trust")
                await control_plane.publish(TREE + "trust", b"end", qos=1)
                async with asyncio.timeout(PATIENCE_S):
                    async for message in thief.messages:
                        if message.payload == b"end":
                            break
                        found.add(str(message.topic).removeprefix(TREE))
        return found

    with contextlib.suppress(aiomqtt.MqttError):  # or it is refused outright
        assert asyncio.run(attack()) <= {"trust"}


def test_only_our_certificates_over_tls_1_3_are_let_in(site: Site) -> None:
    other = forge_ca(None, "another mesh's root")
    bundle = (site.web / "bundle.pem").read_bytes()
    copied = forge(other, (str(WEB),), common_name=WEB_HASH).write(
        site.directory / f"copied-{site.broker.port}", bundle
    )
    with pytest.raises((ssl.SSLError, ConnectionError)):
        knock(site.broker, tls(copied))
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname = False
    nobody.load_verify_locations(cadata=bundle.decode())
    with pytest.raises((ssl.SSLError, ConnectionError)):
        knock(site.broker, nobody)
    old = tls(site.web)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        knock(site.broker, old)
    knock(site.broker, tls(site.web))
    assert pem(other.certificate) not in bundle


def knock(broker: Broker, context: ssl.SSLContext) -> None:
    """A handshake, and an MQTT CONNECT (3.1.1, section 3.1) that must be answered."""
    with socket.create_connection((HOST, broker.port), PATIENCE_S) as raw, context.wrap_socket(raw) as connection:
        connection.sendall(b"\x10\x10\x00\x04MQTT\x04\x02\x00\x3c\x00\x04knok")
        if connection.recv(4) != b"\x20\x02\x00\x00":
            raise ConnectionError("the CONNECT was not accepted")


def test_nats_own_protocol_is_of_no_use_to_anybody(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca", "cluster.local")
    web, control_plane = identity_dir(authority, tmp_path / "web", WEB), control_plane_dir(authority, tmp_path / "own")
    with nats(tmp_path / "broker", authority, [WEB]) as broker:
        found = re.search(r"Listening for client connections on ([0-9.]+):(\d+)", broker.log())
        assert found is not None
        assert found[1] == "127.0.0.1"
        for who in (web, control_plane):
            with socket.create_connection((HOST, int(found[2])), PATIENCE_S) as raw:
                assert raw.recv(5) == b"INFO "  # then its JSON, and from there TLS
                while not raw.recv(4096).endswith(b"\r\n"):
                    pass
                assert b"Authorization Violation" in said_in_nats(raw, tls(who))
        with socket.create_connection((HOST, broker.port), PATIENCE_S) as raw:
            assert said_in_nats(raw, tls(web)) == b""
        knock(broker, tls(web))


def said_in_nats(raw: socket.socket, context: ssl.SSLContext) -> bytes:
    """What comes, until the connection ends, in answer to one who speaks NATS."""
    answer = b""
    with context.wrap_socket(raw) as connection:
        connection.sendall(b'CONNECT {"verbose":true,"protocol":1}\r\nSUB > 1\r\nPUB $JS.API.INFO 0\r\n\r\n')
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while part := connection.recv(4096):
                answer += part
    return answer
