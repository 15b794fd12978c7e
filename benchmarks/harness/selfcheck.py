"""Tests of the instrument, made in the run that they vouch for: does the load generator see what is there?

Stalls        A server that sleeps 100 ms each second delays the requests that are due meanwhile. A generator that waits
              with them, or counts from when it really sent, sees next to nothing of it ("coordinated omission").
Packaged ones The same load on the same nginx has to look the same to wrk and to h2load.

Both in network namespaces of their own: root. nginx, wrk and h2load are Debian packages.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import load
from benchmarks.harness.results import Check
from benchmarks.harness.rounds import in_turn
from benchmarks.load import Load, LoadError, Outcome
from benchmarks.netns import Namespace, stop

_LOOPBACK = "127.0.0.1"
_PORT = 8000

STALL_MS = 100
EVERY_MS = 1000
STALLS = 2
RATE = 1000
"""A second. Most requests of a stall find all connections busy: their wait for one must be counted too."""

TOLERANCE = 0.05
"""How far our generator may be from a packaged one."""

_CONNECTIONS = 8
_CLOSED, _OPEN = "/closed", "/open"
_OPEN_RATE = 40

# What else the machine does should not look like a fault of the instrument.
_FAVOURED = ("nice", "-n", "-20")
_REAL_TIME = ("chrt", "--fifo", "1")

_START_S = 10.0
_PATIENCE_S = 30.0

_NGINX = """\
daemon off;
master_process off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    limit_req_zone $server_name zone=closed:1m rate=1000r/s;
    limit_req_zone $server_name zone=open:1m rate=100r/s;
    server {{
        listen {address}:{port};
        server_name nginx;
        location = /closed {{ limit_req zone=closed burst=100; alias {directory}/answer; }}
        location = /open {{ limit_req zone=open burst=100; proxy_pass http://{address}:{port}/second; }}
        location = /second {{ limit_req zone=open burst=100; alias {directory}/answer; }}
    }}
}}
"""


def _at_once() -> Sequence[str]:
    """What runs a program whenever it can run, where that may be had."""
    allowed = subprocess.run([*_REAL_TIME, "true"], check=False, capture_output=True, timeout=10).returncode == 0
    return _REAL_TIME if allowed else _FAVOURED


def _cores() -> tuple[int, int]:
    """For the server, and for whoever loads it."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[-1]


