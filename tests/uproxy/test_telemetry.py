"""Metrics: Istio's names, labels and meaning; what a scrape says while connections live; a table that stays bounded."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from control.api.address import parse_address
from control.api.identity import SpiffeId
from control.api.workload import Workload
from tests.support.examples import examples
from uproxy import telemetry
from uproxy.access_log import AccessLog, Style
from uproxy.errors import Flag
from uproxy.telemetry import CLOSED, FAILED, OPENED, RECEIVED, SENT, Connection, Peer, Telemetry

ISTIO_LABELS = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
]


def workload(name: str, namespace: str = "shop", **labels: str) -> Workload:
    identity = SpiffeId.parse(f"spiffe://cluster.local/ns/{namespace}/sa/{name}")
    address = parse_address("10.0.0.9")
    return Workload(namespace, f"{name}-1", name, identity, (address,), labels, {}, "", 1)


WEB = workload("web", app="web", version="v3")
DB = workload("db", namespace="data")


def peer(of: Workload) -> Peer:
    return Peer("10.0.0.9:1", of, str(of.identity))


def connection(direction="outbound", source=WEB, destination=DB, **changes) -> Connection:
    fields = {"source": peer(source), "destination": peer(destination), "destination_service": "data/db"}
    return Connection(direction, **({"started": 1.0} | fields | changes))


def parse(rendered: bytes) -> tuple[dict[str, dict], dict[str, str]]:
    """Samples by name and labels, and types, from Prometheus' text format 0.0.4, strictly."""
    samples: dict[str, dict] = {}
    types: dict[str, str] = {}
    text = rendered.decode()
    assert text.endswith("\n")
    helped = None
    for line in text[:-1].split("\n"):
        if match := re.fullmatch(r"# HELP ([a-z_]+) [^\n]+", line):
            helped = match[1]
        elif match := re.fullmatch(r"# TYPE ([a-z_]+) (counter|gauge)", line):
            assert match[1] == helped
            assert match[1] not in types
            types[match[1]] = match[2]
        else:
            match = re.fullmatch(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+)\})? (\S+)', line)
            assert match, line
            assert match[1] == helped
            labels = tuple(
                (name, re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), value))
                for name, value in re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', match[2] or "")
            )
            assert labels not in samples.setdefault(match[1], {})
            samples[match[1]][labels] = float(match[3])
    return samples, types


def values(of: Telemetry, name: str) -> list[float]:
    return list(parse(of.render())[0].get(name, {}).values())


def labels(of: Telemetry, name: str) -> list[dict[str, str]]:
    return [dict(key) for key in parse(of.render())[0].get(name, {})]


def test_labels_are_istios_in_istios_order():
    metrics = Telemetry("1.2.3")
    metrics.opened(connection())
    (key,) = parse(metrics.render())[0][OPENED]
    assert [name for name, _ in key] == ISTIO_LABELS
    assert dict(key) == {
        "reporter": "source",
        "source_workload": "web-1",
        "source_canonical_service": "web",
        "source_canonical_revision": "v3",
        "source_workload_namespace": "shop",
        "source_principal": "spiffe://cluster.local/ns/shop/sa/web",
        "source_app": "web",
        "source_version": "v3",
        "source_cluster": "unknown",
        "destination_service": "db.data.svc.cluster.local",
        "destination_service_namespace": "data",
        "destination_service_name": "db",
        "destination_workload": "db-1",
        "destination_canonical_service": "db-1",
        "destination_canonical_revision": "latest",
        "destination_workload_namespace": "data",
        "destination_principal": "spiffe://cluster.local/ns/data/sa/db",
        "destination_app": "unknown",
        "destination_version": "unknown",
        "destination_cluster": "unknown",
        "request_protocol": "tcp",
        "response_flags": "-",
        "connection_security_policy": "mutual_tls",
    }


