"""Results of runs that never were: one like a real run, and any that are possible."""

from __future__ import annotations

import random
from statistics import median

from hypothesis import strategies as st

from benchmarks.harness import predictions
from benchmarks.harness.histogram import histogram_of
from benchmarks.harness.results import Check, Measure, Ratio, Results, Round, Series, Subject, Target

SUBJECTS = [
    Subject("tcp", "plain TCP", "The application and its client, joined by a veth pair. The floor.", ""),
    Subject(
        "uproxy", "uProxy pair", "Two uProxies, HBONE over mTLS, captured by eBPF in workloads of the lab.", "0.1.0"
    ),
    Subject("envoy-hbone", "Envoy pair, HBONE", "Two Envoys, TCP into HTTP/2 CONNECT over mTLS.", "Envoy 1.40.0"),
    Subject("envoy-tls", "Envoy pair, mTLS", "Two Envoys, a TLS connection for each TCP connection.", "Envoy 1.40.0"),
    Subject("haproxy-tls", "HAProxy pair, mTLS", "Two HAProxies, a TLS connection for each.", "HAProxy 2.6.12"),
]
PLACEMENTS = [
    Subject("sidecar", "Envoy sidecars", "An Envoy beside each workload, with L4 and L7.", "Envoy 1.40.0"),
    Subject("node", "an Envoy per node", "One Envoy on each host for all of its workloads.", "Envoy 1.40.0"),
    Subject("service-account", "an Envoy per account", "One Envoy for each service account and host.", "Envoy 1.40.0"),
    Subject("remote", "uProxies, remote waypoint", "uProxies beside workloads, a remote Envoy for L7.", "0.1.0"),
    Subject("remote-l4", "uProxies, L4 only", "uProxies beside workloads; nobody needs L7.", "0.1.0"),
]
# What a run of 22 November found (docs/performance.md), in the order of SUBJECTS; the last two are invented.
ROUND_TRIPS = {1: (20, 113, 115, 84, 78), 16: (13, 52, 51, 40, 37), 64: (14, 55, 55, 42, 36), 500: (15, 53, 73, 60, 44)}
BULK = {1: (43, 3.2, 3.9, 6.1, 6.8), 4: (41, 3.0, 4.1, 6.0, 6.6)}
CONNECTS = (12358, 2894, 2991, 1890, 2210)
TAILS = {500: (110, 390, 400, 330, 300), 2000: (140, 610, 640, 480, 410), 5000: (190, 1400, 1250, 820, 640)}
IDLE = (0.0, 21.5, 44.1, 71.9, 50.2)
ROUNDS = 7


