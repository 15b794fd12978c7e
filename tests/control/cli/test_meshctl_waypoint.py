"""`meshctl waypoint`, and labels that bind: what an operator types, sees and gets as exit status."""

import json
import threading
import time

import pytest

from control.api import status
from control.api.identity import SpiffeId, proxy_hash
from control.api.messages import Envelope, encode
from control.api.status import Kind, ProxyStatus
from control.api.topics import StatusTopic, format_topic

pytestmark = pytest.mark.usefixtures("plane")

MESH = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 240.240.0.10
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: web-1, namespace: shop}
spec: {address: 10.97.0.1, serviceAccount: web, labels: {app: web}}
"""
USE = "istio.io/use-waypoint"


@pytest.fixture
def plane(plane):
    plane.core.apply([("mesh.yaml", MESH)])
    return plane


@pytest.fixture
def waypoint(plane, meshctl):
    assert meshctl("waypoint", "apply", "wp", "-n", "shop", "--instance", "wp-1=10.97.0.9")[0] == 0


def follow(plane):
    """Every proxy reports that it has applied all."""
    for name, account, kind in (("wp-1", "wp", Kind.WAYPOINT), ("web-1", "web", Kind.UPROXY)):
        identity = SpiffeId.parse(f"spiffe://cluster.local/ns/shop/sa/{account}")
        now = int(time.time())
        report = ProxyStatus(kind, f"shop/{name}", "1", True, True, (), plane.core.roots(), now, "ab", now + 9999, ())
        topic = format_topic(identity.trust_domain, StatusTopic(proxy_hash(identity), name))
        plane.core.status_received(topic, encode(Envelope(now, 1, now, status.write(report))))
    plane.core.advance()


@pytest.fixture
def proxies(plane):
    """Proxies that follow by themselves, a moment later."""
    stop = threading.Event()

    def run():
        while not stop.wait(0.02):
            follow(plane)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    stop.set()
    thread.join()


def test_apply_makes_a_gateway_with_its_processes_and_says_how_they_are_started(meshctl, plane):
    found, out, err = meshctl("waypoint", "apply", "wp", "-n", "shop", "--for", "all", "--instance", "wp-1=10.97.0.9")
    assert (found, err) == (0, "")
    assert "meshctl token create wp-1 -n shop --out wp-1.token" in out
    assert "waypoint run --join wp-1.token --state wp-1" in out
    assert [place for place, _ in plane.core.get("Gateway")] == [("Gateway", "shop", "wp")]
    assert "waypoint-for: all" in plane.core.get("Gateway")[0][1].replace('"', "")
    assert [str(identity) for identity in plane.core.waypoints()] == ["spiffe://cluster.local/ns/shop/sa/wp"]
    assert meshctl("get", "gateway", "wp", "-n", "shop")[0] == 0
    assert meshctl("token", "create", "wp-1", "-n", "shop")[0] == 0


def test_apply_again_changes_what_is_given_and_nothing_else(meshctl, plane):
    def document():
        return plane.core.get("Gateway", "shop", "wp")[0][1].replace('"', "")

    meshctl("waypoint", "apply", "wp", "-n", "shop", "--for", "all", "--admit", "All")
    meshctl("label", "gateway", "wp", "tier=edge", "-n", "shop")
    first = document()
    assert meshctl("waypoint", "apply", "wp", "-n", "shop", "--instance", "wp-2=10.97.0.8")[0] == 0
    assert document() == first
    assert meshctl("waypoint", "apply", "wp", "-n", "shop", "--for", "service")[0] == 0
    assert document() == first.replace("waypoint-for: all", "waypoint-for: service")
    assert meshctl("waypoint", "apply", "wp", "-n", "shop", "--admit", "Same")[0] == 0
    assert document() == first.replace("waypoint-for: all", "waypoint-for: service").replace("from: All", "from: Same")


@pytest.mark.parametrize("instance", ["wp-1", "=10.0.0.1", "wp-1=", "wp-1=x'y"])
def test_an_instance_that_is_none_is_refused(meshctl, plane, instance):
    found, _, err = meshctl("waypoint", "apply", "wp", "--instance", instance)
    assert found == 1
    assert err.startswith("error: ")
    assert plane.core.get("Gateway") == []


def test_a_name_that_is_none_is_refused_by_the_control_plane(meshctl):
    found, _, err = meshctl("waypoint", "apply", "no: {name", "-n", "shop")
    assert found == 1
    assert "metadata.name" in err


@pytest.mark.usefixtures("waypoint", "proxies")
def test_label_wait_returns_when_it_is_enforced_and_when_it_is_gone(meshctl, plane):
    assert meshctl("label", "service", "web", f"{USE}=wp", "-n", "shop", "--wait", "20s")[0] == 0
    (one,) = json.loads(meshctl("waypoint", "list", "-o", "json")[1])["bindings"]
    assert (one["key"], one["gateway"], one["phase"], one["settled"]) == ("shop/web", "shop/wp", "enforced", True)
    found, out, _ = meshctl("waypoint", "status", "wp", "-n", "shop")
    assert found == 0
    assert [line.split() for line in out.splitlines()] == [
        ["KIND", "NAME", "WAYPOINT", "PHASE", "WAITS", "FOR"],
        ["Service", "shop/web", "shop/wp", "enforced", "-"],
        [],
        ["PROCESS", "WAYPOINT", "NODE", "ADDRESS", "SOFTWARE", "STATE", "NOTES"],
        ["shop/wp-1", "shop/wp", "-", "10.97.0.9", "1", "current", "-"],
    ]
    assert meshctl("label", "service", "web", f"{USE}-", "-n", "shop", "--wait", "20s")[0] == 0
    assert plane.core.progress()[0].state.phase.value == "lingering"


@pytest.mark.usefixtures("waypoint")
def test_label_wait_names_whom_it_waits_for_and_exits_3(meshctl):
    found, out, _ = meshctl("label", "service", "web", f"{USE}=wp", "-n", "shop", "--wait", "1s")
    assert found == 3
    assert "waits for shop/web (pending): a process of Gateway shop/wp: none is there" in out
    assert "not enforced everywhere after 1 s" in out
    found, out, _ = meshctl("waypoint", "list")
    assert found == 3
    assert "none is there" in out


@pytest.mark.usefixtures("waypoint")
def test_a_label_of_a_namespace_shows_what_it_touches(meshctl, plane):
    plane.core.apply([("ns.yaml", "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n")])
    found, out, _ = meshctl("label", "namespace", "shop", f"{USE}=wp", "--dry-run")
    assert found == 0
    assert "Service shop/web: waypoint shop/wp: pending\n" in out
    assert plane.core.progress() == []
    assert meshctl("label", "namespace", "shop", f"{USE}=wp")[0] == 0
    assert "Service shop/web: bound to no waypoint any more\n" in meshctl("label", "namespace", "shop", f"{USE}-")[1]


def test_other_labels_wait_too(meshctl):
    assert meshctl("label", "service", "web", "team=a", "-n", "shop", "--wait")[0] == 0


def test_a_gateway_that_is_not_there_is_refused_unless_forced(meshctl, plane):
    label = ("label", "service", "web", f"{USE}=nobody", "-n", "shop")
    found, _, err = meshctl(*label)
    assert found == 1
    assert "Service shop/web would be bound to Gateway shop/nobody, and there is none" in err
    assert plane.core.progress() == []
    assert meshctl(*label, "--force")[0] == 0
    assert len(plane.core.progress()) == 1


@pytest.mark.usefixtures("waypoint", "proxies")
def test_delete_needs_force_while_something_is_bound(meshctl):
    assert meshctl("label", "service", "web", f"{USE}=wp", "-n", "shop", "--wait", "20s")[0] == 0
    found, _, err = meshctl("waypoint", "delete", "wp", "-n", "shop")
    assert found == 1
    assert "Gateway shop/wp serves Service shop/web" in err
    assert meshctl("waypoint", "delete", "wp", "-n", "shop", "--force")[0] == 0


@pytest.mark.usefixtures("waypoint")
def test_a_canary_is_begun_shown_and_ended(meshctl, plane):
    assert meshctl("waypoint", "apply", "v2", "-n", "shop", "--instance", "v2-1=10.97.0.8")[0] == 0
    assert meshctl("label", "service", "web", f"{USE}=wp", "-n", "shop")[0] == 0
    for _ in range(3):
        follow(plane)
    canary = ("waypoint", "canary", "web", "-n", "shop")
    assert meshctl(*canary)[0] == meshctl(*canary, "v2=10", "--end")[0] == 1
    assert "is no percentage" in meshctl(*canary, "v2=101")[2]
    found, out, _ = meshctl(*canary, "v2=10", "--wait", "1s")
    assert found == 3
    assert "Service shop/web: waypoint shop/wp: enforced; canary shop/v2 (10 %): preparing" in out
    assert "waits for shop/web (enforced): " in out
    assert "a process of Gateway shop/v2 that has its configuration" in out
    for command in (("waypoint", "list"), ("waypoint", "status", "v2", "-n", "shop")):
        found, out, _ = meshctl(*command)
        assert found == 3
        assert "shop/wp, canary shop/v2 (10 %, preparing)" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["shop/wp-1", "shop/wp", "-", "10.97.0.9", "1"] in [row[:5] for row in rows]
    assert [row[:6] for row in rows if row[:1] == ["shop/v2-1"]] == [
        ["shop/v2-1", "shop/v2", "-", "10.97.0.8", "-", "absent"]
    ]
    assert meshctl(*canary, "--end")[0] == 0
    assert plane.core.progress()[0].state.trial is None


@pytest.mark.usefixtures("waypoint", "proxies")
def test_a_bypass_is_told_wherever_one_looks_and_ends(meshctl, plane):
    assert meshctl("label", "service", "web", f"{USE}=wp", "-n", "shop", "--wait", "20s")[0] == 0
    found, out, _ = meshctl("waypoint", "bypass", "web", "-n", "shop", "--for", "30m", "--reason", "it burns")
    assert (found, out) == (0, "Service shop/web is reached directly for 1800 s, as soon as every proxy knows\n")
    for command in (("waypoint", "list"), ("waypoint", "status", "wp", "-n", "shop"), ("status",)):
        found, out, _ = meshctl(*command)
        assert found == 3 or command == ("status",)
        assert "it burns" in out
    assert meshctl("waypoint", "bypass", "web", "-n", "shop", "--end")[0] == 0
    assert plane.core.bypasses() == {}


@pytest.mark.usefixtures("waypoint")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--for", "30m", "--reason", "x"), "is not bound to a waypoint"),
        (("--for", "30m"), "say why"),
        (("--for", "2d", "--reason", "x"), "at most 24 hours"),
    ],
)
def test_a_bypass_that_makes_no_sense_is_refused(meshctl, options, told):
    found, _, err = meshctl("waypoint", "bypass", "web", "-n", "shop", *options)
    assert found == 1
    assert told in err


def test_nothing_bound_is_said(meshctl):
    assert meshctl("waypoint", "list") == (0, "nothing is bound to a waypoint\n", "")


def test_processes_of_a_placement_are_declared_with_their_node_and_account(plane, meshctl):
    where = "--instance", "wp-a=10.97.1.9@host-a", "--placement", "node"
    status, out, _ = meshctl("waypoint", "apply", "wp", "-n", "shop", *where)
    assert status == 0
    assert "The node agent of host-a starts wp-a, if it runs with --waypoints. Else:\n" in out
    assert "waypoint run --join wp-a.token --state wp-a\n" in out
    (document,) = (text for place, text in plane.core.get("WorkloadEntry", "shop", "wp-a"))
    assert "kubernetes.io/hostname: host-a" in document
    assert "placement: node" in plane.core.get("Gateway", "shop", "wp")[0][1]
    assert meshctl("waypoint", "apply", "wp", "-n", "shop")[0] == 0
    assert "placement: node" in plane.core.get("Gateway", "shop", "wp")[0][1], "what is not asked for stays"
    where = "--instance", "web-a=10.97.1.8@host-a/web", "--placement", "service-account"
    out = meshctl("waypoint", "apply", "wp2", "-n", "shop", *where)[1]
    assert "waypoint run --join web-a.token --state web-a --gateway wp2\n" in out
    assert "serviceAccount: web" in plane.core.get("WorkloadEntry", "shop", "web-a")[0][1]
    for wrong in ("wp-a=10.97.1.9@", "wp-a=10.97.1.9@host-a/", "wp-a"):
        status, _, err = meshctl("waypoint", "apply", "wp", "-n", "shop", "--instance", wrong)
        assert status == 1
        assert "must be NAME=ADDRESS[@NODE[/ACCOUNT]]" in err


def test_of_a_waypoint_beside_each_workload_nothing_is_started(plane, meshctl):
    status, out, _ = meshctl("waypoint", "apply", "wp", "-n", "shop", "--placement", "sidecar")
    assert status == 0
    assert "Nothing to start" in out
    assert "meshctl label service SERVICE istio.io/use-waypoint=wp -n shop --wait" in out
    status, _, err = meshctl(
        "waypoint", "apply", "wp", "-n", "shop", "--placement", "sidecar", "--instance", "a=10.0.0.1"
    )
    assert status == 1
    assert "uProxies start the processes of placement sidecar themselves" in err
