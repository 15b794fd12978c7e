"""The load generator: what load can be made, the command that makes it, and what it found.

Written in C (main.c says how it is called), because a generator must not be what is measured: it takes a few
microseconds a request. Whoever measures decides where it runs; here are only its arguments and its report.

Open loop      requests at times that were fixed in advance, whatever becomes of the ones before; each latency counts
               from the time that was intended. This is what users see, at a rate below the knee.
Closed loop    the next request on a connection once the last is answered: capacity, and latency without load.
"""

from __future__ import annotations

import json
import select
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import histogram
from benchmarks.harness.histogram import Histogram
from benchmarks.harness.results import UNSUSTAINED
from benchmarks.harness.statistics import PUNCTUAL

ECHO, SINK, HTTP, SOURCE = range(4)
"""The server's ports, from its first."""
PORTS = 4

BUSIEST = 0.9
"""Share of one core from which on the generator itself is what limits the load."""
LATENESS_SHARE = 0.5
"""Of a round's value: where the generator's own lateness is more than this, that is what the round shows. Less of it is
in the value too; `statistics` gives no ratio that it could have moved out of its interval."""
CARRIED_SHARE = 0.95
"""Of the rate of bulk streams beside requests. Who carries less has less to do, and no p99 to compare."""
BEHIND_SHARE = 0.1
"""Of the counted time: an open loop that ends further behind its schedule was asked for more than the subject carries,
unless the generator itself was busy or late."""

_HERE = Path(__file__).parent
_WARM_UP_SHARE = 0.1
_READY_S = 10.0
_GRACE_S = 45.0
"""After its time the generator waits 10 s for answers, and as long at the start for each of its first ones."""

Protocol = Literal["http1", "http2", "grpc"]

Spawn = Callable[[list[str]], subprocess.Popen[bytes]]
"""Starts a command where it belongs (namespace, cgroup, core), with stdout and stderr in pipes."""


class LoadError(Exception):
    """The load generator could not be built, or found something wrong: a byte changed, nothing was answered."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Mutual TLS by the application itself: its identity's directory, and the SPIFFE id that it wants of the other."""

    identity_dir: Path
    peer: str

    @property
    def argv(self) -> list[str]:
        return ["--tls", str(self.identity_dir), "--tls-peer", self.peer]


@dataclass(frozen=True, slots=True)
class Load:
    """What to ask for. Made by the functions below."""

    kind: str
    options: tuple[tuple[str, str], ...]

    def seeded(self, seed: int) -> Load:
        """The same with other arrivals, where they are drawn; the same seed draws the same ones."""
        return Load(self.kind, tuple((name, str(seed) if name == "seed" else value) for name, value in self.options))

    def over(self, tls: Tls) -> Load:
        """The same in TLS; not of HTTP nor `dials`."""
        return Load(self.kind, (*self.options, ("tls", str(tls.identity_dir)), ("tls-peer", tls.peer)))


def closed(connections: int, size: int) -> Load:
    """Echoes of `size` bytes, one after the other on each connection. Value: us per echo, all connections together."""
    return _load("closed", connections=connections, size=size)


def opened(connections: int, size: int, rate: float, *, poisson: bool = True, seed: int = 1) -> Load:
    """Echoes at `rate` a second, on whichever connection is free. Value: p99 in us."""
    return _load("open", connections=connections, size=size, rate=rate, poisson=int(poisson), seed=seed)


def http_closed(connections: int, path: str, host: str, protocol: Protocol = "http1", body: int = 0) -> Load:
    """Requests, one after the other on each connection; all but a 200 is an error. Value: us per request.

    Here and below: with a `body` it is a POST, or a gRPC call that has to end with the status 0, whose answer is as
    long; without, a GET of HTTP/1.1.
    """
    return _load("http-closed", connections=connections, **_asked(path, host, protocol, body))


def http_open(
    connections: int,
    path: str,
    host: str,
    rate: float,
    protocol: Protocol = "http1",
    body: int = 0,
    *,
    poisson: bool = True,
    seed: int = 1,
) -> Load:
    """Requests at `rate` a second, on whichever connection is free. Value: p99 in us."""
    asked = _asked(path, host, protocol, body)
    return _load("http-open", connections=connections, **asked, rate=rate, poisson=int(poisson), seed=seed)