def realistic(*, quick: bool = False, failed: bool = False) -> Results:
    """As a full run of both suites might look; always the same."""
    made = _Maker(random.Random(7))
    for connections, values in ROUND_TRIPS.items():
        label = f"{connections} connection{'' if connections == 1 else 's'}"
        made.add(f"paths/rr/{connections}/64B", "round trip of 64 B", label, "us", values, {"connections": connections})
    made.add("paths/rr/1/16KiB", "round trip of 16 KiB", "1 connection", "us", (27, 172, 181, 140, 133))
    for rate, values in TAILS.items():
        made.add(f"paths/open/{rate}", "latency at a rate, p99", f"{rate:,} requests/s", "us", values, {"rate": rate})
    for streams, values in BULK.items():
        label = f"{streams} stream{'' if streams == 1 else 's'}"
        made.add(
            f"paths/bulk/{streams}", "bulk throughput", label, "Gbit/s", values, {"streams": streams}, better="more"
        )
    made.add("paths/connect", "new connections", "connect, 1 byte, close", "1/s", CONNECTS, better="more")
    made.add("paths/beside-bulk", "small requests beside a bulk stream", "p99", "us", (310, 9200, 14800, 2100, 1900))
    made.add("paths/idle", "memory of idle connections", "1,000 idle connections", "MB", IDLE)
    for rate, values in {200: (610, 540, 590, 655, 240), 1000: (790, 730, 820, 905, 310)}.items():
        made.place(
            f"architectures/latency/{rate}", "latency, p99", f"{rate:,} requests/s", "us", values, {"rate": rate}
        )
    made.place(
        "architectures/cpu", "processor time", "per 1,000 requests", "ms/1000 requests", (220, 160, 180, 195, 60)
    )
    for percent, cpu, p99 in ((0, 90, 400), (50, 150, 700)):
        along = {"l7_percent": percent}
        p99s = tuple(p99 + 20 * place for place in range(5))
        made.place(f"architectures/l7/{percent}", "share of L7", f"{percent} %", "us", p99s, along)
        cpus = tuple(cpu + 9 * place for place in range(5))
        made.place(
            f"architectures/l7-cpu/{percent}", "CPU by share of L7", f"{percent} %", "ms/1000 requests", cpus, along
        )
    made.place("architectures/memory", "memory", "PSS of all proxies", "MB", (410, 96, 188, 214, 152))
    made.place("architectures/identities", "identities in one process", "at most", "identities", (1, 8, 2, 1, 1))
    made.refuse(
        "paths/connect", "haproxy-tls", "the load generator decided 3 of 7 rounds, not the subject: its own core"
    )
    next(one for one in made.series if one.subject == "tcp").remark = "bound by the generator: 97 % of its core"
    results = Results(
        created="2026-11-23T06:10:00+00:00",
        quick=quick,
        seconds=141 if quick else 2710,
        machine={
            "uProxy": "0.1.0, commit 87ec3566a",
            "kernel": "Linux 6.18.5",
            "processor": "Intel Xeon, 2.8 GHz",
            "cores": "2 of 2",
            "memory": "8 GB",
            "Python": "3.11.2",
            "OpenSSL": "3.0.15",
        },
        conditions={
            "pinning": "closed loop: subject, application and generator on core 0; open loop: the generator on core 1",
            "rounds": "7 rounds of 1.5 s after a warm-up",
            "congestion control": "cubic in every namespace",
            "certificates": "P-256, TLS 1.3, AES-128-GCM",
            "architectures: workloads": "12 workloads of 4 services on two hosts",
            "latency at a rate, p99": "Open loop: a fixed schedule; a late request is timed from when it was due.",
        },
        subjects=[*SUBJECTS, *PLACEMENTS],
        measures=made.measures,
        series=made.series,
        ratios=made.ratios,
        targets=made.targets(),
        checks=[
            Check(
                "stall",
                True,
                "A server that sleeps 100 ms each second is seen as such.",
                {"mean_ms": 6.1, "p95_ms": 61},
            ),
            Check(
                "cross-check", not failed, "Our median and wrk's differ by 31 %." if failed else "Within 5 % of wrk."
            ),
        ],
    )
    results.predictions = predictions.judged(results)
    return results


class _Maker:
    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.measures: list[Measure] = []
        self.series: list[Series] = []
        self.ratios: list[Ratio] = []

    def add(self, name, group, label, unit, values, parameters=None, better="less") -> None:
        self.measures.append(Measure(name, "paths", group, label, unit, better, parameters or {}))
        self._fill(name, unit, dict(zip([one.name for one in SUBJECTS], values, strict=True)), "envoy-hbone", better)

    def place(self, name, group, label, unit, values, parameters=None) -> None:
        self.measures.append(Measure(name, "architectures", group, label, unit, "less", parameters or {}))
        self._fill(name, unit, dict(zip([one.name for one in PLACEMENTS], values, strict=True)), "sidecar", "less")

    def refuse(self, measure: str, subject: str, why: str) -> None:
        next(one for one in self.series if (one.measure, one.subject) == (measure, subject)).refused = why
        self.ratios = [one for one in self.ratios if (one.measure, one.subject) != (measure, subject)]

    def targets(self) -> list[Target]:
        return [
            self._target("round trip, 1 connection", "paths/rr/1/64B", "value", 1.0, "less"),
            self._target("round trip, 64 connections", "paths/rr/64/64B", "value", 0.75, "less"),
            self._target("round trip, 500 connections", "paths/rr/500/64B", "value", 0.5, "less"),
            self._target("round trip of 16 KiB", "paths/rr/1/16KiB", "value", 1.1, "less"),
            self._target("bulk throughput, 1 stream", "paths/bulk/1", "value", 0.9, "more"),
            self._target("new connections", "paths/connect", "value", 2.0, "more"),
            self._target("small requests beside a bulk stream, p99", "paths/beside-bulk", "value", 0.3, "less"),
            Target("waypoint, CPU per request", "waypoint/cpu", "waypoint", "envoy", "value", 0.5, "less"),
        ]

    def _target(self, text, measure, key, bound, better) -> Target:
        ratio = next(one for one in self.ratios if (one.measure, one.subject, one.key) == (measure, "uproxy", key))
        return Target(text, measure, "uproxy", "envoy-hbone", key, bound, better, ratio)

    def _fill(self, name, unit, values, baseline, better) -> None:
        shared = [self._chance.lognormvariate(0, 0.12) for _ in range(ROUNDS)]
        made = {}
        for subject, value in values.items():
            rounds = [self._round(number, value * share, unit, better) for number, share in enumerate(shared)]
            made[subject] = rounds
            self.series.append(Series(name, subject, rounds))
        for subject, rounds in made.items():
            if subject == baseline:
                continue
            for key in ("value", "cpu_us"):
                pairs = [(_get(one, key), _get(other, key)) for one, other in zip(rounds, made[baseline], strict=True)]
                shares = sorted(one / other for one, other in pairs if one is not None and other)
                if shares:
                    middle = median(shares)
                    self.ratios.append(Ratio(name, subject, baseline, key, middle, shares[0], shares[-1], len(shares)))

    def _round(self, number, value, unit, better) -> Round:
        value = 1.0 if unit == "identities" and value < 1.5 else value * self._chance.lognormvariate(0, 0.05)
        if unit != "us":
            details = {} if unit in ("MB", "identities") else {"cpu_us": 900_000 / value if better == "more" else value}
            details |= {f"{key}/client proxy": half / 2 for key, half in details.items()} | {"taken_s": 1.5}
            return Round(number, value, details)
        times = [
            value * 1000 * self._chance.lognormvariate(0, 0.3) * (4 if self._chance.random() < 0.01 else 1)
            for _ in range(800)
        ]
        histogram = histogram_of(map(int, times))
        details = {
            "p50_us": value * 0.96,
            "p99_us": value * 2.1,
            "cpu_us": value * self._chance.uniform(0.8, 0.95),
            "softirq_us": value * 0.1,
        }
        return Round(number, value, details | {"max_us": value * 9}, histogram)