def test_build_and_types():
    metrics = Telemetry("1.2.3")
    samples, types = parse(metrics.render())
    assert samples["istio_build"] == {(("component", "uproxy"), ("tag", "1.2.3")): 1}
    assert {types[name] for name in (OPENED, CLOSED, FAILED, RECEIVED, SENT)} == {"counter"}


@pytest.mark.parametrize(
    ("direction", "reporter", "received", "sent"),
    [("outbound", "source", 100, 7), ("inbound", "destination", 7, 100)],
)
def test_received_is_from_the_caller_at_both_ends(direction, reporter, received, sent):
    """Istio counts received and sent from the server's side, whoever reports (istio/istio#32399)."""
    metrics = Telemetry("1")
    seen = connection(direction, bytes_sent=100, bytes_received=7)
    metrics.opened(seen)
    metrics.closed(seen, 2.0)
    assert labels(metrics, OPENED)[0]["reporter"] == reporter
    assert (values(metrics, RECEIVED), values(metrics, SENT)) == ([received], [sent])


def test_mutual_tls_means_that_the_peer_proved_itself():
    for direction, source, destination, wanted in [
        ("outbound", peer(WEB), Peer("x", DB), "unknown"),
        ("outbound", peer(WEB), peer(DB), "mutual_tls"),
        ("inbound", Peer("x", WEB), peer(DB), "unknown"),
        ("inbound", peer(WEB), peer(DB), "mutual_tls"),
    ]:
        metrics = Telemetry("1")
        metrics.opened(Connection(direction, source, destination, 1.0))
        assert labels(metrics, OPENED)[0]["connection_security_policy"] == wanted


class Relay:
    def __init__(self) -> None:
        self.sent = self.received = 0


def test_bytes_of_a_living_connection_are_seen_and_not_counted_twice():
    metrics = Telemetry("1")
    relay = Relay()
    seen = connection(meter=relay)
    metrics.opened(seen)
    assert values(metrics, RECEIVED) == [0]
    for total in (10, 10, 30):
        relay.sent = total
        assert values(metrics, RECEIVED) == [total]
    assert values(metrics, "uproxy_live_connections") == [1]
    relay.sent = 40
    metrics.closed(seen, 2.0)
    relay.sent = 1000
    assert values(metrics, RECEIVED) == [40]
    assert seen.bytes_sent == 40
    assert values(metrics, "uproxy_live_connections") == [0]


def test_a_refusal_is_a_failure_with_its_flag_and_nothing_else():
    metrics = Telemetry("1")
    metrics.closed(connection("inbound", flag=Flag.DENY), 1.5)
    assert values(metrics, FAILED) == [1]
    assert labels(metrics, FAILED)[0]["response_flags"] == "DENY"
    for name in (OPENED, CLOSED, RECEIVED, SENT):
        assert values(metrics, name) == []


def test_a_connection_that_breaks_is_closed_with_its_flag_and_its_bytes_stay():
    metrics = Telemetry("1")
    broken = connection(bytes_sent=5)
    metrics.opened(broken)
    broken.flag = Flag.RESET
    metrics.closed(broken, 2.0)
    closed = {
        entry["response_flags"]: value
        for entry, value in zip(labels(metrics, CLOSED), values(metrics, CLOSED), strict=True)
    }
    assert closed == {"-": 0, "RESET": 1}
    assert values(metrics, OPENED) == [1]
    assert values(metrics, RECEIVED) == [5]
    assert values(metrics, FAILED) == []


def test_a_workload_that_changed_gets_new_labels():
    metrics = Telemetry("1")
    metrics.opened(connection(source=workload("web", version="v1")))
    metrics.opened(connection(source=workload("web", version="v1")))  # another object, the same content
    metrics.opened(connection(source=workload("web", version="v2")))
    assert [entry["source_version"] for entry in labels(metrics, OPENED)] == ["v1", "v2"]
    assert values(metrics, OPENED) == [2, 1]