def http_idle(count: int, path: str, host: str, body: int = 0) -> Load:
    """`idle`, with a request of HTTP/1.1 in the place of the byte."""
    return _load("http-idle", connections=count, **_asked(path, host, "http1", body))


def _asked(path: str, host: str, protocol: Protocol, body: int) -> dict[str, object]:
    return {"path": path, "host": host} | ({"protocol": protocol, "body": body} if body else {})


def connects(in_flight: int) -> Load:
    """New connections: a byte there and back on each, and the next. Value: connections a second."""
    return _load("connects", connections=in_flight)


def dials(spread: int = 1, *, seed: int = 1) -> Load:
    """`connects` one by one, to any of `spread` addresses from the host on. Value: lower quartile of connect(2), us.

    Not the median: about half of the calls take some 10 us more, whatever is dialled, and it lies now on one side of
    the gap and now on the other. Probably the server's waking up falls into them.
    """
    return _load("dials", spread=spread, seed=seed)


def bulk(streams: int) -> Load:
    """Streams to the sink, as fast as they go. Value: Gbit/s; an operation is a MiB."""
    return _load("bulk", streams=streams)


def beside_bulk(
    connections: int, size: int, rate: float, streams: int, gbit_per_s: float, *, poisson: bool = True, seed: int = 1
) -> Load:
    """`opened` beside streams of a process of their own, at a fixed rate together. Value: p99 of the echoes in us."""
    echoes = opened(connections, size, rate, poisson=poisson, seed=seed).options
    return Load("beside-bulk", (*echoes, ("streams", str(streams)), ("bulk-rate", f"{gbit_per_s * 1e9 / 8:.0f}")))


def idle(count: int) -> Load:
    """So many connections, each proven by a byte there and back before and after. Value: how many."""
    return _load("idle", connections=count)


def slow_readers(
    readers: int, connections: int, size: int, rate: float, *, poisson: bool = True, seed: int = 1
) -> Load:
    """`opened` beside connections to the source that never read. Value: p99 of the echoes in us."""
    return _load(
        "slow-readers", connections=connections, size=size, rate=rate, readers=readers, poisson=int(poisson), seed=seed
    )


def _load(kind: str, **options: object) -> Load:
    return Load(kind, tuple((name, str(value)) for name, value in options.items()))


def build(directory: Path, source: Path = _HERE) -> Path:
    """Compile the program into `directory`, with the compiler that the eBPF programs need anyway, or gcc."""
    target = directory / "load"
    sources = sorted(str(path) for path in source.glob("*.c"))
    for compiler in ("clang", "gcc"):
        command = [
            compiler,
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-o",
            str(target),
            *sources,
            "-lm",
            "-lssl",
            "-lcrypto",
        ]
        try:
            subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
        except FileNotFoundError:
            continue
        except subprocess.CalledProcessError as error:
            raise LoadError(f"{compiler} cannot build the load generator:\n{error.stderr}") from error
        return target
    raise LoadError("no C compiler: install clang or gcc")


def serve_argv(
    program: Path, address: str, port: int, *, stall_ms: int = 0, every_ms: int = 0, tls: Tls | None = None
) -> list[str]:
    """The server's command: it prints "ready" once it listens on `port` and the PORTS - 1 after it."""
    stall = ["--stall-ms", str(stall_ms), "--every-ms", str(every_ms)] if stall_ms else []
    return [str(program), "serve", address, str(port), *stall, *(tls.argv if tls else [])]


def argv(program: Path, load: Load, host: str, port: int, seconds: float, *, waits: bool = False) -> list[str]:
    """The generator's command. `host` is an address. `waits`: until it is told to begin, by a byte on its input.

    `port` is the server's first port, from which the ones that the load needs are counted (echo +0, sink +1,
    source +3); for HTTP it is the port to dial, whatever serves it (our own server: `port + HTTP`). The counted part
    takes `seconds`; a warm-up of a tenth comes before.
    """
    options = [part for name, value in load.options for part in (f"--{name}", value)]
    begin = ["--wait", "1"] if waits else []
    return [str(program), load.kind, host, str(port), f"{seconds:g}", *options, *begin]


