"""`meshctl up` and `serve` from end to end: real processes, real broker, real joins."""

import asyncio
import contextlib
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import aiomqtt
import pytest

from control.api import messages
from control.api.identity import proxy_hash
from control.api.messages import Envelope
from control.api.status import Kind, ProxyStatus, write
from control.api.token import JoinToken
from control.api.topics import PolicyTopic, StatusTopic, WorkloadTopic, format_topic
from control.client.membership import Membership
from control.server.ca import Authority
from tests.support import brokers
from tests.support.brokers import HOST, client, free_port
from tests.support.certificates import DB, WEB, identity_dir
from tests.support.meshctl import PATIENCE_S, certify, running, up
from uproxy.tls import Credentials

MESH = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: web-1, namespace: shop}
spec: {address: 10.97.0.1, serviceAccount: web, labels: {app: web}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: shop}
spec: {}
"""
POLICY = format_topic(WEB.trust_domain, PolicyTopic("shop", "nobody"))


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    with up(tmp_path_factory.mktemp("up") / "mesh") as plane:
        assert plane.meshctl("apply", "-f", "-", stdin=MESH).returncode == 0
        plane.published()
        yield plane


def join(plane, directory, *of):
    """Join with a new token; the identity directory."""
    token = directory.with_suffix(".token")
    assert plane.meshctl("token", "create", *of, "--out", token).returncode == 0
    done = certify("join", "--token-file", token, "--dir", directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def web(plane, tmp_path_factory):
    return join(plane, tmp_path_factory.mktemp("web") / "web", "web-1", "-n", "shop")


def connect(plane, identity_dir, **options) -> aiomqtt.Client:
    return client(SimpleNamespace(port=plane.broker_port), identity_dir, **options)


async def retained(mqtt: aiomqtt.Client, topic: str) -> bytes:
    """What the broker retains under a topic."""
    await mqtt.subscribe(topic, qos=0)
    async with asyncio.timeout(30):
        async for message in mqtt.messages:
            return message.payload
    raise AssertionError


# -- up


def test_it_says_where_it_is_and_keeps_its_things_to_itself(plane):
    assert plane.told["trust_domain"] == "cluster.local"
    assert plane.told["brokers"] == f"mqtts://{HOST}:{plane.broker_port}"
    assert plane.told["certificates"].startswith(f"https://{HOST}:")
    for path in (
        plane.directory,
        plane.directory / "ca",
        plane.directory / "broker",
        plane.directory / "control-plane",
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    assert stat.S_IMODE((plane.directory / "mesh.db").stat().st_mode) == 0o600


def test_a_workload_joins_with_a_token_and_is_who_it_is_declared_to_be(plane, web):
    membership = Membership.load(web)
    assert membership.identity == WEB
    assert (membership.workload, membership.addresses) == ("web-1", ("10.97.0.1",))
    assert membership.brokers == (f"mqtts://{HOST}:{plane.broker_port}",)
    assert Credentials.load(web, WEB).serial


def test_a_member_reads_its_own_configuration_and_reports_to_status(plane, web):
    async def report():
        now = int(time.time())
        roots = {name: tuple(stamp) for name, stamp in plane_roots(plane).items()}
        status = ProxyStatus(
            Kind.UPROXY, "shop/web-1", "0.2.0", True, True, (), roots, now, "ab", now + 7000, problems=()
        )
        topic = format_topic(WEB.trust_domain, StatusTopic(proxy_hash(WEB), "web-1"))
        async with connect(plane, web) as mqtt:
            own = format_topic(WEB.trust_domain, WorkloadTopic(proxy_hash(WEB), "web-1"))
            assert messages.decode(await retained(mqtt, own)).body is not None
            assert messages.decode(await retained(mqtt, POLICY)).body is not None
            await mqtt.publish(topic, messages.encode(Envelope(now, 1, now, write(status))), qos=1, retain=True)

    def plane_roots(plane):
        epoch, version = plane.ask("status")["version"]
        return {"shop": (epoch, version, int(time.time()))}

    asyncio.run(report())
    deadline = time.monotonic() + 10
    while (found := plane.ask("status"))["proxies"][0]["state"] != "current":
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    assert found["ok"]
    shown = plane.meshctl("status")
    assert shown.returncode == 0
    assert "shop/web-1  uproxy  current" in shown.stdout


def test_what_is_applied_reaches_the_broker_and_what_is_deleted_leaves_a_tombstone(plane, web):
    async def change():
        async with connect(plane, web) as mqtt:
            first = messages.decode(await retained(mqtt, POLICY))
            changed = MESH.replace("spec: {}", "spec: {rules: [{}]}")
            await asyncio.to_thread(plane.meshctl, "apply", "-f", "-", stdin=changed)
            async with asyncio.timeout(30):
                second = messages.decode((await anext(aiter(mqtt.messages))).payload)
            await asyncio.to_thread(plane.meshctl, "delete", "policy", "nobody", "-n", "shop")
            async with asyncio.timeout(30):
                third = messages.decode((await anext(aiter(mqtt.messages))).payload)
            await asyncio.to_thread(plane.meshctl, "apply", "-f", "-", stdin=MESH)
            return first, second, third

    first, second, third = asyncio.run(change())
    assert first.stamp < second.stamp < third.stamp
    assert first.body is not None
    assert second.body is not None
    assert third.body is None


def test_a_certificate_is_renewed(plane, web):
    before = Credentials.load(web, WEB).serial
    done = certify("renew", "--dir", web)
    assert done.returncode == 0, done.stderr
    assert Credentials.load(web, WEB).serial != before


def test_a_node_agent_joins_without_being_declared(plane, tmp_path):
    membership = Membership.load(join(plane, tmp_path / "node", "--node", "host-a"))
    assert str(membership.identity) == "spiffe://cluster.local/ns/mesh-system/sa/node-host-a"
    assert (membership.workload, membership.addresses) == ("node-host-a", ())


# -- tokens, attacked


@pytest.fixture
def token(plane, tmp_path):
    path = tmp_path / "token"
    assert plane.meshctl("token", "create", "web-1", "-n", "shop", "--out", path).returncode == 0
    return path


def test_a_token_is_taken_once(token, tmp_path):
    assert certify("join", "--token-file", token, "--dir", tmp_path / "first").returncode == 0
    second = certify("join", "--token-file", token, "--dir", tmp_path / "second")
    assert second.returncode == 2
    assert "used already" in second.stderr
    assert not (tmp_path / "second" / "chain.pem").exists()


def test_a_control_plane_with_another_root_is_told_no_secret(token, tmp_path):
    good = JoinToken.decode(token.read_text())
    other = tmp_path / "other.token"
    other.write_text(replace(good, root_sha256=bytes(32)).encode())
    done = certify("join", "--token-file", other, "--dir", tmp_path / "pinned")
    assert done.returncode == 2
    assert "root" in done.stderr
    assert certify("join", "--token-file", token, "--dir", tmp_path / "web").returncode == 0


def test_a_token_of_another_mesh_is_worth_nothing_here(plane, token, tmp_path):
    with up(tmp_path / "other") as other:
        assert other.meshctl("apply", "-f", "-", stdin=MESH).returncode == 0
        theirs = JoinToken.decode(other.meshctl("token", "create", "web-1", "-n", "shop").stdout)
    ours = JoinToken.decode(token.read_text())
    mixed = tmp_path / "mixed.token"
    mixed.write_text(replace(ours, id=theirs.id, secret=theirs.secret).encode())
    done = certify("join", "--token-file", mixed, "--dir", tmp_path / "mixed")
    assert done.returncode == 2
    assert "not known here" in done.stderr


def test_two_processes_that_race_with_one_token_get_one_certificate(token, tmp_path):
    def join(name):
        return certify("join", "--token-file", token, "--dir", tmp_path / name).returncode

    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(join, "abc")) == [0, 2, 2]


def test_an_identity_that_nobody_was_told_of_is_not_let_in_by_the_broker(plane, tmp_path):
    stranger = identity_dir(Authority.open(plane.directory / "ca"), tmp_path / "db", DB)

    async def dial():
        async with connect(plane, stranger):
            pass

    with pytest.raises(aiomqtt.MqttError):
        asyncio.run(dial())
    # Once a token was made for it, it is known, and let in.
    vouched = ("--service-account", "db", "--address", "10.97.0.2")
    assert plane.meshctl("token", "create", "db-1", "-n", "shop", *vouched).returncode == 0
    asyncio.run(dial())


# -- starting and stopping


def test_everything_is_there_again_after_a_kill(tmp_path):
    with up(tmp_path / "mesh") as plane:
        assert plane.meshctl("apply", "-f", "-", stdin=MESH).returncode == 0
        token = tmp_path / "token"
        assert plane.meshctl("token", "create", "web-1", "-n", "shop", "--out", token).returncode == 0
        before, resources = plane.ask("status"), plane.ask("get", "all", "-A")
        plane.kill()
    with up(tmp_path / "mesh", port=plane.broker_port) as again:
        assert again.told["root_sha256"] == plane.told["root_sha256"]
        assert again.ask("get", "all", "-A") == resources
        assert again.ask("status")["version"] > before["version"]
        again.published()
        # The token holds the address of before; only the port of certificates is another in this test.
        moved = replace(JoinToken.decode(token.read_text()), url=again.told["certificates"])
        token.write_text(moved.encode())
        assert certify("join", "--token-file", token, "--dir", tmp_path / "web").returncode == 0


def test_a_second_control_plane_on_one_store_is_refused(plane):
    refused = plane.meshctl("up", "--dir", plane.directory, "--port", free_port(), "--broker-port", free_port())
    assert refused.returncode == 1
    assert "in use by another control plane" in refused.stderr
    assert plane.ask("get", "all", "-A")["resources"]


@pytest.mark.parametrize("option", ["--port", "--broker-port", "--metrics-port"])
def test_a_port_that_is_taken_is_told(tmp_path, option):
    ports = {"--port": free_port(), "--broker-port": free_port(), "--metrics-port": free_port()}
    with socket.create_server((HOST, 0)) as taken:
        ports[option] = taken.getsockname()[1]
        refused = subprocess.run(
            [
                *(sys.executable, "-m", "control.cli", "up", "--dir", tmp_path / "mesh", "--socket", tmp_path / "sock"),
                *("--listen", HOST),
                *(str(word) for pair in ports.items() for word in pair),
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert refused.returncode == 1
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert f"listen at {HOST}" in last
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "sock").exists()


def test_a_mesh_is_not_taken_for_another(plane):
    port = free_port()
    other = ("--trust-domain", "other.example", "--port", port, "--broker-port", free_port())
    refused = plane.meshctl("up", "--dir", plane.directory, *other)
    assert refused.returncode == 1
    assert "is of cluster.local, not of other.example" in refused.stderr


def test_the_passphrase_may_be_kept_elsewhere(tmp_path):
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("a passphrase that is long enough\n")
    passphrase.chmod(0o600)
    with up(tmp_path / "mesh", "--passphrase-file", passphrase, "--trust-domain", "mesh.example") as plane:
        assert plane.told["trust_domain"] == "mesh.example"
        assert not (plane.directory / "ca" / "passphrase").exists()
    refused = plane.meshctl("up", "--dir", plane.directory, "--port", free_port(), "--broker-port", free_port())
    assert refused.returncode == 1
    assert "passphrase does not exist" in refused.stderr


def test_ctrl_c_ends_it_in_order(tmp_path):
    with up(tmp_path / "mesh") as plane:
        plane.process.send_signal(signal.SIGINT)
        assert plane.process.wait(60) == 0
        assert not plane.socket.exists()
        assert not brokers.accepts(plane.broker_port)


# -- serve


def test_serve_keeps_a_mosquitto_that_somebody_else_runs_in_step(tmp_path):
    directory, port, pid_file = tmp_path / "mesh", free_port(), tmp_path / "mosquitto.pid"
    Authority.create(directory / "ca", "cluster.local")
    options = ("--broker", f"mqtts://{HOST}:{port}", "--broker-pid-file", pid_file)
    with running(directory, "serve", *options, broker_port=port) as plane, mosquitto(directory / "broker", pid_file):
        assert plane.meshctl("apply", "-f", "-", stdin=MESH).returncode == 0
        plane.published()
        web = join(plane, tmp_path / "web", "web-1", "-n", "shop")

        async def read():
            async with connect(plane, web) as mqtt:
                return messages.decode(await retained(mqtt, POLICY))

        assert asyncio.run(read()).body is not None


@contextlib.contextmanager
def mosquitto(directory, pid_file):
    """Mosquitto on the configuration that `serve` wrote."""
    binary = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    with subprocess.Popen([binary, "-c", "mosquitto.conf"], cwd=directory, stderr=subprocess.DEVNULL) as process:
        pid_file.write_text(f"{process.pid}\n")
        try:
            yield
        finally:
            process.kill()


def test_metrics_say_what_was_done(tmp_path):
    port = free_port()
    with up(tmp_path / "mesh", "--metrics-port", port) as plane:
        plane.ask("apply", "-f", "-", stdin=MESH)
        plane.published()
        plane.meshctl("apply", "-f", "-", stdin="kind: Nothing")
        with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=PATIENCE_S) as answer:
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            lines = answer.read().decode().splitlines()
        found = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
    assert found['uproxy_control_requests_total{path="/v1/apply",code="200"}'] == 1
    assert found['uproxy_control_requests_total{path="/v1/apply",code="422"}'] == 1
    assert found["uproxy_control_change_duration_seconds_count"] == 1
    assert found["uproxy_control_published"] == found["uproxy_control_broker_connected"] == 1
    assert found["uproxy_control_messages_published_total"] >= found['uproxy_control_records{state="live"}'] > 256
    assert found["uproxy_control_epoch"] == pytest.approx(time.time(), abs=120)
    assert found['uproxy_control_proxies{state="absent"}'] == 1
    assert found["uproxy_control_certificates_issued_total"] == 0
