"""Spans: what a collector is posted by real proxies, how both ends of a connection are one trace, and what fails."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.collector import collecting, values
from tests.support.site import APP_PORT, Site, dial, echo_server, eventually, get
from uproxy import plane
from uproxy.otlp import MAX_QUEUED, Exporter, nearby, tunnelled
from uproxy.telemetry import Span

NETWORK = "127.0.86"
COLLECTOR_PORT = 4318
WEB_ID, DB_ID = "spiffe://cluster.local/ns/shop/sa/web", "spiffe://cluster.local/ns/shop/sa/db"

# The collector is another port of db's workload.
SERVICE = f"""
---
apiVersion: v1
kind: Service
metadata: {{name: collector, namespace: shop}}
spec: {{selector: {{app: db}}, ports: [{{port: {COLLECTOR_PORT}}}]}}
"""
DENY_WEB = f"""
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: no-web, namespace: shop}}
spec:
  action: DENY
  rules:
  - from: [{{source: {{principals: [cluster.local/ns/shop/sa/web]}}}}]
    to: [{{operation: {{ports: ["{APP_PORT}"]}}}}]
"""


@contextmanager
def running(site: Site, web: list[str], db: list[str]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(echo_server(site.application))
        stack.enter_context(site.running("db", *db))
        stack.enter_context(site.running("web", *web))
        yield


def options(address: tuple[str, int], share: float = 1.0) -> list[str]:
    return [f"--otlp={address[0]}:{address[1]}", f"--otlp-share={share}"]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site.create(tmp_path, NETWORK)
    made.mesh.write_text(made.resources + SERVICE)
    return made


LOCAL = (f"{NETWORK}.9", COLLECTOR_PORT)


def test_both_ends_of_a_connection_are_one_trace(site: Site) -> None:
    with collecting(LOCAL) as collector, running(site, options(LOCAL), options(LOCAL, 0)):
        before = time.time()
        assert dial(site.forward) == b"hello"
        eventually(lambda: len(collector.spans()) == 2)
        client, server = sorted(collector.spans(), key=lambda span: -span["kind"])
        assert (client["kind"], server["kind"]) == (3, 2)
        assert (client["service"], server["service"]) == ("web.shop", "db.shop")
        assert client["traceId"] == server["traceId"]
        assert re.fullmatch(r"[0-9a-f]{32}", client["traceId"])
        assert re.fullmatch(r"[0-9a-f]{16}", server["spanId"])
        assert server["parentSpanId"] == client["spanId"] != server["spanId"]
        assert "parentSpanId" not in client
        for span in (client, server):
            assert span["name"] == "db.shop.svc.cluster.local"
            assert "status" not in span
            began, ended = int(span["startTimeUnixNano"]) / 1e9, int(span["endTimeUnixNano"]) / 1e9
            assert before - 0.01 <= began <= ended <= time.time()
            attributes = span["attributes"]
            assert (attributes["src.identity"], attributes["dst.identity"]) == (WEB_ID, DB_ID)
            assert (attributes["bytes_sent"], attributes["bytes_recv"]) == (5, 5)
        # The access log has the trace's id.
        eventually(lambda: f'request_id="{client["traceId"]}"' in site.log("web"))
        metrics = get(f"{NETWORK}.1", 15020, "/metrics")[1]
        assert "uproxy_spans_sent_total 1\n" in metrics
        assert "uproxy_spans_dropped_total 0\n" in metrics


def test_a_connection_that_is_not_drawn_is_recorded_nowhere(site: Site) -> None:
    with collecting(LOCAL) as collector, running(site, options(LOCAL, 0), options(LOCAL)):
        for _ in range(20):
            assert dial(site.forward) == b"hello"
        eventually(lambda: site.log("db").count("connection complete") == 20)
        time.sleep(1.5)  # spans are posted every second
        assert collector.spans() == []


def test_a_refusal_is_an_error_with_its_reason_at_both_ends(site: Site) -> None:
    site.mesh.write_text(site.resources + DENY_WEB)
    with collecting(LOCAL) as collector, running(site, options(LOCAL), options(LOCAL)):
        with pytest.raises(ConnectionError):
            dial(site.forward)
        eventually(lambda: len(collector.spans()) == 2)
        for span in collector.spans():
            assert span["status"]["code"] == 2
            assert "policy" in span["status"]["message"]
            assert span["attributes"]["response_flags"] == "DENY"


def test_a_collector_in_the_mesh_is_reached_through_the_tunnel_and_its_connections_are_no_spans(site: Site) -> None:
    at_db = (f"{NETWORK}.2", COLLECTOR_PORT)
    with collecting(at_db) as collector, running(site, options(("collector.shop", COLLECTOR_PORT)), []):
        for _ in range(3):
            assert dial(site.forward) == b"hello"
        eventually(lambda: len(collector.spans()) == 3)
        eventually(lambda: 'dst.service="collector.shop.svc.cluster.local"' in site.log("db"))
        time.sleep(2.2)
        assert len(collector.spans()) == 3
        assert {span["name"] for span in collector.spans()} == {"db.shop.svc.cluster.local"}
        # Each post came by the tunnel.
        posts = [line for line in site.log("db").splitlines() if "collector.shop.svc" in line]
        assert len(posts) == len(collector.posts)
        assert all(f'src.identity="{WEB_ID}"' in line for line in posts)
        assert "error=" not in site.log("web")


def test_spans_wait_for_a_collector_that_is_away_and_are_posted_by_a_proxy_that_ends(site: Site) -> None:
    with ExitStack() as stack:
        stack.enter_context(echo_server(site.application))
        stack.enter_context(site.running("db"))
        web = stack.enter_context(site.running("web", *options(LOCAL)))
        assert dial(site.forward) == b"hello"
        eventually(lambda: "the collector" in site.log("web"))
        with collecting(LOCAL) as collector:
            eventually(lambda: len(collector.spans()) == 1)
            eventually(lambda: "works again" in site.log("web"))
            assert dial(site.forward) == b"hello"
            eventually(lambda: site.log("web").count("connection complete") == 2)
            web.send_signal(signal.SIGTERM)
            assert web.wait(60) == 0
            assert len(collector.spans()) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--otlp=10.0.0.9:4318"], "name an address on loopback, or a service of the mesh"),
        (["--otlp=collector:4318"], "would leave in the clear"),
        (["--otlp=collector.shop"], "is no HOST:PORT"),
        (["--otlp=127.0.0.1:4318", "--otlp-share=2"], "--otlp-share is between 0 and 1"),
    ],
)
def test_a_collector_in_the_clear_is_refused(site: Site, arguments: list[str], said: str) -> None:
    done = subprocess.run(site.command("web", *arguments), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_proxy_that_records_nothing_does_not_load_it() -> None:
    asked = "import sys, uproxy.run, uproxy.process; print('uproxy.otlp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "False\n"


# -- the exporter by itself


def span(number: int = 1, *, error: str | None = None, value: str = "10.0.0.1:1") -> Span:
    now = time.monotonic()
    return Span(
        "cd" * 16, f"{number:016x}", "", "outbound", "client", now - 1, now, lambda field: [field("src", value)], error
    )


def exporting(dial: Any) -> Exporter:
    return Exporter(dial, "collector", 1.0, lambda: "web.shop", "1")


def on_loop(conversation: Callable[[], Any]) -> Any:
    return plane.run(conversation())


@pytest.mark.parametrize(("status", "kept"), [(400, False), (404, False), (429, True), (503, True)])
def test_what_is_refused_for_good_is_dropped_and_what_is_refused_for_now_is_kept(status: int, kept: bool) -> None:
    async def conversation() -> None:
        exporter = exporting(nearby(*LOCAL))
        exporter.add(span())
        collector.status = status
        await exporter.finish(5)
        assert (exporter.sent, exporter.dropped) == (0, 1)  # it ended, so what is kept is lost in the end, too
        exporter = exporting(nearby(*LOCAL))
        exporter.add(span())
        assert await exporter._post() is not kept
        collector.status = 200
        await exporter.finish(5)
        assert (exporter.sent, exporter.dropped) == ((1, 0) if kept else (0, 1))

    with collecting(LOCAL) as collector:
        on_loop(conversation)


def test_the_queue_is_bounded_and_order_is_kept() -> None:
    async def nobody() -> Any:
        raise ConnectionRefusedError("nobody is there")

    async def conversation() -> None:
        exporter = exporting(nobody)
        for number in range(MAX_QUEUED + 10):
            exporter.add(span(number))
        assert exporter.dropped == 10
        await exporter._post()
        exporter.add(span())
        assert exporter.dropped == 11
        assert [json.loads(one)["spanId"] for one in exporter._spans] == [f"{n:016x}" for n in range(MAX_QUEUED)]
        exporter._dial = nearby(*LOCAL)
        await exporter.finish(10)
        assert (exporter.sent, exporter.dropped) == (MAX_QUEUED, 11)
        assert [one["spanId"] for one in collector.spans()] == [f"{n:016x}" for n in range(MAX_QUEUED)]

    with collecting(LOCAL) as collector:
        on_loop(conversation)


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 20\r\n", b"\xff" * 200_000])
def test_what_is_no_collector_costs_no_span(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    async def conversation() -> None:
        async with await asyncio.start_server(serve, *LOCAL):
            exporter = exporting(nearby(*LOCAL))
            exporter.add(span())
            assert not await exporter._post()
        assert (len(exporter._spans), exporter.sent, exporter.dropped) == (1, 0, 0)

    on_loop(conversation)


def test_a_collector_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uproxy.otlp.TIMEOUT_S", 0.2)

    async def conversation() -> None:
        with socket.create_server(LOCAL):
            exporter = exporting(nearby(*LOCAL))
            exporter.add(span())
            assert not await exporter._post()
            assert len(exporter._spans) == 1

    on_loop(conversation)


def test_the_other_end_of_a_tunnelled_connection_is_given_to_nobody_else() -> None:
    async def conversation() -> None:
        given: list[socket.socket] = []
        reader, writer = await tunnelled(given.append)()
        (app,) = given
        assert app.getpeername() == writer.get_extra_info("sockname")
        app.sendall(b"x")
        assert await reader.readexactly(1) == b"x"
        app.close()
        writer.close()
        await writer.wait_closed()

    on_loop(conversation)


def test_no_value_breaks_out_of_its_attribute() -> None:
    nasty = 'a"b\\\n\u2028\x00' + "x" * 5000
    exporter = exporting(None)
    exporter.add(span(error=nasty, value=nasty))
    encoded = json.loads(exporter._spans[0])
    assert values(encoded) == {"src": nasty[:2048]}
    assert encoded["status"]["message"] == nasty[:2048]
    assert json.loads(exporter._body(list(exporter._spans)))["resourceSpans"]
