"""Connections to what is no broker, or a bad one: nothing is told to it, nothing is left behind."""

import asyncio
import contextlib
import gc
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from control.api.identity import make_id
from control.client import mqtt
from control.client.mqtt import BrokerAccess, BrokerError, LastWill, connection
from control.server.ca import Authority
from tests.support import brokers
from tests.support.certificates import WEB, identity_dir
from uproxy import plane

WILL = LastWill("status", b"gone")
CONNACK = b"\x20\x02\x00\x00"
NOT_AUTHORISED = b"\x20\x02\x00\x05"  # MQTT 3.1.1 section 3.2.2.3


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
def broker_dir(authority, tmp_path_factory):
    return identity_dir(
        authority, tmp_path_factory.mktemp("broker") / "id", make_id(WEB.trust_domain, "mesh-system", "broker")
    )


class Peer:
    """Takes one TLS connection and does what a test says. Knows what it was told, and whether we hung up."""

    def __init__(self, directory, act: Callable[[ssl.SSLSocket], None]) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(directory / "chain.pem", directory / "key.pem")
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(10.0)
        self._act = act
        self.url = f"mqtts://127.0.0.1:{self._listening.getsockname()[1]}"
        self.heard = b""
        self.hung_up = False
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> "Peer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(15.0)
        assert not self._thread.is_alive()
        self._listening.close()

    def _serve(self) -> None:
        raw, _ = self._listening.accept()
        raw.settimeout(30)
        try:
            with self._context.wrap_socket(raw, server_side=True) as tls:
                self._act(tls)
                while content := tls.recv(4096):
                    self.heard += content
                self.hung_up = True
        except OSError:
            self.hung_up = True
        finally:
            raw.close()


def silent(tls: ssl.SSLSocket) -> None:
    pass


async def dial(url: str, directory, context: Callable[[], ssl.SSLContext] | None = None) -> None:
    access = BrokerAccess((url,), WEB, context or (lambda: brokers.tls(directory)))
    async with connection(access, url, "client", WILL) as broker:
        await broker.lost()


def refused(url: str, directory, **options) -> str:
    """Why the connection fails. In the loop of a data plane, which nothing is left in."""

    async def scenario() -> str:
        with pytest.raises(BrokerError) as raised:
            await dial(url, directory, **options)
        await asyncio.sleep(0.05)
        loop = asyncio.get_running_loop()
        left = [key.fileobj for key in loop.selector.get_map().values()]
        assert len(left) == 1, "the loop's own pipe"
        assert len(asyncio.all_tasks()) == 1
        return str(raised.value)

    return plane.run(scenario())


def test_a_workload_in_the_brokers_place_is_told_nothing(web_dir):
    with Peer(web_dir, silent) as peer:
        assert f"it is {WEB}, not the broker" in refused(peer.url, web_dir)
    assert peer.heard == b""
    assert peer.hung_up


def test_a_broker_of_another_mesh_is_told_nothing(web_dir, tmp_path):
    other = Authority.create(tmp_path / "ca", "cluster.local")
    directory = identity_dir(other, tmp_path / "id", make_id(WEB.trust_domain, "mesh-system", "broker"))
    with Peer(directory, silent) as peer:
        assert "certificate verify failed" in refused(peer.url, web_dir)
    assert peer.heard == b""


def test_a_broker_that_hangs_up_is_not_waited_for(broker_dir, web_dir):
    started = time.monotonic()
    with Peer(broker_dir, lambda tls: tls.unwrap()) as peer:
        assert "it hangs up" in refused(peer.url, web_dir)
    assert time.monotonic() - started < brokers.PATIENCE_S / 2


def test_a_broker_that_does_not_know_us_says_so(broker_dir, web_dir):
    with Peer(broker_dir, lambda tls: tls.sendall(NOT_AUTHORISED)) as peer:
        assert "Not authorized" in refused(peer.url, web_dir)


