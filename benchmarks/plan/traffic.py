"""Reads `istio_requests_total`: who asks whom how often, as Prometheus exports it or answers a query.

Two forms are read. An *exposition* is what `/metrics` or `/federate` gives (prometheus.io, "Exposition formats"):
counters, whose rate needs the seconds that they have counted. A *query* is the JSON of an instant query (Prometheus,
"HTTP API"), best of rates: `rate(istio_requests_total[1h])`. What has a name in it is a counter, as rate() drops names.

Labels: istio.io/latest/docs/reference/config/metrics.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.plan.topology import Instance, PlanError, Workload

METRIC: Final = "istio_requests_total"
_UNKNOWN: Final = ("", "unknown")
_SAMPLE: Final = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\S+)?(?:\s+#.*)?")
_LABEL: Final = re.compile(r'\s*([a-zA-Z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)')
_ESCAPES: Final = {"\\n": "\n", '\\"': '"', "\\\\": "\\"}
_ACCOUNT: Final = re.compile(r"spiffe://[^/]+/ns/[^/]+/sa/([^/]+)")

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Call:
    """Requests of one workload to another, by way of a service ("NAMESPACE/NAME")."""

    source: Workload
    destination: Workload
    service: str
    per_second: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """All that was asked inside of the mesh."""

    calls: Sequence[Call]
    outside_per_second: float
    """Requests with an end that is no workload of the mesh: left out."""
    instances: Sequence[Instance]
    """Whom the reporters' own labels `pod` and `node` name; a topology says it better."""

    @property
    def per_second(self) -> float:
        return sum(one.per_second for one in self.calls)


def read(text: str, seconds: float | None) -> Traffic:
    """Either form. `seconds`: how long the counters have counted; None: there are rates. Raises PlanError."""
    samples = list(_query(text) if text.lstrip().startswith("{") else _exposition(text))
    if not samples:
        raise PlanError(f"there is no {METRIC} in it: give what Prometheus has of that metric")
    counters = {labels.get("__name__") == METRIC for labels, _ in samples}
    if counters == {True, False}:
        raise PlanError("some samples are counters and some are rates: give one or the other")
    if counters == {True} and seconds is None:
        raise PlanError("these are counters: say with --seconds how long they have counted, or query their rate()")
    if counters == {False} and seconds is not None:
        raise PlanError("these are rates, which need no --seconds")
    return _traffic([(labels, value / (seconds or 1.0)) for labels, value in samples])


def _exposition(text: str) -> Iterator[tuple[Labels, float]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith(METRIC):
            continue
        found = _SAMPLE.fullmatch(line.rstrip())
        if found is None:
            raise PlanError(f"line {number} is no sample: {line[:80]!r}")
        name, labels, value = found.groups()
        if name == METRIC:
            yield {"__name__": METRIC, **_labels(labels or "", number)}, _number(value, f"line {number}")


def _labels(text: str, number: int) -> dict[str, str]:
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        label = _LABEL.match(text, at)
        if label is None:
            raise PlanError(f"line {number} has labels that cannot be read, at {text[at : at + 40]!r}")
        found[label[1]] = re.sub(r'\\[n"\\]', lambda escape: _ESCAPES[escape[0]], label[2])
        at = label.end()
    return found


def _query(text: str) -> Iterator[tuple[Labels, float]]:
    try:
        answer: Any = json.loads(text)
    except ValueError as error:
        raise PlanError(f"it begins as JSON and is none: {error}") from error
    data = answer.get("data")
    if answer.get("status") != "success" or not isinstance(data, dict):
        raise PlanError(f"the query has failed, or this is no answer of Prometheus: {answer.get('error', 'no data')}")
    if data.get("resultType") != "vector":
        raise PlanError(f"the answer is a {data.get('resultType')}: give that of an instant query (/api/v1/query)")
    for number, one in enumerate(data.get("result", ()), 1):
        try:
            labels = {str(name): str(value) for name, value in one["metric"].items()}
            value = one["value"][1]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise PlanError(f"result {number} has no metric or no value") from error
        if labels.get("__name__", METRIC) == METRIC:
            yield labels, _number(value, f"result {number}")


def _number(text: object, where: str) -> float:
    try:
        value = float(str(text))
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise PlanError(f"{where} has the value {text!s}: a number of requests is wanted")
    return value


def _traffic(samples: Sequence[tuple[Labels, float]]) -> Traffic:
    # Both ends' proxies, and a waypoint between them, report one request: of each pair the reporter with most counts.
    reported: dict[tuple[Workload | None, Workload | None, str], dict[str, float]] = defaultdict(
        lambda: defaultdict(float)
    )
    instances: set[Instance] = set()
    for labels, per_second in samples:
        source, destination = _end(labels, "source"), _end(labels, "destination")
        reporter = labels.get("reporter", "")
        reported[source, destination, _service(labels)][reporter] += per_second
        own = {"source": source, "destination": destination}.get(reporter)
        if own is not None and labels.get("pod") and labels.get("node"):
            account = _ACCOUNT.fullmatch(labels.get(f"{reporter}_principal", ""))
            if account is not None:
                instances.add(Instance(own, labels["pod"], account[1], labels["node"]))
    most = {ends: max(by_reporter.values()) for ends, by_reporter in reported.items()}
    calls = [
        Call(source, destination, service, per_second)
        for (source, destination, service), per_second in most.items()
        if source is not None and destination is not None and per_second > 0
    ]
    if not calls:
        raise PlanError("no request has both its ends in the mesh: source_workload and destination_workload name them")
    outside = sum(value for (source, destination, _), value in most.items() if source is None or destination is None)
    return Traffic(calls, outside, sorted(instances))


def _end(labels: Labels, side: str) -> Workload | None:
    namespace, name = labels.get(f"{side}_workload_namespace", ""), labels.get(f"{side}_workload", "")
    return None if namespace in _UNKNOWN or name in _UNKNOWN else Workload(namespace, name)


def _service(labels: Labels) -> str:
    return f"{labels.get('destination_service_namespace', '')}/{labels.get('destination_service_name', '')}"