@dataclass(frozen=True, slots=True)
class Generator:
    """What the generator found out about itself, in the counted part."""

    cpu_share: float
    """Of one core. Streams beside are not in it: they are a process of their own."""
    late_p99_us: float = 0.0
    late_max_us: float = 0.0
    """How late requests were sent although a connection was free: the generator's own fault. Open loops only."""
    waited: int = 0
    """Requests that found no connection free when they were due; the wait is in their latency."""
    behind_s: float = 0.0
    """How long after its time the last request was sent."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run found."""

    kind: str
    operations: float
    """Of the counted part: requests, connections or MiB."""
    seconds: float
    value: float
    """In the load's natural unit: see the functions that make loads."""
    histogram: Histogram
    """Latencies of the counted part; empty for `bulk` and whatever is idle."""
    mean_us: float
    max_us: float
    """Exact, not from the histogram. 0 where nothing was timed, or answered."""
    scheduled: int
    answered: int
    errors: Mapping[str, int]
    """Reason -> how many requests failed for it. With the warm-up: `scheduled` == `answered` + all errors."""
    broken: int
    """Connections that ended while no request was on them."""
    punctual: Histogram
    """Of an open loop: the latencies less what the generator was late with each request. Those of a generator that is
    never late would lie between these and the ones measured."""
    gbit_per_s: float
    """Of the streams, with the loads that have some."""
    asked_gbit_per_s: float
    """What they were to carry; 0: as much as they could."""
    generator: Generator
    start_ns: int
    end_ns: int
    """The counted part, on CLOCK_MONOTONIC (time.monotonic_ns)."""
    rate: float = 0.0
    """What an open loop was to send a second; 0 of others."""

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @property
    def bottleneck(self) -> str:
        """Why its latencies say nothing: the generator decided them, or the subject fell behind (UNSUSTAINED)."""
        own = self.generator
        if own.cpu_share >= BUSIEST:
            return f"the load generator used {own.cpu_share:.0%} of its core: give it a core of its own, or less to do"
        if self.gbit_per_s < CARRIED_SHARE * self.asked_gbit_per_s:
            return (
                f"the streams beside carried {self.gbit_per_s:.2f} of {self.asked_gbit_per_s:g} Gbit/s, which is less "
                "than what the others had beside theirs"
            )
        if self.punctual and self.punctual_us(0.99) < (1 - LATENESS_SHARE) * self.percentile_us(0.99):
            return (
                f"the load generator sent late: of a p99 of {self.percentile_us(0.99):.0f} us, without that it might "
                f"have been {self.punctual_us(0.99):.0f} us; give it a core of its own"
            )
        if own.behind_s >= BEHIND_SHARE * self.seconds:
            return unsustained(self.rate, own.behind_s)
        return ""

    def percentile_us(self, share: float) -> float:
        return histogram.percentile(self.histogram, share) / 1000

    def punctual_us(self, share: float) -> float:
        return histogram.percentile(self.punctual, share) / 1000

    def details(self) -> dict[str, float]:
        """For `results.Round`: percentiles, and what the generator says of itself."""
        own = self.generator
        made = {"generator_cpu_share": own.cpu_share, "failed": float(self.failed), "broken": float(self.broken)}
        if self.histogram:
            shares = {"p50_us": 0.5, "p90_us": 0.9, "p99_us": 0.99, "p999_us": 0.999}
            made |= {name: self.percentile_us(share) for name, share in shares.items()}
            made |= {"mean_us": self.mean_us, "max_us": self.max_us, "per_second": self.operations / self.seconds}
            made |= {"late_p99_us": own.late_p99_us, "late_max_us": own.late_max_us}
        made |= punctual(self.punctual)
        if self.gbit_per_s:
            made["gbit_per_s"] = self.gbit_per_s
        return made


def unsustained(rate: float, behind_s: float) -> str:
    """For a round in which the subject fell behind a generator that was neither busy nor late: it carries less."""
    return (
        f"{UNSUSTAINED} {rate:,.0f} requests/s: the last one was sent {behind_s * 1000:.0f} ms after its time, since "
        "every connection was busy"
    )


