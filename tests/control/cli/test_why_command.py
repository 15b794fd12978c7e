"""`meshctl why` as it is typed: about files, and about what a control plane has published."""

import json

import pytest

from control.server.ca import Authority
from tests.support.desired import policy, service, together, workload
from tests.support.operators import operated

MESH = together(
    service("reviews", vip="240.240.0.10"),
    workload("reviews-1", "10.97.0.1", app="reviews"),
    workload("web-1", "10.97.0.2"),
    workload("stranger-1", "10.97.0.3", namespace="other", app="stranger"),
    policy("only-shop", app="reviews"),
)

BEHIND_A_WAYPOINT = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: wp, namespace: shop, labels: {istio.io/waypoint-for: service}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: wp-1, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: wp}}
spec: {address: 10.97.0.9, serviceAccount: wp}
---
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: shop, labels: {istio.io/use-waypoint: wp}}
spec:
  clusterIP: 240.240.0.10
  selector: {app: reviews}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: reviews-v2, namespace: shop}
spec:
  selector: {app: reviews, version: v2}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: reviews-1, namespace: shop, labels: {app: reviews, version: v1}}
spec: {address: 10.97.0.1, serviceAccount: reviews}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: reviews-2, namespace: shop, labels: {app: reviews, version: v2}}
spec: {address: 10.97.0.2, serviceAccount: reviews}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec: {address: 10.97.0.3, serviceAccount: web}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: split, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: reviews}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /v2}}]
    backendRefs: [{name: reviews-v2, port: 80}]
  - backendRefs: [{name: reviews, port: 80}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-delete, namespace: shop}
spec:
  targetRefs: [{kind: Service, group: "", name: reviews}]
  action: DENY
  rules: [{to: [{operation: {methods: [DELETE]}}]}]
"""


@pytest.fixture
def mesh(tmp_path):
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH)
    return path


def test_what_is_allowed(meshctl, mesh):
    status, out, err = meshctl("why", "web-1", "reviews:80", "-n", "shop", "-f", mesh)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["STEP", "ANSWER"],
        ["capture", "ok"],
        ["resolve", "ok"],
        ["binding", "ok"],
        ["destination", "ok"],
    ]
    assert "allowed by shop/only-shop[0]" in lines[-2]
    assert lines[-1] == "allowed"


def test_what_is_refused(meshctl, mesh):
    status, out, _ = meshctl("why", "other/stranger-1", "reviews.shop:80", "-f", mesh)
    assert status == 1
    assert out.splitlines()[-1] == "refused"
    status, out, _ = meshctl("why", "other/stranger-1", "10.97.0.1:8080", "-f", mesh, "-o", "json")
    assert status == 1
    answer = json.loads(out)
    assert answer["allowed"] is False
    assert answer["steps"][-1]["stage"] == "destination"
    assert answer["steps"][-1]["reason"] == "policy"


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        (["--path", "/v2/items"], 0, "shop/reviews-v2:80 (100 %)"),
        (["--path", "/items"], 0, "shop/reviews:80 (100 %)"),
        (["--method", "DELETE"], 1, "DELETE /: denied by shop/no-delete[0]"),
        (["--path", "/a%2Fb"], 1, "400: the path has %2F"),
    ],
)
def test_what_a_waypoint_decides(meshctl, mesh, request_, status, said):
    mesh.write_text(BEHIND_A_WAYPOINT)
    found, out, _ = meshctl("why", "shop/web-1", "reviews:80", "-f", mesh, *request_)
    assert found == status
    assert "through waypoint shop/wp, run by shop/wp-1" in out
    assert said in out


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["nobody", "reviews:80"], 1, "no workload shop/nobody"),
        (["web-1", "nobody:80"], 1, "'nobody' is no service, workload or address"),
        (["web-1", "reviews"], 1, "write B:PORT"),
        (["web-1", "reviews:http"], 1, "write B:PORT"),
        (["web-1", "reviews:65536"], 1, "write B:PORT"),
        (["web-1", ":80"], 1, "write B:PORT"),
        (["web-1", "reviews:80", "--header", "x-team"], 2, "is no header; write 'NAME: VALUE'"),
        (["web-1", "reviews:80", "--header", "x-t\u00e4m: x"], 2, "characters that no header has"),
    ],
)
def test_what_cannot_be_asked(meshctl, mesh, words, status, said):
    found, _, err = meshctl("why", *words, "-n", "shop", "-f", mesh)
    assert found == status
    assert said in err


def test_files_that_are_wrong(meshctl, mesh):
    mesh.write_text(MESH.replace("10.97.0.2", "10.97.0.999"))
    status, _, err = meshctl("why", "shop/web-1", "reviews:80", "-f", mesh)
    assert status == 1
    assert f"{mesh}:" in err


def test_a_live_mesh(meshctl, mesh, tmp_path):
    (tmp_path / "behind.yaml").write_text(
        """\
apiVersion: v1
kind: Service
metadata: {name: late, namespace: shop, labels: {istio.io/use-waypoint: wp}}
spec: {clusterIP: 240.240.0.11, selector: {app: reviews}, ports: [{name: http, port: 80, targetPort: 8080}]}
"""
    )
    authority = Authority.create(tmp_path / "ca", "cluster.local")
    with operated(tmp_path / "ca", authority, tmp_path / "control") as plane:
        live = ("--socket", plane.socket)
        assert meshctl("apply", "-f", mesh, *live)[0] == 0
        assert meshctl("why", "web-1", "reviews:80", "-n", "shop", *live)[0] == 0
        assert meshctl("why", "other/stranger-1", "reviews.shop:80", *live)[0] == 1
        assert meshctl("delete", "policy", "only-shop", "-n", "shop", "--release", *live)[0] == 0
        assert meshctl("why", "other/stranger-1", "reviews.shop:80", *live)[0] == 0
        assert meshctl("apply", "--force", "-f", tmp_path / "behind.yaml", *live)[0] == 0
        status, out, _ = meshctl("why", "web-1", "late:80", "-n", "shop", *live)
        assert status == 0
        assert (
            "directly, with mTLS from instance to instance; its binding to waypoint shop/wp is pending, and waits"
            in out
        )
        assert "goes with -f" in meshctl("why", "shop/web-1", "reviews:80", "--trust-domain", "x", *live)[2]


def test_no_control_plane(meshctl, tmp_path):
    assert meshctl("why", "shop/web-1", "reviews:80", "--socket", tmp_path / "none")[0] == 4
