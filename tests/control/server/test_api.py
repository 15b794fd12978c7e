"""The operators' interface as a program uses it: its socket, and what it refuses."""

import http.client
import json
import os
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from control.server import api
from control.server.api import SocketError, listen
from control.server.registry import NotFound
from tests.support.operators import operated

WORKLOAD = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: w-{0}, namespace: shop}}
spec: {{address: 10.98.0.{0}, serviceAccount: w}}
"""


@pytest.fixture
def ask(plane):
    """One exchange: status and answer."""

    def ask(method: str, path: str, body: object = None) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(30)
        connection.sock.connect(str(plane.socket))
        try:
            content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, content)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    return ask


def documents(*numbers: int) -> list[dict]:
    return [{"file": f"{number}.yaml", "text": WORKLOAD.format(number)} for number in numbers]


# -- requests


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "told"),
    [
        ("GET", "/", None, 404, "there is no GET /"),
        ("PUT", "/v1/apply", None, 404, "there is no PUT /v1/apply"),
        ("POST", "/v1/apply", b"", 400, "'documents' is missing"),
        ("POST", "/v1/apply", b"nonsense", 400, "is not JSON"),
        ("POST", "/v1/apply", b"[" * 100_000, 400, "is not JSON"),
        ("POST", "/v1/apply", b"\xff", 400, "is not JSON"),
        ("POST", "/v1/apply", [], 400, "must be a JSON object"),
        ("POST", "/v1/apply", {}, 400, "'documents' is missing"),
        ("POST", "/v1/apply", {"documents": "x"}, 400, "'documents' must be of type list"),
        ("POST", "/v1/apply", {"documents": ["x"]}, 400, "must hold objects"),
        ("POST", "/v1/apply", {"documents": [{"file": "x"}]}, 400, "'text' is missing"),
        ("POST", "/v1/apply", {"documents": [{"file": "x", "text": 1}]}, 400, "'text' must be of type str"),
        ("POST", "/v1/apply", {"documents": [{"file": "x", "text": "", "more": 1}]}, 400, "'more' is not known"),
        ("POST", "/v1/apply", {"documents": [], "dry_run": 1}, 400, "'dry_run' must be of type bool"),
        ("POST", "/v1/apply", {"documents": [], "dryrun": True}, 400, "'dryrun' is not known"),
        ("POST", "/v1/delete", {"references": [{"kind": "Service"}]}, 400, "'namespace' is missing"),
        ("POST", "/v1/relabel", {"reference": {}}, 400, "'kind' is missing"),
        ("POST", "/v1/tokens", {}, 400, "'namespace' is missing"),
        ("POST", "/v1/tokens", {"node": "a", "workload": "x"}, 400, "'workload' is not known"),
        ("POST", "/v1/tokens", {"node": "a", "ttl_s": True}, 400, "'ttl_s' must be of type int"),
        ("POST", "/v1/tokens", {"node": "a", "ttl_s": 2**80}, 400, "lives between"),
        ("GET", "/v1/resources?kinds=Service", None, 400, "'kinds' is not known"),
        ("GET", "/v1/status?x=y", None, 400, "'x' is not known"),
    ],
)
def test_what_is_not_understood_is_refused_and_says_why(ask, plane, method, path, body, status, told):
    answer = ask(method, path, body)
    assert answer[0] == status
    assert answer[1].keys() == {"error"}
    assert told in answer[1]["error"]
    assert plane.core.get() == []


@pytest.mark.parametrize("values", [{"a": 1}, {"a": ["b"]}, {"a": True}])
def test_labels_are_texts(ask, values):
    reference = {"kind": "Service", "namespace": "shop", "name": "web"}
    answer = ask("POST", "/v1/relabel", {"reference": reference, "labels": values})
    assert answer == (400, {"error": "labels and annotations are texts, or null to remove one"})


def test_a_fault_of_ours_is_an_answer_and_no_more(ask, plane, caplog):
    plane.core.get = None
    assert ask("GET", "/v1/resources")[0] == 500
    assert "GET /v1/resources failed" in caplog.text
    del plane.core.get
    assert ask("GET", "/v1/resources") == (200, {"resources": []})


def test_a_body_beyond_the_bound_is_refused(ask, monkeypatch, ca, authority, tmp_path):
    monkeypatch.setattr(api, "MAX_BODY_BYTES", 1000)
    with operated(ca, authority, tmp_path / "small") as plane:
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(plane.socket))
        connection.request("POST", "/v1/apply", b" " * 2000)
        assert connection.getresponse().status == 413
        connection.close()


def test_changes_of_many_operators_at_once_all_count(ask, plane):
    def apply(number: int) -> int:
        return ask("POST", "/v1/apply", {"documents": documents(number)})[0]

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(apply, range(1, 25))) == {200}
    assert len(plane.core.get("WorkloadEntry")) == 24


def test_two_that_set_one_label_at_once_are_not_both_told_that_they_did(ask, plane, monkeypatch):
    ask("POST", "/v1/apply", {"documents": documents(1)})
    look = plane.core.get

    def get(*place):
        found = look(*place)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(plane.core, "get", get)
    reference = {"kind": "WorkloadEntry", "namespace": "shop", "name": "w-1"}
    barrier = threading.Barrier(8)

    def label(number: int) -> int:
        barrier.wait(60)
        return ask("POST", "/v1/relabel", {"reference": reference, "labels": {"owner": f"o{number}"}})[0]

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(label, range(8))) == [200] + [409] * 7


def test_whoever_waits_for_a_turn_keeps_nobody_else_waiting(ask, plane, monkeypatch):
    entered, go_on = threading.Event(), threading.Event()

    def apply(files, **_):
        entered.set()
        assert go_on.wait(60)
        raise NotFound("nothing, for this test")

    monkeypatch.setattr(plane.core, "apply", apply)
    with ThreadPoolExecutor(20) as pool:
        waiting = [pool.submit(ask, "POST", "/v1/apply", {"documents": []}) for _ in range(20)]
        assert entered.wait(60)
        for _ in range(3):
            assert ask("GET", "/v1/status")[0] == 200
        assert not any(one.done() for one in waiting)
        go_on.set()
        assert {one.result()[0] for one in waiting} == {404}


def test_the_broker_lets_in_who_gets_a_token_before_it_is_answered_and_the_rest_when_it_may(ask, plane):
    ask("POST", "/v1/apply", {"documents": documents(1), "dry_run": True})
    assert plane.changes == 0
    ask("POST", "/v1/apply", {"documents": documents(1)})
    assert plane.changes == 1
    ask("POST", "/v1/tokens", {"namespace": "shop", "workload": "w-1"})
    assert plane.admissions == ["spiffe://cluster.local/ns/shop/sa/w"]
    delete = {"references": [{"kind": "WorkloadEntry", "namespace": "shop", "name": "w-1"}]}
    ask("POST", "/v1/delete", delete)
    assert plane.changes == 2


def test_an_answer_comes_while_a_large_change_is_made(ask, plane):
    mesh = "---\n".join(
        WORKLOAD.format(n).replace("10.98.0.", f"10.98.{n >> 8}.").replace(f".{n},", f".{n & 255},")
        for n in range(1, 3000)
    )
    applied = []
    thread = threading.Thread(
        target=lambda: applied.append(ask("POST", "/v1/apply", {"documents": [{"file": "x", "text": mesh}]}))
    )
    thread.start()
    answers = 0
    while thread.is_alive():
        assert ask("GET", "/v1/status")[0] == 200
        answers += 1
    thread.join()
    assert applied[0][0] == 200, applied
    assert answers > 3


def test_the_log_tells_who_did_what_and_no_secret(ask, caplog):
    caplog.set_level("INFO", "control.server.api")
    who = f"user {os.getuid()} (process {os.getpid()})"
    ask("POST", "/v1/apply", {"documents": documents(1), "dry_run": True})
    assert caplog.messages == []
    ask("POST", "/v1/apply", {"documents": documents(1)})
    assert caplog.messages[-1] == f"{who} added WorkloadEntry shop/w-1"
    ask("POST", "/v1/apply", {"documents": documents(1)})
    assert len(caplog.messages) == 1
    ask("POST", "/v1/apply", {"documents": documents(*range(2, 30))})
    assert caplog.messages[-1].endswith("added WorkloadEntry shop/w-21 and 8 more")
    token = ask("POST", "/v1/tokens", {"node": "a"})[1]["token"]
    assert caplog.messages[-1].startswith(f"{who} made a token for workload node-a of spiffe://")
    assert token not in caplog.text


# -- the socket


def test_the_socket_is_for_its_owner_and_group(plane):
    status = os.stat(plane.socket)
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert sorted(path.name for path in plane.socket.parent.iterdir() if ".sock" in path.name) == ["control.sock"]


def test_the_socket_of_a_control_plane_that_is_gone_is_taken_over(tmp_path):
    path = tmp_path / "run" / "control.sock"
    listen(path).close()
    assert path.is_socket()
    with listen(path) as listening, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert not listening.getblocking()


def test_the_socket_of_one_that_runs_is_left_alone(plane, ask):
    with pytest.raises(SocketError, match="another control plane listens"):
        listen(plane.socket)
    assert ask("GET", "/v1/resources")[0] == 200


def test_a_file_in_the_sockets_place_is_left_alone(tmp_path):
    path = tmp_path / "control.sock"
    path.write_text("precious")
    with pytest.raises(SocketError, match="is no socket"):
        listen(path)
    assert path.read_text() == "precious"


def test_nothing_is_left_of_a_socket_that_could_not_be_made(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(SocketError, match="No space left"):
        listen(tmp_path / "control.sock")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_too_long_for_a_socket_is_told(tmp_path):
    with pytest.raises(SocketError, match="cannot listen"):
        listen(tmp_path / ("x" * 100) / "control.sock")
