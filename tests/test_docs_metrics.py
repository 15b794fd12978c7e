"""docs/metrics.md and docs/access-log.md name what the code has, and nothing else."""

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

from control.server.metrics import Durations, Values, render
from uproxy.access_log import AccessLog, Style
from uproxy.errors import Flag
from uproxy.node import metrics as node_metrics
from uproxy.telemetry import Connection, Native, Peer, Telemetry
from waypoint import telemetry as waypoint_telemetry
from waypoint.telemetry import Exchange, WaypointTelemetry

ROOT = Path(__file__).parent.parent
METRICS = (ROOT / "docs" / "metrics.md").read_text()
ACCESS_LOG = (ROOT / "docs" / "access-log.md").read_text()


def table(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without code marks; the head of the table is left out."""
    below = text.split(f"{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE).group().splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def full_connection() -> Connection:
    workload = SimpleNamespace(
        namespace="n", name="w", canonical_service="w", canonical_revision="1", app="w", version="1"
    )
    peer = Peer("10.0.0.1:1", workload, "spiffe://td/ns/n/sa/w")
    return Connection(
        "outbound",
        peer,
        peer,
        started=0.0,
        destination_service="n/s",
        hbone_address="a:1",
        request_id="ab",
        flag=Flag.DENY,
        error="policy: no",
        audit="shop/seen[0]",
        dry_run="denied: denied by shop/web[0]",
        policy="n/p[0]",
        caller="spiffe://td/ns/n/sa/c",
        native=Native(1, 2),
    )


def registered() -> dict[str, str]:
    """Name -> type of every metric that some module registers, read from the source."""
    found = {}
    for path in (ROOT / "uproxy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("gauge", "counter"):
                name = node.args[0]
                assert isinstance(name, ast.Constant), f"{path}:{node.lineno}: write the metric's name out"
                found[name.value] = called
    return found


def rendered() -> str:
    telemetry = Telemetry("1")
    telemetry.opened(full_connection())
    return telemetry.render().decode()


def test_every_metric_is_documented_and_every_documented_one_exists():
    code = dict(re.findall(r"^# TYPE (istio_\S+) (\S+)$", rendered(), re.MULTILINE)) | registered()
    rows = table(METRICS, "## Connections") + table(METRICS, "## The proxy itself")
    assert {name: kind for name, kind, _ in rows} == code
    assert len(rows) == len(code)


def test_the_control_planes_metrics_are_documented():
    values = Values({}, Durations(), 0, 0, {}, False, False, 0, 0, 0, 0, {}, {}, 0)
    code = dict(re.findall(r"^# TYPE (\S+) (\S+)$", render(values).decode(), re.MULTILINE))
    rows = table(METRICS, "## The control plane")
    assert {name: kind for name, kind, _ in rows} == code
    assert len(rows) == len(code)


def test_labels_are_documented_in_order():
    line = re.search(r"^istio_tcp_connections_opened_total\{(.*)\} 1$", rendered(), re.MULTILINE).group(1)
    assert [label for label, _ in table(METRICS, "### Labels")] == re.findall(r'(\w+)="', line)


def test_flags_are_documented():
    assert [flag for flag, _, _ in table(METRICS, "### Response flags")] == [flag.value for flag in Flag]


def test_access_log_fields_are_documented_in_order(tmp_path):
    log = AccessLog(str(tmp_path / "log"), Style.JSON)
    log.record(full_connection(), 1.0)
    log.close()
    fields = list(json.loads((tmp_path / "log").read_text()))
    head, rest = fields[:4], fields[4:]
    documented = [name for name, _ in table(ACCESS_LOG, "left out.")]
    assert sorted(documented[:4]) == sorted(head)
    assert documented[4:] == rest


def full_exchange() -> Exchange:
    peer = full_connection().source
    exchange = Exchange(peer, peer, started=0.0, request_id="ab", status=403, grpc=True, grpc_status="7")
    for name in ("destination_service", "backend_service"):
        setattr(exchange, name, "n/s")
    for name in (
        "method",
        "path",
        "authority",
        "user_agent",
        "route",
        "hbone_address",
        "details",
        "policy",
        "audit",
        "dry_run",
    ):
        setattr(exchange, name, "x")
    exchange.upstream_s, exchange.dialled, exchange.forwarded_for = 0.1, "a:1", "b, c"
    return exchange


def test_what_a_waypoint_counts_and_logs_is_documented(tmp_path):
    log = AccessLog(str(tmp_path / "log"), Style.JSON)
    telemetry = WaypointTelemetry("1", log)
    telemetry.answered(full_exchange(), 1.0)
    log.close()
    fields = list(json.loads((tmp_path / "log").read_text()))
    assert [name for name, _ in table(ACCESS_LOG, "What is not known is left out.")] == fields[4:]
    ours = dict(
        re.findall(r"^# TYPE (istio_(?:request|response)\S+) (\S+)$", telemetry.render().decode(), re.MULTILINE)
    )
    assert {name: kind for name, kind, _ in table(METRICS, "each HTTP request:")} == ours
    flags = {
        value
        for name, value in vars(waypoint_telemetry).items()
        if name.isupper() and isinstance(value, str) and len(value) <= 4
    }
    assert {flag for flag, _ in table(METRICS, "`response_flags` has Envoy's values:")} == flags
    labels = re.findall(
        r'(\w+)="', re.search(r"^istio_requests_total\{(.*)\} 1$", telemetry.render().decode(), re.M)[1]
    )
    documented = [label for label, _ in table(METRICS, "### Labels")]
    index = documented.index("request_protocol") + 1
    documented[index:index] = ["response_code", "grpc_response_status"]
    assert labels == documented


def test_the_histogram_is_istios():
    telemetry = WaypointTelemetry("1")
    for took_s in (0.0004, 0.001, 0.3, 7200.0):
        exchange = full_exchange()
        exchange.started = 100.0 - took_s
        telemetry.answered(exchange, 100.0)
    lines = telemetry.render().decode().splitlines()
    counts = {
        m[1]: int(m[2]) for line in lines if (m := re.search(r'milliseconds_bucket\{.*le="(\S+)"\} (\d+)$', line))
    }
    assert (counts["0.5"], counts["250"], counts["500"], counts["3600000"], counts["+Inf"]) == (1, 2, 3, 3, 4)
    assert any(line.endswith("} 4") and line.startswith("istio_request_duration_milliseconds_count{") for line in lines)


def test_the_node_agents_metrics_are_documented():
    values = node_metrics.Values(0, False, 0, 0, {}, {})
    code = dict(re.findall(r"^# TYPE (\S+) (\S+)$", node_metrics.render(values).decode(), re.MULTILINE))
    rows = table(METRICS, "## The node agent")
    assert {name: kind for name, kind, _ in rows} == code