def punctual(found: Histogram) -> dict[str, float]:
    """For `results.Round` of an open loop, whose value is its p99: what `statistics` compares each of them with."""
    shares = {"value": 0.99, "p50_us": 0.5, "p99_us": 0.99, "p999_us": 0.999}
    return {f"{PUNCTUAL}{key}": histogram.percentile(found, share) / 1000 for key, share in shares.items() if found}


def parse(stdout: str) -> Outcome:
    """The generator's report: the last line of what it printed. Raises LoadError."""
    lines = stdout.strip().splitlines()
    try:
        found = json.loads(lines[-1])
        return _outcome(found)
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"this is no report of the load generator: {stdout[-200:]!r}") from error


def _outcome(found: Mapping[str, Any]) -> Outcome:
    kind = found["kind"]
    seconds = (found["end_ns"] - found["start_ns"]) / 1e9
    latency = found.get("latency", {"counts": {}, "sum_ns": 0, "max_ns": 0})
    lateness = found.get("lateness", {"counts": {}, "max_ns": 0})
    counts, late = _counts(latency), _counts(lateness)
    on_time = _counts(found.get("punctual", {"counts": {}}))
    timed = histogram.count(counts)
    gbit_per_s = found.get("bytes", 0) * 8 / seconds / 1e9
    operations: float = timed
    if kind == "bulk":
        operations, value = found["bytes"] / 2**20, gbit_per_s
    elif kind in ("idle", "http-idle"):
        operations = value = found["held"]
    elif kind == "connects":
        value = timed / seconds
    elif kind in ("closed", "http-closed"):
        value = seconds * 1e6 / timed
    elif kind == "dials":
        value = histogram.percentile(counts, 0.25) / 1000
    else:
        value = histogram.percentile(counts, 0.99) / 1000
    return Outcome(
        kind=kind,
        operations=operations,
        seconds=seconds,
        value=value,
        histogram=counts,
        mean_us=latency["sum_ns"] / timed / 1000 if timed else 0.0,
        max_us=latency["max_ns"] / 1000,
        scheduled=found.get("scheduled", 0),
        answered=found.get("answered", 0),
        errors=found.get("errors", {}),
        broken=found.get("broken", 0),
        punctual=on_time,
        gbit_per_s=gbit_per_s,
        asked_gbit_per_s=found.get("bulk_rate", 0) * 8 / 1e9,
        generator=Generator(
            cpu_share=found["cpu_ns"] / 1e9 / seconds,
            late_p99_us=histogram.percentile(late, 0.99) / 1000 if late else 0.0,
            late_max_us=lateness["max_ns"] / 1000,
            waited=found.get("waited", 0),
            behind_s=found.get("behind_ns", 0) / 1e9,
        ),
        start_ns=found["start_ns"],
        end_ns=found["end_ns"],
        rate=found.get("rate", 0.0),
    )


def _counts(found: Mapping[str, Any]) -> dict[int, int]:
    return {int(lower): number for lower, number in found["counts"].items()}


@contextmanager
def serving(
    spawn: Spawn,
    program: Path,
    address: str,
    port: int,
    *,
    stall_ms: int = 0,
    every_ms: int = 0,
    tls: Tls | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """The server, while it runs. Raises LoadError when it does not start."""
    with spawn(serve_argv(program, address, port, stall_ms=stall_ms, every_ms=every_ms, tls=tls)) as process:
        try:
            assert process.stdout is not None
            if not select.select([process.stdout], [], [], _READY_S)[0] or process.stdout.readline() != b"ready\n":
                process.kill()
                _, err = process.communicate()
                raise LoadError(f"the server did not start: {err.decode().strip() if err else 'it said nothing'}")
            yield process
        finally:
            process.kill()


def run(spawn: Spawn, program: Path, load: Load, host: str, port: int, seconds: float) -> Outcome:
    """Make a load, wait for its end, and read its report. Raises LoadError with the generator's reason."""
    process = spawn(argv(program, load, host, port, seconds))
    patience_s = seconds * (1 + _WARM_UP_SHARE) + _GRACE_S
    try:
        out, err = process.communicate(timeout=patience_s)
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"{load.kind}: no end within {patience_s:.0f} s") from error
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    if process.returncode:
        raise LoadError(f"{load.kind}: {err.decode().strip() or f'exit status {process.returncode}'}")
    return parse(out.decode())
