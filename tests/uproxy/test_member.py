"""`uproxy run` as a member of a mesh: from the token to the drain, with and without anybody who answers."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import hbone
from tests.support.certificates import DB, WEB
from tests.support.member_site import MemberSite
from tests.support.site import dial, echo_server, eventually, get
from uproxy.member import STATE_FILE
from uproxy.tls import Credentials, client_context

NETWORK = "127.0.84"

DENY_WEB = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-web, namespace: shop}
spec:
  action: DENY
  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]}]
"""

UNHEARD_OF = """
apiVersion: v1
kind: Service
metadata: {name: unheard-of, namespace: shop}
spec: {selector: {app: nobody}, ports: [{port: 80}]}
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[MemberSite]:
    with MemberSite.running_in(tmp_path, NETWORK) as made, echo_server(made.application):
        yield made


@pytest.fixture
def running(site: MemberSite) -> Iterator[tuple[MemberSite, subprocess.Popen[str], subprocess.Popen[str]]]:
    with ExitStack() as stack:
        for name in ("db", "web"):
            site.token_file(name)
        db = stack.enter_context(site.running("db"))
        web = stack.enter_context(site.running("web"))
        yield site, web, db


def control_of(site: MemberSite, name: str) -> dict[str, object]:
    dump: dict[str, object] = json.loads(get(site.address(name), 15000, "/config_dump")[1])["control"]
    return dump


def knows(site: MemberSite, name: str, text: bytes) -> bool:
    """Whether the last good configuration on disk has this in it."""
    state = site.path / name / "state"
    return state.exists() and text in state.read_bytes()


def served(site: MemberSite) -> bool:
    try:
        return dial(site.forward) == b"hello"
    except ConnectionError:
        return False


def test_from_token_to_traffic_and_what_it_tells_of_itself(running: tuple[MemberSite, object, object]) -> None:
    site, *_ = running
    assert dial(site.forward) == b"hello"
    eventually(
        lambda: 'src.workload="web"' in site.log("db") and 'dst.service="db.shop.svc.cluster.local"' in site.log("db")
    )
    dump = control_of(site, "web")
    assert dump["connected"] is True
    assert dump["whole"] is True
    assert dump["waiting"] == []
    assert dump["problems"] == []
    assert dump["services"] == ["shop/db"]
    metrics = get(site.address("web"), 15020, "/metrics")[1]
    assert "\nuproxy_config_whole 1\n" in metrics
    assert "\nuproxy_control_connected 1\n" in metrics
    assert "\nuproxy_demanded_services 1\n" in metrics
    roots = site.control.plane.core.roots()
    for identity, name in ((WEB, "web"), (DB, "db")):
        eventually(lambda identity=identity, name=name: (s := site.control.status(identity, name)) and s.whole)
        status = site.control.status(identity, name)
        assert status is not None
        assert status.online
        assert status.roots["shop"][:2] == roots["shop"][:2]


def test_a_change_that_concerns_others_is_reported_too(running: tuple[MemberSite, object, object]) -> None:
    """Else `meshctl status` would show a proxy behind until its next regular report."""
    site, *_ = running
    assert dial(site.forward) == b"hello"
    for deleted in (False, True):
        if deleted:
            site.control.delete("Service", "shop", "unheard-of")
        else:
            site.control.apply(UNHEARD_OF)
        root = site.control.plane.core.roots()["shop"]
        for identity, name in ((WEB, "web"), (DB, "db")):
            eventually(
                lambda identity=identity, name=name, root=root: (
                    (s := site.control.status(identity, name)) and s.roots.get("shop", ())[:2] == root[:2]
                ),
                5,
            )


def test_a_policy_is_in_force_at_once_also_on_connections_that_are_open(
    running: tuple[MemberSite, object, object],
) -> None:
    site, *_ = running
    with socket.create_connection(site.forward, timeout=30) as app:
        app.sendall(b"a")
        assert app.recv(1) == b"a"
        site.control.apply(DENY_WEB)
        with pytest.raises(ConnectionResetError):
            app.recv(1)
    assert not served(site)
    eventually(lambda: "policy: " in site.log("db") and "shop/no-web" in site.log("db"))
    site.control.delete("AuthorizationPolicy", "shop", "no-web")
    eventually(lambda: served(site))


def answer_to(site: MemberSite, authority: bytes) -> bytes:
    """The header block with which db's proxy answers web's CONNECT."""
    context = client_context(Credentials.load(site.path / "web"))
    block = hbone.literal_block([(b":method", b"CONNECT"), (b":authority", authority)])
    with (
        socket.create_connection((site.address("db"), 15008), timeout=30) as tcp,
        context.wrap_socket(tcp) as tls,
    ):
        tls.sendall(hbone.CLIENT_HELLO + hbone.frame(hbone.HEADERS, hbone.END_HEADERS, 1, block))
        while True:
            head = tls.recv(9)
            length, kind = int.from_bytes(head[:3], "big"), head[3]
            payload = b"".join(tls.recv(1) for _ in range(length))
            if kind == hbone.HEADERS:
                return payload


def test_a_peer_may_ask_for_a_service_by_name_that_was_never_heard_of(
    running: tuple[MemberSite, object, object],
) -> None:
    site, *_ = running
    ok = b"\x88"  # RFC 7541 appendix A: :status 200
    assert answer_to(site, b"db.shop.svc.cluster.local:6379").endswith(ok)
    assert ok not in answer_to(site, b"nobody.shop:6379")
    assert ok not in answer_to(site, b"db.elsewhere:6379")
    assert control_of(site, "db")["services"] == ["shop/db", "shop/nobody"], "nothing of another namespace"


def test_a_service_that_is_deleted_is_refused_and_back_when_it_is_back(
    running: tuple[MemberSite, object, object],
) -> None:
    site, *_ = running
    assert served(site)
    site.control.delete("Service", "shop", "db")
    eventually(lambda: not served(site))
    site.control.apply(site.resources)
    eventually(lambda: served(site))


def test_it_restarts_and_serves_with_control_plane_and_broker_gone(site: MemberSite) -> None:
    with ExitStack() as stack:
        for name in ("db", "web"):
            site.token_file(name)
            stack.enter_context(site.running(name))
        assert served(site)
        eventually(lambda: knows(site, "db", b"root/shop") and knows(site, "web", b"svc/shop/db"))
        site.control.stop()
        site.broker.kill()
        assert served(site), "nobody is asked for what is known"
    with ExitStack() as stack:  # they were killed
        for name in ("db", "web"):
            stack.enter_context(site.running(name))
        assert served(site)
        eventually(lambda: "no connection to the broker" in str(control_of(site, "web")["problems"]))
        dump = control_of(site, "web")
        assert dump["connected"] is False
        assert dump["age_s"] is not None
        assert "\nuproxy_demanded_services 1\n" in get(site.address("web"), 15020, "/metrics")[1]
        site.broker.start()
        site.control.start()
        site.control.apply(DENY_WEB)
        eventually(lambda: not served(site))


def test_without_state_it_waits_and_says_for_what(site: MemberSite) -> None:
    site.token_file("web")
    with site.running("web"):
        pass
    (site.path / "web" / "state").unlink(missing_ok=True)
    site.broker.kill()
    process = subprocess.Popen(site.command("web"), stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: accepts_operators(site))
        status, text = get(site.address("web"), 15021, "/healthz/ready")
        assert status == 503
        assert "config" in text
        assert "shop" in text
        began = time.monotonic()
        with pytest.raises(ConnectionResetError):
            dial(site.forward)
        assert time.monotonic() - began > 4.5, "held, then refused"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def accepts_operators(site: MemberSite) -> bool:
    try:
        return get(site.address("web"), 15021, "/healthz/ready")[0] > 0
    except OSError:
        return False


def test_what_ends_is_reported_as_gone(
    running: tuple[MemberSite, subprocess.Popen[str], subprocess.Popen[str]],
) -> None:
    site, web, db = running

    def online(identity: object, name: str) -> bool:
        status = site.control.status(identity, name)  # type: ignore[arg-type]
        return status is not None and status.online

    eventually(lambda: online(WEB, "web") and online(DB, "db"))
    assert served(site)
    web.send_signal(signal.SIGTERM)
    assert web.wait(60) == 0
    assert knows(site, "web", b"svc/shop/db"), "what it learnt last is on disk"
    db.kill()
    eventually(lambda: not online(WEB, "web") and not online(DB, "db"))


def test_a_token_is_used_once(site: MemberSite) -> None:
    token = site.token_file("web")
    with site.running("web"):
        pass
    (site.path / "db.token").write_text(token.read_text())
    said = site.refusal("db")
    assert f"cannot join with {site.path}/db.token" in said
    assert "used" in said


def test_a_certificate_is_renewed_while_it_serves(tmp_path: Path) -> None:
    with (
        MemberSite.running_in(tmp_path, NETWORK, ttl_s=8) as site,
        echo_server(site.application),
        ExitStack() as stack,
    ):
        for name in ("db", "web"):
            site.token_file(name)
            stack.enter_context(site.running(name))
        first, ends = (tmp_path / "web" / "chain.pem").read_bytes(), time.time() + 8
        with socket.create_connection(site.forward, timeout=30) as app:
            app.sendall(b"a")
            assert app.recv(1) == b"a"
            eventually(lambda: all("a new certificate is in use" in site.log(name) for name in ("web", "db")))
            assert (tmp_path / "web" / "chain.pem").read_bytes() != first
            app.sendall(b"b")
            assert app.recv(1) == b"b"
        eventually(lambda: site.log("web").count("connected to the broker") > 1)
        time.sleep(max(0.0, ends - time.time()))
        assert served(site), "the first one has ended"
        eventually(lambda: control_of(site, "web")["connected"])
        site.control.apply(DENY_WEB)
        eventually(lambda: not served(site))


def test_who_is_revoked_is_cut_off_everywhere_until_it_joins_anew(site: MemberSite, tmp_path: Path) -> None:
    for name in ("db", "web"):
        site.token_file(name)
    with site.running("db") as db, site.running("web") as web:
        assert served(site)
        stolen = client_context(Credentials.load(site.path / "web"))
        with socket.create_connection(site.forward, timeout=30) as app:
            app.sendall(b"before")
            assert app.recv(6) == b"before"
            site.control.revoke(site.path / "web")
            with pytest.raises(ConnectionResetError):
                app.recv(1)
        assert refused_as_revoked(site, stolen)
        eventually(lambda: "CERT_REVOKED" in site.log("db"))
        eventually(lambda: "revoked" in str(control_of(site, "web")["problems"]))
        eventually((site.path / "db" / STATE_FILE).exists)
        for process in (web, db):
            process.kill()
            process.wait()
    site.broker.kill()
    with site.running("db"):
        assert refused_as_revoked(site, stolen), "it knows that with nobody to ask"
        site.broker.start()
        assert "the token was used already" in site.refusal("web"), "what it holds is of no use"
        site.token_file("web")
        with site.running("web"):
            eventually(lambda: served(site))
        assert refused_as_revoked(site, stolen)


def refused_as_revoked(site: MemberSite, context: ssl.SSLContext) -> bool:
    """Whether db takes no tunnel from who has this key and certificate."""
    with socket.create_connection((site.address("db"), 15008), timeout=30) as tcp:
        try:
            with context.wrap_socket(tcp) as tls:
                tls.recv(1)  # with TLS 1.3 the alert comes by the first read
        except ssl.SSLError as error:
            return "CERTIFICATE_REVOKED" in str(error)
    return False
