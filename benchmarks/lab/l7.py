"""What a label does: reviews behind a waypoint and back again, under traffic, and what goes on when it is killed."""

from __future__ import annotations

import errno
import json
import time
from typing import Any

from benchmarks.lab.control import ControlPlane
from benchmarks.lab.evidence import Steps, Traffic, UnexpectedError, Web, ask, until
from benchmarks.lab.shop import REVIEWS, Shop
from benchmarks.lab.waypoints import Waypoint

_LABEL = "istio.io/use-waypoint"
_ENFORCED_S = 5.0
# Requests that show which way they went, once `--wait` has returned.
_LOOKED_AT_S = 1.0
_VERSIONS = "\n---\n".join(
    f"""\
apiVersion: v1
kind: Service
metadata: {{name: reviews-{version}, namespace: default}}
spec:
  selector: {{app: reviews, version: {version}}}
  ports: [{{name: http, port: {REVIEWS[1]}, targetPort: http}}]"""
    for version in ("v1", "v2")
)
_ROUTE = f"""\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: reviews, namespace: default}}
spec:
  parentRefs: [{{group: "", kind: Service, name: reviews, port: {REVIEWS[1]}}}]
  rules:
  - matches: [{{path: {{type: PathPrefix, value: /v2}}}}]
    backendRefs: [{{name: reviews-v2, port: {REVIEWS[1]}}}]
  - backendRefs: [{{name: reviews-v1, port: {REVIEWS[1]}}}]
"""
_POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: keep-reviews, namespace: default}
spec:
  targetRefs: [{group: "", kind: Service, name: reviews}]
  action: DENY
  rules:
  - to: [{operation: {methods: [DELETE]}}]
