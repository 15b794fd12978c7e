"""The demo's mesh: a client, two versions of a service and a database, on two hosts, with policy between them."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.lab.apps import commands
from benchmarks.lab.topology import Host, Lab, Workload

REVIEWS = ("240.240.0.10", 9080)
DB = ("240.240.0.20", 6379)

RESOURCES = f"""\
apiVersion: v1
kind: Service
metadata: {{name: reviews, namespace: default}}
spec:
  clusterIP: {REVIEWS[0]}
  selector: {{app: reviews}}
  ports: [{{name: http, port: {REVIEWS[1]}, targetPort: http}}]
---
apiVersion: v1
kind: Service
metadata: {{name: db, namespace: default}}
spec:
  clusterIP: {DB[0]}
  selector: {{app: db}}
  ports: [{{name: redis, port: {DB[1]}, targetPort: redis}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: only-web, namespace: default}}
spec:
  action: ALLOW
  rules:
  - from: [{{source: {{principals: [lab.test/ns/default/sa/web]}}}}]
"""


@dataclass(frozen=True, slots=True)
class Shop:
    """The workloads; `web` may call the others, and nobody else may."""

    a: Host
    b: Host
    web: Workload
    reviews_v1: Workload
    reviews_v2: Workload
    db: Workload

    def workloads(self) -> tuple[Workload, ...]:
        return self.web, self.reviews_v1, self.reviews_v2, self.db


def declare(lab: Lab) -> Shop:
    """web and reviews v2 on host a, reviews v1 and db on host b. Nothing is started yet."""
    a, b = lab.host("a"), lab.host("b")
    web = a.workload("web", commands.client())
    reviews_v1 = b.workload(
        "reviews-v1", commands.nginx("v1"), service_account="reviews", labels={"app": "reviews", "version": "v1"}
    )
    reviews_v2 = a.workload(
        "reviews-v2", commands.python_http("v2"), service_account="reviews", labels={"app": "reviews", "version": "v2"}
    )
    db = b.workload("db", commands.redis())
    lab.configure(RESOURCES)
    return Shop(a, b, web, reviews_v1, reviews_v2, db)