def test_a_workload_in_the_memory_of_a_forgotten_one_is_not_taken_for_it():
    metrics = Telemetry("1")
    for i in range(50):
        metrics.closed(connection(source=workload("web", version=f"v{i}")), 1.0)  # refused, and nothing keeps it
    assert [entry["source_version"] for entry in labels(metrics, FAILED)] == [f"v{i}" for i in range(50)]


def test_labels_are_made_once_per_kind_of_connection(monkeypatch):
    made = []
    make = telemetry._labels
    monkeypatch.setattr(telemetry, "_labels", lambda *args: made.append(1) or make(*args))
    metrics = Telemetry("1")
    for _ in range(100):
        seen = connection()
        metrics.opened(seen)
        metrics.closed(seen, 2.0)
    assert len(made) == 1


def many(count: int, **changes):
    return [connection("inbound", source=workload(f"w{i}"), **changes) for i in range(count)]


def test_label_sets_are_bounded(monkeypatch):
    monkeypatch.setattr(telemetry, "MAX_SERIES", 10)
    metrics = Telemetry("1")
    for seen in many(25, bytes_received=1):
        metrics.opened(seen)
        metrics.closed(seen, 2.0)
    assert len(labels(metrics, OPENED)) == 11
    overflow = labels(metrics, OPENED)[-1]
    assert overflow["reporter"] == "destination"
    assert {overflow[name] for name in ISTIO_LABELS[1:20]} == {"unknown"}
    assert sum(values(metrics, OPENED)) == sum(values(metrics, CLOSED)) == sum(values(metrics, RECEIVED)) == 25
    assert values(metrics, "uproxy_telemetry_overflow_total") == [15]
    assert len(metrics._known) <= 20


def test_idle_label_sets_give_up_their_place_and_living_ones_never(monkeypatch):
    monkeypatch.setattr(telemetry, "MAX_SERIES", 10)
    metrics = Telemetry("1")
    old = many(10)
    for seen in old:
        metrics.opened(seen)
    for seen in old[3:]:
        metrics.closed(seen, 2.0)
    late = connection("inbound", source=workload("late"), started=2.0 + telemetry.IDLE_S)
    metrics.opened(late)
    assert [entry["source_canonical_service"] for entry in labels(metrics, OPENED)] == [
        "w0-1",
        "w1-1",
        "w2-1",
        "late-1",
    ]
    assert values(metrics, "uproxy_telemetry_overflow_total") == [0]
    for seen in (*old[:3], late):
        metrics.closed(seen, 1000.0)
    assert values(metrics, CLOSED) == [1, 1, 1, 1]
    metrics.opened(old[5])  # forgotten, so it begins anew
    assert values(metrics, OPENED) == [1, 1, 1, 1, 1]


def test_the_look_up_table_is_bounded_when_workloads_are_replaced(monkeypatch):
    monkeypatch.setattr(telemetry, "MAX_SERIES", 10)
    metrics = Telemetry("1")
    for _ in range(1000):
        metrics.opened(connection(source=workload("web")))
    assert values(metrics, OPENED) == [1000]
    assert len(metrics._known) <= 20


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_no_label_value_can_break_a_line(name, identity, service):
    metrics = Telemetry("1")
    hurt = Peer("a", workload("web", app=name), identity)
    metrics.opened(Connection("outbound", hurt, Peer("b"), 1.0, destination_service=f"ns/{service}"))
    (found,) = labels(metrics, OPENED)
    assert found["source_app"] == (name or "unknown")
    assert found["source_principal"] == (identity or "unknown")
    assert found["destination_service_name"] == (service or "unknown")