def _spawner(namespace: Namespace, core: int, first: Sequence[str] = _FAVOURED) -> load.Spawn:
    def spawn(argv: list[str]) -> subprocess.Popen[bytes]:
        return namespace.start([*first, *argv], core=core, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return spawn


@contextmanager
def _namespace() -> Iterator[Namespace]:
    made = Namespace()
    try:
        yield made
    finally:
        made.close()


# ---- stalls


def stalls(directory: Path, program: Path | None = None) -> Check:
    """A server that stalls shows in the mean and in p95. Takes 6 s. Raises LoadError.

    `program` is a load generator that is built already.
    """
    program = program or load.build(directory)
    server, client = _cores()
    first = _at_once()
    seconds = STALLS * EVERY_MS / 1000
    with (
        _namespace() as namespace,
        load.serving(
            _spawner(namespace, server, first), program, _LOOPBACK, _PORT, stall_ms=STALL_MS, every_ms=EVERY_MS
        ),
    ):
        at_times = load.opened(_CONNECTIONS, 64, RATE, poisson=False)
        seen = load.run(_spawner(namespace, client, first), program, at_times, _LOOPBACK, _PORT, seconds)
        # Not at once: it never rests, and others want the core.
        waiting = load.run(_spawner(namespace, client), program, load.closed(1, 64), _LOOPBACK, _PORT, seconds / 2)
    return judge_stalls(seen, waiting)


def judge_stalls(seen: Outcome, waiting: Outcome) -> Check:
    """What must show: of all requests a tenth is delayed, by anything up to the whole stall.

    So a twentieth is delayed by more than half of it, a hundredth by more than nine tenths, and the mean is what a
    tenth of all with half a stall each makes: 50 ms, 90 ms and 5 ms, and a little for the work itself.
    `waiting` is the closed loop beside, which has the whole stall once a second, in place of a hundred times.
    """
    mean_ms, p95_ms, p99_ms = seen.mean_us / 1000, seen.percentile_us(0.95) / 1000, seen.percentile_us(0.99) / 1000
    share = STALL_MS / EVERY_MS
    expected = {
        "mean": (mean_ms, share * STALL_MS / 2),
        "p95": (p95_ms, STALL_MS * (1 - 0.05 / share)),
        "p99": (p99_ms, STALL_MS * (1 - 0.01 / share)),
    }
    # Upwards by half: machines have stalls of their own, and what is wrong with generators makes it less.
    wrong = [name for name, (found, right) in expected.items() if not 0.9 * right <= found <= 1.5 * right]
    waiting_p95_ms = waiting.percentile_us(0.95) / 1000
    shown = ", ".join(f"{name} {found:.1f} ms (about {right:.0f})" for name, (found, right) in expected.items())
    text = (
        f"a server that sleeps {STALL_MS} ms in {EVERY_MS} shows as {shown}; "
        f"a closed loop, which waits with it, has p95 {waiting_p95_ms:.2f} ms"
    )
    if wrong:
        text = f"{' and '.join(wrong)} out of bounds: {text}"
    if seen.bottleneck:
        text = f"{seen.bottleneck}: {text}"
    details = {"mean_ms": mean_ms, "p95_ms": p95_ms, "p99_ms": p99_ms, "closed_p95_ms": waiting_p95_ms}
    details |= {"late_p99_us": seen.generator.late_p99_us}
    return Check("a stall shows", not wrong and not seen.bottleneck, text, details)


# ---- packaged ones


@dataclass(frozen=True, slots=True)
class Seen:
    """What a generator says of one round."""

    per_second: float
    mean_us: float


Take = Callable[[int], Seen]
_OURS = "ours"


def against_packaged(directory: Path, *, rounds: int = 2) -> list[Check]:
    """Ours, wrk and h2load by turns, on an nginx that answers by the clock. Takes 5 s a round. Raises LoadError.

    How fast a shared machine is at the moment would say more than the generators do, so nginx admits requests at a
    rate (limit_req). Closed loop: 1,000 a second, so that each of 8 connections waits 8 ms. Open loop, which wrk has
    not: a request is admitted twice, the second time 10 ms after the first, and long before the next one is due.
    """
    program = load.build(directory)
    server, client = _cores()
    with _namespace() as namespace, _nginx(namespace, server, directory):
        spawn = _spawner(namespace, client)
        closely = load.http_closed(_CONNECTIONS, _CLOSED, "nginx")
        seldom = load.http_open(1, _OPEN, "nginx", _OPEN_RATE, poisson=False)
        closed: dict[str, Take] = {
            _OURS: lambda s: _ours(spawn, program, closely, s),
            "wrk": lambda s: _wrk(spawn, _CLOSED, s),
            "h2load": lambda s: _h2load(spawn, [f"-c{_CONNECTIONS}"], _CLOSED, s, directory),
        }
        opened: dict[str, Take] = {
            _OURS: lambda s: _ours(spawn, program, seldom, s),
            "h2load": lambda s: _h2load(spawn, ["-c1", f"--rps={_OPEN_RATE}"], _OPEN, s, directory),
        }
        return [*_compare("closed loop", closed, rounds), *_compare("open loop", opened, rounds)]


@contextmanager
def _nginx(namespace: Namespace, core: int, directory: Path) -> Iterator[None]:
    (directory / "answer").write_text("hello")
    config = directory / "nginx.conf"
    config.write_text(_NGINX.format(directory=directory, address=_LOOPBACK, port=_PORT))
    argv = [*_FAVOURED, "nginx", "-e", str(directory / "error.log"), "-c", str(config)]
    process = namespace.start(argv, core=core, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                namespace.connect((_LOOPBACK, _PORT)).close()
                break
            except ConnectionRefusedError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise LoadError(f"nginx did not start: {(directory / 'error.log').read_text()}") from error
                time.sleep(0.02)
        yield
    finally:
        stop(process)


def _ours(spawn: load.Spawn, program: Path, wanted: Load, seconds: float) -> Seen:
    found = load.run(spawn, program, wanted, _LOOPBACK, _PORT, seconds)
    if found.bottleneck or found.errors:
        raise LoadError(found.bottleneck or f"nginx failed: {found.errors}")
    return Seen(found.operations / found.seconds, found.mean_us)


def _wrk(spawn: load.Spawn, path: str, seconds: int) -> Seen:
    out = _output(spawn, ["wrk", "-t1", f"-c{_CONNECTIONS}", f"-d{seconds}s", f"http://{_LOOPBACK}:{_PORT}{path}"])
    latency = re.search(r"^ +Latency +([\d.]+)(us|ms|s) ", out, re.MULTILINE)
    per_second = re.search(r"^Requests/sec: +([\d.]+)$", out, re.MULTILINE)
    if latency is None or per_second is None or "Non-2xx" in out or "Socket errors" in out:
        raise LoadError(f"wrk: {out}")
    return Seen(float(per_second[1]), float(latency[1]) * {"us": 1, "ms": 1000, "s": 1_000_000}[latency[2]])


def _h2load(spawn: load.Spawn, options: list[str], path: str, seconds: int, directory: Path) -> Seen:
    log = directory / "h2load.log"
    log.unlink(missing_ok=True)
    url = f"http://{_LOOPBACK}:{_PORT}{path}"
    out = _output(spawn, ["h2load", "--h1", *options, f"-D{seconds}", f"--log-file={log}", url])
    # A line for each request: when it began (us), its status, how long it took (us).
    requests = [line.split("\t") for line in log.read_text().splitlines()]
    if not requests or any(status != "200" for _, status, _ in requests):
        raise LoadError(f"h2load: {out}")
    return Seen(len(requests) / seconds, statistics.mean(int(took_us) for _, _, took_us in requests))


def _output(spawn: load.Spawn, argv: list[str]) -> str:
    with spawn(argv) as process:
        try:
            out, err = process.communicate(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise LoadError(f"{argv[0]}: no end within {_PATIENCE_S:g} s") from error
    if process.returncode:
        raise LoadError(f"{argv[0]}: {err.decode().strip()}")
    return out.decode()


def _compare(what: str, takes: dict[str, Take], rounds: int) -> list[Check]:
    found: dict[str, list[Seen]] = {name: [] for name in takes}
    for number in range(rounds):
        for name in in_turn(list(takes), number):
            try:
                found[name].append(takes[name](1))
            except LoadError as error:
                return [Check(f"agrees with packaged ones, {what}", False, str(error))]
    return [judge_agreement(what, name, found[_OURS], found[name]) for name in takes if name != _OURS]


def judge_agreement(what: str, other: str, ours: list[Seen], theirs: list[Seen]) -> Check:
    """Medians of what both found in rounds by turns: requests a second, and the mean latency."""
    ratios = {
        "requests a second": statistics.median([one.per_second for one in ours])
        / statistics.median([one.per_second for one in theirs]),
        "mean latency": statistics.median([one.mean_us for one in ours])
        / statistics.median([one.mean_us for one in theirs]),
    }
    passed = all(abs(ratio - 1) <= TOLERANCE for ratio in ratios.values())
    text = ", ".join(f"{name} {ratio:.3f} of {other}'s" for name, ratio in ratios.items())
    details = {f"{name.replace(' ', '_')}_ratio": ratio for name, ratio in ratios.items()}
    return Check(f"agrees with {other}, {what}", passed, f"{text}; within {TOLERANCE:.0%} wanted", details)