def test_a_broker_that_says_nothing_is_left(broker_dir, web_dir, monkeypatch):
    monkeypatch.setattr(mqtt, "TIMEOUT_S", 0.3)
    with Peer(broker_dir, silent) as peer:
        assert "says nothing" in refused(peer.url, web_dir)
    assert peer.hung_up
    assert peer.heard.startswith(b"\x10")  # CONNECT


def test_a_broker_that_sends_much_before_it_answers_is_heard_out(broker_dir, web_dir, monkeypatch):
    """Mosquitto and nats-server send what they retain before SUBACK."""
    monkeypatch.setattr(mqtt, "TIMEOUT_S", 0.3)

    def act(tls: ssl.SSLSocket) -> None:
        tls.recv(4096)
        tls.sendall(CONNACK)
        assert tls.recv(4096)[0] == 0x82  # SUBSCRIBE
        for _ in range(8):
            time.sleep(0.1)
            tls.sendall(b"\x30\x04\x00\x01ab")
        tls.sendall(b"\x90\x04\x00\x01\x00\x80")

    async def scenario() -> None:
        access = BrokerAccess((peer.url,), WEB, lambda: brokers.tls(web_dir))
        async with connection(access, peer.url, "client", WILL) as broker:
            assert await broker.subscribe(["a", "b"]) == {"b"}
            with pytest.raises(BrokerError, match="no answer"):
                await broker.publish("a", b"")

    with Peer(broker_dir, act) as peer:
        plane.run(scenario())


def test_much_at_once_is_read_in_slices(broker_dir, web_dir):
    """A megabyte in records of 16 KB, 54 messages each: others have their turn after a few of them."""
    message = b"\x30\xac\x02\x00\x01a" + bytes(297)
    number = 3000

    def act(tls: ssl.SSLSocket) -> None:
        tls.recv(4096)
        tls.sendall(CONNACK + number * message)

    async def scenario() -> None:
        access = BrokerAccess((peer.url,), WEB, lambda: brokers.tls(web_dir))
        taken, most = 0, 0
        async with connection(access, peer.url, "client", WILL) as broker, asyncio.timeout(30):
            while taken < number:
                before = taken
                while broker.arrivals.take() is not None:
                    taken += 1
                most = max(most, taken - before)
                await asyncio.sleep(0)
        assert most < number / 2

    with Peer(broker_dir, act) as peer:
        plane.run(scenario())


def test_a_socket_that_closes_meanwhile_is_not_watched_under_anothers_number(broker_dir, web_dir):
    def act(tls: ssl.SSLSocket) -> None:
        tls.recv(4096)
        tls.sendall(CONNACK)

    async def scenario() -> None:
        access = BrokerAccess((peer.url,), WEB, lambda: brokers.tls(web_dir))
        loop = asyncio.get_running_loop()
        async with connection(access, peer.url, "client", WILL) as broker:
            client, watched = broker._client, broker._client._client._sock
            await asyncio.sleep(0)
            number = watched.fileno()
            client._on_socket_register_write(client._client, None, watched)
            client._client._sock_close()
            with contextlib.ExitStack() as stack:
                others = [stack.enter_context(one) for one in socket.socketpair()]
                assert number in [one.fileno() for one in others]
                await asyncio.sleep(0)
                assert not loop.remove_writer(number)

    with Peer(broker_dir, act) as peer:
        plane.run(scenario())


def test_a_host_that_does_not_speak_tls_is_left(web_dir):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with listening.accept()[0] as sock:
                sock.sendall(b"SSH-2.0-x\r\n")
                with contextlib.suppress(ConnectionResetError):
                    while sock.recv(4096):
                        pass

        thread = threading.Thread(target=answer)
        thread.start()
        assert "wrong version number" in refused(f"mqtts://127.0.0.1:{listening.getsockname()[1]}", web_dir).lower()
        thread.join(30)