class TestRegistered:
    def test_gauges_and_counters_are_read_at_each_scrape(self):
        metrics = Telemetry("1")
        value = 1
        metrics.gauge("uproxy_config_age_seconds", "Age", lambda: value / 4)
        metrics.counter("uproxy_things_total", "Things", lambda: value * 12_345_678)
        value = 3
        samples, types = parse(metrics.render())
        assert samples["uproxy_config_age_seconds"] == {(): 0.75}
        assert samples["uproxy_things_total"] == {(): 37_037_034}
        assert types["uproxy_config_age_seconds"] == "gauge"
        assert types["uproxy_things_total"] == "counter"

    def test_one_that_fails_does_not_cost_the_scrape(self, caplog):
        metrics = Telemetry("1")
        metrics.gauge("uproxy_broken", "Broken", lambda: 1 // 0)
        metrics.gauge("uproxy_whole", "Whole", lambda: 2)
        samples, _ = parse(metrics.render())
        assert str(samples["uproxy_broken"][()]) == "nan"
        assert samples["uproxy_whole"][()] == 2
        assert "uproxy_broken" in caplog.text

    @pytest.mark.parametrize("name", ["other_name", "uproxy_", "uproxy_Loud", "uproxy_a b", "uproxy_live_connections"])
    def test_names_are_checked(self, name):
        with pytest.raises(ValueError, match=re.escape(name)):
            Telemetry("1").gauge(name, "Help", lambda: 0)

    def test_a_counter_is_called_total(self):
        with pytest.raises(ValueError, match="_total"):
            Telemetry("1").counter("uproxy_things", "Help", lambda: 0)


def test_closing_writes_the_log_and_losses_are_a_metric(tmp_path):
    log = AccessLog(str(tmp_path / "log"), Style.JSON)
    metrics = Telemetry("1", log)
    seen = connection()
    metrics.opened(seen)
    metrics.closed(seen, 2.0)
    metrics.closed(connection(flag=Flag.CONNECT, error="no route"), 2.0)
    log.dropped = 7
    log.flush()
    assert (tmp_path / "log").read_text().count("\n") == 2
    assert values(metrics, "uproxy_access_log_dropped_total") == [7]
    log.close()


class Lives(RuleBasedStateMachine):
    """Connections open, carry bytes, close and are refused in any order, over a small table; a model keeps the sums."""

    connections = Bundle("connections")

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(telemetry, "MAX_SERIES", 4)
        self.metrics = Telemetry("1")
        self.now = 0.0
        self.workloads = [workload(f"w{i}") for i in range(6)]
        self.sums = dict.fromkeys((OPENED, CLOSED, FAILED, RECEIVED, SENT), 0)

    def teardown(self) -> None:
        self.patch.undo()

    def make(self, direction, number, meter=None) -> Connection:
        self.now += 1
        return connection(direction, source=self.workloads[number], started=self.now, meter=meter)

    @rule(target=connections, direction=st.sampled_from(["inbound", "outbound"]), number=st.integers(0, 5))
    def open(self, direction, number):
        new = self.make(direction, number, Relay())
        self.metrics.opened(new)
        self.sums[OPENED] += 1
        return new

    @rule(which=connections, sent=st.integers(0, 9), received=st.integers(0, 9))
    def carry(self, which, sent, received):
        which.meter.sent += sent
        which.meter.received += received
        outbound = which.direction == "outbound"
        self.sums[RECEIVED] += sent if outbound else received
        self.sums[SENT] += received if outbound else sent

    @rule(which=consumes(connections), flag=st.sampled_from(Flag))
    def close(self, which, flag):
        which.flag = flag
        self.metrics.closed(which, self.now)
        self.sums[CLOSED] += 1

    @rule(direction=st.sampled_from(["inbound", "outbound"]), number=st.integers(0, 5), flag=st.sampled_from(Flag))
    def refuse(self, direction, number, flag):
        refused = self.make(direction, number)
        refused.flag = flag
        self.metrics.closed(refused, self.now)
        self.sums[FAILED] += 1

    @invariant()
    def sums_agree(self):
        samples, _ = parse(self.metrics.render())
        assert {name: sum(samples.get(name, {}).values()) for name in self.sums} == self.sums
        overflow_sets = 2 * len(Flag)
        assert len(self.metrics._series) <= 4 + overflow_sets


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=examples(30), stateful_step_count=30)