"""


class L7:
    """The steps, in order."""

    def __init__(self, control: ControlPlane, the_shop: Shop, waypoint: Waypoint) -> None:
        self._control = control
        self._shop = the_shop
        self._waypoint = waypoint
        self._web = Web(the_shop.web)
        self._traffic = Traffic(the_shop.web)

    def steps(self) -> Steps:
        return [
            ("a waypoint is started; nobody goes through it yet", self.start),
            ("a label, under traffic, puts reviews behind it: /v2 goes to v2, the rest to v1", self.label),
            ("its L7 policy refuses DELETE with 403, and GET goes on", self.policy),
            ("db still goes direct", self.direct),
            ("a direct attempt around the waypoint is refused, and told why", self.around),
            ("no request of that traffic failed", self.no_failure),
            ("the waypoint killed (-9): calls to reviews are refused, db goes on", self.killed),
            ("the waypoint restarts: reviews answers again", self.restarted),
            ("the label comes off under traffic: the direct path is back", self.unlabel),
            ("no request of that traffic failed either", self.no_failure),
        ]

    def start(self) -> str:
        self._waypoint.apply()
        began = time.monotonic()
        self._waypoint.start()
        took = time.monotonic() - began
        self._control.apply(f"{_VERSIONS}\n---\n{_ROUTE}")
        seen = self._ask("GET", "/v2")
        if seen["caller"]:
            raise UnexpectedError(f"reviews is not labelled, and answered {seen}")
        return f"{self._waypoint.identity} at {self._waypoint.address}: ready {took:.2f} s after its start"

    def label(self) -> str:
        self._traffic.begin()
        took = self._flip(f"{_LABEL}={self._waypoint.gateway}")
        self._all_by(str(self._shop.web.identity))
        seen = {path: self._ask("GET", path) for path in ("/v2", "/v2/x", "/v2x", "/")}
        versions = {path: answer["version"] for path, answer in seen.items()}
        if versions != {"/v2": "v2", "/v2/x": "v2", "/v2x": "v1", "/": "v1"}:
            raise UnexpectedError(f"answers by path: {versions}")
        told = ", ".join(f"{path} {version}" for path, version in versions.items())
        return f"`meshctl label … --wait` took {took * 1000:.0f} ms; {told}; the app saw {seen['/v2']['caller']}"

    def policy(self) -> str:
        began = time.monotonic()
        self._control.apply(_POLICY)
        took = until(lambda: self._try("DELETE", "/v2") == 403, _ENFORCED_S, began, "DELETE is not refused")
        self._ask("GET", "/v2")
        entry = self._waypoint.await_access(lambda one: one.get("response_code") == 403)
        details = entry["response_code_details"]
        return f"DELETE /v2: 403 ({details}), {took} after `meshctl apply` was started; GET /v2: 200"

    def direct(self) -> str:
        db = self._shop.db
        earlier = {one.get("request_id") for one in db.access_log()}
        self._web.redis("PING")
        entry = db.await_access(lambda one: one["direction"] == "inbound" and one.get("request_id") not in earlier)
        if entry.get("src.identity") != str(self._shop.web.identity) or "caller" in entry:
            raise UnexpectedError(f"db's log: {entry}")
        return f"db's log: src.identity={entry['src.identity']}, from {entry['src.addr']}"

    def around(self) -> str:
        caller, target = self._shop.web, self._shop.reviews_v1
        answer = ask(caller, target, REVIEWS[1])
        if (answer.status, answer.reason) != (401, "waypoint-required"):
            raise UnexpectedError(f"status {answer.status}, reason {answer.reason!r}")
        entry = target.await_access(lambda one: "waypoint-required" in one.get("error", ""))
        return (
            f"CONNECT with the certificate of {caller.identity}: 401, x-uproxy-reason: {answer.reason}; "
            f"{target.name}'s log: {entry['error']}"
        )

    def killed(self) -> str:
        pid = self._waypoint.kill()
        outcomes = [self._try("GET", "/") for _ in range(5)]
        if not set(outcomes) <= {"ECONNRESET", "ECONNREFUSED"}:
            raise UnexpectedError(f"calls to reviews ended in {outcomes}")
        reply = self._web.redis("PING")
        told = self._shop.web.await_access(
            lambda one: self._waypoint.address in one.get("dst.addr", "") and "error" in one
        )
        return f"killed pid {pid}; 5 calls to reviews: {outcomes[0]}, web's log: {told['error']}; db: {reply}"

    def restarted(self) -> str:
        began = time.monotonic()
        self._waypoint.start()
        took = until(lambda: self._try("GET", "/") == 200, _ENFORCED_S, began, "reviews does not answer")
        return f"its first answer came {took} after its start"

    def unlabel(self) -> str:
        self._control.meshctl("delete", "policy", "keep-reviews")
        self._traffic.begin()
        self._all_by(str(self._shop.web.identity))
        took = self._flip(f"{_LABEL}-")
        self._all_by("")
        if self._try("DELETE", "/v2") != 200:
            raise UnexpectedError("DELETE is not answered")
        return f"`meshctl label … --wait` took {took * 1000:.0f} ms; nobody tells the app who calls any more"

    def no_failure(self) -> str:
        return self._traffic.without_failure()

    def _flip(self, change: str) -> float:
        """Seconds until `meshctl label --wait` has returned."""
        began = time.monotonic()
        self._control.meshctl("label", "service", "reviews", change, "--overwrite", "--wait")
        return time.monotonic() - began

    def _all_by(self, caller: str) -> None:
        """Raises UnexpectedError unless from now on the application is told this of every request's caller."""
        expected = f"URI={caller}" if caller else ""
        time.sleep(0.2)  # what was under way
        before = self._traffic.told()["callers"]
        time.sleep(_LOOKED_AT_S)
        after = self._traffic.told()["callers"]
        fresh = {one: count - before.get(one, 0) for one, count in after.items() if count != before.get(one, 0)}
        if list(fresh) != [expected]:
            raise UnexpectedError(f"requests by caller, as the application was told: {fresh}")

    def _ask(self, method: str, path: str) -> dict[str, Any]:
        """What reviews saw of a request. Raises UnexpectedError when it is not answered with 200."""
        answer = self._shop.web.job(job="http", host=REVIEWS[0], port=REVIEWS[1], path=path, method=method)
        if answer.get("status") != 200:
            raise UnexpectedError(f"{method} {path} was answered {answer}")
        seen: dict[str, Any] = json.loads(answer["body"])
        return seen

    def _try(self, method: str, path: str) -> int | str:
        """The status of the answer, or the errno's name."""
        answer = self._shop.web.job(job="http", host=REVIEWS[0], port=REVIEWS[1], path=path, method=method)
        status: int | None = answer.get("status")
        return status if status is not None else errno.errorcode.get(answer.get("errno") or 0, str(answer))
