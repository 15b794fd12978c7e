"""A waypoint in a trace: its span between the caller's and the backend's, for requests and for opaque TCP."""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.collector import Collector, collecting
from tests.support.http_app import telling
from tests.support.site import Site, dial, echo_server, eventually
from tests.support.waypoint_site import bound_site, waypoint

NETWORK = "127.0.87"
COLLECTOR = (f"{NETWORK}.9", 4318)
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def otlp(share: float) -> list[str]:
    return [f"--otlp={COLLECTOR[0]}:{COLLECTOR[1]}", f"--otlp-share={share}"]


@contextmanager
def running(
    directory: Path, *options: str, http: bool = True, web: float = 0
) -> Iterator[tuple[Site, Collector, subprocess.Popen[bytes]]]:
    """web records what begins there as `web` says, and db what the waypoint records."""
    site = bound_site(directory, NETWORK)
    if not http:
        site.mesh.write_text(
            site.mesh.read_text().replace(", appProtocol: http", "").partition("---\napiVersion: sec")[0]
        )
    with ExitStack() as stack:
        collector = stack.enter_context(collecting(COLLECTOR))
        stack.enter_context(telling(site.application) if http else echo_server(site.application))
        stack.enter_context(site.running("db", *otlp(1)))
        stack.enter_context(site.running("web", *otlp(web)))
        process = stack.enter_context(waypoint(site, "--config", str(site.mesh), "--workload", "shop/wp-1", *options))
        yield site, collector, process


def get(site: Site, *traceparent: str, method: str = "GET") -> tuple[int, dict[str, str]]:
    """The status, and the headers that the application saw."""
    connection = http.client.HTTPConnection(*site.forward, timeout=30)
    connection.putrequest(method, "/path")
    for value in traceparent:
        connection.putheader("traceparent", value)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, json.loads(body) if response.status == 200 else {}


SERVER, CLIENT = 2, 3


def by_service(collector: Collector, *kinds: int) -> dict[str, dict[str, Any]]:
    return {span["service"]: span for span in collector.spans() if span["kind"] in kinds}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_request_whose_caller_records_it_goes_on_in_that_trace(tmp_path: Path, workers: int) -> None:
    with running(tmp_path, f"--workers={workers}", *otlp(0)) as (site, collector, process):
        status, seen = get(site, f"00-{TRACE}-{SPAN}-01")
        assert status == 200
        eventually(collector.spans)
        process.terminate()  # its connection to the backend waits for another request until then
        eventually(lambda: len(collector.spans()) == 3)
        spans = by_service(collector, SERVER)
        ours, backends = spans["wp.shop"], spans["db.shop"]
        attempt = by_service(collector, CLIENT)["wp.shop"]
        assert ours["traceId"] == attempt["traceId"] == backends["traceId"] == TRACE
        assert ours["parentSpanId"] == SPAN
        assert attempt["parentSpanId"] == ours["spanId"]
        assert backends["parentSpanId"] == attempt["spanId"]
        assert seen["traceparent"] == f"00-{TRACE}-{attempt['spanId']}-01"
        assert attempt["attributes"]["upstream_host"] == ours["attributes"]["upstream_host"]
        assert (attempt["name"], attempt["attributes"]["response_code"]) == (ours["name"], 200)
        began, ended = "startTimeUnixNano", "endTimeUnixNano"
        assert int(ours[began]) <= int(attempt[began]) <= int(attempt[ended]) <= int(ours[ended])
        assert (ours["name"], ours["kind"]) == ("db.shop.svc.cluster.local", 2)
        assert (ours["attributes"]["method"], ours["attributes"]["response_code"]) == ("GET", 200)
        assert "status" not in ours


def test_a_trace_begins_at_the_waypoint_only_where_there_is_none(tmp_path: Path) -> None:
    with running(tmp_path, *otlp(1)) as (site, collector, process):
        untraced = f"00-{TRACE}-{SPAN}-00"
        assert get(site, untraced)[1]["traceparent"] == untraced
        # Two of them say nothing.
        assert TRACE not in get(site, untraced, f"00-{TRACE}-{SPAN}-01")[1]["traceparent"]
        begun = get(site)[1]["traceparent"]
        process.terminate()
        assert process.wait(60) == 0
        first, second = (span for span in collector.spans() if span["kind"] == SERVER)
        attempts = [span for span in collector.spans() if span["kind"] == CLIENT]
        assert {span["service"] for span in (first, second, *attempts)} == {"wp.shop"}
        assert [attempt["parentSpanId"] for attempt in attempts] == [first["spanId"], second["spanId"]]
        assert "parentSpanId" not in first
        assert begun == f"00-{second['traceId']}-{attempts[1]['spanId']}-01"


def test_a_waypoint_that_records_nothing_passes_the_trace_on(tmp_path: Path) -> None:
    with running(tmp_path) as (site, collector, process):
        traced = f"00-{TRACE}-{SPAN}-01"
        assert get(site, traced)[1]["traceparent"] == traced
        process.terminate()
        eventually(collector.spans)
        (span,) = collector.spans()
        assert (span["service"], span["traceId"], span["parentSpanId"]) == ("db.shop", TRACE, SPAN)


def test_what_the_waypoint_refuses_or_cannot_reach_is_in_its_span(tmp_path: Path) -> None:
    with running(tmp_path, *otlp(1)) as (site, collector, _):
        assert get(site, method="DELETE")[0] == 403
        eventually(collector.spans)
        (span,) = collector.spans()
        assert (span["service"], span["attributes"]["response_code"]) == ("wp.shop", 403)
        assert span["attributes"]["policy"] == "shop/no-delete[0]"
        assert "status" not in span  # the caller's fault, says OpenTelemetry


def test_a_connection_of_opaque_tcp_is_one_trace_from_end_to_end(tmp_path: Path) -> None:
    with running(tmp_path, *otlp(0), http=False, web=1) as (site, collector, _):
        assert dial(site.forward) == b"hello"
        eventually(lambda: len(collector.spans()) == 3)
        spans = by_service(collector, SERVER, CLIENT)
        web, ours, db = spans["web.shop"], spans["wp.shop"], spans["db.shop"]
        assert web["traceId"] == ours["traceId"] == db["traceId"]
        assert (ours["parentSpanId"], db["parentSpanId"]) == (web["spanId"], ours["spanId"])