def test_nobody_there_is_told_in_words(web_dir):
    assert "Connection refused" in refused(f"mqtts://127.0.0.1:{brokers.free_port()}", web_dir)


def test_a_missing_certificate_is_told_in_words(web_dir):
    def context() -> ssl.SSLContext:
        raise FileNotFoundError("chain.pem")

    assert "no certificate to connect with: chain.pem" in refused("mqtts://127.0.0.1:1", web_dir, context=context)


@pytest.mark.parametrize(
    ("packet", "told"),
    [
        (b"\x30\xff\xff\xff\x7f" + b"x" * 1000, "sends a packet of 268435455 bytes"),
        (b"\x30\x05\x00\xff", ""),  # cut short: then it hangs up
        (b"\xf0\xff\xff\xff\xff\xff", ""),
        (b"\x30\x04\x00\x02\xff\xfe", ""),
        (b"\x90\x03\x00\x01\x00", ""),  # SUBACK of what was never asked for
    ],
)
def test_a_broker_that_breaks_the_protocol_is_left(broker_dir, web_dir, packet, told):
    def act(tls: ssl.SSLSocket) -> None:
        tls.sendall(CONNACK + packet)
        time.sleep(0.2)
        tls.shutdown(socket.SHUT_WR)

    with Peer(broker_dir, act) as peer:
        assert told in refused(peer.url, web_dir)


def test_connecting_that_is_cancelled_before_the_host_answers_leaves_nothing(broker_dir, web_dir, monkeypatch):
    real, began, cancelled = socket.getaddrinfo, threading.Event(), threading.Event()

    def slowly(*arguments, **options):
        began.set()
        cancelled.wait(60)
        return real(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slowly)

    async def scenario() -> None:
        with Peer(broker_dir, silent) as peer:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(dial(peer.url, web_dir))
                while not began.is_set():  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                task.cancel()
            cancelled.set()
            while not peer.hung_up:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            assert len(asyncio.get_running_loop().selector.get_map()) == 1
            assert len(asyncio.all_tasks()) == 1
        assert peer.heard == b""

    plane.run(scenario())


def test_connecting_that_is_cancelled_leaves_nothing(broker_dir, web_dir):
    """At any moment: before the handshake, in it, and while the broker does not answer."""
    for after_s in (0.0, 0.002, 0.005, 0.01, 0.02, 0.1):

        async def scenario(pause_s: float = after_s) -> None:
            with Peer(broker_dir, silent) as peer:
                async with asyncio.TaskGroup() as group:
                    task = group.create_task(dial(peer.url, web_dir))
                    await asyncio.sleep(pause_s)
                    task.cancel()
                # A connection that nobody waits for would be made in the thread even now, if it were not prevented.
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", int(peer.url.rpartition(":")[2])), 0.1).close()
                while not peer.hung_up:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
                await asyncio.sleep(0.01)
                loop = asyncio.get_running_loop()
                assert len(loop.selector.get_map()) == 1
                assert len(asyncio.all_tasks()) == 1

        plane.run(scenario())


# -- what a proxy pays


def loaded(code: str, *names: str) -> list[str]:
    """Which of these modules a fresh interpreter has after some code."""
    code = f"import sys\n{code}\nprint(*({set(names)!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return run.stdout.split()


def test_a_proxy_that_has_files_imports_no_mqtt():
    assert loaded("import uproxy.run", "aiomqtt", "paho.mqtt.client", "control.client.mqtt") == []


def test_a_member_imports_nothing_that_it_does_not_use():
    heavy = ("urllib.request", "http.client", "email", "cryptography", "aiohttp", "yaml", "dns.name")
    assert loaded("import control.client.subscriber", *heavy) == []


def test_urllib_is_whole_afterwards():
    code = "import control.client.mqtt, urllib.request\nassert urllib.request.getproxies() == {}\nimport http.client"
    assert loaded(code, "http.client") == ["http.client"]
