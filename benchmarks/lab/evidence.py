"""What the demo's steps are made of: a step with its evidence, and what web, the client, does in it."""

from __future__ import annotations

import errno
import json
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.lab.connect import Answer, connect
from benchmarks.lab.shop import DB, REVIEWS
from benchmarks.lab.topology import Workload
from control.api.address import HBONE_PORT

Steps = list[tuple[str, Callable[[], str]]]
"""A name, and what returns the evidence or raises."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing shown. `evidence` is what was observed, whether it is right or not."""

    name: str
    ok: bool
    evidence: str


class UnexpectedError(Exception):
    """A step did not go as it must; the text is the evidence."""


class Web:
    """The client application: what it asks of the others. Raises UnexpectedError when an answer is not one."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def fetch(self, path: str, body: str | None = None) -> dict[str, Any]:
        """An HTTP request to reviews, by the service's address."""
        answer = self.workload.job(job="http", host=REVIEWS[0], port=REVIEWS[1], path=path, body=body)
        if answer.get("status") != 200:
            raise UnexpectedError(f"reviews answered {answer}")
        return answer

    def version(self) -> str:
        """Which version of reviews answers this time."""
        return str(json.loads(self.fetch("/reviews")["body"])["version"])

    def redis(self, *command: str) -> str:
        """A command to db, by the service's address."""
        answer = self.workload.job(job="redis", host=DB[0], port=DB[1], command=list(command))
        if "reply" not in answer:
            raise UnexpectedError(f"db answered {answer}")
        return str(answer["reply"])

    def dial(self, host: str, port: int, send: str) -> str:
        """How a dial ends: the errno's name, or what came."""
        answer = self.workload.job(job="dial", host=host, port=port, send=send, timeout_s=3)
        return errno.errorcode.get(answer.get("errno") or 0, str(answer))

    def answers_again(self, key: str, value: str, timeout_s: float = 15) -> float:
        """Ask db until it answers; the seconds that it took."""
        began = time.monotonic()
        answer: dict[str, Any] = {}
        while time.monotonic() - began < timeout_s:
            answer = self.workload.job(job="redis", host=DB[0], port=DB[1], command=["GET", key])
            if str(answer.get("reply", "")).endswith(value):
                return time.monotonic() - began
            time.sleep(0.05)
        raise UnexpectedError(f"no answer within {timeout_s:g} s: {answer}\n{self.workload.logs()}")


class Traffic:
    """web's requests beside everything else: to reviews on new connections, to db on one (apps/client.py)."""

    def __init__(self, web: Workload) -> None:
        self._web = web

    def begin(self) -> None:
        self._job(job="traffic", http=REVIEWS, redis=DB)

    def told(self) -> dict[str, Any]:
        """What it has seen so far."""
        return self._job(job="traffic-told")

    def without_failure(self) -> str:
        """End it; what it has seen. Raises UnexpectedError when a request failed, or there were next to none."""
        told = self._job(job="traffic-told", end=True)
        counts = told["requests"]
        if told["failed"] or min(counts.values()) < 50:
            failed = [
                f"{workload.name}: {entry}"
                for workload in self._web.host.lab.workloads()
                for entry in workload.access_log()[-200:]
                if "error" in entry
            ]
            lines = "\n".join(failed)
            raise UnexpectedError(f"requests: {counts}, failed: {told['failed']}: {told['failures']}\n{lines}")
        kinds = ", ".join(f"{count} on {kind}" for kind, count in counts.items())
        return f"{kinds}: none failed, the longest took {told['longest_ms']} ms"

    def _job(self, **job: Any) -> dict[str, Any]:
        answer = self._web.job(**job)
        if "error" in answer:
            raise UnexpectedError(f"web answered {answer}")
        return answer


def until(condition: Callable[[], bool], timeout_s: float, began: float, otherwise: str) -> str:
    """How long after `began` (monotonic) something is so, as text. Raises UnexpectedError when that takes too long."""
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise UnexpectedError(f"{otherwise} {timeout_s:g} s after the change")
        time.sleep(0.005)
    return f"{(time.monotonic() - began) * 1000:.0f} ms"


def ask(caller: Workload, target: Workload, port: int) -> Answer:
    """A CONNECT to the target's uProxy by hand, with the caller's certificate and from its address."""
    with caller.entered():
        made = socket.create_connection((target.address, HBONE_PORT), timeout=5)
    with made:
        return connect(made, caller.identity_dir, f"{target.address}:{port}")


def outcome(made: socket.socket, address: tuple[str, int]) -> str:
    """How a dial and a first read end: the errno's name, or what came."""
    try:
        made.connect(address)
        return f"connected, then {made.recv(64)!r}"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def ended_well(entry: dict[str, Any]) -> bool:
    """Whether a line of the access log tells of a connection without a fault."""
    return "error" not in entry and "response_flags" not in entry


def fresh_payload() -> str:
    """Bytes that occur nowhere else."""
    return f"payload-{secrets.token_hex(24)}"
