"""The control plane's metrics: what they say, and a server that nobody can hold up."""

import asyncio
import contextlib
import socket
from dataclasses import replace

import pytest

from control.server import metrics
from control.server.metrics import MAX_CONNECTIONS, Durations, MetricsServer, Values, counted, render
from tests.support.waiting import until

VALUES = Values(
    requests={("/v1/apply", 200): 3, ("other", 404): 1},
    changes=Durations(),
    published=20,
    issued=2,
    refused={403: 1},
    connected=True,
    settled=False,
    epoch=7,
    version=9,
    live=5,
    deleted=1,
    proxies={"current": 2, "behind": 0},
    bindings={"enforced": 1},
    problems=0,
)


def samples(text: bytes) -> dict[str, str]:
    return dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))


def test_values_are_samples():
    found = samples(render(VALUES))
    assert found['uproxy_control_requests_total{path="/v1/apply",code="200"}'] == "3"
    assert found['uproxy_control_certificates_refused_total{code="403"}'] == "1"
    assert (found["uproxy_control_broker_connected"], found["uproxy_control_published"]) == ("1", "0")
    assert found['uproxy_control_proxies{state="behind"}'] == "0"
    assert found['uproxy_control_records{state="live"}'] == "5"


def test_durations_are_a_histogram():
    durations = Durations()
    for took_s in (0.01, 0.011, 0.5, 100.0):
        durations.add(took_s)
    found = samples(render(replace(VALUES, changes=durations)))
    name = "uproxy_control_change_duration_seconds"
    buckets = [int(value) for sample, value in found.items() if sample.startswith(f"{name}_bucket")]
    assert buckets == [1, 2, 2, 2, 3, 3, 3, 3, 4]
    assert found[f'{name}_bucket{{le="+Inf"}}'] == found[f"{name}_count"] == "4"
    assert float(found[f"{name}_sum"]) == pytest.approx(100.521)


def test_what_was_not_found_counts_nothing():
    assert counted(["a", "b"], ["b", "b"]) == {"a": 0, "b": 2}


class Asked:
    """A server on loopback, and how often it asked for values."""

    def __init__(self) -> None:
        self.times = 0
        self.fails = False

    def values(self) -> Values:
        self.times += 1
        if self.fails:
            raise OSError("no disk")
        return VALUES

    @contextlib.asynccontextmanager
    async def serving(self):
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        task = asyncio.get_running_loop().create_task(MetricsServer(self.values).run(listening))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def ask(self, sent: bytes = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n") -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(sent)
            return await asyncio.wait_for(reader.read(), 30)
        except ConnectionResetError:
            return b""
        finally:
            writer.close()


@pytest.fixture
def asked():
    return Asked()


def test_prometheus_gets_the_text_and_the_end_of_the_connection(asked):
    async def run():
        async with asked.serving():
            head, _, body = (await asked.ask()).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"content-length: %d" % len(body) in head
            assert body == render(VALUES)

    asyncio.run(run())


def test_asking_often_costs_little(asked):
    async def run():
        async with asked.serving():
            await asyncio.gather(*(asked.ask() for _ in range(20)))
            assert asked.times == 1

    asyncio.run(run())


@pytest.mark.parametrize(("rests", "times"), [(0, 2), (1_000_000, 1)])
def test_what_took_long_to_count_is_not_counted_again_soon(asked, monkeypatch, rests, times):
    monkeypatch.setattr(metrics, "_FRESH_S", 0.0)
    monkeypatch.setattr(metrics, "_RESTS", rests)

    async def run():
        async with asked.serving():
            await asked.ask()
            await asked.ask()
            assert asked.times == times

    asyncio.run(run())


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /metrics\r\n\r\n", b"400"),
        (b"\x16\x03\x01\r\n\r\n", b"400"),
    ],
)
def test_anything_else_is_refused(asked, sent, status):
    async def run():
        async with asked.serving():
            assert (await asked.ask(sent)).split(b" ")[1] == status
        assert asked.times == 0

    asyncio.run(run())


def test_what_fails_is_an_error_and_the_next_one_is_answered(asked):
    async def run():
        async with asked.serving():
            asked.fails = True
            assert (await asked.ask()).startswith(b"HTTP/1.1 500 ")
            asked.fails = False
            assert (await asked.ask()).startswith(b"HTTP/1.1 200 ")

    asyncio.run(run())


def test_a_head_without_an_end_is_cut_off(asked):
    async def run():
        async with asked.serving():
            assert await asked.ask(b"GET /metrics HTTP/1.1\r\n" + b"x: y\r\n" * 5_000) == b""

    asyncio.run(run())


def test_silent_connections_keep_nobody_out_for_long(asked, monkeypatch):
    monkeypatch.setattr(metrics, "_TIMEOUT_S", 0.5)

    async def run():
        async with asked.serving():
            silent = [await asyncio.open_connection("127.0.0.1", asked.port) for _ in range(MAX_CONNECTIONS)]
            assert await asked.ask() == b"", "there is no room"
            await until(lambda: all(reader.at_eof() for reader, _ in silent))
            assert (await asked.ask()).startswith(b"HTTP/1.1 200 ")
            for _, writer in silent:
                writer.close()

    asyncio.run(run())
