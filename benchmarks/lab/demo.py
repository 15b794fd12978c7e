"""The demo: a mesh on this machine, what it does and what it refuses, each with the evidence, then what it costs.

`main` prints one line per step, or JSON: {"steps": [{"name", "ok", "evidence"}], "paths": [{"path", "p50_us",
"p99_us", "requests_per_s"}]}. Exit status 1 if a step fails.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from benchmarks.lab import shop
from benchmarks.lab.capture import Capture, Segment, describe, occurs, tls_flows
from benchmarks.lab.connect import connect
from benchmarks.lab.measure import CONNECTIONS, ROUNDS, PathCost, measure
from benchmarks.lab.shop import DB, REVIEWS, Shop
from benchmarks.lab.topology import Lab, LabError
from uproxy.cgroup import SandboxError

_HBONE_PORT = 15008
_CONTROL_PORT = 7777
# Random choice between two versions misses one of them for this long once in a billion runs.
_TRIES = 30


@dataclass(frozen=True, slots=True)
class Step:
    """One thing shown. `evidence` is what was observed, whether it is right or not."""

    name: str
    ok: bool
    evidence: str


class _Unexpected(Exception):
    """A step did not go as it must; the text is the evidence."""


def main(argv: Sequence[str]) -> int:
    """Run the demo. Exit status: 0 when every step is right, 1 when one is not, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="meshctl demo", description="Build a mesh on this machine and show it.")
    parser.add_argument("--output", choices=("table", "json"), default="table")
    as_json = parser.parse_args(argv).output == "json"
    show = _Show(sys.stderr if as_json else sys.stdout, quiet=as_json)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        steps, paths = run(show)
    except BrokenPipeError:  # whoever read this has seen enough; the lab is removed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    if as_json:
        print(json.dumps({"steps": [asdict(step) for step in steps], "paths": [asdict(path) for path in paths]}))
    else:
        show.table(paths)
    return 0 if all(step.ok for step in steps) and paths else 1


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # the lab is removed on the way out


def run(show: _Show) -> tuple[list[Step], list[PathCost]]:
    """Build the lab, take the steps, measure, and remove the lab."""
    steps: list[Step] = []

    def take(name: str, step: Callable[[], str]) -> None:
        try:
            taken = Step(name, True, step())
        except (_Unexpected, LabError, OSError, ValueError) as error:
            taken = Step(name, False, f"{type(error).__name__}: {error}".removeprefix("_Unexpected: "))
        show.step(taken)
        steps.append(taken)

    try:
        with Lab() as lab:
            show.progress(f"building two hosts and four workloads (lab {lab.names.lab_id})")
            the_shop = shop.declare(lab)
            lab.start(show.progress)
            tour = _Tour(lab, the_shop)
            for name, step in tour.steps():
                take(name, step)
            show.progress(f"measuring, {ROUNDS} interleaved rounds")
            paths = measure(lab, the_shop)
            show.progress("removing the lab")
            return steps, paths
    except BrokenPipeError:
        raise
    except (LabError, SandboxError, OSError) as error:
        failed = Step("the lab stands", False, str(error))
        show.step(failed)
        return [*steps, failed], []


class _Show:
    """Where people look while it runs."""

    def __init__(self, stream: Any, quiet: bool) -> None:
        self._stream = stream
        self._quiet = quiet
        self._began = time.monotonic()

    def progress(self, line: str) -> None:
        print(f"  {time.monotonic() - self._began:5.1f} s  {line}", file=self._stream, flush=True)

    def step(self, step: Step) -> None:
        if not self._quiet or not step.ok:
            print(f"{'ok  ' if step.ok else 'FAIL'}  {step.name}\n      {step.evidence}", file=self._stream, flush=True)

    def table(self, paths: Sequence[PathCost]) -> None:
        if not paths:
            return
        print(f"\n{'path':<28}{'RTT p50':>12}{'RTT p99':>12}{'requests/s':>14}", file=self._stream)
        for path in paths:
            print(
                f"{path.path:<28}{path.p50_us:>9.0f} µs{path.p99_us:>9.0f} µs{path.requests_per_s:>14,.0f}",
                file=self._stream,
            )
        print(
            f"Redis PING from host a to host b; requests/s over {CONNECTIONS} connections. One machine runs it:\n"
            "read the ratio, not the times.",
            file=self._stream,
        )


