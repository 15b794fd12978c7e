"""`meshctl` against a control plane: what an operator types, sees and gets as exit status."""

import json
import os
import re
import socket
import time

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from control.api.identity import SpiffeId, proxy_hash
from control.api.messages import Envelope, encode
from control.api.status import ADDRESSES, Kind, ProxyStatus, write
from control.api.token import JoinToken
from control.api.topics import StatusTopic, format_topic
from control.client.csr import request
from control.server.api import BrokerState
from tests.support.certificates import DB, WEB
from tests.support.desired import grant, route, service
from tests.support.operators import URL

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
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: db-1, namespace: shop}
spec: {address: 10.97.0.2, serviceAccount: db}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  rules: [{from: [{source: {serviceAccounts: [db]}}]}]
"""


@pytest.fixture
def mesh(tmp_path):
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH)
    return path


@pytest.fixture
def applied(meshctl, mesh):
    assert meshctl("apply", "-f", mesh)[0] == 0
    return mesh


# -- apply, diff, delete


def test_apply_tells_what_it_did_and_then_that_nothing_is_left_to_do(meshctl, mesh):
    status, out, err = meshctl("apply", "-f", mesh)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["CHANGE", "KIND", "NAMESPACE", "NAME"]
    assert [line.split() for line in lines[1:5]] == [
        ["added", "Service", "shop", "web"],
        ["added", "WorkloadEntry", "shop", "web-1"],
        ["added", "WorkloadEntry", "shop", "db-1"],
        ["added", "AuthorizationPolicy", "shop", "only-web"],
    ]
    assert re.fullmatch(r"done: 4 added; version \d+\.\d+", lines[5])
    assert meshctl("apply", "-f", mesh) == (0, "done: 4 unchanged\n", "")


def test_apply_for_programs(meshctl, mesh):
    status, out, err = meshctl("apply", "-f", mesh, "-o", "json")
    assert (status, err) == (0, "")
    answer = json.loads(out)
    assert [entry["change"] for entry in answer["changes"]] == ["added"] * 4
    assert len(answer["version"]) == 2
    assert answer["dry_run"] is False


def test_a_dry_run_shows_everything_and_changes_nothing(meshctl, mesh, plane):
    status, out, _ = meshctl("apply", "-f", mesh, "--dry-run")
    assert status == 0
    assert "would be: 4 added (dry run: nothing was changed)" in out
    assert plane.core.get() == []
    assert plane.admissions == []


def test_an_error_is_told_with_file_and_line_and_nothing_is_changed(meshctl, mesh, plane):
    mesh.write_text(MESH.replace("address: 10.97.0.2", "address: 10.97.0.999"))
    status, out, err = meshctl("apply", "-f", mesh)
    assert (status, out) == (1, "refused: 1 error; nothing was changed\n")
    assert err.startswith(f"error: {mesh}:17: spec.address: ")
    assert plane.core.get() == []
    status, out, err = meshctl("apply", "-f", mesh, "-o", "json")
    assert (status, err) == (1, "")
    (error,) = json.loads(out)["errors"]
    assert (error["file"], error["line"], error["field"]) == (str(mesh), 17, "spec.address")


def test_a_conflict_with_what_is_applied_is_told_where_it_stands(meshctl, applied, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {name: web-2, namespace: shop}\n"
        "spec: {address: 10.97.0.1, serviceAccount: web}\n"
    )
    status, _, err = meshctl("apply", "-f", other)
    assert status == 1
    assert f"error: {other}:4: spec.address: 10.97.0.1" in err
    assert "web-1" in err


def test_a_file_that_cannot_be_read_is_told_before_anything_is_asked(meshctl, tmp_path):
    status, _, err = meshctl("apply", "-f", tmp_path / "no.yaml")
    assert (status, err) == (1, f"error: {tmp_path / 'no.yaml'}: cannot be read: No such file or directory\n")


def test_a_directory_stands_for_its_yaml_files(meshctl, tmp_path):
    directory = tmp_path / "resources"
    directory.mkdir()
    service, web, *_ = MESH.split("---\n")
    (directory / "a.yaml").write_text(service)
    (directory / "b.yml").write_text(web)
    (directory / "README.txt").write_text("not a resource")
    assert meshctl("apply", "-f", directory)[0] == 0
    assert meshctl("diff", "-f", directory)[0] == 0
    (tmp_path / "empty").mkdir()
    status, _, err = meshctl("apply", "-f", tmp_path / "empty")
    assert status == 1
    assert "holds no *.yaml" in err


def test_warnings_are_told_and_do_not_refuse(meshctl, mesh):
    mesh.write_text(MESH.replace("{app: web}}\n  rules", "{app: nobody}}\n  rules"))
    status, _, err = meshctl("apply", "-f", mesh)
    assert status == 0
    assert err.startswith(f"warning: {mesh}:23: spec.selector: selects no WorkloadEntry")


def test_diff_shows_what_apply_would_change_and_says_so_by_its_status(meshctl, applied, plane):
    assert meshctl("diff", "-f", applied) == (0, "would be: 4 unchanged (dry run: nothing was changed)\n", "")
    applied.write_text(MESH.replace("port: 80,", "port: 8000,"))
    before = plane.store.stamp()
    status, out, _ = meshctl("diff", "-f", applied)
    assert status == 3
    assert "--- Service shop/web (now)" in out
    assert [line for line in out.splitlines() if re.match(r"[-+] ", line)] == ["-    port: 80", "+    port: 8000"]
    assert "1 changed, 3 unchanged" in out
    assert meshctl("diff", "-f", applied, "-o", "json")[0] == 3
    assert plane.store.stamp() == before


def test_diff_of_what_would_be_refused_is_refused(meshctl, applied):
    applied.write_text("kind: Nonsense\n")
    assert meshctl("diff", "-f", applied)[0] == 1


def test_delete_by_name_in_either_form(meshctl, applied, plane):
    status, out, err = meshctl("delete", "policy", "only-web", "-n", "shop")
    assert (status, err) == (0, "")
    assert ["removed", "AuthorizationPolicy", "shop", "only-web"] in [line.split() for line in out.splitlines()]
    assert meshctl("delete", "we/db-1", "svc/web", "-n", "shop")[0] == 0
    assert [place for place, _ in plane.core.get()] == [("WorkloadEntry", "shop", "web-1")]


def test_delete_of_what_is_not_there_changes_nothing(meshctl, applied, plane):
    status, out, err = meshctl("delete", "workload", "web-1", "web-9", "-n", "shop")
    assert (status, out, err) == (1, "", "error: there is no WorkloadEntry shop/web-9\n")
    assert len(plane.core.get()) == 4
    assert meshctl("delete", "workload", "web-1")[0] == 1  # of namespace default


def test_delete_what_files_declare(meshctl, applied, plane):
    assert "4 removed" in meshctl("delete", "-f", applied, "--dry-run", "--release")[1]
    assert len(plane.core.get()) == 4
    assert meshctl("delete", "-f", applied, "--release")[0] == 0
    assert plane.core.get() == []


WORKLOAD = """\
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: w-{0}, namespace: shop}}
spec: {{address: 10.98.0.{0}}}
"""


def test_much_at_a_stroke_is_held_until_it_is_released(meshctl, mesh, plane):
    mesh.write_text("".join(map(WORKLOAD.format, range(1, 7))))
    assert meshctl("apply", "-f", mesh)[0] == 0
    names = [f"w-{n}" for n in range(1, 6)]
    for dry in ((), ("--dry-run",)):
        status, _, err = meshctl("delete", "workload", *names, "-n", "shop", *dry)
        assert status == 1
        assert "5 of the 6" in err
        assert "--release" in err
    assert len(plane.core.get()) == 6
    assert meshctl("delete", "workload", *names, "-n", "shop", "--release")[0] == 0


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("delete",), "name what to delete"),
        (("delete", "service"), "which service?"),
        (("delete", "servise", "x"), "did you mean 'service'?"),
        (("delete", "service/a", "b"), "must be KIND/NAME"),
        (("delete", "service", "a", "-f", "x"), "name what to delete"),
        (("get", "nonsense"), "no kind 'nonsense'"),
        (("get", "service/a", "b"), "leave 'b' out"),
        (("label", "service", "web"), "name one resource, then what to set"),
        (("label", "service", "web", "a=b", "c"), "is no KEY=VALUE"),
        (("label", "service", "web", "db", "a=b"), "name one at a time"),
        (("label", "service", "web", "a=b", "a-"), "given twice"),
        (("label", "a=b"), "name one resource"),
        (("token", "create"), "name a workload"),
        (("token", "create", "web-1", "--node", "a"), "name a workload"),
        (("token", "create", "--node", "a", "--address", "10.0.0.1"), "leave the options out"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(meshctl, argv, told):
    status, out, err = meshctl(*argv)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err


# -- get


def test_get_shows_what_became_of_resources(meshctl, applied):
    status, out, err = meshctl("get", "services", "-n", "shop")
    assert (status, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["SERVICE", "NAMESPACE", "ADDRESSES", "PORTS", "ENDPOINTS"],
        ["web", "shop", "240.240.0.10", "80", "1"],
    ]
    assert meshctl("get", "services") == (0, "nothing in namespace default\n", "")
    assert "web" in meshctl("get", "svc", "-A")[1]


def test_get_tells_ports_whose_datagrams_pass_from_the_others(meshctl, applied):
    applied.write_text(service("dns", vip="240.240.0.53", datagrams=53))
    assert meshctl("apply", "-f", applied)[0] == 0
    assert "240.240.0.53  80,53/UDP  0" in meshctl("get", "service", "dns", "-n", "shop")[1]


def test_get_all_is_a_table_for_each_kind(meshctl, applied):
    out = meshctl("get", "all", "-n", "shop")[1]
    policies, services, workloads = out.strip().split("\n\n")
    assert policies.splitlines()[1].split() == ["only-web", "shop", "ALLOW", "1", "app=web"]
    assert services.startswith("SERVICE ")
    assert [line.split() for line in workloads.splitlines()[1:]] == [
        ["db-1", "shop", "10.97.0.2", "db", "-"],
        ["web-1", "shop", "10.97.0.1", "web", "-"],
    ]


def test_get_tells_the_conditions_of_a_route(meshctl, applied, tmp_path):
    path = tmp_path / "route.yaml"
    path.write_text(
        route("web", "web", ["web"]).replace("[{name: web, port: 80}]", "[{name: far, namespace: far, port: 80}]")
        + "---\n"
        + service("far", namespace="far")
    )
    assert meshctl("apply", "-f", path)[0] == 0
    table = meshctl("get", "httproutes", "-n", "shop")[1].splitlines()
    assert table[0].split()[:3] == ["HTTPROUTE", "NAMESPACE", "PARENTS"]
    assert table[1].split() == ["web", "shop", "shop/web:*", "True", "RefNotPermitted", "NoWaypoint"]
    path.write_text(grant("from-shop", "far", "far"))
    assert meshctl("apply", "-f", path)[0] == 0
    (found,) = json.loads(meshctl("get", "httproute", "web", "-n", "shop", "-o", "json")[1])["resources"]
    (parent,) = found["parents"]
    assert (parent["service"], parent["port"]) == ("shop/web", 0)
    assert [(one["type"], one["status"], one["reason"]) for one in parent["conditions"][:2]] == [
        ("Accepted", True, "Accepted"),
        ("ResolvedRefs", True, "ResolvedRefs"),
    ]


def test_get_one_for_programs_and_as_applied(meshctl, applied, tmp_path):
    (service,) = json.loads(meshctl("get", "service", "web", "-n", "shop", "-o", "json")[1])["resources"]
    assert service["vips"] == ["240.240.0.10"]
    assert service["endpoints"] == 1
    again = tmp_path / "again.yaml"
    again.write_text(meshctl("get", "all", "-n", "shop", "-o", "yaml")[1])
    assert meshctl("diff", "-f", again)[0] == 0


@pytest.mark.parametrize(
    "line",
    [
        "get service web -n shop",
        "get service -n shop web",
        "get -n shop service web",
        "get -n shop service/web",
        "label service -n shop web --dry-run a=b",
        "label service web -n shop a=b --dry-run",
        "label -n shop --dry-run svc/web a=b",
        "delete -n shop workload db-1 --dry-run web-1",
        "delete --dry-run we/db-1 -n shop we/web-1",
        "token create web-1 -n shop",
        "token create -n shop web-1 --ttl 90s",
    ],
)
def test_options_may_stand_wherever_people_type_them(meshctl, applied, line):
    status, out, err = meshctl(*line.split())
    assert status == 0, err
    assert out


def test_get_of_one_that_is_not_there_fails(meshctl, applied):
    assert meshctl("get", "service", "db", "-n", "shop") == (1, "", "error: there is no Service db in namespace shop\n")
    assert meshctl("get", "service/db", "-A")[0] == 1


# -- label and annotate


def test_a_label_is_set_kept_and_removed(meshctl, applied, plane):
    def labels():
        ((_, text),) = plane.core.get("Service", "shop", "web")
        return re.findall(r"team: (\w+)", text)

    status, out, _ = meshctl("label", "service", "web", "team=blue", "-n", "shop")
    assert status == 0
    assert "1 changed" in out
    assert labels() == ["blue"]
    status, _, err = meshctl("label", "service/web", "team=red", "-n", "shop")
    assert (status, err) == (1, "error: Service shop/web has team=blue already; --overwrite replaces it\n")
    assert labels() == ["blue"]
    assert meshctl("label", "service/web", "team=blue", "-n", "shop")[1] == "done: 1 unchanged\n"
    assert meshctl("label", "service/web", "team=red", "-n", "shop", "--overwrite", "--dry-run")[0] == 0
    assert labels() == ["blue"]
    assert meshctl("label", "service/web", "team=red", "-n", "shop", "--overwrite")[0] == 0
    assert labels() == ["red"]
    assert meshctl("label", "service/web", "team-", "-n", "shop")[0] == 0
    assert labels() == []


def test_an_annotation_is_set(meshctl, applied, plane):
    assert meshctl("annotate", "service", "web", "example.com/why=a b=c", "-n", "shop")[0] == 0
    assert 'example.com/why: "a b=c"' in plane.core.get("Service", "shop", "web")[0][1]


def test_a_label_that_the_mesh_does_not_take_is_refused(meshctl, applied):
    status, _, err = meshctl("label", "service", "web", "istio.io/dataplane-mode=none", "-n", "shop")
    assert status == 1
    assert "every declared workload is in the mesh" in err
    assert meshctl("label", "service", "nobody", "a=b", "-n", "shop")[0] == 1


# -- tokens


def test_a_token_is_for_the_workload_as_it_is_declared(meshctl, applied, plane):
    status, out, err = meshctl("token", "create", "web-1", "-n", "shop")
    assert status == 0
    token = JoinToken.decode(out)
    assert token.url == URL
    assert err.startswith(f"for {WEB}, web-1, 10.97.0.1; one use, until ")
    assert out.count("\n") == 1

    issued = plane.enrolment.join(token.id, token.secret, request(ec.generate_private_key(ec.SECP256R1()), None))
    assert issued.member.identity == WEB
    assert issued.member.addresses == ("10.97.0.1",)


def test_the_broker_knows_whom_a_token_is_for_before_the_token_is_told(meshctl, plane):
    meshctl("token", "create", "--node", "host-a")
    assert plane.admissions == ["spiffe://cluster.local/ns/mesh-system/sa/node-host-a"]


def test_a_token_for_programs_and_in_a_file(meshctl, applied, tmp_path):
    answer = json.loads(meshctl("token", "create", "web-1", "-n", "shop", "-o", "json", "--ttl", "90s")[1])
    assert answer["identity"] == str(WEB)
    assert JoinToken.decode(answer["token"]).url == URL
    out = tmp_path / "web.token"
    status, printed, _ = meshctl("token", "create", "web-1", "-n", "shop", "--out", out)
    assert (status, printed) == (0, "")
    assert os.stat(out).st_mode & 0o777 == 0o600
    JoinToken.decode(out.read_text())
    answer = json.loads(meshctl("token", "create", "web-1", "-n", "shop", "--out", out, "-o", "json")[1])
    assert answer["token"] == str(out)


def test_a_token_for_a_workload_to_come_needs_to_be_told_who_it_is(meshctl):
    status, _, err = meshctl("token", "create", "web-1", "-n", "shop")
    assert status == 1
    assert "there is no WorkloadEntry shop/web-1; apply it, or give --service-account and --address" in err
    assert meshctl("token", "create", "web-1", "-n", "shop", "--service-account", "web")[0] == 1
    assert meshctl("token", "create", "web-1", "-n", "shop", "--address", "10.97.0.1")[0] == 1
    create = ("token", "create", "web-1", "-n", "shop", "--service-account", "web", "--address")
    assert meshctl(*create, "10.97.0.1")[0] == 0
    assert meshctl(*create, "nonsense")[0] == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--service-account", "db"), "has service account web, not db"),
        (("--address", "10.97.0.9"), "has addresses 10.97.0.1, not 10.97.0.9"),
        (("--ttl", "25h"), "lives between one second and 24 h"),
        (("--ttl", "0s"), "lives between one second and 24 h"),
    ],
)
def test_a_token_never_says_otherwise_than_what_is_declared(meshctl, applied, options, told):
    status, _, err = meshctl("token", "create", "web-1", "-n", "shop", *options)
    assert status == 1
    assert told in err


@pytest.mark.parametrize("argv", [("--node", "Host A"), ("web_1", "-n", "shop"), ("web-1", "-n", "Shop"), ("../x",)])
def test_a_token_is_for_a_name_that_can_be_one(meshctl, argv):
    more = () if "--node" in argv else ("--service-account", "web", "--address", "10.0.0.1")
    status, _, err = meshctl("token", "create", *argv, *more)
    assert status == 1
    assert "must be" in err


@pytest.mark.parametrize("account", ["control-plane", "broker"])
def test_no_token_makes_a_control_plane(meshctl, account):
    status, _, err = meshctl(
        "token", "create", "x", "-n", "mesh-system", "--service-account", account, "--address", "10.0.0.1"
    )
    assert status == 1
    assert "control plane's own" in err


# -- status


def report(plane, identity, workload, **changed):
    """A proxy's status, as it comes from the broker."""
    now = int(time.time())
    status = {
        "kind": Kind.UPROXY,
        "workload": workload,
        "version": "0.2.0",
        "online": True,
        "whole": True,
        "waiting": (),
        "roots": {},
        "applied_at": now,
        "serial": "ab12",
        "not_after": now + 80_000,
        "problems": (),
    }
    topic = StatusTopic(proxy_hash(identity), workload.partition("/")[2])
    payload = encode(Envelope(now, 1, now, write(ProxyStatus(**{**status, **changed}))))
    plane.core.status_received(format_topic(identity.trust_domain, topic), payload)