def _get(one: Round, key: str) -> float | None:
    return one.value if key == "value" else one.details.get(key)


NAMES = st.one_of(st.sampled_from(["a", "uproxy", "remote", "<b>&\"'", "a\nb", "\u202e", ""]), st.text(max_size=12))
VALUES = st.one_of(st.sampled_from([0.0, 1.0, 5e-324]), st.floats(-1e12, 1e12, allow_nan=False))
DETAILS = st.dictionaries(
    st.one_of(st.sampled_from(["p50_us", "p99_us", "cpu_us", "pss_mb", "x", "_us", ""]), NAMES), VALUES
)
HISTOGRAMS = st.dictionaries(st.integers(0, 10**12), st.integers(0, 10**6), max_size=8)
BETTER = st.sampled_from(["less", "more"])
FIELDS = st.dictionaries(st.one_of(st.sampled_from(["commit", "kernel", "processor", "cores", "paths"]), NAMES), NAMES)


@st.composite
def runs(draw: st.DrawFn) -> Results:
    """Any results: nothing measured, one round, nothing compared, hostile names, values of any size and sign."""
    subjects = draw(
        st.lists(st.builds(Subject, NAMES, NAMES, NAMES, NAMES), max_size=4, unique_by=lambda one: one.name)
    )
    parameters = st.dictionaries(st.sampled_from(["bytes", "rate", "x"]), VALUES, max_size=2)
    measure = st.builds(Measure, NAMES, st.sampled_from(["paths", "b", ""]), NAMES, NAMES, NAMES, BETTER, parameters)
    measures = draw(st.lists(measure, max_size=4, unique_by=lambda one: one.name))
    pairs = [(measure.name, subject.name) for measure in measures for subject in subjects]
    tried = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    rounds = st.lists(st.builds(Round, st.integers(0, 9), VALUES, DETAILS, HISTOGRAMS, NAMES), max_size=3)
    series = [Series(*pair, draw(rounds), draw(st.sampled_from(["", "", "too <late>"]), draw(NAMES))) for pair in tried]
    ratios = []
    for name, subject in tried:
        if draw(st.booleans()):
            low, middle, high = sorted(draw(st.tuples(VALUES, VALUES, VALUES)))
            key = draw(st.sampled_from(["value", "cpu_us", "x"]))
            ratios.append(Ratio(name, subject, draw(NAMES), key, middle, low, high, draw(st.integers(0, 9))))
    found = st.one_of(st.none(), st.sampled_from(ratios)) if ratios else st.none()
    target = st.builds(Target, NAMES, NAMES, NAMES, NAMES, NAMES, VALUES, BETTER, found)
    return Results(
        created=draw(st.one_of(st.just("2026-11-23T06:10:00Z"), NAMES)),
        quick=draw(st.booleans()),
        seconds=draw(st.floats(0, 1e6)),
        machine=draw(FIELDS),
        conditions=draw(FIELDS),
        subjects=subjects,
        measures=measures,
        series=series,
        ratios=ratios,
        targets=draw(st.lists(target, max_size=3)),
        checks=draw(st.lists(st.builds(Check, NAMES, st.booleans(), NAMES, DETAILS), max_size=3)),
    )
