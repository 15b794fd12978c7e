"""The life of a process, whatever it runs: it ends in order, says why it could not start, and leaves nothing open."""

import asyncio
import socket
from contextlib import suppress

import pytest

from control.client.files import ConfigError
from control.client.membership import Membership
from tests.support.certificates import WEB
from uproxy import process
from uproxy.joining import JoinError
from uproxy.process import StartError
from uproxy.tls import CredentialsError


class Proxy:
    """Notes what is done to it."""

    def __init__(self, at_start: Exception | None = None, later: Exception | None = None) -> None:
        self.stopping = asyncio.Event()
        self.done: list[str] = []
        self._at_start, self._later = at_start, later

    async def start(self, group: asyncio.TaskGroup) -> None:
        self.done.append("start")
        if self._at_start is not None:
            raise self._at_start
        group.create_task(self._works())

    async def _works(self) -> None:
        await asyncio.sleep(0)
        if self._later is not None:
            raise self._later
        self.stopping.set()
        await asyncio.Event().wait()

    async def drain(self) -> None:
        self.done.append("drain")

    def close(self) -> None:
        self.done.append("close")


def test_who_is_told_to_stop_drains_and_closes():
    proxy = Proxy()
    assert asyncio.run(process.live(proxy)) == 0
    assert proxy.done == ["start", "drain", "close"]


@pytest.mark.parametrize("failure", [StartError("a"), ConfigError("b"), CredentialsError("c", "d")])
def test_what_an_operator_can_mend_is_raised_as_itself_at_the_start_and_later(failure):
    for proxy in (Proxy(at_start=failure), Proxy(later=failure)):
        with pytest.raises(type(failure)) as raised:
            asyncio.run(process.live(proxy))
        assert raised.value is failure
        assert proxy.done == ["start", "close"]


def test_a_bug_is_no_refusal():
    proxy = Proxy(later=ZeroDivisionError())
    with pytest.raises(ExceptionGroup):
        asyncio.run(process.live(proxy))
    assert proxy.done == ["start", "close"]


@pytest.mark.parametrize("taken", ["admin", "metrics"])
def test_a_port_that_is_taken_leaves_no_other_one_open(monkeypatch, taken):
    with socket.create_server(("127.0.0.1", 0)) as here, socket.create_server(("127.0.0.1", 0)) as elsewhere:
        ports = {"admin": here.getsockname()[1], "metrics": elsewhere.getsockname()[1]}
        if taken == "admin":
            elsewhere.close()
        else:
            here.close()
        monkeypatch.setattr(process, "METRICS_PORT", ports["metrics"])

        async def listen() -> None:
            await process.listen_to_operators(["127.0.0.1"], ports["admin"], {}, bytes, list)

        with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{ports[taken]}: ") as refused:
            asyncio.run(listen())
        assert ("--admin-port" in str(refused.value)) is (taken == "admin")
        for port in set(ports.values()) - {ports[taken]}:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 5):
                pytest.fail(f"{port} is still open")


def test_a_node_agent_is_no_workload():
    membership = Membership(WEB, "web-1", (), "https://c:15012", ("mqtts://b:8883",))
    with pytest.raises(JoinError, match="shop/web-1 joined without an address, as node agents do"):
        process.who_joined(membership)