def rows_of(out: str) -> dict[str, list[str]]:
    table = out.split("\n\n", 1)[1]
    return {line.split()[0]: line.split() for line in table.splitlines()[1:]}


def test_status_of_a_mesh_that_is_as_it_should_be(meshctl, applied, plane):
    roots = plane.core.roots()
    for identity, workload in ((WEB, "shop/web-1"), (DB, "shop/db-1")):
        report(plane, identity, workload, roots={"shop": roots["shop"], ADDRESSES: roots[ADDRESSES]})
    status, out, err = meshctl("status")
    assert (status, err) == (0, "")
    epoch, version = plane.store.stamp()
    assert out.startswith(f"mesh cluster.local: version {epoch}.{version}, ")
    assert "broker connected, all is published" in out
    row = rows_of(out)["shop/web-1"]
    assert row[1:4] == ["uproxy", "current", f"{epoch}.{version}"]
    assert row[5:8] == ["22h", "0.2.0", "-"]
    answer = json.loads(meshctl("status", "-o", "json")[1])
    assert answer["ok"] is True
    assert {proxy["workload"]: proxy["state"] for proxy in answer["proxies"]} == {
        "shop/db-1": "current",
        "shop/web-1": "current",
    }


@pytest.mark.parametrize(
    ("changed", "state", "note"),
    [
        ({"online": False}, "offline", "-"),
        ({"whole": False, "waiting": ("root of shop",)}, "waiting", "waits for root of shop"),
        ({"roots": {"shop": (1, 1, 1)}}, "behind", "behind in shop"),
        ({"problems": ("policy/x: altered",)}, "current", "policy/x: altered"),
    ],
)
def test_status_says_what_is_wrong_with_a_proxy(meshctl, applied, plane, changed, state, note):
    report(plane, DB, "shop/db-1")
    report(plane, WEB, "shop/web-1", **changed)
    status, out, _ = meshctl("status")
    row = rows_of(out)["shop/web-1"]
    assert row[2] == state
    assert " ".join(row[7:]) == note
    assert status == (0 if state == "current" else 3)


