"""A broker that somebody else runs: what is written for it, and when it is told."""

import asyncio
import contextlib
import subprocess
import sys

import pytest
from cryptography import x509

from control.server.brokers import Listen
from control.server.ca import Authority
from control.server.foreign import ForeignBroker
from tests.support.certificates import DB, WEB

LISTEN = Listen("127.0.0.1", 8883)
# Says `ready`, then a line for each SIGHUP.
LISTENER = """
import signal, sys
signal.signal(signal.SIGHUP, lambda *_: print("told", flush=True))
print("ready", flush=True)
while True:
    signal.pause()
"""


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority.create(tmp_path_factory.mktemp("ca") / "ca", "cluster.local")


@contextlib.contextmanager
def listener(pid_file):
    """A process that stands for the broker; its standard output tells what it was told."""
    with subprocess.Popen([sys.executable, "-c", LISTENER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        pid_file.write_text(f"{process.pid}\n")
        try:
            yield process
        finally:
            process.kill()


async def while_running(broker: ForeignBroker, steps) -> None:
    """Run the broker's keeper beside some steps."""
    async with asyncio.TaskGroup() as group:
        keeper = group.create_task(broker.run())
        async with asyncio.timeout(30):
            await broker.ready.wait()
            await steps()
        keeper.cancel()


def test_both_kinds_of_broker_find_their_files_and_who_may_come_in(authority, tmp_path):
    broker = ForeignBroker(tmp_path / "broker", LISTEN, authority, None)

    async def steps():
        names = {path.name for path in (tmp_path / "broker").iterdir()}
        assert names >= {"nats.conf", "mosquitto.conf", "acl", "identity"}
        assert str(WEB) not in (tmp_path / "broker" / "nats.conf").read_text()
        await broker.admit([WEB])
        assert str(WEB) in (tmp_path / "broker" / "nats.conf").read_text()
        assert str(WEB) in (tmp_path / "broker" / "acl").read_text()
        await broker.admit([DB])
        assert str(WEB) not in (tmp_path / "broker" / "acl").read_text()

    asyncio.run(while_running(broker, steps))
    leaf = x509.load_pem_x509_certificate((tmp_path / "broker" / "identity" / "chain.pem").read_bytes())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
        "spiffe://cluster.local/ns/mesh-system/sa/broker"
    ]


def test_whom_it_was_told_before_it_ran_is_let_in_too(authority, tmp_path):
    broker = ForeignBroker(tmp_path / "broker", LISTEN, authority, None)

    async def steps():
        assert str(WEB) in (tmp_path / "broker" / "acl").read_text()

    async def run():
        await broker.admit([WEB])
        await while_running(broker, steps)

    asyncio.run(run())


def test_the_broker_is_told_of_changes_and_of_nothing_else(authority, tmp_path):
    broker = ForeignBroker(tmp_path / "broker", LISTEN, authority, tmp_path / "pid")

    async def steps():
        assert await asyncio.to_thread(process.stdout.readline) == "told\n"  # at the start
        await broker.admit([WEB])
        assert await asyncio.to_thread(process.stdout.readline) == "told\n"
        await broker.admit([WEB])
        await asyncio.sleep(0.2)

    with listener(tmp_path / "pid") as process:
        asyncio.run(while_running(broker, steps))
        process.terminate()
        assert process.stdout.read() == ""


def test_the_broker_gets_a_new_certificate_at_half_of_its_life(authority, tmp_path):
    broker = ForeignBroker(tmp_path / "broker", LISTEN, authority, tmp_path / "pid", svid_ttl_s=2)
    chain = tmp_path / "broker" / "identity" / "chain.pem"

    async def steps():
        first = chain.read_bytes()
        assert await asyncio.to_thread(process.stdout.readline) == "told\n"
        assert await asyncio.to_thread(process.stdout.readline) == "told\n"
        assert chain.read_bytes() != first

    with listener(tmp_path / "pid") as process:
        asyncio.run(while_running(broker, steps))


@pytest.mark.parametrize("content", ["", "nonsense", "0", "1", "-1", "99999999", "9" * 40])
def test_a_pid_file_that_names_no_broker_harms_nobody(authority, tmp_path, content, caplog):
    (tmp_path / "pid").write_text(content)
    broker = ForeignBroker(tmp_path / "broker", LISTEN, authority, tmp_path / "pid")

    async def steps():
        await broker.admit([WEB])

    asyncio.run(while_running(broker, steps))
    assert "cannot be told of a change" in caplog.text


def test_a_pid_file_that_is_not_there_yet_is_no_failure(authority, tmp_path, caplog):
    broker = ForeignBroker(tmp_path / "broker", LISTEN, authority, tmp_path / "no-pid")
    asyncio.run(while_running(broker, lambda: broker.admit([WEB])))
    assert "cannot be told of a change" in caplog.text
