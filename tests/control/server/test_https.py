"""The certificate server over real TLS: who gets in, what is refused, and that nobody can wear it out."""

import asyncio
import base64
import contextlib
import http.client
import json
import socket
import ssl
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from control.client.csr import request
from control.server import https
from control.server.ca import Authority
from control.server.https import SOURCE_BURST, SOURCE_RATE_PER_S, Arrivals
from control.server.signing import ConfigKey
from tests.support.certificate_server import certificate_server, control_plane
from tests.support.certificates import DB, WEB, forge, identity_dir
from tests.support.examples import examples


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority.create(tmp_path_factory.mktemp("ca") / "ca", "cluster.local")


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory):
    return Authority.create(tmp_path_factory.mktemp("other") / "ca", "cluster.local")


@pytest.fixture
def server(authority, tmp_path):
    with certificate_server(authority, tmp_path / "server") as control:
        yield control


@pytest.fixture
def bundle(authority, tmp_path):
    path = tmp_path / "roots.pem"
    path.write_bytes(authority.bundle_pem)
    return path


@pytest.fixture
def client(server, bundle):
    """A client context, with a certificate of its own or without."""

    def make(directory=None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(bundle)
        if directory is not None:
            context.load_cert_chain(directory / "chain.pem", directory / "key.pem")
        return context

    return make


@pytest.fixture
def ask(server, client):
    """One exchange: status and content."""

    def ask(method: str, path: str, body=None, context=None, headers=None) -> tuple[int, bytes]:
        address = server.url.removeprefix("https://")
        connection = http.client.HTTPSConnection(address, context=context or client(), timeout=10)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    return ask


def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def join_body(token, own_key=None, **changed) -> str:
    body = {
        "id": token.id,
        "secret": base64.urlsafe_b64encode(token.secret).decode().rstrip("="),
        "csr": request(own_key or key(), WEB).decode(),
    }
    return json.dumps({**body, **changed})


def error_of(answer: tuple[int, bytes]) -> str:
    return json.loads(answer[1])["error"]


def address(server) -> tuple[str, int]:
    host, port = server.url.removeprefix("https://").split(":")
    return host, int(port)


# -- what it is for


def test_anybody_may_read_the_roots(ask, authority):
    assert ask("GET", "/v1/bundle") == (200, authority.bundle_pem)


def test_a_token_is_taken_for_a_certificate_and_a_membership(ask, server, authority):
    token, own_key = server.token(WEB, "web-1", "10.97.0.1"), key()
    status, content = ask("POST", "/v1/join", join_body(token, own_key))
    assert status == 200
    answer = json.loads(content)
    leaf, intermediate = x509.load_pem_x509_certificates(answer["chain"].encode())
    assert leaf.public_key() == own_key.public_key()
    assert intermediate == authority.intermediate
    assert answer["bundle"].encode() == authority.bundle_pem
    assert answer["membership"] == {
        "trust_domain": "cluster.local",
        "namespace": "shop",
        "service_account": "web",
        "workload": "web-1",
        "addresses": ["10.97.0.1"],
        "control": server.url,
        "brokers": ["mqtts://broker.example:8883"],
    }


def test_a_certificate_renews_itself(ask, server, client, authority, tmp_path):
    token = server.token(WEB, "web-1")
    own_key = key()
    chain = json.loads(ask("POST", "/v1/join", join_body(token, own_key))[1])["chain"]
    directory = tmp_path / "web"
    directory.mkdir()
    (directory / "chain.pem").write_text(chain)
    (directory / "key.pem").write_bytes(
        own_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    body = json.dumps({"workload": "web-1", "csr": request(key(), WEB).decode()})
    status, content = ask("POST", "/v1/renew", body, client(directory))
    assert status == 200
    renewed = x509.load_pem_x509_certificate(json.loads(content)["chain"].encode())
    assert renewed.serial_number != x509.load_pem_x509_certificate(chain.encode()).serial_number
    stolen = json.dumps({"workload": "db-1", "csr": request(key(), DB).decode()})
    refused = ask("POST", "/v1/renew", stolen, client(directory))
    assert refused[0] == 400
    assert str(DB) in error_of(refused)


def test_it_proves_to_be_the_control_plane_in_tls_1_3(server, client, authority):
    with socket.create_connection(address(server), 10) as raw, client().wrap_socket(raw) as connection:
        assert connection.version() == "TLSv1.3"
        names = dict(connection.getpeercert())["subjectAltName"]
    assert names == (("URI", str(control_plane(authority))),)


def test_no_session_is_resumed_which_would_outlive_its_certificate(server, client):
    with socket.create_connection(address(server), 10) as raw, client().wrap_socket(raw) as connection:
        connection.sendall(b"GET /v1/bundle HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        assert not connection.session.has_ticket


# -- who is refused


def test_a_renewal_without_a_certificate_is_refused(ask):
    refused = ask("POST", "/v1/renew", json.dumps({"workload": "web-1", "csr": request(key(), WEB).decode()}))
    assert refused[0] == 401
    assert "needs the current certificate" in error_of(refused)


def test_a_certificate_of_another_root_gets_nowhere(ask, client, other_authority, tmp_path):
    forged = client(identity_dir(other_authority, tmp_path / "forged", WEB))
    for method, path in (("POST", "/v1/renew"), ("GET", "/v1/bundle")):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            ask(method, path, "{}", forged)


def test_a_certificate_that_only_claims_our_intermediates_name_gets_nowhere(ask, client, authority, tmp_path):
    root = forge(None, ("spiffe://cluster.local",), ca=True)
    leaf = forge(root)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        ask("POST", "/v1/renew", "{}", client(leaf.write(tmp_path / "forged", authority.bundle_pem)))


def test_an_expired_certificate_renews_nothing(ask, client, authority, tmp_path):
    directory = identity_dir(authority, tmp_path / "web", WEB)
    (directory / "chain.pem").write_bytes(authority.issue((directory / "csr.pem").read_bytes(), WEB, 3))
    context = client(directory)
    assert ask("POST", "/v1/renew", "{}", context)[0] == 400
    ends = x509.load_pem_x509_certificate((directory / "chain.pem").read_bytes()).not_valid_after_utc.timestamp()
    time.sleep(max(0.0, ends + 1.1 - time.time()))  # OpenSSL counts in whole seconds, the last one included
    with pytest.raises((ssl.SSLError, ConnectionError)):
        ask("POST", "/v1/renew", "{}", context)


def test_the_config_key_makes_no_connection(ask, client, authority, tmp_path):
    ConfigKey(tmp_path, authority, b"a passphrase for this test", time.time())
    content = (tmp_path / "config-key.pem").read_bytes()
    loaded = serialization.load_pem_private_key(content, b"a passphrase for this test")
    directory = tmp_path / "config"
    directory.mkdir()
    own = x509.load_pem_x509_certificate(content)
    pem = serialization.Encoding.PEM
    (directory / "chain.pem").write_bytes(own.public_bytes(pem) + authority.intermediate.public_bytes(pem))
    (directory / "key.pem").write_bytes(
        loaded.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    with pytest.raises((ssl.SSLError, ConnectionError)):
        ask("POST", "/v1/renew", "{}", client(directory))


def test_tls_1_2_is_refused(server, client):
    context = client()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(address(server), 10) as raw, pytest.raises(ssl.SSLError):
        context.wrap_socket(raw)


def test_of_many_joins_at_once_with_one_token_one_is_served(ask, server):
    token = server.token(WEB)
    bodies = [join_body(token) for _ in range(12)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        statuses = sorted(status for status, _ in pool.map(lambda body: ask("POST", "/v1/join", body), bodies))
    assert statuses == [200] + [403] * 11


# -- what is refused


@pytest.mark.parametrize(
    "body",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"id": "x"}',
        '{"id": "x", "secret": "x", "csr": 1}',
        '{"id": "x", "secret": "x", "csr": null}',
        '{"id": "x", "secret": "eHg", "csr": "x", "identity": "spiffe://cluster.local/ns/shop/sa/db"}',
        '{"id": "x", "secret": "*", "csr": "x"}',
        '{"id": "x", "secret": "xxxxx", "csr": "x"}',
        '{"id": "\\ud800", "secret": "eHg", "csr": "x"}',
        '{"id": "x", "secret": "eHg", "csr": "\\u00e9"}',
        "[" * 20_000,
        "\xff\xfe",
    ],
)
def test_a_malformed_request_is_refused_in_json(ask, body):
    status, content = ask("POST", "/v1/join", body.encode("latin-1"))
    assert status == 400
    assert json.loads(content).keys() == {"error"}


@settings(max_examples=examples(60))
@given(
    body=st.one_of(
        st.binary(max_size=300),
        st.recursive(
            st.none() | st.booleans() | st.text(max_size=20),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "secret", "csr"]), inner)
            ),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_no_body_makes_it_fail(body):
    async def read():
        class Request:
            async def read(self):
                return body

        return await https._body(Request(), ("id", "secret", "csr"))

    with contextlib.suppress(https.EnrolmentError):
        fields = asyncio.run(read())
        assert fields.keys() == {"id", "secret", "csr"}
        assert all(type(value) is str for value in fields.values())


def test_a_wrong_secret_is_refused_and_its_token_lives(ask, server):
    token = server.token(WEB)
    wrong = base64.urlsafe_b64encode(bytes(32)).decode()
    refused = ask("POST", "/v1/join", join_body(token, secret=wrong))
    assert refused[0] == 403
    assert wrong not in refused[1].decode()
    assert ask("POST", "/v1/join", join_body(token))[0] == 200


def test_a_store_that_cannot_be_written_is_a_reason_to_try_again(ask, server, caplog):
    token = server.token(WEB)
    with server.store.transaction() as rows:
        rows.execute("CREATE TRIGGER fault BEFORE UPDATE ON tokens BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    failed = ask("POST", "/v1/join", join_body(token))
    assert failed[0] == 500
    assert "Try again later" in error_of(failed)
    assert "disk full" in caplog.text
    with server.store.transaction() as rows:
        rows.execute("DROP TRIGGER fault")
    assert ask("POST", "/v1/join", join_body(token))[0] == 200


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("GET", "/v1/join"), ("POST", "/v1/bundle"), ("DELETE", "/v1/tokens")]
)
def test_there_are_three_things_to_ask_for(ask, method, path):
    refused = ask(method, path)
    assert refused[0] == 404
    assert "/v1/join" in error_of(refused)


# -- wearing it out


def test_a_large_body_is_not_read(ask):
    refused = ask("POST", "/v1/join", json.dumps({"id": "x" * https.MAX_BODY_BYTES}))
    assert refused[0] == 413


def test_a_compressed_body_is_not_unpacked(ask):
    bomb = zlib.compress(b" " * 10_000_000)
    assert len(bomb) < https.MAX_BODY_BYTES
    assert ask("POST", "/v1/join", bomb, headers={"Content-Encoding": "deflate"})[0] == 400


def closed_within(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def test_a_silent_dialler_is_cut_off(authority, tmp_path, monkeypatch):
    monkeypatch.setattr(https, "HANDSHAKE_TIMEOUT_S", 0.3)
    with (
        certificate_server(authority, tmp_path / "server") as control,
        socket.create_connection(address(control), 10) as silent,
    ):
        assert closed_within(silent, 5)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/join HTTP/1.1\r\nContent-Length: 100\r\n\r\n{", b"GET /v1/bun"])
def test_a_slow_sender_is_cut_off(authority, tmp_path, bundle, monkeypatch, sent):
    monkeypatch.setattr(https, "CONNECTION_TIMEOUT_S", 0.4)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(bundle)
    with (
        certificate_server(authority, tmp_path / "server") as control,
        socket.create_connection(address(control), 10) as raw,
        context.wrap_socket(raw) as connection,
    ):
        connection.sendall(sent)
        assert closed_within(connection, 5)


@pytest.mark.parametrize("path", ["/v1/bundle", "/v1/nothing"])
def test_a_connection_that_ended_in_time_is_not_ended_again(authority, tmp_path, bundle, monkeypatch, caplog, path):
    monkeypatch.setattr(https, "CONNECTION_TIMEOUT_S", 0.3)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(bundle)
    with certificate_server(authority, tmp_path / "server") as control:
        for headers in ({}, {"Connection": "close"}):
            connection = http.client.HTTPSConnection(*address(control), context=context, timeout=10)
            connection.request("GET", path, headers=headers)
            connection.getresponse().read()
            connection.close()
        time.sleep(0.6)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_connections_beyond_the_bound_are_closed_and_room_is_made_again(authority, tmp_path, monkeypatch):
    monkeypatch.setattr(https, "MAX_CONNECTIONS", 4)
    with certificate_server(authority, tmp_path / "server") as control, contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(address(control), 10)) for _ in range(4)]
        crowded = stack.enter_context(socket.create_connection(address(control), 10))
        assert closed_within(crowded, 5)
        assert not closed_within(held[0], 0.2)
        for connection in held:
            connection.close()
        deadline = time.monotonic() + 5
        while True:
            with socket.create_connection(address(control), 10) as later:
                if not closed_within(later, 0.2):
                    break
            assert time.monotonic() < deadline


@pytest.mark.parametrize("shakes_hands", [False, True])
def test_whoever_says_nothing_makes_room_for_others(authority, tmp_path, monkeypatch, shakes_hands):
    monkeypatch.setattr(https, "MAX_CONNECTIONS", 4)
    monkeypatch.setattr(https, "SILENCE_S", 0.3)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=authority.bundle_pem.decode())
    with certificate_server(authority, tmp_path / "server") as control, contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(address(control), 10)) for _ in range(4)]
        if shakes_hands:
            held = [stack.enter_context(context.wrap_socket(connection)) for connection in held]
            held[0].sendall(b"POST /v1/join HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        time.sleep(0.4)
        for _ in range(6):
            connection = http.client.HTTPSConnection(*address(control), context=context, timeout=10)
            connection.request("GET", "/v1/bundle")
            assert connection.getresponse().read() == authority.bundle_pem
            connection.close()
        assert closed_within(held[0], 5)
        assert not closed_within(held[3], 0.1)


def test_a_source_that_dials_too_often_is_turned_away(authority, tmp_path, monkeypatch):
    monkeypatch.setattr(https, "SOURCE_BURST", 3)
    monkeypatch.setattr(https, "SOURCE_RATE_PER_S", 0.0)
    with certificate_server(authority, tmp_path / "server") as control:
        for patience_s, closed in ((0.1, False), (0.1, False), (0.1, False), (10, True), (10, True)):
            with socket.create_connection(address(control), 10) as connection:
                assert closed_within(connection, patience_s) is closed


def test_a_source_gets_its_burst_and_then_its_rate():
    arrivals = Arrivals()
    assert sum(arrivals.admit("192.0.2.1", 0.0) for _ in range(2 * SOURCE_BURST)) == SOURCE_BURST
    assert arrivals.admit("192.0.2.2", 0.0)
    assert sum(arrivals.admit("192.0.2.1", 1.0) for _ in range(2 * SOURCE_BURST)) == SOURCE_RATE_PER_S
    assert sum(arrivals.admit("192.0.2.1", 1e6) for _ in range(2 * SOURCE_BURST)) == SOURCE_BURST


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
    ],
)
def test_whoever_may_choose_addresses_is_one_source(first, second, same):
    arrivals = Arrivals()
    while arrivals.admit(first, 0.0):
        pass
    assert arrivals.admit(second, 0.0) is not same


def test_sources_are_forgotten_oldest_first(monkeypatch):
    monkeypatch.setattr(https, "_MAX_SOURCES", 10)
    arrivals = Arrivals()
    for number in range(200):
        arrivals.admit(f"192.0.2.{number}", 0.0)
    assert len(arrivals._buckets) == 10
    assert "192.0.2.199" in arrivals._buckets