def test_a_proxy_that_says_nothing_for_a_minute_is_silent_and_one_never_seen_absent(meshctl, applied, plane):
    report(plane, WEB, "shop/web-1")
    plane.clock = lambda: time.time() + 61
    status, out, _ = meshctl("status")
    assert status == 3
    assert rows_of(out)["shop/web-1"][2] == "silent"
    assert rows_of(out)["shop/db-1"][:3] == ["shop/db-1", "-", "absent"]


def test_a_workload_that_is_deleted_is_absent_no_more(meshctl, applied, plane):
    report(plane, WEB, "shop/web-1")
    meshctl("delete", "workload", "db-1", "-n", "shop")
    assert rows_of(meshctl("status")[1]).keys() == {"shop/web-1"}


def test_a_workload_that_is_deleted_and_gone_is_no_trouble(meshctl, applied, plane):
    report(plane, WEB, "shop/web-1")
    meshctl("delete", "workload", "db-1", "-n", "shop")
    for change, shown in (({}, True), ({"whole": False}, True), ({"online": False}, False)):
        report(plane, DB, "shop/db-1", **change)
        status, out, _ = meshctl("status")
        assert ("shop/db-1" in rows_of(out)) is shown
    assert status == 0


def test_a_node_agent_that_is_gone_is_told_of(meshctl, plane):
    node = SpiffeId.parse("spiffe://cluster.local/ns/mesh-system/sa/node-a")
    report(plane, node, "mesh-system/node-a", kind=Kind.NODE, online=False)
    status, out, _ = meshctl("status")
    assert rows_of(out)["mesh-system/node-a"][1:3] == ["node", "offline"]
    assert status == 3