class _Tour:
    """The steps, in order. Each returns its evidence or raises."""

    def __init__(self, lab: Lab, the_shop: Shop) -> None:
        self._lab = lab
        self._shop = the_shop
        self._web = the_shop.web

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("web reaches both versions of reviews by their service address", self.reach_reviews),
            ("web reaches db, a Redis, by its service address", self.reach_db),
            ("each side knows the other by its certificate (mTLS)", self.identities),
            ("the payload does not cross between the hosts in the clear", self.nothing_in_the_clear),
            ("the same search finds the same bytes sent in the clear (control)", self.search_would_find),
            ("a caller that policy forbids is refused, and told why", self.forbidden_connect),
            ("its application cannot get through its own uProxy either", self.forbidden_application),
            ("a raw dial of the application's port is reset", self.raw_dial),
            ("web's uProxy killed (-9): connections are refused, nothing leaves in the clear", self.killed_proxy),
            ("the restarted uProxy serves again", self.restarted_proxy),
        ]

    def reach_reviews(self) -> str:
        seen: dict[str, int] = {}
        peers = set()
        for _ in range(_TRIES):
            answer = self._fetch(f"/reviews/{len(seen)}")
            version = json.loads(answer["body"])["version"]
            seen[version] = seen.get(version, 0) + 1
            peers.add(answer["peer"])
            if len(seen) == 2:
                break
        if sorted(seen) != ["v1", "v2"] or peers != {REVIEWS[0]}:
            raise _Unexpected(f"answers by version: {seen}, getpeername: {peers}")
        told = ", ".join(f"{name} {count}x" for name, count in sorted(seen.items()))
        return f"http://{REVIEWS[0]}:{REVIEWS[1]}: {told} (v1 is nginx, v2 Python); getpeername says so too"

    def reach_db(self) -> str:
        stored = self._redis("SET", "greeting", "hello from web")
        read = self._redis("GET", "greeting")
        if stored != "+OK" or not read.endswith("hello from web"):
            raise _Unexpected(f"SET answered {stored!r}, GET {read!r}")
        return f"{DB[0]}:{DB[1]}: SET answered {stored}, GET answered 'hello from web'"

    def identities(self) -> str:
        self._redis("PING")
        db, web = self._shop.db, self._web
        ours = web.await_access(lambda entry: entry.get("dst.workload") == db.name and _ended_well(entry))
        # Both sides log one connection under one id.
        theirs = db.await_access(
            lambda entry: entry["direction"] == "inbound" and entry.get("request_id") == ours.get("request_id")
        )
        seen_by_web, seen_by_db = ours.get("dst.identity"), theirs.get("src.identity")
        if (seen_by_web, seen_by_db) != (str(db.identity), str(web.identity)):
            raise _Unexpected(f"web saw {seen_by_web}, db saw {seen_by_db}")
        return f"web's log: dst.identity={seen_by_web}; db's log: src.identity={seen_by_db}"

    def nothing_in_the_clear(self) -> str:
        secret = _secret()
        with Capture(self._shop.b, self._lab.directory / "mesh.pcap") as capture:
            self._redis("SET", "secret", secret)
            if not self._redis("GET", "secret").endswith(secret):
                raise _Unexpected("db did not store what was sent")
            for _ in range(4):
                self._fetch("/reviews", body=secret)
            capture.await_segment(_HBONE_PORT)
        segments = capture.segments()
        if occurs(secret.encode(), capture.file_bytes()):
            raise _Unexpected(f"the payload is in the capture: {describe(segments)}")
        other = _payload_outside(segments, _HBONE_PORT)
        if other or not tls_flows(_server_side(segments), _HBONE_PORT):
            raise _Unexpected(f"not only TLS on port {_HBONE_PORT}: {describe(segments)}")
        return (
            f"{len(segments)} packets, all of them TLS on port {_HBONE_PORT}, and the {len(secret)} bytes are in none"
        )

    def search_would_find(self) -> str:
        secret = _secret()
        with self._shop.b.entered():
            listener = socket.create_server((self._shop.b.underlay_address, _CONTROL_PORT))
        with (
            listener,
            Capture(self._shop.b, self._lab.directory / "control.pcap") as capture,
            self._shop.a.entered(),
            socket.create_connection(listener.getsockname(), timeout=5) as plain,
        ):
            plain.sendall(secret.encode())
            capture.await_segment(_CONTROL_PORT)
            time.sleep(0.1)
        if not occurs(secret.encode(), capture.file_bytes()):
            raise _Unexpected(f"not found, so the search proves nothing: {describe(capture.segments())}")
        return f"found on port {_CONTROL_PORT}, in the same kind of capture"

    def forbidden_connect(self) -> str:
        caller, db = self._shop.reviews_v1, self._shop.db
        with caller.entered():
            made = socket.create_connection((db.address, _HBONE_PORT), timeout=5)
        answer = connect(made, caller.identity_dir, f"{db.address}:{DB[1]}")
        if answer.status != 401 or not answer.reason:
            raise _Unexpected(f"status {answer.status}, reason {answer.reason!r}")
        policy = f", x-uproxy-policy: {answer.policy}" if answer.policy else ""
        asked = f"CONNECT with the certificate of {caller.identity}"
        return f"{asked}: {answer.status}, x-uproxy-reason: {answer.reason}{policy}"

    def forbidden_application(self) -> str:
        caller, db = self._shop.reviews_v1, self._shop.db
        (made,) = caller.sockets()
        with made:
            made.settimeout(5)
            outcome = _outcome(made, DB)
        if outcome not in ("ECONNREFUSED", "ECONNRESET"):
            raise _Unexpected(f"a dial of {DB[0]}:{DB[1]} from {caller.name} ended in: {outcome}")
        told = caller.await_access(lambda entry: entry.get("dst.workload") == db.name)
        refused = db.await_access(
            lambda entry: entry.get("src.identity") == str(caller.identity) and not _ended_well(entry)
        )
        return f"{outcome}; its log: {told.get('error', '?')}; db's log: {refused.get('error', '?')}"

    def raw_dial(self) -> str:
        db = self._shop.db
        with self._shop.a.entered(), socket.socket() as made:
            made.settimeout(5)
            outcome = _outcome(made, (db.address, DB[1]))
        if outcome != "ECONNREFUSED":
            raise _Unexpected(f"a dial of {db.address}:{DB[1]} from host a ended in: {outcome}")
        return f"TCP to {db.address}:{DB[1]} from host a, past every uProxy: {outcome} (RST to the SYN)"

    def killed_proxy(self) -> str:
        assert self._web.launcher is not None
        secret = _secret()
        with Capture(self._shop.a, self._lab.directory / "killed.pcap") as capture:
            # The supervisor is held, so that there is time to look.
            self._web.launcher.send_signal(signal.SIGSTOP)
            os.kill(self._web.proxy_pid(), signal.SIGKILL)
            time.sleep(0.2)
            outcomes = [self._dial(*DB, send=secret), self._dial(self._shop.db.address, DB[1], send=secret)]
            outcomes += [self._dial(*REVIEWS, send=secret) for _ in range(3)]
            time.sleep(0.2)
        segments = capture.segments()
        if set(outcomes) != {"ECONNREFUSED"}:
            raise _Unexpected(f"dials ended in {outcomes}")
        if occurs(secret.encode(), capture.file_bytes()) or _payload_outside(segments, _HBONE_PORT):
            raise _Unexpected(f"bytes left in the clear: {describe(segments)}")
        new = [segment for segment in segments if segment.flags & 0x02 and _HBONE_PORT not in segment.ports]
        if new:
            raise _Unexpected(f"connections were opened past the uProxy: {describe(new)}")
        return (
            f"{len(outcomes)} dials by service and by workload address: ECONNREFUSED; no SYN and no byte left but TLS"
        )

    def restarted_proxy(self) -> str:
        assert self._web.launcher is not None
        self._web.launcher.send_signal(signal.SIGCONT)
        began = time.monotonic()
        answer: dict[str, Any] = {}
        while time.monotonic() - began < 15:
            answer = self._web.job(job="redis", host=DB[0], port=DB[1], command=["GET", "greeting"])
            if str(answer.get("reply", "")).endswith("hello from web"):
                took = time.monotonic() - began
                return f"its launcher started pid {self._web.proxy_pid()}; db answers again after {took:.2f} s"
            time.sleep(0.05)
        raise _Unexpected(f"no answer within 15 s: {answer}\n{self._web.logs()}")

    def _fetch(self, path: str, body: str | None = None) -> dict[str, Any]:
        answer = self._web.job(job="http", host=REVIEWS[0], port=REVIEWS[1], path=path, body=body)
        if answer.get("status") != 200:
            raise _Unexpected(f"reviews answered {answer}")
        return answer

    def _redis(self, *command: str) -> str:
        answer = self._web.job(job="redis", host=DB[0], port=DB[1], command=list(command))
        if "reply" not in answer:
            raise _Unexpected(f"db answered {answer}")
        return str(answer["reply"])

    def _dial(self, host: str, port: int, send: str) -> str:
        answer = self._web.job(job="dial", host=host, port=port, send=send, timeout_s=3)
        return errno.errorcode.get(answer.get("errno") or 0, str(answer))


def _secret() -> str:
    return f"payload-{secrets.token_hex(24)}"


def _ended_well(entry: dict[str, Any]) -> bool:
    return "error" not in entry and "response_flags" not in entry


def _payload_outside(segments: Sequence[Segment], port: int) -> int:
    """Payload bytes on other ports."""
    return sum(len(segment.payload) for segment in segments if port not in segment.ports)


def _server_side(segments: Sequence[Segment]) -> list[Segment]:
    return [segment for segment in segments if _HBONE_PORT in segment.ports]


def _outcome(made: socket.socket, address: tuple[str, int]) -> str:
    """How a dial and a first read end: the errno's name, or what came."""
    try:
        made.connect(address)
        return f"connected, then {made.recv(64)!r}"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
