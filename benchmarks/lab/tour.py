"""What the data plane does and refuses: reach, identity, encryption, policy, and a uProxy that is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Sequence

from benchmarks.lab.capture import Capture, Segment, describe, occurs, tls_flows
from benchmarks.lab.evidence import (
    Steps,
    UnexpectedError,
    Web,
    ask,
    ended_well,
    fresh_payload,
    outcome,
)
from benchmarks.lab.shop import DB, REVIEWS, Shop
from benchmarks.lab.topology import Lab
from control.api.address import HBONE_PORT
from control.server.brokers import BROKER_PORT
from control.server.enrolment import CERTIFICATES_PORT

_OPEN_PORT = 7777
# Random choice between two versions misses one of them for this long once in a billion runs.
_TRIES = 30
# All of it TLS: tunnels, and what proxies say to the broker and the control plane.
_ENCRYPTED = (HBONE_PORT, BROKER_PORT, CERTIFICATES_PORT)


class Tour:
    """The steps, in order. Each returns its evidence or raises."""

    def __init__(self, lab: Lab, the_shop: Shop) -> None:
        self._lab = lab
        self._shop = the_shop
        self._web = Web(the_shop.web)

    def steps(self) -> Steps:
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
            answer = self._web.fetch(f"/reviews/{len(seen)}")
            version = json.loads(answer["body"])["version"]
            seen[version] = seen.get(version, 0) + 1
            peers.add(answer["peer"])
            if len(seen) == 2:
                break
        if sorted(seen) != ["v1", "v2"] or peers != {REVIEWS[0]}:
            raise UnexpectedError(f"answers by version: {seen}, getpeername: {peers}")
        told = ", ".join(f"{name} {count}x" for name, count in sorted(seen.items()))
        return f"http://{REVIEWS[0]}:{REVIEWS[1]}: {told} (v1 is nginx, v2 Python); getpeername says so too"

    def reach_db(self) -> str:
        stored = self._web.redis("SET", "greeting", "hello from web")
        read = self._web.redis("GET", "greeting")
        if stored != "+OK" or not read.endswith("hello from web"):
            raise UnexpectedError(f"SET answered {stored!r}, GET {read!r}")
        return f"{DB[0]}:{DB[1]}: SET answered {stored}, GET answered 'hello from web'"

    def identities(self) -> str:
        self._web.redis("PING")
        db, web = self._shop.db, self._shop.web
        ours = web.await_access(lambda entry: entry.get("dst.workload") == db.name and ended_well(entry))
        # Both sides log one connection under one id.
        theirs = db.await_access(
            lambda entry: entry["direction"] == "inbound" and entry.get("request_id") == ours.get("request_id")
        )
        seen_by_web, seen_by_db = ours.get("dst.identity"), theirs.get("src.identity")
        if (seen_by_web, seen_by_db) != (str(db.identity), str(web.identity)):
            raise UnexpectedError(f"web saw {seen_by_web}, db saw {seen_by_db}")
        return f"web's log: dst.identity={seen_by_web}; db's log: src.identity={seen_by_db}"

    def nothing_in_the_clear(self) -> str:
        secret = fresh_payload()
        with Capture(self._shop.b, self._lab.directory / "mesh.pcap") as capture:
            self._web.redis("SET", "secret", secret)
            if not self._web.redis("GET", "secret").endswith(secret):
                raise UnexpectedError("db did not store what was sent")
            for _ in range(4):
                self._web.fetch("/reviews", body=secret)
            capture.await_segment(HBONE_PORT)
        segments = capture.segments()
        if occurs(secret.encode(), capture.file_bytes()):
            raise UnexpectedError(f"the payload is in the capture: {describe(segments)}")
        tunnelled = [segment for segment in segments if HBONE_PORT in segment.ports]
        other = _payload_outside(segments)
        if other or not tls_flows(tunnelled, HBONE_PORT):
            raise UnexpectedError(f"not only TLS on ports {_ENCRYPTED}: {describe(segments)}")
        return (
            f"{len(tunnelled)} packets of TLS on port {HBONE_PORT}, no payload elsewhere but TLS of the control plane, "
            f"and the {len(secret)} bytes are in none"
        )

    def search_would_find(self) -> str:
        secret = fresh_payload()
        with self._shop.b.entered():
            listener = socket.create_server((self._shop.b.underlay_address, _OPEN_PORT))
        with (
            listener,
            Capture(self._shop.b, self._lab.directory / "open.pcap") as capture,
            self._shop.a.entered(),
            socket.create_connection(listener.getsockname(), timeout=5) as plain,
        ):
            plain.sendall(secret.encode())
            capture.await_segment(_OPEN_PORT)
            time.sleep(0.1)
        if not occurs(secret.encode(), capture.file_bytes()):
            raise UnexpectedError(f"not found, so the search proves nothing: {describe(capture.segments())}")
        return f"found on port {_OPEN_PORT}, in the same kind of capture"

    def forbidden_connect(self) -> str:
        caller, db = self._shop.reviews_v1, self._shop.db
        answer = ask(caller, db, DB[1])
        if answer.status != 401 or not answer.reason:
            raise UnexpectedError(f"status {answer.status}, reason {answer.reason!r}")
        policy = f", x-uproxy-policy: {answer.policy}" if answer.policy else ""
        asked = f"CONNECT with the certificate of {caller.identity}"
        return f"{asked}: {answer.status}, x-uproxy-reason: {answer.reason}{policy}"

    def forbidden_application(self) -> str:
        caller, db = self._shop.reviews_v1, self._shop.db
        (made,) = caller.sockets()
        with made:
            made.settimeout(5)
            ended = outcome(made, DB)
        if ended not in ("ECONNREFUSED", "ECONNRESET"):
            raise UnexpectedError(f"a dial of {DB[0]}:{DB[1]} from {caller.name} ended in: {ended}")
        told = caller.await_access(lambda entry: entry.get("dst.workload") == db.name)
        refused = db.await_access(
            lambda entry: entry.get("src.identity") == str(caller.identity) and not ended_well(entry)
        )
        return f"{ended}; its log: {told.get('error', '?')}; db's log: {refused.get('error', '?')}"

    def raw_dial(self) -> str:
        db = self._shop.db
        with self._shop.a.entered(), socket.socket() as made:
            made.settimeout(5)
            ended = outcome(made, (db.address, DB[1]))
        if ended != "ECONNREFUSED":
            raise UnexpectedError(f"a dial of {db.address}:{DB[1]} from host a ended in: {ended}")
        return f"TCP to {db.address}:{DB[1]} from host a, past every uProxy: {ended} (RST to the SYN)"

    def killed_proxy(self) -> str:
        web = self._shop.web
        launcher = web.launcher
        assert launcher is not None
        secret = fresh_payload()
        with Capture(self._shop.a, self._lab.directory / "killed.pcap") as capture:
            # The supervisor is held, so that there is time to look.
            launcher.send_signal(signal.SIGSTOP)
            os.kill(web.proxy_pid(), signal.SIGKILL)
            time.sleep(0.2)
            outcomes = [self._web.dial(*DB, send=secret), self._web.dial(self._shop.db.address, DB[1], send=secret)]
            outcomes += [self._web.dial(*REVIEWS, send=secret) for _ in range(3)]
            time.sleep(0.2)
        segments = capture.segments()
        if set(outcomes) != {"ECONNREFUSED"}:
            raise UnexpectedError(f"dials ended in {outcomes}")
        if occurs(secret.encode(), capture.file_bytes()) or _payload_outside(segments):
            raise UnexpectedError(f"bytes left in the clear: {describe(segments)}")
        new = [segment for segment in segments if segment.flags & 0x02 and not _is_encrypted(segment)]
        if new:
            raise UnexpectedError(f"connections were opened past the uProxy: {describe(new)}")
        return (
            f"{len(outcomes)} dials by service and by workload address: ECONNREFUSED; no SYN and no byte left but TLS"
        )

    def restarted_proxy(self) -> str:
        web = self._shop.web
        assert web.launcher is not None
        web.launcher.send_signal(signal.SIGCONT)
        took = self._web.answers_again("greeting", "hello from web")
        return f"its launcher started pid {web.proxy_pid()}; db answers again after {took:.2f} s"


def _payload_outside(segments: Sequence[Segment]) -> int:
    """Payload bytes on ports that do not carry TLS."""
    return sum(len(segment.payload) for segment in segments if not _is_encrypted(segment))


def _is_encrypted(segment: Segment) -> bool:
    return any(port in _ENCRYPTED for port in segment.ports)