def test_nobody_reports_for_another(meshctl, applied, plane):
    report(plane, DB, "shop/db-1")
    report(plane, DB, "shop/web-1")
    status, out, _ = meshctl("status")
    states = [line.split()[2] for line in out.splitlines() if line.startswith("shop/web-1 ")]
    assert sorted(states) == ["absent", "current"]
    assert "reports under another identity" in out
    assert status == 3


def test_age_is_that_of_the_oldest_root_and_a_root_that_was_only_signed_again_is_no_newer(meshctl, applied, plane):
    roots, now = plane.core.roots(), int(time.time())
    old = {name: (*roots[name][:2], now - age) for name, age in (("shop", 7200), (ADDRESSES, 60))}
    report(plane, WEB, "shop/web-1", roots=old)
    row = rows_of(meshctl("status")[1])["shop/web-1"]
    assert row[2] == "current"
    assert row[4] == "2h"


def test_status_is_not_well_until_all_is_published(meshctl, plane):
    plane.broker = BrokerState(connected=True, problem="", published=False)
    status, out, _ = meshctl("status")
    assert status == 3
    assert "broker connected, something waits to be published" in out


def test_status_says_that_the_broker_is_away(meshctl, plane):
    plane.broker = BrokerState(connected=False, problem="connection refused", published=False)
    status, out, _ = meshctl("status")
    assert status == 3
    assert "broker not connected: connection refused; something waits to be published" in out


# -- the socket


def test_no_control_plane_is_an_exit_status_of_its_own(meshctl, tmp_path):
    for argv in (("status",), ("get", "all"), ("apply", "-f", "-")):
        if argv[0] == "apply":
            (tmp_path / "x.yaml").write_text(MESH)
            argv = ("apply", "-f", tmp_path / "x.yaml")
        status, out, err = meshctl(*argv, "--socket", tmp_path / "no.sock")
        assert (status, out) == (4, "")
        assert err.startswith(f"error: no control plane at {tmp_path / 'no.sock'}; is `meshctl up` running?")


def test_a_socket_that_nobody_serves_is_told(meshctl, plane, tmp_path):
    left = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(left))
    assert meshctl("status", "--socket", left)[0] == 4
